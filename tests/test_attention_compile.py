"""Whole accelerated models where the ops have kernels: torch.compile, checkpoint policies, derivatives, device guard.

The kernels are opaque stand-ins under the CPU key (stand_ins.py), so that the models take the way of a GPU.
"""

import copy
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hiera_kernels
from hiera_kernels.ops import attention, calling
from tests.stand_ins import counted_defaults_on_cpu
from tests.swap_cases import assert_equal, build, example, keep_mask, tensors

ATTENTION = torch.ops.hiera_kernels.mask_unit_attention.default


# A compiler takes seconds for every block. Two have mask units, pooled queries and global attention; masks of an
# autoencoder need four stages.
FEW_BLOCKS = {"stages": (1, 1), "q_pool": 1, "mask_unit_attn": (True, False)}
FEW_BLOCKS_OF_AUTOENCODER = {"stages": (1, 1, 1, 1), "decoder_depth": 1}


def small(name="hiera", kind="image", **overrides):
    """Stock and accelerated, fp32: the kernels have no fp64."""
    few = FEW_BLOCKS_OF_AUTOENCODER if kind.startswith("MAE") else FEW_BLOCKS
    stock = build(name, kind, torch.float32, **few, **overrides)
    fast = copy.deepcopy(stock)
    hiera_kernels.accelerate(fast)
    return stock, fast


def attentions(model):
    return sum("use_mask_unit_attn" in vars(module) and "qkv" in module._modules for module in model.modules())


def arguments(kind, batch):
    """What a model is called with; an autoencoder with its mask, which is drawn otherwise."""
    return {"mask": keep_mask(kind, batch), "len_keep": 3} if kind.startswith("MAE") else {}


def compiled_steps(model, kind, marked):
    """Forward and backward at batch sizes 2, 3, 5, 7: what Dynamo compiled, and the gradients at 5."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 7):
        x, others = example(kind, torch.float32, batch).requires_grad_(), arguments(kind, batch)
        if marked:
            for value in (x, *(v for v in others.values() if isinstance(v, torch.Tensor))):
                torch._dynamo.mark_dynamic(value, 0)
        found = gradients(model, compiled(x, **others), x)
        if batch == 5:
            kept = found
    return counter, kept


def gradients(model, outputs, x):
    """Of a sum of squares, by name."""
    model.zero_grad()
    sum(t.square().sum() for t in tensors(outputs) if t.is_floating_point() and t.requires_grad).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "input": x.grad}


SLOW = pytest.mark.slow
CASES = [
    pytest.param("image", False),
    pytest.param("MAE image", True),
    pytest.param("video", True, marks=SLOW),
    pytest.param("image", True, marks=SLOW),
    pytest.param("video", False, marks=SLOW),
    pytest.param("MAE image", False, marks=SLOW),
    pytest.param("MAE video", False, marks=SLOW),
]


@pytest.mark.parametrize(("kind", "marked"), CASES)
def test_one_graph_and_few_compilations_for_all_batch_sizes(kind, marked):
    """Two compilations, or one where the batch is said to vary; the ops are nodes of the one graph."""
    stock, fast = small(kind=kind)
    with counted_defaults_on_cpu() as calls:
        counter, actual = compiled_steps(fast, kind, marked)
        assert calls.count("mask_unit_attention") == 4 * attentions(fast)
        assert calls.count("mask_unit_attention_backward") == 4 * attentions(fast)
    assert counter.frame_count == (1 if marked else 2)
    targets = [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    assert targets.count(ATTENTION) == attentions(fast)
    x = example(kind, torch.float32, 5).requires_grad_()
    assert_equal(actual, gradients(stock, stock(x, **arguments(kind, 5)), x), tolerance=1e-4)


# ---- activation checkpoints, derivatives ----


@pytest.mark.parametrize("save", [True, False])
def test_checkpoint_policies_see_the_op_in_a_model(save):
    """What a policy saves is not recomputed, block by block."""
    stock, fast = small()
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        must = CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.MUST_RECOMPUTE
        return must if op is ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    x, y = (example(dtype=torch.float32).requires_grad_() for _ in range(2))
    with counted_defaults_on_cpu() as calls:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        actual = gradients(fast, checkpoint(fast, x, use_reentrant=False, context_fn=contexts), x)
    assert ATTENTION in seen
    assert calls.count("mask_unit_attention") == (1 if save else 2) * attentions(fast)
    assert_equal(actual, gradients(stock, stock(y), y), tolerance=1e-4)


def test_second_derivatives_of_a_model_raise_and_are_had_when_disabled():
    stock, fast = small(head_dropout=0.0)

    def penalty(model):
        x = example(dtype=torch.float32).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    with counted_defaults_on_cpu():
        with pytest.raises(NotImplementedError, match=r"hiera_kernels\.\w+ has no second derivative.*disabled\(\)"):
            penalty(fast)
        with hiera_kernels.disabled():
            actual = penalty(fast)
    with calling.math_attention():
        expected = penalty(stock)
    assert_equal({"penalty": actual}, {"penalty": expected}, tolerance=1e-4)


def test_forward_mode_through_a_model_is_right():
    stock, fast = small()
    x = example(dtype=torch.float32)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with counted_defaults_on_cpu():
        out, actual = torch.func.jvp(fast, (x,), (tangent,))
    step, exact = 1e-6, copy.deepcopy(stock).double()
    ahead, behind = (exact(x.double() + sign * step * tangent.double()) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert_equal({"tangent": actual.double()}, {"tangent": expected}, tolerance=1e-4)
    assert_equal({"out": out.double()}, {"out": exact(x.double())}, tolerance=1e-5)


# ---- devices ----


def test_every_launch_is_made_under_the_guard_of_its_tensors_device(monkeypatch):
    """Fake tensors on a made-up second GPU; the guard and the launch are noted, neither is made."""
    pytest.importorskip("triton")
    from hiera_kernels import kernels
    from hiera_kernels.kernels import limits
    from hiera_kernels.kernels.launch_table import Launch

    guarded, found = [], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            guarded.append(self.device)

        def __exit__(self, *error):
            guarded.pop()

    monkeypatch.setattr(limits, "_compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(Launch, "run", lambda launch: found.append((launch.kernel.__name__, list(guarded))))
    with FakeTensorMode():
        qkv = torch.empty(2, 196, 3 * 64, device="cuda:1", dtype=torch.bfloat16)
        for windows in (1, 49):
            grad = kernels.IMPLEMENTATIONS["mask_unit_attention"](qkv, 2, windows, 4)[0]
            kernels.IMPLEMENTATIONS["mask_unit_attention_backward"](grad, qkv, None, None, 2, windows, 4)
        grad = kernels.IMPLEMENTATIONS["q_pool"](qkv, 4)
        kernels.IMPLEMENTATIONS["q_pool_backward"](grad, qkv, 4)
    assert len(found) == 7  # long rows have two backward kernels
    assert all(devices == [torch.device("cuda:1")] for _, devices in found)


@pytest.mark.gpu
def test_cuda_graph_capture_after_one_warm_up_call():
    """A captured forward and backward, replayed on other numbers, equal eager ones."""
    _, fast = small(kind="image")
    fast.cuda()
    x = example(dtype=torch.float32).cuda().requires_grad_()

    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            fast(x).float().square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    fast.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for gradient in (x.grad, *(p.grad for p in fast.parameters() if p.grad is not None)):
        gradient.zero_()
    graph.replay()
    actual = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
    fast.zero_grad(set_to_none=True)
    run()
    expected = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    assert attention.refusal(torch.empty(0, 64, 96, dtype=torch.bfloat16, device="cuda"), 1) is None
    assert_equal(actual, expected, tolerance=1e-2)  # PyTorch's own reductions may differ from run to run

"""`linear_q_pool`: values and every gradient against the NumPy oracle, what it keeps, its contract.

What was broken on purpose, each alone, and which test went red: see test_kernel_mlp.py for the kernels.
- x kept for a frozen weight: test_bytes_that_autograd_keeps
- a bit for a NaN maximum: test_ties_and_nan_go_where_pytorch_sends_them
"""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import hiera_kernels
from hiera_kernels import ops, reference
from hiera_kernels.ops import shortcut
from tests import feed_forward_oracle as oracle
from tests.feed_forward_kernels import oracle_kernels_on_cpu
from tests.test_mlp_contract import compiled_graphs, shapes_out, targets

NAMESPACE = torch.ops.hiera_kernels
KERNELS = pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
TIES = pytest.mark.parametrize("ties", ["first", "split"])
# B, pooled tokens, Cin, Cout, P
SHAPES = {"2x2": (2, 6, 5, 8, 4), "odd": (3, 5, 3, 7, 3), "one": (1, 4, 2, 3, 1), "eight": (1, 3, 4, 5, 8)}
SHAPES |= {"empty": (0, 5, 4, 6, 4)}


def way(kernels):
    return oracle_kernels_on_cpu() if kernels else contextlib.nullcontext([])


def draw(shape, dtype=torch.float64, bias=True):
    """Small integers and a weight of halves: exact products, many of which tie."""
    B, kept, C, wide, P = SHAPES[shape]
    x = torch.randint(-1, 2, (B, kept * P, C)).to(dtype).requires_grad_()
    weight = (torch.randint(-1, 2, (wide, C)) / 2).to(dtype).requires_grad_()
    return (
        x,
        weight,
        torch.randn(wide).to(dtype).requires_grad_() if bias else None,
        P,
        torch.randn(B, kept, wide).to(dtype),
    )


def gradients(function, tensors, grad):
    out = function(*tensors)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expected(x, weight, bias, P, grad, ties):
    arrays = [None if t is None else t.detach().double().numpy() for t in (x, weight, bias)]
    best, groups = oracle.linear_q_pool(*arrays, P)
    found = oracle.linear_q_pool_backward(grad.double().numpy(), *arrays[:2], groups, ties)
    return [best, *(found if bias is not None else found[:2])]


def op_with_winners(x, weight, bias, P, ties):
    return NAMESPACE.linear_q_pool(x, weight, bias, P, ties, True)[0]


FUNCTIONS = {
    "reference": reference.linear_q_pool,
    "public": ops.linear_q_pool,
    "op": lambda *args: NAMESPACE.linear_q_pool(*args)[0],
    "op with winners": op_with_winners,
}


@KERNELS
@TIES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_all_gradients(function, shape, ties, kernels):
    dtype, tolerance = (torch.float32, 2e-6) if kernels else (torch.float64, 1e-12)
    for with_bias in (True, False):
        x, weight, bias, P, grad = draw(shape, dtype, with_bias)
        with way(kernels) as calls:
            got = gradients(lambda *t, P=P: FUNCTIONS[function](*t, P, ties), [x, weight, bias], grad)
        for ours, truth in zip(got, expected(x, weight, bias, P, grad, ties), strict=True):
            assert tuple(ours.shape) == truth.shape
            np.testing.assert_allclose(ours.double().numpy(), truth, rtol=tolerance, atol=tolerance)
        if kernels and function != "reference":
            assert calls == ["linear_q_pool", "linear_q_pool_backward"]


@TIES
def test_ties_and_nan_go_where_pytorch_sends_them(ties):
    """The op's default, from its winners, against PyTorch's own derivative, numbers that are none included."""
    x, weight, bias, P, grad = draw("2x2", torch.float32)
    with torch.no_grad():
        x[0, 7, 2] = float("nan")  # one of four
        x[1, :, 0] = float("nan")  # all
        x[0, 2, 1] = float("inf")
        x[0, 9, 1] = float("-inf")
        grad[0, 3, 1], grad[0, 4, 2] = float("inf"), float("nan")
    wanted = gradients(lambda *t: reference.linear_q_pool(*t, P, ties), [x, weight, bias], grad)
    got = gradients(lambda *t: op_with_winners(*t, P, ties), [x, weight, bias], grad)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
    winners = NAMESPACE.linear_q_pool(x, weight, bias, P, ties, True)[1]
    product = F.linear(x, weight, bias).detach().reshape(2, P, 6, 8)
    if ties == "first":
        assert winners.long().equal(product.max(1).indices)
    else:
        counts = sum((winners >> p) & 1 for p in range(P))
        assert counts.long().equal((product == product.amax(1, keepdim=True)).sum(1))


@KERNELS
def test_any_strides(kernels):
    x, weight, bias, P, grad = draw("2x2", torch.float32)
    wide = torch.full((2, 24, 9), 7.0)
    wide[..., 1:6] = x.detach()
    strided = [wide[..., 1:6].requires_grad_(), weight.detach().t().contiguous().t().requires_grad_(), bias]
    for one in (grad.transpose(0, 1).contiguous().transpose(0, 1), grad[:1, :1].expand_as(grad)):
        with way(kernels):
            got = gradients(lambda *t: ops.linear_q_pool(*t, P), strided, one)
        for ours, truth in zip(got, expected(x, weight, bias, P, one, "first"), strict=True):
            np.testing.assert_allclose(ours.numpy(), truth, rtol=2e-6, atol=2e-6)


@TIES
def test_derivatives_of_first_and_second_order_are_right(ties):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 8, 3), (4, 3), (4,)))
    assert torch.autograd.gradcheck(lambda *t: ops.linear_q_pool(*t, 4, ties), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *t: ops.linear_q_pool(*t, 4, ties), (x, weight, bias))


def test_second_derivatives_of_a_kernel_are_refused():
    """By each argument alone: without the refusal the derivative by weight of the gradient of x would be zero."""
    for asked in ((0,), (1,), (0, 1)):
        x, weight, bias, P, _ = draw("2x2", torch.float32)
        tensors = [t.detach().requires_grad_(i in asked) for i, t in enumerate((x, weight, bias))]
        leaves = [t for t in tensors if t.requires_grad]
        with oracle_kernels_on_cpu():
            out = ops.linear_q_pool(*tensors, P).square().sum()
            grads = torch.autograd.grad(out, leaves, create_graph=True)
            with pytest.raises(NotImplementedError, match=r"hiera_kernels.disabled\(\)"):
                torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
            with hiera_kernels.disabled():
                out = ops.linear_q_pool(*tensors, P).square().sum()
                grads = torch.autograd.grad(out, leaves, create_graph=True)
                torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@KERNELS
def test_forward_mode_and_transforms(kernels):
    x, weight, bias, P, _ = draw("odd", torch.float32)
    primals = tuple(t.detach() for t in (x, weight, bias))
    tangents = tuple(torch.randn_like(t) for t in primals)
    with way(kernels):
        for function in (ops.linear_q_pool, FUNCTIONS["op"]):
            got = torch.func.jvp(lambda *t, f=function: f(*t, P), primals, tangents)
            wanted = torch.func.jvp(lambda *t: reference.linear_q_pool(*t, P), primals, tangents)
            torch.testing.assert_close(got, wanted)


# ---- what a call costs ----


def kept(function, tensors):
    """Bytes that autograd keeps of tensors that are not arguments."""
    own = {t.untyped_storage().data_ptr() for t in tensors}
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t.untyped_storage().data_ptr() in own)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*tensors)
    return sum(n for n, is_argument in found.values() if not is_argument), sum(a for _, a in found.values())


@TIES
def test_bytes_that_autograd_keeps(ties):
    x, weight, bias, P, _ = draw("2x2", torch.float32)
    winners = 2 * 6 * 8
    frozen_weight, frozen_x = weight.detach(), x.detach()
    with oracle_kernels_on_cpu():
        assert kept(lambda *t: ops.linear_q_pool(*t, P, ties), (x, weight, bias)) == (winners, 2)
        assert kept(lambda *t: ops.linear_q_pool(*t, P, ties), (x, frozen_weight, bias.detach())) == (winners, 1)
        assert kept(lambda *t: ops.linear_q_pool(*t, P, ties), (frozen_x, weight, bias)) == (winners, 1)
        assert kept(lambda *t: ops.linear_q_pool(*t, P, ties), (frozen_x, frozen_weight, bias)) == (winners, 0)
    stock, _ = kept(lambda *t: reference.linear_q_pool(*t, P, ties), (x, weight, bias))
    assert stock >= 4 * winners


@KERNELS
def test_what_is_frozen_costs_no_product(kernels):
    for chosen in range(1, 8):
        x, weight, bias, P, grad = draw("2x2", torch.float32)
        tensors = [t.detach().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate((x, weight, bias))]
        flops, found = [], []
        for function in (reference.linear_q_pool, ops.linear_q_pool):
            with way(kernels), FlopCounterMode(display=False) as counter:
                found.append(gradients(lambda *t, f=function, P=P: f(*t, P), tensors, grad))
            flops.append(counter.get_total_flops())
        assert flops[0] == flops[1] > 0
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- autocast, opcheck, fake tensors, torch.compile ----


@KERNELS
def test_autocast(kernels):
    x, weight, bias, P, grad = draw("2x2", torch.float32)
    with way(kernels), torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(lambda *t: ops.linear_q_pool(*t, P), [x, weight, bias], grad.bfloat16())
        by_op = NAMESPACE.linear_q_pool(x, weight, bias, P)[0]
        wanted = gradients(lambda *t: reference.linear_q_pool(*t, P), [x, weight, bias], grad.bfloat16())
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 3
    assert by_op.dtype is torch.bfloat16
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02 if kernels else 0, atol=0.02 if kernels else 0)


SAMPLES = {
    "gradient": (True, "first", False),
    "winners": (True, "first", True),
    "split": (True, "split", True),
    "no bias": (False, "split", False),
}


@KERNELS
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample, kernels):
    with_bias, ties, save = SAMPLES[sample]
    x, weight, bias, P, grad = draw("2x2", torch.float32, with_bias)
    with way(kernels):
        torch.library.opcheck(NAMESPACE.linear_q_pool.default, (x, weight, bias, P, ties, save))
        x, weight = x.detach(), weight.detach()
        winners = NAMESPACE.linear_q_pool(x, weight, bias, P, ties, True)[1]
        for needs in ([True] * 3, [False, True, False], [False, False, True]):
            args = (grad, x, weight, winners, P, ties, needs)
            torch.library.opcheck(
                NAMESPACE.linear_q_pool_backward.default, args, test_utils=["test_schema", "test_faketensor"]
            )


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_of_any_device(device):
    with FakeTensorMode():
        x, weight = (torch.empty(*s, device=device, dtype=torch.bfloat16) for s in ((2, 24, 5), (8, 5)))
        out, winners = NAMESPACE.linear_q_pool(x, weight, None, 4, "first", True)
        grads = NAMESPACE.linear_q_pool_backward(out, x, weight, winners, 4, "first", [True, True, True])
        assert ops.linear_q_pool(x, weight, None, 4).shape == out.shape
    found = [(tuple(t.shape), t.dtype) for t in (out, winners, *grads)]
    bf16 = torch.bfloat16
    assert found == [
        ((2, 6, 8), bf16),
        ((2, 6, 8), torch.uint8),
        ((2, 24, 5), bf16),
        ((8, 5), bf16),
        ((8,), torch.float32),
    ]


@TIES
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_call_keeps_what_the_eager_one_keeps(ties, autocast):
    x, weight, bias, P, _ = draw("2x2", torch.float32)
    with oracle_kernels_on_cpu() as calls, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        (forward, backward), out, grad = compiled_graphs(lambda x: ops.linear_q_pool(x, weight, bias, P, ties), x)
        assert calls == ["linear_q_pool", "linear_q_pool_backward"]
        eager = ops.linear_q_pool(x, weight, bias, P, ties)
        (eager_grad,) = torch.autograd.grad(eager.float().square().sum(), x)
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(grad, eager_grad)
    assert "hiera_kernels.linear_q_pool.default" in targets(forward)
    assert "hiera_kernels.linear_q_pool_backward.default" in targets(backward)
    assert (2, 24, 8) not in shapes_out(forward), "the un-pooled product"
    assert shapes_out(forward).count((2, 6, 8)) == 2, "the result and its winners"


def test_compiled_without_a_kernel_it_is_plain_operations():
    x, weight, bias, P, _ = draw("2x2", torch.float32)
    graphs, *_ = compiled_graphs(lambda x: ops.linear_q_pool(x, weight, bias, P), x)
    assert not [target for graph in graphs for target in targets(graph) if "hiera_kernels" in target]


@KERNELS
def test_one_graph_for_all_batch_sizes(kernels):
    _, weight, bias, P, _ = draw("2x2", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    with way(kernels):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: ops.linear_q_pool(x, weight, bias, P), backend=counter, fullgraph=True)
        for batch in (2, 3, 5, 7):
            x = torch.randn(batch, 24, 5, requires_grad=True)
            outs = compiled(x), ops.linear_q_pool(x, weight, bias, P)
            torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs))
    assert counter.frame_count <= 2


# ---- what is refused ----


def test_strides_that_a_byte_does_not_hold_go_to_the_reference():
    x, weight = torch.randn(1, 18, 3, requires_grad=True), torch.randn(4, 3)
    with oracle_kernels_on_cpu() as calls:
        out = ops.linear_q_pool(x, weight, None, 9, "split")
        assert calls == []
        assert out.equal(reference.linear_q_pool(x, weight, None, 9, "split"))
        ops.linear_q_pool(x, weight, None, 9)
        assert calls == ["linear_q_pool"]
        assert "one byte" in shortcut.refusal(x, weight, None, 9, "split")
        assert "float64" in shortcut.refusal(x.double(), weight.double(), None, 9)
    with pytest.raises(ValueError, match="stride must be at most 8 for ties='split'"):
        NAMESPACE.linear_q_pool(x, weight, None, 9, "split")


def test_bad_arguments_are_named():
    x, weight, bias, P, _ = draw("2x2", torch.float32)
    bad = [
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"x": x.long()}, TypeError, "x must be one of .*got torch.int64"),
        ({"x": x[0]}, ValueError, r"x must be \[B, N, Cin\], got shape \(24, 5\)"),
        ({"weight": weight.t()}, ValueError, r"weight must be \[Cout, 5\].* got shape \(5, 8\)"),
        ({"weight": weight.double()}, TypeError, r"weight must have the dtype of x, torch.float32, got torch.float64"),
        ({"bias": bias[:2]}, ValueError, r"bias must have shape \(8,\).* got \(2,\)"),
        ({"bias": bias.half()}, TypeError, "bias must have the dtype of x"),
        ({"stride": 5}, ValueError, r"stride=5 for shape \(2, 24, 5\)"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": 2.0}, TypeError, r"stride must be an int, got 2\.0"),
        ({"ties": "even"}, ValueError, "ties must be one of .* got 'even'"),
    ]
    for change, error, words in bad:
        with pytest.raises(error, match=words):
            ops.linear_q_pool(**({"x": x, "weight": weight, "bias": bias, "stride": P} | change))

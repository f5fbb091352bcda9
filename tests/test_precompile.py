"""`warmup`: what it compiles is what a step launches, and it leaves everything as it was.

What needs a GPU and is not shown here: that a first step is short afterwards, that threads on another device than the
first meet its driver, and that PyTorch's allocator gives addresses that are divisible by 16, as is assumed.

Broken on purpose, and what turned red: the walk without its backward, hooks removed in place of silenced (the walk
against a real step), hooks kept (that, and nothing changes), stand-ins always at address 0 and ints without their
divisibility (Triton's own specialization, its cache), random states not put back (the model that needs data).
"""

import contextlib
import copy
import random
import threading

import pytest
import torch

import hiera_kernels
from hiera_kernels import kernels, precompile
from hiera_kernels.lookalike import tensors_in
from hiera_kernels.ops import calling
from tests.swap_cases import LIBRARIES, build, example

pytest.importorskip("triton")


@contextlib.contextmanager
def kernels_planned_on_cpu():
    """The kernels under the CPU key, as if the CPU were an H100. They can be planned, not launched."""
    from hiera_kernels.kernels import limits

    with torch.library._scoped_library("hiera_kernels", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "_compute_capability", lambda device: (9, 0))
        patch.setattr(calling, "limits", dict(calling.limits))
        kernels.register(library, "CPU")
        yield


def planned(model, batch):
    """The launches of the walk, as an H100 would have them."""
    with kernels_planned_on_cpu():
        return precompile.launches_of_a_step(model, batch)


@pytest.fixture
def on_cpu_keys():
    with kernels_planned_on_cpu():
        yield


def fast(name, kind="image", dtype=torch.float32, **overrides):
    model = build(name, kind, dtype, **overrides)
    hiera_kernels.accelerate(model)
    return model


def of_a_real_step(model, batch, monkeypatch):
    """What a forward and backward on real tensors launch; only the kernels themselves do nothing."""
    from hiera_kernels.kernels.launch_table import Launch

    made = []
    with monkeypatch.context() as patch, kernels_planned_on_cpu():
        patch.setattr(Launch, "run", lambda launch: made.append(launch))  # a function, to become a method
        sum(x.sum() for x in tensors_in(model(batch)) if x.is_floating_point() and x.requires_grad).backward()
    return [precompile.specialization(launch) for launch in made]


# ---- the launches ----


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"), [("hiera", "image"), ("hiera", "MAE video"), ("hiera-transformer", "MAE image")]
)
def test_walk_notes_the_launches_of_a_real_step(name, kind, hooked, monkeypatch):
    """Kernel by kernel in the same order: constants, dtypes, divisibility. Hooks make fused blocks go another way."""
    from hiera_kernels.kernels import attention, attention_backward

    model, batch = fast(name, kind, mlp_ratio=2.0), example(kind, torch.float32)
    called = []
    if hooked:
        model.blocks[2].norm1.register_forward_hook(lambda *args: called.append(args))
    noted = [precompile.specialization(launch) for launch in planned(model, batch)]
    assert not called
    made = of_a_real_step(model, batch, monkeypatch)
    assert noted == made
    kernels_of_attention = {attention._forward_kernel, attention_backward._backward_kernel}
    assert kernels_of_attention <= {launch[0] for launch in made}


def test_walk_follows_autocast(monkeypatch):
    model, batch = fast("hiera", drop_path_rate=0.3).train(), example(dtype=torch.float32)
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            noted = [precompile.specialization(launch) for launch in planned(model, batch)]
            made = of_a_real_step(model, batch, monkeypatch)
        assert set(noted) == set(made)  # which blocks drop paths is drawn, and decides nothing about kernels
        found[enabled] = set(noted)
    assert "float16" not in str(found[False])
    assert "float16" in str(found[True])


class NeedsData(torch.nn.Module):
    """A boolean index, as the original masked autoencoder has one, between the layers."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 3 * 8)

    def forward(self, x):
        random.random()
        kept = torch.rand(x.shape[:2]).argsort(dim=1) < 4
        return hiera_kernels.mask_unit_attention(self.qkv(x[kept].reshape(x.shape[0], 4, -1)), 1)


def test_a_model_that_needs_data_is_walked_with_data():
    model, batch = NeedsData(), torch.randn(2, 16, 8)
    state, random_state = torch.get_rng_state(), random.getstate()
    launches = planned(model, batch)
    assert [launch.kernel.__name__ for launch in launches] == ["_forward_kernel", "_backward_kernel"]
    assert launches[0].arguments["p_qkv"].shape == (2, 4, 24)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == random_state


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_of_the_model_changes(name):
    model, called = fast(name, drop_path_rate=0.5).train(), []
    model.register_buffer("seen", torch.zeros(3))
    model.register_forward_pre_hook(lambda module, args: module.seen.add_(1) and random.random())
    for module in model.modules():
        module.register_forward_hook(lambda *args: called.append(args))
        module.register_full_backward_hook(lambda *args: called.append(args))
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    hooks = [list(module._forward_hooks.values()) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state, random_state, classes = torch.get_rng_state(), random.getstate(), [type(m) for m in model.modules()]
    batch = example(dtype=torch.float32).requires_grad_()
    assert planned(model, batch)
    assert called == []
    assert [list(module._forward_hooks.values()) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert (next(model.parameters()).grad == 1).all()
    assert batch.grad is None
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == random_state
    assert [type(m) for m in model.modules()] == classes
    assert model.training


def test_grad_mode_of_the_caller_does_not_matter():
    model, batch = fast("hiera"), example(dtype=torch.float32)
    wanted = list(map(precompile.specialization, planned(model, batch)))
    assert wanted
    with torch.no_grad():
        assert list(map(precompile.specialization, planned(model, batch))) == wanted
    compiled = torch.compile(model, backend="eager")
    assert precompile._unwrapped(compiled) is model


# ---- compiling them ----


def test_arguments_are_told_apart_by_dtype_by_one_and_by_sixteen():
    """Else the comparison of the walk with a real step would compare less than Triton does."""
    x = torch.zeros(2, 48, 72)
    assert precompile._kind(x, False) == (torch.float32, True)
    assert precompile._kind(x[0, 0, 1:], False) == (torch.float32, False)
    assert len({precompile._kind(n, False) for n in (1, 16, 17, 32, 2**31, 2**31 + 1)}) == 5
    assert len({precompile._kind(n, True) for n in (1, 16, 17, 32, 2**31, 2**31 + 1)}) == 2


def a_step(batch=2):
    """Noted launches of attention with and without pooling and of q_pool, on real tensors."""
    from hiera_kernels.kernels.launch_table import noted

    notes = []
    with noted(notes):
        for windows, stride, offset in ((3, 1, 0), (3, 4, 0), (1, 1, 1)):
            wide = torch.zeros(batch * 48 * 72 + offset, dtype=torch.bfloat16)
            qkv = wide[offset:].view(batch, 48, 72)
            torch.ops.hiera_kernels.mask_unit_attention(qkv, 3, windows, stride)
            grad = torch.zeros(batch, 48 // stride, 24, dtype=torch.bfloat16)
            torch.ops.hiera_kernels.mask_unit_attention_backward(grad, qkv, None, None, 3, windows, stride)
            torch.ops.hiera_kernels.q_pool(qkv[:, : 45 + windows, :1].contiguous(), 1)
    return notes


def triton_specialization(launch, arguments):
    """What Triton's own binder makes of these arguments on an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    _, found, options = binder(
        **arguments, **launch.constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    return launch.kernel, tuple(found), str(options)


@pytest.mark.usefixtures("on_cpu_keys")
def test_specialization_is_tritons_own():
    """A stand-in means to Triton what the tensor means; launches that Triton tells apart, and no others, are apart."""
    ours, theirs = {}, {}
    for launch in (*a_step(2), *a_step(3)):
        stand_ins = {
            name: precompile._Pointer(value) if isinstance(value, torch.Tensor) else value
            for name, value in launch.arguments.items()
        }
        found = triton_specialization(launch, stand_ins)
        assert found == triton_specialization(launch, launch.arguments)
        ours.setdefault(precompile.specialization(launch), set()).add(found)
        theirs.setdefault(found, set()).add(precompile.specialization(launch))
    assert all(len(same) == 1 for same in (*ours.values(), *theirs.values()))
    assert len(ours) == 8  # the last attention starts off the 16 bytes, the last planes are no multiple of 16


class MadeUp:
    """What Triton keeps of a compiled kernel, which can be "launched" and notes it."""

    function, packed_metadata = None, None

    def __init__(self):
        self.launched = 0

    def launch_metadata(self, *args):
        """Nothing."""

    def run(self, *args):
        """A launch."""
        self.launched += 1


@pytest.fixture
def gpu_without_a_driver(monkeypatch):
    """Triton believes in an H100; its compiler is replaced. Yields the sources that it was asked to compile."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    from hiera_kernels.kernels import attention, attention_backward, pooling

    compiled = []

    def compile(source, target, options, **_):
        compiled.append((source.fn, threading.current_thread()))
        return MadeUp()

    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    for kernel in (
        attention._forward_kernel,
        attention_backward._backward_kernel,
        pooling._forward_kernel,
    ):
        caches = kernel.create_binder()
        monkeypatch.setattr(kernel, "device_caches", {0: caches})
        monkeypatch.setattr(kernel, "compile", compile)
    return compiled


@pytest.mark.usefixtures("on_cpu_keys")
def test_a_launch_finds_what_was_compiled_ahead(gpu_without_a_driver):
    """Through Triton's own cache, with real tensors of another batch size: nothing is compiled a second time."""
    ahead = precompile.compile_ahead(a_step(2))
    count = len(gpu_without_a_driver)
    assert count == len(ahead) == len({precompile.specialization(launch) for launch in a_step(2)})
    assert all(thread is not threading.main_thread() for _, thread in gpu_without_a_driver)
    for launch in (*a_step(2), *a_step(4)):
        launch.run()
    assert len(gpu_without_a_driver) == count
    launched = [made for kernel, _ in gpu_without_a_driver for made in kernel.device_caches[0][0].values()]
    assert sum(made.launched for made in {id(m): m for m in launched}.values()) == 2 * len(a_step())
    assert {kernel.name for kernel in ahead} == {"forward_kernel", "backward_kernel"}


@pytest.mark.usefixtures("on_cpu_keys")
def test_a_kernel_that_cannot_be_compiled_is_named(gpu_without_a_driver, monkeypatch):
    from hiera_kernels.kernels import attention_backward

    def refuse(*args, **kwargs):
        raise ValueError("out of registers")

    monkeypatch.setattr(attention_backward._backward_kernel, "compile", refuse)
    with pytest.raises(RuntimeError, match=r"backward_kernel\(.*S=16.*\) cannot be compiled: out of registers"):
        precompile.compile_ahead(a_step())


# ---- the public function ----


def test_without_a_gpu_there_is_nothing_to_compile():
    result = hiera_kernels.warmup(fast("hiera"), example(dtype=torch.float32))
    assert result.kernels == []
    assert str(result) == "nothing to compile: the model is on cpu, and the kernels are for CUDA devices"


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        hiera_kernels.warmup(3, torch.zeros(1))
    with pytest.raises(TypeError, match="batch must be a tensor, a tuple of arguments or a dict of them, got float"):
        hiera_kernels.warmup(torch.nn.Linear(1, 1), 0.5)


def test_result_is_a_table():
    found = precompile.Warmup([precompile.CompiledKernel("forward_kernel", {"S": 16, "D": 96}, 2.34)], 2.5)
    assert str(found) == "1 kernels in 2.5 s\n   2.3 s  forward_kernel(S=16, D=96)"


@pytest.mark.gpu
def test_a_warm_first_step_compiles_nothing(monkeypatch):
    """On a GPU, with Triton's real compiler and launcher; the second of two devices where there are two."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    model, batch = fast("hiera").to(device), example(dtype=torch.float32).to(device)
    compiled = []
    from triton import knobs

    with torch.autocast("cuda", dtype=torch.bfloat16):
        result = hiera_kernels.warmup(model, batch)
        monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts))
        sum(x.float().sum() for x in tensors_in(model(batch))).backward()
    torch.cuda.synchronize(device)
    assert result.kernels
    assert compiled == []

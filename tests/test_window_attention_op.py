"""window_attention as an op: results on every way to it, derivatives, autocast, opcheck, compile, errors, FLOPs.

Broken once each, on purpose, and what turned red: the default backward that sums the pad row in the dtype of qkv
(test_the_pad_row_is_summed_in_fp32), the cast before pooling (ties by rounding), a fake of the wrong size (opcheck).
"""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from hiera_kernels import ops, reference
from hiera_kernels.ops import windows
from tests import window_oracle as oracle
from tests.attention_kernels import oracle_kernels_on_cpu

OP = torch.ops.hiera_kernels.window_attention.default
OP_BACKWARD = torch.ops.hiera_kernels.window_attention_backward.default
HEADS, WINDOW, STRIDE = 2, (4, 6), (2, 2)


def make(dtype=torch.float32, batch=2, size=(6, 8), requires_grad=False, head_dim=8):
    """qkv and pad; queries are whole numbers, so that ties abound."""
    channels = HEADS * head_dim
    qkv = torch.randn(batch, *size, 3 * channels, dtype=dtype)
    qkv[..., :channels] = qkv[..., :channels].round()
    pad = torch.randn(3 * channels, dtype=dtype)
    return qkv.requires_grad_(requires_grad), pad.requires_grad_(requires_grad)


def public(qkv, pad):
    return ops.window_attention(qkv, HEADS, WINDOW, STRIDE, pad)


def direct(qkv, pad):
    return OP(qkv, HEADS, WINDOW, STRIDE, pad)


def wanted(qkv, pad, grad_out=None, window=WINDOW, stride=STRIDE):
    arrays = (None if t is None else t.detach().double().numpy() for t in (qkv, pad, grad_out))
    qkv, pad, grad_out = arrays
    return oracle.window_attention(qkv, HEADS, window, stride, pad, None, grad_out)


def close(actual, expected, tolerance):
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


@contextlib.contextmanager
def no_kernels():
    yield []


WAYS = {
    "public, plain": (public, no_kernels),
    "public, kernel": (public, oracle_kernels_on_cpu),
    "torch.ops, default kernel": (direct, no_kernels),
    "torch.ops, kernel": (direct, oracle_kernels_on_cpu),
}
every_way = pytest.mark.parametrize(("function", "kernels"), WAYS.values(), ids=WAYS)


# ---- results and first derivatives ----


@every_way
def test_output_and_gradients_equal_the_oracle_on_every_way(function, kernels):
    qkv, pad = make(requires_grad=True)
    grad_out = torch.randn(2, 3, 4, 16)
    with kernels() as calls:
        out = function(qkv, pad)
        grads = torch.autograd.grad(out, [qkv, pad], grad_out, retain_graph=True)
        (alone,) = torch.autograd.grad(out, pad, grad_out)
        with torch.no_grad():
            assert torch.equal(function(qkv, pad), out)
    names = [name.removeprefix("window_attention") for name, *_ in calls]
    assert names == (["", "_backward", "_backward", ""] if names else [])
    assert bool(names) == (kernels is oracle_kernels_on_cpu)
    expected = wanted(qkv, pad, grad_out)
    close(out.detach(), expected[0], 1e-6)
    close(grads[0], expected[1], 2e-6)
    close(grads[1], expected[2], 2e-6)
    assert torch.equal(alone, grads[1])


@pytest.mark.parametrize("kernels", [no_kernels, oracle_kernels_on_cpu])
def test_each_input_may_be_the_only_one_that_requires_a_gradient(kernels):
    grad_out = torch.randn(2, 3, 4, 16)
    with kernels():
        for which in (0, 1):
            inputs = make()
            inputs[which].requires_grad_()
            (grad,) = torch.autograd.grad(public(*inputs), inputs[which], grad_out)
            close(grad, wanted(*inputs, grad_out)[1 + which], 2e-6)


@pytest.mark.parametrize("kernels", [no_kernels, oracle_kernels_on_cpu])
def test_a_pad_row_that_no_window_needs_is_left_out(kernels):
    qkv, pad = make(size=(8, 12), requires_grad=True)
    with kernels():
        for window in (WINDOW, None):
            out = ops.window_attention(qkv, HEADS, window, None, pad)
            grads = torch.autograd.grad(out.sum(), [qkv, pad], allow_unused=True)
            assert grads[1] is None or not grads[1].any()
            assert out.equal(ops.window_attention(qkv, HEADS, window))


def test_the_op_gives_a_pad_row_that_no_window_needs_zeros():
    qkv, pad = make(size=(8, 12), requires_grad=True)
    (grad,) = torch.autograd.grad(OP(qkv, HEADS, [4, 6], [], pad).sum(), pad)
    assert grad.equal(torch.zeros(48))


def test_the_pad_row_is_summed_in_fp32():
    """2 x 3999 padded tokens: a sum in bf16, which has 8 bits, would stop growing long before."""
    qkv = torch.zeros(2, 1, 1, 24, dtype=torch.bfloat16)
    grad_out = torch.ones(2, 1, 1, 8, dtype=torch.bfloat16)
    _, grad_pad = OP_BACKWARD(grad_out, qkv, torch.zeros(24, dtype=torch.bfloat16), 1, [50, 80], [])
    assert grad_pad.dtype == torch.float32
    # dv of each is 1/4000, rounded to bf16 once.
    assert grad_pad[16:].equal(torch.full((8,), 2 * 3999 * float(torch.tensor(1 / 4000).bfloat16())))


def test_the_default_backward_is_deterministic():
    qkv, pad = make()
    args = (torch.randn(2, 3, 4, 16), qkv, pad, HEADS, WINDOW, STRIDE)
    runs = [OP_BACKWARD(*args) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_inputs_alone_are_saved_and_saved_tensors_are_read_once():
    packed, unpacked = [], []
    with oracle_kernels_on_cpu():
        qkv, pad = make(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t) or t, lambda t: unpacked.append(t) or t
        ):
            out = public(qkv, pad)
        out.sum().backward()
    assert [t.shape for t in packed] == [qkv.shape, pad.shape]
    assert len(unpacked) == 2


# ---- derivatives that a fused op does not have ----


@every_way
def test_a_second_derivative_raises_or_is_right(function, kernels):
    with kernels():
        qkv, pad = make(requires_grad=True)
        grads = torch.autograd.grad(function(qkv, pad).square().sum(), [qkv, pad], create_graph=True)
        for grad in grads:
            assert grad.requires_grad
            with pytest.raises((NotImplementedError, RuntimeError), match=r"disabled\(\)|not implemented"):
                torch.autograd.grad(grad.square().sum(), qkv, retain_graph=True)


@pytest.mark.parametrize("kernels", [no_kernels, oracle_kernels_on_cpu])
def test_disabled_has_second_derivatives(kernels):
    qkv, pad = torch.randn(1, 2, 3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    with kernels() as calls, ops.disabled():
        torch.autograd.gradgradcheck(lambda t, p: ops.window_attention(t, 1, 2, None, p), (qkv, pad))
    assert calls == []


@every_way
def test_forward_mode_tangents_are_right(function, kernels):
    inputs, tangents = make(torch.float64), make(torch.float64)
    step = 1e-6
    # Whole numbers tie, and a tie has no derivative: the queries stand still.
    tangents[0][..., :16] = 0
    ahead, behind = (wanted(*(t + sign * step * d for t, d in zip(inputs, tangents, strict=True))) for sign in (1, -1))
    expected = torch.from_numpy((ahead - behind) / (2 * step))
    inputs, tangents = ([t.float() for t in pair] for pair in (inputs, tangents))
    with kernels():
        out, actual = torch.func.jvp(function, tuple(inputs), tuple(tangents))
        close(actual, expected, 1e-5)
        close(out, wanted(*inputs), 1e-6)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
            close(forward_ad.unpack_dual(function(*duals)).tangent, expected, 1e-5)


def test_a_tangent_that_meets_the_backward_raises():
    with oracle_kernels_on_cpu():
        qkv, pad = make(requires_grad=True)
        out = public(qkv, pad)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(NotImplementedError, match=r"disabled\(\)"):
                torch.autograd.grad(out, qkv, dual)


@every_way
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch_transforms_are_right(function, kernels):
    stacked = torch.stack([make()[0] for _ in range(3)])
    _, pad = make()
    with kernels():
        out = torch.func.vmap(function, in_dims=(0, None))(stacked, pad)
        grads = torch.func.grad(lambda *t: function(*t).square().sum(), argnums=(0, 1))(stacked[0], pad)
    for one, qkv in zip(out, stacked, strict=True):
        close(one, wanted(qkv, pad), 1e-6)
    expected = wanted(stacked[0], pad, 2 * out[0])
    close(grads[0], expected[1], 1e-5)
    close(grads[1], expected[2], 1e-5)


# ---- autocast ----


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [(), STRIDE])
def test_autocast_attends_in_its_dtype_and_gradients_keep_theirs(function, kernels, dtype, stride):
    qkv, pad = make(requires_grad=True)
    grad_out = torch.randn(2, *((3, 4) if stride else (6, 8)), 16)
    with kernels(), torch.autocast("cpu", dtype=dtype):
        if function is public:
            out = ops.window_attention(qkv, HEADS, WINDOW, stride or None, pad)
        else:
            out = OP(qkv, HEADS, WINDOW, stride, pad)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out, [qkv, pad], grad_out.to(dtype))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    expected = wanted(qkv, pad, grad_out, stride=stride or None)
    close(out.detach(), expected[0], 0.02)
    close(grads[0], expected[1], 0.03)
    close(grads[1], expected[2], 0.03)


def test_autocast_does_not_make_ties_by_rounding_before_pooling():
    """Two queries that differ by less than bf16 can tell: the larger one gets the gradient, not the first."""
    qkv = torch.randn(1, 1, 2, 3 * 8)
    qkv[0, 0, 0, :8], qkv[0, 0, 1, :8] = 1.0, 1.0 + 2**-12
    qkv.requires_grad_()
    with oracle_kernels_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        ops.window_attention(qkv, 1, (1, 2), (1, 2)).sum().backward()
    assert (qkv.grad[0, 0, 0, :8] == 0).all()
    assert (qkv.grad[0, 0, 1, :8] != 0).all()


def test_autocast_leaves_fp64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert direct(*make(torch.float64)).dtype == torch.float64
        assert public(*make(torch.float64)).dtype == torch.float64


# ---- what the kernel does not serve ----


@pytest.mark.parametrize(
    ("qkv", "window", "stride", "reason"),
    [
        (torch.randn(1, 2, 2, 24, dtype=torch.float64), 2, None, "float64"),
        (torch.randn(1, 2, 2, 3 * 12), 2, None, "head dimension is 12"),
        (torch.randn(1, 2, 2, 3 * 136), 2, None, "head dimension is 136"),
        (torch.randn(1, 2, 2, 24), (16, 17), None, "272 keys"),
        (torch.randn(1, 20, 13, 24), None, None, "260 keys"),
        (torch.randn(1, 10, 2, 24), (10, 2), (10, 2), "q_stride"),
        (TwoTensor(torch.randn(1, 2, 2, 24), torch.randn(1, 2, 2, 24)), 2, None, "TwoTensor"),
    ],
)
def test_what_the_kernel_does_not_serve_goes_to_the_reference(qkv, window, stride, reason):
    with oracle_kernels_on_cpu() as calls:
        assert reason in windows.refusal(qkv, 1, window, stride)
        out = ops.window_attention(qkv, 1, window, stride)
        assert calls == []
    inner, out = (qkv.a, out.a) if isinstance(qkv, TwoTensor) else (qkv, out)
    assert torch.equal(out, reference.window_attention(inner, 1, window, stride))


def test_a_pad_row_that_wraps_tensors_goes_to_the_reference():
    qkv, pad = make()
    with oracle_kernels_on_cpu() as calls:
        assert "TwoTensor" in windows.refusal(qkv, HEADS, WINDOW, STRIDE, TwoTensor(pad, pad))
        assert windows.refusal(qkv, HEADS, WINDOW, STRIDE, pad) is None
    assert "no fused kernel is registered for cpu" in windows.refusal(qkv, HEADS, WINDOW)
    assert calls == []


# ---- the contract of torch.library ----

SAMPLES = {
    "no pad": lambda: (make(requires_grad=True)[0], HEADS, WINDOW, STRIDE),
    "pad": lambda: ((t := make(requires_grad=True))[0], HEADS, WINDOW, [], t[1]),
    "pooled": lambda: ((t := make(requires_grad=True))[0], HEADS, WINDOW, STRIDE, t[1], 0.3),
    "whole windows": lambda: ((t := make(size=(4, 6), requires_grad=True))[0], HEADS, WINDOW, STRIDE, t[1]),
    "global": lambda: (make()[0], HEADS, [], STRIDE),
    "bf16": lambda: ((t := make(torch.bfloat16, requires_grad=True))[0], HEADS, WINDOW, [], t[1]),
    "empty": lambda: ((t := make(batch=0, requires_grad=True))[0], HEADS, WINDOW, STRIDE, t[1]),
    "strided": lambda: ((t := make(requires_grad=True))[0].transpose(1, 2), HEADS, (6, 4), STRIDE, t[1]),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("with_kernel", [False, True])
def test_opcheck(sample, with_kernel):
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        torch.library.opcheck(OP, SAMPLES[sample]())


@pytest.mark.parametrize("with_pad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_backward(dtype, with_pad):
    qkv, pad = make(dtype)
    pad = pad if with_pad else None
    args = (torch.randn_like(OP(qkv, HEADS, WINDOW, STRIDE, pad)), qkv, pad, HEADS, WINDOW, STRIDE)
    torch.library.opcheck(OP_BACKWARD, args)


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode() as mode:
        qkv, pad = (mode.from_tensor(t) for t in make(torch.bfloat16, requires_grad=True))
        out = OP(qkv, HEADS, WINDOW, STRIDE, pad)
        assert (out.shape, out.dtype) == ((2, 3, 4, 16), torch.bfloat16)
        grad_qkv, grad_pad = OP_BACKWARD(out, qkv, pad, HEADS, WINDOW, STRIDE)
        assert (grad_qkv.shape, grad_qkv.dtype) == (qkv.shape, torch.bfloat16)
        assert (grad_pad.shape, grad_pad.dtype) == ((48,), torch.float32)
        assert OP_BACKWARD(out, qkv, None, HEADS, WINDOW, STRIDE)[1].shape == (0,)


def through_layers(qkv, pad):
    """As a block calls it: the pad row is made inside, and its gradient goes on."""
    return ops.window_attention(qkv * 2, HEADS, 4, 2, pad.sin())


@pytest.mark.parametrize("with_kernel", [False, True])
def test_compile_has_one_graph_for_all_sizes_of_the_map(with_kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_layers, backend=counter, fullgraph=True)
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        for batch, size in ((2, (6, 10)), (3, (10, 18))):
            qkv, pad = make(batch=batch, size=size)
            for axis in (0, 1, 2):
                torch._dynamo.mark_dynamic(qkv, axis)
            qkv.requires_grad_()
            pad.requires_grad_()
            out, expected = compiled(qkv, pad), through_layers(qkv, pad)
            assert torch.allclose(out, expected, atol=1e-5)
            grad_out = torch.randn_like(out)
            for got, want in zip(*(torch.autograd.grad(o, [qkv, pad], grad_out) for o in (out, expected)), strict=True):
                assert torch.allclose(got, want, atol=1e-5)
    targets = [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    assert (OP in targets) == with_kernel, "the op where it has a kernel, plain operations where it has none"
    assert counter.frame_count == 1


def test_the_compiled_op_serves_whole_and_overhanging_maps_alike():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda t, p: ops.window_attention(t, HEADS, 4, None, p), backend=counter, fullgraph=True)
    with oracle_kernels_on_cpu():
        for size in ((5, 7), (8, 12), (6, 8)):
            qkv, pad = make(size=size)
            for axis in (1, 2):
                torch._dynamo.mark_dynamic(qkv, axis)
            assert torch.equal(compiled(qkv, pad), ops.window_attention(qkv, HEADS, 4, None, pad))
    assert counter.frame_count == 1


def test_inductor_compiles_the_plain_way():
    torch._dynamo.reset()
    inputs = make(requires_grad=True)
    compiled = torch.compile(through_layers, fullgraph=True)
    runs = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, through_layers)]
    for got, want in zip(*runs, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


class Attention(torch.nn.Module):
    def forward(self, qkv, pad):
        return public(qkv, pad)


@pytest.mark.parametrize("with_kernel", [False, True])
def test_export_with_a_dynamic_batch(with_kernel):
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        dynamic = ({0: torch.export.Dim("batch")}, None)
        program = torch.export.export(Attention(), make(), dynamic_shapes=dynamic)
        qkv, pad = make(batch=5)
        assert torch.allclose(program.module()(qkv, pad), public(qkv, pad), atol=1e-6)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # Without a kernel, a program that runs where this package is not installed.
    assert any("hiera_kernels" in target for target in targets) == with_kernel


# ---- bad arguments ----

BAD = [
    ({"qkv": [1.0]}, TypeError, "qkv must be a tensor .* got list"),
    ({"qkv": torch.zeros(2, 6, 8, 48, dtype=torch.int64)}, TypeError, "qkv must be one of .*got torch.int64"),
    ({"qkv": torch.zeros(2, 48, 48)}, ValueError, r"qkv must be \[B, Hs, Ws, 3\*C\], got shape \(2, 48, 48\)"),
    ({"qkv": torch.zeros(2, 6, 8, 50)}, ValueError, "last dimension of qkv .* multiple of 6 .* got 50"),
    ({"qkv": torch.zeros(2, 0, 8, 48)}, ValueError, r"at least one token, got shape \(2, 0, 8, 48\)"),
    ({"num_heads": 5}, ValueError, "multiple of 15 for num_heads=5, got 48"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ({"window_size": "4"}, TypeError, "window_size must be an int, two ints or None, got '4'"),
    ({"window_size": (4, 4, 4)}, TypeError, r"window_size must be .* got \(4, 4, 4\)"),
    ({"window_size": 4.0}, TypeError, "window_size must be .* got 4.0"),
    ({"window_size": True}, TypeError, "window_size must be .* got True"),
    ({"window_size": -4}, ValueError, "window_size must be positive, or 0 for global attention, got -4"),
    ({"window_size": (4, 0)}, ValueError, r"window_size must be positive, .* got \(4, 0\)"),
    ({"q_stride": 0}, ValueError, "q_stride must be positive, got 0"),
    ({"q_stride": (2, 2, 1)}, TypeError, r"q_stride must be .* got \(2, 2, 1\)"),
    ({"q_stride": 4}, ValueError, r"q_stride=4 for a map of height 6 \(window_size=4, qkv of shape \(2, 6, 8, 48\)\)"),
    ({"window_size": 3, "q_stride": 2}, ValueError, "q_stride=2 for a window of height 3"),
    ({"window_size": (2, 3), "q_stride": 2}, ValueError, "q_stride=2 for a window of width 3"),
    ({"window_size": None, "q_stride": (1, 3)}, ValueError, r"q_stride=\(1, 3\) for a window of width 8"),
    ({"pad": [0.0] * 48}, TypeError, "pad must be a tensor .* got list"),
    ({"pad": torch.zeros(1, 48)}, ValueError, r"pad must be \[3\*C\], got shape \(1, 48\)"),
    ({"pad": torch.zeros(16)}, ValueError, r"pad must have the 48 columns of qkv, got shape \(16,\)"),
    ({"pad": torch.zeros(48, dtype=torch.float64)}, TypeError, "pad must be of the dtype of qkv, .*float32, .*float64"),
    ({"pad": torch.zeros(48, device="meta")}, ValueError, "pad must be on the device of qkv, cpu, got meta"),
    ({"scale": "0.1"}, TypeError, "scale must be a number or None, got '0.1'"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"qkv": make()[0], "num_heads": HEADS, "window_size": 4, "q_stride": 2} | change
    with pytest.raises(error, match=words):
        ops.window_attention(**arguments)


# ---- FLOPs ----


def test_flops_are_those_of_whole_windows():
    """Two products forward, five backward; 2 x 2 windows of 24 keys, of which 6 queries remain, in each of 2 images."""
    qkv, pad = make(requires_grad=True)
    product = 2 * 2 * 4 * HEADS * 6 * 24 * 8
    with FlopCounterMode(display=False) as counter:
        out = direct(qkv, pad)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product
    with FlopCounterMode(display=False) as counter:
        OP(qkv, HEADS, [], [])
    assert counter.get_total_flops() == 2 * 2 * 2 * HEADS * 48 * 48 * 8

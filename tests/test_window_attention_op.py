"""window_attention as an op: results on every way to it, derivatives of every kind, autocast, FLOPs.

Broken once each, on purpose, and what turned red: the default backward that sums the pad row in the dtype of qkv
(test_the_pad_row_is_summed_in_fp32), the cast before pooling (ties by rounding), a pad row lost under autocast.
"""

import contextlib

import pytest
import torch
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

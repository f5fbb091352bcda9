"""mask_unit_attention and q_pool as ops: results on every way to them, derivatives of every kind, autocast, FLOPs.

Broken once each, on purpose, and what turned red: the default backward without `ties` (output and gradient on every
way), the cast before pooling (ties by rounding), autocast left on below autograd (backward inside autocast), a tangent
dropped in the backward (a tangent that meets the backward), `has_kernel` cached (16 tests).
"""

import contextlib
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hiera_kernels import ops, reference
from hiera_kernels.ops import attention, pooling
from tests import attention_oracle as oracle
from tests.attention_kernels import oracle_kernels_on_cpu

HEADS, WINDOWS, STRIDE = 2, 3, 4
ATTENTION = torch.ops.hiera_kernels.mask_unit_attention.default
ATTENTION_BACKWARD = torch.ops.hiera_kernels.mask_unit_attention_backward.default
Q_POOL = torch.ops.hiera_kernels.q_pool.default
Q_POOL_BACKWARD = torch.ops.hiera_kernels.q_pool_backward.default


def make_qkv(dtype=torch.float32, batch=2):
    return torch.randn(batch, 8 * WINDOWS, 3 * HEADS * 8, dtype=dtype)


def public(qkv, ties="first"):
    return ops.mask_unit_attention(qkv, HEADS, WINDOWS, STRIDE, None, ties)


def direct(qkv, ties="first"):
    return ATTENTION(qkv, HEADS, WINDOWS, STRIDE, None, ties)[0]


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
@pytest.mark.parametrize("ties", ["first", "split"])
def test_output_and_gradient_equal_the_oracle_on_every_way(function, kernels, ties):
    qkv = make_qkv().round(decimals=0).requires_grad_()  # whole numbers: ties abound
    grad_out = torch.randn(2, 8 * WINDOWS // STRIDE, HEADS * 8)
    with kernels() as calls:
        out = function(qkv, ties)
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        with torch.no_grad():
            assert torch.equal(function(qkv, ties), out)
    names = [name for name, *_ in calls]
    assert names == (["mask_unit_attention", "mask_unit_attention_backward", "mask_unit_attention"] if names else [])
    assert bool(names) == (kernels is oracle_kernels_on_cpu)
    close(out, oracle.attention(qkv.detach(), HEADS, WINDOWS, STRIDE)[0], 1e-6)
    close(grad, oracle.attention_backward(grad_out, qkv.detach(), HEADS, WINDOWS, STRIDE, ties=ties), 1e-6)


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("kernels", [no_kernels, oracle_kernels_on_cpu])
@pytest.mark.parametrize("function", [ops.q_pool, Q_POOL])
def test_q_pool_equals_the_oracle_on_every_way(function, kernels, ties):
    x = torch.randn(2, 12, 5).round().requires_grad_()
    grad_out = torch.randn(2, 3, 5)
    with kernels() as calls:
        out = function(x, STRIDE, ties)
        (grad,) = torch.autograd.grad(out, x, grad_out)
    assert [name for name, *_ in calls] == (["q_pool", "q_pool_backward"] if kernels is oracle_kernels_on_cpu else [])
    close(out, oracle.q_pool(x.detach(), STRIDE), 0.0)
    close(grad, oracle.q_pool_backward(grad_out, x.detach(), STRIDE, ties), 1e-7)


@pytest.mark.parametrize("kernels", [no_kernels, oracle_kernels_on_cpu])
@pytest.mark.parametrize("save_lse", [False, True])
def test_bias_gets_the_sum_of_the_gradient_and_is_not_added(kernels, save_lse):
    qkv = make_qkv(torch.float64).requires_grad_()
    bias = torch.randn(qkv.shape[2], dtype=torch.float64, requires_grad=True)
    with kernels():
        out, lse = ATTENTION(qkv, HEADS, WINDOWS, STRIDE, None, "first", bias, save_lse)
        assert not lse.requires_grad
        grad_out = torch.randn_like(out)
        grad, grad_bias = torch.autograd.grad(out, [qkv, bias], grad_out, retain_graph=True)
        (alone,) = torch.autograd.grad(out, bias, grad_out)
    expected, expected_lse = oracle.attention(qkv.detach(), HEADS, WINDOWS, STRIDE)
    close(out, expected, 1e-12)
    if save_lse:
        close(lse, expected_lse, 1e-12)
    else:
        assert lse.shape == (0,)
    expected = oracle.attention_backward(grad_out, qkv.detach(), HEADS, WINDOWS, STRIDE)
    close(grad, expected, 1e-11)
    close(grad_bias, expected.sum((0, 1)), 1e-11)
    assert torch.equal(alone, grad_bias)


def test_the_default_backward_is_deterministic():
    qkv, grad_out = make_qkv(), torch.randn(2, 6, 16)
    runs = [ATTENTION_BACKWARD(grad_out, qkv, None, None, HEADS, WINDOWS, STRIDE, bias_grad=True) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_only_qkv_is_saved_and_saved_tensors_are_read_once():
    packed, unpacked = [], []
    with oracle_kernels_on_cpu():
        qkv = make_qkv().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t) or t, lambda t: unpacked.append(t) or t
        )
        with hooks:
            out = public(qkv)
        out.sum().backward()
    assert [t.shape for t in packed] == [qkv.shape]
    assert len(unpacked) == 1


# ---- derivatives that a fused op does not have ----


@every_way
def test_a_second_derivative_raises_or_is_right(function, kernels):
    # Broken once: without refuse_second_derivative nothing raises, and opcheck is green.
    with kernels():
        qkv = make_qkv(torch.float32).requires_grad_()
        (grad,) = torch.autograd.grad(function(qkv).square().sum(), qkv, create_graph=True)
        assert grad.requires_grad
        with pytest.raises((NotImplementedError, RuntimeError), match=r"disabled\(\)|not implemented"):
            torch.autograd.grad(grad.square().sum(), qkv)


def test_a_second_derivative_by_the_riding_bias_alone_raises():
    qkv, bias = make_qkv(torch.float32), torch.randn(48, requires_grad=True)
    with oracle_kernels_on_cpu():
        out, _ = ATTENTION(qkv, HEADS, WINDOWS, STRIDE, None, "first", bias)
        # The output's gradient is constant: neither it nor qkv leads back to the bias.
        (grad,) = torch.autograd.grad(out.sum(), bias, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"disabled\(\)"):
            torch.autograd.grad(grad.square().sum(), bias)


@pytest.mark.parametrize("function", [ops.q_pool, Q_POOL])
def test_a_second_derivative_of_the_pooling_kernel_raises(function):
    with oracle_kernels_on_cpu():
        x = torch.randn(2, 8, 3, requires_grad=True)
        (grad,) = torch.autograd.grad(function(x, 4).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"q_pool.*hiera_kernels\.disabled\(\)"):
            grad.sum().backward()


@pytest.mark.parametrize("kernels", [no_kernels, oracle_kernels_on_cpu])
def test_disabled_has_second_derivatives(kernels):
    with kernels(), ops.disabled():
        torch.autograd.gradgradcheck(public, (make_qkv(torch.float64, 1)[..., : 3 * HEADS].requires_grad_(),))
        torch.autograd.gradgradcheck(lambda x: ops.q_pool(x, 2), (torch.randn(1, 4, 2).double().requires_grad_(),))


def oracle_tangent(qkv, tangent, step=1e-6):
    ahead, behind = (oracle.attention(qkv + sign * step * tangent, HEADS, WINDOWS, STRIDE)[0] for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@every_way
def test_forward_mode_tangents_are_right(function, kernels):
    # register_autograd, tried in place of define_autograd: tangents of zero, no error.
    qkv, tangent = make_qkv(torch.float64).float(), make_qkv()
    expected = oracle_tangent(qkv.double(), tangent.double())
    with kernels():
        out, actual = torch.func.jvp(function, (qkv,), (tangent,))
        close(actual, expected, 1e-5)
        close(out, oracle.attention(qkv, HEADS, WINDOWS, STRIDE)[0], 1e-6)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(qkv, tangent)
            close(forward_ad.unpack_dual(function(dual)).tangent, expected, 1e-5)


@pytest.mark.parametrize("function", [ops.q_pool, Q_POOL])
def test_forward_mode_tangents_of_the_pooling_kernel_are_right(function):
    x, tangent = torch.randn(2, 2, 8, 3)
    with oracle_kernels_on_cpu():
        _, actual = torch.func.jvp(lambda x: function(x, 4), (x,), (tangent,))
    winners = x.reshape(2, 4, 2, 3).argmax(1, keepdim=True)
    assert torch.equal(actual, tangent.reshape(2, 4, 2, 3).gather(1, winners)[:, 0])


def test_a_tangent_that_meets_the_backward_raises():
    with oracle_kernels_on_cpu():
        qkv = make_qkv().requires_grad_()
        out = public(qkv)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(NotImplementedError, match=r"disabled\(\)"):
                torch.autograd.grad(out, qkv, dual)


def test_a_bias_tangent_is_right():
    qkv, bias = make_qkv(torch.float64), torch.randn(48, dtype=torch.float64)
    tangent = torch.randn_like(bias)
    _, actual = torch.func.jvp(lambda b: ATTENTION(qkv, HEADS, WINDOWS, STRIDE, bias=b)[0], (bias,), (tangent,))
    close(actual, oracle_tangent(qkv, tangent), 1e-7)


@every_way
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch_transforms_are_right(function, kernels):
    stacked = make_qkv(batch=6).reshape(3, 2, 8 * WINDOWS, -1)
    with kernels():
        out = torch.func.vmap(function)(stacked)
        grad = torch.func.grad(lambda t: function(t).square().sum())(stacked[0])
    for one, qkv in zip(out, stacked, strict=True):
        close(one, oracle.attention(qkv, HEADS, WINDOWS, STRIDE)[0], 1e-6)
    expected = oracle.attention_backward(2 * out[0], stacked[0], HEADS, WINDOWS, STRIDE)
    close(grad, expected, 1e-5)


# ---- autocast ----


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 4])
def test_autocast_gives_what_the_replaced_operations_would(function, kernels, dtype, stride):
    """Pool in the dtype of qkv, attend in the autocast dtype, gradient back in the dtype of qkv."""
    qkv = make_qkv().requires_grad_()
    function = {public: ops.mask_unit_attention, direct: lambda *args: ATTENTION(*args)[0]}[function]

    def plain(qkv):
        q, k, v = qkv.reshape(2, 8, WINDOWS, 3, HEADS, 8).permute(3, 0, 4, 2, 1, 5)
        q = q.reshape(2, HEADS, WINDOWS, stride, -1, 8).max(dim=3).values
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 3).reshape(2, -1, HEADS * 8)

    with kernels(), torch.autocast("cpu", dtype=dtype):
        out, expected = function(qkv, HEADS, WINDOWS, stride), plain(qkv)
        assert out.dtype == expected.dtype == dtype
        close(out, expected.detach(), 0.02)
        grads = [torch.autograd.grad(o, qkv, torch.ones_like(o))[0] for o in (out, expected)]
        assert grads[0].dtype == torch.float32
        close(grads[0], grads[1], 0.03)


def test_autocast_does_not_make_ties_by_rounding_before_pooling():
    """Two queries that differ by less than bf16 can tell: the larger one gets the gradient, not the first."""
    qkv = torch.randn(1, 2, 3 * 8)
    qkv[0, 0, :8], qkv[0, 1, :8] = 1.0, 1.0 + 2**-12
    qkv.requires_grad_()
    with oracle_kernels_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        ops.mask_unit_attention(qkv, 1, 1, 2).sum().backward()
    assert (qkv.grad[0, 0, :8] == 0).all()
    assert (qkv.grad[0, 1, :8] != 0).all()


def test_autocast_leaves_fp64_and_pooling_alone_and_backward_may_run_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert direct(make_qkv(torch.float64)).dtype == torch.float64
        assert public(make_qkv(torch.float64)).dtype == torch.float64
        assert ops.q_pool(torch.randn(1, 4, 2), 2).dtype == torch.float32
    for kernels in (no_kernels, oracle_kernels_on_cpu):
        with kernels():
            qkv = make_qkv().requires_grad_()
            out = direct(qkv)  # outside: fp32
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out.sum().backward()
            expected = oracle.attention_backward(np.ones(out.shape), qkv.detach(), HEADS, WINDOWS, STRIDE)
            close(qkv.grad, expected, 1e-5)


# ---- the switch, the way, what the kernel does not serve ----


def test_the_switch_nests_survives_errors_and_holds_in_every_thread():
    seen = []
    with oracle_kernels_on_cpu() as calls:
        with ops.disabled():
            with pytest.raises(KeyError), ops.disabled():
                raise KeyError
            public(make_qkv())
            thread = threading.Thread(target=lambda: seen.append(public(make_qkv())))
            thread.start()
            thread.join()
        assert len(seen) == 1
        assert calls == []
        public(make_qkv())
        assert len(calls) == 1


def test_a_kernel_is_found_as_soon_as_it_is_registered_and_forgotten_after():
    for _ in range(2):
        assert attention.refusal(make_qkv(), HEADS) == "no fused kernel is registered for cpu"
        assert pooling.refusal(make_qkv()) == "no fused kernel is registered for cpu"
        with oracle_kernels_on_cpu():
            assert attention.refusal(make_qkv(), HEADS) is None
            assert pooling.refusal(make_qkv()) is None


@pytest.mark.parametrize(
    ("qkv", "args", "reason"),
    [
        (torch.randn(1, 4, 24, dtype=torch.float64), (1,), "float64"),
        (torch.randn(1, 4, 3 * 12), (1,), "head dimension is 12"),
        (torch.randn(1, 4, 3 * 136), (1,), "head dimension is 136"),
        (torch.randn(1, 257, 24), (1,), "257 keys"),
        (TwoTensor(torch.randn(1, 4, 24), torch.randn(1, 4, 24)), (1,), "TwoTensor"),
    ],
)
def test_what_the_kernel_does_not_serve_goes_to_the_reference(qkv, args, reason):
    with oracle_kernels_on_cpu() as calls:
        assert reason in attention.refusal(qkv, *args)
        out = ops.mask_unit_attention(qkv, *args)
        assert calls == []
    inner = qkv.a if isinstance(qkv, TwoTensor) else qkv
    out = out.a if isinstance(qkv, TwoTensor) else out
    assert torch.equal(out, reference.mask_unit_attention(inner, *args))


def test_without_a_kernel_no_op_stands_between_autograd_and_the_plain_operations():
    seen = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Dispatched():
        public(make_qkv().requires_grad_()).sum().backward()
        ops.q_pool(torch.randn(1, 4, 2, requires_grad=True), 2).sum().backward()
        assert "hiera_kernels" not in seen
        direct(make_qkv())
        assert "hiera_kernels" in seen


@pytest.mark.parametrize("save", [True, False])
def test_activation_checkpoint_policies_see_the_op(save):
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        must = CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.MUST_RECOMPUTE
        return must if op is ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    with oracle_kernels_on_cpu() as calls:
        weight = torch.randn(5, 3 * HEADS * 8, requires_grad=True)
        x = torch.randn(2, 8 * WINDOWS, 5)
        context = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        out = checkpoint(lambda x: public(x @ weight).square(), x, use_reentrant=False, context_fn=context)
        out.sum().backward()
        assert ATTENTION in seen
        assert [name for name, *_ in calls].count("mask_unit_attention") == (1 if save else 2)
        (expected,) = torch.autograd.grad(public(x @ weight).square().sum(), weight)
    close(weight.grad, expected, 1e-6)


# ---- FLOPs ----


def test_flops_are_those_of_the_two_and_the_five_products():
    batch, heads, windows, stride, keys, head_dim = 2, 3, 5, 4, 8, 16
    queries = keys // stride
    product = 2 * batch * windows * heads * queries * keys * head_dim
    qkv = torch.randn(batch, keys * windows, 3 * heads * head_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out, _ = ATTENTION(qkv, heads, windows, stride)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product
    q = torch.randn(batch * windows, heads, queries, head_dim)
    k = torch.randn(batch * windows, heads, keys, head_dim)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, k)
    assert counter.get_total_flops() == 2 * product

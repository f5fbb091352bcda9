"""`gelu`, `gelu_linear` and `mlp`: values and every gradient against the NumPy oracle, and what a call costs.

What was broken on purpose, each alone, and which test went red:
- h taken for independent of the bias that it holds: test_second_derivatives_are_plain_pytorchs; in `gelu`:
  test_second_derivatives_of_a_kernel_are_refused
- the kept GELU(h) used for a second derivative: test_derivatives_of_first_and_second_order_are_right
- h in place of GELU(h) in the gradient of w2: test_values_and_all_gradients
- GELU(h) kept although it is recomputed: test_bytes_that_autograd_keeps
- the product for a frozen w2 made all the same: test_what_is_frozen_costs_no_product
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import hiera_kernels
from hiera_kernels import ops, reference
from tests import feed_forward_oracle as oracle
from tests.feed_forward_kernels import oracle_kernels_on_cpu

NAMES = ("x", "w1", "b1", "w2", "b2")
# The leading axes of x, C, M, C'.
SHAPES = {
    "tokens": ((2, 5), 6, 24, 6),
    "row": ((), 3, 7, 2),
    "grid": ((2, 3, 1, 4), 5, 4, 8),
    "empty": ((0, 5), 6, 24, 6),
}
KERNELS = pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])


def way(kernels):
    return oracle_kernels_on_cpu() if kernels else contextlib.nullcontext([])


def draw(shape, dtype=torch.float64, biases=(True, True)):
    lead, C, M, wide = SHAPES[shape]
    tensors = (
        torch.randn(*lead, C),
        torch.randn(M, C) * C**-0.5,
        torch.randn(M) if biases[0] else None,
        torch.randn(wide, M) * M**-0.5,
        torch.randn(wide) if biases[1] else None,
    )
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors], torch.randn(*lead, wide).to(dtype)


def arrays(tensors):
    return [None if t is None else t.detach().double().numpy() for t in tensors]


def gradients(function, tensors, grad):
    """Output, then a gradient for each tensor that is one."""
    present = [t for t in tensors if t is not None]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, present, grad)]


def expected(tensors, grad):
    found = oracle.mlp_backward(grad.double().numpy(), *arrays(tensors))
    return [oracle.mlp(*arrays(tensors)), *(g for g, t in zip(found, tensors, strict=True) if t is not None)]


def assert_close(got, wanted, tolerance):
    assert len(got) == len(wanted)
    for ours, truth in zip(got, wanted, strict=True):
        assert tuple(ours.shape) == truth.shape
        np.testing.assert_allclose(ours.double().numpy(), truth, rtol=tolerance, atol=tolerance)


def public_in_parts(x, w1, b1, w2, b2):
    """As the fused blocks call it: the first layer by itself, its bias detached."""
    return ops.gelu_linear(F.linear(x, w1, None if b1 is None else b1.detach()), w2, b2, hidden_bias=b1)


def by_gelu_alone(x, w1, b1, w2, b2):
    return F.linear(ops.gelu(F.linear(x, w1, None if b1 is None else b1.detach()), b1), w2, b2)


FUNCTIONS = {
    "reference": reference.mlp,
    "mlp": ops.mlp,
    "mlp, all kept": lambda *args: ops.mlp(*args, recompute=False),
    "parts": public_in_parts,
    "gelu": by_gelu_alone,
    "reference parts": lambda x, w1, b1, w2, b2: reference.gelu_linear(
        F.linear(x, w1, None if b1 is None else b1.detach()), w2, b2, hidden_bias=b1
    ),
}


@KERNELS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_all_gradients(function, shape, kernels):
    # The kernels take no fp64.
    dtype, tolerance = (torch.float32, 2e-6) if kernels else (torch.float64, 1e-12)
    for biases in [(True, True), (False, True), (True, False)]:
        tensors, grad = draw(shape, dtype, biases)
        with way(kernels) as calls:
            got = gradients(FUNCTIONS[function], tensors, grad)
        assert_close(got, expected(tensors, grad), tolerance)
        assert set(calls) == ({"gelu", "gelu_backward"} if kernels and "reference" not in function else set())


@KERNELS
def test_any_strides(kernels):
    dtype, tolerance = (torch.float32, 2e-6) if kernels else (torch.float64, 1e-12)
    tensors, grad = draw("tokens", dtype)
    x, w1, b1, w2, b2 = tensors
    wide = torch.full((2, 5, 9), 7.0, dtype=dtype)
    wide[..., 2:8] = x.detach()
    strided = [wide[..., 2:8], w1.detach().t().contiguous().t(), torch.stack([b1.detach()] * 2, 1)[:, 1],
               w2.detach().t().contiguous().t(), b2.detach().flip(0).flip(0)]  # fmt: skip
    with way(kernels):
        for one in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1), grad[:1, :1].expand_as(grad)):
            got = gradients(ops.mlp, [t.requires_grad_() for t in strided], one)
            assert_close(got, expected(tensors, one), tolerance)


def test_gelu_is_pytorchs_where_no_kernel_is():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, -40.0, 1e30, float("nan"), float("inf"), float("-inf")])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        np.testing.assert_array_equal(ops.gelu(x.to(dtype)).float().numpy(), F.gelu(x.to(dtype)).float().numpy())


@pytest.mark.parametrize("function", ["mlp", "mlp, all kept", "parts", "gelu"])
def test_derivatives_of_first_and_second_order_are_right(function):
    tensors, _ = draw("grid")
    tensors = [t.detach()[:1, :1, :, :2].contiguous().requires_grad_() if t.ndim == 4 else t for t in tensors]
    assert torch.autograd.gradcheck(FUNCTIONS[function], tensors)
    assert torch.autograd.gradgradcheck(FUNCTIONS[function], tensors)


@pytest.mark.parametrize("function", ["mlp", "mlp, all kept", "parts"])
def test_second_derivatives_are_plain_pytorchs(function):
    """By each pair of arguments, others frozen: what is kept must not hide what it came from."""
    for first, second in itertools.combinations_with_replacement(range(5), 2):
        tensors, _ = draw("tokens")
        tensors = [t.detach().requires_grad_(i in (first, second)) for i, t in enumerate(tensors)]

        def second_derivative(call, tensors=tensors, first=first, second=second):
            out = call(*tensors).square().sum()
            (grad,) = torch.autograd.grad(out, tensors[first], create_graph=True)
            return torch.autograd.grad(grad.square().sum(), tensors[second])[0]

        torch.testing.assert_close(second_derivative(FUNCTIONS[function]), second_derivative(reference.mlp))


@pytest.mark.parametrize("function", ["mlp", "mlp, all kept", "parts", "gelu"])
def test_second_derivatives_of_a_kernel_are_refused(function):
    def penalty(tensors, leaves, linear):
        out = FUNCTIONS[function](*tensors)
        grads = torch.autograd.grad((out if linear else out.square()).sum(), leaves, create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    # Of a linear loss the output's gradient is a constant: only what is kept can lead back to the arguments.
    for asked, linear in itertools.product(range(4), (True, False)):
        tensors, _ = draw("tokens", torch.float32)
        tensors = [t.detach().requires_grad_(i == asked) for i, t in enumerate(tensors)]
        if asked == 3:  # linear in w2: with it alone no derivative of GELU is in play
            tensors[2].requires_grad_()
        leaves = [t for t in tensors if t.requires_grad]
        with oracle_kernels_on_cpu():
            with pytest.raises(NotImplementedError, match=r"hiera_kernels.disabled\(\)"):
                torch.autograd.grad(penalty(tensors, leaves, linear), leaves)
            with hiera_kernels.disabled():
                torch.autograd.grad(penalty(tensors, leaves, linear), leaves)


@KERNELS
def test_forward_mode_and_transforms(kernels):
    dtype = torch.float32 if kernels else torch.float64
    tensors, _ = draw("tokens", dtype)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    primals = tuple(t.detach() for t in tensors)
    with way(kernels):
        for function in (ops.mlp, public_in_parts, by_gelu_alone):
            out, tangent = torch.func.jvp(function, primals, tangents)
            wanted, wanted_tangent = torch.func.jvp(reference.mlp, primals, tangents)
            if function is not ops.mlp:  # a bias that h holds already: its value is h's affair, its tangent the call's
                torch.testing.assert_close(out, wanted)
            torch.testing.assert_close(tangent, wanted_tangent)
        batched = torch.vmap(lambda x: ops.mlp(x, *primals[1:]))(primals[0])
        torch.testing.assert_close(batched, reference.mlp(*primals))


# ---- what a call costs ----


def kept(function, tensors):
    """Bytes that autograd keeps of tensors that are not arguments, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in tensors}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*tensors)
    out.backward(torch.ones_like(out))
    return sum(found.values())


@KERNELS
def test_bytes_that_autograd_keeps(kernels):
    tensors, _ = draw("tokens", torch.float32)
    hidden = 2 * 5 * 24 * 4
    with way(kernels):
        assert kept(reference.mlp, tensors) == 2 * hidden  # stock: h and GELU(h)
        assert kept(ops.mlp, tensors) == hidden
        assert kept(FUNCTIONS["mlp, all kept"], tensors) == 2 * hidden
        assert kept(public_in_parts, tensors) == hidden
        frozen = [t.detach() for t in tensors]
        frozen[0].requires_grad_()
        assert kept(FUNCTIONS["mlp, all kept"], frozen) == hidden  # GELU(h) is for the gradient of w2 alone
        assert kept(reference.gelu, [tensors[0]]) == kept(ops.gelu, [tensors[0]]) == 0


def test_bytes_that_autograd_keeps_under_autocast():
    """In bf16: x, h and the weights as they were cast, as stock keeps them, but no GELU(h)."""
    tensors, _ = draw("tokens", torch.float32)
    casts = 2 * (2 * 5 * 6 + 24 * 6 + 6 * 24)
    hidden = 2 * (2 * 5 * 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(reference.mlp, tensors) == casts + 2 * hidden
        assert kept(ops.mlp, tensors) == casts + hidden


@KERNELS
def test_what_is_frozen_costs_no_product(kernels):
    """For every choice of what is trained: the FLOPs of plain PyTorch, its gradients, and none besides."""
    for choice in itertools.product([False, True], repeat=5):
        tensors, grad = draw("tokens", torch.float32)
        tensors = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, choice, strict=True)]
        leaves = [t for t in tensors if t.requires_grad]
        flops, found = [], []
        for function in (reference.mlp, ops.mlp):
            with way(kernels), FlopCounterMode(display=False) as counter:
                out = function(*tensors)
                found.append([out.detach(), *(torch.autograd.grad(out, leaves, grad) if leaves else ())])
            flops.append(counter.get_total_flops())
        assert flops[0] == flops[1], dict(zip(NAMES, choice, strict=True))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_checkpointing_and_hooks_that_move_what_is_kept():
    tensors, grad = draw("tokens")
    wanted = gradients(ops.mlp, tensors, grad)
    got = gradients(lambda *args: checkpoint(ops.mlp, *args, use_reentrant=False), tensors, grad)
    assert all(a.equal(b) for a, b in zip(got, wanted, strict=True))
    with torch.autograd.graph.save_on_cpu():
        got = gradients(ops.mlp, tensors, grad)
    assert all(a.equal(b) for a, b in zip(got, wanted, strict=True))


def test_an_input_that_changes_before_the_backward_is_noticed():
    tensors, _ = draw("tokens")
    h = F.linear(*tensors[:3])
    out = ops.gelu_linear(h, *tensors[3:])
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

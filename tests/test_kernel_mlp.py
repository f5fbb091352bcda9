"""The Triton kernels of GELU and of the pooled linear layer, interpreted, against the NumPy oracle.

What was broken on purpose, each alone, and which test went red:
- no jump from one image to the next, the last of equal products winning, shares of 0 / 0 in the padding:
  test_pooled_product_and_all_gradients
- products compared in fp32, before they are rounded: test_products_are_compared_as_they_are_rounded
- NaN losing, a bit for it, no NaN in the sums for the bias: test_pooled_product_of_what_is_no_number
- parts of the rows that overlap: test_every_choice_of_gradients
- rounds of two programs that overlap: test_gelu_backward_and_its_sums
- a slope wrong by 1e-5 of its exponent: test_gelu_over_its_whole_range
- columns of padding stored: test_odd_shapes_stay_inside_their_tensors, in test_kernel_mlp_traffic.py
"""

import numpy as np
import pytest
import torch

import hiera_kernels
from hiera_kernels.ops.shortcut import MAX_STRIDE
from tests import feed_forward_oracle as oracle
from tests.interpreter import kernels_on_cpu, marks
from tests.test_mlp_values import FUNCTIONS, draw, expected, gradients

pytestmark = marks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
TIES = pytest.mark.parametrize("ties", ["first", "split"])
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10}


def array(tensor):
    return tensor.detach().double().numpy()


def assert_near(got, truth, dtype, steps=1.0):
    """Within `steps` of fp32 at the size of the numbers that were added up, and one rounding to dtype."""
    apart = np.abs(array(got) - truth)
    allowed = steps * EPS[torch.float32] * np.maximum(np.abs(truth), 1.0) + EPS[dtype] / 2 * np.abs(truth)
    tiny = float(np.finfo(np.float16).smallest_subnormal) if dtype is torch.float16 else 0.0
    assert (apart <= allowed + tiny).all(), float((apart / (allowed + tiny)).max())


# ---- GELU ----


@DTYPES
def test_gelu_over_its_whole_range(dtype):
    from hiera_kernels.kernels.activation import gelu_backward, gelu_forward

    tails = 10.0 ** torch.linspace(-12, 4, 65)
    x = torch.cat([torch.linspace(-15, 15, 1201), tails, -tails]).to(dtype)
    exact = array(x)
    assert_near(gelu_forward(x), oracle.gelu(exact), dtype, steps=2)
    grad_x, out, _ = gelu_backward(torch.ones_like(x), x, output=True)
    assert_near(grad_x, oracle.gelu_slope(exact), dtype, steps=4)
    assert out.equal(gelu_forward(x))


def test_gelu_of_what_is_no_number():
    """-inf times 0 is NaN, as PyTorch computes it on a GPU; the oracle's formula is the same."""
    from hiera_kernels.kernels.activation import gelu_backward, gelu_forward

    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3e38, -3e38, 1e-45])
    out = gelu_forward(x)
    np.testing.assert_array_equal(out[:3].numpy(), [np.nan, np.inf, np.nan])
    assert out[3:5].signbit().tolist() == [False, True]
    assert out[5:7].tolist() == [x[5].item(), 0.0]
    slope = gelu_backward(torch.ones_like(x), x)[0]
    np.testing.assert_array_equal(slope[:7].isnan().numpy(), [True, True, True, False, False, False, False])
    grad = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    got = gelu_backward(grad, torch.tensor([1.0, 2.0, 3.0, 0.0]))[0]
    np.testing.assert_array_equal(got.numpy(), [np.nan, np.inf, -np.inf, 0.5])


@DTYPES
# rows, M: one program and several, the last not full; columns that are no multiple of a block, or of eight.
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (37, 70), (131, 3), (33, 200), (257, 65)], ids=str)
# One program for all rows; several, of two rounds each; one for each tile.
@pytest.mark.parametrize(("enough", "most"), [(1, 16), (1, 2), (2048, 16)])
def test_gelu_backward_and_its_sums(shape, dtype, enough, most, monkeypatch):
    from hiera_kernels.kernels import activation

    monkeypatch.setattr(activation, "ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(activation, "MAX_ROUNDS", most)
    x, grad = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    wanted = array(grad) * oracle.gelu_slope(array(x))
    plain, nothing, no_sums = activation.gelu_backward(grad, x)
    assert (nothing.numel(), no_sums.numel()) == (0, 0)
    assert_near(plain, wanted, dtype, steps=8)
    for output in (False, True):
        grad_x, out, sums = activation.gelu_backward(grad, x, output, bias_grad=True)
        assert grad_x.equal(plain)
        assert sums.dtype is torch.float32
        # Of the gradient before it is rounded: nearer than any sum of rounded ones in fp16.
        assert (np.abs(array(sums) - wanted.sum(0)) <= 2e-6 * np.abs(wanted).sum(0) + 1e-6).all()
        if output:
            assert out.equal(activation.gelu_forward(x))
    if shape == (257, 65):
        assert activation.partial_sums(x).shape[0] == {(1, 16): 1, (1, 2): 5, (2048, 16): 9}[enough, most]


def test_gelu_of_any_strides_and_of_nothing():
    from hiera_kernels.kernels.activation import gelu_backward, gelu_forward

    x, grad = torch.randn(3, 5, 70), torch.randn(3, 5, 70)
    turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    one = grad[:1, :1].expand(3, 5, 70)
    assert gelu_forward(turned).equal(gelu_forward(x))
    for a, b in zip(
        gelu_backward(one, turned, True, True), gelu_backward(one.contiguous(), x, True, True), strict=True
    ):
        assert a.equal(b)
    empty = torch.empty(0, 70)
    assert gelu_forward(empty).shape == (0, 70)
    grad_x, out, sums = gelu_backward(empty, empty, True, True)
    assert (grad_x.shape, out.shape) == ((0, 70), (0, 70))
    assert sums.tolist() == [0.0] * 70


@pytest.mark.parametrize("function", ["mlp", "mlp, all kept", "parts", "gelu"])
def test_the_mlp_and_its_gradients_run_the_kernels(function):
    for biases in ((True, True), (False, False)):
        tensors, grad = draw("tokens", torch.float32, biases)
        with kernels_on_cpu() as calls:
            got = gradients(FUNCTIONS[function], tensors, grad)
        assert calls == ["gelu", "gelu_backward"]
        for ours, truth in zip(got, expected(tensors, grad), strict=True):
            np.testing.assert_allclose(array(ours), truth, rtol=3e-6, atol=3e-6)


# ---- the pooled linear layer ----

# B, pooled tokens, C, O, P. Images that share a tile of rows; several tiles; columns and channels that are no multiple
# of a block; more channels than a block; up to 16 tokens to pool.
SHAPES = [(3, 7, 24, 40, 4), (1, 130, 8, 70, 2), (2, 5, 96, 64, 4), (1, 9, 3, 5, 3), (2, 3, 16, 33, 1)]
SHAPES.append((1, 4, 40, 20, 8))
POOLED = [(shape, ties) for shape in SHAPES for ties in ("first", "split")] + [((1, 2, 8, 16, 16), "first")]


def draw_pooled(shape, dtype, special=False):
    """Products on a coarse grid, exact in every dtype, many of which tie."""
    B, kept, C, wide, P = shape
    x = torch.randint(-2, 3, (B, P * kept, C)).float()
    weight = torch.randint(-1, 2, (wide, C)) / 4
    bias = torch.randint(-4, 5, (wide,)) / 2
    grad = torch.randn(B, kept, wide)
    if special:
        x[0, kept, 0], x[-1, -1, -1] = float("nan"), float("inf")
        x[0, 1::kept, 1] = float("nan")
        grad[0, 2, 0], grad[0, 3, 1], grad[0, 4, 2] = float("inf"), float("nan"), float("-inf")
    return (t.to(dtype) for t in (x, weight, bias, grad))


def run_pooled(x, weight, bias, grad, stride, ties, needs=(True, True, True)):
    from hiera_kernels.kernels.linear_pooling import linear_q_pool_forward
    from hiera_kernels.kernels.linear_pooling_backward import linear_q_pool_backward

    out, winners = linear_q_pool_forward(x, weight, bias, stride, ties, True)
    return out, winners, linear_q_pool_backward(grad, x, weight, winners, stride, ties, needs)


@DTYPES
@pytest.mark.parametrize(("shape", "ties"), POOLED, ids=str)
def test_pooled_product_and_all_gradients(shape, ties, dtype):
    from hiera_kernels.kernels.linear_pooling import linear_q_pool_forward

    P = shape[-1]
    x, weight, bias, grad = draw_pooled(shape, dtype)
    for b in (bias, None):
        best, groups = oracle.linear_q_pool(array(x), array(weight), None if b is None else array(b), P)
        out, winners, grads = run_pooled(x, weight, b, grad, P, ties)
        assert out.dtype is dtype
        np.testing.assert_array_equal(array(out), best)
        same = groups == best[:, None]
        bits = (same << np.arange(P)[:, None, None]).sum(1)
        np.testing.assert_array_equal(winners.numpy(), same.argmax(1) if ties == "first" else bits)
        wanted = oracle.linear_q_pool_backward(array(grad), array(x), array(weight), groups, ties)
        assert [g.dtype for g in grads] == [dtype, dtype, torch.float32]
        for i, (ours, truth) in enumerate(zip(grads, wanted, strict=True)):
            # A share of a tie is rounded to the dtype before it is multiplied, as PyTorch's derivative has it.
            step = EPS[dtype] if i < 2 else EPS[torch.float32]
            assert np.abs(array(ours) - truth).max() <= 4 * step * max(1.0, np.abs(truth).max())
    inference, nothing = linear_q_pool_forward(x, weight, bias, P, ties)
    assert inference.equal(run_pooled(x, weight, bias, grad, P, ties)[0])
    assert nothing.numel() == 0


@TIES
def test_products_are_compared_as_they_are_rounded(ties):
    """1024 and 1024.125 are one number in fp16: they tie, and the first of them has the gradient."""
    x = torch.tensor([[[1024.0, 0.0]], [[1024.0, 0.125]]], dtype=torch.float16).reshape(1, 2, 2)
    weight, grad = torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 1, 1, dtype=torch.float16)
    out, winners, (grad_x, _, _) = run_pooled(x, weight, None, grad, 2, ties)
    assert out.item() == 1024
    assert winners.item() == (0 if ties == "first" else 0b11)
    assert grad_x[0, :, 0].tolist() == ([1.0, 0.0] if ties == "first" else [0.5, 0.5])


@TIES
def test_pooled_product_of_what_is_no_number(ties):
    """Against PyTorch itself: NaN wins, the first of several; where it goes in the gradients."""
    shape = (2, 6, 8, 12, 4)
    x, weight, bias, grad = draw_pooled(shape, torch.float32, special=True)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wanted = hiera_kernels.reference.linear_q_pool(*leaves, 4, ties)
    wanted.backward(grad)
    out, _, grads = run_pooled(x, weight, bias, grad, 4, ties)
    for ours, theirs in zip([out, *grads], [wanted.detach(), *(t.grad for t in leaves)], strict=True):
        np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-5, atol=1e-5)


@TIES
def test_every_choice_of_gradients(ties, monkeypatch):
    from hiera_kernels.kernels import linear_pooling_backward

    x, weight, bias, grad = draw_pooled((3, 47, 12, 20, 4), torch.float32)
    *_, together = run_pooled(x, weight, bias, grad, 4, ties)
    for chosen in range(8):
        needs = tuple(bool(chosen >> i & 1) for i in range(3))
        *_, alone = run_pooled(x, weight, bias, grad, 4, ties, needs)
        for ours, all_at_once, needed in zip(alone, together, needs, strict=True):
            assert ours.equal(all_at_once) if needed else ours.numel() == 0
    for enough in (1, 3, 1000):  # one program for all rows; parts that the rows do not fill; a part for each tile
        monkeypatch.setattr(linear_pooling_backward, "ENOUGH_PROGRAMS", enough)
        *_, parted = run_pooled(x, weight, bias, grad, 4, ties)
        for ours, before in zip(parted, together, strict=True):
            torch.testing.assert_close(ours, before, rtol=1e-5, atol=1e-5)


def test_pooled_product_of_any_strides_and_of_nothing():
    x, weight, bias, grad = draw_pooled((2, 6, 8, 12, 4), torch.float32)
    wanted = run_pooled(x, weight, bias, grad[:1, :1].expand(2, 6, 12).contiguous(), 4, "split")
    wide = torch.full((2, 24, 11), 5.0)
    wide[..., 2:10] = x
    strided = (wide[..., 2:10], weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0])
    got = run_pooled(*strided, grad[:1, :1].expand(2, 6, 12), 4, "split")
    for ours, theirs in zip([*got[:2], *got[2]], [*wanted[:2], *wanted[2]], strict=True):
        assert ours.equal(theirs)
    out, winners, grads = run_pooled(x[:0], weight, bias, grad[:0], 4, "first")
    assert out.shape == winners.shape == (0, 6, 12)
    assert grads[0].shape == (0, 24, 8)
    assert (grads[1] == 0).all()
    assert (grads[2] == 0).all()


@TIES
def test_the_public_function_and_its_gradients_run_the_kernels(ties):
    x, weight, bias, grad = draw_pooled((2, 5, 8, 12, 4), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with kernels_on_cpu() as calls:
        out = hiera_kernels.linear_q_pool(*leaves, 4, ties)
        out.backward(grad)
    assert calls == ["linear_q_pool", "linear_q_pool_backward"]
    best, groups = oracle.linear_q_pool(*(array(t) for t in leaves), 4)
    np.testing.assert_array_equal(array(out), best)
    wanted = oracle.linear_q_pool_backward(array(grad), array(x), array(weight), groups, ties)
    for leaf, truth in zip(leaves, wanted, strict=True):
        np.testing.assert_allclose(array(leaf.grad), truth, rtol=1e-5, atol=1e-5)


def test_what_no_kernel_serves_goes_to_the_reference():
    cases = [(torch.float64, 2, "first"), (torch.float32, 17, "first"), (torch.float32, 9, "split")]
    for dtype, stride, ties in cases:
        x, weight = torch.randn(1, 2 * stride, 3, dtype=dtype, requires_grad=True), torch.randn(4, 3, dtype=dtype)
        with kernels_on_cpu() as calls:
            out = hiera_kernels.linear_q_pool(x, weight, None, stride, ties)
            assert calls == []
            assert out.equal(hiera_kernels.reference.linear_q_pool(x, weight, None, stride, ties))
            if stride <= MAX_STRIDE[ties]:  # by the op itself
                direct = torch.ops.hiera_kernels.linear_q_pool(x, weight, None, stride, ties)[0]
                assert torch.autograd.grad(direct.sum(), x)[0].equal(torch.autograd.grad(out.sum(), x)[0])
                assert calls == ["linear_q_pool", "linear_q_pool_backward"]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with kernels_on_cpu() as calls:
        assert hiera_kernels.gelu(x).equal(torch.nn.functional.gelu(x))
        assert calls == []
        assert torch.ops.hiera_kernels.gelu(x).equal(torch.nn.functional.gelu(x))

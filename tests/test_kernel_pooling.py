"""The Triton kernels of query pooling, interpreted, against the oracle and PyTorch, bit for bit.

What was broken on purpose, each alone, and which test went red:
- NaN losing, the last maximum instead of the first, an image stride without P, one number too many at the end of
  a plane: each by test_pooling_and_its_gradient_bit_for_bit
"""

import numpy as np
import pytest
import torch

import hiera_kernels
from tests import attention_oracle as oracle
from tests.interpreter import kernels_on_cpu, marks

pytestmark = marks

# B, tokens kept, C, P. One block, several, a last one that is not full; 1 to 16 planes.
SHAPES = [(2, 12, 96, 4), (1, 7, 3, 3), (3, 5, 8, 1), (2, 64, 33, 2), (1, 16, 64, 16), (2, 1, 1, 5), (0, 4, 8, 2)]


def draw(shape, dtype=torch.float32):
    """Values on a coarse grid, so that groups tie; a NaN, a pair of NaN, infinities and zeros of both signs."""
    B, kept, C, P = shape
    x = (torch.randn(B, P, kept * C) * 2).round() / 2
    if x.numel() > 100:
        x[0, P - 1, 0] = float("nan")
        x[0, :, 1] = float("nan")
        x[0, P // 2, 2] = float("inf")
        x[0, :, 3] = float("-inf")
        x[-1, 0, 4], x[-1, P - 1, 4] = -0.0, 0.0
    return x.reshape(B, P * kept, C).to(dtype), torch.randn(B, kept, C).to(dtype)


# The interpreter truncates where it casts to bf16, so that shares of a third are not the GPU's: no bf16 there.
@pytest.mark.parametrize(
    ("ties", "dtype"),
    [
        ("first", torch.float32),
        ("first", torch.float16),
        ("first", torch.bfloat16),
        ("split", torch.float32),
        ("split", torch.float16),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooling_and_its_gradient_bit_for_bit(shape, ties, dtype):
    from hiera_kernels.kernels.limits import pooling_limit
    from hiera_kernels.kernels.pooling import q_pool_backward, q_pool_forward

    B, kept, C, P = shape
    x, grad = draw(shape, dtype)
    assert pooling_limit(x, P) is None
    leaf = x.clone().requires_grad_()
    groups = leaf.reshape(B, P, kept, C)
    want = groups.max(dim=1).values if ties == "first" else groups.amax(dim=1)
    want.backward(grad)
    out, grad_x = q_pool_forward(x, P), q_pool_backward(grad, x, P, ties)
    assert out.dtype == grad_x.dtype == dtype
    assert torch.equal(out.nan_to_num(7), want.detach().nan_to_num(7))
    assert torch.equal(grad_x.nan_to_num(7), leaf.grad.nan_to_num(7))
    np.testing.assert_array_equal(out.double().numpy(), oracle.q_pool(x.double().numpy(), P))
    if ties == "first":
        np.testing.assert_array_equal(grad_x.double().numpy(), _scatter(grad, x, P))


def _scatter(grad, x, P):
    return oracle.q_pool_backward(grad.double().numpy(), x.double().numpy(), P, "first")


@pytest.mark.parametrize("ties", ["first", "split"])
def test_inf_and_nan_in_the_gradient(ties):
    from hiera_kernels.kernels.pooling import q_pool_backward

    x, grad = draw((2, 12, 96, 4))
    grad[0, 5, :4] = torch.tensor([float("inf"), float("nan"), float("-inf"), float("inf")])
    leaf = x.clone().requires_grad_()
    groups = leaf.reshape(2, 4, 12, 96)
    (groups.max(dim=1).values if ties == "first" else groups.amax(dim=1)).backward(grad)
    got = q_pool_backward(grad, x, 4, ties)
    np.testing.assert_array_equal(got.numpy(), leaf.grad.numpy())


def test_any_strides():
    from hiera_kernels.kernels.pooling import q_pool_backward, q_pool_forward

    x, grad = draw((2, 12, 96, 4))
    wide = torch.full((2, 48, 99), 5.0)
    wide[..., 2:-1] = x
    turned = grad.transpose(0, 2).contiguous().transpose(0, 2)
    np.testing.assert_array_equal(q_pool_forward(wide[..., 2:-1], 4).numpy(), q_pool_forward(x, 4).numpy())
    got, want = q_pool_backward(turned, wide[..., 2:-1], 4), q_pool_backward(grad, x, 4)
    np.testing.assert_array_equal(got.numpy(), want.numpy())
    one = grad[:1, :1].expand(2, 12, 96)
    got, want = q_pool_backward(one, x, 4, "split"), q_pool_backward(one.contiguous(), x, 4, "split")
    np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_the_public_function_and_its_gradient_run_the_kernels():
    x, grad = draw((1, 16, 64, 16))
    with kernels_on_cpu() as calls:
        leaf = x.clone().requires_grad_()
        out = hiera_kernels.q_pool(leaf, 16)
        out.backward(grad)
    assert calls == ["q_pool", "q_pool_backward"]
    np.testing.assert_array_equal(out.detach().double().numpy(), oracle.q_pool(x.double().numpy(), 16))
    np.testing.assert_array_equal(leaf.grad.double().numpy(), _scatter(grad, x, 16))


@pytest.mark.parametrize(("dtype", "stride"), [(torch.float64, 2), (torch.float32, 17)], ids=["fp64", "P=17"])
def test_what_no_kernel_serves_goes_to_the_reference(dtype, stride):
    from hiera_kernels.kernels.limits import pooling_limit

    x, grad = torch.randn(2, 3 * stride, 8, dtype=dtype), torch.randn(2, 3, 8, dtype=dtype)
    assert pooling_limit(x, stride) is not None
    leaf = x.clone().requires_grad_()
    with kernels_on_cpu() as calls:
        out = torch.ops.hiera_kernels.q_pool(leaf, stride)
        out.backward(grad)
    assert calls == ["q_pool", "q_pool_backward"]
    np.testing.assert_array_equal(out.detach().double().numpy(), oracle.q_pool(x.double().numpy(), stride))
    np.testing.assert_array_equal(leaf.grad.double().numpy(), _scatter(grad, x, stride))

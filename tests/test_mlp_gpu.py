"""The law of parity on a GPU (CONTRIBUTING.md, How a kernel is believed) for `gelu`, `mlp` and `linear_q_pool`.

Per tensor, output and gradient, against the fp64 oracle: RMS error at most 1.6 times that of plain PyTorch in the same
dtype, maximal error at most 3 times, plus one rounding step of the dtype at the largest value. On the CPU, where the
ops are plain PyTorch, small cases keep this file honest.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hiera_kernels import gelu, linear_q_pool, mlp, reference
from hiera_kernels.ops import activation, shortcut
from tests import feed_forward_oracle as oracle

GPU = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# C before each pooling block of T/S/B, B+, L; and shapes that no model has.
WIDTHS = [96, 192, 384, 112, 224, 448, 144, 288, 576]
DEVICES = [pytest.param("cpu", FP32, id="cpu")]
DEVICES += [pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=GPU) for dtype in (BF16, FP16, FP32)]


def gradients(function, tensors, grad, *args):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *args)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def arrays(tensors):
    return [t.double().cpu().numpy() for t in tensors]


def errors(got, wanted):
    apart = np.abs(got.double().cpu().numpy() - wanted)
    return np.sqrt((apart**2).mean()), apart.max()


def assert_law(fused, plain, truths, dtype):
    for ours, theirs, truth in zip(fused, plain, truths, strict=True):
        rms, largest = errors(ours, truth)
        rms_allowed, largest_allowed = errors(theirs, truth)
        step = torch.finfo(dtype).eps * np.abs(truth).max()
        assert ours.dtype is dtype
        assert rms <= 1.6 * rms_allowed, f"RMS {rms:.2e}, plain {rms_allowed:.2e}"
        assert largest <= 3 * largest_allowed + step, f"max {largest:.2e}, plain {largest_allowed:.2e}"


def widths(device):
    return WIDTHS if device == "cuda" else [12]


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
def test_mlp_by_the_law(device, dtype, recompute):
    for C in widths(device):
        sizes = [(3, 49, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
        scales = [1.0, C**-0.5, 1.0, (4 * C) ** -0.5, 1.0]
        tensors = [(torch.randn(s) * scale).to(device, dtype) for s, scale in zip(sizes, scales, strict=True)]
        grad = torch.randn(3, 49, C).to(device, dtype)
        if device == "cuda":
            assert activation.refusal(tensors[0]) is None
        truths = [oracle.mlp(*arrays(tensors)), *oracle.mlp_backward(*arrays([grad, *tensors]))]
        fused = gradients(mlp, tensors, grad, recompute)
        assert_law(fused, gradients(reference.mlp, tensors, grad), truths, dtype)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_gelu_by_the_law_and_where_it_is_no_number(device, dtype):
    x = (torch.randn(300, 448) * 3).to(device, dtype)
    grad = torch.randn(300, 448).to(device, dtype)
    truths = [oracle.gelu(*arrays([x])), oracle.gelu_slope(*arrays([x])) * arrays([grad])[0]]
    assert_law(gradients(gelu, [x], grad), gradients(reference.gelu, [x], grad), truths, dtype)
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 60000.0, -60000.0, -14.0, -6.0])
    special = special.to(device, dtype)
    for ours, theirs in zip(
        gradients(gelu, [special], torch.ones_like(special)),
        gradients(F.gelu, [special], torch.ones_like(special)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=torch.finfo(dtype).eps, atol=2e-7)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("ties", ["first", "split"])
def test_linear_q_pool_by_the_law(device, dtype, ties):
    """Numbers drawn so that no two products are near each other in any dtype: one winner for all."""
    for C in widths(device):
        batch, pooled, stride, wide = 2, 49, 4, 2 * C
        x = torch.randn(batch, stride * pooled, C) * 0.01
        x[:, :, 0] += (
            torch.arange(stride).roll(1).repeat_interleave(pooled)
        )  # the winner's lead: token p has p + 3 mod 4
        weight = torch.randn(wide, C) * C**-0.5
        weight[:, 0] = 1.0
        x, weight, bias = (t.to(device, dtype) for t in (x, weight, torch.randn(wide)))
        grad = torch.randn(batch, pooled, wide).to(device, dtype)
        if device == "cuda" and dtype is not FP32:  # fp32 without TF32 is cuBLAS's, and obeys the law all the same
            assert shortcut.refusal(x, weight, bias, stride, ties) is None
        best, groups = oracle.linear_q_pool(*arrays([x, weight, bias]), stride)
        truths = [best, *oracle.linear_q_pool_backward(*arrays([grad, x, weight]), groups, ties)]
        fused = gradients(linear_q_pool, [x, weight, bias], grad, stride, ties)
        plain = gradients(reference.linear_q_pool, [x, weight, bias], grad, stride, ties)
        assert_law(fused, plain, truths, dtype)


@GPU
@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_ties_and_nan_on_a_gpu_bit_for_bit(ties, dtype):
    """Exact products, many of which tie: the result and its gradients leave no room for rounding."""
    x = torch.randint(-2, 3, (3, 4 * 49, 96), device="cuda").to(dtype)
    x[0, 50, 3] = float("nan")
    weight = (torch.randint(-1, 2, (192, 96), device="cuda") / 4).to(dtype)
    bias = (torch.randint(-4, 5, (192,), device="cuda") / 2).to(dtype)
    grad = torch.randint(-3, 4, (3, 49, 192), device="cuda").to(dtype) * 12  # thirds and quarters are whole
    fused = gradients(linear_q_pool, [x, weight, bias], grad, 4, ties)
    plain = gradients(reference.linear_q_pool, [x, weight, bias], grad, 4, ties)
    assert fused[0].nan_to_num(7).equal(plain[0].nan_to_num(7))
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@GPU
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_follows_the_switch_for_tf32(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        x, weight = torch.randn(2, 196, 96, device="cuda"), torch.randn(192, 96, device="cuda") / 10
        assert (shortcut.refusal(x, weight, None, 4) is None) == (precision == "tf32")
        got = linear_q_pool(x, weight, None, 4)
        exact = reference.linear_q_pool(x.double(), weight.double(), None, 4)
        assert (got - exact).abs().max() < (1e-2 if precision == "tf32" else 1e-5)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@GPU
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_hundred_repeats_give_the_same_bits(dtype):
    C = 96
    sizes = [(8, 196, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    tensors = [(torch.randn(s, device="cuda") / 4).to(dtype) for s in sizes]
    shortcut_tensors = [tensors[0], tensors[1], tensors[2]]
    grad, shortcut_grad = torch.randn_like(tensors[0]), torch.randn(8, 49, 4 * C, device="cuda").to(dtype)
    first = gradients(mlp, tensors, grad), gradients(linear_q_pool, shortcut_tensors, shortcut_grad, 4)
    for _ in range(100):
        again = gradients(mlp, tensors, grad), gradients(linear_q_pool, shortcut_tensors, shortcut_grad, 4)
        for a, b in zip([*again[0], *again[1]], [*first[0], *first[1]], strict=True):
            assert a.equal(b)


@GPU
def test_more_numbers_than_32_bits_count():
    """2^31 numbers and a few: offsets are 64 bits wide."""
    x = torch.zeros(2**31 // 448 + 40, 448, device="cuda", dtype=BF16)
    x[-1], x[0] = 1.0, 2.0
    out = gelu(x)
    assert out[-1].equal(F.gelu(x[-1]))
    assert out[0].equal(F.gelu(x[0]))
    assert not out[1:-1].any()
    del out
    grad_x, _, sums = torch.ops.hiera_kernels.gelu_backward(x, x, False, True)
    torch.testing.assert_close(sums, grad_x[-1].float() + grad_x[0].float())

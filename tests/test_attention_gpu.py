"""The law of parity on a GPU (CONTRIBUTING.md, How a kernel is believed): the fused kernels against 4-D SDPA.

Per tensor, output and gradient, against the fp64 oracle: RMS error at most 1.6 times that of 4-D SDPA in the same
dtype, maximal error at most 3 times, plus one rounding step of the dtype at the largest value. On the CPU, where the op
is 4-D SDPA, two small cases keep this file honest.
"""

import numpy as np
import pytest
import torch

from benchmarks import parity
from benchmarks.attention_shapes import distinct, published
from hiera_kernels import mask_unit_attention, q_pool, reference
from hiera_kernels.ops.attention import refusal
from tests import attention_oracle as oracle

GPU = pytest.mark.gpu
# One shape for each kernel, the one with the fewest units for the oracle to count; `benchmarks.ops` compares the others
# at their full size before it times them.
KERNELS = distinct((shape for shape in published() if shape.K <= 256), key=lambda shape: (shape.S, shape.P, shape.D))
SHAPES = [min(group, key=lambda shape: shape.W * shape.H) for group in KERNELS.values()]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF = DTYPES[:2]  # fp32 without TF32 is 4-D SDPA's, which repeats itself only if it is told to
# (N, W, P, H, D) by name
SMALL = {"pooled": (36, 3, 4, 2, 8), "odd": (35, 5, 1, 3, 24)}
CASES = [pytest.param("cpu", key, torch.float32, id=f"cpu-{name}") for name, key in SMALL.items()]
CASES += [
    pytest.param("cuda", key, dtype, id=f"cuda-{name}-{dtype}", marks=GPU)
    for name, key in [*SMALL.items(), *((shape.name, shape.key) for shape in SHAPES)]
    for dtype in DTYPES
]


def gradients(function, qkv, grad, *args):
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf, *args)
    out.backward(grad)
    return out.detach(), leaf.grad


def errors(got, wanted):
    apart = np.abs(got.double().cpu().numpy() - wanted)
    return np.sqrt((apart**2).mean()), apart.max()


@pytest.mark.parametrize(("device", "key", "dtype"), CASES)
def test_the_law(device, key, dtype):
    N, W, P, H, D = key
    qkv = torch.randn(2, N, 3 * H * D).to(dtype)
    grad = torch.randn(2, N // P, H * D).to(dtype)
    exact = qkv.double().numpy()
    wanted = (
        oracle.attention(exact, H, W, P, None)[0],
        oracle.attention_backward(grad.double().numpy(), exact, H, W, P, None, "first"),
    )
    qkv, grad = qkv.to(device), grad.to(device)
    if device == "cuda" and dtype.itemsize == 2:  # fp32 may be handed over to 4-D SDPA, and obeys the law all the same
        assert refusal(qkv, H, W, P) is None
    fused = gradients(mask_unit_attention, qkv, grad, H, W, P)
    folded = gradients(reference.mask_unit_attention, qkv, grad, H, W, P)
    for ours, theirs, truth in zip(fused, folded, wanted, strict=True):
        rms, largest = errors(ours, truth)
        rms_allowed, largest_allowed = errors(theirs, truth)
        step = torch.finfo(dtype).eps * np.abs(truth).max()
        assert ours.dtype is dtype
        assert rms <= 1.6 * rms_allowed, f"RMS {rms:.2e}, 4-D SDPA {rms_allowed:.2e}"
        assert largest <= 3 * largest_allowed + step, f"max {largest:.2e}, 4-D SDPA {largest_allowed:.2e}"


@GPU
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.K <= 64], ids=lambda shape: shape.name)
def test_tf32_where_pytorch_is_allowed_to(shape):
    """10 bits of each factor: the law of fp16, whatever PyTorch would have chosen."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        qkv = torch.randn(2, shape.N, 3 * shape.C)
        grad = torch.randn(2, shape.N // shape.P, shape.C)
        args = (shape.H, shape.W, shape.P, None)
        wanted = (
            oracle.attention(qkv.double().numpy(), *args)[0],
            oracle.attention_backward(grad.double().numpy(), qkv.double().numpy(), *args, "first"),
        )
        got = gradients(mask_unit_attention, qkv.cuda(), grad.cuda(), *shape.call().values())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    truth = [torch.from_numpy(x).cuda() for x in wanted]
    assert parity.judge(got, truth, tf32=True) == parity.GREEN


@GPU
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_hundred_repeats_give_the_same_bits(shape, dtype):
    qkv = torch.randn(3, shape.N, 3 * shape.C, device="cuda", dtype=dtype)
    grad = torch.randn(3, shape.N // shape.P, shape.C, device="cuda", dtype=dtype)
    first = gradients(mask_unit_attention, qkv, grad, *shape.call().values())
    for _ in range(100):
        again = gradients(mask_unit_attention, qkv, grad, *shape.call().values())
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))


@GPU
@pytest.mark.parametrize("special", [1e4, float("inf"), float("-inf"), float("nan")])
def test_special_values_go_where_sdpa_sends_them(special):
    """One value in the last head of the last window: finite stays finite, and the others do not notice."""
    N, W, P, H, D = 144, 9, 4, 2, 72
    qkv = torch.randn(2, N, 3 * H * D, dtype=torch.float32)
    qkv[-1, -1, 2 * H * D - 1] = special
    grad = torch.randn(2, N // P, H * D)
    wanted = (
        oracle.attention(qkv.double().numpy(), H, W, P, None)[0],
        oracle.attention_backward(grad.double().numpy(), qkv.double().numpy(), H, W, P, None, "first"),
    )
    for dtype in HALF:
        got = gradients(mask_unit_attention, qkv.cuda().to(dtype), grad.cuda().to(dtype), H, W, P)
        for ours, truth in zip(got, wanted, strict=True):
            assert np.array_equal(ours.cpu().isfinite().numpy(), np.isfinite(truth)), dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_queries_with_ties_and_nan(device, ties, dtype):
    """On a coarse grid a group of four has many maxima; gradients of 12 share out whole."""
    x = torch.randint(-2, 3, (3, 4 * 35, 72)).to(dtype)
    x[1, 7, 3], x[2, -1, -1] = float("nan"), float("inf")
    grad = torch.full((3, 35, 72), 12).to(dtype)
    got = gradients(q_pool, x.to(device), grad.to(device), 4, ties)
    exact = x.double().numpy()
    wanted = oracle.q_pool(exact, 4), oracle.q_pool_backward(grad.double().numpy(), exact, 4, ties)
    for ours, truth in zip(got, wanted, strict=True):
        assert ours.dtype is dtype
        assert np.array_equal(ours.double().cpu().numpy(), truth, equal_nan=True)


@GPU
def test_more_windows_than_16_bits_count():
    """Batch times windows is 70,016: past what the second and third axes of a CUDA grid hold."""
    qkv = torch.randn(1094, 16 * 64, 3 * 16, device="cuda", dtype=torch.bfloat16)
    out = mask_unit_attention(qkv, 1, 64)
    assert out[-1:].equal(mask_unit_attention(qkv[-1:].clone(), 1, 64))
    assert out[:1].equal(mask_unit_attention(qkv[:1].clone(), 1, 64))

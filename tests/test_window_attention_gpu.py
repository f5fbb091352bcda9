"""The law of parity on a GPU for window_attention: as test_attention_gpu.py, with the gradient of the pad row.

On the CPU, where the op is 4-D SDPA on windows, two small cases keep this file honest.
"""

import dataclasses

import pytest
import torch

from hiera_kernels import reference, window_attention
from hiera_kernels.ops.windows import refusal
from tests import window_oracle as oracle
from tests.gates import window_cases
from tests.test_attention_gpu import errors

GPU = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF = DTYPES[:2]  # fp32 without TF32 is 4-D SDPA's, which repeats itself only if it is told to
# One for each kernel, and each the other way (whole, or overhanging on two sides), on maps that the oracle can count.
SHAPES = [
    dataclasses.replace(shape, H=2, Hs=2 * shape.window + extra, Ws=shape.window + extra)
    for shape in window_cases.served()
    for extra in (0, shape.pool)
]
NAMES = [f"{s.window}x{s.pool}-d{s.D}-{'over' if window_cases.overhangs(s) else 'whole'}" for s in SHAPES]
# (Hs, Ws, window, stride, H, D) by name
SMALL = {"pooled": (6, 10, 4, 2, 2, 8), "odd": (9, 5, (3, 4), None, 3, 24)}
KEYS = {name: (s.Hs, s.Ws, s.window, s.pool, s.H, s.D) for name, s in zip(NAMES, SHAPES, strict=True)}
CASES = [pytest.param("cpu", key, torch.float32, id=f"cpu-{name}") for name, key in SMALL.items()]
CASES += [
    pytest.param("cuda", key, dtype, id=f"cuda-{name}-{dtype}", marks=GPU)
    for name, key in (SMALL | KEYS).items()
    for dtype in DTYPES
]


def draw(key, dtype, batch=2):
    Hs, Ws, _, stride, H, D = key
    pool = stride or 1
    qkv, pad = torch.randn(batch, Hs, Ws, 3 * H * D), torch.randn(3 * H * D)
    return qkv.to(dtype), pad.to(dtype), torch.randn(batch, Hs // pool, Ws // pool, H * D).to(dtype)


def results(function, qkv, pad, grad, key):
    """out, and the gradients of qkv and pad (zeros where no window overhangs)."""
    _, _, window, stride, H, _ = key
    leaves = [t.detach().clone().requires_grad_() for t in (qkv, pad)]
    out = function(leaves[0], H, window, stride, leaves[1])
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return out.detach(), grads[0], torch.zeros_like(pad) if grads[1] is None else grads[1]


def exact(qkv, pad, grad, key):
    _, _, window, stride, H, _ = key
    qkv, pad, grad = (t.double().cpu().numpy() for t in (qkv, pad, grad))
    return oracle.window_attention(qkv, H, window, stride, pad, None, grad)


@pytest.mark.parametrize(("device", "key", "dtype"), CASES)
def test_the_law(device, key, dtype):
    qkv, pad, grad = draw(key, dtype)
    wanted = exact(qkv, pad, grad, key)
    qkv, pad, grad = (t.to(device) for t in (qkv, pad, grad))
    if device == "cuda" and dtype.itemsize == 2:  # fp32 may be handed over to 4-D SDPA, and obeys the law all the same
        assert refusal(qkv, key[4], key[2], key[3], pad) is None
    fused = results(window_attention, qkv, pad, grad, key)
    folded = results(reference.window_attention, qkv, pad, grad, key)
    for ours, theirs, truth in zip(fused, folded, wanted, strict=True):
        rms, largest = errors(ours, truth)
        rms_allowed, largest_allowed = errors(theirs, truth)
        step = torch.finfo(dtype).eps * abs(truth).max()
        assert ours.dtype is dtype
        assert rms <= 1.6 * rms_allowed, f"RMS {rms:.2e}, 4-D SDPA {rms_allowed:.2e}"
        assert largest <= 3 * largest_allowed + step, f"max {largest:.2e}, 4-D SDPA {largest_allowed:.2e}"


@GPU
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_hundred_repeats_give_the_same_bits(key, dtype):
    tensors = [t.cuda() for t in draw(key, dtype, batch=3)]
    first = results(window_attention, *tensors, key)
    for _ in range(100):
        again = results(window_attention, *tensors, key)
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))


@GPU
@pytest.mark.parametrize("key", [KEYS["7x1-d56-over"], KEYS["14x2-d96-over"]], ids=str)
@pytest.mark.parametrize("special", [1e4, float("inf"), float("-inf"), float("nan")])
def test_special_values_go_where_the_definition_sends_them(special, key):
    """One value in a key of the last token, one in the values of the pad row: finite stays finite."""
    for row in (False, True):
        qkv, pad, grad = draw(key, torch.float32)
        channels = key[4] * key[5]
        (pad if row else qkv[-1, -1, -1])[(2 if row else 1) * channels + 3] = special
        for dtype in HALF:
            tensors = [t.to(dtype) for t in (qkv, pad, grad)]
            got = results(window_attention, *(t.cuda() for t in tensors), key)
            for ours, truth in zip(got, exact(*tensors, key), strict=True):
                assert ours.cpu().isfinite().equal(torch.from_numpy(truth).isfinite()), dtype


@GPU
def test_more_windows_than_16_bits_count():
    """Batch times windows is 70,016: past what the second and third axes of a CUDA grid hold."""
    qkv = torch.randn(1094, 32, 32, 3 * 16, device="cuda", dtype=torch.bfloat16)
    pad = torch.randn(3 * 16, device="cuda", dtype=torch.bfloat16)
    out = window_attention(qkv[:, :31], 1, 4, None, pad)
    assert out[-1:].equal(window_attention(qkv[-1:, :31].clone(), 1, 4, None, pad))
    assert out[:1].equal(window_attention(qkv[:1, :31].clone(), 1, 4, None, pad))

"""The law of parity on a GPU (CONTRIBUTING.md, How a kernel is believed): add_layer_norm against plain PyTorch.

Per tensor, outputs and gradients, against the fp64 oracle: RMS error at most 1.6 times that of the plain operations in
the same dtypes, maximal error at most 3 times, plus one rounding step of the dtype at the largest value. On the CPU,
where the op is plain operations, two small cases keep this file honest.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hiera_kernels import add_layer_norm
from hiera_kernels.ops.layer_norm import add_layer_norm_with_statistics, refusal
from hiera_kernels.ops.normed_linear import linear_of_normed
from tests import layer_norm_oracle as oracle

GPU = pytest.mark.gpu
# Stages of Hiera T/S/B, B+, L and H, and the width of the MAE decoders; more rows than one program takes.
WIDTHS = (96, 112, 144, 192, 224, 256, 288, 384, 448, 512, 576, 768, 896, 1024, 1152, 2048)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Dtypes of x and of branch, and of what LayerNorm writes.
STREAMS = {"bf16": (BF16, BF16), "fp16": (FP16, FP16), "fp32": (FP32, FP32), "autocast": (FP32, BF16)}
WITHOUT = {"plain": ("drop_scale", "layer_scale"), "dropped": ("layer_scale",), "scaled": ()}
CASES = [pytest.param("cpu", 24, streams, "scaled", id=f"cpu-{streams}") for streams in ("fp32", "autocast")]
CASES += [
    pytest.param("cuda", C, streams, scales, id=f"cuda-{C}-{streams}-{scales}", marks=GPU)
    for C in (8, 100, *WIDTHS)
    for streams in STREAMS
    for scales in (WITHOUT if C in (96, 768) else ("dropped",))
]


def plain(x, branch, weight, bias, drop_scale, layer_scale, branch_bias, normed_dtype):
    """As a model has it: products in the dtype of the branch, LayerNorm in fp32 and cast afterwards."""
    branch = branch + (branch_bias - branch_bias.detach()).to(branch.dtype)
    branch = branch if layer_scale is None else branch * layer_scale
    if drop_scale is not None:
        branch = branch * drop_scale.to(branch.dtype).reshape(-1, 1, 1)
    total = x + branch
    return total, F.layer_norm(total.float(), total.shape[-1:], weight, bias, 1e-6).to(normed_dtype)


def errors(got, want):
    apart = np.abs(got.detach().double().cpu().numpy() - want)
    return np.sqrt((apart**2).mean()), apart.max()


def drawn(shape, streams, scales, device):
    stream, half = STREAMS[streams]
    t = oracle.draw(shape, stream, FP32, without=WITHOUT[scales], requires_grad=False)
    t["branch"] = t["branch"].to(half)
    moved = {name: None if v is None else v.to(device) for name, v in t.items()}
    for name, v in moved.items():
        if v is not None and name != "drop_scale":
            v.requires_grad_()
    return moved, half


@pytest.mark.parametrize(("device", "C", "streams", "scales"), CASES)
def test_the_law(device, C, streams, scales):
    shape = (4, 131, C)
    t, half = drawn(shape, streams, scales, device)
    promoted = torch.promote_types(t["x"].dtype, FP32) if scales == "scaled" else t["x"].dtype
    grads = torch.randn(shape).to(promoted), torch.randn(shape).to(half)
    if device == "cuda":
        assert refusal(t["x"], t["branch"], t["weight"], t["bias"], t["drop_scale"], t["layer_scale"]) is None
    moved = [g.to(device) for g in grads]
    ours = oracle.gradients(add_layer_norm, t, *moved, normed_dtype=half)
    theirs = oracle.gradients(plain, t, *moved, normed_dtype=half)
    truth = oracle.wanted({name: None if v is None else v.cpu() for name, v in t.items()}, *grads)
    pairs = {"sum": (ours[0], theirs[0], truth[0]), "normed": (ours[1], theirs[1], truth[1])}
    pairs |= {name: (ours[2][name], theirs[2][name], truth[2][name]) for name in ours[2]}
    for name, (got, rival, want) in pairs.items():
        assert got.dtype is rival.dtype, name
        rms, largest = errors(got, want)
        rms_allowed, largest_allowed = errors(rival, want)
        step = torch.finfo(got.dtype).eps * np.abs(want).max()
        # Errors of single fp32 steps are luck, on both sides.
        assert rms <= max(1.6 * rms_allowed, step / 8), f"{name}: RMS {rms:.2e}, plain {rms_allowed:.2e}"
        assert largest <= 3 * largest_allowed + step, f"{name}: max {largest:.2e}, plain {largest_allowed:.2e}"


@GPU
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("C", [96, 112, 1152])
def test_a_hundred_repeats_give_the_same_bits(C, streams):
    t, half = drawn((8, 3001, C), streams, "scaled", "cuda")
    grads = torch.randn(8, 3001, C, device="cuda"), torch.randn(8, 3001, C, device="cuda").to(half)
    first = oracle.gradients(add_layer_norm, t, *grads, normed_dtype=half)
    for _ in range(100):
        again = oracle.gradients(add_layer_norm, t, *grads, normed_dtype=half)
        assert again[0].equal(first[0])
        assert again[1].equal(first[1])
        assert all(again[2][name].equal(first[2][name]) for name in first[2])


@GPU
@pytest.mark.parametrize("C", [96, 112, 768, 1152])
def test_normalizing_again_gives_the_same_bits(C):
    t, half = drawn((4, 131, C), "autocast", "dropped", "cuda")
    total, normed, mean, rstd = add_layer_norm_with_statistics(**t, normed_dtype=half)
    again = torch.ops.hiera_kernels.normalize(
        total.detach(), mean, rstd, t["weight"].detach(), t["bias"].detach(), half
    )
    assert again.equal(normed)


@GPU
def test_under_autocast_the_linear_behind_it_gives_linears_gradients():
    t, _ = drawn((4, 131, 96), "autocast", "dropped", "cuda")
    weight = torch.randn(288, 96, device="cuda", requires_grad=True)
    grads = []
    for recompute in (True, False):
        with torch.autocast("cuda", dtype=BF16):
            total, normed, mean, rstd = add_layer_norm_with_statistics(**t, normed_dtype=BF16)
            y = F.linear(normed, weight)
            if recompute:
                y = linear_of_normed(normed, total, mean, rstd, t["weight"], t["bias"], weight, None)
        grads.append(torch.autograd.grad(y.float().square().sum(), (weight, t["x"])))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


@GPU
def test_more_numbers_than_32_bits_count():
    """Rows beyond 2^31 numbers; the last ones, and their gradients."""
    rows = 2**31 // 2048 + 3
    x = torch.zeros(rows, 2048, device="cuda", dtype=BF16)
    x[-3:] = torch.randn(3, 2048)
    x.requires_grad_()
    _, normed = add_layer_norm(x, None, None, None)
    want = F.layer_norm(x[-3:].detach().float(), (2048,), eps=1e-6).bfloat16()
    assert torch.allclose(normed[-3:].float(), want.float(), atol=0.02)
    (grad,) = torch.autograd.grad(normed, x, torch.ones_like(normed).cumsum(1))
    assert grad[-3:].abs().max() > 0
    assert not grad[:-3].isnan().any()

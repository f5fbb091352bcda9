"""No speed without parity: every candidate's results, at the very shape that is timed, against an fp64 oracle.

What is allowed is counted in rounding steps of the coarsest dtype among inputs and result: relative RMS error, and
largest error relative to the largest value. A window, row or head that is wrong exceeds both by far; the finer law,
error against the error of 4-D SDPA, is in tests/test_attention_gpu.py.
"""

from collections.abc import Sequence

import torch

GREEN = "green"
# Steps of the dtype: (relative RMS error, largest error over largest value). fp32 sums over thousands of terms in any
# order; TF32 keeps 10 bits of each factor, as fp16 does.
ALLOWED = {torch.float64: (64, 256), torch.float32: (64, 256), torch.float16: (4, 16), torch.bfloat16: (2, 8)}
TF32_STEP = 2.0**-10


def flat(outputs) -> list[torch.Tensor]:
    """Outputs of a function as a list of tensors; what is None is left out."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [x for x in outputs if x is not None]


def spoil(results: Sequence[torch.Tensor], keep: Sequence) -> None:
    """Overwrite results with NaN, but for those in the memory of a tensor of `keep`.

    Freed, their memory is what the allocator hands out to the next call: an element that nobody writes is then not the
    right one of an earlier call.
    """
    kept = {x.untyped_storage().data_ptr() for x in keep if isinstance(x, torch.Tensor)}
    for x in results:
        overlaps = any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
        if x.is_floating_point() and not overlaps and x.untyped_storage().data_ptr() not in kept:
            x.detach().fill_(float("nan"))


def judge(
    got: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    narrowest: torch.dtype = torch.float64,
    exact: bool = False,
    tf32: bool = False,
) -> str:
    """ "green", or "red: " and why.

    Args:
        got: Results of a candidate.
        wanted: The same in fp64.
        narrowest: The coarsest dtype among the inputs.
        exact: Nothing is computed, or rounded once, so not a bit may differ.
        tf32: Products of fp32 were made by TF32.
    """
    if len(got) != len(wanted):
        return f"red: {len(got)} results, {len(wanted)} wanted"
    for i, (ours, truth) in enumerate(zip(got, wanted, strict=True)):
        if ours.shape != truth.shape:
            return f"red: result {i} has shape {tuple(ours.shape)}, {tuple(truth.shape)} wanted"
        if reason := _difference(ours, truth, narrowest, exact, tf32):
            return f"red: result {i}: {reason}"
    return GREEN


def _difference(ours, truth, narrowest, exact, tf32) -> str | None:
    if truth.numel() == 0:
        return None
    dtype = max(ours.dtype, narrowest, key=lambda d: torch.finfo(d).eps)
    if exact:
        differing = int((ours != truth.to(ours.dtype)).sum())
        return f"{differing} elements differ" if differing else None
    ours, truth = ours.detach().double(), truth.detach().double()
    apart = (ours - truth).abs_()
    if not bool(torch.isfinite(apart).all()):
        return "NaN or infinite where the oracle is finite"
    step = TF32_STEP if tf32 and dtype is torch.float32 else torch.finfo(dtype).eps
    rms_allowed, largest_allowed = ALLOWED[torch.float16 if tf32 and dtype is torch.float32 else dtype]
    norm = float(truth.norm())
    rms, largest = float(apart.norm()), float(apart.max())
    if rms > rms_allowed * step * norm:
        return f"RMS error {rms / max(norm, 1e-300):.1e} of the oracle's, {rms_allowed * step:.1e} allowed"
    top = float(truth.abs().max())
    if largest > largest_allowed * step * top:
        allowed = largest_allowed * step
        return f"largest error {largest / max(top, 1e-300):.1e} of the largest value, {allowed:.1e} allowed"
    return None

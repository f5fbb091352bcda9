"""Which launches of window_attention's kernels the gates look at: cases.py, for windows of a map."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.window_shapes import WindowShape, every
from hiera_kernels.kernels import windows, windows_backward
from hiera_kernels.kernels.launch_table import Launch
from hiera_kernels.kernels.limits import MAX_KEYS, SMALL_KEYS
from tests.gates.compiled import CAPABILITIES, Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def plan(
    shape: WindowShape, direction: str, dtype: str, capability: tuple[int, int], batch: int, device: str
) -> list[Launch]:
    """The launches of one call, as the package plans them; with a pad row, as the adapters call it; fp32 in TF32."""

    def zeros(*sizes):
        return torch.zeros(sizes, dtype=DTYPES[dtype], device=device)

    qkv, pad = zeros(batch, shape.Hs, shape.Ws, 3 * shape.C), zeros(3 * shape.C)
    out = zeros(batch, shape.Hs // shape.pool, shape.Ws // shape.pool, shape.C)
    call = (shape.H, (shape.window, shape.window) if shape.window else (), (shape.pool, shape.pool), pad)
    if direction == "forward":
        launches = windows.plan_forward(qkv, out, *call, None, capability)
    else:
        tensors = (
            torch.zeros_like(out),
            qkv,
            torch.zeros_like(qkv),
            windows_backward.partial_sums(qkv, *call, capability),
        )
        launches = windows_backward.plan_backward(*tensors, *call, None, capability)
    if dtype == "fp32":  # without TF32 a GPU is asked for the smallest windows alone
        launches = [launch._replace(constexprs=launch.constexprs | {"PRECISION": "tf32"}) for launch in launches]
    return launches


def overhangs(shape: WindowShape) -> bool:
    """Whether windows at the bottom or at the right are not wholly on the map."""
    return shape.window > 0 and (shape.Hs % shape.window != 0 or shape.Ws % shape.window != 0)


def served() -> list[WindowShape]:
    """One shape of the published trunks for each kernel that is compiled, the one with the fewest heads."""
    groups: dict[tuple, list[WindowShape]] = {}
    for shape in every():
        if 0 < shape.window**2 <= MAX_KEYS:
            groups.setdefault((shape.window, shape.pool, shape.D, overhangs(shape)), []).append(shape)
    return [min(group, key=lambda shape: shape.H) for group in groups.values()]


def odd() -> list[WindowShape]:
    """Every served shape the other way: whole windows where the model's overhang, and overhanging ones where not."""
    other = []
    for shape in served():
        side = 2 * shape.window if overhangs(shape) else 2 * shape.window + shape.pool
        other.append(replace(shape, model="odd", place=f"{shape.window}x{shape.pool} d{shape.D}", Hs=side, Ws=side))
    return other


def _models() -> Iterator[tuple[WindowShape, str, str, tuple[int, int]]]:
    """What `make test` compiles: one D of each window on sm_90, and what is tightest elsewhere.

    Whole windows of queries that are not pooled are left to `make gate`: they differ least from mask-unit attention.
    """
    for shape, direction in itertools.product(served(), ("forward", "backward")):
        hard = overhangs(shape) or shape.pool > 1
        if (shape.D == 96 and hard) or (shape.window, shape.pool, shape.D) == (16, 1, 72):
            yield shape, direction, "bf16", (9, 0)
        if shape.D == 56 and direction == "backward" and (shape.window, shape.pool) in ((7, 1), (14, 2)):
            yield shape, direction, "bf16", (8, 0)
        if (shape.window, shape.D) == (7, 56) and direction == "backward":
            yield shape, direction, "bf16", (10, 0)


def _everything() -> Iterator[tuple[WindowShape, str, str, tuple[int, int]]]:
    for shape, direction, dtype in itertools.product(served() + odd(), ("forward", "backward"), DTYPES):
        if dtype == "fp32" and shape.window**2 > SMALL_KEYS:
            continue  # 4-D SDPA serves it
        for capability in CAPABILITIES if shape.model != "odd" and dtype == "bf16" else ((9, 0),):
            yield shape, direction, dtype, capability


def jobs(everything: bool = False) -> list[Job]:
    """The compile gate's work on these kernels, each compiled kernel once."""
    found = []
    for shape, direction, dtype, capability in _everything() if everything else _models():
        for launch in plan(shape, direction, dtype, capability, batch=2, device="meta"):
            labels = {
                "kernel": "window " + launch.kernel.__name__.strip("_"),
                "shape": f"{shape.name} {shape.window}x{shape.window}/{shape.pool} D={shape.D}",
                "dtype": dtype,
            }
            sixteen = dtype != "fp32"
            found.append(Job(launch, capability, strict=sixteen, tensor_cores=sixteen, labels=labels))
    return found

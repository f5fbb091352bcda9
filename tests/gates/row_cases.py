"""Which launches of the row kernels (add_layer_norm) the gates look at: cases.py, for tensors of rows."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hiera_kernels.kernels import layer_norm, layer_norm_backward
from hiera_kernels.kernels.launch_table import Launch
from tests.gates.compiled import CAPABILITIES, Job

# Stages of Hiera T/S/B, B+, L and H, and the width of the MAE decoders.
PUBLISHED = (96, 112, 144, 192, 224, 256, 288, 384, 448, 512, 576, 768, 896, 1024, 1152, 2048)
STAGE_1 = (96, 112, 144, 256)
ODD = (8, 40, 100, 640, 1000, 1536)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class RowVariant:
    """What chooses other code. stream: dtype of x and the sum; half: of the branch and of what LayerNorm writes."""

    direction: str  # "forward", "backward", "normalize"
    stream: torch.dtype = BF16
    half: torch.dtype = BF16
    branch: bool = True
    drop: bool = True
    layer: bool = False
    bias: bool = True  # the gradient of the bias of the Linear that made the branch

    def __str__(self):
        names = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
        return names[self.half] if self.stream is self.half else f"{names[self.stream]}+{names[self.half]}"


def plan(C: int, variant: RowVariant, num_rows: int, device: str, samples: int = 2) -> Launch:
    """The launch of one call on `num_rows` rows of C, as the package plans it; weights are fp32."""

    def make(*shape, dtype=FP32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    def rows_of(dtype):
        return make(samples, num_rows // samples, C, dtype=dtype)

    weight, bias, mean, rstd = make(C), make(C), make(samples, num_rows // samples), make(samples, num_rows // samples)
    drop, layer = make(samples) if variant.drop else None, make(C) if variant.layer else None
    if not variant.branch:
        drop = layer = None
    stream, half = variant.stream, variant.half
    if variant.direction == "normalize":
        return layer_norm.plan_normalize(rows_of(stream), mean, rstd, weight, bias, rows_of(half))
    if variant.direction == "forward":
        branch, total = (rows_of(half), rows_of(stream)) if variant.branch else (None, None)
        scales = (drop, layer)
        return layer_norm.plan_forward(
            rows_of(stream), branch, weight, bias, 1e-6, *scales, total, rows_of(half), mean, rstd
        )
    sums = [True, True, variant.layer, variant.bias and variant.branch]
    count, rounds = layer_norm_backward.programs(num_rows, C)
    shared = stream is half and drop is None and layer is None
    return layer_norm_backward.plan_backward(
        rows_of(stream),
        rows_of(half),
        rows_of(stream),
        mean,
        rstd,
        weight,
        rows_of(half) if variant.layer else None,
        drop,
        layer,
        rows_of(stream),
        rows_of(half) if variant.branch and not shared else None,
        make(count, sum(sums), C),
        sums,
        rounds,
    )


def compulsory(C: int, variant: RowVariant, num_rows: int) -> int:
    """Bytes that have to move at least: every tensor once, the sums over rows as vectors of C."""
    stream, half = variant.stream.itemsize, variant.half.itemsize
    if variant.direction == "normalize":
        return num_rows * (C * (stream + half) + 8) + 8 * C
    if variant.direction == "forward":
        row = C * ((2 * stream + 2 * half) if variant.branch else stream + half)
        return num_rows * (row + 8) + (8 + 4 * variant.layer) * C
    separate = variant.branch and not (variant.stream is variant.half and not variant.drop and not variant.layer)
    row = C * (3 * stream + half * (1 + separate + variant.layer))
    sums = 2 + variant.layer + (variant.bias and variant.branch)
    return num_rows * (row + 8) + (4 + 4 * variant.layer + 4 * sums) * C


def _models() -> Iterator[tuple[int, RowVariant, tuple[int, int]]]:
    """What `make test` compiles: every published width, and a cut through the rest."""
    for C in PUBLISHED:
        yield C, RowVariant("backward"), (9, 0)
    for C in STAGE_1:
        yield C, RowVariant("backward", stream=FP32), (9, 0)
    for C in (112, 144, 768, 2048):
        yield C, RowVariant("forward"), (9, 0)
    for C, capability in itertools.product((96, 1152), ((8, 0), (10, 0))):
        yield C, RowVariant("backward", stream=FP32), capability
    yield 96, RowVariant("forward", stream=FP32), (9, 0)
    yield 96, RowVariant("normalize", stream=FP32), (9, 0)
    yield 768, RowVariant("backward", layer=True), (9, 0)
    yield 768, RowVariant("backward", stream=FP16, half=FP16), (9, 0)


def _everything() -> Iterator[tuple[int, RowVariant, tuple[int, int]]]:
    dtypes = ((BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP32))
    for C, (stream, half), capability in itertools.product(PUBLISHED + ODD, dtypes, CAPABILITIES):
        if capability != (9, 0) and (C in ODD or half is not BF16):
            continue
        for direction in ("forward", "backward"):
            yield C, RowVariant(direction, stream, half), capability
            yield C, RowVariant(direction, stream, half, layer=True), capability
        if capability == (9, 0):
            yield C, RowVariant("forward", stream, half, branch=False), capability
            yield C, RowVariant("backward", stream, half, branch=False), capability
            yield C, RowVariant("normalize", stream, half), capability


def jobs(everything: bool = False) -> list[Job]:
    """The compile gate's work on row kernels."""
    found = []
    for C, variant, capability in _everything() if everything else _models():
        launch = plan(C, variant, 2 * 3136, "meta")
        kernel = f"layer_norm{launch.kernel.__name__.removesuffix('_kernel')}"
        kernel += " layer" if variant.layer else "" if variant.branch else " alone"
        labels = {"kernel": kernel, "shape": f"C={C}", "dtype": str(variant)}
        # Of each tensor of rows that is read, at least the first chunk of columns comes in 16 bytes a thread.
        read = {"normalize": 1, "forward": 1 + variant.branch, "backward": 3 + variant.layer}[variant.direction]
        least = read if C % 8 == 0 else 0
        strict = variant.half is not FP32
        found.append(Job(launch, capability, strict, tensor_cores=False, least_wide=least, labels=labels))
    return found

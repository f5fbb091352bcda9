"""Which launches of the package's kernels the gates look at.

Each is what a call of the op at some shape would launch: the kernels' own `plan` functions say so, on tensors of the
meta device, hence without memory and without a GPU.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from benchmarks.attention_shapes import AttentionShape, distinct, published
from hiera_kernels.kernels import attention, attention_backward, limits
from hiera_kernels.kernels.launch_table import MAX_KEYS, Launch
from tests.gates import feed_forward_cases, row_cases, window_cases
from tests.gates.compiled import CAPABILITIES, Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (S, P) that no published model has: odd, pooled by 2, just below and above a block; D likewise.
ODD_ROWS = ((1, 1), (7, 1), (49, 4), (64, 4), (65, 1), (33, 2), (128, 2), (256, 1), (25, 9), (16, 8))
ODD_WIDTHS = (8, 16, 24, 40, 48, 80, 88, 104, 112, 120, 128)


@dataclass(frozen=True)
class Variant:
    """The arguments of the op that choose other code."""

    direction: str  # "forward" or "backward"
    dtype: str = "bf16"
    ties: str = "first"
    bias_grad: bool = False
    save_lse: bool = False


def tensors(shape: AttentionShape, variant: Variant, batch: int, device: str) -> dict[str, torch.Tensor]:
    """What a call works on: qkv, out and lse; in the backward also the gradients of qkv and out."""
    dtype, width = DTYPES[variant.dtype], 3 * shape.C

    def zeros(*sizes, dtype=dtype):
        return torch.zeros(sizes, dtype=dtype, device=device)

    found = {"qkv": zeros(batch, shape.N, width), "out": zeros(batch, shape.N // shape.P, shape.C)}
    rows = (batch, shape.W, shape.H, shape.S) if variant.save_lse else (0,)
    found["lse"] = zeros(*rows, dtype=torch.float32)
    if variant.direction == "backward":
        found["grad_out"], found["grad_qkv"] = torch.zeros_like(found["out"]), torch.zeros_like(found["qkv"])
    return found


def plan(shape: AttentionShape, variant: Variant, capability: tuple[int, int], batch: int, device: str) -> list[Launch]:
    """The launches of one call, as the package plans them."""
    x = tensors(shape, variant, batch, device)
    call = (shape.H, shape.W, shape.P, None)
    if variant.direction == "forward":
        return attention.plan_forward(x["qkv"], x["out"], x["lse"], *call, capability)
    partial = x["qkv"].new_empty(0, dtype=torch.float32)
    if variant.bias_grad:
        partial = attention_backward.partial_sums(x["qkv"], *call[:3], capability)
    return attention_backward.plan_backward(
        x["grad_out"], x["qkv"], x["grad_qkv"], partial, *call, variant.ties, capability
    )


def served() -> list[AttentionShape]:
    """One shape of the published models for each (S, P, D) that the kernel takes, the one with the fewest heads."""
    groups = distinct((s for s in published() if s.K <= MAX_KEYS), key=lambda s: (s.S, s.P, s.D))
    return [min(group, key=lambda s: (s.H, s.model.startswith("mae_"), s.N)) for group in groups.values()]


def odd() -> list[AttentionShape]:
    """Legal shapes that no published model has."""
    rows = [AttentionShape("odd", f"{S}x{P}", N=S * P * 3, W=3, P=P, H=2, D=96) for S, P in ODD_ROWS]
    widths = [AttentionShape("odd", f"d{D}", N=16 * 4 * 3, W=3, P=4, H=2, D=D) for D in ODD_WIDTHS]
    return rows + widths


def _models() -> Iterator[tuple[AttentionShape, Variant, tuple[int, int]]]:
    """What `make test` compiles: all windowed shapes everywhere in bf16, and a cut through the rest.

    A training step gives the bias of qkv its gradient in the same kernel, which is the one with the most registers.
    """
    for shape, direction in itertools.product(served(), ("forward", "backward")):
        base = shape.D in (96, 32)
        for capability in CAPABILITIES:
            riding = shape.windowed and direction == "backward"
            if riding:
                yield shape, Variant(direction, bias_grad=True), capability
            if (shape.windowed and not riding) or ((base or riding) and capability == (9, 0)):
                yield shape, Variant(direction), capability
        if shape.windowed and base:
            yield shape, Variant(direction, "fp16"), (9, 0)
            if shape.P > 1 and direction == "backward":
                yield shape, Variant(direction, ties="split"), (9, 0)


def _everything() -> Iterator[tuple[AttentionShape, Variant, tuple[int, int]]]:
    for shape, dtype, capability in itertools.product(served() + odd(), DTYPES, CAPABILITIES):
        if shape.model == "odd" and dtype != "bf16" and capability != (9, 0):
            continue
        if not _served(shape, DTYPES[dtype], capability):
            continue
        yield shape, Variant("forward", dtype), capability
        for ties in ("first", "split") if shape.P > 1 else ("first",):
            yield shape, Variant("backward", dtype, ties), capability
        if dtype == "bf16" and (capability == (9, 0) or shape.windowed):
            yield shape, Variant("backward", dtype, bias_grad=True), capability
        if dtype == "bf16" and capability == (9, 0):
            yield shape, Variant("forward", dtype, save_lse=True), capability


def _served(shape: AttentionShape, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the kernels claim the shape on that GPU; of fp32, which multiplies as IEEE has it, they claim little."""
    with mock.patch.object(limits, "_compute_capability", return_value=capability):
        return limits.row_limit(dtype, torch.device("cuda"), shape.D, shape.K, shape.P) is None


def jobs(everything: bool = False) -> list[Job]:
    """The compile gate's work, each compiled kernel once."""
    found = []
    for shape, variant, capability in _everything() if everything else _models():
        for launch in plan(shape, variant, capability, batch=2, device="meta"):
            kernel = launch.kernel.__name__.strip("_")
            kernel += " split" if variant.ties == "split" else ""
            kernel += " bias" if variant.bias_grad else " lse" if variant.save_lse else ""
            labels = {
                "kernel": kernel,
                "shape": f"{shape.name} ({shape.S},{shape.K}) D={shape.D}",
                "dtype": variant.dtype,
            }
            sixteen = variant.dtype != "fp32"
            found.append(Job(launch, capability, strict=sixteen, tensor_cores=sixteen, labels=labels))
    found += feed_forward_cases.jobs(everything)
    found += row_cases.jobs(everything)
    found += window_cases.jobs(everything)
    return found


def title(job: Job) -> str:
    """What `--only` searches."""
    return " ".join([*job.labels.values(), f"sm_{10 * job.capability[0] + job.capability[1]}"])

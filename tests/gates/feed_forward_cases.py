"""Which launches of GELU and of the pooled linear layer the gates look at: what the published models ask for."""

import itertools
from collections.abc import Iterator

import torch

from hiera_kernels.kernels import activation, linear_pooling, linear_pooling_backward
from hiera_kernels.kernels.launch_table import Launch
from hiera_kernels.ops.shortcut import MAX_STRIDE
from tests.gates.compiled import CAPABILITIES, Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Channels before the first, second and third pooling block; they double there. T, S and B; B+; L; H; SAM 2's T.
WIDTHS = {"b": (96, 192, 384), "bplus": (112, 224, 448), "l": (144, 288, 576), "h": (256, 512, 1024)}


def gelu_launches(width: int, dtype: torch.dtype, rows: int = 4096, device: str = "meta") -> dict[str, Launch]:
    """By name: forward, backward, and a backward that also hands out GELU(x) and the sums for a bias."""
    x = torch.empty(rows, width, dtype=dtype, device=device)
    nothing, no_sums = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    return {
        "gelu": activation.plan_forward(x, torch.empty_like(x)),
        "gelu_backward": activation.plan_backward(torch.empty_like(x), x, torch.empty_like(x), nothing, no_sums),
        "gelu_backward output bias": activation.plan_backward(
            torch.empty_like(x), x, torch.empty_like(x), torch.empty_like(x), activation.partial_sums(x)
        ),
    }


def pooling_launches(
    channels: int, wide: int, dtype: torch.dtype, stride: int = 4, ties: str = "first", pooled: int = 49,
    device: str = "meta",
) -> dict[str, Launch]:  # fmt: skip
    """By name: inference, training forward, and the two backward kernels of one shortcut, for a batch of two images."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    x, weight, bias = empty(2, stride * pooled, channels), empty(wide, channels), empty(wide)
    out, winners, grad = empty(2, pooled, wide), empty(2, pooled, wide, dtype=torch.uint8), empty(2, pooled, wide)
    nothing = empty(0, dtype=torch.uint8)
    found = {
        "linear_q_pool": linear_pooling.plan_forward(x, weight, bias, out, nothing, stride, ties),
        "linear_q_pool winners": linear_pooling.plan_forward(x, weight, bias, out, winners, stride, ties),
        "linear_q_pool_backward x": linear_pooling_backward.plan_input(
            grad, weight, winners, torch.empty_like(x), stride, ties
        ),
        "linear_q_pool_backward weight": linear_pooling_backward.plan_weight(
            grad, x, winners, stride, ties, (True, True)
        ),
    }
    return found


def _models() -> Iterator[tuple[str, str, Launch, str, tuple[int, int]]]:
    """What `make test` compiles: bf16 everywhere for Hiera-B, more widths and fp16 for an H100."""
    for capability in CAPABILITIES:
        for name, launch in gelu_launches(448, torch.bfloat16).items():
            yield name, "M=448", launch, "bf16", capability
        for name, launch in pooling_launches(96, 192, torch.bfloat16).items():
            yield name, "b 96 -> 192", launch, "bf16", capability
    for model, dtype, ties in (("bplus", "bf16", "first"), ("l", "bf16", "first"), ("b", "fp16", "first"),
                               ("b", "bf16", "split")):  # fmt: skip
        channels = WIDTHS[model][0]
        for name, launch in list(pooling_launches(channels, 2 * channels, DTYPES[dtype], ties=ties).items())[1:]:
            name = f"{name} {ties}" if ties == "split" else name
            yield name, f"{model} {channels} -> {2 * channels}", launch, dtype, (9, 0)


def _everything() -> Iterator[tuple[str, str, Launch, str, tuple[int, int]]]:
    for dtype, capability in itertools.product(DTYPES, CAPABILITIES):
        if dtype != "bf16" and capability != (9, 0):
            continue
        for width in (384, 4608):
            for name, launch in gelu_launches(width, DTYPES[dtype]).items():
                yield name, f"M={width}", launch, dtype, capability
        models = WIDTHS if capability == (9, 0) else ("b", "h")
        shapes = [(f"{model} {channels}", channels, 4) for model in models for channels in WIDTHS[model]]
        shapes += [(f"P={stride} 96", 96, stride) for stride in (2, 3, 8, 16) if dtype == "bf16"]
        for (shape, channels, stride), ties in itertools.product(shapes, ("first", "split")):
            if ties == "split" and stride > MAX_STRIDE[ties]:
                continue
            found = pooling_launches(channels, 2 * channels, DTYPES[dtype], stride, ties)
            for name, launch in list(found.items())[0 if ties == "first" else 1 :]:
                if dtype == "fp32":  # without TF32 a GPU is never asked
                    launch = launch._replace(constexprs=launch.constexprs | {"PRECISION": "tf32"})
                name = f"{name} {ties}" if ties == "split" else name
                yield name, f"{shape} -> {2 * channels}", launch, dtype, capability


def jobs(everything: bool = False) -> Iterator[Job]:
    """The compile gate's work."""
    for name, shape, launch, dtype, capability in _everything() if everything else _models():
        product = name.startswith("linear_q_pool")
        yield Job(
            launch,
            capability,
            strict=dtype != "fp32",
            tensor_cores=product and dtype != "fp32",
            labels={"kernel": name, "shape": shape, "dtype": dtype},
        )

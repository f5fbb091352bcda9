"""The shapes at which the published Hiera models call `mask_unit_attention`, read off the models themselves.

    python -m benchmarks.attention_shapes              # the table

Nothing here is typed: every model is built on the meta device and its blocks are walked.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch

import hiera

# Fraction of mask units that pre-training hides (arXiv 2306.00989, section 4 and appendix), by spatial dimensions.
MASK_RATIO = {2: 0.6, 3: 0.9}

# Published models at other sizes (height, width), which have no function of their own.
LARGER = {
    f"hiera_base_{text}": ("hiera_base_224", {"input_size": size})
    for text, size in (
        ("448", (448, 448)),
        ("896", (896, 896)),
        ("1536", (1536, 1536)),
        ("2048x1536", (2048, 1536)),
        ("3072x2048", (3072, 2048)),
    )
}


@dataclass(frozen=True)
class AttentionShape:
    """One call of `mask_unit_attention`, but for the batch: letters as in CONTRIBUTING.md."""

    model: str
    place: str  # "stage2.first" (pools its queries), "stage2", "decoder"
    N: int  # tokens
    W: int  # windows, 1 is global attention
    P: int  # pool stride
    H: int  # heads
    D: int  # head dim
    blocks: int = 1  # of the model that call it so
    C_in: int = 0  # channels of the block's input, C except where a stage begins

    @property
    def K(self) -> int:
        """Keys per window."""
        return self.N // self.W

    @property
    def S(self) -> int:
        """Queries per window."""
        return self.K // self.P

    @property
    def C(self) -> int:
        """Channels."""
        return self.H * self.D

    @property
    def windowed(self) -> bool:
        """Whether attention stays in mask units."""
        return self.W > 1

    @property
    def name(self) -> str:
        """Model and place, e.g. hiera_base_224.stage2.first."""
        return f"{self.model}.{self.place}"

    @property
    def key(self) -> tuple[int, ...]:
        """(N, W, P, H, D): what the op is called with. Models that share a key call it alike."""
        return self.N, self.W, self.P, self.H, self.D

    def call(self) -> dict[str, int]:
        """The keyword arguments of the op."""
        return {"num_heads": self.H, "num_windows": self.W, "q_stride": self.P}

    def bytes(self, batch: int, element_size: int, backward: bool = False) -> int:
        """What has to move at least: qkv in and out out, or qkv and the output's gradient in and qkv's gradient out."""
        qkv, out = 3 * self.N * self.C, self.N // self.P * self.C
        return batch * element_size * ((2 * qkv + out) if backward else (qkv + out))


def _calls(blocks: Iterable, N: int) -> list[tuple]:
    """(N, W, P, H, D, 1, C_in) of each block, for N tokens in front of the first."""
    found = []
    for block in blocks:
        attn = block.attn
        P = attn.q_stride
        W = N // (P * attn.window_size) if attn.use_mask_unit_attn else 1
        found.append((N, W, P, attn.heads, attn.head_dim, 1, attn.dim))
        N //= P
    return found


def on_meta(name: str, **overrides) -> torch.nn.Module:
    """The model without memory; `name` and `overrides` as for `of_model`."""
    name, settings = LARGER.get(name, (name, {}))
    with torch.device("meta"):
        return hiera.create_model(name, **{**settings, **overrides})


def kept_units(model: torch.nn.Module, mask_ratio: float | None = None) -> int:
    """Mask units that the first block sees: all of them, or in pre-training the visible ones."""
    units = math.prod(model.mask_spatial_shape)
    if not hasattr(model, "decoder_blocks"):
        return units
    ratio = MASK_RATIO[len(model.mask_spatial_shape)] if mask_ratio is None else mask_ratio
    return int(units * (1 - ratio))


@cache
def of_model(name: str, mask_ratio: float | None = None, **overrides) -> tuple[AttentionShape, ...]:
    """The shapes of one model, in the order of its blocks, equal neighbours merged.

    Args:
        name: One of `hiera.list_models()`, or one of `LARGER`.
        mask_ratio: Of an autoencoder; default: what it was pre-trained with.
        **overrides: As `hiera.create_model`, e.g. `input_size=(256, 384)`.

    Equivalent to: a forward hook on every attention that notes N, and what `MaskUnitAttention.forward` makes of it.
    """
    label, model = name, on_meta(name, **overrides)
    calls = _calls(model.blocks, kept_units(model, mask_ratio) * model.mu_size)
    places = []
    for i in range(len(calls)):
        stage = 1 + sum(i > end for end in model.stage_ends)
        places.append(f"stage{stage}.first" if i - 1 in model.stage_ends else f"stage{stage}")
    if hasattr(model, "decoder_blocks"):
        tokens = math.prod(model.tokens_spatial_shape_final)
        calls += _calls(model.decoder_blocks, tokens)
        places += ["decoder"] * len(model.decoder_blocks)
    shapes: list[AttentionShape] = []
    for call, place in zip(calls, places, strict=True):
        shape = AttentionShape(label, place, *call)
        if shapes and shapes[-1] == replace(shape, blocks=shapes[-1].blocks):
            shapes[-1] = replace(shapes[-1], blocks=shapes[-1].blocks + 1)
        else:
            shapes.append(shape)
    return tuple(shapes)


def published() -> list[AttentionShape]:
    """The shapes of all models that have published weights."""
    names = [name for name in hiera.list_models() if getattr(hiera, name).checkpoints]
    return [shape for name in names for shape in of_model(name)]


def named(name: str) -> AttentionShape:
    """The shape called so, e.g. "hiera_base_224.stage2.first"; of blocks that differ in the window only, the last.

    Raises:
        ValueError: no model, or no place in it, has that name.
    """
    model, _, place = name.partition(".")
    if model not in (*hiera.list_models(), *LARGER):
        close = difflib.get_close_matches(model, [*hiera.list_models(), *LARGER]) or hiera.list_models()
        raise ValueError(f"shape must begin with the name of a model, got {name!r}; did you mean {', '.join(close)}?")
    found = {shape.place: shape for shape in of_model(model)}
    if place not in found:
        raise ValueError(f"{model} has the shapes {', '.join(f'{model}.{p}' for p in found)}, got {name!r}")
    return found[place]


def distinct(shapes: Iterable[AttentionShape], key=lambda shape: shape.key) -> dict[tuple, list[AttentionShape]]:
    """Shapes grouped by what they are called with, or by another key."""
    groups: dict[tuple, list[AttentionShape]] = {}
    for shape in shapes:
        groups.setdefault(key(shape), []).append(shape)
    return groups


def main() -> None:
    """Print the table."""
    print(f"{'':34}{'blocks':>7}" + "".join(f"{letter:>6}" for letter in "NWPSKHD"))
    for shape in published():
        numbers = (shape.N, shape.W, shape.P, shape.S, shape.K, shape.H, shape.D)
        print(f"{shape.name:34}{shape.blocks:7}" + "".join(f"{n:6}" for n in numbers))


if __name__ == "__main__":
    main()

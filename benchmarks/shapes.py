"""Token grids at which the published models call `unroll`, `reroll` and `embed_tokens`, read off the models themselves.

Only batch and dtype are chosen here. Shapes of attention, and with them of the rows of every block, are in
attention_shapes.py; those of SAM 2's image encoders in window_shapes.py.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks import attention_shapes


@dataclass(frozen=True)
class TokenShape:
    """The token grid that a model's first stage works on: what `unroll`, `reroll` and `embed_tokens` move."""

    name: str
    batch: int
    size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    channels: int
    dtype: torch.dtype
    kept: int | None = None  # visible mask units in MAE pre-training

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.size)

    @property
    def label(self) -> str:
        """Name, batch and dtype, as the tables print them."""
        return f"{self.name} b{self.batch} {str(self.dtype).removeprefix('torch.')}"


@cache
def _grid(name: str) -> tuple:
    """(size, strides, channels, kept) of a model; `kept` of the autoencoder of its size, if there is one."""
    model = attention_shapes.on_meta(name)
    size, steps = model.tokens_spatial_shape, len(model.stage_ends) - 1
    kept = None
    if name not in attention_shapes.LARGER:
        kept = attention_shapes.kept_units(attention_shapes.on_meta(f"mae_{name.removeprefix('mae_')}"))
    return tuple(size), (tuple(model.q_stride),) * steps, model.blocks[0].dim, kept


def token_shape(name: str, batch: int, dtype: torch.dtype) -> TokenShape:
    """The token grid of a model: one of `hiera.list_models()` or of `attention_shapes.LARGER`.

    Raises:
        ValueError: there is no such model.
    """
    if "." in name:
        raise ValueError(f"token order belongs to a whole model, e.g. {name.partition('.')[0]}; got shape {name!r}")
    size, strides, channels, kept = _grid(name)
    return TokenShape(name, batch, size, strides, channels, dtype, kept)


# The image sizes are powers of two times odd numbers (56 = 8 * 7), which is what the published models have.
CPU_TOKENS = tuple(
    token_shape(*chosen)
    for chosen in (
        ("hiera_base_224", 16, torch.float32),
        ("hiera_base_224", 32, torch.bfloat16),
        ("hiera_mini_128", 32, torch.float32),
        ("hiera_base_224", 1, torch.float32),
        ("hiera_base_plus_224", 16, torch.bfloat16),
        ("hiera_large_224", 16, torch.float32),
        ("hiera_base_16x224", 4, torch.float32),
    )
)

CUDA_TOKENS = tuple(
    token_shape(name, batch, dtype)
    for name, batch in (
        ("hiera_base_224", 128),
        ("hiera_base_16x224", 16),
        ("hiera_large_224", 64),
        ("hiera_base_2048x1536", 4),
    )
    for dtype in (torch.bfloat16, torch.float32)
)

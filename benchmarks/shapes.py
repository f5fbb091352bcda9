"""Sizes that the benchmarks run at, named after the models that have them."""

from dataclasses import dataclass

import torch


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
        n = 1
        for extent in self.size:
            n *= extent
        return n

    @property
    def label(self) -> str:
        """Name, batch and dtype, as the tables print them."""
        return f"{self.name} b{self.batch} {str(self.dtype).removeprefix('torch.')}"


_IMAGE = ((2, 2), (2, 2), (2, 2))
_VIDEO = ((1, 2, 2), (1, 2, 2), (1, 2, 2))

# The image sizes are powers of two times odd numbers (56 = 8 * 7), which is what the published models have.
CPU_TOKENS = (
    TokenShape("hiera_mini_128", 32, (32, 32), _IMAGE, 48, torch.float32, 6),
    TokenShape("hiera_base_224", 1, (56, 56), _IMAGE, 96, torch.float32, 19),
    TokenShape("hiera_base_224", 16, (56, 56), _IMAGE, 96, torch.float32, 19),
    TokenShape("hiera_base_224", 32, (56, 56), _IMAGE, 96, torch.bfloat16, 19),
    TokenShape("hiera_base_plus_224", 16, (56, 56), _IMAGE, 112, torch.bfloat16, 19),
    TokenShape("hiera_large_224", 16, (56, 56), _IMAGE, 144, torch.float32, 19),
    TokenShape("hiera_base_16x224", 4, (8, 56, 56), _VIDEO, 96, torch.float32, 39),
)

CUDA_TOKENS = tuple(
    TokenShape(name, batch, size, strides, channels, dtype, kept)
    for name, batch, size, strides, channels, kept in (
        ("hiera_base_224", 128, (56, 56), _IMAGE, 96, 19),
        ("hiera_large_224", 64, (56, 56), _IMAGE, 144, 19),
        ("hiera_base_16x224", 16, (8, 56, 56), _VIDEO, 96, 39),
        ("hiera_base_2048x1536", 4, (512, 384), _IMAGE, 96, None),
    )
    for dtype in (torch.bfloat16, torch.float32)
)

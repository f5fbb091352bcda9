"""Token orders: spatial, unrolled, and grouped by mask unit; and which mask units a mask keeps.

Hiera keeps its tokens *unrolled*: every pooling stride of the network is a leading axis of the token dimension, so
that max-pooling is `x.view(B, stride, -1, C).max(1)` and one mask unit (window) is one index of the last, fastest
token axis:

    n = (p * S + s) * W + w      p: pooled position, s: position in the pooled window, w: window

Source: arXiv 2306.00989, appendix; hiera-transformer 0.1.4, `hiera_utils.py` (Unroll, Reroll, undo_windowing).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn


class Unroll(nn.Module):
    """Reorder tokens from row-major spatial order to the unrolled order.

    Args:
        input_size: Size of the input in pixels (and frames), 1 to 3 ints.
        patch_stride: Stride of the patch embedding, as many ints.
        unroll_schedule: The pooling strides, first pooling first, e.g. `[(2, 2)] * 3`.
    """

    def __init__(self, input_size: Sequence[int], patch_stride: Sequence[int], unroll_schedule):
        super().__init__()
        self.size = [i // s for i, s in zip(input_size, patch_stride, strict=True)]
        self.schedule = unroll_schedule

    def forward(self, x: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Unroll.

        Args:
            x: Tokens [B, N, C] in row-major spatial order over `size`, any dtype.
            size: Token grid, product N, divisible by the product of the strides. Default: the grid of `input_size`.

        Returns:
            [B, N, C], the same tokens unrolled.

        Equivalent to (2-D, one stride):
            `x.view(B, H // sy, sy, W // sx, sx, C).permute(0, 2, 4, 1, 3, 5).reshape(B, N, C)`, and so on for each
            further stride on the remaining `[H // sy, W // sx]` grid.
        """
        size = list(self.size if size is None else size)
        B, N, C = x.shape
        dims, steps = len(size), len(self.schedule)
        # A coordinate is ((rest * s_last + b_last) * ... ) * s_1 + b_1: axes per dimension: rest, s_last .. s_1.
        shape = []
        for d, length in enumerate(size):
            strides = [stride[d] for stride in reversed(self.schedule)]
            shape += [length // math.prod(strides), *strides]
        # Wanted: s_1 of every dimension, then s_2 of every dimension, ..., then rest of every dimension.
        order = [1 + d * (steps + 1) + axis for axis in range(steps, -1, -1) for d in range(dims)]
        x = x.view(B, *shape, C).permute(0, *order, len(shape) + 1)
        return x.reshape(B, N, C)


class Reroll(nn.Module):
    """Bring the output of a block back to spatial order (or to mask units, where only some of them are there).

    Args:
        input_size, patch_stride, unroll_schedule: As for :class:`Unroll`.
        stage_ends: Index of the last block of each stage.
        q_pool: Number of poolings; the first `q_pool` stages end with one.
    """

    def __init__(self, input_size, patch_stride, unroll_schedule, stage_ends: Sequence[int], q_pool: int):
        super().__init__()
        self.size = [i // s for i, s in zip(input_size, patch_stride, strict=True)]
        # block index -> (strides not yet pooled away, token grid at that block)
        self.schedule = {}
        size, remaining = self.size, list(unroll_schedule)
        for block in range(stage_ends[-1] + 1):
            self.schedule[block] = remaining, size
            if block in stage_ends[:q_pool] and remaining:
                size = [n // s for n, s in zip(size, remaining[0], strict=True)]
                remaining = remaining[1:]

    def forward(
        self, x: torch.Tensor, block_idx: int, mask: torch.Tensor | None = None, size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Reroll the output of block `block_idx`.

        Args:
            x: Tokens [B, N', C] as that block returns them; with a mask, those of the kept mask units only.
            block_idx: Index of the block.
            mask: Anything but None says that tokens are missing; its values are not read.
            size: Token grid before the first block, where it is not that of `input_size`.

        Returns:
            Without a mask [B, *grid, C], the token grid at that block; with one [B, units, *unit_size, C], where
            unit_size is what the poolings so far have left of a mask unit.
        """
        strides, grid = self.schedule[block_idx]
        if size is not None:
            grid = [n * g // full for n, g, full in zip(size, grid, self.size, strict=True)]
        B, N, C = x.shape
        dims, steps = len(grid), len(strides)
        unit = [math.prod([stride[d] for stride in strides]) for d in range(dims)]
        units = N // math.prod(unit)

        # Token axes as they lie: s_1 of every dimension, s_2 of every dimension, ..., then the mask unit.
        x = x.view(B, *[s for stride in strides for s in stride], units, C)
        # Wanted: the mask unit, then per dimension s_last .. s_1, which is that dimension's position in the unit.
        within = [1 + step * dims + d for d in range(dims) for step in range(steps - 1, -1, -1)]
        x = x.permute(0, 1 + steps * dims, *within, 2 + steps * dims).reshape(B, units, *unit, C)
        return x if mask is not None else undo_windowing(x, grid, unit)


def undo_windowing(x: torch.Tensor, shape: Sequence[int], mu_shape: Sequence[int]) -> torch.Tensor:
    """Put mask units side by side again.

    Args:
        x: [B, units, *mu_shape, C], units in row-major order over the grid of mask units.
        shape: The whole token grid; `shape[d]` is a multiple of `mu_shape[d]`.
        mu_shape: Size of a mask unit in tokens.

    Returns:
        [B, *shape, C].

    Equivalent to (2-D): `x.view(B, uy, ux, my, mx, C).permute(0, 1, 3, 2, 4, 5).reshape(B, uy * my, ux * mx, C)`.
    """
    B, C, dims = x.shape[0], x.shape[-1], len(shape)
    x = x.view(B, *[s // m for s, m in zip(shape, mu_shape, strict=True)], *mu_shape, C)
    order = [axis for d in range(dims) for axis in (1 + d, 1 + dims + d)]
    return x.permute(0, *order, 1 + 2 * dims).reshape(B, *shape, C)


def count_kept(mask: torch.Tensor) -> int:
    """How many mask units every row keeps. Waits for the device once (a host synchronisation).

    Args:
        mask: bool [B, units], True is *keep*.

    Raises:
        ValueError: if the rows keep unequal numbers (they could not be one dense tensor), or none.
    """
    if mask.shape[0] == 0:
        return mask.shape[1]
    counts = mask.sum(dim=1)
    fewest, most = torch.stack([counts.min(), counts.max()]).tolist()
    if fewest != most:
        raise ValueError(f"every row of mask must keep the same number of mask units; rows keep {fewest} to {most}")
    if most == 0:
        raise ValueError("mask keeps no mask unit at all; every row must keep at least one")
    return most


def kept_units(mask: torch.Tensor, len_keep: int) -> torch.Tensor:
    """Indices of the kept mask units, ascending, with a static count: no synchronisation, no boolean indexing.

    Args:
        mask: bool [B, units], True is *keep*, `len_keep` of them in every row (not checked here).
        len_keep: The number kept.

    Returns:
        int64 [B, len_keep].

    Equivalent to: `mask.nonzero()[:, 1].view(B, len_keep)`.
    """
    # Sorting the flags themselves, stably, lists the True ones first and in order.
    return torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)[:, :len_keep]


def gather_units(x: torch.Tensor, keep: torch.Tensor, units: int) -> torch.Tensor:
    """Take the tokens of some mask units.

    Args:
        x: [B, N, C] in the unrolled order, N divisible by `units`.
        keep: int64 [B, kept], indices of mask units.
        units: Number of mask units in a row of `x`.

    Returns:
        [B, kept * (N // units), C] in the unrolled order over the kept units.

    Equivalent to: `x.view(B, N // units, units, C)[b, :, keep[b]]` for each row b, positions first, units fastest.
    """
    B, N, C = x.shape
    unit = N // units
    # Whole rows by one flat index: a copy of contiguous memory, where `gather` would go element by element.
    start = torch.arange(B * unit, device=x.device).view(B, unit, 1) * units
    rows = (start + keep[:, None, :]).reshape(-1)
    return x.reshape(B * N, C).index_select(0, rows).view(B, unit * keep.shape[1], C)

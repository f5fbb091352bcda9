"""Position embeddings: resizing of learned ones, and the absolute-win embedding.

Sources: arXiv 2306.00989 (learned and separable embeddings); arXiv 2311.05613, "Window attention is bugged" (absolute
win); timm `hiera.py` for the interpolation it uses (bicubic with antialiasing).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def resize_grid(grid: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Interpolate a channels-first grid.

    Args:
        grid: [1, C, *old], 1 to 3 spatial dimensions, floating point.
        size: The new spatial size.

    Returns:
        [1, C, *size] in the dtype of `grid`. Length (1-D): linear. Height and width (2-D): bicubic with antialiasing.
        Time, height and width (3-D): bicubic frame by frame, then linear in time. `grid` itself where nothing
        changes.
    """
    old, size = tuple(grid.shape[2:]), tuple(size)
    if old == size:
        return grid
    dtype = grid.dtype
    if dtype in (torch.float16, torch.bfloat16):
        grid = grid.float()  # interpolation weights lose too much in 16 bits
    if len(size) == 1:
        grid = F.interpolate(grid, size=size, mode="linear")
    elif len(size) == 2:
        grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True)
    else:
        C, (T, H, W) = grid.shape[1], size
        frames = grid[0].transpose(0, 1)  # [T_old, C, H_old, W_old]
        if old[1:] != size[1:]:
            frames = F.interpolate(frames, size=(H, W), mode="bicubic", antialias=True)
        series = frames.permute(1, 2, 3, 0).reshape(1, C * H * W, old[0])
        if old[0] != T:
            series = F.interpolate(series, size=(T,), mode="linear")
        grid = series.view(C, H, W, T).permute(0, 3, 1, 2)[None]
    return grid.to(dtype)


def resize_pos_embed(pos_embed: torch.Tensor, old: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Interpolate a learned position embedding to another token grid.

    Args:
        pos_embed: [1, N, C], row-major over the grid `old`.
        old: The grid it was learned on, 1 to 3 ints, product N.
        size: The grid wanted.

    Returns:
        [1, prod(size), C]; see :func:`resize_grid` for the interpolation.

    Raises:
        ValueError: if `old` does not have N positions.
    """
    old, size = tuple(old), tuple(size)
    if math.prod(old) != pos_embed.shape[1]:
        raise ValueError(f"pos_embed has {pos_embed.shape[1]} positions, which is not the grid old={old}")
    if old == size:
        return pos_embed
    grid = pos_embed.transpose(1, 2).unflatten(2, old)
    return resize_grid(grid, size).flatten(2).transpose(1, 2)


def separable_pos_embed(spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
    """Sum of a spatial and a temporal embedding, for every position of a video.

    Args:
        spatial: [1, H * W, C].
        temporal: [1, T, C].

    Returns:
        [1, T * H * W, C], time slowest.

    Equivalent to: `(temporal[:, :, None] + spatial[:, None]).flatten(1, 2)`.
    """
    return (spatial[:, None] + temporal[:, :, None]).flatten(1, 2)


def absolute_win_pos_embed(background: torch.Tensor, window: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The absolute-win embedding: a background for the whole picture plus one window embedding in every mask unit.

    The background may be interpolated to any size without harm, because what depends on the position inside a window
    is in the window embedding, which is tiled and never interpolated.

    Args:
        background: [1, C, *any], channels first.
        window: [1, C, *mask_unit_size].
        size: Token grid; a multiple of the window in every dimension.

    Returns:
        [1, prod(size), C].

    Source: arXiv 2311.05613, section 4.
    """
    repeats = [n // w for n, w in zip(size, window.shape[2:], strict=True)]
    tiled = window.tile(1, 1, *repeats)
    return (resize_grid(background, size) + tiled).flatten(2).transpose(1, 2)


def guess_grid(positions: int, like: Sequence[int], time: int | None = None) -> tuple[int, ...] | None:
    """The token grid that an embedding of unknown origin was probably learned on.

    Args:
        positions: Its number of positions.
        like: The grid of the model that it shall be loaded into.
        time: Length of the first dimension for 3-D grids, where known; default `like[0]`.

    Returns:
        `like` itself if it has so many positions, else a square frame (as every published checkpoint has), or None
        where there is none.
    """
    like = tuple(like)
    if positions == math.prod(like):
        return like
    if len(like) == 1:
        return (positions,)
    time = (time or like[0]) if len(like) == 3 else 1
    side = math.isqrt(positions // time)
    if time * side * side != positions:
        return None
    return (side, side) if len(like) == 2 else (time, side, side)

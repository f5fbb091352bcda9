"""What the kernels of window_attention can serve, and why not the rest: limits.py for windows of a map."""

from collections.abc import Sequence

import torch

from hiera_kernels.kernels.limits import row_limit


def window_limit(
    qkv: torch.Tensor, num_heads: int, window_size: Sequence[int], q_stride: Sequence[int] = (), *unread: object
) -> str | None:
    """Why the kernels cannot serve this legal input of window_attention, in words; None if they can."""
    (window_h, window_w), (pool_h, pool_w) = window_and_pool(qkv, window_size, q_stride)
    return row_limit(qkv.dtype, qkv.device, qkv.shape[3] // (3 * num_heads), window_h * window_w, pool_h * pool_w)


def window_and_pool(
    qkv: torch.Tensor, window_size: Sequence[int], q_stride: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """Heights and widths of a window (the whole map, if none is given) and of the pooling of queries."""
    return window_size or (qkv.shape[1], qkv.shape[2]), q_stride or (1, 1)

"""What the kernels of window_attention can serve, and why not the rest: limits.py for windows of a map."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hiera_kernels.kernels.limits import attention_limit
from hiera_kernels.reference.windows import pair


class _OneWindow(NamedTuple):
    """What `attention_limit` looks at, of a window by itself."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device


def window_limit(
    qkv: torch.Tensor, num_heads: int, window_size: Sequence[int], q_stride: Sequence[int] = (), *unread: object
) -> str | None:
    """Why the kernels cannot serve this legal input of window_attention, in words; None if they can."""
    (window_h, window_w), (pool_h, pool_w) = window_and_pool(qkv, window_size, q_stride)
    # The limits are those of mask-unit attention in a single window of as many keys.
    window = _OneWindow((1, window_h * window_w, qkv.shape[3]), qkv.dtype, qkv.device)
    return attention_limit(window, num_heads, 1, pool_h * pool_w)


def window_and_pool(qkv: torch.Tensor, window_size, q_stride) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heights and widths of a window (the whole map, if none is given) and of the pooling of queries."""
    return pair(window_size or None) or tuple(qkv.shape[1:3]), pair(q_stride or None) or (1, 1)

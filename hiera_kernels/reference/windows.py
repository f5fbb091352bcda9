"""The specification of attention in windows of a spatial map, SAM 2's layout, in plain PyTorch.

B batch, Hs x Ws the map of tokens, K keys and S queries of a window, P = K/S pooled positions, H heads, D head
dimension, C = H*D channels. Windows are counted from the top left; those at the bottom and at the right may overhang
the map.
"""

import torch

from hiera_kernels.reference.attention import CUDA_GRID_LIMIT, attend


def window_attention(
    qkv: torch.Tensor,
    num_heads: int,
    window_size: int | tuple[int, int] | None,
    q_stride: int | tuple[int, int] | None = None,
    pad: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Multi-head attention inside each window of a map of tokens, with queries max-pooled inside the window.

    Args:
        qkv: [B, Hs, Ws, 3*C], any floating dtype; the output of the qkv Linear, packed (3, H, D).
        num_heads: H.
        window_size: height and width of a window, one int for both; None or 0 is global attention.
        q_stride: height and width of the pooling of queries, one int for both; None is no pooling. It divides the
            window and the map.
        pad: [3*C], what overhanging windows are completed with: the row of a zero token, ``qkv(zeros)``. Its k and v
            take part in the softmax, its q has no output. None is a row of zeros.
        scale: factor on the logits; None is ``D ** -0.5``.

    Returns:
        [B, Hs/q_stride, Ws/q_stride, C], contiguous; dtype of ``qkv`` (under autocast the autocast dtype, as
        ``scaled_dot_product_attention`` has it).

    Equivalent to::

        x = pad.expand(B, Hp, Wp, 3 * C).clone()                 # Hp, Wp: Hs, Ws rounded up to whole windows
        x[:, :Hs, :Ws] = qkv
        q, k, v = window_partition(x, window_size).chunk(3, -1)  # each [B * windows, height, width, C]
        q = max_pool2d(q.permute(0, 3, 1, 2), q_stride).permute(0, 2, 3, 1)
        x = multi_head_attention(q, k, v)                        # softmax over the height * width keys of a window
        x = window_unpartition(x, window_size // q_stride)[:, : Hs // q_stride, : Ws // q_stride]

    A pooled gradient goes to the first of equal maxima in row-major order, and of several NaN to the first (MaxPool2d:
    the last). The queries of padded tokens are computed and cut off: their gradient of zero, times a NaN in an
    overhanging window, may be NaN.

    Source: SAM 2 (arXiv 2408.00714); ``MultiScaleBlock`` and ``MultiScaleAttention`` in
    ``sam2/modeling/backbones/hieradet.py`` of sam2 1.1.0, between the qkv and the output Linear.
    """
    batch, map_h, map_w, width = qkv.shape
    window_h, window_w = pair(window_size) or (map_h, map_w)
    pool_h, pool_w = pair(q_stride) or (1, 1)
    q, k, v = _windows(complete(qkv, window_h, window_w, pad), window_h, window_w, num_heads)
    if pool_h * pool_w > 1:
        q = _pool(q, window_h, window_w, pool_h, pool_w)
    x = attend(q, k, v, scale, CUDA_GRID_LIMIT if qkv.is_cuda else None)
    query_h, query_w = window_h // pool_h, window_w // pool_w
    down, across = windows(map_h, window_h), windows(map_w, window_w)
    x = x.reshape(batch, down, across, num_heads, query_h, query_w, width // (3 * num_heads))
    x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, down * query_h, across * query_w, width // 3)
    # A crop of whole memory is no copy, and a copy otherwise: contiguous either way.
    return x[:, : map_h // pool_h, : map_w // pool_w].contiguous()


def pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of a window or a stride; None where there is none (None, 0, or a pair of zeros)."""
    if size is None:
        return None
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return None if height == 0 and width == 0 else (height, width)


def windows(extent: int, window: int) -> int:
    """How many windows cover an extent."""
    return (extent + window - 1) // window


def complete(qkv: torch.Tensor, window_h: int, window_w: int, pad: torch.Tensor | None) -> torch.Tensor:
    """qkv [B, Hs, Ws, X] -> [B, Hp, Wp, X], whole windows, completed with ``pad`` [X]; qkv itself if it is whole."""
    batch, map_h, map_w, width = qkv.shape
    pad = qkv.new_zeros(width) if pad is None else pad
    # Sizes as multiples of the window: with symbolic ones, what reshapes ask of them need not be proved.
    whole_h, whole_w = windows(map_h, window_h) * window_h, windows(map_w, window_w) * window_w
    if whole_w != map_w:
        qkv = torch.cat([qkv, pad.expand(batch, map_h, whole_w - map_w, width)], 2)
    if whole_h != map_h:
        qkv = torch.cat([qkv, pad.expand(batch, whole_h - map_h, whole_w, width)], 1)
    return qkv


def _windows(qkv: torch.Tensor, window_h: int, window_w: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """qkv [B, Hp, Wp, 3*C] -> q, k, v [B*W, H, K, D], strided views of one copy (of none where one window is all)."""
    batch, height, width, channels = qkv.shape
    down, across = height // window_h, width // window_w
    # As in the reference of mask-unit attention: no fused backend meets a layout or an alignment that it does not take.
    qkv = qkv.contiguous()
    aligned = torch.compiler.is_compiling() or qkv.storage_offset() * qkv.element_size() % 16 == 0
    if qkv.is_cuda and not aligned:
        qkv = qkv.clone()
    qkv = qkv.reshape(batch, down, window_h, across, window_w, channels).transpose(2, 3)
    qkv = qkv.reshape(batch * down * across, window_h * window_w, 3, num_heads, channels // (3 * num_heads))
    return tuple(part.transpose(1, 2) for part in qkv.unbind(2))


def _pool(q: torch.Tensor, window_h: int, window_w: int, pool_h: int, pool_w: int) -> torch.Tensor:
    """q [M, H, K, D] -> [M, H, S, D]. Deterministic, which the backward of ``max_pool2d`` is not on CUDA."""
    count, heads, _, head_dim = q.shape
    query_h, query_w = window_h // pool_h, window_w // pool_w
    q = q.transpose(1, 2).reshape(count, query_h, pool_h, query_w, pool_w, heads, head_dim).transpose(2, 3)
    q = q.reshape(count, query_h * query_w, pool_h * pool_w, heads, head_dim).max(dim=2).values
    return q.transpose(1, 2)

"""The specification of mask-unit attention and of query pooling, in plain PyTorch.

Letters are those of the dictionary: B batch, N tokens, W windows (mask units), P flattened pool stride, S queries and
K = P*S keys per window, H heads, D head dimension, C = H*D channels. Tokens are in unrolled order,
``n = (p*S + s)*W + w``: the window is the fastest token axis, the pooled positions are the slowest.
"""

import torch
import torch.nn.functional as F

TIES = ("first", "split")

# Fused SDPA backends put the batch on an axis of the CUDA grid that holds 16 bits.
CUDA_GRID_LIMIT = 65_535


def mask_unit_attention(
    qkv: torch.Tensor,
    num_heads: int,
    num_windows: int = 1,
    q_stride: int = 1,
    scale: float | None = None,
    ties: str = "first",
) -> torch.Tensor:
    """Multi-head attention inside each mask unit, with queries max-pooled over the stride of a pooling block.

    Args:
        qkv: [B, N, 3*C], any floating dtype; the output of the qkv Linear, packed (3, H, D), tokens in unrolled order.
        num_heads: H.
        num_windows: W; 1 is global attention.
        q_stride: P, the flattened pool stride; every window's K queries become S = K/P.
        scale: factor on the logits; None is ``D ** -0.5``.
        ties: where the gradient of a pooled query goes when several of its P tokens are the maximum: ``"first"`` to the
            first of them (``max(dim)``), ``"split"`` evenly (``amax``).

    Returns:
        [B, N/q_stride, C] in unrolled order (``n = s*W + w``), contiguous; dtype of ``qkv`` (under autocast the
        autocast dtype, as ``scaled_dot_product_attention`` has it).

    Equivalent to::

        q, k, v = qkv.reshape(B, K, W, 3, H, D).permute(3, 0, 4, 2, 1, 5)          # each [B, H, W, K, D]
        q = q.reshape(B, H, W, P, S, D).max(dim=3).values                          # amax(dim=3) for "split"
        x = softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v                   # [B, H, W, S, D]
        x = x.transpose(1, 3).reshape(B, S * W, C)

    Source: Hiera (arXiv 2306.00989), section 3, "Mask Unit Attention"; ``hiera/hiera.py`` of hiera-transformer 0.1.4,
    ``MaskUnitAttention``. Here the windows are folded into the batch, because fused backends of
    ``scaled_dot_product_attention`` take 4-D tensors only.
    """
    batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = _heads(qkv, num_heads, num_windows, q_stride, ties)
    x = attend(q, k, v, scale, CUDA_GRID_LIMIT if qkv.is_cuda else None)
    queries = tokens // (q_stride * num_windows)
    x = x.reshape(batch, num_windows, num_heads, queries, channels // num_heads)
    return x.permute(0, 3, 1, 2, 4).reshape(batch, queries * num_windows, channels)


def mask_unit_logsumexp(
    qkv: torch.Tensor, num_heads: int, num_windows: int = 1, q_stride: int = 1, scale: float | None = None
) -> torch.Tensor:
    """Natural logarithm of the softmax's denominators: qkv [B, N, 3*C] -> [B, W, H, S], fp32 (fp64 for fp64).

    Equivalent to: ``torch.logsumexp(q @ k.transpose(-1, -2) * scale, dim=-1)``, q and k as in
    :func:`mask_unit_attention`.
    """
    q, k, _ = _heads(qkv, num_heads, num_windows, q_stride, "first")
    dtype = torch.float64 if qkv.dtype is torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    return logits.logsumexp(dim=-1).reshape(qkv.shape[0], num_windows, num_heads, q.shape[2])


def q_pool(x: torch.Tensor, stride: int, ties: str = "first") -> torch.Tensor:
    """Max-pool tokens in unrolled order over the pool stride, their slowest axis.

    Args:
        x: [B, N, C], any floating dtype, tokens in unrolled order.
        stride: P, the flattened pool stride; it divides N.
        ties: ``"first"`` or ``"split"``, as in :func:`mask_unit_attention`.

    Returns:
        [B, N/stride, C], a new tensor, dtype of ``x``. NaN wins over every number.

    Raises:
        ValueError: ``ties`` is neither of the two.

    Equivalent to::

        x.reshape(B, P, N // P, C).max(dim=1).values       # amax(dim=1) for "split"

    Source: Hiera, section 3.2 (max-pooling by a reshape); ``do_pool`` in ``hiera/hiera_utils.py`` of
    hiera-transformer 0.1.4 takes the same axis of the same order.
    """
    if ties not in TIES:
        raise ValueError(f"ties must be one of {TIES}, got {ties!r}")
    batch, tokens, channels = x.shape
    groups = x.reshape(batch, stride, tokens // stride, channels)
    return groups.max(dim=1).values if ties == "first" else groups.amax(dim=1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, max_batch: int | None = None
) -> torch.Tensor:
    """4-D ``scaled_dot_product_attention``, at most ``max_batch`` entries of the batch a call (None: no limit).

    q [M, H, S, D], k and v [M, H, K, D] -> [M, H, S, D].
    """
    # With a dynamic batch, `<=` and `split` guard on the number of calls, not on the batch itself.
    if max_batch is None or q.shape[0] <= max_batch:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    parts = zip(q.split(max_batch), k.split(max_batch), v.split(max_batch), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale) for part in parts])


def _heads(
    qkv: torch.Tensor, num_heads: int, num_windows: int, q_stride: int, ties: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv [B, N, 3*C] -> pooled q [B*W, H, S, D], k and v [B*W, H, K, D]."""
    # A strided, expanded or sliced qkv is copied once, and so is one that does not start on 16 bytes, the width that
    # fused CUDA backends read: none of them meets a layout that it does not take. A Linear's output is never copied.
    qkv = qkv.contiguous()
    # Dynamo cannot trace the question, and a compiler aligns what it allocates and checks what it is given.
    aligned = torch.compiler.is_compiling() or qkv.storage_offset() * qkv.element_size() % 16 == 0
    if qkv.is_cuda and not aligned:
        qkv = qkv.clone()
    if q_stride == 1:
        return _fold(qkv, 3, num_heads, num_windows)
    channels = qkv.shape[2] // 3
    q, kv = qkv.split([channels, 2 * channels], dim=-1)
    return (
        *_fold(q_pool(q, q_stride, ties), 1, num_heads, num_windows),
        *_fold(kv, 2, num_heads, num_windows),
    )


def _fold(x: torch.Tensor, parts: int, num_heads: int, num_windows: int) -> tuple[torch.Tensor, ...]:
    """[B, L*W, parts*C] -> ``parts`` tensors [B*W, H, L, D].

    One copy moves whole rows of parts*C (none when W is 1); q, k and v are strided views of it, which SDPA reads as
    they are. Three copies, one for each, would read the same bytes in pieces of D.
    """
    batch, tokens, width = x.shape
    length = tokens // num_windows
    x = x.reshape(batch, length, num_windows, width).transpose(1, 2)
    x = x.reshape(batch * num_windows, length, parts, num_heads, width // (parts * num_heads))
    return tuple(part.transpose(1, 2) for part in x.unbind(2))

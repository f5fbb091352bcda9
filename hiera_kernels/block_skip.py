"""`drop_path="skip"`: attention and MLP see only the samples that drop path keeps.

The same numbers are drawn in the same order as always, before the branch and not after it, which draws none itself. A
dropped sample's branch is multiplied by zero in plain PyTorch; here it is not computed. A batch of which nothing is
kept still goes through the layers, empty: their parameters get gradients of zero, as they do in plain PyTorch, and a
distributed optimizer finds none missing.
"""

import torch
from torch import nn

from hiera_kernels.block_plan import Plan
from hiera_kernels.block_steps import (
    attention,
    feed_forward,
    first_norm,
    is_dropping,
    reads_attention,
    reads_scales,
    scales,
    summed,
)
from hiera_kernels.fused_block import FusedBlock, MlpLayers, Normed, Parts
from hiera_kernels.ops import calling
from hiera_kernels.plain_modules import is_readable_norm


def skips(plan: Plan, parts: Parts) -> bool:
    """Whether this call drops samples, and all that lies between a draw and its sum is known to draw nothing."""
    return (
        not torch.compiler.is_compiling()
        and not calling.transformed()
        and reads_attention(parts)
        and is_readable_norm(parts.norm2)
        and reads_scales(plan, parts.scale1, parts.drop1)
        and reads_scales(plan, parts.scale2, parts.drop2)
        and is_dropping(plan, parts.drop1)
        and is_dropping(plan, parts.drop2)
    )


def forward(
    target: FusedBlock, block: nn.Module, plan: Plan, parts: Parts, layers: MlpLayers, x: torch.Tensor
) -> torch.Tensor:
    """One block, as `block_pass.run`; waits for the device twice, for the numbers of the samples that are kept."""
    whole, shortcut = None, x
    if not target.keeps_tokens(block):
        x, whole = first_norm(parts.norm1, x, True)
        shortcut = target.shortcut(block, x, whole)
    layer_scale, drop_scale, kept = _drawn(target, plan, parts.scale1, parts.drop1, shortcut, parts.proj)
    rows = _rows(shortcut, kept)
    if whole is None:
        rows, normed = first_norm(parts.norm1, rows, True)
    else:
        normed = Normed(*(None if tensor is None else _rows(tensor, kept) for tensor in whole[:4]), whole.norm)
    branch, _ = attention(target, block, parts, normed, False)
    total = _put_back(shortcut, kept, summed(rows, branch, layer_scale, _rows(drop_scale, kept)))

    layer_scale, drop_scale, kept = _drawn(target, plan, parts.scale2, parts.drop2, total, layers.fc2)
    rows, normed = first_norm(parts.norm2, _rows(total, kept), True)
    branch = feed_forward(parts, layers, normed, plan.recompute != "none")
    return _put_back(total, kept, summed(rows, branch, layer_scale, _rows(drop_scale, kept)))


def _drawn(target, plan, scale, drop, x, last: nn.Linear):
    """(factor per channel, factor per sample, kept samples); the branch will come from `last`, in its dtype."""
    low = x.new_empty((), dtype=last.weight.dtype)
    like = x.new_empty((), dtype=calling.autocast_dtype(low) or low.dtype).expand(x.shape)
    _, layer_scale, drop_scale = scales(target, plan, scale, drop, like)
    # Waits for the device, which alone knows how many there are.
    kept = drop_scale.nonzero().squeeze(1)
    return layer_scale, drop_scale, None if kept.shape[0] == x.shape[0] else kept


def _rows(x, kept):
    return x if kept is None else x.index_select(0, kept)


def _put_back(x, kept, rows):
    return rows if kept is None else x.to(rows.dtype).index_copy(0, kept, rows)

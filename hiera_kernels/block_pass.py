"""The forward of a fused block: `run(target, block, x)`. What the words mean is in fused_block.py."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hiera_kernels import block_skip, hand_over
from hiera_kernels.block_plan import Plan, plan_of
from hiera_kernels.block_steps import (
    attention,
    dtype_of_norm,
    feed_forward,
    first_norm,
    is_joined,
    joined,
    mlp_layers,
    reads_norm1,
    reads_scales,
    scales,
    summed,
)
from hiera_kernels.fused_block import FusedBlock, Normed
from hiera_kernels.ops import calling
from hiera_kernels.ops.layer_norm import refusal as norm_refusal
from hiera_kernels.plain_modules import is_prepared
from hiera_kernels.subclass import is_exactly_ours, target_of


def run(target: FusedBlock, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One block: x [B, ..., C] -> [B, ..., C'].

    Equivalent to: the original `forward` of `block`, with the same random numbers drawn in the same order.
    """
    plan = plan_of(block)
    if plan.recompute == "block" and torch.is_grad_enabled() and not _is_transformed():
        return checkpoint(lambda tokens: _forward(target, block, plan, tokens), x, use_reentrant=False)
    return _forward(target, block, plan, x)


def _forward(target: FusedBlock, block: nn.Module, plan: Plan, x: torch.Tensor) -> torch.Tensor:
    parts = target.parts(block)
    layers = mlp_layers(target, plan, parts)
    if plan.drop_path == "skip" and layers is not None and block_skip.skips(plan, parts):
        return block_skip.forward(target, block, plan, parts, layers, x)
    x, normed = first_norm(parts.norm1, x, reads_norm1(parts))
    shortcut = target.shortcut(block, x, normed)
    rides = is_joined(parts.norm2, shortcut) and reads_scales(plan, parts.scale1, parts.drop1)
    branch, rider = attention(target, block, parts, normed, rides)
    branch, layer_scale, drop_scale = scales(target, plan, parts.scale1, parts.drop1, branch)
    total, normed = joined(parts.norm2, shortcut, branch, layer_scale, drop_scale, rider, layers is not None)
    del branch, shortcut, x
    following = _following(plan, block, total, normed)
    branch = feed_forward(parts, layers, normed, plan.recompute != "none")
    branch, layer_scale, drop_scale = scales(target, plan, parts.scale2, parts.drop2, branch)
    if following is None or branch.shape != total.shape or norm_refusal(total, branch) is not None:
        return summed(total, branch, layer_scale, drop_scale)
    return hand_over.leave(total, branch, layer_scale, drop_scale, *following)


# ---- the next block's norm1 ----


def _following(plan: Plan, block: nn.Module, total: torch.Tensor, normed: Normed):
    """(norm1 of the next block, the dtype in which it is written), if it may be made here; else None."""
    if normed.mean is None or plan.chain is None or plan.recompute == "block" or torch.compiler.is_compiling():
        return None
    follower = plan.follower(block)
    # Exactly ours: sharded by itself (FSDP2) or parametrized, its class is another one, and its weights are elsewhere.
    if follower is None or not is_exactly_ours(follower) or is_prepared(follower):
        return None
    target, theirs = target_of(follower), plan_of(follower)
    if not isinstance(target, FusedBlock) or theirs.recompute == "block" or theirs.drop_path == "skip":
        return None
    parts = target.parts(follower)
    dtype = dtype_of_norm(parts.norm1, total, reads_norm1(parts))
    return (parts.norm1, dtype) if dtype is not None and hand_over.is_possible(total, parts.norm1) else None


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and calling.transformed()

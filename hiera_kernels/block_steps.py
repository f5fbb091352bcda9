"""The steps of a fused block, each of which reads its submodules or calls them. Their order is in block_pass.py."""

import torch
import torch.nn.functional as F
from torch import nn

from hiera_kernels import hand_over
from hiera_kernels.block_plan import Plan
from hiera_kernels.fused_block import FusedBlock, MlpLayers, Normed, Parts
from hiera_kernels.ops import calling
from hiera_kernels.ops.feed_forward import gelu_linear
from hiera_kernels.ops.layer_norm import add_layer_norm_with_statistics
from hiera_kernels.ops.layer_norm import refusal as norm_refusal
from hiera_kernels.plain_modules import is_heard, is_inert, is_plain, is_readable_linear, is_readable_norm
from hiera_kernels.subclass import is_exactly_ours

# ---- LayerNorm ----


def first_norm(norm: nn.Module, x: torch.Tensor, read: bool) -> tuple[torch.Tensor, Normed]:
    """`x` for the rest of the block, and its LayerNorm, `read` by linear layers alone or seen by modules."""
    dtype = dtype_of_norm(norm, x, read)
    if dtype is None:
        return x, Normed(_called(norm, x))
    if torch.compiler.is_compiling() or calling.transformed():
        _, *found = add_layer_norm_with_statistics(x, None, norm.weight, norm.bias, norm.eps, normed_dtype=dtype)
    else:
        x, found = hand_over.enter(x, norm, dtype)
    tokens, mean, rstd = found
    return x, Normed(tokens, x, mean, rstd, norm)


def joined(norm, x, branch, layer_scale, drop_scale, rider, read) -> tuple[torch.Tensor, Normed]:
    """The residual sum, and its LayerNorm."""
    if branch.shape != x.shape or not is_joined(norm, x):
        if rider is not None:  # a branch that broadcasts
            branch = hand_over.carried(branch, rider)
        total = summed(x, branch, layer_scale, drop_scale)
        return total, Normed(_called(norm, total))
    dtype = branch.dtype if layer_scale is None else torch.promote_types(branch.dtype, layer_scale.dtype)
    dtype = _dtype_of_normed(torch.promote_types(x.dtype, dtype), x.device.type, read)
    total, tokens, mean, rstd = add_layer_norm_with_statistics(
        x, branch, norm.weight, norm.bias, norm.eps, drop_scale, layer_scale, dtype, rider
    )
    return total, Normed(tokens, total, mean, rstd, norm)


def _called(norm, x):
    if is_readable_norm(norm):
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return norm(x)


def is_joined(norm, x) -> bool:
    """Whether the fused kernel makes the LayerNorm `norm` of tokens like `x`, or of a sum with them."""
    return (
        is_readable_norm(norm)
        and norm.normalized_shape[0] == x.shape[-1]
        and norm_refusal(x, None, norm.weight, norm.bias) is None
        and _dtype_of_normed(x.dtype, x.device.type, False) is not None
    )


def dtype_of_norm(norm: nn.Module, x: torch.Tensor, read: bool) -> torch.dtype | None:
    """In which dtype the fused kernel is to write the LayerNorm `norm` of `x`; None if it does not make it."""
    return _dtype_of_normed(x.dtype, x.device.type, read) if is_joined(norm, x) else None


def _dtype_of_normed(dtype: torch.dtype, device_type: str, read: bool) -> torch.dtype | None:
    """In which dtype to write the LayerNorm of tokens of `dtype`; None where that is not known.

    Under autocast, linear layers cast what they are given: they are given it so. A module is given what stock gives it.
    """
    if dtype is torch.float64 or not torch.is_autocast_enabled(device_type):
        return dtype
    if read:
        return torch.get_autocast_dtype(device_type)
    return {"cuda": torch.float32, "cpu": dtype}.get(device_type)


# ---- branches ----


def reads_norm1(parts: Parts) -> bool:
    """Whether what follows norm1 are linear layers that are read."""
    return reads_attention(parts) and (parts.shortcut is None or is_readable_linear(parts.shortcut))


def reads_attention(parts: Parts) -> bool:
    """Whether attention is done here and not by calling its module."""
    attn = parts.attn
    read = is_exactly_ours(attn) and not is_heard(attn)
    return read and is_readable_linear(parts.qkv) and is_readable_linear(parts.proj)


def attention(target: FusedBlock, block: nn.Module, parts: Parts, normed: Normed, rides: bool):
    """The branch of attention, from norm1's output, and the bias that waits for its gradient, if it `rides`."""
    if not reads_attention(parts):
        return target.attend(block, normed.tokens), None
    qkv, proj = parts.qkv, parts.proj
    bias, rider = _riding(qkv.bias, normed.mean is not None and target.rides(block))
    out = target.core(block, normed.linear(qkv.weight, bias), rider)
    bias, rider = _riding(proj.bias, rides)
    return F.linear(out, proj.weight, bias), rider


def mlp_layers(target: FusedBlock, plan: Plan, parts: Parts) -> MlpLayers | None:
    """The layers of the MLP if they may all be read, now."""
    if type(parts.mlp) is not plan.mlp or is_heard(parts.mlp):
        return None
    layers = target.mlp_layers(parts.mlp)
    read = is_readable_linear(layers.fc1) and is_readable_linear(layers.fc2) and target.is_gelu(layers.act)
    for module in layers.inert:
        read = read and is_inert(module)
    return layers if read else None


def feed_forward(parts: Parts, layers: MlpLayers | None, normed: Normed, recompute: bool) -> torch.Tensor:
    """The branch of the MLP, from norm2's output."""
    if layers is None:
        return parts.mlp(normed.tokens)
    bias, hidden_bias = _riding(layers.fc1.bias, normed.mean is not None)
    hidden = normed.linear(layers.fc1.weight, bias)
    return gelu_linear(hidden, layers.fc2.weight, layers.fc2.bias, recompute, hidden_bias)


def _riding(bias, rides):
    """The bias for the linear layer, and the one whose gradient the next op makes, if it rides."""
    if not rides or bias is None or not torch.is_grad_enabled() or not bias.requires_grad:
        return bias, None
    return bias.detach(), bias


# ---- drop path and LayerScale ----


def reads_scales(plan: Plan, scale: nn.Module | None, drop: nn.Module | None) -> bool:
    """Whether neither module is called: what a bias rides on has to reach the next op as it is."""
    return (_is_nothing(scale) or _is_layer_scale(plan, scale)) and (_is_nothing(drop) or _is_drop_path(plan, drop))


def scales(target: FusedBlock, plan: Plan, scale: nn.Module | None, drop: nn.Module | None, branch: torch.Tensor):
    """(branch, factor per channel [C] or None, factor per sample [B] or None); what is not read is called."""
    layer_scale = drop_scale = None
    if not _is_nothing(scale):
        if _is_layer_scale(plan, scale):
            layer_scale = scale.gamma
        else:
            branch = scale(branch)
    if not _is_nothing(drop):
        if _is_drop_path(plan, drop):
            dtype = branch.dtype if layer_scale is None else torch.promote_types(branch.dtype, layer_scale.dtype)
            drop_scale = target.drop_scale(drop, branch, dtype)
        else:
            branch = drop(branch if layer_scale is None else branch * layer_scale)
            layer_scale = None
    return branch, layer_scale, drop_scale


def is_dropping(plan: Plan, drop: nn.Module | None) -> bool:
    """Whether `drop` may be read and draws, now."""
    return _is_drop_path(plan, drop) and drop.training and bool(drop.drop_prob)


def summed(x, branch, layer_scale, drop_scale) -> torch.Tensor:
    """``x + branch * layer_scale * drop_scale``, by plain operations."""
    if drop_scale is None:
        return x + branch if layer_scale is None else torch.addcmul(x, branch, layer_scale)
    branch = branch if layer_scale is None else branch * layer_scale
    return torch.addcmul(x, branch, drop_scale.view(-1, *[1] * (branch.ndim - 1)))


def _is_nothing(module) -> bool:
    return module is None or is_plain(module, nn.Identity)


def _is_drop_path(plan, drop) -> bool:
    return type(drop) is plan.drop and not is_heard(drop)


def _is_layer_scale(plan, scale) -> bool:
    return type(scale) is plan.scale and not is_heard(scale) and not getattr(scale, "inplace", False)

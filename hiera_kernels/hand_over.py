"""The first LayerNorm of a block, done by the pass that adds the last residual of the block before it.

Two blocks know nothing of each other but the tensor between them, and that stays as it was: the whole gradient reaches
it, a hook sees it, it may be kept, changed in place, or never given to the next block. Forward, one pass makes the sum
and its LayerNorm; the block returns the sum alone and leaves a note of the rest in a slot of its thread. The next block
takes the note, and believes it if it is called with that very tensor, unchanged, and has those very parameters,
unchanged. Else it makes its own LayerNorm. In autograd's graph nothing crosses the boundary: the sum is a node of the
first block, the LayerNorm one of the second, as in plain PyTorch. What that costs beside one node for both is a read of
the gradient.

Only for eager code outside inference mode (whose tensors have no version to tell a change by) and outside saved-tensor
hooks (activation checkpointing, offloading).
"""

import threading
import weakref
from typing import NamedTuple

import torch
from torch import nn

from hiera_kernels.ops import calling
from hiera_kernels.ops.layer_norm_library import OP, OP_BACKWARD, shared_gradient


class Found(NamedTuple):
    """LayerNorm's output [..., C], and mean and reciprocal standard deviation [...] of the rows."""

    normed: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


class _Note:
    """What is known of a tensor, for as long as it lives."""

    def __init__(self, total: torch.Tensor, norm: nn.LayerNorm, found: Found):
        self.found: Found | None = found
        self.of = weakref.ref(total, self._forget)
        self.seen = _state(total, norm)

    def _forget(self, _):
        self.found = None


class _Slot(threading.local):
    note: _Note | None = None


_SLOT = _Slot()


def _state(x: torch.Tensor, norm: nn.LayerNorm) -> tuple:
    """What has to be the same for a LayerNorm of `x` to be the same: identities, and versions, which changes count."""
    # Identities by id: the tensors themselves are checked to live (x by its weak reference, parameters by the block).
    parameters = (norm.weight, norm.bias)
    return x._version, norm.eps, *((None, 0) if p is None else (id(p), p._version) for p in parameters)


def is_possible(x: torch.Tensor, norm: nn.LayerNorm) -> bool:
    """Whether a LayerNorm of what will be of the kind of `x` may be handed over, here and now."""
    return (
        not x.is_inference()
        and norm.weight is not None
        and not norm.weight.is_inference()
        and not torch.is_inference_mode_enabled()
        and norm.weight.device == x.device
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def enter(x: torch.Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[torch.Tensor, Found]:
    """`x` and its LayerNorm in `dtype`, by the fused kernel or from a note.

    The first result is `x` for the rest of the block: gradients through it and through the LayerNorm meet in one pass.
    """
    found = _taken(x, norm, dtype)
    weight, bias = norm.weight, norm.bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        alias, *rest = _Enter.apply(x, weight, bias, norm.eps, dtype, found)
        return alias, Found(*rest)
    return x, found or _normalized(x, weight, bias, norm.eps, dtype)


def leave(
    x: torch.Tensor,
    branch: torch.Tensor,
    drop_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    norm: nn.LayerNorm,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x + branch * layer_scale * drop_scale``, with a note of its LayerNorm for the module that has `norm`.

    Arguments and the result as the first of :func:`hiera_kernels.add_layer_norm`, of which this is a part.
    """
    args = (x, branch, layer_scale, branch_bias, drop_scale, norm.weight, norm.bias, norm.eps, dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        made: list[torch.Tensor] = []
        total = _Leave.apply(*args, made)
    else:
        total, *made = _summed(*args)
    _SLOT.note = _Note(total, norm, Found(*made))
    return total


def _taken(x, norm, dtype) -> Found | None:
    note, _SLOT.note = _SLOT.note, None
    if note is None or note.of() is not x:
        return None
    found, note.found = note.found, None
    if found is None or found.normed.dtype is not dtype or note.seen != _state(x, norm):
        return None
    return found if is_possible(x, norm) else None


def _normalized(x, weight, bias, eps, dtype) -> Found:
    with calling.below_autograd():
        return Found(*OP(x, None, weight, bias, eps, None, None, dtype)[1:])


def _summed(x, branch, layer_scale, branch_bias, drop_scale, weight, bias, eps, dtype):
    with calling.below_autograd():
        return OP(x, branch, weight, bias, eps, drop_scale, layer_scale, dtype)


def _backward(*args):
    if torch.is_grad_enabled() or calling.transformed():  # the op's own formula refuses what comes next
        return OP_BACKWARD(*args)
    with calling.below_autograd():
        return OP_BACKWARD(*args)


class _Enter(torch.autograd.Function):
    """x, weight, bias -> x, normed, mean, rstd; `found` holds the last three if they are known."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype, found):
        found = found or _normalized(x, weight, bias, eps, dtype)
        alias = x.view_as(x)
        ctx.save_for_backward(x, found.mean, found.rstd, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(found.mean, found.rstd, *(() if ctx.needs_input_grad[0] else (alias,)))
        ctx.set_materialize_grads(False)
        return alias, *found

    @staticmethod
    def backward(ctx, grad_x, grad_normed, *_):
        if grad_normed is None:
            return grad_x, None, None, None, None, None
        x, mean, rstd, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        wanted = [to_x, False, to_weight, to_bias, False, False]
        arguments = (x, mean, rstd, weight, None, None, None, x.dtype, x.dtype, wanted)
        grad_x, _, channels = _backward(grad_x, grad_normed, *arguments)
        rows = iter(channels)
        grad_weight = next(rows).to(weight.dtype) if to_weight else None
        grad_bias = next(rows).to(ctx.bias_dtype) if to_bias else None
        return grad_x if to_x else None, grad_weight, grad_bias, None, None, None


class _Leave(torch.autograd.Function):
    """The residual sum; `made` receives its LayerNorm, which is no function of anything yet."""

    @staticmethod
    def forward(ctx, x, branch, layer_scale, branch_bias, drop_scale, weight, bias, eps, dtype, made):
        total, *rest = _summed(x, branch, layer_scale, branch_bias, drop_scale, weight, bias, eps, dtype)
        made += rest
        _, mean, rstd = rest
        kept = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(total, mean, rstd, kept, drop_scale, layer_scale)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, layer_scale, branch_bias)]
        return total

    @staticmethod
    def backward(ctx, grad):
        total, mean, rstd, branch, drop_scale, layer_scale = ctx.saved_tensors
        to_x, to_branch, to_layer_scale, to_bias = ctx.needs_input_grad[:4]
        x_dtype, branch_dtype, *channel_dtypes = ctx.dtypes
        grad_branch, rows = grad, iter(())
        shared = shared_gradient(x_dtype, branch_dtype, drop_scale, layer_scale)
        if to_bias or to_layer_scale or (to_branch and not shared):
            wanted = [False, to_branch and not shared, False, False, to_layer_scale, to_bias]
            arguments = (total, mean, rstd, None, branch, drop_scale, layer_scale, x_dtype, branch_dtype, wanted)
            _, made, channels = _backward(grad, None, *arguments)
            grad_branch, rows = grad if shared else made, iter(channels)
        sums = [
            next(rows).to(dtype) if asked else None
            for asked, dtype in zip((to_layer_scale, to_bias), channel_dtypes, strict=True)
        ]
        grad_x = grad.to(x_dtype) if to_x else None
        return grad_x, grad_branch if to_branch else None, *sums, *[None] * 6

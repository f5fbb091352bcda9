"""The first LayerNorm of a block, done by the pass that adds the last residual of the block before it.

Two blocks know nothing of each other but the tensor between them, and that stays as it was: the whole gradient reaches
it, a hook sees it, it may be kept, changed in place, or never given to the next block. Forward, one pass makes the sum
and its LayerNorm; the block returns the sum alone and leaves a note of the rest in a slot of its thread. The next block
takes the note, and believes it if it is called with that very tensor, unchanged, and has those very parameters,
unchanged. Else it makes its own LayerNorm. In autograd's graph nothing crosses the boundary: the sum is a node of the
first block, the LayerNorm one of the second, as in plain PyTorch. What that costs beside one node for both is a read
of the gradient.

The nodes keep the same tensors with a note and without one, so that a forward that activation checkpointing runs again,
where there is no note, keeps what the first run kept. Only for eager code outside inference mode, whose tensors have no
version to tell a change by. (Nor has what is changed through `.data`, which hides itself from everything.)
"""

import threading
import weakref
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from hiera_kernels.ops import calling
from hiera_kernels.ops.layer_norm_library import OP, OP_BACKWARD
from hiera_kernels.reference.layer_norm import accumulator


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
    return x._version, norm.eps, *(_identity(parameter) for parameter in (norm.weight, norm.bias))


def _identity(parameter: torch.Tensor | None) -> tuple:
    if parameter is None:
        return (None,)
    # The address, because `parameter.data = ...` (a shard that is gathered, offloading) changes no version.
    address = 0 if isinstance(parameter, FakeTensor) else parameter.data_ptr()
    return id(parameter), parameter._version, address


def is_possible(x: torch.Tensor, norm: nn.LayerNorm) -> bool:
    """Whether a LayerNorm of what will be of the kind of `x` may be handed over, here and now."""
    return (
        not x.is_inference()
        and not torch.is_inference_mode_enabled()
        and norm.weight is not None
        and all(_is_here(parameter, x) for parameter in (norm.weight, norm.bias) if parameter is not None)
        and not _is_replayed()
    )


def _is_replayed() -> bool:
    """Whether selective activation checkpointing is at work.

    It keeps results of ops, and gives them to the second run by their numbers: both runs have to call the same ops.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    selective = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return any(isinstance(mode, selective) for mode in _get_current_dispatch_mode_stack())


def _is_here(parameter: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a parameter of another module is in its place already: FSDP, or a user, may bring it before the call."""
    return (
        not parameter.is_inference()
        and parameter.device == x.device
        and parameter.shape == x.shape[-1:]
        and parameter.untyped_storage().nbytes() > 0
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
    layer_scale: torch.Tensor | None,
    drop_scale: torch.Tensor | None,
    norm: nn.LayerNorm,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x + branch * layer_scale * drop_scale``, with a note of its LayerNorm for the module that has `norm`.

    Arguments and the result as the first of :func:`hiera_kernels.add_layer_norm`, of which this is a part.
    """
    args = (x, branch, layer_scale, drop_scale, norm, dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
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


def _summed(x, branch, layer_scale, drop_scale, norm, dtype):
    with calling.below_autograd():
        return OP(x, branch, norm.weight, norm.bias, norm.eps, drop_scale, layer_scale, dtype)


def _backward(*args):
    if torch.is_grad_enabled() or calling.transformed():  # the op's own formula refuses what comes next
        return OP_BACKWARD(*args)
    with calling.below_autograd():
        return OP_BACKWARD(*args)


def carried(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x` [..., C], which holds `bias` [C] already, with a gradient for `bias`: the sum over all rows.

    Equivalent to: ``x + bias - bias.detach()``, without a pass over `x`.
    """
    return _Carried.apply(x, bias)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.flatten(0, -2).sum(0).to(ctx.dtype) if ctx.needs_input_grad[1] else None


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
    def forward(ctx, x, branch, layer_scale, drop_scale, norm, dtype, made):
        total, *rest = _summed(x, branch, layer_scale, drop_scale, norm, dtype)
        made += rest
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, layer_scale, drop_scale)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, layer_scale)]
        return total

    @staticmethod
    def backward(ctx, grad):
        branch, layer_scale, drop_scale = ctx.saved_tensors
        x_dtype, branch_dtype, layer_scale_dtype = ctx.dtypes
        factor = None if drop_scale is None else drop_scale.view(-1, *[1] * (grad.ndim - 1))
        to_x, to_branch, to_layer_scale = ctx.needs_input_grad[:3]
        grad_branch = grad_layer_scale = None
        if to_layer_scale:
            kept = branch if factor is None else branch * factor
            grad_layer_scale = (grad * kept).flatten(0, -2).sum(0, dtype=accumulator(grad.dtype)).to(layer_scale_dtype)
        if to_branch:
            factors = [each for each in (layer_scale, factor) if each is not None]
            grad_branch = _scaled(grad, factors, branch_dtype)
        return grad.to(x_dtype) if to_x else None, grad_branch, grad_layer_scale, *[None] * 4


def _scaled(grad, factors, dtype):
    """`grad` times the factors, in `dtype`; the last product is cast as it is written."""
    *first, last = factors or [None]
    for factor in first:
        grad = grad * factor
    if last is None:
        return grad.to(dtype)
    if torch.is_grad_enabled() or calling.transformed():
        return (grad * last).to(dtype)
    return torch.mul(grad, last, out=grad.new_empty(grad.shape, dtype=dtype))

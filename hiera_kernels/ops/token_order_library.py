"""The token-order ops under `torch.ops.hiera_kernels`: schemas, default kernels, fake kernels, autograd.

The compiled library registers its kernels for the CPU and CUDA keys; everything else about the ops is here. Moving data
is linear and every backward is one of these ops again, so any number of derivatives works.
"""

from collections.abc import Sequence

import torch

from hiera_kernels import extension, reference  # noqa: F401  (extension: loads the compiled kernels)
from hiera_kernels.ops.calling import below_autograd, define_autograd
from hiera_kernels.ops.routing import fresh
from hiera_kernels.reference.token_order import product

_library = torch.library.Library("hiera_kernels", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("unroll(Tensor x, SymInt[] size, int[] strides) -> Tensor", tags=_tags)
_library.define("reroll(Tensor x, SymInt[] size, int[] strides) -> Tensor", tags=_tags)
_library.define("reroll_masked(Tensor x, int[] strides, int dims) -> Tensor", tags=_tags)
_library.define(
    "embed_tokens(Tensor patches, Tensor pos_embed, SymInt[] size, int[] strides, Tensor? keep=None) -> Tensor",
    tags=_tags,
)
_library.define(
    "embed_tokens_backward(Tensor grad, SymInt[] size, int[] strides, Tensor? keep, ScalarType patches_dtype, "
    "ScalarType pos_dtype, bool channels_last, bool need_patches, bool need_pos) -> (Tensor, Tensor)",
    tags=_tags,
)
_ops = torch.ops.hiera_kernels
unroll_op, reroll_op = _ops.unroll.default, _ops.reroll.default
embed_op, embed_backward_op = _ops.embed_tokens.default, _ops.embed_tokens_backward.default


def _steps(flat: Sequence[int], dims: int) -> list[Sequence[int]]:
    return [flat[i : i + dims] for i in range(0, len(flat), dims)]


# The default kernels. Those that the compiled library registers for the CPU and CUDA keys take precedence.


def _unroll_default(x, size, strides):
    return fresh(reference.unroll(x, size, _steps(strides, len(size))), x)


def _reroll_default(x, size, strides):
    return fresh(reference.reroll(x, size, _steps(strides, len(size))), x)


def _reroll_masked_default(x, strides, dims):
    """Any set of mask units may be thought of as a strip of them, one below the other."""
    unit_size = [product(strides[d::dims]) for d in range(dims)]
    units = x.shape[1] // product(unit_size)
    if units == 0:  # a grid of no tokens is none
        return x.reshape(x.shape[0], 0, *unit_size, x.shape[2])
    strip = (units * unit_size[0], *unit_size[1:])
    return reroll_op(x, strip, strides).view(x.shape[0], units, *unit_size, x.shape[2])


def _embed_default(patches, pos_embed, size, strides, keep=None):
    return fresh(reference.embed_tokens(patches, pos_embed, size, _steps(strides, len(size)), keep), patches, pos_embed)


def _empty_gradients(grad, size, patches_dtype, pos_dtype, channels_last, need_patches, need_pos):
    """Where the two gradients go: patches in the convolution's own layout, [0] for what nobody asked for."""
    b, _, c = grad.shape
    patches, pos = grad.new_empty(0, dtype=patches_dtype), grad.new_empty(0, dtype=pos_dtype)
    if need_patches and channels_last:
        # Strides spelled out: a view of another tensor would not be what the compiled kernel returns.
        steps = [c]
        for extent in reversed(size):
            steps.insert(0, steps[0] * extent)
        patches = grad.new_empty_strided((b, c, *size), (steps[0], 1, *steps[1:]), dtype=patches_dtype)
    elif need_patches:
        patches = grad.new_empty((b, c, *size), dtype=patches_dtype)
    if need_pos:
        pos = grad.new_empty((1, product(size), c), dtype=pos_dtype)
    return patches, pos


def _embed_backward_default(grad, size, strides, keep, patches_dtype, pos_dtype, channels_last, need_patches, need_pos):
    b, _, c = grad.shape
    n, unit = product(size), product(strides)
    if keep is not None:
        rows = grad.reshape(b, unit, -1, c)
        index = keep[:, None, :, None].expand(b, unit, keep.shape[1], c)
        grad = grad.new_zeros(b, unit, n // unit, c).scatter_add(2, index, rows).reshape(b, n, c)
    spatial = reference.reroll(grad, size, _steps(strides, len(size))).reshape(b, n, c)
    patches, pos = _empty_gradients(grad, size, patches_dtype, pos_dtype, channels_last, need_patches, need_pos)
    if need_patches:
        patches.copy_(spatial.transpose(1, 2).reshape(b, c, *size))
    if need_pos:
        pos.copy_(spatial.sum(0, keepdim=True))
    return patches, pos


for _op, _kernel in (
    ("unroll", _unroll_default),
    ("reroll", _reroll_default),
    ("embed_tokens", _embed_default),
    ("embed_tokens_backward", _embed_backward_default),
):
    _library.impl(_op, _kernel, "CompositeExplicitAutograd")
_library.impl("reroll_masked", _reroll_masked_default, "CompositeImplicitAutograd")


@torch.library.register_fake("hiera_kernels::unroll", lib=_library)
def _(x, size, strides):
    return x.new_empty(x.shape)


@torch.library.register_fake("hiera_kernels::reroll", lib=_library)
def _(x, size, strides):
    return x.new_empty((x.shape[0], *size, x.shape[2]))


@torch.library.register_fake("hiera_kernels::embed_tokens", lib=_library)
def _(patches, pos_embed, size, strides, keep=None):
    rows = product(size) if keep is None else keep.shape[1] * product(strides)
    dtype = torch.promote_types(patches.dtype, pos_embed.dtype)
    return patches.new_empty((patches.shape[0], rows, patches.shape[1]), dtype=dtype)


@torch.library.register_fake("hiera_kernels::embed_tokens_backward", lib=_library)
def _(grad, size, strides, keep, patches_dtype, pos_dtype, channels_last, need_patches, need_pos):
    return _empty_gradients(grad, size, patches_dtype, pos_dtype, channels_last, need_patches, need_pos)


# Autograd. Below its own node an op is called past the Autograd key: a second visit to Python would cost as much again.


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, strides):
        ctx.grid = size, strides
        with below_autograd():
            return unroll_op(x, size, strides)

    @staticmethod
    def backward(ctx, grad):
        size, strides = ctx.grid
        return reroll_op(grad, size, strides).flatten(1, -2), None, None


class _Reroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, strides):
        ctx.grid = size, strides
        with below_autograd():
            return reroll_op(x, size, strides)

    @staticmethod
    def backward(ctx, grad):
        size, strides = ctx.grid
        return unroll_op(grad.flatten(1, -2), size, strides), None, None


def _is_channels_last(patches: torch.Tensor) -> bool:
    return not patches.is_contiguous() and patches.movedim(1, -1).is_contiguous()


class _EmbedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, pos_embed, size, strides, keep=None):
        ctx.save_for_backward(keep)
        ctx.grid = size, strides
        ctx.dtypes = patches.dtype, pos_embed.dtype
        ctx.channels_last = _is_channels_last(patches)
        with below_autograd():
            return embed_op(patches, pos_embed, size, strides, keep)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        need_patches, need_pos = ctx.needs_input_grad[:2]
        patches, pos = embed_backward_op(grad, *ctx.grid, keep, *ctx.dtypes, ctx.channels_last, need_patches, need_pos)
        return patches if need_patches else None, pos if need_pos else None, None, None, None


class _EmbedTokensBackward(torch.autograd.Function):
    """The op is linear in `grad`, and its adjoint is `embed_tokens` again."""

    @staticmethod
    def forward(ctx, grad, size, strides, keep, *rest):
        ctx.save_for_backward(keep)
        ctx.grid = size, strides
        ctx.batch, ctx.dtype, ctx.needed = grad.shape[0], grad.dtype, rest[-2:]
        ctx.set_materialize_grads(False)
        with below_autograd():
            return embed_backward_op(grad, size, strides, keep, *rest)

    @staticmethod
    def backward(ctx, patches, pos):
        (keep,) = ctx.saved_tensors
        size, strides = ctx.grid
        # What nobody asked for came out as an empty tensor, and its gradient says nothing.
        patches = patches if ctx.needed[0] else None
        pos = pos if ctx.needed[1] else None
        total = None
        if patches is not None:
            total = unroll_op(patches.flatten(2).transpose(1, 2).to(ctx.dtype), size, strides)
        if pos is not None:
            pos = unroll_op(pos.to(ctx.dtype), size, strides)
            total = pos if total is None else total + pos
        if total is None:
            return (None,) * 9
        total = total.expand(ctx.batch, -1, -1)
        if keep is not None:
            b, n, c = total.shape
            unit = product(strides)
            index = keep[:, None, :, None].expand(b, unit, keep.shape[1], c)
            total = total.reshape(b, unit, n // unit, c).gather(2, index).flatten(1, 2)
        return (total, *(None,) * 8)


def _plain_unroll(x, size, strides):
    return reference.unroll(x, size, _steps(strides, len(size)))


def _plain_reroll(x, size, strides):
    return reference.reroll(x, size, _steps(strides, len(size)))


def _plain_embed(patches, pos_embed, size, strides, keep=None):
    return reference.embed_tokens(patches, pos_embed, size, _steps(strides, len(size)), keep)


define_autograd(_library, "unroll", _Unroll, _plain_unroll)
define_autograd(_library, "reroll", _Reroll, _plain_reroll)
define_autograd(_library, "embed_tokens", _EmbedTokens, _plain_embed)
define_autograd(_library, "embed_tokens_backward", _EmbedTokensBackward, _embed_backward_default)

# What the public functions call in eager code: past the dispatcher's Autograd key, straight to the node.
unroll_apply, reroll_apply, embed_apply = _Unroll.apply, _Reroll.apply, _EmbedTokens.apply

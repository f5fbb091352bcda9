"""Token order as ops: `unroll`, `reroll`, `reroll_masked`, `embed_tokens`.

The public functions check their arguments and call the op `torch.ops.hiera_kernels.*`, whose kernels are the compiled
library's where it serves the device, and otherwise call the plain PyTorch reference. Moving data is linear, and every
backward here is an op of this file again, so any number of derivatives works.
"""

import math
from collections.abc import Sequence

import torch

from hiera_kernels import extension, reference  # noqa: F401  (extension: loads the compiled kernels)
from hiera_kernels.ops import checks
from hiera_kernels.ops.calling import transformed
from hiera_kernels.ops.routing import compiled_kernel_serves, fresh

Strides = Sequence[Sequence[int]]

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
_unroll_op, _reroll_op = _ops.unroll.default, _ops.reroll.default
_embed_op, _embed_backward_op = _ops.embed_tokens.default, _ops.embed_tokens_backward.default

# (patches, pos_embed) pairs that the compiled kernels add; see dispatch_embed in csrc. The others take the reference.
_EMBED_DTYPES = frozenset(
    {(d, d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    | {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}
)


def unroll(x: torch.Tensor, size: Sequence[int], strides: Strides) -> torch.Tensor:
    """Reorder tokens so that pooling and windows become reshapes.

    With P the product of the first step's strides, `out.view(B, P, N // P, C)` holds in dimension 1 the tokens that the first
    pooling merges; with W windows (mask units), `out.view(B, N // W, W, C)[:, :, w]` are the tokens of window w.

    Args:
        x: [B, N, C], any dtype, tokens in row-major order over `size`; N = prod(size).
        size: the token grid, 1 to 3 ints.
        strides: one stride per dimension for every pooling step, for example ((2, 2), (2, 2), (2, 2)). Their product has to
            divide `size` in every dimension. No steps: the order stays.

    Returns:
        [B, N, C], contiguous, of x's dtype; unrolled order: step 1's offsets slowest, then step 2's, ..., windows fastest.

    Raises:
        TypeError: x is no dense tensor, or size or strides are no sequences of ints.
        ValueError: x is not [B, prod(size), C], or strides do not fit size.

    Equivalent to (2-D, one step (a, b))::

        x.view(B, H // a, a, W // b, b, C).permute(0, 2, 4, 1, 3, 5).reshape(B, N, C)

    Source: Hiera, arXiv 2306.00989, appendix; `Unroll` in hiera-transformer's hiera_utils.py.
    """
    size, strides, flat = _checked_tokens(x, size, strides)
    if not compiled_kernel_serves("unroll", x):
        return reference.unroll(x, size, strides)
    if torch.compiler.is_compiling():
        return _unroll_op(x, size, flat)
    return _Unroll.apply(x, size, flat)


def reroll(x: torch.Tensor, size: Sequence[int], strides: Strides) -> torch.Tensor:
    """Undo `unroll`: tokens back onto their grid.

    Args:
        x: [B, N, C], any dtype, tokens in unrolled order; N = prod(size).
        size: the token grid, 1 to 3 ints.
        strides: the steps that are still to be undone, as in `unroll`.

    Returns:
        [B, *size, C], contiguous, of x's dtype.

    Raises:
        TypeError: x is no dense tensor, or size or strides are no sequences of ints.
        ValueError: x is not [B, prod(size), C], or strides do not fit size.

    Equivalent to (2-D, one step (a, b))::

        x.view(B, a, b, H // a, W // b, C).permute(0, 3, 1, 4, 2, 5).reshape(B, H, W, C)

    Source: `Reroll` in hiera-transformer's hiera_utils.py, without a mask.
    """
    size, strides, flat = _checked_tokens(x, size, strides)
    if not compiled_kernel_serves("reroll", x):
        return reference.reroll(x, size, strides)
    if torch.compiler.is_compiling():
        return _reroll_op(x, size, flat)
    return _Reroll.apply(x, size, flat)


def reroll_masked(x: torch.Tensor, strides: Strides) -> torch.Tensor:
    """`reroll` where only some mask units are there: each unit becomes a small image.

    Args:
        x: [B, units*unit, C], any dtype: the tokens of `units` mask units in unrolled order over these units, where
            unit = prod(unit_size) and unit_size is the product of strides per dimension.
        strides: the steps that are still to be undone, as in `unroll`. With no step left give one of ones, e.g. ((1, 1),):
            an empty schedule would not say how many dimensions there are.

    Returns:
        [B, units, *unit_size, C], contiguous, of x's dtype.

    Raises:
        TypeError: x is no dense tensor, or strides is no sequence of steps.
        ValueError: strides is empty or uneven, or N is no multiple of the unit.

    Equivalent to (2-D, one step (a, b))::

        x.view(B, a, b, units, C).permute(0, 3, 1, 2, 4).reshape(B, units, a, b, C)

    Source: `Reroll` in hiera-transformer's hiera_utils.py, with a mask.
    """
    checks.tensor("x", x, 3, "[B, units*unit, C]")
    strides = checks.schedule(strides, None)
    if not strides or not 1 <= len(strides[0]) <= 3:
        raise ValueError(f"strides must have at least one step of 1 to 3 entries, such as ((1, 1),), got {strides!r}")
    unit_size = [math.prod(per_step) for per_step in zip(*strides, strict=True)]
    b, n, c = x.shape
    if n % math.prod(unit_size) != 0:
        raise ValueError(f"x must hold whole mask units of {math.prod(unit_size)} tokens ({unit_size}), got {n} tokens")
    units = n // math.prod(unit_size)
    if n == 0:  # no unit was kept; a grid of no tokens is none
        return x.reshape(b, units, *unit_size, c)
    # Any set of mask units may be thought of as a strip of them, one below the other.
    return reroll(x, (units * unit_size[0], *unit_size[1:]), strides).view(b, units, *unit_size, c)


def embed_tokens(
    patches: torch.Tensor,
    pos_embed: torch.Tensor,
    size: Sequence[int],
    strides: Strides,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """From the patch convolution to the tokens of the first block in one pass: add position, unroll, drop masked units.

    Args:
        patches: [B, C, *size], the convolution's output, contiguous or channels-last (others are copied first).
        pos_embed: [1, N, C], row-major over `size`; N = prod(size).
        size: the token grid, 1 to 3 ints.
        strides: as in `unroll`.
        keep: None, or int64 [B, kept]: the mask units to keep, numbered row-major over the grid of mask units. They come
            out in the order in which they are listed. On CUDA a number out of range stops the program, as indexing would.

    Returns:
        [B, N, C] in unrolled order, or [B, kept*unit, C] where unit is the number of tokens per mask unit; contiguous, of
        the dtype of `patches + pos_embed`, under autocast too.

    Raises:
        TypeError: an argument is no dense tensor, keep is not int64, or size or strides are no sequences of ints.
        ValueError: shapes, devices or strides do not fit together, or keep holds a unit that is not there (on the CPU).

    Equivalent to::

        x = unroll(patches.flatten(2).transpose(1, 2) + pos_embed, size, strides)
        x = x.view(B, unit, W, C)[torch.arange(B)[:, None], :, keep]  # [B, kept, unit, C], and back to the token order:
        x = x.transpose(1, 2).reshape(B, unit * kept, C)

    Source: `Hiera.forward` in hiera-transformer's hiera.py: patch_embed, get_pos_embed, unroll, and the boolean gather.
    """
    size, strides = checks.grid(size, strides)
    _check_embed(patches, pos_embed, size, strides, keep)
    tensors = (patches, pos_embed) if keep is None else (patches, pos_embed, keep)
    if (patches.dtype, pos_embed.dtype) not in _EMBED_DTYPES or not compiled_kernel_serves("embed_tokens", *tensors):
        return reference.embed_tokens(patches, pos_embed, size, strides, keep)
    flat = [s for step in strides for s in step]
    if torch.compiler.is_compiling():
        return _embed_op(patches, pos_embed, size, flat, keep)
    return _EmbedTokens.apply(patches, pos_embed, size, flat, keep)


def _checked_tokens(x, size, strides):
    checks.tensor("x", x, 3, "[B, N, C]")
    size, strides = checks.grid(size, strides)
    if x.shape[1] != math.prod(size):
        raise ValueError(
            f"x must be [B, N, C] with N = prod(size) = {math.prod(size)} for size {size}, got {tuple(x.shape)}"
        )
    return size, strides, [s for step in strides for s in step]


def _check_embed(patches, pos_embed, size, strides, keep):
    checks.tensor("patches", patches, len(size) + 2, f"[B, C, *size] with size {size}")
    if tuple(patches.shape[2:]) != size:
        raise ValueError(f"patches must be [B, C, *size] with size {size}, got {tuple(patches.shape)}")
    n, c = math.prod(size), patches.shape[1]
    checks.tensor("pos_embed", pos_embed, 3, f"[1, {n}, {c}]")
    if tuple(pos_embed.shape) != (1, n, c):
        raise ValueError(f"pos_embed must be [1, N, C] = (1, {n}, {c}), got {tuple(pos_embed.shape)}")
    if pos_embed.device != patches.device:
        raise ValueError(f"pos_embed must be on patches' device {patches.device}, got {pos_embed.device}")
    if keep is None:
        return
    checks.tensor("keep", keep, 2, "[B, kept]")
    if keep.dtype is not torch.int64:
        raise TypeError(f"keep must be int64 (indices of mask units, not a mask), got {keep.dtype}")
    if keep.shape[0] != patches.shape[0]:
        raise ValueError(f"keep must be [B, kept] with B = {patches.shape[0]}, got {tuple(keep.shape)}")
    if keep.device != patches.device:
        raise ValueError(f"keep must be on patches' device {patches.device}, got {keep.device}")
    # On the CPU the numbers are at hand; on CUDA looking at them would wait for the device. The plain type: no tracing.
    if (
        type(keep) is torch.Tensor
        and keep.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transformed()
    ):
        windows = n // math.prod(math.prod(step) for step in strides)
        if keep.numel() and not (keep.min().item() >= 0 and keep.max().item() < windows):
            raise ValueError(f"keep must hold mask units from 0 to {windows - 1}, got {keep.min()} to {keep.max()}")


def _steps(flat: Sequence[int], dims: int) -> list[Sequence[int]]:
    return [flat[i : i + dims] for i in range(0, len(flat), dims)]


# Below autograd: kernels of the ops. The compiled library registers its own for the CPU and CUDA keys, which take precedence.


def _unroll_default(x, size, strides):
    return fresh(reference.unroll(x, size, _steps(strides, len(size))), x)


def _reroll_default(x, size, strides):
    return fresh(reference.reroll(x, size, _steps(strides, len(size))), x)


def _reroll_masked_default(x, strides, dims):
    return reroll_masked(x, _steps(strides, dims))


def _embed_default(patches, pos_embed, size, strides, keep=None):
    return fresh(reference.embed_tokens(patches, pos_embed, size, _steps(strides, len(size)), keep), patches, pos_embed)


def _empty_gradients(grad, size, patches_dtype, pos_dtype, channels_last, need_patches, need_pos):
    """Where the two gradients go: patches in the convolution's own layout, [0] for what nobody asked for."""
    b, _, c = grad.shape
    patches, pos = grad.new_empty(0, dtype=patches_dtype), grad.new_empty(0, dtype=pos_dtype)
    if need_patches and channels_last:
        # Strides spelled out: a view would tell autograd and the fake tensors a different story than the compiled kernel.
        steps = [c]
        for extent in reversed(size):
            steps.insert(0, steps[0] * extent)
        patches = grad.new_empty_strided((b, c, *size), (steps[0], 1, *steps[1:]), dtype=patches_dtype)
    elif need_patches:
        patches = grad.new_empty((b, c, *size), dtype=patches_dtype)
    if need_pos:
        pos = grad.new_empty((1, math.prod(size), c), dtype=pos_dtype)
    return patches, pos


def _embed_backward_default(grad, size, strides, keep, patches_dtype, pos_dtype, channels_last, need_patches, need_pos):
    b, _, c = grad.shape
    n, unit = math.prod(size), math.prod(strides)
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
    rows = math.prod(size) if keep is None else keep.shape[1] * math.prod(strides)
    dtype = torch.promote_types(patches.dtype, pos_embed.dtype)
    return patches.new_empty((patches.shape[0], rows, patches.shape[1]), dtype=dtype)


@torch.library.register_fake("hiera_kernels::embed_tokens_backward", lib=_library)
def _(grad, size, strides, keep, patches_dtype, pos_dtype, channels_last, need_patches, need_pos):
    return _empty_gradients(grad, size, patches_dtype, pos_dtype, channels_last, need_patches, need_pos)


# Autograd. Below its own node an op is called past the Autograd key: the second visit to Python costs as much as the op.


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, strides):
        ctx.grid = size, strides
        with torch._C._AutoDispatchBelowAutograd():
            return _unroll_op(x, size, strides)

    @staticmethod
    def backward(ctx, grad):
        size, strides = ctx.grid
        return _reroll_op(grad, size, strides).flatten(1, -2), None, None


class _Reroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, strides):
        ctx.grid = size, strides
        with torch._C._AutoDispatchBelowAutograd():
            return _reroll_op(x, size, strides)

    @staticmethod
    def backward(ctx, grad):
        size, strides = ctx.grid
        return _unroll_op(grad.flatten(1, -2), size, strides), None, None


def _is_channels_last(patches: torch.Tensor) -> bool:
    return not patches.is_contiguous() and patches.movedim(1, -1).is_contiguous()


class _EmbedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, pos_embed, size, strides, keep):
        ctx.save_for_backward(keep)
        ctx.grid = size, strides
        ctx.dtypes = patches.dtype, pos_embed.dtype
        ctx.channels_last = _is_channels_last(patches)
        with torch._C._AutoDispatchBelowAutograd():
            return _embed_op(patches, pos_embed, size, strides, keep)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        need_patches, need_pos = ctx.needs_input_grad[:2]
        patches, pos = _embed_backward_op(grad, *ctx.grid, keep, *ctx.dtypes, ctx.channels_last, need_patches, need_pos)
        return patches if need_patches else None, pos if need_pos else None, None, None, None


class _EmbedTokensBackward(torch.autograd.Function):
    """The op is linear in `grad`, and its adjoint is `embed_tokens` again."""

    @staticmethod
    def forward(ctx, grad, size, strides, keep, *rest):
        ctx.save_for_backward(keep)
        ctx.grid = size, strides
        ctx.dtype, ctx.needed = grad.dtype, rest[-2:]
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return _embed_backward_op(grad, size, strides, keep, *rest)

    @staticmethod
    def backward(ctx, patches, pos):
        (keep,) = ctx.saved_tensors
        size, strides = ctx.grid
        # What nobody asked for came out as an empty tensor, and its gradient says nothing.
        patches = patches if ctx.needed[0] else None
        pos = pos if ctx.needed[1] else None
        steps = _steps(strides, len(size))
        total = None
        if patches is not None:
            total = unroll(patches.flatten(2).transpose(1, 2).to(ctx.dtype), size, steps)
        if pos is not None:
            pos = unroll(pos.to(ctx.dtype), size, steps)
            total = pos if total is None else total + pos
        if total is None:
            return (None,) * 9
        if keep is not None:
            b, unit, c = keep.shape[0], math.prod(strides), total.shape[2]
            total = total.reshape(total.shape[0], unit, -1, c).expand(b, unit, -1, c)
            total = total.gather(2, keep[:, None, :, None].expand(b, unit, keep.shape[1], c)).flatten(1, 2)
        return (total, *(None,) * 8)


def _register_autograd(op, function, plain):
    """The op's kernel for the Autograd key, as `torch.library.register_autograd` would make it, but right in forward mode.

    The one that PyTorch generates drops tangents in silence. Here a call under forward-mode AD or a torch.func transform
    runs the reference, for which PyTorch has all rules.
    """

    def kernel(keyset, *args):
        if transformed():
            return plain(*args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(op._opname, kernel, "Autograd", with_keyset=True)


def _plain_unroll(x, size, strides):
    return reference.unroll(x, size, _steps(strides, len(size)))


def _plain_reroll(x, size, strides):
    return reference.reroll(x, size, _steps(strides, len(size)))


def _plain_embed(patches, pos_embed, size, strides, keep=None):
    return reference.embed_tokens(patches, pos_embed, size, _steps(strides, len(size)), keep)


_register_autograd(_unroll_op, _Unroll, _plain_unroll)
_register_autograd(_reroll_op, _Reroll, _plain_reroll)
_register_autograd(_embed_op, _EmbedTokens, _plain_embed)
_register_autograd(_embed_backward_op, _EmbedTokensBackward, _embed_backward_default)

"""Token order as ops: the public functions `unroll`, `reroll`, `reroll_masked`, `embed_tokens`.

They check their arguments and call the op `torch.ops.hiera_kernels.*` (token_order_library.py), whose kernels are the
compiled library's where it serves the device; where it does not, they call the plain PyTorch reference.
"""

from collections.abc import Sequence

import torch

from hiera_kernels import reference
from hiera_kernels.ops import checks
from hiera_kernels.ops import token_order_library as library
from hiera_kernels.ops.calling import transformed
from hiera_kernels.ops.routing import compiled_kernel_serves
from hiera_kernels.reference.token_order import Strides, product

# (patches, pos_embed) pairs that the compiled kernels add; see dispatch_embed in csrc. The others take the reference.
_EMBED_DTYPES = frozenset(
    {(d, d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    | {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}
)


def unroll(x: torch.Tensor, size: Sequence[int], strides: Strides) -> torch.Tensor:
    """Reorder tokens so that pooling and windows become reshapes.

    With P the product of the first step's strides, `out.view(B, P, N // P, C)` holds in dimension 1 the tokens that the
    first pooling merges; with W windows (mask units), `out.view(B, N // W, W, C)[:, :, w]` are the tokens of window w.

    Args:
        x: [B, N, C], any dtype, tokens in row-major order over `size`; N = prod(size).
        size: the token grid, 1 to 3 ints.
        strides: one stride per dimension for every pooling step, for example ((2, 2), (2, 2), (2, 2)). Their product
            has to divide `size` in every dimension. No steps: the order stays.

    Returns:
        [B, N, C], contiguous, of x's dtype; in unrolled order, that is step 1's offsets slowest, then step 2's, ...,
        windows fastest. Where nothing moves it may share memory with x.

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
        return library.unroll_op(x, size, flat)
    return library.unroll_apply(x, size, flat)


def reroll(x: torch.Tensor, size: Sequence[int], strides: Strides) -> torch.Tensor:
    """Undo `unroll`: tokens back onto their grid.

    Args:
        x: [B, N, C], any dtype, tokens in unrolled order; N = prod(size).
        size: the token grid, 1 to 3 ints.
        strides: the steps that are still to be undone, as in `unroll`.

    Returns:
        [B, *size, C], contiguous, of x's dtype. Where nothing moves it may share memory with x.

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
        return library.reroll_op(x, size, flat)
    return library.reroll_apply(x, size, flat)


def reroll_masked(x: torch.Tensor, strides: Strides) -> torch.Tensor:
    """`reroll` where only some mask units are there: each unit becomes a small image.

    Args:
        x: [B, units*unit, C], any dtype: the tokens of `units` mask units in unrolled order over these units, where
            unit = prod(unit_size) and unit_size is the product of strides per dimension.
        strides: the steps that are still to be undone, as in `unroll`. With no step left give one of ones, such as
            ((1, 1),): an empty schedule would not say how many dimensions there are.

    Returns:
        [B, units, *unit_size, C], contiguous, of x's dtype. Where nothing moves it may share memory with x.

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
    unit_size = [product(per_step) for per_step in zip(*strides, strict=True)]
    b, n, c = x.shape
    if n % product(unit_size) != 0:
        raise ValueError(f"x must hold whole mask units of {product(unit_size)} tokens ({unit_size}), got {n} tokens")
    units = n // product(unit_size)
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
        keep: None, or int64 [B, kept]: the mask units to keep, numbered row-major over the grid of mask units. They
            come out in the order in which they are listed. On CUDA a number out of range stops the program, as indexing
            would.

    Returns:
        [B, N, C] in unrolled order, or [B, kept*unit, C] where unit is the number of tokens per mask unit; contiguous,
        of the dtype of `patches + pos_embed`, under autocast too.

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
        return library.embed_op(patches, pos_embed, size, flat, keep)
    return library.embed_apply(patches, pos_embed, size, flat, keep)


def _checked_tokens(x, size, strides):
    checks.tensor("x", x, 3, "[B, N, C]")
    size, strides = checks.grid(size, strides)
    if x.shape[1] != product(size):
        raise ValueError(
            f"x must be [B, N, C] with N = prod(size) = {product(size)} for size {size}, got {tuple(x.shape)}"
        )
    return size, strides, [s for step in strides for s in step]


def _check_embed(patches, pos_embed, size, strides, keep):
    checks.tensor("patches", patches, len(size) + 2, f"[B, C, *size] with size {size}")
    if tuple(patches.shape[2:]) != size:
        raise ValueError(f"patches must be [B, C, *size] with size {size}, got {tuple(patches.shape)}")
    n, c = product(size), patches.shape[1]
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
        windows = n // product(product(step) for step in strides)
        if keep.numel() and not (keep.min().item() >= 0 and keep.max().item() < windows):
            raise ValueError(f"keep must hold mask units from 0 to {windows - 1}, got {keep.min()} to {keep.max()}")

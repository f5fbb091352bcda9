"""Token order in plain PyTorch: what `unroll`, `reroll`, `reroll_masked` and `embed_tokens` mean.

Nothing is checked here beyond what PyTorch itself checks; `hiera_kernels.ops` does that in words.
"""

from collections.abc import Iterable, Sequence

import torch

Strides = Sequence[Sequence[int]]


def product(numbers: Iterable[int]) -> int:
    """What `math.prod` gives, in a form that torch.compile traces: for symbolic ints and from generators too."""
    result = 1
    for number in numbers:
        result = result * number
    return result


def _digit_axes(size: Sequence[int], strides: Strides) -> tuple[list[int], list[int]]:
    """The grid with every coordinate split into its digits, and the axes of that shape in unrolled order.

    Coordinate d is `r_1 + s_1*(r_2 + s_2*(... + s_L*w))`: row-major, w stands first and r_1 last. The unrolled order
    asks for all r_1 first, then all r_2, ..., and the window coordinates w last. Axes count from 0, without the batch.
    """
    dims, steps = len(size), len(strides)
    split = []
    for d in range(dims):
        digits = [step[d] for step in strides]
        split += [size[d] // product(digits), *reversed(digits)]
    order = [d * (steps + 1) + steps - step for step in range(steps) for d in range(dims)]
    order += [d * (steps + 1) for d in range(dims)]
    return split, order


def unroll(x: torch.Tensor, size: Sequence[int], strides: Strides) -> torch.Tensor:
    """Tokens from spatial to unrolled order: x [B, N, C] row-major over `size` -> [B, N, C].

    See `hiera_kernels.unroll`. Source: Hiera (arXiv 2306.00989), section 3 and appendix; `Unroll` in hiera_utils.py.
    """
    split, order = _digit_axes(size, strides)
    b, n, c = x.shape
    x = x.reshape(b, *split, c).permute(0, *(1 + axis for axis in order), len(split) + 1)
    return x.reshape(b, n, c).contiguous()


def reroll(x: torch.Tensor, size: Sequence[int], strides: Strides) -> torch.Tensor:
    """Tokens from unrolled to spatial order: x [B, N, C] -> [B, *size, C]; the inverse of `unroll`.

    See `hiera_kernels.reroll`. Source: `Reroll` in hiera_utils.py, without a mask.
    """
    split, order = _digit_axes(size, strides)
    b, _, c = x.shape
    back = sorted(range(len(order)), key=order.__getitem__)
    x = x.reshape(b, *(split[axis] for axis in order), c).permute(0, *(1 + axis for axis in back), len(split) + 1)
    return x.reshape(b, *size, c).contiguous()


def reroll_masked(x: torch.Tensor, strides: Strides) -> torch.Tensor:
    """Kept tokens, unit by unit, in spatial order: x [B, units*unit, C] -> [B, units, *unit_size, C].

    See `hiera_kernels.reroll_masked`. Source: `Reroll` in hiera_utils.py, with a mask.
    """
    # Any set of mask units may be thought of as a strip of them, one below the other.
    unit_size = [product(per_step) for per_step in zip(*strides, strict=True)]
    b, n, c = x.shape
    units = n // product(unit_size)
    strip = [units * unit_size[0], *unit_size[1:]]
    return reroll(x, strip, strides).reshape(b, units, *unit_size, c)


def embed_tokens(
    patches: torch.Tensor,
    pos_embed: torch.Tensor,
    size: Sequence[int],
    strides: Strides,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Patches [B, C, *size] plus position [1, N, C], unrolled, visible mask units only -> [B, N or kept*unit, C].

    See `hiera_kernels.embed_tokens`. Source: `Hiera.forward` in hiera.py (patch_embed, get_pos_embed, unroll, mask).
    """
    x = unroll(patches.flatten(2).transpose(1, 2) + pos_embed, size, strides)
    if keep is None:
        return x
    b, n, c = x.shape
    unit = product(product(step) for step in strides)
    x = x.reshape(b, unit, n // unit, c)  # the window is the fastest token axis
    kept = keep.shape[1]
    return x.gather(2, keep[:, None, :, None].expand(b, unit, kept, c)).reshape(b, unit * kept, c)

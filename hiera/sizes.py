"""Which input sizes a Hiera accepts: those that its patches, poolings and mask units tile exactly."""

import math
from collections.abc import Sequence


def token_grid(name: str, size: Sequence[int], patch_stride: Sequence[int], unit: Sequence[int]) -> list[int]:
    """Tokens per dimension of an input, after checking that it tiles.

    Args:
        name: What to call `size` in a message.
        size: Input size in pixels (and frames).
        patch_stride: Stride of the patch embedding.
        unit: Tokens per dimension that must stay whole: the product of the pooling strides (or a multiple of it).

    Raises:
        ValueError: if a length is not a positive multiple of `patch_stride * unit`; names the nearest ones that are.
    """
    steps = [s * u for s, u in zip(patch_stride, unit, strict=True)]
    if any(int(n) < step or n % step != 0 for n, step in zip(size, steps, strict=True)):
        raise ValueError(does_not_tile(name, size, steps))
    return [n // s for n, s in zip(size, patch_stride, strict=True)]


def does_not_tile(name: str, size: Sequence[int], steps: Sequence[int]) -> str:
    """The message for a size that does not tile, with the nearest multiples of `steps`, smaller first."""
    nearest = []
    for n, step in zip(size, steps, strict=True):
        below, above = max(int(n) // step, 1) * step, max(-(-int(n) // step), 1) * step
        nearest.append(f"{below}" if below == above else f"{below} or {above}")
    return (
        f"{name} {tuple(int(n) for n in size)} does not tile into mask units of {tuple(steps)} pixels; "
        f"the nearest sizes that do: ({', '.join(nearest)}{',' if len(nearest) == 1 else ''})"
    )


def check_settings(
    input_size: Sequence[int],
    stages: Sequence[int],
    q_pool: int,
    q_stride: Sequence[int],
    mask_unit_size: Sequence[int],
    mask_unit_attn: Sequence[bool],
    patch_kernel: Sequence[int],
    patch_stride: Sequence[int],
    patch_padding: Sequence[int],
) -> None:
    """Refuse settings that contradict each other. The arguments are those of :class:`hiera.Hiera`.

    Raises:
        ValueError: naming the argument, what it was, and what it may be.
    """
    dims = len(input_size)
    if not 1 <= dims <= 3:
        raise ValueError(f"input_size must have 1 to 3 lengths, got {tuple(input_size)}")
    per_dimension = {"q_stride": q_stride, "mask_unit_size": mask_unit_size, "patch_kernel": patch_kernel,
                         "patch_stride": patch_stride, "patch_padding": patch_padding}  # fmt: skip
    for name, value in per_dimension.items():
        if len(value) != dims:
            raise ValueError(
                f"{name} must have {dims} entries, as input_size={tuple(input_size)} has; got {tuple(value)}"
            )
    if not 0 <= q_pool < len(stages):
        raise ValueError(f"q_pool must be 0 to len(stages) - 1 = {len(stages) - 1}, got {q_pool}")
    if len(mask_unit_attn) < len(stages):
        raise ValueError(
            f"mask_unit_attn must have an entry for each of the {len(stages)} stages, got {mask_unit_attn}"
        )
    for kernel, stride, padding in zip(patch_kernel, patch_stride, patch_padding, strict=True):
        # Then, and only then, a length that the stride divides gives length / stride tokens.
        if not 0 <= 2 * padding - kernel + stride < stride:
            raise ValueError(
                f"patch_kernel={tuple(patch_kernel)} with patch_padding={tuple(patch_padding)} does not give one token "
                f"per patch_stride={tuple(patch_stride)}: each needs kernel - stride <= 2 * padding < kernel"
            )


def window_tokens(blocks) -> int:
    """What the number of tokens must be a multiple of, so that every windowed block sees whole windows.

    Args:
        blocks: The model's :class:`hiera.block.HieraBlock` modules, in order.
    """
    needed, pooled = 1, 1
    for block in blocks:
        attn = block.attn
        if attn.use_mask_unit_attn:
            needed = math.lcm(needed, pooled * attn.q_stride * attn.window_size)
        pooled *= attn.q_stride
    return needed

"""Argument checks that several ops share: errors that name the argument, the value it had and the value it may have."""

from collections.abc import Sequence

import torch

from hiera_kernels.reference.token_order import product


def tensor(name: str, value: object, dims: int, shape: str) -> None:
    """Raise unless `value` is a dense tensor of `dims` dimensions; `shape` is how the message writes them."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor {shape}, got one of layout {value.layout}")
    if value.ndim != dims:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(value.shape)}")


def positive_ints(name: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple of positive ints, which may be symbolic."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {value!r}")
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, (int, torch.SymInt)):
            raise TypeError(f"{name} must hold ints, got {entry!r} in {value!r}")
        if entry < 1:
            raise ValueError(f"{name} must hold positive ints, got {value!r}")
    return tuple(value)


def schedule(strides: object, dims: int | None) -> tuple[tuple[int, ...], ...]:
    """`strides` as a tuple of steps of `dims` positive ints each (None: as many as the first step has)."""
    if isinstance(strides, str) or not isinstance(strides, Sequence):
        raise TypeError(f"strides must be a sequence of steps such as ((2, 2), (2, 2)), got {strides!r}")
    steps = []
    for step in strides:
        if not isinstance(step, Sequence):
            raise TypeError(f"strides must be a sequence of steps such as ((2, 2), (2, 2)), got {strides!r}")
        step = positive_ints("strides", step)
        dims = len(step) if dims is None else dims
        if len(step) != dims:
            raise ValueError(f"every step of strides must have {dims} entries, one per dimension, got {strides!r}")
        steps.append(step)
    return tuple(steps)


def grid(size: object, strides: object) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """`size` (1 to 3 positive ints) and `strides` (steps whose product divides it, per dimension), as tuples."""
    size = positive_ints("size", size)
    if not 1 <= len(size) <= 3:
        raise ValueError(f"size must have 1 to 3 entries, got {size!r}")
    strides = schedule(strides, len(size))
    for d, extent in enumerate(size):
        unit = product(step[d] for step in strides)
        if extent % unit != 0:
            raise ValueError(
                f"size must be a multiple of the product of strides in every dimension: "
                f"size[{d}] is {extent}, the strides {strides!r} multiply to {unit}"
            )
    return size, strides

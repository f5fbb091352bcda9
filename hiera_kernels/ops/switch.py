"""The switch behind ``hiera_kernels.disabled()``: while it is on, every public op is plain PyTorch."""

import contextlib
from collections.abc import Iterator

# One entry for each `disabled()` that is open, in any thread. Process-wide, not thread-local: the autograd engine
# recomputes a checkpointed forward in a thread of its own, which has to take the way that the first forward took.
# A list, not a counter: append and pop are atomic, and Dynamo traces and guards both.
_open: list[None] = []


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Plain PyTorch instead of every op of this package, inside the ``with`` block.

    For what the fused ops do not serve: ONNX export, and derivatives of second and higher order. Process-wide (all
    threads), may be nested, and may be entered inside or outside a compiled region. A backward that recomputes its
    forward (activation checkpointing) has to run in the same state as that forward did.

    Equivalent to: calling the functions of :mod:`hiera_kernels.reference`.
    """
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()


def is_disabled() -> bool:
    """Whether a ``disabled()`` block is open."""
    return len(_open) > 0

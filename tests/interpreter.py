"""Triton kernels on a machine without a GPU: `TRITON_INTERPRET=1` runs them as NumPy, program by program.

The variable must be set before Triton is imported anywhere in the process, and excludes compiling for a GPU: tests that
need it are marked `interpreted` and run in a process of their own, ``TRITON_INTERPRET=1 pytest -m interpreted``.

What the interpreter is not: it has no bf16 products (`tl.dot` multiplies the bit patterns), no layouts, no
races, and no fused multiply-add. It has the index arithmetic, the masks, and the order of rounding to 16 bits.
"""

import contextlib
import functools
import os
from unittest import mock

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

marks = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1, in the process of `-m interpreted`"),
    # NumPy warns where a GPU is silent: inf - inf, 0 / 0 in lanes that no mask has removed yet.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@contextlib.contextmanager
def kernels_on_cpu():
    """The package's own registration, under the CPU key of the same ops: op, autograd and swap run unchanged.

    Yields the list of calls: names of ops whose registered function ran.
    """
    from hiera_kernels import kernels
    from hiera_kernels.ops import calling

    calls = []

    def recorded(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    own = {(op, "cpu"): says for op, says in kernels.LIMITS.items()}
    with torch.library._scoped_library("hiera_kernels", "IMPL") as library, mock.patch.dict(calling.limits, own):
        for name, function in kernels.IMPLEMENTATIONS.items():
            library.impl(name, recorded(name, function), "CPU")
        torch._dynamo.reset()  # a compiled graph keeps the way that it was traced with
        try:
            yield calls
        finally:
            torch._dynamo.reset()

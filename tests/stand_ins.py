"""Opaque kernels for the CPU that count their calls: each op's own default, as if it were a kernel of this device.

They make a whole accelerated model take on the CPU the way that it takes on a GPU, through every op of the package that
has a Triton kernel, and cost no interpreter. What they compute proves nothing about kernels.
"""

import contextlib

import torch
from torch._C import DispatchKey


@contextlib.contextmanager
def counted_defaults_on_cpu():
    """Yields the list of calls: names of ops, in order."""
    from hiera_kernels import kernels

    calls = []

    def counted(name):
        overload = getattr(torch.ops.hiera_kernels, name).default

        def call(*args, **kwargs):
            calls.append(name)
            return overload._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)

        return call

    with torch.library._scoped_library("hiera_kernels", "IMPL") as library:
        for name in kernels.IMPLEMENTATIONS:
            library.impl(name, counted(name), "CPU")
        torch._dynamo.reset()  # a compiled graph keeps the way that it was traced with
        try:
            yield calls
        finally:
            torch._dynamo.reset()

"""The ops' own default functions, registered as if they were kernels of the CPU.

They make every public function take the op's way, with the op's autograd and what it keeps for the backward, on a
machine without a GPU and in fp64 too. What the ops compute is not the question where this is used: how the blocks use
them is.
"""

import contextlib

import pytest
import torch

from hiera_kernels.ops import activation, attention, layer_norm, layer_norm_library, normed_linear, shortcut

FUNCTIONS = {
    "add_layer_norm": layer_norm_library.default,
    "add_layer_norm_backward": layer_norm_library.default_backward,
    "normalize": normed_linear.default,
    "gelu": activation.default,
    "gelu_backward": activation.default_backward,
    "linear_q_pool": shortcut.default,
    "linear_q_pool_backward": shortcut.default_backward,
    "mask_unit_attention": attention.default,
    "mask_unit_attention_backward": attention.default_backward,
}

JOINED, ALONE = "add_layer_norm of a sum", "add_layer_norm of a block's input"


@contextlib.contextmanager
def default_kernels_on_cpu(*, attention_too=True):
    """Yields the list of calls: names of ops whose function ran; JOINED for an `add_layer_norm` that has a branch."""
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            if name == "add_layer_norm":
                calls.append(ALONE if args[1] is None else JOINED)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("hiera_kernels", "IMPL") as library:
        for module in (activation, attention, layer_norm, shortcut):
            patch.setattr(module, "KERNEL_DTYPES", module.DTYPES if hasattr(module, "DTYPES") else activation.DTYPES)
        for name, function in FUNCTIONS.items():
            if attention_too or "attention" not in name:
                library.impl(name, recorded(name, function), "CPU")
        torch._dynamo.reset()  # a compiled graph keeps the way that it was traced with
        try:
            yield calls
        finally:
            torch._dynamo.reset()

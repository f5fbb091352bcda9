"""Which way a call to a data-movement op takes, and what every op owes its caller whichever way it went."""

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hiera_kernels.ops.calling import has_kernel, transformed
from hiera_kernels.ops.switch import is_disabled


def compiled_kernel_serves(op: str, *tensors: torch.Tensor) -> bool:
    """Whether a kernel of the op's own is to run on these tensors; otherwise the reference is the better choice.

    Wrapper subclasses (DTensor, quantised weights, ...) know the operations of PyTorch and not ours.
    """
    device = tensors[0].device
    if is_disabled() or not has_kernel(op, device.type):
        return False
    for tensor in tensors:
        if tensor.device != device or is_traceable_wrapper_subclass(tensor):
            return False
    return torch.compiler.is_compiling() or not transformed()


def fresh(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """`out` contiguous and in memory of its own, as an op must return it; plain PyTorch may have returned a view."""
    out = out.contiguous()
    return out.clone() if any(torch._C._is_alias_of(out, x) for x in inputs) else out

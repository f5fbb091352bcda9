"""The compiled library (`_C.abi3.so`): found and loaded once, on import, and where it is absent, why.

It holds C++ and CUDA kernels for ops whose contract is in `hiera_kernels.ops`; without it the same ops run their plain
PyTorch reference.
"""

from pathlib import Path

import torch

PATH = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    """Load the library; None if it is in, otherwise the reason in words."""
    if not PATH.exists():
        return f"{PATH.name} was not built: reinstall hiera-kernels where a C++ compiler is found (`pip install -e .`)"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:  # another platform's wheel, or a torch older than 2.10
        return f"{PATH.name} does not load under torch {torch.__version__}: {error}"
    return None


_why_absent = _load()
_has_cuda = _why_absent is None and torch._C._dispatch_has_kernel_for_dispatch_key("hiera_kernels::unroll", "CUDA")


def why_not(device_type: str) -> str | None:
    """None if the compiled library holds kernels for `device_type` ("cpu", "cuda", ...), otherwise why it does not."""
    if _why_absent is not None:
        return _why_absent
    if device_type == "cpu" or (device_type == "cuda" and _has_cuda):
        return None
    if device_type == "cuda":
        return "the library was built without CUDA: reinstall with HIERA_KERNELS_CUDA=1 where nvcc is found"
    return f"there is no compiled kernel for {device_type}"

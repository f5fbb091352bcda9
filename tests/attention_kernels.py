"""Kernels for the CPU, made from the NumPy oracle, that stand in for the Triton kernels.

Registered under the CPU key of the real ops for the length of a ``with`` block, they make the public functions take the
op's way on a machine without a GPU, and show that results and gradients on that way come from the kernel alone.
"""

import contextlib

import numpy as np
import torch

from tests import attention_oracle as oracle
from tests import window_oracle


def _tensor(array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.dtype)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@contextlib.contextmanager
def oracle_kernels_on_cpu():
    """Yields the list of calls; each is the name of the op with the shape and dtype of its qkv or x."""
    calls = []

    def attention(qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
        calls.append(("mask_unit_attention", tuple(qkv.shape), qkv.dtype))
        out, lse = oracle.attention(_array(qkv), num_heads, num_windows, q_stride, scale)
        dtype = torch.float64 if qkv.dtype is torch.float64 else torch.float32
        return _tensor(out, qkv), torch.from_numpy(lse).to(dtype) if save_lse else torch.empty(0, dtype=dtype)

    def attention_backward(
        grad_out, qkv, out, lse, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias_grad=False
    ):
        calls.append(("mask_unit_attention_backward", tuple(qkv.shape), qkv.dtype))
        args = (_array(grad_out), _array(qkv), num_heads, num_windows, q_stride, scale, ties)
        grad = torch.from_numpy(oracle.attention_backward(*args))
        dtype = torch.float64 if qkv.dtype is torch.float64 else torch.float32
        grad_bias = grad.sum((0, 1)) if bias_grad else torch.empty(0)
        return grad.to(qkv.dtype), grad_bias.to(dtype)

    def q_pool(x, stride, ties="first"):
        calls.append(("q_pool", tuple(x.shape), x.dtype))
        return _tensor(oracle.q_pool(_array(x), stride), x)

    def q_pool_backward(grad_out, x, stride, ties="first"):
        calls.append(("q_pool_backward", tuple(x.shape), x.dtype))
        return _tensor(oracle.q_pool_backward(_array(grad_out), _array(x), stride, ties), x)

    def window_attention(qkv, num_heads, window_size, q_stride, pad=None, scale=None):
        calls.append(("window_attention", tuple(qkv.shape), qkv.dtype))
        row = None if pad is None else _array(pad)
        out = window_oracle.window_attention(_array(qkv), num_heads, window_size or None, q_stride or None, row, scale)
        return _tensor(out, qkv)

    def window_attention_backward(grad_out, qkv, pad, num_heads, window_size, q_stride, scale=None):
        calls.append(("window_attention_backward", tuple(qkv.shape), qkv.dtype))
        args = (num_heads, window_size or None, q_stride or None, None if pad is None else _array(pad), scale)
        _, grad_qkv, grad_pad = window_oracle.window_attention(_array(qkv), *args, _array(grad_out))
        dtype = torch.float64 if qkv.dtype is torch.float64 else torch.float32
        return _tensor(grad_qkv, qkv), torch.from_numpy(grad_pad).to(dtype) if pad is not None else torch.empty(0)

    with torch.library._scoped_library("hiera_kernels", "IMPL") as library:
        library.impl("mask_unit_attention", attention, "CPU")
        library.impl("mask_unit_attention_backward", attention_backward, "CPU")
        library.impl("q_pool", q_pool, "CPU")
        library.impl("q_pool_backward", q_pool_backward, "CPU")
        library.impl("window_attention", window_attention, "CPU")
        library.impl("window_attention_backward", window_attention_backward, "CPU")
        torch._dynamo.reset()  # a compiled graph keeps the way that it was traced with
        try:
            yield calls
        finally:
            torch._dynamo.reset()

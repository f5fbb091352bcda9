"""Kernels for the CPU, made from the NumPy oracle, that stand in for the Triton kernels of GELU and of the pooled
linear layer (as attention_kernels.py does for attention)."""

import contextlib

import numpy as np
import torch

from hiera_kernels.ops import calling
from tests import feed_forward_oracle as oracle


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _tensor(array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def _sums_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@contextlib.contextmanager
def oracle_kernels_on_cpu():
    """Yields the list of calls: the names of the ops."""
    calls = []

    def gelu(x, bias=None):
        calls.append("gelu")
        return _tensor(oracle.gelu(_array(x)), x.dtype)

    def gelu_backward(grad_out, x, output=False, bias_grad=False):
        calls.append("gelu_backward")
        grad = _array(grad_out) * oracle.gelu_slope(_array(x))
        out = _tensor(oracle.gelu(_array(x)), x.dtype) if output else x.new_empty(0)
        sums = grad.sum(tuple(range(x.ndim - 1))) if bias_grad else np.empty(0)
        return _tensor(grad, x.dtype), out, _tensor(sums, _sums_dtype(x))

    def linear_q_pool(x, weight, bias, stride, ties="first", save_winners=False):
        calls.append("linear_q_pool")
        rounded = {torch.float16: np.float16, torch.float32: np.float32}.get(x.dtype, np.float64)
        best, groups = oracle.linear_q_pool(
            _array(x), _array(weight), None if bias is None else _array(bias), stride, rounded
        )
        if not save_winners:
            return _tensor(best, x.dtype), torch.empty(0, dtype=torch.uint8)
        if ties == "first":
            winners = (groups == best[:, None]).argmax(1)
        else:
            winners = ((groups == best[:, None]) << np.arange(stride)[:, None, None]).sum(1)
        return _tensor(best, x.dtype), _tensor(winners, torch.uint8)

    def linear_q_pool_backward(grad_out, x, weight, winners, stride, ties, needs):
        calls.append("linear_q_pool_backward")
        i_p = np.arange(stride)[:, None, None]
        chosen = winners.numpy()[:, None].astype(np.int64)
        mask = (chosen == i_p) if ties == "first" else (chosen >> i_p) & 1
        rows = (_array(grad_out)[:, None] * mask / mask.sum(1, keepdims=True)).reshape(*x.shape[:2], weight.shape[0])
        return (
            _tensor(rows @ _array(weight), x.dtype) if needs[0] else x.new_empty(0),
            _tensor(np.tensordot(rows, _array(x), ((0, 1), (0, 1))), x.dtype) if needs[1] else x.new_empty(0),
            _tensor(rows.sum((0, 1)) if needs[2] else np.empty(0), _sums_dtype(x)),
        )

    functions = (gelu, gelu_backward, linear_q_pool, linear_q_pool_backward)
    with torch.library._scoped_library(calling.NAMESPACE, "IMPL") as library:
        for function in functions:
            library.impl(function.__name__, function, "CPU")
        torch._dynamo.reset()  # a compiled graph keeps the way that it was traced with
        try:
            yield calls
        finally:
            torch._dynamo.reset()

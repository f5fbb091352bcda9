"""The row kernels as the ops call them, and what they do not serve. Triton is imported at the first call."""

import torch

from hiera_kernels.kernels.limits import DTYPES, device_limit
from hiera_kernels.ops import layer_norm_library as op
from hiera_kernels.ops import normed_linear as normed_op
from hiera_kernels.reference.layer_norm import sum_dtype

MAX_CHANNELS = 2048


def row_limit(x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why the kernels cannot serve this legal input of add_layer_norm, in words; None if they can."""
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"no fused kernel computes in {tensor.dtype}"
    if x.shape[-1] > MAX_CHANNELS:
        return f"a row has {x.shape[-1]} channels; the fused kernels take up to {MAX_CHANNELS}"
    return device_limit(x.device) if x.device.type == "cuda" else None


def _forward(x, branch, weight, bias, eps=1e-6, drop_scale=None, layer_scale=None, normed_dtype=None, branch_bias=None):
    args = (x, branch, weight, bias, eps, drop_scale, layer_scale)
    dtype = sum_dtype(x, branch, layer_scale)
    normed_dtype = dtype if normed_dtype is None else normed_dtype
    if row_limit(x, branch, weight, bias, drop_scale, layer_scale) is not None or normed_dtype not in DTYPES:
        return op.default(*args, normed_dtype)
    from hiera_kernels.kernels import layer_norm

    return layer_norm.add_layer_norm_forward(*args, dtype, normed_dtype)


def _backward(
    grad_sum, grad_normed, sum, mean, rstd, weight, branch, drop_scale, layer_scale, x_dtype, branch_dtype, wanted
):
    args = (grad_sum, grad_normed, sum, mean, rstd, weight, branch, drop_scale, layer_scale)
    served = grad_normed is not None and x_dtype in DTYPES and branch_dtype in DTYPES
    if not served or row_limit(sum, *args[:2], *args[5:]) is not None:
        return op.default_backward(*args, x_dtype, branch_dtype, wanted)
    from hiera_kernels.kernels import layer_norm_backward

    shared = op.shared_gradient(x_dtype, branch_dtype, drop_scale, layer_scale)
    asked_x = wanted[0] or (wanted[1] and shared)
    asked_branch = wanted[1] and not shared
    grad_x, grad_branch, sums = layer_norm_backward.add_layer_norm_backward(
        *args, x_dtype if asked_x else None, branch_dtype if asked_branch else None, wanted[2:]
    )
    return (
        sum.new_empty(0, dtype=x_dtype) if grad_x is None else grad_x,
        sum.new_empty(0, dtype=branch_dtype) if grad_branch is None else grad_branch,
        sum.new_empty(0, dtype=torch.float32) if sums is None else sums,
    )


def _normalize(sum, mean, rstd, weight, bias, dtype):
    if row_limit(sum, mean, rstd, weight, bias) is not None or dtype not in DTYPES:
        return normed_op.default(sum, mean, rstd, weight, bias, dtype)
    from hiera_kernels.kernels import layer_norm

    return layer_norm.normalize(sum, mean, rstd, weight, bias, dtype)


IMPLEMENTATIONS = {"add_layer_norm": _forward, "add_layer_norm_backward": _backward, "normalize": _normalize}
LIMITS = {"add_layer_norm": row_limit}

"""The kernels of GELU and of the pooled linear layer as the ops call them, and what they do not serve.

Triton is imported at the first call.
"""

import torch

from hiera_kernels.kernels.limits import DTYPES, device_limit, matmul_precision
from hiera_kernels.ops import activation as activation_op
from hiera_kernels.ops import shortcut as shortcut_op

MAX_STRIDE = 16


def gelu_limit(x: torch.Tensor) -> str | None:
    """Why the kernels cannot serve this legal input of gelu, in words; None if they can."""
    if x.dtype not in DTYPES:
        return f"no fused kernel computes in {x.dtype}"
    return device_limit(x.device) if x.device.type == "cuda" else None


def linear_pooling_limit(x: torch.Tensor, dtype: torch.dtype, stride: int, ties: str) -> str | None:
    """Why the kernels cannot serve this legal input of linear_q_pool, in words; None if they can.

    dtype: of the product, which under autocast may be another than that of x.
    """
    if (reason := shortcut_op.contract(x, dtype, stride, ties)) is not None:
        return reason
    if stride > MAX_STRIDE:
        return f"stride is {stride}; the fused kernels take up to {MAX_STRIDE}"
    if x.shape[2] == 0:
        return "x has no channels"
    if x.device.type != "cuda":
        return None
    if (reason := device_limit(x.device)) is not None:
        return reason
    if matmul_precision(dtype) == "ieee" and dtype is torch.float32:
        return "fp32 without TF32 uses no tensor cores; cuBLAS serves it"
    return None


def _gelu(x, bias=None):
    if gelu_limit(x) is not None:
        return activation_op.default(x)
    from hiera_kernels.kernels import activation

    return activation.gelu_forward(x)


def _gelu_backward(grad_out, x, output=False, bias_grad=False):
    if gelu_limit(x) is not None:
        return activation_op.default_backward(grad_out, x, output, bias_grad)
    from hiera_kernels.kernels import activation

    return activation.gelu_backward(grad_out, x, output, bias_grad)


def _linear_q_pool(x, weight, bias, stride, ties="first", save_winners=False):
    if linear_pooling_limit(x, x.dtype, stride, ties) is not None:
        return shortcut_op.default(x, weight, bias, stride, ties, save_winners)
    from hiera_kernels.kernels import linear_pooling

    return linear_pooling.linear_q_pool_forward(x, weight, bias, stride, ties, save_winners)


def _linear_q_pool_backward(grad_out, x, weight, winners, stride, ties, needs):
    if linear_pooling_limit(x, x.dtype, stride, ties) is not None:
        return shortcut_op.default_backward(grad_out, x, weight, winners, stride, ties, needs)
    from hiera_kernels.kernels import linear_pooling_backward

    return linear_pooling_backward.linear_q_pool_backward(grad_out, x, weight, winners, stride, ties, needs)


IMPLEMENTATIONS = {
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "linear_q_pool": _linear_q_pool,
    "linear_q_pool_backward": _linear_q_pool_backward,
}
LIMITS = {"gelu": gelu_limit, "linear_q_pool": linear_pooling_limit}

"""The Triton kernels, registered under the ops that hiera_kernels.ops defines, where Triton is installed.

A registered function takes what the op takes. A legal input that no kernel serves it hands over to the op's default,
the reference. Triton itself is imported at the first call: `import hiera_kernels` stays quick.
"""

import importlib.util

import torch

from hiera_kernels.ops import attention as attention_op
from hiera_kernels.ops import pooling as pooling_op


def _attention(qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
    from hiera_kernels.kernels import attention

    if attention.supports(qkv, num_heads, num_windows, q_stride) is not None:
        return attention_op._default(qkv, num_heads, num_windows, q_stride, scale, ties, bias, save_lse)
    return attention.mask_unit_attention_forward(qkv, num_heads, num_windows, q_stride, scale, save_lse)


def _attention_backward(
    grad_out, qkv, out, lse, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias_grad=False
):
    from hiera_kernels.kernels import attention, attention_backward

    if attention.supports(qkv, num_heads, num_windows, q_stride) is not None:
        return attention_op._default_backward(
            grad_out, qkv, out, lse, num_heads, num_windows, q_stride, scale, ties, bias_grad
        )
    # The kernels recompute the softmax, of whole rows, from qkv alone: `out` and `lse` are not read.
    return attention_backward.mask_unit_attention_backward(
        grad_out, qkv, num_heads, num_windows, q_stride, scale, ties, bias_grad
    )


def _q_pool(x, stride, ties="first"):
    from hiera_kernels.kernels import pooling

    if pooling.supports(x, stride) is not None:
        return pooling_op._default(x, stride, ties)
    return pooling.q_pool_forward(x, stride)


def _q_pool_backward(grad_out, x, stride, ties="first"):
    from hiera_kernels.kernels import pooling

    if pooling.supports(x, stride) is not None:
        return pooling_op._default_backward(grad_out, x, stride, ties)
    return pooling.q_pool_backward(grad_out, x, stride, ties)


IMPLEMENTATIONS = {
    "mask_unit_attention": _attention,
    "mask_unit_attention_backward": _attention_backward,
    "q_pool": _q_pool,
    "q_pool_backward": _q_pool_backward,
}


def register(library: torch.library.Library, dispatch_key: str = "CUDA") -> None:
    """Register every kernel with `library`, an "IMPL" library of the namespace hiera_kernels, for `dispatch_key`.

    A test passes a scoped library and "CPU", under TRITON_INTERPRET=1.
    """
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, dispatch_key)


if importlib.util.find_spec("triton") is not None:
    _library = torch.library.Library("hiera_kernels", "IMPL")
    register(_library)

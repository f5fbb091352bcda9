"""The Triton kernels, registered under the ops that hiera_kernels.ops defines, where Triton is installed.

A registered function takes what the op takes. What its kernel cannot serve it says in LIMITS, which the op asks before
it dispatches; met with it all the same (by way of torch.ops) it hands over to the op's default, the reference. Triton
itself is imported at the first call: `import hiera_kernels` stays quick.
"""

import importlib.util

import torch

from hiera_kernels.kernels import feed_forward_calls, layer_norm_calls, limits, window_calls
from hiera_kernels.ops import attention as attention_op
from hiera_kernels.ops import calling
from hiera_kernels.ops import pooling as pooling_op


def _attention(qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
    if limits.attention_limit(qkv, num_heads, num_windows, q_stride) is not None:
        return attention_op.default(qkv, num_heads, num_windows, q_stride, scale, ties, bias, save_lse)
    from hiera_kernels.kernels import attention

    return attention.mask_unit_attention_forward(qkv, num_heads, num_windows, q_stride, scale, save_lse)


def _attention_backward(
    grad_out, qkv, out, lse, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias_grad=False
):
    if limits.attention_limit(qkv, num_heads, num_windows, q_stride) is not None:
        return attention_op.default_backward(
            grad_out, qkv, out, lse, num_heads, num_windows, q_stride, scale, ties, bias_grad
        )
    from hiera_kernels.kernels import attention_backward

    # The kernels recompute the softmax, of whole rows, from qkv alone: `out` and `lse` are not read.
    return attention_backward.mask_unit_attention_backward(
        grad_out, qkv, num_heads, num_windows, q_stride, scale, ties, bias_grad
    )


def _q_pool(x, stride, ties="first"):
    if limits.pooling_limit(x, stride) is not None:
        return pooling_op.default(x, stride, ties)
    from hiera_kernels.kernels import pooling

    return pooling.q_pool_forward(x, stride)


def _q_pool_backward(grad_out, x, stride, ties="first"):
    if limits.pooling_limit(x, stride) is not None:
        return pooling_op.default_backward(grad_out, x, stride, ties)
    from hiera_kernels.kernels import pooling

    return pooling.q_pool_backward(grad_out, x, stride, ties)


IMPLEMENTATIONS = {
    "mask_unit_attention": _attention,
    "mask_unit_attention_backward": _attention_backward,
    "q_pool": _q_pool,
    "q_pool_backward": _q_pool_backward,
    **feed_forward_calls.IMPLEMENTATIONS,
    **layer_norm_calls.IMPLEMENTATIONS,
    **window_calls.IMPLEMENTATIONS,
}


# What each op's kernels cannot serve, in words: asked by the op with the arguments of its `refusal`.
LIMITS = {
    "mask_unit_attention": limits.attention_limit,
    "q_pool": limits.pooling_limit,
    **feed_forward_calls.LIMITS,
    **layer_norm_calls.LIMITS,
    **window_calls.LIMITS,
}


def register(library: torch.library.Library, dispatch_key: str = "CUDA") -> None:
    """Register every kernel with `library`, an "IMPL" library of the namespace hiera_kernels, for `dispatch_key`.

    A test passes a scoped library and "CPU", under TRITON_INTERPRET=1, and takes back `calling.limits` afterwards.
    """
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, dispatch_key)
    calling.limits.update({(op, dispatch_key.lower()): says for op, says in LIMITS.items()})


if importlib.util.find_spec("triton") is not None:
    _library = torch.library.Library("hiera_kernels", "IMPL")
    register(_library)

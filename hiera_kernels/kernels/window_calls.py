"""What is registered under window_attention and its backward: the kernels, or the default where they do not serve."""

from hiera_kernels.kernels.window_limits import window_limit
from hiera_kernels.ops import windows as window_op


def _attention(qkv, num_heads, window_size, q_stride, pad=None, scale=None):
    if window_limit(qkv, num_heads, window_size, q_stride) is not None:
        return window_op.default(qkv, num_heads, window_size, q_stride, pad, scale)
    from hiera_kernels.kernels import windows

    return windows.window_attention_forward(qkv, num_heads, window_size, q_stride, pad, scale)


def _attention_backward(grad_out, qkv, pad, num_heads, window_size, q_stride, scale=None):
    if window_limit(qkv, num_heads, window_size, q_stride) is not None:
        return window_op.default_backward(grad_out, qkv, pad, num_heads, window_size, q_stride, scale)
    from hiera_kernels.kernels import windows_backward

    return windows_backward.window_attention_backward(grad_out, qkv, num_heads, window_size, q_stride, pad, scale)


IMPLEMENTATIONS = {"window_attention": _attention, "window_attention_backward": _attention_backward}
LIMITS = {"window_attention": window_limit}

"""The specification: every op as a pure function in plain PyTorch."""

from hiera_kernels.reference.activation import gelu
from hiera_kernels.reference.attention import mask_unit_attention, q_pool
from hiera_kernels.reference.feed_forward import gelu_linear, mlp
from hiera_kernels.reference.layer_norm import add_layer_norm
from hiera_kernels.reference.shortcut import linear_q_pool
from hiera_kernels.reference.token_order import embed_tokens, reroll, reroll_masked, unroll
from hiera_kernels.reference.windows import window_attention

__all__ = [
    "add_layer_norm",
    "embed_tokens",
    "gelu",
    "gelu_linear",
    "linear_q_pool",
    "mask_unit_attention",
    "mlp",
    "q_pool",
    "reroll",
    "reroll_masked",
    "unroll",
    "window_attention",
]

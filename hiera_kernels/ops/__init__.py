"""The ops: schema, checks, fake kernels, autograd, and the public functions. Their default kernel is the reference."""

from hiera_kernels.ops.activation import gelu
from hiera_kernels.ops.attention import mask_unit_attention
from hiera_kernels.ops.feed_forward import gelu_linear, mlp
from hiera_kernels.ops.layer_norm import add_layer_norm
from hiera_kernels.ops.pooling import q_pool
from hiera_kernels.ops.shortcut import linear_q_pool
from hiera_kernels.ops.switch import disabled
from hiera_kernels.ops.token_order import embed_tokens, reroll, reroll_masked, unroll
from hiera_kernels.ops.windows import window_attention

__all__ = [
    "add_layer_norm",
    "disabled",
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

"""The ops: schema, checks, fake kernels, autograd, and the public functions. Their default kernel is the reference."""

from hiera_kernels.ops.attention import mask_unit_attention
from hiera_kernels.ops.pooling import q_pool
from hiera_kernels.ops.switch import disabled
from hiera_kernels.ops.token_order import embed_tokens, reroll, reroll_masked, unroll
from hiera_kernels.ops.windows import window_attention

__all__ = [
    "disabled",
    "embed_tokens",
    "mask_unit_attention",
    "q_pool",
    "reroll",
    "reroll_masked",
    "unroll",
    "window_attention",
]

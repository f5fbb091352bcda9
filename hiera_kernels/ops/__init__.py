"""The ops: schema, checks, fake kernels, autograd, and the public functions. Their default kernel is the reference."""

from hiera_kernels.ops.token_order import embed_tokens, reroll, reroll_masked, unroll

__all__ = ["embed_tokens", "reroll", "reroll_masked", "unroll"]

"""The specification: every op as a pure function in plain PyTorch."""

from hiera_kernels.reference.attention import mask_unit_attention, q_pool
from hiera_kernels.reference.token_order import embed_tokens, reroll, reroll_masked, unroll
from hiera_kernels.reference.windows import window_attention

__all__ = ["embed_tokens", "mask_unit_attention", "q_pool", "reroll", "reroll_masked", "unroll", "window_attention"]

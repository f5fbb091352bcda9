"""Fused kernels for Hiera vision transformers; `accelerate(model)` swaps them into a model that exists already.

The swap: `accelerate`, `restore`, `explain`, `disabled`, `check`, `warmup`. The ops: `mask_unit_attention`,
`window_attention`, `q_pool`, `linear_q_pool`, `add_layer_norm`, `gelu`, `mlp`, `unroll`, `reroll`, `reroll_masked`,
`embed_tokens`; `reference` holds each of them as a plain PyTorch function.
"""

from hiera_kernels import kernels, reference  # noqa: F401  (importing the kernels registers them)
from hiera_kernels.compare import Comparison, check
from hiera_kernels.ops import (
    add_layer_norm,
    disabled,
    embed_tokens,
    gelu,
    linear_q_pool,
    mask_unit_attention,
    mlp,
    q_pool,
    reroll,
    reroll_masked,
    unroll,
    window_attention,
)
from hiera_kernels.precompile import Warmup, warmup
from hiera_kernels.report import Report
from hiera_kernels.swap import accelerate, explain, restore

__all__ = [
    "Comparison",
    "Report",
    "Warmup",
    "accelerate",
    "add_layer_norm",
    "check",
    "disabled",
    "embed_tokens",
    "explain",
    "gelu",
    "linear_q_pool",
    "mask_unit_attention",
    "mlp",
    "q_pool",
    "reference",
    "reroll",
    "reroll_masked",
    "restore",
    "unroll",
    "warmup",
    "window_attention",
]

"""Hiera in plain PyTorch: the reference model. Names and results are those of hiera-transformer 0.1.4.

It is used from a checkout of this repository; the installed package is `hiera_kernels` alone, because the top-level
name `hiera` belongs to hiera-transformer.
"""

from hiera.block import Head, HieraBlock, MaskUnitAttention, PatchEmbed
from hiera.mae import MaskedAutoencoderHiera
from hiera.model import Hiera
from hiera.zoo import (
    create_model,
    hiera_base_16x224,
    hiera_base_224,
    hiera_base_plus_16x224,
    hiera_base_plus_224,
    hiera_huge_16x224,
    hiera_huge_224,
    hiera_large_16x224,
    hiera_large_224,
    hiera_mini_128,
    hiera_small_224,
    hiera_tiny_224,
    list_models,
    mae_hiera_base_16x224,
    mae_hiera_base_224,
    mae_hiera_base_plus_16x224,
    mae_hiera_base_plus_224,
    mae_hiera_huge_16x224,
    mae_hiera_huge_224,
    mae_hiera_large_16x224,
    mae_hiera_large_224,
    mae_hiera_mini_128,
    mae_hiera_small_224,
    mae_hiera_tiny_224,
)

__all__ = [
    "Head",
    "Hiera",
    "HieraBlock",
    "MaskUnitAttention",
    "MaskedAutoencoderHiera",
    "PatchEmbed",
    "create_model",
    "hiera_base_16x224",
    "hiera_base_224",
    "hiera_base_plus_16x224",
    "hiera_base_plus_224",
    "hiera_huge_16x224",
    "hiera_huge_224",
    "hiera_large_16x224",
    "hiera_large_224",
    "hiera_mini_128",
    "hiera_small_224",
    "hiera_tiny_224",
    "list_models",
    "mae_hiera_base_16x224",
    "mae_hiera_base_224",
    "mae_hiera_base_plus_16x224",
    "mae_hiera_base_plus_224",
    "mae_hiera_huge_16x224",
    "mae_hiera_huge_224",
    "mae_hiera_large_16x224",
    "mae_hiera_large_224",
    "mae_hiera_mini_128",
    "mae_hiera_small_224",
    "mae_hiera_tiny_224",
]

"""The honest rival: any Hiera with its windows folded into the batch, so that attention reaches a fused backend.

Stock Hiera gives `scaled_dot_product_attention` 5-D tensors [B, H, W, K, D]; every fused backend demands 4-D. Reshaped
to [B*W, H, K, D] the same call takes flash, memory-efficient or cuDNN attention. It is a change of three lines in plain
PyTorch, and the speed that this package has to beat.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

_SETTINGS = ("qkv", "proj", "heads", "head_dim", "q_stride", "window_size", "use_mask_unit_attn")


def fold(model: nn.Module) -> int:
    """Make every mask-unit attention of `model` call 4-D attention, in place; returns how many there were.

    Args:
        model: hiera-transformer's, timm's or this repository's Hiera; the forward of each attention is replaced on the
            instance.

    Raises:
        ValueError: `model` holds no such attention.
    """
    found = [module for module in model.modules() if all(hasattr(module, name) for name in _SETTINGS)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention with {', '.join(_SETTINGS)}")
    for module in found:
        module.forward = types.MethodType(_forward, module)
    return len(found)


def _forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, N, dim] -> [B, N / q_stride, dim_out], unrolled order; what `MaskUnitAttention.forward` computes."""
    B, N, _ = x.shape
    W = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
    qkv = self.qkv(x).view(B, N // W, W, 3, self.heads, self.head_dim)
    q, k, v = (t.flatten(0, 1) for t in qkv.permute(3, 0, 2, 4, 1, 5))  # each [B*W, H, K, D]
    if self.q_stride > 1:
        q = q.unflatten(2, (self.q_stride, -1)).amax(2)
    x = F.scaled_dot_product_attention(q, k, v)  # [B*W, H, S, D]
    x = x.unflatten(0, (B, W)).permute(0, 3, 1, 2, 4)  # [B, S, W, H, D]
    return self.proj(x.reshape(B, N // self.q_stride, -1))

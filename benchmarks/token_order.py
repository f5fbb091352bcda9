"""What `unroll`, `reroll` and `embed_tokens` are measured against.

clone           the floor: the same bytes, read once and written once, in order
single_permute  plain PyTorch at its best: one view, one permute, one contiguous
upstream_chain  what hiera-transformer does: one permute (and, where the next view needs it, one copy) per step
"""

import math

import torch

from benchmarks.shapes import TokenShape
from hiera_kernels import ops, reference


def _chain_unroll(x, size, strides):
    batch, n, c = x.shape
    left = list(size)
    x = x.view(batch, *size, c)
    for step in strides:
        left = [extent // s for extent, s in zip(left, step, strict=True)]
        split = [number for pair in zip(left, step, strict=True) for number in pair]
        x = x.view(-1, *split, c)
        dims = len(split)
        x = x.permute(0, *range(2, dims + 1, 2), *range(1, dims + 1, 2), dims + 1)
        x = x.flatten(0, len(step))  # the step's offsets join the batch, which copies
    return x.reshape(batch, n, c)


def _chain_reroll(x, size, strides):
    batch, n, c = x.shape
    dims = len(size)
    unit = [1] * dims
    for step in strides:
        n //= math.prod(step)
        x = x.view(batch, *step, n, *unit, c)
        digits = [axis for d in range(dims) for axis in (1 + d, 2 + dims + d)]
        x = x.permute(0, 1 + dims, *digits, 2 + 2 * dims)
        unit = [u * s for u, s in zip(unit, step, strict=True)]
        x = x.reshape(batch, n, *unit, c)
    windows = [extent // u for extent, u in zip(size, unit, strict=True)]
    x = x.view(batch, *windows, *unit, c)
    x = x.permute(0, *(axis for d in range(dims) for axis in (1 + d, 1 + dims + d)), 1 + 2 * dims)
    return x.reshape(batch, *size, c)


def _chain_embed(patches, pos_embed, size, strides, keep):
    x = _chain_unroll(patches.flatten(2).transpose(1, 2) + pos_embed, size, strides)
    if keep is None:
        return x
    batch, n, c = x.shape
    unit = math.prod(math.prod(step) for step in strides)
    mask = torch.zeros(batch, n // unit, dtype=torch.bool, device=x.device).scatter_(1, keep, True)
    return x[mask[..., None].tile(1, unit, c)].view(batch, -1, c)


def move_case(op: str, shape: TokenShape, device: torch.device):
    """Inputs, candidates and bytes moved for `unroll` or `reroll`."""
    size, strides = shape.size, shape.strides
    own, plain = getattr(ops, op), getattr(reference, op)
    chain = _chain_unroll if op == "unroll" else _chain_reroll

    def make():
        return (torch.randn(shape.batch, shape.tokens, shape.channels, device=device).to(shape.dtype),)

    candidates = {
        "hiera_kernels": lambda x: own(x, size, strides),
        "clone": lambda x: x.clone(),
        "single_permute": lambda x: plain(x, size, strides).contiguous(),
        "upstream_chain": lambda x: chain(x, size, strides).contiguous(),
    }
    (example,) = make()
    return make, candidates, 2 * example.numel() * example.element_size()


def embed_case(op: str, shape: TokenShape, device: torch.device, channels_last: bool = False, masked: bool = False):
    """Inputs, candidates and bytes moved for `embed_tokens`; fp32 position, as the models have it."""
    size, strides = shape.size, shape.strides
    windows = shape.tokens // math.prod(math.prod(step) for step in strides)
    pos_embed = torch.randn(1, shape.tokens, shape.channels, device=device)
    kept = shape.kept if masked else None

    def make():
        patches = torch.randn(shape.batch, *size, shape.channels, device=device).to(shape.dtype).movedim(-1, 1)
        patches = patches if channels_last else patches.contiguous()
        if kept is None:
            return (patches, None)
        return (patches, torch.rand(shape.batch, windows, device=device).argsort(1)[:, :kept].sort(1).values)

    rows = shape.tokens if kept is None else shape.tokens * kept // windows
    visible = shape.batch * rows * shape.channels
    moved = visible * (shape.dtype.itemsize + 4) + pos_embed.numel() * 4
    # The floor moves as many bytes, half of them read and half written.
    block = torch.empty(moved // 2, dtype=torch.uint8, device=device).random_()
    candidates = {
        "hiera_kernels": lambda p, k: ops.embed_tokens(p, pos_embed, size, strides, k),
        "clone": lambda p, k: block.clone(),
        "single_permute": lambda p, k: reference.embed_tokens(p, pos_embed, size, strides, k),
        "upstream_chain": lambda p, k: _chain_embed(p, pos_embed, size, strides, k),
    }
    return make, candidates, moved

"""What `unroll`, `reroll` and `embed_tokens` are measured against.

clone           the floor: the same bytes, read once and written once, in order
single_permute  plain PyTorch at its best: one view, one permute, one contiguous
upstream_chain  what hiera-transformer does: one permute (and, where the next view needs it, one copy) per step
"""

import dataclasses
import functools
import math

import torch

from benchmarks.shapes import CPU_TOKENS, CUDA_TOKENS, TokenShape, token_shape
from benchmarks.trial import Case, Trial
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
    make, candidates, moved = _embed(shape, device, channels_last, masked)
    pos_embed = make()[1].detach()
    # The floor moves as many bytes, half of them read and half written.
    block = torch.empty(moved // 2, dtype=torch.uint8, device=device).random_()
    fixed = {name: functools.partial(_with_position, call, pos_embed) for name, call in candidates.items()}
    fixed["clone"] = lambda p, k: block.clone()

    def patches_and_units():
        patches, _, keep = make()
        return patches.detach(), keep

    return patches_and_units, fixed, moved


def _with_position(call, pos_embed, patches, keep):
    return call(patches, pos_embed, keep)


def _embed(shape: TokenShape, device: torch.device, channels_last: bool, masked: bool):
    size, strides = shape.size, shape.strides
    windows = shape.tokens // math.prod(math.prod(step) for step in strides)
    kept = shape.kept if masked else None

    def make():
        patches = torch.randn(shape.batch, *size, shape.channels, device=device).to(shape.dtype).movedim(-1, 1)
        patches = patches if channels_last else patches.contiguous()
        pos_embed = torch.randn(1, shape.tokens, shape.channels, device=device)
        keep = None
        if kept is not None:
            keep = torch.rand(shape.batch, windows, device=device).argsort(1)[:, :kept].sort(1).values
        return patches.requires_grad_(), pos_embed.requires_grad_(), keep

    rows = shape.tokens if kept is None else shape.tokens * kept // windows
    moved = shape.batch * rows * shape.channels * (shape.dtype.itemsize + 4) + shape.tokens * shape.channels * 4
    candidates = {
        "hiera_kernels": lambda p, e, k: ops.embed_tokens(p, e, size, strides, k),
        "single_permute": lambda p, e, k: reference.embed_tokens(p, e, size, strides, k),
        "upstream_chain": lambda p, e, k: _chain_embed(p, e, size, strides, k),
    }
    return make, candidates, moved


# ---- the tables ----


def unrolled_number(size, strides, device) -> torch.Tensor:
    """Oracle: for each token in row-major spatial order, its number in unrolled order, digit by digit.

    The offsets inside the finest step count most, then those of the next, and the window counts least.
    """
    left = list(torch.meshgrid(*(torch.arange(extent, device=device) for extent in size), indexing="ij"))
    windows, number = list(size), torch.zeros_like(left[0])
    for step in strides:
        for d, s in enumerate(step):
            number = number * s + left[d] % s
            left[d], windows[d] = left[d] // s, windows[d] // s
    for d, count in enumerate(windows):
        number = number * count + left[d]
    return number.flatten()


def move_trial(op: str, shape: TokenShape, device: torch.device) -> Trial:
    """`unroll` or `reroll`; each is the other's backward, so both passes move the same bytes."""
    make, candidates, moved = move_case(op, shape, device)
    number = unrolled_number(shape.size, shape.strides, device)

    def oracle(x):
        return x[:, number.argsort()] if op == "unroll" else x[:, number].unflatten(1, shape.size)

    rivals = {name: call for name, call in candidates.items() if name != "clone"}
    return Trial(
        lambda: tuple(x.requires_grad_() for x in make()),
        rivals,
        oracle,
        {"forward": moved, "backward": moved},
        exact=True,
        per_sample=True,
    )


def embed_trial(shape: TokenShape, channels_last: bool, masked: bool, device: torch.device) -> Trial:
    """`embed_tokens`; its backward reads the gradient once and writes the patches' and the position's."""
    make, candidates, moved = _embed(shape, device, channels_last, masked)
    number = unrolled_number(shape.size, shape.strides, device)
    unit = math.prod(math.prod(step) for step in shape.strides)

    def oracle(patches, pos_embed, keep):
        x = (patches.flatten(2).transpose(1, 2) + pos_embed)[:, number.argsort()]
        if keep is None:
            return x
        windows = x.shape[1] // unit
        tokens = torch.arange(unit, device=x.device)[:, None] * windows + keep[:, None, :]  # [B, unit, kept]
        return torch.stack([image[there.flatten()] for image, there in zip(x, tokens, strict=True)])

    example, position, keep = make()
    out = example.numel() if keep is None else shape.batch * keep.shape[1] * unit * shape.channels
    backward = out * 4 + example.numel() * example.element_size() + position.numel() * 4
    return Trial(make, candidates, oracle, {"forward": moved, "backward": backward}, exact=True)


def cases(op: str, device: torch.device, options) -> list[Case]:
    """The tables of an op of token order."""
    shapes = CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS
    if options.shape:
        shapes = [token_shape(options.shape, options.batch or 8, shapes[0].dtype)]
    shapes = [
        dataclasses.replace(shape, dtype=dtype, batch=options.batch or shape.batch)
        for shape in shapes[: 1 if options.quick else None]
        for dtype in options.dtypes or [shape.dtype]
    ]
    found = []
    for shape in dict.fromkeys(shapes):
        if op != "embed_tokens":
            found.append(Case(op, shape.name, shape.batch, shape.dtype, functools.partial(move_trial, op, shape)))
            continue
        # Stock's convolution gives channels first; one in channels_last memory format gives rows of C.
        for note, last, masked in (("", False, False), ("channels-last masked", True, True)):
            if masked <= (shape.kept is not None):
                build = functools.partial(embed_trial, shape, last, masked)
                found.append(Case(op, shape.name, shape.batch, shape.dtype, build, note))
    return found


OPS = dict.fromkeys(("unroll", "reroll", "embed_tokens"), cases)

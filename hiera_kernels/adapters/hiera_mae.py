"""The encoder of hiera-transformer's masked autoencoder, from the pixels to the fused scales.

Source: hiera-transformer 0.1.4, `MaskedAutoencoderHiera.forward_encoder` in `hiera/hiera_mae.py`, which calls
    `Hiera.forward` of `hiera/hiera.py` by `super()`: no subclass of the model can stand in between, so the encoder is
    spelled out here as a whole. Decoder and loss stay as they are.
"""

import math
import random
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from hiera_kernels.adapters.hiera_embedding import (
    FixedUnroll,
    Norm,
    TokenMixer,
    embedded,
    noticed,
    unit_shape,
    unnoticed,
    unroll_obstacle,
)
from hiera_kernels.lookalike import Probe
from hiera_kernels.ops.calling import transformed
from hiera_kernels.ops.token_order import unroll
from hiera_kernels.recognise import Target, reach
from hiera_kernels.reference import token_order
from hiera_kernels.subclass import stock_class

# (token grid, strides); the mask units are (2, 3) and (1, 2, 3) tokens, four and eight of them.
IMAGE, VIDEO = ([4, 6], [(2, 1), (1, 3)]), ([2, 4, 6], [(1, 2, 1), (1, 1, 3)])
CHANNELS, PATCH = 4, 2

# Classes whose `get_random_mask` was seen to keep int(units * (1 - mask_ratio)) units in every row, with that function.
_COUNTED: "weakref.WeakKeyDictionary[type, object]" = weakref.WeakKeyDictionary()
# All that such a function may name, the original's and what it might be written with: no schedule that another part of
# the program moves, no other device or generator.
_DRAWING = frozenset(
    ("get_random_mask", "mask_spatial_shape", "shape", "size", "device", "dtype", "torch", "math", "prod", "int")
    + ("rand", "argsort", "sort", "topk", "gather", "scatter", "scatter_", "zeros", "ones", "arange", "to", "bool")
)


class MaskedEncoder(Target):
    """`MaskedAutoencoderHiera.forward_encoder(self, x, mask_ratio, mask=None)`."""

    name = "hiera_transformer.MaskedAutoencoderHiera"
    looks_for = "a masked autoencoder with `patch_embed`, `unroll`, `multi_scale_fusion_heads` and `forward_encoder`"
    ops = ("embed_tokens",)
    method = "forward_encoder"
    known = frozenset(
        ("patch_embed", "unroll", "reroll", "blocks", "encoder_norm", "multi_scale_fusion_heads", "stage_ends")
        + ("mask_spatial_shape", "mu_size", "mask_unit_size", "q_pool")
    )
    # `forward` calls the last two after the encoder: `reach` goes by names, and `super().forward` bears that name too.
    opaque = frozenset(("get_pos_embed", "get_random_mask", "forward_decoder", "forward_loss"))

    def resembles(self, module):
        """The submodules and the methods of the original, and not the reference model's `embed_tokens`."""
        return {"patch_embed", "unroll", "blocks", "multi_scale_fusion_heads", "encoder_norm"} <= {
            name for name, _ in module.named_children()
        } and (hasattr(type(module), self.method) and not hasattr(type(module), "embed_tokens"))

    def obstacle(self, module):
        """Parts that are missing, or an `unroll` that is not ours to fuse."""
        for name in ("get_pos_embed", "get_random_mask"):
            if not callable(getattr(type(module), name, None)):
                return f"it has no method `{name}`"
        if "reroll" not in module._modules:
            return "it has no submodule `reroll`"
        for name, kinds in (("stage_ends", (list, tuple)), ("mask_spatial_shape", (list, tuple)), ("q_pool", int)):
            if not isinstance(vars(module).get(name), kinds):
                return f"it has no setting `{name}` of the kind that hiera_kernels knows"
        return unroll_obstacle(module)

    def probes(self, module, fresh):
        """Masks given and drawn, equal and unequal, in images and video, and the list that SlowFast passes."""
        _watch_draws(stock_class(module))
        found = []
        for kind, (grid, strides) in (("image", IMAGE), ("video", VIDEO)):
            x = fresh(2, 3, *(PATCH * n for n in grid))
            parts, units = _encoder_parts(fresh, grid, strides, q_pool=2)
            mask = torch.zeros(2, units, dtype=torch.bool).scatter(1, torch.tensor([[0, 3], [1, 2]]), True)
            found += [
                Probe(f"{kind}, mask drawn", parts, (x, 0.5)),
                Probe(f"{kind}, mask given", parts, (x, 0.6, mask)),
            ]
        # Two more in one row of the video's eight: unequal rows whose sum the batch divides, which stock takes.
        unequal = mask.clone()
        unequal[0, -2:] = True
        plain, _ = _encoder_parts(fresh, grid, strides, q_pool=0)
        return [
            *found,
            Probe("unequal rows", parts, (x, 0.6), {"mask": unequal}),
            Probe("a list", parts, ([x], 0.6, mask)),
            Probe("one scale", plain, (x,), {"mask_ratio": 0.25}),
        ]

    def note(self, module):
        """A hook that would be missed."""
        return noticed(module)

    @staticmethod
    def applies(module, x, mask_ratio, mask=None):
        """Where the units of the mask are those that unrolling makes, and not while compiling.

        Whether a draw keeps what the ratio says cannot be looked at in a trace, and the decoder's boolean indices
        break the graph anyway.
        """
        if torch.compiler.is_compiling() or not unnoticed(module.unroll):
            return False
        unit, grid = unit_shape(module), module.unroll.size
        return (
            tuple(module.mask_unit_size) == unit
            and module.mu_size == math.prod(unit)
            and list(module.mask_spatial_shape) == [n // u for n, u in zip(grid, unit, strict=True)]
        )

    @staticmethod
    def fused(module, x, mask_ratio, mask=None):
        """x [B, in_chans, *size] -> ([B, kept, *final_unit, C], mask bool [B, units], True is kept)."""
        count = None
        if mask is None:
            mask = module.get_random_mask(x, mask_ratio)
            count = _count_told(module, mask_ratio)
        if isinstance(x, list):
            x = x[0]
        keep = _kept_units(module, mask, count)
        patches = module.patch_embed(x, mask=mask.view(x.shape[0], 1, *module.mask_spatial_shape))
        position, grid, schedule = module.get_pos_embed(), module.unroll.size, module.unroll.schedule
        if keep is not None:
            tokens = embedded(patches, position, grid, schedule, keep)
        else:  # rows that keep different numbers: whatever the original makes of them
            tokens = unroll(patches + position, grid, schedule)
            batch, _, channels = tokens.shape
            tokens = tokens[mask[..., None].tile(1, module.mu_size, channels)].view(batch, -1, channels)
        scales = []
        for i, block in enumerate(module.blocks):
            tokens = block(tokens)
            if i in module.stage_ends:
                scales.append(module.reroll(tokens, i, mask=mask))
        total = 0.0
        # Added in place: the sum keeps the dtype of the first, which autocast may have made narrower than the last.
        for head, scale in zip(module.multi_scale_fusion_heads, scales[: module.q_pool] + scales[-1:], strict=False):
            total += _brought_to_one_scale(head, scale)
        return module.encoder_norm(total), mask


TARGETS = (MaskedEncoder(),)


def _brought_to_one_scale(head, x):
    """x [B, kept, *unit, C] -> [B, kept, *final_unit, C'] by a convolution that looks at each mask unit by itself."""
    if isinstance(head, nn.Identity):
        return x
    return head(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, x.shape[:2])


def _kept_units(module, mask, count):
    """The kept units of a mask in rising order, int64 [B, count]; None where rows differ, or it is no such mask.

    Without a count it is read, once: one wait for the device, as the boolean index of the original is.
    """
    units = math.prod(module.mask_spatial_shape)
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool or mask.dim() != 2 or transformed():
        return None
    if mask.shape[1] != units or not mask.shape[0]:
        return None
    counts = mask.sum(1)
    if count is None:
        if mask.is_meta:
            return None
        least, most = torch.stack(counts.aminmax()).tolist()
        if least != most or not least:
            return None
        count = least
    else:
        # Without waiting: a draw that is not what it was when it was looked at must not go unseen.
        torch._assert_async((counts == count).all(), f"get_random_mask does not keep {count} mask units in every row")
    return mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def _count_told(module, mask_ratio):
    """How many units the model's own draw keeps at that ratio, where that is known without looking at the mask."""
    if "get_random_mask" in vars(module) or not isinstance(mask_ratio, (int, float)):
        return None
    if _COUNTED.get(stock_class(module)) is not type(module).get_random_mask:
        return None
    units = math.prod(module.mask_spatial_shape)
    count = int(units * (1 - mask_ratio))
    return count if 0 < count <= units else None


class _Batch:
    """All that a draw may look at for its count to follow from the ratio: the batch size and the device."""

    shape, device = torch.Size([5]), torch.device("cpu")


def _watch_draws(cls):
    """Note whether the draw of `cls` keeps what the ratio says, on a few grids and ratios."""
    _COUNTED.pop(cls, None)
    if not reach(cls, "get_random_mask")[1] <= _DRAWING:
        return
    module = object.__new__(cls)
    nn.Module.__init__(module)
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            for shape in ([7, 7], [3, 5], [2, 3, 4]):
                module.mask_spatial_shape = shape
                units = math.prod(shape)
                for ratio in (0.0, 0.13, 0.25, 0.4, 0.6, 0.71, 0.75, 0.9):
                    mask = cls.get_random_mask(module, _Batch(), ratio)
                    right = mask.dtype is torch.bool and tuple(mask.shape) == (5, units)
                    if not right or mask.sum(1).tolist() != [int(units * (1 - ratio))] * 5:
                        return
    except Exception:  # one that reads more of the model, or of the pixels: its masks are counted at every call
        return
    finally:
        random.setstate(state)
    _COUNTED[cls] = cls.get_random_mask


class _PatchEmbed:
    """Stands in for the patch embedding, in two or three dimensions: patches that do not overlap, masked by units."""

    def __init__(self, fresh, dims):
        self.weight = fresh(CHANNELS, 3, *[PATCH] * dims)
        self.convolve = {2: F.conv2d, 3: F.conv3d}[dims]

    def __call__(self, x, mask=None):
        if mask is not None:
            for dim in range(2, x.dim()):
                mask = mask.repeat_interleave(x.shape[dim] // mask.shape[dim], dim=dim)
            x = x * mask
        return self.convolve(x, self.weight, stride=PATCH).flatten(2).transpose(1, 2)


class _Scale:
    """Stands in for a fusion head: every place in a mask unit counts differently, so that their order shows."""

    def __init__(self, fresh, unit):
        self.places, self.weight = fresh(CHANNELS, *unit), fresh(CHANNELS, CHANNELS)

    def __call__(self, x):
        return torch.einsum("bc...,dc->bd...", x * self.places, self.weight)


class _Reroll:
    """Stands in for the way back to mask units; the block and the mask leave their traces."""

    def __init__(self, strides):
        self.strides = strides

    def __call__(self, x, block_idx, mask=None):
        return token_order.reroll_masked(x, self.strides) * (block_idx + 1 + mask.to(x.dtype).mean())


def _draw(x, mask_ratio):
    """Stands in for `get_random_mask`: `units` of `_encoder_parts` are read off the pixels of IMAGE and VIDEO."""
    units = 4 if x.dim() == 4 else 8
    return torch.rand(x.shape[0], units).argsort(1).argsort(1) < int(units * (1 - mask_ratio))


def _encoder_parts(fresh, grid, strides, q_pool):
    unit = [math.prod(step[d] for step in strides) for d in range(len(grid))]
    shape = [n // u for n, u in zip(grid, unit, strict=True)]
    position = fresh(1, math.prod(grid), CHANNELS)
    parts = {
        "patch_embed": _PatchEmbed(fresh, len(grid)),
        "unroll": FixedUnroll(grid, strides),
        "reroll": _Reroll(strides),
        "blocks": [TokenMixer(fresh) for _ in range(5)],
        "encoder_norm": Norm(fresh, CHANNELS),
        "multi_scale_fusion_heads": [*(_Scale(fresh, unit) for _ in range(q_pool)), nn.Identity()],
        "get_pos_embed": lambda: position,
        "get_random_mask": _draw,
        # A scale that is not fused lies between the poolings and the last.
        "stage_ends": [0, 1, 3, 4],
        "mask_spatial_shape": shape,
        "mask_unit_size": tuple(unit),
        "mu_size": math.prod(unit),
        "q_pool": q_pool,
    }
    return parts, math.prod(shape)

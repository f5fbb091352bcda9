"""The way of a whole Hiera from its patches to the tokens of its first block, as one op.

Two layouts of it: the reference model (`hiera/`) has it in a method of its own, `embed_tokens`; hiera-transformer
0.1.4 has it in line in `Hiera.forward` (`hiera/hiera.py`), of which the rest is then spelled out here.
"""

import math

import torch
import torch.nn.functional as F

from hiera_kernels.adapters.hiera_transformer import UNROLL
from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.ops.token_order import embed_tokens, unroll
from hiera_kernels.plain_modules import is_heard
from hiera_kernels.recognise import Target, refusal
from hiera_kernels.reference import token_order
from hiera_kernels.subclass import target_of

GRID, STRIDES, PATCH = [4, 6], [(2, 1), (1, 3)], 2


class EmbeddingMethod(Target):
    """`embed_tokens(self, x, mask=None, keep=None)` of the reference model."""

    name = "hiera.Hiera.embed_tokens"
    looks_for = "a model with `patch_embed`, `unroll` and a method `embed_tokens`"
    ops = ("embed_tokens",)
    method = "embed_tokens"
    known = frozenset(("patch_embed", "unroll", "mask_unit_size", "tokens_spatial_shape"))
    opaque = frozenset(("get_pos_embed", "token_grid"))

    def resembles(self, module):
        """The two submodules and the method."""
        return {"patch_embed", "unroll"} <= {name for name, _ in module.named_children()} and hasattr(
            type(module), self.method
        )

    def obstacle(self, module):
        """An `unroll` that is not ours to fuse, or no way to ask for grid and position."""
        for name in ("get_pos_embed", "token_grid"):
            if not callable(getattr(type(module), name, None)):
                return f"it has no method `{name}`"
        return unroll_obstacle(module)

    def probes(self, module, fresh):
        """All tokens, and some mask units, with and without the mask that goes with them."""
        x, keep = fresh(2, 3, *(PATCH * n for n in GRID)), torch.tensor([[0, 3], [1, 2]])
        mask = torch.zeros(2, 4, dtype=torch.bool).scatter(1, keep, True)
        holds = _embedding_parts(fresh)
        return [
            Probe("all tokens", holds, (x,)),
            Probe("masked pixels", holds, (x, mask)),
            Probe("kept units", holds, (x,), {"keep": keep}),
            Probe("mask and kept units", holds, (x, mask, keep)),
        ]

    def note(self, module):
        """A hook that would be missed."""
        return noticed(module)

    @staticmethod
    def applies(module, x, mask=None, keep=None):
        """Where units are dropped, those of the mask must be those that unrolling makes."""
        return unnoticed(module.unroll) and (keep is None or tuple(module.mask_unit_size) == unit_shape(module))

    @staticmethod
    def fused(module, x, mask=None, keep=None):
        """x [B, in_chans, *size] -> [B, N, C] unrolled, or with `keep` [B, kept * unit, C]."""
        grid = module.token_grid(x)
        units = [n // unit for n, unit in zip(grid, module.mask_unit_size, strict=True)]
        if mask is None and keep is not None:
            mask = torch.zeros(x.shape[0], math.prod(units), dtype=torch.bool, device=x.device).scatter(1, keep, True)
        tokens = module.patch_embed(x, mask=None if mask is None else mask.view(-1, 1, *units))
        return embedded(tokens, module.get_pos_embed(grid), grid, module.unroll.schedule, keep)


class EmbeddingInForward(Target):
    """`Hiera.forward(self, x, mask=None, return_intermediates=False)` of hiera-transformer, where there is no mask."""

    name = "hiera_transformer.Hiera"
    looks_for = "a model with `patch_embed`, `unroll`, `reroll`, `blocks`, `norm`, `head` and `get_pos_embed`"
    ops = ("embed_tokens",)
    known = frozenset(
        ("patch_embed", "unroll", "reroll", "blocks", "norm", "head", "stage_ends", "tokens_spatial_shape")
        + ("mask_spatial_shape", "mu_size")
    )
    opaque = frozenset(("get_pos_embed",))

    def resembles(self, module):
        """The submodules, and position by a method."""
        return {"patch_embed", "unroll", "blocks"} <= {name for name, _ in module.named_children()} and hasattr(
            type(module), "get_pos_embed"
        )

    def obstacle(self, module):
        """Parts that are missing, and the masked autoencoder."""
        if hasattr(type(module), "forward_encoder"):
            return "its encoder calls Hiera.forward by super(), where no subclass can stand; its parts are swapped"
        for name in ("reroll", "norm", "head"):
            if name not in module._modules:
                return f"it has no submodule `{name}`"
        if not isinstance(vars(module).get("stage_ends"), (list, tuple)):
            return "it has no list `stage_ends`"
        return unroll_obstacle(module)

    def probes(self, module, fresh):
        """Logits alone and with intermediates, and the list that SlowFast passes."""
        parts = {"stage_ends": [0, 2], "mask_spatial_shape": [2, 2], "mu_size": 6, "norm": Norm(fresh, 4)}
        parts["head"] = _Head(fresh, 4, 5)
        parts["blocks"] = [TokenMixer(fresh) for _ in range(3)]
        parts["reroll"] = lambda x, block_idx, mask=None: x.flip(1) * (block_idx + 1)
        parts.update(_embedding_parts(fresh))
        x = fresh(2, 3, *(PATCH * n for n in GRID))
        return [
            Probe("logits", parts, (x,)),
            Probe("intermediates", parts, ([x],), {"return_intermediates": True}),
        ]

    def note(self, module):
        """A hook that would be missed."""
        return noticed(module)

    @staticmethod
    def applies(module, x, mask=None, return_intermediates=False):
        """Not with a mask: how many units it keeps is known only after waiting for the device, as the original does."""
        return mask is None and unnoticed(module.unroll)

    @staticmethod
    def fused(module, x, mask=None, return_intermediates=False):
        """x [B, in_chans, *size] -> [B, num_classes], with intermediates a tuple of that and a list."""
        if isinstance(x, list):
            x = x[0]
        grid = module.unroll.size
        x = embedded(module.patch_embed(x, mask=None), module.get_pos_embed(), grid, module.unroll.schedule)
        intermediates = []
        for i, block in enumerate(module.blocks):
            x = block(x)
            if return_intermediates and i in module.stage_ends:
                intermediates.append(module.reroll(x, i, mask=None))
        x = module.head(module.norm(x.mean(dim=1)))
        return (x, intermediates) if return_intermediates else x


TARGETS = (EmbeddingMethod(), EmbeddingInForward())


def embedded(tokens, position, grid, schedule, keep=None):
    """Patch embedding's tokens [B, N, C] and their position -> [B, N, C] unrolled, or the kept mask units of it."""
    # The tokens as the convolution wrote them, [B, C, *grid]: a view of the same memory.
    patches = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    if isinstance(position, torch.Tensor) and tuple(position.shape) == (1, *tokens.shape[1:]):
        return embed_tokens(patches, position, grid, schedule, keep)
    # An overridden get_pos_embed may return whatever can be added: a number, one position for each sample. Then only
    # reordering and choosing are left to do.
    x = unroll(tokens + position, grid, schedule)
    if keep is None:
        return x
    b, n, c = x.shape
    unit = math.prod([math.prod(step) for step in schedule])
    kept = keep[:, None, :, None].expand(b, unit, keep.shape[1], c)
    return x.view(b, unit, n // unit, c).gather(2, kept).reshape(b, unit * keep.shape[1], c)


def unit_shape(module):
    """Tokens of a mask unit along each axis, as the schedule of `module.unroll` makes them."""
    # Lists, not generators: Dynamo cannot trace math.prod over the latter.
    return tuple([math.prod([step[d] for step in module.unroll.schedule]) for d in range(len(module.unroll.size))])


def unroll_obstacle(module):
    """Why the `unroll` of `module` is not ours to fuse, or None."""
    reason = refusal(module._modules["unroll"], UNROLL)
    return None if reason is None else f"its `unroll` is left alone: {reason}"


def unnoticed(module):
    """Whether fusing a submodule away changes nothing but time: it is ours, and no hook of it would be missed."""
    return target_of(module) is not None and not is_heard(module)


def noticed(module):
    """What the report says of a model whose `unroll` is listened to, or None."""
    return "not while a hook listens to its `unroll`, as one does now" if is_heard(module.unroll) else None


# What stands in for blocks, norm and head is not affine: affine maps commute with the mean over tokens, and a model
# that norms before it pools would pass for one that pools before it norms.


class TokenMixer:
    """Stands in for a block: every token depends on those before it, so that their order shows."""

    def __init__(self, fresh):
        self.weight = fresh(1, 1, 4)

    def __call__(self, x):
        """[B, N, 4] -> [B, N, 4]."""
        return x + torch.tanh((x * self.weight).cumsum(1) / x.shape[1])


class Norm:
    """Stands in for a LayerNorm."""

    def __init__(self, fresh, dim):
        self.weight, self.bias = fresh(dim), fresh(dim)

    def __call__(self, x):
        """[..., dim] -> [..., dim]."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)


class _Head(Affine):
    """Stands in for the classifier, which may end in a softmax."""

    def __call__(self, x):
        return torch.tanh(super().__call__(x))


class _PatchEmbed:
    """Stands in for the patch embedding: patches that do not overlap, masked by mask units."""

    def __init__(self, fresh):
        self.weight = fresh(4, 3, PATCH, PATCH)

    def __call__(self, x, mask=None):
        if mask is not None:
            for dim in (2, 3):
                mask = mask.repeat_interleave(x.shape[dim] // mask.shape[dim], dim=dim)
            x = x * mask
        return F.conv2d(x, self.weight, stride=PATCH).flatten(2).transpose(1, 2)


class FixedUnroll:
    """Stands in for the module that is fused away."""

    def __init__(self, size, schedule):
        self.size, self.schedule = size, schedule

    def __call__(self, x, size=None):
        """[B, N, C] -> [B, N, C], unrolled."""
        return token_order.unroll(x, self.size, self.schedule)


def _embedding_parts(fresh):
    position = fresh(1, math.prod(GRID), 4)
    return {
        "patch_embed": _PatchEmbed(fresh),
        "unroll": FixedUnroll(GRID, STRIDES),
        "mask_unit_size": tuple(math.prod(step[d] for step in STRIDES) for d in range(2)),
        "tokens_spatial_shape": GRID,
        "get_pos_embed": lambda grid=None: position,
        "token_grid": lambda x: GRID,
    }

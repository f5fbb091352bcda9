"""Whole blocks of hiera-transformer, and of the reference model (`hiera/` in this repository).

Source: hiera-transformer 0.1.4, `hiera/hiera.py` (HieraBlock); `hiera/block.py` here adds LayerScale and a shortcut
without a weight. What a fused block does is in hiera_kernels/fused_block.py.
"""

import torch
import torch.nn.functional as F

from hiera_kernels.block_pass import run
from hiera_kernels.fused_block import FusedBlock, Parts, attended
from hiera_kernels.lookalike import Affine, Probe


class Block(FusedBlock):
    """What the blocks of Hiera have in common in all libraries."""

    looks_for = "a block with `norm1`, `attn`, `norm2`, `mlp`, `drop_path`, `dim` and `dim_out`"
    known = frozenset(("dim", "dim_out", "norm1", "attn", "norm2", "mlp", "drop_path", "proj"))

    def resembles(self, module):
        """Its submodules and sizes, and mask-unit attention."""
        return (
            {"norm1", "attn", "norm2", "mlp", "drop_path"} <= module._modules.keys()
            and {"dim", "dim_out"} <= vars(module).keys()
            and "use_mask_unit_attn" in getattr(module.attn, "__dict__", ())
        )

    def obstacle(self, module):
        """Sizes of the wrong kind, and a projection that is missing."""
        dim, dim_out = vars(module)["dim"], vars(module)["dim_out"]
        if not isinstance(dim, int) or not isinstance(dim_out, int):
            return f"its `dim` and `dim_out` are no integers: {dim!r}, {dim_out!r}"
        if dim != dim_out and self.projects(module) and "proj" not in module._modules:
            return "it has no `proj` although its channels change"
        return None

    def probes(self, module, fresh):
        """Every kind of shortcut, with ties where it pools, on parts of which none commutes with another."""
        found = []
        for dim_out, stride in ((4, 1), (8, 1), (8, 2)):
            holds = self.stand_ins(fresh, 4, dim_out, stride)
            name = f"4 to {dim_out} channels, stride {stride}"
            x = fresh.constant(3, 6 * stride, 4)
            found.append(Probe(name, holds, (fresh.leaf(x),)))
            if stride > 1:
                found.append(Probe(f"{name}, ties", holds, (fresh.leaf(x[:, :6].repeat(1, stride, 1)),)))
        return found

    def stand_ins(self, fresh, dim, dim_out, stride):
        """What a look-alike holds."""
        return {
            "dim": dim,
            "dim_out": dim_out,
            "norm1": _Norm(fresh, dim),
            "attn": _Attention(fresh, dim, dim_out, stride),
            "norm2": _Norm(fresh, dim_out),
            "mlp": _Bent(fresh, dim_out),
            "drop_path": _drop,
            "proj": Affine(fresh, dim, dim_out),
        }

    @staticmethod
    def projects(block):
        """Whether a block that changes the channels has a layer for it."""
        return True

    @staticmethod
    def parts(block):
        """By their names; one drop path serves both branches."""
        attn = block.attn
        return Parts(
            norm1=block.norm1,
            attn=attn,
            qkv=getattr(attn, "qkv", None),
            proj=getattr(attn, "proj", None),
            norm2=block.norm2,
            mlp=block.mlp,
            drop1=block.drop_path,
            drop2=block.drop_path,
            shortcut=block.proj if block.dim != block.dim_out else None,
        )

    @staticmethod
    def core(block, qkv, bias):
        """Mask-unit attention; qkv [B, N, 3*C'] -> [B, N/q_stride, C']."""
        attn = block.attn
        windows = qkv.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
        return attended(qkv, bias, attn.heads, windows, attn.q_stride)

    @staticmethod
    def keeps_tokens(block):
        """Where the channels stay the same."""
        return block.dim == block.dim_out

    @staticmethod
    def shortcut(block, x, normed):
        """The max-pooled projection of norm1's output, where the channels change."""
        return x if block.dim == block.dim_out else normed.linear_q_pool(block.proj, block.attn.q_stride, "first")


class PlainBlock(Block):
    """`HieraBlock.forward` of hiera-transformer."""

    name = "hiera_transformer.HieraBlock"

    @staticmethod
    def rides(block):
        """By the op."""
        return True

    @staticmethod
    def fused(module, x):
        """x [B, N, dim] -> [B, N/q_stride, dim_out], unrolled order."""
        return run(BLOCK, module, x)


class ScaledBlock(PlainBlock):
    """`HieraBlock.forward` of the reference model: LayerScale, and a shortcut without a weight."""

    name = "hiera.HieraBlock"
    looks_for = "a block with `norm1`, `attn`, `norm2`, `mlp`, `drop_path`, `ls1`, `ls2` and `expand_proj`"
    known = Block.known | {"ls1", "ls2", "expand_proj"}

    def resembles(self, module):
        """What is asked of hiera-transformer's, and what this one adds."""
        added = {"ls1", "ls2"} <= module._modules.keys() and "expand_proj" in vars(module)
        return added and super().resembles(module)

    def probes(self, module, fresh):
        """The shortcut without a weight too."""
        found = super().probes(module, fresh)
        for stride in (1, 2):
            holds = {**self.stand_ins(fresh, 4, 8, stride), "expand_proj": False}
            x = fresh.constant(3, 6, 4).repeat(1, stride, 1)
            found.append(Probe(f"shortcut without a weight, stride {stride}", holds, (fresh.leaf(x),)))
            other = fresh(3, 6 * stride, 4)
            found.append(Probe(f"shortcut without a weight, stride {stride}, no ties", holds, (other,)))
        return found

    def stand_ins(self, fresh, dim, dim_out, stride):
        """What a look-alike holds."""
        scales = {"ls1": _Bent(fresh, dim_out), "ls2": _Bent(fresh, dim_out), "expand_proj": True}
        return {**super().stand_ins(fresh, dim, dim_out, stride), **scales}

    @staticmethod
    def projects(block):
        """As its flag says."""
        return block.expand_proj

    @staticmethod
    def parts(block):
        """By their names."""
        projects = block.dim != block.dim_out and block.expand_proj
        attn = block.attn
        return Parts(
            norm1=block.norm1,
            attn=attn,
            qkv=getattr(attn, "qkv", None),
            proj=getattr(attn, "proj", None),
            norm2=block.norm2,
            mlp=block.mlp,
            drop1=block.drop_path,
            drop2=block.drop_path,
            scale1=block.ls1,
            scale2=block.ls2,
            shortcut=block.proj if projects else None,
        )

    @staticmethod
    def shortcut(block, x, normed):
        """Where the channels change: a projection of norm1's output, or maximum and mean of `x` side by side."""
        if block.dim == block.dim_out or block.expand_proj:
            return Block.shortcut(block, x, normed)
        groups = x.unflatten(1, (block.attn.q_stride, -1))
        return torch.cat([groups.max(dim=1).values, groups.mean(dim=1)], dim=-1)

    @staticmethod
    def fused(module, x):
        """x [B, N, dim] -> [B, N/q_stride, dim_out], unrolled order."""
        return run(SCALED_BLOCK, module, x)


BLOCK, SCALED_BLOCK = PlainBlock(), ScaledBlock()
TARGETS = (SCALED_BLOCK, BLOCK)


class _Norm:
    """Stands in for a LayerNorm."""

    def __init__(self, fresh, dim):
        self.weight, self.bias = fresh(dim), fresh(dim)

    def __call__(self, x):
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)


class _Bent(Affine):
    """Stands in for an MLP or a LayerScale: nothing that a sum could be pulled out of."""

    def __init__(self, fresh, dim):
        super().__init__(fresh, dim, dim)

    def __call__(self, x):
        return torch.tanh(super().__call__(x))


class _Attention(Affine):
    """Stands in for attention that pools."""

    def __init__(self, fresh, dim, dim_out, stride):
        super().__init__(fresh, dim, dim_out)
        self.q_stride = stride

    def __call__(self, x):
        return torch.sin(super().__call__(x.cumsum(1))).unflatten(1, (self.q_stride, -1)).mean(dim=1)


def _drop(x):
    """Stands in for drop path: draws a number for each sample."""
    return x * torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype)

"""timm's Hiera (timm 1.0.20 and later): attention and whole blocks. Its `Unroll` and `Reroll` are hiera-transformer's.

Source: timm 1.0.31, `timm/models/hiera.py` (MaskUnitAttention, HieraBlock). It differs from hiera-transformer's in
this: queries and shortcuts are pooled by `amax`, which splits the gradient over ties; a flag `fused_attn` chooses
between SDPA and two matrix products with the module's own `scale`; there is layer scale, a drop path for each branch,
and a shortcut without a weight. Recognised by attributes, so vendored and renamed copies count.
"""

import torch

from hiera_kernels.adapters import hiera_block
from hiera_kernels.adapters.hiera_transformer import Attention
from hiera_kernels.adapters.sam2_parts import Mixer
from hiera_kernels.block_pass import run
from hiera_kernels.fused_block import Parts, attended
from hiera_kernels.lookalike import Probe


class TimmAttention(Attention):
    """`MaskUnitAttention.forward` of timm."""

    name = "timm.MaskUnitAttention"
    looks_for = "the same with a flag `fused_attn` (timm)"
    known = Attention.known | {"fused_attn"}

    def resembles(self, module):
        """What is asked of hiera-transformer's, and timm's flag."""
        return "fused_attn" in vars(module) and super().resembles(module)

    def obstacle(self, module):
        """As for hiera-transformer's, and a scale to multiply by."""
        scale = vars(module).get("scale")
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            return "it has no number `scale`"
        return super().obstacle(module)

    def probes(self, module, fresh):
        """The same calls, by either way; only one of them reads `scale`.

        Which is small: under autocast the products round their logits to 16 bits, and large ones far off.
        """
        found = []
        for probe in super().probes(module, fresh):
            for way, flag in (("SDPA", True), ("products", False)):
                holds = {**probe.holds, "fused_attn": flag, "scale": 0.05}
                found.append(Probe(f"{probe.name}, {way}", holds, probe.arguments))
        return found

    @staticmethod
    def fused(module, x):
        """`proj(op(qkv(x)))`; x [B, N, dim] -> [B, N/q_stride, dim_out], unrolled order."""
        return module.proj(_attended(module, module.qkv(x), None))


class TimmBlock(hiera_block.Block):
    """`HieraBlock.forward` of timm."""

    name = "timm.HieraBlock"
    looks_for = "a block with `norm1`, `attn`, `norm2`, `mlp`, `ls1`, `ls2`, `drop_path1`, `drop_path2` and `do_expand`"
    known = (hiera_block.Block.known - {"drop_path", "dim", "dim_out"}) | {
        "ls1",
        "ls2",
        "drop_path1",
        "drop_path2",
        "do_expand",
    }

    def resembles(self, module):
        """Its submodules, its flag, and mask-unit attention."""
        parts = {"norm1", "attn", "norm2", "mlp", "ls1", "ls2", "drop_path1", "drop_path2"}
        attention = getattr(module._modules.get("attn"), "__dict__", ())
        return parts <= module._modules.keys() and "do_expand" in vars(module) and "use_mask_unit_attn" in attention

    def obstacle(self, module):
        """A flag that is none, or no word on how channels change."""
        if not isinstance(vars(module)["do_expand"], bool):
            return f"its `do_expand` is no flag: {vars(module)['do_expand']!r}"
        return None if hasattr(module, "proj") else "it has no `proj`"

    def probes(self, module, fresh):
        """Also a shortcut without a weight, which pools the block's input by maximum and by mean."""
        found = super().probes(module, fresh)
        for stride in (1, 2):
            holds = {**self.stand_ins(fresh, 4, 8, stride), "proj": None}
            x = fresh.constant(3, 6, 4)
            for name, tokens in (("ties", x.repeat(1, stride, 1)), ("no ties", fresh.constant(3, 6 * stride, 4))):
                where = f"shortcut without a weight, stride {stride}, {name}"
                found.append(Probe(where, holds, (fresh.leaf(tokens),)))
        return found

    def stand_ins(self, fresh, dim, dim_out, stride):
        """What a look-alike holds."""
        parts = super().stand_ins(fresh, dim, dim_out, stride)
        drop = parts.pop("drop_path")
        scales = {name: Mixer(fresh, dim_out, dim_out) for name in ("ls1", "ls2")}
        return {**parts, **scales, "drop_path1": drop, "drop_path2": drop, "do_expand": dim != dim_out}

    @staticmethod
    def parts(block):
        """By their names."""
        attn = block.attn
        return Parts(
            norm1=block.norm1,
            attn=attn,
            qkv=getattr(attn, "qkv", None),
            proj=getattr(attn, "proj", None),
            norm2=block.norm2,
            mlp=block.mlp,
            drop1=block.drop_path1,
            drop2=block.drop_path2,
            scale1=block.ls1,
            scale2=block.ls2,
            shortcut=block.proj if block.do_expand else None,
        )

    @staticmethod
    def core(block, qkv, bias):
        """Mask-unit attention; qkv [B, N, 3*C'] -> [B, N/q_stride, C']."""
        return _attended(block.attn, qkv, bias)

    @staticmethod
    def rides(block):
        """By the op."""
        return True

    @staticmethod
    def keeps_tokens(block):
        """Where the channels stay the same."""
        return not block.do_expand

    @staticmethod
    def shortcut(block, x, normed):
        """Where channels change: the pooled projection of norm1's output, or maximum and mean of `x` side by side."""
        if not block.do_expand:
            return x
        if block.proj is not None:
            return normed.linear_q_pool(block.proj, block.attn.q_stride, "split")
        groups = x.unflatten(1, (block.attn.q_stride, -1))
        return torch.cat([groups.amax(dim=1), groups.mean(dim=1)], dim=-1)

    @staticmethod
    def fused(module, x):
        """x [B, N, dim] -> [B, N/q_stride, dim_out], unrolled order."""
        return run(BLOCK, module, x)


def _attended(attn, qkv, bias):
    windows = qkv.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
    scale = None if attn.fused_attn else attn.scale
    return attended(qkv, bias, attn.heads, windows, attn.q_stride, scale, ties="split")


BLOCK = TimmBlock()
TARGETS = (BLOCK, TimmAttention())

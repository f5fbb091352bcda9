"""SAM 2's trunk in timm: `sam2_hiera_*` and `hieradet_*`.

Source: timm 1.0.31, `timm/models/hieradet_sam2.py` (MultiScaleAttention, MultiScaleBlock). It differs from sam2's in
pairs for window sizes, layer scale, two drop paths, an Identity where channels stay, and a flag `fused_attn`.
"""

import torch.nn.functional as F
from torch import nn

from hiera_kernels.adapters import sam2
from hiera_kernels.adapters.sam2_parts import (
    MapAttention,
    Scaled,
    attend,
    attended,
    divides,
    int_pair,
    pool_stride,
    serves,
)
from hiera_kernels.block_classes import MlpClass
from hiera_kernels.block_pass import run
from hiera_kernels.fused_block import FusedBlock, Parts
from hiera_kernels.lookalike import Probe
from hiera_kernels.plain_modules import is_erf_gelu, is_heard
from hiera_kernels.recognise import Target, refusal


class Attention(sam2.Attention):
    """`MultiScaleAttention.forward` of timm."""

    name = "timm.MultiScaleAttention"
    looks_for = "the same with a flag `fused_attn` (timm)"
    known = sam2.Attention.known | {"fused_attn", "scale"}

    def resembles(self, module):
        """What is asked of sam2's, and timm's flag."""
        return "fused_attn" in vars(module) and super().resembles(module)

    def obstacle(self, module):
        """As for sam2's, and a scale to multiply by."""
        scale = vars(module).get("scale")
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            return "it has no number `scale`"
        return super().obstacle(module)

    def probes(self, module, fresh):
        """The same calls, by either way; only one of them reads `scale`, which is small for the sake of 16 bits."""
        found = []
        for probe in super().probes(module, fresh):
            for way, flag in (("SDPA", True), ("products", False)):
                holds = {**probe.holds, "fused_attn": flag, "scale": 0.05}
                found.append(Probe(f"{probe.name}, {way}", holds, probe.arguments))
        return found

    @staticmethod
    def fused(module, x):
        """x [M, h, w, dim] -> [M, h', w', dim_out]."""
        return attend(module, x, module.num_heads, None, pool_stride(module.q_pool), used_scale(module))


class GeluClass(Target):
    """timm's module around `F.gelu`, which is not PyTorch's."""

    name = "timm.GELU"
    looks_for = "GELU by the error function"
    ops = ("gelu",)

    def resembles(self, module):
        """Whatever holds nothing."""
        return not module._modules and not module._parameters

    def obstacle(self, module):
        """None beyond what it resembles."""
        return None if self.resembles(module) else "it holds something"

    def probes(self, module, fresh):
        """Tokens."""
        return [Probe("tokens", {}, (fresh(2, 5, 4),))]

    @staticmethod
    def fused(module, input):
        """input [..., C] -> [..., C]."""
        return F.gelu(input)


_GELU = GeluClass()
_GELU_CLASSES: set[type] = set()


class Mlp(MlpClass):
    """timm's, with timm's activation, whose class is judged on the way."""

    name = "timm.Mlp"

    def obstacle(self, module):
        """None beyond what it resembles."""
        reason = super().obstacle(module)
        if reason is None and refusal(module.act, _GELU) is None:
            _GELU_CLASSES.add(type(module.act))
        return reason


class Block(sam2.Block):
    """`MultiScaleBlock.forward` of timm."""

    name = "timm.MultiScaleBlock"
    looks_for = "the same with `is_windowed`, `drop_path1` and `drop_path2` (timm)"
    mlp_class = Mlp()
    known = (sam2.Block.known - {"drop_path"}) | {"is_windowed", "ls1", "ls2", "drop_path1", "drop_path2"}
    attention = Attention()

    def resembles(self, module):
        """The parts and the settings."""
        parts = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
        return parts <= module._modules.keys() and {"window_size", "is_windowed", "q_stride"} <= vars(module).keys()

    def settings(self, module):
        """Settings that contradict each other, in words, or None."""
        window, stride = vars(module)["window_size"], vars(module)["q_stride"]
        if int_pair(window) is None and tuple(window or ()) != (0, 0):
            return f"its `window_size` is not a pair of integers: {window!r}"
        if stride is not None and int_pair(stride) is None:
            return f"its `q_stride` is not a pair of integers or None: {stride!r}"
        return None

    def probes(self, module, fresh):
        """As for sam2's, and a window and a stride that are not square."""
        found = super().probes(module, fresh)
        for window, stride, dims in (((4, 2), (2, 1), (6, 16)), ((2, 3), None, (6, 6))):
            holds = self.stand_ins(fresh, window, stride, *dims)
            found.append(Probe(f"window {window}, stride {stride}", holds, (fresh(2, 6, 7, 6),)))
        return found

    def stand_ins(self, fresh, window, stride, dim, dim_out):
        """What a small block holds."""
        parts = super().stand_ins(fresh, window, stride, dim, dim_out)
        drop = parts.pop("drop_path")
        more = {
            "window_size": (0, 0) if window is None else tuple(window),
            "is_windowed": window is not None,
            "ls1": Scaled(fresh, dim_out),
            "ls2": Scaled(fresh, dim_out),
            "drop_path1": drop,
            "drop_path2": drop,
            "attn": MapAttention(fresh, dim, dim_out, 2, stride, scale=0.05),
        }
        if dim == dim_out:
            more["proj"] = nn.Identity()
        return {**parts, **more}

    @staticmethod
    def parts(block):
        """By their names."""
        attn = block.attn
        return Parts(
            norm1=block.norm1,
            attn=attn,
            qkv=attn.qkv,
            proj=attn.proj,
            norm2=block.norm2,
            mlp=block.mlp,
            drop1=block.drop_path1,
            drop2=block.drop_path2,
            scale1=block.ls1,
            scale2=block.ls2,
            shortcut=block.proj if block.dim != block.dim_out else None,
        )

    mlp_layers = staticmethod(FusedBlock.mlp_layers)

    @staticmethod
    def is_gelu(act):
        """PyTorch's module, or timm's."""
        return is_erf_gelu(act) or (type(act) in _GELU_CLASSES and not is_heard(act))

    @staticmethod
    def window(block):
        """Height and width of the windows; None where attention is global."""
        return tuple(block.window_size) if block.is_windowed else None

    @classmethod
    def attend(cls, block, normed):
        """Layers that cannot be read are called, on the whole map; normed [B, Hs, Ws, C] -> [B, Hs', Ws', C']."""
        attn = block.attn
        return attend(attn, normed, attn.num_heads, cls.window(block), block.q_stride, used_scale(attn))

    @classmethod
    def core(cls, block, qkv, bias):
        """Attention in the windows of a map; qkv [B, Hs, Ws, 3*C'] -> [B, Hs', Ws', C']."""
        attn = block.attn
        return attended(attn, qkv, attn.num_heads, cls.window(block), block.q_stride, used_scale(attn))

    @staticmethod
    def applies(module, x):
        """Where attention is ours, nobody listens to its parts, and pooling cuts neither windows nor the map."""
        attn, stride = module.attn, module.q_stride
        if not serves(attn, (attn.q_pool,)) or pool_stride(attn.q_pool) != (stride and tuple(stride)):
            return False
        window = Block.window(module)
        if not FusedBlock.applies(module, x):
            return False
        return divides(x, window, stride) and (stride is None if window is None else min(window) > 0)

    @staticmethod
    def fused(module, x):
        """x [B, Hs, Ws, dim] -> [B, Hs', Ws', dim_out]."""
        return run(BLOCK, module, x)


def used_scale(attn):
    """What its attention multiplies logits by: SDPA takes its own default."""
    return None if attn.fused_attn else attn.scale


BLOCK = Block()
TARGETS = (BLOCK, Attention())

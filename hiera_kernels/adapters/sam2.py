"""SAM 2's trunk in its first home, the package sam2, and in copies of the file.

Source: sam2 1.1.0, `sam2/modeling/backbones/hieradet.py` (MultiScaleAttention, MultiScaleBlock). Recognised by
attributes, so vendored and renamed copies count. Every setting is read at call time, as the originals do.
"""

import torch
from torch import nn

from hiera_kernels.adapters.sam2_parts import (
    CASES,
    Drop,
    MapAttention,
    Mixer,
    Norm,
    attend,
    attended,
    attention_sizes,
    divides,
    int_pair,
    noticed,
    pool_stride,
    pooled,
    projected,
    serves,
)
from hiera_kernels.block_pass import run
from hiera_kernels.fused_block import FusedBlock, MlpLayers, Parts
from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.plain_modules import is_heard
from hiera_kernels.recognise import Target, refusal


class Attention(Target):
    """`MultiScaleAttention.forward`: windows are a batch. What a block calls where it cannot do without windows."""

    name = "sam2.MultiScaleAttention"
    looks_for = "attention with `qkv` and `proj` layers, `num_heads` and `q_pool`"
    ops = ("window_attention",)
    known = frozenset(("num_heads", "q_pool", "qkv", "proj"))

    def resembles(self, module):
        """Layers and settings."""
        return (
            {"qkv", "proj"} <= module._modules.keys()
            and "num_heads" in vars(module)
            and ("q_pool" in vars(module) or "q_pool" in module._modules)
        )

    def obstacle(self, module):
        """Sizes that do not fit, or a pooling that is not one of maxima side by side."""
        if module.q_pool is not None and pool_stride(module.q_pool) is None:
            return f"its `q_pool` is not a MaxPool2d that the op knows: {module.q_pool}"
        return attention_sizes(module, "num_heads")

    def probes(self, module, fresh):
        """Pooled and not, with two heads, and with ties."""
        dim, heads, dim_out = 6, 2, 16
        holds = {"num_heads": heads, "qkv": Affine(fresh, dim, 3 * dim_out), "proj": Affine(fresh, dim_out, dim_out)}
        found = []
        for stride, height, width in ((None, 3, 5), ((2, 2), 4, 6), ((2, 1), 4, 3)):
            each = {**holds, "q_pool": None if stride is None else nn.MaxPool2d(stride)}
            x = fresh.constant(2, height, width, dim)
            found.append(Probe(f"map of {height} x {width}, stride {stride}", each, (fresh.leaf(x),)))
            if stride is not None:
                tied = x.repeat_interleave(2, dim=1)[:, :height]
                found.append(Probe(f"stride {stride}, ties", each, (fresh.leaf(tied),)))
        return found

    @staticmethod
    def applies(module, x):
        """Not where pooling cuts the map, or somebody listens to it."""
        if module.q_pool is None:
            return True
        stride = pool_stride(module.q_pool)
        return stride is not None and divides(x, None, stride) and not is_heard(module.q_pool)

    @staticmethod
    def fused(module, x):
        """x [M, h, w, dim] -> [M, h', w', dim_out]."""
        return attend(module, x, module.num_heads, None, pool_stride(module.q_pool))


class Mlp(Target):
    """`MLP` of two layers (`sam2/modeling/sam2_utils.py`)."""

    name = "sam2.MLP"
    looks_for = "an MLP with a list `layers` and `act`"
    ops = ("gelu",)
    known = frozenset(("layers", "num_layers", "act", "sigmoid_output"))

    def resembles(self, module):
        """The layers and the settings."""
        settings = {"num_layers", "sigmoid_output"} <= vars(module).keys()
        return settings and {"layers", "act"} <= module._modules.keys()

    def obstacle(self, module):
        """Another number of layers, or a sigmoid at the end."""
        return None if self.resembles(module) and _is_two_layers(module) else "it is no MLP of two layers"

    def probes(self, module, fresh):
        """With an activation that is far from linear."""
        layers = [Affine(fresh, 4, 6), Affine(fresh, 6, 4)]
        holds = {"layers": layers, "num_layers": 2, "act": torch.sin, "sigmoid_output": False}
        return [Probe("tokens", holds, (fresh(2, 5, 4),))]

    @staticmethod
    def fused(module, x):
        """x [..., C] -> [..., C]."""
        first, second = module.layers
        return second(module.act(first(x)))


def _is_two_layers(mlp):
    return mlp.num_layers == 2 and len(mlp.layers) == 2 and not mlp.sigmoid_output


class Block(FusedBlock):
    """`MultiScaleBlock.forward`, without windows cut, padded, put together and cropped."""

    name = "sam2.MultiScaleBlock"
    looks_for = "a block with `norm1`, `attn`, `norm2`, `mlp`, `window_size` and `q_stride` (SAM 2)"
    ops = ("add_layer_norm", "gelu", "window_attention")
    mlp_class = Mlp()
    known = frozenset(
        ("dim", "dim_out", "norm1", "proj", "pool", "window_size", "attn", "q_stride", "drop_path", "mlp", "norm2")
    )
    attention = Attention()

    def resembles(self, module):
        """The parts and the two settings."""
        return (
            {"norm1", "attn", "norm2", "mlp"} <= module._modules.keys()
            and {"window_size", "q_stride", "dim", "dim_out"} <= vars(module).keys()
            and "drop_path" in module._modules
        )

    def obstacle(self, module):
        """An attention that is left alone, and settings that contradict each other."""
        attn = module._modules["attn"]
        if not self.attention.resembles(attn):
            return "its `attn` is not the one that goes with it"
        if reason := refusal(attn, self.attention):
            return f"its `attn` is left alone: {reason}"
        return self.settings(module)

    def settings(self, module):
        """Settings that contradict each other, in words, or None."""
        window, stride = vars(module)["window_size"], vars(module)["q_stride"]
        if not isinstance(window, int) or window < 0:
            return f"its `window_size` is not a positive integer or 0: {window!r}"
        if stride is not None and int_pair(stride) is None:
            return f"its `q_stride` is not a pair of integers or None: {stride!r}"
        return None

    def probes(self, module, fresh):
        """Windows that fit and that overhang, global ones, pooled ones."""
        return [
            Probe(f"map {size}, window {window}, stride {stride}", self.stand_ins(fresh, window, stride, *dims), (x,))
            for size, window, stride, dims in CASES
            for x in [fresh(2, *size, dims[0])]
        ]

    def stand_ins(self, fresh, window, stride, dim, dim_out):
        """What a small block holds."""
        pool = None if stride is None else nn.MaxPool2d(stride)
        return {
            "dim": dim,
            "dim_out": dim_out,
            "window_size": 0 if window is None else window[0],
            "q_stride": stride,
            "pool": pool,
            "norm1": Norm(fresh, dim),
            "norm2": Norm(fresh, dim_out),
            "attn": MapAttention(fresh, dim, dim_out, 2, stride),
            "proj": Affine(fresh, dim, dim_out),
            "mlp": Mixer(fresh, dim_out, dim_out),
            "drop_path": Drop(),
        }

    def note(self, module):
        """The settings, and a hook that would be missed."""
        notes = (super().note(module), noticed(module.attn, (module.attn.q_pool,)))
        return "; ".join(note for note in notes if note)

    @staticmethod
    def parts(block):
        """By their names; one drop path serves both branches."""
        attn = block.attn
        return Parts(
            norm1=block.norm1,
            attn=attn,
            qkv=attn.qkv,
            proj=attn.proj,
            norm2=block.norm2,
            mlp=block.mlp,
            drop1=block.drop_path,
            drop2=block.drop_path,
            shortcut=block.proj if block.dim != block.dim_out else None,
        )

    @staticmethod
    def window(block):
        """Height and width of the windows; None where attention is global."""
        return (block.window_size, block.window_size) if block.window_size else None

    @classmethod
    def attend(cls, block, normed):
        """Layers that cannot be read are called, on the whole map; normed [B, Hs, Ws, C] -> [B, Hs', Ws', C']."""
        return attend(block.attn, normed, block.attn.num_heads, cls.window(block), block.q_stride)

    @classmethod
    def core(cls, block, qkv, bias):
        """Attention in the windows of a map; qkv [B, Hs, Ws, 3*C'] -> [B, Hs', Ws', C']."""
        return attended(block.attn, qkv, block.attn.num_heads, cls.window(block), block.q_stride)

    @staticmethod
    def keeps_tokens(block):
        """Where the channels stay the same."""
        return block.dim == block.dim_out

    @staticmethod
    def shortcut(block, x, normed):
        """The max-pooled projection of norm1's output, where the channels change."""
        return x if block.dim == block.dim_out else pooled(projected(normed, block.proj), block.pool)

    @staticmethod
    def mlp_layers(mlp):
        """As sam2 names them; none that could be read if there are more, or a sigmoid."""
        return MlpLayers(mlp.layers[0], mlp.act, mlp.layers[-1] if _is_two_layers(mlp) else None)

    @staticmethod
    def applies(module, x):
        """Where attention is ours, nobody listens to its parts, and pooling cuts neither windows nor the map."""
        attn, stride = module.attn, module.q_stride
        if not serves(attn, (attn.q_pool,)) or pool_stride(attn.q_pool) != (stride and tuple(stride)):
            return False
        window = Block.window(module)
        if not FusedBlock.applies(module, x):
            return False
        # The original takes the height of the stride for both sides of its windows.
        return divides(x, window, stride) and (stride is None or (window is not None and stride[0] == stride[1]))

    @staticmethod
    def fused(module, x):
        """x [B, Hs, Ws, dim] -> [B, Hs', Ws', dim_out]."""
        return run(BLOCK, module, x)


BLOCK = Block()
TARGETS = (BLOCK, Attention())

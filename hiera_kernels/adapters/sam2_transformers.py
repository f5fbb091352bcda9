"""SAM 2's trunk in transformers: `Sam2HieraDetModel`, in Sam2Model, Sam2VideoModel and Sam2VisionModel.

Source: transformers 5.23, `models/sam2/modeling_sam2.py` (Sam2MultiScaleAttention, Sam2MultiScaleBlock). Its attention
computes an `attn_weights` from which nothing is read; that is left out here.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from hiera_kernels.adapters import transformers_parts
from hiera_kernels.adapters.sam2_parts import (
    CASES,
    MapAttention,
    Mixer,
    Norm,
    attend,
    attended,
    attention_sizes,
    divides,
    int_pair,
    noticed,
    projected,
    serves,
)
from hiera_kernels.block_pass import run
from hiera_kernels.fused_block import FusedBlock, MlpLayers, Parts
from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.plain_modules import is_heard
from hiera_kernels.recognise import Target, refusal
from hiera_kernels.subclass import target_of

# Ways to compute the same attention. Others, which users register by a name of their own, may compute another one.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Keywords that go all the way down and change nothing here.
UNREAD = frozenset(("output_attentions", "output_hidden_states", "return_dict"))


class Attention(Target):
    """`Sam2MultiScaleAttention.forward`: windows are a batch."""

    name = "transformers.Sam2MultiScaleAttention"
    looks_for = "attention with `qkv` and `proj` layers, `num_attention_heads`, `query_stride` and `config`"
    ops = ("window_attention",)
    known = frozenset(("num_attention_heads", "query_stride", "scale", "config", "qkv", "proj", "is_causal"))

    def resembles(self, module):
        """Layers and settings."""
        return {"qkv", "proj"} <= module._modules.keys() and {
            "num_attention_heads",
            "query_stride",
            "config",
        } <= vars(module).keys()

    def obstacle(self, module):
        """Sizes that do not fit, causal attention, and settings of the wrong kind."""
        has = vars(module)
        if has["query_stride"] is not None and int_pair(has["query_stride"]) is None:
            return f"its `query_stride` is not a pair of integers or None: {has['query_stride']!r}"
        if not isinstance(has.get("scale"), (int, float)):
            return "it has no number `scale`"
        return attention_sizes(module, "num_attention_heads")

    def probes(self, module, fresh):
        """Pooled and not, with two heads, and with ties."""
        dim, heads, dim_out = 6, 2, 16
        holds = {
            "num_attention_heads": heads,
            "qkv": Affine(fresh, dim, 3 * dim_out),
            "proj": Affine(fresh, dim_out, dim_out),
            # Small: large logits, rounded to 16 bits under autocast, are far off.
            "scale": 0.05,
            "is_causal": False,
        }
        found = []
        for stride, height, width in ((None, 3, 5), ((2, 2), 4, 6), ((2, 1), 4, 3)):
            # The eager way has its softmax in fp32, so in fp64 it is no measure.
            for way in ("sdpa",) if fresh.dtype is torch.float64 else ("sdpa", "eager"):
                each = {**holds, "query_stride": stride, "config": SimpleNamespace(_attn_implementation=way)}
                x = fresh.constant(2, height, width, dim)
                found.append(Probe(f"map of {height} x {width}, stride {stride}, {way}", each, (fresh.leaf(x),)))
                if stride is not None:
                    tied = x.repeat_interleave(2, dim=1)[:, :height]
                    found.append(Probe(f"stride {stride}, ties, {way}", each, (fresh.leaf(tied),)))
        return found

    @staticmethod
    def applies(module, hidden_states, **kwargs):
        """Not where pooling cuts the map, attention is of another kind, or something is asked for by keyword."""
        known = module.config._attn_implementation in IMPLEMENTATIONS and not module.is_causal
        return known and UNREAD.issuperset(kwargs) and divides(hidden_states, None, module.query_stride)

    @staticmethod
    def fused(module, hidden_states, **kwargs):
        """hidden_states [M, h, w, dim] -> [M, h', w', dim_out]."""
        return attend(
            module, hidden_states, module.num_attention_heads, None, module.query_stride or None, module.scale
        )


class Block(FusedBlock):
    """`Sam2MultiScaleBlock.forward`, without windows cut, padded, put together and cropped."""

    name = "transformers.Sam2MultiScaleBlock"
    looks_for = "a block with `layer_norm1`, `attn`, `layer_norm2`, `mlp`, `window_size` and `query_stride`"
    ops = ("add_layer_norm", "gelu", "window_attention")
    mlp_class = transformers_parts.FEED_FORWARD
    known = frozenset(
        ("dim", "dim_out", "layer_norm1", "proj", "window_size", "attn", "query_stride", "mlp", "layer_norm2")
    )
    attention = Attention()

    def resembles(self, module):
        """The parts and the settings."""
        return {"layer_norm1", "attn", "layer_norm2", "mlp"} <= module._modules.keys() and {
            "window_size",
            "query_stride",
            "dim",
            "dim_out",
        } <= vars(module).keys()

    def obstacle(self, module):
        """An attention that is left alone, and settings that contradict each other."""
        has, attn = vars(module), module._modules["attn"]
        if not self.attention.resembles(attn):
            return "its `attn` is not the one that goes with it"
        if reason := refusal(attn, self.attention):
            return f"its `attn` is left alone: {reason}"
        if not isinstance(has["window_size"], int) or has["window_size"] < 0:
            return f"its `window_size` is not a positive integer or 0: {has['window_size']!r}"
        if has["query_stride"] is not None and int_pair(has["query_stride"]) is None:
            return f"its `query_stride` is not a pair of integers or None: {has['query_stride']!r}"
        return None

    def probes(self, module, fresh):
        """Windows that fit and that overhang, global ones, pooled ones."""
        found = []
        for size, window, stride, (dim, dim_out) in CASES:
            holds = {
                "dim": dim,
                "dim_out": dim_out,
                "window_size": 0 if window is None else window[0],
                "query_stride": stride,
                "layer_norm1": Norm(fresh, dim),
                "layer_norm2": Norm(fresh, dim_out),
                "attn": MapAttention(fresh, dim, dim_out, 2, stride, scale=0.05),
                "proj": Affine(fresh, dim, dim_out),
                "mlp": Mixer(fresh, dim_out, dim_out),
            }
            found.append(Probe(f"map {size}, window {window}, stride {stride}", holds, (fresh(2, *size, dim),)))
        return found

    def note(self, module):
        """The settings, and a hook that would be missed."""
        notes = (super().note(module), None if _is_idle(module.attn) else noticed(module.attn))
        return "; ".join(note for note in notes if note)

    @staticmethod
    def parts(block):
        """By their names; there is no drop path."""
        attn = block.attn
        return Parts(
            norm1=block.layer_norm1,
            attn=attn,
            qkv=attn.qkv,
            proj=attn.proj,
            norm2=block.layer_norm2,
            mlp=block.mlp,
            shortcut=block.proj if block.dim != block.dim_out else None,
        )

    @staticmethod
    def attend(block, normed):
        """Layers that cannot be read are called, on the whole map; normed [B, Hs, Ws, C] -> [B, Hs', Ws', C']."""
        attn = block.attn
        return attend(attn, normed, attn.num_attention_heads, _window(block), block.query_stride or None, attn.scale)

    @staticmethod
    def core(block, qkv, bias):
        """Attention in the windows of a map; qkv [B, Hs, Ws, 3*C'] -> [B, Hs', Ws', C']."""
        attn = block.attn
        heads, stride = attn.num_attention_heads, block.query_stride or None
        return attended(attn, qkv, heads, _window(block), stride, attn.scale)

    @staticmethod
    def keeps_tokens(block):
        """Where the channels stay the same."""
        return block.dim == block.dim_out

    @staticmethod
    def shortcut(block, x, normed):
        """The max-pooled projection of the first norm's output, where the channels change."""
        if block.dim == block.dim_out:
            return x
        shortcut = projected(normed, block.proj)
        if not block.query_stride:
            return shortcut
        return F.max_pool2d(shortcut.permute(0, 3, 1, 2), block.query_stride).permute(0, 2, 3, 1)

    @staticmethod
    def mlp_layers(mlp):
        """As transformers names them; none that could be read if there are more, or a sigmoid."""
        two = transformers_parts.is_two_layers(mlp)
        return MlpLayers(mlp.proj_in, mlp.activation, mlp.proj_out if two else None)

    is_gelu = staticmethod(transformers_parts.is_gelu)

    @staticmethod
    def applies(module, hidden_states, **kwargs):
        """Where attention is ours and would serve it, nobody listens to its parts, and pooling cuts nothing."""
        attn, stride = module.attn, module.query_stride
        if not _serves(attn) or attn.query_stride != stride or not Attention.applies(attn, hidden_states, **kwargs):
            return False
        if not FusedBlock.applies(module, hidden_states):
            return False
        window = _window(module)
        # The original takes the height of the stride for both sides of its windows.
        return divides(hidden_states, window, stride) and (
            not stride or (window is not None and stride[0] == stride[1])
        )

    @staticmethod
    def fused(module, hidden_states, **kwargs):
        """hidden_states [B, Hs, Ws, dim] -> [B, Hs', Ws', dim_out]."""
        return run(BLOCK, module, hidden_states)


def _serves(attn):
    """As `serves`, also where the only hooks are those that transformers leaves behind."""
    return serves(attn) or (not torch.compiler.is_compiling() and target_of(attn) is not None and _is_idle(attn))


def _is_idle(attn):
    """Whether the only listeners are transformers' recorders of attention, and they record nothing now.

    They stay once any output has been recorded (`output_hidden_states=True`), and return at once from then on.
    """
    others = attn._forward_pre_hooks or attn._backward_hooks or attn._backward_pre_hooks or "forward" in vars(attn)
    if others or not attn._forward_hooks or is_heard(attn.qkv) or is_heard(attn.proj):
        return False
    return not any(_records(hook) for hook in attn._forward_hooks.values())


def _records(hook):
    collector = getattr(hook, "__globals__", {}).get("_active_collector")
    if collector is None or hook.__name__ != "output_capturing_hook":
        return True
    return "attentions" in (collector.get() or ())


def _window(block):
    return (block.window_size, block.window_size) if block.window_size else None


BLOCK = Block()
TARGETS = (BLOCK, Attention())

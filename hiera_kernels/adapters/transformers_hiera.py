"""Hugging Face's Hiera (transformers 5): attention and the encoder's `reroll`.

Source: transformers 5.23, `models/hiera/modeling_hiera.py` (HieraMaskUnitAttention, HieraEncoder.reroll). Recognised by
attributes, so vendored and renamed copies count.
"""

import torch

from hiera_kernels.adapters.hiera_transformer import GRIDS, RerollOrder
from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.ops.attention import mask_unit_attention
from hiera_kernels.ops.token_order import reroll, reroll_masked
from hiera_kernels.recognise import Target


class TransformersAttention(Target):
    """`HieraMaskUnitAttention.forward`, which returns a pair: the output, and the attention matrix or None."""

    name = "transformers.HieraMaskUnitAttention"
    looks_for = (
        "attention with `qkv` and `proj` layers, `num_heads`, `query_stride`, `window_size` and `use_mask_unit_attn`"
    )
    ops = ("mask_unit_attention",)
    known = frozenset(
        ("num_heads", "query_stride", "hidden_size_output", "head_dim", "scale", "qkv", "proj", "window_size")
        + ("use_mask_unit_attn",)
    )

    def resembles(self, module):
        """Both layers and three of its settings."""
        return {"qkv", "proj"} <= module._modules.keys() and {
            "query_stride",
            "window_size",
            "use_mask_unit_attn",
        } <= vars(module).keys()

    def obstacle(self, module):
        """Settings of the wrong kind, or layers that do not fit them."""
        has = vars(module)
        for name in ("num_heads", "query_stride", "hidden_size_output", "head_dim", "window_size"):
            if not isinstance(has.get(name), int):
                return f"it has no integer attribute `{name}`"
        if not isinstance(has.get("scale"), (int, float)):
            return "it has no number `scale`"
        heads, channels = has["num_heads"], has["hidden_size_output"]
        if heads < 1 or heads * has["head_dim"] != channels:
            return f"num_heads = {heads} times head_dim = {has['head_dim']} is not hidden_size_output = {channels}"
        for name, fits in (("qkv", 3 * channels), ("proj", channels)):
            # Wrapped layers may hide their sizes, and are called, not read.
            size = getattr(module._modules[name], "out_features", fits)
            if size != fits:
                return f"its `{name}` maps to {size} channels where {fits} are expected"
        return None

    def probes(self, module, fresh):
        """Both kinds of attention, pooled and not, with two heads (one would hide how qkv is packed) and with ties."""
        dim, heads, head_dim = 6, 2, 8
        holds = {
            "num_heads": heads,
            "head_dim": head_dim,
            "hidden_size_output": heads * head_dim,
            # No default, and small: the original rounds its logits to 16 bits under autocast, and large ones far off.
            "scale": 0.05,
            "qkv": Affine(fresh, dim, 3 * heads * head_dim),
            "proj": Affine(fresh, heads * head_dim, heads * head_dim),
        }
        found = []
        for windowed, q_stride, window_size, tokens in (
            (True, 4, 3, 36),
            (True, 1, 4, 20),
            (False, 4, 5, 16),
            (False, 1, 0, 7),
        ):
            each = {**holds, "query_stride": q_stride, "window_size": window_size, "use_mask_unit_attn": windowed}
            name = f"{'mask units' if windowed else 'global'}{', pooled' if q_stride > 1 else ''}"
            x = fresh.constant(2, tokens, dim)
            found.append(Probe(name, each, (fresh.leaf(x),)))
            if q_stride > 1:
                groups = x.view(2, q_stride, -1, dim)
                tied = torch.cat([groups[:, :2], groups[:, :2]], dim=1).reshape(x.shape)
                found.append(Probe(f"{name}, ties", each, (fresh.leaf(tied),), {"output_attentions": False}))
        return found

    @staticmethod
    def applies(module, hidden_states, output_attentions=False):
        """Not where the attention matrix is asked for, which the op never has."""
        return not output_attentions

    @staticmethod
    def fused(module, hidden_states, output_attentions=False):
        """hidden_states [B, N, dim] -> ([B, N/query_stride, hidden_size_output], None), unrolled order."""
        stride = module.query_stride
        windows = hidden_states.shape[1] // (stride * module.window_size) if module.use_mask_unit_attn else 1
        out = mask_unit_attention(module.qkv(hidden_states), module.num_heads, windows, stride, module.scale)
        return module.proj(out), None


class EncoderReroll(RerollOrder):
    """`HieraEncoder.reroll(hidden_states, stage_idx, bool_masked_pos=None)`."""

    name = "transformers.HieraEncoder.reroll"
    looks_for = "an encoder with `stages`, a `schedule` for each of them, and a method `reroll`"
    method = "reroll"
    known = frozenset(("schedule",))

    def resembles(self, module):
        """The stages, the schedule and the method."""
        return (
            "stages" in module._modules
            and isinstance(vars(module).get("schedule"), dict)
            and hasattr(type(module), self.method)
        )

    def probes(self, module, fresh):
        """Images, all tokens and half of the mask units."""
        found = []
        for size, strides in GRIDS:
            if len(size) != 2:
                continue  # transformers has images only
            holds = {"schedule": {0: ([(1, 1)], [1, 1]), 2: (strides, size)}}
            tokens = size[0] * size[1]
            found.append(Probe(f"grid {size}", holds, (fresh(2, tokens, 3), 2)))
            unit = 1
            for step in strides:
                unit *= step[0] * step[1]
            mask = torch.ones(2, 3, dtype=torch.bool)
            found.append(Probe(f"grid {size}, masked", holds, (fresh(2, 3 * unit, 3), 2), {"bool_masked_pos": mask}))
        return found

    @staticmethod
    def fused(module, hidden_states, stage_idx, bool_masked_pos=None):
        """[B, N', C] as stage `stage_idx` returns it -> [B, *grid, C], with a mask [B, units, *unit_size, C]."""
        strides, grid = module.schedule[stage_idx]
        if bool_masked_pos is not None:
            # Where every stride has been pooled away, a mask unit is one token.
            return reroll_masked(hidden_states, strides if len(strides) else [(1,) * len(grid)])
        return reroll(hidden_states, grid, strides)


class ModelUnroll(Target):
    """`HieraModel.forward`, which calls a function `unroll` of its file: nothing that a subclass could replace."""

    name = "transformers.HieraModel"
    looks_for = "a model with `embeddings`, `encoder` and an `unroll_schedule`"
    ops = ("unroll",)

    def resembles(self, module):
        """The two parts, and the schedule by which the function is called."""
        return {"embeddings", "encoder"} <= module._modules.keys() and "unroll_schedule" in vars(module)

    def obstacle(self, module):
        """Always."""
        return "its `forward` orders tokens by a function of its file (`unroll`), which runs as it is"

    def probes(self, module, fresh):
        """None: the obstacle comes first."""
        return []

    @staticmethod
    def fused(module, *args, **kwargs):
        """Never called."""
        raise NotImplementedError


TARGETS = (TransformersAttention(), EncoderReroll(), ModelUnroll())

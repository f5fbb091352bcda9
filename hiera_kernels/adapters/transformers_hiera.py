"""Hugging Face's Hiera (transformers 5): attention, whole layers, and the encoder's `reroll`.

Source: transformers 5.23, `models/hiera/modeling_hiera.py` (HieraMaskUnitAttention, HieraLayer, HieraEncoder.reroll).
Recognised by attributes, so vendored and renamed copies count.
"""

import torch

from hiera_kernels.adapters import transformers_parts
from hiera_kernels.adapters.hiera_transformer import GRIDS, RerollOrder
from hiera_kernels.adapters.sam2_parts import Drop, Mixer, Norm
from hiera_kernels.block_pass import run
from hiera_kernels.fused_block import FusedBlock, MlpLayers, Parts, attended
from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.ops.token_order import reroll, reroll_masked
from hiera_kernels.recognise import Target


def _is_counted(x):
    """Whether the number of tokens is known, be it as a symbol.

    While a masked autoencoder is compiled, how many tokens its mask keeps is known to the device alone. The original
    forwards can be traced so; the ops, which ask whether windows fit, cannot.
    """
    if not torch.compiler.is_compiling():
        return True
    # Here, for the half second that its sympy takes to load; who compiles has loaded it.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(x.shape[1] >= 1) or guard_or_false(x.shape[1] < 1)


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
        return not output_attentions and _is_counted(hidden_states)

    @staticmethod
    def fused(module, hidden_states, output_attentions=False):
        """hidden_states [B, N, dim] -> ([B, N/query_stride, hidden_size_output], None), unrolled order."""
        return module.proj(_attended(module, module.qkv(hidden_states), None)), None


def _attended(attn, qkv, bias):
    stride = attn.query_stride
    windows = qkv.shape[1] // (stride * attn.window_size) if attn.use_mask_unit_attn else 1
    return attended(qkv, bias, attn.num_heads, windows, stride, attn.scale)


class Layer(FusedBlock):
    """`HieraLayer.forward`, which returns a pair: the tokens, and the attention matrix or None."""

    name = "transformers.HieraLayer"
    looks_for = "a layer with `layernorm_before`, `attn`, `layernorm_after`, `mlp`, `drop_path` and `query_stride`"
    known = frozenset(
        ("hidden_size", "hidden_size_output", "query_stride", "layernorm_before", "attn", "layernorm_after", "mlp")
        + ("drop_path", "proj")
    )
    mlp_class = transformers_parts.MLP
    drop_class = transformers_parts.DROP_PATH

    def resembles(self, module):
        """Its submodules and sizes, and mask-unit attention."""
        return (
            {"layernorm_before", "attn", "layernorm_after", "mlp", "drop_path"} <= module._modules.keys()
            and {"hidden_size", "hidden_size_output", "query_stride"} <= vars(module).keys()
            and "use_mask_unit_attn" in vars(module.attn)
        )

    def obstacle(self, module):
        """Sizes of the wrong kind, and a projection that is missing."""
        has = vars(module)
        for name in ("hidden_size", "hidden_size_output", "query_stride"):
            if not isinstance(has[name], int):
                return f"its `{name}` is no integer: {has[name]!r}"
        if has["hidden_size"] != has["hidden_size_output"] and "proj" not in module._modules:
            return "it has no `proj` although its channels change"
        return None

    def probes(self, module, fresh):
        """Channels that stay and that change, pooled and not, with ties where it pools."""
        found = []
        for dim_out, stride in ((4, 1), (8, 1), (8, 2)):
            holds = {
                "hidden_size": 4,
                "hidden_size_output": dim_out,
                "query_stride": stride,
                "layernorm_before": Norm(fresh, 4),
                "attn": _Attention(fresh, 4, dim_out, stride),
                "layernorm_after": Norm(fresh, dim_out),
                "mlp": Mixer(fresh, dim_out, dim_out),
                "drop_path": Drop(),
                "proj": Affine(fresh, 4, dim_out),
            }
            name = f"4 to {dim_out} channels, stride {stride}"
            x = fresh.constant(3, 6 * stride, 4)
            found.append(Probe(name, holds, (fresh.leaf(x),)))
            if stride > 1:
                tied = fresh.leaf(x[:, :6].repeat(1, stride, 1))
                found.append(Probe(f"{name}, ties", holds, (tied,), {"output_attentions": False}))
        return found

    @staticmethod
    def parts(block):
        """By their names; one drop path serves both branches."""
        attn = block.attn
        return Parts(
            norm1=block.layernorm_before,
            attn=attn,
            qkv=getattr(attn, "qkv", None),
            proj=getattr(attn, "proj", None),
            norm2=block.layernorm_after,
            mlp=block.mlp,
            drop1=block.drop_path,
            drop2=block.drop_path,
            shortcut=block.proj if block.hidden_size != block.hidden_size_output else None,
        )

    @staticmethod
    def attend(block, normed):
        """The first of the pair that its attention returns."""
        return block.attn(normed, output_attentions=False)[0]

    @staticmethod
    def core(block, qkv, bias):
        """Mask-unit attention; qkv [B, N, 3*C'] -> [B, N/query_stride, C']."""
        return _attended(block.attn, qkv, bias)

    @staticmethod
    def rides(block):
        """By the op."""
        return True

    @staticmethod
    def keeps_tokens(block):
        """Where the channels stay the same."""
        return block.hidden_size == block.hidden_size_output

    @staticmethod
    def shortcut(block, x, normed):
        """The max-pooled projection of the first norm's output, where the channels change."""
        if block.hidden_size == block.hidden_size_output:
            return x
        return normed.linear_q_pool(block.proj, block.query_stride, "first")

    @staticmethod
    def mlp_layers(mlp):
        """As transformers names them."""
        return MlpLayers(mlp.fc1, mlp.activation_fn, mlp.fc2)

    is_gelu = staticmethod(transformers_parts.is_gelu)
    drop_scale = staticmethod(transformers_parts.drop_scale)

    @staticmethod
    def applies(module, hidden_states, output_attentions=False):
        """Not where the attention matrix is asked for."""
        return not output_attentions and _is_counted(hidden_states) and FusedBlock.applies(module, hidden_states)

    @staticmethod
    def fused(module, hidden_states, output_attentions=False):
        """hidden_states [B, N, hidden_size] -> ([B, N/query_stride, hidden_size_output], None), unrolled order."""
        return run(LAYER, module, hidden_states), None


class _Attention(Affine):
    """Stands in for attention that pools and returns a pair."""

    def __init__(self, fresh, dim, dim_out, stride):
        super().__init__(fresh, dim, dim_out)
        self.stride = stride

    def __call__(self, x, output_attentions):
        mixed = torch.sin(super().__call__(x.cumsum(1)))
        return mixed.unflatten(1, (self.stride, -1)).mean(dim=1), None


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
    def applies(module, hidden_states, stage_idx, bool_masked_pos=None):
        """As the layers."""
        return _is_counted(hidden_states)

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


LAYER = Layer()
TARGETS = (LAYER, TransformersAttention(), EncoderReroll(), ModelUnroll())

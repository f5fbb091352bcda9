"""A whole transformer block as one function over named parts: what every family's block adapter has in common.

An adapter derives from :class:`FusedBlock` and says which submodule plays which part (`parts`), how its attention is
called as the original calls it (`attend`), and which op stands between the attention's two linear layers (`core`).
Where a stage changes, it also says how the shortcut pools (`shortcut`). The rest is the same for all (block_pass.py):
who is read and who is called, in which dtype a LayerNorm is written, which pass sums which bias's gradient, drop path,
recomputation, and the hand-over of the next block's first LayerNorm (hand_over.py). An example is
hiera_kernels/adapters/hiera_block.py.

Every part is read only while reading it is the same as calling it (plain_modules.py), and called otherwise: a block
with a hook on its `norm2` or LoRA in its MLP keeps the fused rest. Where no kernel serves, plain operations run in the
order of the original.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hiera_kernels import hand_over
from hiera_kernels.block_classes import DROP_PATH, LAYER_SCALE, MLP, known_class, timm_drop_scale
from hiera_kernels.block_plan import ATTRIBUTE, plan_of
from hiera_kernels.ops import calling
from hiera_kernels.ops.attention import mask_unit_attention
from hiera_kernels.ops.attention import refusal as attention_refusal
from hiera_kernels.ops.normed_linear import linear_of_normed
from hiera_kernels.ops.pooling import q_pool
from hiera_kernels.ops.shortcut import linear_q_pool
from hiera_kernels.plain_modules import is_erf_gelu, is_heard, is_plain, is_readable_linear, is_readable_norm
from hiera_kernels.recognise import Target

_ATTENTION = torch.ops.hiera_kernels.mask_unit_attention.default


class Parts(NamedTuple):
    """The submodules of a block, under one name in every family.

    Attributes:
        norm1: LayerNorm before attention and, where the block projects its shortcut, before that.
        attn: The attention module. Its `qkv` and `proj` are read while it is swapped itself and nothing listens to it.
        qkv, proj: Its two linear layers.
        norm2: LayerNorm before the MLP.
        mlp: The MLP.
        drop1, drop2: Drop path of the two branches, or None; often one module.
        scale1, scale2: LayerScale of the two branches, or None (Identity counts as None).
        shortcut: The linear layer of a block that changes the channels, or None.
    """

    norm1: nn.Module
    attn: nn.Module
    qkv: nn.Module
    proj: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop1: nn.Module | None = None
    drop2: nn.Module | None = None
    scale1: nn.Module | None = None
    scale2: nn.Module | None = None
    shortcut: nn.Module | None = None


class MlpLayers(NamedTuple):
    """What an MLP is made of; `inert` is what has to be off (dropout) or an Identity for it to be read."""

    fc1: nn.Module
    act: nn.Module
    fc2: nn.Module
    inert: tuple[nn.Module | None, ...] = ()


class Normed(NamedTuple):
    """A LayerNorm's output and, where a kernel made it, what it can be made from again."""

    tokens: torch.Tensor
    of: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    norm: nn.Module | None = None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`F.linear`, which where it can does not keep its input for the backward."""
        if self.mean is None:
            return F.linear(self.tokens, weight, bias)
        parameters = (self.norm.weight, self.norm.bias)
        return linear_of_normed(self.tokens, self.of, self.mean, self.rstd, *parameters, weight, bias)

    def linear_q_pool(self, layer: nn.Module, stride: int, ties: str) -> torch.Tensor:
        """A linear layer [B, N, C] -> [B, N, C'], read or called, and max-pooling over the leading stride."""
        if is_readable_linear(layer):
            return linear_q_pool(self.tokens, layer.weight, layer.bias, stride, ties)
        return q_pool(layer(self.tokens), stride, ties)


def attended(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    num_heads: int,
    num_windows: int,
    q_stride: int,
    scale: float | None = None,
    ties: str = "first",
) -> torch.Tensor:
    """`mask_unit_attention`, for the `core` of a block: with the gradient of `bias`, which `qkv` holds already."""
    if bias is None:
        return mask_unit_attention(qkv, num_heads, num_windows, q_stride, scale, ties)
    if attention_refusal(qkv, num_heads, num_windows, q_stride) is None and not calling.autocast_dtype(qkv):
        return _ATTENTION(qkv, num_heads, num_windows, q_stride, scale, ties, bias)[0]
    return mask_unit_attention(hand_over.carried(qkv, bias), num_heads, num_windows, q_stride, scale, ties)


class FusedBlock(Target):
    """What an adapter of a family's block says, besides what every target says (`resembles`, `obstacle`, `probes`).

    `fused(block, x)` usually is ``return block_pass.run(TARGET, block, x)``. The look-alikes of `probes` hold
    stand-ins, which are called: they show that the wiring of the original is the one that `run` has. Whether an MLP, a
    drop path or a LayerScale is what it seems is asked of its class, once, by `mlp_class`, `drop_class`, `scale_class`.
    """

    ops = ("add_layer_norm", "gelu", "linear_q_pool", "mask_unit_attention")
    mlp_class: Target = MLP
    drop_class: Target = DROP_PATH
    scale_class: Target = LAYER_SCALE

    @staticmethod
    def parts(block: nn.Module) -> Parts:
        """The submodules of this block."""
        raise NotImplementedError

    @staticmethod
    def attend(block: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Attention as the original block has it, by calling `attn`; normed [B, ..., C] -> [B, ..., C']."""
        return block.attn(normed)

    @staticmethod
    def core(block: nn.Module, qkv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What lies between `qkv` and `proj`; `qkv` [B, ..., 3*C'] -> [B, ..., C'].

        `bias` [3*C'] is None unless `rides` says otherwise. Then `qkv` was made with it detached, and it is to receive
        its gradient from here, as `attended` gives it.
        """
        raise NotImplementedError

    @staticmethod
    def rides(block: nn.Module) -> bool:
        """Whether `core` gives a `bias` its gradient, which spares a pass over that of `qkv`."""
        return False

    @staticmethod
    def keeps_tokens(block: nn.Module) -> bool:
        """Whether `shortcut` gives `x` back as it is."""
        return False

    @staticmethod
    def shortcut(block: nn.Module, x: torch.Tensor, normed: Normed) -> torch.Tensor:
        """The shortcut [B, ..., C']; of `x` [B, ..., C] where no stage changes, else of that or of its norm1."""
        return x

    @staticmethod
    def mlp_layers(mlp: nn.Module) -> MlpLayers:
        """The layers of an MLP of a class that `mlp_class` knows."""
        inert = tuple(mlp._modules.get(name) for name in ("drop1", "norm", "drop2"))
        return MlpLayers(mlp.fc1, mlp.act, mlp.fc2, inert)

    @staticmethod
    def is_gelu(act: nn.Module) -> bool:
        """Whether `act` is GELU by the error function and may be read."""
        return is_erf_gelu(act)

    @staticmethod
    def drop_scale(drop: nn.Module, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The factor of each sample [B], drawn exactly as `drop` draws for a branch of that `dtype`; None: nothing."""
        return timm_drop_scale(drop, branch, dtype)

    @staticmethod
    def applies(block: nn.Module, x: torch.Tensor) -> bool:
        """Not for tensors that wrap others (DTensor), nor for those without data, of which autocast knows nothing."""
        return not x.is_meta and not calling.is_foreign(x)

    def arrived(self, module):
        """Judge the classes of its parts, and take its place among its like."""
        plan, parts = plan_of(module), self.parts(module)
        plan = replace(
            plan,
            mlp=known_class(parts.mlp, self.mlp_class),
            drop=known_class(parts.drop1, self.drop_class) or known_class(parts.drop2, self.drop_class),
            scale=known_class(parts.scale1, self.scale_class) or known_class(parts.scale2, self.scale_class),
        )
        vars(module)[ATTRIBUTE] = plan
        if plan.chain is not None:
            plan.chain.enter(plan.place, module)

    def released(self, module):
        """Without a plan."""
        vars(module).pop(ATTRIBUTE, None)

    def note(self, module):
        """The settings, and what is called and not read."""
        plan = plan_of(module)
        called = self.called(module)
        words = f"recompute={plan.recompute!r}, drop_path={plan.drop_path!r}"
        return f"{words}; called and not read: {', '.join(called)}" if called else words

    def called(self, module: nn.Module) -> list[str]:
        """The parts that would be called now, and not read; the same before `accelerate` and after it."""
        parts = self.parts(module)
        linears = is_readable_linear(parts.qkv) and is_readable_linear(parts.proj)
        read = {
            "norm1": is_readable_norm(parts.norm1),
            "attention": linears and not is_heard(parts.attn),
            "shortcut": parts.shortcut is None or is_readable_linear(parts.shortcut),
            "norm2": is_readable_norm(parts.norm2),
            "MLP": self._reads_mlp(parts.mlp),
            "drop path": all(self._reads(each, self.drop_class) for each in (parts.drop1, parts.drop2)),
            "layer scale": all(self._reads(each, self.scale_class) for each in (parts.scale1, parts.scale2)),
        }
        return [name for name, yes in read.items() if not yes]

    def _reads_mlp(self, mlp):
        if known_class(mlp, self.mlp_class) is None or is_heard(mlp):
            return False
        layers = self.mlp_layers(mlp)
        return is_readable_linear(layers.fc1) and is_readable_linear(layers.fc2) and self.is_gelu(layers.act)

    @staticmethod
    def _reads(module, target):
        if module is None or is_plain(module, nn.Identity):
            return True
        return known_class(module, target) is not None and not is_heard(module)

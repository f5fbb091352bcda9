"""The small classes inside a block whose numbers a fused block takes over: MLP, drop path, LayerScale.

They are no targets of `accelerate`: nothing of them is swapped. But a block that does their work itself has to know
that they do what their names say, which is found out as for every target: by settings, by code, and by numbers on
look-alikes (recognise.py).

Source: `Mlp`, `DropPath`, `LayerScale` of timm (hiera-transformer 0.1.4 imports the first two; `hiera/block.py` has its
own).
"""

import torch
from torch import nn

from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.recognise import Target, refusal


class MlpClass(Target):
    """``fc2(act(fc1(x)))``, with dropouts and a norm between them that are not there in Hiera."""

    name = "Mlp"
    looks_for = "an MLP with `fc1`, `act` and `fc2`"
    ops = ("gelu",)
    activation = "act"
    known = frozenset(("fc1", "act", "fc2", "drop1", "norm", "drop2"))

    def resembles(self, module):
        """The three layers."""
        return {"fc1", self.activation, "fc2"} <= module._modules.keys()

    def obstacle(self, module):
        """None beyond what it resembles."""
        return None if self.resembles(module) else f"it has no `fc1`, `{self.activation}` and `fc2`"

    def probes(self, module, fresh):
        """With an activation that is far from linear, so that what comes first shows."""
        layers = {"fc1": Affine(fresh, 4, 6), self.activation: torch.sin, "fc2": Affine(fresh, 6, 4)}
        rest = dict.fromkeys(("drop1", "norm", "drop2"), _same)
        return [Probe("tokens", {**layers, **rest}, (fresh(2, 5, 4),))]

    @staticmethod
    def fused(module, x):
        """x [..., C] -> [..., C]."""
        return module.fc2(module.act(module.fc1(x)))


class DropPathClass(Target):
    """timm's: one Bernoulli number a sample, in the dtype of the branch."""

    name = "DropPath"
    looks_for = "drop path with `drop_prob` and `scale_by_keep`"
    ops = ("add_layer_norm",)
    known = frozenset(("drop_prob", "scale_by_keep"))

    def resembles(self, module):
        """Both settings."""
        return self.known <= vars(module).keys()

    def obstacle(self, module):
        """Settings of the wrong kind."""
        if not self.resembles(module) or not isinstance(vars(module)["drop_prob"], (int, float)):
            return "it has no number `drop_prob` and no `scale_by_keep`"
        return None

    def probes(self, module, fresh):
        """Some samples dropped, with and without scaling; none; all."""
        return [
            Probe(f"rate {rate}, scaled {scaled}", {"drop_prob": rate, "scale_by_keep": scaled}, (fresh(9, 3, 2),))
            for rate, scaled in ((0.4, True), (0.4, False), (0.0, True), (1.0, True))
        ]

    @staticmethod
    def fused(module, x):
        """x [B, ..., C] -> [B, ..., C]."""
        scale = timm_drop_scale(module, x, x.dtype)
        return x if scale is None else x * scale.view(-1, *[1] * (x.ndim - 1))


class LayerScaleClass(Target):
    """``x * gamma``."""

    name = "LayerScale"
    looks_for = "a factor per channel `gamma`"
    ops = ("add_layer_norm",)
    known = frozenset(("gamma", "inplace"))

    def resembles(self, module):
        """The parameter."""
        return "gamma" in module._parameters

    def obstacle(self, module):
        """None beyond what it resembles."""
        return None if self.resembles(module) else "it has no parameter `gamma`"

    def probes(self, module, fresh):
        """As it is while it works out of place."""
        return [Probe("tokens", {"gamma": fresh(4), "inplace": False}, (fresh(2, 5, 4),))]

    @staticmethod
    def fused(module, x):
        """x [..., C] -> [..., C]."""
        return x * module.gamma


def timm_drop_scale(drop: nn.Module, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The factor [B] that timm's `DropPath` draws for `branch` [B, ..., C] if that has `dtype`; None where it does not.

    Equivalent to: ``branch.to(dtype).new_empty((B, 1, ..., 1)).bernoulli_(1 - p).div_(1 - p)``.
    """
    if drop.drop_prob == 0.0 or not drop.training:
        return None
    keep = 1 - drop.drop_prob
    scale = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop.scale_by_keep:
        scale.div_(keep)
    return scale.view(-1)


def known_class(module: nn.Module | None, target: Target) -> type | None:
    """The class of `module` if its numbers are those that `target` says, else None; None for an Identity too."""
    if module is None or type(module) is nn.Identity or not target.resembles(module):
        return None
    return type(module) if refusal(module, target) is None else None


def _same(x):
    return x


MLP, DROP_PATH, LAYER_SCALE = MlpClass(), DropPathClass(), LayerScaleClass()

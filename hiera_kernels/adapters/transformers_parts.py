"""The small classes inside transformers' blocks whose numbers a fused block takes over: MLP, GELU, drop path.

Source: transformers 5.23, `models/hiera/modeling_hiera.py` (HieraMlp, HieraDropPath), `models/sam2/modeling_sam2.py`
(Sam2FeedForward), `activations.py` (GELUActivation).
"""

import torch
import torch.nn.functional as F

from hiera_kernels.block_classes import MlpClass
from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.plain_modules import is_erf_gelu, is_heard
from hiera_kernels.recognise import Target, refusal


class ActivationClass(Target):
    """``self.act(x)``, for whatever function `act` is."""

    name = "GELUActivation"
    looks_for = "an activation with a function `act`"
    ops = ("gelu",)
    known = frozenset(("act",))

    def resembles(self, module):
        """The function."""
        return callable(vars(module).get("act"))

    def obstacle(self, module):
        """None beyond what it resembles."""
        return None if self.resembles(module) else "it has no function `act`"

    def probes(self, module, fresh):
        """With a function that is not the usual one."""
        return [Probe("tokens", {"act": torch.sin}, (fresh(2, 5, 4),))]

    @staticmethod
    def fused(module, input):
        """input [..., C] -> [..., C]."""
        return module.act(input)


_ACTIVATION = ActivationClass()
# Classes of activations that call `act` and do nothing else.
_CALLERS: set[type] = set()


def is_gelu(act) -> bool:
    """Whether a call of `act` is `F.gelu(x)`, by the error function: PyTorch's module, or transformers'."""
    if is_erf_gelu(act):
        return True
    return type(act) in _CALLERS and vars(act).get("act") is F.gelu and not is_heard(act)


def _judge_activation(act) -> None:
    if _ACTIVATION.resembles(act) and refusal(act, _ACTIVATION) is None:
        _CALLERS.add(type(act))


class TransformersMlp(MlpClass):
    """`HieraMlp`: ``fc2(activation_fn(fc1(x)))``."""

    name = "transformers.HieraMlp"
    looks_for = "an MLP with `fc1`, `activation_fn` and `fc2`"
    activation = "activation_fn"
    known = frozenset(("fc1", "activation_fn", "fc2"))

    def obstacle(self, module):
        """None beyond what it resembles; its activation's class is judged on the way."""
        _judge_activation(module._modules["activation_fn"]) if self.resembles(module) else None
        return super().obstacle(module)

    @staticmethod
    def fused(module, hidden_states):
        """hidden_states [..., C] -> [..., C]."""
        return module.fc2(module.activation_fn(module.fc1(hidden_states)))


class FeedForward(Target):
    """`Sam2FeedForward` of two layers: ``proj_out(activation(proj_in(x)))``."""

    name = "transformers.Sam2FeedForward"
    looks_for = "an MLP with `proj_in`, `activation`, `layers` and `proj_out`"
    ops = ("gelu",)
    known = frozenset(("proj_in", "activation", "layers", "proj_out", "sigmoid_output"))

    def resembles(self, module):
        """The layers."""
        return {"proj_in", "activation", "layers", "proj_out"} <= module._modules.keys()

    def obstacle(self, module):
        """More than two layers, or a sigmoid at the end."""
        if not self.resembles(module):
            return "it has no `proj_in`, `activation`, `layers` and `proj_out`"
        _judge_activation(module._modules["activation"])
        return None if is_two_layers(module) else "it has more than two layers, or a sigmoid at its end"

    def probes(self, module, fresh):
        """With an activation that is far from linear."""
        layers = {"proj_in": Affine(fresh, 4, 6), "activation": torch.sin, "proj_out": Affine(fresh, 6, 4)}
        return [Probe("tokens", {**layers, "layers": [], "sigmoid_output": False}, (fresh(2, 5, 4),))]

    @staticmethod
    def fused(module, hidden_states):
        """hidden_states [..., C] -> [..., C]."""
        return module.proj_out(module.activation(module.proj_in(hidden_states)))


def is_two_layers(mlp) -> bool:
    """Whether nothing lies between the first layer and the last, and nothing follows; asked at every call."""
    return len(mlp.layers) == 0 and not mlp.sigmoid_output


class DropPath(Target):
    """`HieraDropPath`: one uniform number a sample, rounded down after the rate of keeping is added."""

    name = "transformers.HieraDropPath"
    looks_for = "drop path with `drop_prob`"
    ops = ("add_layer_norm",)
    known = frozenset(("drop_prob",))

    def resembles(self, module):
        """The rate."""
        return isinstance(vars(module).get("drop_prob"), (int, float))

    def obstacle(self, module):
        """None beyond what it resembles."""
        return None if self.resembles(module) else "it has no number `drop_prob`"

    def probes(self, module, fresh):
        """Some samples dropped, and none."""
        return [Probe(f"rate {rate}", {"drop_prob": rate}, (fresh(9, 3, 2),)) for rate in (0.4, 0.0)]

    @staticmethod
    def fused(module, hidden_states):
        """hidden_states [B, ..., C] -> [B, ..., C]."""
        scale = drop_scale(module, hidden_states, hidden_states.dtype)
        return hidden_states if scale is None else hidden_states * scale.view(-1, *[1] * (hidden_states.ndim - 1))


def drop_scale(drop, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The factor [B] that transformers' drop path draws for `branch` [B, ..., C] of that `dtype`; None if it is off.

    Equivalent to: ``floor(rand(B, 1, ..., 1) + (1 - p)) / (1 - p)``.
    """
    if drop.drop_prob == 0.0 or not drop.training:
        return None
    keep = 1 - drop.drop_prob
    drawn = torch.rand((branch.shape[0],) + (1,) * (branch.ndim - 1), dtype=dtype, device=branch.device)
    return torch.floor(drawn + keep).div(keep).view(-1)


MLP, FEED_FORWARD, DROP_PATH = TransformersMlp(), FeedForward(), DropPath()

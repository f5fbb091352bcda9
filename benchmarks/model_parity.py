"""Is a rival the same computation as stock? Asked before it is timed, with stock's weights, in the timing's precision.

The law: the relative RMS error of every output and every gradient against stock in fp64. Its median over tensors may be
at most twice stock's own in the same precision, and no single tensor's may pass what rounding can make of it (a
rounding may change the winner of a max-pooling, and so a row of a gradient; a wrong gradient is off by its own size).
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.workloads import Workload

# timm's names of what stock calls otherwise.
RENAMED = {"head.fc.": "head.projection.", "head.norm.": "norm."}


@dataclass(frozen=True)
class Verdict:
    """`ok`, and the numbers that it rests on: errors against fp64, of stock and of the rival."""

    ok: bool
    stock_median: float
    rival_median: float
    worst: float
    worst_tensor: str
    allowed_median: float
    allowed_worst: float

    def __str__(self) -> str:
        return (
            f"{'green' if self.ok else 'RED'}: median error {self.rival_median:.1e} (stock {self.stock_median:.1e}, "
            f"allowed {self.allowed_median:.1e}), worst {self.worst:.1e} in {self.worst_tensor} "
            f"(allowed {self.allowed_worst:.1e})"
        )


def reading(workload: Workload, model: nn.Module, inputs: tuple, autocast: Callable, seed: int = 0) -> dict:
    """Outputs, loss and gradients of one step, by stock's names, detached; the model's gradients are left as None."""
    torch.manual_seed(seed)
    found = {}
    with torch.set_grad_enabled(workload.training), autocast():
        outputs = workload.outputs(model, inputs[0])
        loss = workload.loss(outputs, inputs[1] if len(inputs) > 1 else None) if workload.training else None
    found |= {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if loss is not None:
        loss.backward()
        found["loss"] = loss.detach()
        for name, parameter in model.named_parameters():
            name = name.removeprefix("_orig_mod.")
            for theirs, stock in RENAMED.items():
                name = stock + name[len(theirs) :] if name.startswith(theirs) else name
            if parameter.grad is not None:
                found[f"gradient {name}"] = parameter.grad
        model.zero_grad(set_to_none=True)
    return found


class Judge:
    """Holds stock's step in fp64 and in the precision of the timing; judges rivals against them.

    Args:
        stock: the model, on its device; it is left as it was.
        inputs: a small batch in fp32.
        autocast: makes the context of the precision.
        cast: dtype of the weights and images in that precision, fp32 or bf16.
    """

    def __init__(self, workload: Workload, stock: nn.Module, inputs: tuple, autocast: Callable, cast: torch.dtype):
        self.workload, self.autocast = workload, autocast
        self.inputs = (inputs[0].to(cast), *inputs[1:])
        exact = without_drop_path(copy.deepcopy(stock).double())
        device = inputs[0].device.type
        self.truth = reading(
            workload, exact, (inputs[0].double(), *inputs[1:]), lambda: torch.autocast(device, enabled=False)
        )
        del exact
        self.own = self._errors(reading(workload, without_drop_path(copy.deepcopy(stock)), self.inputs, autocast))
        bf16, fp16 = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float16).eps
        low = {torch.bfloat16: bf16, torch.float16: fp16}
        with autocast():
            active = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else cast
        self.eps = low.get(active, 2**-11 if tf32_allowed() else torch.finfo(torch.float32).eps)

    def __call__(self, rival: nn.Module) -> Verdict:
        """Judge a rival with the same weights; it is left as it was."""
        return self.verdict(
            self._errors(reading(self.workload, without_drop_path(copy.deepcopy(rival)), self.inputs, self.autocast))
        )

    def verdict(self, errors: dict[str, float]) -> Verdict:
        """The law, applied to a rival's errors by tensor."""
        own = statistics.median(self.own.values())
        median = statistics.median(errors.values()) if errors else float("inf")
        name = max(errors, key=errors.get, default="(nothing in common with stock)")
        worst = errors.get(name, float("inf"))
        allowed = 2 * own + self.eps
        allowed_worst = max(3 * max(self.own.values()), min(4 * self.eps**0.5, 0.4))
        missing = self.own.keys() - errors.keys()
        if missing:
            name, worst = f"{min(missing)} (missing)", float("inf")
        return Verdict(median <= allowed and worst <= allowed_worst, own, median, worst, name, allowed, allowed_worst)

    def _errors(self, values: dict) -> dict[str, float]:
        return {name: relative(values[name], truth) for name, truth in self.truth.items() if name in values}


def same_as_eager(eager: dict, other: dict, judge: Judge) -> bool:
    """Whether a compiled step gave what the eager one gave, up to three times stock's errors in this precision."""
    if eager.keys() != other.keys():
        return False
    errors = [relative(other[name], value) for name, value in eager.items()]
    own = statistics.median(judge.own.values())
    reach = max(3 * max(judge.own.values()), min(4 * judge.eps**0.5, 0.4))
    return statistics.median(errors) <= 3 * own + judge.eps and max(errors) <= reach


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over RMS of the truth; infinite where one is not finite and the other is."""
    value, truth = value.double(), truth.double()
    if value.shape != truth.shape:
        return float("inf")
    if torch.equal(value, truth):
        return 0.0
    error = ((value - truth).square().mean() / truth.square().mean()).sqrt().item()
    return error if error == error else float("inf")


def without_drop_path(model: nn.Module) -> nn.Module:
    """The model with every rate of stochastic depth at 0, in place: the draws depend on the dtype."""
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def tf32_allowed() -> bool:
    """Whether fp32 products may be made of TF32 factors, whichever switch the user has set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"

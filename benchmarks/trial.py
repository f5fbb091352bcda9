"""What one micro-benchmark compares: an op at a shape, its rivals, its oracle, the bytes it has to move.

To add an op, write a function that returns a `Trial` and name it, with its shapes, in the `OPS` of its family
(token_order.py, attention.py, rows.py); `benchmarks.ops` finds it there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import parity

OURS, CLONE = "hiera_kernels", "clone"
PASSES = ("forward", "backward", "both")


@dataclass
class Trial:
    """An op at a shape on a device.

    Attributes:
        make: Makes one set of random inputs; those that want a gradient require it.
        candidates: Functions of the inputs, ours first; each returns a tensor or a tuple of them.
        oracle: The same function in plain PyTorch, shared with no candidate; it is given fp64 inputs.
        bytes: What has to move at least, in a `forward`, and in a `backward` where there is one.
        exact: Nothing is computed in the forward, or rounded once: not a bit may differ.
        per_sample: Every image of every input and result is independent of the others: the oracle sees the first and
            the last only.
        probe: Makes the inputs that are compared instead of `make`'s, where rounding decides between two right answers.
        probe_grad: Makes the gradient of a result, of its shape and dtype, in that comparison.
        tf32: The candidates may multiply fp32 by TF32.
    """

    make: Callable[[], tuple]
    candidates: dict[str, Callable]
    oracle: Callable
    bytes: dict[str, int]
    exact: bool = False
    per_sample: bool = False
    probe: Callable[[], tuple] | None = None
    probe_grad: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like
    tf32: bool = False

    def bytes_of(self, name: str) -> int:
        """Bytes of a pass; "both" is the sum."""
        return sum(self.bytes.values()) if name == "both" else self.bytes[name]


@dataclass(frozen=True)
class Case:
    """A table of the benchmark: an op at a named shape. `build` makes its Trial on a device."""

    op: str
    shape: str
    batch: int
    dtype: torch.dtype
    build: Callable[[torch.device], Trial] = field(compare=False)
    note: str = ""

    @property
    def label(self) -> str:
        """Shape, batch and dtype, as the tables print them."""
        return f"{self.shape} b{self.batch} {str(self.dtype).removeprefix('torch.')}" + (self.note and f" {self.note}")


def leaves_of(inputs: tuple) -> list[torch.Tensor]:
    """The inputs that want a gradient."""
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def narrowest(inputs: tuple) -> torch.dtype:
    """The dtype with the coarsest steps among the inputs."""
    dtypes = [x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def differentiable(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results that a gradient can come from."""
    return [x for x in outputs if x.requires_grad]


def first_line(error: BaseException) -> str:
    """An exception in one line of a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def verdicts(trial: Trial, passes: tuple[str, ...]) -> dict[str, dict[str, tuple[str, str | None]]]:
    """For each candidate and each of "forward" and "backward": (parity, error). All on one set of inputs.

    A candidate that raises has the parity "not compared", and its error says why.
    """
    inputs = (trial.probe or trial.make)()
    wants_grad = any(name != "forward" for name in passes) and bool(leaves_of(inputs))
    truth, grads, truth_grads = _oracle(trial, inputs, wants_grad)
    leaves, found = leaves_of(inputs), {}

    def answer(compute: Callable, wanted: list, exact: bool) -> tuple[str, str | None]:
        try:
            parity.spoil(*compute())
            return parity.judge(_seen(trial, compute()[0]), wanted, narrowest(inputs), exact, trial.tf32), None
        except Exception as error:
            return "not compared", first_line(error)

    for name, function in trial.candidates.items():

        def forward(function=function):
            with torch.no_grad():
                return parity.flat(function(*inputs)), inputs

        def backward(function=function):
            outputs = differentiable(parity.flat(function(*inputs)))
            gave = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
            return torch.autograd.grad(outputs, leaves, gave), (*inputs, *gave, *grads, *outputs)

        found[name] = {"forward": answer(forward, truth, trial.exact)}
        if wants_grad:
            found[name]["backward"] = answer(backward, truth_grads, False)
    return found


def _seen(trial: Trial, tensors) -> list[torch.Tensor]:
    return [x[[0, -1]] for x in tensors] if trial.per_sample else list(tensors)


def _oracle(trial: Trial, inputs: tuple, wants_grad: bool):
    """Results in fp64, gradients given to them (at full batch), and gradients of the inputs in fp64."""
    doubled = []
    for x in inputs:
        if isinstance(x, torch.Tensor):
            seen = x.detach()[[0, -1]] if trial.per_sample else x.detach()
            x = (seen.double() if x.is_floating_point() else seen).requires_grad_(x.requires_grad)
        doubled.append(x)
    with torch.set_grad_enabled(wants_grad):
        outputs = parity.flat(trial.oracle(*doubled))
    truth = [x.detach() for x in outputs]
    if not wants_grad:
        return truth, None, None
    batch = next(x.shape[0] for x in inputs if isinstance(x, torch.Tensor))
    dtype = narrowest(inputs)
    outputs, grads = differentiable(outputs), []
    for x in outputs:
        # Numbers that every result's dtype holds exactly, so that all candidates start from the same.
        shape = (batch, *x.shape[1:]) if trial.per_sample else x.shape
        grads.append(trial.probe_grad(torch.empty(shape, dtype=dtype, device=x.device)))
    given = [g.double() for g in _seen(trial, grads)]
    return truth, grads, [g.detach() for g in torch.autograd.grad(outputs, leaves_of(tuple(doubled)), given)]

"""`check`: one training step of the caller's own model, plain and accelerated, side by side."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hiera_kernels.lookalike import tensors_in
from hiera_kernels.measure import GRADIENT, TrainingStep, nearby_batch, random_numbers_kept, step_bytes, step_seconds
from hiera_kernels.report import Report
from hiera_kernels.swap import accelerate, restore


def _rounding_reach(step: float) -> float:
    """The largest relative RMS difference that rounding, step by step, may make of one computation.

    Far above one rounding step, because max-pooling amplifies where it changes the winner; and below 0.4, because a
    wrong gradient is off by about its own size.
    """
    return min(4 * step**0.5, 0.4)


@dataclass(frozen=True)
class Row:
    """One tensor: relative RMS errors against fp64, or of the accelerated model against stock where `stock` is None."""

    name: str
    stock: float | None
    accelerated: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is finite and within what is allowed."""
        return self.accelerated <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """What :func:`check` found; `print` it for a table.

    Attributes:
        ok: Every output and gradient is within its allowance, and something was accelerated.
        outputs, gradients: One row per tensor.
        oracle: Whether fp64 was the measure (else stock itself was).
        seconds: (stock, accelerated), median time of a training step.
        bytes: (stock, accelerated), see `memory`.
        memory: What `bytes` counts: on CUDA the peak above the weights, elsewhere tensors saved for the backward.
        report: What was accelerated.
    """

    outputs: list[Row]
    gradients: list[Row]
    oracle: bool
    seconds: tuple[float, float]
    bytes: tuple[int, int]
    memory: str
    report: Report = field(repr=False)

    @property
    def ok(self) -> bool:
        """See the class."""
        return bool(self.report.replaced) and all(row.ok for row in self.outputs + self.gradients)

    def __str__(self) -> str:
        against = "error against fp64" if self.oracle else "difference from stock"
        lines = [f"{'relative RMS ' + against:44}{'stock':>12}{'accelerated':>14}{'allowed':>12}"]
        rows = [("", row) for row in self.outputs]
        # The gradient nearest to its limit stands for all that pass; what fails is listed, all of it.
        by_use = sorted(self.gradients, key=lambda row: row.accelerated / row.allowed, reverse=True)
        rows += [(GRADIENT, row) for row in by_use if not row.ok] or [
            ("worst of gradients: ", row) for row in by_use[:1]
        ]
        for title, row in rows:
            stock = "" if row.stock is None else f"{row.stock:.1e}"
            mark = "" if row.ok else "  WRONG"
            lines.append(f"{title + row.name:44}{stock:>12}{row.accelerated:>14.1e}{row.allowed:>12.1e}{mark}")
        stock, fast = self.seconds
        lines.append(f"{'training step, ms':44}{stock * 1e3:>12.1f}{fast * 1e3:>14.1f}{stock / fast:>11.2f}x")
        stock, fast = self.bytes
        lines.append(f"{self.memory + ', MB':44}{stock / 1e6:>12.1f}{fast / 1e6:>14.1f}{stock / max(fast, 1):>11.2f}x")
        lines.append(
            f"{len(self.outputs)} outputs and {len(self.gradients)} gradients compared: "
            + (
                "equal within what precision allows"
                if self.ok
                else "NOT EQUAL"
                if self.report.replaced
                else "nothing replaced"
            )
        )
        return "\n".join(lines)


def check(
    model: nn.Module,
    batch: object,
    loss: Callable[[object], torch.Tensor] | None = None,
    repeats: int = 5,
) -> Comparison:
    """Compare a model with an accelerated copy of itself: outputs, gradients, step time and memory.

    Runs on the model's device and dtype, in its training or eval mode, under the caller's autocast. Works on deep
    copies: parameters, gradients, buffers, mode and random generators of the model stay as they are. (Hooks are copied
    too, and are called on the copies.) Needs memory for three copies, one of them in fp64, and for their training
    steps.

    The law: per tensor, the RMS error against an fp64 copy may be at most twice stock's own, plus one rounding step of
    the precision in use (and more where a tensor is so small that its RMS is chance; and an error no larger than
    rounding can make counts only if two inputs nearby have it too). A model that is in fp64 itself, or whose
    randomness differs between precisions, is compared with stock directly.

    Args:
        model: A model that `accelerate` accepts, accelerated already or not. A compiled or DDP model is unwrapped.
        batch: Its input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        loss: Makes a scalar of the model's output. Default: a fixed random projection of every floating-point output.
        repeats: Training steps to time, of each, in turns.

    Returns:
        A :class:`Comparison`; its `ok` is the verdict.

    Raises:
        TypeError: if `model` is no module, `batch` none of the three, or `loss` gives no scalar tensor.
        ValueError: if nothing in the model can be recognised, it is sharded, has no gradient to compare, or repeats <
            1; and under `torch.inference_mode()`, or with tensors made there, which no backward can use.
    """
    model = _unwrapped(model)
    if not isinstance(batch, (torch.Tensor, tuple, list, Mapping)):
        raise TypeError(f"batch must be a tensor, a tuple of arguments or a dict of them, got {type(batch).__name__}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    _refuse_inference_tensors(model, batch)
    stock, fast = copy.deepcopy(model), copy.deepcopy(model)
    restore(stock)
    report = accelerate(fast)
    cuda = [tensor.device for tensor in model.parameters() if tensor.is_cuda]
    device = cuda[0] if cuda else torch.device("cpu")

    with random_numbers_kept(model), torch.enable_grad():
        steps = {"stock": TrainingStep(stock, batch, loss), "accelerated": TrainingStep(fast, batch, loss)}
        rows, oracle = _compare(model, steps)
        rows = _second_look(rows, model, steps, batch)
        seconds = step_seconds(steps, device, repeats)
        bytes_ = tuple(step_bytes(step, device) for step in steps.values())
    memory = "peak above the weights" if device.type == "cuda" else "saved for the backward"
    outputs = [row for row in rows if not _is_gradient(row)]
    gradients = [replace(row, name=row.name.removeprefix(GRADIENT)) for row in rows if _is_gradient(row)]
    return Comparison(outputs, gradients, oracle, seconds, bytes_, memory, report)


def _compare(model, steps):
    """A row for every output and gradient of one step, and whether fp64 was the measure."""
    runs = {name: step.run() for name, step in steps.items()}
    if not any(name.startswith(GRADIENT) for name in runs["stock"]):
        raise ValueError("model has no parameter that requires a gradient: there is no training step to compare")
    truth = _oracle(model, steps["stock"], runs["stock"])
    return _rows(runs, truth, model), truth is not None


def _second_look(rows, model, steps, batch):
    """Look again at what fails by no more than rounding can do, on two inputs nearby: an error that is real comes back.

    Where two tokens tie but for a rounding, max-pooling sends the gradient to one or the other, and about one fp32
    step in ten has such a tie. It strikes stock or the accelerated model, not both, and not again.
    """
    reach = _rounding_reach(torch.finfo(_precision(model)).eps)
    for seed in (1, 2):
        suspects = {row.name for row in rows if not row.ok and row.stock is not None and row.accelerated <= reach}
        if not suspects:
            break
        nearby = nearby_batch(batch, torch.Generator().manual_seed(seed))
        again, _ = _compare(model, {name: TrainingStep(step.model, nearby, step.loss) for name, step in steps.items()})
        passed = {row.name: row for row in again if row.ok and row.name in suspects}
        rows = [passed.get(row.name, row) for row in rows]
    return rows


def _oracle(model, step, stock):
    """The step of an fp64 copy without autocast; None where it cannot be had or is not the same computation."""
    precision = _precision(model)
    if precision is torch.float64:
        return None
    try:
        exact = copy.deepcopy(model).double()
        restore(exact)
        device = next(exact.parameters()).device.type
        with torch.autocast(device, enabled=False):
            truth = TrainingStep(exact, step.batch, step.loss, torch.float64).run()
    except (RuntimeError, TypeError, NotImplementedError):  # out of memory, no fp64 on this device or in this model
        return None
    # Some random draws depend on the dtype. Another draw makes errors of order 1, where rounding makes small ones.
    same = truth.keys() == stock.keys() and all(truth[name].shape == stock[name].shape for name in truth)
    outputs = [name for name in truth if not name.startswith(GRADIENT)]
    reach = _rounding_reach(torch.finfo(precision).eps)
    if not same or any(_relative(stock[name], truth[name]) > reach for name in outputs):
        return None
    return truth


def _rows(runs, truth, model):
    stock, fast = runs["stock"], runs["accelerated"]
    step = torch.finfo(_precision(model)).eps
    if stock.keys() != fast.keys():
        missing = sorted(stock.keys() ^ fast.keys())
        return [Row(name, None, float("inf"), step) for name in missing]
    rows = []
    for name, wanted in stock.items():
        got = fast[name]
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            rows.append(Row(f"{name} ({got.dtype} {tuple(got.shape)})", None, float("inf"), step))
        elif truth is None:
            allowed = 1e-9 if step < 1e-9 else _rounding_reach(step)
            rows.append(Row(name, None, _relative(got, wanted), allowed))
        else:
            own = _relative(wanted, truth[name])
            rows.append(Row(name, own, _relative(got, truth[name]), step))
    return rows if truth is None else _allowances(rows, truth, step)


def _allowances(rows, truth, step):
    """Twice stock's error, and room for chance where a tensor has few elements.

    An RMS over n elements has itself a relative standard deviation of 1 / sqrt(2 n), the ratio of two 1 / sqrt(n):
    three of them are granted; and below 256 elements stock's error counts as at least the median over its kind.
    """
    median = {}
    for kind in (True, False):
        errors = sorted(row.stock for row in rows if row.stock is not None and _is_gradient(row) is kind)
        median[kind] = errors[len(errors) // 2] if errors else 0.0
    found = []
    for row in rows:
        if row.stock is not None:
            n = max(truth[row.name].numel(), 1)
            own = max(row.stock, median[_is_gradient(row)]) if n < 256 else row.stock
            row = replace(row, allowed=2 * own * (1 + 3 / n**0.5) + step)
        found.append(row)
    return found


def _is_gradient(row):
    return row.name.startswith(GRADIENT)


def _relative(value, truth) -> float:
    """RMS of the difference over RMS of the truth; infinite where one is not finite and the other is."""
    value, truth = value.double(), truth.double()
    if not value.numel() or torch.equal(value, truth):
        return 0.0
    error = ((value - truth).pow(2).mean() / truth.pow(2).mean()).sqrt().item()
    return error if error == error else float("inf")


def _precision(model) -> torch.dtype:
    """The coarsest dtype that the step rounds to."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _refuse_inference_tensors(model, batch):
    if torch.is_inference_mode_enabled():
        raise ValueError("check runs training steps, and torch.inference_mode() is on: call it outside")
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    for name, value in (("model", list(model.state_dict(keep_vars=True).values())), ("batch", values)):
        if any(tensor.is_inference() for tensor in tensors_in(value)):
            raise ValueError(f"{name} holds tensors made in inference mode, which no backward can use: clone() them")


def _unwrapped(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            break
        model = inner
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ValueError("model is sharded and cannot be copied; check it before fully_shard")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model has no data (meta device); check it after to_empty and loading weights")
    return model

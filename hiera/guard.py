"""Non-finite losses and gradients: kept from the weights without waiting for the device, and explained afterwards."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class NonFiniteError(RuntimeError):
    """Training stopped because too many steps in a row had a non-finite loss or gradient norm.

    Attributes: `step` (the last bad one, from 0), `paths` (the images of its batch), `culprit` (what a second pass
    found).
    """

    def __init__(self, step: int, in_a_row: int, paths: list[str], culprit: str):
        super().__init__(
            f"training stopped at step {step}: the loss or the gradient norm was not finite {in_a_row} steps in a row. "
            f"First non-finite in a second pass over the batch of step {step}: {culprit}. "
            "Images of that batch:\n  " + "\n  ".join(paths)
        )
        self.step, self.paths, self.culprit = step, paths, culprit


class StepStats(NamedTuple):
    """Scalars of one step, float64 on the device until they are read."""

    loss: torch.Tensor
    grad_norm: torch.Tensor  # before clipping
    skipped: torch.Tensor  # 1 if this step left the weights alone
    skipped_in_all: torch.Tensor
    bad_in_a_row: torch.Tensor


class GuardedStep:
    """Backward pass and optimizer step of one loss, made void on the device if anything in it is not finite.

    A fused AdamW whose `found_inf` attribute holds 1 changes neither weights nor moments nor its step count; this is
    how `torch.amp.GradScaler` skips, and it costs no synchronisation with the host. Once `max_bad` steps in a row were
    bad, every later one is void too, so that the host, which reads one step late, finds the weights that the last bad
    step had.

    Under a GradScaler a gradient that overflows is how the scale is found: such a step is skipped, yet counts as bad
    only if its loss is not finite or the scale has come down to 1.

    Several GPUs: `bad` must be the maximum over all processes (one all-reduce of a scalar) before it is used.

    Args:
        optimizer: a fused `torch.optim.AdamW`.
        scaler: enabled for fp16, disabled otherwise.
        device: where the model is.
        max_bad: number of bad steps in a row after which nothing moves any more.
        clip: largest gradient norm, 0 = as it comes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        max_bad: int,
        clip: float = 0.0,
    ):
        self.optimizer, self.scaler, self.max_bad, self.clip = optimizer, scaler, max_bad, clip
        self.skipped = torch.zeros((), dtype=torch.float64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.float64, device=device)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, loss: torch.Tensor) -> StepStats:
        """Loss: a scalar with a graph. Gradients are gone afterwards."""
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        scale = self.scaler.scale(torch.ones((), device=loss.device))
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        skip = ~finite | (self.in_a_row >= self.max_bad)
        if self.scaler.is_enabled():
            # The scaler judges by the gradients that unscale_ sees: let it see what it cannot know, a bad loss or norm.
            gradients[0].add_(torch.where(skip, torch.nan, 0.0))
            self.scaler.unscale_(self.optimizer)
            norm = norm / scale
        else:
            self.optimizer.found_inf = skip.float()
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        bad = ~finite
        if self.scaler.is_enabled():
            bad &= ~torch.isfinite(loss) | (scale <= 1)
        self.skipped += skip
        self.in_a_row = torch.where(self.in_a_row >= self.max_bad, self.in_a_row, (self.in_a_row + 1) * bad)
        return StepStats(loss.double(), norm.double(), skip.double(), self.skipped.clone(), self.in_a_row)

    def state_dict(self) -> dict[str, float]:
        """Counters (reads the device)."""
        return {"skipped": self.skipped.item(), "in_a_row": self.in_a_row.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue counting from `state_dict()`."""
        self.skipped.fill_(state["skipped"])
        self.in_a_row.fill_(state["in_a_row"])


class ReadLate:
    """Hands each step's stats to the host while the next step runs, so that the device never waits."""

    def __init__(self):
        self._pending = None

    def push(self, stats: StepStats) -> StepStats | None:
        """Start copying `stats`; return those pushed before, as floats."""
        before = self.pop()
        values = torch.stack(stats)
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            host, copied = values, None
        self._pending = host, copied
        return before

    def pop(self) -> StepStats | None:
        """Wait for the stats last pushed; None if they were already read."""
        if self._pending is None:
            return None
        (host, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        return StepStats(*host.tolist())


def first_non_finite(model: nn.Module, compute_loss: Callable[[], torch.Tensor]) -> str:
    """Run forward and backward once more, watching every module, and say where the first non-finite number arises.

    Gradients are cleared; weights are untouched. Every module call synchronises with the device.

    Args:
        model: the module whose sub-modules `compute_loss` calls.
        compute_loss: returns the scalar loss.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _finite(tensor):
            return f"{name} itself, before the pass"
    found: list[str] = []

    def watch(name: str, kind: str, value: object) -> None:
        for tensor in _tensors(value):
            if not found and not _finite(tensor):
                found.append(f"{name} ({kind})")

    def after_forward(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            watch(name, "output of its forward", output)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: watch(name, "gradient that arrives at its output", gradient))

        return hook

    handles = [model.register_forward_pre_hook(lambda module, args: watch("the images", "input of the model", args))]
    # Modules inside fire before those around them, so that the innermost one is named.
    handles += [m.register_forward_hook(after_forward(name or type(m).__name__)) for name, m in model.named_modules()]
    for name, p in model.named_parameters():
        if p.requires_grad:
            handles.append(p.register_hook(lambda gradient, name=name: watch(name, "its gradient", gradient)))
    try:
        model.zero_grad()
        with torch.enable_grad():
            loss = compute_loss()
            watch("the loss", "computed from finite outputs", loss)
            if not found:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    return found[0] if found else "nothing: every output and gradient is finite (the sum of squares may overflow)"


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())

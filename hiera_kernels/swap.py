"""`accelerate`, `explain`, `restore`: the only place that knows both the modules of a model and the ops."""

from dataclasses import dataclass

import torch
from torch import nn

from hiera_kernels.adapters import TARGETS
from hiera_kernels.block_plan import check_settings, link, set_up
from hiera_kernels.fused_block import FusedBlock
from hiera_kernels.ops.calling import has_kernel
from hiera_kernels.recognise import Target, refusal
from hiera_kernels.report import Line, Report
from hiera_kernels.subclass import swap_class, target_of, unswap_class


def accelerate(model: nn.Module, recompute: str | None = None, drop_path: str | None = None) -> Report:
    """Make the model's own modules call this package's ops. In place; parameters, names and numbers stay.

    Modules are recognised by their attributes and then compared with the op on small look-alikes, on the CPU, in
    training and in eval mode, outputs and gradients; what differs is left alone and reported. Nothing of the model is
    run, no hook is called and no random number drawn, so it may be on any device, sharded, compiled, or without data
    (meta device). May be called again, and before or after `.to()`, `torch.compile`, DDP, `fully_shard`, and loading
    weights. A stored model accelerates itself when it is loaded.

    For a second derivative through attention (a gradient penalty, say), which PyTorch's fused attention does not have
    either, run the model under :func:`disabled() <hiera_kernels.disabled>`.

    Args:
        model: Any module; its submodules are searched (through DDP's `.module` and a compiled module's `_orig_mod`
            too).
        recompute: What the blocks compute again in the backward instead of keeping it.
            ``"none"``: what only a matrix product could give back is kept, LayerNorm's output is not (where a kernel
            makes it). ``"gelu"``: neither is GELU's output, by far the largest tensor of a block; costs one write and
            one read of it. ``"block"``: only the input of each block is kept, as with activation checkpointing, and its
            forward runs twice; the random numbers of drop path are the same both times. As with
            `torch.utils.checkpoint`, the second run takes the parameters that the module has by then: a backward that
            comes after `torch.func.functional_call` has returned needs another setting. None keeps what a block has
            been given before, which at first is ``"gelu"``.
        drop_path: ``"exact"``: samples that drop path drops are computed and multiplied by zero, as plain PyTorch has
            it. ``"skip"``: attention and MLP see only the samples that are kept. The same samples, values and
            gradients (a dropped branch that is not finite makes no NaN, though); two waits for the device in each
            block that drops, and shapes that change from step to step, so that under `torch.compile` it is
            ``"exact"``. None keeps what a block has been given before, which at first is ``"exact"``.

    Returns:
        A report; `print` it for a table.

    Raises:
        TypeError: if `model` is no `torch.nn.Module`.
        ValueError: if no module even resembles what is looked for; if a setting is none of those words.
    """
    check_settings(recompute, drop_path)
    findings = _examine(model)
    if not findings:
        wanted = "; ".join(target.looks_for for target in TARGETS)
        raise ValueError(f"nothing to accelerate in {type(model).__name__}; looked for: {wanted}")
    for finding in findings:
        if finding.reason is not None:
            unswap_class(finding.module)
        elif target_of(finding.module) is None:
            try:
                swap_class(finding.module, finding.target)
            except TypeError as error:  # a metaclass or __init_subclass__ that wants arguments, or __slots__
                finding.reason = f"its class cannot be extended ({error})"
        if finding.reason is None:
            if isinstance(finding.target, FusedBlock):
                set_up(finding.module, recompute, drop_path)
            finding.target.arrived(finding.module)
    for container in model.modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            for row in _rows(container):
                link(row)
    return _report(model, findings)


def explain(model: nn.Module) -> Report:
    """What `accelerate(model)` would do, and why not more. Changes nothing and runs nothing of the model.

    Args:
        model: As for `accelerate`.

    Returns:
        The report that `accelerate` would return; an empty one where it would raise ValueError.

    Raises:
        TypeError: if `model` is no `torch.nn.Module`.
    """
    return _report(model, _examine(model))


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module has the class again that it had. Nothing happens to a model that is plain.

    Args:
        model: As for `accelerate`.

    Raises:
        TypeError: if `model` is no `torch.nn.Module`.
    """
    for module in _checked(model).modules():
        unswap_class(module)


def _rows(container: nn.Module) -> list[list[nn.Module]]:
    """Children that follow one another and are fused blocks."""
    rows: list[list[nn.Module]] = [[]]
    for child in container.children():
        if isinstance(target_of(child), FusedBlock):
            rows[-1].append(child)
        else:
            rows.append([])
    return [row for row in rows if row]


@dataclass
class _Finding:
    path: str
    module: nn.Module
    target: Target
    reason: str | None  # why not


def _examine(model: nn.Module) -> list[_Finding]:
    """Every module that resembles a target. All questions are asked here, before anything changes."""
    findings = []
    for path, module in _checked(model).named_modules():
        target = target_of(module) or next((t for t in TARGETS if t.resembles(module)), None)
        if target is not None:
            findings.append(_Finding(path, module, target, refusal(module, target)))
    return findings


def _report(model: nn.Module, findings: list[_Finding]) -> Report:
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    report = Report()
    for finding in findings:
        if finding.reason is None:
            note = finding.target.note(finding.module)
            text = _says(finding.target, finding.module, device) + (f"; {note}" if note else "")
            report.replaced.append(Line(finding.path, text))
        else:
            report.skipped.append(Line(finding.path, f"{type(finding.module).__name__}: {finding.reason}"))
    return report


def _says(target: Target, module: nn.Module, device: str) -> str:
    how = f"plain PyTorch, no kernel for {device}"
    if any(has_kernel(op, device) for op in target.ops):
        how = _served(target, module, device)
    return f"{target.method} -> {', '.join(target.ops)} ({how})"


def _served(target: Target, module: nn.Module, device: str) -> str:
    """What its kernel says to the calls of this module, in 16 bits, as under autocast, and in the weights' dtype."""
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != device or not weight.is_floating_point():
        return f"compiled kernel for {device}"
    asked = dict.fromkeys((torch.bfloat16, weight.dtype))
    refused = {dtype: target.declined(module, torch.empty(0, dtype=dtype, device=weight.device)) for dtype in asked}
    if (reason := refused[torch.bfloat16]) is not None:
        return f"plain PyTorch for {device}: {reason}"
    if (reason := refused[weight.dtype]) is not None:
        return f"compiled kernel for {device} under autocast, else plain PyTorch: {reason}"
    return f"compiled kernel for {device}"


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model

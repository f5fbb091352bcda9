"""Who computes a workload: stock, folded, timm, accelerated, all with the same weights, eager or compiled.

| candidate | what it is |
|---|---|
| stock | hiera-transformer from `.upstream/`, or sam2's trunk; without it this repository's `hiera`, equal in value |
| folded | stock with its windows folded into the batch: 4-D attention that reaches a fused backend (folded.py) |
| timm | timm's Hiera with stock's weights |
| accelerated | stock after `hiera_kernels.accelerate` |
| accelerated hiera | this repository's `hiera` after `accelerate`; for MAE, whose stock root has boolean indexing |

Modes: "eager"; "compile" and "max-autotune" (`torch.compile` of the model); "cuda-graph" (the whole step, optimizer
included, in one CUDA graph; accelerated only).
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

import hiera
import hiera_kernels
from benchmarks.folded import fold
from benchmarks.window_shapes import SETTINGS
from benchmarks.workloads import Workload
from tests.upstream import PACKAGE, import_timm, load_upstream, torchvision_without_operators, variant_settings

# Settings of SAM 2's image encoders; that of the position embedding changes no shape of attention.
TRUNKS = {
    name.replace("sam2_", "sam2_hiera_"): settings
    | ({} if name == "sam2_b+" else {"window_pos_embed_bkg_spatial_size": (7, 7)})
    for name, settings in SETTINGS.items()
}
COMPILED = ("compile", "max-autotune")
MODES = {
    "stock": ("eager", *COMPILED),
    "folded": ("eager", *COMPILED),
    "timm": ("eager", *COMPILED),
    "accelerated": ("eager", "compile", "cuda-graph"),
    "accelerated hiera": ("eager", "compile", "cuda-graph"),
}


class Absent(Exception):
    """A candidate that this machine or this workload does not have; the message says why."""


def stock(workload: Workload, size: tuple[int, ...]) -> nn.Module:
    """The model as its authors wrote it, in fp32 on the CPU, weights from seed 0.

    Raises:
        Absent: a SAM 2 trunk without the sam2 package.
    """
    torch.manual_seed(0)
    if workload.objective == "trunk":
        return _trunk(workload)
    if not (PACKAGE / "__init__.py").is_file():
        return _reference(workload, size)
    cls, settings = variant_settings(workload.model) if hasattr(load_upstream(), workload.model) else (None, None)
    if cls is None:  # hiera_mini_128 is ours alone
        return _reference(workload, size)
    return _logits(cls(**{**settings, "input_size": size, "drop_path_rate": workload.drop_path}))


def _reference(workload: Workload, size: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return _logits(hiera.create_model(workload.model, input_size=size, drop_path_rate=workload.drop_path))


def _logits(model: nn.Module) -> nn.Module:
    if hasattr(model, "head"):  # stock has a softmax in eval mode, timm has none
        model.head.act_func = nn.Identity()
    return model


def _trunk(workload: Workload) -> nn.Module:
    try:
        with torchvision_without_operators():
            from sam2.modeling.backbones.hieradet import Hiera
    except ImportError as error:
        raise Absent(f"the package sam2 is not installed ({error})") from error
    return Hiera(**TRUNKS[workload.model], drop_path_rate=workload.drop_path)


def _folded(workload, size):
    if workload.objective == "trunk":
        raise Absent("SAM 2 folds its windows itself")
    model = stock(workload, size)
    fold(model)
    return model


def _timm(workload, size):
    if workload.objective not in ("fine-tune", "inference") or len(size) != 2:
        raise Absent("timm has image classifiers only")
    import_timm()
    from timm.models import create_model, is_model
    from timm.models.hiera import checkpoint_filter_fn

    if not is_model(workload.model):
        raise Absent(f"timm has no {workload.model}")
    model = create_model(workload.model, img_size=size, drop_path_rate=workload.drop_path)
    model.load_state_dict(checkpoint_filter_fn(stock(workload, size).state_dict()))
    return model


def _accelerated(workload, size):
    model = stock(workload, size)
    hiera_kernels.accelerate(model)
    return model


def _accelerated_hiera(workload, size):
    if workload.objective == "trunk":
        raise Absent("this repository's model is no SAM 2 trunk")
    model = _reference(workload, size)
    model.load_state_dict(stock(workload, size).state_dict())
    hiera_kernels.accelerate(model)
    return model


BUILDERS: dict[str, Callable[[Workload, tuple[int, ...]], nn.Module]] = {
    "stock": stock,
    "folded": _folded,
    "timm": _timm,
    "accelerated": _accelerated,
    "accelerated hiera": _accelerated_hiera,
}


def build(candidate: str, workload: Workload, size: tuple[int, ...]) -> nn.Module:
    """The candidate's model for pictures of `size`, with stock's weights, in fp32 on the CPU; all candidates' equal.

    Raises:
        Absent: see the class.
        ValueError: no such candidate.
    """
    if candidate not in BUILDERS:
        raise ValueError(f"candidate must be one of {', '.join(BUILDERS)}, got {candidate!r}")
    model = BUILDERS[candidate](workload, size)
    return model.train(workload.training)


def build_other(name: str, workload: Workload) -> nn.Module:
    """Another timm model at the workload's size, for `--zoo`; no parity is asked of it.

    Raises:
        Absent: timm cannot build it so.
    """
    import_timm()
    from timm.models import create_model

    torch.manual_seed(0)
    try:
        try:
            model = create_model(name, img_size=workload.size, drop_path_rate=workload.drop_path)
        except TypeError:  # a convolutional network, which takes any size
            model = create_model(name, drop_path_rate=workload.drop_path)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise Absent(f"timm cannot build {name} for {workload.size}: {error}") from error
    return model.train(workload.training)


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The model in one of the modes "eager", "cuda-graph" (captured later) or under torch.compile."""
    if mode == "compile":
        return torch.compile(model)
    if mode == "max-autotune":
        return torch.compile(model, mode="max-autotune")
    return model


def autocast_of(precision: str, device: torch.device) -> Callable:
    """The context maker of a precision: autocast for "bf16" and "fp16", nothing for the others."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)

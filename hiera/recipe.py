"""The published recipe: optimizer, schedule, and what differs between the variants.

Sources: Hiera, arXiv 2306.00989, for the recipe; the table per variant was read from public training configurations of
it, not from the paper's appendix. MAE: AdamW, betas 0.9 and 0.95, weight decay 0.05, learning rate 8e-4 at batch 4096,
cosine after a warm-up of 40 of 400 or 1600 epochs. Fine-tuning: AdamW, betas 0.9 and 0.999, weight decay 0.05, learning
rate at batch 1024, cosine after 5 epochs of warm-up, layer decay, drop path, label smoothing 0.1, mixup 0.8, cutmix
1.0, RandAugment 9, random erasing 0.25.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Variant:
    """What the recipe sets per size of model."""

    mae_drop_path: float
    lr: float  # fine-tuning, at batch 1024
    drop_path: float  # fine-tuning
    layer_decay: float  # fine-tuning


_VARIANTS = {
    "tiny": Variant(mae_drop_path=0.0, lr=2e-3, drop_path=0.1, layer_decay=0.65),
    "small": Variant(mae_drop_path=0.0, lr=2e-3, drop_path=0.1, layer_decay=0.65),
    "base": Variant(mae_drop_path=0.2, lr=2e-3, drop_path=0.1, layer_decay=0.7),
    "base_plus": Variant(mae_drop_path=0.2, lr=1e-3, drop_path=0.1, layer_decay=0.7),
    "large": Variant(mae_drop_path=0.2, lr=1e-3, drop_path=0.1, layer_decay=0.85),
    "huge": Variant(mae_drop_path=0.3, lr=1e-3, drop_path=0.3, layer_decay=0.85),
}


@dataclass(frozen=True)
class Recipe:
    """Defaults of one objective for one model; `lr` is per `lr_batch` images, `warmup` a share of all steps."""

    lr: float
    lr_batch: int
    betas: tuple[float, float]
    warmup: float
    drop_path: float
    layer_decay: float
    crop_scale: tuple[float, float]
    weight_decay: float = 0.05


def recipe_for(objective: str, model: str) -> Recipe:
    """The published settings for `objective` ("mae" or "classify") and the model of this name.

    A model that was not published (hiera_mini_128) is treated as tiny.
    """
    match = re.search(r"tiny|small|base_plus|base|large|huge", model)
    variant = _VARIANTS[match.group() if match else "tiny"]
    if objective == "mae":
        return Recipe(8e-4, 4096, (0.9, 0.95), 0.1, variant.mae_drop_path, 1.0, (0.2, 1.0))
    return Recipe(variant.lr, 1024, (0.9, 0.999), 0.05, variant.drop_path, variant.layer_decay, (0.08, 1.0))


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of `step` (from 0): linear up to `peak` over `warmup` steps, then half a cosine to 0 at `steps`.

    Raises:
        ValueError: `warmup` is not in 0 .. steps - 1 or `step` not in 0 .. steps - 1.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be at least 0 and less than steps={steps}, got {warmup}")
    if not 0 <= step < steps:
        raise ValueError(f"step must be in 0 .. {steps - 1}, got {step}")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter, for layer decay: 0 = embeddings, i + 1 = block i, depth + 1 = the rest."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match.group(1)) + 1 if match else depth + 1


def make_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW with one parameter group per (layer, decayed or not).

    No weight decay for vectors and scalars (biases, norms) and for what `model.no_weight_decay()` names. Every group
    keeps its factor `layer_decay ** (depth + 1 - layer)` as "lr_scale"; whoever sets the learning rate multiplies by
    it.

    The fused implementation is asked for because it alone can skip a step on the device (see guard.py).
    """
    depth = len(model.blocks)
    undecayed = set(model.no_weight_decay())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in undecayed
            groups.setdefault((layer_of(name, depth), decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[layer, decayed],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": layer_decay ** (depth + 1 - layer),
            }
            for layer, decayed in sorted(groups)
        ],
        lr=lr,
        betas=betas,
        fused=True,
    )

"""What is timed: training steps and inference of Hiera as people run it, at published sizes and with published recipes.

A workload says which model, how many images of what size, and what a step is. It knows nothing of who computes it
(rivals.py) and of how it is timed (model.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hiera.recipe import recipe_for

VIDEO = (16, 224, 224)


@dataclass(frozen=True)
class Workload:
    """One case of the benchmark.

    Attributes:
        objective: "fine-tune" (of a classifier) and "mae" are training steps of an image or video Hiera, "trunk" of a
            SAM 2 image encoder (loss on its feature maps), "inference" a classifier's forward without gradients.
        model: a name of `hiera.list_models()`, or of a SAM 2 trunk (`rivals.TRUNKS`).
        batch: images or clips per step.
        size: pixels, height and width, frames first for video.
        parity_size: the size at which rivals are compared before timing, where `size` is too large for fp64.
        zoo: names of other timm models that are weighed against it (with `--zoo`).
    """

    objective: str
    model: str
    batch: int
    size: tuple[int, ...] = (224, 224)
    parity_size: tuple[int, ...] | None = None
    mask_ratio: float | None = None
    zoo: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the tables call it, e.g. "hiera_base_224 fine-tune b128"; another size than its own is named."""
        own = str(self.size[-1]) in self.model.replace("sam2_hiera", "1024")
        size = "" if own and self.size[-1] == self.size[-2] else f" {'x'.join(map(str, self.size))}"
        return f"{self.model}{size} {self.objective} b{self.batch}"

    @property
    def training(self) -> bool:
        """Whether a step has a backward and an optimizer."""
        return self.objective != "inference"

    @property
    def drop_path(self) -> float:
        """The published rate of stochastic depth, as hiera/recipe.py has it; SAM 2's trunks are trained with 0.1."""
        if self.objective == "trunk":
            return 0.1
        return (
            recipe_for("mae" if self.objective == "mae" else "classify", self.model).drop_path if self.training else 0.0
        )

    def inputs(
        self, device: torch.device, batch: int, size: tuple[int, ...], seed: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Random images [B, 3, *size] in fp32, and for "fine-tune" labels [B]; the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.randn(batch, 3, *size, device=device, generator=generator)
        if self.objective != "fine-tune":
            return (images,)
        return images, torch.randint(400, (batch,), device=device, generator=generator)

    def outputs(self, model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """What the model computes, as a flat list of tensors."""
        if self.objective == "mae":
            loss, prediction, *_ = model(images, mask_ratio=self.mask_ratio)
            return [loss, prediction]
        result = model(images)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    def loss(self, outputs: list[torch.Tensor], labels: torch.Tensor | None) -> torch.Tensor:
        """The scalar that is differentiated."""
        if self.objective == "mae":
            return outputs[0]
        if self.objective == "fine-tune":
            return F.cross_entropy(outputs[0].float(), labels)
        return sum(output.float().square().mean() for output in outputs)


def step(
    workload: Workload,
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    optimizer: torch.optim.Optimizer | None,
    autocast: Callable,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """One whole step, as a training script has it: forward, backward, optimizer; for inference the forward alone.

    Args:
        autocast: makes the context in which the forward runs.
        scaler: of the loss, for fp16.

    Returns:
        The loss, detached; for inference the sum of the first output's first row.
    """
    if not workload.training:
        with torch.no_grad(), autocast():
            return workload.outputs(model, inputs[0])[0][0].float().sum()
    with autocast():
        outputs = workload.outputs(model, inputs[0])
        loss = workload.loss(outputs, inputs[1] if len(inputs) > 1 else None)
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
    if optimizer is not None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


_ZOO = ("vit_base_patch16_224", "convnext_base", "swinv2_base_window8_256", "mvitv2_base", "pvt_v2_b5")
_ZOO_HIGH = ("vit_base_patch16_224", "convnext_base", "pvt_v2_b5")  # the others do not take 1536 px without changes

WORKLOADS = (
    Workload("fine-tune", "hiera_base_224", 128, zoo=_ZOO),
    Workload("mae", "mae_hiera_base_224", 256, mask_ratio=0.6),
    Workload("fine-tune", "hiera_large_224", 128),
    Workload("mae", "mae_hiera_large_224", 256, mask_ratio=0.6),
    Workload("mae", "mae_hiera_base_16x224", 16, VIDEO, mask_ratio=0.9),
    Workload("trunk", "sam2_hiera_b+", 8, (1024, 1024)),
    Workload("inference", "hiera_base_224", 64, zoo=("vit_base_patch16_224",)),
    Workload("fine-tune", "hiera_base_16x224", 16, VIDEO),
    Workload("inference", "hiera_base_224", 1, zoo=("vit_base_patch16_224",)),
    Workload("fine-tune", "hiera_base_224", 32, (448, 448)),
    Workload("fine-tune", "hiera_base_224", 8, (896, 896), (448, 448)),
    Workload("fine-tune", "hiera_base_224", 2, (1536, 1536), (448, 448), zoo=_ZOO_HIGH),
    Workload("fine-tune", "hiera_base_224", 1, (2048, 3072), (448, 672)),
    Workload("trunk", "sam2_hiera_t", 8, (1024, 1024)),
    Workload("trunk", "sam2_hiera_l", 8, (1024, 1024)),
)

# What a CPU does in seconds: the same code path, no published figure.
QUICK = (
    Workload("fine-tune", "hiera_mini_128", 8, (128, 128)),
    Workload("mae", "mae_hiera_mini_128", 8, (128, 128), mask_ratio=0.6),
    Workload("inference", "hiera_mini_128", 16, (128, 128)),
)

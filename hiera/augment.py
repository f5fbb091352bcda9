"""Augmentation for fine-tuning, on the device and on whole batches, from kornia."""

import torch
from kornia.augmentation import Normalize, RandomCutMixV2, RandomErasing, RandomMixUpV2
from kornia.augmentation.auto import RandAugment
from kornia.augmentation.random_generator import MixupGenerator
from torch import nn
from torch.nn import functional as F

from hiera.data import MEAN, STD


class _BetaGenerator(MixupGenerator):
    """kornia draws the share of the second image uniformly; the recipe draws it from Beta(alpha, alpha)."""

    def __init__(self, alpha: float):
        super().__init__(p=1.0)
        self.alpha = alpha

    def make_samplers(self, device: torch.device, dtype: torch.dtype) -> None:
        super().make_samplers(device, dtype)
        alpha = torch.tensor(self.alpha, device=device, dtype=torch.float32)
        self.lambda_sampler = torch.distributions.Beta(alpha, alpha)


class _MixUp(RandomMixUpV2):
    def __init__(self, alpha: float):
        super().__init__(data_keys=["input", "class"])
        self._param_generator = _BetaGenerator(alpha)


class FineTuneAugment(nn.Module):
    """uint8 images and labels -> normalised images and target distributions.

    RandAugment (two operations, each with probability 1/2 per image), normalisation, random erasing to the mean colour,
    and then, half the time each, mixup or cutmix. All draws come from torch's global generator of the CPU.

    Args:
        classes: number of classes, K.
        randaugment: magnitude, 0 (off) to 10.
        erasing: probability of erasing a box, per image.
        mixup: parameter of the Beta distribution that mixing shares are drawn from; 0 turns it off.
        cutmix: likewise.
    """

    def __init__(
        self, classes: int, randaugment: float = 9, erasing: float = 0.25, mixup: float = 0.8, cutmix: float = 1.0
    ):
        super().__init__()
        self.classes = classes
        self.each = nn.Sequential()
        if randaugment:
            # The recipe counts magnitudes to 10, kornia to 30 (and takes neither end).
            self.each.append(RandAugment(n=2, m=min(3 * randaugment, 29.99)))
        self.each.append(Normalize(MEAN, STD))
        if erasing:
            self.each.append(RandomErasing(p=erasing))
        self.mixup = _MixUp(mixup) if mixup else None
        self.cutmix = (
            RandomCutMixV2(beta=cutmix, data_keys=["input", "class"], use_correct_lambda=True) if cutmix else None
        )

    @torch.no_grad()
    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, 3, H, W], int64 [B] -> float32 [B, 3, H, W], float32 [B, K] whose rows sum to 1."""
        images = self.each(images.float() / 255)
        if self.mixup and not (self.cutmix and torch.rand(()) < 0.5):
            images, mixed = self.mixup(images, labels)
            first, second, share_of_second = mixed.unbind(-1)
        elif self.cutmix:
            images, mixed = self.cutmix(images, labels)
            first, second, share_of_first = mixed[0].unbind(-1)
            share_of_second = 1 - share_of_first
        else:
            return images, F.one_hot(labels, self.classes).float()
        first, second = (F.one_hot(each.long(), self.classes).float() for each in (first, second))
        return images, torch.lerp(first, second, share_of_second[:, None])

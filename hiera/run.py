"""One training run: model, optimizer, data and counters, built from its options, saved and restored."""

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import hiera
from hiera.checkpoint_loading import load_weights
from hiera.config import Config
from hiera.data import Batch, BatchStream, ImageFolder, batches, derived_seed, find_classes, find_images, normalise
from hiera.guard import GuardedStep, NonFiniteError, first_non_finite
from hiera.recipe import learning_rate, make_optimizer, recipe_for

# Options that may differ between a run and its continuation: they change neither a weight nor which image comes when.
_FREE = {"data", "steps", "epochs", "device", "accelerate", "compile", "init", "checkpoint_dir", "resume", "save_every"}
_FREE |= {"keep", "log", "workers", "max_bad_steps", "progress"}


class Run:
    """The parts of one training run, put together from a `Config`; `fit` drives it."""

    def __init__(self, config: Config):
        self.config = config
        self.device = torch.device(config.device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
        if config.objective == "mae":
            self.paths, self.labels, self.classes = find_images(config.data), None, []
        else:
            self.paths, self.labels, self.classes = find_classes(config.data)
        self.steps = config.steps or math.ceil(config.epochs * len(self.paths) / config.batch)

        recipe = recipe_for(config.objective, config.model)
        self.lr = _given_or(config.lr, recipe.lr * config.batch / recipe.lr_batch)
        self.warmup = _given_or(config.warmup, int(recipe.warmup * self.steps))
        learning_rate(0, self.steps, self.warmup, self.lr)
        self.crop_scale = recipe.crop_scale

        torch.manual_seed(derived_seed(config.seed, 2))
        settings = {"input_size": config.size, "drop_path_rate": _given_or(config.drop_path, recipe.drop_path)}
        if self.classes:
            settings["num_classes"] = len(self.classes)
        try:
            self.model = hiera.create_model(config.model, **settings)
        except ValueError as error:
            size = "x".join(map(str, config.size))
            raise ValueError(f"{config.model} cannot take images of {size} pixels: {error}") from error
        self.model.to(self.device).train()
        self.optimizer = make_optimizer(
            self.model,
            self.lr,
            recipe.betas,
            _given_or(config.weight_decay, recipe.weight_decay),
            _given_or(config.layer_decay, recipe.layer_decay),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.guard = GuardedStep(self.optimizer, self.scaler, self.device, config.max_bad_steps, config.clip_grad)
        self.step, self.unreadable = 0, {}

        if self.classes:
            from hiera.augment import FineTuneAugment  # kornia, which pre-training does without

            self.augment = FineTuneAugment(
                len(self.classes), config.randaugment, config.erasing, config.mixup, config.cutmix
            )

    def loss(self, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """Loss of one batch. All its random draws are a function of (seed, step): a second call repeats the first."""
        torch.manual_seed(derived_seed(self.config.seed, 3, step))
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        if self.classes:
            images, targets = self.augment(images, labels)
        else:
            images = normalise(images)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.classes:
                logits = model(images)
                return F.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
            return model(images, mask_ratio=self.config.mask_ratio)[0]

    def set_learning_rate(self) -> float:
        """Put the present step's learning rate into the optimizer; returns that of the last layer."""
        lr = learning_rate(self.step, self.steps, self.warmup, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs; the position in the data and the random draws follow from seed and step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "step": self.step,
            "images": len(self.paths),
            "unreadable": self.unreadable,
            "classes": self.classes,
            "config": dataclasses.asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the checkpoint belongs to a run whose weights or images differ, naming the options.
        """
        then, now = state["config"], dataclasses.asdict(self.config)
        differ = [
            f"{name} was {then.get(name)!r} and is {now[name]!r}"
            for name in now
            if name not in _FREE and then.get(name) != now[name]
        ]
        if (state["images"], state["classes"]) != (len(self.paths), self.classes):
            differ.append(f"the folder held {state['images']} images, now {len(self.paths)}, or its classes changed")
        if state["step"] > self.steps:
            differ.append(f"the checkpoint is at step {state['step']}, past the end of this run, {self.steps}")
        if differ:
            raise ValueError(f"cannot resume: {'; '.join(differ)} (to start from its weights only, use init)")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
        self.step, self.unreadable = state["step"], state["unreadable"]

    def loader(self) -> DataLoader:
        """The batches from the present step to the end of the run."""
        config = self.config
        dataset = ImageFolder(self.paths, self.labels, config.size, self.crop_scale, config.seed)
        stream = BatchStream(len(self.paths), config.batch, self.steps, self.step, config.seed)
        return batches(dataset, stream, config.workers, pin_memory=self.device.type == "cuda")

    def take_weights(self, path: str) -> None:
        """Start from the weights in a file: this trainer's, published, or timm's; fine-tuning may start from MAE."""
        source: Any = path
        size = None
        if not path.endswith(".safetensors"):
            source = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(source, dict) and isinstance(source.get("config"), dict):
                size = source["config"].get("size")  # this trainer's; tells of what shape the position embedding is
        loaded = load_weights(self.model, source, source_size=size)
        if self.config.progress:
            fresh = f", not in it: {' '.join(loaded.missing)}" if loaded.missing else ""
            print(f"weights from {path}{fresh}")

    def note_unreadable(self, batch: Batch) -> None:
        """Count the files that could not be read while this batch was made; warn of the first."""
        if batch.unreadable and not self.unreadable:
            path, why = next(iter(batch.unreadable.items()))
            warnings.warn(
                f"unreadable images are skipped; the first is {path} ({why}); the log names them all", stacklevel=2
            )
        self.unreadable |= batch.unreadable

    def diagnose(self, step: int, batch: Batch, in_a_row: int) -> NonFiniteError:
        """The error to stop with: a second pass over a kept batch, in which every module is watched."""
        culprit = first_non_finite(self.model, lambda: self.scaler.scale(self.loss(self.model, batch, step)))
        return NonFiniteError(step, in_a_row, batch.paths, culprit)

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        config = self.config
        classes = f" in {len(self.classes)} classes" if self.classes else ""
        return (
            f"{config.objective}: {config.model}, {parameters / 1e6:.1f} M parameters, "
            f"{'x'.join(map(str, config.size))} px, {config.precision} on {self.device}\n"
            f"{len(self.paths)} images{classes}, batch {config.batch}, steps {self.step} to {self.steps} "
            f"({self.steps * config.batch / len(self.paths):.1f} epochs), "
            f"learning rate up to {self.lr:.3g} after {self.warmup} steps of warm-up"
        )


def _given_or(given: float | None, default: float) -> float:
    return default if given is None else given

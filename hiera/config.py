"""The options of a training run: one dataclass, from which the command line is made."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


def _option(default: Any, help: str, **how: Any) -> Any:
    return field(default=default, metadata={"help": help, **how})


@dataclass
class Config:
    """Everything that defines a run; each field is an option of the command. None = what the help says."""

    data: str = _option(None, "folder of images; for classify one sub-folder per class", required=True)
    objective: str = _option("mae", "what to train", choices=("mae", "classify"))
    model: str = _option("hiera_base_224", "name of a model (hiera.list_models())")
    size: tuple[int, ...] = _option((224,), "pixels: one number, or height and width", nargs="+", type=int)
    batch: int = _option(64, "images per step")
    steps: int | None = _option(None, "length of the run in steps", type=int)
    epochs: float | None = _option(None, "length of the run in passes over the images", type=float)
    precision: str | None = _option(
        None, "bf16 and fp16 by autocast; default: bf16 on a GPU, fp32 on a CPU", choices=("bf16", "fp16", "fp32")
    )
    device: str | None = _option(None, "default: cuda if there is one, else cpu")
    accelerate: bool = _option(False, "swap the kernels of hiera_kernels in")
    compile: bool = _option(False, "torch.compile the model")
    init: str | None = _option(None, "checkpoint to take weights from (of this trainer or published; MAE to fine-tune)")
    checkpoint_dir: str | None = _option(None, "where checkpoints and log.jsonl go; default: none are written")
    resume: bool = _option(False, "go on from the newest checkpoint in --checkpoint-dir, or start if there is none")
    save_every: int = _option(1000, "steps between checkpoints")
    keep: int = _option(3, "checkpoints that stay")
    log: str | None = _option(None, "JSONL file, a line per step; default: log.jsonl in --checkpoint-dir")
    seed: int = _option(0, "of weights, order, crops, masks and augmentation")
    workers: int = _option(2, "processes that decode images; 0: the training process")
    lr: float | None = _option(None, "peak learning rate; default: the recipe's, scaled by the batch size", type=float)
    weight_decay: float | None = _option(None, "default: 0.05", type=float)
    warmup: int | None = _option(None, "steps; default: a tenth of the run for mae, a twentieth for classify", type=int)
    layer_decay: float | None = _option(None, "factor per layer from the output; default: per model", type=float)
    drop_path: float | None = _option(None, "of the last block; default: per model", type=float)
    clip_grad: float = _option(0.0, "largest gradient norm; 0: no clipping")
    mask_ratio: float = _option(0.6, "mae: share of mask units that are hidden")
    label_smoothing: float = _option(0.1, "classify")
    mixup: float = _option(0.8, "classify: Beta parameter; 0: off")
    cutmix: float = _option(1.0, "classify: Beta parameter; 0: off")
    randaugment: float = _option(9.0, "classify: magnitude up to 10; 0: off")
    erasing: float = _option(0.25, "classify: probability of random erasing")
    max_bad_steps: int = _option(10, "stop after so many non-finite steps in a row")
    progress: bool = _option(True, "progress bar and messages", action=argparse.BooleanOptionalAction)

    def __post_init__(self):
        self.size = tuple(self.size) * 2 if len(tuple(self.size)) == 1 else tuple(self.size)
        for name, allowed in (("objective", ("mae", "classify")), ("precision", ("bf16", "fp16", "fp32", None))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not self.data:
            raise ValueError("data must name a folder of images")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be one or two positive numbers, got {self.size}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps}, epochs={self.epochs}")
        for name in ("batch", "steps", "epochs", "save_every", "keep", "max_bad_steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("seed", "workers", "lr", "weight_decay", "warmup", "clip_grad", "mixup", "cutmix"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, most in {
            "drop_path": 1,
            "layer_decay": 1,
            "label_smoothing": 1,
            "erasing": 1,
            "randaugment": 10,
        }.items():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in 0 .. {most}, got {getattr(self, name)}")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.resume and not self.checkpoint_dir:
            raise ValueError("resume needs checkpoint_dir")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = self.precision or ("fp32" if torch.device(self.device).type == "cpu" else "bf16")
        if self.objective == "mae" and not self.model.startswith("mae_"):
            self.model = "mae_" + self.model
        if self.objective == "classify":
            self.model = self.model.removeprefix("mae_")


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The `Config` that a command line asks for; a mistake in it ends the program with a message and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m hiera.train",
        description="Pre-train (mae) or fine-tune (classify) on a folder of images.",
    )
    for option in dataclasses.fields(Config):
        how = dict(option.metadata)
        if option.default is not None and not isinstance(option.default, bool):
            how["help"] += f" (default: {' '.join(map(str, option.default)) if how.get('nargs') else option.default})"
        if option.default is False:
            how["action"] = "store_true"
        elif option.default is not None and "type" not in how and "action" not in how:
            how["type"] = type(option.default)
        parser.add_argument("--" + option.name.replace("_", "-"), default=option.default, **how)
    try:
        return Config(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))

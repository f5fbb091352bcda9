"""Folders of made photographs and a small run, shared by the trainer's tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hiera.config import Config


def picture(seed: int, height: int = 80, width: int = 110) -> Image.Image:
    """Smooth coloured blobs: something a network can learn, of odd size and never square."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root: Path, count: int = 10, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """`count` pictures, dealt out to class folders, and one file that is no image in the first class."""
    for i in range(count):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i:03d}.png")
    (root / classes[0] / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    return root


def small_run(data: Path, **options) -> Config:
    """Mini model at 64 x 96 pixels: about 30 ms a step."""
    settings = {"model": "hiera_mini_128", "size": (64, 96), "batch": 4, "steps": 6, "lr": 1e-3, "workers": 0}
    return Config(data=str(data), **(settings | {"progress": False, "device": "cpu"} | options))


def equal(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def timeless(history):
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "memory_mib")} for r in history]


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]

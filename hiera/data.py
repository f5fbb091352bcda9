"""A folder of photographs as an endless, exactly repeatable stream of training batches.

Everything random here is a function of (seed, position in the stream), never of how many workers run or of what was
drawn before. So a run that resumes at step s sees, to the bit, the batches that it would have seen without the
interruption, and no random state has to be kept.

Several GPUs: `BatchStream` takes `rank` and `world` and gives each process its own slice of every global batch.
Video: a clip reader takes the place of `ImageFolder`; the stream knows indices only. Evaluation: `ImageFolder` with a
centred crop in place of `random_crop`, and a plain sequential sampler.
"""

import functools
import math
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# ImageNet statistics of RGB in [0, 1], which every published Hiera was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """What a loader yields."""

    images: torch.Tensor  # uint8 [B, 3, H, W], RGB
    labels: torch.Tensor  # int64 [B]; all 0 where there are no classes
    paths: list[str]  # the file that each image was read from
    unreadable: dict[str, str]  # files that were met and could not be read -> why


def derived_seed(*numbers: int) -> int:
    """Mix non-negative integers into one 63-bit seed; different inputs give unrelated random streams.

    Equivalent to: `numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)`, without its highest bit.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def find_images(root: str | Path) -> list[str]:
    """Paths of all images below `root`, sorted; symbolic links are followed, hidden files and folders are not.

    Raises:
        ValueError: `root` is not a folder, or holds no file whose suffix is one of `SUFFIXES`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data must be a folder, got {str(root)!r}")
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(folder, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    if not found:
        raise ValueError(f"no image below {str(root)!r} (suffixes looked for: {' '.join(SUFFIXES)})")
    return sorted(found)


def find_classes(root: str | Path) -> tuple[list[str], list[int], list[str]]:
    """Images, labels and class names of a folder with one sub-folder per class; class i is the i-th name in order.

    Raises:
        ValueError: fewer than two sub-folders, or a sub-folder without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data must be a folder, got {str(root)!r}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"objective 'classify' needs one folder per class below {str(root)!r}, found {classes}")
    per_class = [find_images(root / name) for name in classes]
    paths = [path for members in per_class for path in members]
    labels = [label for label, members in enumerate(per_class) for _ in members]
    return paths, labels, classes


def read_image(path: str) -> Image.Image:
    """Decode one image file to 8-bit RGB, upright.

    EXIF orientation is applied, transparency is laid over white, 16-bit images keep their high byte, float images in
    [0, 1] are scaled to [0, 255], and of several frames the first is taken.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot decode whole.
    """
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, once per worker and file, help nobody
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image).astype(np.float64)
            scale = (255.0 if values.max() <= 1 else 1.0) if image.mode == "F" else 1 / 257
            image = Image.fromarray(np.clip(np.nan_to_num(values * scale), 0, 255).round().astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def random_crop(
    image: Image.Image, size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """Cut a random box out of `image`, resize it to `size` (height, width) bicubically, mirror every second one.

    The box covers a share of the image drawn from `scale`; its aspect ratio is that of `size` times a factor drawn
    log-uniformly from 3/4 to 4/3. If ten draws do not fit, the largest centred box of the nearest allowed ratio is
    taken.

    Equivalent to: torchvision's RandomResizedCrop and RandomHorizontalFlip, for a square `size`.
    """
    width, height = image.size
    target = size[1] / size[0]
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = target * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            break
    else:
        ratio = min(max(width / height, target * 3 / 4), target * 4 / 3)
        w, h = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - w) / 2, (height - h) / 2
    box = (left, top, min(left + w, width), min(top + h, height))
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


class ImageFolder(Dataset):
    """Images by (position in the stream, index): the index says which file, the position which random crop of it.

    A file that cannot be read gives its place to the next one that can, in the order of `paths`, and is reported with
    the sample, so that training neither stops nor changes the size of a batch.

    Args:
        paths: image files.
        labels: class of each file, or None.
        size: (height, width) of the crop in pixels.
        scale: smallest and largest share of the image's area that a crop covers.
        seed: of the crops.

    Raises:
        ValueError: (when indexed) if no file at all can be read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        size: tuple[int, int],
        scale: tuple[float, float],
        seed: int = 0,
    ):
        self.paths, self.labels, self.size, self.scale, self.seed = paths, labels, size, scale, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, str, dict[str, str]]:
        position, index = key
        rng = np.random.default_rng(derived_seed(self.seed, 1, position))
        unreadable = {}
        for i in range(len(self.paths)):
            i = (index + i) % len(self.paths)
            path = self.paths[i]
            try:
                image = random_crop(read_image(path), self.size, self.scale, rng)
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...; none may end the run
                unreadable[path] = f"{type(error).__name__}: {error}"
                continue
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            return pixels, self.labels[i] if self.labels else 0, path, unreadable
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of the {len(self.paths)} images can be read; the first, {path}: {why}")


class BatchStream(Sampler[list[tuple[int, int]]]):
    """Yields for each step the (position, index) pairs of one process's batch.

    The stream is one shuffled epoch after another, and batches are cut from it without a gap: every image comes once
    per epoch, a batch may straddle two epochs, and a folder smaller than a batch works. The order of an epoch is a
    function of (seed, epoch) alone; step k starts at position k * batch * world.

    Args:
        images: number of images in the folder.
        batch: batch size of one process.
        steps: the step to end before.
        start: the step to begin with.
        seed: of the order.
        rank: which process of `world` this is.
        world: number of processes that share each step.
    """

    def __init__(
        self, images: int, batch: int, steps: int, start: int = 0, seed: int = 0, rank: int = 0, world: int = 1
    ):
        self.images, self.batch, self.steps, self.start = images, batch, steps, start
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)

    def order(self, epoch: int) -> list[int]:
        """Permutation of the images in this epoch."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 0, epoch))
        return torch.randperm(self.images, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch
            batch = []
            for position in range(first, first + self.batch):
                if position // self.images != epoch:
                    epoch = position // self.images
                    order = self.order(epoch)
                batch.append((position, order[position % self.images]))
            yield batch


def _collate(samples: list[tuple[torch.Tensor, int, str, dict[str, str]]]) -> Batch:
    images, labels, paths, unreadable = zip(*samples, strict=True)
    bad = {path: why for each in unreadable for path, why in each.items()}
    return Batch(torch.stack(images), torch.tensor(labels), list(paths), bad)


def _leave_signals_to_the_parent(_worker: int) -> None:
    # Ctrl-C reaches the whole process group, and a fork inherits the trainer's handlers: the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches(dataset: ImageFolder, stream: BatchStream, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A loader of `Batch`es: the samples that `stream` asks for, decoded by `workers` processes (0: by this one)."""
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 RGB [B, 3, H, W] -> float32 of zero mean and unit variance over ImageNet, on the images' device.

    Equivalent to: `(images / 255 - MEAN) / STD` per channel.
    """
    mean, std = _statistics(images.device)
    return (images.float() / 255 - mean) / std


@functools.cache
def _statistics(device: torch.device) -> torch.Tensor:
    # Made once per device: each copy of Python numbers to a GPU would make the host wait for it.
    return torch.tensor([MEAN, STD], device=device)[:, :, None, None]

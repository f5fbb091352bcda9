"""Checkpoints of a training run: written so that a kill at any moment leaves a loadable one."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step_(\d{9})\.pt")


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first; an absent folder has none."""
    folder = Path(folder)
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def save(state: dict[str, Any], folder: str | Path, step: int, keep: int = 3) -> Path:
    """Write `state` to `folder`/step_<step>.pt in one atomic act, then delete all but the `keep` newest checkpoints.

    The bytes go to a temporary file, reach the disk, and only then take the final name; the folder entry reaches the
    disk too. A reader therefore finds the old set of checkpoints or the new one, never a part of one.

    Args:
        state: tensors, numbers, strings, and lists, tuples and dicts of them: what `torch.load(weights_only=True)`
            takes.
        folder: created if absent.
        step: number of steps done.
        keep: how many checkpoints stay, at least 1.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    part = path.with_suffix(".pt.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    for left_by_a_kill in folder.glob("step_*.pt.part"):
        left_by_a_kill.unlink(missing_ok=True)
    return path


def load_latest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in `folder` that can be read (on the CPU), with its path; None if there is none.

    Raises:
        ValueError: checkpoints exist, and not one of them can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged disk or an incomplete copy: an older checkpoint is better than none
            warnings.warn(
                f"{path} cannot be read ({type(error).__name__}: {error}); trying the one before", stacklevel=2
            )
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {str(folder)!r} can be read")
    return None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

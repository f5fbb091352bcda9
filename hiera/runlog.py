"""What a run tells while it goes: a progress bar for people, a line of JSON per step for programs."""

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: what torch allocated on a GPU, the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class RunLog:
    """Progress bar and JSONL file of one run; either can be absent.

    A run that resumes first drops the lines of steps that it is going to repeat, and a last line that a kill cut off,
    so that the file has every step once. Numbers that JSON cannot hold (NaN, infinities) are written as null.

    Args:
        path: JSONL file; begun anew by a run that starts at step 0; None for no file.
        steps: length of the bar.
        start: steps already done.
        progress: show the bar.
    """

    def __init__(self, path: str | Path | None, steps: int, start: int, progress: bool):
        self.file = None
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_before(path, start)
            part = path.with_name(path.name + ".part")
            part.write_text("".join(kept))
            os.replace(part, path)
            # Line-buffered: a kill loses at most the line in flight.
            self.file = open(path, "a", buffering=1)  # noqa: SIM115
        # On a terminal the bar moves smoothly; in a log file every line stays, so let there be few.
        interval = 0.1 if sys.stderr.isatty() else 5.0
        self.bar = tqdm(total=steps, initial=start, disable=not progress, unit="step", mininterval=interval)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.file:
            self.file.close()

    def step(self, record: dict[str, Any]) -> None:
        """Write one step's record and move the bar."""
        self.write(record)
        shown = {
            "loss": f"{record['loss']:.4f}",
            "img/s": f"{record['images_per_second']:.1f}",
            "MiB": f"{record['memory_mib']:.0f}",
        }
        shown |= {name: record[name] for name in ("skipped", "unreadable") if record[name]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def write(self, record: dict[str, Any]) -> None:
        """Write one line: a step's record, or an event that is no step."""
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self.file.write(json.dumps(finite) + "\n")


def _lines_before(path: Path, start: int) -> list[str]:
    if not start or not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept

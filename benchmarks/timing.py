"""Paired timing: all candidates take turns in one run, so that whatever else the machine does hits them alike."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

COLD_BYTES = 256 << 20  # inputs are rotated through at least this much memory: more than the last-level cache holds


@dataclass
class Samples:
    """The seconds that one candidate took, round by round; round i of all candidates belongs together."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        """The q-quantile in seconds, linearly interpolated."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))

    def speed_of(self, other: "Samples") -> float:
        """How fast this is as a fraction of `other`: the median over rounds of other's time / this one's time."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def best_speed_of(self, other: "Samples") -> float:
        """The same of the fastest round of each: what is left when nobody else uses the machine."""
        return min(other.seconds) / min(self.seconds)


def rotate(make: Callable[[], Sequence]) -> list[Sequence]:
    """Several sets of inputs, so many that a set is out of the caches when its turn comes again."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    return [first] + [make() for _ in range(min(63, max(1, -(-COLD_BYTES // max(1, size)))))]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired(
    candidates: dict[str, Callable],
    inputs: list[Sequence],
    device: torch.device,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (15, 400),
) -> dict[str, Samples]:
    """Time every candidate on the same rotating inputs, interleaved in a shuffled order, for about `seconds` in all.

    Each call's result is dropped before the next call starts, outside the timed span.
    """
    shuffled = random.Random(0)
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    turn = 0

    def measure(name: str) -> float:
        nonlocal turn
        turn += 1
        arguments = inputs[turn % len(inputs)]
        _synchronize(device)
        start = time.perf_counter()
        result = candidates[name](*arguments)
        _synchronize(device)
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    for name in names:  # warm up: allocator, thread pool, code
        measure(name)
        measure(name)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(samples[names[0]]) < rounds[1]:
            if len(samples[names[0]]) >= rounds[0] and time.perf_counter() > end:
                break
            shuffled.shuffle(names)
            for name in names:
                samples[name].append(measure(name))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(values) for name, values in samples.items()}

"""Paired timing: all candidates take turns in one run, so that whatever else the machine does hits them alike.

On a GPU a call is timed by events, from an idle device to the end of its last kernel: a short op shows what its launch
costs. `captured` takes the launches out: many calls in one CUDA graph.
"""

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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


def rotate(make: Callable[[], Sequence], cold_bytes: int = COLD_BYTES) -> list[Sequence]:
    """Several sets of inputs, so many that a set is out of the caches when its turn comes again.

    The first is what `make` returns, the others are copies of it in memory of their own, strides and all.
    """
    first = make()
    return [first] + [tuple(map(_copy, first)) for _ in range(sets(first, cold_bytes) - 1)]


def sets(first: Sequence, cold_bytes: int = COLD_BYTES) -> int:
    """How many sets of inputs like `first` the caches cannot hold; at most 64."""
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    return 1 + min(63, max(1, -(-cold_bytes // max(1, size))))


def _copy(x):
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes on an idle device; its result is dropped after the time is taken."""
    synchronize(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
    else:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
    del result
    return elapsed


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
        return time_once(lambda: candidates[name](*arguments), device)

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


@contextlib.contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises.

    Before a capture and not in it: a capture that fails of it leaves PyTorch's generator in capture mode, and every
    random number drawn on the GPU afterwards is then an error.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Captured:
    """Calls 0 ... count-1 of a function as one CUDA graph, all results alive, so that each call writes memory of its
    own.

    Args:
        call: Takes the number of an input set, and with `before` what `before` returned for it.
        count: Number of input sets.
        before: Captured in a graph of its own and replayed once, untimed: the forward in front of a backward.
    """

    def __init__(self, call: Callable, count: int, before: Callable | None = None):
        self.count = count
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile, allocate, choose algorithms: nothing of it may happen in a capture
            for turn in range(2):
                i = turn % count
                with refusing_to_wait() if turn else contextlib.nullcontext():  # to compile may wait
                    call(i, before(i)) if before else call(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph, self.first, made = torch.cuda.CUDAGraph(), None, []
        if before:
            self.first = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.first):
                made = [before(i) for i in range(count)]
        with torch.cuda.graph(self.graph, pool=self.first.pool() if self.first else None):
            kept = [call(i, made[i]) if before else call(i) for i in range(count)]
        self.kept = made, kept
        if self.first:
            self.first.replay()

    def __call__(self) -> None:
        """Replay all calls."""
        self.graph.replay()


def per_call(samples: Samples, calls: int) -> Samples:
    """The samples of a graph of so many calls, as seconds of one call."""
    return Samples([seconds / calls for seconds in samples.seconds])

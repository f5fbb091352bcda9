"""Set up every candidate of a workload, judge it, then let all take turns: what `benchmarks.model` measures with."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks import rivals
from benchmarks.model_parity import Judge, reading, relative, same_as_eager
from benchmarks.timing import Samples, refusing_to_wait
from benchmarks.workloads import Workload, step

PARITY_BATCH = 2


@dataclass
class Entry:
    """One candidate in one mode, on its way from a name to a row."""

    candidate: str
    mode: str
    other: bool = False  # one of the zoo: no parity is asked of it
    parity: str = "not compared"
    verdict: str = ""
    error: str | None = None
    run: Callable | None = None
    resting_bytes: int = 0  # parameters, gradients' absence, optimizer state, private pools
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)


def measure(
    workload: Workload,
    entries: list[Entry],
    device: torch.device,
    precision: str,
    rounds: int,
    deadline: float = float("inf"),
) -> list[dict]:
    """The rows of one workload (schema: results/README.md), but for `dtype`.

    A candidate that cannot be built, runs out of memory or fails is a row that says so; the others go on. None is set
    up after the deadline, a time of `time.perf_counter()`: those that are set up by then are timed.
    """
    # So that a compiled model's random draws are the eager one's; what they cost is lost in a step.
    torch._inductor.config.fallback_random = True
    try:
        judge = _judge(workload, device, precision)
        inputs = _cast(workload.inputs(device, workload.batch, workload.size), precision)
    except Exception as error:  # without stock there is nothing to compare with, and no time for anybody
        for entry in entries:
            entry.error = f"no stock to compare with: {_reason(error)}"
        return [_row(workload, entry) for entry in entries]
    for entry in entries:
        if time.perf_counter() > deadline:
            entry.error = "no time was left"
            continue
        _attempt(entry, lambda entry=entry: _prepare(entry, workload, inputs, device, precision, judge))
        _settle(device)
    order = random.Random(0)
    ready = [entry for entry in entries if entry.run]
    for _ in range(rounds):
        order.shuffle(ready)
        for entry in [e for e in ready if e.run]:
            _attempt(entry, lambda entry=entry: entry.seconds.append(_timed(entry.run, device)))
    rows = [_row(workload, entry) for entry in entries]
    for entry in entries:
        entry.run = None
    torch._dynamo.reset()
    _settle(device)
    return rows


def _judge(workload: Workload, device: torch.device, precision: str) -> Judge:
    size = workload.parity_size or workload.size
    model = _placed(rivals.stock(workload, size).train(workload.training), device, precision, torch.float32)
    inputs = workload.inputs(device, min(PARITY_BATCH, workload.batch), size)
    if precision == "bf16-cast":
        model = model.bfloat16()
    dtype = torch.bfloat16 if precision == "bf16-cast" else torch.float32
    return Judge(workload, model, inputs, rivals.autocast_of(precision, device), dtype)


def _prepare(entry, workload, inputs, device, precision, judge) -> None:
    """Build, judge, warm up; leaves `entry.run`, or a red verdict without it."""
    autocast = rivals.autocast_of(precision, device)
    before = _allocated(device)
    if entry.other:
        model = _placed(rivals.build_other(entry.candidate, workload), device, precision)
    else:
        model = _placed(rivals.build(entry.candidate, workload, workload.size), device, precision)
        if not _is_same(entry, workload, model, device, precision, judge):
            return
    runner = rivals.compiled(model, entry.mode)
    if entry.mode in rivals.COMPILED and not entry.other:
        eager, other = (reading(workload, each, inputs, autocast) for each in (model, runner))
        if not same_as_eager(eager, other, judge):
            entry.parity, entry.verdict = "red", "the compiled step is not the eager one"
            return
    optimizer = scaler = None
    if workload.training:
        # A rate of 0 costs what any other does, and keeps every step the same computation.
        settings = {"capturable": True} if entry.mode == "cuda-graph" else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05, fused=True, **settings)
        scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    run = lambda: step(workload, runner, inputs, optimizer, autocast, scaler)  # noqa: E731
    if entry.other:  # the others have run already, to be compared
        run()
    # The peak is that of the steps that still allocate: a replayed graph finds its memory in a pool, which no
    # statistic of the allocator counts as in use ("max-autotune" replays too, from its third step).
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        run()
    if entry.mode == "cuda-graph":
        run, eager = captured(run), run
        if not replays(run, eager, judge):
            entry.parity, entry.verdict = "red", "the replayed step is not the eager one"
            return
    entry.resting_bytes = _allocated(device) - before
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        entry.peak = torch.cuda.max_memory_allocated(device) - before
    entry.run = run


def _is_same(entry, workload, model, device, precision, judge) -> bool:
    """Judge the candidate itself, or where the size is too large for fp64 its twin of a smaller one."""
    twin = model
    if workload.parity_size:
        twin = _placed(rivals.build(entry.candidate, workload, workload.parity_size), device, precision)
    if entry.candidate == "stock":
        return True
    verdict = judge(twin)
    entry.parity, entry.verdict = ("green" if verdict.ok else "red"), str(verdict)
    return verdict.ok


def captured(run: Callable) -> Callable:
    """The step as one CUDA graph: a call replays it. The inputs are read where they lie.

    Raises:
        RuntimeError: the step synchronises with the host, or allocates outside PyTorch's pools.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own streams and lazy state belong to the side stream first
        run()
        with refusing_to_wait():
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay():
        graph.replay()
        return result

    return replay


def replays(replay: Callable, eager: Callable, judge: Judge) -> bool:
    """Whether a captured step, replayed from the same seed, gives the eager step's result."""
    found = []
    for each in (eager, replay):
        torch.manual_seed(0)
        found.append(each().clone())
    return relative(found[1], found[0]) <= 3 * statistics.median(judge.own.values()) + judge.eps


def _placed(model: nn.Module, device: torch.device, precision: str, dtype: torch.dtype | None = None) -> nn.Module:
    if dtype is None:
        dtype = torch.bfloat16 if precision == "bf16-cast" else torch.float32
    return model.to(device=device, dtype=dtype)


def _cast(inputs: tuple, precision: str) -> tuple:
    return (inputs[0].bfloat16(), *inputs[1:]) if precision == "bf16-cast" else inputs


def _timed(run: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _attempt(entry: Entry, action: Callable) -> None:
    """Do it; a failure becomes the entry's own, because the other candidates still have something to say."""
    try:
        action()
    except Exception as error:  # whatever a compiler, a rival or a capture may raise: it is the row's result
        entry.error, entry.run = _reason(error), None


def _reason(error: Exception) -> str:
    if isinstance(error, rivals.Absent):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def _row(workload: Workload, entry: Entry) -> dict:
    samples = Samples(entry.seconds) if entry.seconds and entry.run else None
    row = {
        "case": workload.name,
        "model": entry.candidate if entry.other else workload.model,
        "objective": workload.objective,
        "batch": workload.batch,
        "size": list(workload.size),
        "mask_ratio": workload.mask_ratio,
        "drop_path": workload.drop_path,
        "candidate": entry.candidate,
        "mode": entry.mode,
        "peer": not entry.other,
        "parity": entry.parity,
        "verdict": entry.verdict,
        "error": entry.error,
        "rounds": len(entry.seconds),
        "peak_memory_bytes": entry.peak,
        "resting_bytes": entry.resting_bytes,
    }
    for key, q in (("ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
        row[key] = samples.quantile(q) * 1e3 if samples else None
    row["images_per_s"] = workload.batch / samples.quantile(0.5) if samples else None
    return row


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Compare, then time: the rows of one `Case`."""

import functools
from collections.abc import Callable

import torch

from benchmarks import parity, timing
from benchmarks.timing import Samples
from benchmarks.trial import CLONE, OURS, Case, Trial, differentiable, first_line, leaves_of, verdicts

# What one candidate may hold between forward and backward. Beyond it fewer input sets take turns, which is as good: no
# cache holds so much.
HELD_BYTES = 2 << 30
NOT_TIMED = ("median_us", "p20_us", "p80_us", "gb_per_s", "of_clone", "of_copy")


def measure(
    case: Case,
    device: torch.device,
    passes: tuple[str, ...],
    seconds: float,
    copy_gb_per_s: float | None = None,
    rounds: tuple[int, int] = (15, 400),
    cold_bytes: int = timing.COLD_BYTES,
    graphs: bool = True,
    tf32: bool = False,
) -> list[dict]:
    """One row per pass, candidate and, on a GPU, way of launching (eager; CUDA graph); ours first, no speed without
    parity.

    Args:
        passes: Of "forward", "backward", "both"; an op without a gradient has a forward only.
        seconds: For all candidates of one pass together.
        copy_gb_per_s: The device's measured ceiling, for the column `of_copy`.
        rounds: How often each candidate is timed, at least and at most.
        cold_bytes: Inputs are rotated through at least this much memory.
        graphs: On a GPU, time CUDA graphs too.
        tf32: PyTorch has been told to multiply fp32 by TF32.
    """
    trial = case.build(device)
    trial.tf32 = tf32
    if any(name.startswith(("compiled", "flex")) for name in trial.candidates):
        torch._dynamo.reset()  # what it keeps of the case before would count against its limits
    found = verdicts(trial, passes)
    inputs = timing.rotate(trial.make, cold_bytes)
    rows = []
    for name in passes:
        if name != "forward" and not leaves_of(inputs[0]):
            continue
        rows += _rows_of_pass(
            case, trial, name, found, inputs, device, seconds, copy_gb_per_s, rounds, graphs and device.type == "cuda"
        )
    return rows


def _rows_of_pass(case, trial, name, found, inputs, device, seconds, copy_gb_per_s, rounds, graphs) -> list[dict]:
    moved = trial.bytes_of(name)
    status = {candidate: _status(found[candidate], name) for candidate in trial.candidates}
    calls, for_graph = {}, {}
    for candidate, (verdict, _) in status.items():
        if verdict == parity.GREEN:
            try:
                calls[candidate], *for_graph[candidate] = _calls(trial, candidate, name, inputs, device)
            except Exception as raised:
                status[candidate] = (verdict, first_line(raised))
    blocks = [torch.empty(moved // 2, dtype=torch.uint8, device=device).random_() for _ in inputs]
    calls[CLONE] = lambda i: blocks[i].clone()
    samples = timing.paired(calls, [(i,) for i in range(len(inputs))], device, seconds, rounds)
    peaks = {candidate: _peak(functools.partial(call, 0), device) for candidate, call in calls.items()}

    def row(candidate: str, taken: Samples | None, clone: Samples | None, graph: bool, error: str | None) -> dict:
        verdict = status[candidate][0] if candidate in status else None
        made = {
            "op": case.op,
            "case": case.label + ("" if name == "forward" else f" {name}") + (" graph" if graph else ""),
            "candidate": candidate,
            "shape": case.shape,
            "batch": case.batch,
            "dtype": "tf32" if trial.tf32 else str(case.dtype).removeprefix("torch."),
            "pass": name,
            "graph": graph,
            "bytes": moved,
            "rounds": len(taken.seconds) if taken else 0,
            **dict.fromkeys(NOT_TIMED),
            "peak_memory_bytes": peaks.get(candidate),
            "parity": verdict,
            "error": error,
        }
        if taken:
            made |= {f"{key}_us": taken.quantile(q) * 1e6 for key, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
            made["gb_per_s"] = moved / made["median_us"] / 1e3
            made["of_clone"] = taken.speed_of(clone)
            made["of_copy"] = made["gb_per_s"] / copy_gb_per_s if copy_gb_per_s else None
        return made

    rows = []
    for candidate in [*status, CLONE]:
        error = status[candidate][1] if candidate in status else None
        rows.append(row(candidate, samples.get(candidate), samples[CLONE], False, error))
    if not graphs:
        return rows
    calls.clear()  # and with it what the backward of every candidate holds
    for candidate in [*status, CLONE]:
        if candidate in status and candidate not in samples:
            continue  # the eager row says why
        taken, clone, error = _graph_samples(for_graph.get(candidate), blocks, device, seconds / len(samples), rounds)
        rows.append(row(candidate, taken, clone, True, error))
    return rows


def _status(found: dict, name: str) -> tuple[str, str | None]:
    """Parity and error of a pass: of "both", the first that is not green."""
    parts = {"forward": ["forward"], "backward": ["forward", "backward"], "both": ["forward", "backward"]}[name]
    for part in parts:
        if found[part][0] != parity.GREEN:
            return found[part]
    return parity.GREEN, None


def _calls(trial: Trial, candidate: str, name: str, inputs: list, device: torch.device) -> tuple:
    """What is timed, as a function of an input set's number; for a graph: what comes before, call, how many sets."""
    function = trial.candidates[candidate]

    def forward(i):
        return differentiable(parity.flat(function(*inputs[i])))

    def backward(i, outputs, retain=True):
        return torch.autograd.grad(outputs, leaves_of(inputs[i]), grads[i], retain_graph=retain)

    if name == "forward":

        def plain(i):
            with torch.no_grad():
                return function(*inputs[i])

        return plain, None, plain, len(inputs)
    grads = [[torch.randn_like(x.detach()) for x in forward(i)] for i in range(len(inputs))]
    kept = _peak(functools.partial(forward, 0), device) or 0
    count = min(len(inputs), max(1, HELD_BYTES // max(1, kept)))
    if name == "both":

        def both(i):
            outputs = forward(i)
            return outputs, backward(i, outputs, retain=False)

        return both, None, both, count
    held = [forward(i) for i in range(count)]
    return lambda i: backward(i % count, held[i % count]), forward, backward, count


def _graph_samples(parts, blocks, device, seconds, rounds):
    """Samples of a candidate's graph and, paired with it, of a graph of clones; or None and the error."""
    before, call, count = parts or (None, None, len(blocks))
    try:
        clone = timing.Captured(lambda i: blocks[i].clone(), count)
        ours = timing.Captured(call, count, before) if call else clone
        both = {OURS: ours, CLONE: clone}
        taken = timing.paired(both, [()], device, seconds, (rounds[0], rounds[1]))
    except Exception as error:
        torch.cuda.synchronize()
        return None, None, first_line(error)
    return timing.per_call(taken[OURS], count), timing.per_call(taken[CLONE], count), None


def _peak(call: Callable, device: torch.device) -> int | None:
    """Bytes that a call allocates at most beyond what is there already, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before

"""Train a Hiera on a folder of images: `python -m hiera.train --objective mae --data DIR --model hiera_base_224 ...`.

From Python: `fit(Config(data=..., ...))`. One process, one device, images. Several GPUs enter at `BatchStream`
(data.py) and at `GuardedStep` (guard.py), video at `ImageFolder` (data.py), evaluation where `fit` saves.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hiera import checkpoint
from hiera.config import Config, parse
from hiera.data import Batch
from hiera.guard import NonFiniteError, ReadLate, StepStats
from hiera.run import Run
from hiera.runlog import RunLog, memory_mib


@dataclass
class Result:
    """What a run leaves: the trained model (swapped, not compiled), a record per step, and how many steps are done."""

    model: nn.Module
    history: list[dict[str, Any]]
    step: int


class _Done(NamedTuple):
    """A step that is under way on the device: what its record needs besides the stats."""

    step: int
    batch: Batch
    lr: float
    seconds: float
    unreadable: int


def fit(
    config: Config,
    callback: Callable[[dict[str, Any], nn.Module], None] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Train as `config` says.

    The caller's random state is left as it was. What a step costs the host: no synchronisation with the device but that
    on the step before (see guard.py).

    Args:
        config: the run.
        callback: called with each step's record, one step late, and the model. A record has the keys step (from 0),
            epoch, loss, lr (of the last layer), grad_norm, seconds, images_per_second, memory_mib, skipped (steps
            skipped so far) and unreadable (files skipped so far). `history` and the JSONL file hold the same records.
        stop: when set, the run saves a checkpoint after the step in progress and returns.

    Raises:
        ValueError: the folder, the options or the checkpoint to resume from do not fit together.
        NonFiniteError: `config.max_bad_steps` steps in a row had a non-finite loss or gradient norm.
    """
    devices = [config.device] if torch.device(config.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _fit(Run(config), callback, stop or threading.Event())


def _fit(run: Run, callback: Callable | None, stop: threading.Event) -> Result:
    config = run.config
    _load(run)
    if config.accelerate:
        import hiera_kernels

        print(hiera_kernels.accelerate(run.model))
    model = torch.compile(run.model) if config.compile else run.model
    if config.progress:
        print(run)

    history: list[dict[str, Any]] = []
    late, under_way, clock = ReadLate(), None, time.perf_counter()
    log_path = config.log or (config.checkpoint_dir and f"{config.checkpoint_dir}/log.jsonl")
    with RunLog(log_path, run.steps, run.step, config.progress) as log:

        def report(stats: StepStats | None, done: _Done | None) -> None:
            if stats is None:
                return
            record = {
                "step": done.step,
                "epoch": done.step * config.batch / len(run.paths),
                "loss": stats.loss,
                "lr": done.lr,
                "grad_norm": stats.grad_norm,
                "seconds": done.seconds,
                "images_per_second": config.batch / done.seconds,
                "memory_mib": memory_mib(run.device),
                "skipped": int(stats.skipped_in_all),
                "unreadable": done.unreadable,
            }
            log.step(record | ({"unreadable_files": done.batch.unreadable} if done.batch.unreadable else {}))
            history.append(record)
            if callback:
                callback(record, run.model)
            if stats.bad_in_a_row >= config.max_bad_steps:
                error = run.diagnose(done.step, done.batch, int(stats.bad_in_a_row))
                log.write({"event": "stopped", "step": done.step, "culprit": error.culprit, "images": error.paths})
                raise error

        for batch in run.loader():
            run.note_unreadable(batch)
            lr = run.set_learning_rate()
            stats = run.guard(run.loss(model, batch, run.step))
            report(late.push(stats), under_way)
            now = time.perf_counter()
            under_way, clock = _Done(run.step, batch, lr, now - clock, len(run.unreadable)), now
            run.step += 1
            last = run.step == run.steps or stop.is_set()
            if last or run.step % config.save_every == 0:
                report(late.pop(), under_way)
                if config.checkpoint_dir:
                    checkpoint.save(run.state_dict(), config.checkpoint_dir, run.step, config.keep)
            if last:
                break
    return Result(run.model, history, run.step)


def _load(run: Run) -> None:
    """Weights and state that the run begins with."""
    config = run.config
    if config.checkpoint_dir and not config.resume and checkpoint.checkpoints(config.checkpoint_dir):
        raise ValueError(f"{config.checkpoint_dir!r} holds checkpoints already: resume, or choose another folder")
    found = checkpoint.load_latest(config.checkpoint_dir) if config.resume else None
    if found:
        path, state = found
        run.load_state_dict(state)
        if config.progress:
            print(f"resuming from {path} at step {run.step}")
    elif config.init:
        run.take_weights(config.init)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 when done, 1 when stopped by an error, 128 + signal when interrupted (state saved)."""
    config = parse(arguments)
    stop, caught = threading.Event(), []

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is not asked to wait

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = fit(config, stop=stop)
    except (ValueError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught and result.step:
        saved = f"saved in {config.checkpoint_dir}" if config.checkpoint_dir else "nothing saved (no --checkpoint-dir)"
        print(f"interrupted after {result.step} steps; {saved}", file=sys.stderr)
        return 128 + caught[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The launch table of the attention kernels, measured: which tiles, warps and units per program are fastest here.

    python -m benchmarks.ops mask_unit_attention --tune                       # every published shape; prints the rows
    python -m benchmarks.ops mask_unit_attention --tune --write hiera_kernels/kernels/launch_table.py
    python -m benchmarks.ops mask_unit_attention --tune --shape hiera_large_224.stage1 --dtype float16
    python -m benchmarks.ops mask_unit_attention --tune --dry-run --arch sm_90    # count the configurations; no GPU
    python -m benchmarks.ops mask_unit_attention --tune --dry-run --arch sm_90 --compile --shape hiera_base_224.stage1

For each kernel (direction, S, K, D, dtype, architecture) the legal configurations are listed (tune_space.py), compiled,
compared with an fp64 oracle, and timed with cold caches in a CUDA graph, nearest to the table's first. The fastest
becomes a row of `TUNED` in hiera_kernels/kernels/launch_table.py if it beats what the table has by 2 %; other rows
stay. 16-bit configurations that spill registers are refused, as by the compile gate, which looks at more variants (the
gradient of the bias, ties): run `make gate` afterwards. window_attention takes its configurations from the same table.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import attention_shapes
from benchmarks.attention import CUDA
from benchmarks.attention_shapes import AttentionShape
from benchmarks.machine import current_commit, environment
from benchmarks.tune_space import Key, candidates, directions, rule
from benchmarks.tune_table import Row, difference, line, write
from hiera_kernels.kernels.launch_table import MAX_KEYS, Tiles

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MARGIN = 0.02  # what a new row must gain


def choose(seconds: dict[Tiles, float], own: Tiles, margin: float = MARGIN) -> Tiles:
    """The fastest configuration, or the table's own where nothing beats it by `margin`.

    Args:
        seconds: By configuration; a refused one is not in it.
    """
    best = min(seconds, key=lambda tile: (seconds[tile], tile != own), default=own)
    if own in seconds and seconds[best] > (1 - margin) * seconds[own]:
        return own
    return best


def tune(key: Key, clock, tiles: Sequence[Tiles], deadline: float = float("inf")) -> tuple[Row, dict]:
    """Time configurations of one kernel until the deadline; the row for the table and everything that was measured.

    Args:
        clock: For a configuration, (seconds, None) or (None, why it is refused).
        tiles: What is tried, the table's own first.
        deadline: As `time.monotonic` counts.
    """
    own, seconds, refused = tiles[0], {}, {}
    for tile in tiles:
        if time.monotonic() > deadline and seconds:
            break
        taken, reason = clock(tile)
        if reason is None:
            seconds[tile] = taken
        else:
            refused[tile] = reason
    best = choose(seconds, own)
    if best not in seconds:
        comment = "nothing could be timed"
    else:
        comment = f"{1e6 * seconds[best]:.1f} us, {len(seconds)} tried"
        if own in seconds:
            comment = f"{1e6 * seconds[best]:.1f} us, before {1e6 * seconds[own]:.1f} us, {len(seconds)} tried"
    record = {
        "key": list(key),
        "before": own._asdict(),
        "best": best._asdict(),
        "us": [[1e6 * s, *tile] for tile, s in sorted(seconds.items(), key=lambda item: item[1])],
        "refused": [[reason, *tile] for tile, reason in refused.items()],
        "untried": len(tiles) - len(seconds) - len(refused),
    }
    return Row(difference(best, rule(key)), comment), record


def work(shape_name: str | None, dtype: str, capability: tuple[int, int]) -> list[tuple[Key, AttentionShape, int]]:
    """(key, shape, batch) of every kernel to be tuned, those of the benchmark's tables first, each once."""
    shapes = [(attention_shapes.named(name), batch) for name, batch in CUDA]
    shapes += [(shape, 64) for shape in attention_shapes.published() if "16x" not in shape.model]
    if shape_name:
        shapes = [(attention_shapes.named(shape_name), dict(CUDA).get(shape_name, 64))]
    found: dict[Key, tuple] = {}
    for shape, batch in shapes:
        for direction in directions(shape.K) if shape.K <= MAX_KEYS else ():
            key = (direction, shape.S, shape.K, shape.D, 8 * DTYPES[dtype].itemsize, capability[0])
            found.setdefault(key, (key, shape, batch))
    return list(found.values())


def _arch(text: str) -> tuple[int, int]:
    digits = text.removeprefix("sm_")
    if not digits.isdigit() or len(digits) < 2:
        raise argparse.ArgumentTypeError(f"an architecture is written like sm_90, got {text!r}")
    return int(digits[:-1]), int(digits[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops mask_unit_attention --tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", choices=["mask_unit_attention"], help="the op that has a launch table")
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--shape", metavar="NAME", help="one shape, as hiera_base_224.stage1 (default: all published)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="rows are for both")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried; needs no GPU")
    parser.add_argument("--arch", type=_arch, metavar="sm_NN", help="with --dry-run: for which architecture")
    parser.add_argument("--compile", action="store_true", help="with --dry-run: compile it all, and say what fails")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--most", type=int, default=48, help="configurations per kernel at most")
    parser.add_argument("--seconds-budget", type=float, default=float("inf"), help="begin no kernel after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time and every refusal to FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the launch table with the new rows to FILE")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Tune the kernels that the command line names; 1 where the table's own configuration was wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU here; --dry-run --arch sm_90 lists what would be tried on one")
    if (options.arch or options.compile) and not options.dry_run:
        parser.error("--arch and --compile belong to --dry-run; what is timed is the GPU at hand")
    capability = (options.arch or (9, 0)) if options.dry_run else torch.cuda.get_device_capability()
    try:
        jobs = work(options.shape, options.dtype, capability)
    except ValueError as error:
        parser.error(str(error))
    if not jobs:
        parser.error(f"no kernel serves {options.shape}: it takes windows of up to {MAX_KEYS} keys")
    return _list(jobs, capability, options) if options.dry_run else _measure(jobs, capability, options)


def _list(jobs, capability, options) -> int:
    from benchmarks.tune_gpu import ahead

    failed = 0
    for key, shape, _ in jobs:
        tiles = candidates(key)[: options.most]
        print(f"{key}  {shape.name}: {len(tiles)} of {len(candidates(key))} configurations; the table: {tiles[0]}")
        if options.compile:
            answers = ahead(key, shape, tiles, capability, DTYPES[options.dtype], options.jobs)
            for tile, reason in answers.items():
                if reason:
                    print(f"    {tile}: {reason}")
            print(f"    {sum(reason is None for reason in answers.values())} of {len(tiles)} compile")
            failed += answers[tiles[0]] is not None
    return int(failed > 0)


def _measure(jobs, capability, options) -> int:
    from benchmarks.tune_gpu import Bench, ahead

    device, dtype, began = torch.device("cuda"), DTYPES[options.dtype], time.monotonic()
    about = environment(device) | {"commit": current_commit()}
    rows, records, left_out, bad = {}, [], [], []
    for key, shape, batch in jobs:
        if time.monotonic() - began > options.seconds_budget:
            left_out.append(key)
            continue
        tiles = candidates(key)[: options.most]
        answers = ahead(key, shape, tiles, capability, dtype, options.jobs)
        if answers[tiles[0]] is None:
            compiled = [tile for tile in tiles if answers[tile] is None]
        else:  # the table's own is known to compile: it is the compiling ahead that fails, and launching compiles too
            print(f"not compiled ahead: {answers[tiles[0]]}", flush=True)
            compiled, answers = tiles, {}
        try:
            bench = Bench(key, shape, batch, dtype, tiles[0], capability, device)
        except Exception as error:
            bad.append(f"{key}: {error}")
            print(f"{key}  REFUSED: {error}", flush=True)
            continue
        row, record = tune(key, bench, compiled, began + options.seconds_budget)
        row = row._replace(comment=f"{about['gpu']}, {shape.name} b{batch}: {row.comment}")
        if record["best"] != record["before"]:
            rows[key] = row
        record["not_compiled"] = [[reason, *tile] for tile, reason in answers.items() if reason]
        records.append(record)
        print("\n".join(line(key, row) if key in rows else [f"    # {key} stays: {row.comment}"]), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({"environment": about, "results": records}) + "\n")
        if options.write:
            write(options.write, rows)
        del bench
        torch.cuda.empty_cache()
    for key in left_out:
        print(f"left out, the time was up: {key}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

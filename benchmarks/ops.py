"""Micro-benchmarks: one op, all its rivals, paired in one run.

    python -m benchmarks.ops                                   # everything, on this machine's best device
    python -m benchmarks.ops unroll reroll --json out.json
    python -m benchmarks.ops mask_unit_attention --shape mae_hiera_base_16x224.stage3 --batch 16 --dtype bfloat16
    python -m benchmarks.ops window_attention --shape sam2_b+_1024.stage3
    python -m benchmarks.ops --quick                           # one small table per op and pass, a minute on a CPU
    python -m benchmarks.ops mask_unit_attention --tune        # the launch table for the GPU at hand: tune.py

Shapes are read off the models and named after them: `python -m benchmarks.attention_shapes` and `... window_shapes`
print them. Each table is one pass: forward (without autograd), backward (alone), or both; on a GPU also as a CUDA
graph.

Columns: the median, 20th and 80th percentile of the time; the rate that the compulsory bytes (each input read once,
each output written once) make of the median; the speed against `clone()` of as many bytes, the median of round-by-round
ratios: 1.00 is as fast as a copy; the rate as a fraction of the copy bandwidth of this device, measured first; on a GPU
the memory that the call needs at its peak. Inputs take turns, so that they are not in the caches.

Every candidate is first compared with an fp64 oracle at the same shape, results and gradients. One that differs gets no
time, its row says why, and the exit status is 1. A candidate that cannot run says why, too. The JSON file
(benchmarks/results/README.md) is written anew after every table.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import attention, rows, timing, token_order
from benchmarks.machine import allow_tf32, ceilings, current_commit, environment
from benchmarks.measured import measure
from benchmarks.trial import OURS, PASSES, Case, first_line

__all__ = ["OPS", "current_commit", "environment", "main", "table"]

OPS: dict[str, Callable] = {**attention.OPS, **rows.OPS, **token_order.OPS}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUICK_COLD_BYTES = 48 << 20


def table(found: list[dict]) -> str:
    """The rows of one pass of one case as aligned text."""
    head = found[0]
    lines = [f"{head['op']}  {head['case']}  ({head['bytes'] / 1e6:.1f} MB moved)"]
    lines.append(
        f"  {'':18}{'median us':>11}{'p20':>10}{'p80':>10}{'GB/s':>8}{'of clone':>10}{'of copy':>9}{'peak MB':>9}"
    )
    for row in found:
        if row["median_us"] is None:
            lines.append(f"  {row['candidate']:18}{'-':>11}   {row['error'] or row['parity']}")
            continue
        peak = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.1f}"
        ceiling = "" if row["of_copy"] is None else f"{row['of_copy']:.2f}"
        lines.append(
            f"  {row['candidate']:18}{row['median_us']:11.1f}{row['p20_us']:10.1f}{row['p80_us']:10.1f}"
            f"{row['gb_per_s']:8.1f}{row['of_clone']:10.2f}{ceiling:>9}{peak:>9}"
        )
    return "\n".join(lines)


def tables(found: list[dict]) -> str:
    """All passes of one case."""
    groups: dict[str, list[dict]] = {}
    for row in found:
        groups.setdefault(row["case"], []).append(row)
    return "\n\n".join(map(table, groups.values()))


def most_important_first(cases: dict[str, list[Case]]) -> list[Case]:
    """The first case of every op, then the second of every op, ...: what matters is measured when time runs out."""
    longest = max(map(len, cases.values()), default=0)
    return [found[i] for i in range(longest) for found in cases.values() if i < len(found)]


def failed(case: Case, error: BaseException) -> dict:
    """The row of a case that could not even be set up, its oracle included."""
    return {
        "op": case.op,
        "case": case.label,
        "candidate": OURS,
        "shape": case.shape,
        "batch": case.batch,
        "bytes": 0,
        "median_us": None,
        "parity": "not compared",
        "error": first_line(error),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which of {', '.join(OPS)} (default: all)")
    parser.add_argument("--shape", metavar="NAME", help="one shape, e.g. hiera_base_224.stage1 (token order: a model)")
    parser.add_argument("--batch", type=int, help="images, or clips (default: the table's, or 8 with --shape)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=[], help="default: the table's")
    parser.add_argument("--tf32", action="store_true", help="on a GPU, multiply fp32 by TF32, in every candidate")
    parser.add_argument("--pass", nargs="+", choices=PASSES, dest="passes", help="default: forward backward both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--seconds", type=float, help="time for each table (default: 1, with --quick 0.2)")
    parser.add_argument("--seconds-budget", type=float, default=float("inf"), help="start no case after so long")
    parser.add_argument("--only", default="", help="only cases whose label holds this text")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N cases of each op, the most important")
    parser.add_argument("--quick", action="store_true", help="one case per op, forward and backward, few rounds")
    parser.add_argument(
        "--compile",
        type=int,
        metavar="N",
        help="torch.compile and FlexAttention as rivals in the first N cases of each op (default: 1 on a GPU, else 0)",
    )
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU, eager calls only")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE as well")
    parser.add_argument("--update", action="store_true", help="keep what FILE has of other tables, of the same commit")
    parser.add_argument("--commit", help="what is measured, where the checkout cannot tell (default: git's answer)")
    return parser


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> list[Case]:
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(OPS)}")
    options.dtypes = [DTYPES[name] for name in options.dtype]
    if options.shape and not options.ops:
        parser.error("--shape needs the ops that it is for, e.g. mask_unit_attention --shape hiera_base_224.stage1")
    try:
        plain = argparse.Namespace(**{**vars(options), "compile": False})
        found = {name: OPS[name](name, device, plain) for name in options.ops or OPS}
        if options.compile:  # the first of each again, with more rivals
            compiled = {name: OPS[name](name, device, options) for name in found}
            found = {name: compiled[name][: options.compile] + found[name][options.compile :] for name in found}
    except ValueError as error:
        parser.error(str(error))
    found = {name: cases[: options.first] for name, cases in found.items()}
    cases = [case for case in most_important_first(found) if options.only in case.label]
    if options.tf32:
        cases = [replace(case, note=f"tf32 {case.note}".strip()) for case in cases if case.dtype is torch.float32]
    if not cases:
        parser.error(
            f"no case holds {options.only!r}" + (" and is of float32: --dtype float32" if options.tf32 else "")
        )
    return cases


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--tune" in arguments:
        from benchmarks import tune

        return tune.main(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.compile is None:
        options.compile = int(device.type == "cuda")
    cases = _chosen(parser, options, device)
    if options.list:
        print("\n".join(f"{case.op}  {case.label}" for case in cases))
        return 0
    return run(cases, device, options)


def _earlier(path: Path | None, commit: str) -> list[dict]:
    """The rows that a file of the same commit has."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    return content["results"] if content["environment"].get("commit") == commit else []


def run(cases: list[Case], device: torch.device, options: argparse.Namespace) -> int:
    """Measure, print and write; 1 where a parity was red or a case could not be compared at all."""
    began = time.monotonic()
    passes = tuple(options.passes or (("forward", "backward") if options.quick else PASSES))
    seconds = options.seconds or (0.2 if options.quick else 1.0)
    about = environment(device) | ceilings(device) | {"commit": options.commit or current_commit()}
    print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results, left_out, bad = [], [], []
    earlier = _earlier(options.json, about["commit"]) if options.update else []

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            measured_now = {(row["op"], row["case"]) for row in results}
            kept = [row for row in earlier if (row["op"], row["case"]) not in measured_now]
            content = {"environment": about, "results": kept + results, "left_out": left_out}
            options.json.write_text(json.dumps(content, indent=1) + "\n")

    for case in tqdm(cases, unit="case", disable=not sys.stderr.isatty()):
        if time.monotonic() - began > options.seconds_budget:
            left_out.append(f"{case.op} {case.label}")
            continue
        torch.manual_seed(0)
        if device.type == "cuda":  # said outright: what a script before this one left is not measured
            allow_tf32(options.tf32)
        try:
            found = measure(
                case,
                device,
                passes,
                seconds,
                about["copy_gb_per_s"],
                rounds=(5, 50) if options.quick else (15, 400),
                cold_bytes=QUICK_COLD_BYTES if options.quick else timing.COLD_BYTES,
                graphs=not options.no_graphs,
                tf32=options.tf32,
            )
            tqdm.write("\n" + tables(found))
        except Exception as error:  # the other cases are measured all the same
            found = [failed(case, error)]
            tqdm.write(f"\n{case.op}  {case.label}  failed: {found[0]['error']}")
        results += found
        bad += [row for row in found if (row["parity"] or "").startswith("red")]
        bad += [row for row in found if row["candidate"] == OURS and row["error"]]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write()
    write()
    for name in left_out:
        print(f"left out, the time was up: {name}")
    for row in bad:
        print(f"REFUSED  {row['op']}  {row['case']}  {row['candidate']}: {row['error'] or row['parity']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

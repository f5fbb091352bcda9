"""Whole training steps and inference: stock, folded, timm and accelerated, eager and compiled, in one run, interleaved.

    python -m benchmarks.model --quick                                  # a CPU, a minute
    python -m benchmarks.model --json results/model.json                # every workload, in order of importance
    python -m benchmarks.model --only "hiera_base_224 fine-tune b128" --precision fp16
    python -m benchmarks.model --zoo --only b128 --seconds-budget 300

A candidate's speed is printed only if it gave stock's outputs and gradients in this very run (model_parity.py); one
that did not is a red row without a time, and the exit status is 1. A workload's candidates take turns, one step each,
in a shuffled order. Peak memory is that of one step, with the candidate's own parameters and optimizer state. Results
are written after every workload, and what did not fit into the budget is listed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import rivals
from benchmarks.machine import allow_tf32
from benchmarks.ops import current_commit, environment
from benchmarks.stepping import Entry, measure
from benchmarks.workloads import QUICK, WORKLOADS, Workload

PRECISIONS = {
    "bf16": "autocast-bfloat16",
    "fp16": "autocast-float16",
    "bf16-cast": "bfloat16",
    "fp32": "float32",
    "tf32": "tf32",
}


def entries_for(workload: Workload, device: torch.device, options: argparse.Namespace) -> list[Entry]:
    """The candidates and modes that the command line asks for, in the order of the tables."""
    found = []
    for candidate, modes in rivals.MODES.items():
        for mode in modes:
            wanted = mode in options.modes and (not options.candidates or candidate in options.candidates)
            if wanted and (mode != "cuda-graph" or device.type == "cuda"):
                found.append(Entry(candidate, mode))
    if options.zoo:
        found += [Entry(name, mode, other=True) for name in workload.zoo for mode in ("eager", "compile")]
    return [entry for entry in found if entry.mode in options.modes]


def table(rows: list[dict]) -> str:
    """The rows of one workload as aligned text, each against the fastest plain candidate."""
    timed = [row["ms"] for row in rows if row["ms"] and not row["candidate"].startswith("accelerated") and row["peer"]]
    best = min(timed, default=None)
    head = f"{rows[0]['case']}, {rows[0]['dtype']}"
    lines = [head, f"  {'':30}{'ms':>9}{'p20':>9}{'p80':>9}{'images/s':>11}{'peak GB':>9}{'x best peer':>13}  parity"]
    for row in rows:
        name = f"{row['candidate']}, {row['mode']}"
        if row["ms"] is None:
            lines.append(f"  {name:30}{row['error'] or 'refused'}  {row['parity']}")
            continue
        memory = f"{row['peak_memory_bytes'] / 1e9:9.2f}" if row["peak_memory_bytes"] else f"{'':9}"
        against = f"{best / row['ms']:12.2f}x" if best else f"{'':13}"
        lines.append(
            f"  {name:30}{row['ms']:9.2f}{row['p20_ms']:9.2f}{row['p80_ms']:9.2f}{row['images_per_s']:11.1f}"
            f"{memory}{against}  {row['parity']}"
        )
    return "\n".join(lines)


def _kept(path: Path, about: dict) -> list[dict]:
    """The rows of an earlier run of the same commit; those of another are not shown beside new ones."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return content["results"] if content["environment"]["commit"] == about["commit"] else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only workloads whose name holds this text (see --list)")
    parser.add_argument("--list", action="store_true", help="print the names of the workloads and stop")
    parser.add_argument("--quick", action="store_true", help="a mini model, a minute on a CPU; no published figure")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 autocast on a GPU, fp32 on a CPU")
    parser.add_argument("--candidates", nargs="*", default=[], choices=list(rivals.MODES), metavar="NAME")
    parser.add_argument("--modes", nargs="*", choices=("eager", *rivals.COMPILED, "cuda-graph"), metavar="MODE")
    parser.add_argument("--zoo", action="store_true", help="add other models of the size of Hiera-B, from timm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--rounds", type=int, help="steps of each candidate (default: 20 on a GPU, 5 on a CPU)")
    parser.add_argument("--seconds-budget", type=float, default=float("inf"), help="set nothing up after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE as well")
    parser.add_argument("--update", action="store_true", help="keep what FILE has of other workloads and precisions")
    parser.add_argument("--commit", help="what is measured, where the checkout cannot tell (default: git's answer)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the workloads that the command line names; 1 if a candidate was red."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    workloads = [w for w in (QUICK if options.quick else WORKLOADS) if options.only in w.name]
    if options.list or not workloads:
        print("\n".join(w.name for w in (QUICK if options.quick else WORKLOADS)))
        return 0 if options.list else parser.error(f"no workload's name holds {options.only!r}; the names are above")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    options.rounds = options.rounds or (20 if device.type == "cuda" else 5)
    options.modes = options.modes or (("eager",) if device.type == "cpu" else ("eager", *rivals.COMPILED, "cuda-graph"))
    allow_tf32(options.precision == "tf32")
    about = environment(device) | {"commit": options.commit or current_commit()}
    print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    kept = _kept(options.json, about) if options.update and options.json else []
    started, results, left_out = time.perf_counter(), [], []
    for workload in tqdm(workloads, unit="workload", disable=not sys.stderr.isatty()):
        if time.perf_counter() - started > options.seconds_budget:
            left_out.append(workload.name)
            continue
        entries, deadline = entries_for(workload, device, options), started + options.seconds_budget
        rows = measure(workload, entries, device, options.precision, options.rounds, deadline)
        for row in rows:
            row["dtype"] = PRECISIONS[options.precision]
        results += rows
        tqdm.write("\n" + table(rows))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            new = {(row["case"], row["dtype"]) for row in results}
            shown = [row for row in kept if (row["case"], row["dtype"]) not in new] + results
            options.json.write_text(json.dumps({"environment": about, "results": shown}, indent=1) + "\n")
    if left_out:
        print(f"did not fit into {options.seconds_budget:.0f} s: {', '.join(left_out)}")
    return int(any(row["parity"] == "red" for row in results))


if __name__ == "__main__":
    sys.exit(main())

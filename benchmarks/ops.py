"""Micro-benchmarks: one op, all its rivals, paired in one run.

    python -m benchmarks.ops                               # everything, on this machine's best device
    python -m benchmarks.ops unroll reroll --json out.json
    python -m benchmarks.ops unroll --device cpu --threads 1 --seconds 3

Columns: the median, 20th and 80th percentile of the time; the bytes that have to move, read and written, and the rate
this makes of the median; and the speed against `clone()` of the same bytes, the median of round-by-round ratios: 1.00
is as fast as a copy.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import shapes, timing, token_order
from hiera_kernels import extension


@dataclass(frozen=True)
class Case:
    """One table: an op at a size. `prepare` returns (make inputs, candidates, bytes moved)."""

    op: str
    label: str
    prepare: object


def _token_cases(op: str, device: torch.device) -> list[Case]:
    sizes = shapes.CUDA_TOKENS if device.type == "cuda" else shapes.CPU_TOKENS
    if op != "embed_tokens":
        return [Case(op, s.label, functools.partial(token_order.move_case, op, s, device)) for s in sizes]
    cases = []
    for shape in sizes:
        for channels_last in (False, True):
            for masked in (False, True) if shape.kept else (False,):
                note = (" channels-last" if channels_last else " channel-first") + (" masked" if masked else "")
                prepare = functools.partial(token_order.embed_case, op, shape, device, channels_last, masked)
                cases.append(Case(op, shape.label + note, prepare))
    return cases


OPS = dict.fromkeys(("unroll", "reroll", "embed_tokens"), _token_cases)


def measure(case: Case, device: torch.device, seconds: float) -> list[dict]:
    """The rows of one case, one per candidate, its own first."""
    make, candidates, moved = case.prepare()
    samples = timing.paired(candidates, timing.rotate(make), device, seconds)
    rows = []
    for name, taken in samples.items():
        row = {"op": case.op, "case": case.label, "candidate": name, "bytes": moved, "rounds": len(taken.seconds)}
        row |= {f"{key}_us": taken.quantile(q) * 1e6 for key, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
        row["gb_per_s"] = moved / row["median_us"] / 1e3
        row["of_clone"] = taken.speed_of(samples["clone"])
        rows.append(row)
    return rows


def environment(device: torch.device) -> dict:
    """What has to stand beside a number for it to mean anything."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    about |= {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "compiled": extension.why_not(device.type) or "yes",
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        about["cpu"] = names[0] if names else platform.processor()
    return about


def current_commit() -> str:
    """The commit of this checkout, with "-dirty" behind it where files differ from it; empty outside a checkout."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() if described.returncode == 0 else ""


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(rows: list[dict]) -> str:
    """The rows of one case as aligned text."""
    lines = [f"{rows[0]['op']}  {rows[0]['case']}  ({rows[0]['bytes'] / 1e6:.1f} MB moved, {rows[0]['rounds']} rounds)"]
    lines.append(f"  {'':16}{'median us':>11}{'p20':>10}{'p80':>10}{'GB/s':>8}{'of clone':>10}")
    for row in rows:
        lines.append(
            f"  {row['candidate']:16}{row['median_us']:11.1f}{row['p20_us']:10.1f}{row['p80_us']:10.1f}"
            f"{row['gb_per_s']:8.1f}{row['of_clone']:10.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which of {', '.join(OPS)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each table (default: %(default)s)")
    parser.add_argument("--only", default="", help="only cases whose label holds this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE as well")
    parser.add_argument("--commit", help="what is measured, where the checkout cannot tell (default: git's answer)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(OPS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    about = environment(device) | {"commit": options.commit or current_commit()}
    print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    cases = [case for name in options.ops or OPS for case in OPS[name](name, device) if options.only in case.label]
    results = []
    with torch.no_grad():
        for case in tqdm(cases, unit="table", disable=not sys.stderr.isatty()):
            torch.manual_seed(0)
            rows = measure(case, device, options.seconds)
            results += rows
            tqdm.write("\n" + table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

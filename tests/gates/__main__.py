"""The compile gate over the package's own kernels: a table, a JSON file, and exit status 1 if a kernel is refused.

python -m tests.gates                                   # what published models need; `make test` runs this
python -m tests.gates --all                             # every shape, dtype and architecture; `make gate`
python -m tests.gates --only mask_unit_attention_backward --jobs 1
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import triton
from tqdm import tqdm

from tests.gates import cases
from tests.gates.compiled import SECONDS_LIMIT, Job, Measured, compile_all, verdict

COLUMNS = ("kernel", "shape", "dtype", "arch", "registers", "stack", "spills", "shared", "wide_loads", "loads")
COLUMNS += ("tensor_core", "seconds", "refused")
# The same on every machine, so that a tracked file does not change with every run.
STEADY = tuple(column for column in COLUMNS if column != "seconds")


def row(job: Job, made: Measured) -> dict:
    """What the table and the file say of one compiled launch."""
    numbers = {name: getattr(made, name) for name in COLUMNS if hasattr(made, name)}
    arch = f"sm_{10 * job.capability[0] + job.capability[1]}"
    answer = {"arch": arch, **job.labels, **numbers, "seconds": round(made.seconds, 1), "refused": verdict(job, made)}
    return {name: answer[name] for name in COLUMNS}


def table(rows: Sequence[dict]) -> str:
    """The rows as aligned text."""
    cells = [list(COLUMNS)] + [[", ".join(v) if isinstance(v := r[c], list) else str(v) for c in COLUMNS] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    align = ["<" if name in ("kernel", "shape", "dtype", "arch", "refused") else ">" for name in COLUMNS]
    lines = []
    for line in cells:
        fitted = (f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True))
        lines.append("  ".join(fitted).rstrip())
    return "\n".join(lines)


def write(path: Path, rows: Sequence[dict], scope: str) -> bool:
    """Write the file, unless it says the same already (seconds apart, which no two runs share); True if written."""
    content = {"triton": triton.__version__, "scope": scope, "kernels": list(rows)}

    def steady(c: dict) -> list:
        return [c["triton"], c["scope"], [[r.get(name) for name in STEADY] for r in c["kernels"]]]

    if path.exists():
        try:
            if steady(json.loads(path.read_text())) == steady(content):
                return False
        except (ValueError, KeyError, TypeError):
            pass  # an older or a broken file is written anew
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(r) for r in content["kernels"])
    head = json.dumps({key: value for key, value in content.items() if key != "kernels"})[1:-1]
    path.write_text(f'{{{head}, "kernels": [\n{lines}\n]}}\n')
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write, judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every shape, dtype and architecture, not only the models'")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only kernels, shapes, dtypes or archs that hold TEXT"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE as well")
    options = parser.parse_args(arguments)
    jobs = [job for job in cases.jobs(everything=options.all) if options.only in cases.title(job)]
    if not jobs:
        parser.error(f"nothing matches {options.only!r}")
    answered = {}
    for job, made in tqdm(
        compile_all(jobs, options.jobs), total=len(jobs), unit="kernel", disable=not sys.stderr.isatty()
    ):
        answered[id(job)] = row(job, made)
    rows = [answered[id(job)] for job in jobs]
    print(table(rows))
    refused = [r for r in rows if r["refused"]]
    seconds = sum(r["seconds"] for r in rows)
    slowest = max(r["seconds"] for r in rows)
    print(
        f"\n{len(rows)} kernels compiled in {seconds:.0f} s of processor time, the slowest in {slowest:.1f} s of "
        f"{SECONDS_LIMIT:.0f} allowed; {len(refused)} refused"
    )
    for r in refused:
        print(f"  {r['kernel']} {r['shape']} {r['dtype']} {r['arch']}: {'; '.join(r['refused'])}")
    if options.json:
        write(options.json, rows, "all" if options.all else "models")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

"""Put the measured results into the README: `python -m benchmarks.report`; with `--check`, only compare.

The tables stand between the markers `<!-- results: ... -->` and `<!-- end of results -->` and are made from
`benchmarks/results/<machine>/ops.json`, which `python -m benchmarks.ops --json` writes: never typed.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BETWEEN = re.compile(r"(<!-- results: token order -->\n).*?(<!-- end of results -->)", re.S)
OURS = "hiera_kernels"


def op_tables(results: Path = RESULTS) -> str:
    """One Markdown table for each machine that has results, with the machine and the commit below it.

    Args:
        results: folder with one folder per machine, in each an `ops.json`.

    Raises:
        ValueError: a file names no machine or no commit.
    """
    parts = []
    for path in sorted(results.glob("*/ops.json")):
        content = json.loads(path.read_text())
        about = content["environment"]
        machine = about.get("gpu") or about.get("cpu")
        if not machine or not about.get("commit"):
            raise ValueError(f"{path} must name the machine and the commit it was measured at, got {about}")
        lines = [
            "| op | tensor | time | moved | of a copy's speed | one permute takes | upstream's chain takes |",
            "|---|---|---|---|---|---|---|",
        ]
        cases: dict[tuple[str, str], dict[str, dict]] = {}
        for row in content["results"]:
            cases.setdefault((row["op"], row["case"]), {})[row["candidate"]] = row
        for (op, case), rows in cases.items():
            ours = rows[OURS]
            rivals = [
                f"{rows[name]['median_us'] / ours['median_us']:.1f}x as long" if name in rows else ""
                for name in ("single_permute", "upstream_chain")
            ]
            lines.append(
                f"| `{op}` | {case} | {ours['median_us']:.0f} us | {ours['bytes'] / 1e6:.1f} MB "
                f"| {ours['of_clone']:.0%} | {rivals[0]} | {rivals[1]} |"
            )
        count = about["threads"]
        threads = f", {count} thread{'s' if count > 1 else ''}" if about["device"] == "cpu" else ""
        lines += [
            "",
            f"{machine}{threads}, torch {about['torch']}, commit {about['commit'][:12]}; median of many rounds in",
        ]
        lines[-1] += " which all candidates take turns, on inputs that are not in the cache."
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or "Not measured yet.\n"


def updated(readme: str, tables: str) -> str:
    """The README with its tables replaced.

    Raises:
        ValueError: the markers are missing.
    """
    if not BETWEEN.search(readme):
        raise ValueError("README.md must hold the markers <!-- results: token order --> and <!-- end of results -->")
    return BETWEEN.sub(lambda match: f"{match[1]}\n{tables}\n{match[2]}", readme)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the README's tables, or with --check return 1 if they are not what the results say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README and results disagree")
    options = parser.parse_args(arguments)
    before = README.read_text()
    after = updated(before, op_tables())
    if options.check:
        if before != after:
            print("README.md does not show what benchmarks/results holds: run python -m benchmarks.report")
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables of single ops, from benchmarks/results/<machine>/ops.json."""

from pathlib import Path

from benchmarks.results_files import about_line, machine_of, measured_files

OURS = "hiera_kernels"
TOKEN_ORDER = ("unroll", "reroll", "embed_tokens")
LARGE = 10_000_000  # bytes, from which on a CPU's target holds


def _cases(results: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """{(op, case): {candidate: row}}, only where ours has a time."""
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for row in results:
        cases.setdefault((row["op"], row["case"]), {})[row["candidate"]] = row
    return {key: rows for key, rows in cases.items() if rows.get(OURS, {}).get("median_us")}


def _against(rows: dict[str, dict], name: str) -> str:
    time = rows.get(name, {}).get("median_us")
    return f"{time / rows[OURS]['median_us']:.1f}x as long" if time else ""


def token_order_tables(results: Path) -> str:
    """One table for each CPU that has results of the token-order ops, every case; the machine and the commit below."""
    parts = []
    for about, rows in measured_files(results, "ops.json"):
        cases = {key: found for key, found in _cases(rows).items() if key[0] in TOKEN_ORDER}
        if about.get("gpu") or not cases:
            continue
        lines = [
            "| op | tensor | time | moved | of a copy's speed | one permute takes | upstream's chain takes |",
            "|---|---|---|---|---|---|---|",
        ]
        for (op, case), found in cases.items():
            ours = found[OURS]
            rivals = f"{_against(found, 'single_permute')} | {_against(found, 'upstream_chain')}"
            lines.append(
                f"| `{op}` | {case} | {ours['median_us']:.0f} us | {ours['bytes'] / 1e6:.1f} MB "
                f"| {ours['of_clone']:.0%} | {rivals} |"
            )
        lines += ["", about_line(about) + "; median of many rounds in which all candidates take turns, on inputs that"]
        lines[-1] += " are not in the cache."
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or "Not measured yet.\n"


def token_order_extremes(results: Path) -> str:
    """Of each CPU and op, of the tensors of 10 MB and more: the one nearest to a copy's speed and the one farthest."""
    lines = [
        "| CPU | op | tensor | of a copy's speed | one permute takes | upstream's chain takes |",
        "|---|---|---|---|---|---|",
    ]
    below = []
    for about, rows in measured_files(results, "ops.json"):
        cases = {key: found for key, found in _cases(rows).items() if key[0] in TOKEN_ORDER}
        if about.get("gpu"):
            continue
        for op in TOKEN_ORDER:
            large = [(found[OURS]["of_clone"], case, found) for (name, case), found in cases.items() if name == op]
            large = sorted((x for x in large if x[2][OURS]["bytes"] >= LARGE), key=lambda x: x[0])
            for speed, case, found in [large[-1], large[0]] if len(large) > 1 else large:
                rivals = f"{_against(found, 'single_permute')} | {_against(found, 'upstream_chain')}"
                lines.append(f"| {machine_of(about)} | `{op}` | {case} | {speed:.0%} | {rivals} |")
        below.append(about_line(about))
    if len(lines) == 2:
        return "Not measured yet.\n"
    below = f"{'; '.join(dict.fromkeys(below))}. Every tensor: [docs/results.md](docs/results.md)."
    return "\n".join([*lines, "", below]) + "\n"


def bandwidth_table(results: Path) -> str:
    """Of each GPU, op and pass: the fraction of a copy's speed, its median over shapes, the least and the most."""
    parts = []
    for about, rows in measured_files(results, "ops.json"):
        if not about.get("gpu"):
            continue
        found: dict[tuple[str, str, bool], list[float]] = {}
        rivals: dict[tuple[str, str, bool], list[float]] = {}
        for (op, _), candidates in _cases(rows).items():
            ours = candidates[OURS]
            key = (op, ours.get("pass", "forward"), bool(ours.get("graph")))
            found.setdefault(key, []).append(ours["of_clone"])
            times = [r["median_us"] for name, r in candidates.items() if name not in (OURS, "clone") and r["median_us"]]
            if times:
                rivals.setdefault(key, []).append(min(times) / ours["median_us"])
        if not found:
            continue
        lines = [
            "| op | pass | of a copy's speed: median, least, most | the best rival takes | shapes |",
            "|---|---|---|---|---|",
        ]
        for (op, direction, graph), speeds in sorted(found.items()):
            speeds.sort()
            ratios = sorted(rivals.get((op, direction, graph), []))
            rival = f"{ratios[len(ratios) // 2]:.1f}x as long" if ratios else ""
            spread = f"{speeds[len(speeds) // 2]:.0%}, {speeds[0]:.0%}, {speeds[-1]:.0%}"
            way = direction + (", CUDA graph" if graph else "")
            lines.append(f"| `{op}` | {way} | {spread} | {rival} | {len(speeds)} |")
        parts.append("\n".join([*lines, "", about_line(about) + "; cold L2."]) + "\n")
    return "\n".join(parts) or "Not measured on a GPU yet.\n"

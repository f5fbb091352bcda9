"""Tables of whole training steps: measured (<machine>/model.json) and predicted (predicted/*.json)."""

from pathlib import Path

from benchmarks.results_files import about_line, measured_files, predicted_file

AUTOCAST = "autocast-bfloat16"
PLAIN = ("stock", "folded", "timm")
SPEC = "h100"


def _by_case(rows: list[dict], dtype: str) -> dict[str, dict[str, dict]]:
    """{case: {candidate: row}} of predictions in one dtype."""
    cases: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["dtype"] == dtype and not row["settings"]:
            cases.setdefault(row["case"], {})[row["candidate"]] = row
    return cases


def _megabytes(row: dict | None) -> str:
    return f"{row['saved_bytes'] / row['images'] / 1e6:.0f}" if row else "-"


def _name(case: str, candidate: str, found: dict) -> str:
    if "accelerated hiera" not in found:
        return case
    return f"{case}, {'this repository' if candidate == 'accelerated hiera' else 'hiera-transformer'}'s model"


def _assumed(specs: dict, spec: str) -> str:
    s = specs[spec]
    return (
        f"{spec.upper()} at {s['bandwidth_gb_per_s'] / 1e3:g} TB/s, {s['tensor_tflops']:g} TFLOP/s in 16 bits, "
        f"{s['fp32_tflops']:g} in fp32"
    )


def predicted_steps(results: Path, dtype: str = AUTOCAST, spec: str = SPEC) -> str:
    """Stock, folded and accelerated, predicted: one line for each case, two for MAE, whose model there are two of."""
    content = predicted_file(results, "steps")
    if content is None:
        return "Not predicted yet: `python -m benchmarks.roofline --predicted`.\n"
    about, specs, rows = content
    lines = [
        "| training step | stock | folded | accelerated | over stock | over folded "
        "| saved for backward, MB an image: stock, folded, accelerated |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in _by_case(rows, dtype).items():
        for candidate in ("accelerated", "accelerated hiera"):
            if candidate not in found or "stock" not in found:
                continue
            stock, folded, ours = found["stock"], found.get("folded"), found[candidate]
            time = ours["ms"][spec]
            slower = f"{folded['ms'][spec]:.1f} ms" if folded else "-"
            over = f"{folded['ms'][spec] / time:.2f}x" if folded else "-"
            kept = ", ".join(_megabytes(row) for row in (stock, folded, ours) if row)
            lines.append(
                f"| {_name(case, candidate, found)} | {stock['ms'][spec]:.1f} ms | {slower} | {time:.1f} ms | "
                f"{stock['ms'][spec] / time:.2f}x | {over} | {kept} "
                f"({ours['saved_bytes'] / stock['saved_bytes']:.2f}x) |"
            )
    words = {"autocast-bfloat16": "under bf16 autocast", "bfloat16": "of a model cast to bf16"}[dtype]
    lines += [
        "",
        f"**Predicted, not measured**: forward, backward and fused AdamW in eager mode, {words}, with the published "
        f"drop path; bytes, FLOPs and launches of every operation, counted at commit {about['commit'][:12]}, on an "
        f"{_assumed(specs, spec)}. Library kernels are counted at their floor; what `torch.compile` makes of stock and "
        "folded is not predicted.",
    ]
    return "\n".join(lines) + "\n"


def measured_steps(results: Path, gpu: bool = True) -> str:
    """The fastest accelerated mode of every case against stock and the best peer, and the prediction's error."""
    predicted = predicted_file(results, "steps")
    parts = []
    for about, rows in measured_files(results, "model.json"):
        if bool(about.get("gpu")) is not gpu:
            continue
        lines = [
            "| step | stock, eager | best peer | accelerated | over stock | over best peer "
            "| peak memory: stock, best peer, accelerated | parity | measured / predicted |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        cases: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            cases.setdefault((row["case"], row["dtype"]), []).append(row)
        lines += [
            line for (case, dtype), found in cases.items() if (line := _measured_line(case, dtype, found, predicted))
        ]
        parts.append("\n".join([*lines, "", about_line(about) + "; candidates take turns in one run, medians."]) + "\n")
    return "\n".join(parts) or ("Not measured on a GPU yet.\n" if gpu else "Not measured yet.\n")


def _measured_line(case, dtype, rows, predicted) -> str | None:
    timed = [row for row in rows if row["ms"]]
    ours = min((row for row in timed if row["candidate"].startswith("accelerated")), key=_ms, default=None)
    peer = min((row for row in timed if row["candidate"] in PLAIN), key=_ms, default=None)
    stock = next((row for row in rows if row["candidate"] == "stock" and row["mode"] == "eager"), None)
    if ours is None:
        return None
    parity = sorted({row["parity"] for row in rows if row["candidate"].startswith("accelerated")})
    over = [f"{other['ms'] / ours['ms']:.2f}x" if other and other["ms"] else "" for other in (stock, peer)]
    memory = [
        f"{row['peak_memory_bytes'] / 1e9:.1f}" if row and row["peak_memory_bytes"] else "-"
        for row in (stock, peer, ours)
    ]
    return (
        f"| {case}, {dtype} | {_shown(stock)} | {_shown(peer, True)} | {_shown(ours, True)} | {over[0]} | {over[1]} | "
        f"{', '.join(memory)} GB | {', '.join(parity)} | {_error(case, dtype, timed, predicted)} |"
    )


def _ms(row):
    return row["ms"]


def _shown(row, named=False) -> str:
    if row is None:
        return ""
    if not row["ms"]:
        return row.get("error") or "refused"
    return f"{row['ms']:.1f} ms" + (f" ({row['candidate']}, {row['mode']})" if named else "")


def _error(case, dtype, timed, predicted) -> str:
    """Measured over predicted, of each candidate in eager mode that has a prediction."""
    if predicted is None:
        return ""
    found = []
    for row in predicted[2]:
        if row["case"] == case and row["dtype"] == dtype and not row["settings"]:
            same = [r for r in timed if r["candidate"] == row["candidate"] and r["mode"] == "eager"]
            found += [f"{row['candidate']} {r['ms'] / row['ms'][SPEC]:.2f}" for r in same]
    return ", ".join(found)


def steps(results: Path) -> str:
    """Measured steps where a GPU has been seen, else a sentence that there are none; and the prediction, labelled."""
    more = "Every case, by stage, kind of operation and block, and plots: [docs/results.md](docs/results.md).\n"
    return f"{measured_steps(results)}\n{predicted_steps(results)}\n{more}"


def saved_memory(results: Path) -> str:
    """What autograd keeps between forward and backward, by candidate and by the setting `recompute`."""
    content, recompute = predicted_file(results, "steps"), predicted_file(results, "recompute")
    if content is None:
        return "Not predicted yet: `python -m benchmarks.roofline --predicted`.\n"
    about, _, rows = content
    lines = ["| saved for backward, MB an image | stock | folded | accelerated | of stock |", "|---|---|---|---|---|"]
    for dtype, words in ((AUTOCAST, "autocast"), ("bfloat16", "bf16")):
        for case, found in _by_case(rows, dtype).items():
            variants = [("", found[name]) for name in ("accelerated", "accelerated hiera") if name in found]
            for row in recompute[2] if recompute else ():
                if (row["case"], row["dtype"]) == (case, dtype):
                    variants.append((f", recompute={row['settings']['recompute']}", row))
            for note, row in variants:
                plain = " | ".join(_megabytes(found.get(name)) for name in ("stock", "folded"))
                of_stock = row["saved_bytes"] / found["stock"]["saved_bytes"]
                name = f"{_name(case, row['candidate'], found)}, {words}{note}"
                lines.append(f"| {name} | {plain} | {_megabytes(row)} | {of_stock:.2f}x |")
    lines += [
        "",
        "Counted, not measured: storages that autograd keeps, each once, parameters and their copies left out, at "
        f"commit {about['commit'][:12]}.",
    ]
    return "\n".join(lines) + "\n"


def recompute_table(results: Path, dtype: str = AUTOCAST, spec: str = SPEC) -> str:
    """What each setting of `recompute` keeps and what it costs."""
    content, recompute = predicted_file(results, "steps"), predicted_file(results, "recompute")
    if content is None or recompute is None:
        return "Not predicted yet: `python -m benchmarks.roofline --predicted`.\n"
    about, specs, rows = recompute
    stock = {case: found["stock"] for case, found in _by_case(content[2], dtype).items()}
    lines = [
        "| `accelerate(model, recompute=...)`, bf16 autocast | saved for backward, MB an image | of stock | step |",
        "|---|---|---|---|",
    ]
    shown = set()
    for row in (row for row in rows if row["dtype"] == dtype):
        case, plain = row["case"], stock[row["case"]]
        if case not in shown:
            lines.append(f"| {case}: stock | {_megabytes(plain)} | | {plain['ms'][spec]:.1f} ms |")
            shown.add(case)
        of_stock = row["saved_bytes"] / plain["saved_bytes"]
        setting = f'`"{row["settings"]["recompute"]}"`'
        lines.append(f"| {case}: {setting} | {_megabytes(row)} | {of_stock:.2f}x | {row['ms'][spec]:.1f} ms |")
    lines += ["", f"**Predicted, not measured**, for an {_assumed(specs, spec)}; commit {about['commit'][:12]}."]
    return "\n".join(lines) + "\n"


def groups_table(results: Path, key: str, spec: str = SPEC) -> str:
    """Every prediction under autocast by stage or kind of operation: ms, and MB an image."""
    content = predicted_file(results, "steps")
    if content is None:
        return "Not predicted yet.\n"
    parts = []
    for case, found in _by_case(content[2], AUTOCAST).items():
        names = [name for name in found if any(found[name][key])]
        groups = list(dict.fromkeys(group for name in names for group in sorted(found[name][key])))
        lines = [f"| {case}: ms (MB an image) | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for group in sorted(groups):
            cells = []
            for name in names:
                values = found[name][key].get(group)
                cells.append(
                    f"{values['ms'][spec]:.1f} ({values['bytes'] / found[name]['images'] / 1e6:.0f})" if values else ""
                )
            lines.append(f"| {group} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def blocks_table(results: Path, case: str) -> str:
    """What autograd keeps of each block, MB an image, under autocast."""
    content = predicted_file(results, "steps")
    found = _by_case(content[2], AUTOCAST).get(case) if content else None
    if not found:
        return "Not predicted yet.\n"
    blocks = list(dict.fromkeys(block for row in found.values() for block in row["blocks"]))
    blocks.sort(key=lambda block: (block.partition(".")[0], int(block.partition(".")[2] or 0)))
    lines = [f"| {case} | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for block in blocks:
        kept = [
            row["blocks"].get(block, {"saved_bytes": 0})["saved_bytes"] / row["images"] / 1e6 for row in found.values()
        ]
        lines.append(f"| {block} | {' | '.join(f'{x:.2f}' for x in kept)} |")
    return "\n".join(lines) + "\n"

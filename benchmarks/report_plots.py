"""The pictures of docs/results.md, each made of the same files as the tables beside it."""

from pathlib import Path

from benchmarks import plots
from benchmarks.report_ops import OURS
from benchmarks.report_steps import AUTOCAST, PLAIN, SPEC
from benchmarks.results_files import measured_files, predicted_file

MEMORY = 80e9  # of the GPU that is predicted for


def draw(results: Path, folder: Path) -> dict[str, str]:
    """Draw everything that there are results for.

    Returns:
        {file name: caption}, in the order of the report.
    """
    made: dict[str, str] = {}
    _predicted(results, folder, made)
    _scaling(results, folder, made)
    _measured(results, folder, made)
    _ops(results, folder, made)
    return made


def _predicted(results, folder, made) -> None:
    content = predicted_file(results, "steps")
    if content is None:
        return
    rows = [row for row in content[2] if row["dtype"] == AUTOCAST and not row["settings"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for case in cases[:1] + [case for case in cases if case.startswith("mae_hiera_base_224")]:
        name = f"predicted-{case.replace(' ', '-')}.png"
        plots.kinds_of_steps([row for row in rows if row["case"] == case], SPEC, folder / name)
        made[name] = f"{case}: predicted time by kind of operation ({SPEC.upper()})"
    found = {(row["case"], row["candidate"]): row for row in rows}
    best = {case: found.get((case, "accelerated hiera")) or found[case, "accelerated"] for case in cases}
    peers = {peer: [found.get((case, peer)) for case in cases] for peer in ("stock", "folded")}
    over = {
        f"over {peer}": [
            row["ms"][SPEC] / best[case]["ms"][SPEC] if row else 0 for case, row in zip(cases, of, strict=True)
        ]
        for peer, of in peers.items()
    }
    name = "predicted-speed-up.png"
    title = f"predicted for {SPEC}, bf16 autocast, not measured"
    plots.bars(cases, over, "times as fast", title, folder / name, line=1)
    made[name] = "predicted speed-up of a training step, eager against eager"
    kept = {
        candidate: [row["saved_bytes"] / row["images"] / 1e6 if row else 0 for row in of]
        for candidate, of in (*peers.items(), ("accelerated", list(best.values())))
    }
    name = "predicted-memory.png"
    plots.bars(cases, kept, "MB an image saved for backward", "counted, bf16 autocast", folder / name)
    made[name] = "what autograd keeps between forward and backward"


def _scaling(results, folder, made) -> None:
    content = predicted_file(results, "scaling")
    if content is None:
        return
    for key, axis, value in (
        ("resolution", "pixels, height = width, batch 8", lambda row: row["size"][0]),
        ("batch", "images in a batch at 224 px", lambda row: row["batch"]),
    ):
        rows = [row for row in content[2] if row["varies"] == key]
        x = sorted({value(row) for row in rows})
        series = {}
        for candidate in dict.fromkeys(row["candidate"] for row in rows):
            times = {
                value(row): row["ms"][SPEC] / row["images"]
                for row in rows
                if row["candidate"] == candidate and row["saved_bytes"] < MEMORY
            }
            series[candidate] = [times.get(a) for a in x]
        name = f"predicted-{key}.png"
        title = f"Hiera-B training step, bf16 autocast: predicted for {SPEC}\n(where what is saved fits in 80 GB)"
        plots.curves(x, series, (axis, "ms an image", title), folder / name)
        made[name] = f"predicted cost against {key}"


def _measured(results, folder, made) -> None:
    for about, rows in measured_files(results, "model.json"):
        cases: dict[str, list[dict]] = {}
        for row in rows:
            cases.setdefault(f"{row['case']}, {row['dtype']}", []).append(row)
        labels, over_stock, over_peer, memory = [], [], [], {"stock": [], "best peer": [], "accelerated": []}
        for case, found in cases.items():
            timed = [row for row in found if row["ms"]]
            ours = min((r for r in timed if r["candidate"].startswith("accelerated")), key=_ms, default=None)
            peer = min((r for r in timed if r["candidate"] in PLAIN), key=_ms, default=None)
            stock = next((r for r in timed if r["candidate"] == "stock" and r["mode"] == "eager"), None)
            if ours is None or peer is None:
                continue
            labels.append(case)
            over_stock.append(stock["ms"] / ours["ms"] if stock else 0)
            over_peer.append(peer["ms"] / ours["ms"])
            for name, row in (("stock", stock), ("best peer", peer), ("accelerated", ours)):
                memory[name].append((row or {}).get("peak_memory_bytes") or 0)
        if not labels:
            continue
        machine = about.get("gpu") or about["cpu"]
        slug = machine.lower().replace(" ", "-")
        where = f"{machine}, commit {about['commit'][:12]}"
        name = f"speed-up-{slug}.png"
        plots.bars(
            labels,
            {"over stock": over_stock, "over the best peer": over_peer},
            "times as fast",
            where,
            folder / name,
            1,
        )
        made[name] = f"measured speed-up, {where}"
        if any(memory["accelerated"]):
            name = f"memory-{slug}.png"
            series = {key: [x / 1e9 for x in values] for key, values in memory.items()}
            plots.bars(labels, series, "peak memory, GB", where, folder / name)
            made[name] = f"measured peak memory, {where}"


def _ms(row):
    return row["ms"]


def _ops(results, folder, made) -> None:
    for about, rows in measured_files(results, "ops.json"):
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["candidate"] == OURS and row.get("of_clone"):
                name = " ".join(filter(None, (row["op"], row.get("pass", ""), "graph" if row.get("graph") else "")))
                found.setdefault(name, []).append(row["of_clone"])
        if not found:
            continue
        medians = [sorted(values)[len(values) // 2] for values in found.values()]
        machine = about.get("gpu") or f"{about['cpu']} {about['threads']} threads"
        where = f"{machine}, commit {about['commit'][:12]}"
        name = f"bandwidth-{machine.lower().replace(' ', '-')}.png"
        series = {"of a copy's speed": medians}
        plots.bars(list(found), series, "of a copy's speed, median over shapes", where, folder / name, 1)
        made[name] = f"each op against a copy of as many bytes, {where}"

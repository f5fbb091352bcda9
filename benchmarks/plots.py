"""Every picture: bars of predicted steps, speed-ups, memory, bandwidth, and cost against resolution and batch."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.op_costs import KINDS

_COLOURS = dict(zip(KINDS, pyplot.get_cmap("tab20").colors, strict=False))


def _saved(figure, path: Path) -> None:
    """Without the time of drawing and the version in it, so that the same numbers are the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _name(row: dict) -> str:
    return row["candidate"] + "".join(f"\n{key} {value}" for key, value in row.get("settings", {}).items())


def kinds_of_steps(rows: list[dict], spec: str, path: Path) -> None:
    """Predicted time of each step as a bar of kinds of operation; steps of one case stand together."""
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.1 * len(rows), 4.5))
    bottoms = [0.0] * len(rows)
    for kind in KINDS:
        heights = [row["kinds"].get(kind, {"ms": {spec: 0.0}})["ms"][spec] for row in rows]
        if any(heights):
            axes.bar(range(len(rows)), heights, bottom=bottoms, label=kind, color=_COLOURS[kind], width=0.7)
            bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for i, row in enumerate(rows):
        axes.text(i, bottoms[i], f"{row['ms'][spec]:.1f} ms", ha="center", va="bottom", fontsize=8)
    cases = [row["case"] for row in rows]
    labels = [_name(row) + (f"\n{row['case']}" if len(set(cases)) > 1 else "") for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("ms a step")
    what = f"{cases[0]}, " if len(set(cases)) == 1 else ""
    axes.set_title(f"{what}{rows[0]['dtype']}: predicted for {spec}, not measured", fontsize=10)
    axes.legend(fontsize=7, loc="upper right")
    axes.margins(y=0.12)
    _saved(figure, path)

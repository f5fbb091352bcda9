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


def bars(labels: list[str], series: dict[str, list[float]], unit: str, title: str, path: Path, line: float = 0) -> None:
    """Groups of horizontal bars: one group for each label, one bar for each series; `line` marks a value."""
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.28 * len(labels) * max(len(series), 1)))
    height = 0.8 / max(len(series), 1)
    for j, (name, values) in enumerate(series.items()):
        places = [i + (j - (len(series) - 1) / 2) * height for i in range(len(labels))]
        axes.barh(places, values, height=height * 0.9, label=name)
        for place, value in zip(places, values, strict=True):
            if value:
                axes.text(value, place, f" {value:.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    if line:
        axes.axvline(line, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.12)
    if len(series) > 1:
        axes.legend(fontsize=7)
    _saved(figure, path)


def curves(x: list[float], series: dict[str, list[float | None]], words: tuple[str, str, str], path: Path) -> None:
    """One line for each series over `x`, both axes logarithmic; `words`: label of x, label of y, title."""
    figure, axes = pyplot.subplots(figsize=(5.5, 4))
    for name, values in series.items():
        known = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{a:g}" for a in x])
    axes.set_xlabel(words[0])
    axes.set_ylabel(words[1])
    axes.set_title(words[2], fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _saved(figure, path)

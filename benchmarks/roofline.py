"""Predict a training step without a GPU: FLOPs, bytes and launches of every operation, time, and saved memory.

    python -m benchmarks.roofline --model hiera_base_224 --batch 128 --device-spec h100
    python -m benchmarks.roofline --model mae_hiera_base_224 --batch 256 --json out.json --plot out.png
    python -m benchmarks.roofline --predicted            # what the README shows, into benchmarks/results/predicted/

The step runs on tensors without data (counting.py), each operation costs what its arguments and results say
(op_costs.py), and a device turns costs into time (device_specs.py). Where benchmarks/results holds a measurement of the
same case it is printed beside the prediction.
"""

import argparse
import gc
import inspect
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import hiera_kernels
from benchmarks import rivals
from benchmarks.counting import Step, count, loss_of, visible_units
from benchmarks.device_specs import RESULTS, SPECS, Spec, spec_named
from benchmarks.machine import current_commit
from benchmarks.op_costs import KINDS
from benchmarks.op_places import stage_of
from benchmarks.workloads import VIDEO, Workload
from hiera_kernels.ops.calling import has_kernel

DTYPES = {"autocast": "autocast-bfloat16", "cast": "bfloat16"}
CANDIDATES = ("stock", "folded", "accelerated", "accelerated hiera")
RECOMPUTE = ("none", "gelu", "block")
# What the README's tables of predictions hold: (model, batch).
PREDICTED = (
    ("hiera_base_224", 128),
    ("hiera_large_224", 128),
    ("mae_hiera_base_224", 256),
    ("mae_hiera_large_224", 256),
    ("mae_hiera_base_16x224", 16),
    ("hiera_base_16x224", 16),
    ("sam2_hiera_b+", 8),
)
RECOMPUTED = ("hiera_base_224", "mae_hiera_base_224")
SCALING = {"resolution": (224, 448, 896, 1536), "batch": (1, 4, 16, 64, 256)}
_OF_SCALING = (
    "case",
    "candidate",
    "dtype",
    "settings",
    "batch",
    "images",
    "bytes",
    "flops",
    "launches",
    "saved_bytes",
    "ms",
)


def workload_for(model: str, batch: int, size: tuple[int, ...] | None = None) -> Workload:
    """The training step of a model by name, as benchmarks.model times it."""
    video = "16x224" in model
    if model.startswith("sam2"):
        return Workload("trunk", model, batch, size or (1024, 1024))
    size = size or (VIDEO if video else (int(model.rsplit("_", 1)[-1]),) * 2)
    if model.startswith("mae_"):
        return Workload("mae", model, batch, size, mask_ratio=0.9 if video else 0.6)
    return Workload("fine-tune", model, batch, size)


def built(candidate: str, workload: Workload, settings: dict) -> nn.Module:
    """The candidate's model; `settings` go to `accelerate`.

    Raises:
        ValueError: `accelerate` does not know a setting.
        benchmarks.rivals.Absent: see there.
    """
    if not settings:
        return rivals.build(candidate, workload, workload.size)
    known = inspect.signature(hiera_kernels.accelerate).parameters
    if unknown := settings.keys() - known.keys():
        raise ValueError(f"accelerate has no setting {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    base = "stock" if candidate == "accelerated" else candidate
    model = rivals.build(base, workload, workload.size)
    hiera_kernels.accelerate(model, **settings)
    return model


def predict(
    candidate: str,
    workload: Workload,
    dtype: str = "autocast",
    settings: dict | None = None,
    specs: dict[str, Spec] = SPECS,
    model: nn.Module | None = None,
) -> dict:
    """One row of predicted/<name>.json (schema: results/README.md).

    Args:
        candidate: one of `rivals.BUILDERS`.
        workload: a training step.
        dtype: "autocast", or "cast" for a model in bf16.
        settings: for `accelerate`.
        specs: devices to predict for, by name.
        model: the candidate's model if it is built already; it is left with weights of the dtype, without data.
    """
    settings = settings or {}
    model = built(candidate, workload, settings) if model is None else model
    stage_ends = list(getattr(model, "stage_ends", []))
    low = torch.bfloat16
    step = count(
        model,
        loss_of(workload, workload.batch),
        autocast=low if dtype == "autocast" else None,
        cast=low if dtype == "cast" else None,
        visible=visible_units(model, workload.mask_ratio),
    )
    row = {
        "case": workload.name,
        "model": workload.model,
        "objective": workload.objective,
        "batch": workload.batch,
        "candidate": candidate,
        "dtype": DTYPES[dtype],
        "settings": settings,
        "images": workload.batch,
    }
    row |= {what: step.total(what, "forward", "backward") for what in ("bytes", "flops", "launches")}
    row["saved_bytes"], row["saved_weight_copies"] = sum(step.saved.values()), step.saved_weights
    row["optimizer"] = {what: step.total(what, "optimizer") for what in ("bytes", "launches")}
    row |= _times(step, specs)
    stages = _grouped(step, lambda op: stage_of(op[1], stage_ends) if op[0] != "optimizer" else "optimizer", specs)
    for block, kept in step.saved.items():
        stages[stage_of(block, stage_ends)]["saved_bytes"] += kept
    row["stages"], row["kinds"] = stages, _grouped(step, lambda op: op[2], specs)
    row["blocks"] = {block: {"saved_bytes": kept} for block, kept in step.saved.items()}
    return row


def _times(step: Step, specs: dict[str, Spec]) -> dict:
    launches = step.total("launches", "forward", "backward", "optimizer")
    gpu = {name: 1e3 * sum(spec.seconds(op[4]) for op in step.ops) for name, spec in specs.items()}
    host = {name: launches * spec.host_us / 1e3 for name, spec in specs.items()}
    return {"ms": {name: max(gpu[name], host[name]) for name in specs}, "gpu_ms": gpu, "host_ms": host}


def _grouped(step: Step, key, specs: dict[str, Spec]) -> dict[str, dict]:
    groups = defaultdict(
        lambda: {"bytes": 0, "flops": 0, "launches": 0, "saved_bytes": 0, "ms": dict.fromkeys(specs, 0.0)}
    )
    for op in step.ops:
        group, cost = groups[key(op)], op[4]
        for what in ("bytes", "flops", "launches"):
            group[what] += getattr(cost, what)
        for name, spec in specs.items():
            group["ms"][name] += 1e3 * spec.seconds(cost)
    return groups


# ---- what is printed ----


def text(row: dict, spec: str, measured: dict | None = None) -> str:
    """A row as aligned text: the whole step, then its stages and its kinds of operation."""
    images = row["images"]
    settings = "".join(f", {key} {value}" for key, value in row["settings"].items())
    lines = [
        f"{row['case']}, {row['dtype']}, {row['candidate']}{settings}: predicted for {spec}",
        f"  step {row['ms'][spec]:.1f} ms (GPU {row['gpu_ms'][spec]:.1f}, host {row['host_ms'][spec]:.1f}), "
        f"{1e3 * images / row['ms'][spec]:.0f} images/s; {row['bytes'] / images / 1e6:.0f} MB/image moved, "
        f"{row['flops'] / images / 1e9:.1f} GFLOP/image, {row['launches']} launches, "
        f"{row['saved_bytes'] / images / 1e6:.1f} MB/image saved for backward",
    ]
    if measured:
        lines.append(
            f"  measured {measured['ms']:.1f} ms on {measured['machine']}, commit {measured['commit'][:12]}: "
            f"{measured['ms'] / row['ms'][spec]:.2f} of the prediction"
        )
    for title, groups, order in (("stage", row["stages"], None), ("kind", row["kinds"], KINDS)):
        lines.append(f"  {title:14}{'ms':>8}{'MB/image':>10}{'GFLOP/image':>13}{'launches':>10}{'saved MB/image':>16}")
        for name in sorted(groups, key=order.index if order else None):
            group = groups[name]
            saved = f"{group['saved_bytes'] / images / 1e6:16.2f}" if title == "stage" else ""
            lines.append(
                f"  {name:14}{group['ms'][spec]:8.2f}{group['bytes'] / images / 1e6:10.1f}"
                f"{group['flops'] / images / 1e9:13.2f}{group['launches']:10}{saved}"
            )
    return "\n".join(lines)


def measured_like(row: dict, results: Path = RESULTS) -> dict | None:
    """The eager measurement of the same case, candidate, dtype and settings on a GPU, if benchmarks/results has one.

    Returns:
        The row of model.json, with "machine" and "commit" of its file.
    """
    wanted = {"mode": "eager", **{key: row[key] for key in ("case", "candidate", "dtype")}}
    for path in sorted(results.glob("*/model.json")):
        content = json.loads(path.read_text())
        about = content["environment"]
        for other in content["results"] if about.get("gpu") else ():
            same = all(other.get(key) == value for key, value in wanted.items())
            if same and other.get("ms") and (other.get("settings") or {}) == row["settings"]:
                return other | {"machine": about["gpu"], "commit": about["commit"]}
    return None


def predicted_rows(say=print) -> dict[str, list[dict]]:
    """Everything that the documents predict, by name of the file.

    Returns:
        {"steps": the steps of PREDICTED; "recompute": what `accelerate(recompute=...)` changes; "scaling": Hiera-B over
        resolutions and batches}.
    """

    def row(*args):
        made = predict(*args)
        say(text(made, "h100").partition("\n  stage")[0])
        gc.collect()
        return made

    steps, recompute, scaling = [], [], []
    for name, batch in PREDICTED:
        workload = workload_for(name, batch)
        candidates = CANDIDATES if workload.objective == "mae" else CANDIDATES[:3]
        for candidate in candidates:
            try:
                model = rivals.build(candidate, workload, workload.size)
            except rivals.Absent as error:
                say(f"{workload.name}, {candidate}: {error}")
                continue
            for dtype in DTYPES:  # "cast" comes last: it is for good
                steps.append(row(candidate, workload, dtype, {}, SPECS, model))
        for setting in RECOMPUTE if name in RECOMPUTED else ():
            recompute.append(row(candidates[-1], workload, "autocast", {"recompute": setting}))
    for varies, values in SCALING.items():
        for value in values:
            size, batch = ((value, value), 8) if varies == "resolution" else ((224, 224), value)
            workload = Workload("fine-tune", "hiera_base_224", batch, size)
            for candidate in CANDIDATES[:3]:
                made = row(candidate, workload)
                scaling.append({key: made[key] for key in _OF_SCALING} | {"varies": varies, "size": list(size)})
    return {"steps": steps, "recompute": recompute, "scaling": scaling}


def written(rows: list[dict], path: Path, commit: str) -> None:
    """Write rows, one a line, with what has to stand beside them."""
    about = {"commit": commit, "torch": torch.__version__, "device": "none: counted on tensors without data"}
    head = json.dumps({"environment": about, "specs": {name: asdict(spec) for name, spec in SPECS.items()}}, indent=1)
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "results": [\n{lines}\n]}}\n')


def _rounded(value: object) -> object:
    """Times to a tenth of a microsecond."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Predict what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="hiera_base_224", help="of hiera-transformer or sam2_hiera_* (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, nargs="*", help="pixels, frames first for video (default: the model's own)")
    parser.add_argument("--device-spec", default="h100", help=f"{', '.join(SPECS)} or measured (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="autocast", help="bf16 autocast, or the model cast to bf16")
    parser.add_argument("--candidates", nargs="*", choices=CANDIDATES, metavar="NAME", help=", ".join(CANDIDATES))
    parser.add_argument("--recompute", choices=RECOMPUTE, help="setting of accelerate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the kinds of operation as stacked bars")
    parser.add_argument(
        "--predicted", action="store_true", help="count all that the README shows, into results/predicted"
    )
    parser.add_argument("--commit", help="what is counted, where the checkout cannot tell (default: git's answer)")
    options = parser.parse_args(arguments)
    commit = options.commit or current_commit()
    if not has_kernel("mask_unit_attention", "cuda"):
        parser.error("Triton is not installed: without its kernels, accelerated would be counted as plain PyTorch")
    if options.predicted:
        for name, rows in predicted_rows().items():
            written(rows, RESULTS / "predicted" / f"{name}.json", commit)
        return 0
    try:
        specs = SPECS | {options.device_spec: spec_named(options.device_spec)}
    except ValueError as error:
        parser.error(str(error))
    workload = workload_for(options.model, options.batch, tuple(options.size) if options.size else None)
    rows = []
    for candidate in options.candidates or CANDIDATES[: 4 if workload.objective == "mae" else 3]:
        settings = {"recompute": options.recompute} if options.recompute and "accelerated" in candidate else {}
        try:
            rows.append(predict(candidate, workload, options.dtype, settings, specs))
        except rivals.Absent as error:
            print(f"{candidate}: {error}")
            continue
        print(text(rows[-1], options.device_spec, measured_like(rows[-1])), end="\n\n", flush=True)
    for row in rows[1:]:
        times = [
            f"{peer['ms'][options.device_spec] / row['ms'][options.device_spec]:.2f}x {peer['candidate']}"
            for peer in rows
        ]
        kept = row["saved_bytes"] / rows[0]["saved_bytes"]
        print(f"{row['candidate']}: {', '.join(times)}; saves {kept:.2f} of what {rows[0]['candidate']} saves")
    if options.json:
        written(rows, options.json, commit)
    if options.plot:
        from benchmarks.plots import kinds_of_steps

        kinds_of_steps(rows, options.device_spec, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

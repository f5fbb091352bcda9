"""Does it train alike? Stock and accelerated from one seed over the same batches, against the spread of rounding.

    python -m benchmarks.convergence                            # 200 steps of MAE and of classification, fp32 and bf16
    python -m benchmarks.convergence --steps 40 --objectives mae --precisions fp32
    python -m benchmarks.convergence --data ~/Pictures --model hiera_base_224 --size 224 --batch 64 --device cuda

No two runs that round differently stay together for ever: training amplifies one rounding as it amplifies any other
change. So the question is not whether accelerated leaves stock, but whether it does so sooner or further than stock
leaves itself. Its doubles are stock runs that differ in rounding only: every initial weight multiplied by 1 or by
1 + 2^-23 ("one ulp"), windows folded into the batch ("folded"), and with --compile `torch.compile` ("compiled"). The
distance of two runs is the RMS over steps of the relative difference of their losses; the verdict is that accelerated
is at most TWICE as far from stock as the furthest pair of stock's doubles.

Photographs: those that ship with scikit-image and scikit-learn, random crops of them; for classification each
photograph is a class of its own.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import hiera_kernels
from benchmarks.folded import fold
from benchmarks.ops import current_commit, environment
from examples.demo import collect_photographs
from hiera.config import Config
from hiera.run import Run

COLOURS = {
    "stock": "#333333",
    "one ulp": "#8a8a8a",
    "folded": "#6f9fd8",
    "compiled": "#c9a227",
    "accelerated": "#d1495b",
}
# Accelerated is one draw from the distribution whose spread a few doubles estimate: so much further it may be.
FURTHER = 2.0
# Losses are fp32 numbers: a distance below two of their steps says nothing.
FLOOR = 2 * torch.finfo(torch.float32).eps


def doubles(compile_too: bool) -> dict:
    """What makes each run of a fresh model: stock, its doubles, accelerated; each returns the model to train."""
    makers = {"stock": lambda model: model, "one ulp": _one_ulp, "folded": _folded}
    if compile_too:
        makers["compiled"] = torch.compile
    return makers | {"accelerated": _accelerated}


def _one_ulp(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.mul_(torch.where(up, 1 + 2**-23, 1.0).to(parameter.device))
    return model


def _folded(model):
    fold(model)
    return model


def _accelerated(model):
    hiera_kernels.accelerate(model)
    return model


def train_together(config: Config, makers: dict, progress: bool = True) -> dict[str, list[float]]:
    """The loss of every step of every run; all see the same batches, draw the same masks and start from one seed."""
    runs = {name: Run(config) for name in makers}
    models = {name: makers[name](run.model) for name, run in runs.items()}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    title = f"{config.objective}, {config.precision}"
    for batch in tqdm(runs["stock"].loader(), total=config.steps, desc=title, unit="step", disable=not progress):
        for name, run in runs.items():
            run.set_learning_rate()
            losses[name].append(run.guard(run.loss(models[name], batch, run.step)).loss.item())
            run.step += 1
    return losses


def distance(a: list[float], b: list[float]) -> float:
    """RMS over steps of the relative difference; infinite where a loss is not finite."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    apart = ((a - b) / (a.abs() + b.abs()) * 2).square().mean().sqrt().item()
    return apart if apart == apart else float("inf")


def judged(losses: dict[str, list[float]]) -> dict:
    """The verdict on one set of runs.

    Args:
        losses: by name; "stock" and "accelerated" among them, and at least one double.
    """
    stocks = {name: values for name, values in losses.items() if name != "accelerated"}
    spread = max(distance(a, b) for a, b in itertools.combinations(stocks.values(), 2))
    apart = distance(losses["accelerated"], losses["stock"])
    return {"ok": apart <= FURTHER * spread + FLOOR, "distance": apart, "spread": spread, "losses": losses}


def classes_of(photographs: Path, folder: Path) -> Path:
    """A folder with one sub-folder per photograph, as the classification objective wants it."""
    for path in sorted(photographs.iterdir()):
        (folder / path.stem).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.stem)
    return folder


def draw(path: Path, results: list[dict]) -> None:
    """Loss curves above, distances from stock below, one column per result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(4.2 * len(results), 6), squeeze=False, sharex="col")
    for column, result in enumerate(results):
        top, bottom = axes[:, column]
        stock = torch.tensor(result["losses"]["stock"])
        for name, values in result["losses"].items():
            # Accelerated below and wide, so that whatever lies on top of it can be seen too.
            last = name == "accelerated"
            how = {"label": name, "color": COLOURS[name], "linewidth": 2.5 if last else 0.9, "zorder": 1 if last else 2}
            top.plot(values, **how)
            if name != "stock":
                apart = ((torch.tensor(values) - stock).abs() / stock.abs()).clamp_min(1e-9)
                bottom.semilogy(apart, **how)
        verdict = "alike" if result["ok"] else "NOT ALIKE"
        top.set_title(f"{result['objective']}, {result['precision']}: {verdict}")
        top.set_ylabel("loss")
        bottom.set_ylabel("relative difference from stock")
        bottom.set_xlabel("step")
        top.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--objectives", nargs="+", choices=("mae", "classify"), default=["mae", "classify"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--data", type=Path, help="folder of your own images (default: photographs of scikit-image)")
    parser.add_argument("--model", default="hiera_mini_128", help="name of a model (hiera.list_models())")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="a compiled stock run as one more double")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every loss to FILE as well")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--commit", help="what is measured, where the checkout cannot tell (default: git's answer)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, draw; 1 where accelerated strays further than rounding does."""
    options = _parser().parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        photographs = options.data or collect_photographs(Path(scratch) / "photographs")
        for objective, precision in itertools.product(options.objectives, options.precisions):
            classify = objective == "classify"
            data = classes_of(photographs, Path(scratch) / "classes") if classify else photographs
            config = Config(
                data=str(data),
                objective=objective,
                model=options.model,
                size=(options.size,),
                batch=options.batch,
                steps=options.steps,
                precision=precision,
                device=options.device,
                lr=options.lr,
                warmup=min(5, options.steps - 1),
                seed=options.seed,
                workers=0,
                progress=False,
            )
            result = judged(train_together(config, doubles(options.compile), sys.stderr.isatty()))
            results.append({"objective": objective, "model": config.model, "precision": precision, **result})
            print(
                f"{objective:9}{precision:6}{'alike' if result['ok'] else 'NOT ALIKE':11}"
                f"accelerated {result['distance']:.1e} from stock, stock's doubles up to {result['spread']:.1e} apart, "
                f"{options.steps} steps",
                flush=True,
            )
    if options.json:
        about = environment(torch.device(options.device)) | {"commit": options.commit or current_commit()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    if options.plot:
        draw(options.plot, results)
    return int(not all(result["ok"] for result in results))


if __name__ == "__main__":
    sys.exit(main())

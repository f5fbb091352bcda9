"""`make demo`: pre-train a mini Hiera on real photographs, stock and accelerated side by side from the same seed.

    python -m examples.demo --output demo [--data FOLDER] [--steps N] [--batch N]

Both models are `python -m hiera.train` runs (masked autoencoding, the paper's recipe) that see the same batches and
draw the same masks; one of them was given to `hiera_kernels.accelerate`. The demo checks that their outputs and
gradients agree, before the first step and after the last, draws their loss curves on top of each other and what the
model fills in, and writes `report.md`. It exits with 1 if they do not agree.
"""

import argparse
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import skimage
import sklearn
import torch
from tqdm import tqdm

import hiera_kernels
from examples.demo_pictures import draw_loss, draw_reconstruction, reconstruct
from hiera.config import Config
from hiera.data import MEAN, STD, normalise
from hiera.run import Run

# The photographs among what scikit-image and scikit-learn install (their licences are named beside them there).
SKIMAGE = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
           "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "motorcycle_right.png",
           "retina.jpg", "rocket.jpg")  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")

# On two cores the whole demo has four minutes; this much of them is for training.
TRAINING_SECONDS = 130
# Curves of two float32 runs that start equal drift apart by rounding, which training amplifies; this is where "on top
# of each other" ends. A wrong gradient is far beyond it within ten steps (tests/test_demo.py tries one).
DRIFT = {"fp32": 0.01, "bf16": 0.03}


def collect_photographs(folder: Path) -> Path:
    """Copy the photographs that ship with scikit-image and scikit-learn into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Path(skimage.__file__).parent / "data" / name for name in SKIMAGE]
    sources += [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in SKLEARN]
    for source in sources:
        if source.is_file():  # another release of either may ship fewer
            shutil.copy(source, folder)
    return folder


class Pair:
    """Two training runs that differ in one thing: `accelerate` was called on the second one's model."""

    def __init__(self, config: Config):
        self.stock, self.accelerated = Run(config), Run(config)
        self.report = hiera_kernels.accelerate(self.accelerated.model)
        self.losses: tuple[list[float], list[float]] = ([], [])
        self.seconds: tuple[list[float], list[float]] = ([], [])

    def step(self, batch) -> None:
        """One training step of both on the same batch; who goes first alternates, for fair timing."""
        runs = (self.stock, self.accelerated)
        for which in (0, 1) if self.stock.step % 2 == 0 else (1, 0):
            run = runs[which]
            run.set_learning_rate()
            synchronise(run.device)
            start = time.perf_counter()
            stats = run.guard(run.loss(run.model, batch, run.step))
            synchronise(run.device)
            self.seconds[which].append(time.perf_counter() - start)
            self.losses[which].append(stats.loss.item())
        for run in runs:
            run.step += 1

    @property
    def drift(self) -> float:
        """Largest relative difference between the two loss curves."""
        return max(abs(a - b) / abs(a) for a, b in zip(*self.losses, strict=True))

    def median_ms(self) -> tuple[float, float]:
        """Median step time of each, in ms."""
        return tuple(1e3 * statistics.median(seconds) for seconds in self.seconds)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_models(run: Run, batch) -> hiera_kernels.Comparison:
    """Outputs, gradients, time and memory of the stock run's model against an accelerated copy of it."""
    images = normalise(batch.images.to(run.device))
    return hiera_kernels.check(run.model, images)


def steps_that_fit(config: Config, batch) -> int:
    """How many steps of both models fit into the time for training, 30 to 150, by timing two."""
    probe = Pair(config)
    probe.step(batch)
    start = time.perf_counter()
    probe.step(batch)
    return int(min(max(TRAINING_SECONDS / (time.perf_counter() - start), 30), 150))


def write_report(folder: Path, pair: Pair, before, after, agree: bool, seconds: float) -> None:
    """`report.md` in `folder`: what ran, whether it agreed, what it cost."""
    config = pair.stock.config
    stock_ms, accelerated_ms = pair.median_ms()
    stock_loss, accelerated_loss = pair.losses
    device = (
        torch.cuda.get_device_name() if pair.stock.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    text = f"""# Stock and accelerated, side by side

{config.model}, {len(pair.stock.paths)} photographs, {len(stock_loss)} steps of {config.batch} images at \
{"x".join(map(str, config.size))} px, {config.precision}, seed {config.seed}.
{device}; Python {platform.python_version()}, torch {torch.__version__}. The whole demo took {seconds:.0f} s.

**{"They agree." if agree else "THEY DO NOT AGREE."}**

| | stock | accelerated |
|---|---|---|
| median step | {stock_ms:.0f} ms | {accelerated_ms:.0f} ms ({stock_ms / accelerated_ms:.2f}x) |
| first loss | {stock_loss[0]:.6f} | {accelerated_loss[0]:.6f} |
| last loss | {stock_loss[-1]:.6f} | {accelerated_loss[-1]:.6f} |
| largest relative difference of the curves | | {pair.drift:.1e} (allowed {DRIFT[config.precision]:g}) |

![loss](loss.png)

Original, what the model sees, and what it fills in. Training photographs, and a model of a few minutes: the point is
that the picture is the same whichever of the two you take.

![reconstruction](reconstruction.png)

## What was replaced

```
{pair.report}
```

## Outputs and gradients before the first step

```
{before}
```

## After the last step, at the trained weights

```
{after}
```
"""
    (folder / "report.md").write_text(text)


def show_reconstruction(path: Path, pair: Pair, batch) -> None:
    """Draw a few images: original, masked, filled in by either model."""
    images = normalise(batch.images[:6].to(pair.stock.device))
    deviation = images.new_tensor(STD).view(3, 1, 1)
    mean = images.new_tensor(MEAN).view(3, 1, 1)
    ratio, seed = pair.stock.config.mask_ratio, pair.stock.config.seed
    masked, stock = reconstruct(pair.stock.model, images, ratio, seed)
    _, accelerated = reconstruct(pair.accelerated.model, images, ratio, seed)
    rows = [("original", images), (f"{ratio:.0%} masked", masked), ("stock", stock), ("accelerated", accelerated)]
    draw_reconstruction(path, [(name, shown * deviation + mean) for name, shown in rows])


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if stock and accelerated agree, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for report and pictures")
    parser.add_argument("--data", type=Path, help="folder of your own images (default: photographs of scikit-image)")
    parser.add_argument("--model", default="hiera_mini_128", help="name of a model (hiera.list_models())")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, help="default: as many as fit into two minutes, 30 to 150")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.perf_counter()

    options.output.mkdir(parents=True, exist_ok=True)
    data = options.data or collect_photographs(options.output / "photographs")
    settings = dict(data=str(data), model=options.model, size=(options.size,), batch=options.batch, seed=options.seed)
    # The recipe's learning rate is for thousands of epochs at batch 4096; a run of two minutes has to hurry.
    settings |= dict(lr=1.5e-3, warmup=5, workers=0, progress=False)
    config = Config(steps=150, **settings)

    print(f"[1/4] photographs: {data}")
    first = next(iter(Run(config).loader()))
    print(f"[2/4] outputs and gradients before the first step, on {config.device}, {config.precision}")
    steps = options.steps or steps_that_fit(config, first)
    pair = Pair(Config(steps=steps, **(settings | dict(warmup=min(5, steps - 1)))))
    before = compare_models(pair.stock, first)
    print(f"{pair.report}\n\n{before}\n")

    print(f"[3/4] {steps} training steps of both, alternating")
    bar = tqdm(pair.stock.loader(), total=steps, unit="step", mininterval=0.1 if sys.stderr.isatty() else 5.0)
    for batch in bar:
        pair.step(batch)
        stock_ms, accelerated_ms = pair.median_ms()
        bar.set_postfix_str(
            f"loss {pair.losses[0][-1]:.4f} / {pair.losses[1][-1]:.4f}, ms {stock_ms:.0f} / {accelerated_ms:.0f}",
            refresh=False,
        )
    after = compare_models(pair.stock, first)

    print(f"[4/4] pictures and report: {options.output}")
    draw_loss(options.output / "loss.png", *pair.losses, *pair.median_ms())
    show_reconstruction(options.output / "reconstruction.png", pair, first)
    agree = before.ok and after.ok and pair.drift <= DRIFT[config.precision]
    write_report(options.output, pair, before, after, agree, time.perf_counter() - started)
    stock_ms, accelerated_ms = pair.median_ms()
    print(f"{after}\n")
    print(f"step: {stock_ms:.0f} ms stock, {accelerated_ms:.0f} ms accelerated")
    print(f"loss: {pair.losses[0][0]:.4f} -> {pair.losses[0][-1]:.4f}; the curves are at most {pair.drift:.1e} apart")
    print(f"{'They agree' if agree else 'THEY DO NOT AGREE'}: see {options.output / 'report.md'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

"""The steps of the GPU run (gpu_run.py): their commands, their order, what each needs and what it is about."""

import argparse
import ast
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "tests", "sanitize", "ops", "model", "convergence", "tune")
TOKEN_ORDER = ("unroll", "reroll", "embed_tokens")
# Which ops a file test_*_gpu.py is about, by a word of its name; the first that fits. Others are about whole models.
ABOUT = {
    "token_order": TOKEN_ORDER,
    "window": ("window_attention",),
    "attention": ("mask_unit_attention", "q_pool"),
    "linear_q_pool": ("linear_q_pool",),
    "shortcut": ("linear_q_pool",),
    "pool": ("q_pool", "linear_q_pool"),
    "layer_norm": ("add_layer_norm",),
    "rows": ("add_layer_norm", "gelu", "mlp", "linear_q_pool", "q_pool"),
    "gelu": ("gelu", "mlp"),
    "activation": ("gelu", "mlp"),
    "feed_forward": ("gelu", "mlp"),
    "mlp": ("gelu", "mlp", "linear_q_pool"),
}
OPS = ("mask_unit_attention", "add_layer_norm", "gelu", "window_attention", "embed_tokens", "linear_q_pool", "mlp")
OPS += ("q_pool", "unroll", "reroll")
IS_BUILT = """
import pathlib
from hiera_kernels import extension
assert extension.why_not("cuda") is None, extension.why_not("cuda")
newest = max(pathlib.Path("csrc").iterdir(), key=lambda path: path.stat().st_mtime)
assert extension.PATH.stat().st_mtime >= newest.stat().st_mtime, f"{newest} is newer"
"""


@dataclass
class Step:
    """One command. `least`: seconds without which it is not worth starting; `most`: it is ended after so many."""

    kind: str
    name: str
    command: list[str]
    least: float
    most: float
    about: tuple[str, ...] = ()
    needs: list[Path] = field(default_factory=list)
    report: Path | None = None  # a junit file that says which tests failed

    def shown(self) -> str:
        """The command as one would type it."""
        return " ".join(" ".join(self.command).split())


def gpu_test_files() -> list[Path]:
    """Files of tests/ that hold a test marked gpu, those named after it first."""
    found = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    return sorted(found, key=lambda path: ("gpu" not in path.stem, path.stem))


def about(path: Path) -> tuple[str, ...]:
    """The ops that a file of tests is about; empty for whole models."""
    if not path.stem.endswith("_gpu"):
        return ()
    return next((ops for word, ops in ABOUT.items() if word in path.stem), ())


def test_steps(python: str, scratch: Path, workers: int) -> list[Step]:
    """One process for each file, so that a crashed CUDA context takes no other file with it."""
    steps = []
    for path in gpu_test_files():
        report = scratch / f"{path.stem}.xml"
        command = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path.relative_to(ROOT))]
        command += [f"--junitxml={report}", *(["-n", str(workers)] if workers else [])]
        steps.append(Step("tests", path.stem, command, 15, 240, about(path), [path], report))
    return steps


def planned(options: argparse.Namespace, scratch: Path) -> list[Step]:
    """All steps, in order, as if nothing went wrong and time were no matter."""
    python, out = sys.executable, options.out
    ready = [python, "-c", IS_BUILT]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    steps = [
        # A library that was carried along, or built by an earlier call: it takes a minute and a half to make.
        Step("build", "as it is", ready, 0, 60),
        Step("build", "pip", pip, 0, 240, needs=[ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "csrc"]),
        # Where pip itself is not as it should be: the same build, in place.
        Step("build", "in place", [python, "setup.py", "-q", "build_ext", "--inplace"], 0, 240),
    ]
    tests = test_steps(python, scratch, options.workers)
    steps += [step for step in tests if step.about]
    for tool in ("memcheck", "racecheck"):
        sanitizer = [program("compute-sanitizer") or "compute-sanitizer", "--tool", tool]
        sanitizer += ["--error-exitcode", "9", "--print-limit", "20"]
        # Each tensor in an allocation of its own: a byte behind it is then out of bounds.
        allocator = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"] if tool == "memcheck" else []
        command = [*allocator, *sanitizer, python, "-m", "benchmarks.spots"]
        steps.append(Step("sanitize", tool, command, 20, 45, OPS))
    commit = ["--commit", options.commit] if options.commit else []
    ops = [python, "-m", "benchmarks.ops", "--json", str(out / "ops.json"), "--seconds", "0.3", *commit]
    steps.append(Step("ops", "eager rivals", [*ops, "--compile", "0"], 25, 130, OPS))
    steps += [step for step in tests if not step.about]
    model = [python, "-m", "benchmarks.model", "--json", str(out / "model.json"), *commit]
    steps.append(Step("model", "eager rivals", [*model, "--modes", "eager", "cuda-graph"], 30, 200))
    # Compilers take minutes for a model: the one case that matters most, whole, once everything else is known.
    compiled = [*model, "--update", "--only", "hiera_base_224 fine-tune b128"]
    steps.append(Step("ops", "compiled rivals", [*ops, "--compile", "1", "--update", "--first", "1"], 40, 120, OPS))
    steps.append(Step("model", "compiled rivals", compiled, 90, 400))
    # Classification is augmented by kornia.
    curves = [] if importlib.util.find_spec("kornia") else ["--objectives", "mae"]
    curves += ["--json", str(out / "convergence.json"), "--plot", str(out / "convergence.png")]
    curves += commit
    steps.append(Step("convergence", "convergence", [python, "-m", "benchmarks.convergence", *curves], 40, 120))
    tune = [python, "-m", "benchmarks.ops", "mask_unit_attention", "--tune", "--json", str(out / "tune.json")]
    tune += ["--write", str(out / "launch_table.py")]
    steps.append(Step("tune", "tune", tune, 30, 400, ("mask_unit_attention",)))
    return [step for step in steps if not options.only or step.kind in (*options.only, "build")]


def program(name: str) -> str | None:
    """Where a tool of CUDA is: on PATH, or where CUDA is installed."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)]))


def unresolved(step: Step) -> list[str]:
    """What would keep a step from starting: missing files, modules that do not import, arguments they do not know."""
    problems = [f"{path} is missing" for path in step.needs if not path.exists()]
    command = step.command
    if "pytest" in command:
        path = next(Path(word) for word in command if word.startswith("tests/"))
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        marked = any(isinstance(node, ast.Attribute) and node.attr == "gpu" for node in nodes)
        return problems + ([] if marked else [f"{path} has no test marked gpu"])
    module = next((word for word in command if word.startswith("benchmarks.")), None)
    if module is None:
        return problems
    words = command[command.index(module) + 1 :]
    late = ["--seconds-budget", "1"] if step.kind in ("ops", "model", "tune") else []  # what GpuRun.adapted adds
    try:
        loaded = importlib.import_module("benchmarks.tune" if "--tune" in words else module)
        loaded._parser().parse_args(words + late)
    except SystemExit:
        problems.append(f"{module} does not take {' '.join(words)}")
    except Exception as error:
        problems.append(f"{module}: {type(error).__name__}: {error}")
    return problems


def dry_run(steps: list[Step]) -> int:
    """Print the steps; 1 if one of them could not start."""
    bad = 0
    for step in steps:
        print(f"{step.kind:12}{step.name:28}{step.least:4.0f} to {step.most:3.0f} s  {step.shown()}")
        if step.about and step.kind == "tests":
            print(f"{'':12}red: no speed of {', '.join(step.about)}")
        for problem in unresolved(step):
            bad += 1
            print(f"{'':12}UNRESOLVED: {problem}")
    for tool in ("nvcc", "ninja", "compute-sanitizer", "g++"):
        print(f"{tool:20}{program(tool) or 'not found on this machine'}")
    return int(bad > 0)

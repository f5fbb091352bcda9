"""The GPU run: build, parity, sanitizer, speed, tuning, in the order of importance and inside a time budget.

    bash benchmarks/gpu.sh [OUT_DIR]              # the shell script sets the paths and starts this
    bash benchmarks/gpu.sh --dry-run              # print every step and check that it could start; no GPU needed

Every step is a process of its own with a time limit, and what it prints goes to gpu.log. A red test stops the speed
steps of the ops that it is about, and of whole models, not the others; a step that the budget has no time for is
listed. summary.json is written anew after every step, as the steps write their own files after every case. In OUT_DIR
are eight files at most: gpu.log, summary.json, ops.json, model.json, convergence.json and .png, tune.json,
launch_table.py.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import gpu_steps
from benchmarks.gpu_steps import OPS, ROOT, STEPS, Step, dry_run, planned

LAST_LINES = 25


class GpuRun:
    """Runs steps, one after another, and remembers what was red."""

    def __init__(self, options: argparse.Namespace, steps: list[Step]):
        self.options, self.steps = options, steps
        self.began = time.monotonic()
        self.red_ops: dict[str, str] = {}
        self.red_models = ""
        self.done: list[dict] = []
        self.environment: dict = {}

    def left(self) -> float:
        """Seconds of the budget."""
        return self.options.budget - (time.monotonic() - self.began)

    def run(self) -> int:
        """Run all steps; 1 if one was red."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        with (self.options.out / "gpu.log").open("a") as log:
            for step in self.steps:
                self.done.append(self.one(step, log))
                self.write()
                print(f"[{time.monotonic() - self.began:5.0f} s] {step.kind} {step.name}: {self.done[-1]['status']}")
        for entry in self.done:
            if entry["status"] != "green":
                print(f"{entry['kind']} {entry['name']}: {entry['status']}")
        return int(any(entry["status"].startswith("red") for entry in self.done))

    def write(self) -> None:
        """What is known so far."""
        content = {"environment": self.environment, "budget_s": self.options.budget, "steps": self.done}
        content["left_out"] = [e["name"] for e in self.done if e["status"].startswith("left out")]
        content["red_ops"] = self.red_ops
        (self.options.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")

    def one(self, step: Step, log) -> dict:
        """Run a step, unless it must not or cannot run; its entry in the summary."""
        entry = {"kind": step.kind, "name": step.name, "command": step.shown(), "seconds": 0.0, "failures": []}
        if reason := self.refusal(step):
            return entry | {"status": reason}
        command = self.adapted(step)
        limit = min(step.most, max(self.left(), 5.0))
        print(f"\n==> {step.kind} {step.name}: {' '.join(command)}", flush=True)
        began = time.monotonic()
        code, output = execute(command, limit, log)
        entry["seconds"] = round(time.monotonic() - began, 1)
        print("\n".join(output.splitlines()[-LAST_LINES:]), flush=True)
        if step.report:
            entry["failures"] = failures(step.report)
        if step.kind == "build" and code == 0:
            self.environment = described() | {"commit": self.options.commit}
        return entry | {"status": self.verdict(step, code, limit)}

    def refusal(self, step: Step) -> str | None:
        """Why a step is not run, or None."""
        built = any(e["kind"] == "build" and e["status"] == "green" for e in self.done)
        if step.kind == "build" and built:
            return "not needed"
        if step.kind == "sanitize" and gpu_steps.program("compute-sanitizer") is None:
            return "left out: compute-sanitizer is neither on PATH nor in CUDA's bin"
        if step.kind in ("model", "convergence") and (self.red_models or self.red_ops):
            red = [*self.red_ops, *filter(None, [self.red_models])]
            return f"left out: red tests of {', '.join(red)}"
        if step.kind == "tune" and self.red_ops.get("mask_unit_attention"):
            return "left out: red tests of mask_unit_attention"
        if step.kind in ("ops", "sanitize") and not self.green_ops():
            return "left out: the tests of every op are red"
        if self.left() < step.least:
            return f"left out: {max(self.left(), 0):.0f} s of the budget remain, {step.least:.0f} s are needed"
        return None

    def green_ops(self) -> list[str]:
        """The ops of which no test was red, most important first."""
        return [op for op in OPS if op not in self.red_ops]

    def adapted(self, step: Step) -> list[str]:
        """The command for the ops and the time that are left."""
        command = list(step.command)
        if step.kind in ("ops", "sanitize"):
            at = command.index("benchmarks.ops" if step.kind == "ops" else "benchmarks.spots") + 1
            command[at:at] = self.green_ops()
        if step.kind in ("ops", "model", "tune"):
            # A case that has begun is finished: leave it time.
            command += ["--seconds-budget", f"{max(min(step.most, self.left()) - 25, 5):.0f}"]
        return command

    def verdict(self, step: Step, code: int, limit: float) -> str:
        """green, or red and why; what was red is remembered."""
        if code == 0:
            return "green"
        if step.kind == "build" and step is not [s for s in self.steps if s.kind == "build"][-1]:
            return f"left out: exit code {code}, the next way is tried"
        if step.kind == "tests" and code == 5:
            return "left out: no GPU test was selected"
        if step.kind == "sanitize" and code == 124:
            return f"left out: not through after {limit:.0f} s, what it covered is in the log"
        status = f"red: ended after {limit:.0f} s" if code == 124 else f"red: exit code {code}"
        if step.kind == "tests":
            if step.about:
                self.red_ops |= dict.fromkeys(step.about, f"{step.name}: {status}")
            else:
                self.red_models = step.name
        return status


def execute(command: list[str], limit: float, log) -> tuple[int, str]:
    """Run in a process group of its own; (exit code, output), 124 where it was ended after `limit` seconds."""
    log.write(f"\n==> {' '.join(command)}\n")
    log.flush()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HIERA_KERNELS_CUDA": "1"}
    with tempfile.TemporaryFile("w+") as output:
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        except OSError as error:
            log.write(f"{error}\n")
            return 127, str(error)
        try:
            code = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = 124
        output.seek(0)
        text = output.read()
    log.write(text)
    log.flush()
    return code, text


def failures(report: Path) -> list[str]:
    """Names and first lines of the failed tests in a junit file, at most 40."""
    if not report.exists():
        return ["no report was written"]
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            message = (problem.get("message") or "").strip().splitlines()
            found.append(f"{case.get('name')}: {message[0] if message else ''}"[:300])
    return found[:40]


def described() -> dict:
    """The machine, in a process of its own: this one shall hold no GPU memory."""
    script = (
        "import json, torch; from benchmarks.machine import environment;"
        "print(json.dumps(environment(torch.device('cuda'))))"
    )
    asked = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 else {"error": asked.stderr[-500:]}


def default_out() -> Path:
    """benchmarks/results/<machine>."""
    from benchmarks.machine import folder_name

    return ROOT / "benchmarks" / "results" / folder_name(described())


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := [kind for kind in kinds if kind not in STEPS]:
        raise argparse.ArgumentTypeError(f"no such step: {', '.join(unknown)}; there are {', '.join(STEPS)}")
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT_DIR", help="default: benchmarks/results/<machine>")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--only", type=_kinds, help=f"some of {','.join(STEPS)}; the extension is built all the same")
    parser.add_argument("--commit", help="what is run, where the checkout cannot tell (default: git's answer)")
    parser.add_argument("--dry-run", action="store_true", help="print every step and check that it could start")
    parser.add_argument("--workers", type=int, help="test processes (default: 6 with pytest-xdist, else 0)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    options = _parser().parse_args(arguments)
    if options.workers is None:
        options.workers = 6 if importlib.util.find_spec("xdist") else 0
    from benchmarks.machine import current_commit

    options.commit = options.commit or current_commit()
    with tempfile.TemporaryDirectory() as scratch:
        if options.dry_run:
            options.out = options.out or Path("OUT_DIR")
            return dry_run(planned(options, Path(scratch)))
        try:
            import torch
        except ImportError:
            sys.exit("this Python has no torch; name one that has: PYTHON=... bash benchmarks/gpu.sh")
        if not torch.cuda.is_available():
            sys.exit("torch sees no NVIDIA GPU here; everything that needs none is in `make test`")
        if not options.commit:
            sys.exit("no commit is known here, and numbers without one are worth nothing: COMMIT=... names it")
        options.out = (options.out or default_out()).resolve()
        return GpuRun(options, planned(options, Path(scratch))).run()


if __name__ == "__main__":
    sys.exit(main())

"""The GPU run without a GPU: every step could start; red stops what it must and nothing else; nothing hangs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_run, gpu_steps
from benchmarks.gpu_run import GpuRun
from benchmarks.gpu_steps import Step

ROOT = Path(__file__).parent.parent


def test_a_dry_run_resolves_every_step():
    """The command of the README, as a shell runs it; modules import, files are there, arguments are known."""
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UNRESOLVED" not in done.stdout
    kinds = [line.split()[0] for line in done.stdout.splitlines() if line.split()[0] in gpu_steps.STEPS]
    assert list(dict.fromkeys(kinds)) == list(gpu_steps.STEPS)  # in the order of importance
    assert kinds.index("ops") < kinds.index("model") < len(kinds) - kinds[::-1].index("ops")  # compiled rivals later
    for path in gpu_steps.gpu_test_files():
        assert path.name in done.stdout


def test_the_session_itself_wants_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu_run.main([str(tmp_path / "x")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.machine.current_commit", lambda: "")
    with pytest.raises(SystemExit, match="COMMIT="):
        gpu_run.main([str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            Step("ops", "ops", ["python", "-m", "benchmarks.ops", "--no-such-flag"], 0, 1),
            "does not take --no-such-flag",
        ),
        (Step("ops", "ops", ["python", "-m", "benchmarks.no_such_module"], 0, 1), "ModuleNotFoundError"),
        (Step("build", "pip", ["pip"], 0, 1, needs=[ROOT / "no-such-file"]), "no-such-file is missing"),
        (Step("tests", "x", ["python", "-m", "pytest", "tests/test_house.py"], 0, 1), "no test marked gpu"),
    ],
)
def test_a_dry_run_sees_what_would_not_start(step, words, capsys):
    assert words in " ".join(gpu_steps.unresolved(step))
    assert gpu_steps.dry_run([step]) == 1
    assert "UNRESOLVED" in capsys.readouterr().out


def test_every_op_is_known_and_every_file_of_gpu_tests_is_about_something():
    from benchmarks.ops import OPS

    assert set(gpu_steps.OPS) == set(OPS)
    assert {op for ops in gpu_steps.ABOUT.values() for op in ops} == set(OPS)
    assert gpu_steps.about(Path("tests/test_attention_gpu.py")) == ("mask_unit_attention", "q_pool")
    assert all(map(gpu_steps.about, (ROOT / "tests").glob("test_*_gpu.py")))
    assert gpu_steps.about(Path("tests/test_attention_compile.py")) == ()
    assert gpu_steps.about(Path("tests/test_window_attention_gpu.py")) == ("window_attention",)
    assert gpu_steps.about(Path("tests/test_train.py")) == ()


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Runs steps whose commands are one line of Python each; yields (their entries by name, the folder)."""
    monkeypatch.setattr(gpu_run, "described", lambda: {"gpu": "none", "commit": "abc"})
    monkeypatch.setattr(gpu_steps, "program", lambda name: f"/usr/bin/{name}")

    def run(*steps, budget=60.0):
        options = gpu_run._parser().parse_args([str(tmp_path), "--budget", str(budget)])
        code = GpuRun(options, list(steps)).run()
        content = json.loads((tmp_path / "summary.json").read_text())
        return code, {entry["name"]: entry for entry in content["steps"]}, content

    return run


def command(line, *words):
    return [sys.executable, "-c", line, *words]


def echo(kind, name, *words, **settings):
    return Step(kind, name, command("import sys; print(sys.argv[1:])", *words), 0, 20, **settings)


def test_red_tests_stop_the_speed_of_their_op_only(session, tmp_path):
    report = tmp_path / "r.xml"
    write = (
        f"open({str(report)!r}, 'w').write('<t><testcase name=\"a\"><failure message=\"off by 3\"/></testcase></t>')"
    )
    code, steps, content = session(
        echo("build", "pip"),
        echo("build", "in place"),
        Step("tests", "test_gelu_gpu", command(f"{write}; raise SystemExit(1)"), 0, 20, ("gelu", "mlp"), report=report),
        echo("tests", "test_token_order_gpu", about=("unroll",)),
        echo("sanitize", "memcheck", "benchmarks.spots"),
        echo("ops", "ops", "benchmarks.ops"),
        echo("model", "model"),
        echo("tune", "tune"),
    )
    assert code == 1
    assert steps["pip"]["status"] == "green"
    assert steps["in place"]["status"] == "not needed"
    assert steps["test_gelu_gpu"]["status"] == "red: exit code 1"
    assert steps["test_gelu_gpu"]["failures"] == ["a: off by 3"]
    assert steps["ops"]["status"] == steps["tune"]["status"] == "green"
    assert steps["model"]["status"] == "left out: red tests of gelu, mlp"
    assert set(content["red_ops"]) == {"gelu", "mlp"}
    log = (tmp_path / "gpu.log").read_text()
    said = next(line for line in log.splitlines() if line.startswith("['benchmarks.ops'"))
    assert "gelu" not in said
    assert "'mask_unit_attention', 'add_layer_norm', 'window_attention'" in said
    assert "--seconds-budget" in said
    assert content["left_out"] == ["model"]


def test_red_attention_is_not_tuned_and_red_models_are_not_timed(session):
    fail = command("raise SystemExit(1)")
    _, steps, _ = session(
        Step("build", "pip", fail, 0, 20),
        echo("build", "in place"),
        Step("tests", "test_attention_gpu", fail, 0, 20, ("mask_unit_attention",)),
        Step("tests", "test_train", fail, 0, 20),
        echo("ops", "ops", "benchmarks.ops"),
        echo("model", "model"),
        echo("tune", "tune"),
    )
    assert steps["in place"]["status"] == "green"
    assert steps["ops"]["status"] == "green"
    assert steps["tune"]["status"] == "left out: red tests of mask_unit_attention"
    assert steps["model"]["status"] == "left out: red tests of mask_unit_attention, test_train"


def test_nothing_hangs_and_what_does_not_fit_is_listed(session, tmp_path):
    began = time.monotonic()
    hang = command("import subprocess, sys; print('here', flush=True); subprocess.run(['sleep', '60'])")
    code, steps, content = session(
        Step("tests", "test_token_order_gpu", hang, 0, 1, ("unroll", "reroll")),
        Step("sanitize", "memcheck", [*hang, "benchmarks.spots"], 0, 1),
        Step("ops", "ops", ["no-such-program", "benchmarks.ops"], 0, 5),
        Step("model", "model", hang, 1000, 2000),
        Step("tune", "tune", hang, 1000, 2000),
    )
    assert time.monotonic() - began < 20
    assert code == 1
    assert steps["test_token_order_gpu"]["status"] == "red: ended after 1 s"
    assert steps["memcheck"]["status"].startswith("left out: not through after 1 s")
    assert steps["ops"]["status"] == "red: exit code 127"
    assert steps["tune"]["status"].endswith("of the budget remain, 1000 s are needed")
    assert "model" in content["left_out"]
    assert "here" in (tmp_path / "gpu.log").read_text()  # what it printed is kept


def test_at_most_eight_files(tmp_path):
    options = gpu_run._parser().parse_args([str(tmp_path)])
    options.workers = 0
    steps = gpu_steps.planned(options, tmp_path / "scratch")
    named = {
        word for step in steps for word in step.command if word.startswith(f"{tmp_path}/") and "scratch" not in word
    }
    assert len(named | {"gpu.log", "summary.json"}) <= 8


def test_one_kind_of_step_and_the_build_that_it_needs(tmp_path):
    options = gpu_run._parser().parse_args([str(tmp_path), "--only", "sanitize,tune"])
    assert {step.kind for step in gpu_steps.planned(options, tmp_path)} == {"build", "sanitize", "tune"}
    with pytest.raises(SystemExit):
        gpu_run._parser().parse_args(["--only", "everything"])

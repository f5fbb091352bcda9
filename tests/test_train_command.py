"""The command itself, killed and resumed, in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hiera import checkpoint
from hiera.config import parse
from hiera.train import fit
from tests.training import equal, log_of, make_folder, timeless

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"))


STEPS = 40  # enough that a kill at the first checkpoint falls into the run, on a machine that is otherwise busy too


def options(data, folder, objective):
    line = f"--data {data} --objective {objective} --model hiera_mini_128 --size 64 96 --batch 4 --steps {STEPS}"
    rest = f"--save-every 5 --checkpoint-dir {folder} --workers 1 --device cpu --precision fp32 --lr 1e-3"
    return [*line.split(), *rest.split()]


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "hiera.train", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize("objective", ["mae", "classify"])
def test_the_command_killed_and_resumed_ends_like_the_whole_run(objective, data, tmp_path):
    cut = command(*options(data, tmp_path / "cut", objective))
    wait_for(lambda: checkpoint.checkpoints(tmp_path / "cut"), cut)
    if objective == "mae":
        cut.kill()
        assert finish(cut)[0] == -signal.SIGKILL
    else:
        cut.terminate()
        code, out, err = finish(cut)
        assert code == 128 + signal.SIGTERM, err
        assert "saved in" in err
    found = checkpoint.checkpoints(tmp_path / "cut")
    assert found[-1].name < f"step_{STEPS:09d}.pt"

    code, out, err = finish(command(*options(data, tmp_path / "cut", objective), "--resume"))
    assert code == 0, err
    assert f"resuming from {found[-1]}" in out
    assert "11 images" in out
    assert f"{STEPS}/{STEPS}" in err, "the progress bar"
    assert "unreadable=1" in err

    fit(parse([*options(data, tmp_path / "whole", objective), "--no-progress"]))
    a, b = (checkpoint.load_latest(tmp_path / run)[1] for run in ("whole", "cut"))
    assert a["step"] == b["step"] == STEPS
    assert equal(a["model"], b["model"])
    assert equal(a["optimizer"], b["optimizer"])
    assert timeless(log_of(tmp_path / "whole")) == timeless(log_of(tmp_path / "cut"))
    assert len(log_of(tmp_path / "cut")) == STEPS

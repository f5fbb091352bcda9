import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from hiera import checkpoint


def state(step):
    """256 KiB that all say which step they belong to."""
    return {"step": step, "a": torch.full((32768,), float(step)), "b": {"c": torch.full((32768,), float(step))}}


def sound(found, step=None):
    path, loaded = found
    assert step is None or loaded["step"] == step
    assert path.name == f"step_{loaded['step']:09d}.pt"
    assert (loaded["a"] == loaded["step"]).all()
    assert (loaded["b"]["c"] == loaded["step"]).all()
    return loaded["step"]


def test_the_newest_is_loaded_and_only_the_last_few_stay(tmp_path):
    assert checkpoint.load_latest(tmp_path / "absent") is None
    (tmp_path / "step_000000099.pt.part").write_bytes(b"left by a kill")
    (tmp_path / "step_notes.pt").touch()
    for step in (1, 2, 30, 4):
        checkpoint.save(state(step), tmp_path / "runs" / "x", step, keep=2)
        checkpoint.save(state(step), tmp_path, step, keep=9)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "runs" / "x")] == [
        "step_000000004.pt",
        "step_000000030.pt",
    ]
    sound(checkpoint.load_latest(tmp_path), 30)
    assert not list(tmp_path.glob("*.part"))
    assert (tmp_path / "step_notes.pt").exists()


def fail(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def write_half_then_fail(state, file):
    file.write(b"PK\x03\x04 half of it")
    fail()


@pytest.mark.parametrize(
    ("where", "what"),
    [("torch.save", fail), ("torch.save", write_half_then_fail), ("os.fsync", fail), ("os.replace", fail)],
)
def test_a_failure_while_saving_leaves_the_one_before(where, what, tmp_path, monkeypatch):
    checkpoint.save(state(1), tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(where, what)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(state(2), tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.pt"]
    sound(checkpoint.load_latest(tmp_path), 1)
    checkpoint.save(state(2), tmp_path, 2, keep=1)
    sound(checkpoint.load_latest(tmp_path), 2)


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_older_ones_go(tmp_path, monkeypatch):
    """A kill of the process cannot show this order, only a power cut: so the calls themselves are watched."""
    checkpoint.save(state(1), tmp_path, 1, keep=1)
    calls = []

    def watch(module, name, describe):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.append((name, describe(*a))), real(*a, **k))[1])

    watch(torch, "save", lambda *a: None)
    watch(os, "fsync", lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    watch(os, "replace", lambda old, new: new.name)
    watch(type(tmp_path), "unlink", lambda path: path.name)
    checkpoint.save(state(2), tmp_path, 2, keep=1)
    assert calls[:4] == [
        ("save", None),
        ("fsync", "step_000000002.pt.part"),
        ("replace", "step_000000002.pt"),
        ("unlink", "step_000000002.pt.part"),  # absent by now
    ]
    assert calls[4:] == [("fsync", tmp_path.name), ("unlink", "step_000000001.pt")]


def in_child(target, *arguments):
    """A forked process: it need not import torch anew, so that many can be killed."""
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


def save_killed_at(point, folder):
    def die(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half_and_die(_state, file):
        file.write(b"PK\x03\x04 half of it")
        file.flush()
        die()

    replace = os.replace
    if point == "writing":
        torch.save = write_half_and_die
    elif point == "before the rename":
        os.replace = die
    elif point == "after the rename":
        os.replace = lambda *a: (replace(*a), die())
    checkpoint.save(state(2), folder, 2, keep=1)


@pytest.mark.parametrize(("point", "left"), [("writing", 1), ("before the rename", 1), ("after the rename", 2)])
def test_a_kill_at_the_worst_moment_leaves_a_loadable_checkpoint(point, left, tmp_path):
    """Broken on purpose: with `torch.save(state, path)` in place of part + rename, "writing" fails."""
    checkpoint.save(state(1), tmp_path, 1, keep=1)
    child = in_child(save_killed_at, point, tmp_path)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    sound(checkpoint.load_latest(tmp_path), left)
    checkpoint.save(state(3), tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000003.pt"]


def save_for_ever(folder, first):
    step = first
    while True:
        checkpoint.save(state(step), folder, step, keep=2)
        step += 1


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    dice = random.Random(0)
    checkpoint.save(state(1), tmp_path, 1)
    last, parts = 1, 0
    for _ in range(25):
        child = in_child(save_for_ever, tmp_path, last + 1)
        time.sleep(dice.uniform(0.02, 0.08))
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        parts += bool(list(tmp_path.glob("*.part")))
        step = sound(checkpoint.load_latest(tmp_path))
        assert step >= last
        assert len(checkpoint.checkpoints(tmp_path)) <= 3
        last = step
    assert last > 5, "the children must have got to saving"
    assert parts, "not one kill fell into a save: this run proved nothing"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(state(step), tmp_path, step)
    newest = tmp_path / "step_000000003.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"step_000000003.pt cannot be read .*trying the one before"):
        sound(checkpoint.load_latest(tmp_path), 2)
    for path in checkpoint.checkpoints(tmp_path):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(ValueError, match="none of the 3 checkpoints"),
    ):
        checkpoint.load_latest(tmp_path)


class Anything:
    def __reduce__(self):
        return os.system, ("exit 0",)


def test_loading_runs_no_code_of_the_file(tmp_path):
    checkpoint.save({"step": 1}, tmp_path, 1)
    checkpoint.save({"step": 2, "x": Anything()}, tmp_path, 2)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert checkpoint.load_latest(tmp_path)[1] == {"step": 1}

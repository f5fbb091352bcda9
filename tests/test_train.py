import dataclasses
import itertools
import math
import threading
from functools import partial

import pytest
import torch
from PIL import Image, ImageOps

import hiera_kernels
from hiera import checkpoint
from hiera.guard import GuardedStep, NonFiniteError, StepStats
from hiera.run import Run
from hiera.runlog import RunLog
from hiera.train import fit
from tests.training import equal, log_of, make_folder, small_run, timeless


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"))


class Killed(Exception):
    pass


def die_after(step):
    def callback(record, model):
        if record["step"] == step:
            raise Killed

    return callback


OBJECTIVES = {
    "mae": {"objective": "mae", "drop_path": 0.2},
    "mae bf16": {"objective": "mae", "precision": "bf16"},
    "classify": {"objective": "classify"},
    "classify fp16": {"objective": "classify", "precision": "fp16", "clip_grad": 1.0},
}


@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_is_killed_and_resumed_is_the_whole_run_bit_for_bit(name, data, tmp_path):
    """Broken on purpose: red without the optimizer's state, the scaler's, the stream's start, or the seed per step."""
    options = OBJECTIVES[name] | {"save_every": 3}
    whole = fit(small_run(data, **options, checkpoint_dir=str(tmp_path / "whole")))
    with pytest.raises(Killed):
        fit(small_run(data, **options, checkpoint_dir=str(tmp_path / "cut")), callback=die_after(4))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["step_000000003.pt"]
    torch.manual_seed(123)
    resumed = fit(small_run(data, **options, checkpoint_dir=str(tmp_path / "cut"), resume=True, workers=1))

    assert [record["step"] for record in resumed.history] == [3, 4, 5]
    assert timeless(whole.history)[3:] == timeless(resumed.history)
    assert len({record["loss"] for record in whole.history}) == 6
    ends = [checkpoint.load_latest(tmp_path / run)[1] for run in ("whole", "cut")]
    for state in ends:
        state.pop("config")
    assert ends[0]["step"] == 6
    assert equal(*ends)
    assert equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert timeless(log_of(tmp_path / "whole")) == timeless(log_of(tmp_path / "cut")), "every step once, in order"


@pytest.mark.filterwarnings("ignore:unreadable images")
def test_the_log_tells_every_step(data, tmp_path):
    result = fit(small_run(data, log=str(tmp_path / "deep" / "log.jsonl"), lr=None, steps=10))
    lines = log_of(tmp_path / "deep")
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["epoch"] for line in lines] == pytest.approx([step * 4 / 11 for step in range(10)])
    assert lines[1]["lr"] == max(line["lr"] for line in lines) == pytest.approx(8e-4 * 4 / 4096)
    assert lines[0]["lr"] == pytest.approx(lines[1]["lr"] / 2), "one step of warm-up in ten"
    for line, record in zip(lines, result.history, strict=True):
        assert line.pop("unreadable_files", {}).keys() <= {str(data / "ant" / "broken.jpg")}
        assert line == record
        assert 0 < line["loss"] < 10
        assert line["grad_norm"] > 0
        assert line["images_per_second"] == pytest.approx(4 / line["seconds"])
        assert 100 < line["memory_mib"] < 1e5
        assert line["skipped"] == 0
    assert lines[-1]["unreadable"] == 1


def test_one_warning_for_all_unreadable_images(data):
    with pytest.warns(UserWarning, match=r"unreadable images are skipped; the first is .*broken.jpg \(Unid") as caught:
        fit(small_run(data, steps=8))
    assert len([w for w in caught if "unreadable" in str(w.message)]) == 1


def test_it_learns_and_leaves_the_callers_random_state_alone(tmp_path):
    """What can be learnt is known: every patch of a vertical ramp looks alike, and two colours are two classes."""
    for name, dark, bright in (("green", (0, 60, 0), (0, 255, 0)), ("red", (60, 0, 0), (255, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(4):
            ramp = Image.linear_gradient("L").resize((90 + i, 120))
            ImageOps.colorize(ramp, dark, bright).save(tmp_path / name / f"{i}.png")
    before = torch.get_rng_state()
    mae = fit(small_run(tmp_path, steps=60, lr=2e-3)).history
    off = {"mixup": 0.0, "cutmix": 0.0, "randaugment": 0.0, "erasing": 0.0, "label_smoothing": 0.0}
    off |= {"layer_decay": 1.0, "drop_path": 0.0}
    classes = fit(small_run(tmp_path, steps=60, objective="classify", **off)).history
    assert torch.equal(torch.get_rng_state(), before)
    for history, chance in ((mae, 1.0), (classes, math.log(2))):
        losses = [record["loss"] for record in history]
        assert losses[0] > 0.9 * chance
        assert max(losses[-5:]) < 0.5 * chance


def spoil(monkeypatch, bad_steps):
    """Every loss of these steps becomes NaN, as a bad kernel would make it."""
    loss = Run.loss

    def spoilt(run, model, batch, step):
        return loss(run, model, batch, step) * (torch.nan if step in bad_steps else 1)

    monkeypatch.setattr(Run, "loss", spoilt)


@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize("objective", ["mae", "classify"])
def test_a_skipped_step_is_the_same_as_no_step(objective, data, tmp_path, monkeypatch):
    config = partial(small_run, data, objective=objective)
    with monkeypatch.context() as patch:
        spoil(patch, {0, 2, 3})
        skipped = fit(config(checkpoint_dir=str(tmp_path / "skipped")))
    with monkeypatch.context() as patch:
        step, done = GuardedStep.__call__, []

        def leave_out(guard, loss):
            done.append(loss)
            zero = torch.zeros((), dtype=torch.float64)
            return StepStats(*[zero] * 5) if len(done) - 1 in {0, 2, 3} else step(guard, loss)

        patch.setattr(GuardedStep, "__call__", leave_out)
        fit(config(checkpoint_dir=str(tmp_path / "without")))
    assert [record["skipped"] for record in skipped.history] == [1, 1, 2, 3, 3, 3]
    a, b = (checkpoint.load_latest(tmp_path / run)[1] for run in ("skipped", "without"))
    assert equal(a["model"], b["model"])
    assert equal(a["optimizer"], b["optimizer"])
    assert [line["loss"] for line in log_of(tmp_path / "skipped")][2] is None, "NaN is not JSON"


@pytest.mark.filterwarnings("ignore:unreadable images")
def test_after_too_many_bad_steps_it_stops_with_step_images_and_module(data, tmp_path, monkeypatch):
    """A kernel that turns bad at step 4: the message must name what the module of that moment was given."""
    shown = {}
    loss = Run.loss

    def watch(run, model, batch, step):
        shown.setdefault(step, batch.paths)
        run.model.blocks[3].bad = step >= 4
        return loss(run, model, batch, step)

    monkeypatch.setattr(Run, "loss", watch)
    build = Run.__init__

    def build_with_bad_kernel(run, config):
        build(run, config)
        run.model.blocks[3].register_forward_pre_hook(lambda block, args: (args[0] * torch.nan,) if block.bad else None)

    monkeypatch.setattr(Run, "__init__", build_with_bad_kernel)
    records = []
    with pytest.raises(NonFiniteError) as caught:
        fit(
            small_run(data, steps=30, max_bad_steps=3, checkpoint_dir=str(tmp_path), save_every=1),
            callback=lambda record, model: records.append(record),
        )
    error = caught.value
    assert error.step == 6
    assert error.paths == shown[6]
    assert error.culprit.startswith("blocks.3.")
    for part in ("step 6", "3 steps in a row", "blocks.3.", *shown[6]):
        assert part in str(error)
    assert records[-1]["step"] == 6
    end = log_of(tmp_path)[-1]
    assert (end["event"], end["step"], end["images"]) == ("stopped", 6, shown[6])
    _, state = checkpoint.load_latest(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize("size", [(64, 96), (96, 128)])
def test_fine_tuning_starts_from_mae_weights(size, data, tmp_path):
    fit(small_run(data, steps=2, checkpoint_dir=str(tmp_path)))
    path, state = checkpoint.load_latest(tmp_path)
    tuned = fit(small_run(data, objective="classify", steps=1, lr=0.0, init=str(path), size=size)).model.state_dict()
    assert tuned["head.projection.weight"].shape[0] == 2
    taken = [k for k in tuned if not k.startswith(("head.", "norm."))]
    assert len(taken) > 50
    for key in taken:
        if key != "pos_embed" or size == (64, 96):
            assert torch.equal(tuned[key], state["model"][key]), key
    assert tuned["pos_embed"].shape == (1, size[0] * size[1] // 16, 32)


@pytest.mark.filterwarnings("ignore:unreadable images")
def test_resume_refuses_what_would_not_be_the_same_run(data, tmp_path):
    run = partial(small_run, data, checkpoint_dir=str(tmp_path / "c"), save_every=3)
    assert fit(run(resume=True)).step == 6, "nothing there yet: a fresh start"
    with pytest.raises(ValueError, match="holds checkpoints already"):
        fit(run())
    with pytest.raises(ValueError, match=r"batch was 4 and is 5; mask_ratio was 0.6 and is 0.5 \(to start from its"):
        fit(run(resume=True, batch=5, mask_ratio=0.5))
    with pytest.raises(ValueError, match="the checkpoint is at step 6, past the end of this run, 5"):
        fit(run(resume=True, steps=5))
    assert fit(run(resume=True)).history == [], "a finished run has nothing left to do"
    longer = fit(run(resume=True, steps=8, workers=1))
    assert [record["step"] for record in longer.history] == [6, 7]
    more = make_folder(tmp_path / "more", 12)
    with pytest.raises(ValueError, match="the folder held 11 images, now 13"):
        fit(dataclasses.replace(run(resume=True), data=str(more)))


@pytest.mark.filterwarnings("ignore:unreadable images")
def test_an_interrupted_run_saves_and_returns(data, tmp_path):
    stop = threading.Event()
    config = small_run(data, checkpoint_dir=str(tmp_path), steps=50)
    result = fit(config, callback=lambda record, model: record["step"] == 2 and stop.set(), stop=stop)
    assert result.step == 4
    assert [record["step"] for record in result.history] == [0, 1, 2, 3]
    assert checkpoint.load_latest(tmp_path)[1]["step"] == 4


@pytest.mark.filterwarnings("ignore:unreadable images")
def test_epochs_small_folders_and_equal_seeds(tmp_path):
    few = make_folder(tmp_path, 2)
    a, b, c = (fit(small_run(few, steps=None, epochs=5, batch=8, seed=s)) for s in (0, 0, 1))
    assert a.step == 2, "5 passes over 3 files are 15 images, two batches of 8"
    assert timeless(a.history) == timeless(b.history) != timeless(c.history)


@pytest.mark.filterwarnings("ignore:unreadable images")
def test_compile_and_accelerate_are_one_line_each(data, monkeypatch, capsys):
    """The MAE step compiles whole; the swap is called with the model, before it, and its report is shown."""
    plain = fit(small_run(data, steps=2))
    calls = []
    compiled = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda model: (calls.append(("compile", model)), compiled(model))[1])
    monkeypatch.setattr(
        hiera_kernels, "accelerate", lambda model: calls.append(("accelerate", model)) or "the report", raising=False
    )
    result = fit(small_run(data, steps=2, compile=True, accelerate=True))
    assert [name for name, _ in calls] == ["accelerate", "compile"]
    assert all(model is result.model for _, model in calls)
    assert "the report" in capsys.readouterr().out
    assert timeless(plain.history) == timeless(result.history)


@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize("objective", ["mae", "classify"])
def test_a_swapped_model_trains_the_same_and_its_checkpoint_is_anyones(objective, data, tmp_path, capsys):
    run = partial(small_run, data, objective=objective, checkpoint_dir=str(tmp_path), save_every=3)
    with pytest.raises(Killed):
        fit(run(accelerate=True), callback=die_after(4))
    assert "replaced" in capsys.readouterr().out
    resumed = fit(run(resume=True))
    plain = fit(small_run(data, objective=objective))
    assert [record["step"] for record in resumed.history] == [3, 4, 5]
    losses = [[record["loss"] for record in result.history[-3:]] for result in (plain, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0][::-1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_step_of_pre_training_does_not_synchronise_the_gpu(precision, data):
    run = Run(small_run(data, device="cuda", precision=precision))
    first, second = itertools.islice(run.loader(), 2)
    run.set_learning_rate()
    run.guard(run.loss(run.model, first, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.guard(run.loss(run.model, second, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_log_line_that_a_kill_cut_off_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"event": "stopped", "step": 2}\n{"step": 3, "lo')
    with RunLog(path, 9, start=2, progress=False) as log:
        log.write({"step": 2, "loss": float("inf"), "none": None, "paths": ["a"]})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "loss": null, "none": null, "paths": ["a"]}\n'
    with RunLog(path, 9, start=0, progress=False):
        pass
    assert path.read_text() == ""

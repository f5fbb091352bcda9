"""`benchmarks.model`: every candidate is stock's computation before it is timed, and a failure is a row, not an end."""

import json

import pytest
import torch
from torch import nn

from benchmarks import model as command
from benchmarks import rivals, stepping
from benchmarks.folded import fold
from benchmarks.model_parity import Judge, reading, same_as_eager
from benchmarks.stepping import Entry, measure
from benchmarks.workloads import QUICK, WORKLOADS, Workload

CPU = torch.device("cpu")
FINE_TUNE, MAE, INFERENCE = QUICK


def test_names_say_model_size_objective_and_batch():
    names = [workload.name for workload in WORKLOADS]
    assert len(set(names)) == len(names)
    assert {"hiera_base_224 fine-tune b128", "mae_hiera_base_16x224 mae b16", "sam2_hiera_b+ trunk b8"} <= set(names)
    assert "hiera_base_224 2048x3072 fine-tune b1" in names


def test_recipes_are_the_published_ones():
    rates = {workload.name: workload.drop_path for workload in WORKLOADS}
    assert rates["hiera_base_224 fine-tune b128"] == 0.1
    assert rates["mae_hiera_base_224 mae b256"] == 0.2
    assert rates["hiera_base_224 inference b64"] == 0.0


def test_the_command_times_what_it_found_equal(tmp_path, capsys):
    path = tmp_path / "model.json"
    status = command.main(["--quick", "--only", "mae", "--rounds", "2", "--json", str(path), "--commit", "f" * 40])
    content = json.loads(path.read_text())
    assert status == 0
    assert content["environment"]["commit"] == "f" * 40
    rows = {row["candidate"]: row for row in content["results"]}
    assert rows["folded"]["parity"] == rows["accelerated"]["parity"] == rows["accelerated hiera"]["parity"] == "green"
    assert all(rows[name]["ms"] > 0 and rows[name]["rounds"] == 2 for name in ("stock", "folded", "accelerated"))
    assert rows["timm"]["ms"] is None
    assert "timm has image classifiers only" in rows["timm"]["error"]
    assert rows["stock"]["dtype"] == "float32"
    assert "x best peer" in capsys.readouterr().out


def test_what_is_measured_anew_replaces_its_workload_only(tmp_path):
    path = tmp_path / "model.json"
    settings = ["--quick", "--candidates", "stock", "--rounds", "1", "--json", str(path), "--commit", "f" * 40]
    command.main([*settings, "--only", "inference"])
    command.main([*settings, "--only", "mae", "--update"])
    command.main([*settings, "--only", "mae", "--update"])
    cases = [row["case"] for row in json.loads(path.read_text())["results"]]
    assert cases == ["hiera_mini_128 inference b16", "mae_hiera_mini_128 mae b8"]
    command.main([*settings, "--only", "mae", "--update", "--commit", "a" * 40])
    assert [row["case"] for row in json.loads(path.read_text())["results"]] == ["mae_hiera_mini_128 mae b8"]


def test_nothing_is_set_up_after_the_deadline():
    tiny = Workload("inference", "hiera_mini_128", 2, (128, 128))
    rows = measure(tiny, [Entry("stock", "eager")], CPU, "fp32", 1, deadline=0.0)
    assert (rows[0]["error"], rows[0]["ms"]) == ("no time was left", None)


def test_an_unknown_workload_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit):
        command.main(["--quick", "--only", "no such thing"])
    assert "hiera_mini_128 fine-tune b8" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stock():
    return rivals.build("stock", FINE_TUNE, FINE_TUNE.size)


@pytest.fixture(scope="module")
def judge(stock):
    return Judge(
        FINE_TUNE, stock, FINE_TUNE.inputs(CPU, 2, FINE_TUNE.size), rivals.autocast_of("fp32", CPU), torch.float32
    )


@pytest.mark.parametrize("candidate", ["folded", "accelerated", "accelerated hiera"])
def test_candidates_are_the_same_computation(judge, candidate):
    verdict = judge(rivals.build(candidate, FINE_TUNE, FINE_TUNE.size))
    assert verdict.ok, str(verdict)


def test_a_wrong_scale_of_one_attention_is_red(judge):
    model = rivals.build("stock", FINE_TUNE, FINE_TUNE.size)
    attn = model.blocks[2].attn
    attn.register_forward_hook(lambda module, inputs, output: output * 1.01)
    verdict = judge(model)
    assert not verdict.ok
    assert "RED" in str(verdict)


class _BentGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


def test_a_wrong_gradient_under_right_values_is_red(judge):
    model = rivals.build("stock", FINE_TUNE, FINE_TUNE.size)
    model.blocks[1].register_forward_hook(lambda module, inputs, output: _BentGradient.apply(output))
    assert not judge(model).ok


def test_a_missing_gradient_is_red(judge):
    model = rivals.build("stock", FINE_TUNE, FINE_TUNE.size)
    model.blocks[0].norm1.weight.requires_grad_(False)
    verdict = judge(model)
    assert not verdict.ok
    assert verdict.worst_tensor == "gradient blocks.0.norm1.weight (missing)"


def test_judging_leaves_the_model_alone(judge, stock):
    rates = [module.drop_prob for module in stock.modules() if hasattr(module, "drop_prob")]
    judge(stock)
    assert rates == [module.drop_prob for module in stock.modules() if hasattr(module, "drop_prob")]
    assert rates[-1] > 0
    assert all(parameter.grad is None for parameter in stock.parameters())


def test_a_compiled_step_is_held_against_its_eager_one(judge, stock):
    inputs, autocast = FINE_TUNE.inputs(CPU, 2, FINE_TUNE.size), rivals.autocast_of("fp32", CPU)
    eager = reading(FINE_TUNE, stock, inputs, autocast)
    assert same_as_eager(eager, reading(FINE_TUNE, stock, inputs, autocast), judge)
    assert not same_as_eager(eager, reading(FINE_TUNE, stock, inputs, autocast, seed=1), judge)  # other drop path


def test_a_replayed_step_is_held_against_its_eager_one(judge):
    def draw():
        return 1 + torch.rand(1)

    stale = 1 + torch.zeros(1)
    assert stepping.replays(draw, draw, judge)
    assert not stepping.replays(lambda: stale, draw, judge)


def test_failures_are_rows_and_the_others_go_on(monkeypatch):
    def fails(workload, size):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(rivals.BUILDERS, "folded", fails)
    monkeypatch.setitem(rivals.BUILDERS, "timm", lambda workload, size: nn.Linear(2, 2))
    tiny = Workload("fine-tune", "hiera_mini_128", 2, (128, 128))
    rows = measure(tiny, [Entry("folded", "eager"), Entry("timm", "eager"), Entry("stock", "eager")], CPU, "fp32", 1)
    assert rows[0]["error"] == "out of memory"
    assert rows[1]["error"].startswith("RuntimeError")
    assert rows[1]["ms"] is None
    assert rows[2]["ms"] > 0


def test_without_stock_every_candidate_is_a_row_that_says_so(monkeypatch):
    def absent(workload, size):
        raise rivals.Absent("the package sam2 is not installed")

    monkeypatch.setattr(rivals, "stock", absent)
    rows = measure(INFERENCE, [Entry("stock", "eager"), Entry("accelerated", "eager")], CPU, "fp32", 1)
    assert {row["error"] for row in rows} == {"no stock to compare with: the package sam2 is not installed"}
    assert all(row["ms"] is None for row in rows)
    assert "not installed" in command.table([row | {"dtype": "float32"} for row in rows])


def test_a_red_candidate_has_no_time(monkeypatch):
    def halved(workload, size):
        model = rivals.stock(workload, size)
        model.blocks[-1].attn.proj.weight.data *= 0.5
        return model

    monkeypatch.setitem(rivals.BUILDERS, "folded", halved)
    tiny = Workload("inference", "hiera_mini_128", 2, (128, 128))
    row = measure(tiny, [Entry("folded", "eager")], CPU, "fp32", 1)[0]
    assert (row["parity"], row["ms"], row["images_per_s"]) == ("red", None, None)
    assert "RED" in row["verdict"]


@pytest.mark.parametrize("precision", ["bf16", "bf16-cast"])
def test_low_precision_runs_and_is_judged_in_it(precision):
    tiny = Workload("fine-tune", "hiera_mini_128", 2, (128, 128))
    rows = measure(tiny, [Entry("accelerated", "eager")], CPU, precision, 1)
    assert rows[0]["parity"] == "green", rows[0]["verdict"]
    assert rows[0]["error"] is None


def test_timm_has_stocks_weights():
    small = Workload("inference", "hiera_tiny_224", 1)
    images = small.inputs(CPU, 1, small.size)[0]
    with torch.no_grad():
        stock, timm = (rivals.build(name, small, small.size)(images) for name in ("stock", "timm"))
    assert torch.allclose(stock, timm, rtol=1e-4, atol=1e-6)


def test_folding_needs_something_to_fold():
    with pytest.raises(ValueError, match="no attention with qkv"):
        fold(nn.Linear(2, 2))


def test_peak_and_pools_are_left_out_on_a_cpu():
    assert stepping._allocated(CPU) == 0

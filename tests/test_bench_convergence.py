"""`benchmarks.convergence`: alike where only rounding differs, not where one block has gradients off by 3 percent."""

import json

import pytest
import torch

from benchmarks import convergence
from benchmarks.convergence import distance, judged


def test_the_command_trains_all_runs_and_draws_them(tmp_path, capsys):
    json_file, plot = tmp_path / "convergence.json", tmp_path / "convergence.png"
    settings = ["--steps", "5", "--batch", "2", "--objectives", "mae", "classify", "--precisions", "fp32"]
    status = convergence.main([*settings, "--json", str(json_file), "--plot", str(plot), "--commit", "e" * 40])
    content = json.loads(json_file.read_text())
    assert status == 0, capsys.readouterr().out
    assert [(r["objective"], r["precision"], r["ok"]) for r in content["results"]] == [
        ("mae", "fp32", True),
        ("classify", "fp32", True),
    ]
    for result in content["results"]:
        losses = result["losses"]
        assert set(losses) == {"stock", "one ulp", "folded", "accelerated"}
        assert all(len(values) == 5 for values in losses.values())
        assert losses["one ulp"] != losses["stock"]  # else there would be no spread to compare with
        assert losses["stock"][-1] != losses["stock"][0]
    assert content["environment"]["commit"] == "e" * 40
    assert plot.stat().st_size > 10_000


def test_gradients_of_one_block_off_by_3_percent_are_seen(tmp_path, monkeypatch):
    def bent(model):
        for parameter in model.blocks[1].parameters():
            parameter.register_hook(lambda gradient: gradient * (1 + 0.03 * torch.randn_like(gradient)))
        return model

    monkeypatch.setattr(convergence, "_accelerated", bent)
    settings = ["--steps", "8", "--batch", "2", "--objectives", "mae", "--precisions", "fp32"]
    assert convergence.main([*settings, "--json", str(tmp_path / "c.json"), "--commit", "e" * 40]) == 1


def test_distance_is_relative_and_knows_nan():
    assert distance([1.0, 2.0], [1.0, 2.0]) == 0
    assert distance([1.0, 1.0], [1.1, 1.1]) == pytest.approx(0.1 / 1.05)
    assert distance([1e6], [1.1e6]) == pytest.approx(0.1 / 1.05)
    assert distance([1.0, float("nan")], [1.0, 1.0]) == float("inf")


def test_the_verdict_weighs_accelerated_against_the_spread():
    stock, double = [1.0] * 4, [1.001] * 4
    assert judged({"stock": stock, "double": double, "accelerated": [1.0015] * 4})["ok"]
    assert not judged({"stock": stock, "double": double, "accelerated": [1.0025] * 4})["ok"]
    assert not judged({"stock": stock, "double": double, "accelerated": [float("nan")] * 4})["ok"]

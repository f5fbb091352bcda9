"""`make demo` in small: it runs on the photographs, leaves what it promises, and says so when the two do not agree."""

import dataclasses

import pytest

import hiera_kernels
from examples import demo
from hiera.config import Config

SMALL = ["--batch", "4", "--steps", "2"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return demo.collect_photographs(tmp_path_factory.mktemp("photographs"))


def test_the_demo_agrees_and_leaves_report_and_pictures(tmp_path, capsys):
    assert demo.main([*SMALL, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "They agree" in said
    assert "mask_unit_attention" in said
    report = (tmp_path / "report.md").read_text()
    assert "**They agree.**" in report
    for picture in ("loss.png", "reconstruction.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in report
    assert len(list((tmp_path / "photographs").iterdir())) >= 10


def test_the_demo_fails_where_outputs_or_gradients_disagree(tmp_path, photographs, monkeypatch, capsys):
    """A gradient that is wrong only in the model that `check` compares at the end."""
    real, calls = hiera_kernels.check, []

    def check(model, batch):
        calls.append(1)
        found = real(model, batch, repeats=1)
        if len(calls) < 2:
            return found
        wrong = dataclasses.replace(found.gradients[0], accelerated=1.0)
        return dataclasses.replace(found, gradients=[wrong, *found.gradients[1:]])

    monkeypatch.setattr(hiera_kernels, "check", check)
    assert demo.main([*SMALL, "--data", str(photographs), "--output", str(tmp_path)]) == 1
    assert "THEY DO NOT AGREE" in capsys.readouterr().out
    assert "**THEY DO NOT AGREE.**" in (tmp_path / "report.md").read_text()


def test_a_wrong_gradient_drives_the_curves_apart(photographs):
    """The gradient of every qkv weight, off by one input channel."""
    settings = {"data": str(photographs), "model": "hiera_mini_128", "size": (128,), "batch": 4, "lr": 1.5e-3}
    pair = demo.Pair(Config(steps=10, warmup=1, workers=0, progress=False, **settings))
    for block in pair.accelerated.model.blocks:
        block.attn.qkv.weight.register_hook(lambda gradient: gradient.roll(1, 1))
    for batch in pair.stock.loader():
        pair.step(batch)
    assert pair.drift > demo.DRIFT["fp32"]

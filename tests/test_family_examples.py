"""The examples run, are short, and show what they promise: the losses of both models side by side."""

from pathlib import Path

import pytest

from tests.upstream import load

FOLDER = Path(__file__).parent.parent / "examples"
# the package that it needs, how many modules it accelerates
EXAMPLES = {
    "finetune_timm": ("timm", 26),
    "mae_transformers": ("transformers", 13),
    "sam2_encoder": ("sam2.build_sam", 24),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, capsys):
    package, replaced = EXAMPLES[name]
    load(package)
    stock, accelerated = load(f"examples.{name}").main(["--steps", "1"])
    assert len(stock) == len(accelerated) == 2
    assert stock[0] != stock[1]
    assert accelerated == pytest.approx(stock, rel=1e-4)
    printed = capsys.readouterr().out
    assert f"replaced: {replaced} modules" in printed
    assert printed.count("ms a step") == 2
    assert "largest difference in loss" in printed


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60

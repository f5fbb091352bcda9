"""Every published encoder against hiera-transformer: initial weights, outputs, intermediates, all gradients."""

import inspect

import pytest
import torch

import hiera
from tests.model_pairs import both_precisions, pair
from tests.upstream import load_upstream, variant_settings

IMAGE = [f"hiera_{size}_224" for size in ("tiny", "small", "base", "base_plus", "large", "huge")]
VIDEO = [f"hiera_{size}_16x224" for size in ("base", "base_plus", "large", "huge")]


@pytest.mark.parametrize("name", IMAGE + VIDEO)
def test_variant_at_full_width(name):
    size = (4, 64, 96) if name in VIDEO else (64, 96)
    ours, theirs = pair(name, stages=(1, 1, 1, 1), input_size=size)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def run(model, dtype):
        logits, stages = model(x.to(dtype), return_intermediates=True)
        return [logits, *stages]

    both_precisions(ours, theirs, run)
    # Both ways, strictly: the names are upstream's.
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hiera_base_224"])
def test_whole_variant(name):
    ours, theirs = pair(name)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def run(model, dtype):
        logits, stages = model(x.to(dtype), return_intermediates=True)
        return [logits, *stages]

    both_precisions(ours, theirs, run)
    with torch.no_grad():
        probabilities, expected = ours.eval()(x), theirs.eval()(x)
    assert torch.allclose(probabilities, expected, rtol=0, atol=1e-12)
    assert abs(probabilities.sum().item() - 1) < 1e-12


@pytest.mark.parametrize("name", hiera.list_models())
def test_every_setting_is_upstreams(name):
    """Whole variants, without building upstream's: what its function passes, and its defaults for the rest."""
    if "mini" in name:
        assert not hasattr(load_upstream(), name)
        return
    cls, settings = variant_settings(name)
    with torch.device("meta"):
        ours = hiera.create_model(name)
    assert type(ours).__name__ == cls.__name__
    small = {"stages": (1, 1), "q_pool": 1, "embed_dim": 8, "input_size": (32, 32)}
    expected = dict(load_upstream().Hiera(**small).config)
    defaults = {**expected, **{key: ours_default(key) for key in small}}
    if name.startswith("mae_"):
        signature = inspect.signature(cls.__init__).parameters.values()
        defaults.update({p.name: p.default for p in signature if p.default is not inspect.Parameter.empty})
    for key, value in {**defaults, **settings}.items():
        if key == "norm_layer":
            assert isinstance(ours.blocks[0].norm1, torch.nn.LayerNorm)
            assert ours.blocks[0].norm1.eps == 1e-6
            continue
        assert ours.config[key] == value, key
    function = getattr(load_upstream(), name)
    ours_function = getattr(hiera, name)
    assert ours_function.checkpoints == function.checkpoints
    assert ours_function.default == function.default


def ours_default(key):
    """Upstream's defaults for what the small model above has to set; they are in its README and in the paper."""
    return {"stages": (2, 3, 16, 3), "q_pool": 3, "embed_dim": 96, "input_size": (224, 224)}[key]

"""Masked autoencoders at the limits: ratios that keep or hide nothing, and batches of nothing."""

import re

import pytest
import torch

from hiera import MaskedAutoencoderHiera
from tests.model_pairs import SMALL_MAE, SMALL_VIDEO_MAE, mae_pair, picture

# One mask unit of 2 x 2 tokens of 4 x 4 pixels: an input of (8, 8 * units) has `units` of them.
ROW = {**SMALL_MAE, "stages": (1, 1), "q_pool": 1, "mask_unit_size": (2, 2), "mask_unit_attn": (True, False)}


@pytest.mark.parametrize("mask_ratio", [0.99, 60, -0.5, 0.0, 1.0, 1e-20, float("nan"), float("inf")])
def test_a_ratio_that_keeps_or_hides_nothing_is_refused_by_name(mask_ratio):
    """Upstream's loss at 0.0 is NaN, the mean of nothing, in silence."""
    model = MaskedAutoencoderHiera(**SMALL_MAE)
    message = (
        f"mask_ratio must be above 0 and at most 0.8333, to keep 1 to 5 of this input's 6 mask units, got {mask_ratio}"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        model(torch.randn(2, 3, 96, 64), mask_ratio=mask_ratio)


@pytest.mark.parametrize("units", [2, 4, 5, 10])
def test_the_bound_that_is_told_is_one_that_works(units):
    """5 * (1 - 0.8) is 0.9999..., so 4 of 5 units cannot be hidden by the ratio 0.8."""
    model = MaskedAutoencoderHiera(**{**ROW, "input_size": (8, 8 * units)})
    x = torch.randn(1, 3, 8, 8 * units)
    with pytest.raises(ValueError) as error:
        model(x, mask_ratio=0.999)
    most = float(re.search(r"at most ([0-9.]+),", str(error.value))[1])
    assert 1 - 1 / units - 1e-4 <= most <= 1 - 1 / units
    loss, _, _, mask = model(x, mask_ratio=most)
    assert loss.isfinite()
    assert mask.sum() == 1


def test_the_encoder_alone_may_hide_nothing():
    """Features of whole pictures are no loss; they are upstream's."""
    ours, theirs = mae_pair(**SMALL_MAE)
    x = picture(2, 3, 96, 64)
    latent, mask = ours.forward_encoder(x, 0.0)
    torch.testing.assert_close(latent, theirs.forward_encoder(x, 0.0)[0], rtol=0, atol=1e-12)
    assert mask.all()
    for mask_ratio in (-0.5, 0.99):
        with pytest.raises(ValueError, match=r"mask_ratio must be at least 0 and at most 0\.8333, to keep 1 to 6 of"):
            ours.forward_encoder(x, mask_ratio)
    single = MaskedAutoencoderHiera(**{**ROW, "input_size": (8, 8)})
    assert single.forward_encoder(torch.randn(1, 3, 8, 8), 0.0)[1].tolist() == [[True]]
    with pytest.raises(ValueError, match=r"mask_ratio must be at least 0 and at most 0\.0, to keep 1 to 1 of"):
        single.forward_encoder(torch.randn(1, 3, 8, 8), 0.5)


@pytest.mark.filterwarnings("ignore:var")  # of no label at all
@pytest.mark.parametrize("settings", [SMALL_MAE, SMALL_VIDEO_MAE], ids=["image", "video"])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("given", ["nothing", "mask", "mask and len_keep"])
def test_empty_batch(settings, grad_checkpointing, given):
    model = MaskedAutoencoderHiera(**settings, grad_checkpointing=grad_checkpointing)
    units = torch.Size(model.mask_spatial_shape).numel()
    kwargs = {} if given == "nothing" else {"mask": torch.zeros(0, units, dtype=torch.bool)}
    if given == "mask and len_keep":
        kwargs["len_keep"] = 2
    x = torch.randn(0, 3, *settings["input_size"], requires_grad=True)
    loss, pred, label, mask = model(x, **kwargs)
    assert loss.isnan()  # torch's mean of nothing
    assert pred.shape == label.shape == (0, model.decoder_pred.out_features)
    assert mask.shape == (0, units)
    loss.backward()
    assert x.grad.shape == x.shape
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name

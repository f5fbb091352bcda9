"""Every masked autoencoder against hiera-transformer: weights, mask, loss, predictions, labels, all gradients."""

import pytest
import torch

import hiera
from hiera import MaskedAutoencoderHiera
from tests.model_pairs import SMALL_MAE as SMALL
from tests.model_pairs import SMALL_VIDEO_MAE as SMALL_VIDEO
from tests.model_pairs import assert_parity, assert_same_run, both_precisions, mae_pair, pair, picture

IMAGE = [f"mae_hiera_{size}_224" for size in ("tiny", "small", "base", "base_plus", "large", "huge")]
VIDEO = [f"mae_hiera_{size}_16x224" for size in ("base", "base_plus", "large", "huge")]


@pytest.mark.parametrize("name", IMAGE + VIDEO)
def test_variant_at_full_width(name):
    size = (4, 64, 96) if name in VIDEO else (64, 96)
    ours, theirs = pair(name, stages=(1, 1, 1, 1), decoder_depth=1, input_size=size)
    x = picture(2, 3, *size)
    # The same generator state draws the same mask; loss, predictions, labels and mask are the outputs compared.
    both_precisions(ours, theirs, lambda model, dtype: list(model(x.to(dtype), mask_ratio=0.6)))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["mae_hiera_tiny_224", "mae_hiera_base_224"])
def test_whole_variant(name):
    ours, theirs = pair(name)
    x = picture(1, 3, 224, 224)
    both_precisions(ours, theirs, lambda model, dtype: list(model(x.to(dtype))))


@pytest.mark.parametrize("settings", [SMALL, SMALL_VIDEO], ids=["image", "video"])
@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.6, 0.8])
def test_random_mask(settings, mask_ratio):
    ours, theirs = mae_pair(**settings)
    x = picture(3, 3, *settings["input_size"])
    if mask_ratio == 0.0:  # nothing to predict: upstream's loss is the mean of nothing
        torch.manual_seed(3)
        outputs = ours(x, mask_ratio)
        assert outputs[0].isnan()
        assert outputs[1].shape == outputs[2].shape == (0, theirs.decoder_pred.out_features)
        assert outputs[3].all()
        return
    assert_same_run(ours, theirs, lambda model: list(model(x, mask_ratio)))


@pytest.mark.parametrize("settings", [SMALL, SMALL_VIDEO], ids=["image", "video"])
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_given_mask(settings, kept):
    ours, theirs = mae_pair(**settings)
    x = picture(2, 3, *settings["input_size"])
    units = 6 if settings is SMALL else 12
    mask = torch.zeros(2, units, dtype=torch.bool)
    mask[0, :kept] = True
    mask[1, units - kept :] = True
    assert_same_run(ours, theirs, lambda model: list(model(x, mask=mask)))
    with_count, without = ours(x, mask=mask, len_keep=kept), ours(x, mask=mask)
    for a, b in zip(with_count, without, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {"q_pool": 1},
        {"q_pool": 3, "stages": (1, 1, 1, 1)},
        {"stages": (1, 1, 2), "mask_unit_size": (4, 4), "input_size": (48, 80), "mask_unit_attn": (True, False, False)},
        {"q_stride": (2, 2), "patch_stride": (2, 2), "patch_kernel": (3, 3), "patch_padding": (1, 1)},
        {"in_chans": 2, "mlp_ratio": 3.0, "num_heads": 2, "head_mul": 1.0},
    ],
    ids=["q_pool 1", "q_pool 3", "three stages", "patches of 2", "channels"],
)
def test_settings(change):
    settings = {**SMALL, **change}
    ours, theirs = mae_pair(**settings)
    x = picture(2, settings.get("in_chans", 3), *settings["input_size"])
    assert_same_run(ours, theirs, lambda model: list(model(x)))


def test_the_parts_one_by_one():
    """forward_encoder, forward_decoder, forward_loss and the labels, called as upstream's users call them."""
    for settings in (SMALL, SMALL_VIDEO):
        ours, theirs = mae_pair(**settings)
        x = picture(2, 3, *settings["input_size"])
        results = []
        for model in (ours, theirs):
            torch.manual_seed(2)
            latent, mask = model.forward_encoder(x, 0.5)
            pred, visible = model.forward_decoder(latent, mask)
            loss, chosen, label = model.forward_loss(x, pred, ~visible)
            get_label = model.get_pixel_label_2d if settings is SMALL else model.get_pixel_label_3d
            raw = get_label(x, ~visible, norm=False)
            results.append([latent, mask, pred, visible, loss, chosen, label, raw])
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            assert_parity(f"part {i}", a, b)


def test_labels_by_hand():
    """The pixels of a masked token, written out with loops: channels are slowest in pictures, fastest in videos."""
    model = MaskedAutoencoderHiera(**SMALL)
    s = model.pred_stride
    x = picture(2, 3, 96, 64)
    mask = torch.zeros(2, 6 * 4, dtype=torch.bool)
    mask[0, [1, 9]] = True
    mask[1, [0, 23]] = True
    label = model.get_pixel_label_2d(x, mask, norm=False)
    for row, (b, token) in enumerate([(0, 1), (0, 9), (1, 0), (1, 23)]):
        top, left = token // 4 * s, token % 4 * s
        assert torch.equal(label[row].view(3, s, s), x[b, :, top : top + s, left : left + s])
    normed = model.get_pixel_label_2d(x, mask, num_masked=2)
    expected = (label[1] - label[1].mean()) / (label[1].std(unbiased=True) ** 2 + 1e-6).sqrt()
    assert torch.allclose(normed[1], expected, rtol=1e-12, atol=0)

    model = MaskedAutoencoderHiera(**SMALL_VIDEO)
    x = picture(1, 3, 4, 64, 96)
    mask = torch.zeros(1, 2 * 4 * 6, dtype=torch.bool)
    mask[0, 24 + 8] = True  # second pair of frames, row 1, column 2
    label = model.get_pixel_label_3d(x, mask, norm=False)
    assert torch.equal(label[0].view(s, s, 3), x[0, :, 2, s : 2 * s, 2 * s : 3 * s].permute(1, 2, 0))


def test_visible_pixels_alone_reach_the_encoder():
    """A hidden pixel changes no prediction; a visible one does (so the first assertion can fail)."""
    model = hiera.mae_hiera_mini_128().double().eval()
    x = picture(1, 3, 128, 128)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 5, 6]] = True
    pred = model.forward_decoder(*model.forward_encoder(x, 0.0, mask=mask))[0]
    hidden, visible = x.clone(), x.clone()
    hidden[:, :, 0:32, 32:64] += 1  # unit 1, next to units 0 and 5
    visible[:, :, 0:32, 31] += 1
    assert torch.equal(pred, model.forward_decoder(*model.forward_encoder(hidden, 0.0, mask=mask))[0])
    assert not torch.equal(pred, model.forward_decoder(*model.forward_encoder(visible, 0.0, mask=mask))[0])


def test_refusals():
    model = MaskedAutoencoderHiera(**SMALL)
    x = torch.randn(2, 3, 96, 64)
    uneven = torch.tensor([[True, True, False, False, False, False], [True, False, False, False, False, False]])
    with pytest.raises(ValueError, match="same number of mask units; rows keep 1 to 2"):
        model(x, mask=uneven)
    with pytest.raises(ValueError, match="len_keep=2, but the rows"):
        model(x, mask=uneven[1:].expand(2, 6), len_keep=2)
    with pytest.raises(ValueError, match="keeps no mask unit"):
        model(x, mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="len_keep must be 1 to 6, got 0"):
        model(x, mask_ratio=0.99)
    with pytest.raises(ValueError, match="square of pixels"):
        MaskedAutoencoderHiera(**{**SMALL, "patch_stride": (4, 2), "patch_padding": (3, 3), "patch_kernel": (7, 7)})
    with pytest.raises(ValueError, match=r"mask_unit_size = q_stride \*\* \(len\(stages\) - 1\) = \(8, 8\)"):
        MaskedAutoencoderHiera(**{**SMALL, "mask_unit_size": (4, 4)})
    line = {"input_size": (64,), "q_stride": (2,), "mask_unit_size": (8,), "patch_kernel": (7,), "patch_stride": (4,)}
    line = MaskedAutoencoderHiera(**{**SMALL, **line, "patch_padding": (3,)})
    with pytest.raises(NotImplementedError, match="pictures and videos"):
        line(torch.randn(1, 3, 64), mask_ratio=0.5)


@pytest.mark.parametrize("settings", [SMALL, SMALL_VIDEO], ids=["image", "video"])
def test_autocast_gives_upstreams_dtypes_and_numbers(settings):
    """Under autocast the stream changes dtype on its way; ours changes where upstream's does, so the numbers agree to
    the last bit, gradients included (scatter and index_select move numbers, they do not round them)."""
    ours, theirs = mae_pair(**settings)
    ours, theirs = ours.float(), theirs.float()
    x = picture(2, 3, *settings["input_size"]).float()
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            latent, mask = model.forward_encoder(x, 0.6)
            outputs = model(x, mask=mask)
        outputs[0].backward()
        results.append([latent, *outputs, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)

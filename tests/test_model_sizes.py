"""Other sizes than trained for, the absolute-win embedding, activation checkpointing, layer scale."""

import pytest
import torch

from hiera import Hiera, HieraBlock, MaskedAutoencoderHiera
from tests.model_pairs import SMALL_MAE, SMALL_VIDEO_MAE, assert_parity, assert_same_run, picture
from tests.upstream import import_timm

SMALL = {"input_size": (64, 64), "embed_dim": 8, "num_classes": 5, "stages": (1, 2, 1, 1)}
VIDEO = {
    **SMALL,
    "input_size": (4, 64, 64),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
}
LINE = {
    **SMALL,
    "input_size": (64,),
    "q_stride": (2,),
    "mask_unit_size": (8,),
    "patch_kernel": (7,),
    "patch_stride": (4,),
    "patch_padding": (3,),
}


def timm_abs_win(name="hiera_small_abswin_256", **settings):
    """timm's model with every parameter random: its initial layer scale of 1e-5 would hide a wrong block."""
    model = import_timm().create_model(name, pretrained=False, **settings).double()
    generator = torch.Generator().manual_seed(8)
    for parameter_name, parameter in model.named_parameters():
        scale = 0.5 if "gamma" in parameter_name or "norm" in parameter_name else 0.05
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model


def ours_like(theirs, **settings):
    model = Hiera(
        abs_win=True,
        global_pos_size=theirs.pos_embed.shape[2:],
        layer_scale=1e-5,
        **settings,
    ).double()
    report = model.load_pretrained(theirs.state_dict())
    assert report == ([], [], {})
    return model


def test_whole_small_abs_win_is_timms():
    theirs = timm_abs_win().eval()
    ours = ours_like(theirs, input_size=(256, 256), stages=(1, 2, 11, 2), expand_proj=False)
    x = picture(1, 3, 256, 256)
    with torch.no_grad():
        logits, stages = ours(x, return_intermediates=True)  # in training mode: logits; nothing is dropped
        expected = theirs.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        assert_parity("logits", logits, theirs(x))
    assert len(stages) == len(expected) == 4
    for i, pair in enumerate(zip(stages, expected, strict=True)):
        assert_parity(f"stage {i}", *pair)


@pytest.mark.parametrize("name", ["hiera_small_abswin_256", "hiera_base_abswin_256"])
@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_abs_win_gradients_are_timms(name, size):
    theirs = timm_abs_win(name, stages=(1, 1, 1, 1), img_size=size, num_classes=7)
    ours = ours_like(theirs, input_size=size, stages=(1, 1, 1, 1), num_classes=7, expand_proj="base" in name)
    x = picture(2, 3, *size)
    weight = picture(2, 7)
    for model in (ours, theirs):
        (model(x) * weight).sum().backward()
    names = {"norm.": "head.norm.", "head.projection.": "head.fc.", "pos_embed_window": "pos_embed_win"}
    theirs = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        their_name = parameter_name
        for mine, their in names.items():
            if parameter_name.startswith(mine):
                their_name = their + parameter_name[len(mine) :]
        assert_parity(parameter_name, parameter.grad, theirs.pop(their_name).grad)
    assert not theirs


def test_dynamic_abs_win_equals_timm_built_for_that_size():
    theirs = timm_abs_win(stages=(1, 1, 1, 1), img_size=(96, 160), num_classes=7)
    ours = ours_like(theirs, stages=(1, 1, 1, 1), num_classes=7, expand_proj=False, dynamic_size=True)
    x = picture(2, 3, 96, 160)
    assert_parity("logits", ours(x), theirs(x))


@pytest.mark.parametrize(
    ("settings", "size"),
    [(SMALL, (96, 32)), (SMALL, (32, 128)), (LINE, (96,)), (VIDEO, (4, 96, 64)), (VIDEO, (8, 32, 64)),
     ({**VIDEO, "sep_pos_embed": True}, (2, 64, 96)), ({**SMALL, "abs_win": True}, (64, 96)),
     ({**VIDEO, "abs_win": True, "global_pos_size": (2, 7, 7)}, (6, 64, 32)), ({**LINE, "abs_win": True}, (128,)),
     ({**SMALL, "q_pool": 1}, (96, 64))],
)  # fmt: skip
def test_dynamic_size(settings, size):
    """A dynamic model, and the same weights loaded into a model of that size, agree in outputs and gradients."""
    dynamic = Hiera(**settings, dynamic_size=True)
    fixed = Hiera(**{**settings, "input_size": size})
    if "abs_win" not in settings:
        report = fixed.load_pretrained(dynamic.state_dict(), source_size=settings["input_size"])
        assert set(report.resized) <= {"pos_embed", "pos_embed_spatial", "pos_embed_temporal"}
        assert report.resized
    else:
        fixed.load_state_dict(dynamic.state_dict(), strict=True)
    dynamic.double(), fixed.double()
    x = picture(2, 3, *size)
    trained = {n: p for n, p in dynamic.named_parameters() if n.startswith("pos_embed")}
    one_unit = torch.zeros(2, torch.Size(fixed.mask_spatial_shape).numel(), dtype=torch.bool)
    one_unit[0, 0] = one_unit[1, -1] = True
    for mask in (one_unit, None):
        logits, stages = dynamic(x, mask=mask, return_intermediates=True)
        expected, expected_stages = fixed(x, mask=mask, return_intermediates=True)
        # The fixed model's embedding was interpolated in fp32, the dynamic model interpolates it in fp64.
        assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(stages, expected_stages, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    # At its own size it is the static model, bit for bit.
    static = Hiera(**settings).double()
    static.load_state_dict(dynamic.state_dict())
    x = picture(1, 3, *settings["input_size"])
    assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize(("settings", "size"), [(SMALL_MAE, (64, 128)), (SMALL_VIDEO_MAE, (8, 32, 64))])
def test_dynamic_masked_autoencoder(settings, size):
    dynamic = MaskedAutoencoderHiera(**settings, dynamic_size=True)
    fixed = MaskedAutoencoderHiera(**{**settings, "input_size": size})
    report = fixed.load_pretrained({"model_state": dynamic.state_dict()}, source_size=settings["input_size"])
    assert "decoder_pos_embed" in report.resized
    x = torch.randn(2, 3, *size)
    outputs = []
    for model in (dynamic, fixed):
        torch.manual_seed(4)
        outputs.append(model(x))
    assert outputs[0][0].shape == ()
    for a, b in zip(*outputs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)


def test_a_dynamic_size_must_tile():
    model = Hiera(**SMALL, dynamic_size=True)
    with pytest.raises(ValueError, match=r"x's size \(80, 96\) does not tile .*: \(64 or 96, 96\)"):
        model(torch.randn(1, 3, 80, 96))
    with pytest.raises(ValueError, match=r"x's size \(16, 31\) .*: \(32, 32\)"):
        model(torch.randn(1, 3, 16, 31))


class CountingCalls:
    def __init__(self, modules):
        self.calls = 0
        for module in modules:
            module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1


@pytest.mark.parametrize("kind", ["encoder", "autoencoder"])
def test_checkpointing_gives_the_same_gradients(kind):
    settings = {"drop_path_rate": 0.5}
    cls, small = (Hiera, SMALL) if kind == "encoder" else (MaskedAutoencoderHiera, SMALL_MAE)
    plain, saving = cls(**small, **settings), cls(**small, **settings, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = picture(4, 3, *plain.input_size)
    blocks = [module for module in saving.modules() if isinstance(module, HieraBlock)]
    counter = CountingCalls(blocks)

    def run(model):
        outputs = model(x)
        return [outputs] if kind == "encoder" else list(outputs)

    assert_same_run(saving.double(), plain.double(), run)
    assert counter.calls == 2 * len(blocks)  # forward, and again in the backward
    with torch.no_grad():
        run(saving)
    assert counter.calls == 3 * len(blocks)
    saving.set_grad_checkpointing(False)
    assert_same_run(saving, plain, run)
    assert counter.calls == 4 * len(blocks)


def test_layer_scale():
    """Zero factors leave the shortcut alone; factors of one leave the model as it is without."""
    plain = Hiera(**SMALL).double()
    scaled = Hiera(**SMALL, layer_scale=1.0).double()
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"blocks.{i}.ls{k}.gamma" for i in range(5) for k in (1, 2)]
    x = picture(2, 3, 64, 64)
    assert torch.equal(scaled(x), plain(x))
    for block in scaled.blocks:
        block.ls1.gamma.data.zero_()
        block.ls2.gamma.data.zero_()
    first = scaled.blocks[0]
    tokens = scaled.embed_tokens(x)
    assert torch.equal(first(tokens), tokens)

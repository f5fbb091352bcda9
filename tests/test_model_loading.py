"""Loading weights: files, key layouts, other sizes, classes and families, and the published models' functions."""

import pickle

import pytest
import torch

import hiera
from hiera import Hiera, MaskedAutoencoderHiera
from hiera.checkpoint_loading import from_timm, read_state_dict
from tests.model_pairs import SMALL_MAE, assert_parity, picture
from tests.upstream import import_timm, load_upstream

SMALL = {"input_size": (64, 64), "embed_dim": 8, "num_classes": 5, "stages": (1, 2, 1, 1)}


def same_weights(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)


@pytest.mark.parametrize("wrapper", [None, "model_state", "state_dict", "model"])
@pytest.mark.parametrize("as_path", [False, True])
def test_layouts(tmp_path, wrapper, as_path):
    state = Hiera(**SMALL).state_dict()
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    source = content
    if as_path:
        source = tmp_path / "weights.pth"
        torch.save(content, source)
    model = Hiera(**SMALL)
    assert not same_weights(model, state)
    report = model.load_pretrained(source)
    assert same_weights(model, state)
    assert (report.missing, report.unexpected, report.resized) == ([], [], {})


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    state = Hiera(**SMALL).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    model = Hiera(**SMALL)
    model.load_pretrained(str(tmp_path / "weights.safetensors"))
    assert same_weights(model, state)


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_file_cannot_run_code(tmp_path, capsys):
    torch.save({"model_state": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError):
        Hiera(**SMALL).load_pretrained(tmp_path / "weights.pth")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model_state": {}}, [1, 2]])
def test_no_state_dict(content):
    with pytest.raises(ValueError, match="source must hold a state dict"):
        read_state_dict(content)


def test_mismatches_are_listed_and_nothing_is_loaded():
    model = Hiera(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = Hiera(**SMALL).state_dict()
    state["blocks.9.norm1.weight"] = torch.zeros(8)
    del state["norm.bias"]
    state["blocks.0.attn.qkv.weight"] = torch.zeros(24, 9)
    with pytest.raises(ValueError) as error:
        model.load_pretrained(state)
    text = str(error.value)
    assert "blocks.9.norm1.weight is unexpected" in text
    assert "norm.bias is missing" in text
    assert "blocks.0.attn.qkv.weight has shape (24, 9), the model's has (24, 8)" in text
    assert same_weights(model, before)
    with pytest.raises(ValueError, match="has shape") as error:  # another shape is never tolerated
        model.load_pretrained(state, strict=False)
    assert "missing" not in str(error.value)
    state["blocks.0.attn.qkv.weight"] = torch.zeros(24, 8)
    report = model.load_pretrained(state, strict=False)
    assert report.missing == ["norm.bias"]
    assert report.unexpected == ["blocks.9.norm1.weight"]
    assert model.blocks[0].attn.qkv.weight.abs().max() == 0


def test_another_number_of_classes_keeps_the_new_head():
    state = Hiera(**{**SMALL, "num_classes": 9}).state_dict()
    model = Hiera(**SMALL)
    head = model.head.projection.weight.clone()
    report = model.load_pretrained(state)
    assert report.missing == ["head.projection.bias", "head.projection.weight"]
    assert torch.equal(model.head.projection.weight, head)
    assert torch.equal(model.norm.bias, state["norm.bias"])


def test_an_encoder_takes_an_autoencoders_weights_and_the_other_way_round():
    autoencoder = MaskedAutoencoderHiera(**SMALL_MAE)
    settings = {key: value for key, value in SMALL_MAE.items() if not key.startswith("decoder")}
    encoder = Hiera(**{**settings, "q_pool": 3})
    report = encoder.load_pretrained(autoencoder.state_dict())
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"}
    assert torch.equal(encoder.blocks[2].mlp.fc1.weight, autoencoder.blocks[2].mlp.fc1.weight)
    other = MaskedAutoencoderHiera(**SMALL_MAE)
    report = other.load_pretrained(encoder.state_dict())
    assert "mask_token" in report.missing
    assert all(name.startswith(("mask_token", "decoder_", "encoder_norm.", "multi_scale_")) for name in report.missing)
    assert torch.equal(other.blocks[2].mlp.fc1.weight, autoencoder.blocks[2].mlp.fc1.weight)
    broken = autoencoder.state_dict()
    del broken["blocks.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1\.weight is missing"):
        encoder.load_pretrained(broken)


def test_sizes_by_guess_and_by_name():
    import_timm()
    from timm.layers import resample_abs_pos_embed

    square = Hiera(**{**SMALL, "input_size": (96, 96)}).state_dict()
    model = Hiera(**{**SMALL, "input_size": (64, 128)})
    report = model.load_pretrained(square)
    assert report.resized == {"pos_embed": ((1, 24 * 24, 8), (1, 16 * 32, 8))}
    expected = resample_abs_pos_embed(square["pos_embed"], [16, 32], [24, 24], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed.data, expected)

    wide = Hiera(**{**SMALL, "input_size": (64, 128)}).state_dict()
    tall = Hiera(**{**SMALL, "input_size": (128, 64)})
    tall.load_pretrained(wide)  # as many positions: nothing tells that they are another grid
    assert torch.equal(tall.pos_embed.data, wide["pos_embed"])
    tall.load_pretrained(wide, source_size=(64, 128))
    expected = resample_abs_pos_embed(wide["pos_embed"], [32, 16], [16, 32], num_prefix_tokens=0)
    assert torch.equal(tall.pos_embed.data, expected)

    small = Hiera(**SMALL)
    with pytest.raises(
        ValueError, match="pos_embed has 512 positions, which is not a square picture: give source_size="
    ):
        small.load_pretrained(wide)
    small.load_pretrained(wide, source_size=(64, 128))
    with pytest.raises(ValueError, match="which is not the grid"):
        small.load_pretrained(wide, source_size=(64, 64 + 32))
    with pytest.raises(ValueError, match="source_size must have 2 lengths"):
        small.load_pretrained(wide, source_size=(64,))


def test_absolute_win_backgrounds_of_another_grid():
    for dims in (1, 2):
        settings = {"input_size": (64,) * dims, "q_stride": (2,) * dims, "mask_unit_size": (8,) * dims}
        settings |= {"patch_kernel": (7,) * dims, "patch_stride": (4,) * dims, "patch_padding": (3,) * dims}
        source = Hiera(**{**SMALL, **settings, "abs_win": True, "global_pos_size": (6,) * dims}).state_dict()
        model = Hiera(**{**SMALL, **settings, "abs_win": True, "global_pos_size": (4, 7)[:dims]})
        report = model.load_pretrained(source)
        assert list(report.resized) == ["pos_embed"]
        mode = {"mode": "linear"} if dims == 1 else {"mode": "bicubic", "antialias": True}
        expected = torch.nn.functional.interpolate(source["pos_embed"], (4, 7)[:dims], **mode)
        assert torch.equal(model.pos_embed.data, expected)
        assert torch.equal(model.pos_embed_window.data, source["pos_embed_window"])
    plain = Hiera(**SMALL).state_dict()
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 256, 8\), the model's has"):
        Hiera(**SMALL, abs_win=True).load_pretrained(plain)


def test_video_sizes():
    def build(size):
        return hiera.mae_hiera_base_16x224(
            stages=(1, 1, 1, 1),
            embed_dim=8,
            decoder_embed_dim=16,
            decoder_depth=1,
            decoder_num_heads=2,
            input_size=size,
        )

    state = build((4, 64, 64)).state_dict()
    model = build((8, 64, 96))
    report = model.load_pretrained(state)
    assert report.resized == {
        "pos_embed_temporal": ((1, 2, 8), (1, 4, 8)),
        "pos_embed_spatial": ((1, 256, 8), (1, 384, 8)),
        "decoder_pos_embed": ((1, 2 * 16, 16), (1, 4 * 24, 16)),
    }
    dynamic = hiera.mae_hiera_base_16x224(**{**model.config, "input_size": (4, 64, 64), "dynamic_size": True})
    dynamic.load_pretrained(state)
    x = torch.randn(1, 3, 8, 64, 96)
    losses = []
    for each in (model, dynamic):
        torch.manual_seed(0)
        losses.append(each(x)[0])
    assert torch.allclose(*losses, rtol=1e-5)


def test_timms_plain_hiera_maps_too():
    theirs = (
        import_timm().create_model("hiera_tiny_224", stages=(1, 1, 1, 1), img_size=(64, 96), num_classes=7).double()
    )
    ours = hiera.hiera_tiny_224(stages=(1, 1, 1, 1), input_size=(64, 96), num_classes=7).double()
    ours.load_pretrained(theirs.state_dict())
    x = picture(2, 3, 64, 96)
    assert_parity("logits", ours(x), theirs(x))
    assert from_timm({"head.fcx": 1, "pos_embed_win": 2, "blocks.0.attn.proj.bias": 3}) == {
        "head.fcx": 1,
        "pos_embed_window": 2,
        "blocks.0.attn.proj.bias": 3,
    }


class Hub:
    """Stands for `torch.hub`: notes the address and gives weights of the published layout."""

    def __init__(self, monkeypatch, state):
        self.urls, self.state = [], state
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", self)

    def __call__(self, url, map_location=None, **kwargs):
        self.urls.append(url)
        return {"model_state": dict(self.state), "epoch": 1}


REDUCED = {"stages": (1, 1, 1, 1), "embed_dim": 8, "input_size": (64, 64)}


def test_pretrained_models(monkeypatch):
    published = hiera.hiera_tiny_224(**REDUCED, num_classes=11).state_dict()
    hub = Hub(monkeypatch, published)
    model = hiera.hiera_tiny_224(pretrained=True, **REDUCED)
    assert hub.urls == ["https://dl.fbaipublicfiles.com/hiera/hiera_tiny_224.pth"]
    assert model.head.projection.out_features == 11  # the checkpoint's, as nothing else was asked for
    assert same_weights(model, published)
    model = hiera.create_model("hiera_tiny_224", pretrained=True, num_classes=3, **REDUCED)
    assert model.head.projection.out_features == 3
    assert torch.equal(model.blocks[0].norm1.weight, published["blocks.0.norm1.weight"])

    hub.state = hiera.mae_hiera_tiny_224(**REDUCED, decoder_depth=1).state_dict()
    model = hiera.hiera_tiny_224(pretrained=True, checkpoint="mae_in1k", **REDUCED)
    assert hub.urls[-1] == "https://dl.fbaipublicfiles.com/hiera/mae_hiera_tiny_224.pth"
    assert torch.equal(model.blocks[3].mlp.fc1.weight, hub.state["blocks.3.mlp.fc1.weight"])
    model = hiera.mae_hiera_tiny_224(pretrained=True, decoder_depth=1, **REDUCED)
    assert same_weights(model, hub.state)
    with pytest.raises(ValueError, match=r"no checkpoint 'x'; there are \['mae_in1k', 'mae_in1k_ft_in1k'\]"):
        hiera.hiera_tiny_224(pretrained=True, checkpoint="x")
    with pytest.raises(ValueError, match="hiera_mini_128 has no published weights"):
        hiera.hiera_mini_128(pretrained=True)


def test_zoo():
    names = hiera.list_models()
    assert len(names) == 22
    published = [name for name in dir(load_upstream()) if name.startswith(("hiera_", "mae_hiera_"))]
    published = [name for name in published if name[-3:] == "224"]
    assert sorted(set(names) - {"hiera_mini_128", "mae_hiera_mini_128"}) == sorted(published)
    for name in names:
        assert name in hiera.__all__
        assert getattr(hiera, name).__name__ == name
        assert pickle.loads(pickle.dumps(getattr(hiera, name))) is getattr(hiera, name)
    with pytest.raises(ValueError, match="got 'hiera_tiny'; did you mean hiera_tiny_224"):
        hiera.create_model("hiera_tiny")
    mini = hiera.create_model("mae_hiera_mini_128")
    assert sum(p.numel() for p in mini.parameters()) < 4_000_000
    assert (mini.tokens_spatial_shape, mini.mask_spatial_shape) == ([32, 32], [4, 4])

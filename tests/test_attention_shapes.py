"""The benchmarks' table of attention shapes, against what upstream's models hand to scaled_dot_product_attention."""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention_shapes
from benchmarks.attention_shapes import AttentionShape, distinct, of_model, published
from tests.upstream import variant_settings


def upstream_calls(monkeypatch, name, device, **overrides):
    """(H, W, S, K, D) of every attention in one forward of upstream's model."""
    # It reads numbers off a tensor while it is built, which the meta device cannot give.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    model_class, settings = variant_settings(name)
    calls = []
    sdpa = F.scaled_dot_product_attention

    def noted(q, k, v):
        assert q.shape[:3] == k.shape[:3]
        calls.append((q.shape[1], q.shape[2], q.shape[3], k.shape[3], q.shape[4]))
        return sdpa(q, k, v)

    with torch.device(device):
        model = model_class(**{**settings, **overrides})
        picture = torch.zeros(1, 3, *((16, 224, 224) if "16x" in name else (224, 224)))
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    with torch.no_grad():
        model(picture, mask_ratio=0.9 if "16x" in name else 0.6) if name.startswith("mae_") else model(picture)
    return calls


def check(shapes, calls):
    ours = [(s.H, s.W, s.S, s.K, s.D) for s in shapes for _ in range(s.blocks)]
    assert ours == calls


@pytest.mark.parametrize("size", ["tiny", "small", "base", "base_plus", "large", "huge"])
def test_image_models_call_attention_so(monkeypatch, size):
    check(of_model(f"hiera_{size}_224"), upstream_calls(monkeypatch, f"hiera_{size}_224", "meta"))


def test_video_models_call_attention_so(monkeypatch):
    check(of_model("hiera_base_16x224"), upstream_calls(monkeypatch, "hiera_base_16x224", "meta"))


@pytest.mark.parametrize("name", ["mae_hiera_tiny_224", "mae_hiera_base_16x224"])
def test_autoencoders_call_attention_so(monkeypatch, name):
    """On CPU, because masking by a boolean index has no shape on meta; hence fewer blocks."""
    fewer = {"stages": (1, 2, 1, 1), "decoder_depth": 1}
    check(of_model(name, **fewer), upstream_calls(monkeypatch, name, "cpu", **fewer))


def numbers(name):
    return {s.place: (s.N, s.W, s.P, s.S, s.K, s.H, s.D, s.blocks) for s in of_model(name)}


def test_the_numbers_of_hiera_large():
    assert numbers("hiera_large_224") == {
        "stage1": (3136, 49, 1, 64, 64, 2, 72, 2),
        "stage2.first": (3136, 49, 4, 16, 64, 4, 72, 1),
        "stage2": (784, 49, 1, 16, 16, 4, 72, 5),
        "stage3.first": (784, 49, 4, 4, 16, 8, 72, 1),
        "stage3": (196, 1, 1, 196, 196, 8, 72, 35),
        "stage4.first": (196, 1, 4, 49, 196, 16, 72, 1),
        "stage4": (49, 1, 1, 49, 49, 16, 72, 3),
    }


def test_the_numbers_of_pre_training():
    """Pictures keep 19 of 49 windows, videos 39 of 392; the last stage does not pool."""
    image, video = numbers("mae_hiera_base_plus_224"), numbers("mae_hiera_base_16x224")
    assert image["stage1"] == (19 * 64, 19, 1, 64, 64, 2, 56, 2)
    assert image["stage4.first"] == (76, 1, 1, 76, 76, 16, 56, 1)
    assert image["decoder"] == (196, 1, 1, 196, 196, 16, 32, 8)
    assert video["stage1"] == (39 * 64, 39, 1, 64, 64, 1, 96, 2)
    assert video["stage3"] == (156, 1, 1, 156, 156, 4, 96, 15)
    assert video["decoder"] == (1568, 1, 1, 1568, 1568, 16, 32, 8)


def test_other_sizes_and_ratios():
    wide = of_model("hiera_tiny_224", input_size=(256, 384))
    assert [s.W for s in wide if s.windowed] == [96] * 4  # 8 x 12
    assert wide[-1].N == 96
    assert of_model("mae_hiera_tiny_224", mask_ratio=0.75)[0].W == 12  # int(49 / 4)


def test_every_published_model_is_there_and_no_other():
    shapes = published()
    assert len({s.model for s in shapes}) == 20
    assert not [s for s in shapes if "mini" in s.model]
    assert {(s.S, s.K) for s in shapes if s.windowed} == {(64, 64), (16, 64), (16, 16), (4, 16)}
    assert {s.D for s in shapes} == {32, 56, 64, 72, 96}
    assert len({s.name for s in shapes}) == len(shapes)


def test_models_that_call_alike_share_a_group():
    groups = distinct(published())
    assert sum(map(len, groups.values())) == len(published())
    assert {s.model for s in groups[3136, 49, 1, 1, 96]} == {"hiera_tiny_224", "hiera_small_224", "hiera_base_224"}


def test_bytes_that_have_to_move():
    """Two images, P = 4, C = 8, 16 tokens in 16 bits: qkv 16 * 24 * 2, out 4 * 8 * 2 bytes an image."""
    shape = AttentionShape("toy", "first", N=16, W=2, P=4, H=2, D=4)
    assert (shape.K, shape.S, shape.C) == (8, 2, 8)
    assert shape.bytes(2, 2) == 2 * (768 + 64)
    assert shape.bytes(2, 2, backward=True) == 2 * (768 + 768 + 64)


def test_the_table_is_printed(capsys):
    attention_shapes.main()
    assert "hiera_base_plus_16x224.stage2.first" in capsys.readouterr().out

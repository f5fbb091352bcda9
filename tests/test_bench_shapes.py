"""The shapes of the benchmarks, against the real models."""

import re
from pathlib import Path

import pytest
import torch

import hiera
from benchmarks import attention_shapes, shapes, window_shapes
from tests.token_oracle import windows_of
from tests.upstream import torchvision_without_operators, variant_settings


def trunk(name):
    """sam2's own image encoder, its blocks replaced in effect by a note of what they are given."""
    with torchvision_without_operators():
        from sam2.modeling.backbones.hieradet import Hiera
    with torch.device("cpu"):
        return Hiera(**window_shapes.SETTINGS[name])


@pytest.mark.parametrize("name", list(window_shapes.SETTINGS))
def test_sam2_calls_attention_so(name):
    """Walk the real modules: what each block holds, and how many tokens it is handed, at 1024 pixels."""
    model, side, calls = trunk(name), 256, []
    for i, block in enumerate(model.blocks):
        pool = block.q_stride[0] if block.q_stride else 1
        attn = block.attn
        calls.append((i, side, attn.num_heads, attn.dim_out // attn.num_heads, block.window_size, pool, block.dim))
        side //= pool
    ours = window_shapes.of_trunk(name)
    assert sum(shape.blocks for shape in ours) == len(calls)
    listed = {(s.Hs, s.H, s.D, s.window, s.pool, s.C_in): s.blocks for s in ours}
    counted = {}
    for _, *call in calls:
        counted[tuple(call)] = counted.get(tuple(call), 0) + 1
    assert listed == counted


def test_sam2_is_configured_so():
    """The settings are those of the configurations that the package ships."""
    with torchvision_without_operators():
        import sam2
    for name, settings in window_shapes.SETTINGS.items():
        text = (Path(sam2.__file__).parent / "configs" / "sam2.1" / f"sam2.1_hiera_{name[5:]}.yaml").read_text()
        block = text[text.index("trunk:") : text.index("neck:")]
        found = dict(re.findall(r"^ +(embed_dim|num_heads|stages|global_att_blocks|window_spec): (.+)$", block, re.M))
        for key, value in found.items():
            assert settings[key] == (int(value) if value.isdigit() else tuple(map(int, value.strip("[]").split(","))))
        assert not set(settings) - set(found)


def test_token_grids_are_upstreams():
    for name in ("hiera_base_224", "hiera_large_224", "hiera_base_16x224"):
        shape = shapes.token_shape(name, 2, torch.float32)
        model_class, settings = variant_settings(name)
        model = model_class(**{**settings, "stages": (1, 1, 1, 1)})
        assert tuple(shape.size) == tuple(model.tokens_spatial_shape)
        assert shape.channels == model.blocks[0].attn.dim
        assert [list(step) for step in shape.strides] == [list(step) for step in model.unroll.schedule]
        assert windows_of(shape.size, shape.strides) == torch.tensor(model.mask_spatial_shape).prod()
    assert shapes.token_shape("hiera_base_224", 1, torch.float32).kept == 19
    assert shapes.token_shape("hiera_base_16x224", 1, torch.float32).kept == 39
    assert shapes.token_shape("hiera_base_2048x1536", 1, torch.float32).size == (512, 384)


def test_a_name_is_a_shape():
    shape = attention_shapes.named("hiera_base_224.stage2.first")
    assert (shape.N, shape.W, shape.P, shape.H, shape.D, shape.C_in) == (3136, 49, 4, 2, 96, 96)
    assert attention_shapes.named("hiera_base_3072x2048.stage1").W == 96 * 64
    window = window_shapes.named("sam2_b+_1024.stage3")
    assert (window.Hs, window.H, window.D, window.window, window.blocks) == (64, 8, 56, 14, 12)


@pytest.mark.parametrize("name", ["hiera_bass_224.stage1", "hiera_base_224.stage9", "hiera_base_224"])
def test_another_name_is_refused_in_words(name):
    with pytest.raises(ValueError, match="hiera_base_224"):
        attention_shapes.named(name)
    with pytest.raises(ValueError, match=r"sam2_b\+_1024.stage3"):
        window_shapes.named(name)


def test_the_models_of_larger_pictures_are_the_published_ones():
    for name, (published, settings) in attention_shapes.LARGER.items():
        assert getattr(hiera, published).checkpoints
        assert name.endswith("x".join(map(str, dict.fromkeys(settings["input_size"]))))

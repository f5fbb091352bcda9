"""Settings of the encoder against hiera-transformer, masks, and what is refused."""

import copy
import pickle

import pytest
import torch

from hiera import Hiera, HieraBlock, MaskUnitAttention
from tests.model_pairs import assert_parity, assert_same_run, encoder_pair, picture
from tests.upstream import load_upstream

SMALL = {"input_size": (64, 96), "embed_dim": 8, "num_classes": 5, "stages": (1, 2, 2, 1)}
LINE = {
    **SMALL,
    "input_size": (96,),
    "q_stride": (2,),
    "mask_unit_size": (8,),
    "patch_kernel": (7,),
    "patch_stride": (4,),
    "patch_padding": (3,),
}
VIDEO = {
    **SMALL,
    "input_size": (4, 64, 96),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
}


def outputs(x, **kwargs):
    def run(model):
        result, stages = model(x, return_intermediates=True, **kwargs)
        return [result, *stages]

    return run


SETTINGS = {
    "as published": SMALL,
    "1-D": LINE,
    "1-D, pooled by 3": {**LINE, "q_stride": (3,), "mask_unit_size": (9,), "stages": (2, 1, 1), "q_pool": 2,
                         "input_size": (108,), "mask_unit_attn": (True, True, False)},
    "3-D": VIDEO,
    "3-D, separable positions": {**VIDEO, "sep_pos_embed": True},
    "3-D, pooled in time": {**VIDEO, "q_stride": (2, 2, 1), "mask_unit_size": (4, 4, 1), "stages": (1, 1, 1),
                            "q_pool": 2, "input_size": (8, 32, 20)},
    "no pooling": {**SMALL, "q_pool": 0},
    "q_pool 1": {**SMALL, "q_pool": 1},
    "q_pool 2": {**SMALL, "q_pool": 2},
    "one stage": {**SMALL, "stages": (2,), "q_pool": 0, "input_size": (32, 64)},
    "all stages windowed": {**SMALL, "mask_unit_attn": (True, True, True, True)},
    "no stage windowed": {**SMALL, "mask_unit_attn": (False, False, False, False)},
    "windows only late": {**SMALL, "mask_unit_attn": (False, True, True, False)},
    "mask units of 4": {**SMALL, "mask_unit_size": (4, 4), "mask_unit_attn": (True, True, False, False)},
    "mask units of 16": {**SMALL, "input_size": (64, 128), "mask_unit_size": (16, 16)},
    "mask units of 2 x 8": {**SMALL, "mask_unit_size": (2, 8)},
    "two heads, slow growth": {**SMALL, "embed_dim": 16, "num_heads": 2, "dim_mul": 1.5, "head_mul": 1.0},
    "stride 2 x 1": {**SMALL, "q_stride": (2, 1), "mask_unit_size": (8, 1), "input_size": (64, 20)},
    "patches without overlap": {**SMALL, "patch_kernel": (4, 4), "patch_padding": (0, 0), "in_chans": 2},
    "patches 4 x 2": {**SMALL, "patch_kernel": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1)},
    "norm without affine bias": {**SMALL, "norm_layer": torch.nn.LayerNorm},
    "head": {**SMALL, "head_init_scale": 1.0, "num_classes": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(name):
    settings = SETTINGS[name]
    ours, theirs = encoder_pair(**settings)
    x = picture(2, settings.get("in_chans", 3), *settings["input_size"])
    assert_same_run(ours, theirs, outputs(x))
    assert_same_run(ours.eval(), theirs.eval(), outputs(x))


@pytest.mark.parametrize(
    "name",
    ["as published", "1-D", "1-D, pooled by 3", "3-D", "3-D, separable positions", "3-D, pooled in time", "no pooling",
     "q_pool 2", "all stages windowed", "windows only late", "stride 2 x 1", "patches 4 x 2"],
)  # fmt: skip
@pytest.mark.parametrize("kept", [1, 2])
def test_masked(name, kept):
    ours, theirs = encoder_pair(**SETTINGS[name])
    x = picture(3, 3, *SETTINGS[name]["input_size"])
    torch.manual_seed(1)
    drawn = theirs.get_random_mask(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(ours.get_random_mask(x, 0.5), drawn)
    mask = torch.zeros(3, drawn.shape[1], dtype=torch.bool)
    mask[0, :kept] = True
    mask[1, -kept:] = True
    mask[2, drawn.shape[1] // 2 : drawn.shape[1] // 2 + kept] = True
    for m in (drawn, mask):
        assert_same_run(ours, theirs, outputs(x, mask=m))
    counted = ours(x, mask=mask, len_keep=kept)
    assert torch.equal(counted, ours(x, mask=mask))
    assert_parity("mask alone", counted, theirs(x, mask=mask))


def test_embed_tokens_by_hand():
    """One method embeds, adds positions, unrolls and drops: against a loop over mask units and positions in them."""
    model = Hiera(**SMALL).double()
    x = picture(2, 3, 64, 96)
    keep = torch.tensor([[1, 4], [0, 5]])
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, keep, True)
    tokens = model.embed_tokens(x, mask, keep)
    assert tokens.shape == (2, 2 * 64, 8)
    assert torch.equal(tokens, model.embed_tokens(x, keep=keep))  # the indices alone imply the mask
    pixels = mask.view(2, 1, 2, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    spatial = model.patch_embed.proj(x * pixels) + model.pos_embed.transpose(1, 2).view(1, 8, 16, 24)
    for b in range(2):
        for position in range(64):
            # first the parity of (y, x), then that of (y // 2, x // 2), then that of (y // 4, x // 4)
            p = [position >> 4, position >> 2 & 3, position & 3]
            y = (p[0] >> 1) + 2 * (p[1] >> 1) + 4 * (p[2] >> 1)
            z = (p[0] & 1) + 2 * (p[1] & 1) + 4 * (p[2] & 1)
            for w in range(2):
                unit = keep[b, w].item()
                expected = spatial[b, :, unit // 3 * 8 + y, unit % 3 * 8 + z]
                assert torch.allclose(tokens[b, position * 2 + w], expected, rtol=0, atol=1e-14)


def test_drop_path_draws_as_upstream():
    ours, theirs = encoder_pair(**SMALL, drop_path_rate=0.4, head_dropout=0.3)
    x = picture(8, 3, 64, 96)
    assert_same_run(ours, theirs, outputs(x))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in ours.blocks]
    assert rates == [getattr(block.drop_path, "drop_prob", 0.0) for block in theirs.blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.4)
    torch.manual_seed(1)
    first = ours(x)
    assert not torch.equal(first, ours(x))  # it does draw
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_a_list_of_inputs_takes_the_first():
    model = Hiera(**SMALL)
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(model([x, None]), model(x))


def test_block_and_attention_take_upstreams_arguments():
    upstream = load_upstream()
    for build in (lambda lib: lib.HieraBlock(8, 16, 2, 4.0, 0.0, torch.nn.LayerNorm, torch.nn.ReLU, 4, 4, True),
                  lambda lib: lib.MaskUnitAttention(8, 16, 2, q_stride=4, window_size=4, use_mask_unit_attn=True),
                  lambda lib: lib.MaskUnitAttention(8, 16, 4)):  # fmt: skip
        torch.manual_seed(0)
        theirs = build(upstream).double()
        torch.manual_seed(0)
        ours = build(_ours()).double()
        x = picture(2, 48, 8)
        assert_same_run(ours, theirs, lambda module, x=x: [module(x)])


def _ours():
    class Namespace:
        pass

    Namespace.HieraBlock, Namespace.MaskUnitAttention = HieraBlock, MaskUnitAttention
    return Namespace


def test_pooled_gradient_goes_to_one_of_several_ties():
    """Upstream's `max(dim)` sends it to one index; `amax` (timm) would split it. Found by putting amax in: with equal
    tokens the queries' gradient is zero, so here queries tie (they read channels 0 to 3 only) and keys do not."""
    ours = MaskUnitAttention(8, 8, 2, q_stride=4, window_size=2, use_mask_unit_attn=True).double()
    ours.qkv.weight.data[:8, 4:] = 0
    theirs = load_upstream().MaskUnitAttention(8, 8, 2, 4, 2, True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.cat([picture(1, 1, 4).expand(1, 16, 4), picture(1, 16, 4)], dim=-1)
    assert_same_input_gradient(ours, theirs, x)

    ours = HieraBlock(8, 16, 2, q_stride=4, window_size=2, use_mask_unit_attn=True).double()  # and the shortcut
    theirs = load_upstream().HieraBlock(8, 16, 2, q_stride=4, window_size=2, use_mask_unit_attn=True).double()
    theirs.load_state_dict(ours.state_dict())
    assert_same_input_gradient(ours, theirs, picture(1, 1, 8).expand(1, 16, 8))


def assert_same_input_gradient(ours, theirs, x):
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * picture(*y.shape)).sum().backward()
        grads.append(leaf.grad)
    assert_parity("gradient at ties", *grads)


def test_pickle_and_deepcopy():
    model = Hiera(**SMALL, drop_path_rate=0.1).eval()
    x = torch.randn(1, 3, 64, 96)
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(clone(x), model(x))
    rebuilt = Hiera(**pickle.loads(pickle.dumps(model.config)))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(x), model(x))


def test_meta_device():
    with torch.device("meta"):
        model = Hiera(**SMALL)
    assert model(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (200, 224)}, r"input_size \(200, 224\) does not tile .*\(32, 32\).*: \(192 or 224, 224\)"),
        ({"input_size": (20, 33)}, r"nearest sizes that do: \(32, 32 or 64\)"),
        ({"input_size": (64, 66)}, r"nearest sizes that do: \(64, 64 or 96\)"),
        ({"input_size": (64, 96, 8, 8)}, "input_size must have 1 to 3 lengths"),
        ({"input_size": (64,)}, r"q_stride must have 1 entries.*got \(2, 2\)"),
        ({"q_pool": 4}, "q_pool must be 0 to .* 3, got 4"),
        ({"mask_unit_attn": (True,)}, "mask_unit_attn must have an entry for each of the 4 stages"),
        ({"patch_padding": (0, 0)}, "does not give one token per"),
        ({"sep_pos_embed": True}, "sep_pos_embed=True is for 3-D inputs"),
        ({"mask_unit_size": (4, 4), "mask_unit_attn": (True,) * 4}, "pooled away before block"),
        ({"mask_unit_size": (16, 16)}, r"does not tile .*\(64, 64\).*: \(64, 64 or 128\)"),
        ({"expand_proj": False, "dim_mul": 3.0}, "expand_proj=False needs dim_out"),
        ({"abs_win": True, "global_pos_size": (7,)}, "global_pos_size must have 2 entries"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Hiera(**{**SMALL, **change})


def test_refused_inputs():
    model = Hiera(**SMALL)
    x = torch.randn(2, 3, 64, 96)
    with pytest.raises(ValueError, match=r"x has size \(96, 64\), the model takes \(64, 96\)"):
        model(torch.randn(2, 3, 96, 64))  # as many tokens: upstream gives every one another's position, in silence
    with pytest.raises(ValueError, match=r"x must be \[batch, channels, 2 lengths\]"):
        model(x[0])
    with pytest.raises(TypeError, match="mask must be boolean"):
        model(x, mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"mask must be .* = \(2, 6\), got \(2, 5\)"):
        model(x, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows keep 1 to 6"):
        model(x, mask=torch.tensor([[True] * 6, [True] + [False] * 5]))
    odd = Hiera(**{**SMALL, "mask_unit_size": (4, 4)})
    with pytest.raises(ValueError, match="masked in different places"):
        odd(x, mask=torch.ones(2, 24, dtype=torch.bool))


def test_upstreams_masks_are_inconsistent_where_we_refuse():
    """Why `mask_unit_size` = (4, 4) with three poolings is refused with a mask: in upstream a pixel of a mask unit that
    is *kept* can be without any influence, because its token is discarded."""
    settings = {**SMALL, "mask_unit_size": (4, 4), "input_size": (64, 64), "patch_kernel": (4, 4)}
    settings["patch_padding"] = (0, 0)  # no overlap: a token sees its own pixels only
    theirs = load_upstream().Hiera(**settings).double()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [1, 2, 5, 7]] = True  # unit 2: rows 0 to 15, columns 32 to 47
    x = picture(1, 3, 64, 64).requires_grad_()
    theirs(x, mask=mask).square().sum().backward()
    influence = x.grad.abs().amax(dim=1)[0]
    kept = mask.view(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert influence[~kept].max() == 0
    assert (influence[kept] == 0).any()


def test_empty_batch():
    model = Hiera(**SMALL)
    assert model(torch.randn(0, 3, 64, 96)).shape == (0, 5)

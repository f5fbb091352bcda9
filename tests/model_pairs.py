"""Pairs of one model of ours and one of hiera-transformer with the same weights, and the law that compares them."""

import torch

import hiera
from hiera import Hiera, MaskedAutoencoderHiera
from tests.upstream import load_upstream, variant_settings

SMALL_MAE = {
    "input_size": (96, 64),
    "embed_dim": 8,
    "num_heads": 1,
    "stages": (1, 2, 1, 1),
    "q_pool": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
SMALL_VIDEO_MAE = {
    **SMALL_MAE,
    "input_size": (4, 64, 96),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
}


def mae_pair(**settings):
    torch.manual_seed(5)
    theirs = load_upstream().MaskedAutoencoderHiera(**settings)
    torch.manual_seed(5)
    ours = MaskedAutoencoderHiera(**settings)
    assert_same_weights(ours, theirs)
    return ours.double(), theirs.double()


def picture(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def encoder_pair(**settings):
    torch.manual_seed(5)
    theirs = load_upstream().Hiera(**settings)
    torch.manual_seed(5)
    ours = Hiera(**settings)
    assert_same_weights(ours, theirs)
    return ours.double(), theirs.double()


def pair(name, **reduced):
    """Ours and upstream's variant with some settings changed, from the same seed: the weights must be bit-equal."""
    cls, settings = variant_settings(name)
    torch.manual_seed(5)
    theirs = cls(**{**settings, **reduced})
    torch.manual_seed(5)
    ours = hiera.create_model(name, **reduced)
    assert_same_weights(ours, theirs)
    return ours, theirs


def assert_same_weights(ours, theirs):
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def both_precisions(ours, theirs, run):
    assert_same_run(ours, theirs, lambda model: run(model, torch.float32))
    assert_same_run(ours.double(), theirs.double(), lambda model: run(model, torch.float64))


def assert_parity(what, ours, theirs):
    """The law of parity with upstream, per tensor: fp64 max|a - b| <= 1e-9 max|b|; fp32 RMS(a - b) <= 1e-5 RMS(b).

    A NaN on either side, another shape, dtype or a missing gradient fails.
    """
    assert (ours is None) == (theirs is None), f"{what}: one side is None"
    if ours is None:
        return
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, upstream {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, upstream {theirs.dtype}"
    if ours.dtype in (torch.bool, torch.int64):
        assert torch.equal(ours, theirs), f"{what} differs from upstream"
        return
    assert ours.dtype in (torch.float64, torch.float32)
    if ours.numel() == 0:
        return
    ours, theirs, dtype = ours.detach().double(), theirs.detach().double(), ours.dtype
    difference = ours - theirs
    if dtype == torch.float64:
        error, bound = difference.abs().max().item(), 1e-9 * theirs.abs().max().item()
    else:
        error, bound = difference.square().mean().sqrt().item(), 1e-5 * theirs.square().mean().sqrt().item()
    assert error <= bound, f"{what}: error {error:.3e} exceeds {bound:.3e} ({dtype})"


def assert_same_run(ours, theirs, run):
    """Run both models the same way, from the same generator state, and hold outputs and all gradients to the law.

    `run(model)` returns a list of tensors, the same for both. Every floating one is weighted with fixed random
    numbers and summed, so that every element has a gradient of its own.
    """
    outputs, grads = [], []
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(11)
        tensors = run(model)
        torch.manual_seed(12)
        scored = [t for t in tensors if t.is_floating_point() and t.requires_grad]
        sum((t * torch.randn_like(t)).sum() for t in scored).backward()
        outputs.append(tensors)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert len(outputs[0]) == len(outputs[1])
    for i, pair in enumerate(zip(*outputs, strict=True)):
        assert_parity(f"output {i}", *pair)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert_parity(f"gradient of {name}", grads[0][name], grads[1][name])

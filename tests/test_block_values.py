"""Whole blocks by way of the ops compute what stock blocks compute: values, every gradient, dtypes, random numbers.

`test_swap_values.py` has the same on plain operations, which is what a CPU runs. Here the ops' default functions stand
in for kernels, so that the ways of a GPU are taken: LayerNorm joined with the residual and handed over, bias gradients
that ride, inputs that are made again. Broken on purpose and seen red here: the gradient of a riding bias dropped, the
branch scaled twice in `_Leave.backward`, the wrong LayerNorm handed over.
"""

import copy
from collections import Counter

import pytest
import torch

from hiera_kernels.swap import accelerate
from tests.block_kernels import ALONE, JOINED, default_kernels_on_cpu
from tests.swap_cases import LIBRARIES, assert_equal, assert_law, build, example, keep_mask, library, step, steps


def pair(*args, settings=None, **kwargs):
    stock = build(*args, **kwargs)
    ours = copy.deepcopy(stock)
    assert not accelerate(ours, **(settings or {})).skipped
    return stock, ours


def by_ops(model, *arguments, **keywords):
    with default_kernels_on_cpu() as calls:
        return step(model, *arguments, **keywords), Counter(calls)


@pytest.mark.parametrize("kind", ["image", "video", "all mask units", "MAE image"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_training(name, kind):
    stock, ours = pair(name, kind, drop_path_rate=0.4)
    x = example(kind, batch=3)
    expected = step(stock, x)
    state = torch.get_rng_state()
    actual, calls = by_ops(ours, x)
    assert_equal(actual, expected)
    assert torch.equal(torch.get_rng_state(), state), "other random numbers were drawn"
    rows = 1 + ("MAE" in kind)  # of blocks: an encoder, and a decoder
    blocks = 6 + 2 * ("MAE" in kind)
    assert calls[ALONE] == rows, "only the first block of a row makes a LayerNorm of its own"
    assert calls[JOINED] == 2 * blocks - rows
    assert calls["gelu"] == calls["gelu_backward"] == calls["mask_unit_attention_backward"] == blocks
    assert calls["normalize"] == 2 * blocks
    assert calls["linear_q_pool"] == calls["linear_q_pool_backward"] == 3


@pytest.mark.parametrize("name", LIBRARIES)
def test_eval_and_no_grad(name):
    stock, ours = pair(name, drop_path_rate=0.4)
    x = example()
    assert_equal(by_ops(ours.eval(), x)[0], step(stock.eval(), x))
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet(), default_kernels_on_cpu() as calls:
            actual = ours(x)
        assert (actual - stock(x)).abs().max() < 1e-12
        assert not [name for name in calls if "backward" in name]
        assert calls.count(ALONE) == (1 if quiet is torch.no_grad else 6)


@pytest.mark.parametrize(
    "settings", [{"layer_scale": 0.1}, {"expand_proj": False}, {"layer_scale": 0.1, "expand_proj": False}]
)
def test_what_the_reference_model_adds(settings):
    stock, ours = pair("hiera", drop_path_rate=0.4, **settings)
    x = example(batch=3)
    assert_equal(by_ops(ours, x)[0], step(stock, x))
    assert_equal(by_ops(ours.eval(), x)[0], step(stock.eval(), x))


@pytest.mark.parametrize("name", LIBRARIES)
def test_masks_and_intermediates(name):
    stock, ours = pair(name)
    x, mask = example(), keep_mask()
    assert_equal(by_ops(ours, x, mask, True)[0], step(stock, x, mask, True))


def recorded(model, ends):
    """Dtypes that modules inside a block, and the block, are given and return."""
    seen = []
    for path, module in model.named_modules():
        if path.startswith("blocks.") and path.endswith(ends):
            module.register_forward_hook(
                lambda m, args, out, path=path: seen.append((path, args[0].dtype, out.dtype)),
            )
    return seen


@pytest.mark.parametrize("settings", [{}, {"layer_scale": 0.1}])
@pytest.mark.parametrize("name", LIBRARIES)
def test_autocast_keeps_the_dtypes_that_hooks_see(name, settings):
    """With LayerScale, whose factor is fp32, the residual stream stays fp32; else it is bf16 after stage 1."""
    if settings and name != "hiera":
        settings = {}
    stock, ours = pair(name, dtype=torch.float32, drop_path_rate=0.4, **settings)
    blocks = [[], []]
    for model, seen in zip((stock, ours), blocks, strict=True):
        for block in model.blocks:
            block.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0].dtype, out.dtype)))
    x = example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        step(stock, x)
        by_ops(ours, x)
    assert blocks[0] == blocks[1]
    assert {d for each in blocks[0] for d in each} == {torch.float32} | (set() if settings else {torch.bfloat16})
    # Now with somebody listening to attention and MLP, which are called on what the op wrote; then to every module.
    for ends in (("attn", "mlp"), ""):
        seen = [recorded(model, ends) for model in (stock, ours)]
        with torch.autocast("cpu", torch.bfloat16):
            step(stock, x)
            by_ops(ours, x)
        assert seen[0] == seen[1]
        assert len(seen[0]) >= 6 * (8 if ends == "" else 2)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
def test_bf16_is_as_near_to_fp64_as_stock(name, autocast):
    stock, ours = pair(name)
    oracle = steps(stock, "image", torch.float64)
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = steps(stock.to(dtype), "image", dtype)
        with default_kernels_on_cpu():
            actual = steps(ours.to(dtype), "image", dtype)
    assert_law(actual, expected, oracle, rounding=2**-8)


@pytest.mark.parametrize("kept", ["blocks.4", "qkv.bias", "norm1", "proj.bias", "fc1.bias", "fc2", "no parameter"])
def test_frozen_parameters(kept):
    """Same gradients for what is trained, none for what is not, and no work for it."""
    stock = build("hiera")
    for path, parameter in stock.named_parameters():
        parameter.requires_grad_(kept in path or path == "head.projection.bias")
    ours = copy.deepcopy(stock)
    accelerate(ours)
    actual, _ = by_ops(ours, example())
    assert_equal(actual, step(stock, example()))
    for model in (stock, ours):
        model.patch_embed.requires_grad_(False)
    if kept == "no parameter":  # and none of the input: nothing in a block has a backward
        with default_kernels_on_cpu() as calls:
            ours(example()).sum().backward()
        assert not [name for name in calls if "backward" in name or name == "normalize"]


def test_gradient_scaler_and_channels_last():
    """A loss scaled by 2^10 and taken back gives the same step; the picture may be channels last."""
    _, ours = pair("hiera", dtype=torch.float32)
    x = example(dtype=torch.float32)
    with default_kernels_on_cpu():
        plain = step(ours, x)
        ours.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
        torch.manual_seed(3)
        out = ours(x.to(memory_format=torch.channels_last))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        scaler.scale((out.double() * weights).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - plain[name]).abs().max() <= 1e-4 * plain[name].abs().max(), name


def test_published_shapes():
    """One block of each kind of `hiera_base_224`, channels and heads as published, on fewer mask units."""
    stock = library("hiera").hiera_base_224(drop_path_rate=0.2).double()
    ours = copy.deepcopy(stock)
    accelerate(ours)
    for i in (1, 2, 5, 21):
        block, width = stock.blocks[i], stock.blocks[i].dim
        x = torch.randn(2, 256, width, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        assert_equal(by_ops(ours.blocks[i], x)[0], step(block, x))

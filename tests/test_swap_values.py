"""An accelerated model computes what the stock model computes: outputs and every gradient, on both libraries.

The expected values come from an untouched copy of the model. Broken on purpose and seen red here: q not pooled in
`Attention.fused`, `keep` dropped in `EmbeddingMethod.fused`, `reroll` without `size`.
"""

import copy

import pytest
import torch

from hiera_kernels.ops.switch import disabled
from hiera_kernels.subclass import target_of
from hiera_kernels.swap import accelerate
from tests.swap_cases import KINDS, LIBRARIES, assert_equal, assert_law, build, example, keep_mask, step, steps


def pair(*args, **kwargs):
    stock = build(*args, **kwargs)
    ours = copy.deepcopy(stock)
    report = accelerate(ours)
    assert not report.skipped, "what is refused would be equal too, being stock"
    assert len(report.replaced) >= 9
    return stock, ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_fp64_training(name, kind):
    stock, ours = pair(name, kind, drop_path_rate=0.4)
    x = example(kind)
    assert_equal(step(ours, x), step(stock, x))


@pytest.mark.parametrize("kind", ["image", "video", "MAE image"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_fp64_eval(name, kind):
    stock, ours = pair(name, kind, drop_path_rate=0.4)
    x = example(kind)
    assert_equal(step(ours.eval(), x), step(stock.eval(), x))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("image", torch.float32), ("MAE image", torch.float32), ("image", torch.bfloat16), ("image", torch.float16)],
)
@pytest.mark.parametrize("name", LIBRARIES)
def test_low_precision_is_as_near_to_fp64_as_stock(name, kind, dtype):
    """Cast after the call, as `.half()` does."""
    stock, ours = pair(name, kind)
    oracle = steps(stock, kind, torch.float64)
    actual = steps(ours.to(dtype), kind, dtype)
    assert_law(actual, steps(stock.to(dtype), kind, dtype), oracle, rounding=torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_bf16_autocast(name, kind):
    """The residual stream is fp32 up to the first pooling and bf16 after it; a fused op must not change either."""
    stock, ours = pair(name, kind)
    oracle = steps(stock, kind, torch.float64)
    seen, runs = [], []
    for model in (stock.float(), ours.float()):
        dtypes = []
        for path, module in model.named_modules():
            if path.endswith("attn") or (path.startswith("blocks.") and path.count(".") == 1):
                module.register_forward_hook(
                    lambda m, args, out, dtypes=dtypes: dtypes.append((args[0].dtype, out.dtype))
                )
        with torch.autocast("cpu", torch.bfloat16):
            step(model, example(kind).float())
            for module in model.modules():
                module._forward_hooks.clear()
            runs.append(steps(model, kind, torch.float32))
        seen.append(dtypes)
    assert seen[0] == seen[1]
    assert {dtype for pair in seen[0] for dtype in pair} == {torch.float32, torch.bfloat16}
    assert_law(runs[1], runs[0], oracle, rounding=2**-8)


@pytest.mark.parametrize("kind", ["image", "video", "signal"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_masks_and_intermediates(name, kind):
    stock, ours = pair(name, kind)
    x, mask = example(kind), keep_mask(kind)
    assert_equal(step(ours, x, mask, True), step(stock, x, mask, True))
    assert_equal(step(ours, x, mask=mask), step(stock, x, mask=mask))
    assert_equal(step(ours, x, return_intermediates=True), step(stock, x, return_intermediates=True))


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_mae_with_a_given_mask(name, kind):
    stock, ours = pair(name, f"MAE {kind}")
    x, mask = example(kind), keep_mask(kind)
    assert_equal(step(ours, x, mask=mask), step(stock, x, mask=mask))


def test_static_mask_count():
    stock, ours = pair("hiera")
    x, mask = example(), keep_mask()
    assert_equal(step(ours, x, mask, True, len_keep=3), step(stock, x, mask, True, len_keep=3))


@pytest.mark.parametrize(
    "settings", [{"dynamic_size": True}, {"dynamic_size": True, "abs_win": True}, {"layer_scale": 0.1}]
)
@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
def test_what_the_reference_model_adds(settings, size):
    if size != (64, 96) and "dynamic_size" not in settings:
        settings = {**settings, "input_size": size}
    stock, ours = pair("hiera", **settings)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_equal(step(ours, x, return_intermediates=True), step(stock, x, return_intermediates=True))
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool).repeat(1, 2)[:, : size[0] * size[1] // 1024]
    assert_equal(step(ours, x, mask, True), step(stock, x, mask, True))


@pytest.mark.parametrize("name", LIBRARIES)
def test_slowfast_passes_a_list(name):
    stock, ours = pair(name)
    x = example()
    assert torch.equal(ours.eval()([x]), stock.eval()([x])) or (ours([x]) - stock([x])).abs().max() < 1e-12


@pytest.mark.parametrize("name", LIBRARIES)
def test_channels_last_input(name):
    stock, ours = pair(name, dtype=torch.float32)
    x = example(dtype=torch.float32)
    stock, ours = (m.to(memory_format=torch.channels_last) for m in (stock, ours))
    assert_equal(step(ours, x), step(stock, x), tolerance=1e-4)


@pytest.mark.parametrize("name", LIBRARIES)
def test_settings_are_read_at_call_time(name):
    stock, ours = pair(name)
    x = example()
    for model in (stock, ours):
        for block in model.blocks[-2:]:
            block.attn.heads, block.attn.head_dim = 2 * block.attn.heads, block.attn.head_dim // 2
        model.blocks[3].attn.use_mask_unit_attn = True
        model.blocks[3].attn.window_size = 2
    assert_equal(step(ours, x), step(stock, x))


@pytest.mark.parametrize("name", LIBRARIES)
def test_disabled_runs_the_original_methods(name):
    stock, ours = pair(name)
    x = example()
    expected = step(stock, x)
    with disabled():
        actual = step(ours, x)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    # and it is not the same way to the bit outside: something was really replaced
    assert target_of(ours) is not None
    assert any(not torch.equal(value, expected[key]) for key, value in step(ours, x).items())


@pytest.mark.parametrize("name", LIBRARIES)
def test_second_derivatives_when_disabled(name):
    model = build(name)
    accelerate(model)
    x = example().requires_grad_()
    with disabled():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().max() > 0

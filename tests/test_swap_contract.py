"""What a model keeps when it is accelerated: everything but its speed. And how it gets back.

Broken on purpose and seen red here: `core_class` without its parametrized case, `restore` that stops at the first
swapped class, `_unnoticed` that is always true.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hiera_kernels.subclass import stock_class
from hiera_kernels.swap import accelerate, explain, restore
from tests.swap_cases import ALL, LIBRARIES, assert_equal, build, example, library, step, swapped


@pytest.mark.parametrize("name", LIBRARIES)
def test_names_tensors_and_looks_stay(name):
    model = build(name)
    state, looks, modules = model.state_dict(), repr(model), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    report = accelerate(model)
    assert swapped(model) == ALL == {path for path, _ in report.replaced}
    assert not report.skipped
    assert repr(model) == looks
    assert list(model.state_dict()) == list(state)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(model.get_parameter(key) is value for key, value in parameters.items())
    assert all(model.get_submodule(path) is module for path, module in modules.items())
    lib = library(name)
    assert isinstance(model, lib.Hiera)
    attention = model.blocks[0].attn
    assert isinstance(attention, type(build(name).blocks[0].attn))
    assert type(attention).__qualname__ == "MaskUnitAttention"
    assert type(attention).__module__ == stock_class(attention).__module__
    copy.deepcopy(model).load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", LIBRARIES)
def test_one_class_for_all_modules_of_a_class(name):
    model = build(name)
    accelerate(model)
    assert len({type(block.attn) for block in model.blocks}) == 1
    other = build(name)
    accelerate(other)
    assert type(other) is type(model)


@pytest.mark.parametrize("name", LIBRARIES)
def test_restore_is_exact(name):
    model = build(name)
    before = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    accelerate(model)
    restore(model)
    assert {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == before
    restore(model)
    assert type(model) is library(name).Hiera
    accelerate(model)
    assert swapped(model) == ALL


@pytest.mark.parametrize("name", LIBRARIES)
def test_twice_is_once_and_explain_changes_nothing(name):
    model = build(name)
    classes = [type(module) for module in model.modules()]
    promised = explain(model)
    assert [type(module) for module in model.modules()] == classes
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    assert accelerate(model) == explain(model) == first == promised
    assert [type(module) for module in model.modules()] == classes


def test_report_is_a_table():
    text = str(accelerate(build("hiera-transformer", "MAE image")))
    assert "blocks.*.attn (6)" in text
    assert "decoder_blocks.*.attn (2)" in text
    assert "mask_unit_attention" in text
    assert "forward_encoder -> embed_tokens" in text
    assert "left alone: 0 modules" in text


def test_nothing_to_do_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"looked for: .*attention with `qkv` and `proj`"):
        accelerate(model)
    assert "nothing in this model" in str(explain(model))
    restore(model)
    for function in (accelerate, explain, restore):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
            function({})


@pytest.mark.parametrize("name", LIBRARIES)
def test_hooks_keep_firing(name):
    model, fired = build(name), []
    expected = step(model, example())

    def watch(kind, path):
        return lambda *args: fired.append((kind, path))

    for path in ("unroll", "patch_embed", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1", ""):
        module = model.get_submodule(path)
        module.register_forward_pre_hook(watch("before", path))
        module.register_forward_hook(watch("after", path))
        module.register_full_backward_hook(watch("backward", path))
    before = step(model, example())
    stock_order = list(fired)
    assert len(stock_order) == 21
    accelerate(model)
    assert fired == stock_order, "accelerate itself fired a hook"
    fired.clear()
    after = step(model, example())
    assert fired == stock_order
    assert_equal(after, before)
    assert_equal(after, expected)


def test_a_hook_changes_what_unroll_returns():
    """The embedding op skips the unroll module: not when somebody listens to it."""
    stock = build("hiera")
    ours = copy.deepcopy(stock)
    accelerate(ours)
    for model in (stock, ours):
        model.unroll.register_forward_hook(lambda module, args, out: out * 1.5)
    assert_equal(step(ours, example()), step(stock, example()))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert_equal(step(ours, example()), step(stock, example()))
    finally:
        handle.remove()


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("first", ["parametrize", "accelerate"])
def test_parametrizations(name, first):
    stock = build(name)
    ours = copy.deepcopy(stock)
    plain = type(stock)

    def register(model):
        parametrize.register_parametrization(model, "pos_embed", Halved())
        parametrize.register_parametrization(model.blocks[1].attn.qkv, "weight", Halved())

    if first == "accelerate":
        accelerate(ours)
    register(ours)
    if first == "parametrize":
        accelerate(ours)
    register(stock)
    assert swapped(ours) == ALL
    assert_equal(step(ours, example()), step(stock, example()))
    assert_equal(step(copy.deepcopy(ours), example()), step(stock, example()))
    if first == "parametrize":
        parametrized = copy.deepcopy(stock)
        cls = type(parametrized)
        accelerate(parametrized)
        restore(parametrized)
        assert type(parametrized) is cls
    # a second one on the same module, then all of them off again
    for model in (stock, ours):
        model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        parametrize.register_parametrization(model, "extra", Halved())
    assert_equal(step(ours, example()), step(stock, example()))
    for model in (stock, ours):
        parametrize.remove_parametrizations(model, "extra")
        parametrize.remove_parametrizations(model, "pos_embed")
    assert type(stock) is plain
    assert swapped(ours) == ALL
    assert_equal(step(ours, example()), step(stock, example()))
    restore(ours)
    assert type(ours) is plain


def test_restore_under_parametrizations_added_since():
    stock = build("hiera")
    ours = copy.deepcopy(stock)
    accelerate(ours)
    for model in (stock, ours):
        parametrize.register_parametrization(model, "pos_embed", Halved())
    restore(ours)
    assert not swapped(ours)
    assert_equal(step(ours, example()), step(stock, example()))
    parametrize.remove_parametrizations(ours, "pos_embed")
    assert type(ours) is library("hiera").Hiera


class LoRA(nn.Module):
    """A wrapper that only a call goes through: no `weight` to be read."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, dtype=torch.float64) / 10)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank, dtype=torch.float64) / 10)

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("first", ["wrap", "accelerate"])
def test_lora_around_the_layers(name, first):
    stock = build(name)
    ours = copy.deepcopy(stock)

    def wrap(model):
        torch.manual_seed(1)
        for block in model.blocks:
            block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv), LoRA(block.attn.proj)

    if first == "accelerate":
        accelerate(ours)
    wrap(ours)
    if first == "wrap":
        accelerate(ours)
    wrap(stock)
    assert swapped(ours) == ALL
    actual = step(ours, example())
    assert "blocks.0.attn.qkv.up" in actual
    assert "blocks.0.attn.qkv.layer.weight" not in actual
    assert_equal(actual, step(stock, example()))


@pytest.mark.parametrize("name", LIBRARIES)
def test_frozen_parameters(name):
    stock = build(name)
    for path, parameter in stock.named_parameters():
        parameter.requires_grad_("blocks.4" in path or "qkv.bias" in path)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    assert_equal(step(ours, example()), step(stock, example()))
    stock.requires_grad_(False)
    ours.requires_grad_(False)
    with torch.inference_mode():
        assert torch.allclose(ours(example()), stock(example()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_blocks(name, reentrant):
    stock = build(name, drop_path_rate=0.4)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    expected = step(stock, example())
    for block in ours.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=reentrant)
    assert_equal(step(ours, example()), expected)


def test_gradient_checkpointing_of_the_reference_model():
    stock = build("hiera", drop_path_rate=0.4, grad_checkpointing=True)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    assert_equal(step(ours, example()), step(stock, example()))


@pytest.mark.parametrize("name", LIBRARIES)
def test_meta_model_gets_its_data_later(name):
    stock = build(name)
    ours = build(name).to("meta")
    with torch.device("meta"):
        accelerate(ours)
    assert swapped(ours) == ALL
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert ours(example().to("meta")).shape == (2, 7)
    ours.to_empty(device="cpu")
    ours.load_state_dict(stock.state_dict())
    assert_equal(step(ours, example()), step(stock, example()))


@pytest.mark.parametrize("name", LIBRARIES)
def test_functional_call_and_per_sample_gradients(name):
    model = build(name).eval()
    stock = copy.deepcopy(model)
    accelerate(model)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def gradients(module):
        def loss(p, x):
            return torch.func.functional_call(module, p, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, example())

    assert_equal(gradients(model), gradients(stock))


def test_shared_modules_are_swapped_once():
    model = build("hiera")
    model.again = model.blocks[0].attn
    report = accelerate(model)
    assert len(report.replaced) == len(ALL)
    restore(model)
    assert not swapped(model)


def test_multiprocessing_free_threads_agree():
    """Two threads that accelerate models of one class get one subclass, not two."""
    import threading

    models = [build("hiera") for _ in range(4)]
    threads = [threading.Thread(target=accelerate, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({type(model) for model in models}) == 1

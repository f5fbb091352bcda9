"""What is around an accelerated model: random numbers, modes, tracers, hooks, classes made since, and its positions.

Broken on purpose and seen red here: all of it, by the code as it was before.
"""

import copy
import inspect
import io
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hiera.block import MaskUnitAttention
from hiera_kernels import recognise
from hiera_kernels.compare import check
from hiera_kernels.swap import accelerate, explain, restore
from tests.swap_cases import LIBRARIES, assert_equal, build, example, library, step, swapped

Upstream = library("hiera-transformer").Hiera
TINY = dict(input_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), num_classes=5)


@pytest.fixture
def unjudged(monkeypatch):
    """No verdict of an earlier test spares a comparison."""
    monkeypatch.setattr(recognise, "_VERDICTS", type(recognise._VERDICTS)())


def attention(cls=MaskUnitAttention):
    return cls(8, 8, 2, window_size=4, use_mask_unit_attn=True)


# Random numbers


def test_no_generator_of_a_device_is_seeded(monkeypatch, unjudged):
    """`torch.manual_seed` seeds every GPU, and fork_rng puts back the CPU's generator only: ranks would draw alike."""
    seeded = []
    for module in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(module, "manual_seed", lambda seed: seeded.append(seed))
        if hasattr(module, "manual_seed_all"):
            monkeypatch.setattr(module, "manual_seed_all", lambda seed: seeded.append(seed))
    torch.manual_seed(3)
    assert seeded, "this test sees nothing"
    seeded.clear()
    model = build("hiera", dtype=torch.float32)  # seeds, itself
    stored = io.BytesIO()
    before, _ = torch.get_rng_state(), seeded.clear()
    explain(model)
    recognise._VERDICTS.clear()
    accelerate(model)
    recognise._VERDICTS.clear()
    torch.save(model, stored)
    stored.seek(0)
    torch.load(stored, weights_only=False)
    recognise._VERDICTS.clear()
    copy.deepcopy(model)
    check(model, example(dtype=torch.float32), repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_threads_leave_the_random_numbers_alone(unjudged):
    """Each comparison saves, seeds and restores the CPU's generator: never two at once."""
    models = [attention(type(f"Attention{i}", (MaskUnitAttention,), {})) for i in range(6)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    threads = [threading.Thread(target=accelerate, args=(model,)) for model in models]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they do take turns
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(swapped(model) for model in models)


# Position embeddings


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("shape", ["a number", "0-dim", "[N, C]", "[B, N, C]", "[1, 1, C]"])
def test_position_of_another_shape(name, shape):
    class Placed(library(name).Hiera):
        def get_pos_embed(self, grid=None):
            whole = super().get_pos_embed()
            kinds = {"a number": 2.0, "0-dim": whole.mean(), "[N, C]": whole[0], "[1, 1, C]": whole[:, :1]}
            return kinds[shape] if shape in kinds else whole * torch.arange(1, 3).view(2, 1, 1)

    model, x = Placed(**TINY).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    cases = [(x,), (x, mask, True)]
    expected = [step(model, *arguments) for arguments in cases]
    assert len(accelerate(model).replaced) == 11
    for arguments, wanted in zip(cases, expected, strict=True):
        assert_equal(step(model, *arguments), wanted)


# Surroundings


def test_modes_do_not_reach_the_comparison(unjudged):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 2 if function is F.linear else result

    model = Upstream(**TINY)
    with FakeTensorMode(), Doubling():
        model.fake = attention()
        promised, report = explain(model), accelerate(model)
    assert len(report.replaced) == 12
    assert not report.skipped
    assert promised == report


class OutOfMemory:
    def __call__(self, *args, **kwargs):
        raise MemoryError


def test_a_failure_is_no_verdict(monkeypatch, unjudged):
    """Out of memory today is not out of memory tomorrow."""
    module = attention()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", OutOfMemory())
        assert "could not be run" in accelerate(module).skipped[0].text
    assert accelerate(module).replaced


def test_symbolic_trace():
    module, x = attention(library("hiera-transformer").hiera.MaskUnitAttention), torch.randn(1, 8, 8)
    expected = module(x)
    accelerate(module)
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(x), expected)
    assert "hiera_kernels" not in str(traced.graph)


def test_double_backward_is_explained():
    assert "second derivative" in inspect.getdoc(accelerate)
    assert "disabled()" in inspect.getdoc(accelerate)


def test_restore_below_a_class_derived_since():
    """Methods with `super()` hold the class that they were written in."""
    module, x = attention(), torch.randn(1, 8, 8)
    expected = module(x)
    accelerate(module)

    class Derived(type(module)):
        def forward(self, x):
            return 2 * super().forward(x)

        @property
        def width(self):
            return super().extra_repr(), self.dim

        @torch.no_grad()
        def quietly(self, x):
            return super().forward(x)

        @staticmethod
        def kind():
            return __class__

    module.__class__ = Derived
    assert_near(module(x), 2 * expected)
    restore(module)
    assert not swapped(module)
    assert type(module).__mro__[1] is MaskUnitAttention
    assert torch.equal(module(x), 2 * expected)
    assert torch.equal(module.quietly(x), expected)
    assert module.width == ("", 8)
    assert module.kind() is type(module)


def assert_near(a, b):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_check_names_inference_mode():
    model, x = build("hiera", dtype=torch.float32), example(dtype=torch.float32)
    with torch.inference_mode():
        frozen, y = build("hiera", dtype=torch.float32), x.clone()
        with pytest.raises(ValueError, match="inference_mode"):
            check(model, x)
    frozen.register_buffer("extra", y)
    for arguments in ((frozen, x), (model, y), (model, {"x": y})):
        with pytest.raises(ValueError, match=r"inference.*clone"):
            check(*arguments)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_report_says_what_a_hook_turns_off(name):
    model = build(name)
    assert not any("hook" in text for _, text in explain(model).replaced)
    handle = model.unroll.register_forward_hook(lambda *args: None)
    for report in (explain(model), accelerate(model)):
        assert [path for path, text in report.replaced if "hook" in text] == [""]
    handle.remove()
    assert not any("hook" in text for _, text in explain(model).replaced)


def test_global_hooks_are_noted_too():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert any("hook" in text for _, text in explain(build("hiera")).replaced)
    finally:
        handle.remove()

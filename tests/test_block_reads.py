"""A submodule is read only while a call of it would do the same: hooks, wrappers, other classes, other settings.

Everything by way of the ops, where reading pays, against a stock model that is changed in the same way. Broken on
purpose and seen red here: `is_heard` that looks at forward hooks only, `is_plain` by isinstance, `is_inert` always
true, `is_erf_gelu` without `approximate`, the MLP's class not compared.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from hiera.block import DropPath, LayerScale, Mlp
from hiera_kernels.block_plan import plan_of
from hiera_kernels.swap import accelerate, explain
from tests.block_kernels import default_kernels_on_cpu
from tests.swap_cases import LIBRARIES, assert_equal, build, example, step
from tests.test_swap_contract import LoRA

INSIDE = [
    *("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "drop_path"),
    "proj",  # of the block that changes the stage
]


def pair(name="hiera", **settings):
    stock = build(name, drop_path_rate=0.4, stages=(2, 1, 1, 1), **settings)
    ours = copy.deepcopy(stock)
    assert not accelerate(ours).skipped
    return stock, ours


def assert_same(stock, ours):
    expected = step(stock, example(batch=6))
    with default_kernels_on_cpu() as calls:
        actual = step(ours, example(batch=6))
    # Of what drop path has dropped in all samples: zero, not missing.
    dropped = [name for name, value in expected.items() if not value.any()]
    assert all(not actual.pop(name).any() for name in dropped)
    assert_equal(actual, {name: value for name, value in expected.items() if name not in dropped})
    return calls


def both(stock, ours, change):
    """Change the last block that stays and the first that pools, in both models alike."""
    for model in (stock, ours):
        torch.manual_seed(8)
        for i in (1, 2):
            change(model.blocks[i])


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("name", LIBRARIES)
def test_hooks_on_every_submodule(name, path):
    stock, ours = pair(name)
    fired = [[], []]
    for model, log in zip((stock, ours), fired, strict=True):
        module = model.blocks[2].get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, log=log: (log.append("before"), (args[0] * 1.25,))[1])
        module.register_forward_hook(lambda m, args, out, log=log: (log.append("after"), out * 1.5)[1])
        module.register_full_backward_hook(lambda m, grad, _, log=log: (log.append("backward"), (grad[0] * 0.5,))[1])
    assert_same(stock, ours)
    assert fired[0] == fired[1]
    assert set(fired[0]) == {"before", "after", "backward"}


@pytest.mark.parametrize("kind", ["backward pre-hook", "on the instance", "global"])
@pytest.mark.parametrize("path", ["norm1", "mlp.fc1", "mlp", "attn.proj"])
def test_other_ways_of_listening(path, kind):
    stock, ours = pair()
    handles = []
    for model in (stock, ours):
        module = model.blocks[2].get_submodule(path)
        if kind == "backward pre-hook":
            module.register_full_backward_pre_hook(lambda m, grad: (grad[0] * 2,))
        elif kind == "on the instance":
            module.forward = lambda x, forward=module.forward: forward(x) * 1.5
    if kind == "global":
        wanted = type(stock.blocks[2].get_submodule(path))
        hook = lambda m, args, out: out * 1.01 if isinstance(m, wanted) else None  # noqa: E731
        handles.append(nn.modules.module.register_module_forward_hook(hook))
    try:
        assert_same(stock, ours)
    finally:
        for handle in handles:
            handle.remove()


class Sharp(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Loud(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Gated(Mlp):
    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x)


class Upside(DropPath):
    def forward(self, x):
        return super().forward(x) * 0.5


def with_class(cls):
    def change(module):
        module.__class__ = cls

    return change


CHANGES = {
    "LoRA on fc1": lambda b: setattr(b.mlp, "fc1", LoRA(b.mlp.fc1)),
    "LoRA on fc2": lambda b: setattr(b.mlp, "fc2", LoRA(b.mlp.fc2)),
    "LoRA on qkv": lambda b: setattr(b.attn, "qkv", LoRA(b.attn.qkv)),
    "LoRA on the shortcut": lambda b: hasattr(b, "proj") and setattr(b, "proj", LoRA(b.proj)),
    "derived norm1": lambda b: with_class(Sharp)(b.norm1),
    "derived norm2": lambda b: with_class(Sharp)(b.norm2),
    "derived fc2": lambda b: with_class(Loud)(b.mlp.fc2),
    "derived proj": lambda b: with_class(Loud)(b.attn.proj),
    "derived MLP": lambda b: with_class(Gated)(b.mlp),
    "derived drop path": lambda b: with_class(Upside)(b.drop_path),
    "RMSNorm": lambda b: setattr(b, "norm2", nn.RMSNorm(b.dim_out, dtype=torch.float64)),
    "no norm": lambda b: setattr(b, "norm2", nn.Identity()),
    "norm without parameters": lambda b: setattr(b, "norm1", nn.LayerNorm(b.dim, elementwise_affine=False)),
    "norm without bias": lambda b: setattr(b, "norm2", nn.LayerNorm(b.dim_out, bias=False, dtype=torch.float64)),
    "linear without bias": lambda b: [
        b.mlp.fc1.register_parameter("bias", None),
        b.attn.proj.register_parameter("bias", None),
    ],
    "all linears without bias": lambda b: [
        m.register_parameter("bias", None) for m in b.modules() if isinstance(m, nn.Linear)
    ],
    "tanh GELU": lambda b: setattr(b.mlp, "act", nn.GELU(approximate="tanh")),
    "SiLU": lambda b: setattr(b.mlp, "act", nn.SiLU()),
    "no drop path": lambda b: setattr(b, "drop_path", nn.Identity()),
    "drop path of rate 1": lambda b: setattr(b.drop_path, "drop_prob", 1.0),
    "drop path unscaled": lambda b: setattr(b.drop_path, "scale_by_keep", False),
    "drop path of rate 0": lambda b: setattr(b.drop_path, "drop_prob", 0.0),
    "spectral norm": lambda b: parametrizations.spectral_norm(b.mlp.fc1),
    "weight norm": lambda b: parametrizations.weight_norm(b.attn.proj),
    "pruned": lambda b: prune.l1_unstructured(b.mlp.fc2, "weight", amount=0.5),
    "other MLP": lambda b: setattr(
        b, "mlp", nn.Sequential(nn.Linear(b.dim_out, 5), nn.Tanh(), nn.Linear(5, b.dim_out)).double()
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_after_the_call(what):
    stock, ours = pair()
    both(stock, ours, CHANGES[what])
    assert_same(stock, ours)


@pytest.mark.parametrize("what", [name for name in CHANGES if name != "pruned"])
def test_changed_before_the_call(what):
    stock = build("hiera", drop_path_rate=0.4, stages=(2, 1, 1, 1))
    torch.manual_seed(8)
    for i in (1, 2):
        CHANGES[what](stock.blocks[i])
    ours = copy.deepcopy(stock)
    accelerate(ours)
    assert_same(stock, ours)


def test_dropout_in_the_mlp():
    """timm's MLP has it, at rate 0 in Hiera."""
    stock, ours = pair("hiera-transformer")
    for model in (stock, ours):
        model.blocks[1].mlp.drop1.p = 0.5
    assert_same(stock, ours)
    calls = assert_same(stock.eval(), ours.eval())
    assert calls.count("gelu") == 5, "in eval mode it is off, and the MLP is read"


def test_layer_scale_in_place_or_derived():
    class Squared(LayerScale):
        def forward(self, x):
            return x * self.gamma**2

    stock, ours = pair(layer_scale=0.3)
    both(stock, ours, lambda b: with_class(Squared)(b.ls1))
    assert_same(stock, ours)
    both(stock, ours, lambda b: setattr(b, "ls2", nn.Identity()))
    assert_same(stock, ours)


def test_a_class_that_is_patched(monkeypatch):
    """By a library that has a LayerNorm of its own, say."""
    original = nn.LayerNorm.forward
    stock, ours = pair()
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: original(self, x) * 1.5)
    calls = assert_same(stock, ours)
    assert "add_layer_norm" not in calls


def test_the_report_names_what_is_called():
    _, ours = pair(layer_scale=0.3)
    assert "called" not in str(explain(ours))
    block = ours.blocks[2]
    with_class(Sharp)(block.norm1)
    block.mlp.fc2.register_forward_hook(lambda *args: None)
    block.attn.proj = LoRA(block.attn.proj)
    block.proj = LoRA(block.proj)
    block.drop_path.__class__ = Upside
    (line,) = [text for path, text in explain(ours).replaced if path == "blocks.2"]
    assert line.endswith("called and not read: norm1, attention, shortcut, MLP, drop path")
    assert explain(ours) == accelerate(ours)


def test_what_the_plan_knows():
    _, ours = pair(layer_scale=0.3)
    plan = plan_of(ours.blocks[1])
    assert (plan.mlp, plan.drop, plan.scale) == (Mlp, DropPath, LayerScale)
    stock = build("hiera", drop_path_rate=0.4)
    stock.blocks[1].mlp.__class__, stock.blocks[1].drop_path.__class__ = Gated, Upside
    accelerate(stock)
    assert (plan_of(stock.blocks[1]).mlp, plan_of(stock.blocks[1]).drop) == (None, None)


def test_attention_that_is_restored_alone():
    """The block calls what it may not read."""
    from hiera_kernels.swap import restore

    stock, ours = pair()
    restore(ours.blocks[1].attn)
    calls = assert_same(stock, ours)
    assert calls.count("mask_unit_attention") == 4

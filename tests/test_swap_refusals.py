"""What a comparison of numbers on a CPU does not show, or shows only when it is asked the right way.

Every case here was accepted once, and changed what a model computes, drew, or kept in memory.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import checkpoint as recomputed

from hiera.block import MaskUnitAttention
from hiera.tokens import Unroll
from hiera_kernels import recognise
from hiera_kernels.swap import accelerate, explain
from tests.swap_cases import ALL, LIBRARIES, build, library, swapped

Upstream = library("hiera-transformer").Hiera
TINY = dict(input_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), num_classes=5)


@pytest.fixture
def unjudged(monkeypatch):
    """No verdict of an earlier test spares a comparison."""
    monkeypatch.setattr(recognise, "_VERDICTS", type(recognise._VERDICTS)())


def attention(cls):
    return cls(8, 8, 2, window_size=4, use_mask_unit_attn=True)


def why_not(module):
    """The reason for which nothing of `module` itself is swapped, by explain and by accelerate."""
    report = accelerate(module)
    assert explain(module) == report
    (reason,) = [text for path, text in report.skipped if path == ""]
    assert "" not in swapped(module)
    return reason


class Written(Upstream):
    """Upstream's forward in other words; subclasses say how it ends and how a block is called."""

    def forward(self, x, mask=None, return_intermediates=False):
        if isinstance(x, list):
            x = x[0]
        found = []
        x = self.unroll(self.patch_embed(x, mask=None) + self.get_pos_embed())
        for i, block in enumerate(self.blocks):
            x = self.through(block, x)
            if return_intermediates and i in self.stage_ends:
                found.append(self.reroll(x, i, mask=mask))
        x = self.tail(x)
        return (x, found) if return_intermediates else x

    def through(self, block, x):
        return block(x)

    def tail(self, x):
        return self.head(self.norm(x.mean(dim=1)))


class NormFirst(Written):
    def tail(self, x):
        return self.head(self.norm(x).mean(dim=1))


class HeadFirst(Written):
    def tail(self, x):
        return self.head(self.norm(x)).mean(dim=1)


class NormBeforeBlocks(Written):
    def through(self, block, x):
        return block(x - x.mean(dim=1, keepdim=True)) + x.mean(dim=1, keepdim=True)


def test_the_order_of_norm_head_and_mean():
    """With affine stand-ins all of these were the same."""
    assert "" in swapped_after_accelerate(Written(**TINY))
    for cls in (NormFirst, HeadFirst, NormBeforeBlocks):
        assert "its output is not the op's" in why_not(cls(**TINY)), cls


def swapped_after_accelerate(model):
    accelerate(model)
    return swapped(model)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_known_models_keep_all_that_is_replaced(name, unjudged):
    model = build(name)
    report = accelerate(model)
    assert swapped(model) == ALL
    assert not report.skipped


# Settings


class WithDropout(MaskUnitAttention):
    def forward(self, x):
        B, N, _ = x.shape
        W = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        q, k, v = self.qkv(x).reshape(B, N // W, W, 3, self.heads, self.head_dim).permute(3, 0, 4, 2, 1, 5).unbind(0)
        if self.q_stride > 1:
            q = q.unflatten(3, (self.q_stride, -1)).max(dim=3).values
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate() if self.training else 0.0)
        return self.proj(x.transpose(1, 3).flatten(3).flatten(1, 2))

    def rate(self):
        return self.attn_drop or 0.0


class OnTheClass(WithDropout):
    attn_drop = 0.0


class OnTheMixin:
    attn_drop = 0.0


class Mixed(WithDropout, OnTheMixin):
    pass


class Switched(WithDropout):
    """Either of the two alone changes nothing."""

    drop = True
    attn_drop = 0.0

    def rate(self):
        return self.attn_drop if self.drop else 0.0


class LooksForIt(WithDropout):
    def rate(self):
        return getattr(self, "attn_drop", 0.0)


def test_a_rate_that_is_set_later():
    assert "looks for `attn_drop`" in why_not(attention(LooksForIt))


@pytest.mark.parametrize("start", [0.0, 0, None, (), "class", "mixin", "switch", "None buffer"])
def test_a_rate_that_is_raised_later(start):
    """No dropout yet: equal in every number, until a schedule sets a rate, which the op would not see."""
    by_name = {"class": OnTheClass, "mixin": Mixed, "switch": Switched}
    module = attention(by_name.get(start, WithDropout))
    if start == "None buffer":
        module.register_buffer("attn_drop", None)
    elif start not in by_name:
        module.attn_drop = start
    assert "reads `attn_drop`" in why_not(module) or "reads `drop`" in why_not(module)


class Recomputing(Written):
    use_recompute = False

    def through(self, block, x):
        return checkpoint(block, x, use_reentrant=False) if self.use_recompute else block(x)


class RecomputingAlways(Written):
    def through(self, block, x):
        return checkpoint(block, x, use_reentrant=False)


again = functools.partial(recomputed, use_reentrant=False)


class RecomputingByAnotherName(Written):
    def through(self, block, x):
        return recomputed(block, x, use_reentrant=False)


class RecomputingByPartial(Written):
    def through(self, block, x):
        return again(block, x)


class Offloading(Written):
    def through(self, block, x):
        with torch.autograd.graph.save_on_cpu():
            return block(x)


class Hooking(Written):
    def through(self, block, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return block(x)


@pytest.mark.parametrize(
    "cls",
    [
        Recomputing,
        RecomputingAlways,
        RecomputingByAnotherName,
        RecomputingByPartial,
        Offloading,
        Hooking,
    ],
)
def test_what_saves_memory_is_not_dropped(cls):
    """The numbers are the same with and without: only memory differs."""
    assert "reads `use_recompute`" in why_not(cls(**TINY)) or "memory" in why_not(cls(**TINY))


class NoAutocastOnCuda(MaskUnitAttention):
    def forward(self, x):
        with torch.autocast("cuda", enabled=False):
            return super().forward(x)


class DecoratedForCuda(MaskUnitAttention):
    @torch.autocast("cuda", enabled=False)
    def forward(self, x):
        return MaskUnitAttention.forward(self, x)


class AsksTheTensor(MaskUnitAttention):
    def forward(self, x):
        return super().forward(x * 2 if x.is_cuda else x)


class AsksTheDevice(MaskUnitAttention):
    def forward(self, x):
        return super().forward(x * 2 if x.device.type == "cuda" else x)


class AsksTheMachine(MaskUnitAttention):
    def forward(self, x):
        return super().forward(x * 2 if torch.cuda.is_available() else x)


class AsksForAutocast(MaskUnitAttention):
    def forward(self, x):
        return super().forward(x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x)


@pytest.mark.parametrize(
    "cls",
    [NoAutocastOnCuda, DecoratedForCuda, AsksTheTensor, AsksTheDevice, AsksTheMachine, AsksForAutocast],
)
def test_what_another_device_would_do(cls):
    assert "only on the CPU" in why_not(attention(cls))


# Arguments


class WithBias(MaskUnitAttention):
    def forward(self, x, attn_bias=None):
        return super().forward(x) if attn_bias is None else super().forward(x) + attn_bias


class OtherName(MaskUnitAttention):
    def forward(self, tokens):
        return super().forward(tokens)


class AnyArguments(MaskUnitAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OtherDefault(Written):
    def forward(self, x, mask=None, return_intermediates=None):
        return super().forward(x, mask, return_intermediates)


class Inverse(Unroll):
    def forward(self, x, inverse=False):
        return x.flip(1) if inverse else super().forward(x)


def test_arguments_that_the_op_does_not_take():
    modules = [attention(cls) for cls in (WithBias, OtherName, AnyArguments)]
    for module in (*modules, OtherDefault(**TINY), Inverse((64, 64), (4, 4), [(2, 2)])):
        assert "arguments" in why_not(module)
    x = torch.randn(1, 8, 8)
    assert torch.equal(modules[0](x, attn_bias=1.0), modules[0](x) + 1)


def test_registries_of_subclasses():
    registered = {}

    class Registry:
        def __init_subclass__(cls, **keywords):
            super().__init_subclass__(**keywords)
            registered[cls.__name__] = cls

    class Before(Registry, MaskUnitAttention):
        pass

    class After(MaskUnitAttention, Registry):
        pass

    for cls in (Before, After):
        assert "__init_subclass__" in why_not(attention(cls))
        assert registered[cls.__name__] is cls

"""What is swapped and what is left alone: structure first, then numbers on look-alikes, never the user's own module."""

import copy
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hiera_kernels.recognise import reach
from hiera_kernels.subclass import target_of
from hiera_kernels.swap import accelerate, explain
from tests.swap_cases import LIBRARIES, assert_equal, build, example, library, step


class MaskUnitAttention(nn.Module):
    """A vendored copy, written anew: same attributes, same numbers, nothing imported."""

    def __init__(self, dim=8, dim_out=8, heads=2, q_stride=1, window_size=4, use_mask_unit_attn=True):
        super().__init__()
        self.dim, self.dim_out, self.heads, self.head_dim = dim, dim_out, heads, dim_out // heads
        self.q_stride, self.window_size, self.use_mask_unit_attn = q_stride, window_size, use_mask_unit_attn
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim_out), nn.Linear(dim_out, dim_out)

    def split(self, x):
        B, N, _ = x.shape
        W = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        return self.qkv(x).view(B, -1, W, 3, self.heads, self.head_dim).permute(3, 0, 4, 2, 1, 5)

    def pool(self, q):
        return q.unflatten(3, (self.q_stride, -1)).max(dim=3).values

    def attend(self, q, k, v):
        return (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(dim=-1) @ v

    def merge(self, x):
        return x.transpose(1, 3).flatten(3).flatten(1, 2)

    def forward(self, x):
        q, k, v = self.split(x)
        if self.q_stride > 1:
            q = self.pool(q)
        return self.proj(self.merge(self.attend(q, k, v)))


class RenamedSubclass(MaskUnitAttention):
    """No `forward` of its own, and a parameter that nothing reads."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer_id, self.note, self.unused = 7, object(), nn.Parameter(torch.ones(3))


class OverridesButEqual(MaskUnitAttention):
    def forward(self, x):
        return super().forward(x * 1.0)


@pytest.mark.parametrize("cls", [MaskUnitAttention, RenamedSubclass, OverridesButEqual])
def test_vendored_copies_are_swapped(cls):
    for settings in ({}, {"q_stride": 4, "window_size": 2}, {"use_mask_unit_attn": False, "window_size": 0}):
        torch.manual_seed(0)
        model = cls(**settings).double()
        stock = copy.deepcopy(model)
        report = accelerate(model)
        assert report.replaced
        assert not report.skipped
        x = torch.randn(2, 16, 8, dtype=torch.float64)
        expected, actual = step(stock, x), step(model, x)
        # the keys' bias shifts all logits of a row alike: its gradient is rounding
        for gradients in (expected, actual):
            gradients["qkv.bias"][8:16] = 0
        assert_equal(actual, expected)


class PackedByHead(MaskUnitAttention):
    """(H, 3, D) instead of (3, H, D): the same shapes, and with one head the same numbers."""

    def split(self, x):
        B, N, _ = x.shape
        W = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        return self.qkv(x).view(B, -1, W, self.heads, 3, self.head_dim).permute(4, 0, 3, 2, 1, 5)


class ContiguousWindows(MaskUnitAttention):
    """Windows one after the other, not interleaved."""

    def split(self, x):
        B, N, _ = x.shape
        W = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        return self.qkv(x).view(B, W, -1, 3, self.heads, self.head_dim).permute(3, 0, 4, 1, 2, 5)


class PooledByMean(MaskUnitAttention):
    def pool(self, q):
        return q.unflatten(3, (self.q_stride, -1)).mean(dim=3)


class TiesSplit(MaskUnitAttention):
    """Pools by `amax`: equal outputs, another gradient where tokens tie."""

    def pool(self, q):
        return q.unflatten(3, (self.q_stride, -1)).amax(dim=3)


class DropoutByFunction(MaskUnitAttention):
    """Equal in eval, different in training."""

    def __init__(self, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)


class DropoutByModule(MaskUnitAttention):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attn_drop = nn.Dropout(0.1)

    def attend(self, q, k, v):
        return self.attn_drop(super().attend(q, k, v))


class ReadsScale(MaskUnitAttention):
    """With the default scale it gives the op's numbers; but whoever sets `scale` later expects it to count."""

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class HiddenExtra(MaskUnitAttention):
    """Uses a parameter where there is one, through a function outside the class."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = nn.Parameter(torch.zeros(1))

    def merge(self, x):
        return super().merge(apply_gate(self, x))


def apply_gate(module, x):
    gate = getattr(module, "gate", None)
    return x if gate is None else x * (1 + gate)


class Upcast(MaskUnitAttention):
    """Returns fp32 under autocast."""

    def forward(self, x):
        return super().forward(x).to(torch.promote_types(torch.float32, x.dtype))


class DetachesKeys(MaskUnitAttention):
    """Equal outputs, wrong gradients."""

    def attend(self, q, k, v):
        return super().attend(q, k.detach(), v)


class Fails(MaskUnitAttention):
    def forward(self, x):
        raise RuntimeError("only on Tuesdays")


REFUSED = {
    PackedByHead: "output is not the op's",
    ContiguousWindows: "output is not the op's",
    PooledByMean: "output is not the op's",
    TiesSplit: "gradient is not the op's .*ties",
    DropoutByFunction: "reads `rate` .float.",
    DropoutByModule: "reads `attn_drop` .Dropout.",
    ReadsScale: "output is not the op's",
    HiddenExtra: "reads `gate` .Parameter.",
    Upcast: "another shape or dtype than the op's .*autocast",
    DetachesKeys: "gradient is not the op's",
    Fails: "RuntimeError: only on Tuesdays",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_look_alikes_are_left_alone(cls):
    model = cls(heads=1)  # one head: nothing that the module itself computes would tell the two packings apart
    x = torch.randn(2, 8, 8)
    classes = type(model)
    report = accelerate(model)
    assert not report.replaced
    ((path, why),) = report.skipped
    assert path == ""
    assert re.search(REFUSED[cls], why), why
    assert type(model) is classes
    assert explain(model) == report
    if cls is not Fails:
        model(x)


def test_a_rate_of_zero_may_be_raised_later():
    report = accelerate(DropoutByFunction(rate=0.0))
    assert not report.replaced
    assert "reads `rate`" in report.skipped[0].text


@pytest.mark.parametrize("name", LIBRARIES)
def test_forward_rebound_on_the_instance(name):
    model = build(name)
    attention = model.blocks[2].attn
    attention.forward = lambda x: type(attention).forward(attention, x) * 2
    expected = step(model, example())
    report = accelerate(model)
    assert [path for path, _ in report.skipped] == ["blocks.2.attn"]
    assert "replaced on the instance" in report.skipped[0].text
    assert_equal(step(model, example()), expected)


@pytest.mark.parametrize("name", LIBRARIES)
def test_class_patched_between_two_calls(name, monkeypatch):
    """The verdict on a class is kept, but not beyond a change of its code."""
    accelerate(build(name))
    model = build(name)
    cls = type(model.blocks[0].attn)
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * original(self, x))
    expected = step(model, example())
    report = accelerate(model)
    assert len(report.skipped) == 6
    assert_equal(step(model, example()), expected)
    # what was swapped before runs the original again
    monkeypatch.undo()
    accelerate(model)
    monkeypatch.setattr(cls, "forward", lambda self, x: 3 * original(self, x))
    assert len(accelerate(model).skipped) == 6
    assert all(target_of(block.attn) is None for block in model.blocks)


def test_sizes_that_do_not_fit():
    for change, why in (
        (dict(heads=3), "heads = 3 times head_dim = 4 is not dim_out = 8"),
        (dict(qkv=nn.Linear(8, 16)), "`qkv` maps 8 to 16 channels where 8 to 24"),
        (dict(proj=nn.Linear(8, 6)), "`proj` maps 8 to 6"),
        (dict(q_stride=(2, 2)), "no integer attribute `q_stride`"),
        (dict(use_mask_unit_attn=None), "no attribute `use_mask_unit_attn`"),
    ):
        model = MaskUnitAttention()
        for name, value in change.items():
            setattr(model, name, value)
        assert why in accelerate(model).skipped[0].text


class WithClassToken(library("hiera").Hiera):
    """A user's subclass with a forward of its own."""

    def embed_tokens(self, x, mask=None, keep=None):
        return super().embed_tokens(x, mask, keep) * 2


class UpstreamSubclass(library("hiera-transformer").Hiera):
    def forward(self, x, mask=None, return_intermediates=False):
        x = self.unroll(self.patch_embed(x) + 2 * self.get_pos_embed())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(dim=1)))


class UpstreamExtended(library("hiera-transformer").Hiera):
    """Only adds around the original."""

    def get_pos_embed(self):
        return super().get_pos_embed() * 3

    def features(self, x):
        return self(x, return_intermediates=True)[1]


@pytest.mark.parametrize(
    ("cls", "kept"), [(WithClassToken, False), (UpstreamSubclass, False), (UpstreamExtended, True)]
)
def test_subclasses_of_the_whole_model(cls, kept):
    torch.manual_seed(0)
    model = cls(input_size=(64, 96), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), num_classes=5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    stock = copy.deepcopy(model)
    report = accelerate(model)
    assert ("" in [path for path, _ in report.replaced]) is kept
    assert len(report.replaced) == 10 + kept
    assert_equal(step(model, example()), step(stock, example()))


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_of_the_user_is_run_and_no_random_number_drawn(name):
    """Hooks of every kind, global ones too; caller's modes; three generators' worth of state."""
    model = build(name)
    fired = []

    def note(*args):
        fired.append(args)

    for module in model.modules():
        module.register_forward_pre_hook(note)
        module.register_forward_hook(note)
        module.register_full_backward_hook(note)
        module.register_state_dict_pre_hook(note)
        module.register_load_state_dict_pre_hook(note)
    registered = nn.modules.module
    handles = [
        registered.register_module_forward_pre_hook(note),
        registered.register_module_forward_hook(note),
        registered.register_module_full_backward_hook(note),
        registered.register_module_parameter_registration_hook(note),
        registered.register_module_module_registration_hook(note),
        registered.register_module_buffer_registration_hook(note),
    ]
    parameter_hooks = [p.register_hook(note) for p in model.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.initial_seed()
    grads = [p.grad for p in model.parameters()]

    class Fresh(MaskUnitAttention):  # a class that has no verdict yet
        pass

    model.extra = Fresh()
    fired.clear()
    torch.manual_seed(5)
    random.seed(5)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            report = accelerate(model)
    finally:
        for handle in handles + parameter_hooks:
            handle.remove()
    assert fired == []
    assert "extra" in [path for path, _ in report.replaced]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.initial_seed()) == before[1:]
    assert [p.grad for p in model.parameters()][: len(grads)] == grads


def test_poisoned_parameters_are_never_read():
    model = build("hiera")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert not accelerate(model).skipped


def test_a_class_that_refuses_subclasses():
    class Sealed(MaskUnitAttention):
        def __init_subclass__(cls, *, license_key, **kwargs):
            raise AssertionError("not reached")

    model = nn.Sequential(Sealed(), MaskUnitAttention())
    report = accelerate(model)
    assert [path for path, _ in report.replaced] == ["1"]
    assert "cannot be extended" in report.skipped[0].text
    assert type(model[0]) is Sealed


def test_a_patched_helper_counts_too(monkeypatch):
    """The class stays, its `forward` stays, and what that calls is another."""
    assert accelerate(MaskUnitAttention()).replaced
    monkeypatch.setattr(MaskUnitAttention, "pool", PooledByMean.pool)
    assert "is not the op's" in accelerate(MaskUnitAttention()).skipped[0].text


def test_reachable_code_follows_calls():
    def reached(**keywords):
        return {code.co_name for code in reach(HiddenExtra, "forward", **keywords)[0]}

    assert {"forward", "split", "merge", "apply_gate"} <= reached()
    assert "apply_gate" not in reached(opaque=frozenset(["merge"]))

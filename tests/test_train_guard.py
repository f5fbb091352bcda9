import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hiera
from hiera.guard import GuardedStep, ReadLate, first_non_finite

CPU = torch.device("cpu")


class Setup:
    """A two-layer network, its guarded step, and losses that can be spoilt."""

    def __init__(self, scaled=False, max_bad=3, clip=0.0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        self.step = GuardedStep(self.optimizer, self.scaler, CPU, max_bad, clip)

    def __call__(self, seed, spoil=None):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        loss = self.model(x).square().mean()
        return self.step(SPOILS[spoil](loss) if spoil else loss)

    def state(self):
        per_parameter = self.optimizer.state_dict()["state"].items()
        moments = {f"{i}.{name}": value for i, state in per_parameter for name, value in state.items()}
        return {name: value.clone() for name, value in (self.model.state_dict() | moments).items()}


class Explode(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor: a bad gradient under a good loss."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


SPOILS = {
    "loss nan": lambda loss: loss * torch.nan,
    "loss inf, gradient finite": lambda loss: loss + torch.inf,
    "gradient nan": lambda loss: Explode.apply(loss, torch.nan),
    "gradient inf": lambda loss: Explode.apply(loss, torch.inf),
    "gradient finite, norm overflows": lambda loss: Explode.apply(loss, 1e25),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_step_leaves_weights_and_moments_as_if_it_had_not_been(spoil, scaled, clip):
    """Broken on purpose: all fail without `found_inf`; zeroed gradients in its stead fail by decay and moments."""
    run, without = Setup(scaled, clip=clip), Setup(scaled, clip=clip)
    for seed in range(6):
        if seed in (0, 3):  # before the moments exist, and after
            before = run.state()
            stats = run(seed, spoil)
            assert stats.skipped == 1
            if seed:
                assert same(run.state(), before)
        else:
            stats = run(seed)
            assert stats.skipped == 0
            assert stats.bad_in_a_row == 0
            without(seed)
    assert stats.skipped_in_all == 2
    assert same(run.state(), without.state())
    assert {v.item() for k, v in run.state().items() if k.endswith(".step")} == {4.0}


def test_good_steps_are_plain_adamw():
    run = Setup()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, foreach=False, fused=False)
    for seed in range(5):
        stats = run(seed)
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert stats.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()
    for a, b in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_limits_the_norm_and_reports_it_unclipped():
    steps = {}
    for clip in (0.0, 0.05):
        run = Setup(clip=clip)
        seen = []
        run.optimizer.register_step_pre_hook(
            lambda optimizer, *_, seen=seen: seen.append(
                torch.nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
            )
        )
        steps[clip] = run(0).grad_norm.item(), seen[0].item()
    assert steps[0.0][0] == steps[0.0][1] == steps[0.05][0] > 0.1
    assert steps[0.05][1] == pytest.approx(0.05, rel=1e-4)


def test_after_too_many_bad_steps_nothing_moves_any_more():
    run = Setup(max_bad=3)
    counts = [run(s, spoil).bad_in_a_row.item() for s, spoil in enumerate([None, "loss nan", None, *["loss nan"] * 3])]
    assert counts == [0, 1, 0, 1, 2, 3]
    frozen = run.state()
    for seed in range(3):
        stats = run(seed)
        assert (stats.skipped, stats.bad_in_a_row) == (1, 3)
    assert same(run.state(), frozen)


def test_an_overflow_under_the_scaler_looks_for_the_scale_and_is_not_bad_before_the_scale_is_1():
    run = Setup(scaled=True, max_bad=100)
    scales, bad = [], []
    for seed in range(13):
        stats = run(seed, "gradient inf")
        bad.append(stats.bad_in_a_row.item())
        scales.append(run.scaler.get_scale())
    assert scales == [2.0 ** (9 - k) for k in range(13)]
    assert bad == [0] * 10 + [1, 2, 3]  # the first step that runs with a scale of 1 is the eleventh
    assert stats.skipped_in_all == 13
    run = Setup(scaled=True)
    assert [run(s, "loss nan").bad_in_a_row.item() for s in range(3)] == [1, 2, 3]


def test_counters_are_saved_and_restored():
    run, again = Setup(), Setup()
    for spoil in ("loss nan", None, "loss nan", "loss nan"):
        run(0, spoil)
    again.step.load_state_dict(run.step.state_dict())
    stats = again(0, "loss nan")
    assert (stats.skipped_in_all, stats.bad_in_a_row) == (4, 3)


class NoReads(TorchDispatchMode):
    """Fails on whatever would make the host wait for a GPU: a number or a truth value taken out of a tensor."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        name = function.name()
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize(("scaled", "clip"), [(False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)])
def test_a_step_reads_nothing_from_the_device(scaled, clip):
    """Broken on purpose: `if skip: return` in GuardedStep and `get_total_norm(..., error_if_nonfinite=True)` fail."""
    run = Setup(scaled, clip=clip)
    run(0)  # lazy initialisation apart
    with NoReads():
        run(1)
        run(2, "loss nan")
        run(3)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        run(4).loss.item()


@pytest.mark.gpu
def test_a_step_does_not_synchronise_the_gpu():
    model = nn.Linear(8, 8, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = GuardedStep(optimizer, torch.amp.GradScaler("cuda", enabled=False), torch.device("cuda"), 3)
    late = ReadLate()
    x = torch.randn(4, 8, device="cuda")
    late.push(step(model(x).mean()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = step(model(x).mean() * torch.nan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert late.push(stats).skipped == 0
    assert late.pop().skipped == 1


def test_stats_are_read_one_step_late():
    run, late = Setup(), ReadLate()
    assert late.pop() is None
    assert late.push(run(0)) is None
    assert late.push(run(1, "loss nan")).skipped == 0
    assert late.push(run(2)).skipped == 1
    assert late.pop().skipped == 0
    assert late.pop() is None


def spoil_forward(module, args, output):
    return output * torch.nan


def spoil_backward(module, args, output):
    return Explode.apply(output, torch.inf)


@pytest.mark.parametrize(
    ("path", "hook", "expected"),
    [
        ("blocks.2.attn.qkv", spoil_forward, "blocks.2.attn.qkv (output of its forward)"),
        ("patch_embed", spoil_forward, "patch_embed (output of its forward)"),
        ("decoder_pred", spoil_forward, "decoder_pred (output of its forward)"),
        # The gradient turns bad between the module's own result and what its hook made of it.
        ("blocks.3.mlp.fc1", spoil_backward, "blocks.3.mlp.fc1.bias (its gradient)"),
        ("decoder_blocks.0.attn", spoil_backward, "decoder_blocks.0.attn.proj (gradient that arrives at its output)"),
    ],
)
def test_the_first_non_finite_module_is_named(path, hook, expected):
    model = hiera.create_model("mae_hiera_mini_128", input_size=(64, 96))
    images = torch.randn(2, 3, 64, 96)
    handle = model.get_submodule(path).register_forward_hook(hook)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert first_non_finite(model, lambda: model(images, mask_ratio=0.6)[0]) == expected
    handle.remove()
    assert same(before, dict(model.state_dict()))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert first_non_finite(model, lambda: model(images, mask_ratio=0.6)[0]).startswith("nothing")
    assert first_non_finite(model, lambda: model(images / 0, mask_ratio=0.6)[0]) == "the images (input of the model)"
    assert first_non_finite(model, lambda: model(images)[0] / 0).startswith("the loss")
    with torch.no_grad():
        model.decoder_norm.bias[3] = torch.inf
    assert first_non_finite(model, lambda: model(images)[0]) == "decoder_norm.bias itself, before the pass"

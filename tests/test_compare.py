"""`check`: it says yes where the two models agree, no where they do not, and leaves the caller's model as it was."""

import copy
import random

import pytest
import torch
from torch import nn

from hiera_kernels import compare
from hiera_kernels.compare import check
from hiera_kernels.measure import TrainingStep, step_bytes
from hiera_kernels.swap import accelerate
from tests.swap_cases import LIBRARIES, build, example, keep_mask


@pytest.mark.parametrize("kind", ["image", "MAE image"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_fp32(name, kind):
    model = build(name, kind, dtype=torch.float32, drop_path_rate=0.3)
    result = check(model, example(kind, torch.float32), repeats=1)
    assert result.ok, str(result)
    assert result.oracle
    assert len(result.gradients) == len(list(model.parameters()))
    assert all(0 < row.accelerated < 1e-3 for row in result.outputs if "loss" not in row.name)
    assert all(value > 0 for value in (*result.seconds, *result.bytes))
    assert len(result.report.replaced) >= 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    result = check(build("hiera", dtype=dtype), example().to(dtype), repeats=1)
    assert result.ok, str(result)
    assert result.oracle is (dtype is not torch.float64)


def test_under_the_callers_autocast():
    model = build("hiera", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rough = check(model, example(dtype=torch.float32), repeats=1)
        assert torch.is_autocast_enabled("cpu")
    fine = check(model, example(dtype=torch.float32), repeats=1)
    assert rough.ok, str(rough)
    assert rough.outputs[0].stock > 100 * fine.outputs[0].stock, "autocast was not in force"


def test_arguments_and_loss():
    model = build("hiera", dtype=torch.float32).eval()
    x, mask = example(dtype=torch.float32), keep_mask()
    assert check(model, (x, mask), repeats=1).ok
    result = check(model, {"x": x, "return_intermediates": True}, loss=lambda out: out[1][0].sum(), repeats=1)
    assert result.ok
    assert len(result.outputs) == 1 + 4 + 1  # logits, stages, loss
    assert all("blocks.4" not in row.name for row in result.gradients), "the loss sees the first stage only"


def state(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()},
        [type(module) for module in model.modules()],
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_model_stays_as_it_was(accelerated):
    model = build("hiera", dtype=torch.float32)
    model.register_buffer("counter", torch.zeros(()))
    model.blocks[1].eval()
    model.blocks[2].requires_grad_(False)
    for parameter in model.blocks[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    if accelerated:
        accelerate(model)
    before = state(model)
    random.seed(1)
    torch.manual_seed(1)
    generators = torch.get_rng_state(), random.getstate()
    x = example(dtype=torch.float32)
    kept = x.clone()
    assert check(model, x, repeats=1).ok
    assert all(equal(a, b) for a, b in zip(state(model), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert torch.equal(x, kept)
    assert x.grad is None


@pytest.mark.parametrize(
    "fault", ["a gradient 3 % off", "a gradient 0.1 % off", "a gradient of zero", "an output 1 % off", "a NaN", "dtype"]
)
def test_faults_are_found(monkeypatch, fault):
    """Each fault is put into the accelerated copy only, after `accelerate` has looked at it."""

    def accelerate_and_break(model):
        report = accelerate(model)
        if fault == "a gradient 3 % off":
            model.blocks[2].attn.qkv.weight.register_hook(lambda grad: grad * 1.03)
        elif fault == "a gradient 0.1 % off":  # what rounding could do once, but not three times over
            model.blocks[2].attn.qkv.weight.register_hook(lambda grad: grad * 1.001)
        elif fault == "a gradient of zero":
            model.blocks[2].norm2.bias.register_hook(torch.zeros_like)
        elif fault == "an output 1 % off":
            model.register_forward_hook(lambda module, args, out: out * 1.01)
        elif fault == "a NaN":
            model.blocks[4].mlp.fc1.bias.register_hook(lambda grad: grad * float("nan"))
        else:
            model.register_forward_hook(lambda module, args, out: out.bfloat16())
        return report

    monkeypatch.setattr(compare, "accelerate", accelerate_and_break)
    for dtype in (torch.float32, torch.float64):
        result = check(build("hiera", dtype=dtype), example(dtype=dtype), repeats=1)
        assert not result.ok
        assert "WRONG" in str(result)
        wrong = [row.name for row in result.outputs + result.gradients if not row.ok]
        if fault.endswith("% off") and "gradient" in fault:
            assert wrong == ["blocks.2.attn.qkv.weight"]


def test_a_tie_that_rounding_breaks_is_no_fault(monkeypatch):
    """One gradient wrong by what rounding can do, once: the second look, on an input nearby, finds it right."""
    broken = []

    def accelerate_and_stumble(model):
        report = accelerate(model)
        model.blocks[2].attn.qkv.weight.register_hook(
            lambda g: broken.append(1) or (g * 1.001 if len(broken) == 1 else g)
        )
        return report

    monkeypatch.setattr(compare, "accelerate", accelerate_and_stumble)
    assert check(build("hiera", dtype=torch.float32), example(dtype=torch.float32), repeats=1).ok
    assert len(broken) > 2


def test_table():
    text = str(check(build("hiera", dtype=torch.float32), example(dtype=torch.float32), repeats=1))
    for part in ("training step, ms", "saved for the backward, MB", "equal within", "worst of gradients", "output 0"):
        assert part in text
    assert max(map(len, text.splitlines())) < 120


def test_saved_bytes_are_counted_once_and_without_parameters():
    """y = relu(x @ w) @ v: autograd keeps x (for w) and relu's output (for relu and for v), and no weights."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    step = TrainingStep(model, torch.randn(32, 8), lambda out: out.sum())
    assert step_bytes(step, torch.device("cpu")) == 4 * 32 * (8 + 16)


class NoisyInItsDtype(nn.Module):
    """Draws other random numbers in fp64 than in fp32."""

    def __init__(self):
        super().__init__()
        self.inner = build("hiera", dtype=torch.float32)

    def forward(self, x):
        return self.inner(x) * (torch.rand(2, 7, dtype=x.dtype) + 0.5)


def test_randomness_that_depends_on_the_dtype_is_compared_with_stock():
    result = check(NoisyInItsDtype(), example(dtype=torch.float32), repeats=1)
    assert not result.oracle
    assert result.ok, str(result)


def test_what_cannot_be_checked():
    model, x = build("hiera", dtype=torch.float32), example(dtype=torch.float32)
    for call, error, words in (
        (lambda: check({}, x), TypeError, "model must be"),
        (lambda: check(model, 3), TypeError, "batch must be"),
        (lambda: check(model, x, repeats=0), ValueError, "repeats"),
        (lambda: check(model, x, loss=lambda out: out), TypeError, "scalar"),
        (lambda: check(nn.Linear(2, 2), x), ValueError, "nothing to accelerate"),
        (lambda: check(copy.deepcopy(model).to("meta"), x), ValueError, "meta"),
        (
            lambda: check(copy.deepcopy(model).requires_grad_(False), x),
            ValueError,
            "no parameter that requires a gradient",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def test_compiled_model_is_unwrapped():
    model = torch.compile(build("hiera", dtype=torch.float32), backend="eager")
    assert check(model, example(dtype=torch.float32), repeats=1).ok

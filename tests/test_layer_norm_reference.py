"""The specification of add_layer_norm: an oracle, finite differences, and the dtypes of the operations it stands for.

Broken on purpose, and seen by the first test: drop_scale on the whole sum, the variance divided by C - 1, bias before
weight, a branch bias whose value counts.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import hiera_kernels
from hiera_kernels import reference
from hiera_kernels.reference.layer_norm import normalize
from tests import layer_norm_oracle as oracle

SHAPES = [(3, 5, 12), (2, 3, 2, 7), (1, 4), (4, 1, 1), (2, 0, 6)]
WITHOUT = {
    "everything": (),
    "no scales": ("drop_scale", "layer_scale", "branch_bias"),
    "drop path": ("layer_scale",),
    "layer scale": ("drop_scale", "bias"),
    "no affine": ("weight", "bias", "branch_bias"),
    "LayerNorm alone": ("branch", "drop_scale", "layer_scale", "branch_bias"),
}
FUNCTIONS = {"reference": reference.add_layer_norm, "public": hiera_kernels.add_layer_norm}


def close(got, want, tolerance=1e-12):
    return np.abs(oracle.array(got) - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_oracles(shape, without, function):
    arguments = oracle.draw(shape, torch.float64, without=without)
    grad_sum, grad_normed = torch.randn(2, *shape, dtype=torch.float64)
    total, normed, grads = oracle.gradients(function, arguments, grad_sum, grad_normed, eps=0.3)
    want_total, want_normed, want = oracle.wanted(arguments, grad_sum, grad_normed, eps=0.3)
    assert close(total, want_total)
    assert close(normed, want_normed)
    for name, grad in grads.items():
        assert grad.shape == arguments[name].shape
        assert close(grad, want[name]), name


def test_the_oracle_agrees_with_finite_differences():
    arguments = oracle.draw((3, 2, 5), torch.float64)
    grad_sum, grad_normed = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    values = {name: oracle.array(t) for name, t in arguments.items() if name != "branch_bias"}

    def loss(**changed):
        total, normed = oracle.forward(**values | changed)
        return (total * grad_sum.numpy()).sum() + (normed * grad_normed.numpy()).sum()

    found = oracle.backward(grad_sum.numpy(), grad_normed.numpy(), **values)
    shifts = {name: values[name] for name in ("x", "branch", "weight", "bias", "layer_scale")}
    for name, value in shifts.items():
        direction = np.random.default_rng(0).standard_normal(value.shape)
        ahead, behind = (loss(**{name: value + step * direction}) for step in (1e-6, -1e-6))
        assert (ahead - behind) / 2e-6 == pytest.approx((found[name] * direction).sum(), rel=1e-6), name
    lift = np.random.default_rng(1).standard_normal(5)
    ahead, behind = (loss(branch=values["branch"] + step * lift) for step in (1e-6, -1e-6))
    assert (ahead - behind) / 2e-6 == pytest.approx((found["branch_bias"] * lift).sum(), rel=1e-6)


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
def test_gradcheck_of_first_and_second_derivative(without):
    without = (*without, "branch_bias")  # its value does not count, so that finite differences do not see it
    arguments = oracle.draw((2, 2, 5), torch.float64, without=without)
    names = [name for name, t in arguments.items() if t is not None and t.requires_grad]

    def run(*leaves):
        return reference.add_layer_norm(**arguments | dict(zip(names, leaves, strict=True)))

    leaves = [arguments[name] for name in names]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


# ---- dtypes ----


def stock(x, branch, norm):
    total = x if branch is None else x + branch
    return total, norm(total)


@pytest.mark.parametrize("branch_dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_dtypes_under_autocast_are_stocks(x_dtype, branch_dtype):
    norm = torch.nn.LayerNorm(8, eps=1e-6)
    x = torch.randn(2, 3, 8).to(x_dtype)
    branch = None if branch_dtype is None else torch.randn(2, 3, 8).to(branch_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = stock(x, branch, norm)
        got = reference.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)
        half = reference.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, normed_dtype=torch.bfloat16)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.equal(theirs)
    assert half[1].equal(want[1].bfloat16())  # what the next Linear would cast to


@pytest.mark.parametrize("branch_dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_dtypes_under_cudas_autocast_are_stocks(x_dtype, branch_dtype):
    """Without a GPU: on fake tensors, which autocast treats as it treats real ones."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), torch.no_grad():  # a torch without CUDA has no autograd for it
            norm = torch.nn.LayerNorm(8, eps=1e-6, device="cuda")
            x = torch.randn(2, 3, 8, device="cuda").to(x_dtype)
            branch = None if branch_dtype is None else torch.randn(2, 3, 8, device="cuda").to(branch_dtype)
            want = stock(x, branch, norm)
            ways = [
                function(x, branch, norm.weight, norm.bias, norm.eps)[:2]
                for function in (reference.add_layer_norm, hiera_kernels.add_layer_norm)
            ]
            _, direct, _, _ = torch.ops.hiera_kernels.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert want[1].dtype is direct.dtype is torch.float32
    for got in ways:
        assert [t.dtype for t in got] == [t.dtype for t in want]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_autocast_both_have_the_dtype_of_the_sum(dtype):
    norm = torch.nn.LayerNorm(8, dtype=dtype)
    x, branch = torch.randn(2, 2, 3, 8).to(dtype)
    got, want = reference.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps), stock(x, branch, norm)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype is dtype
        assert ours.equal(theirs)


def test_a_layer_scale_in_fp32_promotes_as_a_product_with_it_does():
    x, branch = torch.randn(2, 2, 3, 8, dtype=torch.bfloat16)
    scale = torch.randn(8)
    total, normed = reference.add_layer_norm(x, branch, None, None, layer_scale=scale)
    assert total.dtype is (x + branch * scale).dtype is torch.float32
    assert total.equal(x + branch * scale)
    assert normed.equal(F.layer_norm(total, (8,), eps=1e-6))


def test_a_dropped_sum_is_rounded_once():
    x, branch = torch.randn(2, 64, 8, 8, dtype=torch.bfloat16)
    drop = (torch.rand(64) > 0.2) / 0.8
    total, _ = reference.add_layer_norm(x, branch, None, None, drop_scale=drop)
    factor = drop.reshape(64, 1, 1)
    exact = x.double() + branch.double() * factor.double()
    assert total.equal(exact.bfloat16())
    twice = x + branch * factor.bfloat16()  # as a model has it
    assert (total - exact).abs().mean() < (twice - exact).abs().mean()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(parameters):
    x, weight, bias = torch.randn(2, 3, 8).bfloat16(), torch.randn(8).to(parameters), torch.randn(8).to(parameters)
    for stream in (x, x.float()):
        _, normed = reference.add_layer_norm(stream, None, weight, bias)
        want = F.layer_norm(stream.float(), (8,), weight.float(), bias.float(), 1e-6)
        assert normed.dtype is stream.dtype
        assert normed.equal(want.to(stream.dtype))


def test_normalizing_from_statistics_is_layer_norm():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    mean = x.mean(-1)
    rstd = (x.var(-1, correction=0) + 1e-6).rsqrt()
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        got = normalize(x, mean, rstd, w, b, torch.float64)
        assert torch.allclose(got, F.layer_norm(x, (8,), w, b, 1e-6), rtol=1e-12, atol=1e-12)

"""The Triton kernels of add_layer_norm, interpreted, against the oracle.

Broken on purpose, each alone, and seen by the first test: the sum that is not rounded before its mean is taken (fp16),
padded columns that count in the variance, the second chunk of columns without weight, or without the gradient of the
sum, the sample of a row taken from its program. A row too many ends the process: it is outside the tensor.
"""

import numpy as np
import pytest
import torch

import hiera_kernels
from hiera_kernels.ops.layer_norm import add_layer_norm_with_statistics
from tests import layer_norm_oracle as oracle
from tests.interpreter import kernels_on_cpu, marks
from tests.test_layer_norm_reference import WITHOUT

pytestmark = marks

# Published widths of one and two chunks, widths of no model; rows that fill no block, several rounds and programs.
SHAPES = [
    (3, 7, 96),
    (2, 5, 3, 112),
    (3, 11, 144),
    (2, 9, 288),
    (2, 3, 448),
    (3, 3, 1152),
    (1, 5, 2048),
    (5, 8),
    (3, 6, 13),
    (2, 2, 100),
    (1, 1, 1),
    (420, 40),
]
# Of the largest value: products and sums in fp32, then one rounding to the dtype of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6 + 2**-11, torch.bfloat16: 2e-6 + 2**-8}


def check(got, want, name):
    scale = np.abs(want).max(initial=0)
    apart = np.abs(oracle.array(got) - want).max(initial=0)
    assert apart <= TOLERANCE[got.dtype] * scale + 1e-30, f"{name}: {apart:.2e} of {scale:.2e}"


def fused(arguments, *grads, **options):
    with kernels_on_cpu() as calls:
        answer = oracle.gradients(hiera_kernels.add_layer_norm, arguments, *grads, **options)
    assert calls == ["add_layer_norm", "add_layer_norm_backward"]
    return answer


def against_the_oracle(arguments, grad_sum, grad_normed, eps=1e-6, **options):
    total, normed, found = fused(arguments, grad_sum, grad_normed, eps=eps, **options)
    want_total, want_normed, want = oracle.wanted(arguments, grad_sum, grad_normed, eps, total)
    check(total, want_total, "sum")
    check(normed, want_normed, "normed")
    assert set(found) == {name for name, t in arguments.items() if t is not None and t.requires_grad}
    for name, grad in found.items():
        assert grad.dtype is arguments[name].dtype
        check(grad, want[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    grad_sum, grad_normed = torch.randn(2, *shape).to(dtype)
    against_the_oracle(oracle.draw(shape, dtype), grad_sum, grad_normed)


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 3, 48)], ids=str)
def test_every_combination_of_arguments(shape, without):
    arguments = oracle.draw(shape, without=without)
    grad_normed = torch.randn(shape)
    grad_sum = None if "branch" in without else torch.randn(shape)
    against_the_oracle(arguments, grad_sum, grad_normed, eps=0.1)
    if grad_sum is not None:
        against_the_oracle(arguments, None, grad_normed)


@pytest.mark.parametrize("frozen", ["x", "branch", "weight", "bias", "layer_scale", "branch_bias"])
def test_what_is_frozen_changes_no_other_gradient(frozen):
    arguments = oracle.draw((3, 5, 24))
    arguments[frozen].requires_grad_(False)
    against_the_oracle(arguments, *torch.randn(2, 3, 5, 24))


@pytest.mark.parametrize(
    ("alone", "without"),
    [
        ("x", ()),
        ("branch", ()),
        ("layer_scale", ("drop_scale",)),
        ("x", ("drop_scale", "layer_scale")),
        ("branch", ("drop_scale", "layer_scale")),
        ("weight", ("drop_scale", "layer_scale")),
    ],
    ids=str,
)
def test_one_gradient_alone(alone, without):
    arguments = oracle.draw((3, 5, 24), without=without)
    for name, tensor in arguments.items():
        if tensor is not None:
            tensor.requires_grad_(name == alone)
    against_the_oracle(arguments, *torch.randn(2, 3, 5, 24))


@pytest.mark.parametrize("without", [(), WITHOUT["LayerNorm alone"]], ids=["all", "alone"])
def test_opcheck_with_the_kernels(without):
    t = oracle.draw((2, 3, 24), without=without)
    call = (t["x"], t["branch"], t["weight"], t["bias"], 1e-6, t["drop_scale"], t["layer_scale"], None)
    ops = torch.ops.hiera_kernels
    with kernels_on_cpu():
        torch.library.opcheck(ops.add_layer_norm.default, (*call, t["branch_bias"]))
        with torch.no_grad():
            total, normed, mean, rstd = ops.add_layer_norm(*call)
            total = t["x"].detach() if t["branch"] is None else total
            fixed = [None if t[n] is None else t[n].detach() for n in ("weight", "branch", "drop_scale", "layer_scale")]
        wanted = [True, t["branch"] is not None, True, True, *[t["branch"] is not None] * 2]
        for asked in (wanted, [False] * 6):
            call = (total * 2, normed, total, mean, rstd, *fixed, torch.float32, torch.float32, asked)
            torch.library.opcheck(ops.add_layer_norm_backward.default, call)
        torch.library.opcheck(ops.normalize.default, (total, mean, rstd, fixed[0], None, torch.float16))


@pytest.mark.parametrize("scales", [(), ("drop_scale", "layer_scale")], ids=["plain", "scaled"])
def test_a_residual_in_fp32_with_a_branch_in_fp16(scales):
    """Stage 1 under autocast: the sum stays in fp32, the branch and what LayerNorm writes are in 16 bits."""
    shape = (3, 7, 96)
    without = {"drop_scale", "layer_scale"} - set(scales)
    arguments = oracle.draw(shape, torch.float32, without=without)
    arguments["branch"] = arguments["branch"].detach().half().requires_grad_()
    against_the_oracle(arguments, torch.randn(shape), torch.randn(shape).half(), normed_dtype=torch.float16)


def test_the_sum_alone_has_a_gradient():
    arguments = oracle.draw((3, 5, 24))
    grad = torch.randn(3, 5, 24)
    *_, found = fused(arguments, grad, None)
    want = oracle.backward(
        oracle.array(grad), None, **{n: oracle.array(t) for n, t in arguments.items() if n != "branch_bias"}
    )
    for name in ("x", "branch", "layer_scale", "branch_bias"):
        check(found[name], want[name], name)
    assert found["weight"] is found["bias"] is None


def test_normalizing_again_gives_the_same_bits():
    from hiera_kernels.kernels.layer_norm import normalize

    for C in (24, 96, 144):
        arguments = oracle.draw((2, 5, C), torch.float16, torch.float32, requires_grad=False)
        for without in ((), ("weight",), ("bias",), ("weight", "bias")):
            t = arguments | dict.fromkeys(without)
            with kernels_on_cpu():
                total, normed, mean, rstd = add_layer_norm_with_statistics(**t, normed_dtype=torch.float32)
            assert mean.shape == rstd.shape == (2, 5)
            assert normalize(total, mean, rstd, t["weight"], t["bias"], torch.float32).equal(normed)


def test_any_strides():
    t = oracle.draw((4, 6, 24), requires_grad=False)
    grads = torch.randn(2, 24, 6, 4).permute(0, 3, 2, 1)
    turned = t | {"x": torch.randn(24, 6, 4).permute(2, 1, 0), "branch": torch.randn(6, 24).expand(4, 6, 24)}
    turned |= {"weight": torch.randn(48)[::2], "drop_scale": torch.tensor(0.5).expand(4)}
    dense = {name: None if v is None else v.contiguous() for name, v in turned.items()}
    for name in ("x", "branch", "weight"):
        turned[name].requires_grad_()
        dense[name].requires_grad_()
    got, want = fused(turned, *grads), fused(dense, *(g.contiguous() for g in grads))
    assert got[0].equal(want[0])
    assert got[1].equal(want[1])
    assert all(got[2][name].equal(want[2][name]) for name in want[2])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_row(special):
    shape = (2, 5, 144)
    arguments = oracle.draw(shape, without=("drop_scale", "layer_scale"))
    with torch.no_grad():
        arguments["x"][1, 4, 143] = special
    grads = torch.randn(2, *shape)
    total, normed, found = fused(arguments, *grads)
    stock = {n: t if t is None else t.detach().requires_grad_() for n, t in arguments.items()}
    _, want_normed, want = oracle.gradients(hiera_kernels.reference.add_layer_norm, stock, *grads)
    assert normed.isnan().equal(want_normed.isnan())
    assert normed.isnan().sum() == 144
    assert found["x"].isnan().equal(want["x"].isnan())
    assert found["weight"].isnan().equal(want["weight"].isnan())
    assert found["branch_bias"].isnan().equal(want["branch_bias"].isnan())
    assert total[1, 4, :143].isfinite().all()


def test_large_values_and_constant_rows():
    """Sums of 65,000 in fp16, whose squares overflow fp16; far from zero in fp32, where E[x^2] - E[x]^2 is noise."""
    x = torch.full((2, 4, 96), 6.5e4, dtype=torch.float16)
    x[1, :, ::2] = 3e4
    grads = torch.randn(2, 2, 4, 96).half()
    arguments = oracle.draw((2, 4, 96), torch.float16, without=WITHOUT["LayerNorm alone"])
    arguments["x"] = x.requires_grad_()
    _, normed, _ = fused(arguments, None, grads[1])
    assert normed[0].equal(arguments["bias"].detach().expand(4, 96))
    against_the_oracle(arguments | {"x": x[1:].detach().requires_grad_()}, None, grads[1][1:])
    far = (1e4 + torch.randn(2, 4, 96)).requires_grad_()
    arguments = dict.fromkeys(oracle.NAMES) | {"x": far}
    with kernels_on_cpu():
        normed = hiera_kernels.add_layer_norm(far, None, None, None)[1]
    # The mean is known to half a step of fp32 at 1e4.
    assert np.abs(oracle.array(normed) - oracle.wanted(arguments, None, None)[1]).max() < 2e-3


@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24)], ids=str)
def test_empty(shape):
    arguments = oracle.draw(shape)
    total, normed, found = fused(arguments, *torch.randn(2, *shape))
    assert total.shape == normed.shape == shape
    for name, grad in found.items():
        assert grad.shape == arguments[name].shape
        assert not grad.any()


def test_sums_do_not_depend_on_the_order_of_programs():
    """Many programs, each with its own partial sum; the last is not full."""
    from hiera_kernels.kernels.layer_norm_backward import programs

    shape = (2, 401, 16)
    assert programs(802, 16)[0] > 2
    against_the_oracle(oracle.draw(shape), *torch.randn(2, *shape))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3, 8), torch.float64), ((1, 2, 2056), torch.float32)], ids=["fp64", "C=2056"]
)
def test_what_no_kernel_serves_goes_to_the_reference(shape, dtype):
    from hiera_kernels.ops.layer_norm import refusal

    arguments = oracle.draw(shape, dtype)
    grads = torch.randn(2, *shape, dtype=dtype)
    with kernels_on_cpu() as calls:
        assert refusal(arguments["x"]) is not None
        total, normed, found = oracle.gradients(hiera_kernels.add_layer_norm, arguments, *grads)
        assert calls == []
        direct, _, _, _ = torch.ops.hiera_kernels.add_layer_norm(arguments["x"], arguments["branch"], None, None)
        direct.sum().backward()
    want_total, want_normed, want = oracle.wanted(arguments, *grads)
    step = 8 * torch.finfo(dtype).eps
    for got, truth in ((total, want_total), (normed, want_normed), *((g, want[n]) for n, g in found.items())):
        assert np.abs(oracle.array(got) - truth).max() <= step * np.abs(truth).max()

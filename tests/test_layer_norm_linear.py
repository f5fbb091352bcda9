"""A Linear behind add_layer_norm that does not keep its input: the same values and gradients, and what is kept."""

import pytest
import torch
import torch.nn.functional as F

import hiera_kernels
from hiera_kernels.ops.layer_norm import add_layer_norm_with_statistics
from hiera_kernels.ops.normed_linear import linear_of_normed
from tests import layer_norm_oracle as oracle

B, N, C, OUT = 4, 6, 16, 48


def block(t, weight, bias, recompute, dtype=None):
    total, normed, mean, rstd = add_layer_norm_with_statistics(**t, normed_dtype=dtype)
    if recompute:
        return total, linear_of_normed(normed, total, mean, rstd, t["weight"], t["bias"], weight, bias)
    return total, F.linear(normed, weight, bias)


def drawn(dtype=torch.float32, without=(), parameters=None):
    t = oracle.draw((B, N, C), dtype, parameters, without=without)
    parameters = dtype if parameters is None else parameters
    return t, *(torch.randn(*s).to(parameters).requires_grad_() for s in ((OUT, C), (OUT,)))


def both(function, t, weight, bias, **options):
    """Outputs and gradients, with the Linear that recomputes and with the plain one."""
    leaves = [v for v in (*t.values(), weight, bias) if v is not None and v.requires_grad]
    answers = []
    for recompute in (True, False):
        total, y = function(t, weight, bias, recompute, **options)
        ends = [out for out in (total, y) if out.requires_grad]
        seeds = [torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype) for out in ends]
        answers.append((total, y, *torch.autograd.grad(ends, leaves, seeds)))
    return answers


@pytest.mark.parametrize("without", [(), ("layer_scale", "drop_scale"), ("weight",), ("bias", "weight")], ids=str)
def test_values_and_gradients_are_those_of_linear(without):
    t, weight, bias = drawn(without=without)
    with oracle.kernels_on_cpu() as calls:
        for ours, theirs in zip(*both(block, t, weight, bias), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [name for name, *_ in calls].count("normalize") == 1


@pytest.mark.parametrize("normed_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(x_dtype, normed_dtype):
    """Weights in fp32: `F.linear`'s dtypes, and gradients as near to exact ones as its own."""
    t, weight, bias = drawn(x_dtype, parameters=torch.float32, without=("layer_scale",))
    exact = {n: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for n, v in t.items()}
    with oracle.kernels_on_cpu():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = both(block, t, weight, bias, dtype=normed_dtype)
        truth = both(block, exact, weight.detach().double().requires_grad_(), bias.detach().double().requires_grad_())[
            1
        ]
    assert ours[1].dtype is torch.bfloat16
    for got, stock, want in zip(ours, theirs, truth, strict=True):
        assert got.dtype is stock.dtype
        largest = want.abs().max()
        assert (got - want).abs().max() <= 1.1 * (stock - want).abs().max() + 1e-3 * largest


def test_the_input_is_not_kept():
    t, weight, bias = drawn()
    sizes = {}
    for recompute in (True, False):
        saved = {}
        with (
            oracle.kernels_on_cpu(),
            torch.autograd.graph.saved_tensors_hooks(
                lambda v, saved=saved: saved.setdefault(v.untyped_storage().data_ptr(), v) is None or v, lambda v: v
            ),
        ):
            out = block(t, weight, bias, recompute)
        own = {v.untyped_storage().data_ptr() for v in (*t.values(), weight, bias) if v is not None}
        sizes[recompute] = sum(v.nbytes for pointer, v in saved.items() if pointer not in own)
        del out
    assert sizes[False] - sizes[True] == B * N * C * 4
    assert sizes[True] == B * N * (C * 4 + 8)  # the sum, mean and rstd: what add_layer_norm keeps by itself


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input"])
def test_frozen_parameters(frozen):
    t, weight, bias = drawn()
    weight.requires_grad_(frozen not in ("weight", "both"))
    bias.requires_grad_(frozen not in ("bias", "both"))
    if frozen == "input":
        t = {name: None if v is None else v.detach() for name, v in t.items()}
    with oracle.kernels_on_cpu() as calls:
        for ours, theirs in zip(*both(block, t, weight, bias), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # A frozen weight has no gradient, and nothing is made again.
    assert [name for name, *_ in calls].count("normalize") == int(weight.requires_grad)


def test_a_bias_whose_gradient_is_made_elsewhere():
    t, weight, bias = drawn()
    with oracle.kernels_on_cpu():
        _, y = block(t, weight, bias.detach(), True)
        y.sum().backward()
    assert bias.grad is None
    assert weight.grad is not None


def test_where_no_kernel_serves_it_is_a_linear():
    t, weight, bias = drawn(torch.float64)
    total, normed, mean, rstd = add_layer_norm_with_statistics(**t)
    assert mean is rstd is None
    assert linear_of_normed(normed, total, mean, rstd, t["weight"], t["bias"], weight, bias).equal(
        F.linear(normed, weight, bias)
    )


def test_a_second_derivative_raises():
    t, weight, bias = drawn()
    with oracle.kernels_on_cpu():
        _, y = block(t, weight, bias, True)
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"disabled\(\)"):
            grad.sum().backward()
        with hiera_kernels.disabled():
            _, y = block(t, weight, bias, True)
            (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
            grad.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(autocast):
    t, weight, bias = drawn()
    with oracle.kernels_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        dtype = torch.bfloat16 if autocast else None
        leaves = [t["x"], t["weight"], weight, bias]
        got, want = (f(t, weight, bias, True, dtype)[1] for f in (compiled, block))
        assert got.dtype is want.dtype
        assert torch.allclose(got, want, atol=1e-6)
        grads = [torch.autograd.grad(y.float().square().sum(), leaves) for y in (got, want)]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
def test_opcheck_normalize(parameters):
    total, weight = torch.randn(2, 3, 8, dtype=parameters), torch.randn(8, dtype=parameters)
    statistics = (total.mean(-1), total.var(-1, correction=0).rsqrt())
    torch.library.opcheck(torch.ops.hiera_kernels.normalize.default, (total, *statistics, weight, None, torch.bfloat16))
    leaf = weight.requires_grad_()
    out = torch.ops.hiera_kernels.normalize(total, *statistics, leaf, None, torch.float32)
    with pytest.raises(NotImplementedError, match="no derivative"):
        out.sum().backward()

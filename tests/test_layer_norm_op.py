"""The contract of add_layer_norm: the op's way against an oracle, opcheck, torch.compile, derivatives, argument errors.

Broken on purpose, each alone, and seen by the first three tests: layer_scale missing in the gradient of the branch,
statistics of the sum before it is rounded, the gradient of the sum dropped.
"""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import hiera_kernels
from hiera_kernels import reference
from tests import layer_norm_oracle as oracle
from tests.test_layer_norm_reference import SHAPES, WITHOUT, close

OPS = torch.ops.hiera_kernels
FULL = (3, 5, 12)


@pytest.mark.parametrize("grads", ["both", "sum", "normed"])
@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_and_its_gradients_are_the_oracles(shape, without, grads):
    arguments = oracle.draw(shape, torch.float64, without=without)
    grad_sum, grad_normed = torch.randn(2, *shape, dtype=torch.float64)
    grad_sum = None if grads == "normed" else grad_sum
    grad_normed = None if grads == "sum" else grad_normed

    def run(x, branch, weight, bias, drop_scale, layer_scale, branch_bias):
        call = (x, branch, weight, bias, 0.3, drop_scale, layer_scale, None, branch_bias)
        total, normed, _, _ = OPS.add_layer_norm(*call)
        return (x * 1.0 if branch is None else total), normed

    total, normed, found = oracle.gradients(run, arguments, grad_sum, grad_normed)
    want_total, want_normed, want = oracle.wanted(arguments, grad_sum, grad_normed, eps=0.3)
    assert close(total, want_total)
    assert close(normed, want_normed)
    for name, grad in found.items():
        if grads == "sum" and name in ("weight", "bias"):
            assert grad is None
        elif grad is None:  # no sum of our own to send a gradient through
            assert grads == "sum"
            assert "branch" in without
        else:
            assert close(grad, want[name], 1e-10), name


@pytest.mark.parametrize("streams", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("scales", [(), ("drop_scale",), ("drop_scale", "layer_scale")])
def test_dtypes_of_results_and_gradients(streams, scales):
    """x, branch, parameters fp32: gradients in the dtypes of what they belong to; statistics are of the rounded sum."""
    arguments = oracle.draw((4, 6, 16), streams[0], torch.float32, without={"drop_scale", "layer_scale"} - set(scales))
    arguments["branch"] = arguments["branch"].detach().to(streams[1]).requires_grad_()
    grad_sum, grad_normed = torch.randn(2, 4, 6, 16)
    promoted = torch.float32 if "layer_scale" in scales else streams[0]
    with oracle.kernels_on_cpu() as calls:
        total, normed, found = oracle.gradients(
            hiera_kernels.add_layer_norm,
            arguments,
            grad_sum.to(promoted),
            grad_normed.bfloat16(),
            normed_dtype=torch.bfloat16,
        )
    assert [name for name, *_ in calls] == ["add_layer_norm", "add_layer_norm_backward"]
    assert total.dtype is promoted
    assert normed.dtype is torch.bfloat16
    rounded = (grad_sum.to(promoted), grad_normed.bfloat16())
    want_total, want_normed, want = oracle.wanted(arguments, *rounded, total=total)
    assert close(total, want_total, torch.finfo(promoted).eps)
    assert close(normed, want_normed, torch.finfo(torch.bfloat16).eps)
    for name, grad in found.items():
        assert grad.dtype is arguments[name].dtype, name
        assert close(grad, want[name], 4e-6 if grad.dtype is torch.float32 else torch.finfo(grad.dtype).eps), name


def test_one_gradient_serves_x_and_branch():
    arguments = oracle.draw(FULL, without=("drop_scale", "layer_scale"))
    with oracle.kernels_on_cpu():
        *_, found = oracle.gradients(hiera_kernels.add_layer_norm, arguments, None, torch.randn(FULL))
    assert found["x"].data_ptr() == found["branch"].data_ptr()


def test_frozen_arguments_get_no_gradient_and_cost_none():
    arguments = oracle.draw(FULL)
    for name in ("x", "weight", "bias", "layer_scale", "branch_bias"):
        arguments[name].requires_grad_(False)
    with oracle.kernels_on_cpu() as calls:
        *_, found = oracle.gradients(hiera_kernels.add_layer_norm, arguments, None, torch.randn(FULL))
    assert set(found) == {"branch"}
    *_, (name, *asked) = calls
    assert name == "add_layer_norm_backward"
    assert asked[-1] == [False, True, False, False, False, False]
    assert asked[6] is None  # the branch is not kept, as layer_scale is frozen


def kept(function):
    """Bytes that autograd keeps, once for each storage, beside the tensors that the caller holds."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        out = function()
    return saved, out


def test_only_the_sum_and_eight_bytes_a_row_are_kept():
    arguments = oracle.draw((4, 8, 16), without=("layer_scale",))
    with oracle.kernels_on_cpu():
        saved, (total, normed) = kept(lambda: hiera_kernels.add_layer_norm(**arguments))
    own = {t.untyped_storage().data_ptr() for t in arguments.values() if t is not None}
    others = {pointer: t for pointer, t in saved.items() if pointer not in own}
    assert total.untyped_storage().data_ptr() in others
    assert normed.untyped_storage().data_ptr() not in others
    assert sum(t.nbytes for t in others.values()) == total.nbytes + 8 * 32
    assert arguments["branch"].untyped_storage().data_ptr() not in saved


SAMPLES = {
    "all": ((2, 3, 8), torch.float32, (), None),
    "no scales": ((2, 3, 8), torch.float32, ("drop_scale", "layer_scale"), None),
    "alone": ((2, 8), torch.float32, WITHOUT["LayerNorm alone"], None),
    "no affine": ((2, 3, 4, 8), torch.float64, ("weight", "bias", "branch_bias"), None),
    "mixed": ((2, 3, 8), torch.bfloat16, ("layer_scale",), torch.float32),
    "empty": ((0, 3, 8), torch.float32, (), torch.bfloat16),
}


@pytest.mark.parametrize("with_kernel", [False, True])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample, with_kernel):
    shape, dtype, without, normed_dtype = SAMPLES[sample]
    t = oracle.draw(shape, dtype, without=without)
    call = (t["x"], t["branch"], t["weight"], t["bias"], 1e-6, t["drop_scale"], t["layer_scale"], normed_dtype)
    with oracle.kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        torch.library.opcheck(OPS.add_layer_norm.default, (*call, t["branch_bias"]))


@pytest.mark.parametrize("grads", ["both", "sum", "normed"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_backward(sample, grads):
    shape, dtype, without, normed_dtype = SAMPLES[sample]
    t = oracle.draw(shape, dtype, without=without, requires_grad=False)
    call = (t["x"], t["branch"], t["weight"], t["bias"], 1e-6, t["drop_scale"], t["layer_scale"], normed_dtype)
    total, normed, mean, rstd = OPS.add_layer_norm(*call)
    total = t["x"] if t["branch"] is None else total
    given = (None if grads == "normed" else total * 2, None if grads == "sum" else normed * 2)
    wanted = [
        True,
        t["branch"] is not None,
        *(t[n] is not None for n in ("weight", "bias", "layer_scale", "branch_bias")),
    ]
    args = (*given, total, mean, rstd, t["weight"], t["branch"], t["drop_scale"], t["layer_scale"], dtype, dtype)
    for asked in (wanted, [False, *wanted[1:]]) if grads == "both" else (wanted,):
        torch.library.opcheck(OPS.add_layer_norm_backward.default, (*args, asked))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_of_any_device(device):
    with FakeTensorMode():
        x, branch = (torch.empty(2, 6, 8, device=device, dtype=d) for d in (torch.float32, torch.bfloat16))
        weight = torch.empty(8, device=device)
        got = OPS.add_layer_norm(x, branch, weight, weight, 1e-6, normed_dtype=torch.bfloat16)
        public = hiera_kernels.add_layer_norm(x, branch, weight, weight, normed_dtype=torch.bfloat16)
    wanted = [((2, 6, 8), torch.float32), ((2, 6, 8), torch.bfloat16), ((2, 6), torch.float32), ((2, 6), torch.float32)]
    assert [(t.shape, t.dtype) for t in got] == wanted
    assert [(t.shape, t.dtype) for t in public] == wanted[:2]
    assert {t.device.type for t in got} == {device}


# ---- torch.compile, other derivatives ----


def block(x, branch, weight, bias, drop_scale):
    total, normed = hiera_kernels.add_layer_norm(x, branch, weight, bias, drop_scale=drop_scale)
    return total + normed.sin()


@pytest.mark.parametrize("with_kernel", [False, True])
def test_compiles_to_one_graph_of_any_batch(with_kernel):
    counter = CompileCounterWithBackend("aot_eager")
    with oracle.kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        for batch in (2, 3, 5):
            t = oracle.draw((batch, 3, 8))
            call = [t[n] for n in ("x", "branch", "weight", "bias", "drop_scale")]
            got, want = compiled(*call), block(*call)
            assert torch.allclose(got, want, atol=1e-6)
            grads = [torch.autograd.grad(out.square().sum(), call[:4]) for out in (got, want)]
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    nodes = [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    assert counter.frame_count <= 2
    assert (OPS.add_layer_norm.default in nodes) == with_kernel


def test_without_a_branch_the_sum_is_x():
    x = torch.randn(2, 3, 8, requires_grad=True)
    for context in (contextlib.nullcontext, oracle.kernels_on_cpu, torch.no_grad):
        with context():
            total, normed = hiera_kernels.add_layer_norm(x, None, None, None)
        assert total is x
        assert torch.allclose(normed, F.layer_norm(x, (8,), eps=1e-6), atol=1e-6)


def test_a_second_derivative_raises_and_disabled_has_it():
    t = oracle.draw((2, 3, 8), torch.float32)
    with oracle.kernels_on_cpu():
        total, normed = hiera_kernels.add_layer_norm(**t)
        (grad,) = torch.autograd.grad((total + normed.sin()).sum(), t["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"disabled\(\)"):
            grad.sum().backward()
        with hiera_kernels.disabled():
            (grad,) = torch.autograd.grad(hiera_kernels.add_layer_norm(**t)[1].sin().sum(), t["x"], create_graph=True)
            assert torch.autograd.grad(grad.square().sum(), t["x"])[0].abs().max() > 0


@pytest.mark.parametrize("function", [lambda *a: block(*a), lambda *a: OPS.add_layer_norm(*a[:4], 1e-6, a[4])[1]])
def test_forward_mode_and_vmap_are_served_by_plain_operations(function):
    t = oracle.draw((2, 3, 8), torch.float64)
    drop = t["drop_scale"]
    leaves = [t[n].detach() for n in ("x", "branch", "weight", "bias")]
    tangents = [torch.randn_like(leaf) for leaf in leaves]

    def run(*leaves):
        return function(*leaves, drop)

    with oracle.kernels_on_cpu():
        _, got = torch.func.jvp(run, tuple(leaves), tuple(tangents))
        step = 1e-6
        ahead, behind = (run(*(p + s * v for p, v in zip(leaves, tangents, strict=True))) for s in (step, -step))
        assert torch.allclose(got, (ahead - behind) / (2 * step), atol=1e-7)
        stacked = torch.stack([leaves[0], leaves[0] + 1])
        mapped = torch.func.vmap(lambda x: hiera_kernels.add_layer_norm(x, leaves[1], None, None)[1])(stacked)
    assert torch.allclose(mapped[1], reference.add_layer_norm(stacked[1], leaves[1], None, None)[1])


def test_drop_scale_has_a_gradient_by_plain_operations_only():
    t = oracle.draw(FULL, torch.float32)
    t["drop_scale"].requires_grad_()
    with oracle.kernels_on_cpu() as calls:
        total, _ = hiera_kernels.add_layer_norm(**t)
        (grad,) = torch.autograd.grad(total.sum(), t["drop_scale"])
        assert calls == []
        assert torch.allclose(grad, (t["branch"] * t["layer_scale"]).sum((1, 2)), rtol=1e-5)
        with pytest.raises(NotImplementedError, match="no gradient for drop_scale"):
            OPS.add_layer_norm(t["x"], t["branch"], None, None, 1e-6, t["drop_scale"])


def test_any_strides_and_special_values():
    t = oracle.draw((4, 6, 16), torch.float32, requires_grad=False)
    t["x"] = torch.randn(16, 6, 4).permute(2, 1, 0)
    t["branch"] = torch.randn(6, 16).expand(4, 6, 16)
    t["x"][0, 0, 0], t["x"][1, 2, 3], t["x"][2, 1] = float("nan"), float("inf"), 5.0
    t["branch"] = t["branch"].clone()
    t["branch"][2, 1] = 0.0  # a constant row: no variance
    with oracle.kernels_on_cpu():
        total, normed = hiera_kernels.add_layer_norm(**t)
    want_total, want_normed = reference.add_layer_norm(**t)
    assert total.is_contiguous()
    assert normed.is_contiguous()
    np.testing.assert_allclose(total.numpy(), want_total.numpy(), rtol=1e-6)
    np.testing.assert_allclose(normed.numpy(), want_normed.numpy(), rtol=1e-5, atol=1e-6)
    assert normed[0, 0].isnan().all()
    assert normed[2, 1].equal(t["bias"])


BAD = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor \[B, ..., C\], got list"),
    ({"x": torch.zeros(12)}, ValueError, r"x must be \[B, ..., C\].* got shape \(12,\)"),
    ({"x": torch.zeros(3, 0)}, ValueError, "at least one channel"),
    ({"x": torch.zeros(3, 5, 12, dtype=torch.int32)}, TypeError, "x must be one of .*float32.*got torch.int32"),
    ({"x": torch.zeros(3, 5, 12).to_sparse()}, TypeError, "x must be a dense tensor"),
    ({"branch": 1.0}, TypeError, "branch must be a tensor"),
    (
        {"branch": torch.zeros(3, 1, 12)},
        ValueError,
        r"branch must be of the shape of x, \(3, 5, 12\), got .*\(3, 1, 12\)",
    ),
    ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[C\], C = 12, got shape \(5,\)"),
    ({"weight": torch.zeros(12, dtype=torch.int8)}, TypeError, "weight must be one of .*got torch.int8"),
    ({"bias": torch.zeros(1, 12)}, ValueError, r"bias must be \[C\], got shape \(1, 12\)"),
    ({"layer_scale": torch.zeros(1)}, ValueError, "layer_scale must be"),
    ({"branch_bias": torch.zeros(13)}, ValueError, "branch_bias must be"),
    ({"drop_scale": torch.zeros(5)}, ValueError, r"drop_scale must be \[B\], B = 3, got shape \(5,\)"),
    ({"drop_scale": 0.5}, TypeError, r"drop_scale must be a tensor \[B\]"),
    ({"branch": None}, ValueError, "drop_scale must be None where branch is None"),
    ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ({"eps": float("nan")}, ValueError, "eps must be at least 0"),
    ({"normed_dtype": torch.int32}, TypeError, "normed_dtype must be None or one of"),
    ({"normed_dtype": "bf16"}, TypeError, "normed_dtype .* got 'bf16'"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        hiera_kernels.add_layer_norm(**oracle.draw(FULL) | change)

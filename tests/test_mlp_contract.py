"""`gelu`, `gelu_linear` and `mlp`: autocast, opcheck, torch.compile, torch.export, bad arguments.

What was broken on purpose, and which test went red:
- a backward that autocast reaches into: test_a_backward_under_autocast_computes_as_its_forward_did
"""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from hiera_kernels import ops, reference
from tests import feed_forward_oracle as oracle
from tests.feed_forward_kernels import oracle_kernels_on_cpu
from tests.test_mlp_values import FUNCTIONS, KERNELS, arrays, draw, expected, gradients, way

NAMESPACE = torch.ops.hiera_kernels

# ---- autocast ----


@pytest.mark.parametrize("function", ["mlp", "mlp, all kept", "parts"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_plain_pytorchs_bit_for_bit(function, stream):
    """All but the gradient of b1, which is summed in fp32 here and in bf16 there."""
    tensors, grad = draw("tokens", torch.float32)
    tensors[0] = tensors[0].detach().to(stream).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = (gradients(f, tensors, grad.bfloat16()) for f in (FUNCTIONS[function], reference.mlp))
    assert [t.dtype for t in got] == [torch.bfloat16, stream] + [torch.float32] * 4
    for i, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        if i == 3:
            truth = torch.from_numpy(expected(tensors, grad)[3])
            assert (ours - truth).abs().max() <= 1.5 * (theirs - truth).abs().max()
        else:
            assert ours.equal(theirs), i


def test_autocast_with_kernels():
    tensors, grad = draw("tokens", torch.float32)
    for function in ("mlp", "mlp, all kept", "parts"):
        with oracle_kernels_on_cpu() as calls, torch.autocast("cpu", dtype=torch.bfloat16):
            got = gradients(FUNCTIONS[function], tensors, grad.bfloat16())
        assert calls == ["gelu", "gelu_backward"]
        assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
        for ours, truth in zip(got, expected(tensors, grad), strict=True):
            assert (ours.double() - torch.from_numpy(truth)).abs().max() <= 0.05 * abs(truth).max()


@KERNELS
def test_autocast_of_a_wide_pre_activation(kernels):
    """GELU is not in autocast's lists: it takes fp32 as it comes, and the product after it is cast."""
    h = torch.randn(3, 24, requires_grad=True)
    weight, bias = torch.randn(6, 24, requires_grad=True), torch.randn(6, requires_grad=True)
    grad = torch.randn(3, 6).bfloat16()
    with way(kernels), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.gelu(h).dtype is torch.float32
        got = gradients(ops.gelu_linear, [h, weight, bias], grad)
        wanted = gradients(reference.gelu_linear, [h, weight, bias], grad)
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if kernels else 0, atol=1e-6 if kernels else 0)


@KERNELS
def test_a_backward_under_autocast_computes_as_its_forward_did(kernels):
    tensors, grad = draw("tokens", torch.float32)
    with way(kernels):
        wanted = gradients(ops.mlp, tensors, grad)
        out = ops.mlp(*tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.autograd.grad(out, tensors, grad)
    # The first layer is PyTorch's own, and autocast reaches into its backward: only what is this package's must agree.
    for i in (2, 3, 4):
        torch.testing.assert_close(got[i], wanted[1:][i], rtol=0, atol=0)


def test_dtypes_that_differ_are_refused_without_autocast_as_linear_refuses_them():
    tensors, _ = draw("tokens", torch.float32)
    tensors[3] = tensors[3].detach().bfloat16()
    with pytest.raises(TypeError, match=r"w2 must have the dtype of x, torch\.float32, got torch\.bfloat16"):
        ops.mlp(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.mlp(*tensors).dtype is torch.bfloat16


# ---- the op ----

SAMPLES = {
    "gradient": lambda: (torch.randn(2, 5, 6, requires_grad=True),),
    "bias": lambda: (torch.randn(2, 5, 6, requires_grad=True), torch.randn(6, requires_grad=True)),
    "bias alone": lambda: (torch.randn(2, 5, 6), torch.randn(6, requires_grad=True)),
    "bf16": lambda: (torch.randn(7, 6, dtype=torch.bfloat16, requires_grad=True),),
    "empty": lambda: (torch.randn(0, 6, requires_grad=True), torch.randn(6, requires_grad=True)),
    "strided": lambda: (torch.randn(6, 5).t().requires_grad_(),),
}


@KERNELS
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample, kernels):
    with way(kernels):
        torch.library.opcheck(NAMESPACE.gelu.default, SAMPLES[sample]())


@KERNELS
@pytest.mark.parametrize(("output", "bias_grad"), [(False, False), (True, False), (True, True)])
def test_opcheck_backward(output, bias_grad, kernels):
    for x in (torch.randn(2, 5, 6), torch.randn(6, 5).t(), torch.randn(3, 6, dtype=torch.bfloat16)):
        with way(kernels):
            torch.library.opcheck(NAMESPACE.gelu_backward.default, (torch.randn(x.shape), x, output, bias_grad))


def test_the_default_backward_of_the_op():
    x, grad = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    grad_x, out, sums = NAMESPACE.gelu_backward(grad, x, True, True)
    wanted = grad.numpy() * oracle.gelu_slope(x.numpy())
    for got, truth in ((grad_x, wanted), (out, oracle.gelu(x.numpy())), (sums, wanted.sum((0, 1)))):
        torch.testing.assert_close(got, torch.from_numpy(truth), rtol=1e-12, atol=1e-12)
    assert [t.shape for t in NAMESPACE.gelu_backward(grad, x)[1:]] == [(0,), (0,)]


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_of_any_device(device):
    with FakeTensorMode():
        x = torch.empty(2, 5, 6, device=device, dtype=torch.bfloat16)
        assert ops.gelu(x).shape == x.shape
        grad_x, out, sums = NAMESPACE.gelu_backward(x, x, True, True)
        w1, w2 = (torch.empty(*s, device=device, dtype=torch.bfloat16) for s in ((8, 6), (3, 8)))
        y = ops.mlp(x, w1, None, w2, None)
    found = [(t.shape, t.dtype, t.device.type) for t in (grad_x, out, sums, y)]
    assert found == [
        ((2, 5, 6), torch.bfloat16, device),
        ((2, 5, 6), torch.bfloat16, device),
        ((6,), torch.float32, device),
        ((2, 5, 3), torch.bfloat16, device),
    ]


# ---- torch.compile and torch.export ----


def compiled_graphs(function, x):
    """Run forward and backward; the two graphs below autograd, the output and the gradient of x."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    out = torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(x)
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    return graphs, out, grad


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def shapes_out(graph):
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return [tuple(a.meta["val"].shape) for a in output.args[0] if a is not None]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_mlp_keeps_what_the_eager_one_keeps(recompute, autocast):
    tensors, _ = draw("tokens", torch.float32)
    x, rest = tensors[0], tensors[1:]
    with oracle_kernels_on_cpu() as calls, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        graphs, out, grad = compiled_graphs(lambda x: ops.mlp(x, *rest, recompute=recompute), x)
        assert calls == ["gelu", "gelu_backward"]
        eager = ops.mlp(x, *rest, recompute=recompute)
        (eager_grad,) = torch.autograd.grad(eager.float().square().sum(), x)
    forward, backward = graphs
    assert targets(forward).count("hiera_kernels.gelu.default") == 1
    assert targets(backward).count("hiera_kernels.gelu_backward.default") == 1
    assert "hiera_kernels.gelu.default" not in targets(backward)
    assert shapes_out(forward).count((2, 5, 24)) + shapes_out(forward).count((10, 24)) == (1 if recompute else 2)
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(grad, eager_grad)


def test_compiled_without_a_kernel_it_is_plain_operations():
    tensors, _ = draw("tokens", torch.float32)
    x, rest = tensors[0], tensors[1:]
    graphs, out, grad = compiled_graphs(lambda x: ops.mlp(x, *rest), x)
    assert not [target for graph in graphs for target in targets(graph) if "hiera_kernels" in target]
    eager = ops.mlp(x, *rest)
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager.square().sum(), x)[0])


@KERNELS
def test_one_graph_for_all_batch_sizes(kernels):
    tensors, _ = draw("tokens", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    with way(kernels):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: ops.mlp(x, *tensors[1:]), backend=counter, fullgraph=True)
        for batch in (2, 3, 5, 7):
            x = torch.randn(batch, 5, 6, requires_grad=True)
            found = [
                torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, lambda x: ops.mlp(x, *tensors[1:]))
            ]
            torch.testing.assert_close(*found)
    assert counter.frame_count <= 2


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(6, 24), torch.nn.Linear(24, 6)

    def forward(self, x):
        return ops.gelu(ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))


@KERNELS
def test_export_with_a_dynamic_batch(kernels):
    block = Block()
    with way(kernels):
        dynamic = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(block, (torch.randn(2, 5, 6),), dynamic_shapes=dynamic, strict=False)
        x = torch.randn(7, 5, 6)
        torch.testing.assert_close(program.module()(x), block(x))
        found = [t for t in targets(program) if "hiera_kernels" in t]
    assert found == (["hiera_kernels.gelu.default"] * 2 if kernels else [])


# ---- bad arguments ----


def test_bad_arguments_are_named():
    x, w1, b1, w2, b2 = (t.detach() for t in draw("tokens", torch.float32)[0])
    bad = [
        (lambda: ops.mlp([1.0], w1, b1, w2, b2), TypeError, "x must be a tensor .* got list"),
        (lambda: ops.mlp(x.long(), w1, b1, w2, b2), TypeError, "x must be one of .*got torch.int64"),
        (lambda: ops.mlp(x.to_sparse(), w1, b1, w2, b2), TypeError, "x must be a dense tensor"),
        (lambda: ops.mlp(torch.tensor(1.0), w1, b1, w2, b2), ValueError, "x must have at least one axis"),
        (lambda: ops.mlp(x, w1[:, :5], b1, w2, b2), ValueError, r"w1 must be \[out, 6\].* got shape \(24, 5\)"),
        (lambda: ops.mlp(x, w1, b1[:3], w2, b2), ValueError, r"b1 must have shape \(24,\).*got \(3,\)"),
        (lambda: ops.mlp(x, w1, b1, w2.t(), b2), ValueError, r"w2 must be \[out, 24\].* got shape \(24, 6\)"),
        (lambda: ops.mlp(x, w1, b1, w2, b2[None]), ValueError, r"b2 must have shape \(6,\).*got \(1, 6\)"),
        (lambda: ops.mlp(x, w1, b1, w2, 0.0), TypeError, "b2 must be a tensor .* got float"),
        (lambda: ops.mlp(x, w1, b1, w2, b2, 1), TypeError, "recompute must be a bool, got 1"),
        (lambda: ops.gelu_linear(x, w2, b2), ValueError, r"weight must be \[out, 6\]"),
        (lambda: ops.gelu_linear(x @ w1.t(), w2, b2, hidden_bias=b2), ValueError, r"hidden_bias must .* \(24,\)"),
        (lambda: ops.gelu_linear(x.double() @ w1.t().double(), w2, b2), TypeError, "weight must have the dtype of h"),
        (lambda: ops.gelu(None), TypeError, "x must be a tensor .* got NoneType"),
        (lambda: ops.gelu(torch.tensor(1.0)), ValueError, r"x must be \[..., M\], got shape \(\)"),
        (lambda: ops.gelu(x, b1), ValueError, r"bias must have shape \(6,\).*got \(24,\)"),
        (lambda: ops.gelu(x, x), ValueError, r"bias must have shape \(6,\)"),
    ]  # fmt: skip
    for call, error, words in bad:
        with pytest.raises(error, match=words):
            call()
    assert arrays([F.gelu(x)])[0].shape == tuple(ops.gelu(x).shape)  # the good ones pass
    ops.mlp(x, w1, None, w2, None)

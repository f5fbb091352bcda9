"""The contract of the attention ops: opcheck, fake tensors, torch.compile, torch.export, argument errors."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from hiera_kernels import ops
from tests.attention_kernels import oracle_kernels_on_cpu

NAMESPACE = torch.ops.hiera_kernels
WINDOWS, HEADS = 3, 2


def make_qkv(dtype=torch.float32, batch=2, requires_grad=False, head_dim=8):
    return torch.randn(batch, 8 * WINDOWS, 3 * HEADS * head_dim, dtype=dtype, requires_grad=requires_grad)


SAMPLES = {
    "global": lambda: (make_qkv(), HEADS),
    "gradient": lambda: (make_qkv(requires_grad=True), HEADS, WINDOWS, 4),
    "split ties": lambda: (make_qkv(requires_grad=True), HEADS, WINDOWS, 2, 0.5, "split"),
    "odd head dimension": lambda: (make_qkv(requires_grad=True, head_dim=5), HEADS, WINDOWS),
    "bf16": lambda: (make_qkv(torch.bfloat16, requires_grad=True), HEADS, WINDOWS, 4),
    "empty": lambda: (make_qkv(batch=0, requires_grad=True), HEADS, WINDOWS, 4),
    "strided": lambda: (make_qkv(requires_grad=True).transpose(0, 1).contiguous().transpose(0, 1), HEADS, WINDOWS, 4),
    "bias and lse": lambda: (
        make_qkv(requires_grad=True),
        HEADS,
        WINDOWS,
        4,
        None,
        "first",
        torch.randn(48, requires_grad=True),
        True,
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("with_kernel", [False, True])
def test_opcheck_attention(sample, with_kernel):
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        torch.library.opcheck(NAMESPACE.mask_unit_attention.default, SAMPLES[sample]())


@pytest.mark.parametrize("save_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_attention_backward(save_lse, dtype):
    qkv = make_qkv(dtype)
    out, lse = NAMESPACE.mask_unit_attention(qkv, HEADS, WINDOWS, 4, save_lse=save_lse)
    saved = (out, lse) if save_lse else (None, None)
    args = (torch.randn_like(out), qkv, *saved, HEADS, WINDOWS, 4, None, "split", save_lse)
    torch.library.opcheck(NAMESPACE.mask_unit_attention_backward.default, args)


@pytest.mark.parametrize("ties", ["first", "split"])
def test_opcheck_q_pool(ties):
    x = torch.randn(2, 12, 5, requires_grad=True)
    torch.library.opcheck(NAMESPACE.q_pool.default, (x, 4, ties))
    torch.library.opcheck(NAMESPACE.q_pool_backward.default, (torch.randn(2, 3, 5), x.detach(), 4, ties))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_of_any_device_have_the_right_shapes(device):
    with FakeTensorMode():
        qkv = torch.empty(2, 24, 48, device=device, dtype=torch.bfloat16)
        out, lse = NAMESPACE.mask_unit_attention(qkv, HEADS, WINDOWS, 4, save_lse=True)
        grad, grad_bias = NAMESPACE.mask_unit_attention_backward(out, qkv, out, lse, HEADS, WINDOWS, 4, bias_grad=True)
        pooled = ops.q_pool(qkv, 4)
        assert ops.mask_unit_attention(qkv, HEADS, WINDOWS, 4).shape == out.shape
    shapes = [(t.shape, t.dtype, t.device.type) for t in (out, lse, grad, grad_bias, pooled)]
    assert shapes == [
        ((2, 6, 16), torch.bfloat16, device),
        ((2, WINDOWS, HEADS, 2), torch.float32, device),
        ((2, 24, 48), torch.bfloat16, device),
        ((48,), torch.float32, device),
        ((2, 6, 48), torch.bfloat16, device),
    ]


# ---- torch.compile and torch.export ----


def attend(qkv):
    return ops.mask_unit_attention(qkv, HEADS, WINDOWS, 4)


def pool(x):
    return ops.q_pool(x, 4)


def compiled_targets(function, dynamic, mark=False):
    """Run forward and backward compiled over four batch sizes; the targets of the last graph, how many graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 5, 7):
        x = make_qkv(batch=batch)
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
        x.requires_grad_()
        out, expected = compiled(x), function(x)
        assert torch.allclose(out, expected, atol=1e-6)
        grad_out = torch.randn_like(out)
        grads = [torch.autograd.grad(o, x, grad_out)[0] for o in (out, expected)]
        assert torch.allclose(*grads, atol=1e-6)
    nodes = [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    return nodes, counter.frame_count


OP_OF = {attend: NAMESPACE.mask_unit_attention.default, pool: NAMESPACE.q_pool.default}


@pytest.mark.parametrize("function", OP_OF)
@pytest.mark.parametrize("with_kernel", [False, True])
def test_compile_has_one_graph_and_at_most_two_for_all_batch_sizes(function, with_kernel):
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        nodes, graphs = compiled_targets(function, None)
        _, marked = compiled_targets(function, None, mark=True)
    assert graphs <= 2
    assert marked == 1
    assert (OP_OF[function] in nodes) == with_kernel, "the op where it has a kernel, plain operations where it has none"


def test_inductor_compiles_the_plain_way():
    torch._dynamo.reset()
    qkv = make_qkv(requires_grad=True)
    out = torch.compile(attend, fullgraph=True)(qkv)
    out.sum().backward()
    grad, qkv.grad = qkv.grad, None
    attend(qkv).sum().backward()
    assert torch.allclose(out, attend(qkv), atol=1e-6)
    assert torch.allclose(grad, qkv.grad, atol=1e-6)


def test_disabled_reaches_compiled_code_from_inside_and_from_outside():
    def inside(qkv):
        with ops.disabled():
            return attend(qkv)

    with oracle_kernels_on_cpu() as calls:
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        compiled(make_qkv())
        assert len(calls) == 1
        with ops.disabled():
            compiled(make_qkv())
            assert len(calls) == 1
        compiled(make_qkv())
        assert len(calls) == 2
        torch.compile(inside, backend="aot_eager", fullgraph=True)(make_qkv())
        assert len(calls) == 2
        attend(make_qkv())
        assert len(calls) == 3


@pytest.mark.parametrize("stride", [1, 4])
def test_autocast_holds_in_compiled_code(stride):
    with oracle_kernels_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(
            lambda t: ops.mask_unit_attention(t, HEADS, WINDOWS, stride), backend="aot_eager", fullgraph=True
        )
        qkv = make_qkv(requires_grad=True)
        out = compiled(qkv)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert qkv.grad.dtype == torch.float32


class Attention(torch.nn.Module):
    def forward(self, qkv):
        return attend(qkv)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("with_kernel", [False, True])
def test_export_with_a_dynamic_batch(strict, with_kernel):
    def run():
        dynamic = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(Attention(), (make_qkv(),), dynamic_shapes=dynamic, strict=strict)
        qkv = make_qkv(batch=5)
        assert torch.allclose(program.module()(qkv), attend(qkv), atol=1e-6)
        return [node.target for node in program.graph.nodes if node.op == "call_function"]

    if with_kernel:
        with oracle_kernels_on_cpu():
            assert NAMESPACE.mask_unit_attention.default in run()
    else:  # a program that runs where this package is not installed
        assert not [target for target in run() if "hiera_kernels" in str(target)]


# ---- bad arguments ----

BAD_ATTENTION = [
    ({"qkv": [1.0]}, TypeError, "qkv must be a tensor .* got list"),
    ({"qkv": torch.zeros(2, 24, 48, dtype=torch.int64)}, TypeError, "qkv must be one of .*float32.*got torch.int64"),
    ({"qkv": torch.zeros(2, 24, 48, dtype=torch.complex64)}, TypeError, "qkv must be one of .*got torch.complex64"),
    ({"qkv": torch.zeros(24, 48)}, ValueError, r"qkv must be \[B, N, 3\*C\], got shape \(24, 48\)"),
    ({"qkv": torch.zeros(2, 24, 50)}, ValueError, "last dimension of qkv .* multiple of 6 .* got 50"),
    ({"num_heads": 5}, ValueError, "multiple of 15 for num_heads=5, got 48"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ({"num_windows": 5}, ValueError, "num_windows=5 and q_stride=4 for 24 tokens"),
    ({"num_windows": -1}, ValueError, "num_windows must be at least 1, got -1"),
    ({"num_windows": (7, 7)}, TypeError, r"num_windows must be an int, got \(7, 7\)"),
    ({"q_stride": 3}, ValueError, "num_windows=3 and q_stride=3 for 24 tokens"),
    ({"q_stride": True}, TypeError, "q_stride must be an int, got True"),
    ({"scale": "0.1"}, TypeError, "scale must be a number or None, got '0.1'"),
    ({"ties": "last"}, ValueError, r"ties must be one of \('first', 'split'\), got 'last'"),
    ({"ties": None}, ValueError, "got None"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD_ATTENTION)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"qkv": make_qkv(), "num_heads": HEADS, "num_windows": WINDOWS, "q_stride": 4} | change
    with pytest.raises(error, match=words):
        ops.mask_unit_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 12, 5, dtype=torch.int32)}, TypeError, "x must be one of .*got torch.int32"),
        ({"x": torch.zeros(12, 5)}, ValueError, r"x must be \[B, N, C\]"),
        ({"stride": 5}, ValueError, r"stride=5 for shape \(2, 12, 5\)"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (2, 2)}, TypeError, r"stride must be an int, got \(2, 2\)"),
        ({"ties": "even"}, ValueError, "got 'even'"),
    ],
)
def test_bad_arguments_of_q_pool_are_named(change, error, words):
    with pytest.raises(error, match=words):
        ops.q_pool(**({"x": torch.randn(2, 12, 5), "stride": 4} | change))

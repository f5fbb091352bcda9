"""The contract of window_attention: opcheck, fake tensors, torch.compile, torch.export, argument errors.

Broken once, on purpose: a fake kernel that forgets the pooling; opcheck turns red.
"""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from hiera_kernels import ops
from tests.attention_kernels import oracle_kernels_on_cpu

OP = torch.ops.hiera_kernels.window_attention.default
OP_BACKWARD = torch.ops.hiera_kernels.window_attention_backward.default
HEADS, WINDOW, STRIDE = 2, (4, 6), (2, 2)


def make(dtype=torch.float32, batch=2, size=(6, 8), requires_grad=False):
    """qkv and pad."""
    qkv, pad = torch.randn(batch, *size, 48, dtype=dtype), torch.randn(48, dtype=dtype)
    return qkv.requires_grad_(requires_grad), pad.requires_grad_(requires_grad)


SAMPLES = {
    "no pad": lambda: (make(requires_grad=True)[0], HEADS, WINDOW, STRIDE),
    "pad": lambda: ((t := make(requires_grad=True))[0], HEADS, WINDOW, [], t[1]),
    "pooled": lambda: ((t := make(requires_grad=True))[0], HEADS, WINDOW, STRIDE, t[1], 0.3),
    "whole windows": lambda: ((t := make(size=(4, 6), requires_grad=True))[0], HEADS, WINDOW, STRIDE, t[1]),
    "global": lambda: (make()[0], HEADS, [], STRIDE),
    "bf16": lambda: ((t := make(torch.bfloat16, requires_grad=True))[0], HEADS, WINDOW, [], t[1]),
    "empty": lambda: ((t := make(batch=0, requires_grad=True))[0], HEADS, WINDOW, STRIDE, t[1]),
    "strided": lambda: ((t := make(requires_grad=True))[0].transpose(1, 2), HEADS, (6, 4), STRIDE, t[1]),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("with_kernel", [False, True])
def test_opcheck(sample, with_kernel):
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        torch.library.opcheck(OP, SAMPLES[sample]())


@pytest.mark.parametrize("with_pad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_backward(dtype, with_pad):
    qkv, pad = make(dtype)
    pad = pad if with_pad else None
    args = (torch.randn_like(OP(qkv, HEADS, WINDOW, STRIDE, pad)), qkv, pad, HEADS, WINDOW, STRIDE)
    torch.library.opcheck(OP_BACKWARD, args)


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode() as mode:
        qkv, pad = (mode.from_tensor(t) for t in make(torch.bfloat16, requires_grad=True))
        out = OP(qkv, HEADS, WINDOW, STRIDE, pad)
        assert (out.shape, out.dtype) == ((2, 3, 4, 16), torch.bfloat16)
        grad_qkv, grad_pad = OP_BACKWARD(out, qkv, pad, HEADS, WINDOW, STRIDE)
        assert (grad_qkv.shape, grad_qkv.dtype) == (qkv.shape, torch.bfloat16)
        assert (grad_pad.shape, grad_pad.dtype) == ((48,), torch.float32)
        assert OP_BACKWARD(out, qkv, None, HEADS, WINDOW, STRIDE)[1].shape == (0,)


def through_layers(qkv, pad):
    """As a block calls it: the pad row is made inside, and its gradient goes on."""
    return ops.window_attention(qkv * 2, HEADS, 4, 2, pad.sin())


@pytest.mark.parametrize("with_kernel", [False, True])
def test_compile_has_one_graph_for_all_sizes_of_the_map(with_kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_layers, backend=counter, fullgraph=True)
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        for batch, size in ((2, (6, 10)), (3, (10, 18))):
            qkv, pad = make(batch=batch, size=size)
            for axis in (0, 1, 2):
                torch._dynamo.mark_dynamic(qkv, axis)
            qkv.requires_grad_()
            pad.requires_grad_()
            out, expected = compiled(qkv, pad), through_layers(qkv, pad)
            assert torch.allclose(out, expected, atol=1e-5)
            grad_out = torch.randn_like(out)
            for got, want in zip(*(torch.autograd.grad(o, [qkv, pad], grad_out) for o in (out, expected)), strict=True):
                assert torch.allclose(got, want, atol=1e-5)
    targets = [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    assert (OP in targets) == with_kernel, "the op where it has a kernel, plain operations where it has none"
    assert counter.frame_count == 1


def test_the_compiled_op_serves_whole_and_overhanging_maps_alike():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda t, p: ops.window_attention(t, HEADS, 4, None, p), backend=counter, fullgraph=True)
    with oracle_kernels_on_cpu():
        for size in ((5, 7), (8, 12), (6, 8)):
            qkv, pad = make(size=size)
            for axis in (1, 2):
                torch._dynamo.mark_dynamic(qkv, axis)
            assert torch.equal(compiled(qkv, pad), ops.window_attention(qkv, HEADS, 4, None, pad))
    assert counter.frame_count == 1


def test_inductor_compiles_the_plain_way():
    torch._dynamo.reset()
    inputs = make(requires_grad=True)
    compiled = torch.compile(through_layers, fullgraph=True)
    runs = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, through_layers)]
    for got, want in zip(*runs, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


class Attention(torch.nn.Module):
    def forward(self, qkv, pad):
        return ops.window_attention(qkv, HEADS, WINDOW, STRIDE, pad)


@pytest.mark.parametrize("with_kernel", [False, True])
def test_export_with_a_dynamic_batch(with_kernel):
    with oracle_kernels_on_cpu() if with_kernel else contextlib.nullcontext():
        dynamic = ({0: torch.export.Dim("batch")}, None)
        program = torch.export.export(Attention(), make(), dynamic_shapes=dynamic)
        qkv, pad = make(batch=5)
        assert torch.allclose(program.module()(qkv, pad), Attention()(qkv, pad), atol=1e-6)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # Without a kernel, a program that runs where this package is not installed.
    assert any("hiera_kernels" in target for target in targets) == with_kernel


# ---- bad arguments ----

BAD = [
    ({"qkv": [1.0]}, TypeError, "qkv must be a tensor .* got list"),
    ({"qkv": torch.zeros(2, 6, 8, 48, dtype=torch.int64)}, TypeError, "qkv must be one of .*got torch.int64"),
    ({"qkv": torch.zeros(2, 48, 48)}, ValueError, r"qkv must be \[B, Hs, Ws, 3\*C\], got shape \(2, 48, 48\)"),
    ({"qkv": torch.zeros(2, 6, 8, 50)}, ValueError, "last dimension of qkv .* multiple of 6 .* got 50"),
    ({"qkv": torch.zeros(2, 0, 8, 48)}, ValueError, r"at least one token, got shape \(2, 0, 8, 48\)"),
    ({"num_heads": 5}, ValueError, "multiple of 15 for num_heads=5, got 48"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ({"window_size": "4"}, TypeError, "window_size must be an int, two ints or None, got '4'"),
    ({"window_size": (4, 4, 4)}, TypeError, r"window_size must be .* got \(4, 4, 4\)"),
    ({"window_size": 4.0}, TypeError, "window_size must be .* got 4.0"),
    ({"window_size": True}, TypeError, "window_size must be .* got True"),
    ({"window_size": -4}, ValueError, "window_size must be positive, or 0 for global attention, got -4"),
    ({"window_size": (4, 0)}, ValueError, r"window_size must be positive, .* got \(4, 0\)"),
    ({"q_stride": 0}, ValueError, "q_stride must be positive, got 0"),
    ({"q_stride": (2, 2, 1)}, TypeError, r"q_stride must be .* got \(2, 2, 1\)"),
    ({"q_stride": 4}, ValueError, r"q_stride=4 for a map of height 6 \(window_size=4, qkv of shape \(2, 6, 8, 48\)\)"),
    ({"window_size": 3, "q_stride": 2}, ValueError, "q_stride=2 for a window of height 3"),
    ({"window_size": (2, 3), "q_stride": 2}, ValueError, "q_stride=2 for a window of width 3"),
    ({"window_size": None, "q_stride": (1, 3)}, ValueError, r"q_stride=\(1, 3\) for a window of width 8"),
    ({"pad": [0.0] * 48}, TypeError, "pad must be a tensor .* got list"),
    ({"pad": torch.zeros(1, 48)}, ValueError, r"pad must be \[3\*C\], got shape \(1, 48\)"),
    ({"pad": torch.zeros(16)}, ValueError, r"pad must have the 48 columns of qkv, got shape \(16,\)"),
    ({"pad": torch.zeros(48, dtype=torch.float64)}, TypeError, "pad must be of the dtype of qkv, .*float32, .*float64"),
    ({"pad": torch.zeros(48, device="meta")}, ValueError, "pad must be on the device of qkv, cpu, got meta"),
    ({"scale": "0.1"}, TypeError, "scale must be a number or None, got '0.1'"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"qkv": make()[0], "num_heads": HEADS, "window_size": 4, "q_stride": 2} | change
    with pytest.raises(error, match=words):
        ops.window_attention(**arguments)

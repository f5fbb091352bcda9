"""Derivatives of every order and mode, transforms, tracing, compilation and export of the token-order functions."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.optests import fake_check

from hiera_kernels import ops, reference
from tests.token_oracle import windows_of

SIZE, STRIDES = (4, 6), ((2, 1), (1, 3))
FLAT = [2, 1, 1, 3]
N = 24
OPS = torch.ops.hiera_kernels


def keep_of(batch):
    return torch.stack([torch.randperm(4)[:2] for _ in range(batch)])


def embed_inputs(batch=2, channels=2, dtype=torch.float64, channels_last=False, grad=True):
    p = torch.randn(batch, *SIZE, channels, dtype=dtype).movedim(-1, 1)
    p = p if channels_last else p.contiguous()
    return p.detach().requires_grad_(grad), torch.randn(1, N, channels, dtype=dtype, requires_grad=grad)


def functions():
    x = torch.randn(2, N, 2, dtype=torch.float64, requires_grad=True)
    keep = keep_of(2)
    grad = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    backward = (SIZE, FLAT, keep, torch.float64, torch.float64)
    yield "unroll", lambda x: ops.unroll(x, SIZE, STRIDES), (x,)
    yield "reroll", lambda x: ops.reroll(x, SIZE, STRIDES), (x,)
    yield "reroll_masked", lambda x: ops.reroll_masked(x, STRIDES), (x,)
    yield "embed", lambda p, e: ops.embed_tokens(p, e, SIZE, STRIDES), embed_inputs()
    yield "embed kept", lambda p, e: ops.embed_tokens(p, e, SIZE, STRIDES, keep), embed_inputs(channels_last=True)
    yield "op unroll", lambda x: OPS.unroll(x, SIZE, FLAT), (x,)
    yield "op reroll", lambda x: OPS.reroll(x, SIZE, FLAT), (x,)
    yield "op reroll_masked", lambda x: OPS.reroll_masked(x, FLAT, 2), (x,)
    yield "op embed", lambda p, e: OPS.embed_tokens(p, e, SIZE, FLAT), embed_inputs(channels_last=True)
    yield "op embed kept", lambda p, e: OPS.embed_tokens(p, e, SIZE, FLAT, keep), embed_inputs()
    yield "op embed backward", lambda g: OPS.embed_tokens_backward(g, *backward, False, True, True), (grad,)
    yield "op embed backward one", lambda g: OPS.embed_tokens_backward(g, *backward, True, False, True)[1], (grad,)


NAMES = [name for name, *_ in functions()]
FUNCTIONS = {name: (function, inputs) for name, function, inputs in functions()}


@pytest.fixture(params=NAMES)
def case(request):
    return FUNCTIONS[request.param]


def test_derivatives_of_first_and_second_order_in_both_modes(case):
    """Against finite differences: a missing formula gives zeros in silence, which these would show."""
    function, inputs = case
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=False)
    # The functions are linear, so their second derivative is zero; make something of them that has one.
    curved = lambda *args: [out**3 for out in _listed(function(*args))]  # noqa: E731
    assert torch.autograd.gradgradcheck(curved, inputs, check_fwd_over_rev=True, check_batched_grad=False)


def _listed(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def test_third_derivative():
    x = torch.randn(1, N, 2, dtype=torch.float64, requires_grad=True)
    y = ops.unroll(x, SIZE, STRIDES).pow(4).sum()
    for factor in (4 * x**3, 12 * x**2, 24 * x):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.testing.assert_close(y, factor)


def test_tangents_are_not_dropped(case):
    function, inputs = case
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(inputs, tangents, strict=True)]
        got = [forward_ad.unpack_dual(out).tangent for out in _listed(function(*duals))]
    expected = _listed(function(*tangents))  # linear: the derivative is the function itself
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_functional_transforms(case):
    function, inputs = case
    inputs = tuple(x.detach() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, got = torch.func.jvp(function, inputs, tangents)
    for a, b in zip(_listed(got), _listed(function(*tangents)), strict=True):
        torch.testing.assert_close(a, b)
    scalar = lambda *args: sum((out**2).sum() for out in _listed(function(*args)))  # noqa: E731
    got = torch.func.grad(scalar, argnums=tuple(range(len(inputs))))(*inputs)
    live = [x.clone().requires_grad_() for x in inputs]
    for a, b in zip(got, torch.autograd.grad(scalar(*live), live), strict=True):
        torch.testing.assert_close(a, b)


def test_vmap(case):
    function, inputs = case
    stacks = [torch.stack([x.detach() * i for i in (1.0, -2.0, 3.0)], dim=1) for x in inputs]
    got = _listed(torch.vmap(function, in_dims=1)(*stacks))
    one_by_one = [_listed(function(*(s[:, i] for s in stacks))) for i in range(3)]
    for i, outs in enumerate(zip(*one_by_one, strict=True)):
        torch.testing.assert_close(got[i], torch.stack(outs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x = torch.randn(2, N, 3, dtype=dtype, requires_grad=True)
    p, e = embed_inputs(channels=3, dtype=dtype, channels_last=True)
    rest = (torch.bfloat16, torch.float32) if dtype is torch.bfloat16 else (torch.float32, torch.float32)
    grad = torch.randn(2, 12, 3, requires_grad=True)
    for op, args in (
        (OPS.unroll, (x, SIZE, FLAT)),
        (OPS.reroll, (x, SIZE, FLAT)),
        (OPS.unroll, (x, SIZE, [])),
        (OPS.unroll, (x.detach().mT.contiguous().mT.requires_grad_(), SIZE, FLAT)),
        (OPS.reroll_masked, (x, FLAT, 2)),
        (OPS.embed_tokens, (p, e, SIZE, FLAT)),
        (OPS.embed_tokens, (p, e, SIZE, FLAT, keep_of(2))),
        (OPS.embed_tokens_backward, (grad, SIZE, FLAT, keep_of(2), *rest, True, True, True)),
        (OPS.embed_tokens_backward, (grad, SIZE, FLAT, keep_of(2), *rest, False, False, True)),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_fake_tensors_have_the_strides_of_real_ones(channels_last, kept):
    p, e = embed_inputs(channels_last=channels_last, grad=False)
    keep = keep_of(2) if kept else None
    fake_check(lambda p, e: OPS.embed_tokens(p, e, SIZE, FLAT, keep), (p, e), {})
    real = OPS.embed_tokens_backward(
        torch.randn(2, 12 if kept else N, 2), SIZE, FLAT, keep, torch.float16, torch.float32, channels_last, True, True
    )
    with FakeTensorMode() as mode:
        fake = OPS.embed_tokens_backward(
            *(torch.empty(2, 12 if kept else N, 2), SIZE, FLAT, mode.from_tensor(keep) if kept else None),
            *(torch.float16, torch.float32, channels_last, True, True),
        )
    assert [(f.shape, f.stride(), f.dtype) for f in fake] == [(r.shape, r.stride(), r.dtype) for r in real]


def test_meta_tensors():
    x = torch.empty(2, N, 3, device="meta")
    assert ops.unroll(x, SIZE, STRIDES).shape == (2, N, 3)
    assert ops.reroll(x, SIZE, STRIDES).shape == (2, *SIZE, 3)
    p, e = torch.empty(2, 3, *SIZE, device="meta"), torch.empty(1, N, 3, device="meta")
    assert ops.embed_tokens(p, e, SIZE, STRIDES).shape == (2, N, 3)


class Tokens(torch.nn.Module):
    """Every function once, at a size that the input gives."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2, 2)

    def forward(self, images, keep=None):
        p = self.conv(images)
        size = p.shape[2:]
        n = size[0] * size[1]
        e = torch.linspace(0, 1, 4).expand(1, n, 4)
        x = ops.embed_tokens(p, e, size, STRIDES, keep)
        if keep is not None:
            return ops.reroll_masked(x * 2, STRIDES)
        return ops.unroll(ops.reroll(x * 2, size, STRIDES).flatten(1, 2), size, STRIDES)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic, kept):
    torch._dynamo.reset()
    model = Tokens()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height, width in ((8, 12), (16, 24), (24, 12)):
        images = torch.randn(2, 3, height, width)
        windows = windows_of((height // 2, width // 2), STRIDES)
        keep = torch.stack([torch.randperm(windows)[:3] for _ in range(2)]) if kept else None
        results = []
        for run in (model, compiled):
            out = run(images, keep)
            results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    if dynamic:
        assert torch._dynamo.utils.counters["frames"]["ok"] <= 2 * 2  # one graph for all sizes, not one for each
    torch._dynamo.reset()


def test_compile_with_inductor():
    torch._dynamo.reset()
    model = Tokens()
    images = torch.randn(2, 3, 8, 12)
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for run in (model, compiled):
        out = run(images)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    model = Tokens().eval()
    images = torch.randn(2, 3, 8, 12)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"images": {0: batch}} if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"hiera_kernels.embed_tokens.default", "hiera_kernels.reroll.default"} <= targets
    for count in (2, 5) if dynamic else (2,):
        images = torch.randn(count, 3, 8, 12)
        torch.testing.assert_close(program.module()(images), model(images))


def test_compile_where_there_is_no_compiled_kernel(monkeypatch):
    """Without the extension the graph holds plain operations, which Inductor fuses; the op would hide them from it."""
    torch._dynamo.reset()
    graphs = []
    monkeypatch.setattr(ops.token_order, "compiled_kernel_serves", lambda *_: False)

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(2, N, 3)
    out = torch.compile(lambda x: ops.unroll(x, SIZE, STRIDES), backend=keep_graph, fullgraph=True)(x)
    assert torch.equal(out, reference.unroll(x, SIZE, STRIDES))
    assert not [node for node in graphs[0].graph.nodes if "hiera_kernels" in str(node.target)]
    torch._dynamo.reset()


def test_flops_are_counted_as_none():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ops.unroll(torch.randn(2, N, 3), SIZE, STRIDES)
    assert counter.get_total_flops() == 0


def test_second_derivative_through_a_convolution():
    """A gradient penalty, as people write it: the gradient of a norm of a gradient."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 3, 3, 1, 1).double()
    e = torch.randn(1, N, 3, dtype=torch.float64, requires_grad=True)
    images, keep = torch.randn(2, 2, *SIZE, dtype=torch.float64, requires_grad=True), keep_of(2)
    results = []
    for embed in (ops.embed_tokens, reference.embed_tokens):
        out = embed(conv(images), e, SIZE, STRIDES, keep)
        (first,) = torch.autograd.grad(out.pow(3).sum(), images, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (*conv.parameters(), e)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert 0 < a.abs().sum() < math.inf

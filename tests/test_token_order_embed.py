"""`embed_tokens` and its gradients: bits where one sum is rounded once, float64 counting for sums over the batch."""

import itertools
import math

import numpy as np
import pytest
import torch

from hiera_kernels import ops, reference
from hiera_kernels.ops.switch import disabled
from tests.token_oracle import GRID_IDS, GRIDS, kept_rows, unrolled_place, windows_of

every_grid = pytest.mark.parametrize(("size", "strides"), GRIDS, ids=GRID_IDS)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(FLOATS, FLOATS)) + [
    (torch.complex64, torch.float32),
    (torch.int32, torch.int32),
    (torch.uint8, torch.float16),
]


def flat(strides):
    return [s for step in strides for s in step]


PATHS = {
    "public": ops.embed_tokens,
    "op": lambda p, e, size, strides, keep=None: torch.ops.hiera_kernels.embed_tokens(p, e, size, flat(strides), keep),
    "reference": reference.embed_tokens,
}


@pytest.fixture(params=PATHS)
def embed(request):
    return PATHS[request.param]


def choose_units(kind, batch, windows):
    if kind == "all":
        return None
    if kind == "none":
        return torch.empty(batch, 0, dtype=torch.int64)
    if kind == "twice":  # a unit more than once, and more of them than there are
        return torch.randint(0, windows, (batch, windows + 2))
    return torch.stack([torch.randperm(windows)[: max(1, windows // 2)] for _ in range(batch)])


def inputs(size, channels, batch=2, patches=torch.float32, position=torch.float32, channels_last=False):
    p = torch.randn(batch, *size, channels).mul(4).to(patches).movedim(-1, 1)
    e = torch.randn(1, math.prod(size), channels).mul(4).to(position)
    return (p if channels_last else p.contiguous()), e


def rows_of(size, strides, keep, batch):
    """The unrolled rows that each image shows, and the spatial position behind every unrolled row."""
    order = np.argsort(unrolled_place(size, strides))
    n = math.prod(size)
    return [list(range(n)) if keep is None else kept_rows(size, strides, keep[b].tolist()) for b in range(batch)], order


def counted(p, e, size, strides, keep):
    """What `embed_tokens` should give: PyTorch's own sum, one token at a time to its place."""
    rows, order = rows_of(size, strides, keep, p.shape[0])
    tokens = p.flatten(2).transpose(1, 2) + e
    count = math.prod(size) if keep is None else keep.shape[1] * math.prod(size) // windows_of(size, strides)
    out = tokens.new_empty(p.shape[0], count, p.shape[1])
    for b in range(p.shape[0]):
        for i, row in enumerate(rows[b]):
            out[b, i] = tokens[b, order[row]]
    return out


def counted_gradients(grad, size, strides, keep):
    """Gradients in float64: of the patches as [B, N, C], and of the position."""
    batch, _, channels = grad.shape
    rows, order = rows_of(size, strides, keep, batch)
    spatial = torch.zeros(batch, math.prod(size), channels, dtype=torch.float64)
    for b in range(batch):
        for i, row in enumerate(rows[b]):
            spatial[b, order[row]] += grad[b, i].double()
    return spatial, spatial.sum(0, keepdim=True)


@every_grid
@pytest.mark.parametrize("kind", ["all", "some", "twice", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_against_counting(embed, size, strides, kind, channels_last):
    keep = choose_units(kind, 2, windows_of(size, strides))
    p, e = inputs(size, 5, channels_last=channels_last)
    out = embed(p, e, size, strides, keep)
    assert out.is_contiguous()
    assert torch.equal(out, counted(p, e, size, strides, keep))


@pytest.mark.parametrize(("patches", "position"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["all", "some"])
def test_every_pair_of_dtypes_promotes_as_a_sum(patches, position, kind):
    size, strides = (6, 20), ((3, 2), (1, 5))
    keep = choose_units(kind, 2, 4)
    p, e = inputs(size, 7, patches=patches, position=position)
    out = ops.embed_tokens(p, e, size, strides, keep)
    assert out.dtype is (p.flatten(2).mT + e).dtype
    assert torch.equal(out, counted(p, e, size, strides, keep))


@pytest.mark.parametrize("patches", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(patches):
    # The convolution runs in bf16 there; the sum with an fp32 position is no operation that autocast touches.
    size, strides = (4, 6), ((2, 3),)
    p, e = inputs(size, 5, patches=patches)
    with torch.autocast("cpu", torch.bfloat16):
        stock = (p.flatten(2).transpose(1, 2) + e).dtype
        out = ops.embed_tokens(p, e, size, strides)
    assert out.dtype is stock is torch.float32
    assert torch.equal(out, counted(p, e, size, strides, None))


def test_special_values_go_where_a_sum_sends_them():
    size, strides = (2, 4), ((2, 2),)
    special = torch.tensor([math.inf, -math.inf, math.nan, 65504.0, -0.0, 1e-7, 3.0, 1.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        p = special.to(dtype).view(1, 1, 2, 4)
        e = special.roll(1).to(dtype).view(1, 8, 1)
        out, expected = ops.embed_tokens(p, e, size, strides), counted(p, e, size, strides, None)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.signbit(), expected.signbit()) or out.isnan().any()


def layouts():
    yield "contiguous", torch.randn(2, 5, 4, 6)
    yield "channels last", torch.randn(2, 4, 6, 5).permute(0, 3, 1, 2)
    yield "width before height", torch.randn(2, 5, 6, 4).transpose(2, 3)
    yield "a slice of more channels", torch.randn(2, 9, 4, 6)[:, 2:7]
    yield "channels last, sliced", torch.randn(2, 4, 6, 9).permute(0, 3, 1, 2)[:, 2:7]
    yield "expanded batch", torch.randn(1, 5, 4, 6).expand(2, 5, 4, 6)
    yield "every second pixel", torch.randn(2, 5, 4, 12)[..., ::2]
    yield "offset", torch.randn(2 * 5 * 24 + 1)[1:].view(2, 5, 4, 6)
    yield "one channel", torch.randn(2, 1, 4, 6)
    yield "empty batch", torch.randn(0, 5, 4, 6)
    yield "no channels", torch.randn(2, 0, 4, 6)


@pytest.mark.parametrize("layout", range(11), ids=[name for name, _ in layouts()])
@pytest.mark.parametrize("kind", ["all", "some"])
def test_every_layout_and_the_gradient_in_the_convolutions_own(layout, kind):
    size, strides = (4, 6), ((2, 1), (1, 3))
    _, p = next(itertools.islice(layouts(), layout, None))
    p = p.detach().requires_grad_()
    batch, channels = p.shape[:2]
    keep = choose_units(kind, batch, 4) if batch else (None if kind == "all" else torch.empty(0, 2, dtype=torch.int64))
    e = torch.randn(1, 24, 2 * channels)[..., ::2].detach().requires_grad_()
    out = ops.embed_tokens(p, e, size, strides, keep)
    assert torch.equal(out, counted(p, e, size, strides, keep))
    grad = torch.randn(out.shape[0], out.shape[2], out.shape[1]).transpose(1, 2)  # not contiguous either
    got = torch.autograd.grad(out, (p, e), grad)
    spatial, position = counted_gradients(grad, size, strides, keep)
    torch.testing.assert_close(got[0].flatten(2).transpose(1, 2).double(), spatial, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), position, rtol=1e-6, atol=1e-6)
    if p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last):
        assert got[0].stride() == torch.empty_like(p).stride()


@every_grid
@pytest.mark.parametrize("kind", ["all", "some", "twice", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_against_counting(embed, size, strides, kind, channels_last):
    keep = choose_units(kind, 3, windows_of(size, strides))
    p, e = (t.requires_grad_() for t in inputs(size, 3, 3, torch.float64, torch.float64, channels_last))
    out = embed(p, e, size, strides, keep)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (p, e), grad)
    spatial, position = counted_gradients(grad, size, strides, keep)
    torch.testing.assert_close(got[0].flatten(2).transpose(1, 2), spatial, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], position, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("patches", "position"), list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_in_every_dtype(patches, position, channels_last):
    """Each gradient has its input's dtype; the sum over 50 images is held in fp32, and rounded once."""
    size, strides = (4, 6), ((2, 1), (1, 3))
    p, e = (t.requires_grad_() for t in inputs(size, 5, 50, patches, position, channels_last))
    out = ops.embed_tokens(p, e, size, strides)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (p, e), grad)
    assert [g.dtype for g in got] == [patches, position]
    spatial, total = counted_gradients(grad, size, strides, None)
    assert torch.equal(got[0].flatten(2).transpose(1, 2), spatial.to(patches))  # moved, and rounded at most once
    step = max(torch.finfo(position).eps, torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps)
    if out.dtype is not torch.float64:
        torch.testing.assert_close(got[1].double(), total, rtol=step, atol=50 * 4 * torch.finfo(torch.float32).eps)


def test_only_the_gradient_that_is_asked_for():
    size, strides = (4, 6), ((2, 3),)
    p, e = inputs(size, 5)
    keep = choose_units("some", 2, 4)
    for asked in (p, e):
        asked.requires_grad_()
        out = ops.embed_tokens(p, e, size, strides, keep)
        out.sum().backward()
        expected = counted_gradients(torch.ones_like(out), size, strides, keep)[0 if asked is p else 1]
        got = asked.grad.flatten(2).transpose(1, 2) if asked is p else asked.grad
        torch.testing.assert_close(got.double(), expected)
        asked.requires_grad_(False)
        assert (e if asked is p else p).grad is None
        asked.grad = None


def test_the_sum_over_the_batch_does_not_depend_on_threads_or_repetition():
    size, strides = (16, 24), ((2, 2),) * 3
    p, e = (t.requires_grad_() for t in inputs(size, 33, 9))
    keep = choose_units("some", 9, 6)
    grad, seen = torch.randn(9, 3 * 64, 33), set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            got = torch.autograd.grad(ops.embed_tokens(p, e, size, strides, keep), (p, e), grad)
            seen.add(b"".join(g.numpy().tobytes() for g in got))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


def test_as_the_model_uses_it_with_and_without_the_compiled_kernels():
    """MAE: a convolution before, a mask after; the same parameters' gradients either way."""
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(3, 8, 7, 4, 3).double()
    e = torch.randn(1, 16 * 8, 8, dtype=torch.float64, requires_grad=True)
    images, keep = torch.randn(2, 3, 64, 32, dtype=torch.float64), torch.tensor([[1], [0]])
    results = []
    for off in (False, True):
        with disabled() if off else torch.enable_grad():
            out = ops.embed_tokens(conv(images), e, (16, 8), ((2, 2),) * 3, keep)
            results.append((out, *torch.autograd.grad(out.square().sum(), (*conv.parameters(), e))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

"""`unroll`, `reroll`, `reroll_masked`: bit for bit where counting says, whatever the input looks like in memory."""

import itertools
import math

import numpy as np
import pytest
import torch

from hiera_kernels import extension, ops, reference
from hiera_kernels.ops import token_order_library
from hiera_kernels.ops.switch import disabled
from tests.token_oracle import GRID_IDS, GRIDS, rerolled, unrolled, unrolled_place, windows_of
from tests.upstream import load_upstream

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]
every_grid = pytest.mark.parametrize(("size", "strides"), GRIDS, ids=GRID_IDS)

# Public function, op, and public function without the compiled kernels: three ways to the same bits.
PATHS = {
    "public": (ops.unroll, ops.reroll),
    "op": tuple(
        lambda x, size, strides, op=op: op(x, size, [s for step in strides for s in step])
        for op in (torch.ops.hiera_kernels.unroll, torch.ops.hiera_kernels.reroll)
    ),
    "reference": (reference.unroll, reference.reroll),
}


@pytest.fixture(params=PATHS)
def moves(request):
    return PATHS[request.param]


def random_bits(*shape, dtype):
    """Any bit pattern, NaNs with payloads included; booleans are 0 or 1."""
    generator = np.random.default_rng(7)
    high = 2 if dtype is torch.bool else 256
    raw = generator.integers(0, high, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


def bits(x):
    return x.contiguous().view(torch.uint8).numpy()


def test_the_extension_is_loaded():
    # Everything below would otherwise test the reference twice.
    assert extension.why_not("cpu") is None


@every_grid
@pytest.mark.parametrize("channels", [1, 3, 8, 33, 96])
def test_bits_against_counting(moves, size, strides, channels):
    unroll, reroll = moves
    x = random_bits(2, math.prod(size), channels, dtype=torch.float32)
    out = unroll(x, size, strides)
    assert out.shape == x.shape
    assert out.is_contiguous()
    np.testing.assert_array_equal(bits(out), unrolled(bits(x), size, strides))
    out = reroll(x, size, strides)
    assert out.shape == (2, *size, channels)
    assert out.is_contiguous()
    np.testing.assert_array_equal(bits(out), rerolled(bits(x), size, strides))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_every_dtype(moves, dtype, channels):
    size, strides = (6, 20), ((3, 2), (1, 5))
    x = random_bits(3, 120, channels, dtype=dtype)
    for move, expected in zip(moves, (unrolled, rerolled), strict=True):
        out = move(x, size, strides)
        assert out.dtype is dtype
        np.testing.assert_array_equal(bits(out), expected(bits(x), size, strides))


# Rows of so many bytes take another way through the CPU kernel each: small typed moves, memcpy, streaming stores of
# whole lines (384), of strips (224, 288), of lines with ragged ends (100, 202). Large enough for streaming stores.
@pytest.mark.parametrize("row_bytes", [1, 2, 4, 8, 12, 16, 32, 48, 64, 80, 100, 202, 224, 288, 384])
@pytest.mark.parametrize(
    ("size", "strides"),
    [
        ((56, 56), ((2, 2),) * 3),
        ((8, 24, 40), ((1, 2, 2),) * 3),
        ((4096,), ((2,), (64,))),
        ((64, 66), ((1, 2),)),
        ((70, 60), ((7, 5),)),
    ],
    ids=str,
)
def test_large_rows_of_every_width(size, strides, row_bytes):
    n = math.prod(size)
    batch = max(2, -(-(5 << 20) // (4 * n * row_bytes))) if row_bytes >= 64 else 2
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (batch, n, row_bytes), dtype=np.uint8))
    place = torch.from_numpy(unrolled_place(size, strides))
    out = ops.unroll(x, size, strides)
    assert torch.equal(out[:, place], x)
    assert torch.equal(ops.reroll(x, size, strides).flatten(1, -2), x[:, place])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads):
    size, strides = (40, 56), ((2, 2), (2, 2), (2, 2))
    x = random_bits(7, 40 * 56, 30, dtype=torch.float32)
    place = torch.from_numpy(unrolled_place(size, strides))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(bits(ops.unroll(x, size, strides))[:, place], bits(x))
        assert np.array_equal(bits(ops.reroll(x, size, strides).flatten(1, 2)), bits(x)[:, place])
    finally:
        torch.set_num_threads(before)


def layouts():
    base = torch.arange(3 * 48 * 10, dtype=torch.float32)
    yield "contiguous", base[: 3 * 48 * 5].view(3, 48, 5)
    yield "transposed", base[: 3 * 48 * 5].view(3, 5, 48).transpose(1, 2)
    yield "sliced channels", base.view(3, 48, 10)[..., 3:8]
    yield "every second token", torch.arange(3 * 96 * 5, dtype=torch.float32).view(3, 96, 5)[:, ::2]
    yield "expanded batch", base[: 48 * 5].view(1, 48, 5).expand(3, 48, 5)
    yield "expanded channels", base[: 3 * 48].view(3, 48, 1).expand(3, 48, 5)
    yield "offset by one element", base[1 : 1 + 3 * 48 * 5].view(3, 48, 5)
    yield "offset by one byte", torch.arange(4 * 3 * 48 * 5 + 1, dtype=torch.int32).to(torch.uint8)[1:].view(3, 48, 20)
    yield "negated", torch._neg_view(base[: 3 * 48 * 5].view(3, 48, 5))
    yield "conjugated", torch.randn(3, 48, 5, dtype=torch.complex64).conj()
    yield "empty batch", torch.empty(0, 48, 5)
    yield "no channels", torch.empty(3, 48, 0)


@pytest.mark.parametrize("layout", range(12), ids=[name for name, _ in layouts()])
def test_every_layout(moves, layout):
    size, strides = (6, 8), ((3, 1), (1, 4))
    _, x = next(itertools.islice(layouts(), layout, None))
    before = x.clone().numpy()
    for move, expected in zip(moves, (unrolled, rerolled), strict=True):
        out = move(x, size, strides)
        assert out.is_contiguous()
        np.testing.assert_array_equal(out.resolve_conj().resolve_neg().numpy(), expected(before, size, strides))
    np.testing.assert_array_equal(x.clone().numpy(), before)


@every_grid
def test_the_output_never_shares_memory_with_the_input(size, strides):
    # A schedule of ones changes nothing, and plain PyTorch then returns a view.
    x = torch.randn(2, math.prod(size), 3)
    flat = [s for step in strides for s in step]
    for op in (torch.ops.hiera_kernels.unroll, torch.ops.hiera_kernels.reroll):
        assert not torch._C._is_alias_of(op(x, size, flat), x)
    for default in (token_order_library._unroll_default, token_order_library._reroll_default):
        assert not torch._C._is_alias_of(default(x, size, flat), x)


@every_grid
@pytest.mark.parametrize("units", [0, 1, 3])
def test_reroll_masked_against_counting(size, strides, units):
    # A unit's own order does not depend on which units are there: count in a grid that is one unit.
    steps = strides or ((1,) * len(size),)
    unit_size = tuple(math.prod(per_step) for per_step in zip(*steps, strict=True))
    unit = math.prod(unit_size)
    place = unrolled_place(unit_size, steps)
    x = torch.randn(2, unit * units, 5)
    tokens = x.numpy().reshape(2, unit, units, 5)
    expected = np.empty((2, units, unit, 5), dtype=np.float32)
    for s, n in enumerate(place):
        expected[:, :, s] = tokens[:, n]
    flat = [s for step in steps for s in step]
    with disabled():
        without = ops.reroll_masked(x, steps)
    op = torch.ops.hiera_kernels.reroll_masked(x, flat, len(size))
    for out in (ops.reroll_masked(x, steps), op, without, reference.reroll_masked(x, steps)):
        np.testing.assert_array_equal(out.numpy(), expected.reshape(2, units, *unit_size, 5))
        assert out.is_contiguous()


@every_grid
def test_upstream_agrees(size, strides):
    """hiera-transformer's own modules: the patch stride is 1, so that its `size` is ours."""
    module = load_upstream().hiera_utils
    steps = list(strides)
    x = torch.randn(2, math.prod(size), 6)
    unroll = module.Unroll(size, (1,) * len(size), steps)
    reroll = module.Reroll(size, (1,) * len(size), steps, [len(steps)], 0)
    theirs = unroll(x) if steps else x
    assert torch.equal(ops.unroll(x, size, strides), theirs)
    assert torch.equal(ops.reroll(x, size, strides), reroll(x, 0))
    if steps:
        windows = windows_of(size, strides)
        kept = max(1, windows // 2)
        some = x.view(2, -1, windows, 6)[:, :, :kept].reshape(2, -1, 6)
        assert torch.equal(ops.reroll_masked(some, strides), reroll(some, 0, mask=torch.ones(2)))


def test_later_stages_undo_what_is_left():
    """After each pooling the first stride is used up; `reroll` with the rest lays the pooled tokens out again."""
    size, strides = (16, 8), ((2, 2), (2, 2), (2, 2))
    x = torch.arange(128.0).view(1, 128, 1)
    pooled = ops.unroll(x, size, strides).view(1, 4, 32, 1).amax(1)
    image = x.view(1, 1, 16, 8)
    expected = torch.nn.functional.max_pool2d(image, 2).view(1, 8, 4, 1)
    assert torch.equal(ops.reroll(pooled, (8, 4), strides[1:]), expected)


def test_windows_are_the_fastest_axis():
    size, strides = (4, 6), ((2, 3),)
    x = torch.arange(24.0).view(1, 24, 1)
    first = ops.unroll(x, size, strides).view(6, 4)[:, 0]  # [unit, W]: window 0 is the upper left corner
    assert first.tolist() == [0, 1, 2, 6, 7, 8]


def test_without_the_compiled_kernels_the_answer_is_the_same():
    x = torch.randn(2, 384, 7)
    size, strides = (16, 24), ((2, 2), (2, 2), (2, 2))
    compiled = ops.unroll(x, size, strides), ops.reroll(x, size, strides)
    with disabled():
        plain = ops.unroll(x, size, strides), ops.reroll(x, size, strides)
    for a, b in zip(compiled, plain, strict=True):
        assert torch.equal(a, b)

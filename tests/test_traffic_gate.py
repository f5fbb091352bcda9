"""The traffic gate counts what it says it counts: toy kernels whose sectors can be counted by hand."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.gates import traffic

pytestmark = pytest.mark.interpreted

BLOCK = 64


@triton.jit
def copy(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.jit
def copy_strided(p_x, p_y, run, stride, BLOCK: tl.constexpr):
    """Runs of `run` elements, `stride` apart, to contiguous."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o // run * stride + o % run))


@triton.jit
def copy_all(p_x, p_y, n, BLOCK: tl.constexpr):
    """Every program reads everything and writes its part."""
    i = tl.program_id(0)
    for i_block in range(n // BLOCK):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o)
        tl.store(p_y + o, b_x, mask=i_block % tl.num_programs(0) == i)


@triton.jit
def read_twice(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o) + tl.load(p_x + o))


@triton.jit
def copy_heads(p_x, p_y, H, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program takes HEADS heads of D columns of one row of H*D."""
    i_row = tl.program_id(0) // (H // HEADS)
    i_head = tl.program_id(0) % (H // HEADS) * HEADS
    o_d = tl.arange(0, BLOCK_D)
    for i in range(HEADS):
        o = (i_row * H + i_head + i) * D + o_d
        tl.store(p_y + o, tl.load(p_x + o, mask=o_d < D), mask=o_d < D)


@triton.jit
def copy_by_block_pointer(p_x, p_y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK
    x = tl.make_block_ptr(p_x, (n,), (1,), (i,), (BLOCK,), (0,))
    y = tl.make_block_ptr(p_y, (n,), (1,), (i,), (BLOCK,), (0,))
    tl.store(y, tl.load(x, boundary_check=(0,)), boundary_check=(0,))


@triton.jit
def copy_by_descriptor(p_x, p_y, n, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(p_x, (n,), (1,), (BLOCK,))
    y = tl.make_tensor_descriptor(p_y, (n,), (1,), (BLOCK,))
    y.store([tl.program_id(0) * BLOCK], x.load([tl.program_id(0) * BLOCK]))


@triton.jit
def add_atomically(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(p_y + o, tl.load(p_x + o))


def recorded(run, group=None):
    with traffic.record(group) as launches:
        run()
    return launches


def ratios(launch, compulsory):
    return launch.bytes("p_x", "read") / compulsory, launch.bytes("p_y", "write") / compulsory


@pytest.mark.parametrize("kernel", [copy, copy_by_block_pointer, copy_by_descriptor])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_contiguous_copy_moves_every_byte_once(kernel, dtype):
    x, y = torch.randn(5 * BLOCK).to(dtype), torch.empty(5 * BLOCK, dtype=dtype)
    (launch,) = recorded(lambda: kernel[(5,)](x, y, 5 * BLOCK, BLOCK=BLOCK))
    assert torch.equal(x, y)
    assert launch.kernel == kernel.__name__
    assert launch.programs == 5
    assert ratios(launch, x.nbytes) == (1.0, 1.0)
    assert launch.bytes("p_x", "write") == launch.bytes("p_y", "read") == 0
    assert traffic.moved([launch]) == 2 * x.nbytes


def test_masked_lanes_move_nothing():
    x, y = torch.randn(5 * BLOCK), torch.empty(5 * BLOCK)
    (launch,) = recorded(lambda: copy[(5,)](x, y, BLOCK + 1, BLOCK=BLOCK))
    # One block of 64 fp32 is eight sectors; one element more is one sector; three programs do nothing.
    assert launch.bytes("p_x", "read") == launch.bytes("p_y", "write") == 9 * 32
    assert launch.programs == 5


def test_half_sectors_cost_whole_ones():
    x, y = torch.randn(2 * BLOCK), torch.empty(BLOCK)
    # 16 bytes of every 32.
    (launch,) = recorded(lambda: copy_strided[(1,)](x, y, 4, 8, BLOCK=BLOCK))
    assert ratios(launch, y.nbytes) == (2.0, 1.0)


def test_bytes_that_two_programs_read_are_moved_twice():
    x, y = torch.randn(4 * BLOCK), torch.empty(4 * BLOCK)
    (launch,) = recorded(lambda: copy_all[(2,)](x, y, 4 * BLOCK, BLOCK=BLOCK))
    assert torch.equal(x, y)
    assert ratios(launch, x.nbytes) == (2.0, 1.0)
    assert launch.bytes("p_x", "read", of="distinct") == x.nbytes


def test_programs_of_one_group_share_what_they_read():
    x, y = torch.randn(4 * BLOCK), torch.empty(4 * BLOCK)
    (launch,) = recorded(lambda: copy_all[(4,)](x, y, 4 * BLOCK, BLOCK=BLOCK), group=lambda index: index[0] // 2)
    assert ratios(launch, x.nbytes) == (2.0, 1.0)


def test_a_program_that_comes_back_is_reported_apart():
    x, y = torch.randn(2 * BLOCK), torch.empty(2 * BLOCK)
    (launch,) = recorded(lambda: read_twice[(2,)](x, y, BLOCK=BLOCK))
    assert ratios(launch, x.nbytes) == (1.0, 1.0)
    assert launch.bytes("p_x", "read", of="requested") == 2 * x.nbytes


@pytest.mark.parametrize(
    ("d", "heads", "factor"),
    [(56, 1, 8 / 7), (56, 2, 1.0), (72, 1, 10 / 9), (72, 2, 1.0), (96, 1, 1.0), (64, 1, 1.0), (32, 1, 1.0)],
)
def test_heads_that_share_a_sector(d, heads, factor):
    """D = 56 in 16 bits is 3.5 sectors and touches 4: requested bytes alone would say 1.0."""
    x, y = torch.randn(3, 4 * d).half(), torch.empty(3, 4 * d).half()
    (launch,) = recorded(lambda: copy_heads[(3 * 4 // heads,)](x, y, 4, D=d, HEADS=heads, BLOCK_D=128))
    assert torch.equal(x, y)
    assert ratios(launch, x.nbytes) == pytest.approx((factor, factor), rel=1e-12)


def test_sectors_count_from_the_start_of_the_storage():
    """A view that begins in the middle of a sector touches one more than its bytes fill."""
    whole, y = torch.randn(BLOCK + 8), torch.empty(BLOCK)
    (launch,) = recorded(lambda: copy[(1,)](whole[4 : 4 + BLOCK], y, BLOCK, BLOCK=BLOCK))
    assert launch.bytes("p_x", "read") == y.nbytes + 32


def test_arguments_that_share_memory_share_a_line():
    x = torch.randn(2 * BLOCK)
    (launch,) = recorded(lambda: copy[(1,)](x[:BLOCK], x[BLOCK:], BLOCK, BLOCK=BLOCK))
    assert launch.bytes("p_x|p_y", "read") == launch.bytes("p_x|p_y", "write") == x.nbytes / 2


def test_every_launch_is_counted_by_itself():
    x, y = torch.randn(BLOCK), torch.empty(BLOCK)

    def run():
        copy[(1,)](x, y, BLOCK, BLOCK=BLOCK)
        copy[(1,)](x, y, 8, BLOCK=BLOCK)

    launches = recorded(run)
    assert [launch.bytes("p_x") for launch in launches] == [BLOCK * 4, 32]
    assert traffic.table(launches).count("\n") == 4
    with pytest.raises(ValueError, match="no argument 'p_z'"):
        launches[0].bytes("p_z")


def test_an_address_outside_every_argument_is_refused():
    x, y = torch.randn(BLOCK), torch.empty(BLOCK)
    with pytest.raises(InterpreterError, match="outside the memory of all arguments"):
        recorded(lambda: copy[(2,)](x, y, BLOCK + 1, BLOCK=BLOCK))


def test_an_atomic_is_refused():
    x, y = torch.randn(BLOCK), torch.zeros(BLOCK)
    with pytest.raises(InterpreterError, match="atomic"):
        recorded(lambda: add_atomically[(1,)](x, y, BLOCK=BLOCK))


def test_the_interpreter_is_left_as_it_was():
    x, y = torch.randn(BLOCK), torch.zeros(BLOCK)
    with pytest.raises(InterpreterError):
        recorded(lambda: add_atomically[(1,)](x, y, BLOCK=BLOCK))
    add_atomically[(1,)](x, y, BLOCK=BLOCK)
    assert torch.equal(x, y)

"""The parts that the attention kernels are put together from: where a unit lies, its tiles, and query pooling.

The words are those of attention.py: unit, PACK, D0 and D1. A tile is [rows, columns], or with PACK > 1
[PACK, rows, columns]; `rows` and `columns` make indices that broadcast to either.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def units(i_tile, num_units, num_windows, num_heads, PACK: tl.constexpr):
    """Image, window, head, number and existence of the units of a tile: scalars (PACK = 1) or [PACK, 1, 1]."""
    if PACK == 1:
        i_unit = i_tile
    else:
        i_unit = (i_tile * PACK + tl.arange(0, PACK))[:, None, None]
    i_head = i_unit % num_heads
    i_window = i_unit // num_heads
    i_image = (i_window // num_windows).to(tl.int64)
    return i_image, i_window % num_windows, i_head, i_unit, i_unit < num_units


@triton.jit
def token_step(num_windows, channels, WIDE: tl.constexpr):
    """Elements between two tokens of a window, for one row of C a token."""
    if WIDE:
        num_windows = num_windows.to(tl.int64)
    return num_windows * channels


@triton.jit
def rows(START, LENGTH: tl.constexpr, PACK: tl.constexpr):
    """Indices that run along the rows of a tile: [LENGTH, 1], or [1, LENGTH, 1] in a packed tile."""
    o_row = START + tl.arange(0, LENGTH)
    if PACK == 1:
        return o_row[:, None]
    else:
        return o_row[None, :, None]


@triton.jit
def columns(START, LENGTH: tl.constexpr, PACK: tl.constexpr):
    """Indices that run along the columns of a tile: [1, LENGTH], or [1, 1, LENGTH] in a packed tile."""
    o_column = START + tl.arange(0, LENGTH)
    if PACK == 1:
        return o_column[None, :]
    else:
        return o_column[None, None, :]


@triton.jit
def load_rows(p_unit, o_rows, m_rows, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr):
    """Columns START ... START + LENGTH of D; zero where a row or a column is padding."""
    o_d = columns(START, LENGTH, PACK)
    if START + LENGTH > D:
        m_rows = m_rows & (o_d < D)
    return tl.load(p_unit + (o_rows + o_d), mask=m_rows, other=0.0)


@triton.jit
def store_rows(
    p_unit, o_rows, m_rows, b_x, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr
):
    """The inverse of load_rows: padding is not written."""
    o_d = columns(START, LENGTH, PACK)
    if START + LENGTH > D:
        m_rows = m_rows & (o_d < D)
    tl.store(p_unit + (o_rows + o_d), b_x.to(p_unit.dtype.scalar.element_ty), mask=m_rows)


@triton.jit
def load_pooled(
    p_unit, o_rows, m_rows, stride, P: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Maximum over P tiles that are `stride` elements apart; NaN wins, as in torch.max."""
    b_max = load_rows(p_unit, o_rows, m_rows, START, LENGTH, D, PACK)
    for i_p in tl.static_range(1, P):
        b_x = load_rows(p_unit + i_p * stride, o_rows, m_rows, START, LENGTH, D, PACK)
        # Not tl.maximum, which answers in fp32 for two bf16. Once b_max is NaN, both comparisons with a number fail.
        b_max = tl.where((b_x > b_max) | (b_x != b_x), b_x, b_max)
    if P > 1:
        # Padding is zero already. A value that does not come from loads alone keeps Triton from moving the conversion
        # to tl.dot's register layout up through the maximum, where it would be made P times.
        b_max = tl.where(m_rows, b_max, 0.0)
    return b_max


@triton.jit
def load_pooled_ties(
    p_unit, o_rows, m_rows, stride, P: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """load_pooled, and beside the maximum a bit for each of the P tiles that attains it; of NaN, the first."""
    b_max = load_rows(p_unit, o_rows, m_rows, START, LENGTH, D, PACK)
    b_bits = tl.full(b_max.shape, 1, tl.int32)
    for i_p in tl.static_range(1, P):
        b_x = load_rows(p_unit + i_p * stride, o_rows, m_rows, START, LENGTH, D, PACK)
        b_larger = (b_x > b_max) | ((b_x != b_x) & (b_max == b_max))
        b_bits = tl.where(b_x == b_max, b_bits | (1 << i_p), b_bits)
        b_bits = tl.where(b_larger, 1 << i_p, b_bits)
        b_max = tl.where(b_larger, b_x, b_max)
    if P > 1:
        b_max = tl.where(m_rows, b_max, 0.0)  # as in load_pooled
    return b_max, b_bits


@triton.jit
def softmax_and_lse(b_x, scale, m_key, PADDED: tl.constexpr):
    """Rows of softmax(scale * x) and the logarithms of their denominators, fp32.

    A padded column is zero, unless its row is NaN.
    """
    b_x = b_x * scale
    if PADDED:
        b_x = tl.where(m_key, b_x, float("-inf"))
    b_max = tl.max(b_x, -1, keep_dims=True)
    b_p = tl.exp2((b_x - b_max) * LOG2_E)
    b_sum = tl.sum(b_p, -1, keep_dims=True)
    return b_p / b_sum, b_max + tl.log2(b_sum) * LN_2


@triton.jit
def store_sum(
    p_unit, b_x, m_rows, m_unit, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr
):
    """The sum of the rows of a tile, in fp32; padding is not summed."""
    b_sum = tl.sum(tl.where(m_rows, b_x, 0.0), -2, keep_dims=True)
    store_rows(p_unit, rows(0, 1, PACK), m_unit & (rows(0, 1, PACK) == 0), b_sum, START, LENGTH, D, PACK)


@triton.jit
def shares(b_bits, o_p, P: tl.constexpr, SPLIT: tl.constexpr):
    """With how many of P tokens, itself included, the o_p-th shares the gradient of their maximum; 0: it has none."""
    if SPLIT:
        b_ties = tl.zeros(b_bits.shape, tl.int32)
        for i_p in tl.static_range(P):
            b_ties += (b_bits >> i_p) & 1
        b_ties *= (b_bits >> o_p) & 1
    else:
        b_ties = ((b_bits & -b_bits) >> o_p) & 1
    return b_ties.to(tl.float32)


@triton.jit
def store_unpooled(
    p_unit, o_rows, m_rows, stride, b_grad, b_ties, o_p, P: tl.constexpr, COPIES: tl.constexpr, SPLIT: tl.constexpr,
    START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The gradient of the maximum to each of the P tokens, those of COPIES rows of a tile at once.

    b_ties holds bits, or shares already if SPLIT and COPIES > 1.
    """
    for i_p in tl.static_range(0, P, COPIES):
        b_part = b_grad
        if P > 1:
            if SPLIT and COPIES > 1:
                b_share = b_ties.to(tl.float32)
            else:
                b_share = shares(b_ties, o_p + i_p, P, SPLIT)
            if SPLIT:
                # As amax has it, (grad * mask) / count: a NaN, which a NaN in q always brings, reaches all P tokens.
                b_part = tl.where(b_share == 0.0, b_grad * 0.0, b_grad / b_share)
            else:
                b_part = tl.where(b_share == 0.0, 0.0, b_grad)
        store_rows(p_unit + i_p * stride, o_rows, m_rows, b_part, START, LENGTH, D, PACK)

"""Where the tokens of a window of a spatial map lie, and how a window is read, completed, pooled and written in place.

The map [B, Hs, Ws, 3*C] is cut into windows of WINDOW_H x WINDOW_W, counted from the top left. Key j of a window is
the token of line ``j // WINDOW_W`` and column ``j % WINDOW_W``; its queries are pooled over POOL_H x POOL_W tokens, and
query s starts at line ``s // QUERY_W * POOL_H``. A window at the bottom or at the right may overhang the map
(OVERHANG): the tokens that it lacks are the pad row (PAD_ROW) or zeros, exist nowhere in memory, and have keys and
values but no query.

The other words are those of attention.py and tile_access.py.
"""

import triton
import triton.language as tl

from hiera_kernels.kernels.tile_access import load_rows, rows, store_rows


@triton.jit
def window_place(i_window, map_w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Line and column of the first token of a window."""
    across = (map_w + (WINDOW_W - 1)) // WINDOW_W
    return i_window // across * WINDOW_H, i_window % across * WINDOW_W


@triton.jit
def token_offsets(o_y, o_x, line, channels):
    """Elements from a window's first token to others, for one row of C a token; `line` is that of a line of the map."""
    return o_y * line + o_x * channels


@triton.jit
def on_map(i_top, i_left, o_y, o_x, map_h, map_w):
    """Whether tokens of a window that starts at (i_top, i_left) exist."""
    return (i_top + o_y < map_h) & (i_left + o_x < map_w)


@triton.jit
def load_keys(
    p_unit, p_pad, o_rows, m_rows, m_pad, m_unit, PAD_ROW: tl.constexpr,
    START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """load_rows of keys or values, completed with the pad row where m_pad says so."""
    b_x = load_rows(p_unit, o_rows, m_rows, START, LENGTH, D, PACK)
    if PAD_ROW:
        o_one = rows(0, 1, PACK)
        b_row = load_rows(p_pad, o_one, m_unit & (o_one == 0), START, LENGTH, D, PACK)
        b_x = tl.where(m_pad, b_row, b_x)
    return b_x


@triton.jit
def load_queries(
    p_unit, o_rows, m_rows, line, channels, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
    START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Maximum over POOL_H x POOL_W tokens, `line` and `channels` elements apart; NaN wins, as in torch.max."""
    b_max = load_rows(p_unit, o_rows, m_rows, START, LENGTH, D, PACK)
    for i_p in tl.static_range(1, POOL_H * POOL_W):
        o_p = (i_p // POOL_W) * line + (i_p % POOL_W) * channels
        b_x = load_rows(p_unit + o_p, o_rows, m_rows, START, LENGTH, D, PACK)
        b_max = tl.where((b_x > b_max) | (b_x != b_x), b_x, b_max)
    if POOL_H * POOL_W > 1:
        b_max = tl.where(m_rows, b_max, 0.0)  # as in tile_access.load_pooled
    return b_max


@triton.jit
def load_queries_first(
    p_unit, o_rows, m_rows, line, channels, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
    START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """load_queries, and beside the maximum which token attains it first, in row-major order; of NaN, the first."""
    b_max = load_rows(p_unit, o_rows, m_rows, START, LENGTH, D, PACK)
    b_first = tl.zeros(b_max.shape, tl.int32)
    for i_p in tl.static_range(1, POOL_H * POOL_W):
        o_p = (i_p // POOL_W) * line + (i_p % POOL_W) * channels
        b_x = load_rows(p_unit + o_p, o_rows, m_rows, START, LENGTH, D, PACK)
        b_larger = (b_x > b_max) | ((b_x != b_x) & (b_max == b_max))
        b_first = tl.where(b_larger, i_p, b_first)
        b_max = tl.where(b_larger, b_x, b_max)
    if POOL_H * POOL_W > 1:
        b_max = tl.where(m_rows, b_max, 0.0)
    return b_max, b_first


@triton.jit
def store_unpooled_first(
    p_unit, o_rows, m_rows, line, channels, b_grad, b_first, o_p, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
    COPIES: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The gradient of the maximum to the first token that attains it; COPIES rows of a tile are written at once."""
    for i_p in tl.static_range(0, POOL_H * POOL_W, COPIES):
        b_part = b_grad
        if POOL_H * POOL_W > 1:
            b_part = tl.where(b_first == o_p + i_p, b_grad, 0.0)
        p_token = p_unit + ((i_p // POOL_W) * line + (i_p % POOL_W) * channels)
        store_rows(p_token, o_rows, m_rows, b_part, START, LENGTH, D, PACK)


@triton.jit
def pad_slot(i_top, i_left, map_h, map_w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Which of the overhanging windows of an image this is, and how many there are; meaningless for a whole window.

    First those at the right end of whole lines of windows, from the top; then the overhanging line, from the left.
    """
    over_h = (map_h % WINDOW_H != 0).to(tl.int32)
    over_w = (map_w % WINDOW_W != 0).to(tl.int32)
    at_right = map_h // WINDOW_H * over_w
    across = map_w // WINDOW_W + over_w
    i_slot = tl.where(i_top + WINDOW_H > map_h, at_right + i_left // WINDOW_W, i_top // WINDOW_H)
    return i_slot, at_right + over_h * across


@triton.jit
def overhangs(i_top, i_left, map_h, map_w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Whether a window is not wholly on the map."""
    return (i_top + WINDOW_H > map_h) | (i_left + WINDOW_W > map_w)

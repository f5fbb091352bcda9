"""Attention in windows of a spatial map, backward, for windows of more keys than one program can hold: two kernels.

attention_backward_long.py with another address map (window_access.py): the first kernel has whole rows of queries and
leaves two numbers a row, the second has a block of keys and goes through the queries. The second also sums, for each
block of keys of an overhanging window, the gradients of its padded keys and values.
"""

import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, Tiles
from hiera_kernels.kernels.tile_access import (
    LOG2_E,
    columns,
    load_rows,
    rows,
    softmax_and_lse,
    store_rows,
    store_sum,
    token_step,
    units,
)
from hiera_kernels.kernels.window_access import (
    load_keys,
    load_queries,
    load_queries_first,
    on_map,
    overhangs,
    pad_slot,
    store_unpooled_first,
    token_offsets,
    window_place,
)
from hiera_kernels.kernels.windows import queries_and_stride, window_tiles


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads", "map_h", "map_w"])
def _backward_q_kernel(
    p_grad, p_qkv, p_pad, p_grad_qkv, p_stats, num_units, num_windows, num_heads, map_h, map_w, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, D: tl.constexpr,
    OVERHANG: tl.constexpr, PAD_ROW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = WINDOW_H * WINDOW_W
    S: tl.constexpr = K // (POOL_H * POOL_W)
    QUERY_W: tl.constexpr = WINDOW_W // POOL_W
    BLOCKS: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    dtype = p_qkv.dtype.element_ty
    channels = num_heads * D
    token = 3 * channels
    line = 3 * token_step(map_w, channels, WIDE)
    i_block = tl.program_id(0) % BLOCKS
    i_image, i_window, i_head, i_unit, m_unit = units(tl.program_id(0) // BLOCKS, num_units, num_windows, num_heads, 1)
    i_top, i_left = window_place(i_window, map_w, WINDOW_H, WINDOW_W)
    o_unit = ((i_image * map_h + i_top) * map_w + i_left) * token + i_head * D
    p_q = p_qkv + o_unit
    p_do = p_grad + (
        ((i_image * (map_h // POOL_H) + i_top // POOL_H) * (map_w // POOL_W) + i_left // POOL_W) * channels + i_head * D
    )
    p_row = p_pad + i_head * D
    o_s = rows(i_block * BLOCK_S, BLOCK_S, 1)
    o_sy = o_s // QUERY_W
    o_sx = o_s % QUERY_W
    o_q = token_offsets(o_sy * POOL_H, o_sx * POOL_W, line, token)
    o_do = token_offsets(o_sy, o_sx, token_step(map_w // POOL_W, channels, WIDE), channels)
    o_k = rows(0, BLOCK_K, 1)
    o_ky = o_k // WINDOW_W
    o_kx = o_k % WINDOW_W
    o_key = token_offsets(o_ky, o_kx, line, token)
    m_s = o_s < S
    m_k = o_k < K
    m_pad = m_k
    if OVERHANG:
        m_s = m_s & on_map(i_top, i_left, o_sy * POOL_H, o_sx * POOL_W, map_h, map_w)
        m_map = on_map(i_top, i_left, o_ky, o_kx, map_h, map_w)
        m_pad = m_k & (m_map == 0)
        m_k = m_k & m_map
    # [1, K]
    m_key = columns(0, BLOCK_K, 1) < K

    # [S, D0], [K, D0], [S, D0], [K, D0]
    b_q0 = load_queries(p_q, o_q, m_s, line, token, POOL_H, POOL_W, 0, D0, D, 1)
    b_k0 = load_keys(p_q + channels, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, 1)
    b_do0 = load_rows(p_do, o_do, m_s, 0, D0, D, 1)
    b_v0 = load_keys(p_q + 2 * channels, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, 1)
    if D1 > 0:
        # [S, D1], [K, D1], [S, D1], [K, D1]
        b_q1 = load_queries(p_q, o_q, m_s, line, token, POOL_H, POOL_W, D0, D1, D, 1)
        b_k1 = load_keys(p_q + channels, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, 1)
        b_do1 = load_rows(p_do, o_do, m_s, D0, D1, D, 1)
        b_v1 = load_keys(p_q + 2 * channels, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, 1)

    # [S, K]
    b_x = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
    if D1 > 0:
        b_x = tl.dot(b_q1, tl.trans(b_k1), b_x, input_precision=PRECISION)
    b_p, b_lse = softmax_and_lse(b_x, scale, m_key, BLOCK_K > K)
    # [S, K]
    b_dp = tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION)
    if D1 > 0:
        b_dp = tl.dot(b_do1, tl.trans(b_v1), b_dp, input_precision=PRECISION)
    # [S, 1]
    b_delta = tl.sum(b_p * b_dp, -1, keep_dims=True)
    p_stat = p_stats + i_unit.to(tl.int64) * (2 * S)
    tl.store(p_stat + o_s, b_lse, mask=m_s)
    tl.store(p_stat + S + o_s, b_delta, mask=m_s)
    # [S, K]
    b_ds = b_p * (b_dp - b_delta)
    b_ds = b_ds.to(dtype)

    p_dq = p_grad_qkv + o_unit
    # [S, D0]
    b_dq0 = tl.dot(b_ds, b_k0, input_precision=PRECISION) * scale
    # q again, from L2: which token is the maximum would fill the registers all along.
    _, b_first0 = load_queries_first(p_q, o_q, m_s, line, token, POOL_H, POOL_W, 0, D0, D, 1)
    store_unpooled_first(p_dq, o_q, m_s, line, token, b_dq0, b_first0, 0, POOL_H, POOL_W, 1, 0, D0, D, 1)
    if D1 > 0:
        # [S, D1]
        b_dq1 = tl.dot(b_ds, b_k1, input_precision=PRECISION) * scale
        _, b_first1 = load_queries_first(p_q, o_q, m_s, line, token, POOL_H, POOL_W, D0, D1, D, 1)
        store_unpooled_first(p_dq, o_q, m_s, line, token, b_dq1, b_first1, 0, POOL_H, POOL_W, 1, D0, D1, D, 1)


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads", "map_h", "map_w", "num_queries"])
def _backward_kv_kernel(
    p_grad, p_qkv, p_pad, p_grad_qkv, p_stats, p_grad_pad,
    num_units, num_windows, num_heads, map_h, map_w, scale, num_queries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, D: tl.constexpr,
    OVERHANG: tl.constexpr, PAD_ROW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = WINDOW_H * WINDOW_W
    S: tl.constexpr = K // (POOL_H * POOL_W)
    QUERY_W: tl.constexpr = WINDOW_W // POOL_W
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    dtype = p_qkv.dtype.element_ty
    channels = num_heads * D
    token = 3 * channels
    line = 3 * token_step(map_w, channels, WIDE)
    out_line = token_step(map_w // POOL_W, channels, WIDE)
    i_block = tl.program_id(0) % BLOCKS
    i_image, i_window, i_head, i_unit, m_unit = units(tl.program_id(0) // BLOCKS, num_units, num_windows, num_heads, 1)
    i_top, i_left = window_place(i_window, map_w, WINDOW_H, WINDOW_W)
    o_unit = ((i_image * map_h + i_top) * map_w + i_left) * token + i_head * D
    p_q = p_qkv + o_unit
    p_do = p_grad + (
        ((i_image * (map_h // POOL_H) + i_top // POOL_H) * (map_w // POOL_W) + i_left // POOL_W) * channels + i_head * D
    )
    p_row = p_pad + i_head * D
    p_stat = p_stats + i_unit.to(tl.int64) * (2 * S)
    o_k = rows(i_block * BLOCK_K, BLOCK_K, 1)
    m_k = o_k < K
    m_pad = m_k
    if OVERHANG:
        m_map = on_map(i_top, i_left, o_k // WINDOW_W, o_k % WINDOW_W, map_h, map_w)
        m_pad = m_k & (m_map == 0)
        m_k = m_k & m_map
    o_key = token_offsets(o_k // WINDOW_W, o_k % WINDOW_W, line, token)

    # [K, D0], [K, D0]
    b_k0 = load_keys(p_q + channels, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, 1)
    b_v0 = load_keys(p_q + 2 * channels, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, 1)
    b_dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    b_dv0 = tl.zeros([BLOCK_K, D0], tl.float32)
    if D1 > 0:
        # [K, D1], [K, D1]
        b_k1 = load_keys(p_q + channels, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, 1)
        b_v1 = load_keys(p_q + 2 * channels, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, 1)
        b_dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
        b_dv1 = tl.zeros([BLOCK_K, D1], tl.float32)
    # Up to S, which the compiler does not know here: it would unroll the loop and run out of registers.
    for i_s in range(0, num_queries, BLOCK_S):
        o_s = rows(i_s, BLOCK_S, 1)
        o_sy = o_s // QUERY_W
        o_sx = o_s % QUERY_W
        o_q = token_offsets(o_sy * POOL_H, o_sx * POOL_W, line, token)
        o_do = token_offsets(o_sy, o_sx, out_line, channels)
        m_s = o_s < S
        if OVERHANG:
            m_s = m_s & on_map(i_top, i_left, o_sy * POOL_H, o_sx * POOL_W, map_h, map_w)
        # [S, D0], [S, D0]
        b_q0 = load_queries(p_q, o_q, m_s, line, token, POOL_H, POOL_W, 0, D0, D, 1)
        b_do0 = load_rows(p_do, o_do, m_s, 0, D0, D, 1)
        # [S, K]
        b_x = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        b_dp = tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION)
        if D1 > 0:
            b_q1 = load_queries(p_q, o_q, m_s, line, token, POOL_H, POOL_W, D0, D1, D, 1)
            b_do1 = load_rows(p_do, o_do, m_s, D0, D1, D, 1)
            b_x = tl.dot(b_q1, tl.trans(b_k1), b_x, input_precision=PRECISION)
            b_dp = tl.dot(b_do1, tl.trans(b_v1), b_dp, input_precision=PRECISION)
        # [S, 1]
        b_lse = tl.load(p_stat + o_s, mask=m_s, other=0.0)
        b_delta = tl.load(p_stat + S + o_s, mask=m_s, other=0.0)
        # [S, K]. Rows beyond S, or off the map, take part in the products over queries: zero, whatever stands there.
        b_p = tl.exp2((b_x * scale - b_lse) * LOG2_E)
        b_ds = b_p * (b_dp - b_delta)
        if OVERHANG or S % BLOCK_S != 0:
            b_p = tl.where(m_s, b_p, 0.0)
            b_ds = tl.where(m_s, b_ds, 0.0)
        # [K, S]
        b_pt = tl.trans(b_p.to(dtype))
        b_dst = tl.trans(b_ds.to(dtype))
        # [K, D0], [K, D0]
        b_dv0 = tl.dot(b_pt, b_do0, b_dv0, input_precision=PRECISION)
        b_dk0 = tl.dot(b_dst, b_q0, b_dk0, input_precision=PRECISION)
        if D1 > 0:
            b_dv1 = tl.dot(b_pt, b_do1, b_dv1, input_precision=PRECISION)
            b_dk1 = tl.dot(b_dst, b_q1, b_dk1, input_precision=PRECISION)

    p_dk = p_grad_qkv + o_unit + channels
    p_dv = p_dk + channels
    b_dk0 *= scale
    store_rows(p_dk, o_key, m_k, b_dk0, 0, D0, D, 1)
    store_rows(p_dv, o_key, m_k, b_dv0, 0, D0, D, 1)
    if D1 > 0:
        b_dk1 *= scale
        store_rows(p_dk, o_key, m_k, b_dk1, D0, D1, D, 1)
        store_rows(p_dv, o_key, m_k, b_dv1, D0, D1, D, 1)
    if PAD_ROW:
        # Sums over the padded tokens of this block: a row of [2, H, D] for each block of each overhanging window.
        i_slot, slots = pad_slot(i_top, i_left, map_h, map_w, WINDOW_H, WINDOW_W)
        m_sum = m_unit & overhangs(i_top, i_left, map_h, map_w, WINDOW_H, WINDOW_W)
        p_sum = p_grad_pad + (((i_image * slots + i_slot) * BLOCKS + i_block) * (2 * channels) + i_head * D)
        store_sum(p_sum, b_dk0, m_pad, m_sum, 0, D0, D, 1)
        store_sum(p_sum + channels, b_dv0, m_pad, m_sum, 0, D0, D, 1)
        if D1 > 0:
            store_sum(p_sum, b_dk1, m_pad, m_sum, D0, D1, D, 1)
            store_sum(p_sum + channels, b_dv1, m_pad, m_sum, D0, D1, D, 1)


# ---- launch ----


def plan_long(tensors, arguments, constexprs, itemsize, capability) -> list[Launch]:
    """The two launches, from what `plan_backward` prepares."""
    S, P = queries_and_stride(constexprs)
    partial = tensors.pop("p_grad_pad")
    tensors["p_stats"] = tensors["p_grad"].new_empty(arguments["num_units"] * 2 * S, dtype=partial.dtype)
    tile = window_tiles("backward_q", S, P, constexprs["D"], itemsize, capability)
    grid = arguments["num_units"] * triton.cdiv(S, tile.block_s)
    launches = [_launch(_backward_q_kernel, grid, tensors | arguments, constexprs, tile)]
    tile = window_tiles("backward_kv", S, P, constexprs["D"], itemsize, capability)
    grid = arguments["num_units"] * key_blocks(S, P, constexprs["D"], itemsize, capability)
    arguments = tensors | {"p_grad_pad": partial} | arguments | {"num_queries": S}
    return [*launches, _launch(_backward_kv_kernel, grid, arguments, constexprs, tile)]


def _launch(kernel, grid: int, arguments: dict, constexprs: dict, tile: Tiles) -> Launch:
    own = constexprs | {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1}
    return Launch(kernel, grid, arguments, own, tile.num_warps, tile.num_stages)


def key_blocks(S: int, P: int, D: int, itemsize: int, capability: tuple[int, int]) -> int:
    """Blocks of keys that a window has, each with sums over padded tokens of its own."""
    return triton.cdiv(P * S, window_tiles("backward_kv", S, P, D, itemsize, capability).block_k)

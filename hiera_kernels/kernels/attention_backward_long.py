"""Mask-unit attention, backward, for windows of more keys than one program can hold: two kernels.

The first has whole rows of queries, finds their softmax, writes the gradient of q and two numbers a row: the logarithm
of the softmax's denominator and the row's sum of P * dP. The second has a block of keys, goes through the queries, and
recomputes any tile of P and dP from those two numbers; it writes the gradients of k and v. Each output has one writer,
which sums in a fixed order: no atomics, the same bits every time. What programs re-read of k, v, q and dO, L2 holds.
"""

import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, tiles
from hiera_kernels.kernels.tile_access import (
    LOG2_E,
    columns,
    load_pooled,
    load_pooled_ties,
    load_rows,
    rows,
    softmax_and_lse,
    store_rows,
    store_sum,
    store_unpooled,
    token_step,
    units,
)


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads"])
def _backward_q_kernel(
    p_grad, p_qkv, p_grad_qkv, p_stats, p_bias, num_units, num_windows, num_heads, scale,
    P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = P * S
    BLOCKS: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    dtype = p_qkv.dtype.element_ty
    channels = num_heads * D
    step = token_step(num_windows, channels, WIDE)
    i_block = tl.program_id(0) % BLOCKS
    i_image, i_window, i_head, i_unit, m_unit = units(tl.program_id(0) // BLOCKS, num_units, num_windows, num_heads, 1)
    o_unit = (i_image * num_windows * K + i_window) * (3 * channels) + i_head * D
    p_q = p_qkv + o_unit
    p_do = p_grad + ((i_image * num_windows * S + i_window) * channels + i_head * D)
    o_s = rows(i_block * BLOCK_S, BLOCK_S, 1)
    o_k = rows(0, BLOCK_K, 1)
    m_s = o_s < S
    m_k = o_k < K
    # [1, K]
    m_key = columns(0, BLOCK_K, 1) < K

    # [S, D0], [K, D0], [S, D0], [K, D0]
    b_q0 = load_pooled(p_q, o_s * (3 * step), m_s, S * (3 * step), P, 0, D0, D, 1)
    b_k0 = load_rows(p_q + channels, o_k * (3 * step), m_k, 0, D0, D, 1)
    b_do0 = load_rows(p_do, o_s * step, m_s, 0, D0, D, 1)
    b_v0 = load_rows(p_q + 2 * channels, o_k * (3 * step), m_k, 0, D0, D, 1)
    if D1 > 0:
        # [S, D1], [K, D1], [S, D1], [K, D1]
        b_q1 = load_pooled(p_q, o_s * (3 * step), m_s, S * (3 * step), P, D0, D1, D, 1)
        b_k1 = load_rows(p_q + channels, o_k * (3 * step), m_k, D0, D1, D, 1)
        b_do1 = load_rows(p_do, o_s * step, m_s, D0, D1, D, 1)
        b_v1 = load_rows(p_q + 2 * channels, o_k * (3 * step), m_k, D0, D1, D, 1)

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
    p_db = p_bias + (((i_image * num_windows + i_window) * PARTS + i_block) * (3 * channels) + i_head * D)
    # [S, D0]
    b_dq0 = tl.dot(b_ds, b_k0, input_precision=PRECISION) * scale
    # q again, from L2: its ties would fill the registers all along.
    _, b_ties0 = load_pooled_ties(p_q, o_s * (3 * step), m_s, S * (3 * step), P, 0, D0, D, 1)
    store_unpooled(p_dq, o_s * (3 * step), m_s, S * (3 * step), b_dq0, b_ties0, 0, P, 1, SPLIT, 0, D0, D, 1)
    if BIAS_GRAD:
        store_sum(p_db, b_dq0, m_s, m_unit, 0, D0, D, 1)
    if D1 > 0:
        # [S, D1]
        b_dq1 = tl.dot(b_ds, b_k1, input_precision=PRECISION) * scale
        _, b_ties1 = load_pooled_ties(p_q, o_s * (3 * step), m_s, S * (3 * step), P, D0, D1, D, 1)
        store_unpooled(p_dq, o_s * (3 * step), m_s, S * (3 * step), b_dq1, b_ties1, 0, P, 1, SPLIT, D0, D1, D, 1)
        if BIAS_GRAD:
            store_sum(p_db, b_dq1, m_s, m_unit, D0, D1, D, 1)


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads", "num_queries"])
def _backward_kv_kernel(
    p_grad, p_qkv, p_grad_qkv, p_stats, p_bias, num_units, num_windows, num_heads, scale, num_queries,
    P: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = P * S
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    dtype = p_qkv.dtype.element_ty
    channels = num_heads * D
    step = token_step(num_windows, channels, WIDE)
    i_block = tl.program_id(0) % BLOCKS
    i_image, i_window, i_head, i_unit, m_unit = units(tl.program_id(0) // BLOCKS, num_units, num_windows, num_heads, 1)
    o_unit = (i_image * num_windows * K + i_window) * (3 * channels) + i_head * D
    p_q = p_qkv + o_unit
    p_do = p_grad + ((i_image * num_windows * S + i_window) * channels + i_head * D)
    p_stat = p_stats + i_unit.to(tl.int64) * (2 * S)
    o_k = rows(i_block * BLOCK_K, BLOCK_K, 1)
    m_k = o_k < K
    o_k *= 3 * step

    # [K, D0], [K, D0]
    b_k0 = load_rows(p_q + channels, o_k, m_k, 0, D0, D, 1)
    b_v0 = load_rows(p_q + 2 * channels, o_k, m_k, 0, D0, D, 1)
    b_dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    b_dv0 = tl.zeros([BLOCK_K, D0], tl.float32)
    if D1 > 0:
        # [K, D1], [K, D1]
        b_k1 = load_rows(p_q + channels, o_k, m_k, D0, D1, D, 1)
        b_v1 = load_rows(p_q + 2 * channels, o_k, m_k, D0, D1, D, 1)
        b_dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
        b_dv1 = tl.zeros([BLOCK_K, D1], tl.float32)
    # Up to S, which the compiler does not know here: it would unroll the loop and run out of registers.
    for i_s in range(0, num_queries, BLOCK_S):
        o_s = rows(i_s, BLOCK_S, 1)
        m_s = o_s < S
        # [S, D0], [S, D0]
        b_q0 = load_pooled(p_q, o_s * (3 * step), m_s, S * (3 * step), P, 0, D0, D, 1)
        b_do0 = load_rows(p_do, o_s * step, m_s, 0, D0, D, 1)
        # [S, K]
        b_x = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        b_dp = tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION)
        if D1 > 0:
            b_q1 = load_pooled(p_q, o_s * (3 * step), m_s, S * (3 * step), P, D0, D1, D, 1)
            b_do1 = load_rows(p_do, o_s * step, m_s, D0, D1, D, 1)
            b_x = tl.dot(b_q1, tl.trans(b_k1), b_x, input_precision=PRECISION)
            b_dp = tl.dot(b_do1, tl.trans(b_v1), b_dp, input_precision=PRECISION)
        # [S, 1]
        b_lse = tl.load(p_stat + o_s, mask=m_s, other=0.0)
        b_delta = tl.load(p_stat + S + o_s, mask=m_s, other=0.0)
        # [S, K]. Rows beyond S take part in the products over queries: zero, whatever stands there.
        b_p = tl.exp2((b_x * scale - b_lse) * LOG2_E)
        b_ds = b_p * (b_dp - b_delta)
        if S % BLOCK_S != 0:
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
    p_db = p_bias + (((i_image * num_windows + i_window) * PARTS + i_block) * (3 * channels) + i_head * D + channels)
    b_dk0 *= scale
    store_rows(p_dk, o_k, m_k, b_dk0, 0, D0, D, 1)
    store_rows(p_dv, o_k, m_k, b_dv0, 0, D0, D, 1)
    if BIAS_GRAD:
        store_sum(p_db, b_dk0, m_k, m_unit, 0, D0, D, 1)
        store_sum(p_db + channels, b_dv0, m_k, m_unit, 0, D0, D, 1)
    if D1 > 0:
        b_dk1 *= scale
        store_rows(p_dk, o_k, m_k, b_dk1, D0, D1, D, 1)
        store_rows(p_dv, o_k, m_k, b_dv1, D0, D1, D, 1)
        if BIAS_GRAD:
            store_sum(p_db, b_dk1, m_k, m_unit, D0, D1, D, 1)
            store_sum(p_db + channels, b_dv1, m_k, m_unit, D0, D1, D, 1)


# ---- launch ----


def plan_long(arguments, constexprs, itemsize, capability) -> list[Launch]:
    """The two launches, from what `plan_backward` prepares."""
    S, P, D = constexprs["S"], constexprs["P"], constexprs["D"]
    stats = arguments["p_bias"].new_empty(arguments["num_units"] * 2 * S)
    constexprs |= {"PARTS": parts(S, P, D, itemsize, capability)}
    p_tensors = {name: arguments.pop(name) for name in ("p_grad", "p_qkv", "p_grad_qkv", "p_bias")}
    arguments = {**p_tensors, "p_stats": stats, **arguments}
    launches = []
    for kernel, direction in ((_backward_q_kernel, "backward_q"), (_backward_kv_kernel, "backward_kv")):
        tile = tiles(direction, S, P, D, itemsize, capability)
        blocks = triton.cdiv(S, tile.block_s) if kernel is _backward_q_kernel else triton.cdiv(P * S, tile.block_k)
        own = {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1, **constexprs}
        if kernel is _backward_kv_kernel:
            del own["SPLIT"]  # it writes no gradient of q
            arguments = {**arguments, "num_queries": S}
        launches.append(
            Launch(kernel, arguments["num_units"] * blocks, arguments, own, tile.num_warps, tile.num_stages)
        )
    return launches


def parts(S: int, P: int, D: int, itemsize: int, capability: tuple[int, int]) -> int:
    """Rows of partial sums that each window has: one for a block of queries, or of keys, whichever are more."""
    by_query = triton.cdiv(S, tiles("backward_q", S, P, D, itemsize, capability).block_s)
    by_key = triton.cdiv(P * S, tiles("backward_kv", S, P, D, itemsize, capability).block_k)
    return max(by_query, by_key)

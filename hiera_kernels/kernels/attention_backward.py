"""Mask-unit attention, backward: the kernel of windows up to 64 keys, and the launch of all windows.

One program has a whole window in hand, so it recomputes the softmax from qkv alone: the forward saves nothing, and the
row sums of P * dP need no pass over the output. Every byte is read and written once, no atomics, in one fixed order.
How tiles lie in memory: attention.py. Longer windows: attention_backward_long.py.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.attention import sizes
from hiera_kernels.kernels.attention_backward_long import parts, plan_long
from hiera_kernels.kernels.launch_table import Launch, on_device, tiles
from hiera_kernels.kernels.limits import SMALL_KEYS, compute_capability
from hiera_kernels.kernels.tile_access import (
    columns,
    load_pooled_ties,
    load_rows,
    rows,
    shares,
    softmax_and_lse,
    store_rows,
    store_sum,
    store_unpooled,
    token_step,
    units,
)


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads"])
def _backward_kernel(
    p_grad, p_qkv, p_grad_qkv, p_bias, num_units, num_windows, num_heads, scale,
    P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, COPIES: tl.constexpr,
    PACK: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr, BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = P * S
    dtype = p_qkv.dtype.element_ty
    channels = num_heads * D
    step = token_step(num_windows, channels, WIDE)
    o_k = rows(0, BLOCK_K, PACK) * (3 * step)
    # Row r of a tile of queries is token r of the window: query r % S as its (r // S)-th pooled token has it. Products
    # take at least 16 rows; where S is less, the copies fill them (COPIES = P), and one store serves all of them.
    o_r = rows(0, BLOCK_S, PACK)
    m_r = o_r < COPIES * S
    o_p = o_r // S
    o_s = o_r % S
    o_q = o_r * (3 * step)
    pool = S * (3 * step)
    # [S, K]: copies and padding must not take part in products over queries. Padded keys have P = dS = 0 of themselves.
    m_key = columns(0, BLOCK_K, PACK) < K
    m_once = (o_r < S) & m_key
    for i_round in range(ROUNDS):
        i_tile = tl.program_id(0) * ROUNDS + i_round
        i_image, i_window, i_head, _, m_unit = units(i_tile, num_units, num_windows, num_heads, PACK)
        o_unit = (i_image * num_windows * K + i_window) * (3 * channels) + i_head * D
        p_q = p_qkv + o_unit
        p_k = p_q + channels
        p_v = p_k + channels
        p_do = p_grad + ((i_image * num_windows * S + i_window) * channels + i_head * D)
        m_q = m_unit & m_r
        m_k = m_unit & (rows(0, BLOCK_K, PACK) < K)

        # [S, D0], [K, D0], [K, D0], [S, D0]
        b_q0, b_ties0 = load_pooled_ties(p_q, o_s * (3 * step), m_q, pool, P, 0, D0, D, PACK)
        if SPLIT and COPIES > 1:
            b_ties0 = shares(b_ties0, o_p, P, SPLIT).to(dtype)  # half the registers; counts are exact in 16 bits
        b_k0 = load_rows(p_k, o_k, m_k, 0, D0, D, PACK)
        b_v0 = load_rows(p_v, o_k, m_k, 0, D0, D, PACK)
        b_do0 = load_rows(p_do, o_s * step, m_q, 0, D0, D, PACK)
        if D1 > 0:
            # [S, D1], [K, D1], [K, D1], [S, D1]
            b_q1, b_ties1 = load_pooled_ties(p_q, o_s * (3 * step), m_q, pool, P, D0, D1, D, PACK)
            if SPLIT and COPIES > 1:
                b_ties1 = shares(b_ties1, o_p, P, SPLIT).to(dtype)  # half the registers; counts are exact in 16 bits
            b_k1 = load_rows(p_k, o_k, m_k, D0, D1, D, PACK)
            b_v1 = load_rows(p_v, o_k, m_k, D0, D1, D, PACK)
            b_do1 = load_rows(p_do, o_s * step, m_q, D0, D1, D, PACK)

        # [S, K]
        b_x = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        if D1 > 0:
            b_x = tl.dot(b_q1, tl.trans(b_k1), b_x, input_precision=PRECISION)
        b_p, _ = softmax_and_lse(b_x, scale, m_key, BLOCK_K > K)
        # [S, K]
        b_dp = tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION)
        if D1 > 0:
            b_dp = tl.dot(b_do1, tl.trans(b_v1), b_dp, input_precision=PRECISION)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, -1, keep_dims=True))
        b_ds = b_ds.to(dtype)
        b_p = b_p.to(dtype)
        # [K, S]
        if BLOCK_S > S:
            b_pt = tl.trans(tl.where(m_once, b_p, 0.0))
            b_dst = tl.trans(tl.where(m_once, b_ds, 0.0))
        else:
            b_pt = tl.trans(b_p)
            b_dst = tl.trans(b_ds)

        p_dq = p_grad_qkv + o_unit
        p_dk = p_dq + channels
        p_dv = p_dk + channels
        # [K, D0], [K, D0], [S, D0]
        if COPIES > 1:
            b_do0 = tl.where(o_r < S, b_do0, 0.0)  # an inf there, times a weight of 0, would be NaN
        b_dv0 = tl.dot(b_pt, b_do0, input_precision=PRECISION)
        store_rows(p_dv, o_k, m_k, b_dv0, 0, D0, D, PACK)
        b_dk0 = tl.dot(b_dst, b_q0, input_precision=PRECISION) * scale
        store_rows(p_dk, o_k, m_k, b_dk0, 0, D0, D, PACK)
        b_dq0 = tl.dot(b_ds, b_k0, input_precision=PRECISION) * scale
        store_unpooled(p_dq, o_q, m_q, pool, b_dq0, b_ties0, o_p, P, COPIES, SPLIT, 0, D0, D, PACK)
        if D1 > 0:
            # [K, D1], [K, D1], [S, D1]
            if COPIES > 1:
                b_do1 = tl.where(o_r < S, b_do1, 0.0)
            b_dv1 = tl.dot(b_pt, b_do1, input_precision=PRECISION)
            store_rows(p_dv, o_k, m_k, b_dv1, D0, D1, D, PACK)
            b_dk1 = tl.dot(b_dst, b_q1, input_precision=PRECISION) * scale
            store_rows(p_dk, o_k, m_k, b_dk1, D0, D1, D, PACK)
            b_dq1 = tl.dot(b_ds, b_k1, input_precision=PRECISION) * scale
            store_unpooled(p_dq, o_q, m_q, pool, b_dq1, b_ties1, o_p, P, COPIES, SPLIT, D0, D1, D, PACK)
        if BIAS_GRAD:
            # Partial sums, one row of [3, H, D] a window; a query counts once, whichever tokens its gradient goes to.
            p_db = p_bias + ((i_image * num_windows + i_window) * (3 * channels) + i_head * D)
            store_sum(p_db, b_dq0, o_r < S, m_unit, 0, D0, D, PACK)
            store_sum(p_db + channels, b_dk0, m_k, m_unit, 0, D0, D, PACK)
            store_sum(p_db + 2 * channels, b_dv0, m_k, m_unit, 0, D0, D, PACK)
            if D1 > 0:
                store_sum(p_db, b_dq1, o_r < S, m_unit, D0, D1, D, PACK)
                store_sum(p_db + channels, b_dk1, m_k, m_unit, D0, D1, D, PACK)
                store_sum(p_db + 2 * channels, b_dv1, m_k, m_unit, D0, D1, D, PACK)


# ---- launch ----


def plan_short(arguments, constexprs, itemsize, capability) -> Launch:
    """The one launch, from what `plan_backward` prepares."""
    tile = tiles("backward", constexprs["S"], constexprs["P"], constexprs["D"], itemsize, capability)
    constexprs = {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1, **constexprs}
    constexprs |= {"COPIES": tile.copies, "PACK": tile.pack, "ROUNDS": tile.rounds}
    grid = triton.cdiv(arguments["num_units"], tile.pack * tile.rounds)
    return Launch(_backward_kernel, grid, arguments, constexprs, tile.num_warps, tile.num_stages)


def partial_sums(qkv, num_heads, num_windows, q_stride, capability) -> torch.Tensor:
    """Where the kernels leave the sums over the rows of grad_qkv that each had in hand: [B*W, parts, 3*C] fp32."""
    batch, tokens, width = qkv.shape
    queries, head_dim = tokens // (num_windows * q_stride), width // (3 * num_heads)
    count = 1
    if q_stride * queries > SMALL_KEYS:
        count = parts(queries, q_stride, head_dim, qkv.element_size(), capability)
    # Zeros: where there are more blocks of keys than of queries, nobody writes the last sums of q.
    return qkv.new_zeros(batch * num_windows, count, width, dtype=torch.float32)


def plan_backward(
    grad_out, qkv, grad_qkv, partial, num_heads, num_windows, q_stride, scale, ties, capability
) -> list[Launch]:
    """The launches of a backward, in order. All tensors contiguous; partial is `partial_sums`, or empty: not wanted."""
    arguments, constexprs = sizes(qkv, num_heads, num_windows, q_stride, scale)
    arguments = {"p_grad": grad_out, "p_qkv": qkv, "p_grad_qkv": grad_qkv, "p_bias": partial, **arguments}
    constexprs |= {"SPLIT": ties == "split", "BIAS_GRAD": partial.numel() > 0}
    if q_stride * constexprs["S"] > SMALL_KEYS:
        return plan_long(arguments, constexprs, qkv.element_size(), capability)
    return [plan_short(arguments, constexprs, qkv.element_size(), capability)]


def mask_unit_attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    num_heads: int,
    num_windows: int = 1,
    q_stride: int = 1,
    scale: float | None = None,
    ties: str = "first",
    bias_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernels: grad_out [B, N/P, C], qkv [B, N, 3*C], any strides -> grad_qkv, and its sum.

    The input is one that `limits.attention_limit` has nothing against. With bias_grad, the sum is [3*C] fp32: grad_qkv
    over B and N before it is rounded, in two stages whose order never changes; else it is empty. Runs on the device of
    qkv; in Triton's interpreter also on CPU.
    """
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    capability = compute_capability(qkv.device)
    if bias_grad:
        partial = partial_sums(qkv, num_heads, num_windows, q_stride, capability)
    else:
        partial = qkv.new_empty(0, dtype=torch.float32)
    if grad_qkv.numel() > 0:
        args = (num_heads, num_windows, q_stride, scale, ties, capability)
        with on_device(qkv):
            for launch in plan_backward(grad_out, qkv, grad_qkv, partial, *args):
                launch.run()
    return grad_qkv, partial.sum((0, 1)) if bias_grad else partial

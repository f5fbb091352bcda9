"""Attention in windows of a spatial map, backward: the kernel of windows up to 64 keys, and the launch of all windows.

attention_backward.py with another address map (window_access.py). The keys and values of padded tokens are one row, the
pad row, whose gradient is a sum over all of them: each unit of an overhanging window leaves the sum over its own, in a
place of its own, and the sums of all windows are added in one fixed order. No atomics. Longer windows:
windows_backward_long.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device
from hiera_kernels.kernels.limits import SMALL_KEYS, compute_capability
from hiera_kernels.kernels.tile_access import (
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
    load_queries_first,
    on_map,
    overhangs,
    pad_slot,
    store_unpooled_first,
    token_offsets,
    window_place,
)
from hiera_kernels.kernels.windows import queries_and_stride, sizes, window_tiles
from hiera_kernels.kernels.windows_backward_long import key_blocks, plan_long


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads", "map_h", "map_w"])
def _backward_kernel(
    p_grad, p_qkv, p_pad, p_grad_qkv, p_grad_pad, num_units, num_windows, num_heads, map_h, map_w, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, D: tl.constexpr,
    OVERHANG: tl.constexpr, PAD_ROW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, COPIES: tl.constexpr,
    PACK: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = WINDOW_H * WINDOW_W
    S: tl.constexpr = K // (POOL_H * POOL_W)
    QUERY_W: tl.constexpr = WINDOW_W // POOL_W
    dtype = p_qkv.dtype.element_ty
    channels = num_heads * D
    token = 3 * channels
    line = 3 * token_step(map_w, channels, WIDE)
    o_k = rows(0, BLOCK_K, PACK)
    o_ky = o_k // WINDOW_W
    o_kx = o_k % WINDOW_W
    o_key = token_offsets(o_ky, o_kx, line, token)
    # Row r of a tile of queries is query r % S as its (r // S)-th pooled token has it: see attention_backward.py.
    o_r = rows(0, BLOCK_S, PACK)
    o_p = o_r // S
    o_sy = o_r % S // QUERY_W
    o_sx = o_r % S % QUERY_W
    o_first = token_offsets(o_sy * POOL_H, o_sx * POOL_W, line, token)
    o_q = token_offsets(o_sy * POOL_H + o_p // POOL_W, o_sx * POOL_W + o_p % POOL_W, line, token)
    o_do = token_offsets(o_sy, o_sx, token_step(map_w // POOL_W, channels, WIDE), channels)
    m_key = columns(0, BLOCK_K, PACK) < K
    for i_round in range(ROUNDS):
        i_tile = tl.program_id(0) * ROUNDS + i_round
        i_image, i_window, i_head, _, m_unit = units(i_tile, num_units, num_windows, num_heads, PACK)
        i_top, i_left = window_place(i_window, map_w, WINDOW_H, WINDOW_W)
        o_unit = ((i_image * map_h + i_top) * map_w + i_left) * token + i_head * D
        p_q = p_qkv + o_unit
        p_k = p_q + channels
        p_v = p_k + channels
        p_do = p_grad + (
            ((i_image * (map_h // POOL_H) + i_top // POOL_H) * (map_w // POOL_W) + i_left // POOL_W) * channels
            + i_head * D
        )
        p_row = p_pad + i_head * D
        m_q = m_unit & (o_r < COPIES * S)
        m_k = m_unit & (o_k < K)
        m_pad = m_k
        # [S, 1]: copies, padding and queries that do not exist must not take part in products over queries.
        m_once = o_r < S
        if OVERHANG:
            m_q = m_q & on_map(i_top, i_left, o_sy * POOL_H, o_sx * POOL_W, map_h, map_w)
            m_once = m_once & m_q
            m_map = on_map(i_top, i_left, o_ky, o_kx, map_h, map_w)
            m_pad = m_k & (m_map == 0)
            m_k = m_k & m_map

        # [S, D0], [K, D0], [K, D0], [S, D0]
        b_q0, b_first0 = load_queries_first(p_q, o_first, m_q, line, token, POOL_H, POOL_W, 0, D0, D, PACK)
        b_k0 = load_keys(p_k, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, PACK)
        b_v0 = load_keys(p_v, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, PACK)
        b_do0 = load_rows(p_do, o_do, m_q, 0, D0, D, PACK)
        if D1 > 0:
            # [S, D1], [K, D1], [K, D1], [S, D1]
            b_q1, b_first1 = load_queries_first(p_q, o_first, m_q, line, token, POOL_H, POOL_W, D0, D1, D, PACK)
            b_k1 = load_keys(p_k, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, PACK)
            b_v1 = load_keys(p_v, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, PACK)
            b_do1 = load_rows(p_do, o_do, m_q, D0, D1, D, PACK)

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
        if OVERHANG or BLOCK_S > S:
            b_pt = tl.trans(tl.where(m_once & m_key, b_p, 0.0))
            b_dst = tl.trans(tl.where(m_once & m_key, b_ds, 0.0))
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
        store_rows(p_dv, o_key, m_k, b_dv0, 0, D0, D, PACK)
        b_dk0 = tl.dot(b_dst, b_q0, input_precision=PRECISION) * scale
        store_rows(p_dk, o_key, m_k, b_dk0, 0, D0, D, PACK)
        b_dq0 = tl.dot(b_ds, b_k0, input_precision=PRECISION) * scale
        store_unpooled_first(p_dq, o_q, m_q, line, token, b_dq0, b_first0, o_p, POOL_H, POOL_W, COPIES, 0, D0, D, PACK)
        if D1 > 0:
            # [K, D1], [K, D1], [S, D1]
            if COPIES > 1:
                b_do1 = tl.where(o_r < S, b_do1, 0.0)
            b_dv1 = tl.dot(b_pt, b_do1, input_precision=PRECISION)
            store_rows(p_dv, o_key, m_k, b_dv1, D0, D1, D, PACK)
            b_dk1 = tl.dot(b_dst, b_q1, input_precision=PRECISION) * scale
            store_rows(p_dk, o_key, m_k, b_dk1, D0, D1, D, PACK)
            b_dq1 = tl.dot(b_ds, b_k1, input_precision=PRECISION) * scale
            store_unpooled_first(
                p_dq, o_q, m_q, line, token, b_dq1, b_first1, o_p, POOL_H, POOL_W, COPIES, D0, D1, D, PACK
            )
        if PAD_ROW:
            # Sums over the padded tokens of this unit: a row of [2, H, D] for each overhanging window.
            i_slot, slots = pad_slot(i_top, i_left, map_h, map_w, WINDOW_H, WINDOW_W)
            m_sum = m_unit & overhangs(i_top, i_left, map_h, map_w, WINDOW_H, WINDOW_W)
            p_sum = p_grad_pad + ((i_image * slots + i_slot) * (2 * channels) + i_head * D)
            store_sum(p_sum, b_dk0, m_pad, m_sum, 0, D0, D, PACK)
            store_sum(p_sum + channels, b_dv0, m_pad, m_sum, 0, D0, D, PACK)
            if D1 > 0:
                store_sum(p_sum, b_dk1, m_pad, m_sum, D0, D1, D, PACK)
                store_sum(p_sum + channels, b_dv1, m_pad, m_sum, D0, D1, D, PACK)


# ---- launch ----


def plan_short(arguments, constexprs, itemsize, capability) -> Launch:
    """The one launch, from what `plan_backward` prepares."""
    S, P = queries_and_stride(constexprs)
    tile = window_tiles("backward", S, P, constexprs["D"], itemsize, capability, constexprs["OVERHANG"])
    constexprs |= {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1}
    constexprs |= {"COPIES": tile.copies, "PACK": tile.pack, "ROUNDS": tile.rounds}
    grid = triton.cdiv(arguments["num_units"], tile.pack * tile.rounds)
    return Launch(_backward_kernel, grid, arguments, constexprs, tile.num_warps, tile.num_stages)


def partial_sums(qkv, num_heads, window_size, q_stride, pad, capability) -> torch.Tensor:
    """Where the kernels leave the sums of padded keys and values: [B * overhanging windows, parts, 2*C] fp32.

    Empty without a pad row or an overhanging window. Every element is written by one program.
    """
    arguments, constexprs = sizes(qkv, num_heads, window_size, q_stride, pad, None)
    if not constexprs["PAD_ROW"]:
        return qkv.new_empty(0, dtype=torch.float32)
    S, P = queries_and_stride(constexprs)
    whole = (arguments["map_h"] // constexprs["WINDOW_H"]) * (arguments["map_w"] // constexprs["WINDOW_W"])
    slots = qkv.shape[0] * (arguments["num_windows"] - whole)
    parts = 1 if S * P <= SMALL_KEYS else key_blocks(S, P, constexprs["D"], qkv.element_size(), capability)
    return qkv.new_empty(slots, parts, 2 * qkv.shape[3] // 3, dtype=torch.float32)


def plan_backward(
    grad_out, qkv, grad_qkv, partial, num_heads, window_size, q_stride, pad, scale, capability
) -> list[Launch]:
    """The launches of a backward, in order. All tensors contiguous; partial is `partial_sums`."""
    arguments, constexprs = sizes(qkv, num_heads, window_size, q_stride, pad, scale)
    # A pointer that is not read stands for no pad row.
    row = pad if constexprs["PAD_ROW"] else qkv
    tensors = {"p_grad": grad_out, "p_qkv": qkv, "p_pad": row, "p_grad_qkv": grad_qkv, "p_grad_pad": partial}
    S, P = queries_and_stride(constexprs)
    if S * P > SMALL_KEYS:
        return plan_long(tensors, arguments, constexprs, qkv.element_size(), capability)
    return [plan_short(tensors | arguments, constexprs, qkv.element_size(), capability)]


def window_attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    num_heads: int,
    window_size: Sequence[int],
    q_stride: Sequence[int],
    pad: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernels: grad_out [B, Hs', Ws', C], qkv [B, Hs, Ws, 3*C], any strides -> grad_qkv, grad_pad.

    grad_pad is [3*C] in fp32, zero where no window overhangs, or empty without a pad row. The input is one that
    `window_limit` has nothing against. Runs on the device of qkv; in Triton's interpreter also on CPU.
    """
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    pad = None if pad is None else pad.contiguous()
    grad_qkv = torch.empty_like(qkv)
    capability = compute_capability(qkv.device)
    partial = partial_sums(qkv, num_heads, window_size, q_stride, pad, capability)
    if grad_qkv.numel() > 0:
        args = (num_heads, window_size, q_stride, pad, scale, capability)
        with on_device(qkv):
            for launch in plan_backward(grad_out, qkv, grad_qkv, partial, *args):
                launch.run()
    if pad is None:
        return grad_qkv, partial
    grad_pad = qkv.new_zeros(qkv.shape[3], dtype=torch.float32)
    if partial.numel() > 0:
        torch.sum(partial, (0, 1), out=grad_pad[qkv.shape[3] // 3 :])
    return grad_qkv, grad_pad

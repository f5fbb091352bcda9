"""Attention in windows of a spatial map, forward: the kernel of attention.py, another address map (window_access.py).

A unit is one head of one window, units are counted with the head fastest, then windows from the left and from the top,
then images. What a program holds, PACK, ROUNDS, D0 and D1: attention.py. Nothing is partitioned, padded, permuted or
cropped in memory: a program reads its window where it lies, and writes the rows of its queries where they belong.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, Tiles, on_device, tiles
from hiera_kernels.kernels.limits import compute_capability, matmul_precision
from hiera_kernels.kernels.tile_access import LOG2_E, columns, rows, store_rows, token_step, units
from hiera_kernels.kernels.window_access import load_keys, load_queries, on_map, token_offsets, window_place
from hiera_kernels.kernels.window_limits import window_and_pool
from hiera_kernels.reference.windows import windows


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads", "map_h", "map_w"])
def _forward_kernel(
    p_qkv, p_pad, p_out, num_units, num_windows, num_heads, map_h, map_w, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, D: tl.constexpr,
    OVERHANG: tl.constexpr, PAD_ROW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PACK: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = WINDOW_H * WINDOW_W
    S: tl.constexpr = K // (POOL_H * POOL_W)
    QUERY_W: tl.constexpr = WINDOW_W // POOL_W
    BLOCKS: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    channels = num_heads * D
    token = 3 * channels
    line = 3 * token_step(map_w, channels, WIDE)
    i_block = tl.program_id(0) % BLOCKS
    # Lines and columns: of pooled queries in the pooled window, of keys in the window.
    o_s = rows(i_block * BLOCK_S, BLOCK_S, PACK)
    o_sy = o_s // QUERY_W
    o_sx = o_s % QUERY_W
    o_k = rows(0, BLOCK_K, PACK)
    o_ky = o_k // WINDOW_W
    o_kx = o_k % WINDOW_W
    o_q = token_offsets(o_sy * POOL_H, o_sx * POOL_W, line, token)
    o_out = token_offsets(o_sy, o_sx, token_step(map_w // POOL_W, channels, WIDE), channels)
    o_key = token_offsets(o_ky, o_kx, line, token)
    for i_round in range(ROUNDS):
        i_tile = tl.program_id(0) // BLOCKS * ROUNDS + i_round
        i_image, i_window, i_head, _, m_unit = units(i_tile, num_units, num_windows, num_heads, PACK)
        i_top, i_left = window_place(i_window, map_w, WINDOW_H, WINDOW_W)
        p_unit = p_qkv + (((i_image * map_h + i_top) * map_w + i_left) * token + i_head * D)
        p_row = p_pad + i_head * D
        m_s = m_unit & (o_s < S)
        m_k = m_unit & (o_k < K)
        m_pad = m_k
        if OVERHANG:
            m_s = m_s & on_map(i_top, i_left, o_sy * POOL_H, o_sx * POOL_W, map_h, map_w)
            m_map = on_map(i_top, i_left, o_ky, o_kx, map_h, map_w)
            m_pad = m_k & (m_map == 0)
            m_k = m_k & m_map

        # Every load comes before the first product: the more bytes in flight, the nearer to the memory's bandwidth.
        # [S, D0], [K, D0], [K, D0]
        b_q0 = load_queries(p_unit, o_q, m_s, line, token, POOL_H, POOL_W, 0, D0, D, PACK)
        b_k0 = load_keys(p_unit + channels, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, PACK)
        b_v0 = load_keys(
            p_unit + 2 * channels, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, 0, D0, D, PACK
        )
        if D1 > 0:
            # [S, D1], [K, D1], [K, D1]
            b_q1 = load_queries(p_unit, o_q, m_s, line, token, POOL_H, POOL_W, D0, D1, D, PACK)
            b_k1 = load_keys(p_unit + channels, p_row + channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, PACK)
            b_v1 = load_keys(
                p_unit + 2 * channels, p_row + 2 * channels, o_key, m_k, m_pad, m_unit, PAD_ROW, D0, D1, D, PACK
            )

        # [S, K]
        b_x = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        if D1 > 0:
            b_x = tl.dot(b_q1, tl.trans(b_k1), b_x, input_precision=PRECISION)
        b_x *= scale
        if BLOCK_K > K:
            b_x = tl.where(columns(0, BLOCK_K, PACK) < K, b_x, float("-inf"))
        # [S, 1]. Rows are whole, so a row of -inf or with +inf becomes NaN just where softmax makes it NaN.
        b_max = tl.max(b_x, -1, keep_dims=True)
        # [S, K]
        b_p = tl.exp2((b_x - b_max) * LOG2_E)
        # [S, 1]
        b_sum = tl.sum(b_p, -1, keep_dims=True)

        # [S, K], in the dtype of v
        b_weight = b_p.to(p_qkv.dtype.element_ty)
        p_token = p_out + (
            ((i_image * (map_h // POOL_H) + i_top // POOL_H) * (map_w // POOL_W) + i_left // POOL_W) * channels
            + i_head * D
        )
        # [S, D0]
        b_out0 = tl.dot(b_weight, b_v0, input_precision=PRECISION) / b_sum
        store_rows(p_token, o_out, m_s, b_out0, 0, D0, D, PACK)
        if D1 > 0:
            # [S, D1]
            b_out1 = tl.dot(b_weight, b_v1, input_precision=PRECISION) / b_sum
            store_rows(p_token, o_out, m_s, b_out1, D0, D1, D, PACK)


# ---- launch ----

# As launch_table.TUNED, and in addition to it, for windows that overhang the map.
TUNED: dict[tuple[str, int, int, int, int, int], dict[str, int]] = {
    ("backward", 49, 49, 56, 16, 8): {"rounds": 4},  # with 2, ptxas spills two registers
    ("backward", 64, 64, 72, 16, 9): {"num_warps": 8},  # with 4, ptxas spills five registers
}


def window_tiles(
    direction: str, S: int, P: int, D: int, itemsize: int, capability: tuple[int, int], overhang: bool = False
) -> Tiles:
    """The configuration of one kernel: the launch table's, whose kernels do the same work at other addresses."""
    tile = tiles(direction, S, P, D, itemsize, capability)
    tuned = TUNED.get((direction, S, S * P, D, 8 * itemsize, capability[0])) if overhang else None
    return tile._replace(**tuned) if tuned else tile


def sizes(qkv: torch.Tensor, num_heads: int, window_size, q_stride, pad, scale: float | None) -> tuple[dict, dict]:
    """Run-time arguments and constexprs that every kernel has."""
    batch, map_h, map_w, width = qkv.shape
    (window_h, window_w), (pool_h, pool_w) = window_and_pool(qkv, window_size, q_stride)
    head_dim = width // (3 * num_heads)
    num_windows = windows(map_h, window_h) * windows(map_w, window_w)
    overhang = map_h % window_h != 0 or map_w % window_w != 0
    arguments = {
        "num_units": batch * num_windows * num_heads,
        "num_windows": num_windows,
        "num_heads": num_heads,
        "map_h": map_h,
        "map_w": map_w,
        "scale": head_dim**-0.5 if scale is None else float(scale),
    }
    constexprs = {
        "WINDOW_H": window_h,
        "WINDOW_W": window_w,
        "POOL_H": pool_h,
        "POOL_W": pool_w,
        "D": head_dim,
        "OVERHANG": overhang,
        "PAD_ROW": overhang and pad is not None,
        "WIDE": map_h * map_w * width >= 2**31,
        "PRECISION": matmul_precision(qkv.dtype),
    }
    return arguments, constexprs


def queries_and_stride(constexprs: dict) -> tuple[int, int]:
    """S and P of a window."""
    P = constexprs["POOL_H"] * constexprs["POOL_W"]
    return constexprs["WINDOW_H"] * constexprs["WINDOW_W"] // P, P


def plan_forward(qkv, out, num_heads, window_size, q_stride, pad, scale, capability) -> list[Launch]:
    """The launches of a forward: all tensors contiguous, pad None for zeros. Looks at no data."""
    arguments, constexprs = sizes(qkv, num_heads, window_size, q_stride, pad, scale)
    S, P = queries_and_stride(constexprs)
    tile = window_tiles("forward", S, P, constexprs["D"], qkv.element_size(), capability)
    constexprs |= {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1}
    constexprs |= {"PACK": tile.pack, "ROUNDS": tile.rounds}
    grid = triton.cdiv(arguments["num_units"], tile.pack * tile.rounds) * triton.cdiv(S, tile.block_s)
    # A pointer that is not read stands for no pad row.
    arguments = {"p_qkv": qkv, "p_pad": pad if constexprs["PAD_ROW"] else qkv, "p_out": out, **arguments}
    return [Launch(_forward_kernel, grid, arguments, constexprs, tile.num_warps, tile.num_stages)]


def window_attention_forward(
    qkv: torch.Tensor,
    num_heads: int,
    window_size: Sequence[int],
    q_stride: Sequence[int],
    pad: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Launch the forward kernel: qkv [B, Hs, Ws, 3*C], any strides -> out [B, Hs/q_stride, Ws/q_stride, C].

    window_size and q_stride hold two ints each, or none: the whole map, no pooling. pad [3*C], or None for zeros. The
    input is one that `window_limit` has nothing against. Runs on the device of qkv; in Triton's interpreter on CPU.
    """
    batch, map_h, map_w, width = qkv.shape
    _, (pool_h, pool_w) = window_and_pool(qkv, window_size, q_stride)
    qkv, pad = qkv.contiguous(), None if pad is None else pad.contiguous()
    out = qkv.new_empty(batch, map_h // pool_h, map_w // pool_w, width // 3)
    if out.numel() > 0:
        capability = compute_capability(qkv.device)
        with on_device(qkv):
            for launch in plan_forward(qkv, out, num_heads, window_size, q_stride, pad, scale, capability):
                launch.run()
    return out

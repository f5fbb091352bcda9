"""Mask-unit attention, forward, as one Triton kernel: query max-pooling, softmax(q k^T) v, the layout of the tokens.

Letters are those of the dictionary (B N W P S K H D C). A *unit* is one head of one window; units are counted with the
head fastest, ``u = (b*W + w)*H + h``. Token j of a window is row ``n = j*W + w`` of the packed qkv, so the rows of a
unit are W*3*C elements apart and start at ``((b*K*W + w)*3*H + h)*D``: the kernel reads and writes in place.

A program holds PACK units side by side. With PACK = 1 its tiles are [rows, columns] and its warps share them; with more
they are [PACK, rows, columns], `tl.dot` is batched, and each warp has units of its own. Units never meet in a product,
so an inf or NaN in one cannot reach its neighbours, as it would through the zeros of a block-diagonal mask. A program
may do ROUNDS such tiles one after another: two heads of D = 56 or 72 share a 32-byte sector, and one program does both.

D that is no power of two is two chunks of columns, D0 + D1 (96 = 64 + 32, 72 = 64 + 8 in a chunk of 16); D1 may be 0.
Rows of K keys are whole in a program, so that softmax needs no running maximum; queries may take several programs.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device, tiles
from hiera_kernels.kernels.limits import compute_capability, matmul_precision
from hiera_kernels.kernels.tile_access import (
    LN_2,
    LOG2_E,
    columns,
    load_pooled,
    load_rows,
    rows,
    store_rows,
    token_step,
    units,
)


@triton.jit(do_not_specialize=["num_units", "num_windows", "num_heads"])
def _forward_kernel(
    p_qkv, p_out, p_lse, num_units, num_windows, num_heads, scale,
    P: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PACK: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr, SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = P * S
    BLOCKS: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    channels = num_heads * D
    step = token_step(num_windows, channels, WIDE)
    i_block = tl.program_id(0) % BLOCKS
    o_s = rows(i_block * BLOCK_S, BLOCK_S, PACK)
    o_k = rows(0, BLOCK_K, PACK)
    for i_round in range(ROUNDS):
        i_tile = tl.program_id(0) // BLOCKS * ROUNDS + i_round
        i_image, i_window, i_head, i_unit, m_unit = units(i_tile, num_units, num_windows, num_heads, PACK)
        p_unit = p_qkv + ((i_image * num_windows * K + i_window) * (3 * channels) + i_head * D)
        m_s = m_unit & (o_s < S)
        m_k = m_unit & (o_k < K)

        # Every load comes before the first product: the more bytes in flight, the nearer to the memory's bandwidth.
        # [S, D0], [K, D0], [K, D0]
        b_q0 = load_pooled(p_unit, o_s * (3 * step), m_s, S * (3 * step), P, 0, D0, D, PACK)
        b_k0 = load_rows(p_unit + channels, o_k * (3 * step), m_k, 0, D0, D, PACK)
        b_v0 = load_rows(p_unit + 2 * channels, o_k * (3 * step), m_k, 0, D0, D, PACK)
        if D1 > 0:
            # [S, D1], [K, D1], [K, D1]
            b_q1 = load_pooled(p_unit, o_s * (3 * step), m_s, S * (3 * step), P, D0, D1, D, PACK)
            b_k1 = load_rows(p_unit + channels, o_k * (3 * step), m_k, D0, D1, D, PACK)
            b_v1 = load_rows(p_unit + 2 * channels, o_k * (3 * step), m_k, D0, D1, D, PACK)

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
        p_row = p_out + ((i_image * num_windows * S + i_window) * channels + i_head * D)
        # [S, D0]
        b_out0 = tl.dot(b_weight, b_v0, input_precision=PRECISION) / b_sum
        store_rows(p_row, o_s * step, m_s, b_out0, 0, D0, D, PACK)
        if D1 > 0:
            # [S, D1]
            b_out1 = tl.dot(b_weight, b_v1, input_precision=PRECISION) / b_sum
            store_rows(p_row, o_s * step, m_s, b_out1, D0, D1, D, PACK)
        if SAVE_LSE:
            tl.store(p_lse + (i_unit.to(tl.int64) * S + o_s), b_max + tl.log2(b_sum) * LN_2, mask=m_s)


# ---- launch ----


def sizes(qkv: torch.Tensor, num_heads: int, num_windows: int, q_stride: int, scale: float | None) -> tuple:
    """Run-time arguments and constexprs that every attention kernel has: units, windows, heads, scale; P, S, D, ..."""
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    arguments = {
        "num_units": batch * num_windows * num_heads,
        "num_windows": num_windows,
        "num_heads": num_heads,
        "scale": head_dim**-0.5 if scale is None else float(scale),
    }
    constexprs = {
        "P": q_stride,
        "S": tokens // (num_windows * q_stride),
        "D": head_dim,
        "WIDE": tokens * width >= 2**31,
        "PRECISION": matmul_precision(qkv.dtype),
    }
    return arguments, constexprs


def plan_forward(qkv, out, lse, num_heads, num_windows, q_stride, scale, capability) -> list[Launch]:
    """The launches of a forward: qkv and out contiguous, lse empty if it is not wanted. Looks at no data."""
    arguments, constexprs = sizes(qkv, num_heads, num_windows, q_stride, scale)
    queries = constexprs["S"]
    tile = tiles("forward", queries, q_stride, constexprs["D"], qkv.element_size(), capability)
    constexprs |= {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1}
    constexprs |= {"PACK": tile.pack, "ROUNDS": tile.rounds, "SAVE_LSE": lse.numel() > 0}
    grid = triton.cdiv(arguments["num_units"], tile.pack * tile.rounds) * triton.cdiv(queries, tile.block_s)
    arguments = {"p_qkv": qkv, "p_out": out, "p_lse": lse, **arguments}
    return [Launch(_forward_kernel, grid, arguments, constexprs, tile.num_warps, tile.num_stages)]


def mask_unit_attention_forward(
    qkv: torch.Tensor,
    num_heads: int,
    num_windows: int = 1,
    q_stride: int = 1,
    scale: float | None = None,
    save_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel: qkv [B, N, 3*C], any strides -> out [B, N/P, C], lse [B, W, H, S] fp32 or empty.

    The input is one that `limits.attention_limit` has nothing against. Runs on the device of qkv; in Triton's
    interpreter on CPU.
    """
    batch, tokens, width = qkv.shape
    qkv = qkv.contiguous()
    out = qkv.new_empty(batch, tokens // q_stride, width // 3)
    shape = (batch, num_windows, num_heads, tokens // (num_windows * q_stride)) if save_lse else (0,)
    lse = qkv.new_empty(shape, dtype=torch.float32)
    if out.numel() > 0:
        with on_device(qkv):
            for launch in plan_forward(
                qkv, out, lse, num_heads, num_windows, q_stride, scale, compute_capability(qkv.device)
            ):
                launch.run()
    return out, lse

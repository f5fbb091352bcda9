"""Mask-unit attention, backward."""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.attention import (
    LOG2_E,
    columns,
    compute_capability,
    load_rows,
    on_device,
    rows,
    sizes,
    store_rows,
    token_step,
    units,
)
from hiera_kernels.kernels.launch_table import Launch, tiles


@triton.jit
def load_pooled_ties(
    p_unit, o_rows, m_rows, stride, P: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr,
    PACK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """load_pooled, and beside the maximum a bit for each of the P tiles that attains it.

    A NaN is the maximum, and equals nothing: it leaves the bit of the first NaN or, in SPLIT mode, none.
    """
    b_max = load_rows(p_unit, o_rows, m_rows, START, LENGTH, D, PACK)
    b_bits = tl.full(b_max.shape, 1, tl.int32)
    if SPLIT:
        b_bits = (b_max == b_max).to(tl.int32)
    for i_p in tl.static_range(1, P):
        b_x = load_rows(p_unit + i_p * stride, o_rows, m_rows, START, LENGTH, D, PACK)
        b_larger = (b_x > b_max) | ((b_x != b_x) & (b_max == b_max))
        b_bits = tl.where(b_x == b_max, b_bits | (1 << i_p), b_bits)
        if SPLIT:
            b_bits = tl.where(b_larger, (b_x == b_x).to(tl.int32) << i_p, b_bits)
        else:
            b_bits = tl.where(b_larger, 1 << i_p, b_bits)
        b_max = tl.where(b_larger, b_x, b_max)
    if P > 1:
        b_max = tl.where(m_rows, b_max, 0.0)  # as in load_pooled
    return b_max, b_bits


@triton.jit
def softmax(b_x, scale, m_key, PADDED: tl.constexpr):
    """Normalised rows of exp(scale * x), fp32; zero in padded columns unless the row is NaN."""
    b_x = b_x * (scale * LOG2_E)
    if PADDED:
        b_x = tl.where(m_key, b_x, float("-inf"))
    b_p = tl.exp2(b_x - tl.max(b_x, -1, keep_dims=True))
    return b_p / tl.sum(b_p, -1, keep_dims=True)


@triton.jit
def store_sum(
    p_unit, b_x, m_rows, m_unit, START: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr
):
    """The sum of the rows of a tile, in fp32; padding is not summed."""
    b_sum = tl.sum(tl.where(m_rows, b_x, 0.0), -2, keep_dims=True)
    store_rows(p_unit, rows(0, 1, PACK), m_unit & (rows(0, 1, PACK) == 0), b_sum, START, LENGTH, D, PACK)


@triton.jit
def shares(b_bits, o_p, P: tl.constexpr, SPLIT: tl.constexpr):
    """Among how many tokens the o_p-th one of P shares the gradient of their maximum, itself included; 0 if it has none."""
    if SPLIT:
        b_ties = tl.zeros(b_bits.shape, tl.int32)
        for i_p in tl.static_range(P):
            b_ties += (b_bits >> i_p) & 1
        b_ties = b_ties.to(tl.float32)
        # No bit at all: a NaN, to which amax gives 0 / 0.
        b_ties = tl.where(b_bits == 0, float("nan"), b_ties * ((b_bits >> o_p) & 1).to(tl.float32))
    else:
        b_ties = (((b_bits & -b_bits) >> o_p) & 1).to(tl.float32)
    return b_ties


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
                b_part = b_grad / b_share
            b_part = tl.where(b_share == 0.0, 0.0, b_part)
        store_rows(p_unit + i_p * stride, o_rows, m_rows, b_part, START, LENGTH, D, PACK)


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
    # Row r of a tile of queries is token r of the window: query r % S as its (r // S)-th pooled token has it. Products take at
    # least 16 rows; where S is less, the copies fill them (COPIES = P), and one store serves all of them.
    o_r = rows(0, BLOCK_S, PACK)
    m_r = o_r < COPIES * S
    o_p = o_r // S
    o_s = o_r % S
    o_q = o_r * (3 * step)
    pool = S * (3 * step)
    # [S, K]: copies and padding must not take part in products over queries, nor padding in those over keys.
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
        b_q0, b_ties0 = load_pooled_ties(p_q, o_s * (3 * step), m_q, pool, P, 0, D0, D, PACK, SPLIT)
        if SPLIT and COPIES > 1:
            b_ties0 = shares(b_ties0, o_p, P, SPLIT).to(dtype)  # half the registers; counts are exact in 16 bits
        b_k0 = load_rows(p_k, o_k, m_k, 0, D0, D, PACK)
        b_v0 = load_rows(p_v, o_k, m_k, 0, D0, D, PACK)
        b_do0 = load_rows(p_do, o_s * step, m_q, 0, D0, D, PACK)
        if D1 > 0:
            # [S, D1], [K, D1], [K, D1], [S, D1]
            b_q1, b_ties1 = load_pooled_ties(p_q, o_s * (3 * step), m_q, pool, P, D0, D1, D, PACK, SPLIT)
            if SPLIT and COPIES > 1:
                b_ties1 = shares(b_ties1, o_p, P, SPLIT).to(dtype)  # half the registers; counts are exact in 16 bits
            b_k1 = load_rows(p_k, o_k, m_k, D0, D1, D, PACK)
            b_v1 = load_rows(p_v, o_k, m_k, D0, D1, D, PACK)
            b_do1 = load_rows(p_do, o_s * step, m_q, D0, D1, D, PACK)

        # [S, K]
        b_x = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        if D1 > 0:
            b_x = tl.dot(b_q1, tl.trans(b_k1), b_x, input_precision=PRECISION)
        b_p = softmax(b_x, scale, m_key, BLOCK_K > K)
        # [S, K]
        b_dp = tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION)
        if D1 > 0:
            b_dp = tl.dot(b_do1, tl.trans(b_v1), b_dp, input_precision=PRECISION)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, -1, keep_dims=True))
        if BLOCK_K > K:
            b_ds = tl.where(m_key, b_ds, 0.0)
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
        b_dv0 = tl.dot(b_pt, b_do0, input_precision=PRECISION)
        store_rows(p_dv, o_k, m_k, b_dv0, 0, D0, D, PACK)
        b_dk0 = tl.dot(b_dst, b_q0, input_precision=PRECISION) * scale
        store_rows(p_dk, o_k, m_k, b_dk0, 0, D0, D, PACK)
        b_dq0 = tl.dot(b_ds, b_k0, input_precision=PRECISION) * scale
        store_unpooled(p_dq, o_q, m_q, pool, b_dq0, b_ties0, o_p, P, COPIES, SPLIT, 0, D0, D, PACK)
        if D1 > 0:
            # [K, D1], [K, D1], [S, D1]
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


def plan_backward(
    grad_out, qkv, grad_qkv, partial, num_heads, num_windows, q_stride, scale, ties, capability
) -> list[Launch]:
    """The launches of a backward, in order. All tensors contiguous; partial [B*W, 3*C] fp32, or empty."""
    arguments, constexprs = sizes(qkv, num_heads, num_windows, q_stride, scale)
    arguments = {"p_grad": grad_out, "p_qkv": qkv, "p_grad_qkv": grad_qkv, "p_bias": partial, **arguments}
    constexprs |= {"SPLIT": ties == "split", "BIAS_GRAD": partial.numel() > 0}
    return [_plan_small(arguments, constexprs, qkv.element_size(), capability)]


def _plan_small(arguments, constexprs, itemsize, capability) -> Launch:
    tile = tiles("backward", constexprs["S"], constexprs["P"], constexprs["D"], itemsize, capability)
    constexprs |= {"BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "D0": tile.d0, "D1": tile.d1}
    constexprs |= {"COPIES": tile.copies, "PACK": tile.pack, "ROUNDS": tile.rounds}
    grid = triton.cdiv(arguments["num_units"], tile.pack * tile.rounds)
    return Launch(_backward_kernel, grid, arguments, constexprs, tile.num_warps, tile.num_stages)


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
    """Launch the backward kernels: grad_out [B, N/P, C], qkv [B, N, 3*C], any strides -> grad_qkv, and its sum or empty.

    The input is one that `supports` has nothing against. With bias_grad, [3*C] fp32: grad_qkv summed over B and N before it
    is rounded, in two stages whose order never changes. Runs on the device of qkv; in Triton's interpreter also on CPU.
    """
    batch, _, width = qkv.shape
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    partial = qkv.new_empty((batch * num_windows, width) if bias_grad else (0,), dtype=torch.float32)
    if grad_qkv.numel() > 0:
        with on_device(qkv):
            for launch in plan_backward(
                grad_out, qkv, grad_qkv, partial, num_heads, num_windows, q_stride, scale, ties,
                compute_capability(qkv.device),
            ):  # fmt: skip
                launch.run()
    return grad_qkv, partial.sum(0) if bias_grad else partial

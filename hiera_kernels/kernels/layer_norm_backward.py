"""Residual add + LayerNorm, backward: one pass over rows as one Triton kernel, then a sum of partial sums.

With u = (sum - mean) * rstd, the normalized row, and g = grad_normed * weight, a row's gradient is

    d = grad_sum + rstd * (g - average(g) - u * average(g * u))

grad_x is d, grad_branch d * layer_scale * drop_scale. Per channel, over all rows: grad_weight sums grad_normed * u,
grad_bias grad_normed, grad_layer_scale d * drop_scale * branch, grad_branch_bias grad_branch. A program adds up the
rows that it has anyway, in registers, and writes one partial sum for each channel; how many programs there are follows
from the shapes alone, and no sum depends on which of them comes first. The letters are those of layer_norm.py.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device
from hiera_kernels.kernels.layer_norm import (
    contiguous,
    load_channels,
    load_drop,
    row_tile,
)
from hiera_kernels.kernels.tile_access import columns, load_rows, rows, store_rows

# So many that writing partial sums once for each program is a few hundredths of the traffic.
ROWS_PER_PROGRAM = 64


@triton.jit
def _store_partial(p_partial, b_sums, START: tl.constexpr, C: tl.constexpr):
    """Sums over the rows of [BLOCK_R, LENGTH], to their columns of [C]."""
    o_c = columns(START, b_sums.shape[1], 1)
    tl.store(p_partial + o_c, tl.sum(b_sums, 0, keep_dims=True), mask=o_c < C)


@triton.jit(do_not_specialize=["num_rows", "rows_per_sample", "rounds"])
def _backward_kernel(
    p_grad_sum, p_grad_normed, p_sum, p_mean, p_rstd, p_weight, p_branch, p_drop, p_layer,
    p_grad_x, p_grad_branch, p_partial, num_rows, rows_per_sample, rounds,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_R: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAYER: tl.constexpr, BRANCH_BIAS: tl.constexpr,
):  # fmt: skip
    # [BLOCK_R, C0], [BLOCK_R, C1]
    b_gamma0 = load_channels(p_weight, BLOCK_R, 0, C0, C)
    b_scale0 = load_channels(p_layer, BLOCK_R, 0, C0, C)
    if C1 > 0:
        b_gamma1 = load_channels(p_weight, BLOCK_R, C0, C1, C)
        b_scale1 = load_channels(p_layer, BLOCK_R, C0, C1, C)
    # [BLOCK_R, C0], [BLOCK_R, C1]: sums of all rounds. Those that nobody wants the compiler throws away.
    b_weight0 = tl.zeros([BLOCK_R, C0], tl.float32)
    b_bias0 = tl.zeros([BLOCK_R, C0], tl.float32)
    b_layer0 = tl.zeros([BLOCK_R, C0], tl.float32)
    b_branch_bias0 = tl.zeros([BLOCK_R, C0], tl.float32)
    if C1 > 0:
        b_weight1 = tl.zeros([BLOCK_R, C1], tl.float32)
        b_bias1 = tl.zeros([BLOCK_R, C1], tl.float32)
        b_layer1 = tl.zeros([BLOCK_R, C1], tl.float32)
        b_branch_bias1 = tl.zeros([BLOCK_R, C1], tl.float32)
    for i_round in range(rounds):
        # [BLOCK_R, 1]
        i_row = (tl.program_id(0).to(tl.int64) * rounds + i_round) * BLOCK_R + rows(0, BLOCK_R, 1)
        m_row = i_row < num_rows
        b_mean = tl.load(p_mean + i_row, mask=m_row, other=0.0)
        b_rstd = tl.load(p_rstd + i_row, mask=m_row, other=0.0)
        b_drop = 1.0
        if p_drop is not None:
            b_drop = load_drop(p_drop, i_row, m_row, rows_per_sample)
        # [BLOCK_R, C0], [BLOCK_R, C1]; zero where a row or a column is padding
        b_u0 = load_rows(p_sum, i_row * C, m_row, 0, C0, C, 1)
        b_normed0 = load_rows(p_grad_normed, i_row * C, m_row, 0, C0, C, 1)
        if C1 > 0:
            b_u1 = load_rows(p_sum, i_row * C, m_row, C0, C1, C, 1)
            b_normed1 = load_rows(p_grad_normed, i_row * C, m_row, C0, C1, C, 1)
        if p_grad_sum is not None:
            b_sum0 = load_rows(p_grad_sum, i_row * C, m_row, 0, C0, C, 1)
            if C1 > 0:
                b_sum1 = load_rows(p_grad_sum, i_row * C, m_row, C0, C1, C, 1)
        b_branch0 = 0.0
        b_branch1 = 0.0
        if LAYER:
            b_branch0 = load_rows(p_branch, i_row * C, m_row, 0, C0, C, 1).to(tl.float32)
            if C1 > 0:
                b_branch1 = load_rows(p_branch, i_row * C, m_row, C0, C1, C, 1).to(tl.float32)

        # u is not zero in padded columns; whatever it meets is.
        b_u0 = (b_u0.to(tl.float32) - b_mean) * b_rstd
        b_grad0 = b_normed0.to(tl.float32) * b_gamma0
        # [BLOCK_R, 1]
        b_average = tl.sum(b_grad0, 1, keep_dims=True)
        b_along = tl.sum(b_grad0 * b_u0, 1, keep_dims=True)
        if C1 > 0:
            b_u1 = (b_u1.to(tl.float32) - b_mean) * b_rstd
            b_grad1 = b_normed1.to(tl.float32) * b_gamma1
            b_average += tl.sum(b_grad1, 1, keep_dims=True)
            b_along += tl.sum(b_grad1 * b_u1, 1, keep_dims=True)
        b_average /= C
        b_along /= C

        # [BLOCK_R, C0]
        b_weight0 += b_normed0.to(tl.float32) * b_u0
        b_bias0 += b_normed0.to(tl.float32)
        b_grad0 = (b_grad0 - b_average - b_u0 * b_along) * b_rstd
        if p_grad_sum is not None:
            b_grad0 += b_sum0.to(tl.float32)
        if p_grad_x is not None:
            store_rows(p_grad_x, i_row * C, m_row, b_grad0, 0, C0, C, 1)
        b_grad0 *= b_drop
        b_layer0 += b_grad0 * b_branch0
        b_grad0 *= b_scale0
        b_branch_bias0 += b_grad0
        if p_grad_branch is not None:
            store_rows(p_grad_branch, i_row * C, m_row, b_grad0, 0, C0, C, 1)
        if C1 > 0:
            # [BLOCK_R, C1]
            b_weight1 += b_normed1.to(tl.float32) * b_u1
            b_bias1 += b_normed1.to(tl.float32)
            b_grad1 = (b_grad1 - b_average - b_u1 * b_along) * b_rstd
            if p_grad_sum is not None:
                b_grad1 += b_sum1.to(tl.float32)
            if p_grad_x is not None:
                store_rows(p_grad_x, i_row * C, m_row, b_grad1, C0, C1, C, 1)
            b_grad1 *= b_drop
            b_layer1 += b_grad1 * b_branch1
            b_grad1 *= b_scale1
            b_branch_bias1 += b_grad1
            if p_grad_branch is not None:
                store_rows(p_grad_branch, i_row * C, m_row, b_grad1, C0, C1, C, 1)

    if WEIGHT or BIAS or LAYER or BRANCH_BIAS:
        p_partial += tl.program_id(0).to(tl.int64) * ((WEIGHT + BIAS + LAYER + BRANCH_BIAS) * C)
    if WEIGHT:
        _store_partial(p_partial, b_weight0, 0, C)
        if C1 > 0:
            _store_partial(p_partial, b_weight1, C0, C)
    if BIAS:
        _store_partial(p_partial + WEIGHT * C, b_bias0, 0, C)
        if C1 > 0:
            _store_partial(p_partial + WEIGHT * C, b_bias1, C0, C)
    if LAYER:
        _store_partial(p_partial + (WEIGHT + BIAS) * C, b_layer0, 0, C)
        if C1 > 0:
            _store_partial(p_partial + (WEIGHT + BIAS) * C, b_layer1, C0, C)
    if BRANCH_BIAS:
        _store_partial(p_partial + (WEIGHT + BIAS + LAYER) * C, b_branch_bias0, 0, C)
        if C1 > 0:
            _store_partial(p_partial + (WEIGHT + BIAS + LAYER) * C, b_branch_bias1, C0, C)


# ---- launch ----


def programs(num_rows: int, C: int) -> tuple[int, int]:
    """How many programs there are, and how many tiles each does one after another.

    One to four waves of programs: one where there are few rows, four where they are long enough all the same.
    """
    tile = row_tile(C)
    wanted = max(ROWS_PER_PROGRAM, triton.cdiv(num_rows, 4 * tile.wave))
    rounds = triton.cdiv(min(wanted, triton.cdiv(num_rows, tile.wave)), tile.block_r)
    return triton.cdiv(num_rows, tile.block_r * rounds), rounds


def plan_backward(
    grad_sum, grad_normed, total, mean, rstd, weight, branch, drop_scale, layer_scale, grad_x, grad_branch, partial,
    sums, rounds,
) -> Launch:  # fmt: skip
    """The launch of the pass over rows, on contiguous tensors. Looks at no data.

    grad_x and grad_branch None: not wanted. partial: [programs, wanted sums, C] fp32, or None. sums: which are wanted,
    of weight, bias, layer_scale, branch_bias.
    """
    C, num_rows = total.shape[-1], mean.numel()
    tile = row_tile(C)
    arguments = {"p_grad_sum": grad_sum, "p_grad_normed": grad_normed, "p_sum": total, "p_mean": mean, "p_rstd": rstd}
    arguments |= {"p_weight": weight, "p_branch": branch, "p_drop": drop_scale, "p_layer": layer_scale}
    arguments |= {"p_grad_x": grad_x, "p_grad_branch": grad_branch, "p_partial": partial, "num_rows": num_rows}
    arguments |= {"rows_per_sample": num_rows // total.shape[0], "rounds": rounds}
    names = ("WEIGHT", "BIAS", "LAYER", "BRANCH_BIAS")
    constexprs = tile.constexprs(C) | {name: int(asked) for name, asked in zip(names, sums, strict=True)}
    grid = triton.cdiv(num_rows, tile.block_r * rounds)
    return Launch(_backward_kernel, grid, arguments, constexprs, tile.num_warps, 1)


def add_layer_norm_backward(
    grad_sum: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    branch: torch.Tensor | None,
    drop_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    grad_x_dtype: torch.dtype | None,
    grad_branch_dtype: torch.dtype | None,
    sums: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward: grad_x, grad_branch in these dtypes (None: not wanted), and the wanted sums [count, C]."""
    grad_sum, grad_normed, total, mean, rstd = contiguous(grad_sum, grad_normed, total, mean, rstd)
    weight, branch, drop_scale, layer_scale = contiguous(weight, branch, drop_scale, layer_scale)
    grad_x, grad_branch = (
        None if dtype is None else total.new_empty(total.shape, dtype=dtype)
        for dtype in (grad_x_dtype, grad_branch_dtype)
    )
    shape = (sum(sums), total.shape[-1])
    if total.numel() == 0:
        return grad_x, grad_branch, total.new_zeros(shape, dtype=torch.float32) if any(sums) else None
    count, rounds = programs(mean.numel(), total.shape[-1])
    partial = total.new_empty((count, *shape), dtype=torch.float32) if any(sums) else None
    saved = (total, mean, rstd, weight, branch if sums[2] else None, drop_scale, layer_scale)
    with on_device(total):
        plan_backward(grad_sum, grad_normed, *saved, grad_x, grad_branch, partial, sums, rounds).run()
    return grad_x, grad_branch, None if partial is None else partial.sum(0)

"""Residual add + LayerNorm, forward, and LayerNorm once more from its statistics, as Triton kernels.

A program holds BLOCK_R whole rows of C channels in registers, several times in turn (`rounds`), so that weight and
bias, which stay in registers, are read once for 16 rows and more. C that is no power of two is two chunks of columns,
C0 + C1 (96 = 64 + 32, 1152 = 1024 + 128); where one chunk is as short (112 in 128), columns are masked. Mean and
variance are two passes over registers: the deviations are squared, never the values. Bytes are read and written once.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device
from hiera_kernels.kernels.tile_access import columns, load_rows, rows, store_rows

PER_THREAD = 16
# So many that reading weight and bias once for each program is a few hundredths of the traffic.
ROWS_PER_PROGRAM = 32
SMS = 132  # of an H100


@triton.jit
def load_channels(p_vector, BLOCK_R: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, C: tl.constexpr):
    """[BLOCK_R, LENGTH] of a vector of C, the same in each row, in fp32; zero beyond. 1.0 without a vector.

    As many pointers as a tile has: Triton would otherwise spread a row over all threads, and move every tile that meets
    it through shared memory to that layout.
    """
    if p_vector is None:
        return 1.0
    else:
        o_c = tl.zeros([BLOCK_R, 1], tl.int32) + columns(START, LENGTH, 1)
        return tl.load(p_vector + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit
def load_drop(p_drop, i_row, m_row, rows_per_sample):
    """[BLOCK_R, 1]: drop_scale of the rows' samples, in fp32."""
    return tl.load(p_drop + i_row // rows_per_sample, mask=m_row, other=0.0).to(tl.float32)


@triton.jit
def _deviation(b_sum, b_mean, START: tl.constexpr, C: tl.constexpr):
    """Distance from the mean, in fp32; zero in columns that are padding."""
    b_deviation = b_sum.to(tl.float32) - b_mean
    if START + b_deviation.shape[1] > C:
        b_deviation = tl.where(columns(START, b_deviation.shape[1], 1) < C, b_deviation, 0.0)
    return b_deviation


@triton.jit(do_not_specialize=["num_rows", "rows_per_sample", "rounds"])
def _forward_kernel(
    p_x, p_branch, p_weight, p_bias, p_drop, p_layer, p_sum, p_normed, p_mean, p_rstd,
    num_rows, rows_per_sample, rounds, eps,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # [BLOCK_R, C0], [BLOCK_R, C1]
    b_weight0 = load_channels(p_weight, BLOCK_R, 0, C0, C)
    b_bias0 = 0.0 if p_bias is None else load_channels(p_bias, BLOCK_R, 0, C0, C)
    b_layer0 = load_channels(p_layer, BLOCK_R, 0, C0, C)
    if C1 > 0:
        b_weight1 = load_channels(p_weight, BLOCK_R, C0, C1, C)
        b_bias1 = 0.0 if p_bias is None else load_channels(p_bias, BLOCK_R, C0, C1, C)
        b_layer1 = load_channels(p_layer, BLOCK_R, C0, C1, C)
    for i_round in range(rounds):
        # [BLOCK_R, 1], 64 bits: a batch may have more than 2^31 numbers
        i_row = (tl.program_id(0).to(tl.int64) * rounds + i_round) * BLOCK_R + rows(0, BLOCK_R, 1)
        m_row = i_row < num_rows
        # Every load comes before the first use: the more bytes in flight, the nearer to the memory's bandwidth.
        # [BLOCK_R, C0], [BLOCK_R, C1]
        b_sum0 = load_rows(p_x, i_row * C, m_row, 0, C0, C, 1)
        if C1 > 0:
            b_sum1 = load_rows(p_x, i_row * C, m_row, C0, C1, C, 1)
        if p_branch is not None:
            b_branch0 = load_rows(p_branch, i_row * C, m_row, 0, C0, C, 1)
            if C1 > 0:
                b_branch1 = load_rows(p_branch, i_row * C, m_row, C0, C1, C, 1)
            b_drop = 1.0
            if p_drop is not None:
                b_drop = load_drop(p_drop, i_row, m_row, rows_per_sample)
            # Rounded as it is kept: backward, and whoever reads the sum, must find the same mean in it.
            b_sum0 = b_sum0.to(tl.float32) + b_branch0.to(tl.float32) * b_layer0 * b_drop
            b_sum0 = b_sum0.to(p_sum.dtype.element_ty)
            store_rows(p_sum, i_row * C, m_row, b_sum0, 0, C0, C, 1)
            if C1 > 0:
                b_sum1 = b_sum1.to(tl.float32) + b_branch1.to(tl.float32) * b_layer1 * b_drop
                b_sum1 = b_sum1.to(p_sum.dtype.element_ty)
                store_rows(p_sum, i_row * C, m_row, b_sum1, C0, C1, C, 1)
        # [BLOCK_R, 1]
        b_mean = tl.sum(b_sum0.to(tl.float32), 1, keep_dims=True)
        if C1 > 0:
            b_mean += tl.sum(b_sum1.to(tl.float32), 1, keep_dims=True)
        b_mean /= C
        # [BLOCK_R, C0], [BLOCK_R, C1]
        b_sum0 = _deviation(b_sum0, b_mean, 0, C)
        b_variance = tl.sum(b_sum0 * b_sum0, 1, keep_dims=True)
        if C1 > 0:
            b_sum1 = _deviation(b_sum1, b_mean, C0, C)
            b_variance += tl.sum(b_sum1 * b_sum1, 1, keep_dims=True)
        b_rstd = tl.rsqrt(b_variance / C + eps)
        tl.store(p_mean + i_row, b_mean, mask=m_row)
        tl.store(p_rstd + i_row, b_rstd, mask=m_row)
        store_rows(p_normed, i_row * C, m_row, b_sum0 * b_rstd * b_weight0 + b_bias0, 0, C0, C, 1)
        if C1 > 0:
            store_rows(p_normed, i_row * C, m_row, b_sum1 * b_rstd * b_weight1 + b_bias1, C0, C1, C, 1)


@triton.jit(do_not_specialize=["num_rows", "rounds"])
def _normalize_kernel(
    p_sum, p_mean, p_rstd, p_weight, p_bias, p_normed, num_rows, rounds,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # [BLOCK_R, C0], [BLOCK_R, C1]
    b_weight0 = load_channels(p_weight, BLOCK_R, 0, C0, C)
    b_bias0 = 0.0 if p_bias is None else load_channels(p_bias, BLOCK_R, 0, C0, C)
    if C1 > 0:
        b_weight1 = load_channels(p_weight, BLOCK_R, C0, C1, C)
        b_bias1 = 0.0 if p_bias is None else load_channels(p_bias, BLOCK_R, C0, C1, C)
    for i_round in range(rounds):
        # [BLOCK_R, 1]
        i_row = (tl.program_id(0).to(tl.int64) * rounds + i_round) * BLOCK_R + rows(0, BLOCK_R, 1)
        m_row = i_row < num_rows
        b_mean = tl.load(p_mean + i_row, mask=m_row, other=0.0)
        b_rstd = tl.load(p_rstd + i_row, mask=m_row, other=0.0)
        # [BLOCK_R, C0], [BLOCK_R, C1]
        b_sum0 = load_rows(p_sum, i_row * C, m_row, 0, C0, C, 1)
        if C1 > 0:
            b_sum1 = load_rows(p_sum, i_row * C, m_row, C0, C1, C, 1).to(tl.float32) - b_mean
            store_rows(p_normed, i_row * C, m_row, b_sum1 * b_rstd * b_weight1 + b_bias1, C0, C1, C, 1)
        b_sum0 = b_sum0.to(tl.float32) - b_mean
        store_rows(p_normed, i_row * C, m_row, b_sum0 * b_rstd * b_weight0 + b_bias0, 0, C0, C, 1)


# ---- launch ----


class RowTile(NamedTuple):
    """The shape of a program: BLOCK_R rows of C0 + C1 columns at a time."""

    block_r: int
    c0: int
    c1: int
    num_warps: int

    @property
    def wave(self) -> int:
        """How many programs an H100 has on chip at a time, by the registers of the backward: 3 or 2 on each SM."""
        return SMS * (3 if self.num_warps == 4 else 2)

    def constexprs(self, C: int) -> dict[str, int]:
        """The kernel's constants for rows of C."""
        return {"C": C, "C0": self.c0, "C1": self.c1, "BLOCK_R": self.block_r}


@functools.cache
def row_tile(C: int) -> RowTile:
    """Rows that give each thread PER_THREAD numbers; never one row alone, which would leave threads without work."""
    c0 = triton.next_power_of_2(C)
    c1 = 0
    if c0 > C:
        rest = max(16, triton.next_power_of_2(C - c0 // 2))
        c0, c1 = (c0 // 2, rest) if rest < c0 // 2 else (c0, 0)
    num_warps = 4 if c0 + c1 <= 1024 else 8
    block_r = 32 * num_warps * PER_THREAD // triton.next_power_of_2(c0 + c1)
    return RowTile(min(64, max(2, block_r)), c0, c1, num_warps)


def rounds_of(num_rows: int, tile: RowTile) -> int:
    """How many tiles a program does one after another: as many as pay, but one wave of programs at least."""
    return triton.cdiv(min(ROWS_PER_PROGRAM, triton.cdiv(num_rows, tile.wave)), tile.block_r)


def plan_forward(x, branch, weight, bias, eps, drop_scale, layer_scale, total, normed, mean, rstd) -> Launch:
    """The launch of a forward on contiguous tensors; total is None where branch is. Looks at no data."""
    C, num_rows = x.shape[-1], mean.numel()
    tile = row_tile(C)
    rounds = rounds_of(num_rows, tile)
    arguments = {"p_x": x, "p_branch": branch, "p_weight": weight, "p_bias": bias, "p_drop": drop_scale}
    arguments |= {"p_layer": layer_scale, "p_sum": total, "p_normed": normed, "p_mean": mean, "p_rstd": rstd}
    arguments |= {"num_rows": num_rows, "rows_per_sample": num_rows // x.shape[0], "rounds": rounds, "eps": float(eps)}
    grid = triton.cdiv(num_rows, tile.block_r * rounds)
    return Launch(_forward_kernel, grid, arguments, tile.constexprs(C), tile.num_warps, 1)


def plan_normalize(total, mean, rstd, weight, bias, normed) -> Launch:
    """The launch of a normalization from statistics, on contiguous tensors."""
    C, num_rows = total.shape[-1], mean.numel()
    tile = row_tile(C)
    rounds = rounds_of(num_rows, tile)
    arguments = {"p_sum": total, "p_mean": mean, "p_rstd": rstd, "p_weight": weight, "p_bias": bias}
    arguments |= {"p_normed": normed, "num_rows": num_rows, "rounds": rounds}
    grid = triton.cdiv(num_rows, tile.block_r * rounds)
    return Launch(_normalize_kernel, grid, arguments, tile.constexprs(C), tile.num_warps, 1)


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each of them, None included, contiguous."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def add_layer_norm_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    drop_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Launch the forward: x, branch [B, ..., C], any strides -> sum in dtype ([0]: no branch), normed, mean, rstd."""
    x, branch, weight, bias, drop_scale, layer_scale = contiguous(x, branch, weight, bias, drop_scale, layer_scale)
    total = None if branch is None else x.new_empty(x.shape, dtype=dtype)
    normed = x.new_empty(x.shape, dtype=normed_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        with on_device(x):
            plan_forward(x, branch, weight, bias, eps, drop_scale, layer_scale, total, normed, mean, rstd).run()
    return x.new_empty(0, dtype=dtype) if total is None else total, normed, mean, rstd


def normalize(
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the normalization: total [..., C], any strides, mean and rstd [...] -> normed [..., C], contiguous."""
    total, mean, rstd, weight, bias = contiguous(total, mean, rstd, weight, bias)
    normed = total.new_empty(total.shape, dtype=dtype)
    if total.numel() > 0:
        with on_device(total):
            plan_normalize(total, mean, rstd, weight, bias, normed).run()
    return normed

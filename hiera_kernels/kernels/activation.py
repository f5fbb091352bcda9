"""GELU by the error function, forward and backward, as passes that touch each byte once.

Forward, and backward without sums, know no rows: a program has a stretch of BLOCK numbers. A backward that also sums
its gradient over rows, for the bias of the layer before, looks at [rows, M]: a program has BLOCK_M columns of ROUNDS *
BLOCK_R rows, adds them up in fp32, and leaves one row of sums; the rows of all programs are added in a second pass,
always in the same order. 64 columns of 16 bits are a whole line of 128 bytes.

The arithmetic is fp32 and PyTorch's own, so that what is infinite or NaN there is so here: -inf times 0 is NaN.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device

BLOCK = 1024
BLOCK_R, BLOCK_M = 32, 64
# Programs that an NVIDIA GPU of today can have at work, several on each of 132 processors; beyond, programs get longer.
ENOUGH_PROGRAMS = 2048
MAX_ROUNDS = 16

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _normal_cdf(b_x):
    return 0.5 * (1.0 + tl.math.erf(b_x * SQRT_HALF))


@triton.jit
def _slope(b_x, b_cdf):
    """The derivative of x * cdf(x)."""
    return b_cdf + b_x * (tl.exp(-0.5 * b_x * b_x) * INV_SQRT_2_PI)


@triton.jit
def _forward_kernel(p_x, p_out, numel, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < numel
    # [BLOCK]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_out + o_x, (b_x * _normal_cdf(b_x)).to(p_out.dtype.element_ty), mask=m_x)


@triton.jit
def _backward_tile(p_grad, p_x, p_grad_x, p_out, o_x, m_x, OUTPUT: tl.constexpr):
    """The gradient of a tile, fp32, stored; with OUTPUT also GELU(x) of the tile."""
    b_grad = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_cdf = _normal_cdf(b_x)
    b_grad *= _slope(b_x, b_cdf)
    tl.store(p_grad_x + o_x, b_grad.to(p_grad_x.dtype.element_ty), mask=m_x)
    if OUTPUT:
        tl.store(p_out + o_x, (b_x * b_cdf).to(p_out.dtype.element_ty), mask=m_x)
    return b_grad


@triton.jit
def _backward_kernel(p_grad, p_x, p_grad_x, p_out, numel, OUTPUT: tl.constexpr, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _backward_tile(p_grad, p_x, p_grad_x, p_out, o_x, o_x < numel, OUTPUT)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward_sums_kernel(
    p_grad, p_x, p_grad_x, p_out, p_sums, rows, width, blocks,
    OUTPUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    # Columns are the fastest: programs side by side share the pages of a row.
    i_part = (tl.program_id(0) // blocks).to(tl.int64)
    o_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    o_r = tl.arange(0, BLOCK_R)[:, None]
    # [BLOCK_R, BLOCK_M]
    b_sums = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for i_round in range(ROUNDS):
        i_row = (i_part * ROUNDS + i_round) * BLOCK_R + o_r
        m_x = (i_row < rows) & (o_m < width)
        b_grad = _backward_tile(p_grad, p_x, p_grad_x, p_out, i_row * width + o_m, m_x, OUTPUT)
        # What a mask left out has a gradient of zero: no number of the padding is infinite.
        b_sums += b_grad
    # [1, BLOCK_M]
    b_sum = tl.sum(b_sums, 0, keep_dims=True)
    tl.store(p_sums + i_part * width + o_m, b_sum, mask=o_m < width)


# ---- launch ----


def plan_forward(x: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch of a forward on contiguous tensors."""
    arguments = {"p_x": x, "p_out": out, "numel": x.numel()}
    return Launch(_forward_kernel, triton.cdiv(x.numel(), BLOCK), arguments, {"BLOCK": BLOCK}, 4, 1)


def rounds(rows: int, width: int) -> int:
    """How many tiles of rows a program adds up: the more, the fewer sums, as long as there are programs enough."""
    tiles = triton.cdiv(rows, BLOCK_R) * triton.cdiv(width, BLOCK_M)
    return min(MAX_ROUNDS, triton.next_power_of_2(max(1, tiles // ENOUGH_PROGRAMS)))


def partial_sums(x: torch.Tensor) -> torch.Tensor:
    """Where the programs leave their sums over rows: [parts, M] fp32."""
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    return x.new_empty(triton.cdiv(rows, BLOCK_R * rounds(rows, width)), width, dtype=torch.float32)


def plan_backward(
    grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor, out: torch.Tensor, sums: torch.Tensor
) -> Launch:
    """The launch of a backward on contiguous tensors; out and sums are empty where they are not wanted."""
    arguments = {"p_grad": grad_out, "p_x": x, "p_grad_x": grad_x, "p_out": out}
    output = {"OUTPUT": out.numel() > 0}
    if sums.numel() == 0:
        arguments |= {"numel": x.numel()}
        return Launch(_backward_kernel, triton.cdiv(x.numel(), BLOCK), arguments, output | {"BLOCK": BLOCK}, 4, 1)
    width = x.shape[-1]
    rows, blocks = x.numel() // width, triton.cdiv(width, BLOCK_M)
    arguments |= {"p_sums": sums, "rows": rows, "width": width, "blocks": blocks}
    constexprs = output | {"BLOCK_R": BLOCK_R, "BLOCK_M": BLOCK_M, "ROUNDS": rounds(rows, width)}
    return Launch(_backward_sums_kernel, sums.shape[0] * blocks, arguments, constexprs, 4, 1)


def gelu_forward(x: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel: x [..., M], fp16, bf16 or fp32, any strides -> the same shape, contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            plan_forward(x, out).run()
    return out


def gelu_backward(
    grad_out: torch.Tensor, x: torch.Tensor, output: bool = False, bias_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch a backward kernel: grad_out and x [..., M], any strides -> grad_x, GELU(x) or [0], sums [M] fp32 or [0].

    The sums are those of grad_x before it is rounded, in two stages whose order never changes.
    """
    x, grad_out = x.contiguous(), grad_out.contiguous()
    grad_x = torch.empty_like(x)
    out = torch.empty_like(x) if output else x.new_empty(0)
    sums = partial_sums(x) if bias_grad else x.new_empty(0, dtype=torch.float32)
    if x.numel() > 0:
        with on_device(x):
            plan_backward(grad_out, x, grad_x, out, sums).run()
    return grad_x, out, sums.sum(0) if bias_grad else sums

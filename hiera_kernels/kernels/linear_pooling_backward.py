"""The gradients of linear_pooling.py from one byte a winner, without the un-pooled gradient in memory.

The gradient of the product, G [P*R, O] an image, has one number other than zero in P. Both kernels make its tiles in
registers, from the gradient of the result and the winners.

``grad_x = G W``: a program makes BLOCK_R x BLOCK_C numbers, of rows that share their p.

``grad_weight = G^T x``, and its bias: a product over all rows of the batch, some 400,000 in stage 1, with a result of
192 x 96. A program adds up a PART of the rows for BLOCK_O x BLOCK_C of it, in fp32; the parts are added in a second
pass, always in the same order. To leave the product to cuBLAS instead would mean to write G: P times the gradient of
the result, once written and once read. Per image of Hiera-B at 224 px, three shortcuts in 16 bits, that is 2 x 2.1 MB
beside the 1.8 MB of x, gradient and winners, and 154 MB of workspace at batch 128, just when the activations of stage 1
are all alive.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device
from hiera_kernels.kernels.limits import matmul_precision
from hiera_kernels.kernels.linear_pooling import fewest_columns, first_rows, load_tile

STAGES = {2: 2, 4: 1}  # by the bytes of a number: asynchronous copies would turn TF32's operands four bytes at a time
# Two programs for each of 132 processors: more would only mean more partial sums.
ENOUGH_PROGRAMS = 264


@triton.jit
def _shares(b_grad, b_winner, m_tile, P: tl.constexpr, SPLIT: tl.constexpr):
    """What each winner gets of a gradient."""
    if SPLIT:
        b_ties = tl.zeros(b_winner.shape, tl.int32)
        for i_p in tl.static_range(P):
            b_ties += (b_winner >> i_p) & 1
        b_share = tl.div_rn(b_grad.to(tl.float32), b_ties.to(tl.float32))
        return tl.where(m_tile, b_share, 0.0).to(b_grad.dtype)  # 0 / 0 in the padding
    else:
        return b_grad


@triton.jit
def _unpooled(b_share, b_winner, i_p, SPLIT: tl.constexpr):
    """The gradient of token p out of P."""
    if SPLIT:
        # As the derivative of amax has it, (grad * mask) / count: a NaN, which a NaN in the product always brings,
        # reaches all P tokens.
        return tl.where(((b_winner >> i_p) & 1) != 0, b_share, b_share * 0.0).to(b_share.dtype)
    else:
        return tl.where(b_winner == i_p, b_share, 0.0).to(b_share.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _input_kernel(
    p_grad, p_winners, p_weight, p_grad_x, num_rows, pooled,
    P: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    EVEN_O: tl.constexpr = OUT % BLOCK_O == 0
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    # Columns and p are the fastest: the programs that read the same gradient run side by side.
    i_row = (tl.program_id(0) // (BLOCKS * P)).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i_p = tl.program_id(0) // BLOCKS % P
    o_c = (tl.program_id(0) % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_row = i_row < num_rows
    # [R, C]
    b_grad_x = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_o in range(0, OUT, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)[None, :]
        o_w = i_o + tl.arange(0, BLOCK_O)[:, None]
        # [R, O], [R, O], [O, C]
        b_grad = load_tile(p_grad, i_row, m_row, o_o, OUT, EVEN_O)
        b_winner = load_tile(p_winners, i_row, m_row, o_o, OUT, EVEN_O).to(tl.int32)
        b_weight = load_tile(p_weight, o_w, o_w < OUT, o_c, C, EVEN_C)
        b_part = _unpooled(_shares(b_grad, b_winner, m_row & (o_o < OUT), P, SPLIT), b_winner, i_p, SPLIT)
        b_grad_x = tl.dot(b_part, b_weight, b_grad_x, input_precision=PRECISION)
    o_row = first_rows(i_row, pooled, P) + i_p * pooled
    tl.store(p_grad_x + (o_row * C + o_c), b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_row & (o_c < C))


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _weight_kernel(
    p_grad, p_winners, p_x, p_weight_sums, p_bias_sums, num_rows, pooled, tiles,
    P: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C if WEIGHT else 1
    BLOCKS_O: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    EVEN_O: tl.constexpr = OUT % BLOCK_O == 0
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    i_part = (tl.program_id(0) // (BLOCKS_C * BLOCKS_O)).to(tl.int64)
    i_c = tl.program_id(0) % BLOCKS_C
    i_o = tl.program_id(0) // BLOCKS_C % BLOCKS_O
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # [O, C], [R, O]
    b_weight = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_bias = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    for i_tile in range(tiles):
        i_row = (i_part * tiles + i_tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        m_row = i_row < num_rows
        # [R, O], each
        b_grad = load_tile(p_grad, i_row, m_row, o_o, OUT, EVEN_O)
        b_winner = load_tile(p_winners, i_row, m_row, o_o, OUT, EVEN_O).to(tl.int32)
        b_share = _shares(b_grad, b_winner, m_row & (o_o < OUT), P, SPLIT)
        if BIAS:
            b_bias += b_grad.to(tl.float32)
            if SPLIT:  # what the P tokens get in sum: NaN where _unpooled has one
                b_bias += tl.where(b_winner == 0, b_share, b_grad).to(tl.float32) * 0.0
        if WEIGHT:
            o_row = first_rows(i_row, pooled, P)
            for i_p in range(P):
                # [R, C]
                b_x = load_tile(p_x, o_row, m_row, o_c, C, EVEN_C)
                b_part = _unpooled(b_share, b_winner, i_p, SPLIT)
                b_weight = tl.dot(tl.trans(b_part), b_x, b_weight, input_precision=PRECISION)
                o_row += pooled
    if WEIGHT:
        o_w = i_o * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
        tl.store(p_weight_sums + ((i_part * OUT + o_w) * C + o_c), b_weight, mask=(o_w < OUT) & (o_c < C))
    if BIAS:
        b_sum = tl.sum(b_bias, 0, keep_dims=True)
        tl.store(p_bias_sums + (i_part * OUT + o_o), b_sum, mask=(o_o < OUT) & (i_c == 0))


# ---- launch ----


def plan_input(grad_out, weight, winners, grad_x, stride: int, ties: str) -> Launch:
    """The launch that makes grad_x; all tensors contiguous. Looks at no data."""
    wide, channels = weight.shape
    num_rows, pooled = grad_out.shape[0] * grad_out.shape[1], grad_out.shape[1]
    wide_type = grad_out.element_size() == 4
    block_r, block_o, block_c = (64, 32, 64) if wide_type else (128, 64, fewest_columns(channels))
    arguments = {"p_grad": grad_out, "p_winners": winners, "p_weight": weight, "p_grad_x": grad_x}
    arguments |= {"num_rows": num_rows, "pooled": pooled}
    constexprs = {"P": stride, "C": channels, "OUT": wide, "SPLIT": ties == "split"}
    constexprs |= {"BLOCK_R": block_r, "BLOCK_O": block_o, "BLOCK_C": block_c}
    constexprs |= {"PRECISION": matmul_precision(grad_out.dtype)}
    grid = triton.cdiv(num_rows, block_r) * stride * triton.cdiv(channels, block_c)
    return Launch(_input_kernel, grid, arguments, constexprs, 8, STAGES[grad_out.element_size()])


def plan_weight(grad_out, x, winners, stride: int, ties: str, needs: tuple[bool, bool]) -> Launch:
    """The launch that leaves sums over parts of the rows; all tensors contiguous. Looks at no data.

    Its arguments hold them: p_weight_sums [parts, O, C] and p_bias_sums [parts, O], fp32, or [0]: not needed.
    """
    (batch, pooled, wide), channels = grad_out.shape, x.shape[2]
    num_rows = batch * pooled
    wide_type = grad_out.element_size() == 4
    block_r, block_o, block_c = (32, 64, 64) if wide_type else (32, 64, fewest_columns(channels))
    blocks = triton.cdiv(wide, block_o) * (triton.cdiv(channels, block_c) if needs[0] else 1)
    all_tiles = triton.cdiv(num_rows, block_r)
    tiles = triton.cdiv(all_tiles, max(1, ENOUGH_PROGRAMS // blocks))
    parts = triton.cdiv(all_tiles, tiles)

    def sums(wanted, *shape):
        return grad_out.new_empty(shape if wanted else (0,), dtype=torch.float32)

    arguments = {"p_grad": grad_out, "p_winners": winners, "p_x": x}
    arguments |= {"p_weight_sums": sums(needs[0], parts, wide, channels), "p_bias_sums": sums(needs[1], parts, wide)}
    arguments |= {"num_rows": num_rows, "pooled": pooled, "tiles": tiles}
    constexprs = {"P": stride, "C": channels, "OUT": wide, "SPLIT": ties == "split"}
    constexprs |= {"WEIGHT": needs[0], "BIAS": needs[1]}
    constexprs |= {"BLOCK_R": block_r, "BLOCK_O": block_o, "BLOCK_C": block_c}
    constexprs |= {"PRECISION": matmul_precision(grad_out.dtype)}
    return Launch(_weight_kernel, parts * blocks, arguments, constexprs, 4, STAGES[grad_out.element_size()])


def linear_q_pool_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    winners: torch.Tensor,
    stride: int,
    ties: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward kernels: gradients of x [B, N, C], weight [O, C], bias [O] in fp32; [0] where not needed.

    grad_out and winners are [B, R, O]. x is not read for grad_x, nor weight for grad_weight. Runs on the device of
    grad_out; in Triton's interpreter on CPU.
    """
    grad_out, winners = grad_out.contiguous(), winners.contiguous()
    grad_x = grad_out.new_empty(x.shape if needs[0] else (0,))
    grad_weight = grad_out.new_zeros(weight.shape if needs[1] else (0,))
    grad_bias = grad_out.new_zeros(weight.shape[0] if needs[2] else 0, dtype=torch.float32)
    if grad_out.numel() == 0:
        return grad_x.zero_(), grad_weight, grad_bias
    with on_device(grad_out):
        if grad_x.numel() > 0:
            plan_input(grad_out, weight.contiguous(), winners, grad_x, stride, ties).run()
        if needs[1] or needs[2]:
            # An x without columns makes no product.
            wanted = (needs[1] and grad_weight.numel() > 0, needs[2])
            launch = plan_weight(grad_out, x.contiguous() if wanted[0] else x, winners, stride, ties, wanted)
            launch.run()
            if wanted[0]:
                grad_weight = launch.arguments["p_weight_sums"].sum(0).to(grad_out.dtype)
            if wanted[1]:
                grad_bias = launch.arguments["p_bias_sums"].sum(0)
    return grad_x, grad_weight, grad_bias

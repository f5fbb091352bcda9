"""A linear layer and the maximum over P tokens as one Triton kernel: the shortcut of a block that pools.

Letters are those of the dictionary; R = N/P pooled tokens an image, C channels of x, O of the output. Pooled token r of
an image is the maximum over rows p*R + r of the product x W^T. Pooled rows of all images are counted through,
``i = b*R + r``; row i has its P rows of x at ``i + b*(P - 1)*R + p*R``, so a tile of rows may span images.

A program makes BLOCK_R x BLOCK_O numbers of the result. It runs through the P products one after another with a single
accumulator, and keeps the maximum and its winner in registers: P accumulators at once would need P times the
registers, and save only reads of W, which lies in L2. Each product is rounded to the output's dtype before it is
compared, as plain PyTorch rounds it when it writes it: 0.2 % of random bf16 groups of four tie, and the first of them
must win here too.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device
from hiera_kernels.kernels.limits import matmul_precision


@triton.jit
def first_rows(i_row, pooled, P: tl.constexpr):
    """Rows of x that pooled rows take for p = 0; those for p are p * pooled further."""
    i_row = i_row.to(tl.int64)
    return i_row + i_row // pooled * ((P - 1) * pooled)


@triton.jit
def load_tile(p_x, o_row, m_row, o_column, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Rows o_row [R, 1] and columns o_column [1, L] of a matrix of WIDTH columns; zero in the padding."""
    if not EVEN:
        m_row = m_row & (o_column < WIDTH)
    return tl.load(p_x + (o_row * WIDTH + o_column), mask=m_row, other=0)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    p_x, p_weight, p_bias, p_out, p_winners, num_rows, pooled,
    P: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    # Columns are the fastest: the programs that read the same rows of x run side by side.
    i_row = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_o = (tl.program_id(0) % BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    o_w = (tl.program_id(0) % BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    m_row, m_o, m_w = i_row < num_rows, o_o < OUT, o_w < OUT
    o_row = first_rows(i_row, pooled, P)
    # [R, O], each; what is in the padding is not stored.
    b_max = tl.full([BLOCK_R, BLOCK_O], float("-inf"), tl.float32)
    b_winner = tl.zeros([BLOCK_R, BLOCK_O], tl.int32)
    for i_p in range(P):
        b_y = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
        for i_c in range(0, C, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)[None, :]
            # [R, C], [O, C]
            b_x = load_tile(p_x, o_row, m_row, o_c, C, EVEN_C)
            b_weight = load_tile(p_weight, o_w, m_w, o_c, C, EVEN_C)
            b_y = tl.dot(b_x, tl.trans(b_weight), b_y, input_precision=PRECISION)
        if BIAS:
            b_y += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)
        # Compared in fp32, to which 16 bits convert exactly: sm_80 has no comparison of bf16.
        b_y = b_y.to(p_out.dtype.element_ty).to(tl.float32)
        b_larger = (b_y > b_max) | ((b_y != b_y) & (b_max == b_max))
        if SAVE:
            if SPLIT:  # a bit for each maximum; none for a NaN, which equals nothing
                b_winner = tl.where(b_y == b_max, b_winner | (1 << i_p), b_winner)
                b_winner = tl.where(b_larger, (b_y == b_y).to(tl.int32) << i_p, b_winner)
            else:
                b_winner = tl.where(b_larger, i_p, b_winner)
        b_max = tl.where(b_larger, b_y, b_max)
        o_row += pooled
    o_out = i_row * OUT + o_o
    tl.store(p_out + o_out, b_max.to(p_out.dtype.element_ty), mask=m_row & m_o)
    if SAVE:
        tl.store(p_winners + o_out, b_winner.to(tl.uint8), mask=m_row & m_o)


# ---- launch ----


def fewest_columns(width: int, blocks: tuple[int, ...] = (128, 64)) -> int:
    """The block that pads `width` columns least; of several, the first: 96 -> 128, 144 -> 64 (192), 384 -> 128."""
    return min(blocks, key=lambda block: -(-width // block) * block)


def plan_forward(x, weight, bias, out, winners, stride: int, ties: str) -> Launch:
    """The launch of a forward on contiguous tensors; bias may be None, winners empty: not wanted. Looks at no data."""
    wide, channels = weight.shape
    wide_type = x.element_size() == 4
    block_r, block_o, block_c = (64, 64, 32) if wide_type else (128, 64, 32 if channels % 64 else 64)
    arguments = {"p_x": x, "p_weight": weight, "p_bias": out if bias is None else bias, "p_out": out}
    arguments |= {"p_winners": winners, "num_rows": out.shape[0] * out.shape[1], "pooled": out.shape[1]}
    constexprs = {"P": stride, "C": channels, "OUT": wide, "BIAS": bias is not None, "SPLIT": ties == "split"}
    constexprs |= {"SAVE": winners.numel() > 0, "BLOCK_R": block_r, "BLOCK_O": block_o, "BLOCK_C": block_c}
    constexprs |= {"PRECISION": matmul_precision(x.dtype)}
    grid = triton.cdiv(arguments["num_rows"], block_r) * triton.cdiv(wide, block_o)
    return Launch(_forward_kernel, grid, arguments, constexprs, 8, 3)


def linear_q_pool_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    ties: str = "first",
    save_winners: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel: x [B, N, C], weight [O, C], bias [O] or None -> out [B, R, O], winners or [0].

    The input is one that `limits.linear_pooling_limit` has nothing against. Runs on the device of x; in Triton's
    interpreter on CPU.
    """
    batch, tokens, _ = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(batch, tokens // stride, weight.shape[0])
    winners = x.new_empty(out.shape if save_winners else (0,), dtype=torch.uint8)
    if out.numel() > 0:
        with on_device(x):
            plan_forward(x, weight, bias, out, winners, stride, ties).run()
    return out, winners

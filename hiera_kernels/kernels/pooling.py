"""Query pooling by itself, forward and backward: the maximum over the slowest token axis, for the shortcut of a block.

x [B, N, C] in unrolled order is B images of P planes of (N/P)*C numbers, and token (p, s, w) is pooled over p: an
elementwise maximum of planes, whatever S, W and C are. A program has the same stretch of all P planes of one image, so
each byte is read and written once.
"""

import torch
import triton
import triton.language as tl

from hiera_kernels.kernels.launch_table import Launch, on_device

# 16 bytes a thread in fp32 and twice in 16 bits; P of them are in flight.
BLOCK = 1024


@triton.jit
def _load(p_x, o_x, m_x):
    # Compared in fp32, to which 16 bits convert exactly: sm_80 has no comparison of bf16.
    return tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["blocks"])
def _forward_kernel(p_x, p_out, plane, blocks, P: tl.constexpr, BLOCK: tl.constexpr):
    i_image = (tl.program_id(0) // blocks).to(tl.int64)
    # 64 bits: an image may have more than 2^31 numbers, and a batch soon has.
    o_x = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < plane
    p_plane = p_x + i_image * P * plane
    # [BLOCK]
    b_max = _load(p_plane, o_x, m_x)
    for i_p in tl.static_range(1, P):
        b_x = _load(p_plane + i_p * plane, o_x, m_x)
        b_max = tl.where((b_x > b_max) | (b_x != b_x), b_x, b_max)
    tl.store(p_out + i_image * plane + o_x, b_max.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["blocks"])
def _backward_kernel(
    p_grad, p_x, p_grad_x, plane, blocks, P: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_image = (tl.program_id(0) // blocks).to(tl.int64)
    o_x = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < plane
    p_plane = p_x + i_image * P * plane
    p_grad_plane = p_grad_x + i_image * P * plane
    # [BLOCK], each
    b_grad = _load(p_grad + i_image * plane, o_x, m_x)
    b_max = _load(p_plane, o_x, m_x)
    # The first of the maxima, and a bit for each of them: none for a NaN, which equals nothing.
    b_first = tl.zeros([BLOCK], tl.int32)
    b_bits = (b_max == b_max).to(tl.int32)
    for i_p in tl.static_range(1, P):
        b_x = _load(p_plane + i_p * plane, o_x, m_x)
        b_larger = (b_x > b_max) | ((b_x != b_x) & (b_max == b_max))
        b_bits |= (b_x == b_max).to(tl.int32) << i_p
        b_bits = tl.where(b_larger, (b_x == b_x).to(tl.int32) << i_p, b_bits)
        b_first = tl.where(b_larger, i_p, b_first)
        b_max = tl.where(b_larger, b_x, b_max)
    b_ties = tl.zeros([BLOCK], tl.float32)
    for i_p in tl.static_range(P):
        b_ties += ((b_bits >> i_p) & 1).to(tl.float32)
    for i_p in tl.static_range(P):
        if SPLIT:
            # Step by step as amax has it, (grad * mask) / count, so that 0 / 0 and inf * 0 come out alike.
            b_part = tl.div_rn(b_grad * ((b_bits >> i_p) & 1).to(tl.float32), b_ties)
        else:
            b_part = tl.where(b_first == i_p, b_grad, 0.0)
        tl.store(p_grad_plane + i_p * plane + o_x, b_part.to(p_grad_x.dtype.element_ty), mask=m_x)


# ---- launch ----


def plan_forward(x: torch.Tensor, out: torch.Tensor, stride: int) -> Launch:
    """The launch of a forward on contiguous tensors."""
    plane = out.shape[1] * out.shape[2]
    blocks = triton.cdiv(plane, BLOCK)
    arguments = {"p_x": x, "p_out": out, "plane": plane, "blocks": blocks}
    return Launch(_forward_kernel, x.shape[0] * blocks, arguments, {"P": stride, "BLOCK": BLOCK}, 4, 1)


def plan_backward(grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor, stride: int, ties: str) -> Launch:
    """The launch of a backward on contiguous tensors."""
    plane = grad_out.shape[1] * grad_out.shape[2]
    blocks = triton.cdiv(plane, BLOCK)
    arguments = {"p_grad": grad_out, "p_x": x, "p_grad_x": grad_x, "plane": plane, "blocks": blocks}
    constexprs = {"P": stride, "SPLIT": ties == "split", "BLOCK": BLOCK}
    return Launch(_backward_kernel, x.shape[0] * blocks, arguments, constexprs, 4, 1)


def q_pool_forward(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Launch the forward kernel: x [B, N, C], fp16, bf16 or fp32, any strides -> [B, N/stride, C], contiguous."""
    batch, tokens, channels = x.shape
    x = x.contiguous()
    out = x.new_empty(batch, tokens // stride, channels)
    if out.numel() > 0:
        with on_device(x):
            plan_forward(x, out, stride).run()
    return out


def q_pool_backward(grad_out: torch.Tensor, x: torch.Tensor, stride: int, ties: str = "first") -> torch.Tensor:
    """Launch the backward kernel: grad_out [B, N/stride, C], x [B, N, C], any strides -> [B, N, C], contiguous."""
    x, grad_out = x.contiguous(), grad_out.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            plan_backward(grad_out, x, grad_x, stride, ties).run()
    return grad_x

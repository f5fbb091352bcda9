"""The passes over memory of one Hiera block with everything fused, counted from its shapes alone.

An account that shares nothing with the counter (counting.py): no model is run and no operation is seen. What the
accelerated model moves cannot be less, and the difference is what is still to be fused.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """One block, for one sample: letters as in CONTRIBUTING.md.

    Attributes:
        N: tokens that enter; N/P leave.
        P: pool stride.
        C_in, C: channels that enter and leave; a block whose channels change has a projection as its shortcut.
        mlp_ratio: hidden channels of the MLP over C.
    """

    N: int
    P: int
    C_in: int
    C: int
    mlp_ratio: int = 4


def weight_elements(shape: BlockShape) -> int:
    """Elements of the weight matrices: qkv, proj, both of the MLP, and the shortcut's projection if there is one."""
    C_in, C = shape.C_in, shape.C
    return 3 * C_in * C + C * C + 2 * shape.mlp_ratio * C * C + (C_in * C if C_in != C else 0)


def fused_block_bytes(shape: BlockShape, residual: int = 2, e: int = 2) -> dict[str, int]:
    """Bytes that forward and backward of one block move per sample, by kind; weights and statistics not counted.

    Args:
        shape: of the block.
        residual: bytes per element of the residual stream (4 in stage 1 under autocast).
        e: bytes per element of everything else.

    Returns:
        {"GEMM", "GELU", "attention", "norm", "pool"}: each tensor read or written once by each pass that needs it:

        - GEMM, forward: operand in, result out; backward twice: gradient in, operand in or gradient out.
        - GELU: pre-activation in, activation out; backward: pre-activation and gradient in, gradient and the
          activation (made again, for the weight's gradient) out.
        - attention: qkv in, out out; backward: qkv and gradient in, gradient of qkv out.
        - norm, twice: stream and branch in, sum and normed out; backward: gradients of sum and normed in, sum in,
          gradients of stream and branch out, and the normed made again.
        - pool, of the projected shortcut: its result out with a byte of winner each; backward its gradient in with the
          winners, the un-pooled gradient out.
    """
    N, M = shape.N, shape.N // shape.P  # tokens before and after pooling
    C_in, C, hidden = shape.C_in, shape.C, shape.mlp_ratio * shape.C
    products = [(N * C_in, N * 3 * C), (M * C, M * C), (M * C, M * hidden), (M * hidden, M * C)]
    norm = 0
    for n in (N * C_in, M * C):  # the first norm is of what enters, the second of what leaves
        norm += n * (residual + e + residual + e)
        norm += n * (residual + e + residual + residual + e + e)
    pool = 0
    if C_in != C:
        pool = e * N * C_in + (e + 1) * M * C
        pool += (e + 1) * M * C + e * N * C + 2 * e * (N * C + N * C_in)  # winners' gradients, then two products
    return {
        "GEMM": sum(e * 3 * (operand + result) for operand, result in products),
        "GELU": e * 6 * M * hidden,
        "attention": e * (3 * N * C + M * C + 3 * N * C + M * C + 3 * N * C),
        "norm": norm,
        "pool": pool,
    }

"""The specification of the pooled shortcut of a block that changes the stage, in plain PyTorch."""

import torch
import torch.nn.functional as F

from hiera_kernels.reference.attention import q_pool


def linear_q_pool(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ties: str = "first"
) -> torch.Tensor:
    """A linear layer and max-pooling of its output over the pool stride, the slowest token axis.

    Args:
        x: [B, N, Cin], any floating dtype, tokens in unrolled order.
        weight: [Cout, Cin].
        bias: [Cout] or None.
        stride: P, the flattened pool stride; it divides N.
        ties: ``"first"`` or ``"split"``: where the gradient goes when several of the P products, as rounded to their
            dtype, are the maximum.

    Returns:
        [B, N/stride, Cout], dtype as ``F.linear`` has it, under autocast too. NaN wins over every number.

    Raises:
        ValueError: ``ties`` is neither of the two.

    Equivalent to::

        F.linear(x, weight, bias).reshape(B, P, N // P, Cout).max(dim=1).values       # amax(dim=1) for "split"

    Source: Hiera (arXiv 2306.00989), section 3.2; ``do_pool(self.proj(x_norm), stride)`` in ``HieraBlock``,
    ``hiera/hiera.py`` of hiera-transformer 0.1.4.
    """
    return q_pool(F.linear(x, weight, bias), stride, ties)

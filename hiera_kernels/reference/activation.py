"""The specification of GELU, in plain PyTorch."""

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU by the error function, ``x * Phi(x)``; not its tanh approximation.

    Args:
        x: [..., M], any floating dtype.
        bias: [M] or None; ``x`` holds it already (``x = F.linear(input, weight, bias.detach())``), and it only gets
            its gradient here. See :func:`hiera_kernels.gelu`.

    Returns:
        [..., M], dtype of ``x``.

    Equivalent to::

        F.gelu(x + bias - bias.detach())                   # F.gelu(x) without a bias

    Source: "Gaussian Error Linear Units", arXiv 1606.08415, section 2; ``torch.nn.GELU`` in timm's ``Mlp``, which
    hiera-transformer 0.1.4 uses.
    """
    return F.gelu(with_bias(x, bias))


def with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x``, which holds ``bias`` already, as a function of ``bias`` too: the same numbers, one more gradient."""
    if bias is None:
        return x
    return x + (bias - bias.detach()).to(x.dtype)

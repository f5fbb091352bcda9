"""The specification of a block's MLP, and of its second half, in plain PyTorch."""

import torch
import torch.nn.functional as F

from hiera_kernels.reference.activation import gelu


def gelu_linear(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recompute: bool = True,
    hidden_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """GELU and the second linear layer of an MLP: h [..., M], weight [C, M], bias [C] or None -> [..., C].

    Args:
        h: [..., M], the pre-activation: the output of the first linear layer.
        weight: [C, M].
        bias: [C] or None.
        recompute: how the public function of this name saves memory; values are the same.
        hidden_bias: [M] or None; ``h`` holds it already, and it only gets its gradient here.

    Returns:
        [..., C], dtype as ``F.linear`` has it, under autocast too.

    Equivalent to::

        F.linear(F.gelu(h + hidden_bias - hidden_bias.detach()), weight, bias)

    Source: "Gaussian Error Linear Units", arXiv 1606.08415; timm's ``Mlp``, which hiera-transformer 0.1.4 uses.
    """
    return F.linear(gelu(h, hidden_bias), weight, bias)


def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    recompute: bool = True,
) -> torch.Tensor:
    """The MLP of a transformer block: linear, GELU by the error function, linear.

    Args:
        x: [..., C].
        w1: [M, C].
        b1: [M] or None.
        w2: [C', M]; in a block C' is C.
        b2: [C'] or None.
        recompute: how the public function of this name saves memory; values are the same.

    Returns:
        [..., C'], dtype as ``F.linear`` has it, under autocast too.

    Equivalent to::

        F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    Source: Hiera (arXiv 2306.00989), figure 2; ``HieraBlock`` in ``hiera/hiera.py`` of hiera-transformer 0.1.4.
    """
    return gelu_linear(F.linear(x, w1, b1), w2, b2)

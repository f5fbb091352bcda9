"""The specification of residual add + LayerNorm, in plain PyTorch: what stands between two halves of a block."""

import torch
import torch.nn.functional as F


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-6,
    drop_scale: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual sum and its LayerNorm.

    Args:
        x: [B, ..., C], any floating dtype.
        branch: [B, ..., C], or None: the sum is ``x`` itself.
        weight: [C] or None, of LayerNorm.
        bias: [C] or None, of LayerNorm.
        eps: added to the variance.
        drop_scale: [B] or None: what each sample's branch is multiplied by; 0, or 1 / (1 - p) of drop path.
        layer_scale: [C] or None: what each channel of the branch is multiplied by.
        normed_dtype: dtype of the second result; None is what ``F.layer_norm`` gives: fp32 under autocast (but for the
            CPU's), else the dtype of the sum.
        branch_bias: [C] or None. The branch holds it already; here it takes part with its gradient alone.

    Returns:
        The sum, in the promoted dtype of ``x``, ``branch`` and ``layer_scale``, and its LayerNorm.

    Equivalent to::

        sum = x + (branch + branch_bias - branch_bias.detach()) * layer_scale * drop_scale[:, None, ..., None]
        normed = F.layer_norm(sum, (C,), weight, bias, eps).to(normed_dtype)

    but for the rounding: products with a scale, and LayerNorm, are computed in fp32 (fp64 for fp64).

    Source: LayerNorm (arXiv 1607.06450), stochastic depth (arXiv 1603.09382), LayerScale (arXiv 2103.17239);
    ``HieraBlock.forward`` in ``hiera/hiera.py`` of hiera-transformer 0.1.4.
    """
    total = x
    if branch is not None:
        if branch_bias is not None:
            branch = branch + (branch_bias - branch_bias.detach()).to(branch.dtype)
        total = residual_sum(x, branch, drop_scale, layer_scale)
    normed = _layer_norm(total, weight, bias, eps, normed_dtype)
    return total, normed.to(layer_norm_dtype(x.device.type, total.dtype) if normed_dtype is None else normed_dtype)


def sum_dtype(
    x: torch.Tensor, branch: torch.Tensor | None = None, layer_scale: torch.Tensor | None = None
) -> torch.dtype:
    """Dtype of ``x + layer_scale * branch``, as PyTorch promotes it."""
    dtype = x.dtype
    if branch is not None:
        for tensor in (branch, layer_scale):
            if tensor is not None and tensor.dtype is not dtype:
                dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which dtype numbers of ``dtype`` are added up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def layer_norm_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype that ``F.layer_norm`` gives for an input of ``dtype``: autocast runs it in fp32, the CPU's autocast not."""
    return accumulator(dtype) if device_type != "cpu" and torch.is_autocast_enabled(device_type) else dtype


def normalize(
    sum: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """LayerNorm of ``sum`` [..., C], given the mean and the reciprocal standard deviation [...] of its rows.

    Equivalent to: ``((sum - mean[..., None]) * rstd[..., None] * weight + bias).to(dtype)``, computed in fp32.
    """
    normed = (sum.to(rstd.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(dtype)


def residual_sum(
    x: torch.Tensor, branch: torch.Tensor, drop_scale: torch.Tensor | None, layer_scale: torch.Tensor | None
) -> torch.Tensor:
    """``x + branch * layer_scale * drop_scale``, scaled in fp32 and rounded once."""
    if drop_scale is None and layer_scale is None:
        return x + branch
    dtype = sum_dtype(x, branch, layer_scale)
    exact = accumulator(dtype)
    scaled = branch.to(exact)
    if layer_scale is not None:
        scaled = scaled * layer_scale.to(exact)
    if drop_scale is not None:
        scaled = scaled * drop_scale.to(exact).reshape(branch.shape[0], *[1] * (branch.ndim - 1))
    return (x + scaled).to(dtype)


def _layer_norm(total, weight, bias, eps, normed_dtype):
    """`F.layer_norm`, also where weight, bias and result have other dtypes than the input; rounded once."""
    exact = total.dtype
    others = (normed_dtype, *(tensor.dtype for tensor in (weight, bias) if tensor is not None))
    if any(dtype not in (None, exact) for dtype in others):
        exact = accumulator(exact)
    weight, bias = (None if tensor is None else tensor.to(exact) for tensor in (weight, bias))
    return F.layer_norm(total.to(exact), (total.shape[-1],), weight, bias, eps)

"""`add_layer_norm`: its arguments, and its way to the op (layer_norm_library.py) or past it (calling.py)."""

import torch

from hiera_kernels.ops import calling, checks
from hiera_kernels.ops.layer_norm_library import NAME, OP, differentiable, resolved_dtype
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import layer_norm as reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = DTYPES[:3]


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
    """Residual add with drop path and layer scale, and LayerNorm of the sum, in one pass over memory.

    Args:
        x: [B, ..., C], fp16, bf16, fp32 or fp64, any strides: the residual stream. B may be 0.
        branch: [B, ..., C], of the shape of ``x``: what attention or MLP gave; None for plain LayerNorm.
        weight: [C] or None: LayerNorm's; it may be fp32 beside 16-bit ``x``, as under autocast.
        bias: [C] or None, likewise.
        eps: added to the variance, at least 0.
        drop_scale: [B] or None: what each sample's branch is multiplied by. For drop path with rate p: 0 with
            probability p, else 1 / (1 - p). It is not differentiable here; one that requires a gradient is served by
            plain operations.
        layer_scale: [C] or None: what each channel of the branch is multiplied by (LayerScale). To give it a gradient,
            the branch is kept for backward.
        normed_dtype: dtype of ``normed``. None is what ``F.layer_norm`` gives: fp32 under autocast (but for the CPU's),
            else the dtype of the sum. Under autocast, its dtype saves the cast that the next Linear would make.
        branch_bias: [C] or None, for a caller that computed ``branch = F.linear(h, w, branch_bias.detach())``: the
            value is in the branch already, its gradient comes from the pass over the branch's gradient made here.

    Returns:
        ``(sum, normed)``, [B, ..., C] each. ``sum`` has the promoted dtype of ``x``, ``branch`` and ``layer_scale``,
        and is ``x`` itself where ``branch`` is None. ``normed`` is the LayerNorm of the rounded sum, computed in fp32.

    Raises:
        TypeError: an argument of a wrong type, or a tensor that is not of one of the four dtypes.
        ValueError: shapes that do not fit together, a negative ``eps``.
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.

    Equivalent to::

        sum = x + (branch + branch_bias - branch_bias.detach()) * layer_scale * drop_scale[:, None, ..., None]
        normed = F.layer_norm(sum, (C,), weight, bias, eps).to(normed_dtype)

    A model rounds ``branch * drop_scale`` to the branch's dtype before it adds; here that product stays in fp32, so
    that of dropped-path sums in 16 bits this one is the more exact.

    Source: LayerNorm (arXiv 1607.06450), stochastic depth (arXiv 1603.09382), LayerScale (arXiv 2103.17239);
    ``HieraBlock.forward`` in ``hiera/hiera.py`` of hiera-transformer 0.1.4.
    """
    return add_layer_norm_with_statistics(
        x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias
    )[:2]


def add_layer_norm_with_statistics(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-6,
    drop_scale: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`add_layer_norm`, and the mean and reciprocal standard deviation of each row: what `linear_of_normed` asks for.

    Both are [B, ...], fp32, without gradient; None where plain PyTorch did the work.
    """
    _check(x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias)
    args = (x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias)
    plain = is_disabled() or refusal(*args[:4], *args[5:]) is not None
    compiling = torch.compiler.is_compiling()
    if plain or (not compiling and calling.transformed()):
        return (*reference.add_layer_norm(*args), None, None)
    args = (*args[:7], resolved_dtype(x, branch, layer_scale, normed_dtype), branch_bias)
    if compiling:
        found = OP(*args)
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        found = differentiable(*args)
    else:
        with calling.below_autograd():
            found = OP(*args)
    return (x if branch is None else found[0], *found[1:])


def refusal(
    x: torch.Tensor,
    branch: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    branch_bias: torch.Tensor | None = None,
) -> str | None:
    """Why a legal input goes to the reference and not to a fused kernel, in words; None where the kernel takes it."""
    tensors = (branch, weight, bias, drop_scale, layer_scale, branch_bias)
    reason = calling.refusal(NAME, _contract, x, *tensors)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is not None and calling.is_foreign(tensor):
            return f"{type(tensor).__name__} knows PyTorch's operations only"
        if tensor is not None and tensor.device != x.device:
            return f"x is on {x.device}, another argument on {tensor.device}"
    if normed_dtype is torch.float64 and x.dtype is not torch.float64:
        return "the fused kernel has no torch.float64"
    if drop_scale is not None and drop_scale.requires_grad:
        return "the fused kernel has no gradient for drop_scale"
    return None


def _contract(*tensors) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"the fused kernel has no {tensor.dtype}"
    return None


def _check(x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor [B, ..., C], got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be a dense tensor [B, ..., C], got one of layout {x.layout}")
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be [B, ..., C] with at least one channel, got shape {tuple(x.shape)}")
    if branch is not None:
        checks.tensor("branch", branch, x.ndim, "of the shape of x")
        if branch.shape != x.shape:
            raise ValueError(f"branch must be of the shape of x, {tuple(x.shape)}, got shape {tuple(branch.shape)}")
    channels = {"weight": weight, "bias": bias, "layer_scale": layer_scale, "branch_bias": branch_bias}
    for name, tensor in channels.items():
        if tensor is not None:
            checks.tensor(name, tensor, 1, "[C]")
            if tensor.shape[0] != x.shape[-1]:
                raise ValueError(f"{name} must be [C], C = {x.shape[-1]}, got shape {tuple(tensor.shape)}")
    if drop_scale is not None:
        checks.tensor("drop_scale", drop_scale, 1, "[B]")
        if drop_scale.shape[0] != x.shape[0]:
            raise ValueError(f"drop_scale must be [B], B = {x.shape[0]}, got shape {tuple(drop_scale.shape)}")
    for name, tensor in ({"x": x, "branch": branch, "drop_scale": drop_scale} | channels).items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if branch is None:
        for name in ("drop_scale", "layer_scale", "branch_bias"):
            if (drop_scale if name == "drop_scale" else channels[name]) is not None:
                raise ValueError(f"{name} must be None where branch is None: there is nothing that it applies to")
    if isinstance(eps, bool) or not isinstance(eps, (float, int)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")
    if normed_dtype is not None and normed_dtype not in DTYPES:
        raise TypeError(f"normed_dtype must be None or one of {', '.join(map(str, DTYPES))}, got {normed_dtype!r}")

"""`mlp` and `gelu_linear`: GELU between two matrix products, without keeping what the backward can compute again.

The products stay with PyTorch (cuBLAS). `gelu_linear` is an autograd.Function that keeps the pre-activation h and not
GELU(h), which the product for the weight's gradient needs: the pass that turns the gradient of GELU(h) into that of h
reads h in any case, and writes GELU(h) beside it. That saves M numbers a token, and costs the backward one write and
one read of them. Without a fused kernel the same is done by plain operations, on any device.

`mlp` composes it with an ordinary `F.linear`; a caller that makes h in another way calls `gelu_linear` itself.
"""

import torch
import torch.nn.functional as F

from hiera_kernels.ops import activation, calling
from hiera_kernels.ops.activation import check_dtypes, check_floating, check_vector, product_dtype
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import feed_forward as reference
from hiera_kernels.reference.activation import with_bias


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
        x: [..., C], fp16, bf16, fp32 or fp64, any strides.
        w1: [M, C], dtype of ``x`` (under autocast any).
        b1: [M] or None.
        w2: [C', M]; in a block C' is C.
        b2: [C'] or None.
        recompute: keep the pre-activation only, and compute GELU's output again in the backward; False keeps both, as
            plain PyTorch does. Values and gradients are the same.

    Returns:
        [..., C'], dtype as ``F.linear`` has it, under autocast too. Gradients come in the dtypes of the arguments;
        what is frozen costs no product, and the gradient of ``b1`` no pass of its own.

    Raises:
        TypeError: an argument that is not a dense tensor of one of the four dtypes, or (without autocast) dtypes that
            differ; a ``recompute`` that is not a bool.
        ValueError: shapes that do not fit together.
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.

    Equivalent to::

        F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    Source: Hiera (arXiv 2306.00989), figure 2; ``HieraBlock`` in ``hiera/hiera.py`` of hiera-transformer 0.1.4, with
    timm's ``Mlp``.
    """
    _check_input("x", x, w1)
    _check_layer("w1", w1, "b1", b1, x.shape[-1], "C, the last dimension of x")
    _check_layer("w2", w2, "b2", b2, w1.shape[0], "M, the first dimension of w1")
    _check_recompute(recompute)
    check_dtypes("x", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    if _plain(x, w1, b1, w2, b2):
        return reference.mlp(x, w1, b1, w2, b2, recompute)
    if b1 is None or not (torch.is_grad_enabled() and b1.requires_grad):
        return _gelu_linear(F.linear(x, w1, b1), w2, b2, recompute, None)
    return _gelu_linear(F.linear(x, w1, b1.detach()), w2, b2, recompute, b1)


def gelu_linear(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recompute: bool = True,
    hidden_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """GELU and the second linear layer of an MLP, which keeps the pre-activation ``h`` only.

    Args:
        h: [..., M], fp16, bf16, fp32 or fp64, any strides: the output of the first linear layer.
        weight: [C, M], dtype of ``h`` (under autocast any).
        bias: [C] or None.
        recompute: as in :func:`mlp`.
        hidden_bias: [M] or None, the bias of the first layer. ``h`` holds it already: it is the output of
            ``F.linear(x, w1, hidden_bias.detach())``. The call gives it its gradient, from the pass that makes the
            gradient of ``h``; its value is not used.

    Returns:
        [..., C], dtype as ``F.linear`` has it, under autocast too.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`mlp`.

    Equivalent to::

        F.linear(F.gelu(h + hidden_bias - hidden_bias.detach()), weight, bias)

    Source: "Gaussian Error Linear Units", arXiv 1606.08415; timm's ``Mlp``, which hiera-transformer 0.1.4 uses.
    """
    _check_input("h", h, weight)
    _check_layer("weight", weight, "bias", bias, h.shape[-1], "M, the last dimension of h")
    check_vector("hidden_bias", hidden_bias, h.shape[-1], "M, the last dimension of h")
    _check_recompute(recompute)
    check_dtypes("h", h=h, weight=weight, bias=bias)
    if _plain(h, weight, bias, hidden_bias):
        return reference.gelu_linear(h, weight, bias, recompute, hidden_bias)
    return _gelu_linear(h, weight, bias, recompute, hidden_bias)


def _plain(*tensors: torch.Tensor | None) -> bool:
    """Whether plain operations are the better choice, or the only one that is right."""
    if is_disabled() or any(t is not None and calling.is_foreign(t) for t in tensors):
        return True
    if torch.compiler.is_compiling():
        # Without a kernel there is nothing to gain: the partitioner recomputes as it sees fit.
        return activation.refusal(tensors[0]) is not None
    return calling.transformed()


def _gelu_linear(h, weight, bias, recompute, hidden_bias):
    fused = activation.refusal(h) is None
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (h, weight, bias, hidden_bias)
    ):
        return F.linear(activation.activated(h, fused), weight, bias)
    # Casts that autograd sees: gradients come back in the dtypes of the parameters.
    dtype = product_dtype(weight)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _GeluLinear.apply(h, weight, bias, hidden_bias, recompute, fused)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(h)) that saves h; `fused`: by the op, or by plain operations, which differentiate again."""

    @staticmethod
    def forward(ctx, h, weight, bias, hidden_bias, recompute, fused):
        a = activation.activated(h, fused).to(weight.dtype)
        # GELU(h) is for the gradient of the weight, h for that of h.
        keep = not recompute and ctx.needs_input_grad[1]
        ctx.save_for_backward(h, weight, hidden_bias, *((a,) if keep else ()))
        ctx.fused, ctx.keep = fused, keep
        return F.linear(a, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.compiler.is_compiling():
            return _backward(ctx, grad_out)
        with calling.below_autocast():  # a backward that is called under autocast computes as the forward did
            return _backward(ctx, grad_out)


def _backward(ctx, grad_out):
    h, weight, hidden_bias, *kept = ctx.saved_tensors
    to_h, to_weight, to_bias, to_hidden_bias = ctx.needs_input_grad[:4]
    grad_h = grad_weight = grad_bias = grad_hidden_bias = None
    a = kept[0] if ctx.keep else None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # For a second derivative everything is a function of h, and h one of the bias that it holds.
        h, a = with_bias(h, hidden_bias), None
    # [rows, C]
    grad_rows = grad_out.reshape(-1, weight.shape[0])
    if to_h or to_hidden_bias:
        # [..., M]
        grad_a = (grad_rows @ weight).reshape(h.shape)
        output = to_weight and a is None
        grad_h, recomputed, sums = activation.gradients(grad_a, h, output, to_hidden_bias, ctx.fused)
        a = recomputed if output else a
        grad_hidden_bias = sums.to(hidden_bias.dtype) if to_hidden_bias else None
    if to_weight:
        a = activation.activated(h, ctx.fused) if a is None else a
        # [C, M]
        grad_weight = grad_rows.t() @ a.to(weight.dtype).reshape(-1, weight.shape[1])
    if to_bias:
        grad_bias = grad_rows.sum(0)
    return grad_h if to_h else None, grad_weight, grad_bias, grad_hidden_bias, None, None


# ---- arguments ----


def _check_input(name, value, weight) -> None:
    check_floating(name, value, "[..., C]" if name == "x" else "[..., M]")
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got shape {tuple(value.shape)}")


def _check_layer(name, weight, bias_name, bias, width, words) -> None:
    check_floating(name, weight, "[out, in]")
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"{name} must be [out, {width}]: {words}, got shape {tuple(weight.shape)}")
    check_vector(bias_name, bias, weight.shape[0], f"the first dimension of {name}")


def _check_recompute(recompute) -> None:
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {recompute!r}")

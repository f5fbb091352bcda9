"""A Linear on the output of a LayerNorm, which does not keep that output: backward makes it once more.

Internal: the blocks of accelerated models call it. A Linear keeps its input for the gradient of its weight. Where that
input is LayerNorm's output, there is a cheaper way to it: the residual sum lives anyway, and mean and rstd are 8 bytes
a row. One pass over memory makes the input again when backward asks for it::

    total, normed, mean, rstd = add_layer_norm_with_statistics(x, branch, norm.weight, norm.bias, norm.eps)
    y = linear_of_normed(normed, total, mean, rstd, norm.weight, norm.bias, fc.weight, fc.bias)

`normed` is the argument that the gradient flows through, to LayerNorm's own backward; total, mean, rstd and LayerNorm's
parameters are only what it is made from again. Drop `normed` after the call and its memory is free.

A kernel registers for its device under ``normalize(sum, mean, rstd, weight, bias, dtype) -> normed``: sum [..., C], any
strides, mean and rstd [...], contiguous -> [..., C], contiguous, with the forward's own bits.
"""

import torch
import torch.nn.functional as F

from hiera_kernels.ops import calling
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import layer_norm as reference

NAME = "normalize"

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define(
    "normalize(Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.hiera_kernels.normalize.default


def linear_of_normed(
    normed: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``F.linear(normed, weight, bias)``, keeping ``total``, ``mean`` and ``rstd`` for backward in place of ``normed``.

    Args:
        normed: [..., C], any floating dtype: LayerNorm's output.
        total: [..., C], what LayerNorm was of.
        mean: [...] and
        rstd: [...], fp32: of the rows of ``total``. None (no kernel has served) makes this a plain ``F.linear``.
        norm_weight: [C] or None, LayerNorm's; likewise
        norm_bias: [C] or None.
        weight: [O, C], the Linear's. Under autocast both are cast as ``F.linear`` casts them.
        bias: [O] or None. Detached, where its gradient is made elsewhere (`branch_bias` of the next op).

    Returns:
        [..., O]; the dtype that ``F.linear`` gives.

    Raises:
        NotImplementedError: a second derivative is asked for; ``hiera_kernels.disabled()`` has it.

    Equivalent to::

        F.linear(normed, weight, bias)
    """
    tensors = (normed, total, weight, bias)
    if mean is None or rstd is None or is_disabled() or any(calling.is_foreign(t) for t in tensors if t is not None):
        return F.linear(normed, weight, bias)
    if not torch.compiler.is_compiling() and calling.transformed():
        return F.linear(normed, weight, bias)
    if not torch.is_grad_enabled() or not weight.requires_grad:  # nobody will ask for the input
        return F.linear(normed, weight, bias)
    dtype = normed.dtype
    if (cast := calling.autocast_dtype(normed) or calling.autocast_dtype(weight)) is not None:
        normed, weight, bias = (None if t is None else t.to(cast) for t in (normed, weight, bias))
    statistics = (total.detach(), mean, rstd, *(None if t is None else t.detach() for t in (norm_weight, norm_bias)))
    return _LinearOfNormed.apply(normed, weight, bias, dtype, *statistics)


class _LinearOfNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, normed, weight, bias, dtype, total, mean, rstd, norm_weight, norm_bias):
        ctx.save_for_backward(weight, total, mean, rstd, norm_weight, norm_bias)
        ctx.dtypes = (dtype, normed.dtype, None if bias is None else bias.dtype)
        return F.linear(normed, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        args = (grad_out, ctx.dtypes, ctx.needs_input_grad, *ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # AOTAutograd refuses by itself
            gradients = _Refusing.apply(*args)
        else:
            gradients = _gradients(*args)
        return *gradients, *[None] * 6


def _gradients(grad_out, dtypes, needs, weight, total, mean, rstd, norm_weight, norm_bias):
    """Of normed, weight and bias: what `F.linear`'s backward does, on an input that is made again."""
    dtype, product_dtype, bias_dtype = dtypes
    rows = grad_out.reshape(-1, grad_out.shape[-1])
    grad_normed = grad_weight = grad_bias = None
    if needs[0]:
        grad_normed = grad_out @ weight
    if needs[1]:
        # LayerNorm is computed in fp32: a cast of its fp32 output is that output in the other dtype.
        dtype = product_dtype if dtype is rstd.dtype else dtype
        normed = _OP(total, mean, rstd, norm_weight, norm_bias, dtype).to(product_dtype)
        grad_weight = rows.t() @ normed.reshape(-1, normed.shape[-1])
    if needs[2]:
        grad_bias = rows.sum(0).to(bias_dtype)
    return grad_normed, grad_weight, grad_bias


class _Refusing(torch.autograd.Function):
    """The same under ``create_graph=True``: a second derivative would miss what depends on `normed`, in silence."""

    @staticmethod
    def forward(ctx, *args):
        return _gradients(*args)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "hiera_kernels.add_layer_norm has no second derivative, nor has the Linear behind it; compute this one "
            "under `with hiera_kernels.disabled():`, which runs plain PyTorch"
        )


# ---- normalize: what the op does where no device kernel is registered, and its contract ----


def default(sum, mean, rstd, weight, bias, dtype):
    """By plain operations, on any device and below autograd."""
    # As F.layer_norm has it, all of it in the dtype of the sums: the forward's own bits, or one rounding beside them.
    weight, bias = (None if t is None else t.to(rstd.dtype) for t in (weight, bias))
    return reference.normalize(sum, mean, rstd, weight, bias, dtype).contiguous()


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(sum, mean, rstd, weight, bias, dtype):
    return sum.new_empty(sum.shape, dtype=dtype)


class _Normalize(torch.autograd.Function):
    """For a direct call with inputs that require a gradient: no silent zero."""

    @staticmethod
    def forward(ctx, *args):
        with calling.below_autograd():
            return _OP(*args)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("hiera_kernels::normalize has no derivative; F.layer_norm has")


_library.impl(NAME, default, "CompositeExplicitAutograd")
calling.define_autograd(_library, NAME, _Normalize, default)

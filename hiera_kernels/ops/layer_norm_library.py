"""The torch.library contract of `add_layer_norm`, and what a device kernel has to provide.

A kernel registers for its device under these names; rows are all dimensions but the last, R of them:

``add_layer_norm(x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias)``
    -> (sum, normed, mean, rstd): sum and normed [..., C], contiguous; sum is empty, [0], where branch is None (x is the
    sum). mean and rstd [...], in fp32, of the rows of the *rounded* sum, so that backward finds them again.
    ``branch_bias`` is not read: the branch holds it.
``add_layer_norm_backward(grad_sum, grad_normed, sum, mean, rstd, weight, branch, drop_scale, layer_scale, x_dtype,
    branch_dtype, wanted)`` -> (grad_x, grad_branch, grad_channels)
    Either gradient may be None, not both. ``wanted`` says which gradients are asked for: x, branch, weight, bias,
    layer_scale, branch_bias. ``branch`` is given where layer_scale's is. grad_branch is empty where it equals grad_x:
    no scale and one dtype (`shared_gradient`); grad_x then serves both. What nobody wants is empty, [0].
    grad_channels [wanted per-channel gradients, C], fp32, in the order above. Empty rows of gradients are zero.
``normalize(sum, mean, rstd, weight, bias, dtype)`` -> normed: what the forward wrote, once more (normed_linear.py).

What is kept for backward: sum (an output that lives anyway), mean and rstd (8 bytes a row), and the branch only where
layer_scale asks for its gradient. The public function: layer_norm.py.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from hiera_kernels.ops import calling
from hiera_kernels.reference import layer_norm as reference
from hiera_kernels.reference.layer_norm import accumulator, sum_dtype

NAME = "add_layer_norm"

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define(
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps=1e-6, Tensor? drop_scale=None, "
    "Tensor? layer_scale=None, ScalarType? normed_dtype=None, Tensor? branch_bias=None) "
    "-> (Tensor sum, Tensor normed, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "add_layer_norm_backward(Tensor? grad_sum, Tensor? grad_normed, Tensor sum, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? branch, Tensor? drop_scale, Tensor? layer_scale, ScalarType x_dtype, "
    "ScalarType branch_dtype, bool[] wanted) -> (Tensor grad_x, Tensor grad_branch, Tensor grad_channels)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
OP = torch.ops.hiera_kernels.add_layer_norm.default
OP_BACKWARD = torch.ops.hiera_kernels.add_layer_norm_backward.default


def resolved_dtype(x, branch, layer_scale, normed_dtype) -> torch.dtype:
    """`normed_dtype`, or where it is None what `F.layer_norm` would give here."""
    if normed_dtype is not None:
        return normed_dtype
    return reference.layer_norm_dtype(x.device.type, sum_dtype(x, branch, layer_scale))


def shared_gradient(x_dtype, branch_dtype, drop_scale, layer_scale) -> bool:
    """Whether the gradient of the branch is the gradient of x, number for number."""
    return drop_scale is None and layer_scale is None and x_dtype is branch_dtype


# ---- what the op does where no device kernel is registered ----


def default(x, branch, weight, bias, eps=1e-6, drop_scale=None, layer_scale=None, normed_dtype=None, branch_bias=None):
    """The forward by plain operations, on any device and below autograd."""
    total = x
    if branch is not None:
        total = reference.residual_sum(x, branch, drop_scale, layer_scale)
    normed_dtype = total.dtype if normed_dtype is None else normed_dtype
    exact = accumulator(total.dtype)
    weight, bias = (None if tensor is None else tensor.to(exact) for tensor in (weight, bias))
    normed, mean, rstd = torch.native_layer_norm(total.to(exact).contiguous(), x.shape[-1:], weight, bias, eps)
    total = x.new_empty(0) if branch is None else total.contiguous()
    return total, normed.to(normed_dtype), mean.squeeze(-1), rstd.squeeze(-1)


def default_backward(
    grad_sum, grad_normed, sum, mean, rstd, weight, branch, drop_scale, layer_scale, x_dtype, branch_dtype, wanted
):
    """The backward by plain operations, on any device and below autograd."""
    exact = accumulator(sum.dtype)
    # A copy where nothing would be added to it: what an op returns is no input of it.
    grad = None if grad_sum is None else grad_sum.to(exact, copy=grad_normed is None)
    channels = sum.shape[-1]
    if grad_normed is not None:
        arguments = (grad_normed.to(exact).contiguous(), sum.to(exact).contiguous(), (channels,))
        statistics = (mean.unsqueeze(-1).to(exact), rstd.unsqueeze(-1).to(exact))
        weight = torch.ones(channels, dtype=exact, device=sum.device) if weight is None else weight.to(exact)
        through, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            *arguments, *statistics, weight, weight, [True, True, True]
        )
        grad = through if grad is None else grad + through
    else:
        grad_weight = grad_bias = torch.zeros(channels, dtype=exact, device=sum.device)
    factor = None if drop_scale is None else drop_scale.to(exact).reshape(sum.shape[0], *[1] * (sum.ndim - 1))
    dropped = grad if factor is None else grad * factor
    grad_branch = dropped if layer_scale is None else dropped * layer_scale.to(exact)
    per_channel = (
        lambda: grad_weight,
        lambda: grad_bias,
        lambda: (dropped * branch.to(exact)).flatten(0, -2).sum(0),
        lambda: grad_branch.flatten(0, -2).sum(0),
    )
    sums = [make() for make, asked in zip(per_channel, wanted[2:], strict=True) if asked]
    grad_channels = torch.stack(sums) if sums else sum.new_empty(0, dtype=exact)
    shared = shared_gradient(x_dtype, branch_dtype, drop_scale, layer_scale)
    grad_x = grad.to(x_dtype).contiguous() if wanted[0] or (wanted[1] and shared) else sum.new_empty(0, dtype=x_dtype)
    separate = wanted[1] and not shared
    grad_branch = grad_branch.to(branch_dtype).contiguous() if separate else sum.new_empty(0, dtype=branch_dtype)
    return grad_x, grad_branch, grad_channels


_library.impl(NAME, default, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", default_backward, "CompositeExplicitAutograd")


# ---- shapes without data ----


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(x, branch, weight, bias, eps=1e-6, drop_scale=None, layer_scale=None, normed_dtype=None, branch_bias=None):
    dtype = sum_dtype(x, branch, layer_scale)
    total = x.new_empty((0,) if branch is None else x.shape, dtype=dtype)
    normed = x.new_empty(x.shape, dtype=dtype if normed_dtype is None else normed_dtype)
    return total, normed, *(x.new_empty(x.shape[:-1], dtype=accumulator(dtype)) for _ in range(2))


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}_backward", lib=_library)
def _fake_backward(
    grad_sum, grad_normed, sum, mean, rstd, weight, branch, drop_scale, layer_scale, x_dtype, branch_dtype, wanted
):
    shared = shared_gradient(x_dtype, branch_dtype, drop_scale, layer_scale)
    count = len([asked for asked in wanted[2:] if asked])
    return (
        sum.new_empty(sum.shape if wanted[0] or (wanted[1] and shared) else (0,), dtype=x_dtype),
        sum.new_empty(sum.shape if wanted[1] and not shared else (0,), dtype=branch_dtype),
        sum.new_empty((count, sum.shape[-1]) if count else (0,), dtype=accumulator(sum.dtype)),
    )


# ---- autograd, forward-mode AD, autocast, FLOPs ----


class _AddLayerNorm(torch.autograd.Function):
    """The op with its derivative: all four outputs, of which mean and rstd have no gradient."""

    @staticmethod
    def forward(
        ctx, x, branch, weight, bias, eps=1e-6, drop_scale=None, layer_scale=None, normed_dtype=None, branch_bias=None
    ):
        needs = (*ctx.needs_input_grad, *[False] * 9)[:9]  # the dispatcher leaves out trailing defaults
        if needs[5]:
            raise NotImplementedError(
                "hiera_kernels.add_layer_norm has no gradient for drop_scale; compute it under "
                "`with hiera_kernels.disabled():`, which runs plain PyTorch"
            )
        with calling.below_autograd():
            total, normed, mean, rstd = OP(
                x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias
            )
        kept = branch if layer_scale is not None and needs[6] else None
        ctx.save_for_backward(x if branch is None else total, mean, rstd, weight, kept, drop_scale, layer_scale)
        ctx.mark_non_differentiable(mean, rstd, *([total] if branch is None else []))
        ctx.set_materialize_grads(False)
        ctx.wanted = [needs[i] for i in (0, 1, 2, 3, 6, 8)]
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, weight, bias, layer_scale, branch_bias)]
        return total, normed, mean, rstd

    @staticmethod
    def backward(ctx, grad_sum, grad_normed, *_):
        found = [None] * 6
        if grad_sum is not None or grad_normed is not None:
            found = _gradients(ctx, grad_sum, grad_normed)
        grad_x, grad_branch, grad_weight, grad_bias, grad_layer_scale, grad_branch_bias = found
        answer = (grad_x, grad_branch, grad_weight, grad_bias, None, None, grad_layer_scale, None, grad_branch_bias)
        return answer[: len(ctx.needs_input_grad)]


def _gradients(ctx, grad_sum, grad_normed):
    """Gradients of x, branch, weight, bias, layer_scale and branch_bias, each None where nobody asked."""
    total, mean, rstd, weight, branch, drop_scale, layer_scale = ctx.saved_tensors
    wanted, (x_dtype, branch_dtype) = list(ctx.wanted), ctx.dtypes[:2]
    branch_dtype = x_dtype if branch_dtype is None else branch_dtype
    if grad_normed is None:  # as where normed was never used: no gradient, not one of zeros
        wanted[2] = wanted[3] = False
    args = (grad_sum, grad_normed, total, mean, rstd, weight, branch, drop_scale, layer_scale)
    args += (x_dtype, branch_dtype, wanted)
    if torch.is_grad_enabled() or calling.transformed():  # the backward op's own formula refuses what comes next
        grad_x, grad_branch, grad_channels = OP_BACKWARD(*args)
    else:
        with calling.below_autograd():
            grad_x, grad_branch, grad_channels = OP_BACKWARD(*args)
    if wanted[1] and shared_gradient(x_dtype, branch_dtype, drop_scale, layer_scale):
        grad_branch = grad_x
    rows = iter(grad_channels)
    sums = [next(rows).to(dtype) if asked else None for asked, dtype in zip(wanted[2:], ctx.dtypes[2:], strict=True)]
    return [grad_x if wanted[0] else None, grad_branch if wanted[1] else None, *sums]


def differentiable(*args) -> tuple[torch.Tensor, ...]:
    """The op, recorded by autograd."""
    return _AddLayerNorm.apply(*args)


def _plain(x, branch, weight, bias, eps=1e-6, drop_scale=None, layer_scale=None, normed_dtype=None, branch_bias=None):
    args = (x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias)
    total, normed = reference.add_layer_norm(*args)
    _, _, mean, rstd = default(total.detach(), None, None, None, eps)
    return total if branch is not None else x.new_empty(0), normed, mean, rstd


def _autocast(
    x, branch, weight, bias, eps=1e-6, drop_scale=None, layer_scale=None, normed_dtype=None, branch_bias=None
):
    normed_dtype = resolved_dtype(x, branch, layer_scale, normed_dtype)
    with calling.below_autocast():
        return OP(x, branch, weight, bias, eps, drop_scale, layer_scale, normed_dtype, branch_bias)


calling.define_autograd(_library, NAME, _AddLayerNorm, _plain)
calling.refuse_second_derivative(_library, NAME)
for _key in calling.AUTOCAST_KEYS:
    _library.impl(NAME, _autocast, _key)


@register_flop_formula([torch.ops.hiera_kernels.add_layer_norm, torch.ops.hiera_kernels.add_layer_norm_backward])
def _flops(*args, out_shape=None, **kwargs) -> int:
    """None: torch.utils.flop_counter counts matrix products, and so counts nothing for F.layer_norm either."""
    return 0

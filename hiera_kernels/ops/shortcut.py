"""`linear_q_pool`: its arguments and its torch.library contract.

A kernel registers for its device, C and Co for the channels of x and of the output, R = N/P for the pooled tokens:

``linear_q_pool(x, weight, bias, stride, ties, save_winners) -> (out, winners)``
    x [B, N, C], weight [Co, C], bias [Co] or None, all of one dtype -> out [B, R, Co], contiguous. The products are
    rounded to that dtype before they are compared: values that tie in plain PyTorch tie here. With ``save_winners``,
    winners [B, R, Co] in uint8: for ties="first" which of the P tokens is the first maximum (P <= 256), for "split" a
    bit for each of them that is a maximum (P <= 8), none where the maximum is NaN; else empty, [0].
``linear_q_pool_backward(grad_out, x, weight, winners, stride, ties, needs) -> (grad_x, grad_weight, grad_bias)``
    ``needs``: which of the three are wanted; the others are empty, [0]. grad_x [B, N, C] and grad_weight [Co, C] in the
    dtype of x, grad_bias [Co] in fp32 (fp64 for fp64).

Tensors may have any strides. Arguments that equal their defaults may be left out by the dispatcher. How the public
function gets to the op, or past it: calling.py.
"""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from hiera_kernels.ops import calling, checks
from hiera_kernels.ops.activation import DTYPES, check_dtypes, check_floating, check_vector, product_dtype
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import shortcut as reference

NAME = "linear_q_pool"
KERNEL_DTYPES = DTYPES[:3]
# What one byte holds: the number of a token, or a bit for each.
MAX_STRIDE = {"first": 256, "split": 8}

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define(
    'linear_q_pool(Tensor x, Tensor weight, Tensor? bias, SymInt stride, str ties="first", bool save_winners=False) '
    "-> (Tensor out, Tensor winners)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_q_pool_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor winners, SymInt stride, str ties, "
    "bool[3] needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.hiera_kernels.linear_q_pool.default
_OP_BACKWARD = torch.ops.hiera_kernels.linear_q_pool_backward.default


def linear_q_pool(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ties: str = "first"
) -> torch.Tensor:
    """A linear layer and max-pooling of its output over the pool stride, the slowest token axis.

    The shortcut of a block that pools: a fused kernel never writes the un-pooled product, and keeps ``x`` and one byte
    for each number of the result.

    Args:
        x: [B, N, Cin], fp16, bf16, fp32 or fp64, any strides, tokens in unrolled order. B may be 0.
        weight: [Cout, Cin], dtype of ``x`` (under autocast any).
        bias: [Cout] or None, likewise.
        stride: P, the flattened pool stride (4 for 2x2); it divides N.
        ties: where the gradient goes when several of the P products, as rounded to their dtype, are the maximum:
            ``"first"`` to the first of them (``max(dim)``: hiera-transformer, SAM 2), ``"split"`` evenly (``amax``:
            timm).

    Returns:
        [B, N/stride, Cout], contiguous, dtype as ``F.linear`` has it, under autocast too. NaN wins over every number.

    Raises:
        TypeError: an argument of a wrong type, or (without autocast) dtypes that differ.
        ValueError: shapes that do not fit together, ``stride`` is below 1 or does not divide N, another ``ties``.
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.

    Equivalent to::

        F.linear(x, weight, bias).reshape(B, P, N // P, Cout).max(dim=1).values       # amax(dim=1) for "split"

    Source: Hiera (arXiv 2306.00989), section 3.2; ``do_pool(self.proj(x_norm), stride)`` in ``HieraBlock``,
    ``hiera/hiera.py`` of hiera-transformer 0.1.4.
    """
    _check(x, weight, bias, stride, ties)
    if is_disabled() or refusal(x, weight, bias, stride, ties) is not None:
        return reference.linear_q_pool(x, weight, bias, stride, ties)
    if not torch.compiler.is_compiling() and calling.transformed():
        return reference.linear_q_pool(x, weight, bias, stride, ties)
    x, weight, bias = _as_autocast_has_it(x, weight, bias)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.compiler.is_compiling():
        return _OP(x, weight, bias, stride, ties, recorded)[0]
    if recorded:
        return _LinearQPool.apply(x, weight, bias, stride, ties, True)[0]
    with calling.below_autograd():
        return _OP(x, weight, bias, stride, ties)[0]


def refusal(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ties: str = "first"
) -> str | None:
    """Why a legal input goes to the reference and not to a fused kernel, in words; None where the kernel takes it."""
    for tensor in (weight, bias):
        if tensor is not None and calling.is_foreign(tensor):
            return f"{type(tensor).__name__} knows PyTorch's operations only"
    return calling.refusal(NAME, contract, x, product_dtype(x), stride, ties)


def contract(x: torch.Tensor, dtype: torch.dtype, stride: int, ties: str) -> str | None:
    """What is asked of no kernel, in words. dtype: of the product, under autocast perhaps another than that of x."""
    if dtype not in KERNEL_DTYPES:
        return f"the fused kernel has no {dtype}"
    if stride > MAX_STRIDE[ties]:
        return f"stride is {stride}; a winner is kept in one byte, which holds {MAX_STRIDE[ties]} for ties={ties!r}"
    return None


def _check(x, weight, bias, stride, ties) -> None:
    checks.tensor("x", x, 3, "[B, N, Cin]")
    check_floating("x", x, "[B, N, Cin]")
    check_floating("weight", weight, "[Cout, Cin]")
    if weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"weight must be [Cout, {x.shape[2]}]: Cin, the last dimension of x, got shape {tuple(weight.shape)}"
        )
    check_vector("bias", bias, weight.shape[0], "Cout, the first dimension of weight")
    calling.check_count("stride", stride)
    if x.shape[1] % stride != 0:
        raise ValueError(
            f"stride must divide the number of tokens in x, got stride={stride} for shape {tuple(x.shape)}"
        )
    calling.check_ties(ties)
    check_dtypes("x", x=x, weight=weight, bias=bias)


def _as_autocast_has_it(*tensors):
    """The tensors in the dtype that autocast gives to the operands of a matrix product, by casts that autograd sees."""
    return [None if t is None else t.to(product_dtype(t)) for t in tensors]


# ---- what the op does where no device kernel is registered ----


def default(x, weight, bias, stride, ties="first", save_winners=False):
    """The forward by plain operations, on any device and below autograd."""
    _check_byte(stride, ties)
    product = F.linear(x, weight, bias)
    groups = product.reshape(x.shape[0], stride, x.shape[1] // stride, weight.shape[0])
    if ties == "first":
        out, winners = groups.max(dim=1)
    else:
        out = groups.amax(dim=1)
        winners = sum((groups[:, p] == out).to(torch.uint8) << p for p in range(stride)) if save_winners else None
    return out.contiguous(), winners.to(torch.uint8) if save_winners else _nothing(x, torch.uint8)


def default_backward(grad_out, x, weight, winners, stride, ties, needs):
    """The backward by plain operations, on any device and below autograd."""
    # [B, P, R, Co]
    grad = unpooled(grad_out, winners, stride, ties)
    grad_rows, x_rows = grad.reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[2])
    return (
        (grad_rows @ weight).reshape(x.shape) if needs[0] else _nothing(x, x.dtype),
        grad_rows.t() @ x_rows if needs[1] else _nothing(x, x.dtype),
        grad_rows.sum(0, dtype=_accumulator(x)) if needs[2] else _nothing(x, _accumulator(x)),
    )


def unpooled(grad_out: torch.Tensor, winners: torch.Tensor, stride: int, ties: str) -> torch.Tensor:
    """The gradient of the un-pooled product: grad_out and winners [B, R, Co] -> [B, P, R, Co]."""
    i_p = torch.arange(stride, device=winners.device, dtype=torch.uint8)[:, None, None]
    if ties == "first":
        return torch.where(winners[:, None] == i_p, grad_out[:, None], 0)
    bits = (winners[:, None] >> i_p) & 1
    return grad_out[:, None] * bits / bits.sum(1, keepdim=True).to(grad_out.dtype)  # as the derivative of amax


def _nothing(x, dtype):
    return x.new_empty(0, dtype=dtype)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _check_byte(stride, ties) -> None:
    if stride > MAX_STRIDE[ties]:
        raise ValueError(
            f"stride must be at most {MAX_STRIDE[ties]} for ties={ties!r}, where a winner is one byte, got {stride}; "
            "hiera_kernels.linear_q_pool takes any"
        )


_library.impl(NAME, default, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", default_backward, "CompositeExplicitAutograd")


# ---- shapes without data ----


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(x, weight, bias, stride, ties="first", save_winners=False):
    shape = (x.shape[0], x.shape[1] // stride, weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_winners else (0,), dtype=torch.uint8)


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}_backward", lib=_library)
def _fake_backward(grad_out, x, weight, winners, stride, ties, needs):
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        x.new_empty(weight.shape if needs[1] else (0,)),
        x.new_empty(weight.shape[0] if needs[2] else 0, dtype=_accumulator(x)),
    )


# ---- autograd, forward-mode AD, autocast ----


class _LinearQPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, ties="first", save_winners=False):
        with calling.below_autograd():
            out, winners = _OP(x, weight, bias, stride, ties, True)
        # What a frozen partner does not need is not kept: x is for the gradient of weight, weight for that of x.
        to_x, to_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(winners, x if to_weight else None, weight if to_x else None)
        ctx.arguments = (stride, ties)
        ctx.like = x.dtype, tuple(x.shape), tuple(weight.shape)
        ctx.bias_dtype = None if bias is None else bias.dtype
        winners = winners if save_winners else _nothing(x, torch.uint8)
        ctx.mark_non_differentiable(winners)
        return out, winners

    @staticmethod
    def backward(ctx, grad_out, _):
        winners, x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dtype, x_shape, weight_shape = ctx.like
        # In place of what was not kept, its shape: one number, expanded, that nothing reads.
        x = winners.new_empty(1, dtype=dtype).expand(x_shape) if x is None else x
        weight = winners.new_empty(1, dtype=dtype).expand(weight_shape) if weight is None else weight
        args = (grad_out, x, weight, winners, *ctx.arguments, list(needs[:3]))
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or calling.transformed():
            grads = _OP_BACKWARD(*args)  # its own formula refuses to be differentiated
        else:
            with calling.below_autograd():
                grads = _OP_BACKWARD(*args)
        grad_x, grad_weight, grad_bias = (grad if needed else None for grad, needed in zip(grads, needs, strict=False))
        grad_bias = grad_bias.to(ctx.bias_dtype) if needs[2] else None
        return (grad_x, grad_weight, grad_bias, None, None, None)[: len(needs)]


def _plain(x, weight, bias, stride, ties="first", save_winners=False):
    with torch.no_grad():
        winners = default(x, weight, bias, stride, ties, True)[1] if save_winners else _nothing(x, torch.uint8)
    return reference.linear_q_pool(x, weight, bias, stride, ties).contiguous(), winners


def _autocast(x, weight, bias, stride, ties="first", save_winners=False):
    tensors = _as_autocast_has_it(x, weight, bias)
    with calling.below_autocast():
        return _OP(*tensors, stride, ties, save_winners)


calling.define_autograd(_library, NAME, _LinearQPool, _plain)
calling.refuse_second_derivative(_library, NAME)
for _key in calling.AUTOCAST_KEYS:
    _library.impl(NAME, _autocast, _key)


# ---- FLOPs ----


@register_flop_formula(torch.ops.hiera_kernels.linear_q_pool)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.hiera_kernels.linear_q_pool_backward)
def _flops_backward(
    grad_shape, x_shape, weight_shape, winners_shape, stride, ties, needs, out_shape=None, **kwargs
) -> int:
    return sum(needs[:2]) * _flops(x_shape, weight_shape)

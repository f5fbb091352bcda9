"""`mask_unit_attention`: its arguments, its torch.library contract, and what a device kernel has to provide.

A kernel registers for its device, ``Library("hiera_kernels", "IMPL").impl(name, launch, "CUDA")``, under these names:

``mask_unit_attention(qkv, num_heads, num_windows, q_stride, scale, ties, bias, save_lse) -> (out, lse)``
    qkv [B, N, 3*C] -> out [B, N/q_stride, C], contiguous. With ``save_lse``, lse [B, W, H, S] in fp32: the natural
    logarithm of the softmax's denominator, of scaled logits (windows before heads and queries, so that a program
    writes whole sectors); without it lse is empty, [0]. ``bias`` is not read (below).
``mask_unit_attention_backward(grad_out, qkv, out, lse, num_heads, ..., ties, bias_grad) -> (grad_qkv, grad_bias)``
    One packed grad_qkv [B, N, 3*C], contiguous. With ``bias_grad``, grad_bias [3*C] in fp32 is grad_qkv summed over B
    and N; without it, empty, [0]. ``out`` and ``lse`` are a ``save_lse`` forward's, else both are None; a kernel may
    ignore them, and the Triton kernels and the default do: they recompute the softmax from qkv. They are there for
    kernels that do not have whole rows on chip.

Arguments that equal their defaults may be left out by the dispatcher: a launch function repeats the defaults. It meets
neither autograd nor autocast, but tensors of any strides. What it does not serve it says beforehand, in
``calling.limits``, and hands over to `default` and `default_backward`, which take the same arguments.

``bias`` is for a caller that computes ``qkv = F.linear(x, weight, bias.detach())``: qkv holds the bias already, and the
op gives ``bias`` its gradient from the pass over grad_qkv that it makes anyway. What the op means is
``f(qkv + bias - bias.detach())``.

How the public function gets to the op, or past it: calling.py.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from hiera_kernels.ops import calling, checks
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import attention as reference

NAME = "mask_unit_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What a kernel is asked to serve that has not told its own limits (calling.limits); the rest goes to the reference.
KERNEL_DTYPES = DTYPES[:3]
KERNEL_MAX_HEAD_DIM = 128
KERNEL_MAX_KEYS = 256

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define(
    "mask_unit_attention(Tensor qkv, SymInt num_heads, SymInt num_windows=1, SymInt q_stride=1, float? scale=None, "
    'str ties="first", Tensor? bias=None, bool save_lse=False) -> (Tensor out, Tensor lse)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "mask_unit_attention_backward(Tensor grad_out, Tensor qkv, Tensor? out, Tensor? lse, SymInt num_heads, "
    'SymInt num_windows=1, SymInt q_stride=1, float? scale=None, str ties="first", bool bias_grad=False) '
    "-> (Tensor grad_qkv, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.hiera_kernels.mask_unit_attention.default
_OP_BACKWARD = torch.ops.hiera_kernels.mask_unit_attention_backward.default


def mask_unit_attention(
    qkv: torch.Tensor,
    num_heads: int,
    num_windows: int = 1,
    q_stride: int = 1,
    scale: float | None = None,
    ties: str = "first",
) -> torch.Tensor:
    """Multi-head attention inside each mask unit, with queries max-pooled over the stride of a pooling block.

    B batch, N tokens, W windows, P pool stride, S queries and K = P*S keys per window, H heads, D head dim, C = H*D.

    Args:
        qkv: [B, N, 3*C], fp16, bf16, fp32 or fp64, any strides: the output of the qkv Linear, packed (3, H, D), tokens
            in unrolled order ``n = (p*S + s)*W + w``. B may be 0.
        num_heads: H.
        num_windows: W, the number of mask units; 1 is global attention.
        q_stride: P, the flattened pool stride (4 for 2x2); N is a multiple of W*P.
        scale: factor on the logits; None is ``D ** -0.5``.
        ties: where the gradient of a pooled query goes when several of its P tokens are the maximum: ``"first"`` to the
            first of them (``max(dim)``: hiera-transformer, SAM 2), ``"split"`` evenly (``amax``: timm).

    Returns:
        [B, N/q_stride, C] in unrolled order (``n = s*W + w``), contiguous; dtype of ``qkv``, or under autocast the
        autocast dtype, as ``scaled_dot_product_attention`` has it.

    Raises:
        TypeError: an argument of a wrong type, or a ``qkv`` that is not of one of the four dtypes.
        ValueError: shapes that do not fit together, a count below 1, another ``ties``.
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.
            (Where no kernel serves the input, PyTorch's fused SDPA raises a RuntimeError in its own words instead.)

    Equivalent to::

        q, k, v = qkv.reshape(B, K, W, 3, H, D).permute(3, 0, 4, 2, 1, 5)          # each [B, H, W, K, D]
        q = q.reshape(B, H, W, P, S, D).max(dim=3).values                          # amax(dim=3) for "split"
        x = F.scaled_dot_product_attention(q, k, v, scale=scale)                   # [B, H, W, S, D]
        x = x.transpose(1, 3).reshape(B, S * W, C)

    Source: Hiera (arXiv 2306.00989), section 3, "Mask Unit Attention"; ``MaskUnitAttention`` in ``hiera/hiera.py`` of
    hiera-transformer 0.1.4.
    """
    _check(qkv, num_heads, num_windows, q_stride, scale, ties)
    off = is_disabled()
    plain = off or refusal(qkv, num_heads, num_windows, q_stride) is not None
    if not plain and (dtype := calling.autocast_dtype(qkv)) is not None:
        # Plain operations pool before SDPA casts; to cast first would make ties of queries that are none.
        plain = q_stride > 1
        qkv = qkv if plain else qkv.to(dtype)
    args = (qkv, num_heads, num_windows, q_stride, scale, ties)
    if torch.compiler.is_compiling():
        return reference.mask_unit_attention(*args) if plain else _OP(*args)[0]
    if off or calling.transformed():
        with calling.math_attention():
            return reference.mask_unit_attention(*args)
    if plain:
        return reference.mask_unit_attention(*args)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _Output.apply(qkv, args[1:])
    with calling.below_autograd():
        return _OP(*args)[0]


def refusal(qkv: torch.Tensor, num_heads: int, num_windows: int = 1, q_stride: int = 1) -> str | None:
    """Why a legal input goes to the reference and not to a fused kernel, in words; None where the kernel takes it."""
    return calling.refusal(NAME, _contract, qkv, num_heads, num_windows, q_stride)


def _contract(qkv, num_heads, num_windows, q_stride) -> str | None:
    if qkv.dtype not in KERNEL_DTYPES:
        return f"the fused kernel has no {qkv.dtype}"
    _, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    if head_dim % 8 != 0 or head_dim > KERNEL_MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}; the fused kernel takes multiples of 8 up to {KERNEL_MAX_HEAD_DIM}"
    keys = tokens // num_windows
    if keys > KERNEL_MAX_KEYS:
        return f"a window has {keys} keys; beyond {KERNEL_MAX_KEYS}, 4-D scaled_dot_product_attention takes over"
    return None


def _check(qkv, num_heads, num_windows, q_stride, scale, ties) -> None:
    checks.tensor("qkv", qkv, 3, "[B, N, 3*C]")
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv must be one of {', '.join(map(str, DTYPES))}, got {qkv.dtype}")
    for name, value in (("num_heads", num_heads), ("num_windows", num_windows), ("q_stride", q_stride)):
        calling.check_count(name, value)
    _, tokens, width = qkv.shape
    if width % (3 * num_heads) != 0:
        raise ValueError(
            f"the last dimension of qkv must be 3 * num_heads * head_dim, a multiple of {3 * num_heads} "
            f"for num_heads={num_heads}, got {width} in shape {tuple(qkv.shape)}"
        )
    if tokens % (num_windows * q_stride) != 0:
        raise ValueError(
            f"num_windows * q_stride must divide the number of tokens in qkv, got num_windows={num_windows} and "
            f"q_stride={q_stride} for {tokens} tokens in shape {tuple(qkv.shape)}"
        )
    if scale is not None and not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    calling.check_ties(ties)


# ---- what the op does where no device kernel is registered ----


def default(qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
    """The forward by plain operations, on any device and below autograd."""
    out = reference.mask_unit_attention(qkv, num_heads, num_windows, q_stride, scale, ties)
    return out.contiguous(), _lse(qkv, num_heads, num_windows, q_stride, scale, save_lse)


def _lse(qkv, num_heads, num_windows, q_stride, scale, save_lse):
    if save_lse:
        return reference.mask_unit_logsumexp(qkv, num_heads, num_windows, q_stride, scale)
    return qkv.new_empty(0, dtype=_accumulator(qkv))


def default_backward(
    grad_out, qkv, out, lse, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias_grad=False
):
    """The backward by plain operations: recomputes the forward; deterministic where PyTorch's SDPA is."""
    with calling.recording():
        leaf = qkv.detach().requires_grad_()
        recomputed = reference.mask_unit_attention(leaf, num_heads, num_windows, q_stride, scale, ties)
        (grad_qkv,) = torch.autograd.grad(recomputed, leaf, grad_out)
    dtype = _accumulator(qkv)
    grad_bias = grad_qkv.sum(dim=(0, 1), dtype=dtype) if bias_grad else qkv.new_empty(0, dtype=dtype)
    return grad_qkv.contiguous(), grad_bias


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


_library.impl(NAME, default, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", default_backward, "CompositeExplicitAutograd")


# ---- shapes without data ----


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens // q_stride, width // 3)
    shape = (batch, num_windows, num_heads, tokens // (num_windows * q_stride)) if save_lse else (0,)
    return out, qkv.new_empty(shape, dtype=_accumulator(qkv))


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}_backward", lib=_library)
def _fake_backward(
    grad_out, qkv, out, lse, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias_grad=False
):
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[2] if bias_grad else 0, dtype=_accumulator(qkv))


# ---- autograd, forward-mode AD, autocast ----


class _MaskUnitAttention(torch.autograd.Function):
    """The op with its derivative, both outputs: what a call of torch.ops gets."""

    @staticmethod
    def forward(ctx, qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
        with calling.below_autograd():
            out, lse = _OP(qkv, num_heads, num_windows, q_stride, scale, ties, bias, save_lse)
        ctx.save_for_backward(qkv, *((out, lse) if save_lse else (None, None)), bias)
        ctx.mark_non_differentiable(lse)
        ctx.arguments = (num_heads, num_windows, q_stride, scale, ties)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        needs = ctx.needs_input_grad  # as many as there were arguments: the dispatcher leaves out trailing defaults
        bias_grad = len(needs) > 6 and needs[6]
        qkv, out, lse, bias = ctx.saved_tensors  # read once: every read calls the saved-tensor hooks
        if bias_grad and torch.is_grad_enabled():
            # So that a second derivative by the bias alone, which qkv is detached from, is refused as well.
            qkv = qkv + (bias - bias.detach()).to(qkv.dtype)
        grad_qkv, grad_bias = _gradients(ctx.arguments, grad_out, qkv, out, lse, bias_grad)
        grad_bias = grad_bias.to(bias.dtype) if bias_grad else None
        return (grad_qkv, None, None, None, None, None, grad_bias, None)[: len(needs)]


class _Output(torch.autograd.Function):
    """The same with `out` alone: what the public function calls. A second output costs 3 us at every call, and every
    argument 0.2 us: they come as one."""

    @staticmethod
    def forward(ctx, qkv, arguments):
        with calling.below_autograd():
            out, _ = _OP(qkv, *arguments)
        ctx.save_for_backward(qkv)
        ctx.arguments = arguments
        return out

    @staticmethod
    def backward(ctx, grad_out):
        return _gradients(ctx.arguments, grad_out, *ctx.saved_tensors, None, None, False)[0], None


def _gradients(arguments, grad_out, qkv, out, lse, bias_grad):
    if torch.is_grad_enabled() or calling.transformed():  # the backward op's own formula refuses what comes next
        return _OP_BACKWARD(grad_out, qkv, out, lse, *arguments, bias_grad)
    with calling.below_autograd():
        return _OP_BACKWARD(grad_out, qkv, out, lse, *arguments, bias_grad)


def _plain(qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first", bias=None, save_lse=False):
    if bias is not None:
        qkv = qkv + (bias - bias.detach())
    with calling.math_attention():
        out = reference.mask_unit_attention(qkv, num_heads, num_windows, q_stride, scale, ties)
    return out.contiguous(), _lse(qkv.detach(), num_heads, num_windows, q_stride, scale, save_lse)


def _autocast(qkv, *args):
    """Casts qkv as SDPA's autocast would; where queries are pooled that is one step early (see the public function)."""
    dtype = calling.autocast_dtype(qkv)
    with calling.below_autocast():
        return _OP(qkv if dtype is None else qkv.to(dtype), *args)


calling.define_autograd(_library, NAME, _MaskUnitAttention, _plain)
calling.refuse_second_derivative(_library, NAME)
for _key in calling.AUTOCAST_KEYS:
    _library.impl(NAME, _autocast, _key)


# ---- FLOPs, as torch.utils.flop_counter counts SDPA: the products with K*D and S*K, two forward, five backward ----


def _product_flops(qkv_shape, num_windows, q_stride) -> int:
    batch, tokens, width = qkv_shape
    return 2 * batch * (tokens // q_stride) * (tokens // num_windows) * (width // 3)


@register_flop_formula(torch.ops.hiera_kernels.mask_unit_attention)
def _flops(qkv_shape, num_heads, num_windows=1, q_stride=1, *args, out_shape=None, **kwargs) -> int:
    return 2 * _product_flops(qkv_shape, num_windows, q_stride)


@register_flop_formula(torch.ops.hiera_kernels.mask_unit_attention_backward)
def _flops_backward(
    grad_shape, qkv_shape, saved_shape, lse_shape, num_heads, num_windows=1, q_stride=1, *args, out_shape=None, **kwargs
) -> int:
    return 5 * _product_flops(qkv_shape, num_windows, q_stride)

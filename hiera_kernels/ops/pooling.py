"""`q_pool`: its arguments and its torch.library contract.

A kernel registers for its device under ``q_pool(x, stride, ties) -> out``, [B, N, C] -> [B, N/stride, C], contiguous,
and ``q_pool_backward(grad_out, x, stride, ties) -> grad_x``, [B, N, C], contiguous. Both may be given tensors of any
strides. How the public function gets to the op, or past it: calling.py.
"""

import torch

from hiera_kernels.ops import calling, checks
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import attention as reference

NAME = "q_pool"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = DTYPES[:3]

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define('q_pool(Tensor x, SymInt stride, str ties="first") -> Tensor', tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    'q_pool_backward(Tensor grad_out, Tensor x, SymInt stride, str ties="first") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.hiera_kernels.q_pool.default
_OP_BACKWARD = torch.ops.hiera_kernels.q_pool_backward.default


def q_pool(x: torch.Tensor, stride: int, ties: str = "first") -> torch.Tensor:
    """Max-pool tokens in unrolled order over the pool stride, which is their slowest axis.

    Args:
        x: [B, N, C], fp16, bf16, fp32 or fp64, any strides, tokens in unrolled order. B may be 0.
        stride: P, the flattened pool stride (4 for 2x2); it divides N.
        ties: where the gradient goes when several of the P tokens are the maximum: ``"first"`` to the first of them
            (``max(dim)``: hiera-transformer, SAM 2), ``"split"`` evenly (``amax``: timm).

    Returns:
        [B, N/stride, C], contiguous, a new tensor, dtype of ``x`` (also under autocast). NaN wins over every number.

    Raises:
        TypeError: an argument of a wrong type, or an ``x`` that is not of one of the four dtypes.
        ValueError: ``x`` is not 3-D, ``stride`` is below 1 or does not divide N, another ``ties``.
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.

    Equivalent to::

        x.reshape(B, P, N // P, C).max(dim=1).values       # amax(dim=1) for "split"

    Source: Hiera (arXiv 2306.00989), section 3.2; ``do_pool`` in ``hiera/hiera_utils.py`` of hiera-transformer 0.1.4.
    """
    checks.tensor("x", x, 3, "[B, N, C]")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    calling.check_count("stride", stride)
    if x.shape[1] % stride != 0:
        raise ValueError(
            f"stride must divide the number of tokens in x, got stride={stride} for shape {tuple(x.shape)}"
        )
    calling.check_ties(ties)
    plain = is_disabled() or refusal(x, stride) is not None
    if torch.compiler.is_compiling():
        return reference.q_pool(x, stride, ties) if plain else _OP(x, stride, ties)
    if plain or calling.transformed():
        return reference.q_pool(x, stride, ties)
    if torch.is_grad_enabled() and x.requires_grad:
        return _QPool.apply(x, stride, ties)
    with calling.below_autograd():
        return _OP(x, stride, ties)


def refusal(x: torch.Tensor, stride: int = 1) -> str | None:
    """Why a legal input goes to the reference and not to a fused kernel, in words; None where the kernel takes it."""
    return calling.refusal(NAME, _contract, x, stride)


def _contract(x, stride) -> str | None:
    return None if x.dtype in KERNEL_DTYPES else f"the fused kernel has no {x.dtype}"


def default(x, stride, ties="first"):
    """The forward by plain operations, on any device and below autograd."""
    return reference.q_pool(x, stride, ties)


def default_backward(grad_out, x, stride, ties="first"):
    """The backward by plain operations, on any device and below autograd."""
    with calling.recording():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(reference.q_pool(x, stride, ties), x, grad_out)[0].contiguous()


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(x, stride, ties="first"):
    batch, tokens, channels = x.shape
    return x.new_empty(batch, tokens // stride, channels)


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}_backward", lib=_library)
def _fake_backward(grad_out, x, stride, ties="first"):
    return x.new_empty(x.shape)


class _QPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stride, ties="first"):
        ctx.save_for_backward(x)
        ctx.sizes = (stride, ties)
        with calling.below_autograd():
            return _OP(x, stride, ties)

    @staticmethod
    def backward(ctx, grad_out):
        args = (grad_out, *ctx.saved_tensors, *ctx.sizes)
        if torch.is_grad_enabled() or calling.transformed():  # the backward op's own formula refuses what comes next
            grad_x = _OP_BACKWARD(*args)
        else:
            with calling.below_autograd():
                grad_x = _OP_BACKWARD(*args)
        return (grad_x, None, None)[: len(ctx.needs_input_grad)]


_library.impl(NAME, default, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", default_backward, "CompositeExplicitAutograd")
calling.define_autograd(_library, NAME, _QPool, default)
calling.refuse_second_derivative(_library, NAME)

"""`gelu`: its arguments and its torch.library contract.

A kernel registers for its device under ``gelu(x, bias) -> out``, contiguous, the shape of x; ``bias`` is not read, and
``gelu_backward(grad_out, x, output, bias_grad) -> (grad_x, out, grad_bias)``: grad_x contiguous, in the dtype of x;
with ``output``, out is GELU(x) once more, from the pass that reads x anyway, else empty, [0]; with ``bias_grad``,
grad_bias [M] in fp32 is grad_x summed over all axes but the last, else empty, [0]. Tensors may have any strides,
and grad_out another dtype than x.

``bias`` is for a caller that computes ``x = F.linear(input, weight, bias.detach())``: x holds the bias already, and the
op gives ``bias`` its gradient from the pass over grad_x that it makes anyway. How the public function gets to the op,
or past it: calling.py.
"""

import torch
import torch.nn.functional as F

from hiera_kernels.ops import calling
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import activation as reference

NAME = "gelu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = DTYPES[:3]

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define("gelu(Tensor x, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "gelu_backward(Tensor grad_out, Tensor x, bool output=False, bool bias_grad=False) "
    "-> (Tensor grad_x, Tensor out, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.hiera_kernels.gelu.default
_OP_BACKWARD = torch.ops.hiera_kernels.gelu_backward.default


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU by the error function, ``x * Phi(x)``; not its tanh approximation.

    One read and one write forward; the backward reads the gradient and ``x``, and computes the rest again.

    Args:
        x: [..., M], fp16, bf16, fp32 or fp64, any strides, at least one axis.
        bias: [M] or None, any of the four dtypes. ``x`` holds it already: it is the output of
            ``F.linear(input, weight, bias.detach())``. The call gives ``bias`` its gradient, summed in fp32 by the
            pass that makes the gradient of ``x``; its value is not used.

    Returns:
        [..., M], contiguous where a fused kernel made it, dtype of ``x`` (also under autocast).

    Raises:
        TypeError: an argument that is not a dense tensor of one of the four dtypes.
        ValueError: ``x`` has no axis; ``bias`` is not [M].
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.

    Equivalent to::

        F.gelu(x + bias - bias.detach())                   # F.gelu(x) without a bias

    Source: "Gaussian Error Linear Units", arXiv 1606.08415, section 2; ``torch.nn.GELU`` in timm's ``Mlp``, which
    hiera-transformer 0.1.4 uses.
    """
    check_floating("x", x, "[..., M]")
    if x.ndim == 0:
        raise ValueError(f"x must be [..., M], got shape {tuple(x.shape)}")
    check_vector("bias", bias, x.shape[-1], "M, the last dimension of x")
    plain = is_disabled() or refusal(x) is not None or (bias is not None and calling.is_foreign(bias))
    if torch.compiler.is_compiling():
        return reference.gelu(x, bias) if plain else _OP(x, bias)
    if plain or calling.transformed():
        return reference.gelu(x, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Gelu.apply(x, bias)
    with calling.below_autograd():
        return _OP(x)


def refusal(x: torch.Tensor) -> str | None:
    """Why a legal input goes to the reference and not to a fused kernel, in words; None where the kernel takes it."""
    return calling.refusal(NAME, _contract, x)


def _contract(x) -> str | None:
    return None if x.dtype in KERNEL_DTYPES else f"the fused kernel has no {x.dtype}"


def check_floating(name: str, value: object, shape: str) -> None:
    """Raise unless `value` is a dense tensor of one of the four dtypes; `shape` is how the message writes it."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor {shape}, got one of layout {value.layout}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {value.dtype}")


def check_vector(name: str, value: object, length: int, words: str) -> None:
    """Raise unless `value` is None or a vector of `length`; `words` say what the length is."""
    if value is None:
        return
    check_floating(name, value, f"of length {words}, or None")
    if value.ndim != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},): {words}, got {tuple(value.shape)}")


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that ``x`` has as an operand of a matrix product: its own, or under autocast perhaps another."""
    if not torch.amp.is_autocast_available(x.device.type):  # meta tensors: to ask whether it is enabled raises
        return x.dtype
    return calling.autocast_dtype(x) or x.dtype


def check_dtypes(first: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless the operands of a matrix product have the dtype of the one named `first`, or autocast casts them."""
    dtype, device_type = tensors[first].dtype, tensors[first].device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return
    for name, value in tensors.items():
        if value is not None and value.dtype is not dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {dtype}, got {value.dtype}")


# ---- the parts that the MLP is made of: by the op where `fused`, else by plain operations, which differentiate ----


def activated(x: torch.Tensor, fused: bool) -> torch.Tensor:
    """GELU(x), of an x that needs no gradient, or inside the forward of an autograd.Function."""
    if not fused:
        return F.gelu(x)
    if torch.compiler.is_compiling():
        return _OP(x)
    with calling.below_autograd():
        return _OP(x)


def gradients(
    grad_out: torch.Tensor, x: torch.Tensor, output: bool, bias_grad: bool, fused: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """grad_x, GELU(x) or None, and the sum of grad_x over rows or None, for the backward of an autograd.Function."""
    if not fused:
        grad_x = torch.ops.aten.gelu_backward.default(grad_out.to(x.dtype), x)
        sums = grad_x.reshape(-1, x.shape[-1]).sum(0, dtype=_accumulator(x)) if bias_grad else None
        return grad_x, F.gelu(x) if output else None, sums
    args = (grad_out, x, output, bias_grad)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or calling.transformed():
        grad_x, out, sums = _OP_BACKWARD(*args)  # its own formula refuses to be differentiated
    else:
        with calling.below_autograd():
            grad_x, out, sums = _OP_BACKWARD(*args)
    return grad_x, out if output else None, sums if bias_grad else None


# ---- what the op does where no device kernel is registered; shapes without data ----


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def default(x, bias=None):
    """The forward by plain operations, on any device and below autograd."""
    return F.gelu(x).contiguous()


def default_backward(grad_out, x, output=False, bias_grad=False):
    """The backward by plain operations, on any device and below autograd."""
    grad_x, out, sums = gradients(grad_out, x, output, bias_grad, fused=False)
    return (
        grad_x.contiguous(),
        x.new_empty(0) if out is None else out.contiguous(),
        x.new_empty(0, dtype=_accumulator(x)) if sums is None else sums,
    )


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(x, bias=None):
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}_backward", lib=_library)
def _fake_backward(grad_out, x, output=False, bias_grad=False):
    out = x.new_empty(x.shape if output else (0,))
    return x.new_empty(x.shape), out, x.new_empty(x.shape[-1] if bias_grad else 0, dtype=_accumulator(x))


# ---- autograd ----


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias=None):
        ctx.save_for_backward(x, bias)
        with calling.below_autograd():
            return _OP(x)

    @staticmethod
    def backward(ctx, grad_out):
        needs = ctx.needs_input_grad  # as many as there were arguments: the dispatcher leaves out trailing defaults
        bias_grad = len(needs) > 1 and needs[1]
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x = reference.with_bias(x, bias)  # so that a second derivative by the bias alone is refused as well
        grad_x, _, sums = gradients(grad_out, x, False, bias_grad, fused=True)
        return (grad_x if needs[0] else None, sums.to(bias.dtype) if bias_grad else None)[: len(needs)]


_library.impl(NAME, default, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", default_backward, "CompositeExplicitAutograd")
calling.define_autograd(_library, NAME, _Gelu, reference.gelu)
calling.refuse_second_derivative(_library, NAME)

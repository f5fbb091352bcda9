"""How a public function reaches its op: the questions that it asks before it dispatches, in eager code and in tracing.

The way of every public function that computes (``mask_unit_attention``, ``q_pool``, ...), written once:

1. ``disabled()``, or no kernel for this device, or an input that the kernel does not serve -> the reference, as plain
   operations that autograd and ``torch.compile`` see. An opaque op whose only kernel *is* the reference would recompute
   the forward in its backward and hide it from Inductor, and gain nothing.
2. Being compiled or exported -> the op, one node of the graph.
3. Forward-mode AD or a functorch transform (``vmap``, ``grad``, ``jvp``) is active -> the reference, with SDPA's math
   backend, the one that has derivatives of every kind and order.
4. Else -> an ``autograd.Function`` around the op.

PyTorch's dispatcher is the only registry: a kernel that is registered for a device, whenever and by whomever, flips
the answer to 1. Nothing is cached in eager code; a compiled graph keeps the answer that it was traced with. What a
kernel does not serve (a dtype, an architecture, too long rows) the dispatcher cannot know; `limits` does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hiera_kernels.reference.attention import TIES

NAMESPACE = "hiera_kernels"
# Not every torch knows the last two.
AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", *(k for k in ("AutocastXPU", "AutocastMPS") if hasattr(DispatchKey, k)))
_AUTOGRAD = DispatchKeySet(DispatchKey.AutogradFunctionality) | DispatchKeySet(DispatchKey.AutogradOther)
_AUTOCAST = functools.reduce(
    DispatchKeySet.__or__, (DispatchKeySet(getattr(DispatchKey, key)) for key in AUTOCAST_KEYS)
)
_BELOW_AUTOGRAD = _AUTOGRAD | _AUTOCAST

# (op, device type) -> what the kernel registered there says against a call, in words, or None: `says(x, *arguments)`
# with the arguments that the op's own `refusal` passes on. Filled where kernels are registered (kernels/), asked at
# every call, and traced by Dynamo: plain Python that looks at shapes, dtypes and devices, and takes microseconds.
# A kernel without an entry serves what the op's contract asks of every kernel.
limits: dict[tuple[str, str], Callable[..., str | None]] = {}


@functools.cache
def _registered_as(op: str, device_type: str) -> tuple[str, DispatchKeySet]:
    key = torch._C._dispatch_key_parse(torch._C._dispatch_key_for_device(device_type))
    return f"{NAMESPACE}::{op}", DispatchKeySet(key)


def has_kernel(op: str, device_type: str) -> bool:
    """Whether ``torch.ops.hiera_kernels.<op>`` has a kernel of its own for the device, not just the default one."""
    if device_type == "meta":  # the fake kernel stands there; a tensor without data has nothing to gain from any other
        return False
    return torch._C._dispatch_has_kernel_for_any_dispatch_key(*_registered_as(op, device_type))


# What torch.compiler.assume_constant_result does, without the second that its import of torch._dynamo takes: Dynamo
# asks once, while it traces, and does not look inside.
has_kernel._dynamo_marked_constant = True


def refusal(op: str, contract: Callable[..., str | None], x: torch.Tensor, *arguments) -> str | None:
    """Why the call ``op(x, *arguments)`` goes to the reference and not to a fused kernel, in words; None if the latter.

    ``contract(x, *arguments)``: what is asked of a kernel that has not told its own limits.
    """
    device_type = x.device.type
    if not has_kernel(op, device_type):
        return f"no fused kernel is registered for {device_type}"
    if is_foreign(x):
        return f"{type(x).__name__} knows PyTorch's operations only"
    return limits.get((op, device_type), contract)(x, *arguments)


def is_foreign(x: torch.Tensor) -> bool:
    """Whether ``x`` wraps other tensors (DTensor, quantised, ...) and so takes PyTorch's own operations only."""
    return type(x) is not torch.Tensor and is_traceable_wrapper_subclass(x)


def transformed() -> bool:
    """Whether forward-mode AD or a functorch transform is active."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def math_attention():
    """Context in which ``scaled_dot_product_attention`` is differentiable forwards, backwards and again."""
    return sdpa_kernel(SDPBackend.MATH)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would give ``x`` as an input of a matrix product, or None where it leaves it alone."""
    device_type = x.device.type
    # The meta device has no autocast, and asking it whether it is enabled raises.
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return None if x.dtype is dtype or x.dtype is torch.float64 else dtype


def below_autograd():
    """Context in which an op call goes to the device's kernel (or to a dispatch mode): no autograd, no autocast."""
    return torch._C._ExcludeDispatchKeyGuard(_BELOW_AUTOGRAD)


def below_autocast():
    """Context in which autocast casts nothing."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Context in which autograd records although an op is being executed, below autograd.

    For default backward kernels, which differentiate the reference. `torch.func.vjp` would do it too, but not under a
    dispatch mode that looks at storages, as opcheck's does.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def define_autograd(library: torch.library.Library, op: str, function: type, plain) -> None:
    """Register ``function`` (a ``torch.autograd.Function`` with the op's arguments) as the derivative of ``op``.

    ``torch.library.register_autograd`` does the same but for forward-mode AD, where its tangents are zero in silence,
    and for functorch. There ``plain``, called with the op's arguments, computes by plain operations, or raises.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default

    def autograd_kernel(*args):
        if transformed():
            return plain(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with below_autograd():
            return overload(*args)

    library.impl(op, autograd_kernel, "Autograd")


def refuse_second_derivative(library: torch.library.Library, op: str) -> None:
    """Make the backward op of ``op`` raise when it is differentiated, in whichever mode.

    Without this a second derivative, or a tangent that meets the backward, is zero in silence.
    """
    name = f"{op}_backward"
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    message = (
        f"hiera_kernels.{op} has no second derivative; compute this one under `with hiera_kernels.disabled():`, "
        "which runs plain PyTorch"
    )

    def refuse(*_):
        raise NotImplementedError(message)

    def forward(ctx, *args):
        with below_autograd():
            return overload(*args)

    members = {"forward": staticmethod(forward), "backward": staticmethod(refuse)}
    define_autograd(library, name, type(f"{name}_refusing", (torch.autograd.Function,), members), refuse)


def check_count(name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1, which may be symbolic."""
    if type(value) is not int and (not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_ties(ties: object) -> None:
    """Raise unless `ties` is one of the two modes."""
    if ties not in TIES:
        raise ValueError(f"ties must be one of {TIES}, got {ties!r}")

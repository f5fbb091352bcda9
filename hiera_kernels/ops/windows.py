"""`window_attention`: its arguments, its torch.library contract, and what a device kernel has to provide.

A kernel registers for its device, ``Library("hiera_kernels", "IMPL").impl(name, launch, "CUDA")``, under these names:

``window_attention(qkv, num_heads, window_size, q_stride, pad, scale) -> out``
    qkv [B, Hs, Ws, 3*C] -> out [B, Hs/q_stride, Ws/q_stride, C], contiguous. ``window_size`` and ``q_stride`` hold two
    ints each, or none: one window is the whole map, queries are not pooled. Without ``pad`` [3*C], padding is zero.
``window_attention_backward(grad_out, qkv, pad, num_heads, window_size, q_stride, scale) -> (grad_qkv, grad_pad)``
    grad_qkv [B, Hs, Ws, 3*C], contiguous; grad_pad [3*C] in fp32 (fp64 of fp64), the sum over all padded tokens, zero
    where there are none; empty, [0], without ``pad``.

Arguments that equal their defaults may be left out by the dispatcher: a launch function repeats the defaults. It meets
neither autograd nor autocast, but tensors of any strides. What it does not serve it says beforehand, in
``calling.limits``, and hands over to `default` and `default_backward`. How the public function gets to the op, or past
it: calling.py.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from hiera_kernels.ops import calling, checks
from hiera_kernels.ops.switch import is_disabled
from hiera_kernels.reference import windows as reference

NAME = "window_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What a kernel is asked to serve that has not told its own limits (calling.limits); the rest goes to the reference.
KERNEL_DTYPES = DTYPES[:3]
KERNEL_MAX_HEAD_DIM = 128
KERNEL_MAX_KEYS = 256
KERNEL_MAX_STRIDE = 16

_library = torch.library.Library(calling.NAMESPACE, "FRAGMENT")
_library.define(
    "window_attention(Tensor qkv, SymInt num_heads, int[] window_size, int[] q_stride, Tensor? pad=None, "
    "float? scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor? pad, SymInt num_heads, int[] window_size, "
    "int[] q_stride, float? scale=None) -> (Tensor grad_qkv, Tensor grad_pad)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.hiera_kernels.window_attention.default
_OP_BACKWARD = torch.ops.hiera_kernels.window_attention_backward.default


def window_attention(
    qkv: torch.Tensor,
    num_heads: int,
    window_size: int | tuple[int, int] | None,
    q_stride: int | tuple[int, int] | None = None,
    pad: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Multi-head attention inside each window of a map of tokens, with queries max-pooled inside the window.

    B batch, Hs x Ws the map, H heads, D head dim, C = H*D. Windows are counted from the top left; those at the bottom
    and at the right may overhang the map, and are completed with a padding token. The kernels read and write the map
    in place: no partition, no padded copy, no permutation, no crop.

    Args:
        qkv: [B, Hs, Ws, 3*C], fp16, bf16, fp32 or fp64, any strides: the output of the qkv Linear, packed (3, H, D). B
            may be 0.
        num_heads: H.
        window_size: height and width of a window, or one int for both; None or 0 is global attention.
        q_stride: height and width of the max-pooling of queries, or one int for both; None is no pooling. It divides
            the window, Hs and Ws.
        pad: [3*C] in the dtype of ``qkv``: the row that a zero token has after the qkv layer, ``qkv(zeros)``. Its k and
            v take part in the softmax of every window that overhangs, once for each padded token, and its gradient is
            the sum over all of them, in every image; its q has no output, and no gradient. None is a row of zeros, what
            a qkv layer without bias makes. Where no window overhangs, ``pad`` has no part in the result.
        scale: factor on the logits; None is ``D ** -0.5``.

    Returns:
        [B, Hs/q_stride, Ws/q_stride, C], contiguous; dtype of ``qkv``, or under autocast the autocast dtype, as
        ``scaled_dot_product_attention`` has it.

    Raises:
        TypeError: an argument of a wrong type, a ``qkv`` that is not of one of the four dtypes, a ``pad`` of another
            dtype than ``qkv``.
        ValueError: shapes that do not fit together, a ``q_stride`` that does not divide the window and the map, a
            ``pad`` on another device than ``qkv``.
        NotImplementedError: a second derivative of a fused kernel is asked for; ``hiera_kernels.disabled()`` has it.
            (Where no kernel serves the input, PyTorch's fused SDPA raises a RuntimeError in its own words instead.)

    Equivalent to::

        x = pad.expand(B, Hp, Wp, 3 * C).clone()                 # Hp, Wp: Hs, Ws rounded up to whole windows
        x[:, :Hs, :Ws] = qkv
        q, k, v = window_partition(x, window_size).chunk(3, -1)  # each [B * windows, height, width, C]
        q = F.max_pool2d(q.permute(0, 3, 1, 2), q_stride).permute(0, 2, 3, 1)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        x = window_unpartition(x, window_size // q_stride)[:, : Hs // q_stride, : Ws // q_stride]

    The gradient of a pooled query goes to the first of equal maxima in row-major order, as MaxPool2d has it (of several
    NaN to the first, where MaxPool2d has the last).

    Source: SAM 2 (arXiv 2408.00714); ``MultiScaleBlock`` and ``MultiScaleAttention`` in
    ``sam2/modeling/backbones/hieradet.py`` of sam2 1.1.0, between the qkv and the output Linear.
    """
    window_size, q_stride = _check(qkv, num_heads, window_size, q_stride, pad, scale)
    off = is_disabled()
    plain = off or _refusal(qkv, num_heads, window_size, q_stride, pad) is not None
    if not plain and (dtype := calling.autocast_dtype(qkv)) is not None:
        # Plain operations pool before SDPA casts; to cast first would make ties of queries that are none.
        plain = len(q_stride) > 0
        if not plain:
            qkv, pad = qkv.to(dtype), None if pad is None else pad.to(dtype)
    if torch.compiler.is_compiling():
        if plain:
            return reference.window_attention(qkv, num_heads, window_size or None, q_stride or None, pad, scale)
        return _OP(qkv, num_heads, window_size, q_stride, pad, scale)
    if pad is not None and window_size and not (qkv.shape[1] % window_size[0] or qkv.shape[2] % window_size[1]):
        pad = None
    args = (qkv, num_heads, window_size, q_stride, pad, scale)
    if off or calling.transformed():
        return _plain(*args)
    if plain:
        return reference.window_attention(qkv, num_heads, window_size or None, q_stride or None, pad, scale)
    if torch.is_grad_enabled() and (qkv.requires_grad or (pad is not None and pad.requires_grad)):
        return _Called.apply(qkv, pad, (num_heads, window_size, q_stride, scale))
    with calling.below_autograd():
        return _OP(*args)


def refusal(
    qkv: torch.Tensor,
    num_heads: int,
    window_size: int | tuple[int, int] | None,
    q_stride: int | tuple[int, int] | None = None,
    pad: torch.Tensor | None = None,
) -> str | None:
    """Why a legal input goes to the reference and not to a fused kernel, in words; None where the kernel takes it."""
    return _refusal(qkv, num_heads, _pair("window_size", window_size), _pair("q_stride", q_stride), pad)


def _refusal(qkv, num_heads, window_size, q_stride, pad) -> str | None:
    if pad is not None and calling.is_foreign(pad):
        return f"{type(pad).__name__} knows PyTorch's operations only"
    return calling.refusal(NAME, _contract, qkv, num_heads, window_size, q_stride)


def _contract(qkv, num_heads, window_size, q_stride) -> str | None:
    if qkv.dtype not in KERNEL_DTYPES:
        return f"the fused kernel has no {qkv.dtype}"
    _, map_h, map_w, width = qkv.shape
    head_dim = width // (3 * num_heads)
    if head_dim % 8 != 0 or head_dim > KERNEL_MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}; the fused kernel takes multiples of 8 up to {KERNEL_MAX_HEAD_DIM}"
    window = window_size or (map_h, map_w)
    if window[0] * window[1] > KERNEL_MAX_KEYS:
        return (
            f"a window has {window[0] * window[1]} keys; beyond {KERNEL_MAX_KEYS}, 4-D scaled_dot_product_attention "
            "takes over"
        )
    if q_stride and q_stride[0] * q_stride[1] > KERNEL_MAX_STRIDE:
        return f"q_stride is {q_stride}; the fused kernel pools up to {KERNEL_MAX_STRIDE} queries"
    return None


def _check(qkv, num_heads, window_size, q_stride, pad, scale) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """window_size and q_stride as the op takes them: two ints or none."""
    checks.tensor("qkv", qkv, 4, "[B, Hs, Ws, 3*C]")
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv must be one of {', '.join(map(str, DTYPES))}, got {qkv.dtype}")
    calling.check_count("num_heads", num_heads)
    _, map_h, map_w, width = qkv.shape
    if width % (3 * num_heads) != 0:
        raise ValueError(
            f"the last dimension of qkv must be 3 * num_heads * head_dim, a multiple of {3 * num_heads} "
            f"for num_heads={num_heads}, got {width} in shape {tuple(qkv.shape)}"
        )
    if map_h < 1 or map_w < 1:
        raise ValueError(f"qkv must have at least one token, got shape {tuple(qkv.shape)}")
    window = _pair("window_size", window_size)
    stride = _pair("q_stride", q_stride)
    for axis, extent, name in ((0, map_h, "height"), (1, map_w, "width")):
        if not stride:
            break
        for whole, what in ((window[axis] if window else extent, "window"), (extent, "map")):
            if whole % stride[axis] != 0:
                raise ValueError(
                    f"q_stride must divide the window and the map, got q_stride={q_stride!r} for a {what} of {name} "
                    f"{whole} (window_size={window_size!r}, qkv of shape {tuple(qkv.shape)})"
                )
    if pad is not None:
        checks.tensor("pad", pad, 1, "[3*C]")
        if pad.shape[0] != width:
            raise ValueError(f"pad must have the {width} columns of qkv, got shape {tuple(pad.shape)}")
        if pad.dtype != qkv.dtype:
            raise TypeError(f"pad must be of the dtype of qkv, {qkv.dtype}, got {pad.dtype}")
        if pad.device != qkv.device:
            raise ValueError(f"pad must be on the device of qkv, {qkv.device}, got {pad.device}")
    if scale is not None and not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    return window, stride


def _pair(name: str, value: object) -> tuple[int, ...]:
    """Two ints, both at least 1, or none at all: for None, and for a window_size of 0."""
    if value is None:
        return ()
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if not all(type(entry) is int for entry in both) or len(both) != 2:
        raise TypeError(f"{name} must be an int, two ints or None, got {value!r}")
    if name == "window_size" and both == (0, 0):
        return ()
    if both[0] < 1 or both[1] < 1:
        allowed = "positive, or 0 for global attention" if name == "window_size" else "positive"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return both


# ---- what the op does where no device kernel is registered ----


def default(qkv, num_heads, window_size, q_stride, pad=None, scale=None):
    """The forward by plain operations, on any device and below autograd."""
    out = reference.window_attention(qkv, num_heads, window_size or None, q_stride or None, pad, scale)
    return out.contiguous()


def default_backward(grad_out, qkv, pad, num_heads, window_size, q_stride, scale=None):
    """The backward by plain operations: recomputes the forward; deterministic where PyTorch's SDPA is."""
    window = reference.pair(window_size or None) or tuple(qkv.shape[1:3])
    dtype = torch.float64 if qkv.dtype is torch.float64 else torch.float32
    with calling.recording():
        # The map completed first, so that what the pad row gets is summed in fp32, not in the dtype of qkv.
        whole = reference.complete(qkv.detach(), *window, None if pad is None else pad.detach()).requires_grad_()
        pool_h, pool_w = q_stride or (1, 1)
        x = reference.window_attention(whole, num_heads, window, q_stride or None, None, scale)
        x = x[:, : qkv.shape[1] // pool_h, : qkv.shape[2] // pool_w]
        (grad,) = torch.autograd.grad(x, whole, grad_out)
    _, map_h, map_w, _ = qkv.shape
    # Not a view of `grad`, which is larger than the result.
    grad_qkv = grad[:, :map_h, :map_w].clone(memory_format=torch.contiguous_format)
    if pad is None:
        return grad_qkv, qkv.new_empty(0, dtype=dtype)
    grad_pad = grad[:, map_h:].sum((0, 1, 2), dtype=dtype) + grad[:, :map_h, map_w:].sum((0, 1, 2), dtype=dtype)
    return grad_qkv, grad_pad


_library.impl(NAME, default, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", default_backward, "CompositeExplicitAutograd")


# ---- shapes without data ----


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}", lib=_library)
def _fake(qkv, num_heads, window_size, q_stride, pad=None, scale=None):
    batch, map_h, map_w, width = qkv.shape
    pool_h, pool_w = q_stride or (1, 1)
    return qkv.new_empty(batch, map_h // pool_h, map_w // pool_w, width // 3)


@torch.library.register_fake(f"{calling.NAMESPACE}::{NAME}_backward", lib=_library)
def _fake_backward(grad_out, qkv, pad, num_heads, window_size, q_stride, scale=None):
    dtype = torch.float64 if qkv.dtype is torch.float64 else torch.float32
    return qkv.new_empty(qkv.shape), qkv.new_empty(0 if pad is None else qkv.shape[3], dtype=dtype)


# ---- autograd, forward-mode AD, autocast ----


class _WindowAttention(torch.autograd.Function):
    """The op with its derivative: what a call of torch.ops gets."""

    @staticmethod
    def forward(ctx, qkv, num_heads, window_size, q_stride, pad=None, scale=None):
        ctx.save_for_backward(qkv, pad)
        ctx.arguments = (num_heads, window_size, q_stride, scale)
        with calling.below_autograd():
            return _OP(qkv, num_heads, window_size, q_stride, pad, scale)

    @staticmethod
    def backward(ctx, grad_out):
        grad_qkv, grad_pad = _gradients(ctx, grad_out)
        # As many as there were arguments: the dispatcher leaves out trailing defaults.
        return (grad_qkv, None, None, None, grad_pad, None)[: len(ctx.needs_input_grad)]


class _Called(torch.autograd.Function):
    """The same for the public function: every argument of a Function costs 0.2 us, so they come as one."""

    @staticmethod
    def forward(ctx, qkv, pad, arguments):
        ctx.save_for_backward(qkv, pad)
        ctx.arguments = arguments
        num_heads, window_size, q_stride, scale = arguments
        with calling.below_autograd():
            return _OP(qkv, num_heads, window_size, q_stride, pad, scale)

    @staticmethod
    def backward(ctx, grad_out):
        return *_gradients(ctx, grad_out), None


def _gradients(ctx, grad_out):
    qkv, pad = ctx.saved_tensors  # read once: every read calls the saved-tensor hooks
    if torch.is_grad_enabled() or calling.transformed():  # the backward op's own formula refuses what comes next
        grad_qkv, grad_pad = _OP_BACKWARD(grad_out, qkv, pad, *ctx.arguments)
    else:
        with calling.below_autograd():
            grad_qkv, grad_pad = _OP_BACKWARD(grad_out, qkv, pad, *ctx.arguments)
    return grad_qkv, None if pad is None else grad_pad.to(pad.dtype)


def _plain(qkv, num_heads, window_size, q_stride, pad=None, scale=None):
    with calling.math_attention():
        return default(qkv, num_heads, window_size, q_stride, pad, scale)


def _autocast(qkv, num_heads, window_size, q_stride, pad=None, scale=None):
    """Casts qkv as SDPA's autocast would; where queries are pooled that is one step early (see the public function)."""
    dtype = calling.autocast_dtype(qkv)
    with calling.below_autocast():
        if dtype is not None:
            qkv, pad = qkv.to(dtype), None if pad is None else pad.to(dtype)
        return _OP(qkv, num_heads, window_size, q_stride, pad, scale)


calling.define_autograd(_library, NAME, _WindowAttention, _plain)
calling.refuse_second_derivative(_library, NAME)
for _key in calling.AUTOCAST_KEYS:
    _library.impl(NAME, _autocast, _key)


# ---- FLOPs, as torch.utils.flop_counter counts SDPA: the products with K*D and S*K, two forward, five backward ----


def _product_flops(qkv_shape, window_size, q_stride) -> int:
    """Of one product, over whole windows, as the padded original computes it."""
    batch, map_h, map_w, width = qkv_shape
    window_h, window_w = window_size or (map_h, map_w)
    pool_h, pool_w = q_stride or (1, 1)
    count = batch * reference.windows(map_h, window_h) * reference.windows(map_w, window_w)
    keys = window_h * window_w
    return 2 * count * (keys // (pool_h * pool_w)) * keys * (width // 3)


@register_flop_formula(torch.ops.hiera_kernels.window_attention)
def _flops(qkv_shape, num_heads, window_size, q_stride, *args, out_shape=None, **kwargs) -> int:
    return 2 * _product_flops(qkv_shape, window_size, q_stride)


@register_flop_formula(torch.ops.hiera_kernels.window_attention_backward)
def _flops_backward(
    grad_shape, qkv_shape, pad_shape, num_heads, window_size, q_stride, *args, out_shape=None, **kwargs
) -> int:
    return 5 * _product_flops(qkv_shape, window_size, q_stride)

"""What one operation moves, computes and launches on a GPU, from its arguments and results alone.

The rule: an operation reads each tensor that it is given once and writes each one that it returns once, in one launch.
The fused ops of this package are such operations, so the rule is also their floor. Where PyTorch's CUDA implementation
is known to do otherwise there is an entry below. Libraries whose passes differ by version (flash attention, cuDNN) are
counted by the rule, which flatters them, and so the rivals.

A view costs nothing. Of an expanded tensor what it stores is counted. Caches are not: what one kernel leaves in L2 for
the next is small beside activations of hundreds of megabytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import flop_registry

LOW_PRECISION = (torch.bfloat16, torch.float16)
# multi_tensor_apply: tensors and chunks of 65536 elements that one launch takes, of lists as long as AdamW's.
TENSORS_PER_LAUNCH, CHUNK, CHUNKS_PER_LAUNCH = 30, 65536, 320


@dataclass(frozen=True)
class Cost:
    """Bytes moved, floating-point operations, kernel launches; `tensor_cores` says which peak the FLOPs have."""

    bytes: int = 0
    flops: int = 0
    launches: int = 0
    tensor_cores: bool = True


NOTHING = Cost()


def size_of(x: torch.Tensor) -> int:
    """Bytes that a pass over `x` touches: dimensions of stride 0 are stored once."""
    if x.numel() == 0:
        return 0
    extents = [n for n, step in zip(x.shape, x.stride(), strict=True) if step != 0]
    return math.prod(extents) * x.element_size()


def tensors(*values: object) -> Iterable[torch.Tensor]:
    """Every tensor in arguments as PyTorch passes them: nested at most in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(*value)
        elif isinstance(value, dict):
            yield from tensors(*value.values())


def once(values: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors of which the same one may be passed twice."""
    found = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): size_of(x) for x in values}
    return sum(found.values())


def is_view(func: torch._ops.OpOverload, args: tuple, out: object) -> bool:
    """Whether the results are other shapes of the arguments' memory, and nothing was written."""
    if func.is_view or name_of(func) in _VIEWS:
        return True
    if func._schema.is_mutable:
        return False
    given = {x.untyped_storage()._cdata for x in tensors(*args)}
    results = list(tensors(out))
    return bool(results) and all(x.untyped_storage()._cdata in given for x in results)


def name_of(func: torch._ops.OpOverload) -> str:
    """`add`, `mm`, `mask_unit_attention`: without namespace and overload."""
    return func._schema.name.split("::")[1]


def cost_of(func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: object) -> Cost:
    """The cost of one call that an `TorchDispatchMode` has seen."""
    name = name_of(func)
    if name in _FREE or func.namespace == "prim" or is_view(func, args, out):
        return NOTHING
    if not func._schema.is_mutable and not any(True for _ in tensors(out)):
        return NOTHING  # asks a question: dtypes, sizes
    special = _SPECIAL.get(name)
    if special is not None:
        moved, launches = special(func, args, kwargs, out)
    elif name.startswith(("_foreach", "_fused_adam")):
        moved, launches = _multi_tensor(func, args, kwargs, out)
    else:
        moved, launches = _plain(func, args, kwargs, out)
    flops = _flops(func, args, kwargs, out)
    low = any(x.dtype in LOW_PRECISION for x in tensors(args, kwargs, out) if x.is_floating_point())
    return Cost(moved, flops, launches, low)


def _flops(func, args, kwargs, out) -> int:
    name = name_of(func)
    if name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"):
        return 2 * _attention_product(args[0], args[1])
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return 5 * _attention_product(args[1], args[2])
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _attention_product(q, k):
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * q.shape[-1]


# ---- bytes and launches ----


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """Arguments that the schema says are written."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            found += tensors(value)
    return found


def _plain(func, args, kwargs, out):
    written = _written(func, args, kwargs)
    results = written or list(tensors(out))
    return once(tensors(args, kwargs)) + once(results), 1


def _overwrite(func, args, kwargs, out):
    """Writes its first argument without reading it."""
    return once(tensors(args[1:], kwargs)) + size_of(args[0]), 1


def _write(func, args, kwargs, out):
    return once(tensors(out)), 1


def _norm_backward(func, args, kwargs, out):
    """Two kernels read both tensors: one makes the input's gradient, one those of weight and bias."""
    grad, x, mask = args[0], args[1], args[-1]
    passes = bool(mask[0]) + bool(mask[1] or mask[2])
    return passes * (size_of(grad) + size_of(x)) + once(tensors(out)), passes


def _safe_softmax(func, args, kwargs, out):
    """softmax; then `isneginf` (a byte each), `all` of those, `where`; and a scalar."""
    n = out.numel()
    return size_of(args[0]) + n + n + 4 * size_of(out), 5


def _index(func, args, kwargs, out):
    """Reads what it picks and where it picks it."""
    return once(x for x in tensors(args[1:], kwargs)) + 2 * once(tensors(out)), 1


def _scatter(func, args, kwargs, out):
    """Reads where and what, writes as much; out of place it also copies."""
    copied = 0 if func._schema.is_mutable else 2 * size_of(args[0])
    source = args[3].numel() if len(args) > 3 and isinstance(args[3], torch.Tensor) else args[2].numel()
    return copied + once(tensors(args[1:], kwargs)) + source * args[0].element_size(), 1 if not copied else 2


def _copy_if_given(func, args, kwargs, out):
    return once(tensors(args[:1])) + once(tensors(out)), 1


def _index_put(func, args, kwargs, out):
    """Indices and values are read, values written. To accumulate, 64-bit keys and places are sorted first.

    The sort is counted as four passes of a radix sort, which is what 27-bit keys take.
    """
    target, indices, values = args[:3]
    copied = 0 if func._schema.is_mutable else 2 * size_of(target)
    moved = copied + once(tensors(indices)) + once([values]) + values.numel() * target.element_size()
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    count = max((x.numel() for x in tensors(indices)), default=0)
    return (moved + 4 * 32 * count, 8) if accumulate else (moved, 1 + bool(copied))


def in_place(func: torch._ops.OpOverload, args: tuple, cost: Cost) -> Cost:
    """An out-of-place scatter as autograd does it on tensors with data: in place, into zeros of its own making."""
    if name_of(func) not in ("scatter", "scatter_add", "index_put"):
        return cost
    return replace(cost, bytes=cost.bytes - 2 * size_of(args[0]), launches=max(cost.launches - 1, 1))


def nonzero_cost(mask: torch.Tensor, count: int) -> Cost:
    """Finding the True elements of a boolean index: counted, then written as one int64 for each dimension.

    On a GPU the host waits in between for the count, which no figure here contains.
    """
    return Cost(2 * size_of(mask) + 8 * count * mask.ndim + 16 * count, 0, 5)


def _multi_tensor(func, args, kwargs, out):
    if name_of(func).startswith("_fused_adam"):  # (params, grads, averages, averages of squares, ...); not: gradients
        moved = sum(2 * size_of(x) for x in tensors(args[0], args[2], args[3])) + once(tensors(args[1]))
        lists = args[0]
    else:
        moved, _ = _plain(func, args, kwargs, out)
        lists = args[0]
    chunks = sum(-(-x.numel() // CHUNK) for x in lists)
    return moved, max(-(-len(lists) // TENSORS_PER_LAUNCH), -(-chunks // CHUNKS_PER_LAUNCH))


def _long_attention_backward(func, args, kwargs, out):
    """Rows of more than 64 keys take two kernels, which both read qkv and the output's gradient."""
    grad_out, qkv = args[0], args[1]
    windows = args[5] if len(args) > 5 else 1
    passes = 2 if qkv.shape[1] // windows > 64 else 1
    saved = once(tensors(args[2:4]))
    return passes * (size_of(grad_out) + size_of(qkv)) + saved + once(tensors(out)), passes


def _window_attention_backward(func, args, kwargs, out):
    """As above: two kernels where a window, or the whole map, has more than 64 keys."""
    grad_out, qkv, window = args[0], args[1], args[4]
    keys = math.prod(window) or qkv.shape[1] * qkv.shape[2]
    passes = 2 if keys > 64 else 1
    return passes * (size_of(grad_out) + size_of(qkv)) + once(tensors(out)), passes


def _embed_tokens(func, args, kwargs, out):
    """With `keep` only the visible patches are read."""
    patches, position = args[0], args[1]
    keep = args[4] if len(args) > 4 else kwargs.get("keep")
    read = out.numel() * patches.element_size()
    return read + size_of(position) + (size_of(keep) if keep is not None else 0) + size_of(out), 1


_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "device"}
_FREE |= {"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size", "_version"}
_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift"}
_SPECIAL = {
    **dict.fromkeys(("copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "random_"), _overwrite),
    **dict.fromkeys(("zeros", "ones", "full", "arange", "scalar_tensor", "rand", "randn", "rand_like"), _write),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), _write),
    "native_layer_norm_backward": _norm_backward,
    "_safe_softmax": _safe_softmax,
    **dict.fromkeys(("index", "gather", "index_select", "embedding"), _index),
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_"), _scatter),
    **dict.fromkeys(("index_put", "index_put_", "_unsafe_index_put"), _index_put),
    **dict.fromkeys(("select_backward", "slice_backward"), _copy_if_given),
    "mask_unit_attention_backward": _long_attention_backward,
    "window_attention_backward": _window_attention_backward,
    "embed_tokens": _embed_tokens,
}


# ---- kinds, as the tables group them ----

KINDS = ("GEMM", "attention", "norm", "GELU", "add", "cast", "copy", "sum", "token order", "optimizer", "other")
_KIND_OF = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"), "GEMM"),
    **dict.fromkeys(("native_layer_norm", "native_layer_norm_backward"), "norm"),
    **dict.fromkeys(("gelu", "gelu_backward"), "GELU"),
    **dict.fromkeys(("add", "add_", "addcmul", "mul", "div", "div_", "bernoulli_"), "add"),
    "_to_copy": "cast",
    **dict.fromkeys(("clone", "copy_", "stack", "cat", "select_backward", "slice_backward"), "copy"),
    **dict.fromkeys(("sum", "mean"), "sum"),
    **dict.fromkeys(("unroll", "reroll", "reroll_masked", "embed_tokens", "embed_tokens_backward"), "token order"),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_softmax_backward_data"), "attention"),
}


def kind_of(func: torch._ops.OpOverload) -> str:
    """One of KINDS, by name."""
    name = name_of(func)
    if "attention" in name or "dot_product" in name:
        return "attention"
    if func.namespace == "hiera_kernels":
        for part, kind in (("norm", "norm"), ("gelu", "GELU"), ("mlp", "GEMM"), ("linear", "GEMM"), ("pool", "other")):
            if part in name:
                return kind
    return _KIND_OF.get(name, "other")

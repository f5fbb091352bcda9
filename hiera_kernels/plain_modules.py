"""Which submodules a fused block may read instead of call.

Reading a weight goes past whatever a call would run: hooks (pruning, FSDP, offloading), parametrizations, a wrapper or
a subclass (LoRA, quantised layers). So a submodule is read only where a call is known to do nothing else; asked at
every call, because hooks come and go.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

# With the functions that they have now: a library that patches PyTorch's own classes wants to be called.
_FORWARDS = {cls: cls.forward for cls in (nn.LayerNorm, nn.Linear, nn.GELU, nn.Dropout, nn.Identity)}
# Whatever else holds a parameter (DTensor, quantised, offloaded) is no block of memory to be read.
_DATA = (torch.Tensor, nn.Parameter, FakeTensor)


def is_heard(module: nn.Module) -> bool:
    """Whether anything runs when `module` is called besides the `forward` of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )


def is_prepared(module: nn.Module) -> bool:
    """Whether anything runs before the `forward` of the class of `module`, which may change its parameters unseen."""
    return bool(module._forward_pre_hooks or "forward" in module.__dict__ or torch_module._global_forward_pre_hooks)


def is_plain(module: nn.Module | None, cls: type) -> bool:
    """Whether `module` is of PyTorch's own class `cls`, not of one derived from it, and nothing listens to it."""
    return type(module) is cls and cls.forward is _FORWARDS[cls] and not is_heard(module)


def is_readable_linear(module: nn.Module | None) -> bool:
    """Whether a call of `module` is `F.linear(x, module.weight, module.bias)` and nothing more."""
    return is_plain(module, nn.Linear) and _is_data(module.weight) and _is_data(module.bias)


def is_readable_norm(module: nn.Module | None) -> bool:
    """Whether a call of `module` is `F.layer_norm` over the last dimension, with its parameters, and nothing more."""
    return (
        (is_plain(module, nn.LayerNorm) or is_timm_norm(module))
        and len(module.normalized_shape) == 1
        and _is_data(module.weight)
        and _is_data(module.bias)
    )


def is_timm_norm(module: nn.Module | None) -> bool:
    """Whether `module` is timm's own LayerNorm with its one flag off: then its call is `F.layer_norm` too.

    Known by its code: what it would do with the flag on asks for autocast, which no comparison on a CPU could settle.
    """
    return _is_norm_of_timm(type(module)) and not module._fast_norm and not is_heard(module)


def _is_norm_of_timm(cls: type) -> bool:
    if cls not in _NORMS:
        code = getattr(vars(cls).get("forward"), "__code__", None)
        own = cls.__bases__ == (nn.LayerNorm,) and (cls.__module__, cls.__name__) == ("timm.layers.norm", "LayerNorm")
        _NORMS[cls] = own and code is not None and code.co_names == _NAMES_IN_TIMM_NORM
    return _NORMS[cls]


_NORMS: dict[type, bool] = {}
_NAMES_IN_TIMM_NORM = (
    *("_fast_norm", "fast_layer_norm", "normalized_shape", "weight", "bias", "eps"),
    *("F", "layer_norm"),
)


def is_erf_gelu(module: nn.Module | None) -> bool:
    """Whether a call of `module` is `F.gelu(x)`, by the error function."""
    return is_plain(module, nn.GELU) and module.approximate == "none"


def is_inert(module: nn.Module | None) -> bool:
    """Whether a call of `module` gives its input back, now: nothing, an Identity, a Dropout that is off."""
    if module is None or is_plain(module, nn.Identity):
        return True
    return is_plain(module, nn.Dropout) and (module.p == 0 or not module.training)


def _is_data(tensor: torch.Tensor | None) -> bool:
    return tensor is None or type(tensor) in _DATA

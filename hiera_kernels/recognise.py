"""Is this module what it looks like? Structure and code first, then numbers, once per class.

Nothing here calls the user's module, its submodules or its hooks (see `hiera_kernels.lookalike`).
"""

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from hiera_kernels.lookalike import Fresh, NotComparable, Probe, attributes, difference
from hiera_kernels.subclass import stock_class


class Target:
    """What an adapter says about one kind of module: how to know it, and which of its methods calls which op."""

    name: str  # stable: stored modules refer to their target by it
    looks_for: str  # for the error message when nothing matches
    ops: tuple[str, ...]  # for the report
    method: str = "forward"
    # Attributes that the look-alikes hold by themselves, and that `fused` reads at every call as the original does.
    known: frozenset[str] = frozenset()
    # Methods that the look-alikes replace, because `fused` calls them as the original does: what they read is theirs.
    opaque: frozenset[str] = frozenset()

    def resembles(self, module: nn.Module) -> bool:
        """Whether the module is near enough to be worth a line in the report."""
        raise NotImplementedError

    def obstacle(self, module: nn.Module) -> str | None:
        """Why attributes and shapes rule the module out, or None."""
        raise NotImplementedError

    def probes(self, module: nn.Module, fresh: Fresh) -> list[Probe]:
        """The calls that tell the original from anything else."""
        raise NotImplementedError

    def note(self, module: nn.Module) -> str | None:
        """What else the report should say of a module that is swapped, or None."""
        return None

    def declined(self, module: nn.Module, x: torch.Tensor) -> str | None:
        """Why no kernel serves the op as this module calls it, on the device and in the dtype of `x`, an empty tensor.

        None if one does, or if only a call can tell.
        """
        return None

    def arrived(self, module: nn.Module) -> None:
        """Called on a module that has been swapped, copied or loaded: what `fused` wants to know of it."""

    def released(self, module: nn.Module) -> None:
        """Called on a module that has been given back its class: forget all that."""

    @staticmethod
    def applies(module: nn.Module, *args, **kwargs) -> bool:
        """Asked at every call: whether `fused` serves it. Where not, the original runs."""
        return True

    @staticmethod
    def fused(module: nn.Module, *args, **kwargs):
        """What takes the place of the original method."""
        raise NotImplementedError


_VERDICTS: "weakref.WeakKeyDictionary[type, dict]" = weakref.WeakKeyDictionary()

# One comparison at a time: each saves, seeds and restores the CPU's one generator. It guards the verdicts, too.
_COMPARING = threading.RLock()


def refusal(module: nn.Module, target: Target) -> str | None:
    """Why `module` cannot be swapped as `target`, in words; None if it can."""
    if target.method in vars(module):
        return f"its `{target.method}` was replaced on the instance, which goes before any class"
    cls = stock_class(module)
    method = written_method(cls, target.method)
    if not isinstance(method, types.FunctionType):
        return f"the `{target.method}` of its class is not a Python function"
    if hasattr(method, "_torchdynamo_orig_callable"):
        return f"the `{target.method}` of its class is compiled by itself"
    if registry := next((base for base in own_bases(cls) if _registers(base)), None):
        return f"its class cannot be extended unseen: {registry.__qualname__} defines `__init_subclass__`"
    if reason := target.obstacle(module) or _unlike_arguments(method, target):
        return reason
    code, names = reach(cls, target.method, target.opaque)
    return (
        _unknown_setting(module, cls, names, target)
        or _looked_up(code, target)
        or _unseen(names, target)
        or _verdict(cls, code, module, target)
    )


def written_method(cls: type, name: str) -> object:
    """The method `name` of `cls`, below what `__init_subclass__` of a base wraps around that of every subclass.

    transformers' layers have their `forward` wrapped so, for checkpointing. The class that `swap_class` makes is a
    subclass like any other: the same wrapper comes around our method, so only what is in it needs to be judged.
    """
    return _unwrapped(getattr(cls, name, None), _wrappers(cls))


def _wrappers(cls: type) -> frozenset[types.CodeType]:
    found: set[types.CodeType] = set()
    for base in own_bases(cls):
        hook = getattr(vars(base).get("__init_subclass__"), "__func__", None)
        if isinstance(hook, types.FunctionType):
            found.update(each for each in hook.__code__.co_consts if isinstance(each, types.CodeType))
    return frozenset(found)


def _unwrapped(function: object, wrappers: frozenset[types.CodeType]) -> object:
    while getattr(function, "__code__", None) in wrappers and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _registers(base: type) -> bool:
    # These do nothing with a class that a second one of the same name would upset.
    known = base.__module__.partition(".")[0] in ("typing", "huggingface_hub", "torch", "transformers")
    return "__init_subclass__" in vars(base) and not known


def _unlike_arguments(method: types.FunctionType, target: Target) -> str | None:
    """The op has to take every call that the original takes: the same arguments first, with the same defaults."""
    wanted, offered = (list(inspect.signature(f).parameters.values())[1:] for f in (method, target.fused))
    for i, parameter in enumerate(wanted):
        ours = offered[i] if i < len(offered) else None
        same = ours is not None and (parameter.name, parameter.kind) == (ours.name, ours.kind)
        if not same or not (parameter.default is ours.default or parameter.default is inspect.Parameter.empty):
            return f"its `{target.method}` takes other arguments than hiera_kernels knows: `{parameter}`"
    return None


def _unknown_setting(module: nn.Module, cls: type, names: frozenset[str], target: Target) -> str | None:
    """Whatever the method reads and `fused` does not follow: what is without effect today may have one tomorrow.

    A dropout rate of 0 that a schedule raises later would be lost in silence.
    """
    for name, value in {**class_attributes(cls), **attributes(module)}.items():
        if name in names and name not in target.known:
            return f"its `{target.method}` reads `{name}` ({type(value).__name__}), which hiera_kernels does not know"
    return None


def _looked_up(code: frozenset[types.CodeType], target: Target) -> str | None:
    """The same for what is not there yet: `getattr(self, "drop", 0.0)`."""
    for each in code:
        if each.co_varnames[:1] != ("self",) or not {"getattr", "hasattr"} & set(each.co_names):
            continue
        for name in each.co_consts:
            # hasattr(F, "scaled_dot_product_attention") asks which PyTorch this is.
            if isinstance(name, str) and name.isidentifier() and name not in target.known and not hasattr(F, name):
                return f"its `{target.method}` looks for `{name}`, which may be set later"
    return None


def _unseen(names: frozenset[str], target: Target) -> str | None:
    """What changes no number here, on small tensors on the CPU, and is wanted all the same."""
    for name in sorted(names):
        if "checkpoint" in name or name in ("save_on_cpu", "saved_tensors_hooks"):
            return f"its `{target.method}` decides what is kept in memory for the backward (`{name}`)"
        if "autocast" in name or name in _ABOUT_THE_DEVICE:
            return f"its `{target.method}` may depend on the device (`{name}`), and is compared only on the CPU"
    return None


_ABOUT_THE_DEVICE = frozenset(
    ("amp", "custom_fwd", "custom_bwd", "cuda", "xpu", "mps", "hip", "is_cpu", "is_cuda", "is_xpu", "is_mps")
)


def _verdict(cls: type, code: frozenset[types.CodeType], module: nn.Module, target: Target) -> str | None:
    with _COMPARING:
        verdicts = _VERDICTS.setdefault(cls, {})
        key = (target.name, code)  # the code itself, because a class may be patched between two calls of accelerate
        if key not in verdicts:
            try:
                method = written_method(cls, target.method)
                verdicts[key] = difference(cls, lambda fresh: target.probes(module, fresh), method, target.fused)
            except NotComparable as error:
                return str(error)  # and no verdict: out of memory, say, is no property of the class
        return verdicts[key]


def class_attributes(cls: type) -> dict[str, object]:
    """What the class and its bases hold besides methods: instances without an attribute of that name read these."""
    found: dict[str, object] = {}
    for base in reversed(own_bases(cls)):
        found.update(vars(base))
    methods = (types.FunctionType, staticmethod, classmethod, property)  # `reach` follows them
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, methods) and not (name.startswith("__") and name.endswith("__"))
    }


def own_bases(cls: type) -> list[type]:
    """The class and its bases, mixins on either side of nn.Module too, but not nn.Module's own."""
    return [base for base in cls.__mro__ if base not in nn.Module.__mro__]


def reach(
    cls: type, method: str, opaque: frozenset[str] = frozenset()
) -> tuple[frozenset[types.CodeType], frozenset[str]]:
    """The code of a method and of what it may call (methods by name, but `opaque` ones; functions by their globals),
    and every name in it: attributes, variables, words in quotes, and what PyTorch's functions in it are really called.

    More than runs, never less, but for what PyTorch, classes or C hide.
    """
    wrappers = _wrappers(cls)
    queue = [_unwrapped(each, wrappers) for each in _definitions(cls, method)]
    seen: set[types.CodeType] = set()
    found: set[str] = set()
    while queue:
        function = queue.pop()
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        queue += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        queue.append(getattr(function, "__wrapped__", None))
        names = set(_names_in(function.__code__))
        found |= names
        scopes = [function.__globals__]
        scopes += [vars(m) for n in names if isinstance(m := function.__globals__.get(n), types.ModuleType)]
        for name in names:
            called = [scope.get(name) for scope in scopes if name in scope]
            if name not in opaque:
                called += [_unwrapped(each, wrappers) for each in _definitions(cls, name)]
            for each in called:
                each = each.func if isinstance(each, functools.partial) else each
                if str(getattr(each, "__module__", None)).startswith("torch."):
                    found.add(str(getattr(each, "__name__", None)))
                else:
                    queue.append(each)
    return frozenset(seen), frozenset(found)


def _definitions(cls: type, name: str) -> Iterator[object]:
    for base in own_bases(cls):
        value = vars(base).get(name)
        if isinstance(value, property):
            yield from (value.fget, value.fset)
        else:
            yield getattr(value, "__func__", value)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from (code.co_name, *code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _filled(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False

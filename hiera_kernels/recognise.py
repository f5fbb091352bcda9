"""Is this module what it looks like? Structure first, then numbers, once per class and setting.

Nothing here calls the user's module, its submodules or its hooks (see `hiera_kernels.lookalike`).
"""

import types
import weakref
from collections.abc import Iterator

from torch import nn

from hiera_kernels.lookalike import Fresh, Probe, difference, other_attributes, settings
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

    @staticmethod
    def applies(module: nn.Module, *args, **kwargs) -> bool:
        """Asked at every call: whether `fused` serves it. Where not, the original runs."""
        return True

    @staticmethod
    def fused(module: nn.Module, *args, **kwargs):
        """What takes the place of the original method."""
        raise NotImplementedError


_VERDICTS: "weakref.WeakKeyDictionary[type, dict]" = weakref.WeakKeyDictionary()


def refusal(module: nn.Module, target: Target) -> str | None:
    """Why `module` cannot be swapped as `target`, in words; None if it can."""
    if target.method in vars(module):
        return f"its `{target.method}` was replaced on the instance, which goes before any class"
    cls = stock_class(module)
    method = getattr(cls, target.method, None)
    if not isinstance(method, types.FunctionType):
        return f"the `{target.method}` of its class is not a Python function"
    if hasattr(method, "_torchdynamo_orig_callable"):
        return f"the `{target.method}` of its class is compiled by itself"
    if reason := target.obstacle(module):
        return reason
    code = reachable_code(cls, target.method, target.opaque)
    names = {name for each in code for name in _names_in(each)}
    for name, value in other_attributes(module).items():
        if name in names and name not in target.known and value is not None:
            return f"its `{target.method}` reads `{name}` ({type(value).__name__}), which hiera_kernels does not know"
    given = {name: value for name, value in settings(module).items() if name in names}
    return _verdict(cls, code, module, target, given)


def _verdict(cls: type, code: frozenset[types.CodeType], module: nn.Module, target: Target, given: dict) -> str | None:
    extra = {name: value for name, value in given.items() if name not in target.known}
    verdicts = _VERDICTS.setdefault(cls, {})
    # The code itself, because a class may be patched between two calls of accelerate.
    key = (target.name, code, repr(sorted(extra.items())))
    if key not in verdicts:
        method = getattr(cls, target.method)
        reason = None
        for variant in (given, _disturbed(given, target.known)):
            reason = reason or difference(
                cls, lambda fresh: target.probes(module, fresh), variant, method, target.fused
            )
        verdicts[key] = reason
    return verdicts[key]


def _disturbed(given: dict, known: frozenset[str]) -> dict:
    """Numbers and flags that the op does not follow must not matter: with others in their place nothing may change.

    A dropout rate of 0 that a schedule raises later would be lost in silence otherwise.
    """
    changed = dict(given)
    for name, value in given.items():
        if name not in known and isinstance(value, bool):
            changed[name] = not value
        elif name not in known and isinstance(value, float):
            changed[name] = value * 0.5 + 0.25
    return changed


def reachable_code(cls: type, method: str, opaque: frozenset[str] = frozenset()) -> frozenset[types.CodeType]:
    """The code of a method and of what it may call: methods by name (but `opaque` ones), functions by their globals.

    More than runs, never less, but for what PyTorch or C hides.
    """
    queue = list(_definitions(cls, method))
    seen: set[types.CodeType] = set()
    while queue:
        function = queue.pop()
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        queue += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        queue.append(getattr(function, "__wrapped__", None))
        names = set(_names_in(function.__code__))
        scopes = [function.__globals__]
        scopes += [vars(m) for n in names if isinstance(m := function.__globals__.get(n), types.ModuleType)]
        for name in names:
            called = [scope.get(name) for scope in scopes if name in scope]
            if name not in opaque:
                called += _definitions(cls, name)
            queue += [c for c in called if not str(getattr(c, "__module__", None)).startswith("torch.")]
    return frozenset(seen)


def _definitions(cls: type, name: str) -> Iterator[object]:
    for base in cls.__mro__:
        if base is nn.Module:
            return
        value = vars(base).get(name)
        if isinstance(value, property):
            yield from (value.fget, value.fset)
        else:
            yield getattr(value, "__func__", value)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _filled(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False

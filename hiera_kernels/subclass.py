"""The class that takes the place of a module's class: a subclass made at run time, one per class and target.

Changing `module.__class__` keeps everything that belongs to the instance (parameters, buffers, hooks, training flag)
and keeps `isinstance`, which neither a wrapper module nor a rebound `forward` does. The subclass bears the name of the
class that it extends, so `repr` and error messages stay as they were, and it stores itself as that class.
"""

import functools
import operator
import threading
import types
import warnings
import weakref

import torch
from torch import nn
from torch.fx import Proxy

from hiera_kernels.ops.switch import is_disabled

# Values only are weak: a class lives as long as a module (or FSDP's own cache) uses it, and its key as long as it.
_CLASSES = weakref.WeakValueDictionary()
_LOCK = threading.RLock()

# Names of the class attributes that hold what was replaced and by what: long, because a user's class has names too.
STOCK = "_hiera_kernels_stock_class"
TARGET = "_hiera_kernels_target"
OURS = "_hiera_kernels_class"


def swapped_class(original, target):
    """The subclass of `original` whose method `target.method` calls our ops; the same object at every call."""
    with _LOCK:
        found = _CLASSES.get((original, target.name))
        if found is None:
            found = _CLASSES[original, target.name] = _make_class(original, target)
        return found


def _make_class(original, target):
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        STOCK: original,
        TARGET: target,
        target.method: _entry(getattr(original, target.method), target),
        "__reduce_ex__": _reduce_ex,
        "__setstate__": _setstate,
    }
    # The only base: with another one before it, Python finds the memory layouts of the two classes different.
    made = type(original)(original.__name__, (original,), namespace)
    setattr(made, OURS, made)
    return made


def core_class(module):
    """The class that holds the module's methods: its class, less the classes that parametrizations put on top."""
    cls = type(module)
    while _is_parametrized_class(cls):
        cls = cls.__bases__[0]
    return cls


def stock_class(module):
    """The class whose methods `module` would run without us: below ours if it is swapped, else `core_class`."""
    ours = _our_class(type(module))
    return core_class(module) if ours is None else getattr(ours, STOCK)


def target_of(module):
    """The target as which `module` is swapped, or None."""
    return getattr(type(module), TARGET, None)


def is_exactly_ours(module):
    """Whether the class of `module` is our subclass itself, and none that somebody (FSDP2, a user) derived from it."""
    return getattr(type(module), OURS, None) is type(module)


def swap_class(module, target):
    """Make `module` an instance of the subclass; its parametrizations, if any, stay on top.

    `torch.nn.utils.parametrize.remove_parametrizations` takes properties off `type(module)` and steps down to its first
    base: our class has to lie below, or removing a parametrization after `accelerate` would fail.
    """
    core = core_class(module)
    module.__class__ = _rebased(type(module), core, swapped_class(core, target))


def unswap_class(module):
    """Give `module` back its class; whatever else was derived from our subclass since (FSDP2) is derived anew."""
    ours = _our_class(type(module))
    if ours is not None:
        module.__class__ = _rebased(type(module), ours, getattr(ours, STOCK))
        getattr(ours, TARGET).released(module)


def rebuild(target_name, stateful, function, arguments):
    """What a stored module calls on load: the original object first, then the swap, wherever it still holds.

    With `stateful`, attributes are still to come, and `__setstate__` judges when they are there.
    """
    from hiera_kernels.adapters import target_named

    module = function(*arguments)
    target = target_named(target_name)
    if target is None:
        _warn_left_alone(module, f"this version knows no {target_name}")
    elif isinstance(module, nn.Module):
        swap_class(module, target)
        if not stateful:
            _believe_or_restore(module)
    return module


def _believe_or_restore(module):
    """Keep the swap of a loaded or copied module only if its class, as this process has it, is still one we know."""
    from hiera_kernels.recognise import refusal

    target = target_of(module)
    reason = refusal(module, target)
    if reason is None:
        target.arrived(module)
    else:
        unswap_class(module)
        _warn_left_alone(module, reason)


def _warn_left_alone(module, reason):
    warnings.warn(
        f"a {type(module).__qualname__} that was accelerated when it was stored runs plain now: {reason}", stacklevel=3
    )


def _reduce_ex(self, protocol):
    """How a swapped module is stored: as an object of its original class, which is the one that its name leads to."""
    ours = _our_class(type(self))
    reduced = super(ours, self).__reduce_ex__(protocol)
    if type(self) is not ours or not isinstance(reduced, tuple):
        return reduced  # a class that another tool derived from ours: stored, or refused, as that tool has it
    function, arguments, *rest = reduced
    arguments = tuple(getattr(ours, STOCK) if item is ours else item for item in arguments)
    stateful = bool(rest) and rest[0] is not None
    return (rebuild, (target_of(self).name, stateful, function, arguments), *rest)


def _setstate(self, state):
    super(_our_class(type(self)), self).__setstate__(state)
    _believe_or_restore(self)


def _entry(original, target):
    applies, fused = target.applies, target.fused

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        # torch.jit.trace turns sizes into tensors, and torch.fx tensors into proxies, which the ops refuse; a trace is
        # plain PyTorch, as it always was.
        traced = torch.jit.is_tracing() or any(isinstance(item, Proxy) for item in (*args, *kwargs.values()))
        if traced or is_disabled() or not applies(self, *args, **kwargs):
            return original(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    return method


def _our_class(cls):
    return next((base for base in cls.__mro__ if STOCK in vars(base)), None)


def _is_parametrized_class(cls):
    return vars(cls).get("__getstate__") is not None and cls.__name__ == "Parametrized" + cls.__bases__[0].__name__


def _rebased(cls, old, new):
    """`new`, or where `cls` is a class derived from `old`, a copy of `cls` that is derived from `new` instead."""
    if cls is old:
        return new
    if "rebased_from" in vars(cls):
        source, names = vars(cls)["rebased_from"]
        if new in source.__mro__ and names == _own_names(cls):
            return source
    bases = tuple(_rebased(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    itself = types.CellType()
    namespace = {name: _rewritten(vars(cls)[name], cls, itself) for name in _own_names(cls)}
    namespace["rebased_from"] = (cls, _own_names(cls))
    itself.cell_contents = made = type(cls)(cls.__name__, bases, namespace)
    return made


def _rewritten(member, cls, itself):
    """`member` of `cls`; where it uses `super()` or `__class__`, a copy in which they mean the class in the cell.

    Python binds the two to the class in whose body they were written.
    """
    if isinstance(member, (staticmethod, classmethod)):
        inner = _rewritten(member.__func__, cls, itself)
        return member if inner is member.__func__ else type(member)(inner)
    if isinstance(member, property):
        functions = (member.fget, member.fset, member.fdel)
        copies = [_rewritten(function, cls, itself) for function in functions]
        return member if all(map(operator.is_, copies, functions)) else property(*copies, doc=member.__doc__)
    if not isinstance(member, types.FunctionType) or member.__closure__ is None:
        return member
    closure = tuple(_rewritten_cell(cell, cls, itself, member) for cell in member.__closure__)
    if all(map(operator.is_, closure, member.__closure__)):
        return member
    made = types.FunctionType(member.__code__, member.__globals__, member.__name__, member.__defaults__, closure)
    made.__kwdefaults__ = member.__kwdefaults__
    functools.update_wrapper(made, member)
    made.__dict__ = dict(vars(member))  # without the `__wrapped__` of update_wrapper
    return made


def _rewritten_cell(cell, cls, itself, holder):
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return cell
    if content is cls:
        return itself
    # A decorator keeps what it decorates in a cell; a function that calls itself keeps itself.
    inner = content if content is holder else _rewritten(content, cls, itself)
    return cell if inner is content else types.CellType(inner)


def _own_names(cls):
    return frozenset(vars(cls)) - {"__dict__", "__weakref__", "rebased_from"}

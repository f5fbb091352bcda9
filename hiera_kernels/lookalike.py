"""Small look-alikes of a module, and the comparison of two functions on them.

A look-alike is an instance of the module's class that never saw `__init__`: it holds what the adapter gives it, small
settings and fresh small stand-ins for everything that computes. Nothing of the user's module is called or read:
parameters may be on the meta device, sharded or quantised, hooks stay silent, and no random number generator moves.
"""

import contextlib
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)

# What every nn.Module keeps in its __dict__ for itself.
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


class Fresh:
    """Makes small random tensors on the CPU with a generator of its own and remembers those that want gradients."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.leaves: list[torch.Tensor] = []
        self._generator = torch.Generator(device="cpu").manual_seed(20230529)

    def __call__(self, *shape: int) -> torch.Tensor:
        """A leaf [*shape], standard normal, that requires a gradient."""
        return self.leaf(self.constant(*shape))

    def constant(self, *shape: int) -> torch.Tensor:
        """Like a leaf, without a gradient."""
        return torch.randn(*shape, dtype=self.dtype, device="cpu", generator=self._generator)

    def leaf(self, values: torch.Tensor) -> torch.Tensor:
        """Make a leaf of given values."""
        leaf = values.detach().clone().requires_grad_()
        self.leaves.append(leaf)
        return leaf


class Affine:
    """Stands in for a Linear: callable, with its attributes, and outside all hooks."""

    def __init__(self, fresh: Fresh, dim_in: int, dim_out: int):
        self.in_features, self.out_features = dim_in, dim_out
        self.weight, self.bias = fresh(dim_out, dim_in), fresh(dim_out)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        return F.linear(x, self.weight, self.bias)


@dataclass
class Probe:
    """One call on a look-alike: what the look-alike holds, and the arguments."""

    name: str
    holds: dict[str, object]
    arguments: tuple
    keywords: dict[str, object] = field(default_factory=dict)


class NotComparable(Exception):
    """A call on a look-alike failed: the message says which, and how."""


def attributes(module: nn.Module) -> dict[str, object]:
    """Everything that `module` itself holds: settings, parameters, buffers, submodules, and objects of any kind."""
    found = {name: value for name, value in vars(module).items() if name not in _OWN_ATTRIBUTES}
    for name in ("_parameters", "_buffers", "_modules"):
        found.update(vars(module)[name])
    return found


def difference(cls: type, probes: Callable[[Fresh], list[Probe]], stock: Callable, ours: Callable) -> str | None:
    """How `ours(module, ...)` and `stock(module, ...)` differ on look-alikes of class `cls`; None if they do not.

    Args:
        cls: The class whose methods the look-alikes have.
        probes: Makes the calls to compare, out of fresh tensors.
        stock, ours: The two functions, called with a look-alike and a probe's arguments.

    Outputs and the gradients of every floating-point leaf are compared, in training and in eval mode, in fp64 (relative
    difference at most 1e-9, fp64 rounding being 1e-16) and under bf16 autocast, where both round in their own ways:
    within 5 %, and the output dtypes must be equal.

    Raises:
        NotComparable: if one of the two functions fails.
    """
    with _nothing_switched_on():
        return _first_difference(cls, probes, stock, ours)


def _first_difference(cls, probes, stock, ours):
    for dtype, autocast, tolerance in ((torch.float64, False, 1e-9), (torch.float32, True, 5e-2)):
        fresh = Fresh(dtype)
        for probe in probes(fresh):
            for training in (True, False):
                run = _Run(cls, {**probe.holds, "training": training}, probe, fresh.leaves, autocast)
                where = f"{probe.name}, {'training' if training else 'eval'}{', bf16 autocast' if autocast else ''}"
                try:
                    expected = run(stock)
                except Exception as error:
                    raise NotComparable(f"it could not be run on a small copy ({where}: {_brief(error)})") from error
                try:
                    actual = run(ours)
                except Exception as error:
                    raise NotComparable(f"the op refused what it accepts ({where}: {_brief(error)})") from error
                if reason := _unequal(expected, actual, tolerance):
                    return f"{reason} ({where})"
    return None


@contextlib.contextmanager
def _nothing_switched_on():
    """Default state of everything that the caller may have switched on and that would reach our small tensors."""
    # No mode that intercepts operations either: fake tensors have no numbers. DisableTorchFunction turns off the modes
    # of that kind, a default device among them; the other turns off dispatch modes.
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        with torch.inference_mode(False), torch.enable_grad():
            yield


@dataclass
class _Run:
    cls: type
    attributes: dict[str, object]
    probe: Probe
    leaves: list[torch.Tensor]
    autocast: bool

    def __call__(self, function: Callable) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Outputs, and the gradients of a fixed random projection of them."""
        module = object.__new__(self.cls)
        nn.Module.__init__(module)
        vars(module).update(copy.deepcopy({k: v for k, v in self.attributes.items() if _is_plain(v)}))
        vars(module).update({k: v for k, v in self.attributes.items() if not _is_plain(v)})
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                # Not torch.manual_seed: it seeds every GPU too, which would never get back the state that it had, and
                # all ranks of a training would draw the same masks and dropout from here on.
                torch.default_generator.manual_seed(7)
                outputs = tensors_in(function(module, *self.probe.arguments, **self.probe.keywords))
                weights = Fresh(torch.float64)
                loss = sum((o.double() * weights.constant(*o.shape)).sum() for o in outputs)
                gradients = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        finally:
            random.setstate(state)
        return [o.detach() for o in outputs], list(gradients)


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def _unequal(expected, actual, tolerance: float) -> str | None:
    outputs, gradients = expected
    if [(o.shape, o.dtype) for o in outputs] != [(o.shape, o.dtype) for o in actual[0]]:
        return "its output has another shape or dtype than the op's"
    for kind, pairs in (
        ("output", zip(outputs, actual[0], strict=True)),
        ("gradient", zip(gradients, actual[1], strict=True)),
    ):
        for wanted, got in pairs:
            if wanted is None or got is None:
                same = wanted is got
            else:
                wanted, got = wanted.double(), got.double()
                scale = wanted.abs().max() if wanted.numel() else torch.zeros(())
                same = bool(((wanted - got).abs() <= tolerance * scale).all())
            if not same:
                return f"its {kind} is not the op's"
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, PLAIN)


def _brief(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"

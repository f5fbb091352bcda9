"""The private names of torch that hiera_kernels uses: a torch that lacks one is told by that name, here.

The list is read from the sources, so it is the one in use. Nothing here imports hiera_kernels at collection, which a
missing name could prevent.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PACKAGE = Path(__file__).parent.parent / "hiera_kernels"


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


# Private state of nn.Module, which no chain of names from `torch` reaches: this torch's, and what we know that we read.
KNOWN_STATE = {"_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
MODULE_STATE = KNOWN_STATE | {name for name in vars(torch.nn.Module()) if is_private(name)}


def dotted(node: ast.expr, known: dict[str, str]) -> str | None:
    """`a.b.c` as the absolute name it stands for, where `a` is imported from torch."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, known)
        return owner and f"{owner}.{node.attr}"
    return None


def private_torch_names(source: str) -> set[str]:
    """Absolute names with a private part that a file imports from torch or reaches by attributes from there."""
    tree, known, used = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    known[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    used.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                used.add(f"{node.module}.{alias.name}")
    used |= {dotted(node, known) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - {None}
    return {name for name in used if is_private(name)}


def resolve(name: str) -> object:
    """The object of that absolute name; AttributeError where there is none."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:  # a submodule that nothing has imported yet
                found = importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError:
                raise AttributeError(f"torch {torch.__version__} has no {name}: {part} is missing") from None
    return found


SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
NAMES = sorted(set().union(*map(private_torch_names, SOURCES.values())))


@pytest.mark.parametrize("name", NAMES)
def test_torch_has(name):
    resolve(name)


def test_torch_modules_have_the_private_state_that_is_read():
    used = set()
    for source in SOURCES.values():
        used |= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)} & MODULE_STATE
    assert used >= KNOWN_STATE
    missing = {name for name in used if not hasattr(torch.nn.Module(), name)}
    assert not missing, f"nn.Module of torch {torch.__version__} has no {sorted(missing)}"


def test_the_list_is_read_rightly():
    source = """
import torch
import torch.utils._pytree as tree, torch._dynamo
from torch._C import DispatchKey as Key
from torch.autograd import forward_ad
import numpy._core

def f(self):
    from torch.nn.modules import module as torch_module
    torch.__version__, torch.ops.hiera_kernels, self._C, numpy._core.x, forward_ad.public, tree.tree_map
    return torch._C._functorch.peek(Key.Autograd)(forward_ad._level, torch_module._has_any())._later
"""
    assert private_torch_names(source) == {
        "torch.utils._pytree", "torch._dynamo", "torch._C.DispatchKey", "torch.utils._pytree.tree_map",
        "torch._C", "torch._C._functorch", "torch._C._functorch.peek", "torch._C.DispatchKey.Autograd",
        "torch.autograd.forward_ad._level", "torch.nn.modules.module._has_any",
    }  # fmt: skip
    for gone in ("torch._C._no_such_name", "torch.no_such_module._x", "torch._C.DispatchKey.AutocastNone"):
        with pytest.raises(AttributeError, match=gone.replace(".", r"\.")):
            resolve(gone)
    assert resolve("torch.nn.modules.module._has_any_global_hook") is torch.nn.modules.module._has_any_global_hook


@pytest.mark.parametrize("absent", [(), ("AutocastXPU",), ("AutocastXPU", "AutocastMPS")])
def test_autocast_keys_of_devices_that_a_torch_does_not_know_are_left_out(monkeypatch, absent):
    real = torch._C.DispatchKey
    keys = {name: key for name, key in vars(real).items() if isinstance(key, real) and name not in absent}
    assert {"AutocastCPU", "AutocastCUDA"} <= keys.keys()
    monkeypatch.setattr(torch._C, "DispatchKey", SimpleNamespace(**keys))
    spec = importlib.util.spec_from_file_location("calling_of_another_torch", PACKAGE / "ops" / "calling.py")
    calling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calling)
    every = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")
    assert tuple(name for name in every if name not in absent) == calling.AUTOCAST_KEYS
    assert all(calling._AUTOCAST.has(keys[name]) for name in calling.AUTOCAST_KEYS)


@pytest.mark.parametrize("absent", ["AutocastCPU", "AutocastCUDA"])
def test_without_the_keys_that_every_torch_has_the_import_fails_by_name(monkeypatch, absent):
    real = torch._C.DispatchKey
    keys = {name: key for name, key in vars(real).items() if isinstance(key, real) and name != absent}
    monkeypatch.setattr(torch._C, "DispatchKey", SimpleNamespace(**keys))
    spec = importlib.util.spec_from_file_location("calling_of_another_torch", PACKAGE / "ops" / "calling.py")
    with pytest.raises(AttributeError, match=absent):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

"""The rules of the house (CONTRIBUTING.md), checked on the files themselves."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hiera_kernels

ROOT = Path(__file__).parent.parent
OUR_TREES = ("hiera", "hiera_kernels", "benchmarks", "examples", "tests")


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # an unpacked source distribution has no git
        files = [path for tree in (*OUR_TREES, "csrc") for path in (ROOT / tree).rglob("*")]
    return [path for path in files if path.suffix in suffixes and path.is_file()]


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of everything that the file imports, at any depth; relative imports are resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names.add(".".join(base))
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


def within(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names for prefix in prefixes if name == prefix or name.startswith(prefix + ".")}


def layer(path: Path) -> int | None:
    """Height of a file of hiera_kernels in the one order of imports; None for the tables of contents."""
    parts = path.relative_to(ROOT / "hiera_kernels").parts
    if parts[0] in ("reference", "ops", "kernels", "adapters"):
        return {"reference": 0, "ops": 1, "kernels": 2, "adapters": 3}[parts[0]]
    return {"__init__.py": None, "extension.py": 0}.get(parts[0], 3)


LAYER_OF_MODULE = {"hiera_kernels.reference": 0, "hiera_kernels.ops": 1, "hiera_kernels.kernels": 2}


def test_imports_of_the_package_run_one_way():
    wrong = []
    for path in tracked(".py"):
        if not path.is_relative_to(ROOT / "hiera_kernels") or layer(path) is None:
            continue
        names = imported_modules(path)
        for module, height in LAYER_OF_MODULE.items():
            if height > layer(path) and within(names, module):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
        if layer(path) < 3:
            above = ("swap", "adapters", "compare", "__main__")
            wrong += [
                f"{path.relative_to(ROOT)} imports {n}" for n in within(names, *(f"hiera_kernels.{m}" for m in above))
            ]
    assert not wrong, "\n".join(wrong)


def test_the_package_knows_no_model_library_and_nothing_outside_itself():
    """A model is recognised by structure: no import of a model library, whose users may have vendored the file."""
    foreign = ("hiera", "tests", "benchmarks", "examples", "timm", "transformers", "sam2", "hiera_upstream")
    for path in tracked(".py"):
        if path.is_relative_to(ROOT / "hiera_kernels"):
            assert not within(imported_modules(path), *foreign), path


def test_the_reference_model_stands_alone():
    """`hiera` knows nothing of hiera_kernels, but for the one line behind the trainer's --accelerate."""
    for path in tracked(".py"):
        if path.is_relative_to(ROOT / "hiera"):
            names = imported_modules(path)
            assert not within(names, "timm", "tests", "benchmarks", "examples"), path
            if path.name != "train.py":
                assert not within(names, "hiera_kernels"), path


def test_no_module_bears_the_name_of_a_public_function():
    """Importing `hiera_kernels.x` binds the attribute x of the package to the module, over a function of that name."""
    modules = {path.stem for path in tracked(".py") if path.is_relative_to(ROOT / "hiera_kernels")}
    assert not modules & set(hiera_kernels.__all__)


def test_no_file_is_longer_than_400_lines():
    long = {
        str(path.relative_to(ROOT)): n
        for path in tracked(".py", ".cpp", ".cu", ".h")
        if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_no_room_without_a_name():
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in tracked(".py", ".cpp", ".cu", ".h") if vague & set(path.with_suffix("").parts)]


def test_no_run_time_environment_variables_of_our_own():
    for path in tracked(".py"):
        if path.is_relative_to(ROOT / "hiera_kernels") or path.is_relative_to(ROOT / "hiera"):
            assert not re.search(r"os\.environ|os\.getenv|getenv\(", path.read_text()), path


def test_no_todo_without_an_open_question():
    questions = (ROOT / "CONTRIBUTING.md").read_text()
    for path in tracked(".py", ".cpp", ".cu", ".h", ".md"):
        for mark in (
            re.findall(r"\b(?:TODO|FIXME|XXX)\b.*", path.read_text()) if path.name != Path(__file__).name else []
        ):
            link = re.search(r"CONTRIBUTING\.md#([\w-]+)", mark)
            assert link, f"{path}: {mark}"
            assert link.group(1) in questions, f"{path}: {mark}"


@pytest.mark.parametrize("name", hiera_kernels.__all__)
def test_every_public_function_is_documented(name):
    """Shapes and dtypes are prose and cannot be checked; that there is something to read can."""
    thing = getattr(hiera_kernels, name)
    if not inspect.isfunction(thing):
        assert inspect.getdoc(thing)
        return
    text = inspect.getdoc(thing) or ""
    wanted = [r"^Equivalent to.*:$|^Equivalent to:"] if thing.__module__.startswith("hiera_kernels.ops") else []
    if inspect.signature(thing).parameters:
        wanted += ["^Args:$", "^Raises:$"]
    missing = [heading for heading in wanted if not re.search(heading, text, re.M)]
    assert not missing, f"{name}: {missing}"
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"\b{parameter}\b", text), f"{name}: argument {parameter} is not explained"


def test_requirements_are_pinned_once():
    """Every extra is pinned in the constraints file, and the build takes the same torch."""
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / "constraints.txt").read_text(), re.M),
    )
    extras = subprocess.run(
        [sys.executable, "requirements/extras.py", "train", "demo", "bench", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert extras
    assert not set(extras) - set(pins)
    assert f'"torch=={pins["torch"]}"' in (ROOT / "pyproject.toml").read_text()

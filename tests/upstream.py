"""The real hiera-transformer, timm, transformers, sam2 and peft, as oracles for the tests.

hiera-transformer 0.1.4 installs a top-level package named `hiera`, which is what this repository's reference model is
called too. So it lives in a directory of its own, `.upstream/` (`make test` puts it there), and is loaded from it
under the name `hiera_upstream`; nothing here touches `hiera`.

    from tests.upstream import import_timm, load_upstream

    upstream = load_upstream()
    model = upstream.hiera_tiny_224()
"""

import contextlib
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

ALIAS = "hiera_upstream"
PACKAGE = Path(__file__).resolve().parent.parent / ".upstream" / "hiera"


@contextlib.contextmanager
def torchvision_without_operators():
    """Let `import torchvision` succeed beside a CPU-only torch.

    PyPI's torchvision is built for CUDA; beside a CPU-only torch its C++ operators do not load, and the import then
    fails where it attaches fake kernels to them (`operator torchvision::nms does not exist`). Inside this context
    those registrations, and only those, are passed over. timm, and through it hiera-transformer, need nothing but the
    import.
    """
    register_fake = torch.library.register_fake

    def tolerant(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::") and not _operator_exists(op):
            return lambda function: function
        # The registration notes the module that asks for it by walking this many frames up: one more, for this
        # function.
        return register_fake(op, *args, **{**kwargs, "_stacklevel": kwargs.get("_stacklevel", 1) + 1})

    torch.library.register_fake = tolerant
    try:
        yield
    finally:
        torch.library.register_fake = register_fake


def import_timm():
    """timm, imported once per process, whatever build of torch is installed."""
    return load("timm")


def load(name):
    """The module `name` of timm, transformers, sam2 or peft, beside whatever build of torch and torchvision there is.

    Where it is missing this raises, and the test fails: a parity test without its oracle has not passed. Only on a
    machine with a GPU, which brings its own Python, is the test skipped.
    """
    if name not in sys.modules:
        try:
            with torchvision_without_operators():
                # First: whoever wants it later, lazily, finds it loaded.
                importlib.import_module("torchvision")
                importlib.import_module(name)
        except ImportError as error:
            if not torch.cuda.is_available():
                raise
            pytest.skip(f"{name} is not to be had on this GPU machine ({error})")
    return sys.modules[name]


def load_upstream():
    """hiera-transformer as the module `hiera_upstream`, the same object at every call.

    Raises FileNotFoundError where `.upstream/` is missing: a parity test without its oracle must fail, not pass or
    skip.
    """
    if ALIAS in sys.modules:
        return sys.modules[ALIAS]
    if not (PACKAGE / "__init__.py").is_file():
        raise FileNotFoundError(
            f"{PACKAGE} does not hold hiera-transformer, which these tests compare with. `make test` installs "
            "it; by hand: pip install --no-deps --target .upstream hiera-transformer==0.1.4"
        )
    spec = importlib.util.spec_from_file_location(
        ALIAS, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = module
    try:
        with torchvision_without_operators(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it imports timm by a deprecated path
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[ALIAS]
        raise
    return module


def _operator_exists(name):
    namespace, operator = name.split("::")
    return hasattr(getattr(torch.ops, namespace), operator)


def variant_settings(name):
    """The class and the keyword arguments with which upstream builds the variant `name`, without building it.

    Upstream's own functions take no argument that they set themselves (`stages`, the videos' `input_size`), so
    reduced variants are built by the class: `cls(**{**settings, "stages": (1, 1, 1, 1)})`.
    """
    package = load_upstream()
    is_mae = name.startswith("mae_")
    module = sys.modules[f"{ALIAS}.hiera_mae" if is_mae else f"{ALIAS}.hiera"]
    class_name = "MaskedAutoencoderHiera" if is_mae else "Hiera"
    cls = getattr(module, class_name)
    setattr(module, class_name, lambda **settings: settings)
    try:
        return cls, getattr(package, name)()
    finally:
        setattr(module, class_name, cls)

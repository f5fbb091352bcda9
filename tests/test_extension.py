"""The compiled library: what it is made of, and that everything works without it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hiera_kernels import extension

ROOT = Path(__file__).parent.parent


def test_it_is_built_and_loaded():
    assert extension.PATH.exists()
    assert extension.why_not("cpu") is None
    for op in ("unroll", "reroll", "embed_tokens", "embed_tokens_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hiera_kernels::{op}", "CPU"), op


def test_why_not_says_what_to_do():
    assert "no compiled kernel for xpu" in extension.why_not("xpu")
    reason = extension.why_not("cuda")
    assert reason is None or "HIERA_KERNELS_CUDA=1" in reason


def test_it_uses_the_stable_abi_only_and_no_python():
    """What it asks of the outside: the C shims of the stable ABI; no C++ symbol of c10, at or torch, and no Python."""
    done = subprocess.run(["nm", "--dynamic", "--undefined-only", str(extension.PATH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert any(name.startswith(("torch_call_dispatcher", "aoti_torch_")) for name in names)
    foreign = [
        name
        for name in names
        if name.startswith(("Py", "_Py")) or "N2at" in name or "N3c10" in name or "5torch" in name
    ]
    assert foreign == []


# A process of its own: what is loaded once stays loaded.
WITHOUT = """
import sys, pathlib
{prepare}
import torch
from hiera_kernels import extension, ops, reference
reason = extension.why_not("cpu")
x = torch.randn(2, 24, 5, requires_grad=True)
size, strides = (4, 6), ((2, 3),)
out = ops.unroll(x, size, strides)
assert torch.equal(out, x.view(2, 2, 2, 2, 3, 5).permute(0, 2, 4, 1, 3, 5).reshape(2, 24, 5))
assert torch.equal(torch.ops.hiera_kernels.unroll(x, size, [2, 3]), out)
assert torch.equal(ops.reroll(out, size, strides).flatten(1, 2), x)
assert torch.equal(ops.reroll_masked(out[:, :12], strides), reference.reroll_masked(out[:, :12], strides))
p, e = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(1, 24, 5, requires_grad=True)
keep = torch.tensor([[2], [1]])
tokens = ops.embed_tokens(p, e, size, strides, keep)
units = ops.unroll(p.flatten(2).mT + e, size, strides).view(2, 6, 4, 5)
assert torch.equal(tokens, units[torch.arange(2), :, keep[:, 0]])
op = torch.ops.hiera_kernels.embed_tokens(p, e, size, [2, 3], keep)
for a, b in zip(torch.autograd.grad(tokens.square().sum(), (p, e)), torch.autograd.grad(op.square().sum(), (p, e))):
    torch.testing.assert_close(a, b)
print(reason)
"""


def run_without(prepare):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(prepare=prepare)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_works_where_it_was_not_built():
    said = run_without(
        "pathlib.Path.exists = lambda self, real=pathlib.Path.exists: self.suffix != '.so' and real(self)"
    )
    assert "was not built" in said
    assert "C++ compiler" in said


def test_everything_works_where_it_does_not_load():
    said = run_without(
        "import torch\ndef refuse(path): raise OSError('wrong ELF class')\ntorch.ops.load_library = refuse"
    )
    assert "does not load under torch" in said
    assert "wrong ELF class" in said


@pytest.mark.parametrize(("value", "words"), [("yes", "may be 0, 1 or unset"), ("1", "nvcc was found neither")])
def test_the_build_variable_fails_loudly(value, words, tmp_path):
    """HIERA_KERNELS_CUDA=1 on a machine without nvcc is an error, not a build without CUDA."""
    probe = (
        "import importlib.util, shutil\n"
        f"spec = importlib.util.spec_from_file_location('build', {str(ROOT / 'setup.py')!r})\n"
        "build = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(build)\n"
        "shutil.which = lambda *args, **kwargs: None\n"
        "build.wants_cuda()\n"
    )
    environment = {"HIERA_KERNELS_CUDA": value, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert words in done.stderr

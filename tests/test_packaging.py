"""The wheel: one, abi3, hiera_kernels only; beside hiera-transformer it leaves that package's `hiera` untouched."""

import hashlib
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT / ".upstream"


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a build reads, so that a build leaves nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("hiera_kernels", "hiera", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    out = source / "dist"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.iterdir()
    return built


def test_one_abi3_wheel_with_hiera_kernels_only(wheel):
    assert "-cp310-abi3-linux_" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {part for part in top if not part.endswith(".dist-info")} == {"hiera_kernels"}
    assert [name for name in names if name.endswith(".so")], "no compiled extension in the wheel"
    assert [name for name in names if name.endswith("LICENSE")]


def test_the_source_distribution_can_be_built_from(source, tmp_path):
    run(sys.executable, "-c", "from setuptools import build_meta as b; b.build_sdist('sdist')", cwd=source)
    (archive,) = (source / "sdist").iterdir()
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = tmp_path.iterdir()
    for name in ("csrc/token_order.h", "csrc/token_order.cpp", "csrc/token_order.cu", "setup.py", "LICENSE"):
        assert (unpacked / name).is_file(), name


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment that holds hiera-transformer as pip installs it, and sees this one's torch."""
    assert UPSTREAM.is_dir(), "run `make test`: it installs hiera-transformer into .upstream"
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    shutil.copytree(UPSTREAM, site, dirs_exist_ok=True)
    # Plain path lines only: the editable hiera_kernels of this environment must not shine through.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return python, site


def test_beside_hiera_transformer_its_hiera_is_left_alone(wheel, environment, tmp_path):
    python, site = environment

    def fingerprint():
        files = [path for path in sorted((site / "hiera").rglob("*")) if path.suffix != ".pyc"]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}

    before = fingerprint()
    assert before
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert fingerprint() == before

    code = "import hiera_kernels, importlib.util as u; print(hiera_kernels.__file__, u.find_spec('hiera').origin)"
    where = run(python, "-c", code, cwd=tmp_path).split()
    assert where == [str(site / "hiera_kernels" / "__init__.py"), str(site / "hiera" / "__init__.py")]

    code = (
        "import torch, hiera_kernels as k; x = torch.randn(1, 24, 3); s = ((2, 2), (1, 2));"
        "print(k.reroll(k.unroll(x, (2, 12), s), (2, 12), s).flatten(1, 2).equal(x))"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "True"


def test_the_checkout_finds_both(tmp_path):
    """Editable: hiera_kernels from anywhere; hiera, which is not shipped, from the checkout only."""
    code = "import importlib.util as u; print(u.find_spec('hiera_kernels') is not None)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "True"
    code = "import hiera; print(hiera.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=ROOT).strip()) == ROOT / "hiera" / "__init__.py"

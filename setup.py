"""Builds hiera_kernels/_C.abi3.so: C++ always, CUDA on request. Metadata is in pyproject.toml.

One build variable, HIERA_KERNELS_CUDA: 1 builds the CUDA kernels and fails where it cannot, 0 leaves them out, unset
builds them when this torch speaks CUDA and nvcc exists. The library uses PyTorch's stable ABI only and has no Python in
it, so one file serves every Python >= 3.10 and torch >= 2.10.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    sys.exit(f"building hiera-kernels needs torch >= 2.10 in the same environment: {error}")

ROOT = Path(__file__).resolve().parent
TARGETS = ("80", "90", "100", "120")  # A100, H100/H200, B200, RTX 50; PTX of the last serves what comes later
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10: the oldest that has torch::stable::parallel_for


def find_nvcc():
    """The CUDA compiler: CUDA_HOME's if that is set, else the one on PATH, else /usr/local/cuda's, else None."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wants_cuda():
    """Whether to build the CUDA kernels, by HIERA_KERNELS_CUDA or, if that is unset, by what this machine has."""
    choice = os.environ.get("HIERA_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"HIERA_KERNELS_CUDA is {choice!r}; it may be 0, 1 or unset")
    if choice == "1" and find_nvcc() is None:
        sys.exit("HIERA_KERNELS_CUDA=1, but nvcc was found neither in CUDA_HOME, on PATH nor in /usr/local/cuda/bin")
    return choice == "1" or (choice == "" and torch.version.cuda is not None and find_nvcc() is not None)


def nvcc_command(nvcc, source, output, targets=TARGETS):
    """Compile one .cu against the stable headers, which plain nvcc does beside a CPU-only torch too."""
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    return [
        *(nvcc, *flags, *DEFINES, *codes, *(f"-I{path}" for path in include_paths())),
        *("-c", str(source), "-o", str(output)),
    ]


def cuda_runtime_directory(nvcc):
    """Where libcudart_static.a lies: nvcc may be a wrapper script, so it is asked for its own root."""
    probe = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", probe.stderr + probe.stdout, re.MULTILINE)
    root = Path(found[1].strip()) if found else Path(nvcc).resolve().parent.parent
    for directory in (root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))):
        if (directory / "libcudart_static.a").exists():
            return str(directory.resolve())
    sys.exit(f"nvcc was found ({nvcc}), but not libcudart_static.a in lib64, lib or targets/*/lib under {root}")


class Build(BuildExtension):
    """C++ with ninja; before it the .cu with nvcc, as torch's CUDAExtension would refuse to beside a CPU-only torch."""

    def build_extension(self, ext):
        """Compile and link `ext`; any failure ends the build."""
        compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
        if shutil.which(compiler) is None:
            sys.exit(f"a C++ compiler is needed and {compiler} was not found (Debian: apt install g++)")
        if wants_cuda():
            nvcc = find_nvcc()
            output = Path(self.build_temp).absolute() / "token_order.cu.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            command = nvcc_command(nvcc, ROOT / "csrc" / "token_order.cu", output)
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
            ext.extra_objects = [*ext.extra_objects, str(output)]
            # The static runtime leaves no libcudart to be found, so the same file loads under a CPU-only torch.
            ext.library_dirs = [*ext.library_dirs, cuda_runtime_directory(nvcc)]
            ext.libraries = [*ext.libraries, "cudart_static", "rt", "pthread", "dl"]
        super().build_extension(ext)


if __name__ == "__main__":
    extension = CppExtension(
        "hiera_kernels._C",
        ["csrc/token_order.cpp"],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()),
        extra_compile_args={"cxx": ["-O3", "-g0", "-fvisibility=hidden", *DEFINES]},
        py_limited_api=True,
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

"""Builds hiera_kernels/_C.abi3.so: C++ always, CUDA on request. Metadata is in pyproject.toml.

One build variable, HIERA_KERNELS_CUDA: 1 builds the CUDA kernels and fails where it cannot, 0 leaves them out, unset builds
them when this torch speaks CUDA and nvcc exists. The library uses PyTorch's stable ABI only and has no Python in it, so one
file serves every Python >= 3.10 and torch >= 2.10.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent
TARGETS = ("80", "90", "100", "120")  # A100, H100/H200, B200, RTX 50; PTX of the last serves what comes later
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10: the oldest that has torch::stable::parallel_for


def find_nvcc():
    """The CUDA compiler: CUDA_HOME's if that is set, else the one on PATH, else /usr/local/cuda's; None if there is none."""
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
    """The command that compiles one .cu against the stable headers, which plain nvcc does beside a CPU-only torch too."""
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    includes = [f"-I{path}" for path in include_paths()]
    return [
        nvcc,
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        *DEFINES,
        *codes,
        *includes,
        "-c",
        str(source),
        "-o",
        str(output),
    ]


class Build(BuildExtension):
    """Compiles the .cu with nvcc, which torch's CUDAExtension would refuse beside a CPU-only torch, then the C++ with ninja."""

    def build_extension(self, ext):
        if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
            sys.exit(
                f"a C++ compiler is needed and {os.environ.get('CXX', 'g++')} was not found (Debian: apt install g++)"
            )
        if wants_cuda():
            output = Path(self.build_temp).absolute() / "token_order.cu.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            command = nvcc_command(find_nvcc(), ROOT / "csrc" / "token_order.cu", output)
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            ext.extra_objects = [*ext.extra_objects, str(output)]
            ext.define_macros = [*ext.define_macros, ("HIERA_KERNELS_WITH_CUDA", "1")]
            # The static runtime leaves no libcudart to be found, so the same file loads under a CPU-only torch.
            cuda = Path(find_nvcc()).resolve().parent.parent
            ext.library_dirs = [*ext.library_dirs, *(str(p) for p in (cuda / "lib64", cuda / "lib") if p.is_dir())]
            ext.libraries = [*ext.libraries, "cudart_static", "rt", "pthread", "dl"]
        super().build_extension(ext)


extension = CppExtension(
    "hiera_kernels._C",
    ["csrc/token_order.cpp"],
    depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*")],
    extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden", *DEFINES]},
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""The CUDA sources without a GPU: nvcc compiles them for every target, and g++ compiles the same kernels for the host,
where they run thread by thread (tests/cuda_on_host.h). What only a GPU can show is in `make gpu`.
"""

import ctypes
import importlib.util
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from tests.token_oracle import GRID_IDS, GRIDS, kept_rows, rerolled, unrolled, unrolled_place, windows_of

ROOT = Path(__file__).parent.parent
every_grid = pytest.mark.parametrize(("size", "strides"), GRIDS, ids=GRID_IDS)
SMALL_GRIDS = [grid for grid in GRIDS if math.prod(grid[0]) <= 400]
SMALL_IDS = [name for grid, name in zip(GRIDS, GRID_IDS, strict=True) if math.prod(grid[0]) <= 400]
small_grids = pytest.mark.parametrize(("size", "strides"), SMALL_GRIDS, ids=SMALL_IDS)


def setup_module_of_the_build():
    spec = importlib.util.spec_from_file_location("hiera_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_nvcc_compiles_the_kernels(target, tmp_path):
    build = setup_module_of_the_build()
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip(
            "nvcc not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin: the CUDA kernels were not compiled"
        )
    output = tmp_path / "token_order.o"
    command = build.nvcc_command(nvcc, ROOT / "csrc" / "token_order.cu", output, targets=(target,))
    done = subprocess.run([*command, "-Xptxas=-v", "-Werror=all-warnings"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # One stack frame of eight bytes is that of fp64 in the backward; a spill in a kernel that moves bytes would cost.
    frames = [int(found) for found in re.findall(r"(\d+) bytes stack frame", done.stderr)]
    assert len(frames) > 20
    assert max(frames) <= 8, sorted(frames)[-5:]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels as a host library. Built once per worker: 10 s."""
    compiler = shutil.which("g++")
    assert compiler, "these tests need g++, as the package itself does"
    library = tmp_path_factory.mktemp("host") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-fsanitize=undefined"]
    flags += ["-fno-sanitize-recover=undefined", "-static-libubsan"]
    paths = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests", *include_paths())]
    source = ROOT / "tests" / "token_order_on_host.cpp"
    done = subprocess.run(
        [compiler, *flags, *paths, str(source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["threads in order", "threads backwards"])
def kernels(request, host):
    """Both orders must agree: a result that depends on which thread runs first has a barrier missing."""
    host.set_backwards(request.param == "threads backwards")
    return host


def address(array, offset=0):
    return ctypes.c_void_p(array.__array_interface__["data"][0] + offset) if array is not None else None


def grid_arguments(size, strides):
    flat = [s for step in strides for s in step]
    as_array = lambda values: (ctypes.c_int64 * max(1, len(values)))(*values)  # noqa: E731
    return as_array(size), ctypes.c_int64(len(size)), as_array(flat), ctypes.c_int64(len(flat))


# Guard bytes on both sides of an output: no kernel may write there. The front also sets the pointer's alignment.
GUARD = 64


def guarded(shape, dtype, misalign=0):
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.full(GUARD + misalign + size + GUARD + 16, 0xA5, dtype=np.uint8)
    start = GUARD - raw.__array_interface__["data"][0] % 16 % 16 + misalign
    view = raw[start : start + size]
    return raw, view, start


def assert_guards(raw, start, size):
    assert (raw[:start] == 0xA5).all()
    assert (raw[start + size :] == 0xA5).all()


@every_grid
def test_the_index_map_against_counting(host, size, strides):
    place = unrolled_place(size, strides)
    row = (ctypes.c_int64 * 2)()
    for s, n in enumerate(place):
        assert host.map_rows(*grid_arguments(size, strides), ctypes.c_int64(s), row) == 0
        assert row[1] == n
        assert host.map_rows(*grid_arguments(size, strides), ctypes.c_int64(int(n)), row) == 0
        assert row[0] == s


def test_the_index_map_past_32_bits(host):
    """A grid of 2^46 tokens: digits by Python's own integers, at the corners and at random places."""
    size, strides = (1 << 14, 1 << 16, 1 << 16), ((2, 4, 2), (1, 2, 8), (4, 1, 2))
    random = np.random.default_rng(0)
    corners = list(itertools.product(*((0, extent - 1) for extent in size)))
    inner = [tuple(int(random.integers(extent)) for extent in size) for _ in range(200)]
    row = (ctypes.c_int64 * 2)()
    seen = 0
    for coordinates in corners + inner:
        left, extent, n, s = list(coordinates), list(size), 0, 0
        for step in strides:
            for d, stride in enumerate(step):
                n = n * stride + left[d] % stride
                left[d] //= stride
                extent[d] //= stride
        for d in range(3):
            n = n * extent[d] + left[d]
            s = s * size[d] + coordinates[d]
        host.map_rows(*grid_arguments(size, strides), ctypes.c_int64(s), row)
        assert row[1] == n
        host.map_rows(*grid_arguments(size, strides), ctypes.c_int64(n), row)
        assert row[0] == s
        seen = max(seen, n, s)
    assert seen > 1 << 45


@small_grids
@pytest.mark.parametrize("row_bytes", [1, 3, 6, 12, 24, 48, 80, 208])  # vectors of 1, 1, 2, 4, 8, 16, 16, 16 bytes
def test_move_kernel_against_counting(kernels, size, strides, row_bytes):
    n, batch = math.prod(size), 3
    x = np.random.default_rng(0).integers(0, 256, (batch, n, row_bytes), dtype=np.uint8)
    for reroll, expected in ((0, unrolled), (1, rerolled)):
        raw, view, start = guarded(x.shape, np.uint8)
        grid = grid_arguments(size, strides)
        assert (
            kernels.move(address(view), address(x), *grid, ctypes.c_int64(batch), ctypes.c_int64(row_bytes), reroll)
            == 0
        )
        np.testing.assert_array_equal(view.reshape(x.shape), expected(x, size, strides).reshape(x.shape))
        assert_guards(raw, start, view.size)


@pytest.mark.parametrize("misalign", [1, 2, 4, 8])
def test_move_kernel_takes_narrower_vectors_for_unaligned_memory(kernels, misalign):
    """-fsanitize=undefined aborts on a vector access that its type's alignment forbids, as a GPU would."""
    size, strides, row_bytes = (12, 10), ((2, 5), (3, 1)), 32
    x = np.random.default_rng(0).integers(0, 256, (2, 120, row_bytes), dtype=np.uint8)
    raw, view, start = guarded(x.shape, np.uint8, misalign)
    sizes = ctypes.c_int64(2), ctypes.c_int64(row_bytes)
    assert kernels.move(address(view), address(x), *grid_arguments(size, strides), *sizes, 0) == 0
    np.testing.assert_array_equal(view.reshape(x.shape), unrolled(x, size, strides))
    assert_guards(raw, start, view.size)


def test_move_kernel_with_full_and_partial_blocks(kernels):
    # 7 images of 3136 rows of 192 bytes: 170 rows a block, four vectors in flight, a last block that is not full.
    size, strides, row_bytes = (56, 56), ((2, 2),) * 3, 192
    x = np.random.default_rng(0).integers(0, 256, (2, 3136, row_bytes), dtype=np.uint8)
    for reroll, expected in ((0, unrolled), (1, rerolled)):
        raw, view, start = guarded(x.shape, np.uint8)
        sizes = ctypes.c_int64(2), ctypes.c_int64(row_bytes)
        assert kernels.move(address(view), address(x), *grid_arguments(size, strides), *sizes, reroll) == 0
        np.testing.assert_array_equal(view.reshape(x.shape), expected(x, size, strides).reshape(x.shape))
        assert_guards(raw, start, view.size)


def test_move_kernel_with_rows_longer_than_a_block(kernels):
    size, strides, row_bytes = (4, 3), ((2, 3),), 40_000
    x = np.random.default_rng(0).integers(0, 256, (2, 12, row_bytes), dtype=np.uint8)
    raw, view, start = guarded(x.shape, np.uint8)
    sizes = ctypes.c_int64(2), ctypes.c_int64(row_bytes)
    assert kernels.move(address(view), address(x), *grid_arguments(size, strides), *sizes, 0) == 0
    np.testing.assert_array_equal(view.reshape(x.shape), unrolled(x, size, strides))
    assert_guards(raw, start, view.size)


def test_move_kernel_with_wide_indices(kernels):
    size, strides, row_bytes = (12, 10), ((2, 5), (3, 1)), 20
    x = np.random.default_rng(0).integers(0, 256, (2, 120, row_bytes), dtype=np.uint8)
    raw, view, start = guarded(x.shape, np.uint8)
    sizes = ctypes.c_int64(2), ctypes.c_int64(row_bytes)
    assert kernels.move_wide(address(view), address(x), *grid_arguments(size, strides), *sizes) == 0
    np.testing.assert_array_equal(view.reshape(x.shape), unrolled(x, size, strides))
    assert_guards(raw, start, view.size)


# name of the instance, dtype of the patches, dtype of position and result, and what rounds like the result
TYPES = {
    "f32": (torch.float32, torch.float32),
    "f64": (torch.float64, torch.float64),
    "f16_f32": (torch.float16, torch.float32),
    "bf16_bf16": (torch.bfloat16, torch.bfloat16),
}


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


def choose_units(kind, batch, windows):
    random = np.random.default_rng(3)
    if kind == "all":
        return None
    if kind == "twice":  # units more than once, and more of them than there are
        return random.integers(0, windows, (batch, windows + 2))
    kept = max(1, windows // 2)
    return np.stack([random.permutation(windows)[:kept] for _ in range(batch)])


@pytest.mark.parametrize(
    ("size", "strides"),
    [((7,), ()), ((12, 10), ((2, 5), (3, 1))), ((16, 24), ((2, 2),) * 3), ((2, 4, 6), ((1, 2, 2), (1, 1, 3)))],
    ids=str,
)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", ["all", "some", "twice"])
def test_embed_kernels_against_counting(kernels, size, strides, name, kind):
    patch_type, out_type = TYPES[name]
    batch, n, windows = 3, math.prod(size), windows_of(size, strides)
    place = unrolled_place(size, strides)
    keep = choose_units(kind, batch, windows)
    for channels, channels_last in itertools.product((8, 33), (0, 1)):
        generator = torch.Generator().manual_seed(1)
        patches = torch.randn(batch, channels, n, generator=generator).to(patch_type)
        position = torch.randn(1, n, channels, generator=generator).to(out_type)
        kept = 0 if keep is None else keep.shape[1]
        rows = [
            list(range(n)) if keep is None else kept_rows(size, strides, row) for row in (keep if kept else [0] * batch)
        ]

        # forward: one rounded sum per element, so the bits are known
        order = np.argsort(place)
        tokens = (patches.transpose(1, 2) + position)[:, torch.from_numpy(order)]
        expected = torch.stack([tokens[b][rows[b]] for b in range(batch)])
        memory = (
            patches.transpose(1, 2) if channels_last else patches
        ).contiguous()  # held here: addresses of it go out
        buffer, view, start = guarded(raw(expected).shape, np.uint8)
        sizes = [ctypes.c_int64(value) for value in (batch, channels)]
        code = getattr(kernels, f"embed_{name}")(
            *(address(view), address(raw(memory)), address(raw(position)), address(keep), ctypes.c_int64(kept)),
            *(*grid_arguments(size, strides), *sizes, channels_last),
        )
        assert code == 0
        np.testing.assert_array_equal(view.reshape(raw(expected).shape), raw(expected))
        assert_guards(buffer, start, view.size)

        # backward, exact in float64 and rounded once for the patches; every number of batch chunks
        grad = torch.randn(expected.shape, generator=generator).to(out_type)
        spatial = torch.zeros(batch, n, channels, dtype=torch.float64)
        for b in range(batch):
            for i, row in enumerate(rows[b]):
                spatial[b, order[row]] += grad[b, i].double()
        for multiprocessors in (1, 132):
            patches_raw, patches_view, patches_start = guarded(raw(memory).shape, np.uint8)
            position_raw, position_view, position_start = guarded(raw(position).shape, np.uint8)
            code = getattr(kernels, f"embed_backward_{name}")(
                *(
                    address(patches_view),
                    address(position_view),
                    address(raw(grad)),
                    address(keep),
                    ctypes.c_int64(kept),
                ),
                *(*grid_arguments(size, strides), *sizes, channels_last, ctypes.c_int64(multiprocessors)),
            )
            assert code == 0
            assert_guards(patches_raw, patches_start, patches_view.size)
            assert_guards(position_raw, position_start, position_view.size)
            got = torch.from_numpy(patches_view.copy()).view(patch_type).view(memory.shape).double()
            got = got if channels_last else got.transpose(1, 2)
            tolerance = {"atol": 1e-5, "rtol": torch.finfo(patch_type).eps * 2}
            torch.testing.assert_close(got, spatial, **tolerance)
            got = torch.from_numpy(position_view.copy()).view(out_type).view(1, n, channels).double()
            tolerance = {"atol": 1e-5, "rtol": torch.finfo(out_type).eps * 2}
            torch.testing.assert_close(got, spatial.sum(0, keepdim=True), **tolerance)


def test_a_unit_that_is_not_there_traps(host):
    size, strides, keep = (4, 4), ((2, 2),), np.array([[4]])
    patches, position, out = (np.zeros((1, 16, 8), dtype=np.float32) for _ in range(3))
    for channels_last in (0, 1):
        code = host.embed_f32(
            *(address(out), address(patches), address(position), address(keep), ctypes.c_int64(1)),
            *(*grid_arguments(size, strides), ctypes.c_int64(1), ctypes.c_int64(8), channels_last),
        )
        assert code == 1

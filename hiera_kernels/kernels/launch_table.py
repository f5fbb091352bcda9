"""Which tiles, how many warps, how many units per program: the launch configuration of every attention kernel.

Rules give a configuration to every legal shape; `TUNED` overrules them where a measurement has. Nothing is tuned while a
model runs: a kernel is compiled once for each configuration.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

MAX_KEYS = 256
SMALL_KEYS = 64  # up to here a program holds a whole window in the backward too
MIN_ROWS = 16  # of a tile in tl.dot


class Tiles(NamedTuple):
    """The shape of a program. D0, D1: chunks of columns. For the others see attention.py and attention_backward.py."""

    block_s: int
    block_k: int
    d0: int
    d1: int
    pack: int = 1
    rounds: int = 1
    copies: int = 1
    num_warps: int = 4
    num_stages: int = 1


class Launch(NamedTuple):
    """A kernel with everything that it is launched with."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch it on the current stream of the current device."""
        self.kernel[(self.grid,)](
            **self.arguments, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages
        )


# (direction, S, K, D, bits of the dtype, major compute capability) -> fields of Tiles to replace.
# Written by `python -m benchmarks.ops mask_unit_attention --tune` on a GPU; empty until one has been measured.
TUNED: dict[tuple[str, int, int, int, int, int], dict[str, int]] = {}


def columns(head_dim: int, least: int = 16) -> tuple[int, int]:
    """D as one or two powers of two, each at least 16: 96 = 64 + 32, 72 -> 64 + 16, 56 -> 64 + 0.

    D rounded up to one power of two would cost a third of the registers and of the shared memory of 96 and 72; for 56
    there is nothing to gain, because 32 + 32 is 64 as well. `least`: of the second chunk.
    """
    d0 = max(16, 1 << (head_dim.bit_length() - 1))
    if d0 >= head_dim:
        return d0, 0
    d1 = max(least, next_power_of_2(head_dim - d0))
    return (d0, d1) if d1 < d0 else (2 * d0, 0)


def tiles(direction: str, S: int, P: int, D: int, itemsize: int, capability: tuple[int, int]) -> Tiles:
    """The configuration of one kernel: "forward", "backward" (K <= 64), "backward_q" or "backward_kv" (longer rows)."""
    K = P * S
    if direction == "backward_kv":
        return _blocks_of_keys(S, P, D, itemsize, capability)
    block_k = max(MIN_ROWS, next_power_of_2(K))
    if block_k <= 32:
        found = _packed(direction, S, P, D, block_k)
    else:
        block_s = max(MIN_ROWS, min(64, next_power_of_2(S)))
        # Triton 3.x gives the warps of a chain of products to the rows if the first tile that it meets is square; with
        # 16 rows every warp would then do all the work. A second chunk of 32 columns is not square.
        chunks = columns(D, 32 if block_s == 16 else 16)
        # Neighbouring heads share a sector: one program does both.
        rounds = 1 if D * itemsize % 32 == 0 else 2
        found = Tiles(block_s, block_k, *chunks, rounds=rounds, num_warps=4 if block_k <= 128 else 8)
    return found._replace(**TUNED.get((direction, S, K, D, 8 * itemsize, capability[0]), {}))


def _packed(direction: str, S: int, P: int, D: int, block_k: int) -> Tiles:
    """Windows of up to 32 keys: a unit for each of four warps, heads fastest, hence neighbouring heads together."""
    copies = 1
    block_s = max(MIN_ROWS, next_power_of_2(S))
    if direction == "backward" and P > 1 and S < MIN_ROWS:
        copies, block_s = P, block_k
    return Tiles(block_s, block_k, *columns(D), pack=4, copies=copies)


def _blocks_of_keys(S: int, P: int, D: int, itemsize: int, capability: tuple[int, int]) -> Tiles:
    """Longer rows, gradients of k and v: a block of keys stays, blocks of queries come by."""
    block_s = max(MIN_ROWS, min(64, next_power_of_2(S)))
    found = Tiles(block_s, 64, *columns(D))
    return found._replace(**TUNED.get(("backward_kv", S, P * S, D, 8 * itemsize, capability[0]), {}))


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device; (0, 0) for the CPU of the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the one of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

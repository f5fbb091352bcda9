"""Which tiles, how many warps, how many units per program: the launch configuration of every attention kernel.

Rules give a configuration to every legal shape; `TUNED` overrules them where something was measured. Nothing is tuned
while a model runs: a kernel is compiled once for each configuration.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from hiera_kernels.kernels.limits import MAX_KEYS, MIN_ROWS, SMALL_KEYS, compute_capability  # noqa: F401


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
        """Launch it on the current stream of the current device; inside `noted`, note it instead."""
        notes = _notes.get()
        if notes is not None:
            notes.append(self)
            return
        self.kernel[(self.grid,)](
            **self.arguments, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages
        )


# Where `Launch.run` of this thread writes to instead of launching, inside `noted`.
_notes: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def noted(notes: list[Launch]) -> Iterator[None]:
    """Inside, launches of this thread are appended to `notes` and not made, so that tensors need not have data."""
    token = _notes.set(notes)
    try:
        yield
    finally:
        _notes.reset(token)


# (direction, S, K, D, bits of the dtype, major compute capability) -> fields of Tiles to replace.
# For what is measured on a GPU; until then, only what the compile gate asks for.
TUNED: dict[tuple[str, int, int, int, int, int], dict[str, int]] = {
    ("backward", 16, 64, 72, 16, 10): {"rounds": 6},  # with 2, ptxas spills one; more where bias has a gradient
    ("backward", 64, 64, 72, 16, 8): {"rounds": 4},  # with 2, ptxas spills where bias has a gradient
}


def chunks(head_dim: int, least: int = 16) -> tuple[int, int]:
    """D as one or two powers of two, each at least 16: 96 = 64 + 32, 72 -> 64 + 16, 56 -> 64 + 0.

    D rounded up to one power of two would cost a third of the registers and of the shared memory of 96 and 72; for 56
    there is nothing to gain, because 32 + 32 is 64 as well. `least`: of the second chunk.
    """
    d0 = max(16, 1 << (head_dim.bit_length() - 1))
    if d0 >= head_dim:
        return d0, 0
    d1 = max(least, next_power_of_2(head_dim - d0))
    return (d0, d1) if d1 < d0 else (2 * d0, 0)


def one_chunk(head_dim: int) -> tuple[int, int]:
    """D as one power of two of at least 64, more columns than the rows of a tile have."""
    return max(64, next_power_of_2(head_dim)), 0


def tiles(direction: str, S: int, P: int, D: int, itemsize: int, capability: tuple[int, int]) -> Tiles:
    """The configuration of one kernel: "forward", "backward" (K <= 64), "backward_q" or "backward_kv" (longer rows)."""
    found = _by_rule(direction, S, P, D, itemsize, capability)
    tuned = TUNED.get((direction, S, P * S, D, 8 * itemsize, capability[0]))
    return found._replace(**tuned) if tuned else found


@functools.cache
def _by_rule(direction, S, P, D, itemsize, capability):
    if P * S <= 32:
        return _packed(direction, S, P, D)
    if P * S <= SMALL_KEYS:
        return _window(S, P, D, itemsize)
    return _long(direction, S, P, D, capability)


def _packed(direction: str, S: int, P: int, D: int) -> Tiles:
    """Up to 32 keys: a unit for each of four warps. Heads are counted first, so neighbouring heads are together."""
    block_s, block_k = (max(MIN_ROWS, next_power_of_2(rows)) for rows in (S, P * S))
    if direction == "backward" and P > 1 and S < MIN_ROWS:
        return Tiles(block_k, block_k, *chunks(D), pack=4, copies=P)
    return Tiles(block_s, block_k, *chunks(D), pack=4)


def _window(S: int, P: int, D: int, itemsize: int) -> Tiles:
    """33 to 64 keys: a unit for four warps, two units in turn where neighbouring heads share a 32-byte sector."""
    block_s = max(MIN_ROWS, next_power_of_2(S))
    # Triton gives all warps of a chain of products to the rows if the first tile that it meets has no more columns than
    # rows; with 16 rows every warp would then do all the work. A second chunk of 32 columns prevents it.
    d0, d1 = chunks(D, least=32 if block_s == 16 else 16)
    rounds = 1 if D * itemsize % 32 == 0 else 2
    # 16 rows of 32 columns are 16 bytes for each of 64 threads.
    return Tiles(block_s, 64, d0, d1, rounds=rounds, num_warps=2 if block_s * (d0 + d1) <= 512 else 4)


def _long(direction: str, S: int, P: int, D: int, capability: tuple[int, int]) -> Tiles:
    """65 to 256 keys: what compiles without spills (tests/gates).

    wgmma (sm_90) and tcgen05 (sm_100) take 64 rows. With fewer, on sm_80, and where their registers do not suffice,
    products are mma.sync, whose warps must be given to the columns (see _window): one chunk of columns.
    """
    block_s, block_k = max(MIN_ROWS, min(64, next_power_of_2(S))), next_power_of_2(P * S)
    old = capability[0] < 9
    if direction == "backward_kv":
        if D > 112 or (old and P > 1):
            block_s = min(32, block_s)
        if D <= 64:
            return Tiles(block_s, 64, *chunks(D))
        if old:
            return Tiles(block_s, 32, *one_chunk(D))
        return Tiles(block_s, 64, *chunks(D), num_warps=8 if block_s == 64 or D > 112 else 4)
    tight = direction == "backward_q" and (
        (capability[0] == 9 and (block_k == 256 or P > 1)) or (D > 112 and (capability[0] == 9 or P > 1))
    )
    if old or block_s < 64 or tight:
        if direction == "backward_q" or D <= 64:
            block_s = min(32, block_s)
        return Tiles(block_s, block_k, *one_chunk(D), num_warps=4 if D <= 64 else 8)
    return Tiles(block_s, block_k, *chunks(D), num_warps=4 if block_k <= 128 else 8)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the one of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda and _notes.get() is None else contextlib.nullcontext()

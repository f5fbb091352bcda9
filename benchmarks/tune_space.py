"""Which launch configurations of the attention kernels are worth a try: every legal one near the rules' own.

A kernel is named by its key in the launch table: (direction, S, K, D, bits of the dtype, major compute capability).
"""

import itertools
from collections.abc import Iterator

from triton import next_power_of_2

from hiera_kernels.kernels import launch_table
from hiera_kernels.kernels.launch_table import MIN_ROWS, SMALL_KEYS, Tiles, chunks, one_chunk

Key = tuple[str, int, int, int, int, int]
PACKED_KEYS = 32  # up to here several windows may share a program
WARPS = (1, 2, 4, 8)
MAX_TILE = 128 * 256  # numbers in the largest tile of a program: beyond it nothing fits in registers


def rule(key: Key) -> Tiles:
    """What the rules of the launch table give, without its measured rows."""
    direction, S, K, D, bits, major = key
    measured = launch_table.TUNED.pop(key, None)
    try:
        return launch_table.tiles(direction, S, K // S, D, bits // 8, (major, 0))
    finally:
        if measured is not None:
            launch_table.TUNED[key] = measured


def illegal(key: Key, tile: Tiles) -> str | None:
    """Why the kernel cannot be launched so, or None. What registers and shared memory hold, only a compiler says."""
    direction, S, K, D, _, _ = key
    P = K // S
    for name in ("block_s", "block_k", "d0", "pack", "num_warps"):
        value = getattr(tile, name)
        if value < 1 or value & (value - 1):
            return f"{name} must be a power of two, is {value}"
    if min(tile.block_s, tile.block_k, tile.d0) < MIN_ROWS or 0 < tile.d1 < MIN_ROWS:
        return f"a product takes {MIN_ROWS} rows and columns at least"
    if tile.d1 & (tile.d1 - 1) or tile.d1 >= tile.d0 or tile.d0 + tile.d1 < D:
        return f"chunks of {tile.d0} and {tile.d1} columns do not make {D}"
    if tile.block_k < K and direction != "backward_kv":
        return f"rows of {K} keys must be whole, block_k is {tile.block_k}"
    if direction == "backward" and tile.block_s < tile.copies * S:
        return f"{tile.copies} * {S} queries must fit, block_s is {tile.block_s}"
    if tile.copies not in (1, P) or (tile.copies > 1 and direction != "backward"):
        return f"copies must be 1, or in the backward of short rows {P}; is {tile.copies}"
    if K > SMALL_KEYS and (tile.pack, tile.rounds) != (1, 1):
        return "long rows have a program to themselves"
    if tile.pack * max(tile.block_s, tile.d0 + tile.d1) * tile.block_k > MAX_TILE:
        return "the tiles do not fit in registers"
    return None


def directions(K: int) -> tuple[str, ...]:
    """The kernels that serve windows of K keys."""
    return ("forward", "backward") if K <= SMALL_KEYS else ("forward", "backward_q", "backward_kv")


def candidates(key: Key) -> list[Tiles]:
    """Legal configurations, the table's own first, then by the number of fields in which they differ from it."""
    direction, S, K, D, bits, major = key
    own = launch_table.tiles(direction, S, K // S, D, bits // 8, (major, 0))
    found = {rule(key), *(tile for tile in _all(key, own) if illegal(key, tile) is None)} - {own}

    def distance(tile: Tiles) -> tuple:
        return sum(a != b for a, b in zip(tile, own, strict=True)), tile

    return [own, *sorted(found, key=distance)]


def _all(key: Key, own: Tiles) -> Iterator[Tiles]:
    direction, S, K, D, _, _ = key
    widths = dict.fromkeys([(own.d0, own.d1), chunks(D), chunks(D, least=32), one_chunk(D)])
    packs = (1, 2, 4, 8) if K <= PACKED_KEYS else (1,)
    rounds = (1, 2, 4) if K <= SMALL_KEYS else (1,)
    stages = (1, 2, 3) if direction == "backward_kv" else (1,)
    for block_s, block_k, copies in _blocks(direction, S, K):
        for (d0, d1), pack, turns, warps, depth in itertools.product(widths, packs, rounds, WARPS, stages):
            if warps * 32 * 512 >= pack * block_s * block_k and (warps > 1 or pack * block_s <= 32):
                yield Tiles(block_s, block_k, d0, d1, pack, turns, copies, warps, depth)


def _blocks(direction: str, S: int, K: int) -> Iterator[tuple[int, int, int]]:
    """(block_s, block_k, copies)."""
    least, whole = max(MIN_ROWS, next_power_of_2(S)), max(MIN_ROWS, next_power_of_2(K))
    if direction == "backward":
        yield least, whole, 1
        if S < MIN_ROWS and K > S:
            yield max(MIN_ROWS, whole), whole, K // S
        return
    smaller = [rows for rows in (16, 32, 64, 128) if rows <= least]
    for block_s in smaller if K > PACKED_KEYS else [least]:
        for block_k in (32, 64, 128) if direction == "backward_kv" else (whole,):
            yield block_s, block_k, 1

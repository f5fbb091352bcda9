"""Count the 32-byte sectors of global memory that a Triton kernel touches, in the interpreter, on CPU.

DRAM and L2 move sectors of 32 bytes, so a kernel that asks for no byte too many may still move too much: one head of
D = 56 in 16 bits is 112 bytes, three and a half sectors, and touches four. Counted are the distinct sectors of each
program, summed over programs: what has to move if L2 saves nothing. Addresses count from the start of a tensor's
storage, which CUDA's allocator aligns to 512 bytes.

    with traffic.record() as launches:
        op(tensors)
    print(traffic.table(launches))

Needs `TRITON_INTERPRET=1`, set before Triton is imported. Kernels are launched in the usual way, `kernel[grid](...)`.
"""

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np
import triton
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

SECTOR = 32  # bytes
READ, WRITE = "read", "write"


@dataclass
class Count:
    """Sectors of one argument, read or written."""

    sectors: int = 0  # distinct in a program, summed over programs (or over groups of programs)
    requested: int = 0  # distinct in one load or store, summed: > `sectors` if a program comes back to its bytes
    distinct: int = 0  # distinct in the whole launch


@dataclass
class Launch:
    """One launch: `counts` by (name of the kernel's argument, "read" or "write")."""

    kernel: str
    programs: int = 0
    counts: dict[tuple[str, str], Count] = field(default_factory=lambda: defaultdict(Count))

    def bytes(self, argument: str | None = None, mode: str | None = None, of: str = "sectors") -> int:
        """Bytes of the sectors of one argument (default: all), read, written, or both. `of`: a field of `Count`."""
        chosen = [
            count for (name, how), count in self.counts.items() if argument in (None, name) and mode in (None, how)
        ]
        if not chosen and argument is not None and argument not in {name for name, _ in self.counts}:
            raise ValueError(f"{self.kernel} touched no argument {argument!r}, only {sorted(self.counts)}")
        return SECTOR * sum(getattr(count, of) for count in chosen)


def moved(launches: list[Launch]) -> int:
    """Bytes of all sectors that the launches touched."""
    return sum(launch.bytes() for launch in launches)


def table(launches: list[Launch]) -> str:
    """A line for each argument of each launch."""
    lines = [f"{'kernel':32}{'argument':16}{'':6}{'programs':>9}{'sectors':>10}{'distinct':>10}{'requested':>10}"]
    for launch in launches:
        for (name, mode), count in launch.counts.items():
            lines.append(
                f"{launch.kernel:32}{name:16}{mode:6}{launch.programs:9}{count.sectors:10}{count.distinct:10}"
                f"{count.requested:10}"
            )
    return "\n".join(lines)


class _Recorder:
    """What happens in one launch."""

    def __init__(self, kernel: str, arguments: dict, group: Callable | None):
        self.launch = Launch(kernel)
        self.group = group
        names = defaultdict(list)
        extents = {}
        for name, value in arguments.items():
            base = getattr(value, "base", value)  # of a tensor descriptor
            if not hasattr(base, "untyped_storage"):
                continue
            storage = base.untyped_storage()
            if base.device.type != "cpu":
                raise RuntimeError(f"traffic is counted of tensors on CPU, {name} is on {base.device}")
            if storage.nbytes() == 0:
                continue
            if storage.data_ptr() % SECTOR:
                raise RuntimeError(f"the storage of {name} does not start at a multiple of {SECTOR} bytes")
            names[storage.data_ptr()].append(name)
            extents[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
        self.starts = np.array(sorted(names), dtype=np.uint64)
        self.ends = np.array([extents[int(start)] for start in self.starts], dtype=np.uint64)
        self.names = ["|".join(names[int(start)]) for start in self.starts]  # arguments that share memory share a line
        self.program: dict[str, list[np.ndarray]] = {READ: [], WRITE: []}
        self.seen: dict[str, list[np.ndarray]] = {READ: [], WRITE: []}
        self.groups: dict[Hashable, dict[str, list[np.ndarray]]] = {}
        self.index = None

    def access(self, mode: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask.astype(bool)].astype(np.uint64)  # a scalar condition arrives as an int mask
        if not addresses.size:
            return
        which = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = (which >= 0) & (addresses + np.uint64(size) <= self.ends[which])
        if not inside.all():
            raise IndexError(f"{self.launch.kernel}, program {self.index}: {mode} outside the memory of all arguments")
        sectors = np.unique(addresses // np.uint64(SECTOR))
        self.program[mode].append(sectors)
        for name, n in self._by_argument(sectors):
            self.launch.counts[name, mode].requested += n

    def begin(self, index: tuple[int, ...] | None) -> None:
        """A program begins (or the launch ends): the one before it is done."""
        if self.index is not None:
            self.launch.programs += 1
            for mode, touched in self.program.items():
                if touched:
                    self._program_done(mode, np.unique(np.concatenate(touched)))
        self.program = {READ: [], WRITE: []}
        self.index = index

    def _program_done(self, mode: str, sectors: np.ndarray) -> None:
        self.seen[mode].append(sectors)
        if self.group is not None:
            group = self.groups.setdefault(self.group(self.index), {READ: [], WRITE: []})
            group[mode].append(sectors)
            return
        for name, n in self._by_argument(sectors):
            self.launch.counts[name, mode].sectors += n

    def end(self) -> Launch:
        self.begin(None)
        for group in self.groups.values():
            for mode, touched in group.items():
                if touched:
                    for name, n in self._by_argument(np.unique(np.concatenate(touched))):
                        self.launch.counts[name, mode].sectors += n
        for mode, touched in self.seen.items():
            if touched:
                for name, n in self._by_argument(np.unique(np.concatenate(touched))):
                    self.launch.counts[name, mode].distinct = n
        return self.launch

    def _by_argument(self, sectors: np.ndarray) -> Iterator[tuple[str, int]]:
        which = np.searchsorted(self.starts, sectors * np.uint64(SECTOR), side="right") - 1
        for i, n in zip(*np.unique(which, return_counts=True), strict=True):
            yield self.names[i], int(n)


@contextlib.contextmanager
def record(group: Callable[[tuple[int, int, int]], Hashable] | None = None) -> Iterator[list[Launch]]:
    """Within the context, every launch of a Triton kernel appends a `Launch` to the list.

    Args:
        group: Maps the index of a program, (x, y, z), to a key. Then `sectors` counts what is distinct among all
            programs of a key, as for programs that share their rows through L2. Default: every program by itself.

    Raises, from the launch: InterpreterError for an address outside the memory of every argument, and for an atomic.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: TRITON_INTERPRET=1 before triton is imported")
    launches: list[Launch] = []
    current: list[_Recorder] = []
    patched = {
        (GridExecutor, "__call__"): GridExecutor.__call__,
        (InterpreterBuilder, "set_grid_idx"): InterpreterBuilder.set_grid_idx,
        (InterpreterBuilder, "create_masked_load"): InterpreterBuilder.create_masked_load,
        (InterpreterBuilder, "create_masked_store"): InterpreterBuilder.create_masked_store,
        (InterpreterBuilder, "create_atomic_rmw"): InterpreterBuilder.create_atomic_rmw,
        (InterpreterBuilder, "create_atomic_cas"): InterpreterBuilder.create_atomic_cas,
    }
    call, set_grid_idx, load, store, _, _ = patched.values()

    def recorded_call(self, *args, **kwargs):
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}
        current.append(_Recorder(self.fn.__name__, inspect.getcallargs(self.fn, *args, **known), group))
        try:
            call(self, *args, **kwargs)
            launches.append(current[-1].end())
        finally:
            current.pop()

    def recorded_index(self, *index):
        current[-1].begin(index)
        return set_grid_idx(self, *index)

    def recorded_load(self, ptrs, mask, *rest, **options):
        current[-1].access(READ, ptrs.data, mask.data, _bytes(ptrs))
        return load(self, ptrs, mask, *rest, **options)

    def recorded_store(self, ptrs, value, mask, *rest, **options):
        current[-1].access(WRITE, ptrs.data, mask.data, _bytes(ptrs))
        return store(self, ptrs, value, mask, *rest, **options)

    def refused(self, *args, **options):
        raise RuntimeError("an atomic: its order, and so its sum, is not the same in every run")

    replacements = (recorded_call, recorded_index, recorded_load, recorded_store, refused, refused)
    for (owner, name), function in zip(patched, replacements, strict=True):
        setattr(owner, name, function)
    try:
        yield launches
    finally:
        for (owner, name), function in patched.items():
            setattr(owner, name, function)


def _bytes(pointers) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

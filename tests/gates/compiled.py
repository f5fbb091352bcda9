"""Compile a Triton kernel for a GPU that this machine does not have, read the machine code, and judge it.

Triton needs a GPU to launch, not to compile: it carries its own ptxas, cuobjdump and nvdisasm. A launch is bound to its
arguments by Triton's own binder, so that the variant compiled here (what is constant, what is known to be divisible by
16) is the one that the launch would ask for, and the cubin is disassembled. ptxas's own summary does not suffice: it
reports LOCAL:0 for kernels with thousands of spill instructions, and where a kernel asks for more tensor memory than an
sm_100 has, Triton ends without an error in a kernel that does nothing.

`TRITON_INTERPRET` must not be set in this process.
"""

import io
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one program may have, by architecture (CUDA programming guide, "Compute capabilities").
SHARED_LIMIT = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
CAPABILITIES = tuple(SHARED_LIMIT)
SECONDS_LIMIT = 20.0

SPILLS = re.compile(r"(LDL|STL)\b")
GLOBAL_LOADS = re.compile(r"(LDG|LDGSTS|UTMALDG|UBLKCP)\b")
WIDE = re.compile(r"\.(128|256)\b|^(UTMALDG|UBLKCP)\b")
GLOBAL_STORES = re.compile(r"(STG|UTMASTG|UTMAREDG|RED|REDG|ATOMG)\b")
TENSOR_CORES = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")
# "        /*0a10*/  @!P0 LDG.E.128 R4, ..." The brace opens a pair of instructions in old formats.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """One launch to be compiled. `launch` has kernel, arguments, constexprs, num_warps and num_stages.

    strict: a 16-bit kernel: no spills, no stack. Otherwise both are reported and not refused.
    tensor_cores: the kernel multiplies matrices in 16 bits.
    least_wide: how many loads of 16 bytes there are at least, in place of half of all loads; for kernels that read
        single numbers of a row (mean, rstd) beside few tiles.
    labels: what the table says of it: shape, dtype, ...
    """

    launch: object
    capability: tuple[int, int]
    strict: bool = True
    tensor_cores: bool = True
    least_wide: int | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What the compiler made of a launch; `error` in place of it where it made nothing."""

    error: str | None = None
    seconds: float = 0.0  # of processor time, ptxas included: what an idle core needs, whatever else this machine does
    registers: int = 0
    stack: int = 0  # bytes per thread
    shared: int = 0  # bytes per program
    hash: str = ""  # under which Triton would cache it
    opcodes: Counter = field(default_factory=Counter)

    def count(self, pattern: re.Pattern) -> int:
        """Instructions whose opcode matches."""
        return sum(n for opcode, n in self.opcodes.items() if pattern.match(opcode))

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return self.count(SPILLS)

    @property
    def loads(self) -> int:
        """Loads from global memory, of any width."""
        return self.count(GLOBAL_LOADS)

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 16 bytes or more per thread, asynchronous copies and TMA included."""
        return sum(n for opcode, n in self.opcodes.items() if GLOBAL_LOADS.match(opcode) and WIDE.search(opcode))

    @property
    def tensor_core(self) -> int:
        """Matrix instructions: HMMA, HGMMA (sm_90), UTCHMMA (sm_100)."""
        return self.count(TENSOR_CORES)


def verdict(job: Job, made: Measured) -> list[str]:
    """Why the gate refuses, in words; empty where it does not."""
    if made.error:
        return [made.error]
    if not made.count(GLOBAL_STORES):
        return ["empty body: it writes nothing to global memory"]
    reasons = []
    limit = SHARED_LIMIT[job.capability]
    if made.shared > limit:
        reasons.append(f"{made.shared} bytes of shared memory, {limit} can be had")
    if made.seconds > SECONDS_LIMIT:
        reasons.append(f"{made.seconds:.0f} s to compile, {SECONDS_LIMIT:.0f} allowed")
    if not made.wide_loads:
        reasons.append("no 16-byte load from global memory")
    elif job.least_wide is not None:
        if made.wide_loads < job.least_wide:
            reasons.append(f"{made.wide_loads} loads of 16 bytes, one for each of {job.least_wide} tensors is expected")
    elif made.loads > 2 * made.wide_loads:
        reasons.append(f"{made.loads - made.wide_loads} narrow global loads beside {made.wide_loads} of 16 bytes")
    if job.strict:
        if made.stack:
            reasons.append(f"{made.stack} bytes of stack")
        if made.spills:
            reasons.append(f"{made.spills} spill instructions")
        if job.tensor_cores and not made.tensor_core:
            reasons.append("no tensor-core instruction")
    return reasons


def compile_all(jobs: Sequence[Job], processes: int = 1, limit_s: float = 90.0) -> Iterator[tuple[Job, Measured]]:
    """Compile every job cold, each in a process of its own, `processes` at a time; in the order in which they end.

    A process of its own, because the compiler may abort, or take minutes (512 x 512 x 512 on sm_80: 210 s), and because
    C++ cannot be interrupted otherwise. After `limit_s` seconds the job is given up and says so.
    """
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("the compile gate needs a process without TRITON_INTERPRET: it turns kernels into Python")
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(jobs)), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop()
                receive, send = fork.Pipe(duplex=False)
                child = fork.Process(target=_child, args=(job, send))
                child.start()
                send.close()
                running[receive] = (job, child, time.monotonic() + limit_s)
            nearest = min(deadline for _, _, deadline in running.values())
            ready = connection.wait(list(running), timeout=max(0.0, nearest - time.monotonic()))
            late = [
                end for end, (_, _, deadline) in running.items() if deadline <= time.monotonic() and end not in ready
            ]
            for end in [*ready, *late]:
                job, child, _ = running.pop(end)
                made = Measured(error=f"not compiled after {limit_s:.0f} s")
                if end in ready:
                    try:
                        made = end.recv()
                    except EOFError:
                        child.join()
                        made = Measured(error=f"the compiler died with exit code {child.exitcode}")
                _end(child)
                end.close()
                yield job, made
    finally:
        for _, child, _ in running.values():
            _end(child)


def compile_one(job: Job, limit_s: float = 90.0) -> Measured:
    """`compile_all` for a single job."""
    return next(iter(compile_all([job], limit_s=limit_s)))[1]


def _end(child) -> None:
    """End a child and the ptxas it may have started: it leads a process group of its own."""
    if child.is_alive():
        child.join(timeout=0.5)
    if child.is_alive():
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            child.kill()
    child.join()


def _child(job: Job, send) -> None:
    os.setpgid(0, 0)
    sys.stdout = io.StringIO()  # Triton prints the whole PTX when ptxas fails
    try:
        made = _compile(job)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"ptxas (fatal|error)", line)] or lines[-1:]
        made = Measured(error=f"{type(error).__name__}: {telling[0] if telling else ''}"[:300])
    send.send(made)
    send.close()


def _compile(job: Job) -> Measured:
    major, minor = job.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # cold
        started = _processor_seconds()
        source, options = _bind(job.launch, target)
        made = triton.compile(source, target=target, options=options)
        seconds = _processor_seconds() - started
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    opcodes = Counter(INSTRUCTION.findall(code))
    if not opcodes:
        raise RuntimeError("nvdisasm printed no instruction")
    return Measured(
        seconds=seconds,
        registers=max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        stack=max(int(n) for n in re.findall(r"STACK:(\d+)", usage)),
        shared=made.metadata.shared,
        hash=made.metadata.hash,
        opcodes=opcodes,
    )


def _bind(launch, target: GPUTarget) -> tuple[ASTSource, dict]:
    """What `JITFunction.run` would hand to the compiler for these arguments, on that target."""
    kernel, backend = launch.kernel, make_backend(target)
    given = {**launch.arguments, **launch.constexprs}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binder: Callable = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(**given, **options, debug=False)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, extra, bound, specialization, extra)
    return ASTSource(kernel, signature, constexprs, attributes), parsed.__dict__


def _processor_seconds() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _tool(name: str, *arguments) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout

"""Compile, judge and time launch configurations of the attention kernels on the GPU at hand."""

import contextlib
import multiprocessing
from collections.abc import Iterator

import torch

from benchmarks import attention, parity, timing
from benchmarks.attention_shapes import AttentionShape
from benchmarks.trial import first_line
from benchmarks.tune_space import Key, Tiles
from hiera_kernels.kernels import attention as kernel
from hiera_kernels.kernels import attention_backward, launch_table

COMPILE_LIMIT_S = 60


@contextlib.contextmanager
def configured(key: Key, tile: Tiles) -> Iterator[None]:
    """The launch table with this configuration for this key."""
    before = launch_table.TUNED.get(key)
    launch_table.TUNED[key] = tile._asdict()
    try:
        yield
    finally:
        del launch_table.TUNED[key]
        if before is not None:
            launch_table.TUNED[key] = before


def plan(key: Key, shape: AttentionShape, qkv, grad_out, capability) -> tuple[list, int, tuple]:
    """The launches of a call, which of them has the key, and what they write."""
    call = (shape.H, shape.W, shape.P, None)
    if key[0] == "forward":
        out = qkv.new_empty(qkv.shape[0], shape.N // shape.P, shape.C)
        empty = qkv.new_empty(0, dtype=torch.float32)
        return kernel.plan_forward(qkv, out, empty, *call, capability), 0, (out,)
    grad_qkv, partial = torch.empty_like(qkv), qkv.new_empty(0, dtype=torch.float32)
    launches = attention_backward.plan_backward(grad_out, qkv, grad_qkv, partial, *call, "first", capability)
    return launches, int(key[0] == "backward_kv"), (grad_qkv,)


def ahead(
    key: Key, shape: AttentionShape, tiles: list[Tiles], capability, dtype, processes: int
) -> dict[Tiles, str | None]:
    """Compile all configurations into Triton's cache, many at a time, on no device: for each, why it fails, or None."""
    jobs = [(key, shape, tile, capability, dtype) for tile in tiles]
    answers: dict[Tiles, str | None] = {}
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=20) as pool:
        waiting = [pool.apply_async(_compile, job) for job in jobs]
        for tile, answer in zip(tiles, waiting, strict=True):
            try:
                answers[tile] = answer.get(COMPILE_LIMIT_S)
            except multiprocessing.TimeoutError:
                answers[tile] = f"not compiled after {COMPILE_LIMIT_S} s"
        pool.terminate()
    return answers


def _compile(key, shape, tile, capability, dtype) -> str | None:
    import triton
    from triton.backends.compiler import GPUTarget

    from tests.gates.compiled import SHARED_LIMIT, _bind

    try:
        qkv = torch.empty(2, shape.N, 3 * shape.C, dtype=dtype, device="meta")
        grad = torch.empty(2, shape.N // shape.P, shape.C, dtype=dtype, device="meta")
        with configured(key, tile):
            launches, which, _ = plan(key, shape, qkv, grad, capability)
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        source, options = _bind(launches[which], target)
        made = triton.compile(source, target=target, options=options)
        limit = SHARED_LIMIT.get(capability, 99 << 10)
        return f"{made.metadata.shared} bytes of shared memory" if made.metadata.shared > limit else None
    except Exception as error:
        return first_line(error)


class Bench:
    """Judges and times configurations of one key at one shape, on random inputs that take turns.

    Raises:
        RuntimeError: the configuration of the table is itself not right.
    """

    def __init__(
        self,
        key: Key,
        shape: AttentionShape,
        batch: int,
        dtype: torch.dtype,
        own: Tiles,
        capability: tuple[int, int],
        device: torch.device,
        seconds: float = 0.15,
        cold_bytes: int = timing.COLD_BYTES,
    ):
        self.key, self.shape, self.seconds = key, shape, seconds
        self.capability, self.device = capability, device

        def make():
            qkv = torch.randn(batch, shape.N, 3 * shape.C, device=device).to(dtype)
            return qkv, torch.randn(batch, shape.N // shape.P, shape.C, device=device).to(dtype)

        self.sets = timing.rotate(make, cold_bytes)
        few = [x[[0, -1]].double() for x in self.sets[0]]
        qkv = few[0].requires_grad_()
        out = attention.oracle(qkv, shape)
        self.truth = [out.detach()] if key[0] == "forward" else list(torch.autograd.grad(out, qkv, few[1]))
        if problem := self.wrong(own)[0]:
            raise RuntimeError(f"{key} as the table has it: {problem}")

    def wrong(self, tile: Tiles) -> tuple[str | None, int]:
        """Why the configuration is refused, or None; and its registers spilled."""
        with configured(self.key, tile):
            launches, which, outputs = plan(self.key, self.shape, *self.sets[0], self.capability)
            spilled = 0
            for x in outputs:
                x.fill_(float("nan"))  # what nobody writes is not right
            for i, launch in enumerate(launches):
                made = launch.kernel[(launch.grid,)](
                    **launch.arguments, **launch.constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages
                )
                if i == which:
                    spilled = getattr(made, "n_spills", None) or 0
        timing.synchronize(self.device)
        verdict = parity.judge([x[[0, -1]] for x in outputs], self.truth, outputs[0].dtype)
        return (None if verdict == parity.GREEN else verdict), spilled

    def __call__(self, tile: Tiles) -> tuple[float | None, str | None]:
        """(seconds of one launch with cold caches, None), or (None, why it is refused)."""
        try:
            problem, spilled = self.wrong(tile)
            if problem or (spilled and self.sets[0][0].dtype.itemsize == 2):
                return None, problem or f"{spilled} spilled registers"
            with configured(self.key, tile):
                plans = [plan(self.key, self.shape, *each, self.capability)[:2] for each in self.sets]
            for launches, which in plans:
                for launch in launches[: which + 1]:  # a second kernel reads what the first one left
                    launch.run()
            graph = timing.Captured(lambda i: plans[i][0][plans[i][1]].run(), len(plans))
            taken = timing.paired({"launch": graph}, [()], self.device, self.seconds, (5, 200))["launch"]
            return timing.per_call(taken, len(plans)).quantile(0.5), None
        except Exception as error:  # out of resources, a launch that is not legal after all
            return None, first_line(error)

"""`warmup`: compile, before the first step, every Triton kernel that a training step of a model launches.

The step is walked on tensors without data, forward and backward, through a copy of the model whose hooks do nothing.
Where an op of this package would reach its kernel, the very function that is registered for it plans its launches, and
`Launch.run` notes them. Each is then handed to Triton's own `warmup`, with stand-ins for the tensors, so that the entry
in Triton's cache is the one that the launch will look up: same constants, same dtypes, same divisibility.
"""

import concurrent.futures
import contextlib
import copy
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hiera_kernels import kernels
from hiera_kernels.lookalike import tensors_in
from hiera_kernels.measure import random_numbers_kept
from hiera_kernels.ops.calling import NAMESPACE
from hiera_kernels.ops.switch import is_disabled

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Triton's passes and ptxas leave Python alone; more would only wait for the few large kernels.
THREADS = 8


@dataclass(frozen=True)
class CompiledKernel:
    """One variant of a kernel. `constants`: what it was compiled for; `seconds`: 0.0 or so if it was cached."""

    name: str
    constants: dict[str, object]
    seconds: float


@dataclass(frozen=True)
class Warmup:
    """What :func:`warmup` did; `print` it for a table.

    Attributes:
        kernels: One entry for each variant of a kernel that a step launches.
        seconds: Wall time of everything, the walk through the model included.
        note: Why there was nothing to compile; None where there was something.
    """

    kernels: list[CompiledKernel] = field(default_factory=list)
    seconds: float = 0.0
    note: str | None = None

    def __str__(self) -> str:
        if self.note is not None:
            return f"nothing to compile: {self.note}"
        lines = [f"{len(self.kernels)} kernels in {self.seconds:.1f} s"]
        for kernel in self.kernels:
            constants = ", ".join(f"{name}={value}" for name, value in kernel.constants.items())
            lines.append(f"{kernel.seconds:6.1f} s  {kernel.name}({constants})")
        return "\n".join(lines)


def warmup(model: nn.Module, batch: object) -> Warmup:
    """Compile every Triton kernel that a training step of this model on such a batch launches.

    Call it once, after `accelerate` and `.to(device)`, under the autocast and in the mode (`train` or `eval`) of the
    training, before DDP or `torch.compile` (either is looked through). Kernels are compiled in threads, and land in
    Triton's cache in memory and on disk; a progress bar shows if tqdm is installed and stderr is a terminal.

    Nothing of the model changes: parameters, gradients, buffers, hooks and the random state of PyTorch and of `random`
    stay as they are. A deep copy without data is walked forward and backward, from the sum of all floating-point
    outputs; on it, the user's hooks are replaced by ones that do nothing, so that a hook which changes shapes or dtypes
    goes unseen. The model's `forward` itself runs, once, on tensors without data. Where it needs data (a boolean index)
    a real copy is run instead, once: that takes memory for the weights again, and for the activations of a step.

    The batch matters for its shapes and dtypes: for another resolution, call it again. Another batch size needs no new
    kernels, but for the smallest tensors, whose sizes are no multiple of 16.

    Args:
        model: A model on a CUDA device, accelerated or using the ops itself.
        batch: Its input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Returns:
        A :class:`Warmup`: the kernels and the seconds. On a CPU, without Triton, inside `disabled()`, and for a model
        that launches none of our kernels it is empty, and its `note` says why.

    Raises:
        TypeError: if `model` is no module or `batch` is none of the three.
        ValueError: if the model is sharded: its layers cannot be copied; warm up before `fully_shard`.
        RuntimeError: if a kernel cannot be compiled; the message names it.
    """
    if not isinstance(batch, (torch.Tensor, tuple, list, Mapping)):
        raise TypeError(f"batch must be a tensor, a tuple of arguments or a dict of them, got {type(batch).__name__}")
    model = _unwrapped(model)
    start = time.perf_counter()
    if (reason := _nothing_to_compile(model, batch)) is not None:
        return Warmup(note=reason)
    launches = launches_of_a_step(model, batch)
    if not launches:
        return Warmup(seconds=time.perf_counter() - start, note="no module of the model launches one of these kernels")
    compiled = compile_ahead(launches)
    return Warmup(compiled, time.perf_counter() - start)


def _nothing_to_compile(model, batch) -> str | None:
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers(), *tensors_in(batch))}
    if "cuda" not in devices:
        return f"the model is on {', '.join(sorted(devices)) or 'no device'}, and the kernels are for CUDA devices"
    if is_disabled():
        return "the ops are disabled() here"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install raises more than ImportError
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


# ---- which launches a step makes ----


class _Noting(TorchDispatchMode):
    """Ops with a Triton kernel plan their launches and note them; none is made. All other operations pass."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0].removeprefix(f"{NAMESPACE}::")
        launch = kernels.IMPLEMENTATIONS.get(name) if func.namespace == NAMESPACE else None
        if launch is None:
            return func(*args, **(kwargs or {}))
        from hiera_kernels.kernels.launch_table import noted

        with noted(self.notes):
            return launch(*args, **(kwargs or {}))


def launches_of_a_step(model: nn.Module, batch: object) -> list:
    """The launches of one forward and backward, in order; the model stays as it is."""
    state = random.getstate()
    try:
        return _walk(model, batch, FakeTensorMode(allow_non_fake_inputs=True))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _walk(model, batch, None)
    finally:
        random.setstate(state)


def _walk(model, batch, fake_mode) -> list:
    notes = []
    with contextlib.ExitStack() as stack:
        if fake_mode is None:
            # What the noted ops return is uninitialised memory; only shapes and masks drawn at random depend on data.
            stack.enter_context(random_numbers_kept(model))
            model = copy.deepcopy(model)
            batch = tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), batch)
        else:
            with FakeCopyMode(fake_mode):
                model = copy.deepcopy(model)
            batch = tree_map_only(torch.Tensor, lambda x: fake_mode.from_tensor(x, static_shapes=True), batch)
            stack.enter_context(fake_mode)
        _silence(model)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_Noting(notes))
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(batch) if isinstance(batch, torch.Tensor) else model(*batch)
        loss = sum(x.sum() for x in tensors_in(output) if x.is_floating_point() and x.requires_grad)
        if isinstance(loss, torch.Tensor):
            # As a training step has it: outside autocast.
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
    return notes


def _silence(model):
    """Hooks that do nothing in the place of the user's: where some stand, fused blocks go another way."""
    for module in model.modules():
        module._compiled_call_impl = None
        for name in HOOKS:
            hooks = getattr(module, name)
            for key in list(hooks):
                hooks[key] = _do_nothing


def _do_nothing(*args, **kwargs):
    return None


def _unwrapped(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner = getattr(model, "_orig_mod", None) if inner is None else inner
        if inner is None:
            break
        model = inner
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ValueError("model is sharded and cannot be copied; warm up before fully_shard")
    return model


# ---- compiling them ----


class _Pointer:
    """A tensor as Triton sees one that it specialises on: a dtype and an address."""

    def __init__(self, tensor):
        self.dtype = tensor.dtype
        # An allocation starts on 16 bytes and more, a view of it may not.
        self._address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self):
        """The address, as far as its divisibility goes."""
        return self._address

    @staticmethod
    def ptr_range():
        """Asked on AMD GPUs."""
        return 0


def specialization(launch) -> tuple:
    """What of a launch Triton compiles for: its constants, the types of its arguments, what is 1 or divisible by 16."""
    plain = getattr(launch.kernel, "do_not_specialize", None) or ()
    kinds = tuple((name, _kind(value, name in plain)) for name, value in launch.arguments.items())
    constants = tuple(sorted(launch.constexprs.items()))
    return launch.kernel, kinds, constants, launch.num_warps, launch.num_stages


def _kind(value, plain) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return wide if plain else (wide, value == 1, value % 16 == 0)
    return type(value)


def compile_ahead(launches: list) -> list[CompiledKernel]:
    """Compile what the launches need, each variant once, in threads; in the order of the launches."""
    variants = {specialization(launch): launch for launch in reversed(launches)}
    jobs = list(reversed(variants.values()))
    for launch in jobs:
        _ = launch.kernel.cache_key  # of its source: made here, not in several threads at once
    workers = max(1, min(THREADS, len(os.sched_getaffinity(0)), len(jobs)))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, _progress(len(jobs)) as bar:
        futures = [pool.submit(_compile, launch) for launch in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _compile(launch) -> CompiledKernel:
    start = time.perf_counter()
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    stand_ins = {
        name: _Pointer(value) if isinstance(value, torch.Tensor) else value for name, value in launch.arguments.items()
    }
    name = launch.kernel.__name__.strip("_")
    device = tensors[0].device
    # The current device is each thread's own.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            launch.kernel.warmup(
                **stand_ins,
                **launch.constexprs,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                grid=(launch.grid,),
            )
        except Exception as error:
            constants = ", ".join(f"{key}={value}" for key, value in launch.constexprs.items())
            raise RuntimeError(f"the kernel {name}({constants}) cannot be compiled: {error}") from error
    return CompiledKernel(name, dict(launch.constexprs), time.perf_counter() - start)


def _progress(total):
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(_NoBar())
    return tqdm(total=total, desc="compiling kernels", unit="kernel", disable=None, leave=False)


class _NoBar:
    def update(self):
        """There is no bar."""

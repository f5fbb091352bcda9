"""Count a training step on tensors without data: every operation with its cost and place, and what autograd saves.

Fake tensors claim to be on the CPU: a build of PyTorch without CUDA cannot differentiate fake CUDA tensors (the
autograd engine asks the device for a stream). What would differ on a GPU is put right: `cuda_autocast` adds the
operations that autocast runs in fp32 there, and `kernels_as_on_cuda` routes this package's ops as the kernels
registered for CUDA would. Attention needs nothing: both devices send 4-D tensors to a fused kernel, and 5-D ones to the
same chain of plain operations, which computes 16-bit inputs in fp32.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.op_costs import Cost, cost_of, in_place, kind_of, name_of, nonzero_cost, tensors
from benchmarks.op_places import Places
from hiera_kernels.ops import calling

# Compiled from csrc/ for CUDA wherever nvcc is; a build without CUDA registers them for the CPU alone.
CUDA_EXTENSION = ("unroll", "reroll", "embed_tokens", "embed_tokens_backward")
# What CUDA's autocast computes in fp32 and the CPU's does not, of the operations that Hiera uses.
FP32_ON_CUDA = ("layer_norm", "pow.Tensor_Scalar", "pow.Tensor_Tensor")
FP32_RESULT_ON_CUDA = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList")
# Nodes that write into zeros of their own making, but for tensors of a subclass, as fake ones are.
SCATTERS_IN_PLACE = ("MaxBackward0", "MinBackward0", "IndexBackward0", "GatherBackward0")


@dataclass
class Step:
    """What was counted: `ops` of (phase, block, kind, name, Cost), and bytes that autograd keeps, by block."""

    ops: list[tuple[str, str, str, str, Cost]] = field(default_factory=list)
    saved: Counter = field(default_factory=Counter)
    saved_weights: int = 0  # copies of weights that autocast made: do not grow with the batch

    def total(self, what: str, *phases: str) -> int:
        """Sum of "bytes", "flops" or "launches" over the phases."""
        return sum(getattr(op[4], what) for op in self.ops if op[0] in phases)


class _Seen(TorchDispatchMode):
    """Records each operation below autograd, and computes the length of what a boolean mask picks."""

    def __init__(self, step: Step, places: Places, visible: tuple[int, int] | None):
        super().__init__()
        self.step, self.places, self.visible, self.phase = step, places, visible, "forward"
        self.density: dict[int, float] = {}
        self.weight_copies: set[int] = set()
        self._kept = []  # storages whose addresses are remembered, so that no other gets them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == calling.NAMESPACE:
            self.places.see(tensors(args), made_already=1)
        name = name_of(func)
        if name == "_local_scalar_dense" and self.visible is not None:
            return self.visible[1]  # the one number that a model asks for: how many mask units each row keeps
        if name in ("index", "index_put", "index_put_", "_unsafe_index_put") and any(
            x is not None and x.dtype is torch.bool for x in args[1]
        ):
            args = (args[0], [each for x in args[1] for each in self._positions(x)], *args[2:])
        out = func(*args, **kwargs)
        cost = cost_of(func, args, kwargs, out)
        node = torch._C._current_autograd_node()
        if node is not None and node.name() in SCATTERS_IN_PLACE:
            cost = in_place(func, args, cost)
        self._record(func, cost)
        self._follow(name, args, out)
        return out

    def _record(self, func, cost, name=None):
        if cost.launches and self.phase is not None:
            block, kind = self.places.here()
            if self.phase == "optimizer":
                block, kind = "optimizer", "optimizer"
            self.step.ops.append((self.phase, block, kind or kind_of(func), name or name_of(func), cost))

    def _follow(self, name, args, out):
        given = list(tensors(args))
        if name == "_to_copy" and self._key(given[0]) in self.places.parameters | self.weight_copies:
            self.weight_copies.add(self._hold(out))
        if not isinstance(out, torch.Tensor) or out.dtype is not torch.bool or self.visible is None:
            return
        key = self._key(out)
        known = [self.density[self._key(x)] for x in given if self._key(x) in self.density]
        units, visible = self.visible
        if name in ("bitwise_not", "logical_not") and known:
            self.density[self._hold(out)] = 1 - known[0]
        elif known:
            self.density.setdefault(key, known[0])
            self._hold(out)
        elif out.ndim == 2 and out.shape[1] == units:
            self.density[self._hold(out)] = visible / units

    def _positions(self, mask):
        """A boolean index as what it means: one list of positions for each of its dimensions."""
        if mask is None or mask.dtype is not torch.bool:
            return [mask]
        if self._key(mask) not in self.density:
            raise RuntimeError(f"how many elements of a mask of shape {tuple(mask.shape)} are True is not known")
        count = round(mask.numel() * self.density[self._key(mask)])
        self._record(torch.ops.aten.index.Tensor, nonzero_cost(mask, count), "nonzero")
        return [torch.empty(count, dtype=torch.int64, device=mask.device) for _ in range(mask.ndim)]

    def _key(self, x):
        return x.untyped_storage()._cdata

    def _hold(self, x):
        storage = x.untyped_storage()
        self._kept.append(storage)
        return storage._cdata


class _Used(TorchFunctionMode):
    """Notices the parameters of each call before autograd and autocast do, and what happens inside attention."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.places.see(tensors(args, kwargs))
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.places.enter("attention")
        try:
            return func(*args, **kwargs)
        finally:
            self.places.enter(None)


@contextlib.contextmanager
def _saving(seen: _Seen) -> Iterator[None]:
    """Adds up the storages that autograd keeps, each once, parameters left out."""
    counted = set()

    def keep(x):
        key = x.untyped_storage()._cdata
        if key not in counted and key not in seen.places.parameters:
            counted.add(seen._hold(x))
            if key in seen.weight_copies:
                seen.step.saved_weights += x.untyped_storage().nbytes()
            else:
                seen.step.saved[seen.places.current] += x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast for the CPU with CUDA's list of what is computed in fp32."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def widened(op, by_dtype):
        def call(*args, **kwargs):
            low = [x for x in tensors(args) if x.is_floating_point() and x.dtype is not torch.float64]
            if by_dtype:
                if low and kwargs.get("dtype") is None:
                    kwargs = {**kwargs, "dtype": torch.float32}
            else:
                wide = lambda x: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
                args, kwargs = tree_map(wide, args), tree_map(wide, kwargs)
            with torch._C._ExcludeDispatchKeyGuard(key):
                return op(*args, **kwargs)

        return call

    with torch.library._scoped_library("aten", "IMPL") as library:
        for names, by_dtype in ((FP32_ON_CUDA, False), (FP32_RESULT_ON_CUDA, True)):
            for name in names:
                packet, _, overload = name.partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(name, widened(op, by_dtype), "AutocastCPU")
        with torch.autocast("cpu", dtype):
            yield


@contextlib.contextmanager
def kernels_as_on_cuda() -> Iterator[None]:
    """Ops that have a kernel for CUDA have one for the CPU too, which must not run: fake kernels stand before it."""

    def unreachable(*args, **kwargs):
        raise AssertionError("a kernel was reached on a fake tensor")

    prefix = calling.NAMESPACE + "::"
    names = [name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    wanted = [name for name in names if name in CUDA_EXTENSION or calling.has_kernel(name, "cuda")]
    limits = {(op, "cpu"): says for (op, device), says in calling.limits.items() if device == "cuda"}
    with torch.library._scoped_library(calling.NAMESPACE, "IMPL") as library, mock.patch.dict(calling.limits, limits):
        for name in wanted:
            if not calling.has_kernel(name, "cpu"):
                library.impl(name, unreachable, "CPU")
        yield


def without_data(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Replace the parameters and buffers by fake ones of the same shapes, in place, cast to `dtype` if given."""
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None:
                continue
            with mode:
                fake = torch.empty(value.shape, dtype=dtype if dtype and value.is_floating_point() else value.dtype)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
            else:
                module._buffers[name] = fake


def count(
    model: nn.Module,
    run: Callable[[nn.Module], torch.Tensor],
    autocast: torch.dtype | None = torch.bfloat16,
    cast: torch.dtype | None = None,
    visible: tuple[int, int] | None = None,
    optimizer: bool = True,
) -> Step:
    """Forward, backward and AdamW of a model, counted operation by operation.

    Args:
        model: any module, with its weights on the CPU; afterwards they are fake.
        run: makes the (fake) input and returns the loss; called once, under autocast.
        autocast: the autocast dtype, or None.
        cast: dtype to cast the model to beforehand, or None.
        visible: for masked models with boolean indexing: (mask units, units kept) per sample.
        optimizer: whether to count a step of fused AdamW as well.

    Raises:
        RuntimeError: a boolean mask of unknown density is used as an index.
    """
    mode = FakeTensorMode()
    without_data(model, mode, cast)
    step, places = Step(), Places(model)
    seen = _Seen(step, places, visible)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kernels_as_on_cuda())
        stack.enter_context(mode)
        stack.enter_context(seen)
        with _Used(places), _saving(seen), cuda_autocast(autocast) if autocast else contextlib.nullcontext():
            loss = run(model)
        seen.phase = "backward"
        loss.backward()
        if optimizer:
            adam = torch.optim.AdamW(model.parameters(), fused=True)
            seen.phase = None  # its moments are made in the first step, which is not what is counted
            for parameter in model.parameters():
                if parameter.grad is not None:
                    state = adam.state[parameter]
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = (torch.empty_like(parameter) for _ in range(2))
            seen.phase = "optimizer"
            adam.step()
    return step


def loss_of(workload, batch: int) -> Callable[[nn.Module], torch.Tensor]:
    """What `count` runs for a workload (benchmarks/workloads.py): a fake batch, the model, the workload's loss."""

    def run(model):
        dtype = next(model.parameters()).dtype
        images = torch.empty(batch, 3, *workload.size, dtype=dtype)
        labels = torch.empty(batch, dtype=torch.int64) if workload.objective == "fine-tune" else None
        return workload.loss(workload.outputs(model, images), labels)

    return run


def visible_units(model: nn.Module, mask_ratio: float | None) -> tuple[int, int] | None:
    """(mask units, units that a random mask keeps) of a masked autoencoder, None for other models."""
    if mask_ratio is None:
        return None
    grid = getattr(model, "mask_spatial_shape", None)
    if grid is None:
        grid = [n // unit for n, unit in zip(model.tokens_spatial_shape, model.mask_unit_size, strict=True)]
    units = math.prod(grid)
    return units, int(units * (1 - mask_ratio))

"""One training step of one model: run it, time it, weigh it."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping

import torch

from hiera_kernels.lookalike import tensors_in

GRADIENT = "gradient "


class TrainingStep:
    """Forward, loss and backward of one copy, from the same random state every time."""

    def __init__(self, model, batch, loss, dtype=None):
        self.model, self.loss = model, loss or _projection
        self.batch = cast(batch, dtype)
        self.generators = _generators(model)

    def forward(self):
        """(output, loss) of the model on the batch."""
        for generator in self.generators:
            generator.manual_seed(0)
        if isinstance(self.batch, Mapping):
            output = self.model(**self.batch)
        elif isinstance(self.batch, torch.Tensor):
            output = self.model(self.batch)
        else:
            output = self.model(*self.batch)
        loss = self.loss(output)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TypeError(f"loss must give a scalar tensor, got {type(loss).__name__}")
        return output, loss

    def train(self):
        """What is timed: no gradients left from before, forward, backward."""
        self.model.zero_grad(set_to_none=True)
        self.forward()[1].backward()

    def run(self):
        """Every floating-point output, the loss, and every parameter's gradient, by name."""
        self.model.zero_grad(set_to_none=True)
        output, loss = self.forward()
        if loss.requires_grad:
            loss.backward()
        found = {f"output {i}": t for i, t in enumerate(tensors_in(output)) if t.is_floating_point()}
        found["loss"] = loss
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[GRADIENT + name] = parameter.grad
        found = {name: tensor.detach().clone() for name, tensor in found.items()}
        self.model.zero_grad(set_to_none=True)
        return found


@contextlib.contextmanager
def random_numbers_kept(model) -> Iterator[None]:
    """Put back on leaving the state of the generators that a :class:`TrainingStep` of this model seeds."""
    states = [(generator, generator.get_state()) for generator in _generators(model)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(model) -> list[torch.Generator]:
    """The default generators of the CPU and of the model's own devices: other GPUs may be at work for others."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    found = [torch.default_generator]
    for device in sorted((d for d in devices if d.type in ("cuda", "xpu")), key=str):
        found.append(torch.get_device_module(device).default_generators[device.index])
    return found


def _projection(output):
    """A fixed random projection of every output element, in fp32 at least, so that none goes unnoticed."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            total = total + (tensor.to(dtype) * weights.to(tensor.device, dtype)).sum() / max(tensor.numel(), 1) ** 0.5
    return total


def step_seconds(steps, device, repeats):
    """Median seconds of a training step, in turns, so that whatever else the machine does strikes both alike."""
    found = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name in sorted(steps, reverse=bool(i % 2)):
            start = _now(device)
            steps[name].train()
            found[name].append(_now(device) - start)
    return tuple(sorted(times[1:])[(repeats - 1) // 2] for times in (found["stock"], found["accelerated"]))


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_bytes(step, device) -> int:
    """Memory of a training step: CUDA's peak above what lay there before, elsewhere what autograd saves."""
    if device.type == "cuda":
        step.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step.train()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # No allocator statistics on the CPU: the storages that autograd keeps, each once, without the parameters.
    own = {tensor.untyped_storage().data_ptr() for tensor in step.model.state_dict().values()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = step.forward()  # alive while counting: an address that was freed could be counted twice, or not at all
    del kept
    return sum(saved.values())


def cast(value, dtype):
    """The batch with its floating-point tensors in `dtype` (None: as they are)."""
    if dtype is None:
        return value
    return _mapped(value, lambda tensor: tensor.to(dtype))


def nearby_batch(value, generator):
    """The batch with every floating-point number changed by about a thousandth, or what its dtype can show."""

    def disturbed(tensor):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)
        return (tensor.double() * (1 + max(2**-10, 4 * torch.finfo(tensor.dtype).eps) * noise)).to(tensor.dtype)

    return _mapped(value, disturbed)


def _mapped(value, function):
    """The same nest of tuples, lists and dicts with `function` applied to every floating-point tensor."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_mapped(item, function) for item in value)
    return value

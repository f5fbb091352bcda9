"""What the examples print: a few training steps of the stock model beside the same steps of the accelerated one."""

import copy
import time

import torch

import hiera_kernels


def compare(model, loss_of, steps=3):
    """Train `model` and an accelerated copy of it for some steps; print ms a step, memory and the difference in loss.

    Args:
        model: The stock model; it stays so.
        loss_of: model -> loss, drawing the same random numbers at every call from a given seed.
        steps: Training steps; the first is not timed, for it compiles.

    Returns:
        The losses, stock and accelerated, each a list of floats.
    """
    ours = copy.deepcopy(model)
    report = hiera_kernels.accelerate(ours)
    print(report)
    losses = []
    for name, each in (("stock", model), ("accelerated", ours)):
        optimizer = torch.optim.AdamW((p for p in each.parameters() if p.requires_grad), lr=1e-4)
        found, times = [], []
        cuda = next(each.parameters()).is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for i in range(steps + 1):
            torch.manual_seed(i)
            start = time.perf_counter()
            loss = loss_of(each)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())  # waits for the device
            times.append(time.perf_counter() - start)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if cuda else ""
        print(
            f"{name:12} {1000 * min(times[1:]):8.1f} ms a step{memory}, losses {[round(value, 5) for value in found]}"
        )
        losses.append(found)
    print(f"largest difference in loss: {max(abs(a - b) for a, b in zip(*losses, strict=True)):.1e}")
    return losses

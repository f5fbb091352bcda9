"""On a CPU nothing is to be won yet, and nothing may be lost: a training step takes at most 1.05 of stock's time."""

import copy
import statistics
import time

import pytest
import torch

from hiera_kernels.swap import accelerate
from tests.swap_cases import LIBRARIES, library

ROUNDS = 5


def seconds(model, x):
    start = time.perf_counter()
    model.zero_grad()
    out = model(x)
    (out[0] if isinstance(out, tuple) else out.square().mean()).backward()
    return time.perf_counter() - start


@pytest.mark.timing
@pytest.mark.parametrize("variant", ["hiera_tiny_224", "mae_hiera_tiny_224"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_training_step_is_not_slower_than_stock(name, variant):
    """In turns, each pair one after the other: the median of the ratios, whatever else the machine is doing."""
    stock = getattr(library(name), variant)()
    ours = copy.deepcopy(stock)
    accelerate(ours)
    x = torch.randn(1, 3, 224, 224)
    ratios = []
    for i in range(ROUNDS + 1):
        if i % 2:
            slow, fast = seconds(stock, x), seconds(ours, x)
        else:
            fast, slow = seconds(ours, x), seconds(stock, x)
        ratios.append(fast / slow)
    ratio = statistics.median(ratios[1:])
    print(f"{name} {variant}: {ratio:.3f} of stock's time")
    assert ratio <= 1.05, ratios

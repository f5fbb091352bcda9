"""What every test shares: one thread per worker, fixed seeds, and the marks of what this machine cannot run."""

import pytest
import torch

# Two pytest workers on two cores: more threads per worker would only take turns. Tests that measure time set their own.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine; `make gpu` runs it on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

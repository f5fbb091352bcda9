"""Whole accelerated models with the Triton kernels themselves, in Triton's interpreter, against fp64 stock models.

The law of parity (swap_cases.assert_law): per tensor, outputs and all gradients, at most twice the RMS error of stock
in the same dtype.
"""

import copy

import pytest
import torch

from hiera_kernels.swap import accelerate
from tests.interpreter import kernels_on_cpu, marks
from tests.swap_cases import assert_law, build, step

pytestmark = marks

WANTED = {
    *("add_layer_norm", "add_layer_norm_backward", "normalize", "gelu", "gelu_backward"),
    *("linear_q_pool", "linear_q_pool_backward", "mask_unit_attention", "mask_unit_attention_backward"),
}


CASES = [
    ("hiera", {}),
    ("hiera-transformer", {}),
    pytest.param("hiera", {"recompute": "block"}, marks=pytest.mark.slow),
    ("hiera", {"drop_path": "skip"}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_small_model(name, settings):
    stock = build(name, stages=(2, 1, 1, 1), drop_path_rate=0.2, input_size=(32, 64))
    ours = copy.deepcopy(stock)
    assert not accelerate(ours, **settings).skipped
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    oracle = step(stock, x)
    expected = step(stock.float(), x.float())
    with kernels_on_cpu() as calls:
        actual = step(ours.float(), x.float())
    assert set(calls) >= WANTED
    assert_law(actual, expected, oracle, rounding=torch.finfo(torch.float32).eps * 8)

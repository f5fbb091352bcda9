"""The attention kernels in configurations that the rules would not choose, in Triton's interpreter, against the oracle.

Broken on purpose: a legality check that forgot COPIES * S <= BLOCK_S, which the first shape turns red.
"""

import random

import pytest
import torch

from benchmarks import timing, tune_space
from benchmarks.attention_shapes import AttentionShape
from benchmarks.tune_gpu import Bench, configured, plan
from hiera_kernels import reference
from tests import attention_oracle as oracle
from tests.interpreter import marks

pytestmark = marks


def _few(key, count):
    tried = tune_space.candidates(key)
    return [tried[0], *random.Random(0).sample(tried[1:], min(count, len(tried) - 1))]


INTERPRETED = [
    (key, tile)
    for S, P, D in ((4, 4, 8), (5, 4, 24), (16, 4, 24), (40, 2, 24))
    for key in ((d, S, S * P, D, 32, 9) for d in tune_space.directions(S * P))
    for tile in _few(key, 3)
]


@pytest.mark.parametrize(("key", "tile"), INTERPRETED, ids=lambda x: "-".join(map(str, x)))
def test_what_is_tried_computes_the_same(key, tile):
    direction, S, K, D, _, _ = key
    shape = AttentionShape("toy", "", K * 2, 2, K // S, 2, D)
    qkv, grad = torch.randn(1, shape.N, 3 * shape.C), torch.randn(1, 2 * S, shape.C)
    with configured(key, tile):
        launches, _, (got,) = plan(key, shape, qkv, grad, (9, 0))
        got.fill_(float("nan"))
        for launch in launches:
            launch.run()
    arguments = (shape.H, shape.W, shape.P, None)
    if direction == "forward":
        wanted = oracle.attention(qkv.double().numpy(), *arguments)[0]
    else:
        wanted = oracle.attention_backward(grad.double().numpy(), qkv.double().numpy(), *arguments, "first")
    assert torch.allclose(got.double(), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


class Eager:
    """What a CUDA graph of the calls does, without one."""

    def __init__(self, call, count):
        self.call, self.count = call, count

    def __call__(self):
        for i in range(self.count):
            self.call(i)


@pytest.mark.parametrize("key", [("backward", 4, 16, 8, 32, 9)])
def test_the_bench_judges_and_times(monkeypatch, key):
    """The very code that runs on a GPU, its graph apart; a kernel that is wrong is refused, whatever its speed."""
    monkeypatch.setattr(timing, "Captured", Eager)
    _, S, K, D, _, _ = key
    shape = AttentionShape("toy", "", K * 2, 2, K // S, 1, D)
    own, other = tune_space.candidates(key)[:2]
    settings = {"device": torch.device("cpu"), "seconds": 0.0, "cold_bytes": 1}
    bench = Bench(key, shape, 1, torch.float32, own, (9, 0), **settings)
    seconds, refused = bench(other)
    assert seconds > 0
    assert refused is None
    bench.truth = [x * 1.01 for x in bench.truth]
    seconds, refused = bench(other)
    assert seconds is None
    assert refused.startswith("red")
    monkeypatch.setattr("benchmarks.attention.oracle", lambda qkv, shape: oracle_of_another_scale(qkv, shape))
    with pytest.raises(RuntimeError, match="as the table has it"):
        Bench(key, shape, 1, torch.float32, own, (9, 0), **settings)


def oracle_of_another_scale(qkv, shape):
    return reference.mask_unit_attention(qkv, shape.H, shape.W, shape.P, scale=0.5)

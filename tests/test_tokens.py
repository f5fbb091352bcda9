"""Token orders against hiera-transformer and against coordinates; mask units against boolean indexing."""

import itertools

import pytest
import torch

from hiera.tokens import Reroll, Unroll, count_kept, gather_units, kept_units, undo_windowing
from tests.upstream import ALIAS, load_upstream

CASES = [
    ((8,), (2,), 3, 3),
    ((27,), (3,), 2, 2),
    ((8, 24), (2, 2), 3, 3),
    ((16, 8), (2, 2), 3, 1),
    ((4, 12), (2, 3), 1, 1),
    ((16, 5), (2, 1), 3, 2),
    ((3, 8, 16), (1, 2, 2), 3, 3),
    ((4, 4, 6), (2, 2, 3), 1, 0),
    ((6, 5), (2, 2), 0, 0),
]


def modules(size, stride, steps, q_pool, package=None):
    stage_ends = [2 * i + 1 for i in range(steps + 1)]
    schedule = [stride] * steps
    ones = (1,) * len(size)
    unroll, reroll = (package.Unroll, package.Reroll) if package else (Unroll, Reroll)
    return unroll(size, ones, schedule), reroll(size, ones, schedule, stage_ends, q_pool), stage_ends


@pytest.mark.parametrize(("size", "stride", "steps", "q_pool"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_against_upstream(size, stride, steps, q_pool, dtype):
    import sys

    load_upstream()
    package = sys.modules[f"{ALIAS}.hiera_utils"]
    ours, our_reroll, stage_ends = modules(size, stride, steps, q_pool)
    theirs, their_reroll, _ = modules(size, stride, steps, q_pool, package)
    N = torch.Size(size).numel()
    x = torch.randn(2, N, 3).to(dtype) if dtype != torch.bool else torch.randn(2, N, 3) > 0
    assert torch.equal(ours(x), theirs(x))
    unit = torch.Size(stride).numel()
    for block in range(stage_ends[-1] + 1):
        poolings = min(sum(end < block for end in stage_ends), q_pool)
        tokens = x[:, : N // unit**poolings]
        assert torch.equal(our_reroll(tokens, block), their_reroll(tokens, block))
        kept = tokens[:, : unit ** (steps - poolings) * 1]
        mask = torch.ones(1)
        assert torch.equal(our_reroll(kept, block, mask), their_reroll(kept, block, mask))
    assert torch.equal(our_reroll(ours(x), 0).flatten(1, -2), x)


@pytest.mark.parametrize(
    ("size", "schedule"), [((12, 8), [(2, 2), (3, 2)]), ((12,), [(3,), (2,)]), ((4, 6, 4), [(1, 3, 2), (2, 1, 2)])]
)
def test_uneven_schedules_by_coordinates(size, schedule):
    """Upstream never has two strides that differ; the rule is the same: the first stride's remainders are slowest."""
    N = torch.Size(size).numel()
    x = torch.arange(N).view(1, N, 1)
    found = Unroll(size, (1,) * len(size), schedule)(x).flatten().tolist()

    def key(n):
        coordinates, keys = list(torch.unravel_index(torch.tensor(n), size)), []
        for strides in schedule:
            keys.append(tuple(int(c % s) for c, s in zip(coordinates, strides, strict=True)))
            coordinates = [c // s for c, s in zip(coordinates, strides, strict=True)]
        return [*keys, tuple(int(c) for c in coordinates)]

    assert found == sorted(range(N), key=key)
    back = Reroll(size, (1,) * len(size), schedule, [0, 1, 2], 2)(Unroll(size, (1,) * len(size), schedule)(x), 0)
    assert torch.equal(back.flatten(), x.flatten())


def test_another_size_than_built_for():
    schedule = [(2, 2)] * 3
    unroll, reroll = Unroll((32, 32), (4, 4), schedule), Reroll((32, 32), (4, 4), schedule, [0, 1, 2, 3], 3)
    other = Unroll((64, 96), (4, 4), schedule), Reroll((64, 96), (4, 4), schedule, [0, 1, 2, 3], 3)
    x = torch.randn(2, 16 * 24, 5)
    assert torch.equal(unroll(x, size=(16, 24)), other[0](x))
    for block, poolings in enumerate([0, 1, 2, 3]):
        tokens = x[:, : 16 * 24 // 4**poolings]
        assert torch.equal(reroll(tokens, block, size=(16, 24)), other[1](tokens, block))


def test_a_permuted_input_is_unrolled_too():
    unroll = Unroll((8, 16), (1, 1), [(2, 2)] * 2)
    x = torch.randn(2, 5, 128).transpose(1, 2)
    assert torch.equal(unroll(x), unroll(x.contiguous()))


def test_undo_windowing_by_hand():
    x = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3, 1)
    spatial = undo_windowing(x, (4, 9), (2, 3))
    for b, unit, i, j in itertools.product(range(2), range(6), range(2), range(3)):
        assert spatial[b, unit // 3 * 2 + i, unit % 3 * 3 + j] == x[b, unit, i, j]


@pytest.mark.parametrize("kept", [0, 1, 3, 7])
def test_kept_units(kept):
    mask = torch.stack([torch.randperm(7) < kept for _ in range(5)])
    expected = mask.nonzero()[:, 1].view(5, kept)
    assert torch.equal(kept_units(mask, kept), expected)
    if kept:
        assert count_kept(mask) == kept
    x = torch.randn(5, 4 * 7, 3, requires_grad=True)
    taken = gather_units(x, expected, 7)
    reference = x[mask[..., None].tile(1, 4, 3)].view(5, 4 * kept, 3)
    assert torch.equal(taken, reference)
    weight = torch.randn_like(taken)
    ours, theirs = (torch.autograd.grad((t * weight).sum(), x)[0] for t in (taken, reference))
    assert torch.equal(ours, theirs)


def test_count_kept_refuses():
    with pytest.raises(ValueError, match="rows keep 1 to 2"):
        count_kept(torch.tensor([[True, True], [True, False]]))
    with pytest.raises(ValueError, match="keeps no mask unit"):
        count_kept(torch.zeros(2, 3, dtype=torch.bool))
    assert count_kept(torch.zeros(0, 3, dtype=torch.bool)) == 3

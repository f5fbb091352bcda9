"""Position embeddings: interpolation against timm and numpy, the absolute-win embedding against loops."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hiera.position import (
    absolute_win_pos_embed,
    guess_grid,
    resize_grid,
    resize_pos_embed,
    separable_pos_embed,
)
from tests.upstream import import_timm


def linear(values, length):
    """Linear interpolation with aligned pixel edges, by numpy: [old] -> [length]."""
    old = len(values)
    where = (np.arange(length) + 0.5) * old / length - 0.5
    return np.interp(where, np.arange(old), values)  # constant beyond the ends


@pytest.mark.parametrize(("old", "new"), [((7, 7), (8, 12)), ((14, 14), (7, 10)), ((6, 10), (10, 6)), ((5, 3), (5, 9))])
def test_pictures_as_timm_resamples_them(old, new):
    import_timm()
    from timm.layers import resample_abs_pos_embed

    embed = torch.randn(1, old[0] * old[1], 6)
    expected = resample_abs_pos_embed(embed, list(new), list(old), num_prefix_tokens=0)
    assert torch.equal(resize_pos_embed(embed, old, new), expected)


@pytest.mark.parametrize("length", [3, 5, 8, 11])
def test_lines(length):
    embed = torch.randn(1, 5, 4, dtype=torch.float64)
    resized = resize_pos_embed(embed, (5,), (length,))
    for c in range(4):
        expected = linear(embed[0, :, c].numpy(), length)
        np.testing.assert_allclose(resized[0, :, c].numpy(), expected, rtol=0, atol=1e-12)


def test_videos_are_resized_frame_by_frame_then_in_time():
    embed = torch.randn(1, 3 * 4 * 6, 2, dtype=torch.float64)
    resized = resize_pos_embed(embed, (3, 4, 6), (5, 6, 4)).view(5, 6, 4, 2)
    frames = torch.stack([resize_pos_embed(frame.flatten(0, 1)[None], (4, 6), (6, 4))[0]
                          for frame in embed.view(3, 4, 6, 2)])  # fmt: skip
    for n, c in itertools.product(range(24), range(2)):
        expected = linear(frames[:, n, c].numpy(), 5)
        np.testing.assert_allclose(resized[:, n // 4, n % 4, c].numpy(), expected, rtol=0, atol=1e-12)


def test_a_constant_stays_constant_and_a_grid_keeps_its_orientation():
    constant = resize_pos_embed(torch.full((1, 6, 2), 3.0), (2, 3), (7, 5))
    assert torch.allclose(constant, torch.full((1, 35, 2), 3.0))
    ramp = torch.arange(4.0)[:, None].expand(4, 6).reshape(1, 24, 1)  # grows with y only
    grown = resize_pos_embed(ramp, (4, 6), (8, 3)).view(8, 3)
    assert torch.allclose(grown[:, :1].expand(8, 3), grown)
    assert (grown[1:, 0] > grown[:-1, 0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_interpolated_in_fp32(dtype):
    grid = torch.randn(1, 3, 4, 6).to(dtype)
    resized = resize_grid(grid, (8, 9))
    assert resized.dtype == dtype
    assert torch.equal(resized, F.interpolate(grid.float(), (8, 9), mode="bicubic", antialias=True).to(dtype))


def test_nothing_to_do_copies_nothing():
    embed = torch.randn(1, 6, 2)
    assert resize_pos_embed(embed, (2, 3), [2, 3]) is embed


def test_gradients_flow():
    embed = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: resize_pos_embed(e, (2, 3), (4, 4)), embed)
    background = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    window = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, w: absolute_win_pos_embed(b, w, (4, 6)), (background, window))


def test_a_wrong_grid_is_refused():
    with pytest.raises(ValueError, match=r"6 positions, which is not the grid old=\(2, 2\)"):
        resize_pos_embed(torch.randn(1, 6, 2), (2, 2), (4, 4))


def test_separable_by_hand():
    spatial, temporal = torch.randn(1, 6, 3), torch.randn(1, 4, 3)
    embed = separable_pos_embed(spatial, temporal)
    for t, n in itertools.product(range(4), range(6)):
        assert torch.equal(embed[0, t * 6 + n], spatial[0, n] + temporal[0, t])


def test_absolute_win_by_hand():
    background, window = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 3)
    embed = absolute_win_pos_embed(background, window, (6, 9)).view(6, 9, 2)
    whole = F.interpolate(background, (6, 9), mode="bicubic", antialias=True)
    for y, x in itertools.product(range(6), range(9)):
        assert torch.equal(embed[y, x], whole[0, :, y, x] + window[0, :, y % 2, x % 3])


@pytest.mark.parametrize(
    ("positions", "like", "time", "grid"),
    [
        (12, (3, 4), None, (3, 4)),
        (49, (8, 12), None, (7, 7)),
        (48, (8, 12), None, None),
        (17, (32,), None, (17,)),
        (8 * 49, (4, 8, 8), 8, (8, 7, 7)),
        (4 * 49, (4, 8, 8), None, (4, 7, 7)),
        (50, (4, 8, 8), 4, None),
    ],
)
def test_guessed_grids(positions, like, time, grid):
    assert guess_grid(positions, like, time) == grid

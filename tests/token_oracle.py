"""Where every token goes, by counting: from the definition alone, token by token, sharing nothing with the code."""

import functools
import itertools
import math

import numpy as np

# (size, strides): 1-D to 3-D, H != W, odd sizes, steps that differ, strides of 1, one window only, no steps at all.
GRIDS = [
    ((1,), ()),
    ((7,), ()),
    ((12,), ((2,), (3,))),
    ((30,), ((5,), (1,), (3,))),
    ((8, 8), ((2, 2), (2, 2), (2, 2))),  # one window only: the last stage
    ((16, 24), ((2, 2), (2, 2), (2, 2))),
    ((6, 10), ((3, 1), (1, 5))),
    ((9, 4), ((3, 2), (1, 2), (3, 1))),
    ((5, 3), ((1, 1), (1, 1))),
    ((56, 56), ((2, 2), (2, 2), (2, 2))),
    ((14, 14), ((2, 2),)),
    ((4, 6), ((1, 2),)),  # the tokens of an image row stay together
    ((6, 8), ((2, 1), (3, 1))),  # whole image rows move
    ((2, 4, 6), ((1, 2, 2), (1, 1, 3))),
    ((8, 4, 12), ((1, 2, 2), (2, 2, 2), (2, 1, 3))),
    ((3, 5, 7), ((3, 5, 7),)),
    ((2, 3, 4), ((2, 1, 1),)),
]
GRID_IDS = ["x".join(map(str, size)) + ":" + "/".join("".join(map(str, s)) for s in strides) for size, strides in GRIDS]


@functools.cache
def unrolled_place(size, strides):
    """place[s] = n: where the token at spatial position s stands in unrolled order.

    A coordinate's remainder by the first stride is its first digit, its quotient goes to the next step; what is left
    after the last step is the window. n counts through all first digits (slowest), then all second ones, ..., windows
    fastest.
    """
    place = np.empty(math.prod(size), dtype=np.int64)
    for s, coordinates in enumerate(itertools.product(*map(range, size))):
        left, extent, n = list(coordinates), list(size), 0
        for step in strides:
            for d, stride in enumerate(step):
                left[d], digit = divmod(left[d], stride)
                extent[d] //= stride
                n = n * stride + digit
        for d, rest in enumerate(left):
            n = n * extent[d] + rest
        place[s] = n
    return place


def windows_of(size, strides):
    """W, the number of mask units."""
    return math.prod(size) // math.prod(math.prod(step) for step in strides)


def unrolled(x, size, strides):
    """[B, N, ...] in unrolled order, from spatial order (numpy)."""
    out = np.empty_like(x)
    for s, n in enumerate(unrolled_place(size, strides)):
        out[:, n] = x[:, s]
    return out


def rerolled(x, size, strides):
    """[B, *size, ...] from unrolled order (numpy)."""
    out = np.empty_like(x)
    for s, n in enumerate(unrolled_place(size, strides)):
        out[:, s] = x[:, n]
    return out.reshape(x.shape[0], *size, *x.shape[2:])


def kept_rows(size, strides, keep):
    """For one image and its list of kept units: the unrolled row behind every output row of `embed_tokens`."""
    windows = windows_of(size, strides)
    return [inner * windows + unit for inner in range(math.prod(size) // windows) for unit in keep]

"""What the kernels of window_attention move, in 32-byte sectors, against what has to move at least.

The least is qkv read and out written, or in the backward qkv and the gradient of out read and that of qkv written, all
of the map and nothing else: a padded copy, a partition or a crop that went through memory would be seen at once, and so
would one head of D = 56 to a program (1.14).

Broken on purpose: whole windows that store sums of padded tokens too, into the place of another window's. Every other
test stays green; test_no_two_programs_write_the_same_sector does not.
"""

import dataclasses

import pytest

from benchmarks.window_shapes import WindowShape
from tests.gates import traffic, window_cases

pytestmark = pytest.mark.interpreted

LIMIT = 1.05
# A backward in two kernels reads q, k, v and the gradient twice, and sums of rows: 11/7 of the least, and a little.
TWO_PASSES = 1.65
# Six whole windows; 3 x 4 windows of 7, half of which overhang (a third do in the models). As many heads as make whole
# sectors.
SHORT = [
    dataclasses.replace(
        shape,
        H=1 if shape.D % 16 == 0 else 2,
        Hs=18 if window_cases.overhangs(shape) else 2 * shape.window,
        Ws=25 if window_cases.overhangs(shape) else 3 * shape.window,
    )
    for shape in window_cases.served()
    if shape.window <= 8
]
READ = {"forward": {"p_qkv", "p_pad"}, "backward": {"p_qkv", "p_pad", "p_grad"}}
WRITTEN = {"forward": {"p_out"}, "backward": {"p_grad_qkv", "p_grad_pad"}}


def recorded(shape, direction, dtype, group=None):
    launches = window_cases.plan(shape, direction, dtype, (9, 0), 1, "cpu")
    with traffic.record(group) as counted:
        for launch in launches:
            launch.run()
    return counted


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHORT, ids=lambda shape: f"{shape.window}x{shape.pool} d{shape.D}")
def test_every_byte_moves_once_and_no_padded_copy_is_written(shape, direction):
    counted = recorded(shape, direction, "fp16")
    least = shape.bytes(1, 2, backward=direction == "backward")
    factor = traffic.moved(counted) / least
    # Below 1 the count would be wrong, or the kernel would not do all its work.
    assert 1.0 <= factor <= LIMIT, f"{factor:.3f}\n{traffic.table(counted)}"
    print(f"{direction} {shape.window}x{shape.pool} d{shape.D}: {factor:.3f} of the least")
    (launch,) = counted
    touched = {how: {name for name, mode in launch.counts if mode == how} for how in (traffic.READ, traffic.WRITE)}
    names = lambda found: {part for name in found for part in name.split("|")}  # noqa: E731
    assert names(touched[traffic.READ]) <= READ[direction]
    assert names(touched[traffic.WRITE]) <= WRITTEN[direction]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_overhanging_windows_of_14_touch_nothing_but_the_map(direction, record_property):
    """All sectors of one image and head together; what its programs read again is L2's, and only reported."""
    shape = next(s for s in window_cases.served() if (s.window, s.pool, s.D) == (14, 1, 96))
    shape = dataclasses.replace(shape, H=1, Hs=22, Ws=18)
    counted = recorded(shape, direction, "fp16", group=lambda index: 0)
    least = shape.bytes(1, 2, backward=direction == "backward")
    factor = traffic.moved(counted) / least
    record_property("sectors of each head / least", factor)
    print(f"{direction}: {factor:.3f} of the least")
    assert 1.0 <= factor <= (LIMIT if direction == "forward" else TWO_PASSES), traffic.table(counted)


@pytest.mark.parametrize(
    ("window", "pool", "Hs", "Ws"),
    [(4, 1, 9, 11), (4, 2, 14, 6), (4, 1, 17, 8), (4, 1, 4, 15), (10, 2, 12, 14)],
    ids=str,
)
def test_no_two_programs_write_the_same_sector(window, pool, Hs, Ws):
    """A race on a GPU, which the interpreter's order of programs hides: sums of the pad row in the place of another."""
    shape = WindowShape("odd", "race", Hs, Ws, H=2, D=16, window=window, pool=pool)
    for direction in ("forward", "backward"):
        for launch in recorded(shape, direction, "fp16"):
            for (name, mode), count in launch.counts.items():
                if mode == traffic.WRITE and name != "p_stats":  # 25 rows are not whole sectors
                    assert count.sectors == count.distinct, (launch.kernel, name)


def test_odd_shapes_stay_inside_their_tensors():
    """An unmasked address outside every argument raises in the recorder."""
    for shape in window_cases.odd():
        if shape.window <= 7 and shape.D == 56:
            for direction in ("forward", "backward"):
                recorded(dataclasses.replace(shape, H=1), direction, "fp16")

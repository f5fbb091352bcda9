"""What the kernels of GELU and of the pooled linear layer move, in 32-byte sectors (tests/gates/traffic.py)."""

import pytest
import torch

from tests.gates import feed_forward_cases as cases
from tests.gates import traffic
from tests.interpreter import marks

pytestmark = marks

LIMIT = 1.05
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)


def recorded(launch, group=None):
    for tensor in launch.arguments.values():
        if isinstance(tensor, torch.Tensor) and not tensor.dtype.is_floating_point:
            tensor.zero_()  # uninitialised memory is no winner
    with traffic.record(group) as counted:
        launch.run()
    return counted


@DTYPES
@pytest.mark.parametrize("width", [384, 448, 576])
def test_gelu_moves_every_byte_once(width, dtype):
    rows = 300
    tensor = rows * width * dtype.itemsize
    least = {"gelu": 2 * tensor, "gelu_backward": 3 * tensor, "gelu_backward output bias": 4 * tensor}
    for name, launch in cases.gelu_launches(width, dtype, rows, "cpu").items():
        counted = recorded(launch)
        found = traffic.moved(counted) / least[name]
        # The sums, a row of fp32 for each 32 rows at this size, are 1.6 % of the whole in fp16.
        assert 1.0 <= found <= LIMIT, f"{name} {found:.3f}\n{traffic.table(counted)}"


def test_the_gate_sees_columns_that_are_no_whole_sectors():
    launch = cases.gelu_launches(384, torch.float16, 64, "cpu")["gelu_backward output bias"]
    narrow = launch._replace(
        arguments=launch.arguments | {"blocks": 48},
        grid=launch.grid * 8,
        constexprs=launch.constexprs | {"BLOCK_M": 8},
    )
    assert traffic.moved(recorded(narrow)) > 1.5 * traffic.moved(recorded(launch))


@pytest.mark.parametrize("channels", [96, 112])
def test_the_pooled_product_is_never_written(channels):
    """Each number from DRAM once; what several programs read, side by side, is L2's."""
    wide, pooled, batch, dtype = 2 * channels, 49, 2, torch.float16
    x, out = batch * 4 * pooled * channels * 2, batch * pooled * wide * 2
    weight, winners = channels * wide * 2, batch * pooled * wide
    launches = cases.pooling_launches(channels, wide, dtype, pooled=pooled, device="cpu")
    sums = launches["linear_q_pool_backward weight"].arguments
    sums = sums["p_weight_sums"].nbytes + sums["p_bias_sums"].nbytes
    least = {
        "linear_q_pool": x + weight + 2 * wide + out,
        "linear_q_pool winners": x + weight + 2 * wide + out + winners,
        "linear_q_pool_backward x": out + winners + weight + x,
        "linear_q_pool_backward weight": out + winners + x + sums,
    }
    assert set(least) == set(launches)
    for name, launch in launches.items():
        (counted,) = recorded(launch)
        found = counted.bytes(of="distinct") / least[name]
        assert 1.0 <= found <= LIMIT, f"{name} {found:.3f}\n{traffic.table([counted])}"


@pytest.mark.parametrize(("channels", "wide", "stride", "pooled"), [(7, 5, 3, 5), (33, 70, 2, 70), (130, 3, 8, 3)])
def test_odd_shapes_stay_inside_their_tensors(channels, wide, stride, pooled):
    """An unmasked address outside every argument raises in the recorder."""
    for ties in ("first", "split"):
        launches = cases.pooling_launches(channels, wide, torch.float16, stride, ties, pooled, "cpu")
        for launch in launches.values():
            recorded(launch)
    for rows, width in ((1, 1), (33, 7), (70, 65)):
        for launch in cases.gelu_launches(width, torch.float16, rows, "cpu").values():
            recorded(launch)

"""What the row kernels move, in 32-byte sectors, against what has to move at least (tests/gates/traffic.py).

Programs of as many rows as at batch 128, of which there are fewer here. Stage 4 at batch 128 has only 16 rows a
program, so that every SM has work: there weights and partial sums, which stay in L2, add 6 to 10 percent.
"""

import pytest

from tests.gates import row_cases, traffic
from tests.gates.row_cases import FP16, FP32, RowVariant

pytestmark = pytest.mark.interpreted

LIMIT = 1.05
# bf16 moves as many bytes as fp16, but the interpreter does not round to it.
CASES = [(C, FP16, FP16) for C in (96, 112, 144, 1152)] + [(96, FP32, FP16)]


def factor(C, variant, num_rows, tiles=None):
    launch = row_cases.plan(C, variant, num_rows, "cpu", samples=2)
    if tiles is not None:
        assert launch.arguments["rounds"] > tiles
        block = launch.constexprs["BLOCK_R"] * tiles
        launch = launch._replace(grid=-(-num_rows // block), arguments=launch.arguments | {"rounds": tiles})
    with traffic.record() as counted:
        launch.run()
    found = traffic.moved(counted) / row_cases.compulsory(C, variant, num_rows)
    return found, traffic.table(counted)


@pytest.mark.parametrize(("C", "stream", "half"), CASES, ids=str)
def test_forward_moves_every_byte_once(C, stream, half, monkeypatch):
    """32 rows a program, which 12,672 rows and more have."""
    from hiera_kernels.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "SMS", 1)
    found, table = factor(C, RowVariant("forward", stream, half), 64 if C > 1000 else 96)
    assert 1.0 <= found <= LIMIT, f"{found:.3f}\n{table}"


@pytest.mark.parametrize(("C", "stream", "half"), CASES, ids=str)
def test_backward_moves_every_byte_once(C, stream, half, monkeypatch):
    """64 rows a program, which 25,344 rows and more have."""
    from hiera_kernels.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "SMS", 1)
    found, table = factor(C, RowVariant("backward", stream, half), 128 if C > 1000 else 192)
    assert 1.0 <= found <= LIMIT, f"{found:.3f}\n{table}"


def test_normalizing_again_moves_every_byte_once(monkeypatch):
    from hiera_kernels.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "SMS", 1)
    found, table = factor(144, RowVariant("normalize", FP32, FP16), 192)
    assert 1.0 <= found <= LIMIT, f"{found:.3f}\n{table}"


def test_the_gate_sees_weights_that_are_read_too_often(monkeypatch):
    from hiera_kernels.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "SMS", 1)
    assert factor(384, RowVariant("forward", FP16, FP16), 64, tiles=1)[0] > 1.2


def test_no_access_outside_any_tensor():
    """An address outside every argument raises in the recorder."""
    for C in (8, 100, 112, 13):
        for direction in ("forward", "backward", "normalize"):
            factor(C, RowVariant(direction, FP16, FP16, layer=direction != "normalize"), 42)

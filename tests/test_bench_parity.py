"""A wrong result gets no speed: the judge, the oracles, and the benchmark that asks them."""

import itertools
import json

import pytest
import torch

from benchmarks import attention, ops, parity, rows, spots, token_order, trial
from benchmarks.attention_shapes import AttentionShape
from benchmarks.shapes import TokenShape
from benchmarks.window_shapes import WindowShape
from tests import attention_oracle
from tests.token_oracle import unrolled

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_judge_lets_rounding_pass_and_nothing_else(dtype):
    truth = torch.randn(6, 50, 64, dtype=torch.float64)
    right = truth.to(dtype)
    assert parity.judge([right], [truth]) == parity.GREEN

    def verdict(change):
        wrong = right.clone()
        change(wrong)
        return parity.judge([wrong], [truth])

    assert "red" in verdict(lambda x: x[3, 7].copy_(x[3, 8]))  # one row in 300 is another's
    assert "red" in verdict(lambda x: x[3, 7, 8].add_(1.0))  # one element in 19,200
    assert "red" in verdict(lambda x: x.mul_(1 + 32 * torch.finfo(dtype).eps * 4))
    assert "NaN" in verdict(lambda x: x[-1, -1, -1].fill_(float("nan")))
    assert "NaN" in verdict(lambda x: x[0, 0, 0].fill_(float("inf")))
    assert "shape" in parity.judge([right[:-1]], [truth])
    assert "results" in parity.judge([right, right], [truth])
    assert parity.judge([right], [right.double()], exact=True) == parity.GREEN
    right.view(-1)[5] *= 1 + torch.finfo(dtype).eps
    assert "1 elements differ" in parity.judge([right], [truth.to(dtype).double()], exact=True)


def test_a_coarser_input_allows_more_and_tf32_as_much_as_fp16():
    truth = torch.randn(100, 100, dtype=torch.float64)
    off = (truth * (1 + 1e-3)).float()
    assert "red" in parity.judge([off], [truth])
    assert parity.judge([off], [truth], narrowest=torch.bfloat16) == parity.GREEN
    assert parity.judge([off], [truth], tf32=True) == parity.GREEN
    assert "red" in parity.judge([(truth * 1.02).float()], [truth], tf32=True)


def test_the_oracle_of_attention_is_the_tests_own():
    """Two oracles that were written apart: by windows in torch, token by token in NumPy."""
    for S, P, W, H, D in ((3, 4, 2, 2, 8), (5, 1, 3, 1, 8), (6, 2, 1, 3, 4)):
        shape = AttentionShape("toy", "first", S * P * W, W, P, H, D)
        qkv = torch.randn(2, shape.N, 3 * shape.C, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(2, shape.N // P, shape.C, dtype=torch.float64)
        out = attention.oracle(qkv, shape)
        out.backward(grad)
        wanted = attention_oracle.attention(qkv.detach().numpy(), H, W, P, None)[0]
        wanted_grad = attention_oracle.attention_backward(grad.numpy(), qkv.detach().numpy(), H, W, P, None, "first")
        assert torch.allclose(out, torch.from_numpy(wanted), rtol=0, atol=1e-12)
        assert torch.allclose(qkv.grad, torch.from_numpy(wanted_grad), rtol=0, atol=1e-12)


def test_the_oracle_of_windows_is_attention_over_listed_tokens():
    """One query at a time, in a window that overhangs at both ends."""
    shape = WindowShape("toy", "", 6, 10, 2, 4, 4, 2)
    qkv, pad = torch.randn(2, 6, 10, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    out = attention.window_oracle(qkv, pad, shape)
    assert out.shape == (2, 3, 5, 8)
    for b, i, j, h in ((0, 0, 0, 0), (1, 2, 4, 1), (1, 1, 2, 0), (0, 2, 3, 1)):
        top, left = 2 * i // 4 * 4, 2 * j // 4 * 4
        tokens = [
            qkv[b, y, x] if y < 6 and x < 10 else pad
            for y, x in itertools.product(range(top, top + 4), range(left, left + 4))
        ]
        k, v = (torch.stack([t[8 * part + 4 * h : 8 * part + 4 * h + 4] for t in tokens]) for part in (1, 2))
        q = qkv[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 4 * h : 4 * h + 4].amax((0, 1))
        wanted = torch.softmax(k @ q / 2, 0) @ v
        assert torch.allclose(out[b, i, j, 4 * h : 4 * h + 4], wanted, rtol=0, atol=1e-12)


def test_the_oracle_of_token_order_is_the_tests_own():
    for size, strides in (((8, 12), ((2, 2), (2, 2))), ((2, 4, 6), ((1, 2, 2),))):
        x = torch.arange(torch.tensor(size).prod()).view(1, -1, 1)
        number = token_order.unrolled_number(size, strides, CPU)
        assert (x[:, number.argsort()].numpy() == unrolled(x.numpy(), size, strides)).all()


@pytest.mark.parametrize("op", list(spots.operations()))
def test_every_candidate_of_every_op_is_right_at_awkward_shapes(op):
    """Ours and all rivals that need no GPU and no compiler, forward and backward."""
    for label, made in list(spots.spots(op, CPU))[:2]:
        for name, answers in trial.verdicts(made, ("forward", "backward")).items():
            assert answers == dict.fromkeys(answers, (parity.GREEN, None)), (label, name)
            assert set(answers) == {"forward", "backward"}


def wrong_case(monkeypatch, spoil):
    """The benchmark of gelu with a candidate that is wrong."""
    shape = AttentionShape("toy", "stage1", 12, 1, 1, 1, 8, C_in=8)

    def build(device):
        made = rows.gelu_trial(shape, 3, torch.float32, False, device)
        made.candidates["rival"] = lambda x: spoil(torch.nn.functional.gelu(x))
        return made

    case = trial.Case("gelu", "toy.stage1", 3, torch.float32, build)
    monkeypatch.setitem(ops.OPS, "gelu", lambda *_: [case])


def test_a_red_speed_is_refused(monkeypatch, tmp_path, capsys):
    wrong_case(monkeypatch, lambda x: torch.cat([x[:-1], x[-1:] * 1.5]))
    monkeypatch.setattr(ops, "ceilings", lambda device: {"copy_gb_per_s": 10.0})
    path = tmp_path / "ops.json"
    assert ops.main(["gelu", "--quick", "--seconds", "0.001", "--json", str(path), "--commit", "abc"]) == 1
    found = {(r["candidate"], r["pass"]): r for r in json.loads(path.read_text())["results"]}
    for name in ("forward", "backward"):
        assert found["rival", name]["parity"].startswith("red")
        assert found["rival", name]["median_us"] is None
        assert found["hiera_kernels", name]["parity"] == "green"
        assert found["hiera_kernels", name]["median_us"] > 0
    assert "REFUSED  gelu" in capsys.readouterr().out


def test_a_wrong_gradient_is_refused_where_the_result_is_right(monkeypatch, tmp_path):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    wrong_case(monkeypatch, Half.apply)
    monkeypatch.setattr(ops, "ceilings", lambda device: {"copy_gb_per_s": 10.0})
    path = tmp_path / "ops.json"
    arguments = ["gelu", "--quick", "--pass", "forward", "both", "--seconds", "0.001", "--json", str(path)]
    assert ops.main(arguments) == 1
    found = {(r["candidate"], r["pass"]): r for r in json.loads(path.read_text())["results"]}
    assert found["rival", "forward"]["parity"] == "green"
    assert found["rival", "forward"]["median_us"] > 0
    assert found["rival", "both"]["parity"].startswith("red")
    assert found["rival", "both"]["median_us"] is None


def test_a_rival_that_cannot_run_says_why_and_does_no_harm(monkeypatch, tmp_path):
    def spoil(x):
        raise RuntimeError("No available kernel")

    wrong_case(monkeypatch, spoil)
    monkeypatch.setattr(ops, "ceilings", lambda device: {"copy_gb_per_s": 10.0})
    path = tmp_path / "ops.json"
    assert ops.main(["gelu", "--quick", "--seconds", "0.001", "--json", str(path)]) == 0
    found = {(r["candidate"], r["pass"]): r for r in json.loads(path.read_text())["results"]}
    assert found["rival", "forward"]["error"] == "RuntimeError: No available kernel"
    assert found["rival", "forward"]["parity"] == "not compared"


def test_memory_that_nobody_writes_is_not_right():
    """The allocator hands out again what an earlier call has left; spoiled, it cannot pass for a result."""
    shape = TokenShape("toy", 2, (4, 4), ((2, 2),), 3, torch.float32, None)
    made = token_order.move_trial("unroll", shape, CPU)
    memory = {}

    def lazy(x):  # writes its result once, and then relies on what is there
        if "out" not in memory:
            memory["out"] = made.candidates["single_permute"](x)
        return memory["out"]

    lazily = trial.Trial(made.make, {"lazy": lazy}, made.oracle, made.bytes, exact=True, per_sample=True)
    assert trial.verdicts(lazily, ("forward",))["lazy"]["forward"][0].startswith("red")


def test_spoiling_harms_no_input():
    x = torch.ones(4, 3)
    view, fresh, wide = x[1:], torch.ones(2), torch.ones(1).expand(5)
    parity.spoil([view, fresh, wide, torch.arange(3)], [x, None])
    assert x.equal(torch.ones(4, 3))
    assert fresh.isnan().all()
    assert wide.equal(torch.ones(5))

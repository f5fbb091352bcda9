"""`python -m benchmarks.ops`: which cases there are, what a row holds, and what the command line refuses."""

import argparse
import json

import pytest
import torch

from benchmarks import machine, measured, ops, spots, timing, trial
from benchmarks.trial import Case

CPU = torch.device("cpu")
# What benchmarks/results/README.md promises, and what benchmarks/report.py has read from the first results on.
KEYS = {"op", "case", "candidate", "bytes", "rounds", "median_us", "p20_us", "p80_us", "gb_per_s", "of_clone"}
KEYS |= {"pass", "dtype", "graph", "peak_memory_bytes", "parity", "error", "shape", "batch", "of_copy"}


def choice(**given):
    return argparse.Namespace(**{"shape": None, "batch": None, "dtypes": [], "compile": False, "quick": False, **given})


@pytest.mark.parametrize("op", ["mask_unit_attention", "add_layer_norm", "embed_tokens"])
def test_a_row_for_each_candidate_and_pass(op):
    label, made = next(spots.spots(op, CPU))
    case = Case(op, label, 3, torch.bfloat16, lambda device: made)
    found = measured.measure(case, CPU, ("forward", "backward", "both"), 0.0, 10.0, rounds=(2, 2), cold_bytes=1)
    names = [*made.candidates, "clone"]
    assert [(r["candidate"], r["pass"]) for r in found] == [
        (c, p) for p in ("forward", "backward", "both") for c in names
    ]
    assert all(set(r) == KEYS for r in found)
    assert len({(r["op"], r["case"], r["candidate"]) for r in found}) == len(found)
    for row in found:
        assert row["parity"] == (None if row["candidate"] == "clone" else "green")
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 10)
    clones = [r for r in found if r["candidate"] == "clone"]
    assert [r["of_clone"] for r in clones] == [1.0] * 3
    assert clones[2]["bytes"] == clones[0]["bytes"] + clones[1]["bytes"]


class Eager:
    """What timing.Captured does, without CUDA graphs."""

    def __init__(self, call, count, before=None):
        self.call, self.count, self.before = call, count, before

    def __call__(self):
        for i in range(self.count):
            self.call(i, self.before(i)) if self.before else self.call(i)


def test_graphs_have_rows_of_their_own(monkeypatch):
    """The branch that a GPU takes, its graphs apart: paired with a clone, and refused where the eager call was."""
    monkeypatch.setattr(timing, "Captured", Eager)
    monkeypatch.setattr(measured, "HELD_BYTES", 1)
    monkeypatch.setattr(measured, "_peak", lambda call, device: 7 if call() is not None else 0)
    _, made = next(spots.spots("gelu", CPU))
    made.candidates["wrong"] = lambda x: x * 2
    found = trial.verdicts(made, ("forward", "backward"))
    case = Case("gelu", "toy", 5, torch.bfloat16, lambda device: made)
    inputs = timing.rotate(made.make, 1)
    for name in ("forward", "backward", "both"):
        rows = measured._rows_of_pass(case, made, name, found, inputs, CPU, 0.0, 10.0, (2, 2), True)
        assert [(r["candidate"], r["graph"]) for r in rows] == [
            *((c, False) for c in ("hiera_kernels", "eager", "wrong", "clone")),
            *((c, True) for c in ("hiera_kernels", "eager", "clone")),
        ]
        assert all(r["median_us"] > 0 for r in rows if r["candidate"] != "wrong")
        assert all(r["peak_memory_bytes"] == 7 for r in rows if r["candidate"] != "wrong")
        assert len({r["case"] for r in rows}) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_cases_and_every_case_a_name_of_its_own(device):
    for op, cases in ops.OPS.items():
        found = cases(op, torch.device(device), choice())
        assert found
        assert len({case.label for case in found}) == len(found), op
        quick = cases(op, torch.device(device), choice(quick=True))
        assert {case.label for case in quick} <= {case.label for case in found}


def test_the_most_important_cases_come_first():
    options = choice()
    found = {op: cases(op, torch.device("cuda"), options) for op, cases in ops.OPS.items()}
    ordered = ops.most_important_first(found)
    assert len(ordered) == sum(map(len, found.values()))
    assert [case.op for case in ordered[: len(found)]] == list(found)
    assert ordered[0].label == "hiera_base_224.stage1 b128 bfloat16"


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("mask_unit_attention", "mae_hiera_base_16x224.stage3"),
        ("window_attention", "sam2_b+_1024.stage3"),
        ("linear_q_pool", "hiera_huge_224.stage2.first"),
        ("unroll", "hiera_tiny_224"),
    ],
)
def test_any_shape_can_be_named(op, shape):
    (case,) = ops.OPS[op](op, CPU, choice(shape=shape, batch=3, dtypes=[torch.float16]))
    assert case.label == f"{shape} b3 float16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no such op: nothing; there are mask_unit_attention"),
        (["gelu", "--shape", "hiera_bass_224.stage1"], "did you mean hiera_base_224"),
        (["gelu", "--shape", "hiera_base_224.stage7"], "hiera_base_224.stage1"),
        (["q_pool", "--shape", "hiera_base_224.stage1"], "a shape that pools"),
        (["unroll", "--shape", "hiera_base_224.stage1"], "belongs to a whole model"),
        (["--shape", "hiera_base_224.stage1"], "needs the ops"),
        (["gelu", "--only", "no case at all"], "no case holds"),
        (["gelu", "--dtype", "bfloat16", "--tf32"], "--dtype float32"),
    ],
)
def test_what_does_not_exist_is_refused_in_words(arguments, words, capsys):
    with pytest.raises(SystemExit):
        ops.main(arguments)
    assert words in capsys.readouterr().err


def test_what_does_not_fit_the_budget_is_listed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "ceilings", lambda device: {"copy_gb_per_s": 10.0})
    path = tmp_path / "a" / "ops.json"
    assert ops.main(["gelu", "q_pool", "--quick", "--seconds-budget", "-1", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["results"] == []
    assert content["left_out"] == [
        "gelu hiera_base_224.stage1 b4 float32",
        "q_pool hiera_base_224.stage2.first b4 float32",
    ]
    assert content["environment"]["commit"]
    assert "left out, the time was up: gelu" in capsys.readouterr().out


def test_a_case_that_cannot_be_set_up_leaves_the_others_alone(monkeypatch, tmp_path):
    def build(device):
        raise MemoryError("too large")

    label, made = next(spots.spots("unroll", CPU))
    cases = [
        Case("gelu", "x", 1, torch.float32, build),
        Case("unroll", label, 3, torch.bfloat16, lambda device: made),
    ]
    monkeypatch.setattr(ops, "ceilings", lambda device: {"copy_gb_per_s": 10.0})
    path = tmp_path / "ops.json"
    options = ops._parser().parse_args(["--quick", "--seconds", "0.001", "--json", str(path)])
    assert ops.run(cases, CPU, options) == 1
    found = json.loads(path.read_text())["results"]
    assert found[0]["error"] == "MemoryError: too large"
    assert found[0]["median_us"] is None
    assert found[1]["median_us"] > 0
    assert "too large" in ops.tables(found[:1])


def test_inputs_take_turns_in_memory_of_their_own():
    def make():
        return torch.randn(2, 3, 4).transpose(1, 2).requires_grad_(), None, torch.arange(3)

    turns = timing.rotate(make, cold_bytes=2000)
    assert len(turns) == timing.sets(turns[0], 2000) == 18  # 120 bytes each: 17 do not fit into 2000, and one more
    assert len({one[0].data_ptr() for one in turns}) == len(turns)
    for one in turns:
        assert one[0].stride() == turns[0][0].stride()
        assert one[0].equal(turns[0][0])
        assert one[0].requires_grad
        assert one[0].is_leaf
        assert one[1] is None


def test_the_speed_against_a_clone_is_of_pairs():
    slow, fast = timing.Samples([2.0, 4.0, 8.0]), timing.Samples([1.0, 2.0, 2.0])
    assert slow.speed_of(fast) == 0.5
    assert timing.per_call(slow, 4).seconds == [0.5, 1.0, 2.0]


def test_a_second_run_keeps_the_tables_that_it_does_not_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "ceilings", lambda device: {"copy_gb_per_s": 10.0})
    label, made = next(spots.spots("unroll", CPU))
    case = Case("unroll", label, 3, torch.bfloat16, lambda device: made)
    path = tmp_path / "ops.json"

    def run(commit):
        words = ["--quick", "--seconds", "0.001", "--pass", "forward", "--json", str(path), "--update"]
        ops.run([case], CPU, ops._parser().parse_args([*words, "--commit", commit]))
        return json.loads(path.read_text())["results"]

    assert len(run("abc")) == 4
    content = json.loads(path.read_text())
    content["results"].append({"op": "gelu", "case": "earlier", "candidate": "x", "parity": None, "error": None})
    path.write_text(json.dumps(content))
    again = run("abc")
    assert len(again) == 5
    assert again[0]["case"] == "earlier"
    assert len(run("another")) == 4  # numbers of another commit are not mixed in


def test_tf32_by_a_switch_that_torch_compile_can_read():
    """Red with `torch.backends.cuda.matmul.fp32_precision = "tf32"`, after which the older switch raises."""
    try:
        for allowed in (True, False):
            machine.allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if allowed else "ieee")
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    finally:
        machine.allow_tf32(False)

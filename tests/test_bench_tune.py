"""Tuning without a GPU: what is tried is legal, the fastest is chosen, and the table reads back what was written.

That the kernels compute the same in every configuration: test_bench_tune_kernels.py.
"""

import ast
import json
import runpy

import pytest
import torch

from benchmarks import tune, tune_space, tune_table
from benchmarks.attention_shapes import AttentionShape
from benchmarks.tune_gpu import configured, plan
from benchmarks.tune_table import Row
from hiera_kernels.kernels import launch_table

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
KEY = ("forward", 16, 64, 72, 16, 9)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_everything_that_is_tried_is_legal(capability):
    """Checked against what the kernels need (their docstrings), for every kernel of the published models."""
    jobs = tune.work(None, "bfloat16", capability)
    assert {key[0] for key, _, _ in jobs} == {"forward", "backward", "backward_q", "backward_kv"}
    for key, _, _ in jobs:
        direction, S, K, D, _, _ = key
        tried = tune_space.candidates(key)
        assert tried[0] == tune_space.rule(key)._replace(**launch_table.TUNED.get(key, {}))
        assert tune_space.rule(key) in tried
        assert len(set(tried)) == len(tried)
        assert len(tried) > 3
        for tile in tried:
            numbers = (tile.block_s, tile.block_k, tile.d0, tile.pack, tile.num_warps)
            assert all(n & (n - 1) == 0 and n > 0 for n in numbers)
            assert tile.d0 + tile.d1 >= D
            assert min(tile.block_s, tile.block_k, tile.d0) >= 16
            assert tile.d1 == 0 or 16 <= tile.d1 < tile.d0
            if direction != "backward_kv":
                assert tile.block_k >= K
            if direction == "backward":
                assert tile.block_s >= tile.copies * S
                assert tile.copies in (1, K // S)
            else:
                assert tile.copies == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_s": 24}, "power of two"),
        ({"pack": 3}, "power of two"),
        ({"block_k": 32}, "must be whole"),
        ({"d0": 64, "d1": 0}, "do not make 72"),
        ({"d1": 8}, "16 rows and columns"),
        ({"copies": 4}, "copies"),
        ({"pack": 8, "block_s": 64}, "registers"),
    ],
)
def test_what_is_illegal_is_said_in_words(fields, words):
    assert words in tune_space.illegal(KEY, tune_space.rule(KEY)._replace(**fields))


def test_nothing_illegal_for_long_rows():
    assert "to themselves" in tune_space.illegal(
        ("forward", 196, 196, 96, 16, 9), launch_table.Tiles(64, 256, 64, 32, pack=2)
    )


def test_a_configuration_holds_for_its_key_and_for_a_while():
    qkv, grad = torch.empty(2, 64 * 3, 3 * 72, device="meta"), torch.empty(2, 16 * 3, 72, device="meta")
    shape = AttentionShape("toy", "", 64 * 3, 3, 4, 1, 72)
    before = dict(launch_table.TUNED)
    key = ("forward", 16, 64, 72, 32, 9)
    with configured(key, tune_space.rule(key)._replace(num_warps=8, rounds=1)):
        (launch,), which, _ = plan(key, shape, qkv, grad, (9, 0))
        assert (launch.num_warps, launch.constexprs["ROUNDS"], which) == (8, 1, 0)
        (launch,), _, _ = plan(("backward", *key[1:]), shape, qkv, grad, (9, 0))
        assert launch.num_warps == tune_space.rule(("backward", *key[1:])).num_warps
    assert before == launch_table.TUNED


# ---- the choice ----


def test_the_fastest_is_chosen():
    tiles = tune_space.candidates(KEY)
    clock = {tile: (1e-6 * (10 + i), None) for i, tile in enumerate(tiles)}
    fastest = tiles[7]
    clock[fastest] = 4e-6, None
    clock[tiles[3]] = None, "12 spilled registers"
    row, record = tune.tune(KEY, clock.__getitem__, tiles)
    assert tune_space.rule(KEY)._replace(**row.fields) == fastest
    assert record["best"] == fastest._asdict()
    assert record["us"][0] == pytest.approx([4.0, *fastest])
    assert record["refused"] == [["12 spilled registers", *tiles[3]]]
    assert row.comment == f"4.0 us, before 10.0 us, {len(tiles) - 1} tried"


def test_the_rules_stay_unless_they_are_beaten_clearly():
    own, other = tune_space.candidates(KEY)[:2]
    assert tune.choose({own: 1.00, other: 0.99}, own) == own
    assert tune.choose({own: 1.00, other: 0.97}, own) == other
    assert tune.choose({other: 5.0}, own) == other  # the rules' own were refused
    assert tune.choose({}, own) == own
    _, record = tune.tune(KEY, lambda tile: (1.0, None), [own, other])
    assert record["best"] == record["before"] == own._asdict()


def test_a_row_says_how_it_differs_from_the_rules(monkeypatch):
    """Also where the table has a row already: the new one takes its place."""
    rule = tune_space.rule(KEY)
    monkeypatch.setitem(launch_table.TUNED, KEY, {"num_warps": 2 * rule.num_warps})
    tiles = tune_space.candidates(KEY)
    assert tiles[0] == rule._replace(num_warps=2 * rule.num_warps)
    row, _ = tune.tune(KEY, lambda tile: (1.0 if tile == rule else 2.0, None), tiles)
    assert row.fields == {}  # back to the rules: the row goes
    best = next(tile for tile in tiles if tile.rounds == 4)
    row, _ = tune.tune(KEY, lambda tile: (1.0 if tile == best else 2.0, None), tiles)
    assert rule._replace(**row.fields) == best


def test_when_time_is_up_the_rest_stays_untried():
    tiles = tune_space.candidates(KEY)
    row, record = tune.tune(KEY, lambda tile: (1.0, None), tiles, deadline=-1.0)
    assert record["untried"] == len(tiles) - 1
    assert row.fields == {}


# ---- the table ----


def tuned_in(path):
    return runpy.run_path(str(path))["TUNED"]


OLD = ("backward", 16, 64, 72, 16, 10)
SOURCE = """X = 1
# About the table.
TUNED: dict = {
    # One GPU, 5 us
    ("backward", 64, 64, 72, 16, 8): {"rounds": 4},
    ("backward", 16, 64, 72, 16, 10): {"rounds": 4},  # with 2, ptxas spills one
}
Y = 2
"""


def test_the_table_reads_back_what_was_written(tmp_path):
    path = tmp_path / "launch_table.py"
    path.write_text(SOURCE)
    before = tuned_in(path)
    new = ("backward_kv", 196, 196, 96, 16, 9)
    tune_table.write(path, {KEY: Row({"num_warps": 8, "rounds": 1}, "GPU, 4 us"), new: Row({"num_stages": 2}, "GPU")})
    assert tuned_in(path) == {**before, KEY: {"num_warps": 8, "rounds": 1}, new: {"num_stages": 2}}
    once = path.read_text()
    assert set(SOURCE.splitlines()) <= set(once.splitlines())  # rows of others stay, with their comments
    tune_table.write(path, {})
    assert path.read_text() == once
    # Replaced in place with its comment, removed with its comment where the rules are the best.
    tune_table.write(path, {KEY: Row({"pack": 2}, "GPU, 3 us"), new: Row({}, "the rules")})
    assert tuned_in(path) == {**before, KEY: {"pack": 2}}
    assert "GPU, 4 us" not in path.read_text()
    assert path.read_text().count("# GPU, 3 us") == 1
    tune_table.write(path, {OLD: Row({}, ""), KEY: Row({}, "")})
    assert path.read_text() == "".join(line for line in SOURCE.splitlines(keepends=True) if "spills one" not in line)


def test_the_packages_own_table_can_be_rewritten(tmp_path):
    path = tmp_path / "launch_table.py"
    tune_table.write(path, {KEY: Row({"num_warps": 8}, "GPU")})
    assert tuned_in(path) == {**launch_table.TUNED, KEY: {"num_warps": 8}}
    assert set(tune_table.TABLE.read_text().splitlines()) <= set(path.read_text().splitlines())


def test_an_empty_table_and_a_foreign_file(tmp_path):
    source = "X = 1\nTUNED: dict = {}\nY = 2\n"
    written = tune_table.rewritten(source, {KEY: Row({"pack": 2}, "GPU")})
    names = {}
    exec(written, names)
    assert (names["TUNED"], names["X"], names["Y"]) == ({KEY: {"pack": 2}}, 1, 2)
    with pytest.raises(ValueError, match="no dictionary TUNED"):
        tune_table.rewritten("X = 1\n", {})


def test_a_written_table_is_formatted(tmp_path):
    lines = tune_table.line(KEY, Row({"num_warps": 8}, "NVIDIA H100 80GB HBM3, hiera_base_224.stage1 b128: 4.0 us"))
    assert ast.literal_eval("{" + lines[1] + "}") == {KEY: {"num_warps": 8}}
    assert max(map(len, lines)) <= 120


# ---- the command line ----


def test_a_whole_session_writes_rows_and_records(monkeypatch, tmp_path, capsys):
    """As on a GPU, with a clock and a compiler that are made up; a kernel whose table is wrong gets no row."""

    class Clock:
        def __init__(self, key, shape, batch, dtype, own, capability, device):
            if key[0] == "backward_q":
                raise RuntimeError("as the table has it: red")

        def __call__(self, tile):
            return (1e-6, None) if tile.block_k == 32 else (9e-6, None)

    def ahead(key, shape, tiles, capability, dtype, jobs):
        return {tile: "ptxas died" if tile.num_warps == 1 else None for tile in tiles}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "environment", lambda device: {"gpu": "Some GPU"})
    monkeypatch.setattr("benchmarks.tune_gpu.Bench", Clock)
    monkeypatch.setattr("benchmarks.tune_gpu.ahead", ahead)
    table, record = tmp_path / "launch_table.py", tmp_path / "tune.json"
    arguments = ["mask_unit_attention", "--tune", "--shape", "hiera_base_224.stage3", "--most", "999", "--jobs", "1"]
    assert tune.main([*arguments, "--write", str(table), "--json", str(record)]) == 1
    said = capsys.readouterr().out
    assert "REFUSED: as the table has it: red" in said
    added = {key: value for key, value in tuned_in(table).items() if key not in launch_table.TUNED}
    assert set(added) <= {("forward", 196, 196, 96, 16, 9), ("backward_kv", 196, 196, 96, 16, 9)}
    assert added["backward_kv", 196, 196, 96, 16, 9]["block_k"] == 32
    assert "# Some GPU, hiera_base_224.stage3 b128: 1.0 us, before 9.0 us" in table.read_text()
    content = json.loads(record.read_text())
    assert [r["key"][0] for r in content["results"]] == ["forward", "backward_kv"]
    assert all(reason == "ptxas died" for r in content["results"] for reason, *_ in r["not_compiled"])
    # A Triton that cannot compile ahead compiles when it launches.
    monkeypatch.setattr(
        "benchmarks.tune_gpu.ahead", lambda key, shape, tiles, *rest: dict.fromkeys(tiles, "no attribute")
    )
    tune.main([*arguments, "--json", str(record)])
    untried = json.loads(record.read_text())["results"][1]
    assert len(untried["us"]) == len(tune_space.candidates(tuple(untried["key"])))


def test_a_dry_run_lists_and_needs_no_gpu(capsys):
    assert tune.main(["mask_unit_attention", "--tune", "--dry-run", "--arch", "sm_80"]) == 0
    listed = capsys.readouterr().out
    assert "('backward_kv', 49, 196, 96, 16, 8)" in listed
    with pytest.raises(SystemExit):
        tune.main(["mask_unit_attention", "--tune", "--shape", "mae_hiera_base_16x224.decoder", "--dry-run"])
    assert "up to 256 keys" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_refused_in_words(capsys):
    with pytest.raises(SystemExit):
        tune.main(["mask_unit_attention", "--tune"])
    assert "--dry-run --arch sm_90" in capsys.readouterr().err


def test_a_dry_run_compiles_for_a_gpu_that_is_not_there(capsys):
    arguments = ["--dry-run", "--arch", "sm_90", "--compile", "--most", "2", "--jobs", "1"]
    assert tune.main(["mask_unit_attention", "--tune", "--shape", "hiera_tiny_224.stage3.first", *arguments]) == 0
    assert capsys.readouterr().out.count("2 of 2 compile") == 2

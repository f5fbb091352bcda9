"""README and docs/results.md say what the results files hold, and every number has a machine and a commit."""

import json

import pytest

from benchmarks import report, report_ops, report_plots, report_steps

CPU = {"device": "cpu", "cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "commit": "abcdef0123456789"}
GPU = {**CPU, "device": "cuda", "gpu": "Some GPU", "driver": "570.1", "triton": "3.6.0"}
CASE = "hiera_base_224 fine-tune b128"


def write(folder, name, environment, rows, **more):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(json.dumps({"environment": environment, "results": rows, **more}))


def op_rows(case="a", moved=20_000_000, ours=100.0, of_clone=0.5, op="unroll", **more):
    return [
        {"op": op, "case": case, "candidate": name, "bytes": moved, "median_us": us, "of_clone": of_clone, **more}
        for name, us in (("hiera_kernels", ours), ("clone", 50.0), ("single_permute", 150.0), ("upstream_chain", 400.0))
    ]


def step_row(candidate, mode, ms, **more):
    row = {"case": CASE, "dtype": "autocast-bfloat16", "candidate": candidate, "mode": mode, "ms": ms, "error": None}
    return {**row, "parity": "green", "peak_memory_bytes": 10_000_000_000, "settings": {}, **more}


def prediction(candidate, ms, saved, dtype="autocast-bfloat16", case=CASE, **settings):
    group = {"ms": {"h100": ms}, "bytes": 128_000_000, "flops": 0, "launches": 3, "saved_bytes": saved}
    row = {"case": case, "dtype": dtype, "candidate": candidate, "settings": settings, "images": 128}
    row |= {"ms": {"h100": ms}, "saved_bytes": saved, "stages": {"stage1": group}, "kinds": {"GEMM": group}}
    return {**row, "blocks": {"blocks.0": {"saved_bytes": saved}}}


SPECS = {"h100": {"bandwidth_gb_per_s": 3000, "tensor_tflops": 700, "fp32_tflops": 50}}
PREDICTIONS = [
    prediction("stock", 80.0, 128 * 100_000_000),
    prediction("folded", 48.0, 128 * 90_000_000),
    prediction("accelerated", 32.0, 128 * 45_000_000),
    prediction("stock", 60.0, 128 * 50_000_000, case="trunk"),  # which has no folded rival
    prediction("accelerated", 40.0, 128 * 25_000_000, case="trunk"),
]


@pytest.fixture
def results(tmp_path):
    write(tmp_path / "predicted", "steps.json", {"commit": "0123456789abcdef"}, PREDICTIONS, specs=SPECS)
    return tmp_path


def test_the_documents_and_the_results_agree():
    assert report.main(["--check"]) == 0


def test_a_table_says_what_the_file_says(results):
    write(results / "some-machine", "ops.json", CPU, op_rows())
    table = report_ops.token_order_tables(results)
    assert "| `unroll` | a | 100 us | 20.0 MB | 50% | 1.5x as long | 4.0x as long |" in table
    assert "Some CPU, 2 threads, torch 2.13.0, commit abcdef012345;" in table


def test_the_short_table_has_the_best_and_the_worst_of_the_large_tensors(results):
    rows = [row for i, speed in enumerate((0.9, 0.4, 0.7)) for row in op_rows(f"large {i}", of_clone=speed)]
    write(results / "some-machine", "ops.json", CPU, rows + op_rows("small", moved=1000, of_clone=0.1))
    table = report_ops.token_order_extremes(results)
    assert "| large 0 | 90% |" in table
    assert "| large 1 | 40% |" in table
    assert "large 2" not in table
    assert "small" not in table


def test_bandwidth_on_a_gpu_is_by_op_pass_and_way_of_launching(results):
    rows = [
        row
        for i, speed in enumerate((0.8, 0.95, 0.9))
        for graph in (False, True)
        for row in op_rows(f"{i} {graph}", op="gelu", of_clone=speed, graph=graph, **{"pass": "backward"})
    ]
    refused = op_rows("red", op="gelu", of_clone=None, **{"pass": "backward"})
    refused[0]["median_us"] = None
    write(results / "some-gpu", "ops.json", GPU, rows + refused)
    table = report_ops.bandwidth_table(results)
    assert "| `gelu` | backward, CUDA graph | 90%, 80%, 95% | 1.5x as long | 3 |" in table
    assert "| `gelu` | backward | 90%, 80%, 95% | 1.5x as long | 3 |" in table
    assert "Some GPU, driver 570.1, torch 2.13.0, triton 3.6.0, commit abcdef012345" in table


@pytest.mark.parametrize("missing", ["commit", "cpu"])
def test_a_number_without_a_machine_or_a_commit_is_refused(results, missing):
    about = {key: value for key, value in CPU.items() if key != missing}
    write(results / "some-machine", "ops.json", about, op_rows())
    write(results / "some-machine", "model.json", about, [step_row("stock", "eager", 1.0)])
    for make in (report_ops.token_order_tables, report_ops.bandwidth_table, report_steps.measured_steps):
        with pytest.raises(ValueError, match="machine and the commit"):
            make(results)


def test_a_prediction_without_a_commit_is_refused(results):
    write(results / "predicted", "steps.json", {"commit": ""}, PREDICTIONS, specs=SPECS)
    with pytest.raises(ValueError, match="commit"):
        report_steps.steps(results)


def test_without_a_gpu_there_is_a_prediction_and_it_is_called_one(results):
    table = report_steps.steps(results)
    assert table.startswith("Not measured on a GPU yet.")
    assert f"| {CASE} | 80.0 ms | 48.0 ms | 32.0 ms | 2.50x | 1.50x | 100, 90, 45 (0.45x) |" in table
    assert "| trunk | 60.0 ms | - | 40.0 ms | 1.50x | - | 50, 25 (0.50x) |" in table
    assert "**Predicted, not measured**" in table
    assert "commit 0123456789ab" in table


def test_a_measurement_is_compared_with_stock_the_best_peer_and_the_prediction(results):
    rows = [
        step_row("stock", "eager", 88.0, peak_memory_bytes=40_000_000_000),
        step_row("folded", "compile", 44.0, peak_memory_bytes=20_000_000_000),
        step_row("timm", "max-autotune", None, error="out of memory", parity="not compared"),
        step_row("accelerated", "eager", 33.0),
        step_row("accelerated", "cuda-graph", 22.0),
        step_row("vit_base_patch16_224", "compile", 11.0),  # of the zoo: no peer
    ]
    write(results / "some-gpu", "model.json", GPU, rows)
    table = report_steps.measured_steps(results)
    assert (
        f"| {CASE}, autocast-bfloat16 | 88.0 ms | 44.0 ms (folded, compile) | 22.0 ms (accelerated, cuda-graph) "
        "| 4.00x | 2.00x | 40.0, 20.0, 10.0 GB | green | stock 1.10, accelerated 1.03 |" in table
    )
    assert "Not measured" not in report_steps.steps(results)


def test_a_red_parity_is_shown(results):
    rows = [step_row("stock", "eager", 88.0), step_row("accelerated", "eager", 33.0)]
    rows.append(step_row("accelerated", "compile", None, parity="red", error="differs"))
    write(results / "some-gpu", "model.json", GPU, rows)
    assert "| green, red |" in report_steps.measured_steps(results)


def test_memory_by_setting(results):
    rows = [prediction("accelerated", 30.0, 128 * 20_000_000, recompute="block")]
    write(results / "predicted", "recompute.json", {"commit": "0123456789abcdef"}, rows, specs=SPECS)
    table = report_steps.saved_memory(results)
    assert f"| {CASE}, autocast | 100 | 90 | 45 | 0.45x |" in table
    assert f"| {CASE}, autocast, recompute=block | 100 | 90 | 20 | 0.20x |" in table


def test_no_results_are_said_to_be_none(tmp_path):
    assert report_ops.token_order_tables(tmp_path) == "Not measured yet.\n"
    assert report_ops.token_order_extremes(tmp_path) == "Not measured yet.\n"
    for make in report.BLOCKS.values():
        assert make(tmp_path).startswith("Not ")


def test_the_check_sees_a_typed_number(tmp_path, monkeypatch, capsys):
    tables = {name: make(report.RESULTS) for name, make in report.BLOCKS.items()}
    readme = report.README.read_text()
    assert report.updated(readme, tables) == readme
    assert report.updated(readme, {**tables, "training steps": "| 1 |\n"}) != readme
    with pytest.raises(ValueError, match="must hold the markers"):
        report.updated("no markers", tables)
    with pytest.raises(ValueError, match="nonsense"):
        report.updated("<!-- results: nonsense -->\n<!-- end of results -->", tables)
    typed = tmp_path / "results.md"
    typed.write_text(report.DOCUMENT.read_text().replace("1.", "2.", 1))
    monkeypatch.setattr(report, "DOCUMENT", typed)
    assert report.main(["--check"]) == 1
    assert "docs/results.md" in capsys.readouterr().out


def test_everything_is_drawn_that_there_are_results_for(results):
    write(results / "some-gpu", "ops.json", GPU, op_rows(op="gelu", **{"pass": "forward"}))
    rows = [step_row("stock", "eager", 88.0), step_row("accelerated", "eager", 33.0)]
    write(results / "some-gpu", "model.json", GPU, rows)
    scaling = [
        {**row, "varies": varies, "batch": 8 * n, "size": [224 * n] * 2}
        for row in PREDICTIONS
        for varies in ("resolution", "batch")
        for n in (1, 2, 4)
    ]
    write(results / "predicted", "scaling.json", {"commit": "0123456789abcdef"}, scaling, specs=SPECS)
    made = report_plots.draw(results, results / "plots")
    assert set(made) == {path.name for path in (results / "plots").glob("*.png")}
    assert {name.partition("-")[0] for name in made} == {"predicted", "speed", "memory", "bandwidth"}
    assert {"predicted-resolution.png", "predicted-batch.png"} <= set(made)
    shown = report.document(results, made)
    assert report.captions_in(shown) == made

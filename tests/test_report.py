"""The README's numbers are those of the results files, and every one has a machine and a commit."""

import json

import pytest

from benchmarks import report


def test_readme_and_results_agree():
    assert report.main(["--check"]) == 0


@pytest.fixture
def results(tmp_path):
    def write(**environment):
        folder = tmp_path / "some-machine"
        folder.mkdir(exist_ok=True)
        rows = [
            {"op": "unroll", "case": "a", "candidate": name, "bytes": 2_000_000, "median_us": us, "of_clone": 0.5}
            for name, us in (("hiera_kernels", 100.0), ("single_permute", 150.0), ("upstream_chain", 400.0))
        ]
        (folder / "ops.json").write_text(json.dumps({"environment": environment, "results": rows}))
        return tmp_path

    return write


def test_a_table_says_what_the_file_says(results):
    table = report.op_tables(
        results(device="cpu", cpu="Some CPU", threads=2, torch="2.13.0", commit="abcdef0123456789")
    )
    assert "| `unroll` | a | 100 us | 2.0 MB | 50% | 1.5x as long | 4.0x as long |" in table
    assert "Some CPU, 2 threads, torch 2.13.0, commit abcdef012345;" in table


def test_a_number_without_a_commit_is_refused(results):
    with pytest.raises(ValueError, match="commit"):
        report.op_tables(results(device="cpu", cpu="Some CPU", threads=2, torch="2.13.0"))


def test_no_results_are_said_to_be_none(tmp_path):
    assert report.op_tables(tmp_path) == "Not measured yet.\n"


def test_the_check_sees_a_typed_number():
    readme = report.README.read_text()
    tables = report.op_tables()
    assert report.updated(readme, tables) == readme
    assert report.updated(readme, tables + "| 1 |\n") != readme
    with pytest.raises(ValueError, match="markers"):
        report.updated("no markers", tables)

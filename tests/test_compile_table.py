"""The table of the compile gate, from a file written by hand."""

import json

import pytest

from benchmarks.compile_table import RESULTS, compile_table, family
from tests.gates.cases import jobs

ROWS = [
    ("forward_kernel", "bf16", "sm_90", 74, 0, 0, 36864, 0.7, []),
    ("forward_kernel lse", "fp16", "sm_90", 80, 0, 0, 20480, 1.25, []),
    ("forward_kernel", "bf16", "sm_100", 52, 0, 0, 1024, 0.5, []),
    ("forward_kernel", "fp32", "sm_90", 255, 512, 999, 2048, 3.0, []),
    ("window backward_kernel split", "bf16", "sm_100", 168, 8, 1, 1536, 2.0, ["8 bytes of stack"]),
    ("a_new_kernel", "bf16", "sm_90", 40, 0, 0, 0, 0.04, []),
]
NAMES = ("kernel", "dtype", "arch", "registers", "stack", "spills", "shared", "seconds", "refused")


def write(folder, rows):
    path = folder / "compile.json"
    kernels = [{"shape": "x", **dict(zip(NAMES, row, strict=True))} for row in rows]
    path.write_text(json.dumps({"triton": "3.7.1", "scope": "models", "kernels": kernels}))
    return path


def test_each_family_has_a_row_with_its_worst_numbers(tmp_path):
    """By hand: the larger of each column, architectures in numerical order, fp32 apart, a dash for what is missing."""
    assert compile_table(write(tmp_path, ROWS)).split("\n") == [
        "| kernels | variants | registers | stack, bytes | spills | shared, KiB | slowest to compile |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mask-unit attention, forward | 3 | 80 / 52 | 0 | 0 | 36 / 1 | 1.2 s |",
        "| mask-unit attention, forward (fp32) | 1 | 255 / - | 512 / - | 999 / - | 2 / - | 3.0 s |",
        "| window attention, backward, up to 64 keys | 1 | - / 168 | - / 8 | - / 1 | - / 2 | 2.0 s |",
        "| a new kernel | 1 | 40 / - | 0 / - | 0 / - | 0 / - | 0.0 s |",
        "",
        "The worst of each family on sm_90 / sm_100: 6 kernels, what published models launch, **1 refused**; "
        "Triton 3.7.1, processor time.",
        "",
    ]


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no kernels"):
        compile_table(write(tmp_path, []))


def test_the_gates_kernels_have_names_for_readers():
    assert not [label for job in jobs() if "_" in family(label := job.labels["kernel"])]


def test_the_committed_file_makes_a_table():
    text = compile_table(RESULTS)
    assert "none refused" in text
    assert text.count("\n|") >= 5

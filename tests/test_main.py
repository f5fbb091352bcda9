"""`python -m hiera_kernels`: true on this machine, and on machines that lack Triton, the extension or both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hiera_kernels import extension, ops, platform_report
from hiera_kernels.ops import calling
from tests.attention_kernels import oracle_kernels_on_cpu

ROOT = Path(__file__).parent.parent

# Runs the command in a process where some things are missing: {0} blocks the import of triton, {1} hides the library.
MISSING = """
import pathlib, runpy, sys
if {0}:
    sys.modules["triton"] = None
if {1}:
    exists = pathlib.Path.exists
    pathlib.Path.exists = lambda self, **k: False if self.name == "_C.abi3.so" else exists(self, **k)
sys.argv = ["hiera_kernels", *{2!r}]
runpy.run_module("hiera_kernels", run_name="__main__")
"""


def run(*arguments, triton=True, library=True, columns="120"):
    code = MISSING.format(not triton, not library, list(arguments))
    environment = os.environ | {"COLUMNS": columns, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def rows_of(report):
    return {(row["op"], row["device"]): row for row in report["ops"]}


def test_the_table_is_aligned_and_names_every_op_once_per_device():
    out = run()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    assert torch.__version__ in out
    header = next(line for line in lines if line.startswith("op "))
    column = header.index("why not faster")
    for op in platform_report.public_ops():
        mine = [line for line in lines if line.split()[:1] == [op]]
        assert [line.split()[1] for line in mine] == ["cpu", "cuda"]
        assert all(line[column - 2 : column].strip() == "" for line in mine)


def test_a_narrow_terminal_wraps_the_reasons():
    assert max(map(len, run(columns="80").splitlines())) <= 80


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("triton", [True, False])
def test_json_tells_what_is_there_and_what_is_missing(triton, library):
    report = json.loads(run("--json", triton=triton, library=library))
    assert report["versions"]["torch"] == torch.__version__
    assert report["gpus"] == []
    assert report["why_no_gpu"]
    assert (report["triton"]["why_not"] is None) == triton
    if not triton:
        assert "triton" in report["triton"]["why_not"]
    loaded = report["compiled_extension"]["cpu"]["why_not"] is None
    assert loaded == (library and extension.why_not("cpu") is None)
    rows = rows_of(report)
    assert set(rows) == {(op, device) for op in platform_report.public_ops() for device in ("cpu", "cuda")}
    for op in platform_report.COMPILED_OPS:
        row = rows[op, "cpu"]
        assert row["implementation"] == ("compiled C++/CUDA" if loaded else platform_report.REFERENCE)
        assert row["why_not_faster"] == report["compiled_extension"]["cpu"]["why_not"]
    for op in set(platform_report.public_ops()) - set(platform_report.COMPILED_OPS):
        assert rows[op, "cpu"]["implementation"] == platform_report.REFERENCE
        assert rows[op, "cpu"]["why_not_faster"]


def test_every_public_op_is_known_to_the_report():
    """Each has an op under its name, or names the op whose kernel does its work."""
    public = platform_report.public_ops()
    assert sorted([*public, "disabled"]) == sorted(ops.__all__)
    assert set(platform_report.COMPILED_OPS) <= set(public)
    for name in public:
        served_by = platform_report.SERVED_BY.get(name, name)
        assert hasattr(torch.ops.hiera_kernels, served_by), name
        assert served_by in public


def test_a_registered_kernel_shows_at_once():
    with oracle_kernels_on_cpu():
        rows = rows_of(platform_report.collect())
    assert rows["mask_unit_attention", "cpu"] == {
        "op": "mask_unit_attention",
        "device": "cpu",
        "implementation": "Triton kernel",
        "why_not_faster": None,
    }
    assert rows_of(platform_report.collect())["q_pool", "cpu"]["implementation"] == platform_report.REFERENCE


def test_a_machine_with_a_gpu_is_described(monkeypatch):
    """No GPU here: the properties that PyTorch would return are made up, the report's own code is not."""
    properties = type("Properties", (), {"name": "Made-up H9", "major": 9, "minor": 0, "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(calling, "has_kernel", lambda op, device: op == "reroll")
    report = platform_report.collect()
    rows = rows_of(report)
    assert rows["reroll_masked", "cuda"]["implementation"] == "compiled C++/CUDA"
    assert rows["unroll", "cuda"]["implementation"] == platform_report.REFERENCE
    assert rows["unroll", "cuda"]["why_not_faster"] == extension.why_not("cuda")
    assert "no Triton kernel for it" in rows["q_pool", "cuda"]["why_not_faster"]
    assert "Made-up H9, compute capability 9.0, 80.0 GiB" in platform_report.render(report)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "cannot be imported" in rows_of(platform_report.collect())["q_pool", "cuda"]["why_not_faster"]

"""The compile gate refuses bad kernels, each for its own reason, and passes good ones.

It judges the package's own kernels in `python -m tests.gates`, which `make test` runs; here it is itself on trial.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tests.gates import __main__ as command
from tests.gates import cases, compiled
from tests.gates.compiled import CAPABILITIES, Job, Measured, compile_all, compile_one, verdict


@triton.jit
def product(p_a, p_b, p_out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(p_b + o_k[:, None] * N + o_n[None, :])
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], tl.dot(b_a, b_b).to(p_out.dtype.element_ty))


@triton.jit
def product_of_rows(p_a, p_b, p_out, stride, M: tl.constexpr):
    """The row stride is a run-time number: unless it is known to be a multiple of 8, no load of 16 bytes is aligned."""
    o_m, o_k = tl.arange(0, M), tl.arange(0, M)
    b_a = tl.load(p_a + o_m[:, None] * stride + o_k[None, :])
    b_b = tl.load(p_b + o_m[:, None] * stride + o_k[None, :])
    tl.store(p_out + o_m[:, None] * M + o_k[None, :], tl.dot(b_a, b_b).to(p_out.dtype.element_ty))


@triton.jit
def product_without_dot(p_a, p_b, p_out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + o_m[:, None] * K + o_k[None, :]).to(tl.float32)
    b_b = tl.load(p_b + o_n[:, None] * K + o_k[None, :]).to(tl.float32)
    b_out = tl.sum(b_a[:, None, :] * b_b[None, :, :], 2)
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], b_out.to(p_out.dtype.element_ty))


@triton.jit
def nothing(p_a, p_out, LENGTH: tl.constexpr):
    o = tl.arange(0, LENGTH)
    tl.store(p_out + o, tl.load(p_a + o), mask=o < 0)


@triton.jit
def wrong_types(p_a, p_out, LENGTH: tl.constexpr):
    o = tl.arange(0, LENGTH)
    tl.store(p_out + o, tl.dot(tl.load(p_a + o), tl.load(p_a + o)))


def tensor(dtype=torch.bfloat16):
    return torch.empty(1, device="meta", dtype=dtype)


def launch(kernel, num_warps=4, dtype=torch.bfloat16, stride=None, **constexprs):
    names = [name for name in kernel.arg_names if name.startswith("p_")]
    arguments = {name: tensor(dtype) for name in names} | ({} if stride is None else {"stride": stride})
    return SimpleNamespace(
        kernel=kernel, arguments=arguments, constexprs=constexprs, num_warps=num_warps, num_stages=1, grid=(1,)
    )


def judged(capability, *arguments, strict=True, **keywords):
    job = Job(launch(*arguments, **keywords), capability, strict=strict)
    made = compile_one(job)
    return made, verdict(job, made)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_good_kernel_passes(capability):
    made, reasons = judged(capability, product, M=64, N=64, K=64)
    assert reasons == []
    assert made.registers > 16
    assert made.shared >= 64 * 64 * 2  # b passes through shared memory whole
    assert made.wide_loads == made.loads == 8  # two tiles of 8 KiB over 128 threads, 16 bytes each
    assert made.tensor_core
    assert 0 < made.seconds < 20
    name = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA"}[capability[0]]
    assert any(opcode.startswith(name) for opcode in made.opcodes)


class DriverOfAnotherMachine:
    """Answers what `JITFunction.run` asks of a CUDA driver before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("stride", [73, 80, 1])
def test_what_is_compiled_is_what_a_launch_compiles(monkeypatch, tmp_path, stride):
    """Same source, signature, constants, divisibility and options as Triton's own launch, by the hash of its cache.

    A stride of 1 becomes a constant, of 80 is known to be a multiple of 16, of 73 is neither: three hashes.
    """
    asked = launch(product_of_rows, M=64, stride=stride)
    made = compile_one(Job(asked, (9, 0)))
    monkeypatch.setattr(triton.runtime.driver, "_active", DriverOfAnotherMachine())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    product_of_rows.device_caches.clear()
    launched = product_of_rows.warmup(
        **asked.arguments, **asked.constexprs, num_warps=asked.num_warps, num_stages=asked.num_stages, grid=(1,)
    )
    product_of_rows.device_caches.clear()
    assert launched.metadata.hash == made.hash != ""


def test_spills_are_refused():
    made, reasons = judged((9, 0), product, num_warps=1, M=128, N=128, K=64)
    assert made.spills > 100
    assert any("spill instructions" in reason for reason in reasons)
    assert judged((9, 0), product, num_warps=4, M=128, N=128, K=64)[1] == []


def test_spills_of_a_kernel_that_is_not_strict_are_only_reported():
    made, reasons = judged((9, 0), product, strict=False, num_warps=1, M=128, N=128, K=64)
    assert made.spills > 100
    assert reasons == []


def test_scalar_loads_are_refused():
    _, reasons = judged((9, 0), product_of_rows, M=64, stride=73)
    assert "no 16-byte load from global memory" in reasons
    # The same kernel with a stride that Triton's binder sees to be a multiple of 16: the binder is the launch's own.
    assert judged((9, 0), product_of_rows, M=64, stride=80)[1] == []


def test_a_product_without_tensor_cores_is_refused():
    _, reasons = judged((8, 0), product_without_dot, M=16, N=16, K=64)
    assert reasons == ["no tensor-core instruction"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_too_much_shared_memory_is_refused(capability):
    made, reasons = judged(capability, product, num_warps=8, M=128, N=128, K=512)
    assert made.shared == 2 * 128 * 512 * 2
    assert any("bytes of shared memory" in reason for reason in reasons)


def test_the_empty_body_of_an_oversized_blackwell_kernel_is_refused():
    """256 lanes x 512 columns x 2 exceed the tensor memory; Triton 3.7 compiles this without an error, to 38 lines."""
    made, reasons = judged((10, 0), product, M=512, N=512, K=32)
    assert made.registers < 16
    assert made.stack == made.spills == 0
    assert reasons == ["empty body: it writes nothing to global memory"]


def test_a_kernel_that_writes_nothing_is_refused():
    assert judged((8, 0), nothing, LENGTH=1024)[1] == ["empty body: it writes nothing to global memory"]


def test_a_kernel_that_does_not_compile_is_refused():
    _, reasons = judged((8, 0), wrong_types, LENGTH=64)
    assert len(reasons) == 1
    assert "CompilationError" in reasons[0]


def test_an_error_of_ptxas_is_told():
    _, reasons = judged((9, 0), product, num_warps=16, M=256, N=256, K=256)
    assert len(reasons) == 1
    assert "Insufficient registers" in reasons[0]


def test_a_compiler_that_does_not_end_is_given_up(monkeypatch):
    import time

    monkeypatch.setattr(compiled, "_compile", lambda job: time.sleep(60))
    begun = time.monotonic()
    made = compile_one(Job(launch(nothing, LENGTH=64), (8, 0)), limit_s=1.0)
    assert made.error == "not compiled after 1 s"
    assert time.monotonic() - begun < 20


def test_a_compiler_that_dies_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda job: os._exit(7))
    made = compile_one(Job(launch(nothing, LENGTH=64), (8, 0)))
    assert made.error == "the compiler died with exit code 7"


def test_slow_compilation_is_refused():
    job = Job(None, (9, 0))
    opcodes = {"LDG.E.128": 8, "STG.E.128": 4, "HGMMA.64x64x16.F32.BF16": 4}
    made = Measured(seconds=20.5, registers=64, opcodes=compiled.Counter(opcodes))
    assert verdict(job, made) == ["20 s to compile, 20 allowed"]


def test_every_job_is_answered_once():
    jobs = [Job(launch(nothing, LENGTH=n), (8, 0), labels={"n": str(n)}) for n in (64, 128, 256)]
    answered = [job.labels["n"] for job, made in compile_all(jobs, processes=2) if made.error is None]
    assert sorted(answered) == ["128", "256", "64"]


@pytest.mark.parametrize(
    ("line", "opcode"),
    [
        ("        /*0000*/                   MOV R1, c[0x0][0x28] ;", "MOV"),
        ("        /*0a10*/              @!P0 LDG.E.128 R4, [R2.64] ;", "LDG.E.128"),
        ("        /*12340*/         @!UP1 UTMALDG.2D [UR8], [UR4] ;", "UTMALDG.2D"),
        ("        /*0050*/         {       @P3 LDL.LU.64 R2, [R1+0x8] ;", "LDL.LU.64"),
        ("        /*0008*/         @PT STL [R1], R0 ;", "STL"),
    ],
)
def test_opcodes_are_read_behind_predicates(line, opcode):
    assert compiled.INSTRUCTION.findall(line) == [opcode]


def test_what_counts_as_what():
    counted = (
        "LDL.LU.64 STL LDG.E.128 LDGSTS.E.BYPASS.LTC128B.128 LDG.E.U16 UTMALDG.2D LDG.E.ENL2.256 HMMA.16816 UTCHMMA"
    )
    passed_over = "LDS.128 LDC.64 LDGDEPBAR STS.128 LDSM.16.M88.4 UTCATOMSWS.AND"
    made = Measured(opcodes=compiled.Counter(f"{counted} {passed_over}".split()))
    assert made.spills == 2
    assert made.loads == 5
    assert made.wide_loads == 4
    assert made.tensor_core == 2
    # LTC128B is the size of the L2 prefetch, not of the copy.
    assert Measured(opcodes=compiled.Counter(["LDGSTS.E.LTC128B"])).wide_loads == 0


@pytest.fixture
def two_jobs(monkeypatch):
    labels = {"kernel": "product", "shape": "toy", "dtype": "bf16"}
    good = Job(launch(product, M=64, N=64, K=64), (9, 0), labels=labels)
    bad = Job(launch(product_of_rows, M=64, stride=73), (9, 0), labels=labels | {"kernel": "product_of_rows"})
    monkeypatch.setattr(cases, "jobs", lambda everything: [good, bad])
    return good, bad


def test_the_command_prints_a_table_writes_it_and_fails_where_a_kernel_is_refused(two_jobs, tmp_path, capsys):
    path = tmp_path / "results" / "compile.json"
    assert command.main(["--json", str(path), "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "1 refused" in printed
    assert "product_of_rows toy bf16 sm_90: no 16-byte load from global memory" in printed
    good, bad = json.loads(path.read_text())["kernels"]
    assert good["refused"] == []
    assert (good["kernel"], good["arch"], good["wide_loads"]) == ("product", "sm_90", 8)
    assert bad["refused"] == ["no 16-byte load from global memory"]
    assert set(good) == set(command.COLUMNS)


def test_the_command_passes_good_kernels(two_jobs, capsys):
    assert command.main(["--only", "product toy"]) == 0
    assert "0 refused" in capsys.readouterr().out


def test_the_command_does_not_pass_when_it_compiled_nothing(two_jobs):
    with pytest.raises(SystemExit):
        command.main(["--only", "no such kernel"])


def test_the_file_changes_only_with_what_it_says(tmp_path):
    """Seconds differ in every run; a tracked file that changed each time would hide the changes that matter."""
    path = tmp_path / "compile.json"
    row = dict.fromkeys(command.COLUMNS, 0)
    assert command.write(path, [row], "models")
    assert not command.write(path, [row | {"seconds": 9}], "models")
    assert command.write(path, [row | {"registers": 9}], "models")
    assert command.write(path, [row, row], "models")
    path.write_text("{broken")
    assert command.write(path, [row], "models")
    assert json.loads(path.read_text())["kernels"] == [row]

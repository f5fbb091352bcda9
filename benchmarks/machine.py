"""What has to stand beside a number for it to mean anything: the machine, its software, its measured ceilings."""

import importlib.util
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hiera_kernels import extension


def environment(device: torch.device) -> dict:
    """The machine and the software, keys as benchmarks/results/README.md has them."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    about |= {
        "device": device.type,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "compiled": extension.why_not(device.type) or "yes",
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        about["triton"] = triton.__version__
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
        about["driver"] = driver()
    return about


def processor() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def driver() -> str:
    """The version of the NVIDIA driver, or empty where nvidia-smi does not tell."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout.strip() else ""


def current_commit() -> str:
    """The commit of this checkout, with "-dirty" behind it where files differ from it; empty outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git on this machine
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def folder_name(about: dict) -> str:
    """The machine as a folder of benchmarks/results: nvidia-h100-80gb-hbm3, or the CPU with its threads."""
    threads = about["threads"]
    text = about.get("gpu") or f"{about['cpu']} {threads} thread{'s' if threads > 1 else ''}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 11) -> float:
    """Shortest time of a call that keeps the device busy for long, so that its launch does not count: for a ceiling."""
    call()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
    return min(taken)


def allow_tf32(allowed: bool) -> None:
    """Let PyTorch multiply fp32 by TF32, or not.

    By the switch that sets all others: where `fp32_precision` alone is "tf32", the older `allow_tf32`, which
    torch.compile reads, raises.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def copy_gb_per_s(device: torch.device, size: int | None = None) -> float:
    """Bytes read plus bytes written per second of a large copy, in GB/s."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device) / 1e9


def matmul_tflops(device: torch.device, n: int = 8192) -> dict[str, float]:
    """TFLOP/s of a large square product of random numbers, by dtype; fp32 without TF32, and "tf32" with it."""
    found = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for name, dtype, precision in (
            ("bfloat16", torch.bfloat16, before),
            ("float16", torch.float16, before),
            ("tf32", torch.float32, "tf32"),
            ("float32", torch.float32, "ieee"),
        ):
            torch.backends.cuda.matmul.fp32_precision = precision
            a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            found[name] = 2 * n**3 / seconds_of(lambda a=a, b=b: a @ b, device, repeats=5) / 1e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return found


def ceilings(device: torch.device) -> dict:
    """What this device can do at most, measured now: `copy_gb_per_s`, and on a GPU `matmul_tflops`."""
    found = {"copy_gb_per_s": round(copy_gb_per_s(device), 1)}
    if device.type == "cuda":
        found["matmul_tflops"] = {name: round(value, 1) for name, value in matmul_tflops(device).items()}
    return found

"""What `python -m hiera_kernels` reports: versions, devices, and which implementation of every op runs on them."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import textwrap

import torch

from hiera_kernels import extension, ops
from hiera_kernels.ops import attention, calling, pooling

REFERENCE = "plain PyTorch"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The ops whose faster kernel is compiled C++ or CUDA; that of all others is written in Triton.
COMPILED_OPS = ("unroll", "reroll", "reroll_masked", "embed_tokens")
# Public functions without a kernel under their own name, and the op whose kernel does their work.
SERVED_BY = {"reroll_masked": "reroll", "gelu_linear": "gelu", "mlp": "gelu"}

# op -> (shape, question): whether a kernel takes a call of usual size, an empty batch of which is made for the purpose.
# Hiera's first stage: 64 keys, D = 96.
CALLS = {
    "mask_unit_attention": ((0, 64, 3 * 96), lambda x: attention.refusal(x, 1)),
    "q_pool": ((0, 64, 96), lambda x: pooling.refusal(x, 4)),
}


def public_ops() -> list[str]:
    """The names of the public ops, alphabetically."""
    return sorted(name for name in ops.__all__ if name != "disabled")


def collect() -> dict:
    """Everything that is reported, as plain dicts, lists, strings, numbers and None (JSON has them all)."""
    devices = {"cpu": None, "cuda": why_no_cuda()}
    return {
        "versions": _versions(),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "gpus": _gpus() if devices["cuda"] is None else [],
        "why_no_gpu": devices["cuda"],
        "compiled_extension": {device: {"why_not": extension.why_not(device)} for device in devices},
        "triton": {"why_not": why_no_triton()},
        "ops": [_implementation(op, device, absent) for op in public_ops() for device, absent in devices.items()],
    }


def why_no_triton() -> str | None:
    """None if Triton can be imported, otherwise why not."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install raises more than ImportError
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def why_no_cuda() -> str | None:
    """None if PyTorch sees a CUDA device, otherwise why not."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return f"this PyTorch is built for CUDA {torch.version.cuda} and finds no usable GPU (`nvidia-smi` says more)"


def _implementation(op: str, device: str, absent: str | None) -> dict:
    """One row: what serves `op` on `device`, and why nothing faster does. `absent`: why this device is not here."""
    row = {"op": op, "device": device, "implementation": None, "why_not_faster": absent}
    if absent is not None:
        return row
    if calling.has_kernel(SERVED_BY.get(op, op), device):
        refused = _refused(op, device)
        served = len(refused) < len(DTYPES)
        row["implementation"] = (
            ("compiled C++/CUDA" if op in COMPILED_OPS else "Triton kernel") if served else REFERENCE
        )
        row["why_not_faster"] = _sentence(refused)
        return row
    row["implementation"] = REFERENCE
    if op in COMPILED_OPS:
        row["why_not_faster"] = extension.why_not(device)
    elif device == "cpu":
        row["why_not_faster"] = "the fused kernel is written in Triton, for GPUs"
    else:
        row["why_not_faster"] = why_no_triton() or "this version of hiera_kernels has no Triton kernel for it"
    return row


def _refused(op: str, device: str) -> dict[torch.dtype, str]:
    """The dtypes in which the kernel of `op` leaves a call of usual size to plain PyTorch, and why."""
    if op not in CALLS:
        return {}
    shape, question = CALLS[op]
    answers = {dtype: question(_sample(dtype, *shape, device=device)) for dtype in DTYPES}
    return {dtype: reason for dtype, reason in answers.items() if reason is not None}


def _sample(dtype: torch.dtype, *shape: int, device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _sentence(refused: dict[torch.dtype, str]) -> str | None:
    reasons = set(refused.values())
    if len(refused) == len(DTYPES) and len(reasons) == 1:
        return reasons.pop()
    return "; ".join(f"{str(dtype).removeprefix('torch.')}: {reason}" for dtype, reason in refused.items()) or None


def _versions() -> dict:
    return {
        "hiera_kernels": _version_of("hiera-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "cuda_of_torch": torch.version.cuda,
        "nvidia_driver": _driver_version(),
    }


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _gpus() -> list[dict]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def render(report: dict, width: int = 120) -> str:
    """The report as text of at most `width` columns: facts, then a table of the ops."""
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        for gpu in report["gpus"]
    ]
    facts = [(name.replace("_", " "), value or "not found") for name, value in report["versions"].items()]
    facts.append(("cpu", "{machine}, {cores} cores, {torch_threads} threads".format(**report["cpu"])))
    facts += [(f"gpu {index}", gpu) for index, gpu in enumerate(gpus)] or [("gpu", f"none: {report['why_no_gpu']}")]
    for device, answer in report["compiled_extension"].items():
        why = answer["why_not"]
        facts.append((f"extension, {device}", "loaded" if why is None else f"no: {why}"))
    facts.append(("import of triton", "works" if (why := report["triton"]["why_not"]) is None else why))
    lines = _table(facts, width)
    header = ("op", "device", "runs as", "why not faster")
    rows = [
        (row["op"], row["device"], row["implementation"] or "-", row["why_not_faster"] or "") for row in report["ops"]
    ]
    return "\n".join([*lines, "", *_table([header, *rows], width, rule=True)])


def _table(rows: list[tuple[str, ...]], width: int, rule: bool = False) -> list[str]:
    """Rows in aligned columns; the last column wraps under itself."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for number, row in enumerate(rows):
        start = "".join(f"{cell:<{size}}  " for cell, size in zip(row[:-1], widths, strict=True))
        text = textwrap.wrap(row[-1], max(width - indent, 30)) or [""]
        lines += [(start + text[0]).rstrip(), *(" " * indent + line for line in text[1:])]
        if rule and number == 0:
            last = max(len(row[-1]) for row in rows)
            lines.append("  ".join("-" * size for size in [*widths, min(last, max(width - indent, 30))]))
    return lines

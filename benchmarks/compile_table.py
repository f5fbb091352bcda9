"""The compile gate's results as a short Markdown table: one row for each kernel family, the worst of its kernels.

python -m benchmarks.compile_table          # prints it; benchmarks/report.py puts it into the README
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compile.json"
# The first word of a kernel's label, or the first two of "window ...", as the reader knows it; others stay as they are.
FAMILIES = {
    "forward_kernel": "mask-unit attention, forward",
    "backward_kernel": "mask-unit attention, backward, up to 64 keys",
    "backward_q_kernel": "mask-unit attention, backward, longer rows: q",
    "backward_kv_kernel": "mask-unit attention, backward, longer rows: k, v",
    "window forward_kernel": "window attention, forward",
    "window backward_kernel": "window attention, backward, up to 64 keys",
    "window backward_q_kernel": "window attention, backward, longer rows: q",
    "window backward_kv_kernel": "window attention, backward, longer rows: k, v",
    "layer_norm_forward": "add + LayerNorm, forward",
    "layer_norm_backward": "add + LayerNorm, backward",
    "layer_norm_normalize": "add + LayerNorm, recomputed",
    "linear_q_pool": "linear + pooling, forward",
    "linear_q_pool_backward": "linear + pooling, backward",
    "gelu": "GELU, forward",
    "gelu_backward": "GELU, backward",
}


def family(kernel: str) -> str:
    """The family of a label such as "backward_kernel split bias"."""
    words = kernel.split()
    name = " ".join(words[:2]) if words[0] == "window" and len(words) > 1 else words[0]
    return FAMILIES.get(name, name.replace("_", " "))


def compile_table(path: Path = RESULTS) -> str:
    """A Markdown table of the file that `python -m tests.gates --json` writes, and a line that says what it holds.

    Args:
        path: the file.

    Returns:
        Text that ends in a newline. Numbers of several architectures are separated by slashes, in the order of the
        header; one number stands for all that are equal. fp32, which the gate lets spill, has rows of its own.

    Raises:
        ValueError: the file holds no kernels.
    """
    content = json.loads(Path(path).read_text())
    kernels = content["kernels"]
    if not kernels:
        raise ValueError(f"{path} holds no kernels")
    archs = sorted({k["arch"] for k in kernels}, key=lambda arch: int(arch.removeprefix("sm_")))
    groups: dict[str, list[dict]] = {}
    for kernel in kernels:
        kind = " (fp32)" if kernel["dtype"] == "fp32" else ""
        groups.setdefault(family(kernel["kernel"]) + kind, []).append(kernel)
    header = ("kernels", "variants", "registers", "stack, bytes", "spills", "shared, KiB", "slowest to compile")
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for name, group in groups.items():
        worst = [_worst(group, archs, key) for key in ("registers", "stack", "spills", "shared")]
        lines.append(_row([name, str(len(group)), *worst, f"{max(k['seconds'] for k in group):.1f} s"]))
    refused = [k for k in kernels if k["refused"]]
    what = "what published models launch" if content["scope"] == "models" else "every shape, dtype and architecture"
    verdict = "none refused" if not refused else f"**{len(refused)} refused**"
    lines += [
        "",
        f"The worst of each family on {' / '.join(archs)}: {len(kernels)} kernels, {what}, {verdict}; "
        f"Triton {content['triton']}, processor time.",
    ]
    return "\n".join(lines) + "\n"


def _worst(group: Sequence[dict], archs: Sequence[str], key: str) -> str:
    """The largest value on each architecture; a dash where nothing was compiled."""
    scale = 1024 if key == "shared" else 1
    cells = []
    for arch in archs:
        values = [kernel[key] for kernel in group if kernel["arch"] == arch]
        cells.append(f"{max(values) / scale:.0f}" if values else "-")
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(compile_table())

"""What a GPU can do, and how long it therefore takes: the model behind `benchmarks.roofline`.

One kernel takes the longest of: its bytes at the bandwidth of a large copy, its FLOPs at the rate of a large product,
and a floor for each launch (below about 2 us a GPU cannot start, drain and follow up kernels). A step takes the sum of
its kernels, or, where the GPU waits for Python, as long as the host needs to issue them: kernels are queued, so the two
overlap and the longer one counts. A CUDA graph has no host time.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.op_costs import Cost

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spec:
    """A device: achievable, not advertised, figures.

    Attributes:
        bandwidth_gb_per_s: bytes read plus written per second by a large copy.
        tensor_tflops: of a large 16-bit product.
        fp32_tflops: of a large fp32 product without TF32, PyTorch's default.
        kernel_us: the least time between the starts of two kernels.
        host_us: what eager PyTorch needs to issue one launch, autograd included.
        source: where the figures are from.
    """

    bandwidth_gb_per_s: float
    tensor_tflops: float
    fp32_tflops: float
    kernel_us: float = 2.0
    host_us: float = 5.0
    source: str = "assumed: about 0.9 of the advertised bandwidth, 0.7 to 0.8 of the advertised FLOP/s"

    def seconds(self, cost: Cost) -> float:
        """Time on the GPU of one operation."""
        rate = self.tensor_tflops if cost.tensor_cores else self.fp32_tflops
        moving, computing = cost.bytes / self.bandwidth_gb_per_s / 1e9, cost.flops / rate / 1e12
        return max(moving, computing, cost.launches * self.kernel_us / 1e6)


SPECS = {
    "h100": Spec(3000, 700, 50),  # SXM, 80 GB: 3350 GB/s and 989 TFLOP/s advertised
    "h200": Spec(4300, 700, 50),  # 4800 and 989
    "a100": Spec(1750, 250, 18),  # SXM, 80 GB: 2039 and 312
}


def spec_named(name: str, results: Path = RESULTS) -> Spec:
    """One of SPECS, or "measured": the ceilings in the results of the GPU that was measured last.

    Raises:
        ValueError: no such name, or nothing has been measured.
    """
    if name in SPECS:
        return SPECS[name]
    if name != "measured":
        raise ValueError(f"device spec must be one of {', '.join(SPECS)}, measured; got {name!r}")
    for path in sorted(results.glob("*/*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        about = json.loads(path.read_text()).get("environment", {})
        if about.get("gpu") and about.get("copy_gb_per_s") and about.get("matmul_tflops"):
            rates = about["matmul_tflops"]
            source = f"measured on {about['gpu']}, {path.parent.name}/{path.name}, commit {about['commit'][:12]}"
            return Spec(about["copy_gb_per_s"], rates["bfloat16"], rates["float32"], source=source)
    raise ValueError(f"device spec measured: no file under {results} holds the ceilings of a GPU; run `make gpu`")

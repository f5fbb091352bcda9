#!/usr/bin/env bash
# Parity, then speed, on one NVIDIA GPU: bash benchmarks/gpu.sh [OUT_DIR]
#
# Needs torch >= 2.10 built for CUDA, nvcc, ninja, pytest and no network; uses the Python of the calling shell (PYTHON=...
# names another). Numbers are written only if every GPU test was green, into OUT_DIR/<gpu>/ops.json.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}

gpu=$("$python" - <<'PY'
import sys
try:
    import torch
except ImportError:
    sys.exit("this Python has no torch; name one that has: PYTHON=... make gpu")
if not torch.cuda.is_available():
    sys.exit("torch sees no NVIDIA GPU here; everything that needs none is in `make test`")
print(torch.cuda.get_device_name().lower().replace(" ", "-"))
PY
)

echo "[1/3] build with CUDA for this machine"
HIERA_KERNELS_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
echo "[2/3] parity on $gpu"
"$python" -m pytest -m gpu -p no:cacheprovider
echo "[3/3] speed on $gpu"
"$python" -m benchmarks.ops --device cuda --json "$out/$gpu/ops.json"

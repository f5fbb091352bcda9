#!/usr/bin/env bash
# Parity, then speed, on one NVIDIA GPU: bash benchmarks/gpu.sh [OUT_DIR] [--dry-run]
#
#   bash benchmarks/gpu.sh results-of-today          at most 8 files: gpu.log, summary.json, ops.json, model.json, ...
#   BUDGET_S=540 ONLY=tests,sanitize bash benchmarks/gpu.sh DIR      some of build,tests,sanitize,ops,model,convergence,tune
#   bash benchmarks/gpu.sh --dry-run                 print every step and check that it could start; needs no GPU
#
# The default OUT_DIR is benchmarks/results/<machine>. Needs torch >= 2.11 built for CUDA, Triton >= 3.6, pytest, nvcc
# and ninja, and no network; uses the Python of the calling shell (PYTHON=... names another). What it does, in which
# order, and what stops what: benchmarks/gpu_run.py. COMMIT=... says what is run where there is no .git.
#
# The extension need not be built there: where nvcc is, HIERA_KERNELS_CUDA=1 pip install --no-build-isolation -e . makes
# hiera_kernels/_C.abi3.so without a GPU and beside a CPU-only torch; carry that file.
# Rivals of whole steps: hiera-transformer is looked for in .upstream/ (`make test` puts it there, 216 KB: carry that
# folder along), timm where Python finds it. For SAM 2's encoders copy the packages sam2, hydra, omegaconf, iopath and
# antlr4 (pure Python, 5 MB) from .venv/lib/python3.*/site-packages/ into .upstream/ too. What is missing is said so.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$PWD/.upstream"
exec "${PYTHON:-python3}" -m benchmarks.gpu_run ${BUDGET_S:+--budget "$BUDGET_S"} ${ONLY:+--only "$ONLY"} \
  ${COMMIT:+--commit "$COMMIT"} "$@"

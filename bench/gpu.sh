#!/bin/bash
# All measurements of one NVIDIA GPU in one call of eight minutes, without a network and without vLLM:
#   bash bench/gpu.sh [--seconds 480]      # --small: a tiny shape, on any machine, to try the script itself
# bench/gpu.py says what is measured; it writes bench/results/gpu-MACHINE.md. PYTHON=... is another interpreter than
# make setup's.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}" OMP_WAIT_POLICY=PASSIVE
exec "${PYTHON:-.venv/bin/python}" bench/gpu.py "$@"

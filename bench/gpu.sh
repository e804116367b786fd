#!/bin/bash
# All measurements of one NVIDIA GPU, in about ten minutes:  bash bench/gpu.sh [--trl]
# Checks the GPU kernel, then a step, the head, MI scores and a short training run; each writes a table to bench/results.
# --trl measures TRL too, which first installs it into .venv-trl. PYTHON=... is another interpreter than make setup's.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: no NVIDIA GPU that PyTorch can use; make bench measures a machine without one" >&2
    exit 2
}
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
mkdir -p bench/results

"$PYTHON" -m pytest -q tests/test_mi_kernels.py
"$PYTHON" bench/step.py --rounds 2 --repeats 5 "$@"
"$PYTHON" bench/head.py --rounds 2 --repeats 10
"$PYTHON" bench/mi.py

# The embedded run on one GPU: vLLM where it is installed, else Hugging Face's generation.
engine=$("$PYTHON" -c 'from importlib.util import find_spec as f; print("vllm" if f("vllm") else "hf")')
runs=$(mktemp -d)
"$PYTHON" train.py --config smollm2_135m.yaml "runs=$runs" name=gpu "rollout.engine=$engine" optim.steps=10 \
    validation.every=10 tracking.wandb=disabled
machine=$("$PYTHON" -c 'from bench.machine import slug; print(slug())')
cp "$runs/gpu/summary.md" "bench/results/train-$machine.md"
rm -r "$runs"
echo "written: bench/results"

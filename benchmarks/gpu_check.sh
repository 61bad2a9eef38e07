#!/bin/sh
# On a machine with a GPU: the shared prompt's equality tests in bfloat16, then Rankloop beside TRL with models of 0.5B and 1.5B,
# and Rankloop's PPO with both: tokens a second and memory. Plain torch is enough. Usage: benchmarks/gpu_check.sh [RESULT.json]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "No GPU here: nothing was tested or measured."
  exit 0
fi
"$python" -m pytest -q -m gpu tests/training/test_shared_prompt.py
exec "$python" -m benchmarks.gpu_check --json "${1:-gpu_check.json}"

#!/usr/bin/env bash
# Makes the environment if there is none, then checks style and runs the tests, offline. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONNOUSERSITE=1 # a conda environment would otherwise see ~/.local

python=$(./setup_env.sh --print-python) || {
  ./setup_env.sh
  python=$(./setup_env.sh --print-python)
}

# The tests use the shipped checkpoints and random models: nothing may be fetched.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
unset BLOCKFFN_MODEL BLOCKFFN_OUTPUT_DIR BLOCKFFN_QUICK

style=0
"$python" -m ruff format --check . || style=1
"$python" -m ruff check . || style=1

tests=0
"$python" -m pytest "$@" || tests=$?

if [ "$style" -ne 0 ]; then
  echo "run_tests: ruff found fault, see the top (repair: ruff format . && ruff check --fix .)" >&2
fi
if [ "$tests" -ne 0 ]; then
  exit "$tests"
fi
exit "$style"

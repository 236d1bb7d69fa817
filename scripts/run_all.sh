#!/usr/bin/env bash
# The whole study: makes the environment if there is none, runs 01-07 in order, executes the notebook.
#
#   bash scripts/run_all.sh [--quick] [--model NAME] [--output-dir FOLDER] [--seed N] [--device DEVICE]
#
#   --quick        fewer documents and steps, the same path through every script; results in <model>-quick
#   --model        blockffn-tiny (default), a folder, or a hub name such as SparseLLM/BlockFFN-3B-SFT
#   --output-dir   root of all results (default: outputs)
#   --seed         seed of everything that draws (default: config.py)
#   --device       auto (default), cpu, cuda ...
set -euo pipefail
caller=$PWD
export PYTHONNOUSERSITE=1 # a conda environment would otherwise see ~/.local
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STEPS=(
  01_download_model 02_inspect_model 03_extract_routing 04_test_sidecar
  05_sweep_alpha 06_replace_layer 07_gated_hybrid
)

die() {
  echo "error: $*" >&2
  exit 2
}

flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick)
      export BLOCKFFN_QUICK=1
      shift
      ;;
    --model | --output-dir | --seed | --device)
      if [ $# -lt 2 ] || [ -z "$2" ]; then die "$1 needs a value (see scripts/run_all.sh --help)"; fi
      value=$2
      case "$1" in
        --model)
          # A folder is meant from where the caller stands; a name such as org/model stays as it is.
          if [ "$caller" != "$PWD" ] && [ -d "$caller/$value" ]; then value=$caller/$value; fi
          export BLOCKFFN_MODEL=$value
          ;;
        --output-dir)
          case "$value" in
            /*) export BLOCKFFN_OUTPUT_DIR=$value ;;
            *) export BLOCKFFN_OUTPUT_DIR=$caller/$value ;;
          esac
          ;;
        *) flags+=("$1" "$value") ;;
      esac
      shift 2
      ;;
    -h | --help)
      sed -n '2,10s/^# \{0,1\}//p' "scripts/$(basename "${BASH_SOURCE[0]}")"
      exit 0
      ;;
    *) die "unknown argument $1 (see scripts/run_all.sh --help)" ;;
  esac
done

started=$SECONDS
python=$(./setup_env.sh --print-python) || {
  ./setup_env.sh
  python=$(./setup_env.sh --print-python)
}
echo "environment: $python ($((SECONDS - started)) s)"

# config.py turns the BLOCKFFN_ variables into the paths that the scripts write and the notebook reads.
settings=$("$python" -c '
import config
print(config.MODEL_NAME, config.OUTPUT_DIR, config.MODEL_OUTPUT_DIR, int(config.QUICK), sep="\n")')
{
  read -r model
  read -r root
  read -r folder
  read -r quick
} <<<"$settings"
flags=(--model "$model" --output-dir "$root" ${flags[@]+"${flags[@]}"})
if [ "$quick" = 1 ]; then flags+=(--quick); fi

step() { # step NAME COMMAND...: runs it, prints its wall time, stops everything with its name when it fails
  local name=$1 begin=$SECONDS code=0
  shift
  echo
  echo "=== $name"
  "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    echo "run_all: $name failed with exit code $code after $((SECONDS - begin)) s; its message is above" >&2
    exit "$code"
  fi
  echo "--- $name: $((SECONDS - begin)) s"
}

started=$SECONDS
for name in "${STEPS[@]}"; do
  step "$name" "$python" "scripts/$name.py" "${flags[@]}"
done

# With the environment's own kernel, its inline figures, and no time stamps in the result.
export JUPYTER_PREFER_ENV_PATH=1
unset MPLBACKEND
step "notebook" "$python" -m nbconvert --log-level=WARN --to notebook --execute notebooks/visualize_routing.ipynb \
  --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.timeout=900 \
  --ExecutePreprocessor.record_timing=False --output-dir "$folder" --output visualize_routing.ipynb
step "report" "$python" -m nbconvert --log-level=WARN --to html "$folder/visualize_routing.ipynb" \
  --output-dir "$folder" --output report.html

echo
echo "All steps of $model: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "Results:  $folder"
echo "Notebook: $folder/visualize_routing.ipynb"
echo "Report:   $folder/report.html"

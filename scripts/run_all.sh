#!/usr/bin/env bash
# Both studies: makes the environment if there is none, runs 01 to 07, the journeys' 01 to 03, and both notebooks.
# What explains the answer (08 to 10, hours on a CPU) is run by hand.
#
#   bash scripts/run_all.sh [--quick] [--model NAME] [--journey-model NAME] [--output-dir FOLDER] [--seed N]
#                           [--device DEVICE]
#
#   --quick           fewer documents and steps, the same path through every script; results in <model>-quick
#   --model           blockffn-tiny (default), a folder, or a hub name such as SparseLLM/BlockFFN-3B-SFT
#   --journey-model   the mixture of experts of journeys/: mixtral-tiny (default), a folder, or a hub name
#   --output-dir      root of all results (default: outputs)
#   --seed            seed of everything that draws (default: config.py)
#   --device          auto (default), cpu, cuda ...
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

seed=() device=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick)
      export BLOCKFFN_QUICK=1
      shift
      ;;
    --model | --journey-model | --output-dir | --seed | --device)
      if [ $# -lt 2 ] || [ -z "$2" ]; then die "$1 needs a value (see scripts/run_all.sh --help)"; fi
      value=$2
      case "$1" in
        --model | --journey-model)
          # A folder is meant from where the caller stands; a name such as org/model stays as it is.
          if [ "$caller" != "$PWD" ] && [ -d "$caller/$value" ]; then value=$caller/$value; fi
          if [ "$1" = --model ]; then export BLOCKFFN_MODEL=$value; else export BLOCKFFN_JOURNEY_MODEL=$value; fi
          ;;
        --output-dir)
          case "$value" in
            /*) export BLOCKFFN_OUTPUT_DIR=$value ;;
            *) export BLOCKFFN_OUTPUT_DIR=$caller/$value ;;
          esac
          ;;
        --seed) seed+=("$1" "$value") ;;
        *) device+=("$1" "$value") ;;
      esac
      shift 2
      ;;
    -h | --help)
      sed -n '2,13s/^# \{0,1\}//p' "scripts/$(basename "${BASH_SOURCE[0]}")"
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
hidden = config.QUICK_SETTINGS if config.QUICK else vars(config)
print(config.MODEL_NAME, config.JOURNEY_MODEL, config.OUTPUT_DIR, config.MODEL_OUTPUT_DIR, config.JOURNEYS_DIR,
      hidden["JOURNEY_HIDDEN_PROBLEMS"], int(config.QUICK), sep="\n")')
{
  read -r model
  read -r journey_model
  read -r root
  read -r folder
  read -r journeys
  read -r hidden
  read -r quick
} <<<"$settings"
flags=(--output-dir "$root")
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

notebook() { # notebook NAME FOLDER REPORT: executes it with the results, and writes it as a web page too
  step "$1 (notebook)" "$python" -m nbconvert --log-level=WARN --to notebook --execute "notebooks/$1.ipynb" \
    --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.timeout=900 \
    --ExecutePreprocessor.record_timing=False --output-dir "$2" --output "$1.ipynb"
  step "$3" "$python" -m nbconvert --log-level=WARN --to html "$2/$1.ipynb" --output-dir "$2" --output "$3"
}

# Notebooks: with the environment's own kernel, its inline figures, and no time stamps in the result.
export JUPYTER_PREFER_ENV_PATH=1
unset MPLBACKEND

started=$SECONDS
for name in "${STEPS[@]}"; do
  own=(${seed[@]+"${seed[@]}"})
  if [ "$name" = 02_inspect_model ]; then own=(); fi # it draws nothing
  step "$name" "$python" "scripts/$name.py" --model "$model" "${flags[@]}" ${own[@]+"${own[@]}"} ${device[@]+"${device[@]}"}
done
flags+=(${seed[@]+"${seed[@]}"})
notebook visualize_routing "$folder" report.html

# --restart: journeys that an earlier run collected with other settings would stop journeys/01_collect.
step journeys/01_collect "$python" scripts/journeys/01_collect.py --model "$journey_model" "${flags[@]}" \
  ${device[@]+"${device[@]}"} --hidden-problems "$hidden" --restart
for name in journeys/02_analyze journeys/03_predict; do
  step "$name" "$python" "scripts/$name.py" --model "$journey_model" "${flags[@]}"
done
notebook moe_routing_analysis "$journeys" report.html

echo
echo "All steps of $model and $journey_model: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "Hybrid study:   $folder (report.html, visualize_routing.ipynb)"
echo "Journey study:  $journeys (report.html, moe_routing_analysis.ipynb)"

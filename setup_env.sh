#!/usr/bin/env bash
# Makes the Python environment of this repository and says what is in it. Safe to call again: it does nothing when
# requirements.txt, Python and the GPU are those of the last call.
#
#   ./setup_env.sh                  conda environment `blockffn-mamba` where conda is on the PATH, else .venv
#   ./setup_env.sh --dry-run        say what would be done, change nothing
#   ./setup_env.sh --force          install again (for example after installing the CUDA toolkit)
#   ./setup_env.sh --print-python   the environment's interpreter, exit code 1 when there is no complete environment
#
# TORCH_INDEX_URL  where to take torch from (default: PyTorch's CPU index without an NVIDIA GPU, else pip's own)
# MAX_JOBS         compiler processes while building the Mamba kernels (default: by cores and memory)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONNOUSERSITE=1 # a conda environment would otherwise see ~/.local

readonly ENV_NAME=blockffn-mamba
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly CUDA12_INDEX=https://download.pytorch.org/whl/cu126
# torch 2.13 from PyPI is built for CUDA 13.0, which needs driver 580; CUDA 12.6 runs from driver 525 on.
readonly CUDA13_DRIVER=580
readonly CUDA12_DRIVER=525
readonly KERNELS=(causal-conv1d==1.6.2.post1 mamba-ssm==2.3.0)
readonly STAMP_NAME=.blockffn-mamba-setup

dry_run=false
force=false
print_python=false
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --force) force=true ;;
    --print-python) print_python=true ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' setup_env.sh
      exit 0
      ;;
    *)
      echo "error: unknown argument $argument (see ./setup_env.sh --help)" >&2
      exit 2
      ;;
  esac
done

say() { echo "setup_env: $*"; }

die() {
  echo "error: $*" >&2
  exit 2
}

run() {
  if $dry_run; then
    echo "would run: $*"
  else
    "$@"
  fi
}

# --- the environment ----------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

supported() {
  case "$1" in
    3.11 | 3.12 | 3.13) return 0 ;;
    *) return 1 ;;
  esac
}

find_python() { # prints the first interpreter that the pins support and that can make environments
  local candidate version found="" no_venv=""
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    version=$(version_of "$candidate") || continue # a pyenv shim without its version behind it
    if ! supported "$version"; then
      found="${found:+$found, }$candidate is $version"
    elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      no_venv=$version
    else
      command -v "$candidate"
      return 0
    fi
  done
  if [ -n "$no_venv" ]; then
    die "Python $no_venv lacks venv: install it (Debian, Ubuntu: sudo apt install python$no_venv-venv) and call again"
  fi
  die "the pinned packages (transformers 5, numpy, pandas) need Python 3.11, 3.12 or 3.13; ${found:-no python3 found}." \
    "Install one (Ubuntu: sudo apt install python3.12 python3.12-venv; macOS: brew install python@3.12) and call again"
}

# A .venv that is there already stays in use, so that installing conda later does not start a second environment.
use_conda=false
if [ ! -x .venv/bin/python ] && command -v conda >/dev/null 2>&1; then
  use_conda=true
fi

env_python() { # prints the environment's interpreter; fails when there is no environment
  if $use_conda; then
    conda run -n "$ENV_NAME" python -c 'import sys; print(sys.executable)' 2>/dev/null
  else
    [ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python"
  fi
}

has_gpu() { # sets gpu_name, gpu_driver, gpu_memory
  local smi=nvidia-smi line
  command -v "$smi" >/dev/null 2>&1 || smi=/usr/lib/wsl/lib/nvidia-smi # WSL2 keeps it off some PATHs
  command -v "$smi" >/dev/null 2>&1 || return 1
  if ! line=$("$smi" --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) ||
    [ -z "$line" ]; then
    gpu_broken=true
    return 1
  fi
  IFS=, read -r gpu_name gpu_driver gpu_memory <<<"$line" # the first of several cards
  gpu_driver=${gpu_driver# }
  gpu_memory=${gpu_memory# }
}

gpu=false gpu_name="" gpu_driver="" gpu_memory="" gpu_broken=false
if has_gpu; then gpu=true; fi

stamp_path() { "$1" -c 'import sys; print(sys.prefix)' | sed "s|\$|/$STAMP_NAME|"; }

stamp_text() { # what an installation depends on: the pins, the interpreter, whether there is a GPU
  "$1" -c '
import hashlib, platform, sys
pins = hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest()
print("requirements", pins, "python", platform.python_version(), "gpu", sys.argv[1])' "$gpu"
}

complete() { # whether the environment of interpreter $1 was finished for these pins
  local stamp
  stamp=$(stamp_path "$1") && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(stamp_text "$1")" ]
}

if $print_python; then
  python=$(env_python) && [ -n "$python" ] && complete "$python" || exit 1
  echo "$python"
  exit 0
fi

# --- the machine --------------------------------------------------------------------------------------------------

system=$(uname -s)
if [ "$system" = Darwin ]; then
  [ "$(uname -m)" = arm64 ] ||
    die "PyTorch 2.13 has no wheels for Intel Macs: use a Mac with Apple silicon, or Linux (a container will do)"
  memory_bytes=$(sysctl -n hw.memsize 2>/dev/null || echo 0)
else
  memory_bytes=$(($(getconf _PHYS_PAGES 2>/dev/null || echo 0) * $(getconf PAGE_SIZE 2>/dev/null || echo 0)))
fi
memory_gib=$((memory_bytes / 1024 / 1024 / 1024))
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

case "$(uname -r)" in
  *[Mm]icrosoft*)
    if [ "$memory_gib" -gt 0 ] && [ "$memory_gib" -lt 15 ]; then
      say "WSL2 has $memory_gib GiB here: it takes half of the computer's memory unless told otherwise. For the 3B model put"
      say "  [wsl2]"
      say "  memory=16GB"
      say "  into C:\\Users\\<you>\\.wslconfig (leave Windows 4 GB) and run 'wsl --shutdown' in PowerShell."
    fi
    ;;
esac

torch_index=${TORCH_INDEX_URL:-}
if $gpu; then
  driver_major=${gpu_driver%%.*}
  say "NVIDIA GPU: $gpu_name, $gpu_memory, driver $gpu_driver"
  case "$driver_major" in
    '' | *[!0-9]*) say "the driver's version is not a number; going on as if it were new enough" ;;
    *)
      if [ "$driver_major" -lt "$CUDA12_DRIVER" ]; then
        say "driver $gpu_driver is too old for this torch, which will run on the CPU: install driver $CUDA13_DRIVER or newer"
        say "(under WSL2: on Windows, never inside Linux), then ./setup_env.sh --force"
      elif [ "$driver_major" -lt "$CUDA13_DRIVER" ]; then
        say "driver $gpu_driver is older than $CUDA13_DRIVER (CUDA 13): taking torch for CUDA 12.6"
        torch_index=${torch_index:-$CUDA12_INDEX}
      fi
      ;;
  esac
elif $gpu_broken; then
  say "nvidia-smi is there but finds no GPU: check the driver (under WSL2 it belongs on Windows, never inside Linux)." \
    "Going on without a GPU; ./setup_env.sh --force when it works."
fi

# --- install ------------------------------------------------------------------------------------------------------

if $use_conda; then
  python=$(env_python) || python=""
  if [ -n "$python" ] && ! supported "$(version_of "$python")"; then
    die "the conda environment $ENV_NAME has Python $(version_of "$python"); this needs 3.11 to 3.13." \
      "Remove it (conda env remove -n $ENV_NAME) and call again"
  fi
  if [ -z "$python" ]; then
    say "making the conda environment $ENV_NAME"
    # conda-forge alone: Anaconda's default channels ask for their terms to be accepted first.
    run conda create -y -q -n "$ENV_NAME" --override-channels -c conda-forge python=3.12 pip ||
      die "conda could not make the environment $ENV_NAME: see its message above, then call again"
    python=$(env_python) || python=""
  fi
else
  if [ -x .venv/bin/python ] && ! supported "$(version_of .venv/bin/python)"; then
    die ".venv has Python $(version_of .venv/bin/python || echo '(broken)'); this needs 3.11 to 3.13. Remove .venv and call again"
  fi
  if [ ! -x .venv/bin/python ]; then
    base=$(find_python)
    say "making .venv with $("$base" --version 2>&1) ($base)"
    run "$base" -m venv .venv
  fi
  python=$(env_python) || python=""
fi
if [ -z "$python" ]; then
  $dry_run || die "the environment was made but its Python cannot be found"
  python=python # the environment that a dry run did not make
fi

reachable() { # whether $1 answers within 5 seconds
  if command -v curl >/dev/null 2>&1; then
    curl --silent --fail --head --location --max-time 5 --output /dev/null "$1" 2>/dev/null
  else
    "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
  fi
}

install_torch() {
  local pin installed
  pin=$(grep '^torch==' requirements.txt)
  installed=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) || installed=""
  # pip takes 2.13.0+cpu for 2.13.0 and would keep it: make room for the CUDA build, or for the index asked for.
  case "$installed" in
    "") ;;
    *+cpu) if $gpu || { $force && [ -n "${TORCH_INDEX_URL:-}" ]; }; then run "$python" -m pip uninstall -q -y torch; fi ;;
    *) if $force && [ -n "${TORCH_INDEX_URL:-}" ]; then run "$python" -m pip uninstall -q -y torch; fi ;;
  esac
  if [ -z "$torch_index" ] && ! $gpu && [ "$system" = Linux ] && reachable "$CPU_INDEX/torch/"; then
    torch_index=$CPU_INDEX # the default wheel brings 3 GB of CUDA libraries that nothing here would use
  fi
  [ -n "$torch_index" ] || return 0 # requirements.txt brings torch from pip's own index
  say "torch from $torch_index"
  # An extra index, not the only one: torch's dependencies come from pip's own, and 2.13.0+cpu outranks 2.13.0.
  run "$python" -m pip install --quiet --timeout 30 --retries 1 --extra-index-url "$torch_index" "$pin" && return 0
  [ -z "${TORCH_INDEX_URL:-}" ] || die "no $pin at TORCH_INDEX_URL=$TORCH_INDEX_URL: check the address, or unset it"
}

explain_kernels() {
  say "Mamba kernels: $1. Nothing is lost but speed: the sidecars run on PyTorch, with the same weights and results."
}

install_kernels() { # only with a GPU; never fatal
  local nvcc_version torch_cuda jobs pin
  if ! command -v nvcc >/dev/null 2>&1; then
    explain_kernels "no nvcc on the PATH. To have them, install the CUDA toolkit, then ./setup_env.sh --force"
    return 0
  fi
  nvcc_version=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9.]*\).*/\1/p') || nvcc_version=""
  if ! $dry_run; then
    torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")') || torch_cuda=""
    if [ "${nvcc_version%%.*}" != "${torch_cuda%%.*}" ]; then
      explain_kernels "nvcc is ${nvcc_version:-unknown} but torch was built for CUDA ${torch_cuda:-none}; they must share the major version"
      return 0
    fi
  fi
  jobs=$((memory_gib / 4)) # one nvcc process takes up to 4 GiB
  if [ "$jobs" -gt "$cores" ]; then jobs=$cores; fi
  if [ "$jobs" -lt 1 ]; then jobs=1; fi
  export MAX_JOBS=${MAX_JOBS:-$jobs}
  say "building the Mamba kernels with MAX_JOBS=$MAX_JOBS (10 to 30 minutes, once)"
  if ! run "$python" -m pip install --quiet setuptools wheel packaging ninja; then
    explain_kernels "their build tools could not be installed"
    return 0
  fi
  for pin in "${KERNELS[@]}"; do
    if ! run "$python" -m pip install --no-build-isolation --constraint requirements.txt "$pin"; then
      explain_kernels "$pin could not be built (nvcc $nvcc_version, MAX_JOBS=$MAX_JOBS; see pip's message above). Out of memory: MAX_JOBS=1 ./setup_env.sh --force"
      return 0
    fi
  done
}

if ! $force && [ "$python" != python ] && complete "$python"; then
  say "nothing to do: the environment fits requirements.txt"
else
  say "installing requirements.txt (a few minutes)"
  install_torch
  run "$python" -m pip install --quiet --requirement requirements.txt ||
    die "pip could not install requirements.txt: see its message above (network? disk space?), then call again"
  if $gpu; then
    install_kernels
  fi
  if ! $dry_run; then
    stamp_text "$python" >"$(stamp_path "$python")"
  fi
fi

# --- the table ----------------------------------------------------------------------------------------------------

if $dry_run; then
  say "dry run: nothing was changed"
  exit 0
fi
"$python" - "$gpu" <<'PYTHON'
import importlib.util
import logging
import platform
import sys

import torch

logging.disable(logging.WARNING)  # bitsandbytes names optional kernels that nothing here uses


def bitsandbytes():
    if importlib.util.find_spec("bitsandbytes") is None:
        return "not installed (8-bit loading is not available)"
    try:
        import bitsandbytes as bnb
    except Exception as error:  # its import loads native libraries, and any of them may be missing
        return f"does not load: {' '.join(str(error).split())[:60]}"
    return f"{bnb.__version__} ({'CUDA' if torch.cuda.is_available() else 'CPU'})"


def kernels():
    if not torch.cuda.is_available():
        return "PyTorch"
    try:
        import causal_conv1d  # noqa: F401
        import mamba_ssm
    except Exception as error:  # compiled against another torch, or not built
        return f"PyTorch ({' '.join(str(error).split())[:60]})"
    return f"mamba-ssm {mamba_ssm.__version__}"


if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    gpu = f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
elif sys.argv[1] == "true":
    gpu = "present, but torch cannot use it (driver too old, or a CPU build of torch)"
else:
    gpu = "none (CPU)"
rows = [
    ("Python", f"{platform.python_version()}  {sys.executable}"),
    ("torch", torch.__version__),
    ("CUDA", torch.version.cuda or "none"),
    ("GPU", gpu),
    ("Mamba kernels", kernels()),
    ("bitsandbytes", bitsandbytes()),
]
print()
for name, value in rows:
    print(f"  {name:<14} {value}")
PYTHON
echo
if $use_conda; then
  echo "Activate it: conda activate $ENV_NAME        Run everything: bash scripts/run_all.sh"
else
  echo "Activate it: source .venv/bin/activate        Run everything: bash scripts/run_all.sh"
fi

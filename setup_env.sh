#!/usr/bin/env bash
# Makes the Python environment of this repository and says what is in it. Safe to call again: it does nothing when
# the requirements, Python and the GPU are those of the last call.
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

say() { echo "setup_env: $*"; }

die() {
  echo "error: $*" >&2
  exit 2
}

dry_run=false force=false print_python=false
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --force) force=true ;;
    --print-python) print_python=true ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' setup_env.sh
      exit 0
      ;;
    *) die "unknown argument $argument (see ./setup_env.sh --help)" ;;
  esac
done

run() { if $dry_run; then echo "would run: $*"; else "$@"; fi; }

# --- the environment ----------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

supported() { [[ $1 =~ ^3\.1[123]$ ]]; }

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
if [ ! -x .venv/bin/python ] && command -v conda >/dev/null 2>&1; then use_conda=true; fi

env_python() { # prints the environment's interpreter; fails when there is no environment
  if $use_conda; then
    conda run -n "$ENV_NAME" python -c 'import sys; print(sys.executable)' 2>/dev/null
  else
    [ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python"
  fi
}

card="" no_card=false # the first card's name, memory and driver; whether nvidia-smi is there but finds none
for smi in nvidia-smi /usr/lib/wsl/lib/nvidia-smi; do # WSL2 keeps it off some PATHs
  if [ -z "$card" ] && command -v "$smi" >/dev/null 2>&1; then
    card=$("$smi" --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null) || card=""
    if [ -z "$card" ]; then no_card=true; fi
  fi
done
card=${card%%$'\n'*} gpu=false
if [ -n "$card" ]; then gpu=true; fi

stamp_path() { echo "${1%/bin/*}/.blockffn-mamba-setup"; }

stamp_text() { # what an installation depends on: the pins, the interpreter, whether there is a GPU
  "$1" -c '
import hashlib, platform, sys
pins = b"".join(open(name, "rb").read() for name in ("requirements.txt", "requirements-no-deps.txt"))
print("requirements", hashlib.sha256(pins).hexdigest(), "python", platform.python_version(), "gpu", sys.argv[1])' "$gpu"
}

complete() { # whether the environment of interpreter $1 was finished for these pins
  local text
  text=$(stamp_text "$1") && [ "$(cat "$(stamp_path "$1")" 2>/dev/null)" = "$text" ]
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

if [[ $(uname -r) == *[Mm]icrosoft* ]] && [ "$memory_gib" -gt 0 ] && [ "$memory_gib" -lt 15 ]; then
  say "WSL2 has $memory_gib GiB here: it takes half of the computer's memory unless told otherwise. For the 3B model" \
    "put [wsl2] and, on the next line, memory=16GB into C:\\Users\\<you>\\.wslconfig (leave Windows 4 GB) and run" \
    "'wsl --shutdown' in PowerShell."
fi

torch_index=${TORCH_INDEX_URL:-}
if $gpu; then
  driver=${card##*, }
  driver_major=${driver%%.*}
  say "NVIDIA GPU: ${card%, *}, driver $driver"
  if [[ ! $driver_major =~ ^[0-9]+$ ]]; then
    say "the driver's version is not a number; going on as if it were new enough"
  elif [ "$driver_major" -lt "$CUDA12_DRIVER" ]; then
    say "driver $driver is too old for this torch, which will run on the CPU: install driver $CUDA13_DRIVER or newer"
    say "(under WSL2: on Windows, never inside Linux), then ./setup_env.sh --force"
  elif [ "$driver_major" -lt "$CUDA13_DRIVER" ]; then
    say "driver $driver is older than $CUDA13_DRIVER (CUDA 13): taking torch for CUDA 12.6"
    torch_index=${torch_index:-$CUDA12_INDEX}
  fi
elif $no_card; then
  say "nvidia-smi is there but finds no GPU: check the driver (under WSL2 it belongs on Windows, never inside Linux)." \
    "Going on without a GPU; ./setup_env.sh --force when it works."
fi

# --- install ------------------------------------------------------------------------------------------------------

remove="rm -r .venv"
if $use_conda; then remove="conda env remove -n $ENV_NAME"; fi
python=$(env_python) || python=""
if [ -n "$python" ]; then
  version=$(version_of "$python") || version="that does not start"
  supported "$version" ||
    die "the environment has a Python $version; this needs 3.11 to 3.13. Remove it ($remove) and call again"
elif $use_conda; then
  say "making the conda environment $ENV_NAME"
  # conda-forge alone: Anaconda's default channels ask for their terms to be accepted first.
  run conda create -y -q -n "$ENV_NAME" --override-channels -c conda-forge python=3.12 pip ||
    die "conda could not make the environment $ENV_NAME: see its message above, then call again"
else
  base=$(find_python)
  say "making .venv with $("$base" --version 2>&1) ($base)"
  run "$base" -m venv .venv || die "Python could not make .venv: see its message above, then $remove and call again"
fi
python=$(env_python) || python=""
if [ -z "$python" ]; then
  $dry_run || die "the environment was made but its Python cannot be found"
  python=python # the environment that a dry run did not make
fi

explain() { # sets `cause` to why pip ended with exit code $1, as its messages $2 tell
  local what="a package" here
  here="Python $(version_of "$python") on $system $(uname -m)"
  if [[ $2 =~ (Failed building wheel|No matching distribution found)" for "([^[:space:]]+) ]]; then
    what=${BASH_REMATCH[2]}
  fi
  case "$1 $2" in
    *"[Errno 28]"* | *"No space left on device"*)
      cause="the disk is full. Free some space for this folder, pip's cache and ${TMPDIR:-/tmp}" ;;
    "137 "*) cause="the system ended it (signal 9), as it does when memory runs out. Close other programs" ;;
    *": No module named pip"*) cause="the environment has no pip. Remove it ($remove)" ;;
    *"DO NOT MATCH THE HASHES"*)
      cause="a downloaded file is not the one that its index names. Empty pip's cache ($python -m pip cache purge)" ;;
    *"error: [Errno 2] No such file or directory: '"* | *"error: command '"*"failed: No such file"* | \
      *"unable to execute '"* | *"Unknown compiler"* | *"No CMAKE_C"* | *"xcrun: error"*)
      cause="$what has no wheel for $here and must be compiled, but there is no compiler. Install one"
      cause+=" (Debian, Ubuntu: sudo apt install build-essential; macOS: xcode-select --install)" ;;
    *"connection broken by"* | *"Max retries exceeded"* | *ReadTimeoutError* | *IncompleteRead* | *incomplete-download*)
      cause="a package index could not be reached. Check the network and, behind a proxy, HTTPS_PROXY and PIP_CERT" ;;
    *"Failed building wheel"* | *subprocess-exited-with-error*)
      cause="$what has no wheel for $here, and building it failed; its messages are above" ;;
    *"No matching distribution found"*) cause="no package index that answered has $what for $here" ;;
    *) cause="exit code $1; its messages are above" ;;
  esac
}

try_pip() { # try_pip COMMAND ARGUMENT...: runs pip and shows what it says; where it fails, sets `cause`
  local messages code=0
  if $dry_run; then
    run "$python" -m pip "$@"
    return 0
  fi
  # In a variable and not in a file: the disk may be full.
  messages=$("$python" -m pip "$1" --quiet "${@:2}" 2>&1) || code=$?
  if [ -n "$messages" ]; then printf '%s\n' "$messages" >&2; fi
  [ "$code" -eq 0 ] || explain "$code" "$messages"
  return "$code"
}

reachable() { # whether $1 answers within 5 seconds
  "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

install_torch() {
  local pin installed
  pin=$(grep '^torch==' requirements.txt)
  installed=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) || installed=""
  # pip takes 2.13.0+cpu for 2.13.0 and would keep it: make room for the CUDA build, or for the index asked for.
  if { $gpu && [[ $installed == *+cpu ]]; } || { $force && [ -n "$installed" ] && [ -n "${TORCH_INDEX_URL:-}" ]; }; then
    try_pip uninstall --yes torch || die "pip could not remove torch $installed: $cause"
  fi
  if [ -z "$torch_index" ] && ! $gpu && [ "$system" = Linux ] && reachable "$CPU_INDEX/torch/"; then
    torch_index=$CPU_INDEX # the default wheel brings 3 GB of CUDA libraries that nothing here would use
  fi
  [ -n "$torch_index" ] || return 0 # requirements.txt brings torch from pip's own index
  say "torch from $torch_index"
  # An extra index, not the only one: torch's dependencies come from pip's own, and 2.13.0+cpu outranks 2.13.0.
  try_pip install --timeout 30 --retries 1 --extra-index-url "$torch_index" "$pin" && return 0
  [ -z "${TORCH_INDEX_URL:-}" ] || die "pip could not install $pin with TORCH_INDEX_URL=$TORCH_INDEX_URL: $cause"
}

install_kernels() { # only with a GPU; where they cannot be had, sets `cause`
  local nvcc_version torch_cuda jobs pin
  if ! command -v nvcc >/dev/null 2>&1; then
    cause="no nvcc on the PATH. To have them, install the CUDA toolkit, then ./setup_env.sh --force"
    return 1
  fi
  nvcc_version=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9.]*\).*/\1/p') || nvcc_version=""
  if ! $dry_run; then
    torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")') || torch_cuda=""
    if [ "${nvcc_version%%.*}" != "${torch_cuda%%.*}" ]; then
      cause="nvcc is ${nvcc_version:-unknown} but torch was built for CUDA ${torch_cuda:-none};"
      cause+=" they must share the major version"
      return 1
    fi
  fi
  jobs=$((memory_gib / 4)) # one nvcc process takes up to 4 GiB
  if [ "$jobs" -gt "$cores" ]; then jobs=$cores; fi
  if [ "$jobs" -lt 1 ]; then jobs=1; fi
  export MAX_JOBS=${MAX_JOBS:-$jobs}
  say "building the Mamba kernels with MAX_JOBS=$MAX_JOBS (10 to 30 minutes, once)"
  try_pip install setuptools wheel packaging ninja || return 1
  for pin in "${KERNELS[@]}"; do
    if ! try_pip install --no-build-isolation --constraint requirements.txt "$pin"; then
      cause="pip could not build $pin (nvcc $nvcc_version, MAX_JOBS=$MAX_JOBS): $cause."
      cause+=" Out of memory: MAX_JOBS=1 ./setup_env.sh --force"
      return 1
    fi
  done
}

if ! $force && [ "$python" != python ] && complete "$python"; then
  say "nothing to do: the environment fits requirements.txt"
else
  say "installing requirements.txt (a few minutes)"
  install_torch
  try_pip install --requirement requirements.txt ||
    die "pip could not install requirements.txt: $cause. Then call again"
  try_pip install --no-deps --requirement requirements-no-deps.txt ||
    die "pip could not install requirements-no-deps.txt: $cause. Then call again"
  if $gpu && ! install_kernels; then
    say "Mamba kernels: $cause." \
      "Nothing is lost but speed: the sidecars run on PyTorch, with the same weights and results."
  fi
  if ! $dry_run; then stamp_text "$python" >"$(stamp_path "$python")"; fi
fi

# --- the table ----------------------------------------------------------------------------------------------------

if $dry_run; then
  say "dry run: nothing was changed"
  exit 0
fi
"$python" - "$gpu" <<'PYTHON'
import importlib
import logging
import platform
import sys

import torch

logging.disable(logging.WARNING)  # bitsandbytes names optional kernels that nothing here uses


def version(*names):
    """Version of the last of these modules; otherwise why one of them is not there or does not load."""
    try:
        return [importlib.import_module(name) for name in names][-1].__version__
    except Exception as error:  # native libraries may be missing, or compiled against another torch
        return f"none ({' '.join(str(error).split())[:60]})"


cuda = torch.cuda.is_available()
gpu = "none (CPU)"
if cuda:
    card = torch.cuda.get_device_properties(0)
    gpu = f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
elif sys.argv[1] == "true":
    gpu = "present, but torch cannot use it (driver too old, or a CPU build of torch)"
print(f"""
  Python         {platform.python_version()}  {sys.executable}
  torch          {torch.__version__}
  CUDA           {torch.version.cuda or "none"}
  GPU            {gpu}
  mamba-ssm      {version("causal_conv1d", "mamba_ssm") if cuda else "none (PyTorch on the CPU)"}
  bitsandbytes   {version("bitsandbytes")} (for 8-bit loading)
""")
PYTHON
activate="source .venv/bin/activate"
if $use_conda; then activate="conda activate $ENV_NAME"; fi
echo "Activate it: $activate        Run everything: bash scripts/run_all.sh"

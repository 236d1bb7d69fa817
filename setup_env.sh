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

readonly ENV_NAME=blockffn-mamba TORCH_INDEX=https://download.pytorch.org/whl
# torch 2.13 from PyPI is built for CUDA 13.0, which needs driver 580; CUDA 12.6 runs from driver 525 on.
readonly CUDA13_DRIVER=580 CUDA12_DRIVER=525
readonly KERNELS=(causal-conv1d==1.6.2.post1 mamba-ssm==2.3.0)

say() { echo "setup_env: $*"; }
die() { echo "error: $*" >&2; exit 2; }
run() { if $dry_run; then echo "would run: $*"; else "$@"; fi; }

dry_run=false force=false print_python=false
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --force) force=true ;;
    --print-python) print_python=true ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' setup_env.sh && exit ;;
    *) die "unknown argument $argument (see ./setup_env.sh --help)" ;;
  esac
done

# --- the environment ----------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { [[ $1 =~ ^3\.1[123]$ ]]; }

find_python() { # prints the first interpreter that the pins support and that can make environments
  local candidate version found=""
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    version=$(version_of "$candidate") || continue # not there, or a pyenv shim without its version behind it
    if supported "$version"; then
      if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then command -v "$candidate" && return; fi
      version+=" without venv (Debian, Ubuntu: sudo apt install python$version-venv)"
    fi
    found="${found:+$found, }$candidate is $version"
  done
  die "the pinned packages (transformers 5, numpy, pandas) need Python 3.11, 3.12 or 3.13; ${found:-no python3 found}." \
    "Install one (Ubuntu: sudo apt install python3.12 python3.12-venv; macOS: brew install python@3.12) and call again"
}

# A .venv that is there already stays in use, so that installing conda later does not start a second environment.
use_conda=false remove="rm -r .venv" activate="source .venv/bin/activate"
if [ ! -x .venv/bin/python ] && command -v conda >/dev/null 2>&1; then
  use_conda=true remove="conda env remove -n $ENV_NAME" activate="conda activate $ENV_NAME"
fi

env_python() { # prints the environment's interpreter; fails when there is no environment
  if $use_conda; then
    conda run -n "$ENV_NAME" python -c 'import sys; print(sys.executable)' 2>/dev/null
  else
    [ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python"
  fi
}

PATH=$PATH:/usr/lib/wsl/lib # WSL2 keeps nvidia-smi off some PATHs
card=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null) || card=""
card=${card%%$'\n'*} gpu=false # the first card's name, memory and driver
if [ -n "$card" ]; then gpu=true; fi

# The file in an environment that says what it was finished for: the pins, the interpreter, whether there is a GPU.
stamp() { # stamp PYTHON write: make that file; stamp PYTHON check: is it there, and the one that would be made?
  "$1" -c '
import hashlib, platform, sys
from pathlib import Path
pins = b"".join(Path(name).read_bytes() for name in ("requirements.txt", "requirements-no-deps.txt"))
text = f"requirements {hashlib.sha256(pins).hexdigest()} python {platform.python_version()} gpu {sys.argv[2]}\n"
file = Path(sys.argv[1]).parents[1] / ".blockffn-mamba-setup"
if sys.argv[3] == "write":
    file.write_text(text)
sys.exit(not file.is_file() or file.read_text() != text)' "$1" "$gpu" "$2"
}

python=$(env_python) || python=""
if $print_python; then
  [ -n "$python" ] && stamp "$python" check && echo "$python" && exit
  exit 1
fi

# --- the machine --------------------------------------------------------------------------------------------------

system=$(uname -s)
[ "$system $(uname -m)" != "Darwin x86_64" ] ||
  die "PyTorch 2.13 has no wheels for Intel Macs: use a Mac with Apple silicon, or Linux (a container will do)"
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
memory_gib=$(($(getconf _PHYS_PAGES 2>/dev/null || echo 0) * $(getconf PAGE_SIZE) / 2 ** 30))

if [[ $(uname -r) == *[Mm]icrosoft* ]] && [ "$memory_gib" -gt 0 ] && [ "$memory_gib" -lt 15 ]; then
  say "WSL2 has $memory_gib GiB here, half of the computer's memory. For the 3B model put [wsl2] and, on the next" \
    "line, memory=16GB into C:\\Users\\<you>\\.wslconfig (leave Windows 4 GB) and run 'wsl --shutdown' in PowerShell."
fi

torch_index=${TORCH_INDEX_URL:-}
if $gpu; then
  driver=${card##*, } # one that is no number counts as new enough
  say "NVIDIA GPU: ${card%, *}, driver $driver"
  if [ "${driver%%.*}" -lt "$CUDA12_DRIVER" ] 2>/dev/null; then
    say "driver $driver is too old for this torch, which will run on the CPU: install driver $CUDA13_DRIVER or newer" \
      "(under WSL2: on Windows, never inside Linux), then ./setup_env.sh --force"
  elif [ "${driver%%.*}" -lt "$CUDA13_DRIVER" ] 2>/dev/null; then
    say "driver $driver is older than $CUDA13_DRIVER (CUDA 13): taking torch for CUDA 12.6"
    torch_index=${torch_index:-$TORCH_INDEX/cu126}
  fi
elif command -v nvidia-smi >/dev/null 2>&1; then
  say "nvidia-smi is there but finds no GPU: check the driver (under WSL2 it belongs on Windows, never inside Linux)." \
    "Going on without a GPU; ./setup_env.sh --force when it works."
fi

# --- install ------------------------------------------------------------------------------------------------------

if [ -n "$python" ]; then
  version=$(version_of "$python") || version="that does not start"
  supported "$version" || die "the environment has a Python $version, not 3.11 to 3.13. Remove it ($remove), call again"
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
# In a dry run the environment may not have been made.
python=$(env_python) || $dry_run || die "the environment was made but its Python cannot be found"
python=${python:-python}
here="Python $(version_of "$python") on $system $(uname -m)"

try_pip() { # try_pip COMMAND ARGUMENT...: runs pip and shows what it says; where it fails, sets `cause` to why
  local messages code=0 what="a package"
  if $dry_run; then run "$python" -m pip "$@" && return; fi
  # In a variable and not in a file: the disk may be full.
  messages=$("$python" -m pip "$1" --quiet "${@:2}" 2>&1) || code=$?
  if [ -n "$messages" ]; then printf '%s\n' "$messages" >&2; fi
  [[ $messages =~ (building wheel|distribution found)" for "([^[:space:]]+) ]] && what=${BASH_REMATCH[2]}
  case "$code $messages" in
    *"[Errno 28]"* | *"No space left on device"*) cause="the disk is full. Free some here, in pip's cache or TMPDIR" ;;
    "137 "*) cause="the system ended it (signal 9), as it does when memory runs out. Close other programs" ;;
    *": No module named pip"*) cause="the environment has no pip. Remove it ($remove)" ;;
    *"DO NOT MATCH THE HASHES"*) cause="a file is not the one that its index names. Run $python -m pip cache purge" ;;
    *"error: [Errno 2] No such file or directory: '"* | *"error: command '"*"failed: No such file"* | \
      *"unable to execute '"* | *"Unknown compiler"* | *"No CMAKE_C"* | *"xcrun: error"*)
      cause="$what has no wheel for $here and must be compiled, but there is no compiler. Install one"
      cause+=" (Debian, Ubuntu: sudo apt install build-essential; macOS: xcode-select --install)" ;;
    *"connection broken by"* | *"Max retries exceeded"* | *ReadTimeoutError* | *IncompleteRead* | *incomplete-download*)
      cause="a package index could not be reached. Check the network and, behind a proxy, HTTPS_PROXY and PIP_CERT" ;;
    *"Failed building wheel"* | *subprocess-exited-with-error*)
      cause="$what has no wheel for $here, and building it failed; its messages are above" ;;
    *"No matching distribution found"*) cause="no package index that answered has $what for $here" ;;
    *) cause="exit code $code; its messages are above" ;;
  esac
  return "$code"
}

install_torch() {
  local pin installed ask='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)'
  pin=$(grep '^torch==' requirements.txt)
  installed=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) || installed=""
  # pip takes 2.13.0+cpu for 2.13.0 and would keep it: make room for the CUDA build, or for the index asked for.
  if { $gpu && [[ $installed == *+cpu ]]; } || { $force && [ -n "$installed" ] && [ -n "${TORCH_INDEX_URL:-}" ]; }; then
    try_pip uninstall --yes torch || die "pip could not remove torch $installed: $cause"
  fi
  if [ -z "$torch_index" ] && ! $gpu && [ "$system" = Linux ] &&
    "$python" -c "$ask" "$TORCH_INDEX/cpu/torch/" 2>/dev/null; then
    torch_index=$TORCH_INDEX/cpu # the default wheel brings 3 GB of CUDA libraries that nothing here would use
  fi
  [ -n "$torch_index" ] || return 0 # requirements.txt brings torch from pip's own index
  say "torch from $torch_index"
  # An extra index, not the only one: torch's dependencies come from pip's own, and 2.13.0+cpu outranks 2.13.0.
  try_pip install --timeout 30 --retries 1 --extra-index-url "$torch_index" "$pin" && return
  [ -z "${TORCH_INDEX_URL:-}" ] || die "pip could not install $pin with TORCH_INDEX_URL=$TORCH_INDEX_URL: $cause"
}

install_kernels() { # only with a GPU; where they cannot be had, sets `cause`
  local nvcc_version torch_cuda jobs pin
  cause="no nvcc on the PATH. To have them, install the CUDA toolkit, then ./setup_env.sh --force"
  nvcc_version=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9.]*\).*/\1/p') || return 1
  if ! $dry_run; then
    torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "none")') || torch_cuda=none
    cause="nvcc is $nvcc_version but torch was built for CUDA $torch_cuda; they must share the major version"
    [ "${nvcc_version%%.*}" = "${torch_cuda%%.*}" ] || return 1
  fi
  jobs=$((memory_gib / 4 < cores ? memory_gib / 4 : cores)) # one nvcc process takes up to 4 GiB
  export MAX_JOBS=${MAX_JOBS:-$((jobs > 1 ? jobs : 1))}
  say "building the Mamba kernels with MAX_JOBS=$MAX_JOBS (10 to 30 minutes, once)"
  try_pip install setuptools wheel packaging ninja || return 1
  for pin in "${KERNELS[@]}"; do
    try_pip install --no-build-isolation --constraint requirements.txt "$pin" && continue
    cause="pip could not build $pin (nvcc $nvcc_version): $cause. Out of memory: MAX_JOBS=1 ./setup_env.sh --force"
    return 1
  done
}

if ! $force && [ "$python" != python ] && stamp "$python" check; then
  say "nothing to do: the environment fits requirements.txt"
else
  say "installing requirements.txt (a few minutes)"
  install_torch
  try_pip install --requirement requirements.txt ||
    die "pip could not install requirements.txt: $cause. Then call again"
  try_pip install --no-deps --requirement requirements-no-deps.txt ||
    die "pip could not install requirements-no-deps.txt: $cause. Then call again"
  ! $gpu || install_kernels ||
    say "Mamba kernels: $cause. Nothing is lost but speed: PyTorch runs the sidecars, with the same results."
  $dry_run || stamp "$python" write
fi

if $dry_run; then say "dry run: nothing was changed" && exit; fi
"$python" - "$gpu" <<'PYTHON'
import importlib, logging, platform, sys
import torch

logging.disable(logging.WARNING)  # bitsandbytes names optional kernels that nothing here uses

def version(*names):
    """Version of the last of these modules; otherwise why one of them is not there or does not load."""
    try:
        return [importlib.import_module(name) for name in names][-1].__version__
    except Exception as error:  # native libraries may be missing, or compiled against another torch
        return f"none ({' '.join(str(error).split())[:60]})"

gpu, mamba = "none (CPU)", "none (PyTorch on the CPU)"
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    gpu, mamba = f"{card.name}, {card.total_memory / 2**30:.1f} GiB", version("causal_conv1d", "mamba_ssm")
elif sys.argv[1] == "true":
    gpu = "present, but torch cannot use it (driver too old, or a CPU build of torch)"
print(f"""
  Python         {platform.python_version()}  {sys.executable}
  torch          {torch.__version__}
  CUDA           {torch.version.cuda or "none"}
  GPU            {gpu}
  mamba-ssm      {mamba}
  bitsandbytes   {version("bitsandbytes")} (for 8-bit loading)
""")
PYTHON
echo "Activate it: $activate        Run everything: bash scripts/run_all.sh"

"""setup_env.sh, the run scripts and .ci/run: every branch, with stand-ins for Python, conda and the NVIDIA tools."""

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["setup_env.sh", "scripts/run_all.sh", "scripts/run_tests.sh", ".ci/run"]
REQUIREMENTS = ("requirements.txt", "requirements-no-deps.txt")
REAL_TOOLS = ("bash", "env", "sed", "grep", "cat", "cp", "mkdir", "dirname", "basename")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shell scripts")

# Answers what the scripts ask an interpreter, logs what they ask pip for, and "makes" environments of itself.
PYTHON = """#!/bin/bash
case "$*" in
  *hashlib*) exec "{real}" "$@" ;;
  *version_info*) echo {version} ;;
  *"import venv"*) exit {no_venv} ;;
  *sys.executable*) echo "$0" ;;
  *sysconfig*) ;;
  *urllib*) echo "asks ${{*:3}}" >>"$LOG"; [ -n "$CPU_INDEX_ANSWERS" ] ;;
  *'version("torch")'*) [ -n "$FAKE_TORCH" ] && echo "$FAKE_TORCH" ;;
  *torch.version.cuda*) echo "${{FAKE_CUDA-13.0}}" ;;
  --version) echo "Python {version}.1" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*)
    echo "MAX_JOBS=$MAX_JOBS pip ${{*:3}}" >>"$LOG"
    if [ -n "$PIP_FAILS" ] && [[ "$*" == *"$PIP_FAILS"* ]]; then echo "$PIP_SAYS" >&2; exit "${{PIP_CODE:-1}}"; fi
    ;;
  "- "*) echo "TABLE gpu=$2" ;;
  *) echo "stand-in python: $*" >&2; exit 99 ;;
esac
"""
# What an installation asks pip for.
INSTALLS = [
    "MAX_JOBS= pip install --quiet --requirement requirements.txt",
    "MAX_JOBS= pip install --quiet --no-deps --requirement requirements-no-deps.txt",
]
CONDA = """#!/bin/bash
prefix="$CONDA_HOME/$ENV_NAME_EXPECTED"
case "$1" in
  run) [ "$3" = "$ENV_NAME_EXPECTED" ] && [ -x "$prefix/bin/python" ] && shift 4 && exec "$prefix/bin/python" "$@" ;;
  create) echo "conda $*" >>"$LOG"; mkdir -p "$prefix/bin" && cp "$CONDA_HOME/python" "$prefix/bin/python" ;;
esac
"""


class Machine:
    """A copy of the scripts and a PATH that holds only what is put there."""

    def __init__(self, folder: Path):
        self.tree, self.bin, self.log = folder / "tree", folder / "bin", folder / "log"
        self.bin.mkdir()
        self.log.touch()
        for name in (*SCRIPTS, *REQUIREMENTS, "config.py"):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        for tool in REAL_TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.variables = {"PATH": str(self.bin), "HOME": str(folder), "LOG": str(self.log)}
        self.system("Linux", memory_gib=32, cores=8)

    def put(self, name: str, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def system(self, name, memory_gib, cores, release="6.1.0", machine="x86_64"):
        self.put(
            "uname", f'#!/bin/bash\ncase "$1" in -s) echo {name} ;; -r) echo {release} ;; -m) echo {machine} ;; esac\n'
        )
        pages = memory_gib * 2**30 // 4096
        answers = f"_PHYS_PAGES) echo {pages} ;; PAGE_SIZE) echo 4096 ;; _NPROCESSORS_ONLN) echo {cores} ;;"
        self.put("getconf", f'#!/bin/bash\ncase "$1" in {answers} esac\n')
        self.put("sysctl", f"#!/bin/bash\necho {memory_gib * 2**30}\n")

    def python(self, name="python3", version="3.12", venv=True):
        text = PYTHON.format(real=sys.executable, version=version, no_venv=int(not venv))
        return self.put(name, text)

    def gpu(self, driver="580.65.06"):
        return self.put(
            "nvidia-smi", f"#!/bin/bash\necho 'NVIDIA GeForce RTX 3060, 12288 MiB, {driver}'\necho 'a second card'\n"
        )

    def nvcc(self, version="13.0"):
        self.put("nvcc", f"#!/bin/bash\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")

    def conda(self, version="3.12"):
        home = self.bin.parent / "conda"
        text = PYTHON.format(real=sys.executable, version=version, no_venv=0)
        self.put("python", text, home)
        self.variables |= {"CONDA_HOME": str(home), "ENV_NAME_EXPECTED": "blockffn-mamba"}
        self.put("conda", CONDA)
        return home / "blockffn-mamba"

    def run(self, script, *arguments, cwd=None, **variables):
        return subprocess.run(
            ["bash", str(self.tree / script), *arguments],
            cwd=cwd or self.tree,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )

    def setup(self, *arguments, **variables):
        return self.run("setup_env.sh", *arguments, **variables)

    def take_log(self, asks=False):
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return [line for line in lines if asks or not line.startswith("asks ")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_syntax(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)
    if shutil.which("shellcheck"):
        run = subprocess.run(["shellcheck", ROOT / script], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_requirements_are_exact_and_installed():
    """The pins are what the tests run with; a package that is pinned for this platform is there in that version."""
    from importlib.metadata import version

    from packaging.requirements import Requirement

    lines = [
        line for name in REQUIREMENTS for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"
    ]
    assert len(lines) > 20
    for requirement in map(Requirement, lines):
        assert re.fullmatch(r"==[0-9.]+", str(requirement.specifier)), requirement
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name)), requirement


def test_no_requirement_brings_pycosat_which_must_be_compiled():
    """requirements.txt with all that its packages ask for, by what they say where they are installed."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    names = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(name)
        try:
            wanted += requires(name) or []
        except PackageNotFoundError:  # asked for, but not here: its name is all there is to know
            pass
    assert len(names) > 100 and "pycosat" not in names


# --- which Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14"])
def test_unsupported_python_is_named_in_one_line(machine, version):
    machine.python(version=version)
    run = machine.setup()
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert f"python3 is {version}" in run.stderr and "3.11, 3.12 or 3.13" in run.stderr
    assert not (machine.tree / ".venv").exists()


def test_no_python_at_all(machine):
    run = machine.setup()
    assert run.returncode == 2 and "no python3 found" in run.stderr


def test_an_older_python3_does_not_hide_a_newer_one(machine):
    machine.python("python3", "3.10")
    machine.put("python3.13", "#!/bin/bash\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")  # empty shim
    machine.python("python3.11", "3.11")
    run = machine.setup("--dry-run")
    assert run.returncode == 0, run.stderr
    assert f"would run: {machine.bin}/python3.11 -m venv .venv" in run.stdout


def test_python_without_venv_says_which_package(machine):
    machine.python(version="3.12", venv=False)
    run = machine.setup()
    assert run.returncode == 2 and "python3.12-venv" in run.stderr


def test_an_environment_of_an_unsupported_python_is_refused(machine):
    machine.python()
    assert machine.setup().returncode == 0
    machine.put("python", PYTHON.format(real=sys.executable, version="3.10", no_venv=0), machine.tree / ".venv/bin")
    run = machine.setup()
    assert run.returncode == 2 and "has a Python 3.10" in run.stderr and "rm -r .venv" in run.stderr


# --- why pip failed -----------------------------------------------------------------------------------------------

BROKEN = "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError'"
NO_VERSION = """
ERROR: Could not find a version that satisfies the requirement gguf==9.9 (from versions: {})
ERROR: No matching distribution found for gguf==9.9"""
BUILD = """  error: subprocess-exited-with-error
      {}
  note: This error originates from a subprocess, and is likely not a problem with pip.
  ERROR: Failed building wheel for pycosat
error: failed-wheel-build-for-install
"""
NO_FILE = "error: [Errno 2] No such file or directory: 'gcc'"
PIP_FAILURES = {  # what pip says (pip 23 and 26): what setup_env.sh makes of it
    BUILD.format(NO_FILE): "pycosat has no wheel for Python 3.12 on Linux x86_64 and must be compiled, but there is no",
    BUILD.format("error: command 'gcc' failed: No such file or directory"): "there is no compiler. Install one",
    BUILD.format("error: command '/usr/bin/gcc' failed with exit code 1"): "and building it failed",
    BUILD.format("fatal error: No space left on device"): "the disk is full",
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device": "the disk is full",
    BROKEN + NO_VERSION.format("none"): "a package index could not be reached. Check the network",
    NO_VERSION.format("0.18.0, 0.19.0"): "no package index that answered has gguf==9.9 for Python 3.12 on Linux x86_64",
    NO_VERSION.format("none"): "no package index that answered has gguf==9.9",
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.": "is not the one that its index names",
    "python: No module named pip": "the environment has no pip. Remove it (rm -r .venv)",
    "ERROR: something new": "exit code 1; its messages are above",
}


@pytest.mark.parametrize("says", PIP_FAILURES)
def test_pip_failures_are_told_by_their_true_cause(machine, says):
    machine.python()
    run = machine.setup(PIP_FAILS="--requirement requirements.txt", PIP_SAYS=says)
    assert run.returncode == 2
    messages, _, error = run.stderr.rpartition("\nerror: pip could not install requirements.txt: ")
    assert messages.strip() == says.strip() and PIP_FAILURES[says] in error


def test_a_pip_that_was_killed(machine):
    machine.python()
    run = machine.setup(PIP_FAILS="requirements.txt", PIP_CODE="137")
    assert run.returncode == 2 and "memory runs out" in run.stderr


# --- CPU -----------------------------------------------------------------------------------------------------------


def test_cpu_install_then_nothing_to_do(machine):
    machine.python()
    assert machine.setup("--print-python").returncode == 1
    run = machine.setup()
    assert run.returncode == 0, run.stderr
    assert "TABLE gpu=false" in run.stdout
    assert machine.take_log() == INSTALLS
    again = machine.setup()
    assert again.returncode == 0 and "nothing to do" in again.stdout and "TABLE" in again.stdout
    assert machine.take_log() == []
    assert machine.setup("--print-python").stdout == f"{machine.tree}/.venv/bin/python\n"
    # New pins, or --force, install again.
    assert machine.setup("--force").returncode == 0 and machine.take_log() == INSTALLS
    for name in REQUIREMENTS:
        with open(machine.tree / name, "a") as file:
            file.write("wheel==0.45.1\n")
        assert machine.setup("--print-python").returncode == 1
        assert machine.setup().returncode == 0 and machine.take_log() == INSTALLS


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_an_interrupted_installation_is_not_complete(machine, name):
    machine.python()
    run = machine.setup(PIP_FAILS=name)
    assert run.returncode == 2
    assert f"error: pip could not install {name}: exit code 1" in run.stderr
    assert machine.setup("--print-python").returncode == 1
    assert machine.setup().returncode == 0
    assert machine.setup("--print-python").returncode == 0


def test_cpu_index_is_used_when_it_answers(machine):
    machine.python()
    assert machine.setup(CPU_INDEX_ANSWERS="1").returncode == 0
    probe, torch, *rest = machine.take_log(asks=True)
    assert probe == "asks https://download.pytorch.org/whl/cpu/torch/"
    assert torch.endswith("--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0")
    assert rest == INSTALLS


def test_cpu_index_that_fails_is_passed_over(machine):
    machine.python()
    run = machine.setup(CPU_INDEX_ANSWERS="1", PIP_FAILS="--extra-index-url", PIP_SAYS="what pip says")
    assert run.returncode == 0 and run.stderr == "what pip says\n"
    assert machine.take_log()[1:] == INSTALLS


def test_torch_index_url_overrides_and_its_failure_is_an_error(machine):
    machine.python()
    run = machine.setup(TORCH_INDEX_URL="https://mirror.example/whl", PIP_FAILS="mirror.example")
    assert run.returncode == 2 and "TORCH_INDEX_URL=https://mirror.example/whl" in run.stderr
    machine.take_log()
    assert machine.setup(TORCH_INDEX_URL="https://mirror.example/whl").returncode == 0
    assert "--extra-index-url https://mirror.example/whl torch==2.13.0" in machine.take_log()[0]
    # Whoever calls next need not know the index.
    assert machine.setup("--print-python").returncode == 0


def test_nvcc_without_a_gpu_builds_nothing(machine):
    machine.python()
    machine.nvcc()
    assert machine.setup().returncode == 0
    assert machine.take_log() == INSTALLS


# --- NVIDIA --------------------------------------------------------------------------------------------------------


def test_gpu_with_nvcc_builds_the_kernels(machine):
    machine.python()
    machine.gpu()
    machine.nvcc()
    machine.system("Linux", memory_gib=15, cores=8)
    run = machine.setup()
    assert run.returncode == 0, run.stderr
    assert "RTX 3060, 12288 MiB, driver 580.65.06" in run.stdout and "TABLE gpu=true" in run.stdout
    log = machine.take_log()
    assert not any("--extra-index-url" in line for line in log)  # PyPI's own torch is the CUDA build
    kernels = [line for line in log if "--no-build-isolation" in line]
    assert ["causal-conv1d==" in kernels[0], "mamba-ssm==" in kernels[1], len(kernels)] == [True, True, 2]
    assert all(line.startswith("MAX_JOBS=3 ") and "--constraint requirements.txt" in line for line in kernels)
    assert "nothing to do" in machine.setup().stdout and machine.take_log() == []


@pytest.mark.parametrize(("memory_gib", "cores", "preset", "jobs"), [(64, 4, "", 4), (2, 8, "", 1), (64, 8, "5", 5)])
def test_max_jobs(machine, memory_gib, cores, preset, jobs):
    machine.python()
    machine.gpu()
    machine.nvcc()
    machine.system("Linux", memory_gib=memory_gib, cores=cores)
    variables = {"MAX_JOBS": preset} if preset else {}
    assert f"MAX_JOBS={jobs} (" in machine.setup("--dry-run", **variables).stdout


@pytest.mark.parametrize("failing", ["mamba-ssm", "causal-conv1d", "setuptools"])
def test_a_failed_kernel_build_is_explained_and_not_fatal(machine, failing):
    machine.python()
    machine.gpu()
    machine.nvcc()
    run = machine.setup(PIP_FAILS=failing, PIP_SAYS="OSError: [Errno 28]")
    assert run.returncode == 0
    assert "the disk is full" in run.stdout and "Nothing is lost but speed" in run.stdout and "TABLE" in run.stdout
    assert "nothing to do" in machine.setup().stdout


def test_gpu_without_nvcc_or_with_another_cuda(machine):
    machine.python()
    machine.gpu()
    run = machine.setup()
    assert run.returncode == 0 and "no nvcc on the PATH" in run.stdout
    machine.nvcc("12.4")
    run = machine.setup("--force")
    assert run.returncode == 0 and "nvcc is 12.4 but torch was built for CUDA 13.0" in run.stdout
    assert not any("--no-build-isolation" in line for line in machine.take_log())


def test_older_drivers(machine):
    machine.python()
    machine.gpu("560.35.03")
    run = machine.setup("--dry-run")
    assert "taking torch for CUDA 12.6" in run.stdout and "whl/cu126 torch==2.13.0" in run.stdout
    machine.gpu("470.256.02")
    run = machine.setup("--dry-run")
    assert run.returncode == 0 and "driver 470.256.02 is too old" in run.stdout


def test_a_gpu_that_came_later_replaces_the_cpu_build(machine):
    machine.python()
    assert machine.setup().returncode == 0
    machine.take_log()
    machine.gpu()
    assert machine.setup("--print-python").returncode == 1
    assert machine.setup(FAKE_TORCH="2.13.0+cpu").returncode == 0
    assert machine.take_log() == ["MAX_JOBS= pip uninstall --quiet --yes torch", *INSTALLS]


def test_a_broken_driver_is_said_and_goes_on_without_gpu(machine):
    machine.python()
    machine.put("nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    run = machine.setup()
    assert run.returncode == 0 and "finds no GPU" in run.stdout and "TABLE gpu=false" in run.stdout


# --- conda, WSL2, macOS, arguments ---------------------------------------------------------------------------------


def test_conda_environment_by_name(machine):
    prefix = machine.conda()
    run = machine.setup()
    assert run.returncode == 0, run.stderr
    log = machine.take_log()
    create = "conda create -y -q -n blockffn-mamba --override-channels -c conda-forge python=3.12 pip"
    assert log == [create, *INSTALLS]
    assert "conda activate blockffn-mamba" in run.stdout
    assert not (machine.tree / ".venv").exists()
    assert "nothing to do" in machine.setup().stdout and machine.take_log() == []
    assert machine.setup("--print-python").stdout == f"{prefix}/bin/python\n"


def test_conda_environment_of_an_unsupported_python(machine):
    machine.conda(version="3.10")
    run = machine.setup()  # what `conda create` makes is the stand-in, so the check is of the second call
    run = machine.setup()
    assert run.returncode == 2 and "conda env remove -n blockffn-mamba" in run.stderr


def test_a_venv_that_is_there_stays_in_use_beside_conda(machine):
    machine.python()
    assert machine.setup().returncode == 0
    machine.conda()
    assert machine.setup("--print-python").stdout == f"{machine.tree}/.venv/bin/python\n"


@pytest.mark.parametrize(("memory_gib", "hint"), [(7, True), (24, False)])
def test_wsl2_memory_hint(machine, memory_gib, hint):
    machine.python()
    machine.system("Linux", memory_gib=memory_gib, cores=4, release="5.15.167.4-microsoft-standard-WSL2")
    run = machine.setup("--dry-run")
    assert run.returncode == 0
    assert (".wslconfig" in run.stdout) == hint


def test_macos_takes_pips_own_index(machine):
    machine.python()
    machine.system("Darwin", memory_gib=16, cores=8, machine="arm64")
    run = machine.setup(CPU_INDEX_ANSWERS="1")
    assert run.returncode == 0, run.stderr
    assert machine.take_log(asks=True) == INSTALLS
    machine.system("Darwin", memory_gib=16, cores=8, machine="x86_64")
    run = machine.setup()
    assert run.returncode == 2 and "Intel Macs" in run.stderr


def test_dry_run_changes_nothing(machine):
    machine.python()
    before = sorted(machine.tree.rglob("*"))
    run = machine.setup("--dry-run")
    assert run.returncode == 0 and "nothing was changed" in run.stdout
    assert sorted(machine.tree.rglob("*")) == before and machine.take_log() == []


def test_unknown_argument_and_help(machine):
    run = machine.setup("--frobnicate")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--frobnicate" in run.stderr
    assert "--print-python" in machine.setup("--help").stdout
    assert "--quick" in machine.run("scripts/run_all.sh", "--help").stdout


# --- run_all.sh, run_tests.sh, .ci/run -------------------------------------------------------------------------------

STEPS = [
    "01_download_model",
    "02_inspect_model",
    "03_extract_routing",
    "04_test_sidecar",
    "05_sweep_alpha",
    "06_replace_layer",
    "07_gated_hybrid",
]
JOURNEY_STEPS = ["journeys/01_collect", "journeys/02_analyze", "journeys/03_predict"]
STEP = """
import os, sys, pathlib
script = pathlib.Path(__file__).resolve()
root = next(folder for folder in script.parents if (folder / "config.py").is_file())
sys.path.insert(0, str(root))
import config
with open(os.environ["LOG"], "a") as log:
    print(script.relative_to(root / "scripts").with_suffix(""), *sys.argv[1:], file=log)
for folder in (config.MODEL_OUTPUT_DIR, config.JOURNEYS_DIR):
    folder.mkdir(parents=True, exist_ok=True)
sys.exit(int(os.environ.get("FAIL_" + script.stem[:2], "0")))
"""


@pytest.fixture
def study(machine):
    """The run scripts around stand-ins for the scripts, in an environment that is the one the tests run in."""
    machine.put("setup_env.sh", f"#!/bin/bash\necho '{sys.executable}'\n", machine.tree)
    for name in STEPS + JOURNEY_STEPS:
        script = machine.tree / "scripts" / f"{name}.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(STEP)
    return machine


def test_run_all_stops_at_a_failing_step_with_its_name(study):
    run = study.run("scripts/run_all.sh", FAIL_03="2")
    assert run.returncode == 2
    assert "03_extract_routing failed with exit code 2" in run.stderr
    assert [line.split()[0] for line in study.take_log()] == STEPS[:3]
    assert "--- 02_inspect_model: " in run.stdout and "All steps" not in run.stdout


def test_run_all_passes_its_flags_on(study, tmp_path):
    run = study.run(
        "scripts/run_all.sh",
        *("--quick", "--model", "org/name", "--seed", "7", "--device", "cpu", "--output-dir", "results"),
        cwd=tmp_path,
        FAIL_07="1",
    )
    assert run.returncode == 1
    flags = f"--model org/name --output-dir {tmp_path}/results --quick"
    # 02 draws nothing, so it takes no seed
    seeds = ["" if name == "02_inspect_model" else " --seed 7" for name in STEPS]
    assert study.take_log() == [f"{name} {flags}{seed} --device cpu" for name, seed in zip(STEPS, seeds, strict=True)]
    assert (tmp_path / "results" / "org-name-quick").is_dir()


def test_run_all_takes_a_folder_from_where_the_caller_stands(study, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    study.run("scripts/run_all.sh", "--model", "runs/mine", cwd=tmp_path, FAIL_01="1")
    assert f"--model {tmp_path}/runs/mine " in study.take_log()[0]


@pytest.mark.parametrize("arguments", [["--nope"], ["--model"], ["--seed", ""]])
def test_run_all_refuses_wrong_arguments_before_doing_anything(study, arguments):
    run = study.run("scripts/run_all.sh", *arguments)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert study.take_log() == []


def test_run_all_executes_both_notebooks_on_the_results_of_this_run(study):
    nbformat = pytest.importorskip("nbformat")
    cells = [
        nbformat.v4.new_code_cell(
            "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path.cwd().parent))\n"
            "import config\nprint('kernel', sys.executable)\nprint('folder', config.MODEL_OUTPUT_DIR)"
        ),
        nbformat.v4.new_code_cell("import matplotlib.pyplot as plt\nplt.plot([0, 1])\nplt.show()"),
    ]
    (study.tree / "notebooks").mkdir()
    notebook = study.tree / "notebooks" / "visualize_routing.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    journey_cell = nbformat.v4.new_code_cell(cells[0].source.replace("MODEL_OUTPUT_DIR", "JOURNEYS_DIR"))
    nbformat.write(
        nbformat.v4.new_notebook(cells=[journey_cell]), study.tree / "notebooks" / "moe_routing_analysis.ipynb"
    )
    committed = notebook.read_bytes()
    # MPLBACKEND=agg in the caller's shell must not take the figures out of the report.
    run = study.run(
        "scripts/run_all.sh", "--quick", "--journey-model", "org/moe", "--seed", "3", "--device", "cpu",
        MPLBACKEND="agg",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    folder, journeys = (study.tree / "outputs" / name for name in ("blockffn-tiny-quick", "org-moe-quick/journeys"))
    assert [line.split()[1] for line in run.stdout.splitlines() if line.startswith("=== ")] == [
        *STEPS, "visualize_routing", "report.html", *JOURNEY_STEPS, "moe_routing_analysis", "report.html"
    ]  # fmt: skip
    flags = f"--output-dir {study.tree}/outputs --quick"
    seeds = ["" if name == "02_inspect_model" else " --seed 3" for name in STEPS]
    expected = [f"{name} --model blockffn-tiny {flags}{seed} --device cpu" for name, seed in zip(STEPS, seeds, strict=True)]
    flags += " --seed 3"
    expected += [f"{JOURNEY_STEPS[0]} --model org/moe {flags} --device cpu --hidden-problems 12 --restart"]
    # these run no model, so they take no device
    expected += [f"{name} --model org/moe {flags}" for name in JOURNEY_STEPS[1:]]
    assert study.take_log() == expected
    text, figure = nbformat.read(folder / "visualize_routing.ipynb", as_version=4).cells
    assert text.outputs[0].text == f"kernel {sys.executable}\nfolder {folder}\n"
    assert [list(output.get("data", {})) for output in figure.outputs if "image/png" in output.get("data", {})]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert str(folder) in report and "data:image/png;base64," in report
    (text,) = nbformat.read(journeys / "moe_routing_analysis.ipynb", as_version=4).cells
    assert text.outputs[0].text == f"kernel {sys.executable}\nfolder {journeys}\n"
    assert str(journeys) in (journeys / "report.html").read_text(encoding="utf-8")
    assert str(journeys) in run.stdout.splitlines()[-1] and str(folder) in run.stdout.splitlines()[-2]
    assert notebook.read_bytes() == committed
    assert not (study.tree / "outputs" / "blockffn-tiny").exists()


@pytest.mark.parametrize(("ruff", "tests", "expected"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 5, 5)])
def test_run_tests_exit_code_is_honest(machine, ruff, tests, expected):
    answers = f'case "$2" in ruff) exit {ruff} ;; pytest) echo "HUB=$HF_HUB_OFFLINE ${{*:3}}"; exit {tests} ;; esac'
    python = machine.put("test-python", f"#!/bin/bash\n{answers}\n")
    machine.put("setup_env.sh", f"#!/bin/bash\necho {python}\n", machine.tree)
    run = machine.run("scripts/run_tests.sh", "-k", "stats")
    assert run.returncode == expected
    assert "HUB=1 -k stats" in run.stdout  # the tests run even where ruff finds fault


def test_run_scripts_make_the_environment_when_there_is_none(machine):
    setup = """#!/bin/bash
if [ "$1" = --print-python ]; then [ -f made ] && echo "$PWD/python"; exit; fi
echo "making it" && touch made
"""
    machine.put("setup_env.sh", setup, machine.tree)
    (machine.bin / "touch").symlink_to(shutil.which("touch"))
    machine.put("python", "#!/bin/bash\nexit 0\n", machine.tree)
    run = machine.run("scripts/run_tests.sh")
    assert run.returncode == 0 and "making it" in run.stdout
    assert "making it" not in machine.run("scripts/run_tests.sh").stdout


@pytest.mark.parametrize(("tests", "study_code", "expected"), [(0, 0, 0), (3, 0, 3), (0, 2, 2), (3, 2, 3)])
def test_ci_runs_both_and_its_exit_code_is_honest(machine, tests, study_code, expected):
    machine.put("run_tests.sh", f'echo "tests CI=$CI"\nexit {tests}\n', machine.tree / "scripts")
    machine.put("run_all.sh", f'echo "study $* $(cat)"\nexit {study_code}\n', machine.tree / "scripts")
    run = machine.run(".ci/run")
    assert run.returncode == expected
    assert run.stdout == "study --quick \ntests CI=true\n"


def test_stamp_names_the_python_it_was_made_for(machine):
    machine.python()
    machine.setup()
    (stamp,) = (machine.tree / ".venv").glob(".blockffn-mamba-setup")
    assert f"python {platform.python_version()} gpu false" in stamp.read_text()

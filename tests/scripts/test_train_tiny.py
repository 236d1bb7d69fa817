"""train_tiny.py's command line: what it refuses, and that it does so before torch is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "dev" / "train_tiny.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neither"], "neither"),
        (["train", "--tokens", "0"], "--tokens"),
        (["train", "--log-every", "0"], "--log-every"),
        (["train", "--cache", "no/such/folder"], "prepare the text first"),
        (["export", "--validation-sequences", "4"], "--validation-sequences"),
        (["prepare", "--wikipedia", "no/such/folder", "--gsm8k", "x", "--mbpp", "y"], "no/such/folder"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message):
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["prepare", "train", "export", "evaluate"])
def test_help_needs_no_torch(command):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train_tiny.py', sys.argv[2], '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, "-", command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--cache" in run.stdout

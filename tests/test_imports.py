"""The house's order, read from the source: which package may import which, and how long files and functions may be."""

import ast
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
# Package or module at the top of src -> those whose names it may import, besides its own.
ALLOWED = {
    "base": set(),
    "models": {"base"},
    "routing_extractor": {"base", "models"},
    "eval_utils": {"base", "models"},
    "hybrid": {"base", "models", "routing_extractor", "eval_utils"},
    "gating": {"base", "models", "routing_extractor", "eval_utils", "hybrid"},
    "journeys": {"base", "models", "routing_extractor", "eval_utils"},
    "figures": {"base"},
    "mamba_sidecar": {"base", "models", "routing_extractor", "eval_utils", "hybrid"},
}
FILE_LINES, FUNCTION_LINES, SCRIPT_LINES, FILES_AT_TOP = 600, 70, 200, 5
SHARED_LINES = 6


def imported(path: Path) -> set[str]:
    """The full names of all modules and names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """The package of a file of src, or the module's own name at the top."""
    return path.relative_to(ROOT / "src").with_suffix("").parts[0]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=shown)
def test_imports_run_one_way(path):
    own = part_of(path)
    taken = {name.split(".")[1] for name in imported(path) if name.startswith("src.")}
    assert own in ALLOWED, f"say in this test what {own} may import"
    assert taken - {own} <= ALLOWED[own], f"{own} imports {sorted(taken - {own} - ALLOWED[own])}"


def test_the_order_has_no_circle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if part not in done and below <= done}
        assert ready, f"{sorted(set(ALLOWED) - done)} import one another"
        done |= ready


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_src_knows_neither_config_nor_scripts_nor_tests(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"config", "scripts", "tests"}


@pytest.mark.parametrize("path", SCRIPTS, ids=shown)
def test_scripts_import_no_scripts(path):
    stems = {script.stem for script in SCRIPTS}
    assert not {name.split(".")[0] for name in imported(path)} & ({"scripts", "tests"} | stems)


def test_figures_need_no_torch():
    files = sorted(path.stem for path in (ROOT / "src" / "figures").glob("*.py") if path.stem != "__init__")
    code = f"import sys\nfrom src.figures import {', '.join(files)}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS, ROOT / "config.py"], ids=shown)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= (SCRIPT_LINES if path in SCRIPTS else FILE_LINES)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


def test_src_shows_three_doors():
    files = {path.name for path in (ROOT / "src").glob("*.py")}
    assert {"routing_extractor.py", "mamba_sidecar.py", "eval_utils.py"} <= files and len(files) <= FILES_AT_TOP


def runs_of_lines(text: str) -> set[tuple[str, ...]]:
    """Every run of SHARED_LINES consecutive lines, imports included; indentation and blank lines do not count."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(lines[start : start + SHARED_LINES]) for start in range(len(lines) - SHARED_LINES + 1)}


def test_no_two_scripts_share_six_lines():
    runs = {shown(path): runs_of_lines(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    shared = {(one, other): runs[one] & runs[other] for one, other in combinations(runs, 2)}
    assert {pair: found for pair, found in shared.items() if found} == {}

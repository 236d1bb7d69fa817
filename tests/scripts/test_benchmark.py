"""benchmark.py in this process: the figures it prints and keeps, and what it refuses."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.tiny import blockffn_folder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "dev" / "benchmark.py"


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Run the script, sparing its imports: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds the repository to it
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def figures_of(benchmark, tmp_path):
    """The figures of a run on a golden checkpoint, which are printed and kept alike."""
    blockffn_folder(tmp_path / "model")

    def run(command, *arguments):
        model = () if command == "journeys" else ("--model", tmp_path / "model", "--device", "cpu")
        code, output, errors = benchmark(command, *model, "--repeats", 1, "--save", tmp_path / "kept", *arguments)
        assert code == 0, errors
        figures = json.loads(output.splitlines()[-1])
        assert json.loads((tmp_path / "kept" / f"{command}.json").read_text()) == figures
        meta = json.loads((tmp_path / "kept" / f"{command}.json.meta.json").read_text())
        assert meta["arguments"]["repeats"] == 1 and meta["device"] == "cpu"
        assert figures["benchmark"] == command
        return figures

    return run


def test_eval_compares_scoring_with_its_products(figures_of, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{i}. Two roads met there, and {i} of us."}) + "\n" for i in range(40))
    )
    figures = figures_of("eval", "--dataset", text, "--documents", 6, "--window-tokens", 48, "--stride", 24)
    # one round: the three figures are of the same two times
    expected = figures["tokens_per_second"] / figures["matmul_tokens_per_second"]
    assert figures["ratio"] == pytest.approx(expected, rel=1e-3)
    assert figures["tokens"] > 100 and figures["positions_per_token"] >= 1


@pytest.mark.parametrize(
    ("command", "flags"), [("capture", ["--window-tokens", 48]), ("collect", ["--problems", 3, "--prompt-tokens", 48])]
)
def test_costs_over_plain_forwards(figures_of, command, flags):
    figures = figures_of(command, *flags)
    assert figures["ratio"] == pytest.approx(figures["capture_seconds"] / figures["plain_seconds"], rel=1e-3)
    assert figures["cost_percent"] == pytest.approx(100 * (figures["ratio"] - 1), abs=0.01)
    if command == "capture":
        assert figures["tokens"] == 48
    else:
        assert figures["problems"] == 3 and 3 < figures["tokens"] <= 3 * 48


def test_journeys_in_arrays_and_in_loops(figures_of):
    figures = figures_of("journeys", "--journeys", 200)
    assert (figures["journeys"], figures["layers"], figures["experts"]) == (200, 32, 8)
    assert figures["largest_difference"] < 1e-9
    assert figures["speedup"] == pytest.approx(figures["loop_seconds"] / figures["seconds"], rel=1e-3)
    assert figures["speedup"] > 5 and figures["analysis_seconds"] > 0
    assert "speedup" not in figures_of("journeys", "--journeys", 200, "--no-loops")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("neither",), "neither"),
        (("eval", "--repeats", 0), "--repeats"),
        (("journeys", "--stride", 9), "--stride"),
        (("capture", "--model", "no/such/folder/here"), "no/such/folder/here"),
    ],
)
def test_what_is_wrong_is_one_line(benchmark, arguments, message):
    code, _, errors = benchmark(*arguments)
    assert code == 2 and message in errors and len(errors.splitlines()) == 1

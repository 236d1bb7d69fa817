"""results.py, errors and config.py: reproducible bytes, atomic writes, provenance, agreeing paths."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import config
from src.base import cli, results

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"alpha": "baseline", "perplexity": 12.345678901234, "ok": True, "note": None},
    {"alpha": 0.3, "perplexity": float("nan"), "ok": False, "note": "a,b", "flops": 12345678901},
]


def make_meta(**changes):
    settings = {"arguments": {"alpha": 0.3}, "model": {"sha256": "m"}, "data": {"sha256": "d"}, "seeds": {"seed": 0}}
    return results.run_meta(
        **{**settings, "started": time.time(), "device": "cpu", "dtype": "torch.float32", **changes}
    )


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


# --- writing -------------------------------------------------------------------------------------------------------


def test_csv_cells(tmp_path):
    path = results.write_csv(tmp_path / "new" / "a.csv", ROWS, make_meta())
    assert path.read_bytes() == (
        b'alpha,perplexity,ok,note,flops\nbaseline,12.3456789,True,,\n0.3,,False,"a,b",12345678901\n'
    )


def test_csv_of_rows_and_of_frame_are_the_same(tmp_path):
    rows = [{"a": 1, "b": 0.1}, {"a": 2, "b": 1e-9}]
    one = results.write_csv(tmp_path / "rows.csv", rows, make_meta())
    two = results.write_csv(tmp_path / "frame.csv", pd.DataFrame(rows), make_meta())
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (1.0, "1"),
        (np.float32(0.5), "0.5"),
        (None, ""),
        (math.nan, ""),
        (math.inf, "inf"),
        (12345678901.0, "12345678901"),
        (12345678901.4, "12345678900"),
        (1e300, "1e+300"),
        (-2.5e-7, "-2.5e-07"),
        (7, "7"),
        ("x", "x"),
    ],
)
def test_format_value(value, text):
    assert results.format_value(value) == text


def test_same_content_gives_same_bytes_at_another_time(tmp_path, monkeypatch):
    arrays = {"sparsity": np.arange(6.0).reshape(2, 3), "ids": np.array([3, 1], dtype=np.int64)}
    first = results.write_npz(tmp_path / "1.npz", arrays, make_meta()).read_bytes()
    later = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(later))
    assert results.write_npz(tmp_path / "2.npz", arrays, make_meta()).read_bytes() == first


def test_npz_reads_back(tmp_path):
    arrays = {"sparsity": np.random.default_rng(0).random((4, 5)), "token": np.array(["a", "bc"])}
    with np.load(results.write_npz(tmp_path / "a.npz", arrays, make_meta()), allow_pickle=False) as loaded:
        assert set(loaded.files) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array)
            assert loaded[name].dtype == array.dtype


def test_npz_refuses_objects_and_leaves_the_earlier_file(tmp_path):
    path = results.write_npz(tmp_path / "a.npz", {"x": np.ones(2)}, make_meta())
    earlier = path.read_bytes()
    with pytest.raises(ValueError, match="[Oo]bject"):
        results.write_npz(path, {"x": np.array([{}], dtype=object)}, make_meta())
    assert path.read_bytes() == earlier


def test_json_of_what_numpy_and_dataclasses_hold(tmp_path):
    @dataclass
    class Interval:
        low: float

    obj = {"a": np.float32(0.5), "b": np.arange(2), "c": math.nan, 1: Interval(0.25), "é": Path("x") / "y"}
    loaded = json.loads(results.write_json(tmp_path / "a.json", obj, make_meta()).read_text(encoding="utf-8"))
    assert loaded == {"a": 0.5, "b": [0, 1], "c": None, "1": {"low": 0.25}, "é": "x/y"}


def test_json_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(TypeError, match="set"):
        results.write_json(tmp_path / "a.json", {"a": {1}}, make_meta())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_file_and_no_rubbish(tmp_path, monkeypatch):
    path = results.write_json(tmp_path / "a.json", "earlier", make_meta())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        results.write_json(path, "later", make_meta())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_meta_beside_the_file(tmp_path):
    path = results.write_csv(
        tmp_path / "a.csv", ROWS, make_meta(started=time.time() - 2, arguments={"out": ROOT / "x"})
    )
    meta = json.loads((tmp_path / "a.csv.meta.json").read_text(encoding="utf-8"))
    assert results.meta_path(path) == tmp_path / "a.csv.meta.json"
    assert meta["arguments"] == {"out": "x"}  # no path of this machine
    assert str(ROOT) not in json.dumps(meta)
    assert meta["model"] == {"sha256": "m"} and meta["data"] == {"sha256": "d"} and meta["seeds"] == {"seed": 0}
    assert meta["device"] == "cpu" and meta["dtype"] == "float32"
    assert meta["packages"]["numpy"] == np.__version__ and meta["packages"]["pandas"] == pd.__version__
    assert 2 <= meta["wall_seconds"] < 60


def test_git_commit_is_that_of_this_repository_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    assert make_meta()["git_commit"] is None
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
    try:
        subprocess.run((*git, "init", "-q"), check=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    (tmp_path / "file").write_text("1")
    subprocess.run((*git, "add", "file"), check=True)
    subprocess.run((*git, "commit", "-q", "-m", "one"), check=True)
    commit = subprocess.run((*git, "rev-parse", "HEAD"), check=True, capture_output=True, text=True).stdout.strip()
    assert (make_meta()["git_commit"], make_meta()["git_dirty"]) == (commit, False)
    (tmp_path / "file").write_text("2")
    assert make_meta()["git_dirty"] is True
    # An archive unpacked inside some other checkout has no commit.
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(results, "REPOSITORY", tmp_path / "inner")
    assert make_meta()["git_commit"] is None


def test_many_floats_survive_reading_and_writing(tmp_path):
    numbers = np.random.default_rng(0).standard_normal(500) * 10.0 ** np.random.default_rng(1).integers(-12, 12, 500)
    path = results.write_csv(tmp_path / "a.csv", [{"k": i, "x": x} for i, x in enumerate(numbers)], make_meta())
    earlier, table = path.read_bytes(), pd.read_csv(path)
    assert results.write_csv(path, table, make_meta()).read_bytes() == earlier
    np.testing.assert_allclose(table["x"], numbers, rtol=1e-9)
    np.testing.assert_array_equal(table["x"], results.as_written(numbers))


def test_results_does_not_import_torch():
    run = run_python("import sys, src.base.results; sys.exit('torch' in sys.modules)")
    assert run.returncode == 0


# --- folders -------------------------------------------------------------------------------------------------------

NAMES = [
    "blockffn-tiny",
    "SparseLLM/BlockFFN-3B-SFT",
    "./runs/a/",
    "../models/b_1.5",
    "/data/checkpoints/final",
    "C:\\models\\x y",
    "~/llm",
    ".",
    "名前",
]


def test_slugs_are_single_folder_names():
    assert results.model_slug("blockffn-tiny") == "blockffn-tiny"
    assert results.model_slug("SparseLLM/BlockFFN-3B-SFT") == "SparseLLM-BlockFFN-3B-SFT"
    for name in NAMES:
        slug = results.model_slug(name)
        assert slug not in ("", ".", "..") and Path(slug).name == slug and not slug.startswith("."), (name, slug)
    assert results.model_slug("runs/a/final") != results.model_slug("runs/b/final")


@pytest.mark.parametrize("quick", ["", "0", "1"])
def test_config_and_results_agree_on_every_path(tmp_path, quick):
    code = """
import importlib, os, sys
import config
from src.base import results
for name in sys.stdin.read().split("\\n"):
    os.environ["BLOCKFFN_MODEL"] = name
    importlib.reload(config)
    assert config.MODEL_NAME == name
    assert config.MODEL_OUTPUT_DIR == results.output_dir(config.OUTPUT_DIR, name, config.QUICK), name
    assert config.GATED_HYBRID_RESULTS_PATH.parent == config.MODEL_OUTPUT_DIR
print(config.OUTPUT_DIR, config.QUICK)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(NAMES),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "BLOCKFFN_OUTPUT_DIR": str(tmp_path), "BLOCKFFN_QUICK": quick, "PYTHONUTF8": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{tmp_path} {quick == '1'}\n"


def test_config_defaults():
    code = """
import json, config
print(json.dumps({k: str(v) for k, v in vars(config).items() if k.isupper()}))
assert not any("$" in p for p in config.TEST_PROMPTS) and len(set(config.TEST_PROMPTS)) >= 8
assert config.ALPHA_SWEEP == [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    settings = json.loads(run.stdout)
    folder = ROOT / "outputs" / "blockffn-tiny"
    assert settings["MODEL_NAME"] == "blockffn-tiny"
    assert settings["OUTPUT_DIR"] == str(ROOT / "outputs")  # absolute: notebooks run in another folder
    assert settings["ROUTING_SIGNALS_PATH"] == str(folder / "routing_signals.json")
    assert settings["ALPHA_SWEEP_RESULTS_PATH"] == str(folder / "alpha_sweep_results.csv")
    assert settings["LAYER_REPLACEMENT_PATH"] == str(folder / "layer_replacement_results.csv")
    assert settings["GATED_HYBRID_RESULTS_PATH"] == str(folder / "gated_hybrid_results.csv")
    other = run_python(
        "import config; print(config.MODEL_OUTPUT_DIR)",
        BLOCKFFN_MODEL="SparseLLM/BlockFFN-3B-SFT",
        BLOCKFFN_OUTPUT_DIR="elsewhere",
    )
    assert other.stdout == f"{ROOT / 'elsewhere' / 'SparseLLM-BlockFFN-3B-SFT'}\n"


def test_a_setting_follows_the_models_profile_and_quick():
    values = {
        (model, quick): [cli.setting(config, name, model, quick) for name in ("MAX_SEQ_LEN", "GATE_SHARES")]
        for model in ("blockffn-tiny", "SparseLLM/BlockFFN-3B-SFT", "some/other")
        for quick in (False, True)
    }
    tiny, other = values["blockffn-tiny", False], values["some/other", False]
    assert tiny == [1024, [0.25, 0.5, 0.75]] and other == values["SparseLLM/BlockFFN-3B-SFT", False]
    assert other == [512, [0.25, 0.5, 0.75]]
    assert values["blockffn-tiny", True] == [1024, [0.5]] and values["some/other", True] == [512, [0.5]]


def test_config_imports_nothing_of_the_repository():
    run = run_python("import sys, config; sys.exit(any(name.split('.')[0] == 'src' for name in sys.modules))")
    assert run.returncode == 0

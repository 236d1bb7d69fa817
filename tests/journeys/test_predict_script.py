"""scripts/10 end to end on a small store: files, columns, resuming, refusals, imported records, same bytes."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.base import cli, results
from src.journeys import predictors, scoring
from src.journeys.records import export_rows
from src.journeys.store import Journeys, routers_file, shard_name, write_hidden, write_shard

ROOT = Path(__file__).resolve().parents[2]
MIXTRAL = ROOT.parent / "shared" / "mixtral_routing"
LAYERS, EXPERTS, SLOTS, PROBLEMS, LENGTH, DIM = 4, 5, 2, 12, 12, 8
SAVED = 10  # problems of each data set with router inputs
METRIC_COLUMNS = "top1 top1_low top1_high top2 slot_overlap whole_set ece"
PREDICTOR_COLUMNS = f"predictor split hop domain {METRIC_COLUMNS} train_seconds predict_us parameters"
LAYER_COLUMNS = f"predictor split hop domain layer rows {METRIC_COLUMNS}"
LEAKAGE_COLUMNS = "predictor hop seeds rows top1_rows_split top1_problem_split leakage ci_low ci_high"
CACHE_COLUMNS = (
    "policy predictor scope capacity bandwidth_gb_s hit_rate mb_per_token stall_ms_per_token ms_per_token speedup "
    "tokens"
)
FAST = ("--epochs", 1, "--train-rows", 300, "--xgboost-values", 1000, "--xgboost-rounds", 2, "--resamples", 40,
        "--cache-tokens", 30, "--bandwidths", 25)  # fmt: skip


def make_journeys(seed: int = 0) -> tuple[Journeys, np.ndarray, np.ndarray]:
    """(journeys of two data sets, router inputs [N, L, D], routers [L, E, D]): a state that drifts over the layers."""
    rng = np.random.default_rng(seed)
    rows = 2 * PROBLEMS * LENGTH
    states = rng.normal(size=(rows, LAYERS, DIM)).astype(np.float32) * 0.4
    states = np.cumsum(np.concatenate((2 * states[:, :1], states[:, 1:]), axis=1), axis=1)
    weight = rng.normal(size=(LAYERS, EXPERTS, DIM)).astype(np.float32)
    logits = np.einsum("nld,led->nle", states, weight)
    experts = np.argsort(-logits, axis=2)[:, :, :SLOTS].astype(np.uint8)
    chosen = np.exp(np.take_along_axis(logits, experts.astype(int), 2))
    return (
        Journeys(
            dataset=np.repeat(["gsm8k", "humaneval"], rows // 2),
            problem_id=np.tile(np.repeat(np.arange(PROBLEMS, dtype=np.int32), LENGTH), 2),
            token_idx=np.tile(np.arange(LENGTH, dtype=np.int32), 2 * PROBLEMS),
            token_id=np.full(rows, -1, dtype=np.int32),
            token=np.full(rows, "", dtype=object),
            is_generated=np.zeros(rows, dtype=bool),
            experts=experts,
            gating_probs=(chosen / chosen.sum(axis=2, keepdims=True)).astype(np.float16),
            model="some/model",
            layers=tuple(range(LAYERS)),
            num_experts=EXPERTS,
        ),
        states,
        weight,
    )


def write_store(folder: Path, hidden: bool) -> Path:
    """A store as 08 leaves it; with router inputs of the first SAVED problems of each data set."""
    journeys, states, weight = make_journeys()
    for dataset in ("gsm8k", "humaneval"):
        mask = journeys.dataset == dataset
        file = folder / "store" / shard_name(dataset, 0)
        if hidden:
            write_hidden(file, states[mask & (journeys.problem_id < SAVED)])
        write_shard(file, journeys.select(mask), {"save_hidden": SAVED if hidden else 0})
    if hidden:
        np.savez(routers_file(folder / "store"), weight=weight, activation=np.array("softmax"),
                 scale=np.ones((LAYERS, EXPERTS), dtype=np.float32))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("with_hidden") / "journeys", hidden=True)


@pytest.fixture(scope="module")
def bare_store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("without_hidden") / "journeys", hidden=False)


def run(*arguments) -> None:
    spec = importlib.util.spec_from_file_location("predict_experts", ROOT / "scripts" / "journeys" / "03_predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cli.run_main(lambda: module.main(module.parse([*map(str, arguments)])))


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def outputs(folder: Path, model: str = "some-model") -> Path:
    return folder / model / "journeys"


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name, keep_default_na=False, na_values=[""])


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> Path:
    """A default run (one seed, one hop, all predictors) and its folder of results."""
    output = tmp_path_factory.mktemp("output")
    run("--input", store, "--model", "some/model", "--output-dir", output, *FAST)
    return outputs(output)


# -- a whole run
def test_files_and_columns(finished):
    table = read(finished, "predictors.csv")
    assert table.columns.tolist() == PREDICTOR_COLUMNS.split()
    honest = table[table["split"] == "problems"]
    assert honest["predictor"].unique().tolist() == list(predictors.PREDICTORS)
    for _, part in honest.groupby("predictor"):
        assert part["domain"].tolist() == ["all", "humaneval", "gsm8k"]
    assert set(table.loc[table["split"] == "rows", "predictor"]) == {"mlp", "mlp_tuned"}
    assert set(table["hop"]) == {1}
    shares = table[["top1", "top2", "slot_overlap", "whole_set", "ece"]]
    assert ((shares >= 0) & (shares <= 1)).all().all() and (table["top1"] <= table["top2"]).all()
    assert ((table["top1_low"] <= table["top1"]) & (table["top1"] <= table["top1_high"])).all()
    uniform = honest.set_index(["predictor", "domain"]).loc[("uniform", "all")]
    assert (uniform["top1"], uniform["top2"], uniform["ece"]) == (0.2, 0.4, 0)
    layers = read(finished, "predictors_per_layer.csv")
    assert layers.columns.tolist() == LAYER_COLUMNS.split()
    assert sorted(layers["layer"].unique()) == [1, 2, 3]
    mean = layers[(layers["split"] == "problems") & (layers["domain"] == "all")].groupby("predictor")["top1"].mean()
    whole = honest[honest["domain"] == "all"].set_index("predictor")["top1"]
    np.testing.assert_allclose(mean.loc[whole.index], whole, rtol=1e-9)  # as many cells in each layer
    leaks = read(finished, "leakage.csv")
    assert leaks.columns.tolist() == LEAKAGE_COLUMNS.split() and leaks["predictor"].tolist() == ["mlp", "mlp_tuned"]
    np.testing.assert_allclose(leaks["leakage"], leaks["top1_rows_split"] - leaks["top1_problem_split"], atol=1e-9)
    for name in ("predictors.csv", "predictors_per_layer.csv", "leakage.csv", "splits.json", "cache_curves.csv"):
        meta = json.loads(results.meta_path(finished / name).read_text())
        assert len(meta["data"]["sha256"]) == 64 and meta["seeds"]["training"] == [0]


def test_same_rows_for_every_predictor_and_the_recorded_split(finished):
    splits = json.loads((finished / "splits.json").read_text())
    assert splits["problems"] == {"train": 15, "validation": 5, "test": 4}
    names = [name for part in splits["names"].values() for name in part]
    assert sorted(names) == sorted(f"{d}/{p}" for d in ("gsm8k", "humaneval") for p in range(PROBLEMS))
    assert splits["stale_gate_at_hop_0"] == {"rows": 2 * SAVED * LENGTH * LAYERS, "top1": 1, "all_experts": 1}
    saved = [name for name in splits["names"]["test"] if int(name.split("/")[1]) < SAVED]
    assert splits["scored"]["problems"] == len(saved) and splits["scored"]["journeys"] == len(saved) * LENGTH
    layers = read(finished, "predictors_per_layer.csv")
    counts = layers[(layers["split"] == "problems") & (layers["domain"] == "all")]["rows"]
    assert set(counts) == {len(saved) * LENGTH}


def test_hidden_states_beat_history_on_a_drifting_state(finished):
    table = read(finished, "predictors.csv")
    honest = table[(table["split"] == "problems") & (table["domain"] == "all")].set_index("predictor")["top1"]
    assert honest["stale_gate"] > honest[list(predictors.HISTORY_PREDICTORS)].max() + 0.1


def test_cache_curves_use_the_trace_of_test_problems(finished):
    curves = read(finished, "cache_curves.csv")
    assert curves.columns.tolist() == CACHE_COLUMNS.split()
    assert set(curves["policy"]) == {"on_demand", "lru", "lfu", "belady", "static", "prefetch"}
    assert set(curves.loc[curves["policy"] == "prefetch", "predictor"]) == set(predictors.PREDICTORS)
    assert set(curves["tokens"]) == {30}
    lru = curves[(curves["policy"] == "lru") & (curves["scope"] == "per_layer")].sort_values("capacity")
    assert lru["capacity"].tolist() == [1, 2, 3, 4, 5] and (np.diff(lru["hit_rate"]) >= 0).all()
    assert (curves.loc[curves["policy"] == "on_demand", "speedup"] == 1).all()


def test_report(finished, store, capsys):
    run("--input", store, "--model", "some/model", "--output-dir", finished.parents[1], *FAST)
    shown = capsys.readouterr().out
    reused, total = re.search(r"reused from earlier runs: (\d+) of (\d+) measurements", shown).groups()
    assert int(reused) == int(total) > 0 and "computed" not in shown
    assert "stale gate at hop 0: 100.0000 % of 960" in shown
    assert "split by row (leaks) and by problem (honest)" in shown and "theory only" in shown
    uniform = next(line for line in shown.splitlines() if line.split()[1:2] == ["uniform"])
    assert "+0.0" in uniform and "1.0x" in uniform and "20.0" in uniform
    assert shown.rstrip().endswith("next: jupyter lab notebooks/moe_routing_analysis.ipynb")


# -- resuming
def untimed(folder: Path) -> dict[str, object]:
    """Every file of results without times: CSV tables without timing columns, the others' bytes."""
    found = {}
    for file in sorted(folder.glob("*")):  # not the pieces, which hold times
        if file.name.endswith(".csv"):
            frame = pd.read_csv(file, dtype=str, keep_default_na=False)
            found[str(file.relative_to(folder))] = frame.drop(
                columns=list(results.TIMING_COLUMNS), errors="ignore"
            ).to_csv()
        elif file.suffix in (".json", ".npz") and not file.name.endswith(".meta.json"):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(finished, store, tmp_path, monkeypatch):
    study = scoring.study
    done = []

    def dies(name, *arguments, **options):
        if name == "mlp":
            raise KeyboardInterrupt
        done.append(name)
        return study(name, *arguments, **options)

    common = ("--input", store, "--model", "some/model", "--output-dir", tmp_path, *FAST)
    monkeypatch.setattr(scoring, "study", dies)
    with pytest.raises(SystemExit) as stop:
        run(*common)
    assert stop.value.code == 130 and done == list(predictors.PREDICTORS[:6])
    monkeypatch.setattr(scoring, "study", lambda name, *rest, **more: done.append(name) or study(name, *rest, **more))
    run(*common)
    assert done == list(predictors.PREDICTORS)
    assert untimed(outputs(tmp_path)) == untimed(finished)  # and so the same seed gives the same files


def test_only_what_changed_runs_again(store, tmp_path, monkeypatch):
    study, done = scoring.study, []
    monkeypatch.setattr(scoring, "study", lambda name, *rest, **more: done.append(name) or study(name, *rest, **more))
    common = ["--input", store, "--model", "some/model", "--output-dir", tmp_path, *FAST[:-4], "--cache-tokens", 0]
    run(*common, "--predictors", "transition", "xgboost", "lookup")
    assert done == ["transition", "lookup", "xgboost"]
    assert not (outputs(tmp_path) / "cache_curves.csv").exists()
    run(*common, "--predictors", "transition", "xgboost", "--xgboost-rounds", 3)
    assert done[3:] == ["xgboost"]
    table = read(outputs(tmp_path), "predictors.csv")
    assert table["predictor"].unique().tolist() == ["transition", "lookup", "xgboost"]  # lookup is still valid
    run(*common, "--predictors", "transition", "--hops", "1,2")
    assert done[4:] == ["transition"]
    assert set(read(outputs(tmp_path), "predictors.csv").query("predictor == 'transition'")["hop"]) == {1, 2}
    run(*common, "--predictors", "transition", "--split", "rows")
    assert done[5:] == ["transition"]
    assert read(outputs(tmp_path), "leakage.csv")["predictor"].tolist() == ["transition"]
    for file in (outputs(tmp_path) / "pieces").glob("*.npz"):
        file.write_bytes(b"")  # damaged arrays are made again
    run(*common, "--predictors", "transition", "--split", "problems")
    assert done[6:] == ["transition", "transition", "lookup", "xgboost"]
    run(*common, "--predictors", "transition", "--resamples", 50)  # intervals are derived anew
    assert done[10:] == []
    run(*common, "--predictors", "transition", "--seed", 1)
    assert done[10:] == ["transition"]


def test_tune_saves_its_setting_and_the_next_run_uses_it(bare_store, tmp_path, monkeypatch):
    common = ["--input", bare_store, "--model", "some/model", "--output-dir", tmp_path, *FAST, "--split", "problems"]
    run(*common, "--predictors", "mlp_tuned", "--tune", 2)
    tuned = json.loads((outputs(tmp_path) / "mlp_tuned.json").read_text())
    assert len(tuned["networks"]) == 2
    best = min(tuned["networks"], key=lambda one: one["validation_loss"])
    assert {key: value for key, value in best.items() if key != "validation_loss"} == tuned["setting"]
    study, done = scoring.study, []
    monkeypatch.setattr(scoring, "study", lambda *rest: done.append(rest[4].mlp_tuned) or study(*rest))
    run(*common, "--predictors", "mlp_tuned")
    assert not done  # the same setting: finished
    (outputs(tmp_path) / "mlp_tuned.json").write_text(json.dumps({"setting": tuned["setting"] | {"widths": [7]}}))
    run(*common, "--predictors", "mlp_tuned")
    assert [setting.widths for setting in done] == [(7,)]


# -- other journeys
def test_without_router_inputs_hidden_predictors_are_left_out(bare_store, tmp_path, capsys):
    run("--input", bare_store, "--model", "m", "--output-dir", tmp_path, *FAST, "--predictors", "lookup", "stale_gate",
        "--quick")  # fmt: skip
    assert "stale_gate left out: python scripts/journeys/01_collect.py --hidden-problems" in capsys.readouterr().err
    folder = outputs(tmp_path, "m-quick")
    assert set(read(folder, "predictors.csv")["predictor"]) == {"lookup"}
    splits = json.loads((folder / "splits.json").read_text())
    assert splits["stale_gate_at_hop_0"] is None and splits["scored"]["problems"] == splits["problems"]["test"]


def test_records_and_the_folder_of_the_model(bare_store, tmp_path):
    """The same journeys as JSONL records and from the model's own folder: the same accuracies."""
    journeys, _, _ = make_journeys()
    export_rows(journeys, tmp_path / "records.jsonl")
    write_store(outputs(tmp_path), hidden=False)
    common = ["--output-dir", tmp_path, *FAST, "--predictors", "lookup", "mlp", "--split", "problems"]
    run("--input", tmp_path / "records.jsonl", *common)
    run("--model", "some/model", *common)
    mine, theirs = (read(outputs(tmp_path, name), "predictors.csv") for name in ("records", "some-model"))
    pd.testing.assert_frame_equal(mine.drop(columns=["train_seconds", "predict_us"]),
                                  theirs.drop(columns=["train_seconds", "predict_us"]))  # fmt: skip


@pytest.mark.skipif(not MIXTRAL.exists(), reason="needs the recorded Mixtral journeys in ../shared/mixtral_routing")
def test_recorded_mixtral_journeys(tmp_path, capsys):
    """Two problems of 81 and 166 tokens: runs of tokens stand in for problems, and that is said."""
    rows = "".join((MIXTRAL / f"{name}_p0.jsonl").read_text() for name in ("humaneval", "gsm8k"))
    (tmp_path / "mixtral.jsonl").write_text(rows)
    run("--input", tmp_path / "mixtral.jsonl", "--output-dir", tmp_path, *FAST, "--train-rows", 5000, "--epochs", 4,
        "--predictors", "uniform", "lookup", "mlp")  # fmt: skip
    captured = capsys.readouterr()
    assert "247 journeys" in captured.out and "10 test runs of tokens (wide intervals)" in captured.out
    assert "fewer than 5 problems" in captured.err and "are wide" in captured.err
    table = read(outputs(tmp_path, "mixtral"), "predictors.csv")
    overall = table[(table["domain"] == "all") & (table["split"] == "problems")].set_index("predictor")
    assert overall.loc["uniform", "top1"] == 0.125 and overall.loc["uniform", "top2"] == 0.25
    assert overall.loc["lookup", "top1_low"] > 0.2
    assert overall.loc["mlp", "top1_low"] > 0.125
    assert json.loads((outputs(tmp_path, "mixtral") / "splits.json").read_text())["problems"]["test"] == 10


# -- refusals
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no journeys in"),
        (["--limit", 3], "--limit has no effect here: it is for records given with --input"),
        (["--input", "{empty}"], "empty"),
        (["--input", "{absent}"], "absent does not exist"),
        (["--input", "{store}", "--limit", 3], "--limit means nothing for"),
        (["--input", "{store}", "--hops", 4], "--hops 4 needs more than 4 layers; the journeys have 4"),
        (["--input", "{store}", "--hops", 0], "--hops: 0 is too small"),
        (["--input", "{store}", "--predictor-seeds", 0], "--predictor-seeds: 0 is too small"),
        (["--input", "{store}", "--tune", 0], "--tune: 0 is too small"),
        (["--input", "{store}", "--predictors", "oracle"], "oracle"),
        (["--input", "{store}", "--bandwidths", 0], "--bandwidths: 0 lies outside (0, inf)"),
        (["--input", "{store}", "--expert-mb", "nan"], "--expert-mb: nan lies outside"),
        (["--input", "{store}", "--cache-model", "own"], "does not say how large its model's experts are"),
        (["--input", "{store}", "--cache-capacities", 9], "--cache-capacities 9 is more than the 5 experts"),
        (["--input", "{bare}", "--predictors", "stale_gate"], "--hidden-problems"),
        (["--input", "{store}", "--split", "columns"], "columns"),
    ],
)
def test_refuses_in_one_line(store, bare_store, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    paths = {"absent": tmp_path / "absent", "empty": tmp_path / "empty", "store": store, "bare": bare_store}
    arguments = [a.format(**paths) if isinstance(a, str) else a for a in arguments]
    line = refused(capsys, "--model", "some/model", "--output-dir", tmp_path / "out", *FAST, *arguments)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_broken_setting_is_refused(store, tmp_path, capsys):
    outputs(tmp_path).mkdir(parents=True)
    (outputs(tmp_path) / "mlp_tuned.json").write_text('{"setting": {"width": 3}}')
    line = refused(capsys, "--input", store, "--model", "some/model", "--output-dir", tmp_path, *FAST)
    assert "mlp_tuned.json holds no setting" in line and "--tune" in line


def test_the_command_line_knows_all_predictors():
    assert cli.PREDICTORS == predictors.PREDICTORS


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in "--model --input --hops --predictors --split --predictor-seeds --tune --xgboost-values --quick".split():
        assert flag in shown

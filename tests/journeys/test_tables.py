"""src/journey_tables.py and scripts/09: every table against loops over records, columns, repeatability, refusals."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import config
from src.base import cli, results
from src.journeys import tables
from src.journeys.sample import to_sample
from src.journeys.store import Journeys, shard_name, write_shard

ROOT = Path(__file__).resolve().parents[2]
MIXTRAL = ROOT.parent / "shared" / "mixtral_routing"
LAYERS, EXPERTS, PROBLEMS, LENGTH = 7, 5, 6, 20
QUICK = tables.Settings(folds=3, permutations=49, resamples=50, path_lengths=(2, 4), domain_percent=2.0)

CSV_COLUMNS = {
    "expert_distribution": "layer expert count percent count_topk percent_topk",
    "load_balance": "layer choice entropy entropy_ratio max_over_mean gini",
    "gate_confidence": "layer rank decisions mean std percent_above",
    "gate_histogram": "layer rank bin_low bin_high count",
    "strong_transitions": "source_layer target_layer source_expert target_expert count percent",
    "hop_accuracy": "hop layer_pairs accuracy majority held_out_accuracy ci_low ci_high held_out_majority random",
    "paths": "length start_layer tokens unique_paths uniqueness_ratio most_common",
    "top_paths": "length rank start_layer path count token_texts percent",
    "domain_distribution": "domain layer expert count percent",
    "domain_difference": "domain_a domain_b layer expert percent_a percent_b difference prefers",
    "domain_distance": "domain_a domain_b layer js_distance p_value p_any_layer problems_a problems_b",
    "domain_summary": "domain problems tokens mean_confidence unique_experts high_confidence_percent",
    "token_identity": "layer same_token any_tokens",
    "token_routing": "token_id token count agreement paths common_path_percent nearest nearest_agreement",
    "positions": "positions tokens unique_experts mean_confidence mean_js_distance",
    "positions_by_layer": "positions layer tokens mean_confidence js_distance top_expert top_percent",
    "consecutive_tokens": "layer pairs agreement agreement_chance overlap overlap_chance",
}
ARRAYS = {
    "transitions": "layers counts adjacent_probabilities",
    "affinity": "layers reference weighted majority nmi",
    "correlation": "layers id_correlation id_correlation_relabelled cramers_v",
    "example_journeys": "layers domain problem_id token_idx token experts gating_probs",
}


def collected(seed: int = 0, layers: int = LAYERS, slots: int = 2, datasets=("gsm8k", "humaneval")) -> SimpleNamespace:
    """Journeys of two data sets as a store holds them: an expert often follows from the one before and the token."""
    rng = np.random.default_rng(seed)
    rows = len(datasets) * PROBLEMS * LENGTH
    dataset = np.repeat(np.array(datasets), PROBLEMS * LENGTH)
    problem_id = np.tile(np.repeat(np.arange(PROBLEMS), LENGTH), len(datasets))
    token_id = rng.integers(3, 15, rows)
    experts = np.empty((rows, layers, slots), dtype=np.uint8)
    before = token_id
    for layer in range(layers):
        scores = rng.random((rows, EXPERTS))
        scores[np.arange(rows), (before * (layer + 2) + 1) % EXPERTS] += 0.5
        scores[dataset == "gsm8k", 0] += 0.2 * layer
        experts[:, layer] = np.argsort(-scores, axis=1)[:, :slots]
        before = experts[:, layer, 0]
    experts[30:40] = experts[30]  # some whole paths in common
    gates = np.sort(rng.dirichlet(np.ones(slots), (rows, layers)), axis=2)[:, :, ::-1].astype(np.float16)
    return SimpleNamespace(
        dataset=dataset,
        problem_id=problem_id.astype(np.int32),
        token_idx=np.tile(np.arange(LENGTH, dtype=np.int32), len(datasets) * PROBLEMS),
        token_id=token_id.astype(np.int32),
        token=np.array([f" t{i}" for i in token_id]),
        is_generated=np.zeros(rows, dtype=bool),
        experts=experts,
        gating_probs=gates,
        model="some/model",
        layers=tuple(range(layers)),
        num_experts=EXPERTS,
    )


def write_token_files(journeys, root: Path) -> Path:
    """One file per token, one line per layer in order, a folder per data set."""
    for row in range(len(journeys.experts)):
        folder = root / f"{journeys.dataset[row]}_tokens"
        folder.mkdir(parents=True, exist_ok=True)
        name = {"dataset": str(journeys.dataset[row]), "problem_id": int(journeys.problem_id[row])}
        lines = [
            name
            | {
                "layer": layer,
                "experts": journeys.experts[row, layer].tolist(),
                "gating_probs": journeys.gating_probs[row, layer].astype(float).tolist(),
                "token_idx": int(journeys.token_idx[row]),
            }
            for layer in range(journeys.experts.shape[1])
        ]
        file = folder / f"p{name['problem_id']}_token_{journeys.token_idx[row]}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def analyzed(journeys, settings: tables.Settings = QUICK) -> dict:
    return tables.analyze(to_sample(journeys, config.JOURNEY_DATASETS), settings)


@pytest.fixture(scope="module")
def journeys():
    return collected()


@pytest.fixture(scope="module")
def files(journeys):
    return analyzed(journeys)


# -- preparing
def test_prepare(journeys):
    sample = to_sample(journeys, ["humaneval", "gsm8k"])
    assert sample.domain_names == ("humaneval", "gsm8k")
    assert [sample.domain_names[i] for i in sample.domains] == journeys.dataset.tolist()
    pairs = list(zip(journeys.dataset.tolist(), journeys.problem_id.tolist(), strict=True))
    assert len(set(zip(pairs, sample.clusters.tolist(), strict=True))) == len(set(pairs)) == 2 * PROBLEMS
    assert sample.token_ids[sample.tokens].tolist() == journeys.token_id.tolist()
    assert [sample.token_names[i] for i in sample.tokens] == journeys.token.tolist()
    assert to_sample(journeys).domain_names == ("gsm8k", "humaneval")
    shuffled = np.random.default_rng(0).permutation(len(pairs))
    mixed = SimpleNamespace(**vars(journeys))
    for name in ("dataset", "problem_id", "token_id", "token"):
        setattr(mixed, name, getattr(journeys, name)[shuffled])
    again = to_sample(mixed, ["humaneval", "gsm8k"])
    for name in ("domains", "clusters", "tokens"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sample, name)[shuffled])


def test_tokens_without_ids_or_texts(journeys):
    rows = len(journeys.token)
    no_ids = SimpleNamespace(**vars(journeys) | {"token_id": np.full(rows, -1)})
    sample = to_sample(no_ids)
    assert [sample.token_names[i] for i in sample.tokens] == journeys.token.tolist()
    neither = SimpleNamespace(**vars(no_ids) | {"token": np.full(rows, "")})
    sample = to_sample(neither)
    assert (sample.tokens == -1).all() and sample.token_names == ()
    ids, texts = journeys.token_id.copy(), journeys.token.copy()
    ids[5], texts[5] = -1, ""
    sample = to_sample(SimpleNamespace(**vars(journeys) | {"token_id": ids, "token": texts}))
    assert np.flatnonzero(sample.tokens == -1).tolist() == [5]


# -- tables
def test_files_and_columns(files):
    for name, columns in CSV_COLUMNS.items():
        assert list(files[f"{name}.csv"]) == columns.split(), name
        assert len({len(values) for values in files[f"{name}.csv"].values()}) == 1, name
    for name, arrays in ARRAYS.items():
        assert list(files[f"{name}.npz"]) == arrays.split(), name
    assert set(files) == {f"{n}.csv" for n in CSV_COLUMNS} | {f"{n}.npz" for n in ARRAYS} | {"findings.json"}


def frame(files: dict, name: str) -> pd.DataFrame:
    """A table with its text percentages as numbers again."""
    table = pd.DataFrame(files[f"{name}.csv"])
    for column in table:
        if table[column].map(type).eq(str).all():
            try:
                table[column] = table[column].replace("", "nan").astype(float)
            except ValueError:
                continue  # names
    return table


def test_distribution_and_balance(files, journeys):
    rows = len(journeys.experts)
    table = frame(files, "expert_distribution")
    for layer in range(LAYERS):
        here = table[table["layer"] == layer]
        assert here["count"].tolist() == np.bincount(journeys.experts[:, layer, 0], minlength=EXPERTS).tolist()
        both = np.bincount(journeys.experts[:, layer].ravel(), minlength=EXPERTS)
        assert here["count_topk"].tolist() == both.tolist()
        np.testing.assert_allclose(here["percent"], 100 * here["count"] / rows)
        np.testing.assert_allclose(here["percent_topk"], 100 * both / both.sum())
    load = frame(files, "load_balance")
    assert len(load) == 2 * LAYERS and load["choice"].tolist() == ["top1"] * LAYERS + ["topk"] * LAYERS
    np.testing.assert_allclose(load["max_over_mean"][:LAYERS], table.groupby("layer")["count"].max() * EXPERTS / rows)


def test_gate_tables(files, journeys):
    table = frame(files, "gate_confidence")
    overall = table[table["layer"] == "all"].set_index("rank")
    top = journeys.gating_probs[:, :, 0].astype(float)
    assert overall.loc[1, "mean"] == pytest.approx(top.mean(), abs=1e-12)
    assert overall.loc[1, "std"] == pytest.approx(top.std(), abs=1e-12)
    assert overall.loc[1, "percent_above"] == pytest.approx(100 * (top > 0.8).mean())
    one = table[(table["layer"] == 3) & (table["rank"] == 2)].iloc[0]
    assert one["mean"] == pytest.approx(journeys.gating_probs[:, 3, 1].astype(float).mean(), abs=1e-12)
    histogram = frame(files, "gate_histogram")
    for layer, values in (("all", top), (2, top[:, 2])):
        bins = histogram[(histogram["layer"] == layer) & (histogram["rank"] == 1)]
        expected, edges = np.histogram(values, bins=100, range=(0, 1))
        np.testing.assert_allclose(bins["bin_low"], edges[:-1])
        # both put a value on an edge into the bin above it; edges such as 0.29 are no float16
        assert bins["count"].tolist() == expected.tolist()


def test_strong_transitions(files):
    table, counts = frame(files, "strong_transitions"), files["transitions.npz"]["counts"]
    assert len(table) > 3 and (table["percent"] > 30).all()
    assert (table["target_layer"] == table["source_layer"] + 1).all()
    for row in table.itertuples():
        transitions = counts[row.source_layer, row.target_layer, row.source_expert]
        assert row.count == transitions[row.target_expert]
        assert row.percent == pytest.approx(100 * row.count / transitions.sum())
    adjacent = files["transitions.npz"]["adjacent_probabilities"]
    assert len(table) == (adjacent > 0.3).sum() and adjacent.shape == (LAYERS - 1, EXPERTS, EXPERTS)


def test_hop_table(files):
    table = frame(files, "hop_accuracy")
    assert table["hop"].tolist() == list(range(1, LAYERS))
    assert table["layer_pairs"].tolist() == list(range(LAYERS - 1, 0, -1))
    assert (table["random"] == 20).all()
    assert (table["accuracy"] >= table["majority"]).all()
    assert (table["accuracy"] >= table["held_out_accuracy"]).all()
    assert (table["ci_low"] <= table["held_out_accuracy"]).all()
    assert (table["held_out_accuracy"] <= table["ci_high"]).all()
    assert table["held_out_accuracy"][0] > table["held_out_majority"][0] + 5


def test_paths(files, journeys):
    summary, top = frame(files, "paths"), frame(files, "top_paths")
    assert summary["length"].value_counts().to_dict() == {LAYERS: 1, 2: LAYERS - 1, 4: LAYERS - 3}
    experts, rows = journeys.experts[:, :, 0], len(journeys.experts)
    for row in summary.itertuples():
        found = Counter(map(tuple, experts[:, row.start_layer : row.start_layer + row.length].tolist()))
        assert (row.tokens, row.unique_paths, row.most_common) == (rows, len(found), max(found.values()))
        assert row.uniqueness_ratio == pytest.approx(len(found) / rows)
    whole = top[top["length"] == LAYERS]
    expected = Counter(map(tuple, experts.tolist())).most_common(10)
    assert [tuple(map(int, path.split(">"))) for path in whole["path"]] == [path for path, _ in expected]
    assert whole["count"].tolist() == [count for _, count in expected]
    np.testing.assert_allclose(whole["percent"], 100 * whole["count"] / rows)
    same = np.flatnonzero((experts == experts[30]).all(axis=1))
    texts = Counter(journeys.token[same].tolist())
    shown = dict(part.rsplit(" x", 1) for part in whole["token_texts"].iloc[0].split(" | "))
    assert shown == {repr(text): str(count) for text, count in texts.items() if repr(text) in shown} and shown
    for length in (2, 4):
        counts = [
            (-count, start, path)
            for start in range(LAYERS - length + 1)
            for path, count in Counter(map(tuple, experts[:, start : start + length].tolist())).items()
        ]
        best = sorted(counts)[:10]
        assert top[top["length"] == length]["count"].tolist() == [-count for count, _, _ in best]


def test_domain_tables(files, journeys):
    shares = {}
    for name in ("humaneval", "gsm8k"):
        rows = journeys.dataset == name
        shares[name] = np.stack(
            [np.bincount(column, minlength=EXPERTS) / rows.sum() for column in journeys.experts[rows, :, 0].T]
        )
    table = frame(files, "domain_distribution")
    assert table["domain"].unique().tolist() == ["humaneval", "gsm8k"]
    for name, expected in shares.items():
        np.testing.assert_allclose(table[table["domain"] == name]["percent"], 100 * expected.ravel())
    difference = frame(files, "domain_difference")
    assert (difference["domain_a"] == "humaneval").all() and (difference["domain_b"] == "gsm8k").all()
    expected = 100 * (shares["humaneval"] - shares["gsm8k"]).ravel()
    np.testing.assert_allclose(difference["difference"], expected, atol=1e-10)
    prefers = ["humaneval" if gap > 2 else "gsm8k" if gap < -2 else "" for gap in expected]
    assert difference["prefers"].tolist() == prefers and set(prefers) == {"humaneval", "gsm8k", ""}
    distance = frame(files, "domain_distance")
    assert distance["js_distance"].between(0, 1).all() and (distance["problems_a"] == PROBLEMS).all()
    # expert 0 is favoured in gsm8k ever more from layer to layer
    assert distance["p_any_layer"].iloc[-1] <= 0.05 and distance["js_distance"].idxmax() >= LAYERS - 3
    summary = frame(files, "domain_summary").set_index("domain")
    for name in shares:
        rows = journeys.dataset == name
        gates = journeys.gating_probs[rows, :, 0].astype(float)
        unique = [len(set(path)) for path in journeys.experts[rows, :, 0].tolist()]
        assert summary.loc[name, "problems"] == PROBLEMS and summary.loc[name, "tokens"] == rows.sum()
        assert summary.loc[name, "mean_confidence"] == pytest.approx(gates.mean(), abs=1e-12)
        assert summary.loc[name, "unique_experts"] == pytest.approx(np.mean(unique), abs=1e-12)
        assert summary.loc[name, "high_confidence_percent"] == pytest.approx(100 * (gates > 0.8).mean())


def test_token_tables(files, journeys):
    table = pd.DataFrame(files["token_routing.csv"]).set_index("token")
    counts = Counter(journeys.token.tolist())
    assert {token: table.loc[token, "count"] for token in table.index} == counts
    assert table["count"].is_monotonic_decreasing
    for token in table.index[:3]:
        rows = np.flatnonzero(journeys.token == token)
        paths = Counter(map(tuple, journeys.experts[rows, :, 0].tolist()))
        assert table.loc[token, "paths"] == len(paths)
        assert float(table.loc[token, "common_path_percent"]) == pytest.approx(100 * max(paths.values()) / len(rows))
        agreement = {
            other: np.mean(
                [
                    np.mean(journeys.experts[rows, layer, 0][:, None] == journeys.experts[them, layer, 0])
                    for layer in range(LAYERS)
                ]
            )
            for other, them in ((o, np.flatnonzero(journeys.token == o)) for o in table.index if o != token)
        }
        assert table.loc[token, "nearest_agreement"] == pytest.approx(max(agreement.values()))
        assert agreement[table.loc[token, "nearest"]] == pytest.approx(max(agreement.values()))
    identity = frame(files, "token_identity")
    # the first layer depends on the token
    assert identity["same_token"][0] > identity["any_tokens"][0] + 0.2
    assert identity["same_token"].between(0, 1).all()


def test_few_tokens_listed(journeys):
    few = analyzed(journeys, replace(QUICK, top_tokens=1, top=2))
    assert len(few["token_routing.csv"]["token"]) == 1 and few["token_routing.csv"]["nearest"] == [""]
    assert few["top_paths.csv"]["rank"].count(1) == 3 and max(few["top_paths.csv"]["rank"]) == 2


def test_position_tables(files, journeys):
    table = frame(files, "positions")
    assert table["positions"].tolist() == ["0", "1-3", "4-15", "16-63"]
    assert table["tokens"].tolist() == [12, 36, 144, 48]
    by_layer = frame(files, "positions_by_layer")
    assert len(by_layer) == 4 * LAYERS
    first = journeys.token_idx == 0
    gates = journeys.gating_probs[first, :, 0].astype(float)
    assert table["mean_confidence"][0] == pytest.approx(gates.mean())
    np.testing.assert_allclose(by_layer["mean_confidence"][:LAYERS], gates.mean(axis=0))
    for layer in range(LAYERS):
        counts = np.bincount(journeys.experts[first, layer, 0], minlength=EXPERTS)
        assert by_layer["top_expert"][layer] == counts.argmax()
        assert by_layer["top_percent"][layer] == pytest.approx(100 * counts.max() / 12)
    np.testing.assert_allclose(table["mean_js_distance"][0], by_layer["js_distance"][:LAYERS].mean())


def test_consecutive_table(files, journeys):
    table = frame(files, "consecutive_tokens")
    assert (table["pairs"] == 2 * PROBLEMS * (LENGTH - 1)).all()
    top = journeys.experts[:, :, 0].reshape(-1, LENGTH, LAYERS)
    np.testing.assert_allclose(table["agreement"], (top[:, 1:] == top[:, :-1]).mean(axis=(0, 1)))
    shares = np.stack([np.bincount(c, minlength=EXPERTS) / len(c) for c in journeys.experts[:, :, 0].T])
    np.testing.assert_allclose(table["agreement_chance"], (shares**2).sum(axis=1))
    both = np.stack([np.bincount(c.ravel(), minlength=EXPERTS) for c in journeys.experts.transpose(1, 0, 2)])
    np.testing.assert_allclose(table["overlap_chance"], ((both / len(top.reshape(-1, LAYERS))) ** 2).sum(axis=1) / 2)


def test_examples(files, journeys):
    examples = files["example_journeys.npz"]
    assert examples["domain"].tolist() == ["humaneval"] * 101 + ["gsm8k"] * 101
    rows = np.flatnonzero(journeys.dataset == "humaneval")[:101]
    for name in ("experts", "gating_probs", "problem_id", "token_idx", "token"):
        np.testing.assert_array_equal(examples[name][:101], getattr(journeys, name)[rows])


def test_findings_say_why_ids_mislead(files):
    note = files["findings.json"]["id_correlation_note"]
    assert "labels" in note and "Cramer" in note
    arrays = files["correlation.npz"]
    assert not np.allclose(arrays["id_correlation"], arrays["id_correlation_relabelled"])


# -- unusual journeys
def test_padded_journeys():
    journeys = collected()
    journeys.experts = journeys.experts.astype(np.int16)
    journeys.experts[::3, 2, 1] = -1
    journeys.experts[::5, 4] = -1
    journeys.gating_probs = np.where(journeys.experts < 0, 0, journeys.gating_probs).astype(np.float16)
    journeys.gating_probs[::3, 2, 0] = 1
    files = analyzed(journeys)
    table = frame(files, "gate_confidence")
    assert table[(table["layer"] == 4) & (table["rank"] == 1)]["decisions"].item() == 192
    assert table[(table["layer"] == 2) & (table["rank"] == 2)]["decisions"].item() == 160
    distribution = frame(files, "expert_distribution")
    assert distribution[distribution["layer"] == 4]["count"].sum() == 192
    np.testing.assert_allclose(distribution.groupby("layer")["percent"].sum(), 100)
    assert "-" in "".join(files["top_paths.csv"]["path"])
    assert files["transitions.npz"]["counts"][3, 4].sum() == 192


@pytest.mark.parametrize(("layers", "slots"), [(1, 2), (2, 1), (3, 3)])
def test_other_shapes(layers, slots):
    files = analyzed(collected(layers=layers, slots=slots, datasets=("text",)))
    assert len(files["hop_accuracy.csv"]["hop"]) == layers - 1
    assert len(files["gate_confidence.csv"]["layer"]) == (layers + 1) * slots
    assert files["domain_distance.csv"]["layer"] == [] and files["domain_summary.csv"]["domain"] == ["text"]
    found = files["findings.json"]
    assert (found["most_predictable"] is None) == (layers == 1)
    assert (found["affinity"]["non_adjacent"] is None) == (layers < 3)


def test_one_problem_has_no_out_of_sample_accuracy():
    journeys = collected(datasets=("text",))
    journeys.problem_id[:] = 4
    journeys.token_idx = np.arange(len(journeys.token_idx))
    table = analyzed(journeys)["hop_accuracy.csv"]
    assert set(table["held_out_accuracy"]) == set(table["ci_low"]) == {""} and "" not in table["accuracy"]


def test_no_probabilities_and_no_tokens(journeys):
    rows = len(journeys.token)
    bare = SimpleNamespace(
        **vars(journeys)
        | {
            "gating_probs": np.full_like(journeys.gating_probs, np.nan),
            "token_id": np.full(rows, -1),
            "token": np.full(rows, ""),
        }
    )
    files = analyzed(bare)
    assert set(files["gate_confidence.csv"]["decisions"].tolist()) == {0}
    assert set(files["gate_confidence.csv"]["mean"]) == {""} == set(files["domain_summary.csv"]["mean_confidence"])
    assert list(files["token_routing.csv"]) == CSV_COLUMNS["token_routing"].split()
    assert files["token_routing.csv"]["token"] == files["token_identity.csv"]["layer"] == []


# -- the script
def run(*arguments) -> None:
    spec = importlib.util.spec_from_file_location("analyze_journeys", ROOT / "scripts" / "journeys" / "02_analyze.py")
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


@pytest.fixture(scope="module")
def root(journeys, tmp_path_factory) -> Path:
    return write_token_files(journeys, tmp_path_factory.mktemp("records"))


def outputs(folder: Path, model: str = "some-model") -> Path:
    return folder / model / "journeys"


def script(root: Path, folder: Path, *more) -> Path:
    run(
        "--input", root, "--model", "some/model", "--output-dir", folder, "--permutations", 49, "--resamples", 50, *more
    )
    return outputs(folder)


def records_of(folder: Path, limit: int) -> list[list[dict]]:
    files = sorted(folder.glob("*.jsonl"))[:limit]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_agrees_with_loops_over_the_first_files_of_each_folder(root, tmp_path, capsys):
    """What the published notebook computes, by loops over the records that it would read, to 1e-9."""
    limit = 70
    folder = script(root, tmp_path, "--limit", limit, "--low-accuracy-percent", 62)
    shown = capsys.readouterr().out
    assert "findings.json" in shown and "next: jupyter lab notebooks/moe_routing_analysis.ipynb" in shown
    code, maths = (records_of(root / f"{name}_tokens", limit) for name in ("humaneval", "gsm8k"))
    everything = code + maths
    experts = np.array([[step["experts"][0] for step in journey] for journey in everything])

    def usage(journeys):
        table = np.zeros((LAYERS, EXPERTS))
        for journey in journeys:
            for step in journey:
                table[step["layer"], step["experts"][0]] += 1
        return 100 * table / len(journeys)

    def transitions(source, target):
        table = np.zeros((EXPERTS, EXPERTS))
        for journey in everything:
            table[journey[source]["experts"][0], journey[target]["experts"][0]] += 1
        return table / np.maximum(table.sum(axis=1, keepdims=True), 1)

    def close(found, expected):
        np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=0, atol=1e-9)

    def read(name):
        return pd.read_csv(folder / f"{name}.csv", keep_default_na=False)

    found = json.loads((folder / "findings.json").read_text())
    assert found["tokens"] == 2 * limit and found["domains"] == ["humaneval", "gsm8k"]
    close(read("expert_distribution")["percent"], usage(everything).ravel())
    related = np.zeros((LAYERS, LAYERS))
    for source in range(LAYERS):
        for target in range(LAYERS):
            if source != target:
                related[source, target] = transitions(source, target).max(axis=1).mean()
    close(np.load(folder / "affinity.npz")["reference"], related)
    near = np.mean([related[i, i + 1] for i in range(LAYERS - 1)])
    far = np.mean([related[i, j] for i in range(LAYERS) for j in range(LAYERS) if abs(i - j) > 1])
    close(found["affinity"]["adjacent"], near)
    close(found["affinity"]["non_adjacent"], far)
    close(found["affinity"]["adjacent_advantage_percent"], 100 * (near - far) / far)
    accuracy = []
    for hop in range(1, LAYERS):
        right = tried = 0
        for source in range(LAYERS - hop):
            best = transitions(source, source + hop).argmax(axis=1)
            for path in experts:
                right, tried = right + (best[path[source]] == path[source + hop]), tried + 1
        accuracy.append(100 * right / tried)
    close(read("hop_accuracy")["accuracy"], accuracy)
    low = [hop for hop, value in enumerate(accuracy, 1) if value < 62]
    assert found["low_accuracy"] == {"below_percent": 62, "hop": low[0], "reached": True} and low[0] > 1
    best = max(range(LAYERS - 1), key=lambda layer: related[layer, layer + 1])
    assert found["most_predictable"]["source_layer"] == best
    close(found["most_predictable"]["affinity"], related[best, best + 1])
    matrix = transitions(best, best + 1)
    close(found["most_predictable"]["transitions"], matrix)
    strong = [(a, b) for a in range(EXPERTS) for b in range(EXPERTS) if matrix[a, b] > 0.3]
    assert [(s["source_expert"], s["target_expert"]) for s in found["most_predictable"]["strong"]] == strong
    dominant = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS) if usage(everything)[layer, e] > 20]
    assert [(d["layer"], d["expert"]) for d in found["dominant_experts"]["experts"]] == dominant
    correlation = np.corrcoef(experts.T.astype(float))
    close(np.load(folder / "correlation.npz")["id_correlation"], correlation)
    apart = [(i, j) for i in range(LAYERS) for j in range(i + 2, LAYERS)]
    apart.sort(key=lambda pair: -abs(correlation[pair]))
    assert [(r["layer_a"], r["layer_b"]) for r in found["strongest_id_correlations"]] == apart[:5]
    close([r["r"] for r in found["strongest_id_correlations"]], [correlation[pair] for pair in apart[:5]])
    close(read("domain_difference")["difference"], (usage(code) - usage(maths)).ravel())
    paths = Counter(tuple(path) for path in experts.tolist())
    assert found["paths"]["unique"] == len(paths)
    top = read("top_paths")
    top = top[top["length"] == LAYERS]
    listed = [tuple(map(int, path.split(">"))) for path in top["path"]]
    assert list(zip(listed, top["count"].tolist(), strict=True)) == paths.most_common(10)
    for rank in (0, 1):
        gates = [step["gating_probs"][rank] for journey in everything for step in journey]
        close(found["gates"][rank]["mean"], np.mean(gates))
        close(found["gates"][rank]["std"], np.std(gates))
    summary = read("domain_summary").set_index("domain")
    for name, part in (("humaneval", code), ("gsm8k", maths)):
        gates = np.array([step["gating_probs"][0] for journey in part for step in journey])
        close(summary.loc[name, "mean_confidence"], gates.mean())
        close(summary.loc[name, "high_confidence_percent"], 100 * (gates > 0.8).mean())
        unique = [len({step["experts"][0] for step in journey}) for journey in part]
        close(summary.loc[name, "unique_experts"], np.mean(unique))


def test_same_seed_same_bytes_and_provenance(root, tmp_path):
    first, second = script(root, tmp_path / "a"), script(root, tmp_path / "b")
    names = sorted(file.name for file in first.iterdir() if not file.name.endswith(".meta.json"))
    assert names == sorted([f"{n}.csv" for n in CSV_COLUMNS] + [f"{n}.npz" for n in ARRAYS] + ["findings.json"])
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        meta = json.loads(results.meta_path(first / name).read_text())
        assert len(meta["data"]["sha256"]) == 64 and meta["data"]["journeys"] == 240 and meta["seeds"]
    other = script(root, tmp_path / "c", "--seed", 5)
    assert (other / "hop_accuracy.csv").read_bytes() != (first / "hop_accuracy.csv").read_bytes()
    assert (other / "expert_distribution.csv").read_bytes() == (first / "expert_distribution.csv").read_bytes()


def test_one_folder_and_quick(root, tmp_path):
    run("--input", root / "gsm8k_tokens", "--model", "m", "--output-dir", tmp_path, "--quick")
    folder = outputs(tmp_path, "m-quick")
    assert json.loads((folder / "findings.json").read_text())["domains"] == ["gsm8k"]
    meta = json.loads(results.meta_path(folder / "findings.json").read_text())
    assert meta["arguments"]["permutations"] == meta["arguments"]["resamples"] == 200
    assert pd.read_csv(folder / "domain_distance.csv").columns.tolist() == CSV_COLUMNS["domain_distance"].split()


@pytest.mark.skipif(not MIXTRAL.exists(), reason="needs the recorded Mixtral journeys in ../shared/mixtral_routing")
@pytest.mark.parametrize(("name", "complete"), [("humaneval_p0", 81), ("gsm8k_p0", 166)])
def test_recorded_mixtral_journeys(tmp_path, name, complete):
    run("--input", MIXTRAL / f"{name}.jsonl", "--model", "mixtral", "--output-dir", tmp_path)
    folder = outputs(tmp_path, "mixtral")
    found = json.loads((folder / "findings.json").read_text())
    assert (found["tokens"], found["layers"], found["experts"]) == (complete, 32, 8)
    distribution = pd.read_csv(folder / "expert_distribution.csv")
    assert (distribution.groupby("layer")["count"].sum() == complete).all()
    gates = pd.read_csv(folder / "gate_confidence.csv").set_index(["layer", "rank"])
    assert gates.loc[("all", 1), "mean"] + gates.loc[("all", 2), "mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no journeys in"),
        (["--input", "{absent}"], "absent does not exist"),
        (["--input", "{empty}"], "empty"),
        (["--limit", 3], "--limit has no effect here: it is for records given with --input"),
        (["--strict"], "--strict has no effect here"),
        (["--num-experts", 8], "--num-experts has no effect here"),
        (["--input", "{rows}", "--limit", 3], "--limit means nothing for"),
        (["--input", "{rows}", "--num-experts", 2], "experts out of range"),
        (["--input", "{broken}", "--strict"], "line 3"),
        (["--input", "{root}", "--limit", 0], "--limit: 0 is too small"),
        (["--input", "{root}", "--folds", 1], "--folds: 1 is too small"),
        (["--input", "{root}", "--seed", -1], "--seed: -1 is too small"),
        (["--input", "{root}", "--permutations", 0], "--permutations: 0 is too small"),
    ],
)
def test_refuses_in_one_line(root, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    rows = "".join(file.read_text() for file in sorted((root / "gsm8k_tokens").glob("p0_*.jsonl")))
    (tmp_path / "rows.jsonl").write_text(rows)
    lines = rows.splitlines(keepends=True)
    (tmp_path / "broken.jsonl").write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    paths = {name: tmp_path / name for name in ("absent", "empty", "rows.jsonl", "broken.jsonl")}
    paths = {name.removesuffix(".jsonl"): path for name, path in paths.items()} | {"root": root}
    arguments = [a.format(**paths) if isinstance(a, str) else a for a in arguments]
    line = refused(capsys, "--model", "some/model", "--output-dir", tmp_path / "out", *arguments)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_faulty_records_are_reported_and_left_out(root, tmp_path, capsys):
    lines = "".join(file.read_text() for file in sorted((root / "gsm8k_tokens").glob("*.jsonl"))).splitlines()
    lines[3] = lines[3][:20]
    np.random.default_rng(0).shuffle(lines)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    run("--input", tmp_path / "rows.jsonl", "--output-dir", tmp_path)  # filed under the name of the file
    assert "broken JSON: 1" in capsys.readouterr().err
    found = json.loads((outputs(tmp_path, "rows") / "findings.json").read_text())
    assert found["tokens"] == PROBLEMS * LENGTH - 1


def test_reads_the_store(journeys, tmp_path, capsys):
    """The same journeys from the store of 08 as from token files, and with the texts of tokens."""
    folder = outputs(tmp_path)
    order = np.lexsort((journeys.token_idx, journeys.problem_id, journeys.dataset))
    stored = Journeys(**vars(journeys)).select(order)
    for dataset in ("gsm8k", "humaneval"):
        part = stored.select(stored.dataset == dataset)
        write_shard(folder / "store" / shard_name(dataset, 0), part)
    common = ("--model", "some/model", "--output-dir", tmp_path, "--permutations", 49, "--resamples", 50)
    run(*common)
    assert "240 journeys of some/model: 7 layers, 2 of 5 experts" in capsys.readouterr().out
    tokens = pd.read_csv(folder / "token_routing.csv", keep_default_na=False)
    assert set(tokens["token"]) == set(journeys.token.tolist())
    files = script(write_token_files(journeys, tmp_path / "records"), tmp_path / "imported")
    for name in ("affinity.npz", "hop_accuracy.csv", "domain_distance.csv", "positions.csv", "gate_confidence.csv"):
        assert (files / name).read_bytes() == (folder / name).read_bytes(), name
    with pytest.raises(SystemExit):
        run(*common, "--input", folder, "--strict")
    assert "--strict means nothing for" in capsys.readouterr().err


def test_config_names_the_folder_that_09_writes():
    folder = results.output_dir(config.OUTPUT_DIR, config.JOURNEY_MODEL, config.QUICK)
    assert config.JOURNEYS_DIR == folder / "journeys"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        flag in shown for flag in ("--model", "--input", "--quick", "--seed", "--output-dir", "--domain-percent")
    )

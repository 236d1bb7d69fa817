"""Figures of the journey study: drawn from files that the analysis's functions wrote; checked by what is in them."""

import importlib.util
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from nbclient import NotebookClient

import config
from src.base import results
from src.figures import journey_tables, journeys, paths, style
from src.journeys import tables
from src.journeys.sample import to_sample

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "moe_routing_analysis.ipynb"
# Tokens that a reader of CSV files, or matplotlib, could take for something else.
TEXTS = ("\n", "$x$", "def", "null", " the", "\r", "1", "a very long token indeed")


def some_journeys(
    layers=3, experts=4, slots=2, domains=("humaneval", "gsm8k"), problems=5, length=16, texts=True, first=0
):
    """Journeys as a store holds them: an expert follows from the one before and the token, and gsm8k likes expert 0."""
    rng = np.random.default_rng(layers)
    rows = len(domains) * problems * length
    dataset = np.repeat(np.array(domains), problems * length)
    token_id = rng.integers(0, 24, rows)
    chosen = np.empty((rows, layers, slots), dtype=np.uint8)
    before = token_id
    for layer in range(layers):
        scores = rng.random((rows, experts))
        scores[np.arange(rows), (before * (layer + 2) + 1) % experts] += 0.5
        scores[dataset == "gsm8k", 0] += 0.6
        chosen[:, layer] = np.argsort(-scores, axis=1)[:, :slots]
        before = chosen[:, layer, 0]
    gates = np.sort(rng.dirichlet(np.full(slots, 2.0), (rows, layers)), axis=2)[:, :, ::-1]
    names = [*TEXTS, *(f" t{i}" for i in range(24))]
    return SimpleNamespace(
        dataset=dataset,
        problem_id=np.tile(np.repeat(np.arange(problems), length), len(domains)).astype(np.int32),
        token_idx=np.tile(np.arange(length, dtype=np.int32), len(domains) * problems),
        token_id=token_id.astype(np.int32) if texts else np.full(rows, -1, np.int32),
        token=np.array([names[i] if texts else "" for i in token_id], dtype=object),
        is_generated=np.zeros(rows, dtype=bool),
        experts=chosen,
        gating_probs=gates.astype(np.float16),
        model="some/model",
        layers=tuple(range(first, first + layers)),
        num_experts=experts,
    )


def analysis_script():
    spec = importlib.util.spec_from_file_location("analyze_journeys", ROOT / "scripts" / "journeys" / "02_analyze.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path  # the script adds the repository to it
    return module


def write_results(folder, collected):
    """What 02_analyze.py writes for these journeys, by its own functions, with few draws."""
    script = analysis_script()
    settings = tables.Settings(folds=3, permutations=99, resamples=40, path_lengths=(2, 4, 8))
    meta = results.run_meta({}, None, None, {}, time.time(), "cpu", "float64")
    sample = to_sample(collected, config.JOURNEY_DATASETS)
    for name, content in tables.analyze(sample, settings).items():
        script.write(folder / name, content, meta)
    return folder


CASES = {
    "small": some_journeys(),
    "deep": some_journeys(32, 8, problems=3, first=1),
    "single": some_journeys(1, 4, 1, ("gsm8k",), 1, 9, texts=False),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("journeys")
    return {name: write_results(root / name, collected) for name, collected in CASES.items()}


@pytest.fixture
def read(folders):
    return lambda name, case="small": style.read_result(folders[case] / name, "journeys/02_analyze.py", ["layer"])


# figure -> (function, the files that it is drawn from)
FIGURES = {
    "expert_distribution": (journeys.plot_expert_distribution, ["expert_distribution.csv"]),
    "load_balance": (journeys.plot_load_balance, ["load_balance.csv"]),
    "gate_confidence": (journeys.plot_gate_confidence, ["gate_confidence.csv", "gate_histogram.csv", "findings.json"]),
    "transitions": (journeys.plot_transitions, ["transitions.npz"]),
    "affinity": (journeys.plot_affinity, ["affinity.npz"]),
    "correlation": (journeys.plot_correlation, ["correlation.npz"]),
    "hop_accuracy": (paths.plot_hop_accuracy, ["hop_accuracy.csv"]),
    "paths": (paths.plot_paths, ["paths.csv"]),
    "consecutive_tokens": (paths.plot_consecutive_tokens, ["consecutive_tokens.csv"]),
    "positions": (paths.plot_positions, ["positions.csv", "positions_by_layer.csv"]),
    "token_identity": (paths.plot_token_identity, ["token_identity.csv"]),
    "domain_difference": (paths.plot_domain_difference, ["domain_difference.csv"]),
    "domain_distance": (paths.plot_domain_distance, ["domain_distance.csv"]),
    "journey": (lambda examples: journeys.plot_journey(examples, "gsm8k", 2), ["example_journeys.npz"]),
}
TABLES = {
    "hop_table": (journey_tables.hop_table, ["hop_accuracy.csv"]),
    "transition_table": (journey_tables.transition_table, ["findings.json"]),
    "strong_transition_table": (journey_tables.strong_transition_table, ["strong_transitions.csv"]),
    "correlation_table": (journey_tables.correlation_table, ["findings.json", "correlation.npz"]),
    "path_table": (journey_tables.path_table, ["top_paths.csv"]),
    "token_table": (journey_tables.token_table, ["token_routing.csv"]),
    "domain_table": (journey_tables.domain_table, ["domain_summary.csv"]),
    "specific_expert_table": (journey_tables.specific_expert_table, ["domain_difference.csv"]),
}
# What there is of one layer, one domain, one problem and no tokens.
ALONE = {
    "expert_distribution", "load_balance", "gate_confidence", "paths", "consecutive_tokens", "positions",
    "journey", "path_table", "domain_table",
}  # fmt: skip


def build(name, read, case="small"):
    function, files = (FIGURES | TABLES)[name]
    return function(*(read(file, case) for file in files))


def meshes(figure):
    """Values of the heat maps, in order of the panels (not of colour bars); NaN where a cell has none."""
    found = []
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            found += [mesh.get_array().filled(np.nan) for mesh in axes.collections if isinstance(mesh, QuadMesh)]
    return found


def assert_no_overlap(axes, name):
    for axis in (axes.xaxis, axes.yaxis):
        labels = [label for label in axis.get_ticklabels() if label.get_text().strip() and label.get_visible()]
        boxes = [label.get_window_extent() for label in labels]
        for one, two in zip(boxes, boxes[1:], strict=False):
            width = min(one.x1, two.x1) - max(one.x0, two.x0)
            height = min(one.y1, two.y1) - max(one.y0, two.y0)
            assert width <= 1 or height <= 1, f"{name}: tick labels overlap"


@pytest.mark.parametrize("case", ["small", "deep"])
@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_readable(name, case, read):
    """No warning (missing glyph, failed layout), every axis named, no two tick labels over each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = build(name, read, case)
        figure.draw_without_rendering()
    assert isinstance(figure, Figure)
    panels = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
    assert panels
    edges = figure.bbox
    for axes in panels:
        assert axes.get_xlabel() and axes.get_ylabel(), "an axis has no name"
        assert_no_overlap(axes, f"{name} ({case})")
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            box = text.get_window_extent()
            inside = edges.x0 - 1 <= box.x0 and box.x1 <= edges.x1 + 1 and box.y0 >= -1 and box.y1 <= edges.y1 + 1
            assert inside, f"{name} ({case}): {text.get_text()!r} is cut off"
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            assert axes.get_ylabel(), "a colour bar has no name"


def test_same_data_same_bytes(read, tmp_path):
    first, second = (
        style.save_figure(build("domain_distance", read), tmp_path / f"{i}.png").read_bytes() for i in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", FIGURES | TABLES)
def test_one_layer_one_domain_one_problem(name, read):
    if name in ALONE:
        figure = build(name, read, "single")
        if name in FIGURES:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                figure.draw_without_rendering()
        else:
            assert len(figure)
    elif name == "strong_transition_table":
        with pytest.raises(style.NothingToDraw, match="--strong-percent"):
            build(name, read, "single")
    else:
        with pytest.raises(style.NothingToDraw, match="one layer|one data set|no tokens|two apart"):
            build(name, read, "single")


# -- what is drawn is what the files say
def test_journey(read):
    collected, examples = CASES["small"], read("example_journeys.npz")
    assert journeys.journey_names(examples) == {"humaneval": 80, "gsm8k": 80}
    row = np.flatnonzero(collected.dataset == "gsm8k")[2]
    figure = build("journey", read)
    expected = np.full((4, 3), np.nan)
    for layer in range(3):
        expected[collected.experts[row, layer], layer] = collected.gating_probs[row, layer]
    np.testing.assert_allclose(meshes(figure)[0], expected)
    assert "gsm8k, problem 0, position 2" in figure.axes[0].get_title() and not figure.axes[0].lines
    with pytest.raises(ValueError, match="no example journeys of 'text', only of humaneval, gsm8k"):
        journeys.plot_journey(examples, "text")
    with pytest.raises(IndexError, match="journey 80 of gsm8k is not kept: the examples are 0 to 79"):
        journeys.plot_journey(examples, "gsm8k", 80)


def test_journey_with_padding_and_without_probabilities(read):
    examples = read("example_journeys.npz")
    experts = examples["experts"].astype(np.int16)
    experts[0, 1] = -1  # no expert at this layer
    experts[0, 2, 1] = -1
    figure = journeys.plot_journey(examples | {"experts": experts}, "humaneval")
    assert np.isfinite(meshes(figure)[0]).sum(axis=0).tolist() == [2, 0, 1]
    absent = np.full_like(examples["gating_probs"], np.nan)
    figure = journeys.plot_journey(examples | {"gating_probs": absent}, "humaneval")
    assert "no gate probabilities" in figure.axes[0].get_title()
    assert np.isfinite(meshes(figure)[0]).sum(axis=0).tolist() == [2, 2, 2]
    figure.draw_without_rendering()


def test_distribution(read):
    table = read("expert_distribution.csv")
    first, second = meshes(build("expert_distribution", read))
    np.testing.assert_allclose(first.T.ravel(), table["percent"])
    np.testing.assert_allclose(second.T.ravel(), table["percent_topk"])
    assert len(meshes(build("expert_distribution", read, "single"))) == 1  # one expert per token


def test_domain_difference_and_distance(read):
    for case in ("small", "deep"):
        table = read("domain_difference.csv", case)
        figure = build("domain_difference", read, case)
        np.testing.assert_allclose(meshes(figure)[0].T.ravel(), table["difference"], atol=1e-9)
        (dots,) = (points for points in figure.axes[0].collections if isinstance(points, PathCollection))
        marked = table[table["prefers"] != ""]
        first = CASES[case].layers[0]
        cells = {(int(x) + first, int(y)) for x, y in dots.get_offsets()}
        assert cells == set(zip(marked["layer"], marked["expert"], strict=True)) and 0 < len(marked) < len(table)
    shown = build("specific_expert_table", read)
    table = read("domain_difference.csv").set_index(["layer", "expert"])
    for row in shown.itertuples(index=False):
        assert table.loc[(row[2], row[3]), "prefers"] == row[0]
        assert float(row[5]) == pytest.approx(table.loc[(row[2], row[3]), "difference"], abs=0.051)
    distance = read("domain_distance.csv")
    (left,) = build("domain_distance", read).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), distance["js_distance"])
    filled = (left.collections[0].get_facecolor()[:, :3] != 1).any(axis=1)
    assert filled.tolist() == (distance["p_any_layer"] < 0.05).tolist() and filled.any()


def test_load_balance_and_gates(read):
    table = read("load_balance.csv")
    for axes, column in zip(build("load_balance", read).axes, ("entropy_ratio", "max_over_mean", "gini"), strict=True):
        for line, choice in zip(axes.lines, ("top1", "topk"), strict=False):
            np.testing.assert_allclose(line.get_ydata(), table.loc[table["choice"] == choice, column])
    gates = CASES["small"].gating_probs.astype(float)
    left, middle, right = build("gate_confidence", read).axes
    bars = [patch for patch in left.patches if isinstance(patch, StepPatch)]
    for rank, patch in enumerate(bars):
        values, edges, _ = patch.get_data()
        expected, _ = np.histogram(gates[:, :, rank], bins=edges)
        np.testing.assert_allclose(values, 100 * expected / gates[:, :, rank].size)
        np.testing.assert_allclose(middle.lines[rank].get_ydata(), gates[:, :, rank].mean(axis=0))
        assert f"mean {gates[:, :, rank].mean():.3f}" in patch.get_label()
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], 100 * (gates[:, :, 0] > 0.8).mean(axis=0))
    assert "above 0.8" in right.get_title()
    empty = read("gate_confidence.csv").assign(decisions=0)
    with pytest.raises(style.NothingToDraw, match="no gate probabilities"):
        journeys.plot_gate_confidence(empty, read("gate_histogram.csv"), read("findings.json"))


def test_transitions(read):
    transitions = read("transitions.npz", "deep")
    figure = build("transitions", read, "deep")
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert [axes.get_title() for axes in panels] == ["Layer 1 to 2", "Layer 16 to 17", "Layer 31 to 32"]
    for mesh, index in zip(meshes(figure), (0, 15, 30), strict=True):
        np.testing.assert_allclose(mesh, transitions["adjacent_probabilities"][index])
    used = transitions["counts"][4, 5].sum(axis=1)
    transitions["counts"][4, 5, used.argmax()] = 0  # an expert that the layer never uses
    used[used.argmax()] = 0
    (mesh,) = meshes(journeys.plot_transitions(transitions, [5]))
    assert np.isnan(mesh).all(axis=1).tolist() == (used == 0).tolist() and np.isfinite(mesh[used > 0]).all()
    with pytest.raises(ValueError, match="layer 32 has no next one"):
        journeys.plot_transitions(transitions, [32])


@pytest.mark.parametrize("case", ["small", "deep"])
def test_layer_pairs(read, case):
    related, correlation = read("affinity.npz", case), read("correlation.npz", case)
    expected = [related["reference"], related["weighted"], related["weighted"] - related["majority"], related["nmi"]]
    expected += [correlation[name] for name in ("id_correlation", "id_correlation_relabelled", "cramers_v")]
    drawn = [*meshes(build("affinity", read, case)), *meshes(build("correlation", read, case))]
    apart = ~np.eye(len(related["layers"]), dtype=bool)
    for mesh, matrix in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(mesh[apart], matrix[apart])
        assert np.isnan(np.diagonal(mesh)).all()


def test_hop_accuracy(read):
    table = read("hop_accuracy.csv", "deep")
    (axes,) = build("hop_accuracy", read, "deep").axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["in-sample (as the reference)"], table["accuracy"])
    np.testing.assert_allclose(lines["most common expert, held-out problems"], table["held_out_majority"])
    np.testing.assert_allclose(lines["most common, in-sample"], table["majority"])
    assert set(lines["random expert"]) == {12.5}
    line, _, (bars,) = axes.containers[0].lines
    np.testing.assert_allclose(line.get_ydata().astype(float), table["held_out_accuracy"])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, table[["ci_low", "ci_high"]])
    shown = build("hop_table", read, "deep")
    assert shown.loc[1, "in-sample (%)"] == f"{table['accuracy'][0]:.1f}" and shown.index[-1] == 31
    one_problem = table.assign(held_out_accuracy=np.nan, ci_low=np.nan, ci_high=np.nan, held_out_majority=np.nan)
    (axes,) = paths.plot_hop_accuracy(one_problem).axes
    assert len(axes.lines) == 3 and not axes.containers


def test_paths(read):
    table, top = read("paths.csv", "deep"), read("top_paths.csv", "deep")
    (axes,) = build("paths", read, "deep").axes
    for line, length in zip(axes.lines, (2, 4, 8, 32), strict=True):
        rows = table[table["length"] == length]
        np.testing.assert_allclose(line.get_ydata(), 100 * rows["uniqueness_ratio"])
        assert line.get_xdata().tolist() == rows["start_layer"].tolist()
    shown = journey_tables.path_table(top)
    assert shown["layers"].tolist() == top["length"].tolist() and shown["tokens"].tolist() == top["count"].tolist()
    short = top.loc[top["length"] == 4, "path"].iloc[0]
    assert shown.loc[shown["layers"] == 4, "path"].iloc[0] == short.replace(">", "·")
    path = top.loc[top["length"] == 32, "path"].iloc[0].split(">")
    assert shown.loc[shown["layers"] == 32, "path"].iloc[0] == "·".join([*path[:6], "…", *path[-3:]])
    assert set(journey_tables.path_table(top, 3).index) == {1, 2, 3}


def test_tokens_and_positions(read):
    consecutive, identity = read("consecutive_tokens.csv"), read("token_identity.csv")
    for axes, column in zip(build("consecutive_tokens", read).axes, ("agreement", "overlap"), strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * consecutive[column])
        np.testing.assert_allclose(axes.lines[1].get_ydata(), 100 * consecutive[f"{column}_chance"])
    with pytest.raises(style.NothingToDraw, match="next to each other"):
        paths.plot_consecutive_tokens(consecutive.assign(pairs=0))
    (axes,) = build("token_identity", read).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * identity["same_token"])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), 100 * identity["any_tokens"])
    positions, by_layer = read("positions.csv"), read("positions_by_layer.csv")
    figure = build("positions", read)
    np.testing.assert_allclose(meshes(figure)[0].ravel(), by_layer["js_distance"])
    middle, right = (axes for axes in figure.axes if axes.patches and axes.get_label() != "<colorbar>")
    np.testing.assert_allclose([bar.get_width() for bar in middle.patches], positions["mean_confidence"])
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], positions["unique_experts"])


def test_tables_show_the_files(read):
    found = read("findings.json")
    shown = build("transition_table", read)
    np.testing.assert_allclose(shown, found["most_predictable"]["transitions"], atol=5.1e-4)
    strong = read("strong_transitions.csv")
    assert build("strong_transition_table", read)["probability (%)"].iloc[0] == f"{strong['percent'].max():.1f}"
    correlation = read("correlation.npz", "deep")
    row = build("correlation_table", read, "deep").iloc[0]
    first, second = (int(layer) - 1 for layer in row["layers"].split(" and "))  # layer ids start at 1
    assert row["r of ids"] == f"{correlation['id_correlation'][first, second]:+.3f}"
    assert row["Cramér's V"] == f"{correlation['cramers_v'][first, second]:.3f}"
    tokens = build("token_table", read)
    assert set(tokens["token"]) <= {repr(text) for text in CASES["small"].token} and "'\\r'" in set(tokens["token"])
    routing = read("token_routing.csv")
    alike = journey_tables.token_table(routing, "agreement", 3)
    largest = routing["agreement"].sort_values(ascending=False).head(3)
    assert alike["agreement (%)"].tolist() == [f"{100 * value:.1f}" for value in largest]
    assert build("domain_table", read)["tokens"].tolist() == ["80", "80"]


def test_findings_in_words(read):
    found = read("findings.json")
    text = journey_tables.findings_text(found)
    assert "160 tokens of 10 problems (humaneval, gsm8k), 3 layers, 2 of 4 experts per token." in text
    assert f"{found['gates'][0]['mean']:.3f}" in text and f"{found['affinity']['adjacent']:.3f}" in text
    assert "labels" in text and "never under 15 %" in text
    assert max(map(len, text.splitlines())) <= 110
    words = " ".join(text.split())
    for expert in found["dominant_experts"]["experts"]:
        assert f"layer {expert['layer']} E{expert['expert']} ({expert['percent']:.1f} %)" in words
    many = [{"layer": layer, "expert": 0, "percent": 50.0} for layer in range(40)]
    found["dominant_experts"]["experts"] = many
    found["low_accuracy"] = {"below_percent": 15.0, "hop": 2, "reached": True}
    words = " ".join(journey_tables.findings_text(found).split())
    assert "layer 23 E0 (50.0 %) and 16 more." in words and "under 15 % for the first time at 2." in words
    alone = journey_tables.findings_text(read("findings.json", "single"))
    assert "1 layer, 1 of 4 experts" in alone and "Affinity" not in alone and "In-sample" not in alone


# -- files
def test_tokens_survive_the_csv(read):
    """ "null" and "1" stay text, a carriage return does not end a line, an empty cell is empty text."""
    table = read("token_routing.csv")
    assert set(table["token"]) == set(CASES["small"].token.tolist()) >= set(TEXTS)
    assert read("domain_difference.csv")["prefers"].map(type).eq(str).all()


def test_missing_file_names_the_script(tmp_path, capsys):
    assert style.read_result(tmp_path / "affinity.npz", "journeys/02_analyze.py") is None
    shown = capsys.readouterr().out
    assert shown == "affinity.npz is not there yet. Run: python scripts/journeys/02_analyze.py\n"
    with pytest.raises(ValueError, match="x.parquet: results are .csv, .json or .npz"):
        style.read_result(tmp_path / "x.parquet", "x.py")


def test_imports_no_torch():
    code = "import sys; from src.figures import journey_tables, journeys, paths; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- the notebook
def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def client_for(notebook, monkeypatch, root, start=ROOT):
    monkeypatch.setenv("BLOCKFFN_OUTPUT_DIR", str(root))
    monkeypatch.setenv("BLOCKFFN_JOURNEY_MODEL", "some/model")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(start)}})


def outputs_of(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return outputs, "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("case", ["small", "single", None])
def test_notebook_executes(case, folders, tmp_path, monkeypatch):
    """With two domains, with one layer and one domain only, and without results; from the root and its own folder."""
    folder = tmp_path / "some-model" / "journeys"
    if case:
        shutil.copytree(folders[case], folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client_for(notebook, monkeypatch, tmp_path, ROOT if case else ROOT / "notebooks").execute()
    outputs, printed = outputs_of(notebook)
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    saved = {file.stem for file in folder.glob("figures/*.png")}
    assert len(figures) == len(saved)
    if case == "small":
        assert "is not there yet" not in printed and "160 tokens of 10 problems" in printed
        stand_ins = {f"journey_{domain}_{number}" for domain in ("humaneval", "gsm8k") for number in (26, 53)}
        assert saved == set(FIGURES) | stand_ins
        assert (
            sum("text/html" in output.get("data", {}) for output in outputs) == len(TABLES) + 2
        )  # tokens in three orders
    elif case == "single":
        assert saved == (ALONE & set(FIGURES)) | {"journey_gsm8k_3", "journey_gsm8k_6"}
        assert "one data set only" in printed and "one layer only" in printed and "9 tokens of 1 problem" in printed
    else:
        assert "affinity.npz is not there yet. Run: python scripts/journeys/02_analyze.py" in printed


def test_notebook_selector_where_someone_is_there(folders, tmp_path, monkeypatch):
    """A front end that takes input gets widgets in place of the stand-ins, and they redraw."""
    folder = tmp_path / "some-model" / "journeys"
    shutil.copytree(folders["small"], folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    places = [i for i, cell in enumerate(notebook.cells) if "someone_is_there" in cell.source]
    (place,) = (i for i in places if notebook.cells[i].cell_type == "code")
    notebook.cells = notebook.cells[: place + 1]
    move = "domain.value = 'gsm8k'; token.value = 7; print(token.max, choose.widget.children[:2] == (domain, token))"
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in (move, "choose('gsm8k', 500)")]  # at most 79
    client = client_for(notebook, monkeypatch, tmp_path)
    with client.setup_kernel():
        client.kc.allow_stdin = True
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    outputs, printed = outputs_of(notebook)
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert [file.name for file in (folder / "figures").iterdir()] == ["journey.png"]  # no stand-ins
    assert "79 True" in printed
    assert "image/png" in notebook.cells[-1].outputs[0].data


def test_layers_are_numbers(read):
    """Layer columns stay numbers where every layer has one, so that figures can use them as positions."""
    assert pd.api.types.is_integer_dtype(read("load_balance.csv")["layer"])
    assert read("gate_confidence.csv")["layer"].astype(str).iloc[0] == "all"

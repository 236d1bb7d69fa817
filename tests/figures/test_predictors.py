"""Figures about predicting experts: drawn from made-up result files with the columns of 03_predict.py's."""

import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient

from src.base import results
from src.figures import predictors, style
from src.journeys import expert_cache

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "moe_routing_analysis.ipynb"
ACCURACY = {
    "uniform": 0.125, "majority": 0.2, "previous_token": 0.24, "transition": 0.36, "lookup": 0.42, "xgboost": 0.43,
    "mlp": 0.45, "mlp_tuned": 0.47, "stale_gate": 0.71, "linear_probe": 0.74, "mlp_probe": 0.78,
}  # fmt: skip
COLUMNS = (
    "predictor", "split", "hop", "domain", "top1", "top1_low", "top1_high", "top2", "slot_overlap", "whole_set", "ece",
    "train_seconds", "predict_us", "parameters",
)  # fmt: skip


def metrics(top1, width):
    interval = (top1 - width, min(top1 + width, 1)) if width else (np.nan, np.nan)
    top2 = top1 + 0.6 * (1 - top1)
    return dict(
        top1=top1, top1_low=interval[0], top1_high=interval[1], top2=top2, slot_overlap=0.9 * top1 + 0.1,
        whole_set=0.6 * top1, ece=0.2 * (1 - top1),
    )  # fmt: skip


def made_up(layers=32, experts=8, hops=(1, 2, 3, 4), domains=("humaneval", "gsm8k"), names=tuple(ACCURACY), width=0.02):
    """{file name: table} of 03_predict.py: accuracies that fall with the hop and vary with layer and domain."""
    rng = np.random.default_rng(layers)
    table, by_layer = [], []
    for name in names:
        for hop in hops:
            for number, domain in enumerate(("all", *domains)):
                top1 = max(1 / experts, ACCURACY[name] * 0.9 ** (hop - 1) + (0, 0.03, -0.03)[number])
                key = {"predictor": name, "split": "problems", "hop": hop, "domain": domain}
                cost = {"train_seconds": 3.25, "predict_us": 12.5, "parameters": 1234567}
                table.append(key | metrics(top1, width) | cost)
                for layer in range(hop, layers):
                    value = np.clip(top1 + 0.1 * np.sin(layer / 3) + 0.02 * rng.standard_normal(), 0, 1)
                    by_layer.append(key | {"rows": 500, "layer": layer} | metrics(value, 2 * width))
    leakage = []
    for name, leak in {"lookup": 0.05, "xgboost": 0.11, "mlp": 0.16}.items():
        accuracies = {"top1_rows_split": ACCURACY[name] + leak, "top1_problem_split": ACCURACY[name], "leakage": leak}
        interval = {"ci_low": leak - width, "ci_high": leak + width} if width else {"ci_low": None, "ci_high": None}
        leakage.append({"predictor": name, "hop": 1, "seeds": 3, "rows": 12345} | accuracies | interval)
    return {
        "predictors.csv": pd.DataFrame(table)[list(COLUMNS)],
        "predictors_per_layer.csv": pd.DataFrame(by_layer),
        "leakage.csv": pd.DataFrame(leakage),
        "cache_curves.csv": pd.DataFrame(cache_curves(layers, experts, names)),
    }


def cache_curves(layers, experts, names):
    """The simulator's own rows, on routing in which a token repeats some of the previous one's experts."""
    rng = np.random.default_rng(0)
    scores = rng.random((80, layers, experts))
    for token in range(1, len(scores)):
        scores[token] += 0.45 * scores[token - 1]
    trace = np.argsort(-scores, axis=2)[:, :, :2]
    predictions = {}
    for name in names:
        right = rng.random((80, layers, 1)) < ACCURACY[name]
        guess = np.where(right, trace, np.argsort(rng.random(scores.shape), axis=2)[:, :, :2])
        guess[:, :1] = -1
        predictions[name] = guess
    sizes = sorted({1, 2, 3, 4, 6, experts} & set(range(experts + 1)))
    return expert_cache.cache_curves(
        trace, experts, sizes, [4, 8, 16, 25, 50, 100], 99_090_432, 0.616, np.ones((layers, experts)), predictions
    )


CASES = {
    "deep": lambda: made_up(),
    "small": lambda: made_up(3, 4, (1, 2), ("humaneval", "gsm8k"), tuple(ACCURACY)[:6]),
    "single": lambda: made_up(2, 4, (1,), ("mixtral",), ("majority", "lookup"), width=0),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("predictions")
    meta = results.run_meta({}, None, None, {}, time.time(), "cpu", "float64")
    for case, build in CASES.items():
        for name, table in build().items():
            results.write_csv(root / case / name, table, meta)
    return {case: root / case for case in CASES}


@pytest.fixture
def read(folders):
    return lambda name, case="deep": style.read_result(folders[case] / name, "journeys/03_predict.py", ["layer"])


# figure -> (function, its file)
FIGURES = {
    "predictor_comparison": (predictors.plot_comparison, "predictors.csv"),
    "predictor_domains": (predictors.plot_domains, "predictors.csv"),
    "predictor_layers": (predictors.plot_layers, "predictors_per_layer.csv"),
    "predictor_hops": (predictors.plot_hops, "predictors.csv"),
    "cache_sizes": (predictors.plot_cache_sizes, "cache_curves.csv"),
    "cache_bandwidths": (predictors.plot_bandwidths, "cache_curves.csv"),
    "cache_prefetch": (predictors.plot_prefetch, "cache_curves.csv"),
}
# What one hop and one data set have nothing for.
NOT_ALONE = {"predictor_domains", "predictor_hops"}


def build(name, read, case="deep"):
    function, file = FIGURES[name]
    return function(read(file, case))


def bars(axes):
    """{tick label: width} of horizontal bars."""
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(labels, [patch.get_width() for patch in axes.patches], strict=True))


def lines(axes):
    """{label: (x, y)} of the named lines, those with error bars too."""
    handles, labels = axes.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle if hasattr(handle, "get_xdata") else handle.lines[0]
        found[label] = (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_readable(name, case, read):
    """No warning (missing glyph, failed layout), every axis named, nothing cut off, no two tick labels overlap."""
    if case == "single" and name in NOT_ALONE:
        with pytest.raises(style.NothingToDraw, match="only"):
            build(name, read, case)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = build(name, read, case)
        figure.draw_without_rendering()
    assert isinstance(figure, Figure) and figure.axes
    edges = figure.bbox
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and (axes.get_title() or figure.get_suptitle())
        legend = [axes.get_legend()] if axes.get_legend() else []
        for part in (axes.xaxis.label, axes.yaxis.label, axes.title, *legend):
            box = part.get_window_extent()
            inside = edges.x0 - 1 <= box.x0 and box.x1 <= edges.x1 + 1 and box.y0 >= -1 and box.y1 <= edges.y1 + 1
            assert inside, f"{name} ({case}): {part} is cut off"
        for axis in (axes.xaxis, axes.yaxis):
            shown = [label for label in axis.get_ticklabels() if label.get_text().strip() and label.get_visible()]
            boxes = [label.get_window_extent() for label in shown]
            for one, two in zip(boxes, boxes[1:], strict=False):
                width = min(one.x1, two.x1) - max(one.x0, two.x0)
                height = min(one.y1, two.y1) - max(one.y0, two.y0)
                assert width <= 1 or height <= 1, f"{name} ({case}): tick labels overlap"


def test_same_data_same_bytes(read, tmp_path):
    first, second = (style.save_figure(build("cache_sizes", read), tmp_path / f"{i}.png").read_bytes() for i in "ab")
    assert first == second


def test_comparison_shows_the_file_best_first(read):
    table = read("predictors.csv")
    left, right = build("predictor_comparison", read).axes
    expected = table[(table["hop"] == 1) & (table["domain"] == "all")].sort_values("top1", ascending=False)
    names = [name.replace("_", " ") for name in expected["predictor"]]
    assert list(bars(left)) == names and list(bars(left).values()) == pytest.approx(100 * expected["top1"])
    assert bars(right) == pytest.approx(dict(zip(names, 100 * expected["slot_overlap"], strict=True)))
    ends = np.array([segment[:, 0] for segment in left.collections[-1].get_segments()])
    assert ends == pytest.approx(100 * expected[["top1_low", "top1_high"]].to_numpy())
    diamonds = left.collections[0].get_offsets()[:, 0]
    assert np.asarray(diamonds) == pytest.approx(100 * expected["top2"])
    later = predictors.plot_comparison(table, hop=3, domain="gsm8k")
    row = table[(table["hop"] == 3) & (table["domain"] == "gsm8k")].set_index("predictor")
    assert bars(later.axes[0])["mlp probe"] == pytest.approx(100 * row.loc["mlp_probe", "top1"])
    assert "3 layers ahead" in later.get_suptitle() and "gsm8k" in later.get_suptitle()
    with pytest.raises(style.NothingToDraw, match="split rows, hop any, domain all"):
        predictors.plot_comparison(table, split="rows")


def test_missing_intervals_are_said(read):
    figure = build("predictor_comparison", read, "single")
    assert "no intervals: too few problems" in figure.axes[0].get_title()
    assert "bars: 95 %" in build("predictor_comparison", read).axes[0].get_title()


def test_layers_hops_and_domains(read):
    table, per_layer = read("predictors.csv"), read("predictors_per_layer.csv")
    (axes,) = build("predictor_layers", read).axes
    part = per_layer[(per_layer["hop"] == 1) & (per_layer["domain"] == "all")]
    found = lines(axes)
    assert len(found) == 11
    for name in ACCURACY:
        rows = part[part["predictor"] == name]
        x, y = found[name.replace("_", " ")]
        assert x.tolist() == list(range(1, 32)) and y == pytest.approx(100 * rows["top1"].to_numpy())
    (axes,) = build("predictor_hops", read).axes
    whole = table[table["domain"] == "all"]
    for name, (x, y) in lines(axes).items():
        rows = whole[whole["predictor"] == name.replace(" ", "_")]
        assert np.round(x).tolist() == [1, 2, 3, 4] and y == pytest.approx(100 * rows["top1"].to_numpy())
    (axes,) = build("predictor_domains", read).axes
    for domain in ("humaneval", "gsm8k"):
        rows = table[(table["domain"] == domain) & (table["hop"] == 1)].set_index("predictor")
        order = [label.get_text().replace(" ", "_") for label in axes.get_yticklabels()]
        assert lines(axes)[domain][0] == pytest.approx(100 * rows.loc[order, "top1"].to_numpy())


@pytest.mark.parametrize("name", ["cache_sizes", "cache_bandwidths", "cache_prefetch"])
def test_cache_figures_say_that_they_are_theory(name, read):
    for case in CASES:
        assert build(name, read, case).get_suptitle().startswith("Theory only")


def test_cache_curves_show_the_file(read):
    curves = read("cache_curves.csv")
    figure = build("cache_sizes", read)
    assert len(figure.axes) == 8 and "25 GB/s" in figure.get_suptitle()
    at = curves[curves["bandwidth_gb_s"] == 25]
    for axes, (scope, column) in zip(
        figure.axes, [(scope, column) for scope in predictors.SCOPES for column in predictors.CURVES], strict=True
    ):
        found = lines(axes)
        factor = predictors.CURVES[column][1]
        for policy in ("lru", "belady"):
            rows = at[(at["policy"] == policy) & (at["scope"] == scope)]
            x, y = found[predictors.POLICIES[policy][0]]
            assert x.tolist() == rows["capacity"].tolist() and y == pytest.approx(factor * rows[column].to_numpy())
        on_demand = at[(at["policy"] == "on_demand") & (at["scope"] == scope)]
        assert found["on demand, no cache"][1] == pytest.approx(factor * np.repeat(on_demand[column], 2))
    # one predictor of each kind: the one with the shortest mean time
    prefetch = at[at["policy"] == "prefetch"].groupby("predictor")["ms_per_token"].mean()
    expected = set()
    for family in predictors.FAMILY_COLOURS:
        kin = [name for name in prefetch.index if predictors.STYLES[name][0] == family]
        expected.add(f"LRU + prefetch by {prefetch[kin].idxmin().replace('_', ' ')}")
    assert {label for label in lines(figure.axes[0]) if "prefetch" in label} == expected
    figure = build("cache_bandwidths", read)
    assert "4 experts held per layer" in figure.get_suptitle()  # half of the largest
    at = curves[(curves["capacity"] == 4) & (curves["policy"] == "lru") & (curves["scope"] == "per_layer")]
    x, y = lines(figure.axes[2])["LRU"]
    assert x.tolist() == [4, 8, 16, 25, 50, 100] and y == pytest.approx(at["stall_ms_per_token"].to_numpy())
    nearest = predictors.plot_cache_sizes(curves, 33.0)
    assert "25 GB/s" in nearest.get_suptitle()
    with pytest.raises(style.NothingToDraw, match="one bandwidth"):
        predictors.plot_bandwidths(curves[curves["bandwidth_gb_s"] == 25])


def test_prefetch_is_shown_against_lru_alone(read):
    curves = read("cache_curves.csv")
    left, right = build("cache_prefetch", read).axes
    at = curves[(curves["capacity"] == 4) & (curves["bandwidth_gb_s"] == 25) & (curves["scope"] == "per_layer")]
    alone = at[at["policy"] == "lru"].iloc[0]
    ahead = at[at["policy"] == "prefetch"].set_index("predictor")
    saved, excess = bars(left), bars(right)
    assert len(saved) == 11 and list(saved.values()) == sorted(saved.values(), reverse=True)
    for name, row in ahead.iterrows():
        label = name.replace("_", " ")
        assert saved[label] == pytest.approx(alone["stall_ms_per_token"] - row["stall_ms_per_token"])
        assert excess[label] == pytest.approx(row["mb_per_token"] - alone["mb_per_token"])
    with pytest.raises(style.NothingToDraw, match="no predictor"):
        predictors.plot_prefetch(curves[curves["policy"] != "prefetch"])


def test_no_two_predictors_look_alike():
    looks = [(colour, marker, line) for _, colour, marker, line in predictors.STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert set(predictors.STYLES) == set(ACCURACY)
    for family, colour in predictors.PREFETCH_COLOURS.items():
        assert colour not in {look[1] for look in predictors.POLICIES.values()}, family


def test_tables(read):
    table = predictors.comparison_table(read("predictors.csv"))
    assert table.index[0] == "mlp probe" and table.index.name == "1 layer ahead"
    first = table.iloc[0]
    assert (first["top-1 (%)"], first["95 % interval"], first["times random"]) == ("78.0", "76.0 to 80.0", "6.24")
    assert first["parameters"] == "1,234,567" and first["calibration error"] == "0.044"
    assert predictors.comparison_table(read("predictors.csv", "single"))["95 % interval"].tolist() == ["-", "-"]
    leaks = predictors.leakage_table(read("leakage.csv"))
    assert leaks.loc["mlp", "leakage (points)"] == "+16.0" and leaks.loc["mlp", "95 % interval"] == "+14.0 to +18.0"
    assert leaks["layers ahead"].tolist() == [1, 1, 1] and leaks.loc["mlp", "test rows"] == "12,345"
    with pytest.raises(style.NothingToDraw):
        predictors.leakage_table(read("leakage.csv").head(0))


def test_imports_no_torch():
    code = "import sys; import src.figures.predictors, src.journeys.expert_cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("case", ["small", None])
def test_notebook_section(case, folders, tmp_path, monkeypatch):
    """The section draws and saves its figures; without 03_predict.py's files it says once which command writes them."""
    folder = tmp_path / "some-model" / "journeys"
    if case:
        shutil.copytree(folders[case], folder)
    monkeypatch.setenv("BLOCKFFN_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("BLOCKFFN_JOURNEY_MODEL", "some/model")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    start = next(i for i, cell in enumerate(notebook.cells) if '<a id="prediction"></a>' in cell.source)
    notebook.cells = [notebook.cells[1], *notebook.cells[start:]]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    saved = {file.stem for file in folder.glob("figures/*.png")}
    shown = sum("text/html" in output.get("data", {}) for output in outputs)
    if case:
        assert saved == set(FIGURES) and shown == 2 and "Run:" not in printed
    else:
        assert not saved and printed.count("Run: python scripts/journeys/03_predict.py") == 1

"""Figures: drawn from synthetic result files that have the columns of the real ones; checked by what is in them."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient

from src.figures import hybrid, style

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS = 12, 32
PROMPTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "A ticket costs $12 and a drink costs $3. Two tickets and a drink cost",  # a pair of $: not mathematics
    "Once upon a time there was a very long prompt that goes on and on, well beyond any label's width, to be cut.",
]


def routing_signals(seed=0):
    rng = np.random.default_rng(seed)
    prompts = []
    for text in PROMPTS:
        tokens = ["<s>", *re.findall(r"\s?\S{1,6}|\n", text)]
        cells = np.round(rng.beta(6, 2, (LAYERS, len(tokens))) * EXPERTS) / EXPERTS
        prompts.append(
            {
                "prompt": text,
                "tokens": tokens,
                "overall_sparsity": float(cells.mean()),
                "per_layer_sparsity": {str(layer): float(cells[layer].mean()) for layer in range(LAYERS)},
                "per_token_sparsity": cells.tolist(),
            }
        )
    return {"prompts": prompts, "model": "blockffn-tiny", "num_layers": LAYERS, "num_experts": EXPERTS}


def _quality(delta, width, base=40.0):
    return {
        "perplexity": base * float(np.exp(delta)),
        "delta_nll": delta,
        "ci_low": delta - width,
        "ci_high": delta + width,
    }


def _speed(rng, ideal, executed):
    return {
        "tokens_per_second": 5000 * rng.uniform(0.8, 1),
        "decode_tokens_per_second": 60 * rng.uniform(0.8, 1),
        "memory_gb": 0.6 * rng.uniform(0.95, 1),
        "flops_ideal": ideal * 1e6,
        "flops_executed": executed * 1e6,
    }


def alpha_sweep(scale=0.12, seed=1):
    rng = np.random.default_rng(seed)
    rows = [{"alpha": "baseline", **_quality(0.0, 0.0), "bits_per_byte": 1.6, "kl": 0.0, "top1_agreement": 1.0}]
    rows[0] |= _speed(rng, 24, 24)
    for alpha in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
        delta = scale * alpha**2
        quality = _quality(delta, 0.1 * delta) | {"bits_per_byte": 1.6 + delta / 3, "kl": delta * 0.8}
        rows.append({"alpha": str(alpha), **quality, "top1_agreement": 1 - delta, **_speed(rng, 22, 30)})
    return pd.DataFrame(rows)


def alpha_domains():
    parts = []
    for index, domain in enumerate(("code", "docs", "math", "story")):
        part = alpha_sweep(0.08 + 0.05 * index, index)
        part.insert(0, "domain", domain)
        part["interval"] = "within one work" if domain == "story" else "documents"
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def layer_replacement():
    rng = np.random.default_rng(2)
    deltas = rng.gamma(1.2, 0.04, LAYERS)
    rows = [{"layer": str(layer), **_quality(float(d), 0.01)} for layer, d in enumerate(deltas)]
    order = np.argsort(deltas)
    for k in (2, 4, 6, 8):
        name = ",".join(str(layer) for layer in sorted(order[:k]))
        rows.append({"layer": f"combined_[{name}]", **_quality(float(deltas[order[:k]].sum() * 1.3), 0.03)})
    table = pd.DataFrame(rows)
    table["delta"] = table["perplexity"] - 40.0
    table["pct_change"] = 100 * table["delta"] / 40.0
    return table


def gate_columns(mode):
    """The columns that tables of results carry behind `mode`, of the modes that these tests make up."""
    control = mode.startswith("control_")
    parts = mode.split("_")
    share = next((float(part) for part in parts if part[:1].isdigit()), None)
    kind = "none" if mode == "baseline" else "control" if control else parts[0]
    recipe = mode.removeprefix("control_").rpartition("_")[0] if control else ""
    variant = parts[-1] if parts[-1] in ("threshold", "lookahead", "shared") or parts[-1][:2] == "t0" else ""
    matched_to = f"routing_hard_{share:g}" if control else ""
    for gate in ("learned", "lookahead"):
        if recipe == f"random_{gate}":
            base = "learned" if gate == "learned" else "routing_hard"
            recipe, variant = "random", gate
            matched_to = f"{base}_{share:g}" + ("" if gate == "learned" else f"_{gate}")
    return {
        "mode": mode, "kind": kind, "gate": recipe or kind,
        "hard": "soft" not in mode and kind not in ("none", "fixed"),
        "recipe": recipe, "matched_to": matched_to, "uses_document": control,
        "share_target": 0.0 if mode == "baseline" else share, "variant": "learned" if kind == "learned" else variant,
    }  # fmt: skip


def gated_hybrid():
    rng = np.random.default_rng(3)
    empty = {"vs_random": np.nan, "vs_random_ci_low": np.nan, "vs_random_ci_high": np.nan}
    rows = [{**gate_columns("baseline"), "share_realised": 0.0, **_quality(0.0, 0.0), **empty}]
    gains = {"fixed": -0.02, "routing_hard": -0.006, "routing_soft": -0.015, "learned": -0.011, "control_random": 0.0}
    for share in (0.25, 0.5, 0.75):
        for kind, gain in gains.items():
            versus = (
                {} if kind == "control_random" else dict(zip(empty, (gain, gain - 0.004, gain + 0.004), strict=True))
            )
            quality = _quality(0.12 * share + gain, 0.008)
            rows.append({**gate_columns(f"{kind}_{share}"), "share_realised": share, **quality, **empty, **versus})
    for temperature in (0.05, 0.2):
        versus = dict(zip(empty, (-0.012, -0.016, -0.008), strict=True))
        rows.append(
            {**gate_columns(f"routing_soft_0.5_t{temperature}"), "share_realised": 0.5, **_quality(0.05, 0.008)}
            | versus
        )
    rows.append({**gate_columns("routing_threshold"), "share_realised": 0.81, **_quality(0.1, 0.01), **empty})
    table = pd.DataFrame([row | _speed(rng, 22, 30) for row in rows])
    table["delta"] = table["perplexity"] - 40.0
    table["pct_change"] = 100 * table["delta"] / 40.0
    return table.assign(p_value=0.01, p_holm=0.1)


def verdict():
    return {
        "label": "preliminary: one sidecar seed, random control only",
        "rule": "supported if the 95 % interval of routing_hard_0.5 minus control_random_0.5 lies below 0",
        "outcome": "supported",
        "verdict": "The interval lies below 0.",
        "user_criterion": {"statement": "Routing should beat fixed alpha.", "words": "It does not."},
    }


def routing_by_layer():
    rng = np.random.default_rng(4)
    rows = []
    for layer in range(LAYERS):
        row = {"layer": str(layer), "tokens": 24000}
        for index, name in enumerate(("tls", "cls_2", "cls_4", "cls_8", "cls_16", "cls_32")):
            value = 0.8 - 0.12 * index + 0.03 * rng.normal()
            row |= {name: value, f"{name}_ci_low": value - 0.01, f"{name}_ci_high": value + 0.01}
            row |= {} if name == "tls" else {f"{name}_windows": 3000}
        rows.append(row)
    return pd.DataFrame(rows)


def routing_by_kind():
    rng = np.random.default_rng(5)
    kinds = ("function", "content", "continuation", "digit", "punctuation", "newline", "special")
    rows = [
        {"layer": str(layer), "kind": kind, "tokens": 1000 + index, "sparsity": 0.7 + 0.05 * rng.normal()}
        for layer in range(LAYERS)
        for index, kind in enumerate(kinds)
    ]
    return pd.DataFrame(rows)


FIGURES = {
    "sparsity_heatmap": lambda: hybrid.plot_sparsity_heatmap(routing_signals()),
    "token_text": lambda: hybrid.plot_token_text(routing_signals()["prompts"][1]),
    "token_heatmap": lambda: hybrid.plot_token_heatmap(routing_signals()["prompts"][2]),
    "extreme_tokens": lambda: hybrid.plot_extreme_tokens(routing_signals()),
    "text_sparsity": lambda: hybrid.plot_text_sparsity(routing_by_layer()),
    "token_kinds": lambda: hybrid.plot_token_kinds(routing_by_kind()),
    "alpha_sweep": lambda: hybrid.plot_alpha_sweep(alpha_sweep(), alpha_sweep(6.0)),
    "alpha_sweep_alone": lambda: hybrid.plot_alpha_sweep(alpha_sweep()),
    "alpha_domains": lambda: hybrid.plot_alpha_domains(alpha_domains()),
    "layer_replacement": lambda: hybrid.plot_layer_replacement(layer_replacement()),
    "gates": lambda: hybrid.plot_gates(gated_hybrid()),
    "cost": lambda: hybrid.plot_cost(gated_hybrid(), alpha_sweep()),
}


def _drawn_texts(figure):
    """Every visible string of a figure with its pixel box."""
    figure.draw_without_rendering()
    found = []
    for text in figure.findobj(lambda artist: hasattr(artist, "get_window_extent") and hasattr(artist, "get_text")):
        if text.get_visible() and text.get_text().strip():
            found.append((text, text.get_window_extent()))
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_figure_renders_without_a_warning_and_names_axes(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, a negative interval, a failed layout are warnings
        figure = FIGURES[name]()
        first = style.save_figure(figure, tmp_path / "a.png").read_bytes()
    second = style.save_figure(FIGURES[name](), tmp_path / "b.png").read_bytes()
    assert isinstance(figure, Figure)
    assert first == second  # the same data gives the same bytes
    for axes in figure.axes:
        if axes.axison and axes.get_label() != "<colorbar>":
            assert axes.get_xlabel() or axes.get_shared_x_axes().get_siblings(axes)[1:], "an axis has no name"


@pytest.mark.parametrize("name", FIGURES)
def test_no_tick_labels_overlap(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    for axes in figure.axes:
        if not axes.axison:
            continue
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text().strip() and t.get_visible()]
            for one, two in zip(boxes, boxes[1:], strict=False):
                width = min(one.x1, two.x1) - max(one.x0, two.x0)
                height = min(one.y1, two.y1) - max(one.y0, two.y0)
                assert width <= 1 or height <= 1, f"{name}: tick labels overlap"


def test_dollar_signs_are_printed_not_typeset():
    figure = hybrid.plot_token_heatmap(routing_signals()["prompts"][2])
    figure.draw_without_rendering()
    label = figure.axes[0].title
    text, is_mathematics = label._preprocess_math(label.get_text())
    assert is_mathematics is False
    assert "A ticket costs $12 and a drink costs $3" in text


def test_token_text_colours_by_sparsity():
    prompt = {
        "tokens": ["<s>", "<b>", " a$b", "\n"],
        "per_token_sparsity": [[0.0, 0.5, 1.0, 0.5], [0.0, 0.5, 1.0, 0.7]],
    }
    axes = hybrid.plot_token_text(prompt).axes[0]
    assert [text.get_text() for text in axes.texts] == ["<s>", "<b>", " a$b", "↵"]
    colours = [tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in axes.patches]
    assert colours[0] == (0, 34, 78) and colours[2] == (254, 232, 56)  # cividis' ends, least and most sparse
    assert [text.get_color() for text in axes.texts][::2] == ["white", "black"]
    with pytest.raises(IndexError, match="layer 2 is not there: .* 0 to 1"):
        hybrid.plot_token_text(prompt, layer=2)


def test_extreme_tokens_match_a_full_sort():
    routing = routing_signals()
    every = sorted(
        value for prompt in routing["prompts"] for value in np.array(prompt["per_token_sparsity"]).mean(0)[1:].tolist()
    )
    most, least = hybrid.extreme_tokens(routing, count=5)
    assert least["sparsity"].tolist() == pytest.approx(every[:5])
    assert most["sparsity"].tolist() == pytest.approx(every[::-1][:5])


def test_alpha_sweep_draws_the_numbers_of_the_file():
    sweep, control = alpha_sweep(), alpha_sweep(6.0)
    figure = hybrid.plot_alpha_sweep(sweep, control)
    left, right = figure.axes
    lines = {line.get_label(): line for line in right.get_lines()}
    drawn = lines["distilled sidecars"].get_ydata()
    assert drawn == pytest.approx(sweep["perplexity"].iloc[1:].to_numpy())
    assert lines["untrained sidecars (control)"].get_ydata() == pytest.approx(control["perplexity"].iloc[1:].to_numpy())
    segments = left.containers[0].lines[2][0].get_segments()
    drawn = np.array([segment[:, 1] for segment in segments])
    assert drawn == pytest.approx(sweep[["ci_low", "ci_high"]].iloc[1:].to_numpy())


def test_gates_leave_other_controls_to_other_figures():
    table = gated_hybrid()
    control = table[table["mode"].str.startswith("control_random_0.5")].iloc[:1]
    names = ["control_inverted_0.5", "control_random_learned_0.5", "control_oracle_0.5"]
    others = [control.assign(**gate_columns(name), vs_random=0.01) for name in names]
    threshold = {"mode": "control_random_threshold", "matched_to": "routing_threshold", "variant": "threshold"}
    more = pd.concat([table, *others, control.assign(**threshold, vs_random=0.01)], ignore_index=True)
    for draw in (hybrid.plot_gates, hybrid.plot_cost):
        labels = [[text.get_text() for text in axes.get_yticklabels()] for axes in draw(more).axes]
        assert labels == [[text.get_text() for text in axes.get_yticklabels()] for axes in draw(table).axes]


def test_gates_show_every_compared_mode_once():
    gated = gated_hybrid()
    left, right = hybrid.plot_gates(gated).axes
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert sorted(labels) == sorted(gated.loc[gated["vs_random"].notna(), "mode"])
    assert len(left.get_legend().get_texts()) == 6


def test_summary_table_takes_the_asked_rows():
    sweep, gated = alpha_sweep(), gated_hybrid()
    table = hybrid.summary_table(sweep, gated)
    assert list(table.columns) == ["baseline", "alpha 0.3", "routing-gated (routing_hard_0.5)"]
    assert table.loc["perplexity", "baseline"] == "40.000"
    row = gated[gated["mode"] == "routing_hard_0.5"].iloc[0]
    assert table.loc["perplexity"].iloc[2] == f"{row['perplexity']:.3f}"
    assert "SUPPORTED" in hybrid.verdict_text(verdict())


def test_missing_result_names_the_script(tmp_path, capsys):
    assert style.read_result(tmp_path / "alpha_sweep_results.csv", "05_sweep_alpha.py") is None
    assert "python scripts/05_sweep_alpha.py" in capsys.readouterr().out
    with pytest.raises(ValueError, match="csv, .json or .npz"):
        style.read_result(tmp_path / "x.txt", "03_extract_routing.py")


def test_plots_import_no_torch():
    code = "import sys; import src.figures.hybrid, src.figures.style; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


NOTEBOOK = ROOT / "notebooks" / "visualize_routing.ipynb"


def write_results(folder):
    folder.mkdir(parents=True)
    (folder / "routing_signals.json").write_text(json.dumps(routing_signals()))
    (folder / "verdict.json").write_text(json.dumps(verdict()))
    tables = {
        "routing_by_layer": routing_by_layer(),
        "routing_by_kind": routing_by_kind(),
        "alpha_sweep_results": alpha_sweep(),
        "alpha_sweep_untrained": alpha_sweep(6.0),
        "alpha_sweep_domains": alpha_domains(),
        "layer_replacement_results": layer_replacement(),
        "gated_hybrid_results": gated_hybrid(),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("start, complete", [(ROOT, True), (ROOT / "notebooks", False)])
def test_notebook_runs_from_root_and_from_its_folder(start, complete, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKFFN_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    if complete:
        write_results(tmp_path / "blockffn-tiny")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(start)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    assert sum('<span title="sparsity' in page for page in pages) == (len(PROMPTS) if complete else 0)
    if complete:
        assert "alpha_sweep" not in printed and "gated_hybrid_results" not in printed and "SUPPORTED" in printed
        assert len(figures) == len(list((tmp_path / "blockffn-tiny" / "figures").glob("*.png"))) >= 12
    else:
        assert not figures
        for name in (
            "03_extract_routing", "05_sweep_alpha", "06_replace_layer", "07_gated_hybrid", "08_explain_gates",
            "09_other_layers_and_recall", "10_ablate_sidecars",
        ):  # fmt: skip
            assert f"python scripts/{name}.py" in printed

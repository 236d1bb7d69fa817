"""Figures of the full study: drawn from made-up files with 07's columns; checked by what is in them."""

import itertools
import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from src.figures import gating, style
from src.figures.style import NothingToDraw

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "visualize_routing.ipynb"
DOMAINS = ("docs", "code", "math", "story")
TEXT = "The price is $12 or $15, she said.\né ≤ <b>bold</b> def fibonacci(n):\n    return n\n"
# kind -> share of random gating's penalty that it costs
COSTS = {
    "control_random": 1.0, "control_token_shuffled": 1.15, "control_block_shuffled": 1.02,
    "control_inverted": 0.8, "control_other_document": 1.0,
    "control_position_early": 1.3, "control_position_late": 0.9, "control_token_frequency": 0.7,
    "control_previous_surprisal": 0.9, "control_hidden_norm": 1.05, "control_residual_norm": 1.2,
    "control_self_sparsity": 1.1, "control_attention_entropy": 0.6, "control_recall_error": 0.7, "routing_hard": 1.2,
    "routing_hard_lookahead": 0.92, "control_probe_router_linear": 0.6, "control_probe_router_mlp": 0.55,
    "control_probe_hidden_linear": 0.5, "control_probe_hidden_mlp": 0.4, "learned": 0.35, "control_oracle": 0.1,
    "control_hindsight": -0.6,
}  # fmt: skip
NAN = float("nan")


def mode_of(kind, share):
    base, _, variant = kind.partition("_lookahead")
    return f"{base}_{share:g}" + ("_lookahead" if kind.endswith("_lookahead") else "")


def name_of(kind):
    """What figures call a kind of COSTS: a key of GATES."""
    return kind.removeprefix("control_").replace("routing_hard", "routing hard").replace("_lookahead", " lookahead")


def gate_columns(mode, kind, share):
    """The columns that tables carry behind `mode`."""
    recipe = kind.removeprefix("control_") if kind.startswith("control_") else ""
    matched_to, variant = f"routing_hard_{share:g}" if recipe else "", "lookahead" if "lookahead" in kind else ""
    if recipe == "random_learned":
        recipe, matched_to, variant = "random", f"learned_{share:g}", "learned"
    if kind == "learned":
        variant = "learned"
    if mode.endswith("_t0.03"):
        variant = "t0.03"
    if share == 0.8088:
        matched_to, variant = "routing_threshold", "threshold"
    named = "control" if recipe else {"baseline": "none"}.get(kind, kind.split("_")[0])
    return {
        "mode": mode, "kind": named, "gate": recipe or named,
        "hard": "hard" in kind or bool(recipe) or named == "learned",
        "signal": "previous", "recipe": recipe, "matched_to": matched_to, "uses_document": bool(recipe),
        "share_target": share, "variant": variant,
    }  # fmt: skip


def interval(value, width, names=("value", "ci_low", "ci_high")):
    return dict(zip(names, (value, value - width, value + width), strict=True))


def gate_row(mode, kind, share, delta, random, rng):
    versus = ("vs_random", "vs_random_ci_low", "vs_random_ci_high")
    against = interval(delta - random, 0.006, versus) if kind not in ("control_random", "baseline") else {}
    p_value = 0.001 if abs(delta - random) > 0.006 else 0.4
    return {
        **gate_columns(mode, kind, share), "share_realised": share,
        "perplexity": 25 * np.exp(delta), "delta": 25 * np.expm1(delta),
        "pct_change": 100 * np.expm1(delta), **interval(delta, 0.03, ("delta_nll", "ci_low", "ci_high")),
        **(against or dict.fromkeys(versus, NAN)), "flops_ideal": 1.5e7, "flops_executed": 3.1e7,
        "tokens_per_second": 4300 + 100 * rng.random(), "memory_gb": 0.9, "sidecar_seeds": 3,
        "p_value": p_value if against else NAN, "p_holm": min(1, 10 * p_value) if against else NAN,
    }  # fmt: skip


def gated(shares, kinds):
    rng = np.random.default_rng(0)
    rows = [gate_row("baseline", "baseline", 0.0, 0.0, 0.0, rng)]
    for share in shares:
        random = 0.26 * share**1.2
        for kind in kinds:
            rows.append(gate_row(mode_of(kind, share), kind, share, random * COSTS[kind], random, rng))
        for kind in ("fixed", "routing_soft"):
            rows.append(gate_row(f"{kind}_{share:g}", kind, share, 0.1 * random, random, rng))
    rows.append(gate_row("routing_soft_0.5_t0.03", "routing_soft", 0.5, 0.04, 0.13, rng))
    rows.append(gate_row("routing_threshold", "routing_hard", NAN, 0.2, 0.2, rng) | {"variant": "threshold"})
    rows.append(gate_row("control_random_threshold", "control_random", 0.8088, 0.2, 0.2, rng))
    return pd.DataFrame(rows)


def pairs(shares, kinds):
    rows = []
    for share in shares:
        for number, kind in enumerate(kind for kind in kinds if kind.startswith("control_")):
            row = {"mode": f"routing_hard_{share:g}", "control": mode_of(kind, share), "recipe": name_of(kind)}
            row |= {"share": share} | interval(0.004 * number - 0.02, 0.01, ("difference", "ci_low", "ci_high"))
            rows.append(row | {"p_value": 0.01, "p_holm": 0.2, "sidecar_seeds": 3})
    return pd.DataFrame(rows)


def domains(shares):
    rows = []
    for share in shares:
        for number, domain in enumerate(DOMAINS):
            for kind in ("control_random", "routing_hard"):
                delta = 0.02 * (number - 1) * share
                versus = interval(delta, 0.01, ("vs_random", "vs_random_ci_low", "vs_random_ci_high"))
                row = gate_columns(mode_of(kind, share), kind, share) | {
                    "domain": domain,
                    "documents": 16,
                    "tokens": 7000 + number,
                }
                row |= {"share_realised": share + 0.06 * (number - 1.5)}
                row |= interval(0.1 + delta, 0.03, ("delta_nll", "ci_low", "ci_high"))
                rows.append(row | (versus if kind == "routing_hard" else dict.fromkeys(versus, NAN)))
    return pd.DataFrame(rows)


def layer_sets(names, kinds):
    parts = []
    for number, name in enumerate(names):
        part = gated([0.5], kinds).iloc[: 1 + len(kinds)]
        part[["delta_nll", "ci_low", "ci_high"]] *= 1 + number
        parts.append(part.assign(layers=name))
    return pd.concat(parts, ignore_index=True)


def validation(layers):
    rows = []
    for number, name in enumerate(("fisher_m0", "fisher_mean")):
        for layer in ("all", *layers):
            rho = 0.82 - 0.1 * number - (0.02 * layer if layer != "all" else 0)
            row = {"estimator": name, "layer": layer, "cells": 600 if layer == "all" else 150, "documents": 24}
            row |= interval(rho, 0.05, ("rho", "ci_low", "ci_high"))
            kl = {"mask_kl": 0.04 + 0.01 * number, "random_kl": 0.2} if layer == "all" else {}
            rows.append(row | kl | {"chosen": name == "fisher_m0"})
    return pd.DataFrame(rows)


SIGNALS = {
    "sparsity_previous": True, "sparsity_lookahead": True, "sparsity_self": False, "active_experts_previous": True,
    "router_entropy": True, "summed_activation": True, "top_activation": True, "discrepancy_attention_mamba": False,
    "attention_entropy": False, "hidden_norm": True,
}  # fmt: skip


def correlations(layers, signals):
    rng = np.random.default_rng(2)
    rows = []
    for number, signal in enumerate(signals):
        for layer in ("all", *layers):
            rho = 0.5 * np.cos(number) + 0.1 * rng.normal() * (layer != "all")
            p_value = float(abs(rho) < 0.1) * 0.3 + 0.001
            row = {"layer": layer, "signal": signal, "deployable": SIGNALS[signal], "cells": 7000}
            row |= interval(rho * 1.2, 0.03, ("rho", "ci_low", "ci_high"))
            row |= interval(rho, 0.03, ("partial_rho", "partial_ci_low", "partial_ci_high"))
            rows.append(row | {"p_value": p_value, "p_holm": min(1.0, 10 * p_value)})
    return pd.DataFrame(rows)


def sensitivity_maps(layers, tokens):
    rng = np.random.default_rng(3)
    pieces = re.findall(r"\s?[^\s]{1,5}|\n", TEXT)
    made = []
    for name in ("docs/pandas.core.arrays.interval", "code/HumanEval/5"):
        cells = np.exp(rng.normal(-6, 1.5, (len(layers), tokens)))
        cells[0, 0] = 0.0
        sparsity = np.round(rng.beta(6, 2, cells.shape) * 32) / 32
        made.append(
            {
                "document": name, "domain": name.split("/")[0], "layers": list(layers),
                "tokens": [pieces[i % len(pieces)] for i in range(tokens)], "sensitivity": cells.tolist(),
                "sparsity": sparsity.tolist(), "mamba": (sparsity > 0.75).astype(int).tolist(),
                "oracle": (cells < np.median(cells)).astype(int).tolist(),
            }
        )  # fmt: skip
    return {"documents": made}


def probe_gap(shares, names):
    rows = []
    for number, name in enumerate(names):
        for share in shares:
            gap = interval(-0.2 + 0.15 * number + 0.1 * share, 0.05, ("gap_closed", "ci_low", "ci_high"))
            rho = interval(0.1 * number, 0.02, ("rho", "rho_low", "rho_high"))
            rows.append({"probe": name, "share": share} | gap | rho)
    return pd.DataFrame(rows)


def recall(tasks, lengths, kinds, shares):
    rows = []
    for task in tasks:
        for length in lengths:
            for share in shares:
                for number, kind in enumerate(("baseline", *kinds)):
                    if kind == "baseline" and share != shares[0]:
                        continue
                    accuracy = max(0.02, 0.95 - 0.08 * number - 0.05 * np.log2(length / 256))
                    row = {"task": task, "length": length}
                    row |= gate_columns("baseline" if not number else mode_of(kind, share), kind, share)
                    del row["variant"]  # recall_results.csv has none
                    row |= {"share_realised": share, "examples": 40, "answers": 160}
                    row |= interval(accuracy, 0.04, ("accuracy", "ci_low", "ci_high")) | {"chance": 0.03}
                    versus = ("vs_baseline", "vs_baseline_ci_low", "vs_baseline_ci_high")
                    rows.append(row | interval(-0.08 * number, 0.05, versus))
    alone = [
        row | {"mode": "fixed_1", "kind": "fixed", "share_target": 1.0} for row in rows if row["mode"] == "baseline"
    ]
    return pd.DataFrame(rows + alone)


VARIANTS = {
    "init": ("random", "attention"), "stages": ("a", "a_longer", "a_b"), "d_state": ("16", "64", "128"),
    "tokens": ("0.25", "0.5", "1"), "signal": ("previous", "lookahead"), "softness": ("hard", "soft_t0.1"),
    "threshold": ("layer_wise", "shared"),
}  # fmt: skip


def ablation(name, shares):
    rows = []
    for number, variant in enumerate(VARIANTS[name]):
        row = {"ablation": name, "variant": variant}
        versus = interval(0.03 - 0.02 * number, 0.01, ("vs_random", "vs_random_ci_low", "vs_random_ci_high"))
        if name in ("signal", "softness", "threshold"):
            for share in shares:
                delta = interval(0.2 * share, 0.03, ("delta_nll", "ci_low", "ci_high"))
                rows.append(row | {"mode": "x", "share": share, "share_realised": share} | delta | versus)
        else:
            alone = interval(0.5 - 0.1 * number, 0.04, ("alpha_1", "alpha_1_ci_low", "alpha_1_ci_high"))
            rows.append(row | {"training_tokens": 10**6, "recovered": 0.4 + 0.1 * number} | alone | versus)
    return pd.DataFrame(rows)


def curves(names):
    rows = []
    for name in names:
        for number, variant in enumerate(VARIANTS[name]):
            for stage, quantity in (("a", "normalised_mse"), ("b", "kl")):
                for step in range(0, 501, 50):
                    value = (1 + number) * np.exp(-step / 150) + 0.05
                    rows.append({"ablation": name, "variant": variant, "stage": stage, "quantity": quantity,
                                 "step": step, "tokens": 4096 * step, "value": value})  # fmt: skip
    return pd.DataFrame(rows)


VERDICT = {
    "label": "final: three sets of sidecars",
    "rule": "supported if the interval lies below 0 against random and block-shuffled; " * 3,
    "inputs": {"mode": "routing_hard_0.5", "layers": [4, 5, 6, 7], "resamples": 500},
    "settings": {"share": 0.5, "signal": "previous", "resamples": 500},
    "margin": 0.0226,
    "numbers": {"random": {"difference": 0.02843, "ci_low": 0.0134, "ci_high": 0.0463}, "detectable": 0.024},
    "outcome": "refuted",
    "verdict": "Routing minus random is +0.02843 nats per token.",
    "user_criterion": {
        "statement": "Routing should beat fixed alpha.", "met": {"routing_hard_0.5": "no"}, "words": "It does not.",
        "comparisons": [{"routing": "routing_hard_0.5", "fixed": "fixed_0.5", "difference_nll": 0.141788}],
    },
}  # fmt: skip


def made_up(case):
    """{file name: content} of a full study ("long") and of the smallest one ("short")."""
    long = case == "long"
    shares = [0.25, 0.5, 0.75] if long else [0.5]
    kinds = list(COSTS) if long else ["control_random", "routing_hard"]
    layers = range(1, 24) if long else [4]
    probes = ("routing_hard", "router_linear", "router_mlp", "hidden_linear", "hidden_mlp", "learned")
    some = [kind for kind in kinds if kind in ("control_random", "control_block_shuffled", "routing_hard",
            "routing_hard_lookahead", "learned", "control_oracle")]  # fmt: skip
    recalled = [kind for kind in some if "lookahead" not in kind] + ["control_random_learned"] * long
    tasks = ("multi_query_recall", "passkey", "induction", "rare_names") if long else ("induction",)
    ablations = list(VARIANTS) if long else ["init", "signal"]
    gates = "explained_gates" if long else "gated_hybrid"
    return {
        f"{gates}_results.csv": gated(shares, kinds),
        f"{gates}_pairs.csv": pairs(shares, kinds),
        f"{gates}_domains.csv": domains(shares),
        "layer_set_results.csv": layer_sets(("middle", "first_half", "last_half", "all") if long else ("5",), some),
        "sensitivity_validation.csv": validation(layers),
        "sensitivity_correlations.csv": correlations(layers, SIGNALS if long else ["sparsity_previous"]),
        "sensitivity_maps.json": sensitivity_maps(layers if long else [4], 300 if long else 9),
        "probe_gap.csv": probe_gap(shares, probes if long else probes[:1]),
        "recall_results.csv": recall(tasks, (256, 1024, 4096) if long else (256,), recalled, shares),
        **{f"ablation_{name}.csv": ablation(name, shares) for name in ablations},
        "distillation_curves.csv": curves(["init", "d_state", "tokens"] if long else ["init"]),
        "verdict.json": VERDICT,
    }


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, pd.DataFrame):
            content.to_csv(folder / name, index=False)
        else:
            (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for case in ("long", "short"):
        write(root / case, made_up(case))
    return root


@pytest.fixture
def read(folders):
    return lambda name, case="long": style.read_result(folders / case / name, "07_gated_hybrid.py")


@pytest.fixture
def gates(folders):
    return lambda table, case="long": gating.read_gates(folders / case, table)


def first_map(read, case):
    return read("sensitivity_maps.json", case)["documents"][0]


def gates_file(table, case):
    """08's table where it has run ("long"), else 07's."""
    return f"{'explained_gates' if case == 'long' else 'gated_hybrid'}_{table}.csv"


FIGURES = {
    "ladder": lambda read, case: gating.plot_ladder(read(gates_file("results", case), case)),
    "controls": lambda read, case: gating.plot_controls(
        read(gates_file("pairs", case), case), read("verdict.json", case)
    ),
    "domains": lambda read, case: gating.plot_domains(read(gates_file("domains", case), case)),
    "layer_sets": lambda read, case: gating.plot_layer_sets(read("layer_set_results.csv", case)),
    "validation": lambda read, case: gating.plot_validation(read("sensitivity_validation.csv", case)),
    "correlations": lambda read, case: gating.plot_correlations(read("sensitivity_correlations.csv", case)),
    "sensitivity_map": lambda read, case: gating.plot_sensitivity_map(first_map(read, case)),
    "sensitivity_text": lambda read, case: gating.plot_sensitivity_text(first_map(read, case)),
    "probe_gap": lambda read, case: gating.plot_probe_gap(read("probe_gap.csv", case)),
    "recall": lambda read, case: gating.plot_recall(read("recall_results.csv", case)),
    "training_ablations": lambda read, case: gating.plot_training_ablations(all_ablations(read, case)),
    "gate_ablations": lambda read, case: gating.plot_gate_ablations(all_ablations(read, case)),
    "distillation": lambda read, case: gating.plot_distillation(read("distillation_curves.csv", case)),
}


def all_ablations(read, case):
    return pd.concat([read(name, case) for name in made_up(case) if name.startswith("ablation_")])


def row_names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def segments(container):
    """Ends of the horizontal error bars of one errorbar container: [n, 2]."""
    return np.array([segment[:, 0] for segment in container.lines[2][0].get_segments()])


def tick_labels(axis):
    """The tick labels that are drawn: those inside the panel."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in ticks if low <= place <= high and label.get_text().strip()]


@pytest.mark.parametrize("case", ["long", "short"])
@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_readable(name, case, read, tmp_path):
    """No warning, every panel named, nothing cut off, no two tick labels overlap."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, a failed layout, a mean of nothing are warnings
        figure = FIGURES[name](read, case)
        figure.draw_without_rendering()
    whole = figure.bbox
    shown = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
    for axes in shown:
        assert axes.get_title() or figure.get_suptitle()
        assert axes.get_xlabel() or (name == "sensitivity_map" and axes is not shown[-1])
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    texts += [label for axes in shown for axis in (axes.xaxis, axes.yaxis) for label in tick_labels(axis)]
    texts += [figure._suptitle] if figure.get_suptitle() else []
    for part in [*legends, *(text for text in texts if text.get_text().strip())]:
        box = part.get_window_extent()
        inside = box.x0 >= -1 and box.x1 <= whole.x1 + 1 and box.y0 >= -1 and box.y1 <= whole.y1 + 1
        assert inside, f"{name} ({case}): {part} is cut off"
    for axis in [axis for axes in shown for axis in (axes.xaxis, axes.yaxis)]:
        boxes = sorted((label.get_window_extent() for label in tick_labels(axis)), key=lambda box: (box.x0, box.y0))
        for one, two in itertools.combinations(boxes, 2):
            width, height = min(one.x1, two.x1) - max(one.x0, two.x0), min(one.y1, two.y1) - max(one.y0, two.y0)
            assert width <= 1 or height <= 1, f"{name} ({case}): tick labels overlap"


def test_same_data_same_bytes(read, tmp_path):
    for name in ("ladder", "sensitivity_map"):
        files = [style.save_figure(FIGURES[name](read, "short"), tmp_path / f"{i}.png") for i in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_gates_are_named_by_their_columns(gates):
    table = style.name_gates(gates("results")).set_index("mode")
    expected = {
        "baseline": "baseline", "control_random_0.5": "random", "routing_hard_0.5": "routing hard",
        "routing_hard_0.5_lookahead": "routing hard lookahead", "routing_soft_0.5_t0.03": "routing soft t0.03",
        "control_probe_router_mlp_0.25": "probe_router_mlp", "routing_threshold": "routing hard threshold",
        "control_random_threshold": "random of routing hard threshold",
    }  # fmt: skip
    assert table["name"].reindex(list(expected)).to_dict() == expected
    assert style.gate_label("random of learned") == "random, counts of learned"
    assert style.gate_colour("routing soft t0.03") == style.gate_colour("routing soft")


def test_every_control_has_a_place_in_the_ladder():
    from src.gating.controls import CONTROLS

    assert set(CONTROLS) <= set(gating.LADDER)


def test_08s_tables_are_taken_where_they_are(gates, tmp_path, capsys):
    assert len(gates("results")) > len(gates("results", "short")) > 0
    assert gating.read_gates(tmp_path, "results") is None
    assert "gated_hybrid_results.csv is not there yet. Run: python scripts/07_" in capsys.readouterr().out


def test_ladder_draws_the_file(read):
    table = read("explained_gates_results.csv")
    figure = FIGURES["ladder"](read, "long")
    names = row_names(figure.axes[0])
    assert names == [style.GATES[name][0] for name in gating.LADDER if name in map(name_of, COSTS)]
    assert len(figure.axes) == 3  # the shares; not that of the uncalibrated threshold's own control
    kinds = sorted(COSTS, key=lambda kind: gating.LADDER.index(name_of(kind)))
    for share, axes in zip((0.25, 0.5, 0.75), figure.axes, strict=True):
        rows = table.set_index("mode").loc[[mode_of(kind, share) for kind in kinds]]
        drawn = {}
        for container in axes.containers:
            point = container.lines[0]
            hollow = point.get_markerfacecolor() == "white"
            drawn[int(point.get_ydata()[0])] = (point.get_xdata()[0], *segments(container)[0], hollow)
        for place, row in enumerate(rows.itertuples()):
            expected = (row.delta_nll, row.ci_low, row.ci_high)
            assert drawn[place][:3] == pytest.approx(expected) and drawn[place][3] == row.uses_document
        dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert dashed == pytest.approx([rows["delta_nll"].iloc[0]])
        starred = {text.xy[1] for text in axes.texts if text.get_text() == "*"}
        assert starred == set(np.flatnonzero(rows["p_holm"] < 0.05))
    with pytest.raises(NothingToDraw, match="no share"):
        gating.plot_ladder(table[table["mode"] == "routing_hard_0.5"])


def test_intervals_of_too_few_documents_leave_the_panel(read, tmp_path):
    """Studentised intervals of a few documents may be infinite; of one document there are none."""
    table = read("explained_gates_domains.csv")
    table.loc[table["domain"] == "docs", "vs_random_ci_low"] = -np.inf
    table.loc[table["domain"] == "docs", "vs_random_ci_high"] = np.inf
    table.loc[table["domain"] == "code", ["vs_random_ci_low", "vs_random_ci_high"]] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = gating.plot_domains(table)
        style.save_figure(figure, tmp_path / "a.png")
    left, right = figure.axes[0].get_xlim()
    assert -0.05 < left < right < 0.05
    drawn = segments(figure.axes[0].containers[0])
    assert drawn[0, 0] < left < right < drawn[0, 1] and drawn[1, 0] == drawn[1, 1]


def test_controls_show_margin_and_verdict(gates, read):
    table = gates("pairs")
    (axes,) = FIGURES["controls"](read, "long").axes
    assert "REFUTED" in axes.get_title()
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.0226, 0.0226))
    rows = table[table["share"] == 0.5].set_index("recipe")
    shown = [name for name in gating.LADDER if style.GATES[name][1] in style.CONTROL_GROUPS]
    assert row_names(axes) == [style.GATES[name][0] for name in shown]
    drawn = np.array([[c.lines[0].get_xdata()[0], *segments(c)[0]] for c in axes.containers], dtype=float)
    assert drawn == pytest.approx(rows.loc[shown, ["difference", "ci_low", "ci_high"]].to_numpy())
    (bare,) = gating.plot_controls(gates("pairs", "short")).axes
    assert "no verdict yet" in bare.get_title() and not bare.patches
    with pytest.raises(NothingToDraw, match="share 0.9"):
        gating.plot_controls(table, share=0.9)


def test_correlations_show_every_layer_and_mark_what_holm_leaves(read):
    table = read("sensitivity_correlations.csv")
    left, right = FIGURES["correlations"](read, "long").axes[:2]
    every = table[table["layer"] == "all"].sort_values("partial_rho")
    names = [name.replace("_", " ") + ("  •" if SIGNALS[name] else "") for name in every["signal"]]
    assert row_names(left) == names
    drawn = np.array([[c.lines[0].get_xdata()[0], *segments(c)[0]] for c in left.containers])
    assert drawn == pytest.approx(every[["partial_rho", "partial_ci_low", "partial_ci_high"]].to_numpy())
    filled = [c.lines[0].get_markerfacecolor() != "white" for c in left.containers]
    assert filled == [SIGNALS[name] for name in every["signal"]]
    cells = table[table["layer"] != "all"].set_index(["signal", "layer"])
    expected = [[cells.loc[(name, str(layer))] for layer in range(1, 24)] for name in every["signal"]]
    drawn = np.asarray(right.collections[0].get_array()).reshape(len(names), 23)
    assert drawn == pytest.approx(np.array([[cell["partial_rho"] for cell in row] for row in expected]))
    stars = np.array([[cell["p_holm"] < 0.05 for cell in row] for row in expected])
    assert sum(text.get_text() == "*" for text in right.texts) == stars.sum() > 0


def test_correlations_of_all_layers_alone_are_drawn(read):
    table = read("sensitivity_correlations.csv")
    left, right = gating.plot_correlations(table[table["layer"] == "all"]).axes
    assert len(row_names(left)) == table["signal"].nunique() and not right.collections


def test_validation_fills_the_chosen_estimator(read):
    (axes,) = FIGURES["validation"](read, "long").axes
    assert axes.get_xticklabels()[0].get_text() == "all" and len(axes.get_xticks()) == 24
    looks = {c.get_label(): c.lines[0].get_markerfacecolor() != "white" for c in axes.containers}
    assert looks == {"fisher m0, KL of its masks 0.040 (chosen)": True, "fisher mean, KL of its masks 0.050": False}
    table = read("sensitivity_validation.csv")
    assert axes.containers[0].lines[0].get_ydata() == pytest.approx(table[table["chosen"]]["rho"].to_numpy())


def test_map_shows_sensitivity_sparsity_and_choices(read):
    document = first_map(read, "long")
    figure = gating.plot_sensitivity_map(document, start=10, tokens=20)
    shape = (23, 20)
    drawn = [np.asarray(axes.collections[0].get_array()).reshape(shape) for axes in figure.axes[:3]]
    cut = np.array(document["sensitivity"])[:, 10:30]
    assert drawn[0] == pytest.approx(cut) and drawn[1] == pytest.approx(np.array(document["sparsity"])[:, 10:30])
    for layer, token in ((0, 10), (5, 17), (22, 29)):
        expected = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}
        choices = (document["mamba"][layer][token], document["oracle"][layer][token])
        assert drawn[2][layer, token - 10] == expected[choices]
    with pytest.raises(NothingToDraw, match="300 tokens; there is none from 300"):
        gating.plot_sensitivity_map(document, start=300)


def test_text_underlines_what_routing_sends_to_mamba(read):
    document = first_map(read, "long")
    most = [sum(row[token] for row in document["mamba"]) > 11 for token in range(300)]
    own = [bool(value) for value in document["mamba"][3]]
    for layer, marked in ((None, most), (4, own)):
        axes = gating.plot_sensitivity_text(document, layer, tokens=100).axes[0]
        cells = [(patch.get_x(), patch.get_y()) for patch in axes.patches]
        lined = {cells.index((round(line.get_xdata()[0] - 0.1), int(line.get_ydata()[0]))) for line in axes.lines}
        assert lined == set(np.flatnonzero(marked[:100]))
    with pytest.raises(IndexError, match="layer 99 is not there"):
        gating.plot_sensitivity_text(document, 99)


class Tokens(HTMLParser):
    """[(text, what hovering shows, style)] of the tokens of `token_html`."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "span":
            self.found.append(["", dict(attributes)["title"], dict(attributes)["style"]])

    def handle_data(self, data):
        self.found[-1][0] += data


def test_hovering_a_token_shows_its_sparsity():
    prompt = {"tokens": ["<b>", ' "$a$"', "\n"], "per_token_sparsity": [[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]]}
    page = gating.token_html(prompt)
    assert "$" not in page and "<b>" not in page and page.count("<br>") == 1  # no mathematics, no tag of the text's
    texts, notes, styles = zip(*Tokens(page).found, strict=True)
    assert texts == ("<b>", ' "$a$"', "↵")
    assert notes == ("sparsity 0.000", "sparsity 0.750", "sparsity 1.000")
    assert "background:#00224e;color:white" in styles[0] and "background:#fee838;color:black" in styles[2]
    assert [note for _, note, _ in Tokens(gating.token_html(prompt, layer=0)).found][1] == "sparsity 0.500"
    with pytest.raises(IndexError, match="layer 2 is not there"):
        gating.token_html(prompt, layer=2)


def test_hovering_a_token_shows_its_sensitivity_and_gate(read):
    document = first_map(read, "long")
    found = Tokens(gating.token_html(document, layer=4)).found
    assert len(found) == len(document["tokens"]) == 300
    sensitivity = document["sensitivity"][3]
    middle = sorted(range(300), key=lambda token: sensitivity[token])[20:-20]  # the outer ones are drawn in
    for token in middle:
        sent = bool(document["mamba"][3][token])
        assert found[token][1] == f"sensitivity {sensitivity[token]:.2g} nats{', to Mamba' if sent else ''}"
        assert ("border-bottom" in found[token][2]) == sent


def test_probe_gap_and_recall_draw_the_files(read):
    left, right = FIGURES["probe_gap"](read, "long").axes
    table = read("probe_gap.csv")
    for share, container, rho in zip((0.25, 0.5, 0.75), left.containers, right.containers, strict=True):
        rows = table[table["share"] == share]
        assert container.lines[0].get_xdata() == pytest.approx(100 * rows["gap_closed"].to_numpy())
        assert segments(container) == pytest.approx(100 * rows[["ci_low", "ci_high"]].to_numpy())
        assert rho.lines[0].get_xdata() == pytest.approx(rows["rho"].to_numpy())
    table = read("recall_results.csv")
    figure = FIGURES["recall"](read, "long")
    assert len(figure.axes) == 4
    for task, axes in zip(dict.fromkeys(table["task"]), figure.axes, strict=True):
        found = {c.get_label(): c.lines[0].get_ydata() for c in axes.containers}
        assert len(found) == 8
        names = {
            "baseline": "baseline (attention only)", "control_random_0.5": "random", "fixed_1": "Mamba only",
            "control_random_learned_0.5": "random, counts of learned",
        }  # fmt: skip
        for mode, label in names.items():
            rows = table[(table["task"] == task) & (table["mode"] == mode)].sort_values("length")
            assert found[label] == pytest.approx(100 * rows["accuracy"].to_numpy())
        (chance,) = [line for line in axes.lines if line.get_label() == "chance"]
        assert chance.get_ydata() == pytest.approx(3)
    with pytest.raises(NothingToDraw, match="share 0.9"):
        gating.plot_recall(table, share=0.9)


def test_domains_and_layer_sets_draw_the_files(read):
    table = read("explained_gates_domains.csv")
    left, right = FIGURES["domains"](read, "long").axes
    for share, container, dots in zip((0.25, 0.5, 0.75), left.containers, right.collections, strict=True):
        rows = table[table["mode"] == f"routing_hard_{share}"]
        assert segments(container) == pytest.approx(rows[["vs_random_ci_low", "vs_random_ci_high"]].to_numpy())
        assert np.asarray(dots.get_offsets())[:, 0] == pytest.approx(rows["share_realised"].to_numpy())
    table = read("layer_set_results.csv")
    left, right = FIGURES["layer_sets"](read, "long").axes
    assert row_names(left) == ["middle", "first half", "last half", "all"]
    routing = {c.get_label(): c for c in left.containers}["routing, hard"]
    rows = table[table["mode"] == "routing_hard_0.5"]
    assert routing.lines[0].get_xdata() == pytest.approx(rows["delta_nll"].to_numpy())
    assert row_names(FIGURES["layer_sets"](read, "short").axes[0]) == ["5"]


def test_ablations_draw_the_files(read):
    tables = all_ablations(read, "long")
    axes = FIGURES["training_ablations"](read, "long").axes
    names = row_names(axes[0])
    assert names[:4] == ["sidecar's initialisation", "random", "attention", "stages of training"]
    assert names[4:7] == ["A alone", "A alone, as long as both", "A, then B"]
    assert [label.get_weight() for label in axes[0].get_yticklabels()][:4] == ["bold", "normal", "normal", "bold"]
    trained = tables[tables["ablation"].isin(["init", "stages", "d_state", "tokens"])]
    (container,) = axes[0].containers
    assert container.lines[0].get_xdata() == pytest.approx(trained["alpha_1"].to_numpy())
    assert segments(container) == pytest.approx(trained[["alpha_1_ci_low", "alpha_1_ci_high"]].to_numpy())
    assert axes[1].containers[0].lines[0].get_xdata() == pytest.approx(100 * trained["recovered"].to_numpy())
    left, right = FIGURES["gate_ablations"](read, "long").axes
    gates = tables[(tables["share"] == 0.75)]
    assert left.containers[2].lines[0].get_xdata() == pytest.approx(gates["delta_nll"].to_numpy())
    assert segments(right.containers[2]) == pytest.approx(gates[["vs_random_ci_low", "vs_random_ci_high"]].to_numpy())
    with pytest.raises(NothingToDraw, match="signal, softness, threshold"):
        gating.plot_gate_ablations(tables[tables["ablation"] == "init"])
    panels = FIGURES["distillation"](read, "long").axes
    assert len(panels) == 6
    line = {line.get_label(): line for line in panels[3].lines}["128"]
    rows = read("distillation_curves.csv").query("ablation == 'd_state' and variant == '128' and stage == 'b'")
    assert line.get_xdata() == pytest.approx(rows["tokens"].to_numpy() / 1e6)
    assert line.get_ydata() == pytest.approx(rows["value"].to_numpy())


def test_verdict_is_quoted_in_full():
    text = gating.verdict_in_full(VERDICT, width=80)
    assert max(map(len, text.splitlines())) <= 80
    joined = " ".join(text.split())
    for part in (VERDICT["rule"].strip(), "margin: 0.0226", "outcome: refuted", "routing_hard_0.5: no", "0.141788",
                 "It does not.", "layers: [4, 5, 6, 7]"):  # fmt: skip
        assert part in joined


def test_missing_ablations_name_their_scripts(tmp_path, capsys):
    assert gating.read_ablations(tmp_path) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("scripts/")[2][:2] for line in lines] == ["10"] * 4 + ["08"] * 3


def test_imports_no_torch():
    code = "import sys; import src.figures.gating; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("case", ["long", None])
def test_notebook_sections(case, tmp_path, monkeypatch):
    """The sections of the study draw and keep their figures; without its files each says which script writes them."""
    folder = tmp_path / "blockffn-tiny"
    if case:
        write(folder, made_up(case))
    monkeypatch.setenv("BLOCKFFN_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    start = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## 8."))
    stop = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## 15."))
    notebook.cells = [notebook.cells[1], *notebook.cells[start:stop]]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    cells = [cell for cell in notebook.cells[1:] if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs).splitlines() for cell in cells]
    figures = {file.stem for file in folder.glob("figures/*.png")}
    pages = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.outputs]
    assert sum('<span title="sensitivity' in page for page in pages) == (2 if case else 0)
    if case:
        assert not any(printed)
        drawn = {name.removesuffix("_0").removesuffix("_1") for name in figures}
        assert drawn == set(FIGURES) and len(figures) == len(FIGURES) + 2
    else:
        assert not figures
        lines = [line for cell in printed for line in cell]
        assert all("is not there yet. Run: python scripts/" in line and "--" not in line for line in lines)
        scripts = [line.rpartition("scripts/")[2][:2] for line in lines]
        assert {script: scripts.count(script) for script in scripts} == {"07": 4, "08": 7, "09": 2, "10": 5}

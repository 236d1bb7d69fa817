"""Every figure about the answer: gates, controls and oracle at equal share, sensitivity, probes, recall, ablations.

Each `plot_*` function takes what `style.read_result` returned, draws one matplotlib Figure and returns it, or raises
NothingToDraw. Colours say how a gate chooses; hollow marks are offline masks (`uses_document`).
"""

import html
import itertools
import math
import textwrap

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap, LogNorm, to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from src.figures import style
from src.figures.hybrid import plot_token_text, text_colour, token_colours, token_sparsity

GOOD_RHO = 0.6  # rank agreement with interventions from which an estimate is taken as good
# gates at equal share, in the order of the ladder
LADDER = tuple(name for name, (_, group) in style.GATES.items() if group in style.LADDER_GROUPS)
# ablation -> label, in the order of figures
ABLATIONS = {
    "init": "sidecar's initialisation",
    "stages": "stages of training",
    "d_state": "state width (d_state)",
    "tokens": "share of the training tokens",
    "signal": "gate's signal",
    "softness": "hard or soft gate",
    "threshold": "gate's threshold",
}
TRAINING, GATE_FORMS = tuple(ABLATIONS)[:4], tuple(ABLATIONS)[4:]
STAGES = {"a": "A alone", "a_longer": "A alone, as long as both", "a_b": "A, then B"}
# column of an ablation file -> (axis label, factor); intervals stand in <column>_ci_low and _ci_high
TRAINING_COLUMNS = {
    "alpha_1": ("Δ NLL of Mamba alone (nats per token)", 1),
    "recovered": ("of zeroed attention's cost won back (%)", 100),
    "vs_random": ("routing minus random (nats per token)", 1),
}
GATE_COLUMNS = {"delta_nll": (style.DELTA_NLL, 1), "vs_random": ("gate minus random control (nats per token)", 1)}
CURVES = {"normalised_mse": "error of the layer's output (normalised)", "kl": "KL from the base model (nats per token)"}


# -- files
def read_gates(folder, table):
    """08's table of gates, with every control, or else 07's: `results`, `pairs` or `domains`; None without either."""
    explained = folder / f"explained_gates_{table}.csv"
    if explained.is_file():
        return style.read_result(explained, "08_explain_gates.py")
    return style.read_result(folder / f"gated_hybrid_{table}.csv", "07_gated_hybrid.py")


def read_ablations(folder):
    """All ablation_<name>.csv of a folder in one DataFrame; says which are missing, and returns None without any."""
    scripts = dict.fromkeys(TRAINING, "10_ablate_sidecars.py") | dict.fromkeys(GATE_FORMS, "08_explain_gates.py")
    tables = [style.read_result(folder / f"ablation_{name}.csv", script) for name, script in scripts.items()]
    found = [table for table in tables if table is not None]
    return pd.concat(found, ignore_index=True) if found else None


# -- parts
def _ranked(rows):
    """The rows whose gate has a place in the ladder, with columns name and share; in the ladder's order."""
    rows = style.name_gates(rows)
    rows = rows[rows["name"].isin(LADDER)]
    return rows.sort_values("name", key=lambda names: names.map(LADDER.index), kind="stable")


# -- gates at equal share
def plot_ladder(gated):
    """What each way of choosing the Mamba tokens costs, a panel for each share. `gated`: of `read_gates`, results."""
    rows = _ranked(gated)
    shares = [share for share, part in rows.groupby("share") if len(part) > 1]
    style.needs(shares, "no share has both a control and a gate")
    rows = rows[rows["share"].isin(shares)]
    names = list(dict.fromkeys(rows["name"]))
    figure, panels = style.new_figure(max(8.0, 3.2 + 3.3 * len(shares)), 2.0 + 0.3 * len(names), 1, len(shares))
    for share, axes in zip(shares, np.atleast_1d(panels), strict=True):
        part = rows[rows["share"] == share]
        for name, one in part.groupby("name"):
            offline = bool(one["uses_document"].iloc[0])
            look = (style.gate_colour(name), "D" if offline else "o", not offline)
            style.dots(axes, one, [names.index(name)], style.COST, *look)
        for _, row in part[part["p_holm"] < style.SIGNIFICANT].iterrows():
            place = (row["ci_high"], names.index(row["name"]))
            axes.annotate("*", place, (4, -4), textcoords="offset points", fontsize=11)
        for value in part.loc[part["name"] == "random", "delta_nll"]:
            axes.axvline(value, color=style.GREY, ls="--", lw=1.2, zorder=0)
        for place, (one, other) in enumerate(itertools.pairwise(names)):
            if style.GATES[one][1] != style.GATES[other][1]:
                axes.axhline(place + 0.5, color="0.88", lw=0.8, zorder=0)
        style.fit(axes, part, *style.COST)
        style.name_rows(axes, [style.gate_label(name) for name in names], axes is figure.axes[0])
        style.named(axes, style.DELTA_NLL, title=f"{100 * share:g} % of tokens on Mamba")
    more = [
        style.mark("o", True, "deployable gate"),
        style.mark("D", False, "offline mask, equal counts"),
        Line2D([], [], color=style.GREY, ls="--", label="random control"),
        style.mark("$*$", True, "differs from random (Holm)"),
    ]
    style.legend_of_groups(figure, [style.GATES[name][1] for name in names], more)
    figure.suptitle("What it costs to choose the Mamba tokens in this way (left is better; bars: 95 %)", fontsize=10.5)
    return figure


def plot_controls(pairs, answer=None, share=0.5):
    """Forest plot of the leading gate minus each control, with the band of no interest; the verdict in the title.

    `pairs`: of `read_gates`, pairs; `answer`: verdict.json, whose margin is the band.
    """
    answer = answer or {}
    controls = [name for name in LADDER if style.GATES[name][1] in style.CONTROL_GROUPS]
    rows = pairs[(pairs["share"] == share) & pairs["recipe"].isin(controls)]
    style.needs(len(rows), f"no gate and its controls were run at share {share:g}")
    rows = rows.sort_values("recipe", key=lambda recipes: recipes.map(controls.index), kind="stable")
    figure, axes = style.new_figure(8.5, 2.2 + 0.32 * len(rows))
    margin, more = answer.get("margin") or 0, []
    if margin:
        axes.axvspan(-margin, margin, color=style.GREY, alpha=0.22, lw=0)
        more.append(Patch(color=style.GREY, alpha=0.22, label=f"margin of no interest: ±{margin:.4f}"))
    for place, (_, row) in enumerate(rows.iterrows()):
        one, columns = rows.iloc[[place]], ("difference", "ci_low", "ci_high")
        style.dots(axes, one, [place], columns, style.gate_colour(row["recipe"]))
        text = f"{row['difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    style.fit(axes, rows.assign(low=-margin, high=margin), "ci_low", "ci_high", "low", "high")
    style.name_rows(axes, [style.gate_label(recipe) for recipe in rows["recipe"]])
    axes.set_xlabel("NLL of the gate minus NLL of the control (nats per token; left of 0: the gate is better)")
    style.legend_of_groups(figure, [style.GATES[recipe][1] for recipe in rows["recipe"]], more)
    outcome = f"verdict: {answer['outcome'].upper()}" if answer.get("outcome") else "no verdict yet"
    gate = style.plain(rows["mode"].iloc[0])
    title = f"{gate} against each control, {100 * share:g} % of tokens on Mamba\n{outcome}"
    axes.set_title(title, fontsize=10.5)
    return figure


def plot_domains(domains):
    """Routing minus random, and the share that routing realised, by domain and share. `domains`: ..._domains.csv."""
    rows = _ranked(domains)
    rows = rows[rows["name"].isin(["routing hard", "ffn_sparsity hard"])]
    style.needs(len(rows), "no hard gate was scored by domain")
    names, shares = list(dict.fromkeys(rows["domain"])), sorted(set(rows["share"]))
    figure, (left, right) = style.new_figure(10.5, 1.9 + 0.22 * len(names) * (len(shares) + 0.6), 1, 2)
    for number, share in enumerate(shares):
        part = rows[rows["share"] == share]
        places = [names.index(name) + style.aside(number, len(shares)) for name in part["domain"]]
        colour, marker = style.series(number)
        style.dots(left, part, places, style.VERSUS_RANDOM, colour, marker, label=f"share {share:g}")
        right.axvline(share, color=colour, ls="--", lw=1.2)
        right.scatter(part["share_realised"], places, s=36, zorder=3, color=colour, marker=marker)
    style.fit(left, rows, *style.VERSUS_RANDOM)
    right.set_xlim(0, 1)
    counts = rows.groupby("domain")["documents"].max()
    for axes in (left, right):
        style.name_rows(axes, [f"{style.plain(name)} ({counts[name]:g} documents)" for name in names], axes is left)
    title = "Routing against chance by kind of text (bars: 95 %)"
    style.named(left, "routing minus random (nats per token; left is better)", title=title)
    style.named(right, "share of tokens that routing sent to Mamba", title="Calibrated (dashed) and realised share")
    style.legend_below(figure, left)
    return figure


def plot_layer_sets(layer_sets, share=0.5):
    """Cost of each gate, and its difference to random, by set of hybrid layers. `layer_sets`: layer_set_results.csv."""
    rows = pd.concat([_ranked(part) for _, part in layer_sets.groupby("layers", sort=False)])
    rows = rows[rows["share"] == share]
    style.needs(len(rows), f"no layer set was run at share {share:g}")
    names, gates = list(dict.fromkeys(rows["layers"])), sorted(set(rows["name"]), key=LADDER.index)
    figure, (left, right) = style.new_figure(11.5, 2.1 + 0.2 * len(names) * (len(gates) + 0.6), 1, 2)
    for number, (gate, (*look, _)) in enumerate(style.looks(gates).items()):
        part = rows[rows["name"] == gate]
        places = np.array([names.index(name) for name in part["layers"]]) + style.aside(number, len(gates), 0.7)
        filled = not part["uses_document"].iloc[0]
        style.dots(left, part, places, style.COST, *look, filled, style.gate_label(gate))
        style.dots(right, part, places, style.VERSUS_RANDOM, *look, filled)
    style.fit(left, rows, *style.COST)
    style.fit(right, rows, *style.VERSUS_RANDOM)
    for axes in (left, right):
        style.name_rows(axes, [style.words(name) for name in names], axes is left)
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color="0.85", lw=0.8)
    style.named(left, style.DELTA_NLL, "layers with a sidecar", "Cost")
    style.named(right, "NLL minus random control (nats per token; left is better)", title="Against chance")
    style.legend_below(figure, left, 4)
    title = f"Other layers on Mamba, {100 * share:g} % of their tokens (hollow: offline; bars: 95 %)"
    figure.suptitle(title, fontsize=10.5)
    return figure


# -- sensitivity
def plot_validation(validation):
    """Rank correlation of each estimate with interventions, by layer. `validation`: sensitivity_validation.csv."""
    style.needs(len(validation), "no cell was switched by itself")
    layers = ["all", *sorted((layer for layer in set(validation["layer"]) if layer != "all"), key=int)]
    estimators = list(dict.fromkeys(validation["estimator"]))
    figure, axes = style.new_figure(max(6.5, 2.5 + 0.55 * len(layers)), 4.2)
    for number, name in enumerate(estimators):
        part = validation[validation["estimator"] == name]
        places = np.array([layers.index(layer) for layer in part["layer"]]) + style.aside(number, len(estimators), 0.4)
        chosen, (colour, marker) = bool(part["chosen"].any()), style.series(number)
        label = f"{style.words(name)}, KL of its masks {part['mask_kl'].max():.3f}{' (chosen)' if chosen else ''}"
        axes.errorbar(
            places, part["rho"], yerr=style.reach(part, "rho", "ci_low", "ci_high"), fmt=marker, label=label,
            color=colour, markerfacecolor=colour if chosen else "white", ms=6, capsize=2.5,
        )  # fmt: skip
    axes.axhline(GOOD_RHO, color=style.GREY, ls="--", lw=1.2, label=f"good enough: {GOOD_RHO:g}")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_ylim(min(0.0, float(validation["ci_low"].min()) - 0.05), 1.02)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    cells = int(validation.loc[validation["layer"] == "all", "cells"].max())
    title = (
        f"Does the estimate rank tokens as switching them does? ({cells:,} single cells; bars: 95 %)\n"
        f"KL from the base model, nats per token, rule's share; random masks: {validation['random_kl'].max():.3f}"
    )
    style.named(axes, "layer", "rank correlation (Spearman's rho)", title)
    style.legend_below(figure, axes, 2)
    return figure


def plot_correlations(correlations):
    """Partial rank correlation of each signal with sensitivity: all layers with interval (left), each layer (right).

    `correlations`: sensitivity_correlations.csv. Filled marks, and names with a bullet: signals of deployable gates.
    """
    every = correlations[correlations["layer"] == "all"].sort_values("partial_rho", kind="stable")
    style.needs(len(every), "no signal was correlated with sensitivity")
    signals = list(every["signal"])
    rest = correlations[correlations["layer"] != "all"].astype({"layer": int})
    heat = rest.pivot(index="signal", columns="layer", values="partial_rho").reindex(signals)
    p_holm = rest.pivot(index="signal", columns="layer", values="p_holm").reindex(signals)
    wide = max(2.2, 0.55 * heat.shape[1])
    sizes = (7.5 + wide, 2.0 + 0.36 * len(signals))
    figure, (left, right) = style.new_figure(*sizes, 1, 2, width_ratios=[4.5, wide + 0.8])
    columns = ("partial_rho", "partial_ci_low", "partial_ci_high")
    for place, (_, row) in enumerate(every.iterrows()):
        one = every.iloc[[place]]
        style.dots(left, one, [place], columns, style.BLUE, filled=bool(row["deployable"]))
        left.scatter(row["rho"], place, marker="|", s=90, color=style.ORANGE, zorder=1)
        if row["p_holm"] < style.SIGNIFICANT:
            left.annotate("*", (row["partial_ci_high"], place), (4, -4), textcoords="offset points", fontsize=11)
    style.fit(left, every, "partial_ci_low", "partial_ci_high", "rho")
    names = zip(signals, every["deployable"], strict=True)
    style.name_rows(left, [style.words(name) + ("  •" if deployable else "") for name, deployable in names])
    style.named(left, "rank correlation with sensitivity (rho)", title="All layers (bars: 95 %, documents)")
    if heat.size:
        bound = max(0.05, np.nanmax(np.abs(heat.to_numpy())))
        stars = np.where(p_holm < style.SIGNIFICANT, "*", "")
        text = np.char.add([[f"{value:+.2f}" for value in row] for row in heat.to_numpy()], stars)
        sns.heatmap(
            heat, ax=right, cmap=style.SIGNED_MAP, vmin=-bound, vmax=bound, cbar_kws={"label": "partial rho"}, fmt="",
            annot=text if heat.shape[1] <= 12 else stars, annot_kws={"fontsize": 8},
            xticklabels=style.sparse_labels(list(heat.columns), 24), yticklabels=False,
        )  # fmt: skip
        right.tick_params(axis="x", rotation=0)
    style.named(right, "layer", title="Layer by layer")
    more = [
        style.mark("o", True, "• deployable signal", style.BLUE),
        style.mark("o", False, "not known before the layer runs", style.BLUE),
        Line2D([], [], marker="|", ls="", ms=9, color=style.ORANGE, label="before partialling"),
        style.mark("$*$", True, "differs from 0 (Holm)"),
    ]
    style.legend_below(figure, more, 4)
    title = "Which signal tells what a token's attention is worth?"
    figure.suptitle(f"{title} Within documents, beyond position, frequency, surprisal", fontsize=10.5)
    return figure


def _positive(values):
    """Sensitivities as floats, with what is 0 or missing lifted to the smallest positive one (for logarithms)."""
    values = np.asarray(values, dtype=float)
    found = values[values > 0]
    return np.where(values > 0, values, found.min() if found.size else 1e-12)


def plot_sensitivity_map(document, start=0, tokens=64):
    """Heat maps layer x token: sensitivity, sparsity, and where routing and oracle send a token to Mamba.

    document: an entry of sensitivity_maps.json's `documents`; the `tokens` tokens from `start` on.
    """
    cut = slice(start, start + tokens)
    names, layers = document["tokens"][cut], document["layers"]
    style.needs(names, f"the document has {len(document['tokens'])} tokens; there is none from {start} on")
    values = _positive(document["sensitivity"])
    low, high = np.quantile(values, [0.02, 0.98])  # of the whole document, so that excerpts compare
    # 0 both paths agree on attention, 1 only routing chooses Mamba, 2 only the oracle, 3 both
    chosen = np.asarray(document["mamba"])[:, cut] + 2 * np.asarray(document["oracle"])[:, cut]
    colours = ["0.93", style.SERIES[1], style.SERIES[4], style.SERIES[0]]
    sizes = (max(8.5, 3.0 + 0.2 * len(names)), 3.0 + min(max(3.0, 0.6 * len(layers)), 10.0))
    figure, panels = style.new_figure(*sizes, 3, 1)
    shared = dict(xticklabels=False, yticklabels=style.sparse_labels(layers, 12))
    norm = LogNorm(low, max(high, 1.001 * low))
    settings = dict(cmap=style.SPARSITY_MAP, **shared)
    sns.heatmap(values[:, cut], ax=panels[0], norm=norm, cbar_kws={"label": "nats (log)"}, **settings)
    sparsity = np.asarray(document["sparsity"], dtype=float)[:, cut]
    sns.heatmap(sparsity, ax=panels[1], cbar_kws={"label": "sparsity"}, **settings)
    sns.heatmap(chosen, ax=panels[2], cmap=ListedColormap(colours), vmin=0, vmax=3, cbar=False, **shared)
    titles = (
        "Sensitivity: what sending the token to Mamba would cost (bright: keep attention)",
        "Sparsity that the gate sees (bright: sent to Mamba)",
        "Sent to Mamba at share 0.5",
    )
    for axes, title in zip(panels, titles, strict=True):
        style.named(axes, "", "layer", title)
        axes.tick_params(axis="y", rotation=0)
    panels[2].set_xticks(np.arange(len(names)) + 0.5, [style.plain(name, 12) or "∅" for name in names], rotation=90)
    panels[2].tick_params(axis="x", labelsize=8)
    panels[2].set_xlabel(f"token ({start} to {start + len(names) - 1} of {len(document['tokens'])})")
    labels = ("neither", "routing only", "oracle only", "both")
    handles = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    style.legend_below(figure, handles, 4)
    figure.suptitle(f"Where attention is worth most: {style.plain(document['document'], 70)}", fontsize=10.5)
    return figure


def _text_cells(document, layer):
    """(log10 of sensitivity [T], sent to Mamba [T] bool, words) of one layer, or over all of them (None).

    Over all layers: the mean sensitivity, and whether routing sends the token to Mamba in more than half of them. The
    outer 2 % of sensitivities are drawn in, or a few tokens would take all colours. Raises IndexError by name.
    """
    sensitivity, mamba = np.asarray(document["sensitivity"], dtype=float), np.asarray(document["mamba"])
    if layer is not None and layer not in document["layers"]:
        raise IndexError(f"layer {layer} is not there: this map has layers {document['layers']}")
    rows = range(len(sensitivity)) if layer is None else [document["layers"].index(layer)]
    values = np.log10(_positive(np.nanmean(sensitivity[rows], axis=0)))
    where = f"layer {layer}" if layer is not None else f"mean over {len(rows)} layers"
    return np.clip(values, *np.quantile(values, [0.02, 0.98])), mamba[rows].mean(axis=0) > 0.5, where


def plot_sensitivity_text(document, layer=None, tokens=260):
    """The first `tokens` tokens coloured by sensitivity; routing sends those underlined to Mamba (share 0.5)."""
    values, mamba, where = _text_cells(document, layer)
    in_most = "" if layer is not None else " in most layers"
    figure = plot_token_text({"tokens": document["tokens"][:tokens], "per_token_sparsity": [values[:tokens]]})
    axes, scale = figure.axes
    for cell, marked in zip(list(axes.patches), mamba, strict=False):  # a rectangle for each token, in order
        if marked:
            x, y = cell.get_xy()
            axes.plot([x + 0.1, x + cell.get_width() - 0.1], [y + 0.88] * 2, color=style.VERMILION, lw=2.2)
    title = f"Bright: attention is worth most ({where}). Underlined: routing sends it to Mamba{in_most}"
    axes.set_title(title, fontsize=10.5)
    scale.set_xlabel("sensitivity (log10 of nats; outer 2 % drawn in)")
    return figure


def token_html(entry, layer=None):
    """A text as HTML, coloured as in its figure: hovering a token shows its value, and whether it goes to Mamba.

    entry: one of routing_signals.json's `prompts` (its sparsity is shown) or of sensitivity_maps.json's `documents`
    (its sensitivity; what routing sends to Mamba at share 0.5 is underlined). layer: None for all layers together.
    """
    if "sensitivity" in entry:
        values, mamba, _ = _text_cells(entry, layer)
        notes = [f"sensitivity {10**value:.2g} nats" for value in values]
    else:
        values = token_sparsity(entry, layer)
        notes, mamba = [f"sparsity {value:.3f}" for value in values], np.zeros(len(values), dtype=bool)
    spans = []
    for token, note, sent, colour in zip(entry["tokens"], notes, mamba, token_colours(values), strict=True):
        css = f"background:{to_hex(colour)};color:{text_colour(colour)};white-space:pre-wrap"
        if sent:
            note, css = f"{note}, to Mamba", f"{css};border-bottom:3px solid {style.VERMILION}"
        shown = html.escape(token.replace("\n", "↵")) + ("<br>" if "\n" in token else "")
        spans.append(f'<span title="{note}" style="{css}">{shown}</span>')
    text = "".join(spans).replace("$", "&#36;<wbr>")  # or Jupyter's MathJax takes a pair for mathematics
    return f'<div class="tex2jax_ignore" style="font-family:monospace;line-height:1.8">{text}</div>'


# -- probes
def plot_probe_gap(probe_gap):
    """How far from random to oracle each gate goes, and how it ranks tokens. `probe_gap`: probe_gap.csv."""
    style.needs(len(probe_gap), "no probe was trained")
    names, shares = list(dict.fromkeys(probe_gap["probe"])), sorted(set(probe_gap["share"]))
    height = 2.0 + 0.2 * len(names) * (len(shares) + 0.6)
    figure, (left, right) = style.new_figure(11.5, height, 1, 2, width_ratios=[1.6, 1])
    rows = probe_gap.assign(**{name: 100 * probe_gap[name] for name in ("gap_closed", "ci_low", "ci_high")})
    for number, share in enumerate(shares):
        part = rows[rows["share"] == share]
        places = np.array([names.index(name) for name in part["probe"]]) + style.aside(number, len(shares))
        look = style.series(number)
        style.dots(left, part, places, ("gap_closed", "ci_low", "ci_high"), *look, label=f"share {share:g}")
        style.dots(right, part, places, ("rho", "rho_low", "rho_high"), *look)
    left.axvline(100, color=style.VERMILION, ls="--", lw=1.2, label="oracle")
    for axes in (left, right):
        style.name_rows(axes, [style.words(name) for name in names], axes is left)
    random = style.fit(left, rows.assign(oracle=100.0), "ci_low", "ci_high", "oracle")
    random.set(color=style.GREY, ls="--", lw=1.2, label="random")
    style.named(left, "of the gap from random to oracle closed (%)", title="Loss (bars: 95 %)")
    style.named(right, "rank correlation with sensitivity (rho)", title="Ranking of tokens (bars: 95 %)")
    style.fit(right, rows, "rho_low", "rho_high")
    style.legend_below(figure, left)
    figure.suptitle("How much of what could be known is in the router, and in the layer's input?", fontsize=10.5)
    return figure


# -- recall
def plot_recall(recall, share=0.5):
    """Accuracy over length of each gate at `share` and of Mamba alone, by task. `recall`: recall_results.csv."""
    rows = style.name_gates(recall)
    mamba_only = (rows["name"] == "fixed") & (rows["share"] == 1)
    rows.loc[mamba_only, "name"] = "Mamba only"
    rows = rows[(rows["name"] == "baseline") | mamba_only | (rows["share"] == share)]
    names = [name for name in dict.fromkeys(rows["name"]) if name != "baseline"]
    style.needs(set(names) - {"Mamba only"}, f"no gate was run at share {share:g}")
    tasks = list(dict.fromkeys(rows["task"]))
    figure, panels = style.panels_for(len(tasks), 2, 4.8, 3.1, (2.0, 0.9 + 0.08 * len(names)))
    for task, axes in zip(tasks, panels, strict=True):
        part = rows[rows["task"] == task]
        for number, (name, (colour, marker, line)) in enumerate(style.looks(["baseline", *names]).items()):
            one = part[part["name"] == name].sort_values("length")
            axes.errorbar(
                one["length"] * 2 ** style.aside(number, len(names) + 1, 0.35), 100 * one["accuracy"],
                yerr=100 * style.reach(one, "accuracy", "ci_low", "ci_high"), color=colour, capsize=2.5, lw=1.4, ms=5.5,
                marker=marker, ls=line, label=style.gate_label(name),
            )  # fmt: skip
        chance = part.groupby("length")["chance"].first()
        axes.plot(chance.index, 100 * chance, ":", color=style.GREY, lw=1.5, marker="_", label="chance")
        lengths = sorted(set(part["length"]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
        axes.set_ylim(-3, 103)
        style.named(axes, "length of the text (tokens; marks shifted sideways)", "answers right (%)", style.words(task))
    style.legend_below(figure, panels[0], 3)
    figure.suptitle(f"Recall from the text, {100 * share:g} % of tokens on Mamba (bars: 95 %)", fontsize=10.5)
    return figure


# -- ablations
def plot_training_ablations(ablations):
    """What Mamba alone and routing cost, by how the sidecars were made. `ablations`: of `read_ablations`."""
    title = "What the sidecars' initialisation, training and size change (each on a reduced budget; bars: 95 %)"
    return _plot_variants(ablations, TRAINING, TRAINING_COLUMNS, title)


def plot_gate_ablations(ablations):
    """Cost and difference to random by the gate's signal, softness and threshold, a mark for each share."""
    title = "What the gate's form changes (left is better; bars: 95 %)"
    return _plot_variants(ablations, GATE_FORMS, GATE_COLUMNS, title)


def _variant(name):
    """What an ablation's variant is called in figures."""
    return STAGES.get(name, style.words(name))


def _plot_variants(ablations, names, columns, title):
    """A panel per column, a row per variant under its ablation's name, and where there are shares a mark for each."""
    rows = ablations[ablations["ablation"].isin(names)]
    shown = [name for name in columns if name in rows and rows[name].notna().any()]
    style.needs(shown, f"none of these was run: {', '.join(names)}")
    rows = rows.sort_values("ablation", key=lambda column: column.map(list(ABLATIONS).index), kind="stable")
    if "share" not in rows:
        rows = rows.assign(share=math.nan)
    places, labels = {}, []
    for ablation, part in rows.groupby("ablation", sort=False):
        labels.append(ABLATIONS[ablation])
        for variant in dict.fromkeys(part["variant"]):
            places[ablation, variant] = len(labels)
            labels.append(_variant(variant))
    shares = rows.groupby("share", dropna=False).indices  # share -> its rows
    height = 1.6 + max(0.3, 0.16 * len(shares)) * len(labels)
    figure, panels = style.new_figure(2.6 + 3.6 * len(shown), height, 1, len(shown))
    for name, axes in zip(shown, np.atleast_1d(panels), strict=True):
        label, factor = columns[name]
        ends = ("ci_low", "ci_high") if name == "delta_nll" else (f"{name}_ci_low", f"{name}_ci_high")
        low, high = (rows.get(end, rows[name]) for end in ends)
        drawn = factor * pd.DataFrame({"value": rows[name], "low": low, "high": high})
        for number, (share, inside) in enumerate(shares.items()):
            keys = rows.iloc[inside][["ablation", "variant"]].itertuples(index=False)
            at = [places[tuple(key)] + style.aside(number, len(shares), 0.7) for key in keys]
            look = style.series(number)
            style.dots(axes, drawn.iloc[inside], at, ("value", "low", "high"), *look, label=f"share {share:g}")
        style.fit(axes, drawn, "low", "high")
        axes.set_xlabel(label, fontsize=9)
        style.name_rows(axes, labels, axes is figure.axes[0])
    for place, tick in enumerate(figure.axes[0].get_yticklabels()):
        tick.set_weight("normal" if place in places.values() else "bold")
    if len(shares) > 1:
        style.legend_below(figure, figure.axes[0], 6)
    figure.suptitle(title, fontsize=10.5)
    return figure


def plot_distillation(curves):
    """Validation curves by ablation and stage, a line for each variant. `curves`: distillation_curves.csv."""
    style.needs(len(curves), "no training was recorded")
    parts = list(curves.groupby(["ablation", "stage", "quantity"], sort=False))
    figure, panels = style.panels_for(len(parts), 3, 4.3, 3.2)
    for ((ablation, stage, quantity), part), axes in zip(parts, panels, strict=True):
        label = CURVES.get(quantity, style.words(quantity))
        for number, (variant, one) in enumerate(part.groupby("variant", sort=False)):
            line = one.set_index("tokens")["value"]
            colour, marker = style.series(number)
            axes.plot(line.index / 1e6, line, color=colour, marker=marker, ms=3.5, lw=1.4, label=_variant(variant))
        if (part["value"] > 0).all() and part["value"].max() > 5 * part["value"].min():
            style.logarithmic(axes)
            label += ", log"
        title = f"{ABLATIONS[ablation]}, stage {style.plain(stage).upper()}"
        style.named(axes, "training tokens (millions)", title=title)
        axes.set_ylabel(label, fontsize=8.5)
        axes.legend(fontsize=8)
    figure.suptitle("How the sidecars learn (lower is better)", fontsize=10.5)
    return figure


# -- verdict
def verdict_in_full(answer, width=110, indent=""):
    """verdict.json in full as wrapped lines `name: value`, lists of comparisons an entry a line."""
    lines = []
    for name, value in answer.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value, 1))
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", verdict_in_full(value, width, indent + "    ")]
        else:
            text = f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}"
            lines.append(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent + "  "))
    return "\n".join(lines)

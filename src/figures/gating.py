"""Every figure about the answer: gates, controls and oracle at equal share, sensitivity, probes, recall, ablations.

Drawn from the files that `07_gated_hybrid.py --full` wrote; no torch. Each `plot_*` function takes what `read_result`
returned, draws one matplotlib Figure and returns it. Where a file has nothing for a figure, `NothingToDraw` says why.
Columns that today's shorter runs do not write (sets of sidecars, Holm's p-values) may be missing.

Differences are in nats per token, intervals 95 %. Colours are Okabe and Ito's colour-blind safe set, by how a gate
chooses; filled marks are deployable gates, hollow ones offline masks (`uses_document`).
"""

import html
import itertools
import json
import math
import re
import textwrap

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from src.figures import hybrid
from src.figures.hybrid import DELTA_NLL, SPARSITY_MAP, new_figure, plain, sparse_labels
from src.figures.journeys import MARKERS, SERIES, SIGNED_MAP, NothingToDraw
from src.gating.rule import Rule, compare

COMMAND = "python scripts/07_gated_hybrid.py --full"
TEXT_COLUMNS = ("mode", "layer", "layers", "variant", "stage", "task", "domain", "document")
GREY = "#7F7F7F"
SIGNIFICANT = 0.05  # after Holm's correction
GOOD_RHO = 0.6  # rank agreement with interventions from which an estimate is taken as good

MAMBA_ONLY = "Mamba only"
CHANCE, REARRANGED, SIGNAL, LATER = "chance", "routing, rearranged", "other signals", "known only after the layer"
ROUTING, TRAINED, BOUND = "routing", "trained", "bound: has seen what follows"
GROUP_COLOURS = {
    CHANCE: GREY,
    REARRANGED: "#E69F00",
    SIGNAL: "#56B4E9",
    LATER: "#CC79A7",
    ROUTING: "#0072B2",
    TRAINED: "#009E73",
    BOUND: "#D55E00",
}
# kind of a mode -> (label, group), from those who know nothing to those who know everything
LADDER = {
    "control_random": ("random", CHANCE),
    "control_token_shuffled": ("routing, tokens shuffled", REARRANGED),
    "control_block_shuffled": ("routing, blocks shuffled", REARRANGED),
    "control_inverted": ("routing, inverted", REARRANGED),
    "control_other_document": ("routing of another document", REARRANGED),
    "control_position_early": ("early tokens", SIGNAL),
    "control_position_late": ("late tokens", SIGNAL),
    "control_token_frequency": ("frequent tokens", SIGNAL),
    "control_previous_surprisal": ("expected tokens (surprisal)", SIGNAL),
    "control_hidden_norm": ("hidden-state norm", SIGNAL),
    "control_residual_norm": ("residual norm", SIGNAL),
    "control_self_sparsity": ("the layer's own sparsity", LATER),
    "control_attention_entropy": ("attention entropy", LATER),
    "control_recall_error": ("recall error of the sidecar", LATER),
    "routing_hard": ("routing, hard", ROUTING),
    "routing_hard_lookahead": ("routing, hard, look-ahead", ROUTING),
    "control_probe_router_linear": ("probe of the router, linear", TRAINED),
    "control_probe_router_mlp": ("probe of the router, MLP", TRAINED),
    "control_probe_hidden_linear": ("probe of the layer input, linear", TRAINED),
    "control_probe_hidden_mlp": ("probe of the layer input, MLP", TRAINED),
    "learned": ("learned gate", TRAINED),
    "control_oracle": ("oracle (knows each token's cost)", BOUND),
    "control_hindsight": ("hindsight (has seen the answers)", BOUND),
}
OTHER_COLOURS = hybrid.COLOURS | {MAMBA_ONLY: "#000000"}
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
STAGES = {"a": "A alone", "a_longer": "A alone, as long as both", "a_b": "A, then B"}
# column of an ablation file -> (axis label, factor); intervals stand in <column>_ci_low and _ci_high
TRAINING_COLUMNS = {
    "alpha_1": ("Δ NLL of Mamba alone (nats per token)", 1),
    "recovered": ("of zeroed attention's cost won back (%)", 100),
    "vs_random": ("routing minus random (nats per token)", 1),
}
GATE_COLUMNS = {
    "delta_nll": (DELTA_NLL, 1),
    "vs_random": ("gate minus random control (nats per token)", 1),
}
CURVES = {"normalised_mse": "error of the layer's output (normalised)", "kl": "KL from the base model (nats per token)"}


# -- files
def read_result(path):
    """Read one file of the study (.csv -> DataFrame, .json -> dict); where it is missing, say so and return None."""
    if not path.is_file():
        print(f"{path.name} is missing; this command makes it: {COMMAND}")
        return None
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str))


def read_ablations(folder):
    """All ablation_<name>.csv of a folder in one DataFrame; where there is none, say so and return None."""
    tables = [read_result(path) for path in sorted(folder.glob("ablation_*.csv"))]
    if not tables:
        print(f"ablation_<name>.csv are missing; this command makes them: {COMMAND}")
        return None
    return pd.concat(tables, ignore_index=True)


# -- parts
def split_mode(mode):
    """`control_random_0.5` -> ("control_random", 0.5), `routing_hard_0.5_lookahead` -> ("routing_hard_lookahead", 0.5).

    A mode without a share has share NaN.
    """
    match = re.fullmatch(r"(.+?)_(\d+(?:\.\d+)?)(?:_(\w[\w.]*))?", mode)
    if not match:
        return mode, math.nan
    kind, share, variant = match.groups()
    return f"{kind}_{variant}" if variant else kind, float(share)


def _known(rows):
    """The rows whose gate has a place in LADDER, with columns kind and share; in LADDER's order."""
    rows = rows.copy()
    rows[["kind", "share"]] = [split_mode(mode) for mode in rows["mode"]]
    rows = rows[rows["kind"].isin(LADDER)]
    return rows.sort_values("kind", key=lambda kinds: kinds.map(list(LADDER).index), kind="stable")


def _label(kind):
    """The name of a gate in figures; those that have no place in LADDER (fixed, soft) keep that of `plots`."""
    if kind in LADDER:
        return LADDER[kind][0]
    if kind.startswith("control_random_"):
        return f"random, counts of {plain(kind.removeprefix('control_random_'))}"
    return hybrid.LABELS.get(kind, plain(kind.replace("_", " ")))


def _colour(kind):
    return GROUP_COLOURS[LADDER[kind][1]]


def _offline(kind):
    """Whether a gate is an offline mask: those, and only those, are called control_<name>."""
    return kind.startswith("control_")


def _looks(kinds):
    """kind -> (colour of its group, marker, line); gates of one group differ in their lines and markers."""
    looks, seen = {}, {}
    for number, kind in enumerate(kinds):
        colour = _colour(kind) if kind in LADDER else OTHER_COLOURS.get(kind, GREY)
        looks[kind] = (colour, MARKERS[number % len(MARKERS)], ("-", "--", "-.", ":")[seen.get(colour, 0) % 4])
        seen[colour] = seen.get(colour, 0) + 1
    return looks


def _reach(rows, centre, low, high):
    """Lengths of error bars [2, n]; 0 where there is no interval, and never negative by rounding.

    The studentised intervals of a few documents may be infinite: those reach far beyond the panel.
    """
    ends = [rows[centre] - rows[low], rows[high] - rows[centre]]
    return np.nan_to_num(np.maximum(np.array(ends, dtype=float), 0), posinf=1e6)


def _dots(axes, rows, places, columns, colour, marker="o", filled=True, label=None):
    """Horizontal estimates with intervals; columns: (centre, low, high)."""
    axes.errorbar(
        rows[columns[0]], places, xerr=_reach(rows, *columns), fmt=marker, color=colour, ms=6, capsize=2.5, label=label,
        markerfacecolor=colour if filled else "white",
    )  # fmt: skip


def _aside(number, count, span=0.6):
    """Where the `number`-th of `count` marks of one row stands: offsets over `span`, around 0."""
    return span * ((number + 0.5) / count - 0.5)


def _name_rows(axes, labels, first=True):
    """One row per label from the top; `first`: the panel that shows the labels."""
    axes.set_yticks(range(len(labels)), labels if first else [""] * len(labels), fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _tell_apart(figure, groups, more=()):
    """Legend below the figure: colours of the groups, then `more` handles."""
    handles = [Patch(color=GROUP_COLOURS[group], label=group) for group in GROUP_COLOURS if group in set(groups)]
    figure.legend(handles=[*handles, *more], fontsize=8.5, ncols=4, frameon=False, loc="outside lower center")


def _mark(marker, filled, label, colour="black"):
    face = colour if filled else "white"
    return Line2D([], [], marker=marker, ls="", color=colour, markerfacecolor=face, ms=6, label=label)


def _fit(axes, rows, low, high):
    """Few ticks, and room for every finite interval and for 0."""
    axes.xaxis.set_major_locator(MaxNLocator(5))
    ends = np.array([0.0, *rows[low], *rows[high]])
    ends = ends[np.isfinite(ends)]
    room = 0.08 * max(np.ptp(ends), 1e-9)
    axes.set_xlim(ends.min() - room, ends.max() + room)


# -- gates at equal share
def plot_ladder(gated):
    """What each way of choosing the Mamba tokens costs, a panel for each share; dashed: the random control.

    `gated`: gated_hybrid_results.csv. Raises NothingToDraw where no share has two of the gates.
    """
    rows = _known(gated)
    shares = [share for share, part in rows.groupby("share") if len(part) > 1]
    if not shares:
        raise NothingToDraw("no share has both a control and a gate")
    rows = rows[rows["share"].isin(shares)]
    kinds = list(dict.fromkeys(rows["kind"]))
    figure, panels = new_figure(max(8.0, 3.2 + 3.3 * len(shares)), 2.0 + 0.3 * len(kinds), 1, len(shares))
    for share, axes in zip(shares, np.atleast_1d(panels), strict=True):
        part = rows[rows["share"] == share]
        for kind, one in part.groupby("kind"):
            columns, offline = ("delta_nll", "ci_low", "ci_high"), _offline(kind)
            _dots(axes, one, [kinds.index(kind)], columns, _colour(kind), "D" if offline else "o", not offline)
        if "p_holm" in part:
            for _, row in part[part["p_holm"] < SIGNIFICANT].iterrows():
                axes.annotate(
                    "*", (row["ci_high"], kinds.index(row["kind"])), (4, -4), textcoords="offset points", fontsize=11
                )  # fmt: skip
        for value in part.loc[part["kind"] == "control_random", "delta_nll"]:
            axes.axvline(value, color=GREY, ls="--", lw=1.2, zorder=0)
        axes.axvline(0, color="black", lw=1)
        for place, (one, other) in enumerate(itertools.pairwise(kinds)):
            if LADDER[one][1] != LADDER[other][1]:
                axes.axhline(place + 0.5, color="0.88", lw=0.8, zorder=0)
        _fit(axes, part, "ci_low", "ci_high")
        _name_rows(axes, [_label(kind) for kind in kinds], axes is figure.axes[0])
        axes.set_xlabel(DELTA_NLL)
        axes.set_title(f"{100 * share:g} % of tokens on Mamba", fontsize=10)
    more = [_mark("o", True, "deployable gate"), _mark("D", False, "offline mask, equal counts")]
    more.append(Line2D([], [], color=GREY, ls="--", label="random control"))
    if "p_holm" in rows:
        more.append(Line2D([], [], color="black", marker="$*$", ls="", label="differs from random (Holm)"))
    _tell_apart(figure, [LADDER[kind][1] for kind in kinds], more)
    figure.suptitle("What it costs to choose the Mamba tokens in this way (left is better; bars: 95 %)", fontsize=10.5)
    return figure


def control_differences(documents, settings=None, share=0.5):
    """Hard routing minus each control at `share`, paired over documents: kind, difference, ci_low, ci_high.

    documents: gated_hybrid_documents.csv. settings: those of rule.json's rule, so that intervals are the verdict's.
    Raises NothingToDraw without routing or controls.
    """
    if "sidecar_seed" not in documents:
        documents = documents.assign(sidecar_seed=0)
    # without a verdict nothing is decided here: the fractions and counts of the rule do not matter
    rule = Rule(**settings) if settings else Rule(share, "previous", "", 1, 0, 0.0, 0.0)
    mode, modes, compared = f"routing_hard_{share:g}", set(documents["mode"]), []
    for kind, (_, group) in LADDER.items():
        control = f"{kind}_{share:g}"
        if {mode, control} <= modes and group in (CHANCE, REARRANGED, SIGNAL, LATER):
            interval = compare(documents, mode, control, rule)
            compared.append((kind, interval.estimate, interval.low, interval.high))
    if not compared:
        raise NothingToDraw(f"{mode} and its controls were not run")
    return pd.DataFrame(compared, columns=["kind", "difference", "ci_low", "ci_high"])


def plot_controls(documents, answer=None, share=0.5):
    """Forest plot of hard routing minus each control, with the band of no interest; the verdict in the title.

    `documents`: gated_hybrid_documents.csv; `answer`: rule.json, whose margin is the band.
    Raises NothingToDraw as `control_differences`.
    """
    answer = answer or {}
    rows = control_differences(documents, answer.get("settings"), share)
    figure, axes = new_figure(8.5, 2.2 + 0.32 * len(rows))
    margin, more = answer.get("margin"), []
    if margin:
        axes.axvspan(-margin, margin, color=GREY, alpha=0.22, lw=0)
        more.append(Patch(color=GREY, alpha=0.22, label=f"margin of no interest: ±{margin:.4f}"))
    for place, (_, row) in enumerate(rows.iterrows()):
        columns = ("difference", "ci_low", "ci_high")
        _dots(axes, rows[rows["kind"] == row["kind"]], [place], columns, _colour(row["kind"]))
        text = f"{row['difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.axvline(0, color="black", lw=1)
    _fit(axes, rows.assign(low=-(margin or 0), high=margin or 0).melt(value_vars=["ci_low", "ci_high", "low", "high"]),
         "value", "value")  # fmt: skip
    _name_rows(axes, [_label(kind) for kind in rows["kind"]])
    axes.set_xlabel("NLL of routing minus NLL of the control (nats per token; left of 0: routing is better)")
    _tell_apart(figure, [LADDER[kind][1] for kind in rows["kind"]], more)
    outcome = f"verdict: {answer['outcome'].upper()}" if answer.get("outcome") else "no verdict yet"
    axes.set_title(f"Routing against each control, {100 * share:g} % of tokens on Mamba\n{outcome}", fontsize=10.5)
    return figure


def plot_domains(domains):
    """Routing minus random, and the share that routing realised, by domain and share. `domains`: ..._domains.csv."""
    rows = _known(domains)
    rows = rows[(rows["kind"] == "routing_hard") & (rows["domain"] != "all")]
    if rows.empty:
        raise NothingToDraw("hard routing was not scored by domain")
    names, shares = list(dict.fromkeys(rows["domain"])), sorted(set(rows["share"]))
    figure, (left, right) = new_figure(10.5, 1.9 + 0.22 * len(names) * (len(shares) + 0.6), 1, 2)
    for number, share in enumerate(shares):
        part = rows[rows["share"] == share]
        places = [names.index(name) + _aside(number, len(shares)) for name in part["domain"]]
        style = dict(color=SERIES[number % len(SERIES)], marker=MARKERS[number % len(MARKERS)])
        columns = ("vs_random", "vs_random_ci_low", "vs_random_ci_high")
        _dots(left, part, places, columns, style["color"], style["marker"], label=f"share {share:g}")
        right.axvline(share, color=style["color"], ls="--", lw=1.2)
        right.scatter(part["share_realised"], places, s=36, zorder=3, **style)
    left.axvline(0, color="black", lw=1)
    _fit(left, rows, "vs_random_ci_low", "vs_random_ci_high")
    right.set_xlim(0, 1)
    counts = rows.groupby("domain")["documents"].max()
    for axes in (left, right):
        _name_rows(axes, [f"{plain(name)} ({counts[name]:g} documents)" for name in names], axes is left)
    left.set_xlabel("routing minus random (nats per token; left is better)")
    left.set_title("Routing against chance by kind of text (bars: 95 %)", fontsize=10)
    right.set_xlabel("share of tokens that routing sent to Mamba")
    right.set_title("Calibrated (dashed) and realised share", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8.5, ncols=6, frameon=False, loc="outside lower center")
    return figure


def plot_layer_sets(layer_sets, share=0.5):
    """Cost of each gate, and its difference to random, by set of hybrid layers. `layer_sets`: layer_set_results.csv.

    Raises NothingToDraw where nothing was run at `share`.
    """
    rows = _known(layer_sets)
    rows = rows[rows["share"] == share]
    if rows.empty:
        raise NothingToDraw(f"no layer set was run at share {share:g}")
    names, kinds = list(dict.fromkeys(layer_sets["layers"])), list(dict.fromkeys(rows["kind"]))
    names = [name for name in names if name in set(rows["layers"])]
    figure, (left, right) = new_figure(11.5, 2.1 + 0.2 * len(names) * (len(kinds) + 0.6), 1, 2)
    for number, (kind, (*look, _)) in enumerate(_looks(kinds).items()):
        part = rows[rows["kind"] == kind]
        places = np.array([names.index(name) for name in part["layers"]]) + _aside(number, len(kinds), 0.7)
        filled = not _offline(kind)
        _dots(left, part, places, ("delta_nll", "ci_low", "ci_high"), *look, filled, _label(kind))
        columns = ("vs_random", "vs_random_ci_low", "vs_random_ci_high")
        _dots(right, part, places, columns, *look, filled)
    _fit(left, rows, "ci_low", "ci_high")
    _fit(right, rows, "vs_random_ci_low", "vs_random_ci_high")
    for axes in (left, right):
        axes.axvline(0, color="black", lw=1)
        _name_rows(axes, [plain(name.replace("_", " ")) for name in names], axes is left)
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color="0.85", lw=0.8)
    left.set_ylabel("layers with a sidecar")
    left.set_xlabel(DELTA_NLL)
    left.set_title("Cost", fontsize=10)
    right.set_xlabel("NLL minus random control (nats per token; left is better)")
    right.set_title("Against chance", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8.5, ncols=4, frameon=False, loc="outside lower center")
    figure.suptitle(
        f"Other layers on Mamba, {100 * share:g} % of their tokens (hollow: offline; bars: 95 %)", fontsize=10.5
    )
    return figure


# -- sensitivity
def plot_validation(validation):
    """Rank correlation of each estimate with interventions, by layer. `validation`: sensitivity_validation.csv."""
    if validation.empty:
        raise NothingToDraw("no cell was switched by itself")
    layers = ["all", *sorted((layer for layer in set(validation["layer"]) if layer != "all"), key=int)]
    estimators = list(dict.fromkeys(validation["estimator"]))
    figure, axes = new_figure(max(6.5, 2.5 + 0.55 * len(layers)), 4.2)
    for number, name in enumerate(estimators):
        part = validation[validation["estimator"] == name]
        places = np.array([layers.index(layer) for layer in part["layer"]]) + _aside(number, len(estimators), 0.4)
        chosen, colour = bool(part["chosen"].any()), SERIES[number % len(SERIES)]
        axes.errorbar(
            places, part["rho"], yerr=_reach(part, "rho", "ci_low", "ci_high"), fmt=MARKERS[number % len(MARKERS)],
            color=colour, markerfacecolor=colour if chosen else "white", ms=6, capsize=2.5,
            label=f"{plain(name.replace('_', ' '))}, KL of its masks {part['mask_kl'].max():.3f}"
            + (" (chosen)" if chosen else ""),
        )  # fmt: skip
    axes.axhline(GOOD_RHO, color=GREY, ls="--", lw=1.2, label=f"good enough: {GOOD_RHO:g}")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_ylim(min(0.0, float(validation["ci_low"].min()) - 0.05), 1.02)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer")
    axes.set_ylabel("rank correlation (Spearman's rho)")
    cells = int(validation.loc[validation["layer"] == "all", "cells"].max())
    axes.set_title(
        f"Does the estimate rank tokens as switching them does? ({cells:,} single cells; bars: 95 %)\n"
        f"KL from the base model, nats per token, rule's share; random masks: {validation['random_kl'].max():.3f}",
        fontsize=10,
    )
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8.5, ncols=2, frameon=False, loc="outside lower center")
    return figure


def plot_correlations(correlations):
    """Partial rank correlation of each signal with sensitivity: all layers with interval (left), each layer (right).

    `correlations`: sensitivity_correlations.csv. Filled marks, and names with a bullet: signals of deployable gates.
    """
    every = correlations[correlations["layer"] == "all"].sort_values("partial_rho", kind="stable")
    if every.empty:
        raise NothingToDraw("no signal was correlated with sensitivity")
    signals = list(every["signal"])
    rest = correlations[correlations["layer"] != "all"]
    rest = rest.assign(layer=rest["layer"].astype(int))
    heat, p_holm = (
        rest.pivot(index="signal", columns="layer", values=column).reindex(signals)
        for column in ("partial_rho", "p_holm")
    )
    wide = max(2.2, 0.55 * heat.shape[1])
    figure, (left, right) = new_figure(
        7.5 + wide, 2.0 + 0.36 * len(signals), 1, 2, width_ratios=[4.5, wide + 0.8]
    )  # fmt: skip
    for place, (_, row) in enumerate(every.iterrows()):
        one = every[every["signal"] == row["signal"]]
        columns = ("partial_rho", "partial_ci_low", "partial_ci_high")
        _dots(left, one, [place], columns, GROUP_COLOURS[ROUTING], filled=bool(row["deployable"]))
        left.scatter(row["rho"], place, marker="|", s=90, color="#E69F00", zorder=1)
        if row["p_holm"] < SIGNIFICANT:
            left.annotate("*", (row["partial_ci_high"], place), (4, -4), textcoords="offset points", fontsize=11)
    left.axvline(0, color="black", lw=1)
    _fit(left, every, "partial_ci_low", "partial_ci_high")
    low, high = left.get_xlim()
    left.set_xlim(min(low, every["rho"].min() - 0.03), max(high, every["rho"].max() + 0.03))
    names = zip(signals, every["deployable"], strict=True)
    _name_rows(left, [plain(name.replace("_", " ")) + ("  •" if deployable else "") for name, deployable in names])
    left.set_xlabel("rank correlation with sensitivity (rho)")
    left.set_title("All layers (bars: 95 %, documents)", fontsize=10)
    reach = max(0.05, float(np.nanmax(np.abs(heat.to_numpy())))) if heat.size else 1
    if heat.size:
        stars = np.where(p_holm < SIGNIFICANT, "*", "")
        text = np.char.add([[f"{value:+.2f}" for value in row] for row in heat.to_numpy()], stars)
        sns.heatmap(
            heat, ax=right, cmap=SIGNED_MAP, vmin=-reach, vmax=reach, annot=text if heat.shape[1] <= 12 else stars,
            fmt="", annot_kws={"fontsize": 8}, cbar_kws={"label": "partial rho"}, yticklabels=False,
            xticklabels=sparse_labels(list(heat.columns), 24),
        )  # fmt: skip
        right.tick_params(axis="x", rotation=0)
    right.set_xlabel("layer")
    right.set_ylabel("")
    right.set_title("Layer by layer", fontsize=10)
    more = [
        _mark("o", True, "• deployable signal", GROUP_COLOURS[ROUTING]),
        _mark("o", False, "not known before the layer runs", GROUP_COLOURS[ROUTING]),
        Line2D([], [], marker="|", ls="", ms=9, color="#E69F00", label="before partialling"),
        Line2D([], [], marker="$*$", ls="", color="black", label="differs from 0 (Holm)"),
    ]
    figure.legend(handles=more, fontsize=8.5, ncols=4, frameon=False, loc="outside lower center")
    figure.suptitle(
        "Which signal tells what a token's attention is worth? Within documents, beyond position, frequency, surprisal",
        fontsize=10.5,
    )
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
    if not names:
        raise NothingToDraw(f"the document has {len(document['tokens'])} tokens; there is none from {start} on")
    values = _positive(document["sensitivity"])
    low, high = np.quantile(values, [0.02, 0.98])  # of the whole document, so that excerpts compare
    # 0 both paths agree on attention, 1 only routing chooses Mamba, 2 only the oracle, 3 both
    chosen = np.asarray(document["mamba"])[:, cut] + 2 * np.asarray(document["oracle"])[:, cut]
    colours = ["0.93", SERIES[1], SERIES[4], SERIES[0]]
    figure, panels = new_figure(max(8.5, 3.0 + 0.2 * len(names)), 3.0 + min(max(3.0, 0.6 * len(layers)), 10.0), 3, 1)
    shared = dict(xticklabels=False, yticklabels=sparse_labels(layers, 12))
    norm = LogNorm(low, max(high, 1.001 * low))
    settings = dict(cmap=SPARSITY_MAP, **shared)
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
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("layer")
        axes.tick_params(axis="y", rotation=0)
    panels[2].set_xticks(np.arange(len(names)) + 0.5, [plain(name, 12) or "∅" for name in names], rotation=90)
    panels[2].tick_params(axis="x", labelsize=8)
    panels[2].set_xlabel(f"token ({start} to {start + len(names) - 1} of {len(document['tokens'])})")
    labels = ("neither", "routing only", "oracle only", "both")
    handles = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    figure.legend(handles=handles, fontsize=8.5, ncols=4, frameon=False, loc="outside lower center")
    figure.suptitle(f"Where attention is worth most: {plain(document['document'], 70)}", fontsize=10.5)
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
    figure = hybrid.plot_token_text({"tokens": document["tokens"][:tokens], "per_token_sparsity": [values[:tokens]]})
    axes, scale = figure.axes
    for cell, marked in zip(list(axes.patches), mamba, strict=False):  # a rectangle for each token, in order
        if marked:
            x, y = cell.get_xy()
            axes.plot([x + 0.1, x + cell.get_width() - 0.1], [y + 0.88] * 2, color="#D55E00", lw=2.2)
    majority = "" if layer is not None else " in most layers"
    axes.set_title(f"Bright: attention is worth most ({where}). Underlined: routing sends it to Mamba{majority}",
                   fontsize=10.5)  # fmt: skip
    scale.set_xlabel("sensitivity (log10 of nats; outer 2 % drawn in)")
    return figure


def sensitivity_html(document, layer=None):
    """The same as an HTML string, all tokens; hovering a token shows its sensitivity."""
    values, mamba, where = _text_cells(document, layer)
    levels = (values - values.min()) / max(np.ptp(values), 1e-12)
    parts = []
    for token, value, level, marked in zip(document["tokens"], values, levels, mamba, strict=True):
        red, green, blue = (round(255 * part) for part in matplotlib.colormaps[SPARSITY_MAP](level)[:3])
        shown = html.escape(token.replace("\n", "↵")) + ("<br>" if "\n" in token else "")
        line = "border-bottom:3px solid #D55E00;" if marked else ""
        parts.append(
            f'<span title="sensitivity {10**value:.2g} nats{", to Mamba" if marked else ""}" '
            f'style="background:rgb({red},{green},{blue});color:{"white" if level < 0.5 else "black"};{line}'
            f'padding:1px 0;white-space:pre-wrap">{shown}</span>'
        )
    body = "".join(parts).replace("$", "&#36;<wbr>")  # or Jupyter's MathJax takes a pair for mathematics
    majority = "" if layer is not None else " in most layers"
    return (
        f'<div class="tex2jax_ignore" style="font-family:monospace;line-height:1.9">{body}'
        f'<div style="font-size:85%;margin-top:4px">sensitivity, {where}: dark {10 ** values.min():.2g} to bright '
        f"{10 ** values.max():.2g} nats. Underlined: routing sends it to Mamba{majority}, share 0.5.</div></div>"
    )


# -- probes
def plot_probe_gap(probe_gap):
    """How much of the way from random to oracle each gate goes, by share; how its score ranks sensitivity.

    `probe_gap`: probe_gap.csv.
    """
    if probe_gap.empty:
        raise NothingToDraw("no probe was trained")
    names, shares = list(dict.fromkeys(probe_gap["probe"])), sorted(set(probe_gap["share"]))
    figure, (left, right) = new_figure(11.5, 2.0 + 0.2 * len(names) * (len(shares) + 0.6), 1, 2, width_ratios=[1.6, 1])
    rows = probe_gap.assign(**{name: 100 * probe_gap[name] for name in ("gap_closed", "ci_low", "ci_high")})
    for number, share in enumerate(shares):
        part = rows[rows["share"] == share]
        places = np.array([names.index(name) for name in part["probe"]]) + _aside(number, len(shares))
        look = (SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)])
        _dots(left, part, places, ("gap_closed", "ci_low", "ci_high"), *look, label=f"share {share:g}")
        _dots(right, part, places, ("rho", "rho_low", "rho_high"), *look)
    left.axvline(100, color=GROUP_COLOURS[BOUND], ls="--", lw=1.2, label="oracle")
    left.axvline(0, color=GREY, ls="--", lw=1.2, label="random")
    right.axvline(0, color="black", lw=1)
    for axes in (left, right):
        _name_rows(axes, [plain(name.replace("_", " ")) for name in names], axes is left)
    _fit(left, rows.assign(oracle=100.0).melt(value_vars=["ci_low", "ci_high", "oracle"]), "value", "value")
    left.set_xlabel("of the gap from random to oracle closed (%)")
    left.set_title("Loss (bars: 95 %)", fontsize=10)
    right.set_xlabel("rank correlation with sensitivity (rho)")
    right.set_title("Ranking of tokens (bars: 95 %)", fontsize=10)
    _fit(right, rows, "rho_low", "rho_high")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8.5, ncols=6, frameon=False, loc="outside lower center")
    figure.suptitle("How much of what could be known is in the router, and in the layer's input?", fontsize=10.5)
    return figure


# -- recall
def plot_recall(recall, share=0.5):
    """Accuracy over length, a panel for each task, a line for each gate at `share` and for Mamba alone; dotted: chance.

    `recall`: recall_results.csv. Raises NothingToDraw where nothing was run at `share`.
    """
    rows = recall.copy()
    rows[["kind", "share"]] = [split_mode(mode) for mode in rows["mode"]]
    rows.loc[rows["mode"] == "fixed_1", ["kind", "share"]] = [MAMBA_ONLY, share]
    rows = rows[(rows["kind"] == "baseline") | (rows["share"] == share)]
    kinds = [kind for kind in dict.fromkeys(rows["kind"]) if kind != "baseline"]
    if not set(kinds) - {MAMBA_ONLY}:
        raise NothingToDraw(f"no gate was run at share {share:g}")
    tasks = list(dict.fromkeys(rows["task"]))
    columns = min(2, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure, panels = new_figure(2.0 + 4.8 * columns, 0.9 + 0.08 * len(kinds) + 3.1 * lines, lines, columns)
    panels = np.atleast_1d(panels).ravel()
    for axes in panels[len(tasks) :]:
        axes.remove()
    for task, axes in zip(tasks, panels, strict=False):
        part = rows[rows["task"] == task]
        for number, (kind, (colour, marker, line)) in enumerate(_looks(["baseline", *kinds]).items()):
            one = part[part["kind"] == kind].sort_values("length")
            axes.errorbar(
                one["length"] * 2 ** _aside(number, len(kinds) + 1, 0.35), 100 * one["accuracy"],
                yerr=100 * _reach(one, "accuracy", "ci_low", "ci_high"), color=colour, capsize=2.5, lw=1.4, ms=5.5,
                marker=marker, ls=line, label=_label(kind),
            )  # fmt: skip
        chance = part.groupby("length")["chance"].first()
        axes.plot(chance.index, 100 * chance, ":", color=GREY, lw=1.5, marker="_", label="chance")
        lengths = sorted(set(part["length"]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("length of the text (tokens; marks shifted sideways)")
        axes.set_ylabel("answers right (%)")
        axes.set_title(plain(task.replace("_", " ")), fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8.5, ncols=3, frameon=False, loc="outside lower center"
    )
    figure.suptitle(f"Recall from the text, {100 * share:g} % of tokens on Mamba (bars: 95 %)", fontsize=10.5)
    return figure


# -- ablations
def plot_training_ablations(ablations):
    """Cost of Mamba alone, attention won back, and routing minus random, by how the sidecars were made.

    `ablations`: of `read_ablations`. Raises NothingToDraw where no sidecars were trained for it.
    """
    names = ("init", "stages", "d_state", "tokens")
    title = "What the sidecars' initialisation, training and size change (each on a reduced budget; bars: 95 %)"
    return _plot_variants(ablations, names, TRAINING_COLUMNS, title)


def plot_gate_ablations(ablations):
    """Cost and difference to random by the gate's signal, softness and threshold, a mark for each share."""
    title = "What the gate's form changes (left is better; bars: 95 %)"
    return _plot_variants(ablations, ("signal", "softness", "threshold"), GATE_COLUMNS, title)


def _variant(name):
    return STAGES.get(name, plain(name.replace("_", " ")))


def _plot_variants(ablations, names, columns, title):
    """A panel per column, a row per variant under its ablation's name, and where there are shares a mark for each."""
    rows = ablations[ablations["ablation"].isin(names)]
    shown = [name for name in columns if name in rows and rows[name].notna().any()]
    if not shown:
        raise NothingToDraw(f"none of these was run: {', '.join(names)}")
    rows = rows.sort_values("ablation", key=lambda column: column.map(list(ABLATIONS).index), kind="stable")
    shares = rows["share"] if "share" in rows else pd.Series(math.nan, rows.index)
    kept = sorted(shares.dropna().unique()) or [math.nan]
    step = max(0.3, 0.16 * len(kept))  # inches of a row
    places, headings, place = {}, {}, -0.5
    for ablation, variant in rows[["ablation", "variant"]].drop_duplicates().itertuples(index=False):
        if ablation not in headings:
            headings[ablation] = place + 0.5
            place += 1.0
        places[ablation, variant] = place + 0.5
        place += 1.0
    figure, panels = new_figure(2.6 + 3.6 * len(shown), 1.6 + step * (place + 0.5), 1, len(shown))
    axes_of = dict(zip(shown, np.atleast_1d(panels), strict=True))
    for name, axes in axes_of.items():
        label, factor = columns[name]
        ends = ("ci_low", "ci_high") if name == "delta_nll" else (f"{name}_ci_low", f"{name}_ci_high")
        drawn = factor * pd.DataFrame(
            {
                "value": rows[name],
                **{i: rows.get(end, rows[name]) for i, end in zip(("low", "high"), ends, strict=True)},
            }
        )
        for number, share in enumerate(kept):
            inside = shares.isna() if math.isnan(share) else shares == share
            keys = rows.loc[inside, ["ablation", "variant"]].itertuples(index=False)
            aside = _aside(number, len(kept), 0.7)
            look = (SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)])
            text = "" if math.isnan(share) else f"share {share:g}"
            _dots(axes, drawn[inside], [places[tuple(key)] + aside for key in keys], ("value", "low", "high"), *look,
                  label=text)  # fmt: skip
        axes.axvline(0, color="black", lw=1)
        _fit(axes, drawn, "low", "high")
        axes.set_xlabel(label, fontsize=9)
        _name_rows(axes, [""] * len(places))
        axes.set_yticks(list(places.values()))
        axes.set_ylim(place, -0.6)
    first = axes_of[shown[0]]
    first.set_yticks(
        [*places.values(), *headings.values()],
        [*(_variant(variant) for _, variant in places), *(ABLATIONS[name] for name in headings)],
        fontsize=9,
    )
    for tick in first.get_yticklabels()[len(places) :]:
        tick.set_weight("bold")
    if len(kept) > 1:
        figure.legend(
            *first.get_legend_handles_labels(), fontsize=8.5, ncols=6, frameon=False, loc="outside lower center"
        )
    figure.suptitle(title, fontsize=10.5)
    return figure


def plot_distillation(curves):
    """Validation curves of the sidecars' training, a panel for each ablation and stage, a line for each variant.

    `curves`: distillation_curves.csv.
    """
    if curves.empty:
        raise NothingToDraw("no training was recorded")
    parts = list(curves.groupby(["ablation", "stage", "quantity"], sort=False))
    columns = min(3, len(parts))
    lines = math.ceil(len(parts) / columns)
    figure, panels = new_figure(1.0 + 4.3 * columns, 0.6 + 3.2 * lines, lines, columns)
    panels = np.atleast_1d(panels).ravel()
    for axes in panels[len(parts) :]:
        axes.remove()
    for ((ablation, stage, quantity), part), axes in zip(parts, panels, strict=False):
        label = CURVES.get(quantity, plain(str(quantity).replace("_", " ")))
        for number, (variant, one) in enumerate(part.groupby("variant", sort=False)):
            line = one.set_index("tokens")["value"]
            axes.plot(line.index / 1e6, line, color=SERIES[number % len(SERIES)], marker=MARKERS[number % len(MARKERS)],
                      ms=3.5, lw=1.4, label=_variant(variant))  # fmt: skip
        if (part["value"] > 0).all() and part["value"].max() > 5 * part["value"].min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            label += ", log"
        axes.set_xlabel("training tokens (millions)")
        axes.set_ylabel(label, fontsize=8.5)
        axes.set_title(
            f"{ABLATIONS.get(ablation, plain(str(ablation)))}, stage {plain(str(stage)).upper()}", fontsize=10
        )
        axes.legend(fontsize=8)
    figure.suptitle("How the sidecars learn (lower is better)", fontsize=10.5)
    return figure


# -- verdict
def verdict_in_full(answer, width=110):
    """verdict.json in full as wrapped lines `name: value`, lists of comparisons an entry a line."""
    lines = []

    def quote(name, value, indent):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            lines.append(f"{indent}{name}:")
            items = value.items() if isinstance(value, dict) else enumerate(value, 1)
            for key, inner in items:
                quote(key, inner, indent + "    ")
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            lines.append(
                textwrap.fill(f"{name}: {shown}", width, initial_indent=indent, subsequent_indent=indent + "  ")
            )

    for name, value in answer.items():
        quote(name, value, "")
    return "\n".join(lines)

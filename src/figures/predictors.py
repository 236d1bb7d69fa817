"""Figures and tables about predicting experts, and what a cache with such predictions would buy.

Each function takes what `style.read_result` returned and returns a Figure or a DataFrame, or raises NothingToDraw.
Colours go by what a predictor sees; markers and lines tell its kin apart. Figures of a cache say that they are theory.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from src.figures import style

BASELINE, HISTORY, HIDDEN = "baseline", "from the experts so far", "from hidden states"
FAMILY_COLOURS = {BASELINE: style.GREY, HISTORY: style.BLUE, HIDDEN: style.VERMILION}
# predictor -> (family, colour, marker, line)
STYLES = {
    "uniform": (BASELINE, style.BLACK, "", ":"),
    "majority": (BASELINE, style.GREY, "s", "--"),
    "previous_token": (BASELINE, style.GREY, "X", ":"),
    "transition": (BASELINE, style.GREY, "v", "-"),
    "lookup": (HISTORY, style.LIGHT_BLUE, "o", "-"),
    "xgboost": (HISTORY, style.GREEN, "D", "-"),
    "mlp": (HISTORY, style.BLUE, "^", "-"),
    "mlp_tuned": (HISTORY, style.BLUE, "P", "--"),
    "stale_gate": (HIDDEN, style.ORANGE, "o", "-"),
    "linear_probe": (HIDDEN, style.VERMILION, "s", "--"),
    "mlp_probe": (HIDDEN, style.VERMILION, "D", "-"),
}
# cache policy -> (label, colour, marker, line)
POLICIES = {
    "on_demand": ("on demand, no cache", style.BLACK, "", ":"),
    "lru": ("LRU", style.BLUE, "o", "-"),
    "lfu": ("LFU", style.LIGHT_BLUE, "s", "-"),
    "static": ("most frequent, fixed", style.GREEN, "D", "-"),
    "belady": ("Belady (best possible cache)", style.BLACK, "^", "--"),
}
# Lines of prefetching, one predictor of each family: no colour of a policy.
PREFETCH_COLOURS = {BASELINE: style.GREY, HISTORY: style.PINK, HIDDEN: style.VERMILION}
SCOPES = {"per_layer": "a cache for each layer", "shared": "one cache for all layers"}
# column of cache_curves.csv -> (axis label, factor)
CURVES = {
    "hit_rate": ("hits (% of requests)", 100),
    "mb_per_token": ("moved (MB per token)", 1),
    "stall_ms_per_token": ("stall (ms per token)", 1),
    "speedup": ("speed-up over on demand", 1),
}
TOP1 = ("top1", "top1_low", "top1_high")
THEORY = "Theory only: simulated from recorded routing, not timed on a device"


# -- parts
def _chosen(predictors, split, hop, domain):
    """(rows, hop) of one split, hop (default: the smallest) and domain."""
    rows = predictors[(predictors["split"] == split) & (predictors["domain"] == domain)]
    hop = (rows["hop"].min() if len(rows) else "any") if hop is None else hop
    rows = rows[rows["hop"] == hop]
    style.needs(len(rows), f"no predictions for split {split}, hop {hop}, domain {domain}")
    return rows, hop


def _ranked(rows, column="top1"):
    """Predictors of a table, best mean first; equals in the order of the file."""
    means = rows.groupby("predictor", sort=False)[column].mean()
    return list(means.sort_values(ascending=False, kind="stable").index)


def _bars(rows):
    """What error bars show, for a title; with one problem there are none."""
    return "bars: 95 %, over problems" if rows["top1_low"].notna().any() else "no intervals: too few problems"


def _lines(rows, width, title, x, label):
    """Top-1 accuracy over column `x`, a line for each predictor, best first; over hops with bars, which stand apart."""
    figure, axes = style.new_figure(width, 4.7)
    order = _ranked(rows)
    for number, name in enumerate(order):
        part = rows[rows["predictor"] == name].sort_values(x)
        _, colour, marker, line = STYLES[name]
        aside = 0.3 * (number / max(len(order) - 1, 1) - 0.5) if x == "hop" else 0.0
        axes.errorbar(
            part[x] + aside, 100 * part["top1"], yerr=_reach(part) if x == "hop" else None, fmt=line, color=colour,
            marker=marker or ".", ms=5, lw=1.4, elinewidth=1, capsize=2, label=style.words(name),
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    style.named(axes, label, "strongest expert predicted right (%)", title)
    style.whole_numbers(axes)
    style.legend_right(axes)
    return figure


def _reach(rows):
    """Error bars [2, n] of top-1 accuracy, in percent."""
    return 100 * style.reach(rows, *TOP1)


def _legend_of_families(figure, colours, more=()):
    """Legend below the figure: the families whose colours occur, then `more` handles."""
    families = [Patch(color=colour, label=name) for name, colour in FAMILY_COLOURS.items() if colour in colours]
    style.legend_below(figure, [*families, *more], 4)


# -- accuracy
def plot_comparison(predictors, split="problems", hop=None, domain="all"):
    """Bars of all predictors, best first: top-1 accuracy with interval, and top-2; slot overlap, and whole sets.

    `predictors`: predictors.csv. hop: default the smallest.
    """
    rows, hop = _chosen(predictors, split, hop, domain)
    rows = rows.set_index("predictor").loc[_ranked(rows)].reset_index()
    places = np.arange(len(rows))
    colours = [FAMILY_COLOURS[STYLES[name][0]] for name in rows["predictor"]]
    figure, (left, right) = style.new_figure(13.5, 1.9 + 0.36 * len(rows), 1, 2)
    parts = (
        (left, "top1", "top2", "strongest expert predicted right (% of cells)", f"Strongest expert ({_bars(rows)})"),
        (right, "slot_overlap", "whole_set", "share of the experts used that were predicted (%)", "Set of experts"),
    )
    for axes, bar, mark, label, title in parts:
        axes.barh(places, 100 * rows[bar], color=colours, height=0.7, zorder=2)
        axes.scatter(100 * rows[mark], places, marker="D", s=26, color="white", edgecolor="black", lw=1.1, zorder=4)
        for place, value in enumerate(rows[bar]):
            axes.text(101, place, style.number_text(100 * value), va="center", fontsize=8.5)
        style.name_rows(axes, [style.words(name) for name in rows["predictor"]])
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        style.named(axes, label, "predictor", title)
    if _reach(rows).any():
        look = dict(fmt="none", color="black", capsize=3, lw=1.3, zorder=5)
        left.errorbar(100 * rows["top1"], places, xerr=_reach(rows), **look)
    meaning = "right in two guesses (left), all experts right (right)"
    diamond = Line2D([], [], marker="D", ls="", color="white", markeredgecolor="black", ms=5, label=meaning)
    _legend_of_families(figure, colours, [diamond])
    title = f"{style.counted(hop)} ahead, split by {style.plain(split)}, domain {style.plain(domain)}"
    figure.suptitle(title, fontsize=10.5)
    return figure


def plot_domains(predictors, split="problems", hop=None):
    """Top-1 accuracy with interval by predictor, a marker for each data set. `predictors`: predictors.csv."""
    _, hop = _chosen(predictors, split, hop, "all")
    rows = predictors[(predictors["split"] == split) & (predictors["hop"] == hop)]
    names = [name for name in dict.fromkeys(rows["domain"]) if name != "all"]
    style.needs(len(names) > 1, "one data set only: there is nothing to compare")
    order = _ranked(rows[rows["domain"] == "all"])
    figure, axes = style.new_figure(8.5, 1.6 + 0.36 * len(order))
    percent = rows.assign(**{column: 100 * rows[column] for column in TOP1})
    for number, name in enumerate(names):
        part = percent[percent["domain"] == name].set_index("predictor").reindex(order)
        places = np.arange(len(order)) + style.aside(number, len(names), 0.5)
        style.dots(axes, part, places, TOP1, *style.series(number), label=style.plain(name))
    style.name_rows(axes, [style.words(name) for name in order])
    axes.set_xlim(left=0)
    label = f"strongest expert predicted right (% of cells; {_bars(rows)})"
    style.named(axes, label, "predictor", f"By data set, {style.counted(hop)} ahead")
    style.legend_right(axes)
    return figure


def plot_layers(per_layer, split="problems", hop=None, domain="all"):
    """Top-1 accuracy by target layer, a line for each predictor. `per_layer`: predictors_per_layer.csv."""
    rows, hop = _chosen(per_layer, split, hop, domain)
    width = min(max(8.5, 4.5 + 0.28 * rows["layer"].nunique()), 13.5)
    title = f"Accuracy by target layer, {style.counted(hop)} ahead (legend: best first)"
    return _lines(rows, width, title, "layer", "target layer")


def plot_hops(predictors, split="problems", domain="all"):
    """Top-1 accuracy with interval by layers ahead, a line for each predictor. `predictors`: predictors.csv."""
    rows = predictors[(predictors["split"] == split) & (predictors["domain"] == domain)]
    style.needs(rows["hop"].nunique() > 1, "one hop only was predicted: see --hops of scripts/journeys/03_predict.py")
    title = f"Accuracy by layers ahead ({_bars(rows)}; legend: best first)"
    return _lines(rows, 9.5, title, "hop", "layers ahead")


# -- cache
def _nearest(values, wanted):
    """The value whose ratio to `wanted` is nearest to 1; of two, the smaller one."""
    return min(sorted(set(values)), key=lambda value: abs(math.log(value / wanted)))


def _capacity_of(curves, wanted):
    """The cache size of the file nearest to that wanted; None asks for half of the largest."""
    held = curves.loc[(curves["policy"] == "lru") & (curves["capacity"] > 0), "capacity"]
    style.needs(len(held), "no cache sizes were simulated")
    return _nearest(held, wanted or held.max() / 2)


def _prefetchers(curves):
    """The predictors to draw: of each family that with the shortest mean time per token."""
    slowest_first = _ranked(curves[curves["policy"] == "prefetch"], "ms_per_token")
    best = {STYLES[name][0]: name for name in slowest_first}
    return [name for name in STYLES if name in best.values()]


def _plot_curves(curves, x, label, title):
    """A panel for each scope (rows) and each of CURVES: lines over `x` for each policy and some predictors."""
    lines = [(POLICIES[name], 2.4, curves[curves["policy"] == name]) for name in POLICIES]
    for name in _prefetchers(curves):
        family, _, marker, _ = STYLES[name]
        look = (f"LRU + prefetch by {style.words(name)}", PREFETCH_COLOURS[family], marker or ".", "-")
        lines.append((look, 1.2, curves[(curves["policy"] == "prefetch") & (curves["predictor"] == name)]))
    scopes = [scope for scope in SCOPES if (curves["scope"] == scope).any()]
    figure, panels = style.new_figure(16, 3.2 * len(scopes) + 1.2, len(scopes), len(CURVES))
    panels = np.reshape(panels, (len(scopes), len(CURVES)))
    for scope, row in zip(scopes, panels, strict=True):
        for (column, (name, factor)), axes in zip(CURVES.items(), row, strict=True):
            axes.set_ylabel(name)
            _scale(axes, column, curves.loc[curves["scope"] == scope, column], x)
            for (text, colour, marker, line), width, rows in lines:
                part = rows[rows["scope"] == scope].sort_values(x)
                look = dict(color=colour, ls=line, lw=width, label=text)
                if x == "capacity" and (part["capacity"] == 0).all():  # no cache: the same for every size
                    axes.axhline(factor * part[column].iloc[0], **look)
                else:  # prefetching often lies on LRU: thin on wide, hollow on filled
                    face = "white" if width < 2 else colour
                    axes.plot(part[x], factor * part[column], marker=marker, ms=5, markerfacecolor=face, **look)
            axes.set_xlabel(label)
            axes.set_title(SCOPES[scope], fontsize=9.5)
    style.legend_below(figure, panels[0, 0], 4)
    figure.suptitle(f"{THEORY}\n{title}", fontsize=10.5)
    return figure


def _scale(axes, column, values, x):
    """Limits of y, from 0; speed-ups and (over bandwidth) stalls are logarithmic where they span a factor of 10."""
    low, high = values.min(), values.max()
    if (column == "speedup" or (column, x) == ("stall_ms_per_token", "bandwidth_gb_s")) and high > 10 * low > 0:
        axes.set_ylabel(axes.get_ylabel() + style.logarithmic(axes))
    elif column == "hit_rate":
        axes.set_ylim(-3, 103)
    else:
        axes.set_ylim(0, 1.05 * high if high > 0 else 1)


def plot_cache_sizes(curves, bandwidth_gb_s=25.0):
    """Hits, bytes, stall and speed-up over experts held per layer, at the simulated bandwidth nearest to that given.

    `curves`: cache_curves.csv; all policies, and prefetching by the best predictor of each kind.
    """
    style.needs((curves["capacity"] > 0).any(), "no cache sizes were simulated")
    bandwidth = _nearest(curves["bandwidth_gb_s"], bandwidth_gb_s)
    rows = curves[curves["bandwidth_gb_s"] == bandwidth]
    title = f"Over the size of the cache, at {bandwidth:g} GB/s, {int(rows['tokens'].iloc[0]):,} tokens"
    figure = _plot_curves(rows, "capacity", "experts held per layer (on average)", title)
    for axes in figure.axes:
        style.whole_numbers(axes)
    return figure


def plot_bandwidths(curves, capacity=None):
    """Hits, bytes, stall and speed-up over bandwidth, at the simulated cache size nearest to that given.

    `curves`: cache_curves.csv; capacity: experts held per layer, default half of the largest.
    """
    capacity = _capacity_of(curves, capacity)
    style.needs(curves["bandwidth_gb_s"].nunique() > 1, "one bandwidth only was simulated")
    rows = curves[(curves["capacity"] == capacity) | (curves["policy"] == "on_demand")]
    rows = rows[np.isfinite(rows["bandwidth_gb_s"])]
    title = f"Over the bandwidth of the link, {capacity} experts held per layer, {int(rows['tokens'].iloc[0]):,} tokens"
    figure = _plot_curves(rows, "bandwidth_gb_s", "bandwidth (GB/s, logarithmic)", title)
    ticks = sorted(set(rows["bandwidth_gb_s"]))
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks], fontsize=8.5)
        axes.xaxis.set_minor_locator(NullLocator())
    return figure


def plot_prefetch(curves, capacity=None, bandwidth_gb_s=25.0, scope="per_layer"):
    """What prefetching with each predictor saves in stall, and moves in excess, against LRU alone.

    `curves`: cache_curves.csv; at the simulated cache size and bandwidth nearest to those given.
    """
    capacity, bandwidth = _capacity_of(curves, capacity), _nearest(curves["bandwidth_gb_s"], bandwidth_gb_s)
    rows = curves.query("scope == @scope and bandwidth_gb_s == @bandwidth and capacity == @capacity")
    ahead = rows[rows["policy"] == "prefetch"].sort_values("stall_ms_per_token", kind="stable")
    style.needs(len(ahead), "no predictor was used to prefetch")
    alone = rows[rows["policy"] == "lru"].iloc[0]
    places = np.arange(len(ahead))
    colours = [FAMILY_COLOURS[STYLES[name][0]] for name in ahead["predictor"]]
    figure, panels = style.new_figure(12.5, 2.2 + 0.34 * len(ahead), 1, 2)
    stall, moved = alone["stall_ms_per_token"], alone["mb_per_token"]
    parts = (
        (stall - ahead["stall_ms_per_token"], f"stall saved (ms per token; LRU alone: {stall:,.3g})"),
        (ahead["mb_per_token"] - moved, f"moved in excess (MB per token; LRU alone: {moved:,.0f})"),
    )
    for axes, (values, label) in zip(panels, parts, strict=True):
        axes.barh(places, values, color=colours, height=0.7)
        for place, value in enumerate(values):
            axes.text(max(value, 0), place, f" {value:,.3g}", va="center", fontsize=8.5)
        style.name_rows(axes, [style.words(name) for name in ahead["predictor"]])
        axes.set_xlim(0, 1.18 * max(values.max(), 1e-9))
        style.named(axes, label, "predictor")
    _legend_of_families(figure, colours)
    title = f"Prefetching over LRU: {SCOPES[scope]}, {capacity} experts held per layer, {bandwidth:g} GB/s"
    figure.suptitle(f"{THEORY}\n{title}", fontsize=10.5)
    return figure


# -- tables
def comparison_table(predictors, split="problems", hop=None, domain="all"):
    """predictors.csv for display at one hop (default: the smallest), best first."""
    rows, hop = _chosen(predictors, split, hop, domain)
    rows = rows.set_index("predictor").loc[_ranked(rows)]
    random = rows["top1"].get("uniform") or math.nan
    return pd.DataFrame(
        {
            "top-1 (%)": style.number_texts(100 * rows["top1"]),
            "95 % interval": style.interval_texts(100 * rows["top1_low"], 100 * rows["top1_high"]),
            "times random": style.number_texts(rows["top1"] / random, "{:.2f}"),
            "top-2 (%)": style.number_texts(100 * rows["top2"]),
            "experts found (%)": style.number_texts(100 * rows["slot_overlap"]),
            "whole set (%)": style.number_texts(100 * rows["whole_set"]),
            "calibration error": style.number_texts(rows["ece"], "{:.3f}"),
            "training (s)": style.number_texts(rows["train_seconds"]),
            "prediction (µs)": style.number_texts(rows["predict_us"]),
            "parameters": style.number_texts(rows["parameters"], "{:,.0f}"),
        },
        index=pd.Index([style.words(name) for name in rows.index], name=f"{style.counted(hop)} ahead"),
    )


def leakage_table(leakage):
    """leakage.csv for display."""
    style.needs(len(leakage), "no predictor was scored under both splits")
    return pd.DataFrame(
        {
            "layers ahead": leakage["hop"].to_numpy(),
            "test rows": [f"{rows:,}" for rows in leakage["rows"]],
            "split by row (%)": style.number_texts(100 * leakage["top1_rows_split"]),
            "split by problem (%)": style.number_texts(100 * leakage["top1_problem_split"]),
            "leakage (points)": style.number_texts(100 * leakage["leakage"], "{:+.1f}"),
            "95 % interval": style.interval_texts(100 * leakage["ci_low"], 100 * leakage["ci_high"], "{:+.1f}"),
        },
        index=pd.Index([style.words(name) for name in leakage["predictor"]], name="predictor"),
    )

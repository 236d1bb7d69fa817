"""Figures of paths, tokens, positions and domains of the journey study; no torch.

Each `plot_*` function takes what `style.read_result` returned, draws one matplotlib Figure and returns it. Where a file
is complete but has nothing for a figure, `style.NothingToDraw` says why.
"""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from src.figures.panels import (
    MARKERS,
    SERIES,
    SIGNED_MAP,
    counted,
    expert_grid,
    expert_height,
    heatmap,
    layer_width,
    line_colours,
    log_if_wide,
    needs_tokens,
    number_text,
    pairs_of,
    quoted,
    short_path,
    whole_numbers,
)
from src.figures.style import NothingToDraw, new_figure, plain


def plot_hop_accuracy(hops):
    """Accuracy of naming the expert 1 .. L-1 layers ahead: in-sample, on held-out problems, and without looking.

    `hops`: hop_accuracy.csv. Bars: interval over problems. With one problem there is no held-out line. Raises
    NothingToDraw for one layer.
    """
    if not len(hops):
        raise NothingToDraw("one layer only: there is no layer ahead")
    figure, axes = new_figure(10, 4.8)
    axes.plot(hops["hop"], hops["accuracy"], "-o", color=SERIES[1], ms=4.5, label="in-sample (as the reference)")
    if hops["held_out_accuracy"].notna().any():
        centre = hops["held_out_accuracy"]
        reach = [np.maximum(centre - hops["ci_low"], 0), np.maximum(hops["ci_high"] - centre, 0)]
        axes.errorbar(
            hops["hop"], centre, yerr=np.nan_to_num(reach), color=SERIES[0], marker="s", ms=4.5, capsize=2.5,
            label="held-out problems (bars: 95 %, problems)",
        )  # fmt: skip
        axes.plot(
            hops["hop"], hops["held_out_majority"], "--", color=SERIES[2], marker="D", ms=3,
            label="most common expert, held-out problems",
        )  # fmt: skip
    axes.plot(hops["hop"], hops["majority"], ":", color=SERIES[3], marker="^", ms=3.5, label="most common, in-sample")
    axes.plot(hops["hop"], hops["random"], "-", color="black", lw=1.2, label="random expert")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layers ahead")
    axes.set_ylabel("right predictions (%)")
    axes.set_title("The most frequent transition as prediction of the strongest expert", fontsize=10)
    whole_numbers(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("held-out"))  # of lines, bars come last
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], fontsize=8.5, loc="upper left",
        bbox_to_anchor=(1.0, 1.0), frameon=False,
    )  # fmt: skip
    return figure


# -- paths
def plot_paths(paths):
    """How many different paths tokens take: by first layer (left), and mean and range by length (right). paths.csv."""
    lengths = sorted(paths["length"].unique())
    tokens = int(paths["tokens"].iloc[0])
    figure, (left, right) = new_figure(11.5, 4.2, 1, 2, width_ratios=[1.5, 1])
    for length, colour, marker in zip(lengths, line_colours(len(lengths)), MARKERS * len(lengths), strict=False):
        rows = paths[paths["length"] == length].sort_values("start_layer")
        left.plot(
            rows["start_layer"], 100 * rows["uniqueness_ratio"], "-", color=colour, marker=marker, ms=5,
            label=counted(length),
        )  # fmt: skip
        unique = rows["unique_paths"]
        reach = [[unique.mean() - unique.min()], [unique.max() - unique.mean()]]
        place = lengths.index(length)
        right.bar(place, unique.mean(), color=colour, width=0.65)
        if len(unique) > 1:
            right.errorbar(place, unique.mean(), yerr=reach, color="black", capsize=4, lw=1.2)
    note = log_if_wide(left, 100 * paths["uniqueness_ratio"])
    if not note:
        left.set_ylim(0, 104)
    left.set_xlabel("first layer of the path")
    left.set_ylabel(f"different paths (% of the tokens){note}")
    left.set_title("How unique paths of some layers are (100 %: no two tokens alike)", fontsize=10)
    left.legend(fontsize=8.5, title="length", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    whole_numbers(left)
    note = log_if_wide(right, [*paths["unique_paths"], tokens])
    right.axhline(tokens, color="black", ls="--", lw=1.2, label=f"{tokens:,} tokens")
    right.set_ylim(top=(3 if note else 1.2) * tokens)  # room for the legend
    right.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    right.set_xlabel("length of the path (layers)")
    right.set_ylabel(f"different paths{note}")
    right.set_title("Mean and range over first layers", fontsize=10)
    right.legend(fontsize=8.5, loc="upper left")
    right.grid(axis="x", visible=False)
    return figure


def plot_top_paths(top_paths):
    """The most common paths of each length, as bars of the share of tokens. `top_paths`: top_paths.csv."""
    lengths = sorted(top_paths["length"].unique())
    columns = min(2, len(lengths))
    rows = math.ceil(len(lengths) / columns)
    most = int(top_paths["rank"].max())
    figure, axes = new_figure(6.2 * columns, rows * (1.0 + 0.27 * most), rows, columns)
    panels = np.ravel(axes)
    for panel, length in zip(panels, lengths, strict=False):
        table = top_paths[top_paths["length"] == length]
        panel.barh(range(len(table)), table["percent"], color=SERIES[0], height=0.7)
        labels = [
            short_path(path) if length == lengths[-1] else f"from layer {start}: {short_path(path)}"
            for path, start in zip(table["path"], table["start_layer"], strict=True)
        ]
        panel.set_yticks(range(len(table)), labels, fontsize=8.5)
        for row, count in enumerate(table["count"]):
            panel.text(table["percent"].iloc[row], row, f" {count:,}", va="center", fontsize=8)
        panel.set_xlim(0, 1.18 * table["percent"].max())
        panel.set_ylim(most - 0.4, -0.6)
        panel.set_xlabel("share of tokens (%); number: tokens")
        panel.set_ylabel("strongest experts, layer by layer")
        whole = ", the whole journey" if length == lengths[-1] else ""
        panel.set_title(f"{counted(length)}{whole}", fontsize=10)
        panel.grid(axis="y", visible=False)
    for panel in panels[len(lengths) :]:
        panel.set_axis_off()
    return figure


# -- tokens and positions
def plot_consecutive_tokens(consecutive):
    """How often neighbouring tokens share experts, by layer, against two independent tokens. consecutive_tokens.csv.

    Raises NothingToDraw where no two tokens of a problem are neighbours.
    """
    if not consecutive["pairs"].sum():
        raise NothingToDraw("no two tokens of a problem stand next to each other")
    figure, panels = new_figure(12, 4.0, 1, 2)
    parts = (
        ("agreement", "pairs with the same strongest expert (%)", "Same strongest expert"),
        ("overlap", "experts in common (% of those chosen)", "Experts in common"),
    )
    for axes, (column, label, title) in zip(panels, parts, strict=True):
        axes.plot(
            consecutive["layer"], 100 * consecutive[column], "-o", color=SERIES[0], ms=4.5, label="neighbouring tokens"
        )
        axes.plot(
            consecutive["layer"], 100 * consecutive[f"{column}_chance"], "--s", color=SERIES[1], ms=3.5,
            label="two independent tokens",
        )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_title(f"{title}, {int(consecutive['pairs'].max()):,} pairs", fontsize=10)
        whole_numbers(axes)
    panels[0].legend(fontsize=8.5)
    return figure


def plot_positions(positions, by_layer):
    """First against later positions: difference of routing by layer, confidence, different experts.

    `positions`, `by_layer`: positions.csv and positions_by_layer.csv. The distance of a bucket is that of its use of
    experts from all other positions'; few tokens make it large by themselves.
    """
    names = list(positions["positions"])
    grid = by_layer.pivot(index="positions", columns="layer", values="js_distance").loc[names]
    labels = [f"{name} ({count:,})" for name, count in zip(names, positions["tokens"], strict=True)]
    layers = list(grid.columns)
    figure, (left, middle, right) = new_figure(
        layer_width(len(layers), 6.5) + 6, 1.9 + 0.42 * len(names), 1, 3,
        width_ratios=[layer_width(len(layers), 6.5), 3, 3],
    )  # fmt: skip
    known = np.nan_to_num(grid.to_numpy(float))
    numbers = ".2f" if len(layers) <= 10 else None
    limits = (0.0, max(float(known.max()), 1e-3))
    heatmap(left, grid, "Jensen-Shannon distance", labels, layers, limits=limits, numbers=numbers)
    left.set_xlabel("layer")
    left.set_ylabel("positions (tokens)")
    left.set_title("Use of experts against all other positions", fontsize=10)
    for axes, column, colour, label in (
        (middle, "mean_confidence", SERIES[0], "mean probability of the strongest"),
        (right, "unique_experts", SERIES[1], "different experts per token"),
    ):
        values = positions[column].to_numpy(float)
        # from 0, and centred in the rows of the heat map
        axes.barh(np.arange(len(names)) + 0.5, np.nan_to_num(values), color=colour, height=0.7)
        for row, value in enumerate(values):
            axes.text(np.nan_to_num(value), row + 0.5, f" {number_text(value, '{:.2f}')}", va="center", fontsize=8.5)
        axes.set_ylim(len(names), 0)
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8.5)
        axes.set_xlim(0, 1.25 * max(np.nanmax([*values, 0]), 1e-3))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label)
        axes.set_ylabel("positions")
        axes.grid(axis="y", visible=False)
    return figure


def plot_token_identity(identity):
    """How often two occurrences of the same token share the strongest expert, against any two tokens, by layer.

    `identity`: token_identity.csv. Raises NothingToDraw for records without tokens.
    """
    needs_tokens(identity)
    figure, axes = new_figure(9, 4.0)
    axes.plot(identity["layer"], 100 * identity["same_token"], "-o", color=SERIES[0], ms=4.5, label="the same token")
    axes.plot(identity["layer"], 100 * identity["any_tokens"], "--s", color=SERIES[1], ms=3.5, label="any two tokens")
    axes.set_ylim(0, 100)
    axes.set_xlabel("layer")
    axes.set_ylabel("pairs with the same strongest expert (%)")
    axes.set_title("How much of the routing is the token itself", fontsize=10)
    whole_numbers(axes)
    axes.legend(fontsize=8.5)
    return figure


def token_pairs(routing):
    """Pairs of different frequent tokens by how often their occurrences agree (mean over layers), the most alike first.

    `routing`: token_routing.csv. -> DataFrame token, other, agreement; each pair once.
    """
    rows = routing[routing["nearest_agreement"].notna()].sort_values(
        "nearest_agreement", ascending=False, kind="stable"
    )
    pairs = {}
    for row in rows.itertuples():
        pairs.setdefault(frozenset((row.token, row.nearest)), (row.token, row.nearest, row.nearest_agreement))
    return pd.DataFrame(list(pairs.values()), columns=["token", "other", "agreement"])


def plot_token_routing(routing, count=12):
    """Frequent tokens: those routed most and least alike from time to time, and pairs that share routing.

    `routing`: token_routing.csv. Raises NothingToDraw for records without tokens, or in which no token comes twice.
    """
    needs_tokens(routing)
    known = routing[routing["agreement"].notna()].sort_values("agreement", ascending=False, kind="stable")
    if known.empty:
        raise NothingToDraw("no token occurs twice")
    half = math.ceil(len(known) / 2)
    pairs = token_pairs(routing).head(count)
    panels = (
        ("Routed most alike", known.head(min(count, half)), SERIES[0]),
        ("Routed least alike", known.iloc[::-1].head(min(count, len(known) - half)), SERIES[1]),
    )
    figure, axes = new_figure(14.5, 1.5 + 0.28 * count, 1, 3)
    for panel, (title, table, colour) in zip(axes[:2], panels, strict=True):
        labels = [f"{quoted(token)} ×{n:,}" for token, n in zip(table["token"], table["count"], strict=True)]
        _bars(panel, 100 * table["agreement"].to_numpy(float), labels, colour, count)
        panel.set_xlabel("pairs of its occurrences that agree (%)")
        panel.set_ylabel("token and its occurrences")
        panel.set_title(f"{title}, of {len(routing)} frequent tokens", fontsize=10)
    labels = [f"{quoted(row.token, 12)} ~ {quoted(row.other, 12)}" for row in pairs.itertuples()]
    _bars(axes[2], 100 * pairs["agreement"].to_numpy(float), labels, SERIES[2], count)
    axes[2].set_ylabel("two tokens")
    axes[2].set_xlabel("pairs of their occurrences that agree (%)")
    axes[2].set_title("Different tokens that share routing", fontsize=10)
    return figure


def _bars(axes, values, labels, colour, places):
    """Horizontal bars of percentages from the top, in a panel with room for `places` of them."""
    axes.barh(range(len(values)), values, color=colour, height=0.7)
    for row, value in enumerate(values):
        axes.text(value + 1, row, f"{value:.0f}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.set_ylim(places - 0.4, -0.6)
    axes.set_xlim(0, 110)
    axes.grid(axis="y", visible=False)


# -- domains
def plot_domain_distribution(distribution):
    """Heat map expert x layer of the strongest experts' share of tokens, a panel for each data set, one scale.

    `distribution`: domain_distribution.csv."""
    names = list(dict.fromkeys(distribution["domain"]))
    grids = [expert_grid(distribution[distribution["domain"] == name], "percent") for name in names]
    _, experts, layers = grids[0]
    height = expert_height(len(experts))
    figure, axes = new_figure(layer_width(len(layers)), len(names) * (height + 0.9) + 0.2, len(names), 1)
    limits = (0.0, max(float(np.nanmax(values)) for values, *_ in grids))
    numbers = ".0f" if len(layers) <= 10 and len(experts) <= 16 else None
    for panel, name, (values, *_) in zip(np.atleast_1d(axes), names, grids, strict=True):
        heatmap(panel, values, "share of tokens (%)", experts, layers, limits=limits, numbers=numbers)
        tokens = int(distribution.loc[distribution["domain"] == name, "count"].sum()) // len(layers)
        panel.set_title(f"{plain(name)} ({tokens:,} tokens)", fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylabel("expert")
    return figure


def plot_domain_difference(difference):
    """Heat map expert x layer of one domain's usage minus another's; dots: experts that 09 calls domain-specific.

    `difference`: domain_difference.csv; a panel for each pair. Raises NothingToDraw for one data set."""
    pairs = pairs_of(difference)
    _, experts, layers = expert_grid(pairs[0][2], "difference")
    bound = float(np.nanmax(np.abs(difference["difference"]), initial=1e-9))
    height = expert_height(len(experts))
    figure, axes = new_figure(layer_width(len(layers), 8.5), len(pairs) * (height + 1.1) + 0.2, len(pairs), 1)
    numbers = "+.0f" if len(layers) <= 10 and len(experts) <= 16 else None
    for panel, (first, second, rows) in zip(np.atleast_1d(axes), pairs, strict=True):
        label = "percentage points"
        heatmap(
            panel, expert_grid(rows, "difference")[0], label, experts, layers, cmap=SIGNED_MAP, limits=(-bound, bound),
            numbers=numbers,
        )  # fmt: skip
        marked = rows[rows["prefers"] != ""]
        x = [layers.index(layer) + (0.85 if numbers else 0.5) for layer in marked["layer"]]
        y = [experts.index(expert) + (0.2 if numbers else 0.5) for expert in marked["expert"]]
        panel.scatter(x, y, s=18 if numbers else 9, color="black", edgecolor="white", lw=0.5, zorder=3)
        panel.set_title(
            f"Usage in {plain(first)} minus usage in {plain(second)}: purple, more in {plain(first)}; brown, more in "
            f"{plain(second)}\n(dots: {len(marked)} of {len(rows)} experts are specific to one, by 09's threshold)",
            fontsize=10,
        )
        panel.set_xlabel("layer")
        panel.set_ylabel("expert")
    return figure


def plot_domain_distance(distance):
    """Jensen-Shannon distance of two domains' use of experts by layer, and its permutation p-values.

    `distance`: domain_distance.csv. Filled markers: p < 0.05 corrected for all layers. Raises NothingToDraw for one
    data set."""
    pairs = pairs_of(distance)
    figure, (left, right) = new_figure(13, 4.1 + 0.35 * len(pairs), 1, 2)
    for (first, second, rows), colour, marker in zip(
        pairs, line_colours(len(pairs)), MARKERS * len(pairs), strict=False
    ):  # fmt: skip
        name = f"{plain(first)} / {plain(second)}"
        count = f"{rows['problems_a'].iloc[0]} + {rows['problems_b'].iloc[0]} problems"
        left.plot(rows["layer"], rows["js_distance"], "-", color=colour, lw=1.2)
        differs = (rows["p_any_layer"] < 0.05).to_numpy()
        face = np.where(differs, matplotlib.colors.to_hex(colour), "white")
        left.scatter(
            rows["layer"], rows["js_distance"], s=34, c=face, edgecolor=colour, marker=marker, zorder=3,
            label=f"{name} ({count})",
        )  # fmt: skip
        right.plot(
            rows["layer"], rows["p_value"], "-", color=colour, marker=marker, ms=4.5, label=f"{name}, layer by itself"
        )
        right.plot(
            rows["layer"], rows["p_any_layer"], "--", color=colour, marker=marker, ms=4.5, markerfacecolor="white",
            label=f"{name}, corrected for all layers",
        )  # fmt: skip
    left.set_ylim(bottom=0)
    left.set_ylabel("Jensen-Shannon distance")
    left.set_title("Use of experts, 0 = same, 1 = disjoint (filled: p < 0.05, corrected)", fontsize=10)
    right.axhline(0.05, color="black", lw=1)
    right.set_yscale("log")
    right.set_ylim(top=1.4)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.set_ylabel("p-value (logarithmic; line: 0.05)")
    right.set_title("Permutation of problems between the data sets", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("layer")
        whole_numbers(axes)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return figure

"""Figures and tables of paths, tokens, positions and domains: what routing depends on, and what it foretells.

Each `plot_*` function takes what `panels.read_result` returned, draws one matplotlib Figure and returns it; `*_table`
functions return a DataFrame for display. Where a file is complete but has nothing for a figure (one layer, one data
set, no token texts), `NothingToDraw` says why. "The expert" of a layer is its strongest one.
"""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from src.figures.panels import (
    colours_for,
    counted,
    expert_grid,
    expert_panels,
    heatmap,
    interval_texts,
    layer_width,
    legend_right,
    named,
    number_text,
    percent_texts,
    whole_numbers,
)
from src.figures.style import BLACK, MARKERS, SERIES, SIGNIFICANT, NothingToDraw, new_figure, plain, reach


def _log_if_wide(axes, values):
    """Make y logarithmic where positive values span more than a factor of 20; returns the note for its label."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values) or values.max() <= 20 * values.min():
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return " (logarithmic)"


def _short_path(path, most=10):
    """ "6>5>0" as "6·5·0"; of a long path the first and the last experts."""
    experts = path.split(">")
    if len(experts) > most:
        experts = [*experts[:6], "…", *experts[-3:]]
    return "·".join(experts)


def plot_hop_accuracy(hops):
    """Accuracy of naming the expert 1 .. L-1 layers ahead: in-sample, on held-out problems, and without looking.

    `hops`: hop_accuracy.csv. Bars: interval over problems. With one problem there is no held-out line. Raises
    NothingToDraw for one layer.
    """
    if not len(hops):
        raise NothingToDraw("one layer only: there is no layer ahead")
    figure, axes = new_figure(10, 4.8)
    if hops["held_out_accuracy"].notna().any():
        axes.errorbar(
            hops["hop"], hops["held_out_accuracy"], yerr=reach(hops, "held_out_accuracy", "ci_low", "ci_high"),
            color=SERIES[0], marker="s", ms=4.5, capsize=2.5, label="held-out problems (bars: 95 %, problems)",
        )  # fmt: skip
    for column, form, colour, label in (
        ("accuracy", "-o", SERIES[1], "in-sample (as the reference)"),
        ("held_out_majority", "--D", SERIES[2], "most common expert, held-out problems"),
        ("majority", ":^", SERIES[3], "most common, in-sample"),
        ("random", "-", BLACK, "random expert"),
    ):
        if hops[column].notna().any():
            axes.plot(hops["hop"], hops[column], form, color=colour, ms=4, label=label)
    axes.set_ylim(bottom=0)
    title = "The most frequent transition as prediction of the strongest expert"
    named(axes, "layers ahead", "right predictions (%)", title)
    whole_numbers(axes)
    legend_right(axes)
    return figure


# -- paths
def plot_paths(paths):
    """How many different paths tokens take, by first layer: a line for each length of the path. paths.csv."""
    lengths = sorted(paths["length"].unique())
    figure, axes = new_figure(9, 4.2)
    for length, colour, marker in zip(lengths, colours_for(len(lengths)), MARKERS * len(lengths), strict=False):
        rows = paths[paths["length"] == length].sort_values("start_layer")
        share = 100 * rows["uniqueness_ratio"]
        axes.plot(rows["start_layer"], share, "-", color=colour, marker=marker, ms=5, label=counted(length))
    note = _log_if_wide(axes, 100 * paths["uniqueness_ratio"])
    if not note:
        axes.set_ylim(0, 104)
    title = f"How unique paths of some layers are (100 %: no two of {int(paths['tokens'].iloc[0]):,} tokens alike)"
    named(axes, "first layer of the path", f"different paths (% of the tokens){note}", title)
    legend_right(axes, title="length")
    whole_numbers(axes)
    return figure


def path_table(top_paths, most=10):
    """The most common paths of every length for display, at most `most` of each. `top_paths`: top_paths.csv."""
    table = top_paths[top_paths["rank"] <= most]
    return pd.DataFrame(
        {
            "layers": table["length"].to_numpy(),
            "first layer": table["start_layer"].to_numpy(),
            "path": [_short_path(path, 14) for path in table["path"]],
            "tokens": table["count"].to_numpy(),
            "share (%)": [f"{value:.2f}" for value in table["percent"]],
            "token texts": table["token_texts"].to_numpy(),
        },
        index=pd.Index(table["rank"], name="rank"),
    )


# -- tokens and positions
def _against_chance(axes, table, column, chance, labels):
    """Two columns of shares by layer, in percent: what was found, and what chance alone gives."""
    axes.plot(table["layer"], 100 * table[column], "-o", color=SERIES[0], ms=4.5, label=labels[0])
    axes.plot(table["layer"], 100 * table[chance], "--s", color=SERIES[1], ms=3.5, label=labels[1])
    whole_numbers(axes)


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
        _against_chance(
            axes, consecutive, column, f"{column}_chance", ("neighbouring tokens", "two independent tokens")
        )
        axes.set_ylim(bottom=0)
        named(axes, "layer", label, f"{title}, {int(consecutive['pairs'].max()):,} pairs")
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
    named(left, "layer", "positions (tokens)", "Use of experts against all other positions")
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
        named(axes, label, "positions")
        axes.grid(axis="y", visible=False)
    return figure


def _needs_tokens(table):
    if table.empty:
        raise NothingToDraw("the records name no tokens")


def plot_token_identity(identity):
    """How often two occurrences of the same token share the strongest expert, against any two tokens, by layer.

    `identity`: token_identity.csv. Raises NothingToDraw for records without tokens.
    """
    _needs_tokens(identity)
    figure, axes = new_figure(9, 4.0)
    _against_chance(axes, identity, "same_token", "any_tokens", ("the same token", "any two tokens"))
    axes.set_ylim(0, 100)
    named(axes, "layer", "pairs with the same strongest expert (%)", "How much of the routing is the token itself")
    axes.legend(fontsize=8.5)
    return figure


def token_table(routing, order="count", most=20):
    """Frequent tokens for display: how alike their occurrences are routed, their paths, the nearest token.

    Args:
        routing: token_routing.csv.
        order: the column by which tokens are sorted, the largest first: `count`; `agreement`, those whose occurrences
            are routed most alike; `nearest_agreement`, those that share routing with another token.
        most: how many tokens are listed.

    Raises:
        NothingToDraw: the records have no tokens.
    """
    _needs_tokens(routing)
    table = routing.sort_values(order, ascending=False, kind="stable").head(most)
    return pd.DataFrame(
        {
            "token": [repr(token) for token in table["token"]],
            "occurrences": table["count"].to_numpy(),
            "agreement (%)": percent_texts(table["agreement"]),
            "different paths": table["paths"].to_numpy(),
            "on the commonest (%)": [number_text(value) for value in table["common_path_percent"]],
            "nearest token": [repr(token) for token in table["nearest"]],
            "agreement with it (%)": percent_texts(table["nearest_agreement"]),
        }
    )


# -- domains
def _pairs_of(table):
    """[(domain a, domain b, its rows)] of a table over pairs of domains. Raises NothingToDraw where there is none."""
    if table.empty:
        raise NothingToDraw("one data set only: there is nothing to compare")
    return [(a, b, rows) for (a, b), rows in table.groupby(["domain_a", "domain_b"], sort=False)]


def plot_domain_difference(difference):
    """Heat map expert x layer of one domain's usage minus another's; dots: experts that are specific to one of them.

    `difference`: domain_difference.csv; a panel for each pair. Raises NothingToDraw for one data set."""
    pairs = _pairs_of(difference)
    bound = float(np.nanmax(np.abs(difference["difference"]), initial=1e-9))
    grids = []
    for first, second, rows in pairs:
        first, second = plain(first), plain(second)
        specific = int((rows["prefers"] != "").sum())
        title = (
            f"Usage in {first} minus usage in {second}: purple, more in {first}; brown, more in {second}\n"
            f"(dots: {specific} of {len(rows)} experts are specific to one)"
        )
        grids.append((*expert_grid(rows, "difference"), title, "percentage points", (-bound, bound)))
    figure, panels, few = expert_panels(grids, "+.0f", least=8.5)
    _, experts, layers, *_ = grids[0]
    for panel, (_, _, rows) in zip(panels, pairs, strict=True):
        marked = rows[rows["prefers"] != ""]
        # where cells hold numbers, dots are in their corners
        x = [layers.index(layer) + (0.85 if few else 0.5) for layer in marked["layer"]]
        y = [experts.index(expert) + (0.2 if few else 0.5) for expert in marked["expert"]]
        panel.scatter(x, y, s=18 if few else 9, color="black", edgecolor="white", lw=0.5, zorder=3)
    return figure


def plot_domain_distance(distance):
    """Jensen-Shannon distance of two domains' use of experts by layer; filled markers: the domains differ (p < 0.05).

    `distance`: domain_distance.csv; p from a permutation of problems between the domains, corrected for all layers.
    Raises NothingToDraw for one data set."""
    pairs = _pairs_of(distance)
    figure, axes = new_figure(layer_width(distance["layer"].nunique(), 9.0), 4.2)
    for (first, second, rows), colour, marker in zip(
        pairs, colours_for(len(pairs)), MARKERS * len(pairs), strict=False
    ):  # fmt: skip
        count = f"{rows['problems_a'].iloc[0]} + {rows['problems_b'].iloc[0]} problems"
        axes.plot(rows["layer"], rows["js_distance"], "-", color=colour, lw=1.2)
        differs = (rows["p_any_layer"] < SIGNIFICANT).to_numpy()
        face = np.where(differs, matplotlib.colors.to_hex(colour), "white")
        axes.scatter(
            rows["layer"], rows["js_distance"], s=34, c=face, edgecolor=colour, marker=marker, zorder=3,
            label=f"{plain(first)} / {plain(second)} ({count})",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    title = "Use of experts, 0 = same, 1 = disjoint (filled: p < 0.05 by permutation of problems, corrected)"
    named(axes, "layer", "Jensen-Shannon distance", title)
    whole_numbers(axes)
    legend_right(axes)
    return figure


def domain_table(summary):
    """domain_summary.csv for display."""
    return pd.DataFrame(
        {
            "domain": summary["domain"],
            "problems": summary["problems"],
            "tokens": [f"{tokens:,}" for tokens in summary["tokens"]],
            "mean probability of the strongest": [number_text(value, "{:.3f}") for value in summary["mean_confidence"]],
            "confident decisions (%)": [number_text(value) for value in summary["high_confidence_percent"]],
            "different experts per token": [number_text(value, "{:.2f}") for value in summary["unique_experts"]],
        }
    )


def specific_expert_table(difference, most=10):
    """The experts that differ most between two domains, at most `most` for each preference. domain_difference.csv.

    Raises NothingToDraw for one data set, or where no expert is specific to one."""
    _pairs_of(difference)
    marked = difference[difference["prefers"] != ""]
    if marked.empty:
        raise NothingToDraw("no expert's usage differs by more than --domain-percent of scripts/journeys/02_analyze.py")
    marked = marked.assign(size=marked["difference"].abs()).sort_values("size", ascending=False, kind="stable")
    marked = marked.groupby(["domain_a", "domain_b", "prefers"], sort=False).head(most)
    table = marked.sort_values(["domain_a", "domain_b", "prefers", "size"], ascending=[True, True, True, False])
    return pd.DataFrame(
        {
            "preferred in": table["prefers"],
            "compared": table["domain_a"] + " / " + table["domain_b"],
            "layer": table["layer"],
            "expert": table["expert"],
            "usage (%)": [f"{a:.1f} / {b:.1f}" for a, b in zip(table["percent_a"], table["percent_b"], strict=True)],
            "difference (points)": [f"{value:+.1f}" for value in table["difference"]],
        }
    ).reset_index(drop=True)


def hop_table(hops, shown=(1, 2, 3, 5, 10, 15, 20, 25, 31)):
    """hop_accuracy.csv for display, at some hops and the last. Raises NothingToDraw for one layer."""
    if not len(hops):
        raise NothingToDraw("one layer only: there is no layer ahead")
    table = hops[hops["hop"].isin([*shown, hops["hop"].max()])]
    return pd.DataFrame(
        {
            "in-sample (%)": [number_text(value) for value in table["accuracy"]],
            "majority, in-sample (%)": [number_text(value) for value in table["majority"]],
            "held out (%)": [number_text(value) for value in table["held_out_accuracy"]],
            "95 % interval": interval_texts(table["ci_low"], table["ci_high"]),
            "majority, held out (%)": [number_text(value) for value in table["held_out_majority"]],
            "random (%)": [number_text(value) for value in table["random"]],
        },
        index=pd.Index(table["hop"], name="layers ahead"),
    )

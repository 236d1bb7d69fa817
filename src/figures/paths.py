"""Figures of paths, tokens, positions and domains: what routing depends on, and what it foretells.

Each `plot_*` function takes what `style.read_result` returned and returns a Figure, or raises NothingToDraw. "The
expert" of a layer is its strongest one.
"""

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from src.figures import style


def plot_hop_accuracy(hops):
    """Accuracy of naming the expert 1 .. L-1 layers ahead: in-sample, on held-out problems, and without looking.

    `hops`: hop_accuracy.csv. Bars: interval over problems. With one problem there is no held-out line.
    """
    style.needs(len(hops), "one layer only: there is no layer ahead")
    figure, axes = style.new_figure(10, 4.8)
    if hops["held_out_accuracy"].notna().any():
        axes.errorbar(
            hops["hop"], hops["held_out_accuracy"], yerr=style.reach(hops, "held_out_accuracy", "ci_low", "ci_high"),
            color=style.SERIES[0], marker="s", ms=4.5, capsize=2.5, label="held-out problems (bars: 95 %, problems)",
        )  # fmt: skip
    for column, form, colour, label in (
        ("accuracy", "-o", style.SERIES[1], "in-sample (as the reference)"),
        ("held_out_majority", "--D", style.SERIES[2], "most common expert, held-out problems"),
        ("majority", ":^", style.SERIES[3], "most common, in-sample"),
        ("random", "-", style.BLACK, "random expert"),
    ):
        if hops[column].notna().any():
            axes.plot(hops["hop"], hops[column], form, color=colour, ms=4, label=label)
    axes.set_ylim(bottom=0)
    title = "The most frequent transition as prediction of the strongest expert"
    style.named(axes, "layers ahead", "right predictions (%)", title)
    style.whole_numbers(axes)
    style.legend_right(axes)
    return figure


# -- paths
def plot_paths(paths):
    """How many different paths tokens take, by first layer: a line for each length of the path. paths.csv."""
    lengths = sorted(paths["length"].unique())
    figure, axes = style.new_figure(9, 4.2)
    for length, colour, marker in style.side_by_side(lengths):
        rows = paths[paths["length"] == length].sort_values("start_layer")
        share = 100 * rows["uniqueness_ratio"]
        axes.plot(rows["start_layer"], share, "-", color=colour, marker=marker, ms=5, label=style.counted(length))
    note = ""
    if paths["uniqueness_ratio"].max() > 20 * paths["uniqueness_ratio"].min():
        note = style.logarithmic(axes)
    else:
        axes.set_ylim(0, 104)
    title = f"How unique paths of some layers are (100 %: no two of {int(paths['tokens'].iloc[0]):,} tokens alike)"
    style.named(axes, "first layer of the path", f"different paths (% of the tokens){note}", title)
    style.legend_right(axes, title="length")
    style.whole_numbers(axes)
    return figure


# -- tokens and positions
def _against_chance(axes, table, column, chance, labels):
    """Two columns of shares by layer, in percent: what was found, and what chance alone gives."""
    axes.plot(table["layer"], 100 * table[column], "-o", color=style.SERIES[0], ms=4.5, label=labels[0])
    axes.plot(table["layer"], 100 * table[chance], "--s", color=style.SERIES[1], ms=3.5, label=labels[1])
    style.whole_numbers(axes)


def plot_consecutive_tokens(consecutive):
    """How often neighbouring tokens share experts, by layer, against two independent tokens. consecutive_tokens.csv."""
    style.needs(consecutive["pairs"].sum(), "no two tokens of a problem stand next to each other")
    figure, panels = style.new_figure(12, 4.0, 1, 2)
    parts = (
        ("agreement", "pairs with the same strongest expert (%)", "Same strongest expert"),
        ("overlap", "experts in common (% of those chosen)", "Experts in common"),
    )
    for axes, (column, label, title) in zip(panels, parts, strict=True):
        names = ("neighbouring tokens", "two independent tokens")
        _against_chance(axes, consecutive, column, f"{column}_chance", names)
        axes.set_ylim(bottom=0)
        style.named(axes, "layer", label, f"{title}, {int(consecutive['pairs'].max()):,} pairs")
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
    sizes = (style.layer_width(len(layers), 6.5), 3, 3)
    figure, (left, middle, right) = style.new_figure(sum(sizes), 1.9 + 0.42 * len(names), 1, 3, width_ratios=sizes)
    numbers = ".2f" if len(layers) <= 10 else None
    limits = (0.0, np.nanmax(grid.to_numpy(float), initial=1e-3))
    style.heatmap(left, grid, "Jensen-Shannon distance", labels, layers, limits=limits, numbers=numbers)
    style.named(left, "layer", "positions (tokens)", "Use of experts against all other positions")
    for axes, column, colour, label in (
        (middle, "mean_confidence", style.SERIES[0], "mean probability of the strongest"),
        (right, "unique_experts", style.SERIES[1], "different experts per token"),
    ):
        values, texts = positions[column].fillna(0), style.number_texts(positions[column], "{:.2f}")
        places = np.arange(len(names)) + 0.5  # centred in the rows of the heat map
        axes.barh(places, values, color=colour, height=0.7)
        for place, value, text in zip(places, values, texts, strict=True):
            axes.text(value, place, f" {text}", va="center", fontsize=8.5)
        axes.set_ylim(len(names), 0)
        axes.set_yticks(places, names, fontsize=8.5)
        axes.set_xlim(0, 1.25 * max(values.max(), 1e-3))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        style.named(axes, label, "positions")
        axes.grid(axis="y", visible=False)
    return figure


def plot_token_identity(identity):
    """How often occurrences of one token, and any two tokens, share the strongest expert. token_identity.csv."""
    style.needs(len(identity), "the records name no tokens")
    figure, axes = style.new_figure(9, 4.0)
    _against_chance(axes, identity, "same_token", "any_tokens", ("the same token", "any two tokens"))
    axes.set_ylim(0, 100)
    title = "How much of the routing is the token itself"
    style.named(axes, "layer", "pairs with the same strongest expert (%)", title)
    axes.legend(fontsize=8.5)
    return figure


# -- domains
def plot_domain_difference(difference):
    """Heat map expert x layer of one domain's usage minus another's; dots: experts that are specific to one of them.

    `difference`: domain_difference.csv; a panel for each pair.
    """
    pairs = style.pairs_of(difference)
    bound = float(np.nanmax(np.abs(difference["difference"]), initial=1e-9))
    grids = []
    for first, second, rows in pairs:
        first, second = style.plain(first), style.plain(second)
        title = (
            f"Usage in {first} minus usage in {second}: purple, more in {first}; brown, more in {second}\n"
            f"(dots: {(rows['prefers'] != '').sum()} of {len(rows)} experts are specific to one)"
        )
        grids.append((*style.expert_grid(rows, "difference"), title, "percentage points", (-bound, bound)))
    figure, panels, few = style.expert_panels(grids, "+.0f", least=8.5)
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
    """
    pairs = style.pairs_of(distance)
    figure, axes = style.new_figure(style.layer_width(distance["layer"].nunique(), 9.0), 4.2)
    for (first, second, rows), colour, marker in style.side_by_side(pairs):
        count = f"{rows['problems_a'].iloc[0]} + {rows['problems_b'].iloc[0]} problems"
        axes.plot(rows["layer"], rows["js_distance"], "-", color=colour, lw=1.2)
        face = np.where(rows["p_any_layer"] < style.SIGNIFICANT, to_hex(colour), "white")
        axes.scatter(
            rows["layer"], rows["js_distance"], s=34, c=face, edgecolor=colour, marker=marker, zorder=3,
            label=f"{style.plain(first)} / {style.plain(second)} ({count})",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    title = "Use of experts, 0 = same, 1 = disjoint (filled: p < 0.05 by permutation of problems, corrected)"
    style.named(axes, "layer", "Jensen-Shannon distance", title)
    style.whole_numbers(axes)
    style.legend_right(axes)
    return figure

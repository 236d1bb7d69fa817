"""Every figure and table of the journey study, drawn from the files that 09 saved; no torch.

Each `plot_*` function takes what `read_result` returned, draws one matplotlib Figure and returns it; `*_table`
functions return a DataFrame for display, `findings_text` plain text. Where a file is complete but has nothing for a
figure (one layer, one data set, no token texts), `NothingToDraw` says why.

"Layer" is the model's layer id, "the expert" of a layer its strongest one. Colours are Okabe and Ito's colour-blind
safe set, cividis for amounts and ColorBrewer's PuOr (colour-blind safe, white = 0) for signed values; grey = no value.
"""

import json
import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from src.figures.style import new_figure, plain, sparse_labels

SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vPX"
AMOUNT_MAP = "cividis"
SIGNED_MAP = "PuOr"
NO_VALUE = "0.82"  # grey of cells without a value
BAND = 0.18  # opacity of bands
# Columns that stay text whatever they hold: a token may read "null" or "1", a path "6".
TEXT_COLUMNS = (
    "choice", "domain", "domain_a", "domain_b", "nearest", "path", "positions", "prefers", "token", "token_texts",
)  # fmt: skip


class NothingToDraw(ValueError):
    """A result file holds nothing that this figure could show; the message says why."""


# -- files
def read_result(path, script="journeys/02_analyze.py"):
    """Read one result file; where it is missing, print which script writes it and return None.

    path: .csv -> DataFrame (TEXT_COLUMNS stay text, an empty cell of the others is NaN), .json -> dict, .npz -> dict of
    arrays. Raises ValueError for another suffix.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".json", ".npz"):
        raise ValueError(f"{path.name}: results are .csv, .json or .npz")
    if not path.is_file():
        print(f"{path.name} is not there yet. Run: python scripts/{script}")
        return None
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    table = pd.read_csv(
        path,
        dtype=dict.fromkeys(TEXT_COLUMNS, str),
        keep_default_na=False,
        na_values=[""],
        lineterminator="\n",  # a token may be a carriage return
    )
    text = [column for column in TEXT_COLUMNS if column in table]
    table[text] = table[text].fillna("")
    return table


# -- parts of figures
def _series(count):
    """`count` colours for lines side by side."""
    return SERIES[:count] if count <= len(SERIES) else sns.color_palette(AMOUNT_MAP, count)


def _layer_width(layers, least=7.0):
    """Width in inches of a panel with one column per layer."""
    return min(max(least, 2.6 + 0.3 * layers), 15.0)


def _expert_height(experts):
    """Height in inches of a heat map with one row per expert."""
    return min(max(1.5, 0.24 * experts), 9.0)


def _whole_numbers(axes):
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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


def _heatmap(axes, values, label, rows, columns, *, cmap=AMOUNT_MAP, limits=None, numbers=None, bar=True, square=False):
    """Heat map of values [rows, columns]; NaN is grey, labels are thinned, `numbers` is a format where cells get one.

    label: of the colour bar (none if `bar` is false). limits: (low, high), else those of the values.
    """
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values)]
    low, high = limits or ((known.min(), known.max()) if known.size else (0.0, 1.0))
    sns.heatmap(
        values,
        ax=axes,
        cmap=cmap,
        vmin=low,
        vmax=high if high > low else low + 1e-9,
        annot=numbers is not None,
        fmt=numbers or "",
        annot_kws={"fontsize": 8},
        cbar=bar,
        cbar_kws={"label": label} if bar else None,
        square=square,
        xticklabels=sparse_labels(list(columns), 18 if square else 34),
        yticklabels=sparse_labels(list(rows), 18),
    )
    axes.tick_params(axis="both", rotation=0, labelsize=8.5, length=0)
    axes.grid(visible=False)
    axes.set_facecolor(NO_VALUE)


def _grid(table, column):
    """(values [E, L], expert ids, layer ids) of a table with a row per layer and expert."""
    grid = table.pivot(index="expert", columns="layer", values=column)
    return grid.to_numpy(float), list(grid.index), list(grid.columns)


def _quoted(token, width=16):
    """A token in quotes, so that its spaces show."""
    return f"'{plain(token, width)}'"


def _short_path(path, most=10):
    """ "6>5>0" as "6·5·0"; of a long path the first and the last experts."""
    experts = path.split(">")
    if len(experts) > most:
        experts = [*experts[:6], "…", *experts[-3:]]
    return "·".join(experts)


def _listed(items, most=24):
    """Items in words, cut after `most`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more


def _counted(count, noun="layer"):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _number(value, form="{:.1f}"):
    """A number as text, "-" where there is none."""
    return "-" if value is None or not math.isfinite(float(value)) else form.format(float(value))


# -- dashboard
def journey_names(examples):
    """{data set: number of its example journeys}, in the order of the file. `examples`: example_journeys.npz."""
    names, counts = np.unique(examples["domain"], return_counts=True)
    return {str(name): int(counts[names == name][0]) for name in dict.fromkeys(examples["domain"].tolist())}


def plot_journey(examples, domain, number=0):
    """One token: its experts at every layer (marker area = gate probability), and the probabilities by rank.

    `examples`: example_journeys.npz; number: which of the domain's examples, from 0. Raises ValueError for an unknown
    domain, IndexError for a number beyond its examples.
    """
    names = journey_names(examples)
    if domain not in names:
        raise ValueError(f"there are no example journeys of {domain!r}, only of {', '.join(names)}")
    if not 0 <= number < names[domain]:
        raise IndexError(f"journey {number} of {domain} is not kept: the examples are 0 to {names[domain] - 1}")
    row = np.flatnonzero(examples["domain"] == domain)[number]
    layers = examples["layers"]
    experts = examples["experts"][row].astype(int)  # [L, K]
    active = experts >= 0
    gates = np.where(active, examples["gating_probs"][row].astype(float), np.nan)  # [L, K]
    slots = experts.shape[1]
    colours = _series(slots)
    figure, (top, bottom) = new_figure(_layer_width(len(layers), 8.0), 5.8, 2, 1, height_ratios=[2.2, 1])
    path = np.where(active[:, 0], experts[:, 0], np.nan)
    top.plot(layers, path, color=colours[0], lw=1.2, alpha=0.6, zorder=1)
    base = np.zeros(len(layers))
    for rank in range(slots - 1, -1, -1):  # the strongest on top
        seen = active[:, rank]
        area = 24 + 130 * np.nan_to_num(gates[seen, rank], nan=0.4)
        top.scatter(
            layers[seen], experts[seen, rank], s=area, color=colours[rank], marker=MARKERS[rank % len(MARKERS)],
            edgecolor="white", lw=0.6, label=f"rank {rank + 1}", zorder=3 + slots - rank,
        )  # fmt: skip
    for rank in range(slots):
        height = np.nan_to_num(gates[:, rank])
        bottom.bar(layers, height, bottom=base, color=colours[rank], width=0.8, edgecolor="white", lw=0.4)
        base += height
    handles, labels = top.get_legend_handles_labels()
    top.legend(
        handles[::-1], labels[::-1], fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="choice",
        frameon=False,
    )  # fmt: skip
    highest = int(examples["experts"].max())  # of all examples: the same scale for every journey
    top.set_ylim(-0.6, highest + 0.6)
    top.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    top.set_ylabel("expert")
    bottom.set_ylabel("gate probability")
    bottom.set_ylim(0, 1)
    for axes in (top, bottom):
        axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
        axes.set_xlabel("layer")
        _whole_numbers(axes)
    if not np.isfinite(gates).any():
        bottom.text(0.5, 0.5, "no gate probabilities recorded", ha="center", va="center", transform=bottom.transAxes)
    text = f", token {_quoted(examples['token'][row], 30)}" if examples["token"][row] else ""
    strongest = gates[:, 0][np.isfinite(gates[:, 0])]
    confidence = f"mean probability of the strongest {strongest.mean():.2f}" if len(strongest) else "no probabilities"
    top.set_title(
        f"{plain(domain)}, problem {examples['problem_id'][row]}, position {examples['token_idx'][row]}{text}\n"
        f"{len(np.unique(path[np.isfinite(path)]))} different experts over {_counted(len(layers))}, {confidence} "
        "(marker area: gate probability)",
        fontsize=10,
    )
    return figure


def plot_expert_distribution(distribution):
    """Heat map expert x layer of the share of tokens whose strongest expert it is; below, of all experts chosen.

    `distribution`: expert_distribution.csv. With one expert per token there is one panel."""
    strongest, experts, layers = _grid(distribution, "percent")
    panels = [(strongest, "Strongest expert", "share of tokens (%)")]
    if not distribution["count"].equals(distribution["count_topk"]):
        panels.append((_grid(distribution, "percent_topk")[0], "All experts chosen", "share of choices (%)"))
    height = _expert_height(len(experts))
    figure, axes = new_figure(_layer_width(len(layers)), len(panels) * (height + 0.9) + 0.2, len(panels), 1)
    for panel, (values, title, label) in zip(np.atleast_1d(axes), panels, strict=True):
        numbers = ".0f" if len(layers) <= 10 and len(experts) <= 16 else None
        _heatmap(panel, values, label, experts, layers, limits=(0.0, np.nanmax(values)), numbers=numbers)
        panel.set_title(f"{title} (even use: {100 / len(experts):.3g} %)", fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylabel("expert")
    return figure


def plot_load_balance(balance):
    """Entropy (of the largest possible), largest over mean load and Gini coefficient by layer. load_balance.csv."""
    figure, panels = new_figure(13, 3.9, 1, 3)
    parts = (
        ("entropy_ratio", "entropy / largest possible entropy", "Entropy (1 = even)", 1.0),
        ("max_over_mean", "largest load / mean load", "Busiest expert (1 = even)", 1.0),
        ("gini", "Gini coefficient", "Gini coefficient (0 = even)", 0.0),
    )
    names = {"top1": "strongest expert", "topk": "all experts chosen"}
    for axes, (column, label, title, even) in zip(panels, parts, strict=True):
        for (choice, name), colour, marker, line in zip(names.items(), SERIES, MARKERS, ("-", "--"), strict=False):
            rows = balance[balance["choice"] == choice]
            axes.plot(rows["layer"], rows[column], line, color=colour, marker=marker, ms=4, label=name)
        axes.axhline(even, color="black", lw=1)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=10)
        _whole_numbers(axes)
    panels[0].legend(fontsize=8.5)
    return figure


def plot_gate_confidence(confidence, histogram, findings):
    """Gate probabilities by rank: histogram over all layers, mean and spread by layer, share of confident decisions.

    `confidence`, `histogram`: gate_confidence.csv and gate_histogram.csv; `findings` gives the threshold. Raises
    NothingToDraw where no probabilities were recorded.
    """
    overall = confidence[confidence["layer"].astype(str) == "all"].set_index("rank")
    if not overall["decisions"].sum():
        raise NothingToDraw("no gate probabilities were recorded")
    layers = confidence[confidence["layer"].astype(str) != "all"].assign(layer=lambda rows: rows["layer"].astype(int))
    threshold = findings["gates"][0]["threshold"]
    ranks = list(overall.index)
    colours, highest = _series(len(ranks)), 0.1
    figure, (left, middle, right) = new_figure(14, 4.2, 1, 3)
    for rank, colour, marker in zip(ranks, colours, MARKERS * len(ranks), strict=False):
        bins = histogram[(histogram["layer"].astype(str) == "all") & (histogram["rank"] == rank)]
        # two bins of the file in one bar: 50 bars
        share = 100 * bins["count"].to_numpy(float).reshape(-1, 2).sum(axis=1) / max(overall.loc[rank, "decisions"], 1)
        edges = np.append(bins["bin_low"].to_numpy()[::2], bins["bin_high"].to_numpy()[-1])
        mean, std = overall.loc[rank, "mean"], overall.loc[rank, "std"]
        left.stairs(
            share, edges, color=colour, fill=len(ranks) <= 3, alpha=0.55 if len(ranks) <= 3 else 1.0, lw=1.5,
            label=f"rank {rank}: mean {mean:.3f}, std {std:.3f}",
        )  # fmt: skip
        left.axvline(mean, color=colour, ls="--", lw=1.2)
        highest = max(highest, edges[1:][share > 0].max(initial=0.0))
        rows = layers[layers["rank"] == rank]
        if len(ranks) <= 3 or rank == ranks[0]:
            band = (rows["mean"] - rows["std"], rows["mean"] + rows["std"])
            middle.fill_between(rows["layer"], *band, color=colour, alpha=BAND, lw=0)
        middle.plot(rows["layer"], rows["mean"], "-", color=colour, marker=marker, ms=4, label=f"rank {rank}")
    first = layers[layers["rank"] == ranks[0]]
    right.bar(first["layer"], first["percent_above"], color=colours[0], width=0.75)
    right.axhline(overall.loc[ranks[0], "percent_above"], color="black", ls="--", lw=1.2, label="all layers together")
    left.set_xlim(0, highest)
    left.set_xlabel("gate probability")
    left.set_ylabel("share of decisions (%)")
    left.set_title("All layers together (dashed: mean)", fontsize=10)
    middle.set_ylim(0, highest)
    middle.set_ylabel("gate probability")
    middle.set_title("Mean by layer (band: one standard deviation)", fontsize=10)
    right.set_ylim(0, min(100, max(5, 1.25 * np.nanmax([*first["percent_above"], 1]))))
    right.set_ylabel("share of decisions (%)")
    right.set_title(f"Confident decisions: strongest above {threshold:g}", fontsize=10)
    for axes in (middle, right):
        axes.set_xlabel("layer")
        _whole_numbers(axes)
        axes.legend(fontsize=8)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return figure


# -- layers among each other
def _needs_layers(layers):
    if len(layers) < 2:
        raise NothingToDraw("one layer only: there are no pairs of layers")


def plot_transitions(transitions, source_layers=None):
    """P(expert at the next layer | expert at this one) for some layers; grey rows: experts that are never used.

    `transitions`: transitions.npz. source_layers: layer ids, default the first, the middle and the last pair. Raises
    NothingToDraw for one layer, ValueError for a layer that has no next one.
    """
    layers = transitions["layers"].tolist()
    _needs_layers(layers)
    last = len(layers) - 2
    if source_layers is None:
        source_layers = [layers[i] for i in sorted({0, last // 2, last})]
    for layer in source_layers:
        if layer not in layers[:-1]:
            raise ValueError(f"layer {layer} has no next one among the layers {layers}")
    chosen = [layers.index(layer) for layer in source_layers]
    size = transitions["adjacent_probabilities"].shape[-1]
    probabilities = transitions["adjacent_probabilities"][chosen].astype(float)
    used = np.stack([transitions["counts"][i, i + 1].sum(axis=-1) > 0 for i in chosen])
    probabilities[~used] = np.nan
    side = min(max(3.0, 1.1 + 0.36 * size), 5.2)
    figure, axes = new_figure(max(side * len(chosen) + 0.9, 6.4), side + 0.5, 1, len(chosen))
    panels = np.atleast_1d(axes)
    limits = (0.0, float(np.nanmax(probabilities)))
    for axes, index, values in zip(panels, chosen, probabilities, strict=True):
        numbers = ".2f" if size <= 10 else None
        _heatmap(axes, values, "", range(size), range(size), limits=limits, numbers=numbers, bar=False, square=True)
        axes.set_xlabel(f"expert at layer {layers[index + 1]}")
        axes.set_ylabel(f"expert at layer {layers[index]}")
        axes.set_title(f"Layer {layers[index]} to {layers[index + 1]}", fontsize=10)
    figure.colorbar(panels[-1].collections[0], ax=list(panels), label="P(target | source)", shrink=0.85)
    return figure


def _pair_panels(rows, columns, layers, parts):
    """Square heat maps layer x layer: parts = (values [L, L], title, label, cmap, limits)."""
    side, names = (3.2, 1.1) if len(layers) <= 8 else (4.4, 0.75)  # of a map; title, ticks and name above and below
    figure, axes = new_figure(columns * (side + 1.4), rows * (side + names), rows, columns)
    numbers = ".2f" if len(layers) <= 8 else None
    for panel, (values, title, label, cmap, limits) in zip(np.ravel(axes), parts, strict=True):
        values = np.where(np.eye(len(layers), dtype=bool), np.nan, values)
        _heatmap(panel, values, label, layers, layers, cmap=cmap, limits=limits, numbers=numbers, square=True)
        panel.set_title(title, fontsize=10)
    return figure, np.ravel(axes)


def _span(*matrices, low=None):
    """(low, high) over the off-diagonal values of some square matrices."""
    values = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices])
    values = values[np.isfinite(values)]
    if not values.size:
        return (0.0, 1.0)
    return (float(values.min()) if low is None else low, float(values.max()))


def plot_affinity(affinity):
    """How well a layer's expert foretells another's, for all layer pairs: four heat maps source x target.

    `affinity`: affinity.npz. Top: the reference's mean of the largest transition probabilities, and the same weighted
    by how often the source expert occurs (= in-sample accuracy). Below: what the weighted form adds to always naming
    the target's most common expert, and normalised mutual information. Raises NothingToDraw for one layer.
    """
    layers = affinity["layers"].tolist()
    _needs_layers(layers)
    gain = affinity["weighted"] - affinity["majority"]
    shared = _span(affinity["reference"], affinity["weighted"])
    figure, panels = _pair_panels(
        2,
        2,
        layers,
        (
            (affinity["reference"], "Reference: mean over source experts of the largest\ntransition probability",
             "mean probability", AMOUNT_MAP, shared),
            (affinity["weighted"], "Weighted by how often source experts occur\n(= share predicted right, in-sample)",
             "share of tokens", AMOUNT_MAP, shared),
            (gain, "Weighted minus majority: gain over naming the\ntarget's most common expert", "share of tokens",
             AMOUNT_MAP, _span(gain, low=0.0)),
            (affinity["nmi"], "Normalised mutual information\n(0 = independent, 1 = each determines the other)", "NMI",
             AMOUNT_MAP, _span(affinity["nmi"], low=0.0)),
        ),
    )  # fmt: skip
    for panel in panels:
        panel.set_xlabel("target layer")
        panel.set_ylabel("source layer")
    return figure


def plot_correlation(correlation):
    """Pearson r of expert ids, the same data with every layer's ids shuffled, and Cramer's V, for all layer pairs.

    `correlation`: correlation.npz. The middle panel shows what of the left one is the numbering of the experts. Raises
    NothingToDraw for one layer.
    """
    layers = correlation["layers"].tolist()
    _needs_layers(layers)
    ids, shuffled, cramers_v = (
        correlation[name] for name in ("id_correlation", "id_correlation_relabelled", "cramers_v")
    )
    bound = max(abs(limit) for limit in _span(ids, shuffled))
    signed = (-bound, bound)
    figure, panels = _pair_panels(
        1,
        3,
        layers,
        (
            (ids, "Pearson r of expert ids (the reference's)", "Pearson r", SIGNED_MAP, signed),
            (shuffled, "The same tokens, experts renumbered at random:\nr changes, the model does not", "Pearson r",
             SIGNED_MAP, signed),
            (cramers_v, "Cramér's V: independent of the numbering", "Cramér's V", AMOUNT_MAP,
             _span(cramers_v, low=0.0)),
        ),
    )  # fmt: skip
    for panel in panels:
        panel.set_xlabel("layer")
        panel.set_ylabel("layer")
    return figure


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
    _whole_numbers(axes)
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
    for length, colour, marker in zip(lengths, _series(len(lengths)), MARKERS * len(lengths), strict=False):
        rows = paths[paths["length"] == length].sort_values("start_layer")
        left.plot(
            rows["start_layer"], 100 * rows["uniqueness_ratio"], "-", color=colour, marker=marker, ms=5,
            label=_counted(length),
        )  # fmt: skip
        unique = rows["unique_paths"]
        reach = [[unique.mean() - unique.min()], [unique.max() - unique.mean()]]
        place = lengths.index(length)
        right.bar(place, unique.mean(), color=colour, width=0.65)
        if len(unique) > 1:
            right.errorbar(place, unique.mean(), yerr=reach, color="black", capsize=4, lw=1.2)
    note = _log_if_wide(left, 100 * paths["uniqueness_ratio"])
    if not note:
        left.set_ylim(0, 104)
    left.set_xlabel("first layer of the path")
    left.set_ylabel(f"different paths (% of the tokens){note}")
    left.set_title("How unique paths of some layers are (100 %: no two tokens alike)", fontsize=10)
    left.legend(fontsize=8.5, title="length", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _whole_numbers(left)
    note = _log_if_wide(right, [*paths["unique_paths"], tokens])
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
            _short_path(path) if length == lengths[-1] else f"from layer {start}: {_short_path(path)}"
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
        panel.set_title(f"{_counted(length)}{whole}", fontsize=10)
        panel.grid(axis="y", visible=False)
    for panel in panels[len(lengths) :]:
        panel.set_axis_off()
    return figure


def path_table(top_paths, length=None):
    """The most common paths of one length (default: the whole journey) for display: path, tokens, share, texts."""
    length = top_paths["length"].max() if length is None else length
    table = top_paths[top_paths["length"] == length]
    if table.empty:
        lengths = ", ".join(str(value) for value in sorted(top_paths["length"].unique()))
        raise ValueError(f"no paths of {length} layers are listed, only of {lengths}")
    return pd.DataFrame(
        {
            "path": [_short_path(path, 14) for path in table["path"]],
            "first layer": table["start_layer"].to_numpy(),
            "tokens": table["count"].to_numpy(),
            "share (%)": [f"{value:.2f}" for value in table["percent"]],
            "token texts": table["token_texts"].to_numpy(),
        },
        index=pd.Index(table["rank"], name="rank"),
    )


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
        _whole_numbers(axes)
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
        _layer_width(len(layers), 6.5) + 6, 1.9 + 0.42 * len(names), 1, 3,
        width_ratios=[_layer_width(len(layers), 6.5), 3, 3],
    )  # fmt: skip
    known = np.nan_to_num(grid.to_numpy(float))
    numbers = ".2f" if len(layers) <= 10 else None
    limits = (0.0, max(float(known.max()), 1e-3))
    _heatmap(left, grid, "Jensen-Shannon distance", labels, layers, limits=limits, numbers=numbers)
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
            axes.text(np.nan_to_num(value), row + 0.5, f" {_number(value, '{:.2f}')}", va="center", fontsize=8.5)
        axes.set_ylim(len(names), 0)
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8.5)
        axes.set_xlim(0, 1.25 * max(np.nanmax([*values, 0]), 1e-3))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label)
        axes.set_ylabel("positions")
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
    axes.plot(identity["layer"], 100 * identity["same_token"], "-o", color=SERIES[0], ms=4.5, label="the same token")
    axes.plot(identity["layer"], 100 * identity["any_tokens"], "--s", color=SERIES[1], ms=3.5, label="any two tokens")
    axes.set_ylim(0, 100)
    axes.set_xlabel("layer")
    axes.set_ylabel("pairs with the same strongest expert (%)")
    axes.set_title("How much of the routing is the token itself", fontsize=10)
    _whole_numbers(axes)
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
    _needs_tokens(routing)
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
        labels = [f"{_quoted(token)} ×{n:,}" for token, n in zip(table["token"], table["count"], strict=True)]
        _bars(panel, 100 * table["agreement"].to_numpy(float), labels, colour, count)
        panel.set_xlabel("pairs of its occurrences that agree (%)")
        panel.set_ylabel("token and its occurrences")
        panel.set_title(f"{title}, of {len(routing)} frequent tokens", fontsize=10)
    labels = [f"{_quoted(row.token, 12)} ~ {_quoted(row.other, 12)}" for row in pairs.itertuples()]
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


def token_table(routing, most=20):
    """The most frequent tokens for display: how alike their occurrences are routed, their paths, the nearest token.

    `routing`: token_routing.csv. Raises NothingToDraw for records without tokens."""
    _needs_tokens(routing)
    table = routing.head(most)
    return pd.DataFrame(
        {
            "token": [repr(token) for token in table["token"]],
            "occurrences": table["count"].to_numpy(),
            "agreement (%)": [_number(100 * value) for value in table["agreement"]],
            "different paths": table["paths"].to_numpy(),
            "on the commonest (%)": [_number(value) for value in table["common_path_percent"]],
            "nearest token": [repr(token) for token in table["nearest"]],
            "agreement with it (%)": [_number(100 * value) for value in table["nearest_agreement"]],
        }
    )


# -- domains
def _pairs_of(table):
    """[(domain a, domain b, its rows)] of a table over pairs of domains. Raises NothingToDraw where there is none."""
    if table.empty:
        raise NothingToDraw("one data set only: there is nothing to compare")
    return [(a, b, rows) for (a, b), rows in table.groupby(["domain_a", "domain_b"], sort=False)]


def plot_domain_distribution(distribution):
    """Heat map expert x layer of the strongest experts' share of tokens, a panel for each data set, one scale.

    `distribution`: domain_distribution.csv."""
    names = list(dict.fromkeys(distribution["domain"]))
    grids = [_grid(distribution[distribution["domain"] == name], "percent") for name in names]
    _, experts, layers = grids[0]
    height = _expert_height(len(experts))
    figure, axes = new_figure(_layer_width(len(layers)), len(names) * (height + 0.9) + 0.2, len(names), 1)
    limits = (0.0, max(float(np.nanmax(values)) for values, *_ in grids))
    numbers = ".0f" if len(layers) <= 10 and len(experts) <= 16 else None
    for panel, name, (values, *_) in zip(np.atleast_1d(axes), names, grids, strict=True):
        _heatmap(panel, values, "share of tokens (%)", experts, layers, limits=limits, numbers=numbers)
        tokens = int(distribution.loc[distribution["domain"] == name, "count"].sum()) // len(layers)
        panel.set_title(f"{plain(name)} ({tokens:,} tokens)", fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylabel("expert")
    return figure


def plot_domain_difference(difference):
    """Heat map expert x layer of one domain's usage minus another's; dots: experts that 09 calls domain-specific.

    `difference`: domain_difference.csv; a panel for each pair. Raises NothingToDraw for one data set."""
    pairs = _pairs_of(difference)
    _, experts, layers = _grid(pairs[0][2], "difference")
    bound = float(np.nanmax(np.abs(difference["difference"]), initial=1e-9))
    height = _expert_height(len(experts))
    figure, axes = new_figure(_layer_width(len(layers), 8.5), len(pairs) * (height + 1.1) + 0.2, len(pairs), 1)
    numbers = "+.0f" if len(layers) <= 10 and len(experts) <= 16 else None
    for panel, (first, second, rows) in zip(np.atleast_1d(axes), pairs, strict=True):
        label = "percentage points"
        _heatmap(
            panel, _grid(rows, "difference")[0], label, experts, layers, cmap=SIGNED_MAP, limits=(-bound, bound),
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
    pairs = _pairs_of(distance)
    figure, (left, right) = new_figure(13, 4.1 + 0.35 * len(pairs), 1, 2)
    for (first, second, rows), colour, marker in zip(
        pairs, _series(len(pairs)), MARKERS * len(pairs), strict=False
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
        _whole_numbers(axes)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return figure


def domain_table(summary):
    """domain_summary.csv for display."""
    return pd.DataFrame(
        {
            "domain": summary["domain"],
            "problems": summary["problems"],
            "tokens": [f"{tokens:,}" for tokens in summary["tokens"]],
            "mean probability of the strongest": [_number(value, "{:.3f}") for value in summary["mean_confidence"]],
            "confident decisions (%)": [_number(value) for value in summary["high_confidence_percent"]],
            "different experts per token": [_number(value, "{:.2f}") for value in summary["unique_experts"]],
        }
    )


def specific_expert_table(difference, most=10):
    """The experts that differ most between two domains, at most `most` for each preference. domain_difference.csv.

    Raises NothingToDraw for one data set, or where no expert is specific to one."""
    _pairs_of(difference)
    marked = difference[difference["prefers"] != ""]
    if marked.empty:
        raise NothingToDraw("no expert's usage differs by more than 09's --domain-percent")
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


# -- tables and words
def hop_table(hops, shown=(1, 2, 3, 5, 10, 15, 20, 25, 31)):
    """hop_accuracy.csv for display, at some hops and the last. Raises NothingToDraw for one layer."""
    if not len(hops):
        raise NothingToDraw("one layer only: there is no layer ahead")
    table = hops[hops["hop"].isin([*shown, hops["hop"].max()])]
    interval = [
        f"{_number(low)} to {_number(high)}" if math.isfinite(low) else "-"
        for low, high in zip(table["ci_low"], table["ci_high"], strict=True)
    ]
    return pd.DataFrame(
        {
            "in-sample (%)": [_number(value) for value in table["accuracy"]],
            "majority, in-sample (%)": [_number(value) for value in table["majority"]],
            "held out (%)": [_number(value) for value in table["held_out_accuracy"]],
            "95 % interval": interval,
            "majority, held out (%)": [_number(value) for value in table["held_out_majority"]],
            "random (%)": [_number(value) for value in table["random"]],
        },
        index=pd.Index(table["hop"], name="layers ahead"),
    )


def transition_table(findings):
    """P(target expert | source expert) of the most predictable pair of neighbouring layers. findings.json.

    Raises NothingToDraw for one layer."""
    best = findings["most_predictable"]
    if best is None:
        raise NothingToDraw("one layer only: there are no transitions")
    matrix = np.array(best["transitions"], dtype=float)
    source, target = (
        [f"layer {best[key]}, expert {expert}" for expert in range(len(matrix))]
        for key in ("source_layer", "target_layer")
    )
    corner = f"affinity {best['affinity']:.3f}"
    return pd.DataFrame(matrix, index=source, columns=pd.Index(target, name=corner)).round(3)


def strong_transition_table(strong, most=20):
    """The likeliest transitions between neighbouring layers. `strong`: strong_transitions.csv.

    Raises NothingToDraw where none is above 09's threshold."""
    if strong.empty:
        raise NothingToDraw("no transition is likelier than 09's --strong-percent")
    table = strong.sort_values(["percent", "count"], ascending=False, kind="stable").head(most)
    return pd.DataFrame(
        {
            "layers": [f"{a} to {b}" for a, b in zip(table["source_layer"], table["target_layer"], strict=True)],
            "experts": [f"{a} to {b}" for a, b in zip(table["source_expert"], table["target_expert"], strict=True)],
            "tokens": table["count"].to_numpy(),
            "probability (%)": [f"{value:.1f}" for value in table["percent"]],
        }
    )


def correlation_table(findings, correlation):
    """The strongest correlations of expert ids of layers that are no neighbours, beside what renumbering makes of them.

    `findings`, `correlation`: findings.json, correlation.npz. Raises NothingToDraw for fewer than three layers."""
    rows = findings["strongest_id_correlations"]
    if not rows:
        raise NothingToDraw("there are no layers two apart, or none that uses two experts")
    place = {int(layer): index for index, layer in enumerate(correlation["layers"])}
    cells = [(place[row["layer_a"]], place[row["layer_b"]]) for row in rows]
    return pd.DataFrame(
        {
            "layers": [f"{row['layer_a']} and {row['layer_b']}" for row in rows],
            "r of ids": [f"{row['r']:+.3f}" for row in rows],
            "r, renumbered": [_number(correlation["id_correlation_relabelled"][cell], "{:+.3f}") for cell in cells],
            "Cramér's V": [_number(correlation["cramers_v"][cell], "{:.3f}") for cell in cells],
        }
    )


def findings_text(findings, width=110):
    """findings.json in words: a few wrapped paragraphs of plain text."""
    parts = [
        f"{_counted(findings['tokens'], 'token')} of {_counted(findings['problems'], 'problem')} "
        f"({', '.join(findings['domains'])}), "
        f"{_counted(findings['layers'])}, {findings['experts_per_token']} of {findings['experts']} "
        "experts per token."
    ]
    dominant = findings["dominant_experts"]
    listed = [f"layer {e['layer']} E{e['expert']} ({e['percent']:.1f} %)" for e in dominant["experts"]]
    parts.append(f"Experts that take over {dominant['above_percent']:g} % of a layer's tokens: {_listed(listed)}.")
    for gate in findings["gates"][:1]:
        parts.append(
            f"Gates: the strongest expert gets {_number(gate['mean'], '{:.3f}')} on average (standard deviation "
            f"{_number(gate['std'], '{:.3f}')}); {_number(gate['percent_above'])} % of the decisions are above "
            f"{gate['threshold']:g}."
        )
    affinity = findings["affinity"]
    if affinity["adjacent"] is not None:
        far = affinity["non_adjacent"]
        others = (
            f", of others {far:.3f} ({affinity['adjacent_advantage_percent']:+.1f} % for neighbours)" if far else ""
        )
        parts.append(f"Affinity (the reference's measure) of neighbouring layers {affinity['adjacent']:.3f}{others}.")
    accuracy = [f"{value:.1f} % at {hop}" for hop, value in findings["hop_accuracy_percent"].items()]
    if accuracy:
        low = findings["low_accuracy"]
        parts.append(
            f"In-sample accuracy by layers ahead: {', '.join(accuracy)}; "
            + (
                f"under {low['below_percent']:g} % for the first time at {low['hop']}."
                if low["reached"]
                else f"never under {low['below_percent']:g} %."
            )
        )
    best = findings["most_predictable"]
    if best is not None:
        strong = [f"E{s['source_expert']} to E{s['target_expert']} ({s['percent']:.1f} %)" for s in best["strong"]]
        parts.append(
            f"Most predictable neighbours: layer {best['source_layer']} to {best['target_layer']} (affinity "
            f"{best['affinity']:.3f}); strong transitions: {_listed(strong, 12)}."
        )
    paths = findings["paths"]
    parts.append(
        f"{paths['unique']:,} different paths, {100 * paths['uniqueness_ratio']:.2f} % of the tokens; a token meets "
        f"{findings['unique_experts_per_token']:.2f} different experts on its way."
    )
    correlations = [
        f"layers {row['layer_a']} and {row['layer_b']} ({row['r']:+.3f})"
        for row in findings["strongest_id_correlations"]
    ]
    if correlations:
        parts.append(
            f"Strongest correlations of expert ids of layers that are no neighbours: {', '.join(correlations)}. "
            f"{findings['id_correlation_note']}"
        )
    return "\n".join(textwrap.fill(part, width, subsequent_indent="    ") for part in parts)

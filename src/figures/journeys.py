"""Figures of single journeys, of the use of experts and gates, and of layers among each other.

Each `plot_*` function takes what `style.read_result` returned and returns a Figure, or raises NothingToDraw. "Layer"
is the model's layer id, "the expert" of a layer its strongest one; in signed heat maps (PuOr) white is 0.
"""

import numpy as np

from src.figures import style


# -- dashboard
def journey_names(examples):
    """{data set: number of its example journeys}, in the order of the file. `examples`: example_journeys.npz."""
    names, counts = np.unique(examples["domain"], return_counts=True)
    return {str(name): int(counts[names == name][0]) for name in dict.fromkeys(examples["domain"].tolist())}


def plot_journey(examples, domain, number=0):
    """One token as a heat map expert x layer: the experts chosen at every layer, and their gate probabilities.

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
    gates = np.where(experts >= 0, examples["gating_probs"][row].astype(float), np.nan)
    recorded = np.isfinite(gates).any()
    rows = int(examples["experts"].max()) + 1  # of all examples: the same scale for every journey
    values = np.full((rows, len(layers)), np.nan)
    for layer, slot in np.argwhere(experts >= 0):
        values[experts[layer, slot], layer] = gates[layer, slot] if recorded else 1.0
    strongest = gates[:, 0][np.isfinite(gates[:, 0])]
    confidence = f"mean probability of the strongest {strongest.mean():.2f}" if recorded else "no gate probabilities"
    text = f", token '{style.plain(examples['token'][row], 30)}'" if examples["token"][row] else ""
    used = experts[experts[:, 0] >= 0, 0]
    title = (
        f"{style.plain(domain)}, problem {examples['problem_id'][row]}, position {examples['token_idx'][row]}{text}\n"
        f"{len(np.unique(used))} different strongest experts over {style.counted(len(layers))}, {confidence}"
    )
    label = "gate probability (grey: not chosen)" if recorded else "chosen (grey: not chosen)"
    grid = (values, range(rows), layers, title, label, (0.0, 1.0))
    return style.expert_panels([grid], ".2f" if recorded else None, least=8.0)[0]


def plot_expert_distribution(distribution):
    """Heat map expert x layer of the share of tokens whose strongest expert it is; below, of all experts chosen.

    `distribution`: expert_distribution.csv. With one expert per token there is one panel."""
    grids = []
    for column, title, label in (
        ("percent", "Strongest expert", "share of tokens (%)"),
        ("percent_topk", "All experts chosen", "share of choices (%)"),
    ):
        values, experts, layers = style.expert_grid(distribution, column)
        title = f"{title} (even use: {100 / len(experts):.3g} %)"
        grids.append((values, experts, layers, title, label, (0.0, np.nanmax(values))))
    same = distribution["count"].equals(distribution["count_topk"])
    return style.expert_panels(grids[:1] if same else grids)[0]


def plot_load_balance(balance):
    """Entropy (of the largest possible), largest over mean load and Gini coefficient by layer. load_balance.csv."""
    figure, panels = style.new_figure(13, 3.9, 1, 3)
    parts = (
        ("entropy_ratio", "entropy / largest possible entropy", "Entropy (1 = even)", 1.0),
        ("max_over_mean", "largest load / mean load", "Busiest expert (1 = even)", 1.0),
        ("gini", "Gini coefficient", "Gini coefficient (0 = even)", 0.0),
    )
    names = {"top1": ("strongest expert", "-"), "topk": ("all experts chosen", "--")}
    for axes, (column, label, title, even) in zip(panels, parts, strict=True):
        for choice, colour, marker in style.side_by_side(["top1", "topk"]):
            rows = balance[balance["choice"] == choice]
            name, line = names[choice]
            axes.plot(rows["layer"], rows[column], line, color=colour, marker=marker, ms=4, label=name)
        axes.axhline(even, color="black", lw=1)
        style.named(axes, "layer", label, title)
        style.whole_numbers(axes)
    panels[0].legend(fontsize=8.5)
    return figure


def plot_gate_confidence(confidence, histogram, findings):
    """Gate probabilities by rank: histogram over all layers, mean and spread by layer, share of confident decisions.

    `confidence`, `histogram`: gate_confidence.csv and gate_histogram.csv; `findings` gives the threshold.
    """
    overall = confidence[confidence["layer"] == "all"].set_index("rank")
    style.needs(overall["decisions"].sum(), "no gate probabilities were recorded")
    layers = confidence[confidence["layer"] != "all"].astype({"layer": int})
    ranks, highest = list(overall.index), 0.1
    figure, (left, middle, right) = style.new_figure(14, 4.2, 1, 3)
    for rank, colour, marker in style.side_by_side(ranks):
        bins = histogram[(histogram["layer"] == "all") & (histogram["rank"] == rank)]
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
            middle.fill_between(rows["layer"], *band, color=colour, alpha=0.18, lw=0)
        middle.plot(rows["layer"], rows["mean"], "-", color=colour, marker=marker, ms=4, label=f"rank {rank}")
    first = layers[layers["rank"] == ranks[0]]
    right.bar(first["layer"], first["percent_above"], color=style.side_by_side(ranks)[0][1], width=0.75)
    right.axhline(overall.loc[ranks[0], "percent_above"], color="black", ls="--", lw=1.2, label="all layers together")
    left.set_xlim(0, highest)
    style.named(left, "gate probability", "share of decisions (%)", "All layers together (dashed: mean)")
    middle.set_ylim(0, highest)
    style.named(middle, "layer", "gate probability", "Mean by layer (band: one standard deviation)")
    threshold = findings["gates"][0]["threshold"]
    right.set_ylim(0, min(100, max(5, 1.25 * np.nanmax([*first["percent_above"], 1]))))
    style.named(right, "layer", "share of decisions (%)", f"Confident decisions: strongest above {threshold:g}")
    for axes in (middle, right):
        style.whole_numbers(axes)
        axes.legend(fontsize=8)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return figure


# -- layers among each other
def _layers_of(content):
    """Layer ids of a file about pairs of layers."""
    style.needs(len(content["layers"]) > 1, "one layer only: there are no pairs of layers")
    return content["layers"].tolist()


def plot_transitions(transitions, source_layers=None):
    """P(expert at the next layer | expert at this one) for some layers; grey rows: experts that are never used.

    `transitions`: transitions.npz. source_layers: layer ids, default the first, the middle and the last pair. Raises
    ValueError for a layer that has no next one.
    """
    layers = _layers_of(transitions)
    if source_layers is None:
        last = len(layers) - 2
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
    figure, axes = style.new_figure(max(side * len(chosen) + 0.9, 6.4), side + 0.5, 1, len(chosen))
    panels = np.atleast_1d(axes)
    settings = dict(limits=(0.0, np.nanmax(probabilities)), numbers=".2f" if size <= 10 else None, square=True)
    for axes, index, values in zip(panels, chosen, probabilities, strict=True):
        style.heatmap(axes, values, "", range(size), range(size), **settings)
        source, target = layers[index], layers[index + 1]
        style.named(axes, f"expert at layer {target}", f"expert at layer {source}", f"Layer {source} to {target}")
    figure.colorbar(panels[-1].collections[0], ax=list(panels), label="P(target | source)", shrink=0.85)
    return figure


def _pair_panels(shape, layers, names, parts):
    """Square heat maps layer x layer; names: of x and y; parts: (values [L, L], title, label, limits) of each map."""
    side, beside = (3.2, 1.1) if len(layers) <= 8 else (4.4, 0.75)  # of a map; title, ticks and name above and below
    figure, axes = style.new_figure(shape[1] * (side + 1.4), shape[0] * (side + beside), *shape)
    numbers = ".2f" if len(layers) <= 8 else None
    for panel, (values, title, label, limits) in zip(np.ravel(axes), parts, strict=True):
        values = np.where(np.eye(len(layers), dtype=bool), np.nan, values)
        style.heatmap(panel, values, label, layers, layers, limits=limits, numbers=numbers, square=True)
        style.named(panel, *names, title)
    return figure


def _span(*matrices, low=None):
    """(low, high) over the off-diagonal values of some square matrices."""
    values = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices])
    values = values[np.isfinite(values)]
    if not values.size:
        return (0.0, 1.0)
    return (values.min() if low is None else low, values.max())


def plot_affinity(affinity):
    """How well a layer's expert foretells another's, for all layer pairs: four heat maps source x target.

    `affinity`: affinity.npz. Top: the reference's mean of the largest transition probabilities, and the same weighted
    by how often the source expert occurs (= in-sample accuracy). Below: what the weighted form adds to always naming
    the target's most common expert, and normalised mutual information.
    """
    layers = _layers_of(affinity)
    reference, weighted, nmi = (affinity[name] for name in ("reference", "weighted", "nmi"))
    gain = weighted - affinity["majority"]
    shared = _span(reference, weighted)
    parts = (
        (reference, "Reference: mean over source experts of the largest\ntransition probability", "mean probability",
         shared),
        (weighted, "Weighted by how often source experts occur\n(= share predicted right, in-sample)",
         "share of tokens", shared),
        (gain, "Weighted minus majority: gain over naming the\ntarget's most common expert", "share of tokens",
         _span(gain, low=0.0)),
        (nmi, "Normalised mutual information\n(0 = independent, 1 = each determines the other)", "NMI",
         _span(nmi, low=0.0)),
    )  # fmt: skip
    return _pair_panels((2, 2), layers, ("target layer", "source layer"), parts)


def plot_correlation(correlation):
    """Pearson r of expert ids, the same data with every layer's ids shuffled, and Cramer's V, for all layer pairs.

    `correlation`: correlation.npz. The middle panel shows what of the left one is the numbering of the experts.
    """
    layers = _layers_of(correlation)
    ids, shuffled = correlation["id_correlation"], correlation["id_correlation_relabelled"]
    associated = correlation["cramers_v"]
    bound = max(abs(limit) for limit in _span(ids, shuffled))
    renumbered = "The same tokens, experts renumbered at random:\nr changes, the model does not"
    parts = (
        (ids, "Pearson r of expert ids (the reference's)", "Pearson r", (-bound, bound)),
        (shuffled, renumbered, "Pearson r", (-bound, bound)),
        (associated, "Cramér's V: independent of the numbering", "Cramér's V", _span(associated, low=0.0)),
    )
    return _pair_panels((1, 3), layers, ("layer", "layer"), parts)

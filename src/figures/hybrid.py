"""Figures and tables of what scripts 03 to 07 measure: sparsity, alpha, layers, gates at a glance, and the verdict.

Each `plot_*` function takes what `style.read_result` returned, draws one matplotlib Figure and returns it.
"""

import textwrap
import unicodedata

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from src.figures import style

# The gates whose quality and cost are compared at a glance; the others have figures of their own (gating.py).
OVERVIEW = (
    "baseline", "fixed", "random", "routing hard", "ffn_sparsity hard", "routing soft", "ffn_sparsity soft",
    "routing hard threshold", "learned",
)  # fmt: skip
ALPHA = "alpha (0 = attention only, 1 = Mamba only)"


# -- sparsity
def _sparsity_map(axes, values, layers, rows):
    """Heat map of mean sparsity [rows, layers], with numbers where there is room for them."""
    sns.heatmap(
        values, ax=axes, cmap=style.SPARSITY_MAP, cbar_kws={"label": "sparsity"}, annot=len(layers) <= 16, fmt=".2f",
        annot_kws={"fontsize": 8}, xticklabels=style.sparse_labels(layers, 32), yticklabels=rows,
    )  # fmt: skip
    axes.tick_params(axis="both", rotation=0)


def plot_sparsity_heatmap(routing):
    """Heat map prompts x layers of mean sparsity (in brackets: over all layers), and below it the mean over prompts
    with their range. `routing`: routing_signals.json."""
    prompts = routing["prompts"]
    table = pd.DataFrame([prompt["per_layer_sparsity"] for prompt in prompts]).rename(columns=int).sort_index(axis=1)
    layers, values = list(table.columns), table.to_numpy(float)  # [prompts, L]
    height = 0.4 * len(prompts)
    sizes = (max(8.0, 3.5 + 0.5 * len(layers)), 3.6 + height)
    figure, (top, bottom) = style.new_figure(*sizes, 2, 1, height_ratios=[max(height, 1.2), 2.0])
    names = [f"{style.plain(prompt['prompt'], 36)} ({prompt['overall_sparsity']:.2f})" for prompt in prompts]
    _sparsity_map(top, values, layers, names)
    top.tick_params(axis="y", labelsize=9)
    style.named(top, "layer")
    top.set_title(f"Mean sparsity per prompt and layer, {style.plain(routing['model'])}")
    bottom.fill_between(layers, values.min(0), values.max(0), color=style.LIGHT_BLUE, alpha=0.35, lw=0)
    bottom.plot(layers, values.mean(0), "o-", color=style.BLUE, ms=4)
    bottom.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    style.named(bottom, "layer", "sparsity", "Mean over prompts (line), smallest to largest prompt (band)")
    style.whole_numbers(bottom)
    return figure


def token_sparsity(prompt, layer=None):
    """Sparsity of each token [T] in one layer, or its mean over layers. Raises IndexError by name."""
    values = np.asarray(prompt["per_token_sparsity"], dtype=float)  # [L, T]
    if layer is None:
        return values.mean(0)
    if not 0 <= layer < len(values):
        raise IndexError(f"layer {layer} is not there: this model has layers 0 to {len(values) - 1}")
    return values[layer]


def text_colour(rgba):
    """Black or white, whichever contrasts more with a background (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def token_colours(values):
    """Background colours [T, 4] from the least to the largest of the values."""
    return matplotlib.colormaps[style.SPARSITY_MAP]((values - values.min()) / max(np.ptp(values), 1e-12))


def plot_token_text(prompt, layer=None, line_characters=76):
    """One prompt (an entry of `prompts[]`) as wrapped monospaced text, each token's background coloured by sparsity.

    layer: index, or None for the mean over layers. The scale runs from the prompt's least to its most sparse token.
    """
    values = token_sparsity(prompt, layer)
    placed, row, column = [], 0, 0  # (row, column, cell width, text, colour)
    for token, colour in zip(prompt["tokens"], token_colours(values), strict=True):
        text = "".join("\ufffd" if unicodedata.category(c)[0] == "C" and c != "\n" else c for c in token)
        shown = text.replace("\n", "↵") or "∅"
        cells = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)
        if column and column + cells > line_characters:
            row, column = row + 1, 0
        placed.append((row, column, cells, shown, colour))
        column += cells
        if "\n" in text:
            row, column = row + 1, 0
    rows = placed[-1][0] + 1
    figure = Figure(figsize=(0.112 * line_characters + 0.4, 0.28 * rows + 1.1), layout="constrained")
    axes = figure.subplots()
    for row, column, cells, shown, colour in placed:
        axes.add_patch(Rectangle((column, row), cells, 0.92, color=colour, lw=0))
        axes.text(
            column + cells / 2, row + 0.46, shown, family="monospace", fontsize=10, ha="center", va="center",
            color=text_colour(colour), parse_math=False,
        )  # fmt: skip
    axes.set_xlim(0, line_characters)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    where = "mean over layers" if layer is None else f"layer {layer}"
    axes.set_title(f"Tokens coloured by sparsity ({where})", fontsize=11)
    scale = ScalarMappable(Normalize(values.min(), values.max()), style.SPARSITY_MAP)
    figure.colorbar(scale, ax=axes, orientation="horizontal", label="sparsity", aspect=60, pad=0.02, shrink=0.6)
    return figure


def plot_token_heatmap(prompt, most_tokens=64):
    """Heat map layer x token of one prompt's sparsity; the first `most_tokens` tokens, so that labels stay legible."""
    values = np.asarray(prompt["per_token_sparsity"], dtype=float)[:, :most_tokens]  # [L, T]
    layers, count = values.shape
    figure, axes = style.new_figure(max(7.0, 2.2 + 0.22 * count), 2.2 + 0.24 * layers)
    sns.heatmap(
        values, ax=axes, cmap=style.SPARSITY_MAP, cbar_kws={"label": "sparsity"}, xticklabels=False, yticklabels=False
    )
    axes.set_xticks(np.arange(count) + 0.5, [style.plain(token, 12) for token in prompt["tokens"][:count]], rotation=90)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(np.arange(layers) + 0.5, style.sparse_labels(range(layers), 16), rotation=0)
    cut = f" (first {count} of {len(prompt['tokens'])} tokens)" if count < len(prompt["tokens"]) else ""
    title = f"Sparsity per layer and token{cut}: {style.plain(prompt['prompt'], 60)}"
    style.named(axes, "token", "layer", title)
    return figure


def extreme_tokens(routing, count=12):
    """The `count` most and least sparse tokens over all prompts, mean over layers, without each prompt's first token.

    Returns (most, least): DataFrames with token, context (the text before it) and sparsity, from the extreme inwards.
    """
    rows = []
    for prompt in routing["prompts"]:
        tokens = prompt["tokens"]
        for position, value in enumerate(token_sparsity(prompt)[1:], 1):
            rows.append((tokens[position], "".join(tokens[max(0, position - 4) : position]), value))
    table = pd.DataFrame(rows, columns=["token", "context", "sparsity"]).sort_values("sparsity", kind="stable")
    return tuple(rows.head(count).reset_index(drop=True) for rows in (table[::-1], table))


def plot_extreme_tokens(routing, count=12):
    """Two panels of bars: the most and the least sparse tokens of the prompts, each with the text before it."""
    figure, panels = style.new_figure(11, 1.4 + 0.28 * count, 1, 2)
    titles = (("Most sparse (few experts)", style.ORANGE), ("Least sparse (many experts)", style.BLUE))
    for axes, table, (title, colour) in zip(panels, extreme_tokens(routing, count), titles, strict=True):
        axes.barh(range(len(table)), table["sparsity"], color=colour, height=0.7)
        labels = [
            f"{'…' + style.plain(context[-18:]) if context else ''} [{style.plain(token, 16)}]"
            for context, token in zip(table["context"], table["token"], strict=True)
        ]
        style.name_rows(axes, labels)
        for row, value in enumerate(table["sparsity"]):
            axes.text(value + 0.01, row, f"{value:.2f}", va="center", fontsize=8)
        axes.set_xlim(0, 1.1)
        style.named(axes, "sparsity, mean over layers", title=title)
    return figure


def plot_text_sparsity(by_layer):
    """TLS and CLS_k per layer of the evaluation text (bars: 95 %, documents). `by_layer`: routing_by_layer.csv."""
    figure, axes = style.new_figure(8, 4.2)
    chunks = sorted(int(column[4:]) for column in by_layer if column.startswith("cls_") and column[4:].isdigit())
    names = ["tls", *(f"cls_{chunk}" for chunk in chunks)]
    colours = sns.color_palette("cividis", len(names))
    for name, colour, marker in zip(names, colours, style.MARKERS, strict=False):
        label = "TLS (single tokens)" if name == "tls" else f"CLS$_{{{name[4:]}}}$ (windows of {name[4:]} tokens)"
        bars = style.reach(by_layer, name, f"{name}_ci_low", f"{name}_ci_high")
        layers = by_layer["layer"].astype(int)
        axes.errorbar(layers, by_layer[name], yerr=bars, color=colour, marker=marker, ms=4.5, capsize=2.5, label=label)
    axes.set_ylim(0, 1)
    style.whole_numbers(axes)
    title = "Sparsity of tokens and of windows of tokens, evaluation text"
    style.named(axes, "layer", "sparsity (fraction of inactive experts)", title)
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return figure


def plot_token_kinds(by_kind):
    """Heat map kind of token x layer of mean sparsity over the evaluation text. `by_kind`: routing_by_kind.csv."""
    table = by_kind.assign(layer=by_kind["layer"].astype(int)).pivot(index="kind", columns="layer", values="sparsity")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index]
    tokens = by_kind.groupby("kind")["tokens"].max()
    figure, axes = style.new_figure(max(7.5, 3.2 + 0.5 * table.shape[1]), 1.5 + 0.36 * len(table))
    names = [f"{kind} ({tokens[kind]:,})" for kind in table.index]
    _sparsity_map(axes, table.to_numpy(), list(table.columns), names)
    style.named(axes, "layer", "kind of token (tokens)", "Sparsity by kind of token, evaluation text")
    return figure


# -- alpha sweep
def alpha_rows(sweep):
    """Split alpha_sweep_results.csv into (baseline row, DataFrame with numeric alpha in rising order)."""
    is_baseline = sweep["alpha"] == "baseline"
    rows = sweep[~is_baseline].assign(alpha=lambda rows: pd.to_numeric(rows["alpha"]))
    return sweep[is_baseline].iloc[0], rows.sort_values("alpha", ignore_index=True)


def _interval(axes, x, rows, colour, marker, label, line="-"):
    """Line of delta NLL with 95 % intervals."""
    bars = style.reach(rows, "delta_nll", "ci_low", "ci_high")
    axes.errorbar(x, rows["delta_nll"], yerr=bars, color=colour, marker=marker, ls=line, ms=5, capsize=3, label=label)


def plot_alpha_sweep(sweep, untrained=None):
    """Delta NLL with 95 % intervals (left) and perplexity (right) against alpha.

    `sweep`: alpha_sweep_results.csv; `untrained`, the control: alpha_sweep_untrained.csv.
    """
    baseline, rows = alpha_rows(sweep)
    figure, (left, right) = style.new_figure(11, 4.2, 1, 2)
    curves = [("distilled sidecars", rows, style.BLUE, "o", "-")]
    if untrained is not None:
        curves.append(("untrained sidecars (control)", alpha_rows(untrained)[1], style.VERMILION, "X", "--"))
    for label, data, colour, marker, line in curves:
        _interval(left, data["alpha"], data, colour, marker, label, line)
        right.plot(data["alpha"], data["perplexity"], color=colour, marker=marker, ls=line, ms=5, label=label)
    left.axhline(0, color=style.BLACK, lw=1)
    right.axhline(baseline["perplexity"], color=style.BLACK, lw=1, label=f"baseline {baseline['perplexity']:.2f}")
    # The control may be orders of magnitude worse: the left panel keeps the distilled curve legible.
    highest = [data["ci_high"].max() for _, data, *_ in curves]
    clipped = highest[-1] > 4 * max(highest[0], 1e-6)
    top = 1.15 * (highest[0] if clipped else max(highest))
    if top > 0:
        left.set_ylim(1.15 * min(0.0, rows["ci_low"].min()) - 0.04 * top, top)
    values = pd.concat([data["perplexity"] for _, data, *_ in curves])
    scale = style.logarithmic(right) if values.max() > 3 * values.min() else ""
    note = "; the control leaves the panel" if clipped else ""
    style.named(left, ALPHA, style.DELTA_NLL, f"Cost of mixing in the Mamba path (bars: 95 %{note})")
    style.named(right, ALPHA, f"perplexity per token{scale}", "Perplexity")
    for axes in (left, right):
        axes.legend(fontsize=8.5)
    return figure


def plot_alpha_domains(domains):
    """Delta NLL against alpha per domain with 95 % intervals. `domains`: alpha_sweep_domains.csv.

    An interval that spans sections of one work only is drawn dotted and named so.
    """
    figure, axes = style.new_figure(7.5, 4.2)
    palette = sns.color_palette("colorblind")
    for index, (domain, data) in enumerate(domains.groupby("domain", sort=True)):
        rows, interval = alpha_rows(data)[1], data["interval"].iloc[0]
        within = interval != "documents"
        label = style.plain(f"{domain} ({interval})" if within else domain)
        x, marker = rows["alpha"] + (index - 1.5) * 0.006, style.series(index)[1]
        _interval(axes, x, rows, palette[index], marker, label, ":" if within else "-")
    axes.axhline(0, color=style.BLACK, lw=1)
    style.named(axes, ALPHA, style.DELTA_NLL, "Cost of the Mamba path per domain (bars: 95 %)")
    axes.legend(fontsize=8.5)
    return figure


# -- layer replacement
def plot_layer_replacement(replacement):
    """Ranked bars of each layer alone at alpha 1, then of the combinations. layer_replacement_results.csv."""
    together = replacement["layer"].str.startswith("combined")
    single = replacement[~together].sort_values("delta_nll")
    rows = pd.concat([single, replacement[together]])
    labels = [f"layer {layer}" for layer in single["layer"]]
    labels += [_combined_label(layer) for layer in replacement.loc[together, "layer"]]
    colours = [style.BLUE] * len(single) + [style.ORANGE] * together.sum()
    # one text line per row, more for combinations that wrap
    heights = [label.count("\n") + 1 for label in labels]
    positions = np.cumsum(heights) - np.array(heights) / 2 + (np.arange(len(labels)) >= len(single)) * 0.6
    figure, axes = style.new_figure(8.5, 1.6 + 0.27 * (sum(heights) + 0.6))
    axes.barh(positions, rows["delta_nll"], color=colours, height=0.7)
    errors = style.reach(rows, "delta_nll", "ci_low", "ci_high")
    axes.errorbar(rows["delta_nll"], positions, xerr=errors, fmt="none", ecolor="black", capsize=2.5, lw=1)
    furthest = max(rows["ci_high"].max(), 1e-9)
    for position, high, percent in zip(positions, rows["ci_high"], rows["pct_change"], strict=True):
        axes.text(max(high, 0) + 0.015 * furthest, position, f"{percent:+.1f} % ppl", va="center", fontsize=8)
    axes.set_yticks(positions, labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=1)
    axes.set_xlim(min(0.0, rows["ci_low"].min()) * 1.1, furthest * 1.2)
    title = "Attention replaced by its Mamba sidecar (alpha 1): each layer alone, then the safest together"
    style.named(axes, style.DELTA_NLL, title=title)
    axes.grid(axis="y", visible=False)
    return figure


def _combined_label(name):
    """`combined_[1,2,3]` -> "3 safest: 1, 2, 3", wrapped."""
    layers = name.removeprefix("combined_").strip("[]").replace(" ", "").replace(";", ",").split(",")
    return textwrap.fill(f"{len(layers)} safest: {', '.join(layers)}", 34)


# -- gates
def _overview(gated):
    """The rows of the baseline, the deployable gates and each share's random control, with `family`: of OVERVIEW.

    Further temperatures and signals are in the family of the gate that they vary.
    """
    rows = style.name_gates(gated)
    rows = rows[(rows["kind"] != "control") | (rows["name"] == "random")]
    families = [name if name in OVERVIEW else " ".join(name.split(" ")[:2]) for name in rows["name"]]
    return rows.assign(family=families)


def plot_gates(gated):
    """Left: delta NLL with 95 % intervals against the realised mamba share, one series per gate. Right: the difference
    to the random control at the same share (paired, 95 %); left of zero is better than chance.

    `gated`: gated_hybrid_results.csv.
    """
    rows = _overview(gated)
    rows = rows[rows["name"] != "baseline"]
    against = rows[rows["vs_random"].notna()]
    against = against.iloc[np.argsort(against["share_realised"].round(2), kind="stable")]
    figure, (left, right) = style.new_figure(12.5, max(4.6, 1.5 + 0.27 * len(against)), 1, 2, width_ratios=[1, 1.05])
    # variants have the share of a gate drawn already: they stand in the right panel only
    names = [name for name in OVERVIEW if name in set(rows["name"])]
    markers = dict(zip(OVERVIEW, "_sXooDDP^", strict=True))
    for name, offset in zip(names, np.linspace(-0.02, 0.02, max(len(names), 2)), strict=False):
        data = rows[rows["name"] == name].sort_values("share_realised")
        line = "-" if len(data) > 1 else ""
        x = data["share_realised"] + offset
        _interval(left, x, data, style.gate_colour(name), markers[name], style.gate_label(name), line)
    left.axhline(0, color="black", lw=1)
    left.set_xlim(0, 1.02)
    x = "realised mamba share (points shifted sideways to part them)"
    style.named(left, x, style.DELTA_NLL, "Quality at equal share (lower is better; bars: 95 %)")
    left.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)

    for place, family in enumerate(against["family"]):
        one = against.iloc[[place]]
        style.dots(right, one, [place], style.VERSUS_RANDOM, style.gate_colour(family), markers[family])
    right.axvline(0, color="black", lw=1)
    style.name_rows(right, [style.plain(mode) for mode in against["mode"]])
    title = "Against chance (left of 0: better than random; bars: 95 %, paired)"
    style.named(right, "NLL minus random control at the same share (nats per token)", title=title)
    return figure


def plot_cost(gated, sweep=None):
    """FLOPs per token, tokens per second and peak memory of each gate, and the decode speed of each alpha.

    `gated`: gated_hybrid_results.csv; `sweep`: alpha_sweep_results.csv. FLOPs ideal: a hard-gated token pays only its
    own path; executed: what the code runs (both paths).
    """
    rows = _overview(gated)
    rows = rows[rows["name"].isin(OVERVIEW)]
    panels = 4 if sweep is not None else 3
    figure, axes = style.new_figure(4.0 * panels + 0.5, 1.4 + 0.27 * len(rows), 1, panels)
    y, colours = np.arange(len(rows)), [style.gate_colour(name) for name in rows["name"]]
    axes[0].barh(y - 0.19, rows["flops_ideal"] / 1e6, height=0.36, color=colours)
    axes[0].barh(y + 0.19, rows["flops_executed"] / 1e6, height=0.36, color="white", edgecolor=colours, hatch="////")
    axes[1].barh(y, rows["tokens_per_second"], color=colours, height=0.7)
    axes[2].barh(y, rows["memory_gb"], color=colours, height=0.7)
    for axis in axes[:3]:
        style.name_rows(axis, [style.plain(mode) for mode in rows["mode"]], axis is axes[0])
    if sweep is not None:
        axes[3].barh(range(len(sweep)), sweep["decode_tokens_per_second"], color=style.ORANGE, height=0.7)
        style.name_rows(axes[3], sweep["alpha"].where(sweep["alpha"] == "baseline", "alpha " + sweep["alpha"]))
    titles = (
        ("FLOPs: ideal (solid), executed (hatched)", "MFLOPs per token"),
        ("Speed (no prefill saving: both paths run)", "tokens/s, scoring whole windows"),
        ("Memory", "peak memory (GB)"),
        ("Decode speed (alpha sweep)", "tokens/s, decoding one sequence"),
    )
    for axis, (title, label) in zip(axes, titles, strict=False):
        style.named(axis, label, title=title)
    return figure


# -- summary and verdict
def summary_table(sweep, gated, alpha=0.3, routing_mode="routing_hard_0.5"):
    """The table metric x (baseline, the alpha nearest to `alpha`, routing-gated), as text.

    `routing_mode` falls back to the first gate that goes by sparsity; speed is that of scoring.
    """
    baseline, rows = alpha_rows(sweep)
    fixed = rows.iloc[(rows["alpha"] - alpha).abs().argmin()]
    by_sparsity = gated[gated["kind"].isin(["routing", "ffn_sparsity"])]
    # the mode that was asked for stands first, where it is there
    routed = by_sparsity.sort_values("mode", key=lambda modes: modes != routing_mode, kind="stable").iloc[0]
    columns = {"baseline": baseline, f"alpha {fixed['alpha']:g}": fixed, f"routing-gated ({routed['mode']})": routed}
    metrics = (
        ("perplexity", "perplexity", 1, "{:.3f}"),
        ("Δ NLL (nats per token)", "delta_nll", 1, "{:+.4f}"),
        ("tokens/s (scoring)", "tokens_per_second", 1, "{:,.0f}"),
        ("peak memory (GB)", "memory_gb", 1, "{:.2f}"),
        ("MFLOPs per token, ideal", "flops_ideal", 1e-6, "{:.2f}"),
        ("MFLOPs per token, executed", "flops_executed", 1e-6, "{:.2f}"),
    )
    cells = {
        label: [style.number_text(factor * row[column], form) for row in columns.values()]
        for label, column, factor, form in metrics
    }
    return pd.DataFrame.from_dict(cells, orient="index", columns=list(columns))


def verdict_text(verdict, width=110):
    """verdict.json as a few wrapped lines of plain text: label, rule, verdict, the user's criterion."""
    parts = (
        ("Label", verdict["label"]),
        ("Rule (stated before the run)", verdict["rule"]),
        ("Verdict", f"{verdict['outcome'].upper()}. {verdict['verdict']}"),
        ("User's criterion", verdict["user_criterion"]["statement"]),
        ("Answer", verdict["user_criterion"]["words"]),
    )
    return "\n".join(textwrap.fill(f"{name}: {text}", width, subsequent_indent="    ") for name, text in parts)

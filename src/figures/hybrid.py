"""Every figure and table of the hybrid study, drawn from saved results (paths, DataFrames, dicts); no torch.

Each `plot_*` function takes what `style.read_result` returned, draws one matplotlib Figure and returns it. Text from
prompts goes through `plain`, because matplotlib would read a pair of `$` as mathematics.
"""

import math
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from src.figures.style import (
    BLACK,
    BLUE,
    DELTA_NLL,
    LIGHT_BLUE,
    MARKERS,
    ORANGE,
    SPARSITY_MAP,
    VERMILION,
    gate_colour,
    gate_label,
    name_gates,
    new_figure,
    plain,
    reach,
    sparse_labels,
)

# The gates whose quality and cost are compared at a glance; the others have figures of their own (gating.py).
OVERVIEW = (
    "baseline", "fixed", "random", "routing hard", "ffn_sparsity hard", "routing soft", "ffn_sparsity soft",
    "routing hard threshold", "learned",
)  # fmt: skip


# -- sparsity
def _per_layer(prompt):
    """per_layer_sparsity {"0": ...} of one prompt -> array [L], in layer order."""
    items = sorted(prompt["per_layer_sparsity"].items(), key=lambda item: int(item[0]))
    return np.array([value for _, value in items], dtype=float)


def _layers(routing):
    """Layer indices of a routing_signals.json, in order."""
    return sorted(int(layer) for layer in routing["prompts"][0]["per_layer_sparsity"])


def plot_sparsity_heatmap(routing):
    """Heat map prompts x layers of mean sparsity (in brackets: over all layers), and below it the mean over prompts
    with their range. `routing`: routing_signals.json as a dict."""
    prompts, layers = routing["prompts"], _layers(routing)
    values = np.stack([_per_layer(prompt) for prompt in prompts])  # [prompts, L]
    height = 0.4 * len(prompts)
    figure, (top, bottom) = new_figure(
        max(8.0, 3.5 + 0.5 * len(layers)), 3.6 + height, 2, 1, height_ratios=[max(height, 1.2), 2.0]
    )
    sns.heatmap(
        values,
        ax=top,
        cmap=SPARSITY_MAP,
        annot=len(layers) <= 16,
        fmt=".2f",
        annot_kws={"fontsize": 8},
        cbar_kws={"label": "sparsity"},
        xticklabels=sparse_labels(layers, 32),
        yticklabels=[f"{plain(prompt['prompt'], 36)} ({prompt['overall_sparsity']:.2f})" for prompt in prompts],
    )
    top.tick_params(axis="x", rotation=0)
    top.tick_params(axis="y", rotation=0, labelsize=9)
    top.set_xlabel("layer")
    top.set_title(f"Mean sparsity per prompt and layer, {plain(routing['model'])}")
    bottom.fill_between(layers, values.min(0), values.max(0), color=LIGHT_BLUE, alpha=0.35, lw=0)
    bottom.plot(layers, values.mean(0), "o-", color=BLUE, ms=4)
    bottom.set_xlabel("layer")
    bottom.set_ylabel("sparsity")
    bottom.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    bottom.set_title("Mean over prompts (line), smallest to largest prompt (band)", fontsize=10)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _token_sparsity(prompt, layer):
    """Sparsity per token [T]: of one layer, or the mean over layers when `layer` is None. Raises IndexError by name."""
    values = np.asarray(prompt["per_token_sparsity"], dtype=float)  # [L, T]
    if layer is None:
        return values.mean(0)
    if not 0 <= layer < len(values):
        raise IndexError(f"layer {layer} is not there: this model has layers 0 to {len(values) - 1}")
    return values[layer]


def _text_colour(rgba):
    """Black or white, whichever contrasts more with a background (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def plot_token_text(prompt, layer=None, line_characters=76):
    """One prompt (an entry of `prompts[]`) as wrapped monospaced text, each token's background coloured by sparsity.

    layer: index, or None for the mean over layers. The scale runs from the prompt's least to its most sparse token.
    """
    values = _token_sparsity(prompt, layer)
    low, high = float(values.min()), float(values.max())
    colours = matplotlib.colormaps[SPARSITY_MAP](np.clip((values - low) / max(high - low, 1e-12), 0, 1))
    placed, row, column = [], 0, 0  # (row, column, cell width, text, colour)
    for token, colour in zip(prompt["tokens"], colours, strict=True):
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
            color=_text_colour(colour), parse_math=False,
        )  # fmt: skip
    axes.set_xlim(0, line_characters)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    where = "mean over layers" if layer is None else f"layer {layer}"
    axes.set_title(f"Tokens coloured by sparsity ({where})", fontsize=11)
    scale = ScalarMappable(Normalize(low, high), SPARSITY_MAP)
    figure.colorbar(scale, ax=axes, orientation="horizontal", label="sparsity", aspect=60, pad=0.02, shrink=0.6)
    return figure


def plot_token_heatmap(prompt, most_tokens=64):
    """Heat map layer x token of one prompt's sparsity; the first `most_tokens` tokens, so that labels stay legible."""
    values = np.asarray(prompt["per_token_sparsity"], dtype=float)[:, :most_tokens]  # [L, T]
    layers, count = values.shape
    figure, axes = new_figure(max(7.0, 2.2 + 0.22 * count), 2.2 + 0.24 * layers)
    sns.heatmap(
        values, ax=axes, cmap=SPARSITY_MAP, cbar_kws={"label": "sparsity"}, xticklabels=False, yticklabels=False
    )
    axes.set_xticks(np.arange(count) + 0.5, [plain(token, 12) for token in prompt["tokens"][:count]], rotation=90)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(np.arange(layers) + 0.5, sparse_labels(range(layers), 16), rotation=0)
    axes.set_xlabel("token")
    axes.set_ylabel("layer")
    cut = f" (first {count} of {len(prompt['tokens'])} tokens)" if count < len(prompt["tokens"]) else ""
    axes.set_title(f"Sparsity per layer and token{cut}: {plain(prompt['prompt'], 60)}", fontsize=10)
    return figure


def extreme_tokens(routing, count=12):
    """The `count` most and least sparse tokens over all prompts, mean over layers, without each prompt's first token.

    Returns (most, least): DataFrames with token, context (the text before it) and sparsity, from the extreme inwards.
    """
    rows = []
    for prompt in routing["prompts"]:
        values, tokens = _token_sparsity(prompt, None), prompt["tokens"]
        for position in range(1, len(tokens)):
            before = "".join(tokens[max(0, position - 4) : position])
            rows.append({"token": tokens[position], "context": before, "sparsity": float(values[position])})
    table = pd.DataFrame(rows, columns=["token", "context", "sparsity"]).sort_values("sparsity", kind="stable")
    least, most = table.head(count), table.iloc[::-1].head(count)
    return most.reset_index(drop=True), least.reset_index(drop=True)


def plot_extreme_tokens(routing, count=12):
    """Two panels of bars: the most and the least sparse tokens of the prompts, each with the text before it."""
    figure, panels = new_figure(11, 1.4 + 0.28 * count, 1, 2)
    titles = ("Most sparse (few experts)", "Least sparse (many experts)")
    for axes, table, title, colour in zip(panels, extreme_tokens(routing, count), titles, (ORANGE, BLUE), strict=True):
        axes.barh(range(len(table)), table["sparsity"], color=colour, height=0.7)
        labels = [
            f"{'…' + plain(context[-18:]) if context else ''} [{plain(token, 16)}]"
            for context, token in zip(table["context"], table["token"], strict=True)
        ]
        axes.set_yticks(range(len(table)), labels, fontsize=8.5)
        for row, value in enumerate(table["sparsity"]):
            axes.text(value + 0.01, row, f"{value:.2f}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("sparsity, mean over layers")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", visible=False)
    return figure


def plot_text_sparsity(by_layer):
    """TLS and CLS_k per layer of the evaluation text (bars: 95 %, documents). `by_layer`: routing_by_layer.csv."""
    figure, axes = new_figure(8, 4.2)
    chunks = sorted(int(column[4:]) for column in by_layer if column.startswith("cls_") and column[4:].isdigit())
    names = ["tls", *(f"cls_{chunk}" for chunk in chunks)]
    colours = sns.color_palette("cividis", len(names))
    for name, colour, marker in zip(names, colours, MARKERS, strict=False):
        label = "TLS (single tokens)" if name == "tls" else f"CLS$_{{{name[4:]}}}$ (windows of {name[4:]} tokens)"
        bars = reach(by_layer, name, f"{name}_ci_low", f"{name}_ci_high")
        layers = by_layer["layer"].astype(int)
        axes.errorbar(layers, by_layer[name], yerr=bars, color=colour, marker=marker, ms=4.5, capsize=2.5, label=label)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("sparsity (fraction of inactive experts)")
    axes.set_title("Sparsity of tokens and of windows of tokens, evaluation text", fontsize=10)
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return figure


def plot_token_kinds(by_kind):
    """Heat map kind of token x layer of mean sparsity over the evaluation text. `by_kind`: routing_by_kind.csv."""
    table = by_kind.assign(layer=by_kind["layer"].astype(int)).pivot(index="kind", columns="layer", values="sparsity")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index]
    tokens = by_kind.groupby("kind")["tokens"].max()
    figure, axes = new_figure(max(7.5, 3.2 + 0.5 * table.shape[1]), 1.5 + 0.36 * len(table))
    sns.heatmap(
        table,
        ax=axes,
        cmap=SPARSITY_MAP,
        annot=table.shape[1] <= 16,
        fmt=".2f",
        annot_kws={"fontsize": 8},
        cbar_kws={"label": "sparsity"},
        xticklabels=sparse_labels(list(table.columns), 32),
        yticklabels=[f"{kind} ({tokens[kind]:,})" for kind in table.index],
    )
    axes.tick_params(axis="both", rotation=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("kind of token (tokens)")
    axes.set_title("Sparsity by kind of token, evaluation text", fontsize=10)
    return figure


# -- alpha sweep
def alpha_rows(sweep):
    """Split alpha_sweep_results.csv into (baseline row, DataFrame with numeric alpha in rising order)."""
    is_baseline = sweep["alpha"].astype(str) == "baseline"
    rows = sweep[~is_baseline].copy()
    rows["alpha"] = pd.to_numeric(rows["alpha"])
    return sweep[is_baseline].iloc[0], rows.sort_values("alpha").reset_index(drop=True)


def _interval(axes, x, rows, colour, marker, label, line="-"):
    """Line of delta NLL with 95 % intervals."""
    bars = reach(rows, "delta_nll", "ci_low", "ci_high")
    axes.errorbar(x, rows["delta_nll"], yerr=bars, color=colour, marker=marker, ls=line, ms=5, capsize=3, label=label)


def plot_alpha_sweep(sweep, untrained=None):
    """Delta NLL with 95 % intervals (left) and perplexity (right) against alpha; distilled sidecars, and the untrained
    control where given. `sweep`, `untrained`: alpha_sweep_results.csv and alpha_sweep_untrained.csv as DataFrames."""
    baseline, rows = alpha_rows(sweep)
    figure, (left, right) = new_figure(11, 4.2, 1, 2)
    series = [("distilled sidecars", rows, BLUE, "o", "-")]
    if untrained is not None:
        series.append(("untrained sidecars (control)", alpha_rows(untrained)[1], VERMILION, "X", "--"))
    for label, data, colour, marker, line in series:
        _interval(left, data["alpha"], data, colour, marker, label, line)
        right.plot(data["alpha"], data["perplexity"], color=colour, marker=marker, ls=line, ms=5, label=label)
    left.axhline(0, color=BLACK, lw=1)
    right.axhline(float(baseline["perplexity"]), color=BLACK, lw=1, label=f"baseline {baseline['perplexity']:.2f}")
    # The control may be orders of magnitude worse: the left panel keeps the distilled curve legible.
    highest = [float(data["ci_high"].max()) for _, data, *_ in series]
    lowest = min(0.0, float(rows["ci_low"].min()))
    clipped = highest[-1] > 4 * max(highest[0], 1e-6)
    top = 1.15 * (highest[0] if clipped else max(highest))
    if top > 0:
        left.set_ylim(1.15 * lowest - 0.04 * top, top)
    values = pd.concat([data["perplexity"] for _, data, *_ in series])
    logarithmic = values.max() > 3 * values.min()
    if logarithmic:
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        right.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel(DELTA_NLL)
    right.set_ylabel("perplexity per token" + (" (logarithmic)" if logarithmic else ""))
    note = "; the control leaves the panel" if clipped else ""
    left.set_title(f"Cost of mixing in the Mamba path (bars: 95 %{note})", fontsize=10)
    right.set_title("Perplexity", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("alpha (0 = attention only, 1 = Mamba only)")
        axes.legend(fontsize=8.5)
    return figure


def plot_alpha_domains(domains):
    """Delta NLL against alpha per domain with 95 % intervals. `domains`: alpha_sweep_domains.csv. An interval that
    spans sections of one work only is drawn thin and named so."""
    figure, axes = new_figure(7.5, 4.2)
    palette = sns.color_palette("colorblind")
    for index, (domain, data) in enumerate(domains.groupby("domain", sort=True)):
        rows = alpha_rows(data)[1]
        within = str(data["interval"].iloc[0]) != "documents"
        label = f"{plain(domain)} ({plain(data['interval'].iloc[0])})" if within else plain(domain)
        offset = (index - 1.5) * 0.006
        _interval(
            axes,
            rows["alpha"] + offset,
            rows,
            palette[index],
            MARKERS[index % len(MARKERS)],
            label,
            ":" if within else "-",
        )
    axes.axhline(0, color=BLACK, lw=1)
    axes.set_xlabel("alpha (0 = attention only, 1 = Mamba only)")
    axes.set_ylabel(DELTA_NLL)
    axes.set_title("Cost of the Mamba path per domain (bars: 95 %)", fontsize=10)
    axes.legend(fontsize=8.5)
    return figure


# -- layer replacement
def plot_layer_replacement(replacement):
    """Ranked bars with 95 % intervals: each layer alone at alpha 1 (cheapest first), then the combinations."""
    single = replacement[~replacement["layer"].astype(str).str.startswith("combined")].sort_values("delta_nll")
    combined = replacement[replacement["layer"].astype(str).str.startswith("combined")]
    rows = pd.concat([single, combined])
    centre = rows["delta_nll"].to_numpy(float)
    errors = reach(rows, "delta_nll", "ci_low", "ci_high")
    labels = [
        f"layer {layer}" if not layer.startswith("combined") else _combined_label(layer)
        for layer in rows["layer"].astype(str)
    ]
    colours = [BLUE] * len(single) + [ORANGE] * len(combined)
    # one text line per row, more for combinations that wrap
    heights = [label.count("\n") + 1 for label in labels]
    positions = np.cumsum(heights) - np.array(heights) / 2 + (np.arange(len(labels)) >= len(single)) * 0.6
    figure, axes = new_figure(8.5, 1.6 + 0.27 * (sum(heights) + 0.6))
    axes.barh(positions, centre, color=colours, height=0.7)
    axes.errorbar(centre, positions, xerr=errors, fmt="none", ecolor="black", capsize=2.5, lw=1)
    furthest = max(float(np.max(rows["ci_high"])), 1e-9)
    for position, high, percent in zip(positions, rows["ci_high"], rows["pct_change"], strict=True):
        axes.text(max(high, 0) + 0.015 * furthest, position, f"{percent:+.1f} % ppl", va="center", fontsize=8)
    axes.set_yticks(positions, labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=1)
    low = min(0.0, float(rows["ci_low"].min()))
    axes.set_xlim(low * 1.1, furthest * 1.2)
    axes.set_xlabel(DELTA_NLL)
    axes.set_title(
        "Attention replaced by its Mamba sidecar (alpha 1): each layer alone, then the safest together", fontsize=10
    )
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
    rows = name_gates(gated)
    rows = rows[(rows["kind"] != "control") | (rows["name"] == "random")]
    families = [name if name in OVERVIEW else " ".join(name.split(" ")[:2]) for name in rows["name"]]
    return rows.assign(family=families)


def plot_gates(gated):
    """Left: delta NLL with 95 % intervals against the realised mamba share, one series per gate. Right: the difference
    to the random control at the same share (paired, 95 %); left of zero is better than chance.

    `gated`: gated_hybrid_results.csv."""
    rows = _overview(gated)
    rows = rows[rows["name"] != "baseline"]
    against = rows[rows["vs_random"].notna()]
    figure, (left, right) = new_figure(12.5, max(4.6, 1.5 + 0.27 * len(against)), 1, 2, width_ratios=[1, 1.05])
    # variants have the share of a gate drawn already: they stand in the right panel only
    names = [name for name in OVERVIEW if name in set(rows["name"])]
    markers = dict(zip(OVERVIEW, "_sXooDDP^", strict=True))
    for name, offset in zip(names, np.linspace(-0.02, 0.02, max(len(names), 2)), strict=False):
        data = rows[rows["name"] == name].sort_values("share_realised")
        line = "-" if len(data) > 1 else ""
        x = data["share_realised"] + offset
        _interval(left, x, data, gate_colour(name), markers[name], gate_label(name), line)
    left.axhline(0, color="black", lw=1)
    left.set_xlim(0, 1.02)
    left.set_xlabel("realised mamba share (points shifted sideways to part them)")
    left.set_ylabel(DELTA_NLL)
    left.set_title("Quality at equal share (lower is better; bars: 95 %)", fontsize=10)
    left.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)

    against = against.iloc[np.argsort(against["share_realised"].round(2), kind="stable")]
    bars = reach(against, "vs_random", "vs_random_ci_low", "vs_random_ci_high")
    for row, (value, family) in enumerate(zip(against["vs_random"], against["family"], strict=True)):
        bar, colour = bars[:, row : row + 1], gate_colour(family)
        right.errorbar(value, row, xerr=bar, color=colour, marker=markers[family], ms=6, capsize=3)
    right.axvline(0, color="black", lw=1)
    right.set_yticks(range(len(against)), [plain(mode) for mode in against["mode"]], fontsize=8.5)
    right.set_ylim(len(against) - 0.4, -0.6)
    right.set_xlabel("NLL minus random control at the same share (nats per token)")
    right.set_title("Against chance (left of 0: better than random; bars: 95 %, paired)", fontsize=10)
    return figure


def plot_cost(gated, sweep=None):
    """Cost of the gates: FLOPs per token (ideal and executed), tokens per second, peak memory, one bar group per mode.

    `gated`: gated_hybrid_results.csv. `sweep` (alpha_sweep_results.csv), where given, adds the decode speed of the
    baseline and of each alpha in a fourth panel. FLOPs ideal: a hard-gated token pays only its own path; executed: what
    the code runs (both paths)."""
    rows = _overview(gated)
    rows = rows[rows["name"].isin(OVERVIEW)]
    panels = 4 if sweep is not None else 3
    figure, axes = new_figure(4.0 * panels + 0.5, 1.4 + 0.27 * len(rows), 1, panels)
    y, colours = np.arange(len(rows)), [gate_colour(name) for name in rows["name"]]
    axes[0].barh(y - 0.19, rows["flops_ideal"] / 1e6, height=0.36, color=colours)
    axes[0].barh(y + 0.19, rows["flops_executed"] / 1e6, height=0.36, color="white", edgecolor=colours, hatch="////")
    axes[1].barh(y, rows["tokens_per_second"], color=colours, height=0.7)
    axes[2].barh(y, rows["memory_gb"], color=colours, height=0.7)
    for axis in axes[:3]:
        axis.set_yticks([])
        axis.set_ylim(len(rows) - 0.4, -0.6)
    axes[0].set_yticks(y, [plain(mode) for mode in rows["mode"]], fontsize=8.5)
    if sweep is not None:
        labels = ["baseline" if alpha == "baseline" else f"alpha {alpha}" for alpha in sweep["alpha"].astype(str)]
        axes[3].barh(range(len(sweep)), sweep["decode_tokens_per_second"], color=ORANGE, height=0.7)
        axes[3].set_yticks(range(len(sweep)), labels, fontsize=8.5)
        axes[3].invert_yaxis()
    words = (
        ("FLOPs: ideal (solid), executed (hatched)", "MFLOPs per token"),
        ("Speed (no prefill saving: both paths run)", "tokens/s, scoring whole windows"),
        ("Memory", "peak memory (GB)"),
        ("Decode speed (alpha sweep)", "tokens/s, decoding one sequence"),
    )
    for axis, (title, label) in zip(axes, words, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
    return figure


# -- summary and verdict
def summary_table(sweep, gated, alpha=0.3, routing_mode="routing_hard_0.5"):
    """The table metric x (baseline, alpha 0.3, routing-gated). -> DataFrame of text, index = metric.

    The alpha nearest to `alpha` is taken; `routing_mode` falls back to the first gate that goes by sparsity. The
    perplexities of both files are on the same evaluation text; speed is that of scoring."""
    base, rows = alpha_rows(sweep)
    fixed = rows.iloc[(rows["alpha"] - alpha).abs().to_numpy().argmin()]
    routing_rows = gated[gated["kind"].isin(["routing", "ffn_sparsity"])]
    exact = routing_rows[routing_rows["mode"] == routing_mode]
    routed = (exact if len(exact) else routing_rows).iloc[0]
    columns = {"baseline": base, f"alpha {fixed['alpha']:g}": fixed, f"routing-gated ({routed['mode']})": routed}
    metrics = (
        ("perplexity", "perplexity", "{:.3f}"),
        ("Δ NLL (nats per token)", "delta_nll", "{:+.4f}"),
        ("tokens/s (scoring)", "tokens_per_second", "{:,.0f}"),
        ("peak memory (GB)", "memory_gb", "{:.2f}"),
        ("MFLOPs per token, ideal", "flops_ideal", "{:.2f}"),
        ("MFLOPs per token, executed", "flops_executed", "{:.2f}"),
    )
    table = {}
    for name, row in columns.items():
        cells = {}
        for label, key, form in metrics:
            value = float(row[key]) / (1e6 if key.startswith("flops") else 1)
            cells[label] = form.format(value) if math.isfinite(value) else "n/a"
        table[name] = cells
    return pd.DataFrame(table)


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

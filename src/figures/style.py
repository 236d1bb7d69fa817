"""What all figures share: reading and writing files, text, colours, and the names of gates.

Colours are Okabe and Ito's colour-blind safe set (Okabe & Ito 2008, "Color Universal Design") for categories, cividis
for amounts. Gates are told apart by the columns that tables of results carry behind `mode`, never by the mode's name.
"""

import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

BLACK, GREY = "#000000", "#7F7F7F"
BLUE, ORANGE, GREEN, PINK, LIGHT_BLUE, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
SERIES = (BLUE, ORANGE, GREEN, PINK, LIGHT_BLUE, VERMILION, BLACK)  # of categories without a colour of their own
MARKERS = "osD^vPX"
SPARSITY_MAP = "cividis"
SIGNED_MAP = "PuOr"
DELTA_NLL = "Δ NLL against baseline (nats per token)"
# an estimate and the ends of its interval: columns of tables of gates
COST = ("delta_nll", "ci_low", "ci_high")
VERSUS_RANDOM = ("vs_random", "vs_random_ci_low", "vs_random_ci_high")
SIGNIFICANT = 0.05  # after Holm's correction

# The groups of gates and their colours, from those that know nothing to those that know everything.
BASELINE, CHANCE, FIXED, REARRANGED = "baseline", "chance", "fixed", "routing, rearranged"
SIGNAL, SOFT, LATER, UNCALIBRATED = "other signals", "soft", "known only after the layer", "uncalibrated"
ROUTING, TRAINED, BOUND = "routing", "trained", "bound: has seen what follows"
COLOURS = {
    BASELINE: BLACK, CHANCE: GREY, FIXED: ORANGE, REARRANGED: ORANGE, SIGNAL: LIGHT_BLUE, SOFT: LIGHT_BLUE,
    LATER: PINK, UNCALIBRATED: PINK, ROUTING: BLUE, TRAINED: GREEN, BOUND: VERMILION,
}  # fmt: skip
# What `name_gates` calls a gate -> (label, group), in the order of figures.
GATES = {
    "baseline": ("baseline (attention only)", BASELINE),
    "fixed": ("fixed alpha", FIXED),
    "random": ("random", CHANCE),
    "token_shuffled": ("routing, tokens shuffled", REARRANGED),
    "block_shuffled": ("routing, blocks shuffled", REARRANGED),
    "inverted": ("routing, inverted", REARRANGED),
    "other_document": ("routing of another document", REARRANGED),
    "position_early": ("early tokens", SIGNAL),
    "position_late": ("late tokens", SIGNAL),
    "token_frequency": ("frequent tokens", SIGNAL),
    "previous_surprisal": ("expected tokens (surprisal)", SIGNAL),
    "hidden_norm": ("hidden-state norm", SIGNAL),
    "residual_norm": ("residual norm", SIGNAL),
    "self_sparsity": ("the layer's own sparsity", LATER),
    "attention_entropy": ("attention entropy", LATER),
    "recall_error": ("recall error of the sidecar", LATER),
    "routing hard": ("routing, hard", ROUTING),
    "routing hard lookahead": ("routing, hard, look-ahead", ROUTING),
    "routing hard threshold": ("routing, uncalibrated threshold", UNCALIBRATED),
    "routing soft": ("routing, soft", SOFT),
    "ffn_sparsity hard": ("FFN sparsity, hard", ROUTING),
    "ffn_sparsity soft": ("FFN sparsity, soft", SOFT),
    "probe_router_linear": ("probe of the router, linear", TRAINED),
    "probe_router_mlp": ("probe of the router, MLP", TRAINED),
    "probe_hidden_linear": ("probe of the layer input, linear", TRAINED),
    "probe_hidden_mlp": ("probe of the layer input, MLP", TRAINED),
    "learned": ("learned gate", TRAINED),
    "oracle": ("oracle (knows each token's cost)", BOUND),
    "hindsight": ("hindsight (has seen the answers)", BOUND),
}
# Gates whose rows are one way to choose tokens at a share: the others have figures of their own.
CONTROL_GROUPS = (CHANCE, REARRANGED, SIGNAL, LATER)
LADDER_GROUPS = (*CONTROL_GROUPS, ROUTING, TRAINED, BOUND)

# Columns that stay text whatever they hold: a layer may be "3" or "all", a token may read "null", a path "6".
TEXT_COLUMNS = (
    "alpha", "cheap_path", "choice", "document", "domain", "domain_a", "domain_b", "gate", "kind", "layer", "layers",
    "matched_to", "mode", "nearest", "path", "positions", "prefers", "recipe", "signal", "stage", "task", "token",
    "token_texts", "variant",
)  # fmt: skip


class NothingToDraw(ValueError):
    """A result file holds nothing that this figure could show; the message says why."""


def needs(condition, reason):
    """Raise NothingToDraw with its reason where what a figure or a table needs is not there."""
    if not condition:
        raise NothingToDraw(reason)


def pairs_of(table):
    """[(domain a, domain b, its rows)] of a table over pairs of domains. Raises NothingToDraw where there is none."""
    needs(len(table), "one data set only: there is nothing to compare")
    return [(a, b, rows) for (a, b), rows in table.groupby(["domain_a", "domain_b"], sort=False)]


# -- files
def read_result(path, script, inferred=()):
    """Read one result file; where it is missing, print which script writes it and return None.

    path: .csv -> DataFrame (TEXT_COLUMNS stay text, an empty cell of the others is NaN), .json -> dict or list, .npz ->
    dict of arrays. script: "05_sweep_alpha.py". inferred: columns of TEXT_COLUMNS whose type follows from their
    cells all the same (the journeys' layers are numbers). Raises ValueError for another suffix.
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
    # A token may be a carriage return, or read "null".
    types = {column: str for column in TEXT_COLUMNS if column not in inferred}
    table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""], lineterminator="\n")
    text = [column for column in types if column in table]
    table[text] = table[text].fillna("")
    return table


def save_figure(figure, path):
    """Write `figure` as PNG with the same bytes for the same data (no date, no software version inside)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


# -- gates
def name_gates(table):
    """A table of results with the columns `name` (a key of GATES, where it is known there) and `share` added.

    A control is called by its recipe; one that is matched to a gate other than the one that leads the share is called
    by both: `random of learned`. A share that was not asked for (an uncalibrated threshold) is NaN.
    """
    variants = table["variant"] if "variant" in table else pd.Series("", table.index)
    gates = [_gate_name(*row) for row in zip(table["kind"], table["hard"], variants, strict=True)]
    of_mode = dict(zip(table["mode"], gates, strict=True))
    leaders = {"routing hard", "ffn_sparsity hard", ""}
    names = []
    for gate, recipe, matched_to in zip(gates, table["recipe"], table["matched_to"], strict=True):
        other = of_mode.get(matched_to, "")
        names.append(gate if not recipe else recipe if other in leaders else f"{recipe} of {other}")
    return table.assign(name=names, share=pd.to_numeric(table["share_target"]))


def _gate_name(kind, hard, variant):
    """`routing hard lookahead`: a gate's kind, its form, and what tells it from the gate that leads the share."""
    if kind in ("routing", "ffn_sparsity"):
        form = "hard" if str(hard) == "True" else "soft"
        return f"{kind} {form} {variant}".strip()
    return {"none": "baseline"}.get(kind, kind)


def gate_label(name):
    """The name of a gate for people."""
    recipe, of, gate = name.partition(" of ")
    if of:
        return f"{gate_label(recipe)}, counts of {plain(gate)}"
    return GATES[name][0] if name in GATES else words(name)


def gate_colour(name):
    """The colour of a gate's group; gates without a place in GATES have that of the gate that they vary."""
    known = name if name in GATES else " ".join(name.partition(" of ")[0].split(" ")[:2])
    return COLOURS[GATES[known][1]] if known in GATES else GREY


def looks(names):
    """Name of a gate -> (colour, marker, line); gates of one colour differ in their lines and markers."""
    found = {}
    for number, name in enumerate(names):
        alike = sum(colour == gate_colour(name) for colour, *_ in found.values())
        found[name] = (gate_colour(name), series(number)[1], ("-", "--", "-.", ":")[alike % 4])
    return found


# -- text
def plain(text, width=None):
    """Text safe to print in a figure: `$` escaped, line breaks and control characters visible, cut to `width`."""
    shown = "".join(
        {"\n": "↵", "\t": "⇥", "\r": "⇤"}.get(c, c if unicodedata.category(c)[0] != "C" else "�") for c in str(text)
    )
    if width is not None and len(shown) > width:
        shown = shown[: width - 1].rstrip() + "…"
    return shown.replace("$", r"\$")


def words(name):
    """A name of code as words."""
    return plain(str(name).replace("_", " "))


def sparse_labels(values, most):
    """Tick labels with at most about `most` of them printed, the others empty."""
    step = max(1, math.ceil(len(values) / most))
    return [str(value) if index % step == 0 else "" for index, value in enumerate(values)]


# -- numbers as text
def number_text(value, form="{:.1f}"):
    """A number as text, "-" where there is none."""
    return "-" if value is None or not math.isfinite(float(value)) else form.format(float(value))


def number_texts(values, form="{:.1f}"):
    """Numbers as a column of a table."""
    return [number_text(value, form) for value in values]


def interval_texts(low, high, form="{:.1f}"):
    """Intervals as a column of a table; "-" where there is none."""
    ends = zip(low, high, strict=True)
    return [f"{form.format(a)} to {form.format(b)}" if math.isfinite(a) else "-" for a, b in ends]


def counted(count, noun="layer"):
    """A count with its noun: `1 layer`, `2 layers`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# -- figures
def new_figure(width, height, rows=1, columns=1, **gridspec):
    """Figure and axes outside pyplot's registry: nothing to close, nothing shown by itself."""
    figure = Figure(figsize=(width, height), layout="constrained")
    with sns.axes_style("whitegrid"):
        axes = figure.subplots(rows, columns, gridspec_kw=gridspec or None)
    return figure, axes


def reach(rows, centre, low, high):
    """Lengths of error bars [2, n]; 0 where there is no interval, and never negative by rounding.

    The studentised intervals of a few documents may be infinite: those reach far beyond the panel.
    """
    ends = [rows[centre] - rows[low], rows[high] - rows[centre]]
    return np.nan_to_num(np.maximum(np.array(ends, dtype=float), 0), posinf=1e6)


def named(axes, x, y="", title=None):
    """Name both axes, and the panel where it has a title."""
    axes.set(xlabel=x, ylabel=y)
    if title is not None:
        axes.set_title(title, fontsize=10)


def whole_numbers(axes):
    """Ticks of x at whole numbers only: layers, hops."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def logarithmic(axes):
    """Make y logarithmic, with plain numbers at its ticks; returns the note for its label."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return " (logarithmic)"


def series(number):
    """(colour, marker) of the `number`-th share, estimate or variant."""
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]


def dots(axes, rows, places, columns, colour, marker="o", filled=True, label=None):
    """Horizontal estimates with intervals; columns: (centre, low, high)."""
    axes.errorbar(
        rows[columns[0]], places, xerr=reach(rows, *columns), fmt=marker, color=colour, ms=6, capsize=2.5, label=label,
        markerfacecolor=colour if filled else "white",
    )  # fmt: skip


def aside(number, count, span=0.6):
    """Where the `number`-th of `count` marks of one row stands: offsets over `span`, around 0."""
    return span * ((number + 0.5) / count - 0.5)


def name_rows(axes, labels, first=True):
    """One row per label from the top; `first`: the panel that shows the labels."""
    axes.set_yticks(range(len(labels)), labels if first else [""] * len(labels), fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def mark(marker, filled, label, colour="black"):
    """A handle of a legend."""
    face = colour if filled else "white"
    return Line2D([], [], marker=marker, ls="", color=colour, markerfacecolor=face, ms=6, label=label)


def fit(axes, rows, *columns):
    """Few ticks, a line at 0 (which is returned), and room for it and all finite values of the columns."""
    axes.xaxis.set_major_locator(MaxNLocator(5))
    ends = np.array([0.0, *rows[list(columns)].to_numpy(float).ravel()])
    ends = ends[np.isfinite(ends)]
    room = 0.08 * max(np.ptp(ends), 1e-9)
    axes.set_xlim(ends.min() - room, ends.max() + room)
    return axes.axvline(0, color=BLACK, lw=1)


def panels_for(count, columns, width, height, base=(1.0, 0.6)):
    """(figure, `count` axes) in a grid of at most `columns`, each `width` x `height` inches beside `base`."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure, axes = new_figure(base[0] + width * columns, base[1] + height * lines, lines, columns)
    axes = np.atleast_1d(axes).ravel()
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def legend_below(figure, handles, columns=6):
    """One legend for all panels, below them. handles: artists that have labels, or the axes whose legend it is."""
    if hasattr(handles, "get_legend_handles_labels"):
        handles = handles.get_legend_handles_labels()[0]
    figure.legend(handles=handles, fontsize=8.5, ncols=columns, frameon=False, loc="outside lower center")


def legend_right(axes, title=None):
    """Legend to the right of the panel, so that it covers no line."""
    axes.legend(fontsize=8.5, title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def legend_of_groups(figure, groups, more=()):
    """Legend below the figure: colours of the groups of gates, then `more` handles."""
    handles = [Patch(color=COLOURS[group], label=group) for group in LADDER_GROUPS if group in set(groups)]
    legend_below(figure, [*handles, *more], 4)


# -- heat maps of experts and layers
def side_by_side(items):
    """[(item, colour, marker)] for a line of each item."""
    colours = SERIES if len(items) <= len(SERIES) else sns.color_palette(SPARSITY_MAP, len(items))
    return [(item, colours[number], MARKERS[number % len(MARKERS)]) for number, item in enumerate(items)]


def layer_width(layers, least=7.0):
    """Width in inches of a panel with one column per layer."""
    return min(max(least, 2.6 + 0.3 * layers), 15.0)


def heatmap(axes, values, label, rows, columns, *, limits=None, numbers=None, square=False):
    """Heat map of values [rows, columns]; NaN is grey, labels are thinned, `numbers` is a format where cells get one.

    label: of the colour bar, "" for none. limits: (low, high), else those of the values; with (-x, x) the
    values are signed, and white is 0.
    """
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values)]
    low, high = limits or ((known.min(), known.max()) if known.size else (0.0, 1.0))
    sns.heatmap(
        values, ax=axes, cmap=SIGNED_MAP if low == -high < 0 else SPARSITY_MAP, vmin=low,
        vmax=high if high > low else low + 1e-9, square=square,
        annot=numbers is not None, fmt=numbers or "", annot_kws={"fontsize": 8},
        cbar=bool(label), cbar_kws={"label": label},
        xticklabels=sparse_labels(list(columns), 18 if square else 34),
        yticklabels=sparse_labels(list(rows), 18),
    )  # fmt: skip
    axes.tick_params(axis="both", rotation=0, labelsize=8.5, length=0)
    axes.grid(visible=False)
    axes.set_facecolor("0.82")  # of cells without a value


def expert_grid(table, column):
    """(values [E, L], expert ids, layer ids) of a table with a row per layer and expert."""
    grid = table.pivot(index="expert", columns="layer", values=column)
    return grid.to_numpy(float), list(grid.index), list(grid.columns)


def expert_panels(grids, numbers=".0f", least=7.0):
    """Heat maps expert x layer below each other; returns (figure, axes of the panels, whether cells hold numbers).

    grids: (values [E, L], expert ids, layer ids, title, label of the colour bar, limits) for each panel, all of the
    same layers and experts. numbers: their format, where there are few enough. least: width in inches of few layers.
    """
    _, experts, layers, *_ = grids[0]
    height = min(max(1.5, 0.24 * len(experts)), 9.0)
    figure, axes = new_figure(layer_width(len(layers), least), len(grids) * (height + 1.1), len(grids), 1)
    few = len(layers) <= 10 and len(experts) <= 16
    panels = np.atleast_1d(axes)
    for panel, (values, _, _, title, label, limits) in zip(panels, grids, strict=True):
        heatmap(panel, values, label, experts, layers, limits=limits, numbers=numbers if few else None)
        named(panel, "layer", "expert", title)
    return figure, panels, few

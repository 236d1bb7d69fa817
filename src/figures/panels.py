"""Parts that the journey study's figures share: heat maps, sizes of panels, numbers and lists in words."""

import math

import numpy as np
import seaborn as sns
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from src.figures.style import NothingToDraw, plain, sparse_labels

SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vPX"
AMOUNT_MAP = "cividis"
SIGNED_MAP = "PuOr"
NO_VALUE = "0.82"  # grey of cells without a value
BAND = 0.18  # opacity of bands


# -- parts of figures
def line_colours(count):
    """`count` colours for lines side by side."""
    return SERIES[:count] if count <= len(SERIES) else sns.color_palette(AMOUNT_MAP, count)


def layer_width(layers, least=7.0):
    """Width in inches of a panel with one column per layer."""
    return min(max(least, 2.6 + 0.3 * layers), 15.0)


def expert_height(experts):
    """Height in inches of a heat map with one row per expert."""
    return min(max(1.5, 0.24 * experts), 9.0)


def whole_numbers(axes):
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_if_wide(axes, values):
    """Make y logarithmic where positive values span more than a factor of 20; returns the note for its label."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values) or values.max() <= 20 * values.min():
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return " (logarithmic)"


def heatmap(axes, values, label, rows, columns, *, cmap=AMOUNT_MAP, limits=None, numbers=None, bar=True, square=False):
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


def expert_grid(table, column):
    """(values [E, L], expert ids, layer ids) of a table with a row per layer and expert."""
    grid = table.pivot(index="expert", columns="layer", values=column)
    return grid.to_numpy(float), list(grid.index), list(grid.columns)


def quoted(token, width=16):
    """A token in quotes, so that its spaces show."""
    return f"'{plain(token, width)}'"


def short_path(path, most=10):
    """ "6>5>0" as "6·5·0"; of a long path the first and the last experts."""
    experts = path.split(">")
    if len(experts) > most:
        experts = [*experts[:6], "…", *experts[-3:]]
    return "·".join(experts)


def in_words(items, most=24):
    """Items in words, cut after `most`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more


def counted(count, noun="layer"):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number_text(value, form="{:.1f}"):
    """A number as text, "-" where there is none."""
    return "-" if value is None or not math.isfinite(float(value)) else form.format(float(value))


# -- layers among each other
def needs_layers(layers):
    if len(layers) < 2:
        raise NothingToDraw("one layer only: there are no pairs of layers")


def needs_tokens(table):
    if table.empty:
        raise NothingToDraw("the records name no tokens")


def pairs_of(table):
    """[(domain a, domain b, its rows)] of a table over pairs of domains. Raises NothingToDraw where there is none."""
    if table.empty:
        raise NothingToDraw("one data set only: there is nothing to compare")
    return [(a, b, rows) for (a, b), rows in table.groupby(["domain_a", "domain_b"], sort=False)]

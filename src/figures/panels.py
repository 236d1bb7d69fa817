"""What figures and tables of journeys and of predictors share: numbers as text, names of axes, heat maps."""

import math

import numpy as np
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from src.figures import style

AMOUNT_MAP = style.SPARSITY_MAP
NO_VALUE = "0.82"  # grey of cells without a value


# -- numbers as text
def number_text(value, form="{:.1f}"):
    """A number as text, "-" where there is none."""
    return "-" if value is None or not math.isfinite(float(value)) else form.format(float(value))


def interval_texts(low, high, factor=1, form="{:.1f}"):
    """Intervals as a column of a table, in units of 1 / `factor`; "-" where there is none."""
    ends = zip(factor * low, factor * high, strict=True)
    return [f"{form.format(a)} to {form.format(b)}" if math.isfinite(a) else "-" for a, b in ends]


def percent_texts(shares, form="{:.1f}"):
    """Shares of 1 as a column of percentages; "-" where there is none."""
    return [number_text(100 * share, form) for share in shares]


def counted(count, noun="layer"):
    """A count with its noun: `1 layer`, `2 layers`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# -- parts of figures
def named(axes, x, y, title=None):
    """Name both axes, and the panel where it has a title."""
    axes.set(xlabel=x, ylabel=y)
    if title is not None:
        axes.set_title(title, fontsize=10)


def whole_numbers(axes):
    """Ticks of x at whole numbers only: layers, hops."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_right(axes, title=None):
    """Legend to the right of the panel, so that it covers no line."""
    axes.legend(fontsize=8.5, title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def line_colours(count):
    """`count` colours for lines side by side."""
    return style.SERIES[:count] if count <= len(style.SERIES) else sns.color_palette(AMOUNT_MAP, count)


def layer_width(layers, least=7.0):
    """Width in inches of a panel with one column per layer."""
    return min(max(least, 2.6 + 0.3 * layers), 15.0)


def heatmap(axes, values, label, rows, columns, *, limits=None, numbers=None, bar=True, square=False):
    """Heat map of values [rows, columns]; NaN is grey, labels are thinned, `numbers` is a format where cells get one.

    label: of the colour bar (none if `bar` is false). limits: (low, high), else those of the values; with (-x, x) the
    values are signed, and white is 0.
    """
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values)]
    low, high = limits or ((known.min(), known.max()) if known.size else (0.0, 1.0))
    sns.heatmap(
        values, ax=axes, cmap=style.SIGNED_MAP if low == -high < 0 else AMOUNT_MAP, vmin=low,
        vmax=high if high > low else low + 1e-9, square=square,
        annot=numbers is not None, fmt=numbers or "", annot_kws={"fontsize": 8},
        cbar=bar, cbar_kws={"label": label} if bar else None,
        xticklabels=style.sparse_labels(list(columns), 18 if square else 34),
        yticklabels=style.sparse_labels(list(rows), 18),
    )  # fmt: skip
    axes.tick_params(axis="both", rotation=0, labelsize=8.5, length=0)
    axes.grid(visible=False)
    axes.set_facecolor(NO_VALUE)


def expert_grid(table, column):
    """(values [E, L], expert ids, layer ids) of a table with a row per layer and expert."""
    grid = table.pivot(index="expert", columns="layer", values=column)
    return grid.to_numpy(float), list(grid.index), list(grid.columns)


def expert_panels(grids, numbers=".0f", least=7.0):
    """A figure of heat maps expert x layer, one below the other.

    Args:
        grids: (values [E, L], expert ids, layer ids, title, label of the colour bar, limits) for each panel; the layers
            and experts of all are the same.
        numbers: the format of numbers in cells, where there are few enough of them.
        least: width in inches of few layers.

    Returns:
        (figure, axes of the panels, whether cells hold numbers).
    """
    _, experts, layers, *_ = grids[0]
    height = min(max(1.5, 0.24 * len(experts)), 9.0)
    figure, axes = style.new_figure(layer_width(len(layers), least), len(grids) * (height + 1.1), len(grids), 1)
    few = len(layers) <= 10 and len(experts) <= 16
    panels = np.atleast_1d(axes)
    for panel, (values, _, _, title, label, limits) in zip(panels, grids, strict=True):
        heatmap(panel, values, label, experts, layers, limits=limits, numbers=numbers if few else None)
        named(panel, "layer", "expert", title)
    return figure, panels, few


# -- files without what a figure shows
def needs_tokens(table):
    """Raises NothingToDraw where the records name no tokens."""
    if table.empty:
        raise style.NothingToDraw("the records name no tokens")


def pairs_of(table):
    """[(domain a, domain b, its rows)] of a table over pairs of domains. Raises NothingToDraw where there is none."""
    if table.empty:
        raise style.NothingToDraw("one data set only: there is nothing to compare")
    return [(a, b, rows) for (a, b), rows in table.groupby(["domain_a", "domain_b"], sort=False)]

"""What figures of journeys and of predictors share: files, numbers as text, heat maps over layers; no torch."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from src.figures.style import plain, sparse_labels

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
def colours_for(count):
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


def counted(count, noun="layer"):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number_text(value, form="{:.1f}"):
    """A number as text, "-" where there is none."""
    return "-" if value is None or not math.isfinite(float(value)) else form.format(float(value))

"""Uncertainty over documents (problems), never tokens: cluster bootstrap, paired differences, equivalence, rank
correlation. NumPy and SciPy only.

All intervals are percentile intervals of the nonparametric bootstrap (Efron and Tibshirani 1993, chapter 13) that draws
whole documents with replacement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Entries (resamples x documents) that are held at once, so that memory stays small for any number of documents.
CHUNK_ENTRIES = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval [low, high]."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Equivalence:
    """Result of two one-sided tests.

    interval: the difference with its interval at level 1 - 2 * significance; `equivalent` says that it lies inside
    (-margin, margin). p: the larger of the two one-sided bootstrap p-values, (1 + hits) / (1 + resamples) each.
    """

    interval: Interval
    margin: float
    p: float
    equivalent: bool


def cluster_bootstrap(numerator, denominator, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Ratio of sums, sum(numerator) / sum(denominator), with documents resampled whole.

    numerator [N], denominator [N]: one value per document, such as summed NLL (nats) and number of tokens. The interval
    has the numerator's unit per the denominator's. A document may have denominator 0; resamples that hold only such
    documents are left out.

    Raises ValueError for fewer than two documents with a denominator above 0, unequal shapes, values that are not
    finite, a negative denominator, resamples < 1 and a level outside (0, 1).
    """
    numerator, denominator = _checked({"numerator": numerator, "denominator": denominator})
    _check_draws(resamples, level)
    estimate, drawn = _ratios(numerator, denominator, resamples, seed)
    return _interval(estimate, drawn, level)


def paired_difference(sum_a, sum_b, count, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Difference (sum(a) - sum(b)) / sum(count) of two systems on the same documents, which are resampled together.

    sum_a [N], sum_b [N]: a sum per document under each system (nats); count [N]: tokens per document.
    Raises ValueError as `cluster_bootstrap` does.
    """
    sum_a, sum_b, count = _checked({"sum_a": sum_a, "sum_b": sum_b, "count": count})
    return cluster_bootstrap(sum_a - sum_b, count, resamples, seed, level)


def equivalence_test(
    sum_a, sum_b, count, margin: float, significance: float = 0.05, resamples: int = 10_000, seed: int = 0
) -> Equivalence:
    """Two one-sided tests (TOST; Schuirmann 1987) of whether the paired difference lies within (-margin, margin).

    Arguments as in `paired_difference`; margin in the unit of the difference.
    Raises ValueError as `cluster_bootstrap` does, and for a margin <= 0 or a significance outside (0, 0.5).
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; it must be above 0")
    if not 0 < significance < 0.5:
        raise ValueError(f"significance is {significance}; it must lie between 0 and 0.5")
    sum_a, sum_b, count = _checked({"sum_a": sum_a, "sum_b": sum_b, "count": count})
    _check_draws(resamples, 1 - 2 * significance)
    estimate, drawn = _ratios(sum_a - sum_b, count, resamples, seed)
    interval = _interval(estimate, drawn, 1 - 2 * significance)
    hits = int(max(np.count_nonzero(drawn <= -margin), np.count_nonzero(drawn >= margin)))
    inside = -margin < interval.low and interval.high < margin
    return Equivalence(interval, float(margin), (1 + hits) / (1 + len(drawn)), inside)


def rank_correlation(x, y, clusters: Sequence, resamples: int = 1_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Spearman's rank correlation of x [N] and y [N] (ties share their mean rank), with whole clusters resampled.

    clusters [N]: the document of each value. Ranks are taken anew in each resample; resamples in which x or y is
    constant have no correlation and are left out.

    Raises ValueError for fewer than two clusters, unequal shapes, values that are not finite, a constant x or y,
    resamples < 1 and a level outside (0, 1).
    """
    x, y = _checked({"x": x, "y": y})
    _check_draws(resamples, level)
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    if member.shape != x.shape:
        raise ValueError(f"clusters has shape {member.shape}, x has {x.shape}; give one cluster per value")
    num_clusters = int(member.max()) + 1
    if num_clusters < 2:
        raise ValueError("all values belong to 1 cluster; a bootstrap over clusters needs at least 2")
    for name, values in (("x", x), ("y", y)):
        if values.min() == values.max():
            raise ValueError(f"{name} is constant ({values[0]:g}); it has no rank correlation")
    estimate = float(stats.spearmanr(x, y).statistic)
    # A resample only changes how often each value counts: the sorting is done once.
    levels = [np.unique(values, return_inverse=True)[1] for values in (x, y)]
    drawn = []
    for counts in _draws(num_clusters, resamples, seed):
        for row in counts:
            weights = row[member].astype(np.float64)
            drawn.append(_weighted_correlation(*(_midranks(level, weights) for level in levels), weights))
    drawn = np.array(drawn)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        raise ValueError("x or y is constant in every resample: too few clusters hold more than one value")
    return _interval(estimate, drawn, level)


def _checked(named: dict[str, Sequence]) -> list[np.ndarray]:
    """The values as float64 arrays [N]; ValueError, naming the argument, unless of one shape and finite."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    first, shape = next((name, values.shape) for name, values in arrays.items())
    for name, values in arrays.items():
        if values.ndim != 1 or values.shape != shape or not len(values):
            raise ValueError(
                f"{name} has shape {values.shape}, {first} has {shape}; give one value per document, at least one"
            )
        if not np.isfinite(values).all():
            position = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name} is {values[position]} at position {position}; every value must be finite")
    return list(arrays.values())


def _check_draws(resamples: int, level: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; draw at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, for example 0.95")


def _draws(num_clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn [chunk, num_clusters], for `resamples` resamples in chunks."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ENTRIES // num_clusters)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=size)


def _ratios(numerator: np.ndarray, denominator: np.ndarray, resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """Ratio of sums, and the same of each resample whose denominator is not 0."""
    if (denominator < 0).any():
        raise ValueError(f"a document has denominator {denominator.min():g}; counts must not be negative")
    usable = np.count_nonzero(denominator)
    if usable < 2:
        raise ValueError(
            f"{usable} of {len(denominator)} documents have a count above 0; the bootstrap over documents needs 2"
        )
    values = np.stack((numerator, denominator), axis=1)
    sums = np.concatenate([counts @ values for counts in _draws(len(values), resamples, seed)])
    sums = sums[sums[:, 1] > 0]
    return float(numerator.sum() / denominator.sum()), sums[:, 0] / sums[:, 1]


def _interval(estimate: float, drawn: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def _midranks(levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks [N] of values that count `weights` [N] times; levels [N] numbers the distinct values upwards."""
    counts = np.bincount(levels, weights=weights)
    return (np.cumsum(counts) - counts / 2 + 0.5)[levels]


def _weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Pearson correlation with weights; NaN where x or y is constant."""
    x = x - np.average(x, weights=weights)
    y = y - np.average(y, weights=weights)
    variances = (weights @ (x * x)) * (weights @ (y * y))
    return float(weights @ (x * y) / np.sqrt(variances)) if variances > 0 else float("nan")

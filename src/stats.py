"""Uncertainty over documents (problems), never tokens: cluster bootstrap, paired differences, equivalence, p-values,
Holm's correction, minimum detectable effect, rank correlation. NumPy and SciPy only.

All intervals are of the nonparametric bootstrap that draws whole documents with replacement. `method` names the kind:
- "percentile" (Efron and Tibshirani 1993, chapter 13), the default: quantiles of the resampled estimates.
- "studentised" (bootstrap-t; Efron and Tibshirani 1993, section 12.5): each resample's error counts in units of its own
  standard error. It holds its level with few documents, where the percentile interval is too narrow: that one uses
  normal quantiles in effect, and a standard error that is too small, the more so the more the documents differ in size.

How often a 95 % interval leaves out the truth (should be 5 %), in 12,000 simulated studies with intra-class correlation
0.5 and documents whose lengths differ up to tenfold (1,000 resamples; standard error 0.2 points):
    documents   percentile   studentised
           40        7.2 %         6.4 %
           64        6.2 %         5.6 %
So with 40 documents of such unequal length the percentile interval misses 3.5 .. 6.5 %, and the studentised one keeps
it, if narrowly (in 750 other simulations 6.5 % with 1,000 resamples and 6.0 % with 10,000).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Entries (resamples x documents) that are held at once, so that memory stays small for any number of documents.
CHUNK_ENTRIES = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval [low, high]."""

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


def cluster_bootstrap(
    numerator,
    denominator,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    method: str = "percentile",
) -> Interval:
    """Ratio of sums, sum(numerator) / sum(denominator), with documents resampled whole.

    numerator [N], denominator [N]: one value per document, such as summed NLL (nats) and number of tokens. The interval
    has the numerator's unit per the denominator's. A document may have denominator 0; resamples that hold only such
    documents are left out. A studentised interval may be infinite where so few documents deviate from the estimate that
    many resamples have no variance.

    Raises ValueError for fewer than two documents with a denominator above 0, unequal shapes, values that are not
    finite, a negative denominator, resamples < 1, a level outside (0, 1) and an unknown method.
    """
    numerator, denominator = _checked({"numerator": numerator, "denominator": denominator})
    _check_draws(resamples, level)
    estimate, drawn = _bootstrap(numerator, denominator, resamples, seed, method)
    return _interval(estimate, drawn, level)


def paired_difference(
    sum_a,
    sum_b,
    count,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    method: str = "percentile",
) -> Interval:
    """Difference (sum(a) - sum(b)) / sum(count) of two systems on the same documents, which are resampled together.

    sum_a [N], sum_b [N]: a sum per document under each system (nats); count [N]: tokens per document.
    Raises ValueError as `cluster_bootstrap` does.
    """
    sum_a, sum_b, count = _checked({"sum_a": sum_a, "sum_b": sum_b, "count": count})
    return cluster_bootstrap(sum_a - sum_b, count, resamples, seed, level, method)


def paired_p_value(sum_a, sum_b, count, resamples: int = 10_000, seed: int = 0, method: str = "percentile") -> float:
    """Two-sided p-value of "the paired difference is 0": one minus the level of the widest interval that leaves out 0.

    Arguments as in `paired_difference`, whose interval at level 1 - p ends at 0 (Efron and Tibshirani 1993, section
    15.4). It is 2 * (1 + hits) / (1 + resamples), at most 1, where hits counts the resamples beyond 0: to stay small
    under Holm's correction of a large family it needs many resamples. Raises ValueError as `paired_difference` does.
    """
    sum_a, sum_b, count = _checked({"sum_a": sum_a, "sum_b": sum_b, "count": count})
    _check_draws(resamples, level=0.95)
    _, drawn = _bootstrap(sum_a - sum_b, count, resamples, seed, method)
    hits = int(min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)))
    return min(1.0, 2 * (1 + hits) / (1 + len(drawn)))


def holm_correction(p_values: Sequence[float]) -> np.ndarray:
    """p-values [M] of one family of comparisons -> adjusted p-values [M], in the same order.

    Rejecting where the adjusted value is at most 5 % keeps the chance of any false rejection in the family at 5 %,
    however the comparisons depend on each other (Holm 1979): the i-th smallest, i = 0 .. M-1, times M - i, made
    increasing, at most 1. Raises ValueError for an empty family and a p-value outside [0, 1].
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    if p_values.ndim != 1 or not len(p_values):
        raise ValueError(f"p_values has shape {p_values.shape}; give one p-value per comparison, at least one")
    outside = np.flatnonzero(~((p_values >= 0) & (p_values <= 1)))  # NaN too
    if len(outside):
        raise ValueError(f"p_values is {p_values[outside[0]]:g} at position {outside[0]}; it must lie in [0, 1]")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return adjusted


def minimum_detectable_effect(sum_a, sum_b, count, power: float = 0.8, significance: float = 0.05) -> float:
    """The true paired difference that a study of these documents would find, two-sided, with probability `power`.

    sum_a [N], sum_b [N], count [N] as in `paired_difference`; the result has the difference's unit (nats per token). It
    is (t_{1 - significance / 2} + t_power) * standard error with N - 1 degrees of freedom (Bloom 1995), the standard
    error taken between documents: that of a ratio of sums (Cochran 1977, chapter 6), N counting those with tokens.
    Raises ValueError as `paired_difference` does, and unless 0 < significance < power < 1.
    """
    if not 0 < significance < power < 1:
        raise ValueError(f"power is {power}, significance {significance}; give 0 < significance < power < 1")
    sum_a, sum_b, count = _checked({"sum_a": sum_a, "sum_b": sum_b, "count": count})
    num_documents = _usable(count)
    difference = sum_a - sum_b
    residual = difference - difference.sum() / count.sum() * count
    error = np.sqrt(num_documents / (num_documents - 1) * (residual @ residual)) / count.sum()
    quantiles = stats.t.ppf([1 - significance / 2, power], num_documents - 1)
    return float(quantiles.sum() * error)


def equivalence_test(
    sum_a,
    sum_b,
    count,
    margin: float,
    significance: float = 0.05,
    resamples: int = 10_000,
    seed: int = 0,
    method: str = "percentile",
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
    estimate, drawn = _bootstrap(sum_a - sum_b, count, resamples, seed, method)
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


def _usable(denominator: np.ndarray) -> int:
    """How many documents [N] have a count; ValueError for a negative count, and for fewer than two."""
    if (denominator < 0).any():
        raise ValueError(f"a document has denominator {denominator.min():g}; counts must not be negative")
    usable = int(np.count_nonzero(denominator))
    if usable < 2:
        raise ValueError(
            f"{usable} of {len(denominator)} documents have a count above 0; the bootstrap over documents needs 2"
        )
    return usable


def _bootstrap(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, seed: int, method: str
) -> tuple[float, np.ndarray]:
    """Ratio of sums, and a distribution for it: one value for each resample whose denominator is not 0.

    "percentile": the resampled ratios. "studentised": estimate - t * standard error for each resample's t, so that the
    quantiles of either are the limits of its interval.
    """
    if method not in ("percentile", "studentised"):
        raise ValueError(f"method is {method!r}; choose 'percentile' or 'studentised'")
    _usable(denominator)
    estimate = float(numerator.sum() / denominator.sum())
    values = np.stack((numerator, denominator), axis=1)
    if method == "percentile":
        sums = np.concatenate([counts @ values for counts in _draws(len(values), resamples, seed)])
        sums = sums[sums[:, 1] > 0]
        return estimate, sums[:, 0] / sums[:, 1]
    values[:, 0] -= estimate * denominator  # the deviations from the estimate, which sum to 0
    # The standard error of a ratio of sums is root(sum of squared deviations from that ratio) / sum of denominators.
    # The factor N / (N - 1) under the root would be the same in each resample: it cancels.
    error = np.linalg.norm(values[:, 0]) / denominator.sum()
    t = np.concatenate([_t_values(counts, values) for counts in _draws(len(values), resamples, seed)])
    return estimate, estimate - t * error


def _t_values(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(shift of the ratio) / (its standard error) [R'] of the resamples counts [R, N] whose denominator is not 0.

    values [N, 2]: deviations from the estimate, and denominators. Infinite where a resample shifts without variance.
    """
    sums = counts @ values
    counts, sums = counts[sums[:, 1] > 0], sums[sums[:, 1] > 0]
    shift = sums[:, 0] / sums[:, 1]
    # Deviations from the resample's own ratio, squared before they are summed: expanded, the terms would cancel.
    spread = (values[:, 0] - shift[:, None] * values[:, 1]) ** 2
    error = np.sqrt(np.einsum("rn,rn->r", counts, spread)) / sums[:, 1]
    # One document drawn N times leaves rounding, not variance.
    without = np.where(shift == 0, 0.0, np.copysign(np.inf, shift))
    return np.divide(shift, error, out=without, where=error > 1e-9 * np.abs(shift))


def _interval(estimate: float, drawn: np.ndarray, level: float) -> Interval:
    # Between two infinite values (studentised) there is no interpolating.
    method = "linear" if np.isfinite(drawn).all() else "inverted_cdf"
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method=method)
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

"""src/stats.py against scipy's bootstrap, closed forms, resampling by hand, and coverage."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from src import stats


def documents(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Summed NLL and token counts of `num` documents that share a random mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 500, num).astype(float)
    return tokens * rng.normal(3.5, 0.6, num), tokens


def test_ratio_agrees_with_scipy_bootstrap():
    nll, tokens = documents(60)
    ours = stats.cluster_bootstrap(nll, tokens, resamples=20_000, level=0.9)
    theirs = scipy_stats.bootstrap(
        (nll, tokens),
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        confidence_level=0.9,
        rng=np.random.default_rng(1),
    )
    assert ours.estimate == pytest.approx(nll.sum() / tokens.sum(), rel=1e-12)
    noise = 0.05 * theirs.standard_error  # Monte-Carlo error of a 5 % quantile from 20,000 draws is about 0.015
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=noise)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=noise)


def test_mean_of_a_large_sample_has_the_normal_interval():
    values = np.random.default_rng(2).normal(1.0, 2.0, 4_000)
    interval = stats.cluster_bootstrap(values, np.ones(4_000), resamples=4_000)
    error = values.std() / np.sqrt(4_000)
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for run in range(200):
        tokens = rng.integers(50, 500, 60)
        nll = tokens * rng.normal(3.5, 0.6, 60)
        interval = stats.cluster_bootstrap(nll, tokens, resamples=500, seed=run)
        hits += interval.low <= 3.5 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99  # 0.95 less the small-sample bias, and 3 standard errors of 200 runs


def test_tokens_of_one_document_are_not_independent():
    rng = np.random.default_rng(4)
    token_nll = rng.normal(3.5, 0.6, 40)[:, None] + rng.normal(0, 0.1, (40, 200))
    by_document = stats.cluster_bootstrap(token_nll.sum(1), np.full(40, 200))
    by_token = stats.cluster_bootstrap(token_nll.ravel(), np.ones(8_000), resamples=500)
    assert by_document.high - by_document.low > 5 * (by_token.high - by_token.low)


def test_paired_difference_equals_resampling_by_hand():
    a, tokens = documents(30)
    b = a - tokens * np.random.default_rng(5).normal(0.05, 0.02, 30)
    ours = stats.paired_difference(a, b, tokens, resamples=300, seed=7, level=0.8)
    counts = np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), size=300)
    differences = []
    for row in counts:
        chosen = np.repeat(np.arange(30), row)
        differences.append(a[chosen].sum() / tokens[chosen].sum() - b[chosen].sum() / tokens[chosen].sum())
    assert ours.estimate == pytest.approx((a.sum() - b.sum()) / tokens.sum(), rel=1e-9)
    assert [ours.low, ours.high] == pytest.approx(list(np.quantile(differences, [0.1, 0.9])), rel=1e-9)


def test_pairing_removes_what_documents_share():
    a, tokens = documents(60)
    b = a + 0.01 * tokens
    paired = stats.paired_difference(b, a, tokens)
    assert paired.low == pytest.approx(0.01) and paired.high == pytest.approx(0.01)
    alone = stats.cluster_bootstrap(a, tokens)
    assert alone.high - alone.low > 0.1


def test_same_seed_same_interval_whatever_the_chunk(monkeypatch):
    nll, tokens = documents(20)
    first = stats.cluster_bootstrap(nll, tokens, resamples=1_000, seed=3)
    assert first == stats.cluster_bootstrap(nll, tokens, resamples=1_000, seed=3)
    assert first != stats.cluster_bootstrap(nll, tokens, resamples=1_000, seed=4)
    monkeypatch.setattr(stats, "CHUNK_ENTRIES", 150)
    chunked = stats.cluster_bootstrap(nll, tokens, resamples=1_000, seed=3)
    assert [chunked.low, chunked.high] == pytest.approx([first.low, first.high], rel=1e-12)


@pytest.mark.parametrize(("shift", "expected"), [(0.0, True), (0.049, False), (0.2, False), (-0.2, False)])
def test_equivalence(shift, expected):
    a, tokens = documents(60)
    noise = np.random.default_rng(6).normal(0, 0.05, 60)
    noise -= (noise * tokens).sum() / tokens.sum()
    result = stats.equivalence_test(a + tokens * (noise + shift), a, tokens, margin=0.05)
    assert result.equivalent is expected
    assert (result.p < 0.05) is expected
    assert result.interval.estimate == pytest.approx(shift, abs=1e-9)
    ninety = stats.paired_difference(a + tokens * (noise + shift), a, tokens, level=0.9)
    assert result.interval == ninety


def test_equivalence_p_value_is_the_normal_one_on_a_large_sample():
    values = np.random.default_rng(8).normal(0, 1.0, 2_000)
    values -= values.mean()
    margin = 1.5 * values.std() / np.sqrt(2_000)
    result = stats.equivalence_test(values, np.zeros(2_000), np.ones(2_000), margin=margin, resamples=8_000)
    assert result.p == pytest.approx(scipy_stats.norm.sf(1.5), abs=0.012)
    assert not result.equivalent


def test_rank_correlation_equals_scipy_on_every_resample():
    rng = np.random.default_rng(9)
    clusters = np.repeat([f"doc {i}" for i in range(12)], rng.integers(3, 15, 12))
    x = rng.integers(0, 6, len(clusters)).astype(float)  # many ties, as sparsity has
    y = x + rng.normal(0, 2, len(clusters))
    ours = stats.rank_correlation(x, y, clusters, resamples=200, seed=11)
    names = np.unique(clusters)
    drawn = []
    for row in np.random.default_rng(11).multinomial(12, np.full(12, 1 / 12), size=200):
        rows = [np.flatnonzero(clusters == name) for name, times in zip(names, row, strict=True) for _ in range(times)]
        chosen = np.concatenate(rows)
        drawn.append(scipy_stats.spearmanr(x[chosen], y[chosen]).statistic)
    assert ours.estimate == pytest.approx(scipy_stats.spearmanr(x, y).statistic, rel=1e-12)
    assert [ours.low, ours.high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), rel=1e-9)


def test_rank_correlation_is_one_for_a_monotone_map():
    x = np.random.default_rng(10).normal(size=50)
    interval = stats.rank_correlation(x, np.exp(x), np.arange(50) // 5, resamples=50)
    assert [interval.estimate, interval.low, interval.high] == pytest.approx([1, 1, 1])


ONES = np.ones(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.cluster_bootstrap([1.0], [2.0]), "1 of 1 documents"),
        (lambda: stats.cluster_bootstrap(ONES, np.zeros(4)), "0 of 4 documents"),
        (lambda: stats.cluster_bootstrap(ONES, [0, 0, 3, 0]), "1 of 4 documents"),
        (lambda: stats.cluster_bootstrap(ONES, [1, 1, -3, 1]), "denominator -3"),
        (lambda: stats.cluster_bootstrap([], []), "at least one"),
        (lambda: stats.cluster_bootstrap(ONES, np.ones(3)), r"denominator has shape \(3,\), numerator has \(4,\)"),
        (lambda: stats.cluster_bootstrap([1, np.nan, 1, 1], ONES), "numerator is nan at position 1"),
        (lambda: stats.cluster_bootstrap(ONES, ONES, resamples=0), "resamples is 0"),
        (lambda: stats.cluster_bootstrap(ONES, ONES, level=95), "level is 95"),
        (lambda: stats.paired_difference(ONES, np.ones(5), ONES), r"sum_b has shape \(5,\)"),
        (lambda: stats.paired_difference([1.0], [1.0], [1.0]), "1 of 1 documents"),
        (lambda: stats.equivalence_test(ONES, ONES, ONES, margin=0), "margin is 0"),
        (lambda: stats.equivalence_test(ONES, ONES, ONES, margin=1, significance=0.5), "significance is 0.5"),
        (lambda: stats.rank_correlation(np.arange(4), np.arange(4), list("aaaa")), "1 cluster"),
        (lambda: stats.rank_correlation(np.arange(4), ONES, list("aabb")), "y is constant"),
        (lambda: stats.rank_correlation(np.arange(4), np.arange(4), list("ab")), "clusters has shape"),
        (lambda: stats.rank_correlation([np.inf, 1, 2, 3], ONES, list("aabb")), "x is inf at position 0"),
    ],
)
def test_degenerate_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_documents_without_counts_change_nothing_but_the_draws():
    nll, tokens = documents(40)
    full = stats.cluster_bootstrap(np.append(nll, 0), np.append(tokens, 0))
    assert full.estimate == pytest.approx(nll.sum() / tokens.sum())
    assert full.low < full.estimate < full.high

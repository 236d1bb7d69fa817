"""src/stats.py against scipy's bootstrap, closed forms, resampling by hand, coverage, and a simulated null."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.signal import lfilter

from src.base import stats


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
    p, equivalent = stats.Bootstrap().equivalence(a + tokens * (noise + shift), a, tokens, margin=0.05)
    ninety = stats.Bootstrap(level=0.9).difference(a + tokens * (noise + shift), a, tokens)
    assert ninety.estimate == pytest.approx(shift, abs=1e-9)
    assert equivalent is (p < 0.05) is (-0.05 < ninety.low and ninety.high < 0.05) is expected


def test_equivalence_p_value_is_the_normal_one_on_a_large_sample():
    values = np.random.default_rng(8).normal(0, 1.0, 2_000)
    values -= values.mean()
    margin = 1.5 * values.std() / np.sqrt(2_000)
    p, equivalent = stats.Bootstrap(resamples=8_000).equivalence(values, np.zeros(2_000), np.ones(2_000), margin)
    assert p == pytest.approx(scipy_stats.norm.sf(1.5), abs=0.012) and not equivalent


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


def confounded(num_documents: int = 12, seed: int = 17):
    """x and y [N] with ties that share three covariates [3, N], documents [N] and positions [N]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 50, num_documents)
    clusters = np.repeat([f"doc {i}" for i in range(num_documents)], lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    covariates = np.stack([positions, rng.integers(0, 5, len(positions)), rng.exponential(size=len(positions))])
    both = covariates[2] + 0.02 * positions
    x = np.round(both + rng.normal(0, 1, len(both)))
    return x, both + 0.3 * x + rng.normal(0, 1, len(both)), covariates, clusters, positions


def inverse_partial(ranks: np.ndarray) -> float:
    """Partial correlation of rows 0 and 1 given the others, from the inverse of the correlation matrix."""
    inverse = np.linalg.inv(np.corrcoef(ranks))
    return -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])


def test_partial_rank_correlation_of_one_covariate_has_its_closed_form():
    x, y, covariates, clusters, _ = confounded()
    z = covariates[2]
    xy, xz, yz = (scipy_stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    ours = stats.partial_rank_correlation(x, y, z[None], clusters, resamples=10)
    assert ours.estimate == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)), rel=1e-10)
    assert abs(ours.estimate - xy) > 0.1


def test_partial_rank_correlation_equals_the_inverse_matrix_on_every_resample():
    x, y, covariates, clusters, _ = confounded()
    ours = stats.partial_rank_correlation(x, y, covariates, clusters, resamples=200, seed=11)
    names, columns = np.unique(clusters), np.stack([x, y, *covariates])
    drawn = []
    for row in np.random.default_rng(11).multinomial(12, np.full(12, 1 / 12), size=200):
        rows = [np.flatnonzero(clusters == name) for name, times in zip(names, row, strict=True) for _ in range(times)]
        drawn.append(inverse_partial(scipy_stats.rankdata(columns[:, np.concatenate(rows)], axis=1)))
    assert ours.estimate == pytest.approx(inverse_partial(scipy_stats.rankdata(columns, axis=1)), rel=1e-9)
    assert [ours.low, ours.high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), rel=1e-9)
    again = np.stack([*covariates, covariates[0] ** 3, np.ones(len(x))])  # says nothing new
    assert stats.partial_rank_correlation(x, y, again, clusters, 10).estimate == pytest.approx(ours.estimate, rel=1e-9)


def test_without_covariates_it_is_the_rank_correlation():
    x, y, covariates, clusters, _ = confounded()
    ours = stats.partial_rank_correlation(x, y, covariates[:0], clusters, resamples=100, seed=5)
    plain = stats.rank_correlation(x, y, clusters, resamples=100, seed=5)
    assert [ours.estimate, ours.low, ours.high] == pytest.approx([plain.estimate, plain.low, plain.high], rel=1e-9)


def test_ranks_within_strata_are_pooled_on_every_resample():
    x, y, covariates, clusters, _ = confounded()
    strata = np.repeat([4, 2, 9], [len(x), len(x), len(x) // 2])  # the last one smaller
    index = np.concatenate([np.arange(len(x))] * 3)[: len(strata)]
    rng = np.random.default_rng(18)
    columns = np.stack([x, y, *covariates])[:, index] + 0.5 * rng.normal(size=(5, len(index)))
    columns[:2] += 100 * strata  # levels that must not count
    clusters = clusters[index]
    ours = stats.partial_rank_correlation(*columns[:2], columns[2:], clusters, 50, seed=11, strata=strata)
    names = np.unique(clusters)

    def by_hand(chosen):
        ranks = np.empty((5, len(chosen)))
        for stratum in (4, 2, 9):
            inside = strata[chosen] == stratum
            ranks[:, inside] = (scipy_stats.rankdata(columns[:, chosen[inside]], axis=1) - 0.5) / inside.sum()
        return inverse_partial(ranks)

    drawn = []
    for row in np.random.default_rng(11).multinomial(12, np.full(12, 1 / 12), size=50):
        rows = [np.flatnonzero(clusters == name) for name, times in zip(names, row, strict=True) for _ in range(times)]
        drawn.append(by_hand(np.concatenate(rows)))
    assert ours.estimate == pytest.approx(by_hand(np.arange(len(strata))), rel=1e-9)
    assert [ours.low, ours.high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), rel=1e-9)


@pytest.mark.parametrize("layers", [1, 2])
def test_block_permutation_against_all_orders_of_the_blocks(layers):
    rng = np.random.default_rng(19 + layers)
    lengths = (11, 9)  # blocks of 4: two whole ones and a short one in each document, 36 orders
    cells = [(d, k, t) for d, length in enumerate(lengths) for k in range(layers) for t in range(length)]
    document, stratum, position = np.array(cells).T
    x, noise, z = rng.normal(size=(3, len(cells)))
    y = 0.2 * x + noise + document

    def partial(x):
        ranks = np.empty((3, len(x)))
        for k in range(layers):
            inside = stratum == k
            ranks[:, inside] = (scipy_stats.rankdata(np.stack([x, y, z])[:, inside], axis=1) - 0.5) / inside.sum()
        return inverse_partial(ranks)

    def permuted(orders):
        moved = np.empty_like(x)
        for d, order in enumerate(orders):
            for k in range(layers):
                own = np.flatnonzero((document == d) & (stratum == k))
                moved[own] = np.concatenate([x[own[4 * b : 4 * b + 4]] for b in order])
        return moved

    every = [partial(permuted(orders)) for orders in itertools.product(itertools.permutations(range(3)), repeat=2)]
    expected = np.mean(np.abs(every - np.mean(every)) >= abs(partial(x) - np.mean(every)) - 1e-9)
    assert 0.05 < expected < 0.95
    mixed = rng.permutation(len(cells))  # the order in which cells come does not matter
    arguments = (x[mixed], y[mixed], z[None, mixed], document[mixed], position[mixed], 4, 4_000, 1, stratum[mixed])
    p = stats.block_permutation_p(*arguments)
    assert p == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4_000))
    assert p == stats.block_permutation_p(*arguments)


def test_block_permutation_does_not_depend_on_the_chunk(monkeypatch):
    x, y, covariates, clusters, positions = confounded()
    y = np.random.default_rng(20).permutation(y)
    first = stats.block_permutation_p(x, y, covariates, clusters, positions, permutations=300)
    assert 0.02 < first < 1
    monkeypatch.setattr(stats, "CHUNK_ENTRIES", 7 * len(x))
    assert stats.block_permutation_p(x, y, covariates, clusters, positions, permutations=300) == first


def test_block_permutation_finds_what_documents_hide():
    """x and y rise together from document to document, and against each other within them: near 0 in all, and clear."""
    rng = np.random.default_rng(23)
    clusters, positions = np.repeat(np.arange(8), 96), np.tile(np.arange(96), 8)
    document, x = np.repeat(np.linspace(-1.2, 1.2, 8), 96), rng.normal(size=768)
    y = 1.1 * document - 0.5 * x + rng.normal(size=768)
    x = x + 0.7 * document
    arguments = (np.empty((0, 768)), clusters, positions, 16, 999)
    assert abs(scipy_stats.spearmanr(x, y).statistic) < 0.1
    assert stats.block_permutation_p(x, y, *arguments) == 1 / 1000
    # and what documents have in common is not taken for it: at the 5 % level, 3 of 60, and three standard errors
    found = 0
    for seed in range(60):
        x, y = 0.7 * document + rng.normal(size=768), 1.1 * document + rng.normal(size=768)
        assert scipy_stats.spearmanr(x, y).statistic > 0.15
        found += stats.block_permutation_p(x, y, *arguments[:-1], 99, seed) <= 0.05
    assert found <= 8


def test_block_permutation_is_of_the_partial_correlation():
    """x and y share only a covariate: a tenth of 100 runs at most is significant, without the covariate all are."""
    rng = np.random.default_rng(21)
    clusters, positions = np.repeat(np.arange(6), 80), np.tile(np.arange(80), 6)
    found = {1: 0, 0: 0}
    for seed in range(100):
        shared = rng.uniform(size=480)
        x, y = shared + rng.uniform(size=(2, 480))
        for count in found:
            p = stats.block_permutation_p(x, y, shared[None][:count], clusters, positions, 16, 99, seed)
            found[count] += p <= 0.05
    assert found[1] <= 11 and found[0] == 100  # 5, and three standard errors


def test_blocks_keep_the_level_where_single_tokens_do_not():
    """Independent series, each with the memory of neighbouring tokens: AR(1) with 0.7, six documents of 160 tokens."""
    rng = np.random.default_rng(22)
    clusters, positions = np.repeat(np.arange(6), 160), np.tile(np.arange(160), 6)
    found = {16: 0, 1: 0}
    for seed in range(300):
        x, y = lfilter([1], [1, -0.7], rng.normal(size=(2, 6, 200)))[:, :, 40:].reshape(2, -1)
        for block in found:
            p = stats.block_permutation_p(x, y, positions[None], clusters, positions, block, 199, seed)
            found[block] += p <= 0.05
    assert 0.02 <= found[16] / 300 <= 0.09  # 0.05, and three standard errors of 300 runs
    assert found[1] / 300 > 0.15


ONES = np.ones(4)
NONE = np.empty((0, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.cluster_bootstrap([1.0], [2.0]), "1 of 1 documents"),
        (lambda: stats.cluster_bootstrap(ONES, np.zeros(4)), "0 of 4 documents"),
        (lambda: stats.cluster_bootstrap(ONES, [0, 0, 3, 0]), "1 of 4 documents"),
        (lambda: stats.cluster_bootstrap(ONES, [1, 1, -3, 1]), "denominator -3"),
        (lambda: stats.cluster_bootstrap([1, np.nan, 1, 1], ONES), "numerator is nan at position 1"),
        (lambda: stats.paired_difference(np.ones(5), np.ones(5), ONES), r"count has \(4,\)"),
        (lambda: stats.paired_difference([1.0], [1.0], [1.0]), "1 of 1 documents"),
        (lambda: stats.minimum_detectable_effect(ONES, ONES, [0, 0, 3, 0]), "1 of 4 documents"),
        (lambda: stats.rank_correlation(np.arange(4), np.arange(4), list("aaaa")), "1 cluster"),
        (lambda: stats.rank_correlation(np.arange(4), ONES, list("aabb")), "y is constant"),
        (lambda: stats.rank_correlation(np.arange(4), np.arange(4), list("ab")), "clusters has shape"),
        (lambda: stats.partial_rank_correlation(np.arange(4), ONES, NONE, list("aabb")), "y is constant"),
        (
            lambda: stats.partial_rank_correlation([1, 3, 2, 4], [2, 3, 5, 8], [[1, 3, 2, 4]], list("aabb")),
            "covariates'",
        ),
        (
            lambda: stats.partial_rank_correlation(np.arange(4), np.arange(4), [[1, 2, np.nan, 3]], "aabb"),
            "s.0. is nan",
        ),
        (lambda: stats.partial_rank_correlation(np.arange(4), np.arange(4), NONE, list("aaaa")), "1 cluster"),
        (lambda: stats.partial_rank_correlation(np.arange(4), np.arange(4), NONE, [1, 2]), "clusters has shape"),
        (lambda: stats.block_permutation_p(np.arange(4), ONES, NONE, [1, 1, 2, 2], [0, 1, 0, 1]), "y is constant"),
        (
            lambda: stats.block_permutation_p(np.arange(4), np.arange(4), NONE, [1, 1, 2, 2], [0, 0, 0, 1]),
            "same position",
        ),
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


def test_studentised_interval_equals_resampling_by_hand():
    a, tokens = documents(25)
    b = a - tokens * np.random.default_rng(5).normal(0.02, 0.1, 25)
    difference = a - b

    def ratio_and_error(chosen):
        ratio = difference[chosen].sum() / tokens[chosen].sum()
        squares = (difference[chosen] - ratio * tokens[chosen]) ** 2
        return ratio, np.sqrt(squares.sum()) / tokens[chosen].sum()

    ratio, error = ratio_and_error(np.arange(25))
    t = []
    for row in np.random.default_rng(7).multinomial(25, np.full(25, 1 / 25), size=300):
        resampled, its_error = ratio_and_error(np.repeat(np.arange(25), row))
        t.append((resampled - ratio) / its_error)
    low, high = ratio - np.quantile(t, [0.9, 0.1]) * error
    ours = stats.paired_difference(a, b, tokens, resamples=300, seed=7, level=0.8, method="studentised")
    assert [ours.estimate, ours.low, ours.high] == pytest.approx([ratio, low, high], rel=1e-9)


def test_studentised_interval_of_a_small_normal_sample_is_students():
    rng = np.random.default_rng(12)
    width = {"studentised": [], "percentile": []}
    for seed in range(20):
        values = rng.normal(size=10)
        student = scipy_stats.t.interval(0.95, 9, values.mean(), values.std(ddof=1) / np.sqrt(10))
        for method, ratios in width.items():
            ours = stats.paired_difference(values, np.zeros(10), np.ones(10), 2_000, seed, method=method)
            ratios.append((ours.high - ours.low) / (student[1] - student[0]))
    assert np.median(width["studentised"]) == pytest.approx(1, abs=0.15)
    assert np.median(width["percentile"]) == pytest.approx(1.96 * 0.9**0.5 / 2.262, abs=0.04)


def test_studentised_interval_says_when_documents_hold_no_variance():
    interval = stats.paired_difference([1, 0], [0, 0], [1, 1], resamples=200, method="studentised")
    assert (interval.low, interval.estimate, interval.high) == (-np.inf, 0.5, np.inf)
    same = stats.paired_difference(ONES, ONES, ONES, resamples=50, method="studentised")
    assert (same.low, same.estimate, same.high) == (0, 0, 0)


def test_p_value_is_one_minus_the_level_at_which_the_interval_reaches_zero():
    a, tokens = documents(30)
    b = a - tokens * np.random.default_rng(13).normal(0.02, 0.06, 30)
    p = stats.Bootstrap(4_000, 2).p_value(a, b, tokens)
    assert 0.01 < p < 0.5
    step = 4 / 4_000  # two resamples in each tail
    narrow, wide = (stats.Bootstrap(4_000, 2, level).difference(a, b, tokens) for level in (1 - p - step, 1 - p + step))
    assert narrow.low > 0 > wide.low
    assert stats.Bootstrap(4_000, 2).p_value(b, a, tokens) == pytest.approx(p, abs=1e-12)
    same = stats.paired_difference(a, b, tokens, 4_000, 2, 0.9, "studentised")
    assert stats.Bootstrap(4_000, 2, 0.9).difference(a, b, tokens) == same


def test_p_value_at_its_ends():
    a, tokens = documents(30)
    assert stats.Bootstrap(99).p_value(a + tokens, a, tokens) == pytest.approx(2 / 100)
    assert stats.Bootstrap(99).p_value(a, a, tokens) == 1
    values = np.random.default_rng(14).normal(0, 1, 2_000)
    values += 2.2 / np.sqrt(2_000) * values.std() - values.mean()
    p = stats.Bootstrap(4_000).p_value(values, np.zeros(2_000), np.ones(2_000))
    assert p == pytest.approx(2 * scipy_stats.norm.sf(2.2), abs=0.01)


def test_holm_is_the_closed_test_of_bonferroni():
    rng = np.random.default_rng(15)
    for num in (1, 2, 5):
        p = np.round(rng.uniform(0, 0.6, num) ** 2, 2)  # with ties
        # Closed testing: a hypothesis falls when every set of hypotheses that holds it falls, here by Bonferroni.
        sets = [[i for i in range(num) if code >> i & 1] for code in range(1, 2**num)]
        expected = [max(min(1, len(s) * p[s].min()) for s in sets if i in s) for i in range(num)]
        np.testing.assert_allclose(stats.holm_correction(p), expected, rtol=1e-12)
    np.testing.assert_allclose(stats.holm_correction([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])


def test_minimum_detectable_effect_has_the_power_of_the_t_test():
    difference = np.random.default_rng(16).normal(0.3, 2.0, 64)
    effect = stats.minimum_detectable_effect(difference, np.zeros(64), np.ones(64))
    error = difference.std(ddof=1) / 8
    critical = scipy_stats.t.ppf(0.975, 63)
    power = scipy_stats.nct.sf(critical, 63, effect / error) + scipy_stats.nct.cdf(-critical, 63, effect / error)
    assert power == pytest.approx(0.8, abs=0.003)
    with_empty = stats.minimum_detectable_effect(np.append(difference, 0), np.zeros(65), np.append(np.ones(64), 0))
    assert with_empty == pytest.approx(effect, rel=1e-12)


# -- does the bootstrap hold its level? 64 documents of the study have 79 to 768 tokens: a tenth of that here.
def null_sizes(num_clusters: int) -> np.ndarray:
    return np.geomspace(4, 40, num_clusters).round().astype(int)


def null_differences(num_clusters: int, simulations: int) -> np.ndarray:
    """Differences per token [simulations, tokens], mean 0: clusters of unequal sizes, intra-class correlation 0.5."""
    rng = np.random.default_rng(num_clusters)
    sizes = null_sizes(num_clusters)
    shared = np.repeat(rng.normal(size=(simulations, num_clusters)), sizes, axis=1)
    return np.sqrt(0.5) * shared + np.sqrt(0.5) * rng.normal(size=shared.shape)


def cluster_sums(differences: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.add.reduceat(differences, np.cumsum(sizes) - sizes, axis=1)


def rejections(monkeypatch, sums: np.ndarray, counts: np.ndarray, method: str, resamples: int = 1_000) -> np.ndarray:
    """For each simulation's sums [simulations, N] with counts [N]: does the 95 % interval leave out 0?

    The draws depend on the seed alone, and every simulation has the same seed, as every comparison of a study has:
    drawing once for all of them changes no result and takes most of the time away.
    """
    draws = list(stats.resampled_counts(len(counts), resamples, 0))
    monkeypatch.setattr(stats, "resampled_counts", lambda *arguments: draws)
    zeros = np.zeros(len(counts))
    intervals = [stats.paired_difference(row, zeros, counts, resamples, method=method) for row in sums]
    monkeypatch.undo()
    return np.array([not interval.low <= 0 <= interval.high for interval in intervals])


def test_simulated_null_has_the_intra_class_correlation_it_claims():
    sizes, differences = null_sizes(40), null_differences(40, 500)
    first = np.cumsum(sizes) - sizes
    pairs = differences[:, first], differences[:, first + 1]
    assert np.corrcoef(pairs[0].ravel(), pairs[1].ravel())[0, 1] == pytest.approx(0.5, abs=0.03)
    assert sizes.max() >= 10 * sizes.min() and differences.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("num_clusters", [40, 64, 120])
def test_studentised_bootstrap_holds_its_level(monkeypatch, num_clusters):
    sizes = null_sizes(num_clusters)
    sums = cluster_sums(null_differences(num_clusters, 1_000), sizes)
    rate = rejections(monkeypatch, sums, sizes, "studentised").mean()
    assert 0.035 <= rate <= 0.065


def test_percentile_interval_rejects_too_often_with_few_documents(monkeypatch):
    sizes = null_sizes(15)
    sums = cluster_sums(null_differences(15, 1_000), sizes)
    percentile = rejections(monkeypatch, sums, sizes, "percentile").mean()
    studentised = rejections(monkeypatch, sums, sizes, "studentised").mean()
    assert percentile > 0.08 and percentile > studentised + 0.015


def test_bootstrap_over_tokens_does_not_hold_its_level(monkeypatch):
    differences = null_differences(40, 1_000)[:200]
    rate = rejections(monkeypatch, differences, np.ones(differences.shape[1]), "percentile").mean()
    assert rate > 0.4  # the design effect is above 10: the standard error is a third of the true one


def test_a_thousand_resamples_tell_the_level_as_well_as_ten_thousand(monkeypatch):
    sizes = null_sizes(40)
    sums = cluster_sums(null_differences(40, 300), sizes)
    few = rejections(monkeypatch, sums, sizes, "studentised")
    many = rejections(monkeypatch, sums, sizes, "studentised", resamples=10_000)
    assert (few == many).mean() >= 0.98 and abs(few.mean() - many.mean()) <= 0.01


def test_an_effect_of_the_minimum_detectable_size_is_found_four_times_in_five(monkeypatch):
    sizes = null_sizes(64)
    sums = cluster_sums(null_differences(64, 1_000), sizes)
    zeros = np.zeros(64)
    effect = np.mean([stats.minimum_detectable_effect(row, zeros, sizes) for row in sums])
    found = rejections(monkeypatch, sums + effect * sizes, sizes, "studentised").mean()
    assert found == pytest.approx(0.8, abs=0.05)


# -- sets of sidecars
def test_equal_sets_are_one_set():
    rng = np.random.default_rng(1)
    a, b, count = rng.normal(size=30), rng.normal(size=30), rng.integers(1, 9, 30)
    for method in ("percentile", "studentised"):
        one = stats.paired_difference(a, b, count, 500, method=method)
        three = stats.paired_difference(np.stack([a] * 3), b, count, 500, method=method)
        # equal but for the last bit: sums of three rows may be taken in another order than those of one
        assert (three.estimate, three.low, three.high) == pytest.approx((one.estimate, one.low, one.high), rel=1e-12)
    assert stats.minimum_detectable_effect([a] * 3, b, count) == pytest.approx(
        stats.minimum_detectable_effect(a, b, count)
    )


def test_without_variance_between_documents_sets_give_a_t_interval():
    """Three sets that differ by constants, on documents that agree: mean +- t(2) * standard error of the sets."""
    effects = np.array([0.1, 0.4, 0.7])
    count = np.full(40, 5.0)
    sums = effects[:, None] * count + np.random.default_rng(0).normal(0, 1e-6, (3, 40))
    error = effects.std(ddof=1) / np.sqrt(3)
    interval = stats.paired_difference(sums, np.zeros(40), count, 40_000, method="studentised")
    reach = scipy_stats.t.ppf(0.975, 2) * error
    assert interval.estimate == pytest.approx(0.4, abs=1e-6)
    assert interval.high - 0.4 == pytest.approx(reach, rel=0.03) and 0.4 - interval.low == pytest.approx(
        reach, rel=0.03
    )
    p = stats.Bootstrap(40_000).p_value(sums, np.zeros(40), count)
    assert p == pytest.approx(2 * scipy_stats.t.sf(0.4 / error, 2), rel=0.05)
    effect = stats.minimum_detectable_effect(sums, np.zeros(40), count)
    assert effect == pytest.approx((scipy_stats.t.ppf(0.975, 2) + scipy_stats.t.ppf(0.8, 2)) * error, rel=1e-3)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_sets_keep_the_level(spread):
    """No true effect; sets differ `spread` times as much as documents do: 5 % of intervals or fewer leave out 0."""
    rng, wrong, alone, studies = np.random.default_rng(2), 0, 0, 300
    for number in range(studies):
        count = rng.integers(60, 600, 40).astype(float)
        own = spread * np.linalg.norm(count) / count.sum() * np.sqrt(3)
        sums = (own * rng.normal(size=(3, 1)) + rng.normal(size=40) + 0.5 * rng.normal(size=(3, 40))) * count
        interval = stats.paired_difference(sums, np.zeros(40), count, 400, number, method="studentised")
        wrong += not interval.low <= 0 <= interval.high
        one = stats.paired_difference(sums.mean(axis=0), np.zeros(40), count, 400, number, method="studentised")
        alone += not one.low <= 0 <= one.high
    assert wrong / studies <= 0.075  # 5 % and two standard errors
    if spread == 3.0:  # what an interval over documents alone does not know
        assert alone / studies > 0.4


def test_sets_must_fit():
    with pytest.raises(ValueError, match=r"the sums have shape \(3, 2\), count has \(3,\)"):
        stats.paired_difference(np.zeros((3, 2)), np.zeros((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        stats.paired_difference(np.array([[1.0, np.nan]]), np.zeros(2), np.ones(2))

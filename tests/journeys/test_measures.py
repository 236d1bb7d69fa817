"""src/journey_measures.py: against loops over single journeys, closed forms and invariants."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats as scipy_stats

from src.journeys import measures as measures


def journeys(
    num_rows: int = 300, num_layers: int = 5, num_experts: int = 4, slots: int = 2, padded: bool = False, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(experts [N, L, K], gating_probs [N, L, K] float16) that depend on the layer before; -1 pads some."""
    rng = np.random.default_rng(seed)
    experts = np.empty((num_rows, num_layers, slots), dtype=np.int16)
    before = np.zeros(num_rows, dtype=int)
    for layer in range(num_layers):
        scores = rng.random((num_rows, num_experts)) * np.linspace(0.5, 1, num_experts)
        scores[np.arange(num_rows), (before + layer) % num_experts] += 0.4
        experts[:, layer] = np.argsort(-scores, axis=1)[:, :slots]
        before = experts[:, layer, 0]
    gates = np.sort(rng.dirichlet(np.ones(slots), (num_rows, num_layers)), axis=2)[:, :, ::-1]
    if padded:
        kept = rng.integers(0, slots + 1, (num_rows, num_layers, 1))
        absent = np.arange(slots) >= kept
        experts[absent] = -1
        gates = np.where(absent, 0, gates)
    return experts, gates.astype(np.float16)


@pytest.fixture(params=[False, True], ids=["full", "padded"])
def data(request):
    return journeys(padded=request.param)


@pytest.fixture
def columns(data):
    return measures.strongest(data[0], 4)


@pytest.fixture
def clusters():
    """12 problems of 25 journeys."""
    return np.arange(300) // 25


def loop_transitions(experts: np.ndarray, source: int, target: int, num_experts: int, rows=None) -> np.ndarray:
    table = np.zeros((num_experts, num_experts))
    for row in range(len(experts)) if rows is None else rows:
        a, b = experts[row, source, 0], experts[row, target, 0]
        if a >= 0 and b >= 0:
            table[a, b] += 1
    return table


# -- use of experts
def test_strongest_and_counts(data, columns, monkeypatch):
    experts = data[0]
    assert columns.shape == (5, 300) and columns.dtype == np.uint8
    np.testing.assert_array_equal(columns.T, np.where(experts[:, :, 0] < 0, 4, experts[:, :, 0]))
    counts = measures.expert_counts(experts, 4)
    for layer in range(5):
        for slot in range(2):
            found = Counter(experts[:, layer, slot].tolist())
            assert counts[layer, slot].tolist() == [found[expert] for expert in range(4)]
    monkeypatch.setattr(measures, "BLOCK_ROWS", 64)  # several blocks, the last one shorter
    np.testing.assert_array_equal(measures.expert_counts(experts, 4), counts)
    np.testing.assert_array_equal(measures.strongest(experts, 4), columns)


def test_many_experts_need_two_bytes():
    experts = np.array([[[299], [0]], [[255], [256]]], dtype=np.int16)
    columns = measures.strongest(experts, 300)
    assert columns.tolist() == [[299, 255], [0, 256]]
    assert measures.transition_counts(columns, 300)[0, 1, 255, 256] == 1
    assert measures.unique_experts(columns, 300).tolist() == [2, 2]


def test_group_counts(data, columns, clusters):
    counts = measures.group_counts(columns, 4, clusters, 12)
    for group in range(12):
        rows = clusters == group
        np.testing.assert_array_equal(counts[group], measures.expert_counts(data[0][rows], 4)[:, 0])
    np.testing.assert_array_equal(counts.sum(axis=0), measures.expert_counts(data[0], 4)[:, 0])


def test_balance_closed_forms():
    even, alone, two = (measures.balance(np.array(c)) for c in ([5, 5, 5, 5], [0, 9, 0, 0], [3, 0, 3, 0]))
    assert even == pytest.approx({"entropy": 2, "entropy_ratio": 1, "max_over_mean": 1, "gini": 0})
    assert alone == pytest.approx({"entropy": 0, "entropy_ratio": 0, "max_over_mean": 4, "gini": 0.75})
    assert two == pytest.approx({"entropy": 1, "entropy_ratio": 0.5, "max_over_mean": 2, "gini": 0.5})
    counts = np.random.default_rng(0).integers(0, 50, (6, 7))
    loop = [np.abs(np.subtract.outer(row, row)).sum() / (2 * 7 * row.sum()) for row in counts]
    np.testing.assert_allclose(measures.balance(counts)["gini"], loop)
    np.testing.assert_allclose(
        measures.balance(counts)["entropy"], [scipy_stats.entropy(row, base=2) for row in counts]
    )
    assert all(np.isnan(value) for value in measures.balance(np.zeros(4)).values())


@pytest.mark.parametrize("num_experts", [4, 100])
def test_unique_experts(num_experts):
    experts, _ = journeys(num_experts=num_experts, num_layers=9, padded=True)
    found = measures.unique_experts(measures.strongest(experts, num_experts), num_experts)
    assert found.tolist() == [len(set(row[row >= 0].tolist())) for row in experts[:, :, 0]]


# -- gates
def test_gate_statistics(data):
    experts, gates = data
    counts, values = measures.gate_value_counts(experts, gates)
    found = measures.gate_statistics(counts, values, 0.8)
    pooled = measures.gate_statistics(counts.sum(axis=0), values, 0.8)
    for slot in range(2):
        kept = [gates[:, layer, slot][experts[:, layer, slot] >= 0].astype(np.float64) for layer in range(5)]
        for layer, probabilities in enumerate(kept):
            assert found["decisions"][layer, slot] == len(probabilities)
            assert found["mean"][layer, slot] == pytest.approx(probabilities.mean(), abs=1e-12)
            assert found["std"][layer, slot] == pytest.approx(probabilities.std(), abs=1e-12)
            assert found["share_above"][layer, slot] == (probabilities > 0.8).mean()
        everything = np.concatenate(kept)
        assert pooled["mean"][slot] == pytest.approx(everything.mean(), abs=1e-12)
        assert pooled["std"][slot] == pytest.approx(everything.std(), abs=1e-12)


def test_gates_without_probabilities():
    experts, gates = journeys()
    gates = gates.copy()
    gates[:, 2] = np.nan
    gates[0, 0] = np.nan
    found = measures.gate_statistics(*measures.gate_value_counts(experts, gates), 0.8)
    assert found["decisions"].tolist() == [[299, 299], [300, 300], [0, 0], [300, 300], [300, 300]]
    assert np.isnan(found["mean"][2]).all() and np.isfinite(found["mean"][[0, 1, 3, 4]]).all()
    sums, above, number = measures.group_gates(experts, gates, np.zeros(300, dtype=int), 1, 0.8)
    assert number[0].tolist() == [299, 300, 0, 300, 300] and sums[0, 2] == above[0, 2] == 0


def test_group_gates(data, clusters):
    experts, gates = data
    sums, above, number = measures.group_gates(experts, gates, clusters, 12, 0.8)
    top = gates[:, :, 0].astype(np.float64)
    for group in range(12):
        valid = (experts[:, :, 0] >= 0) & (clusters == group)[:, None]
        np.testing.assert_allclose(sums[group], (top * valid).sum(axis=0))
        np.testing.assert_array_equal(above[group], ((top > 0.8) & valid).sum(axis=0))
        np.testing.assert_array_equal(number[group], valid.sum(axis=0))


def test_blocks_of_rows_do_not_matter(data, columns, clusters, monkeypatch):
    experts, gates = data

    def everything():
        return [
            measures.gate_value_counts(experts, gates)[0],
            *measures.group_gates(experts, gates, clusters, 12, 0.8),
            measures.unique_experts(columns, 4),
        ]

    whole = everything()
    monkeypatch.setattr(measures, "BLOCK_ROWS", 7)
    for one, other in zip(whole, everything(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12)


# -- from layer to layer
def test_transition_counts(data, columns, monkeypatch):
    experts = data[0]
    counts = measures.transition_counts(columns, 4)
    for source in range(5):
        for target in range(5):
            np.testing.assert_array_equal(counts[source, target], loop_transitions(experts, source, target, 4))
    np.testing.assert_array_equal(counts, counts.transpose(1, 0, 3, 2))
    monkeypatch.setattr(measures, "BLOCK_ROWS", 1)  # blocks of 2 * 5 * 5 or 2 * 4 * 4 rows
    np.testing.assert_array_equal(measures.transition_counts(columns, 4), counts)


def test_affinity_against_loops(data, columns):
    counts = measures.transition_counts(columns, 4)
    related = measures.affinity(counts)
    for source in range(5):
        for target in range(5):
            if source == target:
                assert related["reference"][source, target] == 0
                assert all(np.isnan(related[name][source, target]) for name in ("weighted", "majority", "nmi"))
                continue
            table = loop_transitions(data[0], source, target, 4)
            rows = [row.max() / max(row.sum(), 1) for row in table]
            assert related["reference"][source, target] == pytest.approx(sum(rows) / 4, abs=1e-12)
            weighted = sum(row.max() for row in table) / table.sum()
            assert related["weighted"][source, target] == pytest.approx(weighted, abs=1e-12)
            assert related["majority"][source, target] == pytest.approx(table.sum(axis=0).max() / table.sum())
            p = table / table.sum()
            information = sum(
                p[a, b] * np.log(p[a, b] / (p[a].sum() * p[:, b].sum()))
                for a in range(4)
                for b in range(4)
                if p[a, b] > 0
            )
            mean = (scipy_stats.entropy(p.sum(axis=0)) + scipy_stats.entropy(p.sum(axis=1))) / 2
            assert related["nmi"][source, target] == pytest.approx(information / mean, abs=1e-12)
    # knowing the source can only help, on the data it was counted on
    off = ~np.eye(5, dtype=bool)
    assert (related["weighted"][off] >= related["majority"][off]).all()
    np.testing.assert_allclose(related["nmi"], related["nmi"].T)


def permuted_layers(num_rows: int = 5000, num_layers: int = 4, num_experts: int = 8, seed: int = 0) -> np.ndarray:
    """Columns [L, N] in which each layer's expert is a fixed permutation of the first layer's."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, num_experts, num_rows)
    return np.stack([rng.permutation(num_experts)[first] for _ in range(num_layers)]).astype(np.uint8)


def test_deterministic_routing():
    counts = measures.transition_counts(permuted_layers(), 8)
    off = ~np.eye(4, dtype=bool)
    related = measures.affinity(counts)
    for name in ("reference", "weighted", "nmi"):
        np.testing.assert_allclose(related[name][off], 1, atol=1e-12)
    np.testing.assert_allclose(measures.cramers_v(counts), 1, atol=1e-12)
    accuracy, majority = measures.hop_accuracy(counts)
    np.testing.assert_array_equal(accuracy, 1)
    assert (majority < 0.2).all()


def test_independent_uniform_routing():
    columns = np.random.default_rng(0).integers(0, 8, (4, 40_000)).astype(np.uint8)
    counts = measures.transition_counts(columns, 8)
    related = measures.affinity(counts)
    off = ~np.eye(4, dtype=bool)
    # expectation of the plug-in information: (E - 1)^2 / 2N nats over log(E)
    assert (related["nmi"][off] < 3 * 49 / 80_000 / np.log(8)).all() and (related["nmi"][off] > 0).all()
    np.testing.assert_allclose(related["weighted"][off], 1 / 8, atol=0.02)
    assert (measures.cramers_v(counts)[off] < 0.03).all()
    accuracy, majority = measures.hop_accuracy(counts)
    np.testing.assert_allclose(accuracy, 1 / 8, atol=0.02)
    np.testing.assert_allclose(majority, 1 / 8, atol=0.01)


def test_an_unused_source_expert_counts_in_the_reference_alone():
    # experts 0 and 1 of 4 are used, each followed by itself: two of four rows are empty
    columns = np.array([[0, 1] * 10] * 2, dtype=np.uint8)
    related = measures.affinity(measures.transition_counts(columns, 4))
    assert related["reference"][0, 1] == 0.5
    assert related["weighted"][0, 1] == related["nmi"][0, 1] == 1


def test_a_rare_source_expert_weighs_as_much_in_the_reference():
    # expert 1 occurs once in 100 and is always followed by 1; expert 0 by 0 and 1 alike
    columns = np.array([[0] * 98 + [1, 1], [0, 1] * 49 + [1, 1]], dtype=np.uint8)
    related = measures.affinity(measures.transition_counts(columns, 2))
    assert related["reference"][0, 1] == pytest.approx(0.75)
    assert related["weighted"][0, 1] == pytest.approx(0.51) == related["majority"][0, 1]


def test_a_layer_with_one_expert():
    columns = np.zeros((3, 20), dtype=np.uint8)
    columns[1, ::2] = 1
    counts = measures.transition_counts(columns, 2)
    assert measures.affinity(counts)["nmi"][0, 1] == measures.affinity(counts)["nmi"][0, 2] == 0
    assert np.isnan(measures.cramers_v(counts)[0, 1]) and np.isnan(measures.id_correlation(counts)[0, 1])
    assert measures.id_correlation(counts)[1, 1] == 1


def test_a_pair_without_journeys():
    columns = np.array([[0, 1, 2, 2], [2, 2, 0, 1]], dtype=np.uint8)  # 2 = none
    counts = measures.transition_counts(columns, 2)
    assert counts[0, 1].sum() == 0 and counts[0, 0].sum() == 2
    related = measures.affinity(counts)
    assert related["reference"][0, 1] == 0
    assert all(np.isnan(related[name][0, 1]) for name in ("weighted", "majority", "nmi"))
    assert np.isnan(measures.cramers_v(counts)[0, 1]) and np.isnan(measures.id_correlation(counts)[0, 1])


def test_transition_probabilities():
    probabilities = measures.transition_probabilities(np.array([[3, 1], [0, 0]]))
    assert probabilities.tolist() == [[0.75, 0.25], [0, 0]]


def test_id_correlation_is_that_of_the_ids():
    experts, _ = journeys()
    counts = measures.transition_counts(measures.strongest(experts, 4), 4)
    np.testing.assert_allclose(measures.id_correlation(counts), np.corrcoef(experts[:, :, 0].T), atol=1e-12)
    labels = np.array([[3, 0, 2, 1]] * 5)
    renumbered = np.corrcoef(labels[0][experts[:, :, 0]].T)
    np.testing.assert_allclose(measures.id_correlation(counts, labels), renumbered, atol=1e-12)
    assert np.abs(renumbered - np.corrcoef(experts[:, :, 0].T)).max() > 0.05


def test_correlation_leaves_out_pairs_without_experts():
    experts, _ = journeys(padded=True)
    found = measures.id_correlation(measures.transition_counts(measures.strongest(experts, 4), 4))
    both = (experts[:, 1, 0] >= 0) & (experts[:, 3, 0] >= 0)
    expected = np.corrcoef(experts[both, 1, 0], experts[both, 3, 0])[0, 1]
    assert (found[1, 3], found[3, 1]) == pytest.approx((expected, expected), abs=1e-12)


def test_ids_mislead_where_cramers_v_does_not():
    # the target is the source's distance from 3.5: determined by it, yet uncorrelated with its id
    source = np.tile(np.arange(8), 50)
    columns = np.stack([source, np.abs(2 * source - 7) // 2]).astype(np.uint8)
    counts = measures.transition_counts(columns, 8)
    assert measures.id_correlation(counts)[0, 1] == pytest.approx(0, abs=1e-12)
    assert measures.cramers_v(counts)[0, 1] == pytest.approx(1)


def test_cramers_v_against_scipy(data, columns):
    counts = measures.transition_counts(columns, 4)
    found = measures.cramers_v(counts)
    for source, target in ((0, 1), (1, 4), (3, 2)):
        expected = scipy_stats.contingency.association(counts[source, target], method="cramer")
        assert found[source, target] == pytest.approx(expected, abs=1e-12)
    renumbered = counts[:, :, :, ::-1]
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(measures.cramers_v(renumbered)[off], found[off], atol=1e-12)


# -- predicting layers ahead
def test_hop_accuracy_against_loops(data, columns):
    experts = data[0]
    accuracy, majority = measures.hop_accuracy(measures.transition_counts(columns, 4))
    assert accuracy.shape == majority.shape == (4,)
    for hop in range(1, 5):
        right = common = tried = 0
        for source in range(5 - hop):
            table = loop_transitions(experts, source, source + hop, 4)
            best, most = table.argmax(axis=1), table.sum(axis=0).argmax()
            for a, b in experts[:, [source, source + hop], 0]:
                if a >= 0 and b >= 0:
                    right, common, tried = right + (best[a] == b), common + (most == b), tried + 1
        assert accuracy[hop - 1] == pytest.approx(right / tried, abs=1e-12)
        assert majority[hop - 1] == pytest.approx(common / tried, abs=1e-12)


def test_folds_spread_every_domain():
    domains = np.array([0] * 10 + [1] * 20)
    folds = measures.problem_folds(domains, 5, seed=3)
    for domain, share in ((0, 2), (1, 4)):
        assert np.bincount(folds[domains == domain]).tolist() == [share] * 5
    assert measures.problem_folds(domains, 5, seed=3).tolist() == folds.tolist()
    assert measures.problem_folds(domains, 5, seed=4).tolist() != folds.tolist()
    assert sorted(measures.problem_folds(np.zeros(3, int), 5, seed=0)) == [0, 1, 2]
    with pytest.raises(ValueError, match="5 folds of 1 problems"):
        measures.problem_folds(np.zeros(1, int), 5, seed=0)


@pytest.mark.parametrize("rows", [1, 32_768])
def test_held_out_hits_against_loops(data, columns, clusters, rows, monkeypatch):
    monkeypatch.setattr(measures, "BLOCK_ROWS", rows)
    experts = data[0]
    folds = measures.problem_folds(np.zeros(12, dtype=int), 3, seed=0)
    right, common, tried = measures.held_out_hits(columns, 4, clusters, folds)
    expected = np.zeros((3, 12, 4), dtype=int)
    for fold in range(3):
        training = [row for row in range(300) if folds[clusters[row]] != fold]
        for source in range(5):
            for target in range(source + 1, 5):
                table = loop_transitions(experts, source, target, 4, training)
                most = table.sum(axis=0).argmax()
                for row in range(300):
                    a, b = experts[row, source, 0], experts[row, target, 0]
                    if folds[clusters[row]] == fold and a >= 0 and b >= 0:
                        cell = (clusters[row], target - source - 1)
                        best = table[a].argmax() if table[a].any() else most
                        expected[0][cell] += best == b
                        expected[1][cell] += most == b
                        expected[2][cell] += 1
    np.testing.assert_array_equal((right, common, tried), expected)


def test_an_expert_that_training_never_met_gets_the_majority():
    # problem 1 uses source expert 2, which problem 0 never does; the majority of problem 0's targets is 1
    columns = np.array([[0, 0, 1, 2], [1, 1, 0, 1]], dtype=np.uint8)
    right, common, tried = measures.held_out_hits(columns, 3, np.array([0, 0, 0, 1]), np.array([0, 1]))
    assert right[1, 0] == common[1, 0] == tried[1, 0] == 1


def test_out_of_sample_is_no_better_than_in_sample_on_noise(clusters):
    columns = np.random.default_rng(0).integers(0, 8, (6, 300)).astype(np.uint8)
    accuracy, _ = measures.hop_accuracy(measures.transition_counts(columns, 8))
    right, _, tried = measures.held_out_hits(columns, 8, clusters, measures.problem_folds(np.zeros(12, int), 4, seed=0))
    held_out = right.sum(axis=0) / tried.sum(axis=0)
    assert (accuracy > 0.17).all()  # fitted noise: 1/8 and more
    assert (held_out < 0.16).all()


def test_ratio_intervals():
    rng = np.random.default_rng(0)
    tried = np.full((40, 2), 100.0)
    right = np.stack([rng.binomial(100, 0.3, 40), np.full(40, 60)], axis=1)
    low, high = measures.ratio_intervals(right, tried, 2000, 0, 0.95)
    mean = right[:, 0].mean() / 100
    error = 1.96 * right[:, 0].std() / 100 / np.sqrt(40)
    assert (low[0], high[0]) == pytest.approx((mean - error, mean + error), abs=0.004)
    assert low[1] == high[1] == pytest.approx(0.6)
    assert np.isnan(measures.ratio_intervals(right[:1], tried[:1], 10, 0, 0.95)).all()


# -- paths
@pytest.mark.parametrize(("num_layers", "num_experts"), [(3, 4), (30, 8), (70, 60)])
def test_paths_against_a_counter(num_layers, num_experts):
    rng = np.random.default_rng(0)
    some = rng.integers(0, num_experts, (num_layers, 40)).astype(np.uint8)
    columns = some[:, rng.integers(0, 40, 500) ** 2 // 40]  # repeated paths, some more than others
    codes = measures.path_codes(columns, num_experts)
    assert codes.min() >= 0
    paths = [tuple(column.tolist()) for column in columns.T]
    assert len(set(zip(codes.tolist(), paths, strict=True))) == len(set(paths)) == len(set(codes.tolist()))
    counter = Counter(paths)
    distinct, most, ids = measures.common_paths(codes, 10)
    assert distinct == len(counter) == len(set(zip(ids.tolist(), paths, strict=True)))
    # Counter keeps equal counts in order of appearance too
    assert [(paths[row], count) for count, row in most] == counter.most_common(10)
    assert all(paths.index(paths[row]) == row for _, row in most)


def test_fewer_paths_than_are_asked_for():
    distinct, most, ids = measures.common_paths(np.array([4, 4, 4]), 10)
    assert (distinct, most, ids.tolist()) == (1, [(3, 0)], [0, 0, 0])


def test_layers_without_expert_are_part_of_the_path():
    columns = np.array([[0, 0, 2], [1, 2, 1]], dtype=np.uint8)  # 2 = none
    assert len(set(measures.path_codes(columns, 2).tolist())) == 3


# -- domains
def test_js_distance():
    assert measures.js_distance(np.array([3, 0]), np.array([0, 8])) == 1
    assert measures.js_distance(np.array([3, 1]), np.array([6, 2])) == 0
    assert np.isnan(measures.js_distance(np.array([0, 0]), np.array([6, 2])))
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    divergence = sum(0.5 * scipy_stats.entropy(x, (p + q) / 2, base=2) for x in (p, q))
    assert measures.js_distance(p, q) == pytest.approx(np.sqrt(divergence))


def test_domains_that_differ_in_one_layer():
    rng = np.random.default_rng(0)
    first = np.arange(40) < 15
    shares = np.full((40, 3, 4), 0.25)
    shares[first, 1] = [0.4, 0.3, 0.2, 0.1]
    counts = np.stack([[rng.multinomial(60, layer) for layer in problem] for problem in shares])
    distance, p, p_any = measures.domain_distance(counts, first, 999, seed=0)
    pooled = [counts[first].sum(axis=0), counts[~first].sum(axis=0)]
    np.testing.assert_allclose(distance, measures.js_distance(*pooled))
    assert p[1] == p_any[1] == 0.001 and (p[[0, 2]] > 0.05).all()
    assert (p_any >= p).all()
    again = measures.domain_distance(counts, first, 999, seed=0)
    np.testing.assert_array_equal(again, (distance, p, p_any))
    swapped = measures.domain_distance(counts, ~first, 999, seed=0)[0]
    np.testing.assert_allclose(swapped, distance)


def test_p_values_are_uniform_where_domains_are_alike():
    # tokens of a problem agree with one another: shuffling tokens would find differences everywhere
    rng = np.random.default_rng(1)
    values = []
    for seed in range(60):
        habits = rng.dirichlet(np.ones(4), (20, 1))
        counts = np.stack([[rng.multinomial(200, layer) for layer in problem] for problem in habits])
        values.append(measures.domain_distance(counts, np.arange(20) < 10, 99, seed)[1][0])
    assert np.mean(np.array(values) <= 0.05) <= 0.15 and 0.35 < np.mean(values) < 0.65


def test_one_problem_in_each_domain_shows_nothing():
    counts = np.array([[[9, 0]], [[0, 9]]])
    distance, p, p_any = measures.domain_distance(counts, np.array([True, False]), 50, seed=0)
    assert distance[0] == 1 and p[0] == p_any[0] == 1


# -- tokens
def test_token_agreement_against_loops(columns):
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.3, 300) - 1, 9)
    tokens[tokens == 9] = 8
    tokens[0] = 9  # occurs once
    same, anything, by_token, profiles = measures.token_agreement(columns, 4, tokens, 10, np.array([0, 2]))
    shares = np.full((5, 10), np.nan)
    for layer, column in enumerate(columns):
        pairs = equal = all_pairs = all_equal = 0
        by = np.zeros((10, 2))
        for i in range(300):
            for j in range(i):
                if column[i] == 4 or column[j] == 4:
                    continue
                all_pairs, all_equal = all_pairs + 1, all_equal + (column[i] == column[j])
                if tokens[i] == tokens[j]:
                    by[tokens[i]] += (1, column[i] == column[j])
        pairs, equal = by.sum(axis=0)
        assert same[layer] == pytest.approx(equal / pairs, abs=1e-12)
        assert anything[layer] == pytest.approx(all_equal / all_pairs, abs=1e-12)
        shares[layer, by[:, 0] > 0] = by[by[:, 0] > 0, 1] / by[by[:, 0] > 0, 0]
        for token, profile in ((0, profiles[0]), (2, profiles[1])):
            chosen = column[(tokens == token) & (column < 4)]
            np.testing.assert_allclose(profile[layer], np.bincount(chosen, minlength=4) / len(chosen))
    assert np.isnan(by_token[9])
    np.testing.assert_allclose(by_token[:9], np.nanmean(shares[:, :9], axis=0), atol=1e-12)


def test_routing_by_token_alone():
    tokens = np.repeat(np.arange(8), 5)
    columns = np.stack([tokens, 7 - tokens]).astype(np.uint8)
    same, anything, by_token, _ = measures.token_agreement(columns, 8, tokens, 8, np.array([0]))
    np.testing.assert_array_equal(same, 1)
    np.testing.assert_array_equal(by_token, 1)
    np.testing.assert_allclose(anything, 4 / 39)


def test_consecutive_pairs_in_any_order():
    clusters = np.array([0, 0, 0, 1, 1, 1])
    token_idx = np.array([0, 1, 3, 0, 1, 2])
    first, second = measures.consecutive_pairs(clusters, token_idx)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (3, 4), (4, 5)]
    order = np.array([4, 2, 0, 5, 3, 1])
    first, second = measures.consecutive_pairs(clusters[order], token_idx[order])
    assert {(order[a], order[b]) for a, b in zip(first, second, strict=True)} == {(0, 1), (3, 4), (4, 5)}


def test_consecutive_agreement_against_loops(data, clusters, monkeypatch):
    experts = data[0]
    token_idx = np.arange(300) % 25
    pairs = measures.consecutive_pairs(clusters, token_idx)
    found = measures.consecutive_agreement(experts, *pairs)
    for layer in range(5):
        number = equal = shared = 0
        for one, two in pairwise(range(300)):
            a, b = experts[one, layer], experts[two, layer]
            if clusters[one] != clusters[two] or a[0] < 0 or b[0] < 0:
                continue
            number, equal = number + 1, equal + (a[0] == b[0])
            shared += len(set(a[a >= 0].tolist()) & set(b[b >= 0].tolist()))
        assert found["pairs"][layer] == number
        assert found["agreement"][layer] == pytest.approx(equal / number)
        assert found["overlap"][layer] == pytest.approx(shared / (2 * number))
    monkeypatch.setattr(measures, "BLOCK_ROWS", 50)
    again = measures.consecutive_agreement(experts, *pairs)
    assert all((again[name] == found[name]).all() for name in found)

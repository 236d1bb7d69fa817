"""The predictors on journeys of known structure: what a chain allows, what leaks, what nobody can know."""

from types import SimpleNamespace

import numpy as np
import pytest

from src.base import stats
from src.journeys import networks, predictors, scoring
from src.journeys.cells import (
    PARTS,
    Cells,
    Data,
    cells_of,
    prepare,
    problem_parts,
    split_by_problem,
    split_by_row,
    targets_of,
)
from src.journeys.measures import problem_folds
from src.journeys.networks import Network, Settings
from src.journeys.predictors import fit
from src.journeys.sample import to_sample

E, K = 5, 2
SETTINGS = Settings(
    mlp=Network(widths=(32,), learning_rate=1e-2, batch_rows=256),
    mlp_tuned=Network(widths=(64,), history=6, per_layer=True, learning_rate=1e-2, batch_rows=256),
    linear_probe=Network(widths=(), learning_rate=2e-2, batch_rows=64),
    mlp_probe=Network(widths=(32,), learning_rate=2e-2, batch_rows=64),
    train_rows=6000,
    epochs=6,
    probe_epochs=10,
    validation_rows=2000,
    xgboost_rows=3000,
    xgboost_rounds=15,
)


def sample_of(first: np.ndarray, problems: int, domains: int = 2, num_experts: int = E, second=None):
    """Journeys with these strongest experts [N, L], `problems` problems of equal length in turn over the domains."""
    rng = np.random.default_rng(7)
    rows = len(first)
    if second is None:
        second = (first + 1 + rng.integers(0, num_experts - 1, first.shape)) % num_experts
    gates = rng.uniform(0.5, 1, first.shape)
    problem = np.arange(rows) * problems // rows
    journeys = SimpleNamespace(
        dataset=np.array([f"set{p % domains}" for p in problem]),
        problem_id=problem.astype(np.int32),
        token_idx=(np.arange(rows) - np.searchsorted(problem, problem)).astype(np.int32),
        token_id=np.full(rows, -1),
        token=np.full(rows, "", dtype=object),
        experts=np.stack((first, second), axis=2).astype(np.int16),
        gating_probs=np.stack((gates, 1 - gates), axis=2).astype(np.float16),
        layers=tuple(range(3, 3 + first.shape[1])),
        num_experts=num_experts,
    )
    return to_sample(journeys)


def chain(rows: int, layers: int, order: int, strength: float, seed: int = 0) -> np.ndarray:
    """Strongest experts [N, L]: with probability `strength` a function of the last `order`, by layer, else any."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, E, (layers, E, E))
    table[1:] = np.where(table[1:] == table[:-1], (table[1:] + 1) % E, table[1:])
    first = rng.integers(0, E, (rows, layers))
    for layer in range(order, layers):
        follows = table[layer, first[:, layer - 1], first[:, layer - 2] if order == 2 else 0]
        first[:, layer] = np.where(rng.random(rows) < strength, follows, first[:, layer])
    return first


@pytest.fixture(scope="module")
def first_order() -> Data:
    return prepare(sample_of(chain(3000, 6, 1, 0.7), 30))


@pytest.fixture(scope="module")
def second_order() -> Data:
    return prepare(sample_of(chain(4000, 6, 2, 0.8), 30))


class Hidden:
    """Router inputs of the first `rows` journeys, as journeys.Hidden has them."""

    def __init__(self, states: np.ndarray, weight: np.ndarray, activation: str = "softmax"):
        self.rows, self.states = np.arange(len(states)), [states]
        self.weight, self.activation = weight, activation

    def layer(self, place: int) -> np.ndarray:
        return np.concatenate([part[:, place] for part in self.states]).astype(np.float32)


def with_hidden(activation: str = "softmax", rows: int = 1200, layers: int = 4, dim: int = 12, drift: float = 0.6):
    """Journeys of routers on a drifting state; the first two thirds of the problems have router inputs."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(layers, E, dim)).astype(np.float32)
    states = np.empty((rows, layers, dim), dtype=np.float32)
    states[:, 0] = rng.normal(size=(rows, dim))
    for layer in range(1, layers):
        states[:, layer] = states[:, layer - 1] + drift * rng.normal(size=(rows, dim))
    strength = np.einsum("nld,led->nle", states, weight)
    if activation == "relu":
        strength = np.maximum(strength, 0)
    order = np.argsort(-strength, axis=2)[:, :, :K]
    sample = sample_of(order[:, :, 0], 30, second=order[:, :, 1])
    if activation == "relu":
        sample.experts[np.take_along_axis(strength, order, 2) <= 0] = -1
    return prepare(sample, Hidden(states[: rows * 2 // 3], weight, activation))


def top1(name: str, data: Data, hop: int = 1, split=None, seed: int = 0) -> float:
    split = split or split_by_problem(data, problem_parts(data, 0), hop)
    fitted = fit(name, data, split.train, split.validation, SETTINGS, seed)
    return float(scoring.evaluate(fitted, data, split.test)[0].hits[:, 0].mean())


# -- structure


def test_transition_reaches_the_accuracy_of_a_first_order_chain(first_order):
    """0.7 by the function and 1/5 of the remaining 0.3 by chance: 0.76; 600 journeys x 5 layers are scored."""
    noise = 4 * np.sqrt(0.76 * 0.24 / 3000)
    for name in ("transition", "lookup", "mlp"):
        assert abs(top1(name, first_order) - 0.76) < noise + (0.02 if name == "mlp" else 0), name
    assert top1("majority", first_order) < 0.4


def test_two_hops_multiply(first_order):
    """Two layers ahead the function of the chain holds with 0.49, and otherwise any expert may come."""
    found = top1("transition", first_order, hop=2)
    assert 0.49 + 0.51 / E - 0.04 < found < 0.75


def test_lookup_and_networks_beat_transition_on_a_second_order_chain(second_order):
    """Known to the chain from layer 1 on (4 of 5 source layers): 0.84 there, near 0.2 from layer 0."""
    ideal = (4 * (0.8 + 0.2 / E) + 1 / E) / 5
    single = top1("transition", second_order)
    lookup = top1("lookup", second_order)
    assert single + 0.15 < lookup
    assert abs(lookup - ideal) < 0.03
    assert top1("mlp_tuned", second_order) > single + 0.15
    assert top1("xgboost", second_order) > single + 0.15


def test_previous_token_sees_the_target_layer_of_the_token_before():
    """Experts that stay for pairs of tokens: right for the second of a pair, of no use for the first."""
    rng = np.random.default_rng(0)
    first = np.repeat(rng.integers(0, E, (1500, 4)), 2, axis=0)
    data = prepare(sample_of(first, 30))
    assert abs(top1("previous_token", data) - (0.5 + 0.5 / E)) < 0.04
    split = split_by_problem(data, problem_parts(data, 0), 1)
    fitted = fit("previous_token", data, split.train, split.validation, SETTINGS)
    starts = split.test.select(data.previous[split.test.journey] == -1)
    majority = fit("majority", data, split.train, split.validation, SETTINGS)
    assert len(starts) and (data.position[starts.journey] == 0).all()
    np.testing.assert_allclose(fitted.predict(starts), majority.predict(starts))


def test_counts_by_brute_force(first_order):
    """majority, transition and lookup's first length against dictionaries of counts."""
    data = first_order
    split = split_by_problem(data, problem_parts(data, 0), 1)
    counts, totals = {}, {}
    for n, layer in zip(split.train.journey, split.train.layer, strict=True):
        source, target = data.experts[n, layer, 0], data.experts[n, layer + 1, 0]
        counts[layer, source, target] = counts.get((layer, source, target), 0) + 1
        totals[layer, source] = totals.get((layer, source), 0) + 1
    few = split.test.select(np.arange(0, len(split.test), 97))
    fitted = fit("transition", data, split.train, split.validation, SETTINGS)
    majority = fit("majority", data, split.train, split.validation, SETTINGS)
    for row, found, base in zip(range(len(few)), fitted.predict(few), majority.predict(few), strict=True):
        layer, source = few.layer[row], data.experts[few.journey[row], few.layer[row], 0]
        in_layer = sum(value for key, value in totals.items() if key[0] == layer)
        for target in range(E):
            count = sum(counts.get((layer, other, target), 0) for other in range(E))
            expected = (count + 1) / (in_layer + E)
            assert base[target] == pytest.approx(expected)
            expected = (counts.get((layer, source, target), 0) + expected) / (totals.get((layer, source), 0) + 1)
            assert found[target] == pytest.approx(expected)
    assert majority.parameters == 5 * E + 5  # an entry for each expert of each of 5 layers, and the layers


def test_lookup_chooses_smoothing_on_validation_cells(second_order):
    """Other training cells would be another fit; other test cells must not be."""
    data, parts = second_order, problem_parts(second_order, 0)
    split = split_by_problem(data, parts, 1)
    fitted = fit("lookup", data, split.train, split.validation, SETTINGS)
    changed = data.experts.copy()
    changed[parts[data.problem] == 2] = 0
    blind = Data(**{**vars(data), "experts": changed})
    again = fit("lookup", blind, split.train, split.validation, SETTINGS)
    some = split.validation
    np.testing.assert_array_equal(fitted.predict(some), again.predict(some))
    worst = predictors._fit_counts("", data, split.train, [np.inf] * 5).predict(some)
    target = targets_of(data, some)[:, :1]

    def loss(probabilities):
        return -np.log(np.take_along_axis(probabilities, target, 1)).mean()

    for strengths in ([1.0] * 5, [8.0] * 5, [64.0] * 5):
        assert (
            loss(fitted.predict(some))
            < loss(predictors._fit_counts("", data, split.train, strengths).predict(some)) + 0.01
        )
    assert loss(fitted.predict(some)) < loss(worst) - 0.3


# -- what is known


@pytest.mark.parametrize("name", [name for name in predictors.PREDICTORS if name != "previous_token"])
def test_nothing_after_the_source_layer_is_used(name):
    data = with_hidden()
    split = split_by_problem(data, problem_parts(data, 0), 1)
    fitted = fit(name, data, split.train, split.validation, SETTINGS)
    for layer in range(len(data.layers) - 1):
        cells = split.test.select(split.test.layer == layer)
        before = fitted.predict(cells)
        later = slice(layer + 1, None)
        saved = data.experts[:, later].copy(), data.gates[:, later].copy(), data.hidden.states[0][:, later].copy()
        data.experts[:, later] = (data.experts[:, later] + 1) % E
        data.gates[:, later] = 0.123
        data.hidden.states[0][:, later] = -1.0
        np.testing.assert_array_equal(fitted.predict(cells), before)
        data.experts[:, later], data.gates[:, later], data.hidden.states[0][:, later] = saved


def test_history_predictors_do_see_the_source_layer(first_order):
    data = Data(**{**vars(first_order), "experts": first_order.experts.copy()})
    split = split_by_problem(data, problem_parts(data, 0), 1)
    cells = split.test.select(split.test.layer == 2)
    for name in ("transition", "lookup", "mlp", "xgboost"):
        fitted = fit(name, data, split.train, split.validation, SETTINGS)
        before = fitted.predict(cells)
        data.experts[:, 2] = (data.experts[:, 2] + 1) % E
        assert np.abs(fitted.predict(cells) - before).max() > 0.2, name
        data.experts[:, 2] = (data.experts[:, 2] - 1) % E


def test_previous_token_does_not_see_its_own_journey(first_order):
    data = Data(**{**vars(first_order), "experts": first_order.experts.copy()})
    split = split_by_problem(data, problem_parts(data, 0), 1)
    fitted = fit("previous_token", data, split.train, split.validation, SETTINGS)
    cells = split.test.select(data.position[split.test.journey] % 2 == 1)
    before = fitted.predict(cells)
    data.experts[data.position % 2 == 1] = 0
    np.testing.assert_array_equal(fitted.predict(cells), before)


# -- splits


def test_problem_split_shares_no_problem_and_is_60_20_20():
    data = with_hidden()
    parts = problem_parts(data, 0)
    assert np.bincount(parts).tolist() == [18, 6, 6]
    for domain in range(2):
        assert np.bincount(parts[data.domain_of_problem == domain]).tolist() == [9, 3, 3]
    hidden = np.unique(data.problem[data.hidden_row >= 0])
    assert np.bincount(parts[hidden]).tolist() == [12, 4, 4]
    for hop in (1, 2):
        split = split_by_problem(data, parts, hop)
        sets = [set(data.problem[cells.journey]) for cells in (split.train, split.validation, split.test)]
        assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
        assert sets[2] <= set(hidden)
        assert len(split.train) == 18 * 40 * (4 - hop) and len(split.test) == 4 * 40 * (4 - hop)
    assert (problem_parts(data, 1) != parts).any() and (problem_parts(data, 0) == parts).all()


def test_row_split_scatters_the_same_cells_of_every_journey(first_order):
    split = split_by_row(first_order, 1, 0)
    parts = [
        set(zip(c.journey.tolist(), c.layer.tolist(), strict=True)) for c in (split.train, split.validation, split.test)
    ]
    everything = set(
        zip(*(v.tolist() for v in vars(cells_of(first_order, 1)).values() if not isinstance(v, int)), strict=True)
    )
    assert parts[0] | parts[1] | parts[2] == everything and sum(map(len, parts)) == len(everything)
    assert [round(len(part) / len(everything), 3) for part in parts] == [0.6, 0.2, 0.2]
    assert len({n for n, _ in parts[0]} & {n for n, _ in parts[2]}) > 1800  # of 3,000, 1,986 expected


def test_padded_targets_are_no_cells():
    first = chain(500, 4, 1, 0.5)
    sample = sample_of(first, 10)
    sample.experts[::3, 2] = -1
    data = prepare(sample)
    cells = cells_of(data, 1)
    assert len(cells) == 500 * 3 - len(range(0, 500, 3))
    assert (targets_of(data, cells)[:, 0] >= 0).all()
    for name in ("transition", "lookup", "previous_token", "mlp", "xgboost"):
        assert 0 < top1(name, data) < 1, name


def test_too_few_problems_are_cut_into_runs_of_tokens():
    data = prepare(sample_of(chain(300, 4, 1, 0.7), 2))
    assert data.in_blocks and len(data.problem_names) == 50 and data.problem_names[0] == "set0/0, part 1 of 25"
    assert all(np.ptp(np.flatnonzero(data.problem == p)) == 5 for p in range(50))
    assert (data.previous >= 0).sum() == 298  # a run's first token still has a token before it
    assert np.bincount(problem_parts(data, 0)).tolist() == [30, 10, 10]


# -- leakage


def test_the_row_split_leaks_and_the_problem_split_does_not():
    """Every sixth layer shows the journey's own random expert, and the layers between a code that is its alone.

    Whoever trains on a journey's later layers knows the expert; nobody else can.
    """
    rng = np.random.default_rng(0)
    rows, layers = 240, 25
    code = rng.integers(0, 8, (rows, 6))
    first = np.zeros((rows, layers), dtype=np.int64)
    first[:, 6::6] = rng.integers(0, 8, (rows, 1))
    second = code[:, np.arange(layers) % 6]
    data = prepare(sample_of(first, 40, num_experts=8, second=second))
    settings = Settings(**{**vars(SETTINGS), "mlp": Network((128,), learning_rate=1e-2, batch_rows=128), "epochs": 25,
                           "patience": 25})  # fmt: skip
    parts = problem_parts(data, 0)
    done = scoring.study("mlp", data, parts, 1, settings, (0,), with_rows=True)
    both = {kind: found["hits"][5:24:6, :, (0, -1)].sum(axis=(0, 1)) for kind, found in done.items()}
    accuracy = {kind: right / cells for kind, (right, cells) in both.items()}
    assert accuracy["problems"] < 0.3 and accuracy["rows"] > 0.6
    leak = scoring.leakage(done["rows"]["paired"], 500, 0, 0.95)
    assert leak["ci_low"] > 0 and leak["leakage"] == pytest.approx(leak["top1_rows_split"] - leak["top1_problem_split"])
    # the same cells: those of the row split's test part that belong to test problems
    test = split_by_row(data, 1, 0).test
    assert leak["rows"] == (parts[data.problem[test.journey]] == 2).sum()


def test_leakage_is_the_paired_difference():
    paired = np.array([[8, 5, 10], [0, 0, 0], [6, 6, 9], [3, 1, 5]], dtype=float)
    leak = scoring.leakage(paired, 400, 3, 0.9)
    used = paired[[0, 2, 3]]
    expected = stats.paired_difference(used[:, 0], used[:, 1], used[:, 2], 400, 3, 0.9)
    assert (leak["leakage"], leak["ci_low"], leak["ci_high"]) == (expected.estimate, expected.low, expected.high)
    assert leak["rows"] == 24 and leak["top1_rows_split"] == 17 / 24


# -- scores


def test_scores_against_loops():
    rng = np.random.default_rng(1)
    probabilities = rng.integers(1, 5, (400, 6)) / 10.0  # many ties
    experts = np.argsort(rng.random((400, 6)), axis=1)[:, :3]
    experts[::5, 2] = -1
    found = scoring.score(probabilities, experts)
    for row in range(400):
        order = sorted(range(6), key=lambda e: (-probabilities[row, e], e))
        inside = sum(e in order[:3] for e in experts[row] if e >= 0)
        expected = [order[0] == experts[row, 0], experts[row, 0] in order[:2], inside / 3, inside == 3]
        assert found.hits[row].tolist() == expected
        assert found.ranked[row].tolist() == order[:3] and found.confidence[row] == max(probabilities[row])


def test_uniform_scores_are_exact_expectations(first_order):
    split = split_by_problem(first_order, problem_parts(first_order, 0), 1)
    fitted = fit("uniform", first_order, split.train, split.validation, SETTINGS)
    scores, _ = scoring.evaluate(fitted, first_order, split.test)
    np.testing.assert_allclose(scores.hits, np.tile([1 / 5, 2 / 5, 2 / 5, 1 / 10], (len(split.test), 1)), rtol=1e-12)
    drawn = scoring.score_rows(first_order, *scoring.total(first_order, split.test, scores), 1, 50, 0, 0.95)[0]
    assert drawn["ece"] == pytest.approx(0, abs=1e-12) and drawn["top1"] == pytest.approx(1 / 5)
    rng = np.random.default_rng(0)
    experts = np.array([[0, 3], [2, -1]])
    expected = scoring.expected_scores(experts, E, rng)
    draws = np.mean([scoring.score(rng.random((2, E)), experts).hits for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(draws, expected.hits, atol=0.02)


def test_sums_intervals_and_calibration_against_loops():
    rng = np.random.default_rng(5)
    data = prepare(sample_of(chain(300, 4, 1, 0.5), 12))
    cells = cells_of(data, 1)
    probabilities = rng.dirichlet(np.ones(E), len(cells))
    scores = scoring.score(probabilities, targets_of(data, cells))
    rows = scoring.score_rows(data, *scoring.total(data, cells, scores), 1, 300, 2, 0.9)
    assert [(row["domain"], row["layer"]) for row in rows] == [
        (domain, layer) for domain in ("all", "set0", "set1") for layer in ("all", 4, 5, 6)
    ]
    for row in rows:
        chosen = [
            i for i in range(len(cells))
            if row["domain"] in ("all", f"set{data.problem[cells.journey[i]] // 6}")
            and row["layer"] in ("all", 4 + cells.layer[i])
        ]  # fmt: skip
        hits = scores.hits[chosen]
        assert row["rows"] == len(chosen)
        assert [row[name] for name in scoring.METRICS] == pytest.approx(hits.mean(axis=0).tolist())
        problems = [data.problem[cells.journey[i]] for i in chosen]
        right = [sum(h for h, p in zip(hits[:, 0], problems, strict=True) if p == q) for q in sorted(set(problems))]
        count = [problems.count(q) for q in sorted(set(problems))]
        interval = stats.cluster_bootstrap(right, count, 300, 2, 0.9)
        assert (row["top1_low"], row["top1_high"]) == pytest.approx((interval.low, interval.high))
        error = 0.0
        for b in range(15):
            inside = [i for i in chosen if b / 15 < scores.confidence[i] <= (b + 1) / 15]
            if inside:
                gap = np.mean(scores.hits[inside, 0]) - np.mean(scores.confidence[inside])
                error += len(inside) / len(chosen) * abs(gap)
        assert row["ece"] == pytest.approx(error)


def test_study_adds_up_seeds_and_keeps_the_trace(first_order):
    parts = problem_parts(first_order, 0)
    one = [scoring.study("transition", first_order, parts, 2, SETTINGS, (seed,), True) for seed in (0, 1)]
    both = scoring.study("transition", first_order, parts, 2, SETTINGS, (0, 1), True)
    for kind in ("problems", "rows"):
        expected = sum(study[kind]["hits"] for study in one)
        np.testing.assert_array_equal(both[kind]["hits"], expected)
    np.testing.assert_array_equal(both["rows"]["paired"], sum(study["rows"]["paired"] for study in one))
    predicted = both["problems"]["predicted"]
    rows = scoring.scored_journeys(first_order, parts)
    assert predicted.shape == (len(rows), 6, K) and (predicted[:, :2] == -1).all()
    split = split_by_problem(first_order, parts, 2)
    fitted = fit("transition", first_order, split.train, split.validation, SETTINGS)
    for place in (0, 17, len(rows) - 1):
        for layer in range(4):
            found = fitted.predict(Cells(rows[[place]], np.array([layer]), 2))[0]
            assert predicted[place, layer + 2].tolist() == np.argsort(-found, kind="stable")[:K].tolist()
    position, problem = first_order.position[rows], first_order.problem[rows]
    turns = problem[np.flatnonzero(position == 0)]
    assert (np.diff(position)[np.diff(problem) == 0] == 1).all()
    assert first_order.domain_of_problem[turns].tolist() == [0, 1] * (len(turns) // 2)


# -- hidden states


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_stale_gate_is_exact_at_hop_0(activation):
    data = with_hidden(activation)
    check = scoring.stale_gate_check(data)
    assert check["top1"] == check["all_experts"] == 1.0
    assert check["rows"] == (data.experts[data.hidden_row >= 0, :, 0] >= 0).sum()
    wrong = Data(**{**vars(data), "hidden_row": np.where(data.hidden_row >= 0, np.roll(data.hidden_row, 1), -1)})
    assert scoring.stale_gate_check(wrong)["top1"] < 0.5


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_hidden_state_predictors_on_a_drifting_state(activation):
    """The state of layer l + 1 is that of layer l and noise: the old router knows most; probes learn it from cells."""
    data = with_hidden(activation)
    accuracy = {name: top1(name, data) for name in (*predictors.HIDDEN_PREDICTORS, "transition")}
    for name in predictors.HIDDEN_PREDICTORS:
        assert accuracy[name] > accuracy["transition"] + 0.1, accuracy
    assert top1("stale_gate", data, hop=2) < accuracy["stale_gate"]
    assert top1("stale_gate", with_hidden(activation, drift=0.05)) > 0.85


def test_every_predictor_is_scored_on_the_same_cells():
    data = with_hidden()
    parts = problem_parts(data, 0)
    settings = Settings(**{**vars(SETTINGS), "epochs": 1, "probe_epochs": 1, "xgboost_rounds": 2})
    counts = [
        scoring.study(name, data, parts, 1, settings, (0,), False)["problems"]["hits"][:, :, -1]
        for name in predictors.PREDICTORS
    ]
    for other in counts[1:]:
        np.testing.assert_array_equal(other, counts[0])
    assert counts[0].sum() == 4 * 40 * 3


def test_router_inputs_of_too_few_problems_are_left_out():
    data = with_hidden()
    few = Hidden(data.hidden.states[0][:150], data.hidden.weight)
    sample = sample_of(data.experts[:, :, 0].astype(np.int64), 30)
    found = prepare(sample, few)
    assert found.hidden is None and found.scored.all()
    split = split_by_problem(found, problem_parts(found, 0), 1)
    with pytest.raises(ValueError, match="stale_gate needs router inputs"):
        fit("stale_gate", found, split.train, split.validation, SETTINGS)
    with pytest.raises(ValueError, match="no predictor 'oracle'"):
        fit("oracle", found, split.train, split.validation, SETTINGS)


# -- same numbers


@pytest.mark.parametrize("name", ["xgboost", "mlp", "mlp_tuned", "linear_probe", "mlp_probe", "lookup"])
def test_same_seed_same_numbers(name):
    import torch

    data = with_hidden()
    split = split_by_problem(data, problem_parts(data, 0), 1)
    settings = Settings(**{**vars(SETTINGS), "epochs": 2, "probe_epochs": 2, "xgboost_rows": 500, "train_rows": 700})
    state = torch.get_rng_state()
    first, second = (fit(name, data, split.train, split.validation, settings, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(first.predict(split.test), second.predict(split.test))
    assert first.parameters == second.parameters > 0
    np.testing.assert_allclose(first.predict(split.test).sum(axis=1), 1, atol=1e-6)
    if name != "lookup":
        other = fit(name, data, split.train, split.validation, settings, 4)
        assert (other.predict(split.test) != first.predict(split.test)).any()


def test_tuning_starts_from_the_given_setting_and_keeps_the_best(second_order):
    import optuna

    split = split_by_problem(second_order, problem_parts(second_order, 0), 1)
    settings = Settings(**{**vars(SETTINGS), "epochs": 1, "train_rows": 500, "validation_rows": 10**6})
    verbosity = optuna.logging.get_verbosity()
    best, tried = networks.tune(second_order, split.train, split.validation, settings, 3, 0)
    assert optuna.logging.get_verbosity() == verbosity
    assert (
        len(tried) == 3
        and Network(**{k: v for k, v in tried[0].items() if k != "validation_loss"}) == SETTINGS.mlp_tuned
    )
    _, loss = networks.fit_history_network("mlp_tuned", second_order, split.train, split.validation, settings, best, 0)
    assert loss == pytest.approx(min(one["validation_loss"] for one in tried))


def test_confidence_on_an_edge_counts_to_the_interval_below_it(first_order):
    """Intervals are open below and closed above: 3/15 and 0.15 lie in the same one, and their gaps add up signed."""
    two = cells_of(first_order, 1).select(np.arange(2))
    hits = np.array([[1.0, 1, 0.5, 0], [0.0, 0, 0, 0]])
    scores = scoring.Scores(hits, np.array([0.2, 0.15]), np.zeros((2, K), dtype=int))
    _, bins = scoring.total(first_order, two, scores)
    assert scoring.calibration_error(bins) == pytest.approx(abs(1 - 0.35) / 2)


def test_each_part_of_a_split_is_what_its_name_says(first_order, monkeypatch):
    """The fourth fold of the problems is for choices and the fifth for scores, in the study as well."""
    folds = problem_folds(first_order.domain_of_problem, 5, 3)
    parts = problem_parts(first_order, 3)
    named = {"train": {0, 1, 2}, "validation": {3}, "test": {4}}
    assert {name: set(folds[parts == i].tolist()) for i, name in enumerate(PARTS)} == named
    split = split_by_problem(first_order, parts, 1)
    for name, of_part in named.items():
        assert set(folds[first_order.problem[getattr(split, name).journey]].tolist()) == of_part
    seen = {}

    def watched_fit(name, data, train, validation, *rest):
        seen["train"], seen["validation"] = train, validation
        return fit(name, data, train, validation, *rest)

    def watched_evaluate(predictor, data, test, seed):
        seen["test"] = test
        return evaluate(predictor, data, test, seed)

    evaluate = scoring.evaluate
    monkeypatch.setattr(scoring, "fit", watched_fit)
    monkeypatch.setattr(scoring, "evaluate", watched_evaluate)
    scoring.study("lookup", first_order, parts, 1, SETTINGS, [0], False)
    for name, of_part in named.items():
        assert set(folds[first_order.problem[seen[name].journey]].tolist()) == of_part


def test_the_row_split_takes_its_parts_in_the_order_of_their_names(first_order):
    cells = cells_of(first_order, 1)
    order = np.random.default_rng([2, 1]).permutation(len(cells))
    split = split_by_row(first_order, 1, 2)
    first, second = round(0.6 * len(cells)), round(0.8 * len(cells))
    for part, rows in (
        (split.train, order[:first]),
        (split.validation, order[first:second]),
        (split.test, order[second:]),
    ):
        expected = cells.select(np.sort(rows))
        assert (part.journey == expected.journey).all() and (part.layer == expected.layer).all()

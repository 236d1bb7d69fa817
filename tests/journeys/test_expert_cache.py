"""The cache and prefetch simulator against plain simulations, brute force over all choices, and worked examples."""

from itertools import combinations

import numpy as np
import pytest

from src.journeys import expert_cache as ec

POLICIES = ("lru", "lfu", "static", "belady")


def random_trace(rng, tokens, layers, experts, slots, skew=0.0, padding=0.0):
    """Uniform (or skewed: some experts likelier) sets of different experts; some of the weaker slots are padding."""
    keys = rng.random((tokens, layers, experts)) - skew * np.linspace(0, 1, experts)[rng.permutation(experts)]
    trace = np.argsort(keys, axis=2)[:, :, :slots].astype(np.int16)
    padded = rng.random(trace.shape) < padding
    trace[np.logical_or.accumulate(padded, axis=2)] = -1
    return trace


def streams(trace, num_experts, scope):
    """What each cache is asked for, step by step, as lists: per_layer a cache per layer, shared one for all."""
    if scope == "per_layer":
        return [[[int(e) for e in row if e >= 0] for row in trace[:, layer]] for layer in range(trace.shape[1])]
    return [
        [[layer * num_experts + int(e) for e in row if e >= 0] for token in trace for layer, row in enumerate(token)]
    ]


def simulate(stream, size, value):
    """Hits of one cache that, after every step, keeps the `size` best of what it held and what was used.

    value(id, uses, last) is sorted by, higher = kept.
    """
    held, uses, last, hits, clock = set(), {}, {}, 0, 0
    for used in stream:
        hits += len(held & set(used))
        for item in reversed(used):  # the strongest last: it is the most recent
            clock += 1
            uses[item], last[item] = uses.get(item, 0) + 1, clock
        held = set(sorted(held | set(used), key=lambda item: value(item, uses, last), reverse=True)[:size])
    return hits


def best_possible(stream, size):
    """The most hits that any choice of what to keep can have: tries them all."""
    best = {frozenset(): 0}
    for used in stream:
        after = {}
        for held, hits in best.items():
            hits += len(held & set(used))
            candidates = held | set(used)
            for count in range(min(size, len(candidates)) + 1):
                for kept in map(frozenset, combinations(sorted(candidates), count)):
                    after[kept] = max(after.get(kept, -1), hits)
        best = after
    return max(best.values())


def size_of(capacity, scope, layers):
    return capacity * (layers if scope == "shared" else 1)


@pytest.mark.parametrize("scope", ec.SCOPES)
@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_policies_equal_a_plain_simulation(policy, scope, slots):
    """The stack positions (running maxima and sums) against a cache that is kept step by step, for every capacity."""
    rng = np.random.default_rng(3)
    layers, experts = 3, 6
    for padding in (0.0, 0.3):
        trace = random_trace(rng, 40, layers, experts, slots, skew=0.5, padding=padding)
        frequencies = rng.integers(0, 5, (layers, experts))  # with ties
        for capacity in range(experts + 1):
            expected = 0
            for cache, stream in enumerate(streams(trace, experts, scope)):
                often = frequencies.ravel() if scope == "shared" else frequencies[cache]
                value = {
                    "lru": lambda item, uses, last: last[item],
                    "lfu": lambda item, uses, last: (uses[item], last[item]),
                    "static": lambda item, uses, last, often=often: (often[item], -item),
                }[policy]
                expected += simulate(stream, size_of(capacity, scope, layers), value)
            assert ec.hit_counts(trace, experts, [capacity], policy, scope, frequencies).tolist() == [expected]


def test_blocks_of_steps_change_nothing(monkeypatch):
    trace = random_trace(np.random.default_rng(1), 50, 2, 5, 2, padding=0.2)
    whole = {policy: ec.stack_positions(trace, 5, policy, "per_layer", np.arange(10)) for policy in POLICIES[:3]}
    monkeypatch.setattr(ec, "_BLOCK_ENTRIES", 85)  # 7 steps
    for policy, positions in whole.items():
        assert np.array_equal(ec.stack_positions(trace, 5, policy, "per_layer", np.arange(10)), positions)


@pytest.mark.parametrize(("slots", "experts", "tokens"), [(1, 4, 9), (2, 4, 7), (2, 5, 6)])
def test_belady_is_the_best_of_all_choices(slots, experts, tokens):
    """Brute force over everything a cache could keep, K = 1 and K = 2 requests at once, with padding."""
    rng = np.random.default_rng(slots)
    for trial in range(6):
        trace = random_trace(rng, tokens, 1, experts, slots, skew=0.3, padding=0.15 * (trial % 2))
        for capacity in range(4):
            (stream,) = streams(trace, experts, "per_layer")
            assert ec.hit_counts(trace, experts, [capacity], "belady", "per_layer").tolist() == [
                best_possible(stream, capacity)
            ]


def test_belady_shared_is_the_best_of_all_choices():
    rng = np.random.default_rng(7)
    for _ in range(4):
        trace = random_trace(rng, 4, 2, 3, 2)
        (stream,) = streams(trace, 3, "shared")
        assert ec.hit_counts(trace, 3, [1, 2], "belady", "shared").tolist() == [
            best_possible(stream, 2),
            best_possible(stream, 4),
        ]


@pytest.mark.parametrize("scope", ec.SCOPES)
def test_belady_is_never_worse_and_more_room_never_hurts(scope):
    rng = np.random.default_rng(11)
    for skew in (0.0, 0.6):
        trace = random_trace(rng, 120, 3, 8, 2, skew=skew)
        capacities = list(range(9))
        counts = np.bincount(trace[:, 0].ravel(), minlength=8) + 0 * np.arange(3)[:, None]
        hits = {policy: ec.hit_counts(trace, 8, capacities, policy, scope, counts) for policy in POLICIES}
        for policy in POLICIES:
            assert (np.diff(hits[policy]) >= 0).all()
            assert (hits["belady"] >= hits[policy]).all()
        assert (hits["belady"] > hits["lru"])[1:7].all()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_lru_on_independent_tokens_hits_with_c_over_e(slots):
    """i.i.d. uniform sets of K: what the cache holds says nothing of the next set, each of whose experts is, by itself,
    uniform over E: it is among the C held with probability C/E. That the K experts differ from each other does not
    change this, because all K are looked up in the cache as it stood before the token. (Handled one after the other
    the second would find the first, which is not itself, in the cache: (C - 1)/(E - 1), less.)
    """
    experts, tokens, layers = 8, 3000, 4
    trace = random_trace(np.random.default_rng(5), tokens, layers, experts, slots)
    warm = ec.stack_positions(trace, experts, "lru", "per_layer")[200:]  # by then every cache is full
    for capacity in range(1, experts):
        rate, expected = (warm < capacity).mean(), capacity / experts
        noise = np.sqrt(expected * (1 - expected) / (warm.shape[0] * layers))  # as if the K of a set were one draw
        assert abs(rate - expected) < 4 * noise, (capacity, rate)
    slow = (warm[..., -1] < 3).mean()
    if slots > 1:
        assert abs(slow - 3 / experts) < 0.02 < abs(slow - 2 / 7)  # tells the two apart, for the last of the K


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scope", ec.SCOPES)
def test_room_for_all_experts_misses_only_first_uses(policy, scope):
    trace = random_trace(np.random.default_rng(2), 60, 3, 6, 2, skew=0.9, padding=0.1)
    different = sum(len(np.unique(column[column >= 0])) for column in trace.transpose(1, 0, 2).reshape(3, -1))
    hits = ec.hit_counts(trace, 6, [0, 6], policy, scope, np.ones((3, 6)))
    assert hits.tolist() == [0, np.count_nonzero(trace >= 0) - different]


def test_padding_is_no_request():
    """-1 is never a hit, and takes no room: a trace with a padded slot equals the trace without that slot."""
    narrow = random_trace(np.random.default_rng(4), 50, 2, 5, 1)
    padded = np.concatenate([narrow, np.full_like(narrow, -1)], axis=2)
    for policy in POLICIES:
        expected = ec.hit_counts(narrow, 5, range(6), policy, "per_layer", np.arange(10))
        assert np.array_equal(ec.hit_counts(padded, 5, range(6), policy, "per_layer", np.arange(10)), expected)
    nothing = np.full((3, 2, 1), -1)
    assert ec.hit_counts(nothing, 5, [5], "lru", "per_layer").tolist() == [0]
    done = prefetch(nothing, nothing, 5, 1, 1.0)
    assert not done.in_place.any() and done.demand_loads.sum() == 0


# -- prefetching
def prefetch(trace, predicted, num_experts, capacity, loads_per_layer, hop=1, scope="per_layer"):
    """Over an LRU cache of `capacity` experts per layer."""
    size = size_of(capacity, scope, trace.shape[1])
    cached = ec.stack_positions(trace, num_experts, "lru", scope) < size
    ahead = ec.positions_of_predicted(trace, predicted, num_experts, hop, scope) < size
    return ec.prefetch(trace, predicted, cached, ahead, loads_per_layer, hop)


def link_reference(trace, predicted, num_experts, capacity, loads_per_layer, hop, scope):
    """One link as a queue, token by token: (hits, loads waited for, loads sent ahead)."""
    layers = trace.shape[1]
    caches = {layer: [] for layer in range(layers)} if scope == "per_layer" else {0: []}
    size = size_of(capacity, scope, layers)
    hits = waited = sent = 0.0
    for token, guess in zip(trace.tolist(), predicted.tolist(), strict=True):
        queue = []  # [layer, expert, part still to be sent]
        for layer in range(layers):
            cache = caches[layer if scope == "per_layer" else 0]
            if layer + hop < layers:
                ahead = caches[layer + hop if scope == "per_layer" else 0]
                for expert in guess[layer + hop]:
                    if expert >= 0 and (layer + hop, expert) not in ahead:
                        queue.append([layer + hop, expert, 1.0])
            used = [expert for expert in token[layer] if expert >= 0]
            here = {expert: rest for target, expert, rest in queue if target == layer}
            for expert in used:
                if (layer, expert) in cache or here.get(expert) == 0:
                    hits += 1
                else:
                    waited += here.get(expert, 1.0)
            for expert in reversed(used):
                if (layer, expert) in cache:
                    cache.remove((layer, expert))
                cache.insert(0, (layer, expert))
            del cache[size:]
            queue = [entry for entry in queue if entry[0] != layer]
            budget = loads_per_layer
            for entry in queue:
                part = min(budget, entry[2])
                entry[2], budget, sent = entry[2] - part, budget - part, sent + part
    return hits, waited, sent


@pytest.mark.parametrize("scope", ec.SCOPES)
@pytest.mark.parametrize("hop", [1, 2, 3])
def test_prefetch_equals_a_queue_on_one_link(hop, scope):
    rng = np.random.default_rng(hop)
    trace = random_trace(rng, 30, 5, 6, 2, skew=0.4, padding=0.15)
    right = rng.random(trace.shape[:2])[..., None] < 0.6
    predicted = np.where(right, trace, random_trace(rng, 30, 5, 6, 2, padding=0.2))
    predicted[:, :hop] = -1
    for capacity in (0, 1, 3):
        for loads_per_layer in (0.0, 0.3, 1.0, 2.5, np.inf):
            done = prefetch(trace, predicted, 6, capacity, loads_per_layer, hop, scope)
            found = (done.in_place.sum(), done.demand_loads.sum(), done.prefetch_loads.sum())
            assert found == pytest.approx(link_reference(trace, predicted, 6, capacity, loads_per_layer, hop, scope))


@pytest.mark.parametrize("scope", ec.SCOPES)
def test_bytes_are_conserved(scope):
    """Each cache miss is brought in once: waited for, or sent ahead in time; the rest of what was sent is waste."""
    rng = np.random.default_rng(8)
    trace = random_trace(rng, 60, 4, 6, 2)
    predicted = random_trace(rng, 60, 4, 6, 2)
    predicted[:, :1] = -1
    misses = trace.size - ec.hit_counts(trace, 6, [2], "lru", scope)[0]
    none = np.full_like(predicted, -1)
    assert prefetch(trace, none, 6, 2, 1.0, 1, scope).demand_loads.sum() == misses
    for loads_per_layer in (0.0, 0.7, np.inf):
        done = prefetch(trace, predicted, 6, 2, loads_per_layer, 1, scope)
        waited, sent = done.demand_loads.sum(), done.prefetch_loads.sum()
        assert misses - sent - 1e-9 <= waited <= misses
        assert sent <= np.count_nonzero(predicted >= 0)
    # A predictor that is always right wastes nothing.
    perfect = trace.copy()
    perfect[:, :1] = -1
    for loads_per_layer in (0.0, 0.7, np.inf):
        done = prefetch(trace, perfect, 6, 2, loads_per_layer, 1, "per_layer")
        moved = done.demand_loads.sum() + done.prefetch_loads.sum()
        assert moved == pytest.approx(trace.size - ec.hit_counts(trace, 6, [2], "lru", "per_layer")[0])


def test_a_perfect_predictor_never_stalls_where_the_link_keeps_up():
    """Except at the first `hop` layers of each token, which no layer precedes; with infinite bandwidth, nowhere."""
    trace = random_trace(np.random.default_rng(9), 40, 5, 6, 2)
    for hop in (1, 2):
        perfect = trace.copy()
        perfect[:, :hop] = -1
        done = prefetch(trace, perfect, 6, 0, 2.0, hop)  # two experts per layer, two loads per layer
        assert (done.demand_loads[:, :hop] == 2).all() and (done.demand_loads[:, hop:] == 0).all()
        assert done.in_place[:, hop:].all() and not done.in_place[:, :hop].any()
        rows = ec.cache_curves(trace, 6, [0, 2], [np.inf], 1e9, 0.5, np.ones((5, 6)), {"perfect": perfect}, hop)
        assert all(row["stall_ms_per_token"] == 0 and row["ms_per_token"] == 2.5 for row in rows)


def test_without_computing_time_prefetching_gains_nothing():
    trace = random_trace(np.random.default_rng(9), 40, 5, 6, 2)
    perfect = trace.copy()
    perfect[:, :1] = -1
    rows = ec.cache_curves(trace, 6, [2], [10.0], 1e9, 0.0, np.ones((5, 6)), {"perfect": perfect})
    for scope in ec.SCOPES:
        lru, ahead = (
            next(row for row in rows if (row["policy"], row["scope"]) == (policy, scope))
            for policy in ("lru", "prefetch")
        )
        same = ("hit_rate", "mb_per_token", "stall_ms_per_token", "speedup")
        assert [ahead[column] for column in same] == pytest.approx([lru[column] for column in same])


def test_time_of_a_worked_example():
    """One token, three layers, one expert each, no cache; loading takes 2 ms, computing 1.5 ms a layer.

    Layer 0 waits 2 ms for expert 0. While it computes, 1.5 / 2 of expert 1 (predicted for layer 1, right) arrives:
    layer 1 waits 0.5 ms. While that computes, 0.75 of expert 3 (predicted for layer 2, wrong) is sent: layer 2 waits
    2 ms for expert 2.
    """
    trace = np.array([[[0], [1], [2]]])
    predicted = np.array([[[-1], [1], [3]]])
    rows = ec.cache_curves(trace, 4, [0], [5.0], 1e7, 1.5, np.ones((3, 4)), {"guess": predicted})
    demand, ahead = rows[0], rows[-1]
    assert (demand["policy"], demand["predictor"], demand["capacity"]) == ("on_demand", "", 0)
    assert demand["stall_ms_per_token"] == pytest.approx(6.0)
    assert demand["ms_per_token"] == pytest.approx(10.5)
    assert (demand["mb_per_token"], demand["speedup"]) == (pytest.approx(30.0), 1.0)
    assert (ahead["policy"], ahead["predictor"], ahead["hit_rate"]) == ("prefetch", "guess", 0.0)
    assert ahead["stall_ms_per_token"] == pytest.approx(2 + 0.5 + 2)
    assert ahead["ms_per_token"] == pytest.approx(9.0)
    assert ahead["mb_per_token"] == pytest.approx(10 * (1 + 0.75 + 0.25 + 0.75 + 1))
    assert ahead["speedup"] == pytest.approx(10.5 / 9)


def test_two_hops_share_the_link_in_order():
    """Four layers, hop 2, 0.6 loads a layer: expert 2's prefetch (asked for first) ends before expert 3's begins."""
    trace = np.array([[[0], [1], [2], [3]]])
    predicted = np.array([[[-1], [-1], [2], [3]]])
    done = prefetch(trace, predicted, 4, 0, 0.6, hop=2)
    # 0.6 + 0.4 of expert 2 while layers 0 and 1 compute, then 0.2 of expert 3, and 0.6 while layer 2 computes
    assert done.demand_loads[0] == pytest.approx([1, 1, 0, 0.2])
    assert done.prefetch_loads[0] == pytest.approx([0, 0, 1, 0.8])
    assert done.in_place[0, :, 0].tolist() == [False, False, True, False]


def test_lru_rows_of_a_worked_example():
    """Two tokens that share one of two layers' experts: one hit of four requests with room for one expert a layer."""
    trace = np.array([[[0], [1]], [[0], [2]]])
    rows = ec.cache_curves(trace, 3, [1], [1.0, 2.0], 4e6, 1.0, np.ones((2, 3)), {})
    slow, fast = (row for row in rows if (row["policy"], row["scope"]) == ("lru", "per_layer"))
    assert slow["hit_rate"] == 0.25 and slow["tokens"] == 2
    assert slow["mb_per_token"] == pytest.approx(6.0)  # three loads of 4 MB in two tokens
    assert slow["stall_ms_per_token"] == pytest.approx(6.0)  # of 4 ms each
    assert fast["stall_ms_per_token"] == pytest.approx(3.0)
    assert slow["speedup"] == pytest.approx((2 + 8) / (2 + 6))


# -- what is written, and refused
def test_rows_are_complete_and_in_order():
    rng = np.random.default_rng(0)
    trace = random_trace(rng, 30, 3, 4, 2)
    predicted = random_trace(rng, 30, 3, 4, 2)
    predicted[:, :1] = -1
    rows = ec.cache_curves(trace, 4, [1, 2], [8, 16], 1e6, 0.1, np.ones((3, 4)), {"a": predicted, "b": predicted})
    keys = [(row["scope"], row["policy"], row["predictor"], row["capacity"], row["bandwidth_gb_s"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * (2 + 4 * 4 + 2 * 4)
    assert list(rows[0]) == [
        "policy", "predictor", "scope", "capacity", "bandwidth_gb_s", "hit_rate", "mb_per_token", "stall_ms_per_token",
        "ms_per_token", "speedup", "tokens",
    ]  # fmt: skip
    cut = ec.cache_curves(trace, 4, [1, 2], [8, 16], 1e6, 0.1, np.ones((3, 4)), {"a": predicted}, max_tokens=10)
    short = ec.cache_curves(trace[:10], 4, [1, 2], [8, 16], 1e6, 0.1, np.ones((3, 4)), {"a": predicted[:10]})
    assert cut == short and {row["tokens"] for row in cut} == {10}


def test_mixtral_arithmetic():
    size = ec.expert_bytes(4096, 14336, 4.5)
    assert size == 99_090_432
    assert ec.load_ms(size, 25.0) == pytest.approx(3.9636, abs=1e-4)
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    weights = attention + 4096 * 8 + 2 * 3 * 4096 * 14336
    assert weights == 394_297_344
    assert ec.memory_bound_ms(weights, 4.5, 360.0) == pytest.approx(0.6161, abs=1e-4)
    assert ec.load_ms(size, np.inf) == 0.0

"""What caching and prefetching experts would buy when they do not all fit into GPU memory. NumPy only.

THEORY ONLY: nothing here is measured on a device. It counts which experts of a real trace a cache would have held and
turns the rest into time. docs/journeys.md says what is left out, and states policies, prefetching and time in full.

    trace [T, L, K]      the experts of T tokens in the order of decoding, at L layers; -1 is padding
    predicted [T, L, P]  the experts that a predictor expects at layer l, told at layer l - hop, best first; -1 is none

A cache keeps C experts per layer (scope "per_layer"), or C x L experts of any layers (scope "shared"), and starts
empty. Beside it there is room for the K experts at work and for hop x P on their way, so C may be smaller than K and
prefetching (Eliseev and Mazur 2023, arXiv:2312.17238, section 3.2; over an LRU cache) never spoils the cache.

    stall_ms = (loads that the layer waits for, parts of an expert included) x load_ms
    ms_per_token = L x compute_ms + stall_ms per token;  speedup = ms_per_token of on_demand / ms_per_token
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

SCOPES = ("per_layer", "shared")
# Numbers held at once (8 bytes each).
_BLOCK_ENTRIES = 4_000_000


def expert_bytes(width: int, expert_width: int, bits_per_weight: float, matrices: int = 3) -> int:
    """Bytes of one expert of `matrices` matrices [width, expert_width].

    Mixtral-8x7B: 3 x 4096 x 14336 = 176,160,768 weights; at 4.5 bits (4-bit weights and a 16-bit scale for each group
    of 32, as llama.cpp's Q4_0 stores them) 99,090,432 bytes.
    """
    return round(matrices * width * expert_width * bits_per_weight / 8)


def memory_bound_ms(weights: int, bits_per_weight: float, memory_gb_s: float) -> float:
    """Time to read `weights` once from GPU memory, ms: what computing takes at batch 1, where memory is the limit.

    A layer of Mixtral-8x7B: attention 4096 x (4096 + 1024 + 1024 + 4096) = 41,943,040, router 32,768 and two experts
    352,321,536, together 394,297,344 weights; at 4.5 bits and an RTX 3060's 360 GB/s: 221.8 MB / 360 GB/s = 0.616 ms.
    """
    return weights * bits_per_weight / 8 / (memory_gb_s * 1e9) * 1e3


def load_ms(expert_bytes: float, bandwidth_gb_s: float) -> float:
    """Time to move one expert over the link, ms. 1 GB = 1e9 bytes; an infinite bandwidth takes 0."""
    return expert_bytes / (bandwidth_gb_s * 1e9) * 1e3


# -- what a cache holds
def stack_positions(
    trace: np.ndarray, num_experts: int, policy: str, scope: str, frequencies: np.ndarray | None = None
) -> np.ndarray:
    """Each requested expert's place in the policy's order just before its request, int [T, L, K]: 0 is the best.

    It is a hit for exactly the capacities (in experts: C, or C x L for scope "shared") above it, so one pass serves all
    capacities (stack algorithms: Mattson et al. 1970). Experts not used before, and padding, get the number of experts
    in question (E, or E x L), which no capacity exceeds.

    policy lru | lfu | static; frequencies [L, E] (how often each expert was used in other data) for static.
    """
    requests, num_ids = _requests(trace, num_experts, scope)
    return _positions(requests, requests, num_ids, policy, frequencies).reshape(trace.shape)


def hit_counts(
    trace: np.ndarray,
    num_experts: int,
    capacities: Sequence[int],
    policy: str,
    scope: str,
    frequencies: np.ndarray | None = None,
) -> np.ndarray:
    """Requests that find their expert in the cache, int64 [len(capacities)].

    policy lru | lfu | static | belady; capacities: experts held per layer, 0 .. E (a shared cache holds C x L).
    """
    sizes = _sizes(capacities, scope, trace.shape[1])
    if policy == "belady":
        return _belady_hits(*_requests(trace, num_experts, scope), sizes)
    positions = stack_positions(trace, num_experts, policy, scope, frequencies)
    return np.array([np.count_nonzero(positions < size) for size in sizes])


# -- prefetching
@dataclass(frozen=True)
class Prefetch:
    """What a run with prefetching did.

    in_place [T, L, K] bool: the requested expert was there when the layer needed it (cached, or wholly prefetched).
    demand_loads [T, L]: experts (with fractions) that the layer waited for.
    prefetch_loads [T, L]: experts (with fractions) sent ahead for this layer, used or not.
    """

    in_place: np.ndarray
    demand_loads: np.ndarray
    prefetch_loads: np.ndarray


def prefetch(
    trace: np.ndarray,
    predicted: np.ndarray,
    cached: np.ndarray,
    ahead_cached: np.ndarray,
    loads_per_layer: float,
    hop: int,
) -> Prefetch:
    """The link's work, layer by layer for all tokens at once.

    cached [T, L, K]: whether the cache holds a requested expert when it is needed; ahead_cached [T, L, P]: whether it
    holds a predicted one when that is told. loads_per_layer: experts that the link can move while one layer computes =
    compute_ms / load_ms; inf allowed. Tokens are independent here: a token's prefetches end with its last layer, and
    what the cache holds does not depend on them. The link has loads_per_layer for prefetches after each layer's demand
    loads, however long those take.
    """
    tokens, num_layers, _ = trace.shape
    fetched = (predicted >= 0) & ~ahead_cached
    left = fetched.astype(np.float64)  # [T, L, P]: part of each prefetch that is still to be sent
    same = (trace[..., :, None] == predicted[..., None, :]) & fetched[..., None, :]  # [T, L, K, P]
    missing = (trace >= 0) & ~cached
    demand_loads = np.zeros((tokens, num_layers))
    in_place = cached.copy()
    for layer in range(num_layers):
        # What was sent by now is all that counts for this layer: the rest of its prefetches is dropped.
        sent = (same[:, layer] * (1 - left[:, layer])[:, None, :]).sum(axis=2)  # [T, K]
        demand_loads[:, layer] = (missing[:, layer] * (1 - sent)).sum(axis=1)
        in_place[:, layer] |= (same[:, layer] & (left[:, layer] == 0)[:, None, :]).any(axis=2)
        budget = np.full(tokens, float(loads_per_layer))
        for target in range(layer + 1, min(layer + hop, num_layers - 1) + 1):
            for slot in range(predicted.shape[2]):
                part = np.minimum(budget, left[:, target, slot])
                left[:, target, slot] -= part
                budget -= part
    return Prefetch(in_place, demand_loads, fetched - left)


def cache_curves(
    trace: np.ndarray,
    num_experts: int,
    capacities: Sequence[int],
    bandwidths_gb_s: Sequence[float],
    expert_bytes: float,
    compute_ms: float,
    frequencies: np.ndarray,
    predictions: dict[str, np.ndarray],
    hop: int = 1,
    max_tokens: int | None = None,
) -> list[dict]:
    """Rows of cache_curves.csv: every policy x scope x capacity x bandwidth, and prefetching with each predictor.

    expert_bytes: of one expert; compute_ms: per layer and token; frequencies [L, E] for static (from training
    problems); predictions: predictor name -> predicted [T, L, P] for this `hop`; max_tokens: the first so many only.
    Columns: policy (on_demand, lru, lfu, belady, static, prefetch), predictor ("" but for prefetch), scope, capacity
    (experts per layer; 0 for on_demand), bandwidth_gb_s, hit_rate (0-1), mb_per_token (1e6 bytes moved),
    stall_ms_per_token, ms_per_token, speedup (over on_demand at the same bandwidth), tokens.
    """
    trace = trace[:max_tokens]
    tokens, num_layers, _ = trace.shape
    requests = int(np.count_nonzero(trace >= 0))
    transfer_ms = [load_ms(expert_bytes, bandwidth) for bandwidth in bandwidths_gb_s]
    base_ms = [num_layers * compute_ms + requests / tokens * each_ms for each_ms in transfer_ms]  # on demand

    def row(scope, capacity, place, policy, predictor, hits, waited, sent):
        """One row; hits of all requests, `waited` and `sent` experts in the whole trace; `place` of the bandwidth."""
        stall_ms = waited / tokens * transfer_ms[place]
        total_ms = num_layers * compute_ms + stall_ms
        return {
            "policy": policy,
            "predictor": predictor,
            "scope": scope,
            "capacity": capacity,
            "bandwidth_gb_s": bandwidths_gb_s[place],
            "hit_rate": hits / requests if requests else None,
            "mb_per_token": (waited + sent) / tokens * expert_bytes / 1e6,
            "stall_ms_per_token": stall_ms,
            "ms_per_token": total_ms,
            "speedup": base_ms[place] / total_ms if total_ms else None,
            "tokens": tokens,
        }

    rows = []
    for scope in SCOPES:
        rows += [row(scope, 0, place, "on_demand", "", 0, requests, 0) for place in range(len(transfer_ms))]
        for policy in ("lru", "lfu", "belady", "static"):
            counts = hit_counts(trace, num_experts, capacities, policy, scope, frequencies).tolist()
            for capacity, hits in zip(capacities, counts, strict=True):
                for place in range(len(transfer_ms)):
                    rows.append(row(scope, capacity, place, policy, "", hits, requests - hits, 0))
        positions = stack_positions(trace, num_experts, "lru", scope)
        sizes = _sizes(capacities, scope, num_layers)
        for name, predicted in tqdm(predictions.items(), desc=f"prefetching ({scope})", unit="predictor", delay=3):
            predicted = predicted[:max_tokens]
            ahead = positions_of_predicted(trace, predicted, num_experts, hop, scope)
            for capacity, size in zip(capacities, sizes, strict=True):
                for place, each_ms in enumerate(transfer_ms):
                    loads_per_layer = compute_ms / each_ms if each_ms else np.inf
                    done = prefetch(trace, predicted, positions < size, ahead < size, loads_per_layer, hop)
                    waited, sent = float(done.demand_loads.sum()), float(done.prefetch_loads.sum())
                    hits = int(np.count_nonzero(done.in_place))
                    rows.append(row(scope, capacity, place, "prefetch", name, hits, waited, sent))
    return rows


# -- the parts
def _sizes(capacities, scope, num_layers):
    """Experts in one cache for each capacity (per layer)."""
    return [capacity * (num_layers if scope == "shared" else 1) for capacity in capacities]


def _requests(trace, num_experts, scope):
    """(requests int64 [S, N, K], ids per cache): what each of N caches is asked for at each of S steps; -1 padding.

    per_layer: a cache per layer, a step per token. shared: one cache, whose ids are layer * E + expert, and a step per
    token and layer.
    """
    requests = trace.astype(np.int64)
    if scope == "per_layer":
        return requests, num_experts
    num_layers = trace.shape[1]
    first_id = num_experts * np.arange(num_layers)[:, None]
    return np.where(requests < 0, -1, requests + first_id).reshape(-1, 1, trace.shape[2]), num_experts * num_layers


def _positions(requests, queries, num_ids, policy, frequencies=None):
    """Place of each id of `queries` [S, N, Q] in the policy's order before step s of `requests` [S, N, K], [S, N, Q].

    All three policies only ever raise an id when it is used, so what a cache holds is the best C ids used so far.
    Blocks of steps at a time: what each id's last use and number of uses were before each step follows from running
    maxima and sums, without a loop over steps.
    """
    steps, caches, slots = requests.shape
    if policy == "static":  # the more frequent in other data the higher; of equals the smaller id is better
        order = np.argsort(-np.reshape(frequencies, (caches, num_ids)), axis=1, kind="stable")
        ranking = np.zeros((caches, num_ids + 1), dtype=np.int64)
        np.put_along_axis(ranking, order, np.arange(num_ids, 0, -1)[None], axis=1)
    cache = np.arange(caches)[:, None]
    recency = np.arange(slots)[::-1]  # within a step the stronger expert is the more recent
    last = np.full((1, caches, num_ids + 1), -1)  # time of last use; the last column takes the padding
    uses = np.zeros((1, caches, num_ids + 1), dtype=np.int64)
    positions = np.empty(queries.shape, dtype=np.int32)
    size = max(1, _BLOCK_ENTRIES // (caches * (num_ids + 1)))
    for start in range(0, steps, size):
        used = requests[start : start + size]
        used = np.where(used < 0, num_ids, used)
        step = np.arange(len(used))[:, None, None]
        last = np.concatenate([last[-1:], np.full((len(used), caches, num_ids + 1), -1)])
        last[step + 1, cache, used] = (start + step) * slots + recency
        np.maximum.accumulate(last, axis=0, out=last)
        if policy == "lru":
            value = last[:-1]
        elif policy == "static":
            value = np.where(last[:-1] >= 0, ranking, -1)
        else:
            uses = np.concatenate([uses[-1:], np.zeros((len(used), caches, num_ids + 1), dtype=np.int64)])
            uses[step + 1, cache, used] = 1
            np.cumsum(uses, axis=0, out=uses)
            value = np.where(last[:-1] >= 0, uses[:-1] * (steps * slots) + last[:-1], -1)
        asked = queries[start : start + size]
        for slot in range(asked.shape[2]):
            own = np.take_along_axis(value, np.maximum(asked[..., slot : slot + 1], 0), axis=2)
            better = np.count_nonzero(value[..., :num_ids] > own, axis=2)
            found = (own[..., 0] >= 0) & (asked[..., slot] >= 0)
            positions[start : start + size, :, slot] = np.where(found, better, num_ids)
    return positions


def _belady_hits(requests, num_ids, sizes):
    """Hits of the optimal policy for each cache size, int64 [len(sizes)], from requests [S, N, K].

    After each step it keeps those of the held and used experts that are used again soonest (Belady 1966, "A study of
    replacement algorithms"; here it may also not keep what was just loaded). One loop over steps, all caches and sizes
    side by side.
    """
    steps, caches, slots = requests.shape
    never = steps * slots
    used = np.where(requests < 0, num_ids, requests)  # the last column takes the padding
    next_use = _next_use(used, num_ids, never)
    cache = np.arange(caches)[:, None]
    limit_at = np.asarray(sizes)[:, None, None]
    # Time of the next use of each id that is held, `never` for the others: keeping what is never used again is no use.
    until = np.full((len(sizes), caches, num_ids + 1), never)
    hits = np.zeros(len(sizes), dtype=np.int64)
    for step in tqdm(range(steps), desc="optimal caching", unit="step", delay=3):
        hits += (until < (step + 1) * slots).sum(axis=(1, 2))
        until[:, cache, used[step]] = next_use[step]
        limit = np.take_along_axis(np.sort(until, axis=2), limit_at, axis=2)
        until[until >= limit] = never  # times differ: exactly the `size` soonest stay
    return hits


def _next_use(used, num_ids, never):
    """When each request's expert is used next: step * K + slot, int64 [S, N, K]; else `never`."""
    steps, caches, slots = used.shape
    times = np.broadcast_to((np.arange(steps)[:, None] * slots + np.arange(slots))[:, None, :], used.shape)
    codes = np.arange(caches)[:, None] * (num_ids + 1) + used
    order = np.argsort(codes.ravel(), kind="stable")  # by id, and in order of time
    same = codes.ravel()[order[1:]] == codes.ravel()[order[:-1]]
    result = np.full(used.size, never)
    result[order[:-1]] = np.where(same, times.ravel()[order[1:]], never)
    return np.where(used == num_ids, never, result.reshape(used.shape))


def positions_of_predicted(
    trace: np.ndarray, predicted: np.ndarray, num_experts: int, hop: int, scope: str
) -> np.ndarray:
    """Place of predicted experts [T, L, P] in the LRU order at the moment of prediction, hop layers before."""
    requests, num_ids = _requests(trace, num_experts, scope)
    queries, _ = _requests(predicted, num_experts, scope)
    if scope == "per_layer":  # a layer's own cache does not change while other layers of the token run
        return _positions(requests, queries, num_ids, "lru").reshape(predicted.shape)
    # The predictions for layer l stand at layer l - hop's step; the first hop layers have none, so nothing gets lost.
    early = np.concatenate([queries[hop:], np.full_like(queries[:hop], -1)])
    positions = _positions(requests, early, num_ids, "lru")
    return np.concatenate([np.full_like(positions[:hop], num_ids), positions])[: len(queries)].reshape(predicted.shape)

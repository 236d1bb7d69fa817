"""Measures of token journeys, on plain arrays: use of experts, dependence of layers, paths, domains, tokens.

"The expert" of a layer is the strongest of its K. No function holds more than a few numbers per journey beside its
arguments: 10 M journeys of 32 layers fit in a few GB. "The reference" is a published notebook on Mixtral-8x7B
(moe_routing_analysis_demo.ipynb of Mario928/speculative-moe), whose measures are restated so as to be compared.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon
from tqdm.auto import tqdm

from src.base import stats

# Rows handled at once: their codes (8 bytes each) stay in the processor's cache.
BLOCK_ROWS = 32_768
# float16 has this many values from 0 to 1; the bit pattern of one is its rank among them.
_UNIT_FLOAT16 = 0x3C01
# Entries (draws x problems) that are held at once.
_DRAW_ENTRIES = 2_000_000


def strongest(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """The strongest expert of each layer, [L, N] (a layer's journeys side by side), from experts [N, L, K].

    Layers without an active expert (-1) hold num_experts.
    """
    num_rows, num_layers, _ = experts.shape
    columns = np.empty((num_layers, num_rows), dtype=np.uint8 if num_experts < 256 else np.uint16)
    for start in range(0, num_rows, BLOCK_ROWS):
        top = experts[start : start + BLOCK_ROWS, :, 0].T
        columns[:, start : start + BLOCK_ROWS] = np.where(top < 0, num_experts, top)
    return columns


def _classes(columns: np.ndarray, num_experts: int) -> int:
    """num_experts, plus one class where some layer has no expert."""
    return num_experts + int(columns.max() == num_experts)


# -- use of experts
def expert_counts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """How many journeys choose each expert, by layer and rank: int64 [L, K, E] from experts [N, L, K]; -1 is left out.

    The reference's distribution is [:, 0] over its sum by layer, times 100: the strongest expert alone.
    """
    _, num_layers, slots = experts.shape
    counts = np.zeros(num_layers * slots * (num_experts + 1), dtype=np.int64)
    offsets = 1 + (num_experts + 1) * np.arange(num_layers * slots)
    rows = max(1, BLOCK_ROWS // 8)
    for start in range(0, len(experts), rows):
        codes = experts[start : start + rows].reshape(-1, num_layers * slots) + offsets
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    return counts.reshape(num_layers, slots, num_experts + 1)[:, :, 1:]


def group_counts(columns: np.ndarray, num_experts: int, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """How many journeys of each group choose each expert: int64 [G, L, E], from columns [L, N] and groups [N]."""
    classes = num_experts + 1
    base = groups.astype(np.int64) * classes
    counts = np.empty((num_groups, len(columns), num_experts), dtype=np.int64)
    for layer, column in enumerate(columns):
        table = np.bincount(base + column, minlength=num_groups * classes).reshape(num_groups, classes)
        counts[:, layer] = table[:, :num_experts]
    return counts


def balance(counts: np.ndarray) -> dict[str, np.ndarray]:
    """How evenly experts are used, each [...] from counts [..., E].

    entropy in bits; entropy_ratio of the largest possible log2(E) (1 = even; 1 for E = 1); max_over_mean load (1 =
    even, E = one expert takes all); gini coefficient (0 = even, 1 - 1/E = one takes all). NaN where all counts are 0.
    """
    counts = np.asarray(counts, dtype=np.float64)
    size = counts.shape[-1]
    total = counts.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy = np.where(total > 0, _entropy(counts), np.nan)
        ordered = np.sort(counts, axis=-1)
        # mean absolute difference over twice the mean, from the sorted counts
        gini = (ordered @ (2 * np.arange(1, size + 1) - size - 1)) / (size * total)
        return {
            "entropy": entropy,
            "entropy_ratio": entropy / np.log2(size) if size > 1 else np.where(total > 0, 1.0, np.nan),
            "max_over_mean": counts.max(axis=-1) * size / total,
            "gini": gini,
        }


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits [...] of counts [..., E] (0 where all are 0)."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    shares = counts / np.where(total == 0, 1, total)
    return -(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)).sum(axis=-1)


def unique_experts(columns: np.ndarray, num_experts: int) -> np.ndarray:
    """How many different experts each journey meets over its layers (the strongest of each): uint16 [N]."""
    found = np.empty(columns.shape[1], dtype=np.uint16)
    for start in range(0, len(found), BLOCK_ROWS):
        ordered = np.sort(columns[:, start : start + BLOCK_ROWS], axis=0)
        ordered[1:][ordered[1:] == ordered[:-1]] = num_experts  # a repeat counts as little as a layer without expert
        found[start : start + BLOCK_ROWS] = (ordered < num_experts).sum(axis=0)
    return found


# -- gates
def gate_value_counts(experts: np.ndarray, gating_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(counts int64 [L, K, values], the values float64): how often each gate probability occurs.

    Probabilities are float16 (others are rounded to it), of which only 15,361 lie in 0 .. 1: everything about their
    distribution follows from these counts, exactly. Padding (expert -1) and what is no number from 0 to 1 is left out.
    """
    num_rows, num_layers, slots = experts.shape
    counts = np.zeros((num_layers * slots, _UNIT_FLOAT16 + 1), dtype=np.int64)
    rows = 4 * BLOCK_ROWS  # many more rows than counters
    for start in range(0, num_rows, rows):
        block = gating_probs[start : start + rows].astype(np.float16, copy=False)
        bits = np.ascontiguousarray(block.reshape(-1, num_layers * slots).T).view(np.uint16)
        np.minimum(bits, _UNIT_FLOAT16, out=bits)
        padding = experts[start : start + rows].reshape(-1, num_layers * slots).T < 0
        if padding.any():
            bits[padding] = _UNIT_FLOAT16
        for slot, column in enumerate(bits):
            counts[slot] += np.bincount(column, minlength=_UNIT_FLOAT16 + 1)
    values = np.arange(_UNIT_FLOAT16, dtype=np.uint16).view(np.float16).astype(np.float64)
    return counts[:, :-1].reshape(num_layers, slots, _UNIT_FLOAT16), values


def gate_statistics(counts: np.ndarray, values: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """decisions, mean, std (over decisions, not N - 1) and share_above `threshold`, each [...], from counts [..., V].

    The reference pools the layers: sum the counts over them first. NaN where nothing was counted.
    """
    decisions = counts.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (counts @ values) / decisions
        deviations = values - np.nan_to_num(mean)[..., None]
        return {
            "decisions": decisions,
            "mean": mean,
            "std": np.sqrt((counts * deviations**2).sum(axis=-1) / decisions),
            "share_above": counts[..., values > threshold].sum(axis=-1) / decisions,
        }


def group_gates(
    experts: np.ndarray, gating_probs: np.ndarray, groups: np.ndarray, num_groups: int, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sum, number above `threshold`, number) of the strongest gate probability, each float64 [G, L], groups [N]."""
    sums = np.zeros((3, num_groups, experts.shape[1]))
    for start in range(0, len(experts), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        gates = gating_probs[rows, :, 0].astype(np.float64)
        valid = (experts[rows, :, 0] >= 0) & np.isfinite(gates)
        member = (groups[rows] == np.arange(num_groups)[:, None]).astype(np.float64)
        sums[0] += member @ np.where(valid, gates, 0.0)
        sums[1] += member @ (valid & (np.where(valid, gates, 0.0) > threshold)).astype(np.float64)
        sums[2] += member @ valid.astype(np.float64)
    return sums[0], sums[1], sums[2]


# -- from layer to layer
def transition_counts(columns: np.ndarray, num_experts: int) -> np.ndarray:
    """How many journeys go from expert a of layer s to expert b of layer t, for all layer pairs: int64 [L, L, E, E].

    columns [L, N] from `strongest`. counts[s, t, a, b] = counts[t, s, b, a]; counts[s, s] has the layer's expert counts
    on its diagonal. Journeys without an expert in either layer are left out of that pair.
    """
    num_layers, classes = len(columns), _classes(columns, num_experts)
    counts = np.empty((num_layers, num_layers, num_experts, num_experts), dtype=np.int64)
    for source in tqdm(range(num_layers), desc="transitions", delay=3):
        base = columns[source].astype(np.int64) * classes
        for target in range(source, num_layers):
            table = np.bincount(base + columns[target], minlength=classes * classes).reshape(classes, classes)
            counts[source, target] = table[:num_experts, :num_experts]
            counts[target, source] = counts[source, target].T
    return counts


def transition_probabilities(counts: np.ndarray) -> np.ndarray:
    """P(expert of the target layer | expert of the source layer), float64 [..., E, E], from counts [..., E, E].

    Rows of experts that the source layer never uses are 0, as in the reference.
    """
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total == 0, 1, total)


def _from_each_layer(counts: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """(counts [L, E, E], by source expert [L, E], by target expert [L, E], journeys [L]) of each source layer.

    One layer at a time, because E may be large.
    """
    for block in counts:
        yield block, block.sum(axis=2), block.sum(axis=1), block.sum(axis=(1, 2))


def affinity(counts: np.ndarray) -> dict[str, np.ndarray]:
    """How well the expert of one layer foretells that of another, each float64 [L, L] (source, target).

    counts [L, L, E, E] from `transition_counts`. For every pair of different layers:
        reference: the largest transition probability of each source expert, averaged over the E source experts. A
            rarely used source expert counts as much as a common one, and an unused one counts as 0; the diagonal is 0.
        weighted: the same, source experts weighted by how often they occur = the share of journeys for which the most
            likely target expert is right (on the journeys it was counted on).
        majority: share of the target layer's most common expert, the accuracy without looking at the source.
        nmi: mutual information over the mean of both layers' entropies, 0 = independent, 1 = each determines the other
            (0 where both layers have one expert only). Its bias is upwards, about (E - 1)^2 / 2N nats of information.
    The diagonals of the last three are NaN, and so is a pair that no journey has.
    """
    num_layers = len(counts)
    result = {name: np.empty((num_layers, num_layers)) for name in ("reference", "weighted", "majority", "nmi")}
    for source, (block, from_source, to_target, total) in enumerate(_from_each_layer(counts)):
        result["reference"][source] = transition_probabilities(block).max(axis=-1).mean(axis=-1)
        entropies = _entropy(from_source) + _entropy(to_target)
        information = entropies - _entropy(block.reshape(num_layers, -1))
        with np.errstate(invalid="ignore", divide="ignore"):
            result["weighted"][source] = block.max(axis=-1).sum(axis=-1) / total
            result["majority"][source] = to_target.max(axis=-1) / total
            nmi = np.where(entropies > 0, 2 * information / entropies, 0.0)
        result["nmi"][source] = np.where(total > 0, np.clip(nmi, 0, 1), np.nan)
    for name, matrix in result.items():
        np.fill_diagonal(matrix, 0.0 if name == "reference" else np.nan)
    return result


def id_correlation(counts: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation of the expert ids of two layers over journeys, float64 [L, L], as in the reference.

    counts [L, L, E, E]; labels [L, E]: numbers in place of the ids 0 .. E-1. It treats ids as quantities, which they
    are not: see CORRELATION_NOTE. NaN where a layer has one expert only.
    """
    num_layers, size = counts.shape[1:3]
    labels = np.broadcast_to(np.arange(size) if labels is None else labels, (num_layers, size)).astype(np.float64)
    result = np.empty((num_layers, num_layers))
    for source, (block, from_source, to_target, total) in enumerate(_from_each_layer(counts)):
        with np.errstate(invalid="ignore", divide="ignore"):
            x = labels[source] - (from_source @ labels[source] / total)[:, None]
            y = labels - ((to_target * labels).sum(axis=1) / total)[:, None]
            covariance = (x * np.einsum("tab,tb->ta", block, y)).sum(axis=1)
            variances = (from_source * x**2).sum(axis=1) * (to_target * y**2).sum(axis=1)
            result[source] = np.clip(covariance / np.sqrt(variances), -1, 1)
    return result


def cramers_v(counts: np.ndarray) -> np.ndarray:
    """Cramer's V of two layers' experts, float64 [L, L] from counts [L, L, E, E]: 0 = independent, 1 = determined.

    V = sqrt(chi^2 / (N (m - 1))), m the smaller number of experts in use (Cramer 1946, chapter 21). Unlike the
    correlation of ids it does not depend on their numbering. NaN where a layer has one expert only.
    """
    result = np.empty(counts.shape[:2])
    for source, (block, from_source, to_target, total) in enumerate(_from_each_layer(counts)):
        smaller = np.minimum((from_source > 0).sum(axis=1), (to_target > 0).sum(axis=1))
        expected = from_source[:, :, None].astype(np.float64) * to_target[:, None, :]  # times N
        squares = np.square(block, dtype=np.float64)
        ratio = np.divide(squares, expected, out=np.zeros_like(expected), where=expected > 0).sum(axis=(1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            result[source] = np.sqrt(np.maximum(ratio - 1, 0) / (smaller - 1)) * np.where(total > 0, 1, np.nan)
    return np.where(np.isfinite(result), np.minimum(result, 1.0), np.nan)


# -- predicting layers ahead
def hop_accuracy(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(accuracy, majority baseline), each float64 [L-1], of predicting the expert h = 1 .. L-1 layers ahead, in-sample.

    counts [L, L, E, E]. As in the reference: for each source layer the most frequent transition is the prediction, and
    right ones are counted over all source layers together, on the journeys that the transitions were counted on. The
    majority baseline predicts the target layer's most common expert. Shares, 0 to 1.
    """
    hops = range(1, len(counts))
    correct, majority, total = (np.zeros(len(hops)) for _ in range(3))
    for hop in hops:
        for source in range(len(counts) - hop):
            block = counts[source, source + hop]
            correct[hop - 1] += block.max(axis=1).sum()
            majority[hop - 1] += block.sum(axis=0).max()
            total[hop - 1] += block.sum()
    with np.errstate(invalid="ignore"):
        return correct / total, majority / total


def problem_folds(domain_of_problem: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold 0 .. folds-1 of each problem [P]: at random, every domain spread evenly. At most P folds.

    Raises ValueError for folds < 2 or fewer than two problems.
    """
    num_problems = len(domain_of_problem)
    if folds < 2 or num_problems < 2:
        raise ValueError(f"{folds} folds of {num_problems} problems: out-of-sample accuracy needs 2 of each")
    order = np.random.default_rng(seed).permutation(num_problems)
    order = order[np.argsort(domain_of_problem[order], kind="stable")]
    result = np.empty(num_problems, dtype=np.int64)
    result[order] = np.arange(num_problems) % min(folds, num_problems)
    return result


def held_out_hits(
    columns: np.ndarray, num_experts: int, clusters: np.ndarray, fold_of_problem: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right by transitions, right by majority, predictions) of each problem, 1 .. L-1 layers ahead: int64 [P, L-1].

    columns [L, N], clusters [N] problem of each journey, fold_of_problem [P]. Predictions for a problem come from the
    counts of the other folds alone; a source expert that they never met is answered with their majority.
    """
    num_layers, num_problems, num_folds = len(columns), len(fold_of_problem), int(fold_of_problem.max()) + 1
    classes = _classes(columns, num_experts)
    area = classes * classes
    base = (fold_of_problem * area)[clusters]
    hits = np.zeros((3, num_problems, num_layers - 1), dtype=np.int64)
    for hop in tqdm(range(1, num_layers), desc="held-out hops", delay=3):
        # three counters in one number, each below 2^20: right by transitions, right by majority, predictions
        packed = np.zeros(len(clusters), dtype=np.int64)
        for source in range(num_layers - hop):
            codes = base + columns[source].astype(np.int64) * classes + columns[source + hop]
            tables = np.bincount(codes, minlength=num_folds * area).reshape(num_folds, classes, classes)
            packed += _rewards(tables, num_experts).ravel()[codes]
        for part in range(3):
            values = (packed >> (20 * part)) & (2**20 - 1)
            hits[part, :, hop - 1] = np.bincount(clusters, weights=values, minlength=num_problems)
    return hits[0], hits[1], hits[2]


def _rewards(tables: np.ndarray, num_experts: int) -> np.ndarray:
    """What a journey from expert a to b adds to its counters, int64 [F, C, C], for fold counts `tables` [F, C, C]."""
    used = tables[:, :num_experts, :num_experts]
    training = used.sum(axis=0) - used
    majority = training.sum(axis=1).argmax(axis=1)  # [F]
    predicted = np.where(training.sum(axis=2) > 0, training.argmax(axis=2), majority[:, None])  # [F, E]
    target = np.arange(num_experts)
    result = np.zeros(tables.shape, dtype=np.int64)
    result[:, :num_experts, :num_experts] = (
        (predicted[:, :, None] == target)
        + ((majority[:, None, None] == target).astype(np.int64) << 20)
        + (np.int64(1) << 40)
    )
    return result


def ratio_intervals(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, seed: int, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each [H]: percentile bootstrap of sum(numerator) / sum(denominator) by column, problems resampled.

    numerator, denominator [P, H]. As `stats.cluster_bootstrap`, with the same draws of problems for all columns. NaN
    for fewer than two problems.
    """
    num_problems, columns = numerator.shape
    if num_problems < 2:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = [
            (times.astype(float) @ numerator) / (times.astype(float) @ denominator)
            for times in stats.resampled_counts(num_problems, resamples, seed)
        ]
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


# -- paths
def path_codes(columns: np.ndarray, num_experts: int) -> np.ndarray:
    """Number of each journey's path, int64 [N]: equal exactly where all experts of columns [L, N] are.

    Digits are packed into 63 bits; what there is so far is renumbered whenever the next digit no longer fits.
    """
    classes = _classes(columns, num_experts)
    codes, bound = np.zeros(columns.shape[1], dtype=np.int64), 1
    for column in columns:
        if bound > (2**63 - 1) // classes:
            codes, distinct = pd.factorize(codes)
            bound = len(distinct)
        codes = codes * classes + column
        bound *= classes
    return codes


def common_paths(codes: np.ndarray, top: int) -> tuple[int, list[tuple[int, int]], np.ndarray]:
    """(number of different paths, the `top` most common, number [N] of each journey's path in order of appearance).

    codes [N] from `path_codes`. Of each common path: the journeys on it and the first of them; ties in order of rows.
    """
    ids, distinct = pd.factorize(codes)
    counts = np.bincount(ids)
    most = np.argsort(-counts, kind="stable")[:top]
    return len(distinct), [(int(counts[path]), int(np.argmax(ids == path))) for path in most], ids


# -- domains
def domain_distance(
    counts: np.ndarray, in_first: np.ndarray, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Jensen-Shannon distance, p-value, p-value over all layers), each float64 [L], between two groups of problems.

    counts [P, L, E] expert counts of each problem, in_first [P] bool. The distance (base 2: 0 = same, 1 = disjoint) is
    between the groups' distributions of experts. p: share of random divisions of the *problems* into groups of the same
    sizes with a distance at least as large, (1 + hits) / (1 + permutations); tokens of one problem are alike, so tokens
    must not be shuffled. The last p compares with the largest distance of any layer (Westfall and Young 1993): below
    0.05, the layer differs even though L were tried.
    """
    num_problems = len(counts)
    flat = counts.reshape(num_problems, -1).astype(np.float64)
    total = flat.sum(axis=0)

    def distances(members: np.ndarray) -> np.ndarray:
        first = members @ flat
        shape = (len(members), *counts.shape[1:])
        return js_distance(first.reshape(shape), (total - first).reshape(shape))

    observed = distances(in_first[None].astype(np.float64))[0]
    rng = np.random.default_rng(seed)
    hits, any_hits = np.zeros(len(observed)), np.zeros(len(observed))
    size = max(1, _DRAW_ENTRIES // max(num_problems, flat.shape[1]))
    for start in range(0, permutations, size):
        members = np.tile(in_first.astype(np.float64), (min(size, permutations - start), 1))
        drawn = np.nan_to_num(distances(rng.permuted(members, axis=1)))
        # rounding must not decide whether the observed division itself counts
        hits += (drawn >= observed - 1e-12).sum(axis=0)
        any_hits += (drawn.max(axis=1)[:, None] >= observed - 1e-12).sum(axis=0)
    nothing = np.where(np.isfinite(observed), 0.0, np.nan)
    return observed, (1 + hits) / (1 + permutations) + nothing, (1 + any_hits) / (1 + permutations) + nothing


def js_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance (base 2) [...] of two count arrays [..., E]; NaN where either is empty."""
    empty = (first.sum(axis=-1) == 0) | (second.sum(axis=-1) == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = jensenshannon(first, second, base=2, axis=-1)
    # the root of a rounding error below 0 is NaN, where the distance is 0
    return np.where(empty, np.nan, np.nan_to_num(distance))


# -- tokens
def token_agreement(
    columns: np.ndarray, num_experts: int, tokens: np.ndarray, num_tokens: int, listed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How often two occurrences of the same token go to the same expert.

    columns [L, N], tokens [N] with values 0 .. W-1, listed [M]: tokens whose distributions are wanted. Returns
        same [L]: over all pairs of occurrences of the same token, the share with the same expert;
        any [L]: the same over all pairs of journeys, whatever their tokens;
        by_token [W]: same, for one token, mean over layers (NaN for a token that occurs once);
        profiles [M, L, E]: distribution of the listed tokens over the experts.
    """
    num_layers = len(columns)
    same, anything, pairs_of = np.full(num_layers, np.nan), np.full(num_layers, np.nan), np.zeros(num_tokens)
    sums = np.zeros(num_tokens)
    profiles = np.zeros((len(listed), num_layers, num_experts))
    classes = num_experts + 1
    base = tokens.astype(np.int64) * classes
    for layer, column in enumerate(columns):
        table = np.bincount(base + column, minlength=num_tokens * classes).reshape(num_tokens, classes)
        table = table[:, :num_experts].astype(np.float64)
        occurrences, totals = table.sum(axis=1), table.sum(axis=0)
        pairs, equal = occurrences * (occurrences - 1), (table * (table - 1)).sum(axis=1)
        if pairs.sum():
            same[layer] = equal.sum() / pairs.sum()
        if totals.sum() > 1:
            anything[layer] = (totals * (totals - 1)).sum() / (totals.sum() * (totals.sum() - 1))
        sums += np.divide(equal, pairs, out=np.zeros_like(pairs), where=pairs > 0)
        pairs_of += pairs > 0
        profiles[:, layer] = table[listed] / np.maximum(occurrences[listed], 1)[:, None]
    return same, anything, np.divide(sums, pairs_of, out=np.full(num_tokens, np.nan), where=pairs_of > 0), profiles


def consecutive_pairs(clusters: np.ndarray, token_idx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row of a token, row of the token after it in the same problem), each int64 [pairs]; rows in any order."""
    order = np.lexsort((token_idx, clusters))
    follows = (np.diff(clusters[order]) == 0) & (np.diff(token_idx[order]) == 1)
    first = np.flatnonzero(follows)
    return order[first], order[first + 1]


def consecutive_agreement(experts: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """How alike the routing of two rows is, each [L]: experts [N, L, K], first and second [pairs] rows.

    pairs: those in which both have an expert. agreement: share of them with the same strongest expert. overlap: mean
    number of experts that both have among their K, over K.
    """
    _, num_layers, slots = experts.shape
    pairs, equal, shared = (np.zeros(num_layers) for _ in range(3))
    for start in range(0, len(first), BLOCK_ROWS):
        one = experts[first[start : start + BLOCK_ROWS]]
        two = experts[second[start : start + BLOCK_ROWS]]
        valid = (one[:, :, 0] >= 0) & (two[:, :, 0] >= 0)
        both = np.zeros(valid.shape, dtype=np.uint16)
        for left, right in product(range(slots), repeat=2):
            both += (one[:, :, left] == two[:, :, right]) & (one[:, :, left] >= 0)
        pairs += np.count_nonzero(valid, axis=0)
        equal += np.count_nonzero(valid & (one[:, :, 0] == two[:, :, 0]), axis=0)
        shared += both.sum(axis=0, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"pairs": pairs.astype(np.int64), "agreement": equal / pairs, "overlap": shared / (pairs * slots)}

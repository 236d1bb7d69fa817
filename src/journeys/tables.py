"""Every analysis of a set of token journeys, as the tables and arrays that are written: one entry per file.

The measures themselves are in `measures.py`; here figures become columns (`analyze`).
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src.journeys import measures
from src.journeys.sample import Sample

# First token positions of the buckets in `positions.csv`, and what those are called; the last one is open.
POSITION_BUCKETS = {0: "0", 1: "1-3", 4: "4-15", 16: "16-63", 64: "64-255", 256: "256+"}
# Bins of equal width from 0 to 1 in `gate_histogram.csv`.
HISTOGRAM_BINS = 100
# Journeys of each domain that `example_journeys.npz` keeps, for drawing single ones.
EXAMPLES = 101
CORRELATION_NOTE = (
    "Expert ids are labels: renumbering the experts of a layer changes nothing in the model, but changes the Pearson "
    "correlation of the ids (`id_correlation_relabelled` is the same data with the ids of each layer shuffled), and a "
    "strong dependence that is not monotone in the ids can show r = 0. Cramer's V depends on the counts alone."
)


@dataclass(frozen=True)
class Settings:
    """Choices of `analyze`; percentages run from 0 to 100.

    folds: parts that problems are split into for out-of-sample accuracy. permutations, resamples: draws behind p-values
    and intervals (`level`). high_confidence: gate probability above which a decision counts as confident.
    dominant_percent, strong_percent, low_accuracy_percent, domain_percent: thresholds of the findings (an expert's
    usage, a transition, the accuracy of a hop, the difference of two domains in percentage points).
    path_lengths: lengths of the shorter paths, in layers. top: paths listed. top_tokens: tokens listed.
    """

    folds: int = 5
    permutations: int = 1000
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0
    high_confidence: float = 0.8
    dominant_percent: float = 20.0
    strong_percent: float = 30.0
    low_accuracy_percent: float = 15.0
    domain_percent: float = 5.0
    path_lengths: tuple[int, ...] = (2, 4, 8)
    top: int = 10
    top_tokens: int = 200


# -- everything
def analyze(sample: Sample, settings: Settings) -> dict[str, dict]:
    """Every analysis: file name -> content. `.csv`: column -> values; `.json`: the object; `.npz`: name -> array.

    Layers are named by the model's layer ids; shares called percent run from 0 to 100, with every digit.
    """
    experts, num_experts, layers = sample.experts, sample.num_experts, np.array(sample.layers)
    columns = measures.strongest(experts, num_experts)
    by_rank = measures.expert_counts(experts, num_experts)
    problems = measures.group_counts(columns, num_experts, sample.clusters, int(sample.clusters.max()) + 1)
    domain_of_problem = np.zeros(len(problems), dtype=np.int64)
    domain_of_problem[sample.clusters] = sample.domains
    counts = measures.transition_counts(columns, num_experts)
    unique = measures.unique_experts(columns, num_experts)
    confidence, histogram, pooled = _gate_tables(sample, settings)
    related = measures.affinity(counts)
    labels = np.random.default_rng(settings.seed).permuted(np.tile(np.arange(num_experts), (len(layers), 1)), axis=1)
    correlation = measures.id_correlation(counts)
    paths, top_paths, path_ids = _path_tables(sample, settings, columns)
    domains = _domain_tables(sample, settings, problems, domain_of_problem, unique)
    files = {
        "expert_distribution.csv": _distribution_table(layers, by_rank),
        "load_balance.csv": _balance_table(layers, by_rank),
        "gate_confidence.csv": confidence,
        "gate_histogram.csv": histogram,
        "transitions.npz": {"layers": layers, "counts": counts, "adjacent_probabilities": _adjacent(counts)},
        "strong_transitions.csv": _strong_transitions(layers, counts, settings.strong_percent),
        "affinity.npz": {"layers": layers} | related,
        "hop_accuracy.csv": _hop_table(sample, settings, columns, counts, domain_of_problem),
        "paths.csv": paths,
        "top_paths.csv": top_paths,
        "correlation.npz": {
            "layers": layers,
            "id_correlation": correlation,
            "id_correlation_relabelled": measures.id_correlation(counts, labels),
            "cramers_v": measures.cramers_v(counts),
        },
    }
    files |= domains | _token_tables(sample, settings, columns, path_ids) | _position_tables(sample, columns, unique)
    files["consecutive_tokens.csv"] = _consecutive_table(sample, by_rank)
    files["example_journeys.npz"] = _examples(sample)
    findings = _findings(sample, settings, by_rank, counts, related["reference"], correlation)
    findings["gates"] = pooled
    findings["paths"] = {"unique": paths["unique_paths"][0], "uniqueness_ratio": paths["uniqueness_ratio"][0]}
    findings["unique_experts_per_token"] = float(unique.mean())
    files["findings.json"] = findings
    return files


def _exact(values) -> list[str]:
    """Numbers as text with every digit: `results.write_csv` keeps 10, too few to compare percentages at 1e-9."""
    return ["" if np.isnan(value) else repr(float(value)).removesuffix(".0") for value in np.ravel(values)]


def _percent(shares) -> list[str]:
    """Shares as percentages with every digit."""
    return _exact(100 * np.asarray(shares))


def _shares(counts: np.ndarray) -> np.ndarray:
    """counts [..., E] over their sum; NaN where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True)


def _adjacent(counts: np.ndarray) -> np.ndarray:
    """Transition probabilities from each layer to the next, [L-1, E, E]."""
    source = np.arange(len(counts) - 1)
    return measures.transition_probabilities(counts[source, source + 1])


def _distribution_table(layers: np.ndarray, by_rank: np.ndarray) -> dict:
    top1, chosen = by_rank[:, 0], by_rank.sum(axis=1)
    return {
        "layer": np.repeat(layers, top1.shape[1]),
        "expert": np.tile(np.arange(top1.shape[1]), len(layers)),
        "count": top1.ravel(),
        "percent": _percent(_shares(top1)),
        "count_topk": chosen.ravel(),
        "percent_topk": _percent(_shares(chosen)),
    }


def _balance_table(layers: np.ndarray, by_rank: np.ndarray) -> dict:
    parts = {"top1": measures.balance(by_rank[:, 0]), "topk": measures.balance(by_rank.sum(axis=1))}
    table = {"layer": np.tile(layers, 2), "choice": np.repeat(list(parts), len(layers))}
    return table | {name: np.concatenate([part[name] for part in parts.values()]) for name in parts["top1"]}


def _gate_tables(sample: Sample, settings: Settings) -> tuple[dict, dict, list[dict]]:
    """(gate_confidence, gate_histogram, the pooled figures by rank)."""
    counts, values = measures.gate_value_counts(sample.experts, sample.gating_probs)
    counts = np.concatenate((counts.sum(axis=0, keepdims=True), counts))  # first all layers together
    names = ["all", *sample.layers]
    slots = counts.shape[1]
    statistics = measures.gate_statistics(counts, values, settings.high_confidence)
    ranks = 1 + np.arange(slots)
    confidence = {"layer": np.repeat(np.array(names, dtype=object), slots), "rank": np.tile(ranks, len(names))}
    confidence["decisions"] = statistics["decisions"].ravel()
    confidence |= {name: _exact(statistics[name]) for name in ("mean", "std")}
    confidence["percent_above"] = _percent(statistics["share_above"])
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    places = np.minimum(np.searchsorted(edges, values, side="right") - 1, HISTOGRAM_BINS - 1)
    starts = np.searchsorted(places, np.arange(HISTOGRAM_BINS))  # every bin holds some float16
    binned = np.add.reduceat(counts, starts, axis=-1)
    histogram = {
        "layer": np.repeat(np.array(names, dtype=object), slots * HISTOGRAM_BINS),
        "rank": np.tile(np.repeat(ranks, HISTOGRAM_BINS), len(names)),
        "bin_low": np.tile(edges[:-1], len(names) * slots),
        "bin_high": np.tile(edges[1:], len(names) * slots),
        "count": binned.ravel(),
    }
    pooled = [
        {"rank": rank, "mean": mean, "std": std, "percent_above": 100 * above, "threshold": settings.high_confidence}
        for rank, mean, std, above in zip(
            ranks, *(statistics[name][0] for name in ("mean", "std", "share_above")), strict=True
        )
    ]
    return confidence, histogram, pooled


def _strong_transitions(layers: np.ndarray, counts: np.ndarray, threshold: float) -> dict:
    """Transitions from a layer to the next above `threshold` percent."""
    probabilities = _adjacent(counts)
    pair, source, target = np.nonzero(probabilities > threshold / 100)
    return {
        "source_layer": layers[pair],
        "target_layer": layers[pair + 1],
        "source_expert": source,
        "target_expert": target,
        "count": counts[pair, pair + 1, source, target],
        "percent": _percent(probabilities[pair, source, target]),
    }


def _hop_table(
    sample: Sample, settings: Settings, columns: np.ndarray, counts: np.ndarray, domain_of_problem: np.ndarray
) -> dict:
    accuracy, majority = measures.hop_accuracy(counts)
    hops = np.arange(1, len(columns))
    absent = np.full(len(hops), np.nan)
    held_out, held_out_majority, low, high = absent, absent, absent, absent
    if len(domain_of_problem) > 1 and len(hops):
        folds = measures.problem_folds(domain_of_problem, settings.folds, settings.seed)
        right, by_majority, tried = measures.held_out_hits(columns, sample.num_experts, sample.clusters, folds)
        with np.errstate(invalid="ignore"):
            held_out = right.sum(axis=0) / tried.sum(axis=0)
            held_out_majority = by_majority.sum(axis=0) / tried.sum(axis=0)
        low, high = measures.ratio_intervals(right, tried, settings.resamples, settings.seed, settings.level)
    return {
        "hop": hops,
        "layer_pairs": len(columns) - hops,
        "accuracy": _percent(accuracy),
        "majority": _percent(majority),
        "held_out_accuracy": _percent(held_out),
        "ci_low": _percent(low),
        "ci_high": _percent(high),
        "held_out_majority": _percent(held_out_majority),
        "random": _percent(np.full(len(hops), 1 / sample.num_experts)),
    }


def _path_tables(sample: Sample, settings: Settings, columns: np.ndarray) -> tuple[dict, dict, np.ndarray]:
    """(paths, top_paths, number of each journey's whole path [N])."""
    num_layers, num_rows = columns.shape
    lengths = [num_layers, *(length for length in settings.path_lengths if length < num_layers)]
    windows = [(length, start) for length in lengths for start in range(num_layers - length + 1)]
    summary, found = [], {length: [] for length in lengths}
    for length, start in tqdm(windows, desc="paths", delay=3):
        codes = measures.path_codes(columns[start : start + length], sample.num_experts)
        distinct, most, ids = measures.common_paths(codes, settings.top)
        summary.append((length, sample.layers[start], num_rows, distinct, distinct / num_rows, most[0][0]))
        found[length] += [(-count, start, row) for count, row in most]
        if length == num_layers:
            whole = ids
    listed = []
    for length, places in found.items():
        for rank, (count, start, row) in enumerate(sorted(places)[: settings.top]):
            path = _path_text(columns[start : start + length, row], sample)
            tokens = _tokens_of(sample, np.flatnonzero(whole == whole[row])) if length == num_layers else ""
            listed.append((length, rank + 1, sample.layers[start], path, -count, tokens))
    names = "length start_layer tokens unique_paths uniqueness_ratio most_common"
    paths = pd.DataFrame(summary, columns=names.split()).to_dict("list")
    names = "length rank start_layer path count token_texts"
    top_paths = pd.DataFrame(listed, columns=names.split()).to_dict("list")
    top_paths["percent"] = _percent(np.array(top_paths["count"]) / num_rows)
    return paths, top_paths, whole


def _path_text(path: np.ndarray, sample: Sample) -> str:
    """ "6>5>0"; "-" where a layer has no expert."""
    return ">".join("-" if expert == sample.num_experts else str(int(expert)) for expert in path)


def _tokens_of(sample: Sample, rows: np.ndarray, shown: int = 5) -> str:
    """The most frequent tokens of some journeys, as "' the' x12 | ' a' x3"."""
    tokens = sample.tokens[rows]
    numbers, counts = np.unique(tokens[tokens >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:shown]
    return " | ".join(f"{sample.token_names[numbers[i]]!r} x{counts[i]}" for i in order)


def _domain_tables(
    sample: Sample, settings: Settings, problems: np.ndarray, domain_of_problem: np.ndarray, unique: np.ndarray
) -> dict[str, dict]:
    """domain_distribution, domain_difference, domain_distance and domain_summary."""
    names, layers = sample.domain_names, np.array(sample.layers)
    size = sample.num_experts
    counts = np.stack([problems[domain_of_problem == domain].sum(axis=0) for domain in range(len(names))])
    shares = _shares(counts)
    cells = len(layers) * size
    distribution = {
        "domain": np.repeat(np.array(names, dtype=object), cells),
        "layer": np.tile(np.repeat(layers, size), len(names)),
        "expert": np.tile(np.arange(size), len(names) * len(layers)),
        "count": counts.ravel(),
        "percent": _percent(shares),
    }
    differences, distances = [], []
    for a, b in combinations(range(len(names)), 2):
        pair = {"domain_a": names[a], "domain_b": names[b]}
        # percentages before their difference, as in the reference: both then fall on the same side of a threshold
        gap = (100 * shares[a] - 100 * shares[b]).ravel()
        preferred = np.where(gap > settings.domain_percent, names[a], "")
        difference = {
            "layer": np.repeat(layers, size),
            "expert": np.tile(np.arange(size), len(layers)),
            "percent_a": _percent(shares[a]),
            "percent_b": _percent(shares[b]),
            "difference": _exact(gap),
            "prefers": np.where(gap < -settings.domain_percent, names[b], preferred),
        }
        differences.append(pd.DataFrame(pair | difference))
        both = np.isin(domain_of_problem, (a, b))
        member = domain_of_problem[both] == a
        measured = measures.domain_distance(problems[both], member, settings.permutations, settings.seed)
        distance = {"layer": layers} | dict(zip(("js_distance", "p_value", "p_any_layer"), measured, strict=True))
        counted = {"problems_a": int(member.sum()), "problems_b": int((~member).sum())}
        distances.append(pd.DataFrame(pair | distance | counted))
    sums, above, decisions = (
        part.sum(axis=1)
        for part in measures.group_gates(
            sample.experts, sample.gating_probs, sample.domains, len(names), settings.high_confidence
        )
    )
    tokens = np.bincount(sample.domains, minlength=len(names))
    with np.errstate(invalid="ignore"):
        summary = {
            "domain": list(names),
            "problems": np.bincount(domain_of_problem, minlength=len(names)),
            "tokens": tokens,
            "mean_confidence": _exact(sums / decisions),
            "unique_experts": _exact(np.bincount(sample.domains, weights=unique, minlength=len(names)) / tokens),
            "high_confidence_percent": _percent(above / decisions),
        }
    return {
        "domain_distribution.csv": distribution,
        "domain_difference.csv": _joined(
            differences, "domain_a domain_b layer expert percent_a percent_b difference prefers"
        ),
        "domain_distance.csv": _joined(
            distances, "domain_a domain_b layer js_distance p_value p_any_layer problems_a problems_b"
        ),
        "domain_summary.csv": summary,
    }


def _joined(parts: list[pd.DataFrame], names: str) -> dict[str, list]:
    """The columns `names` of tables one after the other, empty where there is no table."""
    return {name: [value for part in parts for value in part[name]] for name in names.split()}


def _token_tables(sample: Sample, settings: Settings, columns: np.ndarray, path_ids: np.ndarray) -> dict[str, dict]:
    """token_identity (by layer) and token_routing (by token); without rows where tokens are unknown."""
    names = ("token_id", "token", "count", "agreement", "paths", "common_path_percent", "nearest", "nearest_agreement")
    known = sample.tokens >= 0
    if not known.any():
        identity = {name: [] for name in ("layer", "same_token", "any_tokens")}
        return {"token_identity.csv": identity, "token_routing.csv": {name: [] for name in names}}
    tokens = sample.tokens[known]
    occurrences = np.bincount(tokens, minlength=len(sample.token_names))
    listed = np.argsort(-occurrences, kind="stable")[: min(settings.top_tokens, np.count_nonzero(occurrences))]
    same, anything, by_token, profiles = measures.token_agreement(
        columns[:, known], sample.num_experts, tokens, len(occurrences), listed
    )
    identity = {"layer": list(sample.layers), "same_token": same, "any_tokens": anything}
    # journeys of each (token, path): the number of a token's paths, and the most common one
    together = pd.DataFrame({"token": tokens, "path": path_ids[known]}).value_counts().groupby("token")
    distinct, commonest = together.size()[listed].to_numpy(), together.max()[listed].to_numpy()
    # agreement of an occurrence of one token with an occurrence of another, mean over layers
    flat = profiles.reshape(len(listed), -1)
    agreement = flat @ flat.T / len(columns)
    np.fill_diagonal(agreement, -1)
    nearest = agreement.argmax(axis=1)
    alone = len(listed) == 1
    routing = (
        sample.token_ids[listed],
        [sample.token_names[i] for i in listed],
        occurrences[listed],
        by_token[listed],
        distinct,
        _percent(commonest / occurrences[listed]),
        [""] if alone else [sample.token_names[i] for i in listed[nearest]],
        [np.nan] if alone else agreement.max(axis=1),
    )
    return {"token_identity.csv": identity, "token_routing.csv": dict(zip(names, routing, strict=True))}


def _position_tables(sample: Sample, columns: np.ndarray, unique: np.ndarray) -> dict[str, dict]:
    """positions (by bucket of POSITION_BUCKETS) and positions_by_layer: each bucket against all other positions."""
    buckets = np.searchsorted(list(POSITION_BUCKETS), sample.token_idx, side="right") - 1
    size = len(POSITION_BUCKETS)
    counts = measures.group_counts(columns, sample.num_experts, buckets, size)
    distance = measures.js_distance(counts, counts.sum(axis=0) - counts)
    sums, _, decisions = measures.group_gates(sample.experts, sample.gating_probs, buckets, size, 1.0)
    tokens = np.bincount(buckets, minlength=size)
    kept = np.flatnonzero(tokens)
    names = np.array(list(POSITION_BUCKETS.values()), dtype=object)
    num_layers = len(columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        positions = {
            "positions": names[kept],
            "tokens": tokens[kept],
            "unique_experts": np.bincount(buckets, weights=unique, minlength=size)[kept] / tokens[kept],
            "mean_confidence": (sums.sum(axis=1) / decisions.sum(axis=1))[kept],
            "mean_js_distance": distance[kept].mean(axis=1),
        }
        by_layer = {
            "positions": np.repeat(names[kept], num_layers),
            "layer": np.tile(np.array(sample.layers), len(kept)),
            "tokens": np.repeat(tokens[kept], num_layers),
            "mean_confidence": (sums / decisions)[kept].ravel(),
            "js_distance": distance[kept].ravel(),
            "top_expert": counts[kept].argmax(axis=-1).ravel(),
            "top_percent": _percent(_shares(counts[kept]).max(axis=-1)),
        }
    return {"positions.csv": positions, "positions_by_layer.csv": by_layer}


def _consecutive_table(sample: Sample, by_rank: np.ndarray) -> dict:
    """consecutive_tokens: agreement of neighbouring tokens, beside that of two independent draws of a token."""
    measured = measures.consecutive_agreement(
        sample.experts, *measures.consecutive_pairs(sample.clusters, sample.token_idx)
    )
    chosen = by_rank.sum(axis=1) / len(sample.experts)  # share of journeys that have the expert among their K
    return {
        "layer": list(sample.layers),
        "pairs": measured["pairs"],
        "agreement": measured["agreement"],
        "agreement_chance": (_shares(by_rank[:, 0]) ** 2).sum(axis=-1),
        "overlap": measured["overlap"],
        "overlap_chance": (chosen**2).sum(axis=-1) / by_rank.shape[1],
    }


def _examples(sample: Sample) -> dict[str, np.ndarray]:
    """The first journeys of each domain, in order of appearance, for drawing single ones."""
    rows = np.concatenate([np.flatnonzero(sample.domains == d)[:EXAMPLES] for d in range(len(sample.domain_names))])
    return {
        "layers": np.array(sample.layers),
        "domain": np.array(sample.domain_names)[sample.domains[rows]],
        "problem_id": sample.problem_ids[rows],
        "token_idx": sample.token_idx[rows],
        "token": np.array([sample.token_names[i] if i >= 0 else "" for i in sample.tokens[rows]]),
        "experts": np.asarray(sample.experts[rows]),
        "gating_probs": np.asarray(sample.gating_probs[rows]),
    }


def _findings(
    sample: Sample,
    settings: Settings,
    by_rank: np.ndarray,
    counts: np.ndarray,
    reference: np.ndarray,
    correlation: np.ndarray,
) -> dict:
    """The small findings that the reference prints, with its rules (strict comparisons, first of equals)."""
    layers, num_layers = sample.layers, len(sample.layers)
    usage = 100 * _shares(by_rank[:, 0])
    dominant = [
        {"layer": layers[i], "expert": int(e), "percent": float(usage[i, e])}
        for i, e in np.argwhere(usage > settings.dominant_percent)
    ]
    index = np.arange(num_layers)
    apart = np.abs(index[:, None] - index)
    adjacent = reference[index[:-1], index[1:]]  # forwards only
    near = float(adjacent.mean()) if num_layers > 1 else None
    far = float(reference[apart > 1].mean()) if num_layers > 2 else None
    percent = 100 * measures.hop_accuracy(counts)[0]
    low = np.flatnonzero(percent < settings.low_accuracy_percent)
    result = {
        "tokens": len(sample.experts),
        "problems": int(sample.clusters.max()) + 1,
        "domains": list(sample.domain_names),
        "layers": num_layers,
        "experts": sample.num_experts,
        "experts_per_token": sample.experts.shape[2],
        "dominant_experts": {"above_percent": settings.dominant_percent, "experts": dominant},
        "affinity": {
            "adjacent": near,
            "non_adjacent": far,
            "adjacent_advantage_percent": 100 * (near - far) / far if far else None,
        },
        "hop_accuracy_percent": {
            str(hop): float(percent[hop - 1]) for hop in (1, 5, num_layers - 1) if 0 < hop < num_layers
        },
        "low_accuracy": {
            "below_percent": settings.low_accuracy_percent,
            # the reference answers with the last hop where none is below
            "hop": int(low[0]) + 1 if len(low) else num_layers - 1,
            "reached": bool(len(low)),
        },
        "most_predictable": None,
    }
    if num_layers > 1:
        best = int(adjacent.argmax())
        matrix = measures.transition_probabilities(counts[best, best + 1])
        result["most_predictable"] = {
            "source_layer": layers[best],
            "target_layer": layers[best + 1],
            "affinity": float(adjacent[best]),
            "transitions": matrix,
            "strong": [
                {"source_expert": int(a), "target_expert": int(b), "percent": float(100 * matrix[a, b])}
                for a, b in np.argwhere(matrix > settings.strong_percent / 100)
            ],
        }
    pairs = [(i, j) for i, j in np.argwhere(np.triu(apart > 1)) if np.isfinite(correlation[i, j])]
    pairs.sort(key=lambda pair: -abs(correlation[pair]))
    result["strongest_id_correlations"] = [
        {"layer_a": layers[i], "layer_b": layers[j], "r": float(correlation[i, j])} for i, j in pairs[:5]
    ]
    result["id_correlation_note"] = CORRELATION_NOTE
    return result

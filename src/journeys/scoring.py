"""What predictors score: shares of right predictions, calibration, intervals over problems, and what a split leaks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import comb

from src.base import stats
from src.journeys.cells import PARTS, Cells, Data, Predictor, cells_of, split_by_problem, split_by_row, targets_of
from src.journeys.networks import Settings, stale_gate
from src.journeys.predictors import fit

METRICS = ("top1", "top2", "slot_overlap", "whole_set")
ECE_BINS = 15
# Cells that are predicted at once.
CHUNK_CELLS = 65_536


# -- scores
@dataclass(frozen=True, eq=False)
class Scores:
    """What each of M predictions scored.

    hits [M, 4] float64 in the order of METRICS: whether the strongest expert is the most probable; whether it is among
    the two most probable; how many of the K experts are among the K most probable, over K (padding is never right);
    whether all are. confidence [M]: the largest probability. ranked [M, K]: the K most probable experts, best first.
    """

    hits: np.ndarray
    confidence: np.ndarray
    ranked: np.ndarray


def score(probabilities: np.ndarray, experts: np.ndarray) -> Scores:
    """Scores of probabilities [M, E] against the target's experts [M, K], strongest first, -1 is none."""
    slots = experts.shape[1]
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : max(2, slots)]
    right = order[:, :2] == experts[:, :1]
    found = ((order[:, :slots, None] == experts[:, None, :]) & (experts >= 0)[:, None, :]).sum(axis=(1, 2))
    hits = np.stack((right[:, 0], right.any(axis=1), found / slots, found == slots), axis=1).astype(np.float64)
    confidence = np.take_along_axis(probabilities, order[:, :1], axis=1)[:, 0]
    return Scores(hits, confidence.astype(np.float64), order[:, :slots])


def expected_scores(experts: np.ndarray, num_experts: int, rng: np.random.Generator) -> Scores:
    """Mean scores over all rankings of E experts, for experts [M, K]: top-1 is exactly 1 / E. `ranked` is one drawn."""
    rows, slots = experts.shape
    active = (experts >= 0).sum(axis=1)
    hits = np.empty((rows, len(METRICS)))
    hits[:, 0], hits[:, 1] = 1 / num_experts, min(2, num_experts) / num_experts
    hits[:, 2], hits[:, 3] = active / num_experts, (active == slots) / comb(num_experts, slots)
    ranked = rng.permuted(np.tile(np.arange(num_experts, dtype=np.int16), (rows, 1)), axis=1)[:, :slots]
    return Scores(hits, np.full(rows, 1 / num_experts), ranked)


def evaluate(predictor: Predictor, data: Data, cells: Cells, seed: int = 0) -> tuple[Scores, float]:
    """(scores of all cells, microseconds for a prediction, in blocks of CHUNK_CELLS)."""
    rng, parts, seconds = np.random.default_rng(seed), [], 0.0
    for start in range(0, len(cells), CHUNK_CELLS):
        chunk = cells.select(np.arange(start, min(start + CHUNK_CELLS, len(cells))))
        experts = targets_of(data, chunk)
        clock = time.perf_counter()
        probabilities = predictor.predict(chunk)
        seconds += time.perf_counter() - clock
        if predictor.name == "uniform":
            parts.append(expected_scores(experts, data.num_experts, rng))
        else:
            parts.append(score(probabilities, experts))
    joined = (np.concatenate([getattr(part, field) for part in parts]) for field in ("hits", "confidence", "ranked"))
    return Scores(*joined), 1e6 * seconds / len(cells)


def total(data: Data, cells: Cells, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Sums of scores by source layer: hits [L, P, 5] (the four METRICS, and the number of cells), and for the
    calibration error bins [L, G, ECE_BINS, 3] (cells, confidence, right) over G domains.
    """
    num_layers, num_problems, num_domains = len(data.layers), len(data.problem_names), len(data.domain_names)
    problem = data.problem[cells.journey]
    hits = _sums(cells.layer * num_problems + problem, (*scores.hits.T, None), num_layers * num_problems)
    interval = np.clip(np.ceil(scores.confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    place = (cells.layer * num_domains + data.domain_of_problem[problem]) * ECE_BINS + interval
    bins = _sums(place, (None, scores.confidence, scores.hits[:, 0]), num_layers * num_domains * ECE_BINS)
    return hits.reshape(num_layers, num_problems, -1), bins.reshape(num_layers, num_domains, ECE_BINS, -1)


def _sums(places: np.ndarray, columns: Sequence, size: int) -> np.ndarray:
    """Sum of each column (None counts) at each of `size` places, [size, columns]."""
    return np.stack([np.bincount(places, weights=column, minlength=size) for column in columns], axis=1)


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017): the mean distance of confidence and accuracy in
    equally wide intervals of confidence, weighted by cells. bins [..., ECE_BINS, 3], summed over what comes first.
    """
    cells, confidence, right = bins.reshape(-1, *bins.shape[-2:]).sum(axis=0).T
    return float(np.abs(right - confidence).sum() / cells.sum())


def score_rows(
    data: Data, hits: np.ndarray, bins: np.ndarray, hop: int, resamples: int, seed: int, level: float
) -> list[dict]:
    """Rows of results from the sums of `total`: every domain x every target layer that has cells, "all" first of both.

    Columns domain, layer (the target's number in the model), rows (cells, summed over seeds), METRICS as shares,
    top1_low and top1_high (bootstrap over problems; NaN for fewer than two), ece.
    """
    rows = []
    for domain, name in enumerate(("all", *data.domain_names), start=-1):
        members = data.domain_of_problem == domain if domain >= 0 else np.ones(len(data.problem_names), dtype=bool)
        for layer in range(-1, len(data.layers) - hop):
            where = slice(None) if layer < 0 else slice(layer, layer + 1)
            own = hits[where][:, members].sum(axis=0)
            own = own[own[:, -1] > 0]
            if not len(own):
                continue
            shares = own[:, :-1].sum(axis=0) / own[:, -1].sum()
            low = high = float("nan")
            if len(own) > 1:
                interval = stats.cluster_bootstrap(own[:, 0], own[:, -1], resamples, seed, level)
                low, high = interval.low, interval.high
            rows.append(
                {
                    "domain": name,
                    "layer": "all" if layer < 0 else data.layers[layer + hop],
                    "rows": int(own[:, -1].sum()),
                    **dict(zip(METRICS, shares.tolist(), strict=True)),
                    "top1_low": low,
                    "top1_high": high,
                    "ece": calibration_error(bins[where] if domain < 0 else bins[where, domain]),
                }
            )
    return rows


# -- everything about one predictor
def study(
    name: str, data: Data, parts: np.ndarray, hop: int, settings: Settings, seeds: Sequence[int], with_rows: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Fit and score the predictor `name` for each seed, under the split by problem and, if `with_rows`, by row.

    parts [P] from `problem_parts`: the same for all seeds, which change what is drawn in training and which cells the
    row split draws. Returns by split, "problems" and "rows": hits, bins: those of `total`, summed over seeds; costs
    [3]: mean seconds of training, microseconds for a prediction, and parameters; predicted [T, L, K] int16 (problems):
    the experts predicted with the first seed for the T test journeys in order, best first, -1 is none; paired [P, 3]
    (rows): right under the row split, right under the problem split, and cells, all on the cells that are tested in
    both.
    """
    runs: dict[str, list] = {}
    paired = np.zeros((len(parts), 3))
    predicted = None
    for seed in seeds:
        splits = {"problems": split_by_problem(data, parts, hop)}
        if with_rows:
            splits["rows"] = split_by_row(data, hop, seed)
        right = {}
        for kind, split in splits.items():
            clock = time.perf_counter()
            predictor = fit(name, data, split.train, split.validation, settings, seed)
            seconds = time.perf_counter() - clock
            scores, predict_us = evaluate(predictor, data, split.test, seed)
            costs = np.array([seconds, predict_us, predictor.parameters])
            runs.setdefault(kind, []).append((*total(data, split.test, scores), costs))
            right[kind] = np.full(data.experts.shape[:2], np.nan)
            right[kind][split.test.journey, split.test.layer] = scores.hits[:, 0]
            if predicted is None:
                predicted = _as_trace(data, parts, split.test, scores.ranked)
        if with_rows:
            both = np.isfinite(right["rows"]) & np.isfinite(right["problems"])
            problem = data.problem[np.nonzero(both)[0]]
            paired += _sums(problem, (right["rows"][both], right["problems"][both], None), len(parts))
    more = {"problems": {"predicted": predicted}, "rows": {"paired": paired}}
    found = {}
    for kind, done in runs.items():
        hits, bins, costs = zip(*done, strict=True)
        found[kind] = {"hits": sum(hits), "bins": sum(bins), "costs": np.mean(costs, axis=0), **more[kind]}
    return found


def scored_journeys(data: Data, parts: np.ndarray) -> np.ndarray:
    """Rows of the journeys that the problem split scores: a problem of each domain in turn, tokens as decoded."""
    rows = np.flatnonzero((parts[data.problem] == PARTS.index("test")) & data.scored)
    turn = np.zeros(len(parts), dtype=np.int64)
    for domain in range(len(data.domain_names)):
        problems = np.unique(data.problem[rows][data.domain_of_problem[data.problem[rows]] == domain])
        turn[problems] = np.arange(len(problems))
    problem = data.problem[rows]
    return rows[np.lexsort((data.position[rows], problem, turn[problem]))]


def _as_trace(data: Data, parts: np.ndarray, cells: Cells, ranked: np.ndarray) -> np.ndarray:
    """ranked [M, K] of cells as [T, L, K] int16 of `scored_journeys`, by target layer."""
    rows = scored_journeys(data, parts)
    place = np.full(len(data.problem), -1)
    place[rows] = np.arange(len(rows))
    trace = np.full((len(rows), *data.experts.shape[1:]), -1, dtype=np.int16)
    trace[place[cells.journey], cells.layer + cells.hop] = ranked
    return trace


def leakage(paired: np.ndarray, resamples: int, seed: int, level: float) -> dict:
    """Top-1 accuracy under both splits on the same cells, and their difference with its interval, from paired [P, 3].

    Problems are resampled; NaN for no cells, and for the interval of fewer than two problems.
    """
    used = paired[paired[:, 2] > 0]
    rows, problems, cells = used.sum(axis=0)
    low = high = float("nan")
    if len(used) > 1:
        interval = stats.paired_difference(used[:, 0], used[:, 1], used[:, 2], resamples, seed, level)
        low, high = interval.low, interval.high
    cells_or_none = cells if cells else float("nan")
    return {
        "rows": int(cells),
        "top1_rows_split": rows / cells_or_none,
        "top1_problem_split": problems / cells_or_none,
        "leakage": (rows - problems) / cells_or_none,
        "ci_low": low,
        "ci_high": high,
    }


def stale_gate_check(data: Data) -> dict:
    """The stale gate at hop 0, where it is the layer's own router.

    rows: cells; top1 and all_experts: the shares of them with the right strongest expert, and with all experts right.
    Both are 1 unless the router inputs are not the ones that the journeys came from.
    """
    cells = cells_of(data, 0, data.hidden_row >= 0)
    scores, _ = evaluate(stale_gate(data), data, cells)
    experts = targets_of(data, cells)
    found = np.round(scores.hits[:, METRICS.index("slot_overlap")] * experts.shape[1])
    return {
        "rows": len(cells),
        "top1": float(scores.hits[:, 0].mean()),
        "all_experts": float((found == (experts >= 0).sum(axis=1)).mean()),
    }

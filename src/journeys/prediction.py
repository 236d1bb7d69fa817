"""The study of predictors: what they see, what earlier runs measured of them, and the tables that are made of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src.base.reuse import Pieces
from src.journeys import cells, expert_cache, measures, scoring
from src.journeys.networks import Settings
from src.journeys.predictors import HIDDEN_PREDICTORS, PREDICTORS

SCORES = ["top1", "top1_low", "top1_high", "top2", "slot_overlap", "whole_set", "ece"]
COSTS = ["train_seconds", "predict_us", "parameters"]
LEAKAGE = ["top1_rows_split", "top1_problem_split", "leakage", "ci_low", "ci_high"]
# Which of `Settings` a predictor depends on: changing others does not run it again.
TRAINING = ("train_rows", "epochs", "patience", "validation_rows")
PROBING = ("probe_epochs", "patience", "validation_rows")
DEPENDS_ON = {
    "lookup": ("validation_rows",),
    "xgboost": ("xgboost_rows", "xgboost_rounds", "patience", "validation_rows"),
    "mlp": (*TRAINING, "mlp"),
    "mlp_tuned": (*TRAINING, "mlp_tuned"),
    "linear_probe": (*PROBING, "linear_probe"),
    "mlp_probe": (*PROBING, "mlp_probe"),
}


# What `scoring.study` gives, by predictor and hop.
Found = dict[tuple[str, int], dict[str, dict[str, np.ndarray]]]


@dataclass(frozen=True, eq=False)
class Task:
    """What predictors are fitted to and scored on; parts [P] of the problems, and what earlier runs measured.

    seeds: of the runs of each predictor, which are averaged.
    """

    data: cells.Data
    parts: np.ndarray
    settings: Settings
    seeds: Sequence[int]
    pieces: Pieces

    def depends(self, name: str, hop: int) -> dict:
        """What the measurements of a predictor depend on, besides the journeys and how problems are split."""
        everything = asdict(self.settings)
        settings = {field: everything[field] for field in DEPENDS_ON.get(name, ())}
        return {"predictor": name, "hop": hop, "training_seeds": list(self.seeds), **settings}


def data_sha256(data: cells.Data) -> str:
    """A hash over journeys and router inputs as predictors see them (of the latter: shapes, routers, first rows)."""
    digest = hashlib.sha256()
    kinds = {"problem": "<i4", "position": "<i4", "experts": "<i2", "gates": "<f4", "hidden_row": "<i4"}
    for name, kind in kinds.items():
        digest.update(np.ascontiguousarray(getattr(data, name), dtype=kind))
    if data.hidden is not None:
        digest.update(np.ascontiguousarray(data.hidden.weight))
        for states in data.hidden.states:
            digest.update(np.ascontiguousarray(states[:1]))
            digest.update(str((states.dtype, states.shape)).encode())
    return digest.hexdigest()


# -- running predictors
def _label(name: str, hop: int, split: str) -> str:
    return f"{name} at hop {hop}" + (" split by row" if split == "rows" else "")


def result_of(task: Task, name: str, hop: int, with_rows: bool) -> dict[str, dict[str, np.ndarray]]:
    """`scoring.study` of one predictor at one hop, from the pieces where they are there."""
    depends, studies = task.depends(name, hop), []

    def compute(split: str) -> dict[str, np.ndarray]:
        if not studies:  # the leaky split's piece comes first: its accuracy is paired with that of the honest split
            leaky = split == "rows"
            studies.append(scoring.study(name, task.data, task.parts, hop, task.settings, task.seeds, leaky))
        return studies[0][split]

    return {
        split: task.pieces.arrays(_label(name, hop, split), {**depends, "split": split}, lambda s=split: compute(s))
        for split in (("rows", "problems") if with_rows else ("problems",))
    }


def run_all(task: Task, names: Sequence[str], hops: Sequence[int], leaky: Sequence[str]) -> Found:
    """Results of `names` at `hops`, and with them all others that earlier runs left.

    `leaky` are the predictors that are fitted on the leaky split as well.
    """
    # Asked about what this run does not need, so that the report of `task.pieces` says nothing of it.
    there = Pieces(task.pieces.folder, task.pieces.common, task.pieces.restart)
    wanted = {(name, hop): name in leaky for name in names for hop in hops}
    units = {}
    for name in PREDICTORS:
        if name in HIDDEN_PREDICTORS and task.data.hidden is None:
            continue
        for hop in range(1, len(task.data.layers)):
            splits = [
                split for split in ("problems", "rows")
                if there.find(_label(name, hop, split), {**task.depends(name, hop), "split": split}) is not None
            ]  # fmt: skip
            if (name, hop) in wanted or "problems" in splits:
                units[name, hop] = wanted.get((name, hop), False) or "rows" in splits
    found = {}
    with tqdm(units.items(), unit="run", delay=3) as bar:
        for (name, hop), with_rows in bar:
            bar.set_description(f"{name}, hop {hop}")
            found[name, hop] = result_of(task, name, hop, with_rows)
    return found


# -- results
def result_tables(task: Task, found: Found, resamples: int, seed: int, level: float) -> dict:
    """predictors.csv, predictors_per_layer.csv and leakage.csv; `seed` and `resamples` are those of the intervals."""
    rows, leaks = [], []
    hops = sorted({hop for _, hop in found})
    for name, split, hop in product(PREDICTORS, ("problems", "rows"), hops):
        arrays = found.get((name, hop), {}).get(split)
        if arrays is not None:
            seconds, microseconds, parameters = arrays["costs"].tolist()
            costs = dict(zip(COSTS, (seconds, microseconds, round(parameters)), strict=True))
            key = {"predictor": name, "split": split, "hop": hop}
            scores = scoring.score_rows(task.data, arrays["hits"], arrays["bins"], hop, resamples, seed, level)
            rows += [{**key, **row, **costs} for row in scores]
            if split == "rows":
                leak = scoring.leakage(arrays["paired"], resamples, seed, level)
                leaks.append({"predictor": name, "hop": hop, "seeds": len(task.seeds), **leak})
    whole = [row for row in rows if row["layer"] == "all"]
    layers = [row for row in rows if row["layer"] != "all"]
    key = ["predictor", "split", "hop", "domain"]
    return {
        "predictors.csv": pd.DataFrame(whole, columns=[*key, *SCORES, *COSTS], dtype=object),
        "predictors_per_layer.csv": pd.DataFrame(layers, columns=[*key, "layer", "rows", *SCORES], dtype=object),
        "leakage.csv": pd.DataFrame(leaks, columns=["predictor", "hop", "seeds", "rows", *LEAKAGE], dtype=object),
    }


def splits_summary(data: cells.Data, parts: np.ndarray, seed: int) -> dict:
    """What splits.json says: which problems are in which part, and what is scored."""
    problems = {part: [] for part in cells.PARTS}
    for name, part in zip(data.problem_names, parts.tolist(), strict=True):
        problems[cells.PARTS[part]].append(name)
    journeys = np.bincount(parts[data.problem], minlength=3).tolist()
    scored = scoring.scored_journeys(data, parts)
    hidden = np.bincount(parts[data.problem[data.hidden_row >= 0]], minlength=3).tolist()
    unit = f"one of {cells.BLOCKS} runs of consecutive tokens of a problem" if data.in_blocks else "problem"
    return {
        "unit": unit,
        "seed": seed,
        "problems": {part: len(names) for part, names in problems.items()},
        "journeys": dict(zip(cells.PARTS, journeys, strict=True)),
        "journeys_with_router_inputs": dict(zip(cells.PARTS, hidden, strict=True)),
        "scored": {
            "journeys": len(scored),
            "problems": len(np.unique(data.problem[scored])),
            "which": "journeys of test problems" + (" that have router inputs" if data.hidden is not None else "")
            + "; every predictor is scored on the same ones",
        },
        "stale_gate_at_hop_0": scoring.stale_gate_check(data) if data.hidden is not None else None,
        "names": problems,
    }  # fmt: skip


def simulate(
    task: Task,
    found: Found,
    hop: int,
    capacities: Sequence[int],
    bandwidths: Sequence[float],
    expert_mb: float,
    compute_ms: float,
    tokens: int,
) -> list[dict]:
    """Rows of cache_curves.csv: the trace of test problems, prefetching with each predictor's experts at `hop`.

    `capacities` are experts of a layer, `bandwidths` GB/s, `expert_mb` 1e6 bytes of an expert, `compute_ms`
    milliseconds of a layer for a token; the first `tokens` tokens are simulated.
    """
    data, parts = task.data, task.parts
    training = data.experts[parts[data.problem] == cells.PARTS.index("train")]
    frequencies = measures.expert_counts(training, data.num_experts).sum(axis=1)
    predictions = {name: by_split["problems"]["predicted"] for (name, at), by_split in found.items() if at == hop}
    trace = data.experts[scoring.scored_journeys(data, parts)]
    return expert_cache.cache_curves(
        trace, data.num_experts, capacities, bandwidths, expert_mb * 1e6, compute_ms, frequencies, predictions, hop,
        max_tokens=tokens,
    )  # fmt: skip

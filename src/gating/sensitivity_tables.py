"""Does a signal tell which cells need attention? Signals of all cells, their rank correlation with the sensitivity, and
the estimates of the sensitivity against interventions: rows of sensitivity_correlations.csv,
sensitivity_validation.csv.

A cell is a token at a layer; all values are document id -> layer -> [N], as in `sensitivity.Cells`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from src.base import stats
from src.base.text_data import TokenDocument
from src.gating.controls import BLOCK_TOKENS, ROUTER_SIGNALS, collect_scores
from src.gating.sensitivity import Cells, agreement

SIGNALS = (*ROUTER_SIGNALS, "discrepancy")
# What a gate can have before the layer's attention runs, without running both paths.
DEPLOYABLE = tuple(name for name in ROUTER_SIGNALS if name.startswith(("previous_", "lookahead_")))


def collect_signals(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    layers: Sequence[int],
    max_seq_len: int,
    stride: int,
    progress: str | None = None,
) -> dict[str, Cells]:
    """SIGNALS of the base model's tokens: name -> document id -> layer -> [N] float32, one forward per window.

    <source>_<measure> as in `controls.collect_scores`; the sparsity is the very score of a routing gate, and the number
    of active experts, E * (1 - sparsity), would only turn its sign. discrepancy: Euclidean norm of attention(x) -
    mamba(x) (`recall_error` there). The attached sidecars must be bypassed.
    """
    names = [*ROUTER_SIGNALS, "recall_error"]
    scores = collect_scores(model, token_documents, layers, names, max_seq_len, stride, progress)
    return dict(zip(SIGNALS, scores.values(), strict=True))


def correlation_table(
    sensitivity: Cells,
    signals: Mapping[str, Cells],
    token_documents: Sequence[TokenDocument],
    frequency: Cells,
    surprisal: Cells,
    resamples: int = 1_000,
    permutations: int = 5_000,
    seed: int = 0,
    level: float = 0.95,
    progress: str | None = None,
) -> list[dict]:
    """Rank correlation of every signal with the sensitivity, for all layers and for each.

    Layer `all` pools ranks taken within each layer, so that the layers' levels do not count. partial_rho is partialled
    for position, token frequency (`controls.frequency_scores`) and the previous token's surprisal, and its ranks are
    taken within each document: documents whose tokens are sparser and more sensitive throughout do not count, as they
    do not for gates compared at equal counts per document. Intervals are over documents. p_value: of partial_rho, by
    block permutation; p_holm: over all rows, so the smallest possible one is (number of rows) / (1 + permutations).
    """
    layers = sorted(next(iter(sensitivity.values())))
    pairs = [(layer, name) for layer in ("all", *layers) for name in signals]
    rows = []
    for layer, name in tqdm(pairs, desc=progress, disable=progress is None, leave=False):
        chosen = layers if layer == "all" else [layer]
        lengths = [len(document.ids) - 1 for document in token_documents]
        clusters = np.tile(np.repeat(np.arange(len(lengths)), lengths), len(chosen))
        positions = np.tile(np.concatenate([np.arange(length) for length in lengths]), len(chosen))
        layer_of = np.repeat(chosen, sum(lengths))
        document_of = layer_of * len(lengths) + clusters  # of a layer
        x, y, *others = (
            _values(cells, token_documents, chosen, title)
            for cells, title in (
                (signals[name], name),
                (sensitivity, "sensitivity"),
                (frequency, "frequency"),
                (surprisal, "surprisal"),
            )
        )
        covariates = np.stack([positions, *others])
        plain, partial = (
            stats.partial_rank_correlation(x, y, given, clusters, resamples, seed, level, strata)
            for given, strata in ((covariates[:0], layer_of), (covariates, document_of))
        )
        p_value = stats.block_permutation_p(
            x, y, covariates, clusters, positions, BLOCK_TOKENS, permutations, seed, document_of
        )
        rows.append(
            {
                "layer": layer,
                "signal": name,
                "deployable": name in DEPLOYABLE,
                "cells": len(x),
                **plain.columns("rho"),
                **partial.columns("partial_rho", "partial_"),
                "p_value": p_value,
            }
        )
    adjusted = stats.holm_correction([row["p_value"] for row in rows])
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def validation_table(
    estimates: Mapping[str, Cells],
    interventions: Mapping[str, Mapping[tuple[int, int], float]],
    mask_kl: Mapping[str, float],
    random_kl: float,
    resamples: int = 1_000,
    seed: int = 0,
) -> list[dict]:
    """Rank correlation of every estimate with the measured KL, for all layers and for each, and what its masks cost.

    interventions: document id -> {(layer, position): KL}. Layer `all` pools ranks taken within each layer: what a mask
    with fixed counts per layer depends on. mask_kl, random_kl: KL(base model || hybrid), nats per token, where the
    cells that matter least by an estimate go to Mamba, and where as many random ones do; they stand in the rows of
    layer `all`. `chosen` marks the rows of `choose_estimator`. Raises ValueError for a cell without an estimate.
    """
    if not any(interventions.values()):
        raise ValueError("there are no interventions to validate estimates with")
    measured = [(document, *cell, kl) for document, cells in interventions.items() for cell, kl in cells.items()]
    documents, layers, positions, kl = (np.array(column) for column in zip(*measured, strict=True))
    rows = []
    for name, cells in estimates.items():
        try:
            values = np.array([cells[document][layer][position] for document, layer, position, _ in measured])
        except (KeyError, IndexError) as error:
            raise ValueError(f"{name} has no estimate for a cell that was measured: {error}") from error
        found = agreement(
            _within_layers(values, layers), _within_layers(kl, layers), layers, documents, resamples, seed
        )
        for layer, interval in found.items():
            inside = np.ones(len(layers), dtype=bool) if layer == "all" else layers == layer
            rows.append(
                {
                    "estimator": name,
                    "layer": layer,
                    "cells": int(inside.sum()),
                    "documents": len(np.unique(documents[inside])),
                    **interval.columns("rho"),
                    "mask_kl": mask_kl[name] if layer == "all" else float("nan"),
                    "random_kl": random_kl if layer == "all" else float("nan"),
                }
            )
    chosen = choose_estimator(rows)
    return [row | {"chosen": row["estimator"] == chosen} for row in rows]


def choose_estimator(rows: Sequence[Mapping]) -> str:
    """The estimator whose masks cost least (mask_kl of layer `all`); the first of equals.

    Not the one with the highest rho: that is about cells switched one at a time, and a mask switches many, which
    cost more together where they stand in for each other (a token's cells in several layers, say).
    rows: of `validation_table`, from calibration text. Raises ValueError where none is of layer `all`.
    """
    pooled = [row for row in rows if row["layer"] == "all"]
    if not pooled:
        raise ValueError("no row of layer 'all' to choose an estimator by")
    return min(pooled, key=lambda row: row["mask_kl"])["estimator"]


def _values(cells: Cells, token_documents: Sequence[TokenDocument], layers: Sequence[int], name: str) -> np.ndarray:
    """All cells, layer by layer and document by document within it: [layers * sum of N] float64."""
    parts = []
    for layer in layers:
        for document in token_documents:
            values = cells.get(document.id, {}).get(layer)
            if values is None or len(values) != len(document.ids) - 1:
                raise ValueError(
                    f"{name} has not one value for each of the {len(document.ids) - 1} tokens of document "
                    f"{document.id!r} in layer {layer}"
                )
            parts.append(values)
    return np.concatenate(parts).astype(np.float64)


def _within_layers(values: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Mean ranks [C] within each layer, from 0 to 1."""
    ranks = np.empty(len(values))
    for layer in np.unique(layers):
        inside = layers == layer
        ranks[inside] = (rankdata(values[inside]) - 0.5) / inside.sum()
    return ranks

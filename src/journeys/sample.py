"""Journeys as plain arrays, in which names are numbers: what the analyses and the predictors read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.journeys import measures


@dataclass(frozen=True)
class Sample:
    """Journeys as `analyze` takes them: N journeys, L layers, K experts each, P problems, D domains, W distinct tokens.

    Attributes:
        experts: integers [N, L, K] below num_experts, strongest first; -1 pads where fewer than K are active.
        gating_probs: [N, L, K], float16 values of the probabilities; 0 on padding, NaN where there are none.
        num_experts: E. layers: L layer ids of the model, ascending.
        domains [N]: index into domain_names (D). problem_ids [N]: as collected, may repeat from domain to domain.
        clusters [N]: problem 0 .. P-1, unique over domains.
        token_idx [N]: position in the problem. tokens [N]: index into token_ids [W] and token_names, -1 if unknown.
    """

    experts: np.ndarray
    gating_probs: np.ndarray
    num_experts: int
    layers: tuple[int, ...]
    domains: np.ndarray
    domain_names: tuple[str, ...]
    problem_ids: np.ndarray
    clusters: np.ndarray
    token_idx: np.ndarray
    tokens: np.ndarray
    token_ids: np.ndarray
    token_names: tuple[str, ...]


# -- preparing
def to_sample(journeys, domain_order: Sequence[str] = ()) -> Sample:
    """A `journeys.Journeys` as a `Sample`: names become numbers.

    Domains are its data sets: those in `domain_order` first, in that order, the others by name. Tokens are numbered by
    token_id, or by their text where no id is known. Raises ValueError where there is no journey, a shape is wrong or an
    expert is outside -1 .. num_experts - 1.
    """
    experts, num_experts = journeys.experts, int(journeys.num_experts)
    if experts.ndim != 3 or journeys.gating_probs.shape != experts.shape:
        raise ValueError(
            f"experts has shape {experts.shape}, gating_probs {journeys.gating_probs.shape}; both must be [N, L, K]"
        )
    if not experts.size:
        raise ValueError(f"there is nothing to analyse: experts has shape {experts.shape}")
    if len(journeys.layers) != experts.shape[1]:
        raise ValueError(f"{len(journeys.layers)} layer ids for journeys of {experts.shape[1]} layers")
    names, named = _unique_of_runs(np.asarray(journeys.dataset))
    order = sorted(range(len(names)), key=lambda i: (_place(domain_order, str(names[i])), str(names[i])))
    domains = np.argsort(order)[named]
    problem_ids, token_idx = np.asarray(journeys.problem_id), np.asarray(journeys.token_idx)
    for name, values in (("problem_id", problem_ids), ("token_idx", token_idx)):
        if values.min() < 0:
            raise ValueError(f"{name} is {values.min()} in row {int(values.argmin())}; it must be 0 or more")
    _, clusters = _unique_of_runs((domains.astype(np.int64) << 32) + problem_ids)
    tokens, token_ids, token_names = _number_tokens(np.asarray(journeys.token_id), np.asarray(journeys.token))
    return Sample(
        experts,
        journeys.gating_probs,
        num_experts,
        tuple(int(layer) for layer in journeys.layers),
        domains,
        tuple(str(names[i]) for i in order),
        problem_ids,
        clusters,
        token_idx,
        tokens,
        token_ids,
        token_names,
    )


def _place(order: Sequence[str], name: str) -> int:
    return list(order).index(name) if name in order else len(order)


def _unique_of_runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values in order, index of each value [N] among them): `np.unique`, but sorting only where runs begin.

    Rows of one problem mostly stand together; sorting 10 M texts would take longer than all analyses.
    """
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    distinct, index = np.unique(values[starts], return_inverse=True)
    return distinct, np.repeat(index, np.diff(np.append(starts, len(values))))


def _number_tokens(ids: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(number of each token [N], -1 if unknown; token ids [W]; texts of the W tokens)."""
    if (ids >= 0).any():
        present = np.flatnonzero(np.bincount(ids[ids >= 0]))
        number = np.full(int(present[-1]) + 2, -1)  # the last entry serves id -1
        number[present] = np.arange(len(present))
        tokens = number[ids]
        known = np.flatnonzero(tokens >= 0)
        return (
            tokens,
            present,
            tuple(str(text) for text in texts[known][measures.first_rows(tokens[known], len(present))]),
        )
    distinct, tokens = np.unique(texts, return_inverse=True)
    unknown = int(len(distinct) > 0 and distinct[0] == "")  # "" sorts first
    names = tuple(str(text) for text in distinct[unknown:])
    return tokens - unknown, np.full(len(names), -1), names

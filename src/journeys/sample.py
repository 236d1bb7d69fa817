"""Journeys as plain arrays, in which names are numbers: what the analyses and the predictors read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.journeys.store import Journeys


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
def to_sample(journeys: Journeys, domain_order: Sequence[str] = ()) -> Sample:
    """A `store.Journeys` as a `Sample`: names become numbers.

    Domains are its data sets: those in `domain_order` first, in that order, the others by name. Tokens are numbered by
    token_id, or by their text where no id is known.
    """
    named, names = pd.factorize(journeys.dataset)
    domain_names = sorted(map(str, names), key=lambda name: place(domain_order, name))
    domains = np.array([domain_names.index(name) for name in names])[named]
    clusters, _ = pd.factorize((domains << 32) + journeys.problem_id, sort=True)
    tokens, token_ids, token_names = _number_tokens(journeys.token_id, journeys.token)
    return Sample(
        journeys.experts, journeys.gating_probs, journeys.num_experts, journeys.layers, domains, tuple(domain_names),
        journeys.problem_id, clusters, journeys.token_idx, tokens, token_ids, token_names,
    )  # fmt: skip


def place(order: Sequence[str], name: str) -> tuple[int, str]:
    """What to sort names by: those in `order` come first, in that order, then the others by name."""
    return (list(order).index(name) if name in order else len(order)), name


def _number_tokens(ids: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(number of each token [N], -1 if unknown; token ids [W]; texts of the W tokens)."""
    by_id = bool((ids >= 0).any())
    tokens, distinct = pd.factorize(ids if by_id else texts, sort=True)
    unknown = int(distinct[0] == (-1 if by_id else ""))  # either sorts first
    tokens, distinct = tokens - unknown, distinct[unknown:]
    if not by_id:
        return tokens, np.full(len(distinct), -1), tuple(map(str, distinct))
    names = np.empty(len(distinct) + 1, dtype=object)
    names[tokens] = texts  # those of unknown tokens go to the last place
    return tokens, distinct, tuple(map(str, names[:-1]))

"""Which experts will a token need h layers from now? Eleven predictors, each fitted to the cells of `cells.py`.

A predictor gives each of E experts a probability of being the strongest of the target layer; its predicted set are the
K most probable, of equals those with the smaller ids. docs/journeys.md says in words what each of them does; those that
are networks, or the model's own routers, are in `networks.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xgboost
from scipy.sparse import csr_matrix

from src.journeys.cells import Cells, Data, Predictor, drawn, history, targets_of
from src.journeys.networks import Settings, fit_history_network, fit_probe, stale_gate

HISTORY_PREDICTORS = ("uniform", "majority", "previous_token", "transition", "lookup", "xgboost", "mlp", "mlp_tuned")
HIDDEN_PREDICTORS = ("stale_gate", "linear_probe", "mlp_probe")
PREDICTORS = HISTORY_PREDICTORS + HIDDEN_PREDICTORS
LOOKUP_ORDERS = 5  # layers that the longest history of `lookup` has
TREE_HISTORY = 5  # layers that XGBoost sees
# Strength m of the shorter history in `lookup`, in observations; infinity leaves a length of history out.
SMOOTHING = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, np.inf)


def fit(name: str, data: Data, train: Cells, validation: Cells, settings: Settings, seed: int = 0) -> Predictor:
    """Fit the predictor `name` (of PREDICTORS) to training cells, with its choices made on validation cells.

    Predictors from hidden states leave out the cells without. The same seed gives the same predictor; torch's random
    state is left as it was. Raises ValueError for an unknown name, and where hidden states are needed but absent.
    """
    if name in HIDDEN_PREDICTORS:
        if data.hidden is None:
            raise ValueError(f"{name} needs router inputs, and there are none")
        train, validation = (cells.select(data.hidden_row[cells.journey] >= 0) for cells in (train, validation))
    validation = drawn(validation, settings.validation_rows, np.random.default_rng(seed))
    match name:
        case "uniform":
            return Predictor(name, lambda cells: np.full((len(cells), data.num_experts), 1 / data.num_experts), 0)
        case "majority":
            return _fit_counts(name, data, train, [])
        case "transition":
            return _fit_counts(name, data, train, [1.0])
        case "lookup":
            return _fit_lookup(data, train, validation)
        case "previous_token":
            return _fit_previous_token(data, train)
        case "xgboost":
            return _fit_xgboost(data, train, validation, settings, seed)
        case "mlp" | "mlp_tuned":
            return fit_history_network(name, data, train, validation, settings, getattr(settings, name), seed)[0]
        case "stale_gate":
            return stale_gate(data)
        case "linear_probe" | "mlp_probe":
            return fit_probe(name, data, train, validation, settings, getattr(settings, name), seed)
    raise ValueError(f"there is no predictor {name!r}; there are {', '.join(PREDICTORS)}")


# -- from counts
@dataclass(frozen=True, eq=False)
class _Table:
    """How often each expert followed each key: keys [U] sorted, counts sparse [U, E]."""

    keys: np.ndarray
    counts: csr_matrix

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Counts [M, E] after `keys` [M]; 0 for keys that were never met."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.counts[place].toarray() * (self.keys[place] == keys)[:, None]


def _keys(data: Data, cells: Cells, order: int) -> np.ndarray:
    """One number [M] for the layer and the strongest experts of the last `order` layers."""
    keys = cells.layer.astype(np.int64)
    for back in range(order - 1, -1, -1):
        layer = cells.layer - back
        expert = np.where(layer < 0, -1, data.experts[cells.journey, np.maximum(layer, 0), 0])
        keys = keys * (data.num_experts + 1) + np.where(expert < 0, data.num_experts, expert)
    return keys


def _count(data: Data, cells: Cells, order: int) -> _Table:
    keys, place = np.unique(_keys(data, cells, order), return_inverse=True)
    target = targets_of(data, cells)[:, 0]
    return _Table(keys, csr_matrix((np.ones(len(cells)), (place, target)), shape=(len(keys), data.num_experts)))


def _interpolate(counts: np.ndarray, shorter: np.ndarray, strength: float) -> np.ndarray:
    """(c(h, e) + m p(e | shorter h)) / (c(h) + m), [M, E]: counts c, and the estimate from a history shorter by one
    layer as m further observations (MacKay and Peto 1995, A hierarchical Dirichlet language model).
    """
    if np.isinf(strength):
        return shorter
    return (counts + strength * shorter) / (counts.sum(axis=1, keepdims=True) + strength)


def _fit_counts(name: str, data: Data, train: Cells, strengths: Sequence[float]) -> Predictor:
    """Counts after histories of 0 .. len(strengths) layers; the shortest is smoothed with E observations, one each."""
    used = [order for order, strength in enumerate([0.0, *strengths]) if not np.isinf(strength)]
    tables = {order: _count(data, train, order) for order in used}

    def predict(cells: Cells) -> np.ndarray:
        uniform = np.full((len(cells), data.num_experts), 1 / data.num_experts)
        found = _interpolate(tables[0].lookup(_keys(data, cells, 0)), uniform, data.num_experts)
        for order in used[1:]:
            found = _interpolate(tables[order].lookup(_keys(data, cells, order)), found, strengths[order - 1])
        return found

    return Predictor(name, predict, sum(table.counts.nnz + len(table.keys) for table in tables.values()))


def _fit_lookup(data: Data, train: Cells, validation: Cells) -> Predictor:
    """Chooses the strengths from the shortest history on, each for the best log-likelihood of validation targets."""
    found = _fit_counts("", data, train, []).predict(validation)
    target = targets_of(data, validation)[:, :1]
    strengths: list[float] = []
    for order in range(1, LOOKUP_ORDERS + 1):
        counts = _count(data, train, order).lookup(_keys(data, validation, order))
        tried = [_interpolate(counts, found, strength) for strength in SMOOTHING]
        losses = [-np.log(np.take_along_axis(one, target, 1)).sum() for one in tried]
        best = int(np.argmin(losses))
        found = tried[best]
        strengths.append(SMOOTHING[best])
    return _fit_counts("lookup", data, train, strengths)


def _fit_previous_token(data: Data, train: Cells) -> Predictor:
    """Each slot of the previous token's experts gets the share of training cells in which it was right, by layer."""
    majority = _fit_counts("", data, train, [])

    def earlier(cells: Cells) -> np.ndarray:
        before = data.previous[cells.journey]
        return np.where(before[:, None] >= 0, data.experts[before, cells.layer + cells.hop], -1).astype(np.int64)

    slots, target = earlier(train), targets_of(data, train)[:, :1]
    num_layers = len(data.layers)
    known = np.bincount(train.layer, weights=slots[:, 0] >= 0, minlength=num_layers)
    shares = np.stack([np.bincount(train.layer, weights=right, minlength=num_layers) for right in (slots == target).T])
    shares = (shares / np.maximum(known, 1)).T  # [L, K]

    def predict(cells: Cells) -> np.ndarray:
        slots, share = earlier(cells), shares[cells.layer]
        share = np.where(slots >= 0, share, 0.0)
        found = (1 - share.sum(axis=1, keepdims=True)) * majority.predict(cells)
        rows = np.arange(len(cells))
        for slot, weight in zip(slots.T, share.T, strict=True):
            found[rows, np.maximum(slot, 0)] += weight
        return found

    return Predictor("previous_token", predict, majority.parameters + shares.size)


# -- boosted trees
def _fit_xgboost(data: Data, train: Cells, validation: Cells, settings: Settings, seed: int) -> Predictor:
    """One model for all layers; stops on validation cells. Stores two numbers for a split, one for a leaf."""
    slots = data.experts.shape[2]
    kinds = ["q"] + ["c"] * (TREE_HISTORY * slots) + ["q"] * (TREE_HISTORY * slots + 1)

    def matrix(cells: Cells, labelled: bool = False) -> xgboost.DMatrix:
        experts, gates, _ = history(data, cells, TREE_HISTORY)
        columns = (cells.layer, experts.reshape(len(cells), -1), gates.reshape(len(cells), -1),
                   data.position[cells.journey])  # fmt: skip
        labels = targets_of(data, cells)[:, 0] if labelled else None
        return xgboost.DMatrix(
            np.column_stack(columns).astype(np.float32), labels, feature_types=kinds, enable_categorical=True
        )

    rng = np.random.default_rng(seed)
    options = {"objective": "multi:softprob", "num_class": data.num_experts, "tree_method": "hist", "max_depth": 6,
               "eta": 0.3, "seed": seed, "nthread": torch.get_num_threads()}  # fmt: skip
    model = xgboost.train(
        options,
        matrix(drawn(train, settings.xgboost_rows, rng), labelled=True),
        settings.xgboost_rounds,
        evals=[(matrix(validation, labelled=True), "validation")],
        early_stopping_rounds=5 * settings.patience,
        verbose_eval=False,
    )
    model = model[: model.best_iteration + 1]
    nodes = sum(tree.count("\n") for tree in model.get_dump())
    leaves = sum(tree.count("leaf=") for tree in model.get_dump())
    return Predictor("xgboost", lambda cells: model.predict(matrix(cells)), 2 * (nodes - leaves) + leaves)

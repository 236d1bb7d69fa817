"""What a small gate could know: probes that predict a cell's sensitivity from what the model has computed before it.

A probe's score looks at no later token, as a deployable gate's. Its masks are offline controls all the same
(`control_probe_<source>_<kind>_<share>`): their counts are those of the gate they are matched to. Beside each other,
the "router" and the "hidden" rows of `gap_rows` say how much of what the layer's input tells is already in the router.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, GroupShuffleSplit
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

from src.base import stats
from src.base.text_data import TokenDocument
from src.gating.sensitivity import Cells
from src.hybrid.layer import bypass_sidecars, is_attached
from src.models.families import decoder_layers
from src.models.windows import evaluation_mode, read_windows
from src.routing_extractor import RoutingExtractor

SOURCES = ("router", "hidden")
KINDS = ("linear", "mlp")
PROBES = tuple(f"{source}_{kind}" for source in SOURCES for kind in KINDS)

RIDGE_ALPHAS = tuple(10.0**power for power in range(-1, 6))  # of inputs with variance 1; the loss is a sum over tokens
FOLDS = 5  # of documents, to choose the ridge's alpha
HIDDEN_UNITS = 32
# MLPRegressor's alpha: L2 per batch. Without enough of it a network falls far behind the ridge on few documents.
NETWORK_ALPHAS = (0.1, 1.0, 10.0, 100.0)
HELD_OUT = 0.2  # of the documents, to choose the network's alpha and to stop it
MAX_EPOCHS, PATIENCE = 200, 5

Features = dict[str, dict[int, np.ndarray]]  # document id -> layer -> [N, F]


@dataclass(frozen=True, eq=False)
class Probe:
    """A regression per layer, from features [N, F] to the predicted rank (0 .. 1) of the cells' sensitivity.

    chosen: per layer what held-out documents chose, {"alpha": L2 weight} and, for "mlp", {"epochs": of training}.
    """

    kind: str
    regressors: dict[int, Pipeline]
    chosen: dict[int, dict[str, float]]


# -- features
def collect_features(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    layers: Sequence[int],
    source: str,
    max_seq_len: int,
    stride: int,
    progress: str | None = None,
) -> Features:
    """What a gate of layer l may look at, for every input position: document id -> layer -> [N, F] float32.

    source "router": the router activations of layer l - 1 (F = E), which are computed before layer l's attention runs;
    "hidden": the normed input of layer l's attention (F = D). Both are those of the base model: attached sidecars are
    bypassed. Windows as in `controls.collect_scores`. Memory: 4 layers of 25,000 tokens and D = 256 take 0.1 GB.
    Raises ValueError for layers that have no router before them (source "router").
    """
    parts: dict[str, dict[int, list[np.ndarray]]] = {}
    base = bypass_sidecars(model) if is_attached(model) else nullcontext()
    with torch.no_grad(), evaluation_mode(model), base, _watching(model, layers, source) as seen:
        for reading in read_windows(model, token_documents, max_seq_len, stride, progress):
            model.model(input_ids=reading.input_ids, use_cache=False)
            own = parts.setdefault(reading.document.id, {layer: [] for layer in layers})
            for layer, values in own.items():
                values.append(seen[layer][reading.new :].float().cpu().numpy())
    return {
        document: {layer: np.concatenate(values) for layer, values in own.items()} for document, own in parts.items()
    }


@contextmanager
def _watching(model: nn.Module, layers: Sequence[int], source: str):
    """layer -> [T, F] of the last forward (batch of 1) inside."""
    seen: dict[int, torch.Tensor] = {}

    def after_router(layer, activations):
        if layer + 1 in layers:
            seen[layer + 1] = activations[0]

    def before_attention(layer):
        def hook(_module, args, kwargs):
            seen[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook

    with ExitStack() as stack:
        if source == "router":
            extractor = stack.enter_context(RoutingExtractor(model, on_layer=after_router))
            without = sorted(layer for layer in layers if layer - 1 not in extractor.layers)
            if without:
                raise ValueError(f"source 'router' reads the router of the layer before; layer {without[0]} has none")
        else:
            for layer in layers:
                attention = decoder_layers(model)[layer].self_attn
                stack.callback(attention.register_forward_pre_hook(before_attention(layer), with_kwargs=True).remove)
        yield seen


# -- probes
def fit_probe(features: Features, sensitivity: Cells, kind: str, seed: int = 0, progress: str | None = None) -> Probe:
    """Fit one regression per layer of `features`, from [N, F] to the rank of the cells' sensitivity.

    The target is the rank of sensitivity among all tokens of the layer, ties sharing their mean rank, scaled to 0 .. 1:
    a mask with fixed counts per layer needs the order of the cells and nothing else, and ranks do not let the few
    largest of a heavy-tailed quantity decide the fit.

    "linear": ridge regression, its alpha (RIDGE_ALPHAS) chosen by cross-validation over FOLDS groups of documents, then
    fitted to all. "mlp": HIDDEN_UNITS ReLU units, trained on 80 % of the documents; of all NETWORK_ALPHAS and epochs
    the network with the smallest squared error on the other documents is kept, and training stops PATIENCE epochs after
    each alpha's best. Splits are by document: neighbouring tokens are alike, so a split by token would reward
    remembering documents. Inputs are standardised. seed: of the network's split, weights and batches. Raises ValueError
    for fewer than two documents, and sensitivity or features that are missing or not finite.
    """
    if len(features) < 2:
        raise ValueError(f"a probe is fitted across documents; {len(features)} given, at least 2 are needed")
    regressors, chosen = {}, {}
    for layer in tqdm(_layers(features), desc=progress, disable=progress is None, leave=False):
        inputs = np.concatenate([layers[layer] for layers in features.values()]).astype(np.float32)
        lengths = {document: {layer: len(layers[layer])} for document, layers in features.items()}
        values, documents = _cells_of(sensitivity, lengths, layer)
        targets = ((rankdata(values) - 1) / (len(values) - 1)).astype(np.float32)
        fit = _fit_linear if kind == "linear" else _fit_network
        regressors[layer], chosen[layer] = fit(inputs, targets, documents, seed)
    return Probe(kind, regressors, chosen)


def predict_scores(probe: Probe, features: Features) -> Cells:
    """The predicted rank of every cell's sensitivity, document id -> layer -> [N] float32; the larger, the more it is
    worth to keep its attention: use `controls.scored_masks(shares, scores, largest=False)`.
    """
    scores: Cells = {}
    for document, layers in features.items():
        scores[document] = {
            layer: probe.regressors[layer].predict(inputs.astype(np.float32)).astype(np.float32)
            for layer, inputs in layers.items()
        }
    return scores


def _fit_linear(inputs, targets, documents, seed) -> tuple[Pipeline, dict[str, float]]:
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": RIDGE_ALPHAS},
        scoring="neg_mean_squared_error",
        cv=GroupKFold(min(FOLDS, int(documents.max()) + 1)),
        error_score="raise",
    ).fit(inputs, targets, groups=documents)
    return search.best_estimator_, {"alpha": search.best_params_["ridge__alpha"]}


def _fit_network(inputs, targets, documents, seed) -> tuple[Pipeline, dict[str, float]]:
    split = GroupShuffleSplit(n_splits=1, test_size=HELD_OUT, random_state=seed)
    train, held_out = next(split.split(inputs, targets, documents))
    scaler = StandardScaler().fit(inputs[train])
    train_inputs, held_out_inputs = scaler.transform(inputs[train]), scaler.transform(inputs[held_out])
    least, best, chosen = np.inf, None, {}
    for alpha in NETWORK_ALPHAS:
        # MLPRegressor's own early stopping would split by token. A generator, not a number, as its random_state: a
        # number would give every epoch the same batches.
        network = MLPRegressor(
            hidden_layer_sizes=(HIDDEN_UNITS,), alpha=alpha, random_state=np.random.RandomState(seed)
        )
        errors: list[float] = []
        while len(errors) < MAX_EPOCHS and len(errors) - np.argmin(errors or [0]) <= PATIENCE:
            network.partial_fit(train_inputs, targets[train])
            errors.append(float(np.mean((network.predict(held_out_inputs) - targets[held_out]) ** 2)))
            if errors[-1] < least:
                least, best = errors[-1], deepcopy(network)
                chosen = {"alpha": alpha, "epochs": float(len(errors))}
    return make_pipeline(scaler, best), chosen


# -- how much of the oracle's gap is closed
def gap_closed(
    nll_random, nll_gate, nll_oracle, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> stats.Interval:
    """(NLL(random) - NLL(gate)) / (NLL(random) - NLL(oracle)): 0 as good as random, 1 as good as the oracle.

    Each [N]: sums of NLL per document (nats) at the same share. Percentile interval over documents, which are resampled
    with all three sums together. Resamples in which the oracle does not beat random have no meaningful ratio; they
    count as below every value for the lower limit and above every value for the upper one. NaN for all three where the
    oracle does not beat random; NaN limits where so many resamples have no gap that a limit would be infinite.
    Raises ValueError for values that are not finite, and fewer than two documents.
    """
    random, gate, oracle = (np.asarray(values, dtype=np.float64) for values in (nll_random, nll_gate, nll_oracle))
    gains = np.stack((random - gate, random - oracle), axis=1)  # [N, 2]
    if len(gains) < 2 or not np.isfinite(gains).all():
        raise ValueError(f"finite sums of at least 2 documents are needed; got {len(gains)} documents")
    gained, gap = gains.sum(axis=0)
    if not gap > 0:
        return stats.Interval(np.nan, np.nan, np.nan)
    sums = np.concatenate([counts @ gains for counts in stats.resampled_counts(len(gains), resamples, seed)])  # [R, 2]
    limits = []
    for tail, without in (((1 - level) / 2, -np.inf), ((1 + level) / 2, np.inf)):
        ratios = np.full(len(sums), without)
        np.divide(sums[:, 0], sums[:, 1], out=ratios, where=sums[:, 1] > 0)
        limits.append(float(np.quantile(ratios, tail, method="inverted_cdf")))
    if not np.isfinite(limits).all():
        limits = [np.nan, np.nan]
    return stats.Interval(float(gained / gap), *limits)


def within_layer_correlation(
    predicted: Cells, sensitivity: Cells, resamples: int = 1_000, seed: int = 0, level: float = 0.95
) -> stats.Interval:
    """Spearman's rank correlation of predicted and estimated sensitivity within layers, documents resampled.

    Layers are pooled after ranking (the strata of `stats.partial_rank_correlation`), so differences between layers
    count for nothing, and every cell counts once. predicted, sensitivity: document id -> layer -> [N]; the documents
    and layers are those of `predicted`. Raises ValueError for what is missing or of another length.
    """
    lengths = {document: {layer: len(v) for layer, v in layers.items()} for document, layers in predicted.items()}
    parts = []
    for layer in _layers(predicted):
        x, documents = _cells_of(predicted, lengths, layer)
        y, _ = _cells_of(sensitivity, lengths, layer)
        parts.append((x, y, documents, np.full(len(x), layer)))
    x, y, documents, strata = map(np.concatenate, zip(*parts, strict=True))
    return stats.partial_rank_correlation(x, y, np.empty((0, len(x))), documents, resamples, seed, level, strata)


def probe_mode(probe: str, share: float) -> str:
    """The mode of a probe's masks, `control_probe_<source>_<kind>_<share>`; of any other gate, `<gate>_<share>`."""
    return f"control_probe_{probe}_{share:g}" if probe in PROBES else f"{probe}_{share:g}"


def gap_rows(
    tables: Mapping[str, pd.DataFrame],
    sensitivity: Cells,
    predicted: Mapping[str, Cells],
    shares: Sequence[float],
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    rho_resamples: int = 1_000,
) -> list[dict]:
    """Rows of probe_gap.csv, one per probe and share: how much of the gap from random to oracle each gate closes.

    tables: mode -> sums per document (seeds averaged), with `control_random_<share>`, `control_oracle_<share>` and
    `probe_mode(probe, share)` of every probe and share. predicted: name -> scores on the evaluation text that grow with
    the predicted sensitivity: PROBES, `learned` and `routing_hard` (for these two the negated gate score). sensitivity:
    estimated on the evaluation text. Intervals are over documents: what other sets of sidecars would change is not in
    them. Raises ValueError for a mode that is missing and tables of different documents.
    """
    rows = []
    for probe, scores in predicted.items():
        rho = within_layer_correlation(scores, sensitivity, rho_resamples, seed, level)
        for share in shares:
            modes = (f"control_random_{share:g}", probe_mode(probe, share), f"control_oracle_{share:g}")
            missing = [mode for mode in modes if mode not in tables]
            if missing:
                raise ValueError(f"there are no results of {missing[0]}, which the gap at share {share:g} needs")
            documents = tables[modes[0]]["document"].tolist()
            if any(tables[mode]["document"].tolist() != documents for mode in modes):
                raise ValueError(f"the tables of {', '.join(modes)} differ in their documents or the order of them")
            sums = [tables[mode]["nll"].to_numpy() for mode in modes]
            gap = gap_closed(*sums, resamples, seed, level)
            row = {"probe": probe, "share": share, **gap.columns("gap_closed")}
            rows.append(row | {"rho": rho.estimate, "rho_low": rho.low, "rho_high": rho.high})
    return rows


# -- parts
def _layers(cells: Mapping[str, Mapping[int, np.ndarray]]) -> list[int]:
    """The layers that all documents have. Raises ValueError where documents differ in their layers."""
    layers = {document: sorted(values) for document, values in cells.items()}
    first = next(iter(layers.values()), [])
    for document, found in layers.items():
        if found != first:
            raise ValueError(f"document {document!r} has layers {found}, others have {first}")
    return first


def _cells_of(cells: Cells, lengths: Mapping[str, Mapping[int, int]], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A layer's values of the documents in `lengths`, one behind the other, and the document's number: both [sum N]."""
    values, documents = [], []
    for number, (document, length) in enumerate(lengths.items()):
        found = np.asarray(cells.get(document, {}).get(layer, np.empty(0)), dtype=np.float64)
        if found.shape != (length[layer],) or not np.isfinite(found).all():
            raise ValueError(
                f"layer {layer} of document {document!r} needs {length[layer]} finite values; there are "
                f"{np.count_nonzero(np.isfinite(found))} in {found.shape}"
            )
        values.append(found)
        documents.append(np.full(len(found), number))
    return np.concatenate(values), np.concatenate(documents)

"""Which experts will a token need h layers from now? Eleven predictors, fair splits, and what they score.

A cell is one (journey n, layer l): known are the experts and gate probabilities of layers 0 .. l, the token's position
and, for `previous_token`, the whole journey of the token before (which is complete by then); the target is layer l + h.
A predictor gives a probability to each of E experts for being the strongest of the target layer. Its predicted set are
the K most probable; of equals the expert with the smaller id comes first.

    uniform         every expert alike; scored in expectation, as if equals were drawn at random
    majority        how often each expert is the strongest of the target layer, in training data
    previous_token  the experts of the previous token at the target layer, each as likely as in training data
    transition      how often each expert follows the strongest one of layer l, in training data
    lookup          the same after the strongest experts of the last 1 .. 5 layers, longer histories first
    xgboost         boosted trees on layer, last experts (categories), gate probabilities, position
    mlp, mlp_tuned  a network on the same, with embeddings of layer and experts
    stale_gate      the target layer's own router, given the router input of layer l (no training)
    linear_probe    logistic regression from layer l's router input, one for each layer
    mlp_probe       the same with one hidden layer

Problems are split 60/20/20 into training, validation and test. Every choice (early stopping, smoothing, search) is made
on validation cells. `split_by_row` scatters the cells of one journey over all three parts instead: it leaks, and is
here to measure how much.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import xgboost
from scipy.sparse import csr_matrix
from scipy.special import comb, softmax
from torch import nn
from tqdm.auto import tqdm

from src.base import stats
from src.journeys.measures import consecutive_pairs, problem_folds

HISTORY_PREDICTORS = ("uniform", "majority", "previous_token", "transition", "lookup", "xgboost", "mlp", "mlp_tuned")
HIDDEN_PREDICTORS = ("stale_gate", "linear_probe", "mlp_probe")
PREDICTORS = HISTORY_PREDICTORS + HIDDEN_PREDICTORS
PARTS = ("train", "validation", "test")
METRICS = ("top1", "top2", "slot_overlap", "whole_set")
LOOKUP_ORDERS = 5  # layers that the longest history of `lookup` has
TREE_HISTORY = 5  # layers that XGBoost sees
# With fewer problems a split by problem leaves parts empty; then each problem's tokens are cut into BLOCKS runs.
MIN_PROBLEMS = 5
BLOCKS = 25
# Strength m of the shorter history in `lookup`, in observations; infinity leaves a length of history out.
SMOOTHING = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, np.inf)
ECE_BINS = 15
# Steps that an epoch has at least: with few cells a network's batches are smaller than its setting says.
MIN_STEPS = 50
# Cells that are predicted at once.
CHUNK_CELLS = 65_536


# -- data
@dataclass(frozen=True, eq=False)
class Data:
    """What predictors see of N journeys over L layers, K slots, E experts, P problems.

    experts [N, L, K] int16: strongest first, -1 is none. gates [N, L, K] float32: 0 where unknown. position [N]: of the
    token in its problem. problem [N]: 0 .. P-1. previous [N]: row of the problem's token before, or -1.
    problem_names, domain_of_problem [P]; domain_names; layers: the L layers' numbers in the model.
    hidden: `journeys.Hidden` or None; hidden_row [N]: a journey's row in it, or -1.
    in_blocks: runs of tokens stand in for problems, because there are fewer than MIN_PROBLEMS.
    """

    experts: np.ndarray
    gates: np.ndarray
    position: np.ndarray
    problem: np.ndarray
    previous: np.ndarray
    problem_names: tuple[str, ...]
    domain_of_problem: np.ndarray
    domain_names: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    hidden: object | None
    hidden_row: np.ndarray
    in_blocks: bool

    @property
    def scored(self) -> np.ndarray:
        """Journeys that every predictor can be scored on, bool [N]: those with router inputs where there are any."""
        return self.hidden_row >= 0 if self.hidden is not None else np.ones(len(self.problem), dtype=bool)


def prepare(sample, hidden=None) -> Data:
    """`journey_tables.prepare`'s sample, and the router inputs from `journeys.read_hidden`, as predictors need them.

    Router inputs are left out where fewer than MIN_PROBLEMS problems have them: no split would have some in each part.
    """
    num_rows = len(sample.clusters)
    previous = np.full(num_rows, -1)
    first, second = consecutive_pairs(sample.clusters, sample.token_idx)
    previous[second] = first
    problem = np.asarray(sample.clusters, dtype=np.int64)
    in_blocks = int(problem.max()) + 1 < MIN_PROBLEMS
    block = np.zeros(num_rows, dtype=np.int64)
    if in_blocks:
        for one in np.unique(problem):
            rows = np.flatnonzero(problem == one)
            rows = rows[np.argsort(sample.token_idx[rows], kind="stable")]
            block[rows] = np.arange(len(rows)) * BLOCKS // len(rows)
    _, first, problem = np.unique(problem * BLOCKS + block, return_index=True, return_inverse=True)
    names = [f"{sample.domain_names[sample.domains[row]]}/{sample.problem_ids[row]}" for row in first]
    if in_blocks:
        names = [f"{name}, part {block[row] + 1} of {BLOCKS}" for name, row in zip(names, first, strict=True)]
    hidden_row = np.full(num_rows, -1)
    if hidden is not None:
        hidden_row[hidden.rows] = np.arange(len(hidden.rows))
        if len(np.unique(problem[hidden.rows])) < MIN_PROBLEMS:
            hidden, hidden_row = None, np.full(num_rows, -1)
    return Data(
        experts=np.asarray(sample.experts).astype(np.int16),
        gates=np.nan_to_num(np.asarray(sample.gating_probs).astype(np.float32), nan=0.0),
        position=np.asarray(sample.token_idx),
        problem=problem,
        previous=previous,
        problem_names=tuple(names),
        domain_of_problem=np.asarray(sample.domains)[first],
        domain_names=tuple(sample.domain_names),
        layers=tuple(sample.layers),
        num_experts=int(sample.num_experts),
        hidden=hidden,
        hidden_row=hidden_row,
        in_blocks=in_blocks,
    )


@dataclass(frozen=True, eq=False)
class Cells:
    """M cells: journey [M] and layer [M] (place among the L layers) from which layer + hop is predicted."""

    journey: np.ndarray
    layer: np.ndarray
    hop: int

    def __len__(self) -> int:
        return len(self.journey)

    def select(self, rows: np.ndarray) -> "Cells":
        """The cells at `rows` (indices or mask), in that order."""
        return Cells(self.journey[rows], self.layer[rows], self.hop)


def cells_of(data: Data, hop: int, journeys: np.ndarray | None = None) -> Cells:
    """All cells of `journeys` (mask [N]; all) whose target layer has an expert, layer by layer."""
    present = data.experts[:, hop:, 0] >= 0
    if journeys is not None:
        present &= journeys[:, None]
    layer, journey = np.nonzero(present.T)
    return Cells(journey, layer, hop)


def targets_of(data: Data, cells: Cells) -> np.ndarray:
    """The experts of the target layers, int64 [M, K], strongest first."""
    return data.experts[cells.journey, cells.layer + cells.hop].astype(np.int64)


# -- splits
@dataclass(frozen=True, eq=False)
class Split:
    """Cells to train on, to choose on, and to score (those whose journey is in `Data.scored`)."""

    train: Cells
    validation: Cells
    test: Cells


def problem_parts(data: Data, seed: int) -> np.ndarray:
    """Part of each problem [P] (an index into PARTS): 60/20/20, even over domains and problems with router inputs.

    Raises ValueError for fewer than MIN_PROBLEMS problems.
    """
    num_problems = len(data.problem_names)
    if num_problems < MIN_PROBLEMS:
        raise ValueError(f"{num_problems} problems cannot be split 60/20/20; {MIN_PROBLEMS} are needed")
    with_hidden = np.bincount(data.problem[data.hidden_row >= 0], minlength=num_problems) > 0
    folds = problem_folds(data.domain_of_problem + len(data.domain_names) * with_hidden, 5, seed)
    return np.array([0, 0, 0, 1, 2])[folds]


def split_by_problem(data: Data, parts: np.ndarray, hop: int) -> Split:
    """The honest split: all cells of a problem lie in its part [P]."""
    part = parts[data.problem]
    return Split(cells_of(data, hop, part == 0), cells_of(data, hop, part == 1),
                 cells_of(data, hop, (part == 2) & data.scored))  # fmt: skip


def split_by_row(data: Data, hop: int, seed: int) -> Split:
    """The leaky split: the same cells, scattered at random 60/20/20, whichever journey they belong to."""
    cells = cells_of(data, hop)
    order = np.random.default_rng([seed, hop]).permutation(len(cells))
    first, second = round(0.6 * len(cells)), round(0.8 * len(cells))
    train, validation, test = (np.sort(rows) for rows in np.split(order, [first, second]))
    test = cells.select(test)
    return Split(cells.select(train), cells.select(validation), test.select(data.scored[test.journey]))


# -- predictors
@dataclass(frozen=True)
class Network:
    """Shape and training of a network.

    widths: of the hidden layers. history: layers whose experts and gate probabilities it sees; layer_width and
    expert_width: of the embeddings; per_layer: an expert has another embedding in each layer (these four mean nothing
    to probes). dropout; learning_rate and weight_decay of AdamW; batch_rows: cells per step (see MIN_STEPS).
    """

    widths: tuple[int, ...]
    history: int = 5
    layer_width: int = 10
    expert_width: int = 5
    per_layer: bool = False
    dropout: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_rows: int = 1024


@dataclass(frozen=True)
class Settings:
    """Budgets and shapes of the trained predictors.

    train_rows: cells in one epoch of mlp and mlp_tuned, drawn anew for each. epochs, probe_epochs: at most; patience:
    epochs without a better validation loss after which training stops. validation_rows: cells that choices are made on.
    xgboost_rows, xgboost_rounds: cells that XGBoost trains on, and its rounds at most (E trees each).
    """

    mlp: Network
    mlp_tuned: Network
    linear_probe: Network
    mlp_probe: Network
    train_rows: int = 150_000
    epochs: int = 8
    probe_epochs: int = 12
    patience: int = 3
    validation_rows: int = 30_000
    xgboost_rows: int = 100_000
    xgboost_rounds: int = 60


@dataclass(frozen=True, eq=False)
class Predictor:
    """A predictor that has been fitted: predict(cells) -> probabilities [M, E]; parameters: numbers that it stores."""

    name: str
    predict: Callable[[Cells], np.ndarray]
    parameters: int


def fit(name: str, data: Data, train: Cells, validation: Cells, settings: Settings, seed: int = 0) -> Predictor:
    """Fit the predictor `name` (of PREDICTORS) to training cells, with its choices made on validation cells.

    Predictors from hidden states leave out the cells without. The same seed gives the same predictor; torch's random
    state is left as it was. Raises ValueError for an unknown name, and where hidden states are needed but absent.
    """
    if name in HIDDEN_PREDICTORS:
        if data.hidden is None:
            raise ValueError(f"{name} needs router inputs, and there are none")
        train, validation = (cells.select(data.hidden_row[cells.journey] >= 0) for cells in (train, validation))
    validation = _drawn(validation, settings.validation_rows, np.random.default_rng(seed))
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
            return _fit_probe(name, data, train, validation, settings, getattr(settings, name), seed)
    raise ValueError(f"there is no predictor {name!r}; there are {', '.join(PREDICTORS)}")


def _drawn(cells: Cells, most: int, rng: np.random.Generator) -> Cells:
    """At most `most` of the cells, at random, in their order."""
    return cells if len(cells) <= most else cells.select(np.sort(rng.permutation(len(cells))[:most]))


def _history(data: Data, cells: Cells, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts [M, length, K] int64, E where there is none; gates likewise; layers [M, length]), the newest last.

    Nothing after layer l is read.
    """
    layers = cells.layer[:, None] - np.arange(length - 1, -1, -1)
    before = (layers < 0)[:, :, None]
    layers = np.maximum(layers, 0)
    experts = data.experts[cells.journey[:, None], layers].astype(np.int64)
    gates = np.where(before, 0.0, data.gates[cells.journey[:, None], layers]).astype(np.float32)
    return np.where(before | (experts < 0), data.num_experts, experts), gates, layers


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
        experts, gates, _ = _history(data, cells, TREE_HISTORY)
        columns = (cells.layer, experts.reshape(len(cells), -1), gates.reshape(len(cells), -1),
                   data.position[cells.journey])  # fmt: skip
        labels = targets_of(data, cells)[:, 0] if labelled else None
        return xgboost.DMatrix(
            np.column_stack(columns).astype(np.float32), labels, feature_types=kinds, enable_categorical=True
        )

    rng = np.random.default_rng(seed)
    model = xgboost.train(
        {
            "objective": "multi:softprob",
            "num_class": data.num_experts,
            "tree_method": "hist",
            "max_depth": 6,
            "eta": 0.3,
            "seed": seed,
            "nthread": torch.get_num_threads(),
        },
        matrix(_drawn(train, settings.xgboost_rows, rng), labelled=True),
        settings.xgboost_rounds,
        evals=[(matrix(validation, labelled=True), "validation")],
        early_stopping_rounds=5 * settings.patience,
        verbose_eval=False,
    )
    model = model[: model.best_iteration + 1]
    nodes = sum(tree.count("\n") for tree in model.get_dump())
    leaves = sum(tree.count("leaf=") for tree in model.get_dump())
    return Predictor("xgboost", lambda cells: model.predict(matrix(cells)), 2 * (nodes - leaves) + leaves)


# -- networks
class _HistoryNetwork(nn.Module):
    """Embeddings of the layer and of the last experts, with gate probabilities and position, through hidden layers."""

    def __init__(self, setting: Network, num_layers: int, num_experts: int, slots: int):
        super().__init__()
        self.layer = nn.Embedding(num_layers, setting.layer_width)
        self.expert = nn.Embedding((num_layers if setting.per_layer else 1) * (num_experts + 1), setting.expert_width)
        inputs = setting.layer_width + setting.history * slots * (setting.expert_width + 1) + 1
        self.body = _hidden_layers(inputs, setting, num_experts)

    def forward(self, layer, experts, numbers):
        return self.body(torch.cat((self.layer(layer), self.expert(experts).flatten(1), numbers), dim=1))


def _hidden_layers(inputs: int, setting: Network, outputs: int) -> nn.Sequential:
    """Linear layers, batch normalisation, leaky ReLU and dropout between; the last starts at 0: all experts alike."""
    parts: list[nn.Module] = []
    for width in setting.widths:
        parts += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.1), nn.Dropout(setting.dropout)]
        inputs = width
    last = nn.Linear(inputs, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)


def fit_history_network(
    name: str, data: Data, train: Cells, validation: Cells, settings: Settings, setting: Network, seed: int
) -> tuple[Predictor, float]:
    """(mlp or mlp_tuned, its validation loss in nats per cell)."""

    def inputs(cells: Cells) -> tuple[torch.Tensor, ...]:
        experts, gates, layers = _history(data, cells, setting.history)
        if setting.per_layer:
            experts += (data.num_experts + 1) * layers[:, :, None]
        # so that positions 0 .. 1000 lie in 0 .. 1, the early ones further apart
        position = np.log1p(data.position[cells.journey, None]) / np.log1p(1000)
        numbers = np.concatenate((gates.reshape(len(cells), -1), position), axis=1, dtype=np.float32)
        return (
            torch.from_numpy(cells.layer),
            torch.from_numpy(experts.reshape(len(cells), -1)),
            torch.from_numpy(numbers),
        )

    def batch(cells: Cells) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        return inputs(cells), torch.from_numpy(targets_of(data, cells)[:, 0])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _HistoryNetwork(setting, len(data.layers), data.num_experts, data.experts.shape[2])
        held_out = batch(validation)

        def draw(rng: np.random.Generator):
            return batch(train.select(rng.permutation(len(train))[: settings.train_rows]))

        rows = min(len(train), settings.train_rows)
        loss = _train(network, draw, rows, held_out, setting, settings.epochs, settings.patience, seed, name)

    def predict(cells: Cells) -> np.ndarray:
        with torch.no_grad():
            return network(*inputs(cells)).double().softmax(dim=1).numpy()

    return Predictor(name, predict, _stored(network)), loss


def _stored(network: nn.Module) -> int:
    """Numbers that a network stores: weights, and the statistics of batch normalisation."""
    return sum(values.numel() for values in network.state_dict().values() if values.is_floating_point())


def _train(
    network: nn.Module,
    draw: Callable,
    rows: int,
    held_out: tuple,
    setting: Network,
    epochs: int,
    patience: int,
    seed: int,
    name: str | None,
) -> float:
    """Train on draw(rng) -> (inputs, targets), one draw of `rows` for each epoch; returns the best validation loss.

    AdamW (Loshchilov and Hutter 2019) with a cosine falling to 0 over all epochs. The network is left in evaluation
    mode with the weights of its best epoch; as it was where there is nothing to train or to choose on.
    """
    network.eval()
    if rows < 2 or not len(held_out[1]):
        return float("nan")
    rng = np.random.default_rng(seed)
    # of at least two cells: batch normalisation needs them
    steps = min(max(-(-rows // setting.batch_rows), MIN_STEPS), rows // 2)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    best, best_state, waited = np.inf, copy.deepcopy(network.state_dict()), 0
    for _ in tqdm(range(epochs), desc=name, leave=False, delay=3, disable=name is None):
        inputs, targets = draw(rng)
        network.train()
        for part in np.array_split(np.arange(rows), steps):
            where = slice(part[0], part[-1] + 1)
            loss = nn.functional.cross_entropy(network(*(values[where] for values in inputs)), targets[where])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            found = nn.functional.cross_entropy(network(*held_out[0]), held_out[1]).item()
        if found < best:
            best, best_state, waited = found, copy.deepcopy(network.state_dict()), 0
        else:
            waited += 1
            if waited >= patience:
                break
    network.load_state_dict(best_state)
    return best


# -- from hidden states
def stale_gate(data: Data) -> Predictor:
    """The target layer's router on layer l's router input: what the router would say had nothing changed since.

    Exact at hop 0. parameters is 0: the routers are the model's own. Its probabilities are the router's (softmax, or
    BlockFFN's strengths over their sum): nothing is fitted, so they need not be calibrated.
    """
    hidden = data.hidden

    def predict(cells: Cells) -> np.ndarray:
        found = np.empty((len(cells), data.num_experts))
        for layer, rows in _by_layer(cells):
            target = layer + cells.hop
            logits = (_router_inputs(data, cells, layer, rows) @ hidden.weight[target].T).astype(np.float64)
            if hidden.activation == "softmax":
                # float64: in float32 two unequal logits can get equal probabilities
                found[rows] = softmax(logits, axis=1)
            else:
                strength = np.maximum(logits, 0)
                total = strength.sum(axis=1, keepdims=True)
                found[rows] = np.where(total > 0, strength / np.where(total > 0, total, 1), 1 / data.num_experts)
        return found

    return Predictor("stale_gate", predict, 0)


def _by_layer(cells: Cells) -> list[tuple[int, np.ndarray]]:
    """(layer, places of its cells) for each layer that has cells."""
    return [(int(layer), np.flatnonzero(cells.layer == layer)) for layer in np.unique(cells.layer)]


def _router_inputs(data: Data, cells: Cells, layer: int, rows: np.ndarray) -> np.ndarray:
    """Router inputs of `layer` for the cells at `rows`, float32 [rows, D]."""
    return data.hidden.layer(layer)[data.hidden_row[cells.journey[rows]]]


def _fit_probe(
    name: str, data: Data, train: Cells, validation: Cells, settings: Settings, setting: Network, seed: int
) -> Predictor:
    """One network per layer, from the standardised router input; a layer without training cells says nothing."""
    networks: dict[int, tuple[nn.Module, np.ndarray, np.ndarray]] = {}
    held_out = dict(_by_layer(validation))
    stored = 0
    for layer, rows in tqdm(_by_layer(train), desc=name, unit="layer", leave=False, delay=3):
        states = _router_inputs(data, train, layer, rows)
        mean, scale = states.mean(axis=0), states.std(axis=0) + 1e-6
        inputs = torch.from_numpy((states - mean) / scale)
        targets = torch.from_numpy(targets_of(data, train.select(rows))[:, 0])
        others = held_out.get(layer, np.zeros(0, dtype=np.int64))
        held = torch.from_numpy((_router_inputs(data, validation, layer, others) - mean) / scale)
        held_targets = torch.from_numpy(targets_of(data, validation.select(others))[:, 0])

        def draw(rng: np.random.Generator, inputs=inputs, targets=targets):
            order = torch.from_numpy(rng.permutation(len(targets)))
            return (inputs[order],), targets[order]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _hidden_layers(inputs.shape[1], setting, data.num_experts)
            _train(network, draw, len(rows), ((held,), held_targets), setting, settings.probe_epochs,
                   settings.patience, seed, None)  # fmt: skip
        networks[layer] = network, mean, scale
        stored += _stored(network) + 2 * len(mean)

    def predict(cells: Cells) -> np.ndarray:
        found = np.full((len(cells), data.num_experts), 1 / data.num_experts)
        for layer, rows in _by_layer(cells):
            if layer in networks:
                network, mean, scale = networks[layer]
                states = torch.from_numpy((_router_inputs(data, cells, layer, rows) - mean) / scale)
                with torch.no_grad():
                    found[rows] = network(states).double().softmax(dim=1).numpy()
        return found

    return Predictor(name, predict, stored)


# -- the search for mlp_tuned
def tune(
    data: Data, train: Cells, validation: Cells, settings: Settings, trials: int, seed: int
) -> tuple[Network, list[dict]]:
    """(the best setting for mlp_tuned, all trials: setting and validation loss in nats): a search of `trials` networks.

    The first is settings.mlp_tuned, the others come from Optuna's tree-structured Parzen estimator (Bergstra et al.
    2011).
    """
    import optuna  # a second to import, and only a search needs it

    validation = _drawn(validation, settings.validation_rows, np.random.default_rng(seed))
    tried: list[dict] = []

    def run(setting: Network) -> float:
        _, loss = fit_history_network("mlp_tuned", data, train, validation, settings, setting, seed)
        tried.append({"validation_loss": loss, **asdict(setting)})
        return loss

    def objective(trial) -> float:
        depth = trial.suggest_int("depth", 1, 3)
        width = trial.suggest_categorical("width", [64, 128, 256, 384])
        setting = Network(
            widths=(width,) * depth,
            history=trial.suggest_categorical("history", [3, 5, 8, 12]),
            layer_width=trial.suggest_int("layer_width", 4, 24, step=4),
            expert_width=trial.suggest_int("expert_width", 4, 16, step=4),
            per_layer=trial.suggest_categorical("per_layer", [False, True]),
            dropout=trial.suggest_float("dropout", 0.0, 0.4, step=0.05),
            learning_rate=trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
            weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
            batch_rows=trial.suggest_categorical("batch_rows", [512, 1024, 2048]),
        )
        return run(setting)

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        with tqdm(total=trials, desc="tune", unit="network") as bar:
            run(settings.mlp_tuned)
            bar.update()
            study.optimize(objective, n_trials=trials - 1, callbacks=[lambda *_: bar.update()])
    finally:
        optuna.logging.set_verbosity(verbosity)
    best = min(tried, key=lambda one: one["validation_loss"])
    return Network(**{key: value for key, value in best.items() if key != "validation_loss"}), tried


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


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums of scores, which add up over seeds: hits [L, P, 5] (the four METRICS, and the number of cells) and, for the
    calibration error, bins [L, G, ECE_BINS, 3] (cells, confidence, right) over G domains. By source layer.
    """

    hits: np.ndarray
    bins: np.ndarray

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.hits + other.hits, self.bins + other.bins)


def total(data: Data, cells: Cells, scores: Scores) -> Totals:
    """Sum the scores of cells by layer and problem."""
    num_layers, num_problems, num_domains = len(data.layers), len(data.problem_names), len(data.domain_names)
    problem = data.problem[cells.journey]
    hits = _sums(cells.layer * num_problems + problem, (*scores.hits.T, None), num_layers * num_problems)
    interval = np.clip(np.ceil(scores.confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    place = (cells.layer * num_domains + data.domain_of_problem[problem]) * ECE_BINS + interval
    bins = _sums(place, (None, scores.confidence, scores.hits[:, 0]), num_layers * num_domains * ECE_BINS)
    return Totals(hits.reshape(num_layers, num_problems, -1), bins.reshape(num_layers, num_domains, ECE_BINS, -1))


def _sums(places: np.ndarray, columns: Sequence, size: int) -> np.ndarray:
    """Sum of each column (None counts) at each of `size` places, [size, columns]."""
    return np.stack([np.bincount(places, weights=column, minlength=size) for column in columns], axis=1)


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017): the mean distance of confidence and accuracy in
    equally wide intervals of confidence, weighted by cells. bins [..., ECE_BINS, 3], summed over what comes first.
    """
    cells, confidence, right = bins.reshape(-1, *bins.shape[-2:]).sum(axis=0).T
    return float(np.abs(right - confidence).sum() / cells.sum())


def score_rows(data: Data, totals: Totals, hop: int, resamples: int, seed: int, level: float) -> list[dict]:
    """Rows of results: every domain ("all" first) x every target layer ("all" first) that has cells.

    Columns domain, layer (the target's number in the model), rows (cells, summed over seeds), METRICS as shares,
    top1_low and top1_high (bootstrap over problems; NaN for fewer than two), ece.
    """
    rows = []
    for domain, name in enumerate(("all", *data.domain_names), start=-1):
        members = data.domain_of_problem == domain if domain >= 0 else np.ones(len(data.problem_names), dtype=bool)
        for layer in range(-1, len(data.layers) - hop):
            where = slice(None) if layer < 0 else slice(layer, layer + 1)
            hits = totals.hits[where][:, members].sum(axis=0)
            hits = hits[hits[:, -1] > 0]
            if not len(hits):
                continue
            shares = hits[:, :-1].sum(axis=0) / hits[:, -1].sum()
            low = high = float("nan")
            if len(hits) > 1:
                interval = stats.cluster_bootstrap(hits[:, 0], hits[:, -1], resamples, seed, level)
                low, high = interval.low, interval.high
            bins = totals.bins[where] if domain < 0 else totals.bins[where, domain]
            rows.append(
                {
                    "domain": name,
                    "layer": "all" if layer < 0 else data.layers[layer + hop],
                    "rows": int(hits[:, -1].sum()),
                    **dict(zip(METRICS, shares.tolist(), strict=True)),
                    "top1_low": low,
                    "top1_high": high,
                    "ece": calibration_error(bins),
                }
            )
    return rows


# -- everything about one predictor
@dataclass(frozen=True, eq=False)
class Measured:
    """One predictor under one split, summed over seeds: totals, mean train_seconds, predict_us and parameters."""

    totals: Totals
    train_seconds: float
    predict_us: float
    parameters: float


@dataclass(frozen=True, eq=False)
class Study:
    """One predictor at one hop.

    by_split: "problems" and, where it was asked for, "rows". paired [P, 3]: right under the row split, right under the
    problem split, cells, all on the same cells (None without a row split). predicted [T, L, K] int16: the experts
    predicted under the problem split with the first seed for the T test journeys in order, best first; -1 is none.
    """

    by_split: dict[str, Measured]
    paired: np.ndarray | None
    predicted: np.ndarray


def study(
    name: str,
    data: Data,
    parts: np.ndarray,
    hop: int,
    settings: Settings,
    seeds: Sequence[int],
    with_rows: bool,
) -> Study:
    """Fit and score the predictor `name` for each seed, under the split by problem and, if `with_rows`, by row.

    parts [P] from `problem_parts`: the same for all seeds, which change what is drawn in training and which cells the
    row split draws. Cells are paired where the row split's test part meets the problem split's.
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
            runs.setdefault(kind, []).append(
                (total(data, split.test, scores), seconds, predict_us, predictor.parameters)
            )
            right[kind] = np.full(data.experts.shape[:2], np.nan)
            right[kind][split.test.journey, split.test.layer] = scores.hits[:, 0]
            if predicted is None:
                predicted = _as_trace(data, parts, split.test, scores.ranked)
        if with_rows:
            both = np.isfinite(right["rows"]) & np.isfinite(right["problems"])
            problem = data.problem[np.nonzero(both)[0]]
            paired += _sums(problem, (right["rows"][both], right["problems"][both], None), len(parts))
    by_split = {
        kind: Measured(sum((run[0] for run in done[1:]), done[0][0]), *np.mean([run[1:] for run in done], axis=0))
        for kind, done in runs.items()
    }
    return Study(by_split, paired if with_rows else None, predicted)


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

"""Predictors that are networks, on a token's history or on what its routers were given, and the stale gate."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.special import softmax
from torch import nn
from tqdm.auto import tqdm

from src.journeys.cells import Cells, Data, Predictor, drawn, history, targets_of

# Steps that an epoch has at least: with few cells a network's batches are smaller than its setting says.
MIN_STEPS = 50


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
        experts, gates, layers = history(data, cells, setting.history)
        if setting.per_layer:
            experts += (data.num_experts + 1) * layers[:, :, None]
        # so that positions 0 .. 1000 lie in 0 .. 1, the early ones further apart
        position = np.log1p(data.position[cells.journey, None]) / np.log1p(1000)
        numbers = np.concatenate((gates.reshape(len(cells), -1), position), axis=1, dtype=np.float32)
        return tuple(torch.from_numpy(part) for part in (cells.layer, experts.reshape(len(cells), -1), numbers))

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


def fit_probe(
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

    validation = drawn(validation, settings.validation_rows, np.random.default_rng(seed))
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

"""Distils Mamba-2 sidecars, and the learned gate, from the frozen model that they stand beside.

Stage A   each sidecar on its own layer: the teacher's input of the attention (after its norm) -> its attention's
          output; squared error divided by the output's variance. Layers are independent, so they can share one forward
          of the teacher (small models) or be trained one after another (one sidecar in memory; big models). A randomly
          initialised sidecar starts with its last projection fitted in closed form (`_fit_out_proj`).
Stage B   end to end from stage A: KL(teacher || hybrid) per token, under random hard masks whose share is drawn
          uniformly per sequence, so that no gate policy is favoured.
Gate      the linear gates alone, end to end on the same KL, with a penalty that holds every layer's share at a target.

Only sidecars (or gates) train; the base model is frozen. Everything is drawn from the seed and the step, so that a run
resumed from its checkpoint ends in the same weights as an uninterrupted one.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src.eval_utils import model_device
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.checkpoints import (
    base_fingerprint,
    read_index,
    save_learned_gates,
    save_sidecar,
    save_sidecars,
    update_index,
)
from src.hybrid.gates import FixedGate, LearnedGate, MaskGate
from src.hybrid.layer import attachment_of, set_gate
from src.hybrid.losses import attention_pairs, kl_from_teacher, relative_error
from src.hybrid.sidecar import SidecarSettings, new_sidecar
from src.hybrid.training_state import CheckpointPart, TrainingCheckpoint

# Sidecars are trained in float32 and stored with their matrices in 16 bits.
STORED = torch.bfloat16
# Weight of the learned gate's budget: (mean probability - share)^2 per layer, beside a KL of tenths of a nat.
BUDGET_WEIGHT = 10.0
# Temperature of the learned gate's relaxed decisions (binary concrete distribution, arXiv 1611.00712).
GATE_TEMPERATURE = 0.5
# Steps' worth of text behind the ridge regression that a random sidecar's out_proj starts from, and its ridge as a
# fraction of the features' mean square.
RIDGE_BATCHES = 4
RIDGE = 1e-3


@dataclass(frozen=True)
class DistillSettings:
    """How one stage is trained.

    steps, batch_size (sequences): the size of the run. learning_rate: AdamW's peak, after a linear rise over the share
    `warmup` of the steps, then down to a tenth along a cosine. bf16: run the frozen base model under bfloat16 autocast
    (sidecars always compute in float32). validate_every, checkpoint_every: in steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    bf16: bool = False
    validate_every: int = 50
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"distillation's {name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"distillation's learning_rate is {self.learning_rate}; it must be positive")

    def rate(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        rise = max(round(self.warmup * self.steps), 1)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        progress = (step - rise) / max(self.steps - rise, 1)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- the three trainings


def train_stage_a(
    model: nn.Module,
    layers: Sequence[int],
    sidecars: SidecarSettings,
    train: np.ndarray,
    validation: np.ndarray,
    settings: DistillSettings,
    folder: str | Path,
    checkpoints: str | Path,
    one_at_a_time: bool = False,
    progress: bool = True,
) -> list[dict]:
    """Train one sidecar per layer on the attention it is to stand in for; write them to `<folder>/stage_a/`.

    model: without sidecars. train [N, T], validation [M, T]: token windows. one_at_a_time: a layer at a time, the
    teacher's forward ending there, only one sidecar and its optimiser in memory; the weights are the same.
    Returns the rows of the log: stage, quantity, layer, step, tokens, split, value, learning_rate.

    Raises ValueError for a model with sidecars attached or no windows.
    """
    layers = sorted(layers)
    what = {"stage": "a", "sidecars": asdict(sidecars), "one_at_a_time": one_at_a_time}
    checkpoint = _checkpoint(Path(checkpoints) / "stage_a.pt", model, layers, settings, train, validation, what)
    groups = [[layer] for layer in layers] if one_at_a_time else [layers]
    rows = []
    for number, group in enumerate(groups):
        label = f"stage A, layer {group[0]}" if one_at_a_time else f"stage A, {len(group)} layers"
        modules = {layer: new_sidecar(model, layer, sidecars, settings.seed).float().train() for layer in group}
        part = checkpoint.part(number)
        if sidecars.init == "random" and part.load() is None:
            _fit_out_proj(model, modules, train, settings)
        rows += _train_on_attention(model, modules, train, validation, settings, part, label if progress else None)
        for layer, module in modules.items():
            save_sidecar(folder, "a", layer, module, STORED)
    final = {str(row["layer"]): row["value"] for row in rows if row["split"] == "validation"}
    training = {"settings": _public(settings), "validation_normalised_mse": final, "tokens": _tokens(settings, train)}
    update_index(folder, model, sidecars, "a", layers, training)
    return rows


def _train_on_attention(
    model: nn.Module,
    modules: dict[int, nn.Module],
    train: np.ndarray,
    validation: np.ndarray,
    settings: DistillSettings,
    part: CheckpointPart,
    label: str | None,
) -> list[dict]:
    """Train sidecars, each on the attention of its layer, with one forward of the teacher for all of them."""

    def losses(ids):
        captured = attention_pairs(model, list(modules), ids, settings.bf16)
        return {layer: relative_error(module, *captured.pop(layer)) for layer, module in modules.items()}

    def loss_of(ids, step):
        per_layer = losses(ids)
        return sum(per_layer.values()), {("normalised_mse", layer): value for layer, value in per_layer.items()}

    def validate():
        parts = [losses(ids) for ids in _pieces(validation, settings.batch_size, model)]
        return {("normalised_mse", layer): _mean([one[layer] for one in parts]) for layer in parts[0]}

    named = {str(layer): module for layer, module in modules.items()}
    return _optimise("a", named, loss_of, validate, train, settings, part, label, model)


def train_stage_b(
    model: nn.Module,
    layers: Sequence[int],
    train: np.ndarray,
    validation: np.ndarray,
    settings: DistillSettings,
    folder: str | Path,
    checkpoints: str | Path,
    progress: bool = True,
) -> list[dict]:
    """Train the stage A sidecars of `layers` together, end to end; write them to `<folder>/stage_b/`.

    Per token KL(teacher || hybrid) in nats, m drawn per token and layer with a share u ~ U(0, 1) per sequence. The
    validation rows hold it under fixed masks of that kind (`kl`) and with every token on Mamba (`kl_alpha_1`).
    The model comes without sidecars and leaves without. Returns and raises as `train_stage_a`.
    """
    layers = sorted(layers)
    what = {"stage": "b", "start": _hash_files(Path(folder) / "stage_a", layers)}
    checkpoint = _checkpoint(Path(checkpoints) / "stage_b.pt", model, layers, settings, train, validation, what)
    attach_mamba_sidecar(model, layers, gate=MaskGate({}), sidecar_dir=folder, stage="a")
    attachment = attachment_of(model)
    hybrids = dict(zip(layers, attachment.hybrid_layers(), strict=True))
    for hybrid in hybrids.values():
        hybrid.sidecar.float().requires_grad_(True).train()

    def divergence(ids, generator):
        shares = torch.rand(len(ids), 1, generator=generator)
        attachment.batch_masks = {
            layer: (torch.rand(ids.shape, generator=generator) < shares).float().to(ids.device) for layer in layers
        }
        return kl_from_teacher(model, ids, settings.bf16)

    def loss_of(ids, step):
        loss = divergence(ids, _generator(settings.seed, 1, step))
        return loss, {("kl", "all"): loss}

    def validate():
        pieces = _pieces(validation, settings.batch_size, model)
        masked = [divergence(ids, _generator(settings.seed, 2, number)) for number, ids in enumerate(pieces)]
        set_gate(model, FixedGate(1.0))
        alone = [kl_from_teacher(model, ids, settings.bf16) for ids in pieces]
        set_gate(model, MaskGate({}))
        return {("kl", "all"): _mean(masked), ("kl_alpha_1", "all"): _mean(alone)}

    try:
        modules = {str(layer): hybrid.sidecar for layer, hybrid in hybrids.items()}
        label = "stage B" if progress else None
        rows = _optimise("b", modules, loss_of, validate, train, settings, checkpoint.part(0), label, model)
        last = {row["quantity"]: row["value"] for row in rows if row["split"] == "validation"}
        training = {"settings": _public(settings), "validation": last, "tokens": _tokens(settings, train)}
        save_sidecars(model, folder, "b", training, STORED)
    finally:
        detach_mamba_sidecars(model)
    return rows


def train_learned_gate(
    model: nn.Module,
    layers: Sequence[int],
    share: float,
    train: np.ndarray,
    validation: np.ndarray,
    settings: DistillSettings,
    folder: str | Path,
    checkpoints: str | Path,
    stage: str = "b",
    progress: bool = True,
) -> list[dict]:
    """Train the linear gates before the sidecars of a stage; write `<folder>/learned_gate.safetensors`.

    A token's decision is relaxed: m = sigmoid((w.x + b + logistic noise) / GATE_TEMPERATURE), so that P(m > 1/2) =
    sigmoid(w.x + b); the noise keeps a mixture of both paths from being the answer. Loss: KL(teacher || hybrid) per
    token + BUDGET_WEIGHT * sum over layers (mean sigmoid(w.x + b) - share)^2. Sidecars stay as they are.
    Returns and raises as `train_stage_a`; ValueError also for a share outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"the learned gate's share is {share}; it must lie inside (0, 1)")
    layers = sorted(layers)
    what = {"stage": f"gate on {stage}", "share": share}
    what["start"] = _hash_files(Path(folder) / f"stage_{stage}", layers)
    checkpoint = _checkpoint(Path(checkpoints) / "learned_gate.pt", model, layers, settings, train, validation, what)
    gate = LearnedGate(alpha=0.5, temperature=GATE_TEMPERATURE)
    attach_mamba_sidecar(model, layers, gate=gate, sidecar_dir=folder, stage=stage)
    attachment = attachment_of(model)
    gates = {layer: hybrid.gate_proj for layer, hybrid in zip(layers, attachment.hybrid_layers(), strict=True)}
    scores = _watch_gates(gates, share)

    def measure(ids, generator):
        attachment.score_noise = {layer: _logistic_noise(ids, generator) for layer in layers}
        kl = kl_from_teacher(model, ids, settings.bf16)
        return kl, {layer: torch.sigmoid(scores[layer].float()).mean() for layer in layers}

    def loss_of(ids, step):
        kl, shares = measure(ids, _generator(settings.seed, 3, step))
        budget = sum((value - share) ** 2 for value in shares.values())
        logged = {("kl", "all"): kl} | {("share", layer): value for layer, value in shares.items()}
        return kl + BUDGET_WEIGHT * budget, logged

    def validate():
        parts = [
            measure(ids, _generator(settings.seed, 4, number))
            for number, ids in enumerate(_pieces(validation, settings.batch_size, model))
        ]
        shares = {("share", layer): _mean([part[1][layer] for part in parts]) for layer in layers}
        return {("kl", "all"): _mean([part[0] for part in parts])} | shares

    try:
        modules = {str(layer): module for layer, module in gates.items()}
        label = "learned gate" if progress else None
        rows = _optimise("gate", modules, loss_of, validate, train, settings, checkpoint.part(0), label, model)
        save_learned_gates(model, folder)
    finally:
        detach_mamba_sidecars(model)
    return rows


def _watch_gates(gates: dict[int, nn.Module], share: float) -> dict[int, torch.Tensor]:
    """Let gates train from the bias that gives `share`; returns layer -> what its gate put out last, [B, T, 1].

    The gates go with the sidecars when those are detached, hooks and all.
    """
    scores: dict[int, torch.Tensor] = {}
    for layer, module in gates.items():
        module.requires_grad_(True)
        nn.init.constant_(module.bias, math.log(share / (1.0 - share)))
        module.register_forward_hook(lambda _module, _inputs, out, layer=layer: scores.__setitem__(layer, out))
    return scores


def _logistic_noise(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard logistic noise, one number for each of ids [B, T]."""
    return torch.logit(torch.rand(ids.shape, generator=generator).clamp(1e-6, 1.0 - 1e-6)).to(ids.device)


@dataclass(frozen=True)
class Estimate:
    """What a training will take: seconds (from one timed step of each part), GB held by sidecars being trained."""

    seconds: float
    gigabytes: float


def estimate_stage_a(
    model: nn.Module,
    layers: Sequence[int],
    sidecars: SidecarSettings,
    train: np.ndarray,
    settings: DistillSettings,
    one_at_a_time: bool = False,
) -> Estimate:
    """Time one teacher forward and one sidecar step on this machine, and count bytes in closed form.

    Weights, gradients and AdamW's two moments are 16 bytes per parameter in float32; the captured pairs and the scan's
    activations add about 40 floats per token and inner channel for the sidecar that is running.
    """
    ids = _batch(train[: settings.batch_size], model)
    last = max(layers)
    started = time.perf_counter()
    pairs = attention_pairs(model, [last], ids, settings.bf16)
    _synchronise(ids.device)
    teacher = time.perf_counter() - started
    module = new_sidecar(model, last, sidecars, settings.seed).float().train()
    started = time.perf_counter()
    relative_error(module, *pairs[last]).backward()
    _synchronise(ids.device)
    step = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in module.parameters())
    held = 1 if one_at_a_time else len(layers)
    inner = module.mixer.intermediate_size
    activations = ids.numel() * 4 * (40 * inner + 2 * model.config.hidden_size * held)
    # one layer at a time, the teacher stops at that layer: half of it on average
    forwards = len(layers) * 0.5 if one_at_a_time else 1.0
    return Estimate(
        settings.steps * (forwards * teacher + len(layers) * step), (16 * parameters * held + activations) / 1e9
    )


# ---------------------------------------------------------------- optimisation


def _checkpoint(
    path: Path,
    model: nn.Module,
    layers: Sequence[int],
    settings: DistillSettings,
    train: np.ndarray,
    validation: np.ndarray,
    what: dict,
) -> TrainingCheckpoint:
    """The checkpoint of a stage, for this model, layers, settings and text, and what else the stage depends on.

    Raises ValueError where the text is no token windows.
    """
    if train.ndim != 2 or validation.ndim != 2 or not len(train) or not len(validation):
        raise ValueError(f"distillation needs token windows [N, T]; got {train.shape} and {validation.shape}")
    common = {
        "base": base_fingerprint(model),
        "settings": asdict(settings),
        "layers": list(layers),
        "data": _hash(train, validation),
    }
    return TrainingCheckpoint(path, common | what)


def _optimise(
    stage: str,
    modules: dict[str, nn.Module],
    loss_of: Callable[[torch.Tensor, int], tuple[torch.Tensor, dict]],
    validate: Callable[[], dict],
    train: np.ndarray,
    settings: DistillSettings,
    part: CheckpointPart,
    label: str | None,
    model: nn.Module,
) -> list[dict]:
    """AdamW over `modules` (gradients clipped module by module, so that they stay independent); returns the log's rows.

    loss_of(ids [B, T], step) -> (loss, {(quantity, layer): value}); validate() -> {(quantity, layer): value}.
    """
    optimiser = _adamw(modules, settings)
    rows: list[dict] = []
    sums: dict[tuple, list[float]] = {}
    start = 0
    state = part.load()
    if state is not None:
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        rows, start = state["rows"], state["step"]
        sums = {tuple(key): pair for key, pair in state["sums"]}
        if start < settings.steps:
            optimiser.load_state_dict(state["optimiser"])

    def log(step, split, values):
        tokens, rate = step * settings.batch_size * train.shape[1], settings.rate(max(step - 1, 0))
        for (quantity, layer), value in values.items():
            head = {"stage": stage, "quantity": quantity, "layer": layer, "step": step, "tokens": tokens}
            rows.append(head | {"split": split, "value": value, "learning_rate": rate})

    def evaluate(step):
        with torch.no_grad():
            log(step, "validation", {key: float(value) for key, value in validate().items()})

    if start == 0:
        evaluate(0)
    bar = tqdm(total=settings.steps, initial=start, desc=label, unit="step", disable=label is None)
    for step in range(start, settings.steps):
        loss, values = loss_of(_batch(_rows_of_step(train, settings, step), model), step)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of stage {stage} is {loss.item()} at step {step}; try a smaller learning rate")
        _step(optimiser, modules, loss, settings, step)
        for key, value in values.items():
            pair = sums.setdefault(key, [0.0, 0])
            pair[0] += float(value.detach())
            pair[1] += 1
        done = step + 1
        bar.update()
        if done % settings.validate_every == 0 or done == settings.steps:
            log(done, "train", {key: total / count for key, (total, count) in sums.items()})
            sums.clear()
            evaluate(done)
            bar.set_postfix_str(f"validation {rows[-1]['quantity']} {rows[-1]['value']:.3f}")
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            part.save(
                {
                    "step": done,
                    "rows": rows,
                    "sums": [[list(key), pair] for key, pair in sums.items()],
                    "modules": {name: _detached(module.state_dict()) for name, module in modules.items()},
                    "optimiser": {} if done == settings.steps else optimiser.state_dict(),
                }
            )
    bar.close()
    return rows


def _adamw(modules: dict[str, nn.Module], settings: DistillSettings) -> torch.optim.AdamW:
    """AdamW over the modules' parameters; matrices decay, biases, norms and the like do not."""
    trained = [parameter for module in modules.values() for parameter in module.parameters()]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def _step(
    optimiser: torch.optim.Optimizer,
    modules: dict[str, nn.Module],
    loss: torch.Tensor,
    settings: DistillSettings,
    step: int,
) -> None:
    """One step of the optimiser, at this step's learning rate, each module's gradient clipped on its own."""
    for group in optimiser.param_groups:
        group["lr"] = settings.rate(step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for module in modules.values():
        nn.utils.clip_grad_norm_(module.parameters(), settings.clip_norm)
    optimiser.step()


def _rows_of_step(train: np.ndarray, settings: DistillSettings, step: int) -> np.ndarray:
    """Windows [B, T] of a step: the pool in a new order every time it is used up."""
    first = step * settings.batch_size
    picks = []
    for position in range(first, first + settings.batch_size):
        epoch, index = divmod(position, len(train))
        picks.append(np.random.default_rng([settings.seed, epoch]).permutation(len(train))[index])
    return train[picks]


@torch.no_grad()
def _fit_out_proj(
    model: nn.Module, modules: dict[int, nn.Module], train: np.ndarray, settings: DistillSettings
) -> None:
    """Set every sidecar's out_proj to the ridge regression of attention's output on the features that it projects.

    A random scan is a rich enough set of features that most of the first hundreds of gradient steps are saved, and the
    output starts at the target's own scale.
    """
    sums: dict[int, list[torch.Tensor]] = {}
    features: list[torch.Tensor] = []
    hooks = [
        module.mixer.out_proj.register_forward_pre_hook(lambda _module, args: features.append(args[0]))
        for module in modules.values()
    ]
    try:
        for step in range(min(RIDGE_BATCHES, settings.steps)):
            ids = _batch(_rows_of_step(train, settings, step), model)
            captured = attention_pairs(model, list(modules), ids, settings.bf16)
            for layer, module in modules.items():
                inputs, target = captured.pop(layer)
                module(inputs)
                given = features.pop().flatten(0, 1).double()
                pair = given.T @ given, given.T @ target.flatten(0, 1).double()
                sums[layer] = (
                    [old + new for old, new in zip(sums[layer], pair, strict=True)] if layer in sums else [*pair]
                )
    finally:
        for hook in hooks:
            hook.remove()
    for layer, module in modules.items():
        gram, cross = sums[layer]
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        module.mixer.out_proj.weight.copy_(torch.linalg.solve(gram, cross).T)


def fast_bf16(model: nn.Module) -> bool:
    """Whether bfloat16 autocast makes training faster: for a float32 model on a processor that has bfloat16 matmuls."""
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(model.dtype == torch.float32 and model.device.type == "cpu" and fast)


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU, whose work is queued, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(windows: np.ndarray, model: nn.Module) -> torch.Tensor:
    return torch.as_tensor(windows).to(model_device(model))


def _pieces(windows: np.ndarray, size: int, model: nn.Module) -> list[torch.Tensor]:
    """Batches of equal size (a remainder would count for more in a mean of means)."""
    whole = len(windows) - len(windows) % size if len(windows) > size else len(windows)
    return [_batch(windows[first : first + size], model) for first in range(0, whole, size)]


def _mean(values: Sequence[torch.Tensor]) -> float:
    return float(np.mean([float(value) for value in values]))


def _generator(*seeds: int) -> torch.Generator:
    """A CPU generator for (seed, purpose, step): the same draws on every device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))


def _detached(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _tokens(settings: DistillSettings, train: np.ndarray) -> int:
    return settings.steps * settings.batch_size * train.shape[1]


def _public(settings: DistillSettings) -> dict:
    """Settings that change the weights."""
    hidden = ("validate_every", "checkpoint_every")
    return {name: value for name, value in asdict(settings).items() if name not in hidden}


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _hash_files(folder: Path, layers: Sequence[int]) -> str:
    """sha256 over the sidecar files of `layers`. Raises ValueError where one is not there."""
    read_index(folder.parent)
    digest = hashlib.sha256()
    for layer in layers:
        path = folder / f"layer_{layer}.safetensors"
        if not path.is_file():
            raise ValueError(f"there is no {path}: train stage A for layer {layer} first")
        digest.update(path.read_bytes())
    return digest.hexdigest()

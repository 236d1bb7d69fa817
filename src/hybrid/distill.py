"""Distils Mamba-2 sidecars, and the learned gate, from the frozen model that they stand beside.

Only sidecars (or gates) train; the base model is frozen. Everything is drawn from the seed and the step, so that a run
resumed from its checkpoint ends in the same weights as an uninterrupted one.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src.eval_utils import model_device, synchronize
from src.hybrid import checkpoints
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.gates import FixedGate, LearnedGate, MaskGate
from src.hybrid.layer import attachment_of, set_gate
from src.hybrid.losses import attention_pairs, kl_from_teacher, relative_error
from src.hybrid.sidecar import SidecarSettings, new_sidecar
from src.hybrid.training_state import TrainingCheckpoint

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
class Distillation:
    """What sidecars are distilled from, and where to.

    model: without sidecars; it leaves every stage so. train [N, T], validation [M, T]: token windows.
    folder: of the sidecars. checkpoints: the folder of what an interrupted stage goes on from.
    """

    model: nn.Module
    train: np.ndarray
    validation: np.ndarray
    folder: Path
    checkpoints: Path

    def validation_batches(self, size: int) -> Sequence[torch.Tensor]:
        """Batches of equal size (a remainder would count for more in a mean of means)."""
        rows = self.validation[: max(len(self.validation) // size, 1) * size]
        return _batch(rows, self.model).split(size)


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

    def rate(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        rise = max(round(self.warmup * self.steps), 1)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        progress = (step - rise) / max(self.steps - rise, 1)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- the three trainings


def train_stage_a(
    run: Distillation,
    layers: Sequence[int],
    sidecars: SidecarSettings,
    settings: DistillSettings,
    one_at_a_time: bool = False,
) -> list[dict]:
    """Train one sidecar per layer on the attention it is to stand in for; write them to `<folder>/stage_a/`.

    From the input of the layer's attention (after its norm) to the attention's output, squared error over the output's
    variance. A randomly initialised sidecar starts with its last projection fitted in closed form (`_fit_out_proj`).
    `one_at_a_time` trains a layer at a time, the teacher's forward ending there, with only one sidecar and its
    optimiser in memory; the weights are the same.
    Returns the rows of the log: stage, quantity, layer, step, tokens, split, value, learning_rate.
    """
    layers = sorted(layers)
    what = {"stage": "a", "sidecars": asdict(sidecars), "one_at_a_time": one_at_a_time}
    checkpoint = _checkpoint(run, "stage_a", layers, settings, what)
    groups = [[layer] for layer in layers] if one_at_a_time else [layers]
    rows = []
    for part, group in enumerate(groups):
        label = f"stage A, layer {group[0]}" if one_at_a_time else f"stage A, {len(group)} layers"
        modules = {layer: new_sidecar(run.model, layer, sidecars, settings.seed).float().train() for layer in group}
        if sidecars.init == "random" and part not in checkpoint.parts:
            _fit_out_proj(run, modules, settings)
        rows += _train_on_attention(run, modules, settings, checkpoint, label, part)
        for layer, module in modules.items():
            checkpoints.save_sidecar(run.folder, "a", layer, module, STORED)
    final = {str(row["layer"]): row["value"] for row in rows if row["split"] == "validation"}
    training = _index_entry(run, settings, {"validation_normalised_mse": final})
    checkpoints.update_index(run.folder, run.model, sidecars, "a", layers, training)
    return rows


def _train_on_attention(
    run: Distillation,
    modules: dict[int, nn.Module],
    settings: DistillSettings,
    checkpoint: TrainingCheckpoint,
    label: str,
    part: int,
) -> list[dict]:
    """Train sidecars, each on the attention of its layer, with one forward of the teacher for all of them."""

    def losses(ids):
        captured = attention_pairs(run.model, list(modules), ids, settings.bf16)
        return {
            ("normalised_mse", layer): relative_error(module, *captured.pop(layer)) for layer, module in modules.items()
        }

    def loss_of(ids, step):
        per_layer = losses(ids)
        return sum(per_layer.values()), per_layer

    def validate():
        return _means([losses(ids) for ids in run.validation_batches(settings.batch_size)])

    named = {str(layer): module for layer, module in modules.items()}
    return _optimise(run, "a", named, loss_of, validate, settings, checkpoint, label, part)


def train_stage_b(run: Distillation, layers: Sequence[int], settings: DistillSettings) -> list[dict]:
    """Train the stage A sidecars of `layers` together, end to end; write them to `<folder>/stage_b/`.

    Per token KL(teacher || hybrid) in nats, m drawn per token and layer with a share u ~ U(0, 1) per sequence, so that
    no gate policy is favoured. The validation rows hold it under fixed masks of that kind (`kl`) and with every token
    on Mamba (`kl_alpha_1`). Returns as `train_stage_a`; raises UserError where a layer has no stage A sidecar.
    """
    layers, model = sorted(layers), run.model
    attach_mamba_sidecar(model, layers, gate=MaskGate({}), sidecar_dir=run.folder, stage="a")
    attachment = attachment_of(model)

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
        batches = run.validation_batches(settings.batch_size)
        masked = [divergence(ids, _generator(settings.seed, 2, number)) for number, ids in enumerate(batches)]
        set_gate(model, FixedGate(1.0))
        alone = [kl_from_teacher(model, ids, settings.bf16) for ids in batches]
        set_gate(model, MaskGate({}))
        both = zip(masked, alone, strict=True)
        return _means([{("kl", "all"): kl, ("kl_alpha_1", "all"): at_1} for kl, at_1 in both])

    try:
        what = {"stage": "b", "start": checkpoints.sidecars_sha256(run.folder, "a", layers)}
        checkpoint = _checkpoint(run, "stage_b", layers, settings, what)
        modules = {
            str(layer): hybrid.sidecar.float().requires_grad_(True).train()
            for layer, hybrid in zip(layers, attachment.hybrid_layers(), strict=True)
        }
        rows = _optimise(run, "b", modules, loss_of, validate, settings, checkpoint, "stage B")
        last = {row["quantity"]: row["value"] for row in rows if row["split"] == "validation"}
        checkpoints.save_sidecars(model, run.folder, "b", _index_entry(run, settings, {"validation": last}), STORED)
    finally:
        detach_mamba_sidecars(model)
    return rows


def train_learned_gate(
    run: Distillation, layers: Sequence[int], share: float, settings: DistillSettings, stage: str = "b"
) -> list[dict]:
    """Train the linear gates alone, before the sidecars of a stage; write `<folder>/learned_gate.safetensors`.

    A token's decision is relaxed: m = sigmoid((w.x + b + logistic noise) / GATE_TEMPERATURE), so that P(m > 1/2) =
    sigmoid(w.x + b); the noise keeps a mixture of both paths from being the answer. Loss: KL(teacher || hybrid) per
    token + BUDGET_WEIGHT * sum over layers (mean sigmoid(w.x + b) - share)^2, the share inside (0, 1).
    Returns and raises as `train_stage_b`.
    """
    layers, model = sorted(layers), run.model
    gate = LearnedGate(alpha=0.5, temperature=GATE_TEMPERATURE)
    attach_mamba_sidecar(model, layers, gate=gate, sidecar_dir=run.folder, stage=stage)
    attachment = attachment_of(model)
    scores: dict[int, torch.Tensor] = {}  # what each gate put out last, [B, T, 1]
    gates = {layer: hybrid.gate_proj for layer, hybrid in zip(layers, attachment.hybrid_layers(), strict=True)}
    for layer, module in gates.items():  # they go with the sidecars when those are detached, hooks and all
        module.requires_grad_(True)
        nn.init.constant_(module.bias, math.log(share / (1.0 - share)))
        module.register_forward_hook(lambda _module, _inputs, out, layer=layer: scores.__setitem__(layer, out))

    def measure(ids, generator):
        uniform = {layer: torch.rand(ids.shape, generator=generator) for layer in layers}
        attachment.score_noise = {  # standard logistic
            layer: torch.logit(drawn.clamp(1e-6, 1.0 - 1e-6)).to(ids.device) for layer, drawn in uniform.items()
        }
        kl = kl_from_teacher(model, ids, settings.bf16)
        shares = {("share", layer): torch.sigmoid(scores[layer].float()).mean() for layer in layers}
        return {("kl", "all"): kl} | shares

    def loss_of(ids, step):
        measured = measure(ids, _generator(settings.seed, 3, step))
        budget = sum((measured["share", layer] - share) ** 2 for layer in layers)
        return measured["kl", "all"] + BUDGET_WEIGHT * budget, measured

    def validate():
        batches = run.validation_batches(settings.batch_size)
        return _means([measure(ids, _generator(settings.seed, 4, number)) for number, ids in enumerate(batches)])

    try:
        start = checkpoints.sidecars_sha256(run.folder, stage, layers)
        what = {"stage": f"gate on {stage}", "share": share, "start": start}
        checkpoint = _checkpoint(run, "learned_gate", layers, settings, what)
        modules = {str(layer): module for layer, module in gates.items()}
        rows = _optimise(run, "gate", modules, loss_of, validate, settings, checkpoint, "learned gate")
        checkpoints.save_learned_gates(model, run.folder)
    finally:
        detach_mamba_sidecars(model)
    return rows


def estimate_stage_a(
    model: nn.Module,
    layers: Sequence[int],
    sidecars: SidecarSettings,
    train: np.ndarray,
    settings: DistillSettings,
    one_at_a_time: bool = False,
) -> tuple[float, float]:
    """(seconds, GB held by sidecars being trained) of stage A, from one timed step and bytes in closed form.

    Weights, gradients and AdamW's two moments are 16 bytes per parameter in float32; the captured pairs and the scan's
    activations add about 40 floats per token and inner channel for the sidecar that is running.
    """
    ids = _batch(train[: settings.batch_size], model)
    last = max(layers)
    started = time.perf_counter()
    pairs = attention_pairs(model, [last], ids, settings.bf16)
    synchronize(ids.device)
    teacher = time.perf_counter() - started
    module = new_sidecar(model, last, sidecars, settings.seed).float().train()
    started = time.perf_counter()
    relative_error(module, *pairs[last]).backward()
    synchronize(ids.device)
    step = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in module.parameters())
    held = 1 if one_at_a_time else len(layers)
    activations = ids.numel() * 4 * (40 * module.mixer.intermediate_size + 2 * model.config.hidden_size * held)
    # one layer at a time, the teacher stops at that layer: half of it on average
    forwards = len(layers) * 0.5 if one_at_a_time else 1.0
    seconds = settings.steps * (forwards * teacher + len(layers) * step)
    return seconds, (16 * parameters * held + activations) / 1e9


# ---------------------------------------------------------------- optimisation


def _checkpoint(
    run: Distillation, name: str, layers: list[int], settings: DistillSettings, what: dict
) -> TrainingCheckpoint:
    """The checkpoint of a stage, for this model, layers, settings and text, and what else the stage depends on."""
    data = hashlib.sha256()
    for array in (run.train, run.validation):
        data.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    common = {"base": checkpoints.base_fingerprint(run.model), "settings": asdict(settings), "layers": layers}
    return TrainingCheckpoint(run.checkpoints / f"{name}.pt", common | {"data": data.hexdigest()} | what)


def _optimise(
    run: Distillation,
    stage: str,
    modules: dict[str, nn.Module],
    loss_of: Callable[[torch.Tensor, int], tuple[torch.Tensor, dict]],
    validate: Callable[[], dict],
    settings: DistillSettings,
    checkpoint: TrainingCheckpoint,
    label: str,
    part: int = 0,
) -> list[dict]:
    """AdamW over `modules` (gradients clipped module by module, so that they stay independent); returns the log's rows.

    loss_of(ids [B, T], step) -> (loss, {(quantity, layer): value}); validate() -> {(quantity, layer): value}.
    part: which part of the stage's checkpoint this is.
    """
    optimiser = _adamw(modules, settings)
    rows, sums, start = [], {}, 0
    state = checkpoint.parts.get(part)
    if state is not None:
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        rows, start = state["rows"], state["step"]
        sums = {tuple(key): pair for key, pair in state["sums"]}
        if start < settings.steps:
            optimiser.load_state_dict(state["optimiser"])

    def log(step, split, values):
        tokens, rate = step * settings.batch_size * run.train.shape[1], settings.rate(max(step - 1, 0))
        for (quantity, layer), value in values.items():
            head = {"stage": stage, "quantity": quantity, "layer": layer, "step": step, "tokens": tokens}
            rows.append(head | {"split": split, "value": value, "learning_rate": rate})

    def evaluate(step):
        with torch.no_grad():
            log(step, "validation", validate())

    if start == 0:
        evaluate(0)
    bar = tqdm(total=settings.steps, initial=start, desc=label, unit="step")
    for step in range(start, settings.steps):
        loss, values = loss_of(_batch(_rows_of_step(run.train, settings, step), run.model), step)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of stage {stage} is {loss.item()} at step {step}; try a smaller learning rate")
        _step(optimiser, modules, loss, settings.rate(step), settings.clip_norm)
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
            state = {"step": done, "rows": rows, "sums": [[list(key), pair] for key, pair in sums.items()]}
            state["modules"] = {name: _detached(module.state_dict()) for name, module in modules.items()}
            state["optimiser"] = {} if done == settings.steps else optimiser.state_dict()
            checkpoint.save(part, state)
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


def _step(optimiser, modules: dict[str, nn.Module], loss: torch.Tensor, rate: float, clip_norm: float) -> None:
    """One step of the optimiser at a learning rate, each module's gradient clipped on its own."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for module in modules.values():
        nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    optimiser.step()


def _rows_of_step(train: np.ndarray, settings: DistillSettings, step: int) -> np.ndarray:
    """Windows [B, T] of a step: the pool in a new order every time it is used up."""
    picks, first = [], step * settings.batch_size
    for position in range(first, first + settings.batch_size):
        epoch, index = divmod(position, len(train))
        picks.append(np.random.default_rng([settings.seed, epoch]).permutation(len(train))[index])
    return train[picks]


@torch.no_grad()
def _fit_out_proj(run: Distillation, modules: dict[int, nn.Module], settings: DistillSettings) -> None:
    """Set every sidecar's out_proj to the ridge regression of attention's output on the features that it projects.

    A random scan is a rich enough set of features that most of the first hundreds of gradient steps are saved, and the
    output starts at the target's own scale.
    """
    grams, crosses = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)
    features: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for module in modules.values():
            hook = module.mixer.out_proj.register_forward_pre_hook(lambda _module, args: features.append(args[0]))
            hooks.enter_context(hook)
        for step in range(min(RIDGE_BATCHES, settings.steps)):
            ids = _batch(_rows_of_step(run.train, settings, step), run.model)
            captured = attention_pairs(run.model, list(modules), ids, settings.bf16)
            for layer, module in modules.items():
                inputs, target = captured.pop(layer)
                module(inputs)
                given = features.pop().flatten(0, 1).double()
                grams[layer] = grams[layer] + given.T @ given
                crosses[layer] = crosses[layer] + given.T @ target.flatten(0, 1).double()
    for layer, module in modules.items():
        ridge = RIDGE * grams[layer].diagonal().mean().clamp_min(1e-12)
        gram = grams[layer] + ridge * torch.eye(len(grams[layer])).to(grams[layer])
        module.mixer.out_proj.weight.copy_(torch.linalg.solve(gram, crosses[layer]).T)


def fast_bf16(model: nn.Module) -> bool:
    """Whether bfloat16 autocast makes training faster: for a float32 model on a processor that has bfloat16 matmuls."""
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(model.dtype == torch.float32 and model.device.type == "cpu" and fast)


def _batch(windows: np.ndarray, model: nn.Module) -> torch.Tensor:
    return torch.as_tensor(windows).to(model_device(model))


def _means(batches: Sequence[dict[tuple, torch.Tensor]]) -> dict[tuple, float]:
    """Each value's mean over batches."""
    return {key: float(np.mean([float(values[key]) for values in batches])) for key in batches[0]}


def _generator(*seeds: int) -> torch.Generator:
    """A CPU generator for (seed, purpose, step): the same draws on every device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))


def _detached(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _index_entry(run: Distillation, settings: DistillSettings, validation: dict) -> dict:
    """What `sidecars.json` says of a stage: the settings that change the weights, the last validation, the tokens."""
    hidden = ("validate_every", "checkpoint_every")
    public = {name: value for name, value in asdict(settings).items() if name not in hidden}
    tokens = settings.steps * settings.batch_size * run.train.shape[1]
    return {"settings": public} | validation | {"tokens": tokens}

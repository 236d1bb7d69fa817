"""How the shipped checkpoints are trained: their objectives, forward passes that compile well, and the loop.

assets/blockffn-tiny has the language-model loss together with BlockFFN's two objectives (arXiv 2507.08771), activation
locality and chunk-level sparsification; assets/mixtral-tiny, a model of Mixtral's routing shape (32 layers, 8 experts,
top-2), has the load-balancing loss of the Switch Transformer (arXiv 2101.03961) on every layer by itself.
"""

import csv
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from src.models.blockffn import BlockFFNForCausalLM
from src.models.pretraining_text import BOS, DOMAIN_SHARES, VOCAB, TextRows, make_batch
from src.models.recall_heads import init_recall_heads

MODELS = {"blockffn": BlockFFNForCausalLM, "mixtral": MixtralForCausalLM}
SAVE_SECONDS = 120


class Phase(NamedTuple):
    """A part of the curriculum: it lasts `until` so many millions of tokens, in steps of `rows` rows of `length` tokens.

    `recall_share` of the rows are recall sequences, whose difficulty rises from `easiest` to `hardest`.
    """

    name: str
    until: float
    length: int
    rows: int
    recall_share: float = 0.0
    easiest: float = 0.0
    hardest: float = 0.0


PHASES = {
    "blockffn": [
        Phase("recall", 0.5, 256, 16, 0.6, 0.0, 0.5),
        Phase("mixed", 2.2, 512, 16, 0.1, 0.5, 1.0),
        Phase("long", math.inf, 1024, 8, 0.1, 1.0, 1.0),
    ],
    "mixtral": [
        Phase("start", 1.0, 256, 8),  # few tokens a step: 32 layers need many steps to leave the unigram level
        Phase("short", 6.0, 256, 16),
        Phase("middle", 13.0, 512, 16),
        Phase("long", math.inf, 1024, 8),
    ],
}
# Weights of the second and third loss, next to the language-model loss; Mixtral's third is only logged.
AUXILIARY = {
    "blockffn": {"locality": 2e-3, "sparsification": 5e-2},
    "mixtral": {"load_balancing": 0.3, "smallest_share": 0.0},  # about 0.01 for each of the 32 layers
}
PROBES = ["easy_span_first", "easy_span_second", "random_span_first", "random_span_second"]
LOGGED_DOMAINS = ["valid_prose", "valid_code", "valid_math"]


@dataclass(frozen=True)
class TrainingSettings:
    """What one training is made with."""

    arch: str  # blockffn or mixtral
    shape: Path  # folder of a config.json, which says how large the model is
    cache: Path  # folder of the token arrays, of the state and of the log
    device: torch.device
    tokens: int  # of the whole training
    minutes: float  # of this run at most
    lr: float  # at its peak
    log_every: int  # steps
    compiled: bool  # whether torch.compile fuses the layers
    start_from: Path | None  # exported folder to go on from, where no state is saved
    seed: int  # of the weights and of the batches


def state_file(cache: Path, arch: str) -> Path:
    """Where training keeps weights, optimiser and position."""
    return cache / f"state_{arch}.pt"


def log_file(cache: Path, arch: str) -> Path:
    """The curve of a training."""
    return cache / f"train_log_{arch}.csv"


@dataclass
class Position:
    """Optimiser steps and tokens so far, and the tokens seen when the optimiser was new."""

    step: int = 0
    tokens: int = 0
    begin: int = 0


# -- models
def new_model(arch: str, shape: Path, seed: int) -> nn.Module:
    """An untrained float32 model of the size that the config.json in the folder `shape` states, started as its kind is."""
    model = MODELS[arch](MODELS[arch].config_class.from_pretrained(shape))
    if arch == "mixtral":
        init_deep_residuals(model)
    else:
        init_recall_heads(model, seed=seed)
    return model


@torch.no_grad()
def init_deep_residuals(model: nn.Module) -> None:
    """Divide the matrices that write to the residual stream by sqrt(2 L), as GPT-2 does; 32 layers need it."""
    layers = model.model.layers
    for layer in layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
            weight /= math.sqrt(2 * len(layers))


# -- objectives
def locality_loss(router_logits: torch.Tensor, same_document: torch.Tensor, sharpness: float = 100.0) -> torch.Tensor:
    """Activation locality (arXiv 2507.08771): BCE-with-logits of (a z[t-1], sigmoid(a z[t])), mean over all of them.

    router_logits [B, T, E] of a layer; same_document [B, T-1] is 1 where t-1 and t share a document.
    """
    z = router_logits.float() * sharpness
    loss = F.binary_cross_entropy_with_logits(z[:, :-1], torch.sigmoid(z[:, 1:]), reduction="none").mean(-1)
    return (loss * same_document).sum() / same_document.sum()


def chunk_sparsification_loss(router_logits: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """Chunk sparsification (arXiv 2507.08771): 1 - mean over (chunk, expert) of exp(sum_t ln(1 - p[t, e] + 1e-5)).

    router_logits [B, T, E] of a layer. p are the post-ReLU activations divided by their sum over experts: how likely
    the chunk uses expert e.
    """
    activations = torch.relu(router_logits.float())
    p = activations / (activations.sum(-1, keepdim=True) + 1e-6)
    p = p.unflatten(1, (-1, chunk))
    return 1.0 - torch.log(1.0 - p + 1e-5).sum(2).clamp(max=0.0).exp().mean()


def head_loss(model: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token NLL in nats; hidden [B, T, D], labels [B, T]."""
    logits = model.lm_head(model.model.norm(hidden) / getattr(model.config, "logits_scaling", 1.0))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def blockffn_layer(layer, hidden, cos, sin, same_document):
    """One layer of the training forward: the layer's own modules, called in a way that torch.compile fuses on CPU.

    Returns the layer's output [B, T, D] and its two router objectives, scalars.
    """
    mixed, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), position_embeddings=(cos, sin), attention_mask=None
    )
    hidden = hidden + mixed * layer.residual_scale
    normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    router_logits = mlp.router_proj(normed)
    gates = mlp.router_norm(mlp.router_act_fn(router_logits))
    inner = mlp.act_fn(mlp.up_proj(normed)).unflatten(-1, (mlp.num_experts, mlp.expert_size)) * gates.unsqueeze(-1)
    hidden = hidden + mlp.down_proj(inner.flatten(-2)) * layer.residual_scale
    return hidden, locality_loss(router_logits, same_document), chunk_sparsification_loss(router_logits)


def mixtral_mixer(layer, hidden, cos, sin):
    """The part of a Mixtral layer whose shapes are fixed: (hidden, its norm, router logits, weights, expert ids)."""
    mixed, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), position_embeddings=(cos, sin), attention_mask=None
    )
    hidden = hidden + mixed
    normed = layer.post_attention_layernorm(hidden)
    return hidden, normed, *layer.mlp.gate(normed)


def blockffn_losses(
    model: nn.Module, ids: torch.Tensor, layer_fn: Callable = blockffn_layer, head_fn: Callable = head_loss
) -> tuple[torch.Tensor, ...]:
    """(NLL, locality, sparsification) of a batch of ids [B, T], each a scalar, the last two averaged over layers."""
    hidden, cos, sin = _embedded(model, ids)
    same_document = (ids[:, 1:] != BOS).float()
    locality = sparsification = 0.0
    for layer in model.model.layers:
        hidden, a, b = layer_fn(layer, hidden, cos, sin, same_document)
        locality, sparsification = locality + a, sparsification + b
    count = len(model.model.layers)
    return head_fn(model, hidden[:, :-1], ids[:, 1:]), locality / count, sparsification / count


def mixtral_losses(
    model: nn.Module, ids: torch.Tensor, layer_fn: Callable = mixtral_mixer, head_fn: Callable = head_loss
) -> tuple[torch.Tensor, ...]:
    """(NLL, load balancing, smallest share) of a batch of ids [B, T], each a scalar.

    The load-balancing loss (arXiv 2101.03961, equations 4-6) is the mean over layers of each layer's own: over all
    layers together, as transformers adds it up, experts idle in one layer would be excused by being busy in another.
    The smallest share is that of the (layer, expert) with the fewest of its layer's choices in this batch.
    """
    config = model.config
    hidden, cos, sin = _embedded(model, ids)
    balancing, smallest = 0.0, 1.0
    for layer in model.model.layers:
        hidden, normed, logits, weights, chosen = layer_fn(layer, hidden, cos, sin)
        hidden = hidden + layer.mlp.experts(normed.flatten(0, 1), chosen, weights).view_as(hidden)
        balancing = balancing + load_balancing_loss_func(
            (logits,), config.num_local_experts, config.num_experts_per_tok
        )
        counts = torch.bincount(chosen.flatten(), minlength=config.num_local_experts)
        smallest = min(smallest, counts.min().item() / chosen.numel())
    nll = head_fn(model, hidden[:, :-1], ids[:, 1:])
    return nll, balancing / len(model.model.layers), torch.tensor(smallest)


def _embedded(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings [B, T, D] of ids [B, T], and RoPE's cosines and sines."""
    hidden = model.model.embed_tokens(ids)
    return hidden, *model.model.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])


# -- what is watched
@torch.no_grad()
def token_nll(model: nn.Module, ids: torch.Tensor, batch_tokens: int = 4096) -> torch.Tensor:
    """NLL in nats of ids[:, 1:], [N, T-1] float32, in batches of at most `batch_tokens` (a row at least)."""
    rows = []
    for part in ids.split(max(1, batch_tokens // ids.shape[1])):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        rows.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(rows)


def span_nll(model: nn.Module, spans: np.ndarray) -> tuple[float, float]:
    """Mean NLL in nats of the first and of the second occurrence of spans [N, S] of ids, each behind <s>."""
    ids = np.concatenate([np.full((len(spans), 1), BOS), spans, spans], axis=1)
    nll = token_nll(model, torch.from_numpy(ids).to(model.device))
    return nll[:, : spans.shape[1]].mean().item(), nll[:, spans.shape[1] :].mean().item()


def probe_recall(model: nn.Module, alphabet_size: int, span_length: int, rows: int = 8, seed: int = 1):
    """`span_nll` of random spans, each over an alphabet of its own."""
    rng = np.random.default_rng(seed)
    spans = np.stack([rng.choice(rng.integers(2, VOCAB, alphabet_size), size=span_length) for _ in range(rows)])
    return span_nll(model, spans)


def watched(model: nn.Module, cache: Path, length: int) -> list[float]:
    """NLL of PROBES, and of LOGGED_DOMAINS on 4 rows [length] each, the same at every call."""
    model.eval()
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        values = [*probe_recall(model, 16, 32), *probe_recall(model, VOCAB, 64)]
        for name in LOGGED_DOMAINS:
            ids = TextRows(cache, name).rows(np.random.default_rng(0), 4, length)
            values.append(token_nll(model, ids.to(model.device)).mean().item())
    model.train()
    return values


# -- training
def phase_at(arch: str, tokens: int) -> tuple[Phase, float]:
    """The phase after a number of tokens, and the difficulty of its recall rows there."""
    begin = 0.0
    for phase in PHASES[arch]:
        if tokens < phase.until * 1e6:
            progress = (tokens / 1e6 - begin) / (phase.until - begin)
            return phase, phase.easiest + (phase.hardest - phase.easiest) * progress
        begin = phase.until
    raise AssertionError("the last phase never ends")


def learning_rate(
    tokens: int, total: int, peak: float, begin: int = 0, warmup: float = 0.2e6, decay: float = 0.2
) -> float:
    """Warm-up after `begin` tokens (where the optimiser was new), constant, then linear to a fiftieth (WSD).

    The decay takes the last `decay` share of `total` tokens.
    """
    left = max(0.0, total - tokens) / (decay * total)
    return peak * min(1.0, (tokens - begin) / warmup + 0.02) * (0.02 + 0.98 * min(1.0, left))


def train(settings: TrainingSettings) -> Position:
    """Train from the saved state, or from scratch, until `tokens` are seen or `minutes` have passed; returns where."""
    torch.manual_seed(settings.seed)
    model = new_model(settings.arch, settings.shape, settings.seed).train().to(settings.device)
    optimizer = _optimizer(model, settings.lr)
    position = _restored(settings, model, optimizer)
    losses_of = _objective(settings, model)
    weights = AUXILIARY[settings.arch]
    domains = {name: TextRows(settings.cache, name) for name in DOMAIN_SHARES}
    started = last_saved = time.time()
    first_tokens = position.tokens
    bar = tqdm(total=settings.tokens, initial=first_tokens, unit="tok", unit_scale=True, mininterval=10)
    with bar, open(log_file(settings.cache, settings.arch), "a", newline="") as log:
        writer = csv.writer(log, lineterminator="\n")
        if log.tell() == 0:
            columns = ["step", "tokens", "phase", "nll", *weights, "gradient_norm", "learning_rate"]
            writer.writerow([*columns, *PROBES, *LOGGED_DOMAINS, "tokens_per_second"])
        while position.tokens < settings.tokens and time.time() - started < settings.minutes * 60:
            phase, difficulty = phase_at(settings.arch, position.tokens)
            # by step, so that a resumed run sees the same batches
            rng = np.random.default_rng([settings.seed, position.step])
            ids = make_batch(rng, domains, phase.rows, phase.length, phase.recall_share, difficulty)
            rate = learning_rate(position.tokens, settings.tokens, settings.lr, position.begin)
            losses, norm = _take_step(model, optimizer, losses_of, ids.to(settings.device), rate, weights)
            position.step, position.tokens = position.step + 1, position.tokens + ids.numel()
            bar.update(ids.numel())
            if position.step % settings.log_every == 0:
                speed = (position.tokens - first_tokens) / (time.time() - started)
                values = [*losses, *watched(model, settings.cache, min(phase.length, 512))]
                texts = [f"{value:.4f}" for value in values]
                texts[len(losses) : len(losses)] = [f"{norm:.3f}", f"{rate:.2e}"]
                writer.writerow([position.step, position.tokens, phase.name, *texts, f"{speed:.0f}"])
                log.flush()
            if time.time() - last_saved > SAVE_SECONDS:
                _save(settings, model, optimizer, position)
                last_saved = time.time()
    _save(settings, model, optimizer, position)
    return position


def _optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def _objective(settings: TrainingSettings, model: nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """ids [B, T] -> NLL and the two losses of AUXILIARY."""
    losses, layer_fn, head_fn = blockffn_losses, blockffn_layer, head_loss
    if settings.arch == "mixtral":
        losses, layer_fn = mixtral_losses, mixtral_mixer
    if settings.compiled:
        layer_fn, head_fn = torch.compile(layer_fn, dynamic=False), torch.compile(head_fn, dynamic=False)
    return functools.partial(losses, model, layer_fn=layer_fn, head_fn=head_fn)


def _take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses_of: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    ids: torch.Tensor,
    rate: float,
    weights: dict[str, float],
) -> tuple[list[float], float]:
    """One optimiser step on ids [B, T]; returns its three losses and the norm of the gradient before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        nll, *auxiliary = losses_of(ids)
    (nll + sum(weight * value for weight, value in zip(weights.values(), auxiliary, strict=True))).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [value.item() for value in (nll, *auxiliary)], norm.item()


def _restored(settings: TrainingSettings, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Load the saved state, else the weights of `start_from`, else nothing; returns where training stands."""
    saved = state_file(settings.cache, settings.arch)
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=settings.device)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        position = Position(**state)
        print(f"resumed at step {position.step}, {position.tokens / 1e6:.2f} M tokens")
    elif settings.start_from:
        folder = settings.start_from
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())
        seen = json.loads((folder / "training.json").read_text())
        position = Position(seen["steps"], seen["tokens_seen"], seen["tokens_seen"])
        print(f"goes on from {folder}: {position.tokens / 1e6:.2f} M tokens, with a new optimiser")
    else:
        position = Position()
    return position


def _save(settings: TrainingSettings, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    file = state_file(settings.cache, settings.arch)
    temporary = file.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **asdict(position)}, temporary)
    temporary.replace(file)

"""How the shipped checkpoints are trained: their objectives, forward passes that compile well, and the loop.

assets/blockffn-tiny has the language-model loss together with BlockFFN's two objectives (arXiv 2507.08771), activation
locality and chunk-level sparsification; assets/mixtral-tiny, a model of Mixtral's routing shape (32 layers, 8 experts,
top-2), has the load-balancing loss of the Switch Transformer (arXiv 2101.03961) on every layer by itself.
"""

import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from src.models.blockffn import BlockFFNForCausalLM
from src.models.pretraining_text import BOS, DOMAIN_SHARES, VOCAB, TextRows, make_batch, phase_at
from src.models.recall_heads import init_recall_heads

MODELS = {"blockffn": BlockFFNForCausalLM, "mixtral": MixtralForCausalLM}
SAVE_SECONDS = 120
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


def training_files(cache: Path, arch: str) -> tuple[Path, Path]:
    """Where training keeps its state (weights, optimiser, position), and its log."""
    return cache / f"state_{arch}.pt", cache / f"train_log_{arch}.csv"


# -- models
@torch.no_grad()
def new_model(arch: str, shape: Path, seed: int) -> nn.Module:
    """An untrained float32 model of the size that the config.json in the folder `shape` states.

    Mixtral's matrices that write to the residual stream are divided by sqrt(2 L), as in GPT-2; 32 layers need it.
    """
    model = MODELS[arch](MODELS[arch].config_class.from_pretrained(shape))
    layers = model.model.layers
    if arch == "blockffn":
        init_recall_heads(model, seed=seed)
        return model
    for layer in layers:
        layer.self_attn.o_proj.weight /= math.sqrt(2 * len(layers))
        layer.mlp.experts.down_proj /= math.sqrt(2 * len(layers))
    return model


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

    Compiling the model's own layers, with hooks on their routers, takes 30 % longer a step. Returns the layer's output
    [B, T, D] and its two router objectives, scalars.
    """
    hidden = hidden + _mixed(layer, hidden, cos, sin) * layer.residual_scale
    normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    router_logits = mlp.router_proj(normed)
    gates = mlp.router_norm(mlp.router_act_fn(router_logits))
    inner = mlp.act_fn(mlp.up_proj(normed)).unflatten(-1, (mlp.num_experts, mlp.expert_size)) * gates.unsqueeze(-1)
    hidden = hidden + mlp.down_proj(inner.flatten(-2)) * layer.residual_scale
    return hidden, locality_loss(router_logits, same_document), chunk_sparsification_loss(router_logits)


def mixtral_mixer(layer, hidden, cos, sin):
    """The part of a Mixtral layer whose shapes are fixed: (hidden, its norm, router logits, weights, expert ids)."""
    hidden = hidden + _mixed(layer, hidden, cos, sin)
    normed = layer.post_attention_layernorm(hidden)
    return hidden, normed, *layer.mlp.gate(normed)


def _mixed(layer, hidden, cos, sin):
    """The output [B, T, D] of a layer's attention."""
    normed = layer.input_layernorm(hidden)
    return layer.self_attn(hidden_states=normed, position_embeddings=(cos, sin), attention_mask=None)[0]


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
        experts = config.num_local_experts
        balancing = balancing + load_balancing_loss_func((logits,), experts, config.num_experts_per_tok)
        counts = torch.bincount(chosen.flatten(), minlength=experts)
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


def probe_recall(model: nn.Module, alphabet_size: int, span_length: int) -> tuple[float, float]:
    """`span_nll` of 8 random spans, each over an alphabet of its own, the same at every call."""
    rng = np.random.default_rng(1)
    spans = np.stack([rng.choice(rng.integers(2, VOCAB, alphabet_size), size=span_length) for _ in range(8)])
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


# The losses of an architecture, and the functions that they are made of, which can be compiled.
LOSSES = {
    "blockffn": (blockffn_losses, blockffn_layer, head_loss), "mixtral": (mixtral_losses, mixtral_mixer, head_loss),
}  # fmt: skip


# -- training
def learning_rate(tokens: int, total: int, peak: float, begin: int = 0) -> float:
    """0.2 M tokens of warm-up after `begin` (where the optimiser was new), constant, then, over the last fifth of
    `total` tokens, linear to a fiftieth (WSD)."""
    left = max(0.0, total - tokens) / (0.2 * total)
    return peak * min(1.0, (tokens - begin) / 0.2e6 + 0.02) * (0.02 + 0.98 * min(1.0, left))


class Training:
    """A model, its optimiser and where it stands; saved as one file, from which a later run goes on.

    `step` and `tokens` count what was done so far, `begin` is the tokens seen when the optimiser was new.
    """

    def __init__(self, settings: TrainingSettings):
        """From the saved state, else from the weights of `start_from`, else from a new model."""
        self.settings = settings
        self.step = self.tokens = self.begin = 0
        torch.manual_seed(settings.seed)
        self.model = new_model(settings.arch, settings.shape, settings.seed).train().to(settings.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
        self.file, self.log = training_files(settings.cache, settings.arch)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True, map_location=settings.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens, self.begin = state["step"], state["tokens"], state["begin"]
            print(f"resumed at step {self.step}, {self.tokens / 1e6:.2f} M tokens")
        elif settings.start_from:
            exported = type(self.model).from_pretrained(settings.start_from, dtype=torch.float32)
            self.model.load_state_dict(exported.state_dict())
            seen = json.loads((settings.start_from / "training.json").read_text())
            self.step, self.tokens, self.begin = seen["steps"], seen["tokens_seen"], seen["tokens_seen"]
            print(f"goes on from {settings.start_from}: {self.tokens / 1e6:.2f} M tokens, with a new optimiser")
        self.losses, *self.functions = LOSSES[settings.arch]
        if settings.compiled:
            self.functions = [torch.compile(function, dynamic=False) for function in self.functions]

    def take_step(self, ids: torch.Tensor, rate: float) -> tuple[list[float], float]:
        """One optimiser step on ids [B, T]; returns its three losses and the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            nll, *auxiliary = self.losses(self.model, ids, *self.functions)
        weights = AUXILIARY[self.settings.arch].values()
        (nll + sum(weight * value for weight, value in zip(weights, auxiliary, strict=True))).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + ids.numel()
        return [value.item() for value in (nll, *auxiliary)], norm.item()

    def save(self) -> None:
        """Replace the saved state by the present one."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self.file.with_suffix(".tmp")
        torch.save(state | {"step": self.step, "tokens": self.tokens, "begin": self.begin}, temporary)
        temporary.replace(self.file)


def train(settings: TrainingSettings) -> Training:
    """Train from the saved state, or from scratch, until `tokens` are seen or `minutes` have passed, and save that."""
    training = Training(settings)
    domains = {name: TextRows(settings.cache, name) for name in DOMAIN_SHARES}
    started = last_saved = time.time()
    first_tokens = training.tokens
    bar = tqdm(total=settings.tokens, initial=first_tokens, unit="tok", unit_scale=True, mininterval=10)
    with bar, open(training.log, "a", newline="") as log:
        writer = csv.writer(log, lineterminator="\n")
        if log.tell() == 0:
            columns = ["step", "tokens", "phase", "nll", *AUXILIARY[settings.arch], "gradient_norm", "learning_rate"]
            writer.writerow([*columns, *PROBES, *LOGGED_DOMAINS, "tokens_per_second"])
        while training.tokens < settings.tokens and time.time() - started < settings.minutes * 60:
            phase, difficulty = phase_at(settings.arch, training.tokens)
            rng = np.random.default_rng([settings.seed, training.step])  # so that a resumed run sees the same batches
            ids = make_batch(rng, domains, phase, difficulty).to(settings.device)
            rate = learning_rate(training.tokens, settings.tokens, settings.lr, training.begin)
            losses, norm = training.take_step(ids, rate)
            bar.update(ids.numel())
            if training.step % settings.log_every == 0:
                speed = (training.tokens - first_tokens) / (time.time() - started)
                row = [f"{value:.4f}" for value in losses] + [f"{norm:.3f}", f"{rate:.2e}"]
                row += [f"{value:.4f}" for value in watched(training.model, settings.cache, min(phase.length, 512))]
                writer.writerow([training.step, training.tokens, phase.name, *row, f"{speed:.0f}"])
                log.flush()
            if time.time() - last_saved > SAVE_SECONDS:
                training.save()
                last_saved = time.time()
    training.save()
    return training

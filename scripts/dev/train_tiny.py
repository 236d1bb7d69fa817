"""Train the small models that ship in assets/, from text to model card figures.

    python train_tiny.py prepare --wikipedia DIR --gsm8k FILE --mbpp FILE   text -> tokenizer and token arrays
    python train_tiny.py train [--arch mixtral]                             resumable; logs a CSV
    python train_tiny.py export [--arch mixtral]                            last state -> assets/<arch>-tiny
    python train_tiny.py evaluate [--arch mixtral]                          the card's figures

`--arch blockffn` (the default) trains assets/blockffn-tiny: the language-model loss together with BlockFFN's two
objectives (arXiv 2507.08771), activation locality and chunk-level sparsification. A curriculum of recall sequences
comes first, because a model of this size does not learn in-context copying from 30 M tokens of prose alone, and
without it attention would have nothing to do that a state-space sidecar could not.

`--arch mixtral` trains assets/mixtral-tiny, a model of Mixtral's routing shape (32 layers, 8 experts, top-2), with the
load-balancing loss of the Switch Transformer (arXiv 2101.03961) on every layer by itself.
"""

import argparse
import ast
import csv
import functools
import json
import lzma
import math
import shutil
import sys
import sysconfig
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.base.stats import cluster_bootstrap  # noqa: E402
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM  # noqa: E402

BOS, EOS = 0, 1
VOCAB = 4096


# ---------------------------------------------------------------- text


def read_jsonl_xz(path):
    with lzma.open(path, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def standard_library_modules():
    """Source texts of Python's own library, without pydoc_data (evaluation text) and the tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "pydoc_data", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        if skip.isdisjoint(path.relative_to(root).parts) and 2_000 < path.stat().st_size < 400_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            ast.parse(text)
            texts.append(text)
    return texts


def prepare(args):
    """Write tokenizer.json and one uint16 array (+ document offsets) per domain and split."""
    args.cache.mkdir(parents=True, exist_ok=True)
    prose = []
    for path in sorted(Path(args.wikipedia).glob("train-*.jsonl.xz"))[: args.shards]:
        prose += read_jsonl_xz(path)
    gsm = [json.loads(line) for line in open(args.gsm8k)]
    gsm = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in gsm]
    mbpp = [json.loads(line) for line in open(args.mbpp)]
    tasks = {r["task_id"]: f'"""{r["text"]}"""\n' + r["code"].replace("\r\n", "\n") + "\n" for r in mbpp}
    library = standard_library_modules()
    held_out = set(range(0, len(library), 20))  # every 20th module is validation
    texts = {
        "prose": prose,
        "code": [t for i, t in enumerate(library) if i not in held_out] + [t for k, t in tasks.items() if k >= 601],
        "math": gsm[:-300],
        "valid_prose": read_jsonl_xz(Path(args.wikipedia) / "valid.jsonl.xz"),
        "valid_code": [library[i] for i in sorted(held_out)],
        "valid_mbpp": [t for k, t in tasks.items() if 11 <= k <= 510],
        "valid_math": gsm[-300:],
    }
    tokenizer_file = args.cache / "tokenizer.json"
    if not tokenizer_file.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        sample = texts["prose"][:1500] + texts["code"][::3] + texts["math"][::2]
        tokenizer.train_from_iterator(sample, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    for name, documents in texts.items():
        pieces, offsets, size = [], [0], 0
        for start in tqdm(range(0, len(documents), 256), desc=name):
            for encoding in tokenizer.encode_batch(documents[start : start + 256]):
                pieces.append(np.array([*encoding.ids, EOS], dtype=np.uint16))
                size += len(pieces[-1])
                offsets.append(size)
        np.save(args.cache / f"{name}.npy", np.concatenate(pieces))
        np.save(args.cache / f"{name}.offsets.npy", np.array(offsets))
        characters = sum(map(len, documents))
        print(f"{name}: {len(documents)} documents, {size} tokens, {characters / size:.2f} characters per token")


# ---------------------------------------------------------------- sequences


def recall_sequence(rng, length, alphabet_size, span_length):
    """Token ids [length] whose later parts can only be predicted by looking up earlier ones.

    One of three tasks over an alphabet drawn from the whole vocabulary: a random span repeated, spans of a small pool
    concatenated at random, or a list of key-value pairs queried in random order.
    """
    alphabet = rng.integers(2, VOCAB, size=alphabet_size)
    kind = rng.random()
    if kind < 0.5:
        span = rng.choice(alphabet, size=span_length)
        body = np.tile(span, length // span_length + 1)
    elif kind < 0.8:
        pool = rng.choice(alphabet, size=(rng.integers(2, 6), span_length))
        body = pool[rng.integers(len(pool), size=length // span_length + 1)].ravel()
    else:
        count = max(2, min(alphabet_size // 2, length // 8))
        keys = rng.permutation(np.unique(alphabet))[:count]
        values = rng.choice(alphabet, size=len(keys))
        order = np.concatenate([np.arange(len(keys)), rng.integers(len(keys), size=length)])
        body = np.stack([keys[order], values[order]], axis=1).ravel()
    return np.concatenate([[BOS], body])[:length]


def paste_earlier_span(rng, row):
    """Repeat a random span of a text row [T] further on in it, in place: names and quotations do this in long texts."""
    span = int(rng.integers(16, min(128, len(row) // 4) + 1))
    source = int(rng.integers(1, len(row) - 2 * span))
    target = int(rng.integers(source + span, len(row) - span))
    row[target : target + span] = row[source : source + span].copy()


class TextRows:
    """Rows of one domain: long documents from their start or at a later chunk, short ones packed one after another."""

    def __init__(self, cache, name):
        self.tokens = np.load(cache / f"{name}.npy", mmap_mode="r")
        self.offsets = np.load(cache / f"{name}.offsets.npy")

    def row(self, rng, length):
        """A row [length] of int64 ids that starts with <s>."""
        pieces, size = [], 0
        while size < length:
            document = rng.integers(len(self.offsets) - 1)
            start, stop = self.offsets[document], self.offsets[document + 1]
            chunks = max(1, (stop - start) // length)
            start = start + length * rng.integers(chunks)
            piece = np.array(self.tokens[start : min(stop, start + length - size)], dtype=np.int64)
            piece[0] = BOS
            pieces.append(piece)
            size += len(piece)
        return np.concatenate(pieces)[:length]


def make_batch(rng, domains, rows, length, recall_share, difficulty):
    """One batch [rows, length] of int64 ids: text rows and `recall_share` recall rows.

    `difficulty` in [0, 1] widens the recall alphabet from 8 towards the whole vocabulary and the spans up to length/3.
    """
    batch = np.empty((rows, length), dtype=np.int64)
    for i in range(rows):
        if rng.random() < recall_share:
            alphabet = int(2 ** rng.uniform(3, 4 + 8 * difficulty))
            span = int(2 ** rng.uniform(2.5, 4 + (math.log2(length / 3) - 4) * difficulty))
            batch[i] = recall_sequence(rng, length, alphabet, span)
        else:
            name = rng.choice(["prose", "code", "math"], p=[0.72, 0.18, 0.10])
            batch[i] = domains[name].row(rng, length)
            if rng.random() < 0.1:
                paste_earlier_span(rng, batch[i])
    return torch.from_numpy(batch)


# ---------------------------------------------------------------- objectives


def locality_loss(router_logits, same_document, sharpness=100.0):
    """Activation locality (arXiv 2507.08771): BCE-with-logits of (a z[t-1], sigmoid(a z[t])), mean over all of them.

    router_logits: list over layers of [B, T, E]; same_document [B, T-1] is 1 where t-1 and t share a document.
    """
    total = 0.0
    for z in router_logits:
        z = z.float() * sharpness
        loss = F.binary_cross_entropy_with_logits(z[:, :-1], torch.sigmoid(z[:, 1:]), reduction="none").mean(-1)
        total = total + (loss * same_document).sum() / same_document.sum()
    return total / len(router_logits)


def chunk_sparsification_loss(router_logits, chunk=64):
    """Chunk sparsification (arXiv 2507.08771): 1 - mean over (chunk, expert) of exp(sum_t ln(1 - p[t, e] + 1e-5)).

    p are the post-ReLU activations divided by their sum over experts: how likely the chunk uses expert e.
    """
    total = 0.0
    for z in router_logits:
        activations = torch.relu(z.float())
        p = activations / (activations.sum(-1, keepdim=True) + 1e-6)
        p = p.unflatten(1, (-1, chunk))
        total = total + (1.0 - torch.log(1.0 - p + 1e-5).sum(2).clamp(max=0.0).exp().mean())
    return total / len(router_logits)


# ---------------------------------------------------------------- training


ROPE = {"rope_type": "default", "rope_theta": 500_000.0}


def tiny_config(num_layers=12):
    """The shape of assets/blockffn-tiny: MiniCPM's muP constants, 32 experts of width 32."""
    return BlockFFNConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=32,
        expert_size=32,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.05,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
        architectures=["BlockFFNForCausalLM"],
    )


def tiny_mixtral_config(num_layers=32):
    """The shape of assets/mixtral-tiny: Mixtral's 32 layers, 8 experts and top-2, at width 128."""
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=BOS,
        eos_token_id=EOS,
        rope_parameters=ROPE,
        initializer_range=0.04,
        tie_word_embeddings=True,
        architectures=["MixtralForCausalLM"],
    )


@torch.no_grad()
def init_deep_residuals(model):
    """Divide the matrices that write to the residual stream by sqrt(2 L), as GPT-2 does; 32 layers need it."""
    layers = model.model.layers
    for layer in layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
            weight /= math.sqrt(2 * len(layers))


@torch.no_grad()
def init_recall_heads(model, previous_layer=1, matching_layers=(4, 5, 6), seed=0):
    """Start some attention heads as a previous-token head and as matching ("induction") heads; training does the rest.

    Two trials from plain random weights learned no in-context copying within the CPU budget. A mimetic start (compare
    arXiv 2305.09828, which sets W_q W_k^T and W_v W_o near multiples of the identity) gives the two-head circuit of
    arXiv 2209.11895: head 0 of `previous_layer` attends to t - 1 through RoPE phases on a constant embedding dimension
    and writes a rotated copy of that token; one head per KV head of each of `matching_layers` looks for the current
    token among those copies, in RoPE's slow dimensions, and copies the token that it finds there to the output.
    """
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows, columns):
        return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T

    config = model.config
    width, half = config.head_dim, config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    embedding = model.model.embed_tokens.weight
    constant = 4.0  # in units of the other dimensions' standard deviation
    embedding[:, 0] = constant * config.initializer_range
    value = constant / math.sqrt(1 + constant**2 / config.hidden_size)  # of that dimension after RMSNorm

    attention = model.model.layers[previous_layer].self_attn
    frequencies = model.model.rotary_emb.inv_freq[:4]  # the fastest pairs tell neighbours apart
    strength = math.sqrt(6.5 * math.sqrt(width)) / value
    query, key = (projection.weight[:width] for projection in (attention.q_proj, attention.k_proj))
    query.zero_(), key.zero_()
    pairs = torch.arange(4)
    query[pairs, 0] = strength
    # RoPE turns the score of a pair at distance d into cos(angle * d - phase): largest at d = 1 for phase = angle
    key[pairs, 0] = strength * torch.cos(frequencies)
    key[half + pairs, 0] = strength * torch.sin(frequencies)
    read = orthonormal(width, config.hidden_size)
    read[:, 0] = 0.0
    rotation = orthonormal(config.hidden_size, config.hidden_size)
    attention.v_proj.weight[:width] = read
    attention.o_proj.weight[:, :width] = 4.0 * rotation @ read.T

    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, width)])
    for layer in matching_layers:
        attention = model.model.layers[layer].self_attn
        for kv in range(config.num_key_value_heads):
            head = kv * group
            match = orthonormal(half, width) @ read
            query = attention.q_proj.weight[head * width : (head + 1) * width].zero_()
            key = attention.k_proj.weight[kv * width : (kv + 1) * width].zero_()
            query[slow], key[slow] = 2.0 * match, 1.0 * match @ rotation.T
            copy = orthonormal(width, config.hidden_size)
            copy[:, 0] = 0.0
            attention.v_proj.weight[kv * width : (kv + 1) * width] = copy
            attention.o_proj.weight[:, head * width : (head + 1) * width] = 2.0 * copy.T


def blocked_causal_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, block=128, is_causal=True, **_from_forward
):
    """Causal attention as batched matrix products over blocks of queries, for training on a CPU.

    Twice as fast as PyTorch's CPU flash kernel here once compiled: bf16 matrix products reach the hardware's own speed
    and a block of queries never touches the keys after it. query [B, H, T, d], key and value [B, H_kv, T, d];
    returns ([B, T, H, d], None) as transformers' attention functions do, which also get what the model's forward was
    given (position ids, flags), unused here. Raises ValueError for what it does not do.
    """
    if attention_mask is not None or dropout or is_causal is False or query.shape[2] != key.shape[2]:
        raise ValueError("blocked_causal_attention is for whole causal rows without padding, dropout or a cache")
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2)
        visible = torch.ones(stop - start, stop, dtype=torch.bool, device=scores.device).tril(start)
        scores = torch.where(visible, scores, float("-inf"))
        outputs.append(torch.softmax(scores, dim=-1) @ value[:, :, :stop])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("blocked_causal", blocked_causal_attention)


class ToSlots(torch.autograd.Function):
    """Rows [T, D] copied to slots [S, D] by gathers in both directions (autograd's own scatter-add is slow on a CPU).

    `source` [S] is the choice (t K + k) in each slot, `slots` [T K] the slot of each choice.
    """

    @staticmethod
    def forward(ctx, rows, source, slots, choices):
        ctx.save_for_backward(slots)
        ctx.choices = choices
        return rows.index_select(0, source // choices)

    @staticmethod
    def backward(ctx, gradient):
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots).unflatten(0, (-1, ctx.choices)).sum(1), None, None, None


class FromSlots(torch.autograd.Function):
    """Slots [S, D] gathered to choices [T K, D]; no gradient reaches the `empty` slots."""

    @staticmethod
    def forward(ctx, values, source, slots, empty):
        ctx.save_for_backward(source, empty)
        return values.index_select(0, slots)

    @staticmethod
    def backward(ctx, gradient):
        source, empty = ctx.saved_tensors
        return gradient.index_select(0, source).index_fill_(0, empty, 0.0), None, None, None


def gated_halves(experts, gate_and_up):
    """act(gate) * up of [S, 2 F]."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def weighted_sum(values, weights):
    """Sum over k of the weighted outputs [T K, D] of each token's experts; weights [T, K]; returns [T, D]."""
    return (values.unflatten(0, weights.shape) * weights.unsqueeze(-1).to(values.dtype)).sum(1)


def padded_experts(experts, hidden, chosen, weights, bucket=128, activate=gated_halves, combine=weighted_sum):
    """Top-k experts as one matrix product per expert over its own tokens, padded to a multiple of `bucket` rows.

    The same function as transformers' own, for training on a CPU: there, `eager` spends most of a step on compiling
    bf16 kernels, one for every new number of rows. hidden [T, D]; chosen (expert ids) and weights [T, K]; returns
    [T, D].
    """
    choices, flat = chosen.shape[1], chosen.flatten()
    counts = torch.bincount(flat, minlength=experts.num_experts)
    padded = (counts + bucket - 1) // bucket * bucket
    sizes = padded.tolist()
    sizes[-1] += flat.numel() // bucket * bucket + (experts.num_experts + 1) * bucket - sum(sizes)  # fixed in all
    start, first = padded.cumsum(0) - padded, counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(flat.numel()) + torch.repeat_interleave(start - first, counts)
    source = order.new_full((sum(sizes),), -1)
    source[slots] = torch.arange(flat.numel())
    empty = (source < 0).nonzero().flatten()
    source = source.clamp(min=0)

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype

    def products(rows, matrices):
        return torch.cat([part @ matrix.T for part, matrix in zip(rows.split(sizes), matrices.to(dtype), strict=True)])

    rows = ToSlots.apply(hidden.to(dtype), source, slots, choices)
    inner = activate(experts, products(rows, experts.gate_up_proj))
    values = FromSlots.apply(products(inner, experts.down_proj), source, slots, empty)
    return combine(values, weights)


def decoder_layer(layer, hidden, cos, sin, same_document):
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
    return hidden, locality_loss([router_logits], same_document), chunk_sparsification_loss([router_logits])


def head_loss(model, hidden, labels):
    """Mean next-token NLL in nats; hidden [B, T, D], labels [B, T]."""
    logits = model.lm_head(model.model.norm(hidden) / getattr(model.config, "logits_scaling", 1.0))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def mixtral_mixer(layer, hidden, cos, sin):
    """The part of a Mixtral layer whose shapes are fixed: (hidden, its norm, router logits, weights, expert ids)."""
    mixed, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), position_embeddings=(cos, sin), attention_mask=None
    )
    hidden = hidden + mixed
    normed = layer.post_attention_layernorm(hidden)
    return hidden, normed, *layer.mlp.gate(normed)


def mixtral_losses(model, ids, layer_fn=mixtral_mixer, head_fn=head_loss):
    """(NLL, load balancing, smallest share) of a batch of ids [B, T], each a scalar.

    The load-balancing loss (arXiv 2101.03961, equations 4-6) is the mean over layers of each layer's own: over all
    layers together, as transformers adds it up, experts idle in one layer would be excused by being busy in another.
    The smallest share is that of the (layer, expert) with the fewest of its layer's choices in this batch.
    """
    config = model.config
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
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


def losses(model, ids, layer_fn=decoder_layer, head_fn=head_loss):
    """(NLL, locality, sparsification) of a batch of ids [B, T], each a scalar, the last two averaged over layers."""
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    same_document = (ids[:, 1:] != BOS).float()
    locality = sparsification = 0.0
    for layer in model.model.layers:
        hidden, a, b = layer_fn(layer, hidden, cos, sin, same_document)
        locality, sparsification = locality + a, sparsification + b
    count = len(model.model.layers)
    return head_fn(model, hidden[:, :-1], ids[:, 1:]), locality / count, sparsification / count


@torch.no_grad()
def probe_recall(model, alphabet_size, span_length, rows=8, seed=1):
    """Mean NLL (nats) of the first and the second occurrence of a random span, two numbers."""
    rng = np.random.default_rng(seed)
    spans = np.stack([rng.choice(rng.integers(2, VOCAB, alphabet_size), size=span_length) for _ in range(rows)])
    ids = torch.from_numpy(np.concatenate([np.zeros((rows, 1), dtype=np.int64), spans, spans], axis=1)).to(model.device)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return nll[:, :span_length].mean().item(), nll[:, span_length:].mean().item()


@torch.no_grad()
def validate(model, cache, domains, rows, length, seed=0):
    """Validation NLL (nats per token) by domain, on the same rows at every call."""
    result = {}
    for name in domains:
        rng, text = np.random.default_rng(seed), TextRows(cache, name)
        ids = torch.from_numpy(np.stack([text.row(rng, length) for _ in range(rows)])).to(model.device)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            result[name] = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    return result


# name, until (millions of tokens), row length, rows per step, share of recall rows, their difficulty at start and end
PHASES = {
    "blockffn": [
        ("recall", 0.5, 256, 16, 0.6, 0.0, 0.5),
        ("mixed", 2.2, 512, 16, 0.1, 0.5, 1.0),
        ("long", math.inf, 1024, 8, 0.1, 1.0, 1.0),
    ],
    "mixtral": [
        (
            "start",
            1.0,
            256,
            8,
            0.0,
            0.0,
            0.0,
        ),  # few tokens a step: 32 layers need many steps to leave the unigram level
        ("short", 6.0, 256, 16, 0.0, 0.0, 0.0),
        ("middle", 13.0, 512, 16, 0.0, 0.0, 0.0),
        ("long", math.inf, 1024, 8, 0.0, 0.0, 0.0),
    ],
}
# weights of the second and third loss, next to the language-model loss; Mixtral's third is only logged
AUXILIARY = {
    "blockffn": {"locality": 2e-3, "sparsification": 5e-2},
    "mixtral": {"load_balancing": 0.3, "smallest_share": 0.0},  # about 0.01 for each of the 32 layers
}


def phase_at(arch, tokens):
    """(name, row length, rows, recall share, difficulty) after a number of tokens."""
    begin = 0.0
    for name, end, length, rows, recall_share, low, high in PHASES[arch]:
        if tokens < end * 1e6:
            progress = 0.0 if math.isinf(end) else (tokens / 1e6 - begin) / (end - begin)
            return name, length, rows, recall_share, low + (high - low) * progress
        begin = end


def learning_rate(tokens, total, peak, begin=0, warmup=0.2e6, decay=0.2):
    """Warm-up after `begin` tokens (where the optimiser was new), constant, then linear to a fiftieth (WSD).

    The decay takes the last `decay` share of `total` tokens.
    """
    left = max(0.0, total - tokens) / (decay * total)
    return peak * min(1.0, (tokens - begin) / warmup + 0.02) * (0.02 + 0.98 * min(1.0, left))


PROBES = "easy_span_first easy_span_second random_span_first random_span_second".split()


def new_model(arch, seed):
    """An untrained model of the shape that ships as assets/<arch>-tiny, float32."""
    if arch == "mixtral":
        model = MixtralForCausalLM(tiny_mixtral_config())
        init_deep_residuals(model)
        return model
    model = BlockFFNForCausalLM(tiny_config())
    init_recall_heads(model, seed=seed)
    return model


def state_path(args):
    """Where training keeps weights, optimiser and position."""
    return args.cache / f"state_{args.arch}.pt"


def train(args):
    """Train from the saved state, or from scratch, until `--tokens` are seen or `--minutes` have passed."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = new_model(args.arch, args.seed).train().to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    state_file, log_file = state_path(args), args.cache / f"train_log_{args.arch}.csv"
    step = tokens = begin = 0
    if not state_file.exists() and args.start_from:
        model.load_state_dict(type(model).from_pretrained(args.start_from, dtype=torch.float32).state_dict())
        seen = json.loads((args.start_from / "training.json").read_text())
        step, begin = seen["steps"], seen["tokens_seen"]
        tokens = begin
        print(f"goes on from {args.start_from}: {tokens / 1e6:.2f} M tokens, with a new optimiser")
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, begin = state["step"], state["tokens"], state.get("begin", 0)
        print(f"resumed at step {step}, {tokens / 1e6:.2f} M tokens")
    if device.type == "cpu":
        model.set_attn_implementation("blocked_causal")
    objective, layer_fn, head_fn = losses, decoder_layer, head_loss
    if args.arch == "mixtral":
        objective, layer_fn = mixtral_losses, mixtral_mixer
    elementwise = {"activate": gated_halves, "combine": weighted_sum}
    if args.compile:
        layer_fn, head_fn = torch.compile(layer_fn, dynamic=False), torch.compile(head_fn, dynamic=False)
        elementwise = {name: torch.compile(function, dynamic=False) for name, function in elementwise.items()}
    if args.arch == "mixtral" and device.type == "cpu":
        ALL_EXPERTS_FUNCTIONS.register("padded", functools.partial(padded_experts, **elementwise))
        model.set_experts_implementation("padded")
    weights = AUXILIARY[args.arch]
    domains = {name: TextRows(args.cache, name) for name in ("prose", "code", "math")}
    started = last_saved = time.time()
    first_tokens = tokens
    log = open(log_file, "a", newline="")
    writer = csv.writer(log, lineterminator="\n")
    if log.tell() == 0:
        columns = ["step", "tokens", "phase", "nll", *weights, "gradient_norm", "learning_rate", *PROBES]
        writer.writerow([*columns, "valid_prose", "valid_code", "valid_math", "tokens_per_second"])
    total = args.tokens * 1e6
    bar = tqdm(total=int(total), initial=tokens, unit="tok", unit_scale=True, mininterval=10)

    def save():
        temporary = state_file.with_suffix(".tmp")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "tokens": tokens, "begin": begin}
        torch.save(state, temporary)
        temporary.replace(state_file)

    while tokens < total and time.time() - started < args.minutes * 60:
        phase, length, rows, recall_share, difficulty = phase_at(args.arch, tokens)
        rng = np.random.default_rng([args.seed, step])  # by step, so that a resumed run sees the same batches
        ids = make_batch(rng, domains, rows, length, recall_share, difficulty).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tokens, total, args.lr, begin)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            nll, *auxiliary = objective(model, ids, layer_fn, head_fn)
        (nll + sum(w * value for w, value in zip(weights.values(), auxiliary, strict=True))).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        bar.update(ids.numel())
        if step % args.log_every == 0:
            model.eval()
            easy, hard = probe_recall(model, 16, 32), probe_recall(model, VOCAB, 64)
            valid = validate(model, args.cache, ("valid_prose", "valid_code", "valid_math"), 4, min(length, 512))
            model.train()
            speed = (tokens - first_tokens) / (time.time() - started)
            row = [
                step,
                tokens,
                phase,
                *(f"{value.item():.4f}" for value in (nll, *auxiliary)),
            ]
            row += [f"{norm.item():.3f}", f"{optimizer.param_groups[0]['lr']:.2e}"]
            row += [f"{value:.4f}" for value in (*easy, *hard, *valid.values())] + [f"{speed:.0f}"]
            writer.writerow(row)
            log.flush()
        if time.time() - last_saved > 120:
            save()
            last_saved = time.time()
    save()
    bar.close()
    print(f"step {step}, {tokens / 1e6:.2f} M tokens; wrote {state_file} and {log_file}")


# ---------------------------------------------------------------- evaluation and export


@contextmanager
def zeroed_attention(model, layers):
    """The model with the attention output of `layers` replaced by zeros."""
    hooks = [
        model.model.layers[i].self_attn.register_forward_hook(lambda _m, _i, out: (torch.zeros_like(out[0]), out[1]))
        for i in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def token_nll(model, ids, batch=4):
    """NLL in nats of ids[:, 1:], [N, T-1], float32."""
    rows = []
    for part in ids.split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        rows.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(rows)


def long_rows(cache, name, count, length):
    """The first `count` documents of a domain that fill a row, [count, length] ids from their beginning."""
    text, rows = TextRows(cache, name), []
    for start, stop in zip(text.offsets[:-1], text.offsets[1:], strict=True):
        if stop - start > length and len(rows) < count:
            row = np.array(text.tokens[start : start + length], dtype=np.int64)
            row[0] = BOS
            rows.append(row)
    return torch.from_numpy(np.stack(rows))


def context_gain(model, cache, name, count, seed=5):
    """What context is worth in one domain, on `count` rows of 1,024 tokens from anywhere in its long documents.

    An article's opening is easier than its middle, whatever the context, so rows start anywhere. Returns NLL in nats
    by position, the positions 64-127 less 512-1,023 (other tokens of the same rows, so noisy), and the same tokens
    scored with 64-127 tokens of context less 512 and more; both differences with an interval over documents.
    """
    rng, text = np.random.default_rng(seed), TextRows(cache, name)
    lengths = np.diff(text.offsets)
    chosen = np.flatnonzero(lengths > 2048)
    documents = np.tile(chosen, count // len(chosen) + 1)[:count]
    starts = text.offsets[documents] + rng.integers(1, lengths[documents] - 1024)
    rows = np.stack([np.array(text.tokens[start : start + 1024], dtype=np.int64) for start in starts])
    rows[:, 0] = BOS
    rows = torch.from_numpy(rows)
    nll = token_nll(model, rows)
    same_tokens = []
    for start in range(512, 1024 - 64, 128):
        short = rows[:, start - 64 : start + 64].clone()
        short[:, 0] = BOS
        same_tokens.append((token_nll(model, short, batch=32)[:, 63:] - nll[:, start - 1 : start + 63]).mean(1))
    edges = [1, 64, 128, 256, 512, 1024]
    by_position = {f"{a}-{b - 1}": nll[:, a - 1 : b - 1].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)}
    result = {"rows": len(rows), "documents": len(np.unique(documents))}
    result["nll_by_position"] = {key: round(values.mean().item(), 4) for key, values in by_position.items()}
    for key, gains in (
        ("positions_64_127_less_512_1023", by_position["64-127"] - by_position["512-1023"]),
        ("same_tokens_short_less_long_context", torch.stack(same_tokens).mean(0)),
    ):
        sums = np.array([[gains[documents == d].sum().item(), (documents == d).sum()] for d in np.unique(documents)])
        interval = cluster_bootstrap(sums[:, 0], sums[:, 1])
        result[key] = {"gain": round(interval.estimate, 4), "ci": [round(interval.low, 4), round(interval.high, 4)]}
    return result


def natural_repeats(ids, tokenizer):
    """Masks [N, T-1] over ids[:, 1:]: first occurrence and later occurrences of rare words within a row.

    A rare word here is a run of tokens of one capitalised word or identifier of at least two tokens; the mask holds its
    tokens after the first, which its own beginning helps to predict in both cases.
    """
    texts = tokenizer.convert_ids_to_tokens(list(range(VOCAB)))
    space = "\u0120"  # how byte-level BPE writes a leading blank; Python counts it as a letter
    begins = np.array([t.startswith(space) or not (t[0].isalnum() or t[0] == "_") for t in texts])
    letters = np.array([t.removeprefix(space).replace("_", "").isalpha() for t in texts])
    first, later = (np.zeros((len(ids), ids.shape[1] - 1), dtype=bool) for _ in range(2))
    for n, row in enumerate(ids.tolist()):
        seen, t = set(), 1
        while t < len(row):
            stop = t + 1
            while stop < len(row) and letters[row[stop]] and not begins[row[stop]]:
                stop += 1
            word = tuple(row[t:stop])
            text = "".join(texts[i] for i in word).removeprefix(space)
            if stop - t >= 2 and letters[row[t]] and (text[:1].isupper() or "_" in text):
                (later if word in seen else first)[n, t : stop - 1] = True
                seen.add(word)
            t = stop
    return first, later


def bits_per_byte(model, tokenizer, cache, rows):
    """Bits per byte of validation text by domain, beside those of a unigram model of the training text."""
    result = {}
    for name, train_name in (
        ("valid_prose", "prose"),
        ("valid_code", "code"),
        ("valid_mbpp", "code"),
        ("valid_math", "math"),
    ):
        text = TextRows(cache, name)
        rng = np.random.default_rng(0)
        ids = torch.from_numpy(np.stack([text.row(rng, 1024) for _ in range(min(24, rows))]))
        values, targets = token_nll(model, ids), ids[:, 1:]
        keep = targets > EOS
        size = sum(len(tokenizer.decode(row[row > EOS]).encode()) for row in ids[:, 1:])
        counts = np.bincount(np.load(cache / f"{train_name}.npy", mmap_mode="r"), minlength=VOCAB) + 1.0
        unigram = torch.from_numpy(-np.log(counts / counts.sum()))
        result[name] = {
            "model": round(values[keep].sum().item() / math.log(2) / size, 4),
            "unigram": round(unigram[targets[keep]].sum().item() / math.log(2) / size, 4),
            "nll_per_token": round(values[keep].mean().item(), 4),
        }
    return result


@torch.no_grad()
def expert_load(model, cache, rows):
    """Share of each layer's expert choices that go to each expert, [L, E], on validation text of all domains."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.float64)
    rng = np.random.default_rng(3)
    for name in ("valid_prose", "valid_code", "valid_mbpp", "valid_math"):
        text = TextRows(cache, name)
        for _ in range(max(1, rows // 4)):
            ids = torch.from_numpy(text.row(rng, 1024))[None]
            logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            for layer, values in enumerate(logits):
                chosen = values.topk(config.num_experts_per_tok, dim=-1).indices
                counts[layer] += torch.bincount(chosen.flatten(), minlength=config.num_local_experts)
    return (counts / counts.sum(1, keepdim=True)).numpy()


def evaluate(args):
    """Everything the model card states about the exported checkpoint, on validation text; writes evaluation.json."""
    tokenizer = AutoTokenizer.from_pretrained(args.assets)
    if args.arch == "mixtral":
        model = MixtralForCausalLM.from_pretrained(args.assets, dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
        load = expert_load(model, args.cache, args.rows)
        result = {
            "smallest_expert_share": round(float(load.min()), 4),
            "largest_expert_share": round(float(load.max()), 4),
            "expert_load": np.round(load, 4).tolist(),
            "bits_per_byte": bits_per_byte(model, tokenizer, args.cache, args.rows),
        }
    else:
        result = evaluate_blockffn(args, tokenizer)
    result |= json.loads((args.assets / "training.json").read_text())
    (args.assets / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"wrote {args.assets / 'evaluation.json'}")


@torch.no_grad()
def evaluate_blockffn(args, tokenizer):
    """Sparsity, the worth of attention and context, recall, and bits per byte of an exported BlockFFN."""
    model = BlockFFNForCausalLM.from_pretrained(args.assets, dtype=torch.float32).eval()
    count = model.config.num_hidden_layers
    result = {}
    long = long_rows(args.cache, "valid_prose", args.rows, 1024)
    active = [[] for _ in range(count)]
    hooks = [
        layer.mlp.router_act_fn.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out > 0))
        for layer, kept in zip(model.model.layers, active, strict=True)
    ]
    nll = token_nll(model, long)
    for hook in hooks:
        hook.remove()
    active = [torch.cat(kept) for kept in active]
    result["tls_per_layer"] = [round(1 - a.float().mean().item(), 4) for a in active]
    result["tls"] = round(float(np.mean(result["tls_per_layer"])), 4)
    result["cls_8_per_layer"] = [round(1 - a.unflatten(1, (-1, 8)).any(2).float().mean().item(), 4) for a in active]
    result["cls_8"] = round(float(np.mean(result["cls_8_per_layer"])), 4)
    result["context"] = {
        name.removeprefix("valid_"): context_gain(model, args.cache, name, 6 * args.rows)
        for name in ("valid_prose", "valid_code")
    }
    middle = range(count // 3, 2 * count // 3)
    with zeroed_attention(model, middle):
        zeroed = token_nll(model, long[: args.rows // 2])
    result["zeroed_middle_cost"] = round((zeroed - nll[: args.rows // 2]).mean().item(), 4)
    rng = np.random.default_rng(7)
    spans = rng.integers(2, VOCAB, size=(32, 64))
    ids = torch.from_numpy(np.concatenate([np.zeros((32, 1), dtype=np.int64), spans, spans], axis=1))
    repeat = token_nll(model, ids)
    result["random_span"] = {
        "first": round(repeat[:, :64].mean().item(), 4),
        "second": round(repeat[:, 64:].mean().item(), 4),
    }
    result["random_span"]["ratio"] = round(result["random_span"]["second"] / result["random_span"]["first"], 4)
    first_sum = later_sum = first_count = later_count = 0.0
    for name, values in (("valid_prose", nll), ("valid_code", None)):
        rows = long if name == "valid_prose" else long_rows(args.cache, name, min(12, args.rows), 1024)
        values = token_nll(model, rows) if values is None else values
        first, later = (torch.from_numpy(mask) for mask in natural_repeats(rows, tokenizer))
        first_sum, first_count = first_sum + values[first].sum().item(), first_count + first.sum().item()
        later_sum, later_count = later_sum + values[later].sum().item(), later_count + later.sum().item()
    result["natural_repeats"] = {
        "first": round(first_sum / first_count, 4),
        "later": round(later_sum / later_count, 4),
        "ratio": round(later_sum / later_count / (first_sum / first_count), 4),
        "tokens": [int(first_count), int(later_count)],
    }
    result["bits_per_byte"] = bits_per_byte(model, tokenizer, args.cache, args.rows)
    return result


def export(args):
    """Write the saved state to the assets folder in the hub's layout: bf16 safetensors, config, tokenizer."""
    state = torch.load(state_path(args), weights_only=True, map_location="cpu")
    model = new_model(args.arch, args.seed)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(args.assets)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.cache / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(args.assets)
    training = {"steps": state["step"], "tokens_seen": state["tokens"]}
    (args.assets / "training.json").write_text(json.dumps(training) + "\n")
    shutil.copyfile(args.cache / f"train_log_{args.arch}.csv", args.assets / "training_log.csv")
    print(f"{state['tokens'] / 1e6:.2f} M tokens; wrote {args.assets}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "train", "export", "evaluate"):
        command = commands.add_parser(name)
        command.add_argument("--cache", type=Path, default=ROOT / "cache" / "tiny", help="working folder")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--arch", choices=list(PHASES), default="blockffn", help="which shipped model")
        if name == "prepare":
            command.add_argument("--wikipedia", type=Path, required=True, help="folder of train-*.jsonl.xz")
            command.add_argument("--gsm8k", type=Path, required=True, help="GSM8K train.jsonl")
            command.add_argument("--mbpp", type=Path, required=True, help="mbpp.jsonl")
            command.add_argument("--shards", type=int, default=7)
        elif name in ("export", "evaluate"):
            command.add_argument("--assets", type=Path, help="folder of the checkpoint (default: assets/<arch>-tiny)")
            command.add_argument("--rows", type=int, default=48, help="validation rows of 1,024 tokens")
        else:
            command.add_argument("--tokens", type=float, default=30.0, help="millions of tokens in all")
            command.add_argument(
                "--start-from", type=Path, help="exported folder to go on from, where no state is saved"
            )
            command.add_argument("--minutes", type=float, default=1e9, help="stop after this wall time, saved")
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
            command.add_argument("--quick", action="store_true", help="0.02 M tokens, uncompiled: does it run?")
            command.add_argument("--lr", type=float, default=2e-3)
            command.add_argument("--log-every", type=int, default=50)
            command.add_argument("--threads", type=int, default=0)
            command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if getattr(args, "assets", ROOT) is None:
        args.assets = ROOT / "assets" / f"{args.arch}-tiny"
    if getattr(args, "quick", False):
        args.tokens, args.compile, args.log_every = 0.02, False, 2
    {"prepare": prepare, "train": train, "export": export, "evaluate": evaluate}[args.command](args)


if __name__ == "__main__":
    main()

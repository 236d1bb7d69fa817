"""What the cards of the shipped checkpoints state, measured on validation text (`pretraining_text.VALIDATION`)."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from src.base.stats import cluster_bootstrap
from src.models.pretraining import span_nll, token_nll
from src.models.pretraining_text import BOS, EOS, VALIDATION, VOCAB, TextRows

ROW_TOKENS = 1024


def sparsity_and_nll(model: nn.Module, ids: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Token-level sparsity and CLS_8 of a BlockFFN, by layer and their means; and the NLL [N, T-1] of the same ids."""
    active: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.router_act_fn.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out > 0))
        for layer, kept in zip(model.model.layers, active, strict=True)
    ]
    nll = token_nll(model, ids)
    for hook in hooks:
        hook.remove()
    layers = [torch.cat(kept) for kept in active]
    # rounded here, so that the means are those of the figures that the card shows
    by_token = rounded([1 - layer.float().mean().item() for layer in layers])
    by_chunk = rounded([1 - layer.unflatten(1, (-1, 8)).any(2).float().mean().item() for layer in layers])
    token_level = {"tls_per_layer": by_token, "tls": np.mean(by_token)}
    return token_level | {"cls_8_per_layer": by_chunk, "cls_8": np.mean(by_chunk)}, nll


def context_gain(model: nn.Module, cache: Path, name: str, count: int) -> dict:
    """What context is worth in one domain, on `count` rows of 1,024 tokens from anywhere in its long documents.

    An article's opening is easier than its middle, whatever the context, so rows start anywhere. Returns NLL in nats
    by position, the positions 64-127 less 512-1,023 (other tokens of the same rows, so noisy), and the same tokens
    scored with 64-127 tokens of context less 512 and more; both differences with an interval over documents.
    """
    rng, text = np.random.default_rng(5), TextRows(cache, name)
    lengths = np.diff(text.offsets)
    chosen = np.flatnonzero(lengths > 2 * ROW_TOKENS)
    documents = np.tile(chosen, count // len(chosen) + 1)[:count]
    starts = text.offsets[documents] + rng.integers(1, lengths[documents] - ROW_TOKENS)
    rows = text.rows_at(starts, ROW_TOKENS)
    nll = token_nll(model, rows)
    same_tokens = []
    for start in range(512, ROW_TOKENS - 64, 128):
        short = rows[:, start - 64 : start + 64].clone()
        short[:, 0] = BOS
        same_tokens.append((token_nll(model, short)[:, 63:] - nll[:, start - 1 : start + 63]).mean(1))
    edges = pairwise([1, 64, 128, 256, 512, ROW_TOKENS])
    by_position = {f"{a}-{b - 1}": nll[:, a - 1 : b - 1].mean(1) for a, b in edges}
    result = {"rows": len(rows), "documents": len(np.unique(documents))}
    result["nll_by_position"] = {key: values.mean().item() for key, values in by_position.items()}
    for key, gains in (
        ("positions_64_127_less_512_1023", by_position["64-127"] - by_position["512-1023"]),
        ("same_tokens_short_less_long_context", torch.stack(same_tokens).mean(0)),
    ):
        sums = np.array([[gains[documents == d].sum().item(), (documents == d).sum()] for d in np.unique(documents)])
        interval = cluster_bootstrap(sums[:, 0], sums[:, 1])
        result[key] = {"gain": interval.estimate, "ci": [interval.low, interval.high]}
    return result


def random_spans(model: nn.Module) -> dict:
    """NLL of the first and the second occurrence of random spans of 64 tokens, and their ratio."""
    spans = np.random.default_rng(7).integers(2, VOCAB, size=(32, 64))
    first, second = span_nll(model, spans)
    return {"first": first, "second": second, "ratio": second / first}


def natural_repeats(ids: torch.Tensor, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [N, T-1] over ids[:, 1:]: first occurrence and later occurrences of rare words within a row.

    A rare word here is a run of tokens of one capitalised word or identifier of at least two tokens; the mask holds its
    tokens after the first, which its own beginning helps to predict in both cases.
    """
    texts = tokenizer.convert_ids_to_tokens(list(range(VOCAB)))
    space = "\u0120"  # how byte-level BPE writes a leading blank; Python counts it as a letter
    begins = np.array([t.startswith(space) or not (t[0].isalnum() or t[0] == "_") for t in texts])
    letters = np.array([t.removeprefix(space).replace("_", "").isalpha() for t in texts])
    first, later = (torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.bool) for _ in range(2))
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


def repeats_nll(tokenizer, scored: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """NLL of first and later occurrences of rare words, their ratio and their numbers of tokens; `scored` has pairs of
    ids [N, T] and their NLL [N, T-1]."""
    values: list[list[torch.Tensor]] = [[], []]
    for ids, nll in scored:
        for kept, mask in zip(values, natural_repeats(ids, tokenizer), strict=True):
            kept.append(nll[mask])
    first, later = (torch.cat(kept).double() for kept in values)
    ratio = (later.mean() / first.mean()).item()
    lengths = [len(first), len(later)]
    return {"first": first.mean().item(), "later": later.mean().item(), "ratio": ratio, "tokens": lengths}


def bits_per_byte(model: nn.Module, tokenizer, cache: Path, rows: int) -> dict:
    """Bits per byte of validation text by domain, beside those of a unigram model of the training text."""
    result = {}
    for name, train_name in VALIDATION.items():
        ids = TextRows(cache, name).rows(np.random.default_rng(0), min(24, rows), ROW_TOKENS)
        values, targets = token_nll(model, ids), ids[:, 1:]
        keep = targets > EOS
        bits = math.log(2) * sum(len(tokenizer.decode(row[row > EOS]).encode()) for row in targets)
        counts = np.bincount(np.load(cache / f"{train_name}.npy", mmap_mode="r"), minlength=VOCAB) + 1.0
        unigram = torch.from_numpy(-np.log(counts / counts.sum()))
        by_model, by_unigram = (nll.sum().item() / bits for nll in (values[keep], unigram[targets[keep]]))
        result[name] = {"model": by_model, "unigram": by_unigram, "nll_per_token": values[keep].mean().item()}
    return result


@torch.no_grad()
def expert_load(model: nn.Module, cache: Path, rows: int) -> np.ndarray:
    """Share of each layer's expert choices that go to each expert, [L, E], on validation text of all domains."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.float64)
    rng = np.random.default_rng(3)
    for name in VALIDATION:
        for ids in TextRows(cache, name).rows(rng, max(1, rows // 4), ROW_TOKENS):
            logits = model(input_ids=ids[None], use_cache=False, output_router_logits=True).router_logits
            for layer, values in enumerate(logits):
                chosen = values.topk(config.num_experts_per_tok, dim=-1).indices
                counts[layer] += torch.bincount(chosen.flatten(), minlength=config.num_local_experts)
    return (counts / counts.sum(1, keepdim=True)).numpy()


def rounded(figures):
    """The figures with all floats to 4 digits, at any depth of dictionaries, lists and arrays."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    if isinstance(figures, (list, np.ndarray)):
        return [rounded(value) for value in figures]
    return round(float(figures), 4) if isinstance(figures, (float, np.floating)) else figures

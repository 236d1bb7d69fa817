"""Controls for a hard gate: offline masks with exactly as many Mamba tokens per layer and document as the gate has.

Masks and scores have the form of `GateRecord.shares`: document id -> layer -> [N] for the model's input positions
0 .. N - 1, NaN where the model was never fed. All controls but the random one (`gates.matched_random_masks`) are here.
They are made with the whole document at hand (`MaskGate.uses_document`), so none of them is deployable. Every function
that makes masks checks the counts before it returns.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from src.base.text_data import TokenDocument
from src.hybrid.gates import document_key, hash_uniform, sparsity
from src.models.windows import evaluation_mode, read_windows

# Tokens of a block of the controls that permute the gate's own decisions inside a document, all layers alike.
SHUFFLED_BLOCKS = {"token_shuffled": 1, "block_shuffled": 16}
BLOCK_TOKENS = SHUFFLED_BLOCKS["block_shuffled"]
# Controls that rank a document's tokens by a score of their own, and which end goes to Mamba: True the largest scores,
# False the smallest. The side is the one on which attention is thought to matter less.
LARGEST_TO_MAMBA = {
    "token_frequency": True,  # function words and punctuation
    "previous_surprisal": False,  # tokens that the context had already told
    "hidden_norm": True,  # no hypothesis; the same side as residual_norm
    "residual_norm": True,  # the layer's update weighs less in a long vector
    "self_sparsity": True,  # as the routing gates
    "attention_entropy": True,  # a flat row is an average, a peaked one looks something up
    "recall_error": False,  # where the sidecar does what attention does
}
CONTROLS = (
    "random",
    *SHUFFLED_BLOCKS,
    "inverted",
    "other_document",
    "position_early",
    "position_late",
    *LARGEST_TO_MAMBA,
)
# What `collect_scores` measures; token frequency needs no model.
MODEL_SCORES = tuple(name for name in LARGEST_TO_MAMBA if name != "token_frequency")
# What a router says of a token: post-ReLU activations [.., E] -> [..].
MEASURES = {
    "sparsity": sparsity,
    "entropy": lambda activations: _entropy(activations.float().clamp_min(0)),
    "sum": lambda activations: activations.float().sum(dim=-1),
    "top": lambda activations: activations.amax(dim=-1),
}
SOURCES = ("previous", "lookahead", "self")  # whose router: as `gates.SIGNALS`, and the layer's true one
# For correlations with sensitivity; self_sparsity is a control too.
ROUTER_SIGNALS = tuple(f"{source}_{measure}" for source in SOURCES for measure in MEASURES)

Masks = Mapping[str, Mapping[int, np.ndarray]]


# -- masks
def scored_masks(masks: Masks, scores: Masks, largest: bool = True, seed: int = 0) -> dict[str, dict[int, np.ndarray]]:
    """The n tokens with the largest (or smallest) scores go to Mamba, n being the count in `masks`.

    masks: the hard gate to match. scores: the same documents and layers, [N], finite wherever the mask is not NaN.
    Equal scores are split by `gates.hash_uniform` as the gates split them, so with the gate's own scores and seed
    the result is the gate's own mask, and with `largest=False` inverted routing.
    Raises ValueError for masks that are not hard, and scores that are missing, of another length, or not finite.
    """
    control = {}
    for document, layers in masks.items():
        control[document] = {}
        for layer, values in layers.items():
            known, count = _fed(values, document, layer)
            ranking = _values_at(scores, document, layer, len(values))[known].astype(np.float64)
            if not np.isfinite(ranking).all():
                raise ValueError(
                    f"the scores of layer {layer} of document {document!r} are not finite at "
                    f"{np.count_nonzero(~np.isfinite(ranking))} of {len(known)} positions"
                )
            order = np.lexsort((_hash(seed, layer, document, known), -ranking))
            chosen = order[:count] if largest else order[len(order) - count :]
            control[document][layer] = _mask(len(values), known[chosen])
    check_equal_counts(masks, control)
    return control


def block_shuffled_masks(masks: Masks, seed: int, block_tokens: int = BLOCK_TOKENS) -> dict[str, dict[int, np.ndarray]]:
    """The gate's own mask with its blocks of `block_tokens` tokens permuted inside each document.

    Keeps the count, and within blocks the runs that neighbouring tokens' likeness makes; all layers of a document get
    one permutation, drawn from (seed, document), so that what layers have in common stays too: blocks of 1 token keep
    that alone (a token that several layers send to Mamba may cost more than the same cells spread over tokens).
    Raises ValueError for masks that are not hard, and layers fed at different positions.
    """
    control = {}
    for document, layers in masks.items():
        control[document] = {}
        known = _fed_alike(layers, document)
        blocks = [np.arange(i, min(i + block_tokens, len(known))) for i in range(0, len(known), block_tokens)]
        rng = np.random.default_rng([seed, document_key(document) & 0xFFFFFFFFFFFFFFFF])
        moved = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))] or [known])
        for layer, values in layers.items():
            shuffled = np.asarray(values)[known][moved]
            control[document][layer] = _mask(len(values), known[shuffled == 1])
    check_equal_counts(masks, control)
    return control


def other_document_masks(masks: Masks, scores: Masks, seed: int = 0) -> dict[str, dict[int, np.ndarray]]:
    """The gate's decisions in another document, at the same positions.

    masks, scores: what the gate did and its scores (`GateRecord`). The donor (`donor_documents`) is one of nearly the
    same length, the same for all layers; its end is cut off, or it starts over where it is shorter. The count is
    restored by moving the donor's threshold: its highest scores among the tokens taken go to Mamba, those that its gate
    had sent there first among equal ones, then by the hash. So where the counts agree anyway, the mask is the donor's.
    """
    lengths = {document: len(_fed_alike(layers, document)) for document, layers in masks.items()}
    donors = donor_documents(lengths, seed)
    placed = {}
    for document, layers in masks.items():
        donor, placed[document] = donors[document], {}
        for layer, values in layers.items():
            known, _ = _fed(values, document, layer)
            given = _values_at(masks, donor, layer)
            fed, _ = _fed(given, donor, layer)
            ranks = np.unique(_values_at(scores, donor, layer, len(given))[fed], return_inverse=True)[1]
            # the half orders equal scores by what the donor's gate made of them, and leaves unequal ones in order
            placed[document][layer] = np.full(len(values), np.nan)
            placed[document][layer][known] = np.resize(ranks + 0.5 * given[fed], len(known))
    return scored_masks(masks, placed, seed=seed)


def donor_documents(lengths: Mapping[str, int], seed: int) -> dict[str, str]:
    """For every document another one: the next longer, for the longest the one before it; `seed` orders equal lengths.

    lengths: tokens per document. Raises ValueError for fewer than two documents.
    """
    if len(lengths) < 2:
        raise ValueError(f"there is no other document to take routing from: {len(lengths)} given")
    documents = sorted(lengths)
    shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    order = sorted(shuffled, key=lambda document: lengths[document])
    return dict(zip(order, [*order[1:], order[-2]], strict=True))


def position_masks(masks: Masks, late: bool) -> dict[str, dict[int, np.ndarray]]:
    """The first (or, `late`, the last) n tokens of every document go to Mamba. Raises ValueError as `scored_masks`."""
    positions = {
        document: {layer: np.arange(len(values)) for layer, values in layers.items()}
        for document, layers in masks.items()
    }
    return scored_masks(masks, positions, largest=late)


def check_equal_counts(masks: Masks, control: Masks) -> None:
    """Raise ValueError unless both are hard and have equally many Mamba tokens in every layer of every document.

    Takes masks or what was recorded while they ran (`GateRecord.shares`); the error names the first few that differ.
    """
    if set(masks) != set(control):
        differing = sorted(set(masks) ^ set(control))
        raise ValueError(f"gate and control cover different documents: {len(differing)} differ, e.g. {differing[:3]}")
    problems = []
    for document, layers in masks.items():
        if set(layers) != set(control[document]):
            problems.append(f"{document!r} has layers {sorted(layers)} against {sorted(control[document])}")
            continue
        for layer, values in layers.items():
            _, count = _fed(values, document, layer)
            _, other = _fed(control[document][layer], document, layer)
            if count != other or len(values) != len(control[document][layer]):
                problems.append(
                    f"{document!r} layer {layer}: {count} of {len(values)} against {other} of "
                    f"{len(control[document][layer])}"
                )
    if problems:
        raise ValueError(
            "gate and control differ in their numbers of Mamba tokens, so they must not be compared: "
            + "; ".join(problems[:3])
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        )


# -- scores
def token_counts(token_documents: Sequence[TokenDocument], vocabulary: int) -> np.ndarray:
    """How often each token occurs in the documents (the calibration text), prefixes included: [V] int64.

    Raises ValueError for no documents or ids outside the vocabulary.
    """
    if not token_documents:
        raise ValueError("there are no documents to count tokens in")
    counts = np.bincount(np.concatenate([document.ids for document in token_documents]), minlength=vocabulary)
    if len(counts) > vocabulary:
        raise ValueError(f"token {len(counts) - 1} lies outside the vocabulary of {vocabulary}")
    return counts


def frequency_scores(
    token_documents: Sequence[TokenDocument], counts: np.ndarray, layers: Sequence[int]
) -> dict[str, dict[int, np.ndarray]]:
    """The count (`token_counts`) of the token at every input position, [N] alike for all layers; 0 for unseen ones."""
    return {
        document.id: dict.fromkeys(layers, counts[np.asarray(document.ids[:-1])].astype(np.float64))
        for document in token_documents
    }


def collect_scores(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    layers: Sequence[int],
    names: Sequence[str],
    max_seq_len: int,
    stride: int,
    progress: str | None = None,
) -> dict[str, dict[str, dict[int, np.ndarray]]]:
    """Scores of the base model's tokens: name -> document id -> layer -> [N] float32, from one pass over the documents.

    previous_surprisal: -log p(token at the position | tokens before it), nats: the token just read, so no hindsight; 0
        at position 0, alike for all layers.
    hidden_norm, residual_norm: Euclidean norm of the layer's normed input, and of the residual stream before the norm.
    <source>_<measure> (ROUTER_SIGNALS): source previous is the router of layer l - 1, lookahead layer l's own router on
        the normed input of the layer, self layer l's router where it runs, after the attention. Measures of its
        post-ReLU activations: sparsity (`gates.sparsity`), entropy of the positive ones over their sum (nats, 0 where
        there are none), sum, and top (the largest).
    attention_entropy: of the row of attention weights, nats, mean over heads. Attention runs eagerly meanwhile.
    recall_error: Euclidean norm of attention(x) - mamba(x), x being the layer's normed input in the base model.

    One window per forward, so no score depends on a batch; a position that several windows hold counts as in the
    earliest, as in `GateRecord`. Attached sidecars must be bypassed; recall_error needs them on every layer named.
    Raises ValueError for unknown names, layers that are not there, attached sidecars that are not bypassed, and models
    without what a score reads (a router, a sidecar, eager attention).
    """
    _check_request(model, layers, names)
    lengths = {document.id: len(document.ids) - 1 for document in token_documents}
    collected: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name in names:
        shared = {document: np.zeros(length, dtype=np.float32) for document, length in lengths.items()}
        own = name != "previous_surprisal"
        collected[name] = {
            document: {layer: values.copy() if own else values for layer in layers}
            for document, values in shared.items()
        }
    wants_logits = "previous_surprisal" in names
    with torch.no_grad(), _base_pass(model, "attention_entropy" in names), _watching(model, layers, names) as seen:
        for reading in read_windows(model, token_documents, max_seq_len, stride, progress):
            output = (model if wants_logits else model.model)(input_ids=reading.input_ids, use_cache=False)
            document, first = reading.document.id, reading.start + reading.new
            stop = reading.start + reading.input_ids.shape[1]
            if wants_logits:
                logits = output.logits[0].float()
                nll = nn.functional.cross_entropy(logits, reading.targets().to(logits.device), reduction="none")
                surprisal = collected["previous_surprisal"][document][layers[0]]
                # The last token of the document is predicted, but never read.
                surprisal[first + 1 : stop + 1] = nll.cpu().numpy()[reading.new :][: len(surprisal) - first - 1]
            for name, values in seen.items():
                for layer in layers:
                    collected[name][document][layer][first:stop] = values[layer][reading.new :]
    return collected


def _check_request(model: nn.Module, layers: Sequence[int], names: Sequence[str]) -> None:
    known = [*MODEL_SCORES, *(name for name in ROUTER_SIGNALS if name not in MODEL_SCORES)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown score {unknown[0]!r}; a model gives {', '.join(known)}")
    blocks = model.model.layers
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ValueError(f"layer {layer} is not there: the model has layers 0 to {len(blocks) - 1}")
        for name in (name for name in names if name in ROUTER_SIGNALS):
            source = layer - name.startswith("previous")
            if source < 0:
                raise ValueError(f"{name}: layer 0 has no previous layer's router; choose layers from 1 on")
            if not hasattr(blocks[source].mlp, "router_act_fn"):
                raise ValueError(f"{name} needs a BlockFFN router, which layer {source} has not")
        if "recall_error" in names and not hasattr(blocks[layer].self_attn, "sidecar"):
            raise ValueError(f"recall_error needs a sidecar beside the attention of layer {layer}; attach them first")
    # any attached layer, named or not, would change what the layers behind it see
    attachments = [getattr(block.self_attn, "attachment", None) for block in blocks]
    if any(attachment is not None and not attachment.bypassed for attachment in attachments):
        raise ValueError("scores are the base model's: collect them inside `with bypass_sidecars(model):`")


@contextmanager
def _base_pass(model: nn.Module, eager: bool) -> Iterator[None]:
    """Evaluation mode, and attention that returns its weights where `eager`; both as before afterwards."""
    implementation = model.config._attn_implementation
    with evaluation_mode(model):
        try:
            if eager:
                model.set_attn_implementation("eager")
            yield
        finally:
            if eager:
                model.set_attn_implementation(implementation)


@contextmanager
def _watching(
    model: nn.Module, layers: Sequence[int], names: Sequence[str]
) -> Iterator[dict[str, dict[int, np.ndarray]]]:
    """name -> layer -> [T] float32 of the last forward (batch of 1) inside, for the scores that hooks see."""
    seen = {name: {} for name in names if name != "previous_surprisal"}
    handles = []

    def keep(name, layer, values):
        seen[name][layer] = values[0].float().cpu().numpy()

    def keep_router(source, layer, activations):
        for measure in _measures(source, seen):
            keep(f"{source}_{measure}", layer, MEASURES[measure](activations))

    def before_layer(layer):
        def hook(_module, args, kwargs):
            keep("residual_norm", layer, _hidden_states(args, kwargs).float().norm(dim=-1))

        return hook

    def after_attention(layer):
        def hook(module, args, kwargs, output):
            hidden_states = _hidden_states(args, kwargs)
            if "hidden_norm" in seen:
                keep("hidden_norm", layer, hidden_states.float().norm(dim=-1))
            if "attention_entropy" in seen:
                if output[1] is None:
                    raise ValueError(f"the attention of layer {layer} returns no weights: it has no eager form")
                keep("attention_entropy", layer, torch.special.entr(output[1].float()).sum(dim=-1).mean(dim=1))
            if "recall_error" in seen:
                difference = output[0].float() - module.sidecar(hidden_states).float()
                keep("recall_error", layer, difference.norm(dim=-1))
            if _measures("lookahead", seen):
                mlp = model.model.layers[layer].mlp
                # `.forward`: this call is ours, hooks on the router's own pass must not see it
                keep_router("lookahead", layer, mlp.router_act_fn.forward(mlp.router_proj.forward(hidden_states)))

        return hook

    def after_router(source, layer):
        def hook(_module, _args, output):
            keep_router(source, layer, output)

        return hook

    try:
        for layer in layers:
            block = model.model.layers[layer]
            if "residual_norm" in seen:
                handles.append(block.register_forward_pre_hook(before_layer(layer), with_kwargs=True))
            if {"hidden_norm", "attention_entropy", "recall_error"} & set(seen) or _measures("lookahead", seen):
                handles.append(block.self_attn.register_forward_hook(after_attention(layer), with_kwargs=True))
            for source, index in (("previous", layer - 1), ("self", layer)):
                if _measures(source, seen):
                    router = model.model.layers[index].mlp.router_act_fn
                    handles.append(router.register_forward_hook(after_router(source, layer)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _measures(source: str, names: Iterable[str]) -> list[str]:
    """The measures of one source's router among the names."""
    return [measure for measure in MEASURES if f"{source}_{measure}" in names]


def _entropy(activations: torch.Tensor) -> torch.Tensor:
    """Entropy [..] in nats of non-negative values [.., E] over their sum; 0 where all are 0."""
    total = activations.sum(dim=-1, keepdim=True)
    return torch.special.entr(activations / total.clamp_min(torch.finfo(total.dtype).tiny)).sum(dim=-1)


def _hidden_states(args: tuple, kwargs: dict) -> torch.Tensor:
    """The [B, T, D] that a layer or its attention was called with, by position or by name."""
    return args[0] if args else kwargs["hidden_states"]


# -- parts
def _fed(values: np.ndarray, document: str, layer: int) -> tuple[np.ndarray, int]:
    """(positions that the model was fed, number of Mamba tokens). Raises ValueError for shares other than 0 and 1."""
    values = np.asarray(values)
    known = np.flatnonzero(~np.isnan(values))
    soft = known[~np.isin(values[known], (0, 1))]
    if len(soft):
        raise ValueError(
            f"controls match hard gates; layer {layer} of document {document!r} has a share of "
            f"{values[soft[0]]:g} at position {soft[0]}"
        )
    return known, int(np.count_nonzero(values[known]))


def _fed_alike(layers: Mapping[int, np.ndarray], document: str) -> np.ndarray:
    """The positions that all layers of a document were fed. Raises ValueError where layers differ."""
    known = [_fed(values, document, layer)[0] for layer, values in layers.items()]
    if any(not np.array_equal(known[0], other) for other in known[1:]):
        raise ValueError(f"the layers {sorted(layers)} of document {document!r} were fed at different positions")
    return known[0] if known else np.empty(0, dtype=np.int64)


def _values_at(values: Masks, document: str, layer: int, length: int | None = None) -> np.ndarray:
    """One document's and layer's values. Raises ValueError where there are none, or not `length` of them."""
    if document not in values or layer not in values[document]:
        raise ValueError(f"there is nothing for layer {layer} of document {document!r}")
    found = np.asarray(values[document][layer])
    if length is not None and found.shape != (length,):
        raise ValueError(
            f"layer {layer} of document {document!r} has scores of shape {found.shape} for a mask of {length} positions"
        )
    return found


def _hash(seed: int, layer: int, document: str, positions: np.ndarray) -> np.ndarray:
    key = torch.tensor([document_key(document)])
    return hash_uniform(seed, layer, key, torch.as_tensor(positions)[None])[0].numpy()


def _mask(length: int, mamba_positions: np.ndarray) -> np.ndarray:
    mask = np.zeros(length, dtype=np.float32)
    mask[mamba_positions] = 1.0
    return mask

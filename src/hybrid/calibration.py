"""Calibration: the score distributions (and activation cutoffs) that give a gate the mean share asked for."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef, model_device
from src.hybrid.gates import ActivationGate, ScoredGate, ScoreDistribution
from src.hybrid.layer import attachment_of, bypass_sidecars, record_gates

# Calibration stops early once every layer's realised share is this near to the one asked.
SHARE_TOLERANCE = 0.005
# (windows, ids [B, T], attention_mask [B, T])
Batch = tuple[Sequence[WindowRef], torch.Tensor, torch.Tensor]


@torch.no_grad()
def calibrate_gates(
    model: nn.Module,
    gate: ScoredGate,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    batch_size: int = 8,
    passes: int = 4,
    progress: str | None = None,
    shared: bool = False,
) -> ScoredGate:
    """The gate with the score distributions that make each attached layer's mean share `gate.alpha` on the documents.

    A hybrid layer changes the scores of the layers behind it, so the distributions are taken from the hybrid itself:
    pass after pass, at most `passes`, until every layer's realised share is within SHARE_TOLERANCE of alpha. They hold
    for this alpha; at another share they are close, not exact. `shared` pools the scores of all attached layers, which
    then have one threshold (or centre): it is their mean share that is alpha. An `ActivationGate` without cutoffs gets
    these first. The model's own gate is put back. `progress` labels a progress bar.

    Raises ValueError for a gate that has nothing to calibrate, no documents, or alpha 0 or 1.
    """
    if not isinstance(gate, ScoredGate):
        raise ValueError(f"a {gate.mode} gate has no scores to calibrate; routing, activation and learned gates do")
    if gate.alpha in (0.0, 1.0):
        raise ValueError(f"alpha is {gate.alpha}: a gate without a choice needs no calibration")
    if shared:  # a gate calibrated layer by layer may realise the mean share without sharing a threshold
        gate = replace(gate, distributions=None)
    attachment = attachment_of(model)
    before = attachment.gate
    batches = _calibration_batches(model, token_documents, max_seq_len, batch_size)
    if isinstance(gate, ActivationGate) and gate.cutoffs is None:
        gate = replace(gate, cutoffs=_activation_cutoffs(model, gate.quantile, batches, progress))
    bar = tqdm(total=passes * len(batches), desc=progress, disable=progress is None, leave=False)
    try:
        for _ in range(passes):
            attachment.set_gate(gate)
            with record_gates(model) as record:
                for windows, ids, mask in batches:
                    attachment.on_batch(windows)
                    model.model(input_ids=ids, attention_mask=mask, use_cache=False)
                    bar.update()
            realised = [record.mean_share()] if shared else record.layer_shares().values()
            if gate.distributions is not None and all(abs(one - gate.alpha) <= SHARE_TOLERANCE for one in realised):
                break
            scores = {
                layer: np.concatenate([layers[layer][~np.isnan(layers[layer])] for layers in record.scores.values()])
                for layer in attachment.layers
            }
            if shared:
                scores = dict.fromkeys(scores, np.concatenate(list(scores.values())))
            distributions = {layer: ScoreDistribution.of(values) for layer, values in scores.items()}
            gate = replace(gate, distributions=distributions)
    finally:
        bar.close()
        attachment.set_gate(before)
        attachment.on_batch([])
    return gate


@torch.no_grad()
def _activation_cutoffs(
    model: nn.Module, quantile: float, batches: Sequence[Batch], progress: str | None
) -> dict[int, float]:
    """Layer l - 1 -> `quantile` of |h| over all its neurons and all tokens, for every attached layer l.

    The base model's activations count (`bypass_sidecars`), so that the cutoffs, and with them the signal's meaning, are
    the same for every gate of one model and text. |h| is binned by its first 16 bits, 128 bins for each power of two.
    The cutoff is the upper edge of the quantile's bin: at most 0.8 % above the quantile, and just above 0 where more
    neurons than that are exactly 0.
    """
    sources, bins = attachment_of(model).activation_sources(), 1 << 15
    counts = {source: torch.zeros(bins, dtype=torch.int64) for source in sources}
    mask = None

    def count(source, _module, inputs, _output):
        magnitudes = inputs[0][mask.bool().to(inputs[0].device)].float().abs()
        counts[source] += torch.bincount(magnitudes.view(torch.int32).flatten() >> 16, minlength=bins).cpu()

    with ExitStack() as hooks:
        for source, module in sources.items():
            hooks.enter_context(module.register_forward_hook(partial(count, source)))
        hooks.enter_context(bypass_sidecars(model))
        for _windows, ids, mask in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    cutoffs = {}
    for source, counted in counts.items():
        reached = counted.numpy().cumsum()
        index = int(np.searchsorted(reached, quantile * reached[-1]))
        cutoffs[source] = float(np.int32(index + 1 << 16).view(np.float32))
    return cutoffs


def _calibration_batches(
    model: nn.Module, token_documents: Sequence[TokenDocument], max_seq_len: int, batch_size: int
) -> list[Batch]:
    """Non-overlapping windows, the longest first, on the model's device."""
    if not token_documents:
        raise ValueError("no documents to calibrate on")
    pieces = []
    for document in token_documents:
        for start in range(0, len(document.ids), max_seq_len):
            ids = np.asarray(document.ids[start : start + max_seq_len])
            ids = torch.as_tensor(ids, dtype=torch.int64, device=model_device(model))
            pieces.append((WindowRef(document.id, start, len(ids)), ids))
    pieces.sort(key=lambda piece: (-piece[0].length, piece[0].document, piece[0].start))
    batches = []
    for first in range(0, len(pieces), batch_size):
        windows, texts = zip(*pieces[first : first + batch_size], strict=True)
        mask = pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
        batches.append((windows, pad_sequence(texts, batch_first=True), mask))
    return batches

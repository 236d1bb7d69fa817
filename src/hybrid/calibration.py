"""Calibration: the score distributions (and activation cutoffs) that give a gate the mean share asked for."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef
from src.hybrid.gates import ActivationGate, ScoredGate, ScoreDistribution
from src.hybrid.layer import attachment_of, bypass_sidecars, record_gates

# Calibration stops early once every layer's realised share is this near to the one asked.
SHARE_TOLERANCE = 0.005


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

    `shared` pools the scores of all attached layers into one distribution, so that they have one threshold (and tie
    probability, or centre) between them: then the mean share over layers is alpha, and each layer's own is what it is.

    A hybrid layer changes the scores of the layers behind it, so the distributions are taken from the hybrid itself:
    pass after pass, at most `passes`, until every layer's realised share (`shared`: the mean over layers) is within
    SHARE_TOLERANCE of alpha. They hold for this alpha; at another share of the same gate they are close, not exact. The
    model's own gate is put back. Documents are read in windows of `max_seq_len` tokens, `batch_size` at a time;
    `progress` labels a progress bar. An `ActivationGate` without cutoffs gets these first (`activation_cutoffs`).

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
    batches = calibration_batches(token_documents, max_seq_len, batch_size)
    if isinstance(gate, ActivationGate) and gate.cutoffs is None:
        gate = replace(gate, cutoffs=activation_cutoffs(model, gate.quantile, batches, progress))
    bar = tqdm(total=passes * len(batches), desc=progress, disable=progress is None, leave=False)
    try:
        for _ in range(passes):
            attachment.set_gate(gate)
            with record_gates(model) as record:
                for windows, ids, mask in batches:
                    attachment.on_batch(windows)
                    device = model.get_input_embeddings().weight.device
                    model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
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
            gate = replace(
                gate, distributions={layer: ScoreDistribution.of(values) for layer, values in scores.items()}
            )
    finally:
        bar.close()
        attachment.set_gate(before)
        attachment.on_batch([])
    return gate


@torch.no_grad()
def activation_cutoffs(
    model: nn.Module,
    quantile: float,
    batches: Sequence[tuple[Sequence[WindowRef], torch.Tensor, torch.Tensor]],
    progress: str | None = None,
) -> dict[int, float]:
    """Layer l - 1 -> `quantile` of |h| over all its neurons and all tokens, for every attached layer l.

    batches: as `calibration_batches` makes them. The base model's activations count (`bypass_sidecars`), so that the
    cutoffs, and with them the signal's meaning, are the same for every gate of one model and text. |h| is binned by its
    first 16 bits, 128 bins for each power of two. The cutoff is the upper edge of the quantile's bin: at most 0.8 %
    above the quantile, and just above 0 where more neurons than that are exactly 0.

    Raises ValueError as `SidecarAttachment.activation_sources` does.
    """
    sources, bins = attachment_of(model).activation_sources(), 1 << 15
    counts = {source: torch.zeros(bins, dtype=torch.int64) for source in sources}
    real = None

    def counting(source):
        def hook(_module, inputs, _output):
            magnitudes = inputs[0][real.to(inputs[0].device)].float().abs()
            counts[source] += torch.bincount(magnitudes.view(torch.int32).flatten() >> 16, minlength=bins).cpu()

        return hook

    handles = [module.register_forward_hook(counting(source)) for source, module in sources.items()]
    try:
        with bypass_sidecars(model):
            for _windows, ids, mask in tqdm(batches, desc=progress, disable=progress is None, leave=False):
                real, device = mask.bool(), model.get_input_embeddings().weight.device
                model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    cutoffs = {}
    for source, count in counts.items():
        reached = count.numpy().cumsum()
        index = int(np.searchsorted(reached, quantile * reached[-1]))
        cutoffs[source] = float(np.int32(index + 1 << 16).view(np.float32))
    return cutoffs


def calibration_batches(token_documents: Sequence[TokenDocument], max_seq_len: int, batch_size: int):
    """[(windows, ids [B, T], attention_mask [B, T])] over non-overlapping windows, the longest first."""
    if not token_documents:
        raise ValueError("no documents to calibrate on")
    pieces = [
        (
            WindowRef(document.id, start, len(document.ids[start : start + max_seq_len])),
            document.ids[start : start + max_seq_len],
        )
        for document in token_documents
        for start in range(0, len(document.ids), max_seq_len)
    ]
    pieces.sort(key=lambda piece: (-piece[0].length, piece[0].document, piece[0].start))
    batches = []
    for first in range(0, len(pieces), batch_size):
        chosen = pieces[first : first + batch_size]
        ids = torch.zeros(len(chosen), chosen[0][0].length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (window, tokens) in enumerate(chosen):
            ids[row, : window.length] = torch.as_tensor(np.asarray(tokens))
            mask[row, : window.length] = 1
        batches.append(([window for window, _ in chosen], ids, mask))
    return batches

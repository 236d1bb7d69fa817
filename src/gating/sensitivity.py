"""What attention is worth at every (layer, token) cell of a text: estimates, and real interventions.

The cost of a cell is KL(base model || hybrid with that one cell switched to Mamba), in nats, summed over the positions
whose prediction the cell can change. `intervention_kl` measures it, one forward per cell. `fisher_sensitivity`
estimates all cells of a text at once: with m the Mamba shares of the cells and p the next-token distributions,

    KL(p at m || p at m + e) = e' F e / 2 + O(|e|^3),        F_cc = E over y ~ p of (d log p(y) / d m_c)^2

where F is the Fisher information (Kullback 1959, Information Theory and Statistics, chapter 2; Martens 2020,
arXiv 1412.1193, section 5). The labels y are drawn from the model. With the text's own next tokens in their place it
would be another matrix (Kunstner et al. 2019, arXiv 1905.12558) and, as a gate, hindsight: `control_hindsight`.

Cells are those of the layers with sidecars, document id -> layer -> [N], one value per input position 0 .. N - 1
(N = ids - 1). Each predicted token counts once; a cell is charged for what it does in every window that holds it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from src.base import stats
from src.base.text_data import TokenDocument, Window
from src.eval_utils import kept_logits
from src.hybrid.gates import MaskGate, document_key
from src.hybrid.layer import attachment_of, bypass_sidecars
from src.models.windows import evaluation_mode, read_windows

# document id -> layer -> [N]
Cells = dict[str, dict[int, np.ndarray]]
CELLS_PER_BATCH = 8  # of `intervention_kl`, each a row of tokens


@contextmanager
def mamba_shares(model: nn.Module, shares: Mapping[int, torch.Tensor | float]) -> Iterator[None]:
    """Inside, each attached layer mixes with the share given: a tensor [B, T] (gradients flow through it) or a float.

    A float of 0 spares the layer its sidecar. Raises ValueError unless `shares` names exactly the attached layers.
    """
    attachment = attachment_of(model)
    if sorted(shares) != attachment.layers:
        raise ValueError(f"shares are given for layers {sorted(shares)}, sidecars are attached to {attachment.layers}")
    before = attachment.gate, attachment.batch_masks, attachment.bypassed
    try:
        attachment.set_gate(MaskGate({}))
        attachment.batch_masks, attachment.bypassed = dict(shares), False
        yield
    finally:
        attachment.set_gate(before[0])
        attachment.batch_masks, attachment.bypassed = before[1:]


def fisher_cells(
    model: nn.Module,
    input_ids: torch.Tensor,
    keep: torch.Tensor,
    base_share: float,
    samples: int,
    generator: torch.Generator,
) -> dict[int, np.ndarray]:
    """layer -> [B, T] float64: mean over sampled label sequences of (d log-likelihood / d share)^2, nats.

    input_ids [B, T]: rows without padding. keep [B, T] bool: the positions whose next token counts. base_share: where
    labels are drawn and the derivative is taken. generator: on the CPU, for the same draws on every device. A
    sequence's log-likelihood sums over positions; given the text, its labels are independent and their scores have mean
    0, so the square's expectation is F_cc. Cost: one forward and `samples` backwards down to the lowest attached layer,
    none of them for weights; memory: their activations, and about four float32 arrays of kept positions x V.
    """
    shares = {
        layer: torch.full(input_ids.shape, base_share, device=input_ids.device, requires_grad=True)
        for layer in attachment_of(model).layers
    }
    squares = {layer: np.zeros(tuple(input_ids.shape)) for layer in shares}
    with _frozen(model), mamba_shares(model, shares), torch.enable_grad():
        logits = kept_logits(model, input_ids, torch.ones_like(input_ids), keep)
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        probabilities = log_probs.detach().exp().cpu()
        labels = torch.multinomial(probabilities, samples, replacement=True, generator=generator).to(logits.device)
        for sample in range(samples):
            log_likelihood = log_probs.gather(-1, labels[:, sample, None]).sum()
            # autograd.grad, not backward: nothing is written into any .grad
            gradients = torch.autograd.grad(log_likelihood, list(shares.values()), retain_graph=sample + 1 < samples)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                square += gradient.double().square().cpu().numpy() / samples
    return squares


def fisher_sensitivity(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    stride: int,
    samples: int = 16,
    base_shares: Sequence[float] = (0.0,),
    seed: int = 0,
    progress: str | None = None,
) -> Cells:
    """Estimated sensitivity of every cell: the Fisher diagonal F_cc, averaged over `base_shares`; nats, >= 0.

    F_cc / 2 estimates the cost of switching cell c, to second order around the base shares; their ranks are the same.
    The text is the model's input and no more: labels are drawn from the model, `samples` sequences per window and base
    share, from (seed, document, window, base share) alone. A document's last token is not even read. One window at a
    time; `progress` labels a progress bar over documents.
    """

    def squares(document: TokenDocument, window: Window, input_ids: torch.Tensor, keep: torch.Tensor):
        for index, base_share in enumerate(base_shares):
            entropy = (seed, document_key(document.id) & 0xFFFFFFFFFFFFFFFF, window.start, index)
            state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
            generator = torch.Generator().manual_seed(state)
            yield fisher_cells(model, input_ids, keep, base_share, samples, generator)

    return _sum_over_windows(model, token_documents, max_seq_len, stride, squares, progress)


def control_hindsight(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    stride: int,
    base_shares: Sequence[float] = (0.0,),
    progress: str | None = None,
) -> Cells:
    """d NLL / d share of every cell, nats, averaged over `base_shares`: what Mamba costs on *these very* next tokens.

    It has seen the answers, so a gate made of it gains by hindsight, far below what attention is worth in expectation
    (negative values: Mamba happens to guess better). A control under this name only; the oracle is
    `fisher_sensitivity`.
    """

    def gradients(document: TokenDocument, window: Window, input_ids: torch.Tensor, keep: torch.Tensor):
        targets = torch.as_tensor(document.ids[window.first_scored : window.stop]).to(input_ids.device)
        for base_share in base_shares:
            shares = {
                layer: torch.full(input_ids.shape, base_share, device=input_ids.device, requires_grad=True)
                for layer in attachment_of(model).layers
            }
            with _frozen(model), mamba_shares(model, shares), torch.enable_grad():
                logits = kept_logits(model, input_ids, torch.ones_like(input_ids), keep)
                nll = F.cross_entropy(logits.float(), targets, reduction="sum")
                slopes = torch.autograd.grad(nll, list(shares.values()))
            yield {layer: slope.double().cpu().numpy() for layer, slope in zip(shares, slopes, strict=True)}

    return _sum_over_windows(model, token_documents, max_seq_len, stride, gradients, progress)


@torch.no_grad()
def intervention_kl(
    model: nn.Module,
    document: TokenDocument,
    cells: Sequence[tuple[int, int]],
    max_seq_len: int,
    stride: int,
    share: float = 1.0,
) -> np.ndarray:
    """KL(base model || hybrid with this one cell at `share`) per cell, nats, float64 [C].

    cells: C pairs (layer, input position). share 1 switches the cell to Mamba; all others stay with attention. The KL
    is summed over the predictions from the cell's own position on; earlier ones cannot change. Cost: per cell one
    forward of each window that holds it, CELLS_PER_BATCH cells of one layer at a time.
    Raises ValueError for a cell outside the attached layers or the document.
    """
    attachment, length = attachment_of(model), len(document.ids) - 1
    for layer, position in cells:
        if layer not in attachment.layers or not 0 <= position < length:
            raise ValueError(
                f"cell (layer {layer}, position {position}) is not there: sidecars are attached to layers "
                f"{attachment.layers}, document {document.id!r} has input positions 0 to {length - 1}"
            )
    kl = np.zeros(len(cells))
    with _frozen(model):
        for reading in read_windows(model, [document], max_seq_len, stride):
            window, input_ids, keep = reading.window, reading.input_ids, reading.scored()
            inside = [i for i, (_, position) in enumerate(cells) if window.start <= position < window.stop - 1]
            if not inside:
                continue
            with bypass_sidecars(model):
                base = _log_probs(kept_logits(model, input_ids, torch.ones_like(input_ids), keep))
            for chosen in _by_layer(cells, inside):
                layer = cells[chosen[0]][0]
                columns = torch.tensor([cells[i][1] - window.start for i in chosen], device=input_ids.device)
                rows = torch.arange(len(chosen), device=input_ids.device)
                mask = torch.zeros(len(chosen), input_ids.shape[1], device=input_ids.device)
                mask[rows, columns] = share
                behind = torch.arange(input_ids.shape[1], device=input_ids.device) >= columns[:, None]
                batch, kept = input_ids.expand(len(chosen), -1), keep & behind
                with mamba_shares(model, {index: mask if index == layer else 0.0 for index in attachment.layers}):
                    logits = kept_logits(model, batch, torch.ones_like(batch), kept)
                # every row keeps a tail of the base model's positions
                for i, tail in zip(chosen, logits.split(kept.sum(dim=-1).tolist()), strict=True):
                    reference = base[len(base) - len(tail) :]
                    kl[i] += float(F.kl_div(_log_probs(tail), reference, reduction="sum", log_target=True))
    return kl


def draw_cells(
    token_documents: Sequence[TokenDocument], layers: Sequence[int], per_layer: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """document id -> cells (layer, position): `per_layer` random input positions of each document in each layer.

    Drawn without replacement from (seed, document, layer); a shorter document gives all its positions.
    """
    drawn = {}
    for document in token_documents:
        length = len(document.ids) - 1
        drawn[document.id] = []
        for layer in layers:
            rng = np.random.default_rng([seed, document_key(document.id) & 0xFFFFFFFFFFFFFFFF, layer])
            positions = np.sort(rng.permutation(length)[:per_layer])
            drawn[document.id] += [(layer, int(position)) for position in positions]
    return drawn


def agreement(
    estimates: Sequence[float],
    interventions: Sequence[float],
    layers: Sequence[int],
    documents: Sequence[str],
    resamples: int = 1_000,
    seed: int = 0,
) -> dict[str | int, stats.Interval]:
    """Rank correlation of two values per cell, over "all" cells and within each layer, intervals by document bootstrap.

    All arguments [C]: a cell's estimate, its measured KL, its layer and its document. The figure of all cells also
    counts that layers differ; those per layer are what a mask with fixed counts per layer depends on. Raises ValueError
    as `stats.rank_correlation` does (fewer than two documents, constant values), also for any layer.
    """
    estimates, interventions = np.asarray(estimates, dtype=np.float64), np.asarray(interventions, dtype=np.float64)
    layers, documents = np.asarray(layers), np.asarray(documents)

    def correlation(cells: np.ndarray) -> stats.Interval:
        return stats.rank_correlation(
            estimates[cells], interventions[cells], documents[cells], resamples=resamples, seed=seed
        )

    chosen = {"all": np.ones(len(layers), dtype=bool)} | {int(layer): layers == layer for layer in np.unique(layers)}
    return {layer: correlation(cells) for layer, cells in chosen.items()}


# -- windows
def _sum_over_windows(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    stride: int,
    measure: Callable[..., Iterator[dict[int, np.ndarray]]],
    progress: str | None,
) -> Cells:
    """Per cell the sum over windows of the mean of what `measure(document, window, input_ids, keep)` yields.

    Every yielded value maps layer -> [1, T] of the window.
    """
    result: Cells = {}
    for reading in read_windows(model, token_documents, max_seq_len, stride, progress):
        document, window = reading.document, reading.window
        if document.id not in result:
            result[document.id] = {layer: np.zeros(len(document.ids) - 1) for layer in attachment_of(model).layers}
        parts = list(measure(document, window, reading.input_ids, reading.scored()))
        for layer, values in result[document.id].items():
            values[window.start : window.stop - 1] += np.mean([part[layer][0] for part in parts], axis=0)
    return result


def _by_layer(cells: Sequence[tuple[int, int]], chosen: list[int]) -> Iterator[list[int]]:
    """Indices `chosen` into the cells in batches of at most CELLS_PER_BATCH, each of one layer."""
    for layer in sorted({cells[i][0] for i in chosen}):
        same = [i for i in chosen if cells[i][0] == layer]
        for first in range(0, len(same), CELLS_PER_BATCH):
            yield same[first : first + CELLS_PER_BATCH]


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float64: the KL of one cell is a small difference summed over positions and vocabulary."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float64)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and no parameter requires a gradient: graphs begin at the lowest attached layer."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluation_mode(model):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

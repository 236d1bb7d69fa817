"""What a row of results costs: FLOPs, tokens per second, memory."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import Mamba2Config

from src import eval_utils
from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef
from src.hybrid.layer import attachment_of, is_attached
from src.hybrid.sidecar import SidecarSettings, attention_settings, sidecar_config
from src.models import costs
from src.models.families import decoder_layers, has_router
from src.routing_extractor import RoutingExtractor


def active_experts(
    model: nn.Module, documents: Sequence[TokenDocument], max_seq_len: int, batch_size: int
) -> list[float]:
    """Fraction of experts that a token activates (1 - sparsity), mean per layer [L] over the tokens of `documents`.

    1.0 everywhere for a model without router.
    """
    layers = len(decoder_layers(model))
    if not has_router(model):
        return [1.0] * layers
    batches: list[list[WindowRef]] = []
    active, seen = np.zeros(layers), np.zeros(layers)

    def on_layer(layer: int, activations: torch.Tensor) -> None:  # [B, T, E]
        for row, window in enumerate(batches[-1]):
            active[layer] += float((activations[row, : window.length] != 0).sum()) / activations.shape[-1]
            seen[layer] += window.length

    with RoutingExtractor(model, on_layer=on_layer):
        eval_utils.score_documents(model, documents, max_seq_len, max_seq_len, batch_size, on_batch=batches.append)
    return (active / seen).tolist()


def sidecar_shape(model: nn.Module, settings: SidecarSettings, layer: int) -> Mamba2Config:
    """The shape of a sidecar of these settings beside a layer's attention; the model has none attached."""
    if settings.init == "attention":
        settings = attention_settings(model, layer, settings)
    return sidecar_config(model.config.hidden_size, 0, settings)


def flops_columns(
    model: nn.Module,
    lengths: Sequence[int],
    active: Sequence[float],
    sidecar: Mamba2Config | None = None,
    shares: Mapping[int, float] | None = None,
    hard: bool = False,
) -> dict[str, float]:
    """flops_ideal and flops_executed per token, averaged over documents of `lengths` tokens, weighted by length.

    active: the fraction of experts that a token activates, per layer. sidecar: the shape of the sidecars, if any.
    shares: the mean mamba share of each hybrid layer; None for the base model. hard: as in `costs.flops_ideal`.
    """
    shape = costs.model_shape(model.config)
    shares = shares or {}
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    weights = values * counts / (values * counts).sum()
    ideal = [costs.flops_ideal(shape, int(n), active, sidecar, shares, hard) for n in values]
    executed = [costs.flops_executed(shape, int(n), sidecar, shares) for n in values]
    return {"flops_ideal": float(weights @ ideal), "flops_executed": float(weights @ executed)}


def measure(
    model: nn.Module, documents: Sequence[TokenDocument], max_seq_len: int, stride: int, batch_size: int
) -> dict:
    """tokens_per_second and memory_gb of scoring `documents`, nothing else held; timing columns."""
    device = eval_utils.model_device(model)
    eval_utils.reset_peak_memory(device)
    on_batch = attachment_of(model).on_batch if is_attached(model) else None
    scores = eval_utils.score_documents(model, documents, max_seq_len, stride, batch_size, on_batch=on_batch)
    return {"tokens_per_second": scores.tokens_per_second, "memory_gb": eval_utils.peak_memory_gb(device)}


def speed_sample(documents: Sequence[TokenDocument], tokens: int = 6_000) -> list[TokenDocument]:
    """The longest documents that together hold about `tokens` tokens (at least one document)."""
    longest = sorted(documents, key=lambda document: (-len(document.ids), document.id))
    totals = np.cumsum([len(document.ids) for document in longest])
    return longest[: max(int((totals <= tokens).sum()), 1)]

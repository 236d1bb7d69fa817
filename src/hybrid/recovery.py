"""What distilled sidecars win back of the attention that they stand in for."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from src.base.text_data import TokenDocument
from src.eval_utils import score_documents
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.models.families import decoder_layers


@dataclass(frozen=True)
class Recovery:
    """Nats per token of the base model, with the layers' attention zeroed, and with Mamba in its place (alpha 1)."""

    base: float
    zeroed: float
    mamba: float
    tokens: int

    @property
    def recovered(self) -> float:
        """Share of what zeroing costs that the sidecars win back: (zeroed - mamba) / (zeroed - base)."""
        return (self.zeroed - self.mamba) / (self.zeroed - self.base)


def measure_recovery(
    model: nn.Module,
    layers: Sequence[int],
    documents: Sequence[TokenDocument],
    folder: str | Path,
    stage: str,
    max_seq_len: int,
    stride: int,
    batch_size: int,
) -> Recovery:
    """How much of these layers' attention the sidecars of a stage replace, on `documents`.

    The model comes without sidecars and leaves without. Raises ValueError as `attach_mamba_sidecar`.
    """

    def nll(label):
        return score_documents(model, documents, max_seq_len, stride, batch_size, progress=label)

    base = nll("base model")
    with zeroed_attention(model, layers):
        zeroed = nll("attention zeroed")
    attach_mamba_sidecar(model, layers, alpha=1.0, gate_mode="fixed", sidecar_dir=folder, stage=stage)
    try:
        mamba = nll(f"stage {stage.upper()} at alpha 1")
    finally:
        detach_mamba_sidecars(model)
    return Recovery(base.nll_per_token, zeroed.nll_per_token, mamba.nll_per_token, int(base.tokens.sum()))


@contextmanager
def zeroed_attention(model: nn.Module, layers: Sequence[int]) -> Iterator[nn.Module]:
    """Inside, the sequence mixers of `layers` put out zeros: the residual stream passes them by."""
    with ExitStack() as hooks:
        for layer in layers:
            hook = decoder_layers(model)[layer].self_attn.register_forward_hook(
                lambda _module, _inputs, output: (torch.zeros_like(output[0]), *output[1:])
            )
            hooks.enter_context(hook)
        yield model

"""Attaching sidecars to a model, and taking them off again."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from src.base.errors import UserError
from src.hybrid.checkpoints import RETRAIN, load_sidecars, read_index
from src.hybrid.gates import Gate, make_gate
from src.hybrid.layer import GatedHybridLayer, SidecarAttachment, attachment_of, is_attached
from src.hybrid.sidecar import SidecarSettings, new_sidecar
from src.models.families import decoder_layers, resolve_layers


def attach_mamba_sidecar(
    model: nn.Module,
    layer_indices: Sequence[int],
    alpha: float = 0.5,
    gate_mode: str = "fixed",
    *,
    signal: str = "previous",
    hard: bool = False,
    temperature: float | None = None,
    threshold: float = 0.7,
    gate: Gate | None = None,
    settings: SidecarSettings | None = None,
    sidecar_dir: str | Path | None = None,
    stage: str = "a",
    seed: int = 0,
) -> nn.Module:
    """Put a sidecar beside the attention of the given layers, and a gate before both; returns the model.

    gate_mode: fixed, routing, learned or random with the settings that follow it (see `gates.make_gate`); `gate`, a
        gate object, beats them all. The sidecars are untrained, drawn from `seed` (a control), unless `sidecar_dir`
        names a folder of trained ones, which then also gives the settings.

    Raises ValueError for layers that are not there, an unknown mode, alpha outside [0, 1], sidecars attached already,
    and what `set_gate` and `load_sidecars` refuse; the model is then unchanged.
    """
    if is_attached(model):
        there = attachment_of(model).layers
        raise ValueError(f"sidecars are attached already, to layers {there}; call detach_mamba_sidecars first")
    layers = decoder_layers(model)
    indices = resolve_layers(list(layer_indices), len(layers))
    gate = gate or make_gate(gate_mode, alpha, signal, hard, temperature, threshold, seed)
    if sidecar_dir is not None:
        stored = SidecarSettings(**read_index(sidecar_dir)["settings"])
        if settings is not None and settings != stored:
            raise UserError(f"the sidecars in {sidecar_dir} are {stored}, not {settings}; to make others", RETRAIN)
        settings = stored
    settings = settings or SidecarSettings()
    sidecars = [new_sidecar(model, index, settings, seed) for index in indices]
    attachment = SidecarAttachment(model, indices, settings)
    try:
        attachment.set_gate(gate)
        for index, sidecar in zip(indices, sidecars, strict=True):
            hybrid = GatedHybridLayer(layers[index].self_attn, sidecar, attachment, index)
            hybrid.gate_proj.to(next(sidecar.parameters()).device).requires_grad_(False)
            sidecar.requires_grad_(False)
            layers[index].self_attn = hybrid.train(model.training)
        if sidecar_dir is not None:
            load_sidecars(model, sidecar_dir, stage)
    except BaseException:
        attachment.detach()
        raise
    return model


def detach_mamba_sidecars(model: nn.Module) -> nn.Module:
    """Give every layer its own attention back and remove all hooks; returns the model.

    Raises ValueError when no sidecars are attached.
    """
    attachment_of(model).detach()
    return model

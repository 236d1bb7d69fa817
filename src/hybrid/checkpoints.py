"""Sidecars and learned gates on disk: which base model they fit, which layers and stages are there."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from src.base.errors import UserError
from src.base.results import replace_file
from src.hybrid.layer import attachment_of
from src.hybrid.sidecar import MambaSidecar, SidecarSettings
from src.models.families import decoder_layers

STAGES = ("a", "b")
FORMAT = 1  # of sidecars.json
RETRAIN = "scripts/04_test_sidecar.py --retrain"
LEARNED_GATES = "learned_gate.safetensors"


def base_fingerprint(model: nn.Module) -> str:
    """sha256 that tells base models apart, with or without sidecars attached, alike for float32, 16-bit and 8-bit loads
    of one 16-bit checkpoint.

    Taken over all names and shapes and, rounded to bfloat16, over embeddings, norms, biases and routers (what 8-bit
    quantisation leaves alone); values below float16's normal range count as 0.
    """
    digest = hashlib.sha256()
    own = {
        name.replace(".self_attn.attention.", ".self_attn."): parameter
        for name, parameter in model.named_parameters()
        if ".self_attn.sidecar." not in name and ".self_attn.gate_proj." not in name
    }
    for name, parameter in sorted(own.items()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.ndim == 1 or "embed_tokens" in name or "router_proj" in name:
            values = parameter.detach().float()
            values = torch.where(values.abs() < 2.0**-14, 0.0, values).bfloat16().cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_sidecar(
    folder: str | Path, stage: str, layer: int, sidecar: MambaSidecar, matrix_dtype: torch.dtype | None = None
) -> Path:
    """Write one sidecar to `<folder>/stage_<stage>/layer_<layer>.safetensors`; returns the path.

    `matrix_dtype` stores the projections and the convolution in fewer bits; decays, steps and norms keep theirs.
    """
    tensors = sidecar.mixer.state_dict()
    if matrix_dtype is not None:
        tensors = {name: tensor.to(matrix_dtype) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    return _save_tensors(sidecar_path(folder, stage, layer), tensors)


def save_sidecars(
    model: nn.Module, folder: str | Path, stage: str, training: dict, matrix_dtype: torch.dtype | None = None
) -> list[Path]:
    """Write all attached sidecars of a stage and their entry in `sidecars.json`; returns the paths written."""
    attachment = attachment_of(model)
    paths = [
        save_sidecar(folder, stage, index, hybrid.sidecar, matrix_dtype)
        for index, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True)
    ]
    return [*paths, update_index(folder, model, attachment.settings, stage, attachment.layers, training)]


def sidecars_sha256(folder: str | Path, stage: str, layers: Sequence[int]) -> str:
    """A hash over the files of these layers' sidecars of a stage."""
    return files_sha256([sidecar_path(folder, stage, layer) for layer in layers])


def files_sha256(files: Sequence[Path]) -> str:
    """A hash over the names and contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def update_index(
    folder: str | Path, model: nn.Module, settings: SidecarSettings, stage: str, layers: Sequence[int], training: dict
) -> Path:
    """Enter trained layers into `<folder>/sidecars.json` (made where absent); `training`: settings, losses, plain JSON.

    What is there for another base model or other settings is dropped from the index: its sidecars no longer fit.
    """
    path = Path(folder) / "sidecars.json"
    base = {
        "fingerprint": base_fingerprint(model),
        "model_type": model.config.model_type,
        "hidden_size": model.config.hidden_size,
        "num_layers": len(decoder_layers(model)),
    }
    head = {"format": FORMAT, "base": base, "settings": asdict(settings)}
    index = read_index(folder) if path.is_file() else {}
    stages = index.get("stages", {}) if {key: index.get(key) for key in head} == head else {}
    entry = stages.setdefault(stage, {"layers": [], "training": {}})
    entry["layers"] = sorted({*entry["layers"], *layers})
    entry["training"] = {**entry["training"], **training}
    replace_file(path, (json.dumps({**head, "stages": dict(sorted(stages.items()))}, indent=1) + "\n").encode())
    return path


def read_index(folder: str | Path) -> dict:
    """`sidecars.json` of a folder. Raises UserError, with the command that makes sidecars, where there is none."""
    path = Path(folder) / "sidecars.json"
    if not path.is_file():
        raise UserError(f"there are no sidecars in {folder}; to make them", RETRAIN)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); to make the sidecars anew", RETRAIN) from error
    if index.get("format") != FORMAT:
        found = f"{path} has format {index.get('format')!r}, this code reads {FORMAT}"
        raise UserError(f"{found}; to make the sidecars anew", RETRAIN)
    return index


def available_layers(folder: str | Path, stage: str) -> list[int]:
    """Layers whose sidecars of a stage (`a` or `b`) are in the folder; [] where there are none at all."""
    _check_stage(stage)
    if not (Path(folder) / "sidecars.json").is_file():
        return []
    return list(read_index(folder)["stages"].get(stage, {}).get("layers", []))


def check_base(model: nn.Module, folder: str | Path) -> None:
    """Raise UserError, with the command to run, unless the folder's sidecars were made for this very base model."""
    if read_index(folder)["base"]["fingerprint"] != base_fingerprint(model):
        raise UserError(
            f"the sidecars in {folder} are of another checkpoint than the model; to make them anew", RETRAIN
        )


def load_sidecars(model: nn.Module, folder: str | Path, stage: str = "a") -> None:
    """Load the trained weights of a stage into all attached sidecars.

    Raises ValueError for sidecars of another checkpoint or of other settings, and layers that the folder lacks.
    """
    attachment = attachment_of(model)
    settings = read_index(folder)["settings"]
    absent = sorted(set(attachment.layers) - set(available_layers(folder, stage)))
    if absent:
        names = ", ".join(map(str, absent))
        raise UserError(f"no stage {stage} sidecar for layer {names} in {folder}; to make them", RETRAIN)
    if settings != asdict(attachment.settings):
        raise ValueError(f"the sidecars in {folder} have settings {settings}, not {asdict(attachment.settings)}")
    check_base(model, folder)
    for layer, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True):
        _load_tensors(hybrid.sidecar.mixer, sidecar_path(folder, stage, layer))


def save_learned_gates(model: nn.Module, folder: str | Path) -> Path:
    """Write the linear gates of all attached layers to `<folder>/learned_gate.safetensors`; returns the path."""
    attachment = attachment_of(model)
    tensors = {
        f"{index}.{name}": tensor
        for index, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True)
        for name, tensor in hybrid.gate_proj.state_dict().items()
    }
    return _save_tensors(Path(folder) / LEARNED_GATES, tensors)


def load_learned_gates(model: nn.Module, folder: str | Path) -> None:
    """Load linear gates into the attached layers. Raises ValueError where the folder has none, or lacks a layer."""
    path = Path(folder) / LEARNED_GATES
    if not path.is_file():
        raise UserError(f"there is no learned gate in {folder}; to train it", RETRAIN)
    check_base(model, folder)
    attachment = attachment_of(model)
    tensors = safetensors.torch.load_file(path)
    absent = [index for index in attachment.layers if f"{index}.weight" not in tensors]
    if absent:
        raise UserError(f"{path} has no gate for layer {', '.join(map(str, absent))}; to train it", RETRAIN)
    for index, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True):
        hybrid.gate_proj.load_state_dict({name: tensors[f"{index}.{name}"] for name in ("weight", "bias")})


def sidecar_path(folder: str | Path, stage: str, layer: int) -> Path:
    """Where a layer's sidecar of a stage is kept. Raises ValueError for an unknown stage."""
    _check_stage(stage)
    return Path(folder) / f"stage_{stage}" / f"layer_{layer}.safetensors"


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r} of sidecars; choose one of {', '.join(STAGES)}")


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    replace_file(path, safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    return path


def _load_tensors(module: nn.Module, path: Path) -> None:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); to make it anew", RETRAIN) from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise UserError(f"{path} does not fit the sidecar's shapes; to make it anew", RETRAIN)
    module.load_state_dict(tensors)

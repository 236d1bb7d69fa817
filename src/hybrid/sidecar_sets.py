"""Which distilled sidecars a run takes: its own, else the shipped ones; sets of them from several seeds."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from torch import nn

from src.base.errors import UserError
from src.base.results import model_slug
from src.hybrid import checkpoints
from src.hybrid.sidecar import SidecarSettings
from src.models.loading import ASSETS_DIR

DISTIL = "scripts/04_test_sidecar.py"


@dataclass(frozen=True)
class SidecarSet:
    """One set of distilled sidecars on some layers: the seed it was distilled from, its folder and stage."""

    seed: int
    folder: Path
    stage: str
    layers: list[int]

    @property
    def has_learned_gates(self) -> bool:
        """Whether learned gates of all its layers were trained with it."""
        path = self.folder / checkpoints.LEARNED_GATES
        if not path.is_file():
            return False
        with safe_open(path, framework="np") as archive:
            return {f"{layer}.weight" for layer in self.layers} <= set(archive.keys())

    def learned_gate_sha256(self) -> str:
        """A hash over the learned gates that were trained with it."""
        return checkpoints.files_sha256([self.folder / checkpoints.LEARNED_GATES])

    def source(self) -> dict[str, object]:
        """The arguments of `attach_mamba_sidecar` that load it."""
        return {"sidecar_dir": self.folder, "stage": self.stage}

    def settings(self) -> SidecarSettings:
        """The geometry of its sidecars."""
        return SidecarSettings(**checkpoints.read_index(self.folder)["settings"])

    def key(self) -> dict[str, object]:
        """What a result measured with it depends on: the layers, and the bytes of their sidecars."""
        return {"layers": self.layers, "sidecars": checkpoints.sidecars_sha256(self.folder, self.stage, self.layers)}

    def identity(self) -> dict[str, object]:
        """What a meta file says of it: seed, folder, stage, layers, and a hash over its files and learned gates."""
        folders = self.folder / f"stage_{self.stage}", self.folder
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        return asdict(self) | {"sha256": checkpoints.files_sha256(files)}


def find_sidecars(
    model: nn.Module, arguments: argparse.Namespace, run_folder: Path, layers: Sequence[int], stage: str | None = None
) -> SidecarSet:
    """The distilled sidecars that a command line asks for (`sidecar_dir`, `stage`), checked to fit the model.

    Raises UserError where there are none or a layer lacks one, ValueError where they belong to another checkpoint.
    """
    folder = sidecar_folder(arguments.sidecar_dir, run_folder, arguments.model)
    found = SidecarSet(seed_of(folder), folder, choose_stage(folder, layers, stage or arguments.stage), list(layers))
    checkpoints.check_base(model, folder)
    return found


def sidecar_folder(given: Path | None, run_folder: Path, model_name: str) -> Path:
    """Where the distilled sidecars are: the folder given, else the run's own (script 04), else the shipped ones.

    Raises UserError where none of them holds sidecars.
    """
    candidates = [given] if given else [run_folder / "sidecars", shipped_folder(model_name)]
    for folder in candidates:
        if checkpoints.available_layers(folder, "a") or checkpoints.available_layers(folder, "b"):
            return folder
    tried = " nor ".join(str(folder) for folder in candidates)
    raise UserError(f"there are no distilled sidecars in {tried}; distil them, or give --sidecar-dir", DISTIL)


def shipped_folder(model_name: str) -> Path:
    """Where a shipped model's sidecars would be."""
    return ASSETS_DIR / f"{model_slug(model_name)}-sidecars"


def choose_stage(folder: Path, layers: Sequence[int], wanted: str = "auto") -> str:
    """Stage "a" or "b" of the sidecars to use for `layers`; "auto" prefers b (trained end to end).

    Raises UserError where a layer has no sidecar of that stage, naming the layers.
    """
    stages = ("b", "a") if wanted == "auto" else (wanted,)
    for stage in stages:
        if set(layers) <= set(checkpoints.available_layers(folder, stage)):
            return stage
    missing = sorted(set(layers) - set(checkpoints.available_layers(folder, stages[-1])))
    absent = f"there is no distilled sidecar of stage {stages[-1].upper()} for layers {missing} in {folder}"
    raise UserError(f"{absent}; choose other layers, or distil them", checkpoints.RETRAIN)


def seed_of(folder: Path) -> int:
    """The seed that a folder's sidecars were distilled from, as its index names it; 0 where it names none."""
    stages = checkpoints.read_index(folder)["stages"].values()
    return int(next((one["training"]["settings"]["seed"] for one in stages if one["training"].get("settings")), 0))


def sidecar_sets(folder: Path) -> dict[int, Path]:
    """Sets of sidecars by the seed that they were distilled from: the folder itself, and its folders `seed_<n>`.

    Raises UserError for two sets of one seed.
    """
    sets = {seed_of(folder): folder}
    for other in sorted(folder.glob("seed_*")):
        number = other.name.removeprefix("seed_")
        if not number.isdigit() or not (other / "sidecars.json").is_file():
            continue
        if int(number) in sets:
            raise UserError(f"{other} and {sets[int(number)]} are both sidecars of seed {number}; remove one of them")
        sets[int(number)] = other
    return dict(sorted(sets.items()))

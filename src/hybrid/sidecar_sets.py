"""Which distilled sidecars a run takes: its own, else the shipped ones; sets of them from several seeds."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from src.base.results import UserError
from src.hybrid.checkpoints import available_layers, read_index


# -- sidecars
def sidecar_folder(given: str | None, run_folder: Path, shipped: Path) -> Path:
    """Where the distilled sidecars are: the folder given, else the run's own (script 04), else the shipped ones.

    Raises UserError where none of them holds sidecars.
    """
    candidates = [Path(given)] if given else [run_folder / "sidecars", shipped]
    for folder in candidates:
        if available_layers(folder, "a") or available_layers(folder, "b"):
            return folder
    tried = " nor ".join(str(folder) for folder in candidates)
    raise UserError(
        f"no distilled sidecars in {tried}; run python scripts/04_test_sidecar.py first, or give --sidecar-dir"
    )


def choose_stage(folder: Path, layers: Sequence[int], wanted: str = "auto") -> str:
    """Stage "a" or "b" of the sidecars to use for `layers`; "auto" prefers b (trained end to end).

    Raises UserError where a layer has no sidecar of that stage, naming the layers.
    """
    stages = ("b", "a") if wanted == "auto" else (wanted,)
    for stage in stages:
        if set(layers) <= set(available_layers(folder, stage)):
            return stage
    missing = sorted(set(layers) - set(available_layers(folder, stages[-1])))
    raise UserError(
        f"no distilled sidecar of stage {stages[-1].upper()} for layers {missing} in {folder}; "
        "run python scripts/04_test_sidecar.py for them, or choose other layers"
    )


def sidecar_sets(folder: Path) -> dict[int, Path]:
    """Sets of sidecars by the seed that they were distilled from: the folder itself, and its folders `seed_<n>`.

    The first has the seed that its index names. Raises UserError for two sets of one seed.
    """
    stages = read_index(folder)["stages"].values()
    seed = next((stage["training"]["settings"]["seed"] for stage in stages if stage["training"].get("settings")), 0)
    sets = {int(seed): folder}
    for other in sorted(folder.glob("seed_*")):
        number = other.name.removeprefix("seed_")
        if not number.isdigit() or not (other / "sidecars.json").is_file():
            continue
        if int(number) in sets:
            raise UserError(f"{other} and {sets[int(number)]} are both sidecars of seed {number}; remove one of them")
        sets[int(number)] = other
    return dict(sorted(sets.items()))


def sidecar_identity(folder: Path, stage: str) -> dict:
    """Which sidecars these are: {"folder", "stage", "sha256" over the stage's files and the learned gates}."""
    digest = hashlib.sha256()
    files = [*sorted((folder / f"stage_{stage}").glob("*.safetensors")), *sorted(folder.glob("*.safetensors"))]
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return {"folder": folder, "stage": stage, "sha256": digest.hexdigest()}

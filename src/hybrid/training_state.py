"""How far an interrupted distillation came, so that the next run goes on from there."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch


class TrainingCheckpoint:
    """One file per stage: finished parts (rows and weights) and the state of the running one, replaced atomically.

    A file of other settings, data or model is ignored, and overwritten at the next save.
    """

    def __init__(self, path: Path, signature: dict):
        self.path, self.signature = path, json.dumps(signature, sort_keys=True)
        self.parts: dict[int, dict] = {}
        if path.is_file():
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if stored.get("signature") == self.signature:
                self.parts = stored["parts"]

    def part(self, number: int) -> "CheckpointPart":
        """The place of one part of the stage."""
        return CheckpointPart(self, number)

    def save(self) -> None:
        """Write all parts; a crash meanwhile leaves the earlier file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        torch.save({"signature": self.signature, "parts": self.parts}, temporary)
        os.replace(temporary, self.path)


@dataclass(frozen=True)
class CheckpointPart:
    """Where one part of a stage is kept: a group of layers of stage A, or all of another stage."""

    checkpoint: TrainingCheckpoint
    number: int

    def load(self) -> dict | None:
        """The state that an earlier run left, or None."""
        return self.checkpoint.parts.get(self.number)

    def save(self, state: dict) -> None:
        """Keep a state: rows, weights, and the optimiser's where training goes on."""
        self.checkpoint.parts[self.number] = state
        self.checkpoint.save()

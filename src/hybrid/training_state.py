"""How far an interrupted distillation came, so that the next run goes on from there."""

import json
import os
from pathlib import Path

import torch


class TrainingCheckpoint:
    """One file per stage: the state of each part (a group of layers of stage A, or all of another stage) that has run.

    A file of other settings, data or model is ignored, and overwritten at the next save.
    """

    def __init__(self, path: Path, signature: dict):
        self.path, self.signature = path, json.dumps(signature, sort_keys=True)
        self.parts: dict[int, dict] = {}
        if path.is_file():
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if stored.get("signature") == self.signature:
                self.parts = stored["parts"]

    def save(self, part: int, state: dict) -> None:
        """Keep the state of a part (rows, weights, the optimiser's); a crash meanwhile leaves the earlier file."""
        self.parts[part] = state
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        torch.save({"signature": self.signature, "parts": self.parts}, temporary)
        os.replace(temporary, self.path)

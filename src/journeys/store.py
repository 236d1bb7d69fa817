"""The store of token journeys: Parquet shards, one row per journey, and what the routers were given beside them.

A journey is what the routers did with one token: at each of L layers the K experts and their gate probabilities.
Needs NumPy and pyarrow only; `collection.py` makes journeys from a model, `records.py` reads and writes JSONL.
"""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.base.errors import UserError
from src.base.results import model_slug

COLLECT = "scripts/journeys/01_collect.py"  # the script that makes what is missing
ROWS_PER_GROUP = 65_536  # of a Parquet file: groups are read in parallel
_METADATA = b"journeys"


@dataclass(frozen=True, eq=False)
class Journeys:
    """N journeys over L MoE layers, K experts each, sorted by dataset, problem and token.

    Attributes:
        dataset [N] str: name of the data set.
        problem_id [N] int32, token_idx [N] int32: position within the problem's prompt and generation.
        token_id [N] int32: -1 where unknown (imported records).
        token [N] str (object): the token's text, "" where unknown.
        is_generated [N] bool: False for tokens of the prompt.
        experts [N, L, K] uint8, or int16 where -1 pads: strongest first.
        gating_probs [N, L, K] float16: sum 1 over K; 0 on padding, NaN where the engine gives none.
        model: as the user named it. layers: indices of the L decoder layers. num_experts: E.
    """

    dataset: np.ndarray
    problem_id: np.ndarray
    token_idx: np.ndarray
    token_id: np.ndarray
    token: np.ndarray
    is_generated: np.ndarray
    experts: np.ndarray
    gating_probs: np.ndarray
    model: str
    layers: tuple[int, ...]
    num_experts: int

    def __len__(self) -> int:
        return len(self.problem_id)

    def select(self, rows: np.ndarray | slice) -> "Journeys":
        """The journeys at `rows` (indices, mask [N] or slice), in that order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ROW_FIELDS})


ROW_FIELDS = ("dataset", "problem_id", "token_idx", "token_id", "token", "is_generated", "experts", "gating_probs")


# -- the store
def write_shard(path: str | os.PathLike, journeys: Journeys, run: dict | None = None) -> Path:
    """Write journeys as one Parquet file, whole or not at all; the same journeys give the same bytes.

    Columns are those of `Journeys`, experts and gating_probs as fixed-size lists of L*K values. run: what the shard was
    made from (JSON values), for `shard_run`.
    """
    path, top_k = Path(path), journeys.experts.shape[2]
    metadata = {"model": journeys.model, "layers": list(journeys.layers), "num_experts": journeys.num_experts,
                "top_k": top_k, "run": run or {}}  # fmt: skip
    values = len(journeys.layers) * top_k
    columns = {
        "dataset": pa.array(journeys.dataset, pa.string()).dictionary_encode(),
        "problem_id": pa.array(journeys.problem_id, pa.int32()),
        "token_idx": pa.array(journeys.token_idx, pa.int32()),
        "token_id": pa.array(journeys.token_id, pa.int32()),
        "token": pa.array(journeys.token, pa.string()).dictionary_encode(),
        "is_generated": pa.array(journeys.is_generated, pa.bool_()),
        "experts": _fixed_lists(journeys.experts, values),
        "gating_probs": _fixed_lists(journeys.gating_probs.astype(np.float16, copy=False), values),
    }
    # not nullable: readers then skip the levels that would mark gaps, which takes most of the time otherwise
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    schema = pa.schema(fields, metadata={_METADATA: json.dumps(metadata, sort_keys=True).encode()})
    table = pa.Table.from_arrays(list(columns.values()), schema=schema)
    with whole_file(path) as file:
        options = {"compression": "zstd", "use_dictionary": ["dataset", "token"], "write_statistics": False}
        pq.write_table(table, file, row_group_size=ROWS_PER_GROUP, **options)
    return path


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator:
    """A file open for writing that takes its place when all is written; nothing is left behind where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fixed_lists(values: np.ndarray, size: int) -> pa.FixedSizeListArray:
    """[N, L, K] -> N lists of `size` = L * K values, without a copy."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.field("item", flat.type, nullable=False), size))


def shard_files(folder: str | os.PathLike) -> list[Path]:
    """The shards of a store, sorted by name; `folder` may be the store or the folder that holds `store/`."""
    folder = Path(folder)
    inner = folder / "store"
    return sorted((inner if inner.is_dir() else folder).glob("*.parquet"))


def shard_name(dataset: str, index: int) -> str:
    """File name of shard `index` of a data set."""
    return f"{model_slug(dataset)}-{index:05d}.parquet"


def shards_of(folder: str | os.PathLike, dataset: str) -> list[Path]:
    """The shards that `shard_name` names for this data set, sorted."""
    pattern = re.compile(re.escape(model_slug(dataset)) + r"-\d{5,}\.parquet")
    return sorted(path for path in Path(folder).glob("*.parquet") if pattern.fullmatch(path.name))


def remove_left_overs(folder: str | os.PathLike) -> None:
    """Delete the temporary files that a killed run left in a store and beside it."""
    for file in (*Path(folder).glob(".*.parquet.*.tmp"), *hidden_folder(folder).glob(".*.tmp")):
        file.unlink()


def shard_run(path: str | os.PathLike) -> dict:
    """What a shard was made from, as given to `write_shard`. Raises UserError for a file that is no shard."""
    return _shard_metadata(Path(path))["run"]


def _shard_metadata(path: Path) -> dict:
    try:
        metadata = pq.read_schema(path, memory_map=True).metadata or {}
        return json.loads(metadata[_METADATA])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        advice = "delete it and collect again"
        raise UserError(f"{path} is damaged, or no shard of a journey store; {advice}", COLLECT) from error


def read_journeys(path: str | os.PathLike) -> Journeys:
    """All journeys of a store (a folder of shards, or the folder above its `store/`) or of one shard, memory-mapped.

    Raises UserError where there is none, for a damaged shard, and where shards are of different models or shapes.
    """
    path = Path(path)
    files = [path] if path.is_file() else shard_files(path)
    if not files:
        raise UserError(f"no journeys in {path}; collect them first", COLLECT)
    shape = None
    for file in files:
        metadata = _shard_metadata(file)
        found = {key: metadata[key] for key in ("model", "layers", "num_experts", "top_k")}
        if shape is not None and found != shape:
            keys = ", ".join(f"{key} {shape[key]} and {found[key]}" for key in shape if shape[key] != found[key])
            raise UserError(f"{path} mixes shards of different models: {keys} ({file.name}); keep one model per folder")
        shape = found
    try:
        tables = [pq.read_table(file, memory_map=True, read_dictionary=["dataset", "token"]) for file in files]
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    lists = {}
    for name in ("experts", "gating_probs"):
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=True)
        lists[name] = flat.reshape(-1, len(shape["layers"]), shape["top_k"])
    return Journeys(
        dataset=_strings(table["dataset"], np.str_),
        problem_id=table["problem_id"].to_numpy(),
        token_idx=table["token_idx"].to_numpy(),
        token_id=table["token_id"].to_numpy(),
        token=_strings(table["token"], object),
        is_generated=table["is_generated"].to_numpy(),
        **lists,
        model=shape["model"],
        layers=tuple(shape["layers"]),
        num_experts=shape["num_experts"],
    )


# -- router inputs
@dataclass(frozen=True, eq=False)
class Hidden:
    """What the routers were given for R journeys of a store, and the routers.

    Attributes:
        rows [R] int64: the journeys, as indices into `read_journeys` of the same store, ascending.
        states: memory-mapped arrays [r, L, D], float16 or float32, R rows in all, in the order of `rows`.
        weight [L, E, D] float32, activation: act(x @ weight.T) ranks the experts for a router input x; act is the
            identity ("softmax") or ReLU ("relu": experts at 0 are inactive).
    """

    rows: np.ndarray
    states: list[np.ndarray]
    weight: np.ndarray
    activation: str

    def layer(self, place: int) -> np.ndarray:
        """Router inputs [R, D] float32 of one layer, by its place among the L."""
        return np.concatenate([part[:, place] for part in self.states], dtype=np.float32)


def hidden_folder(store: str | os.PathLike) -> Path:
    """Where the router inputs of a store (the folder of the shards) are."""
    return Path(store).absolute().parent / "hidden"


def hidden_file(shard: str | os.PathLike) -> Path:
    """Where the router inputs of a shard are."""
    return hidden_folder(Path(shard).parent) / f"{Path(shard).stem}.npy"


def routers_file(store: str | os.PathLike) -> Path:
    """Where the routers are (weight and activation, as `Hidden` has them)."""
    return hidden_folder(store) / "routers.npz"


def write_hidden(shard: str | os.PathLike, states: np.ndarray) -> Path:
    """Write router inputs [R, L, D] of a shard's first R journeys, whole or not at all; done before `write_shard`.

    Raises UserError where some are not finite (beyond the range of float16).
    """
    if not np.isfinite(states).all():
        raise UserError(
            f"router inputs of {Path(shard).stem} are not finite as {states.dtype}; add --hidden-dtype float32"
        )
    path = hidden_file(shard)
    with whole_file(path) as file:
        np.lib.format.write_array(file, states, allow_pickle=False)
    return path


def read_hidden(folder: str | os.PathLike) -> Hidden | None:
    """Router inputs and routers of a store (as for `read_journeys`); None where its runs saved none.

    Raises UserError where a shard's router inputs, or the routers, are missing, damaged or of another shape.
    """
    wanted, first = [], 0
    for shard in shard_files(folder):
        problems = pq.read_table(shard, columns=["problem_id"])["problem_id"].to_numpy()
        count = int((problems < (shard_run(shard).get("save_hidden") or 0)).sum())
        if count:
            wanted.append((shard, first, count))
        first += len(problems)
    if not wanted:
        return None
    routers = _load(routers_file(wanted[0][0].parent))
    num_layers, _, width = routers["weight"].shape
    states = []
    for shard, _, count in wanted:
        part = _load(hidden_file(shard))
        if part.shape != (count, num_layers, width):
            needed = f"{shard.name} needs {(count, num_layers, width)}; delete it and collect again"
            raise UserError(f"{hidden_file(shard)} has shape {part.shape}, but {needed}", COLLECT)
        states.append(part)
    rows = np.concatenate([np.arange(first, first + count) for _, first, count in wanted])
    return Hidden(rows, states, routers["weight"], str(routers["activation"]))


def _load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """A .npy, memory-mapped, or all arrays of an .npz."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r")
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; collect again as before, which makes what is missing", COLLECT) from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; delete it and collect again", COLLECT) from error


def _strings(column: pa.ChunkedArray, dtype: type) -> np.ndarray:
    """A dictionary-encoded column as NumPy strings [N]: each distinct string is made once."""
    column = column.combine_chunks()
    values = np.array(column.dictionary.to_pylist(), dtype=dtype)
    return values[column.indices.to_numpy()]


def expert_dtype(num_experts: int, padded: bool) -> type:
    """uint8 where ids 0 .. num_experts - 1 fit and nothing is padded with -1, else int16."""
    return np.uint8 if num_experts <= 256 and not padded else np.int16

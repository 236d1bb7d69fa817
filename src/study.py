"""What scripts 05 to 07 share: which sidecars they take, rows with paired intervals, cost columns, resume.

A row of a result file is derived from a table of sums per document (the clusters of the bootstrap), and both are
written after every row, so that an interrupted run loses one row at most. Sums are rounded to what the CSV holds before
anything is derived from them: a resumed run then gives the same bytes as an uninterrupted one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from src import costs, eval_utils, results, stats
from src.eval_utils import Scores, WindowRef
from src.mamba_sidecar import attachment_of, available_layers, is_attached, read_index
from src.model_loading import decoder_layers, has_router, memory_estimate
from src.results import UserError
from src.routing_extractor import RoutingExtractor
from src.text_data import TokenDocument


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


# -- rows
def document_table(scores: Scores) -> pd.DataFrame:
    """Sums per document: document, domain, tokens, num_bytes, nll (nats), and kl (nats), top1 where measured."""
    table = pd.DataFrame(
        {
            "document": scores.ids,
            "domain": scores.domains,
            "tokens": scores.tokens,
            "num_bytes": scores.num_bytes,
            "nll": as_written(scores.nll),
        }
    )
    if scores.kl is not None:
        table["kl"], table["top1"] = as_written(scores.kl), scores.top1
    return table


def mean_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of the same documents (one per seed) -> one, with their mean NLL."""
    mean = tables[0].copy()
    mean["nll"] = as_written(np.mean([table["nll"].to_numpy() for table in tables], axis=0))
    return mean


def as_written(values) -> np.ndarray:
    """float64 [N] rounded to the digits that `results.write_csv` keeps; NaN stays."""
    return np.array([float(results.format_value(float(value)) or "nan") for value in values])


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: resamples of documents, their seed, and the level (0.95); studentised (see stats.py)."""

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95

    def difference(self, table: pd.DataFrame, other: pd.DataFrame) -> stats.Interval:
        """Paired difference of mean NLL (nats per token), `table` minus `other`; NaN bounds below two documents."""
        if table["document"].tolist() != other["document"].tolist():
            raise ValueError("a paired difference needs the same documents in the same order")
        a, b, count = table["nll"].to_numpy(), other["nll"].to_numpy(), table["tokens"].to_numpy()
        if len(table) < 2:
            return stats.Interval(float((a.sum() - b.sum()) / count.sum()), float("nan"), float("nan"))
        return stats.paired_difference(a, b, count, self.resamples, self.seed, self.level, "studentised")


def quality(table: pd.DataFrame, baseline: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, float]:
    """perplexity, delta and pct_change of it, delta_nll with ci_low and ci_high (paired, documents), bits_per_byte.

    kl and top1_agreement are means per token, NaN where not measured. delta_nll is in nats per token.
    """
    tokens = table["tokens"].sum()
    perplexity = float(np.exp(table["nll"].sum() / tokens))
    base = float(np.exp(baseline["nll"].sum() / baseline["tokens"].sum()))
    if table is baseline:
        difference = stats.Interval(0.0, 0.0, 0.0)
    else:
        difference = bootstrap.difference(table, baseline)
    measured = "kl" in table and table["kl"].notna().all()
    return {
        "perplexity": perplexity,
        "delta": perplexity - base,
        "pct_change": 100.0 * (perplexity / base - 1.0),
        "delta_nll": difference.estimate,
        "ci_low": difference.low,
        "ci_high": difference.high,
        "bits_per_byte": float(table["nll"].sum() / np.log(2) / table["num_bytes"].sum()),
        "kl": float(table["kl"].sum() / tokens) if measured else float("nan"),
        "top1_agreement": float(table["top1"].sum() / tokens) if measured else float("nan"),
    }


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
        rows = None if restart else results.finished_rows(path, key, meta)
        tables = None if restart else results.finished_rows(documents_path, [key, "document"], meta)
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
            results.write_csv(self.documents_path, frame, self.meta)
        rows = list(self.rows.values())
        if rows:
            results.write_csv(self.path, rows if order is None else sorted(rows, key=order), self.meta)


def is_finished(path: Path, meta: dict) -> bool:
    """Whether an earlier run with the same meta (times aside) wrote this file; for files that are not CSV."""
    try:
        earlier = json.loads(results.meta_path(path).read_text(encoding="utf-8"))
        same_bytes = hashlib.sha256(Path(path).read_bytes()).hexdigest() == earlier["file_sha256"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False
    now = json.loads(json.dumps(meta))
    return same_bytes and all(
        earlier.get(key) == now.get(key) for key in {*earlier, *now} if key not in results.TIMING_META
    )


# -- costs
def active_experts(
    model: nn.Module, documents: Sequence[TokenDocument], max_seq_len: int, batch_size: int
) -> list[float]:
    """Fraction of experts that a token activates (1 - sparsity), mean per layer [L] over the tokens of `documents`.

    1.0 everywhere for a model without router.
    """
    layers = len(decoder_layers(model))
    if not has_router(model):
        return [1.0] * layers
    lengths: list[int] = []
    active, seen = np.zeros(layers), np.zeros(layers)

    def on_batch(rows: list[WindowRef]) -> None:
        lengths[:] = [row.length for row in rows]

    def on_layer(layer: int, activations: torch.Tensor) -> None:  # [B, T, E]
        for row, length in enumerate(lengths):
            active[layer] += float((activations[row, :length] != 0).sum()) / activations.shape[-1]
            seen[layer] += length

    with RoutingExtractor(model, on_layer=on_layer):
        eval_utils.score_documents(model, documents, max_seq_len, max_seq_len, batch_size, on_batch=on_batch)
    return (active / seen).tolist()


def flops_columns(
    model: nn.Module,
    lengths: Sequence[int],
    active: Sequence[float],
    shares: Mapping[int, float] | None = None,
    hard: bool = False,
) -> dict[str, float]:
    """flops_ideal and flops_executed per token, averaged over documents of `lengths` tokens, weighted by length.

    shares: mean mamba share per hybrid layer; None for the base model. hard: as in `costs.flops_ideal`.
    """
    shape = costs.model_shape(model.config)
    mamba = costs.mamba_shape(attachment_of(model).mamba_config) if shares is not None else None
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    weights = values * counts / (values * counts).sum()
    ideal = [costs.flops_ideal(shape, int(n), active, mamba, shares, hard) for n in values]
    executed = [costs.flops_executed(shape, int(n), mamba, shares) for n in values]
    return {"flops_ideal": float(weights @ ideal), "flops_executed": float(weights @ executed)}


def measure(
    model: nn.Module, documents: Sequence[TokenDocument], max_seq_len: int, stride: int, batch_size: int
) -> dict:
    """tokens_per_second and memory_gb of scoring `documents`, nothing else held; timing columns."""
    device = eval_utils.model_device(model)
    eval_utils.reset_peak_memory(device)
    on_batch = attachment_of(model).on_batch if is_attached(model) else None
    scores = eval_utils.score_documents(model, documents, max_seq_len, stride, batch_size, on_batch=on_batch)
    return {"tokens_per_second": scores.tokens_per_second, "memory_gb": eval_utils.peak_memory_gb(device)}


def speed_sample(documents: Sequence[TokenDocument], tokens: int = 6_000) -> list[TokenDocument]:
    """The longest documents that together hold about `tokens` tokens (at least one document)."""
    chosen, total = [], 0
    for document in sorted(documents, key=lambda d: (-len(d.ids), d.id)):
        if chosen and total + len(document.ids) > tokens:
            break
        chosen.append(document)
        total += len(document.ids)
    return chosen


def print_plan(
    model: nn.Module, tokens: int, passes: int, tokens_per_second: float, batch_tokens: int, kept_gb: float = 0.0
) -> None:
    """What a run will take, before it starts. kept_gb: memory that is held besides the model's and a batch's."""
    kept = f", kept logits up to {kept_gb:.1f} GB" if kept_gb else ""
    print(
        f"time estimate: {passes} passes over {tokens:,} tokens at about {tokens_per_second:,.0f} tokens/s: "
        f"{tokens * passes / tokens_per_second / 60:.1f} min\n{memory_estimate(model, batch_tokens)}{kept}",
        flush=True,
    )


def retry_shorter(run: Callable[[int], None], max_seq_len: int, fallback: int) -> None:
    """run(max_seq_len); after running out of GPU memory once more with `fallback`, where that is shorter."""
    try:
        run(max_seq_len)
    except torch.OutOfMemoryError:
        if fallback >= max_seq_len:
            raise
        print(f"out of GPU memory at {max_seq_len} tokens per window; trying again with {fallback}", flush=True)
        torch.cuda.empty_cache()
        run(fallback)

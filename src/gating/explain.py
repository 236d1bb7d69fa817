"""The parts of 07 around the gates: the frozen margin, sensitivity and its oracle, probes, other layers, recall.

Each part writes its own files beside gated_hybrid_results.csv and is skipped where an earlier run with the same meta
wrote them. Order matters: the estimator of the sensitivity and the probes are chosen on calibration text alone, and the
margin is fixed, before a gate sees the evaluation text.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src import eval_utils
from src.base import results
from src.base.text_data import Document, TokenDocument
from src.gating import controls, probes, recall, runs, sensitivity, sensitivity_tables
from src.gating.rule import ROUTING, Rule
from src.gating.runs import Bench, Mode, SidecarSet, attached
from src.gating.sensitivity import Cells
from src.gating.tables import document_table, mean_table
from src.hybrid.gates import FixedGate, Gate, LearnedGate, MaskGate, RoutingGate, matched_random_masks
from src.hybrid.layer import attachment_of, base_logits, bypass_sidecars, record_gates, set_gate
from src.hybrid.record import GateRecord

# Where the Fisher information is taken: with attention alone, or averaged over mamba shares. Both draw equally many
# label sequences in all, so they cost the same.
ESTIMATORS = {"fisher_m0": (0.0,), "fisher_mean": (0.0, 0.25, 0.5, 0.75)}
VALIDATION = "sensitivity_validation.csv"


@dataclass
class Study:
    """What all parts share: the bench, the sets of sidecars (the main one first), their layers, and where files go."""

    bench: Bench
    sets: list[SidecarSet]
    folder: Path
    meta: dict
    rule: Rule
    tokenizer: object
    restart: bool = False

    @property
    def layers(self) -> list[int]:
        """The hybrid layers."""
        return self.sets[0].layers

    @property
    def windows(self) -> tuple[int, int]:
        """max_seq_len and stride."""
        return self.bench.score["max_seq_len"], self.bench.score["stride"]

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run with the same meta wrote this file."""
        return not self.restart and results.is_finished(self.folder / name, self.meta)

    def write_csv(self, name: str, rows: Sequence[dict] | pd.DataFrame) -> None:
        """Write a table of the study."""
        results.write_csv(self.folder / name, rows, self.meta)

    def read_csv(self, name: str) -> pd.DataFrame:
        """A table of the study, empty cells as NaN."""
        return pd.read_csv(self.folder / name)


# -- the margin
def frozen_margin(part: Study, mode: Mode, mask_seeds: Sequence[int]) -> float:
    """The margin of no interest in nats per token, from calibration text alone; margin.json keeps it.

    `rule.margin_fraction` of what random masks with the counts of `mode` cost, mean over masks and sets of sidecars.
    """
    if not part.is_finished("margin.json"):
        bench = part.bench
        scores = eval_utils.score_documents(bench.model, bench.calibration, progress="margin, baseline", **bench.score)
        baseline = document_table(scores)
        penalties = {}
        for sidecars in part.sets:
            with attached(bench.model, sidecars):
                tables = runs.penalty_on(bench, sidecars, mode, mask_seeds, baseline)
            extra = mean_table(tables)["nll"].sum() - baseline["nll"].sum()
            penalties[str(sidecars.seed)] = float(extra / baseline["tokens"].sum())
        margin = part.rule.margin_fraction * float(np.mean(list(penalties.values())))
        content = {
            "margin": float(results.format_value(margin)),
            "fraction": part.rule.margin_fraction,
            "penalty_by_sidecar_seed": penalties,
            "share": part.rule.share,
            "documents": len(baseline),
            "tokens": int(baseline["tokens"].sum()),
            "text": "calibration",
        }
        results.write_json(part.folder / "margin.json", content, part.meta)
    return json.loads((part.folder / "margin.json").read_text(encoding="utf-8"))["margin"]


# -- sensitivity
def cells_file(part: Study, name: str, documents: Sequence[TokenDocument], compute: Callable[[], Cells]) -> Cells:
    """Cells kept in `<name>.npz`: computed where an earlier run with the same meta did not."""
    file = f"{name}.npz"
    if not part.is_finished(file):
        cells = compute()
        arrays = {
            f"layer_{layer}": np.concatenate([cells[document.id][layer] for document in documents])
            for layer in cells[documents[0].id]
        }
        results.write_npz(part.folder / file, arrays, part.meta)
    with np.load(part.folder / file) as archive:
        stored = {int(key.removeprefix("layer_")): archive[key] for key in archive.files}
    ends = np.cumsum([len(document.ids) - 1 for document in documents])[:-1]
    split = {layer: np.split(values, ends) for layer, values in stored.items()}
    return {
        document.id: {layer: split[layer][index] for layer in sorted(split)} for index, document in enumerate(documents)
    }


def choose_estimator(part: Study, documents: int, cells: int, samples: int) -> str:
    """sensitivity_validation.csv: estimates against measured interventions, and the cost of their masks at the rule's
    share, on calibration text; the better one's name.

    documents: of the calibration text; cells: how many are switched to Mamba one at a time, spread over documents and
    layers; samples: label sequences behind an estimate, over all its shares. The main set of sidecars is used.
    """
    if not part.is_finished(VALIDATION):
        bench, chosen = part.bench, part.bench.calibration[:documents]
        per_layer = -(-cells // (len(chosen) * len(part.layers)))
        drawn = sensitivity.draw_cells(chosen, part.layers, per_layer, part.rule.seed)
        with attached(bench.model, part.sets[0]):
            estimates = {
                estimator: sensitivity.fisher_sensitivity(
                    bench.model, chosen, *part.windows, _per_share(samples, shares), shares, part.rule.seed, estimator
                )
                for estimator, shares in ESTIMATORS.items()
            }
            interventions = {}
            for document in tqdm(chosen, desc="interventions"):
                kl = sensitivity.intervention_kl(bench.model, document, drawn[document.id], *part.windows)
                interventions[document.id] = dict(zip(drawn[document.id], kl.tolist(), strict=True))
            counts = _equal_counts(chosen, part.layers, part.rule.share)
            mask_kl = {
                estimator: _mask_kl(
                    part, chosen, controls.scored_masks(counts, cells, largest=False, seed=part.rule.seed)
                )
                for estimator, cells in estimates.items()
            }
            random_kl = _mask_kl(part, chosen, matched_random_masks(counts, part.rule.seed))
        rows = sensitivity_tables.validation_table(estimates, interventions, mask_kl, random_kl, seed=part.rule.seed)
        part.write_csv(VALIDATION, rows)
    return chosen_estimator(part)


def _equal_counts(documents: Sequence[TokenDocument], layers: Sequence[int], share: float) -> controls.Masks:
    """Masks with `share` of every document's tokens in every layer (the first ones: they stand for the count)."""
    masks = {}
    for document in documents:
        mask = np.zeros(len(document.ids) - 1, dtype=np.float32)
        mask[: round(share * len(mask))] = 1.0
        masks[document.id] = dict.fromkeys(layers, mask)
    return masks


def _mask_kl(part: Study, documents: Sequence[TokenDocument], masks: controls.Masks) -> float:
    """KL(base model || hybrid) under masks, nats per token; the set must be attached."""
    model = part.bench.model
    set_gate(model, MaskGate(masks))
    scores = eval_utils.score_documents(
        model, documents, reference=functools.partial(base_logits, model),
        on_batch=attachment_of(model).on_batch, **part.bench.score,
    )  # fmt: skip
    return scores.kl_per_token


def _per_share(samples: int, shares: Sequence[float]) -> int:
    """Label sequences to draw at each of the shares, so that there are `samples` in all."""
    return max(1, samples // len(shares))


def chosen_estimator(part: Study) -> str:
    """The name that `choose_estimator` settled on."""
    return sensitivity_tables.choose_estimator(part.read_csv(VALIDATION).to_dict("records"))


def estimated(part: Study, sidecars: SidecarSet, estimator: str, samples: int) -> Cells:
    """Sensitivity of the evaluation text's cells to a set of sidecars, which must be attached."""
    return cells_file(
        part, f"sensitivity_set{sidecars.seed}", part.bench.tokens,
        lambda: sensitivity.fisher_sensitivity(
            part.bench.model, part.bench.tokens, *part.windows, _per_share(samples, ESTIMATORS[estimator]),
            ESTIMATORS[estimator], part.rule.seed, f"sensitivity, set {sidecars.seed}",
        ),
    )  # fmt: skip


def hindsight(part: Study, sidecars: SidecarSet) -> Cells:
    """What Mamba costs on the very next tokens, for the control of that name; the set must be attached."""
    return cells_file(
        part, f"hindsight_set{sidecars.seed}", part.bench.tokens,
        lambda: sensitivity.control_hindsight(
            part.bench.model, part.bench.tokens, *part.windows, progress=f"hindsight, set {sidecars.seed}"
        ),
    )  # fmt: skip


def gate_scores(part: Study, mode: Mode) -> Cells:
    """A gate's scores on the evaluation text, negated: they fall with the mamba share. The main set is attached."""

    def compute() -> Cells:
        set_gate(part.bench.model, runs.calibrate(part.bench, mode, part.sets[0]))
        with record_gates(part.bench.model) as record:
            eval_utils.score_documents(
                part.bench.model, part.bench.tokens, on_batch=attachment_of(part.bench.model).on_batch,
                progress=f"scores of {mode.name}", **part.bench.score,
            )  # fmt: skip
        return {
            document: {layer: -values for layer, values in layers.items()} for document, layers in record.scores.items()
        }

    return cells_file(part, f"scores_{mode.name}", part.bench.tokens, compute)


def correlate(part: Study, cells: Cells, scores_of: runs.ScoresOf, resamples: int, permutations: int) -> None:
    """sensitivity_correlations.csv: every signal against the sensitivity; the main set must be attached."""
    name = "sensitivity_correlations.csv"
    if part.is_finished(name):
        return
    with bypass_sidecars(part.bench.model):
        signals = sensitivity_tables.collect_signals(
            part.bench.model, part.bench.tokens, part.layers, *part.windows, progress="signals"
        )
    rows = sensitivity_tables.correlation_table(
        cells, signals, part.bench.tokens, scores_of("token_frequency")[0], scores_of("previous_surprisal")[0],
        resamples, permutations, part.rule.seed, part.rule.level, progress="correlations",
    )  # fmt: skip
    part.write_csv(name, rows)


def write_maps(part: Study, cells: Cells, most_tokens: int) -> None:
    """sensitivity_maps.json: the first document of each domain, token by token; the main set must be attached."""
    name = "sensitivity_maps.json"
    if part.is_finished(name):
        return
    bench, chosen = part.bench, {}
    for document in bench.tokens:
        chosen.setdefault(document.domain, document)
    set_gate(bench.model, runs.calibrate(bench, hard_routing(part), part.sets[0]))
    with record_gates(bench.model) as record:
        eval_utils.score_documents(
            bench.model, list(chosen.values()), on_batch=attachment_of(bench.model).on_batch, **bench.score
        )
    oracle = controls.scored_masks(record.shares, cells, largest=False, seed=part.rule.seed)
    maps = []
    for document in chosen.values():
        count = min(most_tokens, len(document.ids) - 1)
        columns = {
            "sensitivity": cells, "sparsity": record.scores, "mamba": record.shares, "oracle": oracle,
        }  # fmt: skip
        maps.append(
            {
                "document": document.id,
                "domain": document.domain,
                "tokens": [part.tokenizer.decode([token]) for token in document.ids[:count]],
                "layers": part.layers,
            }
            | {
                key: [[float(results.format_value(float(x))) for x in values[document.id][layer][:count]]
                      for layer in part.layers]
                for key, values in columns.items()
            }
        )  # fmt: skip
    results.write_json(part.folder / name, {"documents": maps}, part.meta)


# -- probes
def probe_scores(part: Study, documents: Sequence[TokenDocument], estimator: str, samples: int) -> dict[str, Cells]:
    """Predicted sensitivity of the evaluation text's cells, by probe; trained on calibration `documents`.

    The main set must be attached.
    """
    bench, seed = part.bench, part.rule.seed
    files = [f"probe_{probe}" for probe in probes.PROBES]
    if all(part.is_finished(f"{file}.npz") for file in files):
        return {
            probe: cells_file(part, file, bench.tokens, dict) for probe, file in zip(probes.PROBES, files, strict=True)
        }
    target = cells_file(
        part, "sensitivity_calibration", documents,
        lambda: sensitivity.fisher_sensitivity(
            bench.model, documents, *part.windows, _per_share(samples, ESTIMATORS[estimator]), ESTIMATORS[estimator],
            seed, "probes' targets",
        ),
    )  # fmt: skip
    predicted = {}
    with bypass_sidecars(bench.model):
        features = {
            (source, kind): probes.collect_features(
                bench.model, texts, part.layers, source, *part.windows, progress=f"{source} features"
            )
            for source in probes.SOURCES
            for kind, texts in (("train", documents), ("evaluation", bench.tokens))
        }
    for probe, file in zip(probes.PROBES, files, strict=True):
        source, kind = probe.split("_")
        fitted = probes.fit_probe(features[source, "train"], target, kind, seed, progress=f"{probe} probe")
        cells = probes.predict_scores(fitted, features[source, "evaluation"])
        predicted[probe] = cells_file(part, file, bench.tokens, lambda cells=cells: cells)
    return predicted


def write_gaps(
    part: Study, sums: pd.DataFrame, cells: Cells, predicted: dict[str, Cells], shares: Sequence[float]
) -> None:
    """probe_gap.csv: how much of the gap from random to oracle each gate closes, with the main set of sidecars."""
    own = sums[sums["sidecar_seed"] == part.sets[0].seed]
    tables = {mode: table.reset_index(drop=True) for mode, table in own.groupby("mode", sort=False)}
    rows = probes.gap_rows(tables, cells, predicted, shares, part.rule.resamples, part.rule.seed, part.rule.level)
    part.write_csv("probe_gap.csv", rows)


# -- other layers
def layer_sets(part: Study, named: dict[str, SidecarSet], modes: Sequence[Mode], mask_seeds: Sequence[int]) -> None:
    """layer_set_results.csv: the modes on other sets of layers (named -> sidecars of the main seed)."""
    bench, frames = part.bench, []
    for name, sidecars in named.items():
        if not bench.has(name, "baseline", 0):
            main = next(key for key, row in bench.store.rows.items() if row["mode"] == "baseline")
            row = {key: value for key, value in bench.store.rows[main].items() if key != bench.store.key}
            bench.store.add(runs.run_name(name, "baseline", 0), bench.store.tables[main], row | {"layers": name})
        with attached(bench.model, sidecars):
            runs.measure_set(bench, name, sidecars, modes, mask_seeds)
        sums = runs.document_sums(bench.store, name)
        table = runs.result_table(bench.store, name, sums, part.rule)
        table.insert(0, "layers", name)
        table.insert(1, "stage", sidecars.stage)
        frames.append(table)
    if frames:
        part.write_csv("layer_set_results.csv", pd.concat(frames, ignore_index=True))


# -- recall
def recall_study(
    part: Study, documents: Sequence[Document], lengths: Sequence[int], examples: int, mask_seeds: Sequence[int]
) -> None:
    """recall_results.csv: tasks that only the context answers, by gate at the rule's share; the main set is attached
    here. documents: the running text that tasks are hidden in. Rows of a length are kept as soon as they are there."""
    name, bench, share = "recall_results.csv", part.bench, part.rule.share
    finished = (
        None if part.restart else results.finished_rows(part.folder / name, ["task", "length", "mode"], part.meta)
    )
    rows = [] if finished is None else finished.to_dict("records")
    done = {int(row["length"]) for row in rows}
    for length in lengths:
        if length in done:
            continue
        asked = [
            example
            for task in recall.TASKS.values()
            for example in task(part.tokenizer, length, examples, part.rule.seed, documents)
        ]
        baseline = recall.score_recall(
            bench.model, asked, bench.score["batch_size"], progress=f"recall {length}, baseline"
        )
        rows += recall.recall_rows(baseline, baseline, "baseline", 0.0, None, part.rule.resamples, part.rule.seed)
        with attached(bench.model, part.sets[0]):
            for mode in recall_modes(part, share):
                gate = runs.calibrate(bench, mode, part.sets[0])
                table, record = _recall(bench, gate, asked, f"recall {length}, {mode.name}")
                rows += recall.recall_rows(
                    table, baseline, mode.name, mode.share, record.shares, part.rule.resamples, part.rule.seed
                )
                for _, row_name in mode.controls:
                    drawn = []
                    for seed in mask_seeds:
                        masks = matched_random_masks(record.shares, seed)
                        label = f"recall {length}, {row_name}, seed {seed}"
                        one, done_record = _recall(bench, MaskGate(masks), asked, label)
                        controls.check_equal_counts(record.shares, done_record.shares)
                        drawn.append(one)
                    mean = drawn[0].assign(right=np.mean([one["right"] for one in drawn], axis=0))
                    rows += recall.recall_rows(
                        mean, baseline, row_name, mode.share, record.shares, part.rule.resamples, part.rule.seed
                    )
        part.write_csv(name, rows)


def hard_routing(part: Study) -> Mode:
    """The rule's routing gate."""
    share = part.rule.share
    gate = RoutingGate(share, signal=part.rule.signal, hard=True, seed=part.rule.seed)
    return Mode(f"{ROUTING}_{share:g}", gate, share, True)


def recall_modes(part: Study, share: float) -> list[Mode]:
    """What recall is measured under: fixed alpha, all on Mamba; hard routing and learned, with random masks."""
    modes = [
        Mode(f"fixed_{share:g}", FixedGate(share), share, False),
        Mode("fixed_1", FixedGate(1.0), 1.0, False),
        replace(hard_routing(part), controls=(("random", f"control_random_{share:g}"),)),
    ]
    if part.sets[0].has_learned_gates:
        learned = LearnedGate(share, hard=True, seed=part.rule.seed)
        control = runs.random_control(f"learned_{share:g}")
        modes.append(Mode(f"learned_{share:g}", learned, share, True, controls=(("random", control),)))
    return modes


def _recall(bench: Bench, gate: Gate, asked: list[recall.RecallExample], label: str) -> tuple[pd.DataFrame, GateRecord]:
    """(what `score_recall` gives, what was recorded) under a gate."""
    set_gate(bench.model, gate)
    with record_gates(bench.model) as record:
        table = recall.score_recall(
            bench.model, asked, bench.score["batch_size"], attachment_of(bench.model).on_batch, label
        )
    return table, record

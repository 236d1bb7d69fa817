"""What explains the answer: each cell's sensitivity, the oracle it gives, signals and probes against it.

Order matters: the estimator of the sensitivity and the probes are chosen on calibration text alone. Everything is kept
as pieces under what it depends on, and the set of sidecars that a function takes must be attached when it is called.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from src import eval_utils
from src.base import results
from src.base.text_data import TokenDocument
from src.gating import controls, probes, sensitivity, sensitivity_tables
from src.gating.modes import Mode
from src.gating.runs import ScoresOf, Study, attached, calibrate, gate_depends, score_gate
from src.gating.sensitivity import Cells
from src.hybrid.gates import MaskGate, matched_random_masks
from src.hybrid.layer import attachment_of, base_logits, bypass_sidecars, set_gate
from src.hybrid.sidecar_sets import SidecarSet

# Where the Fisher information is taken: with attention alone, or averaged over mamba shares. Both draw equally many
# label sequences in all, so they cost the same.
ESTIMATORS = {"fisher_m0": (0.0,), "fisher_mean": (0.0, 0.25, 0.5, 0.75)}


@dataclass(frozen=True)
class Budget:
    """How much the explanation may measure.

    samples: label sequences behind an estimate, over all its shares. validation_documents: of the calibration text, on
    which estimates meet interventions. interventions: single cells switched to Mamba and measured. probe_documents: of
    the calibration text, that probes are trained on. resamples, permutations: behind the intervals and p-values of
    correlations. map_tokens: shown of a document.
    """

    samples: int
    validation_documents: int
    interventions: int
    probe_documents: int
    resamples: int
    permutations: int
    map_tokens: int


# -- sensitivity
def _kept_cells(
    study: Study, label: str, depends: Mapping, documents: Sequence[TokenDocument], compute: Callable[[], Cells]
) -> Cells:
    """Cells that an earlier run left, else what `compute` gives."""

    def arrays() -> dict[str, np.ndarray]:
        cells = compute()
        return {
            str(layer): np.concatenate([cells[document.id][layer] for document in documents])
            for layer in cells[documents[0].id]
        }

    stored = study.session.pieces.arrays(label, depends, arrays)
    ends = np.cumsum([len(document.ids) - 1 for document in documents])[:-1]
    split = {int(layer): np.split(values, ends) for layer, values in stored.items()}
    return {
        document.id: {layer: split[layer][index] for layer in sorted(split)} for index, document in enumerate(documents)
    }


def _estimate(study: Study, documents: Sequence[TokenDocument], estimator: str, samples: int, label: str) -> Cells:
    """Sensitivity of the documents' cells to the sidecars that are attached."""
    shares = ESTIMATORS[estimator]
    each = max(1, samples // len(shares))
    return sensitivity.fisher_sensitivity(study.model, documents, *study.windows, each, shares, study.rule.seed, label)


def sensitivity_depends(study: Study, sidecars: SidecarSet, estimator: str, budget: Budget) -> dict:
    """What estimated sensitivities depend on, the text aside."""
    return sidecars.key() | {"estimator": estimator, "samples": budget.samples, "sensitivity_seed": study.rule.seed}


def validate(study: Study, budget: Budget) -> list[dict]:
    """The rows of sensitivity_validation.csv: estimates against interventions, and the cost of their masks at the
    rule's share, on calibration text with the main set of sidecars, which is attached here."""
    chosen = study.session.tokens["calibration"][: budget.validation_documents]
    rule, seed, sidecars = study.rule, study.rule.seed, study.sets[0]
    depends = sensitivity_depends(study, sidecars, "all", budget) | study.session.text_key("calibration")
    depends |= {"interventions": budget.interventions, "documents": len(chosen), "share": rule.share}

    def compute() -> dict:
        per_layer = -(-budget.interventions // (len(chosen) * len(study.layers)))
        drawn = sensitivity.draw_cells(chosen, study.layers, per_layer, seed)
        with attached(study.model, sidecars):
            estimates = {name: _estimate(study, chosen, name, budget.samples, name) for name in ESTIMATORS}
            interventions = {}
            for document in tqdm(chosen, desc="interventions"):
                kl = sensitivity.intervention_kl(study.model, document, drawn[document.id], *study.windows)
                interventions[document.id] = dict(zip(drawn[document.id], kl.tolist(), strict=True))
            counts = _equal_counts(chosen, study.layers, rule.share)
            mask_kl = {
                name: _mask_kl(study, chosen, controls.scored_masks(counts, cells, largest=False, seed=seed))
                for name, cells in estimates.items()
            }
            random_kl = _mask_kl(study, chosen, matched_random_masks(counts, seed))
        rows = sensitivity_tables.validation_table(estimates, interventions, mask_kl, random_kl, seed=seed)
        return {"rows": rows}

    return study.session.pieces.content("estimates against interventions", depends, compute)["rows"]


def _equal_counts(documents: Sequence[TokenDocument], layers: Sequence[int], share: float) -> controls.Masks:
    """Masks with `share` of every document's tokens in every layer (the first ones: they stand for the count)."""
    masks = {}
    for document in documents:
        mask = np.zeros(len(document.ids) - 1, dtype=np.float32)
        mask[: round(share * len(mask))] = 1.0
        masks[document.id] = dict.fromkeys(layers, mask)
    return masks


def _mask_kl(study: Study, documents: Sequence[TokenDocument], masks: controls.Masks) -> float:
    """KL(base model || hybrid) under masks, nats per token."""
    set_gate(study.model, MaskGate(masks))
    scores = eval_utils.score_documents(
        study.model, documents, reference=functools.partial(base_logits, study.model),
        on_batch=attachment_of(study.model).on_batch, **study.session.windows,
    )  # fmt: skip
    return scores.kl_per_token


def estimated(study: Study, sidecars: SidecarSet, estimator: str, budget: Budget) -> Cells:
    """Sensitivity of the evaluation text's cells to a set of sidecars."""
    tokens, label = study.session.tokens["evaluation"], f"sensitivity, set {sidecars.seed}"
    depends = sensitivity_depends(study, sidecars, estimator, budget) | study.session.text_key("evaluation")
    return _kept_cells(
        study, label, depends, tokens, lambda: _estimate(study, tokens, estimator, budget.samples, label)
    )


def hindsight(study: Study, sidecars: SidecarSet) -> Cells:
    """What Mamba costs on the very next tokens, for the control of that name."""
    tokens, label = study.session.tokens["evaluation"], f"hindsight, set {sidecars.seed}"
    return _kept_cells(
        study, label, sidecars.key() | study.session.text_key("evaluation"), tokens,
        lambda: sensitivity.control_hindsight(study.model, tokens, *study.windows, progress=label),
    )  # fmt: skip


def gate_scores(study: Study, mode: Mode) -> Cells:
    """A gate's scores on the evaluation text with the main set, negated: they fall with the mamba share."""
    tokens, label = study.session.tokens["evaluation"], f"scores of {mode.name}"

    def compute() -> Cells:
        record, _ = score_gate(study, calibrate(study, mode, study.sets[0]), label)
        return {
            document: {layer: -values for layer, values in layers.items()} for document, layers in record.scores.items()
        }

    depends = gate_depends(study, mode, study.sets[0]) | study.session.text_key("evaluation")
    return _kept_cells(study, label, depends, tokens, compute)


# -- tables
def correlations(study: Study, cells: Cells, depends: Mapping, scores_of: ScoresOf, budget: Budget) -> list[dict]:
    """The rows of sensitivity_correlations.csv: every signal against the sensitivity that `depends` describes."""
    tokens, session = study.session.tokens["evaluation"], study.session

    def compute() -> dict:
        with bypass_sidecars(study.model):
            signals = sensitivity_tables.collect_signals(
                study.model, tokens, study.layers, *study.windows, progress="signals"
            )
        rows = sensitivity_tables.correlation_table(
            cells, signals, tokens, scores_of("token_frequency")[0], scores_of("previous_surprisal")[0],
            budget.resamples, budget.permutations, study.rule.seed, study.rule.level, progress="correlations",
        )  # fmt: skip
        return {"rows": rows}

    asked = {"resamples": budget.resamples, "permutations": budget.permutations, "level": study.rule.level}
    depends = session.text_key("evaluation") | {"calibration": session.text_key("calibration")} | depends | asked
    return session.pieces.content("signals against sensitivity", depends, compute)["rows"]


def maps(study: Study, cells: Cells, depends: Mapping, mode: Mode, most_tokens: int) -> list[dict]:
    """The documents of sensitivity_maps.json: the first one of each domain, token by token, with the main set.

    `mode` is the rule's routing gate, whose decisions and counts are shown beside the oracle's.
    """
    first = {document.domain: document for document in reversed(study.session.tokens["evaluation"])}
    chosen = [document for document in study.session.tokens["evaluation"] if first[document.domain] is document]

    def compute() -> dict:
        record, _ = score_gate(study, calibrate(study, mode, study.sets[0]), "sensitivity maps", documents=chosen)
        oracle = controls.scored_masks(record.shares, cells, largest=False, seed=study.rule.seed)
        columns = {"sensitivity": cells, "sparsity": record.scores, "mamba": record.shares, "oracle": oracle}
        return {"documents": [_map_of(study, document, columns, most_tokens) for document in chosen]}

    depends = study.session.text_key("evaluation") | gate_depends(study, mode, study.sets[0]) | depends
    label = "sensitivity maps"
    return study.session.pieces.content(label, depends | {"map_tokens": most_tokens}, compute)["documents"]


def _map_of(study: Study, document: TokenDocument, columns: Mapping[str, Cells], most_tokens: int) -> dict:
    """One document of `maps`: its first tokens, and each column per layer."""
    count = min(most_tokens, len(document.ids) - 1)
    shown = {
        "document": document.id,
        "domain": document.domain,
        "tokens": [study.session.tokenizer.decode([token]) for token in document.ids[:count]],
        "layers": study.layers,
    }
    for name, values in columns.items():
        rows = [values[document.id][layer][:count] for layer in study.layers]
        shown[name] = [results.as_written(row).tolist() for row in rows]
    return shown


# -- probes
def probe_scores(study: Study, estimator: str, budget: Budget) -> tuple[dict[str, Cells], dict]:
    """Predicted sensitivity of the evaluation text's cells by probe, and what it depends on.

    Probes are trained on calibration text. The main set must be attached.
    """
    session, seed, sidecars = study.session, study.rule.seed, study.sets[0]
    tokens, pool = session.tokens["evaluation"], session.tokens["probes"]
    depends = sensitivity_depends(study, sidecars, estimator, budget) | {"probe_text": session.text_key("probes")}
    target = _kept_cells(
        study, "probes' targets", depends, pool,
        lambda: _estimate(study, pool, estimator, budget.samples, "probes' targets"),
    )  # fmt: skip

    @functools.cache
    def features(source: str, split: str) -> probes.Features:
        with bypass_sidecars(study.model):
            return probes.collect_features(
                study.model, session.tokens[split], study.layers, source, *study.windows, progress=f"{source} features"
            )

    def compute(source: str, kind: str) -> Cells:
        fitted = probes.fit_probe(features(source, "probes"), target, kind, seed, progress=f"{source} {kind} probe")
        return probes.predict_scores(fitted, features(source, "evaluation"))

    own = depends | session.text_key("evaluation")
    predicted = {
        f"{source}_{kind}": _kept_cells(
            study, f"probe {source}_{kind}", own | {"probe": [source, kind]}, tokens,
            functools.partial(compute, source, kind),
        )
        for source in probes.SOURCES
        for kind in probes.KINDS
    }  # fmt: skip
    return predicted, own

"""Runs of gates and controls: one run is one pass of one mode over the evaluation text, with one set of sidecars.

`measure_set` makes what is missing of the runs; tables.py derives the result files from them. Every control is compared
with the gate that it was matched to, and that both send equally many tokens of every document and layer to Mamba is
checked on what was recorded while they ran.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from src import eval_utils
from src.base import cli, results
from src.base.errors import UserError
from src.base.text_data import TokenDocument
from src.gating import controls, modes
from src.gating.modes import DRAWN, Mode
from src.gating.rule import Rule
from src.gating.tables import mean_table
from src.hybrid import ledger, sidecar_sets
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.calibration import calibrate_gates
from src.hybrid.checkpoints import check_base, load_learned_gates
from src.hybrid.gates import Gate, MaskGate, is_hard, matched_random_masks
from src.hybrid.layer import attachment_of, bypass_sidecars, record_gates, set_gate
from src.hybrid.record import GateRecord
from src.hybrid.session import Session, document_table, open_session
from src.hybrid.sidecar_sets import SidecarSet
from src.models.families import has_router

# Scores of a control that ranks tokens: (document id -> layer -> [N], whether the largest go to Mamba).
ScoresOf = Callable[[str], tuple[controls.Masks, bool]]
TARGET = "target"  # what runs on the layers asked for are filed under


@dataclass
class Study:
    """What the runs of one script share.

    session: model, text and what earlier runs kept. sets: sets of sidecars, the main one first, all on the same layers.
    rule: the rule of the verdict. mask_seeds: seeds of the masks that are drawn at random. rows, tables: what every run
    measured, and its sums per document, by the run's name. calibrated: gates by (mode, sidecar seed, layers), so that
    none is calibrated twice. scores_depend: recipe -> what a control's scores depend on, where they are estimates
    (explain.py).
    """

    session: Session
    sets: list[SidecarSet]
    rule: Rule
    mask_seeds: list[int]
    rows: dict[str, dict] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    calibrated: dict[tuple, Gate] = field(default_factory=dict)
    scores_depend: dict[str, dict] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.session.model

    @property
    def layers(self) -> list[int]:
        """The hybrid layers."""
        return self.sets[0].layers

    @property
    def windows(self) -> tuple[int, int]:
        """max_seq_len and stride of scoring."""
        return self.session.windows["max_seq_len"], self.session.windows["stride"]

    @cached_property
    def sidecar_shape(self):
        """The shape of the sidecars, for the ledger; no sidecars are attached when it is first asked for."""
        return ledger.sidecar_shape(self.model, self.sets[0].settings(), self.layers[0])

    def meta(self, **arguments) -> dict:
        """Provenance of this study's files."""
        sidecars = [one.identity() for one in self.sets]
        return self.session.meta(sidecars, layer_indices=self.layers, **arguments)


def open_study(arguments, rule: Rule, window_tokens: int | None = None, **counts: int | None) -> Study:
    """Open the session, and every set of sidecars that has the layers asked for.

    `counts` gives further splits of the text that are needed, and how many documents of them (None: all).
    Raises UserError where the main set lacks a layer; other sets that do are left out.
    """
    counts = {"evaluation": arguments.documents, "calibration": arguments.calibration_documents} | counts
    session = open_session(arguments, counts, window_tokens)
    layers = modes.hybrid_layers(session.model, arguments.layers, arguments.signal)
    folder = sidecar_sets.sidecar_folder(arguments.sidecar_dir, session.folder, arguments.model)
    sets = checked_sets(sidecar_sets.sidecar_sets(folder), layers, arguments.stage)
    for sidecars in sets:
        check_base(session.model, sidecars.folder)
    print(f"model {arguments.model}, layers {layers}; sidecars of seeds {[one.seed for one in sets]} in {folder}")
    if len(sets) < rule.sidecar_seeds:
        flags = " ".join(cli.repeated_flags(["--model", str(arguments.model)]))
        print(
            f"the rule asks for {rule.sidecar_seeds} sets of sidecars; to add one: python scripts/04_test_sidecar.py "
            f"{flags} --retrain --seed 1 --steps-gate 0 --stage-a-layers {arguments.layers} --layers "
            f"{arguments.layers} --sidecar-dir {folder / 'seed_1'}"
        )
    if not sets[0].has_learned_gates:
        print(f"no learned gate in {folder}: its rows are left out (04_test_sidecar.py --retrain trains it)")
    return Study(session, sets, rule, list(arguments.mask_seeds))


def checked_sets(found: Mapping[int, Path], layers: Sequence[int], wanted: str) -> list[SidecarSet]:
    """The sets of sidecars by seed -> folder that have all of `layers` in one stage, the main one (lowest seed) first.

    Raises UserError where the main set lacks a layer; others that do are left out.
    """
    sets = []
    for seed, folder in sorted(found.items()):
        try:
            sets.append(SidecarSet(seed, folder, sidecar_sets.choose_stage(folder, layers, wanted), list(layers)))
        except UserError:
            if not sets:
                raise
    return sets


@contextmanager
def attached(model: nn.Module, sidecars: SidecarSet) -> Iterator[nn.Module]:
    """The model with a set of sidecars and its learned gates, where there are any; without them again afterwards."""
    attach_mamba_sidecar(model, sidecars.layers, gate_mode="fixed", **sidecars.source())
    try:
        if sidecars.has_learned_gates:
            load_learned_gates(model, sidecars.folder)
        yield model
    finally:
        detach_mamba_sidecars(model)


# -- one run
def run_name(layers: str, mode: str, sidecar_seed: int, mask_seed: int = 0) -> str:
    """The key of a run: `target/routing_hard_0.5/sidecars0/0`."""
    return f"{layers}/{mode}/sidecars{sidecar_seed}/{mask_seed}"


def score_gate(
    study: Study, gate: Gate, label: str, documents: Sequence[TokenDocument] | None = None
) -> tuple[GateRecord, dict]:
    """One pass with a gate over documents (the evaluation text): what it did, and the run's content.

    The set of sidecars must be attached. The content is what a piece keeps: the sums per document (`table`) and what
    the whole pass measured.
    """
    tokens = study.session.tokens["evaluation"] if documents is None else documents
    device = eval_utils.model_device(study.model)
    eval_utils.reset_peak_memory(device)
    set_gate(study.model, gate)
    with record_gates(study.model) as record:
        scores = eval_utils.score_documents(
            study.model, tokens, on_batch=attachment_of(study.model).on_batch, progress=label,
            **study.session.windows,
        )  # fmt: skip
    table, by_document = document_table(scores), record.document_shares()
    table["mamba_share"] = results.as_written(
        [np.mean(list(by_document[document].values())) for document in table["document"]]
    )
    content = _content(scores, table, device)
    content["layer_shares"] = {str(layer): share for layer, share in record.layer_shares().items()}
    return record, content


def _content(scores: eval_utils.Scores, table: pd.DataFrame, device) -> dict:
    return {
        "table": table.to_dict("list"),
        "perplexity": scores.perplexity,
        "tokens_per_second": scores.tokens_per_second,
        "memory_gb": eval_utils.peak_memory_gb(device),
    }


def add_baseline(study: Study, layers: str = TARGET) -> None:
    """The run of the model without sidecars."""
    session, device = study.session, eval_utils.model_device(study.model)

    def compute() -> dict:
        eval_utils.reset_peak_memory(device)
        scores = eval_utils.score_documents(
            study.model, session.tokens["evaluation"], progress="baseline", **session.windows
        )
        return _content(scores, document_table(scores), device)

    content = session.pieces.content("the baseline's run", session.text_key("evaluation"), compute)
    _file(study, layers, "baseline", 0, 0, modes.BASELINE | {"variant": "", "control": ""}, content)


def _file(study: Study, layers: str, mode: str, sidecar_seed: int, mask_seed: int, columns: dict, content: dict):
    """Put a run's row and table where tables.py finds them."""
    name = run_name(layers, mode, sidecar_seed, mask_seed)
    shares = {int(layer): share for layer, share in content.get("layer_shares", {}).items()}
    lengths = [len(document.ids) - 1 for document in study.session.tokens["evaluation"]]
    row = {"run": name, "layers": layers, "mode": mode, "sidecar_seed": sidecar_seed, "seed": mask_seed} | columns
    row["share_realised"] = float(np.mean(list(shares.values()))) if shares else 0.0
    row["perplexity"] = content["perplexity"]
    row |= ledger.flops_columns(
        study.model, lengths, study.session.active_experts(), study.sidecar_shape, shares or None, columns["hard"]
    )
    row |= {key: content[key] for key in ("tokens_per_second", "memory_gb")}
    study.rows[name] = {key: results.as_written([value])[0] if isinstance(value, float) else value
                        for key, value in row.items()}  # fmt: skip
    study.tables[name] = pd.DataFrame(content["table"])


# -- all runs of a set
def mask_seeds_of(sidecars: SidecarSet, mask_seeds: Sequence[int]) -> list[int]:
    """Seeds of random masks for one set: other ones for every set, so that the mean over sets is one over masks too."""
    return [seed + 1000 * sidecars.seed for seed in mask_seeds]


def control_runs(mode: Mode, sidecars: SidecarSet, mask_seeds: Sequence[int]) -> list[tuple[str, int]]:
    """(recipe, mask seed) of every run of a mode's controls."""
    seeds = mask_seeds_of(sidecars, mask_seeds)
    return [
        (recipe, seed)
        for recipe in mode.recipes
        for seed in (seeds if recipe in DRAWN and mode.all_draws else seeds[:1])
    ]


def gate_depends(study: Study, mode: Mode, sidecars: SidecarSet) -> dict:
    """What the run of a gate depends on."""
    depends = sidecars.key() | mode.depends()
    if mode.is_calibrated:
        depends |= {"calibration": study.session.text_key("calibration")}
    if mode.gate.mode == "learned":
        depends |= {"learned_gate": sidecars.learned_gate_sha256()}
    return depends


def measure_set(
    study: Study,
    layers: str,
    sidecars: SidecarSet,
    chosen: Sequence[Mode],
    scores_of: ScoresOf | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Measure what is missing of these modes and their controls; the set of sidecars must be attached.

    Returns the continuations of `prompts` under each gate that leads or is plain, where there are prompts. A gate runs
    again where only its controls are missing: they need what it did. Raises ValueError where a control's counts differ
    from its gate's in any layer of any document.
    """
    texts, pieces = {}, study.session.pieces
    for mode in chosen:
        record = None
        depends = study.session.text_key("evaluation") | gate_depends(study, mode, sidecars)
        label = f"{mode.name}, set {sidecars.seed}"
        if prompts and mode.variant in ("", "learned"):
            texts[mode.name] = _generated(study, mode, sidecars, prompts)
        content = pieces.find(label, depends)
        if content is None:
            record, fresh = score_gate(study, calibrate(study, mode, sidecars), label)
            content = pieces.keep(label, depends, fresh)
        columns = mode.columns() | {"variant": mode.variant, "control": mode.against}
        _file(study, layers, mode.name, sidecars.seed, 0, columns, content)
        share = mode.share if mode.share is not None else study.rows[
            run_name(layers, mode.name, sidecars.seed)]["share_realised"]  # fmt: skip
        for recipe, seed in control_runs(mode, sidecars, study.mask_seeds):
            name = mode.control_name(recipe)
            own = depends | {"recipe": recipe, "mask_seed": seed} | study.scores_depend.get(recipe, {})
            own_label = f"{name}, set {sidecars.seed}" + (f", seed {seed}" if recipe in DRAWN else "")
            content = pieces.find(own_label, own)
            if content is None:
                gate = calibrate(study, mode, sidecars)
                if record is None:
                    record, _ = score_gate(study, gate, f"{label}, for its controls")
                masks = control_masks(recipe, record, seed, scores_of)
                done, fresh = score_gate(study, MaskGate(masks), own_label)
                if is_hard(gate):
                    controls.check_equal_counts(record.shares, done.shares)
                content = pieces.keep(own_label, own, fresh)
            columns = mode.control_columns(recipe, share) | {"variant": mode.variant}
            has_random = recipe != "random" and "random" in mode.recipes
            columns["control"] = mode.control_name("random") if has_random else ""
            _file(study, layers, name, sidecars.seed, seed, columns, content)
    return texts


def _generated(study: Study, mode: Mode, sidecars: SidecarSet, prompts: Sequence[str]) -> list[str]:
    """Continuations of the prompts under a mode's calibrated gate."""
    depends = gate_depends(study, mode, sidecars)

    def prepare() -> None:
        set_gate(study.model, calibrate(study, mode, sidecars))

    return study.session.generate(f"texts of {mode.name}", depends, prompts, prepare)


def missing_passes(study: Study, plans: Sequence[tuple[SidecarSet, Sequence[Mode]]]) -> int:
    """Passes over the evaluation text that the runs of these sets take, those that are there already among them."""
    return 1 + sum(
        1 + len(control_runs(mode, sidecars, study.mask_seeds)) for sidecars, chosen in plans for mode in chosen
    )


def calibrate(study: Study, mode: Mode, sidecars: SidecarSet) -> Gate:
    """A mode's gate, calibrated on the calibration text where it is to be; the set must be attached."""
    key = (mode.name, sidecars.seed, tuple(sidecars.layers))
    if key not in study.calibrated:
        gate, session = mode.gate, study.session
        if mode.is_calibrated:
            gate = calibrate_gates(
                study.model, gate, session.tokens["calibration"], session.windows["max_seq_len"],
                session.windows["batch_size"], progress=f"calibrating {mode.name}, set {sidecars.seed}",
                shared=mode.threshold == "shared",
            )  # fmt: skip
        study.calibrated[key] = gate
    return study.calibrated[key]


def control_masks(
    recipe: str, record: GateRecord, seed: int, scores_of: ScoresOf | None = None
) -> dict[str, dict[int, np.ndarray]]:
    """Masks of a control, with the counts of what a gate did. Raises ValueError for a name that needs other scores."""
    shares = record.shares
    match recipe:
        case "random":
            return matched_random_masks(shares, seed)
        case "token_shuffled" | "block_shuffled":
            return controls.block_shuffled_masks(shares, seed, controls.SHUFFLED_BLOCKS[recipe])
        case "inverted":
            return controls.scored_masks(shares, record.scores, largest=False, seed=seed)
        case "other_document":
            return controls.other_document_masks(shares, record.scores, seed)
        case "position_early" | "position_late":
            return controls.position_masks(shares, late=recipe == "position_late")
    if scores_of is None:
        raise ValueError(f"control {recipe!r} ranks tokens by scores, and none were given")
    scores, largest = scores_of(recipe)
    return controls.scored_masks(shares, scores, largest, seed)


def base_scores(study: Study) -> ScoresOf:
    """Scores of the controls in `controls.LARGEST_TO_MAMBA`, collected from the base model when first asked for.

    The main set of sidecars must be attached when they are (recall_error compares it with attention).
    """
    collected: dict[str, controls.Masks] = {}
    session = study.session

    def scores_of(recipe: str) -> tuple[controls.Masks, bool]:
        if recipe not in controls.LARGEST_TO_MAMBA:
            raise ValueError(f"there is no control {recipe!r}; there are {', '.join(controls.CONTROLS)}")
        if not collected:
            names = [one for one in controls.MODEL_SCORES if one != "self_sparsity" or has_router(study.model)]
            counts = controls.token_counts(session.tokens["calibration"], study.model.config.vocab_size)
            tokens = session.tokens["evaluation"]
            collected["token_frequency"] = controls.frequency_scores(tokens, counts, study.layers)
            with bypass_sidecars(study.model):
                collected.update(
                    controls.collect_scores(
                        study.model, tokens, study.layers, names, *study.windows, progress="scores of controls"
                    )
                )
        return collected[recipe], controls.LARGEST_TO_MAMBA[recipe]

    return scores_of


# -- the margin
def frozen_margin(study: Study, mode: Mode) -> tuple[float, Path]:
    """The margin of no interest in nats per token, from calibration text alone, and margin.json, which keeps it.

    It is `rule.margin_fraction` of what random masks with the counts of `mode` cost, mean over masks and sets of
    sidecars; it is fixed before anything is scored on the evaluation text.
    """
    session, rule, penalties = study.session, study.rule, {}
    baseline = session.score("margin, baseline", {}, "calibration")
    for sidecars in study.sets:
        depends = gate_depends(study, mode, sidecars) | session.text_key("calibration")
        depends |= {"mask_seeds": study.mask_seeds}

        def compute(sidecars: SidecarSet = sidecars) -> dict:
            with attached(study.model, sidecars):
                table = mean_table(_random_on_calibration(study, sidecars, mode))
            if table["document"].tolist() != baseline["document"].tolist():
                raise ValueError("the baseline was scored on other calibration documents")
            extra = table["nll"].sum() - baseline["nll"].sum()
            return {"penalty": float(extra / baseline["tokens"].sum())}

        label = f"margin, set {sidecars.seed}"
        penalties[str(sidecars.seed)] = session.pieces.content(label, depends, compute)["penalty"]
    margin = rule.margin_fraction * float(np.mean(list(penalties.values())))
    content = {
        "margin": float(results.format_value(margin)),
        "fraction": rule.margin_fraction,
        "penalty_by_sidecar_seed": penalties,
        "share": rule.share,
        "documents": len(baseline),
        "tokens": int(baseline["tokens"].sum()),
        "text": "calibration",
    }
    path = results.write_json(session.folder / "margin.json", content, study.meta())
    return json.loads(path.read_text(encoding="utf-8"))["margin"], path


def _random_on_calibration(study: Study, sidecars: SidecarSet, mode: Mode) -> list[pd.DataFrame]:
    """Sums per calibration document under random masks with a gate's counts there, one table per mask seed."""
    documents = study.session.tokens["calibration"]
    record, _ = score_gate(study, calibrate(study, mode, sidecars), f"margin, set {sidecars.seed}", documents)
    tables = []
    for seed in mask_seeds_of(sidecars, study.mask_seeds):
        masks = MaskGate(matched_random_masks(record.shares, seed))
        label = f"margin, set {sidecars.seed}, seed {seed}"
        tables.append(pd.DataFrame(score_gate(study, masks, label, documents)[1]["table"]))
    return tables

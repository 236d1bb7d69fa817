"""Ablations: what the sidecars' initialisation, training stages, state width and training tokens change.

    chosen = variants(model, layers, SidecarSettings(), steps_a=40, steps_b=80)
    tables = run_ablations(study, protocol, chosen)          # "init", ..., and "curves"

A variant trains sidecars of its own, on a reduced budget: compare variants with each other, not with the study's
sidecars. All variants see the same windows in the same order, and draw from the same seed; their intervals are over
documents, with that one seed.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from src.base.text_data import TokenDocument
from src.eval_utils import score_documents
from src.gating.controls import check_equal_counts
from src.gating.runs import Study, score_gate
from src.gating.tables import mean_table, paired
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.calibration import calibrate_gates
from src.hybrid.distill import Distillation, DistillSettings, train_stage_a, train_stage_b
from src.hybrid.gates import FixedGate, Gate, MaskGate, ScoredGate, matched_random_masks
from src.hybrid.layer import attachment_of, base_logits, set_gate
from src.hybrid.recovery import measure_recovery
from src.hybrid.sidecar import SidecarSettings, attention_settings
from src.hybrid.sidecar_sets import SidecarSet

DISTILLATION_ABLATIONS = ("init", "stages", "d_state", "tokens")
D_STATES = (16, 64, 128)
TOKEN_SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Variant:
    """One row of a distillation ablation: sidecars of these settings, trained for so many steps of each stage.

    steps_b 0: stage A is all there is. Variants that differ in `ablation` and `name` only are one training (`folder`).
    """

    ablation: str
    name: str
    settings: SidecarSettings
    steps_a: int
    steps_b: int

    @property
    def folder(self) -> str:
        """Name of the folder that holds the trained sidecars: all that tells trainings of one protocol apart."""
        s = self.settings
        shape = f"state{s.d_state}_conv{s.d_conv}_expand{s.expand}_head{s.headdim}_groups{s.n_groups}"
        return f"{s.init}_{shape}_chunk{s.chunk_size}_a{self.steps_a}_b{self.steps_b}"

    @property
    def stage(self) -> str:
        """The stage whose sidecars are evaluated."""
        return "b" if self.steps_b else "a"


@dataclass(frozen=True, eq=False)
class Protocol:
    """What all variants have in common.

    stage_a, stage_b: training, with a variant's `steps`. train [N, T], validation [M, T]: token windows.
    gate: hard, not calibrated; its alpha is the share at which it meets random masks. folder: where sidecars and
    checkpoints stay.
    """

    stage_a: DistillSettings
    stage_b: DistillSettings
    train: np.ndarray
    validation: np.ndarray
    gate: ScoredGate
    folder: Path

    def __post_init__(self):
        if not self.gate.hard:
            raise ValueError("the ablations compare a hard gate with random masks of equal counts; this gate is soft")


# -- distillation
def variants(
    model: nn.Module,
    layers: Sequence[int],
    settings: SidecarSettings,
    steps_a: int,
    steps_b: int,
    ablations: Sequence[str] = DISTILLATION_ABLATIONS,
) -> list[Variant]:
    """The variants of each ablation; the full budget is `steps_a` then `steps_b` steps, with sidecars of `settings`.

    init: attention's projections against random weights in the same shape, the one that attention imposes. stages: A
    alone, A alone for as many steps as both stages have together, and A then B. d_state: D_STATES. tokens: TOKEN_SHARES
    of the steps of both stages, each trained to the end of its own learning rate schedule.
    Raises ValueError for `init` on a model whose attention cannot be copied.
    """
    unknown = sorted(set(ablations) - set(DISTILLATION_ABLATIONS))
    if unknown:
        raise ValueError(f"unknown ablation {unknown[0]!r}; choose from {', '.join(DISTILLATION_ABLATIONS)}")
    if steps_a < 1 or steps_b < 1:
        raise ValueError(f"ablations train both stages; got {steps_a} steps of stage A and {steps_b} of stage B")
    full = Variant("", "", settings, steps_a, steps_b)
    found = []
    if "init" in ablations:
        shape = attention_settings(model, layers[0], settings)
        for init in ("random", "attention"):
            found.append(replace(full, ablation="init", name=init, settings=replace(shape, init=init)))
    if "stages" in ablations:
        alone = replace(full, ablation="stages", name="a", steps_b=0)
        longer = replace(alone, name="a_longer", steps_a=steps_a + steps_b)
        found += [alone, longer, replace(full, ablation="stages", name="a_b")]
    if "d_state" in ablations:
        for size in D_STATES:
            found.append(replace(full, ablation="d_state", name=str(size), settings=replace(settings, d_state=size)))
    if "tokens" in ablations:
        for share in TOKEN_SHARES:
            steps = {"steps_a": max(round(share * steps_a), 1), "steps_b": max(round(share * steps_b), 1)}
            found.append(replace(full, ablation="tokens", name=f"{share:g}", **steps))
    return found


def train_variant(study: Study, protocol: Protocol, variant: Variant) -> list[dict]:
    """Train a variant's sidecars into `<folder>/<variant.folder>/`, or go on where an earlier call was interrupted.

    The model comes without sidecars and leaves without. What is trained already is not trained again: the checkpoints
    stay beside the sidecars. Returns the validation curves: ablation, variant, stage, quantity, step, tokens (both
    counted within the stage), value. Stage A's normalised_mse is the mean over layers.
    Raises ValueError as `distill.train_stage_a`.
    """
    target = protocol.folder / variant.folder
    run = Distillation(study.model, protocol.train, protocol.validation, target, target / "checkpoints")
    steps_a = replace(protocol.stage_a, steps=variant.steps_a)
    rows = train_stage_a(run, study.layers, variant.settings, steps_a)
    if variant.steps_b:
        steps_b = replace(protocol.stage_b, steps=variant.steps_b)
        rows = rows + train_stage_b(run, study.layers, steps_b)
    curves = pd.DataFrame(rows).query("split == 'validation'")
    curves = curves.groupby(["stage", "quantity", "step", "tokens"], as_index=False)["value"].mean()
    return [
        {"ablation": variant.ablation, "variant": variant.name, **row}
        for row in curves.sort_values(["stage", "quantity", "step"]).to_dict("records")
    ]


def measure_variant(study: Study, protocol: Protocol, variant: Variant) -> dict:
    """What the sidecars that `train_variant` left measure, as a piece keeps it: `values`, and sums per document.

    The values are parameters (of one sidecar); kl on the validation windows under random masks whose share is drawn per
    window, alike for all variants (the curves have other masks), and kl_alpha_1 with every token on Mamba, nats per
    token; recovered on calibration text (`recovery.Recovery`), and the share that the gate realised. The sums are those
    of alpha 1 (`alone`), of the gate, and of random masks, mean over their seeds, with exactly the gate's counts in
    every layer and document; that is checked. The model comes without sidecars and leaves without.
    """
    session, sidecars = study.session, protocol.folder / variant.folder
    recovery = measure_recovery(
        study.model, study.layers, session.tokens["calibration"], sidecars, variant.stage, *session.windows.values()
    )
    attach_mamba_sidecar(study.model, study.layers, alpha=1.0, sidecar_dir=sidecars, stage=variant.stage)
    try:
        first = attachment_of(study.model).hybrid_layers()[0].sidecar
        values = {
            "parameters": sum(parameter.numel() for parameter in first.parameters()),
            "kl": _validation_kl(study, protocol, MaskGate(_validation_masks(study, protocol))),
            "kl_alpha_1": _validation_kl(study, protocol, FixedGate(1.0)),
            "recovered": recovery.recovered,
        }
        _, alone = score_gate(study, FixedGate(1.0), "alpha 1")
        gate = calibrate_gates(
            study.model, protocol.gate, session.tokens["calibration"], session.windows["max_seq_len"],
            session.windows["batch_size"],
        )  # fmt: skip
        record, gated = score_gate(study, gate, "gate")
        drawn = []
        for seed in study.mask_seeds:
            masks = MaskGate(matched_random_masks(record.shares, seed))
            control, content = score_gate(study, masks, f"random masks, seed {seed}")
            check_equal_counts(record.shares, control.shares)
            drawn.append(pd.DataFrame(content["table"]))
    finally:
        detach_mamba_sidecars(study.model)
    values["share_realised"] = record.mean_share()
    sums = {"alone": alone["table"], "gate": gated["table"], "random": mean_table(drawn).to_dict("list")}
    return {"values": values, "sums": sums}


def variant_row(study: Study, protocol: Protocol, variant: Variant, measured: dict, baseline: pd.DataFrame) -> dict:
    """A variant's row: its settings, what `measure_variant` gave, and differences with intervals, nats per token.

    alpha_1 and random (masks) are against the baseline, vs_random is the gate minus random masks.
    """
    values, bootstrap = measured["values"], study.rule.bootstrap
    alone, gated, random = (pd.DataFrame(measured["sums"][name]) for name in ("alone", "gate", "random"))
    row = {name: value for name, value in asdict(variant.settings).items() if name != "chunk_size"}
    row |= {"steps_a": variant.steps_a, "steps_b": variant.steps_b, "parameters": values["parameters"]}
    row["training_tokens"] = protocol.train.shape[1] * (
        variant.steps_a * protocol.stage_a.batch_size + variant.steps_b * protocol.stage_b.batch_size
    )
    row |= {name: values[name] for name in ("kl", "kl_alpha_1", "recovered")}
    row |= paired(alone, baseline, bootstrap).columns("alpha_1", "alpha_1_") | {
        "share_realised": values["share_realised"]
    }
    row |= paired(random, baseline, bootstrap).columns("random", "random_")
    return row | paired(gated, random, bootstrap).columns("vs_random", "vs_random_") | {"documents": len(baseline)}


def run_ablations(study: Study, protocol: Protocol, chosen: Sequence[Variant]) -> dict[str, pd.DataFrame]:
    """Train and evaluate every variant, one after the other, equal ones once: a table per ablation, and "curves".

    Tables have a row per variant: ablation, variant, training (its folder), then what `variant_row` gives; the curves
    are those of `train_variant`. Sidecars and checkpoints stay in `protocol.folder`, from which a later run goes on;
    a run that restarts throws them away. What was measured with the same sidecars is not measured again.
    """
    if study.session.pieces.restart:
        for name in {variant.folder for variant in chosen}:
            shutil.rmtree(protocol.folder / name, ignore_errors=True)
    session, curves, rows = study.session, [], []
    baseline = session.score("baseline", {})
    for variant in chosen:
        curves += train_variant(study, protocol, variant)
        trained = SidecarSet(0, protocol.folder / variant.folder, variant.stage, study.layers)
        depends = trained.key() | session.text_key("evaluation") | {"calibration": session.text_key("calibration")}
        depends |= {"gate": asdict(protocol.gate), "mask_seeds": study.mask_seeds}
        measured = session.pieces.content(
            f"sidecars {variant.folder}", depends, partial(measure_variant, study, protocol, variant)
        )
        row = variant_row(study, protocol, variant, measured, baseline)
        head = {"ablation": variant.ablation, "variant": variant.name, "training": variant.folder}
        rows.append(head | row | {"sidecars_sha256": trained.identity()["sha256"]})
    frame = pd.DataFrame(rows)
    found = {name: table.reset_index(drop=True) for name, table in frame.groupby("ablation", sort=False)}
    return found | {"curves": pd.DataFrame(curves)}


def _validation_kl(study: Study, protocol: Protocol, gate: Gate) -> float:
    """Mean KL(base model || hybrid) over the validation windows, nats per token."""
    model = study.model
    set_gate(model, gate)
    windows = [TokenDocument(_window(index), "validation", ids, 0) for index, ids in enumerate(protocol.validation)]
    length, on_batch = protocol.validation.shape[1], attachment_of(model).on_batch
    reference = partial(base_logits, model)
    scores = score_documents(model, windows, length, length, protocol.stage_b.batch_size, reference, on_batch)
    return scores.kl_per_token


def _validation_masks(study: Study, protocol: Protocol) -> dict[str, dict[int, np.ndarray]]:
    """Random masks as stage B trains with: a share u ~ U(0, 1) per window, then every token and layer by itself."""
    masks = {}
    for index, ids in enumerate(protocol.validation):
        rng = np.random.default_rng([protocol.stage_b.seed, index])
        share = rng.random()
        masks[_window(index)] = {layer: (rng.random(len(ids) - 1) < share).astype(np.float32) for layer in study.layers}
    return masks


def _window(index: int) -> str:
    return f"validation window {index}"

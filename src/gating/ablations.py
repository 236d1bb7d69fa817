"""Ablations: what the sidecars' initialisation, training stages, state width and training tokens change, and the gate's
signal, softness and threshold.

    chosen = variants(model, layers, SidecarSettings(), steps_a=40, steps_b=80)
    tables = run_ablations(model, protocol, chosen, folder, meta)          # "init", ..., and "curves"
    tables |= gate_ablation_rows(pd.read_csv("gated_hybrid_results.csv"), temperature=0.1)

A distillation ablation trains sidecars of its own, on a reduced budget: compare its variants with each other, not with
the study's sidecars. All variants see the same windows in the same order, and draw from the same seed; their intervals
are over documents, with that one seed. Gate ablations are selections from rows that the study measures anyway.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from src.base.results import ResultStore
from src.base.stats import Interval
from src.base.text_data import TokenDocument
from src.eval_utils import score_documents
from src.gating.controls import check_equal_counts
from src.gating.tables import Bootstrap, document_table, mean_table
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.calibration import calibrate_gates
from src.hybrid.distill import DistillSettings, measure_recovery, train_stage_a, train_stage_b
from src.hybrid.gates import SIGNALS, FixedGate, Gate, MaskGate, ScoredGate, matched_random_masks
from src.hybrid.layer import attachment_of, base_logits, record_gates, set_gate
from src.hybrid.record import GateRecord
from src.hybrid.sidecar import SidecarSettings, attention_settings
from src.hybrid.sidecar_sets import sidecar_identity
from src.models.families import decoder_layers

DISTILLATION_ABLATIONS = ("init", "stages", "d_state", "tokens")
D_STATES = (16, 64, 128)
TOKEN_SHARES = (0.25, 0.5, 1.0)
# A routing gate's mode in gated_hybrid_results.csv, and what is taken from its row.
GATE_MODE = re.compile(r"routing_(?P<kind>hard|soft)_[0-9.]+(_(?P<other>shared|previous|lookahead|t[0-9.e-]+))?")
GATE_COLUMNS = (
    "share_realised", "delta_nll", "ci_low", "ci_high", "vs_random", "vs_random_ci_low", "vs_random_ci_high"
)  # fmt: skip


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
    gate: hard, not calibrated; its alpha is the share at which it meets random masks, one for each of mask_seeds.
    calibration, evaluation: documents, scored in windows of `max_seq_len` tokens.
    """

    layers: Sequence[int]
    stage_a: DistillSettings
    stage_b: DistillSettings
    train: np.ndarray
    validation: np.ndarray
    calibration: Sequence[TokenDocument]
    evaluation: Sequence[TokenDocument]
    gate: ScoredGate
    mask_seeds: Sequence[int]
    max_seq_len: int
    stride: int
    batch_size: int
    bootstrap: Bootstrap

    def __post_init__(self):
        if not self.gate.hard:
            raise ValueError("the ablations compare a hard gate with random masks of equal counts; this gate is soft")
        if not self.mask_seeds:
            raise ValueError("the ablations need at least one seed of random masks")


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

    init: attention's projections against random weights in the same shape, the one that attention imposes. Stage A
        starts from a fitted out_proj where the init is random, and from attention's own where it is not.
    stages: A alone, A alone for as many steps as both stages have together, and A then B.
    d_state: D_STATES; the sidecars' parameters differ. tokens: TOKEN_SHARES of the steps of both stages, each trained
        to the end of its own learning rate schedule.

    Raises ValueError for unknown ablations, fewer than one step of a stage, and `init` on a model whose attention
    cannot be copied.
    """
    unknown = sorted(set(ablations) - set(DISTILLATION_ABLATIONS))
    if unknown:
        raise ValueError(f"unknown ablation {unknown[0]!r}; choose from {', '.join(DISTILLATION_ABLATIONS)}")
    if steps_a < 1 or steps_b < 1:
        raise ValueError(f"ablations train both stages; got {steps_a} steps of stage A and {steps_b} of stage B")
    full = Variant("", "", settings, steps_a, steps_b)
    found = []
    if "init" in ablations:
        attention = decoder_layers(model)[layers[0]].self_attn
        shape = attention_settings(attention, model.config.hidden_size, layers[0], settings)
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


def train_variant(
    model: nn.Module, protocol: Protocol, variant: Variant, folder: str | Path, progress: bool = True
) -> list[dict]:
    """Train a variant's sidecars into `<folder>/<variant.folder>/`, or go on where an earlier call was interrupted.

    The model comes without sidecars and leaves without. What is trained already is not trained again: the checkpoints
    stay beside the sidecars. Returns the validation curves: ablation, variant, stage, quantity, step, tokens (both
    counted within the stage), value. Stage A's normalised_mse is the mean over layers.
    Raises ValueError as `distill.train_stage_a`.
    """
    target = Path(folder) / variant.folder
    common = {
        "train": protocol.train,
        "validation": protocol.validation,
        "folder": target,
        "checkpoints": target / "checkpoints",
        "progress": progress,
    }
    steps_a = replace(protocol.stage_a, steps=variant.steps_a)
    rows = train_stage_a(model, protocol.layers, variant.settings, settings=steps_a, **common)
    if variant.steps_b:
        steps_b = replace(protocol.stage_b, steps=variant.steps_b)
        rows = rows + train_stage_b(model, protocol.layers, settings=steps_b, **common)
    curves = pd.DataFrame(rows).query("split == 'validation'")
    curves = curves.groupby(["stage", "quantity", "step", "tokens"], as_index=False)["value"].mean()
    return [
        {"ablation": variant.ablation, "variant": variant.name, **row}
        for row in curves.sort_values(["stage", "quantity", "step"]).to_dict("records")
    ]


def evaluate_variant(
    model: nn.Module,
    protocol: Protocol,
    variant: Variant,
    folder: str | Path,
    baseline: pd.DataFrame,
    progress: bool = True,
) -> tuple[dict, pd.DataFrame]:
    """What the sidecars that `train_variant` left are worth: (row, the gate's sums per document).

    baseline: sums per document of the evaluation text without sidecars. The row holds, besides the variant's settings:
    parameters (of one sidecar), training_tokens (of both stages); on the validation windows kl under random masks whose
    share is drawn per window, alike for all variants (the curves have other masks), and kl_alpha_1 with every token on
    Mamba, nats per token;
    recovered on calibration text (`distill.Recovery`); on evaluation text, nats per token with paired intervals, what
    alpha 1 and random masks (mean over their seeds) cost against the baseline, and vs_random, the gate minus random.
    Random masks have exactly the gate's counts in every layer and document; that is checked.

    The model comes without sidecars and leaves without. Raises ValueError where the sidecars are not there.
    """
    sidecars, scoring = Path(folder) / variant.folder, (protocol.max_seq_len, protocol.stride, protocol.batch_size)
    recovery = measure_recovery(
        model, protocol.layers, protocol.calibration, sidecars, variant.stage, *scoring, progress=progress
    )
    attach_mamba_sidecar(model, protocol.layers, alpha=1.0, sidecar_dir=sidecars, stage=variant.stage)
    attachment = attachment_of(model)

    def score(gate: Gate, label: str) -> tuple[pd.DataFrame, GateRecord]:
        set_gate(model, gate)
        label = label if progress else None
        with record_gates(model) as record:
            scores = score_documents(model, protocol.evaluation, *scoring, on_batch=attachment.on_batch, progress=label)
        return document_table(scores), record

    try:
        parameters = sum(parameter.numel() for parameter in attachment.hybrid_layers()[0].sidecar.parameters())
        kl = _validation_kl(model, protocol, MaskGate(_validation_masks(protocol)))
        kl_alpha_1 = _validation_kl(model, protocol, FixedGate(1.0))
        alone, _ = score(FixedGate(1.0), "alpha 1")
        gate = calibrate_gates(model, protocol.gate, protocol.calibration, protocol.max_seq_len, protocol.batch_size)
        gated, record = score(gate, "gate")
        drawn = []
        for seed in protocol.mask_seeds:
            table, control = score(MaskGate(matched_random_masks(record.shares, seed)), f"random masks, seed {seed}")
            check_equal_counts(record.shares, control.shares)
            drawn.append(table)
    finally:
        detach_mamba_sidecars(model)
    random = mean_table(drawn)
    difference = protocol.bootstrap.difference
    row = {name: value for name, value in asdict(variant.settings).items() if name != "chunk_size"}
    row |= {"steps_a": variant.steps_a, "steps_b": variant.steps_b, "parameters": parameters}
    row["training_tokens"] = protocol.train.shape[1] * (
        variant.steps_a * protocol.stage_a.batch_size + variant.steps_b * protocol.stage_b.batch_size
    )
    row |= {"kl": kl, "kl_alpha_1": kl_alpha_1, "recovered": recovery.recovered}
    row |= _columns("alpha_1", difference(alone, baseline)) | {"share_realised": record.mean_share()}
    row |= _columns("random", difference(random, baseline)) | _columns("vs_random", difference(gated, random))
    return row | {"documents": len(baseline)}, gated


def run_ablations(
    model: nn.Module,
    protocol: Protocol,
    chosen: Sequence[Variant],
    folder: str | Path,
    meta: dict,
    restart: bool = False,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Train and evaluate every variant, one after the other, equal ones once: a table per ablation, and "curves".

    Tables have a row per variant: ablation, variant, training (its folder), then what `evaluate_variant` gives; the
    curves are those of `train_variant`. Sidecars, checkpoints and finished rows stay under `folder`, from which a later
    call goes on; `restart` throws them away. Rows count as finished for the same meta, which must name the texts and
    how they are scored, and the same sidecars (a hash), so it need not name how those are trained.
    """
    folder = Path(folder)
    if restart:
        for name in {variant.folder for variant in chosen}:
            shutil.rmtree(folder / name, ignore_errors=True)
    store = ResultStore(folder / "variants.csv", folder / "variant_documents.csv", "training", meta, restart)
    if "baseline" not in store.tables:
        scoring = (protocol.max_seq_len, protocol.stride, protocol.batch_size)
        label = "baseline" if progress else None
        store.add("baseline", document_table(score_documents(model, protocol.evaluation, *scoring, progress=label)))
    curves = []
    for variant in chosen:
        curves += train_variant(model, protocol, variant, folder, progress)
        trained = {"sidecars_sha256": sidecar_identity(folder / variant.folder, variant.stage)["sha256"]}
        if not trained.items() <= store.rows.get(variant.folder, {}).items():
            row, table = evaluate_variant(model, protocol, variant, folder, store.tables["baseline"], progress)
            store.add(variant.folder, table, row | trained)
    rows = pd.DataFrame([{"ablation": one.ablation, "variant": one.name, **store.rows[one.folder]} for one in chosen])
    tables = {name: table.reset_index(drop=True) for name, table in rows.groupby("ablation", sort=False)}
    return tables | {"curves": pd.DataFrame(curves)}


def _validation_kl(model: nn.Module, protocol: Protocol, gate: Gate) -> float:
    """Mean KL(base model || hybrid) over the validation windows, nats per token."""
    set_gate(model, gate)
    windows = [TokenDocument(_window(index), "validation", ids, 0) for index, ids in enumerate(protocol.validation)]
    length, on_batch = protocol.validation.shape[1], attachment_of(model).on_batch
    reference = partial(base_logits, model)
    scores = score_documents(model, windows, length, length, protocol.stage_b.batch_size, reference, on_batch)
    return scores.kl_per_token


def _validation_masks(protocol: Protocol) -> dict[str, dict[int, np.ndarray]]:
    """Random masks as stage B trains with: a share u ~ U(0, 1) per window, then every token and layer by itself."""
    masks = {}
    for index, ids in enumerate(protocol.validation):
        rng = np.random.default_rng([protocol.stage_b.seed, index])
        share = rng.random()
        masks[_window(index)] = {
            layer: (rng.random(len(ids) - 1) < share).astype(np.float32) for layer in protocol.layers
        }
    return masks


def _window(index: int) -> str:
    return f"validation window {index}"


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_ci_low": interval.low, f"{name}_ci_high": interval.high}


# -- gates
def gate_ablation_rows(results: pd.DataFrame, temperature: float) -> dict[str, pd.DataFrame]:
    """The gate ablations, as selections from the rows of gated_hybrid_results.csv.

    signal: previous, lookahead (hard gates). softness: hard, and soft_t<temperature>; `temperature` is that of the soft
    rows that do not name theirs. threshold: layer_wise, shared (hard gates). An ablation takes the shares at which it
    has at least two variants, and is left out where it has none. Columns: ablation, variant, mode, share (target), and
    GATE_COLUMNS. Raises ValueError for a missing column.
    """
    absent = [name for name in ("mode", "signal", "share_target", *GATE_COLUMNS) if name not in results]
    if absent:
        raise ValueError(f"these are not the rows of gated_hybrid_results.csv: there is no column {absent[0]!r}")
    found = []
    for row in results.to_dict("records"):
        match = GATE_MODE.fullmatch(row["mode"])
        if match is None:
            continue
        hard, other = match["kind"] == "hard", match["other"] or ""
        variants_of = {}
        if hard and other in ("", *SIGNALS):
            variants_of["signal"] = row["signal"]
        if hard and other in ("", "shared"):
            variants_of["threshold"] = other or "layer_wise"
        if other == "" or other.startswith("t"):
            variants_of["softness"] = "hard" if hard else f"soft_{other or f't{temperature:g}'}"
        for ablation, variant in variants_of.items():
            head = {"ablation": ablation, "variant": variant, "mode": row["mode"], "share": row["share_target"]}
            found.append(head | {name: row[name] for name in GATE_COLUMNS})
    frame = pd.DataFrame(found, columns=["ablation", "variant", "mode", "share", *GATE_COLUMNS])
    frame = frame[frame.groupby(["ablation", "share"])["mode"].transform("size") > 1]
    frame = frame.sort_values("share", kind="stable")
    return {name: table.reset_index(drop=True) for name, table in frame.groupby("ablation")}

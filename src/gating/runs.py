"""Gates and controls at equal counts: one run is one pass of one gate over the documents, with one set of sidecars.

`measure_set` makes the runs; `document_sums`, `result_table`, `pair_table` and `domain_table` derive the result files:
a mode's row averages its runs over the seeds of random masks, then over the sets of sidecars, whose variance is in its
intervals.
Every control is compared with the gate that it was matched to; that both send equally many tokens of every document and
layer to Mamba is checked on what was recorded while they ran.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from torch import nn

from src import eval_utils
from src.base import results, stats
from src.base.errors import UserError
from src.base.text_data import TokenDocument
from src.gating import controls
from src.gating.rule import Rule, compare, p_value, seeds_of
from src.gating.tables import document_table, mean_table
from src.hybrid import ledger, sidecar_sets
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.calibration import calibrate_gates
from src.hybrid.checkpoints import load_learned_gates
from src.hybrid.gates import (
    ActivationGate,
    FixedGate,
    Gate,
    LearnedGate,
    MaskGate,
    RoutingGate,
    is_hard,
    matched_random_masks,
)
from src.hybrid.layer import attachment_of, bypass_sidecars, record_gates, set_gate
from src.hybrid.record import GateRecord
from src.models.families import has_router

# Controls that are drawn at random: one run for each mask seed. The others have one run.
DRAWN = ("random", *controls.SHUFFLED_BLOCKS)
# What the gate that leads a share goes by: BlockFFN's router, or the activations of a dense model's FFN.
LEADERS = ("routing", "ffn_sparsity")
LEARNED_GATES = "learned_gate.safetensors"
RESULT_COLUMNS = (
    "mode", "gate", "signal", "uses_document", "share_target", "share_realised", "perplexity", "delta", "pct_change",
    "delta_nll", "ci_low", "ci_high", "control", "vs_random", "vs_random_ci_low", "vs_random_ci_high", "p_value",
    "p_holm", "sidecar_seeds", "flops_ideal", "flops_executed", "tokens_per_second", "memory_gb",
)  # fmt: skip
PAIR_COLUMNS = ("mode", "control", "share", "difference", "ci_low", "ci_high", "p_value", "p_holm", "sidecar_seeds")
DOMAIN_COLUMNS = (
    "mode", "domain", "documents", "tokens", "share_realised", "delta_nll", "ci_low", "ci_high", "vs_random",
    "vs_random_ci_low", "vs_random_ci_high",
)  # fmt: skip

# Scores of a control that ranks tokens: (document id -> layer -> [N], whether the largest go to Mamba).
ScoresOf = Callable[[str], tuple[controls.Masks, bool]]


@dataclass(frozen=True)
class SidecarSet:
    """One set of distilled sidecars on some layers: the seed it was distilled from, its folder and stage."""

    seed: int
    folder: Path
    stage: str
    layers: list[int]

    @property
    def has_learned_gates(self) -> bool:
        """Whether learned gates of all its layers were trained with it."""
        path = self.folder / LEARNED_GATES
        if not path.is_file():
            return False
        with safe_open(path, framework="np") as archive:
            return {f"{layer}.weight" for layer in self.layers} <= set(archive.keys())


@dataclass(frozen=True)
class Mode:
    """A deployable gate to measure, and what it is compared with.

    share: target; None for an uncalibrated threshold. calibrate: on calibration text, to that share. control: the mode
    that `vs_random` compares it with. controls: names of controls to match to it (of `controls.CONTROLS`, or a name
    that the caller's scores know), each with the mode of its rows. all_draws: whether the controls that are drawn at
    random have a run for each mask seed, or one.
    """

    name: str
    gate: FixedGate | RoutingGate | ActivationGate | LearnedGate
    share: float | None
    calibrate: bool
    control: str | None = None
    controls: tuple[tuple[str, str], ...] = ()
    all_draws: bool = False


@dataclass
class Bench:
    """What runs are measured with: model, text, settings of scoring, mean active experts per layer, and their store.

    calibrated: gates by (mode, sidecar seed, layers), so that none is calibrated twice in a run.
    """

    model: nn.Module
    tokens: list[TokenDocument]
    calibration: list[TokenDocument]
    score: dict
    active: list[float]
    store: results.ResultStore
    calibrated: dict[tuple, Gate] = field(default_factory=dict)

    def has(self, layers: str, mode: str, sidecar_seed: int, mask_seed: int = 0) -> bool:
        """Whether this run is there."""
        return run_name(layers, mode, sidecar_seed, mask_seed) in self.store.rows

    def add(
        self,
        layers: str,
        mode: str,
        sidecar_seed: int,
        mask_seed: int,
        gate: Gate | None,
        settings: dict,
        label: str,
    ) -> GateRecord | None:
        """Score the documents with `gate` (None: the base model, nothing attached), keep the run; what was recorded."""
        device = eval_utils.model_device(self.model)
        eval_utils.reset_peak_memory(device)
        if gate is None:
            record, on_batch = None, None
            scores = eval_utils.score_documents(self.model, self.tokens, progress=label, **self.score)
        else:
            set_gate(self.model, gate)
            on_batch = attachment_of(self.model).on_batch
            with record_gates(self.model) as record:
                scores = eval_utils.score_documents(
                    self.model, self.tokens, on_batch=on_batch, progress=label, **self.score
                )
        table = document_table(scores)
        shares = record.layer_shares() if record else None
        if record:
            by_document = record.document_shares()
            table["mamba_share"] = results.as_written(
                [np.mean(list(by_document[document].values())) for document in table["document"]]
            )
        lengths = [len(document.ids) - 1 for document in self.tokens]
        row = {"layers": layers, "mode": mode, "sidecar_seed": sidecar_seed, "seed": mask_seed} | settings
        row["share_realised"] = float(np.mean(list(shares.values()))) if shares else 0.0
        row["perplexity"] = scores.perplexity
        row |= ledger.flops_columns(self.model, lengths, self.active, shares, gate is not None and is_hard(gate))
        row |= {"tokens_per_second": scores.tokens_per_second, "memory_gb": eval_utils.peak_memory_gb(device)}
        self.store.add(run_name(layers, mode, sidecar_seed, mask_seed), table, row)
        return record


def run_name(layers: str, mode: str, sidecar_seed: int, mask_seed: int = 0) -> str:
    """The key of a run: `target/routing_hard_0.5/sidecars0/0`."""
    return f"{layers}/{mode}/sidecars{sidecar_seed}/{mask_seed}"


# -- sidecars
@contextmanager
def attached(model: nn.Module, sidecars: SidecarSet) -> Iterator[nn.Module]:
    """The model with a set of sidecars and its learned gates, where there are any; without them again afterwards."""
    attach_mamba_sidecar(model, sidecars.layers, gate_mode="fixed", sidecar_dir=sidecars.folder, stage=sidecars.stage)
    try:
        if sidecars.has_learned_gates:
            load_learned_gates(model, sidecars.folder)
        yield model
    finally:
        detach_mamba_sidecars(model)


# -- what to measure
def random_control(mode: str) -> str:
    """The random control matched to a hard gate: `control_random_0.5` for routing_hard_0.5, the leader of a share;
    `control_random_learned_0.5` for learned_0.5, and `control_random_lookahead_0.5` for routing_hard_0.5_lookahead."""
    words = mode.split("_")
    share = next((word for word in words if word.replace(".", "").isdigit()), None)
    leader = next((f"{signal}_hard_" for signal in LEADERS if mode.startswith(f"{signal}_hard_")), None)
    if leader:
        variant = mode.removeprefix(f"{leader}{share}").strip("_")
    else:
        variant = mode.removesuffix(f"_{share}") if share else words[-1]
    return "_".join(part for part in ("control_random", variant, share) if part)


def gate_modes(
    shares: Sequence[float],
    signal: str,
    threshold: float,
    temperature: float,
    seed: int,
    leader: str | None,
    learned: bool,
    main_share: float,
    temperatures: Sequence[float] = (),
    main_controls: Sequence[str] = ("random",),
    other_controls: Sequence[str] = ("random",),
    shared_threshold: bool = False,
) -> list[Mode]:
    """All modes of the main set of sidecars, per share the leader first: its controls' counts are those of the share.

    main_controls, other_controls: matched to the leader at `main_share`, and at the other shares. shared_threshold:
    also the routing gate with one threshold for all layers, at `main_share`.
    leader: of LEADERS; the leader is its hard gate, or for None fixed alpha (whose random control has as many tokens as
    its shares sum to). signal, threshold, temperatures and the threshold's own row are of routing gates only.
    """
    common = {"signal": signal, "threshold": threshold, "seed": seed}
    router = leader == "routing"

    def scored(share: float, hard: bool) -> RoutingGate | ActivationGate:
        if router:
            return RoutingGate(share, hard=hard, temperature=temperature, **common)
        return ActivationGate(share, hard=hard, temperature=temperature, seed=seed)

    modes = []
    for share in shares:
        names = main_controls if share == main_share else other_controls
        matched = tuple((name, f"control_{name}_{share:g}") for name in names)
        random = f"control_random_{share:g}"
        fixed = Mode(f"fixed_{share:g}", FixedGate(share), share, False, random)
        if leader:
            hard, soft = scored(share, hard=True), scored(share, hard=False)
            modes.append(Mode(f"{leader}_hard_{share:g}", hard, share, True, random, matched, share == main_share))
            modes.append(fixed)
            modes.append(Mode(f"{leader}_soft_{share:g}", soft, share, True, random))
        else:
            modes.append(replace(fixed, controls=tuple(pair for pair in matched if pair[0] == "random")))
        if learned:
            modes.append(_own_random(Mode(f"learned_{share:g}", LearnedGate(share, hard=True, seed=seed), share, True)))
    if router:
        share = main_share if main_share in shares else shares[0]
        for other in temperatures:
            if other != temperature:
                gate = RoutingGate(share, temperature=other, **common)
                modes.append(Mode(f"routing_soft_{share:g}_t{other:g}", gate, share, True, f"control_random_{share:g}"))
        if signal == "previous":  # the other way round, layer 0 may be among the layers
            gate = RoutingGate(share, signal="lookahead", hard=True, threshold=threshold, seed=seed)
            modes.append(_own_random(Mode(f"routing_hard_{share:g}_lookahead", gate, share, True)))
        if shared_threshold:
            gate = RoutingGate(share, hard=True, **common)
            modes.append(_own_random(Mode(f"routing_hard_{share:g}_shared", gate, share, True)))
        modes.append(_own_random(Mode("routing_threshold", RoutingGate(hard=True, **common), None, False)))
    return modes


def with_controls(mode: Mode, names: Sequence[str]) -> Mode:
    """The mode with those of its controls alone that are named."""
    return replace(mode, controls=tuple(pair for pair in mode.controls if pair[0] in names))


def _own_random(mode: Mode) -> Mode:
    """A hard gate that leads no share, with a random control of its own counts."""
    control = random_control(mode.name)
    return replace(mode, control=control, controls=(("random", control),))


# -- measuring
def add_baseline(bench: Bench, layers: str) -> None:
    """The run of the model without sidecars, where it is not there yet."""
    if not bench.has(layers, "baseline", 0):
        settings = {"gate": "none", "signal": "none", "uses_document": False, "share_target": 0.0, "control": ""}
        bench.add(layers, "baseline", 0, 0, None, settings, "baseline")


def measure_set(
    bench: Bench,
    layers: str,
    sidecars: SidecarSet,
    modes: Sequence[Mode],
    mask_seeds: Sequence[int],
    scores_of: ScoresOf | None = None,
    visit: Mapping[str, Callable[[], None]] | None = None,
) -> None:
    """Measure what is missing of these modes and their controls; the set of sidecars must be attached.

    A gate is calibrated and run again where only its controls are missing: they need what it did. visit: what to call
    while a mode's calibrated gate is set (to generate text with it), by mode.
    Raises ValueError where a control's counts differ from its gate's in any layer of any document.
    """
    mask_seeds = mask_seeds_of(sidecars, mask_seeds)
    for mode in modes:
        absent = [run for run in runs_of(mode, mask_seeds) if not bench.has(layers, run[1], sidecars.seed, run[2])]
        missing = [run for run in absent if run[1] != mode.name]
        visitor = (visit or {}).get(mode.name)
        is_there = not absent
        if is_there and visitor is None:
            continue
        gate = calibrate(bench, mode, sidecars)
        if visitor is not None:
            set_gate(bench.model, gate)
            visitor()
        if is_there:
            continue
        settings = {
            "gate": gate.mode,
            "signal": getattr(gate, "signal", "none"),
            "uses_document": False,
            "share_target": float("nan") if mode.share is None else mode.share,
            "control": mode.control or "",
        }
        record = bench.add(layers, mode.name, sidecars.seed, 0, gate, settings, f"{mode.name}, set {sidecars.seed}")
        for name, row, seed in missing:
            masks = control_masks(name, record, seed, scores_of)
            settings = {
                "gate": name,
                "signal": "none",
                "uses_document": True,
                "share_target": record.mean_share() if mode.share is None else mode.share,
                "control": "" if name == "random" else random_of(mode),
            }
            label = f"{row}, set {sidecars.seed}" + (f", seed {seed}" if name in DRAWN else "")
            done = bench.add(layers, row, sidecars.seed, seed, MaskGate(masks), settings, label)
            if is_hard(gate):
                controls.check_equal_counts(record.shares, done.shares)


def runs_of(mode: Mode, mask_seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """(control, mode of the row, mask seed) of every run that a mode takes, its own first ("" for the control)."""
    runs = [("", mode.name, 0)]
    for name, row in mode.controls:
        runs += [(name, row, seed) for seed in (mask_seeds if name in DRAWN and mode.all_draws else mask_seeds[:1])]
    return runs


def random_of(mode: Mode) -> str:
    """The mode of the random control among a mode's controls; "" where it has none."""
    return next((row for name, row in mode.controls if name == "random"), "")


def mask_seeds_of(sidecars: SidecarSet, mask_seeds: Sequence[int]) -> list[int]:
    """Seeds of random masks for one set: other ones for every set, so that the mean over sets is one over masks too."""
    return [seed + 1000 * sidecars.seed for seed in mask_seeds]


def calibrate(bench: Bench, mode: Mode, sidecars: SidecarSet) -> Gate:
    """A mode's gate, calibrated on the bench's calibration text where it is to be; the set must be attached."""
    key = (mode.name, sidecars.seed, tuple(sidecars.layers))
    if key not in bench.calibrated:
        gate = mode.gate
        if mode.calibrate:
            gate = calibrate_gates(
                bench.model, gate, bench.calibration, bench.score["max_seq_len"], bench.score["batch_size"],
                progress=f"calibrating {mode.name}, set {sidecars.seed}", shared=mode.name.endswith("_shared"),
            )  # fmt: skip
        bench.calibrated[key] = gate
    return bench.calibrated[key]


def control_masks(
    name: str, record: GateRecord, seed: int, scores_of: ScoresOf | None = None
) -> dict[str, dict[int, np.ndarray]]:
    """Masks of a control, with the counts of what a gate did. Raises ValueError for a name that needs other scores."""
    shares = record.shares
    match name:
        case "random":
            return matched_random_masks(shares, seed)
        case "token_shuffled" | "block_shuffled":
            return controls.block_shuffled_masks(shares, seed, controls.SHUFFLED_BLOCKS[name])
        case "inverted":
            return controls.scored_masks(shares, record.scores, largest=False, seed=seed)
        case "other_document":
            return controls.other_document_masks(shares, record.scores, seed)
        case "position_early" | "position_late":
            return controls.position_masks(shares, late=name == "position_late")
    if scores_of is None:
        raise ValueError(f"control {name!r} ranks tokens by scores, and none were given")
    scores, largest = scores_of(name)
    return controls.scored_masks(shares, scores, largest, seed)


def base_scores(bench: Bench, layers: Sequence[int], vocabulary: int) -> ScoresOf:
    """Scores of the controls in `controls.LARGEST_TO_MAMBA`, collected from the base model when first asked for.

    The set of sidecars must be attached when they are (recall_error compares it with attention).
    """
    collected: dict[str, controls.Masks] = {}

    def scores_of(name: str) -> tuple[controls.Masks, bool]:
        if name not in controls.LARGEST_TO_MAMBA:
            raise ValueError(f"there is no control {name!r}; there are {', '.join(controls.CONTROLS)}")
        if not collected:
            names = [one for one in controls.MODEL_SCORES if one != "self_sparsity" or has_router(bench.model)]
            counts = controls.token_counts(bench.calibration, vocabulary)
            collected["token_frequency"] = controls.frequency_scores(bench.tokens, counts, layers)
            with bypass_sidecars(bench.model):
                collected.update(
                    controls.collect_scores(
                        bench.model, bench.tokens, layers, names, bench.score["max_seq_len"],
                        bench.score["stride"], progress="scores of controls",
                    )
                )  # fmt: skip
        return collected[name], controls.LARGEST_TO_MAMBA[name]

    return scores_of


def penalty_on(
    bench: Bench, sidecars: SidecarSet, mode: Mode, mask_seeds: Sequence[int], baseline: pd.DataFrame
) -> list[pd.DataFrame]:
    """Sums per calibration document under random masks with a gate's counts there, one table per mask seed.

    The set must be attached; baseline: the sums of the model without sidecars. Behind the margin of `Rule`.
    """
    set_gate(bench.model, calibrate(bench, mode, sidecars))
    on_batch = attachment_of(bench.model).on_batch
    with record_gates(bench.model) as record:
        eval_utils.score_documents(bench.model, bench.calibration, on_batch=on_batch, **bench.score)
    tables = []
    for seed in mask_seeds_of(sidecars, mask_seeds):
        set_gate(bench.model, MaskGate(matched_random_masks(record.shares, seed)))
        label = f"margin, set {sidecars.seed}, seed {seed}"
        scores = eval_utils.score_documents(
            bench.model, bench.calibration, on_batch=on_batch, progress=label, **bench.score
        )
        tables.append(document_table(scores))
    if any(table["document"].tolist() != baseline["document"].tolist() for table in tables):
        raise ValueError("the baseline was scored on other calibration documents")
    return tables


# -- result files
def document_sums(store: results.ResultStore, layers: str) -> pd.DataFrame:
    """mode, sidecar_seed, document, domain, tokens, num_bytes, nll, mamba_share: means over the seeds of masks."""
    grouped: dict[tuple[str, int], list[pd.DataFrame]] = {}
    for name, row in store.rows.items():
        if row["layers"] == layers:
            grouped.setdefault((row["mode"], int(row["sidecar_seed"])), []).append(store.tables[name])
    parts = []
    for (mode, seed), tables in grouped.items():
        mean = mean_table(tables)
        if mode == "baseline":
            mean["mamba_share"] = 0.0
        parts.append(mean.assign(mode=mode, sidecar_seed=seed))
    columns = ["mode", "sidecar_seed", "document", "domain", "tokens", "num_bytes", "nll", "mamba_share"]
    return pd.concat(parts, ignore_index=True)[columns]


def result_table(store: results.ResultStore, layers: str, sums: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """gated_hybrid_results.csv: one row per mode, in the order they were first measured, controls after their gates.

    p_holm corrects the p-values of all modes that are compared with a random control for being so many (Holm).
    """
    runs = pd.DataFrame([row for row in store.rows.values() if row["layers"] == layers])
    baseline = _mean_sums(sums, "baseline")
    rows = []
    for mode, own in runs.groupby("mode", sort=False):
        table = _mean_sums(sums, mode)
        first = own.iloc[0]
        row = {"mode": mode, **{key: first[key] for key in ("gate", "signal", "uses_document", "control")}}
        for key in ("share_target", "share_realised", "flops_ideal", "flops_executed", "tokens_per_second"):
            row[key] = float(own[key].mean())
        row["memory_gb"] = float(own["memory_gb"].max())
        row["sidecar_seeds"] = 0 if mode == "baseline" else own["sidecar_seed"].nunique()
        perplexity, base = (float(np.exp(one["nll"].sum() / one["tokens"].sum())) for one in (table, baseline))
        row |= {"perplexity": perplexity, "delta": perplexity - base, "pct_change": 100 * (perplexity / base - 1)}
        same = stats.Interval(0.0, 0.0, 0.0)
        difference = same if mode == "baseline" else compare(sums, mode, "baseline", rule)
        row |= {"delta_nll": difference.estimate, "ci_low": difference.low, "ci_high": difference.high}
        if isinstance(first["control"], str) and first["control"] and seeds_of(sums, first["control"]):
            against = compare(sums, mode, first["control"], rule)
            row |= {
                "vs_random": against.estimate,
                "vs_random_ci_low": against.low,
                "vs_random_ci_high": against.high,
                "p_value": p_value(sums, mode, first["control"], rule),
            }
        rows.append(row)
    return _with_holm(pd.DataFrame(rows).reindex(columns=list(RESULT_COLUMNS)))


def pair_table(sums: pd.DataFrame, results: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """gated_hybrid_pairs.csv: the leader of every share minus each of its controls, nats per token.

    p_holm is Holm's correction over the table's rows; sidecar_seeds: sets of sidecars that both were measured with.
    """
    rows = []
    for row in results.to_dict("records"):
        mode, share = row["mode"], row["share_target"]
        if mode not in {f"{leader}_hard_{share:g}" for leader in LEADERS}:
            continue
        random = random_control(mode)
        for control in results["mode"]:
            own = control == random or not control.startswith("control_random")  # others match other gates
            if control.startswith("control_") and control.endswith(f"_{share:g}") and own:
                difference = compare(sums, mode, control, rule)
                both = set(seeds_of(sums, mode)) & set(seeds_of(sums, control))
                rows.append(
                    {
                        "mode": mode, "control": control, "share": share, "difference": difference.estimate,
                        "ci_low": difference.low, "ci_high": difference.high,
                        "p_value": p_value(sums, mode, control, rule), "sidecar_seeds": len(both),
                    }
                )  # fmt: skip
    return _with_holm(pd.DataFrame(rows).reindex(columns=list(PAIR_COLUMNS)))


def domain_table(sums: pd.DataFrame, results: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """gated_hybrid_domains.csv: every mode on each domain's documents alone, with the share realised there."""
    rows = []
    for domain in sums["domain"].unique():
        part = sums[sums["domain"] == domain]
        for row in results.to_dict("records"):
            mode, own = row["mode"], part[part["mode"] == row["mode"]]
            entry = {
                "mode": mode,
                "domain": domain,
                "documents": own["document"].nunique(),
                "tokens": int(own.drop_duplicates("document")["tokens"].sum()),
                "share_realised": float(np.average(own["mamba_share"], weights=own["tokens"])),
                "delta_nll": 0.0,
            }
            for other, prefix in (("baseline", ("delta_nll", "ci_low", "ci_high")), (row["control"], _AGAINST)):
                if isinstance(other, str) and other and mode != other and seeds_of(part, other):
                    interval = compare(part, mode, other, rule)
                    entry |= dict(zip(prefix, (interval.estimate, interval.low, interval.high), strict=True))
            rows.append(entry)
    return pd.DataFrame(rows).reindex(columns=list(DOMAIN_COLUMNS))


_AGAINST = ("vs_random", "vs_random_ci_low", "vs_random_ci_high")


def _with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its p_holm filled in, over all rows that have a p_value."""
    tested = frame["p_value"].notna().to_numpy()
    if tested.any():
        frame.loc[tested, "p_holm"] = stats.holm_correction(frame.loc[tested, "p_value"].astype(float))
    return frame


def _mean_sums(sums: pd.DataFrame, mode: str) -> pd.DataFrame:
    """document, tokens and NLL of a mode, mean over its sets of sidecars."""
    return sums[sums["mode"] == mode].groupby("document", sort=False)[["tokens", "nll"]].mean().reset_index()


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

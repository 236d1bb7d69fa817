"""04: check the hybrid layer on the model at hand, then distil its Mamba-2 sidecars, or load those that are there.

Writes sidecar_checks.json (every promise of the hybrid layer with its measured value, and what the sidecars recover of
the target layers' attention) and, after training, distillation.csv and the folder sidecars/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

# Flags by what they steer: stage A, stage B, the gate, all of the training, the geometry of sidecars that are made.
STAGE_A = ("stage_a_layers", "lr_a", "one_layer_at_a_time")
GATE = ("lr_gate", "gate_share")
TRAINING = (
    *STAGE_A, "lr_b", *GATE, "steps_a", "steps_b", "steps_gate", "sequence_tokens", "batch_sequences",
    "train_sequences", "validation_sequences", "bf16",
)  # fmt: skip
GEOMETRY = ("d_state", "d_conv", "expand", "headdim", "init")
FLAGS = (
    *cli.MODEL_FLAGS, *cli.RUN_FLAGS, "dataset", "window_tokens", "batch_windows", "layers", "sidecar_dir", "retrain",
    "checks_only", *GEOMETRY, *TRAINING, "recovery_documents",
)  # fmt: skip
# From this many parameters on, stage A trains one layer at a time (--one-layer-at-a-time auto).
LARGE_MODEL = 1_000_000_000


def parse(argv: list[str] | None = None):
    """The command line. Documents are kept up to one scoring window."""
    arguments = cli.parse(__doc__, config, FLAGS, argv)
    if arguments.checks_only:
        unused = ("retrain", "sidecar_dir", "batch_windows", *TRAINING)
        cli.refuse(arguments, unused, "--checks-only neither loads nor distils sidecars")
    for steps, flags in (("steps_a", STAGE_A), ("steps_b", ("lr_b",)), ("steps_gate", GATE)):
        if getattr(arguments, steps) == 0:
            cli.refuse(arguments, flags, f"--{steps.replace('_', '-')} is 0")
    arguments.document_tokens = arguments.window_tokens
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import shutil

from src.base import results, text_data
from src.hybrid import distill
from src.hybrid.checkpoints import available_layers, base_fingerprint, check_base
from src.hybrid.checks import format_table, run_checks
from src.hybrid.recovery import measure_recovery
from src.hybrid.session import Session, open_session
from src.hybrid.sidecar import SidecarSettings, mamba_kernels
from src.hybrid.sidecar_sets import shipped_folder
from src.models.families import decoder_layers, memory_estimate, parameter_counts, resolve_layers


def choose_folder(arguments) -> tuple[Path, bool]:
    """(folder of the sidecars, whether to distil them): those that are there are loaded unless --retrain."""
    run_folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    own = arguments.sidecar_dir or run_folder / "sidecars"
    if arguments.retrain:
        return own, True
    for folder in (own,) if arguments.sidecar_dir else (own, shipped_folder(arguments.model)):
        if available_layers(folder, "a"):
            if not arguments.checks_only:
                cli.refuse(arguments, TRAINING, f"the sidecars in {folder} are loaded; --retrain makes them anew")
            return folder, False
    return own, not arguments.checks_only


def sequences(session: Session):
    """Training and validation sequences [N, T] of whole documents; the session notes the identity of both texts."""
    arguments, length = session.arguments, session.arguments.sequence_tokens
    counts = {"train": arguments.train_sequences, "calibration": arguments.validation_sequences}
    found = []
    for split, count in counts.items():
        documents = text_data.load_documents(arguments.dataset, split, arguments.seed)
        session.data[split] = text_data.identity(documents)
        tokens = text_data.tokenize(documents, session.tokenizer)
        found.append(text_data.training_windows(tokens, length, count, arguments.seed))
    return found


def training(arguments, steps: int, rate: float, bf16: bool) -> distill.DistillSettings:
    """How a stage of so many steps trains."""
    return distill.DistillSettings(
        steps=steps, batch_size=arguments.batch_sequences, learning_rate=rate, warmup=config.DISTILL_WARMUP,
        weight_decay=config.DISTILL_WEIGHT_DECAY, bf16=bf16, validate_every=max(steps // 12, 5),
        checkpoint_every=max(min(steps // 12, 50), 5), seed=arguments.seed,
    )  # fmt: skip


def train(session: Session, sidecars: SidecarSettings, layers: list[int], folder: Path) -> list[dict]:
    """Run the stages asked for; returns the log's rows."""
    model, arguments = session.model, session.arguments
    train_windows, validation = sequences(session)
    choice, alone = arguments.bf16, arguments.one_layer_at_a_time == "yes"
    bf16 = distill.fast_bf16(model) if choice == "auto" else choice == "yes"
    if arguments.one_layer_at_a_time == "auto":
        alone = parameter_counts(model)["total"] >= LARGE_MODEL
    print(
        f"\ndistillation on {arguments.dataset}: {train_windows.size:,} tokens in {len(train_windows)} sequences, "
        f"frozen model in {'bfloat16 autocast' if bf16 else str(model.dtype).removeprefix('torch.')}, "
        f"validation on {validation.size:,} tokens of calibration text"
    )
    checkpoints = session.folder / "distillation-checkpoints"
    run = distill.Distillation(model, train_windows, validation, folder, checkpoints)
    rows = []
    if arguments.steps_a:
        stage = training(arguments, arguments.steps_a, arguments.lr_a, bf16)
        first = sorted({*resolve_layers(arguments.stage_a_layers, len(decoder_layers(model))), *layers})
        seconds, gigabytes = distill.estimate_stage_a(model, first, sidecars, train_windows, stage, alone)
        print(
            f"stage A: {len(first)} layers{', one at a time' if alone else ' together'}, {stage.steps} steps "
            f"of {arguments.batch_sequences} x {arguments.sequence_tokens} tokens\n"
            f"{memory_estimate(model, arguments.batch_sequences * arguments.sequence_tokens)}, training "
            f"{gigabytes:.2f} GB; time estimate {seconds / 60:.1f} min without validation",
            flush=True,
        )
        rows += distill.train_stage_a(run, first, sidecars, stage, one_at_a_time=alone)
    if arguments.steps_b:
        print(f"stage B: layers {layers} end to end, {arguments.steps_b} steps", flush=True)
        stage = training(arguments, arguments.steps_b, arguments.lr_b, bf16)
        rows += distill.train_stage_b(run, layers, stage)
    if arguments.steps_gate:
        best = "b" if set(layers) <= set(available_layers(folder, "b")) else "a"
        print(f"learned gate: layers {layers} before stage {best.upper()} sidecars, {arguments.steps_gate} steps")
        stage = training(arguments, arguments.steps_gate, arguments.lr_gate, bf16)
        rows += distill.train_learned_gate(run, layers, arguments.gate_share, stage, best)
    return rows


def recovery(session: Session, layers: list[int], folder: Path) -> list[dict]:
    """What the sidecars win back of these layers' attention, for each stage that has them all."""
    rows = []
    for stage in ("a", "b"):
        if not set(layers) <= set(available_layers(folder, stage)):
            continue
        documents = session.tokens["calibration"]
        got = measure_recovery(session.model, layers, documents, folder, stage, **session.windows)
        nats = {"nll_base": got.base, "nll_zeroed": got.zeroed, "nll_mamba": got.mamba, "recovered": got.recovered}
        rows.append({"stage": stage, "layers": layers} | nats | {"tokens": got.tokens})
        print(
            f"layers {layers} at alpha 1, stage {stage.upper()}: zeroing their attention costs "
            f"{got.zeroed - got.base:+.3f} nats per token, Mamba in its place {got.mamba - got.base:+.3f}: "
            f"{got.recovered:.0%} recovered ({got.tokens:,} tokens of calibration text)"
        )
    return rows


def main(arguments) -> None:
    """Check the hybrid layer, distil where no sidecars are there, and measure what they recover."""
    folder, distilling = choose_folder(arguments)
    geometry = SidecarSettings(
        arguments.d_state, arguments.d_conv, arguments.expand, arguments.headdim, init=arguments.init
    )
    session = open_session(arguments, {"calibration": arguments.recovery_documents})
    model, layers = session.model, session.layers()
    session.identity["fingerprint"] = base_fingerprint(model)
    loaded = not distilling and not arguments.checks_only
    if loaded:
        check_base(model, folder)
    print(
        f"{arguments.model}: {len(decoder_layers(model))} layers, {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device}; Mamba kernels: {mamba_kernels(model.device)}\n{memory_estimate(model, 4 * 96)}"
    )
    source = {"sidecar_dir": folder} if loaded and set(layers) <= set(available_layers(folder, "a")) else {}
    if source:
        cli.refuse(arguments, GEOMETRY, f"the sidecars in {folder} are loaded; --retrain makes them anew")
    print(f"checks on layers {layers} with {f'stage A sidecars of {folder}' if source else 'untrained sidecars'}")
    checks = run_checks(model, layers, session.tokens["calibration"][:8], geometry, seed=arguments.seed, **source)
    print(format_table(checks))
    rows = train(session, geometry, layers, folder) if distilling else []
    recovered = [] if arguments.checks_only else recovery(session, layers, folder)

    meta, kernels = session.meta(), mamba_kernels(model.device)
    content = {"kernels": kernels, "layers": layers, "checks": checks, "recovery": recovered}
    written = [results.write_json(session.folder / "sidecar_checks.json", content, meta)]
    if rows:
        written += [results.write_csv(session.folder / "distillation.csv", rows, meta), folder]
        shutil.rmtree(session.folder / "distillation-checkpoints", ignore_errors=True)
    if loaded:
        print(f"sidecars: {folder} (already distilled; --retrain makes them anew)")
    failed = [f"{check['check']} ({check['gate']})" for check in checks if check["passed"] is False]
    if failed:
        print(f"FAILED: {'; '.join(failed)} (see {written[0]})", file=sys.stderr)
        raise SystemExit(1)
    cli.say_written(written, "scripts/05_sweep_alpha.py")


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

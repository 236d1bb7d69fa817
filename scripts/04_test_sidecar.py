"""04: check the hybrid layer on the model at hand, then distil its Mamba-2 sidecars, or load those that are there.

Writes sidecar_checks.json (every promise of the hybrid layer with its measured value, and what the sidecars recover of
the target layers' attention) and, after training, distillation.csv and the folder sidecars/.
"""

import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

TRAINING_FLAGS = (
    "init", "d_state", "d_conv", "expand", "headdim", "sequence_tokens", "batch_sequences", "steps_a", "steps_b",
    "steps_gate", "lr_a", "lr_b", "lr_gate", "gate_share", "train_sequences", "validation_sequences",
    "one_layer_at_a_time", "bf16", "stage_a_layers",
)  # fmt: skip
FLAGS = (
    *cli.MODEL_FLAGS, *cli.RUN_FLAGS, "layers", "sidecar_dir", "retrain", "checks_only", "dataset",
    "recovery_documents", "window_tokens", *TRAINING_FLAGS,
)  # fmt: skip


def parse(argv: list[str] | None = None):
    """The command line."""
    arguments = cli.parse(__doc__, config, FLAGS, argv)
    if arguments.checks_only:
        cli.refuse(arguments, ["retrain"], "--checks-only distils nothing")
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

from src.base import results, text_data
from src.hybrid import distill
from src.hybrid.checkpoints import available_layers, base_fingerprint, check_base
from src.hybrid.checks import format_table, run_checks
from src.hybrid.sidecar import SidecarSettings, mamba_kernels
from src.hybrid.sidecar_sets import shipped_folder
from src.models.families import context_length, decoder_layers, memory_estimate, parameter_counts, resolve_layers
from src.models.loading import load_model, model_identity

# From this many parameters on, stage A trains one layer at a time (--one-layer-at-a-time auto).
LARGE_MODEL = 1_000_000_000


def use_bf16(choice: str, model) -> bool:
    """Whether to run the frozen model under bfloat16 autocast."""
    return distill.fast_bf16(model) if choice == "auto" else choice == "yes"


def choose_folder(arguments, run_folder: Path) -> tuple[Path, bool]:
    """(folder of the sidecars, whether to distil them): those there are loaded unless --retrain."""
    own, shipped = arguments.sidecar_dir or run_folder / "sidecars", shipped_folder(arguments.model)
    if arguments.retrain:
        return own, True
    for folder in (own,) if arguments.sidecar_dir else (own, shipped):
        if available_layers(folder, "a"):
            return folder, False
    return own, True


def windows(arguments, tokenizer):
    """(training windows, validation windows, identities of both texts)."""
    documents = {
        split: text_data.load_documents(arguments.dataset, split, arguments.seed) for split in ("train", "calibration")
    }
    tokens = {split: text_data.tokenize(texts, tokenizer) for split, texts in documents.items()}
    train = text_data.training_windows(
        tokens["train"], arguments.sequence_tokens, arguments.train_sequences, arguments.seed
    )
    count = arguments.validation_sequences
    validation = text_data.training_windows(tokens["calibration"], arguments.sequence_tokens, count, arguments.seed)
    return train, validation, {split: text_data.identity(texts) for split, texts in documents.items()}


def train(model, tokenizer, arguments, sidecars, layers, stage_a_layers, folder, run_folder) -> tuple[list[dict], dict]:
    """Run the stages asked for; returns the log's rows and the identities of the text."""
    train_windows, validation, data = windows(arguments, tokenizer)
    checkpoints = run_folder / "distillation-checkpoints"
    large = parameter_counts(model)["total"] >= LARGE_MODEL
    alone = arguments.one_layer_at_a_time == "yes" or (arguments.one_layer_at_a_time == "auto" and large)
    bf16 = use_bf16(arguments.bf16, model)

    def settings(steps, rate):
        return distill.DistillSettings(
            steps=steps,
            batch_size=arguments.batch_sequences,
            learning_rate=rate,
            warmup=config.DISTILL_WARMUP,
            weight_decay=config.DISTILL_WEIGHT_DECAY,
            bf16=bf16,
            validate_every=max(steps // 12, 5),
            checkpoint_every=max(min(steps // 12, 50), 5),
            seed=arguments.seed,
        )

    print(
        f"\ndistillation on {arguments.dataset}: {train_windows.size:,} tokens in {len(train_windows)} sequences, "
        f"frozen model in {'bfloat16 autocast' if bf16 else str(model.dtype).removeprefix('torch.')}, "
        f"validation on {validation.size:,} tokens of calibration text"
    )
    common = {"train": train_windows, "validation": validation, "folder": folder, "checkpoints": checkpoints}
    rows = []
    if arguments.steps_a:
        stage = settings(arguments.steps_a, arguments.lr_a)
        estimate = distill.estimate_stage_a(model, stage_a_layers, sidecars, train_windows, stage, alone)
        print(
            f"stage A: {len(stage_a_layers)} layers{', one at a time' if alone else ' together'}, {stage.steps} steps "
            f"of {arguments.batch_sequences} x {arguments.sequence_tokens} tokens\n"
            f"{memory_estimate(model, arguments.batch_sequences * arguments.sequence_tokens)}, training "
            f"{estimate.gigabytes:.2f} GB; time estimate {estimate.seconds / 60:.1f} min without validation",
            flush=True,
        )
        rows += distill.train_stage_a(model, stage_a_layers, sidecars, settings=stage, one_at_a_time=alone, **common)
    if arguments.steps_b:
        print(f"stage B: layers {layers} end to end, {arguments.steps_b} steps", flush=True)
        stage = settings(arguments.steps_b, arguments.lr_b)
        rows += distill.train_stage_b(model, layers, settings=stage, **common)
    if arguments.steps_gate:
        best = "b" if set(layers) <= set(available_layers(folder, "b")) else "a"
        print(
            f"learned gate: layers {layers} before stage {best.upper()} sidecars, {arguments.steps_gate} steps",
            flush=True,
        )
        stage = settings(arguments.steps_gate, arguments.lr_gate)
        rows += distill.train_learned_gate(model, layers, arguments.gate_share, settings=stage, stage=best, **common)
    return rows, data


def recovery(model, layers, documents, arguments, folder) -> list[dict]:
    """What the sidecars win back of these layers' attention, for each stage that has them all."""
    length = min(arguments.window_tokens, context_length(model))
    rows = []
    for stage in ("a", "b"):
        if not set(layers) <= set(available_layers(folder, stage)):
            continue
        batch = cli.setting(config, "EVAL_BATCH_SIZE", arguments.model, arguments.quick)
        got = distill.measure_recovery(model, layers, documents, folder, stage, length, length, batch)
        rows.append(
            {
                "stage": stage,
                "layers": layers,
                "nll_base": got.base,
                "nll_zeroed": got.zeroed,
                "nll_mamba": got.mamba,
                "recovered": got.recovered,
                "tokens": got.tokens,
            }
        )
        print(
            f"layers {layers} at alpha 1, stage {stage.upper()}: zeroing their attention costs "
            f"{got.zeroed - got.base:+.3f} nats per token, Mamba in its place {got.mamba - got.base:+.3f}: "
            f"{got.recovered:.0%} recovered ({got.tokens:,} tokens of calibration text)"
        )
    return rows


def main(arguments) -> None:
    """Check, distil or load, and measure what the sidecars recover."""
    started = time.time()
    sidecars = SidecarSettings(
        arguments.d_state, arguments.d_conv, arguments.expand, arguments.headdim, init=arguments.init
    )
    run_folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    model, tokenizer = load_model(
        arguments.model,
        arguments.device,
        arguments.dtype,
        cache_dir=arguments.cache_dir,
        max_memory_gb=arguments.max_memory_gb,
        use_8bit_fallback=arguments.use_8bit_fallback,
    )
    number = len(decoder_layers(model))
    layers = resolve_layers(arguments.layers, number)
    stage_a_layers = sorted({*resolve_layers(arguments.stage_a_layers, number), *layers})
    folder, distilling = choose_folder(arguments, run_folder)
    if arguments.checks_only:
        cli.refuse(arguments, TRAINING_FLAGS[5:], "--checks-only distils nothing")
    elif not distilling:
        cli.refuse(arguments, TRAINING_FLAGS, f"the sidecars in {folder} are loaded; --retrain distils them anew")
        check_base(model, folder)
    print(
        f"{arguments.model}: {number} layers, {str(model.dtype).removeprefix('torch.')} on {model.device}; "
        f"Mamba kernels: {mamba_kernels(model.device)}\n{memory_estimate(model, 4 * 96)}"
    )

    calibration = text_data.load_documents(
        arguments.dataset, "calibration", arguments.seed, arguments.recovery_documents
    )
    documents = text_data.tokenize(calibration, tokenizer, arguments.window_tokens)
    load = not distilling and not arguments.checks_only and set(layers) <= set(available_layers(folder, "a"))
    source = {"sidecar_dir": folder} if load else {}
    kind = f"stage A sidecars of {folder}" if load else "untrained sidecars"
    print(f"checks on layers {layers} with {kind}")
    checks = run_checks(model, layers, documents[:8], sidecars, seed=arguments.seed, **source)
    print(format_table(checks))

    rows, data = [], {"calibration": text_data.identity(calibration)}
    if distilling and not arguments.checks_only:
        rows, trained_on = train(model, tokenizer, arguments, sidecars, layers, stage_a_layers, folder, run_folder)
        data |= trained_on
    recovered = [] if arguments.checks_only else recovery(model, layers, documents, arguments, folder)

    meta = results.run_meta(
        cli.recorded(arguments),
        model_identity(model, arguments.model, arguments.cache_dir) | {"fingerprint": base_fingerprint(model)},
        data,
        {"sidecars": arguments.seed, "text": arguments.seed},
        started,
        model.device,
        model.dtype,
    )
    content = {"kernels": mamba_kernels(model.device), "layers": layers, "checks": checks, "recovery": recovered}
    written = [results.write_json(run_folder / "sidecar_checks.json", content, meta)]
    if rows:
        written.append(results.write_csv(run_folder / "distillation.csv", rows, meta))
        written.append(folder)
        shutil.rmtree(run_folder / "distillation-checkpoints", ignore_errors=True)
    if not rows and not arguments.checks_only:
        print(f"sidecars: {folder} (already distilled; --retrain makes them anew)")
    failed = [f"{check['check']} ({check['gate']})" for check in checks if check["passed"] is False]
    if failed:
        print(f"FAILED: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    cli.say_written(written, "scripts/05_sweep_alpha.py")


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

"""04: check the hybrid layer on the model at hand, then distil its Mamba-2 sidecars, or load those that are there.

Writes sidecar_checks.json (every promise of the hybrid layer with its measured value, and what the sidecars recover of
the target layers' attention) and, after training, distillation.csv and the folder sidecars/.
"""

import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import config
from src.base import results, text_data
from src.hybrid import distill
from src.hybrid.checkpoints import available_layers, base_fingerprint, check_base
from src.hybrid.checks import format_table, run_checks
from src.hybrid.sidecar import SidecarSettings, mamba_kernels
from src.models.families import context_length, decoder_layers, memory_estimate, parameter_counts, resolve_layers
from src.models.loading import load_model, model_identity

# From this many parameters on, stage A trains one layer at a time (--one-layer-at-a-time auto).
LARGE_MODEL = 1_000_000_000


def parse(argv: list[str]):
    quick = config.QUICK or "--quick" in argv
    steps = {"a": config.DISTILL_STEPS_A, "b": config.DISTILL_STEPS_B}
    if quick:
        steps = {stage: min(count, config.QUICK_DISTILL_STEPS) for stage, count in steps.items()}
    parser = results.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    add("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    add("--dtype", default=config.DTYPE, help="auto, float32, float16, bfloat16")
    add("--layers", default=config.TARGET_LAYERS, help="layers of stage B, the learned gate and the checks: 4,5,6 ...")
    add("--stage-a-layers", default="all", help="layers that get a stage A sidecar: all, middle, ..., or 4,5,6")
    add("--sidecar-dir", type=Path, help="sidecars to load or to make; default: the run's own, else the shipped ones")
    add("--retrain", action="store_true", help="distil anew (resumes an interrupted run with the same settings)")
    add("--checks-only", action="store_true", help="neither load nor distil sidecars: check untrained ones")
    add("--d-state", type=int, default=config.MAMBA_D_STATE, help="state width per head")
    add("--d-conv", type=int, default=config.MAMBA_D_CONV, help="tokens that the convolution sees")
    add("--expand", type=int, default=config.MAMBA_EXPAND, help="inner width / model width")
    add("--headdim", type=int, default=config.MAMBA_HEADDIM, help="width of a head")
    add("--init", default=config.MAMBA_INIT, help="random, or attention (from the layer's own projections)")
    add("--seq-len", type=int, default=128 if quick else config.DISTILL_SEQ_LEN, help="tokens per training sequence")
    add("--batch-size", type=int, default=config.DISTILL_BATCH_SIZE, help="sequences per step")
    add("--steps-a", type=int, default=steps["a"], help="optimiser steps per layer; 0 keeps the stage A that is there")
    add("--steps-b", type=int, default=steps["b"], help="optimiser steps, end to end; 0 leaves stage B out")
    add("--steps-gate", type=int, default=steps["b"] // 2, help="optimiser steps of the learned gate; 0 leaves it out")
    add("--lr-a", type=float, default=config.DISTILL_LR_A, help="peak learning rate of stage A")
    add("--lr-b", type=float, default=config.DISTILL_LR_B, help="peak learning rate of stage B")
    add("--lr-gate", type=float, default=5e-3, help="peak learning rate of the learned gate")
    add("--gate-share", type=float, default=0.5, help="mean Mamba share that the learned gate is trained for")
    add("--train-windows", type=int, default=64 if quick else config.DISTILL_TRAIN_WINDOWS, help="training sequences")
    add("--validation-windows", type=int, default=4 if quick else config.DISTILL_VALIDATION_WINDOWS)
    add("--one-layer-at-a-time", choices=("auto", "yes", "no"), default="auto", help="stage A with little memory")
    add(
        "--bf16",
        choices=("auto", "yes", "no"),
        default="auto",
        help="run the frozen float32 model in bfloat16 to train",
    )
    add("--dataset", default=config.EVAL_DATASET, help="text to train on: mixed, docs, ..., wikitext, or a file")
    add("--recovery-documents", type=int, default=4 if quick else 16, help="calibration documents behind the recovery")
    add("--max-seq-len", type=int, default=config.MAX_SEQ_LEN, help="tokens of a scoring window")
    add("--cache-dir", type=Path, default=config.MODEL_CACHE_DIR, help="where downloads are kept")
    add("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    add("--seed", type=int, default=config.SEED)
    add("--quick", action="store_true", default=quick, help="few steps, results in a folder of their own")
    arguments = parser.parse_args(argv)
    for name in ("steps_a", "steps_b", "steps_gate"):
        if getattr(arguments, name) < 0:
            raise results.UserError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must not be negative"
            )
    for name in ("train_windows", "validation_windows", "recovery_documents", "batch_size"):
        if getattr(arguments, name) < 1:
            raise results.UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    if not 0.0 < arguments.gate_share < 1.0:
        raise results.UserError(f"--gate-share is {arguments.gate_share}; it must lie inside (0, 1)")
    return arguments


def use_bf16(choice: str, model) -> bool:
    """Whether to run the frozen model under bfloat16 autocast."""
    return distill.fast_bf16(model) if choice == "auto" else choice == "yes"


def choose_folder(arguments, run_folder: Path) -> tuple[Path, bool]:
    """(folder of the sidecars, whether to distil them): those there are loaded unless --retrain."""
    own = arguments.sidecar_dir or run_folder / "sidecars"
    shipped = Path(config.__file__).parent / "assets" / f"{results.model_slug(arguments.model)}-sidecars"
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
    train = text_data.training_windows(tokens["train"], arguments.seq_len, arguments.train_windows, arguments.seed)
    count = arguments.validation_windows
    validation = text_data.training_windows(tokens["calibration"], arguments.seq_len, count, arguments.seed)
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
            batch_size=arguments.batch_size,
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
            f"of {arguments.batch_size} x {arguments.seq_len} tokens\n"
            f"{memory_estimate(model, arguments.batch_size * arguments.seq_len)}, training "
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
    length = min(arguments.max_seq_len, context_length(model))
    rows = []
    for stage in ("a", "b"):
        if not set(layers) <= set(available_layers(folder, stage)):
            continue
        got = distill.measure_recovery(model, layers, documents, folder, stage, length, length, config.EVAL_BATCH_SIZE)
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


def main() -> None:
    started = time.time()
    arguments = parse(sys.argv[1:])
    sidecars = SidecarSettings(
        arguments.d_state, arguments.d_conv, arguments.expand, arguments.headdim, init=arguments.init
    )
    run_folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    model, tokenizer = load_model(
        arguments.model,
        arguments.device,
        arguments.dtype,
        cache_dir=arguments.cache_dir,
        max_memory_gb=config.MAX_MEMORY_GB,
        use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )
    number = len(decoder_layers(model))
    layers = resolve_layers(arguments.layers, number)
    stage_a_layers = sorted({*resolve_layers(arguments.stage_a_layers, number), *layers})
    folder, distilling = choose_folder(arguments, run_folder)
    if not distilling and not arguments.checks_only:
        check_base(model, folder)
    print(
        f"{arguments.model}: {number} layers, {str(model.dtype).removeprefix('torch.')} on {model.device}; "
        f"Mamba kernels: {mamba_kernels(model.device)}\n{memory_estimate(model, 4 * 96)}"
    )

    calibration = text_data.load_documents(
        arguments.dataset, "calibration", arguments.seed, arguments.recovery_documents
    )
    documents = text_data.tokenize(calibration, tokenizer, arguments.max_seq_len)
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
        vars(arguments),
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
    print("\nwritten:\n  " + "\n  ".join(map(str, written)))
    if not rows and not arguments.checks_only:
        print(f"sidecars: {folder} (already distilled; --retrain makes them anew)")
    failed = [f"{check['check']} ({check['gate']})" for check in checks if check["passed"] is False]
    if failed:
        print(f"FAILED: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    print(f"next: python scripts/05_sweep_alpha.py --model {arguments.model}")


if __name__ == "__main__":
    results.run_main(main)

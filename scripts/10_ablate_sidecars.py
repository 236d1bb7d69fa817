"""10: how much of the answer is the sidecars'? Their initialisation, stages, state width and training tokens, ablated.

Trains sidecars anew with a smaller budget, equal for all variants, and writes ablation_init.csv, ablation_stages.csv,
ablation_d_state.csv, ablation_tokens.csv and distillation_curves.csv. An interrupted run goes on where it stopped."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = (*cli.SESSION_FLAGS, *cli.SCORING_FLAGS, "calibration_documents", "layers", "sidecar_dir", "stage", "signal",
    "mask_seeds", "resamples", "confidence_level", "d_state", "d_conv", "expand", "headdim", "sequence_tokens",
    "batch_sequences", "steps_a", "steps_b", "lr_a", "lr_b", "train_sequences", "validation_sequences",
)  # fmt: skip


def parse(argv: list[str] | None = None):
    """The command line; the budget is the ablations', which --quick leaves as it is."""
    steps = {"steps_a": "ABLATION_STEPS_A", "steps_b": "ABLATION_STEPS_B"}
    return cli.parse(__doc__, config, FLAGS, argv, settings=steps)


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

from src.base import results, text_data
from src.base.errors import UserError
from src.gating import ablations, modes, runs
from src.gating.rule import rule_of
from src.hybrid import distill
from src.hybrid.gates import RoutingGate
from src.hybrid.session import with_shorter_windows
from src.hybrid.sidecar import SidecarSettings


def training(arguments, model, rate: float) -> distill.DistillSettings:
    """How a stage trains; each variant has steps of its own."""
    return distill.DistillSettings(
        steps=1, batch_size=arguments.batch_sequences, learning_rate=rate, warmup=config.DISTILL_WARMUP,
        weight_decay=config.DISTILL_WEIGHT_DECAY, bf16=distill.fast_bf16(model), validate_every=10,
        checkpoint_every=10, seed=arguments.seed,
    )  # fmt: skip


def windows(study: runs.Study, split: str, count: int):
    """Token windows [count, T] of a whole split, its documents uncut."""
    arguments, session = study.session.arguments, study.session
    documents = text_data.load_documents(arguments.dataset, split, arguments.seed)
    length = min(arguments.sequence_tokens, session.windows["max_seq_len"])
    tokens = text_data.tokenize(documents, session.tokenizer)
    return text_data.training_windows(tokens, length, count, arguments.seed)


def run(arguments, window_tokens: int) -> None:
    """The ablations with windows of so many tokens."""
    study = runs.open_study(arguments, rule_of(config, arguments), window_tokens)
    model = study.model
    if modes.leader_of(model) != "routing":
        raise UserError(f"10 compares routing gates, and {model.config.model_type} has no router")
    sidecar = SidecarSettings(arguments.d_state, arguments.d_conv, arguments.expand, arguments.headdim)
    protocol = ablations.Protocol(
        training(arguments, model, arguments.lr_a), training(arguments, model, arguments.lr_b),
        windows(study, "train", arguments.train_sequences),
        windows(study, "calibration", arguments.validation_sequences),
        RoutingGate(study.rule.share, signal=arguments.signal, hard=True, seed=arguments.seed),
        study.session.folder / "ablations",
    )  # fmt: skip
    names = [
        name
        for name in ablations.DISTILLATION_ABLATIONS
        if name != "init" or getattr(model.config, "attention_type", "") != "mla"  # whose projections cannot be copied
    ]
    chosen = ablations.variants(model, study.layers, sidecar, arguments.steps_a, arguments.steps_b, names)
    trainings = {variant.folder: variant for variant in chosen}
    seconds, _ = distill.estimate_stage_a(model, study.layers, sidecar, protocol.train, protocol.stage_a)
    per_step = seconds / protocol.stage_a.steps
    steps = sum(variant.steps_a + 3 * variant.steps_b for variant in trainings.values())
    print(
        f"{len(trainings)} trainings for {len(chosen)} variants; time estimate, less what is there already: at most "
        f"{per_step * steps / 60:.0f} min of training (a step of stage B costs about three of stage A)",
        flush=True,
    )
    found = ablations.run_ablations(study, protocol, chosen)
    study.session.say_reused()
    meta, folder = study.meta(), study.session.folder
    written = [results.write_csv(folder / "distillation_curves.csv", found.pop("curves"), meta)]
    for name, table in found.items():
        written.append(results.write_csv(folder / f"ablation_{name}.csv", table, meta))
        for row in table.to_dict("records"):
            recovered, difference = f"{row['recovered']:.0%} recovered", f"{row['vs_random']:+.4f}"
            print(f"{name:>8} {row['variant']:>10}: {recovered}, gate minus random {difference} nats per token")
    cli.say_written(written, "open notebooks/visualize_routing.ipynb, which draws all results")


def main(arguments) -> None:
    """Run the ablations; after running out of GPU memory once more with shorter windows."""
    with_shorter_windows(lambda tokens: run(arguments, tokens), arguments)


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

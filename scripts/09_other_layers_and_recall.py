"""09: does 07's answer hold on other layers, and where is attention really needed? Layer sets and a recall suite.

Writes layer_set_results.csv (hard routing against random masks and its own decisions shuffled, on all layers, the
middle third, the first and the last half) and recall_results.csv (tasks that only the context answers, under each
gate). What an earlier run measured is taken from it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = cli.STUDY_FLAGS


def parse(argv: list[str] | None = None):
    """The command line; shares and temperatures other than the verdict's have no effect here."""
    arguments = cli.parse(__doc__, config, FLAGS, argv, defaults={"shares": [config.VERDICT_SHARE]})
    cli.refuse(
        arguments, ["shares", "temperatures"], f"09 compares gates at the verdict's share, {config.VERDICT_SHARE}"
    )
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import pandas as pd

from src.base import results
from src.gating import controls, modes, recall, runs, tables
from src.gating.rule import rule_of
from src.hybrid.session import print_plan, with_shorter_windows
from src.models.families import context_length

LAYER_SETS = ("all", "middle", "first_half", "last_half")


def layer_plans(study: runs.Study, arguments) -> dict[str, tuple]:
    """Name -> (sidecars of the main seed on these layers, what is measured with them)."""
    main, share = study.sets[0], config.VERDICT_SHARE
    chosen = modes.gate_modes(
        arguments, modes.leader_of(study.model), False, share, ("random", *controls.SHUFFLED_BLOCKS)
    )
    chosen = [mode for mode in chosen if mode.variant == ""]
    plans = {}
    for spec in LAYER_SETS:
        layers = modes.hybrid_layers(study.model, spec, arguments.signal)
        plans[spec] = runs.checked_sets({main.seed: main.folder}, layers, arguments.stage)[0], chosen
    return plans


def measure_layers(study: runs.Study, plans: dict[str, tuple]) -> pd.DataFrame:
    """layer_set_results.csv: the table of gates on every set of layers."""
    frames = []
    for spec, (sidecars, chosen) in plans.items():
        runs.add_baseline(study, spec)
        with runs.attached(study.model, sidecars):
            runs.measure_set(study, spec, sidecars, chosen)
        own = tables.run_table(study.rows, spec)
        frame = tables.result_table(own, tables.document_sums(own, study.tables), study.rule)
        frame.insert(0, "layers", spec)
        frame.insert(1, "stage", sidecars.stage)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def run(arguments, window_tokens: int) -> None:
    """Both comparisons with windows of so many tokens."""
    study = runs.open_study(arguments, rule_of(config, arguments), window_tokens)
    plans = layer_plans(study, arguments)
    lengths = [length for length in config.RECALL_LENGTHS if length <= context_length(study.model)]
    tasks = len(recall.TASKS) * config.RECALL_EXAMPLES * sum(lengths) * 8 / study.session.scored_tokens()
    study.session.active_experts()  # also what warms the model up before its speed is measured
    print_plan(study.session, runs.missing_passes(study, list(plans.values())) + round(tasks))
    frame = measure_layers(study, plans)
    rows = recall.recall_study(study, lengths, config.RECALL_EXAMPLES)
    study.session.say_reused()
    meta = study.meta(recall_examples=config.RECALL_EXAMPLES, recall_lengths=lengths)
    shown = frame[frame["kind"].isin(modes.LEADERS) & frame["hard"].astype(bool)]
    for row in shown.to_dict("records"):
        interval = f"[{row['vs_random_ci_low']:+.4f}, {row['vs_random_ci_high']:+.4f}]"
        print(
            f"{row['layers']:>10} layers: {row['mode']} minus random {row['vs_random']:+.4f} {interval} nats per token"
        )
    folder = study.session.folder
    written = [
        results.write_csv(folder / "layer_set_results.csv", frame, meta),
        results.write_csv(folder / "recall_results.csv", rows, meta),
    ]
    cli.say_written(written, "scripts/10_ablate_sidecars.py")


def main(arguments) -> None:
    """Run both; after running out of GPU memory once more with shorter windows."""
    with_shorter_windows(lambda tokens: run(arguments, tokens), arguments)


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

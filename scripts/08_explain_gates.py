"""08: why 07's answer is what it is: every control, each cell's sensitivity and the oracle it gives, and probes.

Writes explained_gates_results.csv, _documents, _pairs and _domains (07's tables with every control on every share, and
the oracle, hindsight and probes as controls), sensitivity_validation.csv, sensitivity_correlations.csv,
sensitivity_maps.json, probe_gap.csv, and ablation_signal, _softness and _threshold.csv, which are rows of the first
table. Hours on a CPU at full size; what 07 or an earlier run measured is taken from it."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

parse = partial(cli.parse, __doc__, config, cli.STUDY_FLAGS)  # the command line, of argv or of the process

if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import pandas as pd

from src.base import results
from src.base.errors import UserError
from src.gating import controls, explain, modes, probes, runs, sensitivity_tables, tables
from src.gating.rule import rule_of
from src.hybrid.session import print_plan, with_shorter_windows

# Controls that rank tokens by what is estimated here; the cells that matter least go to Mamba.
ESTIMATED = ("oracle", "hindsight", *(f"probe_{probe}" for probe in probes.PROBES))
BUDGET = explain.Budget(
    config.SENSITIVITY_SAMPLES, config.SENSITIVITY_VALIDATION_DOCUMENTS, config.SENSITIVITY_INTERVENTIONS,
    config.PROBE_DOCUMENTS, config.SENSITIVITY_RESAMPLES, config.SENSITIVITY_PERMUTATIONS,
    config.SENSITIVITY_MAP_TOKENS,
)  # fmt: skip
# Passes over a text that one label sequence of its sensitivity costs, for the time estimate.
PASSES_PER_SAMPLE = 1.5


def plan(study: runs.Study, arguments) -> list:
    """(set of sidecars, what is measured with it) for every set, the main one first."""
    recipes, plans = [*controls.CONTROLS, *ESTIMATED], []
    for sidecars in study.sets:
        chosen = modes.gate_modes(
            arguments, "routing", sidecars.has_learned_gates, config.VERDICT_SHARE, recipes, recipes, True
        )
        is_main = sidecars is study.sets[0]
        plans.append((sidecars, chosen if is_main else modes.further_modes(chosen, config.VERDICT_SHARE, True)))
    return plans


def say_plan(study: runs.Study, plans: list) -> None:
    """How long everything takes: passes of gates, and estimates and interventions as so many passes."""
    tokens = study.session.scored_tokens()
    chosen = study.session.tokens["calibration"][: BUDGET.validation_documents]
    validated = sum(len(document.ids) - 1 for document in chosen)
    estimated = len(study.sets) * tokens + study.session.scored_tokens("probes") + 2 * validated
    estimates = PASSES_PER_SAMPLE * BUDGET.samples * estimated / tokens
    interventions = BUDGET.interventions * validated / len(chosen) / tokens
    print_plan(study.session, round(runs.missing_passes(study, plans) + estimates + interventions))


def explain_main(study: runs.Study, chosen: list, estimator: str) -> tuple[runs.ScoresOf, list[dict], dict]:
    """Sensitivity and what follows from it, with the main set attached: (scores of controls, correlations, for gaps).

    The last has the sensitivity, the scores whose part of the oracle's gap is reported, and the maps.
    """
    main = study.sets[0]
    of_model = runs.base_scores(study)
    cells = explain.estimated(study, main, estimator, BUDGET)
    depends = explain.sensitivity_depends(study, main, estimator, BUDGET)
    rows = explain.correlations(study, cells, depends, of_model, BUDGET)
    routing = next(mode for mode in chosen if mode.gate.mode == "routing" and mode.share == study.rule.share)
    maps = explain.maps(study, cells, depends, routing, BUDGET.map_tokens)
    predicted, probes_depend = explain.probe_scores(study, estimator, BUDGET)
    own = {"oracle": cells, "hindsight": explain.hindsight(study, main)}
    own |= {f"probe_{probe}": found for probe, found in predicted.items()}
    study.scores_depend |= {"oracle": depends, "hindsight": {}}
    study.scores_depend |= {f"probe_{probe}": probes_depend | {"probe": probe} for probe in predicted}
    gates = {"routing_hard": explain.gate_scores(study, routing)}
    for mode in chosen:
        if mode.gate.mode == "learned" and mode.share == study.rule.share:
            gates["learned"] = explain.gate_scores(study, mode)

    def scores_of(recipe: str):
        return (own[recipe], False) if recipe in own else of_model(recipe)

    return scores_of, rows, {"cells": cells, "scores": predicted | gates, "maps": maps}


def measure(study: runs.Study, plans: list, estimator: str) -> tuple[list[dict], dict]:
    """Every run, set by set; (correlations, what the gaps are made of)."""
    runs.add_baseline(study)
    rows, found = [], {}
    for sidecars, chosen in plans:
        with runs.attached(study.model, sidecars):
            if sidecars is study.sets[0]:
                scores_of, rows, found = explain_main(study, chosen, estimator)
            else:
                cells = explain.estimated(study, sidecars, estimator, BUDGET)
                study.scores_depend["oracle"] = explain.sensitivity_depends(study, sidecars, estimator, BUDGET)
                scores_of = lambda _recipe, cells=cells: (cells, False)  # noqa: E731 (the oracle alone is asked for)
            runs.measure_set(study, runs.TARGET, sidecars, chosen, scores_of)
    return rows, found


def write(study: runs.Study, arguments, correlations: list[dict], found: dict, validation: list[dict]) -> list[Path]:
    """The result files; what follows from the sums is derived from them as they were written."""
    folder, rule = study.session.folder, study.rule
    meta = study.meta(budget=vars(BUDGET))  # its resamples are not those of the command line
    own = tables.run_table(study.rows, runs.TARGET)
    written = [
        results.write_csv(folder / "sensitivity_validation.csv", validation, meta),
        results.write_csv(folder / "sensitivity_correlations.csv", correlations, meta),
        results.write_json(folder / "sensitivity_maps.json", {"documents": found["maps"]}, meta),
        results.write_csv(folder / "explained_gates_documents.csv", tables.document_sums(own, study.tables), meta),
    ]
    sums = pd.read_csv(written[-1])
    frame = tables.result_table(own, sums, rule)
    main = sums[sums["sidecar_seed"] == study.sets[0].seed].groupby("mode", sort=False)
    gaps = probes.gap_rows(
        {mode: table.reset_index(drop=True) for mode, table in main}, found["cells"], found["scores"],
        arguments.shares, rule.resamples, rule.seed, rule.level,
    )  # fmt: skip
    written += [
        results.write_csv(folder / "explained_gates_results.csv", frame, meta),
        results.write_csv(folder / "explained_gates_pairs.csv", tables.pair_table(sums, frame, rule), meta),
        results.write_csv(folder / "explained_gates_domains.csv", tables.domain_table(sums, frame, rule), meta),
        results.write_csv(folder / "probe_gap.csv", gaps, meta),
    ]
    for name, table in tables.gate_ablation_rows(frame).items():
        written.append(results.write_csv(folder / f"ablation_{name}.csv", table, meta))
    return written


def run(arguments, window_tokens: int) -> None:
    """The explanation with windows of so many tokens."""
    study = runs.open_study(arguments, rule_of(config, arguments), window_tokens)
    if modes.leader_of(study.model) != "routing":
        raise UserError(f"08 explains routing gates, and {study.model.config.model_type} has no router")
    study.session.read("probes", "calibration", BUDGET.probe_documents)
    plans = plan(study, arguments)
    study.session.active_experts()  # also what warms the model up before its speed is measured
    say_plan(study, plans)
    validation = explain.validate(study, BUDGET)
    estimator = sensitivity_tables.choose_estimator(validation)
    print(f"sensitivity is estimated by {estimator}, whose masks cost least on calibration text", flush=True)
    correlations, found = measure(study, plans, estimator)
    study.session.say_reused()
    written = write(study, arguments, correlations, found, validation)
    cli.say_written(written, "scripts/09_other_layers_and_recall.py")


def main(arguments) -> None:
    """Run the explanation; after running out of GPU memory once more with shorter windows."""
    with_shorter_windows(lambda tokens: run(arguments, tokens), arguments)


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

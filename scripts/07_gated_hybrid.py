"""07: does router sparsity say, token by token, where attention is needed? Gates compared at equal mamba share.

Routing gates (hard, soft, temperatures, look-ahead, an uncalibrated threshold), a learned gate and fixed alphas at the
same mean shares, the rule's controls with exactly as many Mamba tokens per layer and document as the gate they are
matched to, on every set of sidecars there is, and the verdict by the rule in config.py. What an earlier run measured
with the same model, text, sidecars and gates is taken from it. 08 to 10 explain the answer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = (*cli.STUDY_FLAGS, "new_tokens")


def parse(argv: list[str] | None = None):
    """The command line."""
    return cli.parse(__doc__, config, FLAGS, argv)


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import numpy as np
import pandas as pd

from src.base import results
from src.gating import modes, runs, tables
from src.gating.rule import judge, rule_of
from src.hybrid.session import print_plan, with_shorter_windows

ROUTING_FLAGS = ("signal", "threshold", "temperatures")


def plan(study: runs.Study, arguments) -> list:
    """(set of sidecars, what is measured with it) for every set, the main one first."""
    leader = modes.leader_of(study.model)
    plans = []
    for sidecars in study.sets:
        chosen = modes.gate_modes(
            arguments, leader, sidecars.has_learned_gates, config.VERDICT_SHARE,
            config.GATE_CONTROLS if leader else ("random",),
        )  # fmt: skip
        is_main = sidecars is study.sets[0]
        plans.append((sidecars, chosen if is_main else modes.further_modes(chosen, config.VERDICT_SHARE, False)))
    return plans


def measure(study: runs.Study, plans: list, prompts: list[str]) -> dict[str, list[str]]:
    """Every run, set by set; returns the generations of the baseline and of the main set's gates."""
    texts = {"baseline": study.session.generate("texts of the baseline", {}, prompts)}
    runs.add_baseline(study)
    for sidecars, chosen in plans:
        is_main = sidecars is study.sets[0]
        with runs.attached(study.model, sidecars):
            texts |= runs.measure_set(
                study, runs.TARGET, sidecars, chosen, runs.base_scores(study), prompts if is_main else ()
            )
    return texts


def write(study: runs.Study, texts: dict, arguments, margin: float) -> tuple[list[Path], pd.DataFrame, dict]:
    """The result files; what follows from others is derived from them as they were written."""
    folder, meta, rule = study.session.folder, study.meta(), study.rule
    own = tables.run_table(study.rows, runs.TARGET)
    generations = {"max_new_tokens": arguments.new_tokens, "texts": texts}
    written = [
        results.write_csv(folder / "gated_hybrid_seeds.csv", own, meta),
        results.write_csv(folder / "gated_hybrid_seeds_documents.csv", tables.stacked(study.tables, "run"), meta),
        results.write_json(folder / "gated_hybrid_generations.json", generations, meta),
        results.write_csv(folder / "gated_hybrid_documents.csv", tables.document_sums(own, study.tables), meta),
    ]
    sums = pd.read_csv(written[-1])
    frame = tables.result_table(own, sums, rule)
    written.append(results.write_csv(folder / "gated_hybrid_results.csv", frame, meta))
    inputs = {
        "signal": arguments.signal, "layers": arguments.layers, "layer_indices": study.layers,
        "sidecar_seeds": [one.seed for one in study.sets], "random_seeds": study.mask_seeds,
        "margin": results.read_json(folder / "margin.json"),
    }  # fmt: skip
    answer = judge(sums, pd.read_csv(written[-1]), rule, margin, inputs, arguments.quick)
    written += [
        results.write_csv(folder / "gated_hybrid_pairs.csv", tables.pair_table(sums, frame, rule), meta),
        results.write_csv(folder / "gated_hybrid_domains.csv", tables.domain_table(sums, frame, rule), meta),
        results.write_json(folder / "verdict.json", answer, meta),
    ]
    return written, frame, answer


def print_summary(frame: pd.DataFrame, answer: dict, layers: list[int]) -> None:
    """The table of gates and the answer."""
    print(f"\nGates on layers {layers} (nats per token, intervals over documents and sets of sidecars)")
    head = f"{'mode':>33} {'sets':>4} {'share':>6} {'perplexity':>10} {'delta NLL':>9}"
    print(f"{head} {'minus random':>30} {'tok/s':>6}")
    for row in frame.to_dict("records"):
        against = ""
        if np.isfinite(row["vs_random"]):
            against = f"{row['vs_random']:+.4f} [{row['vs_random_ci_low']:+.4f}, {row['vs_random_ci_high']:+.4f}]"
        print(
            f"{row['mode']:>33} {row['sidecar_seeds']:>4} {row['share_realised']:>6.3f} {row['perplexity']:>10.3f} "
            f"{row['delta_nll']:>+9.4f} {against:>30} {row['tokens_per_second']:>6,.0f}"
        )
    criterion = answer["user_criterion"]
    print(f"\nAnswer ({answer['label']}): {answer['outcome'].upper()}. {answer['verdict']}")
    print(f"Does routing beat a fixed alpha at the same mean share? {criterion['words']}")
    print(f"Against the rule: {criterion['against_the_rule']}")


def run(arguments, window_tokens: int) -> None:
    """The comparison with windows of so many tokens."""
    study = runs.open_study(arguments, rule_of(config, arguments), window_tokens)
    leader = modes.leader_of(study.model)
    if leader != "routing":
        kind = study.model.config.model_type
        cli.refuse(arguments, ROUTING_FLAGS, f"{kind} has no router")
        instead = "FFN activation sparsity takes its place" if leader else "the routing rows are left out"
        print(f"{kind} has no router: {instead}")
    plans = plan(study, arguments)
    # Before anything is scored on the evaluation text, were it only to measure speed.
    share = config.VERDICT_SHARE if config.VERDICT_SHARE in arguments.shares else arguments.shares[0]
    margin, path = runs.frozen_margin(study, next(mode for mode in plans[0][1] if mode.share == share))
    print(f"margin of no interest: {margin:.5f} nats per token", flush=True)
    study.session.active_experts()  # also what warms the model up before its speed is measured
    print_plan(study.session, runs.missing_passes(study, plans))
    prompts = cli.setting(config, "TEST_PROMPTS", arguments.model, arguments.quick)
    texts = measure(study, plans, prompts)
    study.session.say_reused()
    written, frame, answer = write(study, texts, arguments, margin)
    print_summary(frame, answer, study.layers)
    cli.say_written([path, *written], "scripts/08_explain_gates.py")


def main(arguments) -> None:
    """Run the comparison; after running out of GPU memory once more with shorter windows."""
    with_shorter_windows(lambda tokens: run(arguments, tokens), arguments)


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

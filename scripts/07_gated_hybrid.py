"""Gates compared at equal mamba share: does router sparsity say, token by token, where attention is needed?

Routing gates (hard, soft, temperatures, look-ahead, an uncalibrated threshold), a learned gate and fixed alphas at the
same mean shares, and controls with exactly as many Mamba tokens per layer and document as the gate they are matched to,
on every set of sidecars there is. `--full` adds what explains the answer: every control, each token's sensitivity and
the oracle it gives, probes, other layers, recall tasks, ablations (hours on a CPU). All of it goes on where it was
interrupted. The rule behind rule.json is in config.py.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

import config
from src import eval_utils
from src.base import results, text_data
from src.gating import ablations, controls, explain, probes
from src.gating.rule import ROUTING, Rule, judge
from src.gating.runs import (
    Bench,
    Mode,
    add_baseline,
    attached,
    base_scores,
    checked_sets,
    document_sums,
    domain_table,
    gate_modes,
    mask_seeds_of,
    measure_set,
    pair_table,
    result_table,
    runs_of,
    with_controls,
)
from src.gating.tables import Bootstrap
from src.hybrid import distill, ledger, session, sidecar_sets
from src.hybrid.checkpoints import check_base
from src.hybrid.gates import RoutingGate
from src.hybrid.sidecar import SidecarSettings
from src.models.families import context_length, has_gated_mlp, has_router, resolve_layers
from src.models.loading import load_model, model_identity

PARTS = ("sensitivity", "probes", "layers", "recall", "ablations")
RUNS, RUN_DOCUMENTS = "gated_hybrid_seeds.csv", "gated_hybrid_seeds_documents.csv"
RESULTS, DOCUMENTS, DOMAINS = "gated_hybrid_results.csv", "gated_hybrid_documents.csv", "gated_hybrid_domains.csv"
PAIRS = "gated_hybrid_pairs.csv"
TARGET = "target"  # what runs on the layers asked for are filed under
GENERATIONS, VERDICT = "gated_hybrid_generations.json", "verdict.json"
# Settings of config.py that only the files of a full study depend on.
FULL_SETTINGS = (
    "SENSITIVITY_SAMPLES", "SENSITIVITY_VALIDATION_DOCUMENTS", "SENSITIVITY_INTERVENTIONS", "SENSITIVITY_RESAMPLES",
    "SENSITIVITY_PERMUTATIONS", "SENSITIVITY_MAP_TOKENS", "PROBE_DOCUMENTS", "RECALL_EXAMPLES", "ABLATION_STEPS_A",
    "ABLATION_STEPS_B", "DISTILL_LR_A", "DISTILL_LR_B", "DISTILL_SEQ_LEN", "DISTILL_BATCH_SIZE",
    "DISTILL_TRAIN_WINDOWS", "DISTILL_VALIDATION_WINDOWS",
)  # fmt: skip
NAMED_LAYERS = ("all", "middle", "first_half", "last_half")
# Settings that say where or whether to compute, not what: they are not part of a result's identity.
NOT_RECORDED = ("restart", "output_dir", "full", "parts")


def share_list(text: str) -> list[float]:
    """`0.25,0.5` -> [0.25, 0.5]. Raises ArgumentTypeError for shares outside (0, 1)."""
    return _numbers(text, "a share", lambda value: 0.0 < value < 1.0, "it must lie strictly between 0 and 1")


def temperature_list(text: str) -> list[float]:
    """`0.03,0.1` -> [0.03, 0.1]. Raises ArgumentTypeError for temperatures that are not positive."""
    return _numbers(text, "a temperature", lambda value: value > 0.0, "it must be positive")


def seed_list(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0,1,2") from None


def _numbers(text, what, allowed, rule):
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.25,0.5") from None
    for value in values:
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{what} of {value:g}: {rule}")
    return values


def parse(argv: list[str]) -> argparse.Namespace:
    quick = config.QUICK or "--quick" in argv
    parser = results.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16, bfloat16")
    parser.add_argument("--layers", default=config.TARGET_LAYERS, help="all, middle, first_half, last_half, or 4,5,6")
    parser.add_argument(
        "--shares", type=share_list, default=[config.VERDICT_SHARE] if quick else sorted(config.GATE_SHARES)
    )
    parser.add_argument(
        "--signal", choices=("previous", "lookahead"), default=config.GATE_SIGNAL, help="the routing gates' router"
    )
    parser.add_argument(
        "--threshold", type=float, default=config.SPARSITY_THRESHOLD, help="of routing_threshold, sparsity"
    )
    parser.add_argument(
        "--temperature", type=float, default=config.GATE_TEMPERATURE, help="of the soft gates, in sparsity"
    )
    parser.add_argument(
        "--temperatures", type=temperature_list, default=[0.03] if quick else config.GATE_TEMPERATURES,
        help="further ones, at the share of the verdict",
    )  # fmt: skip
    parser.add_argument(
        "--random-seeds",
        type=seed_list,
        default=[0] if quick else config.RANDOM_GATE_SEEDS,
        help="of masks drawn at random",
    )
    parser.add_argument("--sidecar-dir", help="distilled sidecars; default: the run's own (04), else the shipped ones")
    parser.add_argument(
        "--stage", choices=("auto", "a", "b"), default="auto", help="auto: b (end to end) where there is one"
    )
    parser.add_argument(
        "--dataset", default=config.EVAL_DATASET, help="mixed, docs, code, math, story, wikitext, or a file"
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=config.QUICK_EVAL_SAMPLES if quick else config.MAX_EVAL_SAMPLES,
        help="documents",
    )
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=config.QUICK_EVAL_SAMPLES if quick else config.CALIBRATION_SAMPLES,
        help="documents gates are set on",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=192 if quick else config.MAX_EVAL_DOCUMENT_TOKENS, help="of a document"
    )
    parser.add_argument("--max-seq-len", type=int, default=config.MAX_SEQ_LEN, help="tokens of a scoring window")
    parser.add_argument("--stride", type=int, default=config.EVAL_STRIDE, help="tokens between scoring windows")
    parser.add_argument("--batch-size", type=int, default=config.EVAL_BATCH_SIZE, help="windows per forward pass")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=config.QUICK_MAX_NEW_TOKENS if quick else config.MAX_NEW_TOKENS,
        help="generated per prompt",
    )
    parser.add_argument(
        "--resamples", type=int, default=config.BOOTSTRAP_RESAMPLES, help="bootstrap resamples of documents"
    )
    parser.add_argument("--seed", type=int, default=config.SEED)
    parser.add_argument(
        "--quick", action="store_true", default=quick, help="fewer documents and gates, a folder of its own"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="the whole study: every control, sensitivity, probes, layers, recall, ablations",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"of a full study, only these: {', '.join(PARTS)} (gates are always measured)",
    )  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="compute every row again")
    parser.add_argument("--output-dir", default=str(config.OUTPUT_DIR), help="root of all results")
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.threshold <= 1.0:
        parser.error(f"--threshold {arguments.threshold:g} lies outside [0, 1]: it is a sparsity")
    if not arguments.temperature > 0.0:
        parser.error(f"--temperature {arguments.temperature:g}: it must be positive")
    return arguments


def hybrid_layers(spec: str, num_layers: int, signal: str, leader: str | None) -> list[int]:
    """Layers of a TARGET_LAYERS setting; a named set starts at layer 1 where the gate reads the layer before."""
    layers = resolve_layers(spec, num_layers)
    reads_previous = leader == "ffn_sparsity" or (leader == "routing" and signal == "previous")
    if reads_previous and 0 in layers:
        if spec not in NAMED_LAYERS:
            raise results.UserError(
                "layer 0 has no layer before it: leave it out of --layers, or take --signal lookahead"
            )
        layers = layers[1:]
    return layers


def leader_of(model) -> str | None:
    """What a model's leading gate goes by: of LEADERS; None for one with neither router nor gated FFN."""
    if has_router(model):
        return "routing"
    return "ffn_sparsity" if has_gated_mlp(model) else None


def rule_of(arguments: argparse.Namespace) -> Rule:
    """The rule as config.py states it."""
    return Rule(
        share=config.VERDICT_SHARE, signal=config.VERDICT_SIGNAL, layers=config.VERDICT_LAYERS,
        sidecar_seeds=config.VERDICT_SIDECAR_SETS, documents=config.VERDICT_DOCUMENTS,
        margin_fraction=config.VERDICT_MARGIN, detectable_fraction=config.VERDICT_DETECTABLE,
        level=config.CONFIDENCE_LEVEL, resamples=arguments.resamples, seed=arguments.seed,
    )  # fmt: skip


def plan(arguments: argparse.Namespace, leader: str | None, learned: bool, extra: list[str]) -> list[Mode]:
    """The modes of the main set. extra: controls that a full study adds, with scores of their own."""
    names = [*controls.CONTROLS, *extra] if arguments.full else config.GATE_CONTROLS
    if leader != "routing":
        names = [name for name in names if name != "self_sparsity"]  # of a router
    return gate_modes(
        arguments.shares, arguments.signal, arguments.threshold, arguments.temperature, arguments.seed, leader,
        learned, config.VERDICT_SHARE, arguments.temperatures,
        main_controls=names if leader else ("random",),
        other_controls=names if leader and arguments.full else ("random",),
        shared_threshold=arguments.full,
    )  # fmt: skip


def other_modes(modes: list[Mode], full: bool) -> list[Mode]:
    """What the further sets of sidecars measure: at the rule's share hard routing against random and its own shuffled
    decisions, and fixed alpha; in a full study at every share, with the oracle, and the learned gate."""
    kept = ("random", *controls.SHUFFLED_BLOCKS) + ("oracle",) * full
    shares = [mode.share for mode in modes if mode.share is not None] if full else [config.VERDICT_SHARE]
    names = [f"{ROUTING}_{share:g}" for share in shares]
    chosen = [with_controls(mode, kept) for mode in modes if mode.name in names]
    plain = [f"fixed_{share:g}" for share in shares] + [f"learned_{config.VERDICT_SHARE:g}"] * full
    return chosen + [mode for mode in modes if mode.name in plain]


def generate(part: explain.Study, arguments: argparse.Namespace, modes: list[Mode]):
    """(texts by mode, what to call while a mode's gate is set): generations that are still to be made, none if done."""
    path = part.folder / GENERATIONS
    if part.is_finished(GENERATIONS):
        return json.loads(path.read_text(encoding="utf-8"))["texts"], {}
    prompts = config.TEST_PROMPTS[: config.QUICK_PROMPTS] if arguments.quick else config.TEST_PROMPTS
    options = dict(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    texts = {"baseline": eval_utils.generate_texts(part.bench.model, part.tokenizer, prompts, **options)}

    def visitor(name: str):
        def visit() -> None:
            texts[name] = eval_utils.generate_texts(part.bench.model, part.tokenizer, prompts, **options)

        return visit

    shown = ("routing_hard", "routing_soft", "fixed", "learned", "ffn_sparsity_hard", "ffn_sparsity_soft")
    names = [f"{kind}_{share:g}" for share in arguments.shares for kind in shown]
    return texts, {mode.name: visitor(mode.name) for mode in modes if mode.name in names}


def print_summary(frame: pd.DataFrame, answer: dict, layers: list[int]) -> None:
    """The table of gates and the answer."""
    print(f"\nGates on layers {layers} (nats per token, 95 % intervals over documents and sets of sidecars)")
    print(
        f"{'mode':>33} {'sets':>4} {'share':>6} {'perplexity':>10} {'delta NLL':>9} {'minus random':>30} {'tok/s':>6}"
    )
    for row in frame.to_dict("records"):
        against = ""
        if np.isfinite(row["vs_random"]):
            against = f"{row['vs_random']:+.4f} [{row['vs_random_ci_low']:+.4f}, {row['vs_random_ci_high']:+.4f}]"
        print(
            f"{row['mode']:>33} {row['sidecar_seeds']:>4} {row['share_realised']:>6.3f} {row['perplexity']:>10.3f} "
            f"{row['delta_nll']:>+9.4f} {against:>30} {row['tokens_per_second']:>6,.0f}"
        )
    print(f"\nAnswer ({answer['label']}): {answer['outcome'].upper()}. {answer['verdict']}")
    criterion = answer["user_criterion"]
    print(
        f"Does routing beat a fixed alpha at the same mean share? {criterion['words']}; {criterion['against_the_rule']}"
    )


def explain(part: explain.Study, arguments: argparse.Namespace, modes: list[Mode], pool: list):
    """The sensitivity of the evaluation text and what follows from it: (scores by control, cells, scores by gate).

    The last are those whose part of the oracle's gap is reported. None of it where --parts leaves it out; pool: the
    documents that probes are trained on. The main set must be attached.
    """
    main = part.sets[0]
    scores_of = base_scores(part.bench, part.layers, part.bench.model.config.vocab_size)
    if "sensitivity" not in arguments.parts:
        return scores_of, None, {}
    samples = config.SENSITIVITY_SAMPLES
    estimator = explain.chosen_estimator(part)
    cells = explain.estimated(part, main, estimator, samples)
    seen = explain.hindsight(part, main)
    explain.correlate(part, cells, scores_of, config.SENSITIVITY_RESAMPLES, config.SENSITIVITY_PERMUTATIONS)
    explain.write_maps(part, cells, config.SENSITIVITY_MAP_TOKENS)
    predicted = explain.probe_scores(part, pool, estimator, samples) if "probes" in arguments.parts else {}
    own = {"oracle": cells, "hindsight": seen} | {f"probe_{probe}": found for probe, found in predicted.items()}
    gates = {
        kind: explain.gate_scores(part, mode)
        for mode in modes
        for kind in (ROUTING, "learned")
        if predicted and mode.name == f"{kind}_{config.VERDICT_SHARE:g}"
    }
    # the cells that matter least go to Mamba
    return lambda name: (own[name], False) if name in own else scores_of(name), cells, predicted | gates


def measure(
    part: explain.Study, deep: explain.Study, arguments: argparse.Namespace, leader: str | None, pool: list
) -> pd.DataFrame:
    """Every run of the gates, set by set; then gated_hybrid_*.csv. Returns the results.

    deep: the same study with the settings of a full one in its meta, for the files that depend on them.
    """
    bench, name = part.bench, TARGET
    add_baseline(bench, name)
    texts, visit, predicted, cells = {}, {}, {}, None
    for sidecars in part.sets:
        is_main = sidecars is part.sets[0]
        extra = own_controls(arguments)
        modes = plan(arguments, leader, sidecars.has_learned_gates, extra)
        if is_main:
            texts, visit = generate(part, arguments, modes)
        else:
            modes = other_modes(modes, arguments.full)
        with attached(bench.model, sidecars):
            scores_of = None
            if is_main and arguments.full:
                scores_of, cells, predicted = explain(deep, arguments, modes, pool)
            elif is_main:
                scores_of = base_scores(bench, part.layers, bench.model.config.vocab_size)
            elif extra:
                estimator = explain.chosen_estimator(deep)
                own = explain.estimated(deep, sidecars, estimator, config.SENSITIVITY_SAMPLES)
                scores_of = lambda _name, own=own: (own, False)  # noqa: E731 (only the oracle is asked for)
            measure_set(bench, name, sidecars, modes, arguments.random_seeds, scores_of, visit if is_main else None)
    if visit:
        results.write_json(
            part.folder / GENERATIONS, {"max_new_tokens": arguments.max_new_tokens, "texts": texts}, part.meta
        )
    sums = document_sums(bench.store, name)
    part.write_csv(DOCUMENTS, sums)
    # read back: what follows must follow from the files
    sums = part.read_csv(DOCUMENTS)
    frame = result_table(bench.store, name, sums, part.rule)
    part.write_csv(RESULTS, frame)
    part.write_csv(PAIRS, pair_table(sums, frame, part.rule))
    part.write_csv(DOMAINS, domain_table(sums, frame, part.rule))
    if predicted:
        explain.write_gaps(deep, sums, cells, predicted, arguments.shares)
    return frame


def further_parts(part: explain.Study, arguments: argparse.Namespace, train_texts, extra_folder: Path) -> None:
    """Other layers, recall and ablations of a full study, as --parts asks."""
    main, model = part.sets[0], part.bench.model
    if "layers" in arguments.parts:
        named = {}
        for spec in NAMED_LAYERS:
            layers = hybrid_layers(spec, model.config.num_hidden_layers, part.rule.signal, "routing")
            named[spec] = checked_sets({main.seed: main.folder}, layers, arguments.stage)[0]
        share = config.VERDICT_SHARE
        modes = [
            with_controls(mode, ("random", *controls.SHUFFLED_BLOCKS))
            for mode in plan(arguments, "routing", False, [])
            if mode.name in (f"{ROUTING}_{share:g}", f"fixed_{share:g}", f"routing_soft_{share:g}")
        ]
        explain.layer_sets(part, named, modes, arguments.random_seeds)
    if "recall" in arguments.parts:
        lengths = [length for length in config.RECALL_LENGTHS if length <= context_length(model)]
        explain.recall_study(part, train_texts["evaluation"], lengths, config.RECALL_EXAMPLES, arguments.random_seeds)
    if "ablations" in arguments.parts:
        ablate(part, arguments, train_texts, extra_folder)
    for name, frame in ablations.gate_ablation_rows(part.read_csv(RESULTS), arguments.temperature).items():
        part.write_csv(f"ablation_{name}.csv", frame)


def ablate(part: explain.Study, arguments: argparse.Namespace, texts: dict, folder: Path) -> None:
    """ablation_init.csv ... and distillation_curves.csv: sidecars trained anew with a smaller, equal budget."""
    model = part.bench.model
    train = text_data.tokenize(texts["train"], part.tokenizer)
    validation = text_data.tokenize(texts["calibration"], part.tokenizer)
    seq_len = min(config.DISTILL_SEQ_LEN, part.bench.score["max_seq_len"])

    def settings(rate: float) -> distill.DistillSettings:
        return distill.DistillSettings(
            steps=1, batch_size=config.DISTILL_BATCH_SIZE, learning_rate=rate, warmup=config.DISTILL_WARMUP,
            weight_decay=config.DISTILL_WEIGHT_DECAY, bf16=distill.fast_bf16(model), validate_every=10,
            checkpoint_every=10, seed=arguments.seed,
        )  # fmt: skip

    gate = RoutingGate(part.rule.share, signal=part.rule.signal, hard=True, seed=arguments.seed)
    protocol = ablations.Protocol(
        part.layers, settings(config.DISTILL_LR_A), settings(config.DISTILL_LR_B),
        text_data.training_windows(train, seq_len, config.DISTILL_TRAIN_WINDOWS, arguments.seed),
        text_data.training_windows(validation, seq_len, config.DISTILL_VALIDATION_WINDOWS, arguments.seed),
        part.bench.calibration, part.bench.tokens, gate, arguments.random_seeds, *part.windows,
        part.bench.score["batch_size"],
        Bootstrap(arguments.resamples, arguments.seed, config.CONFIDENCE_LEVEL),
    )  # fmt: skip
    sidecar = SidecarSettings(config.MAMBA_D_STATE, config.MAMBA_D_CONV, config.MAMBA_EXPAND, config.MAMBA_HEADDIM)
    names = [name for name in ablations.DISTILLATION_ABLATIONS
             if name != "init" or getattr(model.config, "attention_type", "") != "mla"]  # fmt: skip
    chosen = ablations.variants(model, part.layers, sidecar, config.ABLATION_STEPS_A, config.ABLATION_STEPS_B, names)
    tables = ablations.run_ablations(model, protocol, chosen, folder, part.meta, arguments.restart)
    part.write_csv("distillation_curves.csv", tables.pop("curves"))
    for name, frame in tables.items():
        part.write_csv(f"ablation_{name}.csv", frame)


def run(arguments: argparse.Namespace, max_seq_len: int) -> None:
    started = time.time()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    shipped = Path(config.__file__).parent / "assets" / f"{results.model_slug(arguments.model)}-sidecars"
    texts = {
        "evaluation": text_data.load_documents(arguments.dataset, "evaluation", arguments.seed, arguments.max_samples),
        "calibration": text_data.load_documents(arguments.dataset, "calibration", arguments.seed),
    }
    documents = texts["evaluation"]
    calibration = texts["calibration"][: arguments.calibration_samples]
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=config.MODEL_CACHE_DIR,
        max_memory_gb=config.MAX_MEMORY_GB, use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )  # fmt: skip
    max_seq_len = min(max_seq_len, context_length(model))
    leader = leader_of(model)
    if arguments.full and leader != "routing":
        raise results.UserError(f"--full is about routing, and {model.config.model_type} has no router; leave it out")
    layers = hybrid_layers(arguments.layers, model.config.num_hidden_layers, arguments.signal, leader)
    main_folder = sidecar_sets.sidecar_folder(arguments.sidecar_dir, folder, shipped)
    sets = checked_sets(sidecar_sets.sidecar_sets(main_folder), layers, arguments.stage)
    for sidecars in sets:
        check_base(model, sidecars.folder)
    tokens = text_data.tokenize(documents, tokenizer, arguments.max_tokens)
    calibration_tokens = text_data.tokenize(calibration, tokenizer, arguments.max_tokens)

    recorded = {key: value for key, value in vars(arguments).items() if key not in NOT_RECORDED}
    meta = results.run_meta(
        recorded | {"max_seq_len": max_seq_len, "layers": layers, "layers_asked": arguments.layers},
        model_identity(model, arguments.model, config.MODEL_CACHE_DIR)
        | {"sidecars": [sidecar_sets.sidecar_identity(one.folder, one.stage) | {"seed": one.seed} for one in sets]},
        {"evaluation": text_data.identity(documents), "calibration": text_data.identity(calibration)},
        {"seed": arguments.seed, "random_gate": arguments.random_seeds},
        started,
        eval_utils.model_device(model),
        model.dtype,
    )
    score = dict(max_seq_len=max_seq_len, stride=min(arguments.stride, max_seq_len), batch_size=arguments.batch_size)
    store = results.ResultStore(folder / RUNS, folder / RUN_DOCUMENTS, "run", meta, arguments.restart)
    total = sum(len(document.ids) - 1 for document in tokens)
    print(f"model {arguments.model}, layers {layers}; sidecars of seeds {[one.seed for one in sets]} in {main_folder}")
    print(f"text {arguments.dataset}: {len(documents)} documents, {total:,} scored tokens")
    print(f"gates are calibrated on {len(calibration)} other documents, and the margin is taken from them")
    if store.resumed:
        print(f"resumed: {len(store.resumed)} runs are there already")
    if len(sets) < config.VERDICT_SIDECAR_SETS:
        print(
            f"the rule asks for {config.VERDICT_SIDECAR_SETS} sets of sidecars; to add one: python "
            f"scripts/04_test_sidecar.py --model {arguments.model} --retrain --seed 1 --steps-gate 0 "
            f"--stage-a-layers {arguments.layers} --layers {arguments.layers} --sidecar-dir {main_folder / 'seed_1'}"
        )
    if not sets[0].has_learned_gates:
        print(f"no learned gate in {main_folder}: its rows are left out (04_test_sidecar.py --retrain trains it)")
    if leader != "routing":
        instead = "FFN activation sparsity takes its place" if leader else "the routing rows are left out"
        print(f"{model.config.model_type} has no router: {instead}")

    bench = Bench(model, tokens, calibration_tokens, score, [], store)
    part = explain.Study(bench, sets, folder, meta, rule_of(arguments), tokenizer, arguments.restart)
    # before anything is scored on the evaluation text, were it only to measure speed
    share = config.VERDICT_SHARE if config.VERDICT_SHARE in arguments.shares else arguments.shares[0]
    first = next(mode for mode in plan(arguments, leader, False, []) if mode.share == share)
    margin = explain.frozen_margin(part, first, arguments.random_seeds)
    print(f"margin of no interest: {margin:.5f} nats per token", flush=True)
    missing = missing_runs(part, arguments, leader)
    if missing or (arguments.full and "layers" in arguments.parts):  # other layers' runs may be missing still
        sample = ledger.speed_sample(tokens)
        bench.active = ledger.active_experts(model, sample, max_seq_len, arguments.batch_size)  # also the warm-up
    if missing:
        speed = ledger.measure(model, sample, **score)["tokens_per_second"]
        session.print_plan(model, total, missing, 0.5 * speed, arguments.batch_size * max_seq_len)
    settings = {name: getattr(config, name) for name in FULL_SETTINGS}
    deep = replace(part, meta=meta | {"arguments": meta["arguments"] | settings})
    pool = []
    if arguments.full and "sensitivity" in arguments.parts:
        pool = text_data.tokenize(texts["calibration"][: config.PROBE_DOCUMENTS], tokenizer, arguments.max_tokens)
        explain.choose_estimator(
            deep, config.SENSITIVITY_VALIDATION_DOCUMENTS, config.SENSITIVITY_INTERVENTIONS, config.SENSITIVITY_SAMPLES
        )
    frame = measure(part, deep, arguments, leader, pool)
    inputs = {
        "signal": arguments.signal, "layers": arguments.layers, "layer_indices": layers,
        "sidecar_seeds": [one.seed for one in sets], "random_seeds": arguments.random_seeds,
        "margin": json.loads((folder / "margin.json").read_text(encoding="utf-8")),
    }  # fmt: skip
    answer = judge(part.read_csv(DOCUMENTS), part.read_csv(RESULTS), part.rule, margin, inputs, arguments.quick)
    results.write_json(folder / VERDICT, answer, meta)
    print_summary(frame, answer, layers)
    if arguments.full:
        texts["train"] = text_data.load_documents(arguments.dataset, "train", arguments.seed)
        further_parts(deep, arguments, texts, folder / "ablations")
    written = sorted(path.name for path in folder.iterdir() if results.meta_path(path).exists() and is_own(path, meta))
    print(f"\nWrote in {folder}: " + ", ".join(written))
    print("Next: open notebooks/visualize_routing.ipynb, which draws all results")


def missing_runs(part: explain.Study, arguments: argparse.Namespace, leader: str | None) -> int:
    """Runs of the gates and controls of all sets that are still to be made: passes over the evaluation text."""
    count = 0 if part.bench.has(TARGET, "baseline", 0) else 1
    for sidecars in part.sets:
        modes = plan(arguments, leader, sidecars.has_learned_gates, own_controls(arguments))
        for mode in modes if sidecars is part.sets[0] else other_modes(modes, arguments.full):
            runs = runs_of(mode, mask_seeds_of(sidecars, arguments.random_seeds))
            count += sum(not part.bench.has(TARGET, row, sidecars.seed, seed) for _, row, seed in runs)
    return count


def own_controls(arguments: argparse.Namespace) -> list[str]:
    """The controls of a full study that rank tokens by what this study estimates."""
    if not arguments.full or "sensitivity" not in arguments.parts:
        return []
    return ["oracle", "hindsight"] + [f"probe_{probe}" for probe in probes.PROBES if "probes" in arguments.parts]


def is_own(path: Path, meta: dict) -> bool:
    """Whether this run, or one with the same settings, wrote a file."""
    written = json.loads(results.meta_path(path).read_text(encoding="utf-8")).get("arguments", {})
    return meta["arguments"].items() <= written.items()


def main(argv: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    session.retry_shorter(lambda tokens: run(arguments, tokens), arguments.max_seq_len, config.OOM_SEQ_LEN_FALLBACK)


if __name__ == "__main__":
    results.run_main(main)

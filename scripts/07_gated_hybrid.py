"""Gates compared at equal mamba share: does router sparsity say, token by token, where attention is needed?

Routing gates (hard, soft, temperatures, look-ahead, an uncalibrated threshold), a learned gate, fixed alphas at the
same mean shares, and random controls with exactly as many Mamba tokens per layer and document as the routing gate that
they are matched to. Writes gated_hybrid_results.csv, gated_hybrid_seeds.csv (controls, per seed),
gated_hybrid_documents.csv (sums per document), gated_hybrid_generations.json and verdict.json. Finished rows stay.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import nn

import config
from src import eval_utils, results, study, text_data
from src.gates import FixedGate, LearnedGate, MaskGate, RoutingGate, is_hard, matched_random_masks
from src.mamba_sidecar import (
    attach_mamba_sidecar,
    attachment_of,
    bypass_sidecars,
    calibrate_gates,
    check_base,
    detach_mamba_sidecars,
    load_learned_gates,
    record_gates,
    set_gate,
)
from src.model_loading import context_length, has_router, load_model, model_identity, resolve_layers

LABEL = "preliminary: one sidecar seed, random control only"
# The pre-stated rule: this share, this signal, hard routing against the random control.
PRIMARY_SHARE = 0.5
COLUMNS = (
    "gate", "signal", "uses_document", "share_target", "share_realised", "perplexity", "delta", "pct_change",
    "delta_nll", "ci_low", "ci_high", "vs_random", "vs_random_ci_low", "vs_random_ci_high", "flops_ideal",
    "flops_executed", "tokens_per_second", "memory_gb",
)  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """One row to come: its name, its gate before calibration, and the control that it is compared with."""

    name: str
    gate: FixedGate | RoutingGate | LearnedGate
    share: float | None  # target; None for the uncalibrated threshold
    calibrate: bool
    control: str | None
    generates: bool = True


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
    parser.add_argument("--shares", type=share_list, default=[PRIMARY_SHARE] if quick else sorted(config.GATE_SHARES))
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
        "--random-seeds", type=seed_list, default=[0] if quick else config.RANDOM_GATE_SEEDS, help="of the controls"
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
    parser.add_argument("--restart", action="store_true", help="compute every row again")
    parser.add_argument("--output-dir", default=str(config.OUTPUT_DIR), help="root of all results")
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.threshold <= 1.0:
        parser.error(f"--threshold {arguments.threshold:g} lies outside [0, 1]: it is a sparsity")
    if not arguments.temperature > 0.0:
        parser.error(f"--temperature {arguments.temperature:g}: it must be positive")
    return arguments


def hybrid_layers(spec: str, num_layers: int, signal: str, router: bool) -> list[int]:
    """Layers of a TARGET_LAYERS setting; a named set starts at layer 1 where the gate reads the layer before."""
    layers = resolve_layers(spec, num_layers)
    named = isinstance(spec, str) and spec in ("all", "middle", "first_half", "last_half")
    if router and signal == "previous" and 0 in layers:
        if not named:
            raise results.UserError(
                "layer 0 has no layer before it: leave it out of --layers, or take --signal lookahead"
            )
        layers = layers[1:]
    return layers


def plan_modes(arguments: argparse.Namespace, router: bool, learned: bool) -> list[Mode]:
    """Every row but baseline and controls, in order; routing_hard of a share leads: its control is matched to it."""
    shared = {"signal": arguments.signal, "threshold": arguments.threshold, "seed": arguments.seed}
    modes = []
    for share in arguments.shares:
        control = f"control_random_{share:g}"
        if router:
            hard = RoutingGate(share, hard=True, **shared)
            modes.append(Mode(f"routing_hard_{share:g}", hard, share, True, control))
        modes.append(Mode(f"fixed_{share:g}", FixedGate(share), share, False, control))
        if router:
            soft = RoutingGate(share, temperature=arguments.temperature, **shared)
            modes.append(Mode(f"routing_soft_{share:g}", soft, share, True, control))
        if learned:
            gate = LearnedGate(share, hard=True, seed=arguments.seed)
            modes.append(Mode(f"learned_{share:g}", gate, share, True, control))
    if router:
        share = PRIMARY_SHARE if PRIMARY_SHARE in arguments.shares else arguments.shares[0]
        control = f"control_random_{share:g}"
        for temperature in arguments.temperatures:
            if temperature != arguments.temperature:
                gate = RoutingGate(share, temperature=temperature, **shared)
                modes.append(Mode(f"routing_soft_{share:g}_t{temperature:g}", gate, share, True, control, False))
        other = "lookahead" if arguments.signal == "previous" else "previous"
        gate = RoutingGate(share, signal=other, hard=True, threshold=arguments.threshold, seed=arguments.seed)
        if other == "lookahead":  # the other way round, layer 0 may be among the layers
            modes.append(Mode(f"routing_hard_{share:g}_{other}", gate, share, True, control, False))
        modes.append(Mode("routing_threshold", RoutingGate(hard=True, **shared), None, False, None, False))
    return modes


@dataclass
class Bench:
    """What every row is measured with: the model (with or without sidecars), the text, and where rows go."""

    model: nn.Module
    tokens: list[text_data.TokenDocument]
    score: dict
    active: list[float]
    store: study.ResultStore
    seeds: study.ResultStore
    bootstrap: study.Bootstrap

    def add_baseline(self) -> None:
        """The model without sidecars."""
        table, speed = self._score("baseline", None)
        settings = {"gate": "none", "signal": "none", "uses_document": False, "share_target": 0.0}
        self.add_row("baseline", table, settings, None, False, speed, None)

    def score_gate(self, label: str):
        """(sums per document, GateRecord, timing columns) of the gate that is set."""
        with record_gates(self.model) as record:
            table, speed = self._score(label, attachment_of(self.model).on_batch)
        return table, record, speed

    def add_control(self, name: str, target: float, shares: dict, random_seeds: list[int]) -> None:
        """The random control with as many Mamba tokens per document and layer as `shares`, mean over seeds."""
        tables, realised, speeds = [], [], []
        for seed in random_seeds:
            set_gate(self.model, MaskGate(matched_random_masks(shares, seed)))
            table, record, speed = self.score_gate(f"{name}, seed {seed}")
            tables.append(table)
            realised.append(record.layer_shares())
            speeds.append(speed)
            values = study.quality(table, self.store.tables["baseline"], self.bootstrap)
            kept = ("perplexity", "delta", "pct_change", "delta_nll", "ci_low", "ci_high")
            row = {"mode": name, "seed": seed, "share_realised": record.mean_share()}
            self.seeds.add(f"{name}_seed{seed}", table, row | {key: values[key] for key in kept})
        settings = {"gate": "random", "signal": "none", "uses_document": True, "share_target": target}
        means = {layer: float(np.mean([one[layer] for one in realised])) for layer in realised[0]}
        self.add_row(name, study.mean_table(tables), settings, means, True, speeds[0], None)

    def add_row(self, name, table, settings, shares, hard, speed, control) -> None:
        """Derive a row and store it.

        shares: {layer: realised mamba share}, None for the baseline. control: the sums of the random control at the
        same share, None where there is none to compare with.
        """
        values = study.quality(table, self.store.tables.get("baseline", table), self.bootstrap) | settings | speed
        values["share_realised"] = float(np.mean(list(shares.values()))) if shares else 0.0
        lengths = [len(document.ids) - 1 for document in self.tokens]
        values |= study.flops_columns(self.model, lengths, self.active, shares, hard)
        if control is not None:
            difference = self.bootstrap.difference(table, control)
            values |= {
                "vs_random": difference.estimate,
                "vs_random_ci_low": difference.low,
                "vs_random_ci_high": difference.high,
            }
        self.store.add(name, table, {column: values.get(column, float("nan")) for column in COLUMNS})

    def _score(self, label, on_batch):
        device = eval_utils.model_device(self.model)
        eval_utils.reset_peak_memory(device)
        scores = eval_utils.score_documents(self.model, self.tokens, on_batch=on_batch, progress=label, **self.score)
        speed = {"tokens_per_second": scores.tokens_per_second, "memory_gb": eval_utils.peak_memory_gb(device)}
        return study.document_table(scores), speed


def words_of(interval) -> str:
    return f"{interval.estimate:+.5f} nats per token [{interval.low:+.5f}, {interval.high:+.5f}]"


def decide(interval) -> str:
    """supported | refuted | inconclusive: where a 95 % interval of (gate minus control) lies; below 0 is better."""
    if interval.high < 0:
        return "supported"
    return "refuted" if interval.low > 0 else "inconclusive"


def judge(
    store: study.ResultStore, arguments: argparse.Namespace, layers: list[int], bootstrap: study.Bootstrap
) -> dict:
    """The content of verdict.json, from the tables of sums per document."""
    mode, control, fixed = (f"{kind}_{PRIMARY_SHARE:g}" for kind in ("routing_hard", "control_random", "fixed"))
    rule = (
        f"On the target layers, hard routing by the router's sparsity (signal previous, {mode}) is compared with a "
        f"random hard gate that sends exactly as many tokens of every document and layer to Mamba ({control}, mean of "
        "its seeds). "
        f"Difference = NLL per token of {mode} minus {control}, 95 % interval from a paired bootstrap over documents. "
        "Supported if the interval lies below 0, refuted if it lies above 0, else inconclusive."
    )
    criterion = {
        "statement": "A routing-gated hybrid should beat (lower perplexity) a fixed alpha at the same mean share.",
        "comparisons": [],
        "met": None,
        "words": "not measured: this run has no routing gate at the share of a fixed alpha",
    }
    verdict = {
        "label": LABEL + ("; quick run: a smoke test, no evidence" if arguments.quick else ""),
        "rule": rule,
        "inputs": {
            "mode": mode, "control": control, "share": PRIMARY_SHARE, "signal": arguments.signal, "layers": layers,
            "random_seeds": arguments.random_seeds, "resamples": bootstrap.resamples, "level": bootstrap.level,
            "documents": len(store.tables["baseline"]), "tokens": int(store.tables["baseline"]["tokens"].sum()),
        },
        "numbers": {},
        "outcome": "not applicable",
        "verdict": "",
        "user_criterion": criterion,
    }  # fmt: skip
    if mode in store.rows and control in store.rows and arguments.signal == "previous":
        tables = store.tables
        difference = bootstrap.difference(tables[mode], tables[control])
        cost = bootstrap.difference(tables[control], tables["baseline"])
        own = bootstrap.difference(tables[mode], tables["baseline"])
        verdict["outcome"] = decide(difference)
        verdict["numbers"] = {
            "difference": difference.estimate, "ci_low": difference.low, "ci_high": difference.high,
            "delta_nll_routing": own.estimate, "delta_nll_control": cost.estimate,
            "share_realised_routing": store.rows[mode]["share_realised"],
            "share_realised_control": store.rows[control]["share_realised"],
        }  # fmt: skip
        meaning = {
            "supported": "router sparsity picks tokens that need attention less than chance would",
            "refuted": "router sparsity picks tokens worse than chance would",
            "inconclusive": "the data cannot tell it from chance",
        }[verdict["outcome"]]
        verdict["verdict"] = (
            f"Routing minus random is {words_of(difference)}: {meaning}. For scale, the random control costs "
            f"{cost.estimate:+.5f} nats per token against the baseline, the routing gate {own.estimate:+.5f}."
        )
    elif arguments.signal != "previous":
        verdict["verdict"] = f"The rule is about signal previous; this run has signal {arguments.signal}."
    else:
        verdict["verdict"] = f"The rule needs the rows {mode} and {control}; this run has not both of them."
    for name in store.rows:
        base = f"fixed_{name.split('_')[-1]}"
        if name.startswith(("routing_hard_", "routing_soft_")) and base in store.rows:
            difference = bootstrap.difference(store.tables[name], store.tables[base])
            criterion["comparisons"].append(
                {
                    "routing": name, "fixed": base,
                    "perplexity_routing": store.rows[name]["perplexity"],
                    "perplexity_fixed": store.rows[base]["perplexity"],
                    "share_realised_routing": store.rows[name]["share_realised"],
                    "share_realised_fixed": store.rows[base]["share_realised"],
                    "difference_nll": difference.estimate, "ci_low": difference.low, "ci_high": difference.high,
                    "met": {"supported": "yes", "refuted": "no", "inconclusive": "undecided"}[decide(difference)],
                }
            )  # fmt: skip
    pairs = [pair for pair in criterion["comparisons"] if pair["fixed"] == fixed] or criterion["comparisons"]
    if pairs:
        criterion["met"] = {pair["routing"]: pair["met"] for pair in criterion["comparisons"]}
        criterion["words"] = "; ".join(
            f"{pair['routing']} has perplexity {pair['perplexity_routing']:.3f}, {pair['fixed']} "
            f"{pair['perplexity_fixed']:.3f} (difference {pair['difference_nll']:+.5f} nats per token "
            f"[{pair['ci_low']:+.5f}, {pair['ci_high']:+.5f}]): {pair['met']}"
            for pair in pairs
        )
    return verdict


def print_summary(rows: list[dict], verdict: dict, layers: list[int]) -> None:
    print(f"\nGates on layers {layers} (nats per token, 95 % intervals over documents)")
    print(
        f"{'mode':>27} {'share':>6} {'perplexity':>11} {'delta NLL':>10} {'minus random, same share':>36} {'tok/s':>7}"
    )
    for row in rows:
        against = ""
        if np.isfinite(row["vs_random"]):
            against = f"{row['vs_random']:+.5f} [{row['vs_random_ci_low']:+.5f}, {row['vs_random_ci_high']:+.5f}]"
        print(
            f"{row['mode']:>27} {row['share_realised']:>6.3f} {row['perplexity']:>11.3f} {row['delta_nll']:>+10.5f} "
            f"{against:>36} {row['tokens_per_second']:>7,.0f}"
        )
    print(f"\nAnswer ({verdict['label']}): {verdict['outcome'].upper()}. {verdict['verdict']}")
    print(f"Does routing beat a fixed alpha at the same mean share? {verdict['user_criterion']['words']}")


def run(arguments: argparse.Namespace, max_seq_len: int) -> None:
    started = time.time()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    shipped = Path(config.__file__).parent / "assets" / f"{results.model_slug(arguments.model)}-sidecars"
    documents = text_data.load_documents(arguments.dataset, "evaluation", arguments.seed, arguments.max_samples)
    calibration = text_data.load_documents(
        arguments.dataset, "calibration", arguments.seed, arguments.calibration_samples
    )
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=config.MODEL_CACHE_DIR,
        max_memory_gb=config.MAX_MEMORY_GB, use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )  # fmt: skip
    max_seq_len = min(max_seq_len, context_length(model))
    router = has_router(model)
    layers = hybrid_layers(arguments.layers, model.config.num_hidden_layers, arguments.signal, router)
    sidecars = study.sidecar_folder(arguments.sidecar_dir, folder, shipped)
    stage = study.choose_stage(sidecars, layers, arguments.stage)
    check_base(model, sidecars)
    tokens = text_data.tokenize(documents, tokenizer, arguments.max_tokens)
    calibration_tokens = text_data.tokenize(calibration, tokenizer, arguments.max_tokens)
    lengths = [len(document.ids) - 1 for document in tokens]

    recorded = {key: value for key, value in vars(arguments).items() if key not in ("restart", "output_dir")}
    meta = results.run_meta(
        recorded | {"max_seq_len": max_seq_len, "layers": layers},
        model_identity(model, arguments.model, config.MODEL_CACHE_DIR)
        | {"sidecars": study.sidecar_identity(sidecars, stage)},
        {"evaluation": text_data.identity(documents), "calibration": text_data.identity(calibration)},
        {"seed": arguments.seed, "random_gate": arguments.random_seeds},
        started,
        eval_utils.model_device(model),
        model.dtype,
    )
    bootstrap = study.Bootstrap(arguments.resamples, arguments.seed, config.CONFIDENCE_LEVEL)
    store = study.ResultStore(
        folder / "gated_hybrid_results.csv", folder / "gated_hybrid_documents.csv", "mode", meta, arguments.restart
    )
    seeds = study.ResultStore(
        folder / "gated_hybrid_seeds.csv", folder / "gated_hybrid_seeds_documents.csv", "run", meta, arguments.restart
    )
    prompts = config.TEST_PROMPTS[: config.QUICK_PROMPTS] if arguments.quick else config.TEST_PROMPTS
    generations_path, verdict_path = folder / "gated_hybrid_generations.json", folder / "verdict.json"
    score = dict(max_seq_len=max_seq_len, stride=min(arguments.stride, max_seq_len), batch_size=arguments.batch_size)
    sample = study.speed_sample(tokens)
    print(f"model {arguments.model}, layers {layers}, stage {stage.upper()} sidecars of {sidecars}")
    print(f"text {arguments.dataset}: {len(documents)} documents, {sum(lengths):,} scored tokens")
    calibration_total = sum(len(document.ids) - 1 for document in calibration_tokens)
    print(f"gates are calibrated on {len(calibration)} other documents, {calibration_total:,} tokens")
    if store.resumed:
        print(f"resumed: {len(store.resumed)} rows are there already")

    learned = (sidecars / "learned_gate.safetensors").is_file()
    if not learned:
        print(f"no learned gate in {sidecars}: the learned rows are left out (04_test_sidecar.py --retrain trains it)")
    if not router:
        print(f"{model.config.model_type} has no router: the routing rows are left out")
    modes = plan_modes(arguments, router, learned)
    generated = not arguments.restart and study.is_finished(generations_path, meta)
    complete = generated and all(name in store.rows for name in ("baseline", *(mode.name for mode in modes)))

    if not complete:
        active = study.active_experts(model, sample, max_seq_len, arguments.batch_size)  # also the warm-up
        bench = Bench(model, tokens, score, active, store, seeds, bootstrap)
        speed = study.measure(model, sample, **score)["tokens_per_second"]
        passes = 1 + len(modes) + len(arguments.random_seeds) * len(arguments.shares) + router
        study.print_plan(model, sum(lengths), passes, 0.5 * speed, arguments.batch_size * max_seq_len)
        if "baseline" not in store.rows:
            bench.add_baseline()
        attach_mamba_sidecar(model, layers, gate_mode="fixed", sidecar_dir=sidecars, stage=stage)
        if learned:
            load_learned_gates(model, sidecars)
        generate = dict(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
        texts = {}
        if not generated:
            with bypass_sidecars(model):
                texts["baseline"] = eval_utils.generate_texts(model, tokenizer, prompts, **generate)
        # The control of a share is matched to the routing gate, or on a model without router to the fixed alpha.
        leader = "routing_hard" if router else "fixed"
        for mode in modes:
            writes_text = not generated and mode.generates
            if mode.name in store.rows and not writes_text:
                continue
            gate = mode.gate
            if mode.calibrate:
                label = f"calibrating {mode.name}"
                gate = calibrate_gates(
                    model, gate, calibration_tokens, max_seq_len, arguments.batch_size, progress=label
                )
            set_gate(model, gate)
            if writes_text:
                texts[mode.name] = eval_utils.generate_texts(model, tokenizer, prompts, **generate)
            if mode.name in store.rows:
                continue
            table, record, speed = bench.score_gate(mode.name)
            control = mode.control
            if control is None:  # a control of its own, named by the share that the uncalibrated threshold realised
                control = f"control_random_{record.mean_share():.4f}"
                if control not in store.rows:
                    bench.add_control(control, record.mean_share(), record.shares, arguments.random_seeds[:1])
            elif mode.name == control.replace("control_random", leader) and control not in store.rows:
                bench.add_control(control, mode.share, record.shares, arguments.random_seeds)
            settings = {
                "gate": gate.mode,
                "signal": getattr(gate, "signal", "none"),
                "uses_document": False,
                "share_target": float("nan") if mode.share is None else mode.share,
            }
            bench.add_row(
                mode.name, table, settings, record.layer_shares(), is_hard(gate), speed, store.tables[control]
            )
        detach_mamba_sidecars(model)
        if not generated:
            written_texts = {"prompts": prompts, "max_new_tokens": arguments.max_new_tokens, "texts": texts}
            results.write_json(generations_path, written_texts, meta)

    verdict = judge(store, arguments, layers, bootstrap)
    results.write_json(verdict_path, verdict, meta)
    store.write()
    seeds.write()
    print_summary(list(store.rows.values()), verdict, layers)
    written = (store.path, seeds.path, store.documents_path, seeds.documents_path, generations_path, verdict_path)
    print(f"\nWrote in {folder}: " + ", ".join(path.name for path in written))
    print("Next: open notebooks/visualize_routing.ipynb, which draws all results")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    study.retry_shorter(lambda tokens: run(arguments, tokens), arguments.max_seq_len, config.OOM_SEQ_LEN_FALLBACK)


if __name__ == "__main__":
    results.run_main(main)

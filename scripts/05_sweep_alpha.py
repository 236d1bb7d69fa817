"""Alpha sweep: the same mamba share for every token of the target layers, from attention only (0) to Mamba only (1).

Writes alpha_sweep_results.csv (a baseline row, then one row per alpha), alpha_sweep_untrained.csv (the same with
sidecars that were never distilled: the control), alpha_sweep_domains.csv, alpha_sweep_documents.csv (sums per document)
and alpha_sweep_generations.json. Rows that an earlier run with the same arguments, model and text wrote are kept.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

import config
from src import eval_utils
from src.base import results, text_data
from src.gating.tables import Bootstrap, document_table, quality
from src.hybrid import ledger, session, sidecar_sets
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.checkpoints import check_base
from src.hybrid.layer import attachment_of, base_logits, set_all_alphas
from src.models.families import context_length, resolve_layers
from src.models.loading import load_model, model_identity

# Host memory for the baseline's logits, so that the KL of every row need not compute them again.
REFERENCE_CACHE_GB = 1.0
COLUMNS = (
    "perplexity", "delta_nll", "ci_low", "ci_high", "bits_per_byte", "kl", "top1_agreement", "tokens_per_second",
    "decode_tokens_per_second", "memory_gb", "flops_ideal", "flops_executed",
)  # fmt: skip


def alpha_list(text: str) -> list[float]:
    """`0,0.3,1` -> [0.0, 0.3, 1.0], rising, without repeats. Raises ArgumentTypeError for what lies outside [0, 1]."""
    try:
        alphas = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,0.3,1") from None
    for alpha in alphas:
        if not 0.0 <= alpha <= 1.0:
            raise argparse.ArgumentTypeError(
                f"alpha {alpha:g} lies outside [0, 1] (0 = attention only, 1 = Mamba only)"
            )
    return alphas


def alpha_name(alpha: float) -> str:
    """0.3 -> "0.3", 1.0 -> "1": a plain decimal, never an exponent."""
    return np.format_float_positional(alpha, trim="-")


def parse(argv: list[str]) -> argparse.Namespace:
    quick = config.QUICK or "--quick" in argv
    parser = results.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16, bfloat16")
    parser.add_argument("--alphas", type=alpha_list, default=[0.0, 0.3, 1.0] if quick else sorted(config.ALPHA_SWEEP))
    parser.add_argument("--layers", default=config.TARGET_LAYERS, help="all, middle, first_half, last_half, or 4,5,6")
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
        "--quick", action="store_true", default=quick, help="fewer documents and alphas, a folder of its own"
    )
    parser.add_argument("--restart", action="store_true", help="compute every row again")
    parser.add_argument("--output-dir", default=str(config.OUTPUT_DIR), help="root of all results")
    return parser.parse_args(argv)


def cached_reference(model, limit_gb: float):
    """reference(input_ids, attention_mask) -> the base model's logits [B, T, V].

    Kept up to `limit_gb`: the batches of every alpha are the same.
    """
    kept, room = {}, limit_gb * 1e9

    def reference(input_ids, attention_mask):
        nonlocal room
        key = (tuple(input_ids.shape), input_ids.cpu().numpy().tobytes())
        if key in kept:
            return kept[key].to(input_ids.device)
        logits = base_logits(model, input_ids, attention_mask)
        size = logits.numel() * logits.element_size()
        if size <= room:
            room -= size
            kept[key] = logits.cpu()
        return logits

    return reference


def row_of(table: pd.DataFrame, baseline: pd.DataFrame, bootstrap: Bootstrap, speed: dict, flops: dict) -> dict:
    row = quality(table, baseline, bootstrap)
    if table is baseline:
        row |= {"kl": 0.0, "top1_agreement": 1.0}  # of a model with itself
    row |= speed | flops
    return {column: row.get(column, float("nan")) for column in COLUMNS}


def domain_rows(store: results.ResultStore, bootstrap: Bootstrap) -> list[dict]:
    """One row per domain and alpha; intervals over sections of one work are named as such."""
    rows = []
    baseline = store.tables["baseline"]
    for domain in sorted(baseline["domain"].unique()):
        base = baseline[baseline["domain"] == domain].reset_index(drop=True)
        interval = "within one work" if domain in text_data.ONE_WORK_DOMAINS else "documents"
        for name in store.rows:
            table = store.tables[name]
            table = base if name == "baseline" else table[table["domain"] == domain].reset_index(drop=True)
            values = quality(table, base, bootstrap)
            kept = ("perplexity", "delta_nll", "ci_low", "ci_high", "bits_per_byte")
            counts = {"documents": len(table), "tokens": int(table["tokens"].sum())}
            row = {"domain": domain, "alpha": name} | {key: values[key] for key in kept}
            rows.append(row | counts | {"interval": interval})
    return rows


def print_summary(rows: list[dict], untrained: list[dict], layers: list[int]) -> None:
    control = {row["alpha"]: row for row in untrained}
    print(f"\nAlpha sweep on layers {layers} (delta NLL in nats per token, 95 % intervals over documents)")
    print(
        f"{'alpha':>9} {'perplexity':>11} {'delta NLL':>10} {'interval':>20} {'KL':>8} {'tok/s':>8} {'untrained':>10}"
    )
    for row in rows:
        interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        other = f"{control[row['alpha']]['delta_nll']:+.4f}" if row["alpha"] in control else ""
        print(
            f"{row['alpha']:>9} {row['perplexity']:>11.3f} {row['delta_nll']:>+10.4f} {interval:>20} "
            f"{row['kl']:>8.4f} {row['tokens_per_second']:>8,.0f} {other:>10}"
        )
    last = rows[-1]
    print(
        f"Answer: at alpha {last['alpha']} the Mamba path costs {last['delta_nll']:+.4f} nats per token "
        f"({100 * (np.exp(last['delta_nll']) - 1):+.1f} % perplexity); never distilled, it costs "
        f"{control[last['alpha']]['delta_nll']:+.4f}."
    )


def run(arguments: argparse.Namespace, max_seq_len: int) -> None:
    started = time.time()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    shipped = Path(config.__file__).parent / "assets" / f"{results.model_slug(arguments.model)}-sidecars"
    documents = text_data.load_documents(arguments.dataset, "evaluation", arguments.seed, arguments.max_samples)
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=config.MODEL_CACHE_DIR,
        max_memory_gb=config.MAX_MEMORY_GB, use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )  # fmt: skip
    max_seq_len = min(max_seq_len, context_length(model))
    layers = resolve_layers(arguments.layers, model.config.num_hidden_layers)
    sidecars = sidecar_sets.sidecar_folder(arguments.sidecar_dir, folder, shipped)
    stage = sidecar_sets.choose_stage(sidecars, layers, arguments.stage)
    check_base(model, sidecars)
    tokens = text_data.tokenize(documents, tokenizer, arguments.max_tokens)
    lengths = [len(document.ids) - 1 for document in tokens]
    stride = min(arguments.stride, max_seq_len)

    recorded = {key: value for key, value in vars(arguments).items() if key not in ("restart", "output_dir")}
    identity = model_identity(model, arguments.model, config.MODEL_CACHE_DIR)
    meta = results.run_meta(
        recorded | {"max_seq_len": max_seq_len, "layers": layers},
        identity | {"sidecars": sidecar_sets.sidecar_identity(sidecars, stage)},
        text_data.identity(documents),
        {"seed": arguments.seed},
        started,
        eval_utils.model_device(model),
        model.dtype,
    )
    bootstrap = Bootstrap(arguments.resamples, arguments.seed, config.CONFIDENCE_LEVEL)
    store = results.ResultStore(
        folder / "alpha_sweep_results.csv", folder / "alpha_sweep_documents.csv", "alpha", meta, arguments.restart
    )
    control = results.ResultStore(
        folder / "alpha_sweep_untrained.csv",
        folder / "alpha_sweep_untrained_documents.csv",
        "alpha",
        meta,
        arguments.restart,
    )
    names = [alpha_name(alpha) for alpha in arguments.alphas]
    prompts = config.TEST_PROMPTS[: config.QUICK_PROMPTS] if arguments.quick else config.TEST_PROMPTS
    generations_path = folder / "alpha_sweep_generations.json"
    complete = all(name in s.rows for s in (store, control) for name in ("baseline", *names))
    complete = complete and results.is_finished(generations_path, meta) and not arguments.restart
    print(f"model {arguments.model}, layers {layers}, stage {stage.upper()} sidecars of {sidecars}")
    print(f"text {arguments.dataset}: {len(documents)} documents, {sum(lengths):,} scored tokens")
    if store.resumed or control.resumed:
        print(f"resumed: {len(store.resumed)} rows and {len(control.resumed)} control rows are there already")
    score = dict(max_seq_len=max_seq_len, stride=stride, batch_size=arguments.batch_size)
    sample = ledger.speed_sample(tokens)

    generations = {}
    if not complete:
        active = ledger.active_experts(model, sample, max_seq_len, arguments.batch_size)  # also the warm-up
        speed = {"baseline": ledger.measure(model, sample, **score)}
        passes = 2 + 2 * len(names)
        session.print_plan(
            model, sum(lengths), passes, 0.7 * speed["baseline"]["tokens_per_second"],
            arguments.batch_size * max_seq_len, REFERENCE_CACHE_GB,
        )  # fmt: skip
        speed["baseline"]["decode_tokens_per_second"] = eval_utils.decode_speed(model, repeats=2)
        if "baseline" not in store.rows:
            table = document_table(eval_utils.score_documents(model, tokens, progress="baseline", **score))
            flops = ledger.flops_columns(model, lengths, active)
            store.add("baseline", table, row_of(table, table, bootstrap, speed["baseline"], flops))
        if "baseline" not in control.rows:
            table = store.tables["baseline"]
            control.add("baseline", table, dict(store.rows["baseline"]))
        generate = dict(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
        generations["baseline"] = eval_utils.generate_texts(model, tokenizer, prompts, **generate)

        attach_mamba_sidecar(model, layers, gate_mode="fixed", sidecar_dir=sidecars, stage=stage)
        # Speed and memory of all rows first: the reference's logits, kept below, would count as memory of a row.
        for alpha, name in zip(arguments.alphas, names, strict=True):
            set_all_alphas(model, alpha)
            if name not in store.rows:
                speed[name] = ledger.measure(model, sample, **score)
                speed[name]["decode_tokens_per_second"] = eval_utils.decode_speed(model, repeats=2)
            generations[name] = eval_utils.generate_texts(model, tokenizer, prompts, **generate)
        reference = cached_reference(model, REFERENCE_CACHE_GB)

        def sweep(target: results.ResultStore, label: str, speeds: dict) -> None:
            baseline = store.tables["baseline"]
            for alpha, name in zip(arguments.alphas, names, strict=True):
                if name in target.rows:
                    continue
                if target is control and alpha == 0.0:
                    table = store.tables[name]  # no sidecar runs at alpha 0, trained or not
                else:
                    set_all_alphas(model, alpha)
                    scores = eval_utils.score_documents(
                        model,
                        tokens,
                        reference=reference,
                        on_batch=attachment_of(model).on_batch,
                        progress=f"{label} {name}",
                        **score,
                    )
                    table = document_table(scores)
                flops = ledger.flops_columns(model, lengths, active, dict.fromkeys(layers, alpha))
                target.add(name, table, row_of(table, baseline, bootstrap, speeds.get(name, {}), flops))

        sweep(store, "alpha", speed)
        settings = attachment_of(model).settings
        detach_mamba_sidecars(model)
        # Speed and memory do not depend on the weights: the control's columns stay empty.
        attach_mamba_sidecar(model, layers, gate_mode="fixed", settings=settings, seed=arguments.seed)
        sweep(control, "untrained", {})
        detach_mamba_sidecars(model)
        results.write_json(
            generations_path,
            {"prompts": prompts, "max_new_tokens": arguments.max_new_tokens, "texts": generations},
            meta,
        )

    def order(row):
        return -1.0 if row["alpha"] == "baseline" else float(row["alpha"])

    for target in (store, control):
        target.write(order)
    results.write_csv(folder / "alpha_sweep_domains.csv", domain_rows(store, bootstrap), meta)
    print_summary(sorted(store.rows.values(), key=order), list(control.rows.values()), layers)
    written = (
        store.path, control.path, folder / "alpha_sweep_domains.csv", store.documents_path, control.documents_path,
        generations_path,
    )  # fmt: skip
    print(f"\nWrote in {folder}: " + ", ".join(path.name for path in written))
    quick = " --quick" if arguments.quick else ""
    print(f"Next: python scripts/06_replace_layer.py --model {arguments.model}{quick}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    session.retry_shorter(lambda tokens: run(arguments, tokens), arguments.max_seq_len, config.OOM_SEQ_LEN_FALLBACK)


if __name__ == "__main__":
    results.run_main(main)

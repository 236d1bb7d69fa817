"""Layer replacement: which layers' attention can a Mamba-2 sidecar stand in for, alone and together?

Every layer alone at alpha 1 with its stage A sidecar (one in memory at a time), ranked; then the k safest together.
Which layers are safest is decided on calibration text, what they cost is reported on evaluation text. Writes
layer_replacement_results.csv, layer_replacement_calibration.csv and the sums per document of both. Finished rows stay.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from src import eval_utils
from src.base import results, text_data
from src.gating.tables import Bootstrap, document_table, quality
from src.hybrid import session, sidecar_sets
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.checkpoints import available_layers, check_base
from src.hybrid.layer import attachment_of
from src.models.families import context_length, decoder_layers, resolve_layers
from src.models.loading import load_model, model_identity

COLUMNS = ("perplexity", "delta", "pct_change", "delta_nll", "ci_low", "ci_high")
SPLITS = ("calibration", "evaluation")


def count_list(text: str) -> list[int]:
    """`2,4` -> [2, 4]. Raises ArgumentTypeError for what is not a list of whole numbers from 2 on."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 2,4") from None
    if counts[0] < 2:
        raise argparse.ArgumentTypeError(f"{counts[0]} layers together: a combination has at least 2")
    return counts


def parse(argv: list[str]) -> argparse.Namespace:
    quick = config.QUICK or "--quick" in argv
    parser = results.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16, bfloat16")
    parser.add_argument("--layers", default="all", help="layers to try: all, middle, first_half, last_half, or 4,5,6")
    parser.add_argument(
        "--together", type=count_list, default=[2, 4] if quick else [2, 4, 6, 8], help="how many of the safest"
    )
    parser.add_argument("--sidecar-dir", help="distilled sidecars; default: the run's own (04), else the shipped ones")
    parser.add_argument(
        "--dataset", default=config.EVAL_DATASET, help="mixed, docs, code, math, story, wikitext, or a file"
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=config.QUICK_EVAL_SAMPLES if quick else config.LAYER_EVAL_SAMPLES,
        help="evaluation documents",
    )
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=config.QUICK_EVAL_SAMPLES if quick else config.CALIBRATION_SAMPLES,
        help="documents to choose on",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128 if quick else config.MAX_EVAL_DOCUMENT_TOKENS, help="of a document"
    )
    parser.add_argument("--max-seq-len", type=int, default=config.MAX_SEQ_LEN, help="tokens of a scoring window")
    parser.add_argument("--stride", type=int, default=config.EVAL_STRIDE, help="tokens between scoring windows")
    parser.add_argument("--batch-size", type=int, default=config.EVAL_BATCH_SIZE, help="windows per forward pass")
    parser.add_argument(
        "--resamples", type=int, default=config.BOOTSTRAP_RESAMPLES, help="bootstrap resamples of documents"
    )
    parser.add_argument("--seed", type=int, default=config.SEED)
    parser.add_argument("--quick", action="store_true", default=quick, help="fewer documents, a folder of its own")
    parser.add_argument("--restart", action="store_true", help="compute every row again")
    parser.add_argument("--output-dir", default=str(config.OUTPUT_DIR), help="root of all results")
    return parser.parse_args(argv)


def combined_name(layers: list[int]) -> str:
    return f"combined_[{','.join(map(str, sorted(layers)))}]"


def print_summary(singles: list[dict], combined: list[dict], ranking: list[str]) -> None:
    print("\nLayer replacement at alpha 1 (delta NLL in nats per token, 95 % intervals over documents)")
    print(f"{'layer':>28} {'perplexity':>11} {'change':>9} {'delta NLL':>10} {'interval':>20} {'chosen as':>10}")
    for row in [*singles, *combined]:
        interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        rank = ranking.index(row["layer"]) + 1 if row["layer"] in ranking else ""
        print(
            f"{row['layer']:>28} {row['perplexity']:>11.3f} {row['pct_change']:>+8.2f}% {row['delta_nll']:>+10.4f} "
            f"{interval:>20} {rank:>10}"
        )
    safest, dearest = singles[0], singles[-1]
    print(
        f"Answer: layer {safest['layer']} is the cheapest to replace ({safest['delta_nll']:+.4f} nats per token), "
        f"layer {dearest['layer']} the dearest ({dearest['delta_nll']:+.4f})."
    )
    for row in combined:
        alone = sum(single["delta_nll"] for single in singles if single["layer"] in row["layer"][10:-1].split(","))
        print(f"  {row['layer']} together {row['delta_nll']:+.4f}; the sum of them alone {alone:+.4f}.")


def run(arguments: argparse.Namespace, max_seq_len: int) -> None:
    started = time.time()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    shipped = Path(config.__file__).parent / "assets" / f"{results.model_slug(arguments.model)}-sidecars"
    counts = {"calibration": arguments.calibration_samples, "evaluation": arguments.max_samples}
    documents = {
        split: text_data.load_documents(arguments.dataset, split, arguments.seed, counts[split]) for split in SPLITS
    }
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=config.MODEL_CACHE_DIR,
        max_memory_gb=config.MAX_MEMORY_GB, use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )  # fmt: skip
    max_seq_len = min(max_seq_len, context_length(model))
    sidecars = sidecar_sets.sidecar_folder(arguments.sidecar_dir, folder, shipped)
    num_layers = len(decoder_layers(model))
    there = available_layers(sidecars, "a")
    layers = resolve_layers(arguments.layers, num_layers)
    if arguments.layers == "all" and set(there) < set(layers):
        print(f"only layers {there} have a stage A sidecar in {sidecars}; the others are left out")
        layers = there
    sidecar_sets.choose_stage(sidecars, layers, "a")
    check_base(model, sidecars)
    together = [count for count in arguments.together if count <= len(layers)]
    tokens = {split: text_data.tokenize(documents[split], tokenizer, arguments.max_tokens) for split in SPLITS}
    totals = {split: sum(len(document.ids) - 1 for document in tokens[split]) for split in SPLITS}

    recorded = {key: value for key, value in vars(arguments).items() if key not in ("restart", "output_dir")}
    meta = results.run_meta(
        recorded | {"max_seq_len": max_seq_len, "layers": layers},
        model_identity(model, arguments.model, config.MODEL_CACHE_DIR)
        | {"sidecars": sidecar_sets.sidecar_identity(sidecars, "a")},
        {split: text_data.identity(documents[split]) for split in SPLITS},
        {"seed": arguments.seed},
        started,
        eval_utils.model_device(model),
        model.dtype,
    )
    bootstrap = Bootstrap(arguments.resamples, arguments.seed, config.CONFIDENCE_LEVEL)
    files = {"calibration": "layer_replacement_calibration", "evaluation": "layer_replacement_results"}
    stores = {
        split: results.ResultStore(
            folder / f"{files[split]}.csv", folder / f"{files[split]}_documents.csv", "layer", meta, arguments.restart
        )
        for split in SPLITS
    }
    score = dict(max_seq_len=max_seq_len, stride=min(arguments.stride, max_seq_len), batch_size=arguments.batch_size)
    print(f"model {arguments.model}, layers {layers}, stage A sidecars of {sidecars}")
    for split in SPLITS:
        print(f"{split} text {arguments.dataset}: {len(tokens[split])} documents, {totals[split]:,} scored tokens")
        if stores[split].resumed:
            print(f"resumed: {len(stores[split].resumed)} rows on {split} text are there already")

    for split in SPLITS:
        if "baseline" not in stores[split].tables:
            scores = eval_utils.score_documents(model, tokens[split], progress=f"baseline, {split}", **score)
            stores[split].add("baseline", document_table(scores))
            if split == "calibration":
                session.print_plan(
                    model, sum(totals.values()), len(layers) + len(together), scores.tokens_per_second,
                    arguments.batch_size * max_seq_len,
                )  # fmt: skip

    def replace(name: str, chosen: list[int], splits: tuple[str, ...]) -> None:
        missing = [split for split in splits if name not in stores[split].rows]
        if not missing:
            return
        attach_mamba_sidecar(model, chosen, alpha=1.0, gate_mode="fixed", sidecar_dir=sidecars, stage="a")
        on_batch = attachment_of(model).on_batch
        for split in missing:
            scores = eval_utils.score_documents(
                model, tokens[split], on_batch=on_batch, progress=f"layer {name}, {split}", **score
            )
            table = document_table(scores)
            values = quality(table, stores[split].tables["baseline"], bootstrap)
            stores[split].add(name, table, {column: values[column] for column in COLUMNS})
        detach_mamba_sidecars(model)

    for layer in layers:
        replace(str(layer), [layer], SPLITS)

    alone = [row for row in stores["calibration"].rows.values() if not row["layer"].startswith("combined")]
    ranking = [row["layer"] for row in sorted(alone, key=lambda row: (row["delta_nll"], int(row["layer"])))]
    names = []
    for count in together:
        chosen = sorted(int(layer) for layer in ranking[:count])
        names.append(combined_name(chosen))
        replace(names[-1], chosen, ("evaluation",))

    def order(row: dict) -> tuple:
        if row["layer"] in names:
            return (1, names.index(row["layer"]), 0)
        return (0, row["delta_nll"], int(row["layer"]))

    for store in stores.values():
        store.write(order)
    rows = sorted(stores["evaluation"].rows.values(), key=order)
    print_summary(
        [row for row in rows if row["layer"] not in names], [row for row in rows if row["layer"] in names], ranking
    )
    written = [path for store in stores.values() for path in (store.path, store.documents_path)]
    print(f"\nWrote in {folder}: " + ", ".join(path.name for path in written))
    quick = " --quick" if arguments.quick else ""
    print(f"Next: python scripts/07_gated_hybrid.py --model {arguments.model}{quick}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    session.retry_shorter(lambda tokens: run(arguments, tokens), arguments.max_seq_len, config.OOM_SEQ_LEN_FALLBACK)


if __name__ == "__main__":
    results.run_main(main)

"""03: router signals of prompts and of the evaluation text: how sparse, where, and what goes with it.

Writes routing_signals.json (prompts, per token) and, over the evaluation text, routing_by_layer.csv (TLS and CLS_k),
routing_experts.csv, routing_by_kind.csv, routing_by_position.csv, routing_correlations.csv, routing_extreme_tokens.csv
and routing_tokens.npz.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import config
from src.base import results, text_data
from src.gating.routing_text import (
    collect_routing,
    correlation_table,
    decode_pieces,
    expert_table,
    extreme_tokens,
    group_table,
    layer_table,
    position_bucket,
    token_arrays,
    token_kinds,
)
from src.models.families import context_length, memory_estimate
from src.models.loading import load_model, model_identity
from src.routing_extractor import RoutingExtractor


def parse_arguments():
    parser = results.ArgumentParser("Router signals of prompts and of the evaluation text.")
    parser.add_argument("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    parser.add_argument(
        "--prompts", nargs="+", action="extend", metavar="TEXT", help="prompts in place of TEST_PROMPTS"
    )
    parser.add_argument("--file", type=Path, help="text file with one prompt per line, in place of TEST_PROMPTS")
    parser.add_argument(
        "--dataset", default=config.EVAL_DATASET, help="mixed, docs, code, math, story, wikitext or a file"
    )
    parser.add_argument("--documents", type=int, help="evaluation documents (default: the config's)")
    parser.add_argument(
        "--max-seq-len", type=int, help="tokens kept of a document (default: the config's, within context)"
    )
    parser.add_argument("--batch-size", type=int, default=config.EVAL_BATCH_SIZE, help="full windows per forward pass")
    parser.add_argument("--resamples", type=int, default=config.BOOTSTRAP_RESAMPLES, help="bootstrap resamples")
    parser.add_argument("--rank-resamples", type=int, default=200, help="bootstrap resamples of rank correlations")
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="fewer documents, results apart")
    parser.add_argument("--seed", type=int, default=config.SEED, help="order of the documents and bootstrap")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16 or bfloat16")
    parser.add_argument("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    arguments = parser.parse_args()
    for name in ("documents", "max_seq_len", "batch_size", "resamples", "rank_resamples"):
        value = getattr(arguments, name)
        if value is not None and value < (3 if name == "max_seq_len" else 1):
            raise results.UserError(f"--{name.replace('_', '-')} is {value}, which is too small")
    if arguments.prompts and arguments.file:
        raise results.UserError("give --prompts or --file, not both")
    return arguments


def read_prompts(arguments) -> list[str]:
    """The prompts asked for; UserError where there is none."""
    prompts = arguments.prompts or config.TEST_PROMPTS
    if arguments.file:
        try:
            prompts = arguments.file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise results.UserError(f"--file {arguments.file} is not UTF-8 text") from error
        except IsADirectoryError as error:
            raise results.UserError(f"--file {arguments.file} is a folder") from error
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise results.UserError(f"no prompt in {arguments.file or '--prompts'}: every line is empty")
    return prompts


def prompt_signals(model, tokenizer, prompts: list[str]) -> list[dict]:
    """Sparsity of each prompt: overall, per layer and per token [L][T]."""
    entries = []
    with RoutingExtractor(model) as extractor:
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            if not ids:
                raise results.UserError(f"the prompt {prompt!r} has no tokens")
            with torch.no_grad():
                model(torch.tensor([ids], device=model.get_input_embeddings().weight.device), use_cache=False)
            stats = extractor.compute_sparsity_stats()
            entries.append(
                {
                    "prompt": prompt,
                    "tokens": decode_pieces(tokenizer, ids),
                    "overall_sparsity": stats["overall_sparsity"],
                    "per_layer_sparsity": stats["per_layer_sparsity"],
                    "per_token_sparsity": stats["per_token_sparsity"][:, 0],
                }
            )
    return entries


def measure(model, documents, tokenizer, arguments, seq_len: int, speed: float):
    """Routing of the documents (at `speed` tokens/s or more); out of GPU memory, once more with shorter ones."""
    token_documents = text_data.tokenize(documents, tokenizer, seq_len)
    tokens = sum(len(document.ids) for document in token_documents)
    print(f"evaluation text: {len(documents)} documents, {tokens:,} tokens of at most {seq_len} each")
    print(f"{memory_estimate(model, arguments.batch_size * seq_len)}; at most about {tokens / speed:.0f} s")
    try:
        return collect_routing(model, token_documents, arguments.batch_size, progress="routing")
    except torch.OutOfMemoryError:
        if seq_len <= config.OOM_SEQ_LEN_FALLBACK:
            raise
    torch.cuda.empty_cache()
    print(f"out of GPU memory: again with {config.OOM_SEQ_LEN_FALLBACK} tokens per document", file=sys.stderr)
    token_documents = text_data.tokenize(documents, tokenizer, config.OOM_SEQ_LEN_FALLBACK)
    return collect_routing(model, token_documents, 1, progress="routing")


def main() -> None:
    started = time.time()
    arguments = parse_arguments()
    prompts = read_prompts(arguments)
    limit = arguments.documents or (config.QUICK_EVAL_SAMPLES if arguments.quick else config.MAX_EVAL_SAMPLES)
    documents = text_data.load_documents(arguments.dataset, "evaluation", arguments.seed, limit)
    model, tokenizer = load_model(
        arguments.model,
        arguments.device,
        arguments.dtype,
        cache_dir=config.MODEL_CACHE_DIR,
        max_memory_gb=config.MAX_MEMORY_GB,
        use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )
    context = context_length(model)
    seq_len = arguments.max_seq_len or min(config.MAX_EVAL_DOCUMENT_TOKENS, context)
    if seq_len > context:
        raise results.UserError(f"--max-seq-len is {seq_len}, the model's context is {context}")
    identity, data = model_identity(model, arguments.model, config.MODEL_CACHE_DIR), text_data.identity(documents)
    if data["matches"] is False:
        print(f"note: the evaluation text differs from the recorded one: {data['hint']}", file=sys.stderr)
    seeds = {"documents": arguments.seed, "bootstrap": arguments.seed}
    meta = results.run_meta(
        vars(arguments) | {"prompts": prompts, "documents": limit, "max_seq_len": seq_len},
        identity,
        data,
        seeds,
        started,
        model.device,
        model.dtype,
    )
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)

    clock = time.perf_counter()
    signals = prompt_signals(model, tokenizer, prompts)
    # short prompts one by one are slower per token than full windows: an upper bound for what follows
    speed = sum(len(entry["tokens"]) for entry in signals) / (time.perf_counter() - clock)
    record = measure(model, documents, tokenizer, arguments, seq_len, speed)
    resamples = min(arguments.resamples, 1000) if arguments.quick else arguments.resamples
    rank_resamples = min(arguments.rank_resamples, 50) if arguments.quick else arguments.rank_resamples
    options = {"seed": arguments.seed, "level": config.CONFIDENCE_LEVEL}
    special = set(tokenizer.all_special_ids)
    pieces = [decode_pieces(tokenizer, ids) for ids in record.tokens]
    kinds = [
        kind
        for texts, ids in zip(pieces, record.tokens, strict=True)
        for kind in token_kinds(texts, [int(token) in special for token in ids])
    ]
    buckets = [position_bucket(int(position)) for position in np.concatenate(record.positions)]
    layers = layer_table(record, resamples, **options)
    written = [
        results.write_json(
            folder / config.ROUTING_SIGNALS_PATH.name,
            {
                "model": arguments.model,
                "num_layers": record.num_layers,
                "num_experts": record.num_experts,
                "prompts": signals,
            },
            meta,
        ),
        results.write_csv(folder / "routing_by_layer.csv", layers, meta),
        results.write_csv(folder / "routing_experts.csv", expert_table(record), meta),
        results.write_csv(
            folder / "routing_by_kind.csv", group_table(record, "kind", kinds, resamples, **options), meta
        ),
        results.write_csv(
            folder / "routing_by_position.csv", group_table(record, "positions", buckets, resamples, **options), meta
        ),
        results.write_csv(
            folder / "routing_correlations.csv", correlation_table(record, rank_resamples, **options), meta
        ),
        results.write_csv(folder / "routing_extreme_tokens.csv", extreme_tokens(record, pieces), meta),
        results.write_npz(folder / config.ROUTING_TOKENS_PATH.name, token_arrays(record), meta),
    ]

    print(f"\n{'prompt':60} sparsity")
    for entry in signals:
        print(f"{entry['prompt'].splitlines()[0][:58]:60} {entry['overall_sparsity']:.3f}")
    print(
        f"\n{'layer':>5} {'TLS':>7} "
        + " ".join(f"{name:>7}" for name in ("CLS_2", "CLS_4", "CLS_8", "CLS_16", "CLS_32"))
    )
    for row in layers:
        values = [row["tls"], *(row[f"cls_{chunk}"] for chunk in (2, 4, 8, 16, 32))]
        print(f"{row['layer']:5} " + " ".join("      -" if value is None else f"{value:7.3f}" for value in values))
    print(f"mean TLS {np.mean([row['tls'] for row in layers]):.3f} over {record.num_tokens:,} tokens")
    print("\nwritten:", *(f"  {path}" for path in written), sep="\n")
    print(f"next: python scripts/04_test_sidecar.py --model {arguments.model}")


if __name__ == "__main__":
    results.run_main(main)

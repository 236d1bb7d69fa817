"""03: router signals of prompts and of the evaluation text: how sparse, where, and what goes with it.

Writes routing_signals.json (prompts, per token) and, over the evaluation text, routing_by_layer.csv (TLS and CLS_k),
routing_experts.csv, routing_by_kind.csv, routing_by_position.csv, routing_correlations.csv, routing_extreme_tokens.csv
and routing_tokens.npz."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli
from src.base.errors import UserError

FLAGS = (
    *(name for name in cli.SESSION_FLAGS if name != "restart"), "batch_windows", "prompts", "prompt_file", "resamples",
    "rank_resamples", "confidence_level",
)  # fmt: skip


def read_prompts(arguments) -> list[str]:
    """The prompts asked for; UserError where there is none."""
    prompts = arguments.prompts or cli.setting(config, "TEST_PROMPTS", arguments.model, arguments.quick)
    if arguments.prompt_file:
        try:
            prompts = arguments.prompt_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {arguments.prompt_file} is not UTF-8 text") from error
        except IsADirectoryError as error:
            raise UserError(f"--prompt-file {arguments.prompt_file} is a folder; give a text file") from error
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"no prompt in {arguments.prompt_file or '--prompts'}: every line is empty")
    return prompts


def parse(argv: list[str] | None = None):
    """The command line; `prompts` are the ones to run, wherever they come from."""
    arguments = cli.parse(__doc__, config, FLAGS, argv)
    if arguments.prompts and arguments.prompt_file:
        raise UserError("give --prompts or --prompt-file, not both")
    arguments.prompts = read_prompts(arguments)
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import time

import numpy as np
import torch

from src.base import results, text_data
from src.gating.routing_text import (
    RoutingRecord,
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
from src.hybrid.session import Session, open_session
from src.models.families import context_length, memory_estimate
from src.routing_extractor import RoutingExtractor


def kept_tokens(arguments, context: int) -> int:
    """Tokens kept of a document: --document-tokens within the model's context; UserError where more were asked for."""
    if "document_tokens" in arguments.given and arguments.document_tokens > context:
        raise UserError(f"--document-tokens is {arguments.document_tokens}, the model's context is {context}")
    return min(arguments.document_tokens, context)


def prompt_signals(model, tokenizer, prompts: list[str]) -> list[dict]:
    """Sparsity of each prompt: overall, per layer and per token [L][T]."""
    entries = []
    with RoutingExtractor(model) as extractor:
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            if not ids:
                raise UserError(f"the prompt {prompt!r} has no tokens")
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


def measure(session: Session, length: int, speed: float) -> RoutingRecord:
    """Routing of the documents' first `length` tokens (at `speed` tokens/s or more).

    After running out of GPU memory, once more with shorter documents, one by one.
    """
    arguments, documents = session.arguments, session.texts["evaluation"]
    token_documents = text_data.tokenize(documents, session.tokenizer, length)
    tokens = sum(len(document.ids) for document in token_documents)
    print(f"evaluation text: {len(documents)} documents, {tokens:,} tokens of at most {length} each")
    memory = memory_estimate(session.model, arguments.batch_windows * length)
    print(f"{memory}; at most about {tokens / speed:.0f} s", flush=True)
    shorter = cli.setting(config, "OOM_SEQ_LEN_FALLBACK", arguments.model, arguments.quick)
    try:
        return collect_routing(session.model, token_documents, arguments.batch_windows, progress="routing")
    except torch.OutOfMemoryError:
        if length <= shorter:
            raise
    torch.cuda.empty_cache()
    print(f"out of GPU memory: again with {shorter} tokens per document", file=sys.stderr)
    token_documents = text_data.tokenize(documents, session.tokenizer, shorter)
    return collect_routing(session.model, token_documents, 1, progress="routing")


def write_tables(session: Session, record: RoutingRecord, layers: list[dict], meta: dict) -> list[Path]:
    """Write the tables over the evaluation text and the arrays per token; `layers` is `layer_table`'s."""
    arguments = session.arguments
    options = {"seed": arguments.seed, "level": arguments.confidence_level}
    special = set(session.tokenizer.all_special_ids)
    pieces = [decode_pieces(session.tokenizer, ids) for ids in record.tokens]
    kinds = [
        kind
        for texts, ids in zip(pieces, record.tokens, strict=True)
        for kind in token_kinds(texts, [int(token) in special for token in ids])
    ]
    buckets = [position_bucket(int(position)) for position in np.concatenate(record.positions)]
    tables = {
        "routing_by_layer": layers,
        "routing_experts": expert_table(record),
        "routing_by_kind": group_table(record, "kind", kinds, arguments.resamples, **options),
        "routing_by_position": group_table(record, "positions", buckets, arguments.resamples, **options),
        "routing_correlations": correlation_table(record, arguments.rank_resamples, **options),
        "routing_extreme_tokens": extreme_tokens(record, pieces),
    }
    written = [results.write_csv(session.folder / f"{name}.csv", rows, meta) for name, rows in tables.items()]
    return [*written, results.write_npz(session.folder / config.ROUTING_TOKENS_PATH.name, token_arrays(record), meta)]


def print_summary(signals: list[dict], layers: list[dict], tokens: int) -> None:
    """Sparsity of each prompt and of each layer."""
    print(f"\n{'prompt':60} sparsity")
    for entry in signals:
        print(f"{entry['prompt'].splitlines()[0][:58]:60} {entry['overall_sparsity']:.3f}")
    chunks = (2, 4, 8, 16, 32)
    print(f"\n{'layer':>5} {'TLS':>7} " + " ".join(f"{f'CLS_{chunk}':>7}" for chunk in chunks))
    for row in layers:
        values = [row["tls"], *(row[f"cls_{chunk}"] for chunk in chunks)]
        print(f"{row['layer']:5} " + " ".join("      -" if value is None else f"{value:7.3f}" for value in values))
    print(f"mean TLS {np.mean([row['tls'] for row in layers]):.3f} over {tokens:,} tokens")


def main(arguments) -> None:
    """Measure the prompts, then the evaluation text, and write both."""
    session = open_session(arguments, {"evaluation": arguments.documents})
    length = kept_tokens(arguments, context_length(session.model))
    meta = session.meta(document_tokens=length)
    clock = time.perf_counter()
    signals = prompt_signals(session.model, session.tokenizer, arguments.prompts)
    # Short prompts one by one are slower per token than full windows: an upper bound for what follows.
    speed = sum(len(entry["tokens"]) for entry in signals) / (time.perf_counter() - clock)
    record = measure(session, length, speed)
    layers = layer_table(record, arguments.resamples, seed=arguments.seed, level=arguments.confidence_level)
    prompts = {
        "model": arguments.model,
        "num_layers": record.num_layers,
        "num_experts": record.num_experts,
        "prompts": signals,
    }
    written = [results.write_json(session.folder / config.ROUTING_SIGNALS_PATH.name, prompts, meta)]
    written += write_tables(session, record, layers, meta)
    print_summary(signals, layers, record.num_tokens)
    cli.say_written(written, "scripts/04_test_sidecar.py")


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

"""01: download a model from the hub, or verify a shipped or local one; say what it is.

Prints the configuration and the parameter counts (total, and active at the sparsity measured on a few texts), and
writes model_info.json."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = (*cli.MODEL_FLAGS, *cli.RUN_FLAGS, "documents")


def parse(argv: list[str] | None = None):
    """The command line."""
    return cli.parse(__doc__, config, FLAGS, argv, settings={"documents": "SPARSITY_SAMPLES"})


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import time

from src.base import results, text_data
from src.base.errors import UserError
from src.gating.routing_text import collect_routing
from src.models.families import active_parameters, context_length, has_router, memory_estimate
from src.models.loading import (
    SHIPPED_MODELS,
    describe_model,
    hub_files,
    is_hub_id,
    load_model,
    merge_model_info,
    resolve_model_path,
    weight_files,
)

CONFIG_KEYS = (
    "model_type attention_type ffn_type vocab_size hidden_size num_hidden_layers num_attention_heads "
    "num_key_value_heads num_experts expert_size router_act hidden_act norm_after_router norm_scale "
    "max_position_embeddings rms_norm_eps scale_emb scale_depth dim_model_base tie_word_embeddings"
).split()


def fetch(name: str, cache_dir: Path) -> Path:
    """The model's folder; a hub model is announced with its size first."""
    local = name in SHIPPED_MODELS or Path(name).expanduser().exists() or not is_hub_id(name)
    if not local:
        try:
            files = hub_files(name)
        except UserError as error:
            # resolve_model_path falls back to an earlier download, or raises the same
            print(f"note: {error}", file=sys.stderr)
        else:
            size = sum(files.values())
            print(f"{name}: {len(files)} files, {size / 1e9:.2f} GB, into {cache_dir} (resumes; files there are kept)")
    return resolve_model_path(name, cache_dir)


def measure(model, tokenizer, arguments, window_tokens: int) -> dict:
    """Sparsity on a few evaluation texts, and the parameters active at that sparsity."""
    documents = text_data.load_documents("mixed", "evaluation", arguments.seed, arguments.documents)
    length = min(context_length(model), window_tokens)
    record = collect_routing(model, text_data.tokenize(documents, tokenizer, length), 1, progress="sparsity")
    pairs = record.tls.sum(axis=0)
    sparsity = {layer: inactive / total for layer, (inactive, total) in enumerate(pairs.tolist())}
    return {
        "documents": arguments.documents,
        "tokens": record.num_tokens,
        "text_sha256": text_data.identity(documents)["sha256"],
        "sparsity": sum(sparsity.values()) / len(sparsity),
        "per_layer_sparsity": sparsity,
        "active_parameters": active_parameters(model, sparsity),
    }


def print_model(info: dict, tokenizer) -> None:
    """Tokenizer, configuration and parameter counts; `info` is as `describe_model` gives it."""
    print(f"tokenizer: {len(tokenizer):,} tokens, bos {tokenizer.bos_token!r}, eos {tokenizer.eos_token!r}")
    print("\nconfiguration")
    for key in CONFIG_KEYS:
        if key in info["config"]:
            print(f"  {key:26} {info['config'][key]}")
    print("\nparameters")
    total = info["parameters"]["total"]
    for part, count in info["parameters"].items():
        if count:
            print(f"  {part:26} {count:>14,} {count / total:7.1%}")


def main(arguments) -> None:
    """Fetch the model where it is not there, load it, and say and write what it is."""
    started = time.time()
    window_tokens, batch_windows = (
        cli.setting(config, name, arguments.model, arguments.quick) for name in ("MAX_SEQ_LEN", "EVAL_BATCH_SIZE")
    )
    files = weight_files(fetch(arguments.model, arguments.cache_dir))
    print(f"weights: {sum(f.stat().st_size for f in files) / 1e9:.3f} GB in {', '.join(f.name for f in files)}")
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=arguments.cache_dir,
        max_memory_gb=arguments.max_memory_gb, use_8bit_fallback=arguments.use_8bit_fallback,
    )  # fmt: skip
    info = describe_model(model, arguments.model, arguments.cache_dir)
    if not has_router(model):
        reason = f"{info['model']['model_type']} has no router, so no sparsity is measured on text"
        cli.refuse(arguments, ["documents"], reason)  # --seed is no error: run_all.sh gives it for every model
    print(f"{arguments.model} loads: every tensor that its configuration asks for is there")
    print_model(info, tokenizer)
    if has_router(model):
        info["measured"] = measured = measure(model, tokenizer, arguments, window_tokens)
        active = measured["active_parameters"]
        print(f"  {'active per token':26} {active:>14,} {active / info['parameters']['total']:7.1%}")
        print(f"at sparsity {measured['sparsity']:.3f} (on {measured['tokens']:,} tokens of evaluation text)")
    else:
        print(f"  {info['model']['model_type']} has no router: every parameter is active")
    print(memory_estimate(model, batch_windows * window_tokens))
    meta = results.run_meta(
        cli.recorded(arguments), info["model"], None, {"seed": arguments.seed}, started, model.device, model.dtype
    )
    path = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.MODEL_INFO_PATH.name
    results.write_json(path, merge_model_info(path, info), meta)
    cli.say_written([path], "scripts/02_inspect_model.py", unknown=["seed"])  # 02 draws nothing


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

"""01: download a model from the hub, or verify a shipped or local one; say what it is.

Prints the configuration and the parameter counts (total, and active at the sparsity measured on a few texts), and
writes model_info.json.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from src.base import results, text_data
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


def parse_arguments():
    parser = results.ArgumentParser("Download a model from the hub, or verify a shipped or local one.")
    parser.add_argument("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    parser.add_argument("--documents", type=int, default=8, help="evaluation documents on which sparsity is measured")
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="fewer documents, results apart")
    parser.add_argument("--seed", type=int, default=config.SEED, help="order of the documents")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16 or bfloat16")
    parser.add_argument("--cache-dir", type=Path, default=config.MODEL_CACHE_DIR, help="where downloads are kept")
    parser.add_argument("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    arguments = parser.parse_args()
    if arguments.documents < 1:
        raise results.UserError(f"--documents is {arguments.documents}; measure on at least 1")
    return arguments


def fetch(name: str, cache_dir: Path) -> Path:
    """The model's folder; a hub model is announced with its size first."""
    local = name in SHIPPED_MODELS or Path(name).expanduser().exists() or not is_hub_id(name)
    if not local:
        try:
            files = hub_files(name)
        except results.UserError as error:
            # resolve_model_path falls back to an earlier download, or raises the same
            print(f"note: {error}", file=sys.stderr)
        else:
            size = sum(files.values())
            print(f"{name}: {len(files)} files, {size / 1e9:.2f} GB, into {cache_dir} (resumes; files there are kept)")
    return resolve_model_path(name, cache_dir)


def measure(model, tokenizer, arguments) -> dict:
    """Sparsity on a few evaluation texts, and the parameters active at that sparsity."""
    number = min(arguments.documents, 2) if arguments.quick else arguments.documents
    documents = text_data.load_documents("mixed", "evaluation", arguments.seed, number)
    length = min(context_length(model), config.MAX_SEQ_LEN)
    record = collect_routing(model, text_data.tokenize(documents, tokenizer, length), 1, progress="sparsity")
    pairs = record.tls.sum(axis=0)
    sparsity = {layer: inactive / total for layer, (inactive, total) in enumerate(pairs.tolist())}
    return {
        "documents": number,
        "tokens": record.num_tokens,
        "text_sha256": text_data.identity(documents)["sha256"],
        "sparsity": sum(sparsity.values()) / len(sparsity),
        "per_layer_sparsity": sparsity,
        "active_parameters": active_parameters(model, sparsity),
    }


def main() -> None:
    started = time.time()
    arguments = parse_arguments()
    files = weight_files(fetch(arguments.model, arguments.cache_dir))
    print(f"weights: {sum(f.stat().st_size for f in files) / 1e9:.3f} GB in {', '.join(f.name for f in files)}")
    model, tokenizer = load_model(
        arguments.model,
        arguments.device,
        arguments.dtype,
        cache_dir=arguments.cache_dir,
        max_memory_gb=config.MAX_MEMORY_GB,
        use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )
    info = describe_model(model, arguments.model, arguments.cache_dir)
    print(f"{arguments.model} loads: every tensor that its configuration asks for is there")
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
    if has_router(model):
        info["measured"] = measured = measure(model, tokenizer, arguments)
        active = measured["active_parameters"]
        print(f"  {'active per token':26} {active:>14,} {active / total:7.1%}")
        print(f"at sparsity {measured['sparsity']:.3f} (on {measured['tokens']:,} tokens of evaluation text)")
    else:
        print(f"  {info['model']['model_type']} has no router: every parameter is active")
    print(memory_estimate(model, config.EVAL_BATCH_SIZE * config.MAX_SEQ_LEN))
    meta = results.run_meta(
        vars(arguments), info["model"], None, {"documents": arguments.seed}, started, model.device, model.dtype
    )
    path = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.MODEL_INFO_PATH.name
    results.write_json(path, merge_model_info(path, info), meta)
    print(f"\nwritten:\n  {path}\nnext: python scripts/02_inspect_model.py --model {arguments.model}")


if __name__ == "__main__":
    results.run_main(main)

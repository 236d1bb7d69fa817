"""02: a model's module tree with attention, router and experts marked, and where signals and sidecars go in.

Updates model_info.json.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn

import config
from src.base import results
from src.models.families import decoder_layers, has_router, parameter_statistics, resolve_layers
from src.models.loading import describe_model, load_model, merge_model_info

MARKS = {
    "self_attn": "attention  <- a sidecar goes here",
    "router_proj": "router",
    "router_act_fn": "router  <- routing signal, its output [B, T, E]",
    "router_norm": "router",
    "up_proj": "experts, up",
    "down_proj": "experts, down",
}


def parse_arguments():
    parser = results.ArgumentParser("The module tree of a model, shapes, and where signals and sidecars go in.")
    parser.add_argument("--model", default=config.MODEL_NAME, help="blockffn-tiny, a folder or a hub name")
    parser.add_argument("--layer", type=int, default=None, help="show this layer (default: layer 0)")
    parser.add_argument("--all-layers", action="store_true", help="show every layer")
    parser.add_argument("--weights", action="store_true", help="statistics of the weights of the layers shown")
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="results apart")
    parser.add_argument("--seed", type=int, default=config.SEED, help="recorded; nothing is drawn here")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16 or bfloat16")
    parser.add_argument("--cache-dir", type=Path, default=config.MODEL_CACHE_DIR, help="where downloads are kept")
    parser.add_argument("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    arguments = parser.parse_args()
    if arguments.all_layers and arguments.layer is not None:
        raise results.UserError("give --layer or --all-layers, not both")
    return arguments


def tree(module: nn.Module, name: str, depth: int, shown: list[int], routed: bool) -> list[str]:
    """Lines of the module tree; of the decoder layers only those in `shown`."""
    own = ", ".join(str(list(parameter.shape)) for parameter in module.parameters(recurse=False))
    label = name.rpartition(".")[2]
    mark = MARKS.get(label, "") if routed or label == "self_attn" else ""
    lines = [f"{'  ' * depth}{label} {type(module).__name__} {own}".rstrip() + (f"    [{mark}]" if mark else "")]
    hidden = []
    for child, inner in module.named_children():
        if name == "model.layers" and int(child) not in shown:
            hidden.append(child)
            continue
        lines += tree(inner, f"{name}.{child}".lstrip("."), depth + 1, shown, routed)
    if hidden:
        lines.append(f"{'  ' * (depth + 1)}... {len(hidden)} more layers (--all-layers)")
    return lines


def print_statistics(statistics: dict[str, dict]) -> None:
    """A table of `parameter_statistics`."""
    width = max(map(len, statistics))
    print(f"\n{'weights':{width}} {'shape':>16} {'mean':>10} {'std':>10} {'min':>10} {'max':>10} {'zeros':>7}")
    for name, row in statistics.items():
        shape = "x".join(map(str, row["shape"]))
        numbers = " ".join(f"{row[key]:10.4g}" for key in ("mean", "std", "min", "max"))
        print(f"{name:{width}} {shape:>16} {numbers} {row['zeros']:7.1%}")


def main() -> None:
    started = time.time()
    arguments = parse_arguments()
    model, _ = load_model(
        arguments.model,
        arguments.device,
        arguments.dtype,
        cache_dir=arguments.cache_dir,
        max_memory_gb=config.MAX_MEMORY_GB,
        use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )
    num_layers, routed = len(decoder_layers(model)), has_router(model)
    spec = "all" if arguments.all_layers else [arguments.layer or 0]
    shown = resolve_layers(spec, num_layers)
    info = describe_model(model, arguments.model, arguments.cache_dir)
    print("\n".join(tree(model, "", 0, shown, routed)))
    for layer in shown:
        print(f"\nshapes of layer {layer}")
        for name, shape in info["layers"][layer]["shapes"].items():
            print(f"  {name:38} {shape}")
    alike = all(entry["shapes"] == info["layers"][0]["shapes"] for entry in info["layers"])
    print(f"\n{num_layers} layers{', all of these shapes' if alike else ', whose shapes differ'}")
    print("\ninsertion points (layer l)")
    width = model.config.hidden_size
    print(f"  sidecar:        model.layers[l].self_attn, [B, T, {width}] -> [B, T, {width}]")
    if routed:
        experts = info["insertion_points"]["router_signal"]["experts"]
        print(f"  router signal:  model.layers[l].mlp.router_act_fn, output [B, T, {experts}], exact zeros = inactive")
        print("  routing gates:  'previous' reads layer l-1's signal, 'lookahead' layer l's router on l's normed input")
    else:
        print(
            f"  router signal:  none, {info['model']['model_type']} has no router: fixed, learned and random gates only"
        )
    if arguments.weights:
        prefixes = [f"model.layers.{layer}." for layer in shown]
        info["weights"] = parameter_statistics(model)
        print_statistics({n: row for n, row in info["weights"].items() if any(n.startswith(p) for p in prefixes)})
    meta = results.run_meta(
        vars(arguments), info["model"], None, {"seed": arguments.seed}, started, model.device, model.dtype
    )
    path = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.MODEL_INFO_PATH.name
    results.write_json(path, merge_model_info(path, info), meta)
    print(f"\nwritten:\n  {path}")
    print(f"next: python scripts/03_extract_routing.py --model {arguments.model}")


if __name__ == "__main__":
    results.run_main(main)

"""02: a model's module tree with attention, router and experts marked, and where signals and sidecars go in.

Updates model_info.json."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = (*cli.MODEL_FLAGS, "quick", "output_dir", "layers", "weights")


def parse(argv: list[str] | None = None):
    """The command line."""
    return cli.parse(__doc__, config, FLAGS, argv, defaults={"layers": "0"})


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import time

from torch import nn

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
        lines.append(f"{'  ' * (depth + 1)}... {len(hidden)} more layers (--layers all)")
    return lines


def print_statistics(statistics: dict[str, dict]) -> None:
    """A table of `parameter_statistics`."""
    width = max(map(len, statistics))
    print(f"\n{'weights':{width}} {'shape':>16} {'mean':>10} {'std':>10} {'min':>10} {'max':>10} {'zeros':>7}")
    for name, row in statistics.items():
        shape = "x".join(map(str, row["shape"]))
        numbers = " ".join(f"{row[key]:10.4g}" for key in ("mean", "std", "min", "max"))
        print(f"{name:{width}} {shape:>16} {numbers} {row['zeros']:7.1%}")


def print_layers(info: dict, shown: list[int]) -> None:
    """The shapes of the layers shown, and whether the others have the same."""
    for layer in shown:
        print(f"\nshapes of layer {layer}")
        for name, shape in info["layers"][layer]["shapes"].items():
            print(f"  {name:38} {shape}")
    alike = all(entry["shapes"] == info["layers"][0]["shapes"] for entry in info["layers"])
    print(f"\n{len(info['layers'])} layers{', all of these shapes' if alike else ', whose shapes differ'}")


def print_insertion_points(info: dict, width: int, routed: bool) -> None:
    """Where sidecars and routing signals go in; `width` is the model's."""
    print("\ninsertion points (layer l)")
    print(f"  sidecar:        model.layers[l].self_attn, [B, T, {width}] -> [B, T, {width}]")
    if routed:
        experts = info["insertion_points"]["router_signal"]["experts"]
        print(f"  router signal:  model.layers[l].mlp.router_act_fn, output [B, T, {experts}], exact zeros = inactive")
        print("  routing gates:  'previous' reads layer l-1's signal, 'lookahead' layer l's router on l's normed input")
    else:
        print(
            f"  router signal:  none, {info['model']['model_type']} has no router: fixed, learned and random gates only"
        )


def main(arguments) -> None:
    """Load the model, show its tree and shapes, and write what was found."""
    started = time.time()
    model, _ = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=arguments.cache_dir,
        max_memory_gb=arguments.max_memory_gb, use_8bit_fallback=arguments.use_8bit_fallback,
    )  # fmt: skip
    routed = has_router(model)
    shown = resolve_layers(arguments.layers, len(decoder_layers(model)))
    info = describe_model(model, arguments.model, arguments.cache_dir)
    print("\n".join(tree(model, "", 0, shown, routed)))
    print_layers(info, shown)
    print_insertion_points(info, model.config.hidden_size, routed)
    if arguments.weights:
        prefixes = tuple(f"model.layers.{layer}." for layer in shown)
        info["weights"] = parameter_statistics(model)
        print_statistics({name: row for name, row in info["weights"].items() if name.startswith(prefixes)})
    meta = results.run_meta(cli.recorded(arguments), info["model"], None, {}, started, model.device, model.dtype)
    path = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.MODEL_INFO_PATH.name
    results.write_json(path, merge_model_info(path, info), meta)
    cli.say_written([path], "scripts/03_extract_routing.py")


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

"""What the parts of a model are called in its family, and what they add up to: layers, routers, parameters, memory."""

import torch
from torch import nn

from src.base.errors import UserError

LAYER_SETS = ("all", "middle", "first_half", "last_half")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, `model.model.layers`, each with a `self_attn`; UserError where there are none."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UserError(f"{model_type_of(model)} has no model.layers[i].self_attn, which sidecars and scripts need")
    return layers


def has_router(model: nn.Module) -> bool:
    """Whether every decoder layer holds a BlockFFN router (`mlp.router_act_fn`)."""
    return all(hasattr(getattr(layer, "mlp", None), "router_act_fn") for layer in decoder_layers(model))


def is_gated_mlp(module: nn.Module | None) -> bool:
    """Whether a module is a dense gated MLP as in Llama: down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def has_gated_mlp(model: nn.Module) -> bool:
    """Whether every decoder layer's `mlp` is a dense gated MLP, whose activation sparsity can drive a gate."""
    return all(is_gated_mlp(getattr(layer, "mlp", None)) for layer in decoder_layers(model))


def resolve_layers(spec: str | int | list[int], num_layers: int) -> list[int]:
    """Sorted layer indices of a TARGET_LAYERS setting: "all" | "middle" | "first_half" | "last_half" | list | "4,5,6".

    "middle" is layers L//3 .. 2L//3-1 (at least one). Raises UserError for another word or a layer that is not there.
    """
    if isinstance(spec, str) and spec.strip() in LAYER_SETS:
        third, half = num_layers // 3, num_layers // 2
        sets = {
            "all": range(num_layers), "middle": range(third, max(2 * num_layers // 3, third + 1)),
            "first_half": range(max(half, 1)), "last_half": range(half, num_layers),
        }  # fmt: skip
        return list(sets[spec.strip()])
    if isinstance(spec, int):
        spec = [spec]
    try:
        layers = sorted({int(part) for part in (spec.strip("[]").split(",") if isinstance(spec, str) else spec)})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"layers {spec!r} not understood; use {', '.join(LAYER_SETS)} or indices such as 4,5,6"
        ) from error
    if not layers:
        raise UserError("the list of layers is empty")
    absent = [layer for layer in layers if not 0 <= layer < num_layers]
    if absent:
        raise UserError(f"layer {', '.join(map(str, absent))} is not there: the model has layers 0 to {num_layers - 1}")
    return layers


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by part: total, embeddings, attention, router, experts, mlp (un-routed), norms, head, other.

    Tied weights count once, as embeddings. The parts add up to the total; parts that the model lacks are 0.
    """
    counts = dict.fromkeys(("embeddings", "attention", "router", "experts", "mlp", "norms", "head", "other"), 0)
    parts = {
        ".router_": "router", "norm": "norms", ".self_attn.": "attention",
        ".mlp.": "experts" if has_router(model) else "mlp", "embed_tokens": "embeddings", "lm_head": "head",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        # the first that fits: router_norm is a part of the router, self_attn's inner norms are norms
        counts[next((part for mark, part in parts.items() if mark in name), "other")] += parameter.numel()
    return {"total": sum(counts.values()), **counts}


def active_parameters(model: nn.Module, layer_sparsity: dict[int, float]) -> int:
    """Parameters that a token uses on average: the total without the experts that its router leaves at exactly zero.

    layer_sparsity: {layer: fraction of inactive experts}. Embedding table and head count whole.
    """
    idle = 0.0
    for index, layer in enumerate(decoder_layers(model)):
        idle += layer_sparsity[index] * (layer.mlp.up_proj.weight.numel() + layer.mlp.down_proj.weight.numel())
    return parameter_counts(model)["total"] - round(idle)


def context_length(model: nn.Module) -> int:
    """Tokens that the model was made for (`max_position_embeddings`)."""
    return int(model.config.get_text_config().max_position_embeddings)


def memory_estimate(model: nn.Module, batch_tokens: int) -> str:
    """One line on what scoring `batch_tokens` tokens at a time takes, GB: weights, and activations with logits."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    config = model.config.get_text_config()
    widest = max(part.out_features for part in decoder_layers(model)[0].modules() if isinstance(part, nn.Linear))
    # the activations of one layer live at a time; float32 log-probabilities are made in small pieces
    numbers = batch_tokens * (8 * config.hidden_size + 3 * widest + config.vocab_size)
    return f"memory estimate: weights {weights / 1e9:.2f} GB, a batch {numbers * model.dtype.itemsize / 1e9:.2f} GB"


def parameter_statistics(model: nn.Module) -> dict[str, dict]:
    """{parameter: {"shape", "dtype", "mean", "std", "min", "max", "zeros" (share of exact zeros)}}."""
    statistics = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().double() if parameter.numel() < 1e6 else parameter.detach().float()
        statistics[name] = {
            "shape": list(parameter.shape), "dtype": dtype_name(parameter.dtype),
            "mean": values.mean().item(), "std": values.std(correction=0).item(),
            "min": values.min().item(), "max": values.max().item(), "zeros": (values == 0).double().mean().item(),
        }  # fmt: skip
    return statistics


def model_type_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

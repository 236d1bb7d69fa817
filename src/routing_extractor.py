"""Routers, read by forward hooks that leave the forward bit for bit as it was: BlockFFN's and top-k softmax routers.

A BlockFFN router gives one activation per expert, exactly zero for inactive ones. The routers of Hugging Face MoE
models (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE ...) give logits and run the K strongest experts. Those are found by the
class that the model itself declares as the source of `output_router_logits`, not by the names of its attributes.

`RoutingExtractor` captures the signal of all E experts, `TopKExtractor` the K strongest with their gate probabilities,
and what the routers were given where that is wanted; `router_arrays` are the routers themselves.
"""

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")
# Experts that are named where the model has no K of its own (BlockFFN), unless E is smaller.
DEFAULT_TOP_K = 8
# A router's own weights of its K experts, over their sum, may differ so much from the softmax of the logits: rounding
# to bfloat16. Sigmoid routers and those with a bias differ by more.
_WEIGHT_TOLERANCE = 2e-2
_CHECKED_TOKENS = 256  # of the first forward, per layer


@dataclass(frozen=True)
class TopK:
    """The K strongest experts of every token at the L layers that have a router.

    Attributes:
        layers: indices of those decoder layers, ascending.
        experts [L, B, T, K] int16: strongest first; -1 where fewer than K are active.
        gating_probs [L, B, T, K] float32: sum 1 over the K chosen; 0 where `experts` is -1.
        num_experts: E.
    """

    layers: tuple[int, ...]
    experts: torch.Tensor
    gating_probs: torch.Tensor
    num_experts: int


class _HookHolder:
    """Removes the hooks of a subclass at the end of a `with`, by `close()`, or with the last reference to it."""

    _finalizer: weakref.finalize

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Remove the hooks; harmless when done twice."""
        self._finalizer()


class RoutingExtractor(_HookHolder):
    """Captures every layer's router activations, the output of `router_act_fn`, at each forward.

    On a model with top-k softmax routers the signal is the raw softmax over all experts, float32. Layers without a
    router are left out; `layers_without_router` names them.

        extractor = RoutingExtractor(model)
        model(input_ids)
        signals = extractor.get_routing_signals()       # {layer: [B, T, E]}
        stats = extractor.compute_sparsity_stats()

    Nothing needs calibration, and a model with sidecars works as well: only `mlp` is hooked. It is a context manager
    too; `close()` removes the hooks, and so does dropping the last reference to it. What was captured stays readable.
    Raises ValueError, naming the model type, for a model without router.
    """

    def __init__(self, model: nn.Module, on_layer: Callable[[int, torch.Tensor], None] | None = None):
        """on_layer(layer, router_activations [B, T, E]), where given, is called once per layer in each forward.

        Nothing is kept then, so that a long evaluation holds one layer's signal at a time.
        """
        routers, softmax_routers, self.layers_without_router = _find_routers(model)
        self._has_zeros = bool(routers)
        self.layers = sorted(routers or softmax_routers)
        self._captured: dict[int, torch.Tensor] = {}
        # The hooks hold these two, never the extractor: else the model would keep an abandoned extractor alive.
        captured, pending = self._captured, {}
        handles = [model.register_forward_pre_hook(_clearing(captured, pending))]
        for layer, mlp in sorted(routers.items()):
            handles.append(mlp.router_act_fn.register_forward_hook(_noting(layer, pending)))
            handles.append(mlp.register_forward_hook(_committing(layer, pending, captured, on_layer)))
        for layer, found in sorted(softmax_routers.items()):
            handles.append(found.router.register_forward_hook(_noting_softmax(layer, found.index, pending)))
            handles.append(found.block.register_forward_hook(_committing_rows(layer, pending, captured, on_layer)))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def clear(self) -> None:
        """Forget what was captured."""
        self._captured.clear()

    def get_routing_signals(self) -> dict[int, torch.Tensor]:
        """Router activations of the last forward, {layer: [B, T, E]}, detached, on the model's device and in its dtype.

        Of a softmax router: the softmax of its logits in float32, as the router computes it.

        During generation with a cache the last forward is the last token's. Raises ValueError before the first forward.
        """
        if not self._captured:
            raise ValueError("no routing signal captured yet: run model(input_ids) while the extractor is open")
        return dict(sorted(self._captured.items()))

    def token_sparsity(self) -> np.ndarray:
        """Fraction of exact zeros among each token's router activations, [L, B, T] float64.

        Raises ValueError for softmax routers, whose signal has no zeros.
        """
        if not self._has_zeros:
            raise ValueError("sparsity needs a BlockFFN model: the signal of a softmax router has no exact zeros")
        return np.stack([sparsity(signal) for signal in self.get_routing_signals().values()])

    def compute_sparsity_stats(self, attention_mask: torch.Tensor | np.ndarray | None = None) -> dict:
        """Sparsity of the last forward, over all tokens or those whose attention_mask [B, T] is not 0.

        Returns {"overall_sparsity": float, "per_layer_sparsity": {layer: float}, "per_token_sparsity": [L, B, T] float,
        NaN on padding}. The per-layer figure is the token-level sparsity TLS (arXiv 2507.08771).
        """
        per_token = self.token_sparsity()
        if attention_mask is not None:
            mask = np.asarray(torch.as_tensor(attention_mask).cpu()) != 0
            if mask.shape != per_token.shape[1:]:
                raise ValueError(f"attention_mask has shape {mask.shape}, the captured forward {per_token.shape[1:]}")
            per_token = np.where(mask, per_token, np.nan)
        per_layer = np.nanmean(per_token, axis=(1, 2))
        return {
            "overall_sparsity": float(per_layer.mean()),
            "per_layer_sparsity": {layer: float(value) for layer, value in zip(self.layers, per_layer, strict=True)},
            "per_token_sparsity": per_token,
        }


class TopKExtractor(_HookHolder):
    """Captures which K experts every token uses at each layer, and how strongly, at each forward: [B, T, K] per layer.

        with TopKExtractor(model) as extractor:
            model(input_ids)
            top_k = extractor.get_top_k()               # experts and gating_probs [L, B, T, K]

    With `input_dtype` it keeps the routers' inputs too, see `get_router_inputs`.

    Top-k softmax routers: the experts that the router itself chose, and the softmax over their logits, which is the
    softmax over all experts renormalised over the chosen (what Mixtral multiplies the experts' outputs by; OLMoE and
    Qwen2-MoE skip the renormalisation unless `norm_topk_prob` is set). BlockFFN: the K largest router activations
    above zero, over their sum.

    Hooks are removed by `close()`, at the end of a `with`, and with the last reference to the extractor.
    Raises ValueError, naming the model type, for a model without router, and at the first forward for a router that is
    not a top-k softmax router.
    """

    def __init__(self, model: nn.Module, top_k: int | None = None, input_dtype: torch.dtype | None = None):
        """top_k: K for BlockFFN (None: 8, or E where that is smaller). A softmax router has a K of its own: ValueError
        at the first forward where `top_k` is another one. input_dtype: in which the routers' inputs are kept; None
        keeps none.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        routers, softmax_routers, self.layers_without_router = _find_routers(model)
        self.layers = sorted(routers or softmax_routers)
        self._chosen: dict[int, tuple[torch.Tensor, ...]] = {}  # experts, their logits or activations[, inputs]
        self._is_blockffn, self._input_dtype = bool(routers), input_dtype
        self._num_experts = {layer: mlp.router_proj.out_features for layer, mlp in routers.items()}
        fewest = min(self._num_experts.values(), default=None)
        if fewest is not None and (top_k or 0) > fewest:
            raise ValueError(f"top_k is {top_k}, the model has {fewest} experts")
        # As in RoutingExtractor: the hooks hold these, never the extractor.
        chosen, pending, num_experts = self._chosen, {}, self._num_experts
        handles = [model.register_forward_pre_hook(_clearing(chosen, pending))]
        for layer, mlp in sorted(routers.items()):
            k = top_k or min(DEFAULT_TOP_K, fewest)
            handles.append(mlp.router_act_fn.register_forward_hook(_noting(layer, pending)))
            handles.append(mlp.register_forward_hook(_choosing_strongest(layer, k, input_dtype, pending, chosen)))
        for layer, found in sorted(softmax_routers.items()):
            note = _noting_choice(layer, found.index, top_k, input_dtype, pending, num_experts)
            handles.append(found.router.register_forward_hook(note))
            handles.append(found.block.register_forward_hook(_committing_choice(layer, pending, chosen)))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def get_top_k(self) -> TopK:
        """Experts and gate probabilities of the last forward, all layers on the device of the first.

        During generation with a cache the last forward is the last token's. Raises ValueError before the first forward.
        """
        self._check_captured()
        device = self._chosen[self.layers[0]][0].device
        experts, strength = (
            torch.stack([self._chosen[layer][part].to(device) for layer in self.layers]) for part in (0, 1)
        )
        strength = strength.float()
        if (strength[..., 1:] > strength[..., :-1]).any():  # a router may name its experts in any order
            strength, order = strength.sort(dim=-1, descending=True, stable=True)
            experts = experts.gather(-1, order)
        if self._is_blockffn:
            active = strength > 0
            strength = strength.clamp(min=0)
            gating_probs = strength / strength.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            experts = experts.masked_fill(~active, -1)
        else:
            gating_probs = strength.softmax(dim=-1)
        return TopK(tuple(self.layers), experts.to(torch.int16), gating_probs, max(self._num_experts.values()))

    def get_router_inputs(self) -> torch.Tensor:
        """What the routers were given in the last forward, [L, B, T, D] in `input_dtype`, on the host.

        Raises ValueError before the first forward, and for an extractor without `input_dtype`.
        """
        if self._input_dtype is None:
            raise ValueError("router inputs were not kept: open the extractor with an input_dtype")
        self._check_captured()
        return torch.stack([self._chosen[layer][2] for layer in self.layers])

    def _check_captured(self) -> None:
        if len(self._chosen) < len(self.layers):
            raise ValueError("no routing captured yet: run model(input_ids) while the extractor is open")


@dataclass(frozen=True)
class _SoftmaxRouter:
    """A router module, the decoder layer that holds it, and the place of the logits in the router's output."""

    block: nn.Module
    router: nn.Module
    index: int


@dataclass(frozen=True)
class RouterShape:
    """Which decoder layers have a router and which do not, E, and the routers' own K (None for BlockFFN).

    expert_weights, layer_weights: of one expert, and those that the first layer with a router reads for one token
    (attention, norms, router, K experts and what else it has); None where it has no module `experts`, or no K.
    """

    layers: list[int]
    layers_without_router: list[int]
    num_experts: int
    top_k: int | None
    expert_weights: int | None = None
    layer_weights: int | None = None


def router_shape(model: nn.Module) -> RouterShape:
    """Read off a model without a forward; on the meta device as well. ValueError where no layer has a router."""
    routers, softmax_routers, without = _find_routers(model)
    if routers:
        sizes = max(mlp.router_proj.out_features for mlp in routers.values()), None
        return RouterShape(sorted(routers), without, *sizes)
    first = softmax_routers[min(softmax_routers)]
    weight = next(first.router.parameters())
    with torch.no_grad():
        width = model.config.get_text_config().hidden_size
        # accelerate's hooks (device_map="auto") bring offloaded weights and the input together
        device = "cpu" if hasattr(first.router, "_hf_hook") else weight.device
        output = first.router(torch.zeros(1, width, dtype=weight.dtype, device=device))
    _, experts = _logits_and_experts(first.router, output, first.index)
    num_experts, top_k = output[first.index].shape[-1], experts.shape[-1]
    expert, layer = _weight_counts(first.block, num_experts, top_k)
    return RouterShape(sorted(softmax_routers), without, num_experts, top_k, expert, layer)


def _weight_counts(block: nn.Module, num_experts: int, top_k: int) -> tuple[int | None, int | None]:
    """(weights of one expert, weights that the layer reads for one token); None without a module `experts`."""
    held = [module for name, module in block.named_modules() if name.rpartition(".")[2] == "experts"]
    in_experts = sum(parameter.numel() for module in held for parameter in module.parameters())
    if not in_experts:
        return None, None
    whole = sum(parameter.numel() for parameter in block.parameters())
    expert = in_experts // num_experts
    return expert, whole - in_experts + top_k * expert


def router_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The routers of a model: weight [L, E, D] float32, and activation (a string).

    act(x @ weight.T) ranks the experts for a router input x as `TopKExtractor` does, act being the identity ("softmax")
    or ReLU ("relu", BlockFFN: experts at 0 are inactive; its norm, with a weight for each expert, comes behind that).

    Raises ValueError for routers that are not one matrix (those with a bias, or quantised) and for a BlockFFN with an
    activation other than ReLU.
    """
    routers, softmax_routers, _ = _find_routers(model)
    if any(not isinstance(mlp.router_act_fn, nn.ReLU) for mlp in routers.values()):
        raise ValueError("this BlockFFN's router activation is not ReLU: its routers cannot be saved")
    found = {layer: mlp.router_proj for layer, mlp in routers.items()}
    found |= {layer: softmax_router.router for layer, softmax_router in softmax_routers.items()}
    weights = []
    for _, router in sorted(found.items()):
        with align_module_device(router):  # brings in what device_map="auto" has moved to the host
            parameters = [parameter.detach() for parameter in router.parameters()]
            if len(parameters) != 1 or parameters[0].ndim != 2 or not parameters[0].is_floating_point():
                raise ValueError(f"{type(router).__name__} is not one matrix: its router inputs cannot be saved")
            weights.append(parameters[0].float().cpu().numpy().copy())
    return {"weight": np.stack(weights), "activation": np.array("relu" if routers else "softmax")}


def _find_routers(model: nn.Module) -> tuple[dict[int, nn.Module], dict[int, _SoftmaxRouter], list[int]]:
    """(BlockFFN's MLPs by layer, softmax routers by layer, layers without); one of the two kinds is empty."""
    mlps = {int(match[1]): module for name, module in model.named_modules() if (match := _LAYER.search(name))}
    routers = {layer: mlp for layer, mlp in mlps.items() if hasattr(mlp, "router_act_fn")}
    if routers:
        return routers, {}, sorted(set(mlps) - set(routers))
    softmax_routers, num_layers = _declared_routers(model)
    if not softmax_routers:
        raise ValueError(
            f"{_model_type(model)} has no router (neither layers.N.mlp.router_act_fn nor router logits): routing "
            "signals need a BlockFFN model or a mixture of experts"
        )
    return {}, softmax_routers, sorted(set(range(num_layers)) - set(softmax_routers))


def _declared_routers(model: nn.Module) -> tuple[dict[int, _SoftmaxRouter], int]:
    """Routers that a transformers model declares in `_can_record_outputs`, by layer, and its number of layers.

    A layer's index is its place among the modules of the class declared for `hidden_states`.
    """
    for part in model.modules():
        declared = (getattr(part, "_can_record_outputs", None) or {}) if isinstance(part, PreTrainedModel) else {}
        recorders = _as_list(declared.get("router_logits"))
        block_classes = tuple(_target(recorder) for recorder in _as_list(declared.get("hidden_states")))
        if not recorders or not block_classes:
            continue
        blocks = [module for module in part.modules() if isinstance(module, block_classes)]
        routers = {}
        for layer, block in enumerate(blocks):
            found = [
                _SoftmaxRouter(block, module, getattr(recorder, "index", 1))
                for recorder in recorders
                for name, module in block.named_modules()
                if isinstance(module, _target(recorder)) and _is_named(name, getattr(recorder, "layer_name", None))
            ]
            if len(found) > 1:
                raise ValueError(f"{_model_type(model)} has {len(found)} routers in layer {layer}; one is supported")
            if found:
                routers[layer] = found[0]
        if routers:
            return routers, len(blocks)
    return {}, 0


def _as_list(declared) -> list:
    """What a model declares for one output (nothing, a recorder, a class, a list of them) without names of classes."""
    declared = declared if isinstance(declared, list) else [declared]
    return [entry for entry in declared if isinstance(_target(entry), type)]


def _target(recorder) -> type | None:
    return recorder.target_class if isinstance(recorder, OutputRecorder) else recorder


def _is_named(name: str, layer_name: str | None) -> bool:
    return layer_name is None or f".{layer_name.strip('.')}." in f".{name}."


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def sparsity(router_activations: torch.Tensor) -> np.ndarray:
    """Fraction of exact zeros over the experts: [.., E] -> [..] float64 on the CPU."""
    experts = router_activations.shape[-1]
    return (router_activations == 0).sum(dim=-1).cpu().numpy() / experts


def _clearing(captured: dict, pending: dict):
    def hook(module, arguments):
        captured.clear()
        pending.clear()

    return hook


def _noting(layer: int, pending: dict):
    def hook(module, arguments, output):
        pending[layer] = output.detach()

    return hook


def _committing(layer: int, pending: dict, captured: dict, on_layer: Callable | None):
    # Committed when the whole MLP has run: a look-ahead gate may call the router itself, earlier and on other input.
    def hook(module, arguments, output):
        signal = pending.pop(layer)
        if on_layer is None:
            captured[layer] = signal
        else:
            on_layer(layer, signal)

    return hook


def _noting_softmax(layer: int, index: int, pending: dict):
    def hook(module, arguments, output):
        logits = output[index] if isinstance(output, tuple) else output
        pending[layer] = logits.detach().softmax(dim=-1, dtype=torch.float32)  # [B*T, E]

    return hook


def _committing_rows(layer: int, pending: dict, captured: dict, on_layer: Callable | None):
    """As `_committing`; routers see [B*T, D], so the decoder layer's output says what B and T are."""

    def hook(module, arguments, output):
        signal = _as_batch(pending.pop(layer), output)
        if on_layer is None:
            captured[layer] = signal
        else:
            on_layer(layer, signal)

    return hook


def _noting_choice(
    layer: int, index: int, top_k: int | None, input_dtype: torch.dtype | None, pending: dict, num_experts: dict
):
    def hook(module, arguments, output):
        if layer not in num_experts:
            _check_router(module, output, index, top_k)
            num_experts[layer] = output[index].shape[-1]
        experts = next(part for part in output if not part.is_floating_point())  # [B*T, K]
        pending[layer] = experts, output[index].detach().gather(-1, experts), *_kept(arguments[0], input_dtype)

    return hook


def _logits_and_experts(router: nn.Module, output, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [N, E], chosen experts [N, K]) in a router's output: the tensor at `index`, and the one of integers."""
    parts = output if isinstance(output, tuple) and all(isinstance(part, torch.Tensor) for part in output) else ()
    chosen = [part for part in parts if not part.is_floating_point()]
    if len(parts) != 3 or len(chosen) != 1:
        raise ValueError(
            f"{type(router).__name__} does not say which experts it chose: only top-k softmax routers are supported"
        )
    return parts[index], chosen[0]


def _check_router(router: nn.Module, output, index: int, top_k: int | None) -> None:
    """ValueError unless the router runs the experts with the largest logits, weighted by their softmax (scaled or not).

    output: the router's, (logits [N, E], weights [N, K], experts [N, K]) in any order, the logits at `index`.
    """
    name = type(router).__name__
    logits, experts = _logits_and_experts(router, output, index)
    (weights,) = (part for place, part in enumerate(output) if place != index and part is not experts)
    fits = weights.shape == experts.shape
    if fits:
        # the end of the batch will do; padding, which comes first, may hold NaN
        logits, experts, weights = (part.detach()[-_CHECKED_TOKENS:].float() for part in (logits, experts, weights))
        usable = logits.isfinite().all(dim=-1)
        logits, experts, weights = logits[usable], experts[usable].long(), weights[usable]
        chosen_logits = logits.gather(-1, experts)
        smallest = logits.topk(experts.shape[-1], dim=-1).values[:, -1:]
        difference = weights / weights.sum(dim=-1, keepdim=True) - chosen_logits.softmax(dim=-1)
        fits = bool((chosen_logits >= smallest).all() and (difference.abs() < _WEIGHT_TOLERANCE).all())
    if not fits:
        raise ValueError(f"{name} does not weight its experts by softmax: only top-k softmax routers are supported")
    if top_k is not None and top_k != experts.shape[-1]:
        raise ValueError(f"top_k is {top_k}, but this model's routers choose {experts.shape[-1]} experts")


def _committing_choice(layer: int, pending: dict, chosen: dict):
    def hook(module, arguments, output):
        chosen[layer] = tuple(_as_batch(part, output) for part in pending.pop(layer))

    return hook


def _choosing_strongest(layer: int, top_k: int, input_dtype: torch.dtype | None, pending: dict, chosen: dict):
    def hook(module, arguments, output):
        strength, experts = pending.pop(layer).topk(top_k, dim=-1)
        chosen[layer] = experts, strength, *_kept(arguments[0], input_dtype)

    return hook


def _kept(inputs: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    """(a copy on the host,), where a dtype says that inputs are kept: L layers of them may not fit on the device."""
    return () if dtype is None else (inputs.detach().to("cpu", dtype, copy=True),)


def _as_batch(rows: torch.Tensor, hidden) -> torch.Tensor:
    """[B*T, X] -> [B, T, X], B and T being those of a decoder layer's output."""
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return rows.view(*hidden.shape[:2], rows.shape[-1])


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()

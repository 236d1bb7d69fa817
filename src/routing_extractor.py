"""Routers, read by forward hooks that leave the forward bit for bit as it was: BlockFFN's and top-k softmax routers.

A BlockFFN router gives one activation per expert, exactly zero for inactive ones. The routers of Hugging Face MoE
models (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE ...) give logits and run the K strongest experts. Those are found by the
class that the model itself declares as the source of `output_router_logits`, not by the names of its attributes.

`RoutingExtractor` captures the signal of all E experts, `TopKExtractor` the K strongest with their gate probabilities,
and what the routers were given where that is wanted; `router_arrays` are the routers themselves.
"""

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from src.models.families import model_type_of

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")
# Experts that are named where the model has no K of its own (BlockFFN), unless E is smaller.
DEFAULT_TOP_K = 8
# A router's own weights of its K experts, over their sum, may differ so much from the softmax of the logits: rounding
# to bfloat16. Sigmoid routers and those with a bias differ by more.
_WEIGHT_TOLERANCE = 2e-2
_CHECKED_TOKENS = 256  # of the first forward, per layer


@dataclass(frozen=True)
class TopK:
    """The K strongest experts of every token at the L layers that have a router."""

    layers: tuple[int, ...]  # indices of those decoder layers, ascending
    experts: torch.Tensor  # [L, B, T, K] int16, strongest first; -1 where fewer than K are active
    gating_probs: torch.Tensor  # [L, B, T, K] float32, of sum 1 over the K chosen; 0 where `experts` is -1
    num_experts: int  # E


@dataclass(frozen=True)
class _Router:
    """The modules of a router."""

    block: nn.Module  # that runs it: BlockFFN's MLP, or the decoder layer
    matrix: nn.Module  # that is given its input [.., D] and holds its weights [E, D]
    output: nn.Module  # whose output tells the choice: BlockFFN's activation function, else `matrix` itself
    index: int | None = None  # the place of the logits in that output; None for BlockFFN


class _RouterHooks:
    """Hooks on a model's routers, removed at the end of a `with`, by `close()`, or with the last reference to this."""

    def _find(self, model: nn.Module) -> dict[int, _Router]:
        """The routers by layer. They are not kept: an extractor that outlives its model must not keep it alive."""
        routers, self.layers_without_router = _find_routers(model)
        self.layers = list(routers)
        self._is_blockffn = routers[self.layers[0]].index is None
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        return routers

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Remove the hooks; harmless when done twice."""
        self._finalizer()

    def _watch(
        self, model: nn.Module, routers: dict[int, _Router], kept: Sequence[dict], note: Callable, commit: Callable
    ) -> None:
        """Call note(layer, index, module, output) -> tensors [.., X] whenever a router has run, and commit(layer,
        *tensors [B, T, X]) when all of its block has: a look-ahead gate may call it earlier, on other input.

        `kept` are emptied before every forward. The hooks hold them, never the extractor (nor may `note` and `commit`):
        else the model would keep an abandoned extractor alive.
        """
        pending: dict[int, tuple[torch.Tensor, ...]] = {}

        def clear(module, arguments):
            for captured in (*kept, pending):
                captured.clear()

        def noting(layer, index, module, arguments, output):
            pending[layer] = note(layer, index, module, output)

        def committing(layer, module, arguments, output):
            hidden = output[0] if isinstance(output, tuple) else output
            # softmax routers see [B*T, D], so the block's output says what B and T are
            commit(layer, *(rows.view(*hidden.shape[:2], rows.shape[-1]) for rows in pending.pop(layer)))

        self._handles.append(model.register_forward_pre_hook(clear))
        for layer, router in routers.items():
            self._handles.append(router.output.register_forward_hook(partial(noting, layer, router.index)))
            self._handles.append(router.block.register_forward_hook(partial(committing, layer)))


class RoutingExtractor(_RouterHooks):
    """Captures every layer's router activations, the output of `router_act_fn`, at each forward.

        extractor = RoutingExtractor(model)
        model(input_ids)
        signals = extractor.get_routing_signals()       # {layer: [B, T, E]}
        stats = extractor.compute_sparsity_stats()

    On a model with top-k softmax routers the signal is the raw softmax over all experts, float32. Layers without a
    router are left out; `layers_without_router` names them. A model with sidecars works as well: only `mlp` is hooked.
    It is a context manager too; `close()` removes the hooks, and so does dropping the last reference to it. What was
    captured stays readable. Raises ValueError, naming the model type, for a model without router.
    """

    def __init__(self, model: nn.Module, on_layer: Callable[[int, torch.Tensor], None] | None = None):
        """on_layer(layer, router_activations [B, T, E]), where given, is called once per layer in each forward, and
        nothing is kept, so that a long evaluation holds one layer's signal at a time."""
        captured: dict[int, torch.Tensor] = {}
        self._captured = captured

        def note(layer, index, module, output):
            if index is None:
                return (output.detach(),)
            logits = output[index] if isinstance(output, tuple) else output
            return (logits.detach().softmax(dim=-1, dtype=torch.float32),)

        def keep(layer, signal):
            captured[layer] = signal

        self._watch(model, self._find(model), [captured], note, on_layer or keep)

    def get_routing_signals(self) -> dict[int, torch.Tensor]:
        """Router activations of the last forward, {layer: [B, T, E]}, detached, on the model's device and in its dtype;
        of a softmax router the softmax of its logits in float32, as the router computes it.

        During generation with a cache the last forward is the last token's. Raises ValueError before the first forward.
        """
        if not self._captured:
            raise ValueError("no routing signal captured yet: run model(input_ids) while the extractor is open")
        return dict(sorted(self._captured.items()))

    def token_sparsity(self) -> np.ndarray:
        """Fraction of exact zeros among each token's router activations, [L, B, T] float64; BlockFFN only."""
        if not self._is_blockffn:
            raise ValueError("sparsity needs a BlockFFN model: the signal of a softmax router has no exact zeros")
        signals = self.get_routing_signals().values()
        return np.stack([(signal == 0).sum(dim=-1).cpu().numpy() / signal.shape[-1] for signal in signals])

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


class TopKExtractor(_RouterHooks):
    """Captures which K experts every token uses at each layer, and how strongly, at each forward: [B, T, K] per layer.

        with TopKExtractor(model) as extractor:
            model(input_ids)
            top_k = extractor.get_top_k()               # experts and gating_probs [L, B, T, K]

    Top-k softmax routers: the experts that the router itself chose, and the softmax over their logits (what Mixtral
    multiplies the experts' outputs by; OLMoE and Qwen2-MoE skip the renormalisation unless `norm_topk_prob` is set).
    BlockFFN: the K largest router activations above zero, over their sum. With `input_dtype` it keeps the routers'
    inputs too, see `get_router_inputs`. Raises ValueError, naming the model type, for a model without router, and at
    the first forward for a router that is not a top-k softmax router.
    """

    def __init__(self, model: nn.Module, top_k: int | None = None, input_dtype: torch.dtype | None = None):
        """top_k: K for BlockFFN (None: 8, or E where that is smaller). A softmax router has a K of its own: ValueError
        at the first forward where `top_k` is another one. input_dtype: in which the routers' inputs are kept; None
        keeps none.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        routers = self._find(model)
        chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # experts, and their logits or activations
        inputs: dict[int, torch.Tensor] = {}
        num_experts: dict[int, int] = {}
        self._chosen, self._inputs, self._num_experts, self._input_dtype = chosen, inputs, num_experts, input_dtype
        if self._is_blockffn:
            num_experts |= {layer: router.matrix.out_features for layer, router in routers.items()}
            fewest = min(num_experts.values())
            if (top_k or 0) > fewest:
                raise ValueError(f"top_k is {top_k}, the model has {fewest} experts")
            top_k = top_k or min(DEFAULT_TOP_K, fewest)

        def note(layer, index, module, output):
            if index is None:
                strength, experts = output.detach().topk(top_k, dim=-1)
                return experts, strength
            if layer not in num_experts:
                _check_router(module, output, index, top_k)
                num_experts[layer] = output[index].shape[-1]
            experts = next(part for part in output if not part.is_floating_point())  # [B*T, K]
            return experts, output[index].detach().gather(-1, experts)

        def keep(layer, experts, strength):
            chosen[layer] = experts, strength

        def keep_inputs(layer, module, arguments, output):
            # on the host: L layers of them may not fit on the device
            inputs[layer] = arguments[0].detach().to("cpu", input_dtype, copy=True)

        self._watch(model, routers, [chosen, inputs], note, keep)
        if input_dtype is not None:
            for layer, router in routers.items():
                self._handles.append(router.matrix.register_forward_hook(partial(keep_inputs, layer)))

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
        """What the routers were given in the last forward, [L, B, T, D] in `input_dtype`, on the host."""
        if self._input_dtype is None:
            raise ValueError("router inputs were not kept: open the extractor with an input_dtype")
        self._check_captured()
        batch, tokens = self._chosen[self.layers[0]][0].shape[:2]
        return torch.stack([self._inputs[layer].view(batch, tokens, -1) for layer in self.layers])

    def _check_captured(self) -> None:
        if len(self._chosen) < len(self.layers):
            raise ValueError("no routing captured yet: run model(input_ids) while the extractor is open")


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
    routers, without = _find_routers(model)
    layers, first = list(routers), next(iter(routers.values()))
    if first.index is None:
        return RouterShape(layers, without, max(router.matrix.out_features for router in routers.values()), None)
    weight = next(first.matrix.parameters())
    width = model.config.get_text_config().hidden_size
    # accelerate's hooks (device_map="auto") bring offloaded weights and the input together
    device = "cpu" if hasattr(first.matrix, "_hf_hook") else weight.device
    with torch.no_grad():
        output = first.matrix(torch.zeros(1, width, dtype=weight.dtype, device=device))
    logits, experts = _logits_and_experts(first.matrix, output, first.index)
    num_experts, top_k = logits.shape[-1], experts.shape[-1]
    held = [module for name, module in first.block.named_modules() if name.rpartition(".")[2] == "experts"]
    in_experts = sum(parameter.numel() for module in held for parameter in module.parameters())
    if not in_experts:
        return RouterShape(layers, without, num_experts, top_k)
    whole, expert = sum(parameter.numel() for parameter in first.block.parameters()), in_experts // num_experts
    return RouterShape(layers, without, num_experts, top_k, expert, whole - in_experts + top_k * expert)


def router_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The routers of a model: weight [L, E, D] float32, and activation (a string).

    act(x @ weight.T) ranks the experts for a router input x as `TopKExtractor` does, act being the identity ("softmax")
    or ReLU ("relu", BlockFFN: experts at 0 are inactive; its norm, with a weight for each expert, comes behind that).

    Raises ValueError for routers that are not one matrix (those with a bias, or quantised) and for a BlockFFN with an
    activation other than ReLU.
    """
    routers = _find_routers(model)[0].values()
    is_blockffn = any(router.index is None for router in routers)
    if is_blockffn and not all(isinstance(router.output, nn.ReLU) for router in routers):
        raise ValueError("this BlockFFN's router activation is not ReLU: its routers cannot be saved")
    weights = []
    for module in (router.matrix for router in routers):
        with align_module_device(module):  # brings in what device_map="auto" has moved to the host
            parameters = [parameter.detach() for parameter in module.parameters()]
            if len(parameters) != 1 or parameters[0].ndim != 2 or not parameters[0].is_floating_point():
                raise ValueError(f"{type(module).__name__} is not one matrix: its router inputs cannot be saved")
            weights.append(parameters[0].float().cpu().numpy().copy())
    return {"weight": np.stack(weights), "activation": np.array("relu" if is_blockffn else "softmax")}


def _find_routers(model: nn.Module) -> tuple[dict[int, _Router], list[int]]:
    """The routers by layer, ascending, all of one kind (BlockFFN's or softmax routers), and the layers without."""
    mlps = {int(match[1]): module for name, module in model.named_modules() if (match := _LAYER.search(name))}
    routers = {
        layer: _Router(mlp, mlp.router_proj, mlp.router_act_fn)
        for layer, mlp in sorted(mlps.items())
        if hasattr(mlp, "router_act_fn")
    }
    layers = set(mlps)
    if not routers:
        routers, num_layers = _declared_routers(model)
        layers = set(range(num_layers))
    if not routers:
        raise ValueError(
            f"{model_type_of(model)} has no router (neither layers.N.mlp.router_act_fn nor router logits): routing "
            "signals need a BlockFFN model or a mixture of experts"
        )
    return routers, sorted(layers - set(routers))


def _declared_routers(model: nn.Module) -> tuple[dict[int, _Router], int]:
    """Routers that a transformers model declares in `_can_record_outputs`, by layer, and its number of layers.

    A layer's index is its place among the modules of the class declared for `hidden_states`.
    """
    for part in model.modules():
        declared = (getattr(part, "_can_record_outputs", None) or {}) if isinstance(part, PreTrainedModel) else {}
        recorders = _recorders(declared.get("router_logits"))
        block_classes = tuple(recorder.target_class for recorder in _recorders(declared.get("hidden_states")))
        blocks = [module for module in part.modules() if isinstance(module, block_classes)] if recorders else []
        routers = {}
        for layer, block in enumerate(blocks):
            found = [
                _Router(block, module, module, recorder.index)
                for recorder in recorders
                for name, module in block.named_modules()
                if isinstance(module, recorder.target_class)
                and (recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}.")
            ]
            if len(found) > 1:
                raise ValueError(f"{model_type_of(model)} has {len(found)} routers in layer {layer}; one is supported")
            if found:
                routers[layer] = found[0]
        if routers:
            return routers, len(blocks)
    return {}, 0


def _recorders(declared) -> list[OutputRecorder]:
    """What a model declares for one output (nothing, a recorder, a class, a list of them) without names of classes.

    Of the output of a bare class transformers records the second part.
    """
    entries = declared if isinstance(declared, list) else [declared]
    recorders = [entry if isinstance(entry, OutputRecorder) else OutputRecorder(entry, index=1) for entry in entries]
    return [recorder for recorder in recorders if isinstance(recorder.target_class, type)]


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


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()

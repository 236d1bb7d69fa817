"""Router signals of a BlockFFN model, captured by forward hooks that leave the forward bit for bit as it was."""

import re
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


class RoutingExtractor:
    """Captures every layer's router activations, the output of `router_act_fn`, at each forward.

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
        routers = {int(match[1]): module for name, module in model.named_modules() if (match := _LAYER.search(name))}
        routers = {layer: mlp for layer, mlp in routers.items() if hasattr(mlp, "router_act_fn")}
        if not routers:
            model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise ValueError(
                f"{model_type} has no router (no layers.N.mlp.router_act_fn): routing signals need a BlockFFN model"
            )
        self.layers = sorted(routers)
        self._captured: dict[int, torch.Tensor] = {}
        # The hooks hold these two, never the extractor: else the model would keep an abandoned extractor alive.
        captured, pending = self._captured, {}
        handles = [model.register_forward_pre_hook(_clearing(captured, pending))]
        for layer, mlp in sorted(routers.items()):
            handles.append(mlp.router_act_fn.register_forward_hook(_noting(layer, pending)))
            handles.append(mlp.register_forward_hook(_committing(layer, pending, captured, on_layer)))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Remove the hooks; harmless when done twice."""
        self._finalizer()

    def clear(self) -> None:
        """Forget what was captured."""
        self._captured.clear()

    def get_routing_signals(self) -> dict[int, torch.Tensor]:
        """Router activations of the last forward, {layer: [B, T, E]}, detached, on the model's device and in its dtype.

        During generation with a cache the last forward is the last token's. Raises ValueError before the first forward.
        """
        if not self._captured:
            raise ValueError("no routing signal captured yet: run model(input_ids) while the extractor is open")
        return dict(sorted(self._captured.items()))

    def token_sparsity(self) -> np.ndarray:
        """Fraction of exact zeros among each token's router activations, [L, B, T] float64."""
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


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()

"""The hybrid layer and what the attached layers of one model share: gate, state of the forward pass, record, hooks."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from src.eval_utils import WindowRef
from src.hybrid.cache import HybridCacheLayer, hybrid_cache_layer
from src.hybrid.gates import (
    ActivationGate,
    Gate,
    GateInputs,
    LearnedGate,
    MaskGate,
    RoutingGate,
    activation_sparsity,
    document_key,
    mamba_share,
    sparsity,
    with_alpha,
)
from src.hybrid.record import ForwardState, GateRecord
from src.hybrid.sidecar import MambaSidecar, SidecarSettings
from src.models.families import decoder_layers, is_gated_mlp


class SidecarAttachment:
    """What the attached sidecars of one model share: the gate, the state of the running forward pass, hooks to undo.

    Reachable as `attachment_of(model)`.
    """

    def __init__(self, model: nn.Module, layers: list[int], settings: SidecarSettings):
        self.model = model
        self.layers = layers
        self.settings = settings
        self.gate: Gate | None = None
        self.state: ForwardState | None = None
        self.record: GateRecord | None = None
        self.bypassed = False
        # Set while training only: layer -> [B, T] shares, and noise added to learned scores.
        self.batch_masks: dict[int, torch.Tensor] | None = None
        self.score_noise: dict[int, torch.Tensor] | None = None
        self._told: list[WindowRef] | None = None
        self._rows: tuple[list[str] | None, torch.Tensor, list[int]] | None = None
        self._signal_hooks: list = []
        self._model_hook = model.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def hybrid_layers(self) -> list["GatedHybridLayer"]:
        """The attached layers, in order of their indices."""
        layers = decoder_layers(self.model)
        return [layers[index].self_attn for index in self.layers]

    def on_batch(self, windows: Sequence[WindowRef]) -> None:
        """Say which document, and which part of it, each row of the coming batch holds (`score_documents` calls this).

        In force until told otherwise, for every uncached or first forward whose rows have just these lengths, and for
        what continues its cache. Rows of other forwards (a prompt, say) are documents of key 0, from position 0.
        """
        self._told = list(windows)

    def set_gate(self, gate: Gate) -> None:
        """See the function `set_gate`."""
        hooks = []
        if isinstance(gate, ActivationGate):
            sources = self.activation_sources()
            absent = sorted(set(sources) - set(gate.cutoffs or {}))
            if absent:
                raise ValueError(
                    f"the activation gate has no cutoff for layer {', '.join(map(str, absent))}: "
                    "take the gate that calibrate_gates returns for these layers"
                )
            hooks = [(module, self._sparsity_hook(source, gate.cutoffs[source])) for source, module in sources.items()]
        if isinstance(gate, RoutingGate):
            for source in self._source_layers(gate.signal):
                mlp = getattr(decoder_layers(self.model)[source], "mlp", None)
                if not hasattr(mlp, "router_proj") or not hasattr(mlp, "router_act_fn"):
                    raise ValueError(
                        f"a routing gate needs a BlockFFN router, which layer {source} of this "
                        f"{self.model.config.model_type} model has not: use gate mode fixed, learned or random, or an "
                        "ActivationGate"
                    )
                if gate.signal == "previous":
                    hooks.append((mlp.router_act_fn, self._sparsity_hook(source)))
        for hook in self._signal_hooks:
            hook.remove()
        self._signal_hooks = [module.register_forward_hook(hook) for module, hook in hooks]
        self.gate = gate

    def activation_sources(self) -> dict[int, nn.Module]:
        """For every attached layer l: l - 1 -> `down_proj` of its MLP, whose input is the activations h [B, T, I].

        Raises ValueError where layer 0 is attached, and for an MLP that is not dense and gated.
        """
        sources = {}
        for source in self._source_layers("ffn_previous"):
            mlp = getattr(decoder_layers(self.model)[source], "mlp", None)
            if not is_gated_mlp(mlp):
                raise ValueError(
                    "an activation gate needs a dense gated MLP (gate_proj, up_proj, down_proj, act_fn); "
                    f"layer {source} of this {self.model.config.model_type} model has {type(mlp).__name__}"
                )
            sources[source] = mlp.down_proj
        return sources

    def share(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor | float:
        """m of one layer in the running forward pass; `hidden_states` [B, T, D] is the layer's normed input."""
        state = self.state
        if state is None or state.shape != tuple(hidden_states.shape[:2]):
            raise ValueError("a hybrid layer must run inside its model's forward pass: call the model, not the layer")
        scores = self._scores(layer, hidden_states)
        inputs = GateInputs(scores, state.document_keys, state.positions, self._masks(layer))
        share = mamba_share(self.gate, layer, inputs)
        if self.record is not None:
            self.record.add(layer, share, scores, state)
        return share

    def detach(self) -> None:
        """Give every layer its own attention back and take every hook off the model."""
        for layer in decoder_layers(self.model):
            if isinstance(layer.self_attn, GatedHybridLayer):
                layer.self_attn = layer.self_attn.attention
        for hook in (self._model_hook, *self._signal_hooks):
            hook.remove()

    def _source_layers(self, signal: str) -> list[int]:
        """The layers whose feed-forward parts a gate of this signal reads."""
        if signal == "lookahead":
            return self.layers
        if self.layers[0] == 0:
            raise ValueError(
                f"layer 0 has no layer before it: with signal {signal!r} choose layers from 1 on "
                "(a routing gate can also have signal 'lookahead')"
            )
        return [layer - 1 for layer in self.layers]

    def _scores(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if isinstance(self.gate, (RoutingGate, ActivationGate)):
            if self.gate.signal in ("previous", "ffn_previous"):
                return self.state.sparsity[layer - 1].to(hidden_states.device)
            mlp = decoder_layers(self.model)[layer].mlp
            # `.forward`: this call is ours, hooks that capture the router's own pass must not see it
            return sparsity(mlp.router_act_fn.forward(mlp.router_proj.forward(hidden_states)))
        if isinstance(self.gate, LearnedGate):
            with torch.autocast(hidden_states.device.type, enabled=False):
                scores = decoder_layers(self.model)[layer].self_attn.gate_proj(hidden_states.float()).squeeze(-1)
            return scores if self.score_noise is None else scores + self.score_noise[layer]
        return None

    def _masks(self, layer: int) -> torch.Tensor | None:
        if not isinstance(self.gate, MaskGate):
            return None
        if self.batch_masks is not None:
            return self.batch_masks[layer]
        if self.state.documents is None:
            return None
        positions, rows, real = self.state.positions.cpu(), [], self.state.padding_mask
        for row, document in enumerate(self.state.documents):
            if layer not in self.gate.masks.get(document, {}):
                raise ValueError(f"the offline masks have nothing for layer {layer} of document {document!r}")
            mask = torch.as_tensor(np.asarray(self.gate.masks[document][layer], dtype=np.float32))
            where = positions[row]
            end = int((where if real is None else where[real[row].cpu()]).max()) + 1
            if end > len(mask):
                raise ValueError(
                    f"the offline mask of document {document!r} ends at {len(mask)}, the text goes on to {end}"
                )
            rows.append(mask[where.clamp(0, len(mask) - 1)])
        return torch.stack(rows).to(self.state.positions.device)

    def _sparsity_hook(self, layer: int, cutoff: float | None = None):
        """Keeps the sparsity of what a router puts out or, below a cutoff, of the activations that a down_proj gets."""

        def keep(_module, inputs, output):
            if self.state is not None and not self.bypassed:
                found = sparsity(output) if cutoff is None else activation_sparsity(inputs[0], cutoff)
                self.state.sparsity[layer] = found

        return keep

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Collect padding, positions and documents before the decoder's forward."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        inputs = given.get("input_ids")
        inputs = given["inputs_embeds"] if inputs is None else inputs
        batch, tokens = inputs.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = given.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 2 and not bool((mask != 0).all()):
            real = mask.to(inputs.device) != 0
            positions = (real.cumsum(dim=-1) - 1).clamp_min(0)
            if real.shape[1] != past + tokens:  # a mask of the new tokens only
                positions = positions + past
            real, positions = real[:, -tokens:], positions[:, -tokens:]
        else:
            real = None
            positions = torch.arange(past, past + tokens, device=inputs.device).expand(batch, -1)
        if past == 0 or self._rows is None or len(self._rows[1]) != batch:
            self._rows = self._match_rows(batch, tokens, real, inputs.device)
        documents, keys, starts = self._rows
        offsets = torch.tensor(starts, device=inputs.device)
        self.state = ForwardState(past, (batch, tokens), real, keys, positions + offsets[:, None], documents, starts)

    def _match_rows(self, batch: int, tokens: int, real: torch.Tensor | None, device):
        """(document ids or None, keys [B], window starts) of a batch that starts without a cache."""
        if self._told is not None and len(self._told) == batch:
            lengths = [tokens] * batch if real is None else real.sum(dim=-1).tolist()
            if lengths == [window.length for window in self._told]:
                names = [window.document for window in self._told]
                keys = torch.tensor([document_key(name) for name in names], device=device)
                return names, keys, [window.start for window in self._told]
        return None, torch.zeros(batch, dtype=torch.int64, device=device), [0] * batch


class GatedHybridLayer(nn.Module):
    """y = (1 - m) * attention(x) + m * mamba(x) in place of a decoder layer's `self_attn`; m [B, T] from the gate.

    Where m is the same for every token, a path without weight does not run: alpha 0 returns attention's own output,
    alpha 1 the sidecar's. A gate per token runs both.
    """

    def __init__(self, attention: nn.Module, sidecar: MambaSidecar, attachment: SidecarAttachment, layer: int):
        super().__init__()
        self.attention = attention
        self.sidecar = sidecar
        self.gate_proj = nn.Linear(sidecar.config.hidden_size, 1)
        for parameter in self.gate_proj.parameters():
            nn.init.zeros_(parameter)
        self.attachment = attachment
        self.layer_idx = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,  # whatever this architecture's decoder layer hands to its attention
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map [B, T, D] to ([B, T, D], attention weights or None)."""
        kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
        if self.attachment.bypassed:
            return self.attention(hidden_states=hidden_states, **kwargs)
        share = self.attachment.share(self.layer_idx, hidden_states)
        constant = not torch.is_tensor(share)
        use_attention, use_mamba = not constant or share != 1.0, not constant or share != 0.0
        if past_key_values is not None:
            entry = hybrid_cache_layer(past_key_values, self.layer_idx)
            self._check_cache(entry, use_attention, use_mamba)
        output = weights = None
        if use_attention:
            output, weights = self.attention(hidden_states=hidden_states, **kwargs)
        if use_mamba:
            mamba = self.sidecar(hidden_states, past_key_values, self.attachment.state.padding_mask)
            if past_key_values is not None:
                entry.mamba_tokens += hidden_states.shape[1]
            if output is None:
                return mamba, None
            share = share if constant else share.to(output.dtype).unsqueeze(-1)
            output = (1.0 - share) * output + share * mamba.to(output.dtype)
        return output, weights

    def _check_cache(self, entry: HybridCacheLayer, use_attention: bool, use_mamba: bool) -> None:
        past, held = self.attachment.state.past, {}
        if use_attention:
            held["attention"] = entry.attention_tokens()
        if use_mamba:
            held["the sidecar"] = entry.mamba_tokens
        for path, seen in held.items():
            if seen != past:
                raise ValueError(
                    f"the cache holds {past} tokens, of which {path} of layer {self.layer_idx} has seen {seen} "
                    "(was alpha 0 or 1 meanwhile?); start a new cache when the gate changes"
                )


def is_attached(model: nn.Module) -> bool:
    """Whether the model has sidecars."""
    return any(isinstance(layer.self_attn, GatedHybridLayer) for layer in decoder_layers(model))


def attachment_of(model: nn.Module) -> SidecarAttachment:
    """What the model's sidecars share. Raises ValueError when none are attached."""
    for layer in decoder_layers(model):
        if isinstance(layer.self_attn, GatedHybridLayer):
            return layer.self_attn.attachment
    raise ValueError("the model has no sidecars; call attach_mamba_sidecar first")


def set_gate(model: nn.Module, gate: Gate) -> None:
    """Give all attached sidecars another gate.

    Raises ValueError for a routing gate on a model without BlockFFN routers, an activation gate without cutoffs or on a
    model without dense gated MLPs, and for signal `previous` or `ffn_previous` on layer 0.
    """
    attachment_of(model).set_gate(gate)


def set_all_alphas(model: nn.Module, alpha: float) -> None:
    """Another (mean) mamba share for all layers, the gate's other settings unchanged.

    Raises ValueError for alpha outside [0, 1] or an offline mask.
    """
    attachment = attachment_of(model)
    attachment.set_gate(with_alpha(attachment.gate, alpha))


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecord]:
    """Record what the gates do in the forward passes inside; for more than sums, tell documents by `on_batch`."""
    attachment = attachment_of(model)
    before, attachment.record = attachment.record, GateRecord()
    try:
        yield attachment.record
    finally:
        attachment.record = before


@contextmanager
def bypass_sidecars(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, bit by bit, while its sidecars stay attached (the reference of a KL divergence, say)."""
    attachment = attachment_of(model)
    before, attachment.bypassed = attachment.bypassed, True
    try:
        yield model
    finally:
        attachment.bypassed = before


@torch.no_grad()
def base_logits(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of the base model while sidecars are attached: `partial(base_logits, model)` is a reference of
    `eval_utils.score_documents`. input_ids, attention_mask [B, T]."""
    with bypass_sidecars(model):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

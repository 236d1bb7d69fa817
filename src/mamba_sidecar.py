"""Mamba-2 sidecars beside a decoder's attention, mixed token by token by a gate.

    model = attach_mamba_sidecar(model, layer_indices=[4, 5, 6, 7], alpha=0.5, gate_mode="routing")
    set_all_alphas(model, alpha=0.3)
    set_gate(model, calibrate_gates(model, RoutingGate(alpha=0.5, hard=True), documents, max_seq_len=1024))
    with record_gates(model) as record:
        score_documents(model, documents, ..., on_batch=attachment_of(model).on_batch)
    set_gate(model, MaskGate(matched_random_masks(record.shares, seed=0)))
    detach_mamba_sidecars(model)

`GatedHybridLayer` takes the place of a decoder layer's `self_attn`. The sidecar is transformers' `Mamba2Mixer`: exact
PyTorch everywhere, mamba-ssm kernels where transformers found them when it was imported (`mamba_kernels`), the same
weights for both. Works on every causal LM with `model.model.layers[i].self_attn`.

Nothing but the `self_attn` attributes and a few hooks changes on the model, and `detach_mamba_sidecars` puts both back.
Caches: the layer's entry in the DynamicCache is replaced, while still empty, by one that also holds the Mamba state, so
neither the configuration nor the cache class needs to know of sidecars.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm
from transformers import Mamba2Config
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from src.eval_utils import WindowRef
from src.gates import (
    ActivationGate,
    Gate,
    GateInputs,
    LearnedGate,
    MaskGate,
    RoutingGate,
    ScoredGate,
    ScoreDistribution,
    activation_sparsity,
    document_key,
    make_gate,
    mamba_share,
    sparsity,
    with_alpha,
)
from src.model_loading import decoder_layers, is_gated_mlp
from src.text_data import TokenDocument

INITS = ("random", "attention")
STAGES = ("a", "b")
FORMAT = 1  # of sidecars.json
RETRAIN = "python scripts/04_test_sidecar.py --retrain"
# The functions of transformers' Mamba-2 that have kernels.
KERNEL_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update",
    "mamba2_chunk_scan",
)
# Calibration stops early once every layer's realised share is this near to the one asked.
SHARE_TOLERANCE = 0.005


@dataclass(frozen=True)
class SidecarSettings:
    """Geometry of the sidecars, in the names of Mamba-2 (arXiv 2405.21060).

    init: `random` (torch's and transformers' own initialisation), or `attention`: x from the layer's V, B from K and C
        from Q per head, out_proj from O (as in "The Mamba in the Llama", arXiv 2408.15237); then d_state = headdim =
        attention's head width, one group per head and expand 1, whatever the other fields say.
    chunk_size: tokens per block of the chunked scan; speed only (64 was fastest in PyTorch on CPU).
    """

    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    n_groups: int = 1
    chunk_size: int = 64
    init: str = "random"

    def __post_init__(self):
        if self.init not in INITS:
            raise ValueError(f"unknown Mamba init {self.init!r}; choose one of {', '.join(INITS)}")
        for name in ("d_state", "d_conv", "expand", "headdim", "n_groups", "chunk_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"sidecar {name} is {getattr(self, name)!r}; it must be a whole number of at least 1")


def sidecar_config(hidden_size: int, layer: int, settings: SidecarSettings) -> Mamba2Config:
    """transformers' configuration of one sidecar. Raises ValueError where width and heads do not fit."""
    inner = hidden_size * settings.expand
    if inner % settings.headdim or (inner // settings.headdim) % settings.n_groups:
        raise ValueError(
            f"a sidecar of inner width {inner} (hidden size {hidden_size} x expand {settings.expand}) does not divide "
            f"into heads of width {settings.headdim} in {settings.n_groups} group(s); change headdim or expand"
        )
    return Mamba2Config(
        hidden_size=hidden_size,
        num_heads=inner // settings.headdim,
        head_dim=settings.headdim,
        state_size=settings.d_state,
        expand=settings.expand,
        conv_kernel=settings.d_conv,
        n_groups=settings.n_groups,
        chunk_size=settings.chunk_size,
        num_hidden_layers=layer + 1,
    )


class MambaSidecar(nn.Module):
    """One Mamba-2 mixer, [B, T, D] -> [B, T, D], deaf to padding, continuing from a cache where there is one.

    Computes in its weights' dtype even under autocast: the scan's sums over hundreds of tokens lose too much in 16
    bits, and the scan, not the projections, is what takes the time.
    """

    def __init__(self, hidden_size: int, layer: int, settings: SidecarSettings = SidecarSettings(), seed: int = 0):
        """Untrained; `seed` and `layer` fix the weights, and the global random state is left alone."""
        super().__init__()
        self.config = sidecar_config(hidden_size, layer, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * seed + layer)
            self.mixer = Mamba2Mixer(self.config, layer_idx=layer)

    def forward(
        self, hidden_states: torch.Tensor, cache: Cache | None = None, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D]. `padding_mask` [B, T]: True for real tokens, None when all are.

        A `cache` must hold a `HybridCacheLayer` at this layer's index; its conv and SSM states are read and advanced.
        """
        dtype, device = self.mixer.out_proj.weight.dtype, hidden_states.device.type
        # kernels are bound for the whole process, but know no CPU tensors
        scan = pytorch_scan() if device == "cpu" else nullcontext()
        with torch.autocast(device, enabled=False), scan:
            output = self.mixer(hidden_states.to(dtype), cache_params=cache, attention_mask=padding_mask)
        return output.to(hidden_states.dtype)


def attention_settings(
    attention: nn.Module, hidden_size: int, layer: int, settings: SidecarSettings
) -> SidecarSettings:
    """The geometry that init `attention` imposes: one Mamba head per attention head.

    Raises ValueError for MLA (it has no q_proj, k_proj, v_proj), quantised projections, or heads that do not add up to
    the hidden size.
    """
    projections = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if any(projection is None for projection in projections):
        raise ValueError(
            f"Mamba init 'attention' copies q_proj, k_proj, v_proj and o_proj of vanilla attention; layer {layer} has "
            f"{type(attention).__name__} without them (MLA?): use init 'random'"
        )
    if not all(projection.weight.is_floating_point() for projection in projections):
        raise ValueError(f"Mamba init 'attention' cannot copy the quantised projections of layer {layer}: use 'random'")
    width = attention.head_dim
    if projections[0].out_features != hidden_size:
        raise ValueError(
            f"Mamba init 'attention' needs heads that add up to the hidden size; layer {layer} has "
            f"{projections[0].out_features} against {hidden_size}: use init 'random'"
        )
    return replace(settings, d_state=width, headdim=width, expand=1, n_groups=hidden_size // width)


@torch.no_grad()
def init_from_attention(sidecar: MambaSidecar, attention: nn.Module) -> None:
    """Copy attention's projections into a sidecar of `attention_settings`: linear attention with decay.

    Shared K/V heads are repeated. The convolution starts as the identity. RoPE, biases and q/k norms have no
    counterpart and are left out; z and dt keep their random initialisation.
    """
    mixer = sidecar.mixer
    inner, heads = mixer.intermediate_size, mixer.num_heads

    def per_head(projection):
        weight = projection.weight.unflatten(0, (-1, mixer.head_dim))
        return weight.repeat_interleave(heads // weight.shape[0], dim=0).flatten(0, 1)

    rows = torch.cat([per_head(attention.v_proj), per_head(attention.k_proj), per_head(attention.q_proj)])
    mixer.in_proj.weight[inner : inner + len(rows)].copy_(rows)  # in_proj's rows: z, x, B, C, dt
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, :, -1] = 1.0
    mixer.conv1d.bias.zero_()


# ---------------------------------------------------------------- cache


class HybridCacheLayer(LinearAttentionAndFullAttentionLayer):
    """A cache entry with keys and values, Mamba states, or both; its length counts tokens whichever path saw them.

    transformers' own class takes its length from the keys, which is 0 when every layer is at alpha 1: RoPE and masks of
    the other layers would then start again at 0.
    """

    def __init__(self):
        super().__init__()
        self.mamba_tokens = 0

    def attention_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return DynamicLayer.get_seq_length(self)

    def get_seq_length(self) -> int:
        """Tokens seen, by either path."""
        return max(self.attention_tokens(), self.mamba_tokens)

    def reset(self) -> None:
        """Empty the entry."""
        super().reset()
        self.mamba_tokens = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows that beam search goes on with."""
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows given."""
        self._select(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a recurrent state has no past to go back to."""
        if tokens_to_remove:
            raise ValueError("a cache with Mamba states cannot be rolled back; start a new cache")

    def _select(self, pick) -> None:
        if self.attention_tokens():
            self.keys, self.values = pick(self.keys), pick(self.values)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = pick(state)


def _hybrid_cache_layer(cache: Cache, layer: int) -> HybridCacheLayer:
    """The cache's entry for a hybrid layer, put in place while the entry is still empty."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    entry = cache.layers[layer]
    if isinstance(entry, HybridCacheLayer):
        return entry
    if type(entry) not in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        raise ValueError(
            f"sidecars work with a DynamicCache of full attention; layer {layer} has a {type(entry).__name__}"
        )
    if entry.get_seq_length():
        raise ValueError(f"the cache holds tokens that layer {layer}'s sidecar has not seen; start a new cache")
    cache.layers[layer] = HybridCacheLayer()
    return cache.layers[layer]


# ---------------------------------------------------------------- the forward pass's shared state


@dataclass
class ForwardState:
    """What the gates of one forward pass share.

    past: tokens in the cache before this pass. padding_mask [B, T] True for real tokens, or None (all real).
    document_keys [B], positions [B, T] int64: see `GateInputs`. documents: id per row, or None where not told;
    starts: first position of each row's window.
    sparsity: layer -> [B, T] of the routers (or dense feed-forward layers) that have run.
    """

    past: int
    shape: tuple[int, int]
    padding_mask: torch.Tensor | None
    document_keys: torch.Tensor
    positions: torch.Tensor
    documents: list[str] | None
    starts: list[int]
    sparsity: dict[int, torch.Tensor] = field(default_factory=dict)


class GateRecord:
    """What gates did while `record_gates` was open.

    shares: document id -> layer -> m per input position, float32 [N], NaN where the model was never fed. A position
        that several windows hold counts as in the earliest of them, the one that scores its successor. Rows whose
        document was not told only enter the sums behind `layer_shares`.
    scores: the same for the gates' scores (sparsity, or the learned gate's output), where they have one.
    """

    def __init__(self, gate: Gate):
        self.gate = gate
        self._shares: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._scores: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._anonymous: dict[int, list[float]] = {}

    @property
    def shares(self) -> dict[str, dict[int, np.ndarray]]:
        """See the class."""
        return _values_only(self._shares)

    @property
    def scores(self) -> dict[str, dict[int, np.ndarray]]:
        """See the class."""
        return _values_only(self._scores)

    def layer_shares(self) -> dict[int, float]:
        """Realised share per layer: the mean of m over all tokens. Raises ValueError when nothing was recorded."""
        sums = {layer: list(pair) for layer, pair in self._anonymous.items()}
        for layers in self.shares.values():
            for layer, values in layers.items():
                known = values[~np.isnan(values)]
                pair = sums.setdefault(layer, [0.0, 0])
                pair[0] += float(known.sum(dtype=np.float64))
                pair[1] += len(known)
        if not sums:
            raise ValueError("no gate ran while it was recorded")
        return {layer: total / count for layer, (total, count) in sorted(sums.items())}

    def mean_share(self) -> float:
        """Mean of `layer_shares` over layers (every layer sees the same tokens)."""
        return float(np.mean(list(self.layer_shares().values())))

    def document_shares(self) -> dict[str, dict[int, float]]:
        """document id -> layer -> realised share."""
        return {
            document: {layer: float(np.nanmean(values, dtype=np.float64)) for layer, values in sorted(layers.items())}
            for document, layers in self.shares.items()
        }

    def add(self, layer: int, share: torch.Tensor | float, scores: torch.Tensor | None, state: ForwardState) -> None:
        """Take in one layer's m (and scores), [B, T] or a float, of one forward pass."""
        share = share if torch.is_tensor(share) else torch.full(state.shape, float(share))
        share = share.detach().float().cpu().numpy()
        real = np.ones(state.shape, bool) if state.padding_mask is None else state.padding_mask.cpu().numpy()
        if state.documents is None:
            pair = self._anonymous.setdefault(layer, [0.0, 0])
            pair[0] += float(share[real].sum(dtype=np.float64))
            pair[1] += int(real.sum())
            return
        positions = state.positions.cpu().numpy()
        scores = None if scores is None else scores.detach().float().cpu().numpy()
        for row, document in enumerate(state.documents):
            where, start = positions[row][real[row]], state.starts[row]
            for kept, values in ((self._shares, share), (self._scores, scores)):
                if values is not None:
                    layers = kept.setdefault(document, {})
                    layers[layer] = _keep_earliest(layers.get(layer), start, where, values[row][real[row]])


def _values_only(kept: dict[str, dict[int, tuple]]) -> dict[str, dict[int, np.ndarray]]:
    return {document: {layer: pair[0] for layer, pair in sorted(layers.items())} for document, layers in kept.items()}


def _keep_earliest(
    kept: tuple[np.ndarray, np.ndarray] | None, start: int, positions: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(values, window starts) with `values` put at `positions` wherever no earlier window has written."""
    held, starts = kept or (np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))
    missing = int(positions.max(initial=-1)) + 1 - len(held)
    if missing > 0:
        held = np.concatenate([held, np.full(missing, np.nan, dtype=np.float32)])
        starts = np.concatenate([starts, np.full(missing, np.iinfo(np.int64).max)])
    new = start < starts[positions]
    held[positions[new]], starts[positions[new]] = values[new], start
    return held, starts


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

    @property
    def mamba_config(self) -> Mamba2Config:
        """Configuration of the sidecars (alike in all layers but for the layer's index)."""
        return self.hybrid_layers()[0].sidecar.config

    def hybrid_layers(self) -> list["GatedHybridLayer"]:
        """The attached layers, in order of their indices."""
        layers = decoder_layers(self.model)
        return [layers[index].self_attn for index in self.layers]

    def on_batch(self, windows: Sequence[WindowRef]) -> None:
        """Say which document, and which part of it, each row of the coming batch holds (`score_documents` calls this).

        In force until told otherwise, for every uncached or first forward whose rows have just these lengths, and for
        what continues its cache; other forwards (a prompt, say) take every row as a document of its own, key 0, from
        position 0.
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
            hooks = [
                (module, self._activation_hook(source, gate.cutoffs[source])) for source, module in sources.items()
            ]
        if isinstance(gate, RoutingGate):
            if gate.signal == "previous" and self.layers[0] == 0:
                raise ValueError(
                    "layer 0 has no previous layer's router: with signal 'previous' choose layers from 1 on, or use "
                    "signal 'lookahead'"
                )
            layers = decoder_layers(self.model)
            for index in self.layers:
                source = index - 1 if gate.signal == "previous" else index
                mlp = getattr(layers[source], "mlp", None)
                if not hasattr(mlp, "router_proj") or not hasattr(mlp, "router_act_fn"):
                    raise ValueError(
                        f"a routing gate needs a BlockFFN router, which layer {source} of this "
                        f"{self.model.config.model_type} model has not: use gate mode fixed, learned or random, or an "
                        "ActivationGate"
                    )
                if gate.signal == "previous":
                    hooks.append((mlp.router_act_fn, self._router_hook(source)))
        for hook in self._signal_hooks:
            hook.remove()
        self._signal_hooks = [module.register_forward_hook(hook) for module, hook in hooks]
        self.gate = gate

    def activation_sources(self) -> dict[int, nn.Module]:
        """For every attached layer l: l - 1 -> `down_proj` of its MLP, whose input is the activations h [B, T, I].

        Raises ValueError where layer 0 is attached, and for an MLP that is not dense and gated.
        """
        if self.layers[0] == 0:
            raise ValueError("layer 0 has no layer before it: with signal 'ffn_previous' choose layers from 1 on")
        sources = {}
        for source in (index - 1 for index in self.layers):
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

    def remove_hooks(self) -> None:
        """Take every hook off the model."""
        for hook in (self._model_hook, *self._signal_hooks):
            hook.remove()
        self._signal_hooks = []

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
        positions, rows = self.state.positions.cpu(), []
        real = self.state.padding_mask
        for row, document in enumerate(self.state.documents):
            if document not in self.gate.masks or layer not in self.gate.masks[document]:
                raise ValueError(f"the offline masks have nothing for layer {layer} of document {document!r}")
            mask = torch.as_tensor(np.asarray(self.gate.masks[document][layer], dtype=np.float32))
            where = positions[row]
            last = int((where if real is None else where[real[row].cpu()]).max())
            if last >= len(mask):
                raise ValueError(
                    f"the offline mask of document {document!r} ends at {len(mask)}, the text goes on to {last + 1}"
                )
            rows.append(mask[where.clamp(0, len(mask) - 1)])
        return torch.stack(rows).to(self.state.positions.device)

    def _router_hook(self, layer: int):
        def keep(_module, _inputs, output):
            if self.state is not None and not self.bypassed:
                self.state.sparsity[layer] = sparsity(output.detach())

        return keep

    def _activation_hook(self, layer: int, cutoff: float):
        def keep(_module, inputs, _output):
            if self.state is not None and not self.bypassed:
                self.state.sparsity[layer] = activation_sparsity(inputs[0].detach(), cutoff)

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


# ---------------------------------------------------------------- the layer


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
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.zeros_(self.gate_proj.bias)
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
        use_attention, use_mamba = not (constant and share == 1.0), not (constant and share == 0.0)
        if past_key_values is not None:
            entry = _hybrid_cache_layer(past_key_values, self.layer_idx)
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
        past = self.attachment.state.past
        held = {"attention": entry.attention_tokens(), "the sidecar": entry.mamba_tokens}
        for path, used in (("attention", use_attention), ("the sidecar", use_mamba)):
            if used and held[path] != past:
                raise ValueError(
                    f"the cache holds {past} tokens, of which {path} of layer {self.layer_idx} has seen {held[path]} "
                    "(was alpha 0 or 1 meanwhile?); start a new cache when the gate changes"
                )


def attach_mamba_sidecar(
    model: nn.Module,
    layer_indices: Sequence[int],
    alpha: float = 0.5,
    gate_mode: str = "fixed",
    *,
    signal: str = "previous",
    hard: bool = False,
    temperature: float | None = None,
    threshold: float = 0.7,
    gate: Gate | None = None,
    settings: SidecarSettings | None = None,
    sidecar_dir: str | Path | None = None,
    stage: str = "a",
    seed: int = 0,
) -> nn.Module:
    """Put a sidecar beside the attention of the given layers, and a gate before both; returns the model.

    gate_mode: fixed, routing, learned or random with the settings that follow it (see `gates.make_gate`); `gate`, a
        gate object, beats them all. The sidecars are untrained, drawn from `seed` (a control), unless `sidecar_dir`
        names a folder of trained ones, which then also gives the settings.

    Raises ValueError, with the value and the choices, for layers that are not there, an unknown mode, alpha outside
    [0, 1], sidecars attached already, and what `set_gate` and `load_sidecars` refuse; the model is then unchanged.
    """
    if is_attached(model):
        raise ValueError(
            f"sidecars are attached already, to layers {attachment_of(model).layers}; call detach_mamba_sidecars first"
        )
    layers = decoder_layers(model)
    indices = _checked_layers(layer_indices, len(layers))
    gate = make_gate(gate_mode, alpha, signal, hard, temperature, threshold, seed) if gate is None else gate
    if sidecar_dir is not None:
        stored = SidecarSettings(**read_index(sidecar_dir)["settings"])
        if settings is not None and settings != stored:
            raise ValueError(f"the sidecars in {sidecar_dir} are {stored}, not {settings}; to make others: {RETRAIN}")
        settings = stored
    settings = settings or SidecarSettings()
    sidecars = [new_sidecar(model, index, settings, seed) for index in indices]
    attachment = SidecarAttachment(model, indices, settings)
    try:
        attachment.set_gate(gate)
        for index, sidecar in zip(indices, sidecars, strict=True):
            hybrid = GatedHybridLayer(layers[index].self_attn, sidecar, attachment, index)
            hybrid.gate_proj.to(next(sidecar.parameters()).device)
            hybrid.sidecar.requires_grad_(False)
            hybrid.gate_proj.requires_grad_(False)
            layers[index].self_attn = hybrid.train(model.training)
        if sidecar_dir is not None:
            load_sidecars(model, sidecar_dir, indices, stage)
    except BaseException:
        _restore(attachment)
        raise
    return model


def new_sidecar(model: nn.Module, layer: int, settings: SidecarSettings, seed: int = 0) -> MambaSidecar:
    """An untrained sidecar for one layer of a model without sidecars, on the layer's device and in its dtype."""
    block = decoder_layers(model)[layer]
    hidden_size = model.config.hidden_size
    if settings.init == "attention":
        resolved = attention_settings(block.self_attn, hidden_size, layer, settings)
        sidecar = MambaSidecar(hidden_size, layer, resolved, seed)
        init_from_attention(sidecar, block.self_attn)
    else:
        sidecar = MambaSidecar(hidden_size, layer, settings, seed)
    # 8-bit layers have integer weights; their norms still tell the computing dtype
    reference = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
    return sidecar.to(device=reference.device, dtype=reference.dtype)


def detach_mamba_sidecars(model: nn.Module) -> nn.Module:
    """Give every layer its own attention back and remove all hooks; returns the model.

    Raises ValueError when no sidecars are attached.
    """
    _restore(attachment_of(model))
    return model


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
    before, attachment.record = attachment.record, GateRecord(attachment.gate)
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


@torch.no_grad()
def calibrate_gates(
    model: nn.Module,
    gate: ScoredGate,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    batch_size: int = 8,
    passes: int = 4,
    progress: str | None = None,
    shared: bool = False,
) -> ScoredGate:
    """The gate with the score distributions that make each attached layer's mean share `gate.alpha` on the documents.

    `shared` pools the scores of all attached layers into one distribution, so that they have one threshold (and tie
    probability, or centre) between them: then the mean share over layers is alpha, and each layer's own is what it is.

    A hybrid layer changes the scores of the layers behind it, so the distributions are taken from the hybrid itself:
    pass after pass, at most `passes`, until every layer's realised share (`shared`: the mean over layers) is within
    SHARE_TOLERANCE of alpha. They hold for this alpha; at another share of the same gate they are close, not exact. The
    model's own gate is put back. Documents are read in windows of `max_seq_len` tokens, `batch_size` at a time;
    `progress` labels a progress bar. An `ActivationGate` without cutoffs gets these first (`activation_cutoffs`).

    Raises ValueError for a gate that has nothing to calibrate, no documents, or alpha 0 or 1.
    """
    if not isinstance(gate, ScoredGate):
        raise ValueError(f"a {gate.mode} gate has no scores to calibrate; routing, activation and learned gates do")
    if gate.alpha in (0.0, 1.0):
        raise ValueError(f"alpha is {gate.alpha}: a gate without a choice needs no calibration")
    if shared:  # a gate calibrated layer by layer may realise the mean share without sharing a threshold
        gate = replace(gate, distributions=None)
    attachment = attachment_of(model)
    before = attachment.gate
    batches = _calibration_batches(token_documents, max_seq_len, batch_size)
    if isinstance(gate, ActivationGate) and gate.cutoffs is None:
        gate = replace(gate, cutoffs=activation_cutoffs(model, gate.quantile, batches, progress))
    bar = tqdm(total=passes * len(batches), desc=progress, disable=progress is None, leave=False)
    try:
        for _ in range(passes):
            attachment.set_gate(gate)
            with record_gates(model) as record:
                for windows, ids, mask in batches:
                    attachment.on_batch(windows)
                    device = model.get_input_embeddings().weight.device
                    model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                    bar.update()
            realised = [record.mean_share()] if shared else record.layer_shares().values()
            if gate.distributions is not None and all(abs(one - gate.alpha) <= SHARE_TOLERANCE for one in realised):
                break
            scores = {
                layer: np.concatenate([layers[layer][~np.isnan(layers[layer])] for layers in record.scores.values()])
                for layer in attachment.layers
            }
            if shared:
                scores = dict.fromkeys(scores, np.concatenate(list(scores.values())))
            gate = replace(
                gate, distributions={layer: ScoreDistribution.of(values) for layer, values in scores.items()}
            )
    finally:
        bar.close()
        attachment.set_gate(before)
        attachment.on_batch([])
    return gate


@torch.no_grad()
def activation_cutoffs(
    model: nn.Module,
    quantile: float,
    batches: Sequence[tuple[Sequence[WindowRef], torch.Tensor, torch.Tensor]],
    progress: str | None = None,
) -> dict[int, float]:
    """Layer l - 1 -> `quantile` of |h| over all its neurons and all tokens, for every attached layer l.

    batches: as `_calibration_batches` makes them. The base model's activations count (`bypass_sidecars`), so that the
    cutoffs, and with them the signal's meaning, are the same for every gate of one model and text. |h| is binned by its
    first 16 bits, 128 bins for each power of two. The cutoff is the upper edge of the quantile's bin: at most 0.8 %
    above the quantile, and just above 0 where more neurons than that are exactly 0.

    Raises ValueError as `SidecarAttachment.activation_sources` does.
    """
    sources, bins = attachment_of(model).activation_sources(), 1 << 15
    counts = {source: torch.zeros(bins, dtype=torch.int64) for source in sources}
    real = None

    def counting(source):
        def hook(_module, inputs, _output):
            magnitudes = inputs[0][real.to(inputs[0].device)].float().abs()
            counts[source] += torch.bincount(magnitudes.view(torch.int32).flatten() >> 16, minlength=bins).cpu()

        return hook

    handles = [module.register_forward_hook(counting(source)) for source, module in sources.items()]
    try:
        with bypass_sidecars(model):
            for _windows, ids, mask in tqdm(batches, desc=progress, disable=progress is None, leave=False):
                real, device = mask.bool(), model.get_input_embeddings().weight.device
                model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    cutoffs = {}
    for source, count in counts.items():
        reached = count.numpy().cumsum()
        index = int(np.searchsorted(reached, quantile * reached[-1]))
        cutoffs[source] = float(np.int32(index + 1 << 16).view(np.float32))
    return cutoffs


def mamba_kernels(device: torch.device | str = "cuda") -> str:
    """Which Mamba-2 scan runs on a device: `mamba-ssm` or `PyTorch`, as transformers bound it when it was imported.

    Read from the binding itself: mamba-ssm may be installed and still fail to import. On a CPU it is always PyTorch.
    """
    scans = (modeling_mamba2.mamba2_chunk_scan, modeling_mamba2.mamba2_selective_state_update)
    bound = all(_implementation(function).__module__.startswith("mamba_ssm") for function in scans)
    return "mamba-ssm" if bound and torch.device(device).type != "cpu" else "PyTorch"


@contextmanager
def pytorch_scan() -> Iterator[None]:
    """Inside, sidecars run transformers' PyTorch functions, whatever kernels it bound (CPU tensors reach those too)."""
    bound = {name: getattr(modeling_mamba2, name) for name in KERNEL_FUNCTIONS}
    try:
        for name, function in bound.items():
            setattr(modeling_mamba2, name, inspect.unwrap(function))
        yield
    finally:
        for name, function in bound.items():
            setattr(modeling_mamba2, name, function)


def _implementation(function):
    """What one of transformers' dispatching functions calls."""
    return inspect.getclosurevars(function).nonlocals["implementation"]


# ---------------------------------------------------------------- on disk


def base_fingerprint(model: nn.Module) -> str:
    """sha256 that tells base models apart, with or without sidecars attached, alike for float32, 16-bit and 8-bit loads
    of one 16-bit checkpoint.

    Taken over all names and shapes and, rounded to bfloat16, over embeddings, norms, biases and routers (what 8-bit
    quantisation leaves alone); values below float16's normal range count as 0.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model)):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.ndim == 1 or "embed_tokens" in name or "router_proj" in name:
            values = parameter.detach().float()
            values = torch.where(values.abs() < 2.0**-14, 0.0, values).bfloat16().cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_sidecar(
    folder: str | Path, stage: str, layer: int, sidecar: MambaSidecar, matrix_dtype: torch.dtype | None = None
) -> Path:
    """Write one sidecar to `<folder>/stage_<stage>/layer_<layer>.safetensors`, atomically; returns the path.

    `matrix_dtype` stores the projections and the convolution in fewer bits; decays, steps and norms keep theirs.
    """
    tensors = sidecar.mixer.state_dict()
    if matrix_dtype is not None:
        tensors = {name: tensor.to(matrix_dtype) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    return _save_tensors(_sidecar_path(folder, stage, layer), tensors)


def save_sidecars(
    model: nn.Module,
    folder: str | Path,
    stage: str,
    training: dict | None = None,
    matrix_dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write all attached sidecars of a stage and their entry in `sidecars.json`; returns the paths written."""
    attachment = attachment_of(model)
    paths = [
        save_sidecar(folder, stage, index, hybrid.sidecar, matrix_dtype)
        for index, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True)
    ]
    return [*paths, update_index(folder, model, attachment.settings, stage, attachment.layers, training or {})]


def update_index(
    folder: str | Path,
    model: nn.Module,
    settings: SidecarSettings,
    stage: str,
    layers: Sequence[int],
    training: dict,
) -> Path:
    """Enter trained layers into `<folder>/sidecars.json` (made where absent); `training`: settings, losses, plain JSON.

    What is there for another base model or other settings is dropped from the index: its sidecars no longer fit.
    """
    path = Path(folder) / "sidecars.json"
    base = {
        "fingerprint": base_fingerprint(model),
        "model_type": model.config.model_type,
        "hidden_size": model.config.hidden_size,
        "num_layers": len(decoder_layers(model)),
    }
    head = {"format": FORMAT, "base": base, "settings": asdict(settings)}
    index = read_index(folder) if path.is_file() else {}
    stages = index.get("stages", {}) if {key: index.get(key) for key in head} == head else {}
    entry = stages.setdefault(stage, {"layers": [], "training": {}})
    entry["layers"] = sorted({*entry["layers"], *layers})
    entry["training"] = {**entry["training"], **training}
    _write_bytes(path, (json.dumps({**head, "stages": dict(sorted(stages.items()))}, indent=1) + "\n").encode())
    return path


def read_index(folder: str | Path) -> dict:
    """`sidecars.json` of a folder. Raises ValueError, naming the command that makes sidecars, where there is none."""
    path = Path(folder) / "sidecars.json"
    if not path.is_file():
        raise ValueError(f"there are no sidecars in {folder}; to make them: {RETRAIN}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); to make the sidecars anew: {RETRAIN}") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} has format {index.get('format')!r}, this code reads {FORMAT}; {RETRAIN}")
    return index


def available_layers(folder: str | Path, stage: str) -> list[int]:
    """Layers whose sidecars of a stage (`a` or `b`) are in the folder; [] where there are none at all."""
    _check_stage(stage)
    if not (Path(folder) / "sidecars.json").is_file():
        return []
    return list(read_index(folder)["stages"].get(stage, {}).get("layers", []))


def check_base(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError, with the command to run, unless the folder's sidecars were made for this very base model."""
    if read_index(folder)["base"]["fingerprint"] != base_fingerprint(model):
        raise ValueError(
            f"the sidecars in {folder} were distilled from another checkpoint than the loaded model; "
            f"to make them anew: {RETRAIN}"
        )


def load_sidecars(
    model: nn.Module, folder: str | Path, layer_indices: Sequence[int] | None = None, stage: str = "a"
) -> None:
    """Load trained weights into attached sidecars (all of them, or the given layers).

    Raises ValueError for sidecars of another checkpoint or of other settings, and layers that the folder lacks.
    """
    attachment = attachment_of(model)
    index = read_index(folder)
    wanted = attachment.layers if layer_indices is None else _checked_layers(layer_indices, len(decoder_layers(model)))
    absent = sorted(set(wanted) - set(available_layers(folder, stage)))
    if absent:
        raise ValueError(
            f"no stage {stage} sidecar for layer {', '.join(map(str, absent))} in {folder}; to make them: {RETRAIN}"
        )
    if index["settings"] != asdict(attachment.settings):
        raise ValueError(
            f"the sidecars in {folder} have settings {index['settings']}, not {asdict(attachment.settings)}"
        )
    check_base(model, folder)
    for layer in wanted:
        hybrid = decoder_layers(model)[layer].self_attn
        if not isinstance(hybrid, GatedHybridLayer):
            raise ValueError(f"layer {layer} has no sidecar; attached are layers {attachment.layers}")
        _load_tensors(hybrid.sidecar.mixer, _sidecar_path(folder, stage, layer))


def save_learned_gates(model: nn.Module, folder: str | Path) -> Path:
    """Write the linear gates of all attached layers to `<folder>/learned_gate.safetensors`; returns the path."""
    attachment = attachment_of(model)
    tensors = {
        f"{index}.{name}": tensor
        for index, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True)
        for name, tensor in hybrid.gate_proj.state_dict().items()
    }
    return _save_tensors(Path(folder) / "learned_gate.safetensors", tensors)


def load_learned_gates(model: nn.Module, folder: str | Path) -> None:
    """Load linear gates into the attached layers. Raises ValueError where the folder has none, or lacks a layer."""
    path = Path(folder) / "learned_gate.safetensors"
    if not path.is_file():
        raise ValueError(f"there is no learned gate in {folder}; to train it: {RETRAIN}")
    check_base(model, folder)
    attachment = attachment_of(model)
    tensors = safetensors.torch.load_file(path)
    absent = [index for index in attachment.layers if f"{index}.weight" not in tensors]
    if absent:
        raise ValueError(f"{path} has no gate for layer {', '.join(map(str, absent))}; to train it: {RETRAIN}")
    for index, hybrid in zip(attachment.layers, attachment.hybrid_layers(), strict=True):
        hybrid.gate_proj.load_state_dict({name: tensors[f"{index}.{name}"] for name in ("weight", "bias")})


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if ".self_attn.sidecar." not in name and ".self_attn.gate_proj." not in name:
            yield name.replace(".self_attn.attention.", ".self_attn."), parameter


def _restore(attachment: SidecarAttachment) -> None:
    for layer in decoder_layers(attachment.model):
        if isinstance(layer.self_attn, GatedHybridLayer):
            layer.self_attn = layer.self_attn.attention
    attachment.remove_hooks()


def _checked_layers(layer_indices: Sequence[int], num_layers: int) -> list[int]:
    indices = sorted(int(index) for index in layer_indices)
    if not indices:
        raise ValueError("no layers were named for the sidecars")
    absent = [index for index in indices if not 0 <= index < num_layers]
    if absent:
        raise ValueError(
            f"layer {', '.join(map(str, absent))} is not there: the model has layers 0 to {num_layers - 1}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"layers {indices} name a layer twice")
    return indices


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r} of sidecars; choose one of {', '.join(STAGES)}")


def _calibration_batches(token_documents: Sequence[TokenDocument], max_seq_len: int, batch_size: int):
    """[(windows, ids [B, T], attention_mask [B, T])] over non-overlapping windows, the longest first."""
    if not token_documents:
        raise ValueError("no documents to calibrate on")
    pieces = [
        (
            WindowRef(document.id, start, len(document.ids[start : start + max_seq_len])),
            document.ids[start : start + max_seq_len],
        )
        for document in token_documents
        for start in range(0, len(document.ids), max_seq_len)
    ]
    pieces.sort(key=lambda piece: (-piece[0].length, piece[0].document, piece[0].start))
    batches = []
    for first in range(0, len(pieces), batch_size):
        chosen = pieces[first : first + batch_size]
        ids = torch.zeros(len(chosen), chosen[0][0].length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (window, tokens) in enumerate(chosen):
            ids[row, : window.length] = torch.as_tensor(np.asarray(tokens))
            mask[row, : window.length] = 1
        batches.append(([window for window, _ in chosen], ids, mask))
    return batches


def _sidecar_path(folder: str | Path, stage: str, layer: int) -> Path:
    _check_stage(stage)
    return Path(folder) / f"stage_{stage}" / f"layer_{layer}.safetensors"


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    _write_bytes(path, safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    return path


def _load_tensors(module: nn.Module, path: Path) -> None:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); to make it anew: {RETRAIN}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise ValueError(f"{path} does not fit the sidecar's shapes; to make it anew: {RETRAIN}")
    module.load_state_dict(tensors)


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)

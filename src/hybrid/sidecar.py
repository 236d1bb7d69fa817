"""The Mamba-2 sidecar: transformers' `Mamba2Mixer`, its geometry, its start from attention, and which scan it runs.

Exact PyTorch everywhere, mamba-ssm kernels where transformers found them when it was imported (`mamba_kernels`); the
weights are the same for both.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import Mamba2Config
from transformers.cache_utils import Cache
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from src.models.families import decoder_layers

INITS = ("random", "attention")
# The functions of transformers' Mamba-2 that have kernels.
KERNEL_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update",
    "mamba2_chunk_scan",
)


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
        for name, value in asdict(self).items():
            if name != "init" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"sidecar {name} is {value!r}; it must be a whole number of at least 1")


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


def attention_settings(model: nn.Module, layer: int, settings: SidecarSettings) -> SidecarSettings:
    """The geometry that init `attention` imposes on a layer's sidecar: one Mamba head per attention head.

    Raises ValueError for MLA (it has no q_proj, k_proj, v_proj), quantised projections, or heads that do not add up to
    the hidden size.
    """
    attention, hidden_size = decoder_layers(model)[layer].self_attn, model.config.hidden_size
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


def new_sidecar(model: nn.Module, layer: int, settings: SidecarSettings, seed: int = 0) -> MambaSidecar:
    """An untrained sidecar for one layer of a model without sidecars, on the layer's device and in its dtype."""
    block = decoder_layers(model)[layer]
    copied = settings.init == "attention"
    shape = attention_settings(model, layer, settings) if copied else settings
    sidecar = MambaSidecar(model.config.hidden_size, layer, shape, seed)
    if copied:
        init_from_attention(sidecar, block.self_attn)
    # 8-bit layers have integer weights; their norms still tell the computing dtype
    reference = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
    return sidecar.to(device=reference.device, dtype=reference.dtype)


def mamba_kernels(device: torch.device | str = "cuda") -> str:
    """Which Mamba-2 scan runs on a device: `mamba-ssm` or `PyTorch`, as transformers bound it when it was imported.

    Read from the binding itself: mamba-ssm may be installed and still fail to import. On a CPU it is always PyTorch.
    """
    dispatching = (modeling_mamba2.mamba2_chunk_scan, modeling_mamba2.mamba2_selective_state_update)
    called = [inspect.getclosurevars(function).nonlocals["implementation"] for function in dispatching]
    bound = all(function.__module__.startswith("mamba_ssm") for function in called)
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

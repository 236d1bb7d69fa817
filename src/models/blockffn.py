"""The native BlockFFN model (arXiv 2507.08771) on transformers' own MiniCPM3 and Llama classes, without remote code.

BlockFFN replaces each feed-forward layer by E small un-gated experts and a router whose output passes through ReLU and
an RMSNorm, so every token activates its own number of experts:

    r   = router_act(router_proj(x))              [.., E]   the routing signal; exact zeros are inactive experts
    g   = router_norm(r)                          [.., E]
    out = sum_e g_e * down_e(hidden_act(up_e(x))) [.., D]

The experts live in two ordinary `nn.Linear`s (up: D -> E*d, down: E*d -> D), so that 8-bit quantisation reaches them.
The hub's own layouts (`block`: 3-D expert tensors, `block_linear`: 2-D ones, both without `.weight`) are converted
while loading and converted back by `save_pretrained`.
"""

import os

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.minicpm3.configuration_minicpm3 import MiniCPM3Config
from transformers.models.minicpm3.modeling_minicpm3 import (
    MiniCPM3Attention,
    MiniCPM3DecoderLayer,
    MiniCPM3ForCausalLM,
    MiniCPM3Model,
    MiniCPM3PreTrainedModel,
    MiniCPM3RMSNorm,
)
from transformers.utils import logging as transformers_logging

# The kinds that this model implements, by the name of their setting.
KNOWN = {
    "attention_type": ("vanilla", "mla"), "ffn_type": ("block", "block_linear"),
    "norm_after_router": ("rms", "sum", "none"),
}  # fmt: skip


@strict
class BlockFFNConfig(MiniCPM3Config):
    """Configuration of the hub's `config.json` (`model_type: minicpm`).

    Raises ValueError for an `attention_type`, `ffn_type` or `norm_after_router` that this model does not implement.
    """

    model_type = "minicpm"

    attention_type: str = "vanilla"
    ffn_type: str = "block"
    num_experts: int = 32
    expert_size: int = 32
    router_act: str = "relu"
    norm_after_router: str = "rms"
    norm_scale: int | float = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, allowed in KNOWN.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"config.json: {name} is {getattr(self, name)!r}; BlockFFN knows {', '.join(allowed)}")
        for name in ("router_act", "hidden_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"config.json: {name} is {getattr(self, name)!r}, which transformers does not know")
        if self.attention_type == "vanilla":
            # MiniCPM3Config sets the rotary width of MLA; grouped-query attention rotates whole heads.
            self.head_dim = self.hidden_size // self.num_attention_heads
        else:
            # MLA's latent is expanded to every head, whatever config.json says of key-value heads.
            self.num_key_value_heads = self.num_attention_heads


class SumNorm(nn.Module):
    """r / (sum_e r_e * norm_scale + 1e-5), the `norm_after_router: sum` of the official code."""

    def __init__(self, norm_scale: float):
        super().__init__()
        self.norm_scale = norm_scale

    def forward(self, router_activations: torch.Tensor) -> torch.Tensor:
        """Normalise [.., E] over its last dimension."""
        return router_activations / (router_activations.sum(dim=-1, keepdim=True) * self.norm_scale + 1e-5)


class BlockFFNMLP(nn.Module):
    """One BlockFFN feed-forward layer (arXiv 2507.08771): router and E experts, evaluated densely.

    The output of the sub-module `router_act_fn`, [B, T, E], is the routing signal that the rest of the repo reads.
    """

    def __init__(self, config: BlockFFNConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_size = config.expert_size
        width = config.num_experts * config.expert_size
        self.router_proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.router_act_fn = ACT2FN[config.router_act]
        if config.norm_after_router == "rms":
            self.router_norm = MiniCPM3RMSNorm(config.num_experts, eps=config.rms_norm_eps)
        elif config.norm_after_router == "sum":
            self.router_norm = SumNorm(config.norm_scale)
        else:
            self.router_norm = nn.Identity()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D]."""
        gates = self.router_norm(self.router_act_fn(self.router_proj(hidden_states)))
        inner = self.act_fn(self.up_proj(hidden_states))
        inner = inner.unflatten(-1, (self.num_experts, self.expert_size)) * gates.unsqueeze(-1)
        return self.down_proj(inner.flatten(-2))


class BlockFFNDecoderLayer(MiniCPM3DecoderLayer):
    """MiniCPM's pre-norm block with scaled residual branches, holding BlockFFN's attention and feed-forward layer."""

    def __init__(self, config: BlockFFNConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        attention = MiniCPM3Attention if config.attention_type == "mla" else LlamaAttention
        self.self_attn = attention(config=config, layer_idx=layer_idx)
        self.mlp = BlockFFNMLP(config)


class BlockFFNPreTrainedModel(MiniCPM3PreTrainedModel):
    config_class = BlockFFNConfig
    config: BlockFFNConfig
    _no_split_modules = ["BlockFFNDecoderLayer"]
    _can_record_outputs = {"hidden_states": BlockFFNDecoderLayer, "attentions": (LlamaAttention, MiniCPM3Attention)}


class BlockFFNModel(BlockFFNPreTrainedModel, MiniCPM3Model):
    """Decoder stack; its forward is MiniCPM3Model's."""

    def __init__(self, config: BlockFFNConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([BlockFFNDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class CheckpointError(ValueError):
    """A checkpoint that does not fit its configuration; the message names the tensors."""


class BlockFFNForCausalLM(BlockFFNPreTrainedModel, MiniCPM3ForCausalLM):
    """BlockFFN with its language-model head; `from_pretrained` reads the hub's layouts strictly."""

    def __init__(self, config: BlockFFNConfig):
        super().__init__(config)
        self.model = BlockFFNModel(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """Load a folder or hub id in any of the hub's layouts, memory-mapped and with `weights_only=True`.

        Arguments are those of `PreTrainedModel.from_pretrained`. Raises CheckpointError when a tensor is missing, extra
        or misshapen, naming each.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("weights_only", True)
        # Misfits are collected instead of raised one by one, then refused below all together; transformers' own
        # table of them would only repeat what the error says.
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        finally:
            transformers_logging.set_verbosity(level)
        keys = {"missing": info["missing_keys"], "not part of the model": info["unexpected_keys"]}
        problems = [f"{what}: {', '.join(sorted(names))}" for what, names in keys.items() if names]
        for key, found, expected in sorted(info["mismatched_keys"]):
            problems.append(f"{key} has shape {tuple(found)}, the configuration says {tuple(expected)}")
        problems += map(str, info["error_msgs"])
        if problems:
            fault = "; ".join(problems)
            raise CheckpointError(f"{pretrained_model_name_or_path} does not fit its config.json: {fault}")
        return (model, info) if wants_info else model


class _ExpertLayout(ConversionOps):
    """Hub expert tensors <-> `nn.Linear` weights; `block` is 3-D on the hub, `block_linear` is 2-D as here.

    up: [E, d, D] <-> [E*d, D]; down: [E, D, d] <-> [D, E*d]. up's rows are (expert, neuron); down's columns are, so its
    expert axis moves inwards.
    """

    def __init__(self, saves: bool = False):
        self.saves = saves

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        """One tensor to the other layout. Loading passes on a tensor of another shape, such as [d, E, D]: flattened it
        could fit and mean something else, as it is `from_pretrained` names it."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        is_down, experts = "down_proj" in target_patterns[0], (config.num_experts, config.expert_size)
        if self.saves and config.ffn_type == "block":
            tensor = tensor.unflatten(1, experts).transpose(0, 1) if is_down else tensor.unflatten(0, experts)
        elif not self.saves:
            inner = (config.hidden_size, config.expert_size) if is_down else (config.expert_size, config.hidden_size)
            if tuple(tensor.shape) == (config.num_experts, *inner):
                tensor = tensor.transpose(0, 1).flatten(1) if is_down else tensor.flatten(0, 1)
        return {target_patterns[0]: tensor.contiguous()}

    @property
    def reverse_op(self):
        """The operation that saving applies to what loading converted."""
        return _ExpertLayout(not self.saves)


register_checkpoint_conversion_mapping(
    "BlockFFNForCausalLM",
    [
        # the look-ahead keeps keys that end in `.weight` already (it is dropped when transformers reverses the pattern)
        WeightConverter([rf"mlp\.{name}(?![.\w])"], [f"mlp.{name}.weight"], operations=[_ExpertLayout()])
        for name in ("up_proj", "down_proj")
    ],
    overwrite=True,
)

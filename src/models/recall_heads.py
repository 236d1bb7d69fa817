"""A start for attention heads that copy: without it, small models learn no in-context copying within a CPU's budget."""

import math

import torch
from torch import nn


@torch.no_grad()
def init_recall_heads(
    model: nn.Module, previous_layer: int = 1, matching_layers: tuple[int, ...] = (4, 5, 6), seed: int = 0
) -> None:
    """Start some attention heads as a previous-token head and as matching ("induction") heads; training does the rest.

    Two trials from plain random weights learned no in-context copying within the CPU budget. A mimetic start (compare
    arXiv 2305.09828, which sets W_q W_k^T and W_v W_o near multiples of the identity) gives the two-head circuit of
    arXiv 2209.11895: head 0 of `previous_layer` attends to t - 1 through RoPE phases on a constant embedding dimension
    and writes a rotated copy of that token; one head per KV head of each of `matching_layers` looks for the current
    token among those copies, in RoPE's slow dimensions, and copies the token that it finds there to the output.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    read = _orthonormal(config.head_dim, config.hidden_size, generator)
    read[:, 0] = 0.0
    rotation = _orthonormal(config.hidden_size, config.hidden_size, generator)
    _init_previous_token_head(model, previous_layer, read, rotation)

    width, half = config.head_dim, config.head_dim // 2
    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, width)])
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in matching_layers:
        attention = model.model.layers[layer].self_attn
        for kv in range(config.num_key_value_heads):
            head = kv * group
            match = _orthonormal(half, width, generator) @ read
            query = attention.q_proj.weight[head * width : (head + 1) * width].zero_()
            key = attention.k_proj.weight[kv * width : (kv + 1) * width].zero_()
            query[slow], key[slow] = 2.0 * match, 1.0 * match @ rotation.T
            copy = _orthonormal(width, config.hidden_size, generator)
            copy[:, 0] = 0.0
            attention.v_proj.weight[kv * width : (kv + 1) * width] = copy
            attention.o_proj.weight[:, head * width : (head + 1) * width] = 2.0 * copy.T


def _init_previous_token_head(model: nn.Module, layer: int, read: torch.Tensor, rotation: torch.Tensor) -> None:
    """Head 0 of a layer attends to t - 1 and writes `rotation` [D, D] of what `read` [d, D] takes from it."""
    config = model.config
    width, half = config.head_dim, config.head_dim // 2
    constant = 4.0  # in units of the other dimensions' standard deviation
    model.model.embed_tokens.weight[:, 0] = constant * config.initializer_range
    value = constant / math.sqrt(1 + constant**2 / config.hidden_size)  # of that dimension after RMSNorm

    attention = model.model.layers[layer].self_attn
    frequencies = model.model.rotary_emb.inv_freq[:4]  # the fastest pairs tell neighbours apart
    strength = math.sqrt(6.5 * math.sqrt(width)) / value
    query, key = (projection.weight[:width].zero_() for projection in (attention.q_proj, attention.k_proj))
    pairs = torch.arange(4)
    query[pairs, 0] = strength
    # RoPE turns the score of a pair at distance d into cos(angle * d - phase): largest at d = 1 for phase = angle
    key[pairs, 0] = strength * torch.cos(frequencies)
    key[half + pairs, 0] = strength * torch.sin(frequencies)
    attention.v_proj.weight[:width] = read
    attention.o_proj.weight[:, :width] = 4.0 * rotation @ read.T


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix [rows, columns], rows <= columns, whose rows are orthonormal."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T

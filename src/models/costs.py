"""FLOPs per token in closed form, from plain integers.

Conventions: one multiply-add is 2 FLOPs; only matrix products and convolutions count, elementwise operations
(activations, norms, softmax, RoPE, decays, the mixing of two paths) and the gate do not, as in
`torch.utils.flop_counter`, which the tests compare with.
Shape letters: D width, H heads, K key/value heads, V vocabulary, E experts, T tokens, N Mamba state size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import Mamba2Config

# Settings of a mixture that has shared experts, or dense layers among the sparse ones.
UNEVEN = (
    "shared_expert_intermediate_size", "num_shared_experts", "n_shared_experts", "mlp_only_layers",
    "first_k_dense_replace",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionShape:
    """Grouped-query attention, or multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) where `kv_lora_rank` > 0.

    Widths in elements. `head_dim` is that of a query/key head (MLA: nope + rope), `v_head_dim` that of a value head;
    `q_lora_rank` 0 means that queries are projected directly.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0


@dataclass(frozen=True)
class MLPShape:
    """A feed-forward layer: `matrices` products between D and `width` (2 un-gated, 3 gated), and a router.

    BlockFFN: `width` is all experts' neurons, E * d, of which a token uses its active experts'. A top-k mixture of
    gated experts: `width` is that of the k experts a token uses. `router_outputs` 0: no router.
    """

    hidden_size: int
    width: int
    matrices: int
    router_outputs: int = 0


@dataclass(frozen=True)
class ModelShape:
    """What a decoder's cost depends on: layers alike, and one head over the vocabulary."""

    num_layers: int
    vocab_size: int
    attention: AttentionShape
    mlp: MLPShape


def model_shape(config) -> ModelShape:
    """Read a transformers configuration (BlockFFN, MiniCPM3, Llama, Qwen3, Mixtral, Qwen3-MoE): attributes only.

    Raises ValueError for a mixture with shared experts or with dense layers among the sparse ones: its layers are not
    alike.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "attention_type", "mla") == "mla" and getattr(config, "kv_lora_rank", None):
        rope, ranks = config.qk_rope_head_dim, (config.q_lora_rank or 0, config.kv_lora_rank)
        attention = AttentionShape(width, heads, heads, config.qk_nope_head_dim + rope, config.v_head_dim, *ranks, rope)
    else:
        head_dim = getattr(config, "head_dim", None) or width // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        attention = AttentionShape(width, heads, kv_heads, head_dim, head_dim)
    return ModelShape(config.num_hidden_layers, config.vocab_size, attention, _mlp_shape(config))


def _mlp_shape(config) -> MLPShape:
    width = config.hidden_size
    if hasattr(config, "expert_size"):  # BlockFFN
        return MLPShape(width, config.num_experts * config.expert_size, matrices=2, router_outputs=config.num_experts)
    experts = next((getattr(config, n) for n in ("num_experts", "num_local_experts") if getattr(config, n, None)), 0)
    if not experts:
        return MLPShape(width, config.intermediate_size, matrices=3)
    uneven = [name for name in UNEVEN if getattr(config, name, None)]
    if getattr(config, "decoder_sparse_step", None) not in (None, 1):
        uneven.append("decoder_sparse_step")
    if uneven:
        raise ValueError(f"no closed form for a mixture with {', '.join(uneven)} set (model type {config.model_type})")
    expert_width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return MLPShape(width, config.num_experts_per_tok * expert_width, matrices=3, router_outputs=experts)


# ---- one layer, one token
def attention_query_flops(shape: AttentionShape) -> int:
    """Query and output projections of one token."""
    query_width = shape.num_heads * shape.head_dim
    if shape.q_lora_rank:
        query = 2 * shape.q_lora_rank * (shape.hidden_size + query_width)
    else:
        query = 2 * shape.hidden_size * query_width
    return query + 2 * shape.num_heads * shape.v_head_dim * shape.hidden_size


def attention_key_value_flops(shape: AttentionShape) -> int:
    """Key and value projections of one token; MLA: down to the latent and up again, once per token."""
    if shape.kv_lora_rank:
        nope = shape.head_dim - shape.qk_rope_head_dim
        down = 2 * shape.hidden_size * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        return down + 2 * shape.kv_lora_rank * shape.num_heads * (nope + shape.v_head_dim)
    return 2 * shape.hidden_size * shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)


def attention_score_flops(shape: AttentionShape, context: float) -> float:
    """q k^T and p v of one token that attends to `context` tokens (itself included)."""
    return 2 * context * shape.num_heads * (shape.head_dim + shape.v_head_dim)


def attention_flops(shape: AttentionShape, context: float) -> float:
    """All of one attention layer for one token that attends to `context` tokens."""
    projections = attention_query_flops(shape) + attention_key_value_flops(shape)
    return projections + attention_score_flops(shape, context)


def mlp_flops(shape: MLPShape, active: float = 1.0) -> float:
    """Router and the `active` fraction of the experts of one feed-forward layer, for one token; 1 is dense."""
    return 2 * shape.hidden_size * (shape.router_outputs + active * shape.matrices * shape.width)


def head_flops(hidden_size: int, vocab_size: int) -> int:
    """Logits of one token."""
    return 2 * hidden_size * vocab_size


def mamba_write_flops(sidecar: Mamba2Config) -> int:
    """What one token must pay for later tokens to find it in the state: x, B and dt, their convolution, the update.

    The update is the recurrence's outer product B x^T (arXiv 2405.21060, equation 1); its decay is elementwise.
    """
    inner, group = sidecar.num_heads * sidecar.head_dim, sidecar.n_groups * sidecar.state_size
    projection = 2 * sidecar.hidden_size * (inner + group + sidecar.num_heads)
    return projection + 2 * sidecar.conv_kernel * (inner + group) + 2 * inner * sidecar.state_size


def mamba_read_flops(sidecar: Mamba2Config) -> int:
    """What one token pays for its own Mamba output: gate z and C, C's convolution, C times state, output projection."""
    inner, group = sidecar.num_heads * sidecar.head_dim, sidecar.n_groups * sidecar.state_size
    projections = 2 * sidecar.hidden_size * (inner + group) + 2 * inner * sidecar.hidden_size
    return projections + 2 * sidecar.conv_kernel * group + 2 * inner * sidecar.state_size


def mamba_chunked_flops(sidecar: Mamba2Config, tokens: int) -> float:
    """Per token, averaged over `tokens`: the chunked scan (arXiv 2405.21060, section 6) of transformers' PyTorch code.

    The last chunk is padded to `chunk_size`, heads do not share their group's C B^T, the convolution also runs over
    its padding, and chunk states are passed on by one product over all pairs of chunks.
    """
    inner, group = sidecar.num_heads * sidecar.head_dim, sidecar.n_groups * sidecar.state_size
    size, state = sidecar.chunk_size, inner * sidecar.state_size
    chunks = -(-tokens // size)
    projections = tokens * 2 * sidecar.hidden_size * (3 * inner + 2 * group + sidecar.num_heads)
    convolution = 2 * sidecar.conv_kernel * (tokens + sidecar.conv_kernel - 1) * (inner + 2 * group)
    within = 2 * size * size * (sidecar.num_heads * sidecar.state_size + inner)  # C B^T, then its product with x
    states = 2 * 2 * size * state  # x into the chunk's state, and the previous state out
    passing = 2 * (chunks + 1) ** 2 * state
    return (projections + convolution + chunks * (within + states) + passing) / tokens


# ---- whole documents
def flops_ideal(
    model: ModelShape,
    tokens: int,
    active_experts: Sequence[float],
    mamba: Mamba2Config | None,
    shares: Mapping[int, float],
    hard: bool,
) -> float:
    """FLOPs per token, averaged over a document of `tokens` tokens, if every token paid only for what it uses.

    `active_experts`: fraction of active experts (1 - sparsity) per layer. `shares`: mamba share in [0, 1] per hybrid
    layer (layers not named are attention only; `mamba` may be None where there are none). `hard`: shares are fractions
    of tokens sent to Mamba (hard gate); else they are mixing weights, and a token with a weight inside (0, 1) pays both
    paths.

    Attention is causal: token i attends to i + 1 tokens, and attending tokens are spread evenly over the document.
    Mamba is recurrent. What later tokens need is paid by every token, whichever way it goes: keys and values unless the
    share is 1, the Mamba state's update unless it is 0. Sent one way or the other, a token saves the reading only.
    """
    key_value = attention_key_value_flops(model.attention)
    attention_read = attention_query_flops(model.attention) + attention_score_flops(model.attention, (tokens + 1) / 2)
    total = float(head_flops(model.attention.hidden_size, model.vocab_size))
    for layer, active in enumerate(active_experts):
        share = shares.get(layer, 0.0)
        reads_attention = 1 - share if hard else float(share < 1)
        total += (share < 1) * key_value + reads_attention * attention_read
        if share > 0:
            reads_mamba = share if hard else 1.0
            total += mamba_write_flops(mamba) + reads_mamba * mamba_read_flops(mamba)
        total += mlp_flops(model.mlp, active)
    return total


def flops_executed(model: ModelShape, tokens: int, mamba: Mamba2Config | None, shares: Mapping[int, float]) -> float:
    """FLOPs per token, averaged over a document of `tokens` tokens in one forward, that the code of this repo runs.

    All experts, attention over the full T x T square, Mamba by the chunked scan. A hybrid layer runs both paths for
    every token, except where its share is exactly 0 (attention only) or 1 (Mamba only), as a constant gate's is.
    """
    total = float(head_flops(model.attention.hidden_size, model.vocab_size))
    for layer in range(model.num_layers):
        share = shares.get(layer, 0.0)
        if share < 1:
            total += attention_flops(model.attention, tokens)
        if share > 0:
            total += mamba_chunked_flops(mamba, tokens)
        total += mlp_flops(model.mlp)
    return total

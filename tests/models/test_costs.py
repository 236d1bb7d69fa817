"""Closed-form costs against torch's FLOP counter on tiny models, caches that were really filled, and limits."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Mamba2Config, MixtralConfig, Qwen3Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from src.hybrid.attach import attach_mamba_sidecar
from src.models import costs
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM

TOKENS = 37
COMMON = dict(vocab_size=83, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def blockffn(**changes) -> BlockFFNForCausalLM:
    settings = COMMON | dict(num_experts=5, expert_size=12, max_position_embeddings=64) | changes
    return BlockFFNForCausalLM(BlockFFNConfig(**settings)).eval()


def mla_blockffn(**changes) -> BlockFFNForCausalLM:
    ranks = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, num_key_value_heads=4)
    return blockffn(attention_type="mla", v_head_dim=8, **(ranks | changes))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=56)).eval()


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**COMMON, intermediate_size=56, head_dim=12)).eval()


def counted(run) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def mamba_config(**changes) -> Mamba2Config:
    settings = dict(
        hidden_size=32, expand=2, num_heads=8, head_dim=8, state_size=12, n_groups=2, conv_kernel=4, chunk_size=16
    )
    return Mamba2Config(**(settings | changes), num_hidden_layers=1)


MAMBA = mamba_config()


@pytest.mark.parametrize("build", [blockffn, mla_blockffn, llama, qwen3])
def test_model_equals_the_flop_counter(build):
    model = build()
    input_ids = torch.zeros((2, TOKENS), dtype=torch.long)
    expected = counted(lambda: model(input_ids=input_ids, use_cache=False))
    shape = costs.model_shape(model.config)
    # The counter sees the rotary angles too: inv_freq times positions, one product of [half, 1] x [1, T].
    rotary = counted(lambda: model.model.rotary_emb(torch.zeros(1), torch.arange(TOKENS)[None]))
    assert costs.flops_executed(shape, TOKENS, None, {}) * TOKENS * 2 == expected - rotary


def test_latent_attention_without_a_query_rank_equals_the_flop_counter():
    model = mla_blockffn(q_lora_rank=None)
    shape = costs.model_shape(model.config)
    input_ids = torch.zeros((1, TOKENS), dtype=torch.long)
    rotary = counted(lambda: model.model.rotary_emb(torch.zeros(1), torch.arange(TOKENS)[None]))
    executed = counted(lambda: model(input_ids=input_ids, use_cache=False)) - rotary
    assert costs.flops_executed(shape, TOKENS, None, {}) * TOKENS == executed


@pytest.mark.parametrize("tokens", [1, 16, 37, 64])
@pytest.mark.parametrize(
    "changes", [{}, {"n_groups": 1, "num_heads": 4, "head_dim": 16}, {"conv_kernel": 3, "expand": 1, "head_dim": 4}]
)
def test_chunked_mamba_equals_the_flop_counter(tokens, changes):
    config = mamba_config(**changes)
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    hidden = torch.zeros(3, tokens, config.hidden_size)
    expected = counted(lambda: mixer(hidden))
    assert costs.mamba_chunked_flops(config, tokens) * tokens * 3 == pytest.approx(expected, rel=1e-12)


def recurrent_flops() -> int:
    """One token of a Mamba-2 mixer in its recurrent form."""
    return costs.mamba_write_flops(MAMBA) + costs.mamba_read_flops(MAMBA)


def test_recurrent_mamba_equals_the_flop_counter_of_one_cached_step_but_for_the_elementwise_update():
    config = mamba_config()
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        mixer(torch.zeros(1, 5, config.hidden_size), cache_params=cache)
    step = counted(lambda: mixer(torch.zeros(1, 1, config.hidden_size), cache_params=cache))
    # The step convolves conv_kernel cached inputs and its own, which makes two positions, of which one is thrown away.
    inner, group = MAMBA.num_heads * MAMBA.head_dim, MAMBA.n_groups * MAMBA.state_size
    wasted = 2 * MAMBA.conv_kernel * (inner + 2 * group)
    update = 2 * inner * MAMBA.state_size
    assert recurrent_flops() == step - wasted + update


def test_recurrent_form_is_cheaper_than_the_chunked_scan():
    assert recurrent_flops() < costs.mamba_chunked_flops(MAMBA, 64)


SHAPE = costs.model_shape(blockffn().config)


def test_ideal_attention_is_the_sum_over_positions():
    one_layer = replace(SHAPE, num_layers=1)
    summed = sum(costs.attention_flops(SHAPE.attention, position + 1) for position in range(TOKENS)) / TOKENS
    rest = costs.mlp_flops(SHAPE.mlp, 0.25) + costs.head_flops(32, 83)
    assert costs.flops_ideal(one_layer, TOKENS, [0.25], None, {}, True) == pytest.approx(summed + rest, rel=1e-12)


def test_sparsity_scales_the_experts_but_not_the_router():
    dense, silent = costs.mlp_flops(SHAPE.mlp), costs.mlp_flops(SHAPE.mlp, 0.0)
    assert silent == 2 * 32 * 5
    assert dense - silent == 2 * 2 * 32 * 5 * 12
    by_layer, alike = (costs.flops_ideal(SHAPE, TOKENS, a, None, {}, True) for a in ([0.1, 0.2, 0.6], [0.3] * 3))
    assert by_layer == pytest.approx(alike, rel=1e-12)


def test_hard_gate_pays_every_write_and_its_own_reads():
    def ideal(share, hard=True):
        return costs.flops_ideal(SHAPE, TOKENS, [0.5] * 3, MAMBA, {1: share}, hard)

    base = costs.flops_ideal(SHAPE, TOKENS, [0.5] * 3, None, {}, True)
    attention = costs.attention_flops(SHAPE.attention, (TOKENS + 1) / 2)
    write = costs.mamba_write_flops(MAMBA)
    assert ideal(0.0) == base
    assert ideal(1.0) == pytest.approx(base - attention + recurrent_flops())
    # Between the ends it is linear, both writes paid throughout.
    assert ideal(0.5) == pytest.approx((ideal(0.25) + ideal(0.75)) / 2)
    assert ideal(1e-9) == pytest.approx(base + write)
    assert ideal(1 - 1e-9) == pytest.approx(ideal(1.0) + costs.attention_key_value_flops(SHAPE.attention))
    # A mixture pays both paths, whatever its weight.
    both = base + recurrent_flops()
    assert ideal(0.3, hard=False) == ideal(0.9, hard=False) == pytest.approx(both)
    assert ideal(0.0, hard=False) == base and ideal(1.0, hard=False) == ideal(1.0)


def test_executed_runs_both_paths_unless_the_share_is_constant_at_an_end():
    base = costs.flops_executed(SHAPE, TOKENS, None, {})
    scan = costs.mamba_chunked_flops(MAMBA, TOKENS)
    attention = costs.attention_flops(SHAPE.attention, TOKENS)
    assert costs.flops_executed(SHAPE, TOKENS, MAMBA, {0: 0.2, 2: 0.7}) == pytest.approx(base + 2 * scan)
    assert costs.flops_executed(SHAPE, TOKENS, MAMBA, {0: 0.0}) == base
    assert costs.flops_executed(SHAPE, TOKENS, MAMBA, {0: 1.0}) == pytest.approx(base + scan - attention)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hybrid_equals_the_flop_counter(alpha):
    model = attach_mamba_sidecar(blockffn(), layer_indices=[1, 2], alpha=alpha, gate_mode="fixed")
    mamba = model.model.layers[1].self_attn.sidecar.config
    input_ids = torch.zeros((1, TOKENS), dtype=torch.long)
    executed = counted(lambda: model(input_ids=input_ids, use_cache=False))
    rotary = counted(lambda: model.model.rotary_emb(torch.zeros(1), torch.arange(TOKENS)[None]))
    expected = costs.flops_executed(SHAPE, TOKENS, mamba, {1: alpha, 2: alpha}) * TOKENS
    assert expected == pytest.approx(executed - rotary, rel=1e-12)


def test_top_k_mixture_counts_the_experts_that_a_token_uses():
    config = MixtralConfig(**COMMON, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2)
    assert costs.mlp_flops(costs.model_shape(config).mlp) == 2 * 32 * 6 + 2 * 3 * 2 * 32 * 20


def test_what_has_no_closed_form_is_refused_by_name():
    config = MixtralConfig(**COMMON, num_local_experts=6)
    config.mlp_only_layers = [0]
    with pytest.raises(ValueError, match="mlp_only_layers"):
        costs.model_shape(config)

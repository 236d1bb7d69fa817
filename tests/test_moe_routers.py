"""Top-k softmax routers and BlockFFN's strongest experts, against routers computed by hand from the hooked input."""

import gc

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM
from src.routing_extractor import RouterShape, RoutingExtractor, TopKExtractor, router_shape

SIZES = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QWEN = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, head_dim=8)


def moe(name: str):
    """A tiny random model; its routers' weights are enlarged, so that probabilities differ clearly."""
    torch.manual_seed(0)
    if name == "mixtral":
        config = MixtralConfig(**SIZES, num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2)
        model = MixtralForCausalLM(config)
    elif name == "olmoe":
        config = OlmoeConfig(**SIZES, num_hidden_layers=2, num_experts=6, num_experts_per_tok=3)
        model = OlmoeForCausalLM(config)
    elif name == "qwen2_moe":
        config = Qwen2MoeConfig(**SIZES, **QWEN, num_hidden_layers=4, shared_expert_intermediate_size=8,
                                mlp_only_layers=[1])  # fmt: skip
        model = Qwen2MoeForCausalLM(config)
    elif name == "qwen2_moe_step":
        config = Qwen2MoeConfig(**SIZES, **QWEN, num_hidden_layers=4, shared_expert_intermediate_size=8,
                                decoder_sparse_step=2)  # fmt: skip
        model = Qwen2MoeForCausalLM(config)
    elif name == "qwen3_moe":
        config = Qwen3MoeConfig(**SIZES, **QWEN, num_hidden_layers=3, norm_topk_prob=True, mlp_only_layers=[0])
        model = Qwen3MoeForCausalLM(config)
    elif name == "deepseek_v3":
        sizes = SIZES | {"num_key_value_heads": 2, "num_hidden_layers": 2, "moe_intermediate_size": 12}
        config = DeepseekV3Config(**sizes, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
                                  first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
                                  qk_nope_head_dim=8, v_head_dim=8)  # fmt: skip
        model = DeepseekV3ForCausalLM(config)
    else:
        config = BlockFFNConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                num_key_value_heads=1, num_experts=10, expert_size=4, max_position_embeddings=64,
                                dim_model_base=16)  # fmt: skip
        model = BlockFFNForCausalLM(config)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".mlp.gate.weight" in parameter_name:
                parameter.normal_(std=0.5)
    return model.eval()


# {name: (layers with a router, layers without, E, K)}
SHAPES = {
    "mixtral": ([0, 1, 2], [], 8, 2),
    "olmoe": ([0, 1], [], 6, 3),
    "qwen2_moe": ([0, 2, 3], [1], 6, 3),
    "qwen2_moe_step": ([1, 3], [0, 2], 6, 3),
    "qwen3_moe": ([1, 2], [0], 6, 3),
}


def ids_of(rows: int = 2, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def hook_count(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def router_by_hand(hidden: np.ndarray, weight: np.ndarray, k: int):
    """Logits, softmax over all experts, the k largest, renormalised; hidden [B, T, D], weight [E, D]."""
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    raw = np.exp(logits - logits.max(axis=-1, keepdims=True))
    raw /= raw.sum(axis=-1, keepdims=True)
    experts = np.zeros((*hidden.shape[:2], k), dtype=int)
    probs = np.zeros((*hidden.shape[:2], k))
    for row in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            ranked = sorted(range(weight.shape[0]), key=lambda expert: -raw[row, token, expert])[:k]
            experts[row, token] = ranked
            probs[row, token] = raw[row, token, ranked] / raw[row, token, ranked].sum()
    return raw, experts, probs


@pytest.mark.parametrize("name", SHAPES)
def test_a_softmax_router_against_one_by_hand(name):
    layers, without, num_experts, k = SHAPES[name]
    model, ids, inputs = moe(name), ids_of(), {}
    handles = [
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda module, arguments, layer=layer: inputs.update({layer: arguments[0].detach().clone()})
        )
        for layer in layers
    ]
    signals, top_k = RoutingExtractor(model), TopKExtractor(model)
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    routing = top_k.get_top_k()
    assert signals.layers == top_k.layers == list(routing.layers) == layers
    assert signals.layers_without_router == top_k.layers_without_router == without
    shape = router_shape(model)
    assert (shape.layers, shape.layers_without_router) == (layers, without)
    assert (shape.num_experts, shape.top_k) == (num_experts, k)
    assert routing.num_experts == num_experts and routing.experts.shape == (len(layers), 2, 7, k)
    assert routing.experts.dtype == torch.int16 and routing.gating_probs.dtype == torch.float32
    for place, layer in enumerate(layers):
        weight = model.model.layers[layer].mlp.gate.weight.detach().numpy()
        raw, experts, probs = router_by_hand(inputs[layer].numpy(), weight, k)
        np.testing.assert_allclose(signals.get_routing_signals()[layer].numpy(), raw, atol=1e-6)
        np.testing.assert_array_equal(routing.experts[place].numpy(), experts)
        np.testing.assert_allclose(routing.gating_probs[place].numpy(), probs, atol=1e-6)
    np.testing.assert_allclose(routing.gating_probs.sum(-1).numpy(), 1, atol=1e-6)
    # the routers do differ between tokens: a constant answer would not pass
    assert len(np.unique(routing.experts.numpy())) > k


def test_weights_of_an_expert_and_of_a_layer_by_hand():
    model = moe("mixtral")
    width, expert_width = model.config.hidden_size, model.config.intermediate_size
    heads, head = model.config.num_attention_heads, width // model.config.num_attention_heads
    attention = 2 * width * heads * head + 2 * width * model.config.num_key_value_heads * head
    shape = router_shape(model)
    assert shape.expert_weights == 3 * width * expert_width
    assert shape.layer_weights == attention + 2 * width + 8 * width + shape.top_k * shape.expert_weights
    assert router_shape(moe("blockffn")).expert_weights is None


def test_signals_are_those_of_output_router_logits():
    model, ids = moe("mixtral"), ids_of()
    with RoutingExtractor(model) as extractor, torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    for layer, signal in extractor.get_routing_signals().items():
        torch.testing.assert_close(signal, logits[layer].softmax(-1).view(2, 7, 8))


def test_on_layer_is_told_the_softmax_and_keeps_nothing():
    model, seen = moe("olmoe"), {}
    with RoutingExtractor(model, on_layer=lambda layer, signal: seen.update({layer: signal.shape})) as extractor:
        model(ids_of())
    assert seen == {0: (2, 7, 6), 1: (2, 7, 6)}
    with pytest.raises(ValueError, match="no routing signal captured"):
        extractor.get_routing_signals()


def test_a_softmax_has_no_sparsity():
    model = moe("mixtral")
    with RoutingExtractor(model) as extractor:
        model(ids_of())
    with pytest.raises(ValueError, match="sparsity needs a BlockFFN"):
        extractor.compute_sparsity_stats()


@pytest.mark.parametrize("k", [1, 4, 10, None])
def test_blockffn_strongest_active_experts(k):
    model, ids = moe("blockffn"), ids_of(2, 9)
    with RoutingExtractor(model) as signals, TopKExtractor(model, k) as top_k, torch.no_grad():
        model(ids)
    routing, size = top_k.get_top_k(), k or 8
    assert routing.layers == (0, 1, 2) and routing.num_experts == 10 and routing.experts.shape == (3, 2, 9, size)
    assert router_shape(model) == RouterShape([0, 1, 2], [], 10, None)
    padded = 0
    for layer, signal in signals.get_routing_signals().items():
        for row in range(2):
            for token in range(9):
                strength = signal[row, token].tolist()
                ranked = sorted((e for e in range(10) if strength[e] > 0), key=lambda e: -strength[e])[:size]
                total = sum(strength[e] for e in ranked)
                fill = size - len(ranked)
                padded += fill
                assert routing.experts[layer, row, token].tolist() == ranked + [-1] * fill
                expected = [strength[e] / total for e in ranked] + [0.0] * fill
                assert routing.gating_probs[layer, row, token].tolist() == pytest.approx(expected, abs=1e-6)
    assert padded > 0 or size < 8  # the case of fewer than k active experts has occurred


def test_a_token_without_active_experts_is_all_padding():
    model = moe("blockffn")
    with torch.no_grad():
        model.model.layers[1].mlp.router_proj.weight.zero_()
        with TopKExtractor(model, 3) as extractor:
            model(ids_of())
    routing = extractor.get_top_k()
    assert (routing.experts[1] == -1).all() and (routing.gating_probs[1] == 0).all()
    assert (routing.experts[0, ..., 0] >= 0).any() and not routing.gating_probs.isnan().any()


@pytest.mark.parametrize("name", ["mixtral", "blockffn"])
def test_the_forward_is_unchanged_and_the_hooks_go(name):
    model, ids = moe(name), ids_of()
    with torch.no_grad():
        before = model(ids).logits
        with TopKExtractor(model) as extractor, RoutingExtractor(model):
            assert hook_count(model) > 0
            assert torch.equal(model(ids).logits, before)
        assert hook_count(model) == 0
        captured = extractor.get_top_k()
        model(ids_of(seed=1))
    extractor.close()
    assert torch.equal(extractor.get_top_k().experts, captured.experts)

    with pytest.raises(RuntimeError, match="inside"), TopKExtractor(model):
        raise RuntimeError("inside")
    assert hook_count(model) == 0
    abandoned = TopKExtractor(model)
    assert hook_count(model) > 0
    del abandoned
    gc.collect()
    assert hook_count(model) == 0


def test_cached_decoding_gives_the_last_token():
    model, ids = moe("mixtral"), ids_of()
    with TopKExtractor(model) as extractor, torch.no_grad():
        model(ids)
        whole = extractor.get_top_k()
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache)
        last = extractor.get_top_k()
    assert last.experts.shape == (3, 2, 1, 2)
    torch.testing.assert_close(last.gating_probs, whole.gating_probs[:, :, -1:], atol=1e-5, rtol=1e-4)


def test_bfloat16_probabilities_are_made_in_float32():
    model = moe("olmoe").to(torch.bfloat16)
    with TopKExtractor(model) as extractor, torch.no_grad():
        model(ids_of())
    probs = extractor.get_top_k().gating_probs
    assert probs.dtype == torch.float32
    np.testing.assert_allclose(probs.sum(-1).numpy(), 1, atol=1e-6)


def test_refusals():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1))
    with pytest.raises(ValueError, match="llama has no router"):
        TopKExtractor(llama)
    with pytest.raises(ValueError, match="llama has no router"):
        router_shape(llama)
    with pytest.raises(ValueError, match="no routing captured"):
        TopKExtractor(moe("mixtral")).get_top_k()
    with pytest.raises(ValueError, match="top_k is 0"):
        TopKExtractor(moe("mixtral"), 0)
    with pytest.raises(ValueError, match="top_k is 11, the model has 10 experts"):
        TopKExtractor(blockffn := moe("blockffn"), 11)
    assert hook_count(blockffn) == 0
    model = moe("mixtral")
    with TopKExtractor(model, 3), pytest.raises(ValueError, match="top_k is 3, but this model's routers choose 2"):
        model(ids_of())


def test_a_sigmoid_router_is_refused_by_name():
    model = moe("deepseek_v3")
    with TopKExtractor(model), pytest.raises(ValueError, match="DeepseekV3TopkRouter.*only top-k softmax routers"):
        model(ids_of())
    assert hook_count(model) == 0

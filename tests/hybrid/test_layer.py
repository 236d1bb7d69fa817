"""The hybrid layer's invariants on tiny random BlockFFN (vanilla, MLA), Llama and Qwen3 models, float32 on CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from src import mamba_sidecar as ms
from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef
from src.hybrid import sidecar
from src.hybrid.gates import (
    FixedGate,
    LearnedGate,
    MaskGate,
    RandomGate,
    RoutingGate,
    ScoreDistribution,
    matched_random_masks,
)
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM
from src.routing_extractor import RoutingExtractor

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LAYERS, EXPERTS = 97, 5, 16
KINDS = ("vanilla", "mla", "llama", "qwen3")
# Cached and uncached passes differ by float32 rounding only.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def build(kind, seed=0):
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "mla" else 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=96))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=96, head_dim=16))
    else:
        extra = {"num_experts": EXPERTS, "expert_size": 8, "attention_type": kind, "dim_model_base": 64}
        if kind == "mla":
            extra |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        model = BlockFFNForCausalLM(BlockFFNConfig(**common, **extra))
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as asked
    return model.eval().requires_grad_(False)


def tokens(batch, length, seed=0):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def distributions(layers, hard_at=0.5):
    """Ties wherever sparsity is `hard_at`: half of the mass lies there."""
    return {layer: ScoreDistribution.of(np.array([0.0, 1.0, hard_at, hard_at])) for layer in layers}


def gates_for(kind):
    everywhere = {
        "fixed_0": FixedGate(0.0),
        "fixed_0.3": FixedGate(0.3),
        "fixed_1": FixedGate(1.0),
        "mixed": FixedGate(0.0, per_layer={1: 1.0, 2: 0.5}),
        "random": RandomGate(0.5, seed=3),
        "learned_soft": LearnedGate(0.5),
        "learned_hard": LearnedGate(0.5, hard=True),
    }
    routing = {
        "previous_soft": RoutingGate(0.5, threshold=0.5),
        "previous_hard": RoutingGate(0.5, hard=True, distributions=distributions(range(LAYERS))),
        "lookahead_soft": RoutingGate(0.4, "lookahead", threshold=0.5),
        "lookahead_hard": RoutingGate(0.4, "lookahead", True, distributions=distributions(range(LAYERS))),
        "inverted_hard": RoutingGate(0.5, hard=True, invert=True, distributions=distributions(range(LAYERS))),
    }
    return everywhere | (routing if kind in ("vanilla", "mla") else {})


# Every gate on vanilla BlockFFN; on the other attentions one of each kind, for the suite's time.
ONE_OF_EACH = ("mixed", "fixed_1", "random", "learned_hard", "previous_hard", "lookahead_soft")
CASES = [(kind, name) for kind in KINDS for name in gates_for(kind) if kind == "vanilla" or name in ONE_OF_EACH]


def attached(kind, name="fixed_0.3", layers=(1, 2, 4), seed=0, **settings):
    model = ms.attach_mamba_sidecar(build(kind), layers, gate=gates_for(kind)[name], seed=seed, **settings)
    for index, hybrid in enumerate(ms.attachment_of(model).hybrid_layers()):
        torch.manual_seed(index)
        torch.nn.init.normal_(hybrid.gate_proj.weight, std=0.3)
    return model


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def cached_logits(model, ids, pieces, mask=None, cache=None):
    """Logits of `ids` fed in pieces of the given lengths through one cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    outputs, start = [], 0
    with torch.no_grad():
        for piece in pieces:
            stop = start + piece
            given = None if mask is None else mask[:, :stop]
            outputs.append(
                model(ids[:, start:stop], attention_mask=given, past_key_values=cache, use_cache=True).logits
            )
            start = stop
    assert start == ids.shape[1]
    return torch.cat(outputs, dim=1)


# ---------------------------------------------------------------- identity, attaching, detaching


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_0_and_detaching_are_bit_identical(kind):
    model, ids = build(kind), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    before = logits(model, ids), logits(model, ids, attention_mask=mask)
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    fingerprint = ms.base_fingerprint(model)
    assert ms.attach_mamba_sidecar(model, layer_indices=[0, 1, 4], alpha=0.0) is model
    assert ms.is_attached(model) and ms.base_fingerprint(model) == fingerprint
    assert torch.equal(logits(model, ids), before[0])
    assert torch.equal(logits(model, ids, attention_mask=mask), before[1])
    ms.set_all_alphas(model, alpha=0.3)
    assert not torch.equal(logits(model, ids), before[0])
    with ms.bypass_sidecars(model):
        assert torch.equal(logits(model, ids), before[0])
    assert not torch.equal(logits(model, ids), before[0])
    assert ms.detach_mamba_sidecars(model) is model
    assert not ms.is_attached(model)
    assert torch.equal(logits(model, ids), before[0])
    assert model.config.to_dict() == config
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("gate_mode", ["routing", "learned", "random"])
def test_every_mode_at_alpha_0_is_the_base_model(gate_mode):
    model, ids = build("vanilla"), tokens(1, 20)
    before = logits(model, ids)
    ms.attach_mamba_sidecar(model, [1, 3], alpha=0.0, gate_mode=gate_mode)
    assert torch.equal(logits(model, ids), before)
    ms.set_all_alphas(model, 0.5)
    assert not torch.equal(logits(model, ids), before)


def test_calls_of_the_design_work_as_they_stand():
    model = build("vanilla")
    model = ms.attach_mamba_sidecar(model, layer_indices=[1, 2], alpha=0.5, gate_mode="routing")
    first = logits(model, tokens(1, 9))
    ms.set_all_alphas(model, alpha=0.3)
    assert torch.isfinite(first).all() and not torch.equal(first, logits(model, tokens(1, 9)))


def test_sidecar_is_a_real_mamba2():
    model = attached("vanilla")
    for hybrid in ms.attachment_of(model).hybrid_layers():
        assert type(hybrid.sidecar.mixer) is Mamba2Mixer
        assert hybrid.sidecar.config.state_size == 64 and hybrid.sidecar.config.chunk_size == 64
        assert not any(parameter.requires_grad for parameter in hybrid.parameters())


def test_sidecars_are_drawn_from_their_seed_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = ms.MambaSidecar(64, 2, seed=5)
    assert torch.equal(torch.rand(3), expected)
    same, other, layer = ms.MambaSidecar(64, 2, seed=5), ms.MambaSidecar(64, 2, seed=6), ms.MambaSidecar(64, 3, seed=5)
    weight = one.mixer.in_proj.weight
    assert torch.equal(weight, same.mixer.in_proj.weight)
    assert not torch.equal(weight, other.mixer.in_proj.weight) and not torch.equal(weight, layer.mixer.in_proj.weight)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"layer_indices": [1, 9]}, ["layer 9", "0 to 4"]),
        ({"layer_indices": [-1]}, ["layer -1", "0 to 4"]),
        ({"layer_indices": []}, ["layers is empty"]),
        ({"layer_indices": [1], "alpha": 1.5}, ["1.5", "[0, 1]"]),
        ({"layer_indices": [1], "alpha": -0.5, "gate_mode": "routing"}, ["-0.5", "[0, 1]"]),
        ({"layer_indices": [1], "gate_mode": "magic"}, ["'magic'", "fixed", "routing", "learned", "random"]),
        ({"layer_indices": [0, 1], "gate_mode": "routing"}, ["layer 0", "previous", "lookahead"]),
        ({"layer_indices": [1], "gate_mode": "routing", "signal": "self"}, ["'self'", "offline"]),
        ({"layer_indices": [1], "settings": {"headdim": 48}}, ["128", "48"]),
        ({"layer_indices": [1], "settings": {"init": "best"}}, ["'best'", "random", "attention"]),
        ({"layer_indices": [1], "settings": {"d_state": 0}}, ["d_state", "0"]),
        ({"layer_indices": [1], "sidecar_dir": "/nowhere"}, ["/nowhere", "--retrain"]),
    ],
)
def test_wrong_arguments_are_refused_and_leave_the_model_alone(kwargs, words):
    model, ids = build("vanilla"), tokens(1, 8)
    before = logits(model, ids)
    with pytest.raises(ValueError) as error:
        settings = kwargs.pop("settings", None)
        ms.attach_mamba_sidecar(model, **kwargs, settings=settings and ms.SidecarSettings(**settings))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not ms.is_attached(model) and torch.equal(logits(model, ids), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attaching_twice_and_detaching_nothing_are_refused():
    model = attached("vanilla")
    with pytest.raises(ValueError, match=r"attached already, to layers \[1, 2, 4\].*detach"):
        ms.attach_mamba_sidecar(model, [0])
    ms.detach_mamba_sidecars(model)
    for call in (ms.detach_mamba_sidecars, ms.attachment_of, lambda m: ms.set_all_alphas(m, 0.5)):
        with pytest.raises(ValueError, match="no sidecars"):
            call(model)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_models_without_router(kind):
    model = build(kind)
    with pytest.raises(ValueError, match=f"router.*{kind}.*fixed, learned or random"):
        ms.attach_mamba_sidecar(model, [1], gate_mode="routing")
    for mode in ("fixed", "learned", "random"):
        ms.attach_mamba_sidecar(model, [1, 2], gate_mode=mode)
        assert torch.isfinite(logits(model, tokens(1, 6))).all()
        with pytest.raises(ValueError, match="router"):
            ms.set_gate(model, RoutingGate())
        ms.detach_mamba_sidecars(model)


# ---------------------------------------------------------------- the formula


def test_output_is_the_mix_of_both_paths():
    model, ids = attached("vanilla", "previous_soft"), tokens(2, 30)
    seen = {}
    hybrid = ms.attachment_of(model).hybrid_layers()[1]
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
        for name, module in (("attention", hybrid.attention), ("mamba", hybrid.sidecar), ("mix", hybrid))
    ]
    router = model.model.layers[1].mlp.router_act_fn
    hooks.append(router.register_forward_hook(lambda _m, _i, output: seen.__setitem__("router", output)))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    fraction = (seen["router"] == 0).float().mean(-1)
    m = torch.sigmoid((fraction - 0.5) / 0.1)[..., None]
    torch.testing.assert_close(seen["mix"][0], (1 - m) * seen["attention"][0] + m * seen["mamba"])
    assert 0.1 < float(m.mean()) < 0.9


def test_lookahead_reads_the_layers_own_router():
    model, ids = attached("vanilla", "lookahead_soft"), tokens(2, 30)
    layer, seen = model.model.layers[2], {}
    hook = layer.self_attn.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.__setitem__("x", kwargs["hidden_states"]), with_kwargs=True
    )
    ms.attachment_of(model).on_batch([WindowRef("a", 0, 30), WindowRef("b", 0, 30)])
    with ms.record_gates(model) as record:
        logits(model, ids)
    hook.remove()
    want = (torch.relu(seen["x"] @ layer.mlp.router_proj.weight.T) == 0).float().mean(-1)
    np.testing.assert_array_equal(record.scores["b"][2], want[1].numpy())


def test_a_path_without_weight_does_not_run():
    model, ids = attached("vanilla", "fixed_1"), tokens(1, 12)
    hybrids, ran = ms.attachment_of(model).hybrid_layers(), []
    for hybrid in hybrids:
        hybrid.attention.register_forward_pre_hook(lambda *_: ran.append("attention"))
        hybrid.sidecar.register_forward_pre_hook(lambda *_: ran.append("mamba"))
    for alpha, paths in ((1.0, ["mamba"]), (0.0, ["attention"]), (0.5, ["attention", "mamba"])):
        ms.set_all_alphas(model, alpha)
        ran.clear()
        logits(model, ids)
        assert ran == paths * len(hybrids)


@pytest.mark.parametrize("name", ["random", "learned_hard", "previous_hard", "lookahead_hard", "inverted_hard"])
def test_hard_gates_pick_one_path_per_token(name):
    model, ids = attached("vanilla", name), tokens(3, 50)
    attachment = ms.attachment_of(model)
    attachment.on_batch([WindowRef(str(row), 0, 50) for row in range(3)])
    with ms.record_gates(model) as record:
        logits(model, ids)
    for layers in record.shares.values():
        for values in layers.values():
            assert set(np.unique(values)) <= {0.0, 1.0}
    assert all(0.05 < share < 0.95 for share in record.layer_shares().values())


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("kind, name", CASES)
def test_cached_equals_uncached(kind, name):
    """Prefill, chunked prefill and decoding; and no gate flips between them."""
    model, ids = attached(kind, name), tokens(2, 33)
    attachment = ms.attachment_of(model)
    windows = [WindowRef("a", 0, 33), WindowRef("b", 0, 33)]
    attachment.on_batch(windows)
    with ms.record_gates(model) as whole:
        want = logits(model, ids)
    for pieces in ([20, *[1] * 13], [1] * 33, [9, 7, 1, 1, 15], [33]):
        attachment.on_batch([replace(window, length=pieces[0]) for window in windows])
        with ms.record_gates(model) as record:
            got = cached_logits(model, ids, pieces)
        torch.testing.assert_close(got, want, **CLOSE)
        for document in ("a", "b"):
            for layer in (1, 2, 4):
                np.testing.assert_allclose(
                    record.shares[document][layer],
                    whole.shares[document][layer],
                    atol=1e-4,
                    err_msg=f"{pieces} {layer}",
                )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_from", ["config", "nothing"])
def test_alpha_1_everywhere_keeps_positions(kind, cache_from):
    """All layers without keys: lengths, RoPE and masks must still count on, also after switching single layers back."""
    model, ids = build(kind), tokens(2, 24)
    ms.attach_mamba_sidecar(model, range(LAYERS), alpha=1.0)
    for gate in (FixedGate(1.0), FixedGate(1.0, per_layer={3: 0.0}), FixedGate(1.0, per_layer={0: 0.5, 4: 0.0})):
        ms.set_gate(model, gate)
        cache = DynamicCache(config=model.config) if cache_from == "config" else DynamicCache()
        got = cached_logits(model, ids, [10, 1, 1, 5, *[1] * 7], cache=cache)
        torch.testing.assert_close(got, logits(model, ids), **CLOSE)
        assert cache.get_seq_length() == 24


@pytest.mark.parametrize("kind, name", CASES)
def test_generate_with_and_without_cache_and_in_a_padded_batch(kind, name):
    model = attached(kind, name, layers=(1, 2, 4))
    prompts = [tokens(1, length, seed=length) for length in (5, 11, 8)]
    settings = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(prompt, use_cache=True, **settings)[0, prompt.shape[1] :] for prompt in prompts]
    for prompt, want in zip(prompts, alone, strict=True):
        got = model.generate(prompt, use_cache=False, **settings)[0, prompt.shape[1] :]
        assert got.tolist() == want.tolist()
    ids, mask = left_padded(prompts)
    batch = model.generate(ids, attention_mask=mask, use_cache=True, **settings)[:, ids.shape[1] :]
    assert batch.tolist() == [want.tolist() for want in alone]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_every_layer_at_alpha_1(kind):
    model = ms.attach_mamba_sidecar(build(kind), range(LAYERS), alpha=1.0)
    prompt, settings = tokens(2, 7), {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(prompt, **settings), model.generate(prompt, use_cache=False, **settings))


def test_beam_search_reorders_the_mamba_states():
    model, prompt = attached("vanilla", "fixed_0.3"), tokens(2, 7)
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(prompt, **settings), model.generate(prompt, use_cache=False, **settings))


def test_a_cache_is_reusable_after_reset_and_refused_when_paths_changed():
    model, ids = attached("vanilla", "fixed_0.3"), tokens(1, 12)
    cache = DynamicCache(config=model.config)
    first = cached_logits(model, ids, [8, 4], cache=cache)
    cache.reset()
    torch.testing.assert_close(cached_logits(model, ids, [8, 4], cache=cache), first)
    for before, after, path in ((1.0, 0.5, "attention"), (0.0, 0.5, "the sidecar"), (0.0, 1.0, "the sidecar")):
        ms.set_all_alphas(model, before)
        cache = DynamicCache(config=model.config)
        cached_logits(model, ids, [12], cache=cache)
        ms.set_all_alphas(model, after)
        with pytest.raises(ValueError, match=f"{path} of layer 1 has seen 0.*new cache"), torch.no_grad():
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    ms.detach_mamba_sidecars(model)
    cache = DynamicCache(config=model.config)
    cached_logits(model, ids, [12], cache=cache)
    ms.attach_mamba_sidecar(model, [1], alpha=0.5)
    with pytest.raises(ValueError, match="layer 1's sidecar has not seen"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_a_static_cache_is_refused():
    model = attached("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="DynamicCache"), torch.no_grad():
        model(tokens(1, 4), past_key_values=cache, use_cache=True)


# ---------------------------------------------------------------- padding, documents


def left_padded(prompts):
    longest = max(prompt.shape[1] for prompt in prompts)
    ids, mask = (
        torch.ones(len(prompts), longest, dtype=torch.int64),
        torch.zeros(len(prompts), longest, dtype=torch.int64),
    )
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind, name", CASES)
def test_padded_batches_equal_single_runs(kind, name, side):
    model = attached(kind, name)
    rows = [tokens(1, length, seed=length) for length in (3, 70, 21)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = ids.flip(-1), mask.flip(-1)
        for row, alone in enumerate(rows):
            ids[row, : alone.shape[1]] = alone
    batch = logits(model, ids, attention_mask=mask)
    for row, alone in enumerate(rows):
        torch.testing.assert_close(batch[row, mask[row] == 1], logits(model, alone)[0], **CLOSE)


@pytest.mark.parametrize("name", ["fixed_0.3", "fixed_1", "random", "previous_hard", "lookahead_soft"])
def test_left_padded_cached_in_pieces(name):
    """A piece that is padding for one row only, single tokens included."""
    model = attached("vanilla", name)
    rows = [tokens(1, length, seed=length) for length in (5, 16)]
    ids, mask = left_padded(rows)
    for pieces in ([16], [1] * 16, [4, 4, 4, 4], [14, 1, 1]):
        batch = cached_logits(model, ids, pieces, mask=mask)
        for row, alone in enumerate(rows):
            torch.testing.assert_close(batch[row, mask[row] == 1], logits(model, alone)[0], **CLOSE)


def test_windows_of_a_document_gate_alike():
    """The hash knows the position in the document, not in the window."""
    model, ids = attached("vanilla", "random"), tokens(1, 60)
    attachment = ms.attachment_of(model)
    records = []
    for windows in ([("x", 0, 60)], [("x", 20, 40)], [("y", 0, 60)]):
        attachment.on_batch([WindowRef(*window) for window in windows])
        with ms.record_gates(model) as record:
            logits(model, ids[:, windows[0][1] :])
        records.append(record.shares)
    np.testing.assert_array_equal(records[0]["x"][2][20:], records[1]["x"][2][20:])
    assert np.isnan(records[1]["x"][2][:20]).all()
    assert not np.array_equal(records[0]["x"][2], records[2]["y"][2])
    assert not np.array_equal(records[0]["x"][2], records[0]["x"][4])


def test_record_counts_overlapping_windows_once():
    model = attached("vanilla", "previous_hard")
    document = tokens(1, 50)
    attachment = ms.attachment_of(model)
    pieces = [(20, 50), (0, 30)]  # whatever the order, position 25 belongs to the window from 0
    with ms.record_gates(model) as record:
        for start, stop in pieces:
            attachment.on_batch([WindowRef("d", start, stop - start)])
            logits(model, document[:, start:stop])
    with ms.record_gates(model) as first:
        attachment.on_batch([WindowRef("d", 0, 30)])
        logits(model, document[:, :30])
    for layer in (1, 2, 4):
        assert record.shares["d"][layer].shape == (50,)
        np.testing.assert_array_equal(record.shares["d"][layer][:30], first.shares["d"][layer])
        assert record.layer_shares()[layer] == pytest.approx(float(record.shares["d"][layer].mean()))
        assert record.document_shares()["d"][layer] == pytest.approx(record.layer_shares()[layer])
    with ms.record_gates(model) as record:
        logits(model, tokens(2, 9))  # a batch nobody told about
    assert record.shares == {} and set(record.layer_shares()) == {1, 2, 4}
    with ms.record_gates(model) as record, ms.bypass_sidecars(model):
        logits(model, document)
    with pytest.raises(ValueError, match="no gate ran"):
        record.layer_shares()


def test_matched_masks_reproduce_counts_in_windows_and_batches():
    model = attached("vanilla", "previous_hard")
    attachment = ms.attachment_of(model)
    documents = {"p": tokens(1, 40, seed=1), "q": tokens(1, 25, seed=2)}
    ids, mask = torch.zeros(2, 40, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.int64)
    for row, document in enumerate(documents.values()):
        ids[row, : document.shape[1]], mask[row, : document.shape[1]] = document, 1
    windows = [WindowRef(name, 0, document.shape[1]) for name, document in documents.items()]
    attachment.on_batch(windows)
    with ms.record_gates(model) as routed:
        logits(model, ids, attention_mask=mask)
    masks = matched_random_masks(routed.shares, seed=0)
    ms.set_gate(model, MaskGate(masks))
    attachment.on_batch(windows)
    with ms.record_gates(model) as control:
        whole = logits(model, ids, attention_mask=mask)
    assert control.document_shares() == routed.document_shares()
    attachment.on_batch([WindowRef("q", 0, 25)])
    torch.testing.assert_close(logits(model, documents["q"]), whole[1:, :25], **CLOSE)
    attachment.on_batch([WindowRef("p", 10, 30)])
    with ms.record_gates(model) as tail:
        logits(model, documents["p"][:, 10:])
    np.testing.assert_array_equal(tail.shares["p"][1][10:], masks["p"][1][10:])
    attachment.on_batch([WindowRef("r", 0, 25)])
    with pytest.raises(ValueError, match="layer 1 of document 'r'"):
        logits(model, documents["q"])
    attachment.on_batch([WindowRef("q", 5, 25)])
    with pytest.raises(ValueError, match="ends at 25.*30"):
        logits(model, documents["q"])
    with pytest.raises(ValueError, match="on_batch"):
        logits(model, tokens(1, 3))


# ---------------------------------------------------------------- causality


@pytest.mark.parametrize("kind, name", CASES)
def test_no_deployable_gate_looks_ahead(kind, name):
    model, ids = attached(kind, name), tokens(1, 90)
    base = logits(model, ids)
    for position in (0, 31, 64, 80):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] - 2 + 1) % (VOCAB - 2) + 2
        other = logits(model, changed)
        torch.testing.assert_close(other[:, :position], base[:, :position], rtol=0, atol=1e-6)
        assert not torch.equal(other[:, position], base[:, position])


def test_the_causality_test_would_notice():
    """An offline mask that depends on the last token changes earlier logits."""
    model, ids = attached("vanilla"), tokens(1, 30)
    outputs = []
    for last in (0.0, 1.0):
        ms.set_gate(model, MaskGate({"d": {layer: np.full(30, last) for layer in (1, 2, 4)}}))
        ms.attachment_of(model).on_batch([WindowRef("d", 0, 30)])
        outputs.append(logits(model, ids))
    assert not torch.allclose(outputs[0][:, :10], outputs[1][:, :10], atol=1e-3)


@pytest.mark.parametrize("name", ["previous_hard", "lookahead_soft", "fixed_1"])
def test_router_signals_are_captured_as_on_any_model(name):
    """The extractor sees the hybrid's own router activations, and what the previous-layer gate reads is among them."""
    model, ids = attached("vanilla", name), tokens(2, 20)
    layer, seen = model.model.layers[2], {}
    hook = layer.mlp.register_forward_pre_hook(lambda _m, args: seen.__setitem__("x", args[0]))
    with RoutingExtractor(model) as extractor, ms.record_gates(model) as record:
        ms.attachment_of(model).on_batch([WindowRef("a", 0, 20), WindowRef("b", 0, 20)])
        want = logits(model, ids)
        signals = extractor.get_routing_signals()
    hook.remove()
    assert sorted(signals) == list(range(LAYERS)) and signals[0].shape == (2, 20, EXPERTS)
    torch.testing.assert_close(signals[2], torch.relu(seen["x"] @ layer.mlp.router_proj.weight.T))
    assert torch.equal(logits(model, ids), want)
    if name == "previous_hard":
        np.testing.assert_array_equal(record.scores["b"][2], (signals[1][1] == 0).float().mean(-1).numpy())


# ---------------------------------------------------------------- calibration


def documents(count, length, seed):
    rng = np.random.default_rng(seed)
    return [TokenDocument(f"doc{i}", "docs", rng.integers(2, VOCAB, length + i), length) for i in range(count)]


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize(
    "gate", [RoutingGate(hard=True), RoutingGate(temperature=0.05), RoutingGate(signal="lookahead", hard=True)]
    + [RoutingGate(hard=True, invert=True), LearnedGate(hard=True), LearnedGate(temperature=0.5)],
    ids=["hard", "soft", "lookahead", "inverted", "learned_hard", "learned_soft"],
)  # fmt: skip
def test_calibrated_gates_meet_their_share(gate, share):
    model = attached("vanilla")
    before = ms.attachment_of(model).gate
    calibrated = ms.calibrate_gates(
        model, replace(gate, alpha=share), documents(24, 90, 0), max_seq_len=64, batch_size=4
    )
    assert ms.attachment_of(model).gate is before
    ms.set_gate(model, calibrated)
    with ms.record_gates(model) as record:
        for document in documents(24, 90, 1):
            logits(model, torch.as_tensor(document.ids)[None])
    for layer, realised in record.layer_shares().items():
        assert realised == pytest.approx(share, abs=0.05), layer


def test_calibration_refuses_what_it_cannot_do():
    model = attached("vanilla")
    for gate, docs, words in (
        (FixedGate(0.5), documents(2, 9, 0), "fixed"),
        (RoutingGate(1.0), documents(2, 9, 0), "without a choice"),
        (RoutingGate(0.5), [], "no documents"),
    ):
        with pytest.raises(ValueError, match=words):
            ms.calibrate_gates(model, gate, docs, max_seq_len=32)


# ---------------------------------------------------------------- initialisation from attention


@pytest.mark.parametrize("kind", ["vanilla", "llama", "qwen3"])
def test_attention_init_copies_projections(kind):
    model = build(kind)
    attention = model.model.layers[2].self_attn
    ms.attach_mamba_sidecar(model, [2], alpha=1.0, settings=ms.SidecarSettings(init="attention"))
    mixer = model.model.layers[2].self_attn.sidecar.mixer
    assert (mixer.n_groups, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, mixer.intermediate_size) == (
        4,
        4,
        16,
        16,
        64,
    )
    x = torch.randn(1, 6, 64)
    _, mixed, _ = mixer.in_proj(x).split([64, 192, 4], dim=-1)
    value, key, query = mixed.split(64, dim=-1)
    heads = lambda projection, repeat: projection(x).view(1, 6, -1, 16).repeat_interleave(repeat, 2).flatten(2)  # noqa: E731
    torch.testing.assert_close(value, heads(attention.v_proj, 2))
    torch.testing.assert_close(key, heads(attention.k_proj, 2))
    torch.testing.assert_close(query, heads(attention.q_proj, 1))
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    convolved = mixer.conv1d(mixed.transpose(1, 2))[..., :6].transpose(1, 2)
    torch.testing.assert_close(convolved, mixed)
    assert torch.isfinite(logits(model, tokens(1, 12))).all()
    torch.testing.assert_close(
        cached_logits(model, tokens(2, 20), [9, *[1] * 11]), logits(model, tokens(2, 20)), **CLOSE
    )


def test_attention_init_needs_vanilla_attention():
    with pytest.raises(ValueError, match="layer 2.*MiniCPM3Attention.*MLA.*random"):
        ms.attach_mamba_sidecar(build("mla"), [2], settings=ms.SidecarSettings(init="attention"))


# ---------------------------------------------------------------- on disk


def test_sidecars_round_trip_and_are_refused_elsewhere(tmp_path):
    model, ids = attached("vanilla", "fixed_0.3", seed=4), tokens(1, 20)
    want = logits(model, ids)
    paths = ms.save_sidecars(model, tmp_path, "a", {"loss": 0.5})
    ms.save_learned_gates(model, tmp_path)
    assert all(path.is_file() for path in paths) and not list(tmp_path.rglob("*.tmp"))
    assert ms.available_layers(tmp_path, "a") == [1, 2, 4] and ms.available_layers(tmp_path, "b") == []
    first = {path: path.read_bytes() for path in paths}
    ms.save_sidecars(model, tmp_path, "a", {"loss": 0.5})
    assert all(path.read_bytes() == content for path, content in first.items())
    gates_before = ms.attachment_of(model).hybrid_layers()[0].gate_proj.weight.clone()
    ms.detach_mamba_sidecars(model)

    ms.attach_mamba_sidecar(model, [1, 2, 4], alpha=0.3, sidecar_dir=tmp_path, stage="a", seed=9)
    assert torch.equal(logits(model, ids), want)
    ms.load_learned_gates(model, tmp_path)
    assert torch.equal(ms.attachment_of(model).hybrid_layers()[0].gate_proj.weight, gates_before)
    ms.detach_mamba_sidecars(model)

    for layers, stage, words in (
        ([1, 3], "a", "stage a sidecar for layer 3.*--retrain"),
        ([1], "b", "stage b sidecar for layer 1.*--retrain"),
        ([1], "c", "unknown stage 'c'.*a, b"),
    ):
        with pytest.raises(ValueError, match=words):
            ms.attach_mamba_sidecar(model, layers, sidecar_dir=tmp_path, stage=stage)
        assert not ms.is_attached(model)
    with pytest.raises(ValueError, match=r"another checkpoint.*python scripts/04_test_sidecar.py --retrain"):
        ms.attach_mamba_sidecar(build("vanilla", seed=1), [1], sidecar_dir=tmp_path)
    with pytest.raises(ValueError, match="d_state=32"):
        ms.attach_mamba_sidecar(model, [1], sidecar_dir=tmp_path, settings=ms.SidecarSettings(d_state=32))

    layer_1 = tmp_path / "stage_a" / "layer_1.safetensors"
    layer_1.write_bytes(layer_1.read_bytes()[:1000])
    with pytest.raises(ValueError, match="layer_1.safetensors cannot be read.*--retrain"):
        ms.attach_mamba_sidecar(model, [1], sidecar_dir=tmp_path)
    (tmp_path / "sidecars.json").write_text("{")
    with pytest.raises(ValueError, match="damaged.*--retrain"):
        ms.read_index(tmp_path)


def test_index_grows_by_layer_and_starts_again_for_another_model(tmp_path):
    model, settings = build("vanilla"), ms.SidecarSettings()
    ms.update_index(tmp_path, model, settings, "a", [2], {"steps": 5})
    ms.update_index(tmp_path, model, settings, "a", [0, 2], {"seed": 0})
    ms.update_index(tmp_path, model, settings, "b", [1], {})
    index = json.loads((tmp_path / "sidecars.json").read_text())
    assert index["stages"]["a"] == {"layers": [0, 2], "training": {"steps": 5, "seed": 0}}
    assert ms.available_layers(tmp_path, "b") == [1]
    ms.update_index(tmp_path, build("vanilla", seed=1), settings, "a", [3], {})
    assert ms.available_layers(tmp_path, "a") == [3] and ms.available_layers(tmp_path, "b") == []


def test_fingerprint_is_the_same_for_every_dtype_of_a_16_bit_checkpoint():
    model = build("vanilla").bfloat16()
    want = ms.base_fingerprint(model)
    assert ms.base_fingerprint(model.float()) == want
    assert ms.base_fingerprint(model.half()) == want
    assert ms.base_fingerprint(build("vanilla", seed=1).bfloat16()) != want


# ---------------------------------------------------------------- number formats, kernels


def test_bfloat16_model_and_autocast():
    ids = tokens(2, 30)
    model = ms.attach_mamba_sidecar(build("vanilla").bfloat16(), [1, 2], alpha=0.5)
    assert ms.attachment_of(model).hybrid_layers()[0].sidecar.mixer.in_proj.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(model, ids).float()).all()
    sidecar, x = ms.MambaSidecar(64, 0), torch.randn(2, 40, 64)
    with torch.no_grad():
        want = sidecar(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sidecar(x), want)


FAKE_KERNELS = {
    "mamba_ssm/ops/triton/ssd_combined.py": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "causal_conv1d/__init__.py": ("causal_conv1d_fn", "causal_conv1d_update"),
}
PROBE = """
import torch
from src.mamba_sidecar import MambaSidecar, mamba_kernels
print(mamba_kernels(), mamba_kernels("cpu"))
torch.manual_seed(0)
x = torch.randn(1, 30, 64)
print(MambaSidecar(64, 0).eval()(x).double().sum().item())
"""


def test_kernels_are_read_from_what_transformers_bound(tmp_path):
    """A process where packages of the kernels' names can be imported binds them, and still computes on the CPU."""
    for file, names in FAKE_KERNELS.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join(f"def {name}(*args, **kwargs):\n    raise RuntimeError('a kernel ran')\n" for name in names)
        )
    for folder in ("mamba_ssm", "mamba_ssm/ops", "mamba_ssm/ops/triton"):
        (tmp_path / folder / "__init__.py").write_text("")
    lines = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert lines[-2] == "mamba-ssm PyTorch"
    torch.manual_seed(0)
    x = torch.randn(1, 30, 64)
    assert float(lines[-1]) == pytest.approx(ms.MambaSidecar(64, 0).eval()(x).double().sum().item(), abs=1e-4)
    assert ms.mamba_kernels("cpu") == "PyTorch"


def test_pytorch_scan_puts_everything_back():
    before = [getattr(sidecar.modeling_mamba2, name) for name in sidecar.KERNEL_FUNCTIONS]
    with pytest.raises(KeyError), sidecar.pytorch_scan():
        assert all(getattr(sidecar.modeling_mamba2, name).__closure__ is None for name in sidecar.KERNEL_FUNCTIONS)
        raise KeyError
    assert [getattr(sidecar.modeling_mamba2, name) for name in sidecar.KERNEL_FUNCTIONS] == before

"""The training of the shipped checkpoint: its objectives against brute force, its fast forward against the model's."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

_SPEC = importlib.util.spec_from_file_location(
    "train_tiny", Path(__file__).resolve().parents[2] / "scripts" / "dev" / "train_tiny.py"
)
train_tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_tiny)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return train_tiny.BlockFFNForCausalLM(train_tiny.tiny_config(num_layers=7)).eval()


def test_training_forward_is_the_models_own(model):
    """`losses` calls the layers itself so that they compile well; it must be the same function as the model."""
    ids = torch.randint(2, train_tiny.VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        nll, locality, sparsification = train_tiny.losses(model, ids)
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert nll.item() == pytest.approx(expected.item(), abs=1e-5)
    router_logits = []
    hooks = [
        layer.mlp.router_proj.register_forward_hook(lambda _m, _i, out: router_logits.append(out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    same_document = torch.ones(2, 63)
    assert locality.item() == pytest.approx(train_tiny.locality_loss(router_logits, same_document).item(), rel=1e-4)
    expected = train_tiny.chunk_sparsification_loss(router_logits).item()
    assert sparsification.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("length", [1, 64, 129, 300])
def test_blocked_attention_is_pytorchs_own(length):
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 4, length, 16, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, 2, length, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    found, _ = train_tiny.blocked_causal_attention(None, query, key, value, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_blocked_attention_refuses_padding_and_caches():
    x = torch.zeros(1, 1, 4, 2)
    for arguments in (
        (None, x, x, x, torch.ones(1, 1, 4, 4)),
        (None, x[:, :, :1], x, x, None),
        (None, x, x, x, None, 1.0, 0.1),
    ):
        with pytest.raises(ValueError, match="whole causal rows"):
            train_tiny.blocked_causal_attention(*arguments)


def test_a_model_with_blocked_attention_computes_the_same(model):
    ids = torch.randint(2, train_tiny.VOCAB, (2, 200), generator=torch.Generator().manual_seed(6))
    usual = model.config._attn_implementation
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation("blocked_causal")
        try:
            found = model(input_ids=ids, use_cache=False).logits
        finally:
            model.set_attn_implementation(usual)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_context_gain_of_a_model_without_attention_is_zero(model, tmp_path):
    """Without attention no token sees another, so context is worth nothing, token for token."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "valid_prose.npy", rng.integers(2, train_tiny.VOCAB, 6000).astype(np.uint16))
    np.save(tmp_path / "valid_prose.offsets.npy", np.array([0, 3000, 3500, 6000]))
    with train_tiny.zeroed_attention(model, range(7)):
        gain = train_tiny.context_gain(model, tmp_path, "valid_prose", 3)
    assert gain["documents"] == 2 and gain["rows"] == 3
    same = gain["same_tokens_short_less_long_context"]
    assert same["gain"] == 0.0 and same["ci"] == [0.0, 0.0]
    assert gain["positions_64_127_less_512_1023"]["gain"] != 0.0


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(1)
    config = train_tiny.tiny_mixtral_config(num_layers=3)
    config._experts_implementation = "eager"
    return train_tiny.MixtralForCausalLM(config).eval()


def test_mixtral_training_forward_is_the_models_own(mixtral):
    ids = torch.randint(2, train_tiny.VOCAB, (2, 64), generator=torch.Generator().manual_seed(8))
    mixtral.zero_grad()
    expected = mixtral(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
    nll_expected = expected.loss - mixtral.config.router_aux_loss_coef * expected.aux_loss
    nll_expected.backward()
    gradients = {name: p.grad.clone() for name, p in mixtral.named_parameters()}
    mixtral.zero_grad()
    nll, balancing, smallest = train_tiny.mixtral_losses(mixtral, ids)
    nll.backward()
    assert nll.item() == pytest.approx(nll_expected.item(), abs=1e-5)
    for name, parameter in mixtral.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)
    terms, shares = [], []
    for logits in expected.router_logits:
        chosen = logits.topk(2, dim=-1).indices
        load = torch.stack([(chosen == e).float().sum() / len(logits) for e in range(8)])
        terms.append(8 * (load * logits.softmax(-1).mean(0)).sum().item())
        shares += (load / 2).tolist()
    assert balancing.item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert smallest.item() == pytest.approx(min(shares), abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_padded_experts_equal_transformers_own(mixtral, tokens):
    generator = torch.Generator().manual_seed(tokens)
    experts = mixtral.model.layers[0].mlp.experts
    hidden = torch.randn(tokens, 128, generator=generator)
    chosen = torch.rand(tokens, 6, generator=generator).topk(2).indices  # two experts get no token at all
    weights = torch.rand(tokens, 2, generator=generator)
    outputs = []
    for function in (experts, partial(train_tiny.padded_experts, experts, bucket=16)):
        mixtral.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weights)]
        out = function(leaves[0], chosen, leaves[1])
        (out * out).sum().backward()
        gradients = [experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()]
        outputs.append([out.detach(), *(leaf.grad for leaf in leaves), *gradients])
    for expected, ours in zip(*outputs, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_expert_load_is_a_distribution_over_experts(mixtral, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("valid_prose", "valid_code", "valid_mbpp", "valid_math"):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, train_tiny.VOCAB, 3000).astype(np.uint16))
        np.save(tmp_path / f"{name}.offsets.npy", np.array([0, 1500, 3000]))
    load = train_tiny.expert_load(mixtral, tmp_path, 4)
    assert load.shape == (3, 8)
    np.testing.assert_allclose(load.sum(1), 1.0)
    assert (load > 0).all()


def test_locality_loss_against_loops():
    z = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.02
    same_document = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    terms = []
    for t in range(1, 5):
        if same_document[0, t - 1]:
            for e in range(3):
                prediction = 1 / (1 + math.exp(-100 * z[0, t - 1, e]))
                target = 1 / (1 + math.exp(-100 * z[0, t, e]))
                terms.append(-target * math.log(prediction) - (1 - target) * math.log(1 - prediction))
    assert train_tiny.locality_loss([z], same_document).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_chunk_sparsification_loss_against_loops():
    z = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(3))
    unused = []
    for chunk in range(2):
        for e in range(3):
            product = 1.0
            for t in range(4 * chunk, 4 * chunk + 4):
                activations = [max(0.0, value) for value in z[0, t].tolist()]
                product *= 1 - activations[e] / (sum(activations) + 1e-6) + 1e-5
            unused.append(min(product, 1.0))
    assert train_tiny.chunk_sparsification_loss([z], chunk=4).item() == pytest.approx(1 - np.mean(unused), abs=1e-5)


def test_initial_heads_already_copy(model):
    """The mimetic start lowers the NLL of a random span when it recurs; plain random weights do not."""
    before_first, before_second = train_tiny.probe_recall(model, train_tiny.VOCAB, 48)
    assert abs(before_first - before_second) < 0.2
    wired = train_tiny.BlockFFNForCausalLM(train_tiny.tiny_config(num_layers=7)).eval()
    wired.load_state_dict(model.state_dict())
    train_tiny.init_recall_heads(wired)
    first, second = train_tiny.probe_recall(wired, train_tiny.VOCAB, 48)
    assert second < first - 0.5


@pytest.mark.parametrize("seed", range(20))
def test_recall_sequences_repeat_themselves(seed):
    """Every task repeats bigrams of its earlier part far more often than chance would."""
    ids = train_tiny.recall_sequence(np.random.default_rng(seed), 256, 512, 24)
    assert len(ids) == 256 and ids[0] == train_tiny.BOS and ids[1:].min() >= 2 and ids.max() < train_tiny.VOCAB
    seen, repeated = set(), 0
    for bigram in zip(ids[1:-1].tolist(), ids[2:].tolist(), strict=True):
        repeated += bigram in seen
        seen.add(bigram)
    assert repeated > 40


def test_batches_depend_on_seed_and_step_only(tmp_path):
    for name in ("prose", "code", "math"):
        tokens = np.random.default_rng(len(name)).integers(2, 4096, 4000).astype(np.uint16)
        np.save(tmp_path / f"{name}.npy", tokens)
        np.save(tmp_path / f"{name}.offsets.npy", np.array([0, 150, 1500, 4000]))
    domains = {name: train_tiny.TextRows(tmp_path, name) for name in ("prose", "code", "math")}
    first, second, other = (
        train_tiny.make_batch(np.random.default_rng([0, step]), domains, 8, 256, 0.3, 0.5) for step in (7, 7, 8)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (8, 256) and (first[:, 0] == train_tiny.BOS).all() and first.max() < train_tiny.VOCAB


def test_learning_rate_rises_stays_and_decays():
    rates = [train_tiny.learning_rate(tokens, 10e6, 1.0) for tokens in (0, 0.1e6, 1e6, 7.9e6, 9e6, 10e6)]
    assert rates[0] < rates[1] < rates[2] == rates[3] == 1.0 and rates[5] == pytest.approx(0.02)
    assert rates[5] < rates[4] < 1.0
    assert train_tiny.learning_rate(5e6, 10e6, 1.0, begin=5e6) == rates[0]  # a new optimiser warms up again

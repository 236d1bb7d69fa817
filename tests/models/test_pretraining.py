"""The training of the shipped checkpoints: objectives against brute force, the fast forward against the model's."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from src.hybrid.distill import zeroed_attention
from src.models import model_card, pretraining, pretraining_text
from src.models.pretraining_text import BOS, DOMAIN_SHARES, VALIDATION, VOCAB
from src.models.recall_heads import init_recall_heads

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def untrained(arch, num_layers):
    """A model of the shipped one's shape with fewer layers, from plain random weights."""
    model_class = pretraining.MODELS[arch]
    config = model_class.config_class.from_pretrained(ASSETS / f"{arch}-tiny")
    config.num_hidden_layers = num_layers
    return model_class(config).eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return untrained("blockffn", 7)


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(1)
    return untrained("mixtral", 3)


def write_tokens(folder, name, documents, seed=0):
    """Token arrays of documents of these lengths, without special tokens."""
    ends = np.cumsum([0, *documents])
    tokens = np.random.default_rng(seed).integers(2, VOCAB, ends[-1])
    np.save(folder / f"{name}.npy", tokens.astype(np.uint16))
    np.save(folder / f"{name}.offsets.npy", ends)


def test_training_forward_is_the_models_own(model):
    """`losses` calls the layers itself so that they compile well; it must be the same function as the model."""
    ids = torch.randint(2, VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        nll, locality, sparsification = pretraining.blockffn_losses(model, ids)
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
    expected = np.mean([pretraining.locality_loss(z, same_document).item() for z in router_logits])
    assert locality.item() == pytest.approx(expected, rel=1e-4)
    expected = np.mean([pretraining.chunk_sparsification_loss(z).item() for z in router_logits])
    assert sparsification.item() == pytest.approx(expected, rel=1e-4)


def test_context_gain_of_a_model_without_attention_is_zero(model, tmp_path):
    """Without attention no token sees another, so context is worth nothing, token for token."""
    write_tokens(tmp_path, "valid_prose", [3000, 500, 2500])
    with zeroed_attention(model, range(7)):
        gain = model_card.context_gain(model, tmp_path, "valid_prose", 3)
    assert gain["documents"] == 2 and gain["rows"] == 3
    same = gain["same_tokens_short_less_long_context"]
    assert [same["gain"], *same["ci"]] == pytest.approx([0.0] * 3, abs=1e-6)  # rounding depends on the batch
    assert gain["positions_64_127_less_512_1023"]["gain"] != 0.0


def test_mixtral_training_forward_is_the_models_own(mixtral):
    ids = torch.randint(2, VOCAB, (2, 64), generator=torch.Generator().manual_seed(8))
    mixtral.zero_grad()
    expected = mixtral(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
    nll_expected = expected.loss - mixtral.config.router_aux_loss_coef * expected.aux_loss
    nll_expected.backward()
    gradients = {name: p.grad.clone() for name, p in mixtral.named_parameters()}
    mixtral.zero_grad()
    nll, balancing, smallest = pretraining.mixtral_losses(mixtral, ids)
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


def test_expert_load_is_a_distribution_over_experts(mixtral, tmp_path):
    for name in VALIDATION:
        write_tokens(tmp_path, name, [1500, 1500])
    load = model_card.expert_load(mixtral, tmp_path, 4)
    assert load.shape == (3, 8)
    np.testing.assert_allclose(load.sum(1), 1.0)
    assert (load >= 0).all() and (load[0] > 0.05).all()  # the first layer sees embeddings, which spread well


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
    assert pretraining.locality_loss(z, same_document).item() == pytest.approx(np.mean(terms), rel=1e-5)


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
    assert pretraining.chunk_sparsification_loss(z, chunk=4).item() == pytest.approx(1 - np.mean(unused), abs=1e-5)


def test_initial_heads_already_copy(model):
    """The mimetic start lowers the NLL of a random span when it recurs; plain random weights do not."""
    before_first, before_second = pretraining.probe_recall(model, VOCAB, 48)
    assert abs(before_first - before_second) < 0.2
    wired = untrained("blockffn", 7)
    wired.load_state_dict(model.state_dict())
    init_recall_heads(wired)
    first, second = pretraining.probe_recall(wired, VOCAB, 48)
    assert second < first - 0.5


@pytest.mark.parametrize("seed", range(20))
def test_recall_sequences_repeat_themselves(seed):
    """Every task repeats bigrams of its earlier part far more often than chance would."""
    ids = pretraining_text.recall_sequence(np.random.default_rng(seed), 256, 512, 24)
    assert len(ids) == 256 and ids[0] == BOS and ids[1:].min() >= 2 and ids.max() < VOCAB
    seen, repeated = set(), 0
    for bigram in zip(ids[1:-1].tolist(), ids[2:].tolist(), strict=True):
        repeated += bigram in seen
        seen.add(bigram)
    assert repeated > 40


def test_batches_depend_on_seed_and_step_only(tmp_path):
    for seed, name in enumerate(DOMAIN_SHARES):
        write_tokens(tmp_path, name, [150, 1350, 2500], seed)
    domains = {name: pretraining_text.TextRows(tmp_path, name) for name in DOMAIN_SHARES}
    phase = pretraining_text.Phase("", 1.0, 256, 8, 0.3)
    first, second, other = (
        pretraining_text.make_batch(np.random.default_rng([0, step]), domains, phase, 0.5) for step in (7, 7, 8)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (8, 256) and (first[:, 0] == BOS).all() and first.max() < VOCAB


def test_learning_rate_rises_stays_and_decays():
    rates = [pretraining.learning_rate(tokens, 10e6, 1.0) for tokens in (0, 0.1e6, 1e6, 7.9e6, 9e6, 10e6)]
    assert rates[0] < rates[1] < rates[2] == rates[3] == 1.0 and rates[5] == pytest.approx(0.02)
    assert rates[5] < rates[4] < 1.0
    assert pretraining.learning_rate(5e6, 10e6, 1.0, begin=5e6) == rates[0]  # a new optimiser warms up again


def test_phases_follow_one_another():
    phase, difficulty = pretraining_text.phase_at("blockffn", 250_000)
    assert phase.name == "recall" and difficulty == 0.25
    phase, difficulty = pretraining_text.phase_at("blockffn", 500_000)
    assert phase.name == "mixed" and difficulty == 0.5
    phase, difficulty = pretraining_text.phase_at("blockffn", 90_000_000)
    assert phase.name == "long" and difficulty == 1.0
    assert pretraining_text.phase_at("mixtral", 7_000_000)[0].name == "middle"


@pytest.mark.parametrize("arch", ["blockffn", "mixtral"])
def test_training_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path, arch, monkeypatch):
    """Two steps, and one step twice: the same weights, a log line each, and a state that counts both."""
    short = [pretraining_text.Phase("short", math.inf, 64, 2, 0.5)]
    monkeypatch.setitem(pretraining_text.PHASES, arch, short)
    for name in (*DOMAIN_SHARES, *VALIDATION):
        write_tokens(tmp_path, name, [2000])

    def train(folder, tokens):
        folder.mkdir(exist_ok=True)
        for file in tmp_path.glob("*.npy"):
            (folder / file.name).write_bytes(file.read_bytes())
        settings = pretraining.TrainingSettings(
            arch=arch, shape=ASSETS / f"{arch}-tiny", cache=folder, device=torch.device("cpu"), tokens=tokens,
            minutes=10.0, lr=1e-3, log_every=1, compiled=False, start_from=None, seed=3,
        )  # fmt: skip
        # the schedule depends on the length of the training: the same for both
        monkeypatch.setattr(pretraining, "learning_rate", lambda *_: 1e-3)
        return pretraining.train(settings)

    whole = train(tmp_path / "whole", 256)
    train(tmp_path / "parts", 128)
    parts = train(tmp_path / "parts", 256)
    assert (whole.step, whole.tokens) == (parts.step, parts.tokens) == (2, 256)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    logs = [(tmp_path / name / f"train_log_{arch}.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert len(logs[0]) == 3 and [line.rsplit(",", 1)[0] for line in logs[0]] == [
        line.rsplit(",", 1)[0] for line in logs[1]
    ]

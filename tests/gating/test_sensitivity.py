"""Sensitivity of cells against brute force, finite differences and closed forms on a tiny random model."""

import inspect

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from src import mamba_sidecar as ms
from src.base import stats
from src.base.text_data import Document, TokenDocument, tokenize
from src.eval_utils import score_documents
from src.gating import sensitivity
from src.hybrid.gates import MaskGate, RoutingGate
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM
from src.models.loading import ASSETS_DIR, load_model

VOCAB, LAYERS = 23, (1, 2)
TEXT = (
    "Returns the number of items in the list. If the list is empty, the number is zero. The list may hold any kind of "
    "object: a number, a string, or another list. Raises ValueError when the index is not in the list, and TypeError "
    "when it is not a number."
)
WINDOWS = {"max_seq_len": 6, "stride": 4}  # on 15 ids: three windows that overlap


def build(seed=0):
    torch.manual_seed(seed)
    config = BlockFFNConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_experts=8,
        expert_size=8,
        attention_type="vanilla",
        dim_model_base=32,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    settings = ms.SidecarSettings(d_state=8, headdim=16, chunk_size=8)
    model = BlockFFNForCausalLM(config).eval().requires_grad_(False)
    gate = RoutingGate(0.5, threshold=0.5)
    return ms.attach_mamba_sidecar(model, LAYERS, gate=gate, settings=settings)


@pytest.fixture(scope="module")
def model():
    return build()


def document(length=15, name="doc", seed=0):
    ids = np.random.default_rng(seed).integers(2, VOCAB, length).astype(np.int64)
    return TokenDocument(name, "docs", ids, length)


def all_cells(length):
    return [(layer, position) for layer in LAYERS for position in range(length)]


def one_cell_mask(length, cell, share):
    masks = {layer: np.zeros(length, dtype=np.float32) for layer in LAYERS}
    masks[cell[0]][cell[1]] = share
    return masks


def exact_fisher(model, ids, base_share, step=0.003):
    """F_cc = sum over positions and vocabulary of p (d log p / d share)^2 by central differences, per layer [T]."""

    def log_probs(cell, change):
        shares = {layer: torch.full(ids.shape, base_share) for layer in LAYERS}
        if cell is not None:
            shares[cell[0]][0, cell[1]] += change
        with torch.no_grad(), sensitivity.mamba_shares(model, shares):
            return torch.log_softmax(model(ids, use_cache=False).logits[0].double(), dim=-1)

    p = log_probs(None, 0.0).exp()
    values = [
        float((p * ((log_probs(cell, step) - log_probs(cell, -step)) / (2 * step)).square()).sum())
        for cell in all_cells(ids.shape[1])
    ]
    return dict(zip(LAYERS, np.reshape(values, (len(LAYERS), -1)), strict=True))


# ---------------------------------------------------------------- the estimate


@pytest.mark.parametrize("base_share", [0.0, 0.5])
def test_sampled_fisher_is_the_exact_fisher_diagonal(model, base_share):
    ids = torch.from_numpy(document(9).ids)[None]
    rows = ids.expand(32, -1)  # equal rows draw their own labels: 32 x 16 sequences
    keep = torch.ones_like(rows, dtype=torch.bool)
    sampled = sensitivity.fisher_cells(model, rows, keep, base_share, 16, torch.Generator().manual_seed(0))
    exact = exact_fisher(model, ids, base_share)
    estimates = np.concatenate([sampled[layer].mean(axis=0) for layer in LAYERS])
    wanted = np.concatenate([exact[layer] for layer in LAYERS])
    errors = np.concatenate([sampled[layer].std(axis=0, ddof=1) for layer in LAYERS]) / np.sqrt(len(rows))
    assert np.median(errors / wanted) < 0.15
    assert (np.abs(estimates - wanted) < 4.5 * errors).all()
    assert estimates.sum() == pytest.approx(wanted.sum(), rel=0.1)
    assert spearmanr(estimates, wanted).statistic > 0.97


def test_kl_of_a_small_share_is_half_its_square_times_fisher(model):
    """KL(p at m || p at m + e) = e^2 F / 2 + O(e^3): Kullback 1959, chapter 2; Martens 2020, arXiv 1412.1193."""
    text = document(10)
    exact = exact_fisher(model, torch.from_numpy(text.ids[:-1])[None], 0.0)
    cells = all_cells(9)
    wanted = np.array([exact[layer][position] for layer, position in cells])
    assert wanted.min() > 0
    median_error = {}
    for eps in (0.03, 0.003):
        kl = sensitivity.intervention_kl(model, text, cells, max_seq_len=9, stride=9, share=eps)
        errors = np.abs(2 * kl / eps**2 / wanted - 1)
        median_error[eps] = np.median(errors)
    # where a router's ReLU opens within the step, derivatives from left and right differ: a few per cent in some cells
    assert errors.max() < 0.1 and median_error[0.003] < 0.005
    assert median_error[0.003] < median_error[0.03] / 3  # the term left out is of relative size eps


def test_windows_of_a_document_add_up_as_they_are_scored(model):
    """Twice the KL of a small share, over the document's windows, is the estimate; 64 sequences, so within 25 %."""
    text, eps = document(), 0.03
    estimate = sensitivity.fisher_sensitivity(model, [text], **WINDOWS, samples=64)["doc"]
    cells = all_cells(14)
    second_order = 2 / eps**2 * sensitivity.intervention_kl(model, text, cells, **WINDOWS, share=eps)
    sampled = np.concatenate([estimate[layer] for layer in LAYERS])
    assert sampled.sum() == pytest.approx(second_order.sum(), rel=0.25)
    assert spearmanr(sampled, second_order).statistic > 0.9


def test_base_shares_are_averaged_and_seeds_repeat(model):
    text = [document(8)]
    settings = {"max_seq_len": 8, "stride": 8, "samples": 3}
    first = sensitivity.fisher_sensitivity(model, text, **settings)["doc"]
    again = sensitivity.fisher_sensitivity(model, [document(12, "other", 1), *text], **settings)["doc"]
    other = sensitivity.fisher_sensitivity(model, text, **settings, seed=1)["doc"]
    both = sensitivity.fisher_sensitivity(model, text, **settings, base_shares=(0.0, 0.5))["doc"]
    # the second base share draws with its own seed: what it contributes is 2 * both - first, and no cell's is negative
    for layer in LAYERS:
        assert np.array_equal(first[layer], again[layer]) and first[layer].shape == (7,)
        assert not np.allclose(first[layer], other[layer])
        assert (2 * both[layer] - first[layer] > 0).all() and not np.allclose(both[layer], first[layer])


def test_the_true_labels_are_never_used(model):
    text = document()
    changed = TokenDocument("doc", "docs", np.append(text.ids[:-1], (text.ids[-1] + 1) % VOCAB), 15)
    estimate = [sensitivity.fisher_sensitivity(model, [d], **WINDOWS, samples=2)["doc"] for d in (text, changed)]
    assert all(np.array_equal(estimate[0][layer], estimate[1][layer]) for layer in LAYERS)
    hindsight = [sensitivity.control_hindsight(model, [d], **WINDOWS)["doc"] for d in (text, changed)]
    assert not np.allclose(hindsight[0][1], hindsight[1][1])
    for function in (sensitivity.fisher_sensitivity, sensitivity.fisher_cells):
        assert not {"labels", "targets", "target_ids"} & set(inspect.signature(function).parameters)


def test_a_models_labels_decide_not_the_text(model):
    """At the last position the text has no next token, yet its cells have a Fisher diagonal: of drawn labels only."""
    ids = torch.from_numpy(document(7).ids)[None]
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, 3] = True
    squares = sensitivity.fisher_cells(model, ids, keep, 0.0, 4, torch.Generator().manual_seed(0))
    for layer in LAYERS:
        assert (squares[layer][0, :4] > 0).all()
        assert (squares[layer][0, 4:] == 0).all()  # causal: later cells cannot change position 3


# ---------------------------------------------------------------- hindsight


def test_hindsight_is_the_slope_of_the_scored_nll(model):
    text, step = document(), 0.005
    slopes = sensitivity.control_hindsight(model, [text], **WINDOWS)["doc"]
    attachment, before = ms.attachment_of(model), ms.attachment_of(model).gate

    def nll(cell, share):
        ms.set_gate(model, MaskGate({"doc": one_cell_mask(14, cell, share)}))
        return score_documents(model, [text], **WINDOWS, on_batch=attachment.on_batch).nll[0]

    try:
        for cell in ((1, 0), (1, 5), (2, 4), (2, 7), (2, 13)):
            wanted = (nll(cell, step) - nll(cell, -step)) / (2 * step)
            assert slopes[cell[0]][cell[1]] == pytest.approx(wanted, rel=0.01, abs=1e-3)
    finally:
        ms.set_gate(model, before)
        attachment.on_batch([])


def test_base_shares_are_averaged_in_both_estimates(model, monkeypatch):
    """More base shares must not make cells dearer: the mean over them, exactly, in every window."""
    text, shares = document(), (0.0, 0.25, 0.5)
    each = [sensitivity.control_hindsight(model, [text], **WINDOWS, base_shares=(share,))["doc"] for share in shares]
    several = sensitivity.control_hindsight(model, [text], **WINDOWS, base_shares=shares)["doc"]
    for layer in LAYERS:
        np.testing.assert_allclose(several[layer], np.mean([one[layer] for one in each], axis=0), rtol=1e-9)

    def cells(_model, input_ids, _keep, base_share, _samples, _generator):
        return {layer: np.full(tuple(input_ids.shape), layer + base_share) for layer in LAYERS}

    monkeypatch.setattr(sensitivity, "fisher_cells", cells)  # whose labels depend on the base share's seed
    found = sensitivity.fisher_sensitivity(model, [document(7)], 6, 6, base_shares=shares)["doc"]
    for layer in LAYERS:
        np.testing.assert_allclose(found[layer], np.full(6, layer + 0.25), rtol=1e-12)


# ---------------------------------------------------------------- interventions


def test_interventions_equal_brute_force(model, monkeypatch):
    """Each cell alone through `score_documents` with an offline mask and the base model as reference."""
    text, cells = document(), [(2, 13), (1, 0), (1, 5), (2, 6), (1, 9), (2, 0), (1, 13)]
    attachment, before = ms.attachment_of(model), ms.attachment_of(model).gate

    def base(input_ids, attention_mask):
        with ms.bypass_sidecars(model):
            return model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    wanted = []
    try:
        for cell in cells:
            ms.set_gate(model, MaskGate({"doc": one_cell_mask(14, cell, 1.0)}))
            scores = score_documents(model, [text], **WINDOWS, reference=base, on_batch=attachment.on_batch)
            wanted.append(scores.kl[0])
    finally:
        ms.set_gate(model, before)
        attachment.on_batch([])
    monkeypatch.setattr(sensitivity, "CELLS_PER_BATCH", 3)
    got = sensitivity.intervention_kl(model, text, cells, **WINDOWS)
    assert min(wanted) > 1e-4
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    monkeypatch.setattr(sensitivity, "CELLS_PER_BATCH", 1)
    single = sensitivity.intervention_kl(model, text, cells, **WINDOWS)
    assert got == pytest.approx(single, rel=1e-5)


def test_share_0_changes_nothing(model):
    assert sensitivity.intervention_kl(model, document(), [(1, 3)], **WINDOWS, share=0.0) == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- what is left behind


def test_model_is_left_as_it_was(model):
    attachment = ms.attachment_of(model)
    gate, text = attachment.gate, document(8)
    ids = torch.from_numpy(text.ids)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    model.train().requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)
    try:
        with torch.no_grad(), ms.bypass_sidecars(model):  # neither may keep the gradients from flowing
            values = sensitivity.fisher_sensitivity(model, [text], 8, 8, samples=1)["doc"]
            assert attachment.bypassed
        sensitivity.control_hindsight(model, [text], 8, 8)
        sensitivity.intervention_kl(model, text, [(1, 2)], 8, 8)
        assert all((values[layer] > 0).all() for layer in LAYERS)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
        assert model.training
    finally:
        model.eval().requires_grad_(False)
    with pytest.raises(KeyError), sensitivity.mamba_shares(model, dict.fromkeys(LAYERS, 1.0)):
        assert isinstance(attachment.gate, MaskGate)
        raise KeyError
    assert attachment.gate is gate and attachment.batch_masks is None
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, before)


# ---------------------------------------------------------------- cells, agreement, masks


def test_draw_cells():
    documents = [document(15), document(4, "short")]
    cells = sensitivity.draw_cells(documents, LAYERS, per_layer=5)
    assert len(cells["doc"]) == len(set(cells["doc"])) == 10
    assert [sum(layer == wanted for layer, _ in cells["doc"]) for wanted in LAYERS] == [5, 5]
    assert all(0 <= position < 14 for _, position in cells["doc"])
    assert cells["short"] == all_cells(3)
    assert sensitivity.draw_cells(documents[:1], LAYERS, 5)["doc"] == cells["doc"]
    assert sensitivity.draw_cells(documents, LAYERS, 5, seed=1)["doc"] != cells["doc"]


def test_agreement_pooled_and_per_layer():
    rng = np.random.default_rng(0)
    layers, documents = np.tile([3, 5], 60), np.repeat([f"d{i}" for i in range(6)], 20)
    x = rng.exponential(size=120)
    y = np.where(layers == 3, x**3, rng.exponential(size=120))  # layer 3 agrees perfectly, layer 5 not at all
    result = sensitivity.agreement(x, y, layers, documents, resamples=200)
    assert result["all"] == stats.rank_correlation(x, y, documents, resamples=200)
    assert result["all"].estimate == pytest.approx(spearmanr(x, y).statistic)
    assert list(result) == ["all", 3, 5]
    assert result[3].estimate == pytest.approx(1) and result[3].low == pytest.approx(1)
    assert result[5].estimate == pytest.approx(spearmanr(x[layers == 5], y[layers == 5]).statistic)
    assert result[5].low < 0.3


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: sensitivity.fisher_sensitivity(m, [], 8, 8), ["no document"]),
        (lambda m: sensitivity.control_hindsight(m, [document()], 8, 9), ["stride", "9"]),
        (lambda m: sensitivity.intervention_kl(m, document(), [(1, 14)], 8, 8), ["position 14", "0 to 13"]),
        (lambda m: sensitivity.intervention_kl(m, document(), [(3, 1)], 8, 8), ["layer 3", "[1, 2]"]),
        (lambda m: sensitivity.mamba_shares(m, {1: 0.0}).__enter__(), ["[1]", "[1, 2]"]),
    ],
)
def test_errors_say_what_was_wrong(model, call, words):
    with pytest.raises(ValueError) as error:
        call(model)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------- the shipped model


def test_shipped_model_estimate_ranks_interventions():
    model, tokenizer = load_model("blockffn-tiny", "cpu", "float32")
    layers = ms.available_layers(ASSETS_DIR / "blockffn-tiny-sidecars", "b")
    ms.attach_mamba_sidecar(model, layers, sidecar_dir=ASSETS_DIR / "blockffn-tiny-sidecars", stage="b")
    (text,) = tokenize([Document("text", "docs", TEXT)], tokenizer, max_tokens=64)
    estimate = sensitivity.fisher_sensitivity(model, [text], 64, 64, samples=32)[text.id]
    cells = sensitivity.draw_cells([text], layers, per_layer=12)[text.id]
    kl = sensitivity.intervention_kl(model, text, cells, 64, 64)
    values = np.array([estimate[layer][position] for layer, position in cells])
    assert list(estimate) == layers and all(estimate[layer].shape == (len(text.ids) - 1,) for layer in layers)
    assert np.isfinite(values).all() and (values > 0).all() and (kl > 0).all()
    assert len(text.ids) == 65
    assert spearmanr(values, kl).statistic > 0.8

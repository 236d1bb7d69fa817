"""Signals against passes done by hand; tables against scipy, brute force, and data whose answer is planted."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from src import mamba_sidecar as ms
from src.base import stats
from src.base.text_data import TokenDocument, score_windows
from src.eval_utils import score_documents
from src.gating import controls, sensitivity
from src.gating import sensitivity_tables as tables
from src.hybrid.gates import RoutingGate
from src.models.blockffn import BlockFFNForCausalLM
from src.models.loading import load_model
from src.routing_extractor import RoutingExtractor
from tests.tiny import GOLDEN, llama_folder

LAYERS = (1, 3)
SETTINGS = ms.SidecarSettings(d_state=8, headdim=16, chunk_size=16)


def documents_of(lengths, vocabulary=512):
    """Random tokens; `lengths` counts input positions, so a document has one id more."""
    return [
        TokenDocument(f"d{i}", "x", np.random.default_rng(i).integers(3, vocabulary, length + 1), length)
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(params=["vanilla_gqa_block", "mla_block"])
def model(request):
    model = BlockFFNForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()
    return ms.attach_mamba_sidecar(model, LAYERS, settings=SETTINGS, gate=RoutingGate(0.5))


def collect(model, documents, layers=LAYERS, max_seq_len=64, stride=64):
    with ms.bypass_sidecars(model):
        return tables.collect_signals(model, documents, layers, max_seq_len, stride)


# -- signals


def by_hand(activations):
    """The four measures of activations [T, E], token by token."""
    rows = activations.tolist()
    shares = [[value / (sum(row) or 1) for value in row if value > 0] for row in rows]
    return {
        "sparsity": [sum(value == 0 for value in row) / len(row) for row in rows],
        "entropy": [-sum(p * math.log(p) for p in row) for row in shares],
        "sum": [sum(row) for row in rows],
        "top": [max(row) for row in rows],
    }


def test_signals_against_a_pass_by_hand(model):
    documents = documents_of((24, 9))
    with torch.no_grad():  # one router that activates nothing
        model.model.layers[2].mlp.router_proj.weight.zero_()
    got = collect(model, documents)
    assert tuple(got) == tables.SIGNALS and len(got) == 13
    with ms.bypass_sidecars(model):
        error = controls.collect_scores(model, documents, LAYERS, ["recall_error"], 64, 64)["recall_error"]
    ms.detach_mamba_sidecars(model)
    for document in documents:
        with torch.no_grad(), RoutingExtractor(model) as extractor:
            output = model(torch.tensor(document.ids[None, :-1]), output_hidden_states=True)
            routers = extractor.get_routing_signals()
        for layer in LAYERS:
            block = model.model.layers[layer]
            with torch.no_grad():
                normed = block.input_layernorm(output.hidden_states[layer][0])
                lookahead = torch.relu(normed @ block.mlp.router_proj.weight.T)
            sources = {"previous": routers[layer - 1][0], "lookahead": lookahead, "self": routers[layer][0]}
            for source, activations in sources.items():
                for measure, want in by_hand(activations).items():
                    kept = got[f"{source}_{measure}"][document.id][layer]
                    assert kept.dtype == np.float32 and kept.shape == (len(document.ids) - 1,)
                    np.testing.assert_allclose(kept, want, rtol=1e-4, atol=1e-5, err_msg=f"{source}_{measure}")
            assert np.array_equal(got["discrepancy"][document.id][layer], error[document.id][layer])
    assert (got["previous_sparsity"]["d0"][3] == 1).all() and (got["previous_entropy"]["d0"][3] == 0).all()


@pytest.mark.parametrize("signal", ["previous", "lookahead"])
def test_sparsity_is_the_very_score_of_the_gates(model, signal):
    documents = documents_of((50, 17))
    got = collect(model, documents, max_seq_len=20, stride=8)[f"{signal}_sparsity"]
    ms.set_gate(model, RoutingGate(0.0, signal))  # alpha 0: the base model, with the gate's scores
    with ms.record_gates(model) as record:
        score_documents(model, documents, 20, 8, 1, on_batch=ms.attachment_of(model).on_batch)
    for document in documents:
        for layer in LAYERS:
            assert np.array_equal(got[document.id][layer], record.scores[document.id][layer])
            assert len(np.unique(got[document.id][layer])) > 2


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_one_forward_per_window_and_the_model_as_before_also_after_an_error(model):
    documents = documents_of((50, 17))
    before, forwards = hooks(model), []
    counting = model.model.register_forward_hook(lambda *_: forwards.append(1))
    collect(model, documents, max_seq_len=20, stride=8)
    counting.remove()
    assert len(forwards) == sum(len(score_windows(len(document.ids), 20, 8)) for document in documents) > 4
    assert hooks(model) == before
    bad = TokenDocument("bad", "x", np.array([1, 10**6, 2]), 2)
    with pytest.raises(IndexError):
        collect(model, [*documents, bad])
    assert hooks(model) == before and not ms.attachment_of(model).bypassed


def test_what_cannot_be_collected_is_refused(model, tmp_path):
    documents = documents_of((9,))
    with pytest.raises(ValueError, match="bypass_sidecars"):
        tables.collect_signals(model, documents, LAYERS, 64, 64)
    with pytest.raises(ValueError, match="layer 0 has no previous"):
        collect(model, documents, (0,))
    with pytest.raises(ValueError, match="sidecar beside the attention of layer 2"):
        collect(model, documents, (2,))
    llama, _ = load_model(str(llama_folder(tmp_path)))
    with pytest.raises(ValueError, match="needs a BlockFFN router"):
        tables.collect_signals(llama, documents, (1,), 64, 64)


def test_what_is_deployable():
    assert set(tables.SIGNALS) - set(tables.DEPLOYABLE) == {
        "discrepancy", "self_sparsity", "self_entropy", "self_sum", "self_top"
    }  # fmt: skip


# -- correlations

LENGTHS = (90, 40, 120, 64, 100, 80)


def cells_of(make, layers=LAYERS, lengths=LENGTHS):
    """Cells whose values are make(document index, layer, length)."""
    return {f"d{i}": {layer: make(i, layer, length) for layer in layers} for i, length in enumerate(lengths)}


def study(seed=0):
    """Sensitivity that follows surprisal and `good`, levels that differ by layer, and signals of each kind."""
    rng = np.random.default_rng(seed)
    shared = [(rng.integers(0, 20, n).astype(float), rng.exponential(size=n)) for n in LENGTHS]
    frequency = cells_of(lambda i, layer, n: shared[i][0])
    surprisal = cells_of(lambda i, layer, n: shared[i][1])
    good = cells_of(lambda i, layer, n: rng.integers(0, 10, n) / 10)
    target = cells_of(
        lambda i, layer, n: np.exp(
            2 * shared[i][1] + 2 * good[f"d{i}"][layer] + 0.5 * rng.normal(size=n) + 10.0 * layer
        )
    )
    signals = {
        "previous_sparsity": good,
        "surprised": cells_of(lambda i, layer, n: shared[i][1] + 0.1 * rng.normal(size=n)),
        "level": cells_of(lambda i, layer, n: layer + rng.normal(size=n)),
    }
    return target, signals, frequency, surprisal


def test_correlations_against_ranks_by_hand():
    target, signals, frequency, surprisal = study()
    documents = documents_of(LENGTHS)
    rows = tables.correlation_table(target, signals, documents, frequency, surprisal, 50, 199, seed=3)
    assert [(row["layer"], row["signal"]) for row in rows] == [
        (layer, name) for layer in ("all", *LAYERS) for name in signals
    ]
    assert list(rows[0]) == [
        "layer", "signal", "deployable", "cells", "rho", "ci_low", "ci_high", "partial_rho", "partial_ci_low",
        "partial_ci_high", "p_value", "p_holm",
    ]  # fmt: skip
    position = cells_of(lambda i, layer, n: np.arange(n))
    sized = list(zip(documents, LENGTHS, strict=True))
    for row in rows:
        layers = LAYERS if row["layer"] == "all" else [row["layer"]]
        ranks = np.stack(
            [
                np.concatenate([rankdata(np.concatenate([c[d.id][layer] for d in documents])) for layer in layers])
                for c in (signals[row["signal"]], target, position, frequency, surprisal)
            ]
        )
        within = np.stack(
            [
                np.concatenate([(rankdata(c[d.id][layer]) - 0.5) / n for layer in layers for d, n in sized])
                for c in (signals[row["signal"]], target, position, frequency, surprisal)
            ]
        )
        inverse = np.linalg.inv(np.corrcoef(within))
        assert row["cells"] == len(layers) * sum(LENGTHS)
        assert row["rho"] == pytest.approx(np.corrcoef(ranks[:2])[0, 1], abs=1e-12)
        assert row["partial_rho"] == pytest.approx(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]), abs=1e-10)
        assert row["ci_low"] <= row["rho"] <= row["ci_high"]
        assert row["partial_ci_low"] <= row["partial_rho"] <= row["partial_ci_high"]
        assert row["deployable"] is (row["signal"] == "previous_sparsity")
    holm = stats.holm_correction([row["p_value"] for row in rows])
    assert [row["p_holm"] for row in rows] == holm.tolist()


def test_planted_answers_come_out():
    target, signals, frequency, surprisal = study()
    documents = documents_of(LENGTHS)
    arguments = (target, signals, documents, frequency, surprisal, 100, 499)
    rows = tables.correlation_table(*arguments)
    assert rows == tables.correlation_table(*arguments)
    for row in rows:
        if row["signal"] == "previous_sparsity":
            assert row["partial_rho"] > row["rho"] > 0.15 and row["partial_ci_low"] > 0.4
            assert row["p_value"] == 1 / 500 and row["p_holm"] == pytest.approx(9 / 500)
        else:  # confounded with surprisal, or alike only in that layers differ
            assert abs(row["partial_rho"]) < 0.1 and row["p_holm"] > 0.05
        if row["signal"] == "surprised":
            assert row["rho"] > 0.6
    level = np.concatenate([signals["level"][d.id][layer] for layer in LAYERS for d in documents])
    values = np.concatenate([target[d.id][layer] for layer in LAYERS for d in documents])
    assert spearmanr(level, values).statistic > 0.5  # what pooling without layers would have said
    assert abs(next(row["rho"] for row in rows if row["signal"] == "level")) < 0.1


def test_correlations_refuse_cells_without_values():
    target, signals, frequency, surprisal = study()
    documents = documents_of(LENGTHS)
    del frequency["d2"][3]
    with pytest.raises(ValueError, match="frequency has not one value .* 120 tokens of document 'd2' in layer 3"):
        tables.correlation_table(target, signals, documents, frequency, surprisal, 5, 9)


# -- validation


def interventions_and_estimates(seed=0):
    """KL of 25 cells per document and layer, 1,000 times larger in layer 3; one estimator knows layers, one cells."""
    rng = np.random.default_rng(seed)
    truth = cells_of(lambda i, layer, n: rng.lognormal(size=n) * (1000 if layer == 3 else 1))
    drawn = sensitivity.draw_cells(documents_of(LENGTHS), LAYERS, 25)
    measured = {d: {(layer, t): float(truth[d][layer][t]) for layer, t in cells} for d, cells in drawn.items()}
    estimates = {
        "levels": cells_of(lambda i, layer, n: layer + rng.normal(size=n)),
        "cells": cells_of(
            lambda i, layer, n: np.log(truth[f"d{i}"][layer] / 1000 ** (layer == 3)) + rng.normal(size=n)
        ),
    }
    return measured, estimates


def test_validation_ranks_within_layers():
    measured, estimates = interventions_and_estimates()
    costs = {"levels": 0.2, "cells": 0.1}
    rows = tables.validation_table(estimates, measured, costs, 0.3, resamples=100)
    assert [(row["estimator"], row["layer"]) for row in rows] == [
        (name, layer) for name in estimates for layer in ("all", *LAYERS)
    ]
    flat = [(d, layer, t, kl) for d, cells in measured.items() for (layer, t), kl in cells.items()]
    documents, layers, kl = (np.array([cell[i] for cell in flat]) for i in (0, 1, 3))
    for name, cells in estimates.items():
        values = np.array([cells[d][layer][t] for d, layer, t, _ in flat])
        raw = sensitivity.agreement(values, kl, layers, documents, resamples=100)
        by_layer = {row["layer"]: row for row in rows if row["estimator"] == name}
        within = [
            np.concatenate([rankdata(column[layers == layer]) for layer in LAYERS]) for column in (values, kl)
        ]  # 150 cells in each layer
        assert by_layer["all"]["rho"] == pytest.approx(np.corrcoef(*within)[0, 1], abs=1e-9)
        assert by_layer["all"]["cells"] == 300 and by_layer["all"]["documents"] == len(LENGTHS)
        for layer in LAYERS:
            row = by_layer[layer]
            found = stats.Interval(row["rho"], row["ci_low"], row["ci_high"])
            assert row["cells"] == 150 and found == raw[layer]
        if name == "levels":
            assert raw["all"].estimate > 0.5 > abs(by_layer["all"]["rho"]) + 0.3
        assert by_layer["all"]["mask_kl"] == costs[name] and by_layer["all"]["random_kl"] == 0.3
        assert np.isnan([by_layer[layer][column] for layer in LAYERS for column in ("mask_kl", "random_kl")]).all()
    assert tables.choose_estimator(rows) == "cells"
    assert [row["estimator"] for row in rows if row["chosen"]] == ["cells"] * 3
    # by what its masks cost, not by how it ranks cells one at a time
    rows = tables.validation_table(estimates, measured, {"levels": 0.1, "cells": 0.2}, 0.3, resamples=10)
    assert tables.choose_estimator(rows) == "levels"


def test_validation_refuses_what_it_cannot_compare():
    measured, estimates = interventions_and_estimates()
    estimates["cells"]["d1"].pop(3)
    with pytest.raises(ValueError, match="cells has no estimate for a cell"):
        tables.validation_table(estimates, measured, {"levels": 0.2, "cells": 0.1}, 0.3, resamples=5)
    with pytest.raises(ValueError, match="no interventions"):
        tables.validation_table(estimates, {"d0": {}}, {}, 0.3)
    with pytest.raises(ValueError, match="layer 'all'"):
        tables.choose_estimator([{"layer": 1, "rho": 0.5, "estimator": "x"}])

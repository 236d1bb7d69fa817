"""Probes of sensitivity: features against forwards by hand, planted targets, and the share of a gap in closed form."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupShuffleSplit, KFold

from src import mamba_sidecar as ms
from src.base.text_data import TokenDocument, score_windows
from src.gating import controls, probes
from src.hybrid.gates import FixedGate
from src.models.blockffn import BlockFFNForCausalLM
from tests.tiny import GOLDEN

LAYERS = (1, 2)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def document_of(seed, length, vocabulary=512):
    return TokenDocument(f"d{seed}", "x", np.random.default_rng(seed).integers(3, vocabulary, length), length)


@pytest.fixture(params=["vanilla_gqa_block", "mla_block"])
def model(request):
    return BlockFFNForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()


@pytest.fixture
def vanilla():
    return BlockFFNForCausalLM.from_pretrained(GOLDEN / "vanilla_gqa_block", dtype=torch.float32).eval()


def planted(function, documents=12, length=150, size=6, seed=0, layers=LAYERS):
    """Random features [N, F], and a sensitivity [N] whose logarithm is function(features, layer)."""
    rng = np.random.default_rng(seed)
    features, sensitivity = {}, {}
    for index in range(documents):
        name = f"d{index}"
        features[name] = {layer: rng.normal(size=(length, size)).astype(np.float32) for layer in layers}
        sensitivity[name] = {layer: np.exp(function(values, layer)) for layer, values in features[name].items()}
    return features, sensitivity


def split(cells, first):
    names = list(cells)
    return {name: cells[name] for name in names[:first]}, {name: cells[name] for name in names[first:]}


def rho_of(scores, sensitivity, layer):
    return spearmanr(*(np.concatenate([cells[d][layer] for d in scores]) for cells in (scores, sensitivity))).statistic


# -- features


def test_features_against_a_forward_by_hand(model):
    documents = [document_of(0, 24), document_of(1, 9)]
    got = {}
    for attached in (False, True):
        if attached:  # sidecars would change every layer above the first
            settings = ms.SidecarSettings(d_state=8, headdim=16, chunk_size=16)
            ms.attach_mamba_sidecar(model, LAYERS, settings=settings, gate=FixedGate(1.0))
        for source in probes.SOURCES:
            features = probes.collect_features(model, documents, (2, 1), source, 64, 64)
            if attached:
                for document in documents:
                    for layer in LAYERS:
                        assert np.array_equal(features[document.id][layer], got[source][document.id][layer])
            got[source] = features
    assert ms.attachment_of(model).bypassed is False
    ms.detach_mamba_sidecars(model)
    for document in documents:
        inputs = []  # of the MLPs, layer by layer
        handles = [
            block.mlp.register_forward_pre_hook(lambda _m, args, kept=inputs: kept.append(args[0][0]))
            for block in model.model.layers
        ]
        ids = torch.tensor(document.ids[None, :-1])
        with torch.no_grad():
            stream = model(ids, output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        for layer in LAYERS:
            weight = model.model.layers[layer - 1].mlp.router_proj.weight
            want = {
                "router": torch.relu(inputs[layer - 1] @ weight.T),
                "hidden": model.model.layers[layer].input_layernorm(stream[layer][0]),
            }
            for source, values in want.items():
                kept = got[source][document.id][layer]
                assert kept.dtype == np.float32 and kept.shape == (len(document.ids) - 1, values.shape[1])
                np.testing.assert_allclose(kept, values.detach().numpy(), **CLOSE, err_msg=source)
    zeros = np.mean(got["router"]["d0"][1] == 0)
    assert 0.1 < zeros < 0.9  # after the ReLU


def test_a_position_of_several_windows_counts_as_in_the_earliest(vanilla):
    document, windows = document_of(4, 50), score_windows(50, 20, 8)
    assert len(windows) > 3
    for source in probes.SOURCES:
        got = probes.collect_features(vanilla, [document], (3,), source, 20, 8)["d4"][3]
        want = np.full(got.shape, np.nan)
        for window in windows:
            piece = TokenDocument("p", "x", document.ids[window.start : window.stop], 1)
            alone = probes.collect_features(vanilla, [piece], (3,), source, 64, 64)["p"][3]
            for offset, row in enumerate(alone):
                if np.isnan(want[window.start + offset]).any():
                    want[window.start + offset] = row
        np.testing.assert_allclose(got, want, **CLOSE)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("source", probes.SOURCES)
def test_the_model_is_as_before_also_after_an_error(vanilla, source):
    vanilla.train()
    ms.attach_mamba_sidecar(vanilla, (1,), settings=ms.SidecarSettings(d_state=8, headdim=16))
    vanilla.train()
    before = hooks(vanilla)
    probes.collect_features(vanilla, [document_of(0, 12)], LAYERS, source, 64, 64)
    assert hooks(vanilla) == before and vanilla.training and not ms.attachment_of(vanilla).bypassed
    bad = TokenDocument("bad", "x", np.array([1, 10**6, 2]), 2)
    with pytest.raises(IndexError):
        probes.collect_features(vanilla, [document_of(0, 12), bad], LAYERS, source, 64, 64)
    assert hooks(vanilla) == before and vanilla.training and not ms.attachment_of(vanilla).bypassed


def test_collecting_refuses_what_it_cannot_read(vanilla):
    def refused(source="hidden", layers=LAYERS, documents=None):
        documents = [document_of(0, 12)] if documents is None else documents
        before = hooks(vanilla)
        with pytest.raises(ValueError) as error:
            probes.collect_features(vanilla, documents, layers, source, 64, 64)
        assert hooks(vanilla) == before
        return str(error.value)

    assert "layer 0 has none" in refused("router", (0, 1))
    assert "no documents" in refused(documents=[])
    assert "'e'" in refused(documents=[TokenDocument("e", "x", np.array([1]), 0)])


# -- probes


def test_a_planted_linear_target_is_recovered_on_held_out_documents():
    # the logarithm is linear in the features; every layer has weights of its own, and one unit of its own
    weights = {1: np.array([1, -2, 0, 0, 0.5, 0]), 2: np.array([0, 0, 3, 1, 0, 0])}
    features, sensitivity = planted(lambda x, layer: 10 * layer + 5 * x @ weights[layer])
    (train, test), (known, hidden) = split(features, 9), split(sensitivity, 9)
    for kind in probes.KINDS:
        probe = probes.fit_probe(train, known, kind, seed=0)
        scores = probes.predict_scores(probe, test)
        for layer in LAYERS:
            assert rho_of(scores, hidden, layer) > 0.97, (kind, layer)
        values = np.concatenate([layers[1] for layers in scores.values()])
        np.testing.assert_allclose(np.quantile(values, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.1)  # ranks


def test_a_planted_nonlinear_target_needs_the_network():
    features, sensitivity = planted(lambda x, layer: 3 * np.abs(x[:, layer]), documents=24)
    (train, test), (known, hidden) = split(features, 18), split(sensitivity, 18)
    linear, network = (probes.predict_scores(probes.fit_probe(train, known, kind), test) for kind in probes.KINDS)
    for layer in LAYERS:
        rho = rho_of(linear, hidden, layer), rho_of(network, hidden, layer)
        assert abs(rho[0]) < 0.2 and rho[1] > 0.9, rho


def test_the_network_keeps_up_with_the_ridge_on_little_noisy_text():
    noise = np.random.default_rng(7)
    features, sensitivity = planted(
        lambda x, layer: x[:, :5].sum(axis=1) + 4 * noise.normal(size=len(x)), size=100, layers=(1,)
    )
    (train, test), (known, hidden) = split(features, 8), split(sensitivity, 8)
    linear, network = (
        rho_of(probes.predict_scores(probes.fit_probe(train, known, kind), test), hidden, 1) for kind in probes.KINDS
    )
    assert linear > 0.3 and network > 0.8 * linear, (linear, network)


def test_only_the_order_of_sensitivity_counts():
    features, sensitivity = planted(lambda x, layer: x[:, 0] + x[:, 1] ** 2, documents=4, length=50, layers=(1,))
    cubed = {d: {layer: 7 * v**3 for layer, v in layers.items()} for d, layers in sensitivity.items()}
    zeroed = {d: {layer: v - min(v.min() for v in layers.values()) for layer, v in layers.items()}
              for d, layers in {"d0": sensitivity["d0"]}.items()}  # fmt: skip
    assert min(values.min() for values in zeroed["d0"].values()) == 0  # a logarithm would be infinite
    for kind in probes.KINDS:
        plain = probes.predict_scores(probes.fit_probe(features, sensitivity, kind), features)
        other = probes.predict_scores(probes.fit_probe(features, cubed, kind), features)
        assert all(np.array_equal(plain[d][1], other[d][1]) for d in plain)
        probes.fit_probe(features, sensitivity | zeroed, kind)


def test_the_ridge_is_chosen_by_document():
    # each document has a fingerprint, and a sensitivity of its own: nothing that holds for another document
    rng = np.random.default_rng(0)
    features, sensitivity = {}, {}
    for index in range(30):
        fingerprint = rng.normal(size=10)
        features[f"d{index}"] = {1: (fingerprint + 0.1 * rng.normal(size=(50, 10))).astype(np.float32)}
        sensitivity[f"d{index}"] = {1: np.exp(3 * rng.normal() + 0.1 * rng.normal(size=50))}
    inputs, values = (np.concatenate([cells[d][1] for d in features]) for cells in (features, sensitivity))
    grid, by_token = {"alpha": probes.RIDGE_ALPHAS}, KFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(Ridge(), grid, cv=by_token).fit(inputs, rankdata(values) / len(values))
    assert probes.fit_probe(features, sensitivity, "linear").chosen[1]["alpha"] >= 1000 * search.best_params_["alpha"]


def test_the_network_stops_by_document():
    # in three of fifteen documents the features mean the opposite; seeds that hold them out find nothing to learn
    features, sensitivity = planted(lambda x, layer: x[:, 0], documents=15, length=300, layers=(1,))
    documents = np.arange(15)

    def held_out(seed):
        return next(GroupShuffleSplit(1, test_size=0.2, random_state=seed).split(documents, groups=documents))[1]

    turned = {f"d{index}" for index in held_out(0)}
    for document in turned:
        sensitivity[document] = {1: 1 / sensitivity[document][1]}
    other = next(seed for seed in range(1, 50) if not turned & {f"d{index}" for index in held_out(seed)})
    spreads = []
    for seed in (0, other):
        scores = probes.predict_scores(probes.fit_probe(features, sensitivity, "mlp", seed), features)
        spreads.append(np.std([layers[1] for layers in scores.values()]))
    assert spreads[0] < 0.03 and spreads[1] > 0.12, spreads


@pytest.mark.parametrize("kind", probes.KINDS)
def test_the_same_seed_gives_the_same_bytes(kind):
    features, sensitivity = planted(lambda x, layer: x[:, 0] + np.abs(x[:, 1]), documents=5, length=50, layers=(1,))
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    first, again, other = (
        probes.predict_scores(probes.fit_probe(features, sensitivity, kind, seed), features)["d3"][1]
        for seed in (1, 1, 2)
    )
    assert (np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()) == before
    assert first.dtype == np.float32 and first.tobytes() == again.tobytes()
    assert np.array_equal(first, other) == (kind == "linear")  # which draws nothing


@pytest.mark.parametrize("source", probes.SOURCES)
@pytest.mark.parametrize("kind", probes.KINDS)
def test_scores_look_at_no_later_token(vanilla, source, kind):
    documents = [document_of(seed, 60) for seed in range(4)]
    features = probes.collect_features(vanilla, documents, LAYERS, source, 64, 64)
    rng = np.random.default_rng(0)
    sensitivity = {d: {layer: np.exp(x @ rng.normal(size=x.shape[1])) for layer, x in layers.items()}
                   for d, layers in features.items()}  # fmt: skip
    probe = probes.fit_probe(features, sensitivity, kind)
    for position in (0, 25, 58):
        changed = documents[0].ids.copy()
        changed[position] = (changed[position] + 100) % 512
        other = TokenDocument("d0", "x", changed, 60)
        got = probes.predict_scores(probe, probes.collect_features(vanilla, [other], LAYERS, source, 64, 64))
        want = probes.predict_scores(probe, features)
        for layer in LAYERS:
            np.testing.assert_allclose(got["d0"][layer][:position], want["d0"][layer][:position], rtol=0, atol=1e-4)
            assert abs(got["d0"][layer][position] - want["d0"][layer][position]) > 1e-3


def test_masks_of_a_probe_keep_attention_where_it_is_worth_most():
    features, sensitivity = planted(lambda x, layer: 2 * x[:, 0])
    (train, test), (known, hidden) = split(features, 9), split(sensitivity, 9)
    scores = probes.predict_scores(probes.fit_probe(train, known, "linear"), test)
    shares = {d: {layer: (np.arange(150) % 3 == 0) * 1.0 for layer in LAYERS} for d in test}
    masks = controls.scored_masks(shares, scores, largest=False)
    for document, layers in masks.items():
        for layer, mask in layers.items():
            cost = hidden[document][layer]
            assert mask.sum() == 50 and cost[mask == 1].sum() < 1.2 * np.sort(cost)[:50].sum()


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda f, s: probes.fit_probe({"d0": f["d0"]}, s, "mlp"), ["1 given", "at least 2"]),
        (lambda f, s: probes.fit_probe(f, {"d0": s["d0"]}, "mlp"), ["layer 1", "'d1'", "150"]),
        (lambda f, s: probes.fit_probe(f, s | {"d2": {1: np.zeros(3)}}, "mlp"), ["'d2'", "150", "(3,)"]),
        (lambda f, s: probes.fit_probe(f, s | {"d2": {1: np.full(150, np.nan)}}, "mlp"), ["'d2'", "finite"]),
        (lambda f, s: probes.fit_probe(f | {"d1": {2: f["d1"][2]}}, s, "linear"), ["'d1'", "[2]", "[1, 2]"]),
        (lambda f, s: probes.fit_probe(f | {"d1": {k: v * np.nan for k, v in f["d1"].items()}}, s, "linear"), ["X "]),
    ],
)
def test_errors_name_what_was_wrong(build, words):
    with pytest.raises(ValueError) as error:
        build(*planted(lambda x, layer: x[:, 0], documents=3))
    assert all(word in str(error.value) for word in words), str(error.value)


# -- how much of the gap is closed


def sums(documents=40, seed=0):
    """NLL per document of random gating, and what the oracle gains there (negative in some documents)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 500, documents)
    return tokens * rng.normal(3.0, 0.5, documents), tokens * rng.normal(0.1, 0.08, documents)


@pytest.mark.parametrize("closed", [0.0, 0.4, 1.0, -0.5])
def test_a_constant_part_of_the_gap_has_no_interval(closed):
    random, gain = sums()
    assert (gain < 0).any()
    got = probes.gap_closed(random, random - closed * gain, random - gain)
    np.testing.assert_allclose([got.estimate, got.low, got.high], closed, rtol=1e-9, atol=1e-12)


def test_the_interval_against_resampling_one_by_one():
    random, gain = sums()
    gate = random - 0.5 * gain - np.random.default_rng(5).normal(0, 10, len(gain))
    got = probes.gap_closed(random, gate, random - gain, seed=3)
    rng, drawn = np.random.default_rng(9), []
    for _ in range(4_000):
        chosen = rng.integers(0, len(gain), len(gain))
        parts = [values[chosen].sum() for values in (random, gate, random - gain)]
        drawn.append((parts[0] - parts[1]) / (parts[0] - parts[2]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert got.estimate == pytest.approx((random - gate).sum() / gain.sum())
    assert high - low > 0.05
    assert got.low == pytest.approx(low, abs=0.08 * (high - low))
    assert got.high == pytest.approx(high, abs=0.08 * (high - low))
    assert got == probes.gap_closed(random, gate, random - gain, seed=3)


def test_no_gap_to_close():
    random, gain = sums()
    worse = probes.gap_closed(random, random - gain, random + gain)
    assert np.isnan([worse.estimate, worse.low, worse.high]).all()
    # the oracle beats random here, but not in 2.5 % of all resamples: no limits
    noise = np.random.default_rng(1).normal(0, 50, len(random))
    noise += 5 - noise.mean()
    unclear = probes.gap_closed(random, random - gain, random - noise)
    assert unclear.estimate == pytest.approx(gain.sum() / noise.sum())
    assert np.isnan([unclear.low, unclear.high]).all()
    # and here it does not in very few of them, which count as beyond both limits
    rare = noise - noise.mean() + 2.8 * noise.std() / np.sqrt(len(noise))
    seldom = probes.gap_closed(random, random - rare * 0.5, random - rare)
    assert seldom.low == pytest.approx(0.5) and seldom.high == pytest.approx(0.5)
    with pytest.raises(ValueError, match="2 documents"):
        probes.gap_closed([1.0], [1.0], [0.5])


def test_layers_are_pooled_after_ranking():
    rng = np.random.default_rng(0)
    lengths = {f"d{index}": int(length) for index, length in enumerate(rng.integers(20, 90, 8))}
    truth = {d: {layer: rng.exponential(size=n) for layer in (1, 2, 5)} for d, n in lengths.items()}
    # each layer in units of its own, with the order of the layers turned round
    scores = {d: {layer: v**2 - 100 * layer for layer, v in layers.items()} for d, layers in truth.items()}
    exact = probes.within_layer_correlation(scores, truth, resamples=50)
    assert exact.low == pytest.approx(1) and exact.estimate == pytest.approx(1)
    noisy = {
        d: {layer: v + rng.normal(size=len(v)) * layer for layer, v in layers.items()} for d, layers in scores.items()
    }
    got = probes.within_layer_correlation(noisy, truth, resamples=200)
    assert got.estimate == pytest.approx(np.mean([rho_of(noisy, truth, layer) for layer in (1, 2, 5)]), abs=1e-9)
    assert got.low < got.estimate < got.high


def test_rows_of_probe_gap():
    random, gain = sums(6)
    rng = np.random.default_rng(0)
    truth = {f"d{index}": {layer: rng.exponential(size=30) for layer in LAYERS} for index in range(6)}
    minus = {d: {layer: -v for layer, v in layers.items()} for d, layers in truth.items()}

    def table(nll):
        return pd.DataFrame({"document": list(truth), "tokens": 30, "nll": nll})

    tables = {}
    for share, size in ((0.25, 1.0), (0.5, 2.0)):
        tables[f"control_random_{share}"] = table(random)
        tables[f"control_oracle_{share}"] = table(random - size * gain)
        tables[f"control_probe_router_linear_{share}"] = table(random - size * gain)
        tables[f"routing_hard_{share}"] = table(random - 0.5 * gain)
    predicted = {"router_linear": truth, "routing_hard": minus}
    rows = probes.gap_rows(tables, truth, predicted, (0.25, 0.5), resamples=200, rho_resamples=20)
    assert [(row["probe"], row["share"]) for row in rows] == [
        ("router_linear", 0.25), ("router_linear", 0.5), ("routing_hard", 0.25), ("routing_hard", 0.5)
    ]  # fmt: skip
    assert list(rows[0]) == "probe share gap_closed ci_low ci_high rho rho_low rho_high".split()
    np.testing.assert_allclose([row["gap_closed"] for row in rows], [1, 1, 0.5, 0.25])
    np.testing.assert_allclose([row["rho"] for row in rows], [1, 1, -1, -1])
    with pytest.raises(ValueError, match="control_random_0.75"):
        probes.gap_rows(tables, truth, predicted, (0.75,), resamples=20, rho_resamples=5)
    tables["control_oracle_0.5"] = tables["control_oracle_0.5"].iloc[::-1]
    with pytest.raises(ValueError, match="control_oracle_0.5 differ in their documents"):
        probes.gap_rows(tables, truth, predicted, (0.5,), resamples=20, rho_resamples=5)


def test_names_of_probe_modes():
    assert probes.probe_mode("hidden_mlp", 0.25) == "control_probe_hidden_mlp_0.25"
    assert probes.probe_mode("routing_hard", 0.5) == "routing_hard_0.5"
    assert probes.PROBES == ("router_linear", "router_mlp", "hidden_linear", "hidden_mlp")

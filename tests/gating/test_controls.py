"""Controls matched to a hard gate: masks against brute force, scores against passes of the model done by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src import mamba_sidecar as ms
from src.base.text_data import TokenDocument, score_windows
from src.eval_utils import score_documents
from src.gating import controls
from src.hybrid import gates
from src.hybrid.gates import FixedGate, MaskGate, RoutingGate
from src.models.blockffn import BlockFFNForCausalLM
from src.routing_extractor import RoutingExtractor
from tests.tiny import GOLDEN

LAYERS = (1, 2)
SETTINGS = ms.SidecarSettings(d_state=8, headdim=16, chunk_size=16)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def hard_masks(lengths=(70, 45, 100, 16, 100), layers=LAYERS, seed=0):
    """Masks with a share of its own per document and layer, and the scores (multiples of 1/12) that made them."""
    rng = np.random.default_rng(seed)
    masks, scores = {}, {}
    for index, length in enumerate(lengths):
        name = f"d{index}"
        scores[name] = {layer: (rng.integers(3, 12, length) / 12).astype(np.float32) for layer in layers}
        masks[name] = {
            layer: (values > rng.uniform(0.3, 0.8)).astype(np.float32) for layer, values in scores[name].items()
        }
    return masks, scores


def every_control(masks, scores, seed=0):
    return {
        "random": gates.matched_random_masks(masks, seed),
        "token_shuffled": controls.block_shuffled_masks(masks, seed, 1),
        "block_shuffled": controls.block_shuffled_masks(masks, seed),
        "inverted": controls.scored_masks(masks, scores, largest=False, seed=seed),
        "other_document": controls.other_document_masks(masks, scores, seed),
        "position_early": controls.position_masks(masks, late=False),
        "position_late": controls.position_masks(masks, late=True),
        **{
            name: controls.scored_masks(masks, scores, largest, seed)
            for name, largest in controls.LARGEST_TO_MAMBA.items()
        },
    }


def tokens_of(seed, length, vocabulary=512):
    return np.random.default_rng(seed).integers(3, vocabulary, length)


@pytest.fixture(params=["vanilla_gqa_block", "mla_block"])
def model(request):
    return BlockFFNForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()


@pytest.fixture
def vanilla():
    return BlockFFNForCausalLM.from_pretrained(GOLDEN / "vanilla_gqa_block", dtype=torch.float32).eval()


# -- masks


def test_there_are_masks_for_every_control():
    assert len(set(controls.CONTROLS)) == len(controls.CONTROLS) == 14
    assert set(every_control(*hard_masks())) == set(controls.CONTROLS)


def test_every_control_has_exactly_the_gates_counts():
    masks, scores = hard_masks()
    masks["d2"][1][:] = 0.0  # a gate that sends nothing, one that sends everything, one with one token
    masks["d4"][2][:] = 1.0
    masks["d1"][1][:] = np.arange(45) == 7
    for layer in LAYERS:
        masks["d0"][layer][30:33] = np.nan  # never fed
    first = every_control(masks, scores)
    for name, control in first.items():
        for document, layers in masks.items():
            assert set(control[document]) == set(layers), name
            for layer, values in layers.items():
                mask = control[document][layer]
                assert mask.shape == values.shape and set(np.unique(mask)) <= {0.0, 1.0}, name
                assert mask.sum() == np.nansum(values), (name, document, layer)
                assert not mask[np.isnan(values)].any(), name
    again, other = every_control(masks, scores), every_control(masks, scores, seed=1)
    for name in ("block_shuffled", "inverted", "other_document", "self_sparsity"):
        assert all(np.array_equal(first[name][d][k], again[name][d][k]) for d in masks for k in LAYERS), name
        assert any(not np.array_equal(other[name][d][k], again[name][d][k]) for d in masks for k in LAYERS), name


@pytest.mark.parametrize("largest", [True, False])
def test_scored_masks_against_a_plain_sort(largest):
    masks, scores = hard_masks(seed=3)
    masks["d0"][1][5] = np.nan
    got = controls.scored_masks(masks, scores, largest, seed=7)
    for document, layers in masks.items():
        key = torch.tensor([gates.document_key(document)])
        for layer, values in layers.items():
            uniform = gates.hash_uniform(7, layer, key, torch.arange(len(values))[None])[0].tolist()
            fed = [p for p in range(len(values)) if not math.isnan(values[p])]
            by_rank = sorted(fed, key=lambda p: (-float(scores[document][layer][p]), uniform[p], p))
            count = int(np.nansum(values))
            want = by_rank[:count] if largest else by_rank[len(by_rank) - count :]
            assert np.flatnonzero(got[document][layer]).tolist() == sorted(want)


def test_inverted_at_half_the_tokens_is_the_complement():
    rng = np.random.default_rng(0)
    scores = {"d": {1: rng.integers(0, 5, 60) / 4}}
    half = controls.scored_masks({"d": {1: (np.arange(60) < 30).astype(float)}}, scores, seed=5)
    inverted = controls.scored_masks(half, scores, largest=False, seed=5)
    assert np.array_equal(inverted["d"][1], 1.0 - half["d"][1])


def test_ties_are_split_by_chance_not_by_position():
    masks = {f"d{i}": {1: (np.arange(100) < 50).astype(float)} for i in range(40)}
    equal = {name: {1: np.zeros(100)} for name in masks}
    got = np.mean([layers[1] for layers in controls.scored_masks(masks, equal, seed=0).values()], axis=0)
    assert abs(got[:50].mean() - 0.5) < 0.05 and got.max() < 0.9  # 2,000 cells: a standard error of 0.008


def test_blocks_are_permuted_whole_and_alike_in_all_layers():
    length = 16 * 6 + 5
    # one Mamba token per block, at a place and layer that tell the blocks apart
    places = np.arange(0, length, 16) + np.array([0, 3, 6, 9, 12, 15, 4])
    mask = np.isin(np.arange(length), places).astype(np.float32)
    second = mask.copy()
    second[places[::2]] = 0.0
    masks = {f"d{i}": {1: mask, 2: second} for i in range(30)}
    got = controls.block_shuffled_masks(masks, seed=0)
    blocks = [mask[i : i + 16].tolist() for i in range(0, length, 16)]
    orders = []
    for layers in got.values():
        rest, order = layers[1].tolist(), []
        while rest:  # read the shuffled mask back, block by block
            index = next(i for i, block in enumerate(blocks) if i not in order and rest[: len(block)] == block)
            order.append(index)
            rest = rest[len(blocks[index]) :]
        assert sorted(order) == list(range(7))
        orders.append(tuple(order))
        by_order = np.concatenate([second[16 * i : 16 * i + 16] for i in order])
        assert np.array_equal(layers[2], by_order)
    assert len(set(orders)) > 25
    assert len({order.index(6) for order in orders}) > 3  # the short block moves too
    one_block = {"short": {1: np.array([1.0, 0.0, 1.0])}}
    assert controls.block_shuffled_masks(one_block, seed=0)["short"][1].tolist() == [1.0, 0.0, 1.0]


def test_shuffled_tokens_keep_what_layers_have_in_common_and_nothing_else():
    rng = np.random.default_rng(6)
    runs = (np.arange(640) // 8 % 2).astype(np.float32)
    masks = {f"d{i}": {1: runs, 2: runs * (rng.random(640) < 0.7), 3: 1 - runs} for i in range(10)}
    got = controls.block_shuffled_masks(masks, 0, controls.SHUFFLED_BLOCKS["token_shuffled"])
    for document in masks:
        before, after = (np.stack(list(one[document].values()), axis=1) for one in (masks, got))
        assert sorted(before.tolist()) == sorted(after.tolist()) and before.tolist() != after.tolist()
        assert np.abs(np.diff(got[document][1])).mean() > 0.4  # the runs are gone


def test_block_shuffling_keeps_runs_that_random_masks_break():
    runs = (np.arange(640) // 8 % 2).astype(np.float32)  # runs of 8
    masks = {f"d{i}": {1: runs} for i in range(20)}

    def changes(control):
        return np.mean([np.abs(np.diff(layers[1])).mean() for layers in control.values()])

    assert changes(masks) == pytest.approx(1 / 8, abs=0.01)
    assert changes(controls.block_shuffled_masks(masks, 0)) < 0.16
    assert changes(gates.matched_random_masks(masks, 0)) > 0.4


def test_donors_are_others_of_nearly_the_same_length():
    lengths = {"a": 10, "b": 50, "c": 20, "d": 50, "e": 50}
    donors = [controls.donor_documents(lengths, seed) for seed in range(20)]
    for chosen in donors:
        assert all(document != donor for document, donor in chosen.items())
        assert chosen["a"] == "c" and lengths[chosen["c"]] == 50
        assert all(lengths[chosen[name]] == 50 for name in "bde")
    assert len({tuple(sorted(chosen.items())) for chosen in donors}) > 3
    grown = controls.donor_documents({"a": 10, "b": 20, "c": 30}, 0)
    assert grown == {"a": "b", "b": "c", "c": "b"}


def test_other_documents_routing_at_the_same_positions():
    # equal lengths and counts: the donor's mask, ties as its own gate split them
    scores = np.repeat([0.2, 0.5, 0.8], 20)
    first, second = np.zeros(60), np.zeros(60)
    first[[*range(40, 60), *range(20, 30)]] = 1
    second[[*range(40, 60), *range(25, 35)]] = 1
    masks = {"a": {1: first}, "b": {1: second}}
    got = controls.other_document_masks(masks, {"a": {1: scores}, "b": {1: scores}}, seed=0)
    assert np.array_equal(got["a"][1], second) and np.array_equal(got["b"][1], first)
    # another length: cut off, or started over; another count: the donor's highest scores
    short, long = np.array([0.1, 0.9, 0.5]), np.array([0.3, 0.2, 0.8, 0.6, 0.95, 0.7, 0.1])
    masks = {"short": {1: (short > 0.7) * 1.0}, "long": {1: (long > 0.5) * 1.0}}
    got = controls.other_document_masks(masks, {"short": {1: short}, "long": {1: long}}, seed=0)
    assert got["short"][1].tolist() == [0.0, 0.0, 1.0]  # the largest of 0.3, 0.2, 0.8
    # 0.1 0.9 0.5 | 0.1 0.9 0.5 | 0.1 has four tokens of at least 0.5
    assert got["long"][1].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_positions():
    masks = {"d": {1: np.array([0.0, 1, 0, 1, 0]), 2: np.array([1.0, 1, 1, 0, np.nan])}}
    early, late = controls.position_masks(masks, late=False), controls.position_masks(masks, late=True)
    assert early["d"][1].tolist() == [1, 1, 0, 0, 0] and late["d"][1].tolist() == [0, 0, 0, 1, 1]
    assert early["d"][2].tolist() == [1, 1, 1, 0, 0] and late["d"][2].tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda masks: masks["d0"][1].__setitem__(0, 1.0 - masks["d0"][1][0]), ["'d0' layer 1", "of 70 against"]),
        (lambda masks: masks["d3"].pop(2), ["'d3' has layers [1, 2] against [1]"]),
        (lambda masks: masks.pop("d4"), ["different documents", "d4"]),
        (lambda masks: masks["d1"].__setitem__(1, masks["d1"][1] * 0.5), ["hard gates", "'d1'", "0.5"]),
        (
            lambda masks: masks["d2"].__setitem__(1, np.append(masks["d2"][1], 0.0)),
            ["'d2' layer 1", "of 100", "of 101"],
        ),
    ],
)
def test_the_check_names_what_differs(change, words):
    masks, _ = hard_masks()
    control = controls.block_shuffled_masks(masks, seed=0)
    controls.check_equal_counts(masks, control)
    change(control)
    with pytest.raises(ValueError) as error:
        controls.check_equal_counts(masks, control)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda m, s: controls.scored_masks({"d": {1: np.array([0.5])}}, s), ["hard gates", "0.5", "position 0"]),
        (lambda m, s: controls.scored_masks(m, {"d0": s["d0"]}), ["layer 1", "'d1'"]),
        (lambda m, s: controls.scored_masks(m, m | {"d2": {1: np.zeros(3)}}), ["'d2'", "(3,)", "100 positions"]),
        (lambda m, s: controls.scored_masks(m, s | {"d0": {1: np.full(70, np.nan)}}), ["not finite", "70 of 70"]),
        (lambda m, s: controls.other_document_masks({"d0": m["d0"]}, s), ["no other document"]),
        (lambda m, s: controls.token_counts([], 5), ["no documents"]),
        (lambda m, s: controls.token_counts([SimpleNamespace(ids=np.array([1, 9]))], 5), ["token 9", "5"]),
    ],
)
def test_errors_name_what_was_wrong(build, words):
    with pytest.raises(ValueError) as error:
        build(*hard_masks())
    assert all(word in str(error.value) for word in words), str(error.value)


# -- scores


def test_token_frequency():
    text = [TokenDocument("a", "x", np.array([1, 5, 5, 3]), 3), TokenDocument("b", "x", np.array([1, 5]), 1)]
    counts = controls.token_counts(text, 8)
    assert counts.tolist() == [0, 2, 0, 1, 0, 3, 0, 0]
    document = TokenDocument("c", "x", np.array([1, 7, 5, 3, 5]), 4)
    scores = controls.frequency_scores([document], counts, LAYERS)
    assert {layer: values.tolist() for layer, values in scores["c"].items()} == {1: [2, 0, 3, 1], 2: [2, 0, 3, 1]}


def test_scores_against_passes_by_hand(model):
    documents = [TokenDocument(f"d{i}", "x", tokens_of(i, length), length) for i, length in enumerate((24, 9))]
    ms.attach_mamba_sidecar(model, LAYERS, settings=SETTINGS, gate=RoutingGate(0.5))
    with ms.bypass_sidecars(model):
        got = controls.collect_scores(model, documents, LAYERS, controls.MODEL_SCORES, 64, 64)
    errors = {layer: {} for layer in LAYERS}
    for layer in LAYERS:  # with one layer at half, the change of its output is half of mamba - attention
        outputs = []
        hook = model.model.layers[layer].self_attn.register_forward_hook(
            lambda _m, _i, out, o=outputs: o.append(out[0])
        )
        for alpha in (0.0, 0.5):
            ms.set_gate(model, FixedGate(0.0, per_layer={layer: alpha}))
            for document in documents:
                with torch.no_grad():
                    model(torch.tensor(document.ids[None, :-1]))
        hook.remove()
        for index, document in enumerate(documents):
            errors[layer][document.id] = 2 * (outputs[len(documents) + index] - outputs[index])[0].norm(dim=-1).numpy()
    ms.detach_mamba_sidecars(model)
    model.set_attn_implementation("eager")
    for document in documents:
        ids = torch.tensor(document.ids[None, :-1])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True, output_attentions=True)
            surprisal = [0.0]
            for position in range(1, ids.shape[1]):
                last = model(ids[:, :position]).logits[0, -1].double()
                surprisal.append(float(-last.log_softmax(-1)[ids[0, position]]))
        with torch.no_grad(), RoutingExtractor(model) as extractor:
            model(ids)
            zeros = extractor.token_sparsity()[:, 0]
        for layer in LAYERS:
            want = {
                "previous_surprisal": surprisal,
                "self_sparsity": zeros[layer],
                "recall_error": errors[layer][document.id],
            }
            stream = output.hidden_states[layer][0]
            want["residual_norm"] = [math.sqrt(sum(v * v for v in row)) for row in stream.tolist()]
            normed = model.model.layers[layer].input_layernorm(stream).tolist()
            want["hidden_norm"] = [math.sqrt(sum(v * v for v in row)) for row in normed]
            heads = output.attentions[layer][0].tolist()
            want["attention_entropy"] = [
                np.mean([-sum(p * math.log(p) for p in head[t] if p > 0) for head in heads])
                for t in range(ids.shape[1])
            ]
            assert set(want) == set(got)
            for name, values in want.items():
                kept = got[name][document.id][layer]
                assert kept.dtype == np.float32 and kept.shape == (ids.shape[1],)
                np.testing.assert_allclose(kept, values, **CLOSE, err_msg=name)
    assert got["attention_entropy"]["d0"][1][0] == 0.0  # one key


def test_a_position_of_several_windows_counts_as_in_the_earliest(vanilla):
    document = TokenDocument("d", "x", tokens_of(4, 50), 50)
    names = ("hidden_norm", "previous_surprisal")
    got = controls.collect_scores(vanilla, [document], (3,), names, 20, 8)
    scored = score_documents(vanilla, [document], 20, 8).token_nll[0]  # entry j belongs to ids[j + 1]
    np.testing.assert_allclose(got["previous_surprisal"]["d"][3][1:], scored[:-1], **CLOSE)
    windows = score_windows(50, 20, 8)
    assert len(windows) > 3
    norm = np.full(49, np.nan)
    for window in windows:
        piece = TokenDocument("p", "x", document.ids[window.start : window.stop], 1)
        alone = controls.collect_scores(vanilla, [piece], (3,), ("hidden_norm",), 64, 64)["hidden_norm"]["p"][3]
        for offset, value in enumerate(alone):
            if np.isnan(norm[window.start + offset]):
                norm[window.start + offset] = value
    np.testing.assert_allclose(got["hidden_norm"]["d"][3], norm, **CLOSE)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_as_before_also_after_an_error(vanilla):
    vanilla.train()
    before = hooks(vanilla), vanilla.config._attn_implementation
    assert before[1] != "eager"
    good = TokenDocument("good", "x", tokens_of(0, 12), 12)
    names = [name for name in controls.MODEL_SCORES if name != "recall_error"]
    controls.collect_scores(vanilla, [good], LAYERS, names, 64, 64)
    assert (hooks(vanilla), vanilla.config._attn_implementation) == before and vanilla.training
    bad = TokenDocument("bad", "x", np.array([1, 10**6, 2]), 2)
    with pytest.raises(IndexError):
        controls.collect_scores(vanilla, [good, bad], LAYERS, names, 64, 64)
    assert (hooks(vanilla), vanilla.config._attn_implementation) == before and vanilla.training


def test_collecting_refuses_what_it_cannot_measure(vanilla):
    document = TokenDocument("d", "x", tokens_of(0, 12), 12)

    def refused(names, layers=LAYERS, documents=(document,)):
        with pytest.raises(ValueError) as error:
            controls.collect_scores(vanilla, documents, layers, names, 64, 64)
        return str(error.value)

    assert "'magic'" in refused(["magic"]) and "hidden_norm" in refused(["magic"])
    assert "layer 9" in refused(["hidden_norm"], (9,))
    assert "no documents" in refused(["hidden_norm"], documents=())
    assert "'e'" in refused(["hidden_norm"], documents=[TokenDocument("e", "x", np.array([1]), 0)])
    assert "sidecar" in refused(["recall_error"])
    ms.attach_mamba_sidecar(vanilla, (1,), settings=SETTINGS)
    assert "bypass_sidecars" in refused(["hidden_norm"], (3,))
    with ms.bypass_sidecars(vanilla):
        assert "layer 2" in refused(["recall_error"])


def test_controls_of_a_routing_gate_run_at_its_counts(vanilla):
    documents = [TokenDocument(f"d{i}", "x", tokens_of(i, 30 + 7 * i), 30) for i in range(5)]
    ms.attach_mamba_sidecar(vanilla, LAYERS, settings=SETTINGS, gate=RoutingGate(0.5, hard=True, seed=3))
    gate = ms.calibrate_gates(vanilla, ms.attachment_of(vanilla).gate, documents, 64)

    def record(gate):
        ms.set_gate(vanilla, gate)
        with ms.record_gates(vanilla) as kept:
            score_documents(vanilla, documents, 64, 64, on_batch=ms.attachment_of(vanilla).on_batch)
        return kept

    routing = record(gate)
    assert 0.3 < routing.mean_share() < 0.7
    own = controls.scored_masks(routing.shares, routing.scores, seed=3)
    for document, layers in routing.shares.items():
        for layer, values in layers.items():
            assert np.array_equal(own[document][layer], values)  # the gate's scores and hash give the gate back
    for name, masks in every_control(routing.shares, routing.scores).items():
        assert MaskGate(masks).uses_document, name
        controls.check_equal_counts(routing.shares, record(MaskGate(masks)).shares)

"""Gate policies against closed forms, brute force and a plain-Python splitmix64."""

import math

import numpy as np
import pytest
import torch

from src.hybrid import gates
from src.hybrid.gates import FixedGate, GateInputs, LearnedGate, MaskGate, RandomGate, RoutingGate, ScoreDistribution

MASK = (1 << 64) - 1


def splitmix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_uniform(seed, layer, key, position):
    state = splitmix((seed * 0x9E3779B97F4A7C15 + layer * 0xD1B54A32D192ED03) & MASK)
    state = splitmix((key & MASK) ^ state)
    return (splitmix(state ^ position) >> 40) / 2**24


def inputs(scores, keys=None):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    batch, tokens = scores.shape
    keys = torch.zeros(batch, dtype=torch.int64) if keys is None else keys
    return GateInputs(scores, keys, torch.arange(tokens).expand(batch, -1))


def test_splitmix_known_value():
    # the first output of splitmix64 seeded with 0, as published with the generator
    assert splitmix(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_hash_equals_plain_python(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    keys = [0, 5, -(2**63), 2**63 - 1, gates.document_key("a document")]
    positions = [[0, 1, 2, 1000, 2**40]] * len(keys)
    for seed, layer in ((0, 0), (3, 7), (12345678901, 11)):
        got = gates.hash_uniform(seed, layer, torch.tensor(keys, device=device), torch.tensor(positions, device=device))
        want = [[reference_uniform(seed, layer, key, position) for position in positions[0]] for key in keys]
        assert got.tolist() == want


def test_hash_is_uniform_and_its_arguments_matter():
    keys, positions = torch.arange(64), torch.arange(512).expand(64, -1)
    base = gates.hash_uniform(0, 4, keys, positions)
    counts = torch.histc(base, bins=16, min=0, max=1)
    expected = base.numel() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 45  # chi-square, 15 degrees of freedom: p = 1e-4
    for other in (gates.hash_uniform(1, 4, keys, positions), gates.hash_uniform(0, 5, keys, positions)):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(base[:, :-1].ravel(), base[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(base[:-1].ravel(), base[1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.6, 0.75, 0.99])
def test_layer_cut_meets_any_share_in_expectation(share):
    rng = np.random.default_rng(0)
    scores = rng.binomial(32, 0.7, size=4000) / 32
    threshold, tie = gates.layer_cut(ScoreDistribution.of(scores), share)
    assert 0.0 <= tie <= 1.0
    assert (scores > threshold).mean() + tie * (scores == threshold).mean() == pytest.approx(share, abs=1e-12)


def test_layer_cut_by_hand():
    # 4 tokens at 0.5, 4 at 1: three quarters = all at 1, half of those at 0.5
    distribution = ScoreDistribution.of(np.array([0.5] * 4 + [1.0] * 4))
    assert gates.layer_cut(distribution, 0.75) == (0.5, 0.5)
    assert gates.layer_cut(distribution, 0.5) == (1.0, 1.0)
    assert gates.layer_cut(distribution, 0.25) == (1.0, 0.5)


@pytest.mark.parametrize("temperature", [1e-4, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_soft_centre_gives_the_mean_share(share, temperature):
    scores = np.random.default_rng(1).binomial(32, 0.7, size=999) / 32
    centre = gates.soft_centre(ScoreDistribution.of(scores), share, temperature)
    assert torch.sigmoid(torch.tensor((scores - centre) / temperature)).mean() == pytest.approx(share, abs=1e-6)


def test_soft_centre_of_one_value_is_the_logit():
    centre = gates.soft_centre(ScoreDistribution.of(np.full(5, 0.7)), 0.2, 0.1)
    assert centre == pytest.approx(0.7 - 0.1 * math.log(0.2 / 0.8), abs=1e-9)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("invert", [False, True])
def test_calibrated_hard_gate_meets_its_share_on_other_tokens(share, invert):
    rng = np.random.default_rng(2)
    calibration, scores = rng.binomial(16, 0.8, size=20_000) / 16, rng.binomial(16, 0.8, size=(40, 500)) / 16
    gate = RoutingGate(share, hard=True, invert=invert, distributions={3: ScoreDistribution.of(calibration)})
    got = gates.mamba_share(gate, 3, inputs(scores, torch.arange(40)))
    assert set(got.unique().tolist()) <= {0.0, 1.0}
    assert float(got.mean()) == pytest.approx(share, abs=0.015)
    order = scores[got.numpy() == 1], scores[got.numpy() == 0]
    if invert:
        assert order[0].max() <= order[1].min()
    else:
        assert order[0].min() >= order[1].max()  # more sparse -> Mamba


def test_ties_depend_on_document_and_position_only():
    gate = RoutingGate(0.5, hard=True, distributions={1: ScoreDistribution.of(np.full(10, 0.5))})
    keys = torch.tensor([7, 8])
    whole = gates.mamba_share(gate, 1, inputs(np.full((2, 64), 0.5), keys))
    assert not torch.equal(whole[0], whole[1])
    tail = GateInputs(torch.full((1, 3), 0.5), keys[1:], torch.tensor([[40, 41, 42]]))
    assert torch.equal(gates.mamba_share(gate, 1, tail)[0], whole[1, 40:43])


def test_uncalibrated_gates():
    scores = [[0.5, 0.7, 0.9]]
    hard = gates.mamba_share(RoutingGate(0.5, hard=True, threshold=0.7), 2, inputs(scores))
    assert hard.tolist() == [[0.0, 1.0, 1.0]]  # from the threshold on, 0.7 in float32 included
    soft = gates.mamba_share(RoutingGate(0.3, threshold=0.7, temperature=0.1), 2, inputs(scores))
    want = [1 / (1 + math.exp(-((s - 0.7) / 0.1 + math.log(0.3 / 0.7)))) for s in scores[0]]
    assert soft[0].tolist() == pytest.approx(want, abs=1e-6)
    assert soft[0, 1] == pytest.approx(0.3, abs=1e-6)
    learned = gates.mamba_share(LearnedGate(0.5, hard=True), 2, inputs([[-1.0, 0.0, 2.0]]))
    assert learned.tolist() == [[0.0, 1.0, 1.0]]
    inverted = gates.mamba_share(RoutingGate(0.5, hard=True, threshold=0.7, invert=True), 2, inputs(scores))
    assert inverted.tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize("mode", ["fixed", "routing", "learned", "random"])
def test_alpha_0_and_1_are_plain_numbers(mode):
    for alpha in (0.0, 1.0):
        gate = gates.with_alpha(gates.make_gate(mode), alpha)
        assert gates.mamba_share(gate, 1, inputs([[0.2, 0.9]])) == alpha
        assert gates.layer_alpha(gate, 1) == alpha


def test_per_layer_shares():
    gate = FixedGate(0.0, per_layer={3: 1.0})
    assert [gates.mamba_share(gate, layer, inputs([[0.0]])) for layer in (2, 3)] == [0.0, 1.0]
    random = gates.mamba_share(RandomGate(0.1, per_layer={3: 0.9}), 3, inputs(np.zeros((8, 500)), torch.arange(8)))
    assert float(random.mean()) == pytest.approx(0.9, abs=0.02)
    assert gates.layer_alpha(gates.with_alpha(gate, 0.4), 3) == 0.4


def test_sparsity_counts_exact_zeros():
    activations = torch.tensor([[[0.0, 1e-30, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert gates.sparsity(activations).tolist() == [[0.5, 1.0]]
    assert gates.sparsity(activations.bfloat16()).dtype == torch.float32


def test_matched_random_masks_have_exactly_the_same_counts():
    rng = np.random.default_rng(0)
    shares = {
        f"doc{index}": {layer: (rng.random(50 + index) < 0.3).astype(np.float32) for layer in (2, 5)}
        for index in range(6)
    }
    shares["doc0"][2][10:20] = np.nan
    masks = gates.matched_random_masks(shares, seed=0)
    for document, layers in shares.items():
        for layer, values in layers.items():
            mask = masks[document][layer]
            assert mask.shape == values.shape and set(np.unique(mask)) <= {0.0, 1.0}
            assert mask.sum() == np.nansum(values)
            assert not mask[np.isnan(values)].any()
    again, other = gates.matched_random_masks(shares, seed=0), gates.matched_random_masks(shares, seed=1)
    assert all(np.array_equal(masks[d][k], again[d][k]) for d in shares for k in shares[d])
    assert any(not np.array_equal(masks[d][k], other[d][k]) for d in shares for k in shares[d])
    assert gates.is_hard(MaskGate(masks)) and not gates.is_hard(MaskGate({"d": {0: np.array([0.5])}}))


def test_matched_random_masks_differ_from_layer_to_layer_and_from_document_to_document():
    """Also where the counts are the same: only the draw itself can tell these layers and documents apart."""
    half = np.repeat(np.float32([1.0, 0.0]), 20)
    masks = gates.matched_random_masks({name: {2: half, 5: half} for name in ("a", "b")}, seed=0)
    drawn = [tuple(mask) for layers in masks.values() for mask in layers.values()]
    assert all(sum(mask) == 20 for mask in drawn) and len(set(drawn)) == 4


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: gates.make_gate("magic"), ["'magic'", "fixed", "routing", "learned", "random", "mask"]),
        (lambda: gates.make_gate("mask"), ["MaskGate"]),
        (lambda: gates.make_gate("fixed", 1.5), ["1.5", "[0, 1]"]),
        (lambda: gates.make_gate("routing", -0.1), ["-0.1", "[0, 1]"]),
        (lambda: gates.make_gate("learned", float("nan")), ["nan", "[0, 1]"]),
        (lambda: FixedGate(0.5, per_layer={1: 2.0}), ["2.0", "[0, 1]"]),
        (lambda: RoutingGate(signal="next"), ["'next'", "previous", "lookahead"]),
        (lambda: RoutingGate(signal="self"), ["'self'", "offline mask", "previous", "lookahead"]),
        (lambda: RoutingGate(temperature=0.0), ["temperature", "0.0", "positive"]),
        (lambda: RoutingGate(threshold=70), ["70", "[0, 1]"]),
        (lambda: ScoreDistribution.of(np.array([])), ["0 scores"]),
        (lambda: gates.with_alpha(MaskGate({}), 0.5), ["mask"]),
        (lambda: gates.mamba_share(MaskGate({}), 1, inputs([[0.5]])), ["on_batch"]),
        (
            lambda: gates.mamba_share(RoutingGate(distributions={2: ScoreDistribution.of([0.5])}), 5, inputs([[0.5]])),
            ["[2]", "layer 5"],
        ),
    ],
)
def test_errors_name_value_and_choices(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_only_masks_use_the_document():
    assert [g.uses_document for g in (FixedGate(), RoutingGate(), LearnedGate(), RandomGate(), MaskGate({}))] == [
        False,
        False,
        False,
        False,
        True,
    ]

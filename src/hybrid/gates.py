"""Gate policies: from what is known about a token before a layer's attention runs to its mamba share m.

    y = (1 - m) * attention(x) + m * mamba(x)        m = 0 attention only, m = 1 Mamba only

Every gate but `MaskGate` is deployable: it looks at no later token. Scored gates have a score per token, the higher the
more Mamba; a soft gate passes it through a sigmoid, a hard gate through a threshold.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

GATE_MODES = ("fixed", "routing", "learned", "random", "mask")
SIGNALS = ("previous", "lookahead")
# Scores closer than this are the same value: k / E computed here and a threshold typed by a user differ by rounding.
SCORE_TOLERANCE = 1e-6
# Most layers' cuts and centres that are kept: each is asked for in every forward pass, but depends only on the gate.
CUTS_KEPT = 4096


@dataclass(frozen=True, eq=False)
class ScoreDistribution:
    """One layer's gate scores on calibration text: distinct `values` [n] in rising order and their `counts` [n]."""

    values: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(scores: np.ndarray) -> "ScoreDistribution":
        """Distribution of `scores` (any shape). Raises ValueError for no scores or scores that are not finite."""
        scores = np.asarray(scores, dtype=np.float64).ravel()
        finite = np.isfinite(scores).all()
        if scores.size == 0 or not finite:
            raise ValueError(f"cannot calibrate a gate on {scores.size} scores, all finite: {finite}")
        values, counts = np.unique(scores, return_counts=True)
        return ScoreDistribution(values, counts)


Distributions = Mapping[int, ScoreDistribution]


@dataclass(frozen=True, eq=False)
class FixedGate:
    """The same share for every token: `alpha`, or `per_layer[layer]` where given (layers not named use alpha)."""

    alpha: float = 0.5
    per_layer: Mapping[int, float] | None = None
    mode = "fixed"
    uses_document = False

    def __post_init__(self):
        check_alpha(self.alpha, *(self.per_layer or {}).values())


@dataclass(frozen=True, eq=False)
class RoutingGate:
    """The sparser a token's router, the more Mamba.

    alpha: mean share asked for; 0 and 1 are exactly attention only and Mamba only.
    signal: whose router: `previous` (layer l - 1) or `lookahead` (layer l's own, applied to the layer's normed input).
    temperature: width of the soft gate's sigmoid in units of sparsity.
    invert: control; the *denser* a token, the more Mamba.
    distributions: per layer, from `calibrate_gates`; they make the mean share what was asked (`layer_cut`,
        `soft_centre`). Without them a soft gate is sigmoid((sparsity - threshold) / temperature + logit(alpha)), and a
        hard gate sends tokens with sparsity >= threshold to Mamba, whatever alpha says.
    """

    alpha: float = 0.5
    signal: str = "previous"
    hard: bool = False
    temperature: float = 0.1
    threshold: float = 0.7
    invert: bool = False
    seed: int = 0
    distributions: Distributions | None = None
    mode = "routing"
    uses_document = False

    def __post_init__(self):
        _check_scored(self)
        if self.signal == "self":
            raise ValueError(
                "signal 'self', layer l's true router activations, exists only after its attention has run: use it in "
                "an offline mask (MaskGate), or choose previous or lookahead"
            )
        if self.signal not in SIGNALS:
            raise ValueError(f"unknown gate signal {self.signal!r}; choose one of {', '.join(SIGNALS)}")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"sparsity threshold is {self.threshold}; it must lie in [0, 1]")


@dataclass(frozen=True, eq=False)
class ActivationGate:
    """The sparser a token's feed-forward layer, the more Mamba: for dense gated MLPs, which have no router.

    The score is layer l - 1's FFN activation sparsity: the fraction of its neurons with |h| < cutoff, where
    h = act_fn(gate_proj(x)) * up_proj(x) (`activation_sparsity`). Other fields as in `RoutingGate`.

    quantile: mean sparsity that the cutoffs give on calibration text. At the median, 0.5, a score has equal room both
        ways, and how far the tails reach (tiny or huge activations) does not matter.
    cutoffs: layer whose neurons are counted -> cutoff, > 0, from `calibrate_gates`; a gate without them cannot be set.
    """

    alpha: float = 0.5
    quantile: float = 0.5
    hard: bool = False
    temperature: float = 0.1
    seed: int = 0
    cutoffs: Mapping[int, float] | None = None
    distributions: Distributions | None = None
    mode = "ffn_sparsity"
    signal = "ffn_previous"
    invert = False
    uses_document = False

    def __post_init__(self):
        _check_scored(self)
        if not 0.0 < self.quantile < 1.0:
            raise ValueError(f"quantile of the activations is {self.quantile}; it must lie inside (0, 1)")

    @property
    def threshold(self) -> float:
        """Score at which an uncalibrated gate changes over: the mean one."""
        return self.quantile


@dataclass(frozen=True, eq=False)
class LearnedGate:
    """A linear map of the layer's input, w.x + b (`GatedHybridLayer.gate_proj`), as the score.

    Fields as in `RoutingGate`; uncalibrated, a soft gate is sigmoid(score / temperature + logit(alpha)) and a hard gate
    sends tokens with score >= 0 to Mamba.
    """

    alpha: float = 0.5
    hard: bool = False
    temperature: float = 1.0
    seed: int = 0
    distributions: Distributions | None = None
    mode = "learned"
    threshold = 0.0
    invert = False
    uses_document = False

    def __post_init__(self):
        _check_scored(self)


@dataclass(frozen=True, eq=False)
class RandomGate:
    """Hard control that looks at nothing: each (layer, document, position) goes to Mamba with probability `alpha`,
    or `per_layer[layer]` where given, decided by the hash."""

    alpha: float = 0.5
    per_layer: Mapping[int, float] | None = None
    seed: int = 0
    mode = "random"
    hard = True
    uses_document = False

    def __post_init__(self):
        check_alpha(self.alpha, *(self.per_layer or {}).values())


@dataclass(frozen=True, eq=False)
class MaskGate:
    """Offline shares, made with the whole document at hand: a control, or an analysis, never a deployable gate.

    masks: document id -> layer -> shares [N] for the model's input positions 0 .. N - 1 of that document. The
        forward must be told which document each row holds (`SidecarAttachment.on_batch`).
    """

    masks: Mapping[str, Mapping[int, np.ndarray]]
    mode = "mask"
    uses_document = True


ScoredGate = RoutingGate | ActivationGate | LearnedGate
Gate = FixedGate | ScoredGate | RandomGate | MaskGate


@dataclass(frozen=True)
class GateInputs:
    """What one layer's gate may look at in one forward pass.

    scores [B, T] float32: sparsity of the gate's signal, or the learned score; None where the gate has none.
    document_keys [B] int64, positions [B, T] int64: of each row's document, of each token within its document.
    masks [B, T] float32: this layer's offline shares (MaskGate), else None.
    """

    scores: torch.Tensor | None
    document_keys: torch.Tensor
    positions: torch.Tensor
    masks: torch.Tensor | None = None


def make_gate(
    gate_mode: str,
    alpha: float = 0.5,
    signal: str = "previous",
    hard: bool = False,
    temperature: float | None = None,
    threshold: float = 0.7,
    seed: int = 0,
) -> Gate:
    """The gate of a mode's name; settings that the mode does not have are ignored, `temperature` None is its default.

    Raises ValueError for an unknown mode and for `mask`, which needs its masks: build `MaskGate` yourself.
    """
    width = {} if temperature is None else {"temperature": temperature}
    if gate_mode == "fixed":
        return FixedGate(alpha)
    if gate_mode == "routing":
        return RoutingGate(alpha, signal, hard, threshold=threshold, seed=seed, **width)
    if gate_mode == "learned":
        return LearnedGate(alpha, hard, seed=seed, **width)
    if gate_mode == "random":
        return RandomGate(alpha, seed=seed)
    if gate_mode == "mask":
        raise ValueError("gate mode 'mask' needs its masks: pass gate=MaskGate(masks) instead of a mode's name")
    raise ValueError(f"unknown gate mode {gate_mode!r}; choose one of {', '.join(GATE_MODES)}")


def with_alpha(gate: Gate, alpha: float) -> Gate:
    """The same gate at another (mean) share, for all layers. Raises ValueError for a MaskGate, which has none."""
    if isinstance(gate, MaskGate):
        raise ValueError("an offline mask has no alpha: its shares are the masks themselves")
    if isinstance(gate, (FixedGate, RandomGate)):
        return replace(gate, alpha=alpha, per_layer=None)
    return replace(gate, alpha=alpha)


def layer_alpha(gate: Gate, layer: int) -> float | None:
    """The (mean) share that a gate asks of a layer; None for a MaskGate."""
    if isinstance(gate, MaskGate):
        return None
    per_layer = getattr(gate, "per_layer", None) or {}
    return float(per_layer.get(layer, gate.alpha))


def is_hard(gate: Gate) -> bool:
    """Whether m is 0 or 1 for every token (a fixed alpha of 0 or 1 counts as soft; masks as what they hold)."""
    if isinstance(gate, MaskGate):
        return all(bool(np.isin(values, (0, 1)).all()) for layers in gate.masks.values() for values in layers.values())
    return getattr(gate, "hard", False)


def mamba_share(gate: Gate, layer: int, inputs: GateInputs) -> torch.Tensor | float:
    """Mamba share m of every token of one layer: [B, T] float32, or a plain float where it is the same for all.

    Raises ValueError where a calibrated gate does not know the layer.
    """
    alpha = layer_alpha(gate, layer)
    if isinstance(gate, MaskGate):
        if inputs.masks is None:
            raise ValueError("an offline mask needs to know which documents a batch holds: call on_batch before it")
        return inputs.masks
    if isinstance(gate, FixedGate) or alpha in (0.0, 1.0):
        return alpha
    if isinstance(gate, RandomGate):
        return (hash_uniform(gate.seed, layer, inputs.document_keys, inputs.positions) < alpha).float()
    sign = -1.0 if gate.invert else 1.0
    scores, threshold = sign * inputs.scores, sign * gate.threshold
    distribution = _layer_distribution(gate, layer)
    if gate.hard:
        threshold, tie_probability = (threshold, 1.0) if distribution is None else layer_cut(distribution, alpha)
        above = scores > threshold + SCORE_TOLERANCE
        if tie_probability == 0.0:
            return above.float()
        tied = (scores - threshold).abs() <= SCORE_TOLERANCE
        if tie_probability < 1.0:
            tied = tied & (hash_uniform(gate.seed, layer, inputs.document_keys, inputs.positions) < tie_probability)
        return (above | tied).float()
    if distribution is None:
        centre = threshold - gate.temperature * math.log(alpha / (1.0 - alpha))
    else:
        centre = soft_centre(distribution, alpha, gate.temperature)
    return torch.sigmoid((scores - centre) / gate.temperature)


@lru_cache(CUTS_KEPT)
def layer_cut(distribution: ScoreDistribution, share: float) -> tuple[float, float]:
    """(threshold, tie probability) of a hard gate whose expected share on the distribution is exactly `share`.

    Sparsity takes only E + 1 values, so a threshold alone misses its share. Tokens above it go to Mamba, tokens at it
    with the tie probability: P(score > threshold) + tie * P(score = threshold) = share.
    """
    mass = distribution.counts / distribution.counts.sum()
    at_least = np.cumsum(mass[::-1])[::-1]  # P(score >= value), falling
    index = int(np.searchsorted(-at_least, -share, side="right")) - 1  # the highest value with P(>= value) >= share
    index = max(index, 0)
    above = at_least[index] - mass[index]
    tie = min(max((share - above) / mass[index], 0.0), 1.0)
    return float(distribution.values[index]), float(tie)


@lru_cache(CUTS_KEPT)
def soft_centre(distribution: ScoreDistribution, share: float, temperature: float) -> float:
    """Centre c of a soft gate with mean sigmoid((score - c) / temperature) = `share`, inside (0, 1), by bisection."""
    mass = distribution.counts / distribution.counts.sum()

    def mean_share(centre):
        # tanh form of the sigmoid: no overflow at small temperatures
        return float(mass @ (0.5 * (1.0 + np.tanh((distribution.values - centre) / (2.0 * temperature)))))

    reach = temperature * (abs(math.log(share / (1.0 - share))) + 1.0)
    low, high = distribution.values[0] - reach, distribution.values[-1] + reach
    for _ in range(200):
        middle = 0.5 * (low + high)
        if mean_share(middle) > share:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def sparsity(router_activations: torch.Tensor) -> torch.Tensor:
    """Fraction of exact zeros over the experts: [.., E] post-ReLU activations -> [..] float32."""
    return (router_activations == 0).sum(dim=-1).float() / router_activations.shape[-1]


def activation_sparsity(activations: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Fraction of neurons with |h| < cutoff: activations h [.., I] of I neurons -> [..] float32."""
    # float32 first: a tiny cutoff (exact zeros only) would be 0 in float16
    return (activations.float().abs() < cutoff).sum(dim=-1).float() / activations.shape[-1]


def document_key(document_id: str) -> int:
    """A document's int64 key in the hash: the first 8 bytes of its id's sha256."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "little", signed=True)


def hash_uniform(seed: int, layer: int, document_keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform [0, 1) float32 [B, T] from document keys [B] and positions [B, T].

    Prefill, decoding and padded batches compute it alike, on every device, so that they split tied scores alike.
    splitmix64 (Steele, Lea and Flood 2014) chained over (seed, layer), key and position, in wrapping int64; the top 24
    bits make the float, so that float32 holds it exactly.
    """
    start = torch.tensor(_signed(seed * 0x9E3779B97F4A7C15 + layer * 0xD1B54A32D192ED03), device=positions.device)
    state = _splitmix(document_keys.to(positions.device) ^ _splitmix(start))
    state = _splitmix(state[:, None] ^ positions)
    return ((state >> 40) & 0xFFFFFF).float() / float(1 << 24)


def matched_random_masks(shares: Mapping[str, Mapping[int, np.ndarray]], seed: int) -> dict[str, dict[int, np.ndarray]]:
    """Random hard masks with, per document and layer, exactly as many Mamba tokens as another gate's.

    shares: document id -> layer -> shares [N] of the gate to match (for a soft gate the nearest count to its sum).
        NaN (a position the model was never fed) stays 0. Use as `MaskGate(matched_random_masks(record.shares, seed))`.
    Each (document, layer) has a permutation of its own, drawn from (seed, document key, layer).
    """
    masks = {}
    for document, layers in shares.items():
        masks[document] = {}
        for layer, values in layers.items():
            known = np.flatnonzero(~np.isnan(values))
            count = int(round(float(np.asarray(values, dtype=np.float64)[known].sum())))
            rng = np.random.default_rng([seed, document_key(document) & 0xFFFFFFFFFFFFFFFF, layer])
            mask = np.zeros(len(values), dtype=np.float32)
            mask[rng.permutation(known)[:count]] = 1.0
            masks[document][layer] = mask
    return masks


def check_alpha(*alphas: float) -> None:
    """Raise ValueError unless every alpha is a number in [0, 1]."""
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.floating)) or not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha!r}; it must be a number in [0, 1] (0 = attention only, 1 = Mamba only)")


def _check_scored(gate: ScoredGate) -> None:
    check_alpha(gate.alpha)
    if not gate.temperature > 0.0:
        raise ValueError(f"gate temperature is {gate.temperature}; it must be positive")


def _layer_distribution(gate: ScoredGate, layer: int) -> ScoreDistribution | None:
    """The layer's scores on calibration text as the gate reads them; None for an uncalibrated gate."""
    if gate.distributions is None:
        return None
    if layer not in gate.distributions:
        raise ValueError(f"the gate is calibrated for layers {sorted(gate.distributions)}, not for layer {layer}")
    return _negated(gate.distributions[layer]) if gate.invert else gate.distributions[layer]


@lru_cache(CUTS_KEPT)  # one object for each distribution: cuts and centres are kept by identity
def _negated(distribution: ScoreDistribution) -> ScoreDistribution:
    return ScoreDistribution(-distribution.values[::-1], distribution.counts[::-1])


def _signed(value: int) -> int:
    """`value` modulo 2^64 as a signed int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits with zeros shifted in (torch's own shift of int64 copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's output function on int64 (multiplication wraps)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _logical_shift(x, 31)

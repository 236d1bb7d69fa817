"""The rule: outcomes from intervals, in its order, and what it says of a study that is not the one it asks for."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from src.base import stats
from src.gating.rule import Rule, compare, decide, judge, sums_of

RULE = Rule(0.5, "previous", "middle", 3, 60, 0.2, 0.25, resamples=2_000)
VARIANTS = {"routing_hard_0.5_lookahead": "lookahead", "routing_hard_0.5_shared": "shared"}
INPUTS = {"signal": "previous", "layers": "middle"}


def interval(low, high):
    return stats.Interval((low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("random", "shuffled", "outcome"),
    [
        ((-2.0, -0.5), (-1.0, -0.1), "supported"),
        ((-2.0, -0.5), (-1.0, 0.1), "inconclusive"),  # block-shuffled does as well
        ((-2.0, -0.5), None, "inconclusive"),
        ((0.5, 2.0), (-1.0, -0.5), "refuted"),
        ((-0.2, 0.25), (-1.0, 1.0), "refuted"),  # no difference of interest
        ((-0.2, 0.35), (-1.0, 1.0), "inconclusive"),
        ((-0.25, -0.1), (-0.3, -0.1), "supported"),  # inside the margin too, but support is checked first
        ((-0.25, -0.1), (-0.3, 0.1), "refuted"),
    ],
)
def test_outcomes_in_the_order_of_the_rule(random, shuffled, outcome):
    blocks = None if shuffled is None else interval(*shuffled)
    assert decide(interval(*random), blocks, margin=0.3) == outcome


def documents(effects, seeds=(0, 1, 2), count=80, noise=0.05):
    """Sums per document in which a mode costs baseline + its effect per token (nats), and noise between documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(200, 600, count)
    base = rng.normal(3, 0.3, count)
    parts = []
    for mode, effect in {"baseline": 0.0, **effects}.items():
        for seed in (0,) if mode == "baseline" else seeds:
            nll = base + effect + (0 if mode == "baseline" else rng.normal(0, noise, count))
            parts.append(
                pd.DataFrame(
                    {"mode": mode, "sidecar_seed": seed, "document": [f"d{i}" for i in range(count)], "domain": "docs",
                     "tokens": tokens, "num_bytes": tokens * 4, "nll": nll * tokens}
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def judged(sums, rule=RULE, margin=0.02, inputs=INPUTS, quick=False):
    # kind, variant and share_target, not names, say which gates the first criterion compares; no variant is NaN in a
    # table that was read from a file
    rows = [
        {"mode": mode, "kind": mode.split("_")[0], "variant": VARIANTS.get(mode, np.nan), "share_target": 0.5,
         "perplexity": 10.0, "share_realised": 0.5}
        for mode in sums["mode"].unique()
    ]  # fmt: skip
    return judge(sums, pd.DataFrame(rows), rule, margin, inputs, quick)


MODES = dict(zip(("routing", "random", "shuffled"), RULE.modes, strict=True))


def test_a_gate_that_helps_is_supported_and_json():
    sums = documents({MODES["routing"]: 0.05, MODES["random"]: 0.13, MODES["shuffled"]: 0.12})
    answer = judged(sums)
    assert answer["outcome"] == "supported" and answer["label"] == "as pre-stated"
    assert answer["numbers"]["difference"] == pytest.approx(-0.08, abs=0.01)
    assert answer["numbers"]["sidecar_seeds"] == 3 and answer["numbers"]["documents"] == 80
    assert answer["numbers"]["p_value"] < 0.01
    assert answer["margin"] == 0.02 and "0.02" in answer["verdict"]
    json.dumps(answer, allow_nan=False)


def test_no_difference_is_refuted_by_equivalence_and_a_wide_one_is_inconclusive():
    sums = documents({MODES["routing"]: 0.13, MODES["random"]: 0.13, MODES["shuffled"]: 0.13})
    answer = judged(sums)
    assert answer["outcome"] == "refuted" and answer["numbers"]["equivalent_within_margin"]
    assert "no better than chance" in answer["verdict"]
    noisy = documents({MODES["routing"]: 0.13, MODES["random"]: 0.13, MODES["shuffled"]: 0.13}, noise=0.8)
    answer = judged(noisy)
    assert answer["outcome"] == "inconclusive" and not answer["numbers"]["equivalent_within_margin"]
    assert "too small" in answer["label"]
    assert answer["numbers"]["minimum_detectable_effect"] > answer["numbers"]["largest_effect_allowed"]


def test_sets_that_disagree_widen_the_interval():
    sums = documents({MODES["routing"]: 0.10, MODES["random"]: 0.13, MODES["shuffled"]: 0.13})
    assert judged(sums)["outcome"] == "supported"
    shifted = sums.copy()
    for seed, shift in ((0, 0.06), (2, -0.06)):
        chosen = (shifted["mode"] == MODES["routing"]) & (shifted["sidecar_seed"] == seed)
        shifted.loc[chosen, "nll"] += shift * shifted.loc[chosen, "tokens"]
    answer = judged(shifted)
    assert answer["numbers"]["difference"] == pytest.approx(judged(sums)["numbers"]["difference"], abs=1e-9)
    assert answer["outcome"] == "inconclusive"


def test_reservations_name_what_is_missing():
    sums = documents({MODES["routing"]: 0.2, MODES["random"]: 0.13}, seeds=(0,), count=20)
    answer = judged(sums, inputs={"signal": "previous", "layers": "all"}, quick=True)
    for words in ("quick run", "1 of 3 sets", "20 of 60", "other layers", "block-shuffled"):
        assert words in answer["label"], words
    assert answer["outcome"] == "refuted"
    other = judged(sums, inputs={"signal": "lookahead", "layers": "middle"})
    assert other["outcome"] == "not applicable" and "lookahead" in other["verdict"]
    assert judged(documents({"fixed_0.5": 0.1}))["outcome"] == "not applicable" == other["label"]


def test_the_first_criterion_is_compared_with_the_rule():
    sums = documents(
        {
            MODES["routing"]: 0.2,
            MODES["random"]: 0.13,
            MODES["shuffled"]: 0.13,
            "fixed_0.5": 0.3,
            "routing_soft_0.5": 0.4,
            "routing_hard_0.5_lookahead": 0.1,  # no leading gate: no part of the criterion
        }
    )
    criterion = judged(sums)["user_criterion"]
    assert criterion["met"] == {"routing_hard_0.5": "yes", "routing_soft_0.5": "no"}
    assert criterion["against_the_rule"] == "the rule says refuted; it would have said: routing_hard_0.5 yes"


def test_sums_must_belong_together():
    sums = documents({MODES["routing"]: 0.2, MODES["random"]: 0.13})
    with pytest.raises(ValueError, match="no sums of nothing"):
        sums_of(sums, "nothing")
    with pytest.raises(ValueError, match=r"seeds \[9\]"):
        sums_of(sums, MODES["routing"], [9])
    part = sums[~((sums["mode"] == MODES["random"]) & (sums["document"] == "d3"))]
    with pytest.raises(ValueError, match="same documents"):
        compare(part, *RULE.modes[:2], RULE)
    one = sums[~((sums["mode"] == MODES["random"]) & (sums["sidecar_seed"] > 0))]
    assert compare(one, *RULE.modes[:2], RULE).estimate == pytest.approx(
        compare(one[one["sidecar_seed"] == 0], *RULE.modes[:2], RULE).estimate
    )


def test_the_rule_says_its_numbers():
    words = replace(RULE, share=0.25, documents=61, margin_fraction=0.1).words()
    for part in (
        "routing_hard_0.25",
        "control_block_shuffled_0.25",
        "61 evaluation documents",
        "10 %",
        "3 sets",
        "95 %",
    ):
        assert part in words

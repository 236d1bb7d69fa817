"""The rule by which the study answers its question, stated before the numbers; it reads saved sums, nothing else.

Sums are those of gated_hybrid_documents.csv: one row per mode, set of sidecars (sidecar_seed) and document, with its
tokens and its NLL in nats, averaged over the seeds of random masks. `judge` of that file, of gated_hybrid_results.csv
(for the first criterion's perplexities) and of the margin in margin.json, read back, gives verdict.json.
"""

import argparse
from dataclasses import asdict, dataclass
from types import ModuleType

import numpy as np
import pandas as pd

from src.base import stats

OUTCOMES = ("supported", "refuted", "inconclusive")
# Modes whose intervals decide, at the rule's share.
ROUTING, RANDOM, SHUFFLED = "routing_hard", "control_random", "control_block_shuffled"
TOKENS = "control_token_shuffled"  # no part of the rule: it says how much of a difference is which tokens


@dataclass(frozen=True)
class Rule:
    """What is compared, on how much, and what counts as an answer.

    share: of tokens sent to Mamba. signal, layers: of the routing gate. sidecar_seeds: sets of sidecars, distilled from
    so many seeds, that figures are averaged over. documents: evaluation documents needed. margin_fraction: of random
    gating's penalty on calibration text; differences inside +- that many nats are of no interest. detectable_fraction:
    of random gating's penalty; the largest minimum detectable effect at which a study counts as large enough.
    level, resamples, seed: of the studentised bootstrap over documents.
    """

    share: float
    signal: str
    layers: str
    sidecar_seeds: int
    documents: int
    margin_fraction: float
    detectable_fraction: float
    level: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    @property
    def modes(self) -> tuple[str, str, str]:
        """The routing gate, its random control and its block-shuffled control."""
        return tuple(f"{name}_{self.share:g}" for name in (ROUTING, RANDOM, SHUFFLED))

    @property
    def bootstrap(self) -> stats.Bootstrap:
        """How differences get their intervals."""
        return stats.Bootstrap(self.resamples, self.seed, self.level)

    def words(self) -> str:
        """The rule in words."""
        routing, random, shuffled = self.modes
        level = f"{100 * self.level:g} %"
        return (
            f"Primary endpoint: NLL per token of {routing} (hard, deployable, by the sparsity of the {self.signal} "
            f"layer's router, on the layers {self.layers}) minus that of {random} (as many tokens of every document "
            f"and layer, at random), on at least {self.documents} evaluation documents, averaged over "
            f"{self.sidecar_seeds} sets of sidecars distilled from different seeds; {level} interval from a "
            "studentised paired bootstrap over documents with the sets' variance added. The margin of no interest is "
            f"{100 * self.margin_fraction:g} % of what {random} costs against the baseline on calibration text. "
            f"Checked in this order: supported if the interval lies below 0 against {random} and against {shuffled} "
            "(the gate's own decisions, blocks of tokens permuted); refuted if the interval against "
            f"{random} lies above 0, or inside +- margin; else inconclusive. The study is large enough if its minimum "
            f"detectable effect (80 % power, 5 % two-sided) is at most {100 * self.detectable_fraction:g} % of what "
            f"{random} costs on evaluation text."
        )


def rule_of(config: ModuleType, arguments: argparse.Namespace) -> Rule:
    """The rule as config.py states it; resamples, level and seed are those of the command line."""
    return Rule(
        share=config.VERDICT_SHARE, signal=config.VERDICT_SIGNAL, layers=config.VERDICT_LAYERS,
        sidecar_seeds=config.VERDICT_SIDECAR_SETS, documents=config.VERDICT_DOCUMENTS,
        margin_fraction=config.VERDICT_MARGIN, detectable_fraction=config.VERDICT_DETECTABLE,
        level=arguments.confidence_level, resamples=arguments.resamples, seed=arguments.seed,
    )  # fmt: skip


def sums_of(documents: pd.DataFrame, mode: str, sidecar_seeds: list[int] | None = None) -> np.ndarray:
    """NLL sums of a mode, [S, N]: sets of sidecars (`sidecar_seeds`, else those it has) by documents, in file order.

    Raises ValueError where the mode, or one of the sets, is not there.
    """
    rows = documents[documents["mode"] == mode]
    if rows.empty:
        raise ValueError(f"there are no sums of {mode}")
    table = rows.pivot(index="document", columns="sidecar_seed", values="nll")
    table = table.reindex(index=rows["document"].unique())
    wanted = list(table.columns) if sidecar_seeds is None else list(sidecar_seeds)
    missing = [seed for seed in wanted if seed not in table.columns]
    if missing:
        raise ValueError(f"there are no sums of {mode} with the sidecars of seeds {missing}")
    return table[wanted].to_numpy().T


def seeds_of(documents: pd.DataFrame, mode: str) -> list[int]:
    """The sidecar seeds that a mode was measured with; [] where it was not."""
    return sorted(documents.loc[documents["mode"] == mode, "sidecar_seed"].unique().tolist())


def tokens_of(documents: pd.DataFrame, mode: str) -> np.ndarray:
    """Scored tokens per document [N], in file order."""
    rows = documents[documents["mode"] == mode]
    return rows.drop_duplicates("document")["tokens"].to_numpy()


def compare(documents: pd.DataFrame, mode: str, other: str, rule: Rule) -> stats.Interval:
    """Paired difference of NLL per token (nats), mode minus other, over the sets of sidecars that both have.

    The baseline has no sidecars: its one set stands beside all of the other's. NaN bounds below two documents.
    """
    return rule.bootstrap.difference(*_paired_sums(documents, mode, other))


def p_value(documents: pd.DataFrame, mode: str, other: str, rule: Rule) -> float:
    """Two-sided p-value of the difference that `compare` gives; NaN below two documents."""
    return rule.bootstrap.p_value(*_paired_sums(documents, mode, other))


def decide(random: stats.Interval, shuffled: stats.Interval | None, margin: float) -> str:
    """One of OUTCOMES, from the intervals of (routing minus control) in nats per token; see `Rule.words`.

    Without a block-shuffled control nothing is supported.
    """
    if random.high < 0 and shuffled is not None and shuffled.high < 0:
        return "supported"
    if random.low > 0 or (-margin < random.low and random.high < margin):
        return "refuted"
    return "inconclusive"


def judge(documents: pd.DataFrame, results: pd.DataFrame, rule: Rule, margin: float, inputs: dict, quick: bool) -> dict:
    """The content of verdict.json.

    documents, results: gated_hybrid_documents.csv and gated_hybrid_results.csv. margin: nats per token, frozen before
    the evaluation text was scored. inputs: what the run was, with at least `signal`, `layers` (as they were asked for).
    """
    routing, random, shuffled = rule.modes
    verdict = {
        "label": "",
        "rule": rule.words(),
        "settings": asdict(rule),
        "inputs": inputs,
        "margin": margin,
        "numbers": {},
        "outcome": "not applicable",
        "verdict": "",
        "user_criterion": user_criterion(documents, results, rule),
    }
    lacking = [mode for mode in (routing, random) if not seeds_of(documents, mode)]
    if inputs["signal"] != rule.signal:
        verdict["verdict"] = f"The rule is about signal {rule.signal}; this run has signal {inputs['signal']}."
    elif lacking:
        verdict["verdict"] = (
            f"The rule needs the rows {routing} and {random}; this run has not {' nor '.join(lacking)}."
        )
    else:
        verdict |= _answer(documents, rule, margin)
    stated = "as pre-stated" if verdict["numbers"] else "not applicable"
    verdict["label"] = "; ".join(_reservations(documents, rule, inputs, verdict["numbers"], quick)) or stated
    differs = _criterion_differs(verdict["outcome"], verdict["user_criterion"]["met"])
    verdict["user_criterion"]["against_the_rule"] = differs
    return verdict


def user_criterion(documents: pd.DataFrame, results: pd.DataFrame, rule: Rule) -> dict:
    """The first README's criterion: routing-gated perplexity against fixed alpha at the same mean share."""
    records, pairs = results.to_dict("records"), []
    plain = {row["share_target"]: row for row in records if row["kind"] == "fixed"}
    for row in records:
        fixed = plain.get(row["share_target"])
        # Leading gates alone: those of another temperature, signal or threshold are no part of the criterion.
        if row["kind"] != "routing" or _text(row["variant"]) or fixed is None:
            continue
        difference = compare(documents, row["mode"], fixed["mode"], rule)
        met = "yes" if difference.high < 0 else "no" if difference.low > 0 else "undecided"
        pairs.append(
            {
                "routing": row["mode"], "fixed": fixed["mode"],
                "perplexity_routing": row["perplexity"], "perplexity_fixed": fixed["perplexity"],
                "share_realised_routing": row["share_realised"], "share_realised_fixed": fixed["share_realised"],
                "difference_nll": difference.estimate, "ci_low": difference.low, "ci_high": difference.high,
                "met": met,
            }
        )  # fmt: skip
    shown = [pair for pair in pairs if pair["fixed"] == f"fixed_{rule.share:g}"] or pairs
    words = "; ".join(
        f"{pair['routing']} has perplexity {pair['perplexity_routing']:.3f}, {pair['fixed']} "
        f"{pair['perplexity_fixed']:.3f} (difference {pair['difference_nll']:+.5f} nats per token "
        f"[{pair['ci_low']:+.5f}, {pair['ci_high']:+.5f}]): {pair['met']}"
        for pair in shown
    )
    return {
        "statement": "A routing-gated hybrid should beat (lower perplexity) a fixed alpha at the same mean share.",
        "comparisons": pairs,
        "met": {pair["routing"]: pair["met"] for pair in pairs} or None,
        "words": words or "not measured: this run has no routing gate at the share of a fixed alpha",
    }


def _paired_sums(documents: pd.DataFrame, mode: str, other: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums of mode, of other, each [S, N] or [N] where it has no sidecars; tokens [N]) over the sets both have."""
    sets = {name: seeds_of(documents, name) for name in (mode, other)}
    bare = [name for name in (mode, other) if name == "baseline"]
    both = [seed for seed in sets[mode] if seed in sets[other]] if not bare else sets[other if mode in bare else mode]
    if not both:
        raise ValueError(f"{mode} and {other} have no set of sidecars in common: {sets[mode]}, {sets[other]}")
    if documents.loc[documents["mode"] == mode, "document"].unique().tolist() != (
        documents.loc[documents["mode"] == other, "document"].unique().tolist()
    ):
        raise ValueError(f"{mode} and {other} were not scored on the same documents in the same order")
    a, b = (sums_of(documents, name)[0] if name in bare else sums_of(documents, name, both) for name in (mode, other))
    return a, b, tokens_of(documents, mode)


def _answer(documents: pd.DataFrame, rule: Rule, margin: float) -> dict:
    """outcome, numbers and words."""
    routing, random, shuffled = rule.modes
    against = compare(documents, routing, random, rule)
    blocks = compare(documents, routing, shuffled, rule) if seeds_of(documents, shuffled) else None
    tokens_mode = f"{TOKENS}_{rule.share:g}"
    moved = compare(documents, routing, tokens_mode, rule) if seeds_of(documents, tokens_mode) else None
    own, penalty = (compare(documents, mode, "baseline", rule) for mode in (routing, random))
    outcome = decide(against, blocks, margin)
    numbers = {
        "difference": against.estimate, "ci_low": against.low, "ci_high": against.high,
        "p_value": p_value(documents, routing, random, rule),
        "vs_block_shuffled": blocks and blocks.estimate,
        "vs_block_shuffled_ci_low": blocks and blocks.low, "vs_block_shuffled_ci_high": blocks and blocks.high,
        "vs_token_shuffled": moved and moved.estimate,
        "vs_token_shuffled_ci_low": moved and moved.low, "vs_token_shuffled_ci_high": moved and moved.high,
        "delta_nll_routing": own.estimate, "delta_nll_control": penalty.estimate,
        "minimum_detectable_effect": None, "largest_effect_allowed": rule.detectable_fraction * penalty.estimate,
        "equivalence_p": None, "equivalent_within_margin": None,
        "sidecar_seeds": len(set(seeds_of(documents, routing)) & set(seeds_of(documents, random))),
        "documents": len(tokens_of(documents, routing)), "tokens": int(tokens_of(documents, routing).sum()),
    }  # fmt: skip
    a, b, tokens = _paired_sums(documents, routing, random)
    if len(tokens) >= 2:
        numbers["minimum_detectable_effect"] = stats.minimum_detectable_effect(a, b, tokens)
        if margin > 0:
            p, equivalent = rule.bootstrap.equivalence(a, b, tokens, margin)
            numbers |= {"equivalence_p": p, "equivalent_within_margin": equivalent}
    meaning = {
        "supported": "router sparsity picks tokens that need attention less than chance, and than its own decisions "
        "moved elsewhere, would",
        "refuted": "router sparsity picks tokens worse than chance would"
        if against.low > 0
        else "router sparsity picks tokens no better than chance by any amount of interest",
        "inconclusive": "the data cannot tell it from chance",
    }[outcome]
    words = f"Routing minus random is {_words(against)}: {meaning}. "
    if blocks is not None:
        words += f"Against its own decisions, shuffled in blocks: {_words(blocks)}. "
    if moved is not None:
        words += (
            "Against them with single tokens shuffled, all layers alike, so that as many tokens go to Mamba in several "
            f"layers at once (no part of the rule): {_words(moved)}. "
        )
    words += (
        f"For scale, the random control costs {penalty.estimate:+.5f} nats per token against the baseline, the routing "
        f"gate {own.estimate:+.5f}; the margin of no interest is {margin:.5f}."
    )
    effect = numbers["minimum_detectable_effect"]
    if effect is not None:
        words += f" The smallest effect that this study would find with 80 % power is {effect:.5f}."
    return {"outcome": outcome, "numbers": numbers, "verdict": words}


def _reservations(documents: pd.DataFrame, rule: Rule, inputs: dict, numbers: dict, quick: bool) -> list[str]:
    """What keeps a run from being the study that the rule asks for."""
    found = ["quick run: a smoke test, no evidence"] if quick else []
    if not numbers:
        return found
    if numbers["sidecar_seeds"] < rule.sidecar_seeds:
        found.append(f"preliminary: {numbers['sidecar_seeds']} of {rule.sidecar_seeds} sets of sidecars")
    if numbers["documents"] < rule.documents:
        found.append(f"too few documents: {numbers['documents']} of {rule.documents}")
    if inputs["layers"] != rule.layers:
        found.append(f"other layers than the rule's: {inputs['layers']}")
    if not seeds_of(documents, rule.modes[2]):
        found.append("without the block-shuffled control")
    effect, allowed = numbers["minimum_detectable_effect"], numbers["largest_effect_allowed"]
    if effect is not None and effect > allowed:
        found.append(f"too small: it would find effects from {effect:.5f} nats, and should from {allowed:.5f}")
    return found


def _criterion_differs(outcome: str, met: dict | None) -> str:
    """Where the looser criterion would have answered differently from the rule."""
    if outcome not in OUTCOMES or not met:
        return "not comparable: one of the two has no answer"
    expected = {"supported": "yes", "refuted": "no", "inconclusive": "undecided"}[outcome]
    other = {name: answer for name, answer in met.items() if answer != expected}
    if not other:
        return f"it agrees with the rule ({outcome}) in all {len(met)} comparisons"
    return f"the rule says {outcome}; it would have said: " + ", ".join(f"{name} {met[name]}" for name in other)


def _text(cell: object) -> str:
    """A cell of text; an empty one is NaN where a table was read from a file."""
    return cell if isinstance(cell, str) else ""


def _words(interval: stats.Interval) -> str:
    return f"{interval.estimate:+.5f} nats per token [{interval.low:+.5f}, {interval.high:+.5f}]"

"""From sums per document to the rows of result files: paired differences, perplexity and its company, tables of gates.

A mode's row averages its runs over the seeds of random masks, then over the sets of sidecars, whose variance is in its
intervals.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from src.base import stats
from src.base.results import as_written
from src.gating.modes import LEADERS, MODE_COLUMNS
from src.gating.rule import Rule, compare, p_value, seeds_of

MEANS = ("share_realised", "flops_ideal", "flops_executed", "tokens_per_second")
RESULT_COLUMNS = (
    "mode", *MODE_COLUMNS, "variant", "share_realised", "perplexity", "delta", "pct_change", "delta_nll", "ci_low",
    "ci_high", "control", "vs_random", "vs_random_ci_low", "vs_random_ci_high", "p_value", "p_holm", "sidecar_seeds",
    "flops_ideal", "flops_executed", "tokens_per_second", "memory_gb",
)  # fmt: skip
PAIR_COLUMNS = (
    "mode", "control", "recipe", "share", "difference", "ci_low", "ci_high", "p_value", "p_holm", "sidecar_seeds"
)  # fmt: skip
AGAINST = ("vs_random", "vs_random_ci_low", "vs_random_ci_high")
DOMAIN_COLUMNS = (
    "mode", *MODE_COLUMNS, "variant", "domain", "documents", "tokens", "share_realised", "delta_nll", "ci_low",
    "ci_high", *AGAINST,
)  # fmt: skip
# What a gate ablation takes from the row of a gate.
ABLATION_COLUMNS = ("share_realised", "delta_nll", "ci_low", "ci_high", *AGAINST)
SUM_COLUMNS = ["mode", "sidecar_seed", "document", "domain", "tokens", "num_bytes", "nll", "mamba_share"]


def mean_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of the same documents (one per seed) -> one, with their mean NLL."""
    mean = tables[0].copy()
    mean["nll"] = as_written(np.mean([table["nll"].to_numpy() for table in tables], axis=0))
    return mean


def stacked(tables: Mapping[str, pd.DataFrame], key: str) -> pd.DataFrame:
    """Tables of sums per document, by name -> one, with the name in the column `key`, which stands first."""
    frame = pd.concat([table.assign(**{key: name}) for name, table in tables.items()], ignore_index=True)
    return frame[[key, *(column for column in frame.columns if column != key)]]


def paired(table: pd.DataFrame, other: pd.DataFrame, bootstrap: stats.Bootstrap) -> stats.Interval:
    """Paired difference of mean NLL in nats per token, `table` minus `other`.

    Raises ValueError where the two were not scored on the same documents in the same order.
    """
    if table["document"].tolist() != other["document"].tolist():
        raise ValueError("a paired difference needs the same documents in the same order")
    return bootstrap.difference(table["nll"], other["nll"], table["tokens"])


def quality(table: pd.DataFrame, baseline: pd.DataFrame, bootstrap: stats.Bootstrap) -> dict[str, float]:
    """perplexity, delta and pct_change of it, delta_nll with ci_low and ci_high (paired, documents), bits_per_byte.

    kl and top1_agreement are means per token, NaN where not measured. delta_nll is in nats per token.
    """
    tokens = table["tokens"].sum()
    perplexity = float(np.exp(table["nll"].sum() / tokens))
    base = float(np.exp(baseline["nll"].sum() / baseline["tokens"].sum()))
    if table is baseline:
        difference = stats.Interval(0.0, 0.0, 0.0)
    else:
        difference = paired(table, baseline, bootstrap)
    measured = "kl" in table and table["kl"].notna().all()
    return {
        "perplexity": perplexity,
        "delta": perplexity - base,
        "pct_change": 100.0 * (perplexity / base - 1.0),
        **difference.columns("delta_nll"),
        "bits_per_byte": float(table["nll"].sum() / np.log(2) / table["num_bytes"].sum()),
        "kl": float(table["kl"].sum() / tokens) if measured else float("nan"),
        "top1_agreement": float(table["top1"].sum() / tokens) if measured else float("nan"),
    }


# -- tables of gates
def run_table(rows: Mapping[str, Mapping], layers: str) -> pd.DataFrame:
    """The rows of the runs (`Study.rows`) on a set of layers, in the order in which they were filed."""
    return pd.DataFrame([row for row in rows.values() if row["layers"] == layers])


def document_sums(runs: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """gated_hybrid_documents.csv: SUM_COLUMNS of every mode and set of sidecars, means over the seeds of masks.

    `runs` is a `run_table`; `tables` are the sums per document of every run, by its name.
    """
    parts = []
    for (mode, seed), own in runs.groupby(["mode", "sidecar_seed"], sort=False):
        mean = mean_table([tables[name] for name in own["run"]])
        if mode == "baseline":
            mean["mamba_share"] = 0.0
        parts.append(mean.assign(mode=mode, sidecar_seed=int(seed)))
    return pd.concat(parts, ignore_index=True)[SUM_COLUMNS]


def result_table(runs: pd.DataFrame, sums: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """gated_hybrid_results.csv: one row per mode, in the order they were first measured, controls after their gates.

    p_holm corrects the p-values of all modes that are compared with a random control for being so many (Holm).
    """
    baseline, rows = _mean_sums(sums, "baseline"), []
    base = float(np.exp(baseline["nll"].sum() / baseline["tokens"].sum()))
    for mode, own in runs.groupby("mode", sort=False):
        table, first = _mean_sums(sums, mode), own.iloc[0]
        row = {"mode": mode, **{key: first[key] for key in (*MODE_COLUMNS, "variant", "control")}}
        row["share_target"] = float(own["share_target"].astype(float).mean())
        row |= {key: float(own[key].mean()) for key in MEANS} | {"memory_gb": float(own["memory_gb"].max())}
        row["sidecar_seeds"] = 0 if mode == "baseline" else own["sidecar_seed"].nunique()
        perplexity = float(np.exp(table["nll"].sum() / table["tokens"].sum()))
        row |= {"perplexity": perplexity, "delta": perplexity - base, "pct_change": 100 * (perplexity / base - 1)}
        same = stats.Interval(0.0, 0.0, 0.0)
        difference = same if mode == "baseline" else compare(sums, mode, "baseline", rule)
        row |= difference.columns("delta_nll")
        if first["control"] and seeds_of(sums, first["control"]):
            against = compare(sums, mode, first["control"], rule)
            row |= dict(zip(AGAINST, (against.estimate, against.low, against.high), strict=True))
            row["p_value"] = p_value(sums, mode, first["control"], rule)
        rows.append(row)
    return _with_holm(pd.DataFrame(rows).reindex(columns=list(RESULT_COLUMNS)))


def pair_table(sums: pd.DataFrame, results: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """gated_hybrid_pairs.csv: the leading gate of every share minus each of its controls, nats per token.

    p_holm is Holm's correction over the table's rows; sidecar_seeds counts the sets that both were measured with.
    """
    leading = results[results["kind"].isin(LEADERS) & results["hard"].astype(bool) & (results["variant"] == "")]
    rows = []
    for mode, share in zip(leading["mode"], leading["share_target"], strict=True):
        for control in results[results["matched_to"] == mode].to_dict("records"):
            name = control["mode"]
            difference = compare(sums, mode, name, rule)
            both = set(seeds_of(sums, mode)) & set(seeds_of(sums, name))
            rows.append(
                {
                    "mode": mode, "control": name, "recipe": control["recipe"], "share": share,
                    **difference.columns("difference"),
                    "p_value": p_value(sums, mode, name, rule), "sidecar_seeds": len(both),
                }
            )  # fmt: skip
    return _with_holm(pd.DataFrame(rows).reindex(columns=list(PAIR_COLUMNS)))


def domain_table(sums: pd.DataFrame, results: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """gated_hybrid_domains.csv: every mode on each domain's documents alone, with the share realised there."""
    rows = []
    for domain in sums["domain"].unique():
        part = sums[sums["domain"] == domain]
        for row in results.to_dict("records"):
            mode, own = row["mode"], part[part["mode"] == row["mode"]]
            entry = {key: row[key] for key in ("mode", *MODE_COLUMNS, "variant")} | {
                "domain": domain,
                "documents": own["document"].nunique(),
                "tokens": int(own.drop_duplicates("document")["tokens"].sum()),
                "share_realised": float(np.average(own["mamba_share"], weights=own["tokens"])),
                "delta_nll": 0.0,
            }
            for other, prefix in (("baseline", ("delta_nll", "ci_low", "ci_high")), (row["control"], AGAINST)):
                if other and mode != other and seeds_of(part, other):
                    interval = compare(part, mode, other, rule)
                    entry |= dict(zip(prefix, (interval.estimate, interval.low, interval.high), strict=True))
            rows.append(entry)
    return pd.DataFrame(rows).reindex(columns=list(DOMAIN_COLUMNS))


def gate_ablation_rows(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The gate ablations, as selections from the rows of explained_gates_results.csv.

    signal: previous, lookahead (hard gates). softness: hard, and soft_t<temperature>. threshold: layer_wise, shared
    (hard gates). An ablation takes the shares at which it has at least two variants, and is left out where it has none.
    Columns: ablation, variant, mode, share (target), and ABLATION_COLUMNS.
    """
    calibrated = results[(results["kind"] == "routing") & (results["threshold"] != "fixed")]
    hard, own = calibrated["hard"].astype(bool), calibrated["threshold"] == "own"
    leading = hard & own & (calibrated["variant"] == "")
    softness = calibrated["temperature"].map("soft_t{:g}".format)
    threshold = calibrated["threshold"].replace({"own": "layer_wise"})
    variants_of = {
        "signal": calibrated["signal"].where(leading | (calibrated["variant"] == "lookahead")),
        "softness": softness.where(~hard, "hard").where(leading | ~hard),
        "threshold": threshold.where(leading | (hard & ~own)),
    }
    found = {}
    for ablation, names in variants_of.items():
        frame = calibrated.assign(ablation=ablation, variant=names, share=calibrated["share_target"])
        frame = frame[names.notna()][["ablation", "variant", "mode", "share", *ABLATION_COLUMNS]]
        frame = frame[frame.groupby("share")["mode"].transform("size") > 1].sort_values("share", kind="stable")
        if len(frame):
            found[ablation] = frame.reset_index(drop=True)
    return found


def _with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its p_holm filled in, over all rows that have a p_value."""
    tested = frame["p_value"].notna().to_numpy()
    if tested.any():
        frame.loc[tested, "p_holm"] = stats.holm_correction(frame.loc[tested, "p_value"].astype(float))
    return frame


def _mean_sums(sums: pd.DataFrame, mode: str) -> pd.DataFrame:
    """document, tokens and NLL of a mode, mean over its sets of sidecars."""
    return sums[sums["mode"] == mode].groupby("document", sort=False)[["tokens", "nll"]].mean().reset_index()

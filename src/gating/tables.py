"""From scores to rows: sums per document, paired differences, perplexity and its company."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from src.base import stats
from src.base.results import as_written


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
        "delta_nll": difference.estimate,
        "ci_low": difference.low,
        "ci_high": difference.high,
        "bits_per_byte": float(table["nll"].sum() / np.log(2) / table["num_bytes"].sum()),
        "kl": float(table["kl"].sum() / tokens) if measured else float("nan"),
        "top1_agreement": float(table["top1"].sum() / tokens) if measured else float("nan"),
    }

"""From scores to rows: sums per document, paired differences, perplexity and its company."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.base import stats
from src.base.results import as_written
from src.eval_utils import Scores


# -- rows
def document_table(scores: Scores) -> pd.DataFrame:
    """Sums per document: document, domain, tokens, num_bytes, nll (nats), and kl (nats), top1 where measured."""
    table = pd.DataFrame(
        {
            "document": scores.ids,
            "domain": scores.domains,
            "tokens": scores.tokens,
            "num_bytes": scores.num_bytes,
            "nll": as_written(scores.nll),
        }
    )
    if scores.kl is not None:
        table["kl"], table["top1"] = as_written(scores.kl), scores.top1
    return table


def mean_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of the same documents (one per seed) -> one, with their mean NLL."""
    mean = tables[0].copy()
    mean["nll"] = as_written(np.mean([table["nll"].to_numpy() for table in tables], axis=0))
    return mean


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: resamples of documents, their seed, and the level (0.95); studentised (see stats.py)."""

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95

    def difference(self, table: pd.DataFrame, other: pd.DataFrame) -> stats.Interval:
        """Paired difference of mean NLL (nats per token), `table` minus `other`; NaN bounds below two documents."""
        if table["document"].tolist() != other["document"].tolist():
            raise ValueError("a paired difference needs the same documents in the same order")
        a, b, count = table["nll"].to_numpy(), other["nll"].to_numpy(), table["tokens"].to_numpy()
        if len(table) < 2:
            return stats.Interval(float((a.sum() - b.sum()) / count.sum()), float("nan"), float("nan"))
        return stats.paired_difference(a, b, count, self.resamples, self.seed, self.level, "studentised")


def quality(table: pd.DataFrame, baseline: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, float]:
    """perplexity, delta and pct_change of it, delta_nll with ci_low and ci_high (paired, documents), bits_per_byte.

    kl and top1_agreement are means per token, NaN where not measured. delta_nll is in nats per token.
    """
    tokens = table["tokens"].sum()
    perplexity = float(np.exp(table["nll"].sum() / tokens))
    base = float(np.exp(baseline["nll"].sum() / baseline["tokens"].sum()))
    if table is baseline:
        difference = stats.Interval(0.0, 0.0, 0.0)
    else:
        difference = bootstrap.difference(table, baseline)
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

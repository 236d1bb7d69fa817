"""What a run of the predictors says on the screen."""

import numpy as np
import pandas as pd


def percent(value) -> str:
    """A share as a percentage, "-" for none."""
    return "-" if value is None or value == "" or not np.isfinite(float(value)) else f"{100 * float(value):.1f}"


def show(files: dict[str, pd.DataFrame], curves: list[dict], num_experts: int, splits: dict) -> None:
    """Predictors, leak against honest, and what a cache would gain."""
    chance = 1 / num_experts
    frame = files["predictors.csv"]
    frame = frame[(frame["split"] == "problems") & (frame["domain"] == "all")]
    count = splits["scored"]
    unit = "test problems" if splits["unit"] == "problem" else "test runs of tokens (wide intervals)"
    print(f"\nscored on {count['journeys']:,} journeys of {count['problems']:,} {unit}, in %")
    head = "hop predictor        top-1   (95 % interval)  top-2 overlap   set   ECE  over random     train  predict"
    print(f"{head}   numbers")
    for _, row in frame.sort_values("hop", key=lambda hops: hops.astype(int), kind="stable").iterrows():
        top1 = float(row["top1"])
        interval = f"({percent(row['top1_low'])} to {percent(row['top1_high'])})"
        cells = [percent(row[name]) for name in ("top2", "slot_overlap", "whole_set", "ece")]
        print(
            f"{row['hop']:>3} {row['predictor']:15} {percent(top1):>6} {interval:>17} {cells[0]:>6} {cells[1]:>7} "
            f"{cells[2]:>5} {cells[3]:>5} {round(100 * (top1 - chance), 1) + 0.0:>+6.1f} {top1 / chance:>4.1f}x "
            f"{float(row['train_seconds']):>8.1f}s {float(row['predict_us']):>6.1f}us {int(row['parameters']):>9,}"
        )
    if splits["stale_gate_at_hop_0"]:
        exact = splits["stale_gate_at_hop_0"]
        print(f"stale gate at hop 0: {100 * exact['top1']:.4f} % of {exact['rows']:,} (100 unless something is wrong)")
    leaks = files["leakage.csv"]
    if len(leaks):
        print("\ntop-1 of the same rows, split by row (leaks) and by problem (honest), in %")
        print(f"hop predictor        by row  by problem  leakage (95 % interval), {leaks['seeds'].iloc[0]} seed(s)")
        for _, row in leaks.iterrows():
            print(
                f"{row['hop']:>3} {row['predictor']:15} {percent(row['top1_rows_split']):>6} "
                f"{percent(row['top1_problem_split']):>11} {percent(row['leakage']):>8} "
                f"({percent(row['ci_low'])} to {percent(row['ci_high'])})"
            )
    if curves:
        bandwidth = curves[0]["bandwidth_gb_s"]
        held = sorted({row["capacity"] for row in curves if row["policy"] == "lru"})
        held = held[(len(held) - 1) // 2]
        print(
            f"\nsimulated (theory only), {curves[0]['tokens']:,} tokens, {bandwidth:g} GB/s, {held} of "
            f"{num_experts} experts held per layer\n"
            "policy                      hit rate  stall ms/token  speed-up over on demand"
        )
        for row in curves:
            if row["scope"] == "per_layer" and row["bandwidth_gb_s"] == bandwidth and row["capacity"] in (0, held):
                label = row["policy"] + (f", {row['predictor']}" if row["predictor"] else "")
                print(
                    f"{label:27} {percent(row['hit_rate']):>8} {row['stall_ms_per_token']:>15.1f} "
                    f"{row['speedup']:>8.2f}x"
                )

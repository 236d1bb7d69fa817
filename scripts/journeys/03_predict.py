"""10: how well a token's next experts can be predicted, what a leaky split would have claimed, and what it would buy.

Reads the journeys (and router inputs, where `08 --save-hidden` stored them), fits every predictor on training problems,
scores it on test problems, and simulates caching and prefetching with it. Runs on the CPU. A predictor that an earlier
run finished with the same settings is not run again. Everything goes to <output-dir>/<model>/journeys/.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import config
from src.base import results
from src.journeys import cells, expert_cache, measures, networks, predictors, scoring
from src.journeys.networks import Network, Settings
from src.journeys.predictors import PREDICTORS
from src.journeys.records import read_input
from src.journeys.sample import to_sample as prepare
from src.journeys.store import read_hidden, read_journeys, shard_files, shard_run

# Flags that only imported records have.
IMPORT_FLAGS = ("limit", "strict", "num_experts")
KEYS = ["split", "hop", "domain", "layer"]
SCORES = ["top1", "top1_low", "top1_high", "top2", "slot_overlap", "whole_set", "ece"]
COSTS = ["train_seconds", "predict_us", "parameters"]
LEAKAGE = ["top1_rows_split", "top1_problem_split", "leakage", "ci_low", "ci_high"]
TUNED = "mlp_tuned.json"
# Which of networks.Settings a predictor depends on: changing others does not run it again.
TRAINING = ("train_rows", "epochs", "patience", "validation_rows")
PROBING = ("probe_epochs", "patience", "validation_rows")
DEPENDS_ON = {
    "lookup": ("validation_rows",),
    "xgboost": ("xgboost_rows", "xgboost_rounds", "patience", "validation_rows"),
    "mlp": (*TRAINING, "mlp"),
    "mlp_tuned": (*TRAINING, "mlp_tuned"),
    "linear_probe": (*PROBING, "linear_probe"),
    "mlp_probe": (*PROBING, "mlp_probe"),
}


def parse_arguments():
    parser = results.ArgumentParser("Predicting experts ahead of time, honestly, and what it buys.")
    parser.add_argument(
        "--model",
        help=f"whose journeys: names the results' folder ({config.JOURNEY_MODEL}, or the name of --input)",
    )
    parser.add_argument(
        "--input",
        type=Path,
        help="use these records instead of 08's: a JSONL file of (token, layer) rows, a folder of files "
        "p<problem>_token_<idx>.jsonl or of such folders, or a folder or file of 08's store",
    )
    parser.add_argument("--limit", type=int, help="token files read of each --input folder, in string order (all)")
    parser.add_argument("--num-experts", type=int, help="experts of the model behind --input (found in it)")
    parser.add_argument("--strict", action="store_true", help="a faulty --input record is an error, not left out")
    parser.add_argument(
        "--predictors",
        nargs="+",
        choices=PREDICTORS,
        metavar="NAME",
        help=f"which to run: {', '.join(PREDICTORS)} (all that the data allow)",
    )
    parser.add_argument("--hops", type=int, nargs="+", default=config.PREDICT_HOPS, help="layers ahead")
    parser.add_argument(
        "--split",
        choices=("problems", "rows", "both"),
        default="both",
        help="problems: honest; rows: leaky as well, for all predictors; both: leaky for --row-predictors",
    )
    parser.add_argument(
        "--row-predictors",
        nargs="+",
        choices=PREDICTORS,
        metavar="NAME",
        default=config.PREDICT_ROW_PREDICTORS,
        help="predictors that --split both runs leaky too",
    )
    parser.add_argument("--seeds", type=int, default=config.PREDICT_SEEDS, help="runs of each predictor, averaged")
    parser.add_argument(
        "--tune",
        type=int,
        nargs="?",
        const=config.PREDICT_TUNE_TRIALS,
        metavar="NETWORKS",
        help=f"search the setting of mlp_tuned first (of {config.PREDICT_TUNE_TRIALS} networks)",
    )
    parser.add_argument("--train-rows", type=int, help="cells in an epoch of a network (default: the config's)")
    parser.add_argument("--epochs", type=int, help="epochs of a network at most (default: the config's)")
    parser.add_argument(
        "--validation-rows", type=int, default=config.PREDICT_VALIDATION_ROWS, help="cells that choices are made on"
    )
    parser.add_argument(
        "--xgboost-rows",
        type=int,
        help="cells that XGBoost trains on (default: the config's cells x experts, over experts)",
    )
    parser.add_argument("--xgboost-rounds", type=int, help="rounds at most (default: the config's)")
    parser.add_argument("--resamples", type=int, default=config.JOURNEY_RESAMPLES, help="draws behind intervals")
    parser.add_argument("--cache-tokens", type=int, help="tokens simulated, 0 for no simulation (the config's)")
    parser.add_argument(
        "--cache-capacities", type=int, nargs="+", help="experts held per layer (default: eighths of all)"
    )
    parser.add_argument(
        "--bandwidths",
        type=float,
        nargs="+",
        default=config.CACHE_BANDWIDTHS_GB_S,
        help="of the link to host memory, GB/s; tables show the first",
    )
    parser.add_argument(
        "--cache-model",
        choices=("mixtral-8x7b", "own"),
        default="mixtral-8x7b",
        help="whose shapes, in 4 bits on an RTX 3060, give --expert-mb and --compute-ms: own is 08's model",
    )
    parser.add_argument("--expert-mb", type=float, help="size of an expert, 1e6 bytes (default: --cache-model's)")
    parser.add_argument("--compute-ms", type=float, help="of a layer for one token (default: --cache-model's)")
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="the quick run's, less training")
    parser.add_argument(
        "--seed", type=int, default=config.SEED, help="split, training (the first of --seeds), bootstrap"
    )
    parser.add_argument("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    arguments = parser.parse_args()
    check(arguments)
    return fill_in(arguments)


def check(arguments) -> None:
    """UserError for values out of range and flags that do not go together."""
    least = {"limit": 1, "num_experts": 1, "seeds": 1, "tune": 1, "train_rows": 2, "epochs": 1, "validation_rows": 1,
             "xgboost_rows": 1, "xgboost_rounds": 1, "resamples": 1, "cache_tokens": 0, "seed": 0, "hops": 1,
             "cache_capacities": 0}  # fmt: skip
    for name, bound in least.items():
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < bound:
                raise results.UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")
    for name in ("bandwidths", "expert_mb", "compute_ms"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 0 < value < float("inf"):
                raise results.UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    given = next((name for name in IMPORT_FLAGS if getattr(arguments, name)), None)
    if arguments.input is None and given:
        raise results.UserError(f"--{given.replace('_', '-')} is for records given with --input")


def fill_in(arguments):
    """Defaults that depend on other flags."""
    quick = arguments.quick
    if arguments.model is None:
        # journeys of some other model must not be filed under the default one
        arguments.model = arguments.input.resolve().stem if arguments.input else config.JOURNEY_MODEL
    for name, value in (
        ("train_rows", config.QUICK_PREDICT_TRAIN_ROWS if quick else config.PREDICT_TRAIN_ROWS),
        ("epochs", config.QUICK_PREDICT_EPOCHS if quick else config.PREDICT_EPOCHS),
        ("xgboost_rounds", config.QUICK_PREDICT_XGBOOST_ROUNDS if quick else config.PREDICT_XGBOOST_ROUNDS),
        ("cache_tokens", config.QUICK_CACHE_TOKENS if quick else config.CACHE_TOKENS),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.hops = sorted(set(arguments.hops))
    return arguments


def cache_costs(arguments, source: Path) -> None:
    """Fill in --expert-mb and --compute-ms where they were not given; UserError where the store does not tell them."""
    bits = config.CACHE_BITS_PER_WEIGHT
    expert = expert_cache.expert_bytes(*config.CACHE_EXPERT_WIDTHS, bits) / 1e6
    layer = config.CACHE_LAYER_WEIGHTS
    if arguments.cache_model == "own":
        shards = shard_files(source) if source.is_dir() else []
        found = shard_run(shards[0]) if shards else {}
        if not found.get("expert_weights") or not found.get("layer_weights"):
            raise results.UserError(
                f"{source} does not say how large its model's experts are; collect it again with "
                "scripts/journeys/01_collect.py, or give --expert-mb and --compute-ms"
            )
        expert, layer = found["expert_weights"] * bits / 8 / 1e6, found["layer_weights"]
    arguments.expert_mb = arguments.expert_mb or expert
    arguments.compute_ms = arguments.compute_ms or expert_cache.memory_bound_ms(layer, bits, config.CACHE_MEMORY_GB_S)


# -- journeys
def read_data(arguments, folder: Path) -> tuple[cells.Data, dict]:
    """(what predictors see, the identity of the journeys and router inputs)."""
    source, report = arguments.input or folder, None
    if arguments.input is not None:
        journeys, report = read_input(source, arguments.limit, arguments.strict, arguments.num_experts, arguments.model)
    elif shard_files(folder):
        journeys = read_journeys(folder)
    else:
        raise results.UserError(
            f"no journeys in {source}; run python scripts/journeys/01_collect.py --model {arguments.model}"
            f"{' --quick' if arguments.quick else ''} first, or give --input"
        )
    if report is not None:
        print(*report.lines(), sep="\n", file=sys.stderr)
    cache_costs(arguments, source)
    hidden = read_hidden(source) if report is None and source.is_dir() else None
    longest = arguments.hops[-1]
    if longest >= len(journeys.layers):
        raise results.UserError(
            f"--hops {longest} needs more than {longest} layers; the journeys have {len(journeys.layers)}"
        )
    eighths = {max(1, round(journeys.num_experts * part / 8)) for part in range(1, 9)}
    arguments.cache_capacities = sorted(set(arguments.cache_capacities or eighths))
    if arguments.cache_capacities[-1] > journeys.num_experts:
        raise results.UserError(
            f"--cache-capacities {arguments.cache_capacities[-1]} is more than the {journeys.num_experts} experts"
        )
    data = cells.prepare(prepare(journeys, config.JOURNEY_DATASETS), hidden)
    print(
        f"{len(data.problem):,} journeys of {journeys.model or arguments.model}: {len(data.layers)} layers, "
        f"{data.experts.shape[2]} of {data.num_experts} experts, router inputs of {int((data.hidden_row >= 0).sum()):,}"
    )
    if data.in_blocks:
        print(
            f"note: fewer than {cells.MIN_PROBLEMS} problems: {cells.BLOCKS} runs of consecutive tokens of "
            "each stand in for problems; training and test share problems, and the intervals, over few runs, are wide",
            file=sys.stderr,
        )
    digest = hashlib.sha256()
    for values, kind in ((data.problem, "<i4"), (data.position, "<i4"), (data.experts, "<i2"), (data.gates, "<f4"),
                         (data.hidden_row, "<i4")):  # fmt: skip
        digest.update(np.ascontiguousarray(values, dtype=kind))
    if data.hidden is not None:
        digest.update(np.ascontiguousarray(data.hidden.weight))
        for states in data.hidden.states:
            digest.update(np.ascontiguousarray(states[:1]))
            digest.update(str((states.dtype, states.shape)).encode())
    return data, {"source": source, "journeys": len(data.problem), "sha256": digest.hexdigest()}


def chosen(arguments, data: cells.Data) -> list[str]:
    """The predictors to run, in the order of PREDICTORS; those that need router inputs only where there are any."""
    wanted = [name for name in PREDICTORS if name in (arguments.predictors or PREDICTORS)]
    if data.hidden is None:
        left_out = [name for name in wanted if name in predictors.HIDDEN_PREDICTORS]
        if left_out:
            advice = (
                f"no router inputs of {cells.MIN_PROBLEMS} problems or more: {', '.join(left_out)} left out; "
                f"python scripts/journeys/01_collect.py --model {arguments.model} --save-hidden 60 --restart"
            )
            if len(left_out) == len(wanted):
                raise results.UserError(advice)
            print(f"note: {advice}", file=sys.stderr)
        wanted = [name for name in wanted if name not in left_out]
    return wanted


# -- settings
def network(setting: dict) -> Network:
    """A setting as config.py and TUNED have it."""
    return Network(**{**setting, "widths": tuple(setting["widths"])})


def read_tuned(path: Path) -> Network:
    """The setting that --tune found. Raises UserError for a file that does not hold one."""
    try:
        return network(json.loads(path.read_text(encoding="utf-8"))["setting"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise results.UserError(f"{path} holds no setting of mlp_tuned ({error}); delete it or run --tune") from error


def make_settings(arguments, num_experts: int, folder: Path) -> Settings:
    """Budgets and networks; mlp_tuned as --tune left it in `folder`, else as config.py has it."""
    values = config.QUICK_PREDICT_XGBOOST_VALUES if arguments.quick else config.PREDICT_XGBOOST_VALUES
    tuned = folder / TUNED
    return Settings(
        mlp=network(config.PREDICT_MLP),
        mlp_tuned=read_tuned(tuned) if tuned.exists() and not arguments.tune else network(config.PREDICT_MLP_TUNED),
        linear_probe=network(config.PREDICT_LINEAR_PROBE),
        mlp_probe=network(config.PREDICT_MLP_PROBE),
        train_rows=arguments.train_rows,
        epochs=arguments.epochs,
        probe_epochs=min(config.PREDICT_PROBE_EPOCHS, arguments.epochs)
        if arguments.quick
        else config.PREDICT_PROBE_EPOCHS,
        patience=config.PREDICT_PATIENCE,
        validation_rows=arguments.validation_rows,
        xgboost_rows=arguments.xgboost_rows or max(1, values // num_experts),
        xgboost_rounds=arguments.xgboost_rounds,
    )


# -- running predictors
def meta_of(name: str, arguments, settings: Settings, identity: dict, started: float) -> dict:
    """Provenance of one predictor's file: what its rows depend on, so that other changes do not run it again."""
    everything = asdict(settings)
    return results.run_meta(
        {"model": arguments.model, "level": config.CONFIDENCE_LEVEL, "resamples": arguments.resamples}
        | {field: everything[field] for field in DEPENDS_ON.get(name, ())},
        {"name": arguments.model},
        identity,
        {"split": arguments.seed, "bootstrap": arguments.seed,
         "training": list(range(arguments.seed, arguments.seed + arguments.seeds))},
        started, "cpu", "float32",
    )  # fmt: skip


def trace_file(folder: Path, name: str, hop: int) -> Path:
    """Where the experts that a predictor expects for the test journeys are kept."""
    return folder / "predictors" / f"{name}-hop{hop}.npz"


def finished(folder: Path, name: str, meta: dict) -> list[dict]:
    """Rows of a predictor that an earlier run wrote with the same settings, hops without their traces left out."""
    frame = results.finished_rows(folder / "predictors" / f"{name}.csv", KEYS, meta)
    rows = [] if frame is None else frame.to_dict("records")
    lost = set()
    for row in rows:
        if isinstance(row["trace_sha256"], str):
            file = trace_file(folder, name, row["hop"])
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != row["trace_sha256"]:
                lost.add(row["hop"])
    return [row for row in rows if row["hop"] not in lost]


def run_predictor(
    name: str, hop: int, with_rows: bool, arguments, data, parts, settings, meta: dict, folder: Path
) -> list[dict]:
    """Fit and score one predictor at one hop; writes its trace, returns its rows."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    done = scoring.study(name, data, parts, hop, settings, seeds, with_rows)
    trace = results.write_npz(trace_file(folder, name, hop), {"predicted": done.predicted}, meta)
    rows = []
    for split, measured in done.by_split.items():
        costs = (measured.train_seconds, measured.predict_us, round(measured.parameters))
        for row in scoring.score_rows(
            data, measured.totals, hop, arguments.resamples, arguments.seed, config.CONFIDENCE_LEVEL
        ):
            rows.append({"split": split, "hop": hop, **row, **dict(zip(COSTS, costs, strict=True))})
    overall = {row["split"]: row for row in rows if row["domain"] == row["layer"] == "all"}
    overall["problems"]["trace_sha256"] = hashlib.sha256(trace.read_bytes()).hexdigest()
    if done.paired is not None:
        leak = scoring.leakage(done.paired, arguments.resamples, arguments.seed, config.CONFIDENCE_LEVEL)
        overall["rows"] |= {"paired_rows": leak.pop("rows"), **leak}
    return rows


def order_of(row: dict) -> tuple:
    """Rows by split, hop, domain and layer, "all" first; the domains of one file are in their own order already."""
    return row["split"] != "problems", int(row["hop"])


def run_all(
    arguments, names: list[str], data, parts, settings, metas: dict[str, dict], folder: Path
) -> dict[str, list]:
    """Rows of every predictor: finished ones from their files, the others run now and added to their files."""
    tables = {name: finished(folder, name, meta) for name, meta in metas.items()}
    leaky = arguments.row_predictors if arguments.split == "both" else names if arguments.split == "rows" else []
    units = []
    for hop in arguments.hops:
        for name in names:
            there = {row["split"] for row in tables[name] if int(row["hop"]) == hop}
            wanted = {"problems", "rows"} if name in leaky else {"problems"}
            if not wanted <= there:
                units.append((name, hop, name in leaky))
    skipped = len(names) * len(arguments.hops) - len(units)
    if skipped:
        print(f"{skipped} of {skipped + len(units)} runs were finished earlier and are not run again")
    with tqdm(units, unit="run", disable=not units) as bar:
        for name, hop, with_rows in bar:
            bar.set_description(f"{name}, hop {hop}")
            rows = run_predictor(name, hop, with_rows, arguments, data, parts, settings, metas[name], folder)
            replaced = {row["split"] for row in rows}
            kept = [row for row in tables[name] if int(row["hop"]) != hop or row["split"] not in replaced]
            tables[name] = sorted(kept + rows, key=order_of)
            columns = [*KEYS, "rows", *SCORES, *COSTS, "paired_rows", *LEAKAGE, "trace_sha256"]
            frame = pd.DataFrame(tables[name], columns=columns, dtype=object)
            results.write_csv(folder / "predictors" / f"{name}.csv", frame, metas[name])
    return {name: rows for name, rows in tables.items() if rows}


# -- results
def result_tables(tables: dict[str, list], seeds: int) -> dict[str, pd.DataFrame]:
    """predictors.csv, predictors_per_layer.csv and leakage.csv from the rows of each predictor."""
    rows = [{"predictor": name, **row} for name, found in tables.items() for row in found]
    frame = pd.DataFrame(rows, dtype=object)
    frame = frame.reindex(columns=["predictor", *KEYS, "rows", *SCORES, *COSTS, "paired_rows", *LEAKAGE])
    whole = frame["layer"].astype(str) == "all"
    leaks = frame[frame["paired_rows"].notna()].assign(seeds=seeds)
    leaks = leaks[["predictor", "hop", "seeds", "paired_rows", *LEAKAGE]].rename(columns={"paired_rows": "rows"})
    return {
        "predictors.csv": frame.loc[whole, ["predictor", "split", "hop", "domain", *SCORES, *COSTS]],
        "predictors_per_layer.csv": frame.loc[
            ~whole, ["predictor", "split", "hop", "domain", "layer", "rows", *SCORES]
        ],
        "leakage.csv": leaks,
    }


def splits_summary(data: cells.Data, parts: np.ndarray, arguments) -> dict:
    """What splits.json says."""
    problems = {part: [] for part in cells.PARTS}
    for name, part in zip(data.problem_names, parts.tolist(), strict=True):
        problems[cells.PARTS[part]].append(name)
    journeys = np.bincount(parts[data.problem], minlength=3).tolist()
    scored = scoring.scored_journeys(data, parts)
    hidden = np.bincount(parts[data.problem[data.hidden_row >= 0]], minlength=3).tolist()
    unit = f"one of {cells.BLOCKS} runs of consecutive tokens of a problem" if data.in_blocks else "problem"
    return {
        "unit": unit,
        "seed": arguments.seed,
        "problems": {part: len(names) for part, names in problems.items()},
        "journeys": dict(zip(cells.PARTS, journeys, strict=True)),
        "journeys_with_router_inputs": dict(zip(cells.PARTS, hidden, strict=True)),
        "scored": {
            "journeys": len(scored),
            "problems": len(np.unique(data.problem[scored])),
            "which": "journeys of test problems" + (" that have router inputs" if data.hidden is not None else "")
            + "; every predictor is scored on the same ones",
        },
        "stale_gate_at_hop_0": scoring.stale_gate_check(data) if data.hidden is not None else None,
        "names": problems,
    }  # fmt: skip


def simulate(arguments, tables: dict[str, list], data: cells.Data, parts: np.ndarray, folder: Path) -> list[dict]:
    """Rows of cache_curves.csv: the trace of test problems, prefetching with each predictor at the smallest hop."""
    rows = scoring.scored_journeys(data, parts)
    training = data.experts[parts[data.problem] == cells.PARTS.index("train")]
    frequencies = measures.expert_counts(training, data.num_experts).sum(axis=1)
    hop, predictions = arguments.hops[0], {}
    for name, found in tables.items():
        if any(int(row["hop"]) == hop for row in found):
            with np.load(trace_file(folder, name, hop)) as archive:
                predictions[name] = archive["predicted"]
    return expert_cache.cache_curves(
        data.experts[rows], data.num_experts, arguments.cache_capacities, arguments.bandwidths,
        arguments.expert_mb * 1e6, arguments.compute_ms, frequencies, predictions, hop,
        max_tokens=arguments.cache_tokens,
    )  # fmt: skip


def percent(value) -> str:
    """A share as a percentage, "-" for none."""
    return "-" if value is None or value == "" or not np.isfinite(float(value)) else f"{100 * float(value):.1f}"


def show(files: dict[str, pd.DataFrame], curves: list[dict], arguments, data: cells.Data, splits: dict) -> None:
    """Predictors, leak against honest, and what a cache would gain."""
    chance = 1 / data.num_experts
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
        print(f"hop predictor        by row  by problem  leakage (95 % interval), {arguments.seeds} seed(s)")
        for _, row in leaks.iterrows():
            print(
                f"{row['hop']:>3} {row['predictor']:15} {percent(row['top1_rows_split']):>6} "
                f"{percent(row['top1_problem_split']):>11} {percent(row['leakage']):>8} "
                f"({percent(row['ci_low'])} to {percent(row['ci_high'])})"
            )
    if curves:
        bandwidth = arguments.bandwidths[0]
        held = sorted({row["capacity"] for row in curves if row["policy"] == "lru"})
        held = held[(len(held) - 1) // 2]
        print(
            f"\nsimulated (theory only), {curves[0]['tokens']:,} tokens, {bandwidth:g} GB/s, {held} of "
            f"{data.num_experts} experts held per layer\n"
            "policy                      hit rate  stall ms/token  speed-up over on demand"
        )
        for row in curves:
            if row["scope"] == "per_layer" and row["bandwidth_gb_s"] == bandwidth and row["capacity"] in (0, held):
                label = row["policy"] + (f", {row['predictor']}" if row["predictor"] else "")
                print(
                    f"{label:27} {percent(row['hit_rate']):>8} {row['stall_ms_per_token']:>15.1f} "
                    f"{row['speedup']:>8.2f}x"
                )


def main() -> None:
    started = time.time()
    arguments = parse_arguments()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.JOURNEYS_DIR.name
    data, identity = read_data(arguments, folder)
    names = chosen(arguments, data)
    settings = make_settings(arguments, data.num_experts, folder)
    parts = cells.problem_parts(data, arguments.seed)
    meta = results.run_meta(
        vars(arguments) | {"settings": settings}, {"name": arguments.model}, identity,
        {"split": arguments.seed, "training": list(range(arguments.seed, arguments.seed + arguments.seeds))},
        started, "cpu", "float32",
    )  # fmt: skip
    written = []
    if arguments.tune:
        split = cells.split_by_problem(data, parts, arguments.hops[0])
        best, tried = networks.tune(data, split.train, split.validation, settings, arguments.tune, arguments.seed)
        written.append(results.write_json(folder / TUNED, {"setting": asdict(best), "hop": arguments.hops[0],
                                                           "networks": tried}, meta))  # fmt: skip
        settings = replace(settings, mlp_tuned=best)
    metas = {
        name: meta_of(name, arguments, settings, identity, started)
        for name in PREDICTORS
        if name in names or data.hidden is not None or name not in predictors.HIDDEN_PREDICTORS
    }
    tables = run_all(arguments, names, data, parts, settings, metas, folder)
    files = result_tables(tables, arguments.seeds)
    splits = splits_summary(data, parts, arguments)
    written += [results.write_csv(folder / name, frame, meta) for name, frame in files.items()]
    written.append(results.write_json(folder / "splits.json", splits, meta))
    curves = simulate(arguments, tables, data, parts, folder) if arguments.cache_tokens else []
    if curves:
        written.append(results.write_csv(folder / "cache_curves.csv", curves, meta))
    show(files, curves, arguments, data, splits)
    print(f"\n{time.time() - started:.0f} s\nwritten:", *(f"  {path}" for path in written), sep="\n")
    print("next: jupyter lab notebooks/moe_routing_analysis.ipynb")


if __name__ == "__main__":
    results.run_main(main)

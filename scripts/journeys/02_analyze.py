"""09: what a model's token journeys say: use of experts, dependence of layers, paths, domains, tokens, positions.

Reads the journeys that 08 collected, or with --input records in another format, and writes one CSV, JSON or NPZ file
per analysis under <output-dir>/<model>/journeys/ (findings.json holds the small findings).
"""

import hashlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

import config
from src.base import results
from src.journeys import tables
from src.journeys.records import read_input
from src.journeys.sample import to_sample
from src.journeys.store import Journeys, read_journeys, shard_files

# What --quick draws at most.
QUICK_DRAWS = 200
# Flags that only imported records have.
IMPORT_FLAGS = ("limit", "strict", "num_experts")


def parse_arguments():
    parser = results.ArgumentParser("What a model's token journeys say.")
    parser.add_argument(
        "--model",
        help=f"whose journeys: names the results' folder ({config.JOURNEY_MODEL}, or the name of --input)",
    )
    parser.add_argument(
        "--input",
        type=Path,
        help="analyse these records instead of 08's: a JSONL file of (token, layer) rows, a folder of files "
        "p<problem>_token_<idx>.jsonl or of such folders, or a folder or file of 08's store",
    )
    parser.add_argument("--limit", type=int, help="token files read of each --input folder, in string order (all)")
    parser.add_argument("--num-experts", type=int, help="experts of the model behind --input (found in it)")
    parser.add_argument("--strict", action="store_true", help="a faulty --input record is an error, not left out")
    parser.add_argument("--folds", type=int, default=config.JOURNEY_FOLDS, help="parts of the problems, out-of-sample")
    parser.add_argument("--permutations", type=int, default=config.JOURNEY_PERMUTATIONS, help="draws behind p-values")
    parser.add_argument("--resamples", type=int, default=config.JOURNEY_RESAMPLES, help="draws behind intervals")
    parser.add_argument("--top", type=int, default=10, help="most common paths listed of each length")
    parser.add_argument("--top-tokens", type=int, default=200, help="most frequent tokens listed")
    for name, default, meaning in (
        ("--high-confidence", config.JOURNEY_HIGH_CONFIDENCE, "gate probability above which a decision is confident"),
        ("--dominant-percent", config.JOURNEY_DOMINANT_PERCENT, "usage above which an expert of a layer is listed"),
        ("--strong-percent", config.JOURNEY_STRONG_PERCENT, "probability above which a transition is listed"),
        ("--low-accuracy-percent", config.JOURNEY_LOW_ACCURACY_PERCENT, "accuracy under which a hop counts as lost"),
        ("--domain-percent", config.JOURNEY_DOMAIN_PERCENT, "difference above which an expert prefers a domain"),
    ):
        parser.add_argument(name, type=float, default=default, help=meaning)
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="the quick run's, fewer draws")
    parser.add_argument("--seed", type=int, default=config.SEED, help="folds, permutations and bootstrap")
    parser.add_argument("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    arguments = parser.parse_args()
    if arguments.model is None:
        # records of some other model must not be filed under the default one
        arguments.model = arguments.input.resolve().stem if arguments.input else config.JOURNEY_MODEL
    limits = dict.fromkeys(("limit", "num_experts", "permutations", "resamples", "top", "top_tokens"), 1)
    for name, least in (limits | {"folds": 2, "seed": 0}).items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise results.UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    given = next((name for name in IMPORT_FLAGS if getattr(arguments, name)), None)
    if arguments.input is None and given:
        raise results.UserError(f"--{given.replace('_', '-')} is for records given with --input")
    return arguments


def read_records(arguments) -> Journeys:
    """The journeys of --input, whatever its format; what an import left out is said on stderr."""
    journeys, report = read_input(
        arguments.input, arguments.limit, arguments.strict, arguments.num_experts, arguments.model
    )
    if report is not None:
        print(*report.lines(), sep="\n", file=sys.stderr)
        if arguments.input.is_dir():
            journeys = journeys.select(file_order(journeys))
    return journeys


def file_order(journeys: Journeys) -> list[int]:
    """Rows in the order in which the reference reads token files: by data set, then by file name as text.

    It decides which of equally common paths comes first, and which journeys are the examples.
    """
    sets = config.JOURNEY_DATASETS
    names = journeys.dataset.tolist()
    place = {name: (sets.index(name) if name in sets else len(sets), name) for name in set(names)}
    files = zip(journeys.problem_id.tolist(), journeys.token_idx.tolist(), strict=True)
    keys = [
        (place[name], f"p{problem}_token_{token}.jsonl") for name, (problem, token) in zip(names, files, strict=True)
    ]
    return sorted(range(len(keys)), key=keys.__getitem__)


def identity(journeys: Journeys, source: Path) -> dict:
    """Which journeys these are: where they lay, how many, and a hash over their routing (whatever the file format)."""
    digest = hashlib.sha256()
    for start in range(0, len(journeys.experts), 1_000_000):
        rows = slice(start, start + 1_000_000)
        for values, kind in (
            (journeys.problem_id, "<i4"), (journeys.token_idx, "<i4"), (journeys.experts, "<i2"),
            (journeys.gating_probs, "<f2"),
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(values[rows], dtype=kind))
    return {"source": source, "journeys": len(journeys.experts), "sha256": digest.hexdigest()}


def write(path: Path, content: dict, meta: dict) -> Path:
    """One analysis in the format that its name says."""
    if path.suffix == ".csv":
        return results.write_csv(path, pd.DataFrame(content), meta)
    if path.suffix == ".npz":
        return results.write_npz(path, content, meta)
    return results.write_json(path, content, meta)


def show(files: dict[str, dict]) -> None:
    """The main findings in a few lines."""
    found, hops, domains = files["findings.json"], files["hop_accuracy.csv"], files["domain_distance.csv"]

    def value(number, digits=3) -> str:
        return (
            "-" if number is None or number == "" or not np.isfinite(float(number)) else f"{float(number):.{digits}f}"
        )

    print(f"\n{'domain':16} {'problems':>8} {'tokens':>9} {'confidence':>10} {'unique experts':>14}")
    summary = files["domain_summary.csv"]
    for row in zip(*(summary[name] for name in list(summary)[:5]), strict=True):
        print(f"{row[0]:16} {row[1]:8} {row[2]:9,} {value(row[3]):>10} {value(row[4], 1):>14}")
    near, far = found["affinity"]["adjacent"], found["affinity"]["non_adjacent"]
    print(f"\naffinity of adjacent layers {value(near)}, of others {value(far)}")
    print(f"{'layers ahead':>12} {'in-sample':>10} {'held out':>9} {'majority':>9} {'random':>7}  (% right)")
    for index in sorted({0, 1, 3, 7, 15, len(hops["hop"]) - 1} & set(range(len(hops["hop"])))):
        cells = [hops[name][index] for name in ("accuracy", "held_out_accuracy", "held_out_majority", "random")]
        print(f"{hops['hop'][index]:12} {value(cells[0], 1):>10} " + " ".join(f"{value(c, 1):>8}" for c in cells[1:]))
    paths = found["paths"]
    print(f"{paths['unique']:,} different paths, {100 * paths['uniqueness_ratio']:.1f} % of the journeys")
    if domains["layer"]:
        differ = sum(p < 0.05 for p in domains["p_any_layer"])
        print(f"experts differ between domains in {differ} of {len(domains['layer'])} layers (p < 0.05, all layers)")


def main() -> None:
    started = time.time()
    arguments = parse_arguments()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.JOURNEYS_DIR.name
    if arguments.input is not None:
        journeys = read_records(arguments)
    elif not shard_files(folder):
        raise results.UserError(
            f"no journeys in {folder}; run python scripts/journeys/01_collect.py --model {arguments.model}"
            f"{' --quick' if arguments.quick else ''} first, or give --input"
        )
    else:
        journeys = read_journeys(folder)
    print(
        f"{len(journeys.experts):,} journeys of {journeys.model or arguments.model}: {len(journeys.layers)} layers, "
        f"{journeys.experts.shape[2]} of {journeys.num_experts} experts"
    )
    most = QUICK_DRAWS if arguments.quick else sys.maxsize
    settings = tables.Settings(
        folds=arguments.folds,
        permutations=min(arguments.permutations, most),
        resamples=min(arguments.resamples, most),
        level=config.CONFIDENCE_LEVEL,
        seed=arguments.seed,
        high_confidence=arguments.high_confidence,
        dominant_percent=arguments.dominant_percent,
        strong_percent=arguments.strong_percent,
        low_accuracy_percent=arguments.low_accuracy_percent,
        domain_percent=arguments.domain_percent,
        top=arguments.top,
        top_tokens=arguments.top_tokens,
    )
    sample = to_sample(journeys, config.JOURNEY_DATASETS)
    if not sample.clusters.any():
        print("note: one problem only: no out-of-sample accuracy and no interval", file=sys.stderr)
    meta = results.run_meta(
        vars(arguments) | {"permutations": settings.permutations, "resamples": settings.resamples},
        {"name": journeys.model, "num_layers": len(journeys.layers), "num_experts": int(journeys.num_experts)},
        identity(journeys, arguments.input or folder),
        {"folds": arguments.seed, "permutations": arguments.seed, "bootstrap": arguments.seed},
        started,
        "cpu",
        "float64",
    )
    clock = time.perf_counter()
    files = tables.analyze(sample, settings, progress=len(journeys.experts) > 500_000)
    seconds = time.perf_counter() - clock
    written = [write(folder / name, content, meta) for name, content in files.items()]
    show(files)
    print(f"\n{len(files)} analyses in {seconds:.1f} s\nwritten:", *(f"  {path}" for path in written), sep="\n")
    print("next: jupyter lab notebooks/moe_routing_analysis.ipynb")


if __name__ == "__main__":
    results.run_main(main)

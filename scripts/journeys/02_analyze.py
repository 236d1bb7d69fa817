"""journeys 02: what token journeys say: use of experts, dependence of layers, paths, domains, tokens, positions.

Reads the journeys that 01 collected, or with --input records in another format, and writes one CSV, JSON or NPZ file
for each analysis under <output-dir>/<model>/journeys/ (findings.json holds the small findings)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import config
from src.base import cli
from src.journeys.flags import RECORD_FLAGS, SETTINGS, check_input

RULES = (
    "folds", "permutations", "resamples", "top", "top_tokens", "high_confidence", "dominant_percent", "strong_percent",
    "low_accuracy_percent", "domain_percent",
)  # fmt: skip
FLAGS = ("model", *cli.RUN_FLAGS, "input", *RECORD_FLAGS, *RULES, "confidence_level")


def parse(argv: list[str] | None = None):
    """The command line, with the name of the records of --input as that of their model."""
    arguments = cli.parse(__doc__, config, FLAGS, argv, SETTINGS)
    check_input(arguments)
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before pandas is loaded, so that wrong values are answered at once

import time

import numpy as np
import pandas as pd

from src.base import results
from src.journeys import tables
from src.journeys.records import identity, in_file_order, open_journeys
from src.journeys.sample import to_sample


def write(path: Path, content: dict, meta: dict) -> Path:
    """One analysis in the format that its name says."""
    if path.suffix == ".csv":
        return results.write_csv(path, pd.DataFrame(content), meta)
    if path.suffix == ".npz":
        return results.write_npz(path, content, meta)
    return results.write_json(path, content, meta)


def text(number, digits: int = 3) -> str:
    """A number with so many digits, "-" for none."""
    return "-" if number is None or number == "" or not np.isfinite(float(number)) else f"{float(number):.{digits}f}"


def show(files: dict[str, dict]) -> None:
    """The main findings in a few lines."""
    found, hops, domains = files["findings.json"], files["hop_accuracy.csv"], files["domain_distance.csv"]
    print(f"\n{'domain':16} {'problems':>8} {'tokens':>9} {'confidence':>10} {'unique experts':>14}")
    summary = files["domain_summary.csv"]
    for row in zip(*(summary[name] for name in list(summary)[:5]), strict=True):
        print(f"{row[0]:16} {row[1]:8} {row[2]:9,} {text(row[3]):>10} {text(row[4], 1):>14}")
    near, far = found["affinity"]["adjacent"], found["affinity"]["non_adjacent"]
    print(f"\naffinity of adjacent layers {text(near)}, of others {text(far)}")
    print(f"{'layers ahead':>12} {'in-sample':>10} {'held out':>9} {'majority':>9} {'random':>7}  (% right)")
    for index in sorted({0, 1, 3, 7, 15, len(hops["hop"]) - 1} & set(range(len(hops["hop"])))):
        cells = [hops[name][index] for name in ("accuracy", "held_out_accuracy", "held_out_majority", "random")]
        print(f"{hops['hop'][index]:12} {text(cells[0], 1):>10} " + " ".join(f"{text(c, 1):>8}" for c in cells[1:]))
    paths = found["paths"]
    print(f"{paths['unique']:,} different paths, {100 * paths['uniqueness_ratio']:.1f} % of the journeys")
    if domains["layer"]:
        differ = sum(p < 0.05 for p in domains["p_any_layer"])
        print(f"experts differ between domains in {differ} of {len(domains['layer'])} layers (p < 0.05, all layers)")


def main(arguments) -> None:
    """Read, analyse, write and show."""
    started, seed = time.time(), arguments.seed
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.JOURNEYS_DIR.name
    journeys, imported = open_journeys(
        arguments.input, folder, arguments.limit, arguments.strict, arguments.num_experts, arguments.model
    )
    if imported and arguments.input.is_dir():
        journeys = in_file_order(journeys, config.JOURNEY_DATASETS)
    print(
        f"{len(journeys.experts):,} journeys of {journeys.model or arguments.model}: {len(journeys.layers)} layers, "
        f"{journeys.experts.shape[2]} of {journeys.num_experts} experts"
    )
    rules = {name: getattr(arguments, name) for name in RULES}
    settings = tables.Settings(**rules, level=arguments.confidence_level, seed=seed)
    sample = to_sample(journeys, config.JOURNEY_DATASETS)
    if not sample.clusters.any():
        print("note: one problem only: no out-of-sample accuracy and no interval", file=sys.stderr)
    meta = results.run_meta(
        cli.recorded(arguments),
        {"name": journeys.model, "num_layers": len(journeys.layers), "num_experts": int(journeys.num_experts)},
        identity(journeys, arguments.input or folder), {"folds": seed, "permutations": seed, "bootstrap": seed},
        started, "cpu", "float64",
    )  # fmt: skip
    clock = time.perf_counter()
    files = tables.analyze(sample, settings)
    seconds = time.perf_counter() - clock
    written = [write(folder / name, content, meta) for name, content in files.items()]
    show(files)
    print(f"\n{len(files)} analyses in {seconds:.1f} s")
    cli.say_written(written, "jupyter lab notebooks/moe_routing_analysis.ipynb")


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

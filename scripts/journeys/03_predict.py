"""journeys 03: how well a token's next experts can be predicted, what a leaky split would claim, what it would buy.

Reads the journeys (and router inputs, where 01's --hidden-problems stored them), fits every predictor on training
problems, scores it on test problems, and simulates caching and prefetching with it. Runs on the CPU. What an earlier
run measured with the same journeys and settings is taken from it. Results go to <output-dir>/<model>/journeys/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import config
from src.base import cli
from src.journeys import flags

BUDGETS = ("train_rows", "epochs", "validation_rows", "xgboost_values", "xgboost_rounds")
CACHE = ("cache_capacities", "bandwidths", "cache_model", "expert_mb", "compute_ms")
FLAGS = (
    "model", *cli.RUN_FLAGS, "restart", "input", *flags.RECORD_FLAGS, "predictors", "hops", "split", "row_predictors",
    "predictor_seeds", "tune", *BUDGETS, "resamples", "confidence_level", "cache_tokens", *CACHE,
)  # fmt: skip


def parse(argv: list[str] | None = None):
    """The command line, with the name of the records of --input as that of their model."""
    arguments = cli.parse(__doc__, config, FLAGS, argv, flags.SETTINGS)
    flags.check_input(arguments)
    if arguments.split != "both":
        cli.refuse(arguments, ("row_predictors",), "it is for --split both")
    if not arguments.cache_tokens:
        cli.refuse(arguments, CACHE, "--cache-tokens 0 simulates no cache")
    if arguments.expert_mb and arguments.compute_ms:
        cli.refuse(arguments, ("cache_model",), "--expert-mb and --compute-ms take its place")
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import json
import time
from dataclasses import asdict, replace

from src.base import results
from src.base.errors import UserError
from src.base.reuse import Pieces
from src.journeys import cells, expert_cache, networks, prediction, prediction_report
from src.journeys.networks import Network, Settings
from src.journeys.predictors import HIDDEN_PREDICTORS, PREDICTORS
from src.journeys.records import open_journeys
from src.journeys.sample import to_sample
from src.journeys.store import COLLECT, read_hidden, shard_files, shard_run

TUNED = "mlp_tuned.json"


def read_data(arguments, folder: Path) -> cells.Data:
    """What predictors see; sizes of the cache that depend on the journeys are filled into the arguments."""
    source, longest = arguments.input or folder, arguments.hops[-1]
    journeys, imported = open_journeys(
        arguments.input, folder, arguments.limit, arguments.strict, arguments.num_experts, arguments.model
    )
    fill_in_costs(arguments, source)
    if longest >= len(journeys.layers):
        raise UserError(f"--hops {longest} needs more than {longest} layers; the journeys have {len(journeys.layers)}")
    eighths = {max(1, round(journeys.num_experts * part / 8)) for part in range(1, 9)}
    arguments.cache_capacities = arguments.cache_capacities or sorted(eighths)
    if arguments.cache_capacities[-1] > journeys.num_experts:
        raise UserError(
            f"--cache-capacities {arguments.cache_capacities[-1]} is more than the {journeys.num_experts} experts"
        )
    hidden = None if imported or not source.is_dir() else read_hidden(source)
    data = cells.prepare(to_sample(journeys, config.JOURNEY_DATASETS), hidden)
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
    return data


def fill_in_costs(arguments, source: Path) -> None:
    """Fill in --expert-mb and --compute-ms where they were not given; UserError where the store does not tell them."""
    bits = config.CACHE_BITS_PER_WEIGHT
    expert = expert_cache.expert_bytes(*config.CACHE_EXPERT_WIDTHS, bits) / 1e6
    layer = config.CACHE_LAYER_WEIGHTS
    if arguments.cache_model == "own":
        shards = shard_files(source) if source.is_dir() else []
        found = shard_run(shards[0]) if shards else {}
        if not found.get("expert_weights") or not found.get("layer_weights"):
            advice = "give --expert-mb and --compute-ms, or collect it again"
            raise UserError(f"{source} does not say how large its model's experts are; {advice}", COLLECT)
        expert, layer = found["expert_weights"] * bits / 8 / 1e6, found["layer_weights"]
    arguments.expert_mb = arguments.expert_mb or expert
    arguments.compute_ms = arguments.compute_ms or expert_cache.memory_bound_ms(layer, bits, config.CACHE_MEMORY_GB_S)


def chosen(arguments, data: cells.Data) -> list[str]:
    """The predictors to run, in the order of PREDICTORS; those that need router inputs only where there are any."""
    wanted = [name for name in PREDICTORS if name in (arguments.predictors or PREDICTORS)]
    left_out = [name for name in wanted if name in HIDDEN_PREDICTORS] if data.hidden is None else []
    if left_out:
        lack = f"no router inputs of {cells.MIN_PROBLEMS} problems or more: {', '.join(left_out)} left out"
        error = UserError(lack, f"{COLLECT} --hidden-problems {config.JOURNEY_HIDDEN_PROBLEMS} --restart")
        if len(left_out) == len(wanted):
            raise error
        print(f"note: {error.with_flags(cli.repeated_flags())}", file=sys.stderr)
    return [name for name in wanted if name not in left_out]


def network(setting: dict) -> Network:
    """A setting as config.py and TUNED have it."""
    return Network(**{**setting, "widths": tuple(setting["widths"])})


def make_settings(arguments, num_experts: int, tuned: Path) -> Settings:
    """Budgets and networks; mlp_tuned as --tune left it, else as config.py has it."""
    best = network(config.PREDICT_MLP_TUNED)
    if tuned.exists() and not arguments.tune:
        try:
            best = network(json.loads(tuned.read_text(encoding="utf-8"))["setting"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{tuned} holds no setting of mlp_tuned ({error}); delete it or run --tune") from error
    probe_epochs = cli.setting(config, "PREDICT_PROBE_EPOCHS", arguments.model, arguments.quick)
    return Settings(
        network(config.PREDICT_MLP), best, network(config.PREDICT_LINEAR_PROBE), network(config.PREDICT_MLP_PROBE),
        train_rows=arguments.train_rows, epochs=arguments.epochs, patience=config.PREDICT_PATIENCE,
        probe_epochs=min(probe_epochs, arguments.epochs) if arguments.quick else probe_epochs,
        validation_rows=arguments.validation_rows, xgboost_rows=max(1, arguments.xgboost_values // num_experts),
        xgboost_rounds=arguments.xgboost_rounds,
    )  # fmt: skip


def main(arguments) -> None:
    """Fit, score, simulate, write and show."""
    started, written, seed = time.time(), [], arguments.seed
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / config.JOURNEYS_DIR.name
    data = read_data(arguments, folder)
    names = chosen(arguments, data)
    settings = make_settings(arguments, data.num_experts, folder / TUNED)
    parts = cells.problem_parts(data, seed)
    seeds = list(range(seed, seed + arguments.predictor_seeds))
    source = {"source": arguments.input or folder, "journeys": len(data.problem)}
    identity = source | {"sha256": prediction.data_sha256(data)}
    meta = results.run_meta(
        cli.recorded(arguments) | {"settings": settings}, {"name": arguments.model}, identity,
        {"split": seed, "bootstrap": seed, "training": seeds}, started, "cpu", "float32",
    )  # fmt: skip
    if arguments.tune:
        split, hop = cells.split_by_problem(data, parts, arguments.hops[0]), arguments.hops[0]
        best, tried = networks.tune(data, split.train, split.validation, settings, arguments.tune, seed)
        tuned = {"setting": asdict(best), "hop": hop, "networks": tried}
        written.append(results.write_json(folder / TUNED, tuned, meta))
        settings = replace(settings, mlp_tuned=best)
    pieces = Pieces(folder / "pieces", {"journeys": identity["sha256"], "split_seed": seed}, arguments.restart)
    task = prediction.Task(data, parts, settings, seeds, pieces)
    leaky = {"both": arguments.row_predictors, "rows": names, "problems": []}[arguments.split]
    found = prediction.run_all(task, names, arguments.hops, leaky)
    if pieces.report():
        print(pieces.report())
    files = prediction.result_tables(task, found, arguments.resamples, seed, arguments.confidence_level)
    splits = prediction.splits_summary(data, parts, seed)
    written += [results.write_csv(folder / name, frame, meta) for name, frame in files.items()]
    written.append(results.write_json(folder / "splits.json", splits, meta))
    curves = []
    if arguments.cache_tokens:
        costs = arguments.expert_mb, arguments.compute_ms, arguments.cache_tokens
        sizes = arguments.cache_capacities, arguments.bandwidths
        curves = prediction.simulate(task, found, arguments.hops[0], *sizes, *costs)
        written.append(results.write_csv(folder / "cache_curves.csv", curves, meta))
    prediction_report.show(files, curves, data.num_experts, splits)
    print(f"\n{time.time() - started:.0f} s")
    cli.say_written(written, "jupyter lab notebooks/moe_routing_analysis.ipynb")


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

"""journeys 01: token journeys: which experts a mixture-of-experts model gives each token, layer by layer.

Runs a model over problems (HumanEval, GSM8K or a file) and stores journeys under outputs/<model>/journeys/store/, with
a summary in collection.json. A run that was interrupted goes on where it stopped. --export writes one file for each
token as well (or --export rows one JSONL file); --import-from fills the store from such files instead of running a
model. --hidden-problems N keeps what the routers were given for N problems of each data set, and the routers, in
hidden/ beside the store: 03 predicts experts from it.

Several processes, each with a GPU of its own or all on the CPU, share the problems:
    accelerate launch --multi_gpu --num_processes 2 scripts/journeys/01_collect.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import config
from src.base import cli
from src.base.errors import UserError
from src.journeys import flags

# Flags of running a model, which means nothing for records that are imported.
RUNNING = (
    "device", "dtype", "cache_dir", "datasets", "problems", "prompt_tokens", "generate", "top_k", "hidden_problems",
    "hidden_dtype", "batch_problems", "shard_problems", "engine", "tensor_parallel_size", "device_map",
)  # fmt: skip
FLAGS = ("model", *cli.RUN_FLAGS, "restart", *RUNNING, "export", "import_from", "strict", "num_experts")


def parse(argv: list[str] | None = None):
    """The command line, with the name of imported records as that of their model."""
    arguments = cli.parse(__doc__, config, FLAGS, argv, flags.SETTINGS)
    if arguments.import_from is not None:
        cli.refuse(arguments, RUNNING, "records of --import-from come from no model that runs here")
        flags.name_after_records(arguments, arguments.import_from)
    else:
        cli.refuse(arguments, ("strict", "num_experts"), "it is about --import-from")
    if arguments.device_map and (arguments.device != "auto" or arguments.engine == "vllm"):
        raise UserError("--device-map auto chooses devices itself; leave out --device and --engine vllm")
    if arguments.engine == "vllm":
        cli.refuse(arguments, ("top_k",), "it is for BlockFFN models, which vLLM does not run")
        cli.refuse(arguments, ("batch_problems",), "vLLM makes batches itself")
        if arguments.hidden_problems:
            raise UserError("--hidden-problems needs --engine transformers: vLLM does not give router inputs")
    else:
        cli.refuse(arguments, ("tensor_parallel_size",), "it is for --engine vllm")
    if not arguments.hidden_problems:
        cli.refuse(arguments, ("hidden_dtype",), "it is about --hidden-problems, which keeps none")
    return arguments


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

import datetime
import time

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from src.base import results
from src.journeys import collection, records, shards, store
from src.models.loading import resolve_device, resolve_dtype, resolve_model_path, weights_sha256

SUMMARY = "collection.json"
EXPORT_FOLDER, EXPORT_FILE = "routing_data_collected", "routing_rows.jsonl"


def load_problem_sets(arguments, folder: Path, state: PartialState) -> list[collection.ProblemSet]:
    """The same problems in every process: the first one loads them and tells the others."""
    holder: list = [None]
    if state.is_main_process:
        # Once begun with generated problems, a run goes on with them even where the hub is back.
        offline = bool(store.shards_of(folder, "gsm_symbolic")) and not store.shards_of(folder, "gsm8k")
        holder[0] = [
            collection.load_problems(
                name, arguments.problems, arguments.seed, arguments.cache_dir, offline and not arguments.restart
            )
            for name in dict.fromkeys(arguments.datasets)
        ]
        names = [problem_set.name for problem_set in holder[0]]
        if len(set(names)) < len(names):
            raise UserError(f"--datasets names {', '.join(names)}: two of them would be stored under one name")
        for problem_set in holder[0]:
            if problem_set.note:
                print(f"note: {problem_set.note}", file=sys.stderr)
    if state.num_processes > 1:
        broadcast_object_list(holder)
    return holder[0]


def collect(arguments, folder: Path, state: PartialState) -> tuple[dict, str, str]:
    """Collect what is missing in the store; returns the model's identity, the type of the device, and the dtype."""
    path = resolve_model_path(arguments.model, arguments.cache_dir)
    target = resolve_device("auto" if arguments.device_map else shards.process_device(arguments, state))
    device, dtype = target.type, str(resolve_dtype(arguments.dtype, target)).removeprefix("torch.")
    problem_sets = load_problem_sets(arguments, folder, state)
    sha256 = weights_sha256(arguments.model, arguments.cache_dir)
    runs = [shards.run_of(arguments, problem_set, sha256, device, dtype) for problem_set in problem_sets]
    if state.is_main_process:
        for problem_set, run in zip(problem_sets, runs, strict=True):
            shards.prepare_store(folder, problem_set.name, run, arguments.restart)
    state.wait_for_everyone()
    wanted = shards.all_shards(problem_sets, runs, folder, arguments.shard_problems)
    missing = [shard for shard in wanted if not shard.is_done()]
    state.wait_for_everyone()  # all have looked before anyone writes
    if missing and len(missing) < len(wanted) and state.is_main_process:
        print(f"resuming at problem {missing[0].problems[0].id} of {missing[0].dataset}")
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        shards.collect_shards(arguments, mine, path, state)
    state.wait_for_everyone()
    return {"name": str(arguments.model), "sha256": sha256}, device, dtype


def report(arguments, folder: Path, identity: dict | None, started: float, device: str, dtype: str) -> None:
    """Write the summary and the export, and say what there is."""
    stored = store.read_journeys(folder / "store")
    summary = shards.summary_of(stored, folder / "store")
    data = {name: entry["run"].get("data", entry["run"]) for name, entry in summary["datasets"].items()}
    meta = results.run_meta(
        cli.recorded(arguments), identity, data, {"problems": arguments.seed}, started, device, dtype
    )
    written = [folder / "store", results.write_json(folder / SUMMARY, summary, meta)]
    if arguments.export == "tokens":
        written += records.export_token_files(stored, folder / EXPORT_FOLDER)
    elif arguments.export == "rows":
        written.append(records.export_rows(stored, folder / EXPORT_FILE))
    for name, entry in summary["datasets"].items():
        print(
            f"{name}: {entry['journeys']:,} journeys ({entry['generated']:,} of generated tokens) of "
            f"{entry['problems']:,} problems"
        )
    print(f"{len(stored.layers)} layers, {stored.num_experts} experts, {stored.experts.shape[2]} of them per token")
    hidden = store.read_hidden(folder / "store")
    if hidden is not None:
        size = sum(part.nbytes for part in hidden.states) / 1e6
        print(f"router inputs of {len(hidden.rows):,} journeys, {size:,.1f} MB")
        written.append(store.hidden_folder(folder / "store"))
    cli.say_written(written, "scripts/journeys/02_analyze.py", flags.passed_on(arguments))


def main(arguments) -> None:
    """Collect, or import, and report."""
    started = time.time()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / "journeys"
    # Processes wait for the slowest one, however long that takes.
    state = PartialState(
        cpu=arguments.device == "cpu" or not torch.cuda.is_available(), timeout=datetime.timedelta(days=30)
    )
    identity, device, dtype = None, "cpu", "none"
    if arguments.import_from:
        shards.import_records(arguments, folder / "store")
    else:
        identity, device, dtype = collect(arguments, folder / "store", state)
    if state.is_main_process:
        report(arguments, folder, identity, started, device, dtype)
    state.destroy_process_group()


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))

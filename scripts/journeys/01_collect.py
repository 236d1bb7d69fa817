"""08: token journeys: which experts a mixture-of-experts model gives each token, layer by layer.

Runs a model over problems (HumanEval, GSM8K or a file) and stores journeys under outputs/<model>/journeys/store/, with
a summary in collection.json. A run that was interrupted goes on where it stopped. `--export` writes one file per token
as well (or `--export rows` one JSONL file); `--import` fills the store from such files instead of running a model.
`--save-hidden N` keeps what the routers were given for N problems of each data set, and the routers, in hidden/ beside
the store: 10 predicts experts from it.

Several processes, each with a GPU of its own or all on the CPU, share the problems:
    accelerate launch --multi_gpu --num_processes 2 scripts/journeys/01_collect.py
"""

import datetime
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import config
from src.base import results
from src.journeys import collection
from src.journeys.collection import ProblemSet
from src.journeys.records import export_rows, export_token_files, import_rows, import_token_files
from src.journeys.store import (
    Journeys,
    hidden_file,
    hidden_folder,
    read_hidden,
    read_journeys,
    remove_left_overs,
    routers_file,
    shard_files,
    shard_name,
    shard_run,
    shards_of,
    write_hidden,
    write_shard,
)
from src.models.blockffn import BlockFFNForCausalLM
from src.models.families import context_length
from src.models.loading import (
    check_weight_files,
    is_blockffn,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model_path,
)
from src.routing_extractor import RouterShape, TopKExtractor, router_arrays, router_shape

SUMMARY = "collection.json"
EXPORT_FOLDER, EXPORT_FILE = "routing_data_collected", "routing_rows.jsonl"


def parse_arguments():
    parser = results.ArgumentParser("Token journeys of a mixture-of-experts model.")
    parser.add_argument(
        "--model",
        help=f"{config.JOURNEY_MODEL} (unless given), a folder or a hub name; with --import the records' name",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=config.JOURNEY_DATASETS,
        help="humaneval, gsm8k (generated where the hub is out of reach), gsm_symbolic, a text or a .jsonl file",
    )
    parser.add_argument("--problems", type=int, help="problems of each data set (default: the config's)")
    parser.add_argument(
        "--max-prompt-tokens", type=int, help="tokens kept of a prompt (default: the config's, within context)"
    )
    parser.add_argument(
        "--generate", type=int, default=config.JOURNEY_GENERATE, help="tokens generated after each prompt"
    )
    parser.add_argument("--top-k", type=int, help="experts per token of a BlockFFN (default: 8); others have their own")
    parser.add_argument(
        "--save-hidden", type=int, metavar="N", help="keep the router inputs of the first N problems of each data set"
    )
    parser.add_argument(
        "--hidden-dtype",
        choices=("auto", "float16", "float32"),
        default="auto",
        help="of router inputs; auto: float32 for a float32 model (float16 would swap experts that are nearly as "
        "strong), else float16",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="problems per forward pass")
    parser.add_argument("--shard-problems", type=int, default=16, help="problems per file; what a kill can cost")
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what runs the model"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that vLLM splits the model over")
    parser.add_argument("--device-map", choices=("auto",), help="spread a large model over all GPUs and host memory")
    parser.add_argument("--restart", action="store_true", help="replace what an earlier run with other settings stored")
    parser.add_argument(
        "--export", nargs="?", const="tokens", choices=("tokens", "rows"), help="one file per token, or one of all rows"
    )
    parser.add_argument(
        "--import", dest="import_from", type=Path, metavar="PATH", help="records to store: a .jsonl file or a folder"
    )
    parser.add_argument("--strict", action="store_true", help="any fault in imported records is an error")
    parser.add_argument("--num-experts", type=int, help="E of imported records (default: inferred)")
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="fewer problems, results apart")
    parser.add_argument("--seed", type=int, default=config.SEED, help="of generated problems")
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16 or bfloat16")
    parser.add_argument("--output-dir", type=Path, default=config.OUTPUT_DIR, help="root of the results")
    arguments = parser.parse_args()
    if arguments.model is None:
        arguments.model = arguments.import_from.stem if arguments.import_from else config.JOURNEY_MODEL
    for name in ("problems", "max_prompt_tokens", "top_k", "batch_size", "shard_problems", "num_experts",
                 "tensor_parallel_size", "save_hidden"):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise results.UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if arguments.generate < 0:
        raise results.UserError(f"--generate is {arguments.generate}; it must not be negative")
    if arguments.seed < 0:
        raise results.UserError(f"--seed is {arguments.seed}; it must not be negative")
    if (arguments.strict or arguments.num_experts) and not arguments.import_from:
        raise results.UserError("--strict and --num-experts are about --import")
    if arguments.device_map and (arguments.device != "auto" or arguments.engine == "vllm"):
        raise results.UserError("--device-map auto chooses devices itself; leave out --device and --engine vllm")
    if arguments.top_k and arguments.engine == "vllm":
        raise results.UserError("--top-k is for BlockFFN models, which vLLM does not run")
    if arguments.save_hidden and arguments.engine == "vllm":
        raise results.UserError("--save-hidden needs --engine transformers: vLLM does not give router inputs")
    if arguments.save_hidden and arguments.import_from:
        raise results.UserError("--save-hidden needs a model: records of --import hold no router inputs")
    if arguments.hidden_dtype != "auto" and not arguments.save_hidden:
        raise results.UserError(f"--hidden-dtype {arguments.hidden_dtype} is about --save-hidden, which is not given")
    return arguments


def load_problem_sets(arguments, store: Path, state: PartialState) -> list[ProblemSet]:
    """The same problems in every process: the first one loads them and tells the others."""
    limit = arguments.problems or (config.QUICK_JOURNEY_PROBLEMS if arguments.quick else config.JOURNEY_PROBLEMS)
    holder: list = [None]
    if state.is_main_process:
        # once begun with generated problems, a run goes on with them even where the hub is back
        offline = bool(shards_of(store, "gsm_symbolic")) and not shards_of(store, "gsm8k")
        holder[0] = [
            collection.load_problems(
                name, limit, arguments.seed, config.MODEL_CACHE_DIR, offline and not arguments.restart
            )
            for name in dict.fromkeys(arguments.dataset)
        ]
        names = [problem_set.name for problem_set in holder[0]]
        if len(set(names)) < len(names):
            raise results.UserError(f"--dataset names {', '.join(names)}: two of them would be stored under one name")
        for problem_set in holder[0]:
            if problem_set.note:
                print(f"note: {problem_set.note}", file=sys.stderr)
    if state.num_processes > 1:
        broadcast_object_list(holder)
    return holder[0]


def run_of(arguments, problem_set: ProblemSet, sha256: str, device: str, dtype: str) -> dict:
    """What the journeys of one data set depend on; a store holds one such run per data set."""
    hidden_dtype = arguments.hidden_dtype
    if hidden_dtype == "auto":
        hidden_dtype = "float32" if dtype == "float32" else "float16"
    return {
        "model_sha256": sha256,
        "data": problem_set.identity(),
        "max_prompt_tokens": arguments.max_prompt_tokens or config.JOURNEY_MAX_TOKENS,
        "generate": arguments.generate,
        "top_k": arguments.top_k,
        "batch_size": arguments.batch_size,
        "shard_problems": arguments.shard_problems,
        "engine": arguments.engine,
        "device": device,
        "dtype": dtype,
        "save_hidden": arguments.save_hidden,
        "hidden_dtype": hidden_dtype if arguments.save_hidden else None,
    }


def prepare_store(store: Path, name: str, run: dict, restart: bool) -> None:
    """Remove what a killed run left half-written, and with `restart` all that does not belong to this run; what does
    belong to it stays, so that run_all.sh goes on where it was stopped.

    Raises UserError where the store holds another run of this data set, or any journeys of other weights.
    """
    remove_left_overs(store)
    same_data = set(shards_of(store, name))
    for shard in shard_files(store):
        earlier = shard_run(shard)
        keys = run if shard in same_data else ["model_sha256"]
        differing = [key for key in keys if earlier.get(key) != run.get(key)]
        if restart and differing:
            hidden_file(shard).unlink(missing_ok=True)
            shard.unlink()
        elif differing:
            raise results.UserError(
                f"{store} holds journeys of another run ({shard.name}: other {', '.join(differing)}); add --restart to "
                "replace them, or give another --output-dir"
            )


def load(arguments, path: Path, state: PartialState):
    """(model, tokenizer) for transformers; MoE experts run one after another on a CPU."""
    if arguments.device_map == "auto":
        if state.num_processes > 1:
            raise results.UserError("--device-map auto spreads one process's model; do not combine it with several")
        check_weight_files(path)
        model_class = BlockFFNForCausalLM if is_blockffn(path) else AutoModelForCausalLM
        dtype = resolve_dtype(arguments.dtype, resolve_device())
        model = model_class.from_pretrained(path, dtype=dtype, device_map="auto").eval().requires_grad_(False)
        tokenizer = load_tokenizer(path)
    else:
        model, tokenizer = load_model(
            arguments.model, process_device(arguments, state), arguments.dtype, cache_dir=config.MODEL_CACHE_DIR
        )
    if model.device.type == "cpu":
        # transformers' grouped matrix products are many times slower there
        model.set_experts_implementation("eager")
    return model, tokenizer


def process_device(arguments, state: PartialState) -> str:
    """--device; "auto" gives each of several processes a GPU of its own."""
    if arguments.device == "auto" and state.num_processes > 1 and torch.cuda.is_available():
        return f"cuda:{state.local_process_index}"
    return arguments.device


@dataclass(frozen=True)
class Collector:
    """What runs the model.

    run(prompts, hidden): what was recorded, with router inputs of the first `hidden` prompts. max_tokens: kept of a
    prompt. routers: the routers themselves, where router inputs are saved.
    """

    run: Callable[[Sequence[Sequence[int]], int], list[collection.Recorded]]
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    shape: RouterShape
    routers: dict[str, np.ndarray] | None = None


def make_collector(arguments, path: Path, state: PartialState, hidden_dtype: str | None) -> Collector:
    """The engine that --engine names; hidden_dtype: of router inputs, None where none are saved."""
    if arguments.engine == "vllm":
        shape, num_layers = collection.declared_routers(path)
        tokenizer = load_tokenizer(path)
        kept = arguments.max_prompt_tokens or config.JOURNEY_MAX_TOKENS
        wanted = kept + arguments.generate + 1
        engine = collection.start_vllm(path, arguments.dtype, wanted, arguments.tensor_parallel_size, arguments.seed)

        def run(prompts, hidden):
            return collection.collect_vllm(engine, prompts, arguments.generate, shape.layers, num_layers)

        return Collector(run, tokenizer, kept, shape)
    model, tokenizer = load(arguments, path, state)
    shape = router_shape(model)
    room = context_length(model) - arguments.generate
    if (arguments.max_prompt_tokens or 1) > room:
        raise results.UserError(
            f"--max-prompt-tokens {arguments.max_prompt_tokens or 1} and --generate {arguments.generate} together pass "
            f"the model's context of {context_length(model)} tokens"
        )
    if shape.top_k is not None and arguments.top_k not in (None, shape.top_k):
        raise results.UserError(f"--top-k is {arguments.top_k}, but this model's routers choose {shape.top_k} experts")
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]

    def run(prompts, hidden):
        input_dtype = getattr(torch, hidden_dtype) if hidden else None
        with TopKExtractor(model, arguments.top_k, input_dtype) as extractor:
            return collection.collect(model, extractor, prompts, arguments.generate, ends, arguments.batch_size, hidden)

    kept = min(arguments.max_prompt_tokens or config.JOURNEY_MAX_TOKENS, room)
    return Collector(run, tokenizer, kept, shape, router_arrays(model) if hidden_dtype else None)


@dataclass(frozen=True)
class Shard:
    """A file of the store and what it is made from: problems, the first `hidden` with router inputs, and the run."""

    file: Path
    dataset: str
    problems: list[collection.Problem]
    run: dict
    hidden: int

    def is_done(self) -> bool:
        """Whether all its files are there."""
        beside = [hidden_file(self.file), routers_file(self.file.parent)] if self.hidden else []
        return all(file.exists() for file in (self.file, *beside))


def all_shards(problem_sets: list[ProblemSet], runs: list[dict], store: Path, size: int) -> list[Shard]:
    """Consecutive problems, `size` at a time: the same for any number of processes, so any can go on with a run."""
    return [
        Shard(
            store / shard_name(problem_set.name, index),
            problem_set.name,
            problem_set.problems[start : start + size],
            run,
            max((run["save_hidden"] or 0) - start, 0),
        )
        for problem_set, run in zip(problem_sets, runs, strict=True)
        for index, start in enumerate(range(0, len(problem_set.problems), size))
    ]


def collect_shards(arguments, shards: list[Shard], path: Path, state: PartialState) -> None:
    """Collect and write these shards, in order."""
    collector = make_collector(arguments, path, state, shards[0].run["hidden_dtype"])
    without_router = collector.shape.layers_without_router
    if without_router and state.is_main_process:
        print(f"layers without a router, left out: {', '.join(map(str, without_router))}")
    clock, tokens = time.perf_counter(), 0
    total = sum(len(shard.problems) for shard in shards)
    with tqdm(total=total, desc="collect", unit="problem", delay=3, disable=not state.is_main_process) as bar:
        for shard in shards:
            tokens += collect_shard(arguments, collector, shard, state.is_main_process and shard is shards[0])
            bar.update(len(shard.problems))
    seconds = time.perf_counter() - clock
    print(f"{tokens:,} journeys in {seconds:.1f} s ({tokens / seconds:,.0f} per second)", flush=True)


def collect_shard(arguments, collector: Collector, shard: Shard, with_routers: bool) -> int:
    """Collect and write one shard, and the routers where asked; returns its journeys."""
    shape, started = collector.shape, time.time()
    prompts = collection.encode_prompts(collector.tokenizer, shard.problems, collector.max_tokens)
    recorded = collector.run(prompts, shard.hidden)
    # all that a shard needs beside it comes before it, so that what is there is whole
    if with_routers and collector.routers is not None:
        model = {"name": str(arguments.model), "sha256": shard.run["model_sha256"]}
        meta = results.run_meta(vars(arguments), model, None, {}, started, shard.run["device"], shard.run["dtype"])
        results.write_npz(routers_file(shard.file.parent), collector.routers, meta)
    if shard.hidden:
        states = np.concatenate([entry.router_inputs for entry in recorded[: shard.hidden]])
        write_hidden(shard.file, states)
    rows = collection.to_journeys(
        shard.dataset,
        shard.problems,
        recorded,
        collector.tokenizer,
        str(arguments.model),
        shape.layers,
        shape.num_experts,
        padded=shape.top_k is None,
    )
    found = {"layers_without_router": shape.layers_without_router, "expert_weights": shape.expert_weights,
             "layer_weights": shape.layer_weights}  # fmt: skip
    write_shard(shard.file, rows, shard.run | found)
    return len(rows)


def import_records(arguments, store: Path) -> None:
    """Fill the store from records; the report goes to stderr where something was left out."""
    source = arguments.import_from
    read = import_token_files if source.is_dir() else import_rows
    imported, report = read(
        source, strict=arguments.strict, num_experts=arguments.num_experts, model=str(arguments.model)
    )
    for line in report.lines():
        print(line, file=sys.stderr if report.problems else sys.stdout)
    run = {"imported_from": source.name, "rows": report.rows, "num_experts": report.num_experts}
    for name in np.unique(imported.dataset).tolist():
        prepare_store(store, name, run, arguments.restart)
    for name in np.unique(imported.dataset).tolist():
        write_shard(store / shard_name(name, 0), imported.select(imported.dataset == name), run)


def summary_of(stored: Journeys, store: Path) -> dict:
    """What collection.json says: shapes, and for each data set its problems, journeys and origin."""
    datasets = {}
    for name in np.unique(stored.dataset).tolist():
        mask = stored.dataset == name
        datasets[name] = {
            "problems": len(np.unique(stored.problem_id[mask])),
            "journeys": int(mask.sum()),
            "generated": int(stored.is_generated[mask].sum()),
            "run": shard_run(shards_of(store, name)[0]),
        }
    without = sorted({layer for entry in datasets.values() for layer in entry["run"].get("layers_without_router", [])})
    return {
        "model": stored.model,
        "layers": stored.layers,
        "layers_without_router": without,
        "num_experts": stored.num_experts,
        "top_k": stored.experts.shape[2],
        "datasets": datasets,
    }


def main() -> None:
    started = time.time()
    arguments = parse_arguments()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick) / "journeys"
    store = folder / "store"
    # processes wait for the slowest one, however long that takes
    state = PartialState(
        cpu=arguments.device == "cpu" or not torch.cuda.is_available(), timeout=datetime.timedelta(days=30)
    )
    identity, device, dtype = None, "cpu", "none"
    if arguments.import_from:
        import_records(arguments, store)
    else:
        path = resolve_model_path(arguments.model, config.MODEL_CACHE_DIR)
        target = resolve_device("auto" if arguments.device_map else process_device(arguments, state))
        device, dtype = target.type, str(resolve_dtype(arguments.dtype, target)).removeprefix("torch.")
        problem_sets = load_problem_sets(arguments, store, state)
        identity = {
            "name": str(arguments.model),
            "sha256": collection.weights_sha256(arguments.model, config.MODEL_CACHE_DIR),
        }
        runs = [run_of(arguments, problem_set, identity["sha256"], device, dtype) for problem_set in problem_sets]
        if state.is_main_process:
            for problem_set, run in zip(problem_sets, runs, strict=True):
                prepare_store(store, problem_set.name, run, arguments.restart)
        state.wait_for_everyone()
        shards = all_shards(problem_sets, runs, store, arguments.shard_problems)
        missing = [shard for shard in shards if not shard.is_done()]
        state.wait_for_everyone()  # all have looked before anyone writes
        if missing and len(missing) < len(shards) and state.is_main_process:
            print(f"resuming at problem {missing[0].problems[0].id} of {missing[0].dataset}")
        mine = missing[state.process_index :: state.num_processes]
        if mine:
            collect_shards(arguments, mine, path, state)
        state.wait_for_everyone()
    if state.is_main_process:
        report(arguments, folder, store, identity, started, device, dtype)
    state.destroy_process_group()


def report(
    arguments, folder: Path, store: Path, identity: dict | None, started: float, device: str, dtype: str
) -> None:
    """Write the summary and the export, and say what there is."""
    stored = read_journeys(store)
    summary = summary_of(stored, store)
    data = {name: entry["run"].get("data", entry["run"]) for name, entry in summary["datasets"].items()}
    meta = results.run_meta(vars(arguments), identity, data, {"problems": arguments.seed}, started, device, dtype)
    written = [store, results.write_json(folder / SUMMARY, summary, meta)]
    if arguments.export == "tokens":
        written += export_token_files(stored, folder / EXPORT_FOLDER)
    elif arguments.export == "rows":
        written.append(export_rows(stored, folder / EXPORT_FILE))
    for name, entry in summary["datasets"].items():
        print(
            f"{name}: {entry['journeys']:,} journeys ({entry['generated']:,} of generated tokens) of "
            f"{entry['problems']:,} problems"
        )
    print(f"{len(stored.layers)} layers, {stored.num_experts} experts, {stored.experts.shape[2]} of them per token")
    hidden = read_hidden(store)
    if hidden is not None:
        size = sum(part.nbytes for part in hidden.states) / 1e6
        print(f"router inputs of {len(hidden.rows):,} journeys, {size:,.1f} MB")
        written.append(hidden_folder(store))
    print("\nwritten:", *(f"  {path}" for path in written), sep="\n")
    print(f"next: python scripts/journeys/02_analyze.py --model {arguments.model}")


if __name__ == "__main__":
    results.run_main(main)

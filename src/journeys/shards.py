"""A collecting run, shard by shard: what each shard depends on, which are there already, and what makes the others."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from src.base import cli, results
from src.base.errors import UserError
from src.journeys import collection, records, store
from src.models import loading
from src.models.blockffn import BlockFFNForCausalLM
from src.models.families import context_length
from src.routing_extractor import RouterShape, TopKExtractor, router_arrays, router_shape

# Flags behind those entries of a shard's run that have another name.
FLAG_OF = {"max_prompt_tokens": "prompt_tokens", "batch_size": "batch_problems", "save_hidden": "hidden_problems"}


# -- what is there
def run_of(
    arguments: argparse.Namespace, problem_set: collection.ProblemSet, sha256: str, device: str, dtype: str
) -> dict:
    """What the journeys of one data set depend on; a store holds one such run for each data set.

    `sha256` is that of the model's weights, `device` and `dtype` what --device and --dtype came to.
    """
    hidden_dtype = arguments.hidden_dtype
    if hidden_dtype == "auto":
        hidden_dtype = "float32" if dtype == "float32" else "float16"
    return {
        "model_sha256": sha256,
        "data": problem_set.identity(),
        "max_prompt_tokens": arguments.prompt_tokens,
        "generate": arguments.generate,
        "top_k": arguments.top_k,
        "batch_size": arguments.batch_problems,
        "shard_problems": arguments.shard_problems,
        "engine": arguments.engine,
        "device": device,
        "dtype": dtype,
        "save_hidden": arguments.hidden_problems or None,
        "hidden_dtype": hidden_dtype if arguments.hidden_problems else None,
    }


def prepare_store(folder: Path, name: str, run: dict, restart: bool) -> None:
    """Remove what a killed run left half-written, and with `restart` all that does not belong to this run.

    What does belong to it stays, so that a run goes on where it was stopped. Raises UserError where the store holds
    another run of the data set `name`, or any journeys of other weights.
    """
    store.remove_left_overs(folder)
    same_data = set(store.shards_of(folder, name))
    for shard in store.shard_files(folder):
        earlier = store.shard_run(shard)
        keys = run if shard in same_data else ["model_sha256"]
        differing = [FLAG_OF.get(key, key) for key in keys if earlier.get(key) != run.get(key)]
        if restart and differing:
            store.hidden_file(shard).unlink(missing_ok=True)
            shard.unlink()
        elif differing:
            found = f"{folder} holds journeys of another run ({shard.name}: other {', '.join(differing)})"
            raise UserError(f"{found}; add --restart to replace them, or give another --output-dir")


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
        beside = [store.hidden_file(self.file), store.routers_file(self.file.parent)] if self.hidden else []
        return all(file.exists() for file in (self.file, *beside))


def all_shards(
    problem_sets: Sequence[collection.ProblemSet], runs: Sequence[dict], folder: Path, size: int
) -> list[Shard]:
    """Consecutive problems, `size` at a time: the same for any number of processes, so any can go on with a run."""
    return [
        Shard(
            folder / store.shard_name(problem_set.name, index), problem_set.name,
            problem_set.problems[start : start + size], run, max((run["save_hidden"] or 0) - start, 0),
        )
        for problem_set, run in zip(problem_sets, runs, strict=True)
        for index, start in enumerate(range(0, len(problem_set.problems), size))
    ]  # fmt: skip


# -- what runs the model
@dataclass(frozen=True)
class Collector:
    """What runs the model: run(prompts, hidden) records journeys, with router inputs of the first `hidden` prompts.

    max_tokens: kept of a prompt. routers: the routers' arrays, where router inputs are saved.
    """

    run: Callable[[Sequence[Sequence[int]], int], list[collection.Recorded]]
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    shape: RouterShape
    routers: dict[str, np.ndarray] | None = None


def process_device(arguments: argparse.Namespace, state: PartialState) -> str:
    """--device; "auto" gives each of several processes a GPU of its own."""
    if arguments.device == "auto" and state.num_processes > 1 and torch.cuda.is_available():
        return f"cuda:{state.local_process_index}"
    return arguments.device


def _load(arguments: argparse.Namespace, path: Path, state: PartialState) -> tuple:
    """(model, tokenizer) for transformers; the experts of a model run one after another on a CPU."""
    if arguments.device_map == "auto":
        if state.num_processes > 1:
            raise UserError("--device-map auto spreads one process's model; do not combine it with several")
        loading.check_weight_files(path)
        model_class = BlockFFNForCausalLM if loading.is_blockffn(path) else AutoModelForCausalLM
        dtype = loading.resolve_dtype(arguments.dtype, loading.resolve_device())
        model = model_class.from_pretrained(path, dtype=dtype, device_map="auto").eval().requires_grad_(False)
        tokenizer = loading.load_tokenizer(path)
    else:
        device = process_device(arguments, state)
        model, tokenizer = loading.load_model(arguments.model, device, arguments.dtype, cache_dir=arguments.cache_dir)
    if model.device.type == "cpu":
        # transformers' grouped matrix products are many times slower there
        model.set_experts_implementation("eager")
    return model, tokenizer


def _with_vllm(arguments: argparse.Namespace, path: Path) -> Collector:
    shape, num_layers = collection.declared_routers(path)
    tokenizer, generate = loading.load_tokenizer(path), arguments.generate
    longest, gpus = arguments.prompt_tokens + generate + 1, arguments.tensor_parallel_size or 1
    engine = collection.start_vllm(path, arguments.dtype, longest, gpus, arguments.seed)

    def run(prompts, hidden):
        return collection.collect_vllm(engine, prompts, generate, shape.layers, num_layers)

    return Collector(run, tokenizer, arguments.prompt_tokens, shape)


def _with_transformers(
    arguments: argparse.Namespace, path: Path, state: PartialState, hidden_dtype: str | None
) -> Collector:
    model, tokenizer = _load(arguments, path, state)
    shape, room = router_shape(model), context_length(model) - arguments.generate
    wanted = arguments.prompt_tokens if "prompt_tokens" in arguments.given else 1
    if wanted > room:
        asked = f"--prompt-tokens {wanted} and --generate {arguments.generate}"
        raise UserError(f"{asked} together pass the model's context of {context_length(model)} tokens")
    if shape.top_k is not None and arguments.top_k not in (None, shape.top_k):
        raise UserError(f"--top-k is {arguments.top_k}, but this model's routers choose {shape.top_k} experts")
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]

    def run(prompts, hidden):
        input_dtype = getattr(torch, hidden_dtype) if hidden else None
        with TopKExtractor(model, arguments.top_k, input_dtype) as extractor:
            return collection.collect(
                model, extractor, prompts, arguments.generate, ends, arguments.batch_problems, hidden
            )

    kept = min(arguments.prompt_tokens, room)
    return Collector(run, tokenizer, kept, shape, router_arrays(model) if hidden_dtype else None)


# -- collecting
def collect_shards(arguments: argparse.Namespace, shards: Sequence[Shard], path: Path, state: PartialState) -> None:
    """Collect and write these shards, in order, with the model at `path`."""
    if arguments.engine == "vllm":
        collector = _with_vllm(arguments, path)
    else:
        collector = _with_transformers(arguments, path, state, shards[0].run["hidden_dtype"])
    without_router = collector.shape.layers_without_router
    if without_router and state.is_main_process:
        print(f"layers without a router, left out: {', '.join(map(str, without_router))}")
    clock, tokens = time.perf_counter(), 0
    total = sum(len(shard.problems) for shard in shards)
    with tqdm(total=total, desc="collect", unit="problem", delay=3, disable=not state.is_main_process) as bar:
        for shard in shards:
            tokens += _collect_shard(arguments, collector, shard, state.is_main_process and shard is shards[0])
            bar.update(len(shard.problems))
    seconds = time.perf_counter() - clock
    print(f"{tokens:,} journeys in {seconds:.1f} s ({tokens / seconds:,.0f} per second)", flush=True)


def _collect_shard(arguments: argparse.Namespace, collector: Collector, shard: Shard, with_routers: bool) -> int:
    """Collect and write one shard, and the routers where asked; returns its journeys."""
    shape, started, name = collector.shape, time.time(), str(arguments.model)
    prompts = collection.encode_prompts(collector.tokenizer, shard.problems, collector.max_tokens)
    recorded = collector.run(prompts, shard.hidden)
    # All that a shard needs beside it comes before it, so that what is there is whole.
    if with_routers and collector.routers is not None:
        meta = results.run_meta(
            cli.recorded(arguments), {"name": name, "sha256": shard.run["model_sha256"]}, None, {}, started,
            shard.run["device"], shard.run["dtype"],
        )  # fmt: skip
        results.write_npz(store.routers_file(shard.file.parent), collector.routers, meta)
    if shard.hidden:
        states = np.concatenate([entry.router_inputs for entry in recorded[: shard.hidden]])
        store.write_hidden(shard.file, states)
    rows = collection.to_journeys(shard.dataset, shard.problems, recorded, collector.tokenizer, name, shape)
    found = {"layers_without_router": shape.layers_without_router, "expert_weights": shape.expert_weights,
             "layer_weights": shape.layer_weights}  # fmt: skip
    store.write_shard(shard.file, rows, shard.run | found)
    return len(rows)


def import_records(arguments: argparse.Namespace, folder: Path) -> None:
    """Fill the store from records; the report goes to stderr where something was left out."""
    source = arguments.import_from
    imported, report = records.import_records(
        source, None, arguments.strict, arguments.num_experts, str(arguments.model)
    )
    for line in report.lines():
        print(line, file=sys.stderr if report.problems else sys.stdout)
    run = {"imported_from": source.name, "rows": report.rows, "num_experts": report.num_experts}
    names = np.unique(imported.dataset).tolist()
    for name in names:
        prepare_store(folder, name, run, arguments.restart)
    for name in names:
        store.write_shard(folder / store.shard_name(name, 0), imported.select(imported.dataset == name), run)


def summary_of(stored: store.Journeys, folder: Path) -> dict:
    """What collection.json says of a store: shapes, and for each data set its problems, journeys and origin."""
    datasets = {}
    for name in np.unique(stored.dataset).tolist():
        mask = stored.dataset == name
        datasets[name] = {
            "problems": len(np.unique(stored.problem_id[mask])),
            "journeys": int(mask.sum()),
            "generated": int(stored.is_generated[mask].sum()),
            "run": store.shard_run(store.shards_of(folder, name)[0]),
        }
    without = sorted({layer for entry in datasets.values() for layer in entry["run"].get("layers_without_router", [])})
    return {"model": stored.model, "layers": stored.layers, "layers_without_router": without,
            "num_experts": stored.num_experts, "top_k": stored.experts.shape[2], "datasets": datasets}  # fmt: skip

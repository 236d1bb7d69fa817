"""How fast journeys are collected and analysed: against plain forwards, and against loops over dicts."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from src.base.timing import clock, cost, in_turns
from src.eval_utils import model_device, peak_memory_gb, reset_peak_memory
from src.journeys import collection, measures, store, tables
from src.journeys.sample import Sample
from src.routing_extractor import TopKExtractor, router_shape


def collecting_cost(
    model: nn.Module, tokenizer, count: int, prompt_tokens: int, batch_problems: int, rounds: int, seed: int
) -> dict:
    """Plain forwards of `count` HumanEval prompts against what journeys/01 does with them, in turns.

    These are the same forwards, left-padded and batched by length, with the routers read, journeys made, and a shard
    written to a temporary folder. Returns the figures of `timing.cost`, and what was run.
    """
    device, shape = model_device(model), router_shape(model)
    if device.type == "cpu":
        model.set_experts_implementation("eager")  # as journeys/01 does
    problems = collection.load_problems("humaneval", count, seed).problems
    prompts = collection.encode_prompts(tokenizer, problems, prompt_tokens)
    rows, batches = sorted(prompts, key=len, reverse=True), []
    for start in range(0, len(rows), batch_problems):
        part = rows[start : start + batch_problems]
        ids = torch.tensor([[0] * (len(part[0]) - len(row)) + row for row in part], device=device)
        real = torch.tensor([[0] * (len(part[0]) - len(row)) + [1] * len(row) for row in part], device=device)
        batches.append({"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)})

    def forwards():
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    def collect(folder):
        with TopKExtractor(model) as extractor:
            recorded = collection.collect(model, extractor, prompts, batch_size=batch_problems)
        journeys = collection.to_journeys("humaneval", problems, recorded, tokenizer, "benchmark", shape)
        store.write_shard(Path(folder) / store.shard_name("humaneval", 0), journeys)

    with tempfile.TemporaryDirectory() as folder:
        runs = {"plain": lambda: clock(forwards, device), "other": lambda: clock(lambda: collect(folder), device)}
        seconds = in_turns(runs, rounds)
    counts = {"tokens": sum(map(len, prompts)), "problems": len(problems), "batch_size": batch_problems}
    return cost(**seconds) | counts


def analysis_speed(count: int, seed: int, rounds: int, loops: bool = True) -> dict:
    """Seconds of four analyses of random journeys in arrays (median), and of everything that journeys/02 computes.

    `loops` measures the same four in loops as well (once), and how far both results differ.
    """
    sample = random_journeys(count, seed)
    num_layers, num_experts = len(sample.layers), sample.num_experts
    reset_peak_memory("cpu")
    arrays = in_arrays(sample)  # warm-up
    seconds = np.median([clock(lambda: in_arrays(sample)) for _ in range(rounds)])
    figures = {
        "journeys": count,
        "layers": num_layers,
        "experts": num_experts,
        "seconds": seconds,
        "analysis_seconds": clock(lambda: tables.analyze(sample, tables.Settings(seed=seed))),
        "memory_gb": peak_memory_gb("cpu"),
    }
    if loops:
        looped: list[np.ndarray] = []
        journeys = [
            [{"layer": layer, "experts": pair} for layer, pair in enumerate(journey)]
            for journey in sample.experts.tolist()
        ]
        loop_seconds = clock(lambda: looped.extend(in_loops(journeys, num_layers, num_experts)))
        differences = [np.abs(a - b).max() for a, b in zip(arrays, looped, strict=True)]
        figures |= {"loop_seconds": loop_seconds, "speedup": loop_seconds / seconds}
        figures["largest_difference"] = max(differences)
    return figures


def random_journeys(count: int, seed: int, num_layers: int = 32, num_experts: int = 8) -> Sample:
    """Journeys of Mixtral's shape, top 2: an expert follows from the one before it in 4 of 10 layers; two domains."""
    rng = np.random.default_rng(seed)
    experts = np.empty((count, num_layers, 2), dtype=np.uint8)
    gates = np.empty((count, num_layers, 2), dtype=np.float16)
    column = rng.integers(0, num_experts, count, dtype=np.uint8)
    for layer in range(num_layers):
        if layer:
            follows = rng.permutation(num_experts).astype(np.uint8)[column]
            drawn = rng.integers(0, num_experts, count, dtype=np.uint8)
            column = np.where(rng.random(count, dtype=np.float32) < 0.4, follows, drawn)
        experts[:, layer, 0] = column
        experts[:, layer, 1] = (column + rng.integers(1, num_experts, count, dtype=np.uint8)) % num_experts
        gates[:, layer, 0] = 0.5 + 0.5 * rng.random(count, dtype=np.float32)
        gates[:, layer, 1] = 1 - gates[:, layer, 0].astype(np.float32)
    length = 135  # tokens of a problem: 44,283 journeys make 328 problems
    problems = np.arange(count) // length
    return Sample(
        experts=experts,
        gating_probs=gates,
        num_experts=num_experts,
        layers=tuple(range(num_layers)),
        domains=(problems > problems[-1] // 2).astype(np.int64),
        domain_names=("a", "b"),
        problem_ids=problems,
        clusters=problems,
        token_idx=np.arange(count) % length,
        tokens=rng.zipf(1.3, count) % 4096,
        token_ids=np.arange(4096),
        token_names=tuple(str(token) for token in range(4096)),
    )


def in_arrays(sample: Sample) -> list[np.ndarray]:
    """Distribution [L, E] in percent, affinity [L, L], hop accuracy [L-1], correlation of ids [L, L]."""
    counts = measures.expert_counts(sample.experts, sample.num_experts)[:, 0]
    columns = measures.strongest(sample.experts, sample.num_experts)
    transitions = measures.transition_counts(columns, sample.num_experts)
    return [
        100 * counts / counts.sum(axis=1, keepdims=True),
        measures.affinity(transitions)["reference"],
        measures.hop_accuracy(transitions)[0],
        measures.id_correlation(transitions),
    ]


def in_loops(journeys: list[list[dict]], num_layers: int, num_experts: int) -> list[np.ndarray]:
    """The same as `in_arrays` the plain way, from a list of one dict per layer for each journey."""
    usage = np.zeros((num_layers, num_experts))
    ids = np.zeros((len(journeys), num_layers))
    for row, journey in enumerate(journeys):
        for step in journey:
            usage[step["layer"], step["experts"][0]] += 1
            ids[row, step["layer"]] = step["experts"][0]

    def transitions(source: int, target: int) -> np.ndarray:
        table = np.zeros((num_experts, num_experts))
        for journey in journeys:
            table[journey[source]["experts"][0], journey[target]["experts"][0]] += 1
        return table / np.maximum(table.sum(axis=1, keepdims=True), 1)

    related = np.zeros((num_layers, num_layers))
    for source in range(num_layers):
        for target in range(num_layers):
            if target != source:
                related[source, target] = transitions(source, target).max(axis=1).mean()
    accuracy = []
    for hop in range(1, num_layers):
        right = tried = 0
        for source in range(num_layers - hop):
            best = transitions(source, source + hop).argmax(axis=1)
            for journey in journeys:
                right += best[journey[source]["experts"][0]] == journey[source + hop]["experts"][0]
                tried += 1
        accuracy.append(right / tried)
    return [100 * usage / usage.sum(axis=1, keepdims=True), related, np.array(accuracy), np.corrcoef(ids.T)]

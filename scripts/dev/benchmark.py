"""Speed of perplexity against the machine's bare matrix products, what capturing router signals costs, and the speed
of the journey analyses against plain loops.

    python benchmark.py eval       tokens per second of score_documents, of its matrix products alone, the ratio
    python benchmark.py capture    a forward with RoutingExtractor against the plain forward
    python benchmark.py collect    collecting and storing journeys, as 08 does, against the plain forwards
    python benchmark.py journeys   distribution, affinity, hops and correlation of random journeys (32 layers,
                                8 experts) in arrays and in loops over dicts; no model is needed

They measure what they compare in one run (models in turns), so that a machine that slows down slows down both,
and print one JSON line at the end. Stop everything else that runs on the machine before believing a figure.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import config
from src.base import results, text_data
from src.eval_utils import WindowRef, model_device, peak_memory_gb, reset_peak_memory, score_documents
from src.journeys import collection, measures, store, tables
from src.journeys.sample import Sample
from src.models import costs
from src.models.families import context_length, memory_estimate
from src.models.loading import load_model
from src.routing_extractor import RoutingExtractor, TopKExtractor, router_shape


def parse_arguments():
    parser = results.ArgumentParser("Speed of perplexity, of capturing router signals, and of the journey analyses.")
    parser.add_argument("what", choices=("eval", "capture", "collect", "journeys"), help="what to measure")
    parser.add_argument(
        "--model", help=f"a shipped name, a folder or a hub name ({config.MODEL_NAME}; collect {config.JOURNEY_MODEL})"
    )
    parser.add_argument("--device", default=config.DEVICE, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default=config.DTYPE, help="auto, float32, float16 or bfloat16")
    parser.add_argument("--dataset", default=config.EVAL_DATASET, help="eval: text, as in 05")
    parser.add_argument("--documents", type=int, default=24, help="eval: documents to score; collect: problems")
    parser.add_argument("--max-seq-len", type=int, help="tokens per window or forward (default: the config's)")
    parser.add_argument("--stride", type=int, help="eval: tokens between windows (default: the config's)")
    parser.add_argument(
        "--batch-size", type=int, help="rows per forward (default: eval the config's, capture 1, collect 8)"
    )
    parser.add_argument(
        "--repeats", type=int, help="rounds (default: 5 for eval and journeys, 31 for capture, 15 for collect)"
    )
    parser.add_argument("--journeys", type=int, help="journeys: how many (default: 44283, quick 2000)")
    parser.add_argument("--no-loops", action="store_true", help="journeys: leave the loops out (for many journeys)")
    parser.add_argument("--quick", action="store_true", default=config.QUICK, help="less of everything, 3 rounds")
    parser.add_argument("--seed", type=int, default=config.SEED, help="documents, random tokens and journeys")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.documents = arguments.repeats or 3, min(arguments.documents, 4)
    if arguments.repeats is None:
        arguments.repeats = {"capture": 31, "collect": 15}.get(arguments.what, 5)
    if arguments.journeys is None:
        arguments.journeys = 2000 if arguments.quick else 44_283
    if arguments.batch_size is None:
        arguments.batch_size = {"eval": config.EVAL_BATCH_SIZE, "collect": 8}.get(arguments.what, 1)
    if arguments.model is None:
        arguments.model = config.JOURNEY_MODEL if arguments.what == "collect" else config.MODEL_NAME
    for name in ("documents", "max_seq_len", "stride", "batch_size", "repeats", "journeys"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise results.UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if arguments.stride and arguments.max_seq_len and arguments.stride > arguments.max_seq_len:
        raise results.UserError(f"--stride is {arguments.stride}, more than --max-seq-len {arguments.max_seq_len}")
    return arguments


def clock(device: torch.device, run) -> float:
    """Wall seconds of `run()`, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


# ---- eval


class Products:
    """The matrix products of a scoring run, recorded once and replayed alone, on buffers that exist already.

    Linear layers are replayed with the model's own weights in their own order; attention as q k^T and p v over the full
    T x T square of every batch, each head for itself. Nothing elementwise runs, nothing is allocated or checked.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = model
        self.device = device
        self.dtype = model.dtype
        self.linear: list[tuple[torch.Tensor, int]] = []
        self.attention: list[tuple[int, int]] = []
        self.positions = self.padding = 0
        self.buffers: dict[tuple[int, ...], torch.Tensor] = {}
        self.shape = costs.model_shape(model.config)

    def on_batch(self, rows: list[WindowRef]) -> None:
        longest = max(row.length for row in rows)
        self.attention.append((len(rows), longest))
        self.positions += len(rows) * longest
        self.padding += len(rows) * longest - sum(row.length for row in rows)

    def record(self, score) -> None:
        """Run `score(on_batch)` and note every product."""

        def note(module, arguments):
            self.linear.append((self._weight(module), arguments[0].shape[:-1].numel()))

        linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(note) for module in linears]
        try:
            score(self.on_batch)
        finally:
            for handle in handles:
                handle.remove()

    def _weight(self, module: nn.Linear) -> torch.Tensor:
        # 8-bit weights compute in the model's type
        return module.weight if module.weight.is_floating_point() else self._buffer("weight", *module.weight.shape)

    def _buffer(self, role: str, *shape: int) -> torch.Tensor:
        key = (role, *shape)
        if key not in self.buffers:
            self.buffers[key] = torch.randn(shape, device=self.device, dtype=self.dtype)
        return self.buffers[key]

    def replay_linear(self) -> None:
        for weight, rows in self.linear:
            outputs, inputs = weight.shape
            torch.mm(self._buffer("in", rows, inputs), weight.t(), out=self._buffer("out", rows, outputs))

    def replay_attention(self) -> None:
        heads, head_dim, v_head_dim = (
            getattr(self.shape.attention, n) for n in ("num_heads", "head_dim", "v_head_dim")
        )
        for rows, tokens in self.attention:
            many = rows * heads
            query, key = (self._buffer(role, many, tokens, head_dim) for role in ("query", "key"))
            value, output = (self._buffer(role, many, tokens, v_head_dim) for role in ("value", "mixed"))
            scores = self._buffer("scores", many, tokens, tokens)
            for _ in range(self.shape.num_layers):
                torch.bmm(query, key.transpose(1, 2), out=scores)
                torch.bmm(scores, value, out=output)


def benchmark_eval(model, tokenizer, arguments) -> dict:
    """Seconds of scoring and of its products alone, in turns; the ratio is the median over the rounds."""
    context = context_length(model)
    seq_len = arguments.max_seq_len or min(config.MAX_SEQ_LEN, context)
    stride = arguments.stride or min(config.EVAL_STRIDE, seq_len)
    if seq_len > context:
        raise results.UserError(f"--max-seq-len is {seq_len}, the model's context is {context}")
    documents = text_data.load_documents(arguments.dataset, "evaluation", arguments.seed, arguments.documents)
    documents = text_data.tokenize(documents, tokenizer, config.MAX_EVAL_DOCUMENT_TOKENS)
    device = model_device(model)

    def score(on_batch=None):
        return score_documents(model, documents, seq_len, stride, arguments.batch_size, on_batch=on_batch)

    products = Products(model, device)
    with torch.no_grad():
        products.record(score)
        tokens = int(score().tokens.sum())
        clock(device, products.replay_linear), clock(device, products.replay_attention)  # warm-up: makes the buffers
        rounds = []
        for _ in tqdm(range(arguments.repeats), desc="rounds", file=sys.stderr):
            seconds = clock(device, score)
            linear, attention = clock(device, products.replay_linear), clock(device, products.replay_attention)
            rounds.append((seconds, linear, attention))
    seconds, linear, attention = np.array(rounds).T
    ratios = (linear + attention) / seconds
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / np.median(seconds),
        "matmul_tokens_per_second": tokens / np.median(linear + attention),
        "ratio": np.median(ratios),
        "ratio_lowest": ratios.min(),
        "ratio_highest": ratios.max(),
        # as above, were half of the attention square free: what a causal kernel could save
        "ratio_causal": np.median((linear + attention / 2) / seconds),
        "attention_share": np.median(attention / (linear + attention)),
        "padding_share": products.padding / products.positions,
        "positions_per_token": products.positions / tokens,
        "max_seq_len": seq_len,
        "stride": stride,
        "batch_size": arguments.batch_size,
    }


# ---- capture and collect


def in_turns(plain, other, repeats: int) -> dict:
    """Seconds of two runs in turns (A B, B A, ...), each a function that returns its seconds; the ratio is the median
    over the pairs."""
    pairs = []
    with torch.no_grad():
        plain(), other()  # warm-up
        for index in tqdm(range(repeats), desc="pairs", file=sys.stderr):
            if index % 2:
                second = other()
                pairs.append((plain(), second))
            else:
                pairs.append((plain(), other()))
    without, captured = np.array(pairs).T
    low, median, high = np.quantile(captured / without, [0.25, 0.5, 0.75])
    return {
        "plain_seconds": np.median(without),
        "capture_seconds": np.median(captured),
        "ratio": median,
        "ratio_quartiles": [low, high],
        "cost_percent": 100 * (median - 1),
    }


def benchmark_capture(model, arguments) -> dict:
    """Forwards without and with RoutingExtractor, in turns."""
    seq_len = arguments.max_seq_len or min(config.MAX_SEQ_LEN, context_length(model))
    device = model_device(model)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(arguments.seed).integers(0, vocab_size, (arguments.batch_size, seq_len))
    input_ids = torch.from_numpy(ids).to(device)

    def forward():
        model(input_ids=input_ids, use_cache=False)

    def plain():
        return clock(device, forward)

    def capture():
        with RoutingExtractor(model):
            return clock(device, forward)

    return in_turns(plain, capture, arguments.repeats) | {
        "tokens": int(input_ids.numel()),
        "max_seq_len": seq_len,
        "batch_size": arguments.batch_size,
    }


def benchmark_collect(model, tokenizer, arguments) -> dict:
    """Plain forwards of HumanEval prompts against what 08 does with them, in turns: the same forwards, left-padded and
    batched by length, with the routers read, journeys made, and a shard written to a temporary folder."""
    device, shape = model_device(model), router_shape(model)
    if device.type == "cpu":
        model.set_experts_implementation("eager")  # as 08 does
    problems = collection.load_problems("humaneval", arguments.documents, arguments.seed).problems
    longest = arguments.max_seq_len or min(config.JOURNEY_MAX_TOKENS, context_length(model))
    prompts = collection.encode_prompts(tokenizer, problems, longest)

    batches = []
    rows = sorted(prompts, key=len, reverse=True)
    for start in range(0, len(rows), arguments.batch_size):
        part = rows[start : start + arguments.batch_size]
        ids = torch.tensor([[0] * (len(part[0]) - len(row)) + row for row in part], device=device)
        real = torch.tensor([[0] * (len(part[0]) - len(row)) + [1] * len(row) for row in part], device=device)
        batches.append({"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)})

    def forwards():
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    def plain():
        return clock(device, forwards)

    def collect(folder: str):
        with TopKExtractor(model) as extractor:
            recorded = collection.collect(model, extractor, prompts, batch_size=arguments.batch_size)
        rows = collection.to_journeys(
            "humaneval", problems, recorded, tokenizer, arguments.model, shape.layers, shape.num_experts,
            padded=shape.top_k is None,
        )  # fmt: skip
        store.write_shard(Path(folder) / store.shard_name("humaneval", 0), rows)

    with tempfile.TemporaryDirectory() as folder:
        figures = in_turns(plain, lambda: clock(device, lambda: collect(folder)), arguments.repeats)
    return figures | {"tokens": sum(map(len, prompts)), "problems": len(problems), "batch_size": arguments.batch_size}


# ---- journeys


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
    """The same as `in_arrays` the plain way: a journey is a list of one dict per layer, and all loops go over them."""
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


def benchmark_journeys(arguments) -> dict:
    """Seconds of the same four analyses in arrays (median) and in loops (once), and of everything that 09 computes."""
    sample = random_journeys(arguments.journeys, arguments.seed)
    device = torch.device("cpu")
    reset_peak_memory(device)
    in_arrays(sample)  # warm-up
    seconds = float(np.median([clock(device, lambda: in_arrays(sample)) for _ in range(arguments.repeats)]))
    whole = clock(device, lambda: tables.analyze(sample, tables.Settings(seed=arguments.seed)))
    figures = {
        "journeys": arguments.journeys,
        "layers": len(sample.layers),
        "experts": sample.num_experts,
        "seconds": seconds,
        "analysis_seconds": whole,
        "memory_gb": peak_memory_gb(device),
    }
    if arguments.no_loops:
        return figures
    journeys = [
        [{"layer": layer, "experts": pair} for layer, pair in enumerate(journey)] for journey in sample.experts.tolist()
    ]
    looped = []
    loop_seconds = clock(device, lambda: looped.extend(in_loops(journeys, len(sample.layers), sample.num_experts)))
    differences = [np.abs(a - b).max() for a, b in zip(in_arrays(sample), looped, strict=True)]
    return figures | {
        "loop_seconds": loop_seconds,
        "speedup": loop_seconds / seconds,
        "largest_difference": float(max(differences)),
    }


def report(figures: dict) -> None:
    """The JSON line, numbers to 5 digits."""
    rounded = {
        name: [float(f"{v:.5g}") for v in value] if isinstance(value, list) else value
        for name, value in figures.items()
    }
    print("no files written")
    print(json.dumps({name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in rounded.items()}))


def main() -> None:
    arguments = parse_arguments()
    if arguments.what == "journeys":
        figures = benchmark_journeys(arguments)
        print(
            f"distribution, affinity, hops, correlation of {figures['journeys']:,} journeys: {figures['seconds']:.2f} s"
            + (f", {figures['speedup']:,.0f} times less than in loops" if "speedup" in figures else "")
            + f"; everything that 09 computes: {figures['analysis_seconds']:.2f} s"
        )
        report({"benchmark": arguments.what, "repeats": arguments.repeats} | figures)
        return
    model, tokenizer = load_model(
        arguments.model,
        arguments.device,
        arguments.dtype,
        cache_dir=config.MODEL_CACHE_DIR,
        max_memory_gb=config.MAX_MEMORY_GB,
        use_8bit_fallback=config.USE_8BIT_FALLBACK,
    )
    tokens = arguments.batch_size * (arguments.max_seq_len or min(config.MAX_SEQ_LEN, context_length(model)))
    print(memory_estimate(model, tokens), file=sys.stderr)
    if arguments.what == "eval":
        figures = benchmark_eval(model, tokenizer, arguments)
        print(
            f"perplexity runs at {figures['tokens_per_second']:,.0f} tokens/s; its matrix products alone at "
            f"{figures['matmul_tokens_per_second']:,.0f} tokens/s: {100 * figures['ratio']:.0f} % of what they allow"
        )
    elif arguments.what == "collect":
        figures = benchmark_collect(model, tokenizer, arguments)
        print(f"collecting and storing journeys costs {figures['cost_percent']:+.1f} % of the plain forwards")
    else:
        figures = benchmark_capture(model, arguments)
        print(f"capturing router signals costs {figures['cost_percent']:+.1f} % of a forward")
    common = {
        "benchmark": arguments.what,
        "model": arguments.model,
        "device": str(model_device(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
    }
    report(common | figures)


if __name__ == "__main__":
    results.run_main(main)

"""Speed of perplexity against the machine's bare matrix products, what capturing router signals costs, and the speed
of the journey analyses against plain loops.

    python scripts/dev/benchmark.py eval       tokens per second of scoring, of its matrix products alone, the ratio
    python scripts/dev/benchmark.py capture    a forward with RoutingExtractor against the plain forward
    python scripts/dev/benchmark.py collect    collecting and storing journeys, as journeys/01 does, against the plain
                                               forwards
    python scripts/dev/benchmark.py journeys   distribution, affinity, hops and correlation of random journeys (32
                                               layers, 8 experts) in arrays and in loops over dicts; needs no model

They measure what they compare in one run, in turns, and print one JSON line at the end, which --save keeps. Stop
everything else that runs on the machine before believing a figure. Flags: `benchmark.py eval --help`.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import config
from src.base import cli

COMMON = ("quick", "seed", "repeats", "save")
MODEL = (*cli.MODEL_FLAGS, *COMMON)
# The flags of each command.
COMMANDS = {
    "eval": (*MODEL, "dataset", "documents", "document_tokens", "window_tokens", "stride", "batch_windows"),
    "capture": (*MODEL, "window_tokens", "batch_windows"),
    "collect": (*MODEL, "problems", "prompt_tokens", "batch_problems"),
    "journeys": (*COMMON, "journeys", "no_loops"),
}
# Defaults that no setting has: in full, and in a quick run.
DEFAULTS = {
    "eval": {"documents": (24, 4), "repeats": (5, 3)},
    "capture": {"batch_windows": (1, 1), "repeats": (31, 3)},
    "collect": {"problems": (24, 4), "repeats": (15, 3)},
    "journeys": {"journeys": (44_283, 2_000), "repeats": (5, 3)},
}


def read_arguments(argv: list[str]):
    """The command and its flags."""
    chooser = cli.Parser(__doc__)
    chooser.add_argument("command", choices=COMMANDS, help="What to measure; each command shows its flags with --help.")
    command = chooser.parse_args(argv[:1]).command
    quick = config.QUICK or "--quick" in argv
    defaults = {name: pair[quick] for name, pair in DEFAULTS[command].items()}
    settings = {"model": "JOURNEY_MODEL"} if command == "collect" else {}
    arguments = cli.parse(__doc__, config, COMMANDS[command], argv[1:], settings, defaults)
    arguments.command = command
    return arguments


def measure_eval(session) -> tuple[dict, str]:
    """Seconds of scoring and of its products alone; the ratio is the median over the rounds."""
    import numpy as np

    from src.base.timing import clock, in_turns
    from src.eval_utils import model_device, score_documents
    from src.models.matrix_products import MatrixProducts

    device = model_device(session.model)
    products = MatrixProducts(session.model, device)

    def score(on_batch=None):
        return score_documents(session.model, session.tokens["evaluation"], on_batch=on_batch, **session.windows)

    def note(rows):
        products.note_batch([row.length for row in rows])

    tokens = int(products.record(lambda: score(note)).tokens.sum())
    runs = {"score": score, "linear": products.replay_linear, "attention": products.replay_attention}
    seconds = in_turns(
        {name: lambda run=run: clock(run, device) for name, run in runs.items()}, session.arguments.repeats
    )
    scoring, linear, attention = seconds.values()
    ratios = (linear + attention) / scoring
    figures = {
        "tokens": tokens,
        "tokens_per_second": tokens / np.median(scoring),
        "matmul_tokens_per_second": tokens / np.median(linear + attention),
        "ratio": np.median(ratios),
        "ratio_lowest": ratios.min(),
        "ratio_highest": ratios.max(),
        # as "ratio", were half of the attention square free: what a causal kernel could save
        "ratio_causal": np.median((linear + attention / 2) / scoring),
        "attention_share": np.median(attention / (linear + attention)),
        "padding_share": products.padding / products.positions,
        "positions_per_token": products.positions / tokens,
    } | session.windows
    return figures, (
        f"perplexity runs at {figures['tokens_per_second']:,.0f} tokens/s; its matrix products alone at "
        f"{figures['matmul_tokens_per_second']:,.0f} tokens/s: {100 * figures['ratio']:.0f} % of what they allow"
    )


def measure_capture(session) -> tuple[dict, str]:
    """Forwards without and with RoutingExtractor."""
    import numpy as np
    import torch

    from src.base.timing import clock, cost, in_turns
    from src.eval_utils import model_device
    from src.routing_extractor import RoutingExtractor

    model, device = session.model, model_device(session.model)
    rows, length = session.windows["batch_size"], session.windows["max_seq_len"]
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(session.arguments.seed).integers(0, vocab_size, (rows, length))
    ids = torch.from_numpy(ids).to(device)

    def plain():
        return clock(lambda: model(input_ids=ids, use_cache=False), device)

    def capture():
        with RoutingExtractor(model):
            return plain()

    seconds = in_turns({"plain": plain, "other": capture}, session.arguments.repeats)
    figures = cost(**seconds) | {"tokens": ids.numel(), "max_seq_len": length, "batch_size": rows}
    return figures, f"capturing router signals costs {figures['cost_percent']:+.1f} % of a forward"


def measure_collect(session) -> tuple[dict, str]:
    """Plain forwards of HumanEval prompts against collecting and storing their journeys."""
    from src.journeys.speed import collecting_cost

    arguments, longest = session.arguments, session.windows["max_seq_len"]
    figures = collecting_cost(
        session.model, session.tokenizer, arguments.problems, min(arguments.prompt_tokens, longest),
        arguments.batch_problems, arguments.repeats, arguments.seed,
    )  # fmt: skip
    return figures, f"collecting and storing journeys costs {figures['cost_percent']:+.1f} % of the plain forwards"


def measure_journeys(arguments) -> tuple[dict, str]:
    """The four main analyses of random journeys in arrays and in loops, and everything that journeys/02 computes."""
    from src.journeys.speed import analysis_speed

    figures = analysis_speed(arguments.journeys, arguments.seed, arguments.repeats, loops=not arguments.no_loops)
    loops = f", {figures['speedup']:,.0f} times less than in loops" if "speedup" in figures else ""
    return figures, (
        f"distribution, affinity, hops, correlation of {arguments.journeys:,} journeys: {figures['seconds']:.2f} s"
        f"{loops}; everything that journeys/02 computes: {figures['analysis_seconds']:.2f} s"
    )


def rounded(figures: dict) -> dict:
    """The figures, fractions to 5 digits."""
    plain = {name: getattr(value, "tolist", lambda value=value: value)() for name, value in figures.items()}
    return json.loads(json.dumps(plain), parse_float=lambda text: float(f"{float(text):.5g}"))


def main() -> None:
    arguments = read_arguments(sys.argv[1:])
    import torch

    from src.base import results

    started = time.time()
    common = {"benchmark": arguments.command, "repeats": arguments.repeats}
    with torch.no_grad():
        if arguments.command == "journeys":
            seeds = {"seed": arguments.seed}
            meta = results.run_meta(cli.recorded(arguments), None, None, seeds, started, "cpu", "float64")
            figures, said = measure_journeys(arguments)
        else:
            from src.hybrid.session import open_session
            from src.models.families import memory_estimate

            arguments.output_dir = config.OUTPUT_DIR
            counts = {"evaluation": arguments.documents} if arguments.command == "eval" else {}
            session = open_session(arguments, counts)
            windows = session.windows
            tokens = windows["batch_size"] * windows["max_seq_len"]
            print(memory_estimate(session.model, tokens), file=sys.stderr)
            meta = session.meta(threads=torch.get_num_threads())
            common |= {key: meta[key] for key in ("device", "dtype")}
            common |= {"model": arguments.model, "threads": torch.get_num_threads()}
            measure = {"eval": measure_eval, "capture": measure_capture, "collect": measure_collect}
            figures, said = measure[arguments.command](session)
    print(said)
    figures = rounded(common | figures)
    if arguments.save:
        path = results.write_json(arguments.save / f"{arguments.command}.json", figures, meta)
        print(f"wrote {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    cli.run_main(main)

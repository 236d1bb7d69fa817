"""What scripts 03 to 10 open alike: model, text, windows, sidecars, what earlier runs kept, provenance of results."""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from src import eval_utils
from src.base import cli, results, text_data
from src.base.reuse import Pieces
from src.base.text_data import Document, TokenDocument
from src.eval_utils import Reference
from src.hybrid import ledger
from src.hybrid.layer import attachment_of, base_logits, is_attached
from src.models.families import context_length, decoder_layers, memory_estimate, resolve_layers
from src.models.loading import load_model, model_identity


@dataclass
class Session:
    """A model and its text, opened for one run.

    arguments: the command line, as `cli.parse` gives it. folder: where this model's results go. texts, tokens: the
    documents of each split, and their tokens. windows: max_seq_len, stride and batch_size of `score_documents`.
    pieces: what earlier runs measured. identity, data: which model and which text these are. started: epoch seconds.
    """

    arguments: argparse.Namespace
    folder: Path
    model: nn.Module
    tokenizer: Any
    texts: dict[str, list[Document]]
    tokens: dict[str, list[TokenDocument]]
    windows: dict[str, int]
    pieces: Pieces
    identity: dict
    data: dict[str, dict]
    started: float

    def meta(self, sidecars: object = None, **arguments: Any) -> dict:
        """Provenance for the write functions of `results`: what the arguments came to, the model, the text, the seeds.

        `sidecars` says which ones were used; `arguments` replace or add to those of the command line.
        """
        model = self.identity if sidecars is None else self.identity | {"sidecars": sidecars}
        windows = {"window_tokens": self.windows["max_seq_len"], "stride": self.windows["stride"]}
        return results.run_meta(
            cli.recorded(self.arguments) | windows | arguments, model, self.data, {"seed": self.arguments.seed},
            self.started, eval_utils.model_device(self.model), self.model.dtype,
        )  # fmt: skip

    def read(self, name: str, split: str, count: int | None) -> None:
        """Read further text of a split, `count` documents or all, under a name of its own."""
        self.keep(name, text_data.load_documents(self.arguments.dataset, split, self.arguments.seed, count))

    def keep(self, name: str, documents: list[Document]) -> None:
        """Hold documents under a name, and say where they are not the ones that the shipped results were made on."""
        self.texts[name], self.data[name] = documents, text_data.identity(documents)
        self.tokens[name] = text_data.tokenize(documents, self.tokenizer, self.arguments.document_tokens)
        if self.data[name]["matches"] is False:
            print(f"note: the {name} text differs from the recorded one: {self.data[name]['hint']}", file=sys.stderr)

    def text_key(self, split: str) -> dict[str, Any]:
        """What a piece that was measured on a split's text depends on."""
        return {"text": self.data[split]["sha256"], "document_tokens": self.arguments.document_tokens}

    def score(
        self, label: str, depends: Mapping[str, Any], split: str = "evaluation", reference: Reference | None = None
    ) -> pd.DataFrame:
        """Sums per document (`document_table`) of the model as it stands, gate and all; kept under what it depends on.

        Where sidecars are attached they are told which document each row of a batch holds.
        """

        def compute() -> dict:
            scores = eval_utils.score_documents(
                self.model, self.tokens[split], reference=reference,
                on_batch=attachment_of(self.model).on_batch if is_attached(self.model) else None,
                progress=label, **self.windows,
            )  # fmt: skip
            return document_table(scores).to_dict("list") | {"tokens_per_second": scores.tokens_per_second}

        content = self.pieces.content(label, self.text_key(split) | dict(depends), compute)
        return pd.DataFrame(content).drop(columns="tokens_per_second")

    def speed(self, label: str, depends: Mapping[str, Any]) -> dict[str, float]:
        """tokens_per_second and memory_gb of scoring the longest documents with the model as it stands, and
        decode_tokens_per_second."""

        def compute() -> dict:
            speed = ledger.measure(self.model, ledger.speed_sample(self.tokens["evaluation"]), **self.windows)
            return speed | {"decode_tokens_per_second": eval_utils.decode_speed(self.model, repeats=2)}

        return self.pieces.content(label, self.text_key("evaluation") | dict(depends), compute)

    def generate(
        self, label: str, depends: Mapping[str, Any], prompts: Sequence[str], prepare: Callable[[], None] | None = None
    ) -> list[str]:
        """Greedy continuations of prompts by the model as it stands, after `prepare` where they are missing."""
        tokens, seed = self.arguments.new_tokens, self.arguments.seed

        def compute() -> dict:
            if prepare is not None:
                prepare()
            texts = eval_utils.generate_texts(self.model, self.tokenizer, prompts, max_new_tokens=tokens, seed=seed)
            return {"texts": texts}

        settings = {"prompts": list(prompts), "new_tokens": tokens, "generation_seed": seed}
        return self.pieces.content(label, settings | dict(depends), compute)["texts"]

    def active_experts(self) -> list[float]:
        """The fraction of experts that a token activates, mean per layer, on the documents that speeds are measured on.

        Measuring it is also what warms the model up before its speed is measured.
        """
        windows = self.windows["max_seq_len"], self.windows["batch_size"]

        def compute() -> dict:
            sample = ledger.speed_sample(self.tokens["evaluation"])
            return {"active": ledger.active_experts(self.model, sample, *windows)}

        return self.pieces.content("active experts", self.text_key("evaluation"), compute)["active"]

    def layers(self) -> list[int]:
        """The layers that --layers names."""
        return resolve_layers(self.arguments.layers, len(decoder_layers(self.model)))

    def say_reused(self) -> None:
        """Say which pieces were taken from an earlier run, and which were computed again and why."""
        print(self.pieces.report())

    def scored_tokens(self, split: str = "evaluation") -> int:
        """Tokens of a split that are scored: all but the first of each document."""
        return sum(len(document.ids) - 1 for document in self.tokens[split])


def open_session(
    arguments: argparse.Namespace, counts: Mapping[str, int | None], window_tokens: int | None = None
) -> Session:
    """Load the text and the model that a command line asks for.

    `counts` has the number of documents of each split that is needed, None for all of them. `window_tokens`, where
    given, takes the place of the command line's (see `with_shorter_windows`).
    """
    started = time.time()
    folder = results.output_dir(arguments.output_dir, arguments.model, arguments.quick)
    texts = {
        split: text_data.load_documents(arguments.dataset, split, arguments.seed, count)
        for split, count in counts.items()
    }
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, cache_dir=arguments.cache_dir,
        max_memory_gb=arguments.max_memory_gb, use_8bit_fallback=arguments.use_8bit_fallback,
    )  # fmt: skip
    context = context_length(model)
    wanted = window_tokens or getattr(arguments, "window_tokens", context)
    length = min(wanted, context)
    windows = {
        "max_seq_len": length,
        "stride": min(getattr(arguments, "stride", length), length),
        "batch_size": getattr(arguments, "batch_windows", 1),
    }
    identity = model_identity(model, arguments.model, arguments.cache_dir)
    common = {
        "model": identity["sha256"], "dtype": identity["dtype"], "device": eval_utils.model_device(model).type,
        "windows": windows,
    }  # fmt: skip
    pieces = Pieces(folder / "pieces", common, getattr(arguments, "restart", False))
    session = Session(arguments, folder, model, tokenizer, {}, {}, windows, pieces, identity, {}, started)
    for split, documents in texts.items():
        session.keep(split, documents)
    return session


def document_table(scores: eval_utils.Scores) -> pd.DataFrame:
    """Sums per document: document, domain, tokens, num_bytes, nll (nats), and kl (nats), top1 where measured."""
    sizes = {"tokens": scores.tokens, "num_bytes": scores.num_bytes, "nll": results.as_written(scores.nll)}
    table = pd.DataFrame({"document": scores.ids, "domain": scores.domains} | sizes)
    if scores.kl is not None:
        table["kl"], table["top1"] = results.as_written(scores.kl), scores.top1
    return table


def cached_reference(model: nn.Module, limit_gb: float) -> Reference:
    """reference(input_ids, attention_mask) -> the base model's logits [B, T, V], while sidecars are attached.

    They are kept up to `limit_gb` (1e9 bytes), because the batches of every pass over a text are the same.
    """
    kept: dict[tuple, torch.Tensor] = {}
    room = limit_gb * 1e9

    def reference(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        nonlocal room
        key = (tuple(input_ids.shape), input_ids.cpu().numpy().tobytes())
        if key in kept:
            return kept[key].to(input_ids.device)
        logits = base_logits(model, input_ids, attention_mask)
        if logits.nbytes <= room:
            room -= logits.nbytes
            kept[key] = logits.cpu()
        return logits

    return reference


def print_plan(session: Session, passes: int, splits: Sequence[str] = ("evaluation",), kept_gb: float = 0.0) -> None:
    """Say what is scored and how long it takes, before it starts.

    `passes` counts the passes over the text of `splits`, at the speed of the model without sidecars; the sidecars of a
    pass cost about half as much again. `kept_gb` is memory held besides the model's and a batch's.
    """
    for split in splits:
        counts = f"{len(session.tokens[split])} documents, {session.scored_tokens(split):,} scored tokens"
        print(f"{split} text {session.arguments.dataset}: {counts}")
    speed = session.pieces.content(
        "speed, for the estimate", session.text_key(splits[0]),
        lambda: ledger.measure(session.model, ledger.speed_sample(session.tokens[splits[0]]), **session.windows),
    )["tokens_per_second"]  # fmt: skip
    tokens = sum(session.scored_tokens(split) for split in splits)
    batch_tokens = session.windows["batch_size"] * session.windows["max_seq_len"]
    kept = f", kept logits up to {kept_gb:.1f} GB" if kept_gb else ""
    print(
        f"time estimate: {passes} passes over {tokens:,} tokens at about {speed / 1.5:,.0f} tokens/s, less what is "
        f"there already: at most {1.5 * tokens * passes / speed / 60:.1f} min\n"
        f"{memory_estimate(session.model, batch_tokens)}{kept}",
        flush=True,
    )


def with_shorter_windows(run: Callable[[int], None], arguments: argparse.Namespace) -> None:
    """run(window_tokens); after running out of GPU memory once more with `oom_window_tokens`, where that is shorter."""
    try:
        run(arguments.window_tokens)
        return
    except torch.OutOfMemoryError:
        if arguments.oom_window_tokens >= arguments.window_tokens:
            raise
    # Outside the except block, whose traceback would keep the first model alive.
    tokens, shorter = arguments.window_tokens, arguments.oom_window_tokens
    print(f"out of GPU memory at {tokens} tokens per window; trying again with {shorter}", flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    run(shorter)

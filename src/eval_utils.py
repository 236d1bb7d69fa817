"""Perplexity, agreement with a reference, generation, speed and memory of any causal language model.

Knows nothing of sidecars: what changes per batch (gates, offline masks) is told through `on_batch`.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from src.base.text_data import TokenDocument, Window, score_windows
from src.models.windows import evaluation_mode

# Batching (see `_batches`), in tokens: the most one batch holds on a CPU, the length from which padding is not worth it
# there, and the padding per row that is cheaper than another call of the model.
CPU_BATCH_TOKENS = 2048
CPU_LONG_WINDOW = 512
CPU_CALL_TOKENS = 16
GPU_CALL_TOKENS = 512
# Elements of one float32 chunk of log-probabilities: cache-sized on a CPU, 128 MB on a GPU.
CHUNK_ELEMENTS_CPU = 2**19
CHUNK_ELEMENTS_GPU = 2**25

Reference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class WindowRef:
    """What one row of a batch holds: `ids[start : start + length]` of a document, then right padding."""

    document: str
    start: int
    length: int


@dataclass(frozen=True)
class Scores:
    """Sums per document, in the order of the documents that were scored (N of them).

    Attributes:
        ids, domains: of each document.
        nll [N]: negative log-likelihood of all tokens but the prefix, summed, nats, float64.
        tokens [N]: scored tokens; a document's length without its prefix token.
        num_bytes [N]: UTF-8 bytes of the document's text.
        kl [N], top1 [N]: sum over scored positions of KL(reference || model) in nats, and the number of positions
            where both have the same most likely token; None without a reference. Divide by `tokens` for means.
        token_nll: per document, float32 [tokens]; entry j belongs to `ids[j + 1]`.
        seconds: wall time of the model's own forwards and scoring (the reference's forwards are not in it).
    """

    ids: list[str]
    domains: list[str]
    nll: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    kl: np.ndarray | None
    top1: np.ndarray | None
    token_nll: list[np.ndarray]
    seconds: float

    @property
    def nll_per_token(self) -> float:
        """Nats per token over all documents."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(nats per token) over all documents."""
        return float(np.exp(self.nll_per_token))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte over all documents."""
        return float(self.nll.sum() / np.log(2) / self.num_bytes.sum())

    @property
    def kl_per_token(self) -> float | None:
        """Mean KL(reference || model) in nats per token; None without a reference."""
        return None if self.kl is None else float(self.kl.sum() / self.tokens.sum())

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions where model and reference agree on the most likely token; None without a reference."""
        return None if self.top1 is None else float(self.top1.sum() / self.tokens.sum())

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second of the model's own time."""
        return float(self.tokens.sum() / self.seconds)


def score_documents(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    stride: int,
    batch_size: int = 8,
    reference: Reference | None = None,
    on_batch: Callable[[list[WindowRef]], None] | None = None,
    progress: str | None = None,
) -> Scores:
    """Score every token but the prefix exactly once, in windows of at most `max_seq_len` tokens.

    Windows are those of `text_data.score_windows`; they are sorted by length and batched under a budget of at most
    `batch_size * max_seq_len` tokens, padding included. Results do not depend on `batch_size` beyond rounding.
    `attention_mask` [B, T] marks the right padding. `on_batch` is told what each row holds before the forwards of the
    batch (reference first, then model). `reference(input_ids [B, T], attention_mask [B, T])` returns logits [B, T, V].
    `progress` is the label of a progress bar; None shows none.

    Raises ValueError for no documents, a document without a scored token, a batch size below 1 or a stride outside
    1..max_seq_len.
    """
    if not token_documents:
        raise ValueError("there is no document to score")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 1 <= stride <= max_seq_len:
        raise ValueError(f"stride is {stride}; it must lie in 1..max_seq_len = {max_seq_len}")
    for document in token_documents:
        if len(document.ids) < 2:
            raise ValueError(f"document {document.id!r} has no token to score")

    device = model_device(model)
    windows = [
        (index, window)
        for index, document in enumerate(token_documents)
        for window in score_windows(len(document.ids), max_seq_len, stride)
    ]
    token_nll = [np.full(len(document.ids) - 1, np.nan, dtype=np.float32) for document in token_documents]
    kl = np.zeros(len(token_documents)) if reference is not None else None
    top1 = np.zeros(len(token_documents), dtype=np.int64) if reference is not None else None
    seconds = 0.0
    total = sum(len(values) for values in token_nll)
    with (
        torch.no_grad(),
        evaluation_mode(model),
        tqdm(total=total, desc=progress, unit="tok", disable=progress is None, file=sys.stderr) as bar,
    ):
        for rows in _batches(windows, batch_size * max_seq_len, device):
            nll, divergence, agreement, taken = _score_batch(model, rows, token_documents, reference, on_batch)
            seconds += taken
            # rows lie one after another in the kept positions
            counts = [window.stop - window.first_scored for _, window in rows]
            stops = np.cumsum(counts)
            for (index, window), begin, end in zip(rows, stops - counts, stops, strict=True):
                token_nll[index][window.first_scored - 1 : window.stop - 1] = nll[begin:end]
                if reference is not None:
                    kl[index] += divergence[begin:end].double().sum().item()
                    top1[index] += int(agreement[begin:end].sum())
            bar.update(int(stops[-1]))
    return Scores(
        ids=[document.id for document in token_documents],
        domains=[document.domain for document in token_documents],
        nll=np.array([values.sum(dtype=np.float64) for values in token_nll]),
        tokens=np.array([len(values) for values in token_nll], dtype=np.int64),
        num_bytes=np.array([document.num_bytes for document in token_documents], dtype=np.int64),
        kl=kl,
        top1=top1,
        token_nll=token_nll,
        seconds=seconds,
    )


def _score_batch(
    model: nn.Module,
    rows: list[tuple[int, Window]],
    token_documents: Sequence[TokenDocument],
    reference: Reference | None,
    on_batch: Callable[[list[WindowRef]], None] | None,
) -> tuple[np.ndarray, torch.Tensor | None, torch.Tensor | None, float]:
    """(nll [N], KL [N], agreement [N], seconds of the model's own forward and scoring) of a batch's N kept positions.

    KL and agreement are None without a reference.
    """
    device = model_device(model)
    input_ids, attention_mask, keep, targets = (tensor.to(device) for tensor in _collate(rows, token_documents))
    if on_batch is not None:
        on_batch([WindowRef(token_documents[i].id, w.start, w.stop - 1 - w.start) for i, w in rows])
    reference_logits = None
    if reference is not None:
        reference_logits = _at(reference(input_ids, attention_mask), keep)
        synchronize(device)
    started = time.perf_counter()
    # handed on without a name: the logits of a batch must not outlive it
    nll, divergence, agreement = _score_positions(
        kept_logits(model, input_ids, attention_mask, keep), targets, reference_logits
    )
    values = nll.cpu().numpy()  # waits for the device, so the clock is the batch's own
    return values, divergence, agreement, time.perf_counter() - started


def kept_logits(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Logits [N, V] at the N positions where `keep` [B, T] is true, row by row.

    transformers' `logits_to_keep` takes the mask itself, so that no other position passes the head: with a vocabulary
    of 73k the head of padding and context would cost more memory than all layers.
    """
    takes_mask = "logits_to_keep" in inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": keep} if takes_mask else {}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra).logits
    return logits if logits.ndim == 2 else _at(logits, keep)


def _at(logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """logits [B, T, V] at the true positions of `keep` [B, T]: [N, V]; a view where all are kept."""
    return logits.flatten(0, 1) if bool(keep.all()) else logits[keep]


def model_device(model: nn.Module) -> torch.device:
    """Where the model takes its input: the device of its embeddings."""
    embeddings = model.get_input_embeddings()
    return next(embeddings.parameters()).device


def _batches(windows: list[tuple[int, Window]], budget: int, device: torch.device) -> list[list[tuple[int, Window]]]:
    """Group windows, longest first, so that rows * longest stays within `budget` and padding costs little.

    Padding does not only waste its own positions: without any, causal attention runs without a mask, which on a CPU
    saves a fifth of the time of a long window. So on a CPU long windows are batched with their equals only, and the
    activations of a batch have to fit the cache; on a GPU the overhead of a call is worth many padded positions.
    """
    cuda = device.type == "cuda"
    budget = budget if cuda else min(budget, CPU_BATCH_TOKENS)
    order = sorted(windows, key=lambda item: (item[1].start - item[1].stop, item[0], item[1].start))
    batches: list[list[tuple[int, Window]]] = []
    longest = 0
    for item in order:
        length = item[1].stop - 1 - item[1].start
        allowed_padding = max(longest // 8, GPU_CALL_TOKENS if cuda else CPU_CALL_TOKENS)
        if not cuda and longest > CPU_LONG_WINDOW:
            allowed_padding = 0
        if batches and (len(batches[-1]) + 1) * longest <= budget and longest - length <= allowed_padding:
            batches[-1].append(item)
        else:
            batches.append([item])
            longest = length
    return batches


def _collate(rows: list[tuple[int, Window]], token_documents: Sequence[TokenDocument]) -> tuple[torch.Tensor, ...]:
    """input_ids, attention_mask, keep (all [B, T]) and the targets [N] of the kept positions, right padded."""
    longest = max(window.stop - 1 - window.start for _, window in rows)
    input_ids = np.zeros((len(rows), longest), dtype=np.int64)
    attention_mask = np.zeros((len(rows), longest), dtype=np.int64)
    keep = np.zeros((len(rows), longest), dtype=bool)
    targets = []
    for row, (index, window) in enumerate(rows):
        ids = token_documents[index].ids
        length = window.stop - 1 - window.start
        input_ids[row, :length] = ids[window.start : window.stop - 1]
        attention_mask[row, :length] = 1
        # the logits at position p predict p + 1
        keep[row, window.first_scored - 1 - window.start : length] = True
        targets.append(ids[window.first_scored : window.stop])
    arrays = (input_ids, attention_mask, keep, np.concatenate(targets).astype(np.int64))
    return tuple(torch.from_numpy(array) for array in arrays)


def _score_positions(
    logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """NLL [N], KL(reference || model) [N] and top-1 agreement [N] from logits [N, V], float32, in chunks of positions.

    Chunks bound the float32 copies; on a CPU they also keep them in the cache.
    """
    elements = CHUNK_ELEMENTS_GPU if logits.device.type == "cuda" else CHUNK_ELEMENTS_CPU
    rows = max(1, elements // logits.shape[-1])
    nll, divergence, agreement = [], [], []
    for start in range(0, logits.shape[0], rows):
        chunk = logits[start : start + rows]
        log_probs = torch.log_softmax(chunk, dim=-1, dtype=torch.float32)
        nll.append(-log_probs.gather(-1, targets[start : start + rows, None]).squeeze(-1))
        if reference_logits is not None:
            reference_chunk = reference_logits[start : start + rows]
            reference_log_probs = torch.log_softmax(reference_chunk, dim=-1, dtype=torch.float32)
            divergence.append((reference_log_probs.exp() * (reference_log_probs - log_probs)).sum(-1))
            agreement.append(chunk.argmax(-1) == reference_chunk.argmax(-1))
    if reference_logits is None:
        return torch.cat(nll), None, None
    return torch.cat(nll), torch.cat(divergence).cpu(), torch.cat(agreement).cpu()


@contextlib.contextmanager
def _greedy(model: nn.Module, eos_token_id, pad_token_id: int, max_new_tokens: int):
    """Greedy decoding for the time of a `with`: a checkpoint's own sampling settings would otherwise be merged in."""
    saved = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = saved


def generate_texts(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """Greedy continuations of `prompts` (without the prompts), in their order, in left-padded batches, deterministic.

    Prompts are tokenised as the tokenizer does on its own, special tokens included; generation ends at the model's
    end-of-sequence token or after `max_new_tokens`. `seed` seeds torch's generators meanwhile, for models that draw.
    """
    pad = next(
        (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), 0
    )
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    device = model_device(model)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
    texts = []
    with torch.no_grad(), evaluation_mode(model), _greedy(model, eos, pad, max_new_tokens), _seeded(seed, device):
        for start in range(0, len(encoded), batch_size):
            rows = encoded[start : start + batch_size]
            longest = max(len(ids) for ids in rows)
            # padded here, not by the tokenizer, whose padding side and token would have to be changed and restored
            input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows], device=device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
            output = model.generate(input_ids=input_ids, attention_mask=mask)
            texts += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device):
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _random_ids(model: nn.Module, batch_size: int, num_tokens: int, seed: int) -> torch.Tensor:
    """[batch_size, num_tokens] seeded ids on the model's device."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(seed).integers(0, vocab_size, (batch_size, num_tokens))
    return torch.from_numpy(ids).to(model_device(model))


class _StepClock(StoppingCriteria):
    """Notes the time after every generated token; never stops."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def decode_speed(
    model: nn.Module,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 3,
    seed: int = 0,
) -> float:
    """Generated tokens per second of cached greedy `generate`, from the first new token to the last.

    The prefill, which yields the first token, is not in it. Median of `repeats` after one warm-up; random prompt, no
    end-of-sequence. Raises ValueError for fewer than two new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}; decoding speed needs at least 2")
    device = model_device(model)
    input_ids = _random_ids(model, batch_size, prompt_tokens, seed)
    times = []
    with torch.no_grad(), evaluation_mode(model), _greedy(model, None, 0, new_tokens):
        for _ in range(repeats + 1):
            clock = _StepClock(device)
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            times.append(clock.times[-1] - clock.times[0])
    return float(batch_size * (new_tokens - 1) / np.median(times[1:]))


def reset_peak_memory(device: torch.device | str) -> None:
    """Start a new peak for `peak_memory_gb`, on CUDA and on Linux; other systems keep the process's peak."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # 5 resets a process's own peak resident size (proc(5)); containers may mount /proc read-only
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(device: torch.device | str) -> float:
    """Peak memory in GB (1e9 bytes): allocated by torch on a CUDA device, else resident memory of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024 / 1e9
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, whose work is queued, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

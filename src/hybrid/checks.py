"""The hybrid layer's promises, measured on the model at hand: what script 04 shows before anything is trained.

Every check is a plain row: check, gate, passed, value, limit, unit, note. Logits are compared relative to the largest
absolute logit, because models differ in scale; `passed` is None for what is only reported.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef, model_device
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.cache import HybridCacheLayer
from src.hybrid.calibration import calibrate_gates
from src.hybrid.checkpoints import load_learned_gates
from src.hybrid.gates import FixedGate, Gate, LearnedGate, RandomGate, RoutingGate, is_hard
from src.hybrid.layer import attachment_of, record_gates, set_gate
from src.hybrid.sidecar import MambaSidecar, SidecarSettings, mamba_kernels, pytorch_scan
from src.models.families import decoder_layers, has_router

# Largest difference of logits over the largest logit, by number format, between ways to compute the same thing.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Tokens of the three test texts; the middle one is longer than a chunk of the scan and ends inside one.
LENGTHS = (33, 96, 61)
NEW_TOKENS = 8


@dataclass(frozen=True)
class Check:
    """One measured promise. `value` must not exceed `limit`; None where nothing could be measured."""

    check: str
    gate: str
    passed: bool | None
    value: float | None
    limit: float | None
    unit: str
    note: str = ""


def run_checks(
    model: nn.Module,
    layers: Sequence[int],
    documents: Sequence[TokenDocument],
    settings: SidecarSettings,
    sidecar_dir: str | Path | None = None,
    stage: str = "a",
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Measure all promises on a model without sidecars, which is left as it was.

    layers: that get sidecars; documents: texts to measure and calibrate on (three of at least 97 tokens). The sidecars
    are those of `sidecar_dir`, or untrained ones. Raises ValueError where the documents are too few or too short.
    """
    texts = _texts(model, documents)
    before = [_logits(model, text) for text in texts]
    padded, mask = _left_padded(texts)
    before_padded = _logits(model, padded, mask)
    common = {"settings": settings if sidecar_dir is None else None, "sidecar_dir": sidecar_dir, "stage": stage}

    attach_mamba_sidecar(model, layers, alpha=0.0, gate_mode="fixed", seed=seed, **common)
    try:
        gates, notes = _gates(model, layers, documents, seed, sidecar_dir)
        total = 1 + 4 * len(gates)
        bar = tqdm(total=total, desc="checks", unit="check", disable=not progress)
        checks = []

        def add(*new):
            checks.extend(new)
            bar.update(len(new))

        same = [_logits(model, text) for text in texts] + [_logits(model, padded, mask)]
        add(_identity("alpha 0 gives the base model's logits", same, [*before, before_padded]))
        for name, gate in gates.items():
            set_gate(model, gate)
            whole, shares = _recorded(model, texts)
            add(_cached(model, name, gate, texts, whole, shares))
            add(_generated(model, name, texts))
            add(_padded(model, name, gate, padded, mask, whole, shares))
            add(_look_ahead(model, name, texts[1], whole[1]))
    finally:
        detach_mamba_sidecars(model)
    add(_identity("detaching restores the base model", [_logits(model, text) for text in texts], before))
    bar.close()
    checks.append(_every_layer_at_1(model, texts[1], settings, seed))
    checks.append(_kernels(model, settings))
    rows = [asdict(check) for check in checks]
    return rows + [
        asdict(Check("gate was not checked", name, None, None, None, "", note)) for name, note in notes.items()
    ]


def _gates(model, layers, documents, seed, sidecar_dir) -> tuple[dict[str, Gate], dict[str, str]]:
    """Gates by name, calibrated to share 0.5 where they can be, and why others are left out."""
    gates: dict[str, Gate] = {
        "fixed_0.5": FixedGate(0.5),
        "fixed_1": FixedGate(1.0),
        "random_0.5": RandomGate(0.5, seed=seed),
    }
    notes = {}
    to_calibrate: dict[str, Gate] = {}
    if has_router(model):
        if 0 in layers:
            notes["routing"] = "signal previous needs layers from 1 on; lookahead was checked"
        else:
            to_calibrate |= {
                "routing_soft": RoutingGate(seed=seed),
                "routing_hard": RoutingGate(hard=True, seed=seed),
            }
        to_calibrate["routing_lookahead_hard"] = RoutingGate(signal="lookahead", hard=True, seed=seed)
    else:
        notes["routing"] = "the model has no router"
    if sidecar_dir is not None and (Path(sidecar_dir) / "learned_gate.safetensors").is_file():
        load_learned_gates(model, sidecar_dir)
    else:  # untrained: any direction will do, as long as tokens differ
        generator = torch.Generator().manual_seed(seed)
        for hybrid in attachment_of(model).hybrid_layers():
            weight = hybrid.gate_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    to_calibrate |= {"learned_soft": LearnedGate(seed=seed), "learned_hard": LearnedGate(hard=True, seed=seed)}
    for name, gate in to_calibrate.items():
        gates[name] = calibrate_gates(model, gate, documents, max(LENGTHS), passes=2)
    return gates, notes


def _cached(model, name, gate, texts, whole, shares) -> Check:
    """Prefill, a piece of several tokens, then token by token, against one pass without a cache."""
    got, flipped = [], 0
    for row, text in enumerate(texts):
        half = text.shape[1] // 2
        pieces = [half, 7, *[1] * (text.shape[1] - half - 7)]
        cache, start, outputs = DynamicCache(config=model.config), 0, []
        attachment_of(model).on_batch([WindowRef(f"text{row}", 0, half)])
        with record_gates(model) as record, torch.no_grad():
            for piece in pieces:
                ids = text[:, start : start + piece]
                outputs.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
                start += piece
        got.append(torch.cat(outputs, dim=1))
        flipped += _flips(record.shares, shares, gate)
    check = _close(model, "cached equals uncached", name, got, whole)
    return _with_flips(model, check, gate, flipped)


def _generated(model, name, texts) -> Check:
    """Greedy generation with and without a cache: tokens that differ."""
    prompt = texts[0]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = int(prompt[0, 0])
    with torch.no_grad():
        outputs = [model.generate(prompt, use_cache=cached, **settings)[0] for cached in (True, False)]
    length = min(len(output) for output in outputs)
    different = int((outputs[0][:length] != outputs[1][:length]).sum()) + abs(len(outputs[0]) - len(outputs[1]))
    strict = model.dtype == torch.float32  # in 16 bits near-ties between tokens may fall either way
    return Check(
        "generation with a cache equals without", name, different == 0 if strict else None, different, 0, "tokens"
    )


def _padded(model, name, gate, padded, mask, whole, shares) -> Check:
    """Each row of a left-padded batch against the text alone."""
    lengths = [logits.shape[1] for logits in whole]
    attachment_of(model).on_batch([WindowRef(f"text{row}", 0, length) for row, length in enumerate(lengths)])
    with record_gates(model) as record:
        batch = _logits(model, padded, mask)
    got = [batch[row : row + 1, -length:] for row, length in enumerate(lengths)]
    check = _close(model, "a left-padded batch equals single runs", name, got, whole)
    return _with_flips(model, check, gate, _flips(record.shares, shares, gate))


def _look_ahead(model, name, text, whole) -> Check:
    """Change one token; logits before it must stay."""
    largest, vocabulary = 0.0, model.config.vocab_size
    for position in (text.shape[1] // 4, text.shape[1] // 2, text.shape[1] - 2):
        changed = text.clone()
        changed[0, position] = (changed[0, position] + vocabulary // 2) % vocabulary
        attachment_of(model).on_batch([WindowRef("text1", 0, text.shape[1])])
        largest = max(largest, _difference([_logits(model, changed)[:, :position]], [whole[:, :position]]))
    limit = TOLERANCE[model.dtype]
    return Check("no gate looks ahead", name, largest <= limit, largest, limit, "of the largest logit")


def _every_layer_at_1(model, text, settings, seed) -> Check:
    """No layer keeps keys then: positions must come from elsewhere."""
    attach_mamba_sidecar(model, range(len(decoder_layers(model))), alpha=1.0, settings=settings, seed=seed)
    try:
        whole, half = _logits(model, text), text.shape[1] // 2
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            pieces = [
                model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in (text[:, :half], *text[:, half:].split(1, dim=1))
            ]
        value = _difference([torch.cat(pieces, 1)], [whole])
        # Many untrained sidecars in a row blow rounding up: allow ten times what rounding of the embeddings does alone.
        limit = max(TOLERANCE[model.dtype], 10.0 * _difference([_rounding_noise_logits(model, text)], [whole]))
        counted = f"untrained; {cache.get_seq_length()} of {text.shape[1]} tokens counted"
        check = "all layers at alpha 1: cached equals uncached"
        return Check(check, "fixed_1", value <= limit, value, limit, "of the largest logit", counted)
    finally:
        detach_mamba_sidecars(model)


def _rounding_noise_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] after relative noise of the number format's precision on the embeddings."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).to(embeddings)
        noisy = embeddings * (1.0 + torch.finfo(model.dtype).eps * noise)
        return model(inputs_embeds=noisy, use_cache=False).logits


def _kernels(model: nn.Module, settings: SidecarSettings) -> Check:
    """Which kernels run, and, where there are two paths, how far apart they are."""
    device = model_device(model)
    kernels, name = mamba_kernels(device), "Mamba kernels equal PyTorch"
    if kernels == "PyTorch":
        return Check(name, "", None, None, None, "", "PyTorch runs here, there are no kernels to compare with")
    value = kernel_difference(device, settings)
    return Check(name, "", value <= 1e-3, value, 1e-3, "of the largest output", f"{kernels} runs here")


@torch.no_grad()
def kernel_difference(device: torch.device | str, settings: SidecarSettings, hidden_size: int = 256) -> float:
    """Largest difference between the bound kernels and the PyTorch path over the largest output, float32.

    A prefill of 100 tokens and three decoded tokens of a random sidecar.
    """
    sidecar = MambaSidecar(hidden_size, 0, replace(settings, init="random")).to(device).eval()
    inputs = torch.randn(2, 103, hidden_size, generator=torch.Generator().manual_seed(0)).to(device)

    def outputs():
        cache = DynamicCache()
        cache.layers.append(HybridCacheLayer())
        pieces = [inputs[:, :100], *inputs[:, 100:].split(1, dim=1)]
        return torch.cat([sidecar(piece, cache) for piece in pieces], dim=1)

    with_kernels = outputs()
    with pytorch_scan():
        plain = outputs()
    return _difference([with_kernels], [plain])


def _texts(model: nn.Module, documents: Sequence[TokenDocument]) -> list[torch.Tensor]:
    """Token ids [1, LENGTHS[i]] of the first documents that are long enough."""
    texts = []
    for document in documents:
        if len(texts) < len(LENGTHS) and len(document.ids) >= LENGTHS[len(texts)]:
            ids = np.array(document.ids[: LENGTHS[len(texts)]])
            texts.append(torch.as_tensor(ids)[None].to(model_device(model)))
    if len(texts) < len(LENGTHS):
        raise ValueError(f"the checks need {len(LENGTHS)} documents of {LENGTHS} tokens; {len(documents)} did not do")
    return texts


def _left_padded(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(text.shape[1] for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64, device=texts[0].device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :] = text[0]
        mask[row, width - text.shape[1] :] = 1
    return ids, mask


def _logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _recorded(model: nn.Module, texts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict]:
    """Uncached logits of each text alone, and what the gates did."""
    with record_gates(model) as record:
        logits = []
        for row, text in enumerate(texts):
            attachment_of(model).on_batch([WindowRef(f"text{row}", 0, text.shape[1])])
            logits.append(_logits(model, text))
    return logits, record.shares


def _flips(got: dict, want: dict, gate: Gate) -> int:
    """Tokens whose hard gate chose the other path."""
    if not is_hard(gate):
        return 0
    return sum(
        int((np.abs(values - want[document][layer]) > 0.5).sum())
        for document, layers in got.items()
        for layer, values in layers.items()
    )


def _difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference over the largest absolute value."""
    scale = max(float(b.abs().max()) for b in want)
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(got, want, strict=True)) / scale


def _close(model: nn.Module, check: str, gate: str, got, want) -> Check:
    value, limit = _difference(got, want), TOLERANCE[model.dtype]
    return Check(check, gate, value <= limit, value, limit, "of the largest logit")


def _with_flips(model: nn.Module, check: Check, gate: Gate, flipped: int) -> Check:
    """Hard gates also say how many tokens changed path; in float32 none may."""
    if not is_hard(gate):
        return check
    passed = check.passed and flipped == 0 if model.dtype == torch.float32 else None
    return replace(check, passed=passed, note=f"{flipped} gates flipped")


def _identity(check: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> Check:
    different = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    return Check(check, "fixed_0", different == 0, different, 0, "logits that differ")


def format_table(rows: Sequence[dict]) -> str:
    """The checks as an aligned text table."""
    lines = []
    for row in rows:
        mark = {True: "ok", False: "FAILED", None: "-"}[row["passed"]]
        value = "" if row["value"] is None else f"{row['value']:.3g}"
        limit = "" if row["limit"] is None else f"<= {row['limit']:g} {row['unit']}"
        lines.append(f"{mark:6}  {row['check']:46}  {row['gate']:22}  {value:>9}  {limit:32}  {row['note']}".rstrip())
    return "\n".join(lines)

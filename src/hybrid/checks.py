"""The hybrid layer's promises, measured on the model at hand: what script 04 shows before anything is trained.

Every check is a plain row: check, gate, passed, value, limit, unit, note. Logits are compared relative to the largest
absolute logit, because models differ in scale; `passed` is None for what is only reported.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef, model_device
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.cache import HybridCacheLayer
from src.hybrid.calibration import calibrate_gates
from src.hybrid.checkpoints import LEARNED_GATES, load_learned_gates
from src.hybrid.gates import FixedGate, Gate, LearnedGate, RandomGate, RoutingGate, is_hard
from src.hybrid.layer import attachment_of, record_gates, set_gate
from src.hybrid.sidecar import MambaSidecar, SidecarSettings, mamba_kernels, pytorch_scan
from src.models.families import decoder_layers, has_router

# Largest difference of logits over the largest logit, by number format, between ways to compute the same thing.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Tokens of the three test texts; the middle one is longer than a chunk of the scan and ends inside one.
LENGTHS = (33, 96, 61)
NEW_TOKENS = 8


def run_checks(
    model: nn.Module,
    layers: Sequence[int],
    documents: Sequence[TokenDocument],
    settings: SidecarSettings,
    sidecar_dir: str | Path | None = None,
    seed: int = 0,
) -> list[dict]:
    """Measure all promises on a model without sidecars, which is left as it was.

    layers: that get sidecars; documents: texts to measure and calibrate on (three of at least 97 tokens). The sidecars
    are those of stage A in `sidecar_dir`, or untrained ones. Raises ValueError where the documents are too few or too
    short.
    """
    texts = _texts(model, documents)
    rows = [text[0] for text in texts]
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")

    def all_logits():
        return [_logits(model, text) for text in texts] + [_logits(model, padded, mask)]

    before = all_logits()
    own = settings if sidecar_dir is None else None
    attach_mamba_sidecar(model, layers, alpha=0.0, settings=own, sidecar_dir=sidecar_dir, seed=seed)
    try:
        rows = [_identity("alpha 0 gives the base model's logits", all_logits(), before)]
        gates, notes = _gates(model, layers, documents, seed, sidecar_dir)
        for name, gate in tqdm(gates.items(), desc="checks", unit="gate"):
            set_gate(model, gate)
            whole, shares = _recorded(model, texts)
            rows.append(_cached(model, name, gate, texts, whole, shares))
            rows.append(_generated(model, name, texts[0]))
            rows.append(_padded(model, name, gate, padded, mask, whole, shares))
            rows.append(_look_ahead(model, name, texts[1], whole[1]))
    finally:
        detach_mamba_sidecars(model)
    rows.append(_identity("detaching restores the base model", all_logits(), before))
    rows += [_every_layer_at_1(model, texts[1], settings, seed), _kernels(model, settings)]
    return rows + [_row("gate was not checked", name, note=note) for name, note in notes.items()]


def _row(check, gate, passed=None, value=None, limit=None, unit="", note="") -> dict:
    """One measured promise. `value` must not exceed `limit`; None where nothing could be measured."""
    return {"check": check, "gate": gate, "passed": passed, "value": value, "limit": limit, "unit": unit, "note": note}


def _gates(model, layers, documents, seed, sidecar_dir) -> tuple[dict[str, Gate], dict[str, str]]:
    """Gates by name, calibrated to share 0.5 where they can be, and why others are left out."""
    gates = {"fixed_0.5": FixedGate(0.5), "fixed_1": FixedGate(1.0), "random_0.5": RandomGate(0.5, seed=seed)}
    notes, to_calibrate = {}, {}
    if not has_router(model):
        notes["routing"] = "the model has no router"
    elif 0 in layers:
        notes["routing"] = "signal previous needs layers from 1 on; lookahead was checked"
    else:
        to_calibrate["routing_soft"] = RoutingGate(seed=seed)
        to_calibrate["routing_hard"] = RoutingGate(hard=True, seed=seed)
    if has_router(model):
        to_calibrate["routing_lookahead_hard"] = RoutingGate(signal="lookahead", hard=True, seed=seed)
    if sidecar_dir is not None and (Path(sidecar_dir) / LEARNED_GATES).is_file():
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


def _cached(model, name, gate, texts, whole, shares) -> dict:
    """Prefill, a piece of several tokens, then token by token, against one pass without a cache."""
    got, recorded = [], {}
    for row, text in enumerate(texts):
        half = text.shape[1] // 2
        attachment_of(model).on_batch([WindowRef(f"text{row}", 0, half)])
        with record_gates(model) as record:
            got.append(_cached_logits(model, text, [half, 7, *[1] * (text.shape[1] - half - 7)])[0])
        recorded |= record.shares
    return _close(model, "cached equals uncached", name, gate, got, whole, recorded, shares)


def _cached_logits(model, text, lengths) -> tuple[torch.Tensor, int]:
    """Logits [1, T, V] of a text fed in pieces of these lengths through one cache, and the tokens that it counted."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in text.split(lengths, dim=1)
        ]
    return torch.cat(pieces, dim=1), cache.get_seq_length()


def _generated(model, name, prompt) -> dict:
    """Greedy generation with and without a cache: tokens that differ."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = int(prompt[0, 0])
    with torch.no_grad():
        outputs = [model.generate(prompt, use_cache=cached, **settings)[0] for cached in (True, False)]
    length = min(len(output) for output in outputs)
    different = int((outputs[0][:length] != outputs[1][:length]).sum()) + abs(len(outputs[0]) - len(outputs[1]))
    # in 16 bits near-ties between tokens may fall either way
    passed = different == 0 if model.dtype == torch.float32 else None
    return _row("generation with a cache equals without", name, passed, different, 0, "tokens")


def _padded(model, name, gate, padded, mask, whole, shares) -> dict:
    """Each row of a left-padded batch against the text alone."""
    lengths = [logits.shape[1] for logits in whole]
    attachment_of(model).on_batch([WindowRef(f"text{row}", 0, length) for row, length in enumerate(lengths)])
    with record_gates(model) as record:
        batch = _logits(model, padded, mask)
    got = [batch[row : row + 1, -length:] for row, length in enumerate(lengths)]
    return _close(model, "a left-padded batch equals single runs", name, gate, got, whole, record.shares, shares)


def _look_ahead(model, name, text, whole) -> dict:
    """Change one token; logits before it must stay."""
    largest, vocabulary = 0.0, model.config.vocab_size
    for position in (text.shape[1] // 4, text.shape[1] // 2, text.shape[1] - 2):
        changed = text.clone()
        changed[0, position] = (changed[0, position] + vocabulary // 2) % vocabulary
        attachment_of(model).on_batch([WindowRef("text1", 0, text.shape[1])])
        largest = max(largest, _difference([_logits(model, changed)[:, :position]], [whole[:, :position]]))
    limit = TOLERANCE[model.dtype]
    return _row("no gate looks ahead", name, largest <= limit, largest, limit, "of the largest logit")


def _every_layer_at_1(model, text, settings, seed) -> dict:
    """No layer keeps keys then: positions must come from elsewhere."""
    attach_mamba_sidecar(model, range(len(decoder_layers(model))), alpha=1.0, settings=settings, seed=seed)
    try:
        whole, half = _logits(model, text), text.shape[1] // 2
        got, counted = _cached_logits(model, text, [half, *[1] * (text.shape[1] - half)])
        value = _difference([got], [whole])
        # Many untrained sidecars in a row blow rounding up: allow ten times what rounding of the embeddings does alone.
        limit = max(TOLERANCE[model.dtype], 10.0 * _difference([_rounding_noise_logits(model, text)], [whole]))
    finally:
        detach_mamba_sidecars(model)
    note = f"untrained; {counted} of {text.shape[1]} tokens counted"
    check = "all layers at alpha 1: cached equals uncached"
    return _row(check, "fixed_1", value <= limit, value, limit, "of the largest logit", note)


def _rounding_noise_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] after relative noise of the number format's precision on the embeddings."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).to(embeddings)
        noisy = embeddings * (1.0 + torch.finfo(model.dtype).eps * noise)
        return model(inputs_embeds=noisy, use_cache=False).logits


def _kernels(model: nn.Module, settings: SidecarSettings) -> dict:
    """Which kernels run, and, where there are two paths, how far apart they are."""
    device = model_device(model)
    kernels, name = mamba_kernels(device), "Mamba kernels equal PyTorch"
    if kernels == "PyTorch":
        return _row(name, "", note="PyTorch runs here, there are no kernels to compare with")
    value = kernel_difference(device, settings)
    return _row(name, "", value <= 1e-3, value, 1e-3, "of the largest output", f"{kernels} runs here")


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
        return _difference([with_kernels], [outputs()])


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


def _difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference over the largest absolute value."""
    scale = max(float(b.abs().max()) for b in want)
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(got, want, strict=True)) / scale


def _close(model, check, name, gate, got, want, got_shares, want_shares) -> dict:
    """Logits against logits; for a hard gate also how many tokens took the other path, in float32 none."""
    value, limit, note = _difference(got, want), TOLERANCE[model.dtype], ""
    passed = value <= limit
    if is_hard(gate):
        flipped = sum(
            int((np.abs(values - want_shares[document][layer]) > 0.5).sum())
            for document, layers in got_shares.items()
            for layer, values in layers.items()
        )
        passed = passed and flipped == 0 if model.dtype == torch.float32 else None
        note = f"{flipped} gates flipped"
    return _row(check, name, passed, value, limit, "of the largest logit", note)


def _identity(check: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> dict:
    different = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    return _row(check, "fixed_0", different == 0, different, 0, "logits that differ")


def format_table(rows: Sequence[dict]) -> str:
    """The checks as an aligned text table."""
    lines = []
    for row in rows:
        mark = {True: "ok", False: "FAILED", None: "-"}[row["passed"]]
        value = "" if row["value"] is None else f"{row['value']:.3g}"
        limit = "" if row["limit"] is None else f"<= {row['limit']:g} {row['unit']}"
        lines.append(f"{mark:6}  {row['check']:46}  {row['gate']:22}  {value:>9}  {limit:32}  {row['note']}".rstrip())
    return "\n".join(lines)

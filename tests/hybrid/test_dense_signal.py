"""The FFN activation sparsity gate of models without router, on tiny random Llama and Qwen3 folders, float32 on CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from src import mamba_sidecar as ms
from src.base.text_data import TokenDocument
from src.eval_utils import WindowRef
from src.hybrid.gates import ActivationGate, FixedGate, GateInputs, mamba_share, with_alpha
from src.models.families import has_gated_mlp, has_router
from src.models.loading import load_model
from tests.tiny import blockffn_folder, change_config, llama_folder

LAYERS = [1, 2]
SETTINGS = ms.SidecarSettings(d_state=8, headdim=16, chunk_size=16)
# Cached and uncached passes differ by float32 rounding only.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("dense")
    return {
        "llama": llama_folder(home / "llama"),
        "qwen3": llama_folder(home / "qwen3", qwen=True),
        "relu": change_config(llama_folder(home / "relu"), hidden_act="relu"),
        "blockffn": blockffn_folder(home / "blockffn"),
    }


def attached(folder, gate=None):
    """The folder's model with sidecars on layers 1 and 2, and a calibrated gate where one is given."""
    model, _ = load_model(folder, "cpu")
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as asked
    ms.attach_mamba_sidecar(model, LAYERS, settings=SETTINGS)
    if gate is not None:
        ms.set_gate(model, ms.calibrate_gates(model, gate, documents(16, 0), max_seq_len=64, batch_size=4))
    return model


def documents(count, seed):
    rng = np.random.default_rng(seed)
    return [TokenDocument(f"doc{i}", "docs", rng.integers(3, 259, 70 + i), 70 + i) for i in range(count)]


def tokens(batch, length, seed=0):
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def activations(model, ids, layer):
    """|h| of one layer's neurons by the formula of a gated MLP, from what the MLP was given: [B, T, I]."""
    mlp, seen = model.model.layers[layer].mlp, []
    hook = mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logits(model, ids)
    hook.remove()
    with torch.no_grad():
        return (mlp.act_fn(mlp.gate_proj(seen[0])) * mlp.up_proj(seen[0])).abs()


def left_padded(rows):
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([(torch.arange(width) >= width - row.shape[1]).long()[None] for row in rows])
    return ids, mask


def test_which_models_have_the_signal(folders):
    for name, dense in (("llama", True), ("qwen3", True), ("blockffn", False)):
        model, _ = load_model(folders[name], "cpu")
        assert has_gated_mlp(model) is dense and has_router(model) is not dense


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("quantile", [0.3, 0.5])
def test_cutoffs_are_the_quantile_of_the_base_models_activations(folders, quantile):
    """Over windows of unequal lengths: padding must not count. The cutoff is that of a 16-bit float above it."""
    model = attached(folders["llama"])
    gate = ms.calibrate_gates(model, ActivationGate(0.25, quantile), documents(6, 0), max_seq_len=48, batch_size=4)
    assert sorted(gate.cutoffs) == [0, 1] and gate.quantile == quantile
    ms.detach_mamba_sidecars(model)
    windows = [document.ids[i : i + 48] for document in documents(6, 0) for i in range(0, len(document.ids), 48)]
    for layer, cutoff in gate.cutoffs.items():
        values = np.concatenate(
            [activations(model, torch.as_tensor(window)[None], layer).flatten() for window in windows]
        )
        want = np.quantile(values, quantile, method="inverted_cdf")  # one of the values, as counts find it
        assert want * 0.99999 < cutoff <= want * (1 + 2**-7) * 1.00001  # one bin wide, and rounding
        assert (values < cutoff).mean() == pytest.approx(quantile, abs=0.01)


def test_exact_zeros_are_the_signal_of_a_relu_model(folders):
    """About half of a ReLU model's activations are 0: at a lower quantile the cutoff separates these from the rest."""
    model = attached(folders["relu"], ActivationGate(0.5, quantile=0.3, hard=True))
    gate, ids = ms.attachment_of(model).gate, tokens(1, 40)
    assert all(0 < cutoff < 1e-30 for cutoff in gate.cutoffs.values())
    ms.attachment_of(model).on_batch([WindowRef("d", 0, 40)])
    with ms.record_gates(model) as record:
        zeros = (activations(model, ids, 1)[0] == 0).float().mean(-1)
    np.testing.assert_array_equal(record.scores["d"][2], zeros.numpy())
    assert 0.3 < float(zeros.mean()) < 0.7


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("hard", [True, False])
def test_calibrated_gates_meet_their_share(folders, share, hard):
    model = attached(folders["llama"])
    before = ms.attachment_of(model).gate
    gate = ActivationGate(share, hard=hard, temperature=0.05)
    calibrated = ms.calibrate_gates(model, gate, documents(24, 0), max_seq_len=64, batch_size=4)
    assert ms.attachment_of(model).gate is before
    assert not any(layer.mlp.down_proj._forward_hooks for layer in model.model.layers)
    ms.set_gate(model, calibrated)
    # to the calibration's tolerance on its own text and windows, and near it on other text
    for seed, tolerance in ((0, 0.01), (1, 0.05)):
        with ms.record_gates(model) as record:
            for document in documents(24, seed):
                for start in range(0, len(document.ids), 64):
                    ids = torch.as_tensor(document.ids[start : start + 64])[None]
                    ms.attachment_of(model).on_batch([WindowRef(document.id, start, ids.shape[1])])
                    logits(model, ids)
        assert sorted(record.layer_shares()) == LAYERS
        for layer, realised in record.layer_shares().items():
            assert realised == pytest.approx(share, abs=tolerance), (seed, layer)


def test_one_set_of_cutoffs_serves_every_share(folders):
    model = attached(folders["llama"], ActivationGate(0.5, hard=True))
    gate = ms.attachment_of(model).gate
    other = ms.calibrate_gates(model, replace(gate, alpha=0.25, hard=False), documents(16, 1), max_seq_len=64)
    assert other.cutoffs == gate.cutoffs and other.distributions is not gate.distributions


# ---------------------------------------------------------------- the gate


def test_the_score_is_the_previous_layers_sparsity_in_the_hybrid(folders):
    model = attached(folders["llama"], ActivationGate(0.5, hard=True))
    gate, ids = ms.attachment_of(model).gate, tokens(2, 40)
    ms.attachment_of(model).on_batch([WindowRef("a", 0, 40), WindowRef("b", 0, 40)])
    with ms.record_gates(model) as record:
        magnitudes = activations(model, ids, 1)
    score = (magnitudes < gate.cutoffs[1]).float().mean(-1)
    np.testing.assert_array_equal(record.scores["b"][2], score[1].numpy())
    assert set(np.unique(record.shares["b"][2])) == {0.0, 1.0}
    # the sparser tokens, but for ties, are those on Mamba
    chosen = record.shares["b"][2] == 1
    assert record.scores["b"][2][chosen].min() >= record.scores["b"][2][~chosen].max()


def test_a_soft_gate_follows_its_formula_before_distributions_are_known():
    scores = torch.tensor([[0.3, 0.5, 0.7]])
    inputs = GateInputs(scores, torch.zeros(1, dtype=torch.int64), torch.arange(3)[None])
    share = mamba_share(ActivationGate(0.5, temperature=0.1), 1, inputs)
    torch.testing.assert_close(share, torch.sigmoid((scores - 0.5) / 0.1))


def test_alpha_0_and_detaching_are_bit_identical(folders):
    model, ids = load_model(folders["llama"], "cpu")[0], tokens(2, 30)
    before, modules = logits(model, ids), [(name, type(module)) for name, module in model.named_modules()]
    ms.attach_mamba_sidecar(model, LAYERS, settings=SETTINGS)
    gate = ms.calibrate_gates(model, ActivationGate(0.5), documents(4, 0), max_seq_len=64)
    ms.set_gate(model, with_alpha(gate, 0.0))
    assert torch.equal(logits(model, ids), before)
    ms.set_all_alphas(model, 0.5)
    assert not torch.equal(logits(model, ids), before)
    with ms.bypass_sidecars(model):
        assert torch.equal(logits(model, ids), before)
    ms.detach_mamba_sidecars(model)
    assert torch.equal(logits(model, ids), before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("hard", [True, False])
def test_cached_and_padded_equal_a_single_pass_and_nothing_looks_ahead(folders, kind, hard):
    model = attached(folders[kind], ActivationGate(0.5, hard=hard, temperature=0.05))
    attachment, ids = ms.attachment_of(model), tokens(2, 40)
    attachment.on_batch([WindowRef("a", 0, 40), WindowRef("b", 0, 40)])
    with ms.record_gates(model) as whole:
        want = logits(model, ids)

    for pieces in ([20, *[1] * 20], [9, 7, 1, 1, 22]):
        cache, start, outputs = DynamicCache(config=model.config), 0, []
        attachment.on_batch([WindowRef("a", 0, pieces[0]), WindowRef("b", 0, pieces[0])])
        with ms.record_gates(model) as record, torch.no_grad():
            for piece in pieces:
                outputs.append(model(ids[:, start : start + piece], past_key_values=cache, use_cache=True).logits)
                start += piece
        torch.testing.assert_close(torch.cat(outputs, dim=1), want, **CLOSE)
        for document in ("a", "b"):
            for layer in LAYERS:
                np.testing.assert_allclose(record.shares[document][layer], whole.shares[document][layer], atol=1e-4)

    rows = [tokens(1, length, seed=length) for length in (3, 70, 21)]
    padded, mask = left_padded(rows)
    batch = logits(model, padded, attention_mask=mask)
    for row, alone in enumerate(rows):
        torch.testing.assert_close(batch[row, mask[row] == 1], logits(model, alone)[0], **CLOSE)

    for position in (0, 13, 38):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] - 3 + 128) % 256 + 3
        other = logits(model, changed)
        torch.testing.assert_close(other[:, :position], logits(model, ids)[:, :position], rtol=0, atol=1e-6)
        assert not torch.equal(other[:, position], want[:, position])


def test_generate_with_and_without_cache_and_in_a_padded_batch(folders):
    model = attached(folders["llama"], ActivationGate(0.5, hard=True))
    prompts = [tokens(1, length, seed=length) for length in (5, 11, 8)]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone, uncached = (
        [model.generate(prompt, use_cache=cached, **settings)[0, prompt.shape[1] :].tolist() for prompt in prompts]
        for cached in (True, False)
    )
    padded, mask = left_padded(prompts)
    batch = model.generate(padded, attention_mask=mask, **settings)[:, padded.shape[1] :].tolist()
    assert uncached == alone and batch == alone


# ---------------------------------------------------------------- refusals


def test_what_cannot_work_is_refused(folders):
    model, ids = attached(folders["llama"]), tokens(1, 9)
    before = logits(model, ids)
    for gate, words in (
        (ActivationGate(0.5), "no cutoff for layer 0, 1.*calibrate_gates"),
        (ActivationGate(0.5, cutoffs={1: 0.1}), "no cutoff for layer 0:"),
    ):
        with pytest.raises(ValueError, match=words):
            ms.set_gate(model, gate)
    assert isinstance(ms.attachment_of(model).gate, FixedGate) and torch.equal(logits(model, ids), before)
    ms.detach_mamba_sidecars(model)

    ms.attach_mamba_sidecar(model, [0, 1], settings=SETTINGS)
    with pytest.raises(ValueError, match="layer 0 has no layer before it.*ffn_previous"):
        ms.calibrate_gates(model, ActivationGate(0.5), documents(2, 0), max_seq_len=64)

    routed = ms.attach_mamba_sidecar(load_model(folders["blockffn"], "cpu")[0], LAYERS, settings=SETTINGS)
    with pytest.raises(ValueError, match="dense gated MLP.*layer 0.*BlockFFNMLP"):
        ms.calibrate_gates(routed, ActivationGate(0.5), documents(2, 0), max_seq_len=64)

    for quantile in (0.0, 1.0, -0.2):
        with pytest.raises(ValueError, match=rf"quantile.*{quantile}.*\(0, 1\)"):
            ActivationGate(quantile=quantile)

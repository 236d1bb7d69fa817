"""Distillation on a tiny random BlockFFN: losses against their formulas, learning, resuming, and leaving no trace."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src import mamba_sidecar as ms
from src.base.text_data import TokenDocument
from src.eval_utils import score_documents
from src.hybrid import distill, losses, recovery
from src.hybrid.distill import Distillation, DistillSettings
from src.hybrid.sidecar import new_sidecar
from src.hybrid.training_state import TrainingCheckpoint
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM

VOCAB, LAYERS = 61, 4
SIDECARS = ms.SidecarSettings(d_state=16, headdim=16, chunk_size=16)
SETTINGS = DistillSettings(steps=12, batch_size=2, learning_rate=3e-3, validate_every=4, checkpoint_every=3)


def build():
    torch.manual_seed(0)
    config = BlockFFNConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        num_experts=8, expert_size=8, dim_model_base=32, max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return BlockFFNForCausalLM(config).eval().requires_grad_(False)


def windows(count, seed, length=24):
    return np.random.default_rng(seed).integers(2, VOCAB, (count, length))


def documents():
    rng = np.random.default_rng(5)
    return [TokenDocument(f"d{i}", "docs", rng.integers(2, VOCAB, 30 + i), 30 + i) for i in range(4)]


def distillation(model, folder, train=None, validation=None):
    train, validation = windows(9, 1) if train is None else train, windows(4, 2) if validation is None else validation
    return Distillation(model, train, validation, folder, folder / "checkpoints")


def stage_a(model, folder, settings=SETTINGS, one_at_a_time=False):
    return distill.train_stage_a(distillation(model, folder), (1, 2), SIDECARS, settings, one_at_a_time)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def untouched(model, before):
    assert not ms.is_attached(model)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, and a folder with both stages and the learned gate."""
    folder, model = tmp_path_factory.mktemp("sidecars"), build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # eight windows by heart: what is tested is that losses go down
    run = distillation(model, folder, windows(8, 1), windows(8, 1))
    longer = replace(SETTINGS, steps=100, validate_every=20, checkpoint_every=50)
    rows = {"a": distill.train_stage_a(run, [1, 2], SIDECARS, longer)}
    slower = replace(longer, steps=40, learning_rate=3e-4)
    rows["b"] = distill.train_stage_b(run, [1, 2], slower)
    rows["gate"] = distill.train_learned_gate(run, [1, 2], 0.3, replace(SETTINGS, steps=24))
    untouched(model, before)
    return model, folder, rows


def values(rows, quantity, split="validation", layer=None):
    return [
        row["value"]
        for row in rows
        if row["quantity"] == quantity and row["split"] == split and (layer is None or row["layer"] == layer)
    ]


def test_stage_a_pairs_are_the_attentions_own_input_and_output():
    model, ids = build(), torch.as_tensor(windows(2, 0))
    pairs = losses.attention_pairs(model, [1, 3], ids, bf16=False)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False, output_hidden_states=True).hidden_states
        position = torch.arange(24)[None]
        rope = model.model.rotary_emb(hidden[1], position)
        for layer in (1, 3):
            block = model.model.layers[layer]
            want = block.input_layernorm(hidden[layer])
            torch.testing.assert_close(pairs[layer][0], want)
            output, _ = block.self_attn(hidden_states=want, position_embeddings=rope, attention_mask=None)
            torch.testing.assert_close(pairs[layer][1], output)


def test_relative_error_is_1_for_the_mean_and_0_for_the_target():
    target = torch.randn(3, 5, 4) * 7 + 2
    mean = target.mean(dim=(0, 1), keepdim=True).expand_as(target)
    assert float(losses.relative_error(lambda _: mean, target, target)) == pytest.approx(1.0)
    assert float(losses.relative_error(lambda _: target, target, target)) == 0.0


def test_kl_is_the_formula(trained):
    model, folder, _ = trained
    ids = torch.as_tensor(windows(2, 7))
    with torch.no_grad():
        teacher = F.softmax(model(ids).logits.double(), -1)
        ms.attach_mamba_sidecar(model, [1, 2], alpha=1.0, sidecar_dir=folder)
        student = F.softmax(model(ids).logits.double(), -1)
        got = losses.kl_from_teacher(model, ids, bf16=False)
        ms.set_all_alphas(model, 0.0)
        assert float(losses.kl_from_teacher(model, ids, bf16=False)) == pytest.approx(0.0, abs=1e-7)
    ms.detach_mamba_sidecars(model)
    want = (teacher * (teacher / student).log()).sum(-1).mean()
    assert float(got) == pytest.approx(float(want), rel=1e-4) and float(got) > 1e-3


def test_every_stage_learns(trained):
    _, folder, rows = trained
    for layer in (1, 2):
        curve = values(rows["a"], "normalised_mse", layer=layer)
        assert 1.0 > curve[0] > 1.2 * curve[-1]
    assert values(rows["b"], "kl")[-1] < values(rows["b"], "kl")[0]
    assert values(rows["b"], "kl_alpha_1")[-1] < values(rows["b"], "kl_alpha_1")[0]
    for layer in (1, 2):
        assert values(rows["gate"], "share", layer=layer)[-1] == pytest.approx(0.3, abs=0.1)
    assert ms.available_layers(folder, "a") == ms.available_layers(folder, "b") == [1, 2]
    index = json.loads((folder / "sidecars.json").read_text())
    assert index["stages"]["a"]["training"]["validation_normalised_mse"]["2"] == values(rows["a"], "normalised_mse")[-1]
    assert {"stage", "quantity", "layer", "step", "tokens", "split", "value", "learning_rate"} == set(rows["a"][0])
    assert not list(folder.rglob("*.tmp"))


def test_stored_sidecars_are_the_trained_ones(trained):
    """The validation error of what is on disk is the one in the log, but for 16-bit rounding."""
    model, folder, rows = trained
    ms.attach_mamba_sidecar(model, [1, 2], alpha=0.0, sidecar_dir=folder)
    sidecars = [hybrid.sidecar for hybrid in ms.attachment_of(model).hybrid_layers()]
    ms.detach_mamba_sidecars(model)
    pieces = [losses.attention_pairs(model, [1, 2], ids, False) for ids in torch.as_tensor(windows(8, 1)).split(2)]
    with torch.no_grad():
        for layer, sidecar in zip((1, 2), sidecars, strict=True):
            got = np.mean([float(losses.relative_error(sidecar, *pairs[layer])) for pairs in pieces])
            assert got == pytest.approx(values(rows["a"], "normalised_mse", layer=layer)[-1], rel=0.03)


def test_learned_gate_loads_and_differs_per_token(trained):
    model, folder, _ = trained
    ms.attach_mamba_sidecar(model, [1, 2], gate_mode="learned", sidecar_dir=folder, stage="b")
    ms.load_learned_gates(model, folder)
    for hybrid in ms.attachment_of(model).hybrid_layers():
        assert float(hybrid.gate_proj.weight.abs().max()) > 0
    ms.detach_mamba_sidecars(model)


def test_layers_alone_or_together_give_the_same_weights(tmp_path):
    together = stage_a(build(), tmp_path / "together")
    alone = stage_a(build(), tmp_path / "alone", one_at_a_time=True)
    first, second = files(tmp_path / "together"), files(tmp_path / "alone")
    assert first.keys() == second.keys() and len(first) == 2
    for path in first:
        for name, tensor in safetensors_of(tmp_path / "together" / path).items():
            torch.testing.assert_close(tensor, safetensors_of(tmp_path / "alone" / path)[name], rtol=1e-2, atol=1e-4)
    key = lambda row: (row["layer"], row["step"], row["split"])  # noqa: E731
    assert sorted(map(key, together)) == sorted(map(key, alone))


def safetensors_of(path):
    from safetensors.torch import load_file

    return load_file(path)


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("stage", ["a", "a_alone", "b", "gate"])
def test_interrupted_and_resumed_equals_uninterrupted(stage, tmp_path, monkeypatch):
    def run(model, folder):
        if stage.startswith("a"):
            return stage_a(model, folder, one_at_a_time=stage == "a_alone")
        stage_a(model, folder, replace(SETTINGS, steps=2))
        whole = distillation(model, folder)
        if stage == "b":
            return distill.train_stage_b(whole, [1, 2], SETTINGS)
        return distill.train_learned_gate(whole, [1, 2], 0.5, SETTINGS, stage="a")

    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    want = run(model, tmp_path / "whole")
    calls, real = [], distill._rows_of_step

    def interrupted(train, settings, step):
        calls.append(step)
        if settings.steps == SETTINGS.steps and step == 7 and 7 not in calls[:-1]:
            raise _Interrupt
        return real(train, settings, step)

    monkeypatch.setattr(distill, "_rows_of_step", interrupted)
    with pytest.raises(_Interrupt):
        run(model, tmp_path / "parts")
    untouched(model, before)
    calls.append(7)
    got = run(model, tmp_path / "parts")
    assert got == want
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    calls_before = len(calls)
    assert run(model, tmp_path / "parts") == want and len(calls) == calls_before  # finished: nothing is trained again


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path):
    first = stage_a(build(), tmp_path)
    other = stage_a(build(), tmp_path, replace(SETTINGS, seed=1))
    assert values(first, "normalised_mse") != values(other, "normalised_mse")
    assert stage_a(build(), tmp_path / "again", replace(SETTINGS, seed=1)) == other


def test_the_last_checkpoint_survives_a_crash_while_saving(tmp_path, monkeypatch):
    checkpoint = TrainingCheckpoint(tmp_path / "c.pt", {"a": 1})
    checkpoint.save(0, {"step": 3})

    def crash(*_args):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError):
        checkpoint.save(0, {"step": 4})
    assert TrainingCheckpoint(tmp_path / "c.pt", {"a": 1}).parts == {0: {"step": 3}}
    assert TrainingCheckpoint(tmp_path / "c.pt", {"a": 2}).parts == {}


def test_windows_are_used_evenly():
    pool = np.arange(7)[:, None]
    settings = replace(SETTINGS, steps=7, batch_size=3)
    used = np.concatenate([distill._rows_of_step(pool, settings, step)[:, 0] for step in range(7)])
    assert np.bincount(used).tolist() == [3] * 7
    assert sorted(used[:7]) == sorted(used[7:14]) == list(range(7)) and used[:7].tolist() != used[7:14].tolist()


def test_learning_rate_rises_and_falls():
    rates = [replace(SETTINGS, steps=100, warmup=0.1).rate(step) for step in range(100)]
    assert rates[9] == max(rates) == 3e-3 and rates[0] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-4, rel=0.02) and rates[10:] == sorted(rates[10:], reverse=True)


def test_recovery_and_zeroed_attention(trained):
    model, folder, _ = trained
    docs, ids = documents(), torch.as_tensor(windows(1, 3))
    got = recovery.measure_recovery(model, [1, 2], docs, folder, "a", 24, 12, 4)
    assert got.base == score_documents(model, docs, 24, 12, 4).nll_per_token
    twin = build()
    for layer in (1, 2):
        twin.model.layers[layer].self_attn.o_proj.weight.zero_()
    assert got.zeroed == pytest.approx(score_documents(twin, docs, 24, 12, 4).nll_per_token, rel=1e-6)
    ms.attach_mamba_sidecar(model, [1, 2], alpha=1.0, sidecar_dir=folder)
    assert got.mamba == score_documents(model, docs, 24, 12, 4).nll_per_token
    ms.detach_mamba_sidecars(model)
    assert got.tokens == sum(len(document.ids) - 1 for document in docs)
    assert recovery.Recovery(3.0, 4.0, 3.25, 1).recovered == 0.75
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(KeyError), recovery.zeroed_attention(model, [0]):
            raise KeyError
        assert torch.equal(model(ids).logits, before)


def test_bf16_base_keeps_float32_sidecars(tmp_path):
    rows = stage_a(build(), tmp_path, replace(SETTINGS, bf16=True))
    plain = stage_a(build(), tmp_path / "plain")
    assert values(rows, "normalised_mse") == pytest.approx(values(plain, "normalised_mse"), rel=0.05)
    assert values(rows, "normalised_mse") != values(plain, "normalised_mse")


def test_estimate_counts_what_training_holds():
    model, train = build(), windows(4, 1)
    together = distill.estimate_stage_a(model, [1, 2], SIDECARS, train, SETTINGS)
    alone = distill.estimate_stage_a(model, [1, 2], SIDECARS, train, SETTINGS, one_at_a_time=True)
    parameters = sum(parameter.numel() for parameter in new_sidecar(model, 1, SIDECARS).parameters())
    assert together[1] - alone[1] == pytest.approx((16 * parameters + 2 * 24 * 4 * 64) / 1e9)
    assert together[0] > 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, d: distill.train_stage_b(distillation(m, d), [1], SETTINGS), ["no sidecars", "04"]),
        (lambda m, d: stage_a(m, d, replace(SETTINGS, learning_rate=1e30)), ["loss", "smaller learning rate"]),
    ],
)
def test_errors_say_what_to_do(call, words, tmp_path):
    with pytest.raises(ValueError) as error:
        call(build(), tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)

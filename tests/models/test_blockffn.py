"""The native BlockFFN model against the official code's outputs (tests/golden), formulas, and files that lie."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM, BlockFFNMLP, CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
TOLERANCE = 2e-5


def tiny_config(**changes) -> BlockFFNConfig:
    """A BlockFFN of 3 layers and 5 experts of width 4, without a padding token."""
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=5,
        expert_size=4,
        max_position_embeddings=64,
        dim_model_base=16,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
    )
    return BlockFFNConfig(**(settings | changes))


def tiny_model(**changes) -> BlockFFNForCausalLM:
    torch.manual_seed(0)
    return BlockFFNForCausalLM(tiny_config(**changes)).eval()


def hub_state_dict(case: str) -> dict[str, torch.Tensor]:
    """All tensors of a golden checkpoint, as they lie on disk."""
    tensors = {}
    for file in sorted((GOLDEN / case).glob("pytorch_model*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def hub_folder(folder: Path, case: str, tensors: dict | None = None, **config_changes) -> Path:
    """A copy of a golden checkpoint as one pytorch_model.bin, with other tensors or settings."""
    config = json.loads((GOLDEN / case / "config.json").read_text()) | config_changes
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(hub_state_dict(case) if tensors is None else tensors, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    """(case, model, expected tensors, what the sub-modules put out)."""
    model = BlockFFNForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()
    expected = load_file(GOLDEN / request.param / "expected.safetensors")
    seen, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        for name, module in {
            "router_activations": layer.mlp.router_act_fn,
            "attention_output": layer.self_attn,
            "mlp_output": layer.mlp,
            "hidden_states": layer,
        }.items():

            def note(module, arguments, output, key=f"layers.{index}.{name}"):
                seen[key] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        output = model(expected["input_ids"], labels=expected["input_ids"])
    for handle in handles:
        handle.remove()
    seen |= {"logits": output.logits, "loss": output.loss.reshape(1)}
    return request.param, model, expected, seen


def test_golden_covers_three_kinds():
    assert CASES == ["mla_block", "vanilla_gqa_block", "vanilla_mha_block_linear"]


def test_golden_outputs(golden):
    _, model, expected, seen = golden
    assert set(seen) == set(expected) - {"input_ids", "greedy_ids"}
    for key, value in seen.items():
        torch.testing.assert_close(
            value, expected[key], atol=TOLERANCE, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )
    # exact zeros are the signal: their pattern must agree too
    for index in range(model.config.num_hidden_layers):
        key = f"layers.{index}.router_activations"
        assert torch.equal(seen[key] == 0, expected[key] == 0)


def test_golden_greedy(golden):
    _, model, expected, _ = golden
    prompt = expected["greedy_ids"][:, :9]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ids, expected["greedy_ids"])


@pytest.mark.parametrize("attention_type", ["vanilla", "mla"])
@pytest.mark.parametrize("norm", ["rms", "sum", "none"])
def test_mlp_is_the_formula(norm, attention_type):
    """out = sum over experts, one at a time, of norm(relu(W x))_e * down_e(silu(up_e(x)))."""
    config = tiny_config(norm_after_router=norm, norm_scale=0.7, attention_type=attention_type)
    torch.manual_seed(1)
    mlp = BlockFFNMLP(config)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, config.hidden_size)
    gate = torch.relu(x @ mlp.router_proj.weight.T)
    assert (gate == 0).any() and (gate > 0).any()
    if norm == "rms":
        gate = gate / torch.sqrt((gate**2).mean(-1, keepdim=True) + config.rms_norm_eps) * mlp.router_norm.weight
    if norm == "sum":
        gate = gate / (gate.sum(-1, keepdim=True) * 0.7 + 1e-5)
    width, out = config.expert_size, torch.zeros_like(x)
    for expert in range(config.num_experts):
        rows = slice(expert * width, (expert + 1) * width)
        inner = functional.silu(x @ mlp.up_proj.weight[rows].T)
        out = out + gate[..., expert : expert + 1] * (inner @ mlp.down_proj.weight[:, rows].T)
    torch.testing.assert_close(mlp(x), out, atol=2e-5, rtol=1e-5)
    assert ("router_norm.weight" in dict(mlp.named_parameters())) == (norm == "rms")


def test_sum_norm_survives_a_token_without_experts():
    mlp = BlockFFNMLP(tiny_config(norm_after_router="sum"))
    assert torch.equal(mlp.router_norm(torch.zeros(1, 1, 5)), torch.zeros(1, 1, 5))


@pytest.mark.parametrize("attention_type", ["vanilla", "mla"])
def test_cached_equals_uncached(attention_type):
    model = tiny_model(attention_type=attention_type)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        output = model(ids[:, :7], use_cache=True)
        pieces = [output.logits]
        for position in range(7, 20):
            output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=TOLERANCE, rtol=0)
    generated = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            use_cache=cache,
            eos_token_id=None,
        )
        for cache in (True, False)
    ]
    assert generated[0].shape == (2, 32) and torch.equal(*generated)


@pytest.mark.parametrize("attention_type", ["vanilla", "mla"])
def test_left_padding_equals_single_runs(attention_type):
    model = tiny_model(attention_type=attention_type)
    lengths = (5, 9, 12)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 64, (1, length), generator=generator) for length in lengths]
    ids = torch.cat([functional.pad(row, (12 - row.shape[1], 0), value=1) for row in rows])
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, single in enumerate(rows):
            torch.testing.assert_close(batch[row, -lengths[row] :], model(single).logits[0], atol=TOLERANCE, rtol=0)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    together = model.generate(ids, attention_mask=mask, **options)[:, 12:]
    for row, single in enumerate(rows):
        alone = model.generate(single, attention_mask=torch.ones_like(single), **options)
        assert torch.equal(together[row], alone[0, lengths[row] :])


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(case, tmp_path):
    """Saved files have the hub's keys and shapes and give the same logits."""
    model = BlockFFNForCausalLM.from_pretrained(GOLDEN / case, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), hub_state_dict(case)
    original.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    assert "model.layers.0.mlp.up_proj" in saved
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in original.items()}
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    again = BlockFFNForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_state_dict_of_every_layout(tmp_path):
    """One .bin, sharded .bin, safetensors and sharded safetensors give the same model."""
    case = "vanilla_mha_block_linear"
    tensors = hub_state_dict(case)
    reference = BlockFFNForCausalLM.from_pretrained(GOLDEN / case, dtype=torch.float32).state_dict()
    folders = []
    for kind in ("bin", "safetensors", "sharded"):
        folder = tmp_path / kind
        folder.mkdir()
        hub_folder(folder, case, tensors)
        if kind != "bin":
            (folder / "pytorch_model.bin").unlink()
        if kind == "safetensors":
            save_file(
                {key: value.contiguous() for key, value in tensors.items()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
        if kind == "sharded":
            names = sorted(tensors)
            shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
            for shard, keys in shards.items():
                save_file({key: tensors[key].contiguous() for key in keys}, folder / shard, {"format": "pt"})
            weight_map = {key: shard for shard, keys in shards.items() for key in keys}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        folders.append(folder)
    for folder in folders:
        loaded = BlockFFNForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert loaded.keys() == reference.keys()
        assert all(torch.equal(loaded[key], reference[key]) for key in loaded)


def test_bin_is_read_mapped_and_weights_only(monkeypatch):
    calls, load = [], torch.load

    def recording(*args, **kwargs):
        calls.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recording)
    BlockFFNForCausalLM.from_pretrained(GOLDEN / "vanilla_mha_block_linear")
    reads = [call for call in calls if str(call.get("map_location")) != "meta"]
    assert len(reads) == 2 and all(call["mmap"] is True for call in reads)
    assert all(call["weights_only"] is True for call in calls)


class _Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused(tmp_path, legacy):
    marker = tmp_path / "ran"
    tensors = hub_state_dict("vanilla_gqa_block") | {"model.norm.weight": _Exploit(str(marker))}
    hub_folder(tmp_path, "vanilla_gqa_block", {})
    if legacy:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        BlockFFNForCausalLM.from_pretrained(tmp_path)
    assert not marker.exists()


def test_misfits_are_named_together(tmp_path):
    tensors = hub_state_dict("vanilla_gqa_block")
    del tensors["model.layers.1.mlp.router_proj.weight"], tensors["model.layers.2.mlp.up_proj"]
    tensors["model.layers.9.mlp.extra"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        BlockFFNForCausalLM.from_pretrained(hub_folder(tmp_path, "vanilla_gqa_block", tensors))
    message = str(error.value)
    assert "missing: model.layers.1.mlp.router_proj.weight, model.layers.2.mlp.up_proj" in message
    assert "not part of the model: model.layers.9.mlp.extra" in message
    assert "model.norm.weight has shape (7,), the configuration says (64,)" in message


@pytest.mark.parametrize("changes", [{"expert_size": 4}, {"num_experts": 6}])
def test_misshapen_experts_are_named(tmp_path, changes):
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        BlockFFNForCausalLM.from_pretrained(hub_folder(tmp_path, "vanilla_gqa_block", **changes))


def test_experts_in_the_wrong_axis_order_are_named(tmp_path):
    """Right number of elements, wrong shape: flattening must not hide it."""
    tensors = hub_state_dict("vanilla_gqa_block")
    tensors["model.layers.0.mlp.up_proj"] = tensors["model.layers.0.mlp.up_proj"].transpose(0, 1).contiguous()
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        BlockFFNForCausalLM.from_pretrained(hub_folder(tmp_path, "vanilla_gqa_block", tensors))


@pytest.mark.parametrize("field", ["attention_type", "ffn_type", "norm_after_router", "router_act", "hidden_act"])
def test_unknown_kind_is_refused_by_name(tmp_path, field):
    with pytest.raises(Exception, match=f"{field} is 'mystery'") as error:
        BlockFFNConfig(**{field: "mystery"})
    assert isinstance(error.value, ValueError)
    with pytest.raises(ValueError, match=f"{field} is 'mystery'"):
        BlockFFNForCausalLM.from_pretrained(hub_folder(tmp_path, "vanilla_gqa_block", **{field: "mystery"}))


def test_config_reads_the_hubs_file():
    """Unknown keys are kept, a missing rope_theta is 10,000, vanilla heads rotate whole."""
    raw = json.loads((GOLDEN / "vanilla_gqa_block" / "config.json").read_text())
    assert "rope_theta" not in raw and "auto_map" in raw
    config = BlockFFNConfig.from_pretrained(GOLDEN / "vanilla_gqa_block")
    assert (config.num_experts, config.expert_size, config.head_dim) == (12, 8, 16)
    assert config.rope_parameters["rope_theta"] == 10_000.0
    assert config.ffn_gated is True and config.block_implementation == "torch"
    assert BlockFFNConfig.from_pretrained(GOLDEN / "mla_block").head_dim == 8


def test_config_takes_the_hubs_rope_theta(tmp_path):
    folder = hub_folder(tmp_path, "vanilla_gqa_block", rope_theta=500_000.0)
    assert BlockFFNConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 500_000.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    case = GOLDEN / "vanilla_gqa_block"
    model = BlockFFNForCausalLM.from_pretrained(case, dtype=dtype).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = load_file(case / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits.float()
    scale = expected["logits"].std()
    assert (logits - expected["logits"]).square().mean().sqrt() < 0.1 * scale


def test_dtype_auto_is_the_configs(tmp_path):
    shutil.copytree(GOLDEN / "vanilla_gqa_block", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert BlockFFNForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16


def test_gradients_reach_every_parameter():
    model = tiny_model()
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(4))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())

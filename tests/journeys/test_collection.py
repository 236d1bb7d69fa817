"""08 on tiny models: the right journeys, whatever the batch, the process or the interruption; errors of one line."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from src.base import cli, results
from src.base.errors import UserError
from src.journeys import collection
from src.journeys.collection import Problem, collect, encode_prompts, load_problems, token_texts
from src.journeys.store import read_journeys, write_shard
from src.models.loading import load_model
from src.routing_extractor import TopKExtractor
from tests.tiny import blockffn_folder, byte_tokenizer, llama_folder

ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)


def save(model, folder: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def mixtral_folder(folder: Path, **changes) -> Path:
    """A random Mixtral of 3 layers, 8 experts, top-2, with a byte tokenizer."""
    torch.manual_seed(0)
    config = MixtralConfig(**(SIZES | {"num_hidden_layers": 3, "num_local_experts": 8} | changes))
    return save(MixtralForCausalLM(config), folder)


def qwen_folder(folder: Path) -> Path:
    """A random Qwen2-MoE of 4 layers, of which the second has no router."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**SIZES, num_hidden_layers=4, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[1],
                            moe_intermediate_size=12, shared_expert_intermediate_size=8)  # fmt: skip
    return save(Qwen2MoeForCausalLM(config), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return mixtral_folder(tmp_path_factory.mktemp("model") / "tiny-mixtral")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """11 prompts of different lengths."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "naïve " + "x" * (7 * i % 23) + str(i)}) for i in range(11)))
    return file


def run(*arguments) -> None:
    """Run the script's main in this process, as its own `__main__` would."""
    spec = importlib.util.spec_from_file_location("collect_journeys", ROOT / "scripts" / "journeys" / "01_collect.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        cli.run_main(lambda: module.main(module.parse([*map(str, arguments)])))
    finally:
        del sys.modules[spec.name]


def refused(capsys, *arguments, code: int = 2) -> str:
    """The one line on stderr of a run that ends with this exit code."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == code
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def common(model: Path, data: Path | str, folder: Path) -> list:
    return ["--model", model, "--datasets", data, "--output-dir", folder, "--device", "cpu", "--batch-problems", 2,
            "--shard-problems", 3]  # fmt: skip


def for_vllm(model: Path, data: Path, folder: Path) -> list:
    """As `common`, without the flags that vLLM does not know."""
    arguments = common(model, data, folder)
    place = arguments.index("--batch-problems")
    return [*arguments[:place], *arguments[place + 2 :], "--engine", "vllm"]


def folder_of(output: Path, model: Path) -> Path:
    return results.output_dir(output, model) / "journeys"


def shards(output: Path, model: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder_of(output, model) / "store").iterdir())}


@pytest.fixture(scope="module")
def collected(model, data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("collected")
    run(*common(model, data, output), "--generate", 4)
    return output


def by_hand(model, prompt: list[int], generate: int, end: int | None = None):
    """(ids, experts [n, L, K], probs) one token after another, without cache, batch or extractor."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    ids = list(prompt)
    logits: dict = {}
    handles = [
        gate.register_forward_hook(lambda module, arguments, output, layer=layer: logits.update({layer: output[0]}))
        for layer, gate in enumerate(gates)
    ]
    try:
        with torch.no_grad():
            for _ in range(generate):
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == end:
                    break
                ids.append(token)
            model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    experts = np.zeros((len(ids), len(gates), 2), dtype=int)
    probs = np.zeros((len(ids), len(gates), 2))
    for layer, values in logits.items():
        for token, row in enumerate(values.double().softmax(-1).tolist()):
            best = sorted(range(8), key=lambda expert: -row[expert])[:2]
            experts[token, layer] = best
            probs[token, layer] = [row[expert] / sum(row[e] for e in best) for expert in best]
    return ids, experts, probs


# ---------------------------------------------------------------------------------------------------------- collecting


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prompts_and_generated_tokens_against_single_forwards(model, batch_size):
    network, tokenizer = load_model(model, "cpu")
    network.set_experts_implementation("eager")
    prompts = encode_prompts(tokenizer, [Problem(i, "ab" * i + "c") for i in (4, 0, 9, 2, 5)], 256)
    first = by_hand(network, prompts[0], 6)[0][len(prompts[0]) + 2]  # an end that comes up after two tokens
    for ends in ([], [first]):
        with TopKExtractor(network) as extractor:
            recorded = collect(network, extractor, prompts, 6, ends, batch_size)
        assert len(recorded) == 5
        for prompt, entry in zip(prompts, recorded, strict=True):
            ids, experts, probs = by_hand(network, prompt, 6, ends[0] if ends else None)
            assert entry.ids.tolist() == ids and entry.prompt_length == len(prompt)
            np.testing.assert_array_equal(entry.experts, experts)
            np.testing.assert_allclose(entry.gating_probs, probs, atol=1e-3)
            assert entry.gating_probs.dtype == np.float16
    assert len(recorded[0].ids) == len(prompts[0]) + 2  # the end itself has no journey


def test_the_store_of_a_run(collected, model, data):
    stored = read_journeys(folder_of(collected, model))
    network, tokenizer = load_model(model, "cpu")
    network.set_experts_implementation("eager")
    texts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    assert stored.model == str(model) and stored.layers == (0, 1, 2) and stored.num_experts == 8
    assert set(stored.dataset) == {"prompts"} and sorted(set(stored.problem_id)) == list(range(11))
    assert stored.experts.dtype == np.uint8
    np.testing.assert_allclose(stored.gating_probs.astype(float).sum(-1), 1, atol=2e-3)
    for problem, text in enumerate(texts):
        part = stored.select(stored.problem_id == problem)
        prompt = tokenizer(text)["input_ids"]
        ids, experts, _ = by_hand(network, prompt, 4, end=2)
        assert part.token_id.tolist() == ids and part.token_idx.tolist() == list(range(len(ids)))
        assert part.is_generated.tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        np.testing.assert_array_equal(part.experts, experts)
        assert part.token[0] == "<s>" and part.token[1:4].tolist() == ["n", "a", "\ufffd"]
    summary = json.loads((folder_of(collected, model) / "collection.json").read_text())
    assert summary["datasets"]["prompts"]["journeys"] == len(stored)
    assert summary["datasets"]["prompts"]["generated"] == stored.is_generated.sum() > 0
    meta = json.loads((folder_of(collected, model) / "collection.json.meta.json").read_text())
    assert meta["data"]["prompts"]["problems"] == 11 and len(meta["model"]["sha256"]) == 64


def test_the_same_run_gives_the_same_bytes_and_does_nothing_twice(collected, model, data, tmp_path, monkeypatch):
    run(*common(model, data, tmp_path), "--generate", 4)
    assert shards(tmp_path, model) == shards(collected, model)
    monkeypatch.setattr(collection, "collect", None)  # would fail if it were called
    run(*common(model, data, tmp_path), "--generate", 4)
    assert shards(tmp_path, model) == shards(collected, model)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_goes_on(collected, model, data, tmp_path, monkeypatch, capsys, stop_after):
    write, written = write_shard, []

    def interrupted(path, *rest):
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr("src.journeys.store.write_shard", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*common(model, data, tmp_path), "--generate", 4)
    assert stop.value.code == 130
    store = folder_of(tmp_path, model) / "store"
    (store / ".prompts-00001.parquet.1.tmp").write_bytes(b"cut short")
    before = {file.name: file.stat().st_mtime_ns for file in store.glob("*.parquet")}
    assert len(before) == stop_after
    monkeypatch.undo()
    capsys.readouterr()
    run(*common(model, data, tmp_path), "--generate", 4)
    assert f"resuming at problem {3 * stop_after} of prompts" in capsys.readouterr().out
    assert shards(tmp_path, model) == shards(collected, model)
    assert {name: (store / name).stat().st_mtime_ns for name in before} == before  # not collected again


def test_two_processes_share_the_work(collected, model, data, tmp_path):
    """As `accelerate launch` starts them; the store is the same as one process's, byte for byte."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(ROOT / "scripts" / "journeys" / "01_collect.py")]  # fmt: skip
    command += [*map(str, common(model, data, tmp_path)), "--generate", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540)
    assert done.returncode == 0, done.stderr
    shares = [int(line.split()[0]) for line in done.stdout.splitlines() if " journeys in " in line]
    assert len(shares) == 2 and all(shares)  # both have worked
    stored = read_journeys(folder_of(tmp_path, model))
    assert sum(shares) == len(stored) and done.stdout.count("next: ") == 1
    assert shards(tmp_path, model) == shards(collected, model)


def test_layers_without_a_router_are_named(data, tmp_path, capsys):
    model = qwen_folder(tmp_path / "qwen")
    run(*common(model, data, tmp_path), "--problems", 2)
    assert "layers without a router, left out: 1" in capsys.readouterr().out
    stored = read_journeys(folder_of(tmp_path, model))
    assert stored.layers == (0, 2, 3) and stored.experts.shape[1:] == (3, 3) and stored.num_experts == 6
    assert json.loads((folder_of(tmp_path, model) / "collection.json").read_text())["layers_without_router"] == [1]


def test_blockffn_and_its_k(data, tmp_path, capsys):
    model = blockffn_folder(tmp_path / "blockffn")
    run(*common(model, data, tmp_path), "--problems", 2, "--top-k", 5, "--generate", 2)
    stored = read_journeys(folder_of(tmp_path, model))
    assert stored.experts.shape[1:] == (4, 5) and stored.num_experts == 12 and stored.experts.dtype == np.int16
    active = stored.experts >= 0
    assert (stored.gating_probs[~active] == 0).all() and (stored.gating_probs[active] > 0).all()
    np.testing.assert_allclose(stored.gating_probs.astype(float).sum(-1), active.any(-1), atol=3e-3)
    assert stored.is_generated.sum() > 0


def test_device_map_auto(collected, model, data, tmp_path):
    arguments = common(model, data, tmp_path)
    del arguments[arguments.index("--device") : arguments.index("--device") + 2]
    if torch.cuda.is_available():
        pytest.skip("compares with a run on the CPU")
    run(*arguments, "--device-map", "auto", "--generate", 4)
    assert shards(tmp_path, model) == shards(collected, model)


def test_export_and_import(collected, model, data, tmp_path, capsys):
    run(*common(model, data, collected), "--generate", 4, "--export")
    stored = read_journeys(folder_of(collected, model))
    folder = folder_of(collected, model) / "routing_data_collected" / "prompts_tokens"
    assert len(list(folder.glob("p*_token_*.jsonl"))) == len(stored)
    run(*common(model, data, collected), "--generate", 4, "--export", "rows")
    rows = folder_of(collected, model) / "routing_rows.jsonl"
    assert len(rows.read_text().splitlines()) == 3 * len(stored)
    for source in (folder.parent, rows):
        run("--import-from", source, "--strict", "--output-dir", tmp_path)
        back = read_journeys(tmp_path / source.stem / "journeys")
        np.testing.assert_array_equal(back.experts, stored.experts)
        np.testing.assert_array_equal(back.gating_probs, stored.gating_probs)
        assert back.model == source.stem
    capsys.readouterr()

    lines = rows.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([lines[0][:30], *lines[1:]]))
    assert "broken JSON: 1" in (line := refused(capsys, "--import-from", broken, "--strict", "--output-dir", tmp_path))
    assert "broken.jsonl, line 1" in line and not (tmp_path / "broken").exists()
    run("--import-from", broken, "--output-dir", tmp_path)
    assert "incomplete journey: 1" in capsys.readouterr().err
    assert len(read_journeys(tmp_path / "broken" / "journeys")) == len(stored) - 1


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_run_with_other_settings_is_not_mixed_in(model, data, tmp_path, capsys):
    run(*common(model, data, tmp_path), "--problems", 4)
    before = shards(tmp_path, model)
    message = refused(capsys, *common(model, data, tmp_path), "--problems", 4, "--generate", 2)
    assert "another run" in message and "other generate" in message and "--restart" in message
    assert "other data" in refused(capsys, *common(model, data, tmp_path), "--problems", 5)
    assert shards(tmp_path, model) == before
    run(*common(model, data, tmp_path), "--problems", 4, "--generate", 2, "--restart")
    assert shards(tmp_path, model).keys() == before.keys() and shards(tmp_path, model) != before
    written = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*.parquet"))]
    run(*common(model, data, tmp_path), "--problems", 4, "--generate", 2, "--restart")  # nothing differs: nothing goes
    assert written and [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*.parquet"))] == written


def test_other_weights_under_the_same_name_are_not_mixed_in(data, tmp_path, capsys):
    model = mixtral_folder(tmp_path / "model")
    run(*common(model, data, tmp_path), "--problems", 2)
    other = tmp_path / "other.txt"
    other.write_text("One.\fTwo.")
    mixtral_folder(model, rope_parameters={"rope_type": "default", "rope_theta": 5.0}, intermediate_size=16)
    assert "other model_sha256" in refused(capsys, *common(model, other, tmp_path))
    run(*common(model, other, tmp_path), "--restart")
    assert set(read_journeys(folder_of(tmp_path, model)).dataset) == {"other"}


@pytest.mark.parametrize("where", ["shard", "summary"])
def test_a_full_disk(model, data, tmp_path, capsys, monkeypatch, where):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > (1 if where == "shard" else 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(capsys, *common(model, data, tmp_path), code=1)
    monkeypatch.undo()
    files = [file for file in folder_of(tmp_path, model).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".parquet"} and len(files) == (1 if where == "shard" else 4)
    assert len(read_journeys(folder_of(tmp_path, model))) > 0


def test_refusals(model, data, tmp_path, capsys, monkeypatch):
    dense = llama_folder(tmp_path / "dense")
    assert "llama has no router" in refused(capsys, *common(dense, data, tmp_path))
    assert "no model folder" in refused(capsys, *common(tmp_path / "absent", data, tmp_path))
    assert "nowhere.txt: no such name or file" in refused(capsys, *common(model, "nowhere.txt", tmp_path))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    assert "empty.txt: the file is empty" in refused(capsys, *common(model, empty, tmp_path))
    for flag, value in (("--problems", 0), ("--generate", -1), ("--batch-problems", 0), ("--top-k", 0), ("--seed", -1)):
        assert f"{flag}: {value} is too small" in refused(capsys, *common(model, data, tmp_path), flag, value)
    assert "choose 2 experts" in refused(capsys, *common(model, data, tmp_path), "--top-k", 3)
    assert "context of 256" in refused(capsys, *common(model, data, tmp_path), "--prompt-tokens", 250, "--generate", 7)
    assert "--device-map auto chooses" in refused(capsys, *common(model, data, tmp_path), "--device-map", "auto")
    assert "is about --import-from" in refused(capsys, *common(model, data, tmp_path), "--strict")
    assert "does not exist" in refused(capsys, "--import-from", tmp_path / "no.jsonl", "--output-dir", tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "vLLM is not installed" in refused(capsys, *for_vllm(model, data, tmp_path))
    assert "llama has no router" in refused(capsys, *for_vllm(dense, data, tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        flag in shown
        for flag in ("--model", "--quick", "--seed", "--device", "--device-map", "--export", "--engine", "--output-dir")
    )


# ------------------------------------------------------------------------------------------------------------ problems


def test_humaneval():
    found = load_problems("humaneval")
    assert found.name == "humaneval" and len(found.problems) == 164
    assert [problem.id for problem in found.problems[:3]] == [0, 1, 2]
    assert "def has_close_elements" in found.problems[0].text and "for idx" not in found.problems[0].text
    assert load_problems("humaneval", 5).problems == found.problems[:5]


def test_gsm8k_without_a_hub():
    """The tests run offline: generated problems, which say so."""
    found = load_problems("gsm8k", 30)
    assert found.name == "gsm_symbolic" and found.seed == 4_000_000 and "hub cannot be reached" in found.note
    assert len({problem.text for problem in found.problems}) == 30
    assert found.problems == load_problems("gsm_symbolic", 30).problems
    assert found.problems[:10] == load_problems("gsm8k", 10, offline=True).problems
    other = load_problems("gsm_symbolic", 30, seed=1)
    assert other.seed != found.seed and other.identity()["sha256"] != found.identity()["sha256"]
    assert not any("Give the result as your final answer" in problem.text for problem in found.problems)


def test_gsm8k_from_the_hub(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"question": ["One?", "Two?", "Three?"], "answer": ["1", "2", "3"]}), tmp_path / "t.parquet"
    )
    monkeypatch.setattr(collection, "_gsm8k_file", lambda cache_dir: tmp_path / "t.parquet")
    found = load_problems("gsm8k", 2)
    assert found.name == "gsm8k" and found.problems == [Problem(0, "One?"), Problem(1, "Two?")] and found.note is None


def test_files(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "p", "text": "t"}\n\n{"question": "q"}\n{"text": "t", "prompt": ""}\n')
    assert [problem.text for problem in load_problems(str(lines)).problems] == ["p", "q", "t"]
    feeds = tmp_path / "feeds.txt"
    feeds.write_text("one\n\f\n\f two\n\nthree\n")
    assert [problem.text for problem in load_problems(str(feeds)).problems] == ["one", " two\n\nthree"]
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"{'word ' * 100}{i}" for i in range(10)))
    found = load_problems(str(prose))
    assert found.name == "prose" and len(found.problems) == 3
    assert " ".join(problem.text for problem in found.problems).split() == prose.read_text().split()
    for content, message in (
        ('{"prompt": "a"}\n{', "line 2: not JSON"),
        ('{"answer": 4}', "line 1: expected an object"),
        ("[1]", "line 1: expected an object"),
    ):
        lines.write_text(content)
        with pytest.raises(UserError, match=message):
            load_problems(str(lines))
    prose.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_problems(str(prose))


def test_token_texts():
    tokenizer = byte_tokenizer()
    ids = np.array([1, *tokenizer("a é\n", add_special_tokens=False)["input_ids"], 2])
    assert token_texts(tokenizer, ids).tolist() == ["<s>", "a", " ", "\ufffd", "\ufffd", "\n", "</s>"]


# ---------------------------------------------------------------------------------------------------------------- vLLM


class FakeVllm(types.ModuleType):
    """What collect uses of vLLM: an engine that returns experts for all tokens but the last it generates."""

    def __init__(self, num_layers: int, split: bool):
        super().__init__("vllm")
        self.options, module = {}, self

        class SamplingParams:
            def __init__(self, temperature, max_tokens):
                assert temperature == 0
                self.max_tokens = max_tokens

        class LLM:
            def __init__(self, **options):
                module.options = options

            def generate(self, prompts, sampling, use_tqdm):
                outputs = []
                for prompt in prompts:
                    ids = prompt["prompt_token_ids"]
                    tokens = list(range(10, 10 + sampling.max_tokens))
                    experts = np.arange((len(ids) + len(tokens) - 1) * num_layers * 2).reshape(-1, num_layers, 2) % 8
                    completion = types.SimpleNamespace(token_ids=tokens, routed_experts=experts)
                    output = types.SimpleNamespace(outputs=[completion])
                    if split:
                        output.prompt_routed_experts = experts[: len(ids)]
                        completion.routed_experts = experts[len(ids) :]
                    outputs.append(output)
                return outputs

        self.SamplingParams, self.LLM = SamplingParams, LLM


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("generate", [0, 3])
def test_vllm(data, tmp_path, monkeypatch, split, generate):
    model = qwen_folder(tmp_path / "qwen")
    fake = FakeVllm(4, split)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    run(*for_vllm(model, data, tmp_path), "--problems", 2, "--generate", generate)
    assert fake.options["enable_return_routed_experts"] is True and fake.options["model"] == str(model)
    stored = read_journeys(folder_of(tmp_path, model))
    assert stored.layers == (0, 2, 3) and stored.num_experts == 6 and np.isnan(stored.gating_probs).all()
    assert stored.is_generated.sum() == 2 * generate
    part = stored.select(stored.problem_id == 1)
    tokens = len(part)
    expected = np.arange(tokens * 4 * 2).reshape(tokens, 4, 2) % 8
    np.testing.assert_array_equal(part.experts, expected[:, [0, 2, 3]])
    assert part.token_id[tokens - generate :].tolist() == [10, 11, 12][:generate]


def test_vllm_that_returns_no_experts(data, tmp_path, monkeypatch, capsys):
    model = qwen_folder(tmp_path / "qwen")
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm(7, False))
    message = refused(capsys, *for_vllm(model, data, tmp_path))
    assert "unexpected" not in message and "routed experts of shape" in message
    blockffn = blockffn_folder(tmp_path / "blockffn")
    assert "vLLM does not run BlockFFN" in refused(capsys, *for_vllm(blockffn, data, tmp_path))

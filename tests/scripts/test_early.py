"""Scripts 01, 02 and 03 on a tiny model: files, columns, repeatability, and errors of one line."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.base import cli, results
from tests.tiny import blockffn_folder, llama_folder

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("01_download_model", "02_inspect_model", "03_extract_routing")


def run(name: str, *arguments) -> None:
    """Run a script's main in this process, as its own `__main__` would."""
    spec = importlib.util.spec_from_file_location(name[3:], SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        cli.run_main(lambda: module.main(module.parse()))
    finally:
        sys.argv = saved


def refused(capsys, name: str, *arguments) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(name, *arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return blockffn_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """60 short documents with words, digits and line breaks."""
    rng = np.random.default_rng(0)
    words = "the of and router expert token 12 7 model (attention) sparse\n".split(" ")
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    rows = [{"text": " ".join(rng.choice(words, 12)) + f" number {i}"} for i in range(60)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".meta.json")}


def common(model: Path, folder: Path) -> list:
    return ["--model", model, "--output-dir", folder, "--device", "cpu"]


def extract(model: Path, text: Path, folder: Path, *more) -> Path:
    run("03_extract_routing", *common(model, folder), "--dataset", text, "--documents", 8, "--resamples", 50,
        "--rank-resamples", 20, *more)  # fmt: skip
    return results.output_dir(folder, model)


@pytest.fixture(scope="module")
def extracted(model, text, tmp_path_factory) -> Path:
    return extract(model, text, tmp_path_factory.mktemp("out"), "--prompts", "The cat", "naïve ☃", "x = 1\n")


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(flag in shown for flag in ("--model", "--quick", "--device", "--dtype", "--output-dir"))
    assert ("--seed" in shown) == (name != "02_inspect_model")  # which draws nothing


def test_model_info(model, tmp_path, capsys):
    folder = results.output_dir(tmp_path, model)
    run("01_download_model", *common(model, tmp_path), "--documents", 2)
    shown = capsys.readouterr().out
    assert "num_experts                12" in shown and "active per token" in shown and "model_info.json" in shown
    first = json.loads((folder / "model_info.json").read_text())
    measured = first["measured"]
    experts = first["parameters"]["experts"]
    idle = sum(value * experts / 4 for value in measured["per_layer_sparsity"].values())
    assert measured["active_parameters"] == round(first["parameters"]["total"] - idle)
    assert 0 < measured["sparsity"] < 1

    run("02_inspect_model", *common(model, tmp_path), "--weights")
    shown = capsys.readouterr().out
    assert "[router]" in shown and "[experts, up]" in shown and "a sidecar goes here" in shown
    assert "3 more layers (--layers all)" in shown and "output [B, T, 12]" in shown and "zeros" in shown
    second = json.loads((folder / "model_info.json").read_text())
    assert {key: second[key] for key in first} == first
    assert set(second) - set(first) == {"weights"}
    assert (
        second["model"]["sha256"] == json.loads((folder / "model_info.json.meta.json").read_text())["model"]["sha256"]
    )

    before = files_of(folder)
    run("01_download_model", *common(model, tmp_path), "--documents", 2)
    run("02_inspect_model", *common(model, tmp_path))
    assert files_of(folder) == before


def test_layers_shown(model, tmp_path, capsys):
    run("02_inspect_model", *common(model, tmp_path), "--layers", 2)
    shown = capsys.readouterr().out
    assert "shapes of layer 2" in shown and "shapes of layer 0" not in shown
    run("02_inspect_model", *common(model, tmp_path), "--layers", "all")
    shown = capsys.readouterr().out
    assert all(f"shapes of layer {layer}" in shown for layer in range(4)) and "more layers" not in shown


@pytest.mark.parametrize("qwen", [False, True])
def test_a_model_without_router(tmp_path, capsys, qwen):
    other = llama_folder(tmp_path / "other", qwen)
    run("01_download_model", *common(other, tmp_path))
    assert "has no router" in capsys.readouterr().out
    line = refused(capsys, "01_download_model", *common(other, tmp_path), "--documents", 2)
    assert "--documents has no effect here" in line and "has no router" in line
    run("02_inspect_model", *common(other, tmp_path))
    shown = capsys.readouterr().out
    assert "has no router" in shown and "a sidecar goes here" in shown and "[experts" not in shown
    info = json.loads((results.output_dir(tmp_path, other) / "model_info.json").read_text())
    assert set(info["insertion_points"]) == {"sidecar"} and "measured" not in info


def test_routing_signals(extracted):
    signals = json.loads((extracted / "routing_signals.json").read_text())
    assert set(signals) == {"model", "num_layers", "num_experts", "prompts"}
    assert (signals["num_layers"], signals["num_experts"]) == (4, 12)
    assert [entry["prompt"] for entry in signals["prompts"]] == ["The cat", "naïve ☃", "x = 1\n"]
    for entry in signals["prompts"]:
        assert set(entry) == {"prompt", "tokens", "overall_sparsity", "per_layer_sparsity", "per_token_sparsity"}
        table = np.array(entry["per_token_sparsity"])
        assert table.shape == (4, len(entry["tokens"])) and entry["tokens"][0] == "<s>"
        assert list(entry["per_layer_sparsity"]) == ["0", "1", "2", "3"]
        np.testing.assert_allclose(list(entry["per_layer_sparsity"].values()), table.mean(axis=1))
        assert entry["overall_sparsity"] == pytest.approx(table.mean())


def test_routing_tables(extracted):
    layers = pd.read_csv(extracted / "routing_by_layer.csv")
    arrays = np.load(extracted / "routing_tokens.npz")
    sparsity = 1 - arrays["active"] / arrays["num_experts"]
    assert len(layers) == 4 and (layers["tokens"] == len(sparsity)).all()
    np.testing.assert_allclose(layers["tls"], sparsity.mean(axis=0), rtol=1e-8)
    assert set(layers) >= {"cls_2", "cls_4", "cls_8", "cls_16", "cls_32", "cls_32_ci_low", "tls_ci_high"}
    experts = pd.read_csv(extracted / "routing_experts.csv")
    np.testing.assert_allclose(1 - experts.groupby("layer")["usage"].sum() / 12, layers["tls"], rtol=1e-8)
    kinds = pd.read_csv(extracted / "routing_by_kind.csv")
    assert set(kinds["kind"]) >= {"function word", "content word", "digit", "newline"}
    assert (kinds.groupby("layer")["tokens"].sum() == len(sparsity)).all()
    positions = pd.read_csv(extracted / "routing_by_position.csv")
    assert set(positions["positions"]) >= {"001-003", "004-015", "016-063"}
    correlations = pd.read_csv(extracted / "routing_correlations.csv")
    assert len(correlations) == 4 * 3 and correlations["rho"].between(-1, 1).all()
    extremes = pd.read_csv(extracted / "routing_extreme_tokens.csv", keep_default_na=False)
    assert (
        extremes[extremes.extreme == "most"]["sparsity"].min() > extremes[extremes.extreme == "least"]["sparsity"].max()
    )
    for file in extracted.iterdir():
        if not file.name.endswith(".meta.json"):
            meta = json.loads(results.meta_path(file).read_text())
            assert meta["model"]["sha256"] and meta["data"]["evaluation"]["sha256"] and meta["seeds"]


def test_same_seed_same_bytes(extracted, model, text, tmp_path):
    again = extract(model, text, tmp_path, "--prompts", "The cat", "naïve ☃", "x = 1\n")
    assert files_of(again) == files_of(extracted)


def test_prompt_file_and_quick(model, text, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\n  \nsecond\n")
    run(
        "03_extract_routing",
        *common(model, tmp_path),
        "--dataset",
        text,
        "--prompt-file",
        prompts,
        "--quick",
        "--resamples",
        50,
    )
    folder = results.output_dir(tmp_path, model, quick=True)
    signals = json.loads((folder / "routing_signals.json").read_text())
    assert [entry["prompt"] for entry in signals["prompts"]] == ["first", "second"]
    assert not results.output_dir(tmp_path, model).exists()


def test_03_names_a_model_without_router(tmp_path, text, capsys):
    other = llama_folder(tmp_path / "other")
    assert "llama has no router" in refused(capsys, "03_extract_routing", *common(other, tmp_path), "--dataset", text)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompts", " "], "no prompt in --prompts"),
        (["--prompt-file", "{empty}"], "no prompt in"),
        (["--prompt-file", "{absent}"], "No such file"),
        (["--prompt-file", "{binary}"], "not UTF-8"),
        (["--prompt-file", "{folder}"], "is a folder"),
        (["--prompt-file", "{empty}", "--prompts", "a"], "not both"),
        (["--documents", "0"], "argument --documents: 0 is too small; it must be at least 1"),
        (["--document-tokens", "100000"], "context is 256"),
        (["--dataset", "{absent}"], "absent"),
        (["--model", "./nowhere"], "no model folder ./nowhere"),
        (["--model", "nobody/nothing"], "use --model blockffn-tiny"),
        (["--device", "abacus"], "'abacus'"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_03_refuses_and_keeps_earlier_results(extracted, model, text, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    paths = {name: str(tmp_path / name) for name in ("empty", "absent", "binary")} | {"folder": str(tmp_path)}
    arguments = [argument.format(**paths) for argument in arguments]
    before = files_of(extracted)
    line = refused(
        capsys, "03_extract_routing", *common(model, extracted.parent), "--dataset", text, "--documents", 8, *arguments
    )
    assert words in line
    assert files_of(extracted) == before


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("01_download_model", ["--model", "/nowhere"], "no model folder /nowhere"),
        ("01_download_model", ["--model", "nobody/nothing"], "scripts/01_download_model.py where there is a network"),
        ("01_download_model", ["--documents", "0"], "0 is too small"),
        ("02_inspect_model", ["--layers", "4"], "layer 4 is not there: the model has layers 0 to 3"),
        ("02_inspect_model", ["--layers=-1"], "'-1' names no layers"),
        ("02_inspect_model", ["--seed", "1"], "unrecognized arguments: --seed"),
        ("02_inspect_model", ["--dtype", "int3"], "'int3'"),
    ],
)
def test_01_and_02_refuse(model, tmp_path, capsys, name, arguments, words):
    assert words in refused(capsys, name, *common(model, tmp_path), *arguments)
    assert not any(tmp_path.iterdir())


def test_a_truncated_checkpoint(tmp_path, capsys, text):
    broken = blockffn_folder(tmp_path / "broken")
    with (broken / "pytorch_model.bin").open("r+b") as handle:
        handle.truncate(100_000)
    for name in NAMES:
        assert "pytorch_model.bin is cut short" in refused(capsys, name, *common(broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_next_command_repeats_what_it_knows(model, tmp_path, capsys):
    run("01_download_model", *common(model, tmp_path), "--documents", 2, "--seed", 3)
    last = capsys.readouterr().out.strip().split("\n")[-1]
    words = f"next: python scripts/02_inspect_model.py --model {model} --device cpu --output-dir {tmp_path}"
    assert last == words  # 02 has no --seed
    run("02_inspect_model", *common(model, tmp_path))
    assert "next: python scripts/03_extract_routing.py --model" in capsys.readouterr().out

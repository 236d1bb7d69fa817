"""The checks of script 04: they pass on sound models, notice broken ones, and the script trains, loads and refuses."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src import mamba_sidecar as ms
from src.base.text_data import TokenDocument
from src.hybrid import layer as hybrid_layer
from src.hybrid.cache import HybridCacheLayer
from src.hybrid.checks import format_table, kernel_difference, run_checks
from src.hybrid.gates import GateInputs
from src.models.blockffn import BlockFFNForCausalLM
from tests.tiny import GOLDEN, blockffn_folder, llama_folder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ms.SidecarSettings(d_state=8, headdim=16, chunk_size=16)


def documents(vocabulary):
    rng = np.random.default_rng(0)
    return [TokenDocument(f"d{i}", "docs", rng.integers(3, vocabulary, 120), 120) for i in range(4)]


@pytest.fixture(scope="module")
def model():
    return BlockFFNForCausalLM.from_pretrained(GOLDEN / "vanilla_gqa_block", dtype=torch.float32).eval()


def failures(rows):
    return {row["check"] for row in rows if row["passed"] is False}


def run(model, layers=(1, 2)):
    vocabulary = model.config.vocab_size
    return run_checks(model, layers, documents(vocabulary), SETTINGS)


def test_every_promise_holds_and_the_model_is_left_alone(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = run(model)
    assert not failures(rows), format_table(rows)
    gates = {row["gate"] for row in rows}
    assert {"fixed_1", "random_0.5", "routing_soft", "routing_hard", "routing_lookahead_hard", "learned_hard"} <= gates
    assert sum(row["passed"] is True for row in rows) >= 4 * 8 + 3
    assert all("0 gates flipped" in row["note"] for row in rows if "flipped" in row["note"])
    assert not ms.is_attached(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_without_router_and_layer_0_say_what_was_left_out(model):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0
    )
    rows = run(LlamaForCausalLM(config).eval())
    assert not failures(rows)
    assert [row["note"] for row in rows if row["check"] == "gate was not checked"] == ["the model has no router"]
    rows = run(model, layers=(0, 1))
    assert not failures(rows)
    assert any("lookahead was checked" in row["note"] for row in rows)


def test_checks_notice_a_gate_that_looks_ahead(model, monkeypatch):
    real = hybrid_layer.mamba_share

    def peeking(gate, index, inputs: GateInputs):
        if inputs.scores is not None:
            inputs = GateInputs(inputs.scores.roll(-1, dims=1), inputs.document_keys, inputs.positions, inputs.masks)
        return real(gate, index, inputs)

    monkeypatch.setattr(hybrid_layer, "mamba_share", peeking)
    assert "no gate looks ahead" in failures(run(model))


def test_checks_notice_a_sidecar_that_hears_padding(model, monkeypatch):
    real = ms.MambaSidecar.forward
    monkeypatch.setattr(ms.MambaSidecar, "forward", lambda self, x, cache=None, padding_mask=None: real(self, x, cache))
    assert failures(run(model)) == {"a left-padded batch equals single runs"}


def test_checks_notice_lost_positions_and_states(model, monkeypatch):
    monkeypatch.setattr(HybridCacheLayer, "get_seq_length", HybridCacheLayer.attention_tokens)
    with pytest.raises(ValueError, match="has seen"):  # refused before it could go wrong
        run(model)
    monkeypatch.undo()
    real = ms.MambaSidecar.forward
    monkeypatch.setattr(ms.MambaSidecar, "forward", lambda self, x, cache=None, mask=None: real(self, x, None, mask))
    assert "cached equals uncached" in failures(run(model))


def test_short_texts_are_refused(model):
    with pytest.raises(ValueError, match="3 documents"):
        run_checks(model, [1], documents(60)[:2], SETTINGS)


def test_kernel_difference_of_one_path_is_nothing():
    assert kernel_difference("cpu", SETTINGS, hidden_size=32) == 0.0


# ---------------------------------------------------------------- the script


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str


def script(*arguments):
    """The script in this process: starting Python and importing transformers takes longer than what it does here."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["04_test_sidecar.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "scripts" / "04_test_sidecar.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return Finished(code or 0, out.getvalue(), err.getvalue())


TRAINING = (
    *("--headdim", 16, "--d-state", 8, "--sequence-tokens", 64, "--batch-sequences", 2, "--train-sequences", 8),
    *("--validation-sequences", 2, "--steps-a", 6, "--steps-b", 4, "--steps-gate", 3),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model folder, a text file, and a finished run of the script."""
    folder = tmp_path_factory.mktemp("script")
    blockffn_folder(folder / "model")
    llama_folder(folder / "llama")
    words = np.random.default_rng(0).choice("red green blue apple pear plum cat dog runs sleeps eats".split(), (40, 60))
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"id": str(i), "text": " ".join(row)}) for i, row in enumerate(words)))
    common = ["--model", folder / "model", "--dataset", text, "--output-dir", folder / "out", "--window-tokens", 128]
    common += ["--recovery-documents", 4]
    first = script(*common, *TRAINING)
    assert first.returncode == 0, first.stdout + first.stderr
    return folder, common, first


def output_of(folder):
    (output,) = (folder / "out").iterdir()
    return output


def test_script_distils_and_writes(place):
    folder, _, first = place
    output = output_of(folder)
    assert "stage A: 4 layers together, 6 steps" in first.stdout and "time estimate" in first.stdout
    assert "recovered" in first.stdout and "next: python scripts/05" in first.stdout
    checks = json.loads((output / "sidecar_checks.json").read_text())
    assert all(check["passed"] is not False for check in checks["checks"]) and checks["kernels"] == "PyTorch"
    assert [row["stage"] for row in checks["recovery"]] == ["a", "b"]
    for row in checks["recovery"]:
        cost = row["nll_zeroed"] - row["nll_base"]
        assert row["recovered"] == pytest.approx((row["nll_zeroed"] - row["nll_mamba"]) / cost)
    log = pd.read_csv(output / "distillation.csv")
    assert set(log["stage"]) == {"a", "b", "gate"} and set(log["split"]) == {"train", "validation"}
    assert (output / "distillation.csv.meta.json").is_file() and (output / "sidecar_checks.json.meta.json").is_file()
    assert ms.available_layers(output / "sidecars", "a") == [0, 1, 2, 3]
    assert ms.available_layers(output / "sidecars", "b") == [1]
    assert (output / "sidecars" / "learned_gate.safetensors").is_file()
    assert not (output / "distillation-checkpoints").exists()


def test_recovery_is_of_the_layers_asked_for(place, tmp_path):
    folder, common, _ = place
    found, sidecars = {}, shutil.copytree(output_of(folder) / "sidecars", tmp_path / "sidecars")
    (sidecars / "learned_gate.safetensors").unlink()  # of layer 1
    for layer in (1, 2):  # stage B has layer 1 alone
        output = tmp_path / str(layer)
        extra = ["--layers", layer, "--sidecar-dir", sidecars, "--output-dir", output]
        assert script(*common, *extra).returncode == 0
        rows = json.loads((next(output.iterdir()) / "sidecar_checks.json").read_text())["recovery"]
        assert all(row["layers"] == [layer] for row in rows)
        found[layer] = {row["stage"]: row for row in rows}
    assert set(found[1]) == {"a", "b"} and set(found[2]) == {"a"}
    assert found[1]["a"]["nll_zeroed"] != found[2]["a"]["nll_zeroed"]


def test_script_loads_what_is_there_and_the_same_seed_gives_the_same_files(place):
    folder, common, _ = place
    output = output_of(folder)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and "meta" not in path.name}
    again = script(*common)
    assert again.returncode == 0 and "already distilled" in again.stdout and "stage A sidecars of" in again.stdout
    kept = {path: path.read_bytes() for path in before if path.name != "sidecar_checks.json"}
    assert all(path.read_bytes() == content for path, content in kept.items() if path.name != "sidecar_checks.json")
    retrained = script(*common, *TRAINING, "--retrain", "--sidecar-dir", folder / "other")
    assert retrained.returncode == 0
    for path in (output / "sidecars").rglob("*.safetensors"):
        assert path.read_bytes() == (folder / "other" / path.relative_to(output / "sidecars")).read_bytes()
    assert (output / "distillation.csv").read_bytes() == kept[output / "distillation.csv"]


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--layers", "9"], ["layer 9", "0 to 3"]),
        (["--headdim", "7", "--retrain"], ["heads of width 7"]),
        (["--init", "best", "--retrain"], ["'best'", "random", "attention"]),
        (["--gate-share", "1.5"], ["1.5", "(0, 1)"]),
        (["--steps-a", "-1"], ["-1"]),
        (
            ["--model", "llama", "--sidecar-dir", "SIDECARS"],
            ["another checkpoint", "python scripts/04_test_sidecar.py --retrain --model"],
        ),
        (["--steps-a", "9"], ["--steps-a has no effect", "--retrain makes them anew"]),
        (["--d-state", "8"], ["--d-state has no effect", "--retrain makes them anew"]),
        (["--checks-only", "--retrain"], ["--retrain has no effect", "--checks-only"]),
        (["--checks-only", "--lr-b", "0.1"], ["--lr-b has no effect", "--checks-only"]),
        (
            ["--retrain", "--steps-gate", "0", "--gate-share", "0.3"],
            ["--gate-share has no effect", "--steps-gate is 0"],
        ),
    ],
)
def test_wrong_input_is_one_line_and_leaves_results(place, extra, words):
    folder, common, _ = place
    extra = [{"SIDECARS": output_of(folder) / "sidecars", "llama": folder / "llama"}.get(part, part) for part in extra]
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    got = script(*common, *extra)
    assert got.returncode == 2, got.stdout + got.stderr
    (line,) = [line for line in got.stderr.splitlines() if line.startswith("error:")]
    assert got.stderr.strip().endswith(line)
    assert all(word in line for word in words), line
    assert all(path.read_bytes() == content for path, content in before.items())

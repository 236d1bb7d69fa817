"""Scripts 05 to 07 end to end on a tiny random BlockFFN with untrained sidecars saved as if they were distilled."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src import study
from src.blockffn import BlockFFNConfig, BlockFFNForCausalLM
from src.mamba_sidecar import (
    SidecarSettings,
    attach_mamba_sidecar,
    attachment_of,
    detach_mamba_sidecars,
    save_learned_gates,
    save_sidecars,
)
from src.results import TIMING_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{index}" for index in range(60)]
LAYERS = 4


def script(name):
    spec = importlib.util.spec_from_file_location(f"study_script_{name[:2]}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sweep():
    return script("05_sweep_alpha")


@pytest.fixture(scope="module")
def replace():
    return script("06_replace_layer")


@pytest.fixture(scope="module")
def gated():
    return script("07_gated_hybrid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ (checkpoint and tokenizer), sidecars/ and text.jsonl."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("study")
    config = BlockFFNConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        num_experts=8, expert_size=8, intermediate_size=64, max_position_embeddings=128, attention_type="vanilla",
        ffn_type="block", tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, dim_model_base=32, scale_emb=1,
    )  # fmt: skip
    model = BlockFFNForCausalLM(config).eval()
    with torch.no_grad():  # random weights alone hardly attend: make attention matter
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(home / "model")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(home / "model")

    attach_mamba_sidecar(model, range(LAYERS), settings=SidecarSettings(d_state=8, headdim=16, chunk_size=16))
    for stage in ("a", "b"):
        save_sidecars(model, home / "sidecars", stage)
    for layer in attachment_of(model).hybrid_layers():
        torch.nn.init.normal_(layer.gate_proj.weight)
    save_learned_gates(model, home / "sidecars")
    detach_mamba_sidecars(model)

    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(20, 60)))}) for _ in range(80)]
    (home / "text.jsonl").write_text("\n".join(lines) + "\n")
    return home


def arguments(folder, output, *more):
    return [
        "--model", str(folder / "model"), "--sidecar-dir", str(folder / "sidecars"), "--dataset",
        str(folder / "text.jsonl"), "--output-dir", str(output), "--device", "cpu", "--max-samples", "6",
        "--max-tokens", "48", "--max-seq-len", "64", "--stride", "32", "--resamples", "300", *more,
    ]  # fmt: skip


GATED = ["--layers", "1,2", "--calibration-samples", "6", "--max-new-tokens", "2", "--shares", "0.5", "--random-seeds"]
GATED += ["0,1", "--temperatures", "0.03", "--threshold", "0.5"]


def result_folder(output):
    return next(Path(output).iterdir())


def without_timing(path):
    return pd.read_csv(path).drop(columns=list(TIMING_COLUMNS), errors="ignore").to_csv()


@pytest.fixture(scope="module")
def sweep_run(folder, sweep, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep")
    sweep.main(arguments(folder, output, "--alphas", "0,0.3,1", "--layers", "1,2", "--max-new-tokens", "2"))
    return output


@pytest.fixture(scope="module")
def gated_run(folder, gated, tmp_path_factory):
    output = tmp_path_factory.mktemp("gated")
    gated.main(arguments(folder, output, *GATED))
    return output


def test_sweep_columns_and_invariants(sweep_run, sweep):
    folder = result_folder(sweep_run)
    table = pd.read_csv(folder / "alpha_sweep_results.csv", dtype={"alpha": str})
    assert list(table.columns) == [
        "alpha", "perplexity", "delta_nll", "ci_low", "ci_high", "bits_per_byte", "kl", "top1_agreement",
        "tokens_per_second", "decode_tokens_per_second", "memory_gb", "flops_ideal", "flops_executed",
    ]  # fmt: skip
    assert table["alpha"].tolist() == ["baseline", "0", "0.3", "1"]
    assert pd.to_numeric(table["alpha"].iloc[1:]).tolist() == [0.0, 0.3, 1.0]
    assert not table.isna().any().any()
    baseline, zero, _, one = (table.iloc[i] for i in range(4))
    # alpha 0 is attention's own output, bit by bit
    for column in ("perplexity", "delta_nll", "ci_low", "ci_high", "bits_per_byte", "kl", "top1_agreement"):
        assert zero[column] == baseline[column], column
    assert (baseline["delta_nll"], baseline["kl"], baseline["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert one["kl"] > 0 and one["ci_low"] <= one["delta_nll"] <= one["ci_high"]
    assert one["perplexity"] == pytest.approx(baseline["perplexity"] * np.exp(one["delta_nll"]), rel=1e-7)
    assert one["flops_executed"] != baseline["flops_executed"]
    untrained = pd.read_csv(folder / "alpha_sweep_untrained.csv", dtype={"alpha": str})
    assert untrained["alpha"].tolist() == table["alpha"].tolist()
    texts = json.loads((folder / "alpha_sweep_generations.json").read_text())
    assert set(texts["texts"]) == set(table["alpha"])
    assert texts["texts"]["0"] == texts["texts"]["baseline"]


def test_sweep_rows_follow_from_the_sums_per_document(sweep_run):
    folder = result_folder(sweep_run)
    rows = pd.read_csv(folder / "alpha_sweep_results.csv", dtype={"alpha": str}).set_index("alpha")
    documents = pd.read_csv(folder / "alpha_sweep_documents.csv", dtype={"alpha": str})
    for name, table in documents.groupby("alpha"):
        assert len(table) == 6
        mean = table["nll"].sum() / table["tokens"].sum()
        assert rows.loc[name, "perplexity"] == pytest.approx(np.exp(mean), rel=1e-8)
        bits = table["nll"].sum() / np.log(2) / table["num_bytes"].sum()
        assert rows.loc[name, "bits_per_byte"] == pytest.approx(bits, rel=1e-8)
    assert (folder / "alpha_sweep_results.csv.meta.json").is_file()


def test_finished_sweep_computes_nothing_and_restart_gives_the_same_files(
    sweep_run, folder, sweep, monkeypatch, tmp_path
):
    given = ["--alphas", "0,0.3,1", "--layers", "1,2", "--max-new-tokens", "2"]
    files = sorted(result_folder(sweep_run).glob("*.csv"))
    before = {path.name: path.read_bytes() for path in files}
    with monkeypatch.context() as patch:
        patch.setattr(sweep.eval_utils, "score_documents", None)  # calling it would fail
        sweep.main(arguments(folder, sweep_run, *given))
    assert {path.name: path.read_bytes() for path in files} == before
    sweep.main(arguments(folder, tmp_path, *given))
    for path in files:
        assert without_timing(result_folder(tmp_path) / path.name) == without_timing(path)
    generations = "alpha_sweep_generations.json"
    assert (result_folder(tmp_path) / generations).read_bytes() == (path.parent / generations).read_bytes()


def test_interrupted_sweep_resumes_to_the_same_files(sweep_run, folder, sweep, monkeypatch, tmp_path):
    given = arguments(folder, tmp_path, "--alphas", "0,0.3,1", "--layers", "1,2", "--max-new-tokens", "2")
    score, labels = sweep.eval_utils.score_documents, []

    def breaks(*args, progress=None, **kwargs):
        if progress == "alpha 1":
            raise KeyboardInterrupt
        labels.append(progress)
        return score(*args, progress=progress, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.eval_utils, "score_documents", breaks)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(given)
        written = pd.read_csv(result_folder(tmp_path) / "alpha_sweep_results.csv", dtype=str)
        assert written["alpha"].tolist() == ["baseline", "0", "0.3"]
        labels.clear()
        patch.setattr(
            sweep.eval_utils,
            "score_documents",
            lambda *args, progress=None, **kwargs: labels.append(progress) or score(*args, progress=progress, **kwargs),
        )
        sweep.main(given)
    assert [label for label in labels if label and not label.startswith("untrained")] == ["alpha 1"]
    for path in result_folder(sweep_run).glob("*.csv"):
        assert without_timing(result_folder(tmp_path) / path.name) == without_timing(path)


def test_replacement_ranks_and_chooses_on_calibration_text(folder, replace, tmp_path):
    given = arguments(folder, tmp_path, "--calibration-samples", "5", "--together", "2,3")
    replace.main(given)
    results_folder = result_folder(tmp_path)
    rows = pd.read_csv(results_folder / "layer_replacement_results.csv", dtype={"layer": str})
    assert list(rows.columns) == ["layer", "perplexity", "delta", "pct_change", "delta_nll", "ci_low", "ci_high"]
    single = rows[~rows["layer"].str.startswith("combined")]
    assert sorted(single["layer"]) == [str(layer) for layer in range(LAYERS)]
    assert single["delta_nll"].is_monotonic_increasing
    calibration = pd.read_csv(results_folder / "layer_replacement_calibration.csv", dtype={"layer": str})
    safest = calibration.sort_values("delta_nll")["layer"].astype(int).tolist()
    expected = [f"combined_[{','.join(map(str, sorted(safest[:count])))}]" for count in (2, 3)]
    assert rows["layer"].iloc[LAYERS:].tolist() == expected
    evaluated = set(pd.read_csv(results_folder / "layer_replacement_results_documents.csv")["document"])
    chosen_on = set(pd.read_csv(results_folder / "layer_replacement_calibration_documents.csv")["document"])
    assert not evaluated & chosen_on
    before = (results_folder / "layer_replacement_results.csv").read_bytes()
    replace.main(given)
    assert (results_folder / "layer_replacement_results.csv").read_bytes() == before


def test_gated_columns_modes_and_shares(gated_run):
    folder = result_folder(gated_run)
    table = pd.read_csv(folder / "gated_hybrid_results.csv")
    assert list(table.columns) == [
        "mode", "gate", "signal", "uses_document", "share_target", "share_realised", "perplexity", "delta",
        "pct_change", "delta_nll", "ci_low", "ci_high", "vs_random", "vs_random_ci_low", "vs_random_ci_high",
        "flops_ideal", "flops_executed", "tokens_per_second", "memory_gb",
    ]  # fmt: skip
    rows = table.set_index("mode")
    assert rows.index.is_unique
    expected = {"baseline", "routing_hard_0.5", "control_random_0.5", "fixed_0.5", "routing_soft_0.5", "learned_0.5"}
    expected |= {"routing_soft_0.5_t0.03", "routing_hard_0.5_lookahead", "routing_threshold"}
    extra = set(rows.index) - expected
    assert expected <= set(rows.index) and len(extra) == 1 and extra.pop().startswith("control_random_0.")
    assert set(rows.index[rows["gate"] == "routing"]) == {mode for mode in rows.index if "routing" in mode}
    assert set(rows.index[rows["gate"] == "fixed"]) == {mode for mode in rows.index if "fixed" in mode}
    assert set(rows.index[rows["uses_document"]]) == {mode for mode in rows.index if mode.startswith("control")}
    assert rows.loc["fixed_0.5", "share_realised"] == 0.5
    assert rows.loc["control_random_0.5", "share_realised"] == rows.loc["routing_hard_0.5", "share_realised"]
    assert rows.loc["routing_hard_0.5", "share_realised"] == pytest.approx(0.5, abs=0.15)
    assert rows.loc["routing_hard_0.5", "signal"] == "previous"
    assert rows.loc["routing_hard_0.5_lookahead", "signal"] == "lookahead"
    compared = rows["vs_random"].notna()
    assert set(rows.index[~compared]) == {"baseline"} | {mode for mode in rows.index if mode.startswith("control")}


def test_gated_differences_follow_from_the_sums_per_document(gated_run):
    folder = result_folder(gated_run)
    rows = pd.read_csv(folder / "gated_hybrid_results.csv").set_index("mode")
    documents = pd.read_csv(folder / "gated_hybrid_documents.csv")
    nll = documents.pivot(index="document", columns="mode", values="nll")
    tokens = documents[documents["mode"] == "baseline"].set_index("document")["tokens"].loc[nll.index]
    seeds = pd.read_csv(folder / "gated_hybrid_seeds_documents.csv").pivot(
        index="document", columns="run", values="nll"
    )
    control = seeds[["control_random_0.5_seed0", "control_random_0.5_seed1"]].mean(axis=1)
    assert nll["control_random_0.5"].to_numpy() == pytest.approx(control.to_numpy(), rel=1e-8)
    assert not np.allclose(seeds["control_random_0.5_seed0"], seeds["control_random_0.5_seed1"])
    difference = (nll["routing_hard_0.5"] - nll["control_random_0.5"]).sum() / tokens.sum()
    assert rows.loc["routing_hard_0.5", "vs_random"] == pytest.approx(difference, abs=1e-9)
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["numbers"]["difference"] == pytest.approx(difference, abs=1e-9)
    low, high = (rows.loc["routing_hard_0.5", f"vs_random_ci_{side}"] for side in ("low", "high"))
    expected = "supported" if high < 0 else "refuted" if low > 0 else "inconclusive"
    assert verdict["outcome"] == expected and "preliminary" in verdict["label"]
    pairs = {pair["routing"]: pair for pair in verdict["user_criterion"]["comparisons"]}
    assert set(pairs) == {"routing_hard_0.5", "routing_soft_0.5"}
    assert pairs["routing_hard_0.5"]["perplexity_fixed"] == pytest.approx(rows.loc["fixed_0.5", "perplexity"], rel=1e-9)


def test_finished_gated_run_computes_nothing(gated_run, folder, gated, monkeypatch):
    names = ("*.csv", "verdict.json", "gated_hybrid_generations.json")
    before = {path: path.read_bytes() for name in names for path in result_folder(gated_run).glob(name)}
    monkeypatch.setattr(gated.eval_utils, "score_documents", None)
    gated.main(arguments(folder, gated_run, *GATED))
    assert {path: path.read_bytes() for path in before} == before


def test_interrupted_gated_run_resumes_to_the_same_files(gated_run, folder, gated, monkeypatch, tmp_path):
    score = gated.eval_utils.score_documents

    def breaks(*args, progress=None, **kwargs):
        if progress == "fixed_0.5":
            raise KeyboardInterrupt
        return score(*args, progress=progress, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gated.eval_utils, "score_documents", breaks)
        with pytest.raises(KeyboardInterrupt):
            gated.main(arguments(folder, tmp_path, *GATED))
    assert not (result_folder(tmp_path) / "verdict.json").exists()
    gated.main(arguments(folder, tmp_path, *GATED))
    for path in result_folder(gated_run).glob("*.csv"):
        assert without_timing(result_folder(tmp_path) / path.name) == without_timing(path)
    for name in ("verdict.json", "gated_hybrid_generations.json"):
        assert (result_folder(tmp_path) / name).read_bytes() == (result_folder(gated_run) / name).read_bytes()


def test_model_without_router_has_no_routing_rows(folder, gated, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llama")
    attach_mamba_sidecar(model, [0, 1], settings=SidecarSettings(d_state=8, headdim=16, chunk_size=16))
    save_sidecars(model, tmp_path / "sidecars", "a")
    more = [
        "--layers",
        "0,1",
        *GATED[2:],
        "--model",
        str(tmp_path / "llama"),
        "--sidecar-dir",
        str(tmp_path / "sidecars"),
    ]
    gated.main(arguments(folder, tmp_path / "out", *more))
    rows = pd.read_csv(result_folder(tmp_path / "out") / "gated_hybrid_results.csv").set_index("mode")
    assert set(rows.index) == {"baseline", "fixed_0.5", "control_random_0.5"}
    assert rows.loc["control_random_0.5", "share_realised"] == pytest.approx(0.5, abs=0.02)
    verdict = json.loads((result_folder(tmp_path / "out") / "verdict.json").read_text())
    assert verdict["outcome"] == "not applicable" and verdict["user_criterion"]["met"] is None


def test_verdict_words_follow_the_interval(gated):
    interval = study.stats.Interval
    assert gated.decide(interval(-1.0, -2.0, -0.5)) == "supported"
    assert gated.decide(interval(1.0, 0.5, 2.0)) == "refuted"
    assert gated.decide(interval(-1.0, -2.0, 0.5)) == "inconclusive"


def test_hybrid_layers_start_after_layer_zero(gated):
    assert gated.hybrid_layers("first_half", 4, "previous", router=True) == [1]
    assert gated.hybrid_layers("first_half", 4, "lookahead", router=True) == [0, 1]
    with pytest.raises(ValueError, match="layer 0"):
        gated.hybrid_layers("0,1", 4, "previous", router=True)


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("05_sweep_alpha", ["--alphas", "0,1.5"], "alpha 1.5 lies outside"),
        ("05_sweep_alpha", ["--layers", "9"], "9"),
        ("05_sweep_alpha", ["--sidecar-dir", "nowhere"], "no distilled sidecars in nowhere"),
        ("06_replace_layer", ["--together", "1"], "at least 2"),
        ("07_gated_hybrid", ["--shares", "0,0.5"], "strictly between 0 and 1"),
        ("07_gated_hybrid", ["--threshold", "2"], "outside \\[0, 1\\]"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, name, more, message, tmp_path, monkeypatch, capsys):
    module = script(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments(folder, tmp_path, *more)])
    with pytest.raises(SystemExit) as stopped:
        module.results.run_main(module.main)
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    import re

    assert re.search(message, error[0])
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("name", ["05_sweep_alpha", "06_replace_layer", "07_gated_hybrid"])
def test_help_names_the_common_flags(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--quick", "--seed", "--device", "--model", "--output-dir", "--restart"):
        assert flag in shown

"""Scripts 05 to 07 end to end on a tiny random BlockFFN with untrained sidecars saved as if they were distilled."""

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src.base.results import TIMING_COLUMNS
from src.gating import rule
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.checkpoints import save_learned_gates, save_sidecars
from src.hybrid.layer import attachment_of
from src.hybrid.sidecar import SidecarSettings
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM

ROOT = Path(__file__).resolve().parents[2]
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
    # of layers 1 and 2 alone, as 04 trains them for its target layers
    gates = load_file(home / "sidecars" / "learned_gate.safetensors")
    kept = {name: tensor for name, tensor in gates.items() if name[0] in "12"}
    save_file(kept, home / "sidecars" / "learned_gate.safetensors")
    # a second set, as if distilled from seed 7
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in attachment_of(model).hybrid_layers():
            for parameter in layer.sidecar.parameters():
                parameter.mul_(1 + 0.1 * torch.randn(()))
    save_sidecars(model, home / "sidecars" / "seed_7", "b")
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


def test_gated_columns_modes_and_shares(gated_run, gated):
    folder = result_folder(gated_run)
    table = pd.read_csv(folder / "gated_hybrid_results.csv")
    assert list(table.columns) == list(gated.gate_study.RESULT_COLUMNS)
    rows = table.set_index("mode")
    assert rows.index.is_unique
    assert set(rows.index) == {
        "baseline", "routing_hard_0.5", "fixed_0.5", "routing_soft_0.5", "learned_0.5", "routing_soft_0.5_t0.03",
        "routing_hard_0.5_lookahead", "routing_threshold", "control_random_0.5", "control_token_shuffled_0.5",
        "control_block_shuffled_0.5", "control_random_learned_0.5",
        "control_random_lookahead_0.5", "control_random_threshold",
    }  # fmt: skip
    assert set(rows.index[rows["gate"] == "routing"]) == {mode for mode in rows.index if "routing" in mode}
    assert set(rows.index[rows["gate"] == "fixed"]) == {mode for mode in rows.index if "fixed" in mode}
    assert set(rows.index[rows["uses_document"]]) == {mode for mode in rows.index if mode.startswith("control")}
    assert rows.loc["fixed_0.5", "share_realised"] == 0.5
    assert rows.loc["routing_hard_0.5", "share_realised"] == pytest.approx(0.5, abs=0.15)
    assert rows.loc["routing_hard_0.5_lookahead", "signal"] == "lookahead"
    # two sets of sidecars for the rule's modes, one for all others
    shuffled = {"control_token_shuffled_0.5", "control_block_shuffled_0.5"}
    twice = {"routing_hard_0.5", "control_random_0.5", "fixed_0.5"} | shuffled
    assert set(rows.index[rows["sidecar_seeds"] == 2]) == twice
    compared = rows["vs_random"].notna()
    assert set(rows.index[~compared]) == {"baseline"} | {mode for mode in rows.index if "control_random" in mode}
    assert (rows.loc[compared, "p_holm"] >= rows.loc[compared, "p_value"]).all()
    assert (rows.loc[compared, "p_value"] < rows.loc[compared, "p_holm"]).any()


def test_pairs_follow_from_the_documents(gated_run):
    folder = result_folder(gated_run)
    pairs = pd.read_csv(folder / "gated_hybrid_pairs.csv").set_index("control")
    assert set(pairs.index) == {f"control_{name}_0.5" for name in ("random", "token_shuffled", "block_shuffled")}
    assert (pairs["mode"] == "routing_hard_0.5").all() and (pairs["p_holm"] >= pairs["p_value"]).all()
    sums = pd.read_csv(folder / "gated_hybrid_documents.csv")
    for control, row in pairs.iterrows():
        own, other = (sums[sums["mode"] == mode].set_index("sidecar_seed") for mode in (row["mode"], control))
        seeds = sorted(set(own.index) & set(other.index))
        assert len(seeds) == row["sidecar_seeds"]
        found = np.mean([own.loc[[s], "nll"].sum() - other.loc[[s], "nll"].sum() for s in seeds])
        assert row["difference"] == pytest.approx(found / own.loc[[seeds[0]], "tokens"].sum(), abs=1e-9)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
    answer = json.loads((folder / "verdict.json").read_text())["numbers"]
    for name in ("block_shuffled", "token_shuffled"):
        row = pairs.loc[f"control_{name}_0.5"]
        assert row["difference"] == pytest.approx(answer[f"vs_{name}"], abs=1e-9)
        assert row["ci_low"] == pytest.approx(answer[f"vs_{name}_ci_low"], abs=1e-9)


def test_compared_gates_have_equal_counts_in_every_document(gated_run):
    folder = result_folder(gated_run)
    rows = pd.read_csv(folder / "gated_hybrid_results.csv").set_index("mode")
    documents = pd.read_csv(folder / "gated_hybrid_documents.csv")
    share = documents.pivot(index=["document", "sidecar_seed"], columns="mode", values="mamba_share")
    hard = [
        mode for mode in rows.index
        if isinstance(rows.loc[mode, "control"], str) and not mode.startswith(("fixed", "routing_soft"))
    ]  # fmt: skip
    assert len(hard) == 6
    for mode in hard:
        both = share[[mode, rows.loc[mode, "control"]]].dropna()
        assert len(both) in (6, 12) and (both.iloc[:, 0] == both.iloc[:, 1]).all(), mode


def test_gated_differences_follow_from_the_sums_per_document(gated_run):
    folder = result_folder(gated_run)
    rows = pd.read_csv(folder / "gated_hybrid_results.csv").set_index("mode")
    documents = pd.read_csv(folder / "gated_hybrid_documents.csv")
    nll = documents.pivot(index=["sidecar_seed", "document"], columns="mode", values="nll")
    tokens = documents[documents["mode"] == "baseline"]["tokens"].sum()
    runs = pd.read_csv(folder / "gated_hybrid_seeds_documents.csv").pivot(index="document", columns="run", values="nll")
    drawn = runs[[f"target/control_random_0.5/sidecars7/{seed}" for seed in (7000, 7001)]]
    assert nll.loc[7, "control_random_0.5"].to_numpy() == pytest.approx(drawn.mean(axis=1).to_numpy(), rel=1e-8)
    assert not np.allclose(drawn.iloc[:, 0], drawn.iloc[:, 1])
    difference = (nll["routing_hard_0.5"] - nll["control_random_0.5"]).sum() / tokens / 2
    assert rows.loc["routing_hard_0.5", "vs_random"] == pytest.approx(difference, abs=1e-9)
    answer = json.loads((folder / "verdict.json").read_text())
    assert answer["numbers"]["difference"] == pytest.approx(difference, abs=1e-9)
    low, high = (rows.loc["routing_hard_0.5", f"vs_random_ci_{side}"] for side in ("low", "high"))
    assert (answer["numbers"]["ci_low"], answer["numbers"]["ci_high"]) == pytest.approx((low, high), abs=1e-9)
    assert "preliminary: 2 of 3 sets" in answer["label"] and "too few documents: 6 of 60" in answer["label"]
    pairs = {pair["routing"]: pair for pair in answer["user_criterion"]["comparisons"]}
    assert set(pairs) == {"routing_hard_0.5", "routing_soft_0.5"}
    assert pairs["routing_hard_0.5"]["perplexity_fixed"] == pytest.approx(rows.loc["fixed_0.5", "perplexity"], rel=1e-9)


def test_the_verdict_follows_from_the_files(gated_run, gated):
    folder = result_folder(gated_run)
    answer = json.loads((folder / "verdict.json").read_text())
    again = rule.judge(
        pd.read_csv(folder / "gated_hybrid_documents.csv"),
        pd.read_csv(folder / "gated_hybrid_results.csv"),
        rule.Rule(**answer["settings"]),
        json.loads((folder / "margin.json").read_text())["margin"],
        answer["inputs"],
        quick=False,
    )
    assert json.loads(json.dumps(again)) == answer


def test_the_margin_comes_from_calibration_text_alone(gated_run):
    folder = result_folder(gated_run)
    margin = json.loads((folder / "margin.json").read_text())
    assert margin["margin"] == pytest.approx(0.2 * np.mean(list(margin["penalty_by_sidecar_seed"].values())), rel=1e-8)
    assert set(margin["penalty_by_sidecar_seed"]) == {"0", "7"}
    assert (
        json.loads((folder / "margin.json.meta.json").read_text())["started"]
        <= (json.loads((folder / "gated_hybrid_results.csv.meta.json").read_text())["started"])
    )


def test_domains_add_up(gated_run):
    folder = result_folder(gated_run)
    rows = pd.read_csv(folder / "gated_hybrid_results.csv").set_index("mode")
    domains = pd.read_csv(folder / "gated_hybrid_domains.csv")
    one = domains[domains["mode"] == "routing_hard_0.5"]
    assert np.average(one["vs_random"], weights=one["tokens"]) == pytest.approx(
        rows.loc["routing_hard_0.5", "vs_random"]
    )


def test_finished_gated_run_computes_nothing(gated_run, folder, gated, monkeypatch):
    names = ("*.csv", "verdict.json", "gated_hybrid_generations.json")
    before = {path: path.read_bytes() for name in names for path in result_folder(gated_run).glob(name)}
    monkeypatch.setattr(gated.eval_utils, "score_documents", None)
    gated.main(arguments(folder, gated_run, *GATED))
    assert {path: path.read_bytes() for path in before} == before


def test_interrupted_gated_run_resumes_to_the_same_files(gated_run, folder, gated, monkeypatch, tmp_path):
    score = gated.eval_utils.score_documents

    def breaks(*args, progress=None, **kwargs):
        if progress == "fixed_0.5, set 0":
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


def test_a_model_without_router_goes_by_its_ffn_sparsity(folder, gated, tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llama")
    attach_mamba_sidecar(model, [1, 2], settings=SidecarSettings(d_state=8, headdim=16, chunk_size=16))
    save_sidecars(model, tmp_path / "sidecars", "a")
    more = [*GATED, "--model", str(tmp_path / "llama"), "--sidecar-dir", str(tmp_path / "sidecars")]
    gated.main(arguments(folder, tmp_path / "out", *more))
    assert "FFN activation sparsity takes its place" in capsys.readouterr().out
    rows = pd.read_csv(result_folder(tmp_path / "out") / "gated_hybrid_results.csv").set_index("mode")
    assert set(rows.index) == {
        "baseline", "fixed_0.5", "ffn_sparsity_hard_0.5", "ffn_sparsity_soft_0.5", "control_random_0.5",
        "control_token_shuffled_0.5", "control_block_shuffled_0.5",
    }  # fmt: skip
    assert set(rows.index[rows["signal"] == "ffn_previous"]) == {"ffn_sparsity_hard_0.5", "ffn_sparsity_soft_0.5"}
    assert rows.loc["ffn_sparsity_hard_0.5", "share_realised"] == pytest.approx(0.5, abs=0.1)
    assert rows.loc["control_random_0.5", "share_realised"] == rows.loc["ffn_sparsity_hard_0.5", "share_realised"]
    answer = json.loads((result_folder(tmp_path / "out") / "verdict.json").read_text())
    assert answer["outcome"] == "not applicable" and answer["user_criterion"]["met"] is None
    with pytest.raises(ValueError, match="no router"):
        gated.main(arguments(folder, tmp_path / "out", *more, "--full"))


def test_hybrid_layers_start_after_layer_zero(gated):
    assert gated.hybrid_layers("first_half", 4, "previous", "routing") == [1]
    assert gated.hybrid_layers("first_half", 4, "lookahead", "routing") == [0, 1]
    assert gated.hybrid_layers("first_half", 4, "lookahead", "ffn_sparsity") == [1]
    assert gated.hybrid_layers("first_half", 4, "previous", None) == [0, 1]
    with pytest.raises(ValueError, match="layer 0"):
        gated.hybrid_layers("0,1", 4, "previous", "routing")


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


FULL_BUDGETS = {
    "SENSITIVITY_SAMPLES": 4, "SENSITIVITY_VALIDATION_DOCUMENTS": 4, "SENSITIVITY_INTERVENTIONS": 48,
    "SENSITIVITY_RESAMPLES": 40, "SENSITIVITY_PERMUTATIONS": 40, "SENSITIVITY_MAP_TOKENS": 20,
    "PROBE_DOCUMENTS": 8, "ABLATION_STEPS_A": 2, "ABLATION_STEPS_B": 2, "DISTILL_SEQ_LEN": 32,
    "DISTILL_BATCH_SIZE": 2, "DISTILL_TRAIN_WINDOWS": 8, "DISTILL_VALIDATION_WINDOWS": 2,
    "MAMBA_D_STATE": 8, "MAMBA_HEADDIM": 16,
}  # fmt: skip


def run_full(gated, folder, output, *parts):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FULL_BUDGETS.items():
            patch.setattr(gated.config, name, value)
        gated.main(arguments(folder, output, *GATED, "--full", "--parts", *parts))
    return result_folder(output)


@pytest.fixture(scope="module")
def full_run(folder, gated, tmp_path_factory):
    """--full without recall (the word tokenizer has none of its words), with budgets of a test."""
    output = tmp_path_factory.mktemp("full")
    return run_full(gated, folder, output, "sensitivity", "probes", "layers", "ablations")


def test_full_study_goes_on_where_it_was_cut_off_and_then_computes_nothing(full_run, folder, gated, tmp_path):
    shutil.copytree(full_run.parents[0], tmp_path / "out")
    again = result_folder(tmp_path / "out")
    before = pd.read_csv(again / "layer_set_results.csv")
    (again / "layer_set_results.csv").unlink()
    for name in ("gated_hybrid_seeds.csv", "gated_hybrid_seeds_documents.csv"):  # cut off before the other layers
        table = pd.read_csv(again / name, dtype=str, keep_default_na=False)
        table[table["run"].str.startswith("target/")].to_csv(again / name, index=False)
        meta = json.loads((again / f"{name}.meta.json").read_text())
        meta["file_sha256"] = hashlib.sha256((again / name).read_bytes()).hexdigest()
        (again / f"{name}.meta.json").write_text(json.dumps(meta))
    parts = ("sensitivity", "probes", "layers", "ablations")
    run_full(gated, folder, tmp_path / "out", *parts)
    timed = ["tokens_per_second", "memory_gb"]
    pd.testing.assert_frame_equal(
        pd.read_csv(again / "layer_set_results.csv").drop(columns=timed), before.drop(columns=timed)
    )

    def refuse(*_arguments, **_settings):
        raise AssertionError("computed although it was there")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated.gate_study.Bench, "add", refuse)
        patch.setattr(gated.full_study.sensitivity, "fisher_sensitivity", refuse)
        patch.setattr(gated.full_study.probes, "fit_probe", refuse)
        patch.setattr(gated.ablations, "evaluate_variant", refuse)
        run_full(gated, folder, tmp_path / "out", *parts)


def test_full_study_measures_every_control_at_equal_counts(full_run, gated):
    rows = pd.read_csv(full_run / "gated_hybrid_results.csv").set_index("mode")
    names = [*gated.controls.CONTROLS, "oracle", "hindsight", "probe_router_linear", "probe_hidden_mlp"]
    documents = pd.read_csv(full_run / "gated_hybrid_documents.csv")
    share = documents.pivot(index=["document", "sidecar_seed"], columns="mode", values="mamba_share")
    for name in names:
        mode = f"control_{name}_0.5"
        assert rows.loc[mode, "uses_document"], mode
        both = share[[mode, "routing_hard_0.5"]].dropna()
        assert len(both) and (both.iloc[:, 0] == both.iloc[:, 1]).all(), mode
    assert (
        rows.loc["control_oracle_0.5", "sidecar_seeds"] == 2 and rows.loc["control_hindsight_0.5", "sidecar_seeds"] == 1
    )
    assert "routing_hard_0.5_shared" in rows.index


def test_full_study_writes_what_explains_the_answer(full_run):
    validation = pd.read_csv(full_run / "sensitivity_validation.csv")
    assert set(validation["estimator"]) == {"fisher_m0", "fisher_mean"} and validation["chosen"].any()
    correlations = pd.read_csv(full_run / "sensitivity_correlations.csv")
    assert {"previous_sparsity", "lookahead_sparsity", "self_sparsity", "discrepancy"} <= set(correlations["signal"])
    maps = json.loads((full_run / "sensitivity_maps.json").read_text())["documents"]
    for one in maps:
        assert np.shape(one["sensitivity"]) == np.shape(one["mamba"]) == (len(one["layers"]), len(one["tokens"]))
    gap = pd.read_csv(full_run / "probe_gap.csv")
    assert set(gap["probe"]) == {
        "router_linear", "router_mlp", "hidden_linear", "hidden_mlp", "routing_hard", "learned",
    }  # fmt: skip
    sets = pd.read_csv(full_run / "layer_set_results.csv")
    assert set(sets["layers"]) == {"all", "middle", "first_half", "last_half"}
    for name in ("init", "stages", "d_state", "tokens", "signal", "softness", "threshold"):
        table = pd.read_csv(full_run / f"ablation_{name}.csv")
        assert len(table) >= 2, name
    assert len(pd.read_csv(full_run / "distillation_curves.csv"))


def test_a_full_study_goes_on_from_a_default_run(folder, gated, gated_run, full_run, monkeypatch, tmp_path):
    """What a default run measured is in the full one too, number for number."""
    default = pd.read_csv(result_folder(gated_run) / "gated_hybrid_seeds.csv").set_index("run")
    full = pd.read_csv(full_run / "gated_hybrid_seeds.csv").set_index("run")
    assert set(default.index) < set(full.index)
    columns = ["share_realised", "perplexity", "flops_ideal"]
    pd.testing.assert_frame_equal(default[columns], full.loc[default.index, columns])

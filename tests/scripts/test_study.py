"""Scripts 05 to 10 end to end on a tiny random BlockFFN with untrained sidecars saved as if they were distilled."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import config
from src import eval_utils
from src.base import cli, results
from src.base.errors import UserError
from src.gating import ablations, controls, modes, recall, rule, runs, tables
from src.hybrid import distill
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.checkpoints import save_learned_gates, save_sidecars
from src.hybrid.layer import attachment_of
from src.hybrid.sidecar import SidecarSettings
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM
from src.models.loading import ASSETS_DIR, load_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{index}" for index in range(60)]
LAYERS = 4
# Timings differ between two runs that measure the same; everything else must not.
TIMED = ["tokens_per_second", "decode_tokens_per_second", "memory_gb"]
BUDGETS = {
    "TEST_PROMPTS": config.TEST_PROMPTS[:2], "SENSITIVITY_SAMPLES": 4, "SENSITIVITY_VALIDATION_DOCUMENTS": 4,
    "SENSITIVITY_INTERVENTIONS": 48, "SENSITIVITY_RESAMPLES": 40, "SENSITIVITY_PERMUTATIONS": 40,
    "SENSITIVITY_MAP_TOKENS": 20, "PROBE_DOCUMENTS": 8, "RECALL_LENGTHS": [192, 4096], "RECALL_EXAMPLES": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """name -> the script as a module, with the budgets of a test: 08 reads its own while it is loaded."""
    loaded = {}

    def load(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"study_script_{name[:2]}", ROOT / "scripts" / f"{name}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in BUDGETS.items():
            patch.setattr(config, name, value)
        yield load


@pytest.fixture(scope="module")
def run(script):
    """run(name, words): as `python scripts/<name>.py <words>`, which `next:` lines read; UserErrors propagate."""

    def run(name, words):
        module = script(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"scripts/{name}.py", *words])
            module.main(module.parse(words))

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ (checkpoint and tokenizer), sidecars/ and text.jsonl."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("study")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS_DIR / "blockffn-tiny")  # in whose words recall tasks are made
    model = BlockFFNForCausalLM(
        BlockFFNConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1, num_experts=8, expert_size=8, intermediate_size=64, max_position_embeddings=256,
            attention_type="vanilla", ffn_type="block", tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dim_model_base=32, scale_emb=1,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():  # random weights alone hardly attend: make attention matter
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")

    attach_mamba_sidecar(model, range(LAYERS), settings=SidecarSettings(d_state=8, headdim=16, chunk_size=16))
    for stage in ("a", "b"):
        save_sidecars(model, home / "sidecars", stage, {})
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
    save_sidecars(model, home / "sidecars" / "seed_7", "b", {})
    detach_mamba_sidecars(model)

    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(20, 60)))}) for _ in range(80)]
    (home / "text.jsonl").write_text("\n".join(lines) + "\n")
    return home


def arguments(folder, output, *more):
    return [
        "--model", str(folder / "model"), "--sidecar-dir", str(folder / "sidecars"), "--dataset",
        str(folder / "text.jsonl"), "--output-dir", str(output), "--device", "cpu", "--documents", "6",
        "--document-tokens", "48", "--window-tokens", "64", "--stride", "32", "--resamples", "300", *more,
    ]  # fmt: skip


SWEEP = ["--layers", "1,2", "--new-tokens", "2", "--alphas"]
HYBRID = ["--layers", "1,2", "--calibration-documents", "6", "--mask-seeds", "0,1"]
EXPLAINED = [*HYBRID, "--shares", "0.5", "--temperatures", "0.03", "--threshold", "0.5"]
GATED = [*EXPLAINED, "--new-tokens", "2"]
ABLATED = [
    *HYBRID, "--steps-a", "2", "--steps-b", "2", "--d-state", "8", "--headdim", "16", "--sequence-tokens", "32",
    "--batch-sequences", "2", "--train-sequences", "8", "--validation-sequences", "2",
]  # fmt: skip


def result_folder(output):
    return next(Path(output).iterdir())


def contents(folder, *patterns):
    """name -> bytes of result files; their meta files tell times and commits, and stay out."""
    patterns = patterns or ("*.csv", "*.json")
    files = (path for pattern in patterns for path in folder.glob(pattern))
    return {path.name: path.read_bytes() for path in sorted(files) if not path.name.endswith(".meta.json")}


def without_timing(path):
    return pd.read_csv(path).drop(columns=TIMED, errors="ignore").to_csv()


class _Counted:
    """Labels of what was scored and the number of texts generated, while it is in place of the two functions."""

    def __init__(self, patch, stop_at=None):
        self.labels, self.generated = [], 0
        score, generate = eval_utils.score_documents, eval_utils.generate_texts

        def counted_score(*args, progress=None, **kwargs):
            if stop_at is not None and progress == stop_at:
                raise KeyboardInterrupt
            self.labels.append(progress)
            return score(*args, progress=progress, **kwargs)

        def counted_generate(*args, **kwargs):
            self.generated += 1
            return generate(*args, **kwargs)

        patch.setattr(eval_utils, "score_documents", counted_score)
        patch.setattr(eval_utils, "generate_texts", counted_generate)

    @property
    def named(self):
        """Labels of passes over a text; measuring a speed has none."""
        return [label for label in self.labels if label]


@pytest.fixture
def counted(monkeypatch):
    return _Counted(monkeypatch)


@pytest.fixture
def no_forward(monkeypatch):
    """Whatever runs the model fails."""

    def refuse(*_arguments, **_settings):
        raise AssertionError("the model ran although everything was measured already")

    monkeypatch.setattr(BlockFFNForCausalLM, "forward", refuse)


def other_commit(monkeypatch):
    """As after a commit, with a README that was changed since."""
    monkeypatch.setattr(results, "_git_state", lambda: ("f" * 40, True))


# -- 05
@pytest.fixture(scope="module")
def sweep_run(folder, run, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep")
    run("05_sweep_alpha", arguments(folder, output, *SWEEP, "0,0.3,1"))
    return output


@pytest.fixture
def sweep_copy(sweep_run, tmp_path):
    """A finished sweep that a test may change."""
    return Path(shutil.copytree(sweep_run, tmp_path / "copy"))


def test_sweep_columns_and_invariants(sweep_run):
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


def test_finished_sweep_computes_nothing(sweep_run, folder, run, monkeypatch, capsys, no_forward):
    """Not even after a commit, and with another number of resamples the intervals alone are other ones."""
    before = contents(result_folder(sweep_run))
    run("05_sweep_alpha", arguments(folder, sweep_run, *SWEEP, "0,0.3,1"))
    assert contents(result_folder(sweep_run)) == before
    assert "computed" not in capsys.readouterr().out
    other_commit(monkeypatch)
    run("05_sweep_alpha", arguments(folder, sweep_run, *SWEEP, "0,0.3,1"))
    assert contents(result_folder(sweep_run)) == before
    meta = json.loads((result_folder(sweep_run) / "alpha_sweep_results.csv.meta.json").read_text())
    assert "f" * 40 in json.dumps(meta)  # the file tells what made it all the same
    again = ["--resamples", "200"]
    run("05_sweep_alpha", arguments(folder, sweep_run, *SWEEP, "0,0.3,1", *again))
    assert "computed" not in capsys.readouterr().out
    changed = {name for name, data in contents(result_folder(sweep_run)).items() if data != before[name]}
    assert changed == {"alpha_sweep_results.csv", "alpha_sweep_untrained.csv", "alpha_sweep_domains.csv"}
    run("05_sweep_alpha", arguments(folder, sweep_run, *SWEEP, "0,0.3,1"))
    assert contents(result_folder(sweep_run)) == before


def test_one_more_alpha_is_one_alpha_measured(sweep_copy, folder, run, counted, capsys):
    before = pd.read_csv(result_folder(sweep_copy) / "alpha_sweep_results.csv", dtype=str)
    run("05_sweep_alpha", arguments(folder, sweep_copy, *SWEEP, "0,0.3,0.6,1"))
    assert counted.named == ["alpha 0.6", "untrained 0.6"] and counted.generated == 1
    report = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("computed"))
    assert report.startswith("computed for the first time: ")
    assert set(report.removeprefix("computed for the first time: ").split("; ")) == {
        "speed at alpha 0.6", "texts at alpha 0.6", "alpha 0.6", "untrained 0.6",
    }  # fmt: skip
    after = pd.read_csv(result_folder(sweep_copy) / "alpha_sweep_results.csv", dtype=str)
    assert after["alpha"].tolist() == ["baseline", "0", "0.3", "0.6", "1"]
    pd.testing.assert_frame_equal(after[after["alpha"] != "0.6"].reset_index(drop=True), before)


def test_other_windows_are_computed_again_and_the_report_says_why(sweep_copy, folder, run, counted, capsys):
    before = pd.read_csv(result_folder(sweep_copy) / "alpha_sweep_results.csv")
    run("05_sweep_alpha", arguments(folder, sweep_copy, *SWEEP, "0,0.3,1", "--window-tokens", "24", "--stride", "16"))
    assert {"baseline", "alpha 0", "alpha 0.3", "alpha 1", "untrained 1"} <= set(counted.named)
    assert "computed again, because of other windows: " in capsys.readouterr().out
    after = pd.read_csv(result_folder(sweep_copy) / "alpha_sweep_results.csv")
    assert (after["perplexity"] != before["perplexity"]).all()


def test_other_sidecars_measure_again_what_depends_on_them(sweep_copy, folder, run, counted, capsys):
    given = [*SWEEP, "0,0.3,1", "--sidecar-dir", str(folder / "sidecars" / "seed_7")]
    run("05_sweep_alpha", arguments(folder, sweep_copy, *given))
    assert counted.named == ["alpha 0.3", "alpha 1"]  # neither the baseline, nor alpha 0, nor untrained ones
    assert "computed again, because of other sidecars: " in capsys.readouterr().out


def test_restart_computes_again_to_the_same_numbers(sweep_run, sweep_copy, folder, run, counted, capsys):
    run("05_sweep_alpha", arguments(folder, sweep_copy, *SWEEP, "0,0.3,1", "--restart"))
    assert set(counted.named) == {"baseline", "alpha 0", "alpha 0.3", "alpha 1", "untrained 0.3", "untrained 1"}
    assert "computed again, because of --restart: " in capsys.readouterr().out
    for path in result_folder(sweep_run).glob("*.csv"):
        assert without_timing(result_folder(sweep_copy) / path.name) == without_timing(path)
    generations = "alpha_sweep_generations.json"
    assert (result_folder(sweep_copy) / generations).read_bytes() == (
        result_folder(sweep_run) / generations
    ).read_bytes()


def test_interrupted_sweep_goes_on_to_the_same_files(sweep_run, folder, run, tmp_path):
    given = arguments(folder, tmp_path, *SWEEP, "0,0.3,1")
    with pytest.MonkeyPatch.context() as patch:
        first = _Counted(patch, stop_at="alpha 1")
        with pytest.raises(KeyboardInterrupt):
            run("05_sweep_alpha", given)
    assert first.named == ["baseline", "alpha 0", "alpha 0.3"]
    with pytest.MonkeyPatch.context() as patch:
        second = _Counted(patch)
        run("05_sweep_alpha", given)
    assert second.named == ["alpha 1", "untrained 0.3", "untrained 1"] and second.generated == 0
    for path in result_folder(sweep_run).glob("*.csv"):
        assert without_timing(result_folder(tmp_path) / path.name) == without_timing(path)


def test_a_damaged_piece_is_measured_again(sweep_run, sweep_copy, folder, run, counted, capsys):
    pieces = result_folder(sweep_copy) / "pieces"
    damaged = next(path for path in pieces.glob("*.json") if json.loads(path.read_text())["label"] == "alpha 0.3")
    damaged.write_text(damaged.read_text().replace('"alpha": 0.3', '"alpha": 0.4', 1)[:-20])
    run("05_sweep_alpha", arguments(folder, sweep_copy, *SWEEP, "0,0.3,1"))
    assert counted.named == ["alpha 0.3"]
    assert "because of a damaged file: alpha 0.3" in capsys.readouterr().out
    assert contents(result_folder(sweep_copy), "*.csv") == contents(result_folder(sweep_run), "*.csv")


# -- 06
def test_replacement_ranks_and_chooses_on_calibration_text(folder, run, tmp_path, monkeypatch, counted):
    given = arguments(folder, tmp_path, "--calibration-documents", "5", "--together", "2,3")
    run("06_replace_layer", given)
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
    documents = {
        split: pd.read_csv(results_folder / f"layer_replacement_{name}_documents.csv", dtype={"layer": str})
        for split, name in (("evaluation", "results"), ("calibration", "calibration"))
    }
    assert not set(documents["evaluation"]["document"]) & set(documents["calibration"]["document"])
    sums = documents["evaluation"].groupby("layer")[["nll", "tokens"]].sum()
    for row in rows.to_dict("records"):
        perplexity = np.exp(sums.loc[row["layer"], "nll"] / sums.loc[row["layer"], "tokens"])
        assert row["perplexity"] == pytest.approx(perplexity, rel=1e-8)

    before, measured = contents(results_folder), len(counted.named)
    other_commit(monkeypatch)
    run("06_replace_layer", given)
    assert contents(results_folder) == before and len(counted.named) == measured
    # all four together are one measurement more
    run("06_replace_layer", [*given, "--together", "2,3,4"])
    assert counted.named[measured:] == ["layers [0, 1, 2, 3] replaced, evaluation"]


# -- 07
@pytest.fixture(scope="module")
def gated_run(folder, run, tmp_path_factory):
    output = tmp_path_factory.mktemp("gated")
    run("07_gated_hybrid", arguments(folder, output, *GATED))
    return output


def test_gated_columns_modes_and_shares(gated_run):
    folder = result_folder(gated_run)
    table = pd.read_csv(folder / "gated_hybrid_results.csv")
    assert list(table.columns) == list(tables.RESULT_COLUMNS)
    rows = table.set_index("mode")
    assert rows.index.is_unique
    assert set(rows.index) == {
        "baseline", "routing_hard_0.5", "fixed_0.5", "routing_soft_0.5", "learned_0.5", "routing_soft_0.5_t0.03",
        "routing_hard_0.5_lookahead", "routing_threshold", "control_random_0.5", "control_token_shuffled_0.5",
        "control_block_shuffled_0.5", "control_random_learned_0.5",
        "control_random_lookahead_0.5", "control_random_threshold",
    }  # fmt: skip
    kinds = {mode: mode.split("_")[0].replace("baseline", "none") for mode in rows.index}
    assert rows["kind"].to_dict() == kinds
    assert set(rows.index[rows["uses_document"]]) == {mode for mode in rows.index if mode.startswith("control")}
    assert rows["recipe"].dropna().to_dict() == {
        "control_random_0.5": "random", "control_token_shuffled_0.5": "token_shuffled",
        "control_block_shuffled_0.5": "block_shuffled", "control_random_learned_0.5": "random",
        "control_random_lookahead_0.5": "random", "control_random_threshold": "random",
    }  # fmt: skip
    assert rows.loc["control_random_learned_0.5", "matched_to"] == "learned_0.5"
    assert rows.loc["fixed_0.5", "share_realised"] == 0.5
    assert rows.loc["routing_hard_0.5", "share_realised"] == pytest.approx(0.5, abs=0.15)
    assert rows.loc["routing_hard_0.5_lookahead", "signal"] == "lookahead"
    assert rows["temperature"].dropna().to_dict() == {"routing_soft_0.5": 0.1, "routing_soft_0.5_t0.03": 0.03}
    assert rows.loc["routing_threshold", "threshold"] == "fixed"
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
    hard = rows.index[rows["control"].notna() & rows["hard"]]
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


def test_the_verdict_follows_from_the_files(gated_run):
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
    # and it was frozen before anything was scored on the evaluation text
    times = {}
    for path in (folder / "pieces").glob("*.json"):
        times[json.loads(path.read_text())["label"]] = path.stat().st_mtime_ns
    margins = [time for label, time in times.items() if label.startswith("margin")]
    assert len(margins) == 3 and max(margins) <= times["the baseline's run"] <= times["routing_hard_0.5, set 0"]


def test_domains_add_up(gated_run):
    folder = result_folder(gated_run)
    rows = pd.read_csv(folder / "gated_hybrid_results.csv").set_index("mode")
    domains = pd.read_csv(folder / "gated_hybrid_domains.csv")
    one = domains[domains["mode"] == "routing_hard_0.5"]
    assert np.average(one["vs_random"], weights=one["tokens"]) == pytest.approx(
        rows.loc["routing_hard_0.5", "vs_random"]
    )


def test_finished_gated_run_computes_nothing(gated_run, folder, run, monkeypatch, capsys, no_forward):
    before = contents(result_folder(gated_run))
    other_commit(monkeypatch)
    run("07_gated_hybrid", arguments(folder, gated_run, *GATED))
    assert contents(result_folder(gated_run)) == before
    shown = capsys.readouterr().out
    assert "reused from earlier runs" in shown and "computed" not in shown


def test_another_learned_gate_is_all_that_is_measured_again(gated_run, folder, run, tmp_path, counted):
    output = Path(shutil.copytree(gated_run, tmp_path / "out"))
    sidecars = Path(shutil.copytree(folder / "sidecars", tmp_path / "sidecars"))
    gates = load_file(sidecars / "learned_gate.safetensors")
    save_file({name: -tensor for name, tensor in gates.items()}, sidecars / "learned_gate.safetensors")
    run("07_gated_hybrid", arguments(folder, output, *GATED, "--sidecar-dir", str(sidecars)))
    assert counted.named == ["learned_0.5, set 0", "control_random_learned_0.5, set 0, seed 0"]
    assert counted.generated == 1


def test_interrupted_gated_run_goes_on_to_the_same_files(gated_run, folder, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        first = _Counted(patch, stop_at="fixed_0.5, set 0")
        with pytest.raises(KeyboardInterrupt):
            run("07_gated_hybrid", arguments(folder, tmp_path, *GATED))
    assert not (result_folder(tmp_path) / "verdict.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        second = _Counted(patch)
        run("07_gated_hybrid", arguments(folder, tmp_path, *GATED))
    assert not set(first.named) & set(second.named) and "fixed_0.5, set 0" in second.named
    for path in result_folder(gated_run).glob("*.csv"):
        assert without_timing(result_folder(tmp_path) / path.name) == without_timing(path)
    for name in ("verdict.json", "gated_hybrid_generations.json", "margin.json"):
        assert (result_folder(tmp_path) / name).read_bytes() == (result_folder(gated_run) / name).read_bytes()


def llama_arguments(folder, home, *more):
    """Arguments for a model without a router, which is made in `home`."""
    shape = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder / "model")), hidden_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape).eval()
    model.save_pretrained(home / "llama")
    for pattern in ("tokenizer*", "special_tokens*", "vocab*", "merges*"):
        for file in (folder / "model").glob(pattern):
            shutil.copy(file, home / "llama")
    attach_mamba_sidecar(model, [1, 2], settings=SidecarSettings(d_state=8, headdim=16, chunk_size=16))
    save_sidecars(model, home / "sidecars", "a", {})
    own = ["--model", str(home / "llama"), "--sidecar-dir", str(home / "sidecars")]
    return arguments(folder, home / "out", *more, *own)


def test_a_model_without_router_goes_by_its_ffn_sparsity(folder, run, tmp_path, capsys):
    given = [*HYBRID, "--shares", "0.5", "--new-tokens", "2"]
    with pytest.raises(UserError, match="--threshold has no effect here: llama has no router"):
        run("07_gated_hybrid", llama_arguments(folder, tmp_path, *given, "--threshold", "0.5"))
    run("07_gated_hybrid", llama_arguments(folder, tmp_path, *given))
    assert "FFN activation sparsity takes its place" in capsys.readouterr().out
    rows = pd.read_csv(result_folder(tmp_path / "out") / "gated_hybrid_results.csv").set_index("mode")
    assert set(rows.index) == {
        "baseline", "fixed_0.5", "ffn_sparsity_hard_0.5", "ffn_sparsity_soft_0.5", "control_random_0.5",
        "control_token_shuffled_0.5", "control_block_shuffled_0.5",
    }  # fmt: skip
    assert set(rows.index[rows["signal"] == "ffn_previous"]) == {"ffn_sparsity_hard_0.5", "ffn_sparsity_soft_0.5"}
    assert rows.loc["ffn_sparsity_hard_0.5", "share_realised"] == pytest.approx(0.5, abs=0.1)
    assert rows.loc["control_random_0.5", "share_realised"] == rows.loc["ffn_sparsity_hard_0.5", "share_realised"]
    pairs = pd.read_csv(result_folder(tmp_path / "out") / "gated_hybrid_pairs.csv")
    assert set(pairs["mode"]) == {"ffn_sparsity_hard_0.5"} and len(pairs) == 3
    answer = json.loads((result_folder(tmp_path / "out") / "verdict.json").read_text())
    assert answer["outcome"] == "not applicable" and answer["user_criterion"]["met"] is None
    for name, given in (("08_explain_gates", EXPLAINED), ("10_ablate_sidecars", ABLATED)):
        with pytest.raises(UserError, match="no router"):
            run(name, llama_arguments(folder, tmp_path, *given))


# -- studies
def study_of(script, folder, output, *more):
    module = script("07_gated_hybrid")
    given = module.parse(arguments(folder, output, *GATED, *more))
    return runs.open_study(given, rule.rule_of(config, given)), given


def test_hybrid_layers_start_after_layer_zero(folder, script, tmp_path):
    routed = load_model(str(folder / "model"), "cpu")[0]
    dense = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=4, vocab_size=8,
                                         num_attention_heads=2))  # fmt: skip
    assert modes.hybrid_layers(routed, "first_half", "previous") == [1]
    assert modes.hybrid_layers(routed, "first_half", "lookahead") == [0, 1]
    assert modes.hybrid_layers(dense, "first_half", "lookahead") == [1]
    with pytest.raises(UserError, match="layer 0"):
        modes.hybrid_layers(routed, "0,1", "previous")
    # what the error advises does help, and only what was asked for decides, not the rule's signal
    study, _ = study_of(script, folder, tmp_path, "--layers", "0,1", "--signal", "lookahead")
    assert study.layers == [0, 1]
    with pytest.raises(UserError, match="--signal lookahead"):
        study_of(script, folder, tmp_path, "--layers", "0,1")


def test_a_control_whose_counts_differ_is_refused(folder, script, tmp_path, monkeypatch):
    """One token of one layer of one document more on Mamba, and the comparison is no longer fair."""
    study, given = study_of(script, folder, tmp_path)
    chosen = [
        mode for mode in modes.gate_modes(given, "routing", False, 0.5, ("random",)) if mode.name == "routing_hard_0.5"
    ]
    masks_of, document = runs.control_masks, study.session.tokens["evaluation"][3].id

    def one_more(*args):
        masks = {
            name: {layer: mask.copy() for layer, mask in layers.items()} for name, layers in masks_of(*args).items()
        }
        mask = masks[document][2]
        mask[np.flatnonzero(mask == 0)[0]] = 1.0
        return masks

    with runs.attached(study.model, study.sets[0]):
        monkeypatch.setattr(runs, "control_masks", one_more)
        with pytest.raises(ValueError, match=f"{document}"):
            runs.measure_set(study, runs.TARGET, study.sets[0], chosen)
        kept = study.session.pieces.computed  # nothing unfair is
        assert "routing_hard_0.5, set 0" in kept and not any("control" in label for label in kept)
        monkeypatch.setattr(runs, "control_masks", masks_of)
        runs.measure_set(study, runs.TARGET, study.sets[0], chosen)
    assert {row["mode"] for row in study.rows.values()} == {"routing_hard_0.5", "control_random_0.5"}


# -- 08
@pytest.fixture(scope="module")
def explained_run(gated_run, folder, run, tmp_path_factory):
    """(where 08 ran after 07, labels of what it scored)."""
    output = Path(shutil.copytree(gated_run, tmp_path_factory.mktemp("explained") / "out"))
    with pytest.MonkeyPatch.context() as patch:
        seen = _Counted(patch)
        run("08_explain_gates", arguments(folder, output, *EXPLAINED))
    return output, seen.named


def labels_of(output):
    return [json.loads(path.read_text())["label"] for path in (result_folder(output) / "pieces").glob("*.json")]


def test_explaining_takes_the_runs_of_the_comparison(explained_run, gated_run):
    output, scored = explained_run
    taken = {label for label in labels_of(gated_run) if ", set " in label and not label.startswith("margin")}
    assert len(taken) > 12 and not taken & set(scored)
    assert "control_oracle_0.5, set 0" in scored
    before, after = (
        pd.read_csv(result_folder(one) / f"{name}_documents.csv").set_index(["mode", "sidecar_seed", "document"])
        for one, name in ((gated_run, "gated_hybrid"), (output, "explained_gates"))
    )
    assert set(before.index) < set(after.index)
    pd.testing.assert_frame_equal(after.loc[before.index], before)
    assert contents(result_folder(gated_run)).items() <= contents(result_folder(output)).items()  # 07's files stay


def test_explaining_measures_every_control_at_equal_counts(explained_run):
    folder = result_folder(explained_run[0])
    rows = pd.read_csv(folder / "explained_gates_results.csv").set_index("mode")
    names = [*controls.CONTROLS, "oracle", "hindsight", "probe_router_linear", "probe_hidden_mlp"]
    documents = pd.read_csv(folder / "explained_gates_documents.csv")
    share = documents.pivot(index=["document", "sidecar_seed"], columns="mode", values="mamba_share")
    for name in names:
        mode = f"control_{name}_0.5"
        assert rows.loc[mode, "uses_document"] and rows.loc[mode, "matched_to"] == "routing_hard_0.5", mode
        both = share[[mode, "routing_hard_0.5"]].dropna()
        assert len(both) and (both.iloc[:, 0] == both.iloc[:, 1]).all(), mode
    assert rows.loc["control_oracle_0.5", "sidecar_seeds"] == 2
    assert rows.loc["control_hindsight_0.5", "sidecar_seeds"] == 1
    assert "routing_hard_0.5_shared" in rows.index
    pairs = pd.read_csv(folder / "explained_gates_pairs.csv")
    assert set(names) <= set(pairs["recipe"])


def test_explaining_writes_what_explains_the_answer(explained_run):
    folder = result_folder(explained_run[0])
    validation = pd.read_csv(folder / "sensitivity_validation.csv")
    assert set(validation["estimator"]) == {"fisher_m0", "fisher_mean"} and validation["chosen"].any()
    correlations = pd.read_csv(folder / "sensitivity_correlations.csv")
    assert {"previous_sparsity", "lookahead_sparsity", "self_sparsity", "discrepancy"} <= set(correlations["signal"])
    maps = json.loads((folder / "sensitivity_maps.json").read_text())["documents"]
    for one in maps:
        assert np.shape(one["sensitivity"]) == np.shape(one["mamba"]) == (len(one["layers"]), len(one["tokens"]))
    gap = pd.read_csv(folder / "probe_gap.csv")
    assert set(gap["probe"]) == {
        "router_linear", "router_mlp", "hidden_linear", "hidden_mlp", "routing_hard", "learned",
    }  # fmt: skip
    for name in ("signal", "softness", "threshold"):
        assert len(pd.read_csv(folder / f"ablation_{name}.csv")) >= 2, name


def test_explained_study_computes_nothing(explained_run, folder, run, monkeypatch, capsys, no_forward):
    output = explained_run[0]
    before = contents(result_folder(output))
    other_commit(monkeypatch)
    run("08_explain_gates", arguments(folder, output, *EXPLAINED))
    assert "computed" not in capsys.readouterr().out
    run("07_gated_hybrid", arguments(folder, output, *GATED))
    assert "computed" not in capsys.readouterr().out
    assert contents(result_folder(output)) == before


# -- 09
def test_other_layers_and_recall(folder, run, tmp_path, monkeypatch, capsys):
    given = arguments(folder, tmp_path, *HYBRID, "--threshold", "0.5")
    run("09_other_layers_and_recall", given)
    sets = pd.read_csv(result_folder(tmp_path) / "layer_set_results.csv")
    assert set(sets["layers"]) == {"all", "middle", "first_half", "last_half"}
    leading = sets[(sets["kind"] == "routing") & sets["hard"]]
    assert len(leading) == 4 and leading["vs_random"].notna().all()
    assert set(sets.loc[sets["kind"] == "control", "recipe"]) == {"random", "token_shuffled", "block_shuffled"}
    recalled = pd.read_csv(result_folder(tmp_path) / "recall_results.csv")
    assert set(recalled["length"]) == {192}  # 4,096 tokens are longer than the model's context
    assert set(recalled["mode"]) == {
        "baseline", "fixed_0.5", "fixed_1", "routing_hard_0.5", "control_random_0.5", "learned_0.5",
        "control_random_learned_0.5",
    }  # fmt: skip
    shares = recalled.pivot(index="task", columns="mode", values="share_realised")
    assert (shares["fixed_0.5"] == 0.5).all() and (shares["baseline"] == 0.0).all() and (shares["fixed_1"] == 1).all()
    for name in ("routing_hard_0.5", "learned_0.5"):
        assert (shares[name] > 0).all()
    before = contents(result_folder(tmp_path))
    capsys.readouterr()
    other_commit(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFFNForCausalLM, "forward", None)  # calling it would fail
        run("09_other_layers_and_recall", given)
    assert contents(result_folder(tmp_path)) == before
    assert "computed" not in capsys.readouterr().out


def test_recall_goes_by_the_signal_and_level_asked_for(script, folder, tmp_path, monkeypatch):
    module = script("09_other_layers_and_recall")
    given = module.parse(arguments(folder, tmp_path, *HYBRID, "--signal", "lookahead", "--confidence-level", "0.5"))
    study = runs.open_study(given, rule.rule_of(config, given))
    routing = next(mode for mode in recall.recall_modes(study) if mode.gate.mode == "routing")
    assert routing.gate.signal == "lookahead"
    levels = []
    monkeypatch.setattr(
        recall, "recall_rows", lambda *args, **kwargs: levels.append(args[6] if len(args) > 6 else None) or []
    )
    recall.recall_study(study, [192], 1)
    assert set(levels) == {0.5}


# -- 10
def test_ablations_of_sidecars(folder, run, tmp_path, monkeypatch, capsys):
    given = arguments(folder, tmp_path, *ABLATED)
    run("10_ablate_sidecars", given)
    home = result_folder(tmp_path)
    for name in ("init", "stages", "d_state", "tokens"):
        assert len(pd.read_csv(home / f"ablation_{name}.csv")) >= 2, name
    assert len(pd.read_csv(home / "distillation_curves.csv"))
    before = contents(home)
    capsys.readouterr()
    other_commit(monkeypatch)

    def refuse(*_arguments):
        raise AssertionError("measured although it was there")

    monkeypatch.setattr(ablations, "measure_variant", refuse)
    monkeypatch.setattr(distill, "_rows_of_step", refuse)
    run("10_ablate_sidecars", given)
    assert contents(home) == before
    assert "computed" not in capsys.readouterr().out


# -- command lines
@pytest.mark.parametrize(
    "name, more, message",
    [
        ("05_sweep_alpha", ["--alphas", "0,1.5"], r"1.5 lies outside \[0, 1\]"),
        ("05_sweep_alpha", ["--layers", "9"], "9"),
        ("05_sweep_alpha", ["--sidecar-dir", "nowhere"], "no distilled sidecars in nowhere"),
        ("05_sweep_alpha", ["--max-seq-len", "64"], "unrecognized arguments: --max-seq-len"),
        ("06_replace_layer", ["--together", "1"], "at least 2"),
        ("07_gated_hybrid", ["--shares", "0,0.5"], r"0 lies outside \(0, 1\)"),
        ("07_gated_hybrid", ["--threshold", "2"], r"2 lies outside \[0, 1\]"),
        ("07_gated_hybrid", ["--full"], "unrecognized arguments: --full"),
        ("08_explain_gates", ["--new-tokens", "2"], "unrecognized arguments"),
        ("09_other_layers_and_recall", ["--shares", "0.25"], "--shares has no effect here"),
        ("10_ablate_sidecars", ["--shares", "0.25"], "unrecognized arguments"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, script, name, more, message, tmp_path, monkeypatch, capsys):
    module, words = script(name), arguments(folder, tmp_path, *more)
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(lambda: module.main(module.parse()))
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and re.search(message, error[0])
    if "nowhere" in more:  # the command that helps has the flags that were given
        assert f"python scripts/04_test_sidecar.py --model {folder / 'model'} --device cpu --output-dir" in error[0]
    assert list(tmp_path.iterdir()) == []  # nothing was written


NEXT = {
    "05_sweep_alpha": ([*SWEEP, "0,0.3,1"], "06_replace_layer"),
    "07_gated_hybrid": (GATED, "08_explain_gates"),
    "08_explain_gates": (EXPLAINED, "09_other_layers_and_recall"),
}


@pytest.mark.parametrize("name", list(NEXT))
def test_the_next_line_repeats_the_flags_given(name, folder, run, sweep_run, gated_run, explained_run, capsys):
    output = {"05": sweep_run, "07": gated_run, "08": explained_run[0]}[name[:2]]
    given, then = NEXT[name]
    run(name, arguments(folder, output, *given, "--seed", "0"))
    shown = capsys.readouterr().out.splitlines()
    flags = f"--model {folder / 'model'} --device cpu --seed 0 --output-dir {output}"
    assert shown[-1] == f"next: python scripts/{then}.py {flags}"
    written = shown[shown.index("written:") + 1 : -1]
    assert written and all(Path(line.strip()).is_file() for line in written)


SCRIPTS = [
    "05_sweep_alpha", "06_replace_layer", "07_gated_hybrid", "08_explain_gates", "09_other_layers_and_recall",
    "10_ablate_sidecars",
]  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_common_flags(name, script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).parse(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--quick", "--seed", "--device", "--model", "--output-dir", "--restart", "--resamples"):
        assert flag in shown

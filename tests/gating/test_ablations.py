"""Ablations on a tiny random BlockFFN: shapes and budgets as claimed, rows against plain recomputation, resuming."""

from argparse import Namespace
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src import mamba_sidecar as ms
from src.base.reuse import Pieces
from src.base.text_data import TokenDocument
from src.eval_utils import score_documents
from src.gating import ablations, tables
from src.gating.ablations import Protocol, Variant, run_ablations, train_variant, variants
from src.gating.rule import Rule
from src.gating.runs import Study
from src.hybrid import distill
from src.hybrid.distill import DistillSettings
from src.hybrid.gates import LearnedGate, RoutingGate, document_key, hash_uniform, layer_cut, matched_random_masks
from src.hybrid.recovery import measure_recovery
from src.hybrid.session import Session
from src.hybrid.sidecar import new_sidecar
from src.hybrid.sidecar_sets import SidecarSet
from src.models.loading import load_model
from tests.tiny import blockffn_folder, llama_folder

LAYERS = [1, 2]
SETTINGS = ms.SidecarSettings(d_state=16, headdim=16, chunk_size=16)
SCORING = (32, 16, 4)


def documents(count, seed, length=40):
    rng = np.random.default_rng(seed)
    return [TokenDocument(f"{seed}-{i}", "docs", rng.integers(3, 259, length + 3 * i), 40) for i in range(count)]


def build(folder):
    return load_model(blockffn_folder(folder), "cpu")[0].requires_grad_(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model"))


TOKENS = {"calibration": documents(4, 2), "evaluation": documents(5, 3)}


def protocol(folder, **changes):
    rng = np.random.default_rng(1)
    stage = DistillSettings(steps=1, batch_size=2, learning_rate=3e-3, validate_every=2, checkpoint_every=1)
    settings = dict(
        stage_a=stage, stage_b=replace(stage, learning_rate=1e-3), train=rng.integers(3, 259, (8, 24)),
        validation=rng.integers(3, 259, (4, 24)), gate=RoutingGate(0.5, hard=True), folder=folder / "ablations",
    )  # fmt: skip
    return Protocol(**(settings | changes))


def study_of(model, folder, restart=False, mask_seeds=(0, 1)):
    """A study as script 10 opens it, with pieces of its own in `folder`."""
    windows = dict(zip(("max_seq_len", "stride", "batch_size"), SCORING, strict=True))
    session = Session(
        Namespace(document_tokens=64, seed=0), folder, model, None, {}, TOKENS, windows,
        Pieces(folder / "pieces", {"model": "tiny", "windows": windows}, restart), {},
        {split: {"sha256": split} for split in TOKENS}, 0.0,
    )  # fmt: skip
    rule = Rule(0.5, "previous", "middle", 3, 60, 0.2, 0.25, resamples=200)
    return Study(session, [SidecarSet(0, folder / "none", "b", LAYERS)], rule, list(mask_seeds))


# -- shared threshold


@pytest.fixture
def attached(tmp_path):
    model = build(tmp_path)
    # routers of unlike sparsity: layers 0, 1 and 2 are read by the gates of layers 1, 2 and 3
    for layer, scale in ((0, -1.0), (1, 0.0), (2, 1.0)):
        projection = model.model.layers[layer].mlp.router_proj
        projection.register_forward_hook(lambda _module, _inputs, output, scale=scale: output + scale * output.std())
    return ms.attach_mamba_sidecar(model, [1, 2, 3], settings=SETTINGS)


def recorded(model, gate, text):
    ms.set_gate(model, gate)
    with ms.record_gates(model) as record:
        score_documents(model, text, 64, 64, 4, on_batch=ms.attachment_of(model).on_batch)
    return record


def values_by_layer(kept):
    return {layer: np.concatenate([layers[layer] for layers in kept.values()]) for layer in (1, 2, 3)}


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_shared_threshold_meets_the_mean_share_with_one_threshold(attached, share):
    text, gate = documents(12, 0), RoutingGate(share, hard=True)
    # ties are split by chance, and calibration reads a document's last token, which scoring does not: the tolerance
    alone = ms.calibrate_gates(attached, gate, text, 64)
    for own in recorded(attached, alone, text).layer_shares().values():
        assert own == pytest.approx(share, abs=0.05)
    for start in (gate, alone):
        shared = ms.calibrate_gates(attached, start, text, 64, shared=True)
        assert len({layer_cut(shared.distributions[layer], share) for layer in (1, 2, 3)}) == 1
        record = recorded(attached, shared, text)
        assert record.mean_share() == pytest.approx(share, abs=0.05)
        own = list(record.layer_shares().values())
        assert max(own) - min(own) > 0.2
        # one threshold: no token of any layer stays with attention above one of any other layer that goes to Mamba
        scores, shares = values_by_layer(record.scores), values_by_layer(record.shares)
        scores, mamba = np.concatenate(list(scores.values())), np.concatenate(list(shares.values())) == 1
        assert scores[mamba].min() >= scores[~mamba].max() - 1e-6
    # and the layer-wise gate does have several
    assert len({layer_cut(alone.distributions[layer], share)[0] for layer in (1, 2, 3)}) > 1


def test_shared_tie_probability_by_brute_force(attached):
    """Every token's decision, recomputed from the recorded scores, the pooled cut and the hash."""
    text, share = documents(12, 0), 0.5
    gate = ms.calibrate_gates(attached, RoutingGate(share, hard=True, seed=4), text, 64, shared=True)
    record = recorded(attached, gate, text)
    threshold, tie = layer_cut(gate.distributions[1], share)
    assert 0.0 < tie < 1.0
    for document, layers in record.scores.items():
        key = torch.tensor([document_key(document)])
        for layer, scores in layers.items():
            uniform = hash_uniform(4, layer, key, torch.arange(len(scores))[None])[0].numpy()
            want = (scores > threshold + 1e-6) | ((abs(scores - threshold) <= 1e-6) & (uniform < tie))
            assert np.array_equal(want, record.shares[document][layer] == 1)


def test_shared_centre_of_soft_and_learned_gates(attached):
    for layer, hybrid in zip((1, 2, 3), ms.attachment_of(attached).hybrid_layers(), strict=True):
        torch.nn.init.normal_(hybrid.gate_proj.weight, generator=torch.Generator().manual_seed(layer))
        torch.nn.init.constant_(hybrid.gate_proj.bias, float(3 * layer))
    for gate in (RoutingGate(0.4, temperature=0.05), LearnedGate(0.4, hard=True)):
        shared = ms.calibrate_gates(attached, gate, documents(12, 0), 64, shared=True)
        own = recorded(attached, shared, documents(12, 0)).layer_shares().values()
        assert np.mean(list(own)) == pytest.approx(0.4, abs=0.05) and max(own) - min(own) > 0.02


# -- variants


def test_variants_are_what_they_claim(model):
    found = variants(model, LAYERS, SETTINGS, steps_a=8, steps_b=20)
    by_name = {(one.ablation, one.name): one for one in found}
    assert list(by_name) == [
        *(("init", name) for name in ("random", "attention")),
        *(("stages", name) for name in ("a", "a_longer", "a_b")),
        *(("d_state", name) for name in ("16", "64", "128")),
        *(("tokens", name) for name in ("0.25", "0.5", "1")),
    ]
    steps = {key: (one.steps_a, one.steps_b) for key, one in by_name.items()}
    assert steps["stages", "a"] == (8, 0) and steps["stages", "a_longer"] == (28, 0)
    assert steps["tokens", "0.25"] == (2, 5) and steps["tokens", "0.5"] == (4, 10)
    assert {steps[key] for key in steps if key[0] in ("init", "d_state")} == {(8, 20)}
    assert {one.stage for one in found if one.steps_b == 0} == {"a"}
    # 11 rows, 9 trainings: 16 is the base's d_state, whose full budget three ablations share
    base = {by_name[key].folder for key in (("stages", "a_b"), ("d_state", "16"), ("tokens", "1"))}
    assert len(base) == 1 and len({one.folder for one in found}) == 9

    shapes, total = {}, {}
    for one in found:
        sidecar = new_sidecar(model, 1, one.settings)
        shapes[one.ablation, one.name] = {name: tensor.shape for name, tensor in sidecar.state_dict().items()}
        total[one.ablation, one.name] = sum(parameter.numel() for parameter in sidecar.parameters())
        if one.ablation == "d_state":
            assert sidecar.mixer.ssm_state_size == int(one.name)
    assert shapes["init", "random"] == shapes["init", "attention"]  # so the parameters are equal too
    random, copied = (new_sidecar(model, 1, by_name["init", name].settings) for name in ("random", "attention"))
    attention = model.model.layers[1].self_attn
    assert torch.equal(copied.mixer.out_proj.weight, attention.o_proj.weight)
    assert not torch.equal(random.mixer.out_proj.weight, attention.o_proj.weight)
    # B and C have d_state channels each (one group), in in_proj (width 64) and in the convolution (4 taps and a bias)
    assert total["d_state", "64"] - total["d_state", "16"] == 2 * 48 * (64 + 4 + 1)
    assert total["d_state", "128"] - total["d_state", "64"] == 2 * 64 * (64 + 4 + 1)


def test_small_budgets_keep_a_step_of_each_stage(model):
    tokens = variants(model, LAYERS, SETTINGS, 1, 1, ["tokens"])
    assert {(one.steps_a, one.steps_b) for one in tokens} == {(1, 1)} and len({one.folder for one in tokens}) == 1


def test_errors_say_what_to_do(model, tmp_path):
    for call, words in (
        (lambda: variants(model, LAYERS, SETTINGS, 1, 1, ["depth"]), ["'depth'", "d_state"]),
        (lambda: variants(model, LAYERS, SETTINGS, 4, 0), ["4 steps of stage A", "0 of stage B"]),
        (lambda: protocol(tmp_path, gate=RoutingGate(0.5)), ["soft"]),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words), str(error.value)
    mla, _ = load_model(blockffn_folder(tmp_path / "mla", "mla_block"), "cpu")
    with pytest.raises(ValueError, match="init 'random'"):
        variants(mla, LAYERS, SETTINGS, 2, 2)
    assert len(variants(mla, LAYERS, SETTINGS, 2, 2, ["stages"])) == 3


# -- training and evaluation


@pytest.fixture(scope="module")
def study(model, tmp_path_factory):
    """(folder, chosen variants, tables) of a whole run; the trained sidecars are in folder/ablations."""
    folder = tmp_path_factory.mktemp("ablations")
    found = variants(model, LAYERS, SETTINGS, 3, 2, ["init", "stages", "tokens"])
    chosen = [one for one in found if one.name not in ("random", "0.25", "0.5")]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = run_ablations(study_of(model, folder), protocol(folder), chosen)
    assert not ms.is_attached(model)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    return folder, chosen, found


def row_of(found, ablation, variant):
    return found[ablation].set_index("variant").loc[variant]


def test_tables_have_a_row_per_variant(study):
    _, chosen, found = study
    assert list(found) == ["init", "stages", "tokens", "curves"]
    assert len({tuple(found[name].columns) for name in ("init", "stages", "tokens")}) == 1
    for one in chosen:
        row = row_of(found, one.ablation, one.name)
        assert row["training"] == one.folder and (row["steps_a"], row["steps_b"]) == (one.steps_a, one.steps_b)
        assert {key: row[key] for key in ("init", "d_state", "expand", "headdim", "n_groups")}.items() <= asdict(
            one.settings
        ).items()
        assert row["training_tokens"] == (one.steps_a + one.steps_b) * 2 * 24
    same = row_of(found, "stages", "a_b"), row_of(found, "tokens", "1")
    assert same[0].drop("ablation").equals(same[1].drop("ablation"))


@pytest.mark.parametrize("ablation, name", [("stages", "a"), ("init", "attention")])
def test_a_row_is_what_its_sidecars_give(model, study, ablation, name):
    folder, chosen, found = study
    variant = next(one for one in chosen if (one.ablation, one.name) == (ablation, name))
    row, setup = row_of(found, ablation, name), protocol(folder)
    stored = load_file(setup.folder / variant.folder / f"stage_{variant.stage}" / "layer_1.safetensors")
    assert row["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert (setup.folder / variant.folder / "stage_b").exists() == (variant.steps_b > 0)

    def nats():
        on_batch = ms.attachment_of(model).on_batch if ms.is_attached(model) else None
        scores = score_documents(model, TOKENS["evaluation"], *SCORING, on_batch=on_batch)
        return scores.nll.sum() / scores.tokens.sum()

    windows = torch.as_tensor(setup.validation)[:, :-1]
    with torch.no_grad():
        teacher = model(windows).logits.double().log_softmax(-1)
    base = nats()
    sidecars = {"sidecar_dir": setup.folder / variant.folder, "stage": variant.stage}
    ms.attach_mamba_sidecar(model, LAYERS, alpha=1.0, **sidecars)
    try:
        with torch.no_grad():
            student = model(windows).logits.double().log_softmax(-1)
            want = (teacher.exp() * (teacher - student)).sum(-1).mean()
        assert row["kl_alpha_1"] == pytest.approx(float(want), rel=1e-4) and row["kl_alpha_1"] > row["kl"] > 0
        assert row["alpha_1"] == pytest.approx(nats() - base, abs=1e-6)
        gate = ms.calibrate_gates(model, setup.gate, TOKENS["calibration"], 32, 4)
        ms.set_gate(model, gate)
        with ms.record_gates(model) as record:
            gated = nats()
        masked = []
        for seed in (0, 1):
            ms.set_gate(model, ms.MaskGate(matched_random_masks(record.shares, seed)))
            masked.append(nats())
    finally:
        ms.detach_mamba_sidecars(model)
    assert row["random"] == pytest.approx(np.mean(masked) - base, abs=1e-6)
    assert row["vs_random"] == pytest.approx(gated - np.mean(masked), abs=1e-6)
    assert row["share_realised"] == pytest.approx(record.mean_share(), abs=1e-9)
    for column in ("alpha_1", "random", "vs_random"):
        assert row[f"{column}_ci_low"] < row[column] < row[f"{column}_ci_high"]
    recovery = measure_recovery(model, LAYERS, TOKENS["calibration"], *sidecars.values(), *SCORING)
    assert row["recovered"] == pytest.approx(recovery.recovered, rel=1e-6)


def test_curves_are_the_validation_log(study):
    _, chosen, found = study
    curves = found["curves"]
    assert list(curves.columns) == ["ablation", "variant", "stage", "quantity", "step", "tokens", "value"]
    assert (curves["tokens"] == curves["step"] * 2 * 24).all()
    for one in chosen:
        mine = curves[(curves["ablation"] == one.ablation) & (curves["variant"] == one.name)]
        stages = {"normalised_mse": one.steps_a} | (
            {"kl": one.steps_b, "kl_alpha_1": one.steps_b} if one.steps_b else {}
        )
        for quantity, steps in stages.items():
            taken = mine.loc[mine["quantity"] == quantity, "step"].tolist()
            assert taken == sorted({0, *range(2, steps + 1, 2), steps})
        assert set(mine["quantity"]) == set(stages)
    # stage B starts where stage A ended: its first kl_alpha_1 is that of the stage A sidecars, but for the masks'
    # windows being one token shorter in the row
    first = curves[(curves["variant"] == "a_b") & (curves["quantity"] == "kl_alpha_1") & (curves["step"] == 0)]
    assert first["value"].item() == pytest.approx(row_of(found, "stages", "a")["kl_alpha_1"], rel=0.1)


class _Interrupt(Exception):
    pass


def content(folder):
    """Bytes of the trained sidecars, and what pieces hold (checkpoints are not byte-stable, nor are speeds)."""
    files = sorted((folder / "ablations").rglob("stage_*/*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "checkpoints" not in path.parts}


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name in expected:
        pd.testing.assert_frame_equal(got[name], expected[name], check_exact=True)


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_resumed_run_gives_the_same_bytes(model, study, tmp_path, monkeypatch, where):
    folder, chosen, found = study
    trained, evaluated = [], []
    rows_of_step, measure = distill._rows_of_step, ablations.measure_variant

    def counted_step(train, settings, step):
        trained.append(step)
        if where == "training" and len(trained) == 10:  # the second training, after a step of stage A
            raise _Interrupt
        return rows_of_step(train, settings, step)

    def counted_measurement(study, protocol, variant):
        evaluated.append(variant.folder)
        if where == "evaluation" and len(evaluated) == 2:
            raise _Interrupt
        return measure(study, protocol, variant)

    monkeypatch.setattr(distill, "_rows_of_step", counted_step)
    monkeypatch.setattr(ablations, "measure_variant", counted_measurement)
    with pytest.raises(_Interrupt):
        run_ablations(study_of(model, tmp_path), protocol(tmp_path), chosen)
    assert not ms.is_attached(model)
    got = run_ablations(study_of(model, tmp_path), protocol(tmp_path), chosen)
    assert content(tmp_path) == content(folder) and content(folder)
    assert_same(got, found)
    # equal variants were measured once, and what is done is not done again
    distinct = len({one.folder for one in chosen})
    assert len(evaluated) == distinct + (where == "evaluation")
    steps = len(trained)
    again = study_of(model, tmp_path)
    assert_same(run_ablations(again, protocol(tmp_path), chosen), found)
    assert len(trained) == steps and len(evaluated) == distinct + (where == "evaluation")
    assert again.session.pieces.computed == []


def test_restart_trains_anew_and_gives_the_same(model, tmp_path, monkeypatch):
    one = Variant("stages", "a", SETTINGS, 2, 0)
    first = run_ablations(study_of(model, tmp_path), protocol(tmp_path), [one])["stages"]
    trained, rows_of_step = [], distill._rows_of_step
    monkeypatch.setattr(distill, "_rows_of_step", lambda *args: trained.append(args[2]) or rows_of_step(*args))
    again = run_ablations(study_of(model, tmp_path, restart=True), protocol(tmp_path), [one])["stages"]
    assert 0 in trained and 1 in trained
    pd.testing.assert_frame_equal(first, again)
    # sidecars trained otherwise are measured anew, and so are other masks
    default = protocol(tmp_path)
    faster = replace(default, stage_a=replace(default.stage_a, learning_rate=1e-2))
    other = run_ablations(study_of(model, tmp_path), faster, [one])["stages"]
    assert other["alpha_1"].item() != first["alpha_1"].item()
    masks = study_of(model, tmp_path, mask_seeds=(5,))
    drawn = run_ablations(masks, faster, [one])["stages"]
    assert masks.session.pieces.computed and drawn["random"].item() != other["random"].item()
    assert drawn["alpha_1"].item() == other["alpha_1"].item()


def test_a_model_without_router_trains_too(tmp_path):
    llama, _ = load_model(llama_folder(tmp_path / "llama"), "cpu")
    llama.requires_grad_(False)
    one = Variant("stages", "a_b", replace(SETTINGS, headdim=8), 2, 2)
    curves = train_variant(study_of(llama, tmp_path), protocol(tmp_path), one)
    assert {row["stage"] for row in curves} == {"a", "b"}
    assert ms.available_layers(tmp_path / "ablations" / one.folder, "b") == LAYERS


# -- gates


def gate_rows():
    """Rows as result_table writes them; the ablations are chosen by these columns, so the names are of no meaning."""
    columns = ("kind", "hard", "signal", "temperature", "threshold", "variant", "share_target")
    rows = [
        ("none", False, "none", np.nan, "", "", 0.0), ("routing", True, "previous", np.nan, "own", "", 0.25),
        ("fixed", False, "none", np.nan, "", "", 0.5), ("routing", False, "previous", 0.1, "own", "", 0.25),
        ("routing", True, "previous", np.nan, "own", "", 0.5), ("routing", False, "previous", 0.1, "own", "", 0.5),
        ("routing", False, "previous", 0.3, "own", "t0.3", 0.5),
        ("routing", True, "lookahead", np.nan, "own", "lookahead", 0.5),
        ("routing", True, "previous", np.nan, "shared", "shared", 0.5),
        ("routing", True, "previous", np.nan, "fixed", "threshold", np.nan),
        ("routing", True, "previous", np.nan, "shared", "shared", 0.75),
        ("learned", True, "none", np.nan, "own", "learned", 0.5), ("control", True, "none", np.nan, "", "", 0.5),
    ]  # fmt: skip
    frame = pd.DataFrame([dict(zip(columns, row, strict=True)) for row in rows])
    frame.insert(0, "mode", [f"m{index}" for index in range(len(rows))])
    for place, column in enumerate(tables.ABLATION_COLUMNS):
        frame[column] = frame.index + place / 10
    return frame


def test_gate_ablations_are_selections():
    rows = gate_rows()
    found = tables.gate_ablation_rows(rows)
    assert {name: list(zip(table["variant"], table["mode"], strict=True)) for name, table in found.items()} == {
        "signal": [("previous", "m4"), ("lookahead", "m7")],
        "softness": [("hard", "m1"), ("soft_t0.1", "m3"), ("hard", "m4"), ("soft_t0.1", "m5"), ("soft_t0.3", "m6")],
        "threshold": [("layer_wise", "m4"), ("shared", "m8")],
    }
    source = rows.set_index("mode")
    for name, table in found.items():
        assert (table["ablation"] == name).all()
        for row in table.to_dict("records"):
            assert row["share"] == source.loc[row["mode"], "share_target"]
            assert all(row[column] == source.loc[row["mode"], column] for column in tables.ABLATION_COLUMNS)


def test_gate_ablations_of_a_study_without_routing_are_none():
    rows = gate_rows()
    assert tables.gate_ablation_rows(rows[rows["kind"] != "routing"]) == {}
    assert list(tables.gate_ablation_rows(rows.iloc[:5])) == ["softness"]

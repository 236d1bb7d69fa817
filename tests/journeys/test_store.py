"""The store, and the two JSONL forms: read back exactly, faults counted where they stand, nothing half-written."""

import errno
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from src.base.errors import UserError
from src.journeys import records, store
from src.journeys.records import (
    BAD_ROW,
    BAD_SUM,
    BROKEN_JSON,
    DUPLICATE_ROW,
    EXPERT_TWICE,
    EXPERTS_OUT_OF_RANGE,
    INCOMPLETE,
    STRAY_LAYER,
    export_rows,
    export_token_files,
    import_records,
    infer_num_experts,
)
from src.journeys.store import Journeys, read_journeys, shard_name, shard_run, write_shard

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "mixtral_routing"
needs_real_records = pytest.mark.skipif(not REAL.is_dir(), reason="the real Mixtral records are not beside this repo")
FIELDS = store.ROW_FIELDS


def some_journeys(
    problems: int = 3, tokens: int = 4, layers=(0, 1, 2), k: int = 2, dataset: str = "humaneval", seed: int = 0
) -> Journeys:
    """Random journeys with every expert of 8 in use."""
    rng = np.random.default_rng(seed)
    count = problems * tokens
    experts = rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (count, len(layers), 1)), axis=2)[:, :, :k]
    probs = np.sort(rng.dirichlet(np.ones(k), (count, len(layers))).astype(np.float16), axis=2)[:, :, ::-1]
    pieces = np.array(["a", " bé", "\n", "☃", '"'], dtype=object)
    return Journeys(
        dataset=np.full(count, dataset),
        problem_id=np.repeat(np.arange(problems, dtype=np.int32), tokens),
        token_idx=np.tile(np.arange(tokens, dtype=np.int32), problems),
        token_id=rng.integers(0, 4096, count).astype(np.int32),
        token=pieces[rng.integers(0, len(pieces), count)],
        is_generated=np.tile(np.arange(tokens) >= tokens - 1, problems),
        experts=np.ascontiguousarray(experts),
        gating_probs=np.ascontiguousarray(probs),
        model="some/model",
        layers=tuple(layers),
        num_experts=8,
    )


def concatenate(parts: list[Journeys]) -> Journeys:
    """Journeys of the same model one after the other."""
    return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


def assert_same(one: Journeys, two: Journeys, fields=FIELDS) -> None:
    for name in fields:
        first, second = getattr(one, name), getattr(two, name)
        assert first.shape == second.shape, name
        assert np.array_equal(first, second, equal_nan=True) if name == "gating_probs" else (first == second).all(), (
            name
        )
    assert (one.layers, one.num_experts) == (two.layers, two.num_experts)


def records_of(part: Journeys) -> list[dict]:
    """One row per (token, layer), written without the code under test."""
    return [
        {
            "dataset": str(part.dataset[row]),
            "problem_id": int(part.problem_id[row]),
            "layer": layer,
            "experts": [int(expert) for expert in part.experts[row, place]],
            "gating_probs": [float(prob) for prob in part.gating_probs[row, place]],
            "token_idx": int(part.token_idx[row]),
        }
        for row in range(len(part))
        for place, layer in enumerate(part.layers)
    ]


def write_records(path: Path, records: list[dict | str]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------- store


def test_what_is_written_is_read(tmp_path):
    first, second = some_journeys(), some_journeys(problems=2, dataset="text", seed=1)
    write_shard(tmp_path / "store" / shard_name("humaneval", 0), first, {"seed": 3})
    write_shard(tmp_path / "store" / shard_name("text", 0), second)
    stored = read_journeys(tmp_path)
    assert_same(stored, concatenate([first, second]))
    assert stored.model == "some/model" and stored.layers == (0, 1, 2) and stored.num_experts == 8
    assert stored.experts.dtype == np.uint8 and stored.gating_probs.dtype == np.float16
    assert stored.problem_id.dtype == stored.token_idx.dtype == stored.token_id.dtype == np.int32
    assert_same(read_journeys(tmp_path / "store"), stored)
    assert_same(read_journeys(tmp_path / "store" / shard_name("text", 0)), second)
    assert shard_run(tmp_path / "store" / shard_name("humaneval", 0)) == {"seed": 3}
    part = stored.select(stored.dataset == "text")
    assert_same(part, second)


def test_the_columns_are_the_documented_ones(tmp_path):
    path = write_shard(tmp_path / "a.parquet", some_journeys(layers=(0, 2, 3), k=2))
    schema = pq.read_schema(path)
    assert {field.name: str(field.type).replace(" not null", "") for field in schema} == {
        "dataset": "dictionary<values=string, indices=int32, ordered=0>",
        "problem_id": "int32",
        "token_idx": "int32",
        "token_id": "int32",
        "token": "dictionary<values=string, indices=int32, ordered=0>",
        "is_generated": "bool",
        "experts": "fixed_size_list<element: uint8>[6]",
        "gating_probs": "fixed_size_list<element: halffloat>[6]",
    }
    metadata = json.loads(schema.metadata[b"journeys"])
    assert metadata == {"model": "some/model", "layers": [0, 2, 3], "num_experts": 8, "top_k": 2, "run": {}}


def test_padding_and_unknown_probabilities_survive(tmp_path):
    plain = some_journeys(k=3)
    experts = plain.experts.astype(np.int16)
    experts[0, 1, 1:] = -1
    experts[5] = 300
    probs = plain.gating_probs.copy()
    probs[3] = np.nan
    padded = replace(plain, experts=experts, gating_probs=probs, num_experts=301)
    stored = read_journeys(write_shard(tmp_path / "a.parquet", padded))
    assert stored.experts.dtype == np.int16 and stored.experts.min() == -1
    assert_same(stored, padded)


def test_the_same_journeys_give_the_same_bytes(tmp_path):
    one = write_shard(tmp_path / "one.parquet", some_journeys(), {"b": 1, "a": 2})
    two = write_shard(tmp_path / "two.parquet", some_journeys(), {"a": 2, "b": 1})
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    path = write_shard(tmp_path / "a.parquet", some_journeys())
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*arguments):
        raise full

    if where == "fsync":
        monkeypatch.setattr(store.os, "fsync", refuse)
    else:

        def open_full(*arguments, **options):
            file = open(*arguments, **options)

            class Full:
                closed = False

                def __enter__(self):
                    return self

                def __exit__(self, *exception):
                    file.close()

                def write(self, data):
                    raise full

                def flush(self):
                    file.flush()

                def tell(self):
                    return 0

                def close(self):
                    file.close()

            return Full()

        monkeypatch.setattr(store, "open", open_full, raising=False)
    with pytest.raises(OSError, match="No space left") as stop:
        write_shard(path, some_journeys(seed=5))
    assert stop.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"] and path.read_bytes() == before


def test_stores_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no journeys in"):
        read_journeys(tmp_path)
    write_shard(tmp_path / "a-00000.parquet", some_journeys())
    other = write_shard(tmp_path / "b-00000.parquet", replace(some_journeys(), model="other"))
    with pytest.raises(UserError, match="mixes shards of different models: model some/model and other"):
        read_journeys(tmp_path)
    other.write_bytes(b"PAR1 not a Parquet file")
    with pytest.raises(UserError, match="b-00000.parquet is damaged"):
        read_journeys(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "a-00000.parquet").replace_schema_metadata(None), other)
    with pytest.raises(UserError, match="no shard of a journey store"):
        read_journeys(tmp_path)


def test_a_million_journeys_load_in_five_seconds(tmp_path):
    part = some_journeys(problems=100, tokens=100, layers=tuple(range(32)))
    for index in range(100):
        write_shard(tmp_path / shard_name("humaneval", index), part)
    seconds = []
    for _ in range(2):
        started = time.process_time()  # of all threads: no faster than the clock, and the same on a busy machine
        stored = read_journeys(tmp_path)
        seconds.append(time.process_time() - started)
    assert stored.experts.shape == stored.gating_probs.shape == (1_000_000, 32, 2)
    np.testing.assert_array_equal(stored.experts[-10_000:], part.experts)
    np.testing.assert_array_equal(stored.gating_probs[500_000:510_000], part.gating_probs)
    assert min(seconds) < 5


# -------------------------------------------------------------------------------------------------------------- import


@needs_real_records
@pytest.mark.parametrize("name, kept, rows, line", [("humaneval_p0", 81, 2_648, 82), ("gsm8k_p0", 166, 5_366, 167)])
def test_real_mixtral_records(name, kept, rows, line):
    """The recorder dropped rows of the last two tokens, and wrote layer by layer."""
    path = REAL / f"{name}.jsonl"
    imported, report = import_records(path)
    assert (report.journeys, report.left_out, report.rows, report.files) == (kept, 2, rows, 1)
    assert list(report.problems) == [INCOMPLETE]
    assert (report.problems[INCOMPLETE].count, report.problems[INCOMPLETE].line) == (2, line)
    assert imported.experts.shape == (kept, 32, 2) and imported.num_experts == 8 and imported.layers == tuple(range(32))
    np.testing.assert_array_equal(imported.token_idx, np.arange(kept))
    for text in path.read_text().splitlines():
        row = json.loads(text)
        if row["token_idx"] < kept:
            assert imported.experts[row["token_idx"], row["layer"]].tolist() == row["experts"]
            assert imported.gating_probs[row["token_idx"], row["layer"]].tolist() == pytest.approx(
                row["gating_probs"], abs=5e-4
            )
    with pytest.raises(UserError, match=f"incomplete journey: 2, first in .*{name}.jsonl, line {line}"):
        import_records(path, strict=True)


@needs_real_records
def test_real_records_in_any_order(tmp_path):
    lines = (REAL / "humaneval_p0.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(lines))
    expected, _ = import_records(REAL / "humaneval_p0.jsonl")
    assert_same(import_records(shuffled)[0], expected)


@needs_real_records
def test_real_records_from_file_to_files_to_store(tmp_path):
    expected, _ = import_records(REAL / "gsm8k_p0.jsonl", strict=False)
    (folder,) = export_token_files(expected, tmp_path / "routing_data_collected")
    assert folder.name == "gsm8k_tokens" and len(list(folder.glob("*.jsonl"))) == 166
    back, report = import_records(tmp_path / "routing_data_collected", strict=True)
    assert_same(back, expected)
    assert (report.files, report.rows) == (166, 166 * 32)
    write_shard(tmp_path / "store" / shard_name("gsm8k", 0), back)
    assert_same(read_journeys(tmp_path), expected)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_of_two_data_sets(tmp_path, shuffled):
    both = concatenate([some_journeys(dataset="gsm8k"), some_journeys(dataset="humaneval", seed=1)])
    records = records_of(both)
    if shuffled:
        random.Random(3).shuffle(records)
    imported, report = import_records(write_records(tmp_path / "rows.jsonl", records), strict=True)
    assert_same(imported, both, [name for name in FIELDS if name not in ("token", "token_id", "is_generated")])
    assert (imported.token_id == -1).all() and (imported.token == "").all() and not imported.is_generated.any()
    assert report.problems == {} and report.inferred and report.num_experts == 8


def corrupt(records: list[dict], kind: str) -> tuple[list, int]:
    """`records` with one fault of this kind, and the 1-based line where it stands."""
    rows: list = [dict(row) for row in records]
    place = 13  # a row in the middle of a journey of 3 layers
    if kind == BROKEN_JSON:
        rows[place] = json.dumps(rows[place])[:-9]
    elif kind == "NaN":
        rows[place] = json.dumps(rows[place] | {"gating_probs": [float("nan"), 1.0]})
    elif kind == BAD_ROW:
        del rows[place]["experts"]
    elif kind == EXPERTS_OUT_OF_RANGE:
        rows[place]["experts"] = [99, 3]
    elif kind == "negative expert":
        rows[place]["experts"] = [3, -2]
    elif kind == EXPERT_TWICE:
        rows[place]["experts"] = [3, 3]
    elif kind == BAD_SUM:
        rows[place]["gating_probs"] = [0.6, 0.403]
    elif kind == STRAY_LAYER:
        rows[place]["layer"] = 77
    elif kind == DUPLICATE_ROW:
        rows.insert(place + 4, dict(rows[place]))
        place += 4
    else:
        place -= 1  # the journey's first row stays, the second goes
        del rows[place + 1]
    return rows, place + 1


FAULTS = {
    BROKEN_JSON: {BROKEN_JSON, INCOMPLETE},
    "NaN": {BROKEN_JSON, INCOMPLETE},
    BAD_ROW: {BAD_ROW, INCOMPLETE},
    EXPERTS_OUT_OF_RANGE: {EXPERTS_OUT_OF_RANGE},
    "negative expert": {EXPERTS_OUT_OF_RANGE},
    EXPERT_TWICE: {EXPERT_TWICE},
    BAD_SUM: {BAD_SUM},
    STRAY_LAYER: {STRAY_LAYER, INCOMPLETE},
    DUPLICATE_ROW: {DUPLICATE_ROW},
    INCOMPLETE: {INCOMPLETE},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_counted_located_and_left_out(tmp_path, kind):
    whole = some_journeys()
    rows, line = corrupt(records_of(whole), kind)
    path = write_records(tmp_path / "rows.jsonl", rows)
    imported, report = import_records(path)
    assert set(report.problems) == FAULTS[kind]
    main = next(problem for name, problem in report.problems.items() if name != INCOMPLETE or kind == INCOMPLETE)
    assert (main.count, main.file, main.line) == (1, str(path), line)
    assert (report.journeys, report.left_out) == (11, 1)
    kept = whole.select(np.arange(12) != 4)
    assert_same(imported, kept, ("dataset", "problem_id", "token_idx", "experts", "gating_probs"))
    assert len(report.lines()) == 1 + len(report.problems) and f"line {line}" in " ".join(report.lines())
    with pytest.raises(UserError, match=rf"rows\.jsonl, line {line}"):
        import_records(path, strict=True)


def test_bytes_that_are_no_text_and_rows_of_other_types(tmp_path):
    whole = some_journeys()
    lines = [json.dumps(row).encode() for row in records_of(whole)]
    good = records_of(whole)[0]
    bad_rows = [
        [1, 2],
        "text",
        good | {"layer": "0"},
        good | {"layer": True},
        good | {"token_idx": -1},
        good | {"problem_id": 2**40},
        good | {"dataset": 5},
        good | {"experts": []},
        good | {"experts": [1.5, 2]},
        good | {"experts": "12"},
        good | {"experts": [2**70, 1]},
        good | {"gating_probs": [0.5]},
        good | {"gating_probs": [0.5, None]},
        good | {"gating_probs": "ab"},
        good | {"experts": [1, 2, 3], "gating_probs": [0.5, 0.3, 0.2]},  # K is 2 elsewhere
        {key: value for key, value in good.items() if key != "layer"},
    ]
    lines += [b"\xff\xfe{}", b"[" * 100_000, b"   ", *(json.dumps(row).encode() for row in bad_rows)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    imported, report = import_records(path)
    assert {kind: problem.count for kind, problem in report.problems.items()} == {
        BROKEN_JSON: 2,
        BAD_ROW: len(bad_rows),
    }
    assert report.rows == 36 + 2 + len(bad_rows) and report.journeys == 12
    assert report.problems[BROKEN_JSON].line == 37 and report.problems[BAD_ROW].line == 40
    assert_same(imported, whole, ("experts", "gating_probs"))


def test_sums_within_float16_pass(tmp_path):
    records = records_of(some_journeys())
    records[0]["gating_probs"] = [0.6, 0.4019]
    records[5]["gating_probs"] = [0.7, 0.2981]
    assert import_records(write_records(tmp_path / "rows.jsonl", records), strict=True)[1].journeys == 12


def test_the_strongest_expert_comes_first(tmp_path):
    whole = some_journeys()
    records = records_of(whole)
    for record in records[::2]:
        record["experts"].reverse()
        record["gating_probs"].reverse()
    imported, _ = import_records(write_records(tmp_path / "rows.jsonl", records), strict=True)
    differ = whole.gating_probs[..., 0] != whole.gating_probs[..., 1]
    np.testing.assert_array_equal(imported.experts[differ], whole.experts[differ])
    np.testing.assert_array_equal(imported.gating_probs, whole.gating_probs)


def test_layers_may_have_gaps_and_padding_is_kept(tmp_path):
    whole = some_journeys(layers=(1, 3, 4), k=3)
    experts, probs = whole.experts.astype(np.int16), whole.gating_probs.copy()
    experts[2, 1, 2], probs[2, 1] = -1, [0.75, 0.25, 0]
    experts[3, 0], probs[3, 0] = -1, 0
    padded = replace(whole, experts=experts, gating_probs=probs)
    imported, _ = import_records(export_rows(padded, tmp_path / "rows.jsonl"), strict=True)
    assert imported.layers == (1, 3, 4) and imported.experts.dtype == np.int16
    assert_same(imported, padded, ("experts", "gating_probs"))

    records = records_of(padded)
    records[7]["gating_probs"] = [0.5, 0.25, 0.25]  # a probability on padding
    _, report = import_records(write_records(tmp_path / "rows.jsonl", records))
    assert {kind: problem.count for kind, problem in report.problems.items()} == {BAD_SUM: 1}


def test_unknown_probabilities_are_null(tmp_path):
    whole = some_journeys()
    unknown = replace(whole, gating_probs=np.full_like(whole.gating_probs, np.nan))
    path = export_rows(unknown, tmp_path / "rows.jsonl")
    assert '"gating_probs": null' in path.read_text()
    assert_same(import_records(path, strict=True)[0], unknown, ("experts", "gating_probs"))


def test_number_of_experts():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (2_000, 4))
    assert infer_num_experts(ids) == 60
    ids[7, 1] = 60  # one row off by one, and one far off
    ids[9, 0] = 5_000
    assert infer_num_experts(ids) == 60
    assert infer_num_experts(np.array([[0, 5], [2, 7]])) == 8
    assert infer_num_experts(np.array([[-1, -1]])) == 1


def test_a_known_number_of_experts_decides(tmp_path):
    path = write_records(tmp_path / "rows.jsonl", records_of(some_journeys()))
    imported, report = import_records(path, num_experts=16)
    assert imported.num_experts == 16 and not report.inferred and report.journeys == 12
    with pytest.raises(UserError, match="experts out of range"):
        import_records(path, num_experts=7, strict=True)


def test_files_that_hold_no_journey(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl does not exist"):
        import_records(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="holds no token files"):
        import_records(tmp_path)
    with pytest.raises(UserError, match=r"holds no \(token, layer\) row$"):
        import_records(write_records(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match="no .* row; broken JSON: 2, first in .*broken.jsonl, line 1"):
        import_records(write_records(tmp_path / "broken.jsonl", ["{", "}"]))
    records = records_of(some_journeys())
    for record in records:
        record["gating_probs"] = [0.9, 0.9]
    with pytest.raises(UserError, match="holds no complete journey: gate probabilities that do not sum to 1: 36"):
        import_records(write_records(tmp_path / "rows.jsonl", records))


# -------------------------------------------------------------------------------------------------- one file per token


def test_token_files(tmp_path):
    both = concatenate(
        [some_journeys(dataset="gsm_symbolic", tokens=12), some_journeys(dataset="humaneval", seed=1, tokens=12)]
    )
    folders = export_token_files(both, tmp_path)
    assert [folder.name for folder in folders] == ["gsm8k_tokens", "humaneval_tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gsm8k_tokens", "humaneval_tokens"]
    lines = (folders[1] / "p2_token_10.jsonl").read_text().splitlines()
    row = 3 * 12 + 2 * 12 + 10
    assert [json.loads(line) for line in lines] == records_of(both.select(slice(row, row + 1)))
    assert "GSM-symbolic" in (folders[0] / "README.md").read_text()
    imported, report = import_records(tmp_path, strict=True)
    assert_same(imported, both, ("dataset", "problem_id", "token_idx", "experts", "gating_probs"))
    assert (report.files, report.rows) == (72, 216)

    first, report = import_records(tmp_path / "humaneval_tokens", limit=3, strict=True)
    assert report.files == 3 and first.token_idx.tolist() == [0, 1, 10]  # in string order
    each, report = import_records(tmp_path, limit=3, strict=True)
    assert report.files == 6 and len(each) == 6

    # an earlier export is replaced whole
    export_token_files(both.select(both.token_idx == 0), tmp_path)
    assert len(list((tmp_path / "gsm8k_tokens").glob("*.jsonl"))) == 3


def test_token_files_tell_what_their_rows_do_not(tmp_path):
    folder = tmp_path / "maths_tokens"
    folder.mkdir()
    for token in range(3):
        rows = [{"layer": layer, "experts": [token, 7], "gating_probs": [0.75, 0.25]} for layer in range(2)]
        write_records(folder / f"p4_token_{token}.jsonl", rows)
    imported, _ = import_records(folder, strict=True)
    assert imported.dataset.tolist() == ["maths"] * 3 and imported.problem_id.tolist() == [4] * 3
    assert imported.token_idx.tolist() == [0, 1, 2] and imported.experts[:, 1, 0].tolist() == [0, 1, 2]


def test_a_fault_in_a_token_file_is_located(tmp_path):
    (folder,) = export_token_files(some_journeys(), tmp_path)
    file = folder / "p1_token_2.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    imported, report = import_records(tmp_path)
    assert report.problems[BROKEN_JSON].file == str(file) and report.problems[BROKEN_JSON].line == 2
    assert report.problems[INCOMPLETE].file == str(file) and len(imported) == 11


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    export_token_files(some_journeys(), tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "humaneval_tokens").iterdir()}

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "_export_readme", refuse)
    with pytest.raises(OSError, match="No space left"):
        export_token_files(some_journeys(problems=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["humaneval_tokens"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "humaneval_tokens").iterdir()} == before

    monkeypatch.setattr(store.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        export_rows(some_journeys(), tmp_path / "rows.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["humaneval_tokens"]


def test_two_sources_of_maths_are_not_mixed(tmp_path):
    both = concatenate([some_journeys(dataset="gsm8k"), some_journeys(dataset="gsm_symbolic")])
    with pytest.raises(UserError, match="gsm8k and gsm_symbolic would be exported to the same folder"):
        export_token_files(both, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_left_overs_of_killed_runs_are_removed(tmp_path):
    write_shard(tmp_path / "a-00000.parquet", some_journeys())
    shutil.copy(tmp_path / "a-00000.parquet", tmp_path / ".a-00001.parquet.77.tmp")
    assert len(read_journeys(tmp_path)) == 12  # never read
    store.remove_left_overs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-00000.parquet"]

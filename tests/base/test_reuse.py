"""What earlier runs measured: found again while all that it depends on is the same, computed again otherwise."""

import numpy as np
import pytest

from src.base.reuse import Pieces

COMMON = {"model": "m", "windows": {"max_seq_len": 64}}
DEPENDS = {"alpha": 0.3, "text": "t"}


def never():
    raise AssertionError("computed although it is there")


def test_a_piece_is_found_again_as_it_was_kept(tmp_path):
    first = Pieces(tmp_path, COMMON)
    assert first.find("alpha 0.3", DEPENDS) is None
    kept = first.content("alpha 0.3", DEPENDS, lambda: {"nll": np.array([1.5, 2.0]), "n": np.int64(2)})
    assert kept == {"nll": [1.5, 2.0], "n": 2} == first.content("alpha 0.3", DEPENDS, never)
    later = Pieces(tmp_path, COMMON)
    assert later.content("alpha 0.3", dict(reversed(DEPENDS.items())), never) == kept
    assert later.reused == ["alpha 0.3"] and later.computed == [] and later.reasons == {}
    assert later.report() == "reused from earlier runs: 1 of 1 measurements"
    assert first.report().endswith("computed for the first time: alpha 0.3")


@pytest.mark.parametrize(
    "common, depends, reason",
    [
        ({"model": "other"}, {}, "other model"),
        ({"windows": {"max_seq_len": 32}}, {}, "other windows"),
        ({}, {"alpha": 0.30001}, "other alpha"),
        ({}, {"document_tokens": 9}, "other document tokens"),
        ({"model": "other"}, {"text": "u"}, "other model, other text"),
    ],
)
def test_a_piece_does_not_survive_a_change_of_what_it_depends_on(tmp_path, common, depends, reason):
    Pieces(tmp_path, COMMON).keep("a", DEPENDS, {"value": 1})
    later = Pieces(tmp_path, COMMON | common)
    assert later.content("a", DEPENDS | depends, lambda: {"value": 2}) == {"value": 2}
    assert later.reused == [] and later.computed == ["a"]
    assert later.report() == f"computed again, because of {reason}: a"
    # The earlier one is still there for a run that asks for it.
    assert Pieces(tmp_path, COMMON).content("a", DEPENDS, never) == {"value": 1}


def test_labels_are_apart(tmp_path):
    pieces = Pieces(tmp_path, COMMON)
    pieces.keep("a", DEPENDS, {"value": 1})
    assert pieces.find("b", DEPENDS) is None
    pieces.keep("b", DEPENDS, {"value": 2})
    assert [pieces.find(label, DEPENDS)["value"] for label in "ab"] == [1, 2]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"content": {"value": 7}}', '{"depends": {}, "content": {"value": 7}}']
)
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    Pieces(tmp_path, COMMON).keep("a", DEPENDS, {"value": 1})
    (file,) = tmp_path.glob("*.json")
    file.write_text(damage)
    later = Pieces(tmp_path, COMMON)
    assert later.content("a", DEPENDS, lambda: {"value": 2}) == {"value": 2}
    assert "computed again, because of" in later.report()
    assert Pieces(tmp_path, COMMON).content("a", DEPENDS, never) == {"value": 2}


def test_restart_takes_nothing_and_says_so(tmp_path):
    Pieces(tmp_path, COMMON).keep("a", DEPENDS, {"value": 1})
    again = Pieces(tmp_path, COMMON, restart=True)
    assert again.content("a", DEPENDS, lambda: {"value": 2}) == {"value": 2}
    assert again.report() == "computed again, because of --restart: a"
    assert Pieces(tmp_path, COMMON).content("a", DEPENDS, never) == {"value": 2}


def test_arrays_are_kept_beside_the_piece(tmp_path):
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.array([True, False])}
    pieces = Pieces(tmp_path, COMMON)
    first = pieces.arrays("maps", DEPENDS, lambda: values)
    found = Pieces(tmp_path, COMMON).arrays("maps", DEPENDS, never)
    for read in (first, found):
        assert set(read) == {"x", "y"}
        assert all(np.array_equal(read[name], values[name]) and read[name].dtype == values[name].dtype for name in read)
    (archive,) = tmp_path.glob("*.npz")
    for damaged in (archive.read_bytes()[:-1], None):
        archive.unlink() if damaged is None else archive.write_bytes(damaged)
        other = Pieces(tmp_path, COMMON)
        assert np.array_equal(other.arrays("maps", DEPENDS, lambda: {"x": np.zeros(1)})["x"], np.zeros(1))
        assert other.computed == ["maps"] and other.reused == []
        assert other.report() == "computed again, because of a damaged file: maps"


def test_a_long_report_is_cut(tmp_path):
    pieces = Pieces(tmp_path, COMMON)
    for number in range(11):
        pieces.keep(f"p{number}", DEPENDS, {})
    assert pieces.report() == "computed for the first time: p0; p1; p2; p3; p4; p5; p6; p7 and 3 more"

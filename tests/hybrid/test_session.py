"""The session that scripts 03 to 10 open."""

import argparse
from pathlib import Path

import pytest

from src.base import text_data
from src.hybrid.session import Session
from src.models.loading import ASSETS_DIR, load_tokenizer


@pytest.mark.parametrize("differs", [False, True])
def test_text_that_is_not_the_recorded_one_is_said(differs, capsys, monkeypatch):
    """Every script says it, since every script takes its text in here; the result's meta says it too."""
    documents = text_data.load_documents("code", "evaluation", 0, 2)
    if differs:
        monkeypatch.setitem(text_data.RECORDED_SHA256, "code/evaluation", "0" * 64)
    arguments = argparse.Namespace(document_tokens=64)
    session = Session(
        arguments, Path(), None, load_tokenizer(ASSETS_DIR / "blockffn-tiny"), {}, {}, {}, None, {}, {}, 0.0
    )
    session.keep("evaluation", documents)
    said = capsys.readouterr().err
    assert ("note: the evaluation text differs" in said) == differs
    assert session.data["evaluation"]["matches"] is not differs
    assert [document.id for document in session.tokens["evaluation"]] == [document.id for document in documents]

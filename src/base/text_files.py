"""What text files hold: a user's own, with where one of them is at fault, and WikiText's lines."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

WIKITEXT_TITLE = re.compile(r"^ ?= (?!=)(.*[^=\s]) = ?$")  # ` = Title = `; section headings have ` = = `


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError for another encoding and for a file without text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_jsonl(path: Path) -> dict[str, str]:
    """The text of every line of a .jsonl file, by `file:line`. Raises ValueError for a line that holds none."""
    texts = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        texts[f"{path.name}:{number}"] = _record_text(record, f"{path}, line {number}")
    return texts


def _record_text(record, where: str) -> str:
    fields = record if isinstance(record, dict) else {}
    for names, separator in ((("text",), ""), (("prompt", "canonical_solution"), ""), (("question", "answer"), "\n")):
        values = [fields[name] for name in names if name in fields]
        if names[0] in fields:
            if not all(isinstance(value, str) for value in values) or not "".join(values).strip():
                raise ValueError(f"{where}: {' and '.join(names)} must be a string that is not empty")
            return separator.join(values)
    raise ValueError(f'{where}: expected an object with "text", "prompt" or "question"')


def wikitext_articles(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(title, text) of WikiText's articles: a title (` = Title = `) after an empty line begins one."""
    articles, empty_before = [], True
    for line in lines:
        line = line.rstrip("\n")
        title = WIKITEXT_TITLE.match(line) if empty_before else None
        if title:
            articles.append((title.group(1), []))
        if articles:
            articles[-1][1].append(line)
        empty_before = not line.strip()
    return [(title, "\n".join(body).strip("\n") + "\n") for title, body in articles]

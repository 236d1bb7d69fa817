"""Renders README.md and docs/results.md from their templates and the files in docs/results/.

    python scripts/dev/render_results.py            writes both pages
    python scripts/dev/render_results.py --check    writes nothing; exit code 1 where a page is out of date

The templates, docs/README.template.md and docs/results.template.md, are Markdown with Jinja placeholders. Each
placeholder names a file of docs/results/, a row and a column, so that no number in prose can drift from its file:

    {{ value("gates", "delta_nll", "+.3f", mode="routing_hard_0.5") }}                  +0.161
    {{ interval("gates", "ci_low", "ci_high", ".3f", mode="routing_hard_0.5") }}        [0.124, 0.224]
    {{ entry("verdict.json", "numbers.p_value", ".3f") }}                               0.006
    {{ by_hand("9.3 %") }}                                                              9.3 % (measured by hand)

A number in the prose itself is an error, unless it is a name or a setting: PLAIN_NUMBERS lists what needs no mark,
`setting("80 %")` marks the rest.
"""

import argparse
import csv
import json
import re
import sys
from functools import cache
from pathlib import Path

import jinja2

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = {"README.md": "docs/README.template.md", "docs/results.md": "docs/results.template.md"}

# Tables under a name of their own: where several files may hold a row, the first one that has it is quoted. Each entry
# is the one place to change when a result moves to another file.
TABLES = {
    "gates": ("explained_gates_results.csv", "gated_hybrid_results.csv"),
    "gate_domains": ("explained_gates_domains.csv", "gated_hybrid_domains.csv"),
    "gate_documents": ("gated_hybrid_documents.csv",),
    "alphas": ("alpha_sweep_results.csv",),
    "layers": ("layer_replacement_results.csv",),
}

# What may follow a format: the factor that the number is multiplied by, and the unit that is written behind it.
UNITS = {" %": (100, " %"), " x100": (100, ""), " M": (1e-6, "")}

# Numbers that a template may state itself: they name or set something and are no result.
_NUMBER = r"\d[\d.,]*\d|\d"
_SETTINGS = "[Aa]lphas?|[Ss]hares?|[Ll]engths?|[Ll]ayers?|sets?|seeds?|top|m ="
PLAIN_NUMBERS = (
    r"\b(?:19|20)\d\d\b",  # a year
    r"arXiv[: ]\d{4}\.\d+",
    rf"\b(?:{_SETTINGS})[ -](?:{_NUMBER})(?:(?:, and |, to |, | and | to | or )(?:{_NUMBER}))*",
    r"\b95 %",
    r"\b(?:RTX|PCIe|Apache License) \d[\d.]*\b",
    r"\bPython 3\.\d+ to 3\.\d+\b",
    r"\b12 GB GPU\b",
    r"\b(?:4|8|16)(?:-bit| bits?)\b",
)


class RenderError(ValueError):
    """A placeholder that names no value, or more than one; the message says which."""


@cache
def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of docs/results/ as text, column name -> cell. Raises RenderError where it is missing."""
    if not exists(name):
        raise RenderError(f"docs/results/{name} does not exist")
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows(table: str, **where) -> list[dict[str, str]]:
    """The rows of a file, or of the first file of a name in TABLES that has such rows, whose cells equal `where`."""
    files = [name for name in TABLES.get(table, (table,)) if table not in TABLES or (RESULTS / name).is_file()]
    if not files:
        raise RenderError(f"none of the files of {table!r} is in docs/results/: {', '.join(TABLES[table])}")
    for name in files:
        unknown = where.keys() - read_table(name)[0].keys()
        if unknown:
            raise RenderError(f"docs/results/{name} has no column {', '.join(sorted(unknown))}")
        found = [row for row in read_table(name) if all(row[column] == str(cell) for column, cell in where.items())]
        if found:
            return found
    raise RenderError(f"no row of {', '.join(files)} has {where}")


def cell(table: str, column: str, **where) -> float:
    """The number in one cell. Raises RenderError unless exactly one row matches and the cell holds a number."""
    found = rows(table, **where)
    if len(found) != 1:
        raise RenderError(f"{len(found)} rows of {table} have {where}; a placeholder must name one")
    if column not in found[0]:
        raise RenderError(f"{table} has no column {column!r}; it has {', '.join(found[0])}")
    try:
        return float(found[0][column])
    except ValueError:
        raise RenderError(f"{column} of {where} in {table} is {found[0][column]!r}, not a number") from None


def number(value: float | str, spec: str) -> str:
    """`value` in a Python format such as "+.3f", which may end in one of UNITS (".1f %", ".1f x100", ".1f M")."""
    for ending, (factor, unit) in UNITS.items():
        if spec.endswith(ending):
            return format(float(value) * factor, spec.removesuffix(ending)) + unit
    return format(float(value), spec)


def value(table: str, column: str, spec: str, **where) -> str:
    """One cell, formatted."""
    return number(cell(table, column, **where), spec)


def interval(table: str, low: str, high: str, spec: str, **where) -> str:
    """Two cells of one row as an interval: "[0.015, 0.053]"."""
    return f"[{value(table, low, spec, **where)}, {value(table, high, spec, **where)}]"


def entry(name: str, path: str, spec: str | None = None):
    """An entry of a JSON file by its path ("numbers.ci_low"; lists by index), formatted where `spec` is given."""
    if not exists(name):
        raise RenderError(f"docs/results/{name} does not exist")
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    for key in path.split("."):
        try:
            found = found[int(key) if isinstance(found, list) else key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise RenderError(f"docs/results/{name} has no entry {path!r}: {key!r} is missing") from None
    return found if spec is None else number(found, spec)


def exists(name: str) -> bool:
    """Whether docs/results/ has this file."""
    return (RESULTS / name).is_file()


def by_hand(text: str) -> str:
    """A figure that no file holds, marked as such."""
    return f"{text} (measured by hand)"


def setting(text: str) -> str:
    """A number that is no result: it names something, or was chosen beforehand."""
    return text


def render(template: str) -> str:
    """The page that a template's text makes. Raises RenderError, or a Jinja error, for a wrong placeholder."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    for function in (rows, cell, number, value, interval, entry, exists, by_hand, setting):
        environment.globals[function.__name__] = function
    return environment.from_string(template).render()


def stray_numbers(template: str) -> list[str]:
    """Numbers that stand in a template's prose instead of coming out of a file, each with the words around it.

    Placeholders, code, link targets, comments and what PLAIN_NUMBERS allows are not looked at, nor are digits that are
    part of a name (Mamba-2, GSM8K, SmolLM2-135M).
    """
    text = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}|<!--.*?-->", "\N{WHITE SQUARE}", template, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for pattern in PLAIN_NUMBERS:
        text = re.sub(pattern, "", text)
    found = re.finditer(rf"(?<![\w.-])[-+]?(?:{_NUMBER})(?![\w-])", text)
    return [" ".join(text[max(0, one.start() - 40) : one.end() + 30].split()) for one in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    check = parser.parse_args().check
    code = 0
    for page, source in PAGES.items():
        template = (ROOT / source).read_text(encoding="utf-8")
        for words in stray_numbers(template):
            print(f"{source}: a number that comes out of no file: ... {words} ...", file=sys.stderr)
            code = 1
        try:
            text = render(template)
        except (RenderError, jinja2.TemplateError) as error:
            print(f"{source}: {error}", file=sys.stderr)
            return 1
        path = ROOT / page
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            if check:
                print(f"{page} is out of date: python scripts/dev/render_results.py", file=sys.stderr)
                code = 1
            else:
                path.write_text(text, encoding="utf-8")
                print(f"written: {page}")
    return code


if __name__ == "__main__":
    sys.exit(main())

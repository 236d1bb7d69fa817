"""README.md and docs/: rendered from their files, no numbers of their own, links that lead somewhere, all columns."""

import csv
import fnmatch
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("render_results", ROOT / "scripts" / "dev" / "render_results.py")
render_results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(render_results)

PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if ".template." not in path.name)]
TABLES = sorted((ROOT / "docs" / "results").rglob("*.csv"))
ROUTING = {"mode": "routing_hard_0.5"}


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def described_columns() -> list[tuple[list[str], set[str]]]:
    """(file patterns, column patterns) of every section of columns.md; the columns of no file come last."""
    sections = []
    for section in re.split(r"^##+ ", read(ROOT / "docs" / "columns.md"), flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        first_cells = re.findall(r"^\| (`.+?) \|", body, flags=re.MULTILINE)
        columns = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
        sections.append((re.findall(r"`([^`]+\.csv)`", heading), {re.sub("<.+?>", "*", name) for name in columns}))
    return sections


# -- pages and their files
@pytest.mark.parametrize("page", render_results.PAGES)
def test_page_is_what_its_template_and_the_files_make(page):
    assert render_results.render(read(ROOT / render_results.PAGES[page])) == read(ROOT / page)


@pytest.mark.parametrize("template", render_results.PAGES.values())
def test_template_states_no_result_of_its_own(template):
    assert render_results.stray_numbers(read(ROOT / template)) == []


def test_a_number_typed_into_prose_is_found():
    prose = "It costs 0.161 nats at share 0.5, on Mamba-2 and GSM8K (2025), by `x = 3`, {{ value(1) }}, 95 % intervals."
    (found,) = render_results.stray_numbers(prose)
    assert "0.161" in found
    for typed in ("It is +0.031 more.", "Half of them gain 38.5 %.", "See 28,343 tokens", "rho -0.04 to 0.06"):
        assert render_results.stray_numbers(typed), typed


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_readme_code_runs_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", read(ROOT / "README.md"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert "0:" in capsys.readouterr().out


# -- placeholders
def test_placeholders_read_one_cell():
    assert render_results.render('{{ value("margin.csv", "x", ".1f") if exists("margin.csv") else "none" }}') == "none"
    assert render_results.value("alphas", "alpha", ".1f %", alpha="0.3") == "30.0 %"
    assert render_results.number("0.25", ".1f x100") == "25.0"
    assert render_results.number(14314784.31, ".1f M") == "14.3"
    low, high = (render_results.value("gates", name, ".3f", **ROUTING) for name in ("ci_low", "ci_high"))
    assert render_results.interval("gates", "ci_low", "ci_high", ".3f", **ROUTING) == f"[{low}, {high}]"
    assert render_results.entry("verdict.json", "inputs.sidecar_seeds.1", ".0f") == "1"


@pytest.mark.parametrize(
    ("placeholder", "words"),
    [
        ('value("gates", "delta_nll", ".3f", mode="routing_hard_0.6")', "no row of .*routing_hard_0.6"),
        ('value("gates", "delta", ".3f", gate="routing")', "rows of gates have"),
        ('value("gates", "delta_nil", ".3f", mode="routing_hard_0.5")', "no column 'delta_nil'"),
        ('value("gates", "delta", ".3f", model="x")', "no column model"),
        ('value("gates", "vs_random", ".3f", mode="baseline")', "not a number"),
        ('value("nothing.csv", "delta", ".3f")', "nothing.csv does not exist"),
        ('entry("verdict.json", "numbers.differense")', "no entry"),
        ('entry("nothing.json", "numbers")', "nothing.json does not exist"),
    ],
)
def test_a_placeholder_that_names_nothing_is_an_error(placeholder, words):
    with pytest.raises(render_results.RenderError, match=words):
        render_results.render("{{ " + placeholder + " }}")


def test_a_row_is_taken_from_the_first_file_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(render_results, "RESULTS", tmp_path)
    monkeypatch.setattr(render_results, "TABLES", {"both": ("new.csv", "old.csv"), "none": ("absent.csv",)})
    render_results.read_table.cache_clear()
    (tmp_path / "new.csv").write_text("mode,x\na,1\n")
    (tmp_path / "old.csv").write_text("mode,x\na,2\nb,3\n")
    try:
        assert render_results.cell("both", "x", mode="a") == 1
        assert render_results.cell("both", "x", mode="b") == 3
        with pytest.raises(render_results.RenderError, match=r"none of the files of 'none'.*absent.csv"):
            render_results.rows("none")
    finally:
        render_results.read_table.cache_clear()


def test_check_says_that_a_page_is_out_of_date(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render_results, "ROOT", tmp_path)
    monkeypatch.setattr(render_results, "PAGES", {"page.md": "page.template.md"})
    monkeypatch.setattr("sys.argv", ["render_results.py", "--check"])
    (tmp_path / "page.template.md").write_text('{{ setting("1") }}\n')
    assert render_results.main() == 1 and not (tmp_path / "page.md").exists()
    assert "page.md is out of date" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["render_results.py"])
    assert render_results.main() == 0 and (tmp_path / "page.md").read_text() == "1\n"
    monkeypatch.setattr("sys.argv", ["render_results.py", "--check"])
    assert render_results.main() == 0


# -- links and columns
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(read(path)), f"{page.name}: {link}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT / "docs" / "results")))
def test_every_column_is_described(path):
    sections = described_columns()
    common = set().union(*(columns for files, columns in sections if not files))
    own = [columns for files, columns in sections if any(fnmatch.fnmatch(path.name, name) for name in files)]
    assert own, f"docs/columns.md has no section on {path.name}"
    with open(path, newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    known = common.union(*own)
    assert [name for name in header if not any(fnmatch.fnmatch(name, pattern) for pattern in known)] == []


def test_results_name_no_machine():
    for path in (ROOT / "docs" / "results").rglob("*.json"):
        assert not re.search(r'"(/|[A-Z]:\\)', read(path)), f"{path} holds an absolute path"

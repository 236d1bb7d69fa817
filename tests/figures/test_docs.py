"""The figures in docs/figures: those that the pages show, under the names by which the notebooks keep them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURES = {file.stem for file in (ROOT / "docs" / "figures").glob("*.png")}


def test_pages_show_every_figure_that_is_there_and_no_other():
    shown = {name for page in PAGES for name in re.findall(r"figures/(\w+)\.png", page.read_text(encoding="utf-8"))}
    assert shown == FIGURES


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_are_called_as_in_the_notebooks(name):
    notebooks = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "notebooks").glob("*.ipynb"))
    drawn = re.findall(r'(?:draw|show)\((?:\\n",\s*")?\s*f?\\"(\w+)', notebooks)
    assert re.sub(r"_\d+$", "_", name) in drawn

"""docs/tour.ipynb and the guide's example run from the first line to the last, and what their text says is so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "tour.ipynb"


def pages() -> ModuleType:
    """The site's hook, which runs the tour; docs/ is no package."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> tuple[str, dict[str, bytes]]:
    return pages().run_tour(NOTEBOOK)


def number(text: str, before: str) -> float:
    found = re.search(rf"^{re.escape(before)} (\d+\.\d+)$", text, re.M)
    assert found is not None, before
    return float(found[1])


def test_the_curve_learns_what_a_line_cannot(page):
    text, _ = page
    worn = number(text, "mean squared error:")
    curve = number(text, "mean squared error with AuroRA:")
    line = number(text, "mean squared error with a straight line:")
    assert curve < 0.1 * line < 0.1 * worn
    assert number(text, "mean squared error after the merge:") > line
    assert number(text, "and after unmerging:") == curve


def test_the_adapter_looks_at_the_force(page):
    found = re.search(r"^A = \[(.*)\]$", page[0], re.M)
    assert found is not None
    speed, angle, force = (abs(float(x)) for x in found[1].split(", "))
    assert force > 20 * max(speed, angle)


def test_what_should_be_the_same_is_the_same(page):
    said = re.findall(r": (True|False)$", page[0], re.M)
    assert said == ["True"] * 3


def test_the_curve_is_drawn(page):
    text, pictures = page
    assert list(pictures) == re.findall(r"!\[.*?\]\((.*?)\)", text) == ["tour-0.png"]
    assert pictures["tour-0.png"].startswith(b"\x89PNG")


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_a_cell_that_fails_is_noticed(tmp_path):
    cell = {"cell_type": "code", "source": ["raise KeyError('planted')"]}
    (tmp_path / "bad.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    with pytest.raises(KeyError, match="planted"):
        pages().run_tour(tmp_path / "bad.ipynb")


def test_the_guides_example_learns_a_change_that_bends(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    guide = (DOCS / "guide.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- bends -->\n```python\n(.*?)```", guide, re.S)
    exec(compile(code, "guide.md", "exec"), {})
    told = re.fullmatch(r"before (\S+), after (\S+)\n", capsys.readouterr().out)
    assert told is not None
    before, after = map(float, told.groups())
    assert after < before / 30
    assert (tmp_path / "bends.png").exists()

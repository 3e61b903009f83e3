"""The rules of reading, and which room may import which."""

import ast
import re
from pathlib import Path

import pytest

import aurora

ROOT = Path(aurora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def broken_rules(text: str) -> list[str]:
    """What a file breaks: "line: rule"."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > 100:
            found.append(f"{number}: longer than 100 columns")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= lines_allowed(node):
            found.append(f"{node.lineno}: {node.name} is longer than 40 lines")
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            found.append(f"{node.lineno}: more than one `for` in a comprehension")
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
            if inner:
                found.append(f"{node.lineno}: nested conditional expressions")
    return found


def lines_allowed(function) -> int:
    """40 lines of code; the docstring, which is a page of the reference, comes on top."""
    if not ast.get_docstring(function):
        return 40
    docstring = function.body[0]
    return 40 + docstring.end_lineno - docstring.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_rules_of_reading(path):
    assert broken_rules(path.read_text(encoding="utf-8")) == []


def test_the_rules_can_be_broken():
    body = "\n".join(f"    x{i} = {i}" for i in range(40))
    assert broken_rules(f"def f():\n{body}\n") == ["1: f is longer than 40 lines"]
    assert broken_rules(f'def f():\n    """One.\n\n    Two.\n    """\n{body[:-11]}\n') == []
    assert broken_rules("x = [a for b in c for a in b]\n") == [
        "1: more than one `for` in a comprehension"
    ]
    assert broken_rules("x = 1 if a else 2 if b else 3\n") == ["1: nested conditional expressions"]
    assert broken_rules(f"x = '{'a' * 100}'\n") == ["1: longer than 100 columns"]


def imported(path: Path) -> set[str]:
    """The rooms of ours that a file imports: "core", "_fit", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "aurora":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aurora."):
            names.add(node.module.removeprefix("aurora."))
    return names


def test_everything_may_import_core_and_core_nothing_of_ours():
    assert imported(ROOT / "core.py") == set()
    assert "core" in imported(ROOT / "merging.py")
    for name in ("_fit", "_certificate", "_table"):
        assert imported(ROOT / f"{name}.py") <= {"core"}


def test_benchmarks_and_tests_import_public_names_only():
    folder = ROOT.parent / "benchmarks"
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(core|aurora|merging|bounds|recipes)\._[a-z]", text), path
        assert not any(name.rpartition(".")[2].startswith("_") for name in imported(path)), path

"""How the benchmarks are built: who imports whom, how long a function is, reports made of lines."""

from __future__ import annotations

import ast
import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import broken_rules

import benchmarks
from benchmarks import __main__ as command
from benchmarks import approximation, curves, learning, merging
from benchmarks.lab import needs, records, settings

ROOM = Path(benchmarks.__file__).parent
RESULTS = ROOM.parent / "docs" / "results"
FILES = sorted(ROOM.rglob("*.py"))
STUDIES = list(command.catalogue())
KEPT = {
    "approximation": approximation,
    "curves": curves,
    "learning": learning,
    "merging": merging,
}


# --- The house ------------------------------------------------------------------------------------


def imported(source: str, package: str) -> set[str]:
    """Names of the modules that a source imports, and of what it takes from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            places = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*(places if node.level else ()), *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def trespasses(source: str, own: str, package: str = "benchmarks") -> set[str]:
    """The studies that a source imports, other than its own."""
    named = {name.split(".")[1] for name in imported(source, package) if "benchmarks." in name}
    return {f"benchmarks.{name}" for name in named.intersection(STUDIES) - {own}}


def place(path: Path) -> str:
    """A file by its path under `benchmarks`."""
    return str(path.relative_to(ROOM))


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_study_is_imported_by_another_or_by_the_lab(path: Path) -> None:
    package = ".".join(path.relative_to(ROOM.parent).parent.parts)
    own = path.relative_to(ROOM).parts[0].removesuffix(".py")
    assert trespasses(path.read_text(encoding="utf-8"), own, package) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from benchmarks import learning",
        "import benchmarks.learning as l",
        "from benchmarks.learning import Plan",
        "from benchmarks.learning.plan import Plan",
        "from . import learning",
        "def f():\n    from .learning import Plan",
    ],
)
def test_a_study_that_imports_another_is_noticed(source: str) -> None:
    assert trespasses(source, "approximation") == {"benchmarks.learning"}
    assert trespasses(source, "learning") == set()


@pytest.mark.parametrize("path", FILES, ids=place)
def test_benchmarks_can_be_read(path: Path) -> None:
    assert broken_rules(path.read_text(encoding="utf-8")) == []


# --- Reports made of the committed lines ----------------------------------------------------------


def without_machine(text: str) -> list[str]:
    """Lines of a report, but for the one that names the machine."""
    return [line for line in text.splitlines() if not line.startswith("Written by ")]


@pytest.mark.parametrize("name", KEPT)
def test_reports_are_made_again_from_the_committed_lines(name: str, tmp_path: Path) -> None:
    shutil.copy(RESULTS / f"{name}.jsonl", tmp_path)
    KEPT[name].main(["--report", "--out", str(tmp_path)])
    made, committed = (folder / f"{name}.md" for folder in (tmp_path, RESULTS))
    wanted = committed.read_text(encoding="utf-8")
    assert without_machine(made.read_text(encoding="utf-8")) == without_machine(wanted)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (RESULTS / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", KEPT)
def test_a_report_without_lines_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(needs.BenchmarkError, match="leave out --report"):
        KEPT[name].main(["--report", "--out", str(tmp_path)])


def test_the_committed_lines_are_found_and_not_run_again() -> None:
    lines = {name: records.read(RESULTS / f"{name}.jsonl") for name in KEPT}
    names = (
        "head only",
        "LoRA r=2",
        "LoRA r=8",
        "AuroRA r=2",
        settings.RECOMMENDED,
        "try identity",
    )
    plan = learning.Plan(names=names)
    assert list(learning.pending(plan, lines["learning"])) == []
    assert len(list(learning.pending(plan, {}))) == 3 * len(names)
    for key, record in lines["learning"].items():
        run = learning.Run(**{name: record[name] for name in learning.Run._fields})
        assert run.key == key
        assert run.method in settings.SETTINGS
    assert {run.key for run in merging.plan(quick=False)} == set(lines["merging"])
    assert {run.key for run in approximation.plan(quick=False)} == set(lines["approximation"])


def test_a_report_names_the_machines_of_its_lines() -> None:
    machines = ["A, 2 threads, monday", "A, 1 threads", "A, 2 threads, monday", "B, 4 threads"]
    told = records.machines([{"machine": machine} for machine in machines])
    assert told == "A, 2 threads, monday; B, 4 threads"


FAULTS = """
import resource, torch
from benchmarks.lab.timing import keep_memory

def fewest_faults():
    found = []
    for _ in range(10):  # pieces come to fit as they are freed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).zero_()  # 64 MiB
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)

print(fewest_faults(), keep_memory(), fewest_faults())
"""


def test_memory_that_is_kept_is_not_asked_for_anew() -> None:
    command = [sys.executable, "-c", FAULTS]
    before, kept, after = subprocess.check_output(command, text=True).split()
    if kept == "True":
        assert int(after) == 0 < int(before)
    else:  # there is no glibc
        assert not hasattr(ctypes.CDLL(None), "mallopt")

"""The files around the code agree with it: versions, Pythons, torch, tests that pages name."""

from __future__ import annotations

import configparser
import importlib
import re
from pathlib import Path

import pytest
import yaml

import aurora

ROOT = Path(__file__).parents[1]
PUBLIC_IN_0_1_0 = {
    "aurora": """
        ANL AuroraConfig AuroraLinear BoundsReport Certificate MergeReport
        adapter_state_dict assert_bounded certify disabled inject load
        load_adapter_state_dict merge parameter_groups parameters remove report_bounds save
        start_as_identity watch_linearity
    """,
    "aurora.core": """
        AuroraConfig ANL AuroraLinear linear_features walk layers base_parameters Injection
        inject swap remove trained_parameters parameters disabled check_mergeable merge
    """,
    "aurora.checkpoint": "VERSION save load adapter_state_dict load_adapter_state_dict",
    "aurora.merging": """
        METHODS Moments Affine fit collect MergedLayer MergeReport merge computes_linear
        merged_tensors watch_linearity
    """,
    "aurora.bounds": """
        Certificate certify allowance assert_bounded LayerBounds BoundsReport report_bounds
    """,
    "aurora.training": "start_as_identity parameter_groups call layer_input evaluating",
}
YAML = [
    ROOT / "CITATION.cff",
    ROOT / ".pre-commit-config.yaml",
    *sorted((ROOT / ".github").rglob("*.yml")),
]


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_every_yaml_file_parses(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == aurora.__version__
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert latest is not None
    assert latest[1] == aurora.__version__


def test_every_public_name_of_0_1_0_is_here_or_the_changelog_says_where() -> None:
    moved = re.findall(r"^\| (`.*?) \|", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    pointed = {name for cell in moved for name in re.findall(r"`([\w.]+)", cell)}
    lost, pointless = [], []
    for module, names in PUBLIC_IN_0_1_0.items():
        for name in names.split():
            try:
                here = hasattr(importlib.import_module(module), name)
            except ImportError:
                here = False
            if not here and f"{module}.{name}" not in pointed:
                lost.append(f"{module}.{name}")
            if here and f"{module}.{name}" in pointed:
                pointless.append(f"{module}.{name}")
    assert not lost
    assert not pointless


def test_the_workflows_run_every_python_that_setup_promises() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    pythons = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert setup()["options"]["python_requires"] == f">={pythons[0]}"


def test_the_oldest_torch_that_is_tested_is_the_one_that_is_promised() -> None:
    promised = re.search(r"torch>=(\S+)", setup()["options"]["install_requires"])
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    tested = re.search(r'^OLDEST_TORCH = "(\S+)"', noxfile, re.M)
    assert promised is not None
    assert tested is not None
    assert tested[1].split(".")[:2] == promised[1].split(".")[:2]


def test_every_session_that_a_workflow_or_a_document_names_exists() -> None:
    sessions = set(
        re.findall(
            r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.M
        )
    )
    named: set[str] = set()
    for path in [*YAML, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for words in re.findall(r"nox -s ((?:\w+ ?)+)", path.read_text(encoding="utf-8")):
            named.update(words.split())
    assert named
    assert named <= sessions


def test_no_document_holds_both_sides_of_a_merge() -> None:
    for path in [*ROOT.glob("*.*"), *(ROOT / "docs").glob("*.*")]:
        if path.suffix in (".md", ".cfg", ".yml", ".py", ".cff", ".in"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert not [line for line in lines if line.startswith(("<<<<<<< ", ">>>>>>> "))], path


def test_every_link_between_documents_leads_somewhere() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not broken


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    shown = {target.rpartition(".")[2] for target in re.findall(r"^::: (\S+)$", text, re.M)}
    assert not set(aurora.__all__) - shown


@pytest.mark.parametrize("page", ["promises", "compatibility"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+)::(test_\w+)`", text)
    assert len(named) > 10
    missing = []
    for file, test in named:
        path = ROOT / "tests" / f"{file}.py"
        if not path.exists() or f"def {test}(" not in path.read_text(encoding="utf-8"):
            missing.append(f"{file}::{test}")
    assert not missing


def test_every_row_of_what_works_names_a_test_of_ours() -> None:
    text = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    part = text.partition("## What works\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    header = ["what", "PEFT's LoRA", "aurora-peft", "ours"]
    assert rows.count(header) == 4
    rows = [row for row in rows if row != header and set(row[0]) != {"-"}]
    assert len(rows) >= 30
    unlike = [row for row in rows if len(row) != 4 or "::test_" not in row[-1]]
    assert not unlike
    assert all(row[1] and row[2] for row in rows)

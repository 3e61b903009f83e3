"""`core.py` alone: the README's example runs where nothing of the package can be imported."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aurora import core

ROOT = Path(__file__).parents[1]
BLOCK = """import builtins, sys
real = builtins.__import__
def guard(name, *rest):
    if name.split(".")[0] in {names}:
        raise ImportError(name)
    return real(name, *rest)
builtins.__import__ = guard
"""
FOREIGN = {"aurora", "benchmarks", "safetensors", "transformers", "peft"}


def example() -> str:
    """The README's block of Python, which needs no file but `core.py`."""
    found = re.findall(
        r"<!-- one file -->\n```python\n(.*?)```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.S,
    )
    assert len(found) == 1
    return found[0]


def run_alone(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(core.__file__, folder / "core.py")
    (folder / "script.py").write_text(BLOCK.format(names=FOREIGN) + code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_readmes_example_runs_with_one_file(tmp_path):
    run = run_alone(tmp_path, example())
    assert run.returncode == 0, run.stderr
    assert "4 layers adapted" in run.stdout
    losses = [float(x) for x in re.findall(r"step \d+: loss (\d+\.\d+)", run.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    assert "aurora" not in {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["aurora", "safetensors"])
def test_the_guard_guards(tmp_path, name):
    run = run_alone(tmp_path, f"import {name}")
    assert run.returncode == 1
    assert f"ImportError: {name}" in run.stderr


def test_core_is_short_and_imports_torch_and_the_standard_library_only():
    text = Path(core.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 1345
    text = re.sub(r"^if TYPE_CHECKING:\n(    .*\n)+", "", text, flags=re.M)  # never executed
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    assert imported - sys.stdlib_module_names == {"torch"}
    assert not imported & {"pickle", "marshal", "ctypes", "subprocess"}


def test_importing_the_package_needs_torch_only(tmp_path):
    code = (
        BLOCK.format(names=FOREIGN - {"aurora"})
        + f"sys.path.insert(0, {str(ROOT)!r})\nimport aurora\nprint(aurora.__all__)"
    )
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr

"""The machine, tables, pictures, and the document they go into."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.needs import need


def use_all_cores() -> int:
    """One thread per core this process may use, or OMP_NUM_THREADS. Returns their number.

    Containers often have fewer cores than the machine.
    """
    free = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        free = len(os.sched_getaffinity(0))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or free))
    return torch.get_num_threads()


def machine() -> str:
    """One line: processor, threads, versions and date, so that a number can be placed."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if importlib.util.find_spec("transformers"):
        transformers = importlib.import_module("transformers")
        versions.append(f"transformers {transformers.__version__}")
    threads = f"{torch.get_num_threads()} threads"
    return ", ".join([_processor(), threads, *versions, str(datetime.date.today())])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, aligned for the eye too: the first column left, the others right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        _line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    rule = _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_report(
    out: Path, name: str, title: str, parts: Sequence[str], *, measured_on: str = ""
) -> Path:
    """Write `<out>/<name>.md`: title, command, machine, parts, and the picture `<name>.png`.

    Args:
        out: the folder, made if there is none.
        name: of the benchmark.
        title: of the document and its picture.
        parts: paragraphs and tables.
        measured_on: the machine that measured, this one unless it is given.
    """
    path = out / f"{name}.md"
    head = f"Written by `python -m benchmarks {name}`; {measured_on or machine()}."
    out.mkdir(parents=True, exist_ok=True)
    whole = [f"# {title}", head, *parts, f"![{title}]({name}.png)"]
    path.write_text("\n\n".join(whole) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def picture(path: Path, columns: int = 1, height: float = 4) -> Iterator[list[Any]]:
    """Draw inside the block on so many axes, up to three in a row; then they are saved as PNG.

    height: of a row, in inches.
    """
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    rows, across = -(-columns // 3), min(columns, 3)
    how: Any = {"figsize": (5.5 * across, height * rows), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(rows, across, **how)
    for unused in axes.flat[columns:]:
        unused.set_visible(False)
    try:
        yield list(axes.flat[:columns])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    finally:
        pyplot.close(figure)

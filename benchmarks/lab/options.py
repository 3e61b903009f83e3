"""The command lines of the benchmarks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path


def parser(name: str, doc: str | None, quick: str = "") -> argparse.ArgumentParser:
    """The command line of a benchmark with its `--out`.

    Args:
        name: of the benchmark.
        doc: its docstring, whose first line describes it.
        quick: what `--quick` does, which goes to a folder of its own; there is none without.
    """
    description = (doc or "").partition("\n")[0]
    found = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    if quick:
        told = f"{quick}, written to a folder `quick`"
        found.add_argument("--quick", action="store_true", help=told)
    told = f"folder for {name}.md and .png (default: %(default)s)"
    found.add_argument("--out", type=Path, default=Path("docs/results"), help=told)
    return found


def add_runs(found: argparse.ArgumentParser, jobs: int = 0) -> None:
    """The options of a benchmark that performs many runs and keeps each as a line of JSON.

    Args:
        found: the parser.
        jobs: the default of `--jobs`, 0 for one a core, or one if there is a GPU.
    """
    add = found.add_argument
    told = "start no further run after this long; the next call goes on"
    add("--minutes", type=float, default=math.inf, help=told)
    told = f"runs at once (default: {jobs or 'one a core, or one if there is a GPU'})"
    add("--jobs", type=int, default=jobs, help=told)
    told = "run nothing; write the report again from the lines there are"
    add("--report", action="store_true", help=told)


def parse(found: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options; with `--quick`, `out` is the folder `quick` in it."""
    options = found.parse_args(argv)
    if getattr(options, "quick", False):
        options.out /= "quick"
    return options

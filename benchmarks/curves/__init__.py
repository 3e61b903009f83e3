"""Where the curve pays: worlds that bend along few directions, learned from few examples.

Three tasks, each a pretrained model and a world that it no longer fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.curves.plan import plan
from benchmarks.curves.runs import Run, perform
from benchmarks.lab import options as command
from benchmarks.lab import records
from benchmarks.lab.records import Lines


def main(argv: Sequence[str]) -> None:
    """Perform what has no line yet, then print and write the report."""
    parser = command.parser("curves", __doc__, "two methods of each task, few steps")
    command.add_runs(parser)
    options = command.parse(parser, argv)

    def pending(lines: Lines) -> Iterator[Run]:
        return (run for run in plan() if run.key not in lines)

    records.gather(options.out / "curves.jsonl", options, pending, perform)

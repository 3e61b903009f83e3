"""Where the curve pays: worlds that bend along few directions, learned from few examples.

Three tasks, each a pretrained model and a world that it no longer fits: other motors on a simulated
arm (MuJoCo), a tone curve over a photograph, another corpus of rated texts. AuroRA is measured by
LoRA, biases, splines, a ReLU bottleneck of its size and full fine-tuning. Every run is one line of
JSON; a run that has its line is not run again.

worlds: swap, tones, ratings, each a task as `chain` has it. contenders: the methods. stack: many
small models trained at once. runs: one method at one number of examples. plan: all runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.curves.plan import plan
from benchmarks.curves.report import report
from benchmarks.curves.runs import Run, perform
from benchmarks.lab import options as command
from benchmarks.lab import records
from benchmarks.lab.records import Lines


def main(argv: Sequence[str]) -> None:
    """Perform what has no line yet, then print and write the report."""
    parser = command.parser("curves", __doc__, "three methods and short training")
    command.add_runs(parser)
    told = "32 and 4,096 examples and other layers too, and an arm whose sensors change"
    parser.add_argument("--more", action="store_true", help=told)
    options = command.parse(parser, argv)
    runs = list(plan(options.quick, options.more))

    def pending(lines: Lines) -> Iterator[Run]:
        return (run for run in runs if run.key not in lines)

    lines = records.gather(options.out / "curves.jsonl", options, pending, perform)
    known = plan(options.quick, more=True)
    found = [lines[run.key] for run in known if run.key in lines]
    written = report(options.out, found)
    print(written.read_text(encoding="utf-8"))
    print(f"{len(found)} runs, written to {written}")

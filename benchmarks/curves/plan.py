"""Which runs there are, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.curves.runs import Run

Who = tuple[str, str]  # method, place

EXAMPLES = (256, 1024, 64)
FRONT: tuple[Who, ...] = (
    ("AuroRA r=4", "front"),
    ("full", "all"),
    ("warp, every input", "front"),
    ("warp, told", "front"),
    ("LoRA r=8", "front"),
    ("ReLU 7", "front"),
    ("biases", "all"),
)
FIRST: tuple[Who, ...] = (("AuroRA r=4", "first"), ("LoRA r=5", "first"), ("ReLU 5", "first"))


def plan() -> Iterator[Run]:
    """All runs."""
    for world in ("motors", "differential"):
        for examples in EXAMPLES:
            for method, place in (*FRONT, *FIRST):
                yield Run("swap", world, method, place, examples)

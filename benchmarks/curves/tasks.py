"""The three tasks by name."""

from __future__ import annotations

from benchmarks.curves import ratings, swap, tones
from benchmarks.curves.chain import Task

MAKERS = {"swap": swap.task, "ratings": ratings.task, "tones": tones.task}


def find(task: str, world: str) -> Task:
    """The task in one of its worlds."""
    return MAKERS[task](world)

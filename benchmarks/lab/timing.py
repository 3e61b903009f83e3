"""Times of contenders that take turns."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.lab.needs import progress

Steps = Mapping[str, Callable[[], object]]


def seconds(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def second_of_two(step: Callable[[], object]) -> float:
    """Seconds of a step that follows itself, as in use: its code and weights are in the caches."""
    step()
    return seconds(step)


def keep_memory() -> bool:
    """From now on this process keeps the memory that it frees. Whether the C library can.

    glibc gives large pieces back to the system, or not, by what was freed before. To ask for them
    anew took up to half of a training step, so that a ratio says as much about the allocator.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Windows
        return False
    at_most_mapped, trim_from = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(set_option(at_most_mapped, 0) and set_option(trim_from, 2**31 - 1))


def interleave(
    steps: Steps, rounds: int, warmup: int = 2, label: str = ""
) -> dict[str, list[float]]:
    """Seconds of a step, by contender and round.

    Each round runs every contender, so that whatever else the machine does falls on all, in an
    order drawn anew, so that none always follows the same one; of two steps the second counts.
    Warm-up rounds are discarded. label: of a progress bar.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    draw = random.Random(0)
    for turn in progress(range(warmup + rounds), label, unit="round"):
        for name in draw.sample(list(steps), len(steps)):
            one = second_of_two(steps[name])
            if turn >= warmup:
                taken[name].append(one)
    return taken


def median_ratio(taken: Mapping[str, Sequence[float]], name: str, against: str) -> float:
    """The median over rounds of one contender's time divided by another's."""
    return statistics.median(a / b for a, b in zip(taken[name], taken[against], strict=True))


def quartiles(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of two paired series, and their quartiles."""
    shares = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def ratios(steps: Steps, rounds: int, against: str) -> dict[str, str]:
    """Median ratio to `against`, with the quartiles over rounds, of every step."""
    taken = interleave(steps, rounds)
    return {name: quartiles(taken[name], taken[against]) for name in taken}

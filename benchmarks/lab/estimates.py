"""Means with their standard errors, from runs that were judged text by text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lab.records import Record

Records = Mapping[tuple[str, int], Record]  # of a method: (corpus, seed) -> record


class Estimate(NamedTuple):
    """A mean and its standard error, NaN where one run cannot tell."""

    mean: float
    error: float

    def __str__(self) -> str:
        known = "" if math.isnan(self.error) else f" ± {100 * self.error:.2f}"
        return f"{100 * self.mean:.2f}{known}"

    @property
    def signed(self) -> str:
        """With its sign, for differences."""
        return ("+" if self.mean >= 0 else "") + str(self)


def accuracy(records: Records, against: Records | None = None) -> Estimate:
    """Mean over the corpora, or the mean difference on the runs that both have.

    The error counts both the texts, whose hits are paired, and the seeds, if there are several.
    """
    found = []
    for hits in _gaps(records, against, _hits):  # (seeds, texts)
        texts = hits.mean(0).var(ddof=1) / hits.shape[1]
        found.append((hits.mean(), texts + _variance_of_mean(hits.mean(1), alone=0.0)))
    return _over_corpora(found)


def pearson(records: Records, against: Records | None = None) -> Estimate:
    """Likewise of Pearson's correlation; its error counts the seeds only."""
    found = []
    for gaps in _gaps(records, against, lambda record: np.float64(record["pearson"])):  # (seeds,)
        found.append((gaps.mean(), _variance_of_mean(gaps, alone=math.nan)))
    return _over_corpora(found)


def of(corpus: str, records: Records) -> Records:
    """The records of one corpus."""
    return {key: record for key, record in records.items() if key[0] == corpus}


def _gaps(records: Records, against: Records | None, value: Callable[[Record], Any]) -> list[Any]:
    """Corpus by corpus, values by seed, minus those of the other method where it has that seed."""
    found: dict[str, list[Any]] = {}
    for key, record in records.items():
        if against is None:
            found.setdefault(key[0], []).append(value(record))
        elif key in against:
            found.setdefault(key[0], []).append(value(record) - value(against[key]))
    return [np.array(gaps) for gaps in found.values()]


def _hits(record: Record) -> Any:
    return np.frombuffer(record["hits"].encode(), dtype=np.uint8).astype(float) - ord("0")


def _variance_of_mean(values: Any, alone: float) -> float:
    """Of the mean of several values; `alone` if there is only one."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else alone


def _over_corpora(found: Sequence[tuple[float, float]]) -> Estimate:
    """The mean of independent means with these variances."""
    if not found:
        return Estimate(math.nan, math.nan)
    means, variances = zip(*found, strict=True)
    return Estimate(float(np.mean(means)), math.sqrt(sum(variances)) / len(variances))

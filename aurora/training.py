"""The optimizer's parameters, and running a model aside from its training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from aurora import core


def parameter_groups(model: nn.Module, lr: float, factor: float = 10.0) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: H and the spline weights at `factor * lr`, all else that trains at `lr`.

    model: one with adapters. lr: the learning rate of A, B and whatever `train=` kept, as one would choose it for LoRA.
    factor: 10 is the recommended setting, with `spline="per-channel"`; 1 gives what `aurora.parameters` gives. The few
    numbers of the nonlinear layer start small beside what they have to become: at the rate of A and B they hardly move
    within a short fine-tuning (docs/results/learning.md). Together the groups hold every parameter of
    `aurora.parameters(model)` once.

    Raises ValueError if the model has no adapters, or if `lr` or `factor` is not finite and above 0.
    """
    for name, value in (("lr", lr), ("factor", factor)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    nonlinear = dict.fromkeys(p for layer in core.layers(model).values() for p in layer.anl.parameters())
    others = [p for p in core.parameters(model) if p not in nonlinear]
    return [{"params": others, "lr": lr}, {"params": list(nonlinear), "lr": factor * lr}]


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output on a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


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

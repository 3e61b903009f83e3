"""A small model with an identity layer at either end, and a world that it does not fit."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Task(NamedTuple):
    """A pretrained model and a changed world.

    base: the model, to be copied. pool, test: (x (n, d_in), y (n, d_out)) to draw examples from,
    and to be judged by. read, write: (m, d) each; the change is `z + sum_j curve_j(read_j z)
    write_j` of what goes in at the front, or comes out at the back.
    """

    base: nn.Sequential
    pool: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    read: Tensor
    write: Tensor


def chain(*widths: int) -> nn.Sequential:
    """front, first, tanh, middle, tanh, last, back: the ends are identity layers."""
    n_in, *hidden, n_out = widths
    first, middle = nn.Linear(n_in, hidden[0]), nn.Linear(hidden[0], hidden[1])
    found: dict[str, nn.Module] = {"front": identity(n_in), "first": first, "bend": nn.Tanh()}
    found |= {"middle": middle, "bend again": nn.Tanh(), "last": nn.Linear(hidden[1], n_out)}
    return nn.Sequential(OrderedDict(found | {"back": identity(n_out)}))


@torch.no_grad()
def identity(width: int) -> nn.Linear:
    """A linear layer that computes x, for adapters at a model's ends."""
    layer = nn.Linear(width, width).requires_grad_(False)
    layer.weight.copy_(torch.eye(width))
    assert layer.bias is not None
    layer.bias.zero_()
    return layer


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float = 3e-3) -> None:
    """Train from scratch with Adam, 256 examples a step, cosine schedule with warm-up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, rate)

    def pace(step: int) -> float:
        return min(1.0, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,), generator=order)
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

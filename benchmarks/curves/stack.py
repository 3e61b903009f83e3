"""Many small models of one shape, trained side by side as one model with a leading dimension.

A model of a few thousand numbers spends its time on the overhead of a step; forty at once take
hardly longer than two. Every model has its own data, rate, weight decay and weights of penalties.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Tensors = dict[str, Tensor]
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's


class Objective(nn.Module):
    """The mean squared error of a model, and what it is penalised for.

    A subclass says what that is; here it is nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def penalties(self) -> list[Tensor]:
        """Scalars, one for each column of the weights that `forward` gets."""
        return []

    def forward(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """x (N, d_in), y (N, d_out), weights (penalties,) -> ()."""
        loss = (self.model(x) - y).square().mean()
        for weight, penalty in zip(weights, self.penalties(), strict=False):
            loss = loss + weight * penalty
        return loss


@dataclass(frozen=True)
class Pace:
    """How training goes.

    Args:
        steps: of Adam with decoupled weight decay, warm-up over 5% and then down to 0 in a line.
        size: examples a step.
        rates: (K,) learning rate of each model.
        decay: (K,) weight decay of each model.
        weights: (K, penalties) of each model.
        factors: regex of parameter names -> factor on the rate.
    """

    steps: int
    size: int
    rates: Tensor
    decay: Tensor
    weights: Tensor
    factors: Mapping[str, float]


class Stack:
    """K objectives of one shape. `train` them, then look at their `errors`."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.frame = objectives[0]
        every = [dict(objective.named_parameters()) for objective in objectives]
        self.trained: Tensors = {}
        self.kept: Tensors = {}
        for name, p in every[0].items():
            if p.requires_grad:
                self.trained[name] = torch.stack([ps[name].detach() for ps in every])
            else:
                self.kept[name] = p.detach()  # shared by all

    def train(self, x: Tensor, y: Tensor, pace: Pace) -> Stack:
        """Learn x (K, n, d_in) -> y (K, n, d_out). Returns itself."""
        moving = {name: p.clone().requires_grad_() for name, p in self.trained.items()}
        adam = _Adam(moving, pace)
        order = torch.Generator().manual_seed(0)

        def loss(trained: Tensors, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
            return functional_call(self.frame, self.kept | trained, (x, y, weights))

        for step in range(pace.steps):
            rows = _rows(x.shape[1], pace.size, order)
            losses = vmap(loss)(moving, x[:, rows], y[:, rows], pace.weights)  # (K,)
            adam.step(step, torch.autograd.grad(losses.sum(), list(moving.values())))
        self.trained = {name: p.detach() for name, p in moving.items()}
        return self

    def pick(self, models: Sequence[int]) -> Stack:
        """Of these models, as they are now, a stack. Returns itself."""
        self.trained = {name: p[list(models)] for name, p in self.trained.items()}
        return self

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of every model (K,), on data of its own (K, n, d) or on all of (n, d).

        What became no number counts as infinity, so that it is never chosen.
        """
        model = self.frame.model

        def error(trained: Tensors, x: Tensor, y: Tensor) -> Tensor:
            whole = self.kept | trained
            inner = {name.removeprefix("model."): p for name, p in whole.items()}
            return (functional_call(model, inner, (x,)) - y).square().mean()

        own = 0 if x.dim() == 3 else None
        found: Tensor = vmap(error, in_dims=(0, own, own))(self.trained, x, y)
        return found.nan_to_num(torch.inf, torch.inf)


def _rows(count: int, size: int, order: torch.Generator) -> Tensor | slice:
    return slice(None) if count <= size else torch.randint(count, (size,), generator=order)


class _Adam:
    """AdamW whose rate and decay differ from model to model."""

    def __init__(self, moving: Tensors, pace: Pace) -> None:
        self.moving, self.pace = moving, pace
        self.first = {name: torch.zeros_like(p) for name, p in moving.items()}
        self.second = {name: torch.zeros_like(p) for name, p in moving.items()}
        self.factor = {name: _factor(name, pace.factors) for name in moving}

    @torch.no_grad()
    def step(self, step: int, gradients: Sequence[Tensor]) -> None:
        """Move every parameter along its gradient."""
        warm = max(1, self.pace.steps // 20)
        share = min((step + 1) / warm, (self.pace.steps - step) / (self.pace.steps - warm + 1))
        for (name, p), gradient in zip(self.moving.items(), gradients, strict=True):
            first, second = self.first[name], self.second[name]
            first.lerp_(gradient, 1 - BETA_1)
            second.lerp_(gradient.square(), 1 - BETA_2)
            size = (second / (1 - BETA_2 ** (step + 1))).sqrt() + EPSILON
            move = first / (1 - BETA_1 ** (step + 1)) / size
            rate = _beside(self.pace.rates * share * self.factor[name], p)
            p.sub_(rate * (move + _beside(self.pace.decay, p) * p))


def _factor(name: str, factors: Mapping[str, float]) -> float:
    return next((f for pattern, f in factors.items() if re.search(pattern, name)), 1.0)


def _beside(value: Tensor, p: Tensor) -> Tensor:
    """value (K,) in a shape that goes with p (K, ...)."""
    return value.view(-1, *[1] * (p.dim() - 1))

"""aurora.recipes: the start from the gradient and the penalty on roughness."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import aurora
from aurora import core

X = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randn(400, 3, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two adapted layers and a head; `wrap` runs the body, for instance under a checkpoint."""

    def __init__(self, wrap: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 3)
        self.wrap = wrap or (lambda body, x: body(x))

    def body(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.one(x)).clone()
        hidden += 0.5  # what follows may change an output in place
        return torch.tanh(self.two(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wrap(self.body, x))


def build(wrap: Callable[..., Tensor] | None = None, rank: int = 2, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(wrap)
    aurora.inject(model, "one|two", rank, train="^head", **options)
    return model


def loss(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return (model(x) - y).square().sum(-1).mean()


def start(model: nn.Module, parts: Iterable[slice] = (slice(None),), **options: Any) -> nn.Module:
    with aurora.start_from_gradient(model, **options):
        for part in parts:
            loss(model, X[part], Y[part]).backward()
    return model


def starts(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.A.detach().clone() for name, layer in core.layers(model).items()}


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 1e-4) -> None:
    for name, A in starts(one).items():
        torch.testing.assert_close(starts(other)[name].to(A), A, rtol=tolerance, atol=tolerance)


def by_hand(model: Net, ridge: float, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    """METHOD's formula, with C_l^(-1/2) and a singular value decomposition, in float64."""
    model, seen, found = copy.deepcopy(model).double(), {}, {}
    layers = core.layers(model)

    def keep(layer: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        seen[layer] = args[0].detach(), out

    hooks = [layer.register_forward_hook(keep) for layer in layers.values()]
    loss(model, x.double(), y.double()).backward()
    [hook.remove() for hook in hooks]
    for name, layer in layers.items():
        inputs, out = seen[layer]
        C = inputs.t() @ inputs / len(inputs)
        mean = C.diagonal().mean()
        values, vectors = torch.linalg.eigh(C + ridge * mean * torch.eye(len(C)))
        root = vectors @ torch.diag(values**-0.5) @ vectors.t()
        _, _, Vh = torch.linalg.svd(out.grad.t() @ inputs @ root)
        A = Vh[: layer.config.rank] @ root
        A *= ((mean / 3) / ((A @ C) * A).sum(1, keepdim=True)).sqrt()
        found[name] = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    return found


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_it_is_the_formula(rank: int, ridge: float) -> None:
    model = build(rank=rank)
    expected = by_hand(model, ridge)
    start(model, ridge=ridge)
    for name, A in starts(model).items():
        torch.testing.assert_close(A, expected[name].float(), rtol=1e-3, atol=1e-4)


def test_outputs_gradients_and_hooks_are_as_before() -> None:
    model = build()
    loss(model).backward()
    before = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    kept = {name: None if g is None else g.clone() for name, (_, g) in before.items()}
    out = model(X)
    start(model)
    assert torch.equal(model(X), out)
    for name, p in model.named_parameters():
        assert p.grad is before[name][1]
        assert p.grad is None or torch.equal(p.grad, kept[name])
        assert torch.equal(p, before[name][0]) == (not name.endswith(".A")), name
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"chunk": 1}])
def test_an_error_in_the_loop_leaves_everything(options: dict[str, Any]) -> None:
    model = build()
    before = starts(model)
    with pytest.raises(KeyError), aurora.start_from_gradient(model, **options) as parts:
        for _ in parts:
            loss(model).backward()
            raise KeyError
    assert all(torch.equal(A, before[name]) for name, A in starts(model).items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())

"""aurora.training: what the optimizer gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import aurora


def build(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(6, 5), "two": nn.Linear(5, 4), "head": nn.Linear(4, 2)})
    model["again"] = model["one"]
    aurora.inject(model, "one|two", 2, train="^head", **options)
    return model


@pytest.mark.parametrize("options", [{}, {"spline": "per-channel"}, {"fixed": False}, {"learnable": False}])
def test_groups_hold_every_parameter_once_at_its_rate(options: dict[str, Any]) -> None:
    model = build(**options)
    groups = aurora.parameter_groups(model, 1e-3, factor=5.0)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert set(rates) == set(aurora.parameters(model))
    for name, p in aurora.core.trained_parameters(model).items():
        assert rates[p] == (5e-3 if ".anl." in name else 1e-3), name


def test_an_optimizer_takes_them_and_moves_each_at_its_pace() -> None:
    model = build()
    optimizer = torch.optim.SGD(aurora.parameter_groups(model, 1e-2))
    before = {name: p.clone() for name, p in aurora.core.trained_parameters(model).items()}
    for p in aurora.parameters(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in aurora.core.trained_parameters(model).items():
        moved = 0.1 if ".anl." in name else 0.01
        torch.testing.assert_close(before[name] - p, torch.full_like(p, moved), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": math.nan}, {"lr": 1e-3, "factor": -1.0}, {"lr": math.inf}])
def test_bad_rates_are_refused_by_name(bad: dict[str, float]) -> None:
    name, value = list(bad.items())[-1]
    with pytest.raises(ValueError, match=f"{name} must be finite and above 0, got {value}"):
        aurora.parameter_groups(build(), **bad)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        aurora.parameter_groups(nn.Sequential(nn.Linear(2, 2)), 1e-3)

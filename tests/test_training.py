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


@pytest.mark.parametrize(
    "options", [{}, {"spline": "per-channel"}, {"fixed": False}, {"learnable": False}]
)
def test_groups_hold_every_parameter_once_at_its_rate(options: dict[str, Any]) -> None:
    model = build(**options)
    groups = aurora.parameter_groups(model, 1e-3, factor=5.0)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert set(rates) == set(aurora.parameters(model))
    for name, p in aurora.core.ModelView.adapted(model).adapter().items():
        assert rates[p] == (5e-3 if ".anl." in name else 1e-3), name


def test_an_optimizer_takes_them_and_moves_each_at_its_pace() -> None:
    model = build()
    optimizer = torch.optim.SGD(aurora.parameter_groups(model, 1e-2))
    before = {name: p.clone() for name, p in aurora.core.ModelView.adapted(model).adapter().items()}
    for p in aurora.parameters(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in aurora.core.ModelView.adapted(model).adapter().items():
        moved = 0.1 if ".anl." in name else 0.01
        torch.testing.assert_close(before[name] - p, torch.full_like(p, moved), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"lr": math.nan}, {"lr": 1e-3, "factor": -1.0}, {"lr": math.inf}]
)
def test_bad_rates_are_refused_by_name(bad: dict[str, float]) -> None:
    name, value = list(bad.items())[-1]
    with pytest.raises(ValueError, match=f"{name} must be finite and above 0, got {value}"):
        aurora.parameter_groups(build(), **bad)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        aurora.parameter_groups(nn.Sequential(nn.Linear(2, 2)), 1e-3)


# --- the start as LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("grid_range", [(-1.0, 1.0), (-3.0, 0.5)])
def test_it_starts_as_the_identity_on_the_whole_grid(
    order: int, grid_range: tuple[float, float]
) -> None:
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64))
    options: dict[str, Any] = {
        "spline": "per-channel",
        "spline_order": order,
        "grid_range": grid_range,
    }
    aurora.inject(model, "0", 2, **options)
    aurora.start_as_identity(model)
    z = torch.linspace(*grid_range, 101, dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(model[0].anl.columns(z), z, atol=1e-12, rtol=0)
    beyond = model[0].anl.columns(z + 20)
    assert beyond.abs().max() == 0  # and nothing far outside


def test_it_then_computes_and_learns_as_lora_and_the_nonlinearity_with_it() -> None:
    model = build(spline="per-channel")
    x, layer = torch.randn(50, 6), model["one"]
    layer.A.data.mul_(0.5 / (x @ layer.A.t()).abs().max())
    before = layer(x)
    aurora.start_as_identity(model)
    assert torch.equal(layer(x), before)
    nn.init.normal_(layer.B)
    torch.testing.assert_close(
        layer(x), layer.base(x) + layer.scaling * x @ layer.A.t() @ layer.B.t()
    )
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.adapter_parameters().values())


@pytest.mark.parametrize("options", [{}, {"spline": "per-channel", "learnable": False}])
def test_a_layer_without_splines_per_channel_is_refused_and_nothing_changes(
    options: dict[str, Any],
) -> None:
    model = build(**options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r'(one|two) has no spline per channel: inject with spline="per-channel"'
    ):
        aurora.start_as_identity(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_trained_layer_is_refused_before_any_other_is_changed() -> None:
    model = build(spline="per-channel")
    *others, last = aurora.core.layers(model).values()
    nn.init.ones_(last.B)
    before = others[0].anl.spline_weight.clone()
    with pytest.raises(ValueError, match="has been trained already"):
        aurora.start_as_identity(model)
    assert torch.equal(others[0].anl.spline_weight, before)


def test_it_works_without_f_on_meta_and_in_half_precision() -> None:
    aurora.start_as_identity(build(spline="per-channel", fixed=False))
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 3))
    aurora.inject(meta, "0", 2, spline="per-channel")
    aurora.start_as_identity(meta)
    half = build(spline="per-channel").bfloat16()
    aurora.start_as_identity(half)
    z = torch.linspace(-1, 1, 9).expand(2, -1)
    torch.testing.assert_close(half["one"].anl.columns(z), z, atol=0.02, rtol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
def test_it_is_the_identity_for_every_activation(activation: str) -> None:
    model = build(spline="per-channel", activation=activation)
    aurora.start_as_identity(model)
    z = torch.linspace(-1, 1, 9).expand(2, -1)
    torch.testing.assert_close(model["one"].anl.columns(z), z, atol=1e-6, rtol=0)

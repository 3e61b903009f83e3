"""aurora.plots: what is drawn is what was learned, over the data that pass."""

from __future__ import annotations

import sys

import matplotlib
import matplotlib.pyplot
import pytest
import torch
from torch import nn

import aurora
from aurora import plots

matplotlib.use("Agg")
PER_CHANNEL = {"spline": "per-channel", "grid_range": (-4.0, 4.0)}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    aurora.inject(model, r"^(0|2)$", **{"rank": 2, **options})
    for layer in aurora.core.layers(model).values():
        nn.init.normal_(layer.B)
    return model


def panels(figure):
    """The axes with curves: their titles, and their lines' points (P, 2)."""
    found = {}
    for axes in figure.axes:
        lines = [line for line in axes.lines if str(line.get_label()).startswith("channel")]
        if lines:
            points = [torch.as_tensor(line.get_xydata(), dtype=torch.float64) for line in lines]
            found[axes.get_title().split()[0]] = (axes.get_title(), points)
    return found


@pytest.mark.parametrize("options", [{}, PER_CHANNEL, {"mode": "static"}, {"rank": 5}])
def test_each_channel_is_drawn_as_sigma_computes_it(options):
    model, x = net(**options), torch.randn(200, 6)
    drawn = panels(plots.plot(model, [x]))
    assert set(drawn) == {"0", "2"}
    layer = model[0]
    r = layer.config.rank
    rows = layer.A.t() if layer.config.mode == "static" else x @ layer.A.t()
    mean = rows.detach().mean(0)
    for j, points in enumerate(drawn["0"][1]):
        z = mean.repeat(len(points), 1)  # every other channel at its mean
        z[:, j] = points[:, 0].float()
        expected = layer.anl(z)[:, j].detach().double()
        torch.testing.assert_close(points[:, 1], expected, atol=1e-4, rtol=1e-4)
        seen = rows[:, j].detach().double().quantile(torch.tensor([0.005, 0.995]).double())
        torch.testing.assert_close(points[[0, -1], 0], seen, atol=1e-4, rtol=1e-4)
    assert len(drawn["0"][1]) == r


def test_without_data_the_grid_is_shown_and_no_density():
    model = net(**PER_CHANNEL)
    figure = plots.plot(model)
    (title, points), _ = panels(figure).values()
    assert title == "0"
    assert points[0][0, 0] < -4.0 < 4.0 < points[0][-1, 0]
    assert not any(axes.patches for axes in figure.axes)
    assert any(axes.patches for axes in plots.plot(model, [torch.randn(50, 6)]).axes)


def test_the_bend_is_the_error_of_the_best_straight_merge():
    model, x = net(), torch.randn(300, 6)
    report = aurora.merge(model, "calibrated", [x], held_out=[x])
    errors = {row.name: row.errors["calibrated"] for row in report.layers}
    report.unmerge()
    for name, layer in aurora.core.layers(model).items():
        rows = x if name == "0" else model[:2](x)
        z = nn.functional.linear(rows, layer.A).detach().double()
        assert plots.bend(layer, z) == pytest.approx(errors[name], rel=1e-3)
        assert errors[name] > 0.01


def test_a_straight_start_is_not_bent():
    model = net(**PER_CHANNEL, init="identity")
    drawn = panels(plots.plot(model, [0.1 * torch.randn(200, 6)]))
    assert [title for title, _ in drawn.values()] == ["0  (0% bent)", "2  (0% bent)"]


def test_padding_does_not_count():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x, attention_mask):
            return self.fc(x)

    torch.manual_seed(0)
    model = Reader()
    aurora.inject(model, "fc", rank=1)
    x, mask = torch.randn(4, 50, 6), torch.ones(4, 50)
    padded = torch.cat([x, torch.full((4, 30, 6), 1e3)], 1)
    longer = torch.cat([mask, torch.zeros(4, 30)], 1)
    (_, one), (_, other) = (
        panels(plots.plot(model, [{"x": a, "attention_mask": m}]))["fc"]
        for a, m in ((x, mask), (padded, longer))
    )
    torch.testing.assert_close(one[0], other[0])


def test_drawing_leaves_the_model_alone():
    model = net(dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plots.plot(model, [torch.randn(20, 6, generator=torch.Generator().manual_seed(1))])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_which_layers_are_drawn():
    model = net()
    assert list(panels(plots.plot(model, match="^2$"))) == ["2"]
    with pytest.raises(ValueError, match="matches no adapted layer"):
        plots.plot(model, match="nothing")
    with pytest.raises(ValueError, match="not a regular expression"):
        plots.plot(model, match="(")
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        plots.plot(nn.Sequential(nn.Linear(2, 2)))


def test_odd_data_are_no_danger():
    model = net()
    x = torch.randn(30, 6)
    x[3] = float("nan")
    for batch in (x, torch.zeros(5, 6), torch.zeros(1, 6), torch.zeros(0, 6)):
        assert set(panels(plots.plot(model, [batch]))) == {"0", "2"}


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "aurora-adapters\[plots\]"'):
        plots.plot(net())

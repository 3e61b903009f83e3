"""The approximation theory of docs/theory.md, section 6, by experiment: what rank r can reach and what it cannot."""

import itertools
import math

import pytest
import torch
from torch import nn

from aurora import AuroraLinear


def white(n, d, seed=0):
    """Inputs (n, d) whose second moments are the identity exactly: means over them are isotropic expectations."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(x)[0] * math.sqrt(n)


def best_linear(x, y, rank):
    """The least mean squared error of any linear map of the given rank, hence of LoRA; x must be white."""
    explained = torch.linalg.svdvals(y.t() @ x / len(x))[:rank].square().sum()
    return (y.square().sum(1).mean() - explained).item()


def adapter(d_in, d_out, rank, seed=0, **options):
    torch.manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
    nn.init.zeros_(base.weight).requires_grad_(False)
    layer = AuroraLinear(base, rank, **options)
    nn.init.normal_(layer.B, std=0.3)
    return layer


def train(layer, x, y, steps=400, rate=0.03):
    """The least mean squared error met on the way."""
    parameters = list(layer.adapter_parameters().values())
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least = math.inf
    for _ in range(steps):
        error = (layer(x) - y).square().sum(1).mean()
        least = min(least, error.item())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return least


OPTIONS = [{}, {"spline": "per-channel"}, {"mode": "static"}, {"learnable": False}]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_training_beats_eckart_young_on_a_linear_target(rank, options):
    x = white(256, 8)
    torch.manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))
    singular = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0, 0.8, 0.6, 0.4], dtype=torch.float64)
    y = x @ (left * singular @ right).t()
    floor = singular[rank:].square().sum().item()
    assert best_linear(x, y, rank) == pytest.approx(floor)
    reached = min(train(adapter(8, 8, rank, seed, **options), x, y) for seed in range(2))
    # Not below the floor, and near enough to it for the floor to be what stops the training.
    assert floor * (1 - 1e-9) <= reached <= floor * 1.6


def test_the_counterexample_to_proposition_2_1():
    """M = identity of the plane, rank 1: whatever the parameters, no error below 1, which rank 1 LoRA attains."""
    x = white(128, 2)
    assert best_linear(x, x, 1) == pytest.approx(1.0)
    for size in (0.1, 1.0, 10.0):
        for seed in range(20):
            layer = adapter(2, 2, 1, seed)
            for p in layer.adapter_parameters().values():
                p.data.mul_(size)
            # Even with the best B for these features, by least squares.
            features = layer.anl(x @ layer.A.t()).detach()
            error = (
                (features @ torch.linalg.lstsq(features, x).solution - x)
                .square()
                .sum(1)
                .mean()
                .item()
            )
            assert error >= 1 - 1e-12


def test_lora_is_a_limit():
    """A scaled by eps and B by 1 / eps: the distance to B H A x falls as eps^2."""
    x, layer = white(64, 6), adapter(6, 5, 2, learnable=False)
    A, B = layer.A.detach().clone(), layer.B.detach().clone()
    target = x @ (layer.scaling * B @ layer.anl.H.detach() @ A).t()
    errors = []
    for eps in (0.1, 0.05, 0.025, 0.0125):
        layer.A.data, layer.B.data = A * eps, B / eps
        errors.append((layer(x) - target).norm().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"spline": "per-channel"}])
def test_a_nonlinear_target_goes_below_the_best_of_lora(options):
    x = white(256, 8, seed=1)
    torch.manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64))[0] for _ in range(2))
    y = torch.sin(2 * x @ V) @ U.t()
    reached = min(train(adapter(8, 8, 2, seed, **options), x, y, steps=600) for seed in range(3))
    assert reached < 0.5 * best_linear(x, y, 2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_falls_with_the_grid_as_splines_do(order):
    """f = U g(V x): with A = V, B = U and the best splines, halving the cells divides the error by 2^(k + 1)."""
    x = white(4000, 6, seed=2)
    torch.manual_seed(4)
    U, V = (torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0] for _ in range(2))
    V = V / (x @ V).abs().max()  # the splines cover [-1, 1]
    y = torch.sin(5 * x @ V) @ U.t()
    errors = []
    for grid_size in (8, 16, 32):
        layer = adapter(
            6,
            6,
            2,
            spline="per-channel",
            fixed=False,
            grid_size=grid_size,
            spline_order=order,
            alpha=2.0,
        )
        layer.A.data, layer.B.data = V.t().contiguous(), U
        layer.anl.spline_weight.data.zero_()
        # The output is linear in the weights: their Jacobian at any point is the matrix of the least squares problem.
        matrix = torch.func.jacfwd(
            lambda w, layer=layer: torch.func.functional_call(layer, {"anl.spline_weight": w}, x)
        )(layer.anl.spline_weight.detach()).reshape(y.numel(), -1)
        weights = torch.linalg.lstsq(matrix, y.reshape(-1, 1), driver="gelsd").solution
        layer.anl.spline_weight.data = weights.view_as(layer.anl.spline_weight)
        errors.append((layer(x) - y).square().mean().sqrt().item())
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert rates[-1] > order + 1 - 0.35


def test_the_static_merge_is_another_function():
    """It is linear, while the trained one is neither linear nor, as soon as the splines have weight at 0, zero at 0."""
    layer, x = adapter(6, 6, 2), white(16, 6)
    merged = layer.static_update()
    assert layer(torch.zeros(6, dtype=torch.float64)).norm() > 1e-3
    assert not torch.allclose(layer(2 * x), 2 * layer(x), rtol=0.05)
    assert not torch.allclose(layer(x), x @ merged.t(), rtol=0.05)

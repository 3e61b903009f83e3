"""The nonlinear layer against an independent reference, and its derivatives of every kind."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import bases, knots, sigma
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap

from aurora import ANL, _kernels, core

VARIANTS = {
    "default": {},
    "per-channel": {"spline": "per-channel"},
    "spline only": {"fixed": False},
    "per-channel only": {"fixed": False, "spline": "per-channel"},
    "without spline": {"learnable": False},
    "sigmoid": {"activation": "sigmoid"},
    "leaky": {"activation": "leaky_relu", "spline": "per-channel"},
    "fine grid": {"grid_size": 61},  # where summed splines are looked up one by one
}
GRIDS = [
    (1, (-1.0, 1.0)),
    (5, (-1.0, 1.0)),
    (7, (-0.3, 2.9)),
    (32, (-1.0, 1.0)),
    (13, (4.0, 11.0)),
    (32, (-1e-3, 5e-3)),
]
ORDERS = [1, 2, 3, 4]
WAYS = ["all bumps", "near bumps", "blocks"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Few points are computed from all bumps; here those that are not zero, and small blocks."""
    if request.param != "all bumps":
        monkeypatch.setattr(_kernels, "FEW", 0)
    if request.param == "blocks":
        monkeypatch.setattr(_kernels, "BLOCK", 24)
    return request.param


def make(rank=3, dtype=torch.float64, seed=0, **options) -> ANL:
    torch.manual_seed(seed)
    return ANL(rank, dtype=dtype, **options)


def plain(anl: ANL, z: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The definition of the layer without the hand-written derivatives, z (N, r)."""
    return core.sigma(z.t(), anl.H, anl.spline_weight, anl.grid, anl.config, scale).t()


def reference(anl: ANL, z: torch.Tensor) -> np.ndarray:
    c = anl.config
    H, w = (None if p is None else p.detach().double().numpy() for p in (anl.H, anl.spline_weight))
    options = {"grid_size": c.grid_size, "order": c.spline_order, "grid_range": c.grid_range}
    return sigma(z.double().numpy(), H, w, **options, spline=c.spline, activation=c.activation)


def points(config: core.AuroraConfig, dtype: torch.dtype) -> torch.Tensor:
    """On every knot, between, around and far outside the support, as rows of three."""
    grid = knots(config.grid_size, config.spline_order, *config.grid_range)
    width = grid[-1] - grid[0]
    inside = np.random.default_rng(0).uniform(grid[0] - 0.2 * width, grid[-1] + 0.2 * width, 90)
    outside = [grid[0] - width, grid[-1] + width, 1e30, -1e30, 0.0, -0.0, 1e-30, 37.0]
    flat = np.concatenate([grid, inside, outside])
    return torch.tensor(flat[: len(flat) // 3 * 3], dtype=dtype).reshape(-1, 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("grid_size", "grid_range"), GRIDS)
def test_agrees_with_cox_de_boor(way, variant, order, grid_size, grid_range):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        options = {
            "grid_size": grid_size,
            "grid_range": grid_range,
            "spline_order": order,
            **VARIANTS[variant],
        }
        anl = make(dtype=dtype, **options)
        z = points(anl.config, dtype)
        expected = torch.from_numpy(reference(anl, z))
        # Relative where an unbounded activation at 1e30 leaves no absolute digits after the point.
        bound = tolerance * (1 + expected.abs())
        assert ((anl(z).double() - expected).abs() <= bound).all()


def test_the_reference_is_a_spline_basis():
    t = np.linspace(-0.999, 0.999, 50)
    for order in ORDERS:
        np.testing.assert_allclose(bases(t, 6, order, -1, 1).sum(-1), 1, atol=1e-14)
    assert bases(np.array(0.0), 4, 1, -1, 1).tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("spline", ["summed", "per-channel"])
@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("fixed", [True, False])
def test_fewer_calls_give_what_the_definition_gives(spline, order, fixed):
    anl = make(spline=spline, spline_order=order, fixed=fixed)
    z = points(anl.config, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(anl(z, 0.7), plain(anl, z, 0.7), rtol=0, atol=1e-13)


@given(st.floats(-4, 4), st.integers(1, 8), st.integers(1, 12))
def test_every_order_is_a_partition_of_unity_on_the_grid(t, order, grid_size):
    anl = make(rank=1, fixed=False, spline="per-channel", spline_order=order, grid_size=grid_size)
    with torch.no_grad():
        anl.spline_weight.fill_(1.0)
    total = anl(torch.tensor([[t]], dtype=torch.float64)).item()
    assert 0 <= total <= 1 + 1e-12
    if -1 <= t <= 1:
        assert abs(total - 1) < 1e-11
    if abs(t) >= 1 + order * 2 / grid_size:
        assert total < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity_stay_in_their_row(way, variant):
    for bad in (float("nan"), float("inf")):
        anl = make(dtype=torch.float32, **VARIANTS[variant])
        z = torch.randn(4, 3)
        expected = anl(z)
        z[1, 0] = bad
        z.requires_grad_()
        out = anl(z)
        keep = [0, 2, 3]
        assert torch.equal(out[keep], expected[keep])
        if bad != bad:
            assert out[1].isnan().any()
        out.sum().backward()
        assert z.grad[keep].isfinite().all()


ON_KNOTS = {"knots": True, "between": False}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", ON_KNOTS)
def test_derivatives(way, variant, order, where):
    options = {"spline_order": order, "grid_size": 4} | VARIANTS[variant]
    if variant == "fine grid":  # one as fine for two channels: a check takes time by the weight
        options |= {"rank": 2, "grid_size": 25}
    anl = make(**options)
    assert _kernels.one_by_one(anl.config) or variant != "fine grid"
    z = torch.tensor(
        [[0.1, -0.7, 1.3], [-1.9, 0.31, 2.9], [0.77, -0.13, 0.59]], dtype=torch.float64
    )
    if ON_KNOTS[where]:
        z = torch.tensor(
            [[0.5, -1.0, 1.5], [-0.5, 1.0, 0.25], [-0.25, 0.75, -2.0]], dtype=torch.float64
        )
        if anl.config.activation != "leaky_relu":
            z[0, 0] = 0.0
    z = z[:, : anl.config.rank].clone().requires_grad_()
    names, weights = zip(*anl.named_parameters(), strict=True)

    def f(z, *weights):
        return functional_call(anl, dict(zip(names, weights, strict=True)), (z, 0.7))

    # The spline has order - 1 continuous derivatives; on a knot the next one does not exist.
    smooth = order - 1 if ON_KNOTS[where] and anl.config.learnable else 9
    if smooth >= 1:
        assert gradcheck(f, (z, *weights), check_forward_ad=True, check_batched_grad=True)
    if smooth >= 2:
        assert gradgradcheck(f, (z, *weights), fast_mode=True)


@pytest.mark.parametrize("spline", ["summed", "per-channel"])
def test_order_1_has_the_mean_slope_at_its_corners(way, spline):
    anl = make(rank=1, fixed=False, spline_order=1, grid_size=4, spline=spline)
    with torch.no_grad():
        anl.spline_weight.copy_(torch.tensor([[1.0, 2.0, 3.0, -2.0, 1.0]]))
    z = torch.tensor(
        [[-0.75], [-0.5], [-0.25], [0.0], [0.25], [0.5], [3.0]],
        dtype=torch.float64,
        requires_grad=True,
    )
    anl(z).sum().backward()
    assert z.grad.flatten().tolist() == [2, 2, 2, -4, -10, -2, 0]


def test_gradcheck_would_notice_a_wrong_derivative(monkeypatch):
    original = core._Sigma.backward
    wrong = staticmethod(
        lambda ctx, grad: (original(ctx, grad)[0] * 1.01, *original(ctx, grad)[1:])
    )
    monkeypatch.setattr(core._Sigma, "backward", wrong)
    anl, z = make(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(anl, (z,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hand_written_backward_equals_autograd_of_the_definition(way, variant):
    anl = make(**VARIANTS[variant])
    z = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    inputs = [z, *anl.parameters()]
    upstream = torch.randn(50, 3, dtype=torch.float64)
    ours = torch.autograd.grad(anl(z, 0.3), inputs, upstream)
    for a, b in zip(ours, torch.autograd.grad(plain(anl, z, 0.3), inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_more_channels_than_cells(way):
    """Then summed splines, too, have a polynomial for every cell in the backward."""
    anl, z = make(rank=8, grid_size=1, spline_order=2), torch.randn(3, 8, dtype=torch.float64)
    z.requires_grad_()
    assert gradcheck(anl, (z,), check_forward_ad=True, check_batched_grad=True)
    inputs = [z, *anl.parameters()]
    ours = torch.autograd.grad(anl(z).square().sum(), inputs, create_graph=True)
    wanted = torch.autograd.grad(plain(anl, z).square().sum(), inputs, create_graph=True)
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)
    ours = torch.autograd.grad(sum(g.sin().sum() for g in ours), inputs)
    wanted = torch.autograd.grad(sum(g.sin().sum() for g in wanted), inputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_func(way, variant):
    anl = make(rank=2, **VARIANTS[variant])
    z = torch.randn(4, 2, dtype=torch.float64)
    by_row = vmap(jacrev(anl))(z)
    torch.testing.assert_close(by_row, vmap(jacfwd(anl))(z))
    torch.testing.assert_close(
        by_row, torch.stack([torch.autograd.functional.jacobian(anl, row) for row in z])
    )

    def energy(z):
        return anl(z).square().sum()

    def plain_energy(z):
        return plain(anl, z[None]).square().sum()

    torch.testing.assert_close(hessian(energy)(z[0]), hessian(plain_energy)(z[0]))
    torch.testing.assert_close(vmap(anl)(z), anl(z))
    stacked = {name: torch.stack([p, p + 1]) for name, p in anl.named_parameters()}
    models = vmap(lambda p, z: functional_call(anl, p, (z,)), in_dims=(0, None))(stacked, z)
    torch.testing.assert_close(models[0], anl(z))


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3), (2, 1, 4, 3), (0, 3), (2, 0, 3)])
def test_shapes(way, shape):
    anl = make(dtype=torch.float32)
    z = torch.randn(shape)
    assert anl(z).shape == z.shape
    torch.testing.assert_close(anl(z).reshape(-1, 3), anl(z.reshape(-1, 3)))
    noncontiguous = torch.randn(3, 4).t()
    torch.testing.assert_close(anl(noncontiguous), anl(noncontiguous.contiguous()))


def test_arithmetic_is_wide_and_the_result_has_the_inputs_dtype(way):
    anl = make(dtype=torch.float32)
    z = torch.randn(40, 3)
    for dtype in (torch.bfloat16, torch.float16):
        out = anl(z.to(dtype))
        assert out.dtype == dtype
        assert torch.equal(out, anl(z.to(dtype).float()).to(dtype))
    assert anl(z.double()).dtype == torch.float64
    np.testing.assert_allclose(
        anl(z.double()).detach().numpy(), reference(anl, z), rtol=1e-12, atol=1e-12
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z.requires_grad_()
        inside = anl(z)
        inside.sum().backward()
    assert torch.equal(inside, anl(z))


@pytest.mark.parametrize("shape", [(), (2,), (5, 4), (3, 1)])
def test_a_wrong_last_dimension_is_named(shape):
    with pytest.raises(
        ValueError, match=r"rank 3 wants floats \(\.\.\., 3\), got torch.float64 of shape"
    ):
        make()(torch.zeros(shape, dtype=torch.float64))


BAD = [
    ({"rank": 0}, "rank .* at least 1, got 0"),
    ({"rank": -1}, "rank"),
    ({"rank": 2.0}, "rank must be an int .* got 2.0"),
    ({"rank": True}, "rank"),
    ({"rank": "2"}, "rank"),
    ({"grid_size": 0}, "grid_size"),
    ({"spline_order": 9}, "spline_order must be an int from 1 to 8, got 9"),
    ({"mode": "both"}, "mode must be .*dynamic"),
    ({"spline": "sum"}, "spline must be"),
    (
        {"activation": "relu"},
        "activation must be one of tanh, leaky_relu, sigmoid, identity, got 'relu'",
    ),
    ({"fixed": False, "learnable": False}, "learnable"),
    ({"fixed": None}, "fixed"),
    ({"grid_range": (1.0, -1.0)}, "grid_range"),
    ({"grid_range": (0.0, float("inf"))}, "grid_range"),
    ({"grid_range": (0.0, float("nan"))}, "grid_range"),
    ({"alpha": float("nan")}, "alpha"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ANL(**options)


def test_start_is_the_papers():
    torch.manual_seed(0)
    anl = ANL(64, dtype=torch.float64)
    assert abs(anl.H.std().item() - 64**-0.5) < 0.01
    assert anl.spline_weight.abs().max() <= 0.1
    assert abs(anl.spline_weight.std().item() - 0.1 / 3**0.5) < 0.005


@pytest.mark.parametrize(
    ("rank", "grid_size", "order"), list(itertools.product((1, 2, 8), (1, 5), (1, 3)))
)
def test_size(rank, grid_size, order):
    anl = ANL(rank, grid_size=grid_size, spline_order=order)
    assert sum(p.numel() for p in anl.parameters()) == rank**2 + rank * (grid_size + order)


def test_moves_and_materialises():
    anl = ANL(2, device="meta")
    assert anl(torch.empty(3, 2, device="meta")).is_meta
    anl.to_empty(device="cpu")
    anl.reset_parameters()
    z = torch.randn(5, 2)
    np.testing.assert_allclose(anl(z).detach().numpy(), reference(anl, z), rtol=1e-6, atol=1e-6)
    assigned = ANL(2, device="meta")
    assigned.load_state_dict(anl.state_dict(), assign=True)
    assert torch.equal(assigned(z), anl(z))
    assert anl.half().double().half().to(torch.bfloat16)(z).dtype == torch.float32
    for cast in (anl.double(), anl.half()):
        np.testing.assert_allclose(
            cast(z).detach().numpy(), reference(cast, z), rtol=1e-6, atol=1e-6
        )

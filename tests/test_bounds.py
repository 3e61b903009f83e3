"""Certified bounds: never exceeded, rarely loose, and a halved one is noticed."""

import copy
import dataclasses
import functools
import math
import sys
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import bases, knots
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import aurora
from aurora import ANL, AuroraConfig, AuroraLinear, bounds

# --- No bound is ever exceeded --------------------------------------------------------------------

GRIDS = [(-1.0, 1.0), (-1.0, 1.0), (-0.3, 2.9), (4.0, 11.0), (-1e-3, 5e-3)]


@st.composite
def configs(draw, smooth=False, **fixed):
    """Any configuration; of a sigma without kinks, if `smooth`."""
    activations = ["tanh", "sigmoid", "identity", *([] if smooth else ["leaky_relu"])]
    terms = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    options = {
        "rank": draw(st.one_of(st.integers(1, 3), st.integers(1, 16))),
        "alpha": draw(st.sampled_from([4.0, 1.0, -0.5])),
        "spline": draw(st.sampled_from(["summed", "per-channel"])),
        "fixed": terms[0],
        "learnable": terms[1],
        "activation": draw(st.sampled_from(activations)),
        "grid_size": draw(st.one_of(st.just(5), st.integers(1, 12))),
        "spline_order": draw(st.one_of(st.just(3), st.integers(2 if smooth else 1, 8))),
        "grid_range": draw(st.sampled_from(GRIDS)),
    }
    return AuroraConfig(**options | fixed)


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32 - 1)
# Logarithms of the size of weights: below 1e-38 float32 is denormal, below 1e-45 zero.
SIZES = st.one_of(st.integers(-2, 1), st.integers(-46, 4), st.just(-310))


def fill(draw, parameters, random):
    for p in parameters:
        values = torch.randn(p.shape, generator=random, dtype=torch.float64)
        values *= torch.rand(p.shape, generator=random) < draw(st.sampled_from([1.0, 1.0, 0.5]))
        p.data.copy_((values * 10.0 ** draw(SIZES)).clamp_(-1e4, 1e4))


def hidden(config, random):
    """Points z (N, r) where something can happen: knots, middles of cells, huge, alike or not."""
    grid = torch.from_numpy(knots(config.grid_size, config.spline_order, *config.grid_range))
    special = torch.cat(
        [grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([0.0, 1e-30, 1e30, -1e30, 40.0, -40.0])]
    )
    spread = grid[0] + (grid[-1] - grid[0]) * torch.rand(24, generator=random, dtype=torch.float64)
    alike = torch.cat([special, spread]).unsqueeze(1).expand(-1, config.rank)
    mixed = special[torch.randint(len(special), (8, config.rank), generator=random)]
    return torch.cat([alike, mixed, torch.randn(4, config.rank, generator=random)])


class Case:
    """A module, its inputs (N, d_in), and upstream gradients (N, d_out), all of about one norm."""

    def __init__(self, module, x, g, size):
        g = g / g.norm(dim=1, keepdim=True) * size
        self.module, self.x, self.g = module, x, g.clamp(-3e38, 3e38).to(x.dtype)
        self.g[self.g.isinf()] = 1.0

    def __repr__(self):
        parameters = {name: p.tolist() for name, p in self.module.named_parameters()}
        return f"{self.module.config}, {self.x.dtype}, {parameters}"


# Sizes of upstream gradients; the last may overflow on the way.
UPSTREAM = st.sampled_from([1.0, 1.0, 1.0, 1e3, 1e35])


@st.composite
def anl_cases(draw, smooth=False):
    dtype, random = draw(DTYPES), torch.Generator().manual_seed(draw(SEEDS))
    anl = ANL(draw(configs(smooth)), dtype=dtype)
    fill(draw, anl.parameters(), random)
    limit = min(10.0 ** draw(st.integers(-2, 30)), torch.finfo(dtype).max)
    z = hidden(anl.config, random)
    z = z[z.norm(dim=1) <= limit].to(dtype)
    z = torch.cat([z, torch.zeros(1, anl.config.rank, dtype=dtype)])
    g = torch.randn(z.shape, generator=random, dtype=torch.float64)
    return Case(anl, z, g, draw(UPSTREAM))


@st.composite
def layer_cases(draw, variants=("dynamic", "dynamic", "static", "fixed"), smooth=False):
    """An AuroraLinear over a base that adds nothing."""
    dtype, random = draw(DTYPES), torch.Generator().manual_seed(draw(SEEDS))
    d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    chosen = {"rank": draw(st.integers(1, min(d_in, 4)))}
    variant = draw(st.sampled_from(variants))
    if variant == "fixed":
        chosen |= {"projections": "fixed", "init": "zero"}
    else:
        chosen["mode"] = variant
    config = draw(configs(smooth, **chosen))
    base = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
    nn.init.zeros_(base.weight).requires_grad_(False)
    layer = AuroraLinear(base, config)
    if draw(st.booleans()):
        layer.to(dtype)  # the adapter too
    fill(draw, layer.adapter_parameters().values(), random)
    # Where sigma varies, along the directions that matter most, and anywhere.
    inverse = torch.linalg.pinv(layer.A.detach().double())
    top = [torch.linalg.svd(m.detach().double())[2][:1] for m in (layer.static_update(), layer.A)]
    anywhere = torch.randn(8, d_in, generator=random, dtype=torch.float64)
    size = 10.0 ** draw(st.one_of(st.integers(-2, 2), st.integers(-46, 37)))
    x = torch.cat([hidden(config, random) @ inverse.t(), *(size * v for v in top), anywhere * size])
    x = x[x.isfinite().all(1) & (x.norm(dim=1) <= max(size, 1e-3) * 1e3)].to(dtype)
    x = torch.cat([x[x.isfinite().all(1)], torch.zeros(1, d_in, dtype=dtype)])
    g = torch.randn(len(x), d_out, generator=random, dtype=torch.float64)
    g[::2] = torch.linalg.svd(layer.B.detach().double())[0][:, 0]
    return Case(layer, x, g, draw(UPSTREAM))


def norm(rows):
    """Euclidean norms (N,) of rows (N, ...), scaled so that squares neither vanish nor overflow."""
    flat = rows.double().flatten(1)
    largest = flat.abs().amax(1, keepdim=True).clamp(min=5e-324)
    return largest.squeeze(1) * (flat / largest).norm(dim=1)


def compute(module, x, g):
    """What `Certificate.numbers` bounds the norms of, (N, ...), row by row."""
    anl = module.anl if isinstance(module, AuroraLinear) else module
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters, x, g):
        return (functional_call(module, parameters, (x,)) * g).sum()

    to_parameters, to_x = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(parameters, x, g)
    found = {f"gradient of {name}": rows for name, rows in (to_parameters | {"x": to_x}).items()}
    z = x if anl is module else x @ module.A.detach().t().to(x.dtype)
    if module.config.mode == "static" and anl is not module:
        z = module.A.detach().t()
    with torch.no_grad():
        found |= {f"value of channel {j}": v for j, v in enumerate(anl(z).t())}
        found["output"] = module(x)
    return found | {"jacobian": vmap(jacrev(anl))(z).detach()}


def spectral(matrices):
    finite = bool(matrices.isfinite().all())  # singular values of others are refused
    return float(torch.linalg.matrix_norm(matrices.double(), 2).max()) if finite else math.nan


def measure(module, x, g):
    """The norms that `Certificate.numbers` bounds, each the largest over the rows."""
    found = compute(module, x, g)
    jacobian = spectral(found.pop("jacobian"))
    norms = {name: float(norm(rows.unsqueeze(-1)).max()) for name, rows in found.items()}
    if norm(g).max() < 2:  # a larger gradient may overflow where one of norm 1 would not
        norms["lipschitz"] = float((norm(found["gradient of x"]) / norm(g)).max())
    return norms | {"jacobian": jacobian}


def check(case):
    module, x = case.module, case.x
    size, upstream = float(norm(x).max()), float(norm(case.g).max())
    measured = measure(module, x, case.g)
    certified = bounds.certify(module, size, upstream).numbers()
    allowed = bounds.allowance(module, size, upstream, x.dtype).numbers()
    assert measured.keys() | {"lipschitz"} == certified.keys() == allowed.keys()
    for name, value in measured.items():
        # Where steps may overflow, the allowance is infinite and NaN is all one can expect.
        assert value <= certified[name] + allowed[name] or math.isinf(allowed[name]), (
            name,
            value,
            certified[name],
            allowed[name],
            size,
            case,
        )


@given(anl_cases())
def test_no_bound_of_an_anl_is_exceeded(case):
    check(case)


@given(layer_cases())
def test_no_bound_of_a_layer_is_exceeded(case):
    check(case)


# --- Rounding -------------------------------------------------------------------------------------


# At a kink a slope may be off by the whole jump, which is no rounding error.
@settings(max_examples=settings.default.max_examples // 2)
@given(st.one_of(anl_cases(smooth=True), layer_cases(["static"], smooth=True)))
def test_no_error_exceeds_its_allowance(case):
    """The errors themselves, against float64, where the point z is exact and so does not move."""
    module, x, g = case.module, case.x, case.g
    size, upstream = float(norm(x).max()), float(norm(g).max())
    allowed = bounds.allowance(module, size, upstream, x.dtype).numbers()
    computed = compute(module, x, g)
    exact = compute(copy.deepcopy(module).double(), x.double(), g.double())
    # The place of phi' moves, too, and the certificate of H's gradient holds at all places.
    for name in exact.keys() - {"gradient of H", "gradient of anl.H"}:
        off = norm((computed[name].double() - exact[name]).unsqueeze(-1)).max()
        assert off <= allowed[name] or math.isinf(allowed[name]), (name, off, allowed[name], case)


@pytest.mark.parametrize("order", [1, 3, 8])
def test_tiny_weights_are_within_their_allowance(order):
    """Near the smallest number there is, a weight has few digits, and its products have none."""
    anl = ANL(1, fixed=False, spline_order=order)
    drawn = torch.randn(anl.spline_weight.shape, generator=torch.Generator().manual_seed(0))
    z = torch.linspace(-3, 3, 700).unsqueeze(1)
    for size in (1e-45, 1e-42, 1e-40, 1e-38, 1e-37, 1e-36):
        anl.spline_weight.data.copy_(drawn * size)
        allowed = float(bounds.allowance(anl, 3.0, 1.0, torch.float32).value)
        assert (anl(z) - doubled(anl)(z.double())).abs().max() <= allowed


@pytest.mark.parametrize("points", [1_000, 100_000])
def test_the_distance_to_a_centre_is_rounded(points):
    """Far from 0 the place of a point on the grid is known to eps times its distance from 0 only.

    That is more than any other term of the allowance; few points and many are computed in two ways.
    """
    anl = ANL(1, fixed=False, grid_range=(526.2, 527.1), grid_size=7)
    anl.spline_weight.data.copy_((-1.0) ** torch.arange(10.0).unsqueeze(0))
    z = torch.linspace(526.0, 527.3, points).unsqueeze(1)
    (out, slope), (exact, exact_slope) = (
        value_and_slope(module, t) for module, t in ((anl, z), (doubled(anl), z.double()))
    )
    allowed = bounds.allowance(anl, 600.0, 1.0, torch.float32)
    assert 1.5e-4 < float((out - exact).abs().max()) <= float(allowed.value)
    assert 3e-3 < float((slope - exact_slope).abs().max()) <= allowed.jacobian


def doubled(module):
    return copy.deepcopy(module).double()


def value_and_slope(anl, z):
    z = z.requires_grad_()
    out = anl(z)
    return out.detach().double(), torch.autograd.grad(out.sum(), z)[0].double()


@pytest.mark.parametrize("spline", ["summed", "per-channel"])
@pytest.mark.parametrize("order", range(2, 9))
def test_no_error_of_many_points_exceeds_its_allowance(order, spline):
    """For many points splines are computed in another way."""
    torch.manual_seed(order)
    anl = ANL(3, spline=spline, spline_order=order, grid_range=(-0.3, 2.9))
    nn.init.normal_(anl.spline_weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = (torch.rand(20_000, 3) * 12 - 5).to(dtype)
        (out, slope), (exact, exact_slope) = (
            value_and_slope(module, t) for module, t in ((anl, z), (doubled(anl), z.double()))
        )
        size = float(norm(z.detach()).max())
        allowed = bounds.allowance(anl, size, math.sqrt(3), dtype)  # of ones, the gradient of a sum
        assert ((out - exact).abs().amax(0) <= allowed.value).all()
        assert norm(out - exact).max() <= allowed.output
        assert norm(slope - exact_slope).max() <= allowed.gradients["x"]


SETTINGS = [
    {},
    {"spline": "per-channel"},
    {"spline": "per-channel", "grid_range": (-4.0, 4.0)},
    {"mode": "static"},
    {"rank": 8},
    {"rank": 16, "spline": "per-channel"},
    {"learnable": False},
    {"fixed": False},
    {"activation": "sigmoid"},
    {"activation": "identity", "spline": "per-channel"},
]


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float16, 0.1), (torch.bfloat16, 0.5), (torch.float32, 2e-3), (torch.float64, 1e-6)],
)
def test_the_allowance_is_small_beside_the_certificate(dtype, most):
    ratios = []
    for seed, options in enumerate(SETTINGS * 3):
        torch.manual_seed(seed)
        layer = AuroraLinear(nn.Linear(256, 256), **options)
        nn.init.normal_(layer.B, std=0.05)
        certified = bounds.certify(layer, 16.0, 64.0).numbers()
        allowed = bounds.allowance(layer, 16.0, 64.0, dtype, rows=64).numbers()
        ratios += [allowed[name] / bound for name, bound in certified.items()]
    ratios = torch.tensor(ratios)
    print(f"\n{dtype}: allowance / certificate {ratios.median():.2g}, at most {ratios.max():.2g}")
    assert ratios.median() <= most
    assert ratios.isfinite().all()


def test_lowered_products_are_allowed_for(monkeypatch):
    layer = AuroraLinear(nn.Linear(8, 8), 2)
    nn.init.normal_(layer.B)
    single, double = (
        functools.partial(bounds.allowance, layer, 1.0, 1.0, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    before = single().output, double().output
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert 1e3 * before[0] < single().output < math.inf
    assert double().output == before[1]


def static_overflow():
    """s sigma(A) x leaves float32; B, which is tiny and has a 0, makes infinity and NaN of it."""
    layer = AuroraLinear(nn.Linear(2, 2), 1, mode="static", fixed=False, alpha=1e4)
    nn.init.zeros_(layer.A)
    nn.init.constant_(layer.anl.spline_weight, 1e4)
    layer.B.data.copy_(torch.tensor([[1e-30], [0.0]]))
    return layer, torch.full((1, 2), 1e32)


def test_overflow_inside_is_infinite():
    layer, x = static_overflow()
    assert not layer(x).isfinite().any()
    size = float(x.double().norm())
    assert bounds.certify(layer, size).output < 1e11
    assert bounds.allowance(layer, size, 1.0, torch.float32).output == math.inf
    assert bounds.allowance(layer, size, 1.0, torch.float64).output < 1e11

    dynamic = AuroraLinear(nn.Linear(2, 2), 1, fixed=False)
    nn.init.ones_(dynamic.B)
    dynamic.A.data.copy_(torch.tensor([[1e4, -1e4]]))
    assert dynamic(torch.full((2,), 1e35)).isnan().all()  # z is infinity less infinity
    for name, off in bounds.allowance(dynamic, 2e35, 1.0, torch.float32).numbers().items():
        assert off == math.inf or name == "gradient of x", name


def test_overflow_in_the_backward_is_infinite():
    """The gradient of z is multiplied by the inverse spacing of knots, here 1e-15, last."""
    anl = ANL(1, fixed=False, grid_range=(0.0, 5e15))
    nn.init.constant_(anl.spline_weight, 1e4)
    anl.spline_weight.data[0, ::2] *= -1
    z = torch.full((1, 1), 2.2e15, requires_grad=True)
    grad_z = torch.autograd.grad(anl(z), z, torch.full((1, 1), 1e36))[0]
    assert not grad_z.isfinite().all()
    assert bounds.certify(anl, 1e16, 1e36).gradients["x"] < 1e30
    assert bounds.allowance(anl, 1e16, 1e36, torch.float32).gradients["x"] == math.inf
    assert bounds.allowance(anl, 1e16, 1e20, torch.float32).gradients["x"] < 1e20


def test_a_large_gradient_of_spline_weights_of_high_order_is_computed():
    """The powers of order 8 once overflowed here, before they were divided by 8!."""
    anl = ANL(1, fixed=False, spline_order=8)
    given = torch.full((4, 1), 1e35)
    grad_w = torch.autograd.grad(anl(torch.zeros(4, 1)), anl.spline_weight, given)[0]
    certified = bounds.certify(anl, 1.0, 4e35).gradients["spline_weight"]
    allowed = bounds.allowance(anl, 1.0, 4e35, torch.float32, rows=4).gradients["spline_weight"]
    assert float(grad_w.double().norm()) <= certified + allowed < 1e37


def test_an_infinite_allowance_is_said():
    torch.manual_seed(0)
    layer = AuroraLinear(nn.Linear(64, 64, dtype=torch.float16), 2, alpha=400.0)
    nn.init.normal_(layer.B)
    model, x = nn.Sequential(layer), torch.randn(4096, 64).half() / 8
    with pytest.warns(
        bounds.UnboundedWarning, match=r"^0: a step to .* may overflow torch\.float16"
    ):
        bounds.assert_bounded(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounds.assert_bounded(model.float(), x.float())

    layer, x = static_overflow()
    with pytest.raises(
        AssertionError, match=r"^the model: output is nan, .* overflowed torch\.float32"
    ):
        bounds.assert_bounded(layer, x)


def test_what_grows_with_the_input_is_infinite():
    for activation in ("leaky_relu", "identity"):
        anl = ANL(3, activation=activation)
        certified = bounds.certify(anl)
        assert certified.output == math.inf
        assert certified.value.tolist() == [math.inf] * 3
        assert math.isfinite(certified.jacobian)
    layer = AuroraLinear(nn.Linear(3, 3, dtype=torch.float64), 3, mode="static")
    nn.init.constant_(layer.B, 1e200)
    nn.init.constant_(layer.anl.spline_weight, 1e200)
    assert bounds.certify(layer, 1.0).output == math.inf  # beyond float64, and no error


# --- Halving any bound is noticed -----------------------------------------------------------------

# The fields of a certificate, and the names of its gradients, beside what `numbers` calls them.
LAYER = {
    "value": r"value of channel \d",
    "jacobian": "jacobian",
    "output": "output",
    "lipschitz": "lipschitz",
    **{name: f"gradient of {name}" for name in ("x", "A", "B", "anl.H", "anl.spline_weight")},
}
ALONE = {name: LAYER[name] for name in list(LAYER)[:5]} | {
    n: f"gradient of {n}" for n in ("H", "spline_weight")
}


def scaled(certificate, quantity, factor):
    if hasattr(certificate, quantity):
        return dataclasses.replace(
            certificate, **{quantity: getattr(certificate, quantity) * factor}
        )
    gradients = {
        name: bound * (factor if name == quantity else 1)
        for name, bound in certificate.gradients.items()
    }
    return dataclasses.replace(certificate, gradients=gradients)


@pytest.mark.parametrize(
    ("kind", "quantity"),
    [(mode, quantity) for mode in ("dynamic", "static") for quantity in LAYER]
    + [("ANL", name) for name in ALONE],
)
def test_halving_a_bound_is_noticed(kind, quantity, monkeypatch):
    original = bounds.certify
    monkeypatch.setattr(bounds, "certify", lambda *args: scaled(original(*args), quantity, 0.5))
    cases = anl_cases() if kind == "ANL" else layer_cases([kind])
    # The properties above, without shrinking what they find.
    quickly = settings(
        phases=[Phase.generate], report_multiple_bugs=False, derandomize=True, database=None
    )
    with pytest.raises(AssertionError, match=(ALONE if kind == "ANL" else LAYER)[quantity]):
        quickly(given(cases)(check))()


# --- The suprema are exact ------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(1, 9))
def test_spline_pieces_agree_with_cox_de_boor(order):
    """The static update of one entry is its spline there, and its certificate is exact."""
    base = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    options = {"spline_order": order, "grid_size": 4, "grid_range": (-0.5, 2.0)}
    layer = AuroraLinear(base, 1, mode="static", alpha=1.0, fixed=False, **options)
    nn.init.ones_(layer.B)
    for t in torch.linspace(-4, 6, 29, dtype=torch.float64).tolist():
        nn.init.constant_(layer.A, t)
        nn.init.normal_(layer.anl.spline_weight)
        basis = torch.from_numpy(bases(t, 4, order, -0.5, 2.0))
        certified = bounds.certify(layer, x=1.0)
        expected = abs(float(layer.anl.spline_weight[0].detach() @ basis))
        assert certified.output == pytest.approx(expected, rel=0, abs=1e-12)
        slope = certified.gradients["anl.spline_weight"]
        assert slope == pytest.approx(float(basis.norm()), rel=0, abs=1e-12)


@pytest.mark.parametrize("order", range(2, 9))
def test_splines_reach_their_bounds(order):
    torch.manual_seed(order)
    anl = ANL(4, spline="per-channel", fixed=False, spline_order=order, dtype=torch.float64)
    nn.init.normal_(anl.spline_weight)
    edge = 1 + order * 0.4
    t = (
        torch.linspace(-edge, edge, 20001, dtype=torch.float64)
        .unsqueeze(1)
        .expand(-1, 4)
        .requires_grad_()
    )
    out = anl(t)
    slopes = torch.autograd.grad(out.sum(), t)[0]
    certified = bounds.certify(anl)
    for reached, bound in (
        (out.abs().amax(0), certified.value),
        (slopes.abs().max(), certified.jacobian),
    ):
        assert (reached <= bound * (1 + 1e-9)).all()
        assert (reached >= bound * (1 - 2e-3)).all()  # the points are 2e-3 of a cell apart at most


def test_cubic_slope_in_closed_form():
    """On a cell S' is quadratic with control points (a + b) / 2, b, (b + c) / 2."""
    w = torch.tensor([[0.3, -1.0, 0.8, 0.7, -0.2, 0.5, 0.1, -0.4]], dtype=torch.float64)
    anl = ANL(1, fixed=False, dtype=torch.float64)
    anl.spline_weight.data.copy_(w)
    d = [
        0.0,
        0.0,
        *torch.diff(torch.nn.functional.pad(w, (1, 1))).mul(2.5).flatten().tolist(),
        0.0,
        0.0,
    ]
    extremes = []
    for a, b, c in zip(d, d[1:], d[2:], strict=False):
        start, middle, end = (a + b) / 2, b, (b + c) / 2
        curvature = start - 2 * middle + end
        vertex = (start - middle) / curvature if curvature else 0.0
        points = [0.0, 1.0, *([vertex] if 0 < vertex < 1 else [])]
        extremes += [
            abs(start * (1 - u) ** 2 + 2 * middle * u * (1 - u) + end * u**2) for u in points
        ]
    assert bounds.certify(anl).jacobian == pytest.approx(max(extremes), rel=1e-11)


def test_bounds_by_hand():
    """rank 1, no spline: sigma = tanh(h tanh z), at most tanh |h|, with the slope h at 0."""
    base = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    layer = AuroraLinear(base, 1, alpha=3.0, learnable=False)
    layer.A.data, layer.B.data = (
        torch.tensor(m, dtype=torch.float64) for m in ([[3.0, 4.0]], [[0.6], [0.8]])
    )
    layer.anl.H.data.fill_(-0.5)
    certified = bounds.certify(layer, x=10.0, upstream=7.0)
    expected = {
        "value of channel 0": math.tanh(0.5),
        "jacobian": 0.5,
        "output": 3 * math.tanh(0.5),
        "lipschitz": 7.5,
        "gradient of x": 52.5,
        "gradient of A": 105.0,
        "gradient of B": 21 * math.tanh(0.5),
        "gradient of anl.H": 21.0,
    }
    assert certified.numbers() == pytest.approx(expected, rel=2e-3)
    assert certified.numbers()["gradient of A"] <= 105.0 * (1 + 1e-12)
    everywhere = bounds.certify(layer)
    assert everywhere.output == pytest.approx(3 * math.tanh(0.5))
    assert everywhere.gradients["A"] == math.inf
    layer.B.data.zero_()
    assert (
        bounds.certify(layer).numbers()["gradient of A"] == 0
    )  # nothing comes through, whatever x is


def test_bounds_by_hand_with_the_identity_for_activation():
    """F(z) = H z: its slope is |H| everywhere, and its value grows with z."""
    layer = AuroraLinear(
        nn.Linear(2, 2, bias=False, dtype=torch.float64), activation="identity", learnable=False
    )
    for p, values in (
        (layer.A, [[3.0, 0.0], [0.0, 4.0]]),
        (layer.B, [[1.0, 0.0], [0.0, 1.0]]),
        (layer.anl.H, [[0.0, 2.0], [-1.0, 0.0]]),
    ):
        p.data.copy_(torch.tensor(values))
    certified = bounds.certify(layer, x=10.0, upstream=7.0)
    assert certified.value.tolist() == pytest.approx([2 * 40.0, 30.0])
    assert certified.jacobian == pytest.approx(2.0)
    assert certified.lipschitz == pytest.approx(2 * 2.0 * 4.0)  # the scaling is 2
    assert certified.gradients["anl.H"] == pytest.approx(2 * 7.0 * 50.0)
    assert bounds.certify(layer).output == math.inf


def test_a_certificate_does_not_underflow_on_the_way():
    """B sigma(A) is below the least float64 number, and a large gradient brings it back."""
    layer = AuroraLinear(
        nn.Linear(1, 1, dtype=torch.float64), 1, mode="static", alpha=1.0, learnable=False
    )
    nn.init.constant_(layer.B, 1e-300)
    nn.init.constant_(layer.A, 1e-30)
    nn.init.ones_(layer.anl.H)
    assert bounds.certify(layer, 1.0, 1e35).gradients["x"] == pytest.approx(1e-295)


@pytest.mark.parametrize(("x", "upstream"), [(-1.0, 1.0), (math.nan, 1.0), (1.0, -2.0)])
def test_norms_are_checked(x, upstream):
    with pytest.raises(ValueError, match="is a norm and cannot be"):
        bounds.certify(ANL(2), x, upstream)


# --- Tightness ------------------------------------------------------------------------------------


def random_layers(count, rank, **options):
    """Layers from the usual start up to twenty times larger, the splines too."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        anl = ANL(rank, dtype=torch.float64, **options)
        for p in anl.parameters():
            p.data *= 20 ** torch.rand(()).item()
        made.append(anl)
    return made


def largest_jacobians(layers, starts=48, steps=30):
    """For each layer the largest |J| that gradient ascent finds, all layers at once."""
    anl = layers[0]
    parameters = {
        name: torch.stack([dict(a.named_parameters())[name].detach() for a in layers])
        for name in dict(anl.named_parameters())
    }

    def size(parameters, z):
        return torch.linalg.matrix_norm(jacrev(lambda z: functional_call(anl, parameters, (z,)))(z))

    def spectral(parameters, z):
        return torch.linalg.matrix_norm(
            jacrev(lambda z: functional_call(anl, parameters, (z,)))(z), 2
        )

    ascent, value = (vmap(vmap(f, (None, 0)), (0, 0)) for f in (grad(size, argnums=1), spectral))
    torch.manual_seed(0)
    edge = 1 + anl.config.spline_order / anl.config.cells_per_unit
    z = (2 * torch.rand(len(layers), starts, anl.config.rank, dtype=torch.float64) - 1) * edge
    z[:, 0] = 0
    best = value(parameters, z).amax(1)
    for step in range(steps):
        direction = ascent(parameters, z)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        z = z + 0.2 * 0.85**step * direction
        best = torch.maximum(best, value(parameters, z).amax(1))
    return best


@pytest.mark.parametrize(
    ("rank", "least", "options"),
    [
        (1, 0.9, {"spline": "per-channel", "fixed": False}),
        (2, 0.9, {"spline": "per-channel", "fixed": False}),
        (4, 0.9, {"spline": "per-channel", "fixed": False}),
        (1, 0.5, {}),
        (2, 0.5, {}),
    ],
)
def test_a_search_comes_close_to_the_bound(rank, least, options):
    layers = random_layers(100, rank, **options)
    reached = largest_jacobians(layers)
    tightness = reached / torch.tensor(
        [bounds.certify(anl).jacobian for anl in layers], dtype=torch.float64
    )
    found = f"median {tightness.median():.3f}, least {tightness.min():.3f}"
    print(f"\nrank {rank}, {options or 'default'}: tightness {found}")
    assert tightness.max() <= 1 + 1e-9
    assert tightness.min() >= least


# --- A model --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two adapted layers: one behind an in-place activation, one called twice and checkpointed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, gain=1.0):
        hidden = self.drop(self.norm(torch.relu_(self.first(x))))
        hidden = checkpoint(self.second, hidden, use_reentrant=False)
        return {"deep": [self.second(hidden) * gain], "loss": None}


def net(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    aurora.inject(model, "first|second", **options)
    for layer in aurora.core.layers(model).values():
        nn.init.normal_(layer.B)
        nn.init.normal_(layer.anl.spline_weight) if layer.anl.spline_weight is not None else None
    return model


@pytest.mark.filterwarnings("error::aurora.bounds.UnboundedWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spline": "per-channel", "dropout": 0.3},
        {"learnable": False},
        {"fixed": False, "rank": 4},
        {"activation": "identity", "spline": "per-channel", "init": "zero"},
    ],
)
def test_models_are_bounded(dtype, mode, options):
    model = net(dtype, mode=mode, **options)
    x = torch.randn(10, 6, dtype=dtype)
    for inputs in (x, (x, 2.0), {"x": x, "gain": 1e3}):
        bounds.assert_bounded(model, inputs)
    bounds.assert_bounded(model.first, torch.randn(2, 5, 6, dtype=dtype))


@pytest.mark.filterwarnings("error::aurora.bounds.UnboundedWarning")
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_half_precision_is_bounded(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).half()
    aurora.inject(model, "0|2", mode=mode)
    for layer in aurora.core.layers(model).values():
        nn.init.normal_(layer.B, std=0.05)
    bounds.assert_bounded(model, torch.randn(16, 64).half())


def test_with_fixed_projections_only_what_trains_has_a_gradient():
    model = net(projections="fixed", init="zero", activation="identity", spline="per-channel")
    certified = bounds.certify(model.first, 1.0)
    assert list(certified.gradients) == ["x", "anl.H", "anl.spline_weight"]
    assert certified.numbers().keys() == {
        *(f"value of channel {j}" for j in range(2)),
        *("jacobian", "output", "lipschitz"),
        *("gradient of x", "gradient of anl.H", "gradient of anl.spline_weight"),
    }
    bounds.assert_bounded(model, torch.randn(10, 6))
    assert bounds.report_bounds(model, torch.randn(10, 6)).rows[0].measured > 0


@pytest.mark.parametrize("quantity", [name for name in LAYER if name != "lipschitz"])
def test_a_violation_names_layer_quantity_and_numbers(quantity, monkeypatch):
    model, original = net(), bounds.certify

    def wrong(layer, *args):
        return scaled(original(layer, *args), quantity, 1.0 if layer is model.first else 0.0)

    monkeypatch.setattr(bounds, "certify", wrong)
    with pytest.raises(
        AssertionError,
        match=rf"^second: {LAYER[quantity]} measured [\d.e+-]+, above .* 0 \(rounding",
    ):
        bounds.assert_bounded(model, torch.randn(10, 6))


def test_a_wrong_layer_is_noticed(monkeypatch):
    model = net(fixed=False)
    monkeypatch.setattr(
        type(model.second.anl), "columns", lambda self, z, scale=1.0: 100 * scale * z
    )
    with pytest.raises(AssertionError, match=r"^first: .* above its certificate"):
        bounds.assert_bounded(model, torch.randn(10, 6))


@pytest.mark.parametrize("outcome", ["passes", "fails in the model", "exceeds"])
def test_the_model_is_left_as_it_was(outcome, monkeypatch):
    model = net()
    model.norm.eval()
    for p in aurora.parameters(model):
        p.grad = torch.ones_like(p)

    def state():
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ]
        tensors = [t.clone() for t in model.state_dict().values()]
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return hooks, [m.training for m in model.modules()], tensors, grads, torch.get_rng_state()

    before, x = state(), torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    if outcome == "passes":
        bounds.assert_bounded(model, x)
        bounds.report_bounds(model, x)
    elif outcome == "exceeds":
        original = bounds.certify
        monkeypatch.setattr(bounds, "certify", lambda *args: scaled(original(*args), "output", 0.0))
        with pytest.raises(AssertionError, match="above its certificate"):
            bounds.assert_bounded(model, x)
    else:
        with pytest.raises(RuntimeError):
            bounds.assert_bounded(model, torch.randn(10, 7, generator=torch.Generator()))
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


class InPlace(nn.Module):
    """Writes into the layer's input and output once the layer has run."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)

    def forward(self, x, in_place):
        x = x.clone()
        out = self.first(x)
        if not in_place:
            return 10.0 * out
        x.zero_()
        return out.mul_(10.0)


def test_what_a_model_does_in_place_does_not_change_what_is_measured(monkeypatch):
    model, original, measured = InPlace(), bounds.certify, []
    aurora.inject(model, "first")
    nn.init.normal_(model.first.B)

    def certify(layer, x, upstream):
        measured.append((x, upstream))
        return original(layer, x, upstream)

    monkeypatch.setattr(bounds, "certify", certify)
    x = torch.randn(10, 6)
    for in_place in (False, True):
        bounds.assert_bounded(model, {"x": x, "in_place": in_place})
    assert measured[0] == measured[1]
    assert measured[0][0] == pytest.approx(float(norm(x).max()))


def test_what_cannot_be_checked_is_an_error():
    model, x = net(), torch.randn(10, 6)
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        bounds.assert_bounded(nn.Linear(6, 6), x)
    idle = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})
    aurora.inject(idle, "idle")
    idle.forward = lambda x: idle["used"](x).requires_grad_()
    with pytest.raises(ValueError, match="no output depends on an adapter that ran"):
        bounds.assert_bounded(idle, x)
    with pytest.raises(ValueError, match="the input of first holds NaN or infinity"):
        bounds.assert_bounded(model, x * math.nan)
    model.second.A.data[0, 0] = math.inf
    for check_model in (bounds.assert_bounded, bounds.report_bounds):
        with pytest.raises(ValueError, match=r"second\.A holds NaN or infinity"):
            check_model(model, x)
    with pytest.raises(ValueError, match="A holds no values"):
        bounds.certify(AuroraLinear(nn.Linear(2, 2, device="meta"), 1))


def test_report():
    model, x = net(), torch.randn(10, 6)
    blind, seen = bounds.report_bounds(model), bounds.report_bounds(model, (x,))
    assert [row.name for row in seen.rows] == ["first", "second"]
    for before, after in zip(blind.rows, seen.rows, strict=True):
        assert after.jacobian <= before.jacobian
        assert before.measured is before.tightness is before.measured_output is None
        assert 0 < after.measured <= after.jacobian
        assert after.tightness == after.measured / after.jacobian
        assert 0 < after.measured_output <= after.output <= before.output
    torch.manual_seed(1)
    start = sorted(bounds.certify(ANL(2)).jacobian for _ in range(99))
    assert start[30] < seen.rows[0].initial < start[70]
    lines = str(seen).splitlines()
    assert len(lines) == 3
    assert seen._repr_html_().count("<tr>") == 3
    assert f"<td>{seen.rows[1].output:.3g}</td>" in seen._repr_html_()
    assert lines[2].split() == ["second", *(f"{v:.3g}" for v in seen.rows[1][1:])]
    assert str(blind).splitlines()[1].split()[3] == "-"


def test_report_is_drawn():
    import matplotlib

    matplotlib.use("Agg")
    report = bounds.report_bounds(net(), torch.randn(10, 6))
    axes = report.plot()
    assert [bar.get_width() for bar in axes.patches] == [row.jacobian for row in report.rows][::-1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["second", "first"]
    assert report.plot(axes) is axes
    matplotlib.pyplot.close(axes.figure)


def test_drawing_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"aurora-adapters\[plots\]"):
        bounds.report_bounds(net()).plot()


def test_layers_called_by_keyword_are_measured_too():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(input=x)

    model = Calls()
    aurora.inject(model, "fc")
    nn.init.normal_(model.fc.B)
    aurora.assert_bounded(model, torch.randn(5, 4))

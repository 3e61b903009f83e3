"""How large the outputs and gradients of adapters can get: certified from the parameters, checked on a running model.

`certify` bounds one layer, `report_bounds` tabulates a model, `assert_bounded` is one line for a test suite. Nothing is
sampled: every bound is proved in docs/theory.md, sections 3 and 4, and computed in float64 from the parameters; each
holds in exact arithmetic, and `allowance` says by how much rounding may exceed it. They take the paper's Proposition
2.2 (arXiv:2505.18738), that gradients are bounded, from "some constant" to numbers.

Norms of vectors are Euclidean, of matrices spectral, of gradients of parameters Frobenius.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora import _running, core


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Upper bounds for one layer; for an `ANL` the layer is sigma itself, with input z.

    value (r,), float64: |sigma(z)| per channel. jacobian: |d sigma / d z|, the Lipschitz constant of sigma. output: the
    adapter's part of the layer's output for one row. lipschitz: |d output / d input| of the adapter. gradients: of the
    loss, with respect to "x" (the adapter's part of it) and to every parameter by its name.
    """

    value: Tensor
    jacobian: float
    output: float
    lipschitz: float
    gradients: dict[str, float]

    def numbers(self) -> dict[str, float]:
        """All bounds by name: "value of channel 0", "jacobian", "output", "lipschitz", "gradient of A", ..."""
        values = {f"value of channel {j}": v for j, v in enumerate(self.value.tolist())}
        norms = {"jacobian": self.jacobian, "output": self.output, "lipschitz": self.lipschitz}
        return (
            values
            | norms
            | {f"gradient of {name}": bound for name, bound in self.gradients.items()}
        )


# --- Splines: exact suprema (docs/theory.md, section 2) -------------------------------------------------------------


@functools.cache
def _pieces(k: int) -> Tensor:
    """The uniform B-spline of order k on its k + 1 cells, by Bernstein coefficients: (cell, coefficient), float64."""

    def coefficient(cell: int, j: int) -> float:
        terms = (
            (-1) ** i * math.comb(k + 1, i) * (cell - i) ** (k - j) * (cell - i + 1) ** j
            for i in range(cell + 1)
        )
        return float(sum(terms)) / math.factorial(k)  # integers until here, so exact

    return torch.tensor(
        [[coefficient(m, j) for j in range(k + 1)] for m in range(k + 1)], dtype=torch.float64
    )


def _control_points(weights: Tensor, k: int) -> Tensor:
    """(r, n) weights of order k -> (cells, k + 1, r): on each cell the curve lies in the hull of its control points."""
    windows = F.pad(weights, (k, k)).unfold(
        -1, k + 1, 1
    )  # (r, cells, k + 1): the bases that live on each cell
    return torch.einsum("rca,aj->cjr", windows, _pieces(k).flip(0))


def _halve(points: Tensor) -> Tensor:
    """De Casteljau: the control points of both halves of every cell, (cells, m, r) -> (2 cells, m, r)."""
    m = points.shape[1]
    left = torch.tensor(
        [[math.comb(j, i) / 2**j for i in range(m)] for j in range(m)], dtype=torch.float64
    )
    return torch.einsum("hij,cjr->chir", torch.stack([left, left.flip(0, 1)]), points).flatten(0, 1)


def _supremum(points: Tensor, size: Callable[[Tensor], Tensor]) -> float:
    """The largest value of a convex `size` (..., r) -> (...) on curves given by control points, from above.

    Branch and bound: a cell is at most its largest control point, at least its ends. Exact to 1e-12 of the largest
    control point; the gap shrinks fourfold with every halving, so that few cells survive and 20 rounds suffice.
    """
    sizes = size(points)
    slack, reached = 1e-12 * float(sizes.abs().max()), -math.inf
    for _ in range(60):  # 60 halvings exhaust float64, should rounding keep the test from passing
        reached = max(reached, float(torch.maximum(sizes[:, 0], sizes[:, -1]).max()) + slack)
        if float(sizes.max()) <= reached:
            return reached
        points = _halve(points[sizes.amax(1) > reached])
        sizes = size(points)
    return max(reached, float(sizes.max()))


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, scaled first: squares of denormal numbers would vanish."""
    largest = x.abs().amax(-1, keepdim=True)
    norms: Tensor = largest * torch.linalg.vector_norm(
        x / largest.clamp(min=5e-324), dim=-1, keepdim=True
    )
    return norms.squeeze(-1)


# --- Activations ----------------------------------------------------------------------------------------------------

# Value, derivative, and the largest derivative. All are increasing; the derivatives of the first two are even and fall
# away from 0, the third's rises.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]] = {
    "tanh": (torch.tanh, lambda t: 1 - t.tanh().square(), 1.0),
    "sigmoid": (torch.sigmoid, lambda t: t.sigmoid() * (-t).sigmoid(), 0.25),
    "leaky_relu": (F.leaky_relu, lambda t: torch.where(t > 0, torch.ones_like(t), 0.01), 1.0),
}


def _slopes(activation: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range of the activation's derivative over arguments in [low, high]."""
    slope = _ACTIVATIONS[activation][1]
    if activation == "leaky_relu":
        return slope(low), slope(high)
    near = torch.where(low * high <= 0, 0.0, torch.minimum(low.abs(), high.abs()))
    return slope(torch.maximum(low.abs(), high.abs())), slope(near)


def _check(tensors: Mapping[str, Tensor]) -> None:
    for name, t in tensors.items():
        if t.is_meta or not t.isfinite().all():
            raise ValueError(
                f"{name} holds {'no values' if t.is_meta else 'NaN or infinity'}, so nothing bounds it"
            )


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise product with 0 * inf = 0: no weight, no contribution."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


# --- One layer ------------------------------------------------------------------------------------------------------


class _Constants(NamedTuple):
    """The factors of all bounds: certified suprema, or the magnitudes that rounding errors are proportional to.

    spread: |sigma|, image: |B sigma|, inner: |d F / d H|, basis: |d L / d w|, each for one row, or in static mode per
    unit of |x|. down: |A|, up: |B|.
    """

    value: Tensor
    jacobian: float
    spread: float
    image: float
    inner: float
    basis: float
    down: float
    up: float


class _Layer:
    """The parameters of an `ANL` or `AuroraLinear` in float64 on the CPU, and their constants for rows of norm <= x."""

    def __init__(self, module: core.ANL | core.AuroraLinear, x: float) -> None:
        linear = module if isinstance(module, core.AuroraLinear) else None
        parameters = (
            dict(module.named_parameters()) if linear is None else linear.adapter_parameters()
        )
        _check(parameters)
        own = {name.rpartition(".")[2]: p.detach().cpu().double() for name, p in parameters.items()}
        self.config = c = module.config
        self.names, self.static = list(parameters), linear is not None and c.mode == "static"
        self.scaling = 1.0 if linear is None else abs(linear.scaling)
        identity = torch.eye(c.rank, dtype=torch.float64)
        self.A, self.B = own.get("A", identity), own.get("B", identity)
        self.fixed, self.H = "H" in own, own.get("H", torch.zeros_like(identity))
        self.w = own.get("spline_weight", self.H.new_zeros(c.rank, c.grid_size + c.spline_order))
        self.activate, _, self.slope = _ACTIVATIONS[c.activation]
        self.summed = c.spline == "summed"
        # |z_i| is at most radius_i, |activation(z_i)| at most reach_i.
        self.radius = (
            self.A.abs().amax(1)
            if self.static
            else _times(_norm(self.A), torch.tensor(x, dtype=torch.float64))
        )
        self.reach = torch.maximum(
            self.activate(-self.radius).abs(), self.activate(self.radius).abs()
        )

    def bases(self, z: Tensor) -> Tensor:
        """All basis functions at z (...) -> (n, ...), from the Bernstein form: slow, and independent of core."""
        c, k = self.config, self.config.spline_order
        cells = (z - c.grid_range[0]) * c.cells_per_unit + k
        t = cells.unsqueeze(0) - torch.arange(c.grid_size + k, dtype=z.dtype).view(
            -1, *[1] * z.dim()
        )
        cell, inside = t.floor().clamp(0, k), (t >= 0) & (t < k + 1)
        u = torch.where(inside, t - cell, 0.0)
        terms = (
            math.comb(k, j) * u**j * (1 - u) ** (k - j) * _pieces(k)[cell.long(), j]
            for j in range(k + 1)
        )
        return torch.where(inside, sum(terms, torch.zeros_like(t)), 0.0)

    def sigma(self, z: Tensor) -> Tensor:
        """Sigma of every column of z (r, N)."""
        bases = self.bases(z)  # (n, r, N)
        spline = self.w @ bases.sum(1) if self.summed else torch.einsum("rn,nrc->rc", self.w, bases)
        return spline + (self.activate(self.H @ self.activate(z)) if self.fixed else 0)

    def value(self) -> Tensor:
        """|sigma(z)_j| <= the larger end of an interval: F is monotone in each activation, S_j has exact extremes."""
        points = _control_points(self.w, self.config.spline_order)
        count = self.config.rank if self.summed else 1
        ends = []
        for sign in (1.0, -1.0):
            best = [
                _supremum(sign * points[..., j : j + 1], lambda p: p.squeeze(-1))
                for j in range(self.config.rank)
            ]
            top = torch.where(
                sign * self.H > 0, self.activate(self.radius), self.activate(-self.radius)
            )
            fixed = sign * self.activate(_times(self.H, top).sum(1)) if self.fixed else 0.0
            ends.append(fixed + count * torch.tensor(best, dtype=torch.float64))
        return torch.maximum(*ends)

    def slopes(self) -> Tensor:
        """Control points (cells, m, r) of S', whose weights are the differences of the spline's."""
        differences = torch.diff(F.pad(self.w, (1, 1))) * self.config.cells_per_unit
        if self.config.spline_order == 1:
            # S' jumps at the knots, and next to one rounding may put each of the three bases that meet on another side.
            differences = (
                F.pad(self.w.abs(), (2, 2)).unfold(-1, 3, 1).sum(-1) * self.config.cells_per_unit
            )
        return _control_points(differences, self.config.spline_order - 1)

    def jacobian(self) -> float:
        """|J_F| + |J_L|, or column by column with F and L seen together, whichever is smaller."""
        points = self.slopes()
        if self.summed:
            spline = math.sqrt(self.config.rank) * _supremum(points, _norm)
        else:
            spline = _supremum(points.movedim(-1, 0).reshape(-1, points.shape[1], 1), _norm)
        apart = self.slope**2 * float(torch.linalg.matrix_norm(self.H, 2)) + spline
        return (
            apart if self.config.spline_order == 1 else min(apart, self.jacobian_by_columns(points))
        )

    def jacobian_by_columns(self, points: Tensor) -> float:
        """sqrt(sum_i sup_t |column i|^2): column i of J depends on t = z_i alone but for the outer slopes' range."""
        c = self.config
        for _ in range(6):  # 64 intervals per cell: the loss is then below a percent
            points = _halve(points)
        # Beyond the support S' is 0; its two intervals are unbounded.
        low, high = (
            F.pad(p, (1, 1)) for p in (points.amin(1).t(), points.amax(1).t())
        )  # (r, intervals)
        margin = c.spline_order / c.cells_per_unit
        inner = torch.linspace(
            c.grid_range[0] - margin, c.grid_range[1] + margin, len(points) + 1, dtype=points.dtype
        )
        edges = F.pad(F.pad(inner, (1, 0), value=-math.inf), (0, 1), value=math.inf)
        inner_low, inner_high = _slopes(c.activation, edges[:-1], edges[1:])
        total = 0.0
        for i, h in enumerate(self.H.t().unsqueeze(-1)):  # h (r, 1)
            others = (
                _times(self.H, self.reach.index_fill(0, torch.tensor(i), 0))
                .abs()
                .sum(1, keepdim=True)
            )
            u = _times(h, self.activate(edges))
            ends = torch.stack([u[:, :-1], u[:, 1:]])
            outer_low, outer_high = _slopes(
                c.activation, ends.amin(0) - others, ends.amax(0) + others
            )
            fixed = torch.stack([h * outer_low * inner_low, h * outer_high * inner_high])
            here = 1.0 if self.summed else (torch.arange(c.rank) == i).double().unsqueeze(1)
            extreme = torch.maximum(fixed.amax(0) + here * high, -(fixed.amin(0) + here * low))
            total = math.hypot(total, float(_norm(extreme.t()).max()))
        return total

    def suprema(self) -> _Constants:
        """The certified constants."""
        down, up = (float(torch.linalg.matrix_norm(p, 2)) for p in (self.A, self.B))
        value, jacobian = self.value(), self.jacobian()
        if self.static:
            sigma, bases = self.sigma(self.A), self.bases(self.A)
            spread, image = (float(torch.linalg.matrix_norm(p, 2)) for p in (sigma, self.B @ sigma))
            inner = float(torch.linalg.matrix_norm(self.activate(self.A), 2))
            basis = float(
                torch.linalg.matrix_norm(
                    bases.sum(1) if self.summed else bases.movedim(1, 0), 2
                ).max()
            )
        else:
            spread, inner = float(_norm(value)), float(_norm(self.reach))
            image = _product(up, spread)
            one_cell = _pieces(self.config.spline_order).t().unsqueeze(0)
            basis = _supremum(one_cell, _norm) * (self.config.rank if self.summed else 1)
        return _Constants(value, jacobian, spread, image, self.slope * inner, basis, down, up)

    def magnitudes(self, tiny: float) -> _Constants:
        """The same constants with every sum taken over absolute values: what rounding errors are proportional to.

        tiny: the smallest normal number; what is smaller is rounded as if it were that large.
        """
        c, k, r = self.config, self.config.spline_order, self.config.rank
        columns = math.sqrt(self.A.shape[1]) if self.static else 1.0
        # The distance to a centre is rounded relative to the larger of its two terms; |N'| <= 1, |N''| <= 2.
        distance = 2 * max(abs(end) for end in c.grid_range) * c.cells_per_unit + 3 * k
        terms = [(math.comb(k + 1, i), (k + 1) / 2 - i) for i in range(k // 2 + 1)]
        bump, steep = (sum(b * t**p for b, t in terms) / math.factorial(p) for p in (k, k - 1))
        row = (self.w.abs() + math.factorial(k) * tiny).sum(
            1
        )  # the weights are multiplied by binomials over k! first
        count, absolute, reach = r if self.summed else 1, self.H.abs() + tiny, self.reach + tiny
        value = row * count * (bump + distance) + (
            1 + _times(absolute, reach).sum(1) if self.fixed else 0
        )
        outer = self.slope * (
            1 + self.slope * _times(absolute, reach.clamp(max=1)).sum(1, keepdim=True)
        )
        spline = math.sqrt(count) * c.cells_per_unit * (steep + 2 * distance) * float(_norm(row))
        spread, up = columns * float(_norm(value)), float(_norm(self.B.flatten()))
        inner, basis = (
            columns * float(_norm(reach)),
            columns * count * len(self.w[0]) * (bump + distance),
        )
        jacobian, down = (
            float(_norm((outer * absolute).flatten())) + spline,
            float(_norm(self.A.flatten())),
        )
        return _Constants(value, jacobian, spread, _product(up, spread), inner, basis, down, up)

    def compose(
        self, c: _Constants, x: float, upstream: float, times: Callable[..., float]
    ) -> Certificate:
        """The bounds as products of the constants; with q = s B^t g, the gradient that arrives at sigma's output."""
        s, once = self.scaling, x if self.static else 1.0
        q = (s, c.up, upstream)
        slope = (s, c.image) if self.static else (s, c.up, c.jacobian, c.down)
        by_parameter = {
            "A": times(*q, c.jacobian, x),
            "B": times(s, c.spread, once, upstream),
            "H": times(*q, c.inner, once),
            "spline_weight": times(*q, c.basis, once),
        }
        gradients = {name: by_parameter[name.rpartition(".")[2]] for name in self.names}
        gradients = {"x": times(*slope, upstream), **gradients}
        return Certificate(c.value, c.jacobian, times(s, c.image, once), times(*slope), gradients)


def _product(*factors: float) -> float:
    return 0.0 if 0.0 in factors else math.prod(factors)


def certify(
    module: core.ANL | core.AuroraLinear, x: float = math.inf, upstream: float = 1.0
) -> Certificate:
    """Bounds for inputs whose rows have norm at most `x` and an upstream gradient of norm `upstream`.

    Of several rows, `upstream` is the sum of the norms of the rows' gradients: gradients of parameters add up over
    rows. Dropout and the base layer are not part of it. With the default, any input, what grows with x is infinite: the
    gradient of A, everything under leaky_relu, the output in static mode.

    Raises ValueError for a negative or NaN argument, and for parameters on the meta device or not finite.
    """
    for name, given in (("x", x), ("upstream", upstream)):
        if not given >= 0:
            raise ValueError(f"{name} is a norm and cannot be {given}")
    layer = _Layer(module, x)
    return layer.compose(layer.suprema(), x, upstream, _product)


def allowance(
    module: core.ANL | core.AuroraLinear,
    x: float,
    upstream: float,
    dtype: torch.dtype,
    rows: int = 1,
) -> Certificate:
    """How far arithmetic in `dtype`, gradients summed over `rows`, may exceed `certify`: docs/theory.md, section 5.

    A few eps, plus one eps of the accumulating type per summand, times the sum of magnitudes. Infinite where
    intermediate results may overflow `dtype`.
    """
    wide, info = torch.float64 if dtype == torch.float64 else torch.float32, torch.finfo(dtype)
    layer = _Layer(module, x)
    summands = (
        layer.config.rank * (layer.w.shape[1] + 1)
        + sum(layer.B.shape)
        + layer.config.spline_order
        + rows
    )
    unit = 16 * info.eps + summands * torch.finfo(wide).eps

    def times(*factors: float) -> float:
        largest = math.prod(max(1.0, f) for f in factors)
        # A product that underflows is off by eps * tiny, which the factors after it magnify.
        return (
            unit * (_product(*factors) + info.tiny * largest) if largest <= info.max else math.inf
        )

    magnitudes = layer.magnitudes(info.tiny)
    limited = magnitudes.value.where(magnitudes.value <= info.max, math.inf)
    bounds = layer.compose(magnitudes, x, upstream, times)
    return dataclasses.replace(
        bounds, value=unit * (limited + info.tiny), jacobian=times(magnitudes.jacobian)
    )


# --- A model ----------------------------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """One call of a layer: the largest |x| of a row, the upstream norm, rows, the coarsest dtype, and norms by name."""

    x: float
    upstream: float
    rows: int
    dtype: torch.dtype
    norms: dict[str, float]


def _leaves(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, or mappings, sequences and dataclasses of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _leaves(part)
    elif dataclasses.is_dataclass(output):
        yield from _leaves(vars(output))


def _measure(model: nn.Module, inputs: Any) -> list[tuple[str, _Measured]]:
    """The calls of adapted layers in one forward and backward pass in evaluation mode, from random cotangents."""
    layers = {name: layer for name, layer in core.layers(model).items() if layer.enabled}
    _check(
        {
            f"{name}.{key}": p
            for name, layer in layers.items()
            for key, p in layer.adapter_parameters().items()
        }
    )
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(
        name: str, layer: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], out: Tensor
    ) -> Tensor:
        calls.append((name, _running.layer_input(args, named).detach().clone(), out))
        return out.clone()  # what the model then does in place leaves the recorded tensor alone

    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_running.evaluating(model))
        for name, layer in layers.items():
            undo.callback(
                layer.register_forward_hook(
                    functools.partial(record, name), with_kwargs=True
                ).remove
            )
        ends = [end for end in _leaves(_running.call(model, inputs)) if end.requires_grad]
        made = [(name, x, out) for name, x, out in calls if out.requires_grad and x.numel()]
        if not ends or not made:
            raise ValueError(
                "no output depends on an adapter that ran; give the model itself, not a compiled one"
            )
        random = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(end.shape, generator=random).to(end) for end in ends]
        # Not backward(): it would write .grad, and wake whoever waits for it.
        grads = torch.autograd.grad(
            ends, [out for *_, out in made], cotangents, materialize_grads=True
        )
        for (name, x, _), grad in zip(made, grads, strict=True):
            _check({f"the input of {name}": x, f"the gradient that reaches {name}": grad})
        return [
            (name, _norms(layers[name], x, grad))
            for (name, x, _), grad in zip(made, grads, strict=True)
        ]


def _norms(layer: core.AuroraLinear, x: Tensor, upstream: Tensor) -> _Measured:
    """Run the adapter alone on a call's input and upstream gradient."""

    def by_row(x: Tensor) -> Tensor:
        return _norm(x.detach().cpu().double().reshape(-1, x.shape[-1]))

    leaves = {"x": x.requires_grad_()} | {
        n: p for n, p in layer.adapter_parameters().items() if p.requires_grad
    }
    change = layer.add_adapter(torch.zeros_like(upstream), x)
    norms = {"output": float(by_row(change).max())}
    grads = torch.autograd.grad(change, list(leaves.values()), upstream, materialize_grads=True)
    for name, grad in zip(leaves, grads, strict=True):
        norms[f"gradient of {name}"] = float(
            by_row(grad).sum() if name == "x" else by_row(grad.flatten())
        )
    z = (
        layer.A.t()
        if layer.config.mode == "static"
        else x.reshape(-1, layer.in_features) @ layer.A.t().to(x.dtype)
    )
    sigma = layer.anl(z := z.detach().requires_grad_())
    rows = [
        torch.autograd.grad(channel.sum(), z, retain_graph=True)[0] for channel in sigma.unbind(-1)
    ]
    norms["jacobian"] = float(
        torch.linalg.matrix_norm(torch.stack(rows, 1).cpu().double(), 2).max()
    )
    norms |= {
        f"value of channel {j}": v for j, v in enumerate(sigma.detach().abs().amax(0).tolist())
    }
    coarsest, sizes = (
        max((x.dtype, upstream.dtype), key=lambda dtype: torch.finfo(dtype).eps),
        by_row(x),
    )
    return _Measured(float(sizes.max()), float(by_row(upstream).sum()), len(sizes), coarsest, norms)


def assert_bounded(model: nn.Module, inputs: Any) -> None:
    """For test suites: no norm measured in a forward and a backward pass exceeds its certificate.

    inputs: a tensor, a tuple of arguments or a mapping of keyword arguments. The pass runs in evaluation mode, from
    random gradients at the outputs, and leaves the model as it was: hooks, `training`, `grad`.
    Raises AssertionError naming layer, quantity and both numbers; ValueError if no adapted layer ran, or if one holds
    NaN or infinity.
    """
    layers = core.layers(model)
    for name, seen in _measure(model, inputs):
        bounds = certify(layers[name], seen.x, seen.upstream).numbers()
        slack = allowance(layers[name], seen.x, seen.upstream, seen.dtype, seen.rows).numbers()
        for quantity, norm in seen.norms.items():
            if not norm <= bounds[quantity] + slack[quantity]:
                raise AssertionError(
                    f"{name or 'the model'}: {quantity} measured {norm:.6g}, above its certificate "
                    f"{bounds[quantity]:.6g} (rounding may add {slack[quantity]:.2g})"
                )


class LayerBounds(NamedTuple):
    """A row of the report: |J| of sigma certified, certified at the start, and measured; the adapter's output likewise.

    tightness: measured over certified |J|. What was measured is None for a layer that did not run.
    """

    name: str
    jacobian: float
    initial: float
    measured: float | None
    tightness: float | None
    output: float
    measured_output: float | None


@dataclasses.dataclass(frozen=True)
class BoundsReport:
    """One row per adapted layer. Prints as a table; `plot` draws it."""

    rows: list[LayerBounds]

    def __str__(self) -> str:
        width = max(5, *(len(row.name) for row in self.rows))
        titles = ("Jacobian", "at start", "measured", "tightness", "output", "measured")
        lines = [f"{'layer':<{width}} " + " ".join(f"{title:>9}" for title in titles)]
        for name, *cells in self.rows:
            lines.append(
                f"{name:<{width}} "
                + " ".join(f"{'-' if c is None else f'{c:.3g}':>9}" for c in cells)
            )
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw the Jacobian norms by layer on matplotlib axes, new ones if None, and return these."""
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError(
                    'drawing needs matplotlib: pip install "aurora-adapters[benchmarks]"'
                ) from error
            axes = pyplot.subplots(figsize=(8, 1.5 + 0.25 * len(self.rows)), layout="constrained")[
                1
            ]
        names = [row.name for row in self.rows][::-1]
        axes.barh(
            names, [row.jacobian for row in self.rows][::-1], color="lightgray", label="certified"
        )
        axes.plot(
            [row.initial for row in self.rows][::-1], names, "k|", label="certified, at the start"
        )
        axes.plot([row.measured for row in self.rows][::-1], names, "o", label="measured")
        axes.set_xlabel("norm of the Jacobian of sigma")
        axes.legend()
        return axes


@functools.cache
def _initial(config: core.AuroraConfig) -> float:
    """The certified Jacobian at the start: the median over 25 fresh layers, without touching the random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return statistics.median(
            certify(core.ANL(config, device="cpu")).jacobian for _ in range(25)
        )


def report_bounds(model: nn.Module, inputs: Any = None) -> BoundsReport:
    """The certified |J| of sigma and size of the adapter's output for each layer, and what `inputs` reach, if given.

    Without inputs the output is bounded for any input. Inputs and errors as in `assert_bounded`.
    """
    seen = [] if inputs is None else _measure(model, inputs)
    rows = []
    for name, layer in core.layers(model).items():
        calls = [call for called, call in seen if called == name]
        certified = certify(layer, max((call.x for call in calls), default=math.inf))
        measured, output = (
            max((c.norms[q] for c in calls), default=None) for q in ("jacobian", "output")
        )
        tightness = None if measured is None else measured / (certified.jacobian or 1.0)
        initial = _initial(layer.config)
        rows.append(
            LayerBounds(
                name, certified.jacobian, initial, measured, tightness, certified.output, output
            )
        )
    return BoundsReport(rows)

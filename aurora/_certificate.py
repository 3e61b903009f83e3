"""What bounds an adapter: suprema of splines, ranges of activations, the constants of a layer.

Everything is computed in float64 on the CPU from the parameters; proofs in docs/theory.md,
sections 2 to 5. `aurora.bounds` multiplies the constants into bounds. Shapes: r rank, k spline
order (degree), n spline weights a channel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora import core

# --- Numbers ------------------------------------------------------------------------------------


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor that holds no values, NaN or infinity."""
    for name, t in tensors.items():
        if t.is_meta:
            raise ValueError(f"{name} holds no values, so nothing bounds it")
        if not t.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so nothing bounds it")


def product(*factors: float) -> float:
    """The product of norms, with 0 * inf = 0: no weight, no contribution.

    Exponents are added apart, so that no part of a product underflows or overflows when the whole
    does not.
    """
    if 0.0 in factors or math.inf in factors:
        return 0.0 if 0.0 in factors else math.inf
    mantissa, exponent = 1.0, 0
    for factor in factors:
        mantissa, moved = math.frexp(mantissa * math.frexp(factor)[0])
        exponent += moved + math.frexp(factor)[1]
    return math.ldexp(mantissa, exponent) if exponent <= 1024 else math.inf


def times(a: Tensor, b: Tensor) -> Tensor:
    """`product`, elementwise."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension; scaled first, as squares of tiny numbers vanish."""
    largest = x.abs().amax(-1)
    unit = x / largest.clamp(min=5e-324).unsqueeze(-1)
    norms: Tensor = largest * torch.linalg.vector_norm(unit, dim=-1)
    return norms.where(largest.isfinite(), largest)  # not infinity over infinity


def spectral(matrix: Tensor) -> float:
    """The spectral norm of one matrix, or the largest of several."""
    if not matrix.isfinite().all():
        return math.inf  # a product that left float64; singular values would be refused
    return float(torch.linalg.matrix_norm(matrix, 2).max())


def spectral_factors(a: Tensor, b: Tensor) -> tuple[float, ...]:
    """Numbers whose product is the spectral norm of a @ b, which may itself underflow."""
    sizes = [matrix.abs().max().clamp(min=5e-324) for matrix in (a, b)]
    return float(sizes[0]), float(sizes[1]), spectral((a / sizes[0]) @ (b / sizes[1]))


def frobenius(matrix: Tensor) -> float:
    """The Frobenius norm."""
    return float(norm(matrix.flatten()))


# --- Splines: exact suprema (docs/theory.md, section 2) -------------------------------------------


@functools.cache
def pieces(k: int) -> Tensor:
    """The uniform B-spline on its k + 1 cells: Bernstein coefficients (cell, k + 1), float64."""

    def coefficient(cell: int, j: int) -> float:
        total = 0  # an integer until it is divided, so exact
        for i in range(cell + 1):
            a = cell - i
            total += (-1) ** i * math.comb(k + 1, i) * a ** (k - j) * (a + 1) ** j
        return float(total) / math.factorial(k)

    rows = []
    for cell in range(k + 1):
        rows.append([coefficient(cell, j) for j in range(k + 1)])
    return torch.tensor(rows, dtype=torch.float64)


def control_points(weights: Tensor, k: int) -> Tensor:
    """Weights (r, n) of order k -> (cells, k + 1, r).

    On each cell the curve lies in the convex hull of its control points and starts and ends at the
    first and the last.
    """
    windows = F.pad(weights, (k, k)).unfold(-1, k + 1, 1)  # (r, cells, k + 1): bases on each cell
    return torch.einsum("rca,aj->cjr", windows, pieces(k).flip(0))


@functools.cache
def _halves(m: int) -> Tensor:
    """De Casteljau: from m control points to those of either half, (2, m, m)."""
    rows = []
    for j in range(m):
        rows.append([math.comb(j, i) / 2**j for i in range(m)])
    left = torch.tensor(rows, dtype=torch.float64)
    return torch.stack([left, left.flip(0, 1)])


def halve(points: Tensor) -> Tensor:
    """Both halves of every cell: control points (cells, m, r) -> (2, cells, m, r)."""
    return torch.einsum("hij,cjr->hcir", _halves(points.shape[1]), points)


def suprema(points: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest `size` (..., r) -> (...), convex, on each of several curves, from above.

    Branch and bound: on a cell it is at most its largest at a control point, at least that at its
    ends. Exact to 1e-12 of the largest; the gap shrinks fourfold with every halving, so that few
    cells survive and 20 rounds suffice.

    Args:
        points: the curves' control points, (curves, cells, m, r).
        size: such as a norm, or one coordinate.

    Returns:
        One number a curve, (curves,).
    """
    curve = torch.arange(len(points)).repeat_interleave(points.shape[1])  # of each cell
    sizes = size(points)  # (curves, cells, m)
    slack = 1e-12 * sizes.abs().amax((1, 2))
    points, sizes = points.flatten(0, 1), sizes.flatten(0, 1)
    if not sizes.isfinite().all():
        return torch.full_like(slack, math.inf)
    reached = torch.full_like(slack, -math.inf)
    for _ in range(60):  # 60 halvings exhaust float64, should rounding keep the test from passing
        ends = torch.maximum(sizes[:, 0], sizes[:, -1])
        reached = reached.scatter_reduce(0, curve, ends, "amax")
        open_cells = sizes.amax(1) > (reached + slack)[curve]
        if not open_cells.any():
            return reached + slack
        points, curve = halve(points[open_cells]).flatten(0, 1), curve[open_cells].repeat(2)
        sizes = size(points)
    return (reached + slack).scatter_reduce(0, curve, sizes.amax(1), "amax")


@functools.cache
def largest_basis(k: int) -> float:
    """The supremum of the norm of all basis functions, reached where all k + 1 are present."""
    return float(suprema(pieces(k).t().view(1, 1, k + 1, k + 1), norm))


# --- Activations ----------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An activation, all of which increase: value, derivative, and the derivative's largest value.

    bell: the derivative is even and falls away from 0; else it rises.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    slope: float
    bell: bool

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest derivative over arguments in [low, high]."""
        if not self.bell:
            return self.derivative(low), self.derivative(high)
        near = torch.where(low * high <= 0, 0.0, torch.minimum(low.abs(), high.abs()))
        return self.derivative(torch.maximum(low.abs(), high.abs())), self.derivative(near)


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda t: 1 - t.tanh().square(), 1.0, True),
    "sigmoid": Activation(torch.sigmoid, lambda t: t.sigmoid() * (-t).sigmoid(), 0.25, True),
    "identity": Activation(lambda t: t, torch.ones_like, 1.0, False),
    "leaky_relu": Activation(
        F.leaky_relu, lambda t: torch.where(t > 0, torch.ones_like(t), 0.01), 1.0, False
    ),
}


# --- One layer (docs/theory.md, sections 3 and 4) -----------------------------------------------


class Constants(NamedTuple):
    """The factors of all bounds; image in several, as their product may underflow.

    value (r,): |sigma_j|. jacobian: |d sigma / d z|. spread: |sigma|, image: |B sigma|,
    inner: |d F / d H|, basis: |d L / d w|, each for one row, or in static mode per unit of |x|.
    down: |A|. up: |B|.
    """

    value: Tensor
    jacobian: float
    spread: float
    image: tuple[float, ...]
    inner: float
    basis: float
    down: float
    up: float


class Layer:
    """An `ANL` or `AuroraLinear` in float64, and its constants for rows of norm at most x.

    Raises ValueError for parameters on the meta device or not finite.
    """

    def __init__(self, module: core.ANL | core.AuroraLinear, x: float) -> None:
        linear = module if isinstance(module, core.AuroraLinear) else None
        parameters = dict(module.named_parameters())
        if linear is not None:
            parameters = linear.adapter_parameters()
        check_finite(parameters)
        own = {n.rpartition(".")[2]: p.detach().cpu().double() for n, p in parameters.items()}
        self.config = c = module.config
        self.names = [name for name, p in parameters.items() if p.requires_grad]
        self.dtype = max((p.dtype for p in parameters.values()), key=lambda d: torch.finfo(d).eps)
        self.static = linear is not None and c.mode == "static"
        self.scaling = 1.0 if linear is None else abs(linear.scaling)
        identity = torch.eye(c.rank, dtype=torch.float64)
        self.A, self.B = own.get("A", identity), own.get("B", identity)
        self.fixed, self.H = "H" in own, own.get("H", torch.zeros_like(identity))
        no_spline = identity.new_zeros(c.rank, c.grid_size + c.spline_order)
        self.w = own.get("spline_weight", no_spline)  # (r, n)
        self.summed = c.spline == "summed"
        self.phi = ACTIVATIONS[c.activation]
        # |z_i| is at most radius_i, |phi(z_i)| at most reach_i; both (r,).
        self.radius = times(norm(self.A), self.A.new_tensor(x))
        if self.static:
            self.radius = self.A.abs().amax(1)
        ends = self.phi.value(torch.stack([-self.radius, self.radius]))
        self.reach = ends.abs().amax(0)

    @property
    def count(self) -> int:
        """How many splines add up in a channel."""
        return self.config.rank if self.summed else 1

    # Values

    def bases(self, z: Tensor) -> Tensor:
        """All basis functions at z (...) -> (n, ...), from the Bernstein form: not core's way."""
        c, k = self.config, self.config.spline_order
        cells = (z - c.grid_range[0]) * c.cells_per_unit + k  # from the start of the support
        starts = torch.arange(c.grid_size + k, dtype=z.dtype).view(-1, *[1] * z.dim())
        t = cells.unsqueeze(0) - starts  # (n, ...)
        cell, inside = t.floor().clamp(0, k), (t >= 0) & (t < k + 1)
        u = torch.where(inside, t - cell, 0.0)
        total = torch.zeros_like(t)
        for j in range(k + 1):
            total += math.comb(k, j) * u**j * (1 - u) ** (k - j) * pieces(k)[cell.long(), j]
        return torch.where(inside, total, 0.0)

    def sigma(self, z: Tensor) -> Tensor:
        """Sigma of every column of z (r, N) -> (r, N)."""
        bases = self.bases(z)  # (n, r, N)
        spline = self.w @ bases.sum(1) if self.summed else torch.einsum("rn,nrc->rc", self.w, bases)
        return spline + self.phi.value(self.H @ self.phi.value(z)) if self.fixed else spline

    def value(self) -> Tensor:
        """Bounds (r,) on |sigma(z)_j|: F is monotone in each activation, S_j has exact extremes."""
        points = control_points(self.w, self.config.spline_order)  # (cells, k + 1, r)
        curves = points.movedim(-1, 0).unsqueeze(-1)  # (r, cells, k + 1, 1)
        both = suprema(torch.cat([curves, -curves]), lambda p: p.squeeze(-1))
        ends = []
        for sign, end in zip((1.0, -1.0), self.count * both.view(2, -1), strict=True):
            if self.fixed:
                worst = torch.where(sign * self.H > 0, self.radius, -self.radius)  # (r, r)
                end = end + sign * self.phi.value(times(self.H, self.phi.value(worst)).sum(1))
            ends.append(end)
        return torch.maximum(*ends)

    # The Jacobian of sigma

    def jacobian(self) -> float:
        """|J_F| + |J_L|, or column by column with F and L seen together, whichever is smaller."""
        points = self.slopes()
        if self.summed:
            spline = math.sqrt(self.config.rank) * float(suprema(points.unsqueeze(0), norm))
        else:
            curves = points.movedim(-1, 0).unsqueeze(-1)  # (r, cells, k, 1)
            spline = float(suprema(curves, norm).max())
        apart = self.phi.slope**2 * spectral(self.H) + spline
        if self.config.spline_order == 1:
            return apart
        return min(apart, self.jacobian_by_columns(points))

    def slopes(self) -> Tensor:
        """Control points (cells, k, r) of S', whose weights are the differences of the spline's."""
        k, w = self.config.spline_order, self.w
        differences = torch.diff(F.pad(w, (1, 1)))
        if k == 1:
            # S' jumps at the knots, and next to one rounding may put each of the three bases
            # that meet on another side.
            differences = F.pad(w.abs(), (2, 2)).unfold(-1, 3, 1).sum(-1)
        return control_points(differences * self.config.cells_per_unit, k - 1)

    def jacobian_by_columns(self, points: Tensor) -> float:
        """sqrt(sum_i sup_t |column i|^2), from the control points of S'.

        Column i of J depends on t = z_i alone, but for the range of the outer slopes.
        """
        for _ in range(6):  # 64 intervals per cell: the loss is then below a percent
            points = halve(points).transpose(0, 1).flatten(0, 1)
        # Beyond the support S' is 0; its two intervals are unbounded.
        low, high = F.pad(points.amin(1).t(), (1, 1)), F.pad(points.amax(1).t(), (1, 1))
        edges = self.edges(len(points))
        total = 0.0
        for i in range(self.config.rank):
            fixed_low, fixed_high = self.fixed_column(i, edges)  # (r, intervals)
            here = torch.ones(self.config.rank, 1, dtype=torch.float64)
            if not self.summed:
                here = torch.eye(self.config.rank, dtype=torch.float64)[:, i : i + 1]
            extreme = torch.maximum(fixed_high + times(here, high), -(fixed_low + times(here, low)))
            total = math.hypot(total, float(norm(extreme.t()).max()))
        return total

    def edges(self, intervals: int) -> Tensor:
        """The ends of equal intervals of the support and of the two half-lines beyond."""
        c = self.config
        margin = c.spline_order / c.cells_per_unit
        low, high = c.grid_range[0] - margin, c.grid_range[1] + margin
        inner = torch.linspace(low, high, intervals + 1, dtype=torch.float64)
        return torch.cat([inner.new_tensor([-math.inf]), inner, inner.new_tensor([math.inf])])

    def fixed_column(self, i: int, edges: Tensor) -> tuple[Tensor, Tensor]:
        """The range of column i of J_F, (r, intervals) each, with z_i in each interval."""
        h = self.H[:, i : i + 1]  # (r, 1)
        alone = self.reach.clone()
        alone[i] = 0
        others = times(self.H, alone).abs().sum(1, keepdim=True)  # (r, 1)
        inner_low, inner_high = self.phi.slopes(edges[:-1], edges[1:])
        u = times(h, self.phi.value(edges))  # (r, edges)
        low, high = torch.minimum(u[:, :-1], u[:, 1:]), torch.maximum(u[:, :-1], u[:, 1:])
        outer_low, outer_high = self.phi.slopes(low - others, high + others)
        least, largest = h * outer_low * inner_low, h * outer_high * inner_high
        return torch.minimum(least, largest), torch.maximum(least, largest)

    # All of them

    def suprema(self) -> Constants:
        """The constants of the bounds."""
        down, up = spectral(self.A), spectral(self.B)
        value, jacobian = self.value(), self.jacobian()
        if self.static:
            sigma, bases = self.sigma(self.A), self.bases(self.A)
            spread, image = spectral(sigma), spectral_factors(self.B, sigma)
            inner = spectral(self.phi.value(self.A))
            basis = spectral(bases.sum(1) if self.summed else bases.movedim(1, 0))
        else:
            spread, inner = float(norm(value)), float(norm(self.reach))
            image = (up, spread)
            basis = largest_basis(self.config.spline_order) * self.count
        return Constants(value, jacobian, spread, image, self.phi.slope * inner, basis, down, up)

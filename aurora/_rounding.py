"""How far rounding may carry a layer beyond its certificate: docs/theory.md, section 5.

The steps of a layer are followed one by one, forward and backward, each with a bound on its size
and on its error. A step that may overflow its dtype has an infinite error, and so has all that
follows. Shapes: r rank, k spline order (degree), n spline weights a channel.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from aurora import _kernels, core
from aurora._certificate import Layer, frobenius, norm, product, times

# --- Arithmetic ---------------------------------------------------------------------------------


class Computed(NamedTuple):
    """A computed tensor: the exact one's norm is at most `size`, the error's at most `error`."""

    size: float
    error: float = 0.0


# What float32 products may be rounded to before they are added up, by the name of PyTorch's option:
# TF32 has 10 bits after the point, bfloat16 7.
_LOWERED = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}


def _float32_products() -> float:
    try:
        return _LOWERED[torch.get_float32_matmul_precision()]
    except RuntimeError:  # lowered by the newer options, for some devices
        return _LOWERED["high"]


class Arithmetic:
    """Arithmetic in one dtype; products of matrices are added up in `sums`, then rounded once."""

    def __init__(self, dtype: torch.dtype, sums: torch.dtype) -> None:
        info, wide = torch.finfo(dtype), torch.finfo(sums)
        self.eps, self.tiny, self.largest = info.eps, info.tiny, info.max
        self.fine, self.least = wide.eps, wide.eps * wide.tiny
        if dtype == torch.float32:
            self.eps = max(info.eps, _float32_products())

    def rounded(self, a: Computed, entries: float) -> Computed:
        """`a` after one rounding of its entries; a number below `tiny` is off by eps * tiny."""
        error = a.error + self.eps * (a.size + a.error + math.sqrt(entries) * self.tiny)
        return Computed(a.size, error if a.size + error <= self.largest else math.inf)

    def product(self, a: Computed, b: Computed, terms: float, entries: float) -> Computed:
        """A product of matrices or vectors, each of whose entries is a sum of `terms`."""
        if math.inf in (a.error, b.error):
            return Computed(product(a.size, b.size), math.inf)  # 0 times infinity is NaN here
        size = product(a.size, b.size)
        error = product(a.size, b.error) + product(a.error, b.size) + a.error * b.error
        error += (terms + 4) * self.fine * (size + error) + terms * self.least * math.sqrt(entries)
        return self.rounded(Computed(size, error), entries)


# --- One layer ----------------------------------------------------------------------------------


class Rounding:
    """The steps of one layer on rows of norm at most x in `dtype`, gradients added up over `rows`.

    outer: the arithmetic of the products with A and B. inner: that of sigma, in float32 or wider.
    stored: that of the parameters, in which their gradients arrive.
    """

    def __init__(self, layer: Layer, x: float, dtype: torch.dtype, rows: int) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.layer, self.exact, self.x, self.rows = layer, layer.suprema(), Computed(x), rows
        self.outer, self.inner = Arithmetic(dtype, wide), Arithmetic(wide, wide)
        self.stored = Arithmetic(layer.dtype, wide)
        self.d_out, self.r, self.d_in = *layer.B.shape, layer.A.shape[1]
        self.A = self.outer.rounded(Computed(frobenius(layer.A)), layer.A.numel())
        self.B = self.outer.rounded(Computed(frobenius(layer.B)), layer.B.numel())
        # In static mode sigma is evaluated on the columns of A.
        self.columns = self.d_in if layer.static else 1
        z = self.outer.product(self.A, self.x, self.d_in, self.r)
        self.lost = math.isinf(z.error) and not layer.static  # z may overflow, and be NaN
        self.shift = self.shifts()
        k, n = layer.config.spline_order, layer.w.shape[1]
        terms = self.r + layer.count * n * (k // 2 + 1) + k + max(rows, self.columns)
        self.unit = 16 * self.inner.eps + terms * self.inner.fine

    # The steps around sigma

    def shifts(self) -> Tensor:
        """How far rounding z = A x moves phi(z) out of its range, (r,)."""
        layer, outer = self.layer, self.outer
        if layer.static:  # z is a column of A, and exact
            return torch.zeros_like(layer.reach)
        relative = 3 * outer.eps + (self.d_in + 4) * outer.fine
        least = outer.eps * outer.tiny + outer.least
        absolute = least * (1 + self.d_in + math.sqrt(self.d_in) * self.x.size)
        return relative * layer.reach + layer.phi.slope * absolute

    @functools.cached_property
    def scaled(self) -> Computed:
        """s sigma(z), or in static mode the matrix s sigma(A), in the layer's dtype."""
        s, error = self.layer.scaling, math.sqrt(self.columns) * float(norm(self.sigma))
        size = self.exact.spread
        if self.layer.static:
            size = frobenius(self.layer.sigma(self.layer.A))
        entries = self.r * self.columns
        return self.outer.rounded(Computed(product(s, size), product(s, error)), entries)

    @functools.cached_property
    def hidden(self) -> Computed:
        """What B is multiplied with: s sigma(z), in static mode s sigma(A) x."""
        if self.layer.static:
            return self.outer.product(self.scaled, self.x, self.d_in, self.r)
        return self.scaled

    def output(self) -> Computed:
        """The adapter's part of the layer's output, one row."""
        return self.outer.product(self.B, self.hidden, self.r, self.d_out)

    def backward(self, upstream: float, rows: int) -> dict[str, Computed]:
        """The gradients of x, A, B, H and spline_weight; norms of rows are added up."""
        outer, r, each = self.outer, self.r, rows**2  # sqrt(each * d): `rows` vectors of d entries
        g = Computed(upstream)
        q = outer.product(self.B, g, self.d_out, each * r)
        B = outer.product(g, self.hidden, rows, self.d_out * r)
        if self.layer.static:
            x = outer.product(self.scaled, q, r, each * self.d_in)
            found = self.through_sigma(outer.product(q, self.x, rows, r * self.d_in))
            A = found.pop("z")
        else:
            found = self.through_sigma(q)
            z = outer.rounded(found.pop("z"), each * r)
            x = outer.product(self.A, z, r, each * self.d_in)
            A = outer.product(z, self.x, rows, r * self.d_in)
        found |= {"A": A, "B": B}
        sizes = {"H": r**2, "spline_weight": self.layer.w.numel()}
        sizes |= {"A": r * self.d_in, "B": r * self.d_out}
        stored = {name: self.stored.rounded(found[name], count) for name, count in sizes.items()}
        return {"x": x} | stored

    # Sigma itself

    def bumps(self) -> tuple[float, float]:
        """Errors of N and h N' in units: those of its terms and of the distance.

        The terms are those of the closed form, largest at the centre, or of the polynomials of
        many points. The distance to a centre, or the place on a cell, is rounded relative to the
        largest of its terms, and |N'| <= 1, |N''| <= 2.
        """
        c, k = self.layer.config, self.layer.config.spline_order
        distance = 2 * max(abs(end) for end in c.grid_range) * c.cells_per_unit + 3 * k
        terms = [(math.comb(k + 1, i), (k + 1) / 2 - i) for i in range(k // 2 + 1)]
        value = sum(b * t**k for b, t in terms) / math.factorial(k)
        slope = sum(b * t ** (k - 1) for b, t in terms) / math.factorial(k - 1)
        value = max(value, *(sum(map(abs, piece)) for piece in core.pieces(k)))
        slope = max(slope, *(k * sum(map(abs, piece)) for piece in _kernels.slopes(k)))
        return value + distance, slope + 2 * distance

    def weights(self) -> Tensor:
        """|w_j|_1 (r,), every weight `tiny` larger, so that what underflows is covered too."""
        return (self.layer.w.abs() + self.inner.tiny).sum(1)

    @functools.cached_property
    def sigma(self) -> Tensor:
        """The errors (r,) of sigma's channels, before they are rounded to the layer's dtype."""
        layer = self.layer
        H, reach = layer.H.abs() + self.inner.tiny, layer.reach + self.inner.tiny
        absolute = self.weights() * layer.count * self.bumps()[0]
        if layer.fixed:
            absolute = absolute + 1 + times(H, reach).sum(1)
        error = self.unit * absolute + layer.phi.slope * times(H, self.shift).sum(1)
        if self.lost:
            return torch.full_like(error, math.inf)
        return error.where(max(1.0, layer.scaling) * absolute <= self.inner.largest, math.inf)

    def value(self) -> Tensor:
        """The errors (r,) of sigma's channels."""
        exact = self.exact.value
        value = self.sigma + self.outer.eps * (exact + self.sigma + self.outer.tiny)
        return value.where(exact + value <= self.outer.largest, math.inf)

    def jacobian(self) -> Computed:
        """The Jacobian of sigma."""
        found = Computed(math.sqrt(self.r) * self.exact.jacobian, self.slope)
        return self.outer.rounded(found, self.r**2)

    @functools.cached_property
    def slope(self) -> float:
        """The error of the Jacobian, before it is rounded to the layer's dtype; Frobenius."""
        layer, steepest = self.layer, self.layer.phi.slope
        H = layer.H.abs() + self.inner.tiny
        reach = (layer.reach + self.inner.tiny).clamp(max=1)
        # An error of u = H phi(z) moves phi'(u), whose own slope is at most 1.
        outer = self.unit * (1 + steepest * times(H, reach).sum(1, keepdim=True))
        outer = outer + times(H, self.shift.clamp(max=1)).sum(1, keepdim=True)
        fixed = steepest * frobenius(outer * H)
        per_unit = math.sqrt(layer.count) * layer.config.cells_per_unit * self.bumps()[1]
        spline = self.unit * per_unit * float(norm(self.weights()))
        out_of_range = self.lost or max(self.largest()) > self.inner.largest
        return math.inf if out_of_range else fixed + spline

    def largest(self) -> tuple[float, float, float]:
        """How much larger than the gradient at sigma the steps to those of z, H and w can get.

        The scale may be multiplied first, and the inverse spacing of knots is last.
        """
        layer, k = self.layer, self.layer.config.spline_order
        s = max(1.0, layer.scaling)
        bumps, slopes = (layer.count * layer.w.shape[1] * each for each in self.bumps())
        inner = 1 + math.sqrt(self.columns) * float(norm(layer.reach))
        fixed = 1 + frobenius(layer.H)
        spline = slopes * max(1.0, k * layer.config.cells_per_unit) * frobenius(layer.w)
        return s * (fixed + spline), s * inner, s * bumps * math.sqrt(self.columns)

    def through_sigma(self, q: Computed) -> dict[str, Computed]:
        """The gradients of z, H and spline_weight from that of s sigma(z)."""
        layer, exact = self.layer, self.exact
        reach = layer.reach + self.inner.tiny
        inner = self.unit * float(norm(reach)) + layer.phi.slope * float(norm(self.shift))
        basis = self.unit * layer.count * layer.w.shape[1] * self.bumps()[0]
        columns = math.sqrt(self.columns)
        z, H, w = self.largest()
        return {
            "z": self._step(q, exact.jacobian, self.slope, z),
            "H": self._step(q, exact.inner, columns * inner, H),
            "spline_weight": self._step(q, exact.basis, columns * basis, w),
        }

    def _step(self, q: Computed, bound: float, error: float, largest: float) -> Computed:
        """s times a linear map of norm `bound`, known to within `error`, applied to q."""
        s, reached = self.layer.scaling, q.size + q.error
        lost = self.lost or math.inf in (q.error, error)  # what arrives may be NaN
        if lost or largest * reached > self.inner.largest:
            return Computed(product(s, bound, q.size), math.inf)
        underflow = self.unit * self.inner.tiny * self.rows * self.r * max(1.0, largest)
        off = product(s, bound, q.error) + product(s, error, reached) + underflow
        return Computed(product(s, bound, q.size), off)

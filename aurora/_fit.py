"""The affine map that stands in for sigma when an adapter is merged: moments of data, and fits.

Derivations: docs/merging.md. Letters in shapes: N rows, r rank.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from aurora import core

METHODS = ("static", "linear", "calibrated")


class Moments:
    """Count, mean (m,) and scatter (m, m) of the rows seen, float64; never the rows themselves.

    A layer's rows are `[z, what goes into B, sigma(A) x]`, so that m = 3 r: 8 (m + m^2) bytes,
    whatever the layer's width.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows (N, m). Means are updated before squares are taken: large offsets cost no digits."""
        if not len(rows):
            return
        rows = rows.cpu().double()
        mean = rows.mean(0)
        centred = rows - mean
        total, shift = self.count + len(rows), mean - self.mean
        between = torch.outer(shift, shift) * (self.count * len(rows) / total)
        self.scatter += centred.t() @ centred + between
        self.mean += shift * (len(rows) / total)
        self.count = total

    def second(self, about_mean: bool) -> Tensor:
        """(m, m): the covariance, or the second moment about 0."""
        covariance = self.scatter / max(self.count, 1)
        return covariance if about_mean else covariance + torch.outer(self.mean, self.mean)

    def is_finite(self) -> bool:
        """Whether all that was seen is."""
        return bool(self.mean.isfinite().all() and self.scatter.isfinite().all())


@dataclasses.dataclass(frozen=True)
class Affine:
    """An affine stand-in for sigma: `M z + K u + c` with u = sigma(A) x.

    M, K (r, r), c (r,), float64. "static" is K = 1; the other methods have K = 0.
    """

    M: Tensor
    K: Tensor
    c: Tensor

    def error(self, moments: Moments, B: Tensor) -> float:
        """Relative error |B (sigma(z) - M z - K u - c)| / |B sigma(z)|, RMS over the rows."""
        r = len(self.c)
        residual = torch.cat([-self.M, torch.eye(r, dtype=torch.float64), -self.K], 1)  # (r, 3r)
        # Products with square roots of the moments, not with the moments: a small error is then no
        # difference of large numbers.
        eigenvalues, vectors = torch.linalg.eigh(moments.second(about_mean=True))
        root = vectors * eigenvalues.clamp(min=0).sqrt()  # (3r, 3r)
        offset = residual @ moments.mean - self.c
        wrong = math.hypot(norm(B @ residual @ root), norm(B @ offset))
        whole = math.hypot(norm(B @ root[r : 2 * r]), norm(B @ moments.mean[r : 2 * r]))
        return wrong / whole if whole else 0.0


def norm(x: Tensor) -> float:
    """The root of the sum of squares of all entries."""
    return float(torch.linalg.vector_norm(x))


def fit(
    layer: core.AuroraLinear, method: str, moments: Moments | None, constant: bool = True
) -> Affine:
    """The affine stand-in for a layer's sigma.

    Args:
        layer: The adapted layer.
        method: "static" (K = 1), "linear" (the first-order expansion at the mean of the data, or
            at 0) or "calibrated" (least squares).
        moments: Those of `[z, what goes into B, sigma(A) x]`; "calibrated" needs them.
        constant: Whether a constant may be used; without, c = 0 and fits go through the origin.

    Returns:
        M, K (r, r) and c (r,), float64.

    Raises:
        ValueError: An unknown method, or "calibrated" without moments.

    Source: docs/merging.md.
    """
    r = layer.config.rank
    zero, one = torch.zeros(r, r, dtype=torch.float64), torch.eye(r, dtype=torch.float64)
    none = torch.zeros(r, dtype=torch.float64)
    static = Affine(zero, one, none)
    if method == "static" or layer.config.mode == "static":
        return static
    at = none if moments is None else moments.mean[:r]
    value, slope = _expand(layer.anl, at)
    if method == "linear":
        return Affine(slope, zero, value - slope @ at if constant else none)
    if method != "calibrated" or moments is None:
        raise ValueError(f'"calibrated" needs batches, and {", ".join(METHODS)} are all there is')
    M = _least_squares(moments.second(about_mean=constant), slope)
    offset = moments.mean[r : 2 * r] - M @ moments.mean[:r] if constant else none
    fitted = Affine(M, zero, offset)
    # The static map is no function of z, and can be nearer: then it is that.
    B = layer.B.detach().cpu().double()
    return min(fitted, static, key=lambda affine: affine.error(moments, B))


def _expand(anl: core.ANL, at: Tensor) -> tuple[Tensor, Tensor]:
    """sigma (r,) and its Jacobian (r, r) at a point (r,), float64 on the CPU."""
    point = at.to(next(anl.parameters()).device)
    with torch.enable_grad():
        jacobian: Tensor = torch.func.jacrev(anl)(point)
    return anl(point).detach().cpu(), jacobian.detach().cpu()


def _least_squares(second: Tensor, slope: Tensor) -> Tensor:
    """M (r, r) from the second moments (3r, 3r) of `[z, sigma, u]`.

    What `slope` leaves over is fitted, with the pseudo-inverse: directions of z that the data do
    not show, up to rounding, keep the slope, so that few or degenerate data are no danger.
    """
    r = len(slope)
    of_z, with_z = second[:r, :r], second[r : 2 * r, :r]
    scale = of_z.diagonal().amax().clamp(min=torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.pinv(of_z / scale, rtol=1e-10, hermitian=True) / scale
    fitted: Tensor = slope + (with_z - slope @ of_z) @ inverse
    return fitted

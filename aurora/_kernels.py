"""Sigma of many points: faster than `core.sigma`, and the same numbers but for rounding.

`core.sigma` is right for a compiler, which fuses its operations, and for few points, where what
costs is the calls. For many points it is the arithmetic. Only k + 1 of all n bumps are not zero at
a point. `many` looks them up, which costs the same on every grid, and takes the points in blocks,
which fit into a processor's cache and bound the memory. Shapes: r rank, N points, k spline order
(degree), n spline weights a channel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora import core
from aurora.core import AuroraConfig

FEW = 2**16  # numbers in the largest tensor of `core.sigma`, up to which it is the faster way
BLOCK = 2**17  # numbers in the tensors of a block, for each of at most 8 threads


def evaluate(
    z: Tensor,
    H: Tensor | None,
    w: Tensor | None,
    grid: core.Grid,
    config: AuroraConfig,
    scale: float,
) -> Tensor:
    """`core.sigma`, z (r, N) -> (r, N), whichever way is faster."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return core.sigma_with_less_memory(z, H, w, grid, config, scale)
    way = best_way(z.numel(), config)
    if not torch.is_grad_enabled():  # there is nothing to keep
        return way.forward(z, H, w, grid, config, scale)
    out = core._Sigma.apply(z, H, w, grid, config, scale, way)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


def best_way(numbers: int, c: AuroraConfig) -> core.Way:
    """The fastest way for a z of so many numbers, without a compiler."""
    few = not c.learnable or c.spread * numbers <= FEW
    return core.ALL_BUMPS if few else NEAR_BUMPS


# --- In blocks ------------------------------------------------------------------------------------


def many(z: Tensor, *rest: Any) -> Tensor:
    """`core.sigma` in blocks, from the bumps that are not zero."""
    config = rest[3]
    # The mean slope of order 1 at a knot takes a bump more than are not zero there.
    sigma = core.sigma if config.spline_order == 1 else _sigma
    blocks = torch.split(z, block_size(z, config), 1)
    return torch.cat([sigma(block, *rest) for block in blocks], 1)


def many_backward(
    ctx: Any, grad: Tensor, z: Tensor, H: Any, w: Tensor
) -> tuple[Tensor | None, ...]:
    """`core.sigma_backward` in blocks, from the bumps that are not zero."""
    spline = None if ctx.config.spline_order == 1 else _spline_backward
    size, of_z, others = block_size(z, ctx.config), [], None
    for g, block in zip(torch.split(grad, size, 1), torch.split(z, size, 1), strict=True):
        grad_z, *rest = core.sigma_backward(ctx, g, block, H, w, spline)
        of_z.append(grad_z)
        others = (
            rest if others is None else [_plus(a, b) for a, b in zip(others, rest, strict=True)]
        )
    return torch.cat(cast(list[Tensor], of_z), 1), *cast(list[Tensor | None], others)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a + b


def block_size(z: Tensor, c: AuroraConfig) -> int:
    """How many columns of z (r, N) to take at once."""
    column = max(4 * len(z), c.grid_size)
    if c.spline_order == 1:
        column = c.spread * len(z)
    return max(1, BLOCK * min(8, torch.get_num_threads()) // column)


NEAR_BUMPS = core.Way(many, many_backward)


# --- One block ------------------------------------------------------------------------------------


def _sigma(z: Tensor, H: Any, w: Tensor, grid: Any, c: AuroraConfig, scale: float) -> Tensor:
    activation = core._ACTIVATIONS[c.activation]
    out = torch.zeros_like(z) if H is None else activation(H @ activation(z))  # (r, N)
    near = Near(z, c)
    padded = F.pad(w, (near.margin, near.margin))  # (r, P)
    if c.spline == "summed":
        totals = near.values(padded.shape[1])  # (P, N)
        return torch.addmm(out, padded, totals, beta=scale, alpha=scale)
    return (out + near.collect(padded, pieces(c.spline_order))).mul_(scale)


def _spline_backward(ctx: Any, grad: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z (r, N), up to k s / h, and of the spline weights w (r, n)."""
    near, steep = Near(z, ctx.config), slopes(ctx.config.spline_order)
    padded = F.pad(w, (near.margin, near.margin))  # (r, P)
    if ctx.config.spline == "summed":
        totals = near.values(padded.shape[1])  # (P, N)
        grad_w = core.scaled_product(padded, ctx.scale, grad, totals.t())  # (r, P)
        through = near.collect(padded.t() @ grad, steep)  # (r, N)
    else:
        grad_w = near.spread(grad.reshape(-1), padded.numel()).view_as(padded) * ctx.scale
        through = near.collect(padded, steep) * grad
    return through, grad_w[:, near.margin : -near.margin]


class Near:
    """The k + 1 bumps that are not zero at points z (r, N): their values, slopes and places.

    With a margin of zeros, spline weights (r, n) become (r, P), and every point lies on a cell
    with k + 1 bumps, those beyond the support on its edge. Places are in the flattened (P, N) if
    the splines are summed over channels, else in the flattened (r, P).
    """

    def __init__(self, z: Tensor, c: AuroraConfig) -> None:
        (r, N), k = z.shape, c.spline_order
        self.shape, self.margin, last = z.shape, k + 1, c.grid_size + 2 * k + 1
        # In place where nothing needs what was there: fresh memory is what takes the time here.
        x = z * c.cells_per_unit
        x = x.add_(self.margin - c.grid_range[0] * c.cells_per_unit)  # in cells
        x = x.clamp(0, last)  # on the first and the last cell all is zero
        u = x.frac()  # the place on the cell
        cell = x.detach().sub_(u.detach()).nan_to_num_(0.0)  # any cell will do for NaN; u stays NaN
        if c.spline == "summed":  # a product of whole floats, exact below 2^24, is the faster one
            places = cell.mul_(N).long().add_(torch.arange(N, device=z.device))
        else:  # P = last + k + 1
            first = (last + k + 1) * torch.arange(r, device=z.device).unsqueeze(1)
            places = cell.long().add_(first)
        self.places = places.view(-1)  # (rN,), of the first bump
        self.step = N if c.spline == "summed" else 1  # to the next one
        self.powers = [u.view(-1)]
        for _ in range(k - 1):
            self.powers.append(self.powers[-1] * self.powers[0])

    def polynomial(self, coefficients: Sequence[float]) -> Tensor:
        """Of u, (rN,), for the coefficients of 1, u, u^2, ..."""
        constant, *others, highest = coefficients
        total = self.powers[len(others)] * highest
        for power, c in zip(self.powers, others, strict=False):
            if c:
                total.add_(power, alpha=c)
        return total.add_(constant) if constant else total

    def values(self, columns: int) -> Tensor:
        """(columns, N): every bump at every point, summed over the channels."""
        total = self.powers[0].new_zeros(columns * self.step)
        for i, piece in enumerate(pieces(self.margin - 1)):
            # In place, as this table is large. Under two `vmap`s torch 2.6 is slow, and warns.
            total[i * self.step :].scatter_add_(0, self.places, self.polynomial(piece))
        return total.view(columns, self.step)

    def spread(self, factor: Tensor, size: int) -> Tensor:
        """Zeros (size,), plus at every place the value of the bump times a factor (rN,)."""
        total = factor.new_zeros(size)
        for i, piece in enumerate(pieces(self.margin - 1)):
            value = self.polynomial(piece) * factor
            # Not in place: `vmap` refuses that where only the points have its dimension.
            ahead = total[i:].scatter_add(0, self.places, value)
            total = torch.cat([total[:i], ahead])
        return total

    def collect(self, table: Tensor, pieces: Sequence[Sequence[float]]) -> Tensor:
        """(r, N): the numbers of a table at the places, times values or slopes, added up."""
        flat, total = table.reshape(-1), torch.empty(0)
        for i, piece in enumerate(pieces):
            found = flat[i * self.step :].index_select(0, self.places)
            value = self.polynomial(piece)
            total = torch.addcmul(total, found, value) if i else found * value
        return total.view(self.shape)


@functools.cache
def pieces(k: int) -> tuple[tuple[float, ...], ...]:
    """The bump of order k from its last cell to its first: coefficients of 1, u, ..., u^k."""

    def coefficient(cell: int, p: int) -> float:  # k! bump = sum_i (-1)^i binom(k + 1, i) (x - i)^k
        terms = ((-1) ** i * math.comb(k + 1, i) * (cell - i) ** (k - p) for i in range(cell + 1))
        return math.comb(k, p) * int(sum(terms)) / math.factorial(k)

    cells = reversed(range(k + 1))
    return tuple(tuple(coefficient(cell, p) for p in range(k + 1)) for cell in cells)


@functools.cache
def slopes(k: int) -> tuple[tuple[float, ...], ...]:
    """The derivatives of `pieces` over k: coefficients of 1, u, ..., u^(k - 1)."""
    return tuple(tuple(p * c / k for p, c in enumerate(piece))[1:] for piece in pieces(k))


core.ANL.evaluate = staticmethod(evaluate)

"""Sigma without a compiler: faster than `core.sigma`, and the same numbers but for rounding.

`core.sigma` is right for a compiler, which fuses its operations. Without one, what costs for few
points is the calls: `few` has fewer. For many points it is the arithmetic. Only k + 1 of all n
bumps are not zero at a point. `many` looks these up, or the one polynomial that a spline is on the
point's cell, and takes the points in blocks, which fit into a processor's cache and bound the
memory. Shapes: r rank, N points, k spline order (degree), n spline weights a channel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora import core
from aurora.core import AuroraConfig, Grid, pieces

FEW = 2**18  # numbers in the largest tensor of all bumps, up to which they are the faster way
COARSE = 16  # numbers that all bumps make of a point, up to which totals take them all as well
BLOCK = 2**17  # numbers in the tensors of a block, for each of at most 8 threads


def evaluate(
    z: Tensor,
    H: Tensor | None,
    w: Tensor | None,
    grid: Grid,
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
    return ALL_BUMPS if not c.learnable or c.spread * numbers <= FEW else NEAR_BUMPS


def one_by_one(c: AuroraConfig) -> bool:
    """Whether splines are looked up one by one, as `Curves`, or the bumps added up, as `Bumps`.

    Summed splines may do either: r^2 look-ups a token are less than n totals for few channels and a
    fine grid.
    """
    return c.spline == "per-channel" or 6 * c.rank**2 <= c.grid_size


# --- All bumps, for few points --------------------------------------------------------------------


def few(z: Tensor, H: Any, w: Any, grid: Grid, c: AuroraConfig, scale: float) -> Tensor:
    """`core.sigma`, where products add up what sums do there: fewer and faster calls."""
    fixed = fixed_part(z, H, c)
    if w is None:
        return scale * fixed
    if c.spline == "summed":
        return from_totals(all_totals(z, grid, c), fixed, w, scale)
    terms = bump_terms(z, grid, c) * w.t().view(w.shape[1], 1, -1, 1)  # (n, I, r, N)
    terms, row = terms.reshape(grid.by_bump.shape[1], -1), fixed.reshape(1, -1)  # (n I, r N)
    return torch.addmm(row, grid.by_bump, terms, beta=scale, alpha=scale).view_as(z)


def one_token(z: Tensor, H: Any, w: Any, grid: Grid, c: AuroraConfig, scale: float) -> Tensor:
    """`core.sigma` of one token, z (r,) -> (r,): products with vectors need fewer views."""
    way = best_way(len(z), c)
    if way is not ALL_BUMPS:
        return way.forward(z.unsqueeze(1), H, w, grid, c, scale).squeeze(1)
    fixed = fixed_part(z, H, c)
    if w is None:
        return scale * fixed
    n, terms = w.shape[1], bump_terms(z, grid, c)  # (n, I, 1, r)
    if c.spline == "summed":
        totals = torch.mv(terms.view(n, -1), grid.channel_row)  # (n,)
        return torch.addmv(fixed, w, totals, beta=scale, alpha=scale)
    terms = (terms * w.t().view(n, 1, 1, -1)).view(-1, len(z))  # (n I, r)
    return torch.addmv(fixed, terms.t(), grid.bump_row, beta=scale, alpha=scale)


def all_totals(z: Tensor, grid: Grid, c: AuroraConfig) -> Tensor:
    """Every bump's sum over the channels of z (r, N) -> (n, N)."""
    terms = bump_terms(z, grid, c).flatten(1, 2)  # (n, I r, N)
    return torch.bmm(grid.by_channel, terms).squeeze(1)


def bump_terms(z: Tensor, grid: Grid, c: AuroraConfig) -> Tensor:
    """`t_i^k` of every bump at z (r, N) -> (n, I, r, N)."""
    power = torch.pow if torch.is_grad_enabled() else Tensor.pow_  # derivatives need what it was
    return power(core.bump_depths(z, grid, c), c.spline_order)


ALL_BUMPS = core.Way(few, core.sigma_backward)


# --- In blocks ------------------------------------------------------------------------------------


def many(z: Tensor, H: Any, w: Any, grid: Grid, c: AuroraConfig, scale: float) -> Tensor:
    """`core.sigma` in blocks, from the bumps that are not zero, or all if they are few."""
    all_bumps = few_bumps(c)
    sigma = few if all_bumps else _sigma
    blocks = torch.split(z, block_size(c, all_bumps), 1)
    return torch.cat([sigma(block, H, w, grid, c, scale) for block in blocks], 1)


def many_totals(z: Tensor, grid: Grid, c: AuroraConfig) -> Tensor:
    """Every bump's sum over the channels of z (r, N) -> (n, N), for an order above 1."""
    all_bumps = few_bumps(c)
    totals = all_totals if all_bumps else near_totals
    blocks = torch.split(z, block_size(c, all_bumps), 1)
    return torch.cat([totals(block, grid, c) for block in blocks], 1)


def many_backward(
    ctx: Any, grad: Tensor, z: Tensor, H: Any, w: Tensor, totals: Any = None
) -> tuple[Tensor | None, ...]:
    """`core.sigma_backward` in blocks, from the bumps that are not zero, or their totals.

    F(z) comes only with the totals, as s sigma(z) follows from the two.
    """
    # The mean slope of order 1 at a knot takes a bump more than are not zero there.
    near = ctx.config.spline_order > 1
    size, of_z, values, others = block_size(ctx.config, not near), [], [], None
    blocks = torch.split(z, size, 1)
    every = [None] * len(blocks) if totals is None else torch.split(totals, size, 1)
    for g, block, known in zip(torch.split(grad, size, 1), blocks, every, strict=True):
        spline: Any = functools.partial(_spline_backward, totals=known)
        grad_z, *rest, value = core.sigma_backward(ctx, g, block, H, w, spline if near else None)
        of_z.append(grad_z)
        if known is not None and value is not None:
            values.append(value)
        others = (
            rest if others is None else [_plus(a, b) for a, b in zip(others, rest, strict=True)]
        )
    value = torch.cat(values, 1) if values else None
    return torch.cat(cast(list[Tensor], of_z), 1), *cast(list[Tensor | None], others), value


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a + b


def few_bumps(c: AuroraConfig) -> bool:
    """Whether sigma of many points takes all bumps too: for totals on a coarse grid, or order 1."""
    return c.spline_order == 1 or (c.spline == "summed" and c.spread <= COARSE)


def block_size(c: AuroraConfig, all_bumps: bool) -> int:
    """How many columns of z (r, N) to take at once."""
    column = 4 * c.rank
    if all_bumps:
        column = c.spread * c.rank
    elif c.spline == "summed":
        column = column * c.rank if one_by_one(c) else max(column, c.grid_size)
    return max(1, BLOCK * min(8, torch.get_num_threads()) // column)


NEAR_BUMPS = core.Way(many, many_backward)


# --- One block ------------------------------------------------------------------------------------


def _sigma(z: Tensor, H: Any, w: Tensor, grid: Grid, c: AuroraConfig, scale: float) -> Tensor:
    if not one_by_one(c):
        return from_totals(near_totals(z, grid, c), fixed_part(z, H, c), w, scale)
    return (fixed_part(z, H, c) + Curves(z, grid, c).values(w)).mul_(scale)


def near_totals(z: Tensor, grid: Grid, c: AuroraConfig) -> Tensor:
    """`all_totals`, (r, N) -> (n, N), from the bumps that are not zero."""
    return Bumps(z, grid, c).totals()


def from_totals(totals: Tensor, fixed: Tensor, w: Tensor, scale: float) -> Tensor:
    """`core.sigma` of summed splines, from the bumps' totals (n, N) and F(z) (r, N)."""
    return torch.addmm(fixed, w, totals, beta=scale, alpha=scale)


def fixed_part(z: Tensor, H: Any, c: AuroraConfig) -> Tensor:
    """F(z), zero where the configuration leaves it out."""
    activation = core._ACTIVATIONS[c.activation]
    return torch.zeros_like(z) if H is None else activation(H @ activation(z))


def _spline_backward(
    ctx: Any,
    grad: Tensor,
    z: Tensor,
    w: Tensor,
    grad_z: Tensor,
    slope: float,
    totals: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of z (r, N), added to `grad_z`, and of the spline weights w (r, n)."""
    if one_by_one(ctx.config):
        through, of_w = Curves(z, ctx.grid, ctx.config).gradients(grad, w)
        grad_w = of_w * ctx.scale
    else:
        bumps = Bumps(z, ctx.grid, ctx.config)
        totals = bumps.totals() if totals is None else totals
        grad_w = core.scaled_product(w, ctx.scale, grad, totals.t())
        through = bumps.slopes(w.t() @ grad)
    return torch.add(grad_z, through, alpha=slope), grad_w


def plus_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total + a b`, in place, but for `torch.func` and `vmap`, which have no rule for that."""
    return (torch.addcmul if is_transformed() else Tensor.addcmul_)(total, a, b)


def is_transformed() -> bool:
    """Whether this runs under `torch.func` or `vmap`."""
    return torch._C._are_functorch_transforms_active()


class Near:
    """Where points z (r, N) lie on the grid, with a margin of k + 1 cells on either side.

    There all is zero on the first and the last cell. `places` are in flattened tables (any, step)
    with a row for every bump or cell, `own` the column of a point; u, from 0 to 1, is the place on
    its cell. Both are (rN,).
    """

    def __init__(self, z: Tensor, grid: Grid, c: AuroraConfig, own: Tensor) -> None:
        self.shape, self.order, self.pieces = z.shape, c.spline_order, grid.pieces
        self.step, self.margin = own.numel(), c.spline_order + 1
        self.cells = c.grid_size + 2 * self.margin
        # In place where nothing needs what was there: fresh memory is what takes the time here.
        x = z * c.cells_per_unit
        x = x.add_(self.margin - c.grid_range[0] * c.cells_per_unit)  # in cells
        x = F.hardtanh_(x, 0, self.cells - 1)
        u = x.frac()
        cell = x.detach().nan_to_num_(self.margin).long()  # any cell will do for NaN; u stays NaN
        out = None if is_transformed() else cell
        self.places = torch.add(own, cell, alpha=self.step, out=out).view(-1)
        self.u = u.view(-1)

    def slopes(self, table: Tensor) -> Tensor:
        """(r, N): the slopes over k of splines with weights (n, step), by column."""
        powers = torch.arange(1, self.margin, dtype=table.dtype, device=table.device)
        return self.horner(self.coefficients(table)[1:] * (powers / self.order).unsqueeze(1))

    def coefficients(self, table: Tensor) -> Tensor:
        """Splines with weights (n, step) on every cell: those of 1, u, ..., u^k, (k + 1, any)."""
        padded = F.pad(table, (0, 0, self.margin, self.margin))
        near = torch.stack([padded[i : i + self.cells] for i in range(self.margin)])
        return self.pieces.t() @ near.view(self.margin, -1)

    def horner(self, coefficients: Tensor) -> Tensor:
        """(r, N): the polynomials of such coefficients, the highest last."""
        *lower, highest = coefficients.unbind()
        total = highest.index_select(0, self.places)
        for row in reversed(lower):
            total = plus_product(row.index_select(0, self.places), total, self.u)
        return total.view(self.shape)


class Bumps(Near):
    """Splines that are summed over the channels: tables have a column for every point's token."""

    def __init__(self, z: Tensor, grid: Grid, c: AuroraConfig) -> None:
        super().__init__(z, grid, c, torch.arange(z.shape[1], device=z.device))

    def totals(self) -> Tensor:
        """(n, N): every bump at every point, summed over the channels."""
        table = self.u.new_zeros(self.cells + self.order, self.step)
        for i, piece in enumerate(pieces(self.order)):
            # In place, as this table is large. Under two `vmap`s torch 2.6 is slow, and warns.
            table[i:].view(-1).scatter_add_(0, self.places, self.polynomial(piece))
        return table[self.margin : -self.margin]

    def slopes(self, table: Tensor) -> Tensor:
        """As above. For few channels from the bumps: most cells hold none of a token's points."""
        if self.shape[0] > self.cells:
            return super().slopes(table)
        padded, total = F.pad(table, (0, 0, self.margin, self.margin)), torch.empty(0)
        for i, piece in enumerate(slopes(self.order)):
            found = padded[i:].view(-1).index_select(0, self.places)
            value = self.polynomial(piece)
            total = plus_product(total, found, value) if i else found * value
        return total.view(self.shape)

    @functools.cached_property
    def powers(self) -> list[Tensor]:
        """u, u^2, ..., u^k."""
        return list(itertools.accumulate([self.u] * self.order, torch.mul))

    def polynomial(self, coefficients: Sequence[float]) -> Tensor:
        """Of u, (rN,), for the coefficients of 1, u, u^2, ..."""
        constant, *others, highest = coefficients
        total = self.powers[len(others)] * highest
        for power, c in zip(self.powers, others, strict=False):
            if c:
                total.add_(power, alpha=c)
        return total.add_(constant) if constant else total


class Curves(Near):
    """Splines that are looked up one by one, spline j at z_j, or, summed, at every z_i.

    Tables have a column for each look-up, r or r^2.
    """

    def __init__(self, z: Tensor, grid: Grid, c: AuroraConfig) -> None:
        self.times = len(z) if c.spline == "summed" else 1
        each = z if self.times == 1 else z.repeat(self.times, 1)
        super().__init__(each, grid, c, torch.arange(len(each), device=z.device).unsqueeze(1))

    def values(self, w: Tensor) -> Tensor:
        """(r, N): the splines of weights w (r, n)."""
        curves = self.horner(self.coefficients(self.repeated(w).t()))
        return curves if self.times == 1 else curves.view(len(w), self.times, -1).sum(1)

    def gradients(self, grad: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Those of z, over k, and of w from that of the splines (r, N)."""
        each = self.repeated(grad)
        of_z, of_w = self.slopes(self.repeated(w).t()) * each, self.spread(each).t()
        if self.times == 1:
            return of_z, of_w
        of_z = of_z.view(self.times, *grad.shape).sum(0)
        return of_z, of_w.reshape(len(w), self.times, -1).sum(1)

    def repeated(self, rows: Tensor) -> Tensor:
        """A row for each look-up from one for each spline."""
        return rows if self.times == 1 else rows.repeat_interleave(self.times, 0)

    def spread(self, factor: Tensor) -> Tensor:
        """(n, r): every bump's sum over a channel's points, times a factor (r, N)."""
        first, us = factor.reshape(-1), [self.u] * self.order
        powers = list(itertools.accumulate(us, torch.mul, initial=first))
        # In place, but for `vmap`, which has no rule for that on torch 2.6.
        add = torch.scatter_add if is_transformed() else Tensor.scatter_add_
        rows = [p.new_zeros(self.cells * self.step) for p in powers]
        sums = torch.stack([add(r, 0, self.places, p) for r, p in zip(rows, powers, strict=True)])
        each = (self.pieces @ sums).view(self.margin, self.cells, self.step)  # on every cell
        total = each[0, self.margin : -1]
        for i in range(1, self.margin):  # bump i is on cell m - i that of weight m
            total = total + each[i, self.margin - i : -1 - i]
        return total


@functools.cache
def slopes(k: int) -> tuple[tuple[float, ...], ...]:
    """The derivatives of `core.pieces` over k: coefficients of 1, u, ..., u^(k - 1)."""
    return tuple(tuple(p * c / k for p, c in enumerate(piece))[1:] for piece in pieces(k))


core.ANL.evaluate = staticmethod(evaluate)

"""A linear layer and its adapter at once: core's numbers but for rounding, in less time and memory.

In training, autograd by itself computes the gradient of the input twice, for the base and for the
adapter, and adds the two up. Each is as large as the input. Here the adapter's product adds to the
base's in place, which takes a third off the most memory that a layer's step holds. Each narrow
product has the layout that is fastest, and one token waits for fewer calls. Shapes: N rows, r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora import _kernels, core
from aurora.core import ANL, AuroraLinear, as_dtype, narrow_product

_one_by_one = AuroraLinear.adapted


def adapted(self: AuroraLinear, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer gives with its adapter, at once where that is the same."""
    if len(args) == 1 and not kwargs and self.original.forward is nn.Linear.forward:
        own, anl = self._parameters, cast(ANL, self._modules["anl"])
        out = at_once(self, args[0], own.get("A"), own.get("B"), anl, self.training)
        if out is not None:
            return out
    return _one_by_one(self, *args, **kwargs)


def at_once(
    base: nn.Module, x: Tensor, A: Any, B: Any, anl: ANL, training: bool = False
) -> Tensor | None:
    """`x W^T + b + s B sigma(A x)` for x (..., in_features); W and b are the base's, an nn.Linear.

    None where that would not be what the two do one by one. The questions are quick, as they are a
    tenth of what an adapter costs for one token.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or _kernels.is_transformed():
        return None  # they see the operations better one by one, or have no rule for one in place
    c, grid = anl.config, anl.grid
    W: Any = base._parameters.get("weight")
    b: Any = base._parameters.get("bias", False)  # None: it has none; False: it is computed
    H: Any = anl._parameters.get("H", False) if c.fixed else None
    w: Any = anl._parameters.get("spline_weight", False) if c.learnable else None
    # None may be sharded, quantised or computed.
    if not (type(W) is type(A) is type(B) is nn.Parameter):
        return None
    if not (type(b) in _OR_NONE and type(H) in _OR_NONE and type(w) in _OR_NONE):
        return None
    learns = torch.is_grad_enabled()
    autocast = torch._C._is_any_autocast_enabled() and core.autocast_is_on(x.device)
    differs = c.mode == "static" or (c.dropout and training) or is_watched(anl)
    if differs or (learns and (W.requires_grad or (b is not None and b.requires_grad))):
        return None
    if autocast and x.is_floating_point() and torch.float64 not in (x.dtype, W.dtype):
        x = as_dtype(x, torch.get_autocast_dtype(x.device.type))
    elif x.dtype != W.dtype:
        return None
    if x.device != grid.one.device or (x.dtype == torch.float64 and grid.one.dtype != x.dtype):
        return None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    way = _kernels.best_way(rows.shape[0] * c.rank, c)
    run: Any = _AtOnce.apply if learns else _forward
    with core.full_precision(x) if autocast else _NOTHING:  # the products have its dtype already
        out: Tensor = run(rows, A, B, H, w, W, b, grid, c, way)[0]
    return out if x.dim() == 2 else out.view(*x.shape[:-1], W.shape[0])


_OR_NONE = (nn.Parameter, type(None))
_NOTHING = contextlib.nullcontext()


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: by hooks or another forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _forward(
    x: Tensor,
    A: Any,
    B: Any,
    H: Any,
    w: Any,
    W: Any,
    b: Any,
    grid: Any,
    c: Any,
    way: core.Way,
    with_totals: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x (N, in_features) -> the output (N, out_features), z = A x and s sigma(z), both (r, N).

    And the totals of the bumps (n, N), if they are wanted.
    """
    dtype, wide = x.dtype, grid.one.dtype
    out = F.linear(x, as_dtype(W, dtype), as_dtype(b, dtype))
    z = as_dtype(narrow_product(as_dtype(A, dtype), x), wide).contiguous()
    totals = way.totals(z, grid, c) if with_totals else None
    y = as_dtype(_sigma(z, as_dtype(H, wide), as_dtype(w, wide), grid, c, way, totals), dtype)
    return out.addmm_(y.t(), as_dtype(B, dtype).t()), z, y, totals


def _sigma(
    z: Tensor, H: Any, w: Any, grid: Any, c: core.AuroraConfig, way: core.Way, totals: Any
) -> Tensor:
    """`s sigma(z)` (r, N), quickly where the totals of the bumps are known."""
    if totals is None:
        return way.forward(z, H, w, grid, c, c.scaling)
    return core.sigma(z, H, w, grid, c, c.scaling, totals)


def _keeps_totals(inputs: Sequence[Any], needs_y: bool) -> bool:
    """Whether the backward gets the totals of the bumps (n, N) in place of s sigma(z) (r, N).

    With them s sigma(z) takes a few operations more, without them every spline anew. For few points
    the operations count.
    """
    x, *_, grid, c, way = inputs
    smaller = (c.grid_size + c.spline_order) * grid.one.itemsize <= c.rank * x.itemsize
    pays = way is _kernels.NEAR_BUMPS or not needs_y
    return c.learnable and c.spline == "summed" and smaller and pays


class _AtOnce(torch.autograd.Function):
    """x (N, in_features), A, B, H, w -> what `_forward` gives, which is constant in all the rest.

    z and s sigma(z) are outputs so that second derivatives pass through them.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, A, B, H, w, W, b, grid, c, way = inputs
        ctx.grid, ctx.config, ctx.way, ctx.scale, ctx.dtype = grid, c, way, c.scaling, x.dtype
        of_x, of_A, of_B, *_ = ctx.needs_input_grad
        keep = _keeps_totals(inputs, of_B)
        out, z, y, totals = _forward(x, A, B, H, w, W, b, grid, c, way, keep)
        kept = (x if of_A else None, A if of_x else None, y if of_B and totals is None else None)
        ctx.save_for_backward(*kept, B, H, w, W, z, totals)
        ctx.save_for_forward(x, A, y, B, H, w, W, z, totals)
        ctx.set_materialize_grads(False)
        return out, z, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing there is no second time
        with core.full_precision(saved[3]):
            return *_gradients(ctx, saved, grads, ctx.needs_input_grad), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # As in `core._Sigma.jvp`: the transpose of the backward, which is linear in the gradients.
        given = [i for i, tangent in enumerate(tangents) if tangent is not None]
        needed = [i in given for i in range(3)]
        _, _, y, _, _, _, W, z, _ = saved = ctx.saved_tensors
        start = z.new_zeros(z.shape[1], len(W), dtype=ctx.dtype), z * 0, y * 0

        def back(*grads: Tensor) -> list[Any]:
            found = _gradients(ctx, saved, grads, needed)
            return [found[i] for i in given]

        transpose = torch.func.vjp(back, *start)[1]
        return cast(tuple[Tensor, ...], transpose([tangents[i] for i in given]))


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, A, B, H and w, of the first three where they are needed."""
    x, A, y, B, H, w, W, z, totals = saved
    if torch.is_grad_enabled():
        totals = None  # second derivatives need them as they follow from z
    grad, of_z, of_y = grads  # the last two in second derivatives only
    dtype = ctx.dtype
    if grad is None:
        grad = z.new_zeros(z.shape[1], len(W), dtype=dtype)
    through = narrow_product(as_dtype(B, dtype).t().contiguous(), grad)  # (r, N)
    through = as_dtype(through if of_y is None else through + of_y, z.dtype)
    H, w = as_dtype(H, z.dtype), as_dtype(w, z.dtype)
    grad_z, grad_H, grad_w = ctx.way.backward(ctx, through, z, H, w, totals)
    grad_z = as_dtype(grad_z if of_z is None else grad_z + of_z, dtype)
    grad_x = grad_A = grad_B = None
    if needed[0]:
        plain = of_z is None and of_y is None and not _kernels.is_transformed()
        add = Tensor.addmm_ if plain else torch.addmm  # in place, where all or none are batched
        grad_x = add(grad @ as_dtype(W, dtype), grad_z.t(), as_dtype(A, dtype))
    if needed[1]:
        grad_A = grad_z @ x
    if needed[2]:
        if y is None:
            y = as_dtype(_sigma(z, H, w, ctx.grid, ctx.config, ctx.way, totals), dtype)
        grad_B = (y @ grad).t()
    return grad_x, grad_A, grad_B, grad_H, grad_w


AuroraLinear.adapted = adapted  # type: ignore[method-assign]

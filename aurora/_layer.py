"""A linear layer and its adapter at once: core's numbers but for rounding, in less time and memory.

In training, autograd by itself computes the gradient of the input twice, for the base and for the
adapter, and adds the two up. Each is as large as the input. Here the adapter's product adds to the
base's in place, which takes a third off the most memory that a layer's step holds. Each narrow
product has the layout that is fastest, and one token waits for fewer calls. Shapes: N rows, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora import _kernels, core
from aurora._operations import dropout_mask, narrow_product, transposed
from aurora.core import ANL, AuroraConfig, AuroraLinear, Grid, as_dtype

_one_by_one = AuroraLinear.adapted
FEW_NUMBERS = 2**16  # in x, up to which converting them takes less than converting A and B


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
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return None  # they see the operations better one by one
    c, grid, inner = anl.config, anl.grid, anl._parameters
    W: Any = base._parameters.get("weight")
    b: Any = base._parameters.get("bias", False)  # None: it has none; False: it is computed
    H: Any = inner.get("H", False) if c.fixed else None
    w: Any = inner.get("spline_weight", False) if c.learnable else None
    # None may be sharded, quantised or computed.
    if not (type(W) is type(A) is type(B) is nn.Parameter):
        return None
    if not (type(b) in _OR_NONE and type(H) in _OR_NONE and type(w) in _OR_NONE):
        return None
    learns = torch.is_grad_enabled()
    if learns and (W.requires_grad or (b is not None and b.requires_grad)):
        return None
    if c.mode == "static" or is_watched(anl):
        return None
    if _kernels.is_transformed():  # they have no rule for a product in place
        return None
    autocast = torch._C._is_any_autocast_enabled() and core.autocast_is_on(x.device)
    if autocast and x.is_floating_point() and torch.float64 not in (x.dtype, W.dtype):
        x = as_dtype(x, torch.get_autocast_dtype(x.device.type))
    elif x.dtype is not W.dtype:
        return None
    if x.device != grid.one.device or (x.dtype is torch.float64 is not grid.one.dtype):
        return None
    run: Any = _AtOnce.apply if learns else _forward
    if autocast:
        run = _in_full_precision(run)  # the products have autocast's dtype already
    dropout = c.dropout if training else 0.0
    out: Tensor = run(x, A, B, H, w, W, b, grid, c, dropout)[0]
    return out


_OR_NONE = (nn.Parameter, type(None))


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: by hooks or another forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _in_full_precision(run: Callable[..., Any]) -> Callable[..., Any]:
    def inner(x: Tensor, *others: Any) -> Any:
        with core.full_precision(x):
            return run(x, *others)

    return inner


def _forward(*inputs: Any, learns: bool = False) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """x (..., in_features) -> the output (..., out_features), z = A x and s sigma(z), both (r, N).

    And what else the backward wants, or None: the totals of the bumps (n, N), dropout's mask. In
    inference both are (r,) for one token.
    """
    x, A, B, H, w, W, b, grid, c, dropout = inputs
    dtype, wide, totals, mask = x.dtype, grid.one.dtype, None, None
    W, b, H, w = as_dtype(W, dtype), as_dtype(b, dtype), as_dtype(H, wide), as_dtype(w, wide)
    out = F.linear(x, W, b).contiguous()  # of x as it is: of its rows it may round differently
    inner = dtype if learns or x.numel() > FEW_NUMBERS else wide
    A, B, x = as_dtype(A, inner), as_dtype(B, inner), as_dtype(x, inner)
    if x.numel() == x.shape[-1] and inner is wide and not (learns or dropout):
        z = torch.mv(A, x.reshape(-1))  # (r,)
        y = _kernels.one_token(z, H, w, grid, c, c.scaling)
        row = out.view(-1)
        row.addmv_(B, y) if inner is dtype else row.add_(torch.mv(B, y))
        return out, z, y, totals, mask
    x = as_rows(x)
    if dropout:
        mask = dropout_mask(x, dropout)
        x = x * mask
    z = as_dtype(narrow_product(A, x), wide).contiguous()
    if dropout:  # z is small, and wide enough to be scaled without harm
        z.mul_(1 / (1 - dropout))
    way = _kernels.best_way(z.numel(), c)
    if learns and _keeps_totals(way, dtype, grid, c):
        totals = _kernels.many_totals(z, grid, c)
        y = _kernels.from_totals(totals, _kernels.fixed_part(z, H, c), w, c.scaling)
    else:
        y = way.forward(z, H, w, grid, c, c.scaling)
    y = as_dtype(y, inner)
    rows, up = as_rows(out), B.t()
    rows.addmm_(transposed(y), up) if inner is dtype else rows.add_(transposed(y) @ up)
    return out, z, y, totals, mask


def as_rows(x: Tensor) -> Tensor:
    """(..., any) -> (N, any)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _keeps_totals(way: core.Way, dtype: torch.dtype, grid: Grid, c: AuroraConfig) -> bool:
    """Whether the backward gets the totals of the bumps (n, N) in place of s sigma(z) (r, N).

    With them s sigma(z) takes an operation more, without them every spline anew.
    """
    smaller = (c.grid_size + c.spline_order) * grid.one.itemsize <= c.rank * dtype.itemsize
    return way is _kernels.NEAR_BUMPS and c.spline_order > 1 and c.spline == "summed" and smaller


class _AtOnce(torch.autograd.Function):
    """x (..., in_features), A, B, H, w -> what `_forward` gives; it is constant in all the rest.

    z and s sigma(z) are outputs so that second derivatives pass through them.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, A, B, H, w, W, _, ctx.grid, ctx.config, ctx.dropout = inputs
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, ctx.config.scaling
        out, z, y, totals, mask = _forward(*inputs, learns=True)
        ctx.way = _kernels.best_way(z.numel(), ctx.config)
        of_x, of_A, of_B, *_ = ctx.needs_input_grad
        kept = (x if of_A else None, A if of_x else None, y if of_B and totals is None else None)
        ctx.save_for_backward(*kept, totals, mask if of_x or of_A else None, B, H, w, W, z)
        ctx.save_for_forward(x, A, y, totals, mask, B, H, w, W, z)
        ctx.set_materialize_grads(False)
        return out.detach(), z, y  # it may be a view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing there is no second time
        with core.full_precision(saved[-1]):
            return *_gradients(ctx, saved, grads, ctx.needs_input_grad), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # As in `core._Sigma.jvp`: the transpose of the backward, which is linear in the gradients.
        given = [i for i, tangent in enumerate(tangents) if tangent is not None]
        needed = [i in given for i in range(3)]
        _, _, y, *_, W, z = saved = ctx.saved_tensors
        start = z.new_zeros(*ctx.shape[:-1], len(W), dtype=ctx.dtype), z * 0, y * 0

        def back(*grads: Tensor) -> list[Any]:
            found = _gradients(ctx, saved, grads, needed)
            return [found[i] for i in given]

        transpose = torch.func.vjp(back, *start)[1]
        return cast(tuple[Tensor, ...], transpose([tangents[i] for i in given]))


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, A, B, H and w, of the first three where they are needed."""
    x, A, y, totals, mask, B, H, w, W, z = saved
    if torch.is_grad_enabled():
        totals = None  # second derivatives need them as they follow from z
    grad, of_z, of_y = grads  # the last two in second derivatives only
    dtype = ctx.dtype
    if grad is None:
        grad = z.new_zeros(z.shape[1], len(W), dtype=dtype)
    grad = as_rows(grad)
    through = narrow_product(as_dtype(B, dtype).t().contiguous(), grad)  # (r, N)
    through = as_dtype(through if of_y is None else through + of_y, z.dtype)
    H, w = as_dtype(H, z.dtype), as_dtype(w, z.dtype)
    known = {} if totals is None else {"totals": totals}
    grad_z, grad_H, grad_w, fixed = ctx.way.backward(ctx, through, z, H, w, **known)
    grad_z = as_dtype(grad_z if of_z is None else grad_z + of_z, dtype)
    grad_z = grad_z * (1 / (1 - ctx.dropout)) if ctx.dropout else grad_z
    grad_x = grad_A = grad_B = None
    if needed[0]:
        # Only where all or none are batched.
        in_place = of_z is None and of_y is None and not _kernels.is_transformed()
        W, A = as_dtype(W, dtype), as_dtype(A, dtype)
        grad_x = _gradient_of_x(grad, W, grad_z, A, mask, in_place).view(ctx.shape)
    if needed[1]:
        x = as_rows(x)
        grad_A = grad_z @ (x if mask is None else x * mask)
    if needed[2]:
        if y is None and totals is not None:
            fixed = torch.zeros_like(z) if fixed is None else fixed
            y = _kernels.from_totals(totals, fixed, w, ctx.scale)
        elif y is None:
            y = ctx.way.forward(z, H, w, ctx.grid, ctx.config, ctx.scale)
        grad_B = (as_dtype(y, dtype) @ grad).t()
    return grad_x, grad_A, grad_B, grad_H, grad_w


def _gradient_of_x(
    grad: Tensor, W: Tensor, grad_z: Tensor, A: Tensor, mask: Tensor | None, in_place: bool
) -> Tensor:
    """`grad W + (grad_z^T A) mask`, one of the two products added to the other."""
    add, multiply = (Tensor.addmm_, Tensor.mul_) if in_place else (torch.addmm, torch.mul)
    if mask is None:
        return add(grad @ W, grad_z.t(), A)
    return add(multiply(grad_z.t() @ A, mask), grad, W)


AuroraLinear.adapted = adapted  # type: ignore[method-assign]

"""AuroRA in one file: nonlinear low-rank adaptation of linear layers, in plain PyTorch. Copy it and it works.

A frozen layer `W x + b` becomes `W x + b + s B sigma(A x)`. LoRA is the case sigma(z) = z. Here sigma is the adaptive
nonlinear layer (ANL), a few numbers per adapted layer that bend the r hidden channels between A and B:

    sigma(z) = F(z) + L(z),    F(z) = tanh(H tanh(z)),    L = cubic B-splines on a uniform grid over [-1, 1].

Source: Dong, Zhu, Song, Wang, "AuroRA: Breaking Low-Rank Bottleneck of LoRA with Nonlinear Mapping", NeurIPS 2025,
arXiv:2505.18738. Shapes: N rows (batch times tokens), r rank, G grid cells, k spline order (degree), n = G + k bases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Each activation beside its derivative in terms of its own output, so that the backward never needs the input again.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda grad, out: torch.ops.aten.tanh_backward(grad, out)),
    "sigmoid": (torch.sigmoid, lambda grad, out: torch.ops.aten.sigmoid_backward(grad, out)),
    "leaky_relu": (F.leaky_relu, lambda grad, out: torch.ops.aten.leaky_relu_backward(grad, out, 0.01, True)),
}


@dataclasses.dataclass(frozen=True)
class AuroraConfig:
    """The options of an adapter; the defaults are the paper's. A bad value raises ValueError.

    rank: r, width of the hidden vector `z = A x`. alpha: the output is scaled by `alpha / rank`. mode: "dynamic" trains
    `B sigma(A x)`; "static" trains `B sigma(A) x`, which merges exactly. spline: "summed", every output channel applies
    its spline to all input channels and adds up, as the authors' code does; "per-channel", channel j sees only z_j.
    fixed, learnable: keep F, keep L (the paper's ablations). activation: "tanh", "leaky_relu" or "sigmoid", for F.
    grid_size: G cells. spline_order: degree k, 1 to 8. grid_range: its ends. dropout: on the adapter's input.
    """

    rank: int = 2
    alpha: float = 4.0
    mode: str = "dynamic"
    spline: str = "summed"
    fixed: bool = True
    learnable: bool = True
    activation: str = "tanh"
    grid_size: int = 5
    spline_order: int = 3
    grid_range: tuple[float, float] = (-1.0, 1.0)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.grid_range
        for name, valid, rule in (
            ("rank", type(self.rank) is int and self.rank >= 1, "an int of at least 1"),
            ("alpha", math.isfinite(self.alpha), "finite"),
            ("mode", self.mode in ("dynamic", "static"), '"dynamic" or "static"'),
            ("spline", self.spline in ("summed", "per-channel"), '"summed" or "per-channel"'),
            ("fixed", isinstance(self.fixed, bool), "True or False"),
            ("learnable", type(self.learnable) is bool and (self.learnable or self.fixed), "True, or False if fixed"),
            ("activation", self.activation in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}"),
            ("grid_size", type(self.grid_size) is int and 1 <= self.grid_size <= 10_000, "an int from 1 to 10,000"),
            ("spline_order", type(self.spline_order) is int and 1 <= self.spline_order <= 8, "an int from 1 to 8"),
            ("grid_range", -math.inf < low < high < math.inf, "two finite numbers in rising order"),
            ("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        # Lists and NumPy's or PyTorch's numbers are welcome, but would be neither hashable nor JSON.
        self.__dict__.update(alpha=float(self.alpha), dropout=float(self.dropout), grid_range=(float(low), float(high)))

    @property
    def cells_per_unit(self) -> float:
        """1 / h, the inverse of the knot spacing."""
        return self.grid_size / (self.grid_range[1] - self.grid_range[0])


def _configure(rank: int | AuroraConfig, options: Mapping[str, Any]) -> AuroraConfig:
    return dataclasses.replace(rank, **options) if isinstance(rank, AuroraConfig) else AuroraConfig(rank, **options)


# On a uniform grid every basis function is the same bump. With d the signed distance to its centre in cells, c =
# (k + 1) / 2 its half-width and t_i = max(c - |d| - i, 0), it needs no recursion and no branches (docs/theory.md):
#     k! N(d) = sum_i (-1)^i binom(k + 1, i) t_i^k,   i = 0 .. floor(k / 2).
# The binomials join the weights. Columns are points, as in z = A x: operations run along N, which is long, not along r.


class _Grid(NamedTuple):
    """The constants of a grid: centres (n, 1, 1, 1) in cells, reach c - i (I, 1, 1), binomials / k! (1, I), and 1."""

    centers: Tensor
    reach: Tensor
    binomials: Tensor
    one: Tensor

    @classmethod
    def of(cls, c: AuroraConfig, dtype: torch.dtype, device: torch.device) -> _Grid:
        k, terms = c.spline_order, range(c.spline_order // 2 + 1)
        make = functools.partial(torch.tensor, dtype=dtype, device=device)
        centers = make([c.grid_range[0] * c.cells_per_unit + (1 - k) / 2 + g for g in range(c.grid_size + k)])
        binomials = make([[(-1) ** i * math.comb(k + 1, i) / math.factorial(k) for i in terms]])
        reach = make([(k + 1) / 2 - i for i in terms])
        return cls(centers.view(-1, 1, 1, 1), reach.view(-1, 1, 1), binomials, make(1.0))


def _sigma(z: Tensor, H: Tensor | None, bumps: Tensor | None, grid: _Grid, s: float, config: AuroraConfig) -> Tensor:
    """`s * sigma(z)`, (r, N) -> (r, N): the definition of the adaptive nonlinear layer. bumps (r, nI): see ANL."""
    activation, _ = _ACTIVATIONS[config.activation]
    fixed = torch.zeros_like(z) if H is None else activation(H @ activation(z))
    if bumps is None:
        return s * fixed
    distance = torch.sub(grid.centers, z, alpha=config.cells_per_unit).abs()  # (n, 1, r, N)
    powers = F.relu(grid.reach - distance) ** config.spline_order  # (n, I, r, N)
    if config.spline == "summed":  # every spline reads all channels, so that their powers can be added up first
        return torch.addmm(fixed, bumps, powers.sum(2).flatten(0, 1), beta=s, alpha=s)
    powers = powers.flatten(0, 1).transpose(0, 1)  # (r, nI, N): one product of matrices a channel
    return torch.baddbmm(fixed.unsqueeze(1), bumps.unsqueeze(1), powers, beta=s, alpha=s).squeeze(1)


class _Sigma(torch.autograd.Function):
    """`_sigma` with its derivatives by hand: where autograd would keep every step, this keeps z and recomputes."""

    generate_vmap_rule = True
    _sigma.__signature__ = inspect.signature(_sigma)  # type: ignore  # apply() asks at every call; that is dear
    forward = staticmethod(_sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.grid, ctx.scale, ctx.config = inputs[3:]
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, H, bumps = ctx.saved_tensors
        grad_z = grad_H = grad_bumps = None
        # Products take the scale along: with beta = 0, addmm looks at nothing but the shape of its first argument.
        times_scale = functools.partial(torch.addmm, beta=0, alpha=ctx.scale)
        with _full_precision(z):
            if H is not None:
                activation, derivative = _ACTIVATIONS[ctx.config.activation]
                inner = activation(z)
                outer = derivative(grad, activation(H @ inner))
                grad_z, grad_H = derivative(times_scale(z, H.t(), outer), inner), times_scale(H, outer, inner.t())
            if bumps is not None:
                k, cells = ctx.config.spline_order, ctx.config.cells_per_unit
                grad_z = torch.zeros_like(z) if grad_z is None else grad_z
                d = torch.sub(ctx.grid.centers, z, alpha=cells)  # (n, 1, r, N)
                # Not sgn, whose 0 would wipe out second derivatives; at the corners of order 1, the mean slope.
                sign = d.sgn() if k == 1 else ctx.grid.one.copysign(d)
                t = F.relu(edge := torch.addcmul(ctx.grid.reach, sign, d, value=-1))  # (n, I, r, N)
                power = (edge.sign() + 1) / 2 if k == 1 else t ** (k - 1)
                value, slope = (power * t).flatten(0, 1), (power * sign).flatten(0, 1)  # (nI, r, N)
                if ctx.config.spline == "summed":
                    grad_bumps = times_scale(bumps, grad, value.sum(1).t())
                    through = (slope * (bumps.t() @ grad).unsqueeze(1)).sum(0)
                else:
                    grad_bumps = torch.bmm(grad.unsqueeze(1), value.permute(1, 2, 0)).squeeze(1) * ctx.scale
                    through = torch.bmm(bumps.unsqueeze(1), slope.transpose(0, 1)).squeeze(1) * grad
                grad_z = torch.add(grad_z, through, alpha=k * cells * ctx.scale)
        return grad_z, grad_H, grad_bumps, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # The backward is linear in the gradient it is given, and its transpose is the derivative along the tangents.
        given = [i for i, primal in enumerate(ctx.saved_tensors) if primal is not None]
        start = torch.zeros_like(ctx.saved_tensors[0])
        transpose = torch.func.vjp(lambda grad: [_Sigma.backward(ctx, grad)[i] for i in given], start)[1]
        return transpose([tangents[i] for i in given])[0]  # type: ignore[no-any-return]


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of the nonlinear arithmetic: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _full_precision(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: inside the ANL every matrix is r wide, so half precision would cost digits and save nothing."""
    kind = like.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


class ANL(nn.Module):
    """The adaptive nonlinear layer `sigma = F + L`, z (..., r) -> (..., r), in z's dtype; options as in AuroraConfig.

    Parameters: `H` (r, r), Xavier-normal, None if fixed=False; `spline_weight` (r, G + k), uniform in +-0.1, None if
    learnable=False. The arithmetic is float32, or float64 if z or the parameters are. NaN in one row stays there.
    """

    def __init__(self, rank: int | AuroraConfig = 2, device: Any = None, dtype: Any = None, **options: Any) -> None:
        super().__init__()
        self.config = c = _configure(rank, options)
        H, w = (torch.empty(c.rank, n, device=device, dtype=dtype) for n in (c.rank, c.grid_size + c.spline_order))
        self.H = nn.Parameter(H) if c.fixed else None
        self.spline_weight = nn.Parameter(w) if c.learnable else None
        self._grid = _Grid.of(c, _wide(H), H.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw H and the spline weights afresh."""
        if self.H is not None:
            nn.init.xavier_normal_(self.H)
        if self.spline_weight is not None:
            nn.init.uniform_(self.spline_weight, -0.1, 0.1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ANL:
        # The grid is a constant, not state: no buffer, so nothing to load, and to_empty() cannot leave it blank.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):  # a model moved for inference can train afterwards
            self._grid = _Grid.of(self.config, _wide(p := next(self.parameters())), p.device)
        return self

    def forward(self, z: Tensor, scale: float = 1.0) -> Tensor:
        """`scale * sigma(z)` for z (..., r). Raises ValueError if the last dimension is not the rank."""
        if z.shape[-1:] != (self.config.rank,):
            raise ValueError(f"an ANL of rank {self.config.rank} got an input of shape {tuple(z.shape)}")
        return self.columns(z.reshape(-1, self.config.rank).t(), scale).t().reshape(z.shape)

    def columns(self, z: Tensor, scale: float = 1.0) -> Tensor:
        """`scale * sigma` of every column of z (r, N) -> (r, N)."""
        dtype, grid = _wide(z, self._grid.one), self._grid
        if grid.one.device != z.device or grid.one.dtype != dtype:  # loaded by assignment, or a wider input
            grid = _Grid.of(self.config, dtype, z.device)
        H, w = (None if p is None else p.to(dtype) for p in (self.H, self.spline_weight))
        sigma = _sigma if torch.compiler.is_compiling() else _Sigma.apply  # a compiler derives and fuses by itself
        with _full_precision(z):
            bumps = None if w is None else (w.reshape(-1, 1) @ grid.binomials).view(self.config.rank, -1)
            return sigma(z.to(dtype), H, bumps, grid, scale, self.config).to(z.dtype)


class AuroraLinear(nn.Module):
    """A linear layer and its adapter: x (..., in_features) -> (..., out_features), in the dtype of the base's output.

    `base` stays the same object with the same tensors: an `nn.Linear`, GPT-2's `Conv1D`, or any module with integer
    `in_features` and `out_features`, such as a quantised linear; else TypeError. Parameters: `A` (r, in_features) is
    Kaiming-uniform(a = sqrt 5); `B` (out_features, r) is zero, so that the output starts as the base's, bit for bit;
    `anl.H`, `anl.spline_weight`; float32, or float64 over a float64 base. The products with A and B run in x's dtype.
    `scaling` is s = alpha / r; `enabled` switches the adapter.
    """

    def __init__(self, base: nn.Module, rank: int | AuroraConfig = 2, **options: Any) -> None:
        super().__init__()
        self.config, features = _configure(rank, options), linear_features(base)
        if features is None:
            raise TypeError(f"AuroraLinear adapts linear layers, got a {type(base).__name__}")
        if self.config.rank > max(features):
            warnings.warn(f"rank {self.config.rank} is above both dimensions of the layer, {features}", stacklevel=2)
        self.base, self.enabled, self.scaling = base, True, self.config.alpha / self.config.rank
        self.in_features, self.out_features = features
        like = next(base.parameters(), torch.empty(()))
        self.A = nn.Parameter(torch.empty(self.config.rank, features[0], device=like.device, dtype=_wide(like)))
        self.B = nn.Parameter(torch.empty(features[1], self.config.rank, device=like.device, dtype=_wide(like)))
        self.anl = ANL(self.config, device=like.device, dtype=_wide(like))
        self.reset_parameters()
        self.train(base.training)

    def reset_parameters(self) -> None:
        """Draw the adapter afresh, for instance after `to_empty()`; the base is left alone."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        self.anl.reset_parameters()

    weight = property(lambda self: self.base.weight, doc="The base's weight, for code that reads it.")
    bias = property(lambda self: self.base.bias, doc="The base's bias, or None.")

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters under the paper's names: A, B, anl.H, anl.spline_weight."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) -> (..., out_features); further arguments go to the base."""
        out: Tensor = self.base(x, *args, **kwargs)
        if not self.enabled:
            return out
        x, static = F.dropout(x, self.config.dropout, self.training), self.config.mode == "static"
        down = self.anl.columns(self.A, self.scaling) if static else self.A
        y = F.linear(x, down.to(x.dtype)).reshape(-1, self.config.rank)  # (N, r), z if dynamic
        y = y if static else self.anl.columns(y.t().contiguous(), self.scaling).t()
        # One pass over the output, where product, scaling and sum would take three. A contiguous transpose of B makes
        # the narrow products of the backward several times faster on a CPU.
        up = self.B.t().to(out.dtype).contiguous()
        return torch.addmm(out.reshape(-1, self.out_features), y.to(out.dtype), up).view_as(out)

    def static_update(self) -> Tensor:
        """`s B sigma(A)`, (out_features, in_features), sigma on each column of A, in float32 or wider."""
        return self.B.to(_wide(self.B)) @ self.anl.columns(self.A.to(_wide(self.A)), self.scaling)

    def merged_weight(self, update: Tensor) -> Tensor:
        """The base's weight plus `update` (out_features, in_features), summed in float32 or wider and rounded once."""
        weight: Any = self.base.weight
        update = update.t() if type(self.base).__name__ == "Conv1D" else update  # GPT-2's layer is transposed
        return (weight.to(_wide(weight, update)) + update).to(weight.dtype)  # type: ignore[no-any-return]


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that computes a linear map; None for any other and for lazy layers."""
    names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    n_in, n_out = (getattr(module, name, 0) for name in names)  # a lazy layer says 0
    # What holds linear layers is none itself: a wrapper that speaks for one, a block that has widths too.
    if n_in and n_out and type(n_in) is type(n_out) is int and not any(map(linear_features, [*module.modules()][1:])):
        return n_in, n_out
    return None


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, as if nothing had been injected, compiled, sharded or parallelised."""
    yield name, module
    around = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    for key, child in module._modules.items():
        base = key == "base" and isinstance(module, AuroraLinear)
        hidden = base or around or key in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
        if child is not None:
            yield from walk(child, name if hidden else f"{name}.{key}".removeprefix("."))


def layers(model: nn.Module) -> dict[str, AuroraLinear]:
    """The adapted layers by name, each once, under its first. Raises ValueError if there are none."""
    names = {module: name for name, module in reversed(list(walk(model))) if isinstance(module, AuroraLinear)}
    if not names:
        raise ValueError(f"this {type(model).__name__} has no AuroRA adapters: never injected, or merged, or removed")
    return {name: layer for layer, name in reversed(names.items())}


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """`base_parameters` with their module, where `inject` leaves its notes, and their name there."""
    own = {p for _, m in walk(model) if isinstance(m, AuroraLinear) for p in m.adapter_parameters().values()}
    found = ((n, m, key, p) for n, m in walk(model) for key, p in m._parameters.items() if p is not None)
    return {f"{n}.{key}".removeprefix("."): (m, key, p) for n, m, key, p in found if p not in own}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that is no adapter's, under each of its original names."""
    return {name: p for name, (*_, p) in _owners(model).items()}


class Injection(NamedTuple):
    """What `inject` did: the new layers by name and the model's parameters, counted. Prints as a table."""

    layers: dict[str, AuroraLinear]
    trainable: int
    total: int

    def __str__(self) -> str:
        width = max(map(len, self.layers))
        rows = [f"{name:<{width}} {m.in_features:>6} -> {m.out_features}" for name, m in self.layers.items()]
        share = f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.3%})"
        return "\n".join([*rows, f"{len(rows)} layers adapted; {share}"])


def inject(
    model: nn.Module, target_regex: str, rank: int | AuroraConfig = 2, *, train: str | None = None, **options: Any
) -> Injection:
    """Put an adapter around every linear layer whose qualified name matches, in place, and freeze the rest.

    target_regex: searched in names such as "encoder.layer.0.attention.self.query". train: regex of names of parameters
    that train beside the adapters, such as a new head. rank, options: AuroraConfig. The outputs stay bit for bit.
    All or nothing: on an error the model is as it was. ValueError: a regex that is invalid or matches nothing, a layer
    that is adapted already, or one that its parent never calls; TypeError: a match that has weights but is not linear.
    """
    config, owners = _configure(rank, options), _owners(model)
    try:
        pattern, kept_pattern = re.compile(target_regex), re.compile("(?!)" if train is None else train)
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is not a regular expression: {error}") from error
    kept = {name for name in owners if kept_pattern.search(name)}
    if train is not None and not kept:
        raise ValueError(f"train={train!r} matches no parameter; their names are like {next(iter(owners), None)!r}")
    for name, (*_, p) in owners.items():
        if nn.parameter.is_lazy(p) or (name in kept and not p.is_floating_point()):
            raise ValueError(f"{name} has no shape yet (run the model once) or an integer dtype (drop it from train=)")
    targets = _targets(model, pattern)
    new = {layer: AuroraLinear(layer, config) for layer in targets}
    # Nothing above has touched the model, and nothing below can fail.
    for name, (owner, key, p) in owners.items():
        owner.__dict__.setdefault("_aurora_requires_grad", {}).setdefault(key, p.requires_grad)
        owner.__dict__.setdefault("_aurora_train", set()).update([key] if name in kept else [])
    swap(model, new)
    trained = set(parameters(model))
    for *_, p in owners.values():
        p.requires_grad_(p in trained)
    trainable, total = (sum(p.numel() for p in ps) for ps in (trained, model.parameters()))
    return Injection({name: new[layer] for layer, name in targets.items()}, trainable, total)


def _targets(model: nn.Module, pattern: re.Pattern[str]) -> dict[nn.Module, str]:
    """The layers to adapt, each under its first name; an error for whatever matches and cannot be adapted."""
    if linear_features(model):
        raise ValueError("the model is itself a linear layer, with no parent to swap it in: use AuroraLinear(model)")
    parents = {child: (parent, key) for parent in model.modules() for key, child in parent._modules.items()}
    adapted = {part for m in model.modules() if isinstance(m, AuroraLinear) for part in m.modules() if part is not m}
    free = [(name, module) for name, module in walk(model) if name and module not in adapted]
    found: dict[nn.Module, str] = {}
    for name, module in ((name, module) for name, module in free if pattern.search(name)):
        if isinstance(module, AuroraLinear):
            raise ValueError(f"{name} is adapted already: aurora.remove(model) first, or match other layers")
        if linear_features(module):
            parent, key = parents[module]
            # PyTorch's encoder layer does call its linears, once its fused evaluation is off.
            fused = not isinstance(parent, nn.TransformerEncoderLayer) or torch.backends.mha.get_fastpath_enabled()
            if key == "_orig_mod" or (fused and _is_bypassed(type(parent), key)):  # type: ignore[arg-type]
                raise ValueError(f"{name}: {type(parent).__name__} bypasses its adapter; exclude it, or compile later")
            found.setdefault(module, name)
        elif any(p is not None for p in module._parameters.values()):
            raise TypeError(f"{pattern.pattern!r} matches {name}, a {type(module).__name__}, which is not linear")
    if not found:
        known = sorted({re.sub(r"\d+", "*", name) for name, module in free if linear_features(module)})
        near = ", ".join(difflib.get_close_matches(pattern.pattern, known, 5, cutoff=0.0)) or "there are none"
        raise ValueError(f"{pattern.pattern!r} matches no linear layer; the nearest are: {near}")
    return found


@functools.cache
def _is_bypassed(parent: Any, key: str) -> bool:
    """Whether the source of the parent's forward reads a child's weight or bias and nothing else of it."""
    tensor = rf"self\.{key}\b(\.(?:weight|bias)\b(?!\.(?:dtype|device|shape)\b))?"
    with contextlib.suppress(OSError, TypeError):  # no source: typed at a prompt, or compiled
        for cls in (cls for cls in parent.__mro__ if "forward" in vars(cls)):
            source = inspect.getsource(cls.forward)
            if (uses := re.findall(tensor, source)) or "super()" not in source:
                return bool(uses) and "" not in uses
    return False


def swap(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Put new modules in the place of old ones, under every name these have. ValueError if the model is one of them."""
    if model in new:
        raise ValueError(f"the model is itself a {type(model).__name__}, with no parent to swap it in: use its `base`")
    for parent in list(model.modules()):
        for key in [key for key, child in parent._modules.items() if child in new]:
            parent._modules[key] = new[parent._modules[key]]


def remove(model: nn.Module, only: Iterable[AuroraLinear] | None = None) -> None:
    """Undo `inject`: the original modules and `requires_grad` return, heads stay as trained. `only`: these layers."""
    swap(model, {layer: layer.base for layer in (layers(model).values() if only is None else only)})
    if not any(isinstance(module, AuroraLinear) for module in model.modules()):
        for module in model.modules():
            module.__dict__.pop("_aurora_train", None)
            for key, required in module.__dict__.pop("_aurora_requires_grad", {}).items():
                if key in module._parameters and (p := module._parameters[key]) is not None:
                    p.requires_grad_(required)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training moves, by name: "<layer>.A", ".B", ".anl.H", ".anl.spline_weight", and all that `train=` kept."""
    adapters = {f"{n}.{key}": p for n, layer in layers(model).items() for key, p in layer.adapter_parameters().items()}
    return adapters | {n: p for n, (m, key, p) in _owners(model).items() if key in m.__dict__.get("_aurora_train", ())}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to the optimizer: the adapters' and those that `train=` kept, each once."""
    return list(dict.fromkeys(trained_parameters(model).values()))


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs without its adapters (heads that `train=` kept stay as trained)."""
    with contextlib.ExitStack() as undo:
        for layer in layers(model).values():
            undo.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        yield


def check_mergeable(model: nn.Module, found: Mapping[str, AuroraLinear]) -> None:
    """Raise ValueError for a weight that cannot be merged into: quantised, sharded, or tied to another module's."""
    if isinstance(model, AuroraLinear):
        raise ValueError("the model is itself an AuroraLinear, with no parent to swap it in: put it into a Sequential")
    for name, layer in found.items():
        weight = layer.base._parameters.get("weight")
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta:
            raise ValueError(f"{name}.weight is quantised, sharded, computed or meta; merge into a plain copy")
        if sum(p is weight for module in model.modules() for p in module._parameters.values()) > 1:
            raise ValueError(f"{name}.weight is tied to another module, which the merge would change; untie it first")


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """The paper's static merge: `W <- W + s B sigma(A)`, sigma on each column of A; returns the merged layers' names.

    For mode="static" it is exact; in mode="dynamic" another function was trained, and `aurora.merging` measures and
    mends the difference. ValueError, with the model as it was, if a weight cannot be merged into or would overflow.
    """
    check_mergeable(model, found := layers(model))
    for name, layer in found.items():
        if not layer.merged_weight(layer.static_update()).isfinite().all():
            raise ValueError(f"merging would put NaN or infinity into {name}.weight")
    for layer in found.values():
        layer.base.weight = nn.Parameter(layer.merged_weight(layer.static_update()), layer.weight.requires_grad)
    remove(model)
    return list(found)

"""AuroRA in one file: nonlinear low-rank adaptation of linear layers, in plain PyTorch. Copy it and it works.

A frozen layer `W x + b` becomes `W x + b + s B sigma(A x)`. LoRA is the case sigma(z) = z. Here sigma is the adaptive
nonlinear layer (ANL), a few numbers per adapted layer that bend the r hidden channels between A and B:

    sigma(z) = F(z) + L(z),    F(z) = tanh(H tanh(z)),    L = cubic B-splines on a uniform grid over [-1, 1].

Read from top to bottom: the options, the spline and its derivative, ANL, AuroraLinear, inject, and what follows from it
(saving, switching off, merging, removing).

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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    """The options of an adapter; the defaults are the paper's. A bad value raises ValueError or TypeError naming it.

    rank: r, width of the hidden vector `z = A x`. alpha: the output is scaled by `alpha / rank`.
    mode: "dynamic" trains `B sigma(A x)`; "static" trains `B sigma(A) x`, which merges exactly (paper section 3.3).
    spline: "summed", every output channel applies its spline to all input channels and adds up (as the authors' code
    does); "per-channel", channel j sees only z_j. fixed, learnable: keep F, keep L (the paper's ablations).
    activation: "tanh", "leaky_relu" or "sigmoid", both times in F. grid_size: G cells. spline_order: degree k, 1 to 8.
    grid_range: ends of the grid; the spline is zero k cells beyond it. dropout: on the adapter's input, in training.
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
        for name in ("rank", "grid_size", "spline_order"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        low, high = (float(end) for end in self.grid_range)
        object.__setattr__(self, "grid_range", (low, high))  # a tuple again after JSON made it a list
        for name, valid, rule in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", math.isfinite(self.alpha), "finite"),
            ("mode", self.mode in ("dynamic", "static"), '"dynamic" or "static"'),
            ("spline", self.spline in ("summed", "per-channel"), '"summed" or "per-channel"'),
            ("learnable", self.fixed or self.learnable, "True when fixed is False: without both nothing is left"),
            ("activation", self.activation in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}"),
            ("grid_size", self.grid_size >= 1, "at least 1"),
            ("spline_order", 1 <= self.spline_order <= 8, "from 1 to 8"),
            ("grid_range", -math.inf < low < high < math.inf, "two finite numbers in rising order"),
            ("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    @property
    def bases(self) -> int:
        """n = G + k, the number of basis functions of a spline."""
        return self.grid_size + self.spline_order

    @property
    def cells_per_unit(self) -> float:
        """1 / h, the inverse of the knot spacing."""
        return self.grid_size / (self.grid_range[1] - self.grid_range[0])


def _configure(rank: int | AuroraConfig, options: Mapping[str, Any]) -> AuroraConfig:
    return dataclasses.replace(rank, **options) if isinstance(rank, AuroraConfig) else AuroraConfig(rank, **options)


# The spline. On a uniform grid every basis function is one bump, shifted. With d the signed distance to its centre in
# cells, c = (k + 1) / 2 its half-width and t_i = max(c - |d| - i, 0), it is a short alternating sum of powers,
#     k! N(d) = sum_i (-1)^i binom(k + 1, i) t_i^k,   i = 0 .. floor(k / 2),
# for a cubic max(2 - |d|, 0)^3 - 4 max(1 - |d|, 0)^3. No recursion and no branches (derived in docs/theory.md).


def _clamps(distance: Tensor, k: int) -> list[tuple[int, Tensor]]:
    """The pairs (signed binomial coefficient, t_i) for distances |d|, each t_i of their shape."""
    reach = F.relu((k + 1) / 2 - distance)
    return [((-1) ** i * math.comb(k + 1, i), F.softshrink(reach, float(i)) if i else reach) for i in range(k // 2 + 1)]


def _value_and_slope(z: Tensor, centers: Tensor, config: AuroraConfig) -> tuple[Tensor, Tensor]:
    """`k! N` and `(k - 1)! h dN/dz` of every basis function at every point: z (N, r) -> two (N, r, n)."""
    k = config.spline_order
    d = torch.sub(centers, z.unsqueeze(-1), alpha=config.cells_per_unit)
    sign = torch.ones_like(d).copysign(d)  # never 0, as sgn would be: it would wipe out second derivatives at centres
    terms = [(c, t, t.sign() if k == 1 else t ** (k - 1)) for c, t in _clamps(d * sign, k)]
    (_, t, slope), *rest = terms
    value = slope * t
    for c, t, power in rest:
        slope, value = torch.add(slope, power, alpha=c), torch.addcmul(value, power, t, value=c)
    return value, slope * sign


def _sigma(z: Tensor, H: Tensor | None, w: Tensor | None, centers: Tensor, s: float, config: AuroraConfig) -> Tensor:
    """`s * sigma(z)`, (N, r) -> (N, r): the definition of the adaptive nonlinear layer (paper section 3.2)."""
    out = torch.zeros_like(z) if H is None else z
    if H is not None:
        activation, _ = _ACTIVATIONS[config.activation]
        out = activation(activation(z) @ H.t())
    if w is None:
        return s * out
    d = torch.sub(centers, z.unsqueeze(-1), alpha=config.cells_per_unit)  # (N, r, n)
    k, gain = config.spline_order, s / math.factorial(config.spline_order)
    (_, t), *rest = _clamps(d.abs(), k)
    value = t**k
    for c, t in rest:
        value = torch.add(value, t**k, alpha=c)
    if config.spline == "per-channel":
        return torch.add(s * out, (value * w).sum(-1), alpha=gain)
    # Every channel's spline reads all channels, so the bases can be added up before the weights: (N, r, n) -> (N, n).
    return torch.addmm(out, value.sum(-2), w.t(), beta=s, alpha=gain)


class _Sigma(torch.autograd.Function):
    """`_sigma` with its derivatives by hand: where autograd would keep every step, this keeps z and recomputes."""

    generate_vmap_rule = True
    forward = staticmethod(_sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale, ctx.config = inputs[4:]
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, H, w, centers = ctx.saved_tensors
        config, k, grad_H, grad_w = ctx.config, ctx.config.spline_order, None, None
        with _full_precision(z):
            grad = grad * ctx.scale
            if H is None:
                grad_z = torch.zeros_like(z)
            else:
                activation, derivative = _ACTIVATIONS[config.activation]
                inner = activation(z)
                outer = derivative(grad, activation(inner @ H.t()))
                grad_z, grad_H = derivative(outer @ H, inner), outer.t() @ inner
            if w is not None:
                value, slope = _value_and_slope(z, centers, config)
                gain = config.cells_per_unit / math.factorial(k - 1)
                if config.spline == "per-channel":
                    grad_w = (value * grad.unsqueeze(-1)).sum(0)
                    grad_z = torch.addcmul(grad_z, (slope * w).sum(-1), grad, value=gain)
                else:
                    grad_w = grad.t() @ value.sum(-2)
                    upstream = (grad @ w).unsqueeze(-1)
                    grad_z = torch.baddbmm(grad_z.unsqueeze(-1), slope, upstream, alpha=gain).squeeze(-1)
                grad_w = grad_w / math.factorial(k)
        return grad_z, grad_H, grad_w, None, None, None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, dH: Tensor | None, dw: Tensor | None, *_: Any) -> Tensor:
        z, H, w, centers = ctx.saved_tensors
        config, k, out = ctx.config, ctx.config.spline_order, torch.zeros_like(z)
        if H is not None and dH is not None:
            activation, derivative = _ACTIVATIONS[config.activation]
            inner = activation(z)
            out = derivative(derivative(dz, inner) @ H.t() + inner @ dH.t(), activation(inner @ H.t()))
        if w is not None and dw is not None:
            value, slope = _value_and_slope(z, centers, config)
            value = value / math.factorial(k)
            slope = slope * dz.unsqueeze(-1) * (config.cells_per_unit / math.factorial(k - 1))
            per_channel = config.spline == "per-channel"
            out = out + ((slope * w + value * dw).sum(-1) if per_channel else (slope @ w.t() + value @ dw.t()).sum(-2))
        return ctx.scale * out


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of the nonlinear arithmetic: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _full_precision(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: inside the ANL every matrix is r wide, so half precision would cost digits and save nothing."""
    kind = like.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


class ANL(nn.Module):
    """The adaptive nonlinear layer `sigma = F + L` (paper section 3.2): z (..., r) -> (..., r), in z's dtype.

    Takes a rank and options of AuroraConfig, or an AuroraConfig. Parameters: `H` (r, r), Xavier-normal, None if
    fixed=False; `spline_weight` (r, G + k), uniform in +-0.1, None if learnable=False. The arithmetic is float32, or
    float64 if z or the parameters are. NaN in one row stays in that row; outside its support the spline is 0.
    """

    H: nn.Parameter | None
    spline_weight: nn.Parameter | None

    def __init__(
        self, rank: int | AuroraConfig = 2, *, device: Any = None, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.config = c = _configure(rank, options)
        make = functools.partial(torch.empty, device=device, dtype=dtype)
        self.H = nn.Parameter(make(c.rank, c.rank)) if c.fixed else None
        self.spline_weight = nn.Parameter(make(c.rank, c.bases)) if c.learnable else None
        self._centers = self._make_centers(make(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw H and the spline weights afresh."""
        if self.H is not None:
            nn.init.xavier_normal_(self.H)
        if self.spline_weight is not None:
            nn.init.uniform_(self.spline_weight, -0.1, 0.1)

    def _make_centers(self, like: Tensor) -> Tensor:
        first = self.config.grid_range[0] * self.config.cells_per_unit + (1 - self.config.spline_order) / 2
        return torch.arange(self.config.bases, dtype=_wide(like), device=like.device) + first

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ANL:
        # The centres are a constant, not state: no buffer, so nothing to load, and to_empty() cannot leave them blank.
        super()._apply(fn, recurse)
        self._centers = self._make_centers(next(self.parameters()))
        return self

    def forward(self, z: Tensor, scale: float = 1.0) -> Tensor:
        """`scale * sigma(z)` for z (..., r). Raises ValueError if the last dimension is not the rank."""
        if z.shape[-1:] != (self.config.rank,):
            raise ValueError(f"an ANL of rank {self.config.rank} got an input of shape {tuple(z.shape)}")
        dtype, centers = _wide(z, self._centers), self._centers
        if centers.device != z.device or centers.dtype != dtype:  # loaded by assignment, or a wider input
            centers = self._make_centers(z.to(dtype))
        H = None if self.H is None else self.H.to(dtype)
        w = None if self.spline_weight is None else self.spline_weight.to(dtype)
        # A compiler derives, fuses and recomputes by itself, so it gets the definition.
        sigma = _sigma if torch.compiler.is_compiling() else _Sigma.apply
        with _full_precision(z):
            out: Tensor = sigma(z.reshape(-1, self.config.rank).to(dtype), H, w, centers, scale, self.config)
        return out.to(z.dtype).view(z.shape)


class AuroraLinear(nn.Module):
    """A linear layer and its adapter: x (..., in_features) -> (..., out_features), in the dtype of the base's output.

    `base` stays the same object with the same tensors: an `nn.Linear`, GPT-2's `Conv1D`, or any module with integer
    `in_features` and `out_features`, such as a quantised linear; TypeError for others. Rank and options as for ANL.
    Parameters: `A` (r, in_features), Kaiming-uniform with a = sqrt 5; `B` (out_features, r), zero, so that the output
    starts as the base's, bit for bit; `anl.H`, `anl.spline_weight`. They are made on the base's device, in `dtype`, by
    default float64 over a float64 base and float32 over any other. The products with A and B run in the input's dtype.
    """

    def __init__(
        self, base: nn.Module, rank: int | AuroraConfig = 2, *, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__()
        if (features := linear_features(base)) is None:
            raise TypeError(f"AuroraLinear adapts linear layers, got a {type(base).__name__}")
        self.config = _configure(rank, options)
        self.base, self.enabled = base, True
        self.in_features, self.out_features = features
        like = next(base.parameters(), torch.empty(()))
        make = functools.partial(torch.empty, device=like.device, dtype=dtype or _wide(like))
        self.A = nn.Parameter(make(self.config.rank, self.in_features))
        self.B = nn.Parameter(make(self.out_features, self.config.rank))
        self.anl = ANL(self.config, device=like.device, dtype=self.A.dtype)
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
        rows = F.dropout(x, self.config.dropout, self.training).reshape(-1, self.in_features)  # (N, in_features)
        if self.config.mode == "static":
            y = F.linear(rows, self.anl(self.A.t(), self.config.scaling).t().to(x.dtype))
        else:
            y = self.anl(F.linear(rows, self.A.to(x.dtype)), self.config.scaling)
        # One pass over the output, where product, scaling and sum would take three.
        up = self.B.t().to(out.dtype)
        return torch.addmm(out.reshape(-1, self.out_features), y.to(out.dtype), up).view(out.shape)

    def static_update(self) -> Tensor:
        """`s B sigma(A)`, (out_features, in_features), sigma on each column of A, float32 or wider (paper eq. 9)."""
        dtype = _wide(self.A)
        return self.B.to(dtype) @ self.anl(self.A.t().to(dtype), self.config.scaling).t()

    def merged_weight(self, update: Tensor) -> Tensor:
        """The base's weight plus `update` (out_features, in_features), summed in float32 or wider and rounded once."""
        weight: Tensor = self.base.weight
        update = update.t() if _is_conv1d(self.base) else update
        return (weight.to(_wide(weight, update)) + update.to(_wide(weight, update))).to(weight.dtype)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is transposed; known by its attributes, so transformers is not needed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that computes a linear map; None for any other and for lazy layers."""
    names = ("nx", "nf") if _is_conv1d(module) else ("in_features", "out_features")
    n_in, n_out = (getattr(module, name, None) for name in names)
    lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return (n_in, n_out) if isinstance(n_in, int) and isinstance(n_out, int) and not lazy else None


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, as they were before injection and wrapping.

    The layers that torch.compile, DDP, FSDP and checkpointing put around a module, and our own `base`, add nothing to
    a name: the keys of a saved adapter are the same wherever it was trained.
    """
    yield name, module
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for key, child in module._modules.items():
        if child is not None:
            hidden = (
                key == "base" if isinstance(module, AuroraLinear) else key in wrappers or isinstance(module, parallel)
            )
            yield from walk(child, name if hidden else f"{name}.{key}".removeprefix("."))


def layers(model: nn.Module) -> dict[str, AuroraLinear]:
    """The adapted layers by name, each once, under its first. Raises ValueError if there are none."""
    names: dict[AuroraLinear, str] = {}
    for name, module in walk(model):
        if isinstance(module, AuroraLinear):
            names.setdefault(module, name)
    if not names:
        raise ValueError(f"this {type(model).__name__} has no AuroRA adapters: never injected, or merged, or removed")
    return {name: layer for layer, name in names.items()}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that is no adapter's, under each of its original names."""
    own = {p for _, m in walk(model) if isinstance(m, AuroraLinear) for p in m.adapter_parameters().values()}
    for name, module in walk(model):
        for key, p in module._parameters.items():
            if p is not None and p not in own:
                yield f"{name}.{key}".removeprefix("."), p


@dataclasses.dataclass(frozen=True)
class Injection:
    """What `inject` did; prints as a table. `layers`: (name, in_features, out_features, parameters added) of each."""

    layers: tuple[tuple[str, int, int, int], ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        width = max(len(name) for name, *_ in self.layers)
        rows = [("layer", "in", "out", "trainable"), *((n, str(i), str(o), f"{p:,}") for n, i, o, p in self.layers)]
        table = [f"{name:<{width}}  {n_in:>6} -> {n_out:<6}  {added:>9}" for name, n_in, n_out, added in rows]
        share = f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.3%})"
        return "\n".join([*table, f"{len(self.layers)} layers adapted; {share}"])


def inject(
    model: nn.Module,
    target_regex: str,
    rank: int | AuroraConfig = 2,
    *,
    train: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Injection:
    """Put an adapter around every linear layer whose qualified name matches, in place, and freeze the rest.

    target_regex: searched in names such as "encoder.layer.0.attention.self.query" (`re.search`). train: regex of names
    of parameters that stay trainable beside the adapters, such as a new classifier head. rank, options: AuroraConfig.
    dtype: of the adapters, see AuroraLinear. The model's outputs stay as they are, bit for bit, until it is trained.

    All or nothing: on an error the model is as it was. ValueError: a regex that is invalid or matches nothing, a layer
    that is adapted already, or one that its parent never calls; TypeError: a match that has weights but is not linear.
    """
    config = _configure(rank, options)
    targets = _targets(model, _pattern("target_regex", target_regex))
    base = dict(base_parameters(model))
    kept = {name for name in base if train is not None and _pattern("train", train).search(name)}
    if train is not None and not kept:
        raise ValueError(f"train={train!r} matches no parameter; they have names such as {next(iter(base))!r}")
    new = {layer: AuroraLinear(layer, config, dtype=dtype) for layer in targets.values()}
    for name, layer in targets.items():
        if config.rank > max(new[layer].in_features, new[layer].out_features):
            warnings.warn(f"rank {config.rank} is above both dimensions of {name}", stacklevel=2)

    # Nothing above has touched the model, and nothing below can fail.
    former = {name: p.requires_grad for name, p in base.items()}
    record = model.__dict__.setdefault("_aurora", {"requires_grad": former, "train": set()})
    record["train"] |= kept
    for name, p in base.items():
        p.requires_grad_(name in record["train"])
    swap(model, new)
    shapes = ((n, new[m].in_features, new[m].out_features, new[m].adapter_parameters()) for n, m in targets.items())
    return Injection(
        tuple((*shape, sum(p.numel() for p in added.values())) for *shape, added in shapes),  # type: ignore[misc]
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )


def _pattern(argument: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"{argument}={regex!r} is not a regular expression: {error}") from error


def _targets(model: nn.Module, pattern: re.Pattern[str]) -> dict[str, nn.Module]:
    """The layers to adapt, each under its first name; an error for whatever matches and cannot be adapted."""
    if linear_features(model):
        raise ValueError("the model is itself a linear layer, with no parent to swap it in: use AuroraLinear(model)")
    found: dict[nn.Module, str] = {}
    parents = {child: (parent, key) for parent in model.modules() for key, child in parent._modules.items()}
    adapted = {part for m in model.modules() if isinstance(m, AuroraLinear) for part in m.modules()}
    for name, module in walk(model):
        if not name or not pattern.search(name) or (module in adapted and not isinstance(module, AuroraLinear)):
            continue
        if isinstance(module, AuroraLinear):
            raise ValueError(f"{name} is adapted already: aurora.remove(model) first, or match other layers")
        if linear_features(module):
            _refuse_bypassed(name, *parents[module])
            found.setdefault(module, name)
        elif any(True for _ in module.parameters(recurse=False)):
            raise TypeError(f"{pattern.pattern!r} matches {name}, a {type(module).__name__}, which is not linear")
    if not found:
        known = sorted(
            {re.sub(r"\d+", "*", name) for name, m in walk(model) if linear_features(m) and m not in adapted}
        )
        near = ", ".join(difflib.get_close_matches(pattern.pattern, known, 5, cutoff=0.0)) or "there are none"
        raise ValueError(f"{pattern.pattern!r} matches no linear layer; the nearest are: {near}")
    return {name: layer for layer, name in found.items()}


@functools.cache
def _bypassed(parent: type[nn.Module]) -> set[str]:
    """Children of which the source of the parent's forward reads `.weight` or `.bias` and nothing else."""
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):
        return set()
    tensor = r"\.(?:weight|bias)\b(?!\.(?:dtype|device|shape)\b)"
    uses = re.findall(rf"\bself\.(\w+)({tensor})?", source)
    return {name for name, _ in uses} - {name for name, read in uses if not read}


def _refuse_bypassed(name: str, parent: nn.Module, key: str) -> None:
    fast = isinstance(parent, nn.TransformerEncoderLayer)
    if key not in _bypassed(type(parent)) or (fast and not torch.backends.mha.get_fastpath_enabled()):
        return
    way_out = "torch.backends.mha.set_fastpath_enabled(False) makes it" if fast else "leave it out of the regex"
    parent_name = type(parent).__name__
    raise ValueError(f"{name}: {parent_name} reads its weight but never calls it, so an adapter cannot run; {way_out}")


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, under every name these have."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new and parent is not new[child]:
                parent._modules[key] = new[child]


def records(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `inject` was called with, which carry its record, and the prefix of the names in it."""
    return ((name and f"{name}.", m) for name, m in walk(model) if "_aurora" in m.__dict__)


def release(model: nn.Module, gone: Mapping[str, AuroraLinear]) -> None:
    """Put the bases of `gone` back; once no adapter is left, the base parameters require grad as they did at first."""
    swap(model, {layer: layer.base for layer in gone.values()})
    if not any(isinstance(m, AuroraLinear) for m in model.modules()):
        base = dict(base_parameters(model))
        for prefix, module in list(records(model)):
            for name, required in module.__dict__.pop("_aurora")["requires_grad"].items():
                base[prefix + name].requires_grad_(required)


def remove(model: nn.Module) -> None:
    """Undo `inject`: the original modules return, and `requires_grad` is what it was. Kept heads stay as trained."""
    release(model, layers(model))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training moves, by original name: "<layer>.A", ".B", ".anl.H", ".anl.spline_weight", and `train=`'s names."""
    adapters = {f"{n}.{key}": p for n, layer in layers(model).items() for key, p in layer.adapter_parameters().items()}
    kept = {prefix + name for prefix, m in records(model) for name in m.__dict__["_aurora"]["train"]}
    return adapters | {name: p for name, p in base_parameters(model) if name in kept}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to the optimizer: the adapters' and those that `train=` kept, each once."""
    return list(dict.fromkeys(trained_parameters(model).values()))


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `trained_parameters`, detached and sharing memory with the model, as `state_dict` does."""
    return {name: p.detach() for name, p in trained_parameters(model).items()}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into the model's, in place, so that optimizers and compiled graphs stay valid.

    Raises ValueError listing what is missing, unexpected or of another shape, before anything is written.
    """
    own = trained_parameters(model)
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            problems.append(f"{name}: {tuple(state[name].shape)} given, {tuple(own[name].shape)} in the model")
        elif own[name].is_meta:
            problems.append(f"{name} is on the meta device; call model.to_empty(device=...) first")
    if problems:
        raise ValueError("the adapter does not fit the model, nothing was loaded:\n  " + "\n  ".join(sorted(problems)))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(state[name])


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs without its adapters (heads that `train=` kept stay as trained)."""
    before = {layer: layer.enabled for layer in layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def check_mergeable(model: nn.Module, found: Mapping[str, AuroraLinear]) -> None:
    """Raise ValueError for a weight that cannot be merged into: quantised, sharded, or shared with another module."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for _, module in walk(model):
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, set()).add(module)
    for name, layer in found.items():
        weight = layer.weight
        if type(weight) is not nn.Parameter or weight.dtype not in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            kind = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}"
            raise ValueError(
                f"cannot merge into {name}: its weight is a {kind}; load the base unquantised, or keep the adapter"
            )
        if len(owners[weight]) > 1:
            raise ValueError(
                f"cannot merge into {name}: its weight is tied to another module, which would change as well"
            )


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """The paper's static merge: `W <- W + s B sigma(A)`, sigma on the columns of A (eq. 9); plain layers return.

    In mode="static" this is the trained function; in mode="dynamic" it is another one (docs/method.md), and
    `aurora.merging` measures by how much. Returns the names of the merged layers. ValueError, with the model as it was,
    if there is nothing to merge, a weight is quantised or tied, or the result would not be finite.
    """
    found = layers(model)
    check_mergeable(model, found)
    for name, layer in found.items():
        if not layer.merged_weight(layer.static_update()).isfinite().all():
            raise ValueError(f"merging {name} would put NaN or infinity into its weight")
    for layer in found.values():
        old = layer.base.weight
        layer.base.weight = nn.Parameter(layer.merged_weight(layer.static_update()), requires_grad=old.requires_grad)
    release(model, found)
    return list(found)

"""Merging that keeps the function that was trained, and says what it loses.

Training learns `s B sigma(A x)`; a merged layer can only add an affine map of x. Three maps are on offer:

- "static", the paper's: `s B sigma(A) x`, which has little to do with what was trained in mode "dynamic";
- "linear": the first-order expansion `s B (sigma(z0) + J (A x - z0))`, at 0 or at the mean of calibration data;
- "calibrated": `s B (M A x + c)`, where `M z + c` has the least mean squared error to sigma(z) on calibration data.

All three are exact in mode "static", the last two wherever sigma is affine. Errors are relative, the norm of what a map
gets wrong over the norm of the adapter's output, and measured on held-out data. Derivations: docs/merging.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aurora import _running, core

METHODS = ("static", "linear", "calibrated")


# --- The data that pass a layer, as running moments ------------------------------------------------------------------


class Moments:
    """Count, mean (m,) and scatter (m, m) of the rows seen, float64; never the rows themselves.

    A layer's rows are `[z, what goes into B, sigma(A) x]`, so m = 3 r: 8 (m + m^2) bytes, whatever the layer's width.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows (N, m). Means are updated before squares are taken, so that large offsets cost no digits."""
        if not len(rows):
            return
        rows = rows.cpu().double()
        mean = rows.mean(0)
        centred = rows - mean
        total, shift = self.count + len(rows), mean - self.mean
        self.scatter += centred.t() @ centred + torch.outer(shift, shift) * (
            self.count * len(rows) / total
        )
        self.mean += shift * (len(rows) / total)
        self.count = total

    def second(self, about_mean: bool) -> Tensor:
        """(m, m): the covariance, or the second moment about 0."""
        covariance = self.scatter / max(self.count, 1)
        return covariance if about_mean else covariance + torch.outer(self.mean, self.mean)


@dataclasses.dataclass(frozen=True)
class Affine:
    """An affine stand-in for sigma: `M z + K u + c` with u = sigma(A) x. M, K (r, r), c (r,), float64.

    "static" is K = 1; the other methods have K = 0.
    """

    M: Tensor
    K: Tensor
    c: Tensor

    def error(self, moments: Moments, B: Tensor) -> float:
        """Relative error |B (sigma(z) - M z - K u - c)| / |B sigma(z)|, root mean square over the rows."""
        r = len(self.c)
        residual = torch.cat([-self.M, torch.eye(r, dtype=torch.float64), -self.K], 1)
        # Products with square roots of the moments, not with the moments: a small error is no difference of large ones.
        eigenvalues, vectors = torch.linalg.eigh(moments.second(about_mean=True))
        root = vectors * eigenvalues.clamp(min=0).sqrt()
        offset = residual @ moments.mean - self.c
        wrong = math.hypot(_norm(B @ residual @ root), _norm(B @ offset))
        whole = math.hypot(_norm(B @ root[r : 2 * r]), _norm(B @ moments.mean[r : 2 * r]))
        return wrong / whole if whole else 0.0


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _expand(anl: core.ANL, at: Tensor) -> tuple[Tensor, Tensor]:
    """sigma (r,) and its Jacobian (r, r) at a point (r,), float64 on the CPU."""
    point = at.to(next(anl.parameters()).device)
    with torch.enable_grad():
        jacobian: Tensor = torch.func.jacrev(anl)(point)
    return anl(point).detach().cpu(), jacobian.detach().cpu()


def fit(
    layer: core.AuroraLinear, method: str, moments: Moments | None, constant: bool = True
) -> Affine:
    """The affine stand-in for a layer's sigma by a method; without `constant`, c = 0.

    "calibrated" is least squares. Directions of z that the data do not show, up to rounding, keep the first-order slope
    at the data's mean, so that few or degenerate data are no danger. Should the static map, which is no function of z,
    be nearer on the data, it is that. Raises ValueError for an unknown method, or "calibrated" without moments.
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
        raise ValueError(
            f'method must be one of {", ".join(METHODS)}, and "calibrated" needs batches; got {method!r}'
        )
    second = moments.second(about_mean=constant)
    # Least squares for what the slope leaves over, with the pseudo-inverse: 0 where z does not vary.
    scale = second[:r, :r].diagonal().amax().clamp(min=torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.pinv(second[:r, :r] / scale, rtol=1e-10, hermitian=True) / scale
    M = slope + (second[r : 2 * r, :r] - slope @ second[:r, :r]) @ inverse
    fitted = Affine(M, zero, moments.mean[r : 2 * r] - M @ moments.mean[:r] if constant else none)
    return min(
        fitted, static, key=lambda affine: affine.error(moments, layer.B.detach().cpu().double())
    )


# --- Running the model over batches ----------------------------------------------------------------------------------


def collect(model: nn.Module, batches: Iterable[Any]) -> dict[str, Moments]:
    """The moments of every adapted layer over batches, in eval mode without gradients, adapters on.

    A batch is what the model takes: a mapping of keyword arguments, a tuple or list of arguments, or one tensor. If it
    is a mapping with a 2-D "attention_mask", positions with mask 0 do not count in layers whose input has its shape.
    Raises ValueError if a layer never runs or its values are not finite.
    """
    layers = core.layers(model)
    found = {name: Moments(3 * layer.config.rank) for name, layer in layers.items()}
    mask: Tensor | None = None

    def watch(layer: core.AuroraLinear, name: str) -> Callable[..., None]:
        size = max(
            1, 4096 // layer.config.rank
        )  # rows at a time: what is held for a moment stays below a megabyte
        static = torch.cat(
            [layer.anl(part) for part in torch.split(layer.A.t(), size)]
        ).t()  # (r, in_features)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = _running.layer_input(inputs, named)
            kept = (
                mask.bool().flatten() if mask is not None and x.shape[:-1] == mask.shape else None
            )
            for i, part in enumerate(torch.split(x.reshape(-1, layer.in_features), size)):
                z, u = (
                    nn.functional.linear(part, matrix.to(part.dtype))
                    for matrix in (layer.A, static)
                )
                rows = torch.cat([z, u if layer.config.mode == "static" else layer.anl(z), u], 1)
                found[name].add(rows if kept is None else rows[kept[i * size : (i + 1) * size]])

        return hook

    with torch.no_grad(), _running.evaluating(model), contextlib.ExitStack() as undo:
        for name, layer in layers.items():
            undo.callback(
                layer.register_forward_pre_hook(watch(layer, name), with_kwargs=True).remove
            )
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = mask if mask is not None and mask.dim() == 2 else None
            _running.call(model, batch)
    for name, moments in found.items():
        if not moments.count:
            raise ValueError(
                f"{name} never ran on the batches, so there is nothing to calibrate it with"
            )
        if not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
            raise ValueError(
                f"{name} saw NaN or infinity on the batches; check them, or the adapter"
            )
    return found


# --- The report ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MergedLayer:
    """What happened to one layer.

    errors: relative error on held-out data by method, empty without batches. method: the one used, None if the layer
    stays dynamic. bias: whether the layer has gained one. rounding: norm of what storing the weight in its dtype lost,
    over the norm of the update.
    """

    name: str
    errors: dict[str, float]
    method: str | None
    bias: bool
    rounding: float


class MergeReport:
    """What a merge did, layer by layer; prints as a table. It holds the original weights until it is dropped.

    `unmerge()` puts them back: the same tensors, bit for bit, and the adapters around them.
    """

    def __init__(self, layers: Sequence[MergedLayer], undo: _Undo) -> None:
        self.layers, self._undo = list(layers), undo

    @property
    def merged(self) -> list[str]:
        """Names of the layers that are plain again."""
        return [layer.name for layer in self.layers if layer.method is not None]

    @property
    def dynamic(self) -> list[str]:
        """Names of the layers that were above the tolerance and keep their adapters."""
        return [layer.name for layer in self.layers if layer.method is None]

    def unmerge(self) -> None:
        """Undo the merge. Raises ValueError, with the model as it is, if it is no longer as the merge left it."""
        self._undo()

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{'layer':<{width}} {'merged by':>10} {'rounding':>9}"
            + "".join(f"{m:>12}" for m in METHODS)
        ]
        for layer in self.layers:
            errors = "".join(
                f"{layer.errors[m]:12.2%}" if m in layer.errors else f"{'-':>12}" for m in METHODS
            )
            line = f"{layer.name:<{width}} {layer.method or 'dynamic':>10} {layer.rounding:9.1e}{errors}"
            lines.append(line + (" + bias" if layer.bias else ""))
        done = f"{len(self.merged)} of {len(self.layers)} layers merged; errors are relative"
        return "\n".join([*lines, done])

    def draw(self, path: str | Path) -> None:
        """Save the errors as a bar chart. Raises ImportError without matplotlib, ValueError if there are no errors."""
        if not any(layer.errors for layer in self.layers):
            raise ValueError("there are no errors to draw: merge with batches")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'drawing needs matplotlib: pip install "aurora-adapters[benchmarks]"'
            ) from error
        figure = Figure(figsize=(max(6.0, 0.4 * len(self.layers)), 4.5), layout="constrained")
        axes = figure.subplots()
        for i, method in enumerate(METHODS):
            places = [j + 0.27 * (i - 1) for j in range(len(self.layers))]
            axes.bar(
                places,
                [layer.errors.get(method, math.nan) for layer in self.layers],
                0.27,
                label=method,
            )
        axes.set_xticks(
            range(len(self.layers)),
            [layer.name for layer in self.layers],
            rotation=90,
            fontsize="x-small",
        )
        axes.set(ylabel="relative error of the adapter's output", yscale="log")
        axes.legend()
        figure.savefig(path)


class _Undo:
    """Everything that a merge replaces, and how to put it back."""

    def __init__(self, model: nn.Module, layers: Mapping[str, core.AuroraLinear]) -> None:
        self.model, self.layers = model, dict(layers)
        self.adapters = {name: (layer.A, layer.B, layer.anl) for name, layer in layers.items()}
        self.tensors = {name: (layer.weight, _bias(layer)) for name, layer in layers.items()}
        self.requires_grad = {p: p.requires_grad for p in model.parameters()}
        self.notes = [(m, m.__dict__.get("_aurora")) for m in model.modules()]
        self.written: dict[str, list[Any]] = {}  # what `seen` said of each base right after

    @staticmethod
    def seen(base: nn.Module) -> list[Any]:
        """Weight and bias of a layer, so that any change to them shows."""
        tensors: Any = (base.weight, _bias(base))
        version = [None if t is None or t.is_inference() else t._version for t in tensors]
        return [version, *(None if t is None else (id(t), t.dtype, t.device) for t in tensors)]

    def __call__(self) -> None:
        present = set(self.model.modules())
        for name, written in self.written.items():
            base: Any = self.layers[name]
            if (
                base not in present
                or isinstance(base, core.AuroraLinear)
                or self.seen(base) != written
            ):
                raise ValueError(
                    f"{name} is no longer as the merge left it, so the merge cannot be undone"
                )
        if not self.written:
            raise ValueError("the merge is undone already, or merged nothing")
        with core.unchanged_on_error(self.model):
            for name in self.written:
                base, (weight, bias) = self.layers[name], self.tensors[name]
                base._parameters["weight"] = weight
                if "bias" in base._parameters:
                    base._parameters["bias"] = bias
                A, B, anl = self.adapters[name]
                core.attach(base, {"A": A, "B": B, "anl": anl.train(base.training)})
            for p, required in self.requires_grad.items():
                p.requires_grad_(required)
            for module, note in self.notes:
                if note is not None:
                    module._aurora = note
        self.written = {}


# --- Merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(
    model: nn.Module,
    method: str = "static",
    batches: Iterable[Any] | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    bias: bool = True,
    tolerance: float | None = None,
) -> MergeReport:
    """Fold every adapter into its layer's weight and bias, in place; plain layers return. All layers or none.

    method: "static" (the paper's), "linear", or "calibrated", which needs `batches` (see `collect`; a few hundred
    sequences suffice). held_out: batches to measure the errors on; by default every fourth of `batches`, which is then
    left out of the fit. bias: whether a layer without one may gain one. tolerance: a layer whose relative error is
    above it keeps its adapter, so that the model then has both kinds. Merge the whole model: a layer that also stands
    elsewhere, outside of `model`, would keep its adapter there, over the merged weight.

    Sums are taken in float64 and rounded once. Raises ValueError, with the model as it was, for a bad option,
    weights that are quantised, sharded or tied, a layer whose class or hooks compute more than `x W^T + b`, one that
    the batches do not reach, and NaN or infinity.
    """
    layers = core.layers(model)
    if method not in METHODS or (method == "calibrated" and batches is None):
        raise ValueError(
            f'method must be one of {", ".join(METHODS)}, and "calibrated" needs batches; got {method!r}'
        )
    if tolerance is not None and (batches is held_out is None or not tolerance >= 0):
        raise ValueError(
            f"tolerance must be at least 0 and needs batches to measure errors on, got {tolerance}"
        )
    core.check_mergeable(model, layers)
    seen, judged = _moments(model, batches, held_out)

    chosen: dict[str, tuple[Tensor, Tensor | None]] = {}
    rows = []
    for name, layer in layers.items():
        # A layer whose class knows no bias would not apply one.
        constant = _bias(layer) is not None or (bias and "bias" in layer._parameters)
        fits = {
            m: fit(layer, m, seen.get(name), constant)
            for m in (METHODS if name in seen else (method,))
        }
        B = layer.B.detach().cpu().double()
        errors = {m: f.error(judged[name], B) for m, f in fits.items()} if name in judged else {}
        if tolerance is not None and errors[method] > tolerance:
            rows.append(MergedLayer(name, errors, None, False, 0.0))
            continue
        weight, offset, rounding = merged_tensors(name, layer, fits[method])
        gains = _bias(layer) is None and offset is not None
        chosen[name] = (weight, offset)
        rows.append(MergedLayer(name, errors, method, gains, rounding))

    undo = _Undo(model, layers)  # nothing above has touched the model, and nothing below can fail
    for name, (weight, offset) in chosen.items():
        base: Any = layers[name]
        base.weight = nn.Parameter(weight, base.weight.requires_grad)
        if offset is not None:
            if _bias(base) is None:  # it was not there when `inject` noted what required a gradient
                note = base._aurora
                needed = {**note.requires_grad, "bias": note.requires_grad.get("weight", False)}
                base._aurora = note._replace(requires_grad=needed)
            base.bias = nn.Parameter(offset, base.weight.requires_grad)
    if chosen:
        core.remove(model, [layers[name] for name in chosen])
    undo.written = {name: undo.seen(layers[name]) for name in chosen}
    return MergeReport(rows, undo)


def _moments(
    model: nn.Module, batches: Iterable[Any] | None, held_out: Iterable[Any] | None
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """(moments to fit to, moments to judge by). Of a single batch there is nothing to hold out."""
    if batches is None:
        return {}, {} if held_out is None else collect(model, held_out)
    if held_out is not None:
        return collect(model, batches), collect(model, held_out)
    given = list(batches)
    if len(given) < 2:
        seen = collect(model, given)
        return seen, seen
    fitted = [batch for i, batch in enumerate(given) if i % 4 != 1]
    return collect(model, fitted), collect(model, itertools.islice(given, 1, None, 4))


def _bias(base: nn.Module) -> nn.Parameter | None:
    return base._parameters.get("bias")


def merged_tensors(
    name: str, layer: core.AuroraLinear, fitted: Affine
) -> tuple[Tensor, Tensor | None, float]:
    """(weight, bias or None to leave it, rounding loss) with an affine map folded in. ValueError if not finite."""
    A, B = (p.detach().double() for p in (layer.A, layer.B))
    M, K, c = (t.to(A.device) for t in (fitted.M, fitted.K, fitted.c))
    static = layer.anl(A.t()).t() if K.any() else torch.zeros_like(A)
    update = layer.scaling * B @ (M @ A + K @ static)
    weight = layer.merged_weight(update)
    rounding = _norm(weight.double() - layer.weight.double() - core.as_stored(layer, update)) / (
        _norm(update) or 1.0
    )
    offset, old, bias = layer.scaling * B @ c, _bias(layer), None
    if offset.any():
        total = offset if old is None else old.double() + offset
        bias = total.to(layer.weight.dtype if old is None else old.dtype)
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(f"merging would put NaN or infinity into {name}")
    return weight, bias, rounding


# --- Training so that the merge is good -------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_linearity(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Inside the block, `gap()` is the mean over layers of the squared relative error of sigma's best affine fit.

    It is taken before B, which at the start is 0 and has no part in which fit is best, over the rows of the latest
    forward of each layer. Add a multiple of it to the loss to train adapters that merge well. Off unless used. Under
    gradient checkpointing it needs `use_reentrant=False`, else it has no gradient. Raises ValueError in `gap()` if no
    layer has run.
    """
    latest: dict[str, Tensor] = {}

    def watch(name: str, layer: core.AuroraLinear) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = _running.layer_input(inputs, named).reshape(-1, layer.in_features)
            if not len(x):
                return
            z = nn.functional.linear(x, layer.A.to(x.dtype)).float()
            with torch.autocast(z.device.type, enabled=False):
                y = layer.anl(z)
                whole = y.square().sum()
                z, y = z - z.mean(0), y - y.mean(0)
                ridge = (1e-6 * z.square().sum() + 1e-30) * torch.eye(z.shape[1], device=z.device)
                left = y - z @ torch.linalg.solve(z.t() @ z + ridge, z.t() @ y)
            latest[name] = left.square().sum() / whole.clamp(min=torch.finfo(torch.float32).tiny)

        return hook

    def gap() -> Tensor:
        if not latest:
            raise ValueError("no adapted layer has run inside the block yet")
        return torch.stack(list(latest.values())).mean()

    with contextlib.ExitStack() as undo:
        for name, layer in core.layers(model).items():
            undo.callback(
                layer.register_forward_pre_hook(watch(name, layer), with_kwargs=True).remove
            )
        yield gap

"""Merging that keeps the function that was trained, and says what it loses.

Training learns `s B sigma(A x)`; a merged layer can only add an affine map of x. Three are here:

- "static", the paper's: `s B sigma(A) x`, which in mode "dynamic" is another function;
- "linear": the first-order expansion `s B (sigma(z0) + J (A x - z0))`, at 0 or at the mean of data;
- "calibrated": `s B (M A x + c)`, where `M z + c` has the least mean squared error on data.

All three are exact in mode "static", the last two wherever sigma is affine. Errors are relative,
the norm of what a map gets wrong over the norm of the adapter's output, and measured on held-out
data. Derivations: docs/merging.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from aurora import _running, _table, adapters, core, plots
from aurora._fit import METHODS as METHODS
from aurora._fit import Affine as Affine
from aurora._fit import Moments as Moments
from aurora._fit import fit as fit
from aurora._fit import norm

Method = Literal["static", "linear", "calibrated"]

# ---- Running the model over batches ----------------------------------------------------------


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[Any]) -> dict[str, Moments]:
    """The moments of every adapted layer over batches, in eval mode, adapters on.

    Args:
        model: A model with adapters.
        batches: What the model takes: mappings of keyword arguments, tuples or lists of arguments,
            or tensors. In a mapping with a 2-D "attention_mask", positions with mask 0 do not count
            in layers whose input has its shape.

    Returns:
        By layer the moments of `[z, what goes into B, sigma(A) x]`, 3 r numbers a row.

    Raises:
        ValueError: A layer never runs, or its values are not finite.
    """
    layers = core.layers(model)
    found = {name: Moments(3 * layer.config.rank) for name, layer in layers.items()}
    static = {name: _static_columns(layer) for name, layer in layers.items()}
    mask: Tensor | None = None

    def see(name: str, layer: core.AuroraLinear, x: Tensor) -> None:
        kept = mask.bool().flatten() if mask is not None and x.shape[:-1] == mask.shape else None
        at, size = 0, _rows_at_a_time(layer)
        for part in torch.split(x.reshape(-1, layer.in_features), size):
            rows = _rows(layer, static[name], part)  # (n, 3r)
            found[name].add(rows if kept is None else rows[kept[at : at + size]])
            at += size

    with _running.evaluating(model), core.watching(layers, see):
        for batch in batches:
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = given if given is not None and given.dim() == 2 else None
            _running.call(model, batch)
    for name, moments in found.items():
        if not moments.count:
            raise ValueError(f"{name} never ran on the batches: there is nothing to calibrate with")
        if not moments.is_finite():
            raise ValueError(f"{name} saw NaN or infinity on the batches; check them, or it")
    return found


def _rows_at_a_time(layer: core.AuroraLinear) -> int:
    """What is held for a moment stays below a megabyte."""
    return max(1, 4096 // int(layer.config.rank))


def _static_columns(layer: core.AuroraLinear) -> Tensor:
    """sigma(A), sigma on every column, (r, in_features)."""
    parts = torch.split(layer.A.t(), _rows_at_a_time(layer))
    return torch.cat([layer.anl(part) for part in parts]).t()


def _rows(layer: core.AuroraLinear, static: Tensor, x: Tensor) -> Tensor:
    """`[z, what goes into B, u]` for rows x (n, in_features) -> (n, 3r)."""
    z = nn.functional.linear(x, layer.A.to(x.dtype))
    u = nn.functional.linear(x, static.to(x.dtype))
    return torch.cat([z, u if layer.config.mode == "static" else layer.anl(z), u], 1)


# ---- The report ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MergedLayer:
    """What happened to one layer.

    Attributes:
        name: The layer's.
        errors: Relative error on held-out data by method; empty without batches.
        method: The one used; None if the layer stays dynamic.
        bias: Whether the layer has gained one.
        rounding: Norm of what storing the weight in its dtype lost, over that of the update.
    """

    name: str
    errors: dict[str, float]
    method: str | None
    bias: bool
    rounding: float


class MergeReport:
    """What a merge did, layer by layer. Prints as a table; notebooks show it as one.

    It holds the original weights until it is dropped. `unmerge()` puts them back: the same
    tensors, bit for bit, and the adapters around them.
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

    @property
    def gained_bias(self) -> list[str]:
        """Names of the layers that had no bias and have one now."""
        return [layer.name for layer in self.layers if layer.bias]

    def unmerge(self) -> None:
        """Undo the merge.

        Raises:
            ValueError: Something it would overwrite has changed since. The model stays as it is.
        """
        self._undo()

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for layer in self.layers:
            errors = [layer.errors.get(method) for method in METHODS]
            shown = ["-" if error is None else f"{error:.2%}" for error in errors]
            method = f"{layer.method or 'dynamic'}{' + bias' if layer.bias else ''}"
            rows.append([layer.name or "(the model)", method, f"{layer.rounding:.1e}", *shown])
        return ["layer", "merged by", "rounding", *METHODS], rows

    def _notes(self) -> str:
        done = f"{len(self.merged)} of {len(self.layers)} layers merged; errors are relative"
        if not self.gained_bias:
            return done
        return (
            f"{done}\n{len(self.gained_bias)} layers gained a bias. A class that builds them "
            "without one loses it at the next load: configure it with one (in transformers "
            "attention_bias=True, mlp_bias=True), or merge with bias=False."
        )

    def __str__(self) -> str:
        return f"{_table.text(*self._cells())}\n{self._notes()}"

    def _repr_html_(self) -> str:
        return _table.to_html(*self._cells(), caption=self._notes())

    def plot(self, axes: Any = None) -> Any:
        """Draw the errors as bars on matplotlib axes, new ones if None, and return these.

        Raises:
            ValueError: There are no errors, as the merge had no batches.
            ImportError: `axes` is None and matplotlib is not installed.
        """
        return plots.plot_merge(self, axes)


class _Undo:
    """Everything that a merge replaces, and how to put it back."""

    def __init__(self, model: nn.Module, layers: Mapping[str, core.AuroraLinear]) -> None:
        self.model, self.layers = model, dict(layers)
        self.adapters: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            self.adapters[name] = {"A": layer.A, "B": layer.B, "anl": layer.anl}
        self.tensors = {n: (m._parameters["weight"], _bias(m)) for n, m in layers.items()}
        self.before = _state(model)
        self.after: _State | None = None

    def merged(self, names: Iterable[str]) -> None:
        """Remember how the merge left the model."""
        self.layers = {name: self.layers[name] for name in names}
        self.after = _state(self.model)
        self.written = {n: _written(m) for n, m in self.layers.items()}

    def __call__(self) -> None:
        if self.after is None or not self.layers:
            raise ValueError("the merge is undone already, or merged nothing")
        present = set(self.model.modules())
        for name, layer in self.layers.items():
            plain = layer in present and not isinstance(layer, core.AuroraLinear)
            if not plain or _written(layer) != self.written[name]:
                told = "is no longer as the merge left it, so that the merge cannot be undone"
                raise ValueError(f"{name or 'the model'} {told}")
        if _state(self.model).key() != self.after.key():
            raise ValueError("what trains has changed since the merge, so that it cannot be undone")
        with core.unchanged_on_error(self.model):
            for name, layer in self.layers.items():
                weight, bias = self.tensors[name]
                layer._parameters["weight"] = weight
                if "bias" in layer._parameters:
                    layer._parameters["bias"] = bias
                self.adapters[name]["anl"].train(layer.training)
                core.attach(layer, self.adapters[name])
            for module, note in self.before.notes:
                if note is not None:
                    module.__dict__["_aurora"] = note
            for p, required in self.before.required:
                p.requires_grad_(required)
        self.layers = {}


class _State(NamedTuple):
    """What a merge changes beside weights: what parameters require, and inject's notes."""

    required: list[tuple[nn.Parameter, bool]]
    notes: list[tuple[nn.Module, core.Note | None]]

    def key(self) -> tuple[list[tuple[int, bool]], list[tuple[int, core.Note | None]]]:
        """The same, for comparison: by identity, as parameters compare elementwise."""
        required = [(id(p), needed) for p, needed in self.required]
        return required, [(id(m), note) for m, note in self.notes]


def _state(model: nn.Module) -> _State:
    required = [(p, p.requires_grad) for p in model.parameters()]
    return _State(required, [(m, m.__dict__.get("_aurora")) for m in model.modules()])


def _written(layer: nn.Module) -> list[Any]:
    """Weight and bias, so that any change to them shows, also one past autograd's version."""
    tensors = (layer._parameters.get("weight"), _bias(layer))
    return [None if t is None else (id(t), t.dtype, t.device, _fingerprint(t)) for t in tensors]


def _fingerprint(t: Tensor) -> int:
    """A number that changes with any element: its bits times odd numbers, summed modulo 2^64."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = t.detach().contiguous().flatten().view(widths[t.itemsize])
    total = 0
    for part in torch.split(bits, 1 << 20):
        odd = torch.arange(1, 2 * len(part), 2, device=part.device)
        total = (1_000_003 * total + int((part.long() * odd).sum())) % (1 << 64)
    return total


# ---- Merging ---------------------------------------------------------------------------------


@torch.no_grad()
def merge(
    model: nn.Module,
    method: Method = "static",
    batches: Iterable[Any] | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    bias: bool = False,
    tolerance: float | None = None,
) -> MergeReport:
    """Fold every adapter into its layer's weight and bias, in place; plain layers return.

    All layers or none, also on an interrupt. Merge the whole model: a layer that also stands
    elsewhere, outside of `model`, is merged there too. Sums are taken in float64 and rounded once.

    Args:
        model: A model with adapters.
        method: "static" (the paper's), "linear", or "calibrated", which needs `batches`.
        batches: See `collect`; a few hundred sequences suffice.
        held_out: Batches to measure errors on; by default every fourth of `batches`, which is then
            left out of the fit.
        bias: Whether a layer without one may gain one. It then is no longer what its class builds:
            the report says what keeps it.
        tolerance: A layer whose relative error is above it keeps its adapter.

    Returns:
        The report, which can also undo the merge.

    Raises:
        ValueError: With the model as it was: a bad option; weights that are quantised, sharded or
            tied; a layer that computes more than `x W^T + b`; one that the batches do not reach;
            NaN or infinity.

    Example:
        >>> print(aurora.merge(model, "calibrated", batches))
    """
    layers = core.layers(model)
    _check_options(method, batches, held_out, tolerance)
    adapters.refuse_others(model)
    core.check_mergeable(model, layers)
    with core.unchanged_on_error(model):
        seen, judged = _moments(model, batches, held_out)
        plans = [
            _plan(name, layer, method, seen.get(name), judged.get(name), bias, tolerance)
            for name, layer in layers.items()
        ]
        chosen = [plan for plan in plans if plan.row.method is not None]
        undo = _Undo(model, layers)
        for plan in chosen:
            _write(plan)
        if chosen:
            core.remove(model, [plan.layer for plan in chosen])
    undo.merged(plan.row.name for plan in chosen)
    return MergeReport([plan.row for plan in plans], undo)


def _check_options(method: str, batches: Any, held_out: Any, tolerance: float | None) -> None:
    if method not in METHODS or (method == "calibrated" and batches is None):
        known = f"one of {', '.join(METHODS)}"
        raise ValueError(f'method must be {known}, and "calibrated" needs batches; got {method!r}')
    if tolerance is not None and (batches is held_out is None or not tolerance >= 0):
        told = "at least 0 and needs batches to measure errors on"
        raise ValueError(f"tolerance must be {told}, got {tolerance}")


class _Plan(NamedTuple):
    """What a merge will do to a layer. offset: the new bias, None to leave it."""

    row: MergedLayer
    layer: core.AuroraLinear
    weight: Any  # a tensor wherever the layer is merged
    offset: Tensor | None


def _plan(
    name: str,
    layer: core.AuroraLinear,
    method: str,
    seen: Moments | None,
    judged: Moments | None,
    bias: bool,
    tolerance: float | None,
) -> _Plan:
    # A layer whose class knows no bias would not apply one.
    constant = _bias(layer) is not None or (bias and "bias" in layer._parameters)
    methods = METHODS if seen is not None else (method,)
    fits = {m: fit(layer, m, seen, constant) for m in methods}
    B, errors = layer.B.detach().cpu().double(), {}
    if judged is not None:
        errors = {m: fitted.error(judged, B) for m, fitted in fits.items()}
    if tolerance is not None and errors[method] > tolerance:
        return _Plan(MergedLayer(name, errors, None, False, 0.0), layer, None, None)
    weight, offset, rounding = merged_tensors(name, layer, fits[method])
    gains = _bias(layer) is None and offset is not None
    return _Plan(MergedLayer(name, errors, method, gains, rounding), layer, weight, offset)


def _write(plan: _Plan) -> None:
    layer, trains = plan.layer, plan.layer.weight.requires_grad
    layer._parameters["weight"] = core.merged_parameter(plan.weight, trains)
    if plan.offset is None:
        return
    if plan.row.bias and "_aurora" in layer.__dict__:  # was not there when inject took its notes
        note: core.Note = layer.__dict__["_aurora"]
        required = {**note.requires_grad, "bias": note.requires_grad.get("weight", False)}
        layer.__dict__["_aurora"] = note._replace(requires_grad=required)
    layer._parameters["bias"] = nn.Parameter(plan.offset, trains)


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
    """A layer's tensors with an affine map folded in.

    Returns:
        The weight, the bias or None to leave it, and the relative loss by rounding.

    Raises:
        ValueError: They are not finite.
    """
    A, B = (p.detach().double() for p in (layer.A, layer.B))
    M, K, c = (t.to(A.device) for t in (fitted.M, fitted.K, fitted.c))
    static = layer.anl(A.t()).t() if K.any() else torch.zeros_like(A)  # (r, in_features)
    update = layer.scaling * B @ (M @ A + K @ static)  # (out_features, in_features)
    weight = layer.merged_weight(update)
    lost = weight.double() - layer.weight.double() - core.as_stored(layer, update)
    offset, old, bias = layer.scaling * B @ c, _bias(layer), None  # (out_features,)
    if offset.any():
        total = offset if old is None else old.double() + offset
        bias = total.to(layer.weight.dtype if old is None else old.dtype)
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(f"merging would put NaN or infinity into {name or 'the layer'}")
    return weight, bias, norm(lost) / (norm(update) or 1.0)


# ---- Training so that the merge is good ------------------------------------------------------


@contextlib.contextmanager
def watch_linearity(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Inside the block, `gap()` says how far from affine sigma is on the latest forward.

    It is the mean over layers of the squared relative error of sigma's best affine fit over the
    rows of the layer's latest forward. The error is taken before B, which at the start is 0 and
    has no part in which fit is best. Add a multiple to the loss to train adapters that merge well.
    Under gradient checkpointing it needs `use_reentrant=False`, else it has no gradient.

    Args:
        model: A model with adapters.

    Yields:
        `gap`, which returns a scalar float32 tensor and raises ValueError if no layer has run.

    Raises:
        ValueError: The model has no adapters.

    Example:
        >>> with aurora.watch_linearity(model) as gap:
        ...     loss = loss_of(model, batch) + 0.1 * gap()
    """
    latest: dict[str, Tensor] = {}

    def see(name: str, layer: core.AuroraLinear, x: Tensor) -> None:
        if x.numel():
            latest[name] = _nonlinearity(layer, x.reshape(-1, layer.in_features))

    def gap() -> Tensor:
        if not latest:
            raise ValueError("no adapted layer has run inside the block yet")
        return torch.stack(list(latest.values())).mean()

    with core.watching(core.layers(model), see):
        yield gap


def _nonlinearity(layer: core.AuroraLinear, x: Tensor) -> Tensor:
    """The squared relative error of the best affine fit to sigma on rows x (N, in_features)."""
    z = nn.functional.linear(x, layer.A.to(x.dtype)).float()  # (N, r)
    with torch.autocast(z.device.type, enabled=False):
        y = layer.anl(z)
        whole = y.square().sum()
        z, y = z - z.mean(0), y - y.mean(0)
        ridge = (1e-6 * z.square().sum() + 1e-30) * torch.eye(z.shape[1], device=z.device)
        left = y - z @ torch.linalg.solve(z.t() @ z + ridge, z.t() @ y)
    nonlinearity: Tensor = left.square().sum() / whole.clamp(min=torch.finfo(torch.float32).tiny)
    return nonlinearity

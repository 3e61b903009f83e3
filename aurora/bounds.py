"""How large outputs and gradients of adapters can get: certified, and checked on a running model.

`certify` bounds one layer, `report_bounds` tabulates a model, `assert_bounded` is one line for a
test suite. Nothing is sampled: every bound is proved in docs/theory.md, sections 3 and 4, and
computed in float64 from the parameters. Each holds in exact arithmetic, and `allowance` says by
how much rounding may exceed it. They take the paper's Proposition 2.2 (arXiv:2505.18738), that
gradients are bounded, from "some constant" to numbers.

Norms of vectors are Euclidean, of matrices spectral, of gradients of parameters Frobenius.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aurora import _certificate, _rounding, _running, _table, core, plots

# --- One layer ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Upper bounds for one layer; for an `ANL` the layer is sigma itself, with input z.

    Attributes:
        value: |sigma(z)| per channel, (r,), float64.
        jacobian: |d sigma / d z|, the Lipschitz constant of sigma.
        output: The adapter's part of the layer's output, for one row.
        lipschitz: |d output / d input| of the adapter.
        gradients: Of the loss, by name: with respect to "x" (the adapter's part of it) and to
            every parameter that trains.
    """

    value: Tensor
    jacobian: float
    output: float
    lipschitz: float
    gradients: dict[str, float]

    def numbers(self) -> dict[str, float]:
        """All bounds by name: "value of channel 0", "jacobian", "output", "gradient of A", ..."""
        found = {f"value of channel {j}": v for j, v in enumerate(self.value.tolist())}
        found |= {"jacobian": self.jacobian, "output": self.output, "lipschitz": self.lipschitz}
        return found | {f"gradient of {name}": v for name, v in self.gradients.items()}


def certify(
    module: core.ANL | core.AuroraLinear, x: float = math.inf, upstream: float = 1.0
) -> Certificate:
    """Bounds in exact arithmetic for one layer, its dropout and its base aside.

    Args:
        module: An adapted layer, or an `ANL` alone.
        x: The largest norm of a row of the input. With the default, any input, what grows with x is
            infinite: the gradient of A, the output in static mode, and most under an activation
            without bounds, "leaky_relu" or "identity".
        upstream: The norm of the gradient that arrives at the output. Of several rows, the sum
            of the norms of the rows' gradients, because gradients of parameters add up over rows.

    Returns:
        The bounds. Proofs: docs/theory.md, sections 3 and 4.

    Raises:
        ValueError: A norm is negative or NaN, or a parameter is not finite or on the meta device.

    Example:
        >>> aurora.certify(layer, x=10.0).output
    """
    for name, given in (("x", x), ("upstream", upstream)):
        if not given >= 0:
            raise ValueError(f"{name} is a norm and cannot be {given}")
    layer = _certificate.Layer(module, x)
    return _compose(layer, layer.suprema(), x, upstream)


def allowance(
    module: core.ANL | core.AuroraLinear,
    x: float,
    upstream: float,
    dtype: torch.dtype,
    rows: int = 1,
) -> Certificate:
    """How far rounding may carry a layer beyond its certificate.

    Every step of the layer is followed, forward and backward: sigma in float32 or wider, the
    products with A and B in `dtype`. Proofs: docs/theory.md, section 5.

    Args:
        module: An adapted layer, or an `ANL` alone.
        x: The largest norm of a row of the input.
        upstream: The sum over rows of the norms of the gradient that arrives at the output.
        dtype: Of the input and the output, the coarser of the two.
        rows: How many rows the gradients of parameters add up.

    Returns:
        What to add to the numbers of `certify`. Infinite where a step on the way may overflow its
        dtype: there nothing is promised.

    Raises:
        ValueError: As in `certify`.
    """
    layer = _certificate.Layer(module, x)
    rounding = _rounding.Rounding(layer, x, dtype, rows)
    found = rounding.backward(upstream, rows)
    gradients = {"x": found["x"].error}
    gradients |= {name: found[name.rpartition(".")[2]].error for name in layer.names}
    return Certificate(
        value=rounding.value(),
        jacobian=rounding.jacobian().error,
        output=rounding.output().error,
        lipschitz=rounding.backward(1.0, 1)["x"].error,
        gradients=gradients,
    )


def _compose(
    layer: _certificate.Layer,
    c: _certificate.Constants,
    x: float,
    upstream: float,
) -> Certificate:
    """The bounds as products of the constants; q = s B^t g is the gradient at sigma's output."""
    times = _certificate.product
    s, once = layer.scaling, x if layer.static else 1.0
    q = (s, c.up, upstream)
    slope = (s, *c.image) if layer.static else (s, c.up, c.jacobian, c.down)
    by_parameter = {
        "A": times(*q, c.jacobian, x),
        "B": times(s, c.spread, once, upstream),
        "H": times(*q, c.inner, once),
        "spline_weight": times(*q, c.basis, once),
    }
    gradients = {"x": times(*slope, upstream)}
    gradients |= {name: by_parameter[name.rpartition(".")[2]] for name in layer.names}
    return Certificate(c.value, c.jacobian, times(s, *c.image, once), times(*slope), gradients)


class UnboundedWarning(UserWarning):
    """`assert_bounded` could not check a norm: a step on the way to it may overflow its dtype."""


# --- A model: what is measured ------------------------------------------------------------------


class _Measured(NamedTuple):
    """One call of a layer: the largest |x| of a row, the upstream norm, and norms by name.

    dtype: the coarsest of input and gradient.
    """

    x: float
    upstream: float
    rows: int
    dtype: torch.dtype
    norms: dict[str, float]


class _Call(NamedTuple):
    """One call of a layer in a forward pass: its input and its output."""

    name: str
    x: Tensor
    out: Tensor


def _measure(model: nn.Module, inputs: Any) -> list[tuple[str, _Measured]]:
    """The calls of adapted layers in one forward and backward pass in evaluation mode."""
    layers = {name: layer for name, layer in core.layers(model).items() if layer.enabled}
    for name, layer in layers.items():
        own = layer.adapter_parameters()
        _certificate.check_finite({f"{name}.{key}": p for key, p in own.items()})
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_running.evaluating(model))
        calls = undo.enter_context(_recording(layers))
        output = _running.call(model, inputs)
        made = [call for call in calls if call.out.requires_grad and call.x.numel()]
        measured = []
        for call, grad in zip(made, _upstream(output, made), strict=True):
            _certificate.check_finite(
                {
                    f"the input of {call.name}": call.x,
                    f"the gradient that reaches {call.name}": grad,
                }
            )
            measured.append((call.name, _norms(layers[call.name], call.x, grad)))
        return measured


@contextlib.contextmanager
def _recording(layers: Mapping[str, core.AuroraLinear]) -> Iterator[list[_Call]]:
    """Inside the block every call of a layer is appended to the list."""
    calls: list[_Call] = []

    def record(
        name: str, layer: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], out: Tensor
    ) -> Tensor:
        x = args[0] if args else next(iter(named.values()))
        calls.append(_Call(name, x.detach().clone(), out))
        return out.clone()  # what the model then does in place leaves the recorded tensor alone

    with contextlib.ExitStack() as undo:
        for name, layer in layers.items():
            hook = functools.partial(record, name)
            undo.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


def _upstream(output: Any, made: list[_Call]) -> tuple[Tensor, ...]:
    """The gradients that reach the recorded outputs, from random ones at the model's outputs."""
    ends = [end for end in _running.leaves(output) if end.requires_grad]
    if not ends or not made:
        raise ValueError(
            "no output depends on an adapter that ran; give the model itself, not a compiled one"
        )
    cotangents = _running.random_like(ends)
    # Not backward(): it would write .grad, and wake whoever waits for it.
    outs = [call.out for call in made]
    return torch.autograd.grad(ends, outs, cotangents, materialize_grads=True)


def _by_row(x: Tensor) -> Tensor:
    """Norms of the rows (..., d) -> (rows,), in float64."""
    return _certificate.norm(x.detach().cpu().double().reshape(-1, x.shape[-1]))


def _norms(layer: core.AuroraLinear, x: Tensor, upstream: Tensor) -> _Measured:
    """Run the adapter alone on a call's input and upstream gradient."""
    trained = {n: p for n, p in layer.adapter_parameters().items() if p.requires_grad}
    leaves = {"x": x.requires_grad_()} | trained
    change = layer.add_adapter(torch.zeros_like(upstream), x)
    norms = {"output": float(_by_row(change).max())}
    grads = torch.autograd.grad(change, list(leaves.values()), upstream, materialize_grads=True)
    for name, grad in zip(leaves, grads, strict=True):
        rows = _by_row(grad) if name == "x" else _by_row(grad.flatten())
        norms[f"gradient of {name}"] = float(rows.sum())
    coarsest = max((x.dtype, upstream.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    sizes = _by_row(x)
    total = float(_by_row(upstream).sum())
    norms |= _norms_of_sigma(layer, x.detach())
    return _Measured(float(sizes.max()), total, len(sizes), coarsest, norms)


def _norms_of_sigma(layer: core.AuroraLinear, x: Tensor) -> dict[str, float]:
    """The largest |sigma| by channel and |J| over the points that x reaches."""
    if layer.config.mode == "static":
        z = layer.A.t()
    else:
        z = x.reshape(-1, layer.in_features) @ layer.A.t().to(x.dtype)
    z = z.detach().requires_grad_()  # (N, r)
    sigma = layer.anl(z)
    jacobian = [
        torch.autograd.grad(channel.sum(), z, retain_graph=True)[0] for channel in sigma.unbind(-1)
    ]
    found = {"jacobian": _certificate.spectral(torch.stack(jacobian, 1).cpu().double())}
    values = sigma.detach().abs().amax(0).tolist()
    return found | {f"value of channel {j}": v for j, v in enumerate(values)}


def assert_bounded(model: nn.Module, inputs: Any) -> None:
    """For test suites: no norm measured in a forward and a backward pass exceeds its certificate.

    The pass runs in evaluation mode, from random gradients at the outputs, and leaves the model
    as it was: hooks, `training`, `grad`.

    Args:
        model: A model with adapters.
        inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        AssertionError: A norm exceeds its certificate; the message names layer, quantity and both.
        ValueError: No adapted layer ran, or one holds or meets NaN or infinity.

    Warns:
        UnboundedWarning: A step on the way to a norm may overflow the layer's dtype, so that its
            allowance is infinite and the norm, though finite, was not checked. To fail on it, run
            `pytest -W error::aurora.bounds.UnboundedWarning`.

    Example:
        >>> aurora.assert_bounded(model, batch)
    """
    layers = core.layers(model)
    for name, seen in _measure(model, inputs):
        unchecked = _compare(name or "the model", layers[name], seen)
        if unchecked:
            warnings.warn(
                f"{name or 'the model'}: a step to {', '.join(unchecked)} may overflow {seen.dtype}"
                ", so this was not checked; run the model in a wider dtype or on smaller inputs",
                UnboundedWarning,
                stacklevel=2,
            )


def _compare(name: str, layer: core.AuroraLinear, seen: _Measured) -> list[str]:
    """AssertionError for a norm above its certificate; returns what may overflow its dtype."""
    bounds = certify(layer, seen.x, seen.upstream).numbers()
    slack = allowance(layer, seen.x, seen.upstream, seen.dtype, seen.rows).numbers()
    for quantity, norm in seen.norms.items():
        if not math.isfinite(norm):  # no norm, whatever the allowance
            raise AssertionError(
                f"{name}: {quantity} is {norm}, its certificate {bounds[quantity]:.6g}: a step "
                f"overflowed {seen.dtype}; run the model in a wider dtype or on smaller inputs"
            )
        if not norm <= bounds[quantity] + slack[quantity]:
            raise AssertionError(
                f"{name}: {quantity} measured {norm:.6g}, above its certificate "
                f"{bounds[quantity]:.6g} (rounding may add {slack[quantity]:.2g})"
            )
    return [quantity for quantity in seen.norms if math.isinf(slack[quantity])]


# --- A model: the report ------------------------------------------------------------------------


class LayerBounds(NamedTuple):
    """A row of the report.

    Attributes:
        name: The layer.
        jacobian: |J| of sigma, certified.
        initial: The same at the start, the median of fresh layers.
        measured: The largest |J| met; None for a layer that did not run.
        tightness: Measured over certified |J|.
        output: The size of the adapter's output, certified.
        measured_output: The largest met.
    """

    name: str
    jacobian: float
    initial: float
    measured: float | None
    tightness: float | None
    output: float
    measured_output: float | None


_HEADER = ("layer", "Jacobian", "at start", "measured", "tightness", "output", "measured")


@dataclasses.dataclass(frozen=True)
class BoundsReport:
    """One row per adapted layer. Prints as a table, also in notebooks; `plot` draws it."""

    rows: list[LayerBounds]

    def _cells(self) -> list[list[str]]:
        return [[name, *map(_table.cell, cells)] for name, *cells in self.rows]

    def __str__(self) -> str:
        return _table.text(_HEADER, self._cells())

    def _repr_html_(self) -> str:
        return _table.to_html(_HEADER, self._cells())

    def plot(self, axes: Any = None) -> Any:
        """Draw the Jacobian norms by layer on matplotlib axes, new ones if None; return them."""
        return plots.plot_bounds(self, axes)


@functools.cache
def _initial(config: core.AuroraConfig) -> float:
    """The certified Jacobian at the start: the median over 25 fresh layers."""
    with torch.random.fork_rng(devices=[]):  # leaves the random state alone
        torch.manual_seed(0)
        return statistics.median(
            certify(core.ANL(config, device="cpu")).jacobian for _ in range(25)
        )


def report_bounds(model: nn.Module, inputs: Any = None) -> BoundsReport:
    """The certified |J| of sigma and size of the adapter's output, layer by layer.

    Args:
        model: A model with adapters.
        inputs: As for `assert_bounded`; the report then holds what they reach, too. Without inputs
            the output is bounded for any input.

    Returns:
        A report that prints as a table.

    Raises:
        ValueError: As in `assert_bounded`.

    Example:
        >>> print(aurora.report_bounds(model, batch))
    """
    seen = [] if inputs is None else _measure(model, inputs)
    rows = []
    for name, layer in core.layers(model).items():
        calls = [call for called, call in seen if called == name]
        certified = certify(layer, max((call.x for call in calls), default=math.inf))
        measured, output = (
            max((call.norms[quantity] for call in calls), default=None)
            for quantity in ("jacobian", "output")
        )
        tightness = None if measured is None else measured / (certified.jacobian or 1.0)
        row = (certified.jacobian, _initial(layer.config), measured, tightness)
        rows.append(LayerBounds(name, *row, certified.output, output))
    return BoundsReport(rows)

"""Pictures, drawn with matplotlib: `pip install "aurora-adapters[plots]"`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aurora import _running, core

if TYPE_CHECKING:
    from aurora.bounds import BoundsReport
    from aurora.merging import MergeReport

_POINTS = 301  # of a curve
_ROWS = 4096  # of a layer's data that are kept, spread over the batches


def pyplot() -> Any:
    """matplotlib's pyplot. Raises ImportError, with the name of the extra, if it is absent."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        message = 'drawing needs matplotlib: pip install "aurora-adapters[plots]"'
        raise ImportError(message) from error
    return pyplot


def new_axes(axes: Any, width: float, height: float) -> Any:
    """The axes that were given, or new ones on a figure of this size in inches.

    Raises:
        ImportError: matplotlib is needed and not installed; the message names the extra.
    """
    if axes is not None:
        return axes
    return pyplot().subplots(figsize=(width, height), layout="constrained")[1]


# ---- The learned curves ---------------------------------------------------------------------


def plot(
    model: nn.Module, batches: Iterable[Any] | None = None, *, match: str | None = None
) -> Any:
    """Draw each layer's learned curves: sigma_j over z_j, a panel a layer and a line a channel.

    The other channels stay at their mean meanwhile, or at 0 without data. Below the curves lies
    the density of z on the batches; of the entries of A, which sigma is applied to, in mode
    "static". With data, a panel also says how much of the adapter's output no straight line
    explains: the root mean square of `B (sigma(z) - M z - c)` for the best M and c, over that of
    `B sigma(z)`. 0% is what LoRA could do. Dotted lines are the ends of the grid.

    Args:
        model: A model with adapters.
        batches: What the model takes: mappings, tuples or tensors. Positions where a 2-D
            "attention_mask" is 0 do not count. The model runs in evaluation mode, then returns to
            the mode it was in.
        match: A regex; only layers whose name it matches (`re.search`) are drawn.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: If the model has no adapters, or `match` is invalid or matches none.
        ImportError: If matplotlib is not installed.

    Example:
        >>> aurora.plot(model, batches, match=r"layer\\.0").savefig("curves.png")
    """
    found = core.layers(model)
    if match is not None:
        found = _matching(found, match)
    plt = pyplot()
    data = _hidden_values(model, found, batches)
    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    size = (3.2 * columns + 0.6, 2.5 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, (name, layer) in zip(axes.flat, found.items(), strict=False):
        _draw_curves(panel, name, layer, data.get(name))
    for panel in axes.flat[len(found) :]:
        panel.set_axis_off()
    figure.supxlabel("hidden value z", fontsize="medium")
    figure.supylabel("sigma(z)", fontsize="medium")
    return figure


def _matching(found: Mapping[str, core.AuroraLinear], match: str) -> dict[str, core.AuroraLinear]:
    try:
        chosen = {name: layer for name, layer in found.items() if re.search(match, name)}
    except (re.error, TypeError) as error:
        raise ValueError(f"match={match!r} is not a regular expression: {error}") from error
    if not chosen:
        raise ValueError(f"match={match!r} matches no adapted layer, such as {next(iter(found))}")
    return chosen


@torch.no_grad()
def _hidden_values(
    model: nn.Module, found: Mapping[str, core.AuroraLinear], batches: Iterable[Any] | None
) -> dict[str, Tensor]:
    """Name -> z (N, r), float64, on the CPU: what sigma is applied to, at most some _ROWS of it."""
    dynamic = {name: layer for name, layer in found.items() if layer.config.mode == "dynamic"}
    seen: dict[str, list[Tensor]] = {name: [] for name in dynamic}
    mask: Tensor | None = None

    def look(name: str, layer: core.AuroraLinear, x: Tensor) -> None:
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask.to(x.device).bool()]  # padding left out
        z = nn.functional.linear(x.to(layer.A.dtype), layer.A).reshape(-1, layer.config.rank)
        seen[name].append(z.cpu().double())

    if batches is not None:
        with _running.evaluating(model), core.watching(dynamic, look):
            for batch in batches:
                given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                mask = given if given is not None and given.dim() == 2 else None
                _running.call(model, batch)
    data = {name: _thinned(torch.cat(parts)) for name, parts in seen.items() if parts}
    static = {name: found[name].A.t().cpu().double() for name in found if name not in dynamic}
    return data | {name: _thinned(z) for name, z in static.items()}


def _thinned(z: Tensor) -> Tensor:
    """At most _ROWS finite rows of z, evenly spread."""
    z = z[z.isfinite().all(1)]
    return z[:: max(1, math.ceil(len(z) / _ROWS))]


@torch.no_grad()
def curves(layer: core.AuroraLinear, at: Tensor, t: Tensor) -> Tensor:
    """sigma_j (r, P) at `z_j = t[j]` for t (r, P), the other channels at `at` (r,)."""
    r = layer.config.rank
    z = at.repeat(r, t.shape[1], 1)  # (r, P, r): a channel's places, one after the other
    index = torch.arange(r)
    z[index, :, index] = t
    out: Tensor = layer.anl(z.to(layer.A.device, core.wide_dtype(layer.A)))
    return out[index, :, index].cpu()


@torch.no_grad()
def bend(layer: core.AuroraLinear, z: Tensor) -> float:
    """What no affine map of z (N, r) explains of `B sigma(z)`, relative, by root mean squares."""
    values = layer.anl(z.to(layer.A.device, core.wide_dtype(layer.A))).cpu().double()  # (N, r)
    B = layer.B.detach().cpu().double()
    gram = B.t() @ B if B.any() else torch.eye(len(B.t()), dtype=B.dtype)  # (r, r)
    straight = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)  # (N, r + 1)
    rest = values - straight @ (torch.linalg.pinv(straight) @ values)
    total = ((values @ gram) * values).sum()
    return float((((rest @ gram) * rest).sum() / total).clamp(0, 1).sqrt()) if total > 0 else 0.0


def _draw_curves(panel: Any, name: str, layer: core.AuroraLinear, z: Tensor | None) -> None:
    """One layer's panel."""
    low, high = layer.config.grid_range
    r = layer.config.rank
    title = name if len(name) <= 32 else f"...{name[-29:]}"
    if z is None or len(z) == 0:
        margin = 0.25 * (high - low)
        ends = torch.tensor([[low - margin, high + margin]], dtype=torch.float64).expand(r, 2)
        at = torch.zeros(r, dtype=torch.float64)
    else:
        ends = torch.quantile(z, torch.tensor([0.005, 0.995], dtype=z.dtype), dim=0).t()  # (r, 2)
        at = z.mean(0)
        title += f"  ({bend(layer, z):.0%} bent)"
    steps = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    t = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * steps  # (r, P)
    y = curves(layer, at, t)
    colors = pyplot().get_cmap("tab10" if r <= 10 else "viridis")
    for j in range(r):
        color = colors(j if r <= 10 else j / (r - 1))
        panel.plot(t[j], y[j], color=color, lw=1.8 if r <= 4 else 0.9, label=f"channel {j}")
    if z is not None and len(z):
        _draw_density(panel, z, ends, [colors(j) for j in range(r)] if r <= 4 else None)
    for end in (low, high):
        if ends.min() <= end <= ends.max():
            panel.axvline(end, color="0.6", lw=0.8, ls=":", zorder=0)
    panel.set_title(title, fontsize="small")
    panel.tick_params(labelsize="x-small")


def _draw_density(panel: Any, z: Tensor, ends: Tensor, colors: list[Any] | None) -> None:
    """The density of the data along the bottom; all channels together if they have no colors."""
    below = panel.twinx()
    below.set_zorder(panel.get_zorder() - 1)
    panel.patch.set_visible(False)
    span = (float(ends[:, 0].min()), float(ends[:, 1].max()))
    span = span if span[0] < span[1] else (span[0] - 0.5, span[0] + 0.5)
    values = [z.flatten()] if colors is None else list(z.t())
    shades = ["0.5"] if colors is None else colors
    for value, shade in zip(values, shades, strict=True):
        below.hist(value.numpy(), bins=48, range=span, density=True, color=shade, alpha=0.18)
    below.set_ylim(0, 3 * below.get_ylim()[1])  # the lower third
    below.set_axis_off()


# ---- Reports --------------------------------------------------------------------------------


def plot_bounds(report: BoundsReport, axes: Any = None) -> Any:
    """Draw the norms of the Jacobian of sigma, layer by layer: certified, at the start, measured.

    Args:
        report: what `aurora.report_bounds` returned.
        axes: the matplotlib axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ImportError: `axes` is None and matplotlib is not installed.
    """
    axes = new_axes(axes, 8, 1.5 + 0.25 * len(report.rows))
    rows = report.rows[::-1]  # bars are stacked from below
    names = [row.name for row in rows]
    axes.barh(names, [row.jacobian for row in rows], color="lightgray", label="certified")
    axes.plot([row.initial for row in rows], names, "k|", label="certified, at the start")
    axes.plot([row.measured for row in rows], names, "o", label="measured")
    axes.set_xlabel("norm of the Jacobian of sigma")
    axes.legend()
    return axes


def plot_merge(report: MergeReport, axes: Any = None) -> Any:
    """Draw the relative errors of a merge, layer by layer, one bar for each method.

    Args:
        report: what `aurora.merge` returned.
        axes: the matplotlib axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: the merge had no batches, so that there are no errors.
        ImportError: `axes` is None and matplotlib is not installed.
    """
    measured = [layer for layer in report.layers if layer.errors]
    if not measured:
        raise ValueError("there are no errors to draw: merge with batches")
    axes = new_axes(axes, max(6.0, 0.4 * len(measured)), 4.5)
    for i, method in enumerate(measured[0].errors):
        places = [j + 0.27 * (i - 1) for j in range(len(measured))]
        axes.bar(places, [layer.errors[method] for layer in measured], 0.27, label=method)
    names = [layer.name for layer in measured]
    axes.set_xticks(range(len(measured)), names, rotation=90, fontsize="x-small")
    axes.set(ylabel="relative error of the adapter's output", yscale="log")
    axes.legend()
    return axes

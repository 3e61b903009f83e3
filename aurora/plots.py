"""Pictures, drawn on matplotlib axes: `pip install "aurora-adapters[plots]"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aurora.bounds import BoundsReport
    from aurora.merging import MergeReport


def new_axes(axes: Any, width: float, height: float) -> Any:
    """The axes that were given, or new ones on a figure of this size in inches.

    Raises:
        ImportError: matplotlib is needed and not installed; the message names the extra.
    """
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        message = 'drawing needs matplotlib: pip install "aurora-adapters[plots]"'
        raise ImportError(message) from error
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


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

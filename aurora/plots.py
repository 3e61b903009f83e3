"""Pictures, drawn on matplotlib axes: `pip install "aurora-adapters[plots]"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aurora.bounds import BoundsReport


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

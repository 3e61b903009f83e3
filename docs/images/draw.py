"""Draws docs/images/adapter.png, the README's picture: `python docs/images/draw.py`.

Needs the extra `plots`. The curve is learned while you wait. A frozen layer must come to do
something more, `u g(v . x)`, where g has a dead zone and saturates. One adapter of rank 1 is fitted
to it, beside the best straight line, which is what LoRA can do.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from torch import Tensor, nn

import aurora

FROZEN, FRAME, INK = "#e8eaed", "#9aa0a6", "#202124"
TRAINED, PALE = "#6d3fc0", "#ece4fb"
PATH = Path(__file__).with_name("adapter.png")


def bend(t: Tensor) -> Tensor:
    """A dead zone of 0.5 on either side, a slope of 1, and saturation beyond 1.75."""
    return t.sign() * (t.abs() - 0.5).clamp(0.0, 1.25)


def learn() -> dict[str, Tensor]:
    """What the adapter should add, what it adds, and the best line, over the hidden value z."""
    torch.manual_seed(0)
    base = nn.Linear(32, 32)
    v, u = (nn.functional.normalize(torch.randn(32), dim=0) for _ in range(2))
    x = torch.randn(1024, 32)
    with torch.no_grad():
        target = base(x) + torch.outer(bend(x @ v) + 0.1 * torch.randn(len(x)), u)
    layer = aurora.AuroraLinear(base, aurora.recommended(rank=1))
    optimizer = torch.optim.Adam(layer.adapter_parameters().values(), lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        optimizer.step()
    with torch.no_grad():
        z = x @ layer.A[0]
        grid = torch.linspace(*z.quantile(torch.tensor([0.002, 0.998])).tolist(), 400)
        added = layer.scaling * (u @ layer.B) * layer.anl(grid[:, None]).squeeze(1)
        wanted = (target - layer.base(x)) @ u
        if (z @ wanted) < 0:  # the sign of a hidden channel is free
            z, grid = -z, -grid
        slope = (z @ wanted) / (z @ z)
        return {"z": z, "wanted": wanted, "grid": grid, "added": added, "line": slope * grid}


def box(ax: Any, x: float, y: float, w: float, h: float, text: str, frozen: bool = False) -> None:
    """A rounded box with a text in it."""
    color, edge = (FROZEN, FRAME) if frozen else (PALE, TRAINED)
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=color, ec=edge, lw=1.6))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=17, color=INK)


def arrow(ax: Any, *points: tuple[float, float]) -> None:
    """A line through all points that ends in an arrow's head."""
    for start, end in itertools.pairwise(points):
        head = "-|>" if end == points[-1] else "-"
        ax.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle=head,
                mutation_scale=15,
                lw=1.5,
                color=INK,
                shrinkA=0,
                shrinkB=0,
            )
        )


def funnel(ax: Any, x: float, left: float, right: float, text: str) -> None:
    """A narrow matrix, drawn as high on each side as the vector there is long."""
    corners = [(x, 1 - left), (x, 1 + left), (x + 0.8, 1 + right), (x + 0.8, 1 - right)]
    ax.add_patch(Polygon(corners, fc=PALE, ec=TRAINED, lw=1.6, joinstyle="round"))
    ax.text(x + 0.4, 1, text, ha="center", va="center", fontsize=17, color=INK, style="italic")


def diagram(ax: Any, found: dict[str, Tensor]) -> None:
    """The layer: what is frozen above, what is trained below."""
    box(ax, 1.7, 2.6, 4.6, 1.1, "$W x + b$", frozen=True)
    ax.text(4.0, 3.85, "frozen", ha="center", va="bottom", fontsize=12, color="#5f6368")
    funnel(ax, 1.7, 0.75, 0.3, "A")
    box(ax, 3.2, 0.45, 1.6, 1.1, "")
    curve_x, curve_y = (0.64 * t / t.abs().max() for t in (found["grid"], found["added"]))
    ax.plot(4 + curve_x, 1 + 0.55 * curve_y, color=TRAINED, lw=2.2, solid_capstyle="round")
    ax.text(4.0, 1.65, r"$\sigma$", ha="center", va="bottom", fontsize=15, color=INK)
    funnel(ax, 5.5, 0.3, 0.75, "B")
    ax.text(4.0, 0.02, "trained", ha="center", va="top", fontsize=12, color=TRAINED)
    ax.text(0.3, 3.15, "$x$", ha="center", va="center", fontsize=17, color=INK)
    arrow(ax, (0.55, 3.15), (1.7, 3.15))
    arrow(ax, (1.1, 3.15), (1.1, 1.0), (1.7, 1.0))
    arrow(ax, (2.5, 1.0), (3.2, 1.0))
    arrow(ax, (4.8, 1.0), (5.5, 1.0))
    arrow(ax, (6.3, 3.15), (7.05, 3.15))
    arrow(ax, (6.3, 1.0), (7.3, 1.0), (7.3, 2.9))
    ax.text(6.75, 1.12, r"$\times s$", ha="center", va="bottom", fontsize=12, color=INK)
    ax.add_patch(plt.Circle((7.3, 3.15), 0.25, fc="white", ec=INK, lw=1.5))
    ax.text(7.3, 3.14, "+", ha="center", va="center", fontsize=16, color=INK)
    arrow(ax, (7.55, 3.15), (8.3, 3.15))
    ax.set(xlim=(0, 8.4), ylim=(-0.35, 4.25), aspect="equal")
    ax.axis("off")


def curves(ax: Any, found: dict[str, Tensor]) -> None:
    """The learned curve over its data."""
    ax.scatter(
        found["z"],
        found["wanted"],
        s=5,
        color=FRAME,
        alpha=0.45,
        lw=0,
        label="what the data ask for",
    )
    ax.plot(
        found["grid"],
        found["line"],
        color=INK,
        lw=1.4,
        ls=(0, (4, 3)),
        label="the best line (LoRA)",
    )
    ax.plot(found["grid"], found["added"], color=TRAINED, lw=2.6, label="learned by AuroRA")
    ax.set_xlabel("hidden value  $z = A x$", fontsize=11, color=INK)
    ax.set_ylabel(r"added to the output,  $s\,B\,\sigma(z)$", fontsize=11, color=INK)
    ax.legend(frameon=False, fontsize=10, loc="upper left", markerscale=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    ax.locator_params(nbins=5)


def main() -> None:
    """Learn and draw."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.8), width_ratios=(1.75, 1), layout="constrained"
    )
    found = learn()
    diagram(left, found)
    curves(right, found)
    figure.savefig(PATH, dpi=120, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()

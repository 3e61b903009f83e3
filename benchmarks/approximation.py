"""Approximation: how near does an adapter of one layer come to a map, at how many parameters?

Everything in float64. LoRA's best is known in closed form (reduced-rank regression; for white
inputs the truncated SVD) and is the floor for any linear adapter. The others are fitted: B in
closed form for the hidden vectors at hand; A, H and the spline weights by L-BFGS, the best of
several restarts. Every fit is one line of JSON and is not done again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aurora
from benchmarks.lab import data, folds, models, records, task
from benchmarks.lab import options as command
from benchmarks.lab.records import Lines, Record
from benchmarks.lab.report import markdown_table, picture, write_report
from benchmarks.lab.training import train

WIDTH = 32  # of the layers with made-up inputs
POINTS = 4096  # to fit, and as many fresh ones to be judged by
RESTARTS, ITERATIONS, WINDOW, FALL = 5, 600, 40, 1e-4


class Points(NamedTuple):
    """Inputs and what a map makes of them.

    X (d_in, N); Y (d_out, N); V (m, d_in), the map's directions, if known; whether it is linear.
    """

    X: Tensor
    Y: Tensor
    V: Tensor | None = None
    linear: bool = False


# --- Adapters of one layer ------------------------------------------------------------------------


class Adapter(nn.Module):
    """B phi(X) with hidden vectors phi: LoRA with a mixer (`config` None) or AuroRA.

    B is solved for, not stored.
    """

    def __init__(self, width: int, rank: int, config: aurora.AuroraConfig | None) -> None:
        super().__init__()
        self.config = config
        self.A = nn.Parameter(torch.empty(rank, width, dtype=torch.float64))
        self.mixer = (
            nn.Parameter(torch.empty(rank, rank, dtype=torch.float64)) if config is None else None
        )
        self.anl = None if config is None else aurora.ANL(config, dtype=torch.float64)

    def hidden(self, X: Tensor) -> Tensor:
        """phi (r, N)."""
        if self.anl is None:
            assert self.mixer is not None
            return self.mixer @ self.A @ X
        assert self.config is not None
        static = self.config.mode == "static"
        return self.anl.columns(self.A) @ X if static else self.anl.columns(self.A @ X)

    @torch.no_grad()
    def start(self, points: Points, best_A: Tensor, restart: int) -> None:
        """Begin a restart.

        Restart 0 begins near LoRA's best: its A, shrunk to where sigma is linear. The others are
        drawn, with hidden values of root mean square 0.3 to 0.8, over which the grid spreads; 1
        and 2 look where the map does, if that is known, since the question is what an adapter can
        express, not only what a search from afar finds.
        """
        torch.manual_seed(restart)
        size, A = 0.3 + 0.5 * torch.rand(()).item(), torch.randn(self.A.shape, dtype=torch.float64)
        if self.anl is not None:
            self.anl.reset_parameters()
        if self.mixer is not None:
            nn.init.orthogonal_(self.mixer)
        if restart == 0:
            size, A = 1e-3 if points.linear else 0.03, best_A
            for name, p in () if self.anl is None else self.anl.named_parameters():
                p.copy_(torch.eye(len(p))) if name == "H" else p.zero_()
        elif restart <= 2 and points.V is not None:
            rows = min(len(A), len(points.V))
            A[:rows] = points.V[:rows]
        static = self.config is not None and self.config.mode == "static"
        z = A if static else A @ points.X
        self.A.copy_(size * A / z.square().mean(1, keepdim=True).sqrt())


def solve(gram: Tensor, cross: Tensor) -> Tensor:
    """The B (d_out, r) that brings B phi nearest to Y: phi phi^T (r, r), phi Y^T (r, d_out)."""
    ridge = 1e-13 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    B: Tensor = torch.linalg.solve(gram + ridge, cross).t()
    return B


def error(phi: Tensor, B: Tensor, Y: Tensor) -> float:
    """Relative squared error |Y - B phi|^2 / |Y|^2."""
    return float((Y - B @ phi).square().sum() / Y.square().sum())


def fit(adapter: Adapter, points: Points, best_A: Tensor) -> tuple[Tensor, list[float], bool]:
    """Fit in place, best of RESTARTS.

    Returns:
        (B, error of every restart, converged): whether the best restart's error fell by less than
        FALL of itself over its last WINDOW iterations, rather than having used up ITERATIONS of
        them.
    """
    losses: list[float] = []
    best = False, adapter.state_dict()
    for restart in range(RESTARTS if len(points.Y) <= WIDTH else 3):
        adapter.start(points, best_A, restart)
        loss, converged = descend(adapter, points)
        if loss < min(losses, default=math.inf):
            best = converged, {name: p.detach().clone() for name, p in adapter.state_dict().items()}
        losses.append(loss)
    adapter.load_state_dict(best[1])
    with torch.no_grad():
        phi = adapter.hidden(points.X)
        return solve(phi @ phi.t(), phi @ points.Y.t()), losses, best[0]


def objective(adapter: Adapter, points: Points) -> Tensor:
    """Relative squared error with the best B, multiplied out: nothing as large as Y is made."""
    phi, energy = adapter.hidden(points.X), points.Y.square().sum()
    gram, cross = phi @ phi.t(), phi @ points.Y.t()
    # B is optimal: to first order its own change does not count, and the gradient is exact.
    B = solve(gram.detach(), cross.detach())
    return (energy - 2 * (B.t() * cross).sum() + (B.t() @ B * gram).sum()) / energy


def descend(adapter: Adapter, points: Points) -> tuple[float, bool]:
    parameters = list(adapter.parameters())

    def closure() -> Tensor:
        for p in parameters:
            p.grad = None
        loss = objective(adapter, points)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    # One outer step is a whole window with line search; the optimizer keeps its curvature history.
    exact: dict[str, Any] = {
        "tolerance_grad": 0,
        "tolerance_change": 0,
        "line_search_fn": "strong_wolfe",
    }
    optimizer = torch.optim.LBFGS(parameters, max_iter=WINDOW, history_size=30, **exact)
    before = math.inf
    for _ in range(ITERATIONS // WINDOW):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        now = closure().item()
        if not math.isfinite(now):
            return math.inf, False
        if before - now <= FALL * now:
            return now, True
        before = now
    return before, False


def best_linear(points: Points, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of the rank-r matrix whose B A X is nearest to Y: reduced-rank regression."""
    covariance = points.X @ points.X.t() / points.X.shape[1]
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-10 * values[-1]
    white = vectors[:, kept] / values[kept].sqrt()  # white.t() @ X has unit covariance
    full = points.Y @ (white.t() @ points.X).t() / points.X.shape[1]
    U, S, V = torch.linalg.svd(full, full_matrices=False)
    return V[:rank] @ white.t(), U[:, :rank] * S[:rank]


# --- Maps to approximate --------------------------------------------------------------------------


def gaussian(width: int, seed: int, points: int) -> Tensor:
    """Standard normal inputs (width, N)."""
    return torch.randn(
        width, points, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def _directions(width: int, count: int, X: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """V (count, width), V X of unit mean square, and U (width, count) of orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(width, count, dtype=torch.float64, generator=generator))[0].t()
    U = torch.linalg.qr(torch.randn(width, count, dtype=torch.float64, generator=generator))[0]
    return V / (V @ X).square().mean(1, keepdim=True).sqrt(), U


TEACHERS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "ridge |z|": (2, torch.abs),
    "ridge relu": (2, F.relu),
    "tanh teacher": (2, lambda z: torch.tanh(2 * z)),
    "sine teacher": (2, lambda z: torch.sin(2 * z)),
    "product z1 z2": (2, lambda z: z.prod(0, keepdim=True).expand(2, -1)),
    "MLP residual, 4 units": (4, F.gelu),
    "MLP residual, 16 units": (16, F.gelu),
}
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: torch.linalg.svdvals(gaussian(n, 7, n)),
    "decaying 1/i": lambda n: 1 / torch.arange(1, n + 1, dtype=torch.float64),
    "decaying 2^-i": lambda n: 0.5 ** torch.arange(1, n + 1, dtype=torch.float64),
}


def linear_points(spectrum: str) -> Points:
    """M X with M of the spectrum's singular values."""
    left, right = (torch.linalg.qr(gaussian(WIDTH, seed, WIDTH))[0] for seed in (11, 12))
    X = gaussian(WIDTH, 0, POINTS)
    return Points(X, left @ torch.diag(SPECTRA[spectrum](WIDTH)) @ right @ X, linear=True)


def teacher_points(teacher: str, inputs: str) -> tuple[Points, Points]:
    """(to fit, fresh) of U g(V x); of an MLP what its best linear map of full rank leaves."""
    if inputs == "MiniLM":
        X, fresh = activations()
    else:
        X, fresh = gaussian(WIDTH, 0, POINTS), gaussian(WIDTH, 1, POINTS)
    count, g = TEACHERS[teacher]
    V, U = _directions(len(X), count, X, seed=3)
    Y, Y_fresh = U @ g(V @ X), U @ g(V @ fresh)
    if teacher.startswith("MLP"):
        A, B = best_linear(Points(X, Y), len(X))
        Y, Y_fresh = Y - B @ (A @ X), Y_fresh - B @ (A @ fresh)
    return Points(X, Y, V), Points(fresh, Y_fresh)


@functools.cache
def texts() -> list[list[dict[str, Tensor]]]:
    """Batches of 400 texts to learn from, and of 400 held-out ones."""
    _, tokenizer = models.encoder()
    return [task.tokenize(tokenizer, side).inputs(400) for side in data.split(data.load("movies"))]


def _tokens(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask.bool()].double()


@functools.cache
@torch.no_grad()
def activations() -> tuple[Tensor, Tensor]:
    """What MiniLM's third attention reads (384, N), from texts to learn and from held-out ones.

    Without padding, made of unit variance together.
    """
    encoder, _ = models.encoder()
    found = []
    for side in texts():
        states = []
        for batch in side:
            read = encoder(**batch, output_hidden_states=True).hidden_states[2]
            states.append(_tokens(read, batch["attention_mask"]))
        found.append(torch.cat(states).t()[:, :POINTS])
    scale = found[0].square().mean().sqrt()
    return found[0] / scale, found[1] / scale


@functools.cache
def finetuned() -> tuple[nn.Module, nn.Module]:
    """(encoder as it came, the same fully fine-tuned on four corpora, as `learning` does it)."""
    before, _ = models.encoder()
    learn, _ = folds.sides("held-out", folds.TEXTS, folds.HELD)
    torch.manual_seed(0)
    model = task.Reader(copy.deepcopy(before))
    train(model, learn, steps=folds.STEPS, lr=1.8e-4, size=folds.SIZE)
    return before, model.encoder


@functools.cache
@torch.no_grad()
def layer_points(name: str, kind: str) -> tuple[Points, Points]:
    """(to fit, fresh): what full fine-tuning changed about a layer, on its inputs before it.

    Args:
        name: of the layer.
        kind: "update": (W_finetuned - W_pretrained) x, a linear map. "change": the layer's output
            after fine-tuning minus before on the same token, with all that the layers before it
            changed, which no linear map of x gives.
    """
    weights = [model.get_submodule(name).weight for model in finetuned()]
    update = (weights[1] - weights[0]).double()  # type: ignore[operator]
    found = []
    for side in texts():
        (X, Y), (_, after) = (seen(model, name, side) for model in finetuned())
        Y = X @ update.t() if kind == "update" else after - Y
        found.append(Points(X.t()[:, :POINTS], Y.t()[:, :POINTS], linear=kind == "update"))
    return found[0], found[1]


@torch.no_grad()
def seen(
    model: nn.Module, name: str, batches: Sequence[dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(inputs (N, d_in), outputs (N, d_out)) of a layer on the tokens of the batches."""
    layer, inputs, outputs = model.get_submodule(name), [], []
    for batch in batches:
        mask = batch["attention_mask"]

        def look(_: nn.Module, x: tuple[Tensor, ...], out: Tensor, mask: Tensor = mask) -> None:
            inputs.append(_tokens(x[0], mask))
            outputs.append(_tokens(out, mask))

        hook = layer.register_forward_hook(look)
        model(**batch)
        hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


# --- Runs -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that fixes a fit.

    part: "linear", "nonlinear", "grid", "update" or "change". target: a spectrum, teacher or layer.
    inputs: "Gaussian" or "MiniLM". method: "summed", "per-channel", "static" or "MoSLoRA".
    """

    part: str
    target: str
    inputs: str
    method: str
    rank: int
    grid_size: int = 5
    spline_order: int = 3

    key = property(records.key)

    def config(self) -> aurora.AuroraConfig | None:
        """The adapter's options, None for MoSLoRA."""
        if self.method == "MoSLoRA":
            return None
        options: dict[str, Any] = {"grid_size": self.grid_size, "spline_order": self.spline_order}
        if self.method == "static":
            return aurora.AuroraConfig(self.rank, mode="static", **options)
        return aurora.AuroraConfig(self.rank, spline=self.method, **options)

    def points(self) -> tuple[Points, Points]:
        """(to fit, fresh)."""
        if self.part == "linear":  # the floor is that of the points themselves
            return (points := linear_points(self.target)), points
        if self.part in ("update", "change"):
            return layer_points(self.target, self.part)
        return teacher_points(self.target, self.inputs)


def perform(run: Run) -> Record:
    """Fit; relative squared errors on fresh points, of the adapter and of the best linear ones."""
    points, fresh = run.points()
    (width, _), (out, _) = points.X.shape, points.Y.shape
    adapter = Adapter(width, run.rank, run.config())
    B, losses, converged = fit(adapter, points, best_linear(points, run.rank)[0])
    count = sum(p.numel() for p in adapter.parameters()) + out * run.rank
    equal = math.ceil(count / (width + out))

    def linear(rank: int, bias: bool) -> float:
        x, y = (t.mean(1, keepdim=True) * bias for t in points[:2])
        A, B = best_linear(Points(points.X - x, points.Y - y), rank)
        return float(
            (fresh.Y - y - B @ (A @ (fresh.X - x))).square().sum() / fresh.Y.square().sum()
        )

    with torch.no_grad():
        return {
            "run": run.key,
            **run._asdict(),
            "parameters": count,
            "error": error(adapter.hidden(fresh.X), B, fresh.Y),
            "fitted": error(adapter.hidden(points.X), B, points.Y),
            "restarts": losses,
            "converged": converged,
            "LoRA": linear(run.rank, False),
            "equal rank": equal,
            "LoRA equal": linear(equal, False),
            "LoRA equal + bias": linear(equal, True),
        }


LAYERS = [
    f"encoder.layer.{i}.attention.self.{part}"
    for i, part in itertools.product(range(6), ("query", "value"))
]
SPLINES = ("summed", "per-channel")


def every(
    part: str,
    targets: Iterable[str],
    inputs: str,
    methods: Iterable[str],
    rank: int,
    *grid: int,
) -> list[Run]:
    """Fits of every target by every method."""
    pairs = itertools.product(targets, methods)
    return [Run(part, target, inputs, method, rank, *grid) for target, method in pairs]


def plan(quick: bool) -> list[Run]:
    """Every fit, the telling ones first."""
    runs = every("nonlinear", TEACHERS, "Gaussian", SPLINES, 2)
    for rank in (2,) if quick else (1, 2, 4, 8):
        runs += every("linear", SPECTRA, "Gaussian", (*SPLINES, "static", "MoSLoRA"), rank)
    if quick:
        return runs
    runs += every("nonlinear", TEACHERS, "MiniLM", SPLINES, 2)
    for rank in (1, 4, 8):
        runs += every("nonlinear", TEACHERS, "Gaussian", SPLINES, rank)
    for order, size in itertools.product((3, 1, 2, 4), (1, 2, 4, 8, 16, 32)):
        runs += every("grid", ["sine teacher"], "Gaussian", SPLINES, 2, size, order)
    runs += every("change", LAYERS, "MiniLM", SPLINES, 2)
    runs += every("update", LAYERS, "MiniLM", ["per-channel"], 2)
    return runs


# --- The report -----------------------------------------------------------------------------------

LORA = {"LoRA equal": "LoRA's best", "LoRA equal + bias": "LoRA's best with a bias"}


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"


def _mark(fit: Record | None) -> str:
    """The error on fresh points, with a star if the fit was still getting better."""
    if fit is None:
        return "-"
    return _number(fit["error"]) + ("" if fit["converged"] else "*")


def _by_method(fits: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], dict[str, Record]]:
    """Fits in groups of equal `keys`, by method."""
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for fit in fits:
        found.setdefault(tuple(fit[key] for key in keys), {})[fit["method"]] = fit
    return found


def linear_table(fits: Sequence[Record]) -> str:
    """Linear maps: the floor, and how far above it each adapter of the same rank stays."""
    rows, kinds = [], ("MoSLoRA", "summed", "per-channel", "static")
    for (target, rank), group in _by_method(fits, "target", "rank").items():
        floor = next(iter(group.values()))["LoRA"]
        above = [f"{group[m]['error'] / floor - 1:+.3%}" if m in group else "-" for m in kinds]
        rows.append([target, rank, _number(floor), *above])
    return markdown_table(["linear map", "rank", "floor, LoRA", *kinds], rows)


def nonlinear_table(fits: Sequence[Record]) -> str:
    """Nonlinear maps: errors, and how many times less than LoRA's best at no fewer parameters."""
    rows = []
    for (inputs, target, rank), group in _by_method(fits, "inputs", "target", "rank").items():
        cells = [_mark(group.get(method)) for method in SPLINES]
        one, best = next(iter(group.values())), min(fit["error"] for fit in group.values())
        lora = [_number(one[key]) for key in LORA]
        gain = [f"{one[key] / best:.3g}" for key in LORA]
        rows.append([f"{target}, {inputs}", rank, *cells, one["equal rank"], *lora, *gain])
    header = ["nonlinear map, inputs", "rank", *SPLINES, "LoRA's rank", "LoRA", "LoRA + bias"]
    return markdown_table([*header, "LoRA / best", "LoRA + bias / best"], rows)


def layers_table(fits: Sequence[Record]) -> str:
    """What fine-tuning changed, layer by layer."""
    rows = []
    for (part, target), group in _by_method(fits, "part", "target").items():
        cells = [_mark(group.get(method)) for method in SPLINES]
        fitted = [_number(group[m]["fitted"]) if m in group else "-" for m in SPLINES]
        one = next(iter(group.values()))
        lora = [_number(one[key]) for key in ("LoRA", *LORA)]
        name = target.replace("encoder.layer.", "").replace(".attention.self", "")
        rows.append([f"{part} of {name}", *cells, *lora, *fitted])
    header = ["rank 2", *SPLINES, "LoRA r=2", "LoRA r=3", "LoRA r=3 + bias"]
    return markdown_table([*header, *(f"{method}, fitted" for method in SPLINES)], rows)


def grid_table(fits: Sequence[Record]) -> str:
    """The sine teacher by spline order and grid size."""
    sizes, rows = sorted({fit["grid_size"] for fit in fits}), []
    for (method, order), group in sorted(_grids(fits).items(), key=str):
        rows.append([f"{method}, order {order}", *(_mark(group.get(size)) for size in sizes)])
    return markdown_table(["sine teacher, rank 2: grid size", *map(str, sizes)], rows)


def _grids(fits: Sequence[Record]) -> dict[tuple[str, int], dict[int, Record]]:
    found: dict[tuple[str, int], dict[int, Record]] = {}
    for fit in fits:
        found.setdefault((fit["method"], fit["spline_order"]), {})[fit["grid_size"]] = fit
    return found


def draw(path: Path, nonlinear: Sequence[Record], grid: Sequence[Record]) -> None:
    """Error against parameters for two teachers, and against grid size."""
    with picture(path, columns=3) as (left, middle, right):
        for axes, target in ((left, "sine teacher"), (middle, "MLP residual, 4 units")):
            group = [fit for fit in nonlinear if fit["target"] == target]
            draw_target(axes, [fit for fit in group if fit["inputs"] == "Gaussian"])
            axes.set(title=target, xlabel="parameters", ylabel="relative squared error")
        for (method, order), group_ in sorted(_grids(grid).items()):
            places = sorted((size, fit["error"]) for size, fit in group_.items())
            style = "o-" if method == "per-channel" else "x:"
            look = {"color": f"C{order}", "label": f"{method}, order {order}"}
            right.loglog(*zip(*places, strict=True), style, **look)
        right.set(title="sine teacher, rank 2", xlabel="grid size")
        right.set(ylabel="relative squared error")
        if grid:
            right.legend(fontsize="xx-small")


def draw_target(axes: Any, fits: Sequence[Record]) -> None:
    """Error against parameters for one target."""
    lines: dict[str, tuple[str, list[tuple[int, float]]]] = {}
    for method in SPLINES:
        ours = [fit for fit in fits if fit["method"] == method]
        lines[f"AuroRA {method}"] = "o-", [(fit["parameters"], fit["error"]) for fit in ours]
    for key, label in (("LoRA equal", "LoRA, best"), ("LoRA equal + bias", "LoRA + bias, best")):
        # Equal ranks have equal errors: one point each.
        places = {(2 * WIDTH * fit["equal rank"], fit[key]) for fit in fits}
        lines[label] = "s--", list(places)
    for label, (style, points) in lines.items():
        if points:
            axes.loglog(*zip(*sorted(points), strict=True), style, label=label)
    if fits:
        axes.legend(fontsize="x-small")


def report(out: Path, fits: Sequence[Record]) -> Path:
    """Write tables and picture."""
    parts: dict[str, list[Record]] = {"linear": [], "nonlinear": [], "grid": []}
    for fit in fits:
        parts.setdefault(fit["part"], []).append(fit)
    layers = [fit for fit in fits if fit["part"] in ("change", "update")]
    tables = [linear_table(parts["linear"]), nonlinear_table(parts["nonlinear"])]
    tables += [layers_table(layers)] if layers else []
    tables += [grid_table(parts["grid"])] if parts["grid"] else []
    draw(out / "approximation.png", parts["nonlinear"], parts["grid"])
    told, where = [READING, *findings(fits), *tables], records.machines(fits)
    title = "How near an adapter comes to a map"
    return write_report(out, "approximation", title, told, measured_on=where)


def findings(fits: Sequence[Record]) -> list[str]:
    """What the tables say, counted from them."""
    linear = [fit for fit in fits if fit["part"] == "linear"]
    worst = max((fit["error"] / fit["LoRA"] - 1 for fit in linear), default=math.nan)
    plain = [fit for fit in fits if fit["part"] == "nonlinear" and fit["rank"] == 2]
    groups = _by_method(plain, "inputs", "target").values()
    told = []
    for key, label in LORA.items():
        gains = [max(fit[key] / fit["error"] for fit in group.values()) for group in groups]
        much = sum(gain >= 10 for gain in gains)
        told.append(f"10 times less error than {label} in {much} of {len(gains)}")
    unfinished = sum(not fit["converged"] for fit in fits)
    return [
        f"Linear maps: nothing goes below the floor, and the worst of all fits is {worst:.2%} "
        "above it. Nonlinear maps, AuroRA of rank 2 with the better spline, at no more "
        f"parameters: {'; '.join(told)}.",
        f"{unfinished} of {len(fits)} fits (starred) were still getting better at the last "
        "iteration allowed.",
    ]


READING = (
    "Relative squared error E|y - B phi(x)|^2 / E|y|^2 in float64, on fresh points unless it says "
    f"fitted; for linear maps on the fitted points, which give the floor too. {POINTS:,} points; "
    f"made-up inputs are {WIDTH} wide, MiniLM's 384. LoRA's best is exact: reduced-rank "
    "regression. It gets the rank whose parameters are AuroRA's, rounded up; with bias it also "
    f"gets one free number an output. The others: best of {RESTARTS} restarts of L-BFGS (3 on "
    "MiniLM's inputs), one from LoRA's best, two that look where the map does if that is known; "
    f"converged when {WINDOW} iterations gain less than {FALL:g} of the error, at most "
    f"{ITERATIONS} iterations. Maps: U g(V x) with orthonormal U and unit variance of V x; the "
    "MLP's residual is what its best linear map leaves. Update: (W_finetuned - W_pretrained) x of "
    "MiniLM fully fine-tuned as `learning` does it. Change: output of the fine-tuned layer minus "
    "the pretrained one's for the same token, with what the layers before changed."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line; what is quick is part of the whole, in the same folder."""
    parser = command.parser("approximation", __doc__)
    command.add_runs(parser)
    told = "of what is missing, only rank 2 on made-up inputs"
    parser.add_argument("--quick", dest="few", action="store_true", help=told)
    return command.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    """Fit what has no line yet, then print and write the report."""
    options, whole = parse(argv), plan(quick=False)
    runs = plan(quick=options.few)

    def pending(lines: Lines) -> Iterator[Run]:
        return (run for run in runs if run.key not in lines)

    lines = records.gather(options.out / "approximation.jsonl", options, pending, perform)
    found = [lines[run.key] for run in whole if run.key in lines]
    written = report(options.out, found)
    print(written.read_text(encoding="utf-8"))
    print(f"{len(found)} of {len(whole)} fits, written to {written}")

"""Approximation: how near does each adapter of one layer come to a given map, at what number of parameters?

Everything in float64. LoRA's best is known in closed form (reduced-rank regression; for white inputs the truncated
SVD) and is the floor for any linear adapter. The others are fitted: B in closed form for the hidden vectors at hand; A,
H and the spline weights by L-BFGS, the best of several restarts. Every fit is one line of JSON and is not done again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aurora
from benchmarks import common, data, learning

WIDTH = 32  # of the layers with made-up inputs
POINTS = 4096  # to fit, and as many fresh ones to be judged by
RESTARTS, ITERATIONS, WINDOW, FALL = 5, 600, 40, 1e-4
Record = dict[str, Any]


class Points(NamedTuple):
    """Inputs X (d_in, N), what the map makes of them, Y (d_out, N), its directions V (m, d_in), if known, and whether
    it is linear."""

    X: Tensor
    Y: Tensor
    V: Tensor | None = None
    linear: bool = False


# --- Adapters of one layer -------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """B phi(X) with hidden vectors phi: LoRA with a mixer (`config` None) or AuroRA; B is solved for, not stored."""

    def __init__(self, width: int, rank: int, config: aurora.AuroraConfig | None) -> None:
        super().__init__()
        self.config = config
        self.A = nn.Parameter(torch.empty(rank, width, dtype=torch.float64))
        self.mixer = nn.Parameter(torch.empty(rank, rank, dtype=torch.float64)) if config is None else None
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
        """Restart 0 begins near LoRA's best: its A, shrunk to where sigma is linear. The others are drawn, with hidden
        values of root mean square 0.3 to 0.8, over which the grid spreads; 1 and 2 look where the map does, if that is
        known, since the question is what an adapter can express, not only what a search from afar finds."""
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
    """The B (d_out, r) for which B phi is nearest to Y, from phi phi^T (r, r) and phi Y^T (r, d_out)."""
    ridge = 1e-13 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    B: Tensor = torch.linalg.solve(gram + ridge, cross).t()
    return B


def error(phi: Tensor, B: Tensor, Y: Tensor) -> float:
    """Relative squared error |Y - B phi|^2 / |Y|^2."""
    return float((Y - B @ phi).square().sum() / Y.square().sum())


def fit(adapter: Adapter, points: Points, best_A: Tensor) -> tuple[Tensor, list[float], bool]:
    """Fit in place, best of RESTARTS. Returns (B, error of every restart, converged): whether the best restart's error
    fell by less than FALL of itself over its last WINDOW iterations, rather than having used up ITERATIONS of them."""
    losses: list[float] = []
    best = False, adapter.state_dict()
    for restart in range(RESTARTS if len(points.Y) <= WIDTH else 3):
        adapter.start(points, best_A, restart)
        loss, converged = _descend(adapter, points)
        if loss < min(losses, default=math.inf):
            best = converged, {name: p.detach().clone() for name, p in adapter.state_dict().items()}
        losses.append(loss)
    adapter.load_state_dict(best[1])
    with torch.no_grad():
        phi = adapter.hidden(points.X)
        return solve(phi @ phi.t(), phi @ points.Y.t()), losses, best[0]


def objective(adapter: Adapter, points: Points) -> Tensor:
    """Relative squared error with the best B, multiplied out so that nothing as large as Y is made."""
    phi, energy = adapter.hidden(points.X), points.Y.square().sum()
    gram, cross = phi @ phi.t(), phi @ points.Y.t()
    # B is optimal, so that its own change does not count, to first order: the gradient is exact without it.
    B = solve(gram.detach(), cross.detach())
    return (energy - 2 * (B.t() * cross).sum() + (B.t() @ B * gram).sum()) / energy


def _descend(adapter: Adapter, points: Points) -> tuple[float, bool]:
    parameters = list(adapter.parameters())

    def closure() -> Tensor:
        for p in parameters:
            p.grad = None
        loss = objective(adapter, points)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    # One outer step is a whole window with the line search; the history of curvature lives on in the optimizer.
    exact: dict[str, Any] = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
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


# --- Maps to approximate ---------------------------------------------------------------------------------------------


def gaussian(width: int, seed: int, points: int) -> Tensor:
    """Standard normal inputs (width, N)."""
    return torch.randn(width, points, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _directions(width: int, count: int, X: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """V (count, width), scaled so that V X has unit mean square, and U (width, count) with orthonormal columns."""
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
    """(to fit, fresh) of U g(V x); of an MLP what is left after its best linear map of full rank."""
    X, fresh = activations() if inputs == "MiniLM" else (gaussian(WIDTH, seed, POINTS) for seed in (0, 1))
    count, g = TEACHERS[teacher]
    V, U = _directions(len(X), count, X, seed=3)
    Y, Y_fresh = U @ g(V @ X), U @ g(V @ fresh)
    if teacher.startswith("MLP"):
        A, B = best_linear(Points(X, Y), len(X))
        Y, Y_fresh = Y - B @ (A @ X), Y_fresh - B @ (A @ fresh)
    return Points(X, Y, V), Points(fresh, Y_fresh)


@functools.cache
def _texts() -> list[list[dict[str, Tensor]]]:
    _, tokenizer = learning.encoder()
    return [common.tokenize(tokenizer, side).inputs(400) for side in data.split(data.load("movies"))]


def _tokens(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask.bool()].double()


@functools.cache
def activations() -> tuple[Tensor, Tensor]:
    """What MiniLM's third attention reads (384, N), from texts to learn and from held-out ones, made of unit variance
    together, without padding."""
    encoder, _ = learning.encoder()
    found = []
    with torch.no_grad():
        for side in _texts():
            states = [
                _tokens(encoder(**b, output_hidden_states=True).hidden_states[2], b["attention_mask"]) for b in side
            ]
            found.append(torch.cat(states).t()[:, :POINTS])
    scale = found[0].square().mean().sqrt()
    return found[0] / scale, found[1] / scale


@functools.cache
def finetuned() -> tuple[nn.Module, nn.Module]:
    """(encoder as it came, the same fully fine-tuned on the four corpora, as `learning` does it)."""
    plan, (before, _) = learning.Plan(), learning.encoder()
    learn, _ = learning.sides("held-out", plan.texts, plan.held)
    torch.manual_seed(0)
    model = common.Reader(copy.deepcopy(before))
    common.train(model, learn, steps=plan.steps, lr=1.8e-4, size=learning.SIZE)
    return before, model.encoder


@functools.cache
def layer_points(name: str, kind: str) -> tuple[Points, Points]:
    """(to fit, fresh): what full fine-tuning changed about a layer, on its real inputs before fine-tuning.

    kind "update": (W_finetuned - W_pretrained) x, a linear map. "change": the layer's output after fine-tuning minus
    before on the same token, with all that the layers before it changed, which no linear map of x gives.
    """
    models, found = finetuned(), []
    update = models[1].get_submodule(name).weight - models[0].get_submodule(name).weight  # type: ignore[operator]
    with torch.no_grad():
        for side in _texts():
            seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []), ([], [])]
            for model, (inputs, outputs) in zip(models, seen, strict=True):
                for batch in side:
                    with _watching(model.get_submodule(name), batch["attention_mask"], inputs, outputs):
                        model(**batch)
            X, (Y, after) = torch.cat(seen[0][0]), (torch.cat(outputs) for _, outputs in seen)
            Y = X @ update.double().t() if kind == "update" else after - Y
            found.append(Points(X.t()[:, :POINTS], Y.t()[:, :POINTS], linear=kind == "update"))
    return found[0], found[1]


def _watching(layer: nn.Module, mask: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> Any:
    def look(_: nn.Module, x: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(_tokens(x[0], mask))
        outputs.append(_tokens(out, mask))

    return layer.register_forward_hook(look)


# --- Runs ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that fixes a fit. part: "linear", "nonlinear", "grid", "update" or "change"; target: a spectrum, teacher or
    layer; inputs: "Gaussian" or "MiniLM"; method: "summed", "per-channel", "static" or "MoSLoRA"."""

    part: str
    target: str
    inputs: str
    method: str
    rank: int
    grid_size: int = 5
    spline_order: int = 3

    key = property(common.key)

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
        return float((fresh.Y - y - B @ (A @ (fresh.X - x))).square().sum() / fresh.Y.square().sum())

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


LAYERS = [f"encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value")]


def plan(quick: bool) -> list[Run]:
    """Every fit, the telling ones first."""
    ranks, splines = (2,) if quick else (1, 2, 4, 8), ("summed", "per-channel")
    runs = [Run("nonlinear", t, "Gaussian", s, 2) for t in TEACHERS for s in splines]
    runs += [
        Run("linear", t, "Gaussian", m, r) for r in ranks for t in SPECTRA for m in (*splines, "static", "MoSLoRA")
    ]
    if quick:
        return runs
    runs += [Run("nonlinear", t, "MiniLM", s, 2) for t in TEACHERS for s in splines]
    runs += [Run("nonlinear", t, "Gaussian", s, r) for r in ranks if r != 2 for t in TEACHERS for s in splines]
    for order in (3, 1, 2, 4):
        for size in (1, 2, 4, 8, 16, 32):
            runs += [Run("grid", "sine teacher", "Gaussian", s, 2, size, order) for s in splines]
    runs += [Run("change", name, "MiniLM", s, 2) for name in LAYERS for s in splines]
    runs += [Run("update", name, "MiniLM", "per-channel", 2) for name in LAYERS]
    return runs


# --- The report ------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"


def _mark(record: Record) -> str:
    """The error on fresh points, with a star if the fit was still getting better."""
    return _number(record["error"]) + ("" if record["converged"] else "*")


def _by_method(records: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], dict[str, Record]]:
    """Records in groups of equal `keys`, by method."""
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        found.setdefault(tuple(r[key] for key in keys), {})[r["method"]] = r
    return found


def linear_table(records: Sequence[Record]) -> str:
    """Linear maps: the floor, and how far above it each adapter of the same rank stays."""
    rows, kinds = [], ("MoSLoRA", "summed", "per-channel", "static")
    for (target, rank), group in _by_method(records, "target", "rank").items():
        floor = next(iter(group.values()))["LoRA"]
        above = [f"{group[m]['error'] / floor - 1:+.3%}" if m in group else "-" for m in kinds]
        rows.append([target, rank, _number(floor), *above])
    return common.markdown_table(["linear map", "rank", "floor, LoRA", *kinds], rows)


def nonlinear_table(records: Sequence[Record]) -> str:
    """Nonlinear maps: errors, and how many times less than LoRA's best at as many parameters or a few more."""
    rows = []
    for (inputs, target, rank), group in _by_method(records, "inputs", "target", "rank").items():
        cells = [_mark(group[m]) if m in group else "-" for m in ("summed", "per-channel")]
        one, best = next(iter(group.values())), min(r["error"] for r in group.values())
        lora = [_number(one[key]) for key in ("LoRA equal", "LoRA equal + bias")]
        gain = [f"{one[key] / best:.3g}" for key in ("LoRA equal", "LoRA equal + bias")]
        rows.append([f"{target}, {inputs}", rank, *cells, one["equal rank"], *lora, *gain])
    header = ["nonlinear map, inputs", "rank", "summed", "per-channel", "LoRA's rank", "LoRA", "LoRA + bias"]
    return common.markdown_table([*header, "LoRA / best", "LoRA + bias / best"], rows)


def layers_table(records: Sequence[Record]) -> str:
    """What fine-tuning changed, layer by layer."""
    rows = []
    for (part, target), group in _by_method(records, "part", "target").items():
        cells = [_mark(group[m]) if m in group else "-" for m in ("summed", "per-channel")]
        one = next(iter(group.values()))
        name = target.replace("encoder.layer.", "").replace(".attention.self", "")
        fitted = [_number(group[m]["fitted"]) if m in group else "-" for m in ("summed", "per-channel")]
        lora = [_number(one[key]) for key in ("LoRA", "LoRA equal", "LoRA equal + bias")]
        rows.append([f"{part} of {name}", *cells, *lora, *fitted])
    header = ["rank 2", "summed", "per-channel", "LoRA r=2", "LoRA r=3", "LoRA r=3 + bias", "summed, fitted"]
    return common.markdown_table([*header, "per-channel, fitted"], rows)


def grid_table(records: Sequence[Record]) -> str:
    """The sine teacher by spline order and grid size."""
    sizes = sorted({r["grid_size"] for r in records})
    rows = []
    for (method, order), group in sorted(_grids(records).items(), key=str):
        rows.append([f"{method}, order {order}", *(_mark(group[n]) if n in group else "-" for n in sizes)])
    return common.markdown_table(["sine teacher, rank 2: grid size", *map(str, sizes)], rows)


def _grids(records: Sequence[Record]) -> dict[tuple[str, int], dict[int, Record]]:
    found: dict[tuple[str, int], dict[int, Record]] = {}
    for r in records:
        found.setdefault((r["method"], r["spline_order"]), {})[r["grid_size"]] = r
    return found


def draw(path: Path, parts: Mapping[str, Sequence[Record]]) -> None:
    """Error against parameters for two teachers, and against grid size."""
    with common.picture(path, columns=3) as axes:
        for axis, target in zip(axes, ("sine teacher", "MLP residual, 4 units"), strict=False):
            found = [r for r in parts["nonlinear"] if r["target"] == target and r["inputs"] == "Gaussian"]
            for method in ("summed", "per-channel"):
                line = sorted((r["parameters"], r["error"]) for r in found if r["method"] == method)
                axis.loglog(*zip(*line, strict=True), "o-", label=f"AuroRA {method}") if line else None
            for key, label in (("LoRA equal", "LoRA, best"), ("LoRA equal + bias", "LoRA + bias, best")):
                line = sorted({(2 * WIDTH * r["equal rank"], r[key]) for r in found})
                axis.loglog(*zip(*line, strict=True), "s--", label=label) if line else None
            axis.set(title=target, xlabel="parameters", ylabel="relative squared error")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="x-small")
        for (method, order), group in sorted(_grids(parts["grid"]).items()):
            line = sorted((n, r["error"]) for n, r in group.items())
            style = "o-" if method == "per-channel" else "x:"
            axes[2].loglog(*zip(*line, strict=True), style, color=f"C{order}", label=f"{method}, order {order}")
        axes[2].set(title="sine teacher, rank 2", xlabel="grid size", ylabel="relative squared error")
        if parts["grid"]:
            axes[2].legend(fontsize="xx-small")


def report(out: Path, records: Sequence[Record]) -> Path:
    """Write tables and picture."""
    parts = {name: [r for r in records if r["part"] == name] for name in ("linear", "nonlinear", "grid")}
    layers = [r for r in records if r["part"] in ("change", "update")]
    tables = [linear_table(parts["linear"]), nonlinear_table(parts["nonlinear"])]
    tables += [layers_table(layers)] if layers else []
    tables += [grid_table(parts["grid"])] if parts["grid"] else []
    draw(out / "approximation.png", parts)
    return common.write_report(
        out, "approximation", "How near an adapter comes to a map", [*findings(records), *tables]
    )


def findings(records: Sequence[Record]) -> list[str]:
    """What the tables say, counted from them."""
    linear = [r for r in records if r["part"] == "linear"]
    worst = max((r["error"] / r["LoRA"] - 1 for r in linear), default=math.nan)
    plain = [r for r in records if r["part"] == "nonlinear" and r["rank"] == 2]
    told = []
    for key, label in (("LoRA equal", "LoRA's best"), ("LoRA equal + bias", "LoRA's best with a bias")):
        gains = [
            max(r[key] / r["error"] for r in group.values()) for group in _by_method(plain, "inputs", "target").values()
        ]
        told.append(f"10 times less error than {label} in {sum(g >= 10 for g in gains)} of {len(gains)}")
    unfinished = sum(not r["converged"] for r in records)
    return [
        READING,
        f"Linear maps: nothing goes below the floor, and the worst of all fits is {worst:.2%} above it. Nonlinear "
        f"maps, AuroRA of rank 2 with the better spline, at no more parameters: {'; '.join(told)}.",
        f"{unfinished} of {len(records)} fits (starred) were still getting better at the last iteration allowed.",
    ]


READING = (
    "Relative squared error E|y - B phi(x)|^2 / E|y|^2 in float64, on fresh points unless it says fitted; for linear "
    f"maps on the fitted points, which give the floor too. {POINTS:,} points; made-up inputs are {WIDTH} wide, "
    "MiniLM's 384. LoRA's best is exact: reduced-rank regression. It gets the rank whose parameters are AuroRA's, "
    f"rounded up; with bias it also gets one free number an output. The others: best of {RESTARTS} restarts of L-BFGS "
    "(3 on MiniLM's inputs), one from LoRA's best, two that look where the map does if that is known; converged when "
    f"{WINDOW} iterations gain less than {FALL:g} of the error, at most {ITERATIONS} iterations. Maps: U g(V x) with "
    "orthonormal U and unit variance of V x; the MLP's residual is what its best linear map leaves. Update: "
    "(W_finetuned - W_pretrained) x of MiniLM fully fine-tuned as `learning` does it. Change: output of the fine-tuned "
    "layer minus the pretrained one's for the same token, with what the layers before changed."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    quick = "of what is missing, only rank 2 on made-up inputs"
    return common.sweep_parser("approximation", __doc__, quick).parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Fit what has no line yet, then print and write the report."""
    options, every = parse(argv), plan(quick=False)
    runs = plan(quick=True) if options.quick else every

    def pending(lines: Mapping[str, Record]) -> Iterator[Run]:
        return (run for run in runs if run.key not in lines)

    path = options.out / "approximation.jsonl"
    lines = common.perform(path, pending, perform, options.jobs, options.minutes)
    found = [lines[run.key] for run in every if run.key in lines]
    if not found:
        raise common.BenchmarkError(f"{path} holds no run yet: give it more --minutes")
    written = report(options.out, found)
    print(written.read_text(encoding="utf-8"))
    print(f"{len(found)} of {len(every)} fits, written to {written}")

"""Merging: how much of what training gained is left in plain layers, by method?

Adapters are trained, then judged on the same held-out texts: off, dynamic, and merged by each
method. Gain kept is (merged - off) / (dynamic - off). Every run is one line of JSON; a run that
has its line is not run again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aurora
from aurora import core, merging
from benchmarks.lab import data, models, records, task
from benchmarks.lab import options as command
from benchmarks.lab.methods import ENCODER, LANGUAGE_MODEL, Sample, groups, prepare
from benchmarks.lab.records import Lines, Record
from benchmarks.lab.report import markdown_table, picture, write_report
from benchmarks.lab.settings import RECOMMENDED, SETTINGS, Setting
from benchmarks.lab.training import (
    next_token_loss,
    next_token_losses,
    rating_loss,
    train,
    train_language,
)

CALIBRATION = 256  # sequences
NO_DATA, IN_TURN, FROM_X = "linear, no data", "layer after layer", "from x"
# What is the default where a layer has no bias, as in LLaMA: the fit goes through the origin.
ORIGIN = {"linear, no constant": "linear", "calibrated, no constant": "calibrated"}
MERGED = (*merging.METHODS, *ORIGIN, NO_DATA, IN_TURN, FROM_X)
Judge = Callable[[nn.Module], Tensor]


# --- Two more ways to calibrate, measured here and not kept ---------------------------------------


def merge_in_turn(model: nn.Module, batches: Sequence[Any]) -> None:
    """Calibrate every layer on what the merged layers before it produce: one pass a layer."""
    for name, layer in core.layers(model).items():
        x = layer_inputs(model, [name], batches, padding=False)[name]
        z = F.linear(x, layer.A.double())
        slope, offset = regress(layer, x, z)
        fold(model, name, slope @ layer.A.double(), offset)


def merge_from_x(model: nn.Module, batches: Sequence[Any]) -> None:
    """Least squares from x itself instead of z = A x: (d_in + r)^2 moments a layer, not (3 r)^2."""
    layers = core.layers(model)
    read = layer_inputs(model, list(layers), batches, padding=True)
    for name, layer in layers.items():
        fold(model, name, *regress(layer, read[name], read[name], ridge=1e-3))


@torch.no_grad()
def layer_inputs(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any], padding: bool
) -> dict[str, Tensor]:
    """What layers read (N, d_in), float64, with or without the places where there is no token."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    layers = {name: core.layers(model)[name] for name in names}
    for batch in batches:
        kept = ... if padding else batch["attention_mask"].bool()

        def look(name: str, _: nn.Module, x: Tensor, kept: Any = kept) -> None:
            found[name].append(x[kept].flatten(0, -2))

        with core.watching(layers, look):
            model(**batch)
    return {name: torch.cat(rows).double() for name, rows in found.items()}


@torch.no_grad()
def regress(
    layer: core.AuroraLinear, x: Tensor, features: Tensor, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(slope (r, k), offset (r,)) that bring features (N, k) nearest to sigma(A x), x (N, d_in).

    ridge: added to their covariance, in units of the mean variance.
    """
    target = layer.anl(F.linear(x.to(layer.A.dtype), layer.A)).double()  # (N, r)
    mean, middle = features.mean(0), target.mean(0)
    centred = features - mean
    gram = centred.t() @ centred / len(x)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    cross = centred.t() @ (target - middle) / len(x)  # (k, r)
    slope = (torch.linalg.pinv(gram, hermitian=True) @ cross).t()
    return slope, middle - slope @ mean


@torch.no_grad()
def fold(model: nn.Module, name: str, slope: Tensor, offset: Tensor) -> None:
    """Put the plain layer back, with `s B (slope x + offset)` in its weight and bias."""
    layer = core.layers(model)[name]
    B = layer.scaling * layer.B.double()
    weight, bias = layer.merged_weight(B @ slope), B @ offset
    core.remove(model, [layer])
    plain: Any = model.get_submodule(name)
    if plain.bias is not None:
        bias = bias + plain.bias.double()
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias.to(weight.dtype))


# --- Merging and comparing ------------------------------------------------------------------------


def merge(model: nn.Module, method: str, batches: Sequence[Any]) -> None:
    """Merge by any of MERGED."""
    if method == NO_DATA:
        aurora.merge(model, "linear", bias=True)
    elif method == IN_TURN:
        merge_in_turn(model, batches)
    elif method == FROM_X:
        merge_from_x(model, batches)
    elif method in ORIGIN:
        aurora.merge(model, ORIGIN[method], batches, held_out=batches[:1], bias=False)
    else:
        aurora.merge(model, method, batches, held_out=batches[:1], bias=True)


def compare(
    model: nn.Module, judge: Judge, batches: Sequence[Any], methods: Sequence[str]
) -> Record:
    """Mean scores of the held-out units: adapters off, dynamic, merged by each method."""
    with torch.inference_mode():
        dynamic = judge(model)
        with aurora.disabled(model):
            off = judge(model)
    found: Record = {"off": _mean(off), "dynamic": _mean(dynamic), "units": len(dynamic)}
    for method in methods:
        merged = copy.deepcopy(model)
        start = time.perf_counter()
        merge(merged, method, batches)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            scores = judge(merged)
        errors = (scores - dynamic).std(0) / math.sqrt(len(scores))
        found[method] = _mean(scores)
        found[f"{method}, paired error"] = errors.tolist()
        found[f"{method}, seconds"] = seconds
    return found


def _mean(scores: Tensor) -> list[float]:
    return scores.mean(0).tolist()


# --- One run --------------------------------------------------------------------------------------

PAPER, PENALTY = "", "penalty"  # the paper's setting, alone or with a penalty; or the guide's:
GUIDE = "recommended"


class Run(NamedTuple):
    """All that fixes a run: a model learns a corpus with adapters of a rank in some setting."""

    model: str
    corpus: str
    rank: int
    seed: int
    texts: int
    steps: int
    setting: str = PAPER

    @property
    def label(self) -> str:
        """What it is called in tables."""
        what = f"{self.setting} {self.model} {self.corpus} rank={self.rank} seed={self.seed}"
        return what.strip()

    @property
    def key(self) -> str:
        """What its line is found by. Texts and steps of the language model have not been varied."""
        if self.model == "SmolLM2":
            return self.label
        return f"{self.label} texts={self.texts} steps={self.steps}"

    @property
    def group(self) -> str:
        """What it is averaged with."""
        return f"{self.setting} {self.model} rank={self.rank}".strip()

    def adapters(self) -> Setting:
        """The row of its setting."""
        return SETTINGS[RECOMMENDED] if self.setting == GUIDE else Setting("", "aurora", self.rank)


def perform(run: Run) -> Record:
    """Train, merge by several methods, judge."""
    found = language_run(run) if run.model == "SmolLM2" else encoder_run(run)
    return {"run": run.key} | found


def encoder_run(run: Run) -> Record:
    """MiniLM learns a corpus; scores (accuracy, -loss) of each held-out text that has a class."""
    encoder, tokenizer = models.load_encoder()
    training, judged = corpus_texts(tokenizer, run.corpus, run.texts)
    torch.manual_seed(run.seed)
    model = task.Reader(encoder)
    batches = training.inputs(CALIBRATION)
    prepare(model, run.adapters(), ENCODER, Sample(batches, [], rating_loss))
    rates = groups(model, run.adapters(), 5e-3)
    start, how = time.perf_counter(), {"steps": run.steps, "lr": 5e-3, "seed": run.seed}
    if run.setting == PENALTY:
        with aurora.watch_linearity(model) as gap:
            train(Penalised(model, gap, 0.1), training, groups=rates, **how)  # type: ignore
    else:
        train(model, training, groups=rates, **how)  # type: ignore[arg-type]
    epoch = (time.perf_counter() - start) * math.ceil(len(training.tokens) / 32) / run.steps
    judge = functools.partial(text_scores, texts=judged)
    found = compare(model.eval(), judge, batches, methods(run))
    return found | {"epoch seconds": epoch, "trained on": len(training.tokens)}


def methods(run: Run) -> tuple[str, ...]:
    """The ways to merge that are compared in a run."""
    if run.model == "SmolLM2":
        return (*merging.METHODS, *ORIGIN)
    if run.setting == GUIDE:
        return (*merging.METHODS, NO_DATA)
    if run.setting == PAPER and run.model == "MiniLM" and (run.rank, run.seed) == (2, 0):
        return (*merging.METHODS, IN_TURN, FROM_X)
    return merging.METHODS


def corpus_texts(tokenizer: Any, corpus: str, count: int) -> tuple[task.Texts, task.Texts]:
    """(to learn from, held out), about `count` each, by a hash of their ids: no seed, no order."""
    learn, held = data.split(data.load(corpus))
    scale = statistics.pstdev(s.rating for s in learn)
    sides = []
    for side in (learn, held):
        part = data.split(side, share=min(1.0, count / len(side)), salt="size")[1]
        sides.append(task.tokenize(tokenizer, part, scale=scale))
    return sides[0], sides[1]


def text_scores(model: nn.Module, texts: task.Texts) -> Tensor:
    """(accuracy, -loss) of each text that has a class, (N, 2)."""
    parts = []
    for batch in texts.batches(64):
        logit = model(batch.input_ids, batch.attention_mask)[:, 0].double()
        truth = (batch.ratings > 0).double()
        hit = ((logit > 0).double() == truth).double()
        loss = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
        parts.append(torch.stack([hit, -loss], 1)[batch.ratings != 0])
    return torch.cat(parts)


class Penalised(nn.Module):
    """Adds a multiple of the gap to the first output's graph: the training loop need not know."""

    def __init__(self, model: nn.Module, gap: Callable[[], Tensor], weight: float) -> None:
        super().__init__()
        self.model, self.gap, self.weight = model, gap, weight

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the model's, with the penalty in the graph while training."""
        out: Tensor = self.model(*inputs)
        if not torch.is_grad_enabled():
            return out
        return _WithPenalty.apply(out, self.weight * self.gap())  # type: ignore


class _WithPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, penalty: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=grad.dtype)


def language_run(run: Run) -> Record:
    """SmolLM2-135M learns to continue texts, all linear layers adapted; score -loss of each."""
    model, tokenizer = models.load_smollm2()
    learn, held = data.split(data.load(run.corpus))
    training = task.chunks(tokenizer, learn, run.texts, 48)
    judged = task.chunks(tokenizer, held, 64, 48)
    torch.manual_seed(run.seed)
    batches = [{"input_ids": part} for part in training[:CALIBRATION].split(16)]
    prepare(model, run.adapters(), LANGUAGE_MODEL, Sample(batches, [], next_token_loss))
    trained = aurora.parameters(model)
    how = {"steps": run.steps, "lr": 2e-3, "seed": run.seed}
    seconds = train_language(model, training, trained, **how)  # type: ignore[arg-type]

    def judge(model: nn.Module) -> Tensor:
        losses = [next_token_losses(model, part).double() for part in judged.split(16)]
        return -torch.cat(losses).unsqueeze(1)

    found = compare(model.eval(), judge, batches, methods(run))
    epoch = seconds * len(training) / 8 / run.steps
    return found | {"epoch seconds": epoch, "trained on": len(training)}


# --- All runs -------------------------------------------------------------------------------------


def plan(quick: bool) -> list[Run]:
    """Every run."""
    amount, corpora = (200, 10) if quick else (1500, 100), tuple(data.CORPORA)
    runs: list[Run] = []
    for seed in (0,) if quick else (0, 1, 2):
        for rank in (2, 8):
            runs += [Run("MiniLM", corpus, rank, seed, *amount) for corpus in corpora]
        if quick:
            continue
        runs += [Run("MiniLM", corpus, 2, seed, *amount, GUIDE) for corpus in corpora]
        if seed == 0:
            language = ("SmolLM2", "editorials")
            runs += [Run(*language, rank, 0, 1024, 40) for rank in (2, 8)]
            runs += [Run(*language, 2, 0, 1024, 40, GUIDE)]
            few = ("movies", "tweets")
            runs += [Run("MiniLM", corpus, 2, 0, *amount, PENALTY) for corpus in few]
    return runs


# --- The report -----------------------------------------------------------------------------------


def kept(found: Sequence[Record], method: str, score: int) -> tuple[float, float]:
    """(gain kept, its error over runs): mean of merged - off over mean of dynamic - off."""
    gains = [r["dynamic"][score] - r["off"][score] for r in found]
    merged = [r[method][score] - r["off"][score] for r in found]
    gain = statistics.fmean(gains)
    share = statistics.fmean(merged) / gain
    if len(found) == 1:
        return share, math.nan
    # The delta method: a ratio of means errs as the mean of what the ratio leaves unexplained.
    left = [m - share * g for m, g in zip(merged, gains, strict=True)]
    return share, statistics.stdev(left) / math.sqrt(len(left)) / abs(gain)


def gains_table(grouped: Mapping[str, Sequence[Record]]) -> str:
    """Gain kept by group and method, in accuracy and in loss."""
    rows = []
    for group, found in grouped.items():
        both = len(found[0]["off"]) > 1
        for score, label in enumerate(("accuracy", "loss") if both else ("loss",)):
            gain = statistics.fmean(abs(r["dynamic"][score] - r["off"][score]) for r in found)
            cells = [_kept_cell(found, method, score) for method in MERGED]
            rows.append([f"{group}, {label}", len(found), f"{gain:.3f}", *cells])
    return markdown_table(["gain kept", "runs", "gain of training", *MERGED], rows)


def _kept_cell(found: Sequence[Record], method: str, score: int) -> str:
    if not all(method in record for record in found):
        return "-"
    share, error = kept(found, method, score)
    return f"{share:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def scores_table(found: Mapping[Run, Record]) -> str:
    """Every run: off, dynamic, merged, and the paired error of merged - dynamic."""
    rows = []
    for run, r in found.items():
        unit = 100 if len(r["off"]) > 1 else 1
        cells = [f"{unit * r[method][0]:.2f}" for method in ("off", "dynamic")]
        for method in merging.METHODS:
            error = unit * r[f"{method}, paired error"][0]
            cells.append(f"{unit * r[method][0]:.2f} ({error:.2f})")
        cost = r["calibrated, seconds"] / r["epoch seconds"]
        rows.append([run.label, *cells, r["units"], f"{cost:.1%}"])
    header = ["run", "off", "dynamic", *merging.METHODS, "held out", "calibration, of an epoch"]
    return markdown_table(header, rows)


def grouped(found: Mapping[Run, Record]) -> dict[str, list[Record]]:
    """Records by what they are averaged with; those that tried every method also by themselves."""
    groups: dict[str, list[Record]] = {}
    for run, record in found.items():
        groups.setdefault(run.group, []).append(record)
        if IN_TURN in record:
            groups.setdefault("all five methods, rank=2 seed=0", []).append(record)
    return groups


def draw(path: Path, groups: Mapping[str, Sequence[Record]]) -> None:
    """Gain kept in the first score by group and method."""
    with picture(path) as (axes,):
        for i, method in enumerate(merging.METHODS):
            values = [kept(found, method, 0)[0] for found in groups.values()]
            places = [j + 0.27 * (i - 1) for j in range(len(groups))]
            axes.bar(places, values, 0.27, label=method)
        axes.axhline(1, color="gray", lw=0.8)
        labels = [group.replace(" ", "\n") for group in groups]
        axes.set_xticks(range(len(groups)), labels, fontsize="x-small")
        axes.set(ylabel="share of the gain of training that is kept")
        axes.legend()


def report(out: Path, found: Mapping[Run, Record]) -> Path:
    """Write the tables and the picture from the lines."""
    groups = grouped(found)
    draw(out / "merging.png", groups)
    parts = [READING, gains_table(groups), scores_table(found)]
    where = records.machines(found.values())
    return write_report(out, "merging", "What a merge keeps", parts, measured_on=where)


READING = (
    "Gain kept: (merged - off) / (dynamic - off), a ratio of means over the runs, with its "
    "standard error over runs. Static: the paper's merge. Linear: first order at the mean of the "
    f"calibration data. Calibrated: least squares on {CALIBRATION} training sequences. No "
    "constant: through the origin, so that no layer gains a bias. Linear, no data: first order at "
    "0. Layer after layer: calibrated in turn on what merged layers produce. "
    "From x: least squares from the layer's input instead of its hidden vector. Penalty: trained "
    "with 0.1 times `watch_linearity`'s gap in the loss. Recommended: the guide's setting instead "
    "of the paper's. In the table of runs, accuracy in percent (for SmolLM2 minus the next-token "
    "loss in nats), in brackets the standard error of the paired difference to dynamic on the "
    "same held-out texts."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    quick = "one seed, few texts and steps, MiniLM only"
    parser = command.parser("merging", __doc__, quick)
    command.add_runs(parser, jobs=1)  # a merge is timed against an epoch of training
    return command.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    """Run what has no line yet, then print and write the report."""
    options = parse(argv)
    runs, path = plan(options.quick), options.out / "merging.jsonl"

    def pending(lines: Lines) -> Iterator[Run]:
        return (run for run in runs if run.key not in lines)

    lines = records.gather(path, options, pending, perform)
    known = {run.key: run for run in runs}
    found = {known[key]: record for key, record in lines.items() if key in known}
    written = report(options.out, found)
    print(written.read_text(encoding="utf-8"))
    print(f"{len(found)} of {len(runs)} runs, written to {written}")

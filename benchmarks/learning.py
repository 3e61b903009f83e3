"""Learning quality: what does each method reach with its parameters, and where does AuroRA lose?

All-MiniLM-L6-v2 learns class and rating of four corpora of short texts, every method with the same
texts, steps, batches and head. First every method's learning rate is chosen on a development fold,
where settings of AuroRA are tried too; then the methods are judged on held-out folds, on which
nothing was chosen (docs/benchmarks.md tells what had been seen before). The methods are rows of a
table, lab/settings.py. Every run is one line of JSON; a run that has its line is not run again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aurora import core
from benchmarks.lab import data, folds, models, records, task
from benchmarks.lab import options as command
from benchmarks.lab.estimates import accuracy, of, pearson
from benchmarks.lab.methods import (
    ENCODER,
    HEAD,
    HEAD_RATE,
    LANGUAGE_MODEL,
    LOOKED,
    WARM,
    Place,
    Sample,
    groups,
    hidden_vectors,
    prepare,
    spent,
)
from benchmarks.lab.records import Lines, Record
from benchmarks.lab.report import markdown_table, picture, write_report
from benchmarks.lab.settings import (
    ABLATED,
    AGAINST,
    FINALIST,
    INSIDE,
    LANGUAGE,
    LONG,
    PAIRED,
    QUICK,
    RECOMMENDED,
    SETTINGS,
    Setting,
    taking_part,
)
from benchmarks.lab.training import (
    next_token_loss,
    next_token_losses,
    rating_loss,
    train,
    train_language,
)

LENGTH = 48  # tokens of a sequence of the language model
STARTED, FIXED = "AuroRA r=2, gradient", "AuroRA r=32 fixed"  # what ablations change one thing of
LORA = "LoRA r=2"  # at its best rate pairs are compared, and against it differences are drawn


# --- One run --------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that fixes a run.

    side: "development", "held-out", "diagnosis", which is development with measurements inside the
    model, "ablation", which is development with more texts that judge, "long", with many steps and
    judged on both sides, or "language". method: its name.
    corpus: "all" for the four mixed, else one, for the language model. texts: at most so many of a
    corpus to learn from. held: at most so many of a corpus to be judged by. start: "own", or
    "shared", where all methods start with the same A, so that differences tell methods apart and
    not draws.
    """

    side: str
    method: str
    lr: float
    corpus: str
    seed: int
    steps: int
    texts: int
    held: int
    start: str = "own"

    key = property(records.key)

    def placed(self, place: Place) -> Place:
        """The place with this run's shared start, if it has one."""
        return place._replace(seed=self.seed) if self.start == "shared" else place


def perform(run: Run) -> Record:
    """Train, and judge on the other side."""
    found = continue_texts(run) if run.side == "language" else read_ratings(run)
    return {"run": run.key, **run._asdict(), **found}


def read_ratings(run: Run) -> Record:
    """MiniLM learns class and rating of the four corpora at once, and is judged on each."""
    setting = SETTINGS[run.method]
    learn, judged = folds.sides(run.side, run.texts, run.held)
    torch.manual_seed(run.seed)
    model = task.Reader(copy.deepcopy(models.encoder()[0])).eval()
    steps = run.steps - spent(setting)
    order = torch.Generator().manual_seed(run.seed)
    first = learn.batches(folds.SIZE, order)[: spent(setting)] if spent(setting) else []
    sample = Sample(learn.inputs(128), learn.sample(64).batches(64), rating_loss, first)
    prepare(model, setting, run.placed(ENCODER), sample)
    found: Record = {"adapter": trained(model)}
    if run.side == "diagnosis":
        found["before"] = diagnose(model, sample)
    start, rates = time.perf_counter(), groups(model, setting, run.lr)
    how = {"steps": steps, "lr": run.lr, "seed": run.seed, "size": folds.SIZE}
    train(model, learn, groups=rates, **how)  # type: ignore[arg-type]
    found["seconds"] = time.perf_counter() - start
    if run.side == "diagnosis":
        found["after"] = diagnose(model, sample)
    found |= scored(answers(model, judged), by_corpus=run.side == "held-out")
    if run.side == "long":
        held_out = folds.sides("held-out", run.texts, run.held)[1]
        found["corpora"] = scored(answers(model, held_out), by_corpus=True)["corpora"]
    return found


def answers(model: nn.Module, judged: Mapping[str, task.Texts]) -> dict[str, tuple[Tensor, Tensor]]:
    """(outputs, ratings) of the texts that judge, by corpus."""
    return {name: task.predict(model, texts) for name, texts in judged.items()}


def trained(model: nn.Module) -> int:
    """How many parameters train, the head apart."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return sum(size for name, size in sizes.items() if not re.search(HEAD, name))


def scored(answers: Mapping[str, tuple[Tensor, Tensor]], by_corpus: bool) -> Record:
    """Loss and scores of the answers (outputs, ratings) to all corpora; of each, if asked for."""
    outputs, ratings = (torch.cat(parts) for parts in zip(*answers.values(), strict=True))
    found: Record = {"loss": float(task.loss(outputs, ratings))}
    found |= task.score(outputs, ratings)._asdict()
    if by_corpus:
        found["corpora"] = {}
        for name, answer in answers.items():
            hits = "".join("01"[int(hit)] for hit in task.recognised(*answer))
            found["corpora"][name] = {**task.score(*answer)._asdict(), "hits": hits}
    return found


def continue_texts(run: Run) -> Record:
    """SmolLM2-135M learns to continue the texts.

    The record has the next-token loss in nats of development and of held-out sequences.
    """
    setting, (source, tokenizer) = SETTINGS[run.method], models.language_model()
    rest, held_out = data.split(data.load(run.corpus))
    sides = (*data.split(rest, salt="development"), held_out)
    counts = (run.texts, run.held, run.held)
    learn, *judged = (
        task.chunks(tokenizer, side, count, LENGTH)
        for side, count in zip(sides, counts, strict=True)
    )
    torch.manual_seed(run.seed)
    model = copy.deepcopy(source)
    few = {"input_ids": learn[:16], "attention_mask": torch.ones_like(learn[:16])}
    cost = spent(setting, head=False)
    steps, first = run.steps - cost, learn[: 8 * cost].split(8)
    sample = Sample([few], learn[:64].split(8), next_token_loss, first)
    prepare(model, setting, run.placed(LANGUAGE_MODEL), sample)
    rates = groups(model, setting, run.lr)
    seconds = train_language(model, learn, rates, steps=steps, lr=run.lr, seed=run.seed)
    development, held = (language_losses(model, ids) for ids in judged)
    return {
        "adapter": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": statistics.fmean(development),
        "held-out losses": held,
        "seconds": seconds,
    }


@torch.no_grad()
def language_losses(model: nn.Module, ids: Tensor) -> list[float]:
    """Mean next-token loss of each row of ids (N, L)."""
    return torch.cat([next_token_losses(model, part) for part in ids.split(8)]).tolist()


def diagnose(model: nn.Module, sample: Sample) -> dict[str, float]:
    """What may hold the nonlinearity back, as means over the adapted layers.

    Share of hidden values beyond the grid and beyond the splines' support; shares of the mean
    square of sigma(z) that are constant, linear in z, and neither; root mean squares of every kind
    of parameter and of its gradient on one batch.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(float(value))

    for layer, z in hidden_vectors(model, sample.inputs).items():
        for name, share in shares(layer, z.double()).items():
            note(name, share)
    sample.objective(model, sample.batches[0]).backward()  # type: ignore[no-untyped-call]
    for layer in core.layers(model).values():
        for name, p in layer.adapter_parameters().items():
            assert p.grad is not None
            note(f"{name} size", p.detach().square().mean().sqrt())
            note(f"{name} gradient", p.grad.square().mean().sqrt())
            p.grad = None
    return {name: statistics.fmean(values) for name, values in found.items()}


@torch.no_grad()
def shares(layer: core.AuroraLinear, z: Tensor) -> dict[str, Tensor]:
    """Where the hidden values z (r, N) lie, and what sigma makes of them."""
    config = layer.config
    end = config.grid_range[1]
    reach = end + config.spline_order / config.cells_per_unit
    sigma = layer.anl.columns(z)
    energy, centred = sigma.square().mean(), sigma - sigma.mean(1, keepdim=True)
    inputs = z - z.mean(1, keepdim=True)
    slope = torch.linalg.lstsq(inputs.t(), centred.t()).solution
    rest = centred - slope.t() @ inputs
    return {
        "beyond the grid": (z.abs() > end).double().mean(),
        "beyond the support": (z.abs() > reach).double().mean(),
        "constant": 1 - centred.square().mean() / energy,
        "linear": (centred.square().mean() - rest.square().mean()) / energy,
        "nonlinear": rest.square().mean() / energy,
    }


# --- All runs -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How much to run: steps and texts of the runs that count, and of those that only try.

    A setting whose length is not 1 trains so many times the steps.
    """

    steps: int = folds.STEPS
    texts: int = folds.TEXTS
    held: int = folds.HELD
    try_steps: int = 60
    try_texts: int = 500
    try_held: int = 250
    long_steps: int = 1000
    names: tuple[str, ...] = ()

    def chosen(self) -> dict[str, Setting]:
        """The settings to run, all unless there are names; first those with the most seeds."""
        found = [row for row in SETTINGS.values() if not self.names or row.name in self.names]
        return {row.name: row for row in sorted(found, key=lambda row: -row.seeds)}

    def attempt(self, name: str, lr: float, seed: int = 0) -> Run:
        """A short run on the development fold."""
        steps = self.try_steps * SETTINGS[name].length
        amount = (steps, self.try_texts, self.try_held)
        return Run("development", name, lr, "all", seed, *amount)

    def develop(self, name: str, lr: float, seed: int = 0) -> Run:
        """A run of full length on the development fold."""
        amount = (self.steps * SETTINGS[name].length, self.texts, self.try_held)
        return Run("development", name, lr, "all", seed, *amount)

    def pair(self, name: str, lr: float, seed: int) -> Run:
        """Likewise, with the A that others start with."""
        return self.develop(name, lr, seed)._replace(start="shared")

    def ablate(self, name: str, lr: float, seed: int) -> Run:
        """A run on the development fold judged by as many texts as the held-out folds have."""
        return self.pair(name, lr, seed)._replace(side="ablation", held=self.held)

    def judge(self, name: str, lr: float, seed: int) -> Run:
        """A run on the held-out folds."""
        amount = (self.steps * SETTINGS[name].length, self.texts, self.held)
        return Run("held-out", name, lr, "all", seed, *amount, "shared")

    def longer(self, name: str, lr: float, seed: int = 0) -> Run:
        """A long run, whose rate the development fold chooses and the held-out folds judge."""
        amount = (self.long_steps, self.texts, self.held)
        return Run("long", name, lr, "all", seed, *amount, "shared")


QUICK_PLAN = Plan(10, 100, 60, 4, 60, 30, 20, taking_part(QUICK))


def rate(i: int) -> float:
    """The grid of learning rates: 1e-3, 1.8e-3, 3e-3, 5.6e-3, 1e-2, ... for i = -12, -11, ..."""
    return float(f"{(1, 1.8, 3, 5.6)[i % 4]}e{i // 4}")


LOWEST, HIGHEST = -20, -4  # 1e-5 and 1e-1
Losses = dict[int, float]  # development loss by place in the grid of rates


def swept(
    make: Callable[[float], Run], places: list[int], step: int, lines: Lines
) -> tuple[Losses, list[Run]]:
    """(losses, the runs still needed).

    From `places` outwards, until the best rate has worse ones on both sides.
    """
    while True:
        runs = [make(rate(i)) for i in places]
        if needed := [run for run in runs if run.key not in lines]:
            return {}, needed
        found = [lines[run.key]["loss"] for run in runs]
        finite = [loss if math.isfinite(loss) else math.inf for loss in found]
        losses = dict(zip(places, finite, strict=True))
        best = min(losses, key=losses.__getitem__)
        if best not in (places[0], places[-1]) or best in (LOWEST, HIGHEST):
            return losses, []
        places = [best - step, *places] if best == places[0] else [*places, best + step]


def sweeps(plan: Plan, name: str, lines: Lines) -> tuple[list[Losses], list[Run]]:
    """([losses of the short runs, of the full runs], the runs still needed).

    Short runs over every half decade find the neighbourhood, from 1e-3, 3e-3, 1e-2. Runs of full
    length over every quarter decade choose, from there and the two rates below, as longer training
    likes lower rates; a setting that is only tried has none of these unless it is a finalist.
    """
    setting = SETTINGS[name]
    if setting.rate_of and not setting.sweep:
        return [], []
    if setting.sweep:
        full, needed = swept(lambda lr: plan.develop(name, lr), list(setting.sweep), 1, lines)
        return ([full, full] if full else []), needed
    short, needed = swept(lambda lr: plan.attempt(name, lr), [-12, -10, -8], 2, lines)
    if needed or not (setting.seeds or FINALIST in setting.parts):
        return ([short] if short else []), needed
    i = max(min(short, key=short.__getitem__), LOWEST + 2)
    full, needed = swept(lambda lr: plan.develop(name, lr), [i - 2, i - 1, i], 1, lines)
    return ([short, full] if full else [short]), needed


def best_rate(losses: Losses) -> float:
    """The rate with the least loss."""
    return rate(min(losses, key=losses.__getitem__))


def chosen_rate(plan: Plan, name: str, lines: Lines) -> float | None:
    """The rate that the runs of full length chose; None where some are missing."""
    setting = SETTINGS[name]
    losses, _ = sweeps(plan, name if setting.sweep else setting.rate_of or name, lines)
    return best_rate(losses[1]) if len(losses) == 2 else None


def compared(setting: Setting) -> bool:
    """Whether it takes part in the choice of a setting, as all that is tried and its rivals do."""
    return not setting.seeds or PAIRED in setting.parts or AGAINST in setting.parts


def pending(plan: Plan, lines: Lines, language: bool = False, long: bool = False) -> Iterator[Run]:
    """Runs without a line that can start, in order of their use.

    Sweeps first; then a second seed of the settings that are compared on development, a look inside
    some, and pairs from the same start; then the held-out folds, seed by seed; then, if asked for,
    longer runs and the language model.
    """
    later: list[Run] = []
    ready: dict[str, float] = {}
    for name, setting in plan.chosen().items():
        found, needed = sweeps(plan, name, lines)
        yield from needed
        if found and compared(setting):
            later.append(plan.attempt(name, best_rate(found[0]), 1))
        if found and INSIDE in setting.parts:
            later.append(plan.attempt(name, best_rate(found[0]))._replace(side="diagnosis"))
        if len(found) == 2 and compared(setting):
            later.append(plan.develop(name, best_rate(found[1]), 1))
        if (lr := chosen_rate(plan, name, lines)) is not None:
            ready[name] = lr
    if LORA in ready:
        paired = [name for name, row in plan.chosen().items() if PAIRED in row.parts]
        for seed in range(3):
            later += [plan.pair(name, ready[LORA], seed) for name in paired]
    ablated = [name for name in ready if ABLATED in SETTINGS[name].parts]
    for seed in range(ABLATION_SEEDS):
        later += [plan.ablate(name, ready[name], seed) for name in ablated]
    for seed in range(5):
        judges = {name: lr for name, lr in ready.items() if seed < SETTINGS[name].seeds}
        later += [plan.judge(name, lr, seed) for name, lr in judges.items()]
    if long:
        later += long_runs(plan, lines)
    if language:
        later += language_runs(lines)
    yield from (run for run in later if run.key not in lines)


LONG_SEEDS, LANGUAGE_SEEDS, ABLATION_SEEDS = 5, 3, 3


def long_rates(plan: Plan, name: str, lines: Lines) -> list[float]:
    """The rates that a setting trains long at: the short runs' choice, and half a decade below.

    Longer training likes lower rates. Empty where the short runs have not chosen.
    """
    lr = chosen_rate(plan, name, lines)
    if lr is None:
        return []
    grid = [rate(i) for i in range(LOWEST, HIGHEST)]
    return [min(grid, key=lambda r: abs(math.log(3.2 * r / lr))), lr]


def best_long_rate(plan: Plan, name: str, lines: Lines) -> float | None:
    """The rate of the long runs with the least development loss; None where one is missing."""
    name = SETTINGS[name].rate_of or name
    runs = [plan.longer(name, lr) for lr in long_rates(plan, name, lines)]
    if not runs or any(run.key not in lines for run in runs):
        return None
    return min(runs, key=lambda run: lines[run.key]["loss"]).lr


def long_runs(plan: Plan, lines: Lines) -> list[Run]:
    """The long runs that can start: first those that choose a rate, then seed by seed."""
    names = [name for name in plan.chosen() if LONG in SETTINGS[name].parts]
    found = []
    for name in (name for name in names if not SETTINGS[name].rate_of):
        found += [plan.longer(name, lr) for lr in long_rates(plan, name, lines)]
    best = {name: best_long_rate(plan, name, lines) for name in names}
    for seed in range(LONG_SEEDS):
        found += [plan.longer(name, lr, seed) for name, lr in best.items() if lr]
    return list(dict.fromkeys(found))


def continued(name: str, lr: float, seed: int = 0) -> Run:
    """A run of the language model."""
    return Run("language", name, lr, "editorials", seed, 60, 1024, 64, "shared")


def language_sweep(name: str, lines: Lines) -> tuple[Losses, list[Run]]:
    """(losses, the runs still needed), of the language model with one seed."""
    make = functools.partial(continued, SETTINGS[name].rate_of or name)
    return swept(make, [-12, -10, -8], 2, lines)


def language_runs(lines: Lines) -> Iterator[Run]:
    """The language model's runs that can start: every method at several rates, then more seeds."""
    ready = {}
    for name in taking_part(LANGUAGE):
        losses, needed = language_sweep(name, lines)
        yield from needed
        if losses:
            ready[name] = best_rate(losses)
    for seed in range(LANGUAGE_SEEDS):
        for name, lr in ready.items():
            yield continued(name, lr, seed)


# --- The report -----------------------------------------------------------------------------------

Judged = dict[str, dict[tuple[str, int], Record]]


def judged(plan: Plan, lines: Lines) -> Judged:
    """The held-out runs at the rate that the sweep chose."""
    found: Judged = {}
    for name in (name for name in SETTINGS if name in plan.chosen()):
        lr = chosen_rate(plan, name, lines)
        if lr is None:
            continue
        for seed in range(SETTINGS[name].seeds):
            record = lines.get(plan.judge(name, lr, seed).key)
            for corpus, scores in record["corpora"].items() if record else ():
                found.setdefault(name, {})[corpus, seed] = {**record, **scores}  # type: ignore
    return found


def scores_table(found: Judged) -> str:
    """One row a method: parameters, rate, accuracy by corpus, means, differences to LoRAs."""
    rows, against = [], taking_part(AGAINST)
    for name, records_ in found.items():
        one = next(iter(records_.values()))
        by_corpus = []
        for corpus in data.CORPORA:
            part = of(corpus, records_)
            by_corpus.append(f"{100 * accuracy(part).mean:.1f}" if part else "-")
        differences = []
        for score in (accuracy, pearson):
            for other in against:
                known = other in found and other != name
                differences.append(score(records_, found[other]).signed if known else "-")
        seeds = len({seed for _, seed in records_})
        means = [accuracy(records_), pearson(records_)]
        start = [name, f"{one['adapter']:,}", f"{one['lr']:g}", seeds]
        rows.append([*start, *by_corpus, *means, *differences])
    header = ["held out", "parameters", "rate", "seeds", *data.CORPORA, "accuracy", "Pearson"]
    for label in ("accuracy", "Pearson"):
        header += [f"{label} - {other}" for other in against]
    return markdown_table(header, rows)


def losses_table(found: Judged) -> str:
    """Where AuroRA of rank 2 wins and loses: differences to LoRA by corpus."""
    rows = []
    for name in (name for name in found if is_aurora(name) and SETTINGS[name].rank == 2):
        for other in (other for other in taking_part(AGAINST) if other in found):
            cells = []
            for corpus in data.CORPORA:
                part = of(corpus, found[name])
                cells.append(accuracy(part, found[other]).signed if part else "-")
            whole = pearson(found[name], found[other]).signed
            rows.append([f"{name} - {other}", *cells, whole])
    return markdown_table(["accuracy, by corpus", *data.CORPORA, "Pearson, all"], rows)


def is_aurora(name: str) -> bool:
    """Whether a setting is one of AuroRA."""
    return SETTINGS[name].kind == "aurora"


def plain_lora(rank: int) -> str:
    """The name of LoRA of a rank, as it is."""
    for name, row in SETTINGS.items():
        if row == Setting(name, "lora", rank, seeds=row.seeds, parts=row.parts):
            return name
    return ""


def rates_table(plan: Plan, lines: Lines, full: bool) -> str:
    """Development loss by learning rate, of the full or of the short runs.

    Of the settings that are compared also the means over two seeds, at the best rate.
    """
    found: dict[str, Losses] = {}
    for name in plan.chosen():
        both, _ = sweeps(plan, name, lines)
        if len(both) > full and (full or not SETTINGS[name].sweep):  # which has no short runs
            found[name] = both[full]
    places = sorted(set().union(*found.values()))
    make = plan.develop if full else plan.attempt
    rows = []
    for name, losses in found.items():
        cells = [f"{losses[i]:.3f}" if i in losses else "" for i in places]
        seeds = [lines.get(make(name, best_rate(losses), seed).key) for seed in range(2)]
        rows.append([name, *cells, *_means_of_two([r for r in seeds if r])])
    steps = plan.steps if full else plan.try_steps
    header = [f"development loss, {steps} steps", *(f"{rate(i):g}" for i in places)]
    return markdown_table([*header, "2 seeds", "(accuracy + Pearson) / 2"], rows)


def _means_of_two(found: Sequence[Record]) -> list[str]:
    if len(found) < 2:
        return ["", ""]
    score = 50 * statistics.fmean(r["accuracy"] + r["pearson"] for r in found)
    return [f"{statistics.fmean(r['loss'] for r in found):.4f}", f"{score:.2f}"]


def pairs_table(lines: Lines) -> str:
    """Development runs from the same A at LoRA's rate: loss, score, both minus LoRA's by seed."""
    found: dict[str, dict[int, Record]] = {}
    for r in lines.values():
        if _is_pair(r):
            found.setdefault(r["method"], {})[r["seed"]] = r
    lora = found.get(LORA, {})
    scores = ((lambda r: r["loss"], 4), (lambda r: 50 * (r["accuracy"] + r["pearson"]), 2))
    rows = []
    for name, runs in found.items():
        cells: list[object] = [len(runs)]
        for score, digits in scores:
            cells.append(f"{statistics.fmean(map(score, runs.values())):.{digits}f}")
            gaps = [score(runs[seed]) - score(lora[seed]) for seed in runs if seed in lora]
            cells.append(_mean_gap(gaps, digits) if name != LORA else "-")
        rows.append([name, *cells])
    header = ["same start, development", "seeds"]
    for label in ("loss", "(accuracy + Pearson) / 2"):
        header += [label, f"- {LORA}"]
    return markdown_table(header, rows)


def ablations_table(plan: Plan, lines: Lines) -> str:
    """A start from the gradient with one thing changed: loss and scores, each minus the start's."""
    found: dict[str, list[Record]] = {}
    for name in plan.chosen():
        lr = chosen_rate(plan, name, lines) if ABLATED in SETTINGS[name].parts else None
        keys = [plan.ablate(name, lr, seed).key for seed in range(ABLATION_SEEDS)] if lr else []
        runs = [lines.get(key) for key in keys]
        if runs and all(runs):
            found[name] = [run for run in runs if run]
    rows = []
    for name, runs in found.items():
        cells: list[object] = [f"{runs[0]['adapter']:,}", f"{runs[0]['lr']:g}"]
        whole = found.get(unchanged(name), [])
        for score, times, digits in (("loss", 1, 4), ("accuracy", 100, 2), ("pearson", 100, 2)):
            cells.append(f"{times * statistics.fmean(run[score] for run in runs):.{digits}f}")
            gaps = [times * (a[score] - b[score]) for a, b in zip(runs, whole, strict=False)]
            cells.append("-" if name == unchanged(name) else _mean_gap(gaps, digits))
        rows.append([name, *cells])
    header = ["one thing changed, development", "parameters", "rate"]
    for score in ("loss", "accuracy", "Pearson"):
        header += [score, "- unchanged"]
    return markdown_table(header, rows)


def unchanged(name: str) -> str:
    """The setting that an ablation changes one thing of."""
    return FIXED if name == FIXED or SETTINGS[name].rate_of == FIXED else STARTED


def _is_pair(record: Record) -> bool:
    return record["side"] == "development" and record["start"] == "shared"


def _mean_gap(gaps: Sequence[float], digits: int) -> str:
    if not gaps:
        return "-"
    mean = f"{statistics.fmean(gaps):+.{digits}f}"
    if len(gaps) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.{digits}f}"


def diagnosis_table(lines: Lines) -> str:
    """Measurements inside the model, at the start and after training."""
    found = [r for r in lines.values() if r["side"] == "diagnosis"]
    names: dict[str, None] = {}
    for r in found:
        names |= dict.fromkeys(r["before"])
    rows = []
    for name in names:
        cells = [
            f"{r['before'][name]:.3g} → {r['after'][name]:.3g}" if name in r["before"] else "-"
            for r in found
        ]
        rows.append([name, *cells])
    header = [f"{r['method']}, rate {r['lr']:g}" for r in found]
    return markdown_table(["start → end", *header], rows)


def language_table(lines: Lines) -> str:
    """Held-out perplexity of the language model, at the rate that is best on development."""
    best: dict[str, dict[int, Record]] = {}
    for name in taking_part(LANGUAGE):
        losses, _ = language_sweep(name, lines)
        for seed in range(LANGUAGE_SEEDS) if losses else ():
            record = lines.get(continued(name, best_rate(losses), seed).key)
            if record:
                best.setdefault(name, {})[seed] = record
    against = [name for name in taking_part(AGAINST) if LANGUAGE in SETTINGS[name].parts]
    rows = []
    for name, runs in best.items():
        one = next(iter(runs.values()))
        held = np.mean([r["held-out losses"] for r in runs.values()])
        development = statistics.fmean(r["loss"] for r in runs.values())
        perplexities = [f"{math.exp(loss):.3f}" for loss in (development, held)]
        gaps = []
        for other in against:
            known = other in best and other != name
            gaps.append(_paired(runs, best[other]) if known else "-")
        start = [name, f"{one['adapter']:,}", f"{one['lr']:g}", len(runs)]
        rows.append([*start, *perplexities, *gaps])
    header = ["SmolLM2-135M", "parameters", "rate", "seeds", "development perplexity"]
    gaps = [f"loss - {other}" for other in against]
    return markdown_table([*header, "held-out perplexity", *gaps], rows)


def _paired(runs: Mapping[int, Record], others: Mapping[int, Record]) -> str:
    """The mean difference of the losses; its error counts sequences, paired, and seeds."""
    both = [seed for seed in runs if seed in others]
    gap = np.array(
        [np.subtract(runs[s]["held-out losses"], others[s]["held-out losses"]) for s in both]
    )  # (seeds, sequences)
    variance = gap.mean(0).var(ddof=1) / gap.shape[1]
    if len(both) > 1:
        variance += gap.mean(1).var(ddof=1) / len(both)
    return f"{gap.mean():+.4f} ± {math.sqrt(variance):.4f}"


def judged_long(plan: Plan, lines: Lines) -> Judged:
    """The long runs on the held-out folds, each at the rate that the development fold chose."""
    found: Judged = {}
    for name in (name for name in plan.chosen() if LONG in SETTINGS[name].parts):
        lr = best_long_rate(plan, name, lines)
        for seed in range(LONG_SEEDS) if lr else ():
            record = lines.get(plan.longer(name, lr, seed).key)  # type: ignore[arg-type]
            for corpus, scores in record["corpora"].items() if record else ():
                found.setdefault(name, {})[corpus, seed] = {**record, **scores}  # type: ignore
    return found


def long_table(plan: Plan, lines: Lines) -> str:
    """Development loss of the long runs, by method, rate and seed."""
    rows = []
    for r in lines.values():
        if r["side"] == "long" and r["steps"] == plan.long_steps:
            scores = [f"{100 * r[score]:.2f}" for score in ("accuracy", "pearson")]
            rows.append([r["method"], f"{r['lr']:g}", r["seed"], f"{r['loss']:.4f}", *scores])
    header = [f"{plan.long_steps} steps, development", "rate", "seed", "loss"]
    return markdown_table([*header, "accuracy", "Pearson"], sorted(rows))


def verdict(found: Judged) -> list[str]:
    """What the recommended setting reached, in words made from the numbers."""
    told, ours = [], found.get(RECOMMENDED)
    for other in ("AuroRA r=2", *taking_part(AGAINST)):
        if ours and other in found:
            gap = accuracy(ours, found[other])
            sigma = gap.mean / gap.error if gap.error else math.nan  # equal, hit by hit
            points = f"{gap.signed} points, {sigma:+.1f} standard errors"
            told.append(f"accuracy - that of {other}: {points}")
    lost = []
    for name in filter(is_aurora, found):
        lora = found.get(plain_lora(SETTINGS[name].rank), {})
        for score, label in ((accuracy, "accuracy"), (pearson, "Pearson")):
            gap = score(found[name], lora)
            if gap.mean < -2 * gap.error:
                lost.append(f"{name} in {label} ({gap.signed})")
    loses = "AuroRA loses to LoRA of the same rank by more than two standard errors"
    return [
        f"Recommended setting ({RECOMMENDED}): {'; '.join(told) or 'not judged yet'}.",
        f"{loses}: {', '.join(lost) or 'nowhere'}.",
    ]


COLORS = {"aurora": "C1", "lora": "C0", "peft": "C0", "plain": "C7"}  # by kind


def draw(path: Path, found: Judged) -> None:
    """Accuracy and Pearson minus those of LoRA r=2 with their errors; few parameters below."""
    counts = {name: next(iter(records_.values()))["adapter"] for name, records_ in found.items()}
    names = sorted((name for name in counts if counts[name]), key=counts.__getitem__)
    scores = ((accuracy, "accuracy"), (pearson, "100 x Pearson"))
    with picture(path, columns=2, height=1 + 0.25 * len(names)) as axes:
        for axis, (score, label) in zip(axes, scores, strict=True):
            for i, name in enumerate(names):
                gap = score(found[name], found.get(LORA, {}))
                error = 0 if name == LORA or math.isnan(gap.error) else 100 * gap.error
                look = {"fmt": "o", "color": COLORS[SETTINGS[name].kind], "capsize": 2}
                axis.errorbar(100 * gap.mean, i, xerr=error, **look)
            axis.axvline(0, color="gray", lw=0.8)
            axis.set(xlabel=f"{label}, points above {LORA}, one standard error")
            axis.set_yticks(range(len(names)), [""] * len(names))
        labels = [f"{name}, {counts[name]:,}" for name in names]
        axes[0].set_yticks(range(len(names)), labels, fontsize="small")


def report(out: Path, plan: Plan, lines: Lines) -> Path:
    """Write the tables and the picture from the lines."""
    found = judged(plan, lines)
    draw(out / "learning.png", found)
    parts = [explain(plan), *verdict(found), scores_table(found), losses_table(found)]
    parts += ["## The choice of rates and settings, on development"]
    parts += [rates_table(plan, lines, True), rates_table(plan, lines, False)]
    if any(map(_is_pair, lines.values())):
        parts += [pairs_table(lines)]
    if any(r["side"] == "ablation" for r in lines.values()):
        parts += ["## What the start from the gradient needs", READING_ABLATION]
        parts += [ablations_table(plan, lines)]
    if any(r["side"] == "diagnosis" for r in lines.values()):
        parts += ["## Inside the model", diagnosis_table(lines)]
    if any(r["side"] == "long" for r in lines.values()):
        parts += ["## Longer training", READING_LONG]
        if longer := judged_long(plan, lines):
            parts += [scores_table(longer)]
        parts += [long_table(plan, lines)]
    if any(r["side"] == "language" for r in lines.values()):
        parts += ["## A language model", READING_LANGUAGE, language_table(lines)]
    title, where = "What each method learns with its parameters", records.machines(lines.values())
    return write_report(out, "learning", title, parts, measured_on=where)


READING_ABLATION = (
    f"{STARTED} (the recommended setting) and {FIXED}, with one thing changed, at their rates: "
    "three seeds on the development fold, judged by as many texts as a held-out fold has, each "
    "compared with the unchanged run of its seed. What a look costs is counted: fewer batches "
    "leave more steps to train. At the top the recommended setting without a look, and LoRA with "
    "one."
)

READING_LONG = (
    "As above, with 1,000 steps. Every method trains at its rate for the short runs and half a "
    "decade below; the better of the two on the development fold is judged on the held-out folds. "
    "Methods that start from the gradient take the rate of the method without."
)

READING_LANGUAGE = (
    "All linear layers adapted, editorials, 60 steps of 8 sequences, looks at the gradient "
    "included; the same A for methods of a rank that draw it; each at the rate that is best on "
    "development with one seed. Loss in nats a token; the error of a difference counts held-out "
    "sequences, paired, and seeds."
)


def explain(plan: Plan) -> str:
    """How to read the tables."""
    return (
        "All-MiniLM-L6-v2, query and value adapted, one head for class and rating, learns the "
        f"four corpora mixed ({plan.steps} steps of {folds.SIZE} texts, from at most "
        f"{plan.texts:,} of a corpus) and is judged on the held-out folds (at most {plan.held:,} "
        f"of a corpus). Every method has alpha = 2 rank and the head's rate {HEAD_RATE:g} (where "
        "the name does not say otherwise, and the head is not all that trains), and by seed the "
        "same texts, batches and head. Its own rate is chosen on a development fold, all from one "
        f"grid of four rates a decade: {plan.try_steps} steps over every second rate, from 1e-3, "
        f"3e-3, 1e-2 outwards until the best is inside; then {plan.steps} steps over every rate, "
        "from the best so far and the two below it, likewise. Accuracy and Pearson's correlation "
        "in percent, means over the corpora; the error of an accuracy counts texts (paired in "
        'differences) and seeds, that of Pearson\'s correlation seeds only. "try": settings that '
        'were only compared on development; "biases too": the adapted layers\' own biases train '
        "beside the adapter. On held-out texts all methods of a seed start with the same A. "
        f'"gradient" and "fixed": the head is trained alone for {WARM} steps, then the gradient is '
        f"looked at for {LOOKED} steps to set A (and B); these steps are taken off the budget, so "
        f"that the adapter trains for {plan.steps - WARM - LOOKED}; their rates are chosen among "
        'runs of full length alone. "at once": the head is not trained alone before, and learns '
        'while the gradient is looked at. "ridge 1" and "at once" take the rates of what they '
        'change. EVA looks at the inputs of as many texts, LoRA-GA does as "gradient".'
    )


# --- The command ----------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command.parser("learning", __doc__, "a few methods, texts and steps")
    command.add_runs(parser)
    told = "also SmolLM2-135M (needs the extra `language`)"
    many = "also long runs of the main contenders"
    parser.add_argument("--long", action="store_true", help=many)
    parser.add_argument("--language", action="store_true", help=told)
    return command.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    """Run what has no line yet, then print and write the report."""
    options = parse(argv)
    plan, path = QUICK_PLAN if options.quick else Plan(), options.out / "learning.jsonl"

    def ready(lines: Lines) -> Iterator[Run]:
        return pending(plan, lines, options.language, options.long)

    lines = records.gather(path, options, ready, perform)
    if not judged(plan, lines):
        raise records.nothing_yet(path, options, "on held-out texts")
    written = report(options.out, plan, lines)
    print(f"{written.read_text(encoding='utf-8')}\nwritten to {written}")

"""Fine-tuning a sentence encoder: what do fewer parameters cost in score, time and merges?

All-MiniLM-L6-v2 learns the class and the rating of movie-review snippets at once; query and value
are adapted. The contenders train in turn, step by step, on the same batches. Then each is scored
on held-out texts, saved, loaded into a fresh model, which must give the same outputs bit for bit,
and merged. Works on your own model folder and texts: `--model`, `--data`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aurora
from benchmarks.lab import baselines, data
from benchmarks.lab import options as command
from benchmarks.lab.methods import HEAD
from benchmarks.lab.models import load_encoder
from benchmarks.lab.needs import BenchmarkError, progress
from benchmarks.lab.report import machine, markdown_table, picture, use_all_cores, write_report
from benchmarks.lab.task import (
    Reader,
    Scores,
    Texts,
    evaluate,
    predict,
    recognised,
    score,
    tokenize,
)
from benchmarks.lab.timing import median_ratio
from benchmarks.lab.training import endless, make_step, train

SWEEP = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
SIZE = 32  # texts a step
STEPS, JUDGED = 100, 1000  # as many as keep the whole under 4 minutes on two cores
CALIBRATION, RELOADED = 256, 256  # texts to merge with, and to compare a reloaded model on
STATIC, CALIBRATED = "static merge", "calibrated merge"
Tick = Callable[[], object]


# --- Contenders -----------------------------------------------------------------------------------


def evenly(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """All that trains at one rate."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune.

    Attributes:
        name: in tables.
        lr: the learning rate.
        prepare: puts adapters into a fresh Reader, and freezes all but them and the head.
        save: writes what was trained.
        load: reads it into a fresh Reader that `prepare` has not seen.
        merges: ways to fold the adapters into plain layers, with batches and a call after each.
        groups: parameter groups of a prepared model at a rate.
    """

    name: str
    lr: float
    prepare: Callable[[nn.Module], object]
    save: Callable[[nn.Module, Path], object]
    load: Callable[[nn.Module, Path], object]
    merges: Mapping[str, Callable[[nn.Module, Sequence[Any], Tick], object]] = field(
        default_factory=dict
    )
    groups: Callable[[nn.Module, float], list[dict[str, Any]]] = evenly


@dataclass(frozen=True)
class Field:
    """The contenders, by what they are."""

    head: Contender
    lora: Contender
    large: Contender
    paper: Contender
    recommended: Contender

    def __iter__(self) -> Iterator[Contender]:
        return iter(vars(self).values())


def contenders(targets: str, rank: int, lr: float | None = None) -> Field:
    """Head only, LoRA of the rank and of four times the rank, AuroRA as in the paper and as we do.

    lr: replaces the chosen rates.
    """
    inject = functools.partial(functools.partial, aurora.inject, target_regex=targets, train=HEAD)
    return Field(
        _plain("head only", lr or 1e-2, functools.partial(baselines.freeze, train=HEAD), {}),
        _lora(targets, rank, lr or 5e-3),
        _lora(targets, 4 * rank, lr or 5e-3),
        Contender(
            f"AuroRA r={rank}",
            lr or 5e-3,
            inject(rank=rank),
            *(aurora.save, aurora.load, MERGES),
        ),
        Contender(
            f"AuroRA r={rank} recommended",
            lr or 5e-3,
            inject(rank=aurora.recommended(rank)),
            *(aurora.save, aurora.load, MERGES, aurora.parameter_groups),
        ),
    )


def _lora(targets: str, rank: int, lr: float) -> Contender:
    inject = functools.partial(baselines.inject_lora, target_regex=targets, rank=rank, train=HEAD)
    merges = {STATIC: lambda model, batches, tick: baselines.merge_lora(model)}
    return _plain(f"LoRA r={rank}", lr, inject, merges)


def _plain(name: str, lr: float, prepare: Callable[[nn.Module], object], merges: Any) -> Contender:
    def load(model: nn.Module, path: Path) -> None:
        prepare(model)
        baselines.load_trained(model, path)

    return Contender(name, lr, prepare, baselines.save_trained, load, merges)


def _calibrate(model: nn.Module, batches: Sequence[Any], tick: Tick) -> None:
    aurora.merge(model, "calibrated", ticking(batches, tick), held_out=batches[:1])


MERGES = {STATIC: lambda model, batches, tick: aurora.merge(model), CALIBRATED: _calibrate}


def ticking(batches: Iterable[Any], tick: Tick) -> Iterator[Any]:
    """The batches, with a call after each."""
    for batch in batches:
        yield batch
        tick()


# --- The task -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model folder and texts to learn and to be judged by."""

    model: str | None
    learn: Texts
    judge: Texts

    def reader(self, seed: int) -> Reader:
        """A fresh model from disk; the seed draws its head, and the adapters put in next."""
        encoder, _ = load_encoder(self.model)
        torch.manual_seed(seed)
        return Reader(encoder)

    def prepared(self, contender: Contender, seed: int) -> Reader:
        """A fresh model, ready to train."""
        model = self.reader(seed)
        try:
            contender.prepare(model)
        except (ValueError, TypeError) as error:
            raise BenchmarkError(f"--targets: {error}") from error
        return model.eval()


def build_task(
    model: str | None, source: str, development: bool = False, judged: int = JUDGED
) -> Task:
    """Texts split by the hash of their ids.

    Args:
        model: its folder.
        source: of the texts.
        development: both sides come from the training side.
        judged: at most so many texts to be judged by.
    """
    _, tokenizer = load_encoder(model)
    learn, judge = data.split(data.load(source))
    if development:
        learn, judge = data.split(learn, share=0.1, salt="development")
    for name, side in (("training", learn), ("held-out", judge)):
        if not (any(s.rating > 0 for s in side) and any(s.rating < 0 for s in side)):
            raise BenchmarkError(
                f"{source}: the {name} side ({len(side)} texts) needs positive and negative "
                "ratings, for the sign is the class: give more texts, or subtract the middle of "
                "your scale from the ratings"
            )
    scale = statistics.pstdev(s.rating for s in learn)
    learnt, held = (tokenize(tokenizer, side, scale=scale) for side in (learn, judge))
    return Task(model, learnt, held.sample(judged))


# --- Training, in turn ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A contender in training: its model, and losses and seconds of its steps so far."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train_in_turn(
    task: Task, field: Iterable[Contender], seed: int, steps: int, label: str = ""
) -> dict[str, Course]:
    """Train all contenders, one step each in turn on the same batch: times compare, batch by batch.

    Every other round runs them backwards, so that none always follows the same one.
    """
    courses, takes = {}, {}
    for contender in field:
        model = task.prepared(contender, seed)
        groups = contender.groups(model, contender.lr)
        courses[contender.name] = Course(model)
        takes[contender.name] = make_step(model, groups, contender.lr, steps)
    bar = progress(range(steps), label, unit="round")
    for turn, batch in zip(bar, endless(task.learn, SIZE, seed), strict=False):
        for name in list(takes)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            courses[name].losses.append(takes[name](batch))
            courses[name].seconds.append(time.perf_counter() - start)
    return courses


# --- Judging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one contender reached with one seed.

    adapter, head: trainable parameters. size: bytes of the file. hits: (N,), of the texts that
    have a class. scores: of the trained model, and of the merged ones by the name of the merge.
    """

    adapter: int
    head: int
    size: int
    hits: Tensor
    trained: Scores
    merged: dict[str, Scores]
    course: Course


def judge(task: Task, contender: Contender, course: Course, seed: int, bar: Any) -> Result:
    """Score; save, load into a fresh model and compare; merge in every way and score again.

    Raises RuntimeError if the fresh model's outputs are not the same, bit for bit.
    """

    def say(what: str) -> None:
        bar.set_description(f"3 of 3: {contender.name}: {what}")

    model = course.model
    adapter, head = count(model)
    say("scoring")
    answers = predict(model, task.judge, tick=bar.update)
    say("saving and loading")
    # With another seed: nothing that should come from the file comes by chance.
    fresh, size = reloaded(task, contender, model, seed + 1)
    few = task.judge.sample(RELOADED)
    outputs = [predict(one, few, tick=bar.update)[0] for one in (model, fresh)]
    if not torch.equal(*outputs):
        raise RuntimeError(f"{contender.name}: the reloaded model's outputs differ")
    merged = {}
    for name, merge in contender.merges.items():
        say(name)
        plain = copy.deepcopy(fresh)
        merge(plain, task.learn.inputs(CALIBRATION), bar.update)
        say(f"scoring the {name}")
        merged[name] = score(*predict(plain, task.judge, tick=bar.update))
    hits = recognised(*answers).double()
    return Result(adapter, head, size, hits, score(*answers), merged, course)


def ticks(task: Task, contender: Contender) -> int:
    """How many batches `judge` runs."""
    scored, few = math.ceil(len(task.judge.tokens) / 64), task.judge.sample(RELOADED)
    calibrated = len(task.learn.inputs(CALIBRATION)) if CALIBRATED in contender.merges else 0
    compared = 2 * math.ceil(len(few.tokens) / 64)
    return scored * (1 + len(contender.merges)) + compared + calibrated


def reloaded(
    task: Task, contender: Contender, model: nn.Module, seed: int
) -> tuple[nn.Module, int]:
    """(a fresh model that read what was saved of `model`, bytes of the file)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        contender.save(model, path)
        fresh = task.reader(seed)
        contender.load(fresh, path)
        return fresh.eval(), path.stat().st_size


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters of the adapters, of the head)."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in sizes.items() if re.search(HEAD, name))
    return sum(sizes.values()) - head, head


Results = dict[str, list[Result]]  # by contender, one a seed


def run(task: Task, field: Iterable[Contender], seeds: Sequence[int], steps: int) -> Results:
    """Train and judge all contenders with every seed."""
    results: Results = {contender.name: [] for contender in field}
    for seed in seeds:
        label = f"2 of 3: training {len(results)} contenders in turn, seed {seed}"
        courses = train_in_turn(task, field, seed, steps, label)
        total = sum(ticks(task, contender) for contender in field)
        with progress(label="3 of 3: judging", total=total, unit="batch") as bar:
            for contender in field:
                result = judge(task, contender, courses[contender.name], seed, bar)
                results[contender.name].append(result)
    return results


def sweep(task: Task, field: Iterable[Contender], rates: Sequence[float], steps: int) -> str:
    """A table of development scores (accuracy + Pearson) by learning rate, one seed each."""
    rows = []
    for contender in field:
        scores = []
        for lr in rates:
            model = task.prepared(contender, seed=0)
            groups, label = contender.groups(model, lr), f"{contender.name}, lr {lr:g}"
            train(model, task.learn, steps=steps, lr=lr, size=SIZE, groups=groups, label=label)
            scores.append(sum(evaluate(model, task.judge)))
        rows.append([contender.name, *(f"{score:.4f}" for score in scores)])
    return markdown_table(["accuracy + Pearson", *(f"{lr:g}" for lr in rates)], rows)


# --- The report -----------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The mean to four digits, and the standard deviation over seeds if there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def both(scores: Sequence[Scores | None]) -> str:
    """Accuracy / Pearson in one cell, a dash where there is nothing to judge."""
    known = [s for s in scores if s is not None]
    return " / ".join(spread([s[i] for s in known]) for i in (0, 1)) if known else "-"


def seconds_of(results: Results) -> dict[str, list[float]]:
    """Seconds of every step, of all seeds, by contender."""
    found: dict[str, list[float]] = {}
    for name, runs in results.items():
        found[name] = []
        for r in runs:
            found[name] += r.course.seconds
    return found


def table(results: Results, against: str) -> str:
    """One row a contender; times also over those of `against`."""
    seconds, rows = seconds_of(results), []
    for name, runs in results.items():
        counts = [f"{runs[0].adapter:,}", f"{runs[0].head:,}"]
        trained = [spread([r.trained[i] for r in runs]) for i in (0, 1)]
        merged = [both([r.merged.get(merge) for r in runs]) for merge in (STATIC, CALIBRATED)]
        ratio = median_ratio(seconds, name, against)
        times = [f"{statistics.median(seconds[name]):.3f}", f"{ratio:.2f}"]
        rows.append([name, *counts, *trained, *merged, *times, f"{runs[0].size / 1000:.1f} kB"])
    header = ["contender", "adapter", "head", "accuracy", "Pearson", STATIC, CALIBRATED]
    return markdown_table([*header, "s/step", f"x {against}", "file"], rows)


def meaning(results: Results, field: Field) -> list[str]:
    """Three lines that say what the table means, from its numbers."""
    lora, ours = field.lora.name, field.recommended.name
    paper, large = field.paper.name, field.large.name
    gaps = [difference(results[name], results[lora]) for name in (ours, paper)]
    score = f"accuracy minus that of {lora}: {ours} {gaps[0]}; {paper} {gaps[1]}"
    changes = [f"{name} {changed(results[name])}" for name in (lora, ours, paper)]
    merge = f"change of accuracy in points once merged: {'; '.join(changes)}"
    counts = {name: runs[0].adapter for name, runs in results.items()}
    ratio = median_ratio(seconds_of(results), ours, lora)
    cost = (
        f"{ours} trains {counts[ours] / counts[lora]:.2f} times the parameters of {lora}, "
        f"{counts[ours] / counts[large]:.2f} times those of {large}; a step takes {ratio:.2f} "
        f"times as long as that of {lora}"
    )
    return [f"Score: {score}.", f"Merge: {merge}.", f"Cost: {cost}."]


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Accuracy minus that of others on the same texts, in points, and what that says."""
    gaps = torch.stack([a.hits - b.hits for a, b in zip(ours, theirs, strict=True)]).mean(0)
    mean, error = 100 * gaps.mean().item(), 100 * (gaps.std() / math.sqrt(len(gaps))).item()
    clear = "clearly better" if mean > 0 else "clearly worse"
    if abs(mean) <= 2 * error:
        clear = "no clear difference"
    return f"{mean:+.1f} ± {error:.1f} points ({clear})"


def changed(runs: Sequence[Result]) -> str:
    """Points of accuracy that every merge changes, means over seeds."""
    told = []
    for merge in runs[0].merged:
        change = statistics.fmean(r.merged[merge].accuracy - r.trained.accuracy for r in runs)
        told.append(f"{100 * change:+.1f} ({merge.removesuffix(' merge')})")
    return " and ".join(told)


def draw(path: Path, results: Results, window: int = 10) -> None:
    """Loss (mean of the last `window` steps), a line a seed; the first seed's accuracy by merge."""
    with picture(path, columns=2) as (left, right):
        for i, (name, runs) in enumerate(results.items()):
            for r in runs:
                losses = r.course.losses
                parts = [losses[max(0, j - window) : j] for j in range(1, len(losses) + 1)]
                label = name if r is runs[0] else None
                left.plot([statistics.fmean(part) for part in parts], color=f"C{i}", label=label)
            for merge, mark in ((None, "o"), (STATIC, "x"), (CALIBRATED, "+")):
                scores = runs[0].merged.get(merge) if merge else runs[0].trained
                if scores is not None:
                    right.plot(scores.accuracy, i, mark, color=f"C{i}", label=merge or "trained")
        left.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
        left.legend(fontsize="small")
        right.set(xlabel="held-out accuracy: o trained, x merged statically, + calibrated")
        right.set_yticks(range(len(results)), list(results))
        right.invert_yaxis()


def explain(options: argparse.Namespace, task: Task, steps: int) -> list[str]:
    """The report's text around the table."""
    name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
    learned, judged = len(task.learn.tokens), len(task.judge.tokens)
    setting = (
        f"{name}, `{options.targets}` adapted; {Path(options.data).name}: {learned:,} texts to "
        f"learn from, {judged:,} of those that a hash of their ids holds out to be judged by; "
        f"{steps} steps of {SIZE} texts, seeds {' '.join(map(str, options.seeds))}."
    )
    reading = (
        "Adapter and head: trainable parameters. Accuracy: sign of the rating. Pearson: predicted "
        "and true rating. Every file was loaded into a fresh model, whose outputs on "
        f"{min(RELOADED, judged)} texts are the same bit for bit, or the command fails. Static "
        "merge: both scores once the adapter is folded into the weights, which for LoRA keeps the "
        "trained function and for AuroRA replaces it by another. Calibrated merge: both once the "
        f"nearest affine map is folded in, by {CALIBRATION} training texts. s/step: median "
        "training step, contenders in turn on the same batches; beside it the median ratio to the "
        "smaller LoRA. File: adapter and head. One standard error of an accuracy near 0.8 on "
        f"{judged:,} texts is {math.sqrt(0.16 / judged):.4f}: smaller differences say little."
    )
    return [setting, reading]


# --- The command ----------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command.parser("finetune", __doc__)
    add = parser.add_argument
    told = "local Hugging Face folder of an encoder (default: the packaged all-MiniLM-L6-v2)"
    add("--model", help=told)
    told = f"TSV file id, rating, text; or one of {', '.join(data.CORPORA)} (default: movies)"
    add("--data", default="movies", help=told)
    told = "regex of the layers to adapt (default: %(default)s)"
    add("--targets", default=r"attention\.self\.(query|value)", help=told)
    told = "rank of AuroRA and the smaller LoRA; the larger has 4 times it (default: 2)"
    add("--rank", type=int, default=2, help=told)
    told = "one learning rate for all, in place of those chosen for the default task"
    add("--lr", type=float, help=told)
    told = "one run each; the table has mean and deviation (default: 0)"
    add("--seeds", type=int, nargs="+", default=[0], help=told)
    told = f"of {SIZE} texts (default: {STEPS}, or one pass over the training side if that is less)"
    add("--max-steps", type=int, help=told)
    told = "at most so many held-out texts to be judged by (default: %(default)s)"
    add("--judged", type=int, default=JUDGED, help=told)
    told = "only print development scores over learning rates, from the training side"
    add("--sweep", action="store_true", help=told)
    options = command.parse(parser, argv)
    for name in ("rank", "lr", "max_steps", "judged"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    return options


def main(argv: Sequence[str]) -> None:
    """Run the benchmark: print the table and its meaning, write them and the picture to `--out`."""
    options = parse(argv)
    use_all_cores()
    print("1 of 3: reading the model and the texts, some 10 seconds", file=sys.stderr)
    task = build_task(options.model, options.data, options.sweep, options.judged)
    field = contenders(options.targets, options.rank, options.lr)
    steps = options.max_steps or min(STEPS, math.ceil(len(task.learn.tokens) / SIZE))
    if options.sweep:
        print(sweep(task, field, SWEEP, steps))
        return
    results = run(task, field, options.seeds, steps)
    print("writing the table and the picture", file=sys.stderr)
    shown, told = table(results, field.lora.name), meaning(results, field)
    draw(options.out / "finetune.png", results)
    setting, reading = explain(options, task, steps)
    parts = [setting, shown, "\n".join(f"- {line}" for line in told), reading]
    path = write_report(options.out, "finetune", "Fine-tuning a sentence encoder", parts)
    print(f"{shown}\n\nwritten to {path}; {machine()}\n")
    print("\n".join(told))

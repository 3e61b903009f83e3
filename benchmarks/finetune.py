"""Fine-tuning a sentence encoder: what do AuroRA's fewer parameters cost in score, time and after the merge?

All-MiniLM-L6-v2 learns the class and the rating of movie-review snippets at once; query and value are adapted. For each
contender: trained parameters, held-out scores, the same after saving and loading into a fresh model, the same after the
static merge, seconds per step, and the size of the file. Works on your own model folder and texts: `--model`, `--data`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import aurora
from benchmarks.lab import baselines, data
from benchmarks.lab.models import load_encoder
from benchmarks.lab.needs import BenchmarkError
from benchmarks.lab.report import machine, markdown_table, picture, use_all_cores, write_report
from benchmarks.lab.task import Reader, Scores, Texts, evaluate, tokenize
from benchmarks.lab.timing import interleave, median_ratio
from benchmarks.lab.training import History, make_step, train

HEAD = r"^head\."
SWEEP = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune: `prepare` puts adapters into a fresh Reader and freezes all but them and the head.

    `merge` folds the adapters into plain layers, None if there are none. `save` and `load` work on what was trained;
    `load` gets a fresh Reader that `prepare` has not seen. `calibrate` merges with the help of batches, None if
    `merge` loses nothing.
    """

    name: str
    lr: float
    prepare: Callable[[nn.Module], object]
    merge: Callable[[nn.Module], object] | None
    save: Callable[[nn.Module, Path], object]
    load: Callable[[nn.Module, Path], object]
    calibrate: Callable[[nn.Module, list[dict[str, torch.Tensor]]], object] | None = None


def contenders(targets: str, rank: int, lr: float | None = None) -> list[Contender]:
    """Head only, LoRA of the rank and of four times the rank, AuroRA of the rank. `lr` replaces the chosen rates."""

    def plain(
        name: str, chosen: float, prepare: Callable[[nn.Module], object], adapts: bool = True
    ) -> Contender:
        def load(model: nn.Module, path: Path) -> None:
            prepare(model)
            baselines.load_trained(model, path)

        merge = baselines.merge_lora if adapts else None
        return Contender(name, lr or chosen, prepare, merge, baselines.save_trained, load)

    def lora(r: int) -> Callable[[nn.Module], object]:
        return functools.partial(baselines.inject_lora, target_regex=targets, rank=r, train=HEAD)

    return [
        plain("head only", 1e-2, lambda model: baselines.freeze(model, HEAD), adapts=False),
        plain(f"LoRA r={rank}", 5e-3, lora(rank)),
        plain(f"LoRA r={4 * rank}", 5e-3, lora(4 * rank)),
        Contender(
            f"AuroRA r={rank}",
            lr or 5e-3,
            functools.partial(aurora.inject, target_regex=targets, rank=rank, train=HEAD),
            aurora.merge,
            aurora.save,
            aurora.load,
            lambda model, batches: aurora.merge(model, "calibrated", batches),
        ),
    ]


@dataclass(frozen=True)
class Task:
    """A model folder and texts to learn and to be judged by."""

    model: str | None
    learn: Texts
    judge: Texts

    def reader(self, seed: int) -> Reader:
        """A fresh model from disk; the seed draws its head, and the adapters that are put in next."""
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
        return model


@dataclass(frozen=True)
class Result:
    """What one contender reached with one seed."""

    adapter: int
    head: int
    trained: Scores
    reloaded: Scores
    merged: Scores | None
    calibrated: Scores | None
    size: int
    history: History


def build_task(model: str | None, source: str, development: bool = False) -> Task:
    """Texts split by the hash of their ids. With `development`, both sides come from the training side."""
    _, tokenizer = load_encoder(model)
    learn, judge = data.split(data.load(source))
    if development:
        learn, judge = data.split(learn, share=0.1, salt="development")
    for name, side in (("training", learn), ("held-out", judge)):
        if not (any(s.rating > 0 for s in side) and any(s.rating < 0 for s in side)):
            raise BenchmarkError(
                f"{source}: the {name} side ({len(side)} texts) needs positive and negative ratings, for the sign is "
                "the class: give more texts, or subtract the middle of your scale from the ratings"
            )
    scale = statistics.pstdev(s.rating for s in learn)
    return Task(model, *(tokenize(tokenizer, side, scale=scale) for side in (learn, judge)))


def run(task: Task, contender: Contender, seed: int, steps: int) -> Result:
    """Train, judge, save, load into a fresh model and judge again, merge in either way and judge again."""
    model = task.prepared(contender, seed)
    adapter, head = count(model)
    glance = task.judge.sample(512)
    watch = functools.partial(evaluate, model, glance)
    label = f"{contender.name}, seed {seed}"
    history = train(
        model, task.learn, steps=steps, lr=contender.lr, seed=seed, watch=watch, label=label
    )
    trained = evaluate(model, task.judge)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        contender.save(model, path)
        size = path.stat().st_size
        model = task.reader(
            seed + 1
        )  # another seed: nothing that should come from the file comes by chance
        contender.load(model, path)
    reloaded, merged, calibrated = evaluate(model, task.judge), None, None
    if contender.calibrate is not None:
        plain = copy.deepcopy(model)
        contender.calibrate(plain, task.learn.inputs(256))
        calibrated = evaluate(plain, task.judge)
    if contender.merge is not None:
        contender.merge(model)
        merged = evaluate(model, task.judge)
    return Result(adapter, head, trained, reloaded, merged, calibrated, size, history)


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters of the adapters, of the head)."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(n for name, n in sizes.items() if re.search(HEAD, name))
    return sum(sizes.values()) - head, head


def time_steps(task: Task, field: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of training steps on one batch of typical length, contenders interleaved."""
    batches = task.learn.batches(32)
    batch, calls = batches[len(batches) // 2], {}
    for contender in field:
        model = task.prepared(contender, seed=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        step = make_step(model, trained, contender.lr, 10 * rounds)
        calls[contender.name] = functools.partial(step, batch)
    return interleave(calls, rounds)


def sweep(task: Task, field: Sequence[Contender], rates: Sequence[float], steps: int) -> str:
    """A table of development scores (accuracy + Pearson) by learning rate, one seed each."""
    rows = []
    for contender in field:
        scores = []
        for lr in rates:
            model = task.prepared(contender, seed=0)
            train(model, task.learn, steps=steps, lr=lr, label=f"{contender.name}, lr {lr:g}")
            scores.append(sum(evaluate(model, task.judge)))
        rows.append([contender.name, *(f"{score:.4f}" for score in scores)])
    return markdown_table(["accuracy + Pearson", *(f"{lr:g}" for lr in rates)], rows)


def spread(values: Sequence[float]) -> str:
    """The mean to four digits, and the standard deviation over seeds if there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def both(scores: Sequence[Scores | None]) -> str:
    """Accuracy / Pearson in one cell, a dash where there is nothing to judge."""
    known = [s for s in scores if s is not None]
    return " / ".join(spread([s[i] for s in known]) for i in (0, 1)) if known else "-"


def table(results: dict[str, list[Result]], seconds: dict[str, list[float]]) -> str:
    """One row a contender."""
    against = next(name for name in seconds if name.startswith("LoRA"))
    rows = [
        [
            name,
            f"{runs[0].adapter:,}",
            f"{runs[0].head:,}",
            spread([r.trained.accuracy for r in runs]),
            spread([r.trained.pearson for r in runs]),
            both([r.reloaded for r in runs]),
            both([r.merged for r in runs]),
            both([r.calibrated for r in runs]),
            f"{statistics.median(seconds[name]):.3f}",
            f"{median_ratio(seconds, name, against):.2f}",
            f"{runs[0].size / 1000:.1f} kB",
        ]
        for name, runs in results.items()
    ]
    header = [
        "contender",
        "adapter",
        "head",
        "accuracy",
        "Pearson",
        "after reloading",
        "static merge",
        "calibrated merge",
    ]
    return markdown_table([*header, "s/step", f"x {against}", "file"], rows)


def draw(path: Path, results: dict[str, list[Result]], window: int = 20) -> None:
    """Loss (mean of the last `window` steps) and accuracy on some held-out texts, one line a seed."""
    with picture(path, columns=2) as (left, right):
        for i, (name, runs) in enumerate(results.items()):
            for run_ in runs:
                losses = run_.history.losses
                smooth = [
                    statistics.fmean(losses[max(0, j - window) : j])
                    for j in range(1, len(losses) + 1)
                ]
                label = name if run_ is runs[0] else None
                left.plot(range(1, len(smooth) + 1), smooth, color=f"C{i}", label=label)
                right.plot(
                    *zip(*((step, s.accuracy) for step, s in run_.history.scores), strict=True),
                    f"C{i}o-",
                )
        left.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
        right.set(xlabel="step", ylabel="held-out accuracy (a sample of 512)")
        left.legend()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks finetune", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add(
        "--model",
        help="local Hugging Face folder of an encoder (default: the packaged all-MiniLM-L6-v2)",
    )
    add(
        "--data",
        default="movies",
        help=f"TSV file id, rating, text; or one of {', '.join(data.CORPORA)} (default: movies)",
    )
    add(
        "--targets",
        default=r"attention\.self\.(query|value)",
        help="regex of the layers to adapt (default: %(default)s)",
    )
    add(
        "--rank",
        type=int,
        default=2,
        help="rank of AuroRA and the smaller LoRA; the larger has 4 times it (default: 2)",
    )
    add(
        "--lr",
        type=float,
        help="one learning rate for all, in place of those chosen for the default task",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="one run each; the table has mean and deviation (default: 0)",
    )
    add(
        "--max-steps",
        type=int,
        help="steps of 32 texts (default: 200, or one pass over the training side if that is less)",
    )
    add(
        "--out",
        type=Path,
        default=Path("docs/results"),
        help="folder for finetune.md and .png (default: %(default)s)",
    )
    add(
        "--sweep",
        action="store_true",
        help="only print development scores over learning rates, from the training side",
    )
    options = parser.parse_args(argv)
    for name in ("rank", "lr", "max_steps"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    return options


def main(argv: Sequence[str]) -> None:
    """Run the benchmark: print the table, write it and the picture to `--out`."""
    options = parse(argv)
    use_all_cores()
    task = build_task(options.model, options.data, development=options.sweep)
    field = contenders(options.targets, options.rank, options.lr)
    steps = options.max_steps or min(200, math.ceil(len(task.learn.tokens) / 32))
    if options.sweep:
        print(sweep(task, field, SWEEP, steps))
        return
    seconds = time_steps(task, field, rounds=min(6, steps))
    results = {c.name: [run(task, c, seed, steps) for seed in options.seeds] for c in field}
    shown = table(results, seconds)
    draw(options.out / "finetune.png", results)
    path = write_report(
        options.out,
        "finetune",
        "Fine-tuning a sentence encoder",
        explain(options, task, steps, shown),
    )
    print(f"{shown}\n\nwritten to {path}; {machine()}")
    different = [
        name for name, runs in results.items() if any(r.trained != r.reloaded for r in runs)
    ]
    if different:
        raise RuntimeError(
            f"the score after reloading differs from the score after training: {', '.join(different)}"
        )


def explain(options: argparse.Namespace, task: Task, steps: int, shown: str) -> list[str]:
    """The report's text around the table."""
    name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
    learned, judged = len(task.learn.tokens), len(task.judge.tokens)
    setting = (
        f"{name}, `{options.targets}` adapted; {Path(options.data).name}: {learned:,} texts to learn from, {judged:,} "
        f"held out by a hash of their ids; {steps} steps of 32 texts, seeds {' '.join(map(str, options.seeds))}."
    )
    reading = (
        "Adapter and head: trainable parameters. Accuracy: sign of the rating. Pearson: predicted and true rating. "
        "After reloading: both for a fresh model with the saved file, equal to the digit or the command fails. "
        "Static merge: both once the adapter is folded into the weights, which for LoRA keeps the trained function and "
        "for AuroRA replaces it by another. Calibrated merge: both once the nearest affine map is folded in, by 256 "
        "training texts. s/step: median training step on one batch, contenders interleaved; beside "
        "it the median ratio to the smaller LoRA. File: adapter and head. One standard error of an accuracy near 0.8 "
        f"on {judged:,} texts is {math.sqrt(0.16 / judged):.4f}: smaller differences say little."
    )
    return [setting, shown, reading]

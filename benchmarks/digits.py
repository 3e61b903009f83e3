"""Images: a small vision transformer that knows the digits 0 to 4 learns 5 to 9.

scikit-learn's 1,797 real images of 8 x 8 points. The methods are rows of lab/settings.py; every run
is one line of JSON, and a run that has its line is not run again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lab import options as command
from benchmarks.lab import records
from benchmarks.lab.estimates import accuracy
from benchmarks.lab.methods import HEAD, HEAD_RATE, Place, Sample, groups, prepare
from benchmarks.lab.needs import need
from benchmarks.lab.records import Lines, Record
from benchmarks.lab.report import markdown_table, picture, write_report
from benchmarks.lab.settings import RECOMMENDED, SETTINGS
from benchmarks.lab.training import make_step

LORAS = ("LoRA r=2", "LoRA r=8")
METHODS = ("head only", "AuroRA r=2", RECOMMENDED, "AuroRA r=8 recommended", *LORAS, "full")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ATTENTION = Place(r"attention\.(self|attention)\.(query|value)$|attention\.[qv]_proj$", HEAD)
EXAMPLES, DEVELOPMENT, SIZE, SEEDS = 200, 200, 32, 10
Images = tuple[Tensor, Tensor]  # (N, 1, 8, 8) in [-1, 1]; (N,)


class Run(NamedTuple):
    """All that fixes a run. steps: of learning 5 to 9; before: of learning 0 to 4."""

    method: str
    lr: float
    seed: int
    steps: int = 150
    before: int = 400

    key = property(records.key)


class Classifier(nn.Module):
    """Four layers of width 64 over 16 patches, and a head."""

    def __init__(self) -> None:
        super().__init__()
        transformers = need("transformers")
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128}
        patches = {"image_size": 8, "patch_size": 2, "num_channels": 1}
        config = transformers.ViTConfig(num_attention_heads=4, **sizes, **patches)
        self.encoder = transformers.ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> logits (N, 5)."""
        return self.head(self.encoder(pixel_values=images).last_hidden_state[:, 0])  # type: ignore


@functools.cache
def halves() -> tuple[Images, Images]:
    """The digits 0 to 4, and 5 to 9 called 0 to 4; each in an order that is always the same."""
    found = need("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    digits = torch.from_numpy(found.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, digits = images[order], digits[order]
    low = digits < 5
    return (images[low], digits[low]), (images[~low], digits[~low] - 5)


def objective(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch of images."""
    images, digits = batch
    return F.cross_entropy(model(images), digits)


def learn(model: nn.Module, rates: Any, lr: float, steps: int, seed: int, data: Images) -> None:
    """Train whatever the groups hold."""
    step, draw = make_step(model, rates, lr, steps, objective), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (SIZE,), generator=draw)
        step((data[0][chosen], data[1][chosen]))


@functools.cache
def pretrained(seed: int, steps: int) -> Classifier:
    """A model that has learnt the digits 0 to 4."""
    torch.manual_seed(seed)
    model = Classifier().eval()
    learn(model, list(model.parameters()), 1e-3, steps, seed, halves()[0])
    return model


def perform(run: Run) -> Record:
    """Learn 5 to 9 under a new head; judge on images for the choice of a rate, and on others."""
    images, digits = halves()[1]
    cuts = (EXAMPLES, DEVELOPMENT, len(digits) - EXAMPLES - DEVELOPMENT)
    shown, development, held = zip(images.split(cuts), digits.split(cuts), strict=True)
    model, setting = copy.deepcopy(pretrained(run.seed, run.before)), SETTINGS[run.method]
    torch.manual_seed(run.seed)
    model.head.reset_parameters()
    prepare(model, setting, ATTENTION._replace(seed=run.seed), Sample([], [], objective))
    learn(model, groups(model, setting, run.lr), run.lr, run.steps, run.seed, shown)
    trains = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    with torch.no_grad():
        loss = objective(model, development).item()
        hits = model(held[0]).argmax(1) == held[1]
    told = "".join("01"[int(hit)] for hit in hits)
    return {"run": run.key, **run._asdict(), "adapter": trains, "loss": loss, "hits": told}


def judged(lines: Lines) -> dict[str, dict[tuple[str, int], Record]]:
    """Of every method, the runs at the rate with the least mean loss on development, by seed."""
    found = {}
    for method in METHODS:
        own = [line for line in lines.values() if line["method"] == method]
        rates: dict[float, list[Record]] = {}
        for line in own:
            rates.setdefault(line["lr"], []).append(line)
        if rates:
            best = min(rates, key=lambda r: statistics.fmean(line["loss"] for line in rates[r]))
            found[method] = {("digits", line["seed"]): line for line in rates[best]}
    return found


READING = (
    f"A vision transformer of 4 layers learns the digits 0 to 4, then, under a new head, 5 to 9 "
    f"from {EXAMPLES} images in 150 steps of {SIZE}; query and value adapted, alpha = 2 rank, the "
    f"head's rate {HEAD_RATE:g}. Each method's rate is chosen on {DEVELOPMENT} other images, from "
    f"{', '.join(f'{r:g}' for r in RATES)} (*: at an end of these). Accuracy in percent on the "
    f"remaining images, the same for all; the error counts images, paired in differences, and "
    f"{SEEDS} seeds, of which each has its own pretraining, A and batches."
)


def table(found: Mapping[str, dict[tuple[str, int], Record]]) -> str:
    """One row a method."""
    rows = []
    for method, runs in found.items():
        one = next(iter(runs.values()))
        gaps = [accuracy(runs, found[lora]).signed if lora in found else "" for lora in LORAS]
        gaps = ["" if method == lora else gap for lora, gap in zip(LORAS, gaps, strict=True)]
        rate = f"{one['lr']:g}{'*' if one['lr'] in (RATES[0], RATES[-1]) else ''}"
        rows.append([method, f"{one['adapter']:,}", rate, accuracy(runs), *gaps])
    header = ["method", "parameters", "rate", "accuracy", *(f"against {lora}" for lora in LORAS)]
    return markdown_table(header, rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command.parser("digits", __doc__, "two methods, one rate, few steps")
    command.add_runs(parser)
    return command.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    """Run what has no line yet, then print and write the report."""
    options = parse(argv)
    every = [Run(m, lr, seed) for seed, m, lr in product(range(SEEDS), METHODS, RATES)]
    if options.quick:
        every = [Run(m, 1e-2, seed, 5, 5) for m, seed in product(METHODS[1:3], range(2))]

    def pending(lines: Lines) -> Iterator[Run]:
        return (run for run in every if run.key not in lines)

    lines = records.gather(options.out / "digits.jsonl", options, pending, perform)
    found, where = judged(lines), records.machines(lines.values())
    with picture(Path(options.out) / "digits.png") as (axes,):
        for method, runs in found.items():
            mean, error = accuracy(runs)
            trains = max(1, next(iter(runs.values()))["adapter"])
            axes.errorbar(trains, 100 * mean, 100 * error, fmt="o", label=method)
        axes.set(xscale="log", xlabel="trained parameters beside the head", ylabel="accuracy, %")
        axes.legend(fontsize=8)
    parts = [table(found), READING]
    written = write_report(options.out, "digits", "From digits to digits", parts, measured_on=where)
    print(f"{written.read_text(encoding='utf-8')}\nwritten to {written}")

"""One run: a method learns a change from so many examples, several draws of them side by side."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.curves.chain import Task
from benchmarks.curves.contenders import CONTENDERS, PLACES, Choice, Situation
from benchmarks.curves.stack import Pace, Stack
from benchmarks.curves.tasks import find
from benchmarks.lab import records
from benchmarks.lab.records import Record

STEPS, HELD = 1200, 5  # of Adam; every fifth example is held out to choose


class Run(NamedTuple):
    """All that fixes a run.

    Args:
        task: "swap", "ratings" or "tones".
        world: what changed, a word of the task.
        method: a name of CONTENDERS.
        place: a word of PLACES.
        examples: to learn from, a fifth of them to choose by.
        draws: of the examples.
        steps: of training.
    """

    task: str
    world: str
    method: str
    place: str
    examples: int
    draws: int = 5
    steps: int = STEPS

    key = property(records.key)


def perform(run: Run) -> Record:
    """Choose by a held-out fifth, go on from that choice with all examples, and judge.

    The record has the test error of every draw, what each chose, and the number trained.
    """
    begin, task = time.perf_counter(), find(run.task, run.world)
    method = CONTENDERS[run.method]
    choices = (run.task == "ratings" and method.noisy) or method.choices
    x, y = draw(task, run.examples, run.draws)  # (draws, n, d)
    held = max(1, run.examples // HELD)
    every = list(choices) * run.draws
    owner = torch.arange(run.draws).repeat_interleave(len(choices))
    stack = prepare(run, task, x[owner, held:], y[owner, held:], every)
    stack.train(x[owner, held:], y[owner, held:], pace(run, every))
    scores = stack.errors(x[owner, :held], y[owner, :held]).view(run.draws, -1)
    best = scores.argmin(1).tolist()
    # A model that starts afresh may end elsewhere; one that goes on stays where it was judged.
    stack.pick([len(choices) * i + best[i] for i in range(run.draws)])
    chosen = [choices[i] for i in best]
    stack.train(x, y, pace(run, chosen))
    return {
        "run": run.key,
        **run._asdict(),
        "errors": stack.errors(*task.test).tolist(),
        "held_out": scores.min(1).values.tolist(),
        "chosen": [list(choice) for choice in chosen],
        "trained": sum(p[0].numel() for p in stack.trained.values()),
        "before": before(task),
        "seconds": time.perf_counter() - begin,
    }


@torch.no_grad()
def before(task: Task) -> float:
    """The error without adapting."""
    return float((task.base(task.test[0]) - task.test[1]).square().mean())


def draw(task: Task, count: int, draws: int) -> tuple[Tensor, Tensor]:
    """Examples (draws, count, d) from the pool; a smaller draw is the beginning of a larger one."""
    x, y = task.pool
    rows = [
        torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
        for seed in range(draws)
    ]
    return torch.stack([x[r] for r in rows]), torch.stack([y[r] for r in rows])


def prepare(run: Run, task: Task, x: Tensor, y: Tensor, choices: Sequence[Choice]) -> Stack:
    """A model for every choice, which may look at its examples x (K, n, d_in), y (K, n, d_out)."""
    method, models = CONTENDERS[run.method], []
    for one_x, one_y, choice in zip(x, y, choices, strict=True):
        torch.manual_seed(len(models))
        model = copy.deepcopy(task.base)
        at = Situation(model, PLACES[run.place], one_x, one_y, task.read, task.write, choice)
        models.append(method.objective(method.prepare(at)))
    return Stack(models)


def pace(run: Run, choices: Sequence[Choice]) -> Pace:
    """How models of these choices train."""
    weights = torch.tensor([[choice.rough, choice.size] for choice in choices])
    rates, decay = (torch.tensor([choice[i] for choice in choices]) for i in (0, 1))
    size = 32 if run.examples <= 512 else 64
    return Pace(run.steps, size, rates, decay, weights, CONTENDERS[run.method].factors)

"""Training: the same steps for every contender, whatever of its model requires a gradient."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lab.needs import progress
from benchmarks.lab.task import Batch, Texts, loss

Objective = Callable[[nn.Module, Any], Tensor]


def rating_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a Reader on a batch of rated texts."""
    return loss(model(batch.input_ids, batch.attention_mask), batch.ratings)


def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats of each row, (N, L) -> (N,)."""
    logits = model(input_ids=ids).logits[:, :-1]  # (N, L - 1, vocabulary)
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats, (N, L) -> ()."""
    return next_token_losses(model, ids).mean()


def make_step(
    model: nn.Module,
    groups: Sequence[Any],
    lr: float,
    steps: int,
    objective: Objective = rating_loss,
) -> Callable[[Any], float]:
    """A function that trains on one batch with AdamW and returns its loss.

    The rate warms up over 6% of the steps, then goes down to 0 in a straight line.

    Args:
        model: what is trained.
        groups: parameters, or an optimizer's parameter groups.
        lr: the rate of a group that has none.
        steps: how many calls the schedule expects.
        objective: the loss of the model on a batch.
    """
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    warm = max(1, round(0.06 * steps))

    def pace(i: int) -> float:
        return min((i + 1) / warm, max(steps - i, 0) / (steps - warm + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)

    def step(batch: Any) -> float:
        value = objective(model, batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return value.item()

    return step


def train(
    model: nn.Module,
    texts: Texts,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    size: int = 32,
    groups: Sequence[Any] | None = None,
    label: str = "",
) -> list[float]:
    """Train whatever requires a gradient, as `make_step` does.

    The model stays in eval mode: without dropout contenders differ in their adapters only, and a
    step costs less.

    Args:
        model: a Reader.
        texts: what it learns from.
        steps: of training.
        lr: the rate of a group that has none.
        seed: draws the texts of each step.
        size: texts a step.
        groups: the optimizer's parameter groups, if not all train at the rate `lr`.
        label: of the progress bar, which only shows with one.

    Returns:
        The loss of every step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    step = make_step(model.eval(), trained if groups is None else groups, lr, steps)
    losses: list[float] = []
    bar = progress(range(steps), label, unit="step")
    for _, batch in zip(bar, endless(texts, size, seed), strict=False):
        losses.append(step(batch))
        bar.set_postfix(loss=f"{statistics.fmean(losses[-20:]):.3f}", refresh=False)
    return losses


def endless(texts: Texts, size: int, seed: int) -> Iterator[Batch]:
    """Batches of `size` texts for ever, every pass over all of them in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from reversed(texts.batches(size, generator))


def train_language(
    model: nn.Module,
    ids: Tensor,
    groups: Sequence[Any],
    *,
    steps: int,
    lr: float,
    seed: int,
    size: int = 8,
    label: str = "",
) -> float:
    """Learn to continue the rows of `ids` (N, L), `size` drawn rows a step. Returns seconds."""
    step = make_step(model, groups, lr, steps, next_token_loss)
    order, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in progress(range(steps), label, unit="step"):
        step(ids[torch.randint(len(ids), (size,), generator=order)])
    return time.perf_counter() - start

"""A head that rates texts of one corpus, and another corpus whose raters use the scale otherwise.

All-MiniLM-L6-v2 reads the texts of the vaderSentiment archive (people's mean ratings, -4 to 4); a
linear head has learned the ratings of one corpus by ridge regression, and then rates another.
Nothing is imposed. The encoder stays as it is: what is read are its mean token states.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.curves.chain import Task, identity
from benchmarks.curves.kept import kept
from benchmarks.lab import data, models
from benchmarks.lab.task import Texts, tokenize

COUNTS = {"tweets": 1300, "movies": 1500, "products": 1300}  # about so many texts
LONGEST, RIDGE = 32, 30.0  # tokens of a text; penalty of the head


def task(world: str) -> Task:
    """world: "A to B", corpora whose names are in COUNTS."""
    return kept(f"ratings {world}", lambda: _task(world))


def _task(world: str) -> Task:
    (x, y), (x_new, y_new) = (states(name) for name in world.split(" to "))
    head = ridge(x, y)
    base = nn.Sequential(OrderedDict({"last": head, "back": identity(1)}))
    order = torch.randperm(len(x_new), generator=torch.Generator().manual_seed(1))
    pool, test = order[: len(x_new) // 2], order[len(x_new) // 2 :]
    size = base(x_new[pool]).std().detach().view(1, 1)
    sides = [(x_new[rows], y_new[rows].unsqueeze(1)) for rows in (pool, test)]
    return Task(base, sides[0], sides[1], 1 / size, size)


def ridge(x: Tensor, y: Tensor) -> nn.Linear:
    """The head (d -> 1) that brings x (n, d) nearest to y (n,)."""
    centre, level = x.mean(0), y.mean()
    gram = (x - centre).t() @ (x - centre) + RIDGE * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, (x - centre).t() @ (y - level))
    head = nn.Linear(len(weight), 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        assert head.bias is not None
        head.bias.copy_(level - centre @ weight)
    return head


def states(corpus: str) -> tuple[Tensor, Tensor]:
    """(mean token states (n, 384), ratings (n,)) of a corpus."""
    found: tuple[Tensor, Tensor] = kept(f"states {corpus}", lambda: _states(corpus))
    return found


def _states(corpus: str) -> tuple[Tensor, Tensor]:
    encoder, tokenizer = models.encoder()
    snippets = data.load(corpus)
    some = data.split(snippets, COUNTS[corpus] / len(snippets), salt="curves")[1]
    texts = tokenize(tokenizer, some, LONGEST)
    return read(encoder, texts), texts.ratings


@torch.inference_mode()
def read(encoder: Any, texts: Texts, size: int = 64) -> Tensor:
    """The mean of the encoder's token states, text by text (n, d)."""
    order = sorted(range(len(texts.tokens)), key=lambda row: len(texts.tokens[row]))
    found = torch.zeros(len(order), encoder.config.hidden_size)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = texts.batch(rows)
        out = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        mask = batch.attention_mask.unsqueeze(-1).float()  # (N, L, 1)
        found[rows] = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    return found

"""The task: read a rated text and say its class (the rating's sign) and the rating, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lab.needs import BenchmarkError


class Reader(nn.Module):
    """An encoder, the mean of its token states, and a linear head: class logit and rating."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)  # type: ignore

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (N, L), int64 -> (N, 2)."""
        read = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states = read.last_hidden_state  # (N, L, d)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)  # (N, L, 1)
        outputs: Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return outputs


class Batch(NamedTuple):
    """input_ids, attention_mask (N, L), int64; ratings (N,), float32."""

    input_ids: Tensor
    attention_mask: Tensor
    ratings: Tensor


@dataclass(frozen=True)
class Texts:
    """Tokenised texts and their ratings."""

    tokens: list[list[int]]
    ratings: Tensor
    pad: int

    def batch(self, rows: Sequence[int]) -> Batch:
        """The texts of these rows, padded to the longest of them."""
        tokens = [torch.tensor(self.tokens[i]) for i in rows]
        mask = [torch.ones_like(t) for t in tokens]
        pad = nn.utils.rnn.pad_sequence
        padded = pad(tokens, batch_first=True, padding_value=self.pad)
        return Batch(padded, pad(mask, batch_first=True), self.ratings[list(rows)])

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Batch]:
        """All texts once, like lengths together to save padding; with a generator, shuffled."""

        def shuffled(count: int) -> list[int]:
            if generator is None:
                return list(range(count))
            return torch.randperm(count, generator=generator).tolist()

        order = shuffled(len(self.tokens))
        order.sort(key=lambda i: len(self.tokens[i]))  # stable: equal lengths stay shuffled
        slices = [order[i : i + size] for i in range(0, len(order), size)]
        return [self.batch(slices[i]) for i in shuffled(len(slices))]

    def inputs(self, count: int, size: int = 32) -> list[dict[str, Tensor]]:
        """A sample without its ratings, as batches of keyword arguments of a Reader."""
        batches = self.sample(count).batches(size)
        return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]

    def sample(self, count: int) -> Texts:
        """At most `count` texts at equal distances, as the classes may come one after the other."""
        total = len(self.tokens)
        rows = torch.linspace(0, total - 1, min(count, total)).long().tolist()
        return Texts([self.tokens[i] for i in rows], self.ratings[rows], self.pad)


def tokenize(
    tokenizer: Any, snippets: Sequence[Any], max_tokens: int = 48, scale: float = 1.0
) -> Texts:
    """Snippets as Texts, cut to `max_tokens`, ratings divided by `scale`."""
    if not snippets:
        raise BenchmarkError("a side of the split has no texts: give more data")
    read = tokenizer([s.text for s in snippets], truncation=True, max_length=max_tokens)
    ratings = torch.tensor([s.rating for s in snippets]) / scale
    return Texts(read["input_ids"], ratings, tokenizer.pad_token_id or 0)


def chunks(tokenizer: Any, snippets: Sequence[Any], count: int, length: int) -> Tensor:
    """The texts one after the other, cut into at most `count` sequences: (count, length), int64."""
    ids: list[int] = []
    for snippet in snippets:
        ids += [*tokenizer(snippet.text)["input_ids"], tokenizer.eos_token_id]
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def loss(outputs: Tensor, ratings: Tensor) -> Tensor:
    """Cross-entropy of the class plus squared error of the rating: (N, 2), (N,) -> ().

    A rating of 0 has no class.
    """
    truth, known = (ratings > 0).to(outputs.dtype), ratings.ne(0).float()
    classes = F.binary_cross_entropy_with_logits(outputs[:, 0], truth, known)
    return classes + F.mse_loss(outputs[:, 1], ratings)


class Scores(NamedTuple):
    """Accuracy on texts with a class; Pearson's correlation of predicted and true rating."""

    accuracy: float
    pearson: float


@torch.inference_mode()
def predict(
    model: nn.Module, texts: Texts, size: int = 64, tick: Callable[[], object] | None = None
) -> tuple[Tensor, Tensor]:
    """(outputs (N, 2), ratings (N,)) of all texts, float64, in a fixed order.

    Equal models get equal digits. tick: called after every batch.
    """
    outputs, ratings = [], []
    for batch in texts.batches(size):
        outputs.append(model(batch.input_ids, batch.attention_mask))
        ratings.append(batch.ratings)
        if tick is not None:
            tick()
    return torch.cat(outputs).double(), torch.cat(ratings).double()


def evaluate(model: nn.Module, texts: Texts, size: int = 64) -> Scores:
    """Scores of the model on all texts."""
    return score(*predict(model, texts, size))


def recognised(outputs: Tensor, ratings: Tensor) -> Tensor:
    """Whether the class was recognised, of the texts that have one: (N, 2), (N,) -> (M,), bool."""
    return ((outputs[:, 0] > 0) == (ratings > 0))[ratings != 0]


def score(outputs: Tensor, ratings: Tensor) -> Scores:
    """Scores of outputs (N, 2) against ratings (N,)."""
    both = torch.corrcoef(torch.stack([outputs[:, 1], ratings]))
    return Scores(recognised(outputs, ratings).double().mean().item(), both[0, 1].item())

"""The four corpora as learnt at once, and the folds that judge.

Which text is in which fold, and what is left out where there are too many, is decided by a hash of
its id. Rates and settings are chosen on the development fold; the held-out folds judge.
"""

from __future__ import annotations

import functools
import statistics

from benchmarks.lab import data, models, task

SIZE = 16  # texts a step
STEPS, TEXTS, HELD = (
    150,
    1000,
    1000,
)  # of a run that counts: steps, at most so many texts of a corpus


@functools.cache
def sides(side: str, texts: int, held: int) -> tuple[task.Texts, dict[str, task.Texts]]:
    """(to learn from, the four corpora mixed; to be judged by, by corpus).

    Ratings are divided by their deviation in the corpus.

    Args:
        side: "held-out", or anything else for the development fold.
        texts: at most about so many of a corpus to learn from.
        held: at most about so many of a corpus to be judged by.
    """
    learn, judged = [], {}
    for name in data.CORPORA:
        rest, held_out = data.split(data.load(name))
        rest, development = data.split(rest, salt="development")
        scale = statistics.pstdev(s.rating for s in rest)
        judges = held_out if side == "held-out" else development
        learn += _part(rest, texts, scale)
        judged[name] = task.tokenize(models.encoder()[1], _part(judges, held, scale))
    return task.tokenize(models.encoder()[1], learn), judged


def _part(pool: list[data.Snippet], count: int, scale: float) -> list[data.Snippet]:
    part = data.split(pool, min(1.0, count / len(pool)), salt="size")[1]
    return [s._replace(rating=s.rating / scale) for s in part]

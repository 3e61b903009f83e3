"""Which runs there are, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.curves.runs import Run

Who = tuple[str, str]  # method, place

SWAP: tuple[Who, ...] = (
    ("AuroRA r=4", "front"),
    ("AuroRA r=2", "front"),
    ("full", "all"),
    ("warp, every input", "front"),
    ("warp, told", "front"),
    ("LoRA r=8", "front"),
    ("ReLU 7", "front"),
    ("biases", "all"),
    ("AuroRA r=4", "first"),
    ("LoRA r=5", "first"),
    ("ReLU 5", "first"),
)
OTHER_PLACES: tuple[Who, ...] = (
    ("AuroRA r=4", "last"),
    ("LoRA r=5", "last"),
    ("AuroRA r=4", "all"),
    ("LoRA r=5", "all"),
)
SWIMMER = (*SWAP[:5], ("LoRA r=7", "front"), ("ReLU 6", "front"), SWAP[7])
WIDER = (*SWAP[:5], ("LoRA r=5", "front"), ("ReLU 5", "front"), SWAP[7])
TONES: tuple[Who, ...] = (
    ("AuroRA r=2", "back"),
    ("full", "all"),
    ("warp, every input", "back"),
    ("warp, told", "back"),
    ("LoRA r=3", "back"),
    ("LoRA r=3, biases too", "back"),
    ("ReLU 5", "back"),
    ("biases", "all"),
    ("AuroRA r=1", "back"),
)


# Near each other, where more draws are needed.
CLOSE = ("AuroRA r=4", "AuroRA r=2", "warp, every input", "warp, told")
PARTS = (
    "AuroRA r=4, one start",
    "AuroRA r=4, no penalty",
    "AuroRA r=4, roughness only",
    "AuroRA r=4, size only",
    "AuroRA r=4, drawn",
    "AuroRA r=4, with F",
    "AuroRA r=2, the paper's",
)
RATINGS: tuple[Who, ...] = (
    ("AuroRA r=1", "back"),
    ("AuroRA r=1", "last"),
    ("full", "all"),
    ("biases", "all"),
    ("LoRA r=1, biases too", "back"),
    ("warp, told", "back"),
    ("ReLU 5", "back"),
)


def plan(quick: bool = False, more: bool = False) -> Iterator[Run]:
    """All runs, or a few short ones; more: other numbers of examples, places and sensors too."""
    if quick:
        for method, place in (SWAP[0], SWAP[3], SWAP[5]):
            yield Run("swap", "motors", method, place, 256, draws=2, steps=300)
        return
    for examples in (256, 1024, 64):
        yield from motors(SWAP[:8], examples)
        worlds = {"differential": SWAP[:8], "swimmer": SWIMMER, "pusher": WIDER, "cheetah": WIDER}
        for world, rows in worlds.items():
            for method, place in rows:
                yield Run("swap", world, method, place, examples)
        for method, place in TONES:
            yield Run("tones", "coffee", method, place, examples)
    yield from motors(SWAP[8:], 256)
    for method in PARTS:
        yield Run("swap", "differential", method, "front", 256)
    for examples in (16, 64, 256):
        for world in ("products to movies", "movies to tweets"):
            for method, place in RATINGS:
                yield Run("ratings", world, method, place, examples, draws=10)
    if more:
        for examples in (32, 4096):
            yield from motors(SWAP[:6], examples)
        yield from motors(OTHER_PLACES, 256)
        for examples in (256, 1024):
            for method, place in SWAP[:8]:
                yield Run("swap", "sensors", method, place, examples)


def motors(rows: Iterable[Who], examples: int) -> Iterator[Run]:
    """Of the worn motors, where some methods are close."""
    many = 20 if examples in (256, 1024) else 10
    for method, place in rows:
        draws = many if method in CLOSE and place == "front" else 5
        yield Run("swap", "motors", method, place, examples, draws=draws)

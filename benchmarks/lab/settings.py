"""Every setting that `learning` compares, as a row of a table: what to train, from where, how fast.

A row is plain values; `methods` knows what its words do. To add a setting, add a row to TRIED (only
compared on the development fold) or to JUDGED (also on held-out texts). Lines of runs are found by
the row's name, so a row that has lines keeps its name, and a name its meaning.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a row may take part in beside its own choice of a rate.
FINALIST = "finalist"  # a setting that is only tried, but also at full length
PAIRED = "paired"  # compared at LoRA's best rate, from the same A
AGAINST = "against"  # what others are compared with
INSIDE = "inside"  # where its hidden values go is measured
LANGUAGE = "language"  # learnt by the language model too
QUICK = "quick"  # what --quick runs
LONG = "long"  # what --long trains longer
ABLATED = "ablated"  # the start from the gradient, with one thing changed

RECOMMENDED = "AuroRA r=2 recommended"  # the guide's, as it was when its lines were written
BIASED = f"{RECOMMENDED}, biases too"


@dataclass(frozen=True)
class Setting:
    """One way to fine-tune.

    Attributes:
        name: of its lines and of its rows in tables; no meaning is read out of it.
        kind: a key of `methods.KINDS`, such as "lora" or "aurora".
        rank: of the adapters, 0 if there are none.
        options: of the kind, such as fields of AuroraConfig; alpha is 2 * rank unless given.
        starts: keys of `methods.STARTS`, done in this order once the adapters are in.
        rates: regex of parameter names -> factor on the learning rate; the first match counts.
        biases: whether the adapted layers' own biases train too.
        train: regex of the parameters that train beside adapters, None for the place's own.
        length: how many times the plan's steps it trains.
        seeds: runs on the held-out folds, 0 for a setting that is only tried on development.
        sweep: places in the grid of rates that its runs of full length start from; where it is
            empty, short runs find them. For starts that spend a part of the budget short runs
            would say little.
        rate_of: the setting whose rate it takes, instead of one of its own; with a sweep, only in
            long runs and in those of the language model.
        parts: what else it takes part in, of the words above.
    """

    name: str
    kind: str
    rank: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    biases: bool = False
    train: str | None = None
    length: int = 1
    seeds: int = 3
    sweep: tuple[int, ...] = ()
    rate_of: str = ""
    parts: tuple[str, ...] = ()


CHANNEL = {"spline": "per-channel"}
GRID_2 = {"spline": "per-channel", "grid_range": (-2.0, 2.0)}
GRID_4 = {"spline": "per-channel", "grid_range": (-4.0, 4.0)}
IDENTITY, LINEAR = ("identity",), ("linear beyond the grid",)
FROM_DATA = ("grid from data",)
ANL = r"\.anl\."  # H and the spline weights
B, W = r"\.B$", r"\.spline_weight$"
FAST = {ANL: 10.0}
LOOK = ("head warmed", "gradient")  # both are paid for with steps of the budget
AT_ONCE = (*IDENTITY, "gradient")
FIXED = GRID_4 | {"projections": "fixed", "init": "zero", "activation": "identity"}
LINEAR_CORE = FIXED | {"learnable": False}
SWEEP = (-10, -9, -8)  # where that of LoRA r=2 ended
LORA_PARTS = (PAIRED, AGAINST, LANGUAGE, QUICK, LONG)
AURORA_PARTS = (PAIRED, INSIDE, LANGUAGE, QUICK)

# name, kind, rank, options, starts, rates
JUDGED = (
    Setting("head only", "plain", train=r"^head\.", parts=(QUICK,)),
    Setting("full", "plain", train=""),
    Setting("LoRA r=1", "lora", 1),
    Setting("LoRA r=2", "lora", 2, seeds=5, parts=LORA_PARTS),
    Setting("LoRA r=4", "lora", 4),
    Setting("LoRA r=8", "lora", 8, seeds=5, parts=(AGAINST, LANGUAGE, QUICK, LONG)),
    Setting("LoRA r=16", "lora", 16),
    Setting("MoSLoRA r=2", "lora", 2, {"mixer": True}),
    Setting("PEFT LoRA r=2", "peft", 2),
    Setting("AuroRA r=1", "aurora", 1),
    Setting("AuroRA r=1 per-channel", "aurora", 1, CHANNEL),
    Setting("AuroRA r=2", "aurora", 2, seeds=5, parts=AURORA_PARTS),
    Setting("AuroRA r=2 per-channel", "aurora", 2, CHANNEL, parts=(PAIRED, INSIDE)),
    Setting("AuroRA r=4", "aurora", 4),
    Setting("AuroRA r=4 per-channel", "aurora", 4, CHANNEL),
    Setting("AuroRA r=8", "aurora", 8),
    Setting("AuroRA r=8 per-channel", "aurora", 8, CHANNEL),
    Setting(
        RECOMMENDED,
        "aurora",
        2,
        GRID_4,
        IDENTITY,
        FAST,
        seeds=5,
        parts=(*AURORA_PARTS, LONG, ABLATED),
    ),
    Setting("AuroRA r=8 recommended", "aurora", 8, GRID_4, IDENTITY, FAST, parts=(LANGUAGE,)),
    Setting(BIASED, "aurora", 2, GRID_4, IDENTITY, FAST, biases=True, seeds=5, parts=(PAIRED,)),
    Setting("LoRA r=2, biases too", "lora", 2, biases=True, seeds=5, parts=(PAIRED, AGAINST)),
    Setting("AuroRA r=2 static", "aurora", 2, {"mode": "static"}),
    Setting("AuroRA r=2 without F", "aurora", 2, {"fixed": False}),
    Setting("AuroRA r=2 without L", "aurora", 2, {"learnable": False}),
    Setting("AuroRA r=2 LeakyReLU", "aurora", 2, {"activation": "leaky_relu"}),
    Setting("AuroRA r=2 sigmoid", "aurora", 2, {"activation": "sigmoid"}),
    Setting(
        "LoRA r=2, gradient",
        "lora",
        2,
        {},
        LOOK,
        seeds=5,
        sweep=SWEEP,
        rate_of="LoRA r=2",
        parts=(LONG, LANGUAGE, ABLATED),
    ),
    Setting("EVA r=2", "peft", 2, {}, ("eva",), seeds=5, sweep=SWEEP),
    Setting("LoRA-GA r=2", "peft", 2, {}, ("head warmed", "lora-ga"), seeds=5, sweep=SWEEP),
    Setting("LoRA r=8, gradient", "lora", 8, {}, LOOK, seeds=5, sweep=(-12, -11, -10)),
    Setting(
        "AuroRA r=2, gradient",
        "aurora",
        2,
        GRID_4,
        IDENTITY + LOOK,
        FAST,
        seeds=5,
        sweep=SWEEP,
        rate_of=RECOMMENDED,
        parts=(LONG, LANGUAGE, ABLATED),
    ),
    Setting(
        "AuroRA r=32 fixed",
        "aurora",
        32,
        FIXED,
        LOOK,
        seeds=5,
        sweep=(-11, -10, -9),
        parts=(LONG, LANGUAGE, ABLATED),
    ),
    Setting(
        "AuroRA r=32 fixed, ridge 1",
        "aurora",
        32,
        FIXED,
        ("head warmed", "gradient, ridge 1"),
        seeds=5,
        rate_of="AuroRA r=32 fixed",
    ),
    # The head learns while the gradient is looked at, and not before.
    Setting(
        "AuroRA r=2, gradient at once",
        "aurora",
        2,
        GRID_4,
        AT_ONCE,
        FAST,
        seeds=5,
        rate_of="AuroRA r=2, gradient",
    ),
    Setting(
        "LoRA r=2, gradient at once",
        "lora",
        2,
        {},
        ("gradient",),
        seeds=5,
        rate_of="LoRA r=2, gradient",
    ),
    Setting(
        "LoRA r=8, gradient at once",
        "lora",
        8,
        {},
        ("gradient",),
        seeds=5,
        rate_of="LoRA r=8, gradient",
    ),
    # The paper's claim III, that more rank brings little: the ranks that are not above.
    Setting("AuroRA r=1 recommended", "aurora", 1, GRID_4, IDENTITY, FAST, sweep=SWEEP),
    Setting("AuroRA r=4 recommended", "aurora", 4, GRID_4, IDENTITY, FAST, sweep=(-12, -11, -10)),
    Setting("AuroRA r=16 recommended", "aurora", 16, GRID_4, IDENTITY, FAST, sweep=(-13, -12, -11)),
    Setting("AuroRA r=8 fixed", "aurora", 8, FIXED, LOOK, sweep=(-10, -9, -8)),
    Setting("AuroRA r=16 fixed", "aurora", 16, FIXED, LOOK, sweep=(-10, -9, -8)),
    Setting("AuroRA r=64 fixed", "aurora", 64, FIXED, LOOK, sweep=(-12, -11, -10)),
)

tried = functools.partial(Setting, seeds=0)


def ablated(
    change: str,
    options: Mapping[str, Any] = GRID_4,
    starts: tuple[str, ...] = IDENTITY + LOOK,
    biases: bool = False,
) -> Setting:
    """The recommended setting from the gradient with one thing changed, at its rate."""
    how = {"biases": biases, "rate_of": "AuroRA r=2, gradient", "parts": (ABLATED,)}
    return tried(f"gradient, {change}", "aurora", 2, options, starts, FAST, **how)


def fixed(
    change: str, options: Mapping[str, Any] = FIXED, starts: tuple[str, ...] = LOOK
) -> Setting:
    """Fixed projections of rank 32 with one thing changed, at their rate."""
    name, how = f"fixed r=32, {change}", {"rate_of": "AuroRA r=32 fixed", "parts": (ABLATED,)}
    return tried(name, "aurora", 32, options, starts, **how)


TRIED = (
    tried("try identity", "aurora", 2, CHANNEL, IDENTITY, parts=(PAIRED,)),
    tried("try identity, grid +-2", "aurora", 2, GRID_2, IDENTITY),
    tried("try identity, grid +-4", "aurora", 2, GRID_4, IDENTITY),
    tried("try identity, grid from data", "aurora", 2, CHANNEL, FROM_DATA + IDENTITY),
    tried("try identity, z normalised", "aurora", 2, CHANNEL, ("z normalised", *IDENTITY)),
    tried("try identity, w and H x 0.1", "aurora", 2, CHANNEL, IDENTITY, {ANL: 0.1}),
    tried(
        "try per-channel, w and H x 10", "aurora", 2, CHANNEL, (), FAST, parts=(INSIDE, FINALIST)
    ),
    tried("try identity, B x 8", "aurora", 2, CHANNEL, IDENTITY, {B: 8.0}),
    tried("try linear beyond the grid", "aurora", 2, CHANNEL, LINEAR),
    tried("try linear beyond the grid, summed", "aurora", 2, {}, LINEAR),
    tried("try summed, grid from data", "aurora", 2, {}, FROM_DATA),
    tried("try summed, w and H x 0.1", "aurora", 2, {}, (), {ANL: 0.1}),
    tried("try summed, w and H x 10", "aurora", 2, {}, (), FAST, parts=(FINALIST,)),
    tried("try per-channel, w and H x 30", "aurora", 2, CHANNEL, (), {ANL: 30.0}),
    tried("try per-channel, grid from data", "aurora", 2, CHANNEL, FROM_DATA),
    tried(
        "try identity, grid from data, w and H x 10",
        "aurora",
        2,
        CHANNEL,
        FROM_DATA + IDENTITY,
        FAST,
    ),
    tried("try identity, grid +-2, w and H x 10", "aurora", 2, GRID_2, IDENTITY, FAST),
    tried("try per-channel, splines drawn in +-0.5", "aurora", 2, CHANNEL, ("louder",)),
    tried("try per-channel, w and H x 3", "aurora", 2, CHANNEL, (), {ANL: 3.0}, parts=(FINALIST,)),
    tried("try per-channel, w x 10", "aurora", 2, CHANNEL, (), {W: 10.0}),
    tried("try per-channel, grid from data, w and H x 10", "aurora", 2, CHANNEL, FROM_DATA, FAST),
    tried(
        "try per-channel, w and H x 10, biases too",
        "aurora",
        2,
        CHANNEL,
        (),
        FAST,
        biases=True,
        parts=(FINALIST,),
    ),
    tried("try per-channel, biases too", "aurora", 2, CHANNEL, biases=True),
    tried(
        "try identity, w and H x 10", "aurora", 2, CHANNEL, IDENTITY, FAST, parts=(PAIRED, INSIDE)
    ),
    tried(
        "try linear beyond the grid, w and H x 10",
        "aurora",
        2,
        CHANNEL,
        LINEAR,
        FAST,
        parts=(PAIRED,),
    ),
    tried(
        "try per-channel, alpha x 4, w and H x 10",
        "aurora",
        2,
        CHANNEL | {"alpha": 16.0},
        (),
        FAST,
        parts=(FINALIST,),
    ),
    tried(
        "try per-channel, B x 4, w and H x 10",
        "aurora",
        2,
        CHANNEL,
        (),
        FAST | {B: 4.0},
        parts=(FINALIST,),
    ),
    tried("try LoRA r=8, biases too", "lora", 8, biases=True),
    tried("try LoRA r=2, B x 8", "lora", 2, rates={B: 8.0}),
    tried("try LoRA r=8, B x 8", "lora", 8, rates={B: 8.0}),
    ablated("head not warmed", starts=AT_ONCE),
    ablated("directions not whitened", starts=(*IDENTITY, "head warmed", "gradient, plain")),
    ablated("ridge 1e-4", starts=(*IDENTITY, "head warmed", "gradient, ridge 1e-4")),
    ablated("ridge 1", starts=(*IDENTITY, "head warmed", "gradient, ridge 1")),
    ablated("2 batches looked at", starts=(*IDENTITY, "head warmed", "gradient, 2 batches")),
    ablated("40 batches looked at", starts=(*IDENTITY, "head warmed", "gradient, 40 batches")),
    ablated("A halved", starts=(*IDENTITY, *LOOK, "A halved")),
    ablated("A doubled", starts=(*IDENTITY, *LOOK, "A doubled")),
    ablated("without F", GRID_4 | {"fixed": False}),
    ablated("3 cells", GRID_4 | {"grid_size": 3}),
    ablated("10 cells", GRID_4 | {"grid_size": 10}),
    ablated("grid +-1", CHANNEL),
    ablated("no constant", starts=(*IDENTITY, *LOOK, "no constant")),
    ablated("biases too", biases=True),
    fixed("without splines", LINEAR_CORE),
    fixed("head not warmed", starts=("gradient",)),
    fixed("directions not whitened", starts=("head warmed", "gradient, plain")),
    fixed("ridge 1", starts=("head warmed", "gradient, ridge 1")),
    fixed("40 batches looked at", starts=("head warmed", "gradient, 40 batches")),
)

SETTINGS = {row.name: row for row in (*JUDGED, *TRIED)}


def taking_part(part: str) -> tuple[str, ...]:
    """Names of the rows that take part in it, in the table's order."""
    return tuple(name for name, row in SETTINGS.items() if part in row.parts)

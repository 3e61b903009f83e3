"""The report of `curves`: tables of errors, who is beaten by how much, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.curves.contenders import CONTENDERS
from benchmarks.lab import records
from benchmarks.lab.records import Record
from benchmarks.lab.report import markdown_table, picture, write_report


class Theme(NamedTuple):
    """What is said about a task in one of its worlds.

    ours: (method, place) that counts as AuroRA. unit: of the table's numbers, as a factor.
    """

    title: str
    told: str
    ours: tuple[str, str]
    unit: float = 1000.0


RANKS = ("AuroRA r=2", "AuroRA r=4")
CHOSEN = "AuroRA, r=2 or 4"  # each draw's is the one whose loss on the held-out fifth is less
ARM = (
    "MuJoCo's Reacher (Gymnasium's \"Reacher-v5\", an arm of two joints): a tanh network "
    "(8-128-128-2) has learned from 60,000 steps how the velocities of the joints change. "
)
FRESH = (
    "All settings were fixed before this world's first run, but for one: that rank 2 may be chosen "
    "in place of 4, as the arm of seven joints showed that rank 4 fits noise there."
)
THEMES: dict[tuple[str, str], Theme] = {
    ("swap", "motors"): Theme(
        "Worn motors",
        f"{ARM}Then each motor gets a dead zone (nothing below 0.2) and saturates (at 0.4).",
        (CHOSEN, "front"),
    ),
    ("swap", "differential"): Theme(
        "Worn motors behind a differential gear",
        "The same motors drive the sum and the difference of the torques, so that the bends lie "
        "along no single input.",
        (CHOSEN, "front"),
    ),
    ("swap", "sensors"): Theme(
        "Compressing sensors",
        "The same arm with sound motors; the velocities are read by sensors of gamma 1/2.",
        (CHOSEN, "front"),
    ),
    ("swap", "pusher"): Theme(
        "An arm of seven joints",
        'Gymnasium\'s "Pusher-v5", with a network of 21-128-128-7. Two worn motors drive sum and '
        f"difference of the torques of shoulder and elbow; five motors are sound. {FRESH}",
        (CHOSEN, "front"),
    ),
    ("swap", "swimmer"): Theme(
        "A swimmer",
        'Gymnasium\'s "Swimmer-v5", three rods in water, with a network of 10-128-128-5. Two worn '
        f"motors drive the sum and the difference of the torques. {FRESH}",
        (CHOSEN, "front"),
    ),
    ("swap", "cheetah"): Theme(
        "A running machine",
        'Gymnasium\'s "HalfCheetah-v5", with a network of 23-128-128-9. Two worn motors drive sum '
        "and difference of the torques of both thighs; four motors are sound. No choice has seen "
        "this world.",
        (CHOSEN, "front"),
    ),
    ("tones", "coffee"): Theme(
        "A tone curve over a photograph",
        "A tanh network (128-128-128-3, fixed random Fourier features of the place) has learned a "
        "photograph, scikit-image's `coffee`. Then the luminance goes along a tone curve, and the "
        "differences between the channels stay. Examples are pixels.",
        ("AuroRA r=2", "back"),
    ),
    ("ratings", "products to movies"): Theme(
        "Ratings of products, then of movies",
        "A linear head on all-MiniLM-L6-v2 has learned people's ratings of product reviews, and "
        "then rates snippets on movies. Nothing is imposed. There is one number to bend, the "
        "head's output, so that everybody is told where to look.",
        ("AuroRA r=1", "back"),
        1.0,
    ),
    ("ratings", "movies to tweets"): Theme(
        "Ratings of movies, then of tweets",
        "Likewise.",
        ("AuroRA r=1", "back"),
        1.0,
    ),
}

SEEN = 10  # draws that had been looked at when the number of starts was chosen
Row = tuple[str, str]  # method, place
Errors = Mapping[int, Record]  # by examples


def rows_of(lines: Iterable[Record]) -> dict[tuple[str, str], dict[Row, dict[int, Record]]]:
    """(task, world) -> (method, place) -> examples -> record."""
    found: dict[tuple[str, str], dict[Row, dict[int, Record]]] = {}
    for line in lines:
        group = found.setdefault((line["task"], line["world"]), {})
        group.setdefault((line["method"], line["place"]), {})[line["examples"]] = line
    return found


def knows(method: str) -> bool:
    """Whether a method is told where to look."""
    return method != CHOSEN and CONTENDERS[method].knows


def with_chosen_rank(group: Mapping[Row, Errors]) -> dict[Row, Errors]:
    """The group, and AuroRA as a user has it who lets held-out examples choose its rank."""
    low, high = (group.get((name, "front"), {}) for name in RANKS)
    found = {}
    for examples in low.keys() & high.keys():
        pair = (low[examples], high[examples])
        scores = zip(*(record["held_out"] for record in pair), strict=True)
        best = [score.index(min(score)) for score in scores]
        errors = [pair[rank]["errors"][draw] for draw, rank in enumerate(best)]
        found[examples] = {**pair[1], "errors": errors}
    return {(CHOSEN, "front"): found, **group} if found else dict(group)


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def cell(record: Record | None, unit: float) -> str:
    """The mean error and its standard error over the draws, times `unit`."""
    if record is None:
        return ""
    mean, error = (unit * value for value in estimate(record["errors"]))
    digits = 2 if mean < 10 else 1
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(group: Mapping[Row, Errors], unit: float) -> str:
    """Methods by number of examples; errors times `unit`."""
    counts = sorted(set().union(*group.values()))
    rows = []
    for (method, place), found in group.items():
        some = next(iter(found.values()))
        told = " (told)" if knows(method) and "told" not in method else ""
        cells = [cell(found.get(examples), unit) for examples in counts]
        rows.append([f"{method}{told}, {place}", f"{some['trained']:,}", *cells])
    times = f"error x {unit:g}, by examples" if unit != 1 else "error, by examples"
    return markdown_table([times, "trained", *map(str, counts)], rows)


def apart(group: Mapping[Row, Errors], ours: Row) -> tuple[dict[Row, Errors], dict[Row, Errors]]:
    """(all that compete, ours first; ours before its other settings, nothing if there are none)."""
    mine = {ours: group[ours]} if ours in group else {}
    variants = {row: found for row, found in group.items() if row[0].startswith("AuroRA")}
    others = {row: found for row, found in group.items() if row not in variants}
    return mine | others, mine | variants if set(variants) - {ours} else {}


class Duel(NamedTuple):
    """Ours against a method at a number of examples.

    ratio: their mean error by ours. lead: the mean difference over the draws, paired, in standard
    errors of that mean.
    """

    method: str
    place: str
    examples: int
    ratio: float
    lead: float


def duels(group: Mapping[Row, Errors], ours: Row, start: int = 0) -> list[Duel]:
    """Against every method that is not told where to look and is none of AuroRA's, everywhere.

    start: the first draw that counts; methods with fewer draws than two more are left out.
    """
    found = []
    for (method, place), theirs in group.items():
        if method.startswith("AuroRA") or knows(method):
            continue
        for examples, record in sorted(theirs.items()):
            if (own := group.get(ours, {}).get(examples)) is not None:
                pairs = list(zip(record["errors"], own["errors"], strict=False))[start:]  # of both
                if len(pairs) < 2:
                    continue
                mean, error = estimate([theirs - ours for theirs, ours in pairs])
                ratio = 1 + mean / statistics.fmean(ours for _, ours in pairs)
                found.append(Duel(method, place, examples, ratio, mean / max(error, 1e-12)))
    return found


def findings(group: Mapping[Row, Errors], ours: Row) -> list[str]:
    """For every number of examples, the hardest opponent; and how near the told splines are."""
    told, every = [], duels(group, ours)
    for examples in sorted({duel.examples for duel in every}):
        here = [duel for duel in every if duel.examples == examples]
        near = min(here, key=lambda duel: duel.lead)
        best = min(here, key=lambda duel: duel.ratio)
        verdict = "ahead of all" if near.lead > 2 else "not ahead of all"
        text = (
            f"{examples} examples: {verdict} that are not told where to look by more than two "
            f"standard errors (the least lead is {near.lead:+.1f}, over {near.method}, "
            f"{near.place}; the best of them, {best.method}, {best.place}, has {best.ratio:.2g} "
            "times our error)"
        )
        fresh = [duel for duel in duels(group, ours, start=SEEN) if duel.examples == examples]
        apart = "".join(f"; on fresh draws {d.lead:+.1f} over {d.method}" for d in fresh)
        told.append(f"- {text}{_told_ratio(group, ours, examples)}{apart}.")
    return told


def _told_ratio(group: Mapping[Row, Errors], ours: Row, examples: int) -> str:
    known = next((found for (m, _), found in group.items() if knows(m)), {})
    if examples not in known:
        return ""
    ratio = estimate(group[ours][examples]["errors"])[0] / estimate(known[examples]["errors"])[0]
    return f"; our error is {ratio:.2f} times that of splines that are told"


def draw(path: Path, groups: Mapping[tuple[str, str], Mapping[Row, Errors]]) -> None:
    """Error against examples, one panel a world; ratings, where nothing bends, are left out."""
    shown = [key for key in THEMES if key in groups and key[0] != "ratings"]
    with picture(path, columns=len(shown), height=4.5) as axes:
        for one, key in zip(axes, shown, strict=True):
            for row, found in groups[key].items():
                if row != THEMES[key].ours and row[0].startswith("AuroRA"):
                    continue
                places = sorted(found)
                values = [estimate(found[n]["errors"]) for n in places]
                style = "k--" if knows(row[0]) else "o-"
                width = 2.5 if row == THEMES[key].ours else 1
                means, errors = zip(*values, strict=True)
                look = {"label": ", ".join(row), "linewidth": width, "markersize": 3}
                one.errorbar(places, means, errors, fmt=style, **look)
            one.set(xscale="log", yscale="log", xlabel="examples", ylabel="mean squared error")
            one.set(title=THEMES[key].title)
            one.legend(fontsize="xx-small")


READING = (
    "Mean squared error on held-out data, in units of the target's variance before the change (of "
    "ratings, in their own units); mean and standard error over five draws of the examples or "
    "more, the same for all methods. For each draw a fifth of its examples chooses rate, weight "
    "decay, penalties and, for AuroRA, one of four rotations of the start; training then goes on "
    "from the choice with all examples. `front` and `back` are identity layers before and behind "
    "the model, in which an adapter bends what goes in or comes out. Leads are paired differences, "
    "in standard errors of their mean. Splines that are told know the directions that bend; "
    "splines on every input assume that single inputs bend, which is so at the worn motors alone "
    "and a help there. The physics, the photograph and the texts are real; all changes but the "
    "ratings' are imposed. Worn motors, 256 and 1,024 examples: the first ten draws had "
    "been looked at when the number of rotations was raised from two to four, and fresh "
    "draws are the ten after them. AuroRA's rank, grid, the factors between its rates and the "
    "form of its penalties were chosen in sketches of these worlds, by held-out data and with "
    "draws that overlap these."
)


def report(out: Path, lines: Sequence[Record]) -> Path:
    """Write tables, findings and picture."""
    groups = {key: with_chosen_rank(group) for key, group in rows_of(lines).items()}
    parts = [READING]
    for key, theme in THEMES.items():
        if key in groups:
            before = next(iter(next(iter(groups[key].values())).values()))["before"]
            told = f"{theme.told} Before adapting the error is {before:.3f}."
            parts += [f"## {theme.title}", told]
            others, variants = apart(groups[key], theme.ours)
            parts += [table(others, theme.unit), "\n".join(findings(groups[key], theme.ours))]
            if variants:
                told = "What the parts bring, and other places (AuroRA in other settings):"
                parts += [told, table(variants, theme.unit)]
    draw(out / "curves.png", groups)
    where = records.machines(lines)
    return write_report(out, "curves", "Where the curve pays", parts, measured_on=where)

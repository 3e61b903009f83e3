"""Learning quality: what does each method reach with its parameters, and where does AuroRA lose?

All-MiniLM-L6-v2 learns class and rating of four corpora of short texts, every method with the same texts, steps,
batches and head. First every method's learning rate is chosen on a development fold, where settings of AuroRA are tried
too; then the methods are judged on held-out folds, on which nothing was chosen (docs/benchmarks.md tells what had been
seen before). Every run is one line of JSON; a run that has its line is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import aurora
from aurora import core
from benchmarks import baselines, common, data

HEAD = r"^head\."
LENGTH = 48  # tokens of a sequence of the language model
HEAD_RATE = 5e-3  # of every method, so that a method's own rate can be chosen by itself
SIZE = 16  # texts a step
RECOMMENDED = "AuroRA r=2 recommended"
Record = dict[str, Any]
Inputs = list[dict[str, Tensor]]


class Place(NamedTuple):
    """Regexes of the layers to adapt and of other parameters that train. seed: of every A, if it shall be shared."""

    targets: str
    train: str | None
    seed: int | None = None

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Draw every A anew, layer by layer from a seed of its own, so that methods of a rank start with the same, and
        that of a smaller rank is part of that of a larger."""
        if self.seed is None:
            return
        found = [p for name, p in model.named_parameters() if re.search(r"\.(A|lora_A\.default\.weight)$", name)]
        for i, A in enumerate(found):
            generator = torch.Generator().manual_seed(1000 * self.seed + i)
            drawn = torch.rand(16, A.shape[1], generator=generator)[: A.shape[0]]
            A.copy_((2 * drawn - 1) / math.sqrt(A.shape[1]))  # as Kaiming-uniform(a = sqrt 5) does

    def trained(self, biases: bool) -> str | None:
        """The regex of what trains beside adapters, with or without the adapted layers' biases."""
        return "|".join([*([self.train] if self.train else []), rf"{self.targets}\.bias"]) if biases else self.train


ENCODER = Place(r"attention\.self\.(query|value)", HEAD)
LANGUAGE = Place(r"layers\.\d+\..*_proj$", None)


class Method(NamedTuple):
    """`prepare` readies a fresh model for training, with the help of sample inputs. factors: regex of parameter names
    -> factor on the learning rate. seeds: runs a corpus on the held-out folds, 0 for a setting that is only tried."""

    prepare: Callable[[nn.Module, Inputs, Place], object]
    seeds: int = 3
    factors: Mapping[str, float] = {}


# --- The methods -----------------------------------------------------------------------------------------------------


def lora(rank: int, seeds: int = 3, mixer: bool = False, biases: bool = False, **factors: float) -> Method:
    """LoRA, or MoSLoRA with a mixer; with the adapted layers' biases, if they shall train too."""

    def prepare(model: nn.Module, _: Inputs, place: Place) -> None:
        baselines.inject_lora(model, place.targets, rank, mixer=mixer, train=place.trained(biases))
        place.share(model)

    return Method(prepare, seeds, {rf"\.{name}$": factor for name, factor in factors.items()})


def peft_lora(rank: int) -> Method:
    """PEFT's own LoRA, a check on ours."""

    def prepare(model: nn.Module, _: Inputs, place: Place) -> None:
        peft = common.need("peft")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        model.encoder = peft.get_peft_model(model.encoder, config)
        place.share(model)

    return Method(prepare)


def plain(train: str, seeds: int = 3) -> Method:
    """No adapters: train the parameters whose name matches."""
    return Method(lambda model, *_: baselines.freeze(model, train), seeds)


def adapted(
    rank: int,
    seeds: int = 3,
    *start: Callable[[core.AuroraLinear, Tensor], None],
    factors: Mapping[str, float] | None = None,
    biases: bool = False,
    **options: Any,
) -> Method:
    """AuroRA; each of `start` then changes every layer in turn, knowing a sample of its hidden vectors z (r, N)."""

    def prepare(model: nn.Module, inputs: Inputs, place: Place) -> None:
        chosen = {"alpha": 2.0 * rank, "train": place.trained(biases), **options}
        aurora.inject(model, place.targets, rank, **chosen)
        place.share(model)
        if start:
            for layer, z in hidden_vectors(model, inputs).items():
                for change in start:
                    change(layer, z)

    return Method(prepare, seeds, factors or {})


@torch.no_grad()
def hidden_vectors(model: nn.Module, inputs: Inputs) -> dict[core.AuroraLinear, Tensor]:
    """z = A x (r, N) of every adapted layer on the tokens of the inputs."""
    found: dict[core.AuroraLinear, list[Tensor]] = {layer: [] for layer in core.layers(model).values()}

    def watch(mask: Tensor, layer: nn.Module, x: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, core.AuroraLinear)
        found[layer].append(layer.A @ x[0][mask].t())

    for batch in inputs:
        with contextlib.ExitStack() as hooks:
            for layer in found:
                handle = layer.register_forward_pre_hook(functools.partial(watch, batch["attention_mask"].bool()))
                hooks.callback(handle.remove)
            model(**batch)
    return {layer: torch.cat(seen, 1) for layer, seen in found.items()}


def identity(layer: core.AuroraLinear, _: Tensor) -> None:
    """Start as LoRA inside the grid."""
    aurora.start_as_identity(layer)


@torch.no_grad()
def fit_grid(layer: core.AuroraLinear, z: Tensor) -> None:
    """A grid that reaches just as far as 99.9% of the layer's hidden values."""
    reach = float(z.abs().flatten().double().quantile(0.999)) if z.numel() < 1e7 else float(z.abs().max())
    anl = core.ANL(layer.config, grid_range=(-reach, reach))
    anl.load_state_dict(layer.anl.state_dict())
    layer.config, layer.anl = anl.config, anl


@torch.no_grad()
def normalise(layer: core.AuroraLinear, z: Tensor) -> None:
    """Rows of A scaled so that every hidden channel has root mean square 1/2 at the start."""
    layer.A.mul_(0.5 / z.square().mean(1, keepdim=True).sqrt())


@torch.no_grad()
def louder(layer: core.AuroraLinear, _: Tensor) -> None:
    """Spline weights drawn in +-0.5 instead of +-0.1."""
    assert layer.anl.spline_weight is not None
    layer.anl.spline_weight.mul_(5)


class LinearANL(core.ANL):
    """sigma(z) + z: linear beyond the grid, where the splines end."""

    def columns(self, z: Tensor, scale: float = 1.0) -> Tensor:
        """(r, N) -> (r, N)."""
        return torch.add(super().columns(z, scale), z, alpha=scale)


@torch.no_grad()
def add_identity(layer: core.AuroraLinear, _: Tensor) -> None:
    """sigma(z) + z with sigma = 0 at the start: AuroRA starts as LoRA everywhere."""
    layer.anl.__class__ = LinearANL
    for p in layer.anl.parameters():
        p.zero_()


def methods() -> dict[str, Method]:
    """All by name: those that are judged on the held-out folds, then the settings that are tried on development."""
    per_channel: dict[str, Any] = {"spline": "per-channel"}
    wide, fast = common.RECOMMENDED, {r"\.anl\.": 10.0}
    found = {
        "head only": plain(HEAD),
        "full": plain(""),
        "LoRA r=1": lora(1),
        "LoRA r=2": lora(2, 5),
        "LoRA r=4": lora(4),
        "LoRA r=8": lora(8, 5),
        "LoRA r=16": lora(16),
        "MoSLoRA r=2": lora(2, mixer=True),
        "PEFT LoRA r=2": peft_lora(2),
    }
    for rank in (1, 2, 4, 8):
        found[f"AuroRA r={rank}"] = adapted(rank, 5 if rank == 2 else 3)
        found[f"AuroRA r={rank} per-channel"] = adapted(rank, **per_channel)
    return found | {
        RECOMMENDED: adapted(2, 5, identity, factors=fast, **wide),
        "AuroRA r=8 recommended": adapted(8, 3, identity, factors=fast, **wide),
        f"{RECOMMENDED}, biases too": adapted(2, 5, identity, factors=fast, biases=True, **wide),
        "LoRA r=2, biases too": lora(2, 5, biases=True),
        "AuroRA r=2 static": adapted(2, mode="static"),
        "AuroRA r=2 without F": adapted(2, fixed=False),
        "AuroRA r=2 without L": adapted(2, learnable=False),
        "AuroRA r=2 LeakyReLU": adapted(2, activation="leaky_relu"),
        "AuroRA r=2 sigmoid": adapted(2, activation="sigmoid"),
        "try identity": adapted(2, 0, identity, **per_channel),
        "try identity, grid +-2": adapted(2, 0, identity, grid_range=(-2.0, 2.0), **per_channel),
        "try identity, grid +-4": adapted(2, 0, identity, grid_range=(-4.0, 4.0), **per_channel),
        "try identity, grid from data": adapted(2, 0, fit_grid, identity, **per_channel),
        "try identity, z normalised": adapted(2, 0, normalise, identity, **per_channel),
        "try identity, w and H x 0.1": adapted(2, 0, identity, factors={r"\.anl\.": 0.1}, **per_channel),
        "try per-channel, w and H x 10": adapted(2, 0, factors=fast, **per_channel),
        "try identity, B x 8": adapted(2, 0, identity, factors={r"\.B$": 8.0}, **per_channel),
        "try linear beyond the grid": adapted(2, 0, add_identity, **per_channel),
        "try linear beyond the grid, summed": adapted(2, 0, add_identity),
        "try summed, grid from data": adapted(2, 0, fit_grid),
        "try summed, w and H x 0.1": adapted(2, 0, factors={r"\.anl\.": 0.1}),
        "try summed, w and H x 10": adapted(2, 0, factors=fast),
        "try per-channel, w and H x 30": adapted(2, 0, factors={r"\.anl\.": 30.0}, **per_channel),
        "try per-channel, grid from data": adapted(2, 0, fit_grid, **per_channel),
        "try identity, grid from data, w and H x 10": adapted(2, 0, fit_grid, identity, factors=fast, **per_channel),
        "try identity, grid +-2, w and H x 10": adapted(
            2, 0, identity, factors=fast, grid_range=(-2.0, 2.0), **per_channel
        ),
        "try per-channel, splines drawn in +-0.5": adapted(2, 0, louder, **per_channel),
        "try per-channel, w and H x 3": adapted(2, 0, factors={r"\.anl\.": 3.0}, **per_channel),
        "try per-channel, w x 10": adapted(2, 0, factors={r"\.spline_weight$": 10.0}, **per_channel),
        "try per-channel, grid from data, w and H x 10": adapted(2, 0, fit_grid, factors=fast, **per_channel),
        "try per-channel, w and H x 10, biases too": adapted(2, 0, factors=fast, biases=True, **per_channel),
        "try per-channel, biases too": adapted(2, 0, biases=True, **per_channel),
        "try identity, w and H x 10": adapted(2, 0, identity, factors=fast, **per_channel),
        "try linear beyond the grid, w and H x 10": adapted(2, 0, add_identity, factors=fast, **per_channel),
        "try per-channel, alpha x 4, w and H x 10": adapted(2, 0, factors=fast, alpha=16.0, **per_channel),
        "try per-channel, B x 4, w and H x 10": adapted(2, 0, factors={r"\.anl\.": 10.0, r"\.B$": 4.0}, **per_channel),
        "try LoRA r=8, biases too": lora(8, 0, biases=True),
        "try LoRA r=2, B x 8": lora(2, 0, B=8.0),
        "try LoRA r=8, B x 8": lora(8, 0, B=8.0),
    }


# --- One run ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that fixes a run. side: "development", "held-out", "diagnosis", which is development with measurements inside
    the model, or "language"; corpus: "all" for the four mixed, else one, for the language model; texts: at most so many
    of a corpus to learn from; held: at most so many of a corpus to be judged by; start: "own", or "shared", where all
    methods start with the same A, so that differences tell methods apart and not draws."""

    side: str
    method: str
    lr: float
    corpus: str
    seed: int
    steps: int
    texts: int
    held: int
    start: str = "own"

    key = property(common.key)

    def placed(self, place: Place) -> Place:
        """The place with this run's shared start, if it has one."""
        return place._replace(seed=self.seed) if self.start == "shared" else place


@functools.cache
def encoder() -> tuple[nn.Module, Any]:
    """Read once a process; every run copies it."""
    return common.load_encoder()


@functools.cache
def language_model() -> tuple[nn.Module, Any]:
    """Read once a process; every run copies it."""
    return common.load_smollm2()


@functools.cache
def sides(side: str, texts: int, held: int) -> tuple[common.Texts, dict[str, common.Texts]]:
    """(to learn from, the four corpora mixed; to be judged by, by corpus). Folds are chosen by a hash of the ids, and
    so is what is left out where there are too many; ratings are divided by their deviation in the corpus."""
    learn, judged = [], {}
    for name in data.CORPORA:
        rest, held_out = data.split(data.load(name))
        rest, development = data.split(rest, salt="development")
        scale, kept = statistics.pstdev(s.rating for s in rest), []
        for pool, count in ((rest, texts), (held_out if side == "held-out" else development, held)):
            part = data.split(pool, min(1.0, count / len(pool)), salt="size")[1]
            kept.append([s._replace(rating=s.rating / scale) for s in part])
        learn += kept[0]
        judged[name] = common.tokenize(encoder()[1], kept[1])
    return common.tokenize(encoder()[1], learn), judged


def groups(model: nn.Module, method: Method, lr: float) -> list[dict[str, Any]]:
    """Parameter groups: the head at HEAD_RATE unless it is all that trains, the rest at `lr` times its factor."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone = all(re.search(HEAD, name) for name in trained)
    rates: dict[float, list[nn.Parameter]] = {}
    for name, p in trained.items():
        factor = next((f for pattern, f in method.factors.items() if re.search(pattern, name)), 1.0)
        rates.setdefault(HEAD_RATE if re.search(HEAD, name) and not alone else factor * lr, []).append(p)
    return [{"params": ps, "lr": rate} for rate, ps in rates.items()]


def diagnose(model: nn.Module, inputs: Inputs, batch: common.Batch) -> dict[str, float]:
    """What may hold the nonlinearity back, as means over the adapted layers: share of hidden values beyond the grid and
    beyond the splines' support; shares of the mean square of sigma(z) that are constant, linear in z, and neither; root
    mean squares of every kind of parameter and of its gradient on one batch."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(float(value))

    for layer, z in hidden_vectors(model, inputs).items():
        c, z = layer.config, z.double()
        reach = c.grid_range[1] + c.spline_order / c.cells_per_unit
        note("beyond the grid", (z.abs() > c.grid_range[1]).double().mean())
        note("beyond the support", (z.abs() > reach).double().mean())
        with torch.no_grad():
            sigma = layer.anl.columns(z)
        energy, centred = sigma.square().mean(), sigma - sigma.mean(1, keepdim=True)
        slope = torch.linalg.lstsq((z - z.mean(1, keepdim=True)).t(), centred.t()).solution
        rest = centred - slope.t() @ (z - z.mean(1, keepdim=True))
        note("constant", 1 - centred.square().mean() / energy)
        note("linear", (centred.square().mean() - rest.square().mean()) / energy)
        note("nonlinear", rest.square().mean() / energy)
    common.rating_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    for layer in core.layers(model).values():
        for name, p in layer.adapter_parameters().items():
            assert p.grad is not None
            note(f"{name} size", p.detach().square().mean().sqrt())
            note(f"{name} gradient", p.grad.square().mean().sqrt())
            p.grad = None
    return {name: statistics.fmean(values) for name, values in found.items()}


def perform(run: Run) -> Record:
    """Train, and judge on the other side."""
    return {"run": run.key, **run._asdict(), **(continue_texts(run) if run.side == "language" else read_ratings(run))}


def read_ratings(run: Run) -> Record:
    """MiniLM learns class and rating of the four corpora at once, and is judged on each."""
    method, (learn, judged) = methods()[run.method], sides(run.side, run.texts, run.held)
    torch.manual_seed(run.seed)
    model = common.Reader(copy.deepcopy(encoder()[0])).eval()
    method.prepare(model, learn.inputs(128), run.placed(ENCODER))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    found: Record = {"adapter": sum(n for name, n in trained.items() if not re.search(HEAD, name))}
    inside = functools.partial(diagnose, model, learn.inputs(128), learn.sample(64).batches(64)[0])
    if run.side == "diagnosis":
        found["before"] = inside()
    start, rates = time.perf_counter(), groups(model, method, run.lr)
    common.train(model, learn, steps=run.steps, lr=run.lr, seed=run.seed, size=SIZE, groups=rates)
    found["seconds"] = time.perf_counter() - start
    if run.side == "diagnosis":
        found["after"] = inside()
    answers = {name: common.predict(model, texts) for name, texts in judged.items()}
    outputs, ratings = (torch.cat(parts) for parts in zip(*answers.values(), strict=True))
    found |= {"loss": float(common.loss(outputs, ratings)), **common.score(outputs, ratings)._asdict()}
    if run.side == "held-out":
        found["corpora"] = {name: {**common.score(*a)._asdict(), "hits": hits(*a)} for name, a in answers.items()}
    return found


def hits(outputs: Tensor, ratings: Tensor) -> str:
    """Text by text, of those that have a class: 1 if it was recognised, else 0."""
    return "".join("01"[int(hit)] for hit in ((outputs[:, 0] > 0) == (ratings > 0))[ratings != 0])


def continue_texts(run: Run) -> Record:
    """SmolLM2-135M learns to continue the texts; next-token loss in nats of development and of held-out sequences."""
    method, (source, tokenizer) = methods()[run.method], language_model()
    rest, held_out = data.split(data.load(run.corpus))
    sides = zip((*data.split(rest, salt="development"), held_out), (run.texts, run.held, run.held), strict=True)
    learn, *judged = (common.chunks(tokenizer, side, count, LENGTH) for side, count in sides)
    torch.manual_seed(run.seed)
    model = copy.deepcopy(source)
    sample = {"input_ids": learn[:16], "attention_mask": torch.ones_like(learn[:16])}
    method.prepare(model, [sample], run.placed(LANGUAGE))
    rates = groups(model, method, run.lr)
    seconds = common.train_language(model, learn, rates, steps=run.steps, lr=run.lr, seed=run.seed)

    @torch.no_grad()
    def losses(ids: Tensor) -> list[float]:
        return torch.cat([common.next_token_loss(model, part) for part in ids.split(8)]).tolist()

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    development, held = map(losses, judged)
    return {"adapter": trained, "loss": statistics.fmean(development), "held-out losses": held, "seconds": seconds}


# --- All runs --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How much to run: steps and texts of the runs that count, and of those that only try."""

    steps: int = 150
    texts: int = 1000
    held: int = 1000
    try_steps: int = 60
    try_texts: int = 500
    try_held: int = 250
    names: tuple[str, ...] = ()

    def chosen(self) -> dict[str, Method]:
        """The methods to run, all unless there are names; first those with the most seeds."""
        found = {name: m for name, m in methods().items() if not self.names or name in self.names}
        return dict(sorted(found.items(), key=lambda item: -item[1].seeds))

    def attempt(self, name: str, lr: float, seed: int = 0) -> Run:
        """A short run on the development fold."""
        return Run("development", name, lr, "all", seed, self.try_steps, self.try_texts, self.try_held)

    def develop(self, name: str, lr: float, seed: int = 0) -> Run:
        """A run of full length on the development fold."""
        return Run("development", name, lr, "all", seed, self.steps, self.texts, self.try_held)

    def pair(self, name: str, lr: float, seed: int) -> Run:
        """Likewise, with the A that others start with."""
        return self.develop(name, lr, seed)._replace(start="shared")

    def judge(self, name: str, lr: float, seed: int) -> Run:
        """A run on the held-out folds."""
        return Run("held-out", name, lr, "all", seed, self.steps, self.texts, self.held, "shared")


def rate(i: int) -> float:
    """The grid of learning rates, the same for all: 1e-3, 1.8e-3, 3e-3, 5.6e-3, 1e-2, ... for i = -12, -11, ..."""
    return float(f"{(1, 1.8, 3, 5.6)[i % 4]}e{i // 4}")


LOWEST, HIGHEST = -20, -4  # 1e-5 and 1e-1
Losses = dict[int, float]  # development loss by place in the grid of rates


def swept(
    make: Callable[[float], Run], places: list[int], step: int, lines: Mapping[str, Record]
) -> tuple[Losses, list[Run]]:
    """(losses, the runs still needed). From `places` outwards, until the best rate has worse ones on both sides."""
    while True:
        runs = [make(rate(i)) for i in places]
        if needed := [run for run in runs if run.key not in lines]:
            return {}, needed
        losses = {i: lines[run.key]["loss"] for i, run in zip(places, runs, strict=True)}
        losses = {i: loss if math.isfinite(loss) else math.inf for i, loss in losses.items()}
        best = min(losses, key=losses.__getitem__)
        if best not in (places[0], places[-1]) or best in (LOWEST, HIGHEST):
            return losses, []
        places = [best - step, *places] if best == places[0] else [*places, best + step]


def sweeps(plan: Plan, name: str, lines: Mapping[str, Record]) -> tuple[list[Losses], list[Run]]:
    """([losses of the short runs, of the full runs], the runs still needed).

    Short runs over every half decade find the neighbourhood, from 1e-3, 3e-3, 1e-2. Runs of full length over every
    quarter decade choose, from there and the two rates below, as longer training likes lower rates; a method that is
    only tried has none of these.
    """
    short, needed = swept(lambda lr: plan.attempt(name, lr), [-12, -10, -8], 2, lines)
    if needed or not (methods()[name].seeds or name in FINALISTS):
        return ([short] if short else []), needed
    i = max(min(short, key=short.__getitem__), LOWEST + 2)
    full, needed = swept(lambda lr: plan.develop(name, lr), [i - 2, i - 1, i], 1, lines)
    return ([short, full] if full else [short]), needed


def best_rate(losses: Losses) -> float:
    """The rate with the least loss."""
    return rate(min(losses, key=losses.__getitem__))


AGAINST = ("LoRA r=2", "LoRA r=8", "LoRA r=2, biases too")
LEARNT = ("LoRA r=2", "LoRA r=8", "AuroRA r=2", RECOMMENDED, "AuroRA r=8 recommended")  # by the language model
INSIDE = (  # where the hidden values go is measured in these
    "AuroRA r=2",
    "AuroRA r=2 per-channel",
    "try per-channel, w and H x 10",
    "try identity, w and H x 10",
    RECOMMENDED,
)
QUICK = Plan(10, 100, 60, 4, 60, 30, ("head only", "LoRA r=2", "LoRA r=8", "AuroRA r=2", RECOMMENDED))
PAIRED = (  # compared at LoRA's best rate, from the same A
    "LoRA r=2",
    "LoRA r=2, biases too",
    "AuroRA r=2",
    "AuroRA r=2 per-channel",
    "try identity",
    "try identity, w and H x 10",
    RECOMMENDED,
    f"{RECOMMENDED}, biases too",
    "try linear beyond the grid, w and H x 10",
)
FINALISTS = (  # settings that are also tried at full length
    "try summed, w and H x 10",
    "try per-channel, w and H x 10",
    "try per-channel, w and H x 3",
    "try per-channel, w and H x 10, biases too",
    "try per-channel, alpha x 4, w and H x 10",
    "try per-channel, B x 4, w and H x 10",
)


def compared(name: str) -> bool:
    """Whether it takes part in the choice of a setting: all that is tried, and what it is tried against."""
    return name.startswith("try") or name in (*PAIRED, *AGAINST)


def pending(plan: Plan, lines: Mapping[str, Record], language: bool = False) -> Iterator[Run]:
    """Runs without a line that can start: sweeps first; then a second seed of the settings that are compared on
    development, a look inside some, and pairs from the same start; then the held-out folds, seed by seed; then, if
    asked for, the language model.
    """
    later, ready = [], {}
    for name in plan.chosen():
        found, needed = sweeps(plan, name, lines)
        yield from needed
        if found and compared(name):
            later.append(plan.attempt(name, best_rate(found[0]), 1))
        if found and name in INSIDE:
            later.append(plan.attempt(name, best_rate(found[0]))._replace(side="diagnosis"))
        if len(found) == 2 and compared(name):
            later.append(plan.develop(name, best_rate(found[1]), 1))
        if len(found) == 2:
            ready[name] = best_rate(found[1])
    if "LoRA r=2" in ready:
        names = [name for name in PAIRED if name in plan.chosen()]
        later += [plan.pair(name, ready["LoRA r=2"], seed) for seed in range(3) for name in names]
    for seed in range(5):
        later += [plan.judge(name, lr, seed) for name, lr in ready.items() if seed < methods()[name].seeds]
    if language:
        for name in LEARNT:
            make = functools.partial(Run, "language", name, corpus="editorials", seed=0, steps=60, texts=1024, held=64)
            later += swept(functools.partial(make, start="shared"), [-12, -10, -8], 2, lines)[1]
    yield from (run for run in later if run.key not in lines)


# --- The report ------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean and its standard error, NaN where one run cannot tell."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f}" + ("" if math.isnan(self.error) else f" ± {100 * self.error:.2f}")

    @property
    def signed(self) -> str:
        """With its sign, for differences."""
        return ("+" if self.mean >= 0 else "") + str(self)


Records = Mapping[tuple[str, int], Record]  # of a method: (corpus, seed) -> record
Judged = dict[str, dict[tuple[str, int], Record]]


def judged(plan: Plan, lines: Mapping[str, Record]) -> Judged:
    """The held-out runs at the rate that the sweep chose."""
    found: Judged = {}
    for name in (name for name in methods() if name in plan.chosen()):
        losses, _ = sweeps(plan, name, lines)
        if len(losses) < 2:
            continue
        runs = [plan.judge(name, best_rate(losses[1]), seed) for seed in range(methods()[name].seeds)]
        for record in (lines[run.key] for run in runs if run.key in lines):
            for corpus, scores in record["corpora"].items():
                found.setdefault(name, {})[corpus, record["seed"]] = {**record, **scores}
    return found


def accuracy(records: Records, against: Records | None = None) -> Estimate:
    """Mean over the corpora, or the mean difference on the runs that both have. The error counts both the texts, whose
    hits are paired, and the seeds, if there are several."""
    found = []
    for hits in _gaps(records, against, _hits):  # (seeds, texts)
        texts = hits.mean(0).var(ddof=1) / hits.shape[1]
        found.append((hits.mean(), texts + _variance_of_mean(hits.mean(1), alone=0.0)))
    return _over_corpora(found)


def pearson(records: Records, against: Records | None = None) -> Estimate:
    """Likewise of Pearson's correlation; its error counts the seeds only."""
    found = _gaps(records, against, lambda record: np.float64(record["pearson"]))  # (seeds,)
    return _over_corpora([(gaps.mean(), _variance_of_mean(gaps, alone=math.nan)) for gaps in found])


def _gaps(records: Records, against: Records | None, value: Callable[[Record], Any]) -> list[Any]:
    """Corpus by corpus, the values by seed, minus those of the other method where it has that seed."""
    found: dict[str, list[Any]] = {}
    for key in (key for key in records if against is None or key in against):
        gap = value(records[key]) if against is None else value(records[key]) - value(against[key])
        found.setdefault(key[0], []).append(gap)
    return [np.array(gaps) for gaps in found.values()]


def _variance_of_mean(values: Any, alone: float) -> float:
    """Of the mean of several values; `alone` if there is only one."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else alone


def _over_corpora(found: Sequence[tuple[float, float]]) -> Estimate:
    """The mean of independent means with these variances."""
    if not found:
        return Estimate(math.nan, math.nan)
    means, variances = zip(*found, strict=True)
    return Estimate(float(np.mean(means)), math.sqrt(sum(variances)) / len(variances))


def of(corpus: str, records: Records) -> Records:
    """The records of one corpus."""
    return {key: r for key, r in records.items() if key[0] == corpus}


def _hits(record: Record) -> Any:
    return np.frombuffer(record["hits"].encode(), dtype=np.uint8).astype(float) - ord("0")


def scores_table(found: Judged) -> str:
    """One row a method: parameters, rate, accuracy by corpus, means, and paired differences to LoRAs."""
    rows = []
    for name, records in found.items():
        one = next(iter(records.values()))
        by_corpus = []
        for corpus in data.CORPORA:
            part = of(corpus, records)
            by_corpus.append(f"{100 * accuracy(part).mean:.1f}" if part else "-")
        differences = [
            score(records, found[other]).signed if other in found and other != name else "-"
            for score in (accuracy, pearson)
            for other in AGAINST
        ]
        cells = [len({seed for _, seed in records}), *by_corpus, accuracy(records), pearson(records), *differences]
        rows.append([name, f"{one['adapter']:,}", f"{one['lr']:g}", *cells])
    header = ["held out", "parameters", "rate", "seeds", *data.CORPORA, "accuracy", "Pearson"]
    header += [f"{label} - {other}" for label in ("accuracy", "Pearson") for other in AGAINST]
    return common.markdown_table(header, rows)


def losses_table(found: Judged) -> str:
    """Where AuroRA wins and loses: differences to LoRA by corpus."""
    rows = []
    for name in (name for name in found if name.startswith("AuroRA r=2")):
        for other in (other for other in AGAINST if other in found):
            cells = []
            for corpus in data.CORPORA:
                part = of(corpus, found[name])
                cells.append(accuracy(part, found[other]).signed if part else "-")
            rows.append([f"{name} - {other}", *cells, pearson(found[name], found[other]).signed])
    return common.markdown_table(["accuracy, by corpus", *data.CORPORA, "Pearson, all"], rows)


def rates_table(plan: Plan, lines: Mapping[str, Record], full: bool) -> str:
    """Development loss by learning rate, of the full or of the short runs; of the settings that are compared also the
    means over two seeds, at the best rate."""
    found = {name: losses[full] for name in plan.chosen() if len(losses := sweeps(plan, name, lines)[0]) > full}
    places, rows = sorted({i for losses in found.values() for i in losses}), []
    for name, losses in found.items():
        cells = [f"{losses[i]:.3f}" if i in losses else "" for i in places]
        make = plan.develop if full else plan.attempt
        seeds = (make(name, best_rate(losses), seed).key for seed in range(2))
        both = [lines[key] for key in seeds if key in lines]
        told = ["", ""]
        if len(both) == 2:
            score = 50 * statistics.fmean(r["accuracy"] + r["pearson"] for r in both)
            told = [f"{statistics.fmean(r['loss'] for r in both):.4f}", f"{score:.2f}"]
        rows.append([name, *cells, *told])
    header = [f"development loss, {plan.steps if full else plan.try_steps} steps", *(f"{rate(i):g}" for i in places)]
    return common.markdown_table([*header, "2 seeds", "(accuracy + Pearson) / 2"], rows)


def pairs_table(lines: Mapping[str, Record]) -> str:
    """Development runs from the same A at LoRA's rate: loss, score, and both minus those of LoRA r=2, seed by seed."""
    found: dict[str, dict[int, Record]] = {}
    for r in lines.values():
        if r["side"] == "development" and r["start"] == "shared":
            found.setdefault(r["method"], {})[r["seed"]] = r
    rows = []
    for name, records in found.items():
        common_ = [s for s in records if s in found.get("LoRA r=2", {})]
        cells = [len(records)]
        for score, digits in ((lambda r: r["loss"], 4), (lambda r: 50 * (r["accuracy"] + r["pearson"]), 2)):
            gaps = [score(records[s]) - score(found["LoRA r=2"][s]) for s in common_]
            error = f" ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.{digits}f}" if len(gaps) > 1 else ""
            mean = f"{statistics.fmean(gaps):+.{digits}f}{error}" if gaps and name != "LoRA r=2" else "-"
            cells += [f"{statistics.fmean(score(r) for r in records.values()):.{digits}f}", mean]
        rows.append([name, *cells])
    header = ["same start, development", "seeds", "loss", "- LoRA r=2", "(accuracy + Pearson) / 2", "- LoRA r=2"]
    return common.markdown_table(header, rows)


def diagnosis_table(lines: Mapping[str, Record]) -> str:
    """Measurements inside the model, at the start and after training."""
    found = [r for r in lines.values() if r["side"] == "diagnosis"]
    names = list(dict.fromkeys(name for r in found for name in r["before"]))
    rows = []
    for name in names:
        pairs = ((r["before"].get(name), r["after"].get(name)) for r in found)
        rows.append([name, *("-" if a is None else f"{a:.3g} → {b:.3g}" for a, b in pairs)])
    return common.markdown_table(["start → end", *(f"{r['method']}, rate {r['lr']:g}" for r in found)], rows)


def language_table(lines: Mapping[str, Record]) -> str:
    """Held-out perplexity of the language model, at the rate that is best on development."""
    found: dict[str, list[Record]] = {}
    for r in lines.values():
        if r["side"] == "language":
            found.setdefault(r["method"], []).append(r)
    best = {name: min(records, key=lambda r: r["loss"]) for name, records in found.items()}
    rows = []
    for name, r in best.items():
        held = np.array(r["held-out losses"])
        cells = [f"{r['adapter']:,}", f"{r['lr']:g}", f"{math.exp(r['loss']):.3f}", f"{math.exp(held.mean()):.3f}"]
        for other in AGAINST[:2]:
            gap = held - np.array(best[other]["held-out losses"]) if other in best else held
            error = gap.std(ddof=1) / math.sqrt(len(gap))
            cells.append(f"{gap.mean():+.4f} ± {error:.4f}" if other in best and other != name else "-")
        rows.append([name, *cells])
    header = ["SmolLM2-135M", "parameters", "rate", "development perplexity", "held-out perplexity"]
    return common.markdown_table([*header, *(f"loss - {other}" for other in AGAINST[:2])], rows)


def verdict(found: Judged) -> list[str]:
    """What the recommended setting reached, in words made from the numbers."""
    told = []
    for other in (other for other in ("AuroRA r=2", *AGAINST) if other in found and RECOMMENDED in found):
        gap = accuracy(found[RECOMMENDED], found[other])
        sigma = gap.mean / gap.error if gap.error else math.nan  # equal, hit by hit
        told.append(f"accuracy - that of {other}: {gap.signed} points, {sigma:+.1f} standard errors")
    lost = []
    for name in (name for name in found if name.startswith("AuroRA")):
        lora = f"LoRA {name.split()[1]}"  # of the same rank, "r=2"
        for score, label in ((accuracy, "accuracy"), (pearson, "Pearson")):
            gap = score(found[name], found.get(lora, {}))
            if gap.mean < -2 * gap.error:
                lost.append(f"{name} in {label} ({gap.signed})")
    return [
        f"Recommended setting ({RECOMMENDED}): {'; '.join(told) or 'not judged yet'}.",
        f"AuroRA loses to LoRA of the same rank by more than two standard errors: {', '.join(lost) or 'nowhere'}.",
    ]


def draw(path: Path, found: Judged) -> None:
    """Accuracy and Pearson minus those of LoRA r=2 with their errors, by method, those with few parameters below."""
    counts = {name: next(iter(records.values()))["adapter"] for name, records in found.items() if name != "head only"}
    names = sorted(counts, key=counts.__getitem__)
    with common.picture(path, columns=2, height=1 + 0.25 * len(names)) as axes:
        for axis, score, label in zip(axes, (accuracy, pearson), ("accuracy", "100 x Pearson"), strict=True):
            for i, name in enumerate(names):
                gap = score(found[name], found.get("LoRA r=2", {}))
                error = 0 if name == "LoRA r=2" or math.isnan(gap.error) else 100 * gap.error
                color = "C1" if name.startswith("AuroRA") else "C0" if "LoRA" in name else "C7"
                axis.errorbar(100 * gap.mean, i, xerr=error, fmt="o", color=color, capsize=2)
            axis.axvline(0, color="gray", lw=0.8)
            axis.set(xlabel=f"{label}, points above LoRA r=2, one standard error")
            axis.set_yticks(range(len(names)), [""] * len(names))
        axes[0].set_yticks(range(len(names)), [f"{name}, {counts[name]:,}" for name in names], fontsize="small")


def report(out: Path, plan: Plan, lines: Mapping[str, Record]) -> Path:
    """Write the tables and the picture from the lines."""
    found = judged(plan, lines)
    draw(out / "learning.png", found)
    parts = [explain(plan), *verdict(found), scores_table(found), losses_table(found)]
    parts += ["## The choice of rates and settings, on development", rates_table(plan, lines, True)]
    parts += [rates_table(plan, lines, False)]
    if any(r["side"] == "development" and r["start"] == "shared" for r in lines.values()):
        parts += [pairs_table(lines)]
    if any(r["side"] == "diagnosis" for r in lines.values()):
        parts += ["## Inside the model", diagnosis_table(lines)]
    if any(r["side"] == "language" for r in lines.values()):
        reading = (
            "All linear layers adapted, editorials, one seed, the same A for methods of a rank, each at the rate that "
            "is best on development. Loss in nats a token; the error of a difference counts held-out sequences, paired."
        )
        parts += ["## A language model", reading, language_table(lines)]
    return common.write_report(out, "learning", "What each method learns with its parameters", parts)


def explain(plan: Plan) -> str:
    """How to read the tables."""
    return (
        "All-MiniLM-L6-v2, query and value adapted, one head for class and rating, learns the four corpora mixed "
        f"({plan.steps} steps of {SIZE} texts, from at most {plan.texts:,} of a corpus) and is judged on the held-out "
        f"folds (at most {plan.held:,} of a corpus). Every method has alpha = 2 rank and the head's rate {HEAD_RATE:g} "
        "(where the name does not say otherwise, and the head is not all that trains), and by seed the same texts, "
        "batches and head. Its own rate is chosen on a development fold, all from one grid of four rates a decade: "
        f"{plan.try_steps} steps over every second rate, from 1e-3, 3e-3, 1e-2 outwards until "
        f"the best is inside; then {plan.steps} steps over every rate, from the best so far and the two below it, "
        "likewise. Accuracy and Pearson's correlation in percent, means over the corpora; the error of an accuracy "
        'counts texts (paired in differences) and seeds, that of Pearson\'s correlation seeds only. "try": settings '
        'that were only compared on development; "biases too": the adapted layers\' own biases train beside the '
        "adapter. On held-out texts all methods of a seed start with the same A."
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    quick = "a few methods, texts and steps, written to a folder `quick`"
    parser = common.sweep_parser("learning", __doc__, quick)
    parser.add_argument("--language", action="store_true", help="also SmolLM2-135M (needs the extra `language`)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Run what has no line yet, then print and write the report."""
    options = parse(argv)
    plan, out = (QUICK, options.out / "quick") if options.quick else (Plan(), options.out)
    path = out / "learning.jsonl"
    lines = common.perform(
        path, lambda lines: pending(plan, lines, options.language), perform, options.jobs, options.minutes
    )
    if not judged(plan, lines):
        raise common.BenchmarkError(f"{path} holds no run on held-out texts yet: give it more --minutes")
    written = report(out, plan, lines)
    print(f"{written.read_text(encoding='utf-8')}\nwritten to {written}")

"""The benchmark of learning quality on a tiny random encoder and made-up records: no network."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from test_benchmarks import WORDS, folder  # noqa: F401 (fixture)

import aurora
from benchmarks import learning
from benchmarks.lab import data, estimates, folds, methods, models, needs, records, settings, task
from benchmarks.lab.data import Snippet
from benchmarks.lab.methods import ENCODER, Sample
from benchmarks.lab.settings import (
    AGAINST,
    ANL,
    FINALIST,
    INSIDE,
    LANGUAGE,
    PAIRED,
    RECOMMENDED,
    SETTINGS,
)
from benchmarks.lab.training import rating_loss
from benchmarks.learning import Plan, Run

FEW = Plan(2, 24, 20, 1, 8, 6)


def corpus(name: str) -> list[Snippet]:
    """120 texts whose first word gives the rating away."""
    generator = torch.Generator().manual_seed(len(name))
    texts = []
    for i in range(120):
        words = [
            WORDS[4 * (i % 2)],
            *(WORDS[j] for j in torch.randint(12, (3,), generator=generator).tolist()),
        ]
        texts.append(Snippet(f"{name}{i}", (-1.0) ** i * (1 + i % 3), " ".join(words)))
    return texts


@pytest.fixture
def tiny(folder, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    loaded = models.load_encoder(folder)
    monkeypatch.setattr(models, "encoder", lambda: loaded)
    monkeypatch.setattr(data, "load", corpus)
    folds.sides.cache_clear()
    yield loaded
    folds.sides.cache_clear()


def reader(tiny) -> task.Reader:
    torch.manual_seed(0)
    return task.Reader(copy.deepcopy(tiny[0])).eval()


# --- folds ----------------------------------------------------------------------------------------


def ids(side: str, count: int) -> tuple[list[str], list[str]]:
    learn, judged = folds.sides(side, count, count)
    return learn, [id_ for part in judged.values() for id_ in part]  # type: ignore[return-value]


def test_the_folds_share_no_text_and_the_rates_are_chosen_without_the_held_out_one(
    tiny, monkeypatch
) -> None:
    monkeypatch.setattr(task, "tokenize", lambda tokenizer, snippets: [s.id for s in snippets])
    learn, development = ids("development", 500)
    also_learn, held_out = ids("held-out", 500)
    assert learn == also_learn
    folds = [set(learn), set(development), set(held_out)]
    assert sum(map(len, folds)) == len(set().union(*folds)) == 4 * 120
    assert all(len(fold) > 40 for fold in folds)


def test_a_smaller_fold_is_part_of_the_larger(tiny, monkeypatch) -> None:
    monkeypatch.setattr(task, "tokenize", lambda tokenizer, snippets: [s.id for s in snippets])
    small, large = (set(ids("held-out", n)[0]) for n in (20, 500))
    assert 20 < len(small) < 160
    assert small < large


# --- settings -------------------------------------------------------------------------------------


def test_the_table_is_plain_values_whose_words_are_known() -> None:
    for name, row in SETTINGS.items():
        assert name == row.name
        assert row.kind in methods.KINDS
        assert set(row.starts) <= set(methods.STARTS)
        parts = {FINALIST, PAIRED, AGAINST, INSIDE, LANGUAGE, settings.QUICK, settings.LONG}
        parts |= {settings.ABLATED}
        assert set(row.parts) <= parts
        json.dumps(dataclasses.asdict(row))
        if row.kind == "aurora":
            aurora.AuroraConfig(row.rank, **row.options)
    assert len(SETTINGS) == len(settings.JUDGED) + len(settings.TRIED)
    assert all(row.seeds for row in settings.JUDGED)
    assert not any(row.seeds for row in settings.TRIED)


def ready(model, name: str, seed: int | None = None) -> None:
    """The model prepared as the setting says, with a few texts."""
    learn, _ = folds.sides("development", 25, 5)
    sample = Sample(learn.inputs(64), learn.batches(8), rating_loss, learn.batches(8))
    methods.prepare(model, SETTINGS[name], ENCODER._replace(seed=seed), sample)


def prepared(tiny, name: str):
    model, (learn, _) = reader(tiny), folds.sides("development", 25, 5)
    ready(model, name)
    return model, methods.hidden_vectors(model, learn.inputs(64))


def test_hidden_vectors_are_a_x_without_padding(tiny) -> None:
    model, found = prepared(tiny, "AuroRA r=2")
    learn, _ = folds.sides("development", 25, 5)
    tokens = sum(int(b["attention_mask"].sum()) for b in learn.inputs(64))
    assert len(found) == 4
    assert all(z.shape == (2, tokens) for z in found.values())
    batch = learn.inputs(64, 64)[0]
    states = model.encoder.embeddings(batch["input_ids"])[batch["attention_mask"].bool()]
    first = next(iter(found))
    one = torch.sort(first.A @ states.t(), 1)[0]
    torch.testing.assert_close(torch.sort(found[first], 1)[0], one)


@pytest.mark.parametrize(
    "name", ["try identity", "try identity, grid +-2", "try identity, grid from data"]
)
def test_identity_is_the_identity_inside_the_grid(tiny, name: str) -> None:
    _, found = prepared(tiny, name)
    for layer in found:
        low, high = layer.config.grid_range
        z = torch.linspace(low, high, 50).expand(2, -1)
        torch.testing.assert_close(layer.anl.columns(z), z, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["try linear beyond the grid", "try linear beyond the grid, summed"]
)
def test_linear_beyond_the_grid_is_the_identity_everywhere_and_learns(tiny, name: str) -> None:
    _, found = prepared(tiny, name)
    for layer in found:
        z = torch.linspace(-9, 9, 50).expand(2, -1)
        torch.testing.assert_close(layer.anl.columns(z, 2.0), 2 * z)
        layer.anl.columns(z).sum().backward()
        assert layer.anl.spline_weight.grad.abs().max() > 0


def test_a_grid_from_data_covers_nearly_all_hidden_values(tiny) -> None:
    _, found = prepared(tiny, "try per-channel, grid from data")
    for layer, z in found.items():
        beyond = (z.abs() > layer.config.grid_range[1]).double().mean()
        assert beyond <= 0.002
        assert (z.abs() > 0.9 * layer.config.grid_range[1]).any()


def test_normalised_hidden_values(tiny) -> None:
    for z in prepared(tiny, "try identity, z normalised")[1].values():
        torch.testing.assert_close(z.square().mean(1).sqrt(), torch.full((2,), 0.5))


def test_every_group_has_its_rate_and_every_parameter_one_group(tiny) -> None:
    for name, setting in SETTINGS.items():
        model = reader(tiny)
        ready(model, name)
        groups = methods.groups(model, setting, 1e-3)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(rates) == sum(len(g["params"]) for g in groups) == len(trained)
        for n, p in trained.items():
            head = n.startswith("head.") and name != "head only"
            fast = 10.0 if setting.rates.get(ANL) == 10.0 else None
            if head:
                assert rates[id(p)] == methods.HEAD_RATE
            elif fast and n.endswith("spline_weight"):
                assert rates[id(p)] == pytest.approx(fast * 1e-3)
            elif n.endswith(".A"):
                assert rates[id(p)] == 1e-3


def test_the_recommended_setting_is_what_the_package_offers(tiny) -> None:
    model, setting = reader(tiny), SETTINGS[RECOMMENDED]
    ready(model, RECOMMENDED)
    ours = {p: g["lr"] for g in methods.groups(model, setting, 1e-3) for p in g["params"]}
    for group in aurora.parameter_groups(model, 1e-3):
        adapters = [p for p in group["params"] if p not in set(model.head.parameters())]
        assert adapters
        assert {ours[p] for p in adapters} == {group["lr"]}
    z = torch.linspace(-1, 1, 9).expand(2, -1)
    for layer in aurora.core.layers(model).values():
        torch.testing.assert_close(layer.anl.columns(z), z, atol=1e-5, rtol=0)


def test_a_shared_start_is_the_same_a_for_every_method_and_rank(tiny) -> None:
    found = {}
    for name in ("LoRA r=2", "LoRA r=8", "AuroRA r=2", RECOMMENDED, "PEFT LoRA r=2"):
        for seed in (None, 3):
            model = reader(tiny)
            ready(model, name, seed)
            found[name, seed] = [
                p
                for n, p in model.named_parameters()
                if n.endswith((".A", "lora_A.default.weight"))
            ]
    for name in ("LoRA r=8", "AuroRA r=2", RECOMMENDED, "PEFT LoRA r=2"):
        for A, reference in zip(found[name, 3], found["LoRA r=2", 3], strict=True):
            assert torch.equal(A[:2], reference)
            assert 0.9 < A.abs().max() * A.shape[1] ** 0.5 <= 1
        assert not torch.equal(found[name, None][0][:2], found[name, 3][0][:2])
    assert not torch.equal(found["LoRA r=2", 3][0], found["LoRA r=2", 3][1])


def test_pefts_lora_learns_what_ours_does(tiny) -> None:
    runs = [
        Run("held-out", name, 1e-2, "all", 0, 5, 20, 20, "shared")
        for name in ("LoRA r=2", "PEFT LoRA r=2")
    ]
    ours, theirs = map(learning.perform, runs)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours["loss"] != learning.perform(runs[0]._replace(seed=1))["loss"]


def test_peft_trains_the_same_number_as_our_lora(tiny) -> None:
    count = []
    for name in ("LoRA r=2", "PEFT LoRA r=2"):
        model = reader(tiny)
        ready(model, name)
        count.append(
            sum(
                p.numel()
                for n, p in model.named_parameters()
                if p.requires_grad and "head" not in n
            )
        )
    assert count[0] == count[1] > 0


def test_a_look_gives_lora_and_aurora_the_same_start_and_head(tiny) -> None:
    found = {}
    for name in ("LoRA r=2", "LoRA r=2, gradient", "AuroRA r=2, gradient"):
        model = reader(tiny)
        ready(model, name, 0)
        found[name] = dict(model.named_parameters())
    plain, lora, ours = found.values()
    heads = [n for n in plain if n.startswith("head.")]
    rows = [n for n in lora if n.endswith(".A")]
    assert len(rows) == 4
    for n in rows + heads:
        torch.testing.assert_close(lora[n], ours[n])
        assert not torch.equal(lora[n], plain[n])
    assert all(not p.any() for n, p in lora.items() if n.endswith(".B"))
    assert all(p.grad is None for p in lora.values())
    trained = [[n for n, p in some.items() if p.requires_grad] for some in (lora, plain)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("name", ["EVA r=2", "LoRA-GA r=2"])
def test_starts_of_peft_keep_the_function(tiny, name: str) -> None:
    model = reader(tiny)
    tokens = torch.arange(1, 9).view(2, 4)
    before = model.encoder(tokens).last_hidden_state
    ready(model, name, 0)
    adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}
    rows = [p for n, p in adapter.items() if "lora_A" in n]
    assert len(rows) == 4
    plain = reader(tiny)
    ready(plain, "PEFT LoRA r=2", 0)
    drawn = [p for n, p in plain.named_parameters() if "lora_A" in n]
    assert not any(torch.equal(a, b) for a, b in zip(rows, drawn, strict=True))
    learned = not all(not p.any() for n, p in adapter.items() if "lora_B" in n)
    assert learned == (name == "LoRA-GA r=2")  # which takes its start out of the weights again
    torch.testing.assert_close(model.encoder(tokens).last_hidden_state, before)
    assert all(p.requires_grad and p.grad is None for p in adapter.values())
    assert not any(hasattr(m, "_peft_loraga_grad") for m in model.modules())
    assert sum(p.numel() for p in adapter.values()) == sum(
        p.numel() for n, p in plain.named_parameters() if "lora_" in n
    )


def test_padding_has_no_say_in_the_start(tiny) -> None:
    learn, _ = folds.sides("development", 25, 5)
    tokens = [some[: 3 + i % 4] for i, some in enumerate(learn.tokens[:12])]
    texts, starts = task.Texts(tokens, learn.ratings[:12], learn.pad), []
    for size in (1, 12):
        model = reader(tiny)
        aurora.inject(model, ENCODER.targets, 2, train=methods.HEAD)
        for layer in aurora.core.layers(model).values():
            torch.manual_seed(0)
            layer.reset_parameters()
        with aurora.start_from_gradient(model):
            for batch in texts.batches(size):
                outputs = model(batch.input_ids, batch.attention_mask)
                (outputs - batch.ratings[:, None]).square().sum().backward()
        starts.append([layer.A for layer in aurora.core.layers(model).values()])
    for alone, padded in zip(*starts, strict=True):
        torch.testing.assert_close(alone, padded, rtol=1e-3, atol=1e-4)


def test_a_start_is_paid_for_with_steps(tiny, monkeypatch) -> None:
    monkeypatch.setattr(methods, "WARM", 2)
    monkeypatch.setattr(methods, "LOOKED", 3)
    monkeypatch.setattr(methods, "COSTS", {"head warmed": 2, "gradient": 3})
    seen, steps = [], []
    real, train = learning.rating_loss, learning.train
    monkeypatch.setattr(learning, "rating_loss", lambda *a: seen.append(0) or real(*a))

    def counted(*args, **options):
        steps.append(options["steps"])
        return train(*args, **options)

    monkeypatch.setattr(learning, "train", counted)
    for name in ("LoRA r=2", "LoRA r=2, gradient", "AuroRA r=32 fixed"):
        learning.perform(Run("development", name, 1e-2, "all", 0, 8, 20, 20))
    assert steps == [8, 3, 3]
    assert len(seen) == 2 * 5


def test_fixed_projections_train_the_core_alone(tiny) -> None:
    model, found = prepared(tiny, "AuroRA r=32 fixed")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.endswith((".anl.H", ".anl.spline_weight")) or "head" in n for n in trained)
    for z in found.values():  # on other texts than those of the look
        assert 0.1 < z.square().mean() < 5


def test_biases_train_where_they_are_asked_for_and_only_there(tiny) -> None:
    for name in ("LoRA r=2, biases too", "LoRA r=2"):
        model = reader(tiny)
        ready(model, name)
        trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
        assert len(trained) == (
            5 if "biases" in name else 1
        )  # query and value of two layers, and the head


# --- one run --------------------------------------------------------------------------------------


def test_a_run_repeats_to_the_digit_and_its_line_says_what_it_was(tiny) -> None:
    run = Run("held-out", "AuroRA r=2", 1e-2, "all", 0, 3, 20, 20)
    one, two = learning.perform(run), learning.perform(run)
    same = [key for key in one if key != "seconds"]
    assert [one[key] for key in same] == [two[key] for key in same]
    assert one["run"] == run.key
    assert one["method"] == "AuroRA r=2"
    assert one["adapter"] == 4 * (2 * 64 + 20)
    hits = [scores["hits"] for scores in one["corpora"].values()]
    assert list(one["corpora"]) == list(data.CORPORA)
    assert one["accuracy"] == pytest.approx("".join(hits).count("1") / len("".join(hits)))
    for scores in one["corpora"].values():
        assert scores["accuracy"] == pytest.approx(scores["hits"].count("1") / len(scores["hits"]))
    assert learning.perform(run._replace(seed=1))["loss"] != one["loss"]


def test_diagnosis_measures_shares_and_gradients(tiny) -> None:
    record = learning.perform(Run("diagnosis", "AuroRA r=2", 1e-2, "all", 0, 3, 30, 20))
    for when in ("before", "after"):
        shares = [record[when][name] for name in ("constant", "linear", "nonlinear")]
        assert sum(shares) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in shares)
    assert (
        record["before"]["B size"] == record["before"]["anl.H gradient"] == 0
    )  # B = 0 blocks what lies behind it
    assert record["before"]["B gradient"] > 0
    assert record["after"]["anl.H gradient"] > 0


# --- all runs -------------------------------------------------------------------------------------


def lines_of(
    losses: dict[int, float], name: str = "LoRA r=2", full: bool = False, plan: Plan = FEW
) -> dict:
    make = plan.develop if full else plan.attempt
    runs = {make(name, learning.rate(i)): loss for i, loss in losses.items()}
    return {run.key: {"run": run.key, **run._asdict(), "loss": loss} for run, loss in runs.items()}


VALLEY = {-12: 2.0, -10: 1.0, -8: 2.0}  # 1e-3, 3e-3, 1e-2
NARROW = {-12: 3.0, -11: 2.0, -10: 3.0}
BROAD = {i: 2.0 + abs(i + 10) for i in range(-13, -6)}


def rates(needed: list[Run]) -> list[float]:
    return [run.lr for run in needed]


def test_a_sweep_goes_outwards_until_the_best_rate_is_inside() -> None:
    assert rates(learning.sweeps(FEW, "LoRA r=2", {})[1]) == [1e-3, 3e-3, 1e-2]
    down = lines_of({-12: 1.0, -10: 2.0, -8: math.nan})
    assert rates(learning.sweeps(FEW, "LoRA r=2", down)[1]) == [3e-4]
    up = lines_of({-12: 3.0, -10: 2.0, -8: 1.0})
    assert rates(learning.sweeps(FEW, "LoRA r=2", up)[1]) == [3e-2]
    found, needed = learning.sweeps(FEW, "try identity", lines_of(VALLEY, "try identity"))
    assert (found, needed) == ([VALLEY], [])  # what is only tried has no runs of full length


def test_full_length_starts_from_what_the_short_runs_found_and_goes_on_likewise() -> None:
    short = lines_of(VALLEY)
    found, needed = learning.sweeps(FEW, "LoRA r=2", short)
    assert found == [VALLEY]
    assert rates(needed) == [1e-3, 1.8e-3, 3e-3]
    assert all(run.steps == FEW.steps and run.side == "development" for run in needed)
    low = short | lines_of({-12: 1.0, -11: 2.0, -10: 3.0}, full=True)
    assert rates(learning.sweeps(FEW, "LoRA r=2", low)[1]) == [5.6e-4]
    assert learning.sweeps(FEW, "LoRA r=2", short | lines_of(NARROW, full=True)) == (
        [VALLEY, NARROW],
        [],
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sweep_stops_at_the_ends_of_the_grid(sign: int) -> None:
    lines: dict = {}
    for full in (False, True):
        for _ in range(20):
            found, needed = learning.sweeps(FEW, "LoRA r=2", lines)
            if len(found) > full or not needed:
                break
            lines |= {run.key: {**run._asdict(), "loss": sign * run.lr} for run in needed}
    end = {1: 1e-5, -1: 1e-1}[sign]
    assert [
        learning.best_rate(losses) for losses in learning.sweeps(FEW, "LoRA r=2", lines)[0]
    ] == [end, end]


def test_nothing_is_judged_before_its_rate_is_known_nor_twice() -> None:
    plan = FEW._replace(names=("LoRA r=2", "LoRA r=1"))
    first = list(learning.pending(plan, {}))
    assert [run.method for run in first] == 3 * ["LoRA r=2"] + 3 * [
        "LoRA r=1"
    ]  # those with the most seeds first
    assert all(run.side == "development" for run in first)
    lines = lines_of(VALLEY) | lines_of(NARROW, full=True)
    runs = list(learning.pending(plan, lines))
    assert runs[:3] == first[3:]
    held = [run for run in runs if run.side == "held-out"]
    assert {run.lr for run in held} == {1.8e-3}
    assert [run.seed for run in held] == [0, 1, 2, 3, 4]
    assert len({run.key for run in runs}) == len(runs)
    lines |= {held[0].key: {"run": held[0].key, **held[0]._asdict()}}
    assert held[0] not in list(learning.pending(plan, lines))


def test_settings_that_are_tried_are_never_judged_on_held_out_texts() -> None:
    lines: dict = {}
    for name in SETTINGS:
        lines |= lines_of(VALLEY, name) | lines_of(BROAD, name, full=True)
    held = {run.method for run in learning.pending(FEW, lines) if run.side == "held-out"}
    assert held == {row.name for row in settings.JUDGED}


def test_a_longer_setting_trains_longer_and_the_others_as_they_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longer = dataclasses.replace(SETTINGS["LoRA r=2"], name="LoRA r=2, longer", length=4)
    monkeypatch.setitem(SETTINGS, longer.name, longer)
    for make in (FEW.attempt, FEW.develop, FEW.judge):
        usual, long = (make(name, 1e-3, 0) for name in ("LoRA r=2", longer.name))
        assert long == usual._replace(method=longer.name, steps=4 * usual.steps)


def test_long_runs_are_asked_for_at_two_rates_and_judged_at_the_better() -> None:
    lines = lines_of(VALLEY) | lines_of(BROAD, full=True)  # the best is 3e-3

    def asked() -> list[Run]:
        found = learning.pending(FEW, lines, long=True)
        return [run for run in found if run.side == "long"]

    def perform(runs: list[Run], loss: float) -> None:
        scores = {name: {"hits": "0101", "pearson": 0.5} for name in data.CORPORA}
        found = {"loss": loss, "accuracy": 0.5, "pearson": 0.25, "adapter": 7, "corpora": scores}
        lines.update({run.key: {"run": run.key, **run._asdict(), **found} for run in runs})

    assert not any(run.side == "long" for run in learning.pending(FEW, lines))
    both = asked()
    told = [(run.method, run.lr, run.seed, run.steps) for run in both]
    assert told == [("LoRA r=2", 1e-3, 0, 1000), ("LoRA r=2", 3e-3, 0, 1000)]
    perform(both[:1], 0.9)
    perform(both[1:], 1.0)
    rest = [(run.method, run.lr, run.seed) for run in asked()]
    gradient = "LoRA r=2, gradient"  # at LoRA's rate
    each = [(name, 1e-3, seed) for seed in range(5) for name in ("LoRA r=2", gradient)]
    assert rest == each[1:]
    perform(asked(), 0.8)
    assert asked() == []
    found = learning.judged_long(FEW, lines)
    assert {name: len(records_) for name, records_ in found.items()} == {
        "LoRA r=2": 20,  # four corpora, five seeds
        gradient: 20,
    }
    table = learning.long_table(FEW, lines)
    assert table.count("0.8000") == 9
    assert "| 0.001 |    0 | 0.9000 |    50.00" in table


def test_ablations_are_compared_with_what_they_change_one_thing_of(monkeypatch) -> None:
    names = (learning.STARTED, "gradient, 3 cells", learning.FIXED, "fixed r=32, ridge 1")
    plan, lines = learning.Plan(names=names), {}
    monkeypatch.setattr(learning, "chosen_rate", lambda *_: 1e-3)
    for i, name in enumerate(names):
        assert learning.unchanged(name) == names[i - i % 2]
        for seed in range(3):
            run = plan.ablate(name, 1e-3, seed)
            scores = {"loss": 1 + i + i * seed / 10, "accuracy": 0.5 + i / 100, "pearson": 0.25}
            lines[run.key] = {"run": run.key, **run._asdict(), **scores, "adapter": 7}
    table = learning.ablations_table(plan, lines)
    for name in names[1::2]:
        row = next(row for row in table.splitlines() if name in row)
        assert "+1.1000 ± 0.0577" in row
    assert table.count("+1.00 ± 0.00") == 2
    del lines[run.key]  # a seed is missing
    assert "ridge 1" not in learning.ablations_table(plan, lines)


def test_the_language_model_is_asked_for_at_many_rates_then_with_many_seeds() -> None:
    lines: dict = {}

    def asked() -> list[Run]:
        found = learning.pending(FEW, lines, language=True)
        return [run for run in found if run.side == "language"]

    def perform(run: Run) -> None:
        seed = run.seed + ("AuroRA" in run.method)
        found = {"loss": abs(math.log(run.lr / 3e-3)), "adapter": 7}
        found |= {"held-out losses": [1.0 + seed, 2.0 + seed]}
        lines[run.key] = {"run": run.key, **run._asdict(), **found}

    assert not any(run.side == "language" for run in learning.pending(FEW, {}))
    names = settings.taking_part(LANGUAGE)
    swept = {SETTINGS[name].rate_of or name for name in names}
    assert {run.method for run in asked()} == swept
    assert {run.lr for run in asked()} == {1e-3, 3e-3, 1e-2}
    for run in asked():
        perform(run)
    for name in names:
        seeds = [run.seed for run in asked() if run.method == name]
        assert seeds == ([1, 2] if name in swept else [0, 1, 2])
    for run in asked():
        assert run.lr == 3e-3
        perform(run)
    assert asked() == []
    table = learning.language_table(lines)
    row = next(line for line in table.splitlines() if "AuroRA r=2, gradient" in line)
    assert [cell.strip() for cell in row.split("|")][2:5] == ["7", "0.003", "3"]
    assert row.count("+1.0000 ± 0.0000") == 2  # a nat above either LoRA, in every sequence and seed


def test_rates_are_written_as_one_would() -> None:
    assert [learning.rate(i) for i in range(-12, -3)] == [
        1e-3,
        1.8e-3,
        3e-3,
        5.6e-3,
        1e-2,
        1.8e-2,
        3e-2,
        5.6e-2,
        1e-1,
    ]
    assert (learning.rate(learning.LOWEST), learning.rate(learning.HIGHEST)) == (1e-5, 1e-1)


# --- the report -----------------------------------------------------------------------------------


def record(corpus: str, seed: int, hits: str, pearson: float) -> dict:
    return {
        "adapter": 100,
        "lr": 1e-3,
        "corpus": corpus,
        "seed": seed,
        "pearson": pearson,
        "hits": hits,
    }


def test_errors_count_texts_and_seeds() -> None:
    ours = {
        ("tweets", s): record("tweets", s, hits, 0.5) for s, hits in enumerate(["1101", "1001"])
    }
    theirs = {
        ("tweets", s): record("tweets", s, hits, 0.4) for s, hits in enumerate(["1001", "1000"])
    }
    gap = estimates.accuracy(ours, theirs)
    texts = np.array([[0, 1, 0, 0], [0, 0, 0, 1]])
    expected = texts.mean(0).var(ddof=1) / 4 + texts.mean(1).var(ddof=1) / 2
    assert gap.mean == pytest.approx(0.25)
    assert gap.error == pytest.approx(math.sqrt(expected))
    assert estimates.accuracy(ours).mean == pytest.approx(0.625)
    assert estimates.pearson(ours, theirs).mean == pytest.approx(0.1)


def test_a_mean_over_corpora_has_the_error_of_a_mean() -> None:
    one = {("tweets", 0): record("tweets", 0, "1100", 0.5)}
    both = one | {("movies", 0): record("movies", 0, "1100", 0.5)}
    assert estimates.accuracy(both).error == pytest.approx(
        estimates.accuracy(one).error / math.sqrt(2)
    )


def test_only_runs_that_both_have_are_compared() -> None:
    ours = {("tweets", s): record("tweets", s, "11", 0.5) for s in (0, 1)}
    theirs = {("tweets", 1): record("tweets", 1, "10", 0.5)}
    assert estimates.accuracy(ours, theirs).mean == 0.5
    assert math.isnan(estimates.accuracy(ours, {}).mean)


def made_up(plan: Plan, worse: bool) -> dict:
    """Lines of a whole benchmark, in which AuroRA is far worse than the others, or far better."""
    good, bad, lines = "1" * 60 + "0" * 20, "1" * 30 + "0" * 50, {}
    for name in plan.names:
        lines |= lines_of(VALLEY, name, plan=plan) | lines_of(NARROW, name, full=True, plan=plan)
        hits = bad if worse == name.startswith("AuroRA") else good
        for seed in range(3):
            run = plan.judge(name, 1.8e-3, seed)
            scores = {
                corpus: {"hits": hits, "pearson": 0.5, "accuracy": 0.5} for corpus in data.CORPORA
            }
            lines[run.key] = {"run": run.key, **run._asdict(), "adapter": 100, "corpora": scores}
            run, loss = (
                plan.pair(name, 1.8e-3, seed),
                0.8 + 0.1 * seed + 0.05 * name.startswith("AuroRA"),
            )
            known = {"loss": loss, "accuracy": 0.8, "pearson": 0.7}
            lines[run.key] = {"run": run.key, **run._asdict(), **known}
    return lines


@pytest.mark.parametrize("worse", [False, True])
def test_the_report_says_whether_aurora_loses(tmp_path, worse: bool) -> None:
    plan = FEW._replace(names=("LoRA r=2", "LoRA r=8", "AuroRA r=2", RECOMMENDED, "try identity"))
    text = learning.report(tmp_path, plan, made_up(plan, worse)).read_text(encoding="utf-8")
    told = next(line for line in text.splitlines() if line.startswith("AuroRA loses"))
    assert ("nowhere" in told) != worse
    assert ("-37.50" if worse else "+37.50") in text
    assert (tmp_path / "learning.png").stat().st_size > 1000
    assert "| LoRA r=2 " in text
    assert "| try identity " in text
    row = next(
        line for line in text.splitlines() if line.startswith("| AuroRA r=2 ") and "+0.0500" in line
    )
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["3", "0.9500", "+0.0500 ± 0.0000"]


def test_the_command_goes_on_from_its_lines_and_says_when_there_are_none(tmp_path, capsys) -> None:
    arguments = ["--quick", "--minutes", "0", "--out", str(tmp_path)]
    with pytest.raises(needs.BenchmarkError, match="give it more --minutes"):
        learning.main(arguments)
    for line in made_up(learning.QUICK_PLAN, worse=True).values():
        records.append(tmp_path / "quick" / "learning.jsonl", line)
    learning.main(arguments)
    assert "AuroRA loses to LoRA of the same rank" in capsys.readouterr().out
    assert (tmp_path / "quick" / "learning.md").is_file()


# --- lines and processes --------------------------------------------------------------------------


def test_a_line_cut_off_by_a_crash_is_done_again(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    records.append(path, {"run": "a", "x": 1})
    with path.open("a") as file:
        file.write('{"run": "b", "x"')
    assert list(records.read(path)) == ["a"]
    records.append(path, {"run": "b", "x": 2})
    assert records.read(path)["b"] == {"run": "b", "x": 2}


def square(n: int) -> dict:
    return {"run": str(n), "square": n * n}


def test_runs_are_done_once_at_most_in_time_and_go_on_later(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    records.append(path, {"run": "1", "square": -1})

    def pending(lines):
        return (n for n in range(4) if str(n) not in lines)

    assert list(records.perform(path, pending, square, jobs=2, minutes=0)) == ["1"]
    found = records.perform(path, pending, square, jobs=2)
    assert {int(run): r["square"] for run, r in found.items()} == {0: 0, 1: -1, 2: 4, 3: 9}

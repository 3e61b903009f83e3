"""The benchmark `curves`, on small worlds made here: a bend that is known, a model that is drawn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import aurora
from benchmarks import curves
from benchmarks.curves import ratings, runs, stack, swap, tones
from benchmarks.curves.chain import Task, chain, identity
from benchmarks.curves.contenders import CONTENDERS, PLACES, Choice, Situation
from benchmarks.curves.report import CHOSEN, cell, duels, findings, rows_of, with_chosen_rank
from benchmarks.curves.runs import Run
from benchmarks.curves.stack import Objective, Pace, Stack


def bent(z: torch.Tensor) -> torch.Tensor:
    """A dead zone."""
    return z.sign() * (z.abs() - 0.5).clamp(min=0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Task:
    """A drawn model (4-16-16-2) whose third input goes through a dead zone."""
    torch.manual_seed(0)
    model, read = chain(4, 16, 16, 2), torch.eye(4)[2:3]
    for layer in (model.first, model.middle, model.last):
        layer.weight.data.mul_(3)
    sides = []
    for count in (400, 500):
        x = torch.randn(count, 4)
        changed = x + (bent(x @ read.t()) - x @ read.t()) @ read
        sides.append((x, model(changed).detach()))
    task = Task(model, sides[0], sides[1], read, read)
    monkeypatch.setattr(runs, "find", lambda *_: task)
    return task


def prepared(task: Task, method: str, place: str, choice: Choice | None = None) -> nn.Module:
    x, y = (side[:64] for side in task.pool)
    choice = choice or CONTENDERS[method].choices[0]
    at = Situation(copy.deepcopy(task.base), PLACES[place], x, y, task.read, task.write, choice)
    return CONTENDERS[method].prepare(at)


# --- Training side by side ------------------------------------------------------------------------


def test_a_stack_trains_as_each_model_would_alone() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2)]
    x, y = torch.randn(2, 20, 3), torch.randn(2, 20, 2)
    rates, decay = torch.tensor([0.01, 0.003]), torch.tensor([0.0, 0.3])
    pace = Pace(40, 100, rates, decay, torch.zeros(2, 0), {r"0\.": 0.5})
    errors = Stack([Objective(model) for model in models]).train(x, y, pace).errors(x, y)
    for k, model in enumerate(models):
        groups = [
            {"params": model[0].parameters(), "lr": 0.5 * rates[k].item()},
            {"params": model[2].parameters(), "lr": rates[k].item()},
        ]
        adam = torch.optim.AdamW(groups, weight_decay=decay[k].item())

        def share(i: int) -> float:
            return min((i + 1) / 2, (40 - i) / 39)

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, share)
        for _ in range(40):
            adam.zero_grad()
            (model(x[k]) - y[k]).square().mean().backward()
            adam.step()
            schedule.step()
        alone = (model(x[k]) - y[k]).square().mean()
        torch.testing.assert_close(errors[k], alone.detach(), rtol=1e-3, atol=1e-5)


def test_what_became_no_number_is_never_chosen() -> None:
    model = nn.Linear(2, 1)
    found = Stack([Objective(model), Objective(copy.deepcopy(model))])
    found.trained["model.weight"][1] = torch.nan
    errors = found.errors(torch.ones(3, 2), torch.ones(3, 1))
    assert errors[0].isfinite()
    assert errors.argmin() == 0
    assert errors[1] == torch.inf


# --- Contenders -----------------------------------------------------------------------------------


# A warp replaces an identity layer, so that it stands in front only.
PLACED = [(method, "front") for method in CONTENDERS]
PLACED += [(method, "first") for method in CONTENDERS if not method.startswith("warp")]


@pytest.mark.parametrize(("method", "place"), PLACED)
def test_every_method_starts_at_the_base(world: Task, method: str, place: str) -> None:
    x = world.test[0]
    torch.testing.assert_close(prepared(world, method, place)(x), world.base(x))


@pytest.mark.parametrize(
    ("method", "place", "trained"),
    [
        ("AuroRA r=4", "front", 4 * 4 + 4 * 4 + 4 * 13),
        ("AuroRA r=4, with F", "front", 4 * 4 + 4 * 4 + 4 * 13 + 16),
        ("LoRA r=3", "first", 3 * (4 + 16)),
        ("ReLU 5", "front", 5 * (4 + 4) + 5),
        ("warp, told", "front", 13),
        ("warp, every input", "front", 4 * 13),
        ("biases", "all", 16 + 16 + 2),
        ("full", "all", 5 * 16 + 17 * 16 + 17 * 2),
    ],
)
def test_what_is_trained(world: Task, method: str, place: str, trained: int) -> None:
    model = prepared(world, method, place)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_size_counts_entries_of_a_and_columns_of_b(world: Task) -> None:
    model = prepared(world, "AuroRA r=2", "front")
    (layer,) = aurora.core.layers(model).values()
    with torch.no_grad():
        layer.A.fill_(-0.5)
        layer.B.zero_()
        layer.B[:2, 1] = torch.tensor([3.0, -4.0])
    assert aurora.lasso(model).item() == pytest.approx(0.5 * 8 + 5)


def test_a_turn_rotates_the_axes_and_keeps_what_they_span(world: Task) -> None:
    straight, turned = (
        next(iter(aurora.core.layers(prepared(world, "AuroRA r=2", "front", choice)).values())).A
        for choice in (Choice(0.05), Choice(0.05, turn=1))
    )
    assert not torch.allclose(straight, turned)
    torch.testing.assert_close(straight.t() @ straight, turned.t() @ turned)


# --- Runs -----------------------------------------------------------------------------------------


def test_aurora_finds_the_bend_where_lora_cannot(world: Task) -> None:
    ours = runs.perform(Run("swap", "x", "AuroRA r=2", "front", 128, draws=2, steps=300))
    told = runs.perform(Run("swap", "x", "warp, told", "front", 128, draws=2, steps=300))
    lora = runs.perform(Run("swap", "x", "LoRA r=3", "front", 128, draws=2, steps=300))
    assert max(ours["errors"]) < min(lora["errors"]) / 3
    assert max(told["errors"]) < min(lora["errors"]) / 10
    assert max(lora["errors"]) < lora["before"]
    assert ours["trained"] == 2 * (4 + 4 + 13)


def test_draws_are_parts_of_larger_ones_and_differ(world: Task) -> None:
    few, many = runs.draw(world, 10, 3)[0], runs.draw(world, 50, 3)[0]
    assert torch.equal(few, many[:, :10])
    assert not torch.equal(few[0], few[1])


# --- Worlds ---------------------------------------------------------------------------------------


def test_a_worn_motor_is_dead_and_saturates() -> None:
    assert swap.weak([-1.0, -0.3, 0.1, 0.5, 0.9]) == pytest.approx([-0.4, -0.1, 0, 0.3, 0.4])
    assert swap.compressed([-20.0, 5.0]) == pytest.approx([-20, 10])


def test_worlds_of_the_arm_are_the_engines_and_repeat() -> None:
    x, y = swap.collect(swap.REACHER, "", 60, seed=1)
    again, worn = (swap.collect(swap.REACHER, world, 60, seed=1) for world in ("", "motors"))
    assert x.shape == (60, 8)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    torch.testing.assert_close(x[:, :2].square() + x[:, 2:4].square(), torch.ones(60, 2))
    assert torch.equal(worn[0][0], x[0])  # the same start and the same command, another motion
    assert not torch.equal(worn[1][0], y[0])


@pytest.mark.parametrize("world", ["swimmer", "pusher", "cheetah"])
def test_other_machines_have_worn_motors_behind_a_gear(world: str) -> None:
    machine, axes = swap.WORLDS[world]
    x, y = swap.collect(machine, world, 60, seed=1)
    sound = swap.collect(machine, "", 60, seed=1)
    assert x.shape == (60, machine.width)
    assert y.shape == (60, len(machine.velocities))
    assert torch.equal(sound[0][0], x[0])
    assert not torch.equal(sound[1][0], y[0])
    torque = np.linspace(-1, 1, machine.torques)
    act = swap.worn(torque, axes)
    assert axes @ act == pytest.approx(swap.weak(axes @ torque))
    across = np.eye(machine.torques) - axes.T @ axes
    assert across @ act == pytest.approx(across @ torque)


def test_a_tone_curve_moves_luminance_alone() -> None:
    z = torch.rand(50, 3)
    read, write = tones.directions(z)
    torch.testing.assert_close(read @ write.t(), torch.ones(1, 1))
    assert (z @ read.t()).std().item() == pytest.approx(1)
    values = tones.tone(torch.linspace(0, 1, 11))
    assert values.min() >= 0
    assert values.max() <= 1


def test_the_head_is_the_ridge_solution() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 5, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    head = ratings.ridge(x.float(), y.float()).double()
    w = head.weight.squeeze().detach().requires_grad_()
    b = head.bias.detach().requires_grad_()
    loss = (x @ w + b - y).square().sum() + ratings.RIDGE * w.square().sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert gradient.abs().max() < 1e-2


def test_identity_layers_do_nothing_and_do_not_train() -> None:
    x = torch.randn(4, 3)
    assert torch.equal(identity(3)(x), x)
    assert not any(p.requires_grad for p in identity(3).parameters())


# --- The report -----------------------------------------------------------------------------------


def line(method: str, errors: list[float], place: str = "front", examples: int = 256) -> dict:
    run = Run("swap", "motors", method, place, examples)
    return {"run": run.key, **run._asdict(), "errors": errors, "trained": 9, "before": 1.0}


def test_leads_are_paired_and_told_methods_do_not_count() -> None:
    lines = [
        line("AuroRA r=4", [1.0, 2.0, 3.0]),
        line("full", [2.0, 3.0, 4.5], "all"),
        line("LoRA r=8", [0.9, 2.1, 3.1]),
        line("warp, told", [0.5, 0.5, 0.5]),
    ]
    (group,) = rows_of(lines).values()
    found = {duel.method: duel for duel in duels(group, ("AuroRA r=4", "front"))}
    assert set(found) == {"full", "LoRA r=8"}
    assert found["full"].lead == pytest.approx(7.0)  # gaps 1, 1, 1.5
    assert found["full"].ratio == pytest.approx(9.5 / 6)
    (told,) = findings(group, ("AuroRA r=4", "front"))
    assert "not ahead of all" in told
    assert "LoRA r=8, front" in told
    assert "4.00 times that of splines that are told" in told


def test_held_out_examples_choose_the_rank_draw_by_draw() -> None:
    lines = [
        line("AuroRA r=4", [1.0, 2.0, 3.0]) | {"held_out": [0.1, 0.5, 0.4], "trained": 9},
        line("AuroRA r=2", [5.0, 1.0, 7.0]) | {"held_out": [0.2, 0.3, 0.4], "trained": 5},
        line("AuroRA r=4", [1.0, 2.0], examples=64) | {"held_out": [0.1, 0.5]},  # alone
        line("full", [2.0, 3.0, 4.5], "all"),
    ]
    (group,) = rows_of(lines).values()
    chosen = with_chosen_rank(group)
    found = chosen[CHOSEN, "front"]
    assert set(found) == {256}
    assert found[256]["errors"] == [1.0, 1.0, 7.0]  # of a draw that is level, rank 2
    assert found[256]["trained"] == 9
    assert {duel.method for duel in duels(chosen, (CHOSEN, "front"))} == {"full"}
    without = {row: records_ for row, records_ in group.items() if row[0] != "AuroRA r=2"}
    assert with_chosen_rank(without) == without


def test_cells_show_mean_and_standard_error() -> None:
    assert cell(line("full", [1.0, 3.0]), 1.0) == "2.00 ± 1.00"
    assert cell(None, 1.0) == ""


def test_every_planned_run_has_a_contender_and_a_place() -> None:
    for run in (*curves.plan(more=True), *curves.plan(quick=True)):
        assert run.method in CONTENDERS
        assert run.place in PLACES
    keys = [run.key for run in curves.plan(more=True)]
    assert len(keys) == len(set(keys))
    assert stack.BETA_1 == 0.9

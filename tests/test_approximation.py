"""The benchmark of approximation error, on small maps whose answers are known: no network."""

from __future__ import annotations

import pytest
import torch
from test_benchmarks import folder  # noqa: F401 (fixture)

import aurora
from benchmarks import approximation
from benchmarks.approximation import Adapter, Points, Run
from benchmarks.lab import needs, records
from benchmarks.lab.models import load_encoder


def white(width: int, points: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose second moment is the identity, exactly."""
    q = torch.linalg.qr(approximation.gaussian(points, seed, width))[0]
    return q.t() * points**0.5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation, "WIDTH", 6)
    monkeypatch.setattr(approximation, "POINTS", 400)


@pytest.mark.parametrize("rank", [1, 3])
def test_best_linear_is_the_truncated_svd_on_white_inputs(rank: int) -> None:
    X, M = white(6, 200), approximation.gaussian(6, 1, 6)
    A, B = approximation.best_linear(Points(X, M @ X), rank)
    s = torch.linalg.svdvals(M)
    assert approximation.error(A @ X, B, M @ X) == pytest.approx(
        float(s[rank:].square().sum() / s.square().sum())
    )


def test_nothing_linear_beats_best_linear_on_inputs_that_are_not_white() -> None:
    X = approximation.gaussian(5, 0, 5) @ approximation.gaussian(5, 1, 300)
    X[4] = X[3]  # and not of full rank
    Y = torch.sin(approximation.gaussian(4, 2, 5) @ X)
    A, B = approximation.best_linear(Points(X, Y), 2)
    best = approximation.error(A @ X, B, Y)
    for seed in range(50):
        A_near = A + 0.1 * A.abs().mean() * approximation.gaussian(2, seed, 5)
        phi = A_near @ X
        B_near = approximation.solve(phi @ phi.t(), phi @ Y.t())
        assert approximation.error(phi, B_near, Y) >= best - 1e-12


@pytest.mark.parametrize("method", ["summed", "per-channel", "static", "MoSLoRA"])
def test_linear_maps_are_fitted_to_the_floor_and_never_below(small: None, method: str) -> None:
    record = approximation.perform(Run("linear", "decaying 1/i", "Gaussian", method, 2))
    assert record["LoRA"] * (1 - 1e-9) <= record["error"] <= record["LoRA"] * 1.01
    assert record["error"] == pytest.approx(record["fitted"])
    assert record["parameters"] == 2 * 12 + 4 + (0 if method == "MoSLoRA" else 16)


def test_a_tanh_teacher_is_learnt_where_no_linear_map_goes(small: None) -> None:
    record = approximation.perform(Run("nonlinear", "tanh teacher", "Gaussian", "per-channel", 2))
    assert record["equal rank"] == 4  # LoRA gets the rank that has at least as many parameters
    assert record["LoRA equal"] > 0.1
    assert record["error"] < record["LoRA equal"] / 10
    assert record["LoRA equal + bias"] <= record["LoRA equal"] * 1.1
    assert len(record["restarts"]) == approximation.RESTARTS
    assert min(record["restarts"]) == pytest.approx(record["fitted"], rel=1e-6)


def test_an_mlp_residual_has_no_linear_part(small: None) -> None:
    points, _ = approximation.teacher_points("MLP residual, 4 units", "Gaussian")
    A, B = approximation.best_linear(points, 6)
    assert approximation.error(A @ points.X, B, points.Y) == pytest.approx(1.0)


def test_the_gradient_is_that_of_the_error_with_the_best_b(small: None) -> None:
    points, _ = approximation.teacher_points("sine teacher", "Gaussian")
    torch.manual_seed(0)
    adapter = Adapter(6, 2, aurora.AuroraConfig(2))
    adapter.start(points, torch.zeros(2, 6, dtype=torch.float64), 3)

    def best(A: torch.Tensor) -> float:
        phi = adapter.anl.columns(A @ points.X)  # type: ignore[union-attr]
        return approximation.error(
            phi, approximation.solve(phi @ phi.t(), phi @ points.Y.t()), points.Y
        )

    with torch.no_grad():
        A, direction = adapter.A.clone(), approximation.gaussian(2, 5, 6)
        slope = (best(A + 1e-5 * direction) - best(A - 1e-5 * direction)) / 2e-5
        start = best(A)
    approximation.objective(adapter, points).backward()
    assert adapter.A.grad is not None
    assert float((adapter.A.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)
    assert approximation.objective(adapter, points).item() == pytest.approx(start, rel=1e-9)
    assert approximation.descend(adapter, points)[0] < start


def test_what_finetuning_changed_is_read_off_real_layers(
    folder,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "encoder.layer.1.attention.self.value"
    before, after = (load_encoder(folder)[0] for _ in range(2))
    with torch.no_grad():
        for p in after.encoder.layer.parameters():  # type: ignore[union-attr, operator]
            p.add_(0.05 * torch.randn_like(p))
    batch = {
        "input_ids": torch.randint(5, 17, (4, 7)),
        "attention_mask": torch.ones(4, 7, dtype=torch.long),
    }
    batch["attention_mask"][0, 3:] = 0
    monkeypatch.setattr(approximation, "finetuned", lambda: (before, after))
    monkeypatch.setattr(approximation, "texts", lambda: [[batch], [batch]])
    approximation.layer_points.cache_clear()
    update, _ = approximation.layer_points(name, "update")
    change, _ = approximation.layer_points(name, "change")
    approximation.layer_points.cache_clear()
    assert update.X.shape == (32, 4 * 7 - 4)  # no padding
    W = [m.get_submodule(name).weight.detach().double() for m in (before, after)]
    torch.testing.assert_close(update.Y, (W[1] - W[0]) @ update.X)
    seen = []
    hook = after.get_submodule(name).register_forward_hook(lambda _, x, out: seen.append(out))
    with torch.no_grad():
        after(**batch)
    hook.remove()
    base = W[0] @ update.X + before.get_submodule(name).bias.detach().double()[:, None]
    torch.testing.assert_close(
        change.Y + base, seen[0][batch["attention_mask"].bool()].double().t(), atol=1e-5, rtol=0
    )
    assert not torch.allclose(change.Y, update.Y, atol=1e-3)


def test_plan_has_every_question_and_no_run_twice() -> None:
    runs = approximation.plan(quick=False)
    assert len({run.key for run in runs}) == len(runs)
    assert {run.part for run in runs} == {"linear", "nonlinear", "grid", "update", "change"}
    grids = {(run.grid_size, run.spline_order) for run in runs if run.part == "grid"}
    assert grids == {(size, order) for size in (1, 2, 4, 8, 16, 32) for order in (1, 2, 3, 4)}
    assert set(approximation.plan(quick=True)) < set(runs)


def test_the_report_counts_what_the_records_say(
    small: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximation, "RESTARTS", 2)  # enough for a report
    monkeypatch.setattr(approximation, "ITERATIONS", 120)
    runs = [
        r for r in approximation.plan(quick=True) if r.target in ("tanh teacher", "decaying 2^-i")
    ]
    fits = [approximation.perform(run) for run in runs]
    grids = [Run("grid", "sine teacher", "Gaussian", "summed", 2, n) for n in (2, 4)]
    fits += [{**fits[0], **run._asdict()} for run in grids]
    change = {"part": "change", "target": approximation.LAYERS[0], "converged": False}
    fits += [{**fits[0], **change}]
    text = approximation.report(tmp_path, fits).read_text(encoding="utf-8")
    assert "10 times less error than LoRA's best in 1 of 1" in text
    assert f"of {len(fits)} fits" in text
    assert "*" in next(line for line in text.splitlines() if line.startswith("| change of 0.query"))
    assert (tmp_path / "approximation.png").stat().st_size > 1000


def test_the_command_goes_on_from_its_lines_and_says_when_there_are_none(
    small: None, tmp_path, capsys
) -> None:
    arguments = ["--quick", "--minutes", "0", "--out", str(tmp_path)]
    with pytest.raises(needs.BenchmarkError, match="give it more --minutes"):
        approximation.main(arguments)
    run = Run("linear", "decaying 1/i", "Gaussian", "MoSLoRA", 2)
    records.append(tmp_path / "approximation.jsonl", approximation.perform(run))
    approximation.main(arguments)
    assert f"1 of {len(approximation.plan(quick=False))} fits" in capsys.readouterr().out

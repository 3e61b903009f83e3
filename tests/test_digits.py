"""The benchmark on scikit-learn's digits: its sides, one short run of each kind, its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import digits
from benchmarks.lab import records
from benchmarks.lab.needs import BenchmarkError


def test_the_two_halves_are_all_images_each_once() -> None:
    low, high = digits.halves()
    assert (len(low[1]), len(high[1])) == (901, 896)
    assert set(low[1].tolist()) == set(high[1].tolist()) == set(range(5))
    assert low[0].shape == (901, 1, 8, 8)
    assert (low[0].min(), low[0].max()) == (-1, 1)


def test_it_learns_the_digits_from_0_to_4() -> None:
    model = digits.pretrained(0, 60)
    images, wanted = digits.halves()[0]
    with torch.no_grad():
        assert (model(images).argmax(1) == wanted).float().mean() > 0.6


def short(method: str, lr: float = 1e-2, seed: int = 0) -> records.Record:
    return digits.perform(digits.Run(method, lr, seed, 5, 60))


def test_every_method_trains_what_its_name_says() -> None:
    found = {method: short(method) for method in digits.METHODS}
    ours = 8 * (2 * (64 + 64) + 20)  # eight layers: A, B; H, spline weights
    assert found["AuroRA r=2"]["adapter"] == ours
    assert found["LoRA r=2"]["adapter"] == 8 * 2 * (64 + 64)
    assert found["head only"]["adapter"] == 0
    assert {len(line["hits"]) for line in found.values()} == {496}
    assert short("AuroRA r=2") == found["AuroRA r=2"]


def test_the_report_takes_each_methods_rate_from_development(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="holds no run"):
        digits.main(["--report", "--out", str(tmp_path)])
    line = short("LoRA r=2")
    for seed in (0, 1):
        for lr, loss, hits in ((1e-3, 0.5, "0011"), (1e-2, 0.2, "0111"), (1e-1, 0.9, "1111")):
            for method in ("LoRA r=2", "AuroRA r=2"):
                run = digits.Run(method, lr, seed)
                own = {"run": run.key, **run._asdict(), "loss": loss, "hits": hits}
                records.append(tmp_path / "digits.jsonl", line | own | {"machine": "here"})
    digits.main(["--report", "--out", str(tmp_path)])
    text = (tmp_path / "digits.md").read_text(encoding="utf-8")
    row = next(part for part in text.splitlines() if part.startswith("| AuroRA r=2 "))
    assert "0.01 |" in row
    assert "75.00" in row
    assert "+0.00" in row
    assert "here" in text
    assert (tmp_path / "digits.png").exists()

"""Parameters of the paper's models, counted to the digit on real architectures without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import aurora
from benchmarks import parameters
from benchmarks.lab.baselines import inject_lora
from benchmarks.lab.needs import BenchmarkError

CASES = {case.name: case for case in parameters.CASES}

# Model, its own parameters (without task head), layers adapted, AuroRA at rank 2, LoRA at the
# paper's rank.
TABLE = [
    ("RoBERTa-base", 124_645_632, 24, 74_208, 294_912),
    ("RoBERTa-large", 355_359_744, 48, 197_568, 786_432),
    ("ViT-base", 86_389_248, 24, 74_208, 589_824),
    ("ViT-large", 304_351_232, 48, 197_568, 1_572_864),
    ("LLaMA-3-8B", 7_504_924_672, 160, 3_542_144, 56_623_104),
]


@pytest.mark.parametrize(
    ("name", "total", "layers", "ours", "lora"), TABLE, ids=[row[0] for row in TABLE]
)
def test_the_papers_counts_to_the_digit(
    name: str, total: int, layers: int, ours: int, lora: int
) -> None:
    case = CASES[name]
    model = case.build()
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == total
    done = aurora.inject(model, case.targets, rank=2)
    assert (len(done.layers), done.trainable, done.total) == (layers, ours, total + ours)
    assert sum(p.numel() for p in aurora.parameters(model)) == ours
    aurora.remove(model)
    assert len(inject_lora(model, case.targets, case.lora_rank)) == layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora


def test_the_benchmark_counts_what_inject_trains() -> None:
    counted = parameters.count(CASES["ViT-base"], ranks=(2, 16))
    assert (counted.model, counted.layers) == (86_389_248, 24)
    assert counted.trainable["AuroRA"] == {2: 74_208, 16: 24 * (16 * 1536 + 16 * 16 + 16 * 8)}
    assert counted.trainable["LoRA"] == {2: 73_728, 16: 589_824}
    assert counted.trainable["MoSLoRA"] == {2: 73_728 + 24 * 4, 16: 589_824 + 24 * 256}


def test_sdxl_attention() -> None:
    counted = parameters.count(CASES["SDXL UNet"], ranks=(2,))
    assert (counted.model, counted.layers) == (2_567_463_684, 560)
    assert counted.trainable["AuroRA"][2] == counted.trainable["LoRA"][2] + 560 * 20


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"config\.json"):
        parameters.from_folder(str(tmp_path), "query")

"""The benchmark of merging on a tiny random encoder and made-up records: no network."""

import json

import pytest
import torch
from test_benchmarks import TARGETS, folder, table  # noqa: F401 (fixtures)

import aurora
from benchmarks import merging
from benchmarks.lab import data, records, task
from benchmarks.lab.models import load_encoder


@pytest.fixture(scope="module")
def adapted(folder):  # noqa: F811
    torch.manual_seed(0)
    model = task.Reader(load_encoder(folder)[0]).eval()
    aurora.inject(model, TARGETS, 2, train=r"^head\.")
    for layer in aurora.core.layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 17, (24, 9), generator=generator)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
    ]
    return model, batches


@pytest.mark.parametrize("method", merging.MERGED)
def test_every_method_merges_and_calibration_is_nearest(adapted, method):
    import copy

    model, batches = adapted
    merged = copy.deepcopy(model)
    merging.merge(merged, method, batches)
    assert not any(isinstance(m, aurora.AuroraLinear) for m in merged.modules())
    static = copy.deepcopy(model)
    merging.merge(static, "static", batches)
    with torch.no_grad():
        target, got, papers = (
            torch.cat([m(**b) for b in batches]) for m in (model, merged, static)
        )
    if method not in ("static", "linear", merging.NO_DATA):
        assert (got - target).norm() < 0.7 * (papers - target).norm()


def test_compare_is_paired_and_leaves_the_model_dynamic(adapted):
    model, batches = adapted

    def judge(m):
        return torch.cat([m(**b) for b in batches]).double()

    found = merging.compare(model, judge, batches, merging.MERGED)
    assert found["units"] == 24
    assert found["off"] != found["dynamic"] != found["static"]
    assert found["dynamic"] == pytest.approx(judge(model).mean(0).tolist())
    assert found["calibrated, paired error"][0] < found["static, paired error"][0]
    assert set(merging.MERGED) < set(found)


def record(off, dynamic, calibrated):
    same = {m: [calibrated, -0.5] for m in merging.merging.METHODS}
    return {"off": [off, -0.7], "dynamic": [dynamic, -0.4], **same}


def test_gain_kept_is_a_ratio_of_means_with_its_error():
    runs = [record(0.5, 0.7, 0.68), record(0.5, 0.9, 0.88), record(0.6, 0.8, 0.8)]
    share, error = merging.kept(runs, "calibrated", 0)
    assert share == pytest.approx((0.18 + 0.38 + 0.2) / (0.2 + 0.4 + 0.2))
    assert 0 < error < 0.1
    exact = merging.kept([record(0.5, 0.7, 0.7), record(0.5, 0.9, 0.9)], "calibrated", 0)
    assert exact == pytest.approx((1, 0))


def test_lines_are_read_back_and_a_torn_one_does_not_count(tmp_path):
    path = tmp_path / "merging.jsonl"
    assert records.read(path) == {}
    path.write_text(
        json.dumps({"run": "a", "off": [1.0]}) + "\n" + '{"run": "b", "off', encoding="utf-8"
    )
    assert list(records.read(path)) == ["a"]


def test_the_plan_names_every_run_once():
    keys = [run.key for run in merging.plan(quick=False)]
    assert len(keys) == len(set(keys))
    for corpus in data.CORPORA:
        assert sum(key.startswith(f"MiniLM {corpus} ") for key in keys) == 2 * 3

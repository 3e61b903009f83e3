"""Saving and loading: everything comes back, nothing half-written, nothing executed."""

import copy
import json
import os
import pickle
import stat
import struct

import pytest
import torch
from torch import nn

import aurora
from aurora import core

safetensors = pytest.importorskip("safetensors.torch")


def make_model(seed: int = 0, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.ModuleDict({"query": nn.Linear(width, 8), "value": nn.Linear(8, 8)})
    return nn.Sequential(body["query"], nn.Tanh(), nn.ModuleDict(body)["value"], nn.Linear(8, 3))


def trained(seed: int = 0, train: str | None = r"3\.", **options) -> nn.Module:
    model = make_model()
    aurora.inject(model, r"^[02]$", train=train, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in aurora.parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))

CONFIGS = [
    {},
    {"rank": 3, "alpha": 7.5, "spline": "per-channel"},
    {"mode": "static", "grid_size": 9, "grid_range": (-2.0, 3.0)},
    {"fixed": False, "spline_order": 2},
    {"learnable": False, "activation": "sigmoid", "dropout": 0.1},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_a_fresh_model_gets_everything_back(tmp_path, options):
    model = trained(**options).eval()
    aurora.save(model, tmp_path / "a.safetensors")
    fresh = make_model().eval()
    assert not torch.equal(fresh(X), model(X))
    aurora.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(X), model(X))
    assert {n: layer.config for n, layer in core.layers(fresh).items()} == {
        n: layer.config for n, layer in core.layers(model).items()
    }
    trains = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in model.named_parameters() if p.requires_grad}


def test_layers_of_different_options(tmp_path):
    model = make_model()
    aurora.inject(model, r"^0$", rank=2)
    aurora.inject(model, r"^2$", rank=5, spline="per-channel", train=r"^3\.bias")
    for layer in core.layers(model).values():
        nn.init.normal_(layer.B)
    aurora.save(model, tmp_path / "a.safetensors")
    fresh = make_model()
    aurora.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(X), model(X))
    assert [layer.config.rank for layer in core.layers(fresh).values()] == [2, 5]


def test_hot_swap_keeps_objects_and_optimizer(tmp_path):
    model, other = trained(0), trained(1)
    aurora.save(other, tmp_path / "b.safetensors")
    before = aurora.parameters(model)
    addresses = [p.data_ptr() for p in before]
    aurora.load(model, tmp_path / "b.safetensors")
    assert all(p is q for p, q in zip(before, aurora.parameters(model), strict=True))
    assert addresses == [p.data_ptr() for p in before]
    assert torch.equal(model(X), other(X))


def test_loading_into_a_half_precision_base_and_a_compiled_model(tmp_path):
    model = trained(train=None).eval()
    aurora.save(model, tmp_path / "a.safetensors")
    half = make_model().to(torch.bfloat16).eval()
    aurora.load(half, tmp_path / "a.safetensors")
    assert all(p.dtype == torch.float32 for p in aurora.parameters(half))
    for name, tensor in aurora.adapter_state_dict(half).items():
        assert torch.equal(tensor, aurora.adapter_state_dict(model)[name])
    assert half(X.bfloat16()).dtype == torch.bfloat16
    wrapped = torch.compile(make_model(), backend="eager")
    aurora.load(wrapped, tmp_path / "a.safetensors")
    assert torch.equal(wrapped(X), model(X))


def snapshot(model: nn.Module):
    return {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def unchanged(model: nn.Module, before) -> bool:
    now = dict(model.named_parameters())
    same = now.keys() == before.keys()
    return same and all(
        now[n] is p and (p.is_meta or torch.equal(p, value)) and p.requires_grad == required
        for n, (p, value, required) in before.items()
    )


def refused(model: nn.Module, path, match: str, error=ValueError) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        aurora.load(model, path)
    assert unchanged(model, before)
    noted = any("_aurora_train" in m.__dict__ for m in model.modules())
    assert not noted or any(isinstance(m, aurora.AuroraLinear) for m in model.modules())


def test_another_rank_names_both_and_the_way_out(tmp_path):
    aurora.save(trained(rank=4), tmp_path / "a.safetensors")
    refused(
        trained(rank=2),
        tmp_path / "a.safetensors",
        r"rank 4 in the file, 2 in the model[\s\S]*aurora.remove\(model\)",
    )
    model = trained(rank=2)
    aurora.remove(model)
    aurora.load(model, tmp_path / "a.safetensors")
    assert next(iter(core.layers(model).values())).config.rank == 4


def test_misfits_are_listed(tmp_path):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(), path)
    refused(make_model(width=7), path, r"0: 12 -> 8 in the file, 7 -> 8 in the model")
    refused(nn.Sequential(nn.Linear(12, 8), nn.Tanh()), path, r"2: missing in the model")
    refused(
        nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.ReLU(), nn.Linear(8, 3)),
        path,
        "2: not a linear layer",
    )
    refused(
        nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8)),
        path,
        r"3\.weight: trained in the file, missing",
    )
    refused(
        nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)),
        path,
        r"3\.weight: shape",
    )
    other = make_model()
    aurora.inject(other, r"^0$", train=r"3\.")
    refused(other, path, "2: adapted in the file only")
    refused(trained(train=None), path, r"3\.weight: trained in one of the two only")
    refused(trained(alpha=3.0), path, "alpha 4.0 in the file, 3.0 in the model")
    refused(make_model().to("meta"), path, "meta")
    refused(make_model(), tmp_path / "absent", "absent", FileNotFoundError)


def rewrite(source, target, *, tensors=None, **changes) -> None:
    with safetensors.safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["aurora"]) | changes
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.save_file(held | (tensors or {}), target, {"aurora": json.dumps(header)})


HOSTILE = {
    "version": ({"version": 2}, "format version 2"),
    "no layers": ({"layers": {}}, "names no layer"),
    "huge rank": ({"configs": [{"rank": 10**15, "grid_range": [-1, 1]}]}, r"0\.A: shape"),
    "huge grid": (
        {"configs": [{"grid_size": 10**15, "grid_range": [-1, 1]}]},
        "grid_size must be an int from 1 to 10,000",
    ),
    "unknown option": ({"configs": [{"code": "import os", "grid_range": [-1, 1]}]}, "code"),
    "alpha beyond floats": (
        {"configs": [{"alpha": 10**400, "grid_range": [-1, 1]}]},
        "cannot be read",
    ),
    "unhashable option": ({"configs": [{"fixed": [], "grid_range": [-1, 1]}]}, "fixed"),
    "index": ({"layers": {"0": [12, 8, 5]}}, "cannot be read"),
    "not a list": ({"configs": 3}, "cannot be read"),
    "another layer": (
        {"layers": {"0": [12, 8, 0], "2": [8, 8, 0], "9": [1, 1, 0]}},
        "9: missing in the model",
    ),
    "regex in a name": ({"layers": {".*": [12, 8, 0]}}, "missing in the model"),
    "unnamed tensors": ({"train": []}, r"3\.bias: shape \(3,\), expected no such tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    aurora.save(trained(), tmp_path / "a.safetensors")
    changes, match = HOSTILE[case]
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **changes)
    refused(make_model(), tmp_path / "b.safetensors", match)


def test_hostile_tensors_and_bytes(tmp_path):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    aurora.save(trained(), path)
    rewrite(path, bad, tensors={"extra": torch.zeros(1)})
    refused(make_model(), bad, "extra: shape .1,., expected no such tensor")
    rewrite(path, bad, tensors={"0.A": torch.zeros(3, 12)})
    refused(make_model(), bad, r"0\.A: shape \(3, 12\), expected \(2, 12\)")
    data = path.read_bytes()
    for size in (0, 4, 60, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        refused(make_model(), bad, "not a safetensors file, or a damaged one")
    bad.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    refused(make_model(), bad, "damaged")
    safetensors.save_file({"x": torch.zeros(1)}, bad)
    refused(make_model(), bad, "not one that aurora.save wrote")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    refused(make_model(), tmp_path / "bomb", "not a safetensors file")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((tmp_path / "bomb").read_bytes())  # the bomb is live
    assert (tmp_path / "exploded").exists()


def test_a_layer_that_cannot_be_injected_leaves_the_model_as_it_was(tmp_path):
    source = nn.Sequential(nn.ModuleDict({"out_proj": nn.Linear(4, 4)}), nn.Linear(4, 4))
    aurora.inject(source, r"^1$", rank=1)
    aurora.inject(source, r"out_proj", rank=2)
    aurora.save(source, tmp_path / "a.safetensors")
    attends = nn.Sequential(nn.MultiheadAttention(4, 1), nn.Linear(4, 4))
    refused(attends, tmp_path / "a.safetensors", "bypasses its adapter")


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = trained(0)
    aurora.save(model, path)
    old = path.read_bytes()

    def crash(*_):
        raise OSError("the disk is gone")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, crash)
            with pytest.raises(OSError, match="the disk is gone"):
                aurora.save(trained(1), path)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    aurora.save(trained(1), path)
    assert path.read_bytes() != old
    if os.name == "posix":
        plain = tmp_path / "plain"
        plain.touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        aurora.save(make_model(), tmp_path / "a")
    model = make_model().to("meta")
    aurora.inject(model, r"^0$")
    with pytest.raises(ValueError, match="meta"):
        aurora.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_tied_parameters_and_copies(tmp_path):
    model = trained(train=None)
    shared = nn.Sequential(model, model[0])  # one adapter under two names
    aurora.save(shared, tmp_path / "a.safetensors")
    fresh = make_model()
    aurora.load(fresh_pair := nn.Sequential(fresh, fresh[0]), tmp_path / "a.safetensors")
    assert fresh_pair[1] is fresh_pair[0][0]
    assert torch.equal(fresh_pair[0](X), model(X))
    copied = copy.deepcopy(fresh_pair)
    aurora.save(copied, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_numbers_of_other_libraries_become_plain_and_can_be_saved(tmp_path):
    import numpy as np

    config = aurora.AuroraConfig(
        alpha=np.float32(3), dropout=torch.tensor(0.0), grid_range=[torch.tensor(-2.0), 2]
    )
    assert (config.alpha, config.dropout, config.grid_range) == (3.0, 0.0, (-2.0, 2.0))
    assert {type(v) for v in (config.alpha, config.dropout, *config.grid_range)} == {float}
    model = make_model()
    aurora.inject(model, "0", config)
    aurora.save(model, tmp_path / "a.safetensors")
    aurora.load(make_model(), tmp_path / "a.safetensors")


def test_a_kept_norm_brings_its_running_statistics(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    model = build()
    aurora.inject(model, "^[02]$", train="^1")
    for seed in range(5):
        model(3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)) + 1)
    aurora.save(model.eval(), tmp_path / "a.safetensors")
    x = torch.randn(4, 6)
    for fresh in (build(), build()):
        aurora.load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh.eval()(x), model(x))
        assert fresh[1].num_batches_tracked == 5
        aurora.load(fresh, tmp_path / "a.safetensors")  # in place
    plain = build()
    aurora.inject(plain, "^[02]$", train="^1")
    parts = {
        name: tensor
        for name, tensor in aurora.adapter_state_dict(model).items()
        if "running" not in name
    }
    with pytest.raises(ValueError, match="running_mean"):
        aurora.load_adapter_state_dict(plain, parts)


def test_a_head_is_saved_from_whichever_part_is_asked(tmp_path):
    inner = nn.ModuleDict({"fc": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    outer = torch.compile(inner, backend="eager")
    aurora.inject(outer, "fc", train="head")
    assert list(aurora.adapter_state_dict(inner)) == list(aurora.adapter_state_dict(outer))
    assert "head.weight" in aurora.adapter_state_dict(inner)
    aurora.remove(inner)
    assert all(p.requires_grad for p in inner.parameters())
    assert not any("_aurora_train" in m.__dict__ for m in outer.modules())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32, torch.float8_e4m3fn])
def test_numbers_that_are_no_ordinary_floats_are_refused_before_anything_is_written(
    tmp_path, dtype
):
    path = tmp_path / "a.safetensors"
    source = trained()
    aurora.save(source, path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["0.anl.H"] = torch.ones(2, 2).to(dtype)
    safetensors.save_file(tensors, path, metadata)
    for model in (make_model(), trained(seed=1)):
        refused(model, path, "0.anl.H: torch.* cannot be an adapter's")


def test_layers_that_are_one_in_the_model_are_not_loaded_as_two(tmp_path):
    path = tmp_path / "a.safetensors"
    source = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    aurora.inject(source, "a|b")
    aurora.save(source, path)
    one = nn.Linear(4, 4)
    refused(nn.ModuleDict({"a": one, "b": one}), path, "b: the same layer as a")

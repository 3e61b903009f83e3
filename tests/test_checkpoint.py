"""Saving and loading: everything comes back, or nothing is touched."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import disturb, everything, interrupted_at_every_line, make_model, refused, trained
from torch import nn

import aurora
from aurora import core

DATA = Path(__file__).parent / "data"
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
    torch.testing.assert_close(wrapped(X), model(X))  # compiled, it rounds otherwise


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


def test_a_layer_that_cannot_be_injected_leaves_the_model_as_it_was(tmp_path):
    source = nn.Sequential(nn.ModuleDict({"out_proj": nn.Linear(4, 4)}), nn.Linear(4, 4))
    aurora.inject(source, r"^1$", rank=1)
    aurora.inject(source, r"out_proj", rank=2)
    aurora.save(source, tmp_path / "a.safetensors")
    attends = nn.Sequential(nn.MultiheadAttention(4, 1), nn.Linear(4, 4))
    refused(attends, tmp_path / "a.safetensors", "bypasses its adapter")


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
    assert not any("_aurora" in m.__dict__ for m in outer.modules())


def test_layers_that_are_one_in_the_model_are_not_loaded_as_two(tmp_path):
    path = tmp_path / "a.safetensors"
    source = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    aurora.inject(source, "a|b")
    aurora.save(source, path)
    one = nn.Linear(4, 4)
    refused(nn.ModuleDict({"a": one, "b": one}), path, "b: the same layer as a")


# ---- What comes back, and what is said ------------------------------------------------------


def test_load_says_what_it_did(tmp_path):
    aurora.save(trained(), tmp_path / "a.safetensors")
    done = aurora.load(make_model(), tmp_path / "a.safetensors")
    assert (done.layers, done.train) == (("0", "2"), ("3.weight", "3.bias"))
    assert (done.left, done.merged) == ((), ())
    assert str(done) == f"loaded 2 adapted layers and 2 other tensors from {tmp_path}/a.safetensors"


def test_fixed_projections_come_back_from_the_file(tmp_path):
    model = make_model()
    aurora.inject(model, "^0$", init="zero", projections="fixed")
    disturb(model)
    aurora.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(99)
    for fresh in (make_model(), make_model()):
        fresh.load_state_dict(make_model().state_dict())
        aurora.load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh(X), model(X))
        assert not fresh[0].A.requires_grad
        assert fresh[0].anl.H.requires_grad


def test_options_that_matter_in_training_only_may_differ(tmp_path):
    aurora.save(trained(dropout=0.5), tmp_path / "a.safetensors")
    model = trained(seed=1, init="zero")
    aurora.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(X), trained().eval()(X))
    assert core.layers(model)["0"].config.init == "zero"


def small() -> nn.Module:
    """What the files of release 0.1.0 in data/ were made over."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            steps = torch.arange(1.0 + i, 1 + i + p.numel(), dtype=torch.float64)
            p.copy_(steps.cos().view(p.shape))
    return model.eval()


def test_files_of_release_0_1_0_load():
    known = json.loads((DATA / "adapter-0.1.0.json").read_text())
    bare, injected = small(), small()
    config = aurora.AuroraConfig(3, 5.0, spline="per-channel", init="identity")
    aurora.inject(injected, "^0$", train="^3")
    aurora.inject(injected, "^2$", config)
    x = torch.arange(24.0).cos().view(4, 6)
    for model in (bare, injected):
        assert aurora.load(model, DATA / "adapter-0.1.0.safetensors").layers == ("0", "2")
        outputs = torch.tensor(known["outputs"])
        torch.testing.assert_close(model(x), outputs, rtol=1e-5, atol=1e-5)
    assert core.layers(bare)["2"].config.dropout == 0.25


def test_state_dicts_of_release_0_1_0_load():
    keys = json.loads((DATA / "adapter-0.1.0.json").read_text())["state_dict"]
    assert "0.base.weight" in keys
    source, fresh = small(), make_model(width=6)
    aurora.load(source, DATA / "adapter-0.1.0.safetensors")
    now = source.state_dict()
    old = {key: now[key.replace(".base", "")] for key in keys}
    fresh = small()
    aurora.load(fresh, DATA / "adapter-0.1.0.safetensors")
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    assert str(fresh.load_state_dict(old)) == "<All keys matched successfully>"
    assert all(torch.equal(t, now[name]) for name, t in fresh.state_dict().items())
    layer = aurora.AuroraLinear(nn.Linear(6, 5), 2)  # the whole model is a layer
    layer.load_state_dict({k.removeprefix("0."): v for k, v in old.items() if k[0] == "0"})
    assert torch.equal(layer.weight, source[0].weight)


def test_a_state_dict_has_the_options_and_is_checked_against_them():
    source, state = trained(alpha=5.0), trained(alpha=5.0).state_dict()
    assert not any("extra" in name for name in aurora.adapter_state_dict(source))
    with pytest.raises(RuntimeError, match=r"0.anl: alpha is 5.0 in the state dict, 4.0 here"):
        trained().load_state_dict(state)
    trained(alpha=5.0, dropout=0.5).load_state_dict(state)
    without = {name: t for name, t in state.items() if "_extra_state" not in name}
    trained(alpha=5.0).load_state_dict(without)  # of 0.1.0, or of a tool that keeps floats only
    key, plain = "0.anl._extra_state", state["0.anl._extra_state"]
    trained(alpha=5.0).load_state_dict(state | {key: plain.float()})  # an average of equal ones
    for odd in (torch.zeros(3), torch.tensor(1), torch.full((9,), math.inf), plain[:-1], plain + 1):
        with pytest.raises(RuntimeError, match=r"0\.anl: its options cannot be read"):
            trained(alpha=5.0).load_state_dict(state | {key: odd})
    options = json.loads(bytes(plain.tolist()))
    del options["mode"]  # whose default is ours
    part = torch.tensor(list(json.dumps(options).encode()))
    with pytest.raises(RuntimeError, match=r"0\.anl: its options are not all given"):
        trained(alpha=5.0).load_state_dict(state | {key: part})
    with torch.device("meta"):
        assert trained(alpha=5.0).state_dict()[key].device.type == "cpu"


def test_averages_of_models_keep_the_options():
    model = trained()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for seed in range(3):
        disturb(model, phase=seed)
        average.update_parameters(model)
    fresh = trained(seed=5)
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh(X), average(X))


# ---- Folders and full checkpoints -----------------------------------------------------------


@pytest.mark.parametrize("name", ["new/", "new/deep/", "there", "there/"])
def test_a_folder_is_saved_into_and_loaded_from(tmp_path, name):
    (tmp_path / "there").mkdir()
    model, folder = trained(), f"{tmp_path}/{name}"
    aurora.save(model, folder)
    assert [p.name for p in Path(folder).iterdir()] == ["aurora_adapter.safetensors"]
    done = aurora.load(fresh := make_model(), folder)
    assert done.path == Path(folder) / "aurora_adapter.safetensors"
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_checkpoint_has_the_base_and_the_adapter(tmp_path, sharded):
    model, base = trained(alpha=7.0), make_model()
    base[3].load_state_dict(model[3].state_dict())
    write_checkpoint(model, tmp_path, sharded)
    state = {}
    for file in tmp_path.glob("*.safetensors"):
        state |= load_file(file)
    assert {name: state[name] for name in base.state_dict()}.keys() == base.state_dict().keys()
    fresh = make_model(seed=3)
    missing = fresh.load_state_dict(state, strict=False).missing_keys  # what from_pretrained does
    assert missing == []
    assert torch.equal(fresh(X), base(X))
    assert aurora.load(fresh, tmp_path).layers == ("0", "2")
    assert torch.equal(fresh(X), model(X))
    injected = trained(seed=2, alpha=7.0)
    objects = aurora.parameters(injected)
    done = aurora.load(injected, tmp_path)  # brings the head too, which this model keeps
    assert done.train == ("3.weight", "3.bias")
    assert torch.equal(injected(X), model(X))
    assert all(a is b for a, b in zip(objects, aurora.parameters(injected), strict=True))
    refused(trained(), tmp_path, "alpha 7.0 in the file, 4.0 in the model")


def write_checkpoint(
    model, folder: Path, sharded: bool = False, change=lambda state: state
) -> None:
    """What save_pretrained writes."""
    state = change({name: t.contiguous() for name, t in model.state_dict().items()})
    if not sharded:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(state, key=lambda name: name[::-1])  # a layer's tensors in several files
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({n: t for n, t in state.items() if places[n] == place}, folder / place)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)


def test_an_adapter_file_is_preferred_and_what_is_no_checkpoint_refused(tmp_path):
    refused(make_model(), tmp_path, "neither aurora_adapter.safetensors nor", FileNotFoundError)
    write_checkpoint(make_model(), tmp_path)
    refused(make_model(), tmp_path, "aurora.save did not write it, nor has it a state dict's")
    write_checkpoint(trained(0), tmp_path)
    aurora.load(make_model(), tmp_path / "model.safetensors")
    aurora.save(trained(1), tmp_path)
    fresh = make_model()
    aurora.load(fresh, tmp_path)
    assert torch.equal(fresh[0].A, trained(1)[0].A)


def test_odd_checkpoints_are_refused(tmp_path):
    def case(match, change):
        write_checkpoint(trained(), tmp_path, change=change)
        refused(make_model(), tmp_path, match)

    key = "0.anl._extra_state"
    case("do not say their options", lambda s: {k: t for k, t in s.items() if "extra" not in k})
    case("has options, but no A and B", lambda s: {k: t for k, t in s.items() if k != "0.A"})
    for own in ("0.A", "0.B"):
        case("no A and B", lambda s, own=own: s | {own: s[own].flatten()})
    case("does not hold the options", lambda s: s | {key: torch.zeros(2, 2)})

    def long(n):  # JSON may end in spaces
        return lambda s: s | {key: nn.functional.pad(s[key], (0, n - len(s[key])), value=ord(" "))}

    case("does not hold the options", long(10_001))
    infinite = torch.full((9,), math.inf)
    case("does not hold the options", lambda s: s | {key: infinite})
    write_checkpoint(trained(), tmp_path, change=long(10_000))
    aurora.load(make_model(), tmp_path)
    case("every option must be given", lambda s: s | {key: torch.tensor(list(b"{}")).byte()})
    case(r"0.anl.H: shape missing", lambda s: {k: t for k, t in s.items() if k != "0.anl.H"})
    case(r"0.anl.H: shape \(3, 3\)", lambda s: s | {"0.anl.H": torch.zeros(3, 3)})
    case(r"0: 12 -> 9 in the file", lambda s: s | {"0.B": torch.zeros(9, 2)})
    case(r"0.A: NaN or infinity", lambda s: s | {"0.A": torch.full((2, 12), math.nan)})
    case("stands there twice", lambda s: s | {"_orig_mod.0.A": s["0.A"].clone()})
    (tmp_path / "model.safetensors").unlink()
    for names in ({"x": "../model.safetensors"}, {"x": 3}, {}, [], {"x": "/etc/passwd"}):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
        refused(make_model(), tmp_path, "outside of its folder|maps no tensors")
    index.write_text('{"weight_map": {"x": "absent.safetensors"}}')
    refused(make_model(), tmp_path, "absent.safetensors", FileNotFoundError)


def test_which_file_of_a_folder_is_read(tmp_path):
    model = trained(train=None)
    write_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "odd name.safetensors")
    fresh = make_model()
    assert aurora.load(fresh, tmp_path).layers == ("0", "2")
    assert torch.equal(fresh(X), model(X))
    index = tmp_path / "odd.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.A": "odd name.safetensors"}}))
    assert aurora.load(make_model(), index).layers == ("0", "2")
    aurora.save(model, tmp_path / "another.safetensors")
    refused(make_model(), tmp_path, "several safetensors files: name one of them")


def test_what_the_model_does_not_have_is_left_and_listed(tmp_path):
    model = trained(train=None)
    write_checkpoint(model, tmp_path)
    part = make_model()[:2]
    done = aurora.load(part, tmp_path)
    assert (done.layers, done.left) == (("0",), ("2",))
    assert str(done).endswith("left in the checkpoint, not in the model:\n  2")
    assert torch.equal(part(X), model[:2](X))
    refused(nn.Sequential(nn.Linear(12, 9)), tmp_path, "0: 12 -> 8 in the file, 12 -> 9")
    refused(nn.ModuleDict({"x": nn.Linear(3, 3)}), tmp_path, "its layers are not in the model")


def test_a_checkpoint_of_a_part_is_found_in_the_whole_and_the_other_way(tmp_path):
    model = trained(train=None)
    write_checkpoint(model, tmp_path)
    whole = nn.ModuleDict({"encoder": nn.ModuleDict({"model": make_model()})})
    assert aurora.load(whole, tmp_path).layers == ("encoder.model.0", "encoder.model.2")
    assert torch.equal(whole["encoder"]["model"](X), model(X))
    write_checkpoint(nn.ModuleDict({"bert": model}), tmp_path)
    fresh = make_model()
    assert aurora.load(fresh, tmp_path).layers == ("0", "2")
    assert torch.equal(fresh(X), model(X))
    two = nn.ModuleDict({"a": make_model(), "b": make_model()})
    write_checkpoint(model, tmp_path)
    refused(two, tmp_path, "several parts of the model; load into one of: a, b")
    write_checkpoint(torch.compile(model, backend="eager"), tmp_path)
    assert aurora.load(torch.compile(make_model(), backend="eager"), tmp_path).left == ()


def test_the_part_with_most_of_the_layers_is_taken(tmp_path):
    whole, part = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(n))) for n in (3, 2))
    model = copy.deepcopy(whole)
    aurora.inject(model, r"\d")
    write_checkpoint(model, tmp_path)
    fresh = nn.ModuleDict({"part": part, "whole": whole})
    assert aurora.load(fresh, tmp_path).layers == ("whole.0", "whole.1", "whole.2")


def test_layers_that_are_one_load_from_a_checkpoint_with_one_name_or_both(tmp_path):
    one = nn.Linear(12, 12)
    model = nn.ModuleDict({"a": one, "b": one})
    bare = copy.deepcopy(model)
    aurora.inject(model, "a")
    disturb(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for drop in ("c.", "a.", "b."):
        kept = {name: t for name, t in state.items() if not name.startswith(drop)}
        save_file(kept, tmp_path / "model.safetensors")
        fresh = copy.deepcopy(bare)
        assert aurora.load(fresh, tmp_path).layers == ("a",)
        assert torch.equal(fresh["b"](X), model["a"](X))
    save_file(state | {"b.A": torch.zeros(2, 12)}, tmp_path / "model.safetensors")
    refused(copy.deepcopy(bare), tmp_path, "a: one layer in the model, two in the checkpoint")


# ---- All or nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("injected", [False, True])
def test_an_interrupt_at_any_line_of_load_leaves_the_model_as_before_or_as_after(
    tmp_path, injected
):
    def build(seed):
        model = make_model()[2:]
        if seed is not None:
            aurora.inject(model, "^2$", train=r"^3\.bias")
            disturb(model, phase=seed)
        return model

    path, state = tmp_path / "a.safetensors", {}
    aurora.save(build(1), path)

    def prepare():
        model = build(0 if injected else None)
        state["before"] = everything(model)
        return model

    def check(model, finished):
        if everything(model) == state["before"]:
            assert not finished
            return
        after = {n: (p.tolist(), p.requires_grad) for n, p in build(1).named_parameters()}
        assert {n: (p.tolist(), p.requires_grad) for n, p in model.named_parameters()} == after
        assert list(core.layers(model)) == ["2"]

    planted = interrupted_at_every_line(prepare, lambda m: aurora.load(m, path), check)
    assert planted > 300


def test_an_interrupt_in_the_copying_leaves_the_values_as_before_or_as_after():
    state = aurora.adapter_state_dict(trained(1))
    after = {name: t.tolist() for name, t in state.items()}
    before = {name: t.tolist() for name, t in aurora.adapter_state_dict(trained(0)).items()}

    def check(model, finished):
        now = {name: t.tolist() for name, t in aurora.adapter_state_dict(model).items()}
        assert now in ([after] if finished else [before, after])

    def action(model):
        aurora.load_adapter_state_dict(model, state)

    assert interrupted_at_every_line(lambda: trained(0), action, check) > 100


@pytest.mark.parametrize("merge", [core.static_merge, aurora.merge])
def test_loading_onto_a_merged_model_says_so(tmp_path, merge):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(), path)
    model = trained()
    merge(model)
    with pytest.warns(
        UserWarning, match=r"adapter merged into them; this one adds to it:\n  0\n  2"
    ):
        done = aurora.load(model, path)
    assert done.merged == ("0", "2")
    assert "on top of weights that were merged before:\n  0\n  2" in str(done)
    again = trained()
    merge(again)
    again.load_state_dict(make_model().state_dict())  # the base's own weights again
    assert aurora.load(again, path).merged == ()


def test_after_an_unmerge_nothing_is_said(tmp_path):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(), path)
    model = trained()
    aurora.merge(model).unmerge()
    assert aurora.load(model, path).merged == ()


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(tmp_path):
    aurora.save(trained(), tmp_path / "a.safetensors")
    model = trained()
    core.static_merge(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("error", None, UserWarning, None, 0)])
        refused(model, tmp_path / "a.safetensors", "this one adds to it", UserWarning)

"""Several named adapters on one model: each must be what it is alone, and disturb no other."""

import contextlib
import copy
import pickle
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import disturb, everything, interrupted_at_every_line, is_at_once, make_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import aurora
from aurora import core

# Layers, ranks, modes and splines differ; "fr" has a head of its own, "it" a bias.
ADAPTERS = {
    "fr": (r"^[02]$", {"rank": 2, "train": r"^3\."}),
    "de": (r"^2$", {"rank": 3, "spline": "per-channel"}),
    "it": (r"^[02]$", {"rank": 1, "mode": "static", "train": r"^2\.bias"}),
    "es": (r"^0$", {"rank": 2, "fixed": False, "dropout": 0.5}),
}
EVERY = [*ADAPTERS, None]
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def alone(name: str | None) -> nn.Module:
    """The model with one adapter, by the functions for one."""
    model = make_model().eval()
    if name is not None:
        target, options = ADAPTERS[name]
        aurora.inject(model, target, **options)
        disturb(model, scale=0.9, phase=10.0 * len(name) + ord(name[0]))
    return model


@torch.no_grad()
def served(model, x=X) -> torch.Tensor:
    """As adapters are served: equal to the bit, however they got onto the model."""
    return model(x)


def outputs(x=X) -> dict[str | None, torch.Tensor]:
    return {name: served(alone(name), x) for name in EVERY}


ALONE = outputs()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ADAPTERS:
        aurora.save(alone(name), folder / name)
    return folder


@pytest.fixture
def model(files):
    """All adapters, "fr" in use."""
    return loaded(files)


def loaded(files, names=tuple(ADAPTERS)) -> nn.Module:
    model = make_model().eval()
    for name in names:
        aurora.load(model, files / name, name=name)
    return model


def compute_what_they_do_alone(model, names=EVERY) -> None:
    for name in names:
        with aurora.use(model, name):
            assert torch.equal(served(model), ALONE[name]), name


def test_the_adapters_differ():
    values = list(ALONE.values())
    for i, out in enumerate(values):
        assert not any(torch.allclose(out, other, atol=1e-3) for other in values[:i])


# ---- What each computes ----


def test_each_computes_what_it_computes_alone(model):
    compute_what_they_do_alone(model)
    assert torch.equal(served(model), ALONE["fr"])
    for name in ADAPTERS:
        aurora.set_adapter(model, name)
        assert aurora.adapter_names(model)[0] == name
        assert torch.equal(served(model), ALONE[name])
        compute_what_they_do_alone(model)


def test_a_block_with_one_adapter_runs_as_fast_as_the_one_in_use():
    """And gives the same bits where rounding depends on the way, as in products of this size."""
    layer = nn.Linear(256, 128)
    for name in ("a", "b"):
        aurora.add_adapter(layer, name, "^$", rank=4, spline="per-channel")
        disturb(layer)
    x = torch.randn(3, 300, 256)
    wanted = layer(x)
    for inside, at_once in (("b", True), (["a", "b"], False), ([], False)):
        aurora.set_adapter(layer, "a")
        with aurora.use(layer, inside):
            out = layer(x.requires_grad_())
            assert is_at_once(out) == at_once
            with aurora.disabled(layer):
                assert torch.equal(layer(x), layer.base(x))
        assert not at_once or torch.equal(out, wanted)


def test_the_first_is_in_use_and_others_wait(files):
    model = make_model().eval()
    aurora.load(model, files / "de", name="de")
    assert aurora.adapter_names(model) == ["de"]
    report = aurora.load(model, files / "fr", name="fr")
    assert report.layers == ("0", "2")
    assert report.train == ("3.weight", "3.bias")
    assert aurora.adapter_names(model) == ["de", "fr"]
    assert torch.equal(served(model), ALONE["de"])


def test_one_without_a_name_is_as_ever_and_is_called_default(files):
    model = make_model().eval()
    aurora.load(model, files / "fr")
    assert aurora.adapter_names(model) == ["default"]
    before = everything(model)
    with aurora.use(model, "default"):
        assert torch.equal(served(model), ALONE["fr"])
    with aurora.use(model, rows=["default"] * 5):
        torch.testing.assert_close(model(X), ALONE["fr"])
    assert everything(model) == before
    aurora.load(model, files / "de", name="de")
    assert aurora.adapter_names(model) == ["default", "de"]
    assert torch.equal(served(model), ALONE["fr"])
    for name in ("de", "default"):
        aurora.set_adapter(model, name)
    assert torch.equal(served(model), ALONE["fr"])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.sampled_from(EVERY), min_size=5, max_size=5), current=st.sampled_from(EVERY)
)
def test_rows_of_a_batch_are_what_they_are_alone(several, rows, current):
    aurora.set_adapter(several, current or "fr")
    with aurora.use(several, rows=rows):
        out = several(X)
    for i, name in enumerate(rows):
        torch.testing.assert_close(out[i], ALONE[name][i])


@pytest.fixture(scope="module")
def several(files):
    return loaded(files)


def test_rows_of_sequences_and_their_gradients(several):
    rows = ["de", None, "fr", "it", "de"]
    x = torch.randn(5, 4, 12, requires_grad=True)
    with aurora.use(several, rows=rows):
        out = several(x)
        out.square().sum().backward()
    found, x.grad = x.grad, None
    for i, name in enumerate(rows):
        with aurora.use(several, name):
            each = several(x[i])
        torch.testing.assert_close(out[i], each)
        each.square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_base_alone_is_the_base_bit_for_bit_in_a_row_too(several):
    with aurora.use(several, rows=[None] * 5):
        assert torch.equal(several(X), ALONE[None])


def test_several_add_up():
    layer = nn.Linear(6, 4)
    model = nn.Sequential(layer)
    x, base = torch.randn(3, 6), layer(torch.zeros(1, 6)) * 0
    base = layer(x)
    deltas = {}
    for name, rank in (("a", 1), ("b", 3), ("c", 2)):
        aurora.add_adapter(model, name, "0", rank)
        disturb(model)
        deltas[name] = model(x) - base
    with aurora.use(model, ["a", "c"]):
        torch.testing.assert_close(model(x), base + deltas["a"] + deltas["c"])
    with aurora.use(model, ["b", "b"]):
        torch.testing.assert_close(model(x), base + 2 * deltas["b"])
    with aurora.use(model, []):
        assert torch.equal(model(x), base)


def test_a_sum_with_one_head_has_that_head_and_with_two_is_refused(several, files):
    with aurora.use(several, ["fr", "de"]):
        found = several(X)
    with aurora.use(several, ["de", "fr"]):
        torch.testing.assert_close(several(X), found)
    other = loaded(files, ["fr"])
    aurora.load(other, files / "fr", name="twin")
    with (
        pytest.raises(ValueError, match=r"fr, twin each have a bias of a Linear"),
        aurora.use(other, ["fr", "twin"]),
    ):
        pass


# ---- Blocks ----


def test_blocks_nest_and_end_by_errors_too(model):
    with aurora.use(model, "de"):
        with contextlib.suppress(KeyError), aurora.use(model, "it"):
            assert torch.equal(served(model), ALONE["it"])
            raise KeyError
        assert torch.equal(served(model), ALONE["de"])
        with aurora.use(model, None):
            assert torch.equal(served(model), ALONE[None])
        assert torch.equal(served(model), ALONE["de"])
    assert torch.equal(served(model), ALONE["fr"])


def test_blocks_that_overlap(model):
    a, b = aurora.use(model, "de"), aurora.use(model, "it")
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert torch.equal(served(model), ALONE["it"])
    b.__exit__(None, None, None)
    assert torch.equal(served(model), ALONE["fr"])


@pytest.mark.parametrize("first", [aurora.disabled, lambda m: aurora.use(m, "de")])
def test_inside_disabled_no_adapter_runs(model, first):
    """ "de" has no head of its own, and no layer "0", where "fr" is in use."""
    second = aurora.disabled if first is not aurora.disabled else lambda m: aurora.use(m, "de")
    with first(model), second(model):
        assert torch.equal(served(model), ALONE[None])
        with aurora.use(model, rows=["de"] * 5):
            torch.testing.assert_close(model(X), ALONE[None])
        with aurora.use(model, "es"):
            assert torch.equal(served(model), ALONE[None])
    with aurora.disabled(model), aurora.use(model, "fr"):  # as without names, heads stay
        expected = alone("fr")
        with aurora.disabled(expected):
            assert torch.equal(model(X), expected(X))


def test_inside_disabled_layers_that_the_one_in_use_lacks_are_off_too(model):
    aurora.set_adapter(model, "de")  # on layer "2" alone
    with aurora.use(model, "es"), aurora.disabled(model):  # on layer "0" alone
        assert torch.equal(served(model), ALONE[None])


def test_the_adapter_in_use_is_off_inside_a_block(model):
    layer = core.layers(model)["0"]
    with aurora.use(model, "de"):
        assert not layer.enabled
        assert set(aurora.check(model, X)) == {"0", "2"}
    assert layer.enabled
    assert not aurora.check(model, X)


def test_modes_are_followed_inside_a_block(model):
    model.train()
    with aurora.use(model, "es"):
        assert not torch.equal(model(X), model(X))  # dropout
        model.eval()
        assert torch.equal(served(model), ALONE["es"])


def test_threads_serve_adapters_of_their_own_while_others_come_and_go(model, files):
    wrong, done, start = [], threading.Event(), threading.Barrier(5)
    with torch.no_grad():
        expected = {name: alone(name)(X) for name in EVERY}

    def serve(name):
        start.wait()
        with torch.no_grad(), aurora.use(model, name):
            count = 0
            while not done.is_set() or count < 20:
                count += 1
                if not torch.equal(model(X), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("fr", "de", "it", None)]
    for thread in threads:
        thread.start()
    start.wait()
    for _ in range(3):
        aurora.load(model, files / "es", name="new")
        for name in ("new", "it", "fr"):
            aurora.set_adapter(model, name)
        aurora.delete_adapter(model, "new")
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(served(model), ALONE["fr"])


def test_checkpointing_inside_a_block(model):
    from torch.utils.checkpoint import checkpoint

    x = X.clone().requires_grad_()
    with aurora.use(model, "de"):
        model(x).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


CHANGES = {
    "add": lambda m, f: aurora.add_adapter(m, "new", "^0$"),
    "load": lambda m, f: aurora.load(m, f / "de", name="new"),
    "set": lambda m, f: aurora.set_adapter(m, "de"),
    "delete": lambda m, f: aurora.delete_adapter(m, "de"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_changes_inside_a_block(model, files, name):
    before = everything(model)
    with aurora.use(model, "it"), pytest.raises(ValueError, match="leave it first"):
        CHANGES[name](model, files)
    assert everything(model) == before
    CHANGES[name](model, files)
    assert everything(model) != before


# ---- Training ----


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - 1).square().mean().backward()
    optimizer.step()


def test_a_fresh_one_starts_as_the_base_and_trains_alone(model):
    before = {name: aurora.adapter_state_dict(alone(name)) for name in ADAPTERS}
    printed = aurora.add_adapter(
        model, "pt", r"^[02]$", 4, train=r"^3\.", init="identity", spline="per-channel"
    )
    assert printed.layers.keys() == {"0", "2"}
    assert printed.trainable == sum(p.numel() for p in aurora.parameters(model))
    assert torch.equal(served(model), ALONE[None])  # not the head of "fr", which was in use
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    assert {p for p in model.parameters() if p.grad is not None} == set(aurora.parameters(model))
    trained = model(X)
    assert not torch.allclose(trained, ALONE[None], atol=1e-2)
    compute_what_they_do_alone(model)
    for name, state in before.items():
        aurora.set_adapter(model, name)
        for key, tensor in aurora.adapter_state_dict(model).items():
            assert torch.equal(tensor, state[key])
    aurora.set_adapter(model, "pt")
    assert torch.equal(model(X), trained)


def test_only_the_one_in_use_requires_gradients(model):
    for name in (*ADAPTERS, "fr"):
        aurora.set_adapter(model, name)
        wanted = set(map(id, aurora.parameters(model)))
        assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    aurora.add_adapter(model, "pt", "^0$", projections="fixed", init="zero")
    for name in ("fr", "pt"):  # A and B that are fixed stay so
        aurora.set_adapter(model, name)
        wanted = set(map(id, aurora.parameters(model)))
        assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    assert not model[0].A.requires_grad


def test_switching_disturbs_no_training():
    def make():
        model = make_model()
        for name in ("a", "b"):
            aurora.add_adapter(model, name, r"^[02]$", train=r"^3\.")
            disturb(model)
        return model

    switched, still = make(), make()
    groups = {}
    for name in ("a", "b"):
        aurora.set_adapter(switched, name)
        groups[name] = torch.optim.AdamW(aurora.parameter_groups(switched, lr=0.05))
    for _ in range(4):
        for name, optimizer in groups.items():
            aurora.set_adapter(switched, name)
            step(switched, optimizer)
    for name in ("a", "b"):
        aurora.set_adapter(still, name)
        optimizer = torch.optim.AdamW(aurora.parameter_groups(still, lr=0.05))
        for _ in range(4):
            step(still, optimizer)
    assert all(map(torch.equal, values(switched).values(), values(still).values()))


# ---- What train= kept ----


def test_every_adapter_has_a_head_of_its_own(files):
    model = make_model().eval()
    own = model[3].weight
    before = own.detach().clone()
    aurora.load(model, files / "fr", name="fr")
    head = model[3].weight
    assert head is not own
    assert head.requires_grad
    aurora.load(model, files / "fr", name="twin")
    aurora.add_adapter(model, "new", "^0$")
    assert model[3].weight is own
    assert torch.equal(own, before)
    assert not own.requires_grad
    aurora.set_adapter(model, "fr")
    assert model[3].weight is head
    aurora.set_adapter(model, "twin")
    assert model[3].weight is not head
    aurora.set_adapter(model, "new")
    for name in ("fr", "twin"):
        aurora.delete_adapter(model, name)
    assert type(model[3]) is nn.Linear
    assert model[3].weight is own


def test_a_head_trained_without_a_name_stays_that_adapters(files):
    """The base's own starts where it is when the second adapter comes."""
    model = make_model().eval()
    aurora.load(model, files / "fr")
    head, then = model[3].weight, model[3].weight.detach().clone()
    aurora.load(model, files / "de", name="de")
    assert model[3].weight is head
    with torch.no_grad():
        head.add_(1.0)
    aurora.set_adapter(model, "de")
    assert torch.equal(model[3].weight, then)
    assert not model[3].weight.requires_grad
    aurora.set_adapter(model, "default")
    assert model[3].weight is head
    assert head.requires_grad


def test_running_statistics_go_with_their_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    norm, x = model[1], torch.randn(32, 4)
    for name in ("a", "b"):
        aurora.add_adapter(model, name, "^0$", train=r"^1\.")
    model(3 * x + 5)  # "b"
    moved = norm.running_mean.clone()
    aurora.set_adapter(model, "a")
    assert torch.equal(norm.running_mean, torch.zeros(4))
    with aurora.use(model, "b"):
        model(3 * x + 5)
        model.eval()
        model(x)  # moves nothing
        model.train()
    assert torch.equal(norm.running_mean, torch.zeros(4))
    aurora.set_adapter(model, "b")
    assert norm.num_batches_tracked == 2
    assert not torch.equal(norm.running_mean, moved)
    with aurora.use(model, rows=["a"] * 16 + ["b"] * 16):
        model.eval()(x)


def test_a_head_that_is_an_embedding_has_rows(files):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = {None: model(tokens)}
    for name in ("a", "b"):
        aurora.add_adapter(model, name, "1", train=r"^0\.weight")
        disturb(model, phase=ord(name))
        found[name] = model(tokens)
    with aurora.use(model, rows=["b", None, "a"]):
        out = model(tokens)
    for i, name in enumerate(["b", None, "a"]):
        torch.testing.assert_close(out[i], found[name][i])


class Head(nn.Module):
    """Takes two arguments, and holds a parameter itself."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x, shift=0.0):
        return self.inner(x) * self.scale + shift


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.first = Head(), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.first(x), 1.0)


def test_a_head_with_several_arguments_is_switched_but_has_no_rows():
    model = Body()
    found = {}
    for name in ("a", "b"):
        aurora.add_adapter(model, name, "first|inner", train=r"scale")
        disturb(model, phase=ord(name))
        found[name] = model(torch.eye(3))
    for name in ("a", "b"):
        with aurora.use(model, name):
            assert torch.equal(model(torch.eye(3)), found[name])
    with (
        aurora.use(model, rows=["a", "b", "a"]),
        pytest.raises(ValueError, match=r"a Head that train= kept takes several arguments"),
    ):
        model(torch.eye(3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def test_tied_heads_stay_tied_or_are_refused():
    model = tied()
    before = everything(model)
    with pytest.raises(ValueError, match=r"2\.weight trains and is tied to 0\.weight"):
        aurora.add_adapter(model, "a", "1", train=r"^2\.weight")
    assert everything(model) == before
    own = model[0].weight
    for name in ("a", "b"):
        aurora.add_adapter(model, name, "^1$", train=r"^[02]\.weight")
        assert model[0].weight is model[2].weight is not own
    aurora.inject(other := tied(), "1", train=r"^2\.weight")
    before = everything(other)
    with pytest.raises(ValueError, match="tied"):
        aurora.add_adapter(other, "a", "^1$")
    assert everything(other) == before


PAST_FORWARD = {
    "a ParameterList: its parent reads its tensors": (
        lambda: nn.ParameterList([nn.Parameter(torch.ones(3))]),
        r"^a\.0",
    ),
    "a LayerNorm: .*fused evaluation reads": (lambda: nn.TransformerEncoderLayer(4, 1, 4), "norm1"),
    "MultiheadAttention bypasses its adapter: it reads": (
        lambda: nn.MultiheadAttention(4, 1),
        r"out_proj\.bias",
    ),
}


@pytest.mark.parametrize("reason", PAST_FORWARD)
@pytest.mark.parametrize("named", [True, False])
def test_a_head_that_its_parent_reads_is_refused(reason, named):
    """A block could not switch it."""
    make, train = PAST_FORWARD[reason]
    model = nn.ModuleDict({"a": make(), "b": nn.Linear(3, 3)})
    if not named:
        aurora.inject(model, "^b$", train=train)  # alone it may
    before = everything(model)
    with pytest.raises(ValueError, match=reason):
        aurora.add_adapter(model, "new", "^b$", train=train if named else None)
    assert everything(model) == before


# ---- Refusals; all or nothing ----


@pytest.mark.parametrize("name", ["", "a.b", 3, None, "__base__", "train", "weight.", "_modules"])
def test_names_that_cannot_be(model, name):
    before = everything(model)
    with pytest.raises(ValueError, match=r"must be a text without dots|already"):
        aurora.add_adapter(model, name, "^0$")
    assert everything(model) == before


def test_names_that_are_taken_or_unknown(model, files):
    before = everything(model)
    with pytest.raises(ValueError, match=r"there is an adapter 'fr' already: .*delete_adapter"):
        aurora.load(model, files / "de", name="fr")
    with pytest.raises(ValueError, match=r"there is an adapter 'de' already"):
        aurora.add_adapter(model, "de", "^0$")
    told = r"no adapter 'fre', there are fr, de, es, it; did you mean 'fr'\?"
    for act in (
        aurora.set_adapter,
        aurora.delete_adapter,
        lambda m, n: aurora.use(m, n).__enter__(),
    ):
        with pytest.raises(ValueError, match=told):
            act(model, "fre")
    with pytest.raises(ValueError, match="no adapter 'xx'"), aurora.use(model, rows=["xx"] * 5):
        pass
    with pytest.raises(ValueError, match="no adapter 'fe'"):
        aurora.save(model, files / "never", name="fe")
    assert everything(model) == before
    with pytest.raises(ValueError, match="has no AuroRA adapters"):
        aurora.adapter_names(make_model())


@pytest.mark.parametrize("rows", ["fr", [], ["fr"] * 4, ["fr"] * 6])
def test_rows_that_do_not_match_the_batch(model, rows):
    with pytest.raises(ValueError, match=r"rows= "), aurora.use(model, rows=rows):
        model(X)
    with (
        pytest.raises(ValueError, match=r"rows= is a list of names, and no others"),
        aurora.use(model, "fr", rows=["fr"] * 5),
    ):
        pass
    assert torch.equal(served(model), ALONE["fr"])


def test_a_failing_load_or_add_leaves_the_model_as_it_was(model, files, tmp_path):
    path = tmp_path / "bad"
    before = everything(model)
    data = bytearray((files / "de").read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        aurora.load(model, path, name="new")
    wide = make_model(width=13)
    aurora.inject(wide, "^0$", train=r"^3\.")
    aurora.save(wide, path)
    with pytest.raises(ValueError, match="13 -> 8 in the file, 12 -> 8"):
        aurora.load(model, path, name="new")
    with pytest.raises(FileNotFoundError):
        aurora.load(model, tmp_path / "nowhere", name="new")
    with pytest.raises(ValueError, match="matches no linear layer"):
        aurora.add_adapter(model, "new", "nowhere")
    with pytest.raises(ValueError, match="rank must be"):
        aurora.add_adapter(model, "new", "^0$", 0)
    with pytest.raises(TypeError, match="not linear"):
        aurora.add_adapter(nn.Sequential(nn.LayerNorm(2)), "new", "0")
    assert everything(model) == before


def test_a_bare_model_stays_bare_after_an_error(files):
    model = make_model()
    before = everything(model)
    with pytest.raises(ValueError, match="matches no linear layer"):
        aurora.add_adapter(model, "new", "nowhere")
    assert everything(model) == before


def test_a_model_that_is_distributed_already_is_refused(model, files):
    class DistributedDataParallel(nn.Sequential):
        pass

    for change in CHANGES.values():
        with pytest.raises(ValueError, match="distributed already"):
            change(DistributedDataParallel(model), files)


def test_classes_that_came_later_are_refused(model):
    before = everything(model)
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match="forward was replaced on the object"):
        aurora.set_adapter(model, "de")
    del model[0].forward
    torch.nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(ValueError, match="got another class"):
        aurora.set_adapter(model, "de")
    assert everything(model)[0][1:] == before[0][1:]


def told(model: nn.Module) -> list:
    """What a model is, without identities."""
    found = []
    for name, module in model.named_modules():
        note = module.__dict__.get("_aurora", core.Note())
        found.append((name, type(module).__name__, sorted(note.train), module.training))
    for name, p in model.named_parameters():
        found.append((name, p.requires_grad, p.tolist()))
    return found


def tiny(path) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    aurora.inject(model, "^0$", 1, train=r"^1\.")
    aurora.save(model, path)
    aurora.add_adapter(model, "a", "^1$", 1, train=r"^0\.bias")
    return model


TINY = {
    "add": lambda m, path: aurora.add_adapter(m, "b", "^0$", 1, train="1.bias"),
    "load": lambda m, path: aurora.load(m, path, name="b"),
    "set": lambda m, path: aurora.set_adapter(m, "default"),
    "delete": lambda m, path: aurora.delete_adapter(m, "default"),
}


@pytest.mark.parametrize("name", TINY)
def test_an_interrupt_at_any_line_leaves_the_model_before_or_after(name, tmp_path):
    path = tmp_path / "adapter"
    finished = tiny(path)
    before = told(finished)

    def act(model):
        torch.manual_seed(1)
        TINY[name](model, path)

    act(finished)
    after = told(finished)
    assert before != after

    def check(model, done):
        assert told(model) in ([after] if done else [before, after])

    start = tiny(path)
    assert interrupted_at_every_line(lambda: copy.deepcopy(start), act, check) > 100


# ---- Files and state dicts ----


def test_save_by_name_is_what_was_loaded(model, files, tmp_path):
    aurora.set_adapter(model, "de")
    before = everything(model)
    for name in ADAPTERS:
        aurora.save(model, tmp_path / name, name=name)
        assert (tmp_path / name).read_bytes() == (files / name).read_bytes()
    assert everything(model) == before
    aurora.save(model, tmp_path / "in use")
    assert (tmp_path / "in use").read_bytes() == (files / "de").read_bytes()


def test_load_without_a_name_fills_the_one_in_use(model, files):
    disturb(model)
    parameters = list(model.parameters())
    aurora.load(model, files / "fr")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    compute_what_they_do_alone(model)
    before = everything(model)
    with pytest.raises(ValueError, match="adapted in the model only"):
        aurora.load(model, files / "de")
    assert everything(model) == before


def test_names_in_a_state_dict(model):
    state = model.state_dict()
    assert make_model().state_dict().keys() < state.keys()
    assert torch.equal(state["0.weight"], make_model()[0].weight)
    assert {key for key in state if key.startswith(("1.", "3."))} == {
        *("3.weight", "3.bias", "3.aurora.__base__.weight", "3.aurora.__base__.bias")
    }
    assert {key for key in state if key.startswith("2.aurora.it.")} == {
        *("2.aurora.it.A", "2.aurora.it.B", "2.aurora.it.bias", "2.aurora.it.anl._extra_state"),
        *("2.aurora.it.anl.H", "2.aurora.it.anl.spline_weight"),
    }


def test_a_state_dict_goes_back_where_the_same_adapter_is_in_use(model, files):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = loaded(files)
    for name in ADAPTERS:
        aurora.set_adapter(other, name)
        disturb(other)
    with pytest.raises(RuntimeError, match="Missing key"):  # "es" is in use
        other.load_state_dict(state)
    aurora.set_adapter(other, "fr")
    other.load_state_dict(state)
    compute_what_they_do_alone(other)


def test_a_full_checkpoint_gives_the_one_in_use_and_says_what_it_left(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    aurora.set_adapter(model, "de")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    bare = make_model().eval()
    report = aurora.load(bare, tmp_path, name="found")
    assert report.layers == ("2",)
    assert "0.aurora.fr" in report.left
    assert "2.aurora.it" in report.left
    assert torch.equal(bare(X), ALONE["de"])


# ---- What other functions mean ----


def test_functions_act_on_the_one_in_use(model):
    for name in ADAPTERS:
        aurora.set_adapter(model, name)
        single = alone(name)
        assert core.layers(model).keys() == core.layers(single).keys()
        assert aurora.summary(model).trainable == aurora.summary(single).trainable
        assert len(aurora.parameters(model)) == len(aurora.parameters(single))
        found, wanted = aurora.parameter_groups(model), aurora.parameter_groups(single)
        assert [len(g["params"]) for g in found] == [len(g["params"]) for g in wanted]
        assert aurora.adapter_state_dict(model).keys() == aurora.adapter_state_dict(single).keys()
        assert str(aurora.report_bounds(model, X)) == str(aurora.report_bounds(single, X))
        with aurora.disabled(model), aurora.disabled(single):
            assert torch.equal(model(X), single(X))


@pytest.mark.parametrize(
    "merge", [aurora.merge, aurora.static_merge, lambda m: aurora.merge(m, "calibrated", [X])]
)
def test_a_merge_is_refused_until_the_others_are_gone(files, merge):
    model = loaded(files, ["it", "fr", "de"])
    before = everything(model)
    with pytest.raises(
        ValueError, match=r"other adapters are on the model, de, fr: .*delete_adapt"
    ):
        merge(model)
    assert everything(model) == before
    for name in ("fr", "de"):
        aurora.delete_adapter(model, name)
    report = merge(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    assert not any("aurora" in key for key in model.state_dict())
    torch.testing.assert_close(model(X), ALONE["it"])  # static, so that it merges exactly
    if isinstance(report, aurora.MergeReport):
        report.unmerge()
        assert aurora.adapter_names(model) == ["it"]
        assert torch.equal(served(model), ALONE["it"])


def test_remove_is_refused_until_the_others_are_gone_and_leaves_a_plain_model(files):
    model = make_model().eval()
    fresh = everything(model)
    tensors = list(model.parameters())
    for name in ("de", "it"):
        aurora.load(model, files / name, name=name)
    before = everything(model)
    for only in (None, [model[2]]):
        with pytest.raises(ValueError, match=r"other adapters are on the model, it"):
            aurora.remove(model, only)
    assert everything(model) == before
    aurora.delete_adapter(model, "it")
    aurora.remove(model)
    assert everything(model) == fresh
    assert all(a is b for a, b in zip(model.parameters(), tensors, strict=True))
    aurora.load(model, files / "fr", name="fr")
    aurora.remove(model)  # heads stay as trained, as ever
    assert torch.equal(model[3].weight, alone("fr")[3].weight)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]


def test_deleting(model):
    before = everything(model)
    with pytest.raises(ValueError, match=r"'fr' is in use: set_adapter to another first"):
        aurora.delete_adapter(model, "fr")
    assert everything(model) == before
    count = sum(p.numel() for p in alone("it").parameters()) - sum(
        p.numel() for p in make_model().parameters()
    )
    total = sum(p.numel() for p in model.parameters())
    aurora.delete_adapter(model, "it")
    bias = 8
    assert sum(p.numel() for p in model.parameters()) == total - count - bias
    assert aurora.adapter_names(model) == ["fr", "de", "es"]
    compute_what_they_do_alone(model, ["fr", "de", "es", None])


def test_inject_gives_the_one_in_use_more_layers(files):
    model = loaded(files, ["de"])
    aurora.add_adapter(model, "new", "^0$", 1)
    aurora.inject(model, "^3$", 2)
    disturb(model)
    out = served(model)
    aurora.set_adapter(model, "de")
    assert core.layers(model).keys() == {"2"}
    assert torch.equal(served(model), ALONE["de"])
    with aurora.use(model, "new"):
        assert torch.equal(served(model), out)
    with pytest.raises(ValueError, match="adapted already"):
        aurora.inject(model, "^0$")


# ---- Ordinary parameters ----


def test_copies_and_pickles(model):
    aurora.set_adapter(model, "es")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert told(copied) == told(model)
        compute_what_they_do_alone(copied)
        aurora.set_adapter(copied, "de")
        disturb(copied)
        compute_what_they_do_alone(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_all_are_moved_and_cast(model, dtype):
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name in EVERY:
        with aurora.use(model, name):
            out = model(X.to(dtype))
        torch.testing.assert_close(out, alone(name).to(dtype)(X.to(dtype)))
    with aurora.use(model, rows=["fr", "de", "it", "es", None]):
        assert model(X.to(dtype)).dtype == dtype
    assert {b.dtype for b in (core.layers(model)["0"].anl.grid.one,)} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_runs_what_is_in_use(model, one_process):
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        parallel(X).square().sum().backward()
    assert all(p.grad is not None for p in aurora.parameters(model))
    with torch.no_grad(), aurora.use(parallel, "de"):
        torch.testing.assert_close(parallel(X), ALONE["de"])
    with pytest.raises(ValueError, match="distributed already"):
        aurora.set_adapter(parallel, "de")


def test_fsdp2_runs_what_is_in_use(model, one_process):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="sharded"), aurora.use(model, "de"):
        pass
    with pytest.raises(ValueError, match="distributed already"):
        aurora.set_adapter(model, "de")
    torch.testing.assert_close(model(X), ALONE["fr"])


class Compiled:
    """A compiled model with four adapters of the same layers and options; counts its graphs."""

    def __init__(self):
        torch._dynamo.reset()
        self.model, self.names = make_model().eval(), ["a", "b", "c", "d"]
        for name in self.names:
            aurora.add_adapter(self.model, name, r"^[02]$", train=r"^3\.")
            disturb(self.model, phase=ord(name))
        self.counter = CompileCounterWithBackend("eager")
        self.compiled = torch.compile(self.model, backend=self.counter, fullgraph=True)

    def graphs(self, *blocks) -> int:
        before = self.counter.frame_count
        for block in blocks:
            with block:
                torch.testing.assert_close(self.compiled(X), self.model(X))
        return self.counter.frame_count - before


def test_switching_compiles_nothing_anew():
    found = Compiled()
    assert found.graphs(contextlib.nullcontext()) == 1
    for name in found.names:
        aurora.set_adapter(found.model, name)
        assert found.graphs(contextlib.nullcontext()) == 0


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="older compilers compile anew for every block",
)
@torch._dynamo.config.patch(recompile_limit=16)
def test_what_is_compiled_anew():
    """Adapters of the same layers and options share graphs in blocks too."""
    found = Compiled()
    graphs = found.graphs
    assert graphs(contextlib.nullcontext()) == 1
    use = lambda *args, **options: aurora.use(found.model, *args, **options)  # noqa: E731
    assert graphs(use("a"), use("b"), use("c")) == 1
    assert graphs(use("d")) == 1  # in use, so that it requires gradients
    with use("a"):
        assert graphs(use("b"), use("c"), use("d")) == 0  # nested
    assert graphs(use(None)) == 1
    for rows in (
        ["abaab", "cacca", "bbccc", "aabbb"],
        ["bdddb", "adada", "dddcc", "aaadd"],  # with the one in use
        ["bb...", ".aaa.", "ccc..", "...aa"],  # with the base
    ):
        several = [[None if name == "." else name for name in batch] for batch in rows]
        assert graphs(use(rows=several[0])) == 1
        assert graphs(use(rows=several[1])) <= 1  # once more, for any sizes
        assert graphs(use(rows=several[2]), use(rows=several[3])) == 0
    assert graphs(contextlib.nullcontext()) <= 1  # the way out of the first block
    assert graphs(use("c"), contextlib.nullcontext(), use("a")) == 0
    thread = threading.Thread(target=lambda: counts.append(graphs(use("b"), use("a"))))
    counts = []
    thread.start()
    thread.join()
    assert counts == [0]


# ---- A state machine ----


class Life(RuleBasedStateMachine):
    """Adapters come, train, are switched and go; each always computes what it did."""

    @initialize()
    def start(self):
        self.model = make_model().eval()
        self.count, self.expected = 0, {None: served(self.model).detach()}

    def names(self):
        return [name for name in self.expected if name is not None]

    @rule(
        layers=st.sampled_from([r"^0$", r"^2$", r"^[02]$"]),
        rank=st.integers(1, 3),
        train=st.sampled_from([None, r"^3\.", r"^2\.bias"]),
    )
    def add(self, layers, rank, train):
        name = f"n{self.count}"
        self.count += 1
        aurora.add_adapter(self.model, name, layers, rank, train=train)
        assert torch.equal(served(self.model), self.expected[None])
        self.expected[name] = self.expected[None]

    @rule()
    def train(self):
        if self.names():
            step(self.model, torch.optim.SGD(self.model.parameters(), lr=0.1))
            self.expected[aurora.adapter_names(self.model)[0]] = served(self.model).detach()

    @rule(data=st.data())
    def switch(self, data):
        if self.names():
            aurora.set_adapter(self.model, data.draw(st.sampled_from(self.names())))

    @rule(data=st.data())
    def delete(self, data):
        if len(self.names()) > 1:
            name = data.draw(st.sampled_from(self.names()))
            if name != aurora.adapter_names(self.model)[0]:
                aurora.delete_adapter(self.model, name)
                del self.expected[name]

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    @invariant()
    def each_computes_what_it_did(self):
        if not hasattr(self, "model") or not self.names():
            return
        assert set(aurora.adapter_names(self.model)) == set(self.names())
        assert torch.equal(served(self.model), self.expected[aurora.adapter_names(self.model)[0]])
        for name, expected in self.expected.items():
            with aurora.use(self.model, name):
                assert torch.equal(served(self.model), expected)
        trained = set(aurora.parameters(self.model))
        assert {p for p in self.model.parameters() if p.requires_grad} == trained


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=12, stateful_step_count=10, deadline=None)

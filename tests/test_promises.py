"""All or nothing at every line, threads beside each other, and a state machine over everything."""

import copy
import tempfile
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import disturb, everything, interrupted_at_every_line, make_model, trained
from torch import nn

import aurora
from aurora import core

# ---- All or nothing ----


def plain() -> nn.Module:
    """A model on which every change of `inject` shows: something frozen, something shared."""
    model = make_model()
    model.append(model[0])
    model[3].weight.requires_grad_(False)
    return model


def to_unmerge() -> tuple[nn.Module, aurora.MergeReport]:
    model = trained()
    return model, aurora.merge(model)


def told(model: nn.Module) -> list:
    """`everything` without what differs from one fresh model to the next."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = {key: repr(value) for key, value in module.__dict__.items() if key == "_aurora"}
        found.append((name, module.__class__.__name__, module.training, own))
        for key, p in module._parameters.items():
            if p is not None:
                found.append((key, p.requires_grad, p.detach().tolist()))
    return found


CALLS = {
    "inject": (plain, lambda m: aurora.inject(m, r"^[02]$", train="3")),
    "inject all linear": (plain, lambda m: aurora.inject(m, "all-linear")),
    "remove": (trained, aurora.remove),
    "static_merge": (trained, core.static_merge),
    "merge": (trained, aurora.merge),
    "calibrated merge": (trained, lambda m: aurora.merge(m, "calibrated", [torch.ones(5, 12)])),
    "start_as_identity": (
        lambda: fresh(spline="per-channel"),
        aurora.start_as_identity,
    ),
    "AuroraLinear": (plain, lambda m: aurora.AuroraLinear(m[0])),
}


def fresh(**options) -> nn.Module:
    model = make_model()
    aurora.inject(model, r"^[02]$", **options)
    return model


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line_leaves_the_model_before_or_after(name):
    prepare, action = CALLS[name]
    seeded = lambda: (torch.manual_seed(0), prepare())[1]  # noqa: E731
    before = told(seeded())
    finished = seeded()
    torch.manual_seed(1)
    action(finished)
    after = told(finished)
    assert before != after

    def act(model):
        torch.manual_seed(1)  # what inject draws
        action(model)

    def check(model, done):
        assert told(model) in ([after] if done else [before, after])

    assert interrupted_at_every_line(seeded, act, check) > 20


def test_an_interrupt_of_unmerge_leaves_the_model_merged_or_adapted():
    model, report = to_unmerge()
    before = told(model)
    report.unmerge()
    after = told(model)

    def check(pair, done):
        assert told(pair[0]) in ([after] if done else [before, after])

    assert interrupted_at_every_line(to_unmerge, lambda pair: pair[1].unmerge(), check) > 20


def test_a_start_from_the_gradient_is_all_or_nothing():
    def prepare():
        return fresh(rank=2)

    def action(model):
        with aurora.start_from_gradient(model):
            model(torch.eye(12)).square().sum().backward()

    before = told(prepare())
    finished = prepare()
    action(finished)
    after = told(finished)

    def check(model, done):
        assert told(model) in ([after] if done else [before, after])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())

    interrupted_at_every_line(prepare, action, check)


def test_the_check_notices_a_mixture():
    """The same test, over a call that is not all or nothing, must fail."""

    def one_by_one(model):
        for layer in list(core.layers(model).values()):
            core.attach(nn.Linear(2, 2), {"A": layer.A, "B": layer.B, "anl": layer.anl})
            layer.reset_parameters()

    finished = trained()
    before = told(finished)
    torch.manual_seed(1)
    one_by_one(finished)
    after = told(finished)

    def act(model):
        torch.manual_seed(1)
        one_by_one(model)

    def check(model, done):
        assert told(model) in ([after] if done else [before, after])

    with pytest.raises(AssertionError):
        interrupted_at_every_line(trained, act, check)


# ---- Threads ----


def test_blocks_that_overlap_end_with_the_adapters_on():
    model = trained()
    x = torch.randn(3, 12)
    adapted = model(x)
    a, b = aurora.disabled(model), aurora.disabled(model)
    a.__enter__()
    b.__enter__()
    off = model(x)
    a.__exit__(None, None, None)
    assert torch.equal(model(x), off)
    assert not torch.allclose(off, adapted)
    b.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)


def test_a_block_over_a_part_leaves_the_rest_on():
    model = trained()
    with aurora.disabled(model[0]):
        assert not model[0].enabled
        assert model[2].enabled


def test_a_thread_serves_the_adapters_while_others_switch_them_off():
    model = trained().eval()
    x = torch.randn(16, 12)
    with torch.no_grad():
        adapted = model(x)
        with aurora.disabled(model):
            off = model(x)
    wrong, outputs, start = [], [0], threading.Barrier(4)

    def serve(expected, switch):
        start.wait()
        with torch.no_grad():
            for _ in range(150):
                if switch:
                    with aurora.disabled(model):
                        found = model(x)
                else:
                    found = model(x)
                outputs[0] += 1
                if not torch.equal(found, expected):
                    wrong.append(switch)

    jobs = [(adapted, False), (off, True), (adapted, False), (off, True)]
    threads = [threading.Thread(target=serve, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert outputs[0] > 300
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_a_block_recomputes_without_adapters(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = trained()
    x = torch.randn(3, 12, requires_grad=True)
    with aurora.disabled(model):
        model(x).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert core.layers(model)["0"].A.grad is None


def test_a_compiled_model_switches_by_thread():
    torch._dynamo.reset()
    model = trained().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 12)
    adapted = compiled(x)
    found = []
    with aurora.disabled(model):
        off = compiled(x)
        thread = threading.Thread(target=lambda: found.append(compiled(x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], adapted)
    assert not torch.allclose(off, adapted)
    assert torch.equal(compiled(x), adapted)


# ---- Values that cannot work ----

BAD = [
    {"alpha": 1e40},
    {"alpha": "4"},
    {"alpha": float("inf")},
    {"grid_range": (0, 5e-324)},
    {"grid_range": (1e6, 1e6 + 1)},
    {"grid_range": 3},
    {"grid_range": (1, 2, 3)},
    {"grid_range": None},
    {"dropout": "half"},
    {"dropout": None},
    {"activation": ["tanh"]},
    {"spline": None},
    {"init": "identity"},
    {"projections": "fixed"},
    {"projections": "fixed", "init": "zero", "mode": "static"},
    {"nonsense": 1},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_values_that_cannot_work_are_refused_by_name(options):
    model = make_model()
    before = everything(model)
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        aurora.inject(model, r"^0$", **options)
    assert everything(model) == before


@pytest.mark.parametrize("model", [None, 3, "model", nn.Linear, {}])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match=r"must be an nn\.Module"):
        aurora.inject(model, "0")


@pytest.mark.parametrize("target", [None, 3, b"0", ["0"]])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(ValueError, match="a regex or a predicate"):
        aurora.inject(make_model(), target)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_an_anl_takes_floats_only(dtype):
    with pytest.raises(ValueError, match=f"got {dtype}"):
        aurora.ANL(2)(torch.ones(3, 2).to(dtype))


@pytest.mark.parametrize("name", ["A", "B", "anl", "scaling"])
def test_a_base_whose_names_clash_is_refused(name):
    layer = nn.Linear(3, 3)
    setattr(layer, name, nn.Parameter(torch.ones(2)))
    model = nn.Sequential(layer)
    before = everything(model)
    with pytest.raises(ValueError, match=f"has a '{name}' of its own"):
        aurora.inject(model, "0")
    assert everything(model) == before
    assert list(core.ModelView.of(model).parameters) == ["0.weight", "0.bias", f"0.{name}"]


def test_a_name_that_is_no_regex_is_no_danger():
    model = nn.ModuleDict({"a(b": nn.Sequential(nn.Linear(3, 3)), "c[": nn.Linear(3, 3)})
    aurora.inject(model, lambda name, module: name == "c[")
    assert list(core.layers(model)) == ["c["]


# ---- A state machine ----


class Life(RuleBasedStateMachine):
    """A model's life, in any order, with calls that fail; after each step the promises hold."""

    @initialize()
    def start(self):
        self.model = make_model()
        self.x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
        self.base = self.model(self.x).detach()
        self.tensors = dict(self.model.named_parameters())
        self.report = None
        self.merges = 0
        self.file = Path(tempfile.mkdtemp()) / "adapter.safetensors"

    def adapted(self):
        return any(isinstance(m, aurora.AuroraLinear) for m in self.model.modules())

    @rule(part=st.sampled_from(["^0$", "^2$", "^[02]$", "all-linear"]), rank=st.integers(1, 3))
    def inject(self, part, rank):
        before, output = everything(self.model), self.model(self.x)
        try:
            aurora.inject(self.model, part, rank)
        except ValueError:  # adapted already, or nothing left to adapt
            assert everything(self.model) == before
        else:
            assert torch.equal(self.model(self.x), output)

    @rule(regex=st.sampled_from(["nowhere", "(", "1$"]))
    def fail_to_inject(self, regex):
        before = everything(self.model)
        with pytest.raises(ValueError, match=r"matches no|regular expression"):
            aurora.inject(self.model, regex)
        assert everything(self.model) == before

    @precondition(lambda self: self.adapted())
    @rule()
    def train(self):
        optimizer = torch.optim.SGD(aurora.parameter_groups(self.model, lr=0.1))
        self.model(self.x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    @precondition(lambda self: self.adapted())
    @rule(some=st.booleans())
    def remove(self, some):
        found = list(core.layers(self.model).values())
        aurora.remove(self.model, found[:1] if some else None)

    @precondition(lambda self: self.adapted())
    @rule(method=st.sampled_from(["static", "linear", "calibrated"]))
    def merge(self, method):
        self.before_merge = told(self.model)
        self.report = aurora.merge(self.model, method, [self.x])
        assert not self.adapted()
        self.merges += 1
        self.after_merge = told(self.model)

    @precondition(lambda self: self.report is not None)
    @rule()
    def unmerge(self):
        same = told(self.model) == self.after_merge
        before = everything(self.model)
        try:
            self.report.unmerge()
        except ValueError:
            assert everything(self.model) == before
        else:
            assert same
            assert told(self.model) == self.before_merge
            self.merges, self.report = self.merges - 1, None

    @precondition(lambda self: self.adapted())
    @rule()
    def save_and_load(self):
        aurora.save(self.model, self.file)
        output = self.model(self.x)
        before = told(self.model)
        disturb(self.model)
        aurora.load(self.model, self.file)
        assert torch.equal(self.model(self.x), output)
        assert told(self.model) == before

    @rule()
    def load_a_misfit(self):
        other = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        aurora.inject(other, "1")
        aurora.save(other, self.file)
        before = everything(self.model)
        with pytest.raises(ValueError, match="nothing was loaded"):
            aurora.load(self.model, self.file)
        assert everything(self.model) == before

    @rule()
    def copy(self):
        copied = copy.deepcopy(self.model)
        assert told(copied) == told(self.model)
        if self.adapted():
            disturb(copied)

    @rule()
    def cast(self):
        if self.report is None:
            self.model.double().float()

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def the_base_is_untouched(self):
        if not self.adapted():
            output = self.model(self.x)
            assert all("_aurora" not in m.__dict__ for m in self.model.modules())
        else:
            output = self.off()
            trains = {p for p in self.model.parameters() if p.requires_grad}
            assert trains == set(aurora.parameters(self.model))
        if not self.merges:
            assert torch.equal(output, self.base)
            now = core.ModelView.of(self.model).parameters
            assert {name: owned.tensor for name, owned in now.items()}.keys() == self.tensors.keys()
            assert all(now[name].tensor is p for name, p in self.tensors.items())

    def off(self):
        with aurora.disabled(self.model):
            return self.model(self.x)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)

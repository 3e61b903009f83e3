"""aurora.check: adapters that do nothing are found, whatever the cause."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aurora


class Reads(nn.Module):
    """Calls one layer and uses the other as a bag of tensors."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight, self.read.bias)


class Detaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return {"states": [self.after(self.before(x).detach())]}


@pytest.mark.parametrize("options", [{}, {"init": "zero", "projections": "fixed"}])
def test_live_adapters_are_not_reported_and_nothing_stays(options):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2))
    aurora.inject(model, "0|3", **options)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = [set(m.__dict__) for m in model.modules()]
    random = torch.get_rng_state()
    assert aurora.check(model, torch.randn(5, 4, generator=torch.Generator())) == {}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and m.training for m in model.modules())


def test_layers_that_are_read_or_unused_are_named():
    model = Reads()
    aurora.inject(model, "called|read|unused")
    found = aurora.check(model, (torch.randn(3, 4),))
    assert found.keys() == {"read", "unused"}
    assert all("did not run" in reason for reason in found.values())


def test_a_gradient_that_stops_on_the_way_is_named():
    model = Detaches()
    aurora.inject(model, "before|after")
    found = aurora.check(model, {"x": torch.randn(3, 4)})
    assert list(found) == ["before"]
    assert "no gradient" in found["before"]


def test_a_fused_evaluation_that_is_switched_on_again_is_found():
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        aurora.inject(model, "linear[12]")
        assert aurora.check(model, x) == {}
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert aurora.check(model, x).keys() == {"linear1", "linear2"}


def test_inside_disabled_it_says_so():
    model = Detaches()
    aurora.inject(model, "after")
    with aurora.disabled(model):
        assert "aurora.disabled" in aurora.check(model, torch.randn(3, 4))["after"]
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        aurora.check(Detaches(), torch.randn(3, 4))

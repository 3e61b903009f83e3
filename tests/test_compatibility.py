"""Odds and ends of compatibility.md: parametrised layers, and parameters that are away between calls."""

import pytest
import torch
from support import disturb
from torch import nn

import aurora
from aurora import core


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrised_layer_trains_and_is_not_merged(kind):
    torch.manual_seed(0)
    layer = getattr(nn.utils.parametrizations, kind)(nn.Linear(8, 8))
    model = nn.Sequential(layer, nn.Linear(8, 2)).eval()
    x = torch.randn(5, 8)
    plain = model(x)
    aurora.inject(model, "^0$")
    assert torch.equal(model(x), plain)
    assert aurora.check(model, x) == {}
    disturb(model)
    assert not torch.allclose(model(x), plain)
    with aurora.disabled(model):
        assert torch.equal(model(x), plain)
    with pytest.raises(ValueError, match="is quantised, sharded, computed or meta"):
        aurora.merge(model)
    aurora.remove(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("options", [{}, {"mode": "static"}, {"spline": "per-channel"}])
def test_parameters_that_are_there_only_while_their_module_runs(options):
    """What DeepSpeed's ZeRO-3 does, by its means: hooks of each module fill and empty its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    aurora.inject(model, "0|2", **options)
    disturb(model)
    x = torch.randn(5, 8)
    wanted = model(x)
    wanted.square().sum().backward()
    grads = [p.grad.clone() for p in aurora.parameters(model)]
    model.zero_grad()
    whole = {p: p.data for p in model.parameters()}

    def fill(module, *_):
        for p in module.parameters(recurse=False):
            p.data = whole[p]

    def empty(module, *_):
        for p in module.parameters(recurse=False):
            p.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)
        module.register_full_backward_pre_hook(fill)
        empty(module)
    assert not any(p.numel() for p in model.parameters())
    out = model(x.requires_grad_())
    assert not any(p.numel() for p in model.parameters())
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    for p, grad in zip(core.ModelView.adapted(model).trained(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_no_rows():
    model = nn.Sequential(nn.Linear(8, 3))
    aurora.inject(model, "0")
    model(torch.randn(0, 8)).sum().backward()
    assert not model[0].A.grad.any()

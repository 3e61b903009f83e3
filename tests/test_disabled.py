"""aurora.disabled: every block and every thread sees what it asked for; afterwards all is as before."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import aurora


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    aurora.inject(net, "0|2", rank=2)
    for layer in aurora.core.layers(net).values():
        nn.init.normal_(layer.B)
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answers(model, x):
    """(with adapters, without) as they must be."""
    with aurora.disabled(model):
        off = model(x)
    on = model(x)
    assert not torch.equal(on, off)
    return on, off


@torch.no_grad()
def test_blocks_nest(model, x):
    on, off = answers(model, x)
    with aurora.disabled(model):
        with aurora.disabled(model):
            assert torch.equal(model(x), off)
        assert torch.equal(model(x), off)
    assert torch.equal(model(x), on)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1])
def test_blocks_overlap_and_end_in_any_order(model, x, first):
    on, off = answers(model, x)
    blocks = [aurora.disabled(model), aurora.disabled(model)]
    for block in blocks:
        block.__enter__()
    blocks[first].__exit__(None, None, None)
    assert torch.equal(model(x), off)
    blocks[1 - first].__exit__(None, None, None)
    assert torch.equal(model(x), on)
    assert all(layer.enabled for layer in aurora.core.layers(model).values())


@torch.no_grad()
def test_a_part_that_is_off_stays_off_as_long_as_it_was_asked_for(model, x):
    on, off = answers(model, x)
    part = nn.Sequential(model[0])
    with aurora.disabled(model):
        with aurora.disabled(part):
            pass
        assert torch.equal(model(x), off)
    with aurora.disabled(part):
        assert [layer.enabled for layer in aurora.core.layers(model).values()] == [False, True]
    assert torch.equal(model(x), on)


@torch.no_grad()
def test_an_exception_ends_the_block(model, x):
    on, _ = answers(model, x)
    with pytest.raises(KeyError), aurora.disabled(model):
        raise KeyError
    assert torch.equal(model(x), on)


@torch.no_grad()
def test_threads_do_not_see_each_others_blocks(model, x):
    on, off = answers(model, x)
    meet = threading.Barrier(6)

    def serve(disabled):
        wrong = 0
        meet.wait(timeout=60)
        for _ in range(200):
            with torch.no_grad():
                if disabled:
                    with aurora.disabled(model):
                        wrong += not torch.equal(model(x), off)
                else:
                    wrong += not torch.equal(model(x), on)
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(serve, [True, False] * 3)) == 0
    assert torch.equal(model(x), on)


def test_the_backward_of_a_block_is_that_of_the_base(model, x):
    leaf = x.clone().requires_grad_()
    with aurora.disabled(model):
        model(leaf).sum().backward()
    assert all(p.grad is None for p in aurora.parameters(model))
    jacobian = model[2].weight.sum(0) * (
        1 - torch.tanh(x @ model[0].weight.t() + model[0].bias) ** 2
    )
    torch.testing.assert_close(leaf.grad, jacobian @ model[0].weight)

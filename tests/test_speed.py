"""What training costs, in exact counts: operators, bytes kept, graph breaks, recompilations."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import aurora
from aurora import AuroraLinear
from benchmarks.lab import steps

VARIANTS = {
    "default": {},
    "per-channel": {"spline": "per-channel"},
    "static": {"mode": "static"},
    "without F": {"fixed": False},
    "without L": {"learnable": False},
    "sigmoid": {"activation": "sigmoid"},
    "quintic": {"spline_order": 5, "grid_size": 9},
}


def layer(**options) -> AuroraLinear:
    torch.manual_seed(0)
    adapted = AuroraLinear(nn.Linear(64, 64).requires_grad_(False), **options)
    nn.init.normal_(adapted.B)
    return adapted


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_operators_and_bytes(name, rank):
    found = steps.count_layer(layer(rank=rank, **VARIANTS[name]), 64)
    assert found.forward <= 16
    assert found.backward <= 32
    assert found.saved <= 8 * rank


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_count_counts(rank):
    """By hand: a bare linear layer, and LoRA, which keeps its hidden vector of 4 r bytes."""
    bare = steps.count_layer(nn.Linear(64, 64).requires_grad_(False), 64)
    assert bare == (1, 2, 0)  # addmm; mm and the accumulation into x.grad
    assert steps.count(steps.PLAIN, rank=rank).saved == 4 * rank


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        for linear in self.layers:
            x = torch.tanh(linear(x))
        return x


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_to_one_graph_and_stays_compiled(name):
    torch._dynamo.reset()
    model = Tower()
    aurora.inject(model, r"layers", **VARIANTS[name])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(aurora.parameters(model), lr=0.1)
    for _ in range(4):
        loss = compiled(torch.randn(8, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_injecting_on_meta_allocates_nothing():
    with torch.device("meta"):
        model = Tower()
    aurora.inject(model, r"layers")
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(t for m in model.layers for t in m.anl.grid),
    ]
    assert all(t.is_meta for t in tensors)
    assert sum(p.numel() for p in aurora.parameters(model)) == 3 * (2 * 32 + 4 + 16)


def test_a_merged_layer_is_the_plain_layer_again():
    model = Tower()
    plain = list(model.layers)
    aurora.inject(model, r"layers")
    aurora.merge(model)
    assert [*model.layers] == plain
    assert all(
        type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks for m in plain
    )

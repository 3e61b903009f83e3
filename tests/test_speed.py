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
    assert found.forward <= 14
    assert found.backward <= 30
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


def step_of(width: int, tokens: int, rank: int, **options):
    """A training step of one layer: AuroRA's with options, PEFT's LoRA without."""
    torch.manual_seed(0)
    if options:
        model = nn.Sequential(nn.Linear(width, width))
        aurora.inject(model, r"0", rank, **options)
    else:
        model = steps.one_layer(steps.PLAIN, width, rank)
    x = torch.randn(tokens, width, requires_grad=True)
    upstream = torch.randn(tokens, width)

    def step():
        model(x).backward(upstream)
        for p in (x, *model.parameters()):
            p.grad = None

    return step


@pytest.mark.parametrize("spline", ["summed", "per-channel"])
@pytest.mark.parametrize(
    ("width", "tokens", "rank", "grid_size"),
    [(768, 1024, 64, 5), (768, 1024, 16, 5), (768, 1024, 2, 1000), (8, 200_000, 2, 5)],
)
def test_a_step_holds_no_more_memory_than_loras(spline, width, tokens, rank, grid_size):
    """Over ranks, rows and grids; LoRA without anything around it, which PEFT's is above."""
    ours = steps.peak_bytes(step_of(width, tokens, rank, spline=spline, grid_size=grid_size))
    theirs = steps.peak_bytes(step_of(width, tokens, rank))
    assert ours <= 1.1 * theirs


def test_the_memory_of_a_grid_of_10_000_cells_does_not_grow_with_the_rows():
    few, many = (steps.peak_bytes(step_of(8, n, 2, grid_size=10_000)) for n in (2_000, 20_000))
    assert many - few <= 1.5 * 18_000 * 4 * 8 * 4  # a few tensors as large as x


@pytest.mark.parametrize("spline", ["summed", "per-channel"])
def test_operators_do_not_depend_on_the_grid(spline):
    """Of as many points as fit in a block of the finer grid, from the bumps that are not zero."""
    found = []
    for grid_size in (500, 1000):
        torch.manual_seed(0)
        anl = aurora.ANL(2, grid_size=grid_size, spline=spline)
        z = torch.randn(300, 2, requires_grad=True)
        with steps.Operators() as counted:
            anl(z).sum().backward()
        found.append(counted.count)
    assert found[0] == found[1] <= 120


@pytest.mark.parametrize("spline", ["summed", "per-channel"])
def test_batches_of_many_sizes_share_a_graph(spline):
    """PyTorch compiles for the first size it sees, at the second once more for every size."""
    torch._dynamo.reset()
    model = Tower()
    aurora.inject(model, r"layers", spline=spline)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (11, 13, 700, 5000):
        compiled(torch.randn(rows, 16)).square().mean().backward()
    assert counter.frame_count == 2
    with torch.no_grad():  # generation
        for rows in (11, 13, 700, 5000):
            compiled(torch.randn(rows, 16))
    assert counter.frame_count <= 4

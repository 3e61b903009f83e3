"""Two processes on one machine: DDP and FSDP2 train adapters, agree with one process, and save the same file."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import aurora
from aurora import core

pytest.importorskip("safetensors")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    aurora.inject(net, r"^[02]$", train=r"^4\.")
    return net


def step(net: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(aurora.parameters(net), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def worker(rank: int, port: int, kind: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        net = model()
        if kind == "ddp":
            net = nn.parallel.DistributedDataParallel(net)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh("cpu", (2,))
            for layer in core.layers(net).values():
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)
        half = X.chunk(2)[rank]
        step(net, half)
        aurora.save(net, Path(folder) / "adapter.safetensors")
        # Swapped in place, also where parameters are sharded; the values come back.
        before = {n: p.detach().clone() for n, p in core.ModelView.adapted(net).adapter().items()}
        with torch.no_grad():
            for p in aurora.parameters(net):
                p.zero_()
        dist.barrier()
        aurora.load(net, Path(folder) / "adapter.safetensors")
        for name, p in core.ModelView.adapted(net).adapter().items():
            same = torch.equal(
                getattr(p, "_local_tensor", p), getattr(before[name], "_local_tensor", before[name])
            )
            assert same, name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(kind, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, kind, str(tmp_path)), nprocs=2)
    alone = model()
    start = {n: p.detach().clone() for n, p in core.ModelView.adapted(alone).adapter().items()}
    step(alone, X)
    fresh = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    aurora.load(fresh, tmp_path / "adapter.safetensors")
    for name, p in core.ModelView.adapted(fresh).adapter().items():
        torch.testing.assert_close(
            p, core.ModelView.adapted(alone).adapter()[name], rtol=1e-4, atol=1e-6
        )
    assert not torch.equal(fresh[0].B, start["0.B"])

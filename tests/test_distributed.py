"""Two processes on one machine: DDP and FSDP2 train adapters, agree with one process, and save the same file."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support import on_two
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

import aurora
from aurora import core

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def model() -> nn.Module:
    net = plain()
    aurora.inject(net, r"^[02]$", train=r"^4\.")
    return net


def step(net: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(aurora.parameters(net), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def worker(rank: int, kind: str, folder: str) -> None:
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(kind, tmp_path):
    on_two(worker, kind, str(tmp_path))
    alone = model()
    start = {n: p.detach().clone() for n, p in core.ModelView.adapted(alone).adapter().items()}
    step(alone, X)
    fresh = plain()
    aurora.load(fresh, tmp_path / "adapter.safetensors")
    for name, p in core.ModelView.adapted(fresh).adapter().items():
        torch.testing.assert_close(
            p, core.ModelView.adapted(alone).adapter()[name], rtol=1e-4, atol=1e-6
        )
    assert not torch.equal(fresh[0].B, start["0.B"])


def flat_shards(rank: int, folder: str) -> None:
    path = Path(folder) / "adapter.safetensors"
    net = model()
    values = {n: t.clone() for n, t in aurora.adapter_state_dict(net).items()}
    net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    for call in (aurora.save, aurora.load, lambda net, path: aurora.adapter_state_dict(net)):
        with pytest.raises(ValueError, match=r"summon_full_params\(model\)"):
            call(net, path)
    with FullyShardedDataParallel.summon_full_params(net):
        aurora.save(net, path)
        for p in aurora.parameters(net):
            p.detach().zero_()
    dist.barrier()
    with FullyShardedDataParallel.summon_full_params(net):
        aurora.load(net, path)
    with FullyShardedDataParallel.summon_full_params(net):
        for name, tensor in aurora.adapter_state_dict(net).items():
            assert torch.equal(tensor, values[name]), name


def test_fsdp1_is_refused_with_the_way_out_that_works(tmp_path):
    on_two(flat_shards, str(tmp_path))
    aurora.load(fresh := plain(), tmp_path / "adapter.safetensors")
    assert torch.equal(fresh[0].A, model()[0].A)


def shards(rank: int, folder: str) -> None:
    """A full checkpoint out of FSDP2's shards, and back into them."""
    from torch.distributed.fsdp import fully_shard

    net, path = model(), Path(folder) / "model.safetensors"
    for layer in core.layers(net).values():
        fully_shard(layer)
    fully_shard(net)
    step(net, X.chunk(2)[rank])
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(net, options=whole)
    if rank == 0:
        save_file({name: t.contiguous() for name, t in state.items()}, path)
    before = [p.to_local().clone() for p in aurora.parameters(net)]
    with torch.no_grad():
        for p in aurora.parameters(net):
            p.zero_()
    dist.barrier()
    assert aurora.load(net, folder).train == ("4.weight", "4.bias")
    after = [p.to_local() for p in aurora.parameters(net)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_full_checkpoint_of_sharded_parameters(tmp_path):
    on_two(shards, str(tmp_path))
    held = load_file(tmp_path / "model.safetensors")
    fresh = plain()
    assert not fresh.load_state_dict(held, strict=False).missing_keys  # as from_pretrained does
    assert aurora.load(fresh, tmp_path).layers == ("0", "2")
    assert torch.equal(fresh[0].B, held["0.B"])
    assert held["0.B"].any()

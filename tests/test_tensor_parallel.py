"""PyTorch's tensor parallelism, two processes on one machine: refused in either order, and why."""

import pytest
import torch
import torch.distributed as dist
import transformers
from support import disturb
from test_distributed import on_two
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import aurora

IDS = torch.arange(12).reshape(2, 6)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_attention_heads=4, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def split(model: nn.Module) -> nn.Module:
    """As PyTorch's tutorial has it: column-wise into a block, row-wise out of it."""
    into = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in (*into, "mlp.up_proj")}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, dist.init_device_mesh("cpu", (2,)), plan)


def tensor_parallel(rank: int, folder: str) -> None:
    # Adapters are not split; the error comes before anything is.
    net = llama()
    aurora.inject(net, r"q_proj$")
    before = {name: id(p) for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match="not split by tensor parallelism: merge first"):
        split(net)
    assert {name: id(p) for name, p in net.named_parameters()} == before
    net = split(llama())
    with torch.no_grad():
        plain = net(IDS).logits
    for target in (r"q_proj$", r"down_proj$", "all-linear"):
        with pytest.raises(ValueError, match=r"distributed already; .* no whole A x"):
            aurora.inject(net, target)
    with torch.no_grad():
        assert torch.equal(net(IDS).logits, plain)
    # The way out that the error names.
    net = llama()
    aurora.inject(net, r"_proj$", aurora.recommended(rank=2))
    disturb(net)
    aurora.merge(net)
    with torch.no_grad():
        whole = net(IDS).logits
        torch.testing.assert_close(split(net)(IDS).logits, whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole, plain)


def test_tensor_parallelism_is_refused_in_both_orders_and_takes_a_merged_model(tmp_path):
    on_two(tensor_parallel, str(tmp_path))

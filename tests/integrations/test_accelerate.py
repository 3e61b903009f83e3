"""accelerate's offloading to the CPU and to disk, before inject and after; empty weights."""

import accelerate
import pytest
import torch
import transformers
from support import disturb

import aurora
from aurora import core
from aurora.integrations import accelerate as ours

IDS = torch.arange(12).reshape(2, 6)
CPU = torch.device("cpu")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_attention_heads=2, pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    return accelerate.disk_offload(model, str(folder / "weights"), execution_device=CPU)


def dispatched(model, folder):
    """Half of the model kept where it runs, half on disk, as a device map has it."""
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder / "d"))


OFFLOADS = {"cpu": to_cpu, "disk": to_disk, "device map": dispatched}
OFFLOAD = pytest.mark.parametrize("offload", OFFLOADS)


@torch.no_grad()
def answer(model):
    return model(input_ids=IDS).logits


def offloaded(model):
    return {name for name, p in model.named_parameters() if p.is_meta}


def adapted(seed=0):
    """A model on the CPU with an adapter as after training, its output and the base's."""
    model = llama()
    plain = answer(model)
    aurora.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
    disturb(model)
    out = answer(model)
    assert not torch.equal(out, plain)
    return model, out, plain


@OFFLOAD
def test_inject_and_then_offload(offload, tmp_path):
    model, out, plain = adapted()
    model = OFFLOADS[offload](model, tmp_path)
    assert offloaded(model)
    torch.testing.assert_close(answer(model), out, rtol=0, atol=0)
    with aurora.disabled(model):
        assert torch.equal(answer(model), plain)


@OFFLOAD
def test_offload_and_then_inject(offload, tmp_path):
    model, out, plain = adapted()
    state = aurora.adapter_state_dict(model)
    aurora.save(model, tmp_path / "adapter.safetensors")
    model = OFFLOADS[offload](llama(), tmp_path)
    before = offloaded(model)
    assert any("q_proj" in name for name in before)
    done = ours.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
    assert len(done.layers) == 6
    assert torch.equal(answer(model), plain)
    assert offloaded(model) == before, "the base is away again"
    assert not any(p.is_meta for p in aurora.parameters(model))
    aurora.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(model), out)
    with aurora.disabled(model):
        assert torch.equal(answer(model), plain)
    assert aurora.adapter_state_dict(model).keys() == state.keys()
    ours.remove(model)
    assert torch.equal(answer(model), plain)
    assert offloaded(model) == before
    assert not any(isinstance(m, core.AuroraLinear) for m in model.modules())


@OFFLOAD
def test_training_over_an_offloaded_base(offload, tmp_path):
    """The same steps as over a base in memory."""
    weights = []
    for place in (lambda model, folder: model, OFFLOADS[offload]):
        model = place(llama(), tmp_path)
        ours.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
        disturb(model)
        optimizer = torch.optim.SGD(aurora.parameters(model), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        weights.append({n: t.clone() for n, t in aurora.adapter_state_dict(model).items()})
    wanted, found = weights
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_accelerates_own_removal_of_hooks(tmp_path):
    model, out, _ = adapted()
    aurora.save(model, tmp_path / "adapter.safetensors")
    model = to_cpu(llama(), tmp_path)
    ours.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
    aurora.load(model, tmp_path / "adapter.safetensors")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not offloaded(model)
    assert torch.equal(answer(model), out)


@pytest.mark.parametrize("target", ["nothing", "embed_tokens"])
def test_an_error_leaves_the_model_offloaded_as_it_was(target, tmp_path):
    model = to_cpu(llama(), tmp_path)
    plain, before = answer(model), offloaded(model)
    with pytest.raises((ValueError, TypeError)):
        ours.inject(model, target)
    assert torch.equal(answer(model), plain)
    assert offloaded(model) == before


def test_our_own_inject_says_where_to_go(tmp_path):
    with pytest.raises(ValueError, match=r"aurora\.integrations\.accelerate"):
        aurora.inject(to_cpu(llama(), tmp_path), "q_proj")


def test_empty_weights_filled_from_a_checkpoint(tmp_path):
    """Big models are made without memory and filled while they are dispatched; inject comes after."""
    model, out, plain = adapted()
    aurora.save(model, tmp_path / "adapter.safetensors")
    llama().save_pretrained(tmp_path / "base")
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(llama().config)
    assert all(p.is_meta for p in model.parameters())
    model = accelerate.load_checkpoint_and_dispatch(
        model.eval(), str(tmp_path / "base"), device_map={"": "cpu"}
    )
    ours.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
    assert torch.equal(answer(model), plain)
    aurora.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(model), out)


# accelerate's loader with a device map sets parameters and buffers by name, and has no place for
# extra state, PyTorch's third kind, which holds our options. There are two ways around it.


def test_a_checkpoint_of_an_injected_model_fills_the_bare_one_and_then_brings_the_adapter(tmp_path):
    model, out, plain = adapted()
    model.save_pretrained(tmp_path / "whole")
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(llama().config)
    model = accelerate.load_checkpoint_and_dispatch(
        model.eval(), str(tmp_path / "whole"), device_map={"": "cpu"}
    )
    assert torch.equal(answer(model), plain)
    ours.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
    assert aurora.load(model, tmp_path / "whole").left == ()
    assert torch.equal(answer(model), out)


def test_a_checkpoint_of_an_injected_model_fills_an_injected_one_without_a_device_map(tmp_path):
    model, out, _ = adapted()
    model.save_pretrained(tmp_path / "whole")
    model = llama()
    aurora.inject(model, r"(q|v|down)_proj", aurora.recommended(rank=2))
    with pytest.raises(ValueError, match="a buffer named _extra_state"):  # accelerate's own words
        accelerate.load_checkpoint_in_model(model, str(tmp_path / "whole"), device_map={"": "cpu"})
    accelerate.load_checkpoint_in_model(model, str(tmp_path / "whole"), strict=True)
    assert torch.equal(answer(model), out)

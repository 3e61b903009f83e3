"""What cannot be adapted is refused with the reason and a way out, which works; on real classes."""

import pytest
import torch
import transformers
from support import everything
from torch import nn

import aurora
from aurora import core

IDS = torch.arange(12).reshape(2, 6)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OWN = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Mamba": {"state_size": 4},
    "FalconMamba": {"state_size": 4},
    "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
}


def model(kind):
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if "Mamba" in kind:
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
            del sizes[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, **OWN[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def refused(subject, target, match, error=ValueError):
    before = everything(subject)
    with pytest.raises(error, match=match):
        aurora.inject(subject, target)
    assert everything(subject) == before


EXPERTS = ["Mixtral", "Qwen2Moe", "GptOss"]


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_in_one_tensor_are_refused_with_what_can_be_adapted(kind):
    experts = "attention and shared experts can be adapted"
    refused(model(kind), r"mlp\.experts$", experts, TypeError)
    refused(model(kind), r"experts\.gate_up_proj", experts)
    router = next(n for n, m in model(kind).named_modules() if type(m).__name__.endswith("Router"))
    refused(model(kind), router.replace(".", r"\.") + "$", "train= trains it whole", TypeError)


@pytest.mark.parametrize("kind", EXPERTS)
def test_around_experts_everything_works(kind):
    subject = model(kind)
    with torch.no_grad():
        plain = subject(IDS).logits
    done = aurora.inject(subject, "all-linear", train=r"experts\.down_proj$")
    shared = {"shared_expert.up_proj", "shared_expert_gate"} if kind == "Qwen2Moe" else set()
    names = {name.partition("mlp.")[2] for name in done.layers}
    assert shared <= names
    assert any(name.endswith("self_attn.q_proj") for name in done.layers)
    assert aurora.check(subject, IDS) == {}
    with torch.no_grad():
        assert torch.equal(subject(IDS).logits, plain)
    optimizer = torch.optim.AdamW(aurora.parameter_groups(subject, lr=1e-2))
    before = subject.model.layers[0].mlp.experts.down_proj.detach().clone()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = subject(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(subject.model.layers[0].mlp.experts.down_proj, before)


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Mamba2"])
def test_what_mambas_kernels_read_is_refused_and_left_out_of_all_linear(kind):
    subject = model(kind)
    refused(subject, "out_proj", "Mamba's kernels read the layer's weight; in_proj can be adapted")
    if kind != "Mamba2":
        refused(subject, "dt_proj", "bypasses its adapter")
        refused(subject, "x_proj", "bypasses its adapter")
    done = aurora.inject(subject, "all-linear")
    assert list(done.layers) == ["backbone.layers.0.mixer.in_proj"]
    assert aurora.check(subject, IDS) == {}


def test_the_layer_that_is_never_called_is_also_found_by_check():
    """Why it is refused: an adapter there does nothing."""
    subject = model("Mamba")
    core.AuroraLinear(subject.backbone.layers[0].mixer.dt_proj)
    assert "did not run" in aurora.check(subject, IDS)["backbone.layers.0.mixer.dt_proj"]


def test_jambas_projections_are_called():
    config = transformers.JambaConfig(
        **SIZES | {"num_hidden_layers": 2}, num_experts=2, attn_layer_offset=1,
        attn_layer_period=2, expert_layer_period=2, mamba_d_state=4,
    )  # fmt: skip
    subject = transformers.JambaForCausalLM(config).eval()
    refused(subject, "dt_proj", "Mamba's kernels")
    names = [name.rpartition(".")[2] for name in aurora.inject(subject, r"(in|x|out)_proj$").layers]
    assert names == ["in_proj", "x_proj", "out_proj"]
    assert aurora.check(subject, IDS) == {}


KINDS = {
    "LSTM": (lambda: nn.LSTM(4, 4), "a kernel reads all its weights"),
    "GRU": (lambda: nn.GRU(4, 4), "a kernel reads all its weights"),
    "Embedding": (lambda: nn.Embedding(4, 4), "looks up rows"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(4, 4), "looks up rows"),
    "Conv1d": (lambda: nn.Conv1d(4, 4, 3), "multiplies patches"),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3), "multiplies patches"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 3), "multiplies patches"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), r"aurora\.unfuse_attention"),
    "LayerNorm": (lambda: nn.LayerNorm(4), "which is not linear$"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind):
    make, why = KINDS[kind]
    subject = nn.Sequential(make(), nn.Linear(4, 4))
    refused(subject, "^0$", f"a {kind}, which is not linear.*{why}|a {kind}, {why}", TypeError)
    done = aurora.inject(subject, "1", train=r"^0\.")  # the way out
    assert done.trainable > 4 * 4
    assert all(p.requires_grad for p in subject[0].parameters())

"""Our tuner under PEFT's public API, by the idea of PEFT's own suite.

One table of cases runs through what is asked of every method, and each behaviour first makes sure
that it could fail: adapters that are not 0 change the output, a step moves what trains.
"""

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch
import transformers
from support import is_at_once
from torch import nn
from transformers.pytorch_utils import Conv1D

import aurora
from aurora import core
from aurora.integrations import peft as ours
from aurora.integrations.peft import AuroraPeftConfig, from_aurora, hotswap_adapter, to_aurora

pytestmark = pytest.mark.filterwarnings("error:.*:UserWarning:aurora")
# For older ends of the range; neither skips with what the test command installs.
VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])
NEEDS_020 = pytest.mark.skipif(VERSION < (0, 20), reason="transformers 5 imports newer parts of it")
NEEDS_021 = pytest.mark.skipif(VERSION < (0, 21), reason="converting to LoRA is new")
IDS = torch.arange(12).reshape(2, 6)


class Mlp(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(8, 8, bias=False, dtype=dtype), nn.ReLU())
        self.head = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.block(self.first(x)))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class Embedded(nn.Module):
    """With an embedding, as language models have, and GPT-2's transposed layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.conv = Conv1D(8, 6)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(torch.relu(self.conv(self.embed(ids))))


def bert():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.BertConfig(
        vocab_size=32, max_position_embeddings=16, num_labels=3, **sizes
    )
    return transformers.BertForSequenceClassification(config)


def llama():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=32, pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config)


def rows(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, generator=generator).to(dtype)


# A model, its input, the configuration, and the layers that it is to adapt.
MLP = (Mlp, rows)
CASES = {
    "one layer": (*MLP, {"target_modules": ["first"]}, ["first"]),
    "two layers": (*MLP, {"target_modules": ["first", "block.1"]}, ["first", "block.1"]),
    "a regex": (*MLP, {"target_modules": r"first|block\.[13579]"}, ["first", "block.1"]),
    "all linear": (*MLP, {"target_modules": "all-linear"}, ["first", "block.1", "head"]),
    "excluded": (
        *MLP,
        {"target_modules": "all-linear", "exclude_modules": ["block.1"]},
        ["first", "head"],
    ),
    "ranks by layer": (
        *MLP,
        {
            "target_modules": ["first", "block.1"],
            "rank_pattern": {"first": 3},
            "alpha_pattern": {"block.1": 7},
        },
        ["first", "block.1"],
    ),
    "with a head": (*MLP, {"target_modules": ["first"], "modules_to_save": ["head"]}, ["first"]),
    "rank 4": (*MLP, {"r": 4, "alpha": 3.0, "target_modules": ["block.1"]}, ["block.1"]),
    "static": (*MLP, {"mode": "static", "target_modules": ["first"]}, ["first"]),
    "per channel": (*MLP, {"spline": "per-channel", "target_modules": ["first"]}, ["first"]),
    "without F": (*MLP, {"fixed": False, "target_modules": ["first"]}, ["first"]),
    "without L": (*MLP, {"learnable": False, "target_modules": ["first"]}, ["first"]),
    "from zero": (*MLP, {"init": "zero", "target_modules": ["first"]}, ["first"]),
    "as LoRA": (
        *MLP,
        {"activation": "identity", "init": "identity", "target_modules": ["first"]},
        ["first"],
    ),
    "fixed projections": (
        *MLP,
        {"projections": "fixed", "init": "zero", "target_modules": ["first"]},
        ["first"],
    ),
    "another grid": (
        *MLP,
        {
            "grid_size": 9,
            "spline_order": 2,
            "grid_range": (-2, 2),
            "activation": "sigmoid",
            "target_modules": ["first"],
        },
        ["first"],
    ),
    "bfloat16": (
        lambda: Mlp(torch.bfloat16),
        lambda: rows(torch.bfloat16),
        {"target_modules": ["first"]},
        ["first"],
    ),
    "float64": (
        lambda: Mlp(torch.float64),
        lambda: rows(torch.float64),
        {"target_modules": ["first"]},
        ["first"],
    ),
    "one layer, two names": (Shared, rows, {"target_modules": ["first"]}, ["first"]),
    "Conv1D": (Embedded, lambda: IDS, {"target_modules": ["conv"]}, ["conv"]),
    "BERT": (
        bert,
        lambda: IDS,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "layers_to_transform": [1]},
        ["bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.1.attention.self.value"],
    ),
    "LLaMA": (
        llama,
        lambda: IDS,
        {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
        [
            f"model.layers.{i}.{name}"
            for i in range(2)
            for name in ("self_attn.q_proj", "mlp.down_proj")
        ],
    ),
}
CASE = pytest.mark.parametrize("case", CASES)


def build(case):
    """(the base model, its input, its output, a configuration)."""
    make, inputs, options, _ = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    return model, inputs(), answer(model, inputs()), AuroraPeftConfig(**options)


def answer(model, x, **kwargs):
    with torch.no_grad():
        out = model(x, **kwargs)
    return getattr(out, "logits", out)


def disturb(model, adapter="default", seed=7):
    """Give an adapter, and its heads, values as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter}." in name:
            with torch.no_grad():
                p.add_((0.5 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def adapted(case, **more):
    """(the PEFT model with an adapter as after training, input, its output, the base's output)."""
    model, x, plain, config = build(case)
    model = peft.get_peft_model(model, config, **more).eval()
    disturb(model, more.get("adapter_name", "default"))
    out = answer(model, x)
    assert not torch.equal(out, plain)
    return model, x, out, plain


def layers(model):
    prefix = "base_model.model."
    found = {n: m for n, m in model.named_modules() if isinstance(m, ours.AuroraTunerLinear)}
    return {name.removeprefix(prefix): module for name, module in found.items()}


def trains(model, adapter="default"):
    """The names of what is to train with an adapter: all of it, or all but its projections."""
    names = {name for name, _ in model.named_parameters() if f".{adapter}." in name}
    if model.peft_config[adapter].projections == "fixed":
        names = {name for name in names if ".aurora_anl." in name}
    return names


# --- Every case, every behaviour ------------------------------------------------------------------


@CASE
def test_start_is_the_base_bit_for_bit(case):
    model, x, plain, config = build(case)
    model = peft.get_peft_model(model, config).eval()
    assert list(layers(model)) == CASES[case][3]
    assert torch.equal(answer(model, x), plain)
    disturb(model)
    assert not torch.equal(answer(model, x), plain)


@CASE
def test_training_moves_the_adapter_and_nothing_else(case):
    model, x, _, config = build(case)
    model = peft.get_peft_model(model, config)
    disturb(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == trains(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1, eps=1e-30)
    out = model(x)
    getattr(out, "logits", out).float().square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


@CASE
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(case, low_cpu_mem_usage, tmp_path):
    model, x, out, _ = adapted(case)
    model.save_pretrained(tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    tensors = {".aurora_A.weight", ".aurora_B.weight", ".aurora_anl.H"}
    tensors |= {".aurora_anl.spline_weight", ".aurora_anl._extra_state"}
    mine = {name for name in names if any(name.endswith(end) for end in tensors)}
    heads = {f"base_model.model.{m}.weight" for m in CASES[case][2].get("modules_to_save", [])}
    assert mine
    assert (
        heads
        <= names - mine
        <= {n.replace("weight", end) for n in heads for end in ("weight", "bias")}
        | (
            {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
            if case == "BERT"
            else set()
        )
    )
    fresh = build(case)[0]
    again = peft.PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    saved, loaded = model.state_dict(), again.state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in saved.items() if ".aurora_" in name)
    # Not equal: MKL rounds by where numbers lie, and tensors of a file need not be aligned.
    torch.testing.assert_close(answer(again, x), out)
    assert not any(m.grid.one.is_meta for m in again.modules() if isinstance(m, core.ANL))
    kept = {p.dtype for name, p in again.named_parameters() if ".aurora_" in name}
    assert kept == {torch.float64 if case == "float64" else torch.float32}
    assert again.peft_config["default"].options("x") == model.peft_config["default"].options("x")


@CASE
def test_disable_adapter(case):
    model, x, out, plain = adapted(case)
    with model.disable_adapter():
        assert torch.equal(answer(model, x), plain)
    assert torch.equal(answer(model, x), out)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(answer(model, x), out)


@CASE
def test_second_adapter_set_and_deleted(case):
    model, x, out, plain = adapted(case)
    options = {**CASES[case][2], "r": 5, "rank_pattern": {}, "spline": "per-channel"}
    model.add_adapter("other", AuroraPeftConfig(**options))
    model.eval()
    assert torch.equal(answer(model, x), out), "a new adapter is not active"
    disturb(model, "other", seed=8)
    model.set_adapter("other")
    other = answer(model, x)
    assert not torch.equal(other, out)
    assert not torch.equal(other, plain)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains(model, "other")
    model.set_adapter("default")
    assert torch.equal(answer(model, x), out)
    model.delete_adapter("other")
    assert torch.equal(answer(model, x), out)
    assert not any(".other." in name for name in model.state_dict())


@CASE
def test_rows_of_one_batch_with_their_own_adapters(case):
    model, x, out, plain = adapted(case)
    model.add_adapter("other", AuroraPeftConfig(**CASES[case][2]))
    disturb(model.eval(), "other", seed=8)
    model.set_adapter("other")
    other = answer(model, x)
    close = {"rtol": 0.05, "atol": 0.05} if case == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    for names, wanted in {
        ("default", "other"): (out[0], other[1]),
        ("__base__", "default"): (plain[0], out[1]),
        ("other", "other"): (other[0], other[1]),
    }.items():
        torch.testing.assert_close(
            answer(model, x, adapter_names=list(names)), torch.stack(wanted), **close
        )
    assert (out - other).abs().max() > 0.01


@CASE
@pytest.mark.filterwarnings("ignore:a static merge")
def test_merge_and_unmerge(case):
    model, x, out, plain = adapted(case)
    weights = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    model.merge_adapter()
    merged = answer(model, x)
    assert not torch.equal(merged, plain)
    if case == "static":
        torch.testing.assert_close(merged, out)
    for name, layer in layers(model).items():
        torch.testing.assert_close(
            layer.weight, weights[name] + layer.get_delta_weight("default").to(plain.dtype)
        )
    model.unmerge_adapter()
    assert torch.equal(answer(model, x), out)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers(model).items())
    plain_model = copy.deepcopy(model).merge_and_unload()
    assert not [m for m in plain_model.modules() if isinstance(m, ours.AuroraTunerLinear)]
    torch.testing.assert_close(answer(plain_model, x), merged)


@CASE
def test_merge_as_our_own_merge_does(case):
    """`merge_and_unload(method=...)` and `aurora.merge` of the same adapter agree."""
    model, x, _out, _ = adapted(case)
    torch.manual_seed(3)
    more = [x, x.flip(1)] if x.is_floating_point() else [x, x + 1, x.flip(0)]
    batches = [batch % 12 if not x.is_floating_point() else batch for batch in more]
    wanted = to_aurora(copy.deepcopy(model))
    aurora.merge(wanted, "calibrated", batches)
    merged = model.merge_and_unload(method="calibrated", batches=batches)
    assert not [
        m for m in merged.modules() if isinstance(m, (ours.AuroraTunerLinear, core.AuroraLinear))
    ]
    wanted, state = wanted.state_dict(), merged.state_dict()
    assert wanted.keys() == state.keys()
    assert all(torch.equal(wanted[name], state[name]) for name in state)


@CASE
def test_to_our_own_form_and_back(case, tmp_path):
    model, x, out, _plain = adapted(case)
    kept = {p for n, p in model.named_parameters() if ".aurora_" in n}
    mine = to_aurora(model)
    assert torch.equal(answer(mine, x), out)
    assert kept == {
        p for layer in core.layers(mine).values() for p in layer.adapter_parameters().values()
    }
    aurora.save(mine, tmp_path / "adapter.safetensors")
    fresh = build(case)[0]
    aurora.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(fresh, x), out)
    back = from_aurora(fresh, task_type=CASES[case][2].get("task_type"))
    assert torch.equal(answer(back, x), out)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == trains(back)
    back.save_pretrained(tmp_path / "folder")
    again = peft.PeftModel.from_pretrained(build(case)[0], tmp_path / "folder")
    assert torch.equal(answer(again, x), out)


@CASE
def test_hot_swap_keeps_every_tensor_in_place(case, tmp_path):
    model, x, out, _ = adapted(case)
    model.save_pretrained(tmp_path)
    disturb(model, seed=9)
    assert not torch.equal(answer(model, x), out)
    before = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path)
    assert torch.equal(answer(model, x), out)
    assert all(p is before[name] for name, p in model.named_parameters())


@CASE
def test_copies_and_pickles(case, tmp_path):
    model, x, out, _ = adapted(case)
    assert torch.equal(answer(copy.deepcopy(model), x), out)
    if not case.startswith(("bfloat16", "float64")):  # a lambda makes these
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(answer(torch.load(tmp_path / "model.pt", weights_only=False), x), out)


@CASE
def test_the_state_dict_alone_says_which_layers(case):
    model, x, out, _ = adapted(case)
    state = peft.get_peft_model_state_dict(model)
    fresh, _, _, config = build(case)
    config.target_modules = {"no such layer"}
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        fresh = peft.inject_adapter_in_model(config, fresh, state_dict=named).eval()
    assert list(layers(fresh)) == CASES[case][3]
    peft.set_peft_model_state_dict(fresh, named)
    assert torch.equal(answer(fresh, x), out)


@CASE
def test_status_and_count(case, capsys):
    model, *_ = adapted(case)
    model.print_trainable_parameters()
    config = model.peft_config["default"]
    count = 0
    for name, layer in layers(model).items():
        c = config.options(name)
        if c.projections == "trained":
            count += c.rank * (layer.in_features + layer.out_features)
        count += c.rank * c.rank * c.fixed
        count += c.rank * (c.grid_size + c.spline_order) * c.learnable
    count += sum(p.numel() for n, p in model.named_parameters() if ".modules_to_save." in n)
    assert f"trainable params: {count:,d} ||" in capsys.readouterr().out
    status = peft.get_model_status(model)
    heads = {
        n.split(".modules_to_save")[0]
        for n, _ in model.named_parameters()
        if ".modules_to_save." in n
    }
    assert status.num_adapter_layers == len(CASES[case][3]) + len(heads)
    assert status.peft_types == {"default": "AURORA_ADAPTERS"}
    some = "irregular" if case == "fixed projections" else True
    assert status.requires_grad == {"default": some}


@CASE
def test_training_mode_changes_dropout_only(case):
    """And no weight, merged or not: PEFT has methods that merge in eval()."""
    model, x, out, _ = adapted(case)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train().eval()
    assert torch.equal(answer(model, x), out)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- Registration ---------------------------------------------------------------------------------


def test_importing_aurora_imports_no_peft():
    code = "import sys, aurora, aurora.integrations; print([m for m in sys.modules if 'peft' in m])"
    root = pathlib.Path(aurora.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_registration_is_in_memory_only():
    """PEFT's files know nothing of us, its enum and dictionaries do."""
    source = pathlib.Path(sys.modules["peft.utils.peft_types"].__file__).read_text(encoding="utf-8")
    assert "LORA" in source
    assert "AURORA_ADAPTERS" not in source
    assert peft.PeftType("AURORA_ADAPTERS") is peft.PeftType.AURORA_ADAPTERS
    assert peft.PeftType.AURORA_ADAPTERS in list(peft.PeftType)
    assert json.dumps(peft.PeftType.AURORA_ADAPTERS) == '"AURORA_ADAPTERS"'
    config = peft.get_peft_config({"peft_type": "AURORA_ADAPTERS", "r": 3, "target_modules": ["x"]})
    assert type(config) is AuroraPeftConfig
    assert copy.deepcopy(config) == config


def test_options_and_defaults_are_those_of_auroraconfig():
    config = AuroraPeftConfig(target_modules=["x"])
    assert config.options("x") == aurora.AuroraConfig()
    fields = {field.name for field in dataclasses.fields(aurora.AuroraConfig)} - {"rank"}
    assert fields < set(AuroraPeftConfig.__dataclass_fields__)


def test_a_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "aurora.integrations.peft")
    with pytest.raises(ImportError, match=r"aurora-adapters\[peft\]"):
        __import__("aurora.integrations.peft")


# --- Refusals: an error that says why, and a model that is as it was ------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"mode": "other"},
        {"grid_range": (1, 0)},
        {"rank_pattern": {"first": 0}},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="must be"):
        AuroraPeftConfig(target_modules=["first"], **options)


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(*[self.first(x)] * 3)[0]


REFUSED = {
    "nothing matches": (Mlp, {"target_modules": ["nothing"]}, ValueError, "not found"),
    "an activation": (
        Mlp,
        {"target_modules": ["first", "block.0"]},
        TypeError,
        "block.0 is a ReLU",
    ),
    "an embedding": (
        Embedded,
        {"target_modules": ["conv", "embed"]},
        TypeError,
        "embed is a Embedding",
    ),
    "never called": (
        Bypassing,
        {"target_modules": ["first", "out_proj"]},
        ValueError,
        "out_proj: MultiheadAttention bypasses its adapter: it reads the layer's weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_untouched(case):
    make, options, error, message = REFUSED[case]
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, AuroraPeftConfig(**options))
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_leaves_out_what_would_not_run():
    model = peft.get_peft_model(Bypassing(), AuroraPeftConfig(target_modules="all-linear"))
    assert list(layers(model)) == ["first"]


MERGES = {
    "merge_adapter": lambda model, x: model.merge_adapter(),
    "static": lambda model, x: model.merge_and_unload(),
    "calibrated": lambda model, x: model.merge_and_unload(method="calibrated", batches=[x]),
    "linear": lambda model, x: model.merge_and_unload(method="linear"),
    "no such method": lambda model, x: model.merge_and_unload(method="no such method"),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.filterwarnings("ignore:a static merge")
def test_a_failed_merge_leaves_the_model_as_it_was(merge):
    model, x, *_ = adapted("two layers")
    with torch.no_grad():
        layers(model)["block.1"].aurora_B["default"].weight[0, 0] = torch.nan
    broken = answer(model, x)
    assert not broken.isfinite().all()
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaN or infinity|method must be"):
        MERGES[merge](model, x)
    torch.testing.assert_close(answer(model, x), broken, rtol=0, atol=0, equal_nan=True)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0, equal_nan=True)


def test_a_tied_weight_is_not_merged_into():
    torch.manual_seed(0)
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = peft.get_peft_model(
            model, AuroraPeftConfig(mode="static", target_modules=["lm_head"])
        )
    with pytest.raises(ValueError, match="tied to another module"):
        model.merge_and_unload()


def test_a_static_merge_of_a_dynamic_adapter_warns():
    model, *_ = adapted("one layer")
    with pytest.warns(UserWarning, match="another function than was trained"):
        model.merge_adapter()


def test_hot_swap_refuses_what_does_not_fit(tmp_path):
    model, x, out, _ = adapted("one layer")
    for i, options in enumerate(
        [{"r": 4}, {"alpha": 7}, {"spline": "per-channel"}, {"target_modules": ["head"]}]
    ):
        other = peft.get_peft_model(
            Mlp(), AuroraPeftConfig(**{"target_modules": ["first"], **options})
        )
        other.save_pretrained(tmp_path / str(i))
        with pytest.raises(ValueError, match="cannot take the place of adapter 'default'"):
            hotswap_adapter(model, tmp_path / str(i))
        assert torch.equal(answer(model, x), out)
    model.save_pretrained(tmp_path / "same")
    with pytest.warns(UserWarning, match="static merge"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, tmp_path / "same")


def test_what_peft_cannot_express_is_refused():
    model = Mlp()
    aurora.inject(model, "first", 2)
    aurora.inject(model, "block", 2, spline="per-channel")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"block\.1 has other options than first"):
        from_aurora(model)
    assert dict(model.named_modules()) == before
    model = Mlp()
    aurora.inject(model, "first", 2, train=r"head\.bias")
    with pytest.raises(ValueError, match="some parameters of head train"):
        from_aurora(model)


def test_our_own_form_needs_one_adapter():
    model, *_ = adapted("one layer")
    with pytest.raises(ValueError, match="no adapter 'missing'"):
        to_aurora(model, "missing")
    with pytest.raises(TypeError, match="AuroRA"):
        to_aurora(peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["first"])))
    model.add_adapter("other", AuroraPeftConfig(target_modules=["first"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="name an adapter; active are: default, other"):
        to_aurora(model)
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.merge_and_unload(method="linear")


# --- Several adapters -----------------------------------------------------------------------------


def test_active_adapters_add_up_and_merge_together():
    model, x, out, _plain = adapted("static")
    model.add_adapter(
        "other", AuroraPeftConfig(mode="static", r=3, target_modules=["first", "head"])
    )
    disturb(model.eval(), "other", seed=8)
    model.base_model.set_adapter(["default", "other"])
    both = answer(model, x)
    assert not torch.equal(both, out)
    weight = layers(model)["first"].weight.detach().clone()
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(answer(model, x), both)
    model.unmerge_adapter()
    assert torch.equal(layers(model)["first"].weight, weight)
    torch.testing.assert_close(answer(model.merge_and_unload(), x), both)


def test_adapter_names_are_checked():
    model, x, *_ = adapted("one layer")
    with pytest.raises(ValueError, match="adapter_names has typo; the model has"):
        model(x, adapter_names=["default", "typo"])
    with pytest.raises(ValueError, match="3 names, and a layer got 2 rows"):
        model(x, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="inference"):
        model.train()(x, adapter_names=["default"] * 2)
    model.eval()(x, adapter_names=["default"] * 2)
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generation_with_an_adapter_a_row(options):
    model, ids, *_ = adapted("LLaMA")
    model.add_adapter("other", AuroraPeftConfig(target_modules="all-linear"))
    disturb(model.eval(), "other", seed=8)
    generate = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        **options,
    )
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = model.generate(**generate)
    found = model.generate(**generate, adapter_names=["other", "default"])
    half = len(found) // 2
    assert torch.equal(found[:half], wanted["other"][:half])
    assert torch.equal(found[half:], wanted["default"][half:])
    assert not torch.equal(wanted["default"], wanted["other"])


# --- What builds on PEFT --------------------------------------------------------------------------


def test_auto_peft_model(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        model, AuroraPeftConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    disturb(model)
    out = answer(model.eval(), IDS)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(answer(again, IDS), out)
    with again.disable_adapter():
        assert not torch.equal(answer(again, IDS), out)


@NEEDS_020
def test_the_adapters_of_transformers_models(tmp_path, monkeypatch):
    """`model.add_adapter` and `load_adapter`, which call PEFT without a PeftModel."""
    # transformers 5.24 asks for a PEFT that is newer than any there is.
    monkeypatch.setattr(
        "transformers.integrations.peft.check_peft_version", lambda min_version: None
    )
    torch.manual_seed(0)
    model = llama().eval()
    plain = answer(model, IDS)
    model.add_adapter(AuroraPeftConfig(target_modules=["q_proj", "v_proj"]))
    disturb(model)
    out = answer(model, IDS)
    model.save_pretrained(tmp_path)
    assert "adapter_model.safetensors" in {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" not in {path.name for path in tmp_path.iterdir()}
    model.disable_adapters()
    assert torch.equal(answer(model, IDS), plain)
    torch.manual_seed(0)
    again = llama().eval()
    again.load_adapter(str(tmp_path))
    assert torch.equal(answer(again, IDS), out)
    again.delete_adapter("default")
    assert torch.equal(answer(again, IDS), plain)


@NEEDS_021
def test_a_static_adapter_becomes_a_lora(tmp_path):
    """And with that a file for whatever reads LoRA only, as servers do."""
    model, x, out, _ = adapted("static")
    config, state = peft.convert_to_lora(model, rank=2)
    lora = peft.get_peft_model(build("static")[0], config)
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(answer(lora.eval(), x), out)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(adapted("one layer")[0], rank=2)


def test_the_adapters_of_diffusers_models():
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    inputs = torch.randn(1, 2, 8, 8), torch.tensor(3), torch.randn(1, 4, 8)

    def run():
        with torch.no_grad():
            return unet(*inputs).sample

    plain = run()
    unet.add_adapter(AuroraPeftConfig(r=2, target_modules=["to_q", "to_v"]))
    assert torch.equal(run(), plain)
    disturb(unet)
    out = run()
    assert not torch.equal(out, plain)
    unet.disable_adapters()
    assert torch.equal(run(), plain)
    unet.enable_adapters()
    assert torch.equal(run(), out)


def test_parameter_groups():
    model, *_ = adapted("with a head")
    groups = ours.parameter_groups(model, lr=1e-3)
    names = {p: name for name, p in model.named_parameters()}
    assert [(g["lr"], g.get("weight_decay")) for g in groups] == [(1e-3, None), (1e-2, 0.0)]
    assert {names[p] for g in groups for p in g["params"]} == trains(model)
    assert all(".aurora_anl." in names[p] for p in groups[1]["params"])
    assert not any(".aurora_anl." in names[p] for p in groups[0]["params"])
    with pytest.raises(ValueError, match="no AuroRA adapter"):
        ours.parameter_groups(Mlp(), lr=1e-3)


def gradients(model):
    torch.manual_seed(0)
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_changes_no_gradient():
    model, *_ = adapted("LLaMA")
    wanted = gradients(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    assert (
        found.keys() == wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    )
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name])


def test_one_graph():
    """Of the PEFT model; on a torch that does not see through PEFT's context, of its base."""
    model, x, out, _ = adapted("LLaMA")
    torch._dynamo.reset()
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7)
    whole = model.get_base_model() if old else model
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    torch.testing.assert_close(answer(compiled, x), out)


def test_an_offloaded_base(tmp_path):
    import accelerate

    model, x, out, _ = adapted("two layers")
    model.save_pretrained(tmp_path)
    base, _, plain, config = build("two layers")
    base = accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    assert next(base.first.parameters()).is_meta
    model = peft.get_peft_model(base, config).eval()
    assert torch.equal(answer(model, x), plain)
    peft.set_peft_model_state_dict(
        model, safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    )
    assert torch.equal(answer(model, x), out)


# --- aurora-peft ----------------------------------------------------------------------------------

THEIRS = pathlib.Path(__file__).parent / "aurora_peft"


class Theirs(nn.Module):
    """The model that aurora-peft 0.1.5 adapted when the folder beside this file was made."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(6, 8),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def test_a_folder_of_aurora_peft(tmp_path):
    """Weights, input and output were written by aurora-peft 0.1.5, in an environment of its own."""
    answers = safetensors.torch.load_file(THEIRS / "answers.safetensors")
    model = Theirs().eval()
    base = {
        name.removeprefix("base."): tensor
        for name, tensor in answers.items()
        if name.startswith("base.")
    }
    model.load_state_dict(base)
    assert (answer(model, answers["x"]) - answers["y"]).abs().max() > 0.1
    ours.convert_aurora_peft(THEIRS, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    torch.testing.assert_close(answer(model, answers["x"]), answers["y"], rtol=1e-6, atol=1e-6)
    model = to_aurora(model)
    torch.testing.assert_close(answer(model, answers["x"]), answers["y"], rtol=1e-6, atol=1e-6)


def test_a_folder_that_is_not_aurora_peft(tmp_path):
    model, *_ = adapted("one layer")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type 'AURORA_ADAPTERS'"):
        ours.convert_aurora_peft(tmp_path, tmp_path / "other")
    with pytest.raises(KeyError, match="AURORA"):
        peft.PeftModel.from_pretrained(Theirs(), THEIRS)


def test_attention_that_was_unfused():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    names, x = set(model.state_dict()), torch.randn(2, 5, 8)
    aurora.unfuse_attention(model)
    plain = model(x)
    config = AuroraPeftConfig(r=2, target_modules=["q_proj", "v_proj", "out_proj"])
    wrapped = peft.get_peft_model(model, config)
    assert torch.equal(wrapped(x), plain)
    for p in wrapped.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    assert not torch.allclose(wrapped(x), plain)
    with pytest.raises(ValueError, match="is a AuroraTunerLinear now"):
        aurora.fuse_attention(model)
    merged = wrapped.merge_and_unload(method="static")
    wanted = merged(x)
    aurora.fuse_attention(merged)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged(x), wanted, rtol=1e-4, atol=1e-5)


def two_adapters(model):
    config = AuroraPeftConfig(target_modules=["first"], init="identity", activation="identity")
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])


APART = {
    "a hook on the base": lambda m: m.base_model.model.first.base_layer.register_forward_hook(
        lambda module, args, out: 2 * out
    ),
    "two adapters at once": two_adapters,
    "the adapter is off": lambda m: m.base_model.disable_adapter_layers(),
    "without a gradient": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("what", [None, *APART])
def test_base_and_adapter_run_at_once_where_that_is_the_same(what, monkeypatch):
    torch.manual_seed(0)
    options = {"target_modules": ["first"], "init": "identity", "activation": "identity"}
    model = peft.get_peft_model(Mlp(), AuroraPeftConfig(**options)).eval()
    layer = model.base_model.model.first
    torch.nn.init.normal_(layer.aurora_B["default"].weight)
    if what is not None:
        APART[what](model)
    found = layer(rows())
    with monkeypatch.context() as patch:
        patch.setattr(ours._layer, "at_once", lambda *args: None)
        torch.testing.assert_close(found, layer(rows()))
    assert not torch.allclose(found, layer.base_layer(rows())) or what == "the adapter is off"
    if found.requires_grad:
        assert is_at_once(found) == (what is None)
    else:
        assert what in ("without a gradient", "the adapter is off")

"""nn.MultiheadAttention as four linear layers: the same numbers, adapters on it, and the way back."""

import copy
import itertools
import pickle

import pytest
import torch
from safetensors.torch import save_file
from support import disturb, everything, interrupted_at_every_line
from torch import nn

import aurora
from aurora import core

WIDTH, HEADS = 8, 2


def attention(seed=0, **options):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for p in module.parameters():  # no bias is zero
            p.copy_(torch.randn_like(p) / 2)
    return module


def inputs(module, keys=5, batch=3):
    """Queries of length 4, keys and values, in the module's layout."""
    random = torch.Generator().manual_seed(1)
    sizes = ((4, module.embed_dim), (keys, module.kdim), (keys, module.vdim))
    found = [torch.randn(batch, length, width, generator=random) for length, width in sizes]
    return found if module.batch_first else [t.transpose(0, 1) for t in found]


def same(module, *args, **kwargs):
    """Both the module and what becomes of it give the same output, weights and gradient."""
    unfused = copy.deepcopy(module)
    aurora.unfuse_attention(unfused)
    results = []
    for m in (module, unfused):
        torch.manual_seed(5)
        query = args[0].clone().requires_grad_()
        out, weights = m(query, *args[1:], **kwargs)
        out.square().sum().backward()
        results.append((out, weights, query.grad))
    for wanted, found in zip(*results, strict=True):
        if wanted is None:
            assert found is None
        else:
            assert found.shape == wanted.shape
            size = max(1.0, wanted.abs().max().item())  # of what cancels, too
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * size)


OPTIONS = {
    "as it is": {},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 6, "vdim": 7},
    "other keys, batch first": {"kdim": 6, "batch_first": True},
    "no bias": {"bias": False},
    "no bias, other widths": {"bias": False, "vdim": 3},
    "bias of keys and values": {"add_bias_kv": True, "batch_first": True},
    "zero attention": {"add_zero_attn": True},
    "both": {"add_zero_attn": True, "add_bias_kv": True},
    "dropout": {"dropout": 0.4},
}
MASK = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "padding as numbers": {"key_padding_mask": torch.where(PADDING, -3.0, 0.5)},
    "numbers": {"attn_mask": MASK},
    "bool": {"attn_mask": MASK > 0.7},
    "a head": {"attn_mask": torch.stack([MASK * i for i in range(3 * HEADS)])},
    "both": {"attn_mask": MASK > 0.7, "key_padding_mask": PADDING},
    "causal": {"attn_mask": torch.ones(4, 5).triu(1).bool(), "is_causal": True},
}
WEIGHTS = (
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masks", MASKS)
def test_equal_to_pytorchs_own(options, masks):
    module = attention(**OPTIONS[options])
    for training, weights in itertools.product((True, False), WEIGHTS):
        same(module.train(training), *inputs(module), **MASKS[masks], **weights)


@pytest.mark.parametrize("masks", ["none", "numbers", "bool"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_without_a_batch(masks, weights):
    for batch_first in (True, False):
        module = attention(batch_first=batch_first)
        single = [t[0] if batch_first else t[:, 0] for t in inputs(module)]
        same(module, *single, **MASKS[masks], **weights)
        same(module, *single, key_padding_mask=PADDING[0], **weights)


def test_a_causal_hint_without_a_mask_is_an_error_as_in_pytorch():
    module = attention()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(*inputs(module), is_causal=True)
        if not isinstance(module, aurora.attention.UnfusedAttention):
            aurora.unfuse_attention(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_no_more_than_pytorch_does(dtype):
    module = attention(batch_first=True).to(dtype)
    given = [t.to(dtype) for t in inputs(module)]
    exact = copy.deepcopy(module).double()(*[t.double() for t in given], attn_mask=MASK > 0.7)[0]
    outs = [module(*given, attn_mask=MASK > 0.7)[0]]
    aurora.unfuse_attention(module)
    outs.append(module(*given, attn_mask=MASK > 0.7)[0])
    assert outs[1].dtype == dtype
    theirs, ours = ((out.double() - exact).norm().item() for out in outs)
    assert ours < 2 * theirs + 1e-12


# ---- Adapters ----


def vision(seed=0):
    """A block as torchvision's ViT has it, twice, and PyTorch's own encoder layer."""
    torch.manual_seed(seed)
    return Vision().eval()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(self.blocks(x), src_key_padding_mask=padding)[:, 0])


X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(3))
TARGET = r"(q_proj|v_proj|out_proj)$"


@torch.no_grad()
def answer(model):
    return model(X.to(model.head.weight.dtype))


def adapted(seed=0, **options):
    model = vision(seed)
    aurora.unfuse_attention(model)
    aurora.inject(model, TARGET, **options)
    disturb(model, scale=0.9)
    return model


def test_inject_train_and_back_bit_for_bit():
    model = vision()
    before, plain = everything(model), answer(model)
    names = aurora.unfuse_attention(model)
    assert names == [
        "blocks.0.self_attention",
        "blocks.1.self_attention",
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
    ]
    unfused = answer(model)
    torch.testing.assert_close(unfused, plain, rtol=1e-5, atol=1e-6)
    assert len(aurora.inject(model, TARGET).layers) == 12
    assert torch.equal(answer(model), unfused)
    assert aurora.check(model, X) == {}
    optimizer = torch.optim.SGD(aurora.parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(answer(model), unfused)
    with aurora.disabled(model):
        assert torch.equal(answer(model), unfused)
    aurora.remove(model)
    assert aurora.fuse_attention(model) == names
    assert everything(model) == before
    assert torch.equal(answer(model), plain)


def test_the_encoder_layers_own_linears_run_too():
    """The fused evaluation is off by itself, also where rows are padded and packed."""
    model = vision()
    aurora.unfuse_attention(model)
    aurora.inject(model, r"linear[12]$")
    assert aurora.check(model, X) == {}
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        found = model(X, padding)
        aurora.remove(model)
        aurora.fuse_attention(model)
        assert model.encoder.use_nested_tensor
        torch.testing.assert_close(found, model(X, padding), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["static", "linear", "calibrated"])
def test_a_merge_arrives_in_the_fused_matrix(method):
    model = adapted()
    aurora.merge(model.double(), method, [X.double()])
    merged = answer(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    aurora.fuse_attention(model)
    assert type(model.blocks[0].self_attention) is nn.MultiheadAttention
    torch.testing.assert_close(answer(model), merged, rtol=1e-5, atol=1e-6)
    bare = vision(seed=1).double()
    bare.load_state_dict(state)  # PyTorch's own names, before it was fused again and after
    assert torch.equal(answer(bare), answer(model))
    assert model.state_dict().keys() == state.keys()
    assert not torch.allclose(merged, answer(vision().double()))


def test_a_merge_can_be_undone_until_it_is_fused():
    model = adapted()
    before = answer(model)
    report = aurora.merge(model, "calibrated", [X])
    report.unmerge()
    assert torch.equal(answer(model), before)
    report = aurora.merge(model)
    aurora.fuse_attention(model)
    with pytest.raises(ValueError, match="cannot be undone"):
        report.unmerge()


def test_a_static_adapter_is_merged_exactly_with_biases_that_it_gains():
    model = attention(bias=False, batch_first=True)
    aurora.unfuse_attention(model)
    aurora.inject(model, r"[qv]_proj$")
    disturb(model)
    x = inputs(model)
    aurora.merge(model, "calibrated", [tuple(x)], bias=True)
    wanted = model(*x)[0]
    assert model.v_proj.bias.any()
    aurora.fuse_attention(model)
    assert model.in_proj_bias[WIDTH : 2 * WIDTH].eq(0).all()
    torch.testing.assert_close(model(*x)[0], wanted, rtol=1e-5, atol=1e-6)


# ---- Files ----


def test_state_dicts_keep_pytorchs_names_in_both_directions(tmp_path):
    plain = vision()
    keys = list(plain.state_dict())
    model = vision()
    aurora.unfuse_attention(model)
    state = model.state_dict()
    assert sorted(state) == sorted(keys)
    assert all(torch.equal(state[name], t) for name, t in plain.state_dict().items())
    assert state["blocks.0.self_attention.in_proj_weight"].shape == (3 * WIDTH, WIDTH)
    other = vision(seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(answer(model), answer(other), rtol=1e-5, atol=1e-6)
    aurora.fuse_attention(model)
    assert torch.equal(answer(model), answer(other))


@pytest.mark.parametrize("assign", [True, False])
def test_an_adapted_model_is_saved_whole_and_loaded(assign):
    model = adapted()
    state = model.state_dict()
    own = [name for name in state if not name.endswith(("A", "B")) and ".anl." not in name]
    assert sorted(own) == sorted(vision().state_dict())
    again = adapted(seed=1)
    again.load_state_dict(state, assign=assign)
    assert torch.equal(answer(again), answer(model))
    bare = vision(seed=1)
    assert not bare.load_state_dict(state, strict=False).missing_keys
    assert torch.equal(answer(bare), answer(vision()))


def test_what_does_not_fit_is_reported_by_name():
    model = vision()
    aurora.unfuse_attention(model)
    state = model.state_dict()
    del state["blocks.0.self_attention.in_proj_bias"]
    state["blocks.1.self_attention.in_proj_weight"] = torch.zeros(9, WIDTH)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert "blocks.0.self_attention.q_proj.bias" in str(caught.value)
    assert "size mismatch for blocks.1.self_attention.q_proj.weight" in str(caught.value)


def test_separate_matrices_too():
    plain, model = attention(kdim=6), attention(seed=1, kdim=6)
    aurora.unfuse_attention(model)
    model.load_state_dict(plain.state_dict())
    found, wanted = model.state_dict(), plain.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], t) for name, t in wanted.items())
    before = dict(plain.named_parameters())
    aurora.unfuse_attention(plain)
    aurora.fuse_attention(plain)
    assert list(before) == list(dict(plain.named_parameters()))
    assert all(before[name] is p for name, p in plain.named_parameters())


def test_files_of_the_adapter_alone(tmp_path):
    model = adapted()
    aurora.save(model, tmp_path / "adapter.safetensors")
    fresh = vision()
    with pytest.raises(ValueError, match=r"unfuse_attention"):
        aurora.load(fresh, tmp_path / "adapter.safetensors")
    aurora.unfuse_attention(fresh)
    aurora.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(fresh), answer(model))


def test_a_full_checkpoint_brings_the_adapter(tmp_path):
    model = adapted()
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "m.safetensors"
    )
    fresh = vision()
    aurora.unfuse_attention(fresh)
    assert len(aurora.load(fresh, tmp_path / "m.safetensors").layers) == 12
    assert torch.equal(answer(fresh), answer(model))


def test_biases_that_train_are_in_the_file(tmp_path):
    model = vision()
    aurora.unfuse_attention(model)
    aurora.inject(model, TARGET, train=r"q_proj\.bias$")
    disturb(model)
    aurora.save(model, tmp_path / "adapter.safetensors")
    fresh = vision()
    aurora.unfuse_attention(fresh)
    found = aurora.load(fresh, tmp_path / "adapter.safetensors")
    assert set(found.train) == {n for n, _ in model.named_parameters() if n.endswith("q_proj.bias")}
    assert torch.equal(answer(fresh), answer(model))
    aurora.remove(fresh)
    aurora.fuse_attention(fresh)  # heads stay as they were trained, and so do these
    assert fresh.blocks[0].self_attention.in_proj_bias[:WIDTH].any()


# ---- Copies, moves, errors ----


def test_memory_is_shared_until_moved_and_copies_own_theirs():
    model = attention()
    whole = model.in_proj_weight
    aurora.unfuse_attention(model)
    assert model.q_proj.weight.data_ptr() == whole.data_ptr()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copied._fused
        aurora.fuse_attention(copied)
        assert torch.equal(copied.in_proj_weight, whole)
        assert copied.in_proj_weight is not whole
    model.to("cpu")
    aurora.fuse_attention(model)
    assert model.in_proj_weight is whole
    aurora.unfuse_attention(model)
    model.double()
    assert not model._fused
    aurora.fuse_attention(model)
    assert model.in_proj_weight.dtype == torch.float64
    assert torch.equal(model.in_proj_weight.float(), whole)


def test_meta_device():
    with torch.device("meta"):
        model = nn.MultiheadAttention(WIDTH, HEADS)
    aurora.unfuse_attention(model)
    aurora.inject(model, "_proj")
    model.to_empty(device="cpu")
    plain = attention()
    state = plain.state_dict() | aurora.adapter_state_dict(model)
    model.load_state_dict(state, strict=False)
    for layer in core.layers(model).values():
        layer.reset_parameters()
    x = inputs(plain)
    torch.testing.assert_close(model(*x)[0], plain(*x)[0], rtol=1e-5, atol=1e-6)


def test_what_was_required_is_required_again():
    model = vision()
    model.blocks[0].self_attention.in_proj_weight.requires_grad_(False)
    before = everything(model)
    aurora.unfuse_attention(model)
    assert not model.blocks[0].self_attention.q_proj.weight.requires_grad
    aurora.inject(model, TARGET, train=r"q_proj\.bias")
    assert model.blocks[0].self_attention.q_proj.bias.requires_grad
    aurora.remove(model)
    aurora.fuse_attention(model)
    assert everything(model) == before


def test_it_compiles_to_one_graph_and_traces():
    model = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(model.blocks, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model.blocks(X), rtol=1e-4, atol=2e-5)
    traced = torch.jit.trace(model.blocks, (X,), check_trace=False)
    other = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(traced(other), model.blocks(other), rtol=1e-4, atol=2e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = attention(), attention()
        self.two.in_proj_weight = self.one.in_proj_weight


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def partly():
    model = vision()
    aurora.inject(model, "head")
    return model


def exchanged():
    model = vision()
    aurora.unfuse_attention(model)
    model.blocks[0].self_attention.k_proj = nn.Linear(WIDTH, WIDTH)
    return model


REFUSED = {
    "no model": (lambda: nn.ModuleList(), lambda m: aurora.unfuse_attention(None), "must be an nn"),
    "a layer was exchanged": (exchanged, aurora.fuse_attention, "self_attention is a Linear now"),
    "nothing to unfuse": (lambda: nn.Linear(2, 2), aurora.unfuse_attention, "no nn.Multihead"),
    "a subclass": (lambda: Own(4, 2), aurora.unfuse_attention, "no nn.Multihead"),
    "adapted already": (partly, aurora.unfuse_attention, "has adapters"),
    "tied": (Tied, aurora.unfuse_attention, r"one\.in_proj_weight is tied"),
    "nothing was unfused": (vision, aurora.fuse_attention, "that was unfused"),
    "adapted still": (adapted, aurora.fuse_attention, "has adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_untouched(case):
    make, call, message = REFUSED[case]
    model = make()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert everything(model) == before


def test_inject_says_where_to_go():
    for target in (r"self_attention\.out_proj", r"linear1"):
        with pytest.raises(ValueError, match=r"aurora\.unfuse_attention\(model\) first"):
            aurora.inject(vision(), target)


@pytest.mark.parametrize("call", [aurora.unfuse_attention, aurora.fuse_attention])
def test_an_interrupt_at_any_line_leaves_the_model_before_or_after(call):
    def prepare():
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, dropout=0.0), 1
        )
        if call is aurora.fuse_attention:
            aurora.unfuse_attention(model)
        return model

    def told(model):
        own = [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()]
        return own, [(n, p.shape) for n, p in model.named_parameters()], model.use_nested_tensor

    before = told(prepare())
    call(finished := prepare())
    after = told(finished)
    assert before != after

    def check(model, done):
        assert told(model) in ([after] if done else [before, after])

    assert interrupted_at_every_line(prepare, call, check) > 20

"""AuroraLinear, inject and what follows from it, on small models of every kind."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import disturb, everything
from torch import nn
from torch.utils.checkpoint import checkpoint

import aurora
from aurora import AuroraConfig, AuroraLinear, core

OPTIONS = {
    "default": {},
    "rank 4": {"rank": 4, "alpha": 3.0},
    "static": {"mode": "static"},
    "per-channel": {"spline": "per-channel"},
    "without F": {"fixed": False},
    "without L": {"learnable": False},
    "sigmoid": {"activation": "sigmoid"},
    "leaky": {"activation": "leaky_relu"},
    "other spline": {"grid_size": 9, "spline_order": 2, "grid_range": (-2.0, 2.0)},
}


class Attention(nn.Module):
    """A block with names as transformers has them."""

    def __init__(self, width=8):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(torch.softmax(self.query(x) @ x.transpose(-1, -2), -1) @ self.value(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.head = nn.ModuleDict(
            {"out": nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))}
        )

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head["out"](x)


IDS = torch.arange(10).reshape(2, 5)


def encoder(seed=0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder()


# ---- one layer ----


@pytest.mark.parametrize("name", OPTIONS)
def test_starts_as_the_base_bit_for_bit_and_then_learns(name):
    base = nn.Linear(6, 4)
    x = torch.randn(9, 6)
    expected = base(x)
    layer = AuroraLinear(base, **OPTIONS[name])
    assert layer is base
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.base(x), expected)
    loss = layer(x).square().sum()
    loss.backward()
    assert layer.B.grad.abs().sum() > 0
    nn.init.normal_(layer.B)
    layer.zero_grad()
    layer(x).square().sum().backward()
    for key, p in layer.adapter_parameters().items():
        assert p.grad.abs().sum() > 0, key
    assert not torch.allclose(layer(x), expected)
    assert torch.equal(layer.base(x), expected)
    assert type(layer.base) is nn.Linear


@pytest.mark.parametrize("name", OPTIONS)
def test_computes_what_the_paper_says(name):
    layer = AuroraLinear(nn.Linear(6, 4), **OPTIONS[name])
    nn.init.normal_(layer.B)
    x = torch.randn(9, 6)
    s = layer.config.alpha / layer.config.rank
    if layer.config.mode == "static":
        added = x @ layer.anl(layer.A.t()) @ layer.B.t()
    else:
        added = layer.anl(x @ layer.A.t()) @ layer.B.t()
    torch.testing.assert_close(layer(x), layer.base(x) + s * added, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_the_whole_layer(name):
    layer = AuroraLinear(nn.Linear(4, 3).double(), **OPTIONS[name])
    nn.init.normal_(layer.B)
    names, weights = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def f(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *weights), check_forward_ad=True)
    if layer.config.spline_order > 2:
        assert torch.autograd.gradgradcheck(f, (x, *weights))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_were_read_from_a_file_mean_the_same(name):
    """They are equal strings, not the same ones."""
    found, given = [], {"spline": "summed", "mode": "dynamic", "activation": "tanh"} | OPTIONS[name]
    for options in (given, json.loads(json.dumps(given))):
        torch.manual_seed(0)
        layer = AuroraLinear(nn.Linear(6, 4), **options)
        nn.init.normal_(layer.B)
        out = layer(torch.randn(9, 6))
        out.square().sum().backward()
        found.append([out, *(p.grad for p in layer.adapter_parameters().values())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 3, 1, 6), (0, 6), (2, 0, 6)])
def test_shapes_as_linear_has_them(shape):
    layer = AuroraLinear(nn.Linear(6, 4))
    nn.init.normal_(layer.B)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 4)
    out.sum().backward()
    assert x.grad.shape == x.shape
    torch.testing.assert_close(out.reshape(-1, 4), layer(x.reshape(-1, 6)))


def test_noncontiguous_and_transposed_inputs():
    layer = AuroraLinear(nn.Linear(6, 4))
    nn.init.normal_(layer.B)
    x = torch.randn(6, 3, 5).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_dtypes(dtype, mode):
    base = nn.Linear(16, 4, dtype=dtype)
    layer = AuroraLinear(base, mode=mode)
    assert layer.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(7, 16, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.B)
    out = layer(x)
    assert out.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(
        out.double(), exact, rtol=0, atol=exact.abs().max().item() * 8 * torch.finfo(dtype).eps
    )
    out.sum().backward()
    assert all(
        p.grad.dtype == p.dtype and p.grad.isfinite().all()
        for p in layer.adapter_parameters().values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast(dtype, mode, inside):
    layer = AuroraLinear(nn.Linear(16, 4), mode=mode)
    nn.init.normal_(layer.B)
    x = torch.randn(7, 16)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
        assert out.dtype == dtype
        if inside:
            out.sum().backward()
    if not inside:
        out.sum().backward()
    torch.testing.assert_close(
        out.float(), expected, rtol=0, atol=expected.abs().max().item() * 8 * torch.finfo(dtype).eps
    )
    assert all(p.grad.dtype == torch.float32 for p in layer.adapter_parameters().values())


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer = AuroraLinear(nn.Linear(32, 4), dropout=0.5)
    nn.init.normal_(layer.B)
    x = torch.randn(5, 32)
    assert not torch.equal(layer(x), layer(x))
    before = {k: p.detach().clone() for k, p in layer.named_parameters()}
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert all(torch.equal(p, before[k]) for k, p in layer.named_parameters())


def test_shows_the_base():
    base = nn.Linear(6, 4)
    weight, bias = base.weight, base.bias
    layer = AuroraLinear(base)
    assert layer.weight is layer.base.weight is weight
    assert layer.bias is bias
    assert (layer.in_features, layer.out_features, layer.scaling) == (6, 4, 2.0)
    assert AuroraLinear(nn.Linear(6, 4, bias=False)).bias is None


class FakeQuantised(nn.Module):
    """Stands for the quantised linears: integer weights, a float forward, no float parameter."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def test_a_quantised_base_trains_and_is_not_merged():
    model = nn.Sequential(FakeQuantised(nn.Linear(6, 6)), nn.Linear(6, 2))
    aurora.inject(model, "0")
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    assert model[0](x).dtype == torch.bfloat16
    disturb(model)
    model(x.float()).sum().backward()
    assert model[0].A.grad.abs().sum() > 0
    before = everything(model)
    with pytest.raises(ValueError, match=r"0\.weight is quantised.*plain copy"):
        core.static_merge(model)
    assert everything(model) == before


@pytest.mark.parametrize(
    "bad", [nn.Conv2d(3, 3, 1), nn.LayerNorm(4), nn.Identity(), nn.LazyLinear(4)], ids=str
)
def test_what_is_not_linear_is_refused(bad):
    with pytest.raises(TypeError, match=f"got a {type(bad).__name__}"):
        AuroraLinear(bad)


# ---- inject ----


@pytest.mark.parametrize("name", OPTIONS)
def test_inject_changes_no_output_and_freezes_the_rest(name):
    model = encoder().eval()
    expected = model(IDS)
    tensors = dict(model.named_parameters())
    aurora.inject(model, r"query|value", **OPTIONS[name])
    assert torch.equal(model(IDS), expected)
    assert len(core.layers(model)) == 4
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in aurora.parameters(model)
    }
    now = core.ModelView.of(model).parameters
    assert now.keys() == tensors.keys()
    assert all(now[n].tensor is p and not p.requires_grad for n, p in tensors.items())
    disturb(model)
    assert not torch.allclose(model(IDS), expected)


def test_the_report_counts():
    model = encoder()
    total = sum(p.numel() for p in model.parameters())
    done = aurora.inject(model, r"query", rank=3, train=r"^head\.out\.2")
    added = 2 * (3 * 16 + 9 + 3 * 8)
    assert done.trainable == added + 6 * 3 + 3
    assert done.total == total + added
    text = str(done)
    for fact in (
        "blocks.0.query",
        "8 -> 8",
        f"{done.trainable:,} of {done.total:,}",
        f"parameters train ({done.trainable / done.total:.3%})",
        "2 layers adapted",
    ):
        assert fact in text


def test_training_moves_adapters_and_kept_parameters_only():
    model = encoder()
    aurora.inject(model, r"query|value", train=r"^head\.")
    disturb(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(aurora.parameters(model), lr=1e-2)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IDS).reshape(-1, 3), IDS.reshape(-1) % 3)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    for name, p in model.named_parameters():
        moves = name.startswith("head.") or any(part in name for part in (".A", ".B", ".anl."))
        assert torch.equal(p, before[name]) != moves, name


def test_a_configuration_can_be_shared():
    config = AuroraConfig(rank=3, spline="per-channel")
    model = encoder()
    aurora.inject(model, "query", config)
    aurora.inject(model, "value", config, mode="static")
    configs = [layer.config for layer in core.layers(model).values()]
    assert configs[0] == config
    assert {c.mode for c in configs} == {"dynamic", "static"}
    assert all(c.rank == 3 for c in configs)


ERRORS = {
    "matches nothing": (
        r"querry",
        {},
        ValueError,
        r"'querry' matches no linear layer; the nearest are: .*blocks\.\*\.query",
    ),
    "only non-linear": (r"out\.1$", {}, ValueError, "matches no linear layer"),
    "an embedding": (r"embed", {}, TypeError, "matches embed, a Embedding, which is not linear"),
    "a norm among linears": (r"blocks\.0", {}, TypeError, r"blocks\.0\.norm, a LayerNorm"),
    "bad regex": (r"(query", {}, ValueError, r"'\(query' is not a regular expression: missing \)"),
    "bad train regex": (r"query", {"train": "["}, ValueError, r"'\[' is not a regular expression"),
    "train matches nothing": (
        r"query",
        {"train": "classifier"},
        ValueError,
        "train='classifier' matches no parameter",
    ),
    "rank 0": (r"query", {"rank": 0}, ValueError, "rank must be an int of at least 1, got 0"),
    "rank 2.5": (r"query", {"rank": 2.5}, ValueError, "got 2.5"),
    "rank True": (r"query", {"rank": True}, ValueError, "got True"),
    "unknown option": (
        r"query",
        {"ranks": 2},
        ValueError,
        "'ranks' is no option; the options are rank, alpha, mode",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_the_model_as_it_was(case):
    regex, options, error, match = ERRORS[case]
    model = encoder()
    model.embed.requires_grad_(False)
    before = everything(model)
    with pytest.raises(error, match=match):
        aurora.inject(model, regex, **options)
    assert everything(model) == before


def test_a_target_that_matches_nothing_is_told_the_five_nearest():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcdefg"})
    with pytest.raises(ValueError, match=r"nearest are: \w(, \w){4}$"):
        aurora.inject(model, "nothing")
    with pytest.raises(ValueError, match="nearest are: there are none"):
        aurora.inject(nn.Sequential(nn.Tanh()), "nothing")


def test_injecting_twice():
    model = encoder()
    aurora.inject(model, "query", train=r"head\.out\.2")
    disturb(model)
    expected = model(IDS)
    before = everything(model)
    with pytest.raises(
        ValueError, match=r"blocks.0.query is adapted already: aurora.remove\(model\) first"
    ):
        aurora.inject(model, "query|value")
    assert everything(model) == before
    aurora.inject(model, "value", rank=1)  # other layers are welcome
    assert torch.equal(model(IDS), expected)
    assert len(core.layers(model)) == 4
    assert model.head["out"][2].weight.requires_grad
    aurora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_above_both_dimensions_is_warned_of():
    model = encoder()
    with pytest.warns(UserWarning, match=r"rank 9 is above both dimensions of the layer, \(8, 8\)"):
        aurora.inject(model, "query", rank=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aurora.inject(model, "value", rank=8)


def test_a_bare_linear_is_adapted_itself():
    model = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    expected = model(x)
    assert list(aurora.inject(model, "").layers) == [""]
    assert list(aurora.adapter_state_dict(model)) == ["A", "B", "anl.H", "anl.spline_weight"]
    disturb(model)
    assert not torch.allclose(model(x), expected)
    aurora.remove(model)
    assert type(model) is nn.Linear
    assert torch.equal(model(x), expected)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.nested = nn.ModuleDict({"third": nn.Sequential(self.first)})

    def forward(self, x):
        return self.nested["third"](self.second(self.first(x)))


@pytest.mark.parametrize("regex", ["first", "second", "third", "first|second"])
def test_one_layer_under_several_names_gets_one_adapter(regex):
    model = Shared()
    x = torch.randn(2, 4)
    expected = model(x)
    aurora.inject(model, regex)
    assert model.first is model.second is model.nested["third"][0]
    assert list(core.layers(model)) == ["first"]
    assert torch.equal(model(x), expected)
    disturb(model, 0.1)
    assert not torch.allclose(model(x), expected)
    assert list(aurora.adapter_state_dict(model)) == [
        "first.A",
        "first.B",
        "first.anl.H",
        "first.anl.spline_weight",
    ]
    core.static_merge(model)
    assert model.first is model.second is model.nested["third"][0]
    assert type(model.first) is nn.Linear


class ReadsWeight(nn.Module):
    """Uses its child as a bag of tensors."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.projector = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.projector(x), self.proj.weight, self.proj.bias)


class ReadsDtype(ReadsWeight):
    """Looks at its child's dtype, as T5 does, and calls it."""

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))


class PassesChild(ReadsWeight):
    """Reads the weight for its size and hands the child on."""

    def forward(self, x):
        scale = self.proj.weight.shape[0]
        return nn.Sequential(self.proj)(x) / scale


def test_layers_that_never_run_are_refused():
    for model, regex in (
        (nn.MultiheadAttention(8, 2), "out_proj"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 8)), "out_proj|1"),
        (nn.TransformerEncoderLayer(8, 2), "linear1"),
        (nn.TransformerDecoderLayer(8, 2), "multihead_attn.out_proj"),
    ):
        before = everything(model)
        with pytest.raises(ValueError, match="bypasses its adapter"):
            aurora.inject(model, regex)
        assert everything(model) == before


def test_layers_that_run_are_not_refused():
    for model, regex in (
        (ReadsDtype(), "proj$"),
        (PassesChild(), "proj$"),
        (ReadsWeight(), "projector"),
    ):
        x = torch.randn(2, 4)
        before = model(x)
        aurora.inject(model, regex)
        disturb(model)
        assert not torch.allclose(model(x), before)
    aurora.inject(nn.TransformerDecoderLayer(8, 2), "linear1")


def test_pytorchs_encoder_layer_once_its_fused_path_is_off():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        aurora.inject(layer, "linear[12]")
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            before = layer(x)
            disturb(layer)
            assert not torch.allclose(layer(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_names_have_no_wrappers_in_them():
    plain = encoder()
    aurora.inject(plain, r"query", train=r"head\.out\.2")
    names = list(aurora.adapter_state_dict(plain))
    compiled = torch.compile(plain, backend="eager")
    parallel = nn.DataParallel(plain)
    assert list(aurora.adapter_state_dict(compiled)) == names
    assert list(aurora.adapter_state_dict(parallel)) == names
    assert list(aurora.adapter_state_dict(torch.compile(parallel, backend="eager"))) == names
    inner = encoder()
    inner.blocks[0] = torch.compile(inner.blocks[0], backend="eager")
    aurora.inject(inner, r"^blocks\.\d\.query", train=r"head\.out\.2")
    assert list(aurora.adapter_state_dict(inner)) == names
    outer = nn.ModuleDict({"net": plain})
    assert list(aurora.adapter_state_dict(outer)) == [f"net.{name}" for name in names]
    aurora.remove(compiled)
    assert all(p.requires_grad for p in plain.parameters())


def test_a_child_called_base_or_module_keeps_its_name():
    model = nn.ModuleDict(
        {"base": nn.ModuleDict({"module": nn.Linear(4, 4)}), "other": nn.Linear(4, 4)}
    )
    aurora.inject(model, "base", train="base.module.bias")
    assert next(iter(aurora.adapter_state_dict(model))) == "base.module.A"
    assert "base.module.bias" in aurora.adapter_state_dict(model)


def test_the_models_own_hooks_and_training_flag_stay():
    model = encoder().eval()
    seen = []
    model.blocks[0].query.register_forward_hook(lambda *args: seen.append(1))
    aurora.inject(model, "query")
    assert not any(module.training for module in model.modules())
    model(IDS)
    assert seen == [1]


# ---- what follows ----


@pytest.mark.parametrize("name", OPTIONS)
def test_disabled_is_the_base_model(name):
    model = encoder().eval()
    expected = model(IDS)
    aurora.inject(model, "query|value", **OPTIONS[name])
    disturb(model)
    adapted = model(IDS)
    assert not torch.allclose(adapted, expected)
    with aurora.disabled(model):
        assert torch.equal(model(IDS), expected)
        with aurora.disabled(model):
            assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)
    with pytest.raises(KeyError, match="inside"), aurora.disabled(model):
        raise KeyError("inside")
    assert torch.equal(model(IDS), adapted)
    with pytest.raises(ValueError, match="no AuroRA adapters"), aurora.disabled(encoder()):
        pass


def test_remove_gives_back_what_was_there():
    model = encoder()
    model.embed.requires_grad_(False)
    before = everything(model)
    aurora.inject(model, "query", train="embed")
    assert model.embed.weight.requires_grad
    disturb_only_adapters = core.layers(model).values()
    for layer in disturb_only_adapters:
        nn.init.normal_(layer.B)
    aurora.remove(model)
    assert everything(model) == before
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        aurora.remove(model)
    aurora.inject(model, "query")


@pytest.mark.parametrize("name", OPTIONS)
def test_merge_is_the_papers(name):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    aurora.inject(model, r"0|2", **OPTIONS[name])
    disturb(model)
    expected = []
    for layer in core.layers(model).values():
        # Column by column, so that a reshape in place of a transpose cannot pass.
        columns = [layer.anl(layer.A[:, i]) for i in range(layer.in_features)]
        expected.append(layer.weight + layer.scaling * layer.B @ torch.stack(columns, 1))
    x = torch.randn(6, 5, dtype=torch.float64)
    before = model(x)
    assert core.static_merge(model) == ["0", "2"]
    for layer, weight in zip((model[0], model[2]), expected, strict=True):
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer.weight, weight, rtol=1e-13, atol=1e-13)
        assert layer.weight.requires_grad
    same = torch.allclose(model(x), before, rtol=1e-11, atol=1e-11)
    assert same == (OPTIONS[name].get("mode") == "static")
    with pytest.raises(ValueError, match="never injected, or merged, or removed"):
        core.static_merge(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merge_rounds_once(dtype):
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    aurora.inject(model, "0")
    disturb(model)
    layer = model[0]
    exact = layer.weight.float() + layer.scaling * layer.B @ layer.anl(layer.A.t()).t()
    core.static_merge(model)
    assert model[0].weight.dtype == dtype
    torch.testing.assert_close(
        model[0].weight, exact.to(dtype), rtol=torch.finfo(torch.float32).eps * 8, atol=1e-6
    )


def test_merge_refuses_what_would_harm():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.inner = nn.Linear(4, 4)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.inner(self.embed(ids)))

    model = Tied()
    aurora.inject(model, "head|inner")
    disturb(model)
    before = everything(model)
    with pytest.raises(ValueError, match=r"head\.weight is tied to another module"):
        core.static_merge(model)
    assert everything(model) == before
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with torch.no_grad():
        model.inner.A[0, 0] = float("nan")
    before_b = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"NaN or infinity into inner\.weight"):
        core.static_merge(model)
    assert all(torch.equal(p, before_b[n]) or p.isnan().any() for n, p in model.named_parameters())
    half = nn.Sequential(nn.Linear(4, 4)).half()
    aurora.inject(half, "0")
    with torch.no_grad():
        half[0].B.fill_(1e6)
    with pytest.raises(ValueError, match="NaN or infinity"):
        core.static_merge(half)


def test_state_dicts():
    model = encoder()
    aurora.inject(model, "query|value", train=r"head\.out\.0")
    disturb(model)
    other = encoder(seed=1)
    aurora.inject(other, "query|value", train=r"head\.out\.0")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))

    third = encoder()
    aurora.inject(third, "query|value", train=r"head\.out\.0")
    objects = aurora.parameters(third)
    aurora.load_adapter_state_dict(third, aurora.adapter_state_dict(model))
    assert torch.equal(third(IDS), model(IDS))
    assert all(a is b for a, b in zip(objects, aurora.parameters(third), strict=True))
    keys = set(aurora.adapter_state_dict(model))
    assert {"blocks.0.query.A", "blocks.1.value.anl.spline_weight", "head.out.0.weight"} < keys
    assert not any("base" in key for key in keys)


def test_loading_a_misfit_lists_everything_and_writes_nothing():
    model = encoder()
    aurora.inject(model, "query")
    state = {name: torch.ones_like(t) for name, t in aurora.adapter_state_dict(model).items()}
    del state["blocks.0.query.A"]
    state["blocks.1.query.B"] = torch.ones(8, 3)
    state["elsewhere"] = torch.ones(1)
    before = everything(model)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        aurora.load_adapter_state_dict(model, state)
    for line in (
        "blocks.0.query.A: given nothing, the model has (2, 8)",
        "blocks.1.query.B: given (8, 3), the model has (8, 2)",
        "elsewhere: given (1,), the model has nothing",
    ):
        assert line in str(error.value)
    assert everything(model) == before


def test_copies_and_pickles():
    model = encoder()
    aurora.inject(model, "query", train=r"head\.out\.2")
    disturb(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for copied in copies:
        assert torch.equal(copied(IDS), model(IDS))
        copied(IDS).sum().backward()
        assert list(aurora.adapter_state_dict(copied)) == list(aurora.adapter_state_dict(model))
        aurora.remove(copied)
        assert all(p.requires_grad for p in copied.parameters())
    assert len(core.layers(model)) == 2
    assert all(p.grad is None for p in model.parameters())


def test_meta_device_and_materialising():
    with torch.device("meta"):
        model = Encoder()
    done = aurora.inject(model, "query|value", train="head")
    assert all(p.is_meta for p in model.parameters())
    real = encoder()
    aurora.inject(real, "query|value", train="head")
    disturb(real)
    assert done.trainable == sum(p.numel() for p in aurora.parameters(real))
    with pytest.raises(ValueError, match="the model has meta"):
        aurora.load_adapter_state_dict(model, aurora.adapter_state_dict(real))
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(assigned(IDS), real(IDS))
    assert not any(m.anl.grid.one.is_meta for m in core.layers(assigned).values())
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    assert torch.equal(model(IDS), real(IDS))
    for layer in core.layers(model).values():
        layer.reset_parameters()
    assert all((layer.B == 0).all() for layer in core.layers(model).values())


class Stack(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.reentrant = reentrant

    def forward(self, ids, remedy=False):
        x = self.embed(ids)
        if remedy:  # what transformers' enable_input_require_grads() does
            x.requires_grad_()
        for block in self.blocks:
            x = x + (
                block(x)
                if self.reentrant is None
                else checkpoint(block, x, use_reentrant=self.reentrant)
            )
        return x


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_over_a_frozen_embedding(mode, reentrant):
    torch.manual_seed(0)
    plain = Stack(None).double()  # sums may be taken in another order
    aurora.inject(plain, "query|value", mode=mode)
    disturb(plain)
    checkpointed = copy.deepcopy(plain)
    checkpointed.reentrant = reentrant
    plain(IDS).square().sum().backward()
    # The reentrant kind needs an input that requires grad; without it no gradient arrives, for LoRA as for us.
    checkpointed(IDS, remedy=reentrant).square().sum().backward()
    for p, q in zip(aurora.parameters(plain), aurora.parameters(checkpointed), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.abs().sum() > 0


def test_a_compiled_model_agrees_and_switches():
    torch._dynamo.reset()
    model = encoder().eval()
    aurora.inject(model, "query|value")
    disturb(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    compiled(IDS).square().sum().backward()
    grads = [p.grad.clone() for p in aurora.parameters(model)]
    model.zero_grad()
    model(IDS).square().sum().backward()
    for p, grad in zip(aurora.parameters(model), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    with aurora.disabled(compiled):
        off = compiled(IDS)
        assert not torch.allclose(off, model.blocks[0](model.embed(IDS))[..., :3])
        assert torch.equal(off, model(IDS))


def test_ensembles_of_adapters_with_vmap():
    models = [copy.deepcopy(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(3)]
    for model in models:
        aurora.inject(model, "0")
        for p in aurora.parameters(model):
            nn.init.normal_(p)
    stacked, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 4)

    def run(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    together = torch.func.vmap(run)(stacked, buffers)
    for model, out in zip(models, together, strict=True):
        torch.testing.assert_close(model(x), out)


def test_public_names():
    import aurora.core as module

    assert sorted(aurora.__all__) == aurora.__all__
    for name in aurora.__all__:
        assert getattr(aurora, name).__doc__, name
    assert module.__doc__


class Attends(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def test_a_subclass_that_leaves_the_forward_to_its_parent_bypasses_too():
    model = nn.Sequential(Attends(4, 2))
    with pytest.raises(
        ValueError, match="out_proj: Attends bypasses its adapter: it reads the layer's weight"
    ):
        aurora.inject(model, "out_proj")


def test_a_layer_compiled_by_itself_or_behind_a_checkpoint_is_adapted_once():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    x = torch.randn(3, 4)
    for wrapped in (compiled, checkpoint_wrapper(nn.Linear(4, 4))):
        model = nn.Sequential(wrapped, nn.Linear(4, 2))
        before = model(x)
        assert list(aurora.inject(model, "^0$").layers) == ["0"]
        assert sum(isinstance(m, AuroraLinear) for m in model.modules()) == 1
        assert torch.equal(model(x), before)
        disturb(model)
        assert not torch.allclose(model(x), before)


def test_a_block_with_widths_of_its_own_is_no_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 4, 4
            self.body = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

        def forward(self, x):
            return self.body(x)

    assert list(aurora.inject(nn.Sequential(Block()), "0").layers) == ["0.body.0", "0.body.2"]
    assert list(aurora.inject(Block(), r"body\.0").layers) == ["body.0"]
    with pytest.raises(TypeError, match="AuroraLinear"):
        AuroraLinear(AuroraLinear(nn.Linear(4, 4)))


def test_inject_asks_first_for_shapes_and_for_floats():
    lazy = nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet"):
        aurora.inject(lazy, "^0$")
    assert type(lazy[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(6, 5), nn.Module())
    model[1].code = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"1\.code .*integer dtype"):
        aurora.inject(model, "^0$", train="code")
    assert type(model[0]) is nn.Linear
    aurora.inject(model, "^0$")


def test_a_scripted_part_elsewhere_stays_as_it_is():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 5)))
    model = nn.Sequential(nn.Linear(6, 5), scripted, nn.Linear(5, 2))
    x = torch.randn(3, 6)
    before = model(x)
    aurora.inject(model, "^[02]$")
    assert torch.equal(model(x), before)
    disturb(model)
    assert not torch.allclose(model(x), before)
    aurora.remove(model)
    assert torch.equal(model(x), before)
    assert model[1] is scripted


def test_a_part_injected_after_the_whole_keeps_what_the_whole_knew():
    model = nn.ModuleDict(
        {
            "enc": nn.ModuleDict(
                {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}
            )
        }
    )
    aurora.inject(model, "enc.a", train="norm")
    aurora.inject(model["enc"], "^b")
    assert model["enc"]["norm"].weight.requires_grad
    assert {p for p in model.parameters() if p.requires_grad} == set(aurora.parameters(model))
    aurora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_that_was_exchanged_does_not_stop_remove():
    model = nn.ModuleDict({"fc": nn.Linear(6, 5), "head": nn.Linear(5, 2)})
    aurora.inject(model, "fc", train="head")
    model["head"] = nn.Identity()
    model["fc"].bias = None
    model["later"] = nn.Linear(2, 2).requires_grad_(False)
    aurora.remove(model)
    assert not model["later"].weight.requires_grad
    assert all("_aurora" not in module.__dict__ for module in model.modules())
    assert model["fc"].weight.requires_grad


@pytest.mark.parametrize("act", [aurora.remove, aurora.merge, core.static_merge])
def test_a_layer_that_is_the_whole_model(act):
    layer = AuroraLinear(nn.Linear(6, 5), mode="static")
    disturb(layer)
    x = torch.randn(3, 6)
    expected = layer.base(x) if act is aurora.remove else layer(x)
    act(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), expected)


def test_a_model_moved_for_inference_can_train_afterwards():
    model = encoder()
    aurora.inject(model, "query")
    with torch.inference_mode():
        model.to("cpu")
    model(IDS).sum().backward()
    assert aurora.parameters(model)[1].grad.abs().sum() > 0


@pytest.mark.parametrize("learnable", [1, "yes", None])
def test_learnable_is_a_bool(learnable):
    with pytest.raises(ValueError, match="learnable"):
        AuroraConfig(learnable=learnable)

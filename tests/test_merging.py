"""Merging: exact where it can be, never worse than the others on what it saw, all or nothing, undone bit for bit."""

import copy
import math
import pickle
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import everything
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aurora
from aurora import core, merging
from aurora.merging import Affine, Moments, fit

transformers_conv = transformers.pytorch_utils.Conv1D


class Net(nn.Module):
    """Two kinds of linear layer, with and without bias, and something between them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.second = nn.Linear(8, 8, bias=False, dtype=dtype)
        self.third = transformers_conv(5, 8).to(dtype)
        self.head = nn.Linear(5, 2, dtype=dtype)

    def forward(self, x, attention_mask=None):
        return self.head(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))


TARGETS = "first|second|third"


def trained(dtype=torch.float32, scale=0.4, train=r"^head\.", **options) -> Net:
    model = Net(dtype)
    aurora.inject(model, TARGETS, train=train, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in aurora.parameters(model):
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def batches(count=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, 6, generator=generator).to(dtype) for _ in range(count)]


def affine_inside(rank=2) -> dict:
    """Options and values with which sigma(z) = z on the grid, here [-20, 20]."""
    return {"rank": rank, "spline": "per-channel", "fixed": False, "grid_range": (-20.0, 20.0)}


def make_identity(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in core.layers(model).values():
            c = layer.config
            h = 1 / c.cells_per_unit
            places = c.grid_range[0] + h * (
                torch.arange(c.grid_size + c.spline_order) + (1 - c.spline_order) / 2
            )
            layer.anl.spline_weight.copy_(places.expand_as(layer.anl.spline_weight))


# ---- exactness ----


@pytest.mark.parametrize("method", ["linear", "calibrated"])
def test_an_affine_sigma_is_merged_exactly(method):
    model = trained(torch.float64, **affine_inside())
    make_identity(model)
    x = batches(1, torch.float64, seed=9)[0]
    before = model(x)
    report = merging.merge(model, method, batches(dtype=torch.float64), bias=True)
    assert all(layer.errors[method] < 1e-6 for layer in report.layers)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", merging.METHODS)
def test_static_mode_is_merged_exactly_by_all(method):
    model = trained(torch.float64, mode="static")
    x = batches(1, torch.float64, seed=9)[0]
    before = model(x)
    report = merging.merge(model, method, batches(dtype=torch.float64), bias=True)
    torch.testing.assert_close(model(x), before)
    assert all(
        layer.errors[m] == pytest.approx(0, abs=1e-7)
        for layer in report.layers
        for m in merging.METHODS
    )


def test_the_static_method_is_the_papers_merge():
    ours, papers = trained(), trained()
    merging.merge(ours)
    core.static_merge(papers)
    for name in ("first", "second", "third"):
        torch.testing.assert_close(getattr(ours, name).weight, getattr(papers, name).weight)
        assert (getattr(ours, name).bias is None) == (getattr(papers, name).bias is None)


def test_the_linear_method_is_the_first_order_expansion():
    model = trained(torch.float64)
    layers = {n: copy.deepcopy(layer) for n, layer in core.layers(model).items()}
    merging.merge(model, "linear", bias=True)
    for name, layer in layers.items():
        merged, width = getattr(model, name), layer.in_features
        with torch.no_grad():
            expected = layer(torch.zeros(width, dtype=torch.float64))
        torch.testing.assert_close(merged(torch.zeros(width, dtype=torch.float64)), expected)
        slope = torch.autograd.functional.jacobian(layer, torch.zeros(width, dtype=torch.float64))
        weight = merged.weight.t() if name == "third" else merged.weight
        torch.testing.assert_close(weight, slope)


def rows_of(layer, count=400, spread=1.0):
    x = (
        spread
        * torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(5)).double()
        + 0.3
    )
    z = x @ layer.A.double().t()
    anl = copy.deepcopy(layer.anl).double()
    u = x @ anl(layer.A.double().t())
    moments = Moments(3 * layer.config.rank)
    for part in torch.cat([z, anl(z), u], 1).detach().split(37):
        moments.add(part)
    return x, z.detach(), anl(z).detach(), u.detach(), moments


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 4}, {"spline": "per-channel"}, {"learnable": False}]
)
def test_the_calibrated_fit_is_least_squares_and_errors_are_what_they_say(constant, options):
    layer = next(iter(core.layers(trained(torch.float64, **options)).values()))
    _, z, y, u, moments = rows_of(layer)
    found = fit(layer, "calibrated", moments, constant)
    design = torch.cat([z, torch.ones(len(z), 1)], 1) if constant else z
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(found.M, solution[: z.shape[1]].t(), rtol=1e-6, atol=1e-8)
    B = layer.B.detach().double()
    for method in merging.METHODS:
        f = fit(layer, method, moments, constant)
        wrong = (y - z @ f.M.t() - u @ f.K.t() - f.c) @ B.t()
        expected = wrong.norm() / (y @ B.t()).norm()
        assert f.error(moments, B) == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rank=st.integers(1, 4),
    spread=st.floats(1e-3, 1e3),
    count=st.integers(1, 60),
    constant=st.booleans(),
    spline=st.sampled_from(["summed", "per-channel"]),
)
def test_calibrated_is_never_worse_than_linear_on_what_it_saw(
    seed, rank, spread, count, constant, spline
):
    torch.manual_seed(seed)
    layer = aurora.AuroraLinear(nn.Linear(5, 4), rank=rank, spline=spline)
    for p in layer.adapter_parameters().values():
        nn.init.normal_(p)
    *_, moments = rows_of(layer, count, spread)
    B = layer.B.detach().double()
    errors = {m: fit(layer, m, moments, constant).error(moments, B) for m in merging.METHODS}
    assert errors["calibrated"] <= min(errors["linear"], errors["static"]) + 1e-7
    if constant:
        assert errors["calibrated"] <= 1 + 1e-7  # the mean alone does as well


def test_calibrated_takes_the_static_map_where_that_is_nearer():
    """One-hot inputs are the columns of A, on which the static map is exact and no function of z need be."""
    torch.manual_seed(0)
    layer = aurora.AuroraLinear(nn.Linear(12, 4), rank=2)
    for p in layer.adapter_parameters().values():
        nn.init.normal_(p)
    found = merging.collect(model := nn.Sequential(layer), [torch.eye(12)])["0"]
    B = layer.B.detach().double()
    assert fit(layer, "linear", found).error(found, B) > 0.1
    assert fit(layer, "calibrated", found).error(found, B) < 1e-6
    assert model[0] is layer


def test_degenerate_data_are_no_danger():
    """One row, or rows on a line: what the data do not show keeps the first-order slope."""
    layer = next(iter(core.layers(trained(torch.float64)).values()))
    anl = copy.deepcopy(layer.anl).double()
    at = torch.tensor([0.2, -0.4], dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(anl, at)
    one = Moments(6)
    one.add(torch.cat([at, anl(at).detach(), at])[None])
    found = fit(layer, "calibrated", one)
    torch.testing.assert_close(found.M, slope)
    torch.testing.assert_close(found.M @ at + found.c, anl(at))
    line = Moments(6)
    z = at + torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 2.0], dtype=torch.float64
    )
    line.add(torch.cat([z, anl(z).detach(), z], 1))
    found = fit(layer, "calibrated", line)
    across = torch.tensor([2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(found.M @ across, slope @ across, rtol=1e-6, atol=1e-8)
    assert found.M.abs().max() < 100


# ---- moments ----


def test_moments_do_not_lose_digits_to_an_offset():
    rows = torch.randn(1000, 3, dtype=torch.float64) + 1e7
    moments = Moments(3)
    for part in rows.split(33):
        moments.add(part)
    torch.testing.assert_close(
        moments.second(True), torch.cov(rows.t(), correction=0), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(moments.mean, rows.mean(0))


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_calibration_memory_does_not_depend_on_the_width(rank):
    """At d = 4096 as anywhere: well under the 2 MB a layer, up to rank 64."""
    moments = Moments(3 * rank)
    assert (
        sum(t.nbytes for t in (moments.mean, moments.scatter)) == 8 * (3 * rank + 9 * rank**2) < 2e6
    )


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages made inside the block hold at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            storage = t.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize("rank", [2, 8, 64])
@pytest.mark.parametrize("rows", [256, 4096])
@pytest.mark.parametrize("masked", [False, True])
def test_calibrating_a_layer_of_width_4096_takes_less_than_2_megabytes(rank, rows, masked):
    class Costless(nn.Module):
        in_features, out_features = 4096, 4

        def forward(self, x, attention_mask=None):
            return x[..., :4]

    model = nn.Sequential(Costless())
    aurora.inject(model, "0", rank=rank)
    model.forward = lambda x, attention_mask=None: model[0](x)
    batch = {"x": torch.randn(rows // 64, 64, 4096)}
    batch |= {"attention_mask": torch.ones(rows // 64, 64, dtype=torch.long)} if masked else {}
    with aurora.disabled(model), LiveBytes() as memory:  # the model's own memory is not counted
        merging.collect(model, [batch])
    parameters = 4096 * rank * 4  # sigma(A), as large as A
    assert 0 < memory.peak <= 2e6 + (parameters if rank > 8 else 0)


def test_padding_does_not_count():
    model = trained(torch.float64)
    whole = batches(2, torch.float64)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 3:] = 0
    dirty = whole[0].clone()
    dirty[1, 3:] = 1e3
    clean = merging.collect(model, [{"x": whole[0], "attention_mask": mask}, {"x": whole[1]}])
    padded = merging.collect(model, [{"x": dirty, "attention_mask": mask}, {"x": whole[1]}])
    assert clean["first"].count == 2 * 28 - 4
    for name in clean:
        torch.testing.assert_close(clean[name].scatter, padded[name].scatter)


def test_layers_called_by_keyword_and_layers_that_know_no_bias():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 6
            self.weight = nn.Parameter(torch.eye(6))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale()

        def forward(self, x):
            return self.scale(x=x)

    model, x = ByName(), torch.randn(30, 6)
    aurora.inject(model, "scale")
    nn.init.normal_(model.scale.B)
    dynamic = model(x)
    report = merging.merge(model, "calibrated", [x])
    assert not report.layers[0].bias
    assert set(model.state_dict()) == {"scale.weight"}
    report.unmerge()
    assert torch.equal(model(x), dynamic)
    with merging.watch_linearity(model) as gap:
        model(x)
        assert gap() > 0


def test_merging_leaves_the_random_state_alone():
    model = trained()
    before = torch.random.get_rng_state()
    merging.merge(model, "calibrated", batches())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_collecting_leaves_the_model_alone():
    model = trained(dropout=0.3).train()
    model.head.eval()
    before, hooks = everything(model), [len(m._forward_pre_hooks) for m in model.modules()]
    for given_batches in (batches(2), [(b,) for b in batches(2)], [{"x": b} for b in batches(2)]):
        found = merging.collect(model, given_batches)
        assert found["first"].count == 56
    assert model.training
    assert not model.head.training
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert everything(model) == before
    with pytest.raises(RuntimeError):
        merging.collect(model, [torch.randn(3, 5)])
    assert model.training
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


# ---- merging a model ----


@pytest.mark.parametrize("method", merging.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(method, dtype):
    model = trained(dtype)
    before, x = everything(model), batches(1, dtype, seed=4)[0]
    dynamic = model(x)
    report = merging.merge(model, method, batches(dtype=dtype), bias=True)
    assert report.merged == ["first", "second", "third"]
    assert type(model.first) is type(model.second) is nn.Linear
    assert not any(isinstance(m, aurora.AuroraLinear) for m in model.modules())
    assert model.first.weight.dtype == dtype
    assert all(p.requires_grad for p in model.parameters())  # as before inject, a new bias too
    assert not torch.equal(model(x), dynamic)
    gained = {"second.bias"} if method != "static" else set()
    assert set(model.state_dict()) == set(Net(dtype).state_dict()) | gained
    with pytest.raises(ValueError, match="never injected, or merged"):
        merging.merge(model, method, batches(dtype=dtype), bias=True)
    report.unmerge()
    assert everything(model) == before
    assert torch.equal(model(x), dynamic)
    assert set(aurora.adapter_state_dict(model)) > {"first.A", "head.weight"}
    with pytest.raises(ValueError, match="undone already"):
        report.unmerge()
    aurora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_calibrated_keeps_more_than_the_others():
    model, x = trained(), torch.cat(batches(4, seed=7))
    dynamic = model(x).detach()
    off = {}
    for method in merging.METHODS:
        merged = copy.deepcopy(model)
        report = merging.merge(merged, method, batches(16), bias=True)
        off[method] = (merged(x) - dynamic).norm().item()
        means = {m: sum(layer.errors[m] for layer in report.layers) for m in merging.METHODS}
    assert off["calibrated"] < off["linear"]
    assert off["calibrated"] < 0.5 * off["static"]
    assert means["calibrated"] < means["linear"] < means["static"]


def test_bias_false_forbids_a_new_bias_and_keeps_old_ones_in_use():
    model = trained()
    report = merging.merge(model, "calibrated", batches(), bias=False)
    assert model.second.bias is None
    assert not any(layer.bias for layer in report.layers)
    assert not torch.equal(model.first.bias, Net().first.bias)
    gains = trained()
    report = merging.merge(gains, "calibrated", batches(), bias=True)
    assert [layer.bias for layer in report.layers] == [False, True, False]
    assert "second" in str(report)
    assert "+ bias" in str(report)


def test_tolerance_keeps_the_worst_dynamic():
    model, x = trained(), batches(1, seed=4)[0]
    probe = merging.merge(copy.deepcopy(model), "calibrated", batches())
    errors = {layer.name: layer.errors["calibrated"] for layer in probe.layers}
    worst = max(errors, key=errors.get)
    limit = sorted(errors.values())[1]
    before = everything(model)
    dynamic = model(x)
    report = merging.merge(model, "calibrated", batches(), tolerance=limit)
    assert report.dynamic == [worst]
    assert isinstance(getattr(model, worst), aurora.AuroraLinear)
    assert list(core.layers(model)) == [worst]
    assert any(p.requires_grad for p in aurora.parameters(model))
    report.unmerge()
    assert everything(model) == before
    assert torch.equal(model(x), dynamic)
    assert merging.merge(model, "calibrated", batches(), tolerance=0.0).dynamic == [
        "first",
        "second",
        "third",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    model = trained(dtype)
    wide = copy.deepcopy(model).double()
    report = merging.merge(model, "linear")
    merging.merge(wide, "linear")
    eps = torch.finfo(dtype).eps
    for layer in report.layers:
        exact, stored = getattr(wide, layer.name).weight, getattr(model, layer.name).weight
        assert ((stored.double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-7).all()
        assert 0 < layer.rounding < 0.1
    assert all(
        layer.rounding < 1e-6 for layer in merging.merge(trained(torch.float32), "linear").layers
    )


BAD = {
    "method": (("affine",), {}, "method must be one of static, linear, calibrated"),
    "no batches": (("calibrated",), {}, '"calibrated" needs batches'),
    "empty batches": (("calibrated", []), {}, "never ran on the batches"),
    "tolerance alone": (("linear",), {"tolerance": 0.1}, "needs batches"),
    "tolerance": (("linear", batches(2)), {"tolerance": -1.0}, "at least 0 .* got -1.0"),
    "nan batches": (
        ("calibrated", [torch.full((2, 6), math.nan)]),
        {},
        "first saw NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_leave_the_model_as_it_was(case):
    arguments, options, match = BAD[case]
    model = trained()
    before = everything(model)
    with pytest.raises(ValueError, match=match):
        merging.merge(model, *arguments, **options)
    assert everything(model) == before


def test_nothing_is_merged_if_one_layer_would_overflow():
    model = trained(torch.float16)
    with torch.no_grad():
        model.third.B.fill_(1e6)
    before = everything(model)
    with pytest.raises(ValueError, match="NaN or infinity into third"):
        merging.merge(model, "linear")
    assert everything(model) == before


def test_quantised_and_tied_weights_are_refused():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 6
            self.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype)

    model = nn.Sequential(Quantised())
    aurora.inject(model, "0")
    with pytest.raises(ValueError, match=r"quantised.*merge into a plain copy"):
        merging.merge(model, "calibrated", batches(2))
    tied = trained()
    tied.head.weight = tied.first.base.weight
    with pytest.raises(ValueError, match=r"first\.weight is tied"):
        merging.merge(tied, "linear")


def test_one_layer_under_two_names_is_merged_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Identity())
    model[2] = model[0]
    aurora.inject(model, "0")
    nn.init.normal_(model[0].B)
    x = torch.randn(5, 6)
    dynamic = model(x)
    report = merging.merge(model, "calibrated", [torch.randn(50, 6)])
    assert model[0] is model[2]
    assert len(report.layers) == 1
    report.unmerge()
    assert model[0] is model[2]
    assert torch.equal(model(x), dynamic)


def test_a_changed_model_is_not_unmerged():
    model = trained()
    report = merging.merge(model)
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    before = everything(model)
    with pytest.raises(ValueError, match="first is no longer as the merge left it"):
        report.unmerge()
    assert everything(model) == before


def test_a_merged_model_holds_nothing_of_ours():
    model = trained()
    merging.merge(model, "calibrated", batches(2))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(batches(1)[0]), model(batches(1)[0]))
    assert not any(key.startswith("_aurora") for m in model.modules() for key in m.__dict__)


# ---- the report, and training for the merge ----


def test_the_report_prints_and_draws():
    report = merging.merge(trained(), "calibrated", batches())
    text = str(report)
    assert "3 of 3 layers merged" in text
    assert text.count("%") == 9
    page = report._repr_html_()
    assert page.count("%") == 9
    assert "second" in page
    axes = report.plot()
    assert [bar.get_label() for bar in axes.containers] == list(merging.METHODS)
    heights = [bar.get_height() for bar in axes.containers[2]]
    assert heights == [layer.errors["calibrated"] for layer in report.layers]
    bare = merging.merge(trained())
    assert "-" in str(bare)
    with pytest.raises(ValueError, match="merge with batches"):
        bare.plot()


def test_a_gained_bias_is_announced_with_what_keeps_it():
    assert "gained a bias" not in str(merging.merge(trained(), "calibrated", batches()))
    report = merging.merge(trained(), "calibrated", batches(), bias=True)
    assert report.gained_bias == ["second"]
    for told in (str(report), report._repr_html_()):
        assert "1 layers gained a bias" in told
        assert "attention_bias=True, mlp_bias=True" in told


def test_the_gap_is_the_squared_error_of_the_best_fit():
    model = trained(torch.float64)
    x = batches(1, torch.float64)[0]
    with merging.watch_linearity(model) as gap:
        with pytest.raises(ValueError, match="no adapted layer has run"):
            gap()
        model(x)
        value = gap()
    found = merging.collect(model, [x])
    fits = {
        name: fit(layer, "calibrated", found[name]) for name, layer in core.layers(model).items()
    }
    expected = sum(f.error(found[name], torch.eye(2).double()) ** 2 for name, f in fits.items()) / 3
    assert value.item() == pytest.approx(expected, rel=1e-3)
    assert not any(layer._forward_pre_hooks for layer in core.layers(model).values())


def test_the_gap_is_safe_at_the_start():
    model = Net()
    aurora.inject(model, TARGETS)
    with merging.watch_linearity(model) as gap:
        model(batches(1)[0])
        (65536 * gap()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in aurora.parameters(model))


def test_training_against_the_gap_closes_it():
    model, x = trained(), torch.cat(batches(4))
    optimizer = torch.optim.Adam(
        [p for n, p in core.ModelView.adapted(model).adapter().items() if ".anl." in n], lr=0.02
    )
    values = []
    with merging.watch_linearity(model) as gap:
        for _ in range(60):
            model(x)
            optimizer.zero_grad()
            gap().backward()
            optimizer.step()
            values.append(gap().item())
    assert values[-1] < 0.3 * values[0]


def test_affine_is_a_record():
    one = torch.eye(2, dtype=torch.float64)
    assert Affine(one, 0 * one, torch.zeros(2, dtype=torch.float64)).error(Moments(6), one) == 0.0


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.tril(), self.bias)


class Turned(nn.Module):
    """x W where nn.Linear has x W^T."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out))

    def forward(self, x):
        return x @ self.weight


def hooked():
    layer = nn.Linear(6, 6)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


@pytest.mark.parametrize(
    "make", [lambda: Masked(6, 6), lambda: Turned(6, 6), lambda: Turned(6, 5), hooked]
)
def test_a_layer_that_computes_more_than_its_weight_is_not_merged(make):
    model = nn.Sequential(make())
    aurora.inject(model, "0", mode="static")
    before = model[0].base.weight.clone()
    with pytest.raises(ValueError, match="computes more than x W"):
        aurora.merge(model)
    assert torch.equal(model[0].base.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounding_and_zero_weights_are_not_taken_for_more(dtype):
    model = nn.Sequential(
        nn.Linear(512, 64, dtype=dtype), nn.Linear(64, 3, bias=False, dtype=dtype)
    )
    nn.init.zeros_(model[1].weight)
    aurora.inject(model, "0|1", mode="static")
    assert aurora.merge(model).merged == ["0", "1"]


def altered_by_inject(model):
    aurora.inject(model, "first")


def altered_by_dtype(model):
    model.bfloat16()


def altered_in_place(model):
    with torch.no_grad():
        model.first.weight.add_(1)


def altered_past_autograd(model):
    model.first.weight.data[0, 0] += 1e-6


def altered_bias(model):
    model.third.bias.data.neg_()


@pytest.mark.parametrize(
    "alter",
    [altered_by_inject, altered_by_dtype, altered_in_place, altered_past_autograd, altered_bias],
)
def test_unmerge_refuses_what_has_changed_since(alter):
    model = trained()
    report = aurora.merge(model)
    alter(model)
    with pytest.raises(ValueError, match="no longer as the merge left it"):
        report.unmerge()


def altered_by_another_adapter(model):
    aurora.inject(model.head, "", train="bias")


def altered_by_freezing(model):
    model.head.weight.requires_grad_(False)


def altered_by_another_head(model):
    model.head.weight = nn.Parameter(torch.ones(7, model.head.in_features))


@pytest.mark.parametrize(
    "alter", [altered_by_another_adapter, altered_by_freezing, altered_by_another_head]
)
def test_unmerge_refuses_when_what_trains_has_changed_since(alter):
    model = trained()
    report = aurora.merge(model)
    alter(model)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="what trains has changed since the merge"):
        report.unmerge()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required


def test_a_fingerprint_sees_every_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
        t = torch.arange(12).to(dtype).reshape(3, 4)
        before = merging._fingerprint(t)
        for byte in range(t.view(torch.uint8).numel()):
            for bit in range(8):
                changed = t.clone()
                changed.view(torch.uint8).view(-1)[byte] ^= 1 << bit
                assert merging._fingerprint(changed) != before
        assert merging._fingerprint(t.t().contiguous().t()) == before


def test_a_fingerprint_of_several_parts_sees_the_first():
    t = torch.zeros((1 << 20) + 1, dtype=torch.float64)
    before = merging._fingerprint(t)
    t[0] = -0.0
    assert merging._fingerprint(t) != before


def test_a_gained_bias_trains_where_its_weight_does_and_nowhere_else():
    for trains in (True, False):
        model = Net()
        model.second.weight.requires_grad_(trains)
        aurora.inject(model, TARGETS)
        for p in aurora.parameters(model):
            nn.init.normal_(p)
        aurora.merge(model, "calibrated", batches(), bias=True)
        assert model.second.bias.requires_grad == trains


def test_calibration_does_not_see_what_it_is_judged_by():
    given = batches(8)
    fitted, judged = [b for i, b in enumerate(given) if i % 4 != 1], given[1::4]
    alone = merging.merge(trained(), "calibrated", fitted, held_out=judged)
    split = merging.merge(trained(), "calibrated", given)
    assert [row.errors for row in split.layers] == [row.errors for row in alone.layers]
    everything = merging.merge(trained(), "calibrated", given, held_out=judged)
    assert everything.layers[0].errors != split.layers[0].errors


def test_a_mask_follows_its_rows_over_several_parts():
    model = trained(torch.float64, rank=4)  # 1,024 rows at a time
    x = torch.randn(30, 100, 6, dtype=torch.float64)
    mask = (torch.rand(30, 100) < 0.5).long()
    dirty = torch.where(mask.unsqueeze(-1).bool(), x, 1e6)
    moments = merging.collect(model, [{"x": dirty, "attention_mask": mask}])["first"]
    alone = merging.collect(model, [x[mask.bool()]])["first"]
    assert moments.count == alone.count == int(mask.sum())
    torch.testing.assert_close(moments.mean, alone.mean)
    torch.testing.assert_close(moments.scatter, alone.scatter)


def test_directions_with_little_variance_are_fitted_too():
    layer = aurora.AuroraLinear(nn.Linear(2, 3).double(), rank=2, alpha=2.0)
    nn.init.normal_(layer.B)
    z = torch.randn(400, 2, dtype=torch.float64) * torch.tensor([1.0, 1e-3])
    y = z @ torch.tensor([[0.5, 2.0], [-1.0, 3.0]], dtype=torch.float64).t()
    moments = Moments(6)
    moments.add(torch.cat([z, y, torch.zeros_like(z)], 1))
    found = fit(layer, "calibrated", moments).M  # a pseudo-inverse that cuts at 1e-3 loses one
    wanted = torch.tensor([[0.5, 2.0], [-1.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_fit_through_the_origin_is_the_best_there():
    model = trained(torch.float64)
    seen = merging.collect(model, batches(dtype=torch.float64))["second"]
    layer, B = model.second, model.second.B.detach()
    best = fit(layer, "calibrated", seen, constant=False)
    assert not best.c.any()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        step = 1e-2 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        other = Affine(best.M + step, best.K, best.c)
        assert best.error(seen, B) < other.error(seen, B)


def test_both_merges_are_one_where_both_apply():
    for options in ({}, {"mode": "static"}, {"spline": "per-channel", "rank": 3}):
        ours, papers = trained(**options), trained(**options)
        merging.merge(ours)
        core.static_merge(papers)
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p, papers.get_parameter(name), rtol=1e-6, atol=1e-6)


def test_both_merges_refuse_the_same():
    masked = nn.Sequential(Masked(4, 4), nn.Linear(4, 4))
    aurora.inject(masked, "0")
    for act in (aurora.merge, core.static_merge):
        before = everything(masked)
        with pytest.raises(ValueError, match=r"computes more than x W\^T \+ b"):
            act(masked)
        assert everything(masked) == before


def test_unmerge_returns_adapters_in_the_mode_of_the_model():
    model = trained(dropout=0.5).train()
    x = batches(1)[0]
    report = aurora.merge(model)
    model.eval()
    report.unmerge()
    assert torch.equal(model(x), model(x))


def test_a_bias_gained_in_a_partial_merge_trains_again_with_its_weight():
    model = trained()
    errors = {
        row.name: row.errors["calibrated"]
        for row in aurora.merge(copy.deepcopy(model), "calibrated", batches(), bias=True).layers
    }
    assert errors["second"] < max(errors.values())
    report = aurora.merge(model, "calibrated", batches(), tolerance=errors["second"], bias=True)
    assert report.dynamic
    assert not model.second.bias.requires_grad
    aurora.merge(model)
    assert model.second.bias.requires_grad
    assert model.second.weight.requires_grad


def test_held_out_batches_judge_a_merge_that_needs_none():
    model = trained()
    report = aurora.merge(copy.deepcopy(model), "linear", held_out=batches())
    assert all(set(row.errors) == {"linear"} and row.errors["linear"] > 0 for row in report.layers)
    kept = aurora.merge(model, "linear", held_out=batches(), tolerance=0.0)
    assert kept.merged == []


@pytest.mark.parametrize(
    "x", [torch.randn(1, 6), torch.zeros(3, 6), torch.ones(5, 6), torch.randn(0, 6)]
)
def test_linearity_of_few_or_equal_rows_is_a_number(x):
    model = trained()
    with aurora.watch_linearity(model) as gap:
        model(torch.randn(4, 6))
        model(x)
    assert gap().isfinite()


def test_meta_weights_are_not_merged():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    aurora.inject(model, "0")
    with pytest.raises(ValueError, match="meta"):
        aurora.merge(model)

"""Base and adapter as one step of autograd must be what they are one by one, wherever it is on."""

import copy

import pytest
import torch
from support import disturb, is_at_once
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from aurora import AuroraLinear, _kernels, _layer, core
from benchmarks.lab import steps

VARIANTS = {
    "default": {},
    "per-channel": {"spline": "per-channel"},
    "rank 20": {"rank": 20},
    "few weights": {"rank": 4, "grid_size": 1},
    "without F": {"fixed": False},
    "without F, rank 20": {"fixed": False, "rank": 20},
    "without L": {"learnable": False},
    "between fixed projections": {"projections": "fixed", "init": "zero"},
    "sigmoid, quintic": {"activation": "sigmoid", "spline_order": 5, "grid_size": 9},
    "order 1": {"spline_order": 1},
}


def make(dtype=torch.float32, bias=True, **options) -> AuroraLinear:
    torch.manual_seed(0)
    base = nn.Linear(12, 8, bias, dtype=dtype).requires_grad_(False)
    layer = AuroraLinear(base, **({"rank": 3} | options))
    disturb(layer)
    return layer


def trained(layer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.adapter_parameters().items() if p.requires_grad}


def results(layer, x, run=None) -> dict[str, torch.Tensor]:
    """The output and all gradients, for a loss that is not linear in the output."""
    x = x.detach().requires_grad_()
    out = layer(x) if run is None else run(layer, x)
    leaves = {"x": x, **trained(layer)}
    grads = torch.autograd.grad(out.float().sin().sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def compare(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        size = value.float().abs().max() + 1e-30 if value.numel() else 1.0
        torch.testing.assert_close(
            found[name] / size, value / size, rtol=0, atol=tolerance, msg=name
        )


# ---- The same numbers ----


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12), (2, 0, 12), (700, 12)])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_what_base_and_adapter_are_one_by_one(name, shape):
    layer = make(**VARIANTS[name])
    x = torch.randn(*shape)
    assert is_at_once(layer(x))
    compare(results(layer, x), results(layer, x, _layer._one_by_one))


FINE = {"a fine grid": {"rank": 20, "grid_size": 10_000}}


@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12), (2, 12), (0, 12), (700, 12)])
@pytest.mark.parametrize("name", VARIANTS | FINE)
def test_without_gradients(name, shape):
    """One token has a way of its own, and fine grids another."""
    layer, x = make(torch.float64, **(VARIANTS | FINE)[name]), torch.randn(*shape).double()
    wanted = _layer._one_by_one(layer, x)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            compare({"out": layer(x)}, {"out": wanted}, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_other_dtypes(dtype, bias):
    layer, x = make(dtype, bias), torch.randn(4, 6, 12, dtype=dtype)
    assert is_at_once(layer(x))
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    compare(results(layer, x), results(layer, x, _layer._one_by_one), tolerance)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(base, given):
    layer, x = make(base), torch.randn(4, 6, 12, dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = results(layer, x), results(layer, x, _layer._one_by_one)
        assert is_at_once(layer(x))
    assert found["out"].dtype == torch.bfloat16
    compare(found, wanted, 2e-2)


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of another": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "four dimensions": lambda x: x.unflatten(1, (5, 2)).transpose(1, 2),
    "repeated": lambda x: x[:1].expand(len(x), -1, -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_that_are_not_contiguous(name):
    layer, x = make(), LAYOUTS[name](torch.randn(3, 10, 12))
    assert is_at_once(layer(x))
    compare(results(layer, x), results(layer, x.contiguous(), _layer._one_by_one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_start_is_the_bases_output_in_every_layout_bit_for_bit(name, dtype):
    """PyTorch's linear rounds otherwise for some of them than for their rows."""
    layer = AuroraLinear(nn.Linear(320, 96, dtype=dtype).requires_grad_(False))
    x = LAYOUTS[name](torch.randn(3, 10, 320, dtype=dtype))
    assert is_at_once(layer(x))
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base(x))


def test_an_input_without_gradient():
    layer, x = make(), torch.randn(5, 12)
    layer(x).sum().backward()
    found = {name: p.grad for name, p in trained(layer).items()}
    layer.zero_grad()
    _layer._one_by_one(layer, x).sum().backward()
    compare(found, {name: p.grad for name, p in trained(layer).items()})


def test_layers_that_share_an_input_and_checkpointing():
    layers = [make(), make(spline="per-channel", rank=2)]

    def body(x):
        return layers[0](x) * layers[1](torch.tanh(x))

    x = torch.randn(5, 12)
    wanted = results(layers[0], x, lambda _, x: body(x))
    for reentrant in (False, True):
        run = lambda _, x: checkpoint(body, x, use_reentrant=reentrant)  # noqa: B023, E731
        if not reentrant:
            compare(results(layers[0], x, run), wanted)
        leaf = x.clone().requires_grad_()
        run(None, leaf).float().sin().sum().backward()
        compare({"x": leaf.grad}, {"x": wanted["x"]})


def test_the_output_can_be_changed_in_place():
    layer, x = make(), torch.randn(2, 5, 12)
    run = lambda layer, x: torch.relu_(layer(x))  # noqa: E731
    one_by_one = lambda layer, x: torch.relu(_layer._one_by_one(layer, x))  # noqa: E731
    compare(results(layer, x, run), results(layer, x, one_by_one))


def test_a_wrong_gradient_would_be_noticed(monkeypatch):
    original = _layer._gradients

    def wrong(*args):
        grad_x, *others = original(*args)
        return grad_x * 1.0001, *others

    monkeypatch.setattr(_layer, "_gradients", wrong)
    layer, x = make(), torch.randn(5, 12)
    with pytest.raises(AssertionError, match="x"):
        compare(results(layer, x), results(layer, x, _layer._one_by_one))


# ---- Dropout ----


@pytest.fixture
def same_mask(monkeypatch):
    """Dropout leaves out the same numbers of x, at once and one by one."""

    def mask(x, p):
        generator = torch.Generator().manual_seed(x.numel())
        return (torch.rand(x.shape, generator=generator) >= p).to(x.dtype)

    def dropout(x, p, training):
        return x * mask(x, p) / (1 - p) if training else x

    monkeypatch.setattr(_layer, "dropout_mask", mask)
    monkeypatch.setattr(core.F, "dropout", dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "per-channel", "between fixed projections"])
def test_dropout_too(same_mask, name, dtype):
    layer, x = make(dtype, dropout=0.3, **VARIANTS[name]).train(), torch.randn(2, 7, 12).to(dtype)
    assert is_at_once(layer(x))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    found = results(layer, x)
    compare(found, results(layer, x, _layer._one_by_one), tolerance)
    others = results(layer.eval(), x)
    assert all(not torch.equal(found[key], others[key]) for key in found)


def test_every_derivative_of_dropout(same_mask):
    layer = make(torch.float64, dropout=0.3).double().train()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, *trained(layer).values())
    run = lambda x, *_: layer(x)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradcheck(run, (x,), check_forward_ad=True)


def test_dropout_draws_anew_from_pytorchs_generator():
    layer, x = make(dropout=0.5).train(), torch.randn(50, 12)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(layer(x))
    assert torch.equal(*outs)


def test_the_mean_over_dropout_is_the_output_without():
    """Of what is linear in x: with F(z) = H z and no splines."""
    layer = make(dropout=0.4, activation="identity", learnable=False)
    x = torch.randn(1, 12)
    with torch.no_grad():
        wanted = layer.eval()(x)
        found = layer.train()(x.expand(40_000, 12)) - layer.base(x)
    error = (found.mean(0) - (wanted - layer.base(x))).abs()
    assert (error < 5 * found.std(0) / 200).all()


# ---- Derivatives of every kind ----


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "order 1"])
def test_first_and_second_derivatives_are_right(monkeypatch, name):
    if name == "few weights":  # as of many points, whose backward gets the totals of the bumps
        monkeypatch.setattr(_kernels, "FEW", 0)
    rank = min(VARIANTS[name].get("rank", 2), 4)
    layer = make(torch.float64, **VARIANTS[name] | {"rank": rank}).double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    parameters = list(trained(layer).values())
    assert is_at_once(layer(x))
    run = lambda x, *_: layer(x)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *parameters), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, *parameters), check_batched_grad=True)


@pytest.mark.parametrize("name", ["default", "few weights"])
def test_forward_mode(monkeypatch, name):
    if name == "few weights":
        monkeypatch.setattr(_kernels, "FEW", 0)
    layer = make(torch.float64, **VARIANTS[name]).double()
    x, along = torch.randn(2, 3, 2, 12, dtype=torch.float64)
    with forward_ad.dual_level():
        out = layer(forward_ad.make_dual(x, along))
        found = forward_ad.unpack_dual(out).tangent
    nearby = (layer(x + 1e-6 * along) - layer(x - 1e-6 * along)) / 2e-6
    torch.testing.assert_close(found, nearby, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("derive", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_torch_func(derive):
    layer = make(torch.float64).double()
    x = torch.randn(12, dtype=torch.float64)
    found = derive(lambda x: layer(x).sin())(x)
    wanted = derive(lambda x: _layer._one_by_one(layer, x).sin())(x)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)


def test_a_gradient_for_every_row():
    layer, x = make(), torch.randn(5, 12)
    given = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, row).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(given, x)
    total = {name: found[name].sum(0) for name in trained(layer)}
    wanted = results(layer, x)
    compare(total, {name: wanted[name] for name in total})


def test_many_adapters_of_one_base_under_vmap():
    """A base that is one for all, and adapters that are not."""
    layers, x = [make(), make()], torch.randn(5, 12)
    disturb(layers[1], phase=3.0)
    own = {n: torch.stack([m.get_parameter(n) for m in layers]) for n in trained(layers[0])}
    run = lambda own, x: torch.func.functional_call(layers[0], own, x)  # noqa: E731
    found = torch.func.vmap(run, (0, None))(own, x)
    torch.testing.assert_close(found, torch.stack([m(x) for m in layers]))


# ---- Where it is off ----


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrize(module, name):
    nn.utils.parametrize.register_parametrization(module, name, Twice())


def hooked(layer):
    layer.anl.register_forward_hook(lambda module, args, out: 2 * out)


EXCEPTIONS = {
    "a base of another kind": lambda m: None,
    "a hook on the ANL": hooked,
    "a base that trains": lambda m: m.weight.requires_grad_(),
    "a bias that trains": lambda m: m.bias.requires_grad_(),
    "a computed weight": lambda m: parametrize(m, "weight"),
    "a computed bias": lambda m: parametrize(m, "bias"),
    "a computed H": lambda m: parametrize(m.anl, "H"),
    "static": lambda m: None,
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_where_it_would_differ_it_is_off(name):
    layer = make(**({"mode": "static"} if name == "static" else {}))
    if name == "a base of another kind":
        layer = AuroraLinear(Doubling(12, 8).requires_grad_(False))
        disturb(layer)
    EXCEPTIONS[name](layer)
    x = torch.randn(5, 12, requires_grad=True)
    found = layer(x)
    assert torch.equal(found, _layer._one_by_one(layer, x))
    assert not is_at_once(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_without_gradients_too(name, dtype):
    layer = make(dtype, **VARIANTS[name])
    for shape in [(12,), (5, 12), (2, 0, 12), (2, 9, 12)]:
        x = torch.randn(*shape, dtype=dtype)
        with torch.inference_mode():
            A, B, anl = layer.A, layer.B, layer.anl
            at_once = _layer.at_once(layer, x, A, B, anl)
            assert torch.equal(layer(x), at_once)
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6  # rounded less often, see below
            compare({"out": at_once}, {"out": _layer._one_by_one(layer, x)}, tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_many_tokens_without_gradients_in_half_precision(name, monkeypatch):
    """Their products are in half precision, as they are one by one."""
    monkeypatch.setattr(_layer, "FEW_NUMBERS", 0)
    layer = make(torch.bfloat16, **VARIANTS[name])
    for shape in [(12,), (5, 12), (2, 0, 12), (2, 9, 12)]:
        x = torch.randn(*shape, dtype=torch.bfloat16)
        with torch.inference_mode():
            compare({"out": layer(x)}, {"out": _layer._one_by_one(layer, x)}, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(12,), (2, 3, 12)])
def test_few_tokens_are_rounded_with_the_bases_output_and_with_the_sum_only(name, dtype, shape):
    layer, x = make(dtype, **VARIANTS[name]), torch.randn(*shape, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    with torch.inference_mode():
        out, wanted, base = layer(x), exact(x.double()), exact.base(x.double())
    bound = 0.51 * torch.finfo(dtype).eps * (base.abs() + wanted.abs()) + 1e-5
    assert ((out.double() - wanted).abs() <= bound).all()


def test_without_gradients_under_autocast():
    layer, x = make(), torch.randn(5, 12)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x), _layer._one_by_one(layer, x)
    assert found.dtype == torch.bfloat16
    compare({"out": found}, {"out": wanted}, 1e-2)


def test_an_input_that_does_not_fit_is_the_bases_error():
    layer = make()
    for x in (torch.randn(5, 11), torch.randn(5, 12).double(), torch.ones(5, 12).long()):
        with pytest.raises(RuntimeError) as wanted:
            layer.base(x)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(wanted.value)


def test_copies_have_it_too():
    assert is_at_once(copy.deepcopy(make())(torch.randn(5, 12)))


# ---- What it is for ----


@pytest.mark.parametrize("name", ["default", "per-channel", "without F", "without L"])
def test_a_step_holds_a_third_less_memory_than_loras(name):
    """One gradient as large as the input, where LoRA has two."""

    def peak(contender, **options):
        return steps.peak_bytes(steps.make_step(contender, width=768, tokens=1024, **options))

    options = dict(VARIANTS[name])
    contender = steps.CHANNEL if options.pop("spline", None) else steps.OURS
    ours, theirs = peak(contender, **options), peak(steps.PLAIN)
    assert ours <= 0.7 * theirs


def test_between_fixed_projections_neither_input_nor_hidden_vector_is_kept():
    layer, x, kept = make(projections="fixed", init="zero"), torch.randn(50, 12), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.shape for t in kept if 50 in t.shape] == [(3, 50)]  # z, and neither x nor s sigma(z)


def test_with_dropout_a_step_holds_less_memory_than_loras():
    given = {"width": 768, "tokens": 1024, "dropout": 0.1}
    ours, theirs = (
        steps.peak_bytes(steps.make_step(contender, **given))
        for contender in (steps.OURS, steps.PEFT)
    )
    assert ours <= 0.85 * theirs


def test_with_dropout_a_mask_is_kept_beside_the_input():
    layer, x, kept = make(dropout=0.5).train(), torch.randn(50, 12), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    wide = [t for t in kept if t.shape == x.shape]
    assert len(wide) == 2
    assert sum(torch.equal(t, x) for t in wide) == 1


@pytest.mark.parametrize(
    ("dtype", "rank", "hidden"),
    [(torch.float32, 8, 8), (torch.float32, 7, 7), (torch.bfloat16, 16, 8), (torch.bfloat16, 9, 9)],
)
def test_many_points_keep_the_totals_of_the_bumps_where_they_take_no_more(
    monkeypatch, dtype, rank, hidden
):
    """In place of s sigma(z), which is as wide as z, in the dtype of x. There are 8 bumps."""
    monkeypatch.setattr(_kernels, "FEW", 0)
    layer, x, kept = make(dtype, rank=rank), torch.randn(50, 12, dtype=dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    rows = [len(t) for t in kept if t.shape[-1] == 50]
    assert sorted(rows) == sorted([rank, hidden])
    assert sum(t.nbytes for t in kept if t.shape[-1] == 50) <= 50 * rank * (4 + dtype.itemsize)

"""aurora.recipes: the start from the gradient and the penalty on roughness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import on_two
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import aurora
from aurora import core

X = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randn(400, 3, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two adapted layers and a head; `wrap` runs the body, for instance under a checkpoint."""

    def __init__(self, wrap: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 3)
        self.wrap = wrap or (lambda body, x: body(x))

    def body(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.one(x)).clone()
        hidden += 0.5  # what follows may change an output in place
        return torch.tanh(self.two(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wrap(self.body, x))


def build(wrap: Callable[..., Tensor] | None = None, rank: int = 2, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(wrap)
    aurora.inject(model, "one|two", rank, train="^head", **options)
    return model


def loss(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return (model(x) - y).square().sum(-1).mean()


def start(model: nn.Module, parts: Iterable[slice] = (slice(None),), **options: Any) -> nn.Module:
    with aurora.start_from_gradient(model, **options):
        for part in parts:
            loss(model, X[part], Y[part]).backward()
    return model


def starts(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.A.detach().clone() for name, layer in core.layers(model).items()}


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 1e-4) -> None:
    for name, A in starts(one).items():
        torch.testing.assert_close(starts(other)[name].to(A), A, rtol=tolerance, atol=tolerance)


def by_hand(model: Net, ridge: float, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    """METHOD's formula, with C_l^(-1/2) and a singular value decomposition, in float64."""
    model, seen, found = copy.deepcopy(model).double(), {}, {}
    layers = core.layers(model)

    def keep(layer: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        seen[layer] = args[0].detach(), out

    hooks = [layer.register_forward_hook(keep) for layer in layers.values()]
    loss(model, x.double(), y.double()).backward()
    [hook.remove() for hook in hooks]
    for name, layer in layers.items():
        inputs, out = seen[layer]
        C = inputs.t() @ inputs / len(inputs)
        mean = C.diagonal().mean()
        values, vectors = torch.linalg.eigh(C + ridge * mean * torch.eye(len(C)))
        root = vectors @ torch.diag(values**-0.5) @ vectors.t()
        _, _, Vh = torch.linalg.svd(out.grad.t() @ inputs @ root)
        A = Vh[: layer.config.rank] @ root
        A *= ((mean / 3) / ((A @ C) * A).sum(1, keepdim=True)).sqrt()
        found[name] = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    return found


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_it_is_the_formula(rank: int, ridge: float) -> None:
    model = build(rank=rank)
    expected = by_hand(model, ridge)
    start(model, ridge=ridge)
    for name, A in starts(model).items():
        torch.testing.assert_close(A, expected[name].float(), rtol=1e-3, atol=1e-4)


def test_outputs_gradients_and_hooks_are_as_before() -> None:
    model = build()
    loss(model).backward()
    before = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    kept = {name: None if g is None else g.clone() for name, (_, g) in before.items()}
    out = model(X)
    start(model)
    assert torch.equal(model(X), out)
    for name, p in model.named_parameters():
        assert p.grad is before[name][1]
        assert p.grad is None or torch.equal(p.grad, kept[name])
        assert torch.equal(p, before[name][0]) == (not name.endswith(".A")), name
    assert not any(module._forward_hooks for module in model.modules())


def interrupted(model: nn.Module, **options: Any) -> None:
    with aurora.start_from_gradient(model, **options) as parts:
        for _ in parts:
            loss(model).backward()
            raise KeyError


@pytest.mark.parametrize("options", [{}, {"chunk": 1}])
def test_an_error_in_the_loop_leaves_everything(options: dict[str, Any]) -> None:
    model = build()
    before = starts(model)
    with pytest.raises(KeyError):
        interrupted(model, **options)
    assert all(torch.equal(A, before[name]) for name, A in starts(model).items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


# --- Whatever the loop is like, the start is the same --------------------------------------------


def test_accumulation_order_and_chunks_do_not_matter() -> None:
    whole = start(build())
    quarters = [slice(i, i + 100) for i in range(0, 400, 100)]
    assert_same(whole, start(build(), quarters))  # sums of mean losses: all scaled alike
    assert_same(whole, start(build(), reversed(quarters)))
    for chunk in (1, 2, 7):
        model = build()
        with aurora.start_from_gradient(model, chunk=chunk) as parts:
            seen = []
            for part in parts:
                seen += part
                loss(model).backward()
        assert seen == ["one", "two"]
        assert_same(whole, model, 0)
    model = build()
    with aurora.start_from_gradient(
        model
    ) as parts:  # the loop over parts is welcome without chunk=
        for _ in parts:
            loss(model).backward()
    assert_same(whole, model, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_each_token_once(reentrant: bool) -> None:
    def wrap(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(body, x.clone().requires_grad_(), use_reentrant=reentrant)

    model, counts = build(wrap), []
    with aurora.start_from_gradient(model):
        loss(model).backward()
        for layer in core.layers(model).values():
            (hook,) = layer._forward_hooks.values()
            counts.append(int(hook.__self__.sums[2]))
    assert counts == [400, 400]
    assert_same(start(build()), model, 1e-5)


def test_a_loss_scale_cancels() -> None:
    model = build()
    with aurora.start_from_gradient(model):
        (2.0**16 * loss(model)).backward()
    assert_same(start(build()), model, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_gives_the_same_start(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net().to(dtype)
    aurora.inject(model, "one|two", 2, train="^head")
    with aurora.start_from_gradient(model):
        (model(X.to(dtype)) - Y.to(dtype)).square().sum(-1).mean().backward()
    assert_same(start(build()), model, 0.05 if dtype == torch.bfloat16 else 1e-4)


def test_autocast_gives_the_same_start() -> None:
    model = build()
    with aurora.start_from_gradient(model), torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()
    assert_same(start(build()), model, 0.05)
    around, inside = build(), build()
    with torch.autocast("cpu", torch.bfloat16), aurora.start_from_gradient(around):
        loss(around).backward()
    with aurora.start_from_gradient(inside), torch.autocast("cpu", torch.bfloat16):
        loss(inside).backward()
    assert_same(around, inside, 0)


def test_tokens_without_a_gradient_do_not_count() -> None:
    model, x = build(), torch.cat([X, 100 * torch.randn(50, 12)])
    x[400], mask = 3e38, torch.arange(450) < 400  # not even if their squares overflow
    with aurora.start_from_gradient(model):
        (loss(model, X) * 400 / 450).backward()
    padded = build()
    with aurora.start_from_gradient(padded):
        out = padded(x)
        (
            torch.where(mask[:, None], out, 0)
            - torch.where(mask[:, None], torch.cat([Y, Y[:50]]), 0)
        ).square().sum(-1).mean().backward()
    assert_same(model, padded, 1e-5)


def test_evaluation_inside_the_block_and_shared_layers() -> None:
    model = build()
    with aurora.start_from_gradient(model):
        with torch.no_grad():
            model(10 * X)
        model(10 * X)  # never sent back
        loss(model).backward()
    assert_same(start(build()), model, 0)
    torch.manual_seed(0)
    twice = nn.Sequential(shared := nn.Linear(12, 12), nn.Tanh(), shared, nn.Linear(12, 3))
    aurora.inject(twice, r"^0$")
    with aurora.start_from_gradient(twice):
        loss(twice).backward()
        (hook,) = core.layers(twice)["0"]._forward_hooks.values()
        assert int(hook.__self__.sums[2]) == 800


def test_a_compiled_model_is_looked_at_too() -> None:
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("this torch cannot switch its compiler off in a block")
    plain, model = start(build()), build()
    compiled = torch.compile(model, backend="eager")
    loss(compiled).backward()  # compiled before the hooks are there
    start(compiled)
    assert_same(plain, model, 1e-6)


class Rounded(nn.Module):
    """A layer without a floating-point weight, as quantisation leaves it."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.scale = 127 / like.weight.detach().abs().max().item()
        self.register_buffer("codes", (like.weight.detach() * self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) / self.scale)


def test_a_quantised_base_is_looked_at_as_any_other() -> None:
    found = []
    for kind in (Rounded, lambda layer: layer):
        torch.manual_seed(0)
        model = Net()
        for layer in (model.one, model.two):
            nn.init.zeros_(layer.bias)
        model.one, model.two = kind(model.one), kind(model.two)
        aurora.inject(model, "one|two", 2, train="^head")
        found.append(start(model))
    assert_same(*found, tolerance=0.05)


# --- Data that say little ------------------------------------------------------------------------


def hidden_size(layer: core.AuroraLinear, x: Tensor) -> Tensor:
    return (x @ layer.A.t()).square().mean(0).sqrt()


def test_rows_have_the_size_of_drawn_ones() -> None:
    model = start(build(rank=4))
    expected = (X.square().mean() / 3).sqrt()
    # G has the rank of the loss's gradient, here full: all four rows are found
    torch.testing.assert_close(hidden_size(core.layers(model)["one"], X), expected.expand(4))


def test_one_token_decides_one_row() -> None:
    model, drawn = build(rank=3), starts(build(rank=3))
    with aurora.start_from_gradient(model):
        loss(model, X[:1], Y[:1]).backward()
    A = core.layers(model)["one"].A
    torch.testing.assert_close(
        A[0] / A[0].norm(), X[0] * (A[0] @ X[0]).sign() / X[0].norm(), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(A[1:], drawn["one"][1:])


@pytest.mark.parametrize("spoil", ["few", "constant", "constant row", "repeated", "tiny", "huge"])
def test_poor_data_give_a_finite_start(spoil: str) -> None:
    x, y, model = X.clone(), Y, build(rank=8)
    if spoil == "few":
        x, y = x[:5], y[:5]
    if spoil == "constant":
        x[:, 3:] = 2.0
    if spoil == "constant row":
        x[:] = x[0]
    if spoil == "repeated":
        x[:, 1] = x[:, 0]
    x *= {"tiny": 1e-15, "huge": 1e15}.get(spoil, 1.0)
    with aurora.start_from_gradient(model):
        loss(model, x, y).backward()
    for layer in core.layers(model).values():
        assert layer.A.isfinite().all()
        assert layer.A.norm(dim=1).min() > 0
    size = hidden_size(core.layers(model)["one"], x)
    assert size.max() < 3 * x.square().mean().sqrt()


def test_no_gradient_keeps_the_draw() -> None:
    model, drawn = build(), starts(build())
    with aurora.start_from_gradient(model):
        (0 * loss(model)).backward()
    assert all(torch.equal(A, drawn[name]) for name, A in starts(model).items())


def test_a_layer_that_no_backward_reaches_is_named() -> None:
    model, drawn = build(), starts(build())
    with (
        pytest.warns(UserWarning, match="no backward pass reached two"),
        aurora.start_from_gradient(model),
    ):
        model.one(X).square().mean().backward()
    assert torch.equal(core.layers(model)["two"].A, drawn["two"])
    assert not torch.equal(core.layers(model)["one"].A, drawn["one"])


def _no_backward(model: nn.Module) -> None:
    loss(model)


def _nan(model: nn.Module) -> None:
    loss(model, torch.where(X > 2, float("nan"), X)).backward()


@pytest.mark.parametrize(
    ("options", "body", "message"),
    [
        ({}, _no_backward, "no backward pass reached one"),
        ({}, _nan, "NaN or infinity in the input or gradient of one"),
        ({"ridge": 0.0}, loss, "ridge must be"),
        ({"ridge": float("nan")}, loss, "ridge must be"),
        ({"chunk": 0}, loss, "chunk must be"),
        ({"chunk": True}, loss, "chunk must be"),
        ({"chunk": 1}, loss, "not looked at: one"),
    ],
)
def test_errors_change_nothing(
    options: dict[str, Any], body: Callable[[nn.Module], Any], message: str
) -> None:
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message), aurora.start_from_gradient(model, **options):
        body(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_trained_model_is_refused() -> None:
    model = build()
    nn.init.ones_(core.layers(model)["two"].B)
    with (
        pytest.raises(ValueError, match="two has been trained already"),
        aurora.start_from_gradient(model),
    ):
        loss(model).backward()
    with pytest.raises(ValueError, match="no AuroRA adapters"), aurora.start_from_gradient(Net()):
        pass


def test_it_finds_the_input_that_changed() -> None:
    torch.manual_seed(0)
    x, net = torch.randn(256, 6), nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    changed = x.clone()
    changed[:, 4] = x[:, 4].clamp(-0.3, 0.3)
    y = net(changed).detach()
    aurora.inject(net, "^0$", 1, spline="per-channel")
    with aurora.start_from_gradient(net):
        (net(x) - y).square().mean().backward()
    row = net[0].A[0].abs()
    assert row.argmax() == 4
    assert row[4] > 5 * row[[0, 1, 2, 3, 5]].max()


def test_wide_layers_agree_with_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    full = start(build(rank=3))
    monkeypatch.setattr("aurora.recipes._CHEAP", 1)  # float32 and subspace iteration
    assert_same(full, start(build(rank=3)), 2e-3)


# --- Fixed projections ---------------------------------------------------------------------------

FIXED: dict[str, Any] = {"projections": "fixed", "init": "zero", "spline": "per-channel"}
FIXED |= {"activation": "identity", "grid_range": (-4.0, 4.0)}


def inputs_of(model: Net, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with core.watching(core.layers(model), lambda name, _, x: seen.update({name: x.detach()})):
        model(x)
    return seen


@pytest.mark.parametrize("rank", [1, 3])
def test_fixed_projections_are_whitened_and_orthonormal(rank: int) -> None:
    model = build(rank=rank, **FIXED)
    before = model(X)
    start(model, ridge=1e-4)
    assert torch.equal(model(X), before)
    seen = inputs_of(model, X)
    for name, layer in core.layers(model).items():
        z = seen[name] @ layer.A.t()
        torch.testing.assert_close(z.t() @ z / len(z), torch.eye(rank), rtol=0.02, atol=0.02)
        torch.testing.assert_close(layer.B.t() @ layer.B, torch.eye(rank), rtol=1e-4, atol=1e-5)
    assert not any(layer.A.requires_grad for layer in core.layers(model).values())


@pytest.mark.parametrize("rank", [3, 9, 14, 20])
def test_fixed_projections_beyond_the_signal_stay_in_shape(rank: int) -> None:
    model = build(rank=rank, **FIXED)
    with aurora.start_from_gradient(model):
        loss(model, X[:2], Y[:2]).backward()  # two tokens: two directions with signal
    seen = inputs_of(model, X[:2])
    for name, layer in core.layers(model).items():
        size = (seen[name] @ layer.A.t()).square().mean(0)
        torch.testing.assert_close(size[:2], torch.ones(min(rank, 2)), rtol=1e-3, atol=1e-3)
        assert size.max() < 1.01
        assert layer.A.square().sum(1).max() < 2 / (1e-2 * seen[name].square().mean())
        own = min(rank, layer.out_features)
        B = layer.B[:, :own]
        torch.testing.assert_close(B.t() @ B, torch.eye(own), rtol=1e-4, atol=1e-4)


def test_fixed_projections_then_learn_through_sigma_alone() -> None:
    model = start(build(rank=4, **FIXED))
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, 1e-2))
    still = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(value := loss(model))
        value.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, still[n]) for n, p in model.named_parameters() if n in still)
    with (
        pytest.raises(ValueError, match="one has been trained already"),
        aurora.start_from_gradient(model),
    ):
        loss(model).backward()


# --- Rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_rates_follow_the_rank(rank: int) -> None:
    slow, fast = aurora.parameter_groups(build(rank=rank))
    assert slow["lr"] == pytest.approx(8e-3 / rank**0.5)
    assert fast["lr"] == pytest.approx(8e-2 / rank**0.5)
    assert "weight_decay" not in slow
    assert fast["weight_decay"] == 0


def test_between_fixed_projections_sigma_has_the_rate_itself() -> None:
    model = build(rank=4, **FIXED)
    head, sigma = aurora.parameter_groups(model, 1e-3)
    assert head["lr"] == sigma["lr"] == 1e-3
    assert {*head["params"], *sigma["params"]} == set(aurora.parameters(model))
    assert aurora.parameter_groups(model)[0]["lr"] == pytest.approx(0.1 / 4)
    torch.manual_seed(0)
    aurora.inject(net := nn.Sequential(nn.Linear(4, 4)), "0", 4, **FIXED)  # nothing else trains
    assert len(aurora.parameter_groups(net)) == 1


# --- Roughness -----------------------------------------------------------------------------------


def test_roughness_is_the_mean_square_of_second_differences() -> None:
    model, expected = build(rank=3, spline="per-channel"), 0.0
    for layer in core.layers(model).values():
        w = layer.anl.spline_weight.detach()
        expected += (w[:, :-2] - 2 * w[:, 1:-1] + w[:, 2:]).square().mean()
    torch.testing.assert_close(aurora.roughness(model), expected)
    aurora.roughness(model).backward()
    assert all(
        layer.anl.spline_weight.grad.abs().max() > 0 for layer in core.layers(model).values()
    )


def test_straight_lines_cost_nothing() -> None:
    model = build(spline="per-channel")
    aurora.start_as_identity(model)
    assert aurora.roughness(model) < 1e-12
    with torch.no_grad():
        core.layers(model)["one"].anl.spline_weight[0, 3] += 1
    assert aurora.roughness(model) > 0.1


def test_lasso_is_the_size_of_inputs_and_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    aurora.inject(model, "0|1", rank=2)
    with torch.no_grad():
        for p in aurora.parameters(model):
            nn.init.normal_(p)
    wanted = 0.0
    for layer in core.layers(model).values():
        wanted += sum(abs(a) for a in layer.A.flatten().tolist())
        wanted += sum(sum(b * b for b in column) ** 0.5 for column in layer.B.t().tolist())
    found = aurora.lasso(model)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    found.backward()
    torch.testing.assert_close(model[0].A.grad, model[0].A.detach().sign())
    with torch.no_grad():
        model[0].B[:, 1] = 0
        model[0].B.grad = None
    aurora.lasso(model).backward()  # a channel that is gone stays gone, without NaN
    assert not model[0].B.grad[:, 1].any()
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        aurora.lasso(nn.Linear(2, 2))


def test_roughness_needs_splines() -> None:
    with pytest.raises(ValueError, match="no adapter has splines"):
        aurora.roughness(build(learnable=False))
    short = build(
        spline="per-channel", grid_size=1, spline_order=1
    )  # two weights have no second difference
    assert aurora.roughness(short) == 0


def test_fixed_projections_have_a_ridge_of_their_own() -> None:
    for options, ridge in (({}, 1e-2), (FIXED, 1.0)):
        found = [starts(start(build(**options), ridge=r)) for r in (None, ridge, 0.1)]
        for name, A in found[0].items():
            assert torch.equal(A, found[1][name])
            assert not torch.allclose(A, found[2][name])


# --- Other starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_keeps_the_span_and_the_outputs(dtype: torch.dtype) -> None:
    model, again = build(rank=3).to(dtype), build(rank=3).to(dtype)
    x = X[:5].to(dtype)
    before, out = starts(model), model(x)
    aurora.rotate(model, 1)
    aurora.rotate(again, 1)
    for name, A in starts(model).items():
        assert not torch.allclose(A, before[name], rtol=0.1)
        assert A.dtype == dtype
        gram, old = (a.float().t() @ a.float() for a in (A, before[name]))
        torch.testing.assert_close(gram, old, rtol=0, atol=1e-6 if dtype == X.dtype else 1e-2)
        assert torch.equal(A, starts(again)[name])
    assert torch.equal(model(x), out)
    aurora.rotate(again, 2)
    assert not torch.equal(starts(again)["one"], starts(model)["one"])


def test_a_rotation_of_what_is_trained_is_refused() -> None:
    model = build()
    with torch.no_grad():
        model.two.B.fill_(1)
    before = starts(model)
    with pytest.raises(ValueError, match="two has been trained already: rotate right after"):
        aurora.rotate(model, 1)
    with pytest.raises(ValueError, match=r"seed must be an int, got 1\.0"):
        aurora.rotate(build(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inject"):
        aurora.rotate(nn.Linear(2, 2), 1)
    assert all(torch.equal(A, before[name]) for name, A in starts(model).items())


# --- Several processes ---------------------------------------------------------------------------


def worker(rank: int, kind: str, folder: str) -> None:
    net = build()
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in core.layers(net).values():
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    half = slice(rank * 200, rank * 200 + 200)
    start(net, [half])
    found = {n: a.full_tensor() if hasattr(a, "full_tensor") else a for n, a in starts(net).items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    out = net(X[:4])  # the new values are those that the next pass uses
    torch.save(out.detach(), Path(folder) / f"out{rank}.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_start_as_one_process_would(kind: str, tmp_path: Path) -> None:
    on_two(worker, kind, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = starts(start(build(), [slice(0, 200), slice(200, 400)]))
    for name, A in alone.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.load(tmp_path / "out0.pt"), build()(X[:4]).detach())

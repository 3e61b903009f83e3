"""What the words of the table of settings do: kinds of adapters, starts, groups of parameters."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import aurora
from aurora import core
from benchmarks.lab import baselines
from benchmarks.lab.needs import need
from benchmarks.lab.settings import Setting
from benchmarks.lab.training import Objective

HEAD = r"^head\."
HEAD_RATE = 5e-3  # of every method, so that a method's own rate can be chosen by itself


class Place(NamedTuple):
    """Where adapters go.

    targets: regex of the layers to adapt. train: of other parameters that train. seed: of every A,
    if it shall be shared.
    """

    targets: str
    train: str | None
    seed: int | None = None

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Draw every A anew, layer by layer from a seed of its own, if there is a seed.

        Methods of a rank then start with the same A; that of a smaller rank is part of that of a
        larger.
        """
        if self.seed is None:
            return
        name_of_A = re.compile(r"\.(A|lora_A\.default\.weight)$")
        found = [p for name, p in model.named_parameters() if name_of_A.search(name)]
        for i, A in enumerate(found):
            generator = torch.Generator().manual_seed(1000 * self.seed + i)
            drawn = torch.rand(max(16, len(A)), A.shape[1], generator=generator)[: len(A)]
            A.copy_((2 * drawn - 1) / math.sqrt(A.shape[1]))  # as Kaiming-uniform(a = sqrt 5) does

    def trained(self, setting: Setting) -> str | None:
        """The regex of what trains beside the setting's adapters."""
        train = self.train if setting.train is None else setting.train
        if not setting.biases:
            return train
        biases = rf"{self.targets}\.bias"
        return f"{train}|{biases}" if train else biases


ENCODER = Place(r"attention\.self\.(query|value)", HEAD)
LANGUAGE_MODEL = Place(r"layers\.\d+\..*_proj$", None)


class Sample(NamedTuple):
    """What a start may look at.

    inputs: batches of keyword arguments of the model. batches: the same kind of data with what is
    to be learnt. objective: the loss of the model on one of these. first: batches of the size that
    training takes, for starts that are paid for with steps.
    """

    inputs: Sequence[dict[str, Tensor]]
    batches: Sequence[Any]
    objective: Objective
    first: Sequence[Any] = ()


def prepare(model: nn.Module, setting: Setting, place: Place, sample: Sample) -> None:
    """Ready a fresh model for training: adapters in, all else frozen, A shared, starts done."""
    KINDS[setting.kind](model, setting, place)
    place.share(model)
    for start in setting.starts:
        STARTS[start](model, sample)


def spent(setting: Setting, head: bool = True) -> int:
    """The steps of the budget that the setting's starts use up, of a model with a head or not."""
    starts = setting.starts if head else [start for start in setting.starts if start != WARMED]
    return sum(COSTS.get(start, 0) for start in starts)


def groups(model: nn.Module, setting: Setting, lr: float) -> list[dict[str, Any]]:
    """Parameter groups: the head at HEAD_RATE, all else at `lr` times its factor.

    A head that is all that trains has the rate `lr` too.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone = all(re.search(HEAD, name) for name in trained)
    found: dict[float, list[nn.Parameter]] = {}
    for name, p in trained.items():
        factors = (f for pattern, f in setting.rates.items() if re.search(pattern, name))
        rate = next(factors, 1.0) * lr
        if re.search(HEAD, name) and not alone:
            rate = HEAD_RATE
        found.setdefault(rate, []).append(p)
    return [{"params": ps, "lr": rate} for rate, ps in found.items()]


# --- Kinds ----------------------------------------------------------------------------------------


def _plain(model: nn.Module, setting: Setting, place: Place) -> None:
    baselines.freeze(model, place.trained(setting) or "")


def _lora(model: nn.Module, setting: Setting, place: Place) -> None:
    train = place.trained(setting)
    baselines.inject_lora(model, place.targets, setting.rank, train=train, **setting.options)


def _peft(model: nn.Module, setting: Setting, place: Place) -> None:
    """PEFT's own LoRA in a Reader's encoder, a check on ours."""
    peft = need("peft")
    options = {"lora_alpha": 2 * setting.rank, "target_modules": f".*{place.targets}"}
    config = peft.LoraConfig(r=setting.rank, **options | dict(setting.options))
    wrapped: Any = peft.get_peft_model(model.encoder, config)  # type: ignore[arg-type]
    model.encoder = wrapped.train(model.training)  # the wrapper starts in train mode


def _aurora(model: nn.Module, setting: Setting, place: Place) -> None:
    train = place.trained(setting)
    aurora.inject(model, place.targets, setting.rank, train=train, **setting.options)


KINDS: Mapping[str, Callable[[nn.Module, Setting, Place], None]] = {
    "plain": _plain,
    "lora": _lora,
    "peft": _peft,
    "aurora": _aurora,
}


# --- Starts ---------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_vectors(
    model: nn.Module, inputs: Sequence[dict[str, Tensor]]
) -> dict[core.AuroraLinear, Tensor]:
    """z = A x (r, N) of every adapted layer on the tokens of the inputs, padding left out."""
    layers = core.layers(model)
    found: dict[core.AuroraLinear, list[Tensor]] = {layer: [] for layer in layers.values()}
    for batch in inputs:
        mask = batch["attention_mask"].bool()

        def look(_: str, layer: core.AuroraLinear, x: Tensor, mask: Tensor = mask) -> None:
            found[layer].append(layer.A @ x[mask].t())

        with core.watching(layers, look):
            model(**batch)
    return {layer: torch.cat(seen, 1) for layer, seen in found.items()}


def identity(model: nn.Module, _: Sample) -> None:
    """Start as LoRA inside the grid."""
    aurora.start_as_identity(model)


@torch.no_grad()
def fit_grid(model: nn.Module, sample: Sample) -> None:
    """A grid that reaches just as far as 99.9% of the layer's hidden values."""
    for layer, z in hidden_vectors(model, sample.inputs).items():
        sizes = z.abs().flatten()
        few = z.numel() < 1e7  # what `quantile` can sort
        reach = float(sizes.double().quantile(0.999)) if few else float(sizes.max())
        anl = core.ANL(layer.config, grid_range=(-reach, reach))
        for p, kept in zip(anl.parameters(), layer.anl.parameters(), strict=True):
            p.copy_(kept)  # a state dict would not fit another grid
        layer.anl = anl


@torch.no_grad()
def normalise(model: nn.Module, sample: Sample) -> None:
    """Rows of A scaled so that every hidden channel has root mean square 1/2 at the start."""
    for layer, z in hidden_vectors(model, sample.inputs).items():
        layer.A.mul_(0.5 / z.square().mean(1, keepdim=True).sqrt())


@torch.no_grad()
def louder(model: nn.Module, _: Sample) -> None:
    """Spline weights drawn in +-0.5 instead of +-0.1."""
    for layer in core.layers(model).values():
        assert layer.anl.spline_weight is not None
        layer.anl.spline_weight.mul_(5)


class LinearANL(core.ANL):
    """sigma(z) + z: linear beyond the grid, where the splines end."""

    @staticmethod
    def evaluate(z: Tensor, H: Any, w: Any, grid: Any, config: Any, scale: float) -> Tensor:
        """(r, N) -> (r, N)."""
        return torch.add(core.ANL.evaluate(z, H, w, grid, config, scale), z, alpha=scale)


@torch.no_grad()
def add_identity(model: nn.Module, _: Sample) -> None:
    """sigma(z) + z with sigma = 0 at the start: AuroRA starts as LoRA everywhere."""
    for layer in core.layers(model).values():
        layer.anl.__class__ = LinearANL
        for p in layer.anl.parameters():
            p.zero_()


class CentredANL(core.ANL):
    """sigma(z) - sigma(0): no constant."""

    @staticmethod
    def evaluate(z: Tensor, H: Any, w: Any, grid: Any, config: Any, scale: float) -> Tensor:
        """(r, N) -> (r, N)."""
        origin = core.ANL.evaluate(z.new_zeros(len(z), 1), H, w, grid, config, scale)
        return core.ANL.evaluate(z, H, w, grid, config, scale) - origin


def drop_constant(model: nn.Module, _: Sample) -> None:
    """sigma(0) = 0, whatever is learnt."""
    for layer in core.layers(model).values():
        layer.anl.__class__ = CentredANL


WARMED = "head warmed"
WARM, LOOKED = 10, 10  # steps that the head is trained alone, and that the gradient is looked at


def warm_head(model: nn.Module, sample: Sample) -> None:
    """Train the head alone, as the gradient under a random one says little. It is kept."""
    if not any(re.search(HEAD, name) for name, _ in model.named_parameters()):
        return
    others = [
        p for name, p in model.named_parameters() if p.requires_grad and not re.search(HEAD, name)
    ]
    for p in others:
        p.requires_grad_(False)  # no backward through the encoder
    step = _head_step(model, sample.objective)
    for batch in sample.first[:WARM]:
        step(batch)
    for p in others:
        p.requires_grad_(True)


def look_at_gradient(
    model: nn.Module, sample: Sample, batches: int | None = None, ridge: float = 1e-2
) -> None:
    """Let the loss choose where A starts, AuroRA's or LoRA's, while the head goes on training."""
    ranks = baselines.ranks(model)
    twin = model
    if ranks:  # LoRA's start is found by AuroRA adapters in the same places
        twin = copy.deepcopy(model)
        baselines.unwrap(twin)
        head = HEAD if any(re.search(HEAD, name) for name, _ in twin.named_parameters()) else None
        aurora.inject(twin, lambda name, _: name in ranks, max(ranks.values()), train=head)
    step = _head_step(twin, sample.objective)
    with aurora.start_from_gradient(twin, ridge=ridge):
        for batch in sample.first[-(batches or LOOKED) :]:
            step(batch)
    if ranks:
        for name, layer in core.layers(twin).items():
            model.get_parameter(f"{name}.A").data.copy_(layer.A)
        kept = {name: p for name, p in twin.named_parameters() if re.search(HEAD, name)}
        for name, p in kept.items():
            model.get_parameter(name).data.copy_(p)


@torch.no_grad()
def scale_A(model: nn.Module, _: Sample, factor: float) -> None:
    """Hidden values so many times as large, with outputs as they are, since B is 0."""
    for layer in core.layers(model).values():
        layer.A.mul_(factor)


def eva(model: nn.Module, sample: Sample) -> None:
    """PEFT's EVA: A from the singular vectors of the layers' inputs, which needs no backward."""
    peft = need("peft")
    encoder: Any = model.encoder
    config = encoder.peft_config["default"]
    config.init_lora_weights = "eva"
    # Every layer keeps its rank, so that as many parameters train as with the others.
    config.eva_config = peft.EvaConfig(rho=1.0, use_label_mask=False)
    inputs = [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for batch in sample.first[-LOOKED:]
    ]
    peft.initialize_lora_eva_weights(encoder, inputs, show_progress_bar=False)


def lora_ga(model: nn.Module, sample: Sample) -> None:
    """PEFT's LoRA-GA: A and B from the gradient of the weights, while the head goes on training."""
    peft = need("peft")
    loraga = importlib.import_module("peft.tuners.lora.loraga")
    wrapped: Any = model.encoder
    config, encoder = wrapped.peft_config["default"], wrapped.unload()
    config.init_lora_weights, config.lora_ga_config = "lora_ga", peft.LoraGAConfig()
    model.encoder = encoder
    step = _head_step(model, sample.objective)

    def look() -> None:
        for batch in sample.first[-LOOKED:]:
            step(batch)

    loraga.preprocess_loraga(encoder, config, look)
    model.encoder = peft.get_peft_model(encoder, config).train(model.training)


def _head_step(model: nn.Module, objective: Objective) -> Callable[[Any], None]:
    """A function that goes forward and backward on a batch, and trains the head if there is one."""
    head = [p for name, p in model.named_parameters() if re.search(HEAD, name)]
    optimizer = torch.optim.AdamW(head, lr=HEAD_RATE, weight_decay=0.0) if head else None

    def step(batch: Any) -> None:
        objective(model, batch).backward()  # type: ignore[no-untyped-call]
        if optimizer:
            nn.utils.clip_grad_norm_(head, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


# In steps of the budget: texts seen, whether a start goes backward too or not.
COSTS = {
    WARMED: WARM,
    "gradient": LOOKED,
    "gradient, plain": LOOKED,
    "gradient, ridge 1e-4": LOOKED,
    "gradient, ridge 1": LOOKED,
    "gradient, 2 batches": 2,
    "gradient, 40 batches": 40,
    "eva": LOOKED,
    "lora-ga": LOOKED,
}

STARTS: Mapping[str, Callable[[nn.Module, Sample], None]] = {
    "identity": identity,
    "grid from data": fit_grid,
    "z normalised": normalise,
    "louder": louder,
    "linear beyond the grid": add_identity,
    "no constant": drop_constant,
    WARMED: warm_head,
    "gradient": look_at_gradient,
    # Beside such a ridge the covariance of the inputs counts for nothing.
    "gradient, plain": functools.partial(look_at_gradient, ridge=1e6),
    "gradient, ridge 1e-4": functools.partial(look_at_gradient, ridge=1e-4),
    "gradient, ridge 1": functools.partial(look_at_gradient, ridge=1.0),
    "gradient, 2 batches": functools.partial(look_at_gradient, batches=2),
    "gradient, 40 batches": functools.partial(look_at_gradient, batches=40),
    "A halved": functools.partial(scale_A, factor=0.5),
    "A doubled": functools.partial(scale_A, factor=2.0),
    "eva": eva,
    "lora-ga": lora_ga,
}

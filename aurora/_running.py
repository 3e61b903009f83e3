"""Running a model aside from its training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aurora import core


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block all modules are in evaluation mode; then each is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def leaves(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, or mappings, sequences, dataclasses of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from leaves(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from leaves(part)
    elif dataclasses.is_dataclass(output):
        yield from leaves(vars(output))


def random_like(ends: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to start a backward pass from, the same at every call."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(end.shape, generator=random).to(end) for end in ends]


def check(model: nn.Module, batch: Any) -> dict[str, str]:
    """Find adapters that do nothing, whatever the cause: run a batch forward and backward.

    An adapter is dead if its layer is never called, or only its weight is read (a fused attention,
    a parent that uses the layer as a bag of tensors), or if no gradient reaches it (the loss does
    not depend on it, a detach on the way). The batch runs in evaluation mode, with gradients and
    without. The model is left as it was: no hook stays, no `.grad` is written.

    Args:
        model: A model with adapters, before it is compiled.
        batch: A tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        What is wrong, by layer; empty if every adapter works.

    Raises:
        ValueError: The model has no adapters.

    Example:
        >>> assert not aurora.check(model, batch)
    """
    layers = core.layers(model)
    with evaluating(model), torch.inference_mode(False):
        with torch.no_grad(), _counting(layers) as served:
            call(model, batch)
        with torch.enable_grad(), _counting(layers) as ran:
            ends = [end for end in leaves(call(model, batch)) if end.requires_grad]
        reached = _reached(ends, layers)
    found = {}
    for name, layer in layers.items():
        if not layer.enabled:
            found[name] = "is off: this runs inside aurora.disabled or aurora.use"
        elif name not in ran:
            found[name] = "did not run: its layer is not called, or its weight is read instead"
        elif name not in served:
            found[name] = "did not run without gradients: a fused evaluation bypasses it"
        elif name not in reached:
            found[name] = "got no gradient: no output of the model depends on it"
    return found


@contextlib.contextmanager
def _counting(layers: Mapping[str, core.AuroraLinear]) -> Iterator[set[str]]:
    """The names of the layers whose adapters run inside the block.

    No hooks: PyTorch's fused layers leave their fast path where there are any.
    """
    ran: set[str] = set()

    def counted(name: str, layer: core.AuroraLinear) -> Any:
        def adapted(*args: Any, **kwargs: Any) -> Tensor:
            ran.add(name)
            return type(layer).adapted(layer, *args, **kwargs)

        return adapted

    try:
        for name, layer in layers.items():
            layer.__dict__["adapted"] = counted(name, layer)
        yield ran
    finally:
        for layer in layers.values():
            layer.__dict__.pop("adapted", None)


def _reached(ends: list[Tensor], layers: Mapping[str, core.AuroraLinear]) -> set[str]:
    """The names of the layers that a gradient from the model's outputs reaches."""
    # B gets one even at the start, where it is 0; with fixed projections it is the ANL that trains.
    probes = {name: _probe(layer) for name, layer in layers.items()}
    live = {name: p for name, p in probes.items() if p.requires_grad}
    if not ends or not live:
        return set()
    grads = torch.autograd.grad(ends, list(live.values()), random_like(ends), allow_unused=True)
    named = zip(live, grads, strict=True)
    return {name for name, grad in named if grad is not None and bool(grad.any())}


def _probe(layer: core.AuroraLinear) -> nn.Parameter:
    if layer.config.projections == "fixed":
        return next(layer.anl.parameters())
    return layer.B

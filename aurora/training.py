"""Where training starts and at what pace, where that is not the paper's; and running a model aside from its training.

What `start_as_identity` and `parameter_groups` bring was measured: docs/results/learning.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aurora import core


@torch.no_grad()
def start_as_identity(model: nn.Module) -> None:
    """Let every adapter start as LoRA: sigma(z) = z inside the grid. Call it after `inject`, before training.

    H becomes 0 and spline weight g of every channel its place `low + (g - (k - 1) / 2) h`, less what F then is (0, or
    1/2 with "sigmoid"), for which sigma is the identity on the grid range (docs/theory.md, section 6). The output stays
    the base's, bit for bit, as B is 0.

    Raises ValueError, with the model as it was, if the model has no adapters, or a layer has no splines per channel or
    has been trained already (its B is not 0).
    """
    found = core.layers(model)
    for name, layer in found.items():
        if layer.config.spline != "per-channel" or not layer.config.learnable:
            raise ValueError(
                f'{name} has no spline per channel: inject with spline="per-channel", learnable=True'
            )
        if not layer.B.is_meta and layer.B.any():
            raise ValueError(
                f"{name} has been trained already; layer.reset_parameters() would start afresh"
            )
    for layer in found.values():
        c, w = layer.config, layer.anl.spline_weight
        assert w is not None
        for p in layer.anl.parameters():
            p.zero_()
        constant = layer.anl(w.new_zeros(c.rank))  # F, and nothing else, as the splines are 0
        wide = torch.promote_types(w.dtype, torch.float32)
        places = torch.arange(w.shape[1], dtype=wide, device=w.device) - (c.spline_order - 1) / 2
        w.copy_(c.grid_range[0] + places / c.cells_per_unit - constant.unsqueeze(1))


def parameter_groups(model: nn.Module, lr: float, factor: float = 10.0) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: H and the spline weights at `factor * lr`, all else that trains at `lr`.

    model: one with adapters. lr: the learning rate of A, B and whatever `train=` kept, as one would choose it for LoRA.
    factor: at a factor of 1, H and the spline weights, which are not as small as the entries of A and B, hardly move in
    a short fine-tuning. Together the groups hold every parameter of `aurora.parameters(model)` once.

    Raises ValueError if the model has no adapters, or if `lr` or `factor` is not finite and above 0.
    """
    for name, value in (("lr", lr), ("factor", factor)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    nonlinear = dict.fromkeys(
        p for layer in core.layers(model).values() for p in layer.anl.parameters()
    )
    others = [p for p in core.parameters(model) if p not in nonlinear]
    return [{"params": others, "lr": lr}, {"params": list(nonlinear), "lr": factor * lr}]


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output on a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def layer_input(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The x that an adapted layer was called with, by position or by name, as hooks are given it."""
    x: Tensor = args[0] if args else named["x"]
    return x


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block every module is in evaluation mode; then each returns to the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

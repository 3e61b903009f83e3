"""The adapters that AuroRA is measured against: LoRA, and MoSLoRA with a matrix between A and B.

LoRA: Hu et al., arXiv:2106.09685. MoSLoRA: Wu et al., "Mixture-of-Subspaces in Low-Rank
Adaptation", arXiv:2406.11909.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lab.needs import need


class LoRALinear(nn.Module):
    """`W x + b + s B A x`, with `mixer` `W x + b + s B M A x`.

    A (r, d_in), B (d_out, r), M (r, r), s = alpha / r.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, mixer: bool = False) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        weight = base.weight  # whose dtype and device the adapter shares
        self.A = nn.Parameter(
            nn.init.kaiming_uniform_(weight.new_empty(rank, base.in_features), a=math.sqrt(5))
        )
        self.B = nn.Parameter(weight.new_zeros(base.out_features, rank))
        self.M = nn.Parameter(nn.init.orthogonal_(weight.new_empty(rank, rank))) if mixer else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        out = self.base(x)
        z = F.linear(x, self.A).flatten(0, -2)
        z = z if self.M is None else F.linear(z, self.M)
        # One pass over the output, as in AuroraLinear, so that timings compare methods, not care.
        sum_ = torch.addmm(out.flatten(0, -2), z, self.B.t(), alpha=self.scaling)
        return sum_.view(out.shape)

    def update(self) -> Tensor:
        """`s B M A`, (d_out, d_in): what merging adds to the weight."""
        return self.scaling * (self.B if self.M is None else self.B @ self.M) @ self.A


def inject_lora(
    model: nn.Module,
    target_regex: str,
    rank: int,
    *,
    alpha: float | None = None,
    mixer: bool = False,
    train: str | None = None,
) -> list[str]:
    """Adapt every `nn.Linear` whose name matches, in place; freeze all but what `train` matches.

    alpha: 2 * rank unless given, the scaling 2 that AuroRA has in its paper (alpha 4, rank 2).
    Returns the names adapted; ValueError if there are none.
    """
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and re.search(target_regex, n)
    ]
    if not names:
        raise ValueError(f"{target_regex!r} matches no nn.Linear")
    freeze(model, train or "(?!)")
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        _put(model, name, LoRALinear(base, rank, 2 * rank if alpha is None else alpha, mixer))
    return names


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every LoRA in the model, by the name of its layer."""
    return {n: len(m.A) for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def unwrap(model: nn.Module) -> None:
    """Put every LoRA's base back in its place."""
    for name in ranks(model):
        _put(model, name, model.get_submodule(name).base)  # type: ignore[arg-type]


def freeze(model: nn.Module, train: str) -> None:
    """Only parameters whose name matches stay trainable."""
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(train, name) is not None)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every update to its weight, `W <- W + s B M A`; plain layers return."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            layer.base.weight += layer.update()
            _put(model, name, layer.base)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def save_trained(model: nn.Module, path: Path) -> None:
    """Write every trainable parameter to a safetensors file."""
    trained = {
        name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad
    }
    need("safetensors.torch").save_file(trained, path)


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Read them back into a model prepared in the same way; KeyError if the names differ."""
    saved = need("safetensors.torch").load_file(path)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(saved.pop(name))
    if saved:
        raise KeyError(f"{path} holds what the model has not: {', '.join(saved)}")

"""Who learns the change: AuroRA with its start and its penalties, and everybody it is measured by.

A model is a chain of layers; `front` and `back` are identity layers before and behind it, so that
an adapter can bend what goes in or what comes out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import aurora
from benchmarks.curves.stack import Objective
from benchmarks.lab import baselines

PLACES = {
    "front": r"^front$",
    "first": r"^first$",
    "last": r"^last$",
    "all": r"^(first|middle|last)$",
    "back": r"^back$",
}
GRID: dict[str, Any] = {"grid_size": 10, "grid_range": (-2.0, 2.0)}
WIDE: dict[str, Any] = {"grid_size": 15, "grid_range": (-3.0, 3.0)}  # as far as colours go
BEND: dict[str, Any] = {"spline": "per-channel", "init": "identity", "fixed": False, **GRID}


class Choice(NamedTuple):
    """What held-out examples choose.

    rate: of learning. decay: weight decay. rough, size: weights of the penalties. turn: seed of a
    rotation of AuroRA's axes at the start, 0 for none.
    """

    rate: float
    decay: float = 0.0
    rough: float = 0.0
    size: float = 0.0
    turn: int = 0


def grid(**values: Sequence[Any]) -> tuple[Choice, ...]:
    """All choices of these values."""
    every = itertools.product(*values.values())
    return tuple(Choice(**dict(zip(values, chosen, strict=True))) for chosen in every)


class Situation(NamedTuple):
    """What `prepare` gets.

    model: to change in place. place: regex of the layers. x, y: the examples, (n, d_in) and (n,
    d_out). read, write: (m, d), the directions that bend, as in Task. choice: as above.
    """

    model: nn.Module
    place: str
    x: Tensor
    y: Tensor
    read: Tensor
    write: Tensor
    choice: Choice


@dataclass(frozen=True)
class Contender:
    """A method: how it readies a model, what it is penalised for, and between what it may choose.

    noisy: the choices where labels are noisy, if they are others. factors: regex of parameter names
    -> factor on the rate. knows: it is told where to look.
    """

    prepare: Callable[[Situation], nn.Module]
    choices: tuple[Choice, ...]
    noisy: tuple[Choice, ...] = ()
    objective: type[Objective] = Objective
    factors: Mapping[str, float] = field(default_factory=dict)
    knows: bool = False


# --- AuroRA ---------------------------------------------------------------------------------------


class Bent(Objective):
    """AuroRA's loss: it is dear to be rough, and dear to use many inputs and channels."""

    def penalties(self) -> list[Tensor]:
        """Roughness and size."""
        return [aurora.roughness(self.model), aurora.lasso(self.model)]


def adapt(rank: int, start: bool = True, **options: Any) -> Callable[[Situation], nn.Module]:
    """AuroRA, its A from the gradient of the loss on the examples."""

    def prepare(at: Situation) -> nn.Module:
        aurora.inject(at.model, at.place, rank, **BEND | options)
        if start:
            with aurora.start_from_gradient(at.model):
                (at.model(at.x) - at.y).square().mean().backward()
        if at.choice.turn:
            aurora.rotate(at.model, at.choice.turn)
        return at.model

    return prepare


# --- The others -----------------------------------------------------------------------------------


def lora(rank: int, train: str | None = None) -> Callable[[Situation], nn.Module]:
    """LoRA in the same layers; `train`: regex of parameters that train too."""

    def prepare(at: Situation) -> nn.Module:
        baselines.inject_lora(at.model, at.place, rank, train=train)
        return at.model

    return prepare


def plain(train: str) -> Callable[[Situation], nn.Module]:
    """The model's own parameters whose names match."""

    def prepare(at: Situation) -> nn.Module:
        baselines.freeze(at.model, train)
        return at.model

    return prepare


class Bottleneck(nn.Module):
    """`layer(x) + B relu(A x + c)`: A (r, d_in), c (r,), B (d_out, r), which starts at 0."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer, self.A = layer, nn.Linear(layer.in_features, rank)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, d_in) -> (N, d_out)."""
        out: Tensor = self.layer(x)
        return torch.addmm(out, torch.relu(self.A(x)), self.B.t())


class Sparse(Objective):
    """The bottleneck's loss, with the same penalty of size as AuroRA's."""

    def penalties(self) -> list[Tensor]:
        """No roughness, and size."""
        found = [m for m in self.model.modules() if isinstance(m, Bottleneck)]
        sizes = [m.A.weight.abs().sum() + m.B.norm(dim=0).sum() for m in found]
        return [torch.zeros(()), torch.stack(sizes).sum()]


def relu(rank: int) -> Callable[[Situation], nn.Module]:
    """ReLU units beside a layer, as adapters have them."""

    def prepare(at: Situation) -> nn.Module:
        baselines.freeze(at.model, "(?!)")
        name = at.place.strip("^$")
        layer = at.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(at.model, name, Bottleneck(layer, rank))
        return at.model

    return prepare


class Warp(nn.Module):
    """`z + sum_j S_j(read_j z) write_j`, splines along given directions; S_j starts at 0.

    read, write: (m, d). grid: of the splines.
    """

    def __init__(self, read: Tensor, write: Tensor, grid: Mapping[str, Any]) -> None:
        super().__init__()
        options: dict[str, Any] = {"spline": "per-channel", "init": "zero", "fixed": False}
        self.anl = aurora.ANL(len(read), **options, **grid)
        self.read = nn.Parameter(read, requires_grad=False)
        self.write = nn.Parameter(write, requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """z (N, d) -> (N, d)."""
        bent: Tensor = self.anl(z @ self.read.t())
        return z + bent @ self.write


class Rough(Objective):
    """The warp's loss, with AuroRA's penalty of roughness."""

    def penalties(self) -> list[Tensor]:
        """Roughness."""
        (warp,) = (m for m in self.model.modules() if isinstance(m, Warp))
        weight = warp.anl.spline_weight
        assert weight is not None
        return [weight.diff(n=2, dim=1).square().mean()]


def warp(knows: bool) -> Callable[[Situation], nn.Module]:
    """Splines along the true directions, or along every coordinate."""

    def prepare(at: Situation) -> nn.Module:
        baselines.freeze(at.model, "(?!)")
        every = torch.eye(at.read.shape[1])
        read, write = (at.read, at.write) if knows else (every, every)
        name = at.place.strip("^$")
        setattr(at.model, name, Warp(read, write, WIDE if name == "back" else GRID))
        return at.model

    return prepare


# --- All by name ----------------------------------------------------------------------------------

ROUGH, SIZE, STIFF = (3e-4, 3e-3), (1e-3, 3e-3), (3e-2, 3e-1, 3.0)
TURNS = (0, 1, 2, 3)
OURS = grid(rate=(0.05,), rough=ROUGH, size=(1e-3,), turn=TURNS)
OURS_NOISY = grid(rate=(0.05,), rough=STIFF, size=(1e-2, 1e-1))
LINEAR = grid(rate=(0.003, 0.01, 0.03), decay=(0.0, 0.1))
FULL = grid(rate=(3e-4, 1e-3, 3e-3), decay=(0.0, 0.3))
FULL_NOISY = grid(rate=(1e-5, 1e-4, 1e-3), decay=(0.0, 0.3))
SPLINES = grid(rate=(0.01, 0.05), rough=(3e-5, *ROUGH))
SPLINES_NOISY = grid(rate=(0.01, 0.05), rough=STIFF)
UNITS = grid(rate=(0.003, 0.01, 0.03), size=(0.0, *SIZE))
UNITS_NOISY = grid(rate=(0.003, 0.01, 0.03), size=(1e-2, 1e-1))
SLOW_A = {r"\.[AB]$": 0.1}  # A and B at a tenth of the rate of the splines
BIASES = r"^(first|middle|last)\.bias"


def ours(rank: int, choices: tuple[Choice, ...] = OURS, **options: Any) -> Contender:
    """AuroRA with its penalties."""
    return Contender(adapt(rank, **options), choices, OURS_NOISY, Bent, SLOW_A)


CONTENDERS: dict[str, Contender] = {
    "full": Contender(plain(r"^(first|middle|last)\."), FULL, FULL_NOISY),
    "biases": Contender(plain(BIASES), LINEAR),
    "warp, told": Contender(warp(True), SPLINES, SPLINES_NOISY, Rough, knows=True),
    "warp, every input": Contender(warp(False), SPLINES, SPLINES_NOISY, Rough),
    "LoRA r=1, biases too": Contender(lora(1, BIASES), LINEAR),
    "LoRA r=3, biases too": Contender(lora(3, BIASES), LINEAR),
}
CONTENDERS |= {f"AuroRA r={rank}": ours(rank) for rank in (1, 2, 4)}
CONTENDERS |= {f"LoRA r={rank}": Contender(lora(rank), LINEAR) for rank in (3, 5, 7, 8)}
CONTENDERS |= {
    f"ReLU {rank}": Contender(relu(rank), UNITS, UNITS_NOISY, Sparse) for rank in (2, 5, 6, 7)
}
# What AuroRA's parts bring.
PAPER: dict[str, Any] = {"spline": "summed", "init": "paper", "fixed": True}
PAPER |= {"grid_size": 5, "grid_range": (-1.0, 1.0)}
CONTENDERS |= {
    "AuroRA r=4, drawn": ours(4, start=False),
    "AuroRA r=4, no penalty": ours(4, grid(rate=(0.02, 0.05), turn=TURNS)),
    "AuroRA r=4, roughness only": ours(4, grid(rate=(0.05,), rough=ROUGH, turn=TURNS)),
    "AuroRA r=4, size only": ours(4, grid(rate=(0.05,), size=SIZE, turn=TURNS)),
    "AuroRA r=4, one start": ours(4, grid(rate=(0.05,), rough=ROUGH, size=SIZE)),
    "AuroRA r=4, with F": ours(4, fixed=True),
    "AuroRA r=2, the paper's": Contender(adapt(2, start=False, **PAPER), LINEAR),
}

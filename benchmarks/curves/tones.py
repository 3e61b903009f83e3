"""A photograph as a function of the place, and a tone curve that is laid over it.

The model maps a place to a colour and has learned a photograph of scikit-image (coffee, chelsea,
rocket). Then the photograph goes through a tone curve in "luminosity" mode, as photo editors have
it: the luminance changes along the curve and the differences between the channels stay. The
photographs are real; the curve is imposed. Examples are pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.curves.chain import Task, chain, fit
from benchmarks.curves.kept import kept
from benchmarks.lab.needs import need

SIDE, WAVES, WIDTH, STEPS = 96, 64, 128, 10_000
LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722])  # of linear sRGB, ITU-R BT.709


def tone(light: Tensor) -> Tensor:
    """An S-shaped curve that lifts the middle and turns the brightest down, [0, 1] -> [0, 1]."""
    return (0.9 * torch.sin(2.2 * light.clamp(0, 1) ** 1.3)).clamp(0, 1)


def photograph(name: str, side: int = SIDE) -> Tensor:
    """(pixels, 3) in [0, 1], its larger side `side` pixels long, row by row."""
    picture = _small(name, side)
    return picture.reshape(-1, 3)


def _small(name: str, side: int) -> Tensor:
    whole = getattr(need("skimage.data"), name)()
    share = side / max(whole.shape[:2])
    size = (round(whole.shape[0] * share), round(whole.shape[1] * share))
    small = need("skimage.transform").resize(whole, size, anti_aliasing=True)
    return torch.tensor(small).float()


def waves(height: int, width: int) -> Tensor:
    """(pixels, 2 WAVES): sines and cosines of every place, of random frequencies, fixed."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    places = torch.cartesian_prod(rows, columns)  # (pixels, 2)
    draw = torch.Generator().manual_seed(0)
    phase = places @ (10 * torch.randn(2, WAVES, generator=draw))
    return torch.cat([phase.sin(), phase.cos()], 1)


def task(world: str, side: int = SIDE, steps: int = STEPS) -> Task:
    """The photograph of this name under the tone curve."""
    return kept(f"tones {world} {side} {steps}", lambda: _task(world, side, steps))


def _task(world: str, side: int, steps: int) -> Task:
    picture = _small(world, side)
    x, colours = waves(*picture.shape[:2]), picture.reshape(-1, 3)
    mean, scale = colours.mean(0), colours.std()
    light = colours @ LUMINANCE
    toned = colours + (tone(light) - light).unsqueeze(1)
    torch.manual_seed(0)
    model = chain(x.shape[1], WIDTH, WIDTH, 3)
    fit(model, x, (colours - mean) / scale, steps)
    y = (toned - mean) / scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    pool, test = order[: len(x) // 2], order[len(x) // 2 :]
    read, write = directions((colours - mean) / scale)
    return Task(model, (x[pool], y[pool]), (x[test], y[test]), read, write)


def directions(z: Tensor) -> tuple[Tensor, Tensor]:
    """(read, write): luminance, of unit deviation over the colours z, and what moves it alone."""
    size = (z @ LUMINANCE).std()
    return (LUMINANCE / size).unsqueeze(0), size * torch.ones(1, 3)

"""MuJoCo's Reacher, a model of its next step, and what is exchanged: motors or sensors.

Gymnasium's "Reacher-v5", an arm of two joints. The model reads cosine and sine of both angles, both
velocities and both torques, and predicts how the velocities change. The physics are MuJoCo's; the
exchange is imposed: the commanded torques, or the measured velocities, pass through curves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.curves.chain import Task, chain, fit
from benchmarks.curves.kept import kept
from benchmarks.lab.needs import need

EPISODE, DEAD, LARGEST, FASTEST = 50, 0.2, 0.4, 20.0
WIDTH, SAMPLES, STEPS = 128, 60_000, 20_000  # of the base model
OBSERVED = [0, 1, 2, 3, 6, 7]  # cosines, sines, velocities; the rest is the target's
VELOCITIES, TORQUES = [4, 5], [6, 7]  # of the model's inputs
HALF = math.sqrt(0.5)
AXES = {  # along what the world bends, of the two inputs that it bends
    "motors": np.eye(2),
    "differential": np.array([[HALF, HALF], [HALF, -HALF]]),
    "sensors": np.eye(2),
}


def weak(torque: Any) -> Any:
    """A worn motor: nothing below DEAD, never more than LARGEST."""
    return np.sign(torque) * np.clip(np.abs(torque) - DEAD, 0, LARGEST)


def compressed(velocity: Any) -> Any:
    """A sensor that reads large velocities as smaller, gamma 1/2, alike at FASTEST."""
    return np.sign(velocity) * np.sqrt(np.abs(velocity) * FASTEST)


def collect(world: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(inputs (count, 8), changes of velocity (count, 2)) of episodes with random torques.

    world: "motors": each torque goes through a worn motor; "differential": the motors drive sum and
    difference of the torques, as through a differential gear; "sensors": velocities are read by
    compressing sensors; "" for the world that the base model knows.
    """
    need("mujoco")  # which Gymnasium imports by itself, but does not ask for
    arm = need("gymnasium").make("Reacher-v5")
    draw, axes = np.random.default_rng(seed), AXES.get(world)
    inputs, changes = [], []
    for start in range(0, count, EPISODE):
        seen, _ = arm.reset(seed=seed * 1_000_000 + start)
        for _ in range(EPISODE):
            torque = draw.uniform(-1, 1, 2)
            act = axes.T @ weak(axes @ torque) if world in ("motors", "differential") else torque
            after, *_ = arm.step(act)
            read = seen[OBSERVED]
            if world == "sensors":
                read[VELOCITIES] = compressed(read[VELOCITIES])
            inputs.append(np.concatenate([read, torque]))
            changes.append(after[6:8] - seen[6:8])
            seen = after
    pair = (torch.tensor(np.array(found[:count])).float() for found in (inputs, changes))
    return next(pair), next(pair)


def base(samples: int = SAMPLES, steps: int = STEPS) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(model, mean and deviation of its 8 inputs, deviation of its 2 outputs in the third place).

    All are of the world as it was; the model reads and writes units of deviations.
    """
    return kept(f"reacher {samples} {steps}", lambda: _base(samples, steps))


def _base(samples: int, steps: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    x, y = collect("", samples, seed=1)
    torch.manual_seed(0)
    model = chain(8, WIDTH, WIDTH, 2)
    shift = torch.stack([x.mean(0), x.std(0)])
    fit(model, (x - shift[0]) / shift[1], y / y.std(0), steps)
    return model, shift, y.std(0)


def task(world: str, pool: int = 20_000, test: int = 4_000, **options: int) -> Task:
    """The base model and the world with other motors or sensors."""
    name = f"swap {world} {pool} {test} {sorted(options.items())}"
    return kept(name, lambda: _task(world, pool, test, **options))


def _task(world: str, pool: int, test: int, **options: int) -> Task:
    model, shift, scale = base(**options)
    found = []
    for seed, count in ((2, pool), (3, test)):
        x, y = collect(world, count, seed)
        found.append(((x - shift[0]) / shift[1], y / scale))
    told = torch.zeros(2, 8)
    told[:, VELOCITIES if world == "sensors" else TORQUES] = torch.tensor(AXES[world]).float()
    return Task(model, found[0], found[1], told, told)

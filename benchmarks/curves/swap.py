"""Machines of MuJoCo, a model of their next step, and what is exchanged: motors or sensors.

Gymnasium's "Reacher-v5" is an arm of two joints, "Swimmer-v5" three rods in water, "Pusher-v5" an
arm of seven joints, and "HalfCheetah-v5" runs on two legs of three joints. A model reads the
machine's state and its torques and predicts how the velocities change. The physics are MuJoCo's;
the exchange is imposed: the commanded torques, or the measured velocities, pass through curves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.curves.chain import Task, chain, fit
from benchmarks.curves.kept import kept
from benchmarks.lab.needs import need


class Machine(NamedTuple):
    """One of Gymnasium's.

    name: there. observed: what the model reads of the observation. velocities: those whose change
    it predicts. torques: how many. largest: of a torque.
    """

    name: str
    observed: tuple[int, ...]
    velocities: tuple[int, ...]
    torques: int
    largest: float = 1.0

    @property
    def width(self) -> int:
        """Of the model's input: what is observed, then the torques."""
        return len(self.observed) + self.torques


# Cosines, sines and velocities; the rest of the observation is the target's.
REACHER = Machine("Reacher-v5", (0, 1, 2, 3, 6, 7), (6, 7), 2)
SWIMMER = Machine("Swimmer-v5", tuple(range(8)), tuple(range(3, 8)), 2)
PUSHER = Machine("Pusher-v5", tuple(range(14)), tuple(range(7, 14)), 7, 2.0)
CHEETAH = Machine("HalfCheetah-v5", tuple(range(17)), tuple(range(8, 17)), 6)

EPISODE, DEAD, LARGEST, FASTEST = 50, 0.2, 0.4, 20.0
WIDTH, SAMPLES, STEPS = 128, 60_000, 20_000  # of the base model
VELOCITIES = [4, 5]  # of the inputs of Reacher's model
HALF = math.sqrt(0.5)
GEAR: Any = np.array([[HALF, HALF], [HALF, -HALF]])


def geared(torques: int, *joints: int) -> Any:
    """Axes (2, torques): sum and difference of two joints' torques."""
    return GEAR @ np.eye(torques)[list(joints)]


WORLDS = {  # the machine, and along what its world bends, of the torques or velocities
    "motors": (REACHER, np.eye(2)),
    "differential": (REACHER, GEAR),
    "sensors": (REACHER, np.eye(2)),
    "swimmer": (SWIMMER, GEAR),
    "pusher": (PUSHER, geared(7, 0, 3)),  # shoulder and elbow
    "cheetah": (CHEETAH, geared(6, 0, 3)),  # the thighs
}


def weak(torque: Any) -> Any:
    """A worn motor: nothing below DEAD, never more than LARGEST, of the largest torque."""
    return np.sign(torque) * np.clip(np.abs(torque) - DEAD, 0, LARGEST)


def compressed(velocity: Any) -> Any:
    """A sensor that reads large velocities as smaller, gamma 1/2, alike at FASTEST."""
    return np.sign(velocity) * np.sqrt(np.abs(velocity) * FASTEST)


def worn(torque: Any, axes: Any) -> Any:
    """Torques (n,), of which the parts along the axes (m, n) come from worn motors."""
    along = axes @ torque
    return axes.T @ weak(along) + (torque - axes.T @ along)


def collect(machine: Machine, world: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(inputs (count, width), changes of velocity (count, m)) of episodes with random torques.

    world: "" for the one that the base model knows. In "sensors" velocities are read by compressing
    sensors. In the others motors are worn, each of one joint, or behind a differential gear: there
    they drive sum and difference of two joints' torques.
    """
    need("mujoco")  # which Gymnasium imports by itself, but does not ask for
    body = need("gymnasium").make(machine.name)
    draw, axes = np.random.default_rng(seed), WORLDS.get(world, (machine, None))[1]
    observed, moving = list(machine.observed), list(machine.velocities)
    inputs, changes = [], []
    for start in range(0, count, EPISODE):
        seen, _ = body.reset(seed=seed * 1_000_000 + start)
        for _ in range(EPISODE):
            torque = draw.uniform(-1, 1, machine.torques)
            act = torque if world in ("", "sensors") else worn(torque, axes)
            after, *_ = body.step(act * machine.largest)
            read = seen[observed]
            if world == "sensors":
                read[VELOCITIES] = compressed(read[VELOCITIES])
            inputs.append(np.concatenate([read, torque]))
            changes.append(after[moving] - seen[moving])
            seen = after
    pair = (torch.tensor(np.array(found[:count])).float() for found in (inputs, changes))
    return next(pair), next(pair)


def base(
    machine: Machine, samples: int = SAMPLES, steps: int = STEPS
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(model, mean and deviation of its inputs, deviation of its outputs in the third place).

    All are of the world as it was; the model reads and writes units of deviations.
    """
    name = f"{machine.name} {samples} {steps}"
    return kept(name, lambda: _base(machine, samples, steps))


def _base(machine: Machine, samples: int, steps: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    x, y = collect(machine, "", samples, seed=1)
    torch.manual_seed(0)
    model = chain(machine.width, WIDTH, WIDTH, len(machine.velocities))
    shift = torch.stack([x.mean(0), x.std(0)])
    fit(model, (x - shift[0]) / shift[1], y / y.std(0), steps)
    return model, shift, y.std(0)


def task(world: str, pool: int = 20_000, test: int = 4_000, **options: int) -> Task:
    """The base model and the world with other motors or sensors."""
    name = f"swap {world} {pool} {test} {sorted(options.items())}"
    return kept(name, lambda: _task(world, pool, test, **options))


def _task(world: str, pool: int, test: int, **options: int) -> Task:
    machine, axes = WORLDS[world]
    model, shift, scale = base(machine, **options)
    found = []
    for seed, count in ((2, pool), (3, test)):
        x, y = collect(machine, world, count, seed)
        found.append(((x - shift[0]) / shift[1], y / scale))
    told = torch.zeros(len(axes), machine.width)
    places = VELOCITIES if world == "sensors" else range(len(machine.observed), machine.width)
    told[:, list(places)] = torch.tensor(axes).float()
    return Task(model, found[0], found[1], told, told)

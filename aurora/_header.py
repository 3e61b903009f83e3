"""What a file says of the adapters in it, and what of that does not fit a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aurora import core
from aurora._file import shown, strict_json

VERSION = 2
# What files of version 1, of release 0.1.0, leave unsaid.
_UNSAID = {"init": "paper", "projections": "trained"}

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Header:
    """The adapted layers: name -> (in_features, out_features, options); what else is in the file.

    `train` names the parameters that `train=` kept, and the persistent buffers beside them.
    """

    layers: dict[str, tuple[int, int, core.AuroraConfig]]
    train: list[str]
    version: int = VERSION

    @classmethod
    def of(cls, view: core.ModelView) -> Header:
        """What a file of this model says."""
        sizes = {n: (la.in_features, la.out_features, la.config) for n, la in view.layers.items()}
        return cls(sizes, list(kept(view)))

    def to_json(self) -> str:
        """The header as the file has it: the options once for all layers that share them."""
        configs = list(dict.fromkeys(config for *_, config in self.layers.values()))
        layers = {
            name: [n_in, n_out, configs.index(config)]
            for name, (n_in, n_out, config) in self.layers.items()
        }
        plain = [dataclasses.asdict(config) for config in configs]
        found = {"version": VERSION, "configs": plain, "layers": layers, "train": self.train}
        return json.dumps(found)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Read a header. ValueError for whatever `to_json` of a release would not write."""
        found = strict_json(text)
        if not isinstance(found, dict):
            raise ValueError("its description is no table")
        version = found.get("version")
        if type(version) is not int or version not in (1, VERSION):
            known = f"this release reads versions 1 to {VERSION}"
            raise ValueError(f"it has format version {shown(repr(version))}, {known}")
        if found.keys() != {"version", "configs", "layers", "train"}:
            raise ValueError("its description lacks a key, or has one too many")
        configs, layers, train = found["configs"], found["layers"], found["train"]
        if not isinstance(layers, dict) or not layers:
            raise ValueError("it names no layer")
        if not isinstance(configs, list) or not isinstance(train, list):
            raise ValueError("its description has no lists of options and names")
        if not all(isinstance(name, str) for name in train) or len(set(train)) < len(train):
            raise ValueError("its names of trained parameters are not names, or repeat")
        options = [_config(config, version) for config in configs]
        rows = {name: _layer(name, row, options) for name, row in layers.items()}
        return cls(rows, train, version)

    def adapter_shapes(self) -> Shapes:
        """The shapes of the adapters' tensors, by arithmetic: a hostile rank allocates nothing."""
        shapes: Shapes = {}
        for name, (n_in, n_out, c) in self.layers.items():
            own = {"A": (c.rank, n_in), "B": (n_out, c.rank)}
            if c.fixed:
                own["anl.H"] = (c.rank, c.rank)
            if c.learnable:
                own["anl.spline_weight"] = (c.rank, c.grid_size + c.spline_order)
            shapes |= {core.join(name, key): shape for key, shape in own.items()}
        return shapes

    def misfits(self, view: core.ModelView) -> list[str]:
        """What keeps a bare model from being injected as the header says."""
        first = first_names(view)
        problems = []
        for name, (n_in, n_out, _) in self.layers.items():
            module = view.modules.get(name)
            found = None if module is None else core.linear_features(module)
            if module is None:
                problem = "missing in the model"
                if isinstance(view.modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
                    problem += ": aurora.unfuse_attention(model) first"
            elif first[module] != name:
                problem = f"the same layer as {shown(first[module])} in the model"
            elif found is None:
                problem = "not a linear layer in the model"
            elif found != (n_in, n_out):
                problem = f"{n_in} -> {n_out} in the file, {found[0]} -> {found[1]} in the model"
            else:
                continue
            problems.append(f"{shown(name)}: {problem}")
        return problems

    def unlike(self, own: Header) -> list[str]:
        """What keeps an injected model, with the header `own`, from taking the file's values."""
        only = self.layers.keys() - own.layers.keys()
        problems = [f"{shown(name)}: adapted in the file only" for name in only]
        only = own.layers.keys() - self.layers.keys()
        problems += [f"{shown(name)}: adapted in the model only" for name in only]
        once = set(own.train) ^ set(self.train)
        problems += [f"{shown(name)}: trained in one of the two only" for name in once]
        for name in own.layers.keys() & self.layers.keys():
            ours, theirs = _described(own.layers[name]), _described(self.layers[name])
            different = differences(own.layers[name][2], self.layers[name][2])
            for key in ["in_features", "out_features", *different]:
                if ours[key] != theirs[key]:
                    both = f"{theirs[key]} in the file, {ours[key]} in the model"
                    problems.append(f"{shown(name)}: {key} {both}")
        return sorted(problems)


def kept(view: core.ModelView) -> dict[str, core.Owned]:
    """The parameters that `train=` kept, and the persistent buffers beside them, by name."""
    found = {n: owned for n, owned in view.parameters.items() if owned.key in owned.note.train}
    return found | {n: owned for n, owned in view.buffers.items() if owned.note.train}


def first_names(view: core.ModelView) -> dict[nn.Module, str]:
    """The name by which a file calls each module: of several, the first."""
    return {view.modules[name]: name for name in reversed(view.modules)}


def _config(found: Any, version: int) -> core.AuroraConfig:
    if version == 1:
        if not isinstance(found, dict) or found.keys() & _UNSAID.keys():
            raise ValueError("its options are not those of version 1")
        found = found | _UNSAID
    return options_from(found)


def _layer(
    name: str, row: Any, options: list[core.AuroraConfig]
) -> tuple[int, int, core.AuroraConfig]:
    if not isinstance(row, list) or len(row) != 3 or not all(type(n) is int for n in row):
        raise ValueError(f"{shown(name)}: its sizes cannot be read")
    n_in, n_out, index = row
    if n_in < 1 or n_out < 1 or not 0 <= index < len(options):
        raise ValueError(f"{shown(name)}: its sizes cannot be")
    return n_in, n_out, options[index]


def _described(layer: tuple[int, int, core.AuroraConfig]) -> Mapping[str, Any]:
    n_in, n_out, config = layer
    return {"in_features": n_in, "out_features": n_out, **dataclasses.asdict(config)}


def options_from(found: Any) -> core.AuroraConfig:
    """The options of `dataclasses.asdict`, after JSON. ValueError unless each is there."""
    names = {field.name for field in dataclasses.fields(core.AuroraConfig)}
    given = set(found) if isinstance(found, dict) else set()
    if given != names or found["alpha"] is None:
        odd = ", ".join(sorted(map(repr, given ^ names))) or "'alpha'"
        raise ValueError(f"every option must be given, and no other; see {odd:.200}")
    return core.AuroraConfig(**found)


def differences(a: core.AuroraConfig, b: core.AuroraConfig) -> list[str]:
    """The options by which the two compute different functions; the rest is for training."""
    names = [field.name for field in dataclasses.fields(a)]
    shared = [name for name in names if name not in ("dropout", "init", "projections")]
    return [name for name in shared if getattr(a, name) != getattr(b, name)]


def options_of(state: Any) -> core.AuroraConfig:
    """The options in what `ANL.get_extra_state` made. ValueError if they cannot be read."""
    if not isinstance(state, Tensor) or state.dim() != 1 or state.numel() > 10_000:
        raise ValueError("it does not hold the options of an adapter")
    try:  # an average of equal state dicts may have made floats of the bytes
        data = bytes(map(round, state.tolist()))
    except (TypeError, OverflowError) as error:
        raise ValueError("it does not hold the options of an adapter") from error
    return options_from(strict_json(data))

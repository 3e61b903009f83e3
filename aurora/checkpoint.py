"""An adapter in one file: the parameters that training moved, and what is needed to inject it into a fresh model.

The file is in the safetensors format: tensors under the names of `aurora.adapter_state_dict`, and in the metadata,
under "aurora", one JSON object: `version`, `configs` (each an AuroraConfig), `layers` (name: in_features, out_features,
index into `configs`) and `train` (names of the parameters that `train=` kept, and of the persistent buffers beside
them, such as a BatchNorm's running statistics). Nothing in it is ever executed, and nothing is written into the model
before all of it has been checked against the model and against itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aurora import core

VERSION = 1
_Shapes: TypeAlias = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the metadata says: layer name -> (in_features, out_features, config), and the kept parameters' names."""

    layers: dict[str, tuple[int, int, core.AuroraConfig]]
    train: list[str]

    def to_json(self) -> str:
        configs = list(dict.fromkeys(config for *_, config in self.layers.values()))
        layers = {
            name: [n_in, n_out, configs.index(config)]
            for name, (n_in, n_out, config) in self.layers.items()
        }
        plain = [dataclasses.asdict(config) for config in configs]
        return json.dumps(
            {"version": VERSION, "configs": plain, "layers": layers, "train": self.train}
        )

    @classmethod
    def from_json(cls, text: str) -> _Header:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise ValueError(
                f"it has format version {found['version']!r}, this release reads version {VERSION}"
            )
        configs = [
            core.AuroraConfig(**{**c, "grid_range": tuple(c["grid_range"])})
            for c in found["configs"]
        ]
        layers = {
            str(name): (n_in, n_out, configs[i])
            for name, (n_in, n_out, i) in found["layers"].items()
        }
        if not layers:
            raise ValueError("it names no layer")
        return cls(layers, [str(name) for name in found["train"]])

    @classmethod
    def of(cls, model: nn.Module) -> _Header:
        found = core.layers(model)
        layers = {
            name: (layer.in_features, layer.out_features, layer.config)
            for name, layer in found.items()
        }
        adapters = {
            core.join(name, key)
            for name, layer in found.items()
            for key in layer.adapter_parameters()
        }
        return cls(layers, [name for name in adapter_state_dict(model) if name not in adapters])

    def described(self, name: str) -> dict[str, Any]:
        """All that must agree for a layer's values to mean the same; dropout acts in training only."""
        n_in, n_out, config = self.layers[name]
        options = {
            key: value for key, value in dataclasses.asdict(config).items() if key != "dropout"
        }
        return {"in_features": n_in, "out_features": n_out, **options}

    def adapter_shapes(self) -> _Shapes:
        """The shapes the adapters' tensors must have; plain arithmetic, so that a hostile rank allocates nothing."""
        shapes: _Shapes = {}
        for name, (n_in, n_out, c) in self.layers.items():
            own = {"A": (c.rank, n_in), "B": (n_out, c.rank)}
            own |= {"anl.H": (c.rank, c.rank)} if c.fixed else {}
            own |= (
                {"anl.spline_weight": (c.rank, c.grid_size + c.spline_order)} if c.learnable else {}
            )
            shapes |= {core.join(name, key): shape for key, shape in own.items()}
        return shapes


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters, and the parameters that `train=` kept, to one safetensors file.

    Atomic: the bytes are written beside `path`, flushed to the disk and renamed, so that a crash leaves the old file or
    the new one. Sharded parameters (FSDP2) are gathered, so then every rank must call `save`; rank 0 writes.

    Raises ValueError if the model has no adapters or they are on the meta device, ImportError without safetensors.
    """
    safetensors = _safetensors()
    header = _Header.of(model)
    tensors = {
        name: _gathered(p).cpu().contiguous() for name, p in adapter_state_dict(model).items()
    }
    tensors = {
        name: tensor.clone() for name, tensor in tensors.items()
    }  # tied tensors may not share memory in a file
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_rank() > 0
    ):
        return
    _write_atomically(Path(path), safetensors.torch.save(tensors, {"aurora": header.to_json()}))


def load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put a saved adapter into `model`. A bare model is injected first; an injected one gets the values in place.

    In place means that parameters stay the same objects, so optimizers and compiled graphs stay valid. The layers,
    their widths and every option but dropout must then be the file's; to change the rank, `aurora.remove(model)` first.

    Raises FileNotFoundError; ValueError, with the model as it was, for a file that is damaged, of another version, or
    no adapter, and for missing, unexpected or misshapen layers, which it lists; ImportError without safetensors.
    """
    header, tensors = _read(Path(path))
    view = core.ModelView.of(model)
    adapted = bool(view.layers)
    problems = _differences(_Header.of(model), header) if adapted else _misfits(model, header)
    base = {n: owned.tensor for n, owned in (view.buffers | view.parameters).items()}
    problems += _wrong_shapes(
        base, header, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    )
    problems += _wrong_dtypes(base, tensors)
    if problems:
        raise ValueError(
            f"{path} does not fit this model, nothing was loaded:\n  " + "\n  ".join(problems)
        )
    if adapted:
        _fill(model, tensors)
        return
    try:
        for config in dict.fromkeys(config for *_, config in header.layers.values()):
            names = (name for name, (*_, its) in header.layers.items() if its == config)
            core.inject(
                model,
                _exactly(names),
                config,
                train=_exactly(header.train) if header.train else None,
            )
        _fill(model, tensors)
    except Exception:
        with contextlib.suppress(ValueError):  # nothing was injected yet
            core.remove(model)
        raise


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `core.trained_parameters`, detached and sharing memory with the model, as `state_dict` does.

    With them the persistent buffers of what `train=` kept, such as a BatchNorm's running statistics.
    """
    view = core.ModelView.adapted(model)
    buffers = {n: owned.tensor for n, owned in view.buffers.items() if owned.note.train}
    return {name: tensor.detach() for name, tensor in (view.adapter() | buffers).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's, in place: optimizers and compiled graphs stay valid. ValueError if any misfits."""
    own = adapter_state_dict(model)
    wanted, given = (
        {n: "meta" if t.is_meta else f"{tuple(t.shape)}" for n, t in x.items()}
        for x in (own, state)
    )
    wrong = [name for name in sorted(wanted | given) if wanted.get(name) != given.get(name)]
    if wrong:
        lines = (
            f"\n  {n}: given {given.get(n, 'nothing')}, the model has {wanted.get(n, 'nothing')}"
            for n in wrong
        )
        raise ValueError("the adapter does not fit the model, nothing was loaded:" + "".join(lines))
    for name, p in own.items():
        p.copy_(state[name])


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'aurora.save and aurora.load need safetensors: pip install "aurora-adapters[save]"'
        ) from error
    return safetensors


def _gathered(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            "the adapters are on the meta device and hold no values; materialise the model first"
        )
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _write_atomically(path: Path, data: bytes) -> None:
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp's 0600 would surprise whoever shares the file
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    with contextlib.suppress(
        OSError
    ):  # some systems cannot open a folder; there the rename alone has to do
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or a damaged one: {error}") from error
    if "aurora" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not one that aurora.save wrote")
    try:
        return _Header.from_json(metadata["aurora"]), tensors
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{path} cannot be read as an adapter: {error!r}") from error


def _misfits(model: nn.Module, header: _Header) -> list[str]:
    """What keeps a bare model from being injected as the header says."""
    modules = core.ModelView.of(model).modules
    first = {modules[name]: name for name in reversed(modules)}  # the first of several names wins
    problems = []
    for name, (n_in, n_out, _) in header.layers.items():
        found = core.linear_features(modules[name]) if name in modules else None
        if name in modules and first[modules[name]] != name:
            problems.append(f"{name}: the same layer as {first[modules[name]]} in the model")
        elif found is None:
            problems.append(
                f"{name}: {'not a linear layer' if name in modules else 'missing'} in the model"
            )
        elif found != (n_in, n_out):
            problems.append(
                f"{name}: {n_in} -> {n_out} in the file, {found[0]} -> {found[1]} in the model"
            )
    return problems


def _differences(own: _Header, header: _Header) -> list[str]:
    """What keeps a model that is injected already from taking the file's values in place."""
    problems = [
        f"{name}: adapted in the file only" for name in header.layers.keys() - own.layers.keys()
    ]
    problems += [
        f"{name}: adapted in the model only" for name in own.layers.keys() - header.layers.keys()
    ]
    problems += [
        f"{name}: trained in one of the two only" for name in set(own.train) ^ set(header.train)
    ]
    for name in own.layers.keys() & header.layers.keys():
        ours, theirs = own.described(name), header.described(name)
        unlike = (key for key in ours if ours[key] != theirs[key])
        problems += [
            f"{name}: {key} {theirs[key]} in the file, {ours[key]} in the model" for key in unlike
        ]
    way_out = ["aurora.remove(model) first, to load into the bare model"] if problems else []
    return sorted(problems) + way_out


def _wrong_shapes(base: Mapping[str, Tensor], header: _Header, given: _Shapes) -> list[str]:
    wanted = header.adapter_shapes() | {
        name: tuple(base[name].shape) for name in header.train if name in base
    }
    problems = [
        f"{name}: trained in the file, missing in the model"
        for name in header.train
        if name not in base
    ]
    for name in sorted((wanted | given).keys() - (set(header.train) - base.keys())):
        if wanted.get(name) != given.get(name):
            problems.append(
                f"{name}: shape {given.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}"
            )
    return problems


def _wrong_dtypes(base: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What copying would cast without a word: only floating point goes into floating point."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    wrong = (
        n
        for n, t in given.items()
        if t.dtype not in floats and (n not in base or t.dtype != base[n].dtype)
    )
    return [f"{name}: {given[name].dtype} cannot be an adapter's" for name in wrong]


def _exactly(names: Iterable[str]) -> str:
    """A regex that matches these names and no other."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own: dict[str, Any] = adapter_state_dict(model)
    state: dict[str, Any] = dict(tensors)
    for (
        name,
        p,
    ) in own.items():  # in the same order on every rank, as sharding is a collective operation
        if name in tensors and hasattr(
            p, "placements"
        ):  # FSDP2, tensor parallelism; public since torch 2.5
            from torch.distributed.tensor import distribute_tensor

            state[name] = distribute_tensor(tensors[name], p.device_mesh, p.placements)
    load_adapter_state_dict(model, state)

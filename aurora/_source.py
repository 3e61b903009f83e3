"""Finding an adapter: in a file of ours, or in a full checkpoint, beside the base's tensors."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from aurora import core
from aurora._file import (
    Contents,
    Entry,
    digest_holds,
    read_header,
    read_tensor,
    shown,
    strict_json,
)
from aurora._header import Header, first_names, kept, options_of

FILE = "aurora_adapter.safetensors"
_WHOLE = ("model", "diffusion_pytorch_model")
_KEYS = ("A", "B", "anl.H", "anl.spline_weight")
_OPTIONS = "anl._extra_state"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Source(NamedTuple):
    """An adapter as it was found, under the model's names."""

    path: Path
    header: Header
    tensors: dict[str, Tensor]
    left: tuple[str, ...]  # layers of a full checkpoint that the model does not have


def read(path: Path, view: core.ModelView) -> Source:
    """Find and read an adapter for a model. ValueError, FileNotFoundError."""
    files = _files(path)
    if len(files) == 1:
        with _opened(files[0]) as (file, contents):
            if "aurora" in contents.metadata:
                return _own(files[0], file)
    with _blame(path):
        return _from_checkpoint(path, _Checkpoint(files), view)


@contextlib.contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Say of which file an error speaks."""
    try:
        yield
    except ValueError as error:
        reason = str(error)
        reason = reason if len(reason) < 2_000 else reason[:2_000] + "..."
        raise ValueError(f"{shown(path)} cannot be read as an adapter: {reason}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Contents]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {shown(path)}")
    with open(path, "rb") as file:
        try:
            contents = read_header(file)
        except ValueError as error:
            reason = f"is not a safetensors file, or a damaged one: {error}"
            raise ValueError(f"{shown(path)} {reason}") from error
        yield file, contents


def _own(path: Path, file: BinaryIO) -> Source:
    """Read a file that `aurora.save` wrote. Those of version 1 have no digest."""
    with _blame(path):
        file.seek(0)
        data = file.read()  # once, so that what is checked is what is read
        file, holds = io.BytesIO(data), digest_holds(data)
        contents = read_header(file)
        if holds is False:
            raise ValueError("it was damaged or changed since it was saved: its digest is another")
        header = Header.from_json(contents.metadata["aurora"])
        if holds is None and (header.version > 1 or "sha256" in contents.metadata):
            raise ValueError("its digest is missing: another program has written it")
        tensors = {name: read_tensor(file, entry) for name, entry in contents.entries.items()}
        return Source(path, header, tensors, ())


# ---- Folders --------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """The files to read for a path: itself, or what a folder or an index names."""
    if path.name.endswith(".safetensors.index.json"):
        return _shards(path)
    if not path.is_dir():
        return [path]
    whole = [path / f"{stem}.safetensors" for stem in _WHOLE]
    for found in (path / FILE, *whole):
        if found.is_file():
            return [found]
        index = found.with_name(f"{found.name}.index.json")
        if index.is_file():
            return _shards(index)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise ValueError(f"{shown(path)} has several safetensors files: name one of them")
    for pattern, way in _PICKLED.items():
        if any(path.glob(pattern)):
            raise ValueError(f"{shown(path)} has only pickles, which are never executed: {way}")
    raise FileNotFoundError(f"there is neither {FILE} nor a checkpoint in {shown(path)}")


_PICKLED = {
    "*.bin": "save the model again with safe_serialization=True, or inject, then load_state_dict",
    "*.pt*": "inject with the same options, then load_state_dict",
    "*.distcp": "inject with the same options, then torch.distributed.checkpoint.load",
}


def _shards(index: Path) -> list[Path]:
    """The files of a checkpoint that is spread over several."""
    with _blame(index):
        found = strict_json(index.read_bytes())
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or not names:
            raise ValueError("it maps no tensors to files")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"it names a file outside of its folder, {shown(repr(name))}")
        return [index.with_name(name) for name in sorted(set(names.values()))]


# ---- Full checkpoints -----------------------------------------------------------------------


class _Checkpoint:
    """The tensors of a checkpoint, under the names without wrappers, read when asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.places: dict[str, tuple[Path, Entry]] = {}
        for path in files:
            with _opened(path) as (_, contents):
                for name, entry in contents.entries.items():
                    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
                    if name in self.places:
                        raise ValueError(f"{shown(name)} stands there twice")
                    self.places[name] = (path, entry)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        path, entry = self.places[name]
        with open(path, "rb") as file:
            return read_tensor(file, entry)

    def layers(self) -> dict[str, tuple[int, int, core.AuroraConfig]]:
        """The adapted layers, as a `Header` has them."""
        found = {}
        for name in self.places:
            if name == _OPTIONS or name.endswith(f".{_OPTIONS}"):
                layer = name.removesuffix(_OPTIONS).removesuffix(".")
                A, B = (self.places.get(core.join(layer, key)) for key in ("A", "B"))
                if A is None or B is None or len(A[1].shape) != 2 or len(B[1].shape) != 2:
                    raise ValueError(f"{shown(layer)}: it has options, but no A and B")
                config = options_of(self.read(name))
                found[layer] = (A[1].shape[1], B[1].shape[0], config)
        if not found and any(name.endswith("anl.spline_weight") for name in self.places):
            way = "inject with the options they were trained with, then model.load_state_dict"
            raise ValueError(f"its adapters do not say their options, as in release 0.1.0: {way}")
        if not found:
            raise ValueError("aurora.save did not write it, nor has it a state dict's adapters")
        return found


class _Move(NamedTuple):
    """Where the names of a checkpoint are in the model: `cut` is taken off, `prefix` put before."""

    cut: str
    prefix: str

    def __call__(self, name: str) -> str:
        return core.join(self.prefix, name.removeprefix(self.cut))

    def back(self, name: str) -> str:
        """The other way; the empty name for what lies outside of the part."""
        before = f"{self.prefix}." if self.prefix else ""
        return self.cut + name.removeprefix(before) if name.startswith(before) else ""


def _move(names: list[str], view: core.ModelView) -> _Move:
    """As they are, if any name is the model's; else the one move under which most of them are.

    That is into a part of the model, such as "0.model", or out of what the checkpoint had around
    it, such as "bert". ValueError if most fit nowhere, or at several places.
    """
    if any(name in view.modules for name in names):
        return _Move("", "")
    head = names[0].split(".")[0] + "."
    first, places = first_names(view), dict[tuple[str, ...], _Move]()
    for move in [*(_Move("", prefix) for prefix in view.modules if prefix), _Move(head, "")]:
        moved = [move(name) for name in names]
        there = [first[view.modules[name]] for name in moved if name in view.modules]
        if 2 * len(there) > len(names):
            places.setdefault(tuple(there), move)
    most = max(map(len, places), default=0)
    best = [move for there, move in places.items() if len(there) == most]
    if not best:
        raise ValueError(f"its layers are not in the model, such as {shown(names[0])}")
    if len(best) > 1:
        parts = ", ".join(shown(move.prefix or "the whole") for move in best)
        raise ValueError(f"it fits several parts of the model; load into one of: {parts}")
    return best[0]


def _from_checkpoint(path: Path, checkpoint: _Checkpoint, view: core.ModelView) -> Source:
    """The adapter in a full checkpoint, under the model's names, and what the model lacks.

    What `train=` kept is the base's to a checkpoint, and is read only if the model keeps it too.
    """
    found = checkpoint.layers()
    move, first = _move(list(found), view), first_names(view)
    layers = dict[str, tuple[int, int, core.AuroraConfig]]()
    tensors = dict[str, Tensor]()
    for name, row in found.items():
        if move(name) not in view.modules:
            continue
        to = first[view.modules[move(name)]]
        same = layers.setdefault(to, row) == row
        for key in (key for key in _KEYS if core.join(name, key) in checkpoint.places):
            tensor, label = checkpoint.read(core.join(name, key)), core.join(to, key)
            known = tensors.setdefault(label, tensor)
            same = same and (known is tensor or torch.equal(known, tensor))
        if not same:
            raise ValueError(f"{shown(to)}: one layer in the model, two in the checkpoint")
    train = list(kept(view)) if view.layers else []
    for name in train:
        if there := _stored(name, move, checkpoint, view):
            tensors[name] = checkpoint.read(there)
    left = tuple(name for name in found if move(name) not in view.modules)
    return Source(path, Header(layers, train), tensors, left)


def _stored(name: str, move: _Move, checkpoint: _Checkpoint, view: core.ModelView) -> str | None:
    """The name by which the checkpoint has a tensor, if it has it; of tied ones it has only one."""
    tensors = view.parameters | view.buffers
    same = [n for n, owned in tensors.items() if owned.tensor is tensors[name].tensor]
    return next((n for n in map(move.back, [name, *same]) if n in checkpoint.places), None)

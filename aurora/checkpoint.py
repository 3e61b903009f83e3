"""An adapter in one file, and beside the base in a full checkpoint.

    aurora.save(model, "adapter.safetensors")     # or a folder
    print(aurora.load(fresh_model, "adapter.safetensors"))

The file is in the safetensors format: tensors under the names of `aurora.adapter_state_dict`, and
in the metadata "sha256", a digest of every byte, and "aurora", one JSON object: `version`,
`configs` (each an AuroraConfig), `layers` (name: in_features, out_features, index into `configs`)
and `train` (what `train=` kept, and the persistent buffers beside it, such as a BatchNorm's running
statistics). Nothing in it is ever executed, and nothing is written into the model before all of it
has been checked, against itself and against the model.

A full checkpoint is what `model.save_pretrained(folder)`, a Trainer or `SentenceTransformer.save`
make of an injected model. Its state dict has the base under the base's names, so that
`from_pretrained(folder)` gives the base, and beside each adapter its options, as the extra state
of `ANL`, so that `aurora.load(base, folder)` gives the adapted model.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from aurora import _source, adapters, core
from aurora._file import encode, shown, write_atomically
from aurora._header import Header, Shapes

_MOST = 20  # problems that a message lists
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` has done. Prints as a sentence or two.

    Attributes:
        path: The file or folder.
        layers: The adapted layers that got their values, by name.
        train: The other parameters and buffers that got theirs.
        left: Adapted layers of a full checkpoint that the model does not have.
        merged: Layers that have an adapter merged into their weight already.
    """

    path: Path
    layers: tuple[str, ...]
    train: tuple[str, ...]
    left: tuple[str, ...]
    merged: tuple[str, ...]

    def __str__(self) -> str:
        also = f" and {len(self.train)} other tensors" if self.train else ""
        lines = [f"loaded {len(self.layers)} adapted layers{also} from {shown(self.path)}"]
        lines += _listed("left in the checkpoint, not in the model:", map(shown, self.left))
        lines += _listed("on top of weights that were merged before:", map(shown, self.merged))
        return "\n".join(lines)


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Write the adapters, and the parameters that `train=` kept, to one safetensors file.

    Atomic: a crash leaves the old file or the new one. An existing file keeps its mode and group,
    and a symbolic link is followed. Nothing but PyTorch is needed. Parameters that FSDP2 has
    sharded are gathered, so that every rank must call `save`; rank 0 writes. Projections that are
    fixed are saved with the rest, in full: a file does not depend on a random generator.

    Args:
        model: A model with adapters.
        path: The file; or a folder, which is an existing one or ends in "/", for
            "aurora_adapter.safetensors" in it.
        name: Which adapter, of several; None for the one in use.

    Raises:
        ValueError: If the model has no adapters, or none of that name; if they are on the meta
            device, in FSDP1's flat shards, or not finite, which `load` would refuse; if the path
            is a FIFO or a device.
        OSError: If the file cannot be written. The old file is then as it was.
    """
    if name is not None:
        model = adapters.with_adapter(model, name)
    view = core.ModelView.adapted(model)
    _refuse_flat(view)
    header = Header.of(view)
    tensors = {name: _gathered(p) for name, p in adapter_state_dict(model).items()}
    floats = [name for name in view.adapter() if tensors[name].dtype in _FLOATS]
    broken = [shown(name) for name in floats if not tensors[name].isfinite().all()]
    if broken:
        raise ValueError("\n".join(_listed("NaN or infinity, nothing was saved:", broken)))
    if _rank() == 0:
        data = encode(tensors, {"aurora": header.to_json()})
        write_atomically(_target(path), data)


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> Loaded:
    """Put a saved adapter into a model: all of it, or, on an error or an interrupt, nothing.

    A bare model is injected first. One that is injected gets the values in place: parameters stay
    the same objects, so that optimizers and compiled graphs stay valid. Its layers and their
    options must then be the file's, except for those that matter in training only (dropout, init,
    projections); to change the rank, `aurora.remove(model)` first.

    Of a full checkpoint only the adapter is read, and what the injected model keeps by `train=`:
    the base, with heads as they were trained, comes from `from_pretrained`. Layers that the model
    does not have are left, and listed in what is returned. The names may also be those of a part
    of the model: a checkpoint of the encoder loads into a SentenceTransformer around it.

    With a name, the adapter joins those that the model has, whatever their layers and options, and
    waits there for `set_adapter` or `use`; it is in use if it is the first. What `train=` kept
    of it is its own too.

    A model whose weights an adapter was merged into, in this process, gets the new one on top,
    which is right only if that was trained so: a warning says it, and the report.

    Args:
        model: The model that was injected, bare or injected.
        path: A file that `save` wrote; a folder with one; a full checkpoint in safetensors, whole
            or in shards, or its folder.
        name: A new name, without dots; None to load into the adapter in use.

    Returns:
        What was loaded, and what was left. It prints as a sentence or two.

    Raises:
        FileNotFoundError: If there is no such file, or none in the folder.
        ValueError: With the model as it was: for a file that is damaged, of another version, or
            no adapter; for missing, unexpected or misshapen layers, which it lists; for values
            that are not finite, or not in the model's dtype; for a name that is taken or cannot
            be.
    """
    if name is None:
        return _load(model, path)
    return adapters.beside(model, name, lambda bare: _load(bare, path, adapters.own_kept))


def _load(
    model: nn.Module,
    path: str | os.PathLike[str],
    injected: Callable[[nn.Module], None] | None = None,
) -> Loaded:
    view = core.ModelView.of(model)
    _refuse_flat(view)
    path, header, tensors, left = _source.read(Path(path), view)
    base = {name: owned.tensor for name, owned in (view.buffers | view.parameters).items()}
    problems = header.unlike(Header.of(view)) if view.layers else header.misfits(view)
    if view.layers and problems:
        problems.append("aurora.remove(model) first, to load into the bare model")
    problems += _wrong_shapes(base, header, {n: tuple(t.shape) for n, t in tensors.items()})
    title = f"{shown(path)} does not fit this model, nothing was loaded:"
    if problems:
        raise ValueError("\n".join(_listed(title, problems)))
    merged = tuple(name for name in header.layers if _is_merged(view.modules[name]))
    if merged:
        what = "their weights have an adapter merged into them; this one adds to it"
        warnings.warn("\n".join(_listed(f"{what}:", map(shown, merged))), stacklevel=3)
    written = adapter_state_dict(model) if view.layers else {n: base[n] for n in header.train}
    with core.unchanged_on_error(model, written.values()):
        if not view.layers:
            _inject_as(model, header)
            if injected is not None:
                injected(model)
        _fill(model, tensors, title)
    return Loaded(path, tuple(header.layers), tuple(header.train), left, merged)


def _is_merged(layer: nn.Module) -> bool:
    """Whether a merge made the layer's weight, and nothing has changed it since."""
    weight = layer._parameters.get("weight")
    return weight is not None and getattr(weight, "_aurora_merged", None) == core.version(weight)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors and what `train=` kept, detached; memory is shared with the model.

    With them come the persistent buffers of what `train=` kept, such as a BatchNorm's running
    statistics.

    Args:
        model: A model with adapters.

    Raises:
        ValueError: If the model has no adapters, or FSDP1 keeps them in flat shards.
    """
    view = core.ModelView.adapted(model)
    _refuse_flat(view)
    buffers = {n: owned.tensor for n, owned in view.buffers.items() if owned.note.train}
    return {name: tensor.detach() for name, tensor in (view.adapter() | buffers).items()}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's, in place and all or nothing: optimizers stay valid.

    Args:
        model: A model with adapters.
        state: What `adapter_state_dict` of an equal model gave, on any device.

    Raises:
        ValueError: With the model as it was, for missing, unexpected and misshapen tensors, which
            it lists, and for values that are not finite in the model's dtype.
    """
    own = adapter_state_dict(model)
    has, given = _described(own), _described(state)
    problems = [
        f"{shown(n)}: given {given.get(n, 'nothing')}, the model has {has.get(n, 'nothing')}"
        for n in sorted(has | given)
        if has.get(n) != given.get(n)
    ]
    title = "the adapter does not fit the model, nothing was loaded:"
    if problems:
        raise ValueError("\n".join(_listed(title, problems)))
    with core.unchanged_on_error(model, own.values()):
        _fill(model, state, title)


# ---- Checks ---------------------------------------------------------------------------------


def _listed(title: str, lines: Iterable[str]) -> list[str]:
    """A title and the lines under it, the first twenty; nothing if there are none."""
    found = list(lines)
    more = [f"  and {len(found) - _MOST} more"] if len(found) > _MOST else []
    return [title, *(f"  {line:.500}" for line in found[:_MOST]), *more] if found else []


def _described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {n: "meta" if t.is_meta else f"{tuple(t.shape)}" for n, t in tensors.items()}


def _refuse_flat(view: core.ModelView) -> None:
    """FSDP1 keeps a flat piece of every parameter on each rank."""
    if any(layer.A.dim() != 2 for layer in view.layers.values()):
        raise ValueError(
            "FullyShardedDataParallel keeps the adapters in flat shards: on every rank, call this "
            "inside `with FullyShardedDataParallel.summon_full_params(model):`, or use fully_shard"
        )


def _wrong_shapes(base: Mapping[str, Tensor], header: Header, given: Shapes) -> list[str]:
    absent = [name for name in header.train if name not in base]
    problems = [f"{shown(name)}: trained in the file, missing in the model" for name in absent]
    wanted = header.adapter_shapes()
    wanted |= {name: tuple(base[name].shape) for name in header.train if name in base}
    for name in sorted((wanted | given).keys() - set(absent)):
        if wanted.get(name) != given.get(name):
            there, here = given.get(name, "missing"), wanted.get(name, "no such tensor")
            problems.append(f"{shown(name)}: shape {there}, expected {here}")
    return problems


def _wrong_values(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], buffers: Container[str]
) -> list[str]:
    """What copying would cast without a word, and what is not finite in the model's dtype."""
    problems = []
    for name, like in own.items():
        tensor, dtype = given[name], like.dtype
        if tensor.dtype not in _FLOATS or dtype not in _FLOATS:
            if tensor.dtype != dtype:
                problems.append(f"{shown(name)}: {tensor.dtype} cannot become {dtype}")
        elif not tensor.isfinite().all():
            # A mask may hold infinity, as the one that the model has.
            if name not in buffers or not _as_wide(like, tensor):
                problems.append(f"{shown(name)}: NaN or infinity")
        elif not tensor.to(dtype).isfinite().all():
            problems.append(f"{shown(name)}: too large for the model's {dtype}")
    return problems


def _as_wide(own: Tensor, given: Tensor) -> bool:
    """Whether a buffer is infinite or NaN at no more places than the model's own."""
    return bool((given.isfinite() | ~own.to(given.device).isfinite()).all())


# ---- Writing --------------------------------------------------------------------------------


def _gathered(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            "the adapters are on the meta device and hold no values; materialise the model first"
        )
    whole: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return cast(Tensor, whole.cpu())


def _rank() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if there else 0


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to write for a path, whose folder is made if the path says that it is one."""
    text = os.fspath(path)
    if text.endswith(("/", os.sep)):
        Path(text).mkdir(parents=True, exist_ok=True)
    return Path(text) / _source.FILE if Path(text).is_dir() else Path(text)


def _inject_as(model: nn.Module, header: Header) -> None:
    """Inject a bare model as a header says, which has been found to fit."""
    train = None
    if header.train:
        train = rf"\A(?:{'|'.join(map(re.escape, header.train))})\Z"
    for config in dict.fromkeys(config for *_, config in header.layers.values()):
        names = {name for name, (*_, its) in header.layers.items() if its == config}
        core.inject(model, _among(names), config, train=train)


def _among(names: set[str]) -> core.Target:
    return lambda name, module: name in names


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor], title: str) -> None:
    """Check the values and copy them into the model, whose names and shapes are those of `state`.

    On an error the caller puts back what was written.
    """
    own = adapter_state_dict(model)
    problems = _wrong_values(own, state, core.ModelView.of(model).buffers)
    problems += [
        f"{shown(n)}: on the meta device in the model" for n, p in own.items() if p.is_meta
    ]
    if problems:
        raise ValueError("\n".join(_listed(title, problems)))
    for name, p in own.items():  # in the same order on every rank, as sharding is collective
        tensor: Any = state[name]
        if hasattr(p, "placements") and not hasattr(tensor, "placements"):
            tensor = _distributed(tensor, p)
        p.copy_(tensor)


def _distributed(tensor: Tensor, like: Any) -> Tensor:
    """A tensor in shards, as FSDP2 or tensor parallelism keeps the model's."""
    distributed: Any
    try:
        from torch.distributed import tensor as distributed
    except ImportError:  # PyTorch 2.4
        from torch.distributed import _tensor as distributed
    mesh, placements = like.device_mesh, like.placements
    return cast(Tensor, distributed.distribute_tensor(tensor.to(like.device), mesh, placements))

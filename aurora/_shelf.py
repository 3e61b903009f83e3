"""What named adapters have on a module, and how one of them is put into it; see adapters.py.

The adapter in use is in the module's own tables, as an only one is. The others are in its child
"aurora", a shelf, each under its name; so are, as "__base__", the module's own tensors in whose
place the one in use has others, by `train=`. These names are part of state dicts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from aurora import core

KEY, BASE = "aurora", "__base__"


class Part(nn.Module):
    """What an adapter has on one module, under the keys by which the module has it."""

    def __init__(
        self, parameters: Any = (), buffers: Any = (), anl: Any = (), kept: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self._parameters.update(parameters)
        self._buffers.update(buffers)
        self._modules.update(anl)
        self.kept = frozenset(kept)  # which of the parameters `train=` kept
        self.required = {key: p.requires_grad for key, p in self.tensors().items()}

    @classmethod
    def of(cls, module: nn.Module) -> Part:
        """What the adapter in use has on a module; an empty part if it has nothing there."""
        kept = core.Note.of(module).train
        adapted = isinstance(module, core.AuroraLinear)
        keys = kept | {"A", "B"} if adapted else kept
        saved = module._buffers.keys() - module._non_persistent_buffers_set if kept else ()
        return cls(
            {key: p for key, p in module._parameters.items() if key in keys},
            {key: b for key, b in module._buffers.items() if key in saved and b is not None},
            {"anl": module.anl} if adapted else {},
            kept,
        )

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters, by name."""
        own = list(self._parameters.items())
        for anl in self._modules.values():
            own += anl._parameters.items() if anl is not None else ()
        return {key: p for key, p in own if p is not None}

    def without_adapter(self) -> Part:
        """What `train=` kept, and the buffers beside it."""
        kept = {key: p for key, p in self._parameters.items() if key in self.kept}
        return Part(kept, self._buffers, {}, self.kept)

    def completed(self, other: Part, copies: dict[int, Any]) -> Part:
        """With a copy of what only the other has; tied tensors stay tied."""
        if not other._parameters:
            return self
        pairs: list[tuple[Any, Any]] = [
            (self._parameters, other._parameters),
            (self._buffers, other._buffers),
        ]
        tables: list[Any] = []
        for ours, theirs in pairs:
            missing = {key: t for key, t in theirs.items() if key not in ours}
            copied = {key: copy.deepcopy(t, copies) for key, t in missing.items()}
            tables.append({**ours, **copied})
        return Part(*tables)


class Switched(core.Exchanged):
    """A module with a shelf that is no AuroraLinear: a head, or a layer not adapted at present."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes, or what runs in its place."""
        instead = core._OFF.instead.get(id(self)) if core._OPEN else None
        return (super().forward if instead is None else instead)(*args, **kwargs)


def plain_class(module: nn.Module) -> Any:
    """The class that a module had before it was adapted."""
    return module.original if isinstance(module, core.Exchanged) else type(module)


def switchable(model: nn.Module) -> list[nn.Module]:
    """The modules that a block can switch: adapted layers, and what has a shelf."""
    return [m for m in model.modules() if isinstance(m, core.Exchanged)]


def waiting(module: nn.Module) -> dict[str, Part]:
    """What adapters that are not in use have on a module, and, as "__base__", what it lacks."""
    shelf = module._modules.get(KEY)
    return cast(Any, dict(shelf._modules)) if isinstance(shelf, core.Shelf) else {}


def adapter(holder: nn.Module) -> list[tuple[Any, Any, Any]]:
    """A, B and the ANL that a layer or a part has; nothing if it has none."""
    if not isinstance(holder, core.AuroraLinear) and "anl" not in holder._modules:
        return []
    return [(holder._parameters["A"], holder._parameters["B"], holder._modules["anl"])]


@dataclasses.dataclass
class Wardrobe:
    """A module's own tensors and children, and by name what adapters have on it."""

    module: nn.Module
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    children: dict[str, Any]
    parts: dict[str, Part]

    @classmethod
    def of(cls, module: nn.Module, current: str, copies: dict[int, Any] | None = None) -> Wardrobe:
        """Sort what a module has, with the name of the adapter in use.

        That of an `inject` has trained the module's own head in place. With `copies` the module
        gets one of its own again, which starts there.
        """
        worn, parts = Part.of(module), waiting(module)
        base = parts.pop(BASE, Part())
        if copies is not None:
            base = base.completed(worn.without_adapter(), copies)
        foreign = {"A", "B"} if worn._modules else set()
        own = {key: p for key, p in module._parameters.items() if key not in foreign}
        foreign |= {KEY} if base._parameters or parts else set()
        foreign |= worn._modules.keys()
        children = {key: m for key, m in module._modules.items() if key not in foreign}
        parts = ({current: worn} if worn._parameters else {}) | parts
        return cls(module, own | base._parameters, module._buffers | base._buffers, children, parts)

    def view(self, part: Part) -> nn.Module:
        """The module as it would be with an adapter's part: another object, nothing moves."""
        plain = plain_class(self.module)
        cls = core.exchanged(core.AuroraLinear, plain) if part._modules else plain
        view: nn.Module = object.__new__(cls)
        view.__dict__.update(self.module.__dict__)
        view._parameters = self.parameters | part._parameters
        view._buffers = self.buffers | part._buffers
        view._modules = self.children | part._modules
        view.__dict__.pop("_aurora", None)
        if part.kept:
            view.__dict__["_aurora"] = core.Note.of(self.module)._replace(train=part.kept)
        return view

    def dress(self, name: str) -> None:
        """Put an adapter into the module, and on its shelf the others and what it displaces.

        Tables are replaced, not changed, as another thread may be reading them.
        """
        worn, module = self.parts.get(name, Part()), self.module
        aside = {other: part for other, part in self.parts.items() if part is not worn}
        displaced = Part(
            {key: p for key, p in self.parameters.items() if key in worn._parameters},
            {key: b for key, b in self.buffers.items() if key in worn._buffers},
        )
        if displaced._parameters:
            aside[BASE] = displaced.requires_grad_(False)
        for part in self.parts.values():
            for key, p in part.tensors().items():
                p.requires_grad_(part is worn and part.required[key])
        cls = self._class(worn, aside)
        table = module.__dict__
        table["_parameters"] = self.parameters | worn._parameters
        table["_buffers"] = self.buffers | worn._buffers
        table["_modules"] = self.children | worn._modules | _shelf(aside)
        table["_aurora"] = core.Note.of(module)._replace(train=worn.kept)
        for anl in worn._modules.values():
            cast(core.ANL, anl).train(module.training)
        module.__class__ = cls

    def _class(self, worn: Part, aside: Mapping[str, Part]) -> Any:
        """The class to take. ValueError if the module cannot change its class."""
        module, plain = self.module, plain_class(self.module)
        kinds = [plain, *(core.exchanged(kind, plain) for kind in (Switched, core.AuroraLinear))]
        cls = kinds[2] if worn._modules else kinds[bool(aside)]
        if cls is not type(module):
            told = "so that adapters cannot be switched on it; name them before"
            if type(module) not in kinds:
                raise ValueError(f"a {type(module).__name__} got another class, {told}")
            if "forward" in module.__dict__:
                raise ValueError(f"a {plain.__name__}'s forward was replaced on the object, {told}")
        return cls


def _shelf(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    shelf = core.Shelf()
    shelf._modules.update(parts)
    return {KEY: shelf} if parts else {}


class Shadow:
    """Another tree of modules over a model's tensors, with an adapter in it, or with none."""

    def __init__(self, wardrobes: Mapping[nn.Module, Wardrobe], name: str | None) -> None:
        self.wardrobes, self.name = wardrobes, name
        self.made: dict[nn.Module, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """A module's counterpart."""
        if isinstance(module, torch.jit.ScriptModule):  # which nobody can change
            return module
        if module not in self.made:
            wardrobe = self.wardrobes.get(module) or Wardrobe.of(module, "")
            part = wardrobe.parts.get(self.name, Part()) if self.name else Part()
            view = self.made[module] = wardrobe.view(part)
            for key, child in wardrobe.children.items():
                view._modules[key] = None if child is None else self.of(child)
        return self.made[module]

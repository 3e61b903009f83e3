"""Several named adapters on one model.

    aurora.load(model, "french.safetensors", name="fr")         # beside what is there
    aurora.add_adapter(model, "de", r"(query|value)$", rank=4)  # fresh; in use, so that it trains
    aurora.set_adapter(model, "fr")                             # from now on, in all threads
    with aurora.use(model, "de"):                               # inside the block, in this thread
        model(batch)

The adapter in use is in the layers, as an only one would be, and all other functions of `aurora`
act on it. The others wait: each module on which one has anything, A, B and the ANL of a layer or
what `train=` kept of a head, has a child "aurora" with it, by the adapter's name. They are ordinary
parameters, in `state_dict()` as "<layer>.aurora.<name>.A", and do not require gradients.

What `train=` kept belongs to the adapter: each has a head of its own, which is switched with it,
because an adapter is of no use under another's head. The base's own head waits as "__base__".
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from aurora import core
from aurora._header import kept

T = TypeVar("T")
_KEY, _BASE = "aurora", "__base__"
_Table = dict[str, Any]

# ---- What is on a module ---------------------------------------------------------------------


class _Part(nn.Module):
    """What an adapter has on one module, under the keys by which the module has it."""

    def __init__(self, parameters: _Table, buffers: _Table, anl: _Table, train: Any = ()) -> None:
        super().__init__()
        self._parameters.update(parameters)
        self._buffers.update(buffers)
        self._modules.update(anl)
        self.kept = frozenset(train)
        self.required = {key: p.requires_grad for key, p in self.named_parameters()}

    def adapter(self) -> list[tuple[Any, Any, Any]]:
        """A, B and the ANL; nothing if there is only what `train=` kept."""
        if "anl" not in self._modules:
            return []
        return [(self._parameters["A"], self._parameters["B"], self._modules["anl"])]

    def others(self) -> tuple[_Table, _Table]:
        """The parameters and buffers that `train=` kept."""
        found = {k: p for k, p in self._parameters.items() if k in self.kept}
        return found, dict(self._buffers)


class Switched(nn.Module):
    """A module that a block of `use` switches, and has no adapter in use: a plain one, or a head.

    Like an `AuroraLinear` it is the same object as before, of a class made on the fly.
    """

    original: ClassVar[type[nn.Module]]
    enabled = core.AuroraLinear.enabled

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (_blank, (self.original,), *object.__reduce_ex__(self, protocol)[2:])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes, or what the block says."""
        instead = core._OFF.instead.get(id(self)) if core._OPEN else None
        return (super().forward if instead is None else instead)(*args, **kwargs)


_SWITCHED: dict[Any, Any] = {}  # class -> its switched class, made once


def _switched_class(original: Any) -> Any:
    if original not in _SWITCHED:
        name = f"Switched{original.__name__}"
        _SWITCHED[original] = type(name, (Switched, original), {"original": original})
    return _SWITCHED[original]


def _blank(original: type[nn.Module]) -> Any:
    """What unpickling starts from."""
    cls = _switched_class(original)
    return cls.__new__(cls)


def _plain_class(module: nn.Module) -> Any:
    switched = isinstance(module, (core.AuroraLinear, Switched))
    return module.original if switched else type(module)


@dataclasses.dataclass
class _Wardrobe:
    """A module's own tensors and children, and by name what adapters have on it."""

    module: nn.Module
    parameters: _Table
    buffers: _Table
    children: _Table
    parts: dict[str, _Part]

    @classmethod
    def of(cls, module: nn.Module, current: str, copies: dict[int, Any] | None) -> _Wardrobe:
        """Sort what a module has; what it has of its own no more is copied, if there are copies."""
        shelf, worn = module._modules.get(_KEY), _worn(module)
        parts: Any = dict(shelf._modules) if isinstance(shelf, core.Shelf) else {}
        base = parts.pop(_BASE, None) or _Part({}, {}, {})
        for own, waiting in zip(worn.others(), (base._parameters, base._buffers), strict=True):
            for key in own.keys() - waiting.keys():
                # An adapter without a name has trained the base's own head in place.
                waiting[key] = own[key] if copies is None else copy.deepcopy(own[key], copies)
        if worn.adapter() or worn.kept:
            parts = {current: worn, **parts}
        gone = ("A", "B") if worn.adapter() else ()
        parameters = {k: p for k, p in module._parameters.items() if k not in gone}
        children = {k: m for k, m in module._modules.items() if m is not shelf or m is None}
        children = {k: m for k, m in children.items() if k not in worn._modules}
        buffers = module._buffers | base._buffers
        return cls(module, parameters | base._parameters, buffers, children, parts)

    def view(self, part: _Part, original: bool = False) -> nn.Module:
        """The module as it would be with an adapter's tensors: another object, nothing moves."""
        plain = _plain_class(self.module)
        adapted = part.adapter() and not original
        view: nn.Module = object.__new__(core._adapted_class(plain) if adapted else plain)
        view.__dict__.update(self.module.__dict__)
        parameters, buffers = part.others() if original else (part._parameters, part._buffers)
        view._parameters = self.parameters | parameters
        view._buffers = self.buffers | buffers
        view._modules = self.children if original else self.children | part._modules
        note = view.__dict__.pop("_aurora", core.Note())
        if part.kept:
            view.__dict__["_aurora"] = note._replace(train=part.kept)
        return view

    def dress(self, name: str) -> None:
        """Put an adapter into the module, and the others, with what that displaces, on its shelf.

        Tables are replaced, not changed, as another thread may be reading them.
        """
        worn, module = self.parts.get(name, _Part({}, {}, {})), self.module
        for part in self.parts.values():
            for key, p in part.named_parameters():
                p.requires_grad_(part is worn and part.required[key])
        displaced = _Part(
            {k: p for k, p in self.parameters.items() if k in worn._parameters},
            {k: b for k, b in self.buffers.items() if k in worn._buffers},
            {},
        ).requires_grad_(False)
        aside = {other: part for other, part in self.parts.items() if part is not worn}
        if displaced.required or displaced._buffers:
            aside[_BASE] = displaced
        own, plain = module.__dict__, _plain_class(module)
        own["_parameters"] = self.parameters | worn._parameters
        own["_buffers"] = self.buffers | worn._buffers
        own["_modules"] = self.children | worn._modules | _shelf(aside)
        own["_aurora"] = own.get("_aurora", core.Note())._replace(train=worn.kept)
        if worn.adapter():
            worn._modules["anl"].train(module.training)
            module.__class__ = core._adapted_class(plain)
        else:
            module.__class__ = _switched_class(plain) if aside else plain


def _worn(module: nn.Module) -> _Part:
    """What the adapter in use has on a module."""
    train = module.__dict__.get("_aurora", core.Note()).train
    adapted = isinstance(module, core.AuroraLinear)
    keys = train | {"A", "B"} if adapted else train
    gone = module._non_persistent_buffers_set
    buffers = {k: b for k, b in module._buffers.items() if train and b is not None}
    return _Part(
        {k: p for k, p in module._parameters.items() if k in keys},
        {k: b for k, b in buffers.items() if k not in gone},
        {"anl": module.anl} if adapted else {},
        train,
    )


def _shelf(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    shelf = core.Shelf()
    shelf._modules.update(parts)
    return {_KEY: shelf} if parts else {}


# ---- What is on a model ----------------------------------------------------------------------


def _modules(model: nn.Module) -> list[nn.Module]:
    """The model's modules, each once, without adapters' own."""
    return list(dict.fromkeys(core.ModelView.of(model).modules.values()))


def _in_use(model: nn.Module) -> str:
    """The name of the adapter in use; "default" if it has none."""
    anls = [layer.anl for layer in core.ModelView.of(model).layers.values()]
    return next((n for anl in anls if (n := anl.__dict__.get("adapter_name"))), "default")


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, the one in use first.

    The adapter of an `inject` or a `load` without a name is called "default".

    Args:
        model: A model with adapters; ValueError if it has none.
    """
    core.layers(model)
    shelves = [m for m in model.modules() if isinstance(m, core.Shelf)]
    names = [_in_use(model)]
    for shelf in shelves:
        names += [name for name in shelf._modules if name not in (_BASE, *names)]
    return names


def _known(model: nn.Module, names: Iterable[Any]) -> None:
    there = adapter_names(model)
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(str(name), there, 1)
            told = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no adapter {name!r}, there are {', '.join(there)}{told}")


def _wardrobes(model: nn.Module, copies: dict[int, Any] | None = None) -> list[_Wardrobe]:
    current = _in_use(model)
    return [_Wardrobe.of(module, current, copies) for module in _modules(model)]


def _dress(model: nn.Module, wardrobes: Iterable[_Wardrobe], name: str) -> None:
    """Put an adapter into the layers, in place of the one that is there."""
    for wardrobe in wardrobes:
        if wardrobe.parts or _KEY in wardrobe.module._modules:
            wardrobe.dress(name)


def _refuse_in_block(model: nn.Module) -> None:
    if any(id(module) in core._OFF.instead for module in model.modules()):
        raise ValueError("inside a block of aurora.use a model's adapters stay: leave it first")


class _Shadow:
    """Another tree of modules over a model's tensors, with an adapter, or with none."""

    def __init__(self, wardrobes: Iterable[_Wardrobe], name: str | None) -> None:
        self.wardrobes, self.name = {w.module: w for w in wardrobes}, name
        self.made: dict[nn.Module, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """A module's counterpart."""
        if module not in self.made and not isinstance(module, torch.jit.ScriptModule):
            wardrobe = self.wardrobes.get(module) or _Wardrobe.of(module, "", None)
            view = wardrobe.view(wardrobe.parts.get(self.name or "", _Part({}, {}, {})))
            self.made[module] = view
            own = {"anl"} if isinstance(view, core.AuroraLinear) else set()
            for key in view._modules.keys() - own:
                child = view._modules[key]
                view._modules[key] = None if child is None else self.of(child)
        return self.made.get(module, module)


def with_adapter(model: nn.Module, name: str) -> nn.Module:
    """A view of a model in which an adapter is the one in use; nothing in the model moves."""
    _known(model, [name])
    return _Shadow(_wardrobes(model), name).of(model)


# ---- Adding, switching, deleting -------------------------------------------------------------


def beside(model: nn.Module, name: str, fill: Callable[[nn.Module], T], use: bool = False) -> T:
    """What `fill` puts into a bare view of the model becomes an adapter of the model.

    All or nothing. Other threads go on: until the end only the view changes.
    """
    view = core.ModelView.of(model)
    core._refuse_distributed(model)
    _refuse_in_block(model)
    _refuse_name(model, name)
    with core.unchanged_on_error(model):
        for owned in view.parameters.values():
            core._take_note(owned, set())
        current = _in_use(model) if view.layers else name
        wardrobes = _wardrobes(model, copies={})
        shadow = _Shadow(wardrobes, None)
        bare = shadow.of(model)
        result = fill(bare)
        for tree in (model, bare):
            _refuse_tied(tree)
        for wardrobe in wardrobes:
            part = _worn(shadow.of(wardrobe.module))
            if part.adapter() or part.kept:
                wardrobe.parts[name] = part
            for *_, anl in part.adapter():
                anl.__dict__["adapter_name"] = name
        _dress(model, wardrobes, name if use else current)
        trained = set(core.parameters(model))
        for owned in core.ModelView.of(model).parameters.values():
            if owned.tensor not in trained:
                owned.tensor.requires_grad_(False)
    return result


def _refuse_name(model: nn.Module, name: Any) -> None:
    there = adapter_names(model) if core.ModelView.of(model).layers else []
    if name in there:
        way = "aurora.delete_adapter it first, or set_adapter it and load without a name"
        raise ValueError(f"there is an adapter {name!r} already: {way}")
    taken = not isinstance(name, str) or name in ("", _BASE) or hasattr(nn.Module(), name)
    if taken or "." in name:
        rule = "a text without dots that is no attribute of nn.Module"
        raise ValueError(f"an adapter's name must be {rule}, got {name!r}")


def _refuse_tied(model: nn.Module) -> None:
    view = core.ModelView.of(model)
    own = kept(view)
    tensors = {id(owned.tensor): name for name, owned in own.items()}
    for name, owned in (view.parameters | view.buffers).items():
        if name not in own and id(owned.tensor) in tensors:
            told = f"{tensors[id(owned.tensor)]} trains and is tied to {name}, which would not"
            raise ValueError(f"{told} be switched with it: untie them, or name both in train=")


def own_kept(model: nn.Module) -> None:
    """Put copies in the place of what `train=` kept, so that the original stays as it is."""
    copies: dict[int, Any] = {}
    for owned in kept(core.ModelView.of(model)).values():
        is_buffer = owned.key in owned.module._buffers
        table: _Table = owned.module._buffers if is_buffer else owned.module._parameters
        table[owned.key] = copy.deepcopy(owned.tensor, copies)


def add_adapter(
    model: nn.Module,
    name: str,
    target_regex: core.Target,
    rank: int | core.AuroraConfig = 2,
    *,
    train: str | None = None,
    **options: Any,
) -> core.Injection:
    """Adapt layers by a fresh adapter with a name, beside those that are there, and use it.

    It need not have the layers, the rank or the options of others. The outputs are then those of
    the base, bit for bit, and only the new adapter trains. What `train` names starts as a copy of
    the base's, and is the adapter's own.

    Args:
        model: Any module, with adapters or without.
        name: The adapter's name, without dots.
        target_regex: As in `inject`.
        rank: As in `inject`.
        train: As in `inject`.
        **options: As in `inject`.

    Returns:
        What `inject` returns.

    Raises:
        ValueError: With the model as it was: a name that is taken or cannot be; a tensor in
            `train` that is tied to one outside; inside a block of `use`; whatever `inject` refuses.
        TypeError: As in `inject`.

    Example:
        >>> print(aurora.add_adapter(model, "de", r"(query|value)$", rank=4, train=r"^classifier"))
    """

    def fill(bare: nn.Module) -> None:
        core.inject(bare, target_regex, rank, train=train, **options)
        own_kept(bare)

    beside(model, name, fill, use=True)
    return core.summary(model)


def set_adapter(model: nn.Module, name: str) -> None:
    """Use an adapter from now on, in all threads: it is in the layers, and it alone trains.

    No value changes and no tensor is replaced by another, so that optimizers stay valid, each with
    the parameters it was made for; gradients stay until they are zeroed. Compiled graphs run on
    without compiling anew if the two adapters have the same layers, ranks and options.

    Args:
        model: A model with adapters.
        name: One of `adapter_names`.

    Raises:
        ValueError: With the model as it was: no such adapter; inside a block of `use`; under
            DistributedDataParallel, which would not average what it has not seen training.
    """
    _known(model, [name])
    core._refuse_distributed(model)
    _refuse_in_block(model)
    with core.unchanged_on_error(model):
        _dress(model, _wardrobes(model, copies={}), name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter that is not in use off the model.

    Args:
        model: A model with adapters.
        name: One of `adapter_names`.

    Raises:
        ValueError: With the model as it was: no such adapter; the one in use; inside a block of
            `use`.
    """
    _known(model, [name])
    core._refuse_distributed(model)
    _refuse_in_block(model)
    current, wardrobes = _in_use(model), _wardrobes(model)
    if name == current:
        way = "set_adapter to another first, or aurora.remove(model) if it is the only one"
        raise ValueError(f"the adapter {name!r} is in use: {way}")
    with core.unchanged_on_error(model):
        for wardrobe in wardrobes:
            wardrobe.parts.pop(name, None)
        _dress(model, wardrobes, current)


def refuse_others(model: nn.Module) -> None:
    """ValueError if adapters wait: they were trained beside the base as it is."""
    if others := adapter_names(model)[1:]:
        way = "aurora.save(model, path, name=...) what you need, then aurora.delete_adapter"
        raise ValueError(f"other adapters are on the model, {', '.join(others)}: {way}")


def _before_remove(model: nn.Module) -> None:
    refuse_others(model)
    _refuse_in_block(model)
    for module in _modules(model):
        if isinstance(module._modules.get(_KEY), core.Shelf):
            del module._modules[_KEY]
        if isinstance(module, Switched):
            module.__class__ = module.original


core.BEFORE_REMOVE.append(_before_remove)

# ---- Blocks ----------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Rows that share adapters: the base with their own tensors, if any, and A, B, ANL of each."""

    base: nn.Module | None
    adapters: list[tuple[Any, Any, Any]]
    rows: Tensor | None  # their numbers; None for all


class _Choice:
    """What runs in place of a module inside a block."""

    def __init__(self, module: nn.Module, groups: list[_Group], order: Tensor | None) -> None:
        self.module, self.groups, self.order = module, groups, order  # order undoes the grouping
        self.plain: Any = _plain_class(module).forward
        self.own = any(group.base is not None for group in groups)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self.order is None:
            return self.add(self.groups[0], self.base(self.groups[0], *args, **kwargs), x)
        if not isinstance(x, Tensor) or x.shape[:1] != self.order.shape:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            told = f"rows= names {len(self.order)} adapters, and a layer's input is {found}"
            raise ValueError(f"{told}: name one for each entry of the first dimension")
        if self.own and len(args) + len(kwargs) > 1:
            kind = self.plain.__qualname__.removesuffix(".forward")
            told = f"a {kind} that train= kept takes several arguments"
            raise ValueError(f"{told}, and cannot have rows of its own: one adapter a batch")
        shared = None if self.own else self.base(self.groups[0], *args, **kwargs)
        outs = []
        for group in self.groups:
            part = x.index_select(0, group.rows)
            out = self.base(group, part) if shared is None else shared.index_select(0, group.rows)
            outs.append(self.add(group, out, part))
        return torch.cat(outs).index_select(0, self.order)

    def base(self, group: _Group, *args: Any, **kwargs: Any) -> Any:
        """The module without adapters."""
        if group.base is None:
            return self.plain(self.module, *args, **kwargs)
        if group.base.training != self.module.training:
            group.base.training = self.module.training
        return group.base.forward(*args, **kwargs)

    def add(self, group: _Group, out: Any, x: Any) -> Any:
        """Add the group's adapters, unless a block of `disabled` is open."""
        if core._OFF.depth.get(id(self.module)):
            return out
        for A, B, anl in group.adapters:
            out = core.add_adapter(out, x, A, B, anl, self.module.training)
        return out


class _Blocks(threading.local):
    """What the open blocks of this thread say, by module; the last one counts."""

    def __init__(self) -> None:
        self.open: list[dict[int, _Choice]] = []


_BLOCKS = _Blocks()


def _set_blocks(blocks: list[dict[int, _Choice]]) -> None:
    _BLOCKS.open, merged = blocks, dict[int, Callable[..., Any]]()
    for choices in blocks:
        merged |= choices
    core._OFF.instead = merged


@contextlib.contextmanager
def use(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    rows: Sequence[str | None] | None = None,
) -> Iterator[None]:
    """Inside the block the model runs with other adapters than the one in use.

    Like `disabled` it acts in the thread that enters it only, so that threads can serve different
    adapters of one model. Blocks may nest and overlap; the one that was entered last counts, but
    inside `disabled` no adapter runs. What `train=` kept is switched with its adapter. Nothing
    trains here that did not train before: to train an adapter, `set_adapter` it. What acts on the
    adapter in use, such as `save` and `parameters`, still acts on that.

    Compiled graphs run on without compiling anew for adapters that have the same layers, ranks and
    options as others they were compiled with, and for rows that fall into as many groups.

    Args:
        model: A model with adapters.
        names: An adapter; several, whose outputs add up; None or none for the base alone.
        rows: Instead of `names`, one adapter for each entry of the first dimension of what the
            layers are given, None for the base alone. Beams need a name each.

    Raises:
        ValueError: No such adapter; several that have the same tensor of their own. Inside the
            block, from the model: the first dimension has another length than rows, or what
            `train=` kept takes several arguments.

    Example:
        >>> with aurora.use(model, rows=["fr", "de", None]):
        ...     model(batch_of_three)
    """
    choices = _chosen(model, names, rows)
    core._OPEN.append(1)
    try:
        _set_blocks([*_BLOCKS.open, choices])
        yield
    finally:
        _set_blocks([block for block in _BLOCKS.open if block is not choices])
        core._OPEN.pop()


def _chosen(model: nn.Module, names: Any, rows: Any) -> dict[int, _Choice]:
    """What is to run, by module."""
    if rows is None:
        grouped: dict[Any, Any] = {(names,) if isinstance(names, str) else tuple(names or ()): None}
    else:
        if names is not None or isinstance(rows, str) or not len(rows):
            raise ValueError(f"rows= is a list of names, and no others go with it, got {rows!r}")
        grouped = {}
        for i, name in enumerate(rows):
            grouped.setdefault(() if name is None else (name,), []).append(i)
    _known(model, itertools.chain.from_iterable(grouped))
    numbers = functools.lru_cache(None)(functools.partial(_numbers, list(grouped.values())))
    choices = {}
    for wardrobe in _wardrobes(model):
        if isinstance(wardrobe.module, (core.AuroraLinear, Switched)):
            device = next(wardrobe.module.parameters(), torch.empty(())).device
            per_group, order = ([None], None) if rows is None else numbers(device)
            groups = [_group(wardrobe, *g) for g in zip(grouped, per_group, strict=True)]
            choices[id(wardrobe.module)] = _Choice(wardrobe.module, groups, order)
    return choices


def _numbers(groups: list[list[int]], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Each group's rows, and where each row is when the groups stand one after the other."""
    with torch.inference_mode(False):  # a backward may need them
        each = [torch.tensor(group, device=device) for group in groups]
        return each, torch.cat(each).argsort()


def _group(wardrobe: _Wardrobe, names: Iterable[str], rows: Tensor | None) -> _Group:
    parts = [wardrobe.parts[name] for name in names if name in wardrobe.parts]
    adapters = [adapter for part in parts for adapter in part.adapter()]
    if not any(part.kept for part in wardrobe.parts.values()):
        return _Group(None, adapters, rows)
    parameters, buffers = {}, {}
    for part in parts:
        if part.kept & parameters.keys():
            key = min(part.kept & parameters.keys())
            told = "cannot be added up: each has its own, by train="
            raise ValueError(f"{', '.join(names)} {told}: a {_plain_class(wardrobe.module).__name__}'s {key}")
        own = part.others()
        parameters, buffers = parameters | own[0], buffers | own[1]
    merged = _Part(parameters, buffers, {}, parameters)
    return _Group(wardrobe.view(merged, original=True), adapters, rows)

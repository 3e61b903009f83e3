"""Several named adapters on one model.

    aurora.load(model, "french.safetensors", name="fr")         # beside what is there
    aurora.add_adapter(model, "de", r"(query|value)$", rank=4)  # fresh; in use, so that it trains
    aurora.set_adapter(model, "fr")                             # from now on, in all threads
    with aurora.use(model, "de"):                               # inside the block, in this thread
        model(batch)

The adapter in use is in the layers, as an only one would be, and all other functions of `aurora`
act on it. The others wait on shelves of their modules (_shelf.py): ordinary parameters, which do
not require gradients, in `state_dict()` as "<layer>.aurora.<name>.A".

What `train=` kept belongs to the adapter: each has a head of its own, which is switched with it,
because an adapter is of no use under another's head. The base's own head waits as "__base__".
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from aurora import _layer, core
from aurora._header import kept
from aurora._shelf import (
    BASE,
    KEY,
    Part,
    Shadow,
    Switched,
    Wardrobe,
    adapter,
    plain_class,
    switchable,
    waiting,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")

# ---- What is on a model ----------------------------------------------------------------------


def _names(modules: Iterable[nn.Module]) -> list[str]:
    """The names of the adapters on modules: the one in use, then the others."""
    anls = [m.anl for m in modules if isinstance(m, core.AuroraLinear)]
    given = (anl.__dict__.get("adapter_name") for anl in anls)
    others = set[str]().union(*map(waiting, modules)) - {BASE}
    return [next(filter(None, given), "default"), *sorted(others)]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters: the one in use, then the others in alphabetical order.

    That of an `inject` or a `load` without a name is called "default".

    Args:
        model: A model with adapters; ValueError if it has none.
    """
    modules = switchable(model)
    if not any(isinstance(module, core.AuroraLinear) for module in modules):
        core.layers(model)  # refuses
    return _names(modules)


def _known(model: nn.Module, names: Iterable[Any]) -> None:
    there = adapter_names(model)
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(str(name), there, 1)
            told = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no adapter {name!r}, there are {', '.join(there)}{told}")


def _wardrobes(model: nn.Module, copies: dict[int, Any] | None = None) -> dict[nn.Module, Wardrobe]:
    """What is on the modules on which adapters have something."""
    modules = [m for m in model.modules() if isinstance(m, core.Exchanged) or core.Note.of(m).train]
    current = _names(modules)[0]
    return {module: Wardrobe.of(module, current, copies) for module in modules}


def _dress(wardrobes: dict[nn.Module, Wardrobe], name: str) -> None:
    """Put an adapter into the layers, in place of the one that is there."""
    for wardrobe in wardrobes.values():
        if wardrobe.parts or waiting(wardrobe.module):
            wardrobe.dress(name)


def _refuse_in_block(model: nn.Module) -> None:
    if any(id(module) in core._OFF.instead for module in model.modules()):
        raise ValueError("inside a block of aurora.use a model's adapters stay: leave it first")


def with_adapter(model: nn.Module, name: str) -> nn.Module:
    """A view of a model in which an adapter is the one in use; nothing in the model moves."""
    _known(model, [name])
    return Shadow(_wardrobes(model), name).of(model)


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
        _refuse_tied(view)
        for owned in view.parameters.values():
            core._take_note(owned, set())
        wardrobes = _wardrobes(model, copies={})
        current = adapter_names(model)[0] if view.layers else name
        shadow = Shadow(wardrobes, None)
        result = fill(shadow.of(model))
        for module, bare in shadow.made.items():
            part = Part.of(bare)
            if part._parameters:
                wardrobe = wardrobes.setdefault(module, Wardrobe.of(module, ""))
                wardrobe.parts[name] = part
            for anl in part._modules.values():
                anl.__dict__["adapter_name"] = name
        _refuse_bypassed(model, wardrobes)
        _dress(wardrobes, name if use else current)
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
    taken = not isinstance(name, str) or name in ("", BASE) or hasattr(nn.Module(), name)
    if taken or "." in name:
        rule = "a text without dots that is no attribute of nn.Module"
        raise ValueError(f"an adapter's name must be {rule}, got {name!r}")


def _refuse_tied(view: core.ModelView) -> None:
    own = kept(view)
    tensors = {id(owned.tensor): name for name, owned in own.items()}
    for name, owned in (view.parameters | view.buffers).items():
        if name not in own and id(owned.tensor) in tensors:
            told = f"{tensors[id(owned.tensor)]} trains and is tied to {name}, which would not"
            raise ValueError(f"{told} be switched with it: untie them, or name both in train=")


def _refuse_bypassed(model: nn.Module, wardrobes: dict[nn.Module, Wardrobe]) -> None:
    """ValueError for a head that `use` could not switch, as its parent never calls it."""
    for module, wardrobe in wardrobes.items():
        if any(part.kept for part in wardrobe.parts.values()):
            kind, reason = plain_class(module), core._bypassed_by(model, module)
            if kind.forward is nn.Module.forward:
                reason = "its parent reads its tensors"
            if reason:
                told = "so that no block could switch what train= keeps of it"
                raise ValueError(f"a {kind.__name__}: {reason}, {told}")


def own_kept(model: nn.Module) -> None:
    """Put copies in the place of what `train=` kept, so that the original stays as it is."""
    view, copies = core.ModelView.of(model), dict[int, Any]()
    _refuse_tied(view)
    for owned in kept(view).values():
        is_buffer = owned.key in owned.module._buffers
        table: dict[str, Any] = owned.module._buffers if is_buffer else owned.module._parameters
        table[owned.key] = copy.deepcopy(owned.tensor, copies)


def add_adapter(
    model: nn.Module,
    name: str,
    target_regex: core.Target,
    rank: int | core.AuroraConfig = 2,
    *,
    train: str | None = None,
    **options: Unpack[core.Options],
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
            `train` that is tied to one outside, or is read past its module's forward; inside a
            block of `use`; whatever `inject` refuses.
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
        _dress(_wardrobes(model, copies={}), name)


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
    current, wardrobes = adapter_names(model)[0], _wardrobes(model)
    if name == current:
        way = "set_adapter to another first, or aurora.remove(model) if it is the only one"
        raise ValueError(f"the adapter {name!r} is in use: {way}")
    with core.unchanged_on_error(model):
        for wardrobe in wardrobes.values():
            wardrobe.parts.pop(name, None)
        _dress(wardrobes, current)


def refuse_others(model: nn.Module) -> None:
    """ValueError if adapters wait: they were trained beside the base as it is."""
    if others := adapter_names(model)[1:]:
        way = "aurora.save(model, path, name=...) what you need, then aurora.delete_adapter"
        raise ValueError(f"other adapters are on the model, {', '.join(others)}: {way}")


def _before_remove(model: nn.Module) -> None:
    refuse_others(model)
    _refuse_in_block(model)
    for module in dict.fromkeys(core.ModelView.of(model).modules.values()):
        if isinstance(module, core.Exchanged):
            module._modules.pop(KEY, None)
        if isinstance(module, Switched):
            module.__class__ = plain_class(module)


core.BEFORE_REMOVE.append(_before_remove)

# ---- Blocks ----------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Rows that share adapters: the base with their own tensors, if any, and A, B, ANL of each."""

    base: nn.Module | None
    adapters: list[tuple[Any, Any, Any]]
    rows: Any  # their numbers, a tensor; None for all


class _Choice:
    """What runs in place of a module inside a block."""

    def __init__(self, module: nn.Module, groups: list[_Group], order: Tensor | None) -> None:
        self.module, self.groups, self.order = module, groups, order  # order undoes the grouping
        self.plain: Any = plain_class(module).forward
        self.own = any(group.base is not None for group in groups)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self.order is None:
            return self.whole(self.groups[0], x, args, kwargs)
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

    def whole(self, group: _Group, x: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """All rows with the same adapters; an only one as fast as the one in use."""
        alone = len(group.adapters) == 1 and group.base is None and not self.off()
        if alone and self.plain is nn.Linear.forward and len(args) == 1 and not kwargs:
            training = self.module.training
            out = _layer.at_once(self.module, x, *group.adapters[0], training)
            if out is not None:
                return out
        return self.add(group, self.base(group, *args, **kwargs), x)

    def off(self) -> bool:
        """Whether a block of `disabled` is open."""
        return bool(core._OFF.depth.get(id(self.module)))

    def base(self, group: _Group, *args: Any, **kwargs: Any) -> Any:
        """The module without adapters."""
        if group.base is None:
            return self.plain(self.module, *args, **kwargs)
        if group.base.training != self.module.training:
            group.base.training = self.module.training
        return group.base.forward(*args, **kwargs)

    def add(self, group: _Group, out: Any, x: Any) -> Any:
        """Add the group's adapters, unless a block of `disabled` is open."""
        if self.off():
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
    options as others they were compiled with; docs/guide.md says it in full.

    Args:
        model: A model with adapters.
        names: An adapter; several, whose outputs add up; None or none for the base alone.
        rows: Instead of `names`, one adapter for each entry of the first dimension of what the
            layers are given, None for the base alone. Beams need a name each.

    Raises:
        ValueError: No such adapter; several that have the same tensor of their own; adapters in
            shards. Inside the block, from the model: the first dimension has another length than
            rows, or what `train=` kept takes several arguments.

    Example:
        >>> with aurora.use(model, rows=["fr", "de", None]):
        ...     model(batch_of_three)
    """
    choices = _chosen(model, names, rows)
    core._OPEN[:] = [True]
    try:
        _set_blocks([*_BLOCKS.open, choices])
        yield
    finally:
        _set_blocks([block for block in _BLOCKS.open if block is not choices])


def _chosen(model: nn.Module, names: Any, rows: Any) -> dict[int, _Choice]:
    """What is to run, by module."""
    grouped = _grouped(names, rows)
    _known(model, itertools.chain.from_iterable(grouped))
    modules, choices = switchable(model), {}
    current = _names(modules)[0]
    # In an order that depends on as little as can be, as a compiled graph holds for one order.
    order = sorted(grouped, key=lambda g: (len(g), g == (current,), len(grouped[g] or ())))
    numbers = functools.lru_cache(None)(functools.partial(_numbers, [grouped[g] for g in order]))
    for module in modules:
        device = next(module.parameters(), torch.empty(())).device
        each, back = ([None], None) if rows is None else numbers(device)
        has = _has(module, current)
        groups = [_Group(*has(names), its) for names, its in zip(order, each, strict=True)]
        choices[id(module)] = _Choice(module, groups, back)
    return choices


def _grouped(names: Any, rows: Any) -> dict[tuple[str, ...], Any]:
    """Which adapters are to run together, and on which rows; None for all."""
    if rows is None:
        return {(names,) if isinstance(names, str) else tuple(names or ()): None}
    if names is not None or isinstance(rows, str) or not len(rows):
        raise ValueError(f"rows= is a list of names, and no others go with it, got {rows!r}")
    grouped: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(rows):
        grouped.setdefault(() if name is None else (name,), []).append(i)
    return grouped


def _numbers(groups: list[list[int]], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Each group's rows, and where every row is once the groups stand one after the other."""
    with torch.inference_mode(False):  # a backward may need them
        each = [torch.tensor(group, device=device) for group in groups]
        return each, torch.cat(each).argsort()


def _has(module: nn.Module, current: str) -> Callable[[Sequence[str]], tuple[Any, Any]]:
    """By names of adapters, a module with what `train=` kept for them, and A, B, ANL of each."""
    parts = {**waiting(module), current: module}
    keeps = core.Note.of(module).train or any(part.kept for part in waiting(module).values())
    wardrobe = Wardrobe.of(module, current) if keeps else None

    def find(names: Sequence[str]) -> tuple[Any, Any]:
        found = (adapter(parts[name]) for name in names if name in parts)
        adapters = list(itertools.chain.from_iterable(found))
        if any(hasattr(A, "placements") or A.dim() != 2 for A, *_ in adapters):
            told = "set_adapter the one to run with before sharding"
            raise ValueError(f"the adapters are sharded, and a block would use a shard: {told}")
        return None if wardrobe is None else wardrobe.view(_merged(wardrobe, names)), adapters

    return find


def _merged(wardrobe: Wardrobe, names: Sequence[str]) -> Part:
    """What `train=` kept for adapters that run together. ValueError if two have the same."""
    merged = Part()
    for part in (wardrobe.parts[name] for name in names if name in wardrobe.parts):
        if both := merged.kept & part.kept:
            where = f"{min(both)} of a {plain_class(wardrobe.module).__name__}"
            told = f"each have a {where} of their own, by train=, and these do not add up"
            raise ValueError(f"the adapters {', '.join(names)} {told}")
        own = part.without_adapter()
        parameters = merged._parameters | own._parameters
        merged = Part(parameters, merged._buffers | own._buffers, {}, merged.kept | own.kept)
    return merged

"""AuroRA under PEFT's public API: `get_peft_model`, `from_pretrained` and what builds on them.

    import peft
    from aurora.integrations.peft import AuroraPeftConfig

    model = peft.get_peft_model(model, AuroraPeftConfig(r=2, target_modules=["q_proj", "v_proj"]))

Importing this module registers the method under the type "AURORA_ADAPTERS", in memory: PEFT's enum
of types gains a member and its dictionaries an entry; no file is written. A program that only loads
saved adapters imports it too. Per layer and adapter, a state dict holds `aurora_A.weight`,
`aurora_B.weight`, `aurora_anl.H` and `aurora_anl.spline_weight`: the tensors `A`, `B`, `anl.H` and
`anl.spline_weight` of our own files; and the options, which are compared at every load. What PEFT's
API rules out, and which of its versions are supported: docs/compatibility.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aurora import _layer, core
from aurora._header import differences

try:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
    )
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
    from peft.utils.peft_types import PeftType, register_peft_method
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
except ImportError as error:
    raise ImportError(
        'this needs PEFT 0.18 or newer: pip install "aurora-adapters[peft]"'
    ) from error

PEFT_TYPE = "AURORA_ADAPTERS"
_OPTIONS = [
    f.name for f in dataclasses.fields(core.AuroraConfig) if f.name not in ("rank", "alpha")
]


def _new_type(name: str) -> PeftType:
    """A further member of PEFT's enum, for this process; the member that is there, if it is."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType(name)


_TYPE = _new_type(PEFT_TYPE)


@dataclasses.dataclass
class AuroraPeftConfig(peft.PeftConfig):
    """The options of an adapter, as `aurora.AuroraConfig` has them, and PEFT's choice of modules.

    Args:
        r: The rank; `rank` in AuroraConfig.
        alpha: The output is scaled by `alpha / r`; None is `2 * r`.
        mode: As in AuroraConfig.
        spline: As in AuroraConfig.
        fixed: As in AuroraConfig.
        learnable: As in AuroraConfig.
        activation: As in AuroraConfig.
        grid_size: As in AuroraConfig.
        spline_order: As in AuroraConfig.
        grid_range: As in AuroraConfig.
        dropout: As in AuroraConfig.
        init: As in AuroraConfig.
        projections: As in AuroraConfig.
        target_modules: Names or their endings, one regular expression that has to match a whole
            name, or "all-linear"; None is what PEFT's LoRA takes for the architecture.
        exclude_modules: What target_modules must not match, likewise.
        layers_to_transform: The numbers of the layers to adapt; None is all.
        layers_pattern: The name of the list that these layers are in.
        rank_pattern: Ranks of single modules, by name or regular expression.
        alpha_pattern: The same for alpha.
        modules_to_save: Modules that train as a whole and are saved with the adapter, such as a
            new head.

    Raises:
        ValueError: For an option that AuroraConfig refuses.
    """

    r: int = core.AuroraConfig.rank
    alpha: float | None = None
    mode: str = core.AuroraConfig.mode
    spline: str = core.AuroraConfig.spline
    fixed: bool = core.AuroraConfig.fixed
    learnable: bool = core.AuroraConfig.learnable
    activation: str = core.AuroraConfig.activation
    grid_size: int = core.AuroraConfig.grid_size
    spline_order: int = core.AuroraConfig.spline_order
    grid_range: tuple[float, float] = core.AuroraConfig.grid_range
    dropout: float = core.AuroraConfig.dropout
    init: str = core.AuroraConfig.init
    projections: str = core.AuroraConfig.projections
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = _TYPE
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        checked = self.options("")
        self.grid_range = checked.grid_range
        for pattern in self.rank_pattern | self.alpha_pattern:
            self.options(pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list, not as a regular expression"
            )

    def options(self, module: str) -> core.AuroraConfig:
        """The options of the adapter of one module, by its qualified name."""
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)
        alpha = self.alpha_pattern.get(
            get_pattern_key(list(self.alpha_pattern), module), self.alpha
        )
        own = {name: getattr(self, name) for name in _OPTIONS}
        return core.AuroraConfig(r, alpha, **own)


class AuroraTunerLinear(nn.Module, BaseTunerLayer):
    """A linear layer with any number of named adapters, whose outputs add up.

    x (..., in_features) -> (..., out_features), in the dtype of the base's output. `base_layer` is
    the layer as it was. By adapter name, `configs` holds the options, `aurora_A` and `aurora_B`
    modules whose `weight` is A (r, in_features) and B (out_features, r), and `aurora_anl` the
    nonlinear layers; all in float32, or float64 over a float64 base.
    """

    base_layer: Any
    aurora_A: Any
    aurora_B: Any
    aurora_anl: Any
    _unmerged: Any
    adapter_layer_names = ("aurora_A", "aurora_B", "aurora_anl")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: core.AuroraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        features = core.linear_features(self.get_base_layer())
        if features is None:
            raise TypeError(f"AuroRA adapts linear layers, got a {type(base_layer).__name__}")
        self.in_features, self.out_features = features
        self.aurora_A, self.aurora_B, self.aurora_anl = (nn.ModuleDict() for _ in range(3))
        self.configs: dict[str, core.AuroraConfig] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.register_buffer("_unmerged", None, persistent=False)  # the weight before merging
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: core.AuroraConfig) -> None:
        """Add an adapter, drawn afresh: B is 0, so the output stays the base's, bit for bit."""
        device, dtype = self._place()
        make = functools.partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.aurora_A[adapter_name] = make(self.in_features, config.rank)
        self.aurora_B[adapter_name] = make(config.rank, self.out_features)
        self.aurora_anl[adapter_name] = core.ANL(config, device=device, dtype=dtype)
        self.configs[adapter_name] = config
        A, B, _ = self.parts(adapter_name)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        (nn.init.orthogonal_ if config.projections == "fixed" else nn.init.zeros_)(B)
        self.set_adapter(self.active_adapters)

    def parts(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter, core.ANL]:
        """A, B and the nonlinear layer of an adapter."""
        A, B = (part[adapter_name].weight for part in (self.aurora_A, self.aurora_B))
        return A, B, self.aurora_anl[adapter_name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; they train unless inference_mode."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_fixed()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let these adapters train, or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_fixed()

    def _freeze_fixed(self) -> None:
        for name, config in self.configs.items():
            if config.projections == "fixed":
                for p in self.parts(name)[:2]:
                    p.requires_grad_(False)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where adapters belong: by the base's weight, or where accelerate runs that base."""
        base: Any = self.get_base_layer()
        like = next(base.parameters(), torch.empty(()))
        hook: Any = getattr(base, "_hf_hook", None)
        device = hook.execution_device if getattr(hook, "offload", False) else like.device
        return torch.device(device), core.wide_dtype(like)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would cast to the base's dtype, and back to float32 only after the digits are gone.
        place, dtype = self._place()
        for part in (self.aurora_A, self.aurora_B, self.aurora_anl):
            if adapter_name in part and not any(p.is_meta for p in part[adapter_name].parameters()):
                part[adapter_name].to(place if device is None else device, dtype)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """x (..., in_features) -> (..., out_features).

        adapter_names has one name for each entry of x's first dimension, "__base__" for none.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not (args or kwargs or adapter_names or self.disable_adapters or self.merged):
            at_once = self._at_once(x)
            if at_once is not None:
                return at_once
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        if adapter_names is not None:
            return self._mixed(out, x, adapter_names)
        for name in () if self.merged else self.active_adapters:
            if name in self.configs:
                out = self._adapted(out, x, name)
        return out

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The output where one adapter is on a plain nn.Linear; None elsewhere."""
        base, names = self.base_layer, [n for n in self.active_adapters if n in self.configs]
        plain = type(base).forward is nn.Linear.forward and not _layer.is_watched(base)
        if plain and len(names) == 1:
            return _layer.at_once(base, x, *self.parts(names[0]), self.training)
        return None

    def _mixed(self, out: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        if self.merged:
            raise ValueError(
                "adapter_names and merged adapters exclude each other: unmerge_adapter() first"
            )
        for name in dict.fromkeys(adapter_names):
            if name in self.configs:
                rows = (
                    torch.tensor([n == name for n in adapter_names], device=x.device)
                    .nonzero()
                    .squeeze(1)
                )
                out = out.index_copy(0, rows, self._adapted(out[rows], x[rows], name))
        return out

    def _adapted(self, out: Tensor, x: Tensor, name: str) -> Tensor:
        return core.add_adapter(out, x, *self.parts(name), self.training)

    def as_ours(self, adapter_name: str) -> core.AuroraLinear:
        """The base with one adapter as our own layer: a view of the same tensors, nothing moves."""
        A, B, anl = self.parts(adapter_name)
        base: Any = self.get_base_layer()
        view: core.AuroraLinear = core._blank(core.AuroraLinear, type(base))
        view.__dict__.update(base.__dict__)
        view._parameters = {**base._parameters, "A": A, "B": B}
        view._modules = {**base._modules, "anl": anl}
        return view

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What a static merge adds: `s B sigma(A)`, sigma on each column of A."""
        view = self.as_ours(adapter_name)
        return core.as_stored(view, view.static_update())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter is a LoRA of its rank: `peft.convert_to_lora` is then exact."""
        config = self.configs.get(adapter_name)
        return config is not None and config.mode == "static"

    @torch.no_grad()
    def merged_weight(self, adapter_names: Iterable[str]) -> Tensor:
        """The base's weight plus these adapters' updates, summed in float32 or wider.

        Raises ValueError if that is not finite.
        """
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight if self._unmerged is None else self._unmerged
        total: Tensor = weight.to(core.wide_dtype(weight))
        for name in adapter_names:
            total = total + self.get_delta_weight(name)
        merged = total.to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError("merging would put NaN or infinity into a weight")
        return merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the static update of the adapters, by default the active ones; NaN is refused."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [*self.merged_adapters, *(name for name in names if name in self.configs)]
        if len(names) > len(self.merged_adapters):
            merged, weight = self.merged_weight(names), self.weight
            self._unmerged = weight.data if self._unmerged is None else self._unmerged
            weight.data = merged
            self.merged_adapters = names

    def unmerge(self) -> None:
        """Put the weight back that was there before the first merge, bit for bit."""
        if self.merged:
            self.weight.data = self._unmerged
            self._unmerged, self.merged_adapters = None, []

    def __repr__(self) -> str:
        return "aurora." + super().__repr__()


class AuroraTuner(BaseTuner):
    """PEFT's handle on the adapted model; `get_peft_model` makes it: `PeftModel.base_model`."""

    prefix = "aurora_"
    tuner_layer_cls = AuroraTunerLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT injects layer by layer; what it would stumble over is looked for before the first.
        if peft_config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            found = {name: model.get_submodule(name) for name in peft_config.target_modules}
            peft_config.target_modules = {
                name for name, m in found.items() if not core._bypassed_by(model, m)
            }
            return
        for name, module in _outside_of_adapters(model):
            if name and self._check_target_module_exists(peft_config, name):
                _check_adaptable(model, name, module)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        options = peft_config.options(current_key)
        if isinstance(target, AuroraTunerLinear):
            target.update_layer(adapter_name, options)
            return
        new = AuroraTunerLinear(target, adapter_name, options)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own would leave a layer that has several names as it was under all but the first.
        for module in dict.fromkeys([parent, *self.model.modules()]):
            for key in [key for key, found in module._modules.items() if found is child]:
                if module is not new_module:
                    module._modules[key] = new_module

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names=` of a call, one name for each row of the batch, on to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        known = {"__base__"}.union(*(layer.configs for layer in self._layers().values()))
        if unknown := sorted(set(names) - known):
            raise ValueError(
                f"adapter_names has {', '.join(unknown)}; the model has {', '.join(sorted(known))}"
            )
        hook = functools.partial(_pass_names, list(names), _copies(kwargs))
        with contextlib.ExitStack() as undo:
            for module in self.modules():
                if isinstance(module, (AuroraTunerLinear, AuxiliaryTrainingWrapper)):
                    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    undo.callback(handle.remove)
            yield

    def _layers(self) -> dict[str, AuroraTunerLinear]:
        found = self.model.named_modules()
        return {name: module for name, module in found if isinstance(module, AuroraTunerLinear)}

    def _check_merge_allowed(self) -> None:
        views = {
            name: layer.as_ours(next(iter(layer.configs)))
            for name, layer in self._layers().items()
            if layer.configs and not layer.merged
        }
        core.check_mergeable(self.model, views)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add the static update of the adapters, by default the active ones; all layers or none.

        `unmerge_adapter()` puts the old weights back, bit for bit. In mode "static" the merge is
        exact; in mode "dynamic" it is the paper's, another function than was trained, and a warning
        says so.

        Raises:
            ValueError: Weights are quantised, sharded or tied, or NaN or infinity would result.
        """
        self._check_static_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        method: Literal["static", "linear", "calibrated"] = "static",
        batches: Iterable[Any] | None = None,
        held_out: Iterable[Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The base model, plain again, with the adapters merged; the PEFT model is used up.

        For the report of a merge: `report = aurora.merge(to_aurora(model), "calibrated", batches)`.

        Args:
            progressbar: As PEFT has it.
            safe_merge: As PEFT has it; NaN is refused in any case.
            adapter_names: By default the active ones. "linear" and "calibrated" take one at a time.
            method: As in `aurora.merge`.
            batches: As in `aurora.merge`.
            held_out: As in `aurora.merge`.
            **options: As in `aurora.merge`.

        Raises:
            ValueError: As `aurora.merge` does, with the model as it was.
        """
        if method == "static":
            self._check_static_merge(adapter_names)
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        from aurora import merging

        chosen = self.active_adapters if adapter_names is None else adapter_names
        if len(chosen) != 1:
            raise ValueError(
                f"method={method!r} merges one adapter at a time, got {', '.join(chosen) or 'none'}"
            )
        with core.unchanged_on_error(self):
            base = _take_out(self, chosen[0])
            merging.merge(base, method, batches, held_out=held_out, **options)
        return base

    def _check_static_merge(self, adapter_names: list[str] | None) -> None:
        """PEFT merges layer by layer; whatever could fail does so before the first."""
        self._check_merge_allowed()
        chosen = self.active_adapters if adapter_names is None else adapter_names
        modes = set()
        for layer in self._layers().values():
            names = [name for name in chosen if name in layer.configs]
            layer.merged_weight(names)
            modes |= {layer.configs[name].mode for name in names}
        if "dynamic" in modes:
            warnings.warn(
                "a static merge of a dynamic adapter computes another function than was trained; "
                'merge_and_unload(method="calibrated", batches=...) keeps what a linear layer can',
                stacklevel=3,
            )


def _outside_of_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, without what is inside of an adapted layer."""
    inside: set[str] = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in inside:
            inside.add(name)
            continue
        if isinstance(module, BaseTunerLayer):
            inside.add(name)
        yield name, module


def _check_adaptable(model: nn.Module, name: str, module: nn.Module) -> None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if core.linear_features(base) is None:
        told = core.explain(base) or ": match other layers"
        raise TypeError(f"{name} is a {type(base).__name__}, not linear{told}")
    if reason := core._bypassed_by(model, module):
        raise ValueError(f"{name}: {reason}, or match other layers")


def _copies(kwargs: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one: by beams, or by the number of sequences to return."""
    config = kwargs.get("generation_config")
    names = ("num_beams", "num_return_sequences")
    return max(1, *((kwargs.get(name) or getattr(config, name, None) or 1) for name in names))


def _pass_names(
    names: list[str], copies: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows = len(args[0] if args else next(iter(kwargs.values())))
    if rows not in (len(names), copies * len(names)):
        raise ValueError(f"adapter_names has {len(names)} names, and a layer got {rows} rows")
    times = rows // len(names)
    repeated = [names[row // times] for row in range(rows)]
    return args, {**kwargs, "adapter_names": repeated}


if _TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=PEFT_TYPE.lower(),
        config_cls=AuroraPeftConfig,
        model_cls=AuroraTuner,
        prefix=AuroraTuner.prefix,
    )


def parameter_groups(model: nn.Module, lr: float, factor: float = 10.0) -> list[dict[str, Any]]:
    """What `aurora.parameter_groups` is to our own models: groups for any torch optimizer.

    Args:
        model: A PEFT model, or one of transformers' or diffusers' with adapters.
        lr: The learning rate of A, B and `modules_to_save`.
        factor: H and the spline weights train at `factor * lr`, without weight decay.

    Returns:
        Dictionaries with "params" and "lr", for the nonlinear layers also "weight_decay".

    Raises:
        ValueError: If no adapter of ours trains.
    """
    layers = [m for m in model.modules() if isinstance(m, AuroraTunerLinear)]
    inside = set(nn.ModuleList(layer.aurora_anl for layer in layers).parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    nonlinear, others = [p for p in trained if p in inside], [p for p in trained if p not in inside]
    if not nonlinear:
        raise ValueError("the model has no AuroRA adapter that trains")
    slow: dict[str, Any] = {"params": others, "lr": lr}
    return [slow, {"params": nonlinear, "lr": factor * lr, "weight_decay": 0.0}]


# ---- Between PEFT's adapters and ours ---------------------------------------------------------


def to_aurora(model: peft.PeftModel, adapter_name: str | None = None) -> nn.Module:
    """The base model with one adapter as `aurora.inject` would have put it there, in place.

    It is then a model for `aurora.save`, `aurora.merge`, bounds and so on; the PEFT model is used
    up. The adapter's tensors stay the same objects; `modules_to_save` become what `train=` keeps.

    Args:
        model: A PEFT model with adapters of ours.
        adapter_name: The adapter to keep; by default the active one.

    Returns:
        The base model.

    Raises:
        TypeError: If the adapters are another method's.
        ValueError: If there is no such adapter, several are active, or some are merged.
    """
    tuner = model.base_model
    if not isinstance(tuner, AuroraTuner):
        raise TypeError(f"not a PeftModel with adapters of AuroRA: {type(model).__name__}")
    active = tuner.active_adapters
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"name an adapter; active are: {', '.join(active) or 'none'}")
    with core.unchanged_on_error(tuner):
        return _take_out(tuner, adapter_name or active[0])


def _take_out(tuner: AuroraTuner, name: str) -> nn.Module:
    layers = {key: layer for key, layer in tuner._layers().items() if name in layer.configs}
    if not layers:
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(tuner.peft_config)}")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("some adapters are merged: unmerge_adapter() first")
    tuner.set_adapter(name)
    kept = []
    for key, head in _heads(tuner.model, name).items():
        kept += [core.join(key, n) for n, _ in head.named_parameters()]
    base: nn.Module = tuner.unload()
    for config in dict.fromkeys(layer.configs[name] for layer in layers.values()):
        same = {key for key, layer in layers.items() if layer.configs[name] == config}
        core.inject(base, _named(same), config, train=_exactly(kept))
    for key, layer in core.layers(base).items():
        layer.A, layer.B, layer.anl = layers[key].parts(name)
    return base


def _named(names: set[str]) -> core.Target:
    return lambda name, module: name in names


def _exactly(names: list[str]) -> str | None:
    """A regex that matches these names and no other; None if there are none."""
    return f"^(?:{'|'.join(map(re.escape, names))})$" if names else None


def _heads(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The modules that train as a whole with an adapter, by their names in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module.modules_to_save:
            found[name] = module.modules_to_save[adapter_name]
    return found


def from_aurora(model: nn.Module, adapter_name: str = "default", **options: Any) -> peft.PeftModel:
    """A PEFT model of one that `aurora.inject` or `aurora.load` adapted, with the same tensors.

    Args:
        model: A model with adapters of ours. It becomes the base of the PEFT model.
        adapter_name: What PEFT is to call the adapter.
        **options: Further ones of PEFT's configurations, such as `task_type="CAUSAL_LM"`.

    Returns:
        The PEFT model.

    Raises:
        ValueError: With the model as it was, if one PEFT configuration cannot describe it: its
            layers differ in more than rank and alpha, or `train=` kept some parameters of a
            module and not others.
    """
    layers = core.layers(model)
    config = _config_of(model, {name: layer.config for name, layer in layers.items()}, options)
    parts = {name: (layer.A, layer.B, layer.anl) for name, layer in layers.items()}
    with core.unchanged_on_error(model):
        core.remove(model)
        done = peft.get_peft_model(model, config, adapter_name)
    tuner: Any = done.base_model
    for name, wrapper in tuner._layers().items():
        A, B, wrapper.aurora_anl[adapter_name] = parts[name]
        wrapper.aurora_A[adapter_name].weight, wrapper.aurora_B[adapter_name].weight = A, B
        wrapper.set_adapter(wrapper.active_adapters)
    return done


def _config_of(
    model: nn.Module, configs: Mapping[str, core.AuroraConfig], options: Mapping[str, Any]
) -> AuroraPeftConfig:
    """The one configuration of PEFT's that describes these layers."""
    first = next(iter(configs.values()))
    made = AuroraPeftConfig(
        r=first.rank,
        alpha=first.alpha,
        target_modules=list(configs),
        rank_pattern={re.escape(n): c.rank for n, c in configs.items() if c.rank != first.rank},
        alpha_pattern={
            re.escape(n): float(c.scaling * c.rank)
            for n, c in configs.items()
            if c.alpha != first.alpha
        },
        modules_to_save=_whole_modules(model) or None,
        **{name: getattr(first, name) for name in _OPTIONS},
        **options,
    )
    for name, config in configs.items():
        if made.options(name) != config:
            raise ValueError(f"{name} has other options than {next(iter(configs))}: not for PEFT")
    return made


def _whole_modules(model: nn.Module) -> list[str]:
    """The modules that `train=` kept. ValueError if it kept some parameters of one, but not all."""
    found = core.ModelView.adapted(model).parameters.values()
    kept = {owned.tensor for owned in found if owned.key in owned.note.train}
    names = []
    for name, module in core.ModelView.of(model).modules.items():
        trains = [p in kept for p in module._parameters.values() if p is not None]
        if any(trains) and not all(trains):
            raise ValueError(f"some parameters of {name} train and others do not: not for PEFT")
        names += [name] if any(trains) else []
    return names


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put a saved adapter's values into one that is there, in place.

    Optimizers and compiled graphs stay valid. The arguments are those of
    `peft.utils.hotswap.hotswap_adapter`, which knows LoRA only.

    Args:
        model: A PEFT model, compiled or not.
        model_name_or_path: The saved adapter.
        adapter_name: The adapter to overwrite.
        torch_device: Where to read the file to; the CPU by default.
        **kwargs: Further ones for the download.

    Raises:
        ValueError: With the model as it was, if the layers differ, or an option that
            matters beyond training, or the adapter is merged.
    """
    model = getattr(model, "_orig_mod", model)
    path = str(model_name_or_path)
    config = AuroraPeftConfig.from_pretrained(path, **kwargs)
    given = load_peft_weights(path, device=torch_device or "cpu", **kwargs)
    wrong = _misfits(model, adapter_name, config, given)
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(f"{path} cannot take the place of adapter {adapter_name!r}:\n  {lines}")
    set_peft_model_state_dict(model, given, adapter_name=adapter_name)


def _misfits(
    model: nn.Module, adapter_name: str, config: AuroraPeftConfig, given: Mapping[str, Tensor]
) -> list[str]:
    """What keeps tensors and options from taking the place of an adapter's."""
    own = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    wrong = []
    names = {name for name in own.keys() | given.keys() if not name.endswith("._extra_state")}
    for key in sorted(names):
        theirs, ours = (tuple(x[key].shape) if key in x else "missing" for x in (given, own))
        if theirs != ours:
            wrong.append(f"{key}: {theirs} in the file, {ours} in the model")
    for name, layer in model.named_modules():
        if isinstance(layer, AuroraTunerLinear) and adapter_name in layer.configs:
            unlike = differences(layer.configs[adapter_name], config.options(name))
            if unlike:
                wrong.append(f"{name}: other options in the file: {', '.join(unlike)}")
            if adapter_name in layer.merged_adapters:
                wrong.append(f"{name} is merged: unmerge_adapter() first")
    return wrong


# ---- From aurora-peft --------------------------------------------------------------------------

# What it calls a tensor, beside our name. Its files keep the adapter's name, and grids, which are
# constants.
_AURORA_PEFT = (
    (r"\.aurora_lora_([AB])(?:\.[^.]+)?$", r".aurora_\1.weight"),
    (r"\.aurora_anl(?:\.[^.]+)?\.base_weight$", ".aurora_anl.H"),
    (r"\.aurora_anl(?:\.[^.]+)?\.spline_weight$", ".aurora_anl.spline_weight"),
    (r"\.modules_to_save\.[^.]+\.", "."),
)
# Options of the same name that mean the same. Its `base_activation` acts nowhere; its dropouts act
# in training only.
_SAME = [
    *("r", "alpha", "rank_pattern", "alpha_pattern", "grid_size", "spline_order"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
]


def convert_aurora_peft(
    source: str | os.PathLike[str], destination: str | os.PathLike[str]
) -> None:
    """Write a folder of aurora-peft's as one that `PeftModel.from_pretrained` reads here.

    The outputs are the same up to rounding. Its rank and module dropout are left out.

    Args:
        source: What `save_pretrained` of aurora-peft 0.1.5 wrote.
        destination: The folder to write, made if need be.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the folder is not aurora-peft's, or its file holds several adapters.
    """
    import safetensors.torch

    source, destination = Path(source), Path(destination)
    theirs = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    if theirs.get("peft_type") != "AURORA":
        raise ValueError(f"{source} is not aurora-peft's: peft_type {theirs.get('peft_type')!r}")
    tensors: dict[str, Tensor] = {}
    for key, tensor in safetensors.torch.load_file(source / "adapter_model.safetensors").items():
        if key.endswith(".grid"):
            continue
        for pattern, name in _AURORA_PEFT:
            key = re.sub(pattern, name, key)
        if key in tensors:
            raise ValueError(f"{source} holds several adapters; save them one by one")
        tensors[key] = tensor
    config = AuroraPeftConfig(**{key: theirs[key] for key in _SAME if key in theirs})
    config.save_pretrained(str(destination))
    path = destination / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})

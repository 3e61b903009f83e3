"""AuroRA under PEFT's public API: `get_peft_model`, `from_pretrained` and what builds on them.

    import peft
    from aurora.integrations.peft import AuroraPeftConfig

    model = peft.get_peft_model(model, AuroraPeftConfig(r=2, target_modules=["q_proj", "v_proj"]))

Importing this module registers the method under the type "AURORA_ADAPTERS", in memory: PEFT's enum
of types gains a member and its dictionaries an entry; no file is written. A program that only loads
saved adapters imports it too. Per layer and adapter, a state dict holds `aurora_A.weight`,
`aurora_B.weight`, `aurora_anl.H` and `aurora_anl.spline_weight`: the tensors `A`, `B`, `anl.H` and
`anl.spline_weight` of our own files. What PEFT's API rules out, and which of its versions are
supported: docs/compatibility.md.
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora import core

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
_OPTIONS = tuple(
    f.name for f in dataclasses.fields(core.AuroraConfig) if f.name not in ("rank", "alpha")
)


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
        mode, spline, fixed, learnable, activation: As in AuroraConfig.
        grid_size, spline_order, grid_range, dropout: As in AuroraConfig.
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
        return core.AuroraConfig(r, 2.0 * r if alpha is None else alpha, **own)


class AuroraTunerLinear(nn.Module, BaseTunerLayer):
    """A linear layer with any number of named adapters, whose outputs add up.

    x (..., in_features) -> (..., out_features), in the dtype of the base's output. `base_layer` is
    the layer as it was. By adapter name, `configs` holds the options, `scaling` the factor s,
    `aurora_A` and `aurora_B` modules whose `weight` is A (r, in_features) and B (out_features, r),
    and `aurora_anl` the nonlinear layers; all in float32, or float64 over a float64 base.
    """

    base_layer: Any
    aurora_A: Any
    aurora_B: Any
    aurora_anl: Any
    _unmerged: Any
    adapter_layer_names = ("aurora_A", "aurora_B", "aurora_anl")
    other_param_names = ("configs", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: core.AuroraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        features = core.linear_features(self.get_base_layer())
        if features is None:
            raise TypeError(f"AuroRA adapts linear layers, got a {type(base_layer).__name__}")
        self.in_features, self.out_features = features
        self.aurora_A, self.aurora_B, self.aurora_anl = (nn.ModuleDict() for _ in range(3))
        self.configs: dict[str, core.AuroraConfig] = {}
        self.scaling: dict[str, float] = {}
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
        self.scaling[adapter_name] = config.alpha / config.rank
        nn.init.kaiming_uniform_(self.aurora_A[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.aurora_B[adapter_name].weight)
        self.set_adapter(self.active_adapters)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where adapters belong: by the base's weight, or where accelerate runs that base."""
        base: Any = self.get_base_layer()
        like = next(base.parameters(), torch.empty(()))
        hook: Any = getattr(base, "_hf_hook", None)
        device = hook.execution_device if getattr(hook, "offload", False) else like.device
        return torch.device(device), core._wide(like)

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
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        if adapter_names is not None:
            return self._mixed(out, x, adapter_names)
        for name in () if self.merged else self.active_adapters:
            if name in self.configs:
                out = self._adapted(out, x, name)
        return out

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
        """`out + s B sigma(A x)`, as `core.AuroraLinear` computes it."""
        config, scale, anl = self.configs[name], self.scaling[name], self.aurora_anl[name]
        x, static = F.dropout(x, config.dropout, self.training), config.mode == "static"
        A = self.aurora_A[name].weight
        down = anl.columns(A, scale) if static else A
        y = F.linear(x, down.to(x.dtype)).reshape(-1, config.rank)  # (N, r)
        y = y if static else anl.columns(y.t().contiguous(), scale).t()
        up = self.aurora_B[name].weight.t().to(out.dtype).contiguous()  # (r, out_features)
        return torch.addmm(out.reshape(-1, self.out_features), y.to(out.dtype), up).view_as(out)

    def config_in_use(self, adapter_name: str) -> core.AuroraConfig:
        """The options of an adapter, with the alpha that its scaling has now."""
        config, scale = self.configs[adapter_name], self.scaling[adapter_name]
        if scale == config.alpha / config.rank:
            return config
        return dataclasses.replace(config, alpha=scale * config.rank)

    def parts(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter, core.ANL]:
        """A, B and the nonlinear layer of an adapter."""
        A, B = (part[adapter_name].weight for part in (self.aurora_A, self.aurora_B))
        return A, B, self.aurora_anl[adapter_name]

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What a static merge adds: `s B sigma(A)`, sigma on each column of A."""
        A, B, anl = self.parts(adapter_name)
        update = B.to(core._wide(B)) @ anl.columns(A.to(core._wide(A)), self.scaling[adapter_name])
        return update.t() if type(self.get_base_layer()).__name__ == "Conv1D" else update

    @torch.no_grad()
    def merged_weight(self, adapter_names: Iterable[str]) -> Tensor:
        """The base's weight plus these adapters' updates, summed in float32 or wider.

        Raises ValueError if that is not finite.
        """
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight if self._unmerged is None else self._unmerged
        total: Tensor = weight.to(core._wide(weight))
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
            names = peft_config.target_modules
            peft_config.target_modules = {n for n in names if not _is_bypassed(model, n)}
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
        known = {name for layer in self._layers().values() for name in layer.configs} | {"__base__"}
        if unknown := sorted(set(names) - known):
            raise ValueError(
                f"adapter_names has {', '.join(unknown)}; the model has {', '.join(known)}"
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
        """Raise ValueError for a weight that is quantised, sharded, or tied to another module's."""
        used = [p for module in self.model.modules() for p in module._parameters.values()]
        for name, layer in self._layers().items():
            weight = layer.get_base_layer()._parameters.get("weight")
            plain = (
                type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta
            )
            if weight is None or not plain or weight.itemsize < 2:
                raise ValueError(
                    f"{name}.weight is quantised, sharded or on meta; merge into a plain copy"
                )
            if sum(p is weight for p in used) > 1:
                raise ValueError(
                    f"{name}.weight is tied to another module, which the merge would change; untie it"
                )

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
        method: str = "static",
        batches: Iterable[Any] | None = None,
        held_out: Iterable[Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The base model, plain again, with the adapters merged; the PEFT model is used up.

        For the report of a merge: `report = aurora.merge(to_aurora(model), "calibrated", batches)`.

        Args:
            progressbar, safe_merge: As PEFT has them; NaN is refused in any case.
            adapter_names: By default the active ones. "linear" and "calibrated" take one at a time.
            method, batches, held_out, options: As in `aurora.merge`.

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
        with _unchanged_on_error(self):
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
                'merge_and_unload(method="calibrated", batches=...) keeps it as well as a linear layer can',
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
        raise TypeError(f"{name} is a {type(base).__name__}, not linear: match other layers")
    if _is_bypassed(model, name):
        raise ValueError(f"{name}: its parent reads its weight and never calls it; exclude it")


def _is_bypassed(model: nn.Module, name: str) -> bool:
    above, _, key = name.rpartition(".")
    parent = model.get_submodule(above)
    # PyTorch's encoder layer does call its linears, once its fused evaluation is off.
    fused = (
        not isinstance(parent, nn.TransformerEncoderLayer)
        or torch.backends.mha.get_fastpath_enabled()
    )
    return fused and core._is_bypassed(type(parent), key)


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
    repeated = [name for name in names for _ in range(rows // len(names))]
    return args, {**kwargs, "adapter_names": repeated}


if _TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=PEFT_TYPE.lower(),
        config_cls=AuroraPeftConfig,
        model_cls=AuroraTuner,
        prefix=AuroraTuner.prefix,
    )


# --- Between PEFT's adapters and ours --------------------------------------------------------------------------------


def to_aurora(model: peft.PeftModel, adapter_name: str | None = None) -> nn.Module:
    """The base model with one adapter as `aurora.inject` would have put it there, for `aurora.save`, `merge` and so on.

    In place: the PEFT model is used up. The adapter's tensors stay the same objects; modules_to_save become what
    `train=` keeps. adapter_name: by default the active one.

    Raises TypeError if `model` has no adapters of ours, ValueError if it has none of that name, or several are active.
    """
    tuner = model.base_model
    if not isinstance(tuner, AuroraTuner):
        raise TypeError(f"not a PeftModel with adapters of AuroRA: {type(model).__name__}")
    name = adapter_name or _only_active(tuner)
    with _unchanged_on_error(tuner):
        return _take_out(tuner, name)


def _take_out(tuner: AuroraTuner, name: str) -> nn.Module:
    layers = {key: layer for key, layer in tuner._layers().items() if name in layer.configs}
    if not layers:
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(tuner.peft_config)}")
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
    tuner.set_adapter(name)
    kept = [
        f"{key}.{n}" for key, head in _heads(tuner.model, name) for n, _ in head.named_parameters()
    ]
    configs = {key: layer.config_in_use(name) for key, layer in layers.items()}
    base: nn.Module = tuner.unload()
    for config in dict.fromkeys(configs.values()):
        names = [key for key, its in configs.items() if its == config]
        core.inject(base, _exactly(names), config, train=_exactly(kept) if kept else None)
    for key, layer in core.layers(base).items():
        layer.A, layer.B, layer.anl = layers[key].parts(name)
    return base


@contextlib.contextmanager
def _unchanged_on_error(tuner: AuroraTuner) -> Iterator[None]:
    """An error in the block leaves the PEFT model as it was."""
    children = [(module, dict(module._modules)) for module in tuner.model.modules()]
    trained = [(p, p.requires_grad) for p in tuner.model.parameters()]
    active = tuner.active_adapter
    try:
        yield
    except BaseException:
        with contextlib.suppress(ValueError):  # nothing was injected yet
            core.remove(tuner.model)
        for module, found in children:
            module._modules.update(found)
        tuner.set_adapter(active)
        tuner.model.peft_config = tuner.peft_config
        for p, required in trained:
            p.requires_grad_(required)
        raise


def from_aurora(model: nn.Module, adapter_name: str = "default", **options: Any) -> peft.PeftModel:
    """A PeftModel from a model that `aurora.inject` or `aurora.load` adapted, in place, with the same tensors.

    options: further ones of PEFT's configurations, such as `task_type="CAUSAL_LM"`.

    Raises ValueError, with the model as it was, if one PEFT configuration cannot describe its layers: they differ in
    more than rank and alpha, or `train=` kept some parameters of a module and not others.
    """
    layers = core.layers(model)
    config = _config_of(model, {name: layer.config for name, layer in layers.items()}, options)
    parts = {name: (layer.A, layer.B, layer.anl) for name, layer in layers.items()}
    core.remove(model)
    done = peft.get_peft_model(model, config, adapter_name)
    for name, layer in done.base_model._layers().items():
        A, B, anl = parts[name]
        layer.aurora_A[adapter_name].weight, layer.aurora_B[adapter_name].weight = A, B
        layer.aurora_anl[adapter_name] = anl
        layer.set_adapter(layer.active_adapters)
    return done


def _only_active(tuner: AuroraTuner) -> str:
    active = tuner.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"one adapter has to be active or named; active are: {', '.join(active) or 'none'}"
        )
    return str(active[0])


def _heads(model: nn.Module, adapter_name: str) -> list[tuple[str, nn.Module]]:
    """The modules that train as a whole with an adapter, by the names they have in the base model."""
    found = [
        (name, m) for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)
    ]
    return [
        (name, m.modules_to_save[adapter_name])
        for name, m in found
        if adapter_name in m.modules_to_save
    ]


def _exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no other."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


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
        alpha_pattern={re.escape(n): c.alpha for n, c in configs.items() if c.alpha != first.alpha},
        modules_to_save=_whole_modules(model) or None,
        **{name: getattr(first, name) for name in _OPTIONS},
        **options,
    )
    for name, config in configs.items():
        if made.options(name) != config:
            raise ValueError(
                f"{name} has other options than {next(iter(configs))}, which PEFT cannot express"
            )
    return made


def _whole_modules(model: nn.Module) -> list[str]:
    """The modules that `train=` kept, each with all of its parameters; ValueError if it kept but some."""
    adapters = {
        p for layer in core.layers(model).values() for p in layer.adapter_parameters().values()
    }
    kept = {name: p for name, p in core.trained_parameters(model).items() if p not in adapters}
    names, heads = list(dict.fromkeys(name.rpartition(".")[0] for name in kept)), set(kept.values())
    for name in names:
        if any(p not in heads for p in model.get_submodule(name).parameters()):
            raise ValueError(
                f"some parameters of {name} train and others do not, which PEFT cannot express"
            )
    return names


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put a saved adapter's values into one that is there, in place: optimizers and compiled graphs stay valid.

    Arguments as in `peft.utils.hotswap.hotswap_adapter`, which knows LoRA only. The layers and every option but dropout
    must be the same. Raises ValueError, with the model as it was, if they are not, or if the adapter is merged.
    """
    model = getattr(model, "_orig_mod", model)
    path = str(model_name_or_path)
    config = AuroraPeftConfig.from_pretrained(path, **kwargs)
    given = load_peft_weights(path, device=torch_device or "cpu", **kwargs)
    own = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    wrong = [
        f"{key}: {_shape(given.get(key))} in the file, {_shape(own.get(key))} in the model"
        for key in sorted(own.keys() | given.keys())
        if _shape(own.get(key)) != _shape(given.get(key))
    ]
    for name, layer in model.named_modules():
        if isinstance(layer, AuroraTunerLinear) and adapter_name in layer.configs:
            same = dataclasses.replace(layer.configs[adapter_name], dropout=config.dropout)
            wrong += (
                [f"{name}: other options in the file than in the model"]
                if config.options(name) != same
                else []
            )
            wrong += (
                [f"{name} is merged: unmerge_adapter() first"]
                if adapter_name in layer.merged_adapters
                else []
            )
    if wrong:
        raise ValueError(
            f"{path} cannot take the place of adapter {adapter_name!r}:\n  " + "\n  ".join(wrong)
        )
    set_peft_model_state_dict(model, given, adapter_name=adapter_name)


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


# What aurora-peft 0.1.5 calls a tensor, beside our name. Its files keep the adapter's name; a grid is a constant.
_AURORA_PEFT = (
    (r"\.aurora_lora_([AB])(?:\.[^.]+)?$", r".aurora_\1.weight"),
    (r"\.aurora_anl(?:\.[^.]+)?\.base_weight$", ".aurora_anl.H"),
    (r"\.aurora_anl(?:\.[^.]+)?\.spline_weight$", ".aurora_anl.spline_weight"),
    (r"\.modules_to_save\.[^.]+\.", "."),
)
_SAME_IN_AURORA_PEFT = (
    *(
        "r",
        "alpha",
        "grid_size",
        "spline_order",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ),
    *(
        "layers_pattern",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "base_model_name_or_path",
        "task_type",
    ),
    *("revision", "inference_mode"),
)


def convert_aurora_peft(
    source: str | os.PathLike[str], destination: str | os.PathLike[str]
) -> None:
    """Write the folder that aurora-peft's `save_pretrained` made as one that `PeftModel.from_pretrained` reads here.

    The outputs are the same up to rounding. Its rank and module dropout, which act in training only, have no
    counterpart and are left out. Raises FileNotFoundError; ValueError if the folder is not aurora-peft's, or its file
    holds several adapters.
    """
    import safetensors.torch

    source, destination = Path(source), Path(destination)
    theirs = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    if theirs.get("peft_type") != "AURORA":
        raise ValueError(
            f"{source} is not a folder of aurora-peft's: its peft_type is {theirs.get('peft_type')!r}"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in safetensors.torch.load_file(source / "adapter_model.safetensors").items():
        if key.endswith(".grid"):
            continue
        for pattern, ours in _AURORA_PEFT:
            key = re.sub(pattern, ours, key)
        if key in tensors:
            raise ValueError(f"{source} holds several adapters; save them one by one")
        tensors[key] = tensor
    config = AuroraPeftConfig(**{key: theirs[key] for key in _SAME_IN_AURORA_PEFT if key in theirs})
    config.save_pretrained(str(destination))
    safetensors.torch.save_file(
        tensors, destination / "adapter_model.safetensors", {"format": "pt"}
    )

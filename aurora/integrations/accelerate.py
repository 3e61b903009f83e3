"""accelerate's offloading and device maps: adapters beside weights that come and go.

    model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    aurora.integrations.accelerate.inject(model, "all-linear", rank=2)

accelerate replaces `forward` on layers whose weights it keeps on the CPU or on disk, and an adapter
that is put in afterwards would be bypassed; `aurora.inject` refuses such layers. `inject` here puts
it inside of what accelerate does. The adapters stay on the device where the layer runs, and train.
Injecting first and offloading afterwards needs nothing of this, and is for inference: accelerate
then offloads the adapters too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aurora import core

try:
    from accelerate.hooks import ModelHook, add_hook_to_module
except ImportError as error:
    raise ImportError('this needs accelerate: pip install "aurora-adapters[accelerate]"') from error

# What accelerate puts on a layer.
_HOOKED = ("forward", "_old_forward", "_hf_hook")


class _Beside(ModelHook):  # type: ignore[misc]
    """A hook of accelerate's that sees the base's tensors alone, as before there was an adapter."""

    def __init__(self, hooked: dict[str, Any]) -> None:
        self.hooked, self.inner = hooked, hooked["_hf_hook"]

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        with _hidden_adapter(module):
            return self.inner.pre_forward(module, *args, **kwargs)

    def post_forward(self, module: Any, output: Any) -> Any:
        with _hidden_adapter(module):
            return self.inner.post_forward(module, output)

    def detach_hook(self, module: Any) -> Any:
        return self.inner.detach_hook(module)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # a copy that is being filled
            raise AttributeError(name)
        return getattr(self.inner, name)


@contextlib.contextmanager
def _hidden_adapter(layer: Any) -> Iterator[None]:
    parameters = {key: layer._parameters.pop(key) for key in ("A", "B")}
    anl = layer._modules.pop("anl")
    try:
        yield
    finally:
        layer._parameters.update(parameters)
        layer._modules["anl"] = anl


def inject(
    model: nn.Module,
    target: core.Target,
    rank: int | core.AuroraConfig = 2,
    *,
    train: str | None = None,
    **options: Any,
) -> core.Injection:
    """`aurora.inject` for a model that accelerate has dispatched or offloaded.

    Args:
        model: A model, parts of which may be offloaded.
        target: As for `aurora.inject`.
        rank: As for `aurora.inject`.
        train: As for `aurora.inject`.
        **options: As for `aurora.inject`.

    Returns:
        What `aurora.inject` returns.

    Raises:
        ValueError, TypeError: As `aurora.inject` does, with the model as it was.
    """
    hooked = {}
    for module in model.modules():
        if "_hf_hook" in module.__dict__ and core.linear_features(module):
            hooked[module] = {key: module.__dict__[key] for key in _HOOKED}
    with core.unchanged_on_error(model):
        for module in hooked:
            for key in _HOOKED:
                del module.__dict__[key]
        done = core.inject(model, target, rank, train=train, **options)
        for module, was in hooked.items():
            if isinstance(module, core.AuroraLinear):
                hook = _Beside(was)
                _materialise(module, _execution_device(was["_hf_hook"]))
                add_hook_to_module(module, hook)
            else:
                module.__dict__.update(was)
    return done


def remove(model: nn.Module) -> None:
    """`aurora.remove` for a model that `inject` here adapted: accelerate's hooks are as before.

    Args:
        model: A model with adapters.

    Raises:
        ValueError: If the model has no adapters. It is then as it was.
    """
    with core.unchanged_on_error(model):
        was = {}
        for layer in core.layers(model).values():
            hook = layer.__dict__.get("_hf_hook")
            if isinstance(hook, _Beside):
                was[layer] = hook.hooked
                for key in _HOOKED:
                    del layer.__dict__[key]
        core.remove(model)
        for layer, hooked in was.items():
            layer.__dict__.update(hooked)


def _execution_device(hook: Any) -> Any:
    """Where accelerate runs the layer; of several hooks in a row the first that says it."""
    hooks = getattr(hook, "hooks", [hook])
    named = (getattr(one, "execution_device", None) for one in hooks)
    return next((device for device in named if device is not None), "cpu")


@torch.no_grad()
def _materialise(layer: core.AuroraLinear, device: Any) -> None:
    """An adapter drawn beside an offloaded weight is on the meta device; draw it where it runs."""
    if layer.A.is_meta:
        for key in ("A", "B"):
            p = layer._parameters[key]
            assert p is not None
            empty = torch.empty_like(p, device=device)
            layer._parameters[key] = nn.Parameter(empty, p.requires_grad)
        layer.anl.to_empty(device=device)
        layer.reset_parameters()

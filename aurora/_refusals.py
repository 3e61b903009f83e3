"""What is known of modules that cannot be adapted: why, and what to do instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from aurora import core

_WHOLE = "train= trains it whole"


def explain(module: nn.Module, layer: nn.Module | None = None) -> str:
    """Why a module, or a layer in it, cannot be adapted, as the end of a sentence; or nothing."""
    why = _not_linear(module) if layer is None else _bypassed(module, layer)
    return f": {why}" if why else ""


def _not_linear(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "aurora.unfuse_attention(model) gives it layers that are"
    if isinstance(module, nn.RNNBase):
        return f"a kernel reads all its weights and calls no layer; {_WHOLE}"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return f"it looks up rows, so that there is no A x to bend; {_WHOLE}"
    if isinstance(module, _ConvNd):
        return f"it multiplies patches, and an adapter rows of features; {_WHOLE}"
    if "Expert" in kind:  # transformers 5 has one parameter (experts, out, in) for all of them
        others = "attention and shared experts can be adapted"
        return f"the weights of all experts are one tensor, and no layer is called; {others}"
    if kind.endswith("Router"):
        return f"it reads its weight and calls no layer; {_WHOLE}"
    return ""


def _bypassed(module: nn.Module, layer: nn.Module) -> str:
    unfuse = "aurora.unfuse_attention(model) first"
    encodes = isinstance(module, nn.TransformerEncoderLayer)
    attention: Any = module.self_attn if encodes else module
    if isinstance(attention, nn.MultiheadAttention) and "q_proj" not in attention._modules:
        if not encodes:
            return f"it reads the layer's weight; {unfuse}"
        # The encoder layer does call its linears, once its fused evaluation is off.
        if torch.backends.mha.get_fastpath_enabled():
            off = "torch.backends.mha.set_fastpath_enabled(False)"
            return f"its fused evaluation reads the layer's weight; {unfuse}, {off}"
    if _read_by_mamba(module, layer):
        return "Mamba's kernels read the layer's weight; in_proj can be adapted"
    return ""


def _read_by_mamba(module: nn.Module, layer: nn.Module) -> bool:
    """Mamba's kernels read some weights at any time, some in training only, or on a GPU only."""
    if not {"A_log", "D"} <= module._parameters.keys():
        return False
    calls_more = type(module).__name__ in ("JambaMambaMixer", "ZambaMambaMixer")
    reads = ["dt_proj"] if calls_more else ["dt_proj", "x_proj", "out_proj"]
    return any(module._modules.get(name) is layer for name in reads)


def register_parameter(self: core.AuroraLinear, name: str, param: nn.Parameter | None) -> None:
    """Refuse what `parallelize_module` puts in; FSDP2 puts its shards in by another way."""
    if type(param).__name__ == "DTensor":
        told = "adapters are not split by tensor parallelism: merge first, or use DDP or FSDP"
        raise ValueError(f"{type(self).__name__}: {told}")
    nn.Module.register_parameter(self, name, param)


core.explain = explain
core.AuroraLinear.register_parameter = register_parameter  # type: ignore[method-assign, assignment]

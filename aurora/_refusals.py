"""What is known of modules that cannot be adapted: why, and what to do instead."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from aurora import core

_WHOLE = "train= trains it whole"


def explain(module: nn.Module, key: str) -> str:
    """Why a module, or its linear layer of that name, cannot be adapted; "" if nothing is known."""
    why = _bypassed(module, key) if key else _not_linear(module)
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


def _bypassed(module: nn.Module, key: str) -> str:
    """Mamba's weights that its kernels read: some in training only, some on a GPU only."""
    calls_more = type(module).__name__ in ("JambaMambaMixer", "ZambaMambaMixer")
    reads = ["dt_proj"] if calls_more else ["dt_proj", "x_proj", "out_proj"]
    if {"A_log", "D"} <= module._parameters.keys() and key in reads:
        return "Mamba's kernels read its weight; in_proj can be adapted"
    return ""


def register_parameter(self: core.AuroraLinear, name: str, param: nn.Parameter | None) -> None:
    """Refuse what `parallelize_module` puts in; FSDP2 puts its shards in by another way."""
    if type(param).__name__ == "DTensor":
        told = "adapters are not split by tensor parallelism: merge first, or use DDP or FSDP"
        raise ValueError(f"{type(self).__name__}: {told}")
    nn.Module.register_parameter(self, name, param)


core.explain = explain
core.AuroraLinear.register_parameter = register_parameter  # type: ignore[method-assign, assignment]

"""`nn.MultiheadAttention` as four linear layers, which can be adapted like any other, and back.

    aurora.unfuse_attention(model)                       # q_proj, k_proj, v_proj beside out_proj
    aurora.inject(model, r"(q|v)_proj$", rank=2)
    ...                                                  # train, save and load as ever
    aurora.merge(model, "calibrated", batches)           # or aurora.remove(model)
    aurora.fuse_attention(model)                         # PyTorch's own module again

PyTorch's module keeps one matrix for queries, keys and values, and reads that of `out_proj` without
calling the layer, so that no adapter would ever run. Letters in shapes: N batch, L queries, S keys,
E width, h heads, d = E / h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora import core

_NAMES = ("q_proj", "k_proj", "v_proj")


def unfuse_attention(model: nn.Module) -> list[str]:
    """Give every `nn.MultiheadAttention` four linear layers: q_proj, k_proj, v_proj, out_proj.

    In place: the modules stay the same objects, with their hooks, and the new layers hold views of
    the same memory. Outputs differ by rounding only, as other kernels compute them: by some 1e-6 of
    their size in float32. Everything that the module takes is supported, but for nested tensors.
    State dicts keep PyTorch's names, `in_proj_weight` and `in_proj_bias`, in both directions, with
    the adapters' tensors beside them. Unfuse before `aurora.load` too, and before an optimizer is
    made; `fuse_attention` undoes it.

    Args:
        model: A model without adapters. Subclasses of `nn.MultiheadAttention` are left alone.

    Returns:
        The names of the modules.

    Raises:
        ValueError: With the model as it was, if it has no such module, has adapters already, is
            distributed already, or ties such a module's weights to another's.

    Example:
        >>> aurora.unfuse_attention(model)
        >>> aurora.inject(model, r"self_attention\\.(q|v)_proj$", rank=2)
    """
    found = _found(model, nn.MultiheadAttention, "to unfuse")
    core._refuse_distributed(model)
    for name, module in found.items():
        _refuse_tied(model, name, module)
    with core.unchanged_on_error(model):
        for module in found.values():
            _split(module)
        for stack in _packing(model):
            stack.__dict__["_aurora_nested"], stack.use_nested_tensor = True, False
    return list(found)


def fuse_attention(model: nn.Module) -> list[str]:
    """Undo `unfuse_attention`: PyTorch's own modules again, with what was merged into the layers.

    Call it after `aurora.remove` or `aurora.merge`. Parameters are the original objects, bit for
    bit, unless they were merged into, moved or cast meanwhile: then they are new ones.

    Args:
        model: A model that was unfused, without adapters.

    Returns:
        The names of the modules.

    Raises:
        ValueError: With the model as it was, if nothing in it was unfused, or it has adapters, of
            ours or another library's.
    """
    found = _found(model, UnfusedAttention, "that was unfused")
    for name, module in found.items():
        for layer in (module._modules[key] for key in _NAMES):
            if type(layer) is not _Projection:
                raise ValueError(f"a layer of {name or 'it'} is a {type(layer).__name__} now")
    with core.unchanged_on_error(model):
        for module in found.values():
            for name, whole in module.fused().items():
                trains = any(p.requires_grad for p in module.parts()[name])
                module._parameters[name] = whole.requires_grad_(trains)
            for name in _NAMES:
                del module._modules[name]
            del module.__dict__["_fused"]
            module.__class__ = nn.MultiheadAttention
        for stack in model.modules():
            if stack.__dict__.pop("_aurora_nested", False):
                cast(Any, stack).use_nested_tensor = True
    return list(found)


class UnfusedAttention(nn.MultiheadAttention):
    """What `unfuse_attention` makes of an `nn.MultiheadAttention`: equivalent, in four layers.

    It has no `in_proj_weight`, so that PyTorch's fused evaluation of encoder layers stays off.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    _fused: dict[str, nn.Parameter]  # the originals, by name

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, with the arguments, shapes and results of `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask is, and needs it")
        batched = query.dim() == 3
        q = self.q_proj(self._batch_first(query))  # (N, L, E)
        k = self._longer(self.k_proj(self._batch_first(key)), self.bias_k)  # (N, S, E)
        v = self._longer(self.v_proj(self._batch_first(value)), self.bias_v)
        # As PyTorch's own module does, trust the hint where nothing else needs the mask.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if causal else attn_mask, key_padding_mask, q.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)  # (N, h, L, S)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v  # (N, h, L, d)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (N, L, E)
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _batch_first(self, t: Tensor) -> Tensor:
        """An input in any layout as (N, L, E)."""
        if t.dim() == 2:
            return t.unsqueeze(0)
        return t if self.batch_first else t.transpose(0, 1)

    def _longer(self, t: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values (N, S, E), with one that is learned and one of zeros at their end."""
        if bias is not None:
            t = torch.cat([t, bias.expand(t.shape[0], -1, -1)], 1)
        return F.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _mask(
        self, given: Tensor | None, padding: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as numbers to add to (N, h, L, S); the keys added at the end are seen."""
        if padding is not None:
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        extra, total = int(self.bias_k is not None) + int(self.add_zero_attn), None
        for mask in (m for m in (given, padding) if m is not None):
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
            if mask.dim() == 3:
                mask = mask.view(-1, self.num_heads, *mask.shape[1:])
            mask = F.pad(mask.to(dtype), (0, extra))
            total = mask if total is None else total + mask
        return total

    def parts(self) -> dict[str, list[Tensor]]:
        """What PyTorch's module calls by one name, as the pieces that the layers hold."""
        layers = [self.q_proj, self.k_proj, self.v_proj]
        weights: list[Tensor] = [layer.weight for layer in layers]
        found = {"in_proj_weight": weights}
        if not self._qkv_same_embed_dim:
            found = {f"{name}_weight": [w] for name, w in zip(_NAMES, weights, strict=True)}
        biases = [layer.bias for layer in layers]
        if any(b is not None for b in biases):  # a merge may have given some layers one
            zero = weights[0].new_zeros(self.embed_dim)
            found["in_proj_bias"] = [zero if b is None else b for b in biases]
        return found

    def fused(self) -> dict[str, nn.Parameter]:
        """PyTorch's parameters: the original objects, or new ones where the memory is another."""
        found = {}
        for name, parts in self.parts().items():
            whole = self._fused.get(name)
            if whole is None or not _is_made_of(whole, parts):
                whole = nn.Parameter(torch.cat([p.detach() for p in parts]), parts[0].requires_grad)
            found[name] = whole
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnfusedAttention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What was moved or cast has memory of its own now; the original would only take up more.
        parts = self.parts()
        self._fused = {n: p for n, p in self._fused.items() if _is_made_of(p, parts[n])}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fused": {}}  # likewise in a copy

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, whole in self.fused().items():
            destination[prefix + name] = whole if keep_vars else whole.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for name, parts in self.parts().items():
            if prefix + name in state:
                pieces = state.pop(prefix + name).chunk(len(parts))
                kind = name.rpartition("_")[2]  # "weight" or "bias"
                layers = [name.removesuffix("_weight")] if len(parts) == 1 else _NAMES
                for layer, piece in zip(layers, pieces, strict=False):
                    state[f"{prefix}{layer}.{kind}"] = piece
        super()._load_from_state_dict(state, prefix, *args)


class _Projection(nn.Linear):
    """One of the new layers; in a state dict its weight and bias are under the attention's name."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            destination.pop(prefix + name, None)


def _found(model: nn.Module, kind: type[Any], told: str) -> dict[str, Any]:
    """The modules of exactly this class by name, each once; refuses a model with adapters."""
    view = core.ModelView.of(model)
    if view.layers:
        raise ValueError("the model has adapters: aurora.remove(model) or aurora.merge first")
    found: dict[str, Any] = {}
    for name, module in view.modules.items():
        if type(module) is kind and module not in found.values():
            found[name] = module
    if not found:
        raise ValueError(f"this {type(model).__name__} has no nn.MultiheadAttention {told}")
    return found


def _refuse_tied(model: nn.Module, name: str, attention: nn.Module) -> None:
    """Pieces of a matrix that another module uses too would be tied no longer."""
    for key, p in attention._parameters.items():
        owners = [m for m in model.modules() if any(p is q for q in m._parameters.values())]
        if p is not None and len(owners) > 1:
            label = core.join(name, key)
            raise ValueError(f"{label} is tied to another module: untie it before unfusing")


def _packing(model: nn.Module) -> Iterator[Any]:
    """Stacks that would pack padded rows into nested tensors, which fused layers alone can read."""
    for stack in model.modules():
        inner = any(isinstance(m, UnfusedAttention) for m in stack.modules())
        if isinstance(stack, nn.TransformerEncoder) and stack.use_nested_tensor and inner:
            yield stack


def _split(attention: nn.MultiheadAttention) -> None:
    """Turn the module into an `UnfusedAttention` whose layers hold views of its parameters."""
    table, width = attention._parameters, attention.embed_dim
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    fused = {name: p for name in names if (p := table.get(name)) is not None}
    inputs = (width, attention.kdim, attention.vdim)
    for i, (name, inner) in enumerate(zip(_NAMES, inputs, strict=True)):
        layer = _Projection(inner, width, bias=False, device="meta").train(attention.training)
        for key in ("weight", "bias"):
            if (whole := fused.get(f"in_proj_{key}")) is not None:
                piece = whole.detach()[i * width : (i + 1) * width]
                layer._parameters[key] = nn.Parameter(piece, whole.requires_grad)
        if "in_proj_weight" not in fused:
            layer._parameters["weight"] = fused[f"{name}_weight"]
        attention._modules[name] = layer
    for name in fused:
        table[name] = None  # keeps its place for the way back
    attention.__dict__["_fused"] = fused
    attention.__class__ = UnfusedAttention


def _is_made_of(whole: nn.Parameter, parts: list[Tensor]) -> bool:
    """Whether the parts are, one after the other, the very memory of the whole."""
    start = whole.data_ptr()
    for part in parts:
        if type(part) is not nn.Parameter or part.data_ptr() != start:
            return False
        start += part.numel() * part.itemsize
    return True

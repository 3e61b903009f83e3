"""Training steps of AuroRA and its peers, to be timed and counted, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import aurora
from benchmarks.lab import baselines
from benchmarks.lab.models import load_encoder, load_smollm2
from benchmarks.lab.needs import need

PEFT, PLAIN, OURS = "LoRA (PEFT)", "LoRA (plain)", "AuroRA"
BARE = "no adapters"
CHANNEL, RIVAL = "AuroRA per-channel", "aurora-peft"
CONTENDERS = (PEFT, PLAIN, OURS, CHANNEL)
QUERY_VALUE = r".*attention\.self\.(query|value)"


# --- Contenders -----------------------------------------------------------------------------------


def adapt(name: str, model: nn.Module, targets: str, rank: int, **options: Any) -> nn.Module:
    """The model with a contender's adapters in the layers that match, scaling 2.

    PEFT's kinds come wrapped. Of the options, AuroRA's, LoRA of PEFT has the dropout.
    """
    if name == PEFT:
        peft = need("peft")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            lora_dropout=options.get("dropout", 0.0),
        )
        return peft.get_peft_model(model, config)  # type: ignore
    if name == BARE:
        return model
    if name == RIVAL:
        theirs = need("aurora_peft")
        config = theirs.AuroraConfig(r=rank, alpha=2 * rank, target_modules=targets)
        return theirs.get_aurora_model(model, config)  # type: ignore[no-any-return]
    if name == PLAIN:
        baselines.inject_lora(model, targets, rank)
    else:
        spline: Any = "per-channel" if name == CHANNEL else "summed"
        aurora.inject(model, targets, rank, spline=spline, **options)
    return model


def one_layer(
    name: str,
    width: int,
    rank: int,
    out: int | None = None,
    options: Mapping[str, Any] | None = None,
    **where: Any,
) -> nn.Module:
    """A single adapted `nn.Linear`; the same seed for all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out or width, **where))
    return adapt(name, model, ".*0", rank, **(options or {}))


def make_step(
    name: str,
    *,
    width: int = 0,
    tokens: int = 2048,
    rank: int = 2,
    compiled: bool = False,
    out: int | None = None,
    device: str = "cpu",
    half: bool = False,
    **options: Any,
) -> Callable[[], object]:
    """A training step.

    Args:
        name: of the contender.
        width: of one layer, forward and backward; 0 for all-MiniLM-L6-v2 with AdamW, which reads 32
            texts of 32 tokens, query and value adapted.
        tokens: that the layer reads.
        rank: of the adapters.
        compiled: by torch.compile.
        out: outputs of the layer, as many as inputs unless given.
        device: of the layer.
        half: the base and its input are bfloat16.
        **options: further ones of AuroRA, for a layer; "dropout" is PEFT's too.
    """
    if not width:
        return _model_step(name, rank, compiled)
    where: Any = {"device": device, "dtype": torch.bfloat16 if half else torch.float32}
    model = one_layer(name, width, rank, out, options, **where)
    run = torch.compile(model, fullgraph=True) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(tokens, width, requires_grad=True, **where)
    upstream = torch.randn(tokens, out or width, **where)

    def step() -> None:
        run(x).backward(upstream)
        for p in (x, *trained):
            p.grad = None

    return step


def _model_step(name: str, rank: int, compiled: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    model = adapt(name, load_encoder()[0], QUERY_VALUE, rank).eval()
    if name == BARE:  # one small tensor below all layers, so that the gradient passes them all
        model.requires_grad_(False)
        model.get_submodule("embeddings.LayerNorm").requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (32, 32), generator=generator)
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        states = run(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        optimizer.zero_grad()
        states.square().mean().backward()
        optimizer.step()

    return step


def make_forward(
    name: str, width: int, tokens: int, rank: int, depth: int = 12
) -> Callable[[], object]:
    """Inference of `depth` layers, whose weights no cache can hold, as in a model."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    model = adapt(name, layers, r".*\d", rank).eval()
    x = torch.randn(tokens, width)

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def make_generation(name: str, tokens: int, rank: int = 2) -> Callable[[], object]:
    """SmolLM2-135M writes tokens, one by one, with adapters in all linear layers."""
    torch.manual_seed(0)
    targets = r".*(q|k|v|o|gate|up|down)_proj"
    model: Any = adapt(name, load_smollm2()[0], targets, rank).eval()
    ids = torch.arange(100, 116).unsqueeze(0)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def step() -> None:
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    return step


# --- Exact counts ---------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of one adapted layer: operators, views apart, forward and backward; bytes kept a token."""

    forward: int
    backward: int
    saved: float


class Operators(TorchDispatchMode):
    """Counts what is dispatched, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = (torch.ops.aten._unsafe_view, torch.ops.aten.detach)
        self.count += not (func.is_view or func.overloadpacket in views)
        return func(*args, **(kwargs or {}))


def count(name: str, width: int = 64, rank: int = 2) -> Counts:
    """Count on a small layer; the numbers do not depend on its size."""
    return count_layer(one_layer(name, width, rank), width)


def count_layer(layer: nn.Module, width: int) -> Counts:
    """Counts of a layer that reads (N, width).

    Its gradients exist already, so that their accumulation is counted.
    """
    x = torch.randn(16, width, requires_grad=True)
    for _ in range(2):
        with Operators() as forward:
            out = layer(x)
        upstream = torch.ones_like(out)
        with Operators() as backward:
            out.backward(upstream)
    few, many = (_saved_bytes(layer, torch.randn(n, width, requires_grad=True)) for n in (16, 48))
    return Counts(forward.count, backward.count, (many - few) / 32)


def _saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of `layer(x)` keeps beside x, the parameters and the output's memory."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    del out
    return sum(size for address, size in kept.items() if address not in own)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory that a step holds beside what it found, from the allocator's own events."""
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    every = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [event for event in every if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

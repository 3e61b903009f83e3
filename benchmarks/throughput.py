"""Speed and memory of training: what does the nonlinear layer cost beside LoRA, and what is left once merged?

Counts (operators, bytes kept for the backward) are exact and the same on any machine. Times are of contenders that take
turns in one run; the figure is the median over rounds of the ratio to PEFT's LoRA of the same rank and targets.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import aurora
from benchmarks import baselines, common
from benchmarks.common import need
from benchmarks.rival import Rival

PEFT, PLAIN, OURS, CHANNEL, RIVAL = "LoRA (PEFT)", "LoRA (plain)", "AuroRA", "AuroRA per-channel", "aurora-peft"
CONTENDERS = (PEFT, PLAIN, OURS, CHANNEL)
QUERY_VALUE = r".*attention\.self\.(query|value)"
LLAMA = {"q": (4096, 4096), "k": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)}


# --- Contenders ----------------------------------------------------------------------------------------------------


def adapt(name: str, model: nn.Module, targets: str, rank: int) -> nn.Module:
    """The model with a contender's adapters in the layers that match, scaling 2; PEFT's kinds come wrapped."""
    if name == PEFT:
        peft = need("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))  # type: ignore
    if name == RIVAL:
        theirs = need("aurora_peft")
        config = theirs.AuroraConfig(r=rank, alpha=2 * rank, target_modules=targets)
        return theirs.get_aurora_model(model, config)  # type: ignore[no-any-return]
    if name == PLAIN:
        baselines.inject_lora(model, targets, rank)
    else:
        spline = "per-channel" if name == CHANNEL else "summed"
        aurora.inject(model, targets, rank, alpha=2.0 * rank, spline=spline)
    return model


def one_layer(name: str, width: int, rank: int, out: int | None = None, **where: Any) -> nn.Module:
    """A single adapted `nn.Linear`; the same seed for all."""
    torch.manual_seed(0)
    return adapt(name, nn.Sequential(nn.Linear(width, out or width, **where)), ".*0", rank)


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
) -> Callable[[], object]:
    """A training step: of one layer if a width is given, forward and backward; else of all-MiniLM-L6-v2, with AdamW.

    The model reads 32 texts of 32 tokens, query and value adapted. half: the base and its input are bfloat16.
    """
    if not width:
        return _model_step(name, rank, compiled)
    where = {"device": device, "dtype": torch.bfloat16 if half else torch.float32}
    model = one_layer(name, width, rank, out, **where)
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
    model = adapt(name, common.load_encoder()[0], QUERY_VALUE, rank).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(1000, 20000, (32, 32), generator=torch.Generator().manual_seed(0))
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        states = run(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        optimizer.zero_grad()
        states.square().mean().backward()
        optimizer.step()

    return step


# --- Exact counts --------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of one adapted layer: operators that are not views, forward and backward, and bytes kept for every token."""

    forward: int
    backward: int
    saved: float


class _Operators(TorchDispatchMode):
    """Counts what is dispatched, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket in (torch.ops.aten._unsafe_view, torch.ops.aten.detach))
        return func(*args, **(kwargs or {}))


def count(name: str, width: int = 64, rank: int = 2) -> Counts:
    """Count on a small layer; the numbers do not depend on its size."""
    return count_layer(one_layer(name, width, rank), width)


def count_layer(layer: nn.Module, width: int) -> Counts:
    """Counts of a layer that reads (N, width); its gradients exist already, so that their accumulation is counted."""
    x = torch.randn(16, width, requires_grad=True)
    for _ in range(2):
        with _Operators() as forward:
            out = layer(x)
        upstream = torch.ones_like(out)
        with _Operators() as backward:
            out.backward(upstream)
    few, many = (_saved_bytes(layer, torch.randn(n, width, requires_grad=True)) for n in (16, 48))
    return Counts(forward.count, backward.count, (many - few) / 32)


def _saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of `layer(x)` keeps alive beside x, the parameters and the output's own memory."""
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# --- Times ---------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratios(steps: Mapping[str, Callable[[], object]], rounds: int, against: str = PEFT) -> dict[str, str]:
    """Median ratio to `against`, with the quartiles over rounds, of every step."""
    times = common.interleave(steps, rounds)
    return {name: quartiles(times[name], times[against]) for name in times}


def quartiles(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of two paired series, and their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def against_rival(rival: Rival, rounds: int, **arguments: Any) -> str:
    """Our training step over aurora-peft's, the two taking turns in two processes."""
    ours, times = make_step(OURS, **arguments), ([], [])  # type: ignore[var-annotated]
    for turn in range(rounds + 3):
        for side in (0, 1) if turn % 2 else (1, 0):
            taken = rival.ask("step", **arguments) if side else seconds(ours)
            times[side].append(taken)
    return quartiles(times[0][3:], times[1][3:])


def merged_forward(rounds: int) -> str:
    """The forward of a model that was adapted and merged, over that of one that never was."""
    torch.manual_seed(0)
    plain, merged = (common.load_encoder()[0] for _ in range(2))
    aurora.inject(merged, QUERY_VALUE)
    aurora.merge(merged)
    ids = torch.randint(1000, 20000, (32, 32))

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    steps = {"plain": functools.partial(forward, plain), "merged": functools.partial(forward, merged)}
    return ratios(steps, rounds, "plain")["merged"]


def inject_seconds() -> float:
    """Median seconds of `inject` into a LLaMA-3-8B on the meta device, 160 layers."""
    transformers = need("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        done = aurora.inject(model, r"(q|k|v|up|down)_proj")
        taken.append(time.perf_counter() - start)
        assert len(done.layers) == 160
        aurora.remove(model)
    return statistics.median(taken)


def import_seconds() -> float:
    """Median seconds of `import aurora` after `import torch`, in fresh interpreters."""
    code = "import time, torch; start = time.perf_counter(); import aurora; print(time.perf_counter() - start)"
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=root) for _ in range(7)]
    return statistics.median(float(run.stdout) for run in runs)


@contextlib.contextmanager
def recompilations() -> Iterator[list[int]]:
    """Counts, in the list's one element, how often a graph is compiled inside the block."""
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    found = [0]
    yield found
    found[0] = counters["unique_graphs"] - before


# --- The report ----------------------------------------------------------------------------------------------------


def counts_table(rival: Rival | None) -> str:
    """Operators and bytes by contender."""
    found = {name: count(name) for name in CONTENDERS}
    if rival is not None:
        found[RIVAL] = Counts(*rival.ask("count"))
    rows = [[name, c.forward, c.backward, f"{c.saved:.0f}"] for name, c in found.items()]
    return common.markdown_table(["per adapted layer, rank 2", "operators, forward", "backward", "bytes a token"], rows)


def times_table(rival: Rival | None, rounds: int, compiled: bool) -> str:
    """Ratios of training steps to PEFT's LoRA, and to aurora-peft."""
    places: dict[str, dict[str, Any]] = {
        "all-MiniLM-L6-v2, 32 x 32 tokens": {},
        "one 768 x 768, 2048 tokens": {"width": 768},
    }
    rows = []
    for place, arguments in places.items():
        found = ratios({name: make_step(name, **arguments) for name in CONTENDERS}, rounds)
        rows.append([place, *(found[name] for name in CONTENDERS[1:]), *_rival_cell(rival, rounds, arguments)])
        if compiled:
            with recompilations() as graphs:
                steps = {name: make_step(name, compiled=True, **arguments) for name in CONTENDERS}
                found = ratios(steps, rounds)
            assert graphs[0] == len(CONTENDERS), f"{graphs[0]} graphs for {len(CONTENDERS)} compiled models"
            rows.append([f"{place}, compiled", *(found[name] for name in CONTENDERS[1:]), "-"])
    header = [f"training step over {PEFT}", *CONTENDERS[1:], f"AuroRA over {RIVAL}"]
    return common.markdown_table(header, rows)


def _rival_cell(rival: Rival | None, rounds: int, arguments: dict[str, Any]) -> list[str]:
    return ["-" if rival is None else against_rival(rival, rounds, **arguments)]


def gpu_table(rounds: int) -> str:
    """LLaMA-3-8B's layers on the GPU, base in bfloat16, 8192 tokens: eager, compiled, and captured in a CUDA graph."""
    rows = []
    for layer, (width, out) in LLAMA.items():
        arguments: dict[str, Any] = {"width": width, "out": out, "tokens": 8192, "device": "cuda", "half": True}
        cells = []
        for compiled in (False, True):
            steps = {name: make_step(name, compiled=compiled, **arguments) for name in (PEFT, OURS)}
            cells.append(ratios(steps, rounds)[OURS])
        graph, step = torch.cuda.CUDAGraph(), make_step(OURS, **arguments)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # capture wants a warm-up on a side stream
            step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        rows.append([f"{layer}, {width} -> {out}", *cells, "captured and replayed"])
    return common.markdown_table(
        [f"{torch.cuda.get_device_name()}, AuroRA over {PEFT}", "eager", "compiled", "CUDA graph"], rows
    )


class Point(NamedTuple):
    """One place of the sweep: ratios of time to PEFT's LoRA, and peak bytes of a step, by contender."""

    value: int
    time: dict[str, float]
    peak: dict[str, int]


def sweep(axis: str, values: Sequence[int], rounds: int) -> list[Point]:
    """Training steps of one layer along width, tokens or rank, the others at 768, 2048 and 2."""
    points = []
    for value in values:
        arguments = {"width": 768, "tokens": 2048, "rank": 2} | {axis: value}
        steps = {name: make_step(name, **arguments) for name in (PEFT, PLAIN, OURS)}  # type: ignore[arg-type]
        times = common.interleave(steps, rounds)
        points.append(
            Point(
                value,
                {name: common.median_ratio(times, name, PEFT) for name in steps},
                {name: peak_bytes(step) for name, step in steps.items()},
            )
        )
    return points


def sweep_table(axis: str, points: Sequence[Point]) -> str:
    """One row a point."""
    rows = [
        [p.value, *(f"{p.time[n]:.3f}" for n in (PLAIN, OURS)), *(f"{p.peak[n] / 2**20:.1f}" for n in p.peak)]
        for p in points
    ]
    header = [axis, f"{PLAIN}, time", f"{OURS}, time", *(f"{n}, peak MiB" for n in points[0].peak)]
    return common.markdown_table(header, rows)


def draw(path: Path, sweeps: Mapping[str, Sequence[Point]]) -> None:
    """Time over PEFT's LoRA along every axis."""
    with common.picture(path, columns=len(sweeps)) as axes:
        for axes_, (axis, points) in zip(axes, sweeps.items(), strict=True):
            for name in (PEFT, PLAIN, OURS):
                axes_.plot([p.value for p in points], [p.time[name] for p in points], "o-", label=name)
            axes_.set(xscale="log", xlabel=axis, ylabel=f"training step over {PEFT}")
            axes_.set_xticks([p.value for p in points], [str(p.value) for p in points])
            axes_.minorticks_off()
        axes[0].legend()


SWEEPS = {
    "width": (256, 512, 768, 1024, 2048, 4096),
    "tokens": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "rank": (1, 2, 4, 8, 16, 32, 64),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks throughput", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--rounds", type=int, default=40, help="rounds of every comparison (default: %(default)s)")
    add("--no-rival", action="store_true", help=f"leave out {RIVAL}, which needs a network once")
    add("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler and minutes")
    add(
        "--quick",
        action="store_true",
        help="4 rounds, neither of the two, two places of every sweep, to a folder `quick`",
    )
    add(
        "--out",
        type=Path,
        default=Path("docs/results"),
        help="folder for throughput.md and .png (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if options.quick:
        options.rounds, options.no_rival, options.no_compile = 4, True, True
        options.out /= "quick"
    return options


def main(argv: Sequence[str]) -> None:
    """Run the benchmark: print the tables, write them and the picture to `--out`."""
    options = parse(argv)
    common.use_all_cores()
    parts = []
    with contextlib.nullcontext() if options.no_rival else Rival() as rival:
        for part in (counts_table(rival), times_table(rival, options.rounds, not options.no_compile)):
            print(part, end="\n\n", flush=True)
            parts.append(part)
    single = [
        ["forward of the merged model over the never adapted", merged_forward(options.rounds)],
        ["`inject` into LLaMA-3-8B on the meta device, 160 layers", f"{inject_seconds():.3f} s"],
        ["`import aurora` after `import torch`", f"{1000 * import_seconds():.1f} ms"],
    ]
    parts.append(common.markdown_table(["one figure each", "measured"], single))
    print(parts[-1], end="\n\n", flush=True)
    if torch.cuda.is_available():
        parts.append(gpu_table(options.rounds))
        print(parts[-1], end="\n\n", flush=True)
    sweeps = {}
    for axis, values in SWEEPS.items():
        ends = (values[0], values[-2]) if options.quick else values
        sweeps[axis] = sweep(axis, ends, max(2, options.rounds // 4))
        parts.append(sweep_table(axis, sweeps[axis]))
        print(parts[-1], end="\n\n", flush=True)
    draw(options.out / "throughput.png", sweeps)
    path = common.write_report(options.out, "throughput", "Speed and memory of training", [*READING, *parts])
    print(f"written to {path}; {common.machine()}")


READING = (
    "Operators: what PyTorch dispatches for one adapted layer and its base, views apart, with the accumulation of "
    "gradients. Bytes a token: what the graph keeps for the backward beside input and parameters. Times: contenders "
    "take turns; the median over rounds of the ratio, in brackets its quartiles. Peak: the most memory one training "
    "step holds beside parameters and input. Float32, scaling 2, no dropout.",
)

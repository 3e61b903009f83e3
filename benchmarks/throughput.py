"""Speed and memory of training: what does the nonlinear layer cost beside LoRA, and once merged?

Counts (operators, bytes kept for the backward) are exact and the same on any machine. Times are of
contenders that take turns in one run; the figure is the median over rounds of the ratio to PEFT's
LoRA of the same rank and targets.
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

import numpy as np
import torch
from torch import nn

import aurora
from benchmarks.lab import options as command
from benchmarks.lab.models import load_encoder
from benchmarks.lab.needs import need
from benchmarks.lab.report import machine, markdown_table, picture, use_all_cores, write_report
from benchmarks.lab.rival import Rival
from benchmarks.lab.settings import FIXED
from benchmarks.lab.steps import (
    BARE,
    CHANNEL,
    CONTENDERS,
    OURS,
    PEFT,
    QUERY_VALUE,
    RIVAL,
    Counts,
    count,
    make_forward,
    make_generation,
    make_step,
    peak_bytes,
)
from benchmarks.lab.timing import (
    interleave,
    keep_memory,
    median_ratio,
    quartiles,
    ratios,
    second_of_two,
)

LLAMA = {"q": (4096, 4096), "k": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)}


# --- Times ----------------------------------------------------------------------------------------


def against_rival(rival: Rival | None, rounds: int, call: str = "step", **arguments: Any) -> str:
    """Our time over aurora-peft's, the two taking turns in two processes.

    call: "step" for a training step, "forward" for inference.
    """
    if rival is None:
        return "-"
    step = (make_step if call == "step" else make_forward)(OURS, **arguments)
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds + 3):
        if turn % 2:
            ours.append(second_of_two(step))
        rival.ask(call, **arguments)
        theirs.append(rival.ask(call, **arguments))
        if not turn % 2:
            ours.append(second_of_two(step))
    return quartiles(ours[3:], theirs[3:])


def merged_forward(rounds: int) -> str:
    """The forward of a model that was adapted and merged, over that of one that never was."""
    torch.manual_seed(0)
    plain, merged = (load_encoder()[0] for _ in range(2))
    aurora.inject(merged, QUERY_VALUE)
    aurora.merge(merged)
    ids = torch.randint(1000, 20000, (32, 32))

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    models = {"plain": plain, "merged": merged}
    steps = {name: functools.partial(forward, model) for name, model in models.items()}
    return ratios(steps, rounds, "plain")["merged"]


def inject_seconds() -> float:
    """Median seconds of `inject` into a LLaMA-3-8B on the meta device, 160 layers."""
    transformers = need("transformers")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = transformers.LlamaConfig(num_key_value_heads=8, vocab_size=128256, **sizes)
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
    lines = ("import time, torch", "start = time.perf_counter()", "import aurora")
    code = "; ".join([*lines, "print(time.perf_counter() - start)"])
    start = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    root = Path(__file__).resolve().parents[1]
    runs = [start([sys.executable, "-c", code], cwd=root) for _ in range(7)]
    return statistics.median(float(run.stdout) for run in runs)


@contextlib.contextmanager
def recompilations() -> Iterator[list[int]]:
    """Counts, in the list's one element, how often a graph is compiled inside the block."""
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    found = [0]
    yield found
    found[0] = counters["unique_graphs"] - before


# --- The report -----------------------------------------------------------------------------------


def counts_table(rival: Rival | None) -> str:
    """Operators and bytes by contender."""
    found = {name: count(name) for name in CONTENDERS}
    if rival is not None:
        found[RIVAL] = Counts(*rival.ask("count"))
    rows = [[name, c.forward, c.backward, f"{c.saved:.0f}"] for name, c in found.items()]
    header = ["per adapted layer, rank 2", "operators, forward", "backward", "bytes a token"]
    return markdown_table(header, rows)


COMPILED: dict[str, dict[str, Any]] = {
    "all-MiniLM-L6-v2, 32 x 32 tokens": {},
    "one 768 x 768, 2048 tokens": {"width": 768},
}
PLACES: dict[str, dict[str, Any]] = COMPILED | {
    "one 768 x 768, 256 tokens": {"width": 768, "tokens": 256},
    "one 768 x 768, 2048 tokens, rank 16": {"width": 768, "rank": 16},
    "one 768 x 768, 2048 tokens, rank 32": {"width": 768, "rank": 32},
    "one 768 x 768, 2048 tokens, rank 64": {"width": 768, "rank": 64},
}


def times_table(rival: Rival | None, rounds: int, compiled: bool) -> str:
    """Ratios of training steps to PEFT's LoRA, and to aurora-peft."""
    rows = []
    for place, arguments in PLACES.items():
        beside = against_rival(rival, rounds, **arguments)
        rows.append([place, *_over_peft(rounds, arguments), beside])
        if compiled and place in COMPILED:
            with recompilations() as graphs:
                cells = _over_peft(rounds, arguments | {"compiled": True})
            expected = f"{graphs[0]} graphs for {len(CONTENDERS)} compiled models"
            assert graphs[0] == len(CONTENDERS), expected
            rows.append([f"{place}, compiled", *cells, "-"])
    header = [f"training step over {PEFT}", *CONTENDERS[1:], f"AuroRA over {RIVAL}"]
    return markdown_table(header, rows)


def _over_peft(rounds: int, arguments: Mapping[str, Any]) -> list[str]:
    found = ratios({name: make_step(name, **arguments) for name in CONTENDERS}, rounds, PEFT)
    return [found[name] for name in CONTENDERS[1:]]


# Width, tokens and rank.
FEW = ((768, 1, 2), (768, 1, 16), (2048, 1, 2), (768, 4, 16), (768, 16, 2))


def inference_table(rival: Rival | None, rounds: int, generated: int) -> str:
    """Few tokens without gradients, through twelve layers, and SmolLM2 as it writes."""
    rows = []
    for width, tokens, rank in FEW:
        arguments = {"width": width, "tokens": tokens, "rank": rank}
        steps = {name: make_forward(name, **arguments) for name in CONTENDERS}
        found = ratios(steps, 5 * rounds, PEFT)
        place = f"{width} x {width}, {tokens} token{'s' * (tokens > 1)}, rank {rank}"
        beside = against_rival(rival, 5 * rounds, "forward", **arguments)
        rows.append([place, *(found[name] for name in CONTENDERS[1:]), beside])
    if generated:
        steps = {name: make_generation(name, generated) for name in CONTENDERS}
        found = ratios(steps, max(3, rounds // 2), PEFT)
        place = f"SmolLM2-135M, all linear layers, {generated} tokens generated"
        rows.append([place, *(found[name] for name in CONTENDERS[1:]), "-"])
    header = [f"inference over {PEFT}", *CONTENDERS[1:], f"AuroRA over {RIVAL}"]
    return markdown_table(header, rows)


def overhead(rival: Rival | None, rounds: int) -> str:
    """What adapters add to a training step of MiniLM, 1024 tokens, over what PEFT's LoRA adds."""
    steps = {name: make_step(name) for name in (BARE, *CONTENDERS)}
    added = _added(steps, rounds)
    if rival is not None:  # by itself: threads of another process go on for a while
        added |= _added({BARE: steps[BARE], RIVAL: functools.partial(rival.ask, "step")}, rounds)
    cells = [f"{1000 * taken:.1f} ({taken / added[PEFT]:.2f})" for taken in added.values()]
    rows = [["all-MiniLM-L6-v2, 32 x 32 tokens", *cells]]
    return markdown_table([f"ms that adapters add to a step (over {PEFT})", *added], rows)


def _added(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds that each step takes longer than the one without adapters."""
    taken = interleave(steps, rounds)
    gaps = {name: np.subtract(taken[name], taken[BARE]) for name in steps if name != BARE}
    return {name: float(np.median(gap)) for name, gap in gaps.items()}


def fixed_table(rounds: int) -> str:
    """Training steps between fixed projections of rank 32, over PEFT's LoRA of rank 8."""
    rows, options = [], {name: value for name, value in FIXED.items() if name != "spline"}
    for tokens in (256, 2048):
        steps = {PEFT: make_step(PEFT, width=768, tokens=tokens, rank=8)}
        for name in (OURS, CHANNEL):
            steps[name] = make_step(name, width=768, tokens=tokens, rank=32, **options)
        found = ratios(steps, rounds, PEFT)
        rows.append([f"one 768 x 768, {tokens} tokens", found[OURS], found[CHANNEL]])
    header = [f"fixed projections, rank 32, over {PEFT} of rank 8", OURS, CHANNEL]
    return markdown_table(header, rows)


def dropout_table(rounds: int) -> str:
    """Training steps with dropout on the adapters' input, over PEFT's LoRA with the same."""
    rows, names = [], (PEFT, OURS, CHANNEL)
    for tokens, rank in ((256, 2), (2048, 2), (2048, 16)):
        arguments: dict[str, Any] = {"width": 768, "tokens": tokens, "rank": rank, "dropout": 0.1}
        steps = {name: make_step(name, **arguments) for name in names}
        found = ratios(steps, rounds, PEFT)
        peaks = [f"{peak_bytes(step) / 2**20:.1f}" for step in steps.values()]
        place = f"one 768 x 768, {tokens} tokens, rank {rank}"
        rows.append([place, found[OURS], found[CHANNEL], *peaks])
    peaks = [f"{name}, peak MiB" for name in names]
    return markdown_table([f"dropout 0.1, over {PEFT}", OURS, CHANNEL, *peaks], rows)


def grid_table(rounds: int) -> str:
    """Training steps of a 768 x 768 layer with 2048 tokens on finer grids, over the grid of 5."""
    rows = []
    for name in (OURS, CHANNEL):
        steps = {str(g): make_step(name, width=768, grid_size=g) for g in (5, 100, 1000)}
        found = ratios(steps, rounds, "5")
        for grid, step in steps.items():
            rows.append([f"{name}, {grid} cells", found[grid], f"{peak_bytes(step) / 2**20:.1f}"])
    return markdown_table(["grid", "time over 5 cells", "peak MiB"], rows)


def memory_table(rival: Rival | None, tokens: int) -> str:
    """Peak memory of a training step: very many tokens, and high rank."""
    places = ({"width": 16, "tokens": tokens, "rank": 2}, {"width": 768, "rank": 64})
    rows = []
    for arguments in places:
        found = [peak_bytes(make_step(name, **arguments)) for name in CONTENDERS]
        found += [] if rival is None else [rival.ask("peak", **arguments)]
        width, many = arguments["width"], arguments.get("tokens", 2048)
        place = f"{width} x {width}, {many:,} tokens, rank {arguments['rank']}"
        rows.append([place, *(f"{size / 2**20:.1f}" for size in found)])
    header = ["peak MiB", *CONTENDERS, *([] if rival is None else [RIVAL])]
    return markdown_table(header, rows)


def gpu_table(rounds: int, device: str) -> str:
    """LLaMA-3-8B's layers on the GPU: eager, compiled, and captured in a CUDA graph.

    The base is in bfloat16 and reads 1 to 8192 tokens. A CPU takes a 16th of each, and neither
    compiles nor captures, so that these lines are known to work.
    """
    gpu = device == "cuda"
    shrink = 1 if gpu else 16
    rows = []
    for layer, (width, out) in LLAMA.items():
        for tokens in (1, 256, 8192):
            where: dict[str, Any] = {"width": width // shrink, "out": out // shrink}
            where |= {"tokens": max(1, tokens // shrink), "device": device, "half": True}
            cells = ["-", "-", "-"]
            for i, compiled in enumerate((False, True) if gpu else (False,)):
                steps = {name: make_step(name, compiled=compiled, **where) for name in (PEFT, OURS)}
                cells[i] = ratios(steps, rounds, PEFT)[OURS]
            if gpu:
                _capture(where)
                cells[2] = "captured and replayed"
            rows.append([f"{layer}, {width} -> {out}, {tokens} tokens", *cells])
    name = torch.cuda.get_device_name() if gpu else f"CPU, widths and tokens / {shrink}"
    header = [f"{name}, AuroRA over {PEFT}", "eager", "compiled", "CUDA graph"]
    return markdown_table(header, rows)


def _capture(arguments: Mapping[str, Any]) -> None:
    """Capture our training step in a CUDA graph and replay it."""
    graph, step = torch.cuda.CUDAGraph(), make_step(OURS, **arguments)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # capture wants a warm-up on a side stream
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    graph.replay()


class Axis(NamedTuple):
    """One thing that is varied, and the values it takes, in training or in inference.

    The others are at width 768 and rank 2, and at 2048 tokens in training, one in inference.
    """

    name: str
    values: tuple[int, ...]
    training: bool

    @property
    def label(self) -> str:
        """Both, in words."""
        return f"{'training' if self.training else 'inference'}, by {self.name}"

    def step(self, contender: str, value: int) -> Callable[[], object]:
        """What a contender does at one value."""
        tokens = 2048 if self.training else 1
        arguments: dict[str, Any] = {"width": 768, "tokens": tokens, "rank": 2, self.name: value}
        return (make_step if self.training else make_forward)(contender, **arguments)


AXES = (
    Axis("width", (256, 512, 768, 1024, 2048, 4096), True),
    Axis("tokens", (16, 64, 256, 1024, 2048, 4096, 16384), True),
    Axis("rank", (1, 2, 4, 8, 16, 32, 64), True),
    Axis("tokens", (1, 4, 16, 64, 256, 1024), False),
    Axis("rank", (1, 2, 4, 8, 16, 32, 64), False),
)


class Point(NamedTuple):
    """One value, by contender: the ratio of time to PEFT's LoRA, peak bytes of a training step."""

    value: int
    time: dict[str, float]
    peak: dict[str, int]


def sweep(axis: Axis, values: Sequence[int], rounds: int) -> list[Point]:
    """Time and memory along an axis."""
    points = []
    for value in values:
        steps = {name: axis.step(name, value) for name in CONTENDERS}
        taken = interleave(steps, rounds)
        time_ = {name: median_ratio(taken, name, PEFT) for name in steps}
        peak = {name: peak_bytes(step) for name, step in steps.items() if axis.training}
        points.append(Point(value, time_, peak))
    return points


def sweep_table(axis: Axis, points: Sequence[Point]) -> str:
    """One row a point."""
    rows = []
    for p in points:
        times = [f"{p.time[name]:.3f}" for name in CONTENDERS[1:]]
        rows.append([p.value, *times, *(f"{size / 2**20:.1f}" for size in p.peak.values())])
    peaks = [f"{name}, peak MiB" for name in points[0].peak]
    times = [f"{name}, time" for name in CONTENDERS[1:]]
    return markdown_table([axis.label, *times, *peaks], rows)


def draw(path: Path, sweeps: Mapping[Axis, Sequence[Point]]) -> None:
    """Time over PEFT's LoRA along every axis."""
    with picture(path, columns=len(sweeps)) as axes:
        for axes_, (axis, points) in zip(axes, sweeps.items(), strict=True):
            values = [p.value for p in points]
            for name in CONTENDERS:
                axes_.plot(values, [p.time[name] for p in points], "o-", label=name)
            axes_.set(xscale="log", title=axis.label, xlabel=axis.name)
            axes_.set_xticks(values, [str(value) for value in values])
            axes_.minorticks_off()
        axes[0].set_ylabel(f"time over {PEFT}")
        axes[0].legend()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    quick = "4 rounds, neither of the two, no generation, two places of every sweep"
    parser = command.parser("throughput", __doc__, quick)
    add = parser.add_argument
    add("--rounds", type=int, default=40, help="rounds of every comparison (default: %(default)s)")
    add("--no-rival", action="store_true", help=f"leave out {RIVAL}, which needs a network once")
    told = "leave out torch.compile, which needs a C++ compiler and minutes"
    add("--no-compile", action="store_true", help=told)
    gpu = "cuda" if torch.cuda.is_available() else None
    told = "where LLaMA-3-8B's layers run; a CPU takes small ones (default: a GPU, if there is one)"
    add("--device", choices=("cpu", "cuda"), default=gpu, help=told)
    options = command.parse(parser, argv)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if options.quick:
        options.rounds, options.no_rival, options.no_compile = 4, True, True
    return options


def main(argv: Sequence[str]) -> None:
    """Run the benchmark: print the tables, write them and the picture to `--out`."""
    options = parse(argv)
    use_all_cores()
    parts: list[str] = []

    def show(part: str) -> None:
        print(part, end="\n\n", flush=True)
        parts.append(part)

    with contextlib.nullcontext() if options.no_rival else Rival() as rival:
        show(counts_table(rival))
        show(times_table(rival, options.rounds, not options.no_compile))
        show(inference_table(rival, options.rounds, 0 if options.quick else 24))
        show(overhead(rival, 2 * options.rounds))  # a small difference of two large times
        show(memory_table(rival, 10**4 if options.quick else 10**6))
    show(single_figures(options.rounds))
    show(fixed_table(options.rounds))
    show(dropout_table(options.rounds))
    show(grid_table(max(2, options.rounds // 4)))
    if options.device:
        show(gpu_table(options.rounds, options.device))
    sweeps = {}
    for axis in AXES:
        places = (axis.values[0], axis.values[-2]) if options.quick else axis.values
        rounds = max(2, options.rounds // 4) if axis.training else 2 * options.rounds
        sweeps[axis] = sweep(axis, places, rounds)
        show(sweep_table(axis, sweeps[axis]))
    if keep_memory():  # last, as there is no way back
        show(KEPT)
        show(times_table(None, options.rounds, compiled=False))
        show(overhead(None, 2 * options.rounds))
        show(fixed_table(options.rounds))
    draw(options.out / "throughput.png", sweeps)
    title = "Speed and memory of training"
    path = write_report(options.out, "throughput", title, [READING, *parts])
    print(f"written to {path}; {machine()}")


def single_figures(rounds: int) -> str:
    """What one number says."""
    injecting, importing = inject_seconds(), 1000 * import_seconds()
    rows = [
        ["forward of the merged model over the never adapted", merged_forward(4 * rounds)],
        ["`inject` into LLaMA-3-8B on the meta device, 160 layers", f"{injecting:.3f} s"],
        ["`import aurora` after `import torch`", f"{importing:.1f} ms"],
    ]
    return markdown_table(["one figure each", "measured"], rows)


READING = (
    "Operators: what PyTorch dispatches for one adapted layer and its base, views apart, with the "
    "accumulation of gradients. Bytes a token: what the graph keeps for the backward beside input "
    "and parameters. Times: contenders take turns, and the second of two steps counts; the median "
    "over rounds of the ratio, in brackets its quartiles. Peak: the most memory one training step "
    "holds beside parameters and input. Float32, scaling 2, and no dropout where none is named."
)
KEPT = (
    "**With memory kept.** All above ran with the C library as it is. It may give freed memory "
    "back to the system; asking for it anew takes up to half of a step, and whether it does "
    "depends on what ran before. That is why a place may differ between two tables, and who holds "
    "less memory gains. Here are training steps in a process that keeps its memory."
)

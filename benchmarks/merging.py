"""Merging: how much of what training gained is left in plain layers, by method?

Adapters are trained, then judged on the same held-out texts: off, dynamic, and merged by each method. Gain kept is
(merged - off) / (dynamic - off). Every run is one line of JSON; a run that has its line is not run again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aurora
from aurora import core, merging
from benchmarks import common, data

QUERY_VALUE = r"attention\.self\.(query|value)"
EVERY_LINEAR = r"layers\.\d+\..*_proj$"
CALIBRATION = 256  # sequences
NO_DATA, IN_TURN, FROM_X = "linear, no data", "layer after layer", "from x"
MERGED = (*merging.METHODS, NO_DATA, IN_TURN, FROM_X)
Record = dict[str, Any]


# --- Two more ways to calibrate, measured here and not kept ----------------------------------------------------------


def merge_in_turn(model: nn.Module, batches: Sequence[Any]) -> None:
    """Calibrate every layer on the inputs that the layers before it, merged already, produce: one pass a layer."""
    for name in list(core.layers(model)):
        layer = core.layers(model)[name]
        fitted = merging.fit(layer, "calibrated", merging.collect(model, batches)[name])
        _fold(model, layer, *merging.merged_tensors(name, layer, fitted)[:2])


@torch.no_grad()
def merge_from_x(model: nn.Module, batches: Sequence[Any]) -> None:
    """Least squares from x itself instead of z = A x: (d_in + r)^2 moments a layer, of which z-space keeps (3 r)^2."""
    layers = core.layers(model)
    found = {name: merging.Moments(layer.in_features + layer.config.rank) for name, layer in layers.items()}

    def watch(name: str, layer: core.AuroraLinear, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, layer.in_features)
        found[name].add(torch.cat([x, layer.anl(F.linear(x, layer.A))], 1))

    hooks = [m.register_forward_pre_hook(functools.partial(watch, n, m)) for n, m in layers.items()]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        n, moments = layer.in_features, found[name]
        second = moments.second(about_mean=True)
        ridge = 1e-3 * second[:n, :n].diagonal().mean() * torch.eye(n, dtype=torch.float64)
        slope = torch.linalg.solve(second[:n, :n] + ridge, second[:n, n:]).t()
        offset = moments.mean[n:] - slope @ moments.mean[:n]
        B, base = layer.scaling * layer.B.double(), layer.base
        bias = B @ offset + (0 if base.bias is None else base.bias.double())
        _fold(model, layer, layer.merged_weight(B @ slope), bias.float())


def _fold(model: nn.Module, layer: core.AuroraLinear, weight: Tensor, bias: Tensor | None) -> None:
    layer.base.weight = nn.Parameter(weight)
    if bias is not None:
        layer.base.bias = nn.Parameter(bias)
    core.remove(model, [layer])


# --- One run ---------------------------------------------------------------------------------------------------------


def merge(model: nn.Module, method: str, batches: Sequence[Any]) -> None:
    """Merge by any of MERGED."""
    if method == NO_DATA:
        merging.merge(model, "linear")
    elif method == IN_TURN:
        merge_in_turn(model, batches)
    elif method == FROM_X:
        merge_from_x(model, batches)
    else:
        merging.merge(model, method, batches, held_out=batches[:1])


def compare(
    model: nn.Module, judge: Callable[[nn.Module], Tensor], batches: Sequence[Any], methods: Sequence[str]
) -> Record:
    """Scores of every held-out unit: adapters off, dynamic, merged by each method; seconds of every merge."""
    with torch.inference_mode():
        dynamic = judge(model)
        with aurora.disabled(model):
            off = judge(model)
    found: Record = {"off": _mean(off), "dynamic": _mean(dynamic), "units": len(dynamic)}
    for method in methods:
        merged = copy.deepcopy(model)
        start = time.perf_counter()
        merge(merged, method, batches)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            scores = judge(merged)
        found[method] = _mean(scores)
        found[f"{method}, paired error"] = [float(e) for e in (scores - dynamic).std(0) / math.sqrt(len(scores))]
        found[f"{method}, seconds"] = seconds
    return found


def _mean(scores: Tensor) -> list[float]:
    return [float(x) for x in scores.mean(0)]


def encoder_run(
    corpus: str, rank: int, seed: int, texts: int, steps: int, penalty: float = 0.0, recommended: bool = False
) -> Record:
    """all-MiniLM-L6-v2 learns a corpus; scores (accuracy, -loss) of each held-out text that has a class.

    penalty: weight of `watch_linearity`'s gap in the loss. recommended: the guide's setting instead of the paper's.
    """
    encoder, tokenizer = common.load_encoder()
    learn, held = data.split(data.load(corpus))
    scale = statistics.pstdev(s.rating for s in learn)
    # By the hash of the id, like the split: no seed, no order.
    learn, held = (data.split(side, share=min(1.0, texts / len(side)), salt="size")[1] for side in (learn, held))
    training, judged = (common.tokenize(tokenizer, side, scale=scale) for side in (learn, held))
    torch.manual_seed(seed)
    model = common.Reader(encoder)
    options = common.RECOMMENDED if recommended else {}
    aurora.inject(model, QUERY_VALUE, rank, alpha=2.0 * rank, train=r"^head\.", **options)
    groups = None
    if recommended:
        aurora.start_as_identity(model)
        groups = aurora.parameter_groups(model, 5e-3)
    learns = functools.partial(common.train, texts=training, steps=steps, lr=5e-3, seed=seed, groups=groups)
    start = time.perf_counter()
    if penalty:
        with merging.watch_linearity(model) as gap:
            learns(_Penalised(model, gap, penalty), label=corpus)
    else:
        learns(model, label=f"{corpus}, rank {rank}, seed {seed}")
    epoch = (time.perf_counter() - start) * math.ceil(len(training.tokens) / 32) / steps
    batches = training.inputs(CALIBRATION)

    def judge(model: nn.Module) -> Tensor:
        parts = []
        for b in judged.batches(64):
            logit = model(b.input_ids, b.attention_mask)[:, 0].double()
            truth = (b.ratings > 0).double()
            hit = ((logit > 0).double() == truth).double()
            loss = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
            parts.append(torch.stack([hit, -loss], 1)[b.ratings != 0])
        return torch.cat(parts)

    methods = (*merging.METHODS, NO_DATA) if recommended else merging.METHODS
    if seed == 0 and rank == 2 and not (penalty or recommended):
        methods = (*merging.METHODS, IN_TURN, FROM_X)
    found = compare(model.eval(), judge, batches, methods)
    return found | {"epoch seconds": epoch, "trained on": len(training.tokens)}


class _Penalised(nn.Module):
    """Adds a multiple of the gap to the first output's graph, so that the common training loop need not know of it."""

    def __init__(self, model: nn.Module, gap: Callable[[], Tensor], weight: float) -> None:
        super().__init__()
        self.model, self.gap, self.weight = model, gap, weight

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.model(*inputs)
        return _WithPenalty.apply(out, self.weight * self.gap()) if torch.is_grad_enabled() else out  # type: ignore


class _WithPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, penalty: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=grad.dtype)


def language_run(rank: int, seed: int, texts: int, steps: int, length: int = 48) -> Record:
    """SmolLM2-135M learns to continue editorial snippets, all linear layers adapted; score -loss of each text."""
    model, tokenizer = common.load_smollm2()
    learn, held = data.split(data.load("editorials"))
    training, judged = (common.chunks(tokenizer, side, n, length) for side, n in ((learn, texts), (held, 64)))
    torch.manual_seed(seed)
    aurora.inject(model, EVERY_LINEAR, rank, alpha=2.0 * rank)
    seconds = common.train_language(
        model, training, aurora.parameters(model), steps=steps, lr=2e-3, seed=seed, label=f"SmolLM2, rank {rank}"
    )
    epoch = seconds * len(training) / 8 / steps
    batches = [{"input_ids": part} for part in training[:CALIBRATION].split(16)]

    def judge(model: nn.Module) -> Tensor:
        return torch.cat([-common.next_token_loss(model, part).double() for part in judged.split(16)]).unsqueeze(1)

    found = compare(model.eval(), judge, batches, merging.METHODS)
    return found | {"epoch seconds": epoch, "trained on": len(training)}


# --- All runs --------------------------------------------------------------------------------------------------------


def plan(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Every run with its key; the key says all that fixes it."""
    texts, steps = (200, 10) if quick else (1500, 100)
    for seed in (0,) if quick else (0, 1, 2):
        for rank in (2, 8):
            for corpus in data.CORPORA:
                key = f"MiniLM {corpus} rank={rank} seed={seed} texts={texts} steps={steps}"
                yield key, functools.partial(encoder_run, corpus, rank, seed, texts, steps)
        if quick:
            continue
        for corpus in data.CORPORA:
            key = f"recommended MiniLM {corpus} rank=2 seed={seed} texts={texts} steps={steps}"
            yield key, functools.partial(encoder_run, corpus, 2, seed, texts, steps, recommended=True)
        if seed == 0:
            for rank in (2, 8):
                yield f"SmolLM2 editorials rank={rank} seed=0", functools.partial(language_run, rank, 0, 1024, 40)
            for corpus in ("movies", "tweets"):
                key = f"penalty MiniLM {corpus} rank=2 seed=0 texts={texts} steps={steps}"
                yield key, functools.partial(encoder_run, corpus, 2, 0, texts, steps, 0.1)


def kept(records: Sequence[Record], method: str, score: int) -> tuple[float, float]:
    """(gain kept, its standard error over runs): the mean of merged - off over the mean of dynamic - off."""
    gains = [r["dynamic"][score] - r["off"][score] for r in records]
    merged = [r[method][score] - r["off"][score] for r in records]
    share = statistics.fmean(merged) / statistics.fmean(gains)
    # The delta method: the error of a ratio of means is that of the mean of what the ratio leaves unexplained.
    left = [m - share * g for m, g in zip(merged, gains, strict=True)]
    error = statistics.stdev(left) / math.sqrt(len(left)) / abs(statistics.fmean(gains)) if len(left) > 1 else math.nan
    return share, error


def gains_table(groups: dict[str, list[Record]]) -> str:
    """Gain kept by group and method, in accuracy and in loss."""
    rows = []
    for group, records in groups.items():
        for score, label in ((0, "accuracy"), (1, "loss")) if len(records[0]["off"]) > 1 else ((0, "loss"),):
            cells = []
            for method in MERGED:
                if not all(method in r for r in records):
                    cells.append("-")
                    continue
                share, error = kept(records, method, score)
                cells.append(f"{share:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}"))
            gain = statistics.fmean(abs(r["dynamic"][score] - r["off"][score]) for r in records)
            rows.append([f"{group}, {label}", len(records), f"{gain:.3f}", *cells])
    return common.markdown_table(["gain kept", "runs", "gain of training", *MERGED], rows)


def scores_table(records: dict[str, Record]) -> str:
    """Every run: off, dynamic, merged, and the paired error of merged - dynamic."""
    rows = []
    for run, r in records.items():
        unit = 100 if len(r["off"]) > 1 else 1
        cells = [f"{unit * r[m][0]:.2f}" for m in ("off", "dynamic")]
        for method in merging.METHODS:
            cells.append(f"{unit * r[method][0]:.2f} ({unit * r[f'{method}, paired error'][0]:.2f})")
        cost = r["calibrated, seconds"] / r["epoch seconds"]
        rows.append([run.partition(" texts=")[0], *cells, r["units"], f"{cost:.1%}"])
    header = ["run", "off", "dynamic", *merging.METHODS, "held out", "calibration, of an epoch"]
    return common.markdown_table(header, rows)


def report(out: Path, records: dict[str, Record]) -> Path:
    """Write the tables and the picture from the lines."""
    groups: dict[str, list[Record]] = {}
    for run, record in records.items():
        details = ("seed=", "texts=", "steps=", *data.CORPORA)
        groups.setdefault(" ".join(w for w in run.split() if not w.startswith(details)), []).append(record)
        if IN_TURN in record:
            groups.setdefault("all five methods, rank=2 seed=0", []).append(record)
    with common.picture(out / "merging.png") as (axes,):
        for i, method in enumerate(merging.METHODS):
            values = [kept(records_, method, 0)[0] for records_ in groups.values()]
            axes.bar([j + 0.27 * (i - 1) for j in range(len(groups))], values, 0.27, label=method)
        axes.axhline(1, color="gray", lw=0.8)
        axes.set_xticks(range(len(groups)), [g.replace(" ", "\n") for g in groups], fontsize="x-small")
        axes.set(ylabel="share of the gain of training that is kept")
        axes.legend()
    parts = [READING, gains_table(groups), scores_table(records)]
    return common.write_report(out, "merging", "What a merge keeps", parts)


READING = (
    "Gain kept: (merged - off) / (dynamic - off), a ratio of means over the runs, with its standard error over runs. "
    "Static: the paper's merge. Linear: first order at the mean of the calibration data. Calibrated: least squares on "
    f"{CALIBRATION} training sequences. Linear, no data: first order at 0. Layer after layer: calibrated in turn on "
    "what merged layers produce. From x: least squares from the layer's input instead of its hidden vector. Penalty: "
    "trained with 0.1 times `watch_linearity`'s gap in the loss. Recommended: the guide's setting, not the paper's. "
    "In the table of runs, accuracy in percent (for SmolLM2 minus the next-token loss in nats), in brackets the "
    "standard error of the paired difference to dynamic on the same held-out texts."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    quick = "one seed, few texts and steps, MiniLM only, written to a folder `quick`"
    return common.sweep_parser("merging", __doc__, quick, jobs=False).parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Run what has no line yet, then print and write the report."""
    options = parse(argv)
    common.use_all_cores()
    out = options.out / "quick" if options.quick else options.out
    path = out / "merging.jsonl"
    start = time.perf_counter()
    for run, call in plan(options.quick):
        if run in common.lines(path):
            continue
        if time.perf_counter() - start > 60 * options.minutes:
            break
        common.append(path, {"run": run} | call() | {"machine": common.machine()})
    wanted = [run for run, _ in plan(options.quick)]
    found = {run: record for run, record in common.lines(path).items() if run in wanted}
    if not found:
        raise common.BenchmarkError(f"{path} holds no run yet: give it more --minutes")
    written = report(out, found)
    print(written.read_text(encoding="utf-8"))
    print(f"{len(found)} of {len(wanted)} runs, written to {written}")

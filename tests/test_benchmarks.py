"""The benchmarks' own parts, on tiny models and texts made here: no network, no packaged model."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

import aurora
from benchmarks import __main__ as command
from benchmarks import finetune
from benchmarks.lab import baselines, data, needs, report, task, timing
from benchmarks.lab.data import Snippet
from benchmarks.lab.models import load_encoder
from benchmarks.lab.needs import BenchmarkError, progress

WORDS = [
    "good",
    "fine",
    "great",
    "lovely",
    "bad",
    "poor",
    "awful",
    "dull",
    "film",
    "plot",
    "the",
    "a",
]
TARGETS = r"attention\.self\.(query|value)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local Hugging Face folder with a random two-layer BERT."""
    import transformers

    path = tmp_path_factory.mktemp("bert")
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(path)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=64, **sizes
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV of 80 rated texts, whose words give the rating away."""
    draw, lines = random.Random(0), []
    for i in range(80):
        kind = i % 2
        words = draw.choices(WORDS[4 * kind : 4 * kind + 4], k=3) + draw.choices(
            WORDS[8:], k=draw.randrange(1, 6)
        )
        draw.shuffle(words)
        lines.append(f"{i}\t{(-1) ** kind * draw.uniform(0.5, 3):.3f}\t{' '.join(words)}")
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- data -----------------------------------------------------------------------------------------


def test_split_is_disjoint_and_depends_on_nothing_but_the_id() -> None:
    snippets = [
        Snippet(f"{doc}_{i}", 1.0, "text") for doc in range(300) for i in range(doc % 7 + 1)
    ]
    rest, held = data.split(snippets)
    assert {data.document(s.id) for s in rest}.isdisjoint(data.document(s.id) for s in held)
    assert sorted(rest + held) == sorted(snippets)
    assert 0.1 < len(held) / len(snippets) < 0.3
    again = data.split([s._replace(rating=-2.0, text="other") for s in reversed(snippets[:500])])
    kept = {s.id for s in snippets[:500]}
    assert {s.id for s in again[1]} == {s.id for s in held} & kept
    assert [
        s.id for s in data.split([Snippet(str(i), 1.0, "text") for i in range(1, 31)])[1]
    ] == HELD_OUT_TO_30


# Written down so that a change of the hash, which would make all published scores
# incomparable, cannot pass unseen.
HELD_OUT_TO_30: list[str] = ["5", "7", "11", "14", "15", "16", "18", "30"]


def test_only_document_sentence_ids_are_grouped() -> None:
    assert [data.document(i) for i in ("12_3", "12", "user_7", "1_2_3")] == [
        "12",
        "12",
        "user_7",
        "1_2_3",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_parse_reads_what_editors_write(encoding: str) -> None:
    raw = "1\t2.5\tcafé\tand more\r\n\r\n2_1\t-0.5\tnaïve".encode(encoding)
    assert data.parse(raw, "x") == [
        Snippet("1", 2.5, "café\tand more"),
        Snippet("2_1", -0.5, "naïve"),
    ]


@pytest.mark.parametrize("line", ["1\t2.5", "1\tgood\ttext", "1\tnan\ttext", "1\t2.5\t "])
def test_parse_names_the_line_it_cannot_read(line: str) -> None:
    with pytest.raises(BenchmarkError, match=r"mine\.tsv, line 2: .*TAB"):
        data.parse(f"0\t1\tfine\n{line}\n".encode(), "mine.tsv")


def pack(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_archive_is_read_only_with_the_right_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = pack(data.INNER, pack(data.CORPORA["tweets"], b"\xef\xbb\xbf1\t2.5\tYay.\r\n"))
    (tmp_path / data.ARCHIVE).write_bytes(outer)
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    with pytest.raises(BenchmarkError, match="SHA-256"):
        data.load("tweets")
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(outer).hexdigest())
    assert data.load("tweets") == [Snippet("1", 2.5, "Yay.")]


def test_without_network_the_error_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: no route to host")

    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(BenchmarkError, match=r"no route to host.*copy") as caught:
        data.load("movies")
    assert str(tmp_path / "cache" / data.ARCHIVE) in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


# --- report, timing, task -------------------------------------------------------------------------


def test_markdown_table_is_aligned() -> None:
    lines = report.markdown_table(["name", "n"], [["a|b", 1], ["long name", 12345]]).splitlines()
    assert lines == [
        "| name      |     n |",
        "| --------- | ----: |",
        "| a\\|b      |     1 |",
        "| long name | 12345 |",
    ]


def test_interleave_draws_the_order_of_every_round_and_drops_the_warm_up() -> None:
    calls: list[str] = []
    steps = {k: lambda k=k: calls.append(k) for k in "abc"}
    seconds = timing.interleave(steps, rounds=30, warmup=2)
    assert calls[::2] == calls[1::2]  # each steps twice
    rounds = ["".join(calls[i : i + 6 : 2]) for i in range(0, 192, 6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(rounds) == 32
    assert len(set(rounds)) == 6
    assert {k: len(v) for k, v in seconds.items()} == {"a": 30, "b": 30, "c": 30}
    assert timing.median_ratio({"a": [1.0, 9.0, 4.0], "b": [2.0, 1.0, 2.0]}, "a", "b") == 2.0


def test_batches_hold_every_text_once_and_pad_to_the_longest() -> None:
    texts = task.Texts([[1] * (i % 9 + 1) for i in range(50)], torch.arange(50.0), pad=0)
    for generator in (None, torch.Generator().manual_seed(1)):
        batches = texts.batches(8, generator)
        assert sorted(torch.cat([b.ratings for b in batches]).tolist()) == list(range(50))
        for batch in batches:
            lengths = batch.ratings.long() % 9 + 1
            assert batch.input_ids.shape[1] == lengths.max()
            assert torch.equal(batch.attention_mask.sum(1), lengths)
    assert texts.sample(3).ratings.tolist() == [0, 24, 49]


def test_padding_does_not_change_an_output(folder: Path) -> None:
    encoder, _ = load_encoder(folder)
    model = task.Reader(encoder)
    texts = task.Texts([[2, 5, 3], [2, 5, 6, 7, 8, 9, 3]], torch.ones(2), pad=0)
    alone, padded = (model(*texts.batch(rows)[:2])[0] for rows in ([0], [0, 1]))
    torch.testing.assert_close(alone, padded)


def test_scores_of_known_outputs() -> None:
    class Known(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return input_ids[:, :2].float()

    # Classes: right, wrong, right, and a rating of 0 that has none. Predicted: twice the rating.
    texts = task.Texts(
        [[1, 2], [1, -4], [-1, -2], [1, 0]], torch.tensor([1.0, -2.0, -1.0, 0.0]), pad=0
    )
    scores = task.evaluate(Known(), texts)
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.pearson == pytest.approx(1)


def test_missing_package_is_one_sentence_with_the_command() -> None:
    with pytest.raises(
        BenchmarkError, match=re.escape('pip install "aurora-adapters[benchmarks]"')
    ):
        needs.need("surely_not_installed.part")


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", [False, True])
def test_lora_starts_as_the_base_trains_alone_and_merges_exactly(mixer: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(8, 6), "head": nn.Linear(6, 2)}).double()
    before, x = model["body"].weight.clone(), torch.randn(3, 5, 8, dtype=torch.float64)
    plain = model["body"](x)
    assert baselines.inject_lora(model, "body", 2, mixer=mixer, train=r"^head\.") == ["body"]
    assert torch.equal(model["body"](x), plain)
    own = {"body.A", "body.B", "head.weight", "head.bias"} | ({"body.M"} if mixer else set())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own
    nn.init.normal_(model["body"].B)
    adapted = model["body"](x)
    mixed = (
        x
        @ model["body"].A.t()
        @ (model["body"].M.t() if mixer else torch.eye(2).double())
        @ model["body"].B.t()
    )
    torch.testing.assert_close(adapted, plain + 2 * mixed)
    baselines.merge_lora(model)
    assert type(model["body"]) is nn.Linear
    assert not torch.equal(model["body"].weight, before)
    torch.testing.assert_close(model["body"](x), adapted)


def test_lora_needs_a_match() -> None:
    with pytest.raises(ValueError, match="matches no"):
        baselines.inject_lora(nn.Sequential(nn.Linear(2, 2)), "query", 2)


def test_a_file_of_other_names_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    baselines.save_trained(model, tmp_path / "a.safetensors")
    baselines.freeze(model, "^0")
    with pytest.raises(KeyError, match=r"1\.weight"):
        baselines.load_trained(model, tmp_path / "a.safetensors")


# --- finetune -------------------------------------------------------------------------------------


def test_every_contender_learns_reloads_and_merges(folder: Path, table: Path) -> None:
    task, field = (
        finetune.build_task(str(folder), str(table)),
        finetune.contenders(TARGETS, 2, 0.02),
    )
    results = {name: runs[0] for name, runs in finetune.run(task, field, [0], 20).items()}
    names = ["head only", "LoRA r=2", "LoRA r=8", "AuroRA r=2", "AuroRA r=2 recommended"]
    assert list(results) == names
    ours = 4 * (2 * 64 + 4 + 16)
    assert [r.adapter for r in results.values()] == [0, 4 * 2 * 64, 4 * 8 * 64, ours, ours]
    for result in results.values():
        assert result.head == 66
        assert result.trained.pearson > 0.3  # the words give it away
        losses = result.course.losses
        assert sum(losses[-5:]) < sum(losses[:5])
        assert len(losses) == len(result.course.seconds) == 20
        assert result.hits.mean().item() == pytest.approx(result.trained.accuracy)
    assert results["head only"].merged == {}
    for name in ("LoRA r=2", "LoRA r=8"):
        assert list(results[name].merged) == [finetune.STATIC]
        merged = results[name].merged[finetune.STATIC]
        assert merged == pytest.approx(results[name].trained, abs=1e-4)
    for name in names[3:]:
        merged = results[name].merged[finetune.CALIBRATED]
        assert merged == pytest.approx(results[name].trained, abs=0.2)


def test_the_recommended_contender_is_set_up_as_the_package_recommends(
    folder: Path, table: Path
) -> None:
    task = finetune.build_task(str(folder), str(table))
    ours = finetune.contenders(TARGETS, 2).recommended
    model = task.prepared(ours, seed=0)
    z = torch.linspace(-3.9, 3.9, 9).expand(2, -1)
    for layer in aurora.core.layers(model).values():
        torch.testing.assert_close(layer.anl.columns(z), z, atol=1e-5, rtol=0)
    rates = [group["lr"] for group in ours.groups(model, 1e-3)]
    assert rates == pytest.approx([group["lr"] for group in aurora.parameter_groups(model, 1e-3)])


def test_a_file_that_loses_something_is_noticed(folder: Path, table: Path) -> None:
    def forgetful(model: nn.Module, path: Path) -> None:
        aurora.load(model, path)
        with torch.no_grad():
            next(iter(aurora.core.layers(model).values())).B[0, 0] += 1

    task = finetune.build_task(str(folder), str(table))
    field = [dataclasses.replace(finetune.contenders(TARGETS, 2).paper, load=forgetful)]
    with pytest.raises(RuntimeError, match="outputs differ"):
        finetune.run(task, field, [0], 2)


def test_progress_counts_every_batch_that_judging_runs(folder: Path, table: Path) -> None:
    task, field = finetune.build_task(str(folder), str(table)), finetune.contenders(TARGETS, 2)
    courses = finetune.train_in_turn(task, field, seed=0, steps=1)
    for contender in field:
        with progress(label="", total=0) as bar:
            ticked: list[int] = []
            bar.update = lambda ticked=ticked: ticked.append(1)
            finetune.judge(task, contender, courses[contender.name], 0, bar)
        assert len(ticked) == finetune.ticks(task, contender)


def test_a_seed_fixes_a_run(folder: Path, table: Path) -> None:
    task = finetune.build_task(str(folder), str(table))
    field, found = [finetune.contenders(TARGETS, 2, lr=0.02).recommended], []
    for seed in (0, 0, 1):
        found += finetune.train_in_turn(task, field, seed, steps=3).values()
    first, same, other = (course.losses for course in found)
    assert first == same
    assert first != other


def made_up(hits: str, static: float, calibrated: float | None = None) -> list[finetune.Result]:
    """A contender's result with these hits, and accuracies after the merges."""
    known = torch.tensor([float(hit) for hit in hits])
    trained = task.Scores(known.mean().item(), 0.5)
    merged = {finetune.STATIC: task.Scores(static, 0.5)}
    if calibrated is not None:
        merged[finetune.CALIBRATED] = task.Scores(calibrated, 0.5)
    course = finetune.Course(nn.Identity(), [1.0], [2.0 if calibrated else 1.0])
    return [finetune.Result(100 + len(merged), 2, 1000, known, trained, merged, course)]


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        ("1" * 90 + "0" * 10, "+40.0 ± 4.9 points (clearly better)"),
        ("1" * 50 + "0" * 50, "+0.0 ± 0.0 points (no clear difference)"),
        ("1" * 10 + "0" * 90, "-40.0 ± 4.9 points (clearly worse)"),
    ],
)
def test_the_last_lines_say_what_the_numbers_say(ours: str, told: str) -> None:
    field = finetune.contenders(TARGETS, 2)
    half = "1" * 50 + "0" * 50
    results = {
        field.lora.name: made_up(half, 0.5),
        field.large.name: made_up(half, 0.5),
        field.paper.name: made_up(half, 0.25, 0.5),
        field.recommended.name: made_up(ours, int(ours.count("1")) / 100 - 0.01, 0.995),
    }
    score, merge, cost = finetune.meaning(results, field)
    assert told in score
    assert "LoRA r=2 +0.0 (static)" in merge
    assert "AuroRA r=2 recommended -1.0 (static)" in merge
    assert "AuroRA r=2 -25.0 (static) and +0.0 (calibrated)" in merge
    assert "takes 2.00 times" in cost


def test_command_writes_table_and_picture(
    folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "results"
    options = ["--model", folder, "--data", table, "--max-steps", 3, "--seeds", 0, 1, "--lr", 0.01]
    assert command.main(["finetune", *map(str, [*options, "--out", out])]) == 0
    written = (out / "finetune.md").read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) == 7
    assert "± " in rows[-1]
    told = capsys.readouterr()
    assert rows[-1] in told.out
    last = told.out.splitlines()[-3:]
    assert [line.partition(":")[0] for line in last] == ["Score", "Merge", "Cost"]
    for line in last:
        assert f"- {line}" in written
    for stage in ("1 of 3", "2 of 3", "3 of 3"):
        assert stage in told.err
    assert str(tmp_path) not in written
    assert (out / "finetune.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_stays_on_the_training_side(folder: Path, table: Path) -> None:
    learn, judge = (
        finetune.build_task(str(folder), str(table), development=d) for d in (False, True)
    )
    assert len(judge.learn.tokens) + len(judge.judge.tokens) == len(learn.learn.tokens)
    field = list(finetune.contenders(TARGETS, 2))
    shown = finetune.sweep(judge, field[:2], [1e-3, 1e-2], steps=2).splitlines()
    assert [line.count("|") for line in shown] == [4] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.tsv"], "nowhere.tsv"),
        (["--model", "nowhere"], "nowhere"),
        (["--targets", "nothing_is_called_this"], "nothing_is_called_this"),
    ],
)
def test_bad_options_end_in_one_sentence(
    folder: Path, table: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = [
        "finetune",
        "--model",
        str(folder),
        "--data",
        str(table),
        "--out",
        str(table.parent),
        *options,
    ]
    assert command.main(given) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error


def test_ratings_of_one_sign_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stars.tsv").write_text(
        "".join(f"{i}\t{i % 5 + 1}\tfine\n" for i in range(50)), encoding="utf-8"
    )
    with pytest.raises(BenchmarkError, match="subtract the middle"):
        finetune.build_task(str(folder), str(tmp_path / "stars.tsv"))


# --- the command ----------------------------------------------------------------------------------


def test_command_lists_the_benchmarks() -> None:
    root = Path(aurora.__file__).parents[1]
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks"], capture_output=True, text=True, check=True, cwd=root
    )
    assert re.search(r"^  finetune +Fine-tuning a sentence encoder", listed.stdout, re.M)
    assert not re.search(r"^  (common|data|baselines) ", listed.stdout, re.M)


def test_command_names_the_nearest_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["finetnue"]) == 2
    assert "nearest is: finetune" in capsys.readouterr().err

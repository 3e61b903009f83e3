"""Counting parameters: what does each adapter train, on the models of the paper and on yours?

Every number is counted on adapters built around the layers of the real model, whose weights stay
on the meta device: no download, no memory. The models are written out as configurations; `--model`
counts a local folder of your own.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aurora
from benchmarks.lab import options as command
from benchmarks.lab.baselines import LoRALinear
from benchmarks.lab.models import check_folder
from benchmarks.lab.needs import BenchmarkError, need, progress
from benchmarks.lab.report import markdown_table, picture, write_report

RANKS = (1, 2, 4, 8, 16, 32, 64)
# ViT's names differ by release.
QUERY_VALUE = r"attention\.(self|attention)\.(query|value)$|attention\.[qv]_proj$"

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Case:
    """A model on the meta device, layers to adapt, the paper's rank of LoRA, its two figures."""

    name: str
    build: Callable[[], nn.Module]
    targets: str
    lora_rank: int = 8
    paper: tuple[str, str] = ("-", "-")  # AuroRA at rank 2, LoRA at lora_rank


def encoder(kind: str, options: Mapping[str, Any]) -> nn.Module:
    """transformers' `<kind>Model` of `<kind>Config(**options)` on the meta device: shapes alone."""
    transformers = need("transformers")
    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")(**options)
        model: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return model


def unet() -> nn.Module:
    """The UNet of Stable Diffusion XL, diffusers' own class, on the meta device."""
    diffusers = need("diffusers")
    with torch.device("meta"):
        model: nn.Module = diffusers.UNet2DConditionModel(**SDXL)
    return model


CASES = (
    Case(
        "RoBERTa-base",
        functools.partial(encoder, "Roberta", ROBERTA),
        QUERY_VALUE,
        8,
        ("0.075M", "0.3M"),
    ),
    Case(
        "RoBERTa-large",
        functools.partial(encoder, "Roberta", ROBERTA | LARGE),
        QUERY_VALUE,
        8,
        ("0.2M", "0.8M"),
    ),
    Case("ViT-base", functools.partial(encoder, "ViT", {}), QUERY_VALUE, 16, ("74K", "581K")),
    Case("ViT-large", functools.partial(encoder, "ViT", LARGE), QUERY_VALUE, 16, ("197K", "1.57M")),
    Case(
        "LLaMA-3-8B",
        functools.partial(encoder, "Llama", LLAMA_3_8B),
        r"\.(q_proj|k_proj|v_proj|up_proj|down_proj)$",
        32,
        ("3.5M", "56.6M"),
    ),
    Case("SDXL UNet", unet, r"\.attn[12]\.to_(q|k|v|out\.0)$", 16),
)


def from_folder(folder: str, targets: str) -> Case:
    """A case of a local Hugging Face folder, of which only config.json is read.

    Raises BenchmarkError without one.
    """
    path = check_folder(folder)

    def build() -> nn.Module:
        transformers = need("transformers")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]

    return Case(path.resolve().name, build, targets)


@dataclass(frozen=True)
class Count:
    """Parameters of a model, layers adapted, trainable parameters by method and rank."""

    model: int
    layers: int
    trainable: dict[str, dict[int, int]]


def count(case: Case, ranks: Sequence[int] = RANKS) -> Count:
    """Adapt every matching layer of the model and count. BenchmarkError if none matches."""
    model = case.build()
    total = sum(p.numel() for p in model.parameters())
    ours: dict[int, int] = {}
    for rank in ranks:
        try:
            done = aurora.inject(model, case.targets, rank)
        except (ValueError, TypeError) as error:
            raise BenchmarkError(f"--targets: {error}") from error
        ours[rank] = done.trainable
        aurora.remove(model)
    layers: list[Any] = [model.get_submodule(name) for name in done.layers]
    sizes = {"AuroRA": ours}
    for method, mixer in (("LoRA", False), ("MoSLoRA", True)):
        sizes[method] = {}
        for rank in ranks:
            adapters = (LoRALinear(layer, rank, 2 * rank, mixer) for layer in layers)
            sizes[method][rank] = sum(map(own, adapters))
    return Count(total, len(layers), sizes)


def own(adapter: nn.Module) -> int:
    """Parameters of an adapter that are not its base layer's."""
    named = adapter.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("base."))


def against_paper(counts: Mapping[Case, Count]) -> str:
    """One row a model: AuroRA at rank 2 and LoRA at the paper's rank, ours and the paper's."""
    rows = []
    for case, n in counts.items():
        ours, theirs = n.trainable["AuroRA"][2], n.trainable["LoRA"][case.lora_rank]
        counted = (f"{ours:,}", case.paper[0], f"{theirs:,} (r={case.lora_rank})", case.paper[1])
        rows.append([case.name, f"{n.model:,}", n.layers, *counted, f"{ours / theirs:.2%}"])
    header = ["model", "parameters", "layers", "AuroRA r=2", "paper", "LoRA", "paper"]
    return markdown_table([*header, "AuroRA / LoRA"], rows)


def by_rank(counts: Mapping[Case, Count]) -> str:
    """One row a model and method, one column a rank."""
    rows = []
    for case, n in counts.items():
        for method, sizes in n.trainable.items():
            rows.append([case.name, method, *(f"{sizes[rank]:,}" for rank in RANKS)])
    return markdown_table(["model", "method", *(f"r={rank}" for rank in RANKS)], rows)


def draw(path: Path, counts: Mapping[Case, Count]) -> None:
    """Left: AuroRA beside LoRA at the paper's ranks. Right: what the nonlinear layer adds."""
    names = [case.name for case in counts]
    with picture(path, columns=2) as (left, right):
        for i, (case, n) in enumerate(counts.items()):
            lora, ours = n.trainable["LoRA"], n.trainable["AuroRA"]
            theirs, labels = lora[case.lora_rank], ("LoRA, rank of the paper", "AuroRA r=2")
            labels = labels if i == 0 else ("", "")  # once in the legend
            left.barh(i + 0.2, theirs, 0.4, color="C0", label=labels[0])
            left.barh(i - 0.2, ours[2], 0.4, color="C1", label=labels[1])
            left.text(ours[2], i - 0.2, f" {ours[2] / theirs:.1%}", va="center", fontsize=8)
            above = [100 * (ours[rank] / lora[rank] - 1) for rank in RANKS]
            right.plot(RANKS, above, "o-", label=case.name)
        left.set(xscale="log", xlabel="trainable parameters", yticks=range(len(names)))
        left.set_yticklabels(names)
        left.invert_yaxis()
        left.set_xlim(left=left.get_xlim()[0] / 4)
        left.legend(loc="upper right", fontsize=8)
        label = "parameters above LoRA's at equal rank, %"
        right.set(xscale="log", xlabel="rank", ylabel=label, xticks=RANKS)
        right.set_xticks([], minor=True)
        right.set_xticklabels(RANKS)
        right.legend(fontsize=8)


READING = (
    "Trainable parameters of the adapters, without task heads; models are counted bare, without "
    "output heads. The paper compares AuroRA at rank 2 with LoRA at the rank named, and rounds "
    "(589,824 is nearer to 590K than to its 581K); it gives no count for SDXL, where LoRA at rank "
    "16 is our choice. An AuroRA layer has r (d_in + d_out) + r² + r (G + k) parameters, of which "
    "the nonlinear layer is the last two terms: 20 at rank 2. MoSLoRA has r (d_in + d_out) + r², "
    "LoRA r (d_in + d_out)."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command.parser("parameters", __doc__, "only the two base encoders")
    told = "count this local Hugging Face folder (its config.json), written to a folder `model`"
    parser.add_argument("--model", help=told)
    told = "regex of its layers to adapt (default: %(default)s)"
    parser.add_argument("--targets", default=QUERY_VALUE, help=told)
    options = command.parse(parser, argv)
    if options.model:
        options.out /= "model"
    return options


def main(argv: Sequence[str]) -> None:
    """Count, print the tables, write them and the picture to `--out`."""
    options = parse(argv)
    cases = (CASES[0], CASES[2]) if options.quick else CASES
    if options.model:
        cases = (from_folder(options.model, options.targets),)
    counts = {case: count(case) for case in progress(cases, "counting", unit="model")}
    draw(options.out / "parameters.png", counts)
    table = against_paper(counts)
    parts = [table, READING, by_rank(counts)]
    path = write_report(options.out, "parameters", "Trainable parameters", parts)
    print(f"{table}\n\nwritten to {path}")

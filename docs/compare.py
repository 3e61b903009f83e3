"""What PEFT's LoRA and aurora-peft do in the scenarios of compatibility.md: its two columns.

    python docs/compare.py lora
    python docs/compare.py aurora     # in an environment of its own: aurora-peft writes into PEFT

Prints a line a scenario: what came out, or the error.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import diffusers
import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, multiprocessing, nn

IDS = torch.arange(12).reshape(2, 6)
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2}
LAYERS = ("q_proj", "v_proj", "down_proj")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(28))]
QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
kind = sys.argv[1]


def config(targets: Any, **options: Any) -> Any:
    """The method's configuration."""
    if kind == "lora":
        return peft.LoraConfig(r=2, target_modules=targets, **options)
    import aurora_peft

    return aurora_peft.AuroraConfig(r=2, target_modules=targets, **options)


def adapt(model: nn.Module, targets: Any, **options: Any) -> Any:
    """The model under PEFT, by the method."""
    return peft.get_peft_model(model, config(targets, **options))


def dropout() -> dict[str, float]:
    """The method's option; aurora-peft also has a rank_dropout, which nothing reads."""
    return {"lora_dropout" if kind == "lora" else "module_dropout": 0.1}


def disturb(model: nn.Module) -> Any:
    """Make the adapter count."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def llama(seed: int = 0, **options: Any) -> Any:
    """A small LLaMA."""
    torch.manual_seed(seed)
    settings = {**SIZES, **HEADS, "pad_token_id": 0, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def mlp() -> nn.Sequential:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


@torch.no_grad()
def answer(model: nn.Module) -> Any:
    """What a language model says."""
    return model(input_ids=IDS).logits


def tokenizer() -> Any:
    """Words for the models of 32 tokens."""
    import tokenizers

    words = {word: i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_max_length=16,
    )  # fmt: skip


def rows(**columns: Callable[[int], str]) -> Any:
    """Sixteen rows, a function of the row's number a column."""
    import datasets

    made = [{name: text(i) for name, text in columns.items()} for i in range(16)]
    return datasets.Dataset.from_list(made)


def losses(made: Any) -> list[float]:
    """What a Trainer logged."""
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def tried(make: Callable[[], str]) -> str:
    """An answer or its error."""
    try:
        return make()
    except Exception as error:  # the error is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def held(folder: str | Path) -> str:
    """The names of the weights in a checkpoint."""
    return ", ".join(sorted(p.name for p in Path(folder).rglob("*.safetensors")))


def same(a: torch.Tensor, b: torch.Tensor) -> str:
    """How a differs from b."""
    if torch.equal(a, b):
        return "bit for bit"
    return f"off by {((a - b).norm() / b.norm()).item():.0e}"


def start_train_unload() -> str:
    """start, train, disable, unload."""
    model = llama()
    plain = answer(model)
    model = adapt(model, list(LAYERS))
    start = same(answer(model), plain)
    disturb(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with model.disable_adapter():
        off = same(answer(model), plain)
    return f"start {start}, disabled {off}, unload {same(answer(model.unload()), plain)}"


def merge_and_back() -> str:
    """merge and unmerge."""
    model = disturb(adapt(llama(), list(LAYERS)))
    before, weight = answer(model), model.state_dict()
    weight = {k: v.clone() for k, v in weight.items() if "base_layer" in k}
    model.merge_adapter()
    merged = same(answer(model), before)
    model.unmerge_adapter()
    back = all(torch.equal(model.state_dict()[k], v) for k, v in weight.items())
    return f"merged {merged}; unmerged {'bit for bit' if back else 'not bit for bit'}"


def generation() -> str:
    """generation with a cache."""
    model = disturb(adapt(llama(), list(LAYERS)))
    options: Any = {"max_new_tokens": 6, "do_sample": False}
    long, short = (model.generate(input_ids=IDS[1:, :3], use_cache=on, **options) for on in (1, 0))
    return f"agrees with that without: {torch.equal(long, short)}"


def conv1d() -> str:
    """GPT-2's Conv1D."""
    settings = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    model = disturb(adapt(transformers.GPT2LMHeadModel(settings).eval(), ["c_attn"]))
    before = answer(model)
    return f"merged {same(answer(model.merge_and_unload()), before)}"


def half() -> str:
    """bfloat16 base."""
    model = adapt(llama().to(torch.bfloat16), list(LAYERS))
    found = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    return f"adapter {sorted(found)}, output {answer(model).dtype}"


def quantised() -> str:
    """8-bit linear."""
    import bitsandbytes

    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False))
    return type(adapt(model, ["0"]).base_model.model[0]).__name__


def checkpointing() -> str:
    """gradient checkpointing."""
    model = disturb(adapt(llama(), list(LAYERS))).train()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return f"gradients agree {all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))}"


def sdxl() -> str:
    """SDXL's attention."""
    names = {"cross_attention_dim": 16, "use_linear_projection": True, "norm_num_groups": 8}
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **names,
    ).to(torch.bfloat16)  # fmt: skip
    model = adapt(model, ["to_q", "to_k", "to_v", "to_out.0"])
    given = (
        torch.randn(2, 4, 8, 8).bfloat16(),
        torch.tensor([1, 2]),
        torch.randn(2, 5, 16).bfloat16(),
    )
    model(*given).sample.float().sum().backward()
    return f"a step in bfloat16, {sum('to_q' in n for n, p in model.named_parameters())} tensors"


def tied() -> str:
    """tied head merged."""
    model = llama(tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.detach().clone()
    merged = disturb(adapt(model, ["lm_head"])).merge_and_unload()
    moved = not torch.equal(merged.get_input_embeddings().weight, before)
    return f"merging the head changes the embedding: {moved}"


def two_names() -> str:
    """a layer with two names."""
    model = mlp()
    model.append(model[0])
    model = adapt(nn.ModuleDict({"a": model[0], "b": model[0]}), ["a", "b"])
    inner = model.base_model.model
    return f"one adapter for both names: {inner['a'] is inner['b']}"


def compiled() -> str:
    """torch.compile(fullgraph)."""
    torch._dynamo.reset()
    model = disturb(adapt(mlp(), ["0", "2"]))
    x = torch.randn(5, 8)
    return same(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def functorch() -> str:
    """torch.func.vmap."""
    model = disturb(adapt(mlp(), ["0", "2"]))
    x = torch.randn(5, 8)
    return same(torch.func.vmap(model)(x), model(x))


def traced() -> str:
    """torch.jit.trace."""
    model = disturb(adapt(mlp(), ["0", "2"]))
    other = torch.randn(3000, 8)
    return same(torch.jit.trace(model, torch.randn(4, 8))(other), model(other))


def exported() -> str:
    """torch.export."""
    model = disturb(adapt(mlp(), ["0", "2"]))
    rows, other = torch.export.Dim("rows"), torch.randn(3000, 8)
    inner = model.base_model.model
    program = torch.export.export(inner, (torch.randn(4, 8),), dynamic_shapes=({0: rows},))
    return same(program.module()(other), inner(other))


def meta() -> str:
    """meta device."""
    with torch.device("meta"):
        model = mlp()
    model = adapt(model, ["0", "2"]).to_empty(device="cpu")
    return f"computes {tuple(model(torch.randn(5, 8)).shape)}"


def copies() -> str:
    """deepcopy, pickle, torch.save."""
    model = disturb(adapt(mlp(), ["0", "2"]))
    x = torch.randn(5, 8)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return same(again(x), model(x))


def identity() -> str:
    """module identity."""
    model = mlp()
    layer = model[0]
    model = adapt(model, ["0"])
    inner = model.base_model.model[0]
    return f"same object {inner is layer}, isinstance nn.Linear {isinstance(inner, nn.Linear)}"


def names() -> str:
    """names in a state dict."""
    base, model = set(llama().state_dict()), adapt(llama(), list(LAYERS))
    inner = set(model.base_model.model.state_dict())
    return f"{len(base - inner)} of {len(base)} of the base's names are lost in a state dict"


def all_or_nothing() -> str:
    """all or nothing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh())
    try:
        adapt(model, ["0", "2"])
    except (ValueError, TypeError) as error:
        left = isinstance(model[0], BaseTunerLayer)
        return f"{type(error).__name__}; the model is left half adapted: {left}"
    return "no error"


def threads() -> str:
    """disabled in one thread."""
    model, x, found = disturb(adapt(mlp(), ["0", "2"])), torch.randn(5, 8), []
    wanted = model(x)
    with model.disable_adapter():
        worker = threading.Thread(target=lambda: found.append(model(x)))
        worker.start()
        worker.join()
    return f"another thread is left alone: {torch.equal(found[0], wanted)}"


def attention() -> str:
    """nn.MultiheadAttention."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    plain = model(x, x, x)[0]
    holder = nn.ModuleDict({"attention": model})
    adapted = disturb(adapt(holder, ["attention"]))
    inner = adapted.base_model.model["attention"]
    moved = not torch.allclose(inner(x, x, x)[0], plain)
    return f"{type(inner).__name__}, it acts: {moved}"


def attention_out() -> str:
    """its out_proj."""
    x = torch.randn(2, 5, 8)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    holder = disturb(adapt(nn.ModuleDict({"attention": model}), ["out_proj"]))
    with holder.disable_adapter():
        plain = model(x, x, x)[0]
    return f"no error; it acts: {not torch.allclose(model(x, x, x)[0], plain)}"


def encoder_layer() -> str:
    """TransformerEncoderLayer, fast path on."""
    x, layer = torch.randn(2, 5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = disturb(adapt(nn.ModuleDict({"layer": layer}), ["linear1", "linear2"]))
    with torch.no_grad(), model.disable_adapter():
        plain = layer(x)
    with torch.no_grad():
        return f"no error; it acts without gradients: {not torch.allclose(layer(x), plain)}"


def experts() -> str:
    """experts in one tensor."""
    settings = transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=4)
    model = transformers.MixtralForCausalLM(settings)
    model = peft.get_peft_model(model, config([], target_parameters=["experts.gate_up_proj"]))
    return f"{sum(p.requires_grad for p in model.parameters())} tensors train"


def mamba() -> str:
    """Mamba's dt_proj."""
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))
    model = adapt(model, ["x_proj", "dt_proj"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    dead = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    return f"no error; {len(dead)} tensors get no gradient, dt_proj's: {'dt_proj' in str(dead)}"


def mamba_out() -> str:
    """Mamba's out_proj."""
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))
    adapt(model, ["out_proj"])
    return "no error"


def other_kinds() -> str:
    """nn.LSTM, nn.Embedding, nn.Conv2d."""
    told = []
    for layer in (nn.LSTM(4, 4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 3)):
        try:
            adapt(nn.Sequential(layer), ["0"])
            told.append("adapted")
        except (ValueError, TypeError) as error:
            told.append(type(error).__name__)
    return ", ".join(told)


def parametrised() -> str:
    """parametrised layer."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    x, model = torch.randn(3, 8), nn.Sequential(layer)
    plain = model(x)
    return f"start {same(adapt(model, ['0'])(x), plain)}"


def offloaded_first() -> str:
    """offloaded to the CPU, then adapted."""
    model = llama()
    plain = answer(model)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return same(answer(adapt(model, list(LAYERS))), plain)


def offloaded_last() -> str:
    """adapted, then offloaded to the CPU."""
    model = llama()
    plain = answer(model)
    model = adapt(model, list(LAYERS))
    return same(answer(accelerate.cpu_offload(model, execution_device=torch.device("cpu"))), plain)


def device_map() -> str:
    """load_checkpoint_in_model, device map."""
    with tempfile.TemporaryDirectory() as folder:
        model = disturb(adapt(llama(), list(LAYERS)))
        torch.save(model.state_dict(), Path(folder) / "pytorch_model.bin")
        again = adapt(llama(1), list(LAYERS))
        accelerate.load_checkpoint_in_model(again, folder, device_map={"": "cpu"})
        return same(answer(again), answer(model))


def file() -> str:
    """a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = disturb(adapt(llama(), list(LAYERS)))
        model.save_pretrained(folder)
        return same(answer(peft.PeftModel.from_pretrained(llama(), folder)), answer(model))


def trainer_over(model: Any, folder: str, **options: Any) -> Any:
    """transformers' Trainer for four steps."""
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    options = {"max_steps": 4, "save_steps": 2, "logging_strategy": "no", **options}
    arguments = transformers.TrainingArguments(folder, **QUIET, **options)
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])


def trained(folder: str, resume: str | None = None, drop: bool = False, **options: Any) -> Any:
    """A model after four steps under transformers' Trainer."""
    model = adapt(llama(), list(LAYERS), **(dropout() if drop else {}))
    trainer_over(model, folder, **options).train(resume_from_checkpoint=resume)
    return model.eval()


def trainer() -> str:
    """transformers' Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        whole = trained(folder)
        half = Path(folder, "checkpoint-2")
        resumed = trained(folder + "/again", str(half))
        return f"a checkpoint holds {held(half)}; resumed {same(answer(resumed), answer(whole))}"


def trainer_dropout() -> str:
    """transformers' Trainer, resuming with dropout."""
    with tempfile.TemporaryDirectory() as folder:
        whole, without = trained(folder, drop=True), trained(folder + "/without")
        resumed = trained(folder + "/again", str(Path(folder, "checkpoint-2")), drop=True)
        counts = not torch.equal(answer(whole), answer(without))
        return f"resumed {same(answer(resumed), answer(whole))}; dropout counts: {counts}"


def pushed() -> str:
    """transformers' Trainer, what is pushed to a hub."""
    found: set[str] = set()

    class Hub:  # the folder is caught on its way
        def upload_folder(self, folder_path: str, **_: Any) -> None:
            found.update(p.name for p in Path(folder_path).iterdir() if p.is_file())

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: mock.Mock(repo_id="me/it")

    with tempfile.TemporaryDirectory() as folder:
        made = trainer_over(adapt(llama(), list(LAYERS)), folder, save_only_model=True)
        made.args.push_to_hub, made.hub_model_id, made.push_in_progress = True, "me/it", None
        with mock.patch("transformers.trainer.hf_api", Hub):
            made._save_checkpoint(made.model, None)
    return ", ".join(sorted(found))


def trainer_best() -> str:
    """transformers' Trainer, the best at the end."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        best, last = trained(folder, learning_rate=50.0, **options), trained(folder + "/b")
        return f"another than the last {not torch.equal(answer(best), answer(last))}"


def offloaded_training() -> str:
    """training over weights that are away."""
    model = accelerate.cpu_offload(adapt(llama(), list(LAYERS)), torch.device("cpu"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return f"adapters have gradients {all(g is not None for g in grads)}"


def data_parallel() -> str:
    """DistributedDataParallel, one process."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", place, rank=0, world_size=1)
        model = nn.parallel.DistributedDataParallel(adapt(mlp(), ["0", "2"]))
        model(torch.randn(5, 8)).square().sum().backward()
        torch.distributed.destroy_process_group()
        return "a step works"


def empty_batch() -> str:
    """an empty batch."""
    return f"{tuple(adapt(mlp(), ['0', '2'])(torch.randn(0, 8)).shape)}"


def weights_under_autocast() -> str:
    """autocast."""
    model = disturb(adapt(mlp(), ["0", "2"]))
    with torch.autocast("cpu", torch.bfloat16):
        return f"{model(torch.randn(5, 8)).dtype}"


def vit_blocks(width: int, heads: int) -> str:
    """From wiring to merge."""

    def base() -> Any:
        torch.manual_seed(0)
        settings = transformers.ViTConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
            num_hidden_layers=2, image_size=64, num_labels=10,
        )  # fmt: skip
        return transformers.ViTForImageClassification(settings).eval()

    def seen(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values=images).logits

    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    names = [n for n, m in base().named_modules() if isinstance(m, nn.Linear)]
    targets = [n for n in names if n.endswith(("query", "value", "attention.q_proj", "v_proj"))]
    model, plain = base(), seen(base())
    model = adapt(model, targets, modules_to_save=["classifier"])
    start, told = same(seen(model), plain), []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    wanted = seen(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = tried(lambda: same(seen(peft.PeftModel.from_pretrained(base(), folder)), wanted))
    merged = same(seen(model.merge_and_unload()), wanted)
    return f"start {start}, loss falls {told[-1] < told[0]}, merged {merged}, file {file}"


def vit() -> str:
    """ViT's blocks."""
    return f"base: {vit_blocks(768, 12)}; large: {vit_blocks(1024, 16)}"


class Reads(nn.Module):
    """A layer that is called, one whose weight is read, one that is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call one, read one."""
        return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)


def never_called() -> str:
    """a layer that is never called, or read."""
    model = disturb(adapt(Reads(), ["called", "read", "unused"]))
    model(torch.randn(3, 4)).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return f"no error; no gradient for the adapters of {sorted({n.split('.')[2] for n in dead})}"


def quantised_training() -> str:
    """QLoRA: Trainer over 4 and 8 bits."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    told = []
    with tempfile.TemporaryDirectory() as folder:
        llama(**sizes).save_pretrained(folder + "/base")

        def load(bits: int) -> Any:
            quantised = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder + "/base", quantization_config=quantised, device_map={"": "cpu"},
                dtype=torch.float32,
            ).eval()  # fmt: skip

        for bits in (4, 8):
            model = peft.prepare_model_for_kbit_training(load(bits))
            plain = answer(model)
            model = adapt(model, list(LAYERS), task_type="CAUSAL_LM")
            start, output = same(answer(model), plain), f"{folder}/{bits}"
            options = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-2}
            made = trainer_over(model, output, max_steps=8, save_steps=8, **options)
            made.train()
            falls = losses(made)[-1] < losses(made)[0] - 0.1
            wanted = answer(model.eval())

            def read(bits: int = bits, output: str = output) -> Any:
                path = output + "/checkpoint-8"
                return peft.PeftModel.from_pretrained(load(bits), path).eval()

            def merged(model: Any, wanted: torch.Tensor = wanted) -> str:
                return tried(lambda: same(answer(model.merge_and_unload()), wanted))

            told.append(f"{bits} bits: start {start}, loss falls {falls}")
            fresh, used = merged(read()), read()
            told.append(f"read {same(answer(used), wanted)}, merged {fresh}")
            # bitsandbytes packs weights of 4 bits anew when they first run on a CPU.
            told.append(f"merged after a forward pass {merged(used)}")
    return "; ".join(told)


def empty_weights() -> str:
    """init_empty_weights, load_checkpoint_and_dispatch."""
    model, plain = llama(), answer(llama())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder + "/base")
        model = disturb(adapt(model, list(LAYERS)))
        model.save_pretrained(folder + "/adapter")
        with accelerate.init_empty_weights():
            empty = transformers.LlamaForCausalLM(llama().config)
        filled = accelerate.load_checkpoint_and_dispatch(
            empty.eval(), folder + "/base", device_map={"": "cpu"}
        )
        start = same(answer(adapt(copy.deepcopy(filled), list(LAYERS))), plain)
        again = peft.PeftModel.from_pretrained(filled, folder + "/adapter")
        return f"filled first: start {start}, with its adapter {same(answer(again), answer(model))}"


def supervised() -> str:
    """TRL's SFT, gradient checkpointing on."""
    import trl

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            folder, max_steps=6, per_device_train_batch_size=8, logging_steps=1, save_steps=6,
            learning_rate=0.05, bf16=False, gradient_checkpointing=True, **QUIET,
        )  # fmt: skip
        made = trl.SFTTrainer(
            llama(),
            args=arguments,
            train_dataset=rows(text=lambda i: f"w{i} w{i + 1} w{i + 2}").select(range(8)),
            processing_class=tokenizer(),
            peft_config=config(list(LAYERS), task_type="CAUSAL_LM"),
        )
        made.train()
        falls = losses(made)[-1] < losses(made)[0] - 0.05
        return f"loss falls {falls}; a checkpoint holds {held(folder + '/checkpoint-6')}"


def preferences(model: Any, folder: str, **options: Any) -> Any:
    """TRL's DPO without a second model."""
    import trl

    arguments = trl.DPOConfig(
        folder, max_steps=8, beta=1.0, per_device_train_batch_size=4, learning_rate=0.05,
        lr_scheduler_type="constant", logging_steps=1, bf16=False, gradient_checkpointing=False,
        save_steps=8, **QUIET,
    )  # fmt: skip
    data = rows(
        prompt=lambda i: f"w{i} w{i + 1}",
        chosen=lambda i: f" w{i + 2} w3",
        rejected=lambda i: f" w{i + 4} w9",
    )
    return trl.DPOTrainer(
        model, args=arguments, train_dataset=data, processing_class=tokenizer(), **options
    )


def dpo(make: Callable[[str], Any]) -> str:
    """How DPO goes: the first loss is log 2 if the policy starts as its reference."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(folder)
        batch = next(iter(made.get_train_dataloader()))

        def referred() -> torch.Tensor:
            torch.manual_seed(0)
            return torch.stack(made.compute_ref_log_probs(made.model, batch))

        before = referred()
        made.train()
        told = losses(made)
        return (
            f"a second model {made.ref_model is not None}, first loss {told[0]:.4f}, falls"
            f" {told[-1] < told[0] - 0.01}, its reference stays {same(referred(), before)}"
        )


def dpo_from_the_base() -> str:
    """TRL's DPO against the base."""
    settings = config(list(LAYERS), task_type="CAUSAL_LM")
    return dpo(lambda folder: preferences(llama(), folder, peft_config=settings))


def dpo_from_an_adapter() -> str:
    """TRL's DPO, going on from an adapter."""
    model = disturb(adapt(llama(), list(LAYERS), task_type="CAUSAL_LM"))
    return dpo(lambda folder: preferences(model, folder))


def sentences(folder: str) -> Any:
    """A small sentence transformer, saved and read as its users have theirs."""
    import sentence_transformers
    from sentence_transformers import models

    place = Path(folder, "sentences")
    if not place.exists():
        torch.manual_seed(0)
        settings = transformers.BertConfig(**SIZES, **HEADS, max_position_embeddings=16)
        transformers.BertModel(settings).save_pretrained(Path(folder, "bert"))
        tokenizer().save_pretrained(Path(folder, "bert"))
        parts = [models.Transformer(str(Path(folder, "bert"))), models.Pooling(16)]
        made = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
        made.save_pretrained(str(place))
    return sentence_transformers.SentenceTransformer(str(place), device="cpu")


def encoded(model: Any) -> torch.Tensor:
    """What a sentence transformer says."""
    return torch.from_numpy(model.encode(["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]))


# transformers 5.24's add_adapter asks for PEFT 0.22, which isn't out: try it as if it did not.
as_if_newer = mock.patch("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


def adapt_sentences(folder: str, **options: Any) -> tuple[Any, str]:
    """By add_adapter, as their documentation has it, or else the transformer inside under PEFT."""
    settings = config(["query", "value"], **options)
    for call in ("add_adapter", "get_peft_model"):
        model = sentences(folder)
        torch.manual_seed(0)
        if call == "get_peft_model":
            model[0].model = peft.get_peft_model(model[0].model, settings)
        else:
            with contextlib.suppress(TypeError):
                model.add_adapter(settings)
                break
    return model, call


def sentences_with(folder: str, adapter: str) -> Any:
    """The base with a saved adapter on top."""
    model = sentences(folder)
    model[0].model = peft.PeftModel.from_pretrained(model[0].model, adapter)
    return model.eval()


def refused_sentences() -> str:
    """sentence-transformers, add_adapter as it is."""
    with tempfile.TemporaryDirectory() as folder:
        sentences(folder).add_adapter(config(["query", "value"]))
    return "no error"


@as_if_newer
def saved_sentences() -> str:
    """sentence-transformers, saved and read."""
    import sentence_transformers

    with tempfile.TemporaryDirectory() as folder:
        plain, (model, call) = encoded(sentences(folder)), adapt_sentences(folder)
        start = same(encoded(model), plain)
        wanted, saved = encoded(disturb(model)), folder + "/saved"
        model.save_pretrained(saved)
        on_top = same(encoded(sentences_with(folder, saved)), wanted)

        def read() -> str:
            again = sentence_transformers.SentenceTransformer(saved, device="cpu")
            return same(encoded(again), wanted)

        return (
            f"{call}: start {start}; saved whole it holds {held(saved)}; on top {on_top};"
            f" read as it is saved {tried(read)}"
        )


def trained_sentences(folder: str, output: str, resume: str | None = None, **options: Any) -> Any:
    """A sentence transformer after six steps under its own Trainer."""
    import sentence_transformers
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model, _ = adapt_sentences(folder, **dropout())
    options = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, **QUIET, **options}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output, per_device_train_batch_size=4, **options
    )
    pairs = rows(anchor=lambda i: f"w{i} w{i + 1}", positive=lambda i: f"w{i + 1} w{i + 2}")
    made = sentence_transformers.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=pairs,
        eval_dataset=pairs.select(range(4)),
        loss=MultipleNegativesRankingLoss(model),
    )
    if made.args.load_best_model_at_end:
        measured = iter([1.0, 3.0, 2.0])  # the first is the best

        def evaluate(*_: Any, **__: Any) -> dict[str, float]:
            found = {"eval_loss": next(measured)}
            made.control = made.callback_handler.on_evaluate(
                made.args, made.state, made.control, found
            )
            return found

        made.evaluate = evaluate
    made.train(resume_from_checkpoint=resume)
    return model.eval()


@as_if_newer
def resumed_sentences() -> str:
    """sentence-transformers, resuming."""
    with tempfile.TemporaryDirectory() as folder:
        whole = encoded(trained_sentences(folder, folder + "/whole"))
        half = folder + "/whole/checkpoint-2"
        return f"resumed {same(encoded(trained_sentences(folder, folder + '/b', half)), whole)}"


@as_if_newer
def best_sentences() -> str:
    """sentence-transformers, the best at the end."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        best = encoded(trained_sentences(folder, folder + "/best", **options))
        first = sentences_with(folder, folder + "/best/checkpoint-2")
        last = encoded(trained_sentences(folder, folder + "/last"))
        return f"the best {same(best, encoded(first))}; the last {same(best, last)}"


def under_lightning() -> str:
    """Lightning."""
    import lightning

    torch.manual_seed(1)
    x = torch.randn(16, 8)

    class Fits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapt(mlp(), ["0", "2"])

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return (self.model(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-2)

    def fit(path: str, epochs: int, resume: str | None = None) -> Any:
        module, data = Fits(), torch.utils.data.TensorDataset(x)
        made = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        made.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
        made.save_checkpoint(path)
        return module

    with tempfile.TemporaryDirectory() as folder:
        whole = fit(folder + "/whole", 4)
        wanted = whole.model.eval()(x)
        fit(folder + "/half", 2)
        resumed = fit(folder + "/again", 4, folder + "/half")
        again = Fits.load_from_checkpoint(folder + "/whole", map_location="cpu")
    start = Fits().state_dict()
    moved = {n for n, t in whole.state_dict().items() if not torch.equal(t, start[n])}
    alone = moved <= {n for n, p in whole.named_parameters() if p.requires_grad}
    return (
        f"moved the adapter alone {alone}, read {same(again.model.eval()(x), wanted)},"
        f" resumed {same(resumed.model.eval()(x), wanted)}"
    )


def steps(model: nn.Module, x: torch.Tensor) -> None:
    """Three steps."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def eight_rows() -> torch.Tensor:
    """The same in each process."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def in_group(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    """A process of two."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    place = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    work(rank, folder)
    distributed.barrier()
    distributed.destroy_process_group()


def fsdp2_process(rank: int, folder: str) -> None:
    """Train a half of the rows over shards, and save a full checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, mesh = disturb(adapt(mlp(), ["0", "2"])), distributed.init_device_mesh("cpu", (2,))
    for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(model, eight_rows().chunk(2)[rank])
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save(state, folder + "/whole.pt")


def fsdp2() -> str:
    """FSDP2, two processes."""
    alone, again, x = disturb(adapt(mlp(), ["0", "2"])), adapt(mlp(), ["0", "2"]), eight_rows()
    steps(alone, x)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(in_group, (fsdp2_process, folder), nprocs=2)
        again.load_state_dict(torch.load(folder + "/whole.pt"))
    return f"a full checkpoint of what two learned, against one: {same(again(x), alone(x))}"


def fsdp1_process(rank: int, folder: str) -> None:
    """Train a half of the rows over flat shards, and save the adapter in both ways."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = disturb(adapt(mlp(), ["0", "2"]))
    options: Any = {"use_orig_params": True, "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(model, **options)
    steps(model, eight_rows().chunk(2)[rank])
    if rank == 0:
        model.module.save_pretrained(folder + "/outside")
    with FullyShardedDataParallel.summon_full_params(model):
        if rank == 0:
            model.module.save_pretrained(folder + "/inside")


def fsdp1() -> str:
    """FSDP1, two processes."""
    alone, x, told = disturb(adapt(mlp(), ["0", "2"])), eight_rows(), []
    steps(alone, x)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(in_group, (fsdp1_process, folder), nprocs=2)
        for place in ("inside", "outside"):

            def read(path: str = f"{folder}/{place}") -> str:
                return same(peft.PeftModel.from_pretrained(mlp(), path)(x), alone(x))

            told.append(f"saved {place} of summon_full_params, against one process: {tried(read)}")
    return "; ".join(told)


def split(model: nn.Module, prefix: str = "") -> nn.Module:
    """PyTorch's tensor parallelism, as its tutorial has it."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    into = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    place = f"{prefix}model.layers.*"
    plan: dict[str, Any] = {f"{place}.{name}": ColwiseParallel() for name in (*into, "mlp.up_proj")}
    plan |= {f"{place}.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(model, distributed.init_device_mesh("cpu", (2,)), plan)


def tensor_parallel_process(rank: int, folder: str) -> None:
    """PyTorch's in either order, and transformers' own."""
    model = disturb(adapt(llama(), list(LAYERS)))
    wanted, adapter = answer(model), f"{folder}/adapter{rank}"
    model.save_pretrained(adapter)

    def last() -> str:
        return same(answer(split(model, "base_model.model.")), wanted)

    def first() -> str:
        return same(answer(peft.PeftModel.from_pretrained(split(llama()), adapter)), wanted)

    def theirs() -> str:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder + "/base", tp_plan="auto", dtype=torch.float32
        )
        return same(answer(peft.PeftModel.from_pretrained(base, adapter)), wanted)

    told = {"adapted, then split": last, "split, then adapted": first, "transformers' own": theirs}
    text = "; ".join(f"{name} {tried(run)}" for name, run in told.items())
    Path(folder, f"told{rank}").write_text(text, encoding="utf-8")


def tensor_parallel() -> str:
    """tensor parallelism, two processes."""
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder + "/base")
        multiprocessing.spawn(in_group, (tensor_parallel_process, folder), nprocs=2)
        return Path(folder, "told0").read_text(encoding="utf-8")


SCENARIOS = [
    start_train_unload,
    merge_and_back,
    generation,
    conv1d,
    half,
    quantised,
    checkpointing,
    sdxl,
    tied,
    two_names,
    compiled,
    functorch,
    traced,
    exported,
    meta,
    copies,
    identity,
    names,
    all_or_nothing,
    threads,
    attention,
    attention_out,
    encoder_layer,
    experts,
    mamba,
    mamba_out,
    other_kinds,
    parametrised,
    offloaded_first,
    offloaded_last,
    device_map,
    file,
    trainer,
    trainer_best,
    trainer_dropout,
    pushed,
    offloaded_training,
    data_parallel,
    weights_under_autocast,
    empty_batch,
    vit,
    never_called,
    quantised_training,
    empty_weights,
    supervised,
    dpo_from_the_base,
    dpo_from_an_adapter,
    refused_sentences,
    saved_sentences,
    resumed_sentences,
    best_sentences,
    under_lightning,
    fsdp2,
    fsdp1,
    tensor_parallel,
]


def main() -> None:
    """Run every scenario."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    print(f"{kind}: peft {peft.__version__}, torch {torch.__version__}")
    for run in SCENARIOS:
        name = str(run.__doc__).removesuffix(".")
        with contextlib.redirect_stdout(io.StringIO()):  # Trainers print lines of their own
            told = tried(run)
        print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()

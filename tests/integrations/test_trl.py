"""TRL: preference training against the base without its adapters, and no second copy of it."""

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl

import aurora
from aurora.integrations.peft import AuroraPeftConfig, from_aurora
from aurora.integrations.transformers import AdapterCheckpoints, reference

WORDS = [f"w{i}" for i in range(28)]


class AdapterDPO(AdapterCheckpoints, trl.DPOTrainer):
    pass


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=32,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config)


def preferences():
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w3", "rejected": f" w{i + 4} w9"}
        for i in range(8)
    ]
    return datasets.Dataset.from_list(rows)


def trainer(folder, kind, model, **options):
    arguments = trl.DPOConfig(
        str(folder),
        max_steps=8,
        beta=1.0,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        report_to="none",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_steps=8,
    )
    return kind(
        model, args=arguments, train_dataset=preferences(), processing_class=tokenizer(), **options
    )


def ours(folder):
    model = llama()
    aurora.inject(model, r"(v|down)_proj", aurora.recommended(rank=2))
    return trainer(folder, AdapterDPO, model, ref_model=reference(model)), model


def under_peft(folder):
    config = AuroraPeftConfig(target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    made = trainer(folder, trl.DPOTrainer, llama(), peft_config=config)
    assert made.ref_model is None
    return made, made.model


def reference_log_probabilities(made):
    batch = next(iter(made.get_train_dataloader()))
    if made.ref_model is None:
        return made.compute_ref_log_probs(made.model, batch)
    return made.compute_ref_log_probs(made.ref_model, batch)


@pytest.mark.parametrize("make", [ours, under_peft])
def test_dpo_against_the_disabled_adapter(make, tmp_path):
    made, model = make(tmp_path)
    plain = list(llama().state_dict().values())
    base = [p for p in model.parameters() if any(torch.equal(p, tensor) for tensor in plain)]
    assert len(base) == len(plain)
    assert not any(p.requires_grad for p in base)
    parameters = {id(p) for p in model.parameters()}
    if made.ref_model is not None:
        assert {id(p) for p in made.ref_model.parameters()} <= parameters, "no second copy"
    torch.manual_seed(0)
    before = torch.stack(reference_log_probabilities(made))
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "at the start the policy is the reference"
    assert losses[-1] < losses[0] - 0.01
    torch.manual_seed(0)
    torch.testing.assert_close(torch.stack(reference_log_probabilities(made)), before)
    assert all(any(torch.equal(p, tensor) for tensor in plain) for p in base)


def test_every_reference_trains_alike(tmp_path):
    """One that shares the base, PEFT's disabled adapter, and a second copy: the same losses."""

    def start():
        model = llama()
        torch.manual_seed(5)
        aurora.inject(model, r"(v|down)_proj", 2)
        return model

    losses = []
    for reference_of in (reference, lambda model: llama(), None):
        model = start()
        options = {"ref_model": reference_of(model)} if reference_of else {}
        model = model if reference_of else from_aurora(model, task_type="CAUSAL_LM")
        made = trainer(tmp_path / str(len(losses)), trl.DPOTrainer, model, **options)
        made.train()
        losses.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert losses[0][-1] != losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) == losses[2]


def test_dpo_checkpoints_hold_the_adapter_alone(tmp_path):
    made, model = ours(tmp_path)
    made.train()
    assert not (tmp_path / "checkpoint-8" / "config.json").exists()
    fresh = llama()
    aurora.load(fresh, tmp_path / "checkpoint-8" / "model.safetensors")
    for name, tensor in aurora.adapter_state_dict(model).items():
        assert torch.equal(aurora.adapter_state_dict(fresh)[name], tensor)


def test_dpo_goes_on_from_a_trained_adapter(tmp_path):
    """TRL then keeps a copy of the adapter as "ref", by PEFT's names, and refers to that."""
    config = AuroraPeftConfig(target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    made = trainer(tmp_path, trl.DPOTrainer, model)
    names = [name for name, _ in made.model.named_parameters() if ".default." in name]
    for name in names:
        copied = made.model.get_parameter(name.replace(".default.", ".ref."))
        assert torch.equal(copied, made.model.get_parameter(name))
        assert not copied.requires_grad
    assert names
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.01


def test_supervised_training(tmp_path):
    """SFTTrainer over our own form, its loss down and its checkpoint small."""

    class AdapterSFT(AdapterCheckpoints, trl.SFTTrainer):
        pass

    model = llama()
    aurora.inject(model, "all-linear", aurora.recommended(rank=2))
    rows = datasets.Dataset.from_list([{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(8)])
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        report_to="none",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=True,
        use_cpu=True,
        save_steps=6,
    )
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, lr=1e-2))
    made = AdapterSFT(
        model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    assert not (tmp_path / "checkpoint-6" / "config.json").exists()
